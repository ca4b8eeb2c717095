//! The block of An Introduction to Transformers, its properties checked on live tensors.
//!
//! The note writes tokens as columns; here they are rows, so that attention weights sum to one
//! along rows. It has no experiments; the closing example is a small decoder beside a bigram
//! model.

use super::bigram::{Bigram, TextTask, bytes_split};
use super::{after_training, decoder, difference, mean, number, numbers};
use crate::error::engine;
use crate::{Claim, Error, Reproduction, Result, Scale, Setting, Verdict};
use lapidary_kernels::check::gradient_error;
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::{
    AbsolutePosition, HeadSpec, Initialiser, Input, InputSpec, Model, ModelSpec, Pass, TokenInput,
};
use lapidary_parts::attention::{MixerSpec, MultiHeadSpec};
use lapidary_parts::block::{BlockSpec, Wiring};
use lapidary_parts::feedforward::{DenseSpec, FeedforwardSpec};
use lapidary_parts::norm::NormSpec;
use lapidary_parts::parameters::{Init, ParameterSource};
use lapidary_signal::meter::Meter;
use lapidary_signal::{Signal, Trace};
use lapidary_train::batch_loss;
use lapidary_train::data::{BYTE_VOCABULARY, LanguageTask, Task};
use lapidary_train::generator;
use lapidary_train::language::Split;
use std::collections::BTreeMap;

/// `N`, `D` and `H`.
const TOKENS: usize = 5;
const WIDTH: usize = 8;
const HEADS: usize = 2;

/// Initial values large enough that nonlinearities bend and biases count.
struct Lively(Initialiser);

impl ParameterSource for Lively {
    fn parameter(
        &mut self,
        name: &str,
        shape: &[usize],
        init: Init,
    ) -> lapidary_parts::Result<Tensor> {
        let noise = self
            .0
            .parameter(name, shape, Init::Normal { deviation: 0.3 })?;
        match init {
            Init::Ones => Ok((noise + 1.0).map_err(lapidary_kernels::Error::from)?),
            _ => Ok(noise),
        }
    }
}

/// One block in `f64` with its parameters, to be run on vectors.
#[derive(Clone)]
struct Specimen {
    spec: ModelSpec,
    parameters: BTreeMap<String, Tensor>,
}

impl Specimen {
    fn new(causal: bool, bias: bool, seed: u64) -> Result<Self> {
        let attention = MultiHeadSpec {
            causal,
            bias,
            ..MultiHeadSpec::new(HEADS)
        };
        let spec = ModelSpec {
            width: WIDTH,
            input: InputSpec::Tokens(TokenInput {
                vocabulary: 1,
                length: TOKENS,
                position: AbsolutePosition::None,
                token_types: 0,
                norm: None,
                embedding_width: None,
                projected: Default::default(),
                dropout: 0.0,
                dropout_by_feature: false,
            }),
            blocks: vec![BlockSpec {
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
                    hidden: 4 * WIDTH,
                    activation: Default::default(),
                    bias,
                })),
                dropout: 0.0,
            }],
            final_norm: None,
            head: HeadSpec::None,
            low_rank: BTreeMap::new(),
            quantised: BTreeMap::new(),
            organisation: None,
            initial: Default::default(),
        };
        let mut source = Lively(Initialiser::new(seed, DType::F64, Device::Cpu));
        let model = Model::new(spec.clone(), &mut source)?;
        Ok(Self {
            spec,
            parameters: model.parameters().clone(),
        })
    }

    fn model(&self) -> Result<Model> {
        Ok(Model::new(self.spec.clone(), &mut self.parameters.clone())?)
    }

    /// The same with the parameters of the block named set to zero.
    fn without(&self, names: &[&str]) -> Result<Self> {
        let mut other = self.clone();
        for name in names {
            let parameter = other.parameters.get_mut(&format!("blocks.0.{name}"));
            let parameter = parameter
                .ok_or_else(|| Error::Experiment(format!("the block has no parameter {name}")))?;
            *parameter = engine(parameter.zeros_like())?;
        }
        Ok(other)
    }

    /// Runs the block on `x` `[1, tokens, width]`.
    fn run(&self, x: &Tensor) -> Result<Tensor> {
        run_on(&self.model()?, x, Trace::new(), Pass::default()).map(|(y, _)| y)
    }

    /// Attention weights `[1, heads, query, key]` on `x`.
    fn weights(&self, x: &Tensor) -> Result<Tensor> {
        let trace = Trace::new().capture("blocks.0.attention.weights")?;
        let (_, trace) = run_on(&self.model()?, x, trace, Pass::default())?;
        Ok(trace.signal("blocks.0.attention.weights")?.into_value())
    }

    /// Parameters of the block.
    fn count(&self) -> usize {
        let of_block = self
            .parameters
            .iter()
            .filter(|(name, _)| name.starts_with("blocks."));
        of_block.map(|(_, tensor)| tensor.elem_count()).sum()
    }
}

/// Runs a model on `x` in the place of its embeddings.
fn run_on(model: &Model, x: &Tensor, trace: Trace, pass: Pass<'_>) -> Result<(Tensor, Trace)> {
    let vectors = x.clone();
    let trace = trace.replace("embeddings", move |_, _| Ok(Signal::from(vectors.clone())))?;
    let output = model.forward(
        &no_tokens(x)?,
        Pass {
            trace: Some(&trace),
            ..pass
        },
    )?;
    Ok((output.hidden.into_value(), trace))
}

/// Token ids that only say how many tokens there are.
fn no_tokens(x: &Tensor) -> Result<Input> {
    let length = engine(x.dim(1))?;
    Ok(Input::tokens(engine(Tensor::zeros(
        (1, length),
        DType::U32,
        &Device::Cpu,
    ))?))
}

fn draw(shape: &[usize], seed: u64) -> Result<Tensor> {
    let mut source = Initialiser::new(seed, DType::F64, Device::Cpu);
    Ok(source.parameter("tokens", shape, Init::Normal { deviation: 1.0 })?)
}

/// Runs the experiment.
pub fn run(setting: &Setting) -> Result<Reproduction> {
    let mut claims = properties(setting.seed)?;
    claims.push(closing_example(setting)?);
    Ok(Reproduction {
        setting: format!(
            "one pre-norm block, N = {TOKENS} tokens, D = {WIDTH}, H = {HEADS}, MLP of 4 D, with \
             random parameters in f64; and a decoder of two blocks as the closing example"
        ),
        claims,
        ..Reproduction::default()
    })
}

fn properties(seed: u64) -> Result<Vec<Claim>> {
    let x = draw(&[1, TOKENS, WIDTH], seed)?;
    let plain = Specimen::new(false, true, seed)?;
    let causal = Specimen::new(true, true, seed)?;
    Ok(vec![
        rows_sum_to_one(&plain, &x)?,
        uniform_without_queries(&plain, &x)?,
        keys_may_move_together(&plain, &x)?,
        permutation(&plain, &x)?,
        residual_identity(&plain, &x)?,
        causal_prefix(&causal, &x, seed)?,
        cache(&causal, &x)?,
        operations(&Specimen::new(false, false, seed)?, &x)?,
        parameters(&plain),
        gradient(&causal, &x)?,
    ])
}

fn exact(claim: &str, error: f64, tolerance: f64) -> Claim {
    let measured = format!("largest relative difference {error:.1e} in f64");
    Claim::new(claim, "exact", measured, Verdict::of(error <= tolerance))
}

fn rows_sum_to_one(block: &Specimen, x: &Tensor) -> Result<Claim> {
    let weights = block.weights(x)?;
    let sums = engine(weights.sum(3))?;
    let error = difference(&sums, &engine(sums.ones_like())?)?;
    let least = numbers(&weights)?.into_iter().fold(f64::INFINITY, f64::min);
    Ok(Claim::new(
        "attention weights are positive and sum to one",
        "exact",
        format!("least weight {least:.1e}, largest error of a sum {error:.1e} in f64"),
        Verdict::of(least > 0.0 && error < 1e-12),
    ))
}

fn uniform_without_queries(block: &Specimen, x: &Tensor) -> Result<Claim> {
    let zero = block.without(&["attention.query.weight", "attention.query.bias"])?;
    let weights = zero.weights(x)?;
    let uniform = engine(engine(weights.ones_like())? / TOKENS as f64)?;
    let claim = "with zero queries every weight is 1 / N";
    Ok(exact(claim, difference(&weights, &uniform)?, 1e-12))
}

fn keys_may_move_together(block: &Specimen, x: &Tensor) -> Result<Claim> {
    let still = block.without(&["attention.key.bias"])?;
    let claim = "a constant added to all keys leaves the weights as they are";
    Ok(exact(
        claim,
        difference(&still.weights(x)?, &block.weights(x)?)?,
        1e-12,
    ))
}

fn permutation(block: &Specimen, x: &Tensor) -> Result<Claim> {
    let order = engine(Tensor::new(&[3u32, 0, 4, 2, 1], &Device::Cpu))?;
    let permuted = |x: &Tensor| engine(x.index_select(&order, 1));
    let error = difference(&block.run(&permuted(x)?)?, &permuted(&block.run(x)?)?)?;
    Ok(exact(
        "permuting the tokens permutes the outputs",
        error,
        1e-12,
    ))
}

fn residual_identity(block: &Specimen, x: &Tensor) -> Result<Claim> {
    let silent = block.without(&[
        "attention.output.weight",
        "attention.output.bias",
        "feedforward.down.weight",
        "feedforward.down.bias",
    ])?;
    let claim = "without output weights the block is the identity";
    Ok(exact(claim, difference(&silent.run(x)?, x)?, 0.0))
}

fn causal_prefix(block: &Specimen, x: &Tensor, seed: u64) -> Result<Claim> {
    let prefix = 3;
    let before = engine(x.narrow(1, 0, prefix))?;
    let others = draw(&[1, TOKENS - prefix, WIDTH], seed ^ 1)?;
    let changed = engine(Tensor::cat(&[&before, &others], 1))?;
    let of = |x: &Tensor| -> Result<Tensor> { engine(block.run(x)?.narrow(1, 0, prefix)) };
    let claim = "under a causal mask, outputs do not depend on later tokens";
    Ok(exact(claim, difference(&of(&changed)?, &of(x)?)?, 0.0))
}

fn cache(block: &Specimen, x: &Tensor) -> Result<Claim> {
    let model = block.model()?;
    let mut state = model.decode_state();
    let mut outputs = Vec::new();
    for token in 0..TOKENS {
        let one = engine(x.narrow(1, token, 1))?;
        let pass = Pass {
            state: Some(&mut state),
            ..Pass::default()
        };
        outputs.push(run_on(&model, &one, Trace::new(), pass)?.0);
    }
    let cached = engine(Tensor::cat(&outputs, 1))?;
    let claim = "decoding token by token with a cache equals the full pass";
    Ok(exact(claim, difference(&cached, &block.run(x)?)?, 1e-12))
}

/// `8 N D² + 4 N² D + 16 N D²` in products; beside them softmax (5 per weight), two norms (8 per
/// feature), the activation and two sums (1 per feature), as the meter counts.
fn operations(block: &Specimen, x: &Tensor) -> Result<Claim> {
    let (n, d, h) = (TOKENS, WIDTH, HEADS);
    let meter = Meter::new();
    let (start, vectors) = (meter.clone(), x.clone());
    let trace = Trace::new().replace("embeddings", move |_, _| {
        Ok(Signal::from(vectors.clone()).into_metered(start.clone()))
    })?;
    let pass = Pass {
        trace: Some(&trace),
        ..Pass::default()
    };
    block.model()?.forward(&no_tokens(x)?, pass)?;
    let products = 8 * n * d * d + 4 * n * n * d + 16 * n * d * d;
    let others = 5 * h * n * n + 2 * 8 * n * d + 4 * n * d + 2 * n * d;
    let counted = (meter.total().flops as usize).saturating_sub(others);
    Ok(Claim::new(
        "counted operations of the products are 8 N D² + 4 N² D + 16 N D²",
        &products.to_string(),
        counted.to_string(),
        Verdict::of(counted == products),
    )
    .noted(format!(
        "N = {n}, D = {d}; {others} of softmax, norms, activation and sums apart"
    )))
}

fn parameters(block: &Specimen) -> Claim {
    let (expected, found) = (12 * WIDTH * WIDTH + 13 * WIDTH, block.count());
    Claim::new(
        "the block has 12 D² + 13 D parameters",
        &expected.to_string(),
        found.to_string(),
        Verdict::of(expected == found),
    )
    .noted("4 D² + 4 D of attention, 8 D² + 5 D of the MLP, 4 D of the norms")
}

fn gradient(block: &Specimen, x: &Tensor) -> Result<Claim> {
    let in_block = block
        .parameters
        .iter()
        .filter(|(name, _)| name.starts_with("blocks."));
    let (names, mut inputs): (Vec<String>, Vec<Tensor>) = in_block
        .map(|(name, tensor)| (name.clone(), tensor.clone()))
        .unzip();
    inputs.push(x.clone());
    let function = |inputs: &[Tensor]| -> lapidary_kernels::Result<Tensor> {
        let mut specimen = block.clone();
        for (name, tensor) in names.iter().zip(inputs) {
            specimen.parameters.insert(name.clone(), tensor.clone());
        }
        specimen.run(inputs.last().unwrap_or(x)).map_err(|error| {
            let expected = "a block that runs";
            lapidary_kernels::Error::argument("gradient check", "block", error, expected)
        })
    };
    let error = gradient_error(function, &inputs)?;
    Ok(Claim::new(
        "the gradient of the block equals central differences",
        "1e-6",
        format!("largest error {error:.1e} in f64"),
        Verdict::of(error < 1e-6),
    ))
}

/// What the closing example reads, and how much of it.
struct Reading {
    what: String,
    training: Box<dyn Task>,
    held_out: Box<dyn Task>,
    bigram: Bigram,
}

/// Windows of the generated language that the bigram model reads.
const BIGRAM_WINDOWS: u64 = 4000;

fn reading(setting: &Setting) -> Result<Reading> {
    let file = setting
        .data
        .as_ref()
        .map(|directory| directory.join("tiny_shakespeare.txt"));
    if let Some(file) = file.filter(|file| file.is_file()) {
        let vocabulary = BYTE_VOCABULARY as usize;
        let (training, held_out) = bytes_split(&file)?;
        let mut bigram = Bigram::new(vocabulary);
        bigram.read(&training);
        return Ok(Reading {
            what: "the bytes of Tiny Shakespeare".to_owned(),
            training: Box::new(TextTask::new(training, vocabulary)),
            held_out: Box::new(TextTask::new(held_out, vocabulary)),
            bigram,
        });
    }
    let training = decoder::corpus(Split::Training, setting.seed)?;
    let mut bigram = Bigram::new(training.language().vocabulary().size());
    for index in 0..BIGRAM_WINDOWS {
        bigram.read(&training.window(index, decoder::LENGTH + 1)?);
    }
    Ok(Reading {
        what: "the generated language".to_owned(),
        training: Box::new(LanguageTask::new(training)),
        held_out: Box::new(LanguageTask::new(decoder::corpus(
            Split::HeldOut,
            setting.seed,
        )?)),
        bigram,
    })
}

fn closing_example(setting: &Setting) -> Result<Claim> {
    let steps = match setting.scale {
        Scale::Smoke => 3,
        Scale::Small => 1000,
        Scale::Full => 4000,
    };
    let mut reading = reading(setting)?;
    let vocabulary = reading.training.vocabulary();
    let spec = decoder::spec(vocabulary, 64, 2);
    let model = decoder::train(spec, reading.training, steps, setting.seed)?;
    let mut generator = generator(setting.seed ^ 0xc105e);
    let (mut ours, mut bigram) = (Vec::new(), Vec::new());
    for _ in 0..20 {
        let batch = reading
            .held_out
            .batch(&mut generator, decoder::BATCH, decoder::LENGTH)?;
        ours.push(number(&batch_loss(&model, &batch, Pass::default())?)?);
        bigram.push(reading.bigram.loss(&batch));
    }
    let (ours, bigram) = (mean(ours), mean(bigram));
    Ok(Claim::new(
        "a decoder of two blocks and width 64 has a lower validation loss than a bigram model",
        "no figure",
        format!("{ours:.3} against {bigram:.3} nats"),
        after_training(setting.scale, ours < bigram),
    )
    .noted(format!(
        "on {}, {steps} steps of {} sequences",
        reading.what,
        decoder::BATCH
    )))
}
