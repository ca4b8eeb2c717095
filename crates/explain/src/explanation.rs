//! What an explainer gives.

use crate::leaks::Leak;
use schemars::JsonSchema;
use serde::Serialize;

/// What the scores are over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Unit {
    /// Tokens of the input.
    Token,
    /// Groups of tokens.
    Phrase,
    /// Parts of the model.
    Component,
    /// Heads of attention.
    Head,
    /// Features of a dictionary.
    Feature,
}

/// What an explanation leaves out.
#[derive(Clone, Debug, Default, PartialEq, Serialize, JsonSchema)]
pub struct Account {
    /// The number that is explained.
    pub explained: f64,
    /// Sum of the scores.
    pub attributed: f64,
    /// Parts of the number that are known but no unit's, by name.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub elsewhere: Vec<(String, f64)>,
    /// `explained − attributed − elsewhere`: what is nobody's, by design (dropped biases, detached
    /// factors) or by rounding.
    pub unattributed: f64,
    /// Largest relative difference, over all sites, between the value and the sum of its
    /// streams; absent for methods that carry no streams.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub largest_site_error: Option<f64>,
    /// What the method leaves out by its definition, in words.
    pub left_out: Vec<String>,
    /// What each part of the model keeps of the relevance that arrives at it, from the outputs
    /// down; for methods that propagate relevance.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub leaks: Vec<Leak>,
}

/// Scores over the units of an input or a model.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
pub struct Explanation {
    /// The method's name.
    pub method: String,
    /// What the scores are over.
    pub unit: Unit,
    /// Names of the units, where they have any.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub labels: Vec<String>,
    /// One score for each unit.
    pub scores: Vec<f64>,
    /// What the scores leave out.
    pub account: Account,
}

impl Explanation {
    /// Assembles an explanation of the number `explained`.
    pub(crate) fn new(
        method: impl Into<String>,
        unit: Unit,
        scores: Vec<f64>,
        explained: f64,
        left_out: Vec<String>,
    ) -> Self {
        let attributed = scores.iter().sum::<f64>();
        let account = Account {
            explained,
            attributed,
            elsewhere: Vec::new(),
            unattributed: explained - attributed,
            largest_site_error: None,
            left_out,
            leaks: Vec::new(),
        };
        Self {
            method: method.into(),
            unit,
            labels: Vec::new(),
            scores,
            account,
        }
    }

    /// The same with what each part of the model keeps.
    pub(crate) fn with_leaks(mut self, leaks: Vec<Leak>) -> Self {
        self.account.leaks = leaks;
        self
    }

    /// The same with the units' names.
    pub fn with_labels(mut self, labels: Vec<String>) -> Self {
        self.labels = labels;
        self
    }

    /// The same with parts of the number that are no unit's; no longer unattributed.
    pub(crate) fn with_elsewhere(mut self, elsewhere: Vec<(String, f64)>) -> Self {
        for (_, amount) in &elsewhere {
            self.account.unattributed -= amount;
        }
        self.account.elsewhere.extend(elsewhere);
        self
    }

    /// Indices of the units by descending score.
    pub fn ranking(&self) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.scores.len()).collect();
        order.sort_by(|a, b| self.scores[*b].total_cmp(&self.scores[*a]));
        order
    }
}
