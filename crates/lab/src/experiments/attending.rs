//! What experiments share that compare ways of attending: a decoder whose blocks attend as told,
//! text as bytes, and its losses.

use super::decoder::{self, Recipe};
use super::number;
use crate::error::engine;
use crate::{Error, Result, Setting};
use lapidary_kernels::{CrossEntropyOptions, D, Device, Tensor, cross_entropy};
use lapidary_model::{Input, InputSpec, Model, ModelSpec, Pass};
use lapidary_parts::attention::mechanism::MechanismSpec;
use lapidary_parts::attention::{MixerSpec, MultiHeadSpec};
use lapidary_parts::block::BlockSpec;
use lapidary_train::data::{Batch, IGNORE, Task, bytes};
use lapidary_train::{Generator, generator};
use rand::RngExt;
use std::ops::Range;
use std::sync::Arc;

/// A decoder with a block for each of `attentions`, for `length` tokens.
pub fn spec(
    vocabulary: usize,
    width: usize,
    length: usize,
    attentions: &[MultiHeadSpec],
) -> ModelSpec {
    let mut spec = decoder::spec(vocabulary, width, 1);
    if let InputSpec::Tokens(tokens) = &mut spec.input {
        tokens.length = length;
    }
    let block = spec.blocks.first().cloned();
    spec.blocks = attentions
        .iter()
        .filter_map(|attention| {
            Some(BlockSpec {
                attention: MixerSpec::MultiHead(attention.clone()),
                ..block.clone()?
            })
        })
        .collect();
    spec
}

/// Causal attention with a mechanism.
pub fn causal(heads: usize, mechanism: MechanismSpec) -> MultiHeadSpec {
    MultiHeadSpec {
        causal: true,
        mechanism,
        ..MultiHeadSpec::new(heads)
    }
}

/// Windows of a text, token by byte, drawn at random.
#[derive(Clone)]
pub struct Text {
    tokens: Arc<Vec<u32>>,
    range: Range<usize>,
}

impl Text {
    /// Tiny Shakespeare, nine tenths to train on and the rest to measure on, where the setting has
    /// the data.
    pub fn shakespeare(setting: &Setting) -> Result<Option<[Self; 2]>> {
        let Some(data) = &setting.data else {
            return Ok(None);
        };
        let path = data.join("tiny_shakespeare.txt");
        let text = std::fs::read_to_string(&path).map_err(|error| {
            Error::Experiment(format!("{} cannot be read: {error}", path.display()))
        })?;
        let tokens = Arc::new(bytes(&text)?);
        let cut = tokens.len() / 10 * 9;
        let [first, second] = [0..cut, cut..tokens.len()].map(|range| Self {
            tokens: tokens.clone(),
            range,
        });
        Ok(Some([first, second]))
    }
}

impl Task for Text {
    fn vocabulary(&self) -> usize {
        256
    }

    fn batch(
        &mut self,
        generator: &mut Generator,
        rows: usize,
        length: usize,
    ) -> lapidary_train::Result<Batch> {
        let mut batch = Batch::with_capacity(rows, length);
        let last = self.range.end.saturating_sub(length + 1);
        for _ in 0..rows {
            let start = generator.random_range(self.range.start..=last.max(self.range.start));
            let window = self.tokens.get(start..start + length + 1).unwrap_or(&[]);
            if let ([inputs @ .., _], [_, targets @ ..]) = (window, window) {
                batch.inputs.extend_from_slice(inputs);
                batch.targets.extend_from_slice(targets);
                batch.rows += 1;
            }
        }
        Ok(batch)
    }
}

/// What a model does on a task.
#[derive(Clone, Copy, Debug)]
pub struct Measure {
    /// Mean loss of the positions that count, in nats.
    pub loss: f64,
    /// Share of them whose most likely token is the target.
    pub accuracy: f64,
}

/// Measures a model on `batches` batches of a task, the same for every model.
pub fn measure(
    model: &Model,
    task: &mut dyn Task,
    recipe: Recipe,
    batches: usize,
) -> Result<Measure> {
    let mut random = generator(0x00e7_a1a7);
    let (mut loss, mut right, mut counted) = (0.0, 0.0, 0.0);
    for _ in 0..batches {
        let batch = task.batch(&mut random, recipe.batch, recipe.length)?;
        let (inputs, targets) = batch.tensors(&Device::Cpu)?;
        let output = model.forward(&Input::tokens(inputs), Pass::default())?;
        let logits = output.into_logits()?.into_value();
        let classes = engine(logits.dim(D::Minus1))?;
        let logits = engine(logits.reshape(((), classes)))?;
        let targets = engine(targets.flatten_all())?;
        let options = CrossEntropyOptions {
            ignore_index: Some(IGNORE),
            ..CrossEntropyOptions::default()
        };
        let count = batch.counted() as f64;
        loss += count * number(&cross_entropy(&logits, &targets, &options)?)?;
        right += number(&engine(hits(&logits, &targets))?)?;
        counted += count;
    }
    Ok(Measure {
        loss: loss / counted,
        accuracy: right / counted,
    })
}

/// How many targets are the most likely token; what does not count never is.
fn hits(logits: &Tensor, targets: &Tensor) -> lapidary_kernels::Result<Tensor> {
    let right = logits.argmax(D::Minus1)?.eq(targets)?;
    Ok(right.to_dtype(logits.dtype())?.sum_all()?)
}
