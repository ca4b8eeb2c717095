//! Parts that mix tokens.

pub mod mechanism;
mod multi_head;
pub mod wavelet;

pub use mechanism::MechanismSpec;
pub use multi_head::{
    LocalFilter, MultiHeadAttention, MultiHeadSpec, OutputProjection, QueryKeyNorm, QueryKeySharing,
};

use crate::parameters::Parameters;
use crate::recurrent::{Mamba, Mamba2, Mamba2Spec, MambaSpec};
use crate::state::MixerState;
use crate::{Context, Draws, Result};
use lapidary_signal::Signal;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use wavelet::{Wavelet, WaveletSpec};

/// Which mixer, and how it is set up.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "kebab-case")]
#[allow(
    clippy::large_enum_variant,
    reason = "a spec is made once for each block, and most have the largest"
)]
pub enum MixerSpec {
    /// Softmax attention with several heads (Vaswani et al., arXiv 1706.03762).
    MultiHead(MultiHeadSpec),
    /// A selective state-space recurrence (Gu & Dao, arXiv 2312.00752).
    Mamba(MambaSpec),
    /// A state-space recurrence of heads (Dao & Gu, arXiv 2405.21060).
    Mamba2(Mamba2Spec),
    /// Attention in the space of wavelet coefficients (Zhuang et al., arXiv 2210.01989).
    Wavelet(WaveletSpec),
    /// No mixer and no norm before it: the residual passes, and each token keeps to itself. What
    /// is left of a block whose attention was taken out.
    #[serde(deserialize_with = "crate::fields::none")]
    Absent,
}

impl MixerSpec {
    /// Refuses what cannot be built for tokens of `width`.
    pub fn validate(&self, width: usize, field: &str) -> Result<()> {
        match self {
            Self::MultiHead(spec) => spec.validate(width, field),
            Self::Mamba(spec) => spec.validate(width, field),
            Self::Mamba2(spec) => spec.validate(width, field),
            Self::Wavelet(spec) => spec.validate(width, field),
            Self::Absent => Ok(()),
        }
    }

    /// Whether a token is kept from seeing later ones.
    pub fn is_causal(&self) -> bool {
        match self {
            Self::MultiHead(spec) => spec.causal,
            Self::Mamba(_) | Self::Mamba2(_) | Self::Absent => true,
            Self::Wavelet(_) => false,
        }
    }

    /// What it draws anew in training.
    pub fn draws(&self) -> Draws {
        match self {
            Self::MultiHead(spec) => spec.draws(),
            Self::Wavelet(spec) => spec.inner.draws(),
            Self::Mamba(_) | Self::Mamba2(_) | Self::Absent => Draws::default(),
        }
    }

    /// The kind's name in a spec.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::MultiHead(_) => "multi-head",
            Self::Mamba(_) => "mamba",
            Self::Mamba2(_) => "mamba2",
            Self::Wavelet(_) => "wavelet",
            Self::Absent => "absent",
        }
    }
}

/// A mixer with its parameters.
#[derive(Debug)]
pub enum Mixer {
    /// Softmax attention.
    MultiHead(Box<MultiHeadAttention>),
    /// A selective recurrence.
    Mamba(Box<Mamba>),
    /// A recurrence of heads.
    Mamba2(Box<Mamba2>),
    /// Mixers of wavelet coefficients.
    Wavelet(Box<Wavelet>),
}

impl Mixer {
    /// Builds the mixer for tokens of `width`; nothing where it is absent.
    pub fn new(spec: &MixerSpec, width: usize, parameters: Parameters<'_>) -> Result<Option<Self>> {
        Ok(match spec {
            MixerSpec::MultiHead(spec) => {
                let attention = MultiHeadAttention::new(spec, width, parameters)?;
                Some(Self::MultiHead(Box::new(attention)))
            }
            MixerSpec::Mamba(spec) => {
                Some(Self::Mamba(Box::new(Mamba::new(spec, width, parameters)?)))
            }
            MixerSpec::Mamba2(spec) => {
                let mamba = Mamba2::new(spec, width, parameters)?;
                Some(Self::Mamba2(Box::new(mamba)))
            }
            MixerSpec::Wavelet(spec) => {
                let wavelet = Wavelet::new(spec, width, parameters)?;
                Some(Self::Wavelet(Box::new(wavelet)))
            }
            MixerSpec::Absent => None,
        })
    }

    /// Mixes the tokens of `x` `[batch, length, width]`; `state` remembers earlier ones.
    pub fn forward(
        &self,
        x: &Signal,
        cx: &Context<'_>,
        state: Option<&mut MixerState>,
    ) -> Result<Signal> {
        match self {
            Self::MultiHead(attention) => attention.forward(x, cx, state),
            Self::Mamba(mamba) => mamba.forward(x, cx, state),
            Self::Mamba2(mamba) => mamba.forward(x, cx, state),
            Self::Wavelet(wavelet) => wavelet.forward(x, cx, state.is_some()),
        }
    }
}
