//! Direct logit attribution: which parts of the model write the logit (Elhage et al., A
//! Mathematical Framework for Transformer Circuits, 2021; nostalgebraist, interpreting GPT: the
//! logit lens, 2020).
//!
//! What each part writes to the residual stream is one stream of its own, followed through the
//! final norm (its deviation frozen) and the output matrix. Nothing of a part's effect through
//! later parts is counted.

use crate::explainer::Explainer;
use crate::{Explanation, Options, Question, Result, Target, Unit};
use lapidary_kernels::Tensor;
use lapidary_model::{Input, Model};
use lapidary_parts::attention::MixerSpec;
use lapidary_signal::streams::{BiasSplit, Partition, StreamRules, StreamSpace};
use lapidary_signal::{Signal, Trace};

/// Direct logit attribution in the list of explainers.
pub(crate) const LOGIT_ATTRIBUTION: Explainer = Explainer {
    name: "logit-attribution",
    summary: "Which modules write the logit",
    source: "Elhage et al. 2021",
    unit: Unit::Component,
    explain: |question, targets, _| explain(question, targets),
};

/// Scores of the model's parts for `target`, for the first sequence of `input`: the embeddings,
/// each block's attention and feed-forward part, and last the biases after them.
pub fn direct_logit_attribution(
    model: &Model,
    input: &Input,
    padding: Option<&Tensor>,
    target: Target,
) -> Result<Explanation> {
    let question = Question {
        model,
        input,
        padding,
    };
    LOGIT_ATTRIBUTION.explain(&question, target, &Options::default())
}

/// The parts that write to the residual stream, by site without `.out`, in order.
fn writers(model: &Model) -> Vec<String> {
    let mut labels = vec!["embeddings".to_owned()];
    for (index, block) in model.spec().expanded_blocks().iter().enumerate() {
        if block.attention != MixerSpec::Absent {
            labels.push(format!("blocks.{index}.attention"));
        }
        if block.cross_attention.is_some() {
            labels.push(format!("blocks.{index}.cross_attention"));
        }
        if block.feedforward.is_some() {
            labels.push(format!("blocks.{index}.feedforward"));
        }
    }
    labels
}

fn explain(question: &Question<'_>, targets: &[Target]) -> Result<Vec<Explanation>> {
    let mut labels = writers(question.model);
    let rules = StreamRules {
        bias: BiasSplit::Extra,
        ..StreamRules::default()
    };
    let space = StreamSpace::new(Partition::components(labels.len()), rules);
    let mut trace = Trace::new();
    for (stream, label) in labels.iter().enumerate() {
        let space = space.clone();
        let site = if stream == 0 {
            label.clone()
        } else {
            format!("{label}.out")
        };
        trace = trace.replace(&site, move |_, signal| {
            Signal::from(signal.into_value()).into_whole_stream(&space, stream)
        })?;
    }
    // Inside a part the streams are of no use: only what it writes is followed.
    let trace = trace
        .replace(
            "blocks.*.{attention,cross_attention,feedforward}.in",
            |_, signal| Ok(Signal::from(signal.into_value())),
        )?
        .follow_conservation();
    let output = question
        .model
        .forward(question.input, question.pass(&trace))?;
    let site_error = trace.conservation().values().copied().reduce(f64::max);
    labels.push("biases".to_owned());
    let explain = |target: &Target| {
        let (scores, explained) = target.contributions(&output)?;
        let left_out = vec!["what a part does through later parts".to_owned()];
        let mut explanation = Explanation::new(
            LOGIT_ATTRIBUTION.name,
            Unit::Component,
            scores,
            explained,
            left_out,
        );
        explanation.account.largest_site_error = site_error;
        Ok(explanation.with_labels(labels.clone()))
    };
    targets.iter().map(explain).collect()
}
