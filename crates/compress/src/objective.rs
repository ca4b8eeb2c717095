//! The loss whose gradients weigh the weights.

use std::fmt;

use lapidary_kernels::{D, DType, SoftmaxMask, Tensor, gather, log_softmax};
use lapidary_model::{HeadSpec, Model, Output};
use serde::{Deserialize, Serialize};

use crate::calibration::forward;
use crate::data::{Batch, Content, Example, Target};
use crate::error::engine;
use crate::{CalibrationData, Error, Result};

/// Which loss an example has. Each is a mean within the example, so that every example counts
/// the same whatever its length.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Objective {
    /// Cross-entropy of each next token.
    NextToken,
    /// Cross-entropy of the token given at each position that has one.
    TargetTokens,
    /// Cross-entropy of the label.
    Label,
    /// `½ ‖v‖²` of the pooled vector, or without one of the mean hidden vector: a substitute
    /// where neither the model nor the data has a task. It asks which weights change the
    /// representation's length, not which ones a task needs.
    Representation,
}

impl fmt::Display for Objective {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NextToken => "cross-entropy of the next token",
            Self::TargetTokens => "cross-entropy of the target tokens",
            Self::Label => "cross-entropy of the label",
            Self::Representation => {
                "half the squared length of the pooled vector, in place of a task's loss"
            }
        })
    }
}

impl Objective {
    /// The loss that fits the model's head and the targets in the data.
    ///
    /// An error where they contradict each other: labels without a classifier, token targets or
    /// a bidirectional language model without each other, windows without a next token.
    pub fn of(model: &Model, data: &CalibrationData) -> Result<Self> {
        let target = data.examples().first().map(|example| &example.target);
        match (&model.spec().head, target) {
            (HeadSpec::LanguageModel { .. }, Some(Target::Tokens(_))) => Ok(Self::TargetTokens),
            (HeadSpec::LanguageModel { .. }, Some(Target::None)) if model.spec().is_causal() => {
                let short = data.examples().iter().position(|e| e.tokens() < 2);
                match short {
                    Some(index) => Err(Error::invalid(
                        format!("length of window {index}"),
                        1,
                        "at least 2 tokens, so that there is a next one",
                    )),
                    None => Ok(Self::NextToken),
                }
            }
            (HeadSpec::LanguageModel { .. }, Some(Target::None)) => Err(Error::invalid(
                "target of the examples",
                "absent",
                "token ids at masked positions: this language model sees both sides",
            )),
            (
                HeadSpec::Pooled {
                    labels: Some(count),
                    ..
                },
                Some(Target::Label(_)),
            ) => {
                let labels = data.examples().iter().filter_map(|e| match e.target {
                    Target::Label(label) => Some(label),
                    _ => None,
                });
                match labels.max() {
                    Some(largest) if largest as usize >= *count => Err(Error::invalid(
                        "largest label",
                        largest,
                        format!("below {count}, the number of classes"),
                    )),
                    _ => Ok(Self::Label),
                }
            }
            (HeadSpec::Pooled { .. } | HeadSpec::None | HeadSpec::Pixels, Some(Target::None)) => {
                Ok(Self::Representation)
            }
            _ => Err(Error::invalid(
                "target of the examples",
                "of another kind than the model's head",
                "labels for a classifier, tokens or nothing for a language model, nothing \
                 otherwise",
            )),
        }
    }

    /// The mean loss of all examples.
    pub(crate) fn mean(self, model: &Model, data: &CalibrationData, batch: usize) -> Result<f64> {
        let mut total = 0.0;
        for batch in data.batches(batch, &model.device()) {
            let batch = batch?;
            let losses = self.losses(&forward(model, &batch, None)?, &batch)?;
            let sum = engine(engine(losses.detach().to_dtype(DType::F64))?.sum_all())?;
            total += engine(sum.to_scalar::<f64>())?;
        }
        Ok(total / data.len() as f64)
    }

    /// The loss of each example, `[batch]`.
    pub(crate) fn losses(self, output: &Output, batch: &Batch<'_>) -> Result<Tensor> {
        match self {
            Self::Representation => representation(output, batch),
            Self::Label => {
                let logits = logits(output)?;
                let labels = labels(batch.examples)?;
                let count = labels.len();
                let labels = engine(Tensor::from_vec(labels, (count, 1), logits.device()))?;
                let scores = log_softmax(logits, &SoftmaxMask::default())?;
                engine(engine(gather(&scores, &labels, 1)?.squeeze(1))?.neg())
            }
            Self::NextToken | Self::TargetTokens => {
                let logits = logits(output)?;
                let (rows, length, _) = engine(logits.dims3())?;
                let (targets, weights) = token_targets(batch.examples, length);
                let shape = (rows, length);
                let targets = engine(Tensor::from_vec(
                    targets,
                    (rows, length, 1),
                    logits.device(),
                ))?;
                let weights = engine(Tensor::from_vec(weights, shape, logits.device()))?;
                let weights = engine(weights.to_dtype(logits.dtype()))?;
                let scores = log_softmax(logits, &SoftmaxMask::default())?;
                let picked = engine(gather(&scores, &targets, 2)?.squeeze(2))?;
                engine(engine(engine(picked * weights)?.sum(1))?.neg())
            }
        }
    }
}

fn logits(output: &Output) -> Result<&Tensor> {
    match &output.logits {
        Some(logits) => Ok(logits.value()),
        None => Err(Error::invalid("head", "none", "one that gives scores")),
    }
}

fn labels(examples: &[Example]) -> Result<Vec<u32>> {
    examples
        .iter()
        .map(|example| match example.target {
            Target::Label(label) => Ok(label),
            _ => Err(Error::invalid("target", "absent", "a label")),
        })
        .collect()
}

/// What each position should score highest, and its weight: one over the number of targets of
/// the example, 0 where there is none.
fn token_targets(examples: &[Example], length: usize) -> (Vec<u32>, Vec<f64>) {
    let mut targets = Vec::with_capacity(examples.len() * length);
    let mut weights = Vec::with_capacity(examples.len() * length);
    for example in examples {
        let wanted: Vec<Option<u32>> = match (&example.target, &example.content) {
            (Target::Tokens(tokens), _) => tokens.clone(),
            (_, Content::Tokens { ids, .. }) => ids.iter().skip(1).copied().map(Some).collect(),
            (_, Content::Pixels(_)) => Vec::new(),
        };
        let count = wanted.iter().flatten().count().max(1) as f64;
        for position in 0..length {
            let target = wanted.get(position).copied().flatten();
            targets.push(target.unwrap_or(0));
            weights.push(if target.is_some() { 1.0 / count } else { 0.0 });
        }
    }
    (targets, weights)
}

/// `½ ‖v‖²` per example.
fn representation(output: &Output, batch: &Batch<'_>) -> Result<Tensor> {
    let vector = match &output.pooled {
        Some(pooled) => pooled.value().clone(),
        None => mean_of_real_tokens(output.hidden.value(), batch.padding.as_ref())?,
    };
    engine(engine(engine(vector.sqr())?.sum(D::Minus1))?.affine(0.5, 0.0))
}

/// `[batch, length, width] -> [batch, width]`.
fn mean_of_real_tokens(hidden: &Tensor, padding: Option<&Tensor>) -> Result<Tensor> {
    let Some(padding) = padding else {
        return engine(hidden.mean(1));
    };
    let keep = engine(padding.to_dtype(DType::F64))?;
    let weights = engine(keep.broadcast_div(&engine(keep.sum_keepdim(1))?))?;
    let weights = engine(engine(weights.to_dtype(hidden.dtype()))?.unsqueeze(2))?;
    engine(engine(hidden.broadcast_mul(&weights))?.sum(1))
}
