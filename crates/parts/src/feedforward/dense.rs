//! The two-layer feed-forward part (Vaswani et al., Attention Is All You Need, 2017, arXiv
//! 1706.03762), the same for every token:
//!
//! `y = f(x W_upᵀ + b_up) W_downᵀ + b_down`, `x, y` `[.., width]`, hidden `[.., hidden]`
//!
//! Cost per token: `4 width · hidden` and the activation. Parameters: `2 width · hidden`, and
//! `hidden + width` for the biases.

use crate::activation::ActivationSpec;
use crate::parameters::Parameters;
use crate::{Context, Result};
use lapidary_signal::{Linear, Signal};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Two linear layers around an activation.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct DenseSpec {
    /// Width between the layers.
    pub hidden: usize,
    /// `f`.
    #[serde(default)]
    pub activation: ActivationSpec,
    /// Whether the layers have biases.
    #[serde(default = "yes")]
    pub bias: bool,
}

fn yes() -> bool {
    true
}

/// The part with its parameters.
#[derive(Debug)]
pub struct Dense {
    path: String,
    activation: ActivationSpec,
    up: Linear,
    down: Linear,
}

impl Dense {
    /// Builds the part for tokens of `width`.
    pub fn new(spec: &DenseSpec, width: usize, mut parameters: Parameters<'_>) -> Result<Self> {
        Ok(Self {
            path: parameters.path().to_owned(),
            activation: spec.activation,
            up: parameters.linear("up", "in", width, spec.hidden, spec.bias)?,
            down: parameters.linear("down", "hidden", spec.hidden, width, spec.bias)?,
        })
    }

    /// Transforms each token of `x` `[batch, length, width]`.
    pub fn forward(&self, x: &Signal, cx: &Context<'_>) -> Result<Signal> {
        let x = cx.trace.site(format_args!("{}.in", self.path), x.clone())?;
        let hidden = x.linear_activate(&self.up, self.activation.into())?;
        let hidden = cx
            .trace
            .site(format_args!("{}.hidden", self.path), hidden)?;
        Ok(cx.trace.site(
            format_args!("{}.out", self.path),
            hidden.linear(&self.down)?,
        )?)
    }
}
