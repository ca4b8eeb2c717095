//! What experiments share that compare ways of attending: a decoder whose blocks attend as told,
//! text as bytes, and its losses.

use super::bigram::{TextTask, bytes_split};
use super::decoder::{self, Recipe};
use super::number;
use crate::error::engine;
use crate::{Result, Setting};
use lapidary_kernels::{CrossEntropyOptions, D, Device, Tensor, cross_entropy};
use lapidary_model::{Input, InputSpec, Model, ModelSpec, Pass};
use lapidary_parts::attention::mechanism::MechanismSpec;
use lapidary_parts::attention::{MixerSpec, MultiHeadSpec};
use lapidary_parts::block::BlockSpec;
use lapidary_train::data::{BYTE_VOCABULARY, IGNORE, Task};
use lapidary_train::generator;

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

/// The bytes of Tiny Shakespeare, nine tenths to train on and the rest to measure on, where the setting
/// has the data.
pub fn shakespeare(setting: &Setting) -> Result<Option<[TextTask; 2]>> {
    let file = setting
        .data
        .as_ref()
        .map(|data| data.join("tiny_shakespeare.txt"));
    let Some(file) = file.filter(|file| file.is_file()) else {
        return Ok(None);
    };
    let (training, held_out) = bytes_split(&file)?;
    let side = |tokens| TextTask::new(tokens, BYTE_VOCABULARY as usize);
    Ok(Some([side(training), side(held_out)]))
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
