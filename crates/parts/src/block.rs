//! A block: a mixer and a feed-forward part, wired around a residual stream
//! `x` `[batch, length, width]` that each part reads through a norm and writes back to by
//! addition (He et al., arXiv 1512.03385, for the residual; Turner, An Introduction to
//! Transformers, 2023, arXiv 2304.10557, for the block in its plainest form).
//!
//! Its cost is that of its parts and `2 width` operations per token for two residual sums; `2 width` more with a
//! coding step.

use crate::attention::{Mixer, MixerSpec, MultiHeadAttention, MultiHeadSpec};
use crate::coding_step::CodingStep;
use crate::dropout::{drop_path, dropout, dropout_by_feature};
use crate::error::bounded;
use crate::feedforward::{Feedforward, FeedforwardSpec};
use crate::norm::{Norm, NormSpec};
use crate::parameters::{Init, Parameters};
use crate::state::MixerState;
use crate::{Context, Draws, Error, Result};
use lapidary_kernels::Tensor;
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
    /// `y = x + A(N₁ x); z = F(N₂ y)`: what the second part gives takes the place of the stream (Yu
    /// et al., CRATE, arXiv 2306.01129).
    Replacing,
    /// `y = F(N₁ x); z = y − A(N₂ y)`: the way back of what replaces, feed-forward part first and attention
    /// taken off (the decoder of Yu et al., White-Box Transformers via Sparse Rate Reduction: Compression
    /// Is All There Is?, arXiv 2311.13110).
    Reversed,
}

impl Wiring {
    /// The wiring's name in a spec.
    pub fn name(self) -> &'static str {
        match self {
            Self::PreNorm => "pre-norm",
            Self::PostNorm => "post-norm",
            Self::Parallel => "parallel",
            Self::Replacing => "replacing",
            Self::Reversed => "reversed",
        }
    }

    /// Whether each part adds to one residual stream, which nothing else changes.
    pub fn adds(self) -> bool {
        matches!(self, Self::PreNorm | Self::Parallel)
    }
}

/// One block.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BlockSpec {
    /// How many blocks in a row are like this.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub repeat: usize,
    /// Whether the repetitions are one block passed through again and again, with one set of
    /// weights (Lan et al., ALBERT, arXiv 1909.11942): those of the first.
    #[serde(default, skip_serializing_if = "is_not")]
    pub shared: bool,
    /// Where the norms stand.
    #[serde(default)]
    pub wiring: Wiring,
    /// Which norm.
    #[serde(default)]
    pub norm: NormSpec,
    /// Where each feature of what a part writes is multiplied by a learned number before it is
    /// added to the residual stream: the number that training begins with (Touvron et al., Going
    /// deeper with Image Transformers, 2021, arXiv 2103.17239).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layer_scale: Option<f64>,
    /// In a replacing block: `y = (1 − κ s) x + κ s² A(N₁ x)` with `s = head_width / (tokens ε²)`, the step down the coding
    /// rate as it is derived, in the place of `y = x + A(N₁ x)` (Yu et al., CRATE, arXiv 2306.01129).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub coding_step: Option<CodingStep>,
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
    #[serde(default, skip_serializing_if = "is_not")]
    pub shortcuts: bool,
    /// Probability with which an entry of a part's output is dropped in training.
    #[serde(default)]
    pub dropout: f64,
    /// Whether dropout leaves out whole features of a sequence, the same for all of its tokens, rather than entries
    /// one by one: a mask of `width` numbers for a sequence, however long it is (Kitaev et al., Reformer, arXiv
    /// 2001.04451, in the authors' program).
    #[serde(default, skip_serializing_if = "is_not")]
    pub dropout_by_feature: bool,
    /// Probability with which training leaves out what a part adds to a whole sequence (Huang et al.,
    /// Deep Networks with Stochastic Depth, 2016, arXiv 1603.09382). Each part of each block, and each
    /// sequence that the block sees, for itself; what is added otherwise is divided by the rest.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub drop_path: f64,
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

#[allow(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde asks for a reference"
)]
fn is_not(flag: &bool) -> bool {
    !*flag
}

#[allow(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde asks for a reference"
)]
fn is_zero(probability: &f64) -> bool {
    *probability == 0.0
}

impl BlockSpec {
    /// What its attention draws anew in training.
    pub fn draws(&self) -> Draws {
        let cross = self.cross_attention.as_ref().map(MultiHeadSpec::draws);
        self.attention.draws() | cross.unwrap_or_default()
    }

    /// Refuses what cannot be built for tokens of `width`.
    pub fn validate(&self, width: usize, field: &str) -> Result<()> {
        bounded(format!("{field}.repeat"), self.repeat, 1..=MAX_REPEAT)?;
        self.norm.validate(&format!("{field}.norm"))?;
        self.attention
            .validate(width, &format!("{field}.attention"))?;
        self.validate_absence(field)?;
        self.validate_shortcuts(field)?;
        if let Some(step) = &self.coding_step {
            step.validate(self, &format!("{field}.coding_step"))?;
        }
        if let Some(cross) = &self.cross_attention {
            cross.validate_cross(width, &format!("{field}.cross_attention"))?;
            if matches!(self.wiring, Wiring::Parallel | Wiring::Reversed) {
                return Err(Error::spec(
                    format!("{field}.wiring"),
                    self.wiring.name(),
                    "pre-norm or post-norm in a block with cross-attention",
                ));
            }
        }
        if let Some(feedforward) = &self.feedforward {
            feedforward.validate(&format!("{field}.feedforward"))?;
        }
        if let Some(scale) = self.layer_scale.filter(|scale| !scale.is_finite()) {
            return Err(Error::spec(
                format!("{field}.layer_scale"),
                scale,
                "a finite number",
            ));
        }
        for (name, probability) in [("dropout", self.dropout), ("drop_path", self.drop_path)] {
            if !(0.0..1.0).contains(&probability) {
                let expected = "at least 0 and below 1";
                return Err(Error::spec(
                    format!("{field}.{name}"),
                    probability,
                    expected,
                ));
            }
        }
        if self.dropout_by_feature && self.dropout == 0.0 {
            let field = format!("{field}.dropout_by_feature");
            let expected = "false where dropout is 0";
            return Err(Error::spec(field, true, expected));
        }
        if matches!(self.wiring, Wiring::Replacing | Wiring::Reversed) && self.drop_path > 0.0 {
            return Err(Error::spec(
                format!("{field}.drop_path"),
                self.drop_path,
                "0 in a replacing or reversed block, whose parts cannot be left out",
            ));
        }
        Ok(())
    }

    fn validate_absence(&self, field: &str) -> Result<()> {
        let kind = format!("{field}.attention.kind");
        if self.attention != MixerSpec::Absent {
            return Ok(());
        }
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
        Ok(())
    }

    fn validate_shortcuts(&self, field: &str) -> Result<()> {
        let obstacle = match (self.wiring, &self.cross_attention) {
            (Wiring::PostNorm | Wiring::Replacing | Wiring::Reversed, _) => {
                "false in a post-norm, replacing or reversed block, whose parts change what the \
                 residual carries"
            }
            (_, Some(_)) => "false in a block with cross-attention",
            _ => return Ok(()),
        };
        match self.shortcuts {
            true => Err(Error::spec(format!("{field}.shortcuts"), true, obstacle)),
            false => Ok(()),
        }
    }
}

/// A block with its parameters.
#[derive(Debug)]
pub struct Block {
    path: String,
    wiring: Wiring,
    dropout: f64,
    dropout_by_feature: bool,
    drop_path: f64,
    /// And the features of a head.
    coding_step: Option<(CodingStep, usize)>,
    attention: Option<(Around, Mixer)>,
    cross_attention: Option<(Around, MultiHeadAttention)>,
    feedforward: Option<(Around, Feedforward)>,
    attention_shortcut: Option<Linear>,
    feedforward_shortcut: Option<Linear>,
}

/// What stands around a part.
#[derive(Debug)]
struct Around {
    norm: Norm,
    /// `[width]`: what each feature that the part writes is multiplied by.
    scale: Option<Tensor>,
}

impl Around {
    fn new(
        spec: &BlockSpec,
        width: usize,
        name: &str,
        parameters: &mut Parameters<'_>,
    ) -> Result<Self> {
        let norm = Norm::new(&spec.norm, width, parameters.at(format!("{name}_norm")))?;
        let scale = match spec.layer_scale {
            None => None,
            Some(start) => {
                let mut own = parameters.at(format!("{name}_scale"));
                Some(own.tensor("weight", &[width], Init::Constant(start))?)
            }
        };
        Ok(Self { norm, scale })
    }
}

impl Block {
    /// Builds the block for tokens of `width`.
    pub fn new(spec: &BlockSpec, width: usize, mut parameters: Parameters<'_>) -> Result<Self> {
        let attention = match Mixer::new(&spec.attention, width, parameters.at("attention"))? {
            None => None,
            Some(mixer) => Some((
                Around::new(spec, width, "attention", &mut parameters)?,
                mixer,
            )),
        };
        let cross_attention = match &spec.cross_attention {
            None => None,
            Some(cross) => Some((
                Around::new(spec, width, "cross_attention", &mut parameters)?,
                MultiHeadAttention::over_memory(cross, width, parameters.at("cross_attention"))?,
            )),
        };
        let feedforward = match &spec.feedforward {
            None => None,
            Some(feedforward) => Some((
                Around::new(spec, width, "feedforward", &mut parameters)?,
                match spec.wiring {
                    Wiring::Replacing | Wiring::Reversed => {
                        Feedforward::replacing(feedforward, width, parameters.at("feedforward"))?
                    }
                    Wiring::PreNorm | Wiring::PostNorm | Wiring::Parallel => {
                        Feedforward::new(feedforward, width, parameters.at("feedforward"))?
                    }
                },
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
            dropout_by_feature: spec.dropout_by_feature,
            drop_path: spec.drop_path,
            coding_step: match (&spec.attention, spec.coding_step) {
                (MixerSpec::MultiHead(heads), Some(step)) => Some((step, heads.head_width(width))),
                _ => None,
            },
            attention,
            cross_attention,
            feedforward,
            attention_shortcut,
            feedforward_shortcut,
        })
    }

    /// Where it is, such as `blocks.3`.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// How much attention each of `keys` `[batch, key, width]` gets from `queries`
    /// `[batch, query, width]`, both of the residual stream, by this block's norm and attention: see
    /// [`MultiHeadAttention::received`].
    ///
    /// # Errors
    /// When the mixer is no attention.
    pub fn received(
        &self,
        queries: &Signal,
        keys: &Signal,
        shares: &Tensor,
        key_padding: Option<&Tensor>,
    ) -> Result<Signal> {
        match &self.attention {
            Some((around, Mixer::MultiHead(attention))) => attention.received(
                &around.norm.forward(queries)?,
                &around.norm.forward(keys)?,
                shares,
                key_padding,
            ),
            _ => {
                let field = format!("mixer of {}", self.path);
                Err(Error::spec(field, "without attention", "multi-head"))
            }
        }
    }

    /// Passes the residual stream `x` `[batch, length, width]` through the block.
    pub fn forward(
        &self,
        x: Signal,
        cx: &Context<'_>,
        state: Option<&mut MixerState>,
    ) -> Result<Signal> {
        let x = cx.trace.site(format_args!("{}.in", self.path), x)?;
        match self.wiring {
            Wiring::Parallel => return self.parallel(x, cx, state),
            Wiring::Reversed => return self.reversed(x, cx, state),
            Wiring::PreNorm | Wiring::PostNorm | Wiring::Replacing => {}
        }
        let shortcut = self.attention_shortcut.as_ref();
        let x = match &self.attention {
            None => passed(&x, shortcut)?,
            Some((around, mixer)) => {
                let mix = |x: &Signal| mixer.forward(x, cx, state);
                match &self.coding_step {
                    None => self.around(x, around, shortcut, "attention", cx, mix)?,
                    Some((step, features)) => {
                        let y = self.half(&x, around, "attention", cx, mix)?;
                        step.forward(&x, &y, *features, cx.key_padding)?
                    }
                }
            }
        };
        let x = match &self.cross_attention {
            None => x,
            Some((around, attention)) => {
                self.around(x, around, None, "cross_attention", cx, |x| {
                    let (memory, padding) = cx.memory.ok_or_else(|| {
                        Error::spec(
                            "memory of cross-attention",
                            "absent",
                            "given in the context",
                        )
                    })?;
                    attention.cross(x, memory, padding, cx)
                })?
            }
        };
        let x = match &self.feedforward {
            None => x,
            Some((around, part)) if self.wiring == Wiring::Replacing => {
                self.half(&x, around, "feedforward", cx, |x| part.forward(x, cx))?
            }
            Some((around, part)) => {
                let shortcut = self.feedforward_shortcut.as_ref();
                let site = format_args!("{}.feedforward_shortcut.in", self.path);
                let x = match shortcut {
                    Some(_) => cx.trace.site(site, x)?,
                    None => x,
                };
                let transform = |x: &Signal| part.forward(x, cx);
                self.around(x, around, shortcut, "feedforward", cx, transform)?
            }
        };
        Ok(cx.trace.site(format_args!("{}.out", self.path), x)?)
    }

    /// What attention adds to a residual stream `x` `[batch, length, width]` that it reads through
    /// its norm: `A(N₁ x)`, scaled and dropped; nothing in a block without.
    ///
    /// # Errors
    /// Those of the mixer.
    pub fn attended(
        &self,
        x: &Signal,
        cx: &Context<'_>,
        state: Option<&mut MixerState>,
    ) -> Result<Option<Signal>> {
        let Some((around, mixer)) = &self.attention else {
            return Ok(None);
        };
        let mix = |x: &Signal| mixer.forward(x, cx, state);
        self.half(x, around, "attention", cx, mix).map(Some)
    }

    /// What the feed-forward part makes of each token of a residual stream `x` that it reads through its
    /// norm, `F(N₂ x)`, neither scaled nor dropped yet; nothing in a block without.
    ///
    /// # Errors
    /// Those of the part.
    pub fn fed(&self, x: &Signal, cx: &Context<'_>) -> Result<Option<Signal>> {
        let Some((around, part)) = &self.feedforward else {
            return Ok(None);
        };
        part.forward(&around.norm.forward(x)?, cx).map(Some)
    }

    /// What is added to the residual stream of what [`Block::fed`] gave for all tokens.
    ///
    /// # Errors
    /// Those of the tensor engine.
    pub fn transformed(&self, fed: Signal, cx: &Context<'_>) -> Result<Signal> {
        match &self.feedforward {
            None => Ok(fed),
            Some((around, _)) => self.written(fed, around, "feedforward", cx),
        }
    }

    /// What a part adds to the residual stream `x` that it reads through its norm.
    fn half(
        &self,
        x: &Signal,
        around: &Around,
        name: &str,
        cx: &Context<'_>,
        part: impl FnOnce(&Signal) -> Result<Signal>,
    ) -> Result<Signal> {
        self.written(part(&around.norm.forward(x)?)?, around, name, cx)
    }

    /// What is added to the residual stream of what a part gave.
    fn written(&self, y: Signal, around: &Around, name: &str, cx: &Context<'_>) -> Result<Signal> {
        let y = match &around.scale {
            None => y,
            Some(scale) => {
                let site = format_args!("{}.{name}.scaled", self.path);
                cx.trace.site(site, y.multiply_constant(scale)?)?
            }
        };
        let site = format_args!("{}.{name}.dropout", self.path);
        let y = match self.dropout_by_feature {
            true => dropout_by_feature(&y, self.dropout, site, cx)?,
            false => dropout(&y, self.dropout, site, cx)?,
        };
        let site = format_args!("{}.{name}.drop_path", self.path);
        drop_path(&y, self.drop_path, site, cx)
    }

    /// One part with its norm, scale, dropout and residual.
    fn around(
        &self,
        x: Signal,
        around: &Around,
        shortcut: Option<&Linear>,
        name: &str,
        cx: &Context<'_>,
        part: impl FnOnce(&Signal) -> Result<Signal>,
    ) -> Result<Signal> {
        match self.wiring {
            Wiring::PostNorm => {
                let y = self.written(part(&x)?, around, name, cx)?;
                around.norm.forward(&x.add(&y)?)
            }
            Wiring::PreNorm | Wiring::Parallel | Wiring::Replacing | Wiring::Reversed => {
                let y = self.half(&x, around, name, cx, part)?;
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
        let mut y = passed(&x, self.attention_shortcut.as_ref())?;
        let attended = self.attended(&x, cx, state)?;
        let transformed = match self.fed(&x, cx)? {
            Some(fed) => Some(self.transformed(fed, cx)?),
            None => None,
        };
        for part in [attended, transformed].into_iter().flatten() {
            y = y.add(&part)?;
        }
        Ok(cx.trace.site(format_args!("{}.out", self.path), y)?)
    }

    fn reversed(
        &self,
        x: Signal,
        cx: &Context<'_>,
        state: Option<&mut MixerState>,
    ) -> Result<Signal> {
        let mut y = match self.fed(&x, cx)? {
            Some(fed) => self.transformed(fed, cx)?,
            None => x,
        };
        if let Some(attended) = self.attended(&y, cx, state)? {
            y = y.add(&attended.scale(-1.0)?)?;
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
