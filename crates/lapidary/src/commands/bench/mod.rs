//! `lapidary bench`: how fast this machine is at what matters.

mod compress;
mod decoding;
mod mixers;
mod sparse;

use std::time::Instant;

use crate::cli::{Bench, Global};
use crate::{loading, output};
use anyhow::{Result, bail, ensure};
use lapidary_explain::{Options, Question, Target, explainer};
use lapidary_kernels::{DType, Tensor};
use lapidary_model::{
    AbsolutePosition, HeadSpec, Input, InputSpec, Model, ModelSpec, Pass, TokenInput,
};
use lapidary_parts::attention::{MixerSpec, MultiHeadSpec};
use lapidary_parts::block::{BlockSpec, Wiring};
use lapidary_parts::feedforward::{DenseSpec, FeedforwardSpec};
use lapidary_parts::norm::NormSpec;
use lapidary_train::data::Copying;
use lapidary_train::spec::{CheckpointSpec, DataSpec, OptimiserSpec, ScheduleSpec, ValidationSpec};
use lapidary_train::{TrainSpec, Trainer};
use serde_json::json;

/// Tokens that are written behind a prompt.
const WRITTEN: usize = 32;

const WORKS: &str = "forward, step, explain, generate, compress, mixers, decoding or sparse";

pub fn run(arguments: &Bench, global: &Global) -> Result<()> {
    ensure!(arguments.repeat >= 1, "repeat is 0, but must be at least 1");
    ensure!(arguments.batch >= 1, "batch is 0, but must be at least 1");
    ensure!(
        arguments.vocabulary >= 4,
        "vocabulary is {}, but must be at least 4",
        arguments.vocabulary
    );
    check_heard(arguments)?;
    match arguments.work.as_str() {
        "sparse" => return sparse::run(arguments, global),
        "compress" => return compress::run(arguments, global),
        "mixers" => return mixers::run(arguments, global),
        "decoding" => return decoding::run(arguments, global),
        _ => {}
    }
    let mut times = match arguments.work.as_str() {
        "step" => step(arguments, global)?,
        "forward" => forward(arguments, global)?,
        "explain" => explain(arguments, global)?,
        "generate" => generate(arguments, global)?,
        other => bail!("work is {other:?}, but must be {WORKS}"),
    };
    times.sort_by(f64::total_cmp);
    let median = times.get(times.len() / 2).copied().unwrap_or(f64::NAN);
    let (least, most) = (
        times.first().copied().unwrap_or(median),
        times.last().copied().unwrap_or(median),
    );
    let peak = peak_memory();
    if global.json {
        return output::print_json(&json!({
            "work": arguments.work,
            "median_seconds": median,
            "least_seconds": least,
            "most_seconds": most,
            "repetitions": times.len(),
            "peak_bytes": peak,
            "threads": rayon::current_num_threads(),
        }));
    }
    let peak = peak.map_or_else(|| "unknown".to_owned(), output::bytes);
    output::print(&format!(
        "{}: median {:.2} ms (least {:.2}, most {:.2}) over {} repetitions, {} threads, peak memory {peak}\n",
        arguments.work,
        median * 1e3,
        least * 1e3,
        most * 1e3,
        times.len(),
        rayon::current_num_threads(),
    ))
}

/// Refuses options that the work does not hear.
fn check_heard(arguments: &Bench) -> Result<()> {
    let work = arguments.work.as_str();
    for (option, given, heard) in [
        (
            "--model",
            arguments.model.is_some(),
            &["forward", "explain", "generate", "compress"][..],
        ),
        (
            "--method",
            arguments.method.is_some(),
            &["explain", "compress", "mixers", "decoding"],
        ),
    ] {
        ensure!(
            !given || heard.contains(&work),
            "{option} is for the works {}, but the work is {work}",
            heard.join(", ")
        );
    }
    Ok(())
}

/// A pre-norm block of tokens of `width` around such attention.
fn block(width: usize, attention: MultiHeadSpec) -> BlockSpec {
    BlockSpec {
        repeat: 1,
        wiring: Wiring::PreNorm,
        norm: NormSpec::default(),
        attention: MixerSpec::MultiHead(attention),
        cross_attention: None,
        shared: false,
        layer_scale: None,
        drop_path: 0.0,
        dropout_by_feature: false,
        coding_step: None,
        shortcuts: false,
        feedforward: Some(FeedforwardSpec::Dense(DenseSpec {
            hidden: 4 * width,
            activation: Default::default(),
            bias: true,
        })),
        dropout: 0.0,
    }
}

/// The decoder that the options describe.
fn spec(arguments: &Bench) -> ModelSpec {
    let causal = MultiHeadSpec {
        causal: true,
        ..MultiHeadSpec::new(arguments.heads)
    };
    let block = BlockSpec {
        repeat: arguments.blocks,
        ..block(arguments.width, causal)
    };
    ModelSpec {
        width: arguments.width,
        input: InputSpec::Tokens(TokenInput {
            vocabulary: arguments.vocabulary,
            // Room for what is written behind a sequence.
            length: (2 * arguments.length).max(arguments.length + WRITTEN),
            position: AbsolutePosition::Learned {
                offset: 0,
                skip_padding: false,
            },
            token_types: 0,
            norm: None,
            embedding_width: None,
            projected: Default::default(),
            dropout: 0.0,
            dropout_by_feature: false,
        }),
        blocks: vec![block],
        final_norm: Some(NormSpec::default()),
        head: HeadSpec::LanguageModel {
            tied: false,
            bias: false,
            transform: None,
        },
        low_rank: Default::default(),
        quantised: Default::default(),
        organisation: None,
        initial: Default::default(),
    }
}

/// The model of `--model`, or one that the options describe.
fn model(arguments: &Bench, global: &Global) -> Result<Model> {
    match &arguments.model {
        Some(model) => {
            let package = loading::package(model, global)?;
            let model = package.towers.into_iter().next().map(|tower| tower.model);
            model.ok_or_else(|| anyhow::anyhow!("the package holds no model"))
        }
        None => Ok(Model::initialised(
            spec(arguments),
            global.seed,
            DType::F32,
            &loading::device(global)?,
        )?),
    }
}

fn ids(model: &Model, batch: usize, length: usize) -> Result<Tensor> {
    let vocabulary = model
        .spec()
        .vocabulary()
        .unwrap_or(4)
        .saturating_sub(1)
        .max(1);
    let ids: Vec<u32> = (0..batch * length)
        .map(|i| (i * 7919 % vocabulary) as u32)
        .collect();
    Ok(Tensor::from_vec(ids, (batch, length), &model.device())?)
}

/// Runs `work` once uncounted, and then as often as asked.
fn timed(arguments: &Bench, mut work: impl FnMut() -> Result<()>) -> Result<Vec<f64>> {
    work()?;
    (0..arguments.repeat)
        .map(|_| {
            let started = Instant::now();
            work()?;
            Ok(started.elapsed().as_secs_f64())
        })
        .collect()
}

fn step(arguments: &Bench, global: &Global) -> Result<Vec<f64>> {
    let spec = TrainSpec {
        seed: global.seed,
        steps: u64::MAX,
        batch: arguments.batch,
        length: arguments.length,
        accumulate: 1,
        clip: Some(1.0),
        average: None,
        dense_steps: 0,
        annealed_steps: 0,
        masking: None,
        self_distillation: None,
        recompute: false,
        loss_chunk: None,
        alignment: None,
        schedule: ScheduleSpec {
            peak: 1e-3,
            floor: 1e-3,
            warm_up: 0,
            decay: lapidary_train::Decay::Constant,
        },
        optimiser: OptimiserSpec::default(),
        groups: Vec::new(),
        validation: ValidationSpec::default(),
        checkpoint: CheckpointSpec::default(),
        data: DataSpec::Copying {
            symbols: arguments.vocabulary - 1,
        },
        model: spec(arguments),
    };
    let task = || Copying::new(arguments.vocabulary - 1).map(Box::new);
    let mut trainer = Trainer::new(spec, task()?, task()?, &loading::device(global)?)?;
    timed(arguments, || {
        trainer.step()?;
        Ok(())
    })
}

fn forward(arguments: &Bench, global: &Global) -> Result<Vec<f64>> {
    let model = model(arguments, global)?;
    let input = Input::tokens(ids(&model, arguments.batch, arguments.length)?);
    timed(arguments, || {
        model.forward(&input, Pass::default())?;
        Ok(())
    })
}

fn explain(arguments: &Bench, global: &Global) -> Result<Vec<f64>> {
    let model = model(arguments, global)?;
    let input = Input::tokens(ids(&model, 1, arguments.length)?);
    let target = match model.spec().head {
        HeadSpec::None | HeadSpec::Pixels | HeadSpec::Pooled { labels: None, .. } => {
            Target::Representation
        }
        _ => Target::class(0),
    };
    let method = explainer(arguments.method.as_deref().unwrap_or("decompx"))?;
    let question = Question::new(&model, &input);
    timed(arguments, || {
        method.explain(&question, target, &Options::default())?;
        Ok(())
    })
}

fn generate(arguments: &Bench, global: &Global) -> Result<Vec<f64>> {
    let model = model(arguments, global)?;
    let (length, most) = (arguments.length, model.spec().length());
    ensure!(
        length.saturating_add(WRITTEN) <= most,
        "length is {length}, but must be at most {}, so that {WRITTEN} tokens can be written behind it: the model \
         has {most}",
        most.saturating_sub(WRITTEN)
    );
    timed(arguments, || written(&model, length, WRITTEN))
}

/// Writes so many tokens after a prompt of `length`.
fn written(model: &Model, length: usize, new_tokens: usize) -> Result<()> {
    let prompt = ids(model, 1, length)?.flatten_all()?.to_vec1::<u32>()?;
    let options = lapidary_model::generation::GenerationOptions {
        new_tokens,
        ..Default::default()
    };
    lapidary_model::generation::generate(
        model,
        std::slice::from_ref(&prompt),
        &options,
        |_, _| std::ops::ControlFlow::Continue(()),
    )?;
    Ok(())
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times.get(times.len() / 2).copied().unwrap_or(f64::NAN)
}

/// The most memory this process has held, where the system tells.
fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    let kibibytes: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kibibytes * 1024)
}
