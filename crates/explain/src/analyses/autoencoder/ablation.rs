//! Which features at a position a prediction depends on.
//!
//! Each live feature by itself is set to zero, or to its value in a run on another prompt, with
//! the autoencoder's error kept, and the change of a score is measured. Features are rows of a
//! batch, so that many take one pass.

use crate::autoencoder::{Autoencoder, numbers};
use crate::error::engine;
use crate::{Error, Question, Result};
use lapidary_kernels::Tensor;
use lapidary_model::{Input, Pass};
use lapidary_signal::{Signal, Trace};
use serde::Serialize;

/// Features in one pass of the model.
const AT_A_TIME: usize = 16;

/// The score that is watched: the logit of `class`, less that of `foil`, at `position`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Score {
    /// A token.
    pub class: usize,
    /// What it is contrasted with.
    pub foil: Option<usize>,
    /// Where; the last position when absent.
    pub position: Option<usize>,
}

/// What features are set to.
#[derive(Clone, Copy, Debug)]
pub enum Against<'a> {
    /// Zero.
    Zero,
    /// Their values at the same position of another prompt of the same length (noising).
    Prompt(&'a Input),
}

/// What one feature does.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct FeatureEffect {
    /// The feature.
    pub feature: usize,
    /// Its value at the position.
    pub activation: f64,
    /// The score with the feature changed, less the score.
    pub effect: f64,
}

/// What each live feature does.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Ablation {
    /// The score with nothing changed.
    pub clean: f64,
    /// The features that change, by the size of their effect, largest first.
    pub effects: Vec<FeatureEffect>,
}

/// Changes each feature that differs at `position`, by itself, in the first sequence of the
/// question.
///
/// # Errors
/// When the model is no language model over tokens, or a position or token does not exist.
pub fn ablation_effects(
    question: &Question<'_>,
    autoencoder: &Autoencoder,
    position: usize,
    against: Against<'_>,
    score: Score,
) -> Result<Ablation> {
    let Input::Tokens { ids, token_types } = question.input else {
        return Err(Error::invalid("input", "pixels", "tokens"));
    };
    let (now, clean) = at(question, question.input, autoencoder, position, score)?;
    let wanted = match against {
        Against::Zero => vec![0.0; now.len()],
        Against::Prompt(other) => at(question, other, autoencoder, position, score)?.0,
    };
    let differing: Vec<usize> = (0..now.len())
        .filter(|feature| now.get(*feature) != wanted.get(*feature))
        .collect();
    let length = engine(ids.dim(1))?;
    let repeat = |tensor: &Tensor, count: usize| -> Result<Tensor> {
        engine(engine(tensor.narrow(0, 0, 1))?.repeat((count, 1)))
    };
    let mut effects = Vec::new();
    for features in differing.chunks(AT_A_TIME) {
        let count = features.len();
        let changes: Vec<(usize, f64)> = features
            .iter()
            .map(|feature| {
                let value = |all: &[f64]| all.get(*feature).copied().unwrap_or(0.0);
                (*feature, value(&wanted) - value(&now))
            })
            .collect();
        let change = change(autoencoder, &changes, position, length)?;
        let trace = Trace::new().replace(autoencoder.site(), move |_, signal| {
            let x = signal.value();
            let changed = change.to_dtype(x.dtype()).and_then(|change| x + change);
            Ok(Signal::from(
                changed.map_err(lapidary_kernels::Error::from)?,
            ))
        })?;
        let input = Input::Tokens {
            ids: repeat(ids, count)?,
            token_types: token_types
                .as_ref()
                .map(|types| repeat(types, count))
                .transpose()?,
        };
        let padding = question
            .padding
            .map(|padding| repeat(padding, count))
            .transpose()?;
        let pass = Pass {
            padding: padding.as_ref(),
            trace: Some(&trace),
            ..Pass::default()
        };
        let logits = question.model.forward(&input, pass)?.into_logits()?;
        for (row, (feature, _)) in changes.iter().enumerate() {
            effects.push(FeatureEffect {
                feature: *feature,
                activation: now.get(*feature).copied().unwrap_or(0.0),
                effect: read(logits.value(), row, score)? - clean,
            });
        }
    }
    effects.sort_by(|a, b| b.effect.abs().total_cmp(&a.effect.abs()));
    Ok(Ablation { clean, effects })
}

/// Features at `position` and the score, on one input.
fn at(
    question: &Question<'_>,
    input: &Input,
    autoencoder: &Autoencoder,
    position: usize,
    score: Score,
) -> Result<(Vec<f64>, f64)> {
    let trace = Trace::new().capture(autoencoder.site())?;
    let output = question.model.forward(input, question.pass(&trace))?;
    let value = trace.signal(autoencoder.site())?.into_value();
    let length = engine(value.dim(1))?;
    if position >= length {
        return Err(Error::invalid(
            "position",
            position,
            format!("below {length}"),
        ));
    }
    let here = engine(engine(value.narrow(0, 0, 1))?.narrow(1, position, 1))?;
    let features = numbers(&autoencoder.encode(&here)?)?;
    Ok((features, read(output.into_logits()?.value(), 0, score)?))
}

/// The score of one row of `logits` `[batch, length, vocabulary]`.
fn read(logits: &Tensor, row: usize, score: Score) -> Result<f64> {
    let [_, length, vocabulary] = logits.dims() else {
        return Err(Error::invalid("model", "a classifier", "a language model"));
    };
    let position = score.position.unwrap_or(length.saturating_sub(1));
    if position >= *length {
        return Err(Error::invalid(
            "position",
            position,
            format!("below {length}"),
        ));
    }
    let here = engine(engine(logits.narrow(0, row, 1))?.narrow(1, position, 1))?;
    let here = numbers(&here)?;
    let of = |token: usize| {
        let logit = here.get(token).copied();
        logit.ok_or_else(|| Error::invalid("token", token, format!("below {vocabulary}")))
    };
    Ok(of(score.class)? - score.foil.map(of).transpose()?.unwrap_or(0.0))
}

/// `(f' − f) D` for one feature in each row, at `position`: `[features, length, width]`.
fn change(
    autoencoder: &Autoencoder,
    changes: &[(usize, f64)],
    position: usize,
    length: usize,
) -> Result<Tensor> {
    let width = autoencoder.width();
    let mut values = Vec::with_capacity(changes.len() * length * width);
    for (feature, change) in changes {
        let row = autoencoder.feature(*feature)?.decoder;
        for at in 0..length {
            let scale = if at == position { *change } else { 0.0 };
            values.extend(row.iter().map(|v| v * scale));
        }
    }
    let device = autoencoder.weights().decoder.device();
    engine(Tensor::from_vec(
        values,
        (changes.len(), length, width),
        device,
    ))
}
