//! The operations that every part is written in, each under every lens.

use std::sync::Arc;

use crate::counted_attention::count_attention;
use crate::error::tensor;
use crate::meter::{Meter, bytes_of};
use crate::relevance::AttentionRule;
use crate::streams::Change;
use crate::{Error, Lens, Linear, Result, Signal, integers};
use lapidary_kernels::{
    Activation, AttentionOptions, RotaryPairs, SoftmaxMask, Tensor, activate, add, attention,
    causal_depthwise_convolution, fft_convolution, layer_norm, linear_scan, merged_attention,
    merged_rotary, naive, rms_norm, softmax,
};

/// Which lens a result of two signals is under, when at most one of them has one.
enum Pair<'a> {
    Plain,
    Streams(&'a Signal, &'a Signal),
    /// Streams on the first only.
    StreamsLeft(&'a crate::streams::Streams),
    /// Streams on the second only.
    StreamsRight(&'a crate::streams::Streams),
    /// A lens of rules or counts: continue as this signal does.
    Rules(&'a Signal),
    /// Relevant parts on at least one.
    Contextual,
}

fn pair<'a>(operation: &'static str, a: &'a Signal, b: &'a Signal) -> Result<Pair<'a>> {
    Ok(match (&a.lens, &b.lens) {
        (Lens::Plain, Lens::Plain) => Pair::Plain,
        (Lens::Streams(_), Lens::Streams(_)) => Pair::Streams(a, b),
        (Lens::Streams(streams), Lens::Plain) => Pair::StreamsLeft(streams),
        (Lens::Plain, Lens::Streams(streams)) => Pair::StreamsRight(streams),
        (Lens::Contextual(_), Lens::Contextual(_) | Lens::Plain)
        | (Lens::Plain, Lens::Contextual(_)) => Pair::Contextual,
        (Lens::Relevance(_), Lens::Relevance(_) | Lens::Plain) => Pair::Rules(a),
        (Lens::Meter(..), Lens::Meter(..) | Lens::Plain) => Pair::Rules(a),
        (Lens::Rounded(_), Lens::Rounded(_) | Lens::Plain) => Pair::Rules(a),
        (Lens::Integers(_), Lens::Integers(_) | Lens::Plain) => Pair::Rules(a),
        (
            Lens::Plain,
            Lens::Relevance(_) | Lens::Meter(..) | Lens::Rounded(_) | Lens::Integers(_),
        ) => Pair::Rules(b),
        (left, right) => {
            return Err(Error::LensMismatch {
                operation,
                left: left.name(),
                right: right.name(),
            });
        }
    })
}

/// The signal whose lens of rules or counts the others follow; none when all are plain. Streams
/// and relevant parts count as plain.
fn rules_of<'a>(operation: &'static str, signals: &[&'a Signal]) -> Result<Option<&'a Signal>> {
    let mut found: Option<&Signal> = None;
    for signal in signals {
        match (&signal.lens, found.map(|one| &one.lens)) {
            (Lens::Plain | Lens::Streams(_) | Lens::Contextual(_), _) => {}
            (_, None) => found = Some(signal),
            (Lens::Relevance(_), Some(Lens::Relevance(_)))
            | (Lens::Meter(..), Some(Lens::Meter(..)))
            | (Lens::Rounded(_), Some(Lens::Rounded(_)))
            | (Lens::Integers(_), Some(Lens::Integers(_))) => {}
            (right, Some(left)) => {
                return Err(Error::LensMismatch {
                    operation,
                    left: left.name(),
                    right: right.name(),
                });
            }
        }
    }
    Ok(found)
}

impl Signal {
    fn meter(&self) -> Option<&Arc<Meter>> {
        match &self.lens {
            Lens::Meter(meter, _) => Some(meter),
            _ => None,
        }
    }

    /// Counts an elementwise-like operation on `inputs` giving `output`, at `per_element`
    /// operations for each element of the output.
    pub(crate) fn count(&self, per_element: u64, inputs: &[&Tensor], output: &Tensor) {
        if let Some(meter) = self.meter() {
            let bytes = inputs.iter().map(|input| bytes_of(input)).sum::<u64>() + bytes_of(output);
            meter.count(per_element * output.elem_count() as u64, bytes);
        }
    }

    fn count_linear(&self, layer: &Linear, output: &Tensor) {
        if let Some(meter) = self.meter() {
            let rows = (output.elem_count() / layer.output().max(1)) as u64;
            let multiplications = layer.multiplications() as u64;
            let bias = layer.bias().map_or(0, |bias| bias.elem_count()) as u64;
            let weights = (multiplications + bias) * output.dtype().size_in_bytes() as u64;
            meter.count(
                rows * (2 * multiplications + bias),
                bytes_of(&self.value) + weights + bytes_of(output),
            );
        }
    }

    /// `x Wᵀ + b` along the last dimension.
    pub fn linear(&self, layer: &Linear) -> Result<Self> {
        if let Lens::Relevance(rules) = &self.lens {
            return Ok(self.carry(rules.linear(&self.value, layer)?));
        }
        if let Lens::Contextual(parts) = &self.lens {
            return self.contextual_linear(parts, layer, true);
        }
        let value = layer.apply(&self.value)?;
        self.count_linear(layer, &value);
        Ok(match &self.lens {
            Lens::Streams(streams) => {
                let streams = streams.linear(&self.value, layer)?;
                Self::carry_streams(value, streams)
            }
            _ => self.computed(value)?,
        })
    }

    /// As [`Signal::linear`], for the value projection of attention: under the streams lens its
    /// bias may travel on through the mixing, whose weights sum to one, and join the bias of
    /// the output projection.
    pub fn linear_values(&self, layer: &Linear) -> Result<Self> {
        match &self.lens {
            Lens::Streams(streams) => {
                let value = layer.apply(&self.value)?;
                let streams = streams.linear_deferred(&self.value, layer)?;
                Ok(Self::carry_streams(value, streams))
            }
            Lens::Contextual(parts) => self.contextual_linear(parts, layer, false),
            _ => self.linear(layer),
        }
    }

    /// As [`Signal::linear`], for the output projection of attention: under the streams lens its
    /// bias is split here or after the residual, as the rules say.
    pub fn linear_output(&self, layer: &Linear) -> Result<Self> {
        match &self.lens {
            Lens::Streams(streams) => {
                let value = layer.apply(&self.value)?;
                let streams = streams.linear_output(&self.value, layer, &value)?;
                Ok(Self::carry_streams(value, streams))
            }
            Lens::Contextual(parts) => self.contextual_output(parts, layer),
            _ => self.linear(layer),
        }
    }

    /// As [`Signal::linear`], for a layer whose outputs are scores, each a number of its own:
    /// under the streams lens the bias of a score is split by the streams of that score alone.
    pub fn linear_scores(&self, layer: &Linear) -> Result<Self> {
        match &self.lens {
            Lens::Streams(streams) => {
                let value = layer.apply(&self.value)?;
                let streams = streams.linear_scores(&self.value, layer)?;
                Ok(Self::carry_streams(value, streams))
            }
            Lens::Contextual(parts) => self.contextual_linear(parts, layer, false),
            _ => self.linear(layer),
        }
    }

    /// [`Signal::linear`] and then [`Signal::activate`], one pass where no lens looks between.
    pub fn linear_activate(&self, layer: &Linear, activation: Activation) -> Result<Self> {
        match &self.lens {
            Lens::Plain => Ok(Self::from(layer.apply_activated(&self.value, activation)?)),
            _ => self.linear(layer)?.activate(activation),
        }
    }

    /// What feeds attention scores only. Streams are frozen there, so it is the value alone, and
    /// so are relevant parts unless attention is split; under value-only relevance it is
    /// detached; otherwise the signal itself.
    pub fn for_scores(&self) -> Self {
        match &self.lens {
            Lens::Streams(_) => Self::from(self.value.clone()),
            Lens::Contextual(parts) => self.contextual_scores(parts),
            Lens::Relevance(rules) if rules.attention == AttentionRule::Detach => {
                self.carry(self.value.detach())
            }
            _ => self.clone(),
        }
    }

    /// Sum; shapes broadcast.
    pub fn add(&self, other: &Self) -> Result<Self> {
        let pair = pair("add", self, other)?;
        if let Pair::Rules(one) = &pair
            && let Lens::Relevance(rules) = &one.lens
        {
            return Ok(one.carry(rules.add(self, other)?));
        }
        let value = add(&self.value, &other.value)?;
        match pair {
            Pair::Plain => Ok(Self::from(value)),
            Pair::Contextual => self.contextual_sum(other, value),
            Pair::Rules(one) => {
                one.count(1, &[&self.value, &other.value], &value);
                one.computed(value)
            }
            Pair::StreamsLeft(streams) => {
                let streams = streams.add_constant(&self.value, &other.value, value.dims())?;
                Ok(Self::carry_streams(value, streams))
            }
            Pair::StreamsRight(streams) => {
                let streams = streams.add_constant(&other.value, &self.value, value.dims())?;
                Ok(Self::carry_streams(value, streams))
            }
            Pair::Streams(a, b) => match (&a.lens, &b.lens) {
                (Lens::Streams(left), Lens::Streams(right)) => {
                    let streams = left.add(&a.value, right, &b.value)?;
                    Ok(Self::carry_streams(value, streams))
                }
                _ => Ok(Self::from(value)),
            },
        }
    }

    /// Adds a tensor that is no signal, such as a table of positions.
    pub fn add_constant(&self, constant: &Tensor) -> Result<Self> {
        if let Lens::Contextual(parts) = &self.lens {
            return self.contextual_shift(parts, constant, add(&self.value, constant)?);
        }
        self.add(&Self::from(constant.clone()))
    }

    /// Multiplies by a number.
    pub fn scale(&self, factor: f64) -> Result<Self> {
        if let Lens::Relevance(rules) = &self.lens {
            return Ok(self.carry(rules.scale(&self.value, factor)?));
        }
        let value = tensor(&self.value * factor)?;
        self.count(1, &[&self.value], &value);
        match &self.lens {
            Lens::Streams(streams) => {
                let streams = streams.scale(&self.value, factor)?;
                Ok(Self::carry_streams(value, streams))
            }
            Lens::Contextual(parts) => {
                let parts = parts.with(tensor(parts.relevant() * factor)?);
                Ok(Self::from(value).with_contextual(parts))
            }
            _ => self.computed(value),
        }
    }

    /// Multiplies by a tensor that is no signal; shapes broadcast to this signal's.
    pub fn multiply_constant(&self, constant: &Tensor) -> Result<Self> {
        if let Lens::Relevance(rules) = &self.lens {
            return Ok(self.carry(rules.multiply_constant(&self.value, constant)?));
        }
        let value = tensor(self.value.broadcast_mul(constant))?;
        self.count(1, &[&self.value, constant], &value);
        match &self.lens {
            Lens::Streams(streams) => {
                let streams = streams.multiply_constant(&self.value, constant, value.dims())?;
                Ok(Self::carry_streams(value, streams))
            }
            Lens::Contextual(parts) => Self::contextual_multiple(parts, constant, value),
            _ => self.computed(value),
        }
    }

    /// Elementwise product of content with a `gate` of the same shape.
    pub fn gate(&self, gate: &Self) -> Result<Self> {
        let plain = || tensor(self.value.broadcast_mul(&gate.value));
        match pair("gate", self, gate)? {
            Pair::Plain => Ok(Self::from(plain()?)),
            Pair::Contextual => self.contextual_product(gate, plain()?),
            Pair::Rules(one) => {
                let value = match &one.lens {
                    Lens::Relevance(rules) => rules.gate(self, gate)?,
                    _ => plain()?,
                };
                one.count(1, &[&self.value, &gate.value], &value);
                one.computed(value)
            }
            Pair::StreamsLeft(streams) => {
                let value = plain()?;
                let streams = streams.multiply_constant(&self.value, &gate.value, value.dims())?;
                Ok(Self::carry_streams(value, streams))
            }
            Pair::StreamsRight(streams) => {
                let value = plain()?;
                let streams = streams.multiply_constant(&gate.value, &self.value, value.dims())?;
                Ok(Self::carry_streams(value, streams))
            }
            Pair::Streams(a, b) => match (&a.lens, &b.lens) {
                (Lens::Streams(content), Lens::Streams(other)) => {
                    let streams = content.gate(&a.value, other, &b.value)?;
                    Ok(Self::carry_streams(plain()?, streams))
                }
                _ => Ok(Self::from(plain()?)),
            },
        }
    }

    /// An elementwise nonlinearity.
    pub fn activate(&self, activation: Activation) -> Result<Self> {
        match &self.lens {
            Lens::Relevance(rules) => Ok(self.carry(rules.activate(&self.value, activation)?)),
            Lens::Contextual(parts) => self.contextual_activation(parts, activation),
            Lens::Streams(streams) => {
                let streams = streams.activate(&self.value, activation)?;
                Ok(Self::carry_streams(
                    activate(&self.value, activation)?,
                    streams,
                ))
            }
            Lens::Integers(functions) => {
                Ok(self.carry(integers::activation(*functions, &self.value, activation)?))
            }
            _ => {
                let value = activate(&self.value, activation)?;
                self.count(1, &[&self.value], &value);
                self.computed(value)
            }
        }
    }

    /// Layer norm over the last dimension, `γ (x − mean) / √(var + ε) + β`.
    pub fn layer_norm(
        &self,
        weight: Option<&Tensor>,
        bias: Option<&Tensor>,
        epsilon: f64,
    ) -> Result<Self> {
        match &self.lens {
            Lens::Relevance(rules) => {
                Ok(self.carry(rules.layer_norm(&self.value, weight, bias, epsilon)?))
            }
            Lens::Contextual(parts) => self.contextual_norm(parts, true, weight, bias, epsilon),
            Lens::Streams(streams) => {
                let streams = streams.norm(&self.value, true, weight, bias, epsilon)?;
                Ok(Self::carry_streams(
                    layer_norm(&self.value, weight, bias, epsilon)?,
                    streams,
                ))
            }
            Lens::Integers(functions) => {
                Ok(self.carry(functions.layer_norm(&self.value, weight, bias, epsilon)?))
            }
            _ => {
                let value = layer_norm(&self.value, weight, bias, epsilon)?;
                self.count(8, &[&self.value], &value);
                self.computed(value)
            }
        }
    }

    /// RMS norm over the last dimension, `γ x / √(mean(x²) + ε)`.
    pub fn rms_norm(&self, weight: Option<&Tensor>, epsilon: f64) -> Result<Self> {
        match &self.lens {
            Lens::Relevance(rules) => {
                Ok(self.carry(rules.rms_norm(&self.value, weight, epsilon)?))
            }
            Lens::Contextual(parts) => self.contextual_norm(parts, false, weight, None, epsilon),
            Lens::Streams(streams) => {
                let streams = streams.norm(&self.value, false, weight, None, epsilon)?;
                Ok(Self::carry_streams(
                    rms_norm(&self.value, weight, epsilon)?,
                    streams,
                ))
            }
            Lens::Integers(functions) => {
                Ok(self.carry(functions.rms_norm(&self.value, weight, epsilon)?))
            }
            _ => {
                let value = rms_norm(&self.value, weight, epsilon)?;
                self.count(5, &[&self.value], &value);
                self.computed(value)
            }
        }
    }

    /// Attention of queries `[batch, heads, query, width]` over keys and values
    /// `[batch, groups, key, width]`, this signal being the values.
    ///
    /// Under the streams lens the weights are computed from the true values and frozen.
    pub fn attend(&self, q: &Self, k: &Self, options: &AttentionOptions) -> Result<Self> {
        if let Lens::Streams(_) = &self.lens {
            let weights = naive::attention_weights(&q.value, &k.value, options)?;
            return self.mix(&weights);
        }
        if let Lens::Contextual(parts) = &self.lens {
            let (heads, groups) = (tensor(q.value.dim(1))?, tensor(self.value.dim(1))?);
            let merged = self.merge_heads()?;
            let parts = merged.contextual().unwrap_or(parts);
            let (q, k) = (q.merge_heads()?, k.merge_heads()?);
            let mixed = merged.contextual_attention(parts, &q, &k, [heads, groups], options)?;
            return mixed.split_heads(heads);
        }
        // Streams on queries and keys alone have nothing to say: the weights are frozen.
        let joined = rules_of("attend", &[self, q, k])?.unwrap_or(self);
        match &joined.lens {
            Lens::Relevance(rules) => {
                let value = rules.attention(&q.value, &k.value, &self.value, options)?;
                Ok(joined.carry(value))
            }
            Lens::Rounded(_) | Lens::Integers(_) => {
                let q = joined.carry(q.value.clone());
                let weights = q.attention_weights(k, options)?;
                joined.computed(self.mix(&weights.value)?.value)
            }
            _ => {
                let value = attention(&q.value, &k.value, &self.value, options)?;
                if let Some(meter) = joined.meter() {
                    let heads = tensor(q.value.dim(1))?;
                    count_attention(meter, heads, q, k, self, &value, options)?;
                }
                Ok(joined.carry(value))
            }
        }
    }

    /// [`Signal::attend`] with the heads side by side, as projections leave them: queries
    /// `[batch, query, heads · width]` over keys and values `[batch, key, groups · width]`,
    /// giving `[batch, query, heads · width]`. Heads are split only for a lens that looks at each.
    pub fn attend_merged(
        &self,
        q: &Self,
        k: &Self,
        heads: usize,
        groups: usize,
        options: &AttentionOptions,
    ) -> Result<Self> {
        if let Lens::Contextual(parts) = &self.lens {
            return self.contextual_attention(parts, q, k, [heads, groups], options);
        }
        let joined = rules_of("attend_merged", &[self, q, k])?.unwrap_or(self);
        if matches!(self.lens, Lens::Streams(_))
            || matches!(
                joined.lens,
                Lens::Relevance(_) | Lens::Rounded(_) | Lens::Integers(_)
            )
        {
            let (q, k) = (q.split_heads(heads)?, k.split_heads(groups)?);
            let mixed = self.split_heads(groups)?.attend(&q, &k, options)?;
            return mixed.merge_heads();
        }
        let value = merged_attention(&q.value, &k.value, &self.value, heads, groups, options)?;
        if let Some(meter) = joined.meter() {
            count_attention(meter, heads, q, k, self, &value, options)?;
        }
        Ok(joined.carry(value))
    }

    /// The weights `[batch, heads, query, key]` by which [`Signal::attend`] would mix, this signal
    /// being the queries: for those who look at them before [`Signal::mix_by`].
    ///
    /// Under relevance they have relevance of their own, and rounding rounds them. They are
    /// constants to streams, and the meter counts them with the mixing.
    pub fn attention_weights(&self, k: &Self, options: &AttentionOptions) -> Result<Self> {
        let joined = rules_of("attention_weights", &[self, k])?.unwrap_or(self);
        let (q, k) = (&self.value, &k.value);
        Ok(match &joined.lens {
            Lens::Relevance(rules) => joined.carry(rules.attention_weights(q, k, options)?),
            Lens::Rounded(rounding) => Self::from(rounding.attention_weights(q, k, options)?),
            Lens::Integers(functions) => {
                Self::from(integers::attention_weights(*functions, q, k, options)?)
            }
            _ => Self::from(naive::attention_weights(q, k, options)?),
        })
    }

    /// How much attention each key `k` `[batch, groups, key, width]` gets, this signal being the
    /// queries `[batch, heads, query, width]`: `Σ_i shares_i mean_h P_hij`, `[batch, key]`, with
    /// `shares` `[batch, query]`. For choosing among keys: take both from
    /// [`Signal::for_selection`].
    ///
    /// # Errors
    /// Those of the tensor engine.
    pub fn attention_received(
        &self,
        k: &Self,
        shares: &Tensor,
        options: &AttentionOptions,
    ) -> Result<Self> {
        let weights = naive::attention_weights(&self.value, &k.value, options)?;
        let (batch, heads, queries, keys) = tensor(weights.dims4())?;
        let shares = tensor(tensor(shares / heads as f64)?.reshape((batch, 1, queries, 1)))?;
        let summed = tensor(tensor(weights.broadcast_mul(&shares))?.sum((1, 2)))?;
        if let Some(meter) = self.meter() {
            let width = tensor(self.value.dim(3))?;
            let pairs = (batch * heads * queries * keys) as u64;
            meter.count(
                pairs * (2 * width as u64 + 5 + 2),
                bytes_of(&self.value) + bytes_of(&k.value) + bytes_of(&summed),
            );
        }
        Ok(self.carry(summed))
    }

    /// Mixes this signal's positions by weights `[batch, heads, query, key]`, which share in the
    /// relevance when they have that lens.
    pub fn mix_by(&self, weights: &Self) -> Result<Self> {
        match &weights.lens {
            Lens::Relevance(rules) => {
                let joined = rules_of("mix_by", &[self, weights])?.unwrap_or(weights);
                Ok(joined.carry(rules.mix(&weights.value, &self.value)?))
            }
            _ => self.mix(&weights.value),
        }
    }

    /// Mixes this signal's positions by ready weights `[batch, heads, query, key]`.
    pub fn mix(&self, weights: &Tensor) -> Result<Self> {
        let heads = tensor(weights.dim(1))?;
        let value = self.mapped_value(|value| {
            let spread = tensor(naive::repeat_groups(value, heads)?.contiguous())?;
            tensor(weights.matmul(&spread))
        })?;
        if let Some(meter) = self.meter() {
            let keys = tensor(self.value.dim(2))? as u64;
            meter.count(
                2 * keys * value.elem_count() as u64,
                bytes_of(weights) + bytes_of(&self.value) + bytes_of(&value),
            );
        }
        Ok(match &self.lens {
            Lens::Streams(streams) => {
                Self::carry_streams(value, streams.mix(&self.value, weights)?)
            }
            Lens::Contextual(parts) => {
                let parts = parts.mix(weights, &value)?;
                Self::from(value).with_contextual(parts)
            }
            _ => self.computed(value)?,
        })
    }

    /// Softmax over the last dimension. Undefined for streams, which freeze weights instead.
    pub fn softmax(&self, mask: &SoftmaxMask) -> Result<Self> {
        if let Lens::Streams(_) = &self.lens {
            return Err(Error::Undefined {
                lens: "streams",
                operation: "softmax",
                advice: "take the scores with `for_scores`, which freezes them",
            });
        }
        if let Lens::Contextual(_) = &self.lens {
            return Err(Error::Undefined {
                lens: "contextual",
                operation: "softmax",
                advice: "take the scores with `for_selection`, which freezes them",
            });
        }
        let value = match &self.lens {
            Lens::Relevance(rules) => rules.softmax(&self.value, mask)?,
            Lens::Integers(functions) => self.integer_softmax(*functions, mask)?,
            _ => softmax(&self.value, mask)?,
        };
        self.count(5, &[&self.value], &value);
        self.computed(value)
    }

    /// Rotates pairs of features of heads that lie side by side, `[batch, length, heads · width]`,
    /// by position, all heads alike or each by angles of its own ([`merged_rotary`]). Feeds scores only, so it has no streams rule of its own but the linear one.
    pub fn rotary(
        &self,
        heads: usize,
        cos: &Tensor,
        sin: &Tensor,
        pairs: RotaryPairs,
    ) -> Result<Self> {
        let value = self.mapped_value(|value| Ok(merged_rotary(value, heads, cos, sin, pairs)?))?;
        self.count(3, &[&self.value], &value);
        // A rotation mixes the features of a head, so streams over positions keep their axis.
        let rotate = |t: &Tensor, shift: usize| -> Result<Tensor> {
            if shift == 0 {
                return Ok(merged_rotary(t, heads, cos, sin, pairs)?);
            }
            let shape = t.dims().to_vec();
            let folded = tensor(t.flatten(0, 1))?;
            tensor(merged_rotary(&folded, heads, cos, sin, pairs)?.reshape(shape))
        };
        self.linear_map(&self.value, value, Change::Other, &rotate, Some)
    }

    /// Recurrence `h_t = a_t h_{t-1} + x_t` along dimension 1, this signal being `x`. Under
    /// streams and relevance the decay is a constant.
    pub fn scan(&self, decay: &Self) -> Result<Self> {
        if let (Lens::Contextual(_), _) | (_, Lens::Contextual(_)) = (&self.lens, &decay.lens) {
            return Self::contextual_recurrence("scan");
        }
        let joined = match &self.lens {
            Lens::Streams(_) => self,
            _ => rules_of("scan", &[self, decay])?.unwrap_or(self),
        };
        let frozen = match &joined.lens {
            Lens::Relevance(_) => decay.value.detach(),
            _ => decay.value.clone(),
        };
        let value = self.mapped_value(|value| Ok(linear_scan(&frozen, value, None)?))?;
        joined.count(2, &[&self.value, &frozen], &value);
        let scan = |t: &Tensor, shift: usize| -> Result<Tensor> {
            if shift == 0 {
                return Ok(linear_scan(&frozen, t, None)?);
            }
            let mut streams = Vec::with_capacity(t.dims()[0]);
            for stream in 0..t.dims()[0] {
                streams.push(linear_scan(&frozen, &tensor(t.get(stream))?, None)?);
            }
            tensor(Tensor::stack(&streams, 0))
        };
        joined.linear_map(&self.value, value, Change::Other, &scan, |_| None)
    }

    /// Causal convolution of each channel with its own short filter, whose last tap meets the
    /// present: `[batch, channels, length]` with `kernel` `[channels, taps]`, then `bias`
    /// `[channels]`.
    pub fn depthwise_convolution(&self, kernel: &Tensor, bias: Option<&Tensor>) -> Result<Self> {
        let value =
            self.mapped_value(|value| Ok(causal_depthwise_convolution(value, kernel, None)?))?;
        let taps = tensor(kernel.dim(1))? as u64;
        self.count(2 * taps, &[&self.value, kernel], &value);
        let convolve = |t: &Tensor, shift: usize| -> Result<Tensor> {
            if shift == 0 {
                return Ok(causal_depthwise_convolution(t, kernel, None)?);
            }
            let folded = tensor(t.flatten(0, 1))?;
            let convolved = causal_depthwise_convolution(&folded, kernel, None)?;
            tensor(convolved.reshape(t.shape()))
        };
        let y = self.linear_map(&self.value, value, Change::Other, &convolve, |_| None)?;
        match bias {
            Some(bias) => y.add_constant(&tensor(bias.unsqueeze(1))?),
            None => Ok(y),
        }
    }

    /// Causal convolution of each channel with its own long filter, whose first tap meets the
    /// present, by Fourier transforms: `[batch, channels, length]` with `kernel` `[channels, taps]`.
    ///
    /// # Errors
    /// When the channels differ.
    pub fn fft_convolution(&self, kernel: &Tensor) -> Result<Self> {
        let value = self.mapped_value(|value| Ok(fft_convolution(value, kernel)?))?;
        // Three transforms of twice the length, 2.5 n log₂ n each, for each channel of a sequence.
        let length = 2.0 * tensor(self.value.dim(2))? as f64;
        let each = 7.5 * length.max(2.0).log2() * 2.0;
        self.count(each as u64, &[&self.value, kernel], &value);
        let convolve = |t: &Tensor, shift: usize| -> Result<Tensor> {
            if shift == 0 {
                return Ok(fft_convolution(t, kernel)?);
            }
            let folded = tensor(t.flatten(0, 1))?;
            tensor(fft_convolution(&folded, kernel)?.reshape(t.shape()))
        };
        self.linear_map(&self.value, value, Change::Other, &convolve, |_| None)
    }

    /// Contracts the last dimension with a matching constant: `Σ_s x[.., s] c[.., s]`.
    pub fn contract(&self, constant: &Self) -> Result<Self> {
        self.gate(constant)?.sum_last()
    }
}
