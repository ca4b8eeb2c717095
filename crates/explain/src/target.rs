//! What is explained: one number that the model gives.

use crate::error::engine;
use crate::{Error, Result};
use lapidary_kernels::{DType, Tensor};
use lapidary_model::Output;
use lapidary_signal::Signal;

/// Which number of a model's output is explained. Of a batch, the first sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Score `class`, less that of `foil` when there is one. For a language model, at `position`.
    Score {
        /// The class or token id.
        class: usize,
        /// What it is contrasted with.
        foil: Option<usize>,
        /// Position of the scores of a language model; the last when absent.
        position: Option<usize>,
    },
    /// The squared length of the pooled vector, or without a pooled vector of the first hidden
    /// vector, halved: for models without scores. Its streams are measured along the vector.
    Representation,
}

impl Target {
    /// Score `class`.
    pub const fn class(class: usize) -> Self {
        Self::Score {
            class,
            foil: None,
            position: None,
        }
    }

    /// Picks the vector that the target is about: `[scores]` or `[width]`, as a signal
    /// `[1, features]`.
    pub(crate) fn vector(&self, output: &Output) -> Result<Signal> {
        self.vector_of(output, 0)
    }

    /// As [`Target::vector`], for any sequence of the batch.
    pub(crate) fn vector_of(&self, output: &Output, sequence: usize) -> Result<Signal> {
        match self {
            Self::Score { position, .. } => {
                let logits = output.logits.as_ref().ok_or_else(|| Error::Target {
                    what: "score",
                    found: "a score".to_owned(),
                    expected: "`representation`: this model has no scores".to_owned(),
                })?;
                let first = logits.narrow(0, sequence, 1)?;
                match logits.dims() {
                    [_, length, _] => {
                        let position = position.unwrap_or(length.saturating_sub(1));
                        if position >= *length {
                            return Err(Error::Target {
                                what: "position",
                                found: position.to_string(),
                                expected: format!("below {length}"),
                            });
                        }
                        Ok(first.narrow(1, position, 1)?.squeeze(1)?)
                    }
                    _ => Ok(first),
                }
            }
            Self::Representation => match &output.pooled {
                Some(pooled) => Ok(pooled.narrow(0, sequence, 1)?),
                None => Ok(output
                    .hidden
                    .narrow(0, sequence, 1)?
                    .narrow(1, 0, 1)?
                    .squeeze(1)?),
            },
        }
    }

    /// The direction `[features]` along which the vector is read, so that the explained number
    /// is `vector · direction`.
    pub(crate) fn direction(&self, vector: &Tensor) -> Result<Tensor> {
        match self {
            Self::Representation => engine(engine(vector.detach().squeeze(0))?.contiguous()),
            Self::Score { class, foil, .. } => {
                let scores = engine(vector.dim(1))?;
                let mut direction = vec![0f32; scores];
                for (index, what, sign) in [(Some(*class), "class", 1.0), (*foil, "foil", -1.0)]
                    .into_iter()
                    .filter_map(|(i, w, s)| i.map(|i| (i, w, s)))
                {
                    let entry = direction.get_mut(index).ok_or_else(|| Error::Target {
                        what,
                        found: index.to_string(),
                        expected: format!("below {scores}, the number of scores"),
                    })?;
                    *entry += sign;
                }
                let direction = engine(Tensor::from_vec(direction, scores, vector.device()))?;
                engine(direction.to_dtype(vector.dtype()))
            }
        }
    }

    /// The score of each stream of the output, and the explained number.
    pub(crate) fn contributions(&self, output: &Output) -> Result<(Vec<f64>, f64)> {
        let vector = self.vector(output)?;
        let direction = self.direction(vector.value())?;
        // [streams, 1]
        let scores = engine(vector.contributions_along(&direction)?.squeeze(1))?;
        let scores = engine(engine(scores.to_dtype(DType::F64))?.to_vec1::<f64>())?;
        Ok((scores, number(&self.number(output)?)?))
    }

    /// The explained number, as a tensor of one element whose gradient can be asked for.
    /// Under explicit relevance its backward pass starts the relevance of the outputs.
    pub(crate) fn number(&self, output: &Output) -> Result<Tensor> {
        self.number_of(output, 0)
    }

    /// As [`Target::number`], for any sequence of the batch.
    pub(crate) fn number_of(&self, output: &Output, sequence: usize) -> Result<Tensor> {
        let vector = self.vector_of(output, sequence)?;
        let direction = self.direction(vector.value())?;
        engine(engine(vector.read_out()?.broadcast_mul(&direction))?.sum_all())
    }
}

/// A tensor of one element as a number.
pub(crate) fn number(tensor: &Tensor) -> Result<f64> {
    engine(engine(tensor.to_dtype(DType::F64))?.to_scalar::<f64>())
}
