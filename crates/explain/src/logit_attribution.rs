//! Direct logit attribution: which parts of the model write the logit (Elhage et al., A
//! Mathematical Framework for Transformer Circuits, 2021; nostalgebraist, interpreting GPT: the
//! logit lens, 2020).
//!
//! What each part writes to the residual stream is one stream of its own, followed through the
//! final norm (its deviation frozen) and the output matrix. Nothing of a part's effect through
//! later parts is counted.

use crate::error::engine;
use crate::{Explanation, Result, Target, Unit};
use lapidary_kernels::{DType, Tensor};
use lapidary_model::{Input, Model, Pass};
use lapidary_signal::streams::{BiasSplit, Partition, StreamRules, StreamSpace};
use lapidary_signal::{Signal, Trace};

/// Scores of the model's parts for `target`, for the first sequence of `input`: the embeddings,
/// each block's attention and feed-forward part, and last the biases after them.
pub fn direct_logit_attribution(
    model: &Model,
    input: &Input,
    padding: Option<&Tensor>,
    target: Target,
) -> Result<Explanation> {
    let blocks = model.spec().expanded_blocks();
    let mut labels = vec!["embeddings".to_owned()];
    for (index, block) in blocks.iter().enumerate() {
        labels.push(format!("blocks.{index}.attention"));
        if block.cross_attention.is_some() {
            labels.push(format!("blocks.{index}.cross_attention"));
        }
        if block.feedforward.is_some() {
            labels.push(format!("blocks.{index}.feedforward"));
        }
    }
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
    let explained =
        engine(engine(vector.value().matmul(&engine(direction.unsqueeze(1))?))?.flatten_all())?;
    let explained = engine(engine(explained.to_dtype(DType::F64))?.to_vec1::<f64>())?;
    let explained = explained.first().copied().unwrap_or(f64::NAN);
    labels.push("biases".to_owned());
    let left_out = vec!["what a part does through later parts".to_owned()];
    let mut explanation = Explanation::new(
        "logit-attribution",
        Unit::Component,
        scores,
        explained,
        left_out,
    );
    explanation.account.largest_site_error =
        trace.conservation().values().copied().reduce(f64::max);
    Ok(explanation.with_labels(labels))
}
