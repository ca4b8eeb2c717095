//! What an attention of several heads is told, and which of it fits together.

use super::{LocalFilter, OutputProjection};
use crate::attention::mechanism::{self, MechanismSpec};
use crate::error::bounded;
use crate::norm::NormSpec;
use crate::position::PositionSpec;
use crate::{Draws, Error, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

const MAX_INNER: usize = 1 << 20;

/// Multi-head attention.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MultiHeadSpec {
    /// Number of query heads.
    pub heads: usize,
    /// Number of key/value heads; as many as query heads when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub groups: Option<usize>,
    /// Features of a query and a key of a head; the width divided by the heads when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub head_width: Option<usize>,
    /// Features of a value of a head; as many as of a key when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value_width: Option<usize>,
    /// Whether a token sees only itself and earlier ones.
    #[serde(default)]
    pub causal: bool,
    /// A token sees keys less than this many positions away.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub window: Option<usize>,
    /// Whether the query, key and value projections have biases.
    #[serde(default = "yes")]
    pub bias: bool,
    /// Whether the output projection has a bias; as the others when absent. One that has no matrix of its own has
    /// none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output_bias: Option<bool>,
    /// How scores know about positions.
    #[serde(default)]
    pub position: PositionSpec,
    /// Normalisation of queries and keys.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub query_key_norm: Option<QueryKeyNorm>,
    /// Multiplies the scores; `1 / √head_width` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale: Option<f64>,
    /// Probability with which an attention weight is dropped in training.
    #[serde(default)]
    pub dropout: f64,
    /// Which projections are one and the same.
    #[serde(default, skip_serializing_if = "QueryKeySharing::is_none")]
    pub sharing: QueryKeySharing,
    /// A filter of each head over its values, whose result is added to what is mixed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub local: Option<LocalFilter>,
    /// What maps the heads' values to the stream.
    #[serde(default, skip_serializing_if = "OutputProjection::is_own")]
    pub output: OutputProjection,
    /// How queries and keys become a mixing of the values.
    #[serde(default, skip_serializing_if = "MechanismSpec::is_softmax")]
    pub mechanism: MechanismSpec,
}

/// Which of the projections to queries, keys and values are one and the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum QueryKeySharing {
    /// Each its own.
    #[default]
    None,
    /// Keys are queries: there is no `key`.
    QueryKey,
    /// Keys and values are queries: there is neither `key` nor `value`.
    All,
}

impl QueryKeySharing {
    /// Whether there are three projections.
    #[allow(
        clippy::trivially_copy_pass_by_ref,
        reason = "serde asks for a reference"
    )]
    pub fn is_none(&self) -> bool {
        *self == Self::None
    }
}

/// Where queries and keys are normalised before their product.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct QueryKeyNorm {
    /// Which norm.
    pub norm: NormSpec,
    /// Over each head by itself, or over all heads together.
    #[serde(default)]
    pub per_head: bool,
}

fn yes() -> bool {
    true
}

impl MultiHeadSpec {
    /// Attention with `heads` heads and the defaults otherwise.
    pub fn new(heads: usize) -> Self {
        Self {
            heads,
            groups: None,
            head_width: None,
            value_width: None,
            causal: false,
            window: None,
            bias: true,
            output_bias: None,
            position: PositionSpec::None,
            query_key_norm: None,
            scale: None,
            dropout: 0.0,
            sharing: QueryKeySharing::None,
            local: None,
            output: OutputProjection::Own,
            mechanism: MechanismSpec::Softmax,
        }
    }

    /// What sets this attention apart from the usual one, softmax over keys and values of their own;
    /// nothing where nothing does. For whoever reasons about its products of weights.
    pub fn peculiarity(&self) -> Option<&'static str> {
        match (self.mechanism.spec(), self.sharing) {
            (Some(mechanism), _) => Some(mechanism.kind()),
            _ if self.local.is_some() => Some("a filter beside the heads"),
            (None, QueryKeySharing::None) => match self.output {
                OutputProjection::Own => None,
                OutputProjection::Tied => Some("an output tied to the queries"),
                OutputProjection::Absent => Some("heads without an output matrix"),
            },
            (None, QueryKeySharing::QueryKey) => Some("queries that are keys"),
            (None, QueryKeySharing::All) => Some("queries that are keys and values"),
        }
    }

    /// Key/value heads.
    pub fn groups(&self) -> usize {
        self.groups.unwrap_or(self.heads)
    }

    /// Features of a query and a key of a head.
    pub fn head_width(&self, width: usize) -> usize {
        self.head_width.unwrap_or(width / self.heads.max(1))
    }

    /// Features of a value of a head.
    pub fn value_width(&self, width: usize) -> usize {
        self.value_width.unwrap_or_else(|| self.head_width(width))
    }

    /// What multiplies the scores.
    pub fn scale(&self, width: usize) -> f64 {
        self.scale
            .unwrap_or_else(|| 1.0 / (self.head_width(width) as f64).sqrt())
    }

    /// What it draws anew in training.
    pub fn draws(&self) -> Draws {
        let positions = match &self.position {
            PositionSpec::Fire(fire) => fire.randomised.is_some(),
            _ => false,
        };
        let mechanism = self.mechanism.spec().map(mechanism::Describe::draws);
        Draws::anything(positions) | mechanism.unwrap_or_default()
    }

    /// Refuses what cannot be built for tokens of `width`.
    pub fn validate(&self, width: usize, field: &str) -> Result<()> {
        let at = |name: &str| format!("{field}.{name}");
        if self.heads == 0 || self.heads > width {
            return Err(Error::spec(
                at("heads"),
                self.heads,
                format!("between 1 and the width {width}"),
            ));
        }
        if self.head_width.is_none() && !width.is_multiple_of(self.heads) {
            return Err(Error::spec(
                at("heads"),
                self.heads,
                format!("a divisor of the width {width}, or head_width must be given"),
            ));
        }
        let widest = (MAX_INNER / self.heads).max(1);
        for (name, features) in [
            ("head_width", self.head_width),
            ("value_width", self.value_width),
        ] {
            if let Some(features) = features {
                bounded(at(name), features, 1..=widest)?;
            }
        }
        let groups = self.groups();
        if groups == 0 || !self.heads.is_multiple_of(groups) {
            return Err(Error::spec(
                at("groups"),
                groups,
                format!("a divisor of {} heads", self.heads),
            ));
        }
        if self.window == Some(0) {
            return Err(Error::spec(at("window"), 0, "at least 1"));
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return Err(Error::spec(
                at("dropout"),
                self.dropout,
                "at least 0 and below 1",
            ));
        }
        if let Some(scale) = self.scale.filter(|scale| !scale.is_finite()) {
            return Err(Error::spec(at("scale"), scale, "a finite number"));
        }
        if let Some(QueryKeyNorm { norm, .. }) = &self.query_key_norm {
            norm.validate(&at("query_key_norm.norm"))?;
            if *norm == NormSpec::None {
                let expected = "layer or rms, or query_key_norm absent";
                return Err(Error::spec(
                    at("query_key_norm.norm.kind"),
                    "none",
                    expected,
                ));
            }
        }
        let mechanism = self.mechanism.spec();
        let unscaled = mechanism.filter(|mechanism| !mechanism.is_scaled());
        if let (Some(scale), Some(mechanism)) = (self.scale, unscaled) {
            let kind = mechanism.kind();
            let expected = format!("absent: it changes nothing in this {kind}");
            return Err(Error::spec(at("scale"), scale, expected));
        }
        self.validate_sharing(width, field)?;
        self.validate_output(width, field)?;
        self.validate_local(field)?;
        let scores = match (self.window, self.position.is_bias(), self.dropout > 0.0) {
            (Some(_), ..) => Some("a window"),
            (None, true, _) => Some("a bias added to scores"),
            (None, false, true) => Some("dropout of weights"),
            (None, false, false) => None,
        };
        mechanism::validate(
            &self.mechanism,
            &self.sizes(width),
            (false, scores),
            &at("mechanism"),
        )?;
        self.validate_tokens(&at("mechanism.project"))?;
        self.position
            .validate(groups, self.head_width(width), self.causal, &at("position"))
    }

    /// Refuses what happens to keys where their mechanism reads tokens.
    fn validate_tokens(&self, field: &str) -> Result<()> {
        let mechanism = self.mechanism.spec();
        if !mechanism.is_some_and(mechanism::Describe::reads_tokens) {
            return Ok(());
        }
        let what = match (&self.position, &self.query_key_norm) {
            (PositionSpec::Rotary(_), _) => "rotary positions, which turn the key of each token",
            (_, Some(_)) => "query_key_norm, which norms the key of each token",
            _ => return Ok(()),
        };
        Err(Error::spec(field, "tokens", format!("keys beside {what}")))
    }

    fn validate_sharing(&self, width: usize, field: &str) -> Result<()> {
        if self.sharing.is_none() {
            return Ok(());
        }
        let refuse = |name: &str, found: usize, expected: usize| {
            let expected = format!("{expected}, as queries that are keys too ask for");
            Err(Error::spec(format!("{field}.{name}"), found, expected))
        };
        if self.groups() != self.heads {
            return refuse("groups", self.groups(), self.heads);
        }
        let (keys, values) = (self.head_width(width), self.value_width(width));
        if self.sharing == QueryKeySharing::All && keys != values {
            return refuse("value_width", values, keys);
        }
        Ok(())
    }

    /// The heads as a mechanism sees them.
    pub fn sizes(&self, width: usize) -> mechanism::Heads {
        mechanism::Heads {
            width,
            heads: self.heads,
            head_width: self.head_width(width),
            value_width: self.value_width(width),
            causal: self.causal,
            scale: self.scale(width),
            sharing: self.sharing,
        }
    }

    /// As [`MultiHeadSpec::validate`], for attention over a memory, whose positions have nothing
    /// to do with those of the queries.
    pub fn validate_cross(&self, width: usize, field: &str) -> Result<()> {
        self.validate(width, field)?;
        let refuse = |name: &str, found: &str, expected: &str| {
            Err(Error::spec(
                format!("{field}.{name}"),
                found,
                format!("{expected} in cross-attention"),
            ))
        };
        if self.causal {
            return refuse("causal", "true", "false");
        }
        if self.window.is_some() {
            return refuse("window", "given", "absent");
        }
        if self.position != PositionSpec::None {
            return refuse("position.kind", self.position.kind(), "none");
        }
        if !self.sharing.is_none() {
            return refuse("sharing", "given", "none");
        }
        if self.local.is_some() {
            return refuse("local", "given", "absent");
        }
        if !self.output.is_own() {
            return refuse("output", self.output.name(), "own");
        }
        mechanism::validate(
            &self.mechanism,
            &self.sizes(width),
            (true, None),
            &format!("{field}.mechanism"),
        )
    }
}
