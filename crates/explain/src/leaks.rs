//! Where relevance is lost on its way back.
//!
//! Biases keep their share, a linearised softmax keeps or adds what its scores say, stabilisers
//! damp. What each part of a model keeps to itself is the relevance of what it writes less that
//! of what it reads.

use std::collections::BTreeMap;

use crate::Result;
use crate::error::engine;
use crate::target::number;
use lapidary_kernels::GradStore;
use lapidary_signal::{SiteRecord, Trace};
use schemars::JsonSchema;
use serde::Serialize;

/// The parts of a block that have a site before and one after them.
const PARTS: [&str; 3] = ["attention", "cross_attention", "feedforward"];

/// Relevance that a part of the model does not pass on.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
pub struct Leak {
    /// The part: `head` (with the final norm), `blocks.I.attention`, `blocks.I.feedforward`, or
    /// `blocks.I.rest`, the block's norms and sums.
    pub part: String,
    /// Relevance of what it writes.
    pub arrived: f64,
    /// Relevance of what it reads.
    pub passed: f64,
}

impl Leak {
    /// What it keeps; negative where it adds.
    pub fn lost(&self) -> f64 {
        self.arrived - self.passed
    }
}

/// Taps the sites that [`leaks`] reads.
pub(crate) fn tap(mut trace: Trace, blocks: usize) -> Result<Trace> {
    for block in 0..blocks {
        let parts = PARTS.map(|part| format!("{part}.in,{part}.out")).join(",");
        trace = trace.tap(&format!("blocks.{block}.{{in,out,{parts}}}"))?;
    }
    Ok(trace)
}

/// The leaks of the first sequence from the outputs, which start with `seed`, down to the
/// embeddings. They add up to `seed` less the relevance of the embeddings.
pub(crate) fn leaks(
    records: &BTreeMap<String, SiteRecord>,
    gradients: &GradStore,
    blocks: usize,
    seed: f64,
) -> Result<Vec<Leak>> {
    let at = |site: &str| -> Result<Option<f64>> {
        records
            .get(site)
            .map(|record| sum_at(record, gradients))
            .transpose()
    };
    let mut leaks = Vec::new();
    let mut push = |part: String, arrived: f64, passed: f64| {
        leaks.push(Leak {
            part,
            arrived,
            passed,
        });
    };
    for block in (0..blocks).rev() {
        let path = format!("blocks.{block}");
        let (Some(out), Some(read)) = (at(&format!("{path}.out"))?, at(&format!("{path}.in"))?)
        else {
            continue;
        };
        if block + 1 == blocks {
            push("head".to_owned(), seed, out);
        }
        let mut kept = 0.0;
        for part in PARTS.iter().rev() {
            let [above, below] = ["out", "in"].map(|side| format!("{path}.{part}.{side}"));
            if let (Some(above), Some(below)) = (at(&above)?, at(&below)?) {
                push(format!("{path}.{part}"), above, below);
                kept += above - below;
            }
        }
        push(format!("{path}.rest"), out - kept, read);
    }
    Ok(leaks)
}

/// The relevance of the first sequence at a site; none where the explained number does not depend
/// on it.
fn sum_at(record: &SiteRecord, gradients: &GradStore) -> Result<f64> {
    if !record.is_reached(gradients) {
        return Ok(0.0);
    }
    number(&engine(
        engine(record.relevance(gradients)?.get(0))?.sum_all(),
    )?)
}
