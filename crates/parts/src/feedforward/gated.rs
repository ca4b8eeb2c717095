//! The gated feed-forward part (Shazeer, GLU Variants Improve Transformer, 2020, arXiv
//! 2002.05202): a second projection decides how much of each hidden feature passes.
//!
//! `y = (f(x W_gateᵀ) ⊙ x W_upᵀ) W_downᵀ`, `x, y` `[.., width]`, hidden `[.., hidden]`
//!
//! Cost per token: `6 width · hidden`, the activation and the product. Parameters:
//! `3 width · hidden`, and `2 hidden + width` for biases. With `f = sigmoid` the GLU of Dauphin
//! et al. (arXiv 1612.08083), with SiLU Llama's.

use crate::activation::ActivationSpec;
use crate::parameters::Parameters;
use crate::{Context, Result};
use lapidary_signal::{Linear, Signal};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A gated linear unit.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct GatedSpec {
    /// Width of gate and content.
    pub hidden: usize,
    /// `f`, on the gate.
    #[serde(default = "silu")]
    pub activation: ActivationSpec,
    /// Whether the layers have biases.
    #[serde(default)]
    pub bias: bool,
}

fn silu() -> ActivationSpec {
    ActivationSpec::Silu
}

/// The part with its parameters.
#[derive(Debug)]
pub struct Gated {
    path: String,
    activation: ActivationSpec,
    gate: Linear,
    up: Linear,
    down: Linear,
}

impl Gated {
    /// Builds the part for tokens of `width`.
    pub fn new(spec: &GatedSpec, width: usize, mut parameters: Parameters<'_>) -> Result<Self> {
        Ok(Self {
            path: parameters.path().to_owned(),
            activation: spec.activation,
            gate: parameters.linear("gate", "in", width, spec.hidden, spec.bias)?,
            up: parameters.linear("up", "in", width, spec.hidden, spec.bias)?,
            down: parameters.linear("down", "hidden", spec.hidden, width, spec.bias)?,
        })
    }

    /// Transforms each token of `x` `[batch, length, width]`.
    pub fn forward(&self, x: &Signal, cx: &Context<'_>) -> Result<Signal> {
        let x = cx.trace.site(format_args!("{}.in", self.path), x.clone())?;
        let gate = x.linear_activate(&self.gate, self.activation.into())?;
        let hidden = x.linear(&self.up)?.gate(&gate)?;
        let hidden = cx
            .trace
            .site(format_args!("{}.hidden", self.path), hidden)?;
        Ok(cx.trace.site(
            format_args!("{}.out", self.path),
            hidden.linear(&self.down)?,
        )?)
    }
}
