//! What Combiner can be asked for.

use super::clustering::Clustering;
use super::layer::Layer;
use super::row_keys::RowProjection;
use super::{Combiner, Pooling};
use crate::attention::mechanism::{Abilities, Describe, Heads, Mechanism};
use crate::error::bounded;
use crate::parameters::Parameters;
use crate::{Error, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

const MAX_SEGMENT: usize = 1 << 24;
const MAX_CLUSTERS: usize = 1 << 16;

/// Attention to all tokens, most of them in summary.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CombinerSpec {
    /// What is met directly and what in which spans.
    pub form: CombinerForm,
    /// Whether the logarithm of a span's number of tokens is added to its score.
    #[serde(default)]
    pub log_count: bool,
    /// What a span's query and key are made of.
    #[serde(default, skip_serializing_if = "Summary::is_largest")]
    pub summary: Summary,
    /// What the pull of centroids to their queries and keys is multiplied by in training, in routed form; with 0
    /// they stay where they are, to be found by [`CombinerSpec::fit`].
    #[serde(default, skip_serializing_if = "is_nothing")]
    pub pull: f64,
    /// Probability with which the weight of a key that is met directly is dropped in training; weights of spans never
    /// are.
    #[serde(default, skip_serializing_if = "is_nothing")]
    pub dropout: f64,
}

#[allow(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde asks for a reference"
)]
fn is_nothing(number: &f64) -> bool {
    *number == 0.0
}

impl CombinerSpec {
    /// A form with summaries by the largest features, each counting as one key.
    pub fn new(form: CombinerForm) -> Self {
        Self {
            form,
            log_count: false,
            summary: Summary::default(),
            pull: 0.0,
            dropout: 0.0,
        }
    }
}

/// What a span's query and key are made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Summary {
    /// The largest of its tokens' queries and keys, feature by feature.
    #[default]
    #[serde(deserialize_with = "crate::fields::none")]
    Largest,
    /// What a layer makes of these, pooled.
    DeepSets {
        /// How.
        #[serde(default)]
        pooling: Pooling,
    },
    /// In row-major form: what a layer makes of the weighted keys or values of a row, beside the key of the token that
    /// sums it up.
    Projected {
        /// Which of them.
        #[serde(default, skip_serializing_if = "RowSource::is_keys")]
        of: RowSource,
    },
}

/// What the key of a row is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum RowSource {
    /// Its keys, weighted: weights of attention hang on queries and keys alone.
    #[default]
    Keys,
    /// What attention over the row gives, its values, weighted: weights hang on values too.
    Values,
}

impl RowSource {
    #[allow(
        clippy::trivially_copy_pass_by_ref,
        reason = "serde asks for a reference"
    )]
    fn is_keys(&self) -> bool {
        *self == Self::Keys
    }
}

impl Summary {
    #[allow(
        clippy::trivially_copy_pass_by_ref,
        reason = "serde asks for a reference"
    )]
    fn is_largest(&self) -> bool {
        *self == Self::Largest
    }
}

/// How the tokens that one may see are divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum CombinerForm {
    /// Own segment; other segments.
    Fixed {
        /// Tokens of a segment.
        segment: usize,
    },
    /// Itself; spans whose length doubles.
    #[serde(deserialize_with = "crate::fields::none")]
    LogSparse,
    /// Row and column; other columns above.
    Vertical {
        /// Tokens of a row.
        columns: usize,
    },
    /// Row and column; both sides of earlier rows.
    Horizontal {
        /// Tokens of a row.
        columns: usize,
    },
    /// Row; earlier rows. The key of an earlier row is its keys, weighted as its values are by the query in the same
    /// column. The paper leaves open what a row's key is; its program also projects it from what the row's attention
    /// gives, values mixed, with a residual and a norm: [`Summary::Projected`] of [`RowSource::Values`]. Weights then
    /// depend on values, which lenses hold there as they hold queries and keys; of [`RowSource::Keys`], with keys in the
    /// place of values, they do not.
    RowMajor {
        /// Tokens of a row.
        columns: usize,
    },
    /// Vertical and horizontal.
    Mixture {
        /// Tokens of a row.
        columns: usize,
        /// Whether there is one softmax for both.
        #[serde(default)]
        joint: bool,
    },
    /// Own cluster; other clusters.
    Routed {
        /// Clusters of each head.
        clusters: usize,
    },
}

impl Describe for CombinerSpec {
    fn kind(&self) -> &'static str {
        "combiner"
    }

    fn abilities(&self) -> Abilities {
        Abilities {
            causal: true,
            bidirectional: matches!(
                self.form,
                CombinerForm::Fixed { .. } | CombinerForm::LogSparse | CombinerForm::Routed { .. }
            ),
            ..Abilities::default()
        }
    }

    fn validate(&self, _: &Heads, field: &str) -> Result<()> {
        let by_rows = matches!(self.form, CombinerForm::RowMajor { .. });
        let refuse = |found: &str, expected: &str| {
            Err(Error::spec(
                format!("{field}.summary.kind"),
                found,
                expected,
            ))
        };
        match self.summary {
            Summary::DeepSets { .. } if by_rows => {
                let expected =
                    "largest in row-major form, whose spans are summed up by their tokens";
                return refuse("deep-sets", expected);
            }
            Summary::Projected { .. } if !by_rows => {
                let expected = "largest or deep-sets in a form whose spans no token sums up";
                return refuse("projected", expected);
            }
            Summary::Largest | Summary::DeepSets { .. } | Summary::Projected { .. } => {}
        }
        if !(0.0..1.0).contains(&self.dropout) {
            let expected = "at least 0 and below 1";
            return Err(Error::spec(
                format!("{field}.dropout"),
                self.dropout,
                expected,
            ));
        }
        if !(self.pull.is_finite() && self.pull >= 0.0) {
            let expected = "a number of at least 0";
            return Err(Error::spec(format!("{field}.pull"), self.pull, expected));
        }
        if self.pull > 0.0 && !matches!(self.form, CombinerForm::Routed { .. }) {
            let expected = "0 in a form without centroids";
            return Err(Error::spec(format!("{field}.pull"), self.pull, expected));
        }
        let (name, size, most) = match self.form {
            CombinerForm::LogSparse => return Ok(()),
            CombinerForm::Fixed { segment } => ("segment", segment, MAX_SEGMENT),
            CombinerForm::Vertical { columns }
            | CombinerForm::Horizontal { columns }
            | CombinerForm::RowMajor { columns }
            | CombinerForm::Mixture { columns, .. } => ("columns", columns, MAX_SEGMENT),
            CombinerForm::Routed { clusters } => ("clusters", clusters, MAX_CLUSTERS),
        };
        bounded(format!("{field}.form.{name}"), size, 1..=most)
    }

    fn build(&self, heads: &Heads, mut parameters: Parameters<'_>) -> Result<Box<dyn Mechanism>> {
        Ok(Box::new(Combiner {
            spec: self.clone(),
            causal: heads.causal,
            scale: heads.scale,
            clustering: match self.form {
                CombinerForm::Routed { clusters } => {
                    Some(Clustering::new(clusters, heads, &mut parameters)?)
                }
                _ => None,
            },
            layer: match self.summary {
                Summary::Largest | Summary::Projected { .. } => None,
                Summary::DeepSets { pooling } => {
                    Some(Layer::new(pooling, heads, parameters.at("summary"))?)
                }
            },
            row_keys: match self.summary {
                Summary::Largest | Summary::DeepSets { .. } => None,
                Summary::Projected { of } => {
                    let keys = RowProjection::new(of, heads, parameters.at("summary"))?;
                    Some(Arc::new(keys))
                }
            },
        }))
    }
}
