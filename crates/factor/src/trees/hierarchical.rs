//! Trees that stand over a graph, and how far their distances are from the graph's.

use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{Graph, Tree};
use crate::{Error, Result};

/// Levels of clusters: more than numbers that are not denormal can be apart.
const MAX_LEVELS: usize = 2200;

/// How distances of a tree compare with those of its graph, over pairs of vertices that are apart.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Distortion {
    /// The mean of `tree / graph`.
    pub mean: f64,
    /// The largest.
    pub largest: f64,
    /// The least; 1 at least where the tree dominates the graph.
    pub least: f64,
}

impl Distortion {
    /// Of the pairs of each vertex of `from` with every vertex of the graph, whose vertices are the first of
    /// the tree.
    ///
    /// # Errors
    /// When the graph is not connected, has more vertices than the tree, or no pair is apart.
    pub fn of(tree: &Tree, graph: &Graph, from: &[usize]) -> Result<Self> {
        let (mut sum, mut count) = (0.0, 0usize);
        let (mut largest, mut least) = (f64::NEG_INFINITY, f64::INFINITY);
        for &vertex in from {
            let both = tree
                .distances(vertex)
                .into_iter()
                .zip(graph.distances(vertex));
            for (on_tree, on_graph) in both.filter(|(_, on_graph)| *on_graph > 0.0) {
                let ratio = on_tree / on_graph;
                sum += ratio;
                count += 1;
                largest = largest.max(ratio);
                least = least.min(ratio);
            }
        }
        let found = Self {
            mean: sum / count as f64,
            largest,
            least,
        };
        match count > 0 && least > 0.0 && tree.vertices() >= graph.vertices() {
            true => Ok(found),
            false => {
                let detail =
                    "has no pairs that are apart and joined, here and in the tree".to_owned();
                Err(Error::Graph { detail })
            }
        }
    }
}

/// A random tree of clusters over a graph, its vertices the first of the tree: see
/// [`Graph::hierarchy`].
#[derive(Clone, Debug, PartialEq)]
pub struct Hierarchy {
    /// Vertices and clusters.
    nodes: usize,
    /// A node, one that hangs from it, and the levels of both.
    edges: Vec<(usize, usize, [usize; 2])>,
    /// How high each level stands above the vertices, which are the first.
    heights: Vec<f64>,
}

impl Hierarchy {
    /// The tree, with distances that are never shorter than the graph's.
    ///
    /// # Errors
    /// As [`Tree::new`].
    pub fn tree(&self) -> Result<Tree> {
        let height = |level: usize| self.heights.get(level).copied().unwrap_or(0.0);
        self.weighted(|[from, to]| height(from) - height(to))
    }

    /// The same tree, an edge as long as it spans levels: vertices that meet on level `l` are `2 l` apart, a
    /// whole number, where they are `lengths()[2 l]` apart in [`Hierarchy::tree`].
    ///
    /// # Errors
    /// As [`Tree::new`].
    pub fn by_level(&self) -> Result<Tree> {
        self.weighted(|[from, to]| from.saturating_sub(to) as f64)
    }

    /// How far vertices are apart in the tree, by how far they are in that by level. Vertices are an even
    /// number of levels apart: what stands at odd places is between its neighbours.
    pub fn lengths(&self) -> Vec<f64> {
        let next = self.heights.iter().skip(1).map(Some).chain([None]);
        let pairs = self.heights.iter().zip(next);
        pairs
            .flat_map(|(height, next)| {
                let between = next.map(|next| height + next);
                std::iter::once(2.0 * height).chain(between)
            })
            .collect()
    }

    fn weighted(&self, weight: impl Fn([usize; 2]) -> f64) -> Result<Tree> {
        let edges = self.edges.iter();
        let edges = edges.map(|(a, b, levels)| (*a, *b, weight(*levels)));
        Tree::new(self.nodes, edges.collect())
    }
}

impl Graph {
    /// The tree of [`Graph::hierarchy`].
    ///
    /// # Errors
    /// As there.
    pub fn hierarchical_tree(&self, seed: u64) -> Result<Tree> {
        self.hierarchy(seed)?.tree()
    }

    /// A random tree over the graph whose distances are never shorter, and on average over seeds at most
    /// `O(ln n)` times as long (Fakcharoenphol, Rao, Talwar, A tight bound on approximating arbitrary metrics
    /// by tree metrics, 2003).
    ///
    /// Vertices of the graph are the first of the tree and hang from clusters of ever larger radii
    /// `r_i = β 2^i r₀`, `β` between 1 and 2 with density `1 / (β ln 2)`. On each level a vertex belongs to the
    /// first centre, in a random order of all, that it is no farther from than the radius; clusters are
    /// those that agree on all levels above. A cluster of level `i` stands `r_i` above its vertices, so that two
    /// that part below it are `2 r_i` apart in the tree, and no farther in the graph. There are fewer
    /// than `2 n` vertices.
    ///
    /// Takes a search of shortest paths from each centre that is somebody's, all at most, and a number for
    /// each vertex and level.
    ///
    /// # Errors
    /// When the graph is not connected, or its weights are too far apart.
    pub fn hierarchy(&self, seed: u64) -> Result<Hierarchy> {
        let count = self.vertices();
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let mut order: Vec<usize> = (0..count).collect();
        order.shuffle(&mut random);
        let beta = 2f64.powf(random.random::<f64>());
        let positive = self.edges().iter().map(|edge| edge.2).filter(|w| *w > 0.0);
        let shortest = positive.fold(f64::INFINITY, f64::min);
        let across = order
            .first()
            .map_or(Vec::new(), |first| self.distances(*first));
        let farthest = across.iter().copied().fold(0.0, f64::max);
        if count == 0 || farthest.is_infinite() {
            let detail = "is not connected, so that no tree stands over it".to_owned();
            return Err(Error::Graph { detail });
        }
        // On level 0 nothing but what is at no distance is together.
        let least = beta * if shortest.is_finite() { shortest } else { 1.0 } / 4.0;
        let mut radii = vec![least];
        // Nothing is farther apart than twice the farthest from any one.
        while radii.last().is_some_and(|radius| *radius < 2.0 * farthest) {
            if radii.len() >= MAX_LEVELS {
                let detail = format!("has distances from {shortest} to {farthest}, too far apart");
                return Err(Error::Graph { detail });
            }
            radii.push(radii.last().map_or(least, |radius| 2.0 * radius));
        }
        let centres = self.centres(&order, &radii);
        let mut edges = Vec::new();
        let mut next = count;
        let all: Vec<usize> = (0..count).collect();
        // Clusters that are still to be parted, with what they hang from and the level of that.
        let mut open = vec![(all, radii.len() - 1, None::<(usize, usize)>)];
        while let Some((members, mut level, above)) = open.pop() {
            let mut parts = vec![members];
            while let [members] = parts.as_slice()
                && members.len() > 1
                && level > 0
            {
                level -= 1;
                parts = parted(members, &centres[level]);
            }
            let (node, at) = match parts.as_slice() {
                // Either alone, or with others that are at no distance.
                [members] => {
                    let [first, others @ ..] = members.as_slice() else {
                        continue;
                    };
                    edges.extend(others.iter().map(|other| (*first, *other, [0, 0])));
                    (*first, 0)
                }
                _ => {
                    let at = level + 1;
                    let node = next;
                    next += 1;
                    open.extend(
                        parts
                            .into_iter()
                            .map(|part| (part, level, Some((node, at)))),
                    );
                    (node, at)
                }
            };
            if let Some((parent, from)) = above {
                edges.push((parent, node, [from, at]));
            }
        }
        // Vertices stand on the ground, whatever the radius within which none but they are.
        let mut heights = radii;
        if let Some(ground) = heights.first_mut() {
            *ground = 0.0;
        }
        Ok(Hierarchy {
            nodes: next,
            edges,
            heights,
        })
    }

    /// On each level, the place in the order of the centre that each vertex belongs to.
    fn centres(&self, order: &[usize], radii: &[f64]) -> Vec<Vec<usize>> {
        let count = self.vertices();
        let mut centres = vec![vec![0; count]; radii.len()];
        // Levels from there on are decided.
        let mut decided = vec![radii.len(); count];
        for (place, centre) in order.iter().enumerate() {
            if decided.iter().all(|level| *level == 0) {
                break;
            }
            for (vertex, distance) in self.distances(*centre).into_iter().enumerate() {
                while decided[vertex] > 0 && radii[decided[vertex] - 1] >= distance {
                    decided[vertex] -= 1;
                    centres[decided[vertex]][vertex] = place;
                }
            }
        }
        centres
    }
}

/// Vertices by their centre, in the order of centres.
fn parted(members: &[usize], centres: &[usize]) -> Vec<Vec<usize>> {
    let mut sorted: Vec<(usize, usize)> = members.iter().map(|v| (centres[*v], *v)).collect();
    sorted.sort_unstable();
    sorted
        .chunk_by(|a, b| a.0 == b.0)
        .map(|part| part.iter().map(|pair| pair.1).collect())
        .collect()
}
