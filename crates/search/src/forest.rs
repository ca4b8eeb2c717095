//! Which variables go together: forests, drawn at random or counted out.

use std::collections::BTreeMap;

use rand::{Rng, RngExt};
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Edges between variables without a circle.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Stored", into = "Stored")]
pub struct Forest {
    dimensions: usize,
    edges: Vec<(usize, usize)>,
}

/// A forest in a file, which may hold anything.
#[derive(Serialize, Deserialize)]
struct Stored {
    dimensions: usize,
    edges: Vec<(usize, usize)>,
}

impl From<Forest> for Stored {
    fn from(forest: Forest) -> Self {
        Self {
            dimensions: forest.dimensions,
            edges: forest.edges,
        }
    }
}

impl TryFrom<Stored> for Forest {
    type Error = Error;

    fn try_from(stored: Stored) -> Result<Self> {
        Self::new(stored.dimensions, stored.edges)
    }
}

impl Forest {
    /// A forest over `dimensions` variables.
    ///
    /// # Errors
    /// When an edge leads elsewhere or closes a circle.
    pub fn new(dimensions: usize, edges: Vec<(usize, usize)>) -> Result<Self> {
        let mut components = Components::new(dimensions);
        for &(i, j) in &edges {
            if i >= dimensions || j >= dimensions {
                return Err(Error::invalid(
                    "edge",
                    format!("{i}–{j}"),
                    format!("between variables below {dimensions}"),
                ));
            }
            if !components.join(i, j) {
                return Err(Error::invalid(
                    "edge",
                    format!("{i}–{j}, which closes a circle"),
                    "one between two trees",
                ));
            }
        }
        Ok(Self { dimensions, edges })
    }

    /// Draws a forest of `edges` edges: pairs of variables, each as likely as any other, of which
    /// those are left out that would close a circle. Every pair is as likely as any other to be
    /// an edge; not every forest is as likely as any other.
    ///
    /// # Errors
    /// When there cannot be as many edges.
    pub fn random(dimensions: usize, edges: usize, generator: &mut impl Rng) -> Result<Self> {
        if edges >= dimensions.max(1) {
            return Err(Error::invalid(
                format!("number of edges between {dimensions} variables"),
                edges,
                format!("below {dimensions}, since a forest has no more"),
            ));
        }
        let mut components = Components::new(dimensions);
        let mut chosen = Vec::with_capacity(edges);
        while chosen.len() < edges {
            let i = generator.random_range(0..dimensions);
            let j = generator.random_range(0..dimensions);
            if i != j && components.join(i, j) {
                chosen.push((i.min(j), i.max(j)));
            }
        }
        Ok(Self {
            dimensions,
            edges: chosen,
        })
    }

    /// Number of variables.
    pub fn dimensions(&self) -> usize {
        self.dimensions
    }

    /// The edges.
    pub fn edges(&self) -> &[(usize, usize)] {
        &self.edges
    }

    /// Variables without an edge, rising.
    pub fn isolated(&self) -> Vec<usize> {
        let mut alone = vec![true; self.dimensions];
        for &(i, j) in &self.edges {
            alone[i] = false;
            alone[j] = false;
        }
        (0..self.dimensions).filter(|i| alone[*i]).collect()
    }

    /// The terms of the sum: the maximal cliques, which are the edges in their order and then the
    /// isolated variables.
    pub fn cliques(&self) -> Vec<Vec<usize>> {
        let edges = self.edges.iter().map(|&(i, j)| vec![i, j]);
        let alone = self.isolated().into_iter().map(|i| vec![i]);
        edges.chain(alone).collect()
    }

    /// Of each variable, its edges and the variables at their other ends.
    pub(crate) fn neighbours(&self) -> Vec<Vec<(usize, usize)>> {
        let mut neighbours = vec![Vec::new(); self.dimensions];
        for (edge, &(i, j)) in self.edges.iter().enumerate() {
            neighbours[i].push((edge, j));
            neighbours[j].push((edge, i));
        }
        neighbours
    }

    /// The edges on the way from one variable to another, if there is one.
    pub(crate) fn path(&self, from: usize, to: usize) -> Option<Vec<usize>> {
        let neighbours = self.neighbours();
        let mut came: Vec<Option<(usize, usize)>> = vec![None; self.dimensions];
        let mut open = vec![from];
        while let Some(here) = open.pop() {
            for &(edge, next) in &neighbours[here] {
                if next != from && came[next].is_none() {
                    came[next] = Some((edge, here));
                    open.push(next);
                }
            }
        }
        let mut edges = Vec::new();
        let mut here = to;
        while here != from {
            let (edge, before) = came[here]?;
            edges.push(edge);
            here = before;
        }
        Some(edges)
    }
}

/// Which variables are joined: union–find with halved paths.
struct Components {
    parent: Vec<usize>,
}

impl Components {
    fn new(size: usize) -> Self {
        Self {
            parent: (0..size).collect(),
        }
    }

    fn root(&mut self, mut of: usize) -> usize {
        while self.parent[of] != of {
            self.parent[of] = self.parent[self.parent[of]];
            of = self.parent[of];
        }
        of
    }

    /// Joins two variables; whether they were apart.
    fn join(&mut self, i: usize, j: usize) -> bool {
        let (i, j) = (self.root(i), self.root(j));
        self.parent[i] = j;
        i != j
    }
}

/// Most variables whose trees are counted out: 9⁷ are 4.8 million, 10⁸ would take 20 GB.
const MOST_ENUMERATED: usize = 9;

/// Every tree over `dimensions` variables, of which there are `dⁿ⁻²` for `n = d` (Cayley), by
/// their Prüfer sequences.
///
/// ```
/// assert_eq!(lapidary_search::spanning_trees(4)?.len(), 16);
/// # Ok::<(), lapidary_search::Error>(())
/// ```
///
/// # Errors
/// When there are more than nine variables: their trees would fill the memory.
pub fn spanning_trees(dimensions: usize) -> Result<Vec<Forest>> {
    if dimensions > MOST_ENUMERATED {
        return Err(Error::invalid(
            "number of variables whose trees are counted out",
            dimensions,
            format!("at most {MOST_ENUMERATED}"),
        ));
    }
    match dimensions {
        0 => return Ok(Vec::new()),
        1 => {
            return Ok(vec![Forest {
                dimensions,
                edges: Vec::new(),
            }]);
        }
        _ => {}
    }
    let count = dimensions.pow(dimensions as u32 - 2);
    let tree = |mut number: usize| {
        let sequence: Vec<usize> = (2..dimensions)
            .map(|_| {
                let digit = number % dimensions;
                number /= dimensions;
                digit
            })
            .collect();
        of_sequence(dimensions, &sequence)
    };
    Ok((0..count).map(tree).collect())
}

/// The tree of a Prüfer sequence: the least leaf is joined to the sequence's next variable.
fn of_sequence(dimensions: usize, sequence: &[usize]) -> Forest {
    let mut degree = vec![1; dimensions];
    for variable in sequence {
        degree[*variable] += 1;
    }
    let mut edges = Vec::with_capacity(dimensions - 1);
    for &variable in sequence {
        let leaf = degree.iter().position(|d| *d == 1).unwrap_or(variable);
        edges.push((leaf.min(variable), leaf.max(variable)));
        degree[leaf] -= 1;
        degree[variable] -= 1;
    }
    let ends: Vec<usize> = (0..dimensions).filter(|i| degree[*i] == 1).collect();
    if let [i, j] = ends[..] {
        edges.push((i, j));
    }
    Forest { dimensions, edges }
}

/// How likely each pair of variables is an edge when forests are drawn with these weights.
///
/// The least of them is what an adversary leaves to whoever draws, by choosing the pair that
/// matters. A tree has `d − 1` of `d (d − 1) / 2` pairs, so that no weights leave more than
/// `2 / d`, and equal ones leave exactly that.
pub fn edge_probabilities(forests: &[Forest], weights: &[f64]) -> BTreeMap<(usize, usize), f64> {
    let total: f64 = weights.iter().sum();
    let dimensions = forests.iter().map(Forest::dimensions).max().unwrap_or(0);
    let pairs = (0..dimensions).flat_map(|i| (i + 1..dimensions).map(move |j| (i, j)));
    let mut probabilities: BTreeMap<_, f64> = pairs.map(|pair| (pair, 0.0)).collect();
    for (forest, weight) in forests.iter().zip(weights) {
        for &(i, j) in forest.edges() {
            if let Some(probability) = probabilities.get_mut(&(i.min(j), i.max(j))) {
                *probability += weight / total;
            }
        }
    }
    probabilities
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    proptest! {
        #[test]
        fn drawn_forests_have_their_edges_no_circle_and_every_variable(
            dimensions in 1usize..40, share in 0.0f64..1.0, seed: u64
        ) {
            let edges = (share * dimensions as f64) as usize;
            let mut generator = ChaCha8Rng::seed_from_u64(seed);
            let forest = Forest::random(dimensions, edges, &mut generator).unwrap();
            prop_assert_eq!(forest.edges().len(), edges);
            // Its edges are a forest by the checking constructor too.
            let again = Forest::new(dimensions, forest.edges().to_vec()).unwrap();
            prop_assert_eq!(&again, &forest);
            let mut seen = vec![false; dimensions];
            for clique in forest.cliques() {
                prop_assert!(clique.len() <= 2);
                for variable in clique {
                    seen[variable] = true;
                }
            }
            prop_assert!(seen.into_iter().all(|s| s));
        }
    }

    #[test]
    fn every_pair_is_as_likely() {
        let (dimensions, edges, draws) = (6, 3, 20_000);
        let mut generator = ChaCha8Rng::seed_from_u64(3);
        let mut counts: BTreeMap<(usize, usize), f64> = BTreeMap::new();
        for _ in 0..draws {
            let forest = Forest::random(dimensions, edges, &mut generator).unwrap();
            for edge in forest.edges() {
                *counts.entry(*edge).or_default() += 1.0;
            }
        }
        assert_eq!(counts.len(), 15);
        let expected = (draws * edges) as f64 / 15.0;
        let statistic: f64 = counts
            .values()
            .map(|count| (count - expected).powi(2) / expected)
            .sum();
        // The 99.9 % point of χ² with 14 degrees of freedom; edges of one draw exclude each other,
        // which makes the statistic smaller.
        assert!(statistic < 36.12, "{statistic}");
    }

    #[test]
    fn uniform_trees_maximise_the_least_edge_probability() {
        let mut generator = ChaCha8Rng::seed_from_u64(5);
        for dimensions in 4..=6 {
            let trees = spanning_trees(dimensions).unwrap();
            assert_eq!(trees.len(), dimensions.pow(dimensions as u32 - 2));
            let mut different: Vec<Vec<(usize, usize)>> = trees
                .iter()
                .map(|tree| {
                    let mut edges = tree.edges().to_vec();
                    edges.sort_unstable();
                    Forest::new(dimensions, edges.clone()).unwrap();
                    assert_eq!(edges.len(), dimensions - 1);
                    edges
                })
                .collect();
            different.sort();
            different.dedup();
            assert_eq!(different.len(), trees.len());

            let bound = 2.0 / dimensions as f64;
            let uniform = edge_probabilities(&trees, &vec![1.0; trees.len()]);
            assert_eq!(uniform.len(), dimensions * (dimensions - 1) / 2);
            assert!(uniform.values().all(|p| (p - bound).abs() < 1e-12));
            for _ in 0..50 {
                let weights: Vec<f64> = trees.iter().map(|_| generator.random::<f64>()).collect();
                let other = edge_probabilities(&trees, &weights);
                let least = other.values().copied().fold(f64::INFINITY, f64::min);
                assert!(least < bound, "{least}");
            }
        }
    }

    #[test]
    fn what_is_no_forest_is_refused() {
        assert!(Forest::new(3, vec![(0, 1), (1, 2), (0, 2)]).is_err());
        assert!(Forest::new(3, vec![(1, 1)]).is_err());
        assert!(Forest::new(3, vec![(0, 3)]).is_err());
        let mut generator = ChaCha8Rng::seed_from_u64(5);
        assert!(Forest::random(3, 3, &mut generator).is_err());
        let error = spanning_trees(10).unwrap_err().to_string();
        assert!(error.ends_with("is 10, but must be at most 9"), "{error}");
        assert!(
            serde_json::from_str::<Forest>(r#"{"dimensions":2,"edges":[[0,1],[1,0]]}"#).is_err()
        );
    }

    #[test]
    fn a_path_leads_along_the_tree() {
        let forest = Forest::new(6, vec![(0, 1), (1, 2), (2, 3), (1, 4)]).unwrap();
        assert_eq!(forest.path(0, 3), Some(vec![2, 1, 0]));
        assert_eq!(forest.path(4, 0), Some(vec![0, 3]));
        assert_eq!(forest.path(0, 5), None);
        assert_eq!(forest.path(2, 2), Some(vec![]));
    }
}
