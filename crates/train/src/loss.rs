//! The loss of a batch: the mean cross-entropy of what is to be predicted, at once or so many positions at a time.

use lapidary_kernels::{CrossEntropyOptions, Recomputation, Tensor, cross_entropy};
use lapidary_model::{Input, Model, Pass};
use lapidary_signal::Signal;

use crate::data::{Batch, IGNORE};
use crate::{Error, Result};

/// Mean cross-entropy of the next tokens of a batch, in nats.
///
/// # Errors
/// When the model refuses the batch or has no scores.
pub fn batch_loss(model: &Model, batch: &Batch, pass: Pass<'_>) -> Result<Tensor> {
    let (inputs, targets) = batch.tensors(&model.device())?;
    let output = model
        .forward(&Input::tokens(inputs), pass)
        .map_err(lapidary_model::Error::from)?;
    let logits = output
        .into_logits()
        .map_err(lapidary_model::Error::from)?
        .into_value();
    let classes = logits.dims().last().copied().unwrap_or(0);
    let logits = logits
        .reshape(((), classes))
        .map_err(lapidary_kernels::Error::from)?;
    let targets = targets
        .flatten_all()
        .map_err(lapidary_kernels::Error::from)?;
    let options = CrossEntropyOptions {
        ignore_index: Some(IGNORE),
        ..CrossEntropyOptions::default()
    };
    Ok(cross_entropy(&logits, &targets, &options)?)
}

/// [`batch_loss`] of a language model that lays out the scores over its vocabulary for `chunk` positions at a time and
/// never for all of them: `[chunk, vocabulary]` numbers, again in the backward pass, where they are recomputed. Positions
/// that do not count are not scored. The head's gradients are in `recomputation`, which is that of its variables.
///
/// # Errors
/// When the model refuses the batch, is no language model, or gives something else than every token's place.
pub fn batch_loss_in_chunks(
    model: &Model,
    batch: &Batch,
    pass: Pass<'_>,
    chunk: usize,
    recomputation: &Recomputation,
) -> Result<Tensor> {
    let scorer = model.scorer().map_err(lapidary_model::Error::from)?;
    let (inputs, _) = batch.tensors(&model.device())?;
    let hidden = model
        .hidden(&Input::tokens(inputs), pass)
        .map_err(lapidary_model::Error::from)?
        .into_value();
    let (counted, targets): (Vec<u32>, Vec<u32>) = (0..)
        .zip(&batch.targets)
        .filter(|(_, target)| **target != IGNORE)
        .map(|(place, target)| (place, *target))
        .unzip();
    if targets.is_empty() {
        // Nothing is to be predicted: no loss, and no slope of anything.
        let none = hidden.sum_all().and_then(|sum| sum.affine(0.0, 0.0));
        return Ok(none.map_err(lapidary_kernels::Error::from)?);
    }
    let rows = rows(&hidden, &counted, batch)?;
    let all = targets.len() as f64;
    let part = move |rows: &Tensor, first: usize| -> lapidary_kernels::Result<Tensor> {
        let targets = targets.get(first..).unwrap_or_default();
        let targets: Vec<u32> = targets.iter().copied().take(rows.dim(0)?).collect();
        let share = targets.len() as f64 / all;
        let targets = Tensor::from_vec(targets, rows.dim(0)?, rows.device())?;
        let scores = scorer.scores(&Signal::from(rows.unsqueeze(0)?));
        let scores = scores.map_err(inside)?.into_value().squeeze(0)?;
        let mean = cross_entropy(&scores, &targets, &CrossEntropyOptions::default())?;
        Ok((mean * share)?)
    };
    Ok(recomputation.run_summed(&rows, chunk, part)?)
}

/// The hidden vectors of the positions that count, `[positions, width]`.
fn rows(hidden: &Tensor, counted: &[u32], batch: &Batch) -> Result<Tensor> {
    let width = hidden.dims().last().copied().unwrap_or(0);
    let places = hidden.elem_count() / width.max(1);
    if places != batch.targets.len() {
        return Err(Error::Setting {
            name: "positions that the model gives",
            found: places.to_string(),
            expected: "as many as tokens, of which each has a target",
        });
    }
    let flat = hidden.reshape((places, width));
    let chosen = flat.and_then(|flat| match counted.len() == places {
        true => Ok(flat),
        false => {
            let counted = Tensor::from_slice(counted, counted.len(), hidden.device())?;
            flat.index_select(&counted, 0)
        }
    });
    Ok(chosen.map_err(lapidary_kernels::Error::from)?)
}

/// An error of the head, inside of what is recomputed.
fn inside(error: lapidary_parts::Error) -> lapidary_kernels::Error {
    match error {
        lapidary_parts::Error::Kernel(error) => error,
        other => lapidary_kernels::Error::argument(
            "loss in chunks",
            "head",
            other.to_string(),
            "one that scores hidden vectors",
        ),
    }
}
