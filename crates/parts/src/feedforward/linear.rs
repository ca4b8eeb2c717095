//! One linear map of each token, which a whole block becomes when its output is nearly a linear
//! function of its input (Razzhigaev et al., Your Transformer is Secretly Linear, 2024, arXiv
//! 2405.12250):
//!
//! `y = x Wᵀ + b`, `x, y` `[.., width]`
//!
//! Beside the residual, in a block without a mixer and with norm `none`, `W = A − I` makes the
//! block the map `A`. Cost per token: `2 width²`. Parameters: `width²`, and `width` for the bias.

use crate::parameters::Parameters;
use crate::{Context, Result};
use lapidary_signal::{Linear, Signal};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// One linear map.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LinearSpec {
    /// Whether it has a bias.
    #[serde(default = "yes")]
    pub bias: bool,
}

fn yes() -> bool {
    true
}

/// The map with its parameters.
#[derive(Debug)]
pub struct LinearMap {
    path: String,
    map: Linear,
}

impl LinearMap {
    /// Builds the map for tokens of `width`.
    pub fn new(spec: &LinearSpec, width: usize, mut parameters: Parameters<'_>) -> Result<Self> {
        Ok(Self {
            path: parameters.path().to_owned(),
            map: parameters.linear("map", "in", width, width, spec.bias)?,
        })
    }

    /// Maps each token of `x` `[batch, length, width]`.
    pub fn forward(&self, x: &Signal, cx: &Context<'_>) -> Result<Signal> {
        let x = cx.trace.site(format_args!("{}.in", self.path), x.clone())?;
        let y = x.linear(&self.map)?;
        Ok(cx.trace.site(format_args!("{}.out", self.path), y)?)
    }
}
