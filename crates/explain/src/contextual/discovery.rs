//! The search for a circuit, from the scores backwards.

use super::node::{Node, Place};
use super::scorer::{Endpoint, Scorer, normalise_by_layer};
use crate::{Error, Result};
use serde::Serialize;

/// Which scores stand out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Outliers {
    /// So many of the largest magnitude.
    Top(usize),
    /// Those whose magnitude is so many standard deviations above the mean.
    Deviations(f64),
}

/// How a circuit is searched for.
#[derive(Clone, Debug, PartialEq)]
pub struct Search {
    /// Where the heads that were found are read, in search of those before them.
    pub places: Vec<Place>,
    /// Which scores stand out, in each round.
    pub outliers: Outliers,
    /// Whether scores are divided by their layer's total first.
    pub normalise: bool,
    /// Most rounds, the one from the scores included.
    pub rounds: usize,
}

impl Default for Search {
    /// The published setting: two heads in each round, read at their outputs.
    fn default() -> Self {
        Self {
            places: vec![Place::Mixed],
            outliers: Outliers::Top(2),
            normalise: true,
            rounds: 16,
        }
    }
}

/// One round of the search.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Round {
    /// The heads that were read; none for the scores.
    pub targets: Vec<Node>,
    /// Every earlier head with its score, which for several targets is the mean magnitude.
    pub scores: Vec<(Node, f64)>,
    /// Those that stand out.
    pub found: Vec<Node>,
}

/// What one node of a circuit contributes to another or to the scores.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Edge {
    /// The earlier node.
    pub from: Node,
    /// The later one; the scores when absent.
    pub to: Option<Node>,
    /// Its score, normalised if the search says so.
    pub score: f64,
}

/// What a search found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Circuit {
    /// The nodes, those nearest to the scores first.
    pub nodes: Vec<Node>,
    /// Contributions between them.
    pub edges: Vec<Edge>,
    /// How they were found.
    pub rounds: Vec<Round>,
}

/// Searches among `candidates` for the circuit behind the scorer's targets: the outliers of the
/// contributions to the scores, then round by round the outliers of the contributions to what
/// the last round found, until nothing is new or all of it is in the first block.
///
/// # Errors
/// When there are no candidates or no places, or a number of the search makes no sense.
pub fn discover(scorer: &Scorer<'_>, search: &Search, candidates: &[Node]) -> Result<Circuit> {
    search.check()?;
    if candidates.is_empty() {
        return Err(Error::invalid("candidates of a circuit", "none", "some"));
    }
    let mut circuit = Circuit {
        nodes: Vec::new(),
        edges: Vec::new(),
        rounds: Vec::new(),
    };
    let mut targets: Vec<Node> = Vec::new();
    for _ in 0..search.rounds {
        let last = targets.iter().map(|node| node.block).max();
        let sources: Vec<Node> = candidates
            .iter()
            .copied()
            .filter(|node| last.is_none_or(|block| node.block < block))
            .collect();
        if sources.is_empty() {
            break;
        }
        // [target][source]; the scores of the model are one target.
        let by_target = contributions(scorer, search, &sources, &targets)?;
        let mean = |index: usize| {
            let of = |scores: &Vec<f64>| scores.get(index).copied().unwrap_or(0.0);
            match by_target.as_slice() {
                [only] => of(only),
                all => all.iter().map(|one| of(one).abs()).sum::<f64>() / all.len() as f64,
            }
        };
        let scores: Vec<f64> = (0..sources.len()).map(mean).collect();
        let outliers = search.outliers.of(&scores);
        let found: Vec<Node> = outliers.iter().map(|index| sources[*index]).collect();
        let ends = match targets.is_empty() {
            true => vec![None],
            false => targets.iter().copied().map(Some).collect(),
        };
        for (to, scores) in ends.into_iter().zip(&by_target) {
            for index in &outliers {
                let (from, score) = (sources[*index], scores[*index]);
                if score != 0.0 {
                    circuit.edges.push(Edge { from, to, score });
                }
            }
        }
        circuit.rounds.push(Round {
            targets,
            scores: sources.into_iter().zip(scores).collect(),
            found: found.clone(),
        });
        targets = found
            .into_iter()
            .filter(|node| !circuit.nodes.contains(node))
            .collect();
        circuit.nodes.extend(&targets);
        if targets.iter().all(|node| node.block == 0) {
            break;
        }
    }
    Ok(circuit)
}

/// The contributions of `sources` to each of `targets`, over the search's places, or to the
/// scores when there are none: `[target][source]`.
fn contributions(
    scorer: &Scorer<'_>,
    search: &Search,
    sources: &[Node],
    targets: &[Node],
) -> Result<Vec<Vec<f64>>> {
    let places = search.places.iter();
    let at = |node: Node| {
        places
            .clone()
            .map(move |place| Endpoint::Head(node, *place))
    };
    let endpoints: Vec<Endpoint> = match targets {
        [] => vec![Endpoint::Scores],
        targets => targets.iter().copied().flat_map(at).collect(),
    };
    let scores = scorer.scores(sources, &endpoints)?;
    let mut by_endpoint: Vec<Vec<f64>> = (0..endpoints.len())
        .map(|end| {
            scores
                .iter()
                .filter_map(|row| row.get(end))
                .copied()
                .collect()
        })
        .collect();
    if search.normalise {
        for scores in &mut by_endpoint {
            normalise_by_layer(sources, scores);
        }
    }
    if targets.is_empty() {
        return Ok(by_endpoint);
    }
    // A head's places count the same.
    let places = search.places.len();
    let over_places = |all: &[Vec<f64>]| match all {
        [only] => only.clone(),
        all => (0..sources.len())
            .map(|index| all.iter().map(|one| one[index].abs()).sum::<f64>() / places as f64)
            .collect(),
    };
    Ok(by_endpoint.chunks(places).map(over_places).collect())
}

impl Search {
    fn check(&self) -> Result<()> {
        if self.places.is_empty() {
            return Err(Error::invalid("places of targets", "none", "at least one"));
        }
        match self.outliers {
            Outliers::Top(0) => Err(Error::invalid("outliers of a round", 0, "at least 1")),
            Outliers::Deviations(k) if !(k.is_finite() && k >= 0.0) => Err(Error::invalid(
                "deviations of an outlier",
                k,
                "a number of at least 0",
            )),
            _ => Ok(()),
        }
    }
}

impl Outliers {
    /// The indices of the scores that stand out, the largest first; never those of zero.
    fn of(self, scores: &[f64]) -> Vec<usize> {
        let mut order: Vec<usize> = (0..scores.len())
            .filter(|index| scores[*index] != 0.0)
            .collect();
        order.sort_by(|a, b| scores[*b].abs().total_cmp(&scores[*a].abs()));
        match self {
            Self::Top(count) => order.truncate(count),
            Self::Deviations(k) => {
                let count = scores.len().max(1) as f64;
                let mean = scores.iter().map(|score| score.abs()).sum::<f64>() / count;
                let squares = scores.iter().map(|score| (score.abs() - mean).powi(2));
                let deviation = (squares.sum::<f64>() / count).sqrt();
                order.retain(|index| scores[*index].abs() > mean + k * deviation);
            }
        }
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outliers_are_the_largest_by_magnitude() {
        let scores = [0.1, -5.0, 0.0, 0.2, 3.0];
        assert_eq!(Outliers::Top(2).of(&scores), [1, 4]);
        assert_eq!(Outliers::Top(9).of(&scores), [1, 4, 3, 0]);
        // Mean 1.66, deviation 2.02.
        assert_eq!(Outliers::Deviations(1.0).of(&scores), [1]);
        assert_eq!(Outliers::Deviations(0.0).of(&scores), [1, 4]);
        assert!(Outliers::Top(3).of(&[0.0, 0.0]).is_empty());
    }
}
