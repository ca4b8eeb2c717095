//! The contextual lens: a value carried as a relevant part and the rest (Hsu, Zhou, Cherapanamjeri,
//! Huang, Odisho, Carroll, Yu, arXiv 2407.00886; after Murdoch, Liu, Yu, arXiv 1801.05453).
//!
//! With `r` the relevant part and `g` the irrelevant one, `r + g = x` at every site. Only `r` is
//! stored, `[sources, ..shape of x]`, one for each of several sources that are followed at once:
//! `x` is that of the plain pass, computed once for all of them, and `g = x − r`. So the sum holds
//! by construction and no error of it grows, while every rule below gives both parts the sum that
//! the operation has.
//!
//! * a linear map acts on each part; a bias is shared element by element,
//!   `r = r W + b |r W| / (|r W| + |g W|)`, and where both are zero it is irrelevant;
//! * a norm divides both by the deviation of the true `x`, each less its own mean; its shift is
//!   shared as a bias is, by the magnitudes of the norm's inputs;
//! * an activation gives `g = f(g)`, `r = f(r + g) − f(g)`;
//! * a product of two signals likewise keeps what is left without relevant parts,
//!   `g = g_a g_b`, so `r = a b − g_a g_b`;
//! * attention is [`AttentionSplit::Frozen`] or [`AttentionSplit::Split`];
//! * whatever comes without the lens is irrelevant, but for constants that are added, which are
//!   biases.

use std::sync::Arc;

use crate::error::tensor;
use crate::{Error, Lens, Linear, Result, Signal};
use lapidary_kernels::{
    Activation, AttentionOptions, D, ScoreBias, Tensor, activate, add, layer_norm,
    merged_attention, naive, rms_norm, stream_mix,
};

/// What becomes of the weights of attention.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AttentionSplit {
    /// Weights are those of the true values, and mix each part: `r = A r_V`.
    #[default]
    Frozen,
    /// Queries and keys are followed too. The relevant weights are the softmax of the relevant
    /// scores alone: `r = softmax(r_Q r_Kᵀ) r_V`, and the rest is irrelevant.
    Split,
}

/// The rules that relevant parts obey.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ContextualRules {
    /// Attention.
    pub attention: AttentionSplit,
    /// Whether parts of opposite sign are settled, element by element: the larger takes the
    /// whole value and the smaller becomes zero, which stops cancelling parts from growing. After
    /// linear layers, residual sums and norms; with [`AttentionSplit::Split`] not within
    /// attention, from its norm to its output projection.
    pub stabilise: bool,
}

/// The relevant parts beside one value.
#[derive(Clone, Debug)]
pub struct Contextual {
    /// `[sources, ..shape of the value]`.
    relevant: Tensor,
    rules: Arc<ContextualRules>,
}

impl Contextual {
    fn new(value: &Tensor, relevant: Tensor, rules: ContextualRules) -> Result<Self> {
        match relevant.dims().split_first() {
            Some((sources, shape)) if *sources > 0 && shape == value.dims() => Ok(Self {
                relevant,
                rules: Arc::new(rules),
            }),
            _ => Err(Error::invalid(
                "shape of the relevant parts",
                relevant.dims(),
                format!("[sources, ..{:?}]", value.dims()),
            )),
        }
    }

    /// The relevant parts, `[sources, ..shape of the value]`.
    pub fn relevant(&self) -> &Tensor {
        &self.relevant
    }

    /// How many sources are followed at once.
    pub fn sources(&self) -> usize {
        self.relevant.dims().first().copied().unwrap_or(0)
    }

    /// The rules in force.
    pub fn rules(&self) -> &ContextualRules {
        &self.rules
    }

    fn splits_attention(&self) -> bool {
        self.rules.attention == AttentionSplit::Split
    }

    /// What is not relevant of `value`.
    fn rest(&self, value: &Tensor) -> Result<Tensor> {
        tensor(value.broadcast_sub(&self.relevant))
    }

    /// The same sources and rules with other parts.
    pub(crate) fn with(&self, relevant: Tensor) -> Self {
        Self {
            relevant,
            rules: self.rules.clone(),
        }
    }

    /// No relevant part in a value of this shape.
    fn nothing_in(&self, value: &Tensor) -> Result<Self> {
        let mut shape = vec![self.sources()];
        shape.extend(value.dims());
        let zero = Tensor::zeros(shape, value.dtype(), value.device());
        Ok(self.with(tensor(zero)?))
    }

    /// The parts with new dimensions of length one before the value's, so that they broadcast
    /// as a value of `rank` does.
    fn lifted(&self, rank: usize) -> Result<Tensor> {
        let dims = self.relevant.dims();
        let missing = (rank + 1).saturating_sub(dims.len());
        if missing == 0 {
            return Ok(self.relevant.clone());
        }
        let (sources, shape) = dims.split_at(1);
        let ones = vec![1; missing];
        tensor(self.relevant.reshape([sources, &ones, shape].concat()))
    }

    /// Settles parts of opposite sign, when the rules say so.
    fn settled(self, value: &Tensor) -> Result<Self> {
        if !self.rules.stabilise {
            return Ok(self);
        }
        let rest = self.rest(value)?;
        let opposed = tensor(tensor(&self.relevant * &rest)?.lt(0.0))?;
        let larger = tensor(tensor(self.relevant.abs())?.ge(&tensor(rest.abs())?))?;
        let whole = tensor(value.broadcast_as(self.relevant.shape()))?;
        let nothing = tensor(self.relevant.zeros_like())?;
        let winner = tensor(larger.where_cond(&whole, &nothing))?;
        let relevant = tensor(opposed.where_cond(&winner, &self.relevant))?;
        Ok(self.with(relevant))
    }

    /// The layer on a value `x` and its parts.
    fn linear(&self, x: &Tensor, layer: &Linear) -> Result<(Tensor, Self)> {
        let unbiased = layer.apply_without_bias(x)?;
        let relevant = self.with(layer.apply_without_bias(&self.relevant)?);
        match layer.bias() {
            None => Ok((unbiased, relevant)),
            Some(bias) => {
                let share = relevant.share(&unbiased)?;
                let given = tensor(share.broadcast_mul(bias))?;
                let relevant = tensor(&relevant.relevant + given)?;
                Ok((add(&unbiased, bias)?, self.with(relevant)))
            }
        }
    }

    /// `|r| / (|r| + |g|)`; zero where both are.
    fn share(&self, value: &Tensor) -> Result<Tensor> {
        let own = tensor(self.relevant.abs())?;
        let both = tensor(&own + tensor(self.rest(value)?.abs())?)?;
        let neither = tensor(tensor(both.eq(0.0))?.to_dtype(both.dtype()))?;
        tensor(own / tensor(both + neither)?)
    }

    /// A constant added to `value`, giving one of rank `rank`.
    fn add_constant(&self, value: &Tensor, constant: &Tensor, rank: usize) -> Result<Self> {
        let share = self.with(self.share(value)?).lifted(rank)?;
        let given = tensor(share.broadcast_mul(constant))?;
        Ok(self.with(tensor(given.broadcast_add(&self.lifted(rank)?))?))
    }

    /// `f(x) − f(g)`, with `output = f(x)`.
    fn activate(&self, x: &Tensor, output: &Tensor, activation: Activation) -> Result<Self> {
        let rest = activate(&self.rest(x)?, activation)?;
        Ok(self.with(tensor(output.broadcast_sub(&rest))?))
    }

    /// The parts of `x` through its norm, layer or RMS.
    fn norm(
        &self,
        x: &Tensor,
        centred: bool,
        weight: Option<&Tensor>,
        bias: Option<&Tensor>,
        epsilon: f64,
    ) -> Result<Self> {
        let less_mean = |t: &Tensor| match centred {
            true => tensor(t.broadcast_sub(&tensor(t.mean_keepdim(D::Minus1))?)),
            false => Ok(t.clone()),
        };
        let square = tensor(tensor(less_mean(x)?.sqr())?.mean_keepdim(D::Minus1))?;
        let deviation = tensor(tensor(square + epsilon)?.sqrt())?;
        let mut relevant = tensor(less_mean(&self.relevant)?.broadcast_div(&deviation))?;
        if let Some(weight) = weight {
            relevant = tensor(relevant.broadcast_mul(weight))?;
        }
        if let Some(bias) = bias {
            relevant = tensor(relevant + tensor(self.share(x)?.broadcast_mul(bias))?)?;
        }
        Ok(self.with(relevant))
    }

    /// `[sources, batch, heads, length, width] -> [sources, batch, length, heads · width]`.
    fn merged(heads: &Tensor) -> Result<Tensor> {
        let (sources, batch, count, length, width) = tensor(heads.dims5())?;
        tensor(tensor(heads.transpose(2, 3))?.reshape((sources, batch, length, count * width)))
    }

    /// Mixes the positions of parts `[sources, batch, groups, key, width]` by `weights`
    /// `[batch, heads, query, key]`, as those of `value` were mixed.
    pub(crate) fn mix(&self, weights: &Tensor, value: &Tensor) -> Result<Self> {
        if self.splits_attention() {
            return Err(Error::Undefined {
                lens: "contextual",
                operation: "ready weights, as mechanisms of attention have them, with queries and keys followed",
                advice: "hold attention fixed (--frozen, or no --split-attention), or leave the site of its weights \
                         alone",
            });
        }
        let (.., groups, _, width) = tensor(self.relevant.dims5())?;
        let mixed = stream_mix(weights, &Self::merged(&self.relevant)?, groups)?;
        let (sources, batch, queries, inner) = tensor(mixed.dims4())?;
        let heads = inner / width.max(1);
        let split = tensor(mixed.reshape((sources, batch, queries, heads, width)))?;
        self.with(tensor(tensor(split.transpose(2, 3))?.contiguous())?)
            .settled(value)
    }
}

/// Every source as sequences of its own: `[sources, batch, ..] -> [sources · batch, ..]`.
fn folded(t: &Tensor) -> Result<Tensor> {
    tensor(tensor(t.flatten(0, 1))?.contiguous())
}

/// What `options` say of a batch, said of `sources` batches in a row.
fn repeated(options: &AttentionOptions, sources: usize) -> Result<AttentionOptions> {
    let repeat = |t: &Tensor| -> Result<Tensor> {
        match t.dims().first() {
            None | Some(1) if t.rank() == 4 => Ok(t.clone()),
            _ => tensor(Tensor::cat(&vec![t; sources], 0)),
        }
    };
    Ok(AttentionOptions {
        key_padding: options.key_padding.as_ref().map(repeat).transpose()?,
        bias: match &options.bias {
            Some(ScoreBias::Pairs(bias)) => Some(ScoreBias::Pairs(repeat(bias)?)),
            // The same for all sequences.
            other => other.clone(),
        },
        ..options.clone()
    })
}

impl Signal {
    /// Puts the contextual lens on: `relevant` `[sources, ..shape of the value]` holds the
    /// relevant part for each source, and what is left of the value is irrelevant.
    ///
    /// ```
    /// use lapidary_kernels::{Device, Tensor};
    /// use lapidary_signal::{Linear, Signal, contextual::ContextualRules};
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let x = Tensor::new(&[[1f32, 3.0]], &Device::Cpu)?;
    /// let first = Tensor::new(&[[[1f32, 0.0]]], &Device::Cpu)?; // one source: the first feature
    /// let weight = Tensor::new(&[[1f32, 1.0]], &Device::Cpu)?;
    /// let layer = Linear::new(weight, Some(Tensor::new(&[4f32], &Device::Cpu)?))?;
    /// let x = Signal::from(x).into_contextual(first, ContextualRules::default())?;
    /// let y = x.linear(&layer)?;
    /// assert_eq!(y.value().to_vec2::<f32>()?, [[8.0]]);
    /// // 1 · 1 and a quarter of the bias.
    /// assert_eq!(y.relevant()?.flatten_all()?.to_vec1::<f32>()?, [2.0]);
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// When the shape of `relevant` does not fit, or there is no source.
    pub fn into_contextual(self, relevant: Tensor, rules: ContextualRules) -> Result<Self> {
        let contextual = Contextual::new(&self.value, relevant, rules)?;
        Ok(self.with_contextual(contextual))
    }

    /// The relevant parts, when that lens is on.
    pub fn contextual(&self) -> Option<&Contextual> {
        match &self.lens {
            Lens::Contextual(contextual) => Some(contextual),
            _ => None,
        }
    }

    /// The relevant parts `[sources, ..shape of the value]`.
    ///
    /// # Errors
    /// When the contextual lens is not on.
    pub fn relevant(&self) -> Result<Tensor> {
        Ok(self.contextual_or_error()?.relevant.clone())
    }

    /// The irrelevant parts `[sources, ..shape of the value]`.
    ///
    /// # Errors
    /// When the contextual lens is not on.
    pub fn irrelevant(&self) -> Result<Tensor> {
        self.contextual_or_error()?.rest(&self.value)
    }

    fn contextual_or_error(&self) -> Result<&Contextual> {
        self.contextual()
            .ok_or_else(|| Error::invalid("lens", self.lens.name(), "contextual"))
    }

    /// This value with these parts.
    pub(crate) fn with_contextual(self, contextual: Contextual) -> Self {
        Self {
            value: self.value,
            lens: Lens::Contextual(contextual),
        }
    }

    /// A linear layer, its result settled or not.
    pub(crate) fn contextual_linear(
        &self,
        contextual: &Contextual,
        layer: &Linear,
        settle: bool,
    ) -> Result<Self> {
        let (value, parts) = contextual.linear(&self.value, layer)?;
        let parts = match settle {
            true => parts.settled(&value)?,
            false => parts,
        };
        Ok(Self::from(value).with_contextual(parts))
    }

    /// The output projection of attention, which belongs to attention when that is split.
    pub(crate) fn contextual_output(
        &self,
        contextual: &Contextual,
        layer: &Linear,
    ) -> Result<Self> {
        self.contextual_linear(contextual, layer, !contextual.splits_attention())
    }

    /// What feeds attention scores: the lens stays on when they are split, and is quiet there.
    pub(crate) fn contextual_scores(&self, contextual: &Contextual) -> Self {
        if !contextual.splits_attention() {
            return Self::from(self.value.clone());
        }
        let rules = ContextualRules {
            stabilise: false,
            ..*contextual.rules
        };
        Self::from(self.value.clone()).with_contextual(Contextual {
            relevant: contextual.relevant.clone(),
            rules: Arc::new(rules),
        })
    }

    /// A residual sum that gives `value`: pair by pair.
    pub(crate) fn contextual_sum(&self, other: &Self, value: Tensor) -> Result<Self> {
        let rank = value.rank();
        let parts = match (self.contextual(), other.contextual()) {
            (Some(a), Some(b)) => a.with(tensor(a.lifted(rank)?.broadcast_add(&b.lifted(rank)?))?),
            (Some(one), None) | (None, Some(one)) => {
                let wide = one.lifted(rank)?;
                let mut shape = vec![one.sources()];
                shape.extend(value.dims());
                one.with(tensor(tensor(wide.broadcast_as(shape))?.contiguous())?)
            }
            (None, None) => return Ok(Self::from(value)),
        };
        let parts = parts.settled(&value)?;
        Ok(Self::from(value).with_contextual(parts))
    }

    /// A constant that is added as a bias is, giving `value`.
    pub(crate) fn contextual_shift(
        &self,
        contextual: &Contextual,
        constant: &Tensor,
        value: Tensor,
    ) -> Result<Self> {
        let parts = contextual.add_constant(&self.value, constant, value.rank())?;
        Ok(Self::from(value).with_contextual(parts))
    }

    /// A product that gives `value`: `r = a b − g_a g_b`.
    pub(crate) fn contextual_product(&self, other: &Self, value: Tensor) -> Result<Self> {
        let rank = value.rank();
        let rest = |signal: &Self| -> Result<Tensor> {
            match signal.contextual() {
                Some(parts) => parts.with(parts.rest(&signal.value)?).lifted(rank),
                None => Ok(signal.value.clone()),
            }
        };
        let Some(parts) = self.contextual().or(other.contextual()) else {
            return Ok(Self::from(value));
        };
        let without = tensor(rest(self)?.broadcast_mul(&rest(other)?))?;
        let parts = parts.with(tensor(value.broadcast_sub(&without))?);
        Ok(Self::from(value).with_contextual(parts))
    }

    /// A product with a constant, giving `value`.
    pub(crate) fn contextual_multiple(
        contextual: &Contextual,
        constant: &Tensor,
        value: Tensor,
    ) -> Result<Self> {
        let wide = contextual.lifted(value.rank())?;
        let parts = contextual.with(tensor(wide.broadcast_mul(constant))?);
        Ok(Self::from(value).with_contextual(parts))
    }

    /// An activation.
    pub(crate) fn contextual_activation(
        &self,
        contextual: &Contextual,
        activation: Activation,
    ) -> Result<Self> {
        let value = activate(&self.value, activation)?;
        let parts = contextual.activate(&self.value, &value, activation)?;
        Ok(Self::from(value).with_contextual(parts))
    }

    /// A norm, layer (`centred`) or RMS.
    pub(crate) fn contextual_norm(
        &self,
        contextual: &Contextual,
        centred: bool,
        weight: Option<&Tensor>,
        bias: Option<&Tensor>,
        epsilon: f64,
    ) -> Result<Self> {
        let value = match centred {
            true => layer_norm(&self.value, weight, bias, epsilon)?,
            false => rms_norm(&self.value, weight, epsilon)?,
        };
        let parts = contextual.norm(&self.value, centred, weight, bias, epsilon)?;
        let parts = match contextual.splits_attention() {
            // The norm before attention is part of it, and cannot be told from others.
            true => parts,
            false => parts.settled(&value)?,
        };
        Ok(Self::from(value).with_contextual(parts))
    }

    /// Attention over these values, heads side by side as in [`Signal::attend_merged`].
    pub(crate) fn contextual_attention(
        &self,
        contextual: &Contextual,
        q: &Self,
        k: &Self,
        [heads, groups]: [usize; 2],
        options: &AttentionOptions,
    ) -> Result<Self> {
        if !contextual.splits_attention() {
            let (q, k) = (q.split_heads(heads)?, k.split_heads(groups)?);
            let weights = naive::attention_weights(&q.value, &k.value, options)?;
            let one = tensor(self.value.unsqueeze(0))?;
            let value = tensor(stream_mix(&weights, &one, groups)?.squeeze(0))?;
            let parts = contextual.with(stream_mix(&weights, &contextual.relevant, groups)?);
            let parts = parts.settled(&value)?;
            return Ok(Self::from(value).with_contextual(parts));
        }
        let value = merged_attention(&q.value, &k.value, &self.value, heads, groups, options)?;
        let part_of = |signal: &Self| -> Result<Tensor> {
            match signal.contextual() {
                Some(parts) => folded(&parts.relevant),
                None => folded(&contextual.nothing_in(&signal.value)?.relevant),
            }
        };
        let repeated = repeated(options, contextual.sources())?;
        let values = folded(&contextual.relevant)?;
        let mixed = merged_attention(
            &part_of(q)?,
            &part_of(k)?,
            &values,
            heads,
            groups,
            &repeated,
        )?;
        let mut shape = vec![contextual.sources()];
        shape.extend(value.dims());
        let parts = contextual.with(tensor(mixed.reshape(shape))?);
        Ok(Self::from(value).with_contextual(parts))
    }

    /// Joins signals along `dim` into `value`.
    pub(crate) fn contextual_concatenation(
        signals: &[Self],
        lens: &Contextual,
        dim: usize,
        value: Tensor,
    ) -> Result<Self> {
        let mut parts = Vec::with_capacity(signals.len());
        for signal in signals {
            parts.push(match signal.contextual() {
                Some(parts) => parts.relevant.clone(),
                None => lens.nothing_in(&signal.value)?.relevant,
            });
        }
        let parts = lens.with(tensor(Tensor::cat(&parts, dim + 1))?);
        Ok(Self::from(value).with_contextual(parts))
    }

    /// Repeats the parts as the value is repeated to give `value`.
    pub(crate) fn contextual_broadcast(contextual: &Contextual, value: Tensor) -> Result<Self> {
        let wide = contextual.lifted(value.rank())?;
        let mut shape = vec![contextual.sources()];
        shape.extend(value.dims());
        let parts = contextual.with(tensor(wide.broadcast_as(shape))?);
        Ok(Self::from(value).with_contextual(parts))
    }

    /// The error of a recurrence, which the lens has no rule for.
    pub(crate) fn contextual_recurrence<T>(operation: &'static str) -> Result<T> {
        Err(Error::Undefined {
            lens: "contextual",
            operation,
            advice: "models with recurrences can be explained by the streams lens (decompx) and \
                     by relevance (attnlrp, cp-lrp)",
        })
    }
}
