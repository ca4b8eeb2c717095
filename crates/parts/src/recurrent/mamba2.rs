//! The state-space mixer of heads (Dao & Gu, Transformers are SSMs: Generalized Models and Efficient
//! Algorithms Through Structured State Space Duality, Mamba-2, 2024, arXiv 2405.21060).
//!
//! Channels form heads, each of which forgets at a rate of its own; what enters and what leaves the
//! state is computed for all heads of a group at once:
//!
//! ```text
//! [z, u, B, C, δ] = x W_inᵀ               z, u: inner = heads · head_width;  B, C: groups · state;  δ: heads
//! [u, B, C] = SiLU(causal depthwise convolution of [u, B, C] with `taps` taps)
//! Δ      = softplus(δ + b_Δ)              [batch, length, heads]
//! h_t    = exp(Δ_t A) h_{t−1} + Δ_t B_t u_tᵀ,   A = −exp(decay_log)      [state, head_width] of each head
//! y      = C_tᵀ h_t + D u_t
//! out    = Norm(y ⊙ SiLU(z)) W_outᵀ
//! ```
//!
//! The norm is over the channels of a group. The recurrence is computed in chunks whose positions
//! meet each other directly ([`HeadScan`]), which is what is trained; decoding goes on from its state.
//!
//! Cost per token: `2 width (2 inner + 2 groups · state + heads) + 2 inner · width` for the products,
//! `2 taps (inner + 2 groups · state)` for the convolution, and for each head
//! `2 chunk (state + head_width) + 4 state · head_width + state + 1` for the recurrence. Decoding
//! remembers `(inner + 2 groups · state) (taps − 1) + inner · state` numbers however long the text.
//! Parameters: the products' `width (3 inner + 2 groups · state + heads)`, `taps` for each channel of the
//! convolution and one for its bias, `3 heads` and the norm's `inner`.
//!
//! Padding is treated as in [Mamba](crate::recurrent::Mamba). Names and shapes of the parameters are
//! those of the checkpoints of `transformers` one for one: `in_proj` is `input`, `conv1d` is
//! `convolution`, `dt_bias` is `step_bias`, `A_log` is `decay_log`, `D` is `skip`, `out_proj` is `output`.
//!
//! Without a scan (`scan = false`; Muñoz, Yuan & Jain, Mamba-Shedder, 2025, arXiv 2501.17088) `y = u`:
//! the input projection gives `[z, u]` and the convolution sees `u` alone; gate and norm stay, and
//! decoding remembers the convolution's window of `inner` channels.
//!
//! Under streams and relevance `Δ`, `B`, `C` and the decay are held fixed, `u` is followed, and the
//! gate obeys the product rule.

use super::short_convolution::{ShortConvolution, masked, real_tokens};
use crate::activation::ActivationSpec;
use crate::error::{bounded, tensor};
use crate::norm::NormSpec;
use crate::parameters::{Init, Parameters};
use crate::state::MixerState;
use crate::{Context, Error, Result};
use lapidary_kernels::{Activation, Tensor, activate};
use lapidary_signal::{HeadScan, Linear, Signal};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

const MAX_INNER: usize = 1 << 20;
const MAX_STATE: usize = 1 << 12;
const MAX_TAPS: usize = 1 << 10;
const MAX_CHUNK: usize = 1 << 16;

/// A state-space mixer of heads.
///
/// ```
/// use lapidary_parts::recurrent::Mamba2Spec;
/// let spec = Mamba2Spec { head_width: 16, state: 8, ..Mamba2Spec::default() };
/// // z and u of twice the width, B and C of one group, and a step for each head.
/// assert_eq!((spec.heads(32), spec.projected(32)), (4, 64 + 64 + 8 + 8 + 4));
/// let without = Mamba2Spec { scan: false, ..spec };
/// assert_eq!((without.projected(32), without.convolved(32)), (64 + 64, 64));
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Mamba2Spec {
    /// Channels of the recurrence; twice the width when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inner: Option<usize>,
    /// Channels of a head, a divisor of all of them.
    #[serde(default = "default_head_width")]
    pub head_width: usize,
    /// Groups of heads that enter and leave their states alike, a divisor of the heads.
    #[serde(default = "one")]
    pub groups: usize,
    /// Numbers that each channel remembers.
    #[serde(default = "default_state")]
    pub state: usize,
    /// Positions that the convolution sees.
    #[serde(default = "default_taps")]
    pub taps: usize,
    /// Positions that meet each other directly, which changes nothing but the time it takes: 1 is the
    /// recurrence, position by position.
    #[serde(default = "default_chunk")]
    pub chunk: usize,
    /// What follows the convolution. The gate's is always SiLU.
    #[serde(default = "silu")]
    pub activation: ActivationSpec,
    /// What normalises the gated channels of each group: `rms` or `none`.
    #[serde(default = "gated_norm")]
    pub norm: NormSpec,
    /// The smallest step size.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub smallest_step: Option<f64>,
    /// The largest step size.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub largest_step: Option<f64>,
    /// Whether the input and output projections have biases.
    #[serde(default)]
    pub bias: bool,
    /// Whether the convolution has a bias.
    #[serde(default = "yes")]
    pub convolution_bias: bool,
    /// Whether there is a recurrence; without one, what the convolution gives goes to the gate.
    #[serde(default = "yes", skip_serializing_if = "is_true")]
    pub scan: bool,
}

fn default_head_width() -> usize {
    64
}

fn one() -> usize {
    1
}

fn default_state() -> usize {
    128
}

fn default_taps() -> usize {
    4
}

fn default_chunk() -> usize {
    64
}

fn silu() -> ActivationSpec {
    ActivationSpec::Silu
}

fn gated_norm() -> NormSpec {
    NormSpec::Rms { epsilon: 1e-5 }
}

fn yes() -> bool {
    true
}

#[allow(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde asks for a reference"
)]
fn is_true(value: &bool) -> bool {
    *value
}

impl Default for Mamba2Spec {
    fn default() -> Self {
        Self {
            inner: None,
            head_width: default_head_width(),
            groups: one(),
            state: default_state(),
            taps: default_taps(),
            chunk: default_chunk(),
            activation: silu(),
            norm: gated_norm(),
            smallest_step: None,
            largest_step: None,
            bias: false,
            convolution_bias: yes(),
            scan: yes(),
        }
    }
}

impl Mamba2Spec {
    /// Channels of the recurrence.
    pub fn inner(&self, width: usize) -> usize {
        self.inner.unwrap_or_else(|| width.saturating_mul(2))
    }

    /// Heads of the recurrence.
    pub fn heads(&self, width: usize) -> usize {
        self.inner(width) / self.head_width.max(1)
    }

    /// Channels of the convolution: what is remembered, and with a scan `B` and `C` of each group.
    pub fn convolved(&self, width: usize) -> usize {
        let selected = match self.scan {
            true => self.groups.saturating_mul(self.state).saturating_mul(2),
            false => 0,
        };
        self.inner(width).saturating_add(selected)
    }

    /// Features that the input projection gives: the gate, what is convolved, and with a scan the step
    /// of each head.
    pub fn projected(&self, width: usize) -> usize {
        let steps = match self.scan {
            true => self.heads(width),
            false => 0,
        };
        let gated = self.inner(width).saturating_add(self.convolved(width));
        gated.saturating_add(steps)
    }

    /// Refuses what cannot be built for tokens of `width`.
    ///
    /// # Errors
    /// When a size is out of its range, heads or groups do not divide what they share, or the bounds
    /// of the step are none; the error names the field under `field`.
    pub fn validate(&self, width: usize, field: &str) -> Result<()> {
        let inner = self.inner(width);
        bounded(format!("{field}.inner"), inner, 1..=MAX_INNER)?;
        bounded(format!("{field}.state"), self.state, 1..=MAX_STATE)?;
        bounded(format!("{field}.taps"), self.taps, 1..=MAX_TAPS)?;
        bounded(format!("{field}.chunk"), self.chunk, 1..=MAX_CHUNK)?;
        let divides = |name: &str, found: usize, of: usize, what: &str| {
            if found > 0 && of.is_multiple_of(found) {
                return Ok(());
            }
            let expected = format!("a divisor of {what}, {of}");
            Err(Error::spec(format!("{field}.{name}"), found, expected))
        };
        divides("head_width", self.head_width, inner, "the inner channels")?;
        divides("groups", self.groups, self.heads(width), "the heads")?;
        self.norm.validate(&format!("{field}.norm"))?;
        if let NormSpec::Layer { .. } = self.norm {
            let what = format!("{field}.norm.kind");
            return Err(Error::spec(what, "layer", "rms or none"));
        }
        self.validate_step(field)
    }

    fn validate_step(&self, field: &str) -> Result<()> {
        let bounds = [
            ("smallest_step", self.smallest_step),
            ("largest_step", self.largest_step),
        ];
        for (name, bound) in bounds {
            if let Some(bound) = bound.filter(|bound| !(bound.is_finite() && *bound >= 0.0)) {
                let expected = "a number of at least 0";
                return Err(Error::spec(format!("{field}.{name}"), bound, expected));
            }
        }
        match (self.smallest_step, self.largest_step) {
            (Some(smallest), Some(largest)) if smallest > largest => Err(Error::spec(
                format!("{field}.smallest_step"),
                smallest,
                format!("at most the largest, {largest}"),
            )),
            _ => Ok(()),
        }
    }
}

/// A state-space mixer of heads with its parameters.
#[derive(Debug)]
pub struct Mamba2 {
    path: String,
    inner: usize,
    input: Linear,
    convolution: ShortConvolution,
    recurrence: Option<Recurrence>,
    norm: GatedNorm,
    output: Linear,
}

/// The recurrence and what it does not read from the token.
#[derive(Debug)]
struct Recurrence {
    heads: usize,
    groups: usize,
    state: usize,
    chunk: usize,
    smallest_step: Option<f64>,
    largest_step: Option<f64>,
    /// `b_Δ`, `[heads]`.
    step_bias: Tensor,
    /// `ln(−A)`, `[heads]`.
    decay_log: Tensor,
    /// `D`, `[heads]`.
    skip: Tensor,
}

impl Recurrence {
    fn new(spec: &Mamba2Spec, width: usize, parameters: &mut Parameters<'_>) -> Result<Self> {
        let heads = spec.heads(width);
        let steps = Init::InverseSoftplusLogUniform {
            low: 1e-3,
            high: 1e-1,
        };
        Ok(Self {
            heads,
            groups: spec.groups,
            state: spec.state,
            chunk: spec.chunk,
            smallest_step: spec.smallest_step,
            largest_step: spec.largest_step,
            step_bias: parameters.tensor("step_bias", &[heads], steps)?,
            decay_log: parameters.tensor("decay_log", &[heads], Init::LogRange)?,
            skip: parameters.tensor("skip", &[heads], Init::Ones)?,
        })
    }

    /// `Δ`, `[batch, heads, length]`, of `step` `[batch, length, heads]`.
    fn step_sizes(&self, step: Tensor) -> Result<Tensor> {
        let step = match self.smallest_step {
            Some(smallest) => tensor(step.maximum(smallest))?,
            None => step,
        };
        let step = match self.largest_step {
            Some(largest) => tensor(step.minimum(largest))?,
            None => step,
        };
        tensor(tensor(step.transpose(1, 2))?.contiguous())
    }

    /// What the heads' states are made of and read by: `content` is `[u, B, C]`
    /// `[batch, length, inner + 2 groups · state]`, `step` `Δ` before its bounds.
    fn weights(&self, content: &Signal, step: Tensor, initial: Option<Tensor>) -> Result<HeadScan> {
        let (batch, length, channels) = tensor(content.value().dims3())?;
        let selected = self.groups * self.state;
        let part = |index: usize| -> Result<Tensor> {
            let start = channels - (2 - index) * selected;
            let part = content.narrow(2, start, selected)?.for_selection();
            let shape = (batch, length, self.groups, self.state);
            let part = tensor(tensor(part.into_value().contiguous())?.reshape(shape))?;
            tensor(tensor(part.transpose(1, 2))?.contiguous())
        };
        Ok(HeadScan {
            step: self.step_sizes(step)?,
            rate: tensor(activate(&self.decay_log, Activation::Exp)?.neg())?,
            entry: part(0)?,
            exit: part(1)?,
            initial,
            chunk: self.chunk,
        })
    }

    /// `C_tᵀ h_t + D u_t` for `u` `[batch, length, inner]`, and the last state
    /// `[batch, heads, state, head_width]` of a mixer that `remembers`.
    fn scan(
        &self,
        u: &Signal,
        weights: &HeadScan,
        remembers: bool,
    ) -> Result<(Signal, Option<Tensor>)> {
        let heads = u.contiguous()?.split_heads(self.heads)?.contiguous()?;
        let scanned = heads.head_scan(weights)?.merge_heads()?;
        let state = match remembers {
            true => Some(weights.last_state(heads.value())?.detach()),
            false => None,
        };
        let (_, _, inner) = tensor(u.value().dims3())?;
        let skip = tensor(self.skip.unsqueeze(1))?;
        let skip = tensor(skip.broadcast_as((self.heads, inner / self.heads)))?;
        let skip = tensor(tensor(skip.contiguous())?.reshape(inner))?;
        Ok((scanned.add(&u.multiply_constant(&skip)?)?, state))
    }
}

/// The norm behind the gate, over the channels of each group.
#[derive(Debug)]
struct GatedNorm {
    groups: usize,
    /// `γ` `[inner]` and `ε`; nothing where there is no norm.
    rms: Option<(Tensor, f64)>,
}

impl GatedNorm {
    fn new(spec: &Mamba2Spec, inner: usize, mut parameters: Parameters<'_>) -> Result<Self> {
        let rms = match spec.norm {
            NormSpec::Rms { epsilon } => {
                let weight = parameters.tensor("weight", &[inner], Init::Ones)?;
                Some((weight, epsilon))
            }
            NormSpec::None | NormSpec::Layer { .. } => None,
        };
        Ok(Self {
            groups: spec.groups,
            rms,
        })
    }

    fn forward(&self, x: &Signal) -> Result<Signal> {
        let Some((weight, epsilon)) = &self.rms else {
            return Ok(x.clone());
        };
        if self.groups == 1 {
            return Ok(x.rms_norm(Some(weight), *epsilon)?);
        }
        let (batch, length, inner) = tensor(x.value().dims3())?;
        let grouped = x.reshape(&[batch, length, self.groups, inner / self.groups])?;
        let normed = grouped.rms_norm(None, *epsilon)?;
        let whole = normed.reshape(&[batch, length, inner])?;
        Ok(whole.multiply_constant(weight)?)
    }
}

impl Mamba2 {
    /// Builds the module for tokens of `width`.
    ///
    /// # Errors
    /// When a parameter is missing or of another shape.
    pub fn new(spec: &Mamba2Spec, width: usize, mut parameters: Parameters<'_>) -> Result<Self> {
        let inner = spec.inner(width);
        let input = parameters.linear("input", "in", width, spec.projected(width), spec.bias)?;
        let convolution = ShortConvolution::new(
            [spec.convolved(width), spec.taps],
            spec.convolution_bias,
            spec.activation,
            parameters.at("convolution"),
        )?;
        let recurrence = match spec.scan {
            true => Some(Recurrence::new(spec, width, &mut parameters)?),
            false => None,
        };
        Ok(Self {
            path: parameters.path().to_owned(),
            inner,
            input,
            convolution,
            recurrence,
            norm: GatedNorm::new(spec, inner, parameters.at("norm"))?,
            output: parameters.linear("output", "mixed", inner, width, spec.bias)?,
        })
    }

    /// Mixes the tokens of `x` `[batch, length, width]`; `memory` holds what earlier ones left.
    ///
    /// # Errors
    /// When padding or memory do not fit the tokens.
    pub fn forward(
        &self,
        x: &Signal,
        cx: &Context<'_>,
        memory: Option<&mut MixerState>,
    ) -> Result<Signal> {
        let site = |name: &str, signal: Signal| {
            cx.trace.site(format_args!("{}.{name}", self.path), signal)
        };
        let real = real_tokens(&self.path, x, cx)?;
        let (batch, _, _) = tensor(x.value().dims3())?;
        let recurrent = self.recurrence.is_some();
        let remembered = memory.as_deref();
        let convolution = &self.convolution;
        let earlier = convolution.recall(remembered, recurrent, batch, &self.path)?;

        let x = site("in", masked(x, real.as_ref())?)?;
        let projected = x.linear(&self.input)?;
        let gate = projected.narrow(2, 0, self.inner)?;
        let features = tensor(projected.value().dim(2))?;
        let steps = self.recurrence.as_ref().map_or(0, |own| own.heads);
        let content = projected.narrow(2, self.inner, features - self.inner - steps)?;

        let (window, initial) = earlier.unzip();
        let (content, window) = convolution.forward(&content, window.as_ref())?;
        let content = site("convolved", masked(&content, real.as_ref())?)?;
        let u = content.narrow(2, 0, self.inner)?;
        let (scanned, state) = match &self.recurrence {
            None => (u, None),
            Some(recurrence) => {
                let step = projected
                    .narrow(2, features - steps, steps)?
                    .for_selection();
                let step = step.add_constant(&recurrence.step_bias)?;
                let step = site("step_size", step.activate(Activation::Softplus)?)?;
                let step = step.into_value();
                let weights = recurrence.weights(&content, step, initial.flatten())?;
                recurrence.scan(&u, &weights, memory.is_some())?
            }
        };
        if let Some(memory) = memory {
            *memory = match state {
                Some(state) => MixerState::Recurrent { window, state },
                None => MixerState::Window(window),
            };
        }
        let gated = scanned.gate(&gate.activate(Activation::Silu)?)?;
        let mixed = site("mixed", self.norm.forward(&gated)?)?;
        Ok(site("out", mixed.linear(&self.output)?)?)
    }
}
