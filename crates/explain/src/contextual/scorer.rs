//! What heads contribute to the scores, or to other heads.

use std::collections::BTreeMap;

use super::batch::{Batch, Case, Reading, batches};
use super::follow::follow;
use super::means::Means;
use super::node::{Node, Place, attentions, features};
use super::patching;
use crate::error::engine;
use crate::{Error, Result};
use lapidary_kernels::{DType, Tensor};
use lapidary_model::Model;
use lapidary_signal::Signal;
use lapidary_signal::contextual::{AttentionSplit, ContextualRules};

/// How a relevant part at a head counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NodeScore {
    /// `mean |r| / (mean |r| + mean |g|)`, over the features read.
    #[default]
    Share,
    /// `r · (x − m)`, with `m` the mean there.
    Dot,
}

/// How contributions are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// By the relevant part of what a head writes.
    Contextual(ContextualRules, NodeScore),
    /// By what happens when only the path from a head is patched with the mean.
    PathPatching,
}

/// Where contributions are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Endpoint {
    /// The targets of the cases.
    Scores,
    /// A head.
    Head(Node, Place),
}

/// A model and some prompts, on which heads are scored.
pub struct Scorer<'a> {
    model: &'a Model,
    batches: Vec<Batch>,
    means: Means,
    method: Method,
}

impl<'a> Scorer<'a> {
    /// Runs the prompts once and remembers what flows between blocks.
    ///
    /// # Errors
    /// When a block of the model has no heads, a target is no score, or the means are of prompts
    /// of another length.
    pub fn new(model: &'a Model, cases: &[Case], means: Means, method: Method) -> Result<Self> {
        Ok(Self {
            model,
            batches: batches(model, cases)?,
            means,
            method,
        })
    }

    /// The model.
    pub fn model(&self) -> &'a Model {
        self.model
    }

    /// The mean contribution of each node to each endpoint over the prompts,
    /// `[source][endpoint]`. A node contributes nothing to heads of its own block or earlier.
    pub fn scores(&self, sources: &[Node], endpoints: &[Endpoint]) -> Result<Vec<Vec<f64>>> {
        let sets: Vec<Vec<Node>> = sources.iter().map(|node| vec![*node]).collect();
        self.scores_of_sets(&sets, endpoints)
    }

    /// As [`Scorer::scores`], for sets of nodes that are followed as one.
    pub fn scores_of_sets(
        &self,
        sources: &[Vec<Node>],
        endpoints: &[Endpoint],
    ) -> Result<Vec<Vec<f64>>> {
        let mut sums = vec![vec![0.0; endpoints.len()]; sources.len()];
        let mut cases = 0;
        for batch in &self.batches {
            cases += batch.cases();
            let chunks = sources.chunks(batch.copies_at_once());
            let rows = sums.chunks_mut(batch.copies_at_once());
            for (chunk, rows) in chunks.zip(rows) {
                let found = match self.method {
                    Method::Contextual(rules, score) => {
                        self.followed(batch, rules, score, chunk, endpoints)?
                    }
                    Method::PathPatching => {
                        patching::effects(self.model, batch, &self.means, chunk, endpoints)?
                    }
                };
                for (row, found) in rows.iter_mut().zip(found) {
                    for (sum, one) in row.iter_mut().zip(found) {
                        *sum += one;
                    }
                }
            }
        }
        let mean = |sum: f64| sum / cases.max(1) as f64;
        let row = |row: Vec<f64>| row.into_iter().map(mean).collect();
        Ok(sums.into_iter().map(row).collect())
    }

    /// The sum over a batch of contributions, `[source][endpoint]`.
    fn followed(
        &self,
        batch: &Batch,
        rules: ContextualRules,
        score: NodeScore,
        sources: &[Vec<Node>],
        endpoints: &[Endpoint],
    ) -> Result<Vec<Vec<f64>>> {
        let mut sites: BTreeMap<String, ()> = BTreeMap::new();
        let mut until = Some(0);
        for endpoint in endpoints {
            match endpoint {
                Endpoint::Scores => until = None,
                Endpoint::Head(node, place) => {
                    let is_followed = matches!(place, Place::Mixed | Place::Value)
                        || rules.attention == AttentionSplit::Split;
                    if !is_followed {
                        let expected = "mixed or value, or attention split";
                        return Err(Error::invalid("place of a target", place.name(), expected));
                    }
                    sites.insert(place.site(node.block), ());
                    until = until.map(|block: usize| block.max(node.block));
                }
            }
        }
        let sites: Vec<String> = sites.into_keys().collect();
        let read = (sites.as_slice(), until);
        let (trace, output) = follow(self.model, batch, &self.means, rules, sources, read)?;
        let mut scores = vec![Vec::with_capacity(endpoints.len()); sources.len()];
        for endpoint in endpoints {
            let found = match endpoint {
                Endpoint::Scores => {
                    let relevant = batch.scores(&output)?.relevant()?;
                    let each = batch.read(&relevant, Reading::Difference)?;
                    each.into_iter().map(|cases| cases.iter().sum()).collect()
                }
                Endpoint::Head(node, place) => {
                    // A block before every source is not run, and what it writes is not followed.
                    match trace.signal(&place.site(node.block)) {
                        Ok(signal) if signal.contextual().is_some() => {
                            self.at_head(&signal, node, *place, score)?
                        }
                        _ => vec![0.0; sources.len()],
                    }
                }
            };
            for ((row, found), source) in scores.iter_mut().zip(found).zip(sources) {
                row.push(if reaches(source, endpoint) {
                    found
                } else {
                    0.0
                });
            }
        }
        Ok(scores)
    }

    /// The sum over cases of each source's score at a head.
    fn at_head(
        &self,
        signal: &Signal,
        node: &Node,
        place: Place,
        score: NodeScore,
    ) -> Result<Vec<f64>> {
        let attentions = attentions(self.model)?;
        let range = features(node, place, &attentions, self.model.spec().width)?;
        let own = |t: &Tensor| -> Result<Tensor> {
            let axis = t.rank().saturating_sub(1);
            let own = engine(t.narrow(axis, range.start, range.len()))?;
            match node.position {
                Some(position) => engine(own.narrow(axis - 1, position, 1)),
                None => Ok(own),
            }
        };
        // [sources, cases, length, features] -> [sources, cases]
        let over = |t: &Tensor| engine(t.sum((2, 3)));
        let relevant = own(&signal.relevant()?)?;
        let each = match score {
            NodeScore::Share => {
                let rest = engine(own(signal.value())?.broadcast_sub(&relevant))?;
                let relevant = over(&engine(relevant.abs())?)?;
                let total = engine(&relevant + over(&engine(rest.abs())?)?)?;
                let nothing = engine(engine(total.eq(0.0))?.to_dtype(total.dtype()))?;
                engine(relevant / engine(total + nothing)?)?
            }
            NodeScore::Dot => {
                let away = own(&self.means.less(signal.value(), place, node.block)?)?;
                over(&engine(relevant.broadcast_mul(&away))?)?
            }
        };
        let sums = engine(engine(each.sum(1))?.to_dtype(DType::F64))?;
        engine(sums.to_vec1::<f64>())
    }
}

/// Whether something of the source lies before the endpoint.
pub(super) fn reaches(source: &[Node], endpoint: &Endpoint) -> bool {
    match endpoint {
        Endpoint::Scores => true,
        Endpoint::Head(target, _) => source.iter().any(|node| node.block < target.block),
    }
}

/// Divides the score of each source by the sum of magnitudes in its block, so that deep blocks do
/// not stand out for being near.
pub fn normalise_by_layer(sources: &[Node], scores: &mut [f64]) {
    let mut totals: BTreeMap<usize, f64> = BTreeMap::new();
    for (node, score) in sources.iter().zip(scores.iter()) {
        *totals.entry(node.block).or_default() += score.abs();
    }
    for (node, score) in sources.iter().zip(scores) {
        let total = totals.get(&node.block).copied().unwrap_or(0.0);
        if total > 0.0 {
            *score /= total;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_layer_counts_the_same() {
        let node = |block, head| Node {
            block,
            head,
            position: None,
        };
        let nodes = [node(0, 0), node(0, 1), node(1, 0), node(1, 1), node(2, 0)];
        let mut scores = [1.0, -3.0, 10.0, 10.0, 0.0];
        normalise_by_layer(&nodes, &mut scores);
        assert_eq!(scores, [0.25, -0.75, 0.5, 0.5, 0.0]);
    }
}
