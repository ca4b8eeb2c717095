//! The selective state-space mixer (Gu & Dao, Mamba: Linear-Time Sequence Modeling with
//! Selective State Spaces, 2023, arXiv 2312.00752).
//!
//! A token is mixed with earlier ones by a short convolution and by a recurrence whose step
//! size, entry and read-out are computed from the token, so that the state can keep one token
//! and ignore another:
//!
//! ```text
//! [u, z] = x W_inᵀ                        u, z: [batch, length, inner]
//! u      = SiLU(causal depthwise convolution of u with `taps` taps)
//! [δ, B, C] = u W_selᵀ                    δ: step_rank;  B, C: state
//! Δ      = softplus(δ W_Δᵀ + b_Δ)         [batch, length, inner]
//! h_t    = exp(Δ_t A) ⊙ h_{t−1} + Δ_t u_t B_t,   A = −exp(decay_log)   [inner, state]
//! y      = ((h · C) + D ⊙ u) ⊙ SiLU(z)
//! out    = y W_outᵀ
//! ```
//!
//! Cost per token: `2 (3 width · inner + inner (2 step_rank + 2 state) + inner · taps)` for the
//! products and `7 inner · state` for the recurrence; a decoding step needs no more but for the
//! convolution, which runs over its window anew, and the memory is `inner (taps − 1 + state)`
//! numbers however long the text. Parameters:
//! `inner (3 width + taps + 2 step_rank + 3 state + 2)`, and `inner` for the convolution's bias.
//!
//! Where padding is given, padded tokens are zeroed before the input projection and again after
//! the convolution, as `transformers` does; with `bias` a token after left padding therefore
//! still sees that bias through the convolution. Names and shapes of the parameters are those
//! of its checkpoints one for one: `in_proj` is `input`, `conv1d` is `convolution` (weight
//! `[inner, 1, taps]`, oldest tap first), `x_proj` is `selection`, `dt_proj` is `step`, `A_log`
//! is `decay_log`, `D` is `skip`, `out_proj` is `output`.
//!
//! Without a scan (`scan = false`; Muñoz, Yuan & Jain, Mamba-Shedder, 2025, arXiv 2501.17088)
//! `y = u ⊙ SiLU(z)`: what computes `Δ`, `B`, `C`, the decay and `D` is not there, and decoding
//! remembers the convolution's window alone. It costs `inner (2 step_rank + 3 state + 2)`
//! parameters and all of the recurrence less.
//!
//! Under streams and relevance `Δ`, `B`, `C` and the decay are held fixed, `u` is followed, and
//! the gate obeys the product rule.

use super::short_convolution::{ShortConvolution, masked, real_tokens};
use crate::activation::ActivationSpec;
use crate::error::{bounded, tensor};
use crate::parameters::{Init, Parameters};
use crate::state::MixerState;
use crate::{Context, Result};
use lapidary_kernels::{Activation, Tensor, activate};
use lapidary_signal::{Linear, SelectiveScan, Signal};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

const MAX_INNER: usize = 1 << 20;
const MAX_STATE: usize = 1 << 12;
const MAX_TAPS: usize = 1 << 10;

/// A selective state-space mixer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MambaSpec {
    /// Channels of the recurrence; twice the width when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inner: Option<usize>,
    /// Numbers that each channel remembers.
    #[serde(default = "default_state")]
    pub state: usize,
    /// Positions that the convolution sees.
    #[serde(default = "default_taps")]
    pub taps: usize,
    /// Rank of the step sizes' projection; a sixteenth of the width, rounded up, when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub step_rank: Option<usize>,
    /// What follows the convolution. The gate's is always SiLU.
    #[serde(default = "silu")]
    pub activation: ActivationSpec,
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

fn default_state() -> usize {
    16
}

fn default_taps() -> usize {
    4
}

fn silu() -> ActivationSpec {
    ActivationSpec::Silu
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

impl Default for MambaSpec {
    fn default() -> Self {
        Self {
            inner: None,
            state: default_state(),
            taps: default_taps(),
            step_rank: None,
            activation: silu(),
            bias: false,
            convolution_bias: yes(),
            scan: yes(),
        }
    }
}

impl MambaSpec {
    /// Channels of the recurrence.
    pub fn inner(&self, width: usize) -> usize {
        self.inner.unwrap_or_else(|| width.saturating_mul(2))
    }

    /// Rank of the step sizes' projection.
    pub fn step_rank(&self, width: usize) -> usize {
        self.step_rank.unwrap_or_else(|| width.div_ceil(16))
    }

    /// Refuses what cannot be built for tokens of `width`.
    pub fn validate(&self, width: usize, field: &str) -> Result<()> {
        let inner = self.inner(width);
        bounded(format!("{field}.inner"), inner, 1..=MAX_INNER)?;
        bounded(format!("{field}.state"), self.state, 1..=MAX_STATE)?;
        bounded(format!("{field}.taps"), self.taps, 1..=MAX_TAPS)?;
        let rank = self.step_rank(width);
        bounded(format!("{field}.step_rank"), rank, 1..=inner)
    }
}

/// A selective state-space mixer with its parameters.
#[derive(Debug)]
pub struct Mamba {
    path: String,
    inner: usize,
    input: Linear,
    convolution: ShortConvolution,
    recurrence: Option<Recurrence>,
    output: Linear,
}

/// The recurrence and what selects its step, entry and exit.
#[derive(Debug)]
struct Recurrence {
    state: usize,
    step_rank: usize,
    selection: Linear,
    step: Linear,
    /// `ln(−A)`, `[inner, state]`.
    decay_log: Tensor,
    /// `D`, `[inner]`.
    skip: Tensor,
}

impl Recurrence {
    fn new(spec: &MambaSpec, width: usize, parameters: &mut Parameters<'_>) -> Result<Self> {
        let (inner, state) = (spec.inner(width), spec.state);
        let step_rank = spec.step_rank(width);
        // Deviation of the uniform distribution that the published code draws from.
        let step_deviation = (1.0 / (3.0 * step_rank as f64)).sqrt();
        let selected = step_rank + 2 * state;
        Ok(Self {
            state,
            step_rank,
            selection: parameters.linear("selection", "convolved", inner, selected, false)?,
            step: parameters.linear_starting(
                "step",
                "step_in",
                [inner, step_rank],
                Init::Normal {
                    deviation: step_deviation,
                },
                Some(Init::InverseSoftplusLogUniform {
                    low: 1e-3,
                    high: 1e-1,
                }),
            )?,
            decay_log: parameters.tensor("decay_log", &[inner, state], Init::LogRange)?,
            skip: parameters.tensor("skip", &[inner], Init::Ones)?,
        })
    }

    /// `(h · C) + D ⊙ u` for `u` `[batch, length, inner]`, and the last `h`
    /// `[batch, inner, state]`.
    fn scan(
        &self,
        u: &Signal,
        initial: Option<Tensor>,
        site: impl Fn(&str, Signal) -> lapidary_signal::Result<Signal>,
    ) -> Result<(Signal, Tensor)> {
        let selected = u.for_selection().linear(&self.selection)?;
        let step = site("step_in", selected.narrow(2, 0, self.step_rank)?)?;
        let step = step.linear(&self.step)?.activate(Activation::Softplus)?;
        let scan = SelectiveScan {
            step: site("step_size", step)?.into_value(),
            rate: tensor(activate(&self.decay_log, Activation::Exp)?.neg())?,
            entry: selected.narrow(2, self.step_rank, self.state)?.into_value(),
            exit: selected
                .narrow(2, self.step_rank + self.state, self.state)?
                .into_value(),
            initial,
        };
        let (scanned, state) = u.selective_scan(&scan)?;
        Ok((scanned.add(&u.multiply_constant(&self.skip)?)?, state))
    }
}

impl Mamba {
    /// Builds the module for tokens of `width`.
    pub fn new(spec: &MambaSpec, width: usize, mut parameters: Parameters<'_>) -> Result<Self> {
        let inner = spec.inner(width);
        let input = parameters.linear("input", "in", width, 2 * inner, spec.bias)?;
        let convolution = ShortConvolution::new(
            [inner, spec.taps],
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
            output: parameters.linear("output", "mixed", inner, width, spec.bias)?,
        })
    }

    /// Mixes the tokens of `x` `[batch, length, width]`; `memory` holds what earlier ones left.
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
        let content = projected.narrow(2, 0, self.inner)?;
        let gate = projected.narrow(2, self.inner, self.inner)?;

        let (window, initial) = earlier.unzip();
        let (content, window) = convolution.forward(&content, window.as_ref())?;
        let content = site("convolved", masked(&content, real.as_ref())?)?;
        let (scanned, remembered) = match &self.recurrence {
            None => (content, MixerState::Window(window)),
            Some(recurrence) => {
                let (scanned, state) = recurrence.scan(&content, initial.flatten(), site)?;
                let state = state.detach();
                (scanned, MixerState::Recurrent { window, state })
            }
        };
        if let Some(memory) = memory {
            *memory = remembered;
        }
        let mixed = scanned.gate(&gate.activate(Activation::Silu)?)?;
        let mixed = site("mixed", mixed)?;
        Ok(site("out", mixed.linear(&self.output)?)?)
    }
}
