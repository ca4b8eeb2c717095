//! A graph as SVG: nodes in rows, the first at the bottom, and lines in the strength of their
//! weights, blue above zero and orange below.

use lapidary_explain::report::{Graph, GraphEdge};
use maud::{Markup, html};

const COLUMN: f64 = 96.0;
const ROW: f64 = 84.0;
const BOX: (f64, f64) = (76.0, 28.0);
const MARGIN: f64 = 16.0;

/// The graph as one drawing.
pub fn graph(graph: &Graph) -> Markup {
    let (places, width, height) = places(graph);
    let largest = graph
        .edges
        .iter()
        .map(|edge| edge.weight.abs())
        .filter(|weight| weight.is_finite())
        .fold(f64::MIN_POSITIVE, f64::max);
    let line = |edge: &GraphEdge| {
        let ends = Some((places.get(edge.from)?, places.get(edge.to)?));
        let strength = (edge.weight.abs() / largest).clamp(0.0, 1.0);
        ends.map(|(from, to)| (*from, *to, strength))
    };
    html! {
        svg.graph viewBox=(format!("0 0 {width} {height}")) role="img"
            style=(format!("max-width:{width}px")) aria-label=(graph.title) {
            @for edge in &graph.edges {
                @if let Some((from, to, strength)) = line(edge) {
                    line class=(if edge.weight >= 0.0 { "for" } else { "against" })
                        x1=(from.0) y1=(from.1 - BOX.1 / 2.0) x2=(to.0) y2=(to.1 + BOX.1 / 2.0)
                        stroke-width=(format!("{:.2}", 1.0 + 4.0 * strength))
                        stroke-opacity=(format!("{:.2}", 0.25 + 0.75 * strength)) {
                        title { (format!("{:.4}", edge.weight)) }
                    }
                }
            }
            @for (node, (x, y)) in graph.nodes.iter().zip(&places) {
                rect x=(x - BOX.0 / 2.0) y=(y - BOX.1 / 2.0) width=(BOX.0) height=(BOX.1) rx="6" {}
                text x=(x) y=(y + 5.0) text-anchor="middle" { (node.name) }
            }
        }
    }
}

/// The centre of each node, and the size of the drawing. Rows without nodes take no space.
fn places(graph: &Graph) -> (Vec<(f64, f64)>, f64, f64) {
    let mut rows: Vec<usize> = graph.nodes.iter().map(|node| node.row).collect();
    rows.sort_unstable();
    rows.dedup();
    let count = |row: usize| graph.nodes.iter().filter(|node| node.row == row).count();
    let widest = rows.iter().map(|row| count(*row)).max().unwrap_or(0).max(1);
    let width = widest as f64 * COLUMN + 2.0 * MARGIN;
    let height = rows.len().max(1) as f64 * ROW + 2.0 * MARGIN;
    let mut seen = vec![0usize; rows.len()];
    let place = |node: &lapidary_explain::report::GraphNode| {
        let row = rows.iter().position(|row| *row == node.row).unwrap_or(0);
        let column = seen.get(row).copied().unwrap_or(0);
        if let Some(seen) = seen.get_mut(row) {
            *seen += 1;
        }
        let left = (width - count(node.row) as f64 * COLUMN) / 2.0;
        (
            left + (column as f64 + 0.5) * COLUMN,
            height - MARGIN - (row as f64 + 0.5) * ROW,
        )
    };
    (graph.nodes.iter().map(place).collect(), width, height)
}

#[cfg(test)]
mod tests {
    use super::*;
    use lapidary_explain::report::GraphNode;

    fn node(name: &str, row: usize) -> GraphNode {
        GraphNode {
            name: name.to_owned(),
            row,
        }
    }

    #[test]
    fn rows_lie_above_each_other_and_names_are_escaped() {
        let drawn = Graph {
            title: "t".to_owned(),
            nodes: vec![node("0.1", 0), node("0.2", 0), node("<b>", 7)],
            edges: vec![GraphEdge {
                from: 1,
                to: 2,
                weight: -0.5,
            }],
        };
        let (places, width, _) = places(&drawn);
        assert_eq!(places[0].1, places[1].1);
        assert!(places[2].1 < places[0].1 && places[0].0 < places[1].0);
        assert_eq!(places[2].0, width / 2.0);
        let svg = graph(&drawn).into_string();
        assert!(svg.contains("&lt;b&gt;") && svg.contains(r#"class="against""#));
    }

    /// An edge to a node that is not there is left out.
    #[test]
    fn stray_edges_are_not_drawn() {
        let drawn = Graph {
            nodes: vec![node("0.1", 0)],
            edges: vec![GraphEdge {
                from: 0,
                to: 4,
                weight: 1.0,
            }],
            ..Graph::default()
        };
        assert!(!graph(&drawn).into_string().contains("<line"));
    }
}
