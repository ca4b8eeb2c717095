//! One linear map of each token, which a whole block becomes when its output is nearly a linear
//! function of its input (Razzhigaev et al., Your Transformer is Secretly Linear, 2024, arXiv
//! 2405.12250):
//!
//! `y = x Wᵀ + b`, `x, y` `[.., width]`
//!
//! Beside the residual, in a block without a mixer and with norm `none`, `W = A − I` makes the
//! block the map `A`. Cost per token: `2 width²`. Parameters: `width²`, and `width` for the bias.

use crate::parameters::{Init, Parameters};
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

    /// As [`LinearMap::new`], where what it gives takes the place of the stream: the weights begin between
    /// `±√(6 / width)`, Kaiming's bounds, so that it gives as much as it reads (Yu et al., CRATE-MAE, arXiv 2311.13110,
    /// whose decoder has such maps where its encoder has dictionaries).
    pub fn replacing(
        spec: &LinearSpec,
        width: usize,
        mut parameters: Parameters<'_>,
    ) -> Result<Self> {
        let most = (6.0 / width.max(1) as f64).sqrt();
        let weight = Init::Uniform {
            low: -most,
            high: most,
        };
        let bias = spec.bias.then_some(Init::Zeros);
        Ok(Self {
            path: parameters.path().to_owned(),
            map: parameters.linear_starting("map", "in", [width, width], weight, bias)?,
        })
    }

    /// Maps each token of `x` `[batch, length, width]`.
    pub fn forward(&self, x: &Signal, cx: &Context<'_>) -> Result<Signal> {
        let x = cx.trace.site(format_args!("{}.in", self.path), x.clone())?;
        let y = x.linear(&self.map)?;
        Ok(cx.trace.site(format_args!("{}.out", self.path), y)?)
    }
}
