//! Sparse Transformer: two steps that reach everything, what they cost, an initialisation that
//! depth does not change, and text and pictures by dense, fixed and strided attention.
//!
//! The paper trains 30 layers on enwik8 and 128 on CIFAR-10. Here small decoders read the bytes of
//! a short text, where there is one, and printed digits.

mod pictures;

use super::attending;
use super::decoder::{self, Recipe};
use super::{after_training, mean, number, numbers};
use crate::catalogue::metered;
use crate::error::engine;
use crate::{Claim, Reproduction, Result, Scale, Setting, Verdict};
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::{HeadSpec, InitialValues, Initialiser, Input, Model, ModelSpec, Pass};
use lapidary_parts::attention::mechanism::MechanismSpec;
use lapidary_parts::attention::mechanism::sparse::{SparsePattern, SparseSpec, Steps};
use lapidary_signal::Trace;
use std::time::Instant;

const LONG: usize = 2048;

/// How much is done.
#[derive(Clone, Copy, Debug)]
struct Size {
    width: usize,
    blocks: usize,
    length: usize,
    stride: usize,
    steps: u64,
    deep_steps: u64,
}

impl Size {
    fn of(scale: Scale) -> Self {
        match scale {
            Scale::Smoke => Self {
                width: 32,
                blocks: 2,
                length: 64,
                stride: 8,
                steps: 2,
                deep_steps: 2,
            },
            Scale::Small => Self {
                width: 64,
                blocks: 2,
                length: 256,
                stride: 16,
                steps: 400,
                deep_steps: 40,
            },
            Scale::Full => Self {
                width: 128,
                blocks: 4,
                length: 512,
                stride: 32,
                steps: 2000,
                deep_steps: 300,
            },
        }
    }
}

/// Ways to attend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Dense,
    Fixed,
    Strided,
}

impl Way {
    const ALL: [Self; 3] = [Self::Dense, Self::Fixed, Self::Strided];

    fn name(self) -> &'static str {
        match self {
            Self::Dense => "dense",
            Self::Fixed => "fixed",
            Self::Strided => "strided",
        }
    }

    fn mechanism(self, stride: usize, heads: usize, steps: Steps) -> MechanismSpec {
        let pattern = match self {
            Self::Dense => return MechanismSpec::Softmax,
            Self::Fixed => {
                let summaries = (stride / 8).max(1);
                SparsePattern::Fixed {
                    stride,
                    summaries,
                    groups: heads.min(stride / summaries),
                }
            }
            Self::Strided => SparsePattern::Strided { stride },
        };
        MechanismSpec::Sparse(SparseSpec { pattern, steps })
    }

    fn spec(self, size: Size, vocabulary: usize) -> ModelSpec {
        let heads = (size.width / 16).max(1);
        let mechanism = self.mechanism(size.stride, heads, Steps::Merged);
        let attentions = vec![attending::causal(heads, mechanism); size.blocks];
        attending::spec(vocabulary, size.width, size.length, &attentions)
    }
}

/// How a deep decoder begins: as the paper's do, or with matrices of deviation `1 / √inputs` throughout, as is usual,
/// their output zeros too.
fn beginning(scaled: bool) -> InitialValues {
    match scaled {
        true => InitialValues::depth_scaled(),
        false => InitialValues::DepthScaled {
            gain: 1.0,
            by_depth: false,
        },
    }
}

/// A deep decoder whose steps alternate by block, its output not tied to the embeddings.
fn deep(blocks: usize, size: Size, initial: InitialValues) -> ModelSpec {
    let heads = (size.width / 16).max(1);
    let attentions: Vec<_> = (0..blocks)
        .map(|block| {
            let steps = if block % 2 == 0 {
                Steps::First
            } else {
                Steps::Second
            };
            attending::causal(heads, Way::Strided.mechanism(size.stride, heads, steps))
        })
        .collect();
    let mut spec = attending::spec(256, size.width, size.length, &attentions);
    spec.head = HeadSpec::LanguageModel {
        tied: false,
        bias: false,
        transform: None,
    };
    spec.initial = initial;
    spec
}

fn tokens(length: usize, seed: u64) -> Result<Input> {
    let mixed = |i: usize| {
        ((i as u64 + 1)
            .wrapping_mul(seed | 1)
            .wrapping_mul(0x9e37_79b9)
            >> 7)
            % 256
    };
    let ids: Vec<u32> = (0..length).map(|i| mixed(i) as u32).collect();
    Ok(Input::tokens(engine(Tensor::from_vec(
        ids,
        (1, length),
        &Device::Cpu,
    ))?))
}

/// Runs the experiment.
pub fn run(setting: &Setting) -> Result<Reproduction> {
    let size = Size::of(setting.scale);
    let mut claims = vec![reach(setting)?];
    claims.extend(start(size, setting)?);
    claims.extend(cost(size, setting)?);
    claims.extend(text(size, setting)?);
    claims.extend(pictures::pictures(size, setting)?);
    Ok(Reproduction {
        setting: format!(
            "decoders of {} blocks, width {}, {} steps of 8 windows of {} bytes of tiny Shakespeare, \
             stride {}, both steps merged; as many steps of {} digits of 8 × 8 pixels, stride 8; one seed",
            size.blocks,
            size.width,
            size.steps,
            size.length,
            size.stride,
            pictures::BATCH
        ),
        claims,
        ..Reproduction::default()
    })
}

/// The boolean product of what two blocks look at.
fn reach(setting: &Setting) -> Result<Claim> {
    let (length, size) = (64, Size::of(Scale::Smoke));
    let spec = deep(2, size, InitialValues::OfParts);
    let model = Model::initialised(spec, setting.seed, DType::F32, &Device::Cpu)?;
    let trace = Trace::new().capture("*.attention.weights")?;
    let pass = Pass {
        trace: Some(&trace),
        ..Pass::default()
    };
    model.forward(&tokens(length, setting.seed)?, pass)?;
    let seen = |block: usize| -> Result<Vec<bool>> {
        let weights = trace.signal(&format!("blocks.{block}.attention.weights"))?;
        let first = engine(engine(weights.value().narrow(1, 0, 1))?.flatten_all())?;
        Ok(numbers(&first)?
            .into_iter()
            .map(|weight| weight > 0.0)
            .collect())
    };
    let steps = [seen(0)?, seen(1)?];
    let sees = |step: usize, i: usize, j: usize| steps[step].get(i * length + j) == Some(&true);
    let (mut reached, mut direct, mut least) = (0, [0, 0], 0);
    for (i, j) in (0..length).flat_map(|i| (0..=i).map(move |j| (i, j))) {
        least += 1;
        reached += usize::from((0..length).any(|k| sees(1, i, k) && sees(0, k, j)));
        for (step, direct) in direct.iter_mut().enumerate() {
            *direct += usize::from(sees(step, i, j));
        }
    }
    Ok(Claim::new(
        "two interleaved steps reach every earlier token, neither step alone does",
        "by construction",
        format!(
            "{reached} of {least} pairs of {length} tokens in two blocks; {} and {} in one",
            direct[0], direct[1]
        ),
        Verdict::of(reached == least && direct.iter().all(|direct| *direct < least)),
    ))
}

/// Loss and size of activations before training.
fn start(size: Size, setting: &Setting) -> Result<Vec<Claim>> {
    let depths: &[usize] = match setting.scale {
        Scale::Smoke => &[6, 24],
        Scale::Small | Scale::Full => &[6, 12, 24, 48],
    };
    let mut ratios = Vec::new();
    let mut worst: f64 = 0.0;
    for &blocks in depths {
        let spec = deep(blocks, size, beginning(true));
        let model = Model::initialised(spec, setting.seed, DType::F32, &Device::Cpu)?;
        let trace = Trace::new().capture("blocks.*.{in,out}")?;
        let pass = Pass {
            trace: Some(&trace),
            ..Pass::default()
        };
        let logits = model
            .forward(&tokens(size.length, setting.seed)?, pass)?
            .into_logits()?;
        let largest = numbers(logits.value())?
            .into_iter()
            .fold(0.0, |m: f64, x| m.max(x.abs()));
        worst = worst.max(largest);
        let rms = |site: String| -> Result<f64> {
            Ok(number(&engine(
                engine(trace.signal(&site)?.value().sqr())?.mean_all(),
            )?)?
            .sqrt())
        };
        let last = rms(format!("blocks.{}.out", blocks - 1))?;
        ratios.push(last / rms("blocks.0.in".to_owned())?);
    }
    let listed: Vec<String> = depths
        .iter()
        .zip(&ratios)
        .map(|(blocks, ratio)| format!("{ratio:.3} at {blocks}"))
        .collect();
    let text = attending::shakespeare(setting)?;
    let mut claims = vec![
        Claim::new(
            "at the start all tokens are equally likely: the loss is ln(vocabulary)",
            "exact",
            format!("largest score {worst:.1e}"),
            Verdict::of(worst == 0.0),
        ),
        Claim::new(
            "the root mean square behind 6 to 48 blocks is within 0.5 to 2 of that before them",
            "none",
            listed.join(", "),
            Verdict::of(ratios.iter().all(|ratio| (0.5..=2.0).contains(ratio))),
        ),
    ];
    let claim = "24 blocks train steadily at a rate of 1e-3 from the scaled start, and diverge or \
                 stall from the unscaled one";
    claims.push(match text {
        None => without_text(claim),
        Some([training, _]) => {
            let blocks = 24;
            let size = Size {
                length: 64,
                stride: 8,
                ..size
            };
            let recipe = Recipe {
                batch: 4,
                length: size.length,
                peak: 1e-3,
                ..Recipe::default()
            };
            let mut ends = Vec::new();
            for scaled in [true, false] {
                let mut source = Initialiser::new(setting.seed, DType::F32, Device::Cpu);
                let mut losses = Vec::new();
                let done = decoder::train_from(
                    &mut source,
                    recipe,
                    deep(blocks, size, beginning(scaled)),
                    Box::new(training.clone()),
                    size.deep_steps,
                    setting.seed,
                    |step, _| {
                        losses.push(step.loss);
                        Ok(())
                    },
                );
                ends.push(match done {
                    Ok(_) => mean(losses.into_iter().rev().take(5)),
                    // The loss was no number any more.
                    Err(_) => f64::INFINITY,
                });
            }
            let [scaled, unscaled] = [0, 1].map(|way| ends.get(way).copied().unwrap_or(f64::NAN));
            // A nat below knowing nothing.
            let trains = |loss: f64| loss < 256f64.ln() - 1.0;
            Claim::new(
                claim,
                "none",
                format!(
                    "after {} steps {scaled:.3} nats from the scaled start, {unscaled:.3} from \
                     one of deviation 1/√inputs throughout",
                    size.deep_steps
                ),
                after_training(setting.scale, trains(scaled) && !trains(unscaled)),
            )
        }
    });
    Ok(claims)
}

fn without_text(claim: &str) -> Claim {
    Claim::new(
        claim,
        "see the paper",
        "no data set at hand",
        Verdict::NotMeasured,
    )
}

/// Operations and time at 2048 tokens.
fn cost(size: Size, setting: &Setting) -> Result<Vec<Claim>> {
    let size = Size {
        length: LONG,
        stride: 32,
        ..size
    };
    let mut costs = Vec::new();
    for way in Way::ALL {
        let spec = way.spec(size, 256);
        let model = Model::initialised(spec, setting.seed, DType::F32, &Device::Cpu)?;
        let input = tokens(LONG, setting.seed)?;
        let meter = metered(&model, LONG)?;
        let mut seconds: Vec<f64> = Vec::new();
        for _ in 0..if setting.scale == Scale::Smoke { 1 } else { 5 } {
            let started = Instant::now();
            model.forward(&input, Pass::default())?;
            seconds.push(started.elapsed().as_secs_f64());
        }
        let best = seconds.into_iter().fold(f64::INFINITY, f64::min);
        costs.push((way, meter.total().flops as f64, best));
    }
    let of = |way: Way| {
        let found = costs.iter().find(|(found, ..)| *found == way);
        found.map_or((f64::NAN, f64::NAN), |(_, flops, best)| (*flops, *best))
    };
    let (dense, fixed, strided) = (of(Way::Dense), of(Way::Fixed), of(Way::Strided));
    Ok(vec![
        Claim::new(
            "the whole decoder has fewer than half the operations of the dense one at 2048 tokens",
            "none",
            format!(
                "{:.2} times fewer fixed, {:.2} strided",
                dense.0 / fixed.0,
                dense.0 / strided.0
            ),
            Verdict::of(dense.0 > 2.0 * fixed.0 && dense.0 > 2.0 * strided.0),
        ),
        Claim::new(
            "a pass at 2048 tokens is at least twice as fast as a dense one",
            "2.4 times fixed, 3.7 strided (enwik8 at 12 288, on a GPU)",
            format!(
                "{:.2} times fixed, {:.2} strided; dense {:.1} ms",
                dense.1 / fixed.1,
                dense.1 / strided.1,
                dense.1 * 1e3
            ),
            after_training(
                setting.scale,
                dense.1 > 2.0 * fixed.1 && dense.1 > 2.0 * strided.1,
            ),
        ),
    ])
}

/// Bytes of a text by each way.
fn text(size: Size, setting: &Setting) -> Result<Vec<Claim>> {
    let names = [
        "on text, fixed is within 0.03 nats of dense",
        "on text, strided is worse than fixed",
    ];
    let Some([training, mut test]) = attending::shakespeare(setting)? else {
        return Ok(names.map(without_text).into());
    };
    let recipe = Recipe {
        batch: 8,
        length: size.length,
        narrow: true,
        ..Recipe::default()
    };
    let mut losses = Vec::new();
    for way in Way::ALL {
        let task = Box::new(training.clone());
        let model = decoder::train_by(recipe, way.spec(size, 256), task, size.steps, setting.seed)?;
        losses.push(attending::measure(&model, &mut test, recipe, 16)?.loss);
    }
    let [dense, fixed, strided] = [0, 1, 2].map(|way| losses.get(way).copied().unwrap_or(f64::NAN));
    let found = Way::ALL.iter().zip(&losses);
    let found: Vec<String> = found
        .map(|(way, loss)| format!("{} {loss:.4}", way.name()))
        .collect();
    let found = format!("held-out nats a byte: {}", found.join(", "));
    let [near, worse] = names;
    Ok(vec![
        Claim::new(
            near,
            "0.99 bits fixed, 1.00 dense (enwik8)",
            found.clone(),
            after_training(setting.scale, fixed < dense + 0.03),
        ),
        Claim::new(
            worse,
            "1.13 bits strided, 0.99 fixed (enwik8)",
            found,
            after_training(setting.scale, strided > fixed),
        ),
    ])
}
