//! A pass that follows what sets of heads write.

use super::batch::Batch;
use super::means::Means;
use super::node::{Node, Place, masks};
use crate::Result;
use crate::error::engine;
use lapidary_kernels::Tensor;
use lapidary_model::{Model, Output};
use lapidary_signal::contextual::ContextualRules;
use lapidary_signal::{Signal, Trace};

/// Follows each of `sources`, a set of nodes, from their heads' outputs `z` on: there the relevant
/// part is `z − m` with `m` the mean, and before that nothing is relevant.
///
/// The pass starts at the earliest source's block, whose input the batch remembers. What is
/// captured at `read` is in the trace; above block `until` nothing is followed any more.
pub(super) fn follow(
    model: &Model,
    batch: &Batch,
    means: &Means,
    rules: ContextualRules,
    sources: &[Vec<Node>],
    (read, until): (&[String], Option<usize>),
) -> Result<(Trace, Output)> {
    let nodes = || sources.iter().flatten();
    let earliest = nodes().map(|node| node.block).min().unwrap_or(0);
    let latest = nodes().map(|node| node.block).max().unwrap_or(0);
    let mut trace = Trace::new();
    for block in earliest..=latest {
        // The block where the lens goes on may have none of the sources of some set.
        if block > earliest && nodes().all(|node| node.block != block) {
            continue;
        }
        let found = batch.found(Place::Mixed, block)?;
        let kind = (found.dtype(), found.device());
        let mask = masks(sources, block, model, batch.length(), kind)?;
        let deviation = means.less(found, Place::Mixed, block)?;
        let written = engine(mask.broadcast_mul(&deviation))?;
        let others = engine(mask.affine(-1.0, 1.0))?;
        trace = trace.replace(&Place::Mixed.site(block), move |_, signal| {
            relevant_from_here(signal, &written, &others, rules)
        })?;
    }
    for site in read {
        trace = trace.capture(site)?;
    }
    if let Some(block) = until {
        for site in ["attention.out", "feedforward.in", "out"] {
            trace = trace.replace(&format!("blocks.{block}.{site}"), |_, signal| {
                Ok(Signal::from(signal.into_value()))
            })?;
        }
    }
    let output = batch.run(model, earliest, 1, &trace)?;
    Ok((trace, output))
}

/// `signal` with `written` `[sources, batch, length, features]` as its relevant part, and where
/// `others` is one, what was relevant already.
fn relevant_from_here(
    signal: Signal,
    written: &Tensor,
    others: &Tensor,
    rules: ContextualRules,
) -> lapidary_signal::Result<Signal> {
    let relevant = match signal.contextual() {
        Some(before) => {
            let kept = before.relevant().broadcast_mul(others);
            let both = kept.and_then(|kept| kept + written);
            both.map_err(lapidary_kernels::Error::from)?
        }
        None => written.clone(),
    };
    Signal::from(signal.into_value()).into_contextual(relevant, rules)
}
