//! Nodes in rows, and what goes from one to another.

use serde::Serialize;

/// A node of a graph.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct GraphNode {
    /// Its name.
    pub name: String,
    /// The row it stands in; row 0 is at the bottom.
    pub row: usize,
}

/// What goes from one node to another.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct GraphEdge {
    /// Index of the node it comes from.
    pub from: usize,
    /// Index of the node it goes to.
    pub to: usize,
    /// How strong it is, and of which sign.
    pub weight: f64,
}

/// Nodes in rows, drawn with lines between them.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Graph {
    /// What it shows.
    pub title: String,
    /// The nodes.
    pub nodes: Vec<GraphNode>,
    /// The lines.
    pub edges: Vec<GraphEdge>,
}
