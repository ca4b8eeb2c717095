//! A block: a mixer and a feed-forward part, wired around a residual stream
//! `x` `[batch, length, width]` that each part reads through a norm and writes back to by
//! addition (He et al., arXiv 1512.03385, for the residual; Turner, An Introduction to
//! Transformers, 2023, arXiv 2304.10557, for the block in its plainest form).
//!
//! With shortcuts, the residual passes a linear map `S` before a part's output is added to it, as
//! it must once each part reads and writes a basis of its own (Ashkboos et al., SliceGPT, 2024,
//! arXiv 2401.15024):
//!
//! ```text
//! y = x S₁ᵀ + A(N₁ x),   z = y S₂ᵀ + F(N₂ y);     in parallel   z = x S₁ᵀ + A(N₁ x) + F(N₂ x)
//! ```
//!
//! Its cost is that of its parts and `2 width` operations per token for two residual sums; a
//! shortcut has `width²` parameters and costs `2 width²` operations per token.

use crate::attention::{Mixer, MixerSpec, MultiHeadAttention, MultiHeadSpec};
use crate::dropout::dropout;
use crate::error::bounded;
use crate::feedforward::{Feedforward, FeedforwardSpec};
use crate::norm::{Norm, NormSpec};
use crate::parameters::{Init, Parameters};
use crate::state::MixerState;
use crate::{Context, Error, Result};
use lapidary_signal::{Linear, Signal};
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
    /// Whether the residual passes a linear map without bias before a part's output is added:
    /// `attention_shortcut` and `feedforward_shortcut`, the first alone in parallel wiring.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub shortcuts: bool,
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
        if self.shortcuts && self.wiring == Wiring::PostNorm {
            return Err(Error::spec(
                format!("{field}.shortcuts"),
                true,
                "false in a post-norm block: its norms change what the residual carries",
            ));
        }
        if self.shortcuts && self.cross_attention.is_some() {
            return Err(Error::spec(
                format!("{field}.shortcuts"),
                true,
                "false in a block with cross-attention",
            ));
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
    attention: (Norm, Mixer),
    cross_attention: Option<(Norm, MultiHeadAttention)>,
    feedforward: Option<(Norm, Feedforward)>,
    attention_shortcut: Option<Linear>,
    feedforward_shortcut: Option<Linear>,
}

impl Block {
    /// Builds the block for tokens of `width`.
    pub fn new(spec: &BlockSpec, width: usize, mut parameters: Parameters<'_>) -> Result<Self> {
        let attention = (
            Norm::new(&spec.norm, width, parameters.at("attention_norm"))?,
            Mixer::new(&spec.attention, width, parameters.at("attention"))?,
        );
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
        // It starts as a map that keeps lengths on average.
        let mut shortcut = |name: &str, input_site: &str| {
            let deviation = 1.0 / (width as f64).sqrt();
            let initial = Init::Normal { deviation };
            parameters.linear_starting(name, input_site, [width, width], initial, None)
        };
        let attention_shortcut = match spec.shortcuts {
            true => Some(shortcut("attention_shortcut", "in")?),
            false => None,
        };
        let second = spec.shortcuts && feedforward.is_some() && spec.wiring != Wiring::Parallel;
        let feedforward_shortcut = match second {
            true => Some(shortcut("feedforward_shortcut", "feedforward_shortcut.in")?),
            false => None,
        };
        Ok(Self {
            path: parameters.path().to_owned(),
            wiring: spec.wiring,
            dropout: spec.dropout,
            attention,
            cross_attention,
            feedforward,
            attention_shortcut,
            feedforward_shortcut,
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
        let (norm, mixer) = &self.attention;
        let shortcut = self.attention_shortcut.as_ref();
        let x = self.around(x, norm, shortcut, "attention", cx, |x| {
            mixer.forward(x, cx, state)
        })?;
        let x = match &self.cross_attention {
            None => x,
            Some((norm, attention)) => self.around(x, norm, None, "cross_attention", cx, |x| {
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
                let shortcut = self.feedforward_shortcut.as_ref();
                let x = match shortcut {
                    Some(_) => cx
                        .trace
                        .site(format_args!("{}.feedforward_shortcut.in", self.path), x)?,
                    None => x,
                };
                self.around(x, norm, shortcut, "feedforward", cx, |x| {
                    part.forward(x, cx)
                })?
            }
        };
        Ok(cx.trace.site(format_args!("{}.out", self.path), x)?)
    }

    /// One part with its norm, dropout and residual.
    fn around(
        &self,
        x: Signal,
        norm: &Norm,
        shortcut: Option<&Linear>,
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
                Ok(passed(&x, shortcut)?.add(&y)?)
            }
        }
    }

    fn parallel(
        &self,
        x: Signal,
        cx: &Context<'_>,
        state: Option<&mut MixerState>,
    ) -> Result<Signal> {
        let (norm, mixer) = &self.attention;
        let mixed = mixer.forward(&norm.forward(&x)?, cx, state)?;
        let site = format_args!("{}.attention.dropout", self.path);
        let residual = passed(&x, self.attention_shortcut.as_ref())?;
        let mut y = residual.add(&dropout(&mixed, self.dropout, site, cx)?)?;
        if let Some((norm, part)) = &self.feedforward {
            let transformed = part.forward(&norm.forward(&x)?, cx)?;
            let site = format_args!("{}.feedforward.dropout", self.path);
            y = y.add(&dropout(&transformed, self.dropout, site, cx)?)?;
        }
        Ok(cx.trace.site(format_args!("{}.out", self.path), y)?)
    }
}

/// The residual behind its shortcut, if it has one.
fn passed(x: &Signal, shortcut: Option<&Linear>) -> Result<Signal> {
    match shortcut {
        Some(shortcut) => Ok(x.linear(shortcut)?),
        None => Ok(x.clone()),
    }
}
