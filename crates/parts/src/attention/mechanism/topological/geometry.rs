//! Which distances a mask is a function of: along a path or the tree of a grid, or along trees over a graph.
//!
//! Kernels take distances that are places in a table of lengths. In a tree whose edges are whole numbers of
//! one step the place is the number of steps. In a random tree of clusters it is the number of levels, of which there are
//! few, whatever the weights.

use crate::error::bounded;
use crate::{Error, Result};
use lapidary_factor::trees::{Graph, IntegratorTree, Leaf, Side, Tree};
use lapidary_kernels::{TreePairs, TreePiece, TreeSide};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Most vertices of a graph.
const MAX_VERTICES: usize = 1 << 20;
/// Most edges of a graph.
const MAX_EDGES: usize = 1 << 22;
/// Most vertices of which all pairs are laid out when nothing else is known of them.
const MAX_PAIRS: usize = 1 << 12;
/// Vertices of a tree that meet pair by pair: fewer are worth no cut.
const LEAF: usize = 128;
/// Most places of a table of lengths.
const MAX_PLACES: f64 = (1u64 << 22) as f64;
/// Longest that all edges of a graph may be together: squares of distances are numbers then.
const MAX_SUM: f64 = 1e150;
/// Most random trees.
const MAX_TREES: usize = 64;

/// A graph whose vertices are the tokens of a sequence, in order.
///
/// ```
/// use lapidary_parts::attention::mechanism::topological::GraphSpec;
///
/// let triangle = GraphSpec::new(3, vec![(0, 1, 1.0), (1, 2, 1.0), (2, 0, 1.0)]);
/// assert!(triangle.graph("graph").is_ok());
/// assert!(GraphSpec::new(3, vec![(0, 1, 1.0)]).graph("graph").is_err());
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GraphSpec {
    /// How many there are: the most tokens of a sequence.
    pub vertices: usize,
    /// Two vertices and the length of what joins them.
    pub edges: Vec<(usize, usize, f64)>,
    /// A length that edges of a spanning tree are rounded to a whole number of; what all lengths have in common
    /// when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub step: Option<f64>,
}

/// Between which vertices of the graph distances are taken, and along what.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Metric {
    /// Along a spanning tree of least weight.
    #[default]
    #[serde(deserialize_with = "crate::fields::none")]
    SpanningTree,
    /// The mean over masks by several random trees of clusters, whose distances are never shorter than the
    /// graph's and on average not much longer (Fakcharoenphol, Rao, Talwar 2003).
    RandomTrees {
        /// How many trees.
        count: usize,
        /// Seed of the first; that of each other is one more.
        #[serde(default)]
        seed: u64,
    },
    /// Along shortest paths, all pairs laid out: what trees stand for.
    #[serde(deserialize_with = "crate::fields::none")]
    ShortestPaths,
}

impl GraphSpec {
    /// A graph whose edges are as long as they are.
    pub fn new(vertices: usize, edges: Vec<(usize, usize, f64)>) -> Self {
        Self {
            vertices,
            edges,
            step: None,
        }
    }

    /// The graph; `field` is the path of the spec.
    ///
    /// # Errors
    /// When there are too many vertices or edges, one that is none, lengths beyond all measure, or parts that
    /// nothing joins.
    pub fn graph(&self, field: &str) -> Result<Graph> {
        bounded(format!("{field}.vertices"), self.vertices, 1..=MAX_VERTICES)?;
        bounded(
            format!("number of {field}.edges"),
            self.edges.len(),
            0..=MAX_EDGES,
        )?;
        if let Some(step) = self.step.filter(|step| !(step.is_finite() && *step > 0.0)) {
            let expected = "a positive number";
            return Err(Error::spec(format!("{field}.step"), step, expected));
        }
        let expected = "edges (a, b, length) that join all vertices, lengths of at least 0";
        let wrong = |error: lapidary_factor::Error| {
            Error::spec(format!("{field}.edges"), error.to_string(), expected)
        };
        let graph = Graph::new(self.vertices, self.edges.clone()).map_err(wrong)?;
        // No way along edges is longer.
        let sum: f64 = self.edges.iter().map(|(_, _, length)| length).sum();
        if sum > MAX_SUM {
            let expected = format!("at most {MAX_SUM:e}");
            return Err(Error::spec(
                format!("sum of lengths in {field}.edges"),
                sum,
                expected,
            ));
        }
        match graph.distances(0).iter().all(|length| length.is_finite()) {
            true => Ok(graph),
            false => {
                let found = "in parts that nothing joins";
                Err(Error::spec(format!("{field}.edges"), found, expected))
            }
        }
    }
}

impl Metric {
    #[allow(
        clippy::trivially_copy_pass_by_ref,
        reason = "serde asks for a reference"
    )]
    pub(super) fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// Refuses a number of trees, or a graph, that it cannot be had of; `field` is the path of the mechanism.
    pub(super) fn validate(self, graph: Option<&GraphSpec>, field: &str) -> Result<()> {
        if let Self::RandomTrees { count, .. } = self {
            bounded(format!("{field}.metric.count"), count, 1..=MAX_TREES)?;
        }
        let Some(spec) = graph else { return Ok(()) };
        let at = format!("{field}.graph");
        let graph = spec.graph(&at)?;
        if let Some(step) = spec.step.filter(|_| self != Self::SpanningTree) {
            let expected = "absent, or a spanning tree, whose edges alone are rounded";
            return Err(Error::spec(format!("{at}.step"), step, expected));
        }
        match self {
            Self::SpanningTree => whole(&spanning(&graph, &at)?, spec.step, &at).map(|_| ()),
            Self::RandomTrees { .. } => Ok(()),
            Self::ShortestPaths => countable(spec.vertices, &at),
        }
    }
}

/// One way in which tokens are apart.
#[derive(Clone, Debug)]
pub(super) struct Geometry {
    /// The length at each place.
    pub lengths: Vec<f64>,
    /// The place of each pair.
    pub pairs: Arc<TreePairs>,
}

impl Geometry {
    /// Tokens in a row, or patches in rows of `columns`, along the tree that spans the grid.
    fn plain(tokens: usize, columns: Option<usize>) -> Result<Self> {
        let tree = match columns {
            None => Tree::path(tokens),
            Some(columns) => Tree::of_grid(tokens, columns),
        };
        let pairs = cut(&tree, tokens, "tree")?;
        Ok(Self {
            lengths: (0..pairs.distances()).map(|s| s as f64).collect(),
            pairs: Arc::new(pairs),
        })
    }

    /// Distances along a tree in which those of the first `vertices` are places among `lengths`.
    fn on(tree: &Tree, vertices: usize, mut lengths: Vec<f64>, field: &str) -> Result<Self> {
        let pairs = cut(tree, vertices, field)?;
        let last = lengths.last().copied().unwrap_or(0.0);
        lengths.resize(pairs.distances().max(lengths.len()), last);
        Ok(Self {
            lengths,
            pairs: Arc::new(pairs),
        })
    }

    /// Distances along shortest paths.
    fn shortest(graph: &Graph, field: &str) -> Result<Self> {
        let vertices = graph.vertices();
        let each: Vec<Vec<f64>> = (0..vertices).map(|v| graph.distances(v)).collect();
        // One direction for both, since sums along a path depend on where they begin.
        let length = |i: usize, j: usize| each[i.min(j)][i.max(j)];
        let pairs = || (0..vertices).flat_map(move |i| (0..vertices).map(move |j| (i, j)));
        let mut lengths: Vec<f64> = pairs().map(|(i, j)| length(i, j)).collect();
        lengths.sort_by(f64::total_cmp);
        lengths.dedup();
        let place = |(i, j)| lengths.partition_point(|other| *other < length(i, j)) as u32;
        let leaf = TreePiece::Leaf {
            tokens: (0..vertices as u32).collect(),
            distances: Some(pairs().map(place).collect()),
        };
        Ok(Self {
            pairs: Arc::new(joined(vertices, vec![leaf], Vec::new(), field)?),
            lengths,
        })
    }

    /// Between the first so many tokens alone.
    pub fn first(&self, tokens: usize) -> Self {
        Self {
            lengths: self.lengths.clone(),
            pairs: Arc::new(self.pairs.first(tokens)),
        }
    }
}

/// The pairs of the first `tokens` vertices of a tree whose edges are whole numbers.
fn cut(tree: &Tree, tokens: usize, field: &str) -> Result<TreePairs> {
    let cut = IntegratorTree::with_leaves(tree, LEAF)
        .map_err(|error| Error::spec(field, error.to_string(), "a tree that can be cut"))?;
    let leaves = cut
        .leaves()
        .iter()
        .filter_map(|leaf| self::leaf(leaf, tokens));
    let sides = cut.splits().iter().filter_map(|split| {
        let [left, right] = split.sides.each_ref().map(|side| self::side(side, tokens));
        Some(TreePiece::Cut([left?, right?]))
    });
    let pivots = cut.splits().iter().map(|split| split.pivot);
    let again = pivots.filter(|pivot| *pivot < tokens);
    let again = again.map(|pivot| pivot as u32).collect();
    joined(tokens, leaves.chain(sides).collect(), again, field)
}

fn joined(
    tokens: usize,
    pieces: Vec<TreePiece>,
    again: Vec<u32>,
    field: &str,
) -> Result<TreePairs> {
    TreePairs::new(tokens, pieces, again)
        .map_err(|error| Error::spec(field, error.to_string(), "one that is cut into pieces"))
}

/// A leaf without vertices that are no tokens.
fn leaf(leaf: &Leaf, tokens: usize) -> Option<TreePiece> {
    let count = leaf.vertices.len();
    let places = (0..count).filter(|place| leaf.vertices[*place] < tokens);
    let places: Vec<usize> = places.collect();
    let pairs = || {
        let each = places.iter().enumerate();
        each.flat_map(|(i, row)| {
            let columns = places.iter().enumerate();
            columns.map(move |(j, column)| {
                let distance = leaf.distances[row * count + column];
                (i.abs_diff(j) as u32, distance as u32)
            })
        })
    };
    // Such as the parts of a path, and of the columns of a grid.
    let is_run = pairs().all(|(apart, distance)| apart == distance);
    (!places.is_empty()).then(|| TreePiece::Leaf {
        tokens: places
            .iter()
            .map(|place| leaf.vertices[*place] as u32)
            .collect(),
        distances: (!is_run).then(|| pairs().map(|(_, distance)| distance).collect()),
    })
}

/// A side without vertices that are no tokens.
fn side(side: &Side, tokens: usize) -> Option<TreeSide> {
    let each = side.vertices.iter().zip(&side.levels);
    let each = each.filter(|(vertex, _)| **vertex < tokens);
    let each = each.map(|(vertex, level)| (*vertex as u32, side.distances[*level] as u32));
    let each: Vec<(u32, u32)> = each.collect();
    (!each.is_empty()).then(|| TreeSide::new(each))
}

/// The ways in which so many tokens are apart, over which masks are averaged.
///
/// # Errors
/// When there are more tokens than vertices, or the graph is one that no table can be made of.
pub(super) fn geometries(
    tokens: usize,
    columns: Option<usize>,
    graph: Option<&GraphSpec>,
    metric: Metric,
) -> Result<Vec<Geometry>> {
    let field = "graph";
    let (over, step) = match (graph, metric) {
        (None, Metric::SpanningTree) => return Ok(vec![Geometry::plain(tokens, columns)?]),
        (None, _) => (Graph::grid(tokens.max(1), columns.unwrap_or(tokens)), None),
        (Some(spec), _) => (spec.graph(field)?, spec.step),
    };
    let vertices = over.vertices();
    if tokens > vertices {
        let expected = format!("at most {vertices}, the vertices of the graph");
        return Err(Error::spec("number of tokens", tokens, expected));
    }
    let none = |error: lapidary_factor::Error| {
        Error::spec(field, error.to_string(), "one that random trees stand over")
    };
    match metric {
        Metric::SpanningTree => {
            let (tree, step, places) = whole(&spanning(&over, field)?, step, field)?;
            let lengths = (0..=places).map(|place| place as f64 * step).collect();
            Ok(vec![Geometry::on(&tree, vertices, lengths, field)?])
        }
        Metric::RandomTrees { count, seed } => (0..count as u64)
            .map(|tree| {
                let hierarchy = over.hierarchy(seed.wrapping_add(tree)).map_err(none)?;
                let tree = hierarchy.by_level().map_err(none)?;
                Geometry::on(&tree, vertices, hierarchy.lengths(), field)
            })
            .collect(),
        Metric::ShortestPaths => {
            countable(vertices, field)?;
            Ok(vec![Geometry::shortest(&over, field)?])
        }
    }
}

/// Refuses more vertices than all pairs are laid out of.
fn countable(vertices: usize, field: &str) -> Result<()> {
    bounded(
        format!("vertices of {field} for shortest-paths"),
        vertices,
        1..=MAX_PAIRS,
    )
}

fn spanning(graph: &Graph, field: &str) -> Result<Tree> {
    let expected = "edges that join all vertices";
    graph
        .spanning_tree()
        .map_err(|error| Error::spec(format!("{field}.edges"), error.to_string(), expected))
}

/// A tree whose edges are whole numbers of steps, the step, and how many of them lie between the vertices
/// farthest apart.
fn whole(tree: &Tree, step: Option<f64>, field: &str) -> Result<(Tree, f64, usize)> {
    let at = format!("{field}.step");
    let Some(step) = step.or_else(|| tree.step()) else {
        let expected =
            "a length that edges are rounded to a whole number of: these have none in common";
        return Err(Error::spec(at, "absent", expected));
    };
    let edges = tree.graph().edges().iter();
    let edges = edges.map(|(a, b, length)| (*a, *b, (length / step).round()));
    let rounded = Tree::new(tree.vertices(), edges.collect()).map_err(|error| {
        Error::spec(&at, error.to_string(), "one that lengths can be counted in")
    })?;
    // The farthest from any is one end of the longest way.
    let farthest = |from: usize| {
        let all = rounded.distances(from).into_iter().enumerate();
        all.fold((from, 0.0), |most, (vertex, distance)| {
            if distance > most.1 {
                (vertex, distance)
            } else {
                most
            }
        })
    };
    let (_, places) = farthest(farthest(0).0);
    if places > MAX_PLACES {
        let expected =
            format!("a longer one: the longest way has {places} of it, {MAX_PLACES} are the most");
        return Err(Error::spec(at, step, expected));
    }
    Ok((rounded, step, places as usize))
}
