//! Which distances a mask is a function of: along a path or the tree of a grid, or along trees over a graph.
//!
//! Products take distances that are places in a table of lengths. In a tree whose edges are whole numbers of
//! one step the place is the number of steps. In a random tree of clusters it is the number of levels, of which there are
//! few, whatever the weights.

use super::operation;
use crate::error::bounded;
use crate::{Error, Result};
use lapidary_factor::trees::{Graph, IntegratorTree, Tree};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Most vertices of a graph.
const MAX_VERTICES: usize = 1 << 20;
/// Most edges of a graph.
const MAX_EDGES: usize = 1 << 22;
/// Most vertices of which all pairs are laid out when nothing else is known of them.
const MAX_PAIRS: usize = 1 << 12;
/// Vertices up to which all pairs of a tree are laid out as well, for tiles.
const TILED_PAIRS: usize = 1 << 10;
/// Most places of a table of lengths.
const MAX_PLACES: f64 = (1u64 << 22) as f64;
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
    /// When there are too many vertices or edges, one that is none, or parts that nothing joins.
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
        match self {
            Self::SpanningTree => whole(&spanning(&graph, &at)?, spec.step, &at).map(|_| ()),
            Self::RandomTrees { .. } => Ok(()),
            Self::ShortestPaths => countable(spec.vertices, &at),
        }
    }
}

/// The places of all pairs of tokens.
#[derive(Clone, Debug)]
pub(super) enum Pairs {
    /// Tokens in a row.
    Path,
    /// Patches in rows of so many, on the tree of a grid.
    Grid(usize),
    /// `places[i · stride + j]`.
    Table {
        /// Vertices.
        stride: usize,
        /// `[vertices, vertices]`.
        places: Arc<Vec<u32>>,
    },
}

/// What is known of the places of pairs.
#[derive(Clone, Debug)]
pub(super) enum Places {
    /// Those of all pairs.
    Pairs(Pairs),
    /// A tree whose first vertices are the tokens, whose distances they are.
    Cut(Arc<IntegratorTree>),
    /// Both.
    Both(Pairs, Arc<IntegratorTree>),
}

/// One way in which tokens are apart.
#[derive(Clone, Debug)]
pub(super) struct Geometry {
    /// The length at each place.
    pub lengths: Vec<f64>,
    /// The place of each pair.
    pub places: Places,
}

impl Geometry {
    /// Tokens in a row, or patches in rows of `columns`, along the tree that spans the grid.
    fn plain(tokens: usize, columns: Option<usize>) -> Self {
        let (tree, pairs) = match columns {
            None => (Tree::path(tokens), Pairs::Path),
            Some(columns) => (Tree::of_grid(tokens, columns), Pairs::Grid(columns)),
        };
        let cut = IntegratorTree::new(&tree);
        Self {
            lengths: (0..operation::distances(&cut)).map(|s| s as f64).collect(),
            places: Places::Both(pairs, Arc::new(cut)),
        }
    }

    /// Distances along a tree in which those of the first `vertices` are places among `lengths`.
    fn on(tree: &Tree, vertices: usize, mut lengths: Vec<f64>) -> Self {
        let cut = IntegratorTree::new(tree);
        // Between nodes that are no tokens there may be longer ones, which nothing is multiplied by.
        let places = operation::distances(&cut).max(lengths.len());
        let last = lengths.last().copied().unwrap_or(0.0);
        lengths.resize(places, last);
        let cut = Arc::new(cut);
        let places = match vertices <= TILED_PAIRS {
            false => Places::Cut(cut),
            true => {
                let row = |vertex| tree.distances(vertex).into_iter().take(vertices);
                let places = (0..vertices).flat_map(row).map(|place| place as u32);
                let pairs = Pairs::Table {
                    stride: vertices,
                    places: Arc::new(places.collect()),
                };
                Places::Both(pairs, cut)
            }
        };
        Self { lengths, places }
    }

    /// Distances along shortest paths.
    fn shortest(graph: &Graph) -> Self {
        let vertices = graph.vertices();
        let each: Vec<Vec<f64>> = (0..vertices).map(|v| graph.distances(v)).collect();
        // One direction for both, since sums along a path depend on where they begin.
        let length = |i: usize, j: usize| each[i.min(j)][i.max(j)];
        let pairs = || (0..vertices).flat_map(move |i| (0..vertices).map(move |j| (i, j)));
        let mut lengths: Vec<f64> = pairs().map(|(i, j)| length(i, j)).collect();
        lengths.sort_by(f64::total_cmp);
        lengths.dedup();
        let place = |(i, j)| lengths.partition_point(|other| *other < length(i, j)) as u32;
        let places = Arc::new(pairs().map(place).collect());
        Self {
            lengths,
            places: Places::Pairs(Pairs::Table {
                stride: vertices,
                places,
            }),
        }
    }
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
        (None, Metric::SpanningTree) => return Ok(vec![Geometry::plain(tokens, columns)]),
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
            Ok(vec![Geometry::on(&tree, vertices, lengths)])
        }
        Metric::RandomTrees { count, seed } => (0..count as u64)
            .map(|tree| {
                let hierarchy = over.hierarchy(seed.wrapping_add(tree)).map_err(none)?;
                let tree = hierarchy.by_level().map_err(none)?;
                Ok(Geometry::on(&tree, vertices, hierarchy.lengths()))
            })
            .collect(),
        Metric::ShortestPaths => {
            countable(vertices, field)?;
            Ok(vec![Geometry::shortest(&over)])
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
