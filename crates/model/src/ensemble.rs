//! A model as an ensemble of the sub-networks that it draws.

use crate::{Input, Model, Pass};
use lapidary_kernels::{SoftmaxMask, Tensor, softmax};
use lapidary_parts::{Error, Result};

/// What is averaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Averaged {
    /// Probabilities, the softmax of the scores: for classes and next tokens.
    Probabilities,
    /// Scores as they are: for regression.
    Scores,
}

/// What the members of an ensemble say together.
#[derive(Clone, Debug)]
pub struct Ensemble {
    /// Mean over the members, of the scores' shape.
    pub mean: Tensor,
    /// Their variance, of the same shape: how far they disagree.
    pub variance: Tensor,
}

/// Runs `model` once for each of `members` draws, everything else as in evaluation, and averages
/// (Hussain et al., arXiv 2306.01705). The draws are `seed`, `seed + 1`, …; a model whose mixers draw
/// nothing has members that agree. `pass` makes the pass of each draw.
///
/// # Errors
/// For no members, a model without scores, or what the model refuses.
pub fn self_ensemble<'a>(
    model: &Model,
    input: &Input,
    (members, seed): (usize, u64),
    averaged: Averaged,
    pass: impl Fn() -> Pass<'a>,
) -> Result<Ensemble> {
    let mut found: Option<Ensemble> = None;
    for member in 0..members as u64 {
        let pass = Pass {
            draw: Some(seed.wrapping_add(member)),
            ..pass()
        };
        let scores = model.forward(input, pass)?.into_logits()?.into_value();
        let said = match averaged {
            Averaged::Probabilities => softmax(&scores, &SoftmaxMask::default())?,
            Averaged::Scores => scores,
        };
        let said = said.detach();
        found = Some(match found {
            None => Ensemble {
                variance: said.zeros_like().map_err(lapidary_kernels::Error::from)?,
                mean: said,
            },
            Some(found) => found.with(&said, member as f64)?,
        });
    }
    let Some(found) = found else {
        return Err(Error::spec("members of an ensemble", 0, "at least 1"));
    };
    let variance = found.variance / members as f64;
    Ok(Ensemble {
        variance: variance.map_err(lapidary_kernels::Error::from)?,
        ..found
    })
}

impl Ensemble {
    /// With one member more than `before`; the variance is a sum of squares until the end (Welford).
    fn with(self, said: &Tensor, before: f64) -> lapidary_kernels::Result<Self> {
        let off = (said - &self.mean)?;
        let mean = (&self.mean + (&off / (before + 1.0))?)?;
        let variance = (self.variance + (off * (said - &mean)?)?)?;
        Ok(Self { mean, variance })
    }
}
