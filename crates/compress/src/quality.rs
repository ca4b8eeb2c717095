//! What a model is worth, and how far another one is from it.

mod blocks;
mod recitation;

pub use blocks::{block_errors, block_errors_after};
pub use recitation::{Recitation, edit_distance, ndcg, ranking_kept, recitation};

use lapidary_kernels::{D, DType, SoftmaxMask, Tensor, gather, log_softmax};
use lapidary_model::{HeadSpec, Model, Output, Pass};
use serde::Serialize;

use crate::data::{Batch, Target, real_rows};
use crate::error::engine;
use crate::{CalibrationData, Error, Example, Result, RoundedActivations};

/// A stretch of text, of which the last tokens are scored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Window {
    /// The tokens.
    pub tokens: Vec<u32>,
    /// The first of these many tokens are only read. At least 1: the first token of a window
    /// has nothing that predicts it.
    pub context: usize,
}

/// Cuts a text into windows of at most `length` tokens that start `stride` apart. Each token but
/// the first is scored exactly once, in the first window that holds it.
///
/// ```
/// use lapidary_compress::quality::sliding_windows;
/// let windows = sliding_windows(&[1, 2, 3, 4, 5], 4, 2)?;
/// let cut: Vec<_> = windows.iter().map(|w| (w.tokens.as_slice(), w.context)).collect();
/// assert_eq!(cut, [(&[1, 2, 3, 4][..], 1), (&[3, 4, 5][..], 2)]);
/// # Ok::<(), lapidary_compress::Error>(())
/// ```
pub fn sliding_windows(tokens: &[u32], length: usize, stride: usize) -> Result<Vec<Window>> {
    if length < 2 {
        return Err(Error::invalid("window", length, "at least 2 tokens"));
    }
    if stride == 0 || stride >= length {
        return Err(Error::invalid(
            "stride",
            stride,
            format!("between 1 and {}, below the window", length - 1),
        ));
    }
    if tokens.len() < 2 {
        return Err(Error::invalid(
            "length of the text",
            tokens.len(),
            "at least 2 tokens",
        ));
    }
    let mut windows = Vec::new();
    let (mut start, mut scored) = (0, 1);
    loop {
        let end = (start + length).min(tokens.len());
        windows.push(Window {
            tokens: tokens.get(start..end).unwrap_or_default().to_vec(),
            context: scored - start,
        });
        if end == tokens.len() {
            return Ok(windows);
        }
        scored = end;
        start += stride;
    }
}

/// The exponential of the mean negative log-likelihood of tokens.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Perplexity {
    /// The perplexity.
    pub value: f64,
    /// Tokens that were scored.
    pub tokens: usize,
    /// Windows they were in.
    pub windows: usize,
}

/// The perplexity of a causal language model on windows, `batch` at a time.
pub fn perplexity(model: &Model, windows: &[Window], batch: usize) -> Result<Perplexity> {
    perplexity_by(model, windows, batch, None)
}

/// As [`perplexity`], with the model's activations rounded.
///
/// # Errors
/// Those of [`perplexity`].
pub fn perplexity_rounded(
    model: &Model,
    windows: &[Window],
    batch: usize,
    activations: &RoundedActivations,
) -> Result<Perplexity> {
    perplexity_by(model, windows, batch, Some(activations))
}

fn perplexity_by(
    model: &Model,
    windows: &[Window],
    batch: usize,
    activations: Option<&RoundedActivations>,
) -> Result<Perplexity> {
    check_predicts(model)?;
    let (mut sum, mut tokens) = (0.0, 0);
    for chunk in windows.chunks(batch.max(1)) {
        for said in log_probabilities(model, chunk, None, activations)? {
            sum -= said;
            tokens += 1;
        }
    }
    Ok(Perplexity {
        value: (sum / counted(tokens)?).exp(),
        tokens,
        windows: windows.len(),
    })
}

/// What the sub-networks that a model draws are worth, alone and together.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Members {
    /// Perplexity of the mean of the probabilities of the first member, of the first two, and so on.
    pub together: Vec<f64>,
    /// The exponential of the mean negative log-likelihood over tokens and members: never below the last
    /// of `together`, since the logarithm is concave.
    pub alone: f64,
    /// The deviation of a token's probability among the members, on average: how unsure they are.
    pub deviation: f64,
}

/// [`perplexity`] of an ensemble of a causal language model's own draws, whose seeds are `seed`,
/// `seed + 1`, … (Hussain et al., arXiv 2306.01705).
///
/// # Errors
/// For no members, a model that draws nothing, or as for [`perplexity`].
pub fn ensemble_perplexity(
    model: &Model,
    windows: &[Window],
    batch: usize,
    (members, seed): (usize, u64),
) -> Result<Members> {
    check_predicts(model)?;
    if members == 0 {
        return Err(Error::invalid("members of an ensemble", 0, "at least 1"));
    }
    let mut together = vec![0.0; members];
    let (mut alone, mut deviation, mut tokens) = (0.0, 0.0, 0);
    let mut differs = false;
    for chunk in windows.chunks(batch.max(1)) {
        // Of each token: the sums of probabilities and of their squares over the members so far.
        let mut sums: Vec<(f64, f64)> = Vec::new();
        let mut first: Option<Vec<f64>> = None;
        for (so_far, together) in (1..).zip(&mut together) {
            let draw = seed.wrapping_add(so_far - 1);
            let said = log_probabilities(model, chunk, Some(draw), None)?;
            match &first {
                None => first = Some(said.clone()),
                Some(first) => differs |= *first != said,
            }
            sums.resize(said.len(), (0.0, 0.0));
            for (said, (sum, squares)) in said.into_iter().zip(&mut sums) {
                alone -= said;
                *sum += said.exp();
                *squares += (2.0 * said).exp();
                *together -= (*sum / so_far as f64).ln();
            }
        }
        if members > 1 && !differs {
            return Err(Error::invalid(
                "model of an ensemble",
                "one that draws nothing at random: its members are one and the same",
                "one whose draws differ, such as with subsampled attention",
            ));
        }
        let each = members as f64;
        deviation += sums
            .iter()
            .map(|(sum, squares)| (squares / each - (sum / each).powi(2)).max(0.0).sqrt())
            .sum::<f64>();
        tokens += sums.len();
    }
    let tokens = counted(tokens)?;
    Ok(Members {
        together: together.iter().map(|sum| (sum / tokens).exp()).collect(),
        alone: (alone / tokens / members as f64).exp(),
        deviation: deviation / tokens,
    })
}

/// Whether a model predicts each next token from those before it.
pub(crate) fn predicts(model: &Model) -> bool {
    model.spec().is_causal() && matches!(model.spec().head, HeadSpec::LanguageModel { .. })
}

fn check_predicts(model: &Model) -> Result<()> {
    if !predicts(model) {
        return Err(Error::invalid(
            "model",
            "not a causal language model",
            "one: perplexity is defined by predicting each next token",
        ));
    }
    Ok(())
}

fn counted(tokens: usize) -> Result<f64> {
    match tokens {
        0 => Err(Error::invalid("tokens to score", 0, "at least 1")),
        _ => Ok(tokens as f64),
    }
}

/// The logarithm of the probability of each token of the windows that is scored, in one pass with such a
/// draw and, where told, rounded activations.
fn log_probabilities(
    model: &Model,
    windows: &[Window],
    draw: Option<u64>,
    activations: Option<&RoundedActivations>,
) -> Result<Vec<f64>> {
    let examples = windows
        .iter()
        .map(|window| Example::window(window.tokens.clone()));
    let data = CalibrationData::new(examples.collect())?;
    let batch = Batch::new(data.examples(), &model.device())?;
    let trace = activations.map(RoundedActivations::trace).transpose()?;
    let pass = Pass {
        padding: batch.padding.as_ref(),
        trace: trace.as_ref(),
        draw,
        ..Pass::default()
    };
    let logits = model
        .forward(&batch.input, pass)?
        .into_logits()?
        .into_value();
    let mut found = Vec::new();
    for (row, window) in windows.iter().enumerate() {
        let first = window.context.max(1);
        let Some(targets) = window.tokens.get(first..).filter(|rest| !rest.is_empty()) else {
            continue;
        };
        let scores = scores_of(&logits, row, first - 1, targets.len())?;
        let shape = (targets.len(), 1);
        let targets = engine(Tensor::from_slice(targets, shape, scores.device()))?;
        let log_probability = log_softmax(&scores, &SoftmaxMask::default())?;
        let picked = engine(gather(&log_probability, &targets, 1)?.flatten_all())?;
        found.extend(engine(
            engine(picked.to_dtype(DType::F64))?.to_vec1::<f64>(),
        )?);
    }
    Ok(found)
}

/// `[count, vocabulary]` of `[batch, length, vocabulary]`: one sequence from `start` on.
fn scores_of(
    logits: &Tensor,
    row: usize,
    start: usize,
    count: usize,
) -> lapidary_kernels::Result<Tensor> {
    let sequence = logits.narrow(0, row, 1)?.squeeze(0)?;
    Ok(sequence.narrow(0, start, count)?)
}

/// How much two models say the same.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Agreement {
    /// Mean `KL(original ‖ other)` of the predicted distributions, in nats.
    pub divergence: f64,
    /// Share of predictions with the same most likely answer.
    pub top1: f64,
    /// Predictions compared: one per token for a language model, one per example for a
    /// classifier.
    pub predictions: usize,
}

/// Compares the predictions of two models on the same examples, `batch` at a time.
pub fn agreement(
    original: &Model,
    other: &Model,
    data: &CalibrationData,
    batch: usize,
) -> Result<Agreement> {
    agreement_by(original, other, data, batch, None)
}

/// As [`agreement`], with the activations of `other` rounded.
///
/// # Errors
/// Those of [`agreement`].
pub fn agreement_rounded(
    original: &Model,
    other: &Model,
    data: &CalibrationData,
    batch: usize,
    activations: &RoundedActivations,
) -> Result<Agreement> {
    agreement_by(original, other, data, batch, Some(activations))
}

/// One pass, with activations rounded where told.
fn output(
    model: &Model,
    batch: &Batch<'_>,
    activations: Option<&RoundedActivations>,
) -> Result<Output> {
    let trace = activations.map(RoundedActivations::trace).transpose()?;
    Ok(model.forward(
        &batch.input,
        Pass {
            padding: batch.padding.as_ref(),
            trace: trace.as_ref(),
            ..Pass::default()
        },
    )?)
}

fn agreement_by(
    original: &Model,
    other: &Model,
    data: &CalibrationData,
    batch: usize,
    activations: Option<&RoundedActivations>,
) -> Result<Agreement> {
    let device = original.device();
    let (mut divergence, mut same, mut predictions) = (0.0, 0.0, 0);
    for batch in data.batches(batch, &device) {
        let batch = batch?;
        let rows = |model: &Model, activations| -> Result<Tensor> {
            let logits = output(model, &batch, activations)?.into_logits()?;
            Ok(real_rows(logits.value(), batch.real.as_ref())?)
        };
        let (p, q) = (rows(original, None)?, rows(other, activations)?);
        if p.dims() != q.dims() {
            return Err(Error::invalid(
                "scores of the other model",
                format!("{:?}", q.dims()),
                format!("{:?}, as of the original", p.dims()),
            ));
        }
        let log_p = log_softmax(&p, &SoftmaxMask::default())?;
        let log_q = log_softmax(&q, &SoftmaxMask::default())?;
        // Σ p (log p − log q)
        let terms = engine(engine(log_p.exp())? * engine(&log_p - &log_q)?)?;
        let per_row = engine(engine(terms.sum(D::Minus1))?.to_dtype(DType::F64))?;
        divergence += engine(engine(per_row.sum_all())?.to_scalar::<f64>())?;
        let equal = engine(engine(p.argmax(D::Minus1))?.eq(&engine(q.argmax(D::Minus1))?))?;
        let equal = engine(engine(equal.to_dtype(DType::F64))?.sum_all())?;
        same += engine(equal.to_scalar::<f64>())?;
        predictions += engine(p.dim(0))?;
    }
    // Negative by rounding only; what is no number stays none.
    if divergence < 0.0 {
        divergence = 0.0;
    }
    Ok(Agreement {
        divergence: divergence / predictions.max(1) as f64,
        top1: same / predictions.max(1) as f64,
        predictions,
    })
}

/// How alike two models' representations are.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Likeness {
    /// Mean cosine of the two last hidden vectors of a token.
    pub cosine: f64,
    /// `√(Σ ‖a − b‖² / Σ ‖a‖²)` over all tokens, `a` the original's vector.
    pub relative_error: f64,
    /// Vectors compared, one per token.
    pub vectors: usize,
}

/// Compares the last hidden vectors of two models on the same examples, `batch` at a time: for
/// models without scores.
pub fn likeness(
    original: &Model,
    other: &Model,
    data: &CalibrationData,
    batch: usize,
) -> Result<Likeness> {
    likeness_by(original, other, data, batch, None)
}

/// As [`likeness`], with the activations of `other` rounded.
///
/// # Errors
/// Those of [`likeness`].
pub fn likeness_rounded(
    original: &Model,
    other: &Model,
    data: &CalibrationData,
    batch: usize,
    activations: &RoundedActivations,
) -> Result<Likeness> {
    likeness_by(original, other, data, batch, Some(activations))
}

fn likeness_by(
    original: &Model,
    other: &Model,
    data: &CalibrationData,
    batch: usize,
    activations: Option<&RoundedActivations>,
) -> Result<Likeness> {
    let device = original.device();
    let (mut cosine, mut error, mut size, mut vectors) = (0.0, 0.0, 0.0, 0);
    for batch in data.batches(batch, &device) {
        let batch = batch?;
        let rows = |model: &Model, activations| -> Result<Tensor> {
            let hidden = output(model, &batch, activations)?.hidden.into_value();
            let rows = real_rows(&hidden, batch.real.as_ref())?;
            engine(rows.to_dtype(DType::F64))
        };
        let (a, b) = (rows(original, None)?, rows(other, activations)?);
        let total = |t: &Tensor| engine(engine(t.sum_all())?.to_scalar::<f64>());
        let dot = |x: &Tensor, y: &Tensor| engine(engine(x * y)?.sum(D::Minus1));
        let (squares_a, squares_b) = (dot(&a, &a)?, dot(&b, &b)?);
        // A zero vector has no direction: its cosine counts as 0.
        let lengths = engine(engine(&squares_a * &squares_b)?.sqrt())?;
        let lengths = engine(lengths.maximum(f64::MIN_POSITIVE))?;
        cosine += total(&engine(dot(&a, &b)? / lengths)?)?;
        let difference = engine(&a - &b)?;
        error += total(&dot(&difference, &difference)?)?;
        size += total(&squares_a)?;
        vectors += engine(a.dim(0))?;
    }
    Ok(Likeness {
        cosine: cosine / vectors.max(1) as f64,
        relative_error: if error == 0.0 {
            0.0
        } else {
            (error / size.max(f64::MIN_POSITIVE)).sqrt()
        },
        vectors,
    })
}

/// The share of labelled examples that a classifier gets right.
pub fn accuracy(model: &Model, data: &CalibrationData, batch: usize) -> Result<f64> {
    let mut right = 0usize;
    for batch in data.batches(batch, &model.device()) {
        let batch = batch?;
        let logits = output(model, &batch, None)?.into_logits()?.into_value();
        if logits.rank() != 2 {
            return Err(Error::invalid(
                "scores",
                format!("{:?}", logits.dims()),
                "one row per example: accuracy needs a classifier",
            ));
        }
        let said = engine(engine(logits.argmax(D::Minus1))?.to_vec1::<u32>())?;
        for (example, said) in batch.examples.iter().zip(said) {
            match example.target {
                Target::Label(label) => right += usize::from(label == said),
                _ => return Err(Error::invalid("target", "absent", "a label")),
            }
        }
    }
    Ok(right as f64 / data.len() as f64)
}
