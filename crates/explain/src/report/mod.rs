//! What an analysis finds: tables, maps, plots and graphs, as data. The command line prints them, writes
//! them as JSON, and draws them on a page.

mod graph;
mod plot;
mod section;

pub use graph::{Graph, GraphEdge, GraphNode};
pub use plot::{Plot, Series};
pub use section::{Section, TokenExample};

use serde::Serialize;

/// An entry of a table.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Cell {
    /// Text.
    Text(String),
    /// A number.
    Number(f64),
}

impl From<&str> for Cell {
    fn from(text: &str) -> Self {
        Self::Text(text.to_owned())
    }
}

impl From<String> for Cell {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<f64> for Cell {
    fn from(number: f64) -> Self {
        Self::Number(number)
    }
}

impl From<usize> for Cell {
    fn from(count: usize) -> Self {
        Self::Text(count.to_string())
    }
}

impl std::fmt::Display for Cell {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Text(text) => f.write_str(text),
            Self::Number(number) if *number == 0.0 => f.write_str("0"),
            Self::Number(number) if !(1e-3..1e5).contains(&number.abs()) => {
                write!(f, "{number:.3e}")
            }
            Self::Number(number) => write!(f, "{number:.4}"),
        }
    }
}

/// Rows under named columns; the first column names the row.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Table {
    /// What it shows.
    pub title: String,
    /// Names of the columns.
    pub columns: Vec<String>,
    /// The rows, each as long as `columns`.
    pub rows: Vec<Vec<Cell>>,
}

impl Table {
    /// A table without rows.
    pub fn new(title: impl Into<String>, columns: &[&str]) -> Self {
        Self {
            title: title.into(),
            columns: columns.iter().map(|&name| name.to_owned()).collect(),
            rows: Vec::new(),
        }
    }

    /// Adds a row.
    pub fn push(&mut self, row: impl IntoIterator<Item = Cell>) {
        self.rows.push(row.into_iter().collect());
    }
}

/// Numbers over two axes, drawn as colours.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Map {
    /// What it shows.
    pub title: String,
    /// Names of the rows.
    pub rows: Vec<String>,
    /// Names of the columns.
    pub columns: Vec<String>,
    /// One row of numbers for each row.
    pub values: Vec<Vec<f64>>,
}

/// What an analysis found.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Report {
    /// What was looked at.
    pub title: String,
    /// How: data, sizes, what was left out.
    pub notes: Vec<String>,
    /// Tables.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tables: Vec<Table>,
    /// Maps.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub maps: Vec<Map>,
    /// Lines.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub plots: Vec<Plot>,
    /// One thing in detail each.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub sections: Vec<Section>,
    /// Graphs.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub graphs: Vec<Graph>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short_at_every_size() {
        let shown: Vec<_> = [0.0, 0.5, -1_234.567_89, 1e-7, 3e9]
            .map(|number| Cell::from(number).to_string())
            .into();
        assert_eq!(shown, ["0", "0.5000", "-1234.5679", "1.000e-7", "3.000e9"]);
    }
}
