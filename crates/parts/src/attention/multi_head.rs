//! Multi-head attention (Vaswani et al., Attention Is All You Need, 2017, arXiv 1706.03762),
//! with grouped keys and values (Ainslie et al., arXiv 2305.13245), sliding windows, and the
//! positions of [`crate::position`].
//!
//! ```text
//! Q = x W_Qᵀ + b_Q                    [batch, query, heads · head_width]
//! K = s W_Kᵀ + b_K                    [batch, key, groups · head_width], s = x or the memory
//! V = s W_Vᵀ + b_V                    [batch, key, groups · value_width]
//! y = concat_h( softmax(scale · Q_h K_gᵀ + bias) V_g ) W_Oᵀ + b_O,   g = h · groups / heads
//! ```
//!
//! Cost for `n` queries over the `p` query-key pairs that masks leave: products
//! `2 n width · (head_width + value_width) · (heads + groups)` with as many keys as queries, and
//! `p · heads · (2 head_width + 2 value_width + 5)` for scores, softmax and mixing; a decoding
//! step pays for its own row. Memory of the state: `groups · (head_width + value_width)` numbers
//! per token, `heads · head_width` where values are keys. Parameters:
//! `width · (head_width + value_width) · (heads + groups)` and the biases. An output that is tied to the
//! queries has no parameters, and none at all costs nothing either.

mod by_place;
mod local;
mod output;
mod scores;
mod shortened;
mod spec;

use super::mechanism::{Mechanism, MechanismPass, Memory, Resumed, Scores};
use crate::dropout::dropout;
use crate::error::tensor;
use crate::norm::Norm;
use crate::parameters::Parameters;
use crate::position::{Position, Span};
use crate::state::MixerState;
use crate::{Context, Result};
use lapidary_kernels::{AttentionOptions, ScoreBias, Tensor, naive};
use lapidary_signal::{Lens, Linear, Mixing, Signal};
use local::Local;
pub use local::LocalFilter;
pub use output::OutputProjection;
pub use spec::{MultiHeadSpec, QueryKeyNorm, QueryKeySharing};

/// Multi-head attention with its parameters. Also cross-attention, when keys and values come
/// from elsewhere.
#[derive(Debug)]
pub struct MultiHeadAttention {
    path: String,
    spec: MultiHeadSpec,
    head_width: usize,
    scale: f64,
    query: Linear,
    /// Absent where queries are keys.
    key: Option<Linear>,
    /// Absent where queries are values.
    value: Option<Linear>,
    local: Option<Local>,
    /// Absent where what the heads give is written as it is.
    output: Option<Linear>,
    query_norm: Option<Norm>,
    key_norm: Option<Norm>,
    position: Position,
    /// Absent where it is softmax.
    mechanism: Option<Box<dyn Mechanism>>,
}

impl MultiHeadAttention {
    /// Builds self-attention for tokens of `width`.
    pub fn new(spec: &MultiHeadSpec, width: usize, parameters: Parameters<'_>) -> Result<Self> {
        Self::reading(("in", width), spec, width, parameters)
    }

    /// Builds attention of tokens of `width` over a memory of the same width.
    pub fn over_memory(
        spec: &MultiHeadSpec,
        width: usize,
        parameters: Parameters<'_>,
    ) -> Result<Self> {
        Self::reading(("memory", width), spec, width, parameters)
    }

    /// Builds attention of tokens of `width` over a memory of `memory_width`.
    pub fn between(
        spec: &MultiHeadSpec,
        width: usize,
        memory_width: usize,
        parameters: Parameters<'_>,
    ) -> Result<Self> {
        Self::reading(("memory", memory_width), spec, width, parameters)
    }

    /// `source` is the site that keys and values are computed from, `source_width` its features.
    fn reading(
        (source, source_width): (&str, usize),
        spec: &MultiHeadSpec,
        width: usize,
        mut parameters: Parameters<'_>,
    ) -> Result<Self> {
        let (head_width, value_width) = (spec.head_width(width), spec.value_width(width));
        let (heads, groups) = (spec.heads, spec.groups());
        let norm = |parameters: Parameters<'_>, count: usize| -> Result<Option<Norm>> {
            match &spec.query_key_norm {
                None => Ok(None),
                Some(QueryKeyNorm { norm, per_head }) => {
                    let features = if *per_head {
                        head_width
                    } else {
                        count * head_width
                    };
                    Norm::new(norm, features, parameters).map(Some)
                }
            }
        };
        let query = parameters.linear("query", "in", width, heads * head_width, spec.bias)?;
        Ok(Self {
            path: parameters.path().to_owned(),
            head_width,
            scale: spec.scale(width),
            key: match spec.sharing {
                QueryKeySharing::None => {
                    let keys = groups * head_width;
                    Some(parameters.linear("key", source, source_width, keys, spec.bias)?)
                }
                QueryKeySharing::QueryKey | QueryKeySharing::All => None,
            },
            value: match spec.sharing {
                QueryKeySharing::None | QueryKeySharing::QueryKey => {
                    let values = groups * value_width;
                    Some(parameters.linear("value", source, source_width, values, spec.bias)?)
                }
                QueryKeySharing::All => None,
            },
            output: match spec.output {
                OutputProjection::Own => Some(parameters.linear(
                    "output",
                    "mixed",
                    heads * value_width,
                    width,
                    spec.output_bias.unwrap_or(spec.bias),
                )?),
                OutputProjection::Tied => Some(output::tied(&query, parameters.path())?),
                OutputProjection::Absent => None,
            },
            query,
            local: match spec.local {
                None => None,
                Some(local) => Some(Local::new(local, heads, &mut parameters)?),
            },
            query_norm: norm(parameters.at("query_norm"), heads)?,
            key_norm: norm(parameters.at("key_norm"), groups)?,
            position: Position::new(
                &spec.position,
                (heads, groups),
                head_width,
                spec.causal,
                parameters.at("position"),
            )?,
            mechanism: match spec.mechanism.spec() {
                None => None,
                Some(mechanism) => {
                    Some(mechanism.build(&spec.sizes(width), parameters.at("mechanism"))?)
                }
            },
            spec: spec.clone(),
        })
    }

    /// Self-attention over `x` `[batch, length, width]`.
    pub fn forward(
        &self,
        x: &Signal,
        cx: &Context<'_>,
        state: Option<&mut MixerState>,
    ) -> Result<Signal> {
        let x = cx.trace.site(format_args!("{}.in", self.path), x.clone())?;
        self.attend(&x, &x, cx.key_padding, self.spec.causal, cx, state)
    }

    /// Attention of `x` over `memory` `[batch, keys, width]`.
    pub fn cross(
        &self,
        x: &Signal,
        memory: &Signal,
        memory_padding: Option<&Tensor>,
        cx: &Context<'_>,
    ) -> Result<Signal> {
        let x = cx.trace.site(format_args!("{}.in", self.path), x.clone())?;
        let memory = cx
            .trace
            .site(format_args!("{}.memory", self.path), memory.clone())?;
        // What is said of this sequence's tokens is not said of the memory's.
        let cx = &Context {
            key_bias: None,
            places: None,
            ..*cx
        };
        self.attend(&x, &memory, memory_padding, false, cx, None)
    }

    fn attend(
        &self,
        x: &Signal,
        source: &Signal,
        key_padding: Option<&Tensor>,
        causal: bool,
        cx: &Context<'_>,
        state: Option<&mut MixerState>,
    ) -> Result<Signal> {
        let site = |name: &str, signal: Signal| {
            cx.trace.site(format_args!("{}.{name}", self.path), signal)
        };
        let q = site("query", x.for_scores().linear(&self.query)?)?;
        self.check_scores(cx, state.is_some())?;
        if state.is_none()
            && let Some(mixed) = self.shortened([x, source, &q], key_padding, cx)?
        {
            let mixed = site("mixed", mixed)?;
            return Ok(site("out", self.written(mixed)?)?);
        }
        let k = match &self.key {
            Some(key) => site("key", source.for_scores().linear(key)?)?,
            None => q.clone(),
        };
        let v = match (&self.value, source.lens()) {
            (Some(value), _) => source.linear_values(value)?,
            (None, Lens::Plain | Lens::Meter(..) | Lens::Rounded(_) | Lens::Integers(_)) => {
                q.clone()
            }
            // Values are followed where queries are frozen.
            (None, _) => source.linear_values(&self.query)?,
        };
        let v = site("value", v)?;
        let q = self.normalise(&q, &self.query_norm)?;
        let k = self.normalise(&k, &self.key_norm)?;
        let (q, k) = self.rotate(q, k, cx.offset)?;
        let mechanism = self.mechanism.as_deref();
        if let Some(mechanism) = mechanism.filter(|mechanism| !mechanism.is_softmax(cx)) {
            let mixed = self.through(mechanism, [x, &q, &k, &v], key_padding, cx, state)?;
            let mixed = site("mixed", mixed)?;
            return Ok(site("out", self.written(mixed)?)?);
        }
        let (k, v) = match state {
            Some(state) => recall(state, k, v)?,
            None => (k, v),
        };
        let (q, k) = match cx.key_bias {
            Some(bias) => self.with_key_bias(&q, &k, bias)?,
            None => (q, k),
        };
        let options = AttentionOptions {
            scale: self.scale,
            causal,
            window: self.spec.window,
            query_offset: cx.offset,
            key_padding: key_padding.cloned(),
            bias: match cx.places {
                Some(places) => self.position.bias_between(places)?.map(ScoreBias::Pairs),
                None => self.bias(&q, &k, cx)?,
            },
        };
        let mixed = match cx.places.filter(|_| causal || self.spec.window.is_some()) {
            Some(places) => self.mix_by_place(&q, &k, &v, options, places, cx)?,
            None => self.mix(&q, &k, &v, &options, cx)?,
        };
        let mixed = match &self.local {
            None => mixed,
            Some(local) => local.beside(&mixed, &v, key_padding, &self.path, cx)?,
        };
        let mixed = site("mixed", mixed)?;
        Ok(site("out", self.written(mixed)?)?)
    }

    /// What positions add to the scores of queries and keys, heads side by side.
    fn bias(&self, q: &Signal, k: &Signal, cx: &Context<'_>) -> Result<Option<ScoreBias>> {
        let span = Span {
            queries: q.dims()[1],
            keys: k.dims()[1],
            offset: cx.offset,
            draw: cx.draw,
        };
        let on = (q.dtype(), q.device());
        self.position.bias_in_pass(span, &self.path, cx.biases, on)
    }

    /// Mixes by a mechanism that is not softmax: `x` `[batch, query, width]`, queries, keys and
    /// values with heads side by side.
    fn through(
        &self,
        mechanism: &dyn Mechanism,
        [x, q, k, v]: [&Signal; 4],
        key_padding: Option<&Tensor>,
        cx: &Context<'_>,
        state: Option<&mut MixerState>,
    ) -> Result<Signal> {
        let (heads, groups) = (self.spec.heads, self.spec.groups());
        let tokens = x.for_weights()?;
        let pass = MechanismPass {
            path: &self.path,
            tokens: &tokens,
            keep: key_padding,
            offset: cx.offset,
            context: cx,
        };
        let (k, v, own) = match state {
            None => (k.clone(), v.clone(), None),
            Some(state) if mechanism.memory() == Memory::KeysAndValues => {
                let (k, v) = recall(state, k.clone(), v.clone())?;
                (k, v, None)
            }
            Some(state) => (k.clone(), v.clone(), Some(state)),
        };
        let scores = Scores {
            window: self.spec.window,
            bias: self.bias(q, &k, cx)?,
        };
        let each = |x: &Signal, heads: usize| -> Result<Tensor> {
            let split = x.split_heads(heads)?.for_weights()?;
            Ok(naive::repeat_groups(&split, self.spec.heads)?)
        };
        let (q, k) = (each(q, heads)?, each(&k, groups)?);
        let values = v.split_heads(groups)?;
        let resumed = match own {
            None => None,
            Some(state) => {
                let v = match mechanism.reads_values() {
                    true => naive::repeat_groups(&values.for_weights()?, heads)?,
                    false => naive::repeat_groups(values.value(), heads)?,
                };
                Some(mechanism.resume(&q, &k, &v, state, &pass)?)
            }
        };
        let (mixing, values, past) = match resumed {
            None if mechanism.reads_values() => {
                let v = naive::repeat_groups(&values.for_weights()?, heads)?;
                (mechanism.mixing_by_values(&q, &k, &v, &pass)?, values, None)
            }
            None => {
                let mixing = mechanism.mixing_by_scores(&q, &k, scores, &pass)?;
                (mixing, values, None)
            }
            Some(Resumed::Summed { mixing, past }) => (mixing, values, Some(past)),
            Some(Resumed::Kept {
                mixing,
                values: all,
            }) => (mixing, behind_earlier(all, values)?, None),
        };
        let mixed = self.mix_values(&values, mixing.as_ref(), cx)?;
        let mixed = match past {
            Some(past) => mixed.add_constant(&past)?,
            None => mixed,
        };
        Ok(mixed.merge_heads()?)
    }

    /// Mixes `values` `[batch, groups, key, value_width]`, the weights laid out where a site asks.
    fn mix_values(&self, values: &Signal, mixing: &dyn Mixing, cx: &Context<'_>) -> Result<Signal> {
        let site = format_args!("{}.weights", self.path);
        match cx.trace.wants(site) {
            // Counted as if never laid out, so that looking at the weights doesn't change the cost.
            true if !matches!(values.lens(), Lens::Meter(..)) => {
                let weights = values.mixing_weights(mixing)?;
                Ok(values.mix_by(&cx.trace.site(site, weights)?)?)
            }
            _ => Ok(values.mix_through(mixing)?),
        }
    }

    /// Attention proper. The weights are only ever laid out when a site asks for them or
    /// dropout acts on them.
    fn mix(
        &self,
        q: &Signal,
        k: &Signal,
        v: &Signal,
        options: &AttentionOptions,
        cx: &Context<'_>,
    ) -> Result<Signal> {
        let wanted = cx.trace.wants(format_args!("{}.weights", self.path));
        let drops = cx.dropout_seed.is_some() && self.spec.dropout > 0.0;
        let (heads, groups) = (self.spec.heads, self.spec.groups());
        if !wanted && !drops {
            return Ok(v.attend_merged(q, k, heads, groups, options)?);
        }
        let (q, k) = (q.split_heads(heads)?, k.split_heads(groups)?);
        let v = v.split_heads(groups)?;
        let site = format_args!("{}.weights", self.path);
        let weights = cx.trace.site(site, q.attention_weights(&k, options)?)?;
        let weights = dropout(&weights, self.spec.dropout, site, cx)?;
        if let Lens::Meter(..) = v.lens() {
            // Counted as if fused, so that looking at the weights doesn't change the cost.
            return Ok(v.attend(&q, &k, options)?.merge_heads()?);
        }
        Ok(v.mix_by(&weights)?.merge_heads()?)
    }

    /// Queries or keys `[batch, length, heads · width]`, normalised as the spec says: all heads
    /// together or each by itself.
    fn normalise(&self, x: &Signal, norm: &Option<Norm>) -> Result<Signal> {
        match (norm, &self.spec.query_key_norm) {
            (Some(norm), Some(QueryKeyNorm { per_head: true, .. })) => {
                let (batch, length, width) = tensor(x.value().dims3())?;
                let heads = width / self.head_width;
                let each = x.reshape(&[batch, length, heads, self.head_width])?;
                Ok(norm.forward(&each)?.reshape(&[batch, length, width])?)
            }
            (Some(norm), _) => norm.forward(x),
            (None, _) => Ok(x.clone()),
        }
    }

    fn rotate(&self, q: Signal, k: Signal, offset: usize) -> Result<(Signal, Signal)> {
        let Some(rotary) = self.position.rotary() else {
            return Ok((q, k));
        };
        let length = q.dims()[1];
        let turn = |x: Signal, heads: usize| -> Result<Signal> {
            let (cos, sin) = rotary.tables(heads, offset, length, x.dtype(), x.device())?;
            Ok(x.rotary(heads, &cos, &sin, rotary.pairs())?)
        };
        Ok((turn(q, self.spec.heads)?, turn(k, self.spec.groups())?))
    }
}

/// Keys and values of every token so far. Those of earlier tokens are constants to any lens.
fn recall(state: &mut MixerState, k: Signal, v: Signal) -> Result<(Signal, Signal)> {
    let new = k.dims()[1];
    let (keys, values) = state.cache(k.value(), v.value())?;
    let earlier = keys.dims()[1] - new;
    let with_lens = |all: Tensor, latest: Signal| -> Result<Signal> {
        if earlier == 0 {
            return Ok(latest);
        }
        if matches!(latest.lens(), Lens::Plain) {
            return Ok(Signal::from(all));
        }
        let past = Signal::from(tensor(all.narrow(1, 0, earlier))?);
        Ok(Signal::concatenate(&[past, latest], 1)?)
    };
    Ok((with_lens(keys, k)?, with_lens(values, v)?))
}

/// Values `[batch, heads, key, width]` of which the last are `latest`
/// `[batch, groups, new, width]`, with the lens of those; earlier ones are constants to it.
fn behind_earlier(all: Tensor, latest: Signal) -> Result<Signal> {
    if matches!(latest.lens(), Lens::Plain) {
        return Ok(Signal::from(all));
    }
    let (batch, heads, keys, width) = tensor(all.dims4())?;
    let (groups, new) = match *latest.dims() {
        [_, groups, new, _] => (groups, new),
        _ => (heads, keys),
    };
    let latest = match groups == heads {
        true => latest,
        false => latest
            .unsqueeze(2)?
            .broadcast(&[batch, groups, heads / groups.max(1), new, width])?
            .reshape(&[batch, heads, new, width])?,
    };
    let earlier = tensor(all.narrow(2, 0, keys.saturating_sub(new)))?;
    let earlier = Signal::from(earlier).merge_heads()?;
    let joined = Signal::concatenate(&[earlier, latest.merge_heads()?], 1)?;
    Ok(joined.split_heads(heads)?)
}
