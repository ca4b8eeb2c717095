//! The relevance lens: layer-wise relevance propagation as a modified gradient.
//!
//! Every rule here is written as a forward pass whose *derivative* is the rule: with
//! `R = x ⊙ ∂`, relevance is carried by the tensor engine's own backward pass (Arras et al.,
//! arXiv 2502.15886; Achtibat et al., AttnLRP, arXiv 2402.05602; Ali et al., arXiv 2202.07304).
//! A factor that is *detached* keeps no relevance; a product that shares it *uniformly* gives
//! each factor the same part.

use crate::error::tensor;
use crate::{Error, Result};
use lapidary_kernels::{
    Activation, AttentionOptions, Tensor, activate, activation_secant, attention, layer_norm,
    naive, rms_norm,
};

/// What an elementwise nonlinearity does with relevance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ActivationRule {
    /// All relevance passes: `y = x · detach(f(x) / x)`.
    Identity,
    /// Gradient times input.
    Gradient,
}

/// What attention does with relevance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttentionRule {
    /// Weights are constants and all relevance goes to the values (CP-LRP).
    Detach,
    /// Each product shares uniformly between its factors, and the softmax is linearised (AttnLRP).
    Uniform,
    /// Gradient times input.
    Gradient,
}

/// What normalisation does with relevance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormRule {
    /// The standard deviation is a constant (LN rule); the mean still is subtracted.
    Detach,
    /// Gradient times input.
    Gradient,
}

/// What a product of two signals does with relevance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProductRule {
    /// Half to each factor.
    Uniform,
    /// Gradient times input: each factor gets all of it, so relevance doubles.
    Gradient,
}

/// One rule for each kind of operation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RelevanceRules {
    /// `ε` of the ε-rule for linear layers: relevance `R` of output `z` is damped by
    /// `z / (z + ε sign z)`. Zero gives all of it back to the inputs and the bias.
    pub epsilon: f64,
    /// Elementwise nonlinearities.
    pub activation: ActivationRule,
    /// Attention.
    pub attention: AttentionRule,
    /// Layer and RMS norm.
    pub norm: NormRule,
    /// Products of two signals.
    pub product: ProductRule,
}

impl RelevanceRules {
    /// AttnLRP: relevance also flows through the attention weights.
    pub const fn attention_aware() -> Self {
        Self {
            epsilon: 1e-6,
            activation: ActivationRule::Identity,
            attention: AttentionRule::Uniform,
            norm: NormRule::Detach,
            product: ProductRule::Uniform,
        }
    }

    /// CP-LRP with `ε = 0`: attention weights are constants. The reverse-mode twin of streams
    /// without biases.
    pub const fn value_only() -> Self {
        Self {
            epsilon: 0.0,
            activation: ActivationRule::Identity,
            attention: AttentionRule::Detach,
            norm: NormRule::Detach,
            product: ProductRule::Uniform,
        }
    }

    /// Plain gradient times input.
    pub const fn gradient_times_input() -> Self {
        Self {
            epsilon: 0.0,
            activation: ActivationRule::Gradient,
            attention: AttentionRule::Gradient,
            norm: NormRule::Gradient,
            product: ProductRule::Gradient,
        }
    }

    pub(crate) fn linear_output(&self, z: Tensor) -> Result<Tensor> {
        if self.epsilon == 0.0 {
            return Ok(z);
        }
        // z / (z + ε sign z) = |z| / (|z| + ε)
        let magnitude = tensor(z.detach().abs())?;
        let damping = tensor(&magnitude / tensor(&magnitude + self.epsilon)?)?;
        scale_gradient(&z, &damping)
    }

    pub(crate) fn activate(&self, x: &Tensor, activation: Activation) -> Result<Tensor> {
        match self.activation {
            ActivationRule::Identity if activation.passes_origin() => {
                let secant = activation_secant(x, activation)?;
                tensor(x * secant.detach())
            }
            _ => Ok(activate(x, activation)?),
        }
    }

    pub(crate) fn layer_norm(
        &self,
        x: &Tensor,
        weight: Option<&Tensor>,
        bias: Option<&Tensor>,
        epsilon: f64,
    ) -> Result<Tensor> {
        match self.norm {
            NormRule::Gradient => Ok(layer_norm(x, weight, bias, epsilon)?),
            NormRule::Detach => {
                let centred =
                    tensor(x.broadcast_sub(&tensor(x.mean_keepdim(lapidary_kernels::D::Minus1))?))?;
                let variance = tensor(
                    tensor(centred.detach().sqr())?.mean_keepdim(lapidary_kernels::D::Minus1),
                )?;
                let deviation = tensor(tensor(variance + epsilon)?.sqrt())?;
                scale_shift(tensor(centred.broadcast_div(&deviation))?, weight, bias)
            }
        }
    }

    pub(crate) fn rms_norm(
        &self,
        x: &Tensor,
        weight: Option<&Tensor>,
        epsilon: f64,
    ) -> Result<Tensor> {
        match self.norm {
            NormRule::Gradient => Ok(rms_norm(x, weight, epsilon)?),
            NormRule::Detach => {
                let square =
                    tensor(tensor(x.detach().sqr())?.mean_keepdim(lapidary_kernels::D::Minus1))?;
                let deviation = tensor(tensor(square + epsilon)?.sqrt())?;
                scale_shift(tensor(x.broadcast_div(&deviation))?, weight, None)
            }
        }
    }

    pub(crate) fn attention(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        options: &AttentionOptions,
    ) -> Result<Tensor> {
        match self.attention {
            AttentionRule::Detach => {
                let weights = naive::attention_weights(&q.detach(), &k.detach(), options)?.detach();
                let v = tensor(naive::repeat_groups(v, tensor(q.dim(1))?)?.contiguous())?;
                tensor(weights.matmul(&v))
            }
            AttentionRule::Uniform => {
                let (q, k, v) = self.share_attention(q, k, v)?;
                Ok(attention(&q, &k, &v, options)?)
            }
            AttentionRule::Gradient => Ok(attention(q, k, v, options)?),
        }
    }

    /// Queries, keys and values with the part of the gradient that the rule gives each.
    pub(crate) fn share_attention(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
    ) -> Result<(Tensor, Tensor, Tensor)> {
        Ok(match self.attention {
            AttentionRule::Detach => (q.detach(), k.detach(), v.clone()),
            // R(A V): half to A, half to V. R(A) reaches the scores by the softmax's gradient,
            // and of each score half goes to the query and half to the key.
            AttentionRule::Uniform => (
                scale_gradient_by(q, 0.25)?,
                scale_gradient_by(k, 0.25)?,
                scale_gradient_by(v, 0.5)?,
            ),
            AttentionRule::Gradient => (q.clone(), k.clone(), v.clone()),
        })
    }

    pub(crate) fn product(&self, a: &Tensor, b: &Tensor) -> Result<(Tensor, Tensor)> {
        Ok(match self.product {
            ProductRule::Uniform => (scale_gradient_by(a, 0.5)?, scale_gradient_by(b, 0.5)?),
            ProductRule::Gradient => (a.clone(), b.clone()),
        })
    }
}

fn scale_shift(y: Tensor, weight: Option<&Tensor>, bias: Option<&Tensor>) -> Result<Tensor> {
    let y = match weight {
        Some(weight) => tensor(y.broadcast_mul(weight))?,
        None => y,
    };
    match bias {
        Some(bias) => tensor(y.broadcast_add(bias)),
        None => Ok(y),
    }
}

/// `x` in value, with its gradient multiplied by `factor` (same shape) on the way back.
pub fn scale_gradient(x: &Tensor, factor: &Tensor) -> Result<Tensor> {
    // x - detach(x) is exactly zero, so the value is untouched.
    let zero = tensor(x - x.detach())?;
    tensor(x.detach() + tensor(zero * factor)?)
}

fn scale_gradient_by(x: &Tensor, factor: f64) -> Result<Tensor> {
    let zero = tensor(x - x.detach())?;
    tensor(x.detach() + tensor(zero * factor)?)
}

/// Relevance `x ⊙ ∂` of a leaf after the backward pass; the gradient's absence is an error.
pub fn relevance_of(leaf: &Tensor, gradients: &lapidary_kernels::GradStore) -> Result<Tensor> {
    let gradient = gradients.get(leaf).ok_or_else(|| {
        Error::invalid(
            "gradient at the site",
            "absent",
            "present: the target must depend on the site",
        )
    })?;
    tensor(leaf.detach() * gradient)
}
