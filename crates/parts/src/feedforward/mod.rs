//! Parts that act on each token alone.

mod dense;
mod gated;
mod linear;
mod mixture;
mod sparse_code;

pub use dense::{Dense, DenseSpec};
pub use gated::{Gated, GatedSpec};
pub use linear::{LinearMap, LinearSpec};
pub use mixture::{Mixture, MixtureSpec};
pub use sparse_code::{SparseCode, SparseCodeSpec};

use crate::error::bounded;
use crate::parameters::Parameters;
use crate::{Context, Result};
use lapidary_signal::Signal;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

const MAX_HIDDEN: usize = 1 << 20;

/// Which feed-forward part, and how it is set up.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum FeedforwardSpec {
    /// Two linear layers around an activation.
    Dense(DenseSpec),
    /// A gated linear unit (Shazeer, arXiv 2002.05202).
    Gated(GatedSpec),
    /// A sparse mixture of gated experts (Jiang et al., arXiv 2401.04088).
    Mixture(MixtureSpec),
    /// One linear map: what is left of a block that became one.
    Linear(LinearSpec),
    /// A sparse code in a learned dictionary (Yu et al., CRATE, arXiv 2306.01129).
    SparseCode(SparseCodeSpec),
}

impl FeedforwardSpec {
    /// Refuses what cannot be built.
    pub fn validate(&self, field: &str) -> Result<()> {
        let hidden = || bounded(format!("{field}.hidden"), self.hidden(), 1..=MAX_HIDDEN);
        match self {
            Self::Dense(_) | Self::Gated(_) => hidden(),
            Self::Mixture(spec) => hidden().and_then(|()| spec.validate(field)),
            Self::Linear(_) => Ok(()),
            Self::SparseCode(spec) => spec.validate(field),
        }
    }

    /// Width between the layers, of each expert in a mixture; 0 where there is nothing between.
    pub fn hidden(&self) -> usize {
        match self {
            Self::Dense(spec) => spec.hidden,
            Self::Gated(spec) => spec.hidden,
            Self::Mixture(spec) => spec.hidden,
            Self::Linear(_) => 0,
            Self::SparseCode(spec) => spec.atoms.unwrap_or(0),
        }
    }

    /// The kind's name in a spec.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Dense(_) => "dense",
            Self::Gated(_) => "gated",
            Self::Mixture(_) => "mixture",
            Self::Linear(_) => "linear",
            Self::SparseCode(_) => "sparse-code",
        }
    }
}

/// A feed-forward part with its parameters.
#[derive(Debug)]
pub enum Feedforward {
    /// Two linear layers.
    Dense(Dense),
    /// Gated.
    Gated(Gated),
    /// A mixture of experts.
    Mixture(Mixture),
    /// One linear map.
    Linear(LinearMap),
    /// A sparse code.
    SparseCode(SparseCode),
}

impl Feedforward {
    /// Builds the part for tokens of `width`.
    pub fn new(spec: &FeedforwardSpec, width: usize, parameters: Parameters<'_>) -> Result<Self> {
        Ok(match spec {
            FeedforwardSpec::Dense(spec) => Self::Dense(Dense::new(spec, width, parameters)?),
            FeedforwardSpec::Gated(spec) => Self::Gated(Gated::new(spec, width, parameters)?),
            FeedforwardSpec::Mixture(spec) => Self::Mixture(Mixture::new(spec, width, parameters)?),
            FeedforwardSpec::Linear(spec) => Self::Linear(LinearMap::new(spec, width, parameters)?),
            FeedforwardSpec::SparseCode(spec) => {
                Self::SparseCode(SparseCode::new(spec, width, parameters)?)
            }
        })
    }

    /// As [`Feedforward::new`], for a block in which what the part gives takes the place of the stream.
    pub fn replacing(
        spec: &FeedforwardSpec,
        width: usize,
        parameters: Parameters<'_>,
    ) -> Result<Self> {
        match spec {
            FeedforwardSpec::Linear(spec) => {
                LinearMap::replacing(spec, width, parameters).map(Self::Linear)
            }
            other => Self::new(other, width, parameters),
        }
    }

    /// Transforms each token of `x` `[batch, length, width]`.
    pub fn forward(&self, x: &Signal, cx: &Context<'_>) -> Result<Signal> {
        match self {
            Self::Dense(part) => part.forward(x, cx),
            Self::Gated(part) => part.forward(x, cx),
            Self::Mixture(part) => part.forward(x, cx),
            Self::Linear(part) => part.forward(x, cx),
            Self::SparseCode(part) => part.forward(x, cx),
        }
    }
}
