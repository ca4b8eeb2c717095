//! A block: a mixer and a feed-forward part, wired around a residual stream
//! `x` `[batch, length, width]` that each part reads through a norm and writes back to by
//! addition (He et al., arXiv 1512.03385, for the residual; Turner, An Introduction to
//! Transformers, 2023, arXiv 2304.10557, for the block in its plainest form).
//!
//! Its cost is that of its parts and `2 width` operations per token for two residual sums.

use crate::attention::{Mixer, MixerSpec, MultiHeadAttention, MultiHeadSpec};
use crate::dropout::dropout;
use crate::error::bounded;
use crate::feedforward::{Feedforward, FeedforwardSpec};
use crate::norm::{Norm, NormSpec};
use crate::parameters::Parameters;
use crate::state::MixerState;
use crate::{Context, Error, Result};
use lapidary_signal::Signal;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

const MAX_REPEAT: usize = 1 << 12;

/// Where the norms stand.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Wiring {
    /// `y = x + A(N₁ x); z = y + F(N₂ y)` (Xiong et al., arXiv 2002.04745).
    #[default]
    PreNorm,
    /// `y = N₁(x + A x); z = N₂(y + F y)` (Vaswani et al., arXiv 1706.03762).
    PostNorm,
    /// `z = x + A(N₁ x) + F(N₂ x)` (Wang & Komatsuzaki, GPT-J, 2021, whose norms are one and the
    /// same; with two, Black et al., GPT-NeoX, arXiv 2204.06745).
    Parallel,
}

/// One block.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BlockSpec {
    /// How many blocks in a row are like this.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub repeat: usize,
    /// Where the norms stand.
    #[serde(default)]
    pub wiring: Wiring,
    /// Which norm.
    #[serde(default)]
    pub norm: NormSpec,
    /// What mixes tokens.
    pub attention: MixerSpec,
    /// Attention over the context's memory, between the mixer and the feed-forward part.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cross_attention: Option<MultiHeadSpec>,
    /// What transforms tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub feedforward: Option<FeedforwardSpec>,
    /// Probability with which an entry of a part's output is dropped in training.
    #[serde(default)]
    pub dropout: f64,
}

fn one() -> usize {
    1
}

#[allow(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde asks for a reference"
)]
fn is_one(repeat: &usize) -> bool {
    *repeat == 1
}

impl BlockSpec {
    /// Refuses what cannot be built for tokens of `width`.
    pub fn validate(&self, width: usize, field: &str) -> Result<()> {
        bounded(format!("{field}.repeat"), self.repeat, 1..=MAX_REPEAT)?;
        self.norm.validate(&format!("{field}.norm"))?;
        self.attention
            .validate(width, &format!("{field}.attention"))?;
        if self.attention == MixerSpec::Absent {
            let kind = format!("{field}.attention.kind");
            if self.wiring == Wiring::PostNorm {
                return Err(Error::spec(
                    kind,
                    "absent",
                    "a mixer in a post-norm block, whose norm follows it",
                ));
            }
            if self.feedforward.is_none() && self.cross_attention.is_none() {
                return Err(Error::spec(
                    kind,
                    "absent",
                    "a mixer in a block without any other part",
                ));
            }
        }
        if let Some(cross) = &self.cross_attention {
            cross.validate_cross(width, &format!("{field}.cross_attention"))?;
            if self.wiring == Wiring::Parallel {
                return Err(Error::spec(
                    format!("{field}.wiring"),
                    "parallel",
                    "pre-norm or post-norm in a block with cross-attention",
                ));
            }
        }
        if let Some(feedforward) = &self.feedforward {
            feedforward.validate(&format!("{field}.feedforward"))?;
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return Err(Error::spec(
                format!("{field}.dropout"),
                self.dropout,
                "at least 0 and below 1",
            ));
        }
        Ok(())
    }
}

/// A block with its parameters.
#[derive(Debug)]
pub struct Block {
    path: String,
    wiring: Wiring,
    dropout: f64,
    attention: Option<(Norm, Mixer)>,
    cross_attention: Option<(Norm, MultiHeadAttention)>,
    feedforward: Option<(Norm, Feedforward)>,
}

impl Block {
    /// Builds the block for tokens of `width`.
    pub fn new(spec: &BlockSpec, width: usize, mut parameters: Parameters<'_>) -> Result<Self> {
        let attention = match Mixer::new(&spec.attention, width, parameters.at("attention"))? {
            None => None,
            Some(mixer) => Some((
                Norm::new(&spec.norm, width, parameters.at("attention_norm"))?,
                mixer,
            )),
        };
        let cross_attention = match &spec.cross_attention {
            None => None,
            Some(cross) => Some((
                Norm::new(&spec.norm, width, parameters.at("cross_attention_norm"))?,
                MultiHeadAttention::over_memory(cross, width, parameters.at("cross_attention"))?,
            )),
        };
        let feedforward = match &spec.feedforward {
            None => None,
            Some(feedforward) => Some((
                Norm::new(&spec.norm, width, parameters.at("feedforward_norm"))?,
                Feedforward::new(feedforward, width, parameters.at("feedforward"))?,
            )),
        };
        Ok(Self {
            path: parameters.path().to_owned(),
            wiring: spec.wiring,
            dropout: spec.dropout,
            attention,
            cross_attention,
            feedforward,
        })
    }

    /// Passes the residual stream `x` `[batch, length, width]` through the block.
    pub fn forward(
        &self,
        x: Signal,
        cx: &Context<'_>,
        state: Option<&mut MixerState>,
    ) -> Result<Signal> {
        let x = cx.trace.site(format_args!("{}.in", self.path), x)?;
        if self.wiring == Wiring::Parallel {
            return self.parallel(x, cx, state);
        }
        let x = match &self.attention {
            None => x,
            Some((norm, mixer)) => {
                self.around(x, norm, "attention", cx, |x| mixer.forward(x, cx, state))?
            }
        };
        let x = match &self.cross_attention {
            None => x,
            Some((norm, attention)) => self.around(x, norm, "cross_attention", cx, |x| {
                let (memory, padding) = cx.memory.ok_or_else(|| {
                    Error::spec(
                        "memory of cross-attention",
                        "absent",
                        "given in the context",
                    )
                })?;
                attention.cross(x, memory, padding, cx)
            })?,
        };
        let x = match &self.feedforward {
            None => x,
            Some((norm, part)) => {
                self.around(x, norm, "feedforward", cx, |x| part.forward(x, cx))?
            }
        };
        Ok(cx.trace.site(format_args!("{}.out", self.path), x)?)
    }

    /// One part with its norm, dropout and residual.
    fn around(
        &self,
        x: Signal,
        norm: &Norm,
        name: &str,
        cx: &Context<'_>,
        part: impl FnOnce(&Signal) -> Result<Signal>,
    ) -> Result<Signal> {
        let site = format_args!("{}.{name}.dropout", self.path);
        match self.wiring {
            Wiring::PostNorm => {
                let y = dropout(&part(&x)?, self.dropout, site, cx)?;
                norm.forward(&x.add(&y)?)
            }
            Wiring::PreNorm | Wiring::Parallel => {
                let y = dropout(&part(&norm.forward(&x)?)?, self.dropout, site, cx)?;
                Ok(x.add(&y)?)
            }
        }
    }

    fn parallel(
        &self,
        x: Signal,
        cx: &Context<'_>,
        state: Option<&mut MixerState>,
    ) -> Result<Signal> {
        let mut y = x.clone();
        if let Some((norm, mixer)) = &self.attention {
            let mixed = mixer.forward(&norm.forward(&x)?, cx, state)?;
            let site = format_args!("{}.attention.dropout", self.path);
            y = y.add(&dropout(&mixed, self.dropout, site, cx)?)?;
        }
        if let Some((norm, part)) = &self.feedforward {
            let transformed = part.forward(&norm.forward(&x)?, cx)?;
            let site = format_args!("{}.feedforward.dropout", self.path);
            y = y.add(&dropout(&transformed, self.dropout, site, cx)?)?;
        }
        Ok(cx.trace.site(format_args!("{}.out", self.path), y)?)
    }
}
