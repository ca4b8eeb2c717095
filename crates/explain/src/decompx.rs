//! DecompX: Explaining Transformers Decisions by Propagating Token Decomposition (Modarressi,
//! Fayyaz, Aghazadeh, Yaghoobzadeh, Pilehvar, ACL 2023, arXiv 2306.02873).
//!
//! Every hidden vector is the sum of one stream for each input token. The streams start one-hot
//! at the embeddings and go unmixed through every module: attention weights and the deviations
//! of norms are frozen, activations become lines, biases are split. The streams of a logit sum
//! to the logit.
//!
//! Where the authors' paper and code disagree (the site where attention's bias is split, and the
//! value bias of the first layer), the code's behaviour is the default and
//! [`BiasSite`](lapidary_signal::streams::BiasSite) chooses.

use crate::error::engine;
use crate::{Explanation, Result, Target, Unit};
use lapidary_kernels::{DType, Tensor};
use lapidary_model::{Input, Model, Pass};
use lapidary_signal::Trace;
use lapidary_signal::streams::{BiasSplit, Partition, StreamRules};

/// Scores of the input's tokens for `target` under `rules`, for the first sequence of `input`.
///
/// With [`BiasSplit::Extra`] the last score is that of the bias stream.
pub fn decompx(
    model: &Model,
    input: &Input,
    padding: Option<&Tensor>,
    target: Target,
    rules: StreamRules,
) -> Result<Explanation> {
    let trace = Trace::new()
        .replace("embeddings", move |_, signal| {
            let tokens = signal.dims().get(1).copied().unwrap_or(0);
            signal.into_streams(Partition::positions(tokens), rules)
        })?
        .follow_conservation();
    let pass = Pass {
        padding,
        trace: Some(&trace),
        ..Pass::default()
    };
    let output = model.forward(input, pass)?;
    let vector = target.vector(&output)?;
    let direction = target.direction(vector.value())?;
    // [streams, 1]
    let scores = engine(vector.contributions_along(&direction)?.squeeze(1))?;
    let scores = engine(engine(scores.to_dtype(DType::F64))?.to_vec1::<f64>())?;
    let explained = engine(vector.value().matmul(&engine(direction.unsqueeze(1))?))?;
    let explained =
        engine(engine(engine(explained.flatten_all())?.to_dtype(DType::F64))?.to_vec1::<f64>())?;
    let left_out = match rules.bias {
        BiasSplit::Drop => vec!["every bias of the model".to_owned()],
        _ => Vec::new(),
    };
    let explained = explained.first().copied().unwrap_or(f64::NAN);
    let mut explanation = Explanation::new("decompx", Unit::Token, scores, explained, left_out);
    explanation.account.largest_site_error =
        trace.conservation().values().copied().reduce(f64::max);
    Ok(explanation)
}
