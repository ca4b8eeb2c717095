//! FIRE (Li et al., Functional Interpolation for Relative Positions Improves Long Context
//! Transformers, 2023, arXiv 2310.04418): a bias of the scores by a small network `f` of the distance,
//! relative to how far back the query can look.
//!
//! ```text
//! b(i, j) = f( ψ(i − j) / ψ(max(L, i)) )     for j ≤ i, one output of f for each head
//! ψ(x)    = ln(|c x| + 1)                    c learned, from 0.1
//! L       = |l| · initial_length             l learned, from 1
//! ```
//!
//! The network sees a number between 0 and 1 at every length: up to `L` a function of the distance
//! alone, beyond it one that is stretched with the query's position. A row depends on its own query
//! only, so that earlier rows stay when tokens are added. The last bias of `f` shifts all scores of a
//! row alike, which softmax does not see.
//!
//! Rows before `L` have as many different values as there are distances: where all are before it, the
//! network runs once for each distance. Beyond, `f` is taken as the straight pieces that a function of
//! one number with hidden units `max(x, 0)` consists of ([`FunctionalBias`]): a query and a key cost one multiplication
//! for each head, whatever the width of the network, as attention adds them to a tile of scores: nothing is
//! laid out for pairs, forward or backward. Only with `cos x`, and for positions that are drawn, does the
//! network run for every query and key there. Where layers share it (FIRE-S), it is run for the first of
//! them only. Parameters:
//! `2 + 2 hidden + (layers − 1) (hidden² + hidden) + (hidden + 1) heads`.
//!
//! Bidirectional attention is an extension of ours: `|i − j|` relative to `max(L, i, j)`, with outputs of
//! its own for keys that come later.

use super::distance::{both_ways, column, distances, rows_of};
use super::{RotarySpec, Span};
use crate::error::{bounded, tensor};
use crate::parameters::{Init, Parameters};
use crate::{Error, Result};
use lapidary_kernels::{
    Activation, BiasSpan, FunctionalBias, ScoreBias, Tensor, linear, linear_activation,
};
use rand::SeedableRng;
use rand::seq::index::sample;
use rand_chacha::ChaCha8Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

const MAX_HIDDEN: usize = 1 << 12;
const MAX_LENGTH: usize = 1 << 24;
/// A power of [`MAX_LENGTH`] that single precision holds.
const MAX_EXPONENT: f64 = 5.0;

/// Keeps the denominator from zero where `c` is.
const EPSILON: f64 = 1e-6;

/// Where a shared network has its parameters, and draws its positions.
pub const SHARED: &str = "fire";

/// FIRE.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct FireSpec {
    /// Units of a hidden layer of the network.
    pub hidden: usize,
    /// Hidden layers: 2 as the paper says, 1 as its listing has it.
    pub layers: usize,
    /// What the hidden units do.
    pub activation: FireActivation,
    /// `ψ`.
    pub transform: FireTransform,
    /// `L` at the start.
    pub initial_length: usize,
    /// Whether all layers that say so share one network, which then is run once in a pass, and the
    /// positions that it draws.
    pub shared: bool,
    /// Where training draws the positions of a sequence at random, in order, from `0..randomised`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub randomised: Option<usize>,
    /// Where queries and keys are rotated too.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rotary: Option<RotarySpec>,
}

/// What the hidden units of FIRE's network do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum FireActivation {
    /// `max(x, 0)`.
    #[default]
    Relu,
    /// `cos x`, with which the network can be Sandwich.
    Cosine,
}

/// How FIRE sees a distance.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum FireTransform {
    /// `ln(|c x| + 1)`.
    #[default]
    #[serde(deserialize_with = "crate::fields::none")]
    Logarithm,
    /// `x`.
    #[serde(deserialize_with = "crate::fields::none")]
    Linear,
    /// `x^exponent`.
    Power {
        /// The exponent, above 0 and at most 5.
        exponent: f64,
    },
}

impl Default for FireSpec {
    fn default() -> Self {
        Self {
            hidden: 32,
            layers: 2,
            activation: FireActivation::Relu,
            transform: FireTransform::Logarithm,
            initial_length: 512,
            shared: false,
            randomised: None,
            rotary: None,
        }
    }
}

impl FireSpec {
    pub(super) fn validate(&self, groups: usize, head_width: usize, field: &str) -> Result<()> {
        bounded(format!("{field}.hidden"), self.hidden, 1..=MAX_HIDDEN)?;
        bounded(format!("{field}.layers"), self.layers, 1..=2)?;
        let length = format!("{field}.initial_length");
        bounded(length, self.initial_length, 1..=MAX_LENGTH)?;
        if let Some(positions) = self.randomised {
            bounded(format!("{field}.randomised"), positions, 1..=MAX_LENGTH)?;
        }
        if let Some(rotary) = &self.rotary {
            rotary.validate(head_width, groups, &format!("{field}.rotary"))?;
        }
        match self.transform {
            FireTransform::Power { exponent } if !(exponent > 0.0 && exponent <= MAX_EXPONENT) => {
                let field = format!("{field}.transform.exponent");
                let expected = format!(
                    "above 0 and at most {MAX_EXPONENT}, so that powers of positions are finite"
                );
                Err(Error::spec(field, exponent, expected))
            }
            _ => Ok(()),
        }
    }
}

/// FIRE with its parameters.
#[derive(Debug)]
pub struct Fire {
    spec: FireSpec,
    heads: usize,
    causal: bool,
    /// `c`, `[1]`.
    stretch: Tensor,
    /// `l`, `[1]`.
    length: Tensor,
    /// Weights `[output, input]` and biases of the network.
    layers: Vec<(Tensor, Tensor)>,
}

impl Fire {
    pub(super) fn new(
        spec: &FireSpec,
        heads: usize,
        causal: bool,
        parameters: Parameters<'_>,
    ) -> Result<Self> {
        let mut parameters = match spec.shared {
            true => parameters.at_root(SHARED),
            false => parameters,
        };
        let outputs = if causal { heads } else { 2 * heads };
        let mut sizes = vec![1];
        sizes.extend(std::iter::repeat_n(spec.hidden, spec.layers));
        sizes.push(outputs);
        let mut layers = Vec::with_capacity(spec.layers + 1);
        for (index, pair) in sizes.windows(2).enumerate() {
            let (input, output) = (pair[0], pair[1]);
            let mut at = parameters.at(format!("layers.{index}"));
            let deviation = 1.0 / (input as f64).sqrt();
            layers.push((
                at.tensor("weight", &[output, input], Init::Normal { deviation })?,
                at.tensor("bias", &[output], Init::Zeros)?,
            ));
        }
        Ok(Self {
            spec: spec.clone(),
            heads,
            causal,
            stretch: parameters.tensor("stretch", &[1], Init::Constant(0.1))?,
            length: parameters.tensor("length", &[1], Init::Ones)?,
            layers,
        })
    }

    pub(super) fn spec(&self) -> &FireSpec {
        &self.spec
    }

    pub(super) fn is_causal(&self) -> bool {
        self.causal
    }

    /// The bias of every head: by distance where all queries, and in bidirectional attention all keys, stand
    /// before `L`, and beyond it a function. Of causal attention, what belongs to later keys, which are masked,
    /// means nothing.
    pub(super) fn bias(&self, span: Span) -> Result<ScoreBias> {
        let end = span.keys.max(span.offset + span.queries);
        if let (Some(positions), Some(seed)) = (self.spec.randomised, span.draw)
            && positions >= end
        {
            let drawn = drawn_positions(positions, end, seed);
            return self.of_pairs(&drawn, span).map(ScoreBias::Pairs);
        }
        // Up to L the denominator is one number, and each distance has one bias.
        let before = self.steady()?;
        let last = match self.causal {
            true => span.offset + span.queries,
            false => end,
        };
        if last <= before {
            return self.before_length(span);
        }
        if self.spec.activation == FireActivation::Relu {
            return self.in_pieces(span).map(ScoreBias::Functional);
        }
        let steady = match self.causal {
            true => before.saturating_sub(span.offset).min(span.queries),
            false => 0,
        };
        let rest = Span {
            queries: span.queries - steady,
            offset: span.offset + steady,
            ..span
        };
        let positions: Vec<u32> = (0..end as u32).collect();
        let beyond = self.of_pairs(&positions, rest)?;
        if steady == 0 {
            return Ok(ScoreBias::Pairs(beyond));
        }
        let before = self.before_length(Span {
            queries: steady,
            ..span
        })?;
        let before = before.laid_out(steady, span.keys)?;
        let all = tensor(Tensor::cat(&[before, beyond], 2))?;
        Ok(ScoreBias::Pairs(all))
    }

    /// The bias of queries that are all before `L`, as in bidirectional attention all keys are.
    fn before_length(&self, span: Span) -> Result<ScoreBias> {
        if !self.causal {
            let count = span.keys.max(span.offset + span.queries);
            let by_distance = self.by_distance(count)?;
            // Rows for keys that come later behind those for the others.
            let outputs = |first: usize| tensor(by_distance.narrow(1, first, self.heads));
            let both = tensor(Tensor::cat(&[outputs(0)?, outputs(self.heads)?], 0))?;
            let row = |distance: i64| {
                let later = if distance > 0 { count } else { 0 };
                later as u32 + distance.unsigned_abs() as u32
            };
            return rows_of(&both, distances(span).map(row).collect());
        }
        let count = span.offset + span.queries;
        let by_distance = self.by_distance(count)?;
        // Later keys are masked, whatever they read.
        let later = span.keys.saturating_sub(count);
        let by_distance = tensor(by_distance.pad_with_same(0, 0, later))?;
        both_ways(&by_distance, span)
    }

    /// The bias of each distance below `count`, which is not beyond `L`: `[count, outputs]`.
    fn by_distance(&self, count: usize) -> Result<Tensor> {
        let distances = self.numbers((0..count).map(|d| d as f64))?;
        self.network(&self.relative(&distances, None)?)
    }

    /// The bias of queries on both sides of `L`, of a network that consists of straight pieces.
    fn in_pieces(&self, span: Span) -> Result<FunctionalBias> {
        let span = BiasSpan {
            queries: span.queries,
            keys: span.keys,
            offset: span.offset,
            causal: self.causal,
        };
        let count = span.keys.max(span.offset + span.queries);
        let positions = self.numbers((0..count).map(|position| position as f64))?;
        let distances = tensor(self.transformed(&positions)?.squeeze(1))?;
        let whole = tensor(self.farthest(Some(&positions))?.squeeze(1))?;
        let scales = tensor(whole.recip())?;
        Ok(FunctionalBias::new(
            &distances,
            &scales,
            &self.layers,
            span,
        )?)
    }

    /// The first position that is not before `L`.
    fn steady(&self) -> Result<usize> {
        let length = tensor(self.threshold()?.to_dtype(lapidary_kernels::DType::F64))?;
        let length = tensor(length.to_vec1::<f64>())?;
        let length = length.first().copied().unwrap_or(0.0);
        Ok(if length.is_finite() {
            length.ceil().clamp(0.0, MAX_LENGTH as f64) as usize
        } else {
            0
        })
    }

    /// `L`, `[1]`.
    fn threshold(&self) -> Result<Tensor> {
        tensor(tensor(self.length.abs())? * self.spec.initial_length as f64)
    }

    fn numbers(&self, values: impl Iterator<Item = f64>) -> Result<Tensor> {
        column(values, self.stretch.dtype(), self.stretch.device())
    }

    /// `ψ(x)` for `[.., 1]`.
    fn transformed(&self, x: &Tensor) -> Result<Tensor> {
        match self.spec.transform {
            FireTransform::Linear => Ok(x.clone()),
            FireTransform::Power { exponent } => tensor(x.powf(exponent)),
            FireTransform::Logarithm => {
                let stretched = tensor(tensor(x.broadcast_mul(&self.stretch))?.abs())?;
                tensor(tensor(stretched + 1.0)?.log())
            }
        }
    }

    /// `ψ(max(L, position))` of positions `[count, 1]`; of those before `L`, one number, when absent.
    fn farthest(&self, positions: Option<&Tensor>) -> Result<Tensor> {
        let threshold = tensor(self.threshold()?.unsqueeze(0))?;
        let farthest = match positions {
            None => threshold,
            Some(positions) => tensor(positions.broadcast_maximum(&threshold))?,
        };
        tensor(self.transformed(&farthest)? + EPSILON)
    }

    /// `ψ(distance) / ψ(max(L, position))`, for distances and positions `[count, 1]`; positions before
    /// `L` when absent.
    fn relative(&self, distances: &Tensor, positions: Option<&Tensor>) -> Result<Tensor> {
        let whole = self.farthest(positions)?;
        tensor(self.transformed(distances)?.broadcast_div(&whole))
    }

    /// `f` of `[count, 1]`: `[count, outputs]`.
    fn network(&self, x: &Tensor) -> Result<Tensor> {
        let Some(((last, last_bias), hidden)) = self.layers.split_last() else {
            return Err(Error::spec("layers of fire", 0, "at least one"));
        };
        let mut x = x.clone();
        for (weight, bias) in hidden {
            x = match self.spec.activation {
                FireActivation::Relu => {
                    linear_activation(&x, weight, Some(bias), Activation::Relu)?
                }
                FireActivation::Cosine => tensor(linear(&x, weight, Some(bias))?.cos())?,
            };
        }
        Ok(linear(&x, last, Some(last_bias))?)
    }

    /// The bias with the network run for every query and key, whose positions are `positions`.
    fn of_pairs(&self, positions: &[u32], span: Span) -> Result<Tensor> {
        let Span {
            queries,
            keys,
            offset,
            ..
        } = span;
        let at = |index: usize| f64::from(positions.get(index).copied().unwrap_or(0));
        let pairs =
            || (offset..offset + queries).flat_map(move |i| (0..keys).map(move |j| (at(i), at(j))));
        let causal = self.causal;
        let distances = self.numbers(pairs().map(|(i, j)| match causal {
            true => (i - j).max(0.0),
            false => (i - j).abs(),
        }))?;
        let farthest = self.numbers(pairs().map(|(i, j)| match causal {
            true => i,
            false => i.max(j),
        }))?;
        let values = self.network(&self.relative(&distances, Some(&farthest))?)?;
        let values = match causal {
            true => values,
            false => {
                let back = tensor(values.narrow(1, 0, self.heads))?;
                let ahead = tensor(values.narrow(1, self.heads, self.heads))?;
                let later = self.numbers(pairs().map(|(i, j)| f64::from(u8::from(j > i))))?;
                let turn = tensor(tensor(&ahead - &back)?.broadcast_mul(&later))?;
                tensor(back + turn)?
            }
        };
        tensor(tensor(values.t())?.reshape((1, self.heads, queries, keys)))
    }
}

/// So many positions below `limit`, in order.
fn drawn_positions(limit: usize, count: usize, seed: u64) -> Vec<u32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let drawn = sample(&mut rng, limit, count.min(limit));
    let mut positions: Vec<u32> = drawn.iter().map(|position| position as u32).collect();
    positions.sort_unstable();
    positions
}

#[cfg(test)]
mod tests;
