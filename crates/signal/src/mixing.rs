//! Mixing positions by any map that is linear in the values, its weights decided beforehand.

use std::fmt;

use crate::error::tensor;
use crate::meter::bytes_of;
use crate::relevance::{AttentionRule, Form};
use crate::{Error, Lens, Result, Signal};
use lapidary_kernels::{Tensor, naive};

/// `y = W v`: a map along positions whose weights were computed from queries and keys, and which
/// need not lay them out to apply them.
pub trait Mixing: fmt::Debug {
    /// `[batch, heads, queries, keys]`.
    fn sizes(&self) -> [usize; 4];

    /// `W v`, `[batch, heads, queries, width]`, for values `[batch, heads, keys, width]` of any
    /// width.
    ///
    /// # Errors
    /// Those of the kernels.
    fn mix(&self, values: &Tensor) -> lapidary_kernels::Result<Tensor>;

    /// Multiplications and additions of [`Mixing::mix`] and of what stands before it, the
    /// projections left out, for values of `width`.
    fn operations(&self, width: usize) -> u64;

    /// `W` itself, `[batch, heads, queries, keys]`: what [`Mixing::mix`] makes of unit vectors,
    /// unless there is a shorter way.
    ///
    /// # Errors
    /// As [`Mixing::mix`].
    fn weights(&self, like: &Tensor) -> lapidary_kernels::Result<Tensor> {
        let [batch, heads, _, keys] = self.sizes();
        let units = Tensor::eye(keys, like.dtype(), like.device())?;
        self.mix(
            &units
                .broadcast_as((batch, heads, keys, keys))?
                .contiguous()?,
        )
    }
}

impl Signal {
    /// The tensor that the weights of a [`Mixing`] are computed from: under relevance with as much
    /// of the gradient as the rule for attention leaves, under streams and relevant parts, which
    /// freeze weights, with none.
    ///
    /// Under the uniform rule half of the gradient is left, as where scores are products of two
    /// such tensors, so that together they have what the scores have.
    pub fn for_weights(&self) -> Result<Tensor> {
        match &self.lens {
            Lens::Relevance(rules) => match rules.attention {
                AttentionRule::Detach => Ok(self.value.detach()),
                AttentionRule::Uniform | AttentionRule::PassSoftmax => {
                    let half = tensor(tensor(self.value.ones_like())? * 0.5)?;
                    Ok(lapidary_kernels::scale_gradient(&self.value, &half)?)
                }
                AttentionRule::Gradient => Ok(self.value.clone()),
            },
            Lens::Streams(_) | Lens::Contextual(_) => Ok(self.value.detach()),
            Lens::Plain | Lens::Meter(..) | Lens::Rounded(_) | Lens::Integers(_) => {
                Ok(self.value.clone())
            }
        }
    }

    /// Mixes this signal's positions, `[batch, groups, keys, width]`, as `mixing` does, whose number of
    /// heads is a multiple of the groups.
    ///
    /// Without a lens, and under the meter, no weights are laid out. Under streams, relevant parts
    /// and rounding they are, and frozen. Under relevance the values get what the rule for
    /// attention gives them, and the rest passes through the weights as the gradient of whatever
    /// computed them times its input.
    ///
    /// # Errors
    /// When shapes do not fit; for rules that relevance through a softmax is passed on by, and for
    /// relevance carried in explicit form through weights.
    pub fn mix_through(&self, mixing: &dyn Mixing) -> Result<Self> {
        let [batch, heads, _, keys] = mixing.sizes();
        let fits = matches!(
            *self.value.dims(),
            [b, groups, k, _] if [b, k] == [batch, keys] && groups > 0 && heads.is_multiple_of(groups)
        );
        if !fits {
            let expected = format!("[{batch}, a divisor of {heads}, {keys}, width]");
            return Err(Error::invalid(
                "shape of the values to mix",
                self.value.dims(),
                expected,
            ));
        }
        match &self.lens {
            Lens::Plain => {
                let spread = naive::repeat_groups(&self.value, heads)?;
                Ok(Self::from(mixing.mix(&spread)?))
            }
            Lens::Meter(meter, _) => {
                let value = mixing.mix(&naive::repeat_groups(&self.value, heads)?)?;
                let width = tensor(self.value.dim(3))?;
                meter.count(
                    mixing.operations(width),
                    bytes_of(&self.value) + bytes_of(&value),
                );
                Ok(self.carry(value))
            }
            _ => self.mix_by(&self.mixing_weights(mixing)?),
        }
    }

    /// The weights of [`Signal::mix_through`] `[batch, heads, queries, keys]`, laid out, for those who
    /// look at them before [`Signal::mix_by`].
    ///
    /// # Errors
    /// As [`Signal::mix_through`].
    pub fn mixing_weights(&self, mixing: &dyn Mixing) -> Result<Self> {
        let weights = tensor(mixing.weights(&self.value)?.contiguous())?;
        let Lens::Relevance(rules) = &self.lens else {
            return Ok(match self.lens {
                Lens::Streams(_) | Lens::Contextual(_) => Self::from(weights.detach()),
                _ => Self::from(weights),
            });
        };
        match (rules.attention, rules.form) {
            (AttentionRule::Detach, _) => Ok(self.carry(weights.detach())),
            (AttentionRule::Uniform | AttentionRule::Gradient, Form::ModifiedGradient) => {
                Ok(self.carry(weights))
            }
            (AttentionRule::PassSoftmax, _) | (_, Form::Explicit) => Err(Error::Undefined {
                lens: "relevance",
                operation: "ready weights, without the scores and the softmax that they are made of",
                advice: "choose rules that hold the weights fixed (cp-lrp, cp-lrp-explicit) or that \
                         are carried by the gradient (attnlrp, gradient-x-input)",
            }),
        }
    }
}
