//! Training and running small text classifiers.

use crate::Result;
use crate::error::engine;
use crate::experiments::{number, numbers};
use lapidary_explain::faithfulness::masking::most_likely;
use lapidary_kernels::{
    AdamW, AdamWOptions, CrossEntropyOptions, Device, Parameter, SoftmaxMask, Tensor, backward,
    cross_entropy, global_gradient_norm, softmax,
};
use lapidary_model::{
    AbsolutePosition, HeadSpec, Initialiser, Input, InputSpec, Model, ModelSpec, Pass, PatchInput,
    Pool, TokenInput,
};
use lapidary_parts::activation::ActivationSpec;
use lapidary_parts::attention::{MixerSpec, MultiHeadSpec};
use lapidary_parts::block::{BlockSpec, Wiring};
use lapidary_parts::feedforward::{DenseSpec, FeedforwardSpec};
use lapidary_parts::norm::NormSpec;
use lapidary_parts::parameters::{Init, ParameterSource};
use lapidary_train::{Decay, Generator, Schedule, generator};
use rand::RngExt;
use std::collections::BTreeMap;

/// A sequence with its class.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Labelled {
    /// Token ids.
    pub tokens: Vec<u32>,
    /// The class.
    pub label: u32,
}

/// Random masks in training, so that masked inputs are nothing new to the model.
#[derive(Clone, Copy, Debug)]
pub struct Masking {
    /// The token that stands in.
    pub token: u32,
    /// Probability for each token but the first.
    pub probability: f64,
    /// The first step that has masks.
    pub from: u64,
}

/// Initial values of a narrow model: the deviation of weights is `1 / √input` instead of the 0.02
/// that suits widths of hundreds; embeddings that a spec lets begin otherwise begin as it says.
pub struct Narrow(pub Initialiser);

impl ParameterSource for Narrow {
    fn parameter(
        &mut self,
        name: &str,
        shape: &[usize],
        init: Init,
    ) -> lapidary_parts::Result<Tensor> {
        let init = match (init, shape.last()) {
            (Init::Normal { deviation }, _)
                if name.starts_with("embeddings.") && deviation != PatchInput::DEVIATION =>
            {
                init
            }
            (Init::Normal { .. }, Some(input)) => Init::Normal {
                deviation: 1.0 / (*input as f64).sqrt(),
            },
            (other, _) => other,
        };
        self.0.parameter(name, shape, init)
    }
}

/// How a classifier is trained.
#[derive(Clone, Copy, Debug)]
pub struct Course {
    /// Steps.
    pub steps: u64,
    /// Examples in a step.
    pub batch: usize,
    /// The highest learning rate; it rises over a tenth of the steps and falls as a cosine.
    pub rate: f64,
    /// Random masks.
    pub masking: Option<Masking>,
    /// Seed of the order of examples and of the masks.
    pub seed: u64,
}

/// The measures of an encoder.
#[derive(Clone, Copy, Debug)]
pub struct Encoder {
    /// Number of token ids.
    pub vocabulary: usize,
    /// Most tokens.
    pub length: usize,
    /// Features of a token; the feed-forward part has four times as many.
    pub width: usize,
    /// Heads.
    pub heads: usize,
    /// Blocks.
    pub blocks: usize,
    /// Classes.
    pub labels: usize,
}

impl Encoder {
    /// An encoder as BERT: norms after the sums, learned positions, and a tanh pooler on the
    /// first token.
    pub fn spec(&self) -> ModelSpec {
        ModelSpec {
            width: self.width,
            input: InputSpec::Tokens(TokenInput {
                vocabulary: self.vocabulary,
                length: self.length,
                position: AbsolutePosition::Learned {
                    offset: 0,
                    skip_padding: false,
                },
                token_types: 0,
                norm: Some(NormSpec::default()),
                embedding_width: None,
                projected: Default::default(),
                dropout: 0.0,
                dropout_by_feature: false,
            }),
            blocks: vec![BlockSpec {
                repeat: self.blocks,
                wiring: Wiring::PostNorm,
                norm: NormSpec::default(),
                attention: MixerSpec::MultiHead(MultiHeadSpec::new(self.heads)),
                cross_attention: None,
                shared: false,
                layer_scale: None,
                drop_path: 0.0,
                dropout_by_feature: false,
                coding_step: None,
                shortcuts: false,
                feedforward: Some(FeedforwardSpec::Dense(DenseSpec {
                    hidden: 4 * self.width,
                    activation: ActivationSpec::Gelu,
                    bias: true,
                })),
                dropout: 0.0,
            }],
            final_norm: None,
            head: HeadSpec::Pooled {
                pool: Pool::First,
                norm: None,
                hidden: Some(ActivationSpec::Tanh),
                labels: Some(self.labels),
                bias: true,
            },
            low_rank: BTreeMap::new(),
            quantised: BTreeMap::new(),
            organisation: None,
            initial: Default::default(),
        }
    }
}

/// Sequences as one input, short ones filled with token 0, and the padding `[batch, length]`.
pub fn batch<T: AsRef<[u32]>>(sequences: &[T]) -> Result<(Input, Tensor)> {
    let length = sequences
        .iter()
        .map(|tokens| tokens.as_ref().len())
        .max()
        .unwrap_or(0);
    let mut ids = Vec::with_capacity(sequences.len() * length);
    let mut keep = Vec::with_capacity(sequences.len() * length);
    for tokens in sequences {
        let tokens = tokens.as_ref();
        let pads = length - tokens.len();
        ids.extend_from_slice(tokens);
        ids.extend(std::iter::repeat_n(0, pads));
        keep.extend(std::iter::repeat_n(1u8, tokens.len()));
        keep.extend(std::iter::repeat_n(0u8, pads));
    }
    let shape = (sequences.len(), length);
    let ids = engine(Tensor::from_vec(ids, shape, &Device::Cpu))?;
    let keep = engine(Tensor::from_vec(keep, shape, &Device::Cpu))?;
    Ok((Input::tokens(ids), keep))
}

/// `[batch, labels]`.
fn scores<T: AsRef<[u32]>>(model: &Model, sequences: &[T]) -> Result<Tensor> {
    let (input, padding) = batch(sequences)?;
    let pass = Pass {
        padding: Some(&padding),
        ..Pass::default()
    };
    Ok(model.forward(&input, pass)?.into_logits()?.into_value())
}

/// Mean cross-entropy of some sequences and their labels.
fn loss<T: AsRef<[u32]>>(model: &Model, sequences: &[T], labels: Vec<u32>) -> Result<Tensor> {
    let count = labels.len();
    let labels = engine(Tensor::from_vec(labels, count, &Device::Cpu))?;
    Ok(cross_entropy(
        &scores(model, sequences)?,
        &labels,
        &CrossEntropyOptions::default(),
    )?)
}

/// Trains the variables of `model` on random batches and gives a model of the result.
pub fn train(model: &Model, examples: &[Labelled], course: &Course) -> Result<Model> {
    let mut generator = generator(course.seed);
    fit(model, course.steps, course.rate, |step| {
        let (sequences, labels) = draw(examples, course, step, &mut generator);
        loss(model, &sequences, labels)
    })
}

/// Lowers `loss`, which is told the step, by AdamW with gradients clipped to norm 1 and a rate that
/// rises over a tenth of the steps and falls as a cosine; gives a model of the result.
pub fn fit(
    model: &Model,
    steps: u64,
    rate: f64,
    mut loss: impl FnMut(u64) -> Result<Tensor>,
) -> Result<Model> {
    let parameters = model.variables().values().map(|variable| Parameter {
        variable: variable.clone(),
        weight_decay: Some(if variable.rank() < 2 { 0.0 } else { 0.01 }),
        rate_factor: 1.0,
    });
    let mut optimiser = AdamW::new(parameters.collect(), AdamWOptions::default())?;
    let schedule = Schedule {
        peak: rate,
        floor: 0.0,
        warm_up: steps / 10,
        steps,
        decay: Decay::Cosine,
    };
    for step in 0..steps {
        let gradients = engine(backward(&loss(step)?))?;
        let all: Vec<&Tensor> = model
            .variables()
            .values()
            .filter_map(|variable| gradients.get(variable.as_tensor()))
            .collect();
        let norm = global_gradient_norm(&all)?;
        optimiser.step(&gradients, schedule.rate(step), 1.0 / norm.max(1.0))?;
    }
    let mut parameters = BTreeMap::new();
    for (name, variable) in model.variables() {
        parameters.insert(name.clone(), engine(variable.as_tensor().copy())?.detach());
    }
    Ok(Model::new(model.spec().clone(), &mut parameters)?)
}

fn draw(
    examples: &[Labelled],
    course: &Course,
    step: u64,
    generator: &mut Generator,
) -> (Vec<Vec<u32>>, Vec<u32>) {
    let (mut sequences, mut labels) = (Vec::new(), Vec::new());
    for _ in 0..course.batch {
        let index = generator.random_range(0..examples.len().max(1));
        let Some(example) = examples.get(index) else {
            continue;
        };
        let mut tokens = example.tokens.clone();
        if let Some(masking) = course.masking.filter(|masking| step >= masking.from) {
            for token in tokens.iter_mut().skip(1) {
                if generator.random_bool(masking.probability) {
                    *token = masking.token;
                }
            }
        }
        sequences.push(tokens);
        labels.push(example.label);
    }
    (sequences, labels)
}

/// Sequences run at one time.
const AT_ONCE: usize = 64;

/// Class probabilities of each sequence.
pub fn probabilities<T: AsRef<[u32]>>(model: &Model, sequences: &[T]) -> Result<Vec<Vec<f64>>> {
    let mut all = Vec::with_capacity(sequences.len());
    for chunk in sequences.chunks(AT_ONCE) {
        let probabilities = softmax(&scores(model, chunk)?, &SoftmaxMask::default())?;
        let classes = probabilities.dims().last().copied().unwrap_or(1).max(1);
        all.extend(
            numbers(&probabilities)?
                .chunks(classes)
                .map(<[f64]>::to_vec),
        );
    }
    Ok(all)
}

/// The share of examples that the model gets right.
pub fn accuracy(model: &Model, examples: &[Labelled]) -> Result<f64> {
    let sequences: Vec<&[u32]> = examples.iter().map(|e| e.tokens.as_slice()).collect();
    let right = probabilities(model, &sequences)?
        .iter()
        .zip(examples)
        .filter(|(said, example)| most_likely(said) == example.label as usize)
        .count();
    Ok(right as f64 / examples.len().max(1) as f64)
}

/// Mean cross-entropy over all examples, in nats.
pub fn mean_loss(model: &Model, examples: &[Labelled]) -> Result<f64> {
    let mut sum = 0.0;
    for chunk in examples.chunks(AT_ONCE) {
        let sequences: Vec<&[u32]> = chunk.iter().map(|e| e.tokens.as_slice()).collect();
        let labels = chunk.iter().map(|example| example.label).collect();
        sum += number(&loss(model, &sequences, labels)?)? * chunk.len() as f64;
    }
    Ok(sum / examples.len().max(1) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use lapidary_kernels::DType;

    /// Weights begin by their inputs, and a table of embeddings by what its spec asks for.
    #[test]
    fn what_a_spec_asks_for_is_left_as_it_is() {
        let mut source = Narrow(Initialiser::new(1, DType::F32, Device::Cpu));
        let mut deviation = |name: &str, deviation: f64| -> f64 {
            let table = source.parameter(name, &[400, 64], Init::Normal { deviation });
            let squares = table.unwrap().sqr().unwrap().mean_all().unwrap();
            f64::from(squares.to_scalar::<f32>().unwrap()).sqrt()
        };
        let positions = "embeddings.positions.weight";
        for (name, asked, expected) in [
            (positions, 0.02, 0.125),
            (positions, 1.0, 1.0),
            ("blocks.0.attention_shortcut.weight", 1.0, 0.125),
        ] {
            let found = deviation(name, asked);
            assert!((found / expected - 1.0).abs() < 0.05, "{name}: {found}");
        }
    }
}
