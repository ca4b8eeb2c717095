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

use crate::explainer::Explainer;
use crate::{Explanation, Options, Question, Result, Target, Unit};
use lapidary_kernels::Tensor;
use lapidary_model::{Input, Model};
use lapidary_signal::Trace;
use lapidary_signal::streams::{BiasSplit, Partition, StreamRules};

/// DecompX in the list of explainers; reads [`Options::streams`].
pub(crate) const DECOMPX: Explainer = Explainer {
    name: "decompx",
    summary: "Token streams through every module",
    source: "Modarressi et al. 2023, arXiv 2306.02873",
    unit: Unit::Token,
    explain: |question, targets, options| explain(question, targets, options.streams),
};

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
    let question = Question {
        model,
        input,
        padding,
    };
    let options = Options {
        streams: rules,
        ..Options::default()
    };
    DECOMPX.explain(&question, target, &options)
}

/// One forward pass with streams, read along each target.
fn explain(
    question: &Question<'_>,
    targets: &[Target],
    rules: StreamRules,
) -> Result<Vec<Explanation>> {
    let trace = Trace::new()
        .replace("embeddings", move |_, signal| {
            let tokens = signal.dims().get(1).copied().unwrap_or(0);
            signal.into_streams(Partition::positions(tokens), rules)
        })?
        .follow_conservation();
    let output = question
        .model
        .forward(question.input, question.pass(&trace))?;
    let site_error = trace.conservation().values().copied().reduce(f64::max);
    let explain = |target: &Target| {
        let (scores, explained) = target.contributions(&output)?;
        let left_out = match rules.bias {
            BiasSplit::Drop => vec!["every bias of the model".to_owned()],
            _ => Vec::new(),
        };
        let mut explanation =
            Explanation::new(DECOMPX.name, Unit::Token, scores, explained, left_out);
        explanation.account.largest_site_error = site_error;
        Ok(explanation)
    };
    targets.iter().map(explain).collect()
}
