//! What a stack has learned to recall, and what is left of that without its scans.

use super::{Recurrence, Work, stack};
use crate::Result;
use crate::error::engine;
use crate::experiments::decoder::{self, Recipe};
use crate::experiments::depth::{Size, Subject};
use crate::experiments::mean;
use lapidary_compress::Shed;
use lapidary_kernels::{D, Device, Tensor};
use lapidary_model::{Input, Model, Pass};
use lapidary_train::data::{AssociativeRecall, IGNORE, Task};

/// Keys and values.
pub(super) const SYMBOLS: usize = 8;
const LENGTH: usize = 25;

/// Share of recalled values that are right.
fn recalled(model: &Model, seed: u64) -> Result<f64> {
    let mut generator = lapidary_train::generator(seed.wrapping_add(77));
    let batch = task()?.batch(&mut generator, 64, LENGTH)?;
    let ids = Tensor::from_slice(&batch.inputs, (batch.rows, batch.length), &Device::Cpu);
    let output = model.forward(&Input::tokens(engine(ids)?), Pass::default())?;
    let logits = output.into_logits()?.into_value();
    let said = engine(engine(engine(logits.argmax(D::Minus1))?.flatten_all())?.to_vec1::<u32>())?;
    let counted = said
        .iter()
        .zip(&batch.targets)
        .filter(|(_, target)| **target != IGNORE);
    Ok(mean(
        counted.map(|(said, target)| f64::from(u8::from(said == target))),
    ))
}

fn task() -> Result<AssociativeRecall> {
    Ok(AssociativeRecall::new(SYMBOLS, SYMBOLS)?)
}

/// Accuracy of recall of a trained stack, and of the same without its scans.
pub(super) fn without_scans(work: &Work, seed: u64) -> Result<(f64, f64)> {
    let task = task()?;
    let size = Size {
        blocks: 2,
        width: 48.min(work.size.width),
        ..work.size
    };
    let spec = stack(task.vocabulary(), size, Recurrence::Mamba);
    let recipe = Recipe {
        batch: 32,
        length: LENGTH - 1,
        ..Recipe::default()
    };
    let model = decoder::train_by(recipe, spec, Box::new(task), work.recall, seed)?;
    let whole = recalled(&model, seed)?;
    let subject = Subject::of(model, size, seed)?;
    let scans = Shed::scans(&subject.model).into_iter().collect();
    let without = Shed::cut(&subject.model, &scans)?;
    Ok((whole, recalled(&without, seed)?))
}
