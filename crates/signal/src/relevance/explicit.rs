//! The rules as they are printed: what flows backward is relevance.
//!
//! Between two operations the backward pass carries `R`. An operation *leaves* by a division of
//! what arrives by its output, runs its own derivative, and *enters* by a multiplication with its
//! input: `R_i = x_i Σ_j ∂z_j/∂x_i · R_j / z_j`, which for a linear operation is the ε-rule.
//! Rules that pass relevance unchanged go round the operation.

use super::modified::weighted;
use super::{
    ActivationRule, AttentionRule, LinearRule, ProductRule, RelevanceRules, Signal, SumRule, is_on,
    scale_gradient,
};
use crate::error::tensor;
use crate::{Linear, Result};
use lapidary_kernels::{
    Activation, AttentionOptions, Tensor, activate, add, balanced_sum, linear, naive,
    pass_gradient, stabilised_reciprocal,
};

/// `x`, whose relevance is what arrives times `x`.
pub(super) fn enter(x: &Tensor) -> Result<Tensor> {
    scale_gradient(x, &x.detach())
}

/// `value`, whose relevance goes to `x` unchanged.
pub(super) fn pass(x: &Tensor, value: &Tensor) -> Result<Tensor> {
    Ok(pass_gradient(x, value)?)
}

/// `z`, which sends back `R / z`, and nothing where `z` is zero: for operations that have one
/// share in each output, where a stabiliser would have nothing to stabilise.
pub(super) fn leave_undamped(z: &Tensor) -> Result<Tensor> {
    scale_gradient(z, &stabilised_reciprocal(z, 0.0, 0.0)?)
}

impl RelevanceRules {
    /// `z`, which sends back `R / (factors · z + ε sign z)`: with as many `factors` as the
    /// operation multiplies, each gets an equal part.
    ///
    /// The sign of zero is 1, but where positive parts are shared, nothing is divided by zero.
    pub(super) fn leave(&self, z: &Tensor, factors: f64) -> Result<Tensor> {
        let has_sign = self.epsilon > 0.0 && !matches!(self.linear, LinearRule::AlphaBeta { .. });
        let at_zero = if has_sign { 1.0 / self.epsilon } else { 0.0 };
        let denominator = tensor(z.detach() * factors)?;
        let reciprocal = stabilised_reciprocal(&denominator, self.epsilon, at_zero)?;
        scale_gradient(z, &reciprocal)
    }

    pub(super) fn explicit_linear(&self, x: &Tensor, layer: &Linear) -> Result<Tensor> {
        let x_entered = enter(x)?;
        match self.linear {
            LinearRule::Epsilon => self.leave(&layer.apply(&x_entered)?, 1.0),
            LinearRule::Gamma(gamma) => {
                let favoured = favour_positive(layer, gamma)?;
                let z = self.leave(&favoured.apply(&x_entered)?, 1.0)?;
                pass(&z, &layer.apply(x)?)
            }
            LinearRule::AlphaBeta { alpha } => {
                let shares = self.positive_and_negative(&x_entered, layer, alpha)?;
                pass(&shares, &layer.apply(x)?)
            }
        }
    }

    /// With `x⁺ = max(x, 0)`, `x⁻ = min(x, 0)` and the same of `W`: `α` times what leaves
    /// `Z⁺ = x⁺ W⁺ + x⁻ W⁻`, less `α − 1` times what leaves `Z⁻ = x⁺ W⁻ + x⁻ W⁺`. Only the way
    /// back of the result is of use.
    fn positive_and_negative(&self, x: &Tensor, layer: &Linear, alpha: f64) -> Result<Tensor> {
        let [x_above, x_below] = parts(x)?;
        let [w_above, w_below] = parts(&layer.dense_weight()?.detach())?;
        let sum = |a: &Tensor, b: &Tensor| -> Result<Tensor> {
            let z = tensor(linear(&x_above, a, None)? + linear(&x_below, b, None)?)?;
            self.leave(&z, 1.0)
        };
        let activator = sum(&w_above, &w_below)?;
        if alpha == 1.0 {
            return Ok(activator);
        }
        let inhibitor = sum(&w_below, &w_above)?;
        tensor(tensor(activator * alpha)? - tensor(inhibitor * (alpha - 1.0))?)
    }

    pub(super) fn explicit_add(&self, a: &Signal, b: &Signal) -> Result<Tensor> {
        if self.sum == SumRule::Balanced {
            let shape = add(&a.value.detach(), &b.value.detach())?;
            let spread = |x: &Signal| -> Result<Tensor> {
                tensor(tensor(x.value.broadcast_as(shape.shape()))?.contiguous())
            };
            return Ok(balanced_sum(&spread(a)?, &spread(b)?, self.epsilon)?);
        }
        // A constant takes its share and keeps it.
        let entered = |x: &Signal| match is_on(x) {
            true => enter(&x.value),
            false => Ok(x.value.detach()),
        };
        self.leave(&add(&entered(a)?, &entered(b)?)?, 1.0)
    }

    pub(super) fn explicit_product(&self, content: &Tensor, gate: &Tensor) -> Result<Tensor> {
        match self.product {
            ProductRule::Uniform => {
                let value = tensor(content.detach().broadcast_mul(&gate.detach()))?;
                let halves = tensor(content * 0.5)?.broadcast_add(&tensor(gate * 0.5)?);
                pass(&tensor(halves)?, &value)
            }
            ProductRule::Detach => self.multiply_constant(content, gate),
            ProductRule::Gradient => {
                let product = enter(content)?.broadcast_mul(&enter(gate)?);
                leave_undamped(&tensor(product)?)
            }
        }
    }

    pub(super) fn explicit_activate(&self, x: &Tensor, activation: Activation) -> Result<Tensor> {
        match self.activation {
            ActivationRule::Identity => pass(x, &activate(&x.detach(), activation)?),
            ActivationRule::Gradient => leave_undamped(&activate(&enter(x)?, activation)?),
        }
    }

    pub(super) fn explicit_weights(
        &self,
        q: &Tensor,
        k: &Tensor,
        options: &AttentionOptions,
    ) -> Result<Tensor> {
        if self.attention == AttentionRule::Detach {
            return Ok(naive::attention_weights(&q.detach(), &k.detach(), options)?);
        }
        let heads = tensor(q.dim(1))?;
        let k = tensor(naive::repeat_groups(&enter(k)?, heads)?.transpose(2, 3))?;
        let q = tensor(enter(q)?.contiguous())?;
        let product = tensor(q.matmul(&tensor(k.contiguous())?))?;
        let product = self.leave(&product, self.factors())?;
        let scores = pass(&product, &tensor(product.detach() * options.scale)?)?;
        self.explicit_softmax(&scores, |scores| {
            Ok(naive::attention_softmax(scores, options)?)
        })
    }

    /// `R_S = S ⊙ (R_A − A Σ_j R_A)`, the softmax's derivative at `R_A / A`, times the scores; or
    /// `R_S = R_A`.
    pub(super) fn explicit_softmax(
        &self,
        scores: &Tensor,
        softmax: impl FnOnce(&Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        match self.attention {
            AttentionRule::PassSoftmax => pass(scores, &softmax(&scores.detach())?),
            _ => leave_undamped(&softmax(&enter(scores)?)?),
        }
    }

    pub(super) fn explicit_mix(&self, weights: &Tensor, v: &Tensor) -> Result<Tensor> {
        let v = enter(v)?;
        match self.attention {
            AttentionRule::Detach => self.leave(&weighted(&weights.detach(), &v)?, 1.0),
            _ => self.leave(&weighted(&enter(weights)?, &v)?, self.factors()),
        }
    }

    /// How many ways each product of attention shares its relevance.
    fn factors(&self) -> f64 {
        match self.attention {
            AttentionRule::Uniform | AttentionRule::PassSoftmax => 2.0,
            AttentionRule::Detach | AttentionRule::Gradient => 1.0,
        }
    }
}

/// `max(x, 0)` and `min(x, 0)`.
fn parts(x: &Tensor) -> Result<[Tensor; 2]> {
    let below = tensor(tensor(tensor(x.neg())?.relu())?.neg())?;
    Ok([tensor(x.relu())?, below])
}

/// The layer `W + γ max(W, 0)`, `b + γ max(b, 0)`.
fn favour_positive(layer: &Linear, gamma: f64) -> Result<Linear> {
    let favour = |t: &Tensor| {
        let t = t.detach();
        tensor(&t + tensor(tensor(t.relu())? * gamma)?)
    };
    Linear::new(
        favour(&layer.dense_weight()?)?,
        layer.bias().map(favour).transpose()?,
    )
}
