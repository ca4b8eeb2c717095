//! Weighted graphs and trees.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::{Error, Result};

/// An undirected graph with weights of at least 0.
#[derive(Clone, Debug, PartialEq)]
pub struct Graph {
    vertices: usize,
    edges: Vec<(usize, usize, f64)>,
    neighbours: Vec<Vec<(usize, f64)>>,
}

impl Graph {
    /// A graph of so many vertices with `edges` `(a, b, weight)`.
    ///
    /// # Errors
    /// For an edge to a vertex that there isn't or to itself, or a weight that is negative or no number.
    pub fn new(vertices: usize, edges: Vec<(usize, usize, f64)>) -> Result<Self> {
        let mut neighbours = vec![Vec::new(); vertices];
        for &(a, b, weight) in &edges {
            if a >= vertices || b >= vertices || a == b {
                let detail = format!("has an edge {a} – {b}, but {vertices} vertices");
                return Err(Error::Graph { detail });
            }
            if !(weight.is_finite() && weight >= 0.0) {
                let detail =
                    format!("has an edge {a} – {b} of weight {weight}, but needs at least 0");
                return Err(Error::Graph { detail });
            }
            neighbours[a].push((b, weight));
            neighbours[b].push((a, weight));
        }
        Ok(Self {
            vertices,
            edges,
            neighbours,
        })
    }

    /// Unit weights between neighbours of a grid whose vertices follow each other row by row; the last
    /// row may be short.
    pub fn grid(vertices: usize, columns: usize) -> Self {
        let columns = columns.max(1);
        let mut edges = Vec::new();
        for vertex in 0..vertices {
            if (vertex + 1) % columns != 0 && vertex + 1 < vertices {
                edges.push((vertex, vertex + 1, 1.0));
            }
            if vertex + columns < vertices {
                edges.push((vertex, vertex + columns, 1.0));
            }
        }
        let mut neighbours = vec![Vec::new(); vertices];
        for &(a, b, weight) in &edges {
            neighbours[a].push((b, weight));
            neighbours[b].push((a, weight));
        }
        Self {
            vertices,
            edges,
            neighbours,
        }
    }

    /// Number of vertices.
    pub fn vertices(&self) -> usize {
        self.vertices
    }

    /// Edges `(a, b, weight)`.
    pub fn edges(&self) -> &[(usize, usize, f64)] {
        &self.edges
    }

    /// Distances from a vertex along shortest paths (Dijkstra); infinite where there is no path.
    pub fn distances(&self, from: usize) -> Vec<f64> {
        let mut all = vec![f64::INFINITY; self.vertices];
        let mut next = BinaryHeap::new();
        if let Some(start) = all.get_mut(from) {
            *start = 0.0;
            next.push(Reverse((Ordered(0.0), from)));
        }
        while let Some(Reverse((Ordered(distance), vertex))) = next.pop() {
            if distance > all[vertex] {
                continue;
            }
            for &(other, weight) in &self.neighbours[vertex] {
                let along = distance + weight;
                if along < all[other] {
                    all[other] = along;
                    next.push(Reverse((Ordered(along), other)));
                }
            }
        }
        all
    }

    /// A spanning tree of least weight (Kruskal); of edges that weigh the same those between vertices of
    /// lower numbers first.
    ///
    /// # Errors
    /// When the graph is not connected.
    pub fn spanning_tree(&self) -> Result<Tree> {
        let mut edges: Vec<(usize, usize, f64)> = self
            .edges
            .iter()
            .map(|&(a, b, weight)| (a.min(b), a.max(b), weight))
            .collect();
        edges.sort_by(|a, b| a.2.total_cmp(&b.2).then((a.0, a.1).cmp(&(b.0, b.1))));
        let mut sets = DisjointSets((0..self.vertices).collect());
        edges.retain(|&(a, b, _)| sets.join(a, b));
        Tree::new(self.vertices, edges)
    }
}

/// A number by which a heap is ordered.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Ordered(f64);

impl Eq for Ordered {}

impl PartialOrd for Ordered {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Ordered {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.total_cmp(&other.0)
    }
}

/// Sets of vertices that are joined: each names another of its set, or itself.
struct DisjointSets(Vec<usize>);

impl DisjointSets {
    fn find(&mut self, mut vertex: usize) -> usize {
        while self.0[vertex] != vertex {
            self.0[vertex] = self.0[self.0[vertex]];
            vertex = self.0[vertex];
        }
        vertex
    }

    /// Joins the sets of two vertices; false where they were one.
    fn join(&mut self, a: usize, b: usize) -> bool {
        let (a, b) = (self.find(a), self.find(b));
        self.0[a.max(b)] = a.min(b);
        a != b
    }
}

/// A connected graph without cycles.
#[derive(Clone, Debug, PartialEq)]
pub struct Tree(Graph);

impl Tree {
    /// A tree with these edges.
    ///
    /// # Errors
    /// As [`Graph::new`], and when they don't make a tree of one vertex at least.
    pub fn new(vertices: usize, edges: Vec<(usize, usize, f64)>) -> Result<Self> {
        let graph = Graph::new(vertices, edges)?;
        let reached = graph.distances(0).iter().filter(|d| d.is_finite()).count();
        if vertices == 0 || graph.edges.len() + 1 != vertices || reached != vertices {
            let detail = format!(
                "has {vertices} vertices, {} edges and reaches {reached} vertices from the first, and so is \
                 no tree",
                graph.edges.len()
            );
            return Err(Error::Graph { detail });
        }
        Ok(Self(graph))
    }

    /// Vertices in a row, one apart.
    pub fn path(vertices: usize) -> Self {
        Self(Graph::grid(vertices.max(1), vertices.max(1)))
    }

    /// The spanning tree of [`Graph::grid`]: the first row, and every column from there.
    pub fn of_grid(vertices: usize, columns: usize) -> Self {
        let graph = Graph::grid(vertices.max(1), columns);
        let edges = graph.edges.iter().copied();
        let row = |&(a, b, _): &(usize, usize, f64)| b - a > 1 || columns < 2 || b < columns;
        let kept: Vec<(usize, usize, f64)> = edges.filter(row).collect();
        let mut neighbours = vec![Vec::new(); graph.vertices];
        for &(a, b, weight) in &kept {
            neighbours[a].push((b, weight));
            neighbours[b].push((a, weight));
        }
        Self(Graph {
            vertices: graph.vertices,
            edges: kept,
            neighbours,
        })
    }

    /// The tree as a graph.
    pub fn graph(&self) -> &Graph {
        &self.0
    }

    /// Number of vertices.
    pub fn vertices(&self) -> usize {
        self.0.vertices
    }

    pub(super) fn neighbours(&self, vertex: usize) -> &[(usize, f64)] {
        &self.0.neighbours[vertex]
    }

    /// Distances from a vertex; infinite where they are beyond the largest number.
    pub fn distances(&self, from: usize) -> Vec<f64> {
        let mut all = vec![f64::INFINITY; self.vertices()];
        // Each with the one that it was reached from: an infinite distance doesn't say whether it was.
        let mut next = Vec::new();
        if let Some(start) = all.get_mut(from) {
            *start = 0.0;
            next.push((from, from));
        }
        while let Some((vertex, before)) = next.pop() {
            for &(other, weight) in self.neighbours(vertex) {
                if other != before {
                    all[other] = all[vertex] + weight;
                    next.push((other, vertex));
                }
            }
        }
        all
    }

    /// A length that every distance is a whole number of times, where one is found: the greatest common
    /// divisor of whole weights, or the shortest edge. 1 where all weights are 0. None where distances could be more
    /// steps than whole numbers are told apart at: quotients so large are whole by rounding alone.
    pub fn step(&self) -> Option<f64> {
        let weights = || self.0.edges.iter().map(|edge| edge.2).filter(|w| *w > 0.0);
        let shortest = weights().fold(f64::INFINITY, f64::min);
        if shortest.is_infinite() {
            return Some(1.0);
        }
        // Beyond that not every whole number is one.
        const WHOLE: f64 = 4_503_599_627_370_496.0;
        // No distance is longer.
        let longest: f64 = weights().sum();
        if longest < WHOLE && weights().all(|weight| weight.fract() == 0.0) {
            let divisor = weights().fold(0u64, |divisor, weight| {
                let (mut a, mut b) = (divisor, weight as u64);
                while b > 0 {
                    (a, b) = (b, a % b);
                }
                a
            });
            return Some(divisor as f64);
        }
        let whole = longest / shortest < WHOLE
            && weights().all(|weight| (weight / shortest).fract() == 0.0);
        whole.then_some(shortest)
    }
}
