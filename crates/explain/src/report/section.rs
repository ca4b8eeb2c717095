//! Parts of a report about one thing each, such as a feature.

use super::Table;
use serde::Serialize;

/// Tokens with a score each, shown as colours.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct TokenExample {
    /// What it is an example of.
    pub title: String,
    /// Tokens as people read them.
    pub tokens: Vec<String>,
    /// One score for each token.
    pub scores: Vec<f64>,
}

/// One thing that a report shows in detail.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Section {
    /// What it is about.
    pub title: String,
    /// What is to be said of it.
    pub notes: Vec<String>,
    /// Examples.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub examples: Vec<TokenExample>,
    /// Tables.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tables: Vec<Table>,
}
