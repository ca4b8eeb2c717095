//! Parts that act on each token alone.

mod dense;
mod gated;

pub use dense::{Dense, DenseSpec};
pub use gated::{Gated, GatedSpec};

use crate::parameters::Parameters;
use crate::{Context, Result};
use lapidary_signal::Signal;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Which feed-forward part, and how it is set up.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum FeedforwardSpec {
    /// Two linear layers around an activation.
    Dense(DenseSpec),
    /// A gated linear unit (Shazeer, arXiv 2002.05202).
    Gated(GatedSpec),
}

impl FeedforwardSpec {
    /// Refuses what cannot be built.
    pub fn validate(&self, field: &str) -> Result<()> {
        match self {
            Self::Dense(spec) => positive(spec.hidden, &format!("{field}.hidden")),
            Self::Gated(spec) => positive(spec.hidden, &format!("{field}.hidden")),
        }
    }

    /// Width between the layers.
    pub fn hidden(&self) -> usize {
        match self {
            Self::Dense(spec) => spec.hidden,
            Self::Gated(spec) => spec.hidden,
        }
    }

    /// The kind's name in a spec.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Dense(_) => "dense",
            Self::Gated(_) => "gated",
        }
    }
}

fn positive(value: usize, field: &str) -> Result<()> {
    if value == 0 {
        return Err(crate::Error::spec(field, value, "at least 1"));
    }
    Ok(())
}

/// A feed-forward part with its parameters.
#[derive(Debug)]
pub enum Feedforward {
    /// Two linear layers.
    Dense(Dense),
    /// Gated.
    Gated(Gated),
}

impl Feedforward {
    /// Builds the part for tokens of `width`.
    pub fn new(spec: &FeedforwardSpec, width: usize, parameters: Parameters<'_>) -> Result<Self> {
        Ok(match spec {
            FeedforwardSpec::Dense(spec) => Self::Dense(Dense::new(spec, width, parameters)?),
            FeedforwardSpec::Gated(spec) => Self::Gated(Gated::new(spec, width, parameters)?),
        })
    }

    /// Transforms each token of `x` `[batch, length, width]`.
    pub fn forward(&self, x: &Signal, cx: &Context<'_>) -> Result<Signal> {
        match self {
            Self::Dense(part) => part.forward(x, cx),
            Self::Gated(part) => part.forward(x, cx),
        }
    }
}
