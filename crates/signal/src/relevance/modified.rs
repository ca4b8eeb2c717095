//! The rules as a modified gradient: forward passes whose derivative is the rule.

use super::{ActivationRule, AttentionRule, NormRule, ProductRule, RelevanceRules, scale_gradient};
use crate::error::tensor;
use crate::{Linear, Result};
use lapidary_kernels::{
    Activation, AttentionOptions, D, Tensor, activate, activation_secant, attention, layer_norm,
    naive, rms_norm,
};

impl RelevanceRules {
    pub(super) fn damped_linear(&self, x: &Tensor, layer: &Linear) -> Result<Tensor> {
        let z = layer.apply(x)?;
        if self.epsilon == 0.0 {
            return Ok(z);
        }
        // z / (z + ε sign z) = |z| / (|z| + ε)
        let magnitude = tensor(z.detach().abs())?;
        let damping = tensor(&magnitude / tensor(&magnitude + self.epsilon)?)?;
        scale_gradient(&z, &damping)
    }

    pub(super) fn secant_activate(&self, x: &Tensor, activation: Activation) -> Result<Tensor> {
        match self.activation {
            ActivationRule::Identity if activation.passes_origin() => {
                let secant = activation_secant(x, activation)?;
                tensor(x * secant.detach())
            }
            _ => Ok(activate(x, activation)?),
        }
    }

    /// Layer norm whose deviation is a constant, unless the rule is the gradient.
    pub(super) fn frozen_layer_norm(
        &self,
        x: &Tensor,
        weight: Option<&Tensor>,
        bias: Option<&Tensor>,
        epsilon: f64,
    ) -> Result<Tensor> {
        if self.norm == NormRule::Gradient {
            return Ok(layer_norm(x, weight, bias, epsilon)?);
        }
        let centred = tensor(x.broadcast_sub(&tensor(x.mean_keepdim(D::Minus1))?))?;
        let variance = tensor(tensor(centred.detach().sqr())?.mean_keepdim(D::Minus1))?;
        let deviation = tensor(tensor(variance + epsilon)?.sqrt())?;
        scale_shift(tensor(centred.broadcast_div(&deviation))?, weight, bias)
    }

    /// RMS norm whose deviation is a constant, unless the rule is the gradient.
    pub(super) fn frozen_rms_norm(
        &self,
        x: &Tensor,
        weight: Option<&Tensor>,
        epsilon: f64,
    ) -> Result<Tensor> {
        if self.norm == NormRule::Gradient {
            return Ok(rms_norm(x, weight, epsilon)?);
        }
        let square = tensor(tensor(x.detach().sqr())?.mean_keepdim(D::Minus1))?;
        let deviation = tensor(tensor(square + epsilon)?.sqrt())?;
        scale_shift(tensor(x.broadcast_div(&deviation))?, weight, None)
    }

    /// Attention that need not lay out its weights, where the rule has such a form.
    pub(super) fn fused_attention(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        options: &AttentionOptions,
    ) -> Result<Option<Tensor>> {
        Ok(match self.attention {
            // R(A V): half to A, half to V. R(A) reaches the scores by the softmax's gradient,
            // and of each score half goes to the query and half to the key.
            AttentionRule::Uniform => Some(attention(
                &scale_gradient_by(q, 0.25)?,
                &scale_gradient_by(k, 0.25)?,
                &scale_gradient_by(v, 0.5)?,
                options,
            )?),
            AttentionRule::Gradient => Some(attention(q, k, v, options)?),
            AttentionRule::Detach | AttentionRule::PassSoftmax => None,
        })
    }

    pub(super) fn shared_weights(
        &self,
        q: &Tensor,
        k: &Tensor,
        options: &AttentionOptions,
    ) -> Result<Tensor> {
        let (q, k) = match self.attention {
            AttentionRule::Detach => (q.detach(), k.detach()),
            AttentionRule::Uniform | AttentionRule::PassSoftmax => {
                (scale_gradient_by(q, 0.5)?, scale_gradient_by(k, 0.5)?)
            }
            AttentionRule::Gradient => (q.clone(), k.clone()),
        };
        Ok(naive::attention_weights(&q, &k, options)?)
    }

    pub(super) fn shared_mix(&self, weights: &Tensor, v: &Tensor) -> Result<Tensor> {
        let (weights, v) = match self.attention {
            AttentionRule::Uniform | AttentionRule::PassSoftmax => {
                (scale_gradient_by(weights, 0.5)?, scale_gradient_by(v, 0.5)?)
            }
            AttentionRule::Detach | AttentionRule::Gradient => (weights.clone(), v.clone()),
        };
        weighted(&weights, &v)
    }

    pub(super) fn shared_product(&self, content: &Tensor, gate: &Tensor) -> Result<Tensor> {
        let (content, gate) = match self.product {
            ProductRule::Uniform => (
                scale_gradient_by(content, 0.5)?,
                scale_gradient_by(gate, 0.5)?,
            ),
            ProductRule::Detach => (content.clone(), gate.detach()),
            ProductRule::Gradient => (content.clone(), gate.clone()),
        };
        tensor(content.broadcast_mul(&gate))
    }
}

/// `A V` for weights `[batch, heads, query, key]` and values `[batch, groups, key, width]`.
pub(super) fn weighted(weights: &Tensor, v: &Tensor) -> Result<Tensor> {
    let heads = tensor(weights.dim(1))?;
    let v = tensor(naive::repeat_groups(v, heads)?.contiguous())?;
    tensor(weights.matmul(&v))
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

fn scale_gradient_by(x: &Tensor, factor: f64) -> Result<Tensor> {
    let factor = tensor(tensor(x.ones_like())? * factor)?;
    scale_gradient(x, &factor)
}
