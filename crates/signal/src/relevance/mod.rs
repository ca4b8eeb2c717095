//! The relevance lens: layer-wise relevance propagation, carried by the tensor engine's own
//! backward pass.
//!
//! A set of [`RelevanceRules`] says what each kind of operation does with relevance. It can be
//! carried in two forms:
//!
//! * [`Form::ModifiedGradient`]: the forward pass is written so that its *derivative* is the rule
//!   and `R = x ⊙ ∂` everywhere (Arras et al., arXiv 2502.15886; Achtibat et al., AttnLRP, arXiv
//!   2402.05602; Ali et al., arXiv 2202.07304). A factor that is *detached* keeps no relevance; a
//!   product that shares it *uniformly* gives each factor the same part. One ordinary backward
//!   pass.
//! * [`Form::Explicit`]: what flows backward is the relevance itself, divided and multiplied at
//!   each operation as the rules are printed. Slower, and able to say what a gradient cannot:
//!   stabilisers at every quotient, rules that favour positive parts, sums that are balanced
//!   (Chefer et al., arXiv 2012.09838).
//!
//! With `ε = 0` both give the same numbers wherever both are defined.

mod explicit;
mod modified;

use std::sync::Arc;

use crate::error::tensor;
use crate::{Error, Lens, Linear, Result, Signal};
use lapidary_kernels::{Activation, AttentionOptions, GradStore, SoftmaxMask, Tensor, add};

/// What travels backward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// A gradient, which times the value is the relevance.
    ModifiedGradient,
    /// The relevance itself.
    Explicit,
}

/// What a linear layer does with relevance.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum LinearRule {
    /// `R_i = x_i Σ_j W_ji R_j / (z_j + ε sign z_j)`; the bias keeps its share.
    Epsilon,
    /// The ε-rule of `W + γ max(W, 0)` and `b + γ max(b, 0)`. Explicit form only.
    Gamma(f64),
    /// `α` times the shares of the products `x_i W_ji` that are positive, less `α − 1` times those
    /// of the negative ones. Biases are ignored. Explicit form only.
    AlphaBeta {
        /// `α`, at least 1; `β = α − 1`.
        alpha: f64,
    },
}

/// What a sum of two signals does with relevance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SumRule {
    /// Each term's ratio to the sum.
    Proportional,
    /// The same, and then rescaled so that the two sums over a sample add up to that of the
    /// relevance, in the ratio of their magnitudes. Explicit form only.
    Balanced,
}

/// What an elementwise nonlinearity does with relevance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ActivationRule {
    /// All relevance passes. As a modified gradient, `y = x · detach(f(x) / x)`, which functions
    /// with `f(0) ≠ 0` do not have: they fall back to gradient times input.
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
    /// Each product shares uniformly between its factors, and all relevance passes the softmax
    /// (Chefer et al.). Explicit form only.
    PassSoftmax,
    /// Gradient times input.
    Gradient,
}

/// What normalisation does with relevance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormRule {
    /// The standard deviation is a constant (LN rule); the mean still is subtracted.
    Detach,
    /// All relevance passes. Explicit form only.
    Identity,
    /// Gradient times input.
    Gradient,
}

/// What a product of two signals does with relevance.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProductRule {
    /// Half to each factor.
    Uniform,
    /// The gate is a constant and all relevance goes to the content.
    Detach,
    /// Gradient times input: each factor gets all of it, so relevance doubles.
    Gradient,
}

/// What the relevance of the outputs is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seed {
    /// The explained number.
    Value,
    /// One. Explicit form only.
    One,
}

/// One rule for each kind of operation.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RelevanceRules {
    /// How the rules are carried.
    pub form: Form,
    /// `ε`: a denominator `z` becomes `z + ε sign z`. As a modified gradient only those of linear
    /// layers do, where relevance is damped by `z / (z + ε sign z)`. Zero gives all of it back to
    /// the inputs and the bias.
    pub epsilon: f64,
    /// Linear layers.
    pub linear: LinearRule,
    /// Sums of two signals.
    pub sum: SumRule,
    /// Elementwise nonlinearities.
    pub activation: ActivationRule,
    /// Attention.
    pub attention: AttentionRule,
    /// Layer and RMS norm.
    pub norm: NormRule,
    /// Products of two signals.
    pub product: ProductRule,
    /// Relevance of the outputs.
    pub seed: Seed,
}

impl RelevanceRules {
    /// AttnLRP: relevance also flows through the attention weights.
    pub const fn attention_aware() -> Self {
        Self {
            epsilon: 1e-6,
            attention: AttentionRule::Uniform,
            ..Self::value_only()
        }
    }

    /// CP-LRP with `ε = 0`: attention weights are constants. The reverse-mode twin of streams
    /// without biases.
    pub const fn value_only() -> Self {
        Self {
            form: Form::ModifiedGradient,
            epsilon: 0.0,
            linear: LinearRule::Epsilon,
            sum: SumRule::Proportional,
            activation: ActivationRule::Identity,
            attention: AttentionRule::Detach,
            norm: NormRule::Detach,
            product: ProductRule::Uniform,
            seed: Seed::Value,
        }
    }

    /// Plain gradient times input.
    pub const fn gradient_times_input() -> Self {
        Self {
            activation: ActivationRule::Gradient,
            attention: AttentionRule::Gradient,
            norm: NormRule::Gradient,
            product: ProductRule::Gradient,
            ..Self::value_only()
        }
    }

    /// The deep Taylor rules of Chefer et al. (arXiv 2012.09838): positive parts of linear layers
    /// (`α = 1`, `β = 0`), balanced sums, halved products; activations, norms and softmax pass
    /// what they get. The outputs start with 1.
    pub const fn deep_taylor() -> Self {
        Self {
            form: Form::Explicit,
            epsilon: 1e-9,
            linear: LinearRule::AlphaBeta { alpha: 1.0 },
            sum: SumRule::Balanced,
            activation: ActivationRule::Identity,
            attention: AttentionRule::PassSoftmax,
            norm: NormRule::Identity,
            product: ProductRule::Uniform,
            seed: Seed::One,
        }
    }

    /// The same rules in the explicit form.
    pub const fn explicit(self) -> Self {
        Self {
            form: Form::Explicit,
            ..self
        }
    }

    /// Refuses numbers out of range, and rules that a modified gradient cannot carry.
    pub(crate) fn validate(&self) -> Result<()> {
        let number = |what: &str, value: f64, least: f64| match value.is_finite() && value >= least
        {
            true => Ok(()),
            false => Err(Error::invalid(
                format!("{what} of the relevance rules"),
                value,
                format!("a number of at least {least}"),
            )),
        };
        number("epsilon", self.epsilon, 0.0)?;
        match self.linear {
            LinearRule::Epsilon => {}
            LinearRule::Gamma(gamma) => number("gamma", gamma, 0.0)?,
            LinearRule::AlphaBeta { alpha } => number("alpha", alpha, 1.0)?,
        }
        let needs_explicit = self.linear != LinearRule::Epsilon
            || self.sum == SumRule::Balanced
            || self.attention == AttentionRule::PassSoftmax
            || self.norm == NormRule::Identity
            || self.seed == Seed::One;
        if self.form == Form::ModifiedGradient && needs_explicit {
            return Err(Error::invalid(
                "form of the relevance rules",
                "modified gradient",
                "explicit for gamma and alpha-beta layers, balanced sums, passing norms and \
                 softmaxes, and outputs that start with 1",
            ));
        }
        Ok(())
    }

    /// The relevance of a site whose value is `value`, once a backward pass has brought `arrived`
    /// there.
    pub fn relevance(&self, value: &Tensor, arrived: &Tensor) -> Result<Tensor> {
        match self.form {
            Form::ModifiedGradient => tensor(value.detach() * arrived),
            Form::Explicit => Ok(arrived.clone()),
        }
    }

    /// The value that a number is made of whose backward pass starts the relevance.
    pub(crate) fn read_out(&self, value: &Tensor) -> Result<Tensor> {
        match (self.form, self.seed) {
            (Form::Explicit, Seed::Value) => explicit::enter(value),
            _ => Ok(value.clone()),
        }
    }

    pub(crate) fn linear(&self, x: &Tensor, layer: &Linear) -> Result<Tensor> {
        match self.form {
            Form::ModifiedGradient => self.damped_linear(x, layer),
            Form::Explicit => self.explicit_linear(x, layer),
        }
    }

    /// A sum of which one term at least is under these rules.
    pub(crate) fn add(&self, a: &Signal, b: &Signal) -> Result<Tensor> {
        match self.form {
            Form::ModifiedGradient => Ok(add(&a.value, &b.value)?),
            Form::Explicit => self.explicit_add(a, b),
        }
    }

    /// A product with one number.
    pub(crate) fn scale(&self, x: &Tensor, factor: f64) -> Result<Tensor> {
        match self.form {
            Form::ModifiedGradient => tensor(x * factor),
            Form::Explicit => explicit::pass(x, &tensor(x.detach() * factor)?),
        }
    }

    /// A product with one number for each element of the result.
    pub(crate) fn multiply_constant(&self, x: &Tensor, constant: &Tensor) -> Result<Tensor> {
        match self.form {
            Form::ModifiedGradient => tensor(x.broadcast_mul(constant)),
            Form::Explicit => {
                let product = explicit::enter(x)?.broadcast_mul(&constant.detach());
                explicit::leave_undamped(&tensor(product)?)
            }
        }
    }

    /// A product of `content` and `gate`, of which one at least is under these rules.
    pub(crate) fn gate(&self, content: &Signal, gate: &Signal) -> Result<Tensor> {
        match (is_on(content), is_on(gate)) {
            (true, true) if self.form == Form::Explicit => {
                self.explicit_product(&content.value, &gate.value)
            }
            (true, true) => self.shared_product(&content.value, &gate.value),
            (true, false) => self.multiply_constant(&content.value, &gate.value),
            (false, _) => self.multiply_constant(&gate.value, &content.value),
        }
    }

    /// A map that is linear in `x`.
    pub(crate) fn linear_map(
        &self,
        x: &Tensor,
        map: impl FnOnce(&Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        match self.form {
            Form::ModifiedGradient => map(x),
            Form::Explicit => self.leave(&map(&explicit::enter(x)?)?, 1.0),
        }
    }

    pub(crate) fn activate(&self, x: &Tensor, activation: Activation) -> Result<Tensor> {
        match self.form {
            Form::ModifiedGradient => self.secant_activate(x, activation),
            Form::Explicit => self.explicit_activate(x, activation),
        }
    }

    pub(crate) fn layer_norm(
        &self,
        x: &Tensor,
        weight: Option<&Tensor>,
        bias: Option<&Tensor>,
        epsilon: f64,
    ) -> Result<Tensor> {
        let norm = |x: &Tensor| self.frozen_layer_norm(x, weight, bias, epsilon);
        match (self.form, self.norm) {
            (Form::ModifiedGradient, _) => norm(x),
            (Form::Explicit, NormRule::Identity) => explicit::pass(x, &norm(x)?),
            (Form::Explicit, _) => self.leave(&norm(&explicit::enter(x)?)?, 1.0),
        }
    }

    pub(crate) fn rms_norm(
        &self,
        x: &Tensor,
        weight: Option<&Tensor>,
        epsilon: f64,
    ) -> Result<Tensor> {
        let norm = |x: &Tensor| self.frozen_rms_norm(x, weight, epsilon);
        match (self.form, self.norm) {
            (Form::ModifiedGradient, _) => norm(x),
            (Form::Explicit, NormRule::Gradient) => self.leave(&norm(&explicit::enter(x)?)?, 1.0),
            // Without its deviation the norm multiplies each feature by a number.
            (Form::Explicit, _) => explicit::pass(x, &norm(x)?),
        }
    }

    /// The whole of attention at once.
    pub(crate) fn attention(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        options: &AttentionOptions,
    ) -> Result<Tensor> {
        if self.form == Form::ModifiedGradient
            && let Some(mixed) = self.fused_attention(q, k, v, options)?
        {
            return Ok(mixed);
        }
        self.mix(&self.attention_weights(q, k, options)?, v)
    }

    /// The weights `[batch, heads, query, key]`.
    pub(crate) fn attention_weights(
        &self,
        q: &Tensor,
        k: &Tensor,
        options: &AttentionOptions,
    ) -> Result<Tensor> {
        match self.form {
            Form::ModifiedGradient => self.shared_weights(q, k, options),
            Form::Explicit => self.explicit_weights(q, k, options),
        }
    }

    /// Values `[batch, groups, key, width]` mixed by weights that have relevance of their own.
    pub(crate) fn mix(&self, weights: &Tensor, v: &Tensor) -> Result<Tensor> {
        match self.form {
            Form::ModifiedGradient => self.shared_mix(weights, v),
            Form::Explicit => self.explicit_mix(weights, v),
        }
    }

    pub(crate) fn softmax(&self, x: &Tensor, mask: &SoftmaxMask) -> Result<Tensor> {
        let softmax = |x: &Tensor| Ok(lapidary_kernels::softmax(x, mask)?);
        match self.form {
            Form::ModifiedGradient => softmax(x),
            Form::Explicit => self.explicit_softmax(x, softmax),
        }
    }
}

fn is_on(signal: &Signal) -> bool {
    matches!(signal.lens, Lens::Relevance(_))
}

/// `x` in value, with its gradient multiplied by `factor` (same shape) on the way back.
pub fn scale_gradient(x: &Tensor, factor: &Tensor) -> Result<Tensor> {
    Ok(lapidary_kernels::scale_gradient(x, factor)?)
}

/// Relevance `x ⊙ ∂` of a leaf after the backward pass under a modified gradient; the gradient's
/// absence is an error.
pub fn relevance_of(leaf: &Tensor, gradients: &GradStore) -> Result<Tensor> {
    let gradient = gradients.get(leaf).ok_or_else(|| {
        Error::invalid(
            "gradient at the site",
            "absent",
            "present: the target must depend on the site",
        )
    })?;
    tensor(leaf.detach() * gradient)
}

impl Signal {
    /// The value from which an explained number is read. Under explicit relevance the backward
    /// pass of that number starts with the relevance of the outputs; otherwise the value itself.
    pub fn read_out(&self) -> Result<Tensor> {
        match &self.lens {
            Lens::Relevance(rules) => rules.read_out(&self.value),
            _ => Ok(self.value.clone()),
        }
    }

    /// The rules that the relevance lens follows, when it is on.
    pub fn relevance_rules(&self) -> Option<&Arc<RelevanceRules>> {
        match &self.lens {
            Lens::Relevance(rules) => Some(rules),
            _ => None,
        }
    }

    /// A linear map of the value alone.
    pub(crate) fn mapped_value(
        &self,
        map: impl FnOnce(&Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        match &self.lens {
            Lens::Relevance(rules) => rules.linear_map(&self.value, map),
            _ => map(&self.value),
        }
    }
}
