//! Vcc (Zeng et al., Vcc: Scaling Transformers to 128K Tokens or More by Prioritizing Important
//! Tokens, 2023, arXiv 2305.04241): a few *VIP tokens* stay as they are; all others lie in blocks of
//! `s`, of which a block of the model sees the ones that the VIP tokens attend to in full, and of each
//! other the mean alone.
//!
//! ```text
//! c_b = mean_t x_bt,   δ_bt = c_b − x_bt                          compress
//! score_b = mean over VIPs and heads of softmax_b(scale · W_q N(vip) · W_k N(c_b))
//! fine = the n_f blocks of the highest score                      select
//! U = [c_b − δ_bt for fine b; c_b for coarse b; VIPs]             refine
//! U' = block(U), scores with + ln(w) + ln(tokens that a key stands for)
//! c_b, δ_bt of fine b from U'; c_b of coarse b from U', δ_bt as they were
//! ```
//!
//! A mean that moves by `Δ` moves every token of its block by `Δ`, so nothing is lost: in the end all
//! blocks are expanded and every token goes back to its place. A mean counts in a softmax as often as
//! it has tokens (*scale correction*). Only the differences of blocks that were refined are new: they are
//! kept as tokens and the mean that they had, and nothing is copied ([`store`]).
//!
//! Which blocks are fine is learned by weights that are 1 and have the gradient of
//! `π = score / Σ score`: `w = 1 + π_b − sg(π_b)` for the tokens of a fine block, `1 + (1 − π_b) −
//! sg(1 − π_b)` for a coarse one; what a block of the model writes is multiplied by `w`, and `ln w`
//! added to the scores of a key. In training some sequences draw their fine blocks at random.
//!
//! The first blocks of the model see segments of the sequence instead, uncompressed; others may see
//! all of it. Where a published implementation adds 1e-4 to counts and weights before it divides or
//! takes the logarithm, nothing is added here: a count is at least 1, a weight is 1, and so blocks of
//! equal tokens are attended to exactly as the tokens are.
//!
//! Cost of a compressed block: `n_p · N_b` pairs for the selection and `r²` for the block itself with
//! `r = n_f s + N_b − n_f + n_p`, where `N_b = (n − n_p) / s`. No parameters of its own.

mod importance;
mod layer;
mod selection;
pub mod store;

pub use importance::Importance;
pub use selection::Selection;

use super::fold::{fold, fold_mask, unfold};
use super::{Organised, Read, Run, Surroundings};
use crate::attention::{MixerSpec, MultiHeadSpec};
use crate::block::{Block, BlockSpec, Wiring};
use crate::error::{bounded, tensor};
use crate::parameters::Parameters;
use crate::position::PositionSpec;
use crate::{Context, Error, Result};
use importance::Order;
use lapidary_signal::Signal;
use layer::Compressed;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::sync::Arc;

const MAX_LENGTH: usize = 1 << 24;

/// VIP tokens and blocks of the others.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VccSpec {
    /// Blocks of the model that see segments, the first ones.
    #[serde(default)]
    pub segment_blocks: usize,
    /// Tokens of a segment, where there are blocks that see segments.
    #[serde(default = "segment")]
    pub segment: usize,
    /// Blocks of the model behind those that see the whole sequence uncompressed.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub whole_blocks: Vec<usize>,
    /// VIP tokens `n_p`.
    pub vips: usize,
    /// Tokens `s` of a block.
    #[serde(default = "size")]
    pub size: usize,
    /// Blocks `n_f` that are seen in full.
    pub fine: usize,
    /// Which tokens are VIPs.
    #[serde(default)]
    pub importance: Importance,
    /// How the fine blocks are chosen.
    #[serde(default)]
    pub selection: Selection,
    /// Probability with which a sequence chooses them at random in training.
    #[serde(default = "exploration")]
    pub exploration: f64,
    /// Whether a mean counts as often as it has tokens.
    #[serde(default = "yes")]
    pub scale_correction: bool,
    /// What comes out.
    #[serde(default)]
    pub output: VccOutput,
}

/// What comes out of the blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum VccOutput {
    /// Every token, at its place.
    #[default]
    Tokens,
    /// The VIP tokens alone, `[batch, vips, width]`, in the order of the sequence.
    Vips,
}

fn segment() -> usize {
    512
}

fn size() -> usize {
    16
}

fn exploration() -> f64 {
    0.1
}

fn yes() -> bool {
    true
}

impl VccSpec {
    /// `n_p` VIP tokens, `n_f` blocks in full and the defaults otherwise.
    pub fn new(vips: usize, fine: usize) -> Self {
        Self {
            segment_blocks: 0,
            segment: segment(),
            whole_blocks: Vec::new(),
            vips,
            size: size(),
            fine,
            importance: Importance::default(),
            selection: Selection::default(),
            exploration: exploration(),
            scale_correction: true,
            output: VccOutput::default(),
        }
    }

    /// The organisation of a model that these blocks were taken out of: each of the others sees what it saw.
    ///
    /// ```
    /// use lapidary_parts::organisation::vcc::VccSpec;
    /// let mut spec = VccSpec::new(4, 2);
    /// spec.segment_blocks = 2;
    /// spec.whole_blocks = vec![3, 5];
    /// spec.remove_blocks(&[1, 3, 4].into());
    /// assert_eq!((spec.segment_blocks, spec.whole_blocks), (1, vec![2]));
    /// ```
    pub fn remove_blocks(&mut self, removed: &BTreeSet<usize>) {
        let left = |index: usize| index - removed.range(..index).count();
        self.whole_blocks.retain(|index| !removed.contains(index));
        for index in &mut self.whole_blocks {
            *index = left(*index);
        }
        self.segment_blocks = left(self.segment_blocks);
        if self.segment_blocks == 0 {
            self.segment = segment();
        }
    }

    pub(super) fn validate(&self, model: &Surroundings<'_>, field: &str) -> Result<()> {
        let at = |name: &str| format!("{field}.{name}");
        for (name, value) in [
            ("segment", self.segment),
            ("vips", self.vips),
            ("size", self.size),
            ("fine", self.fine),
        ] {
            bounded(at(name), value, 1..=MAX_LENGTH)?;
        }
        bounded(
            at("segment_blocks"),
            self.segment_blocks,
            0..=model.blocks.len(),
        )?;
        if self.segment_blocks == 0 && self.segment != segment() {
            let expected = "absent where segment_blocks is 0: no block sees segments";
            return Err(Error::spec(at("segment"), self.segment, expected));
        }
        if let Some(wrong) = self
            .whole_blocks
            .iter()
            .find(|index| !(self.segment_blocks..model.blocks.len()).contains(index))
        {
            let expected = format!(
                "blocks from {} to below {}",
                self.segment_blocks,
                model.blocks.len()
            );
            return Err(Error::spec(at("whole_blocks"), wrong, expected));
        }
        if !(0.0..=1.0).contains(&self.exploration) {
            let expected = "between 0 and 1";
            return Err(Error::spec(at("exploration"), self.exploration, expected));
        }
        self.validate_use(model, field)?;
        for (index, block) in model.blocks.iter().enumerate() {
            validate_block(block, self.compresses(index), index)?;
        }
        Ok(())
    }

    /// Refuses a model in which VIPs and blocks of the others would mean nothing.
    fn validate_use(&self, model: &Surroundings<'_>, field: &str) -> Result<()> {
        let mut blocks = 0..model.blocks.len();
        if blocks.is_empty()
            || self.output == VccOutput::Vips
            || blocks.any(|index| self.compresses(index))
        {
            return Ok(());
        }
        let expected = "fewer: a block at least has to see the compressed sequence";
        match self.whole_blocks.is_empty() {
            true => Err(Error::spec(
                format!("{field}.segment_blocks"),
                self.segment_blocks,
                expected,
            )),
            false => Err(Error::spec(
                format!("{field}.whole_blocks"),
                &self.whole_blocks,
                expected,
            )),
        }
    }

    /// Whether a block of the model sees the compressed form.
    fn compresses(&self, index: usize) -> bool {
        index >= self.segment_blocks && !self.whole_blocks.contains(&index)
    }
}

fn validate_block(block: &BlockSpec, compresses: bool, index: usize) -> Result<()> {
    let refuse = |name: &str, found: &str, expected: &str| {
        let field = format!("blocks.{index}.{name}");
        Err(Error::spec(field, found, expected))
    };
    if block.attention.is_causal() && block.attention != MixerSpec::Absent {
        let expected = "bidirectional in a vip-centric organisation, whose means see all tokens";
        return refuse("attention", "causal", expected);
    }
    if block.cross_attention.is_some() {
        let expected = "absent in a vip-centric organisation";
        return refuse("cross_attention", "given", expected);
    }
    if !compresses {
        return Ok(());
    }
    if block.wiring != Wiring::PreNorm {
        let expected = "pre-norm in a block that sees a compressed sequence";
        return refuse("wiring", block.wiring.name(), expected);
    }
    let MixerSpec::MultiHead(attention) = &block.attention else {
        let expected = "multi-head in a block that sees a compressed sequence";
        return refuse("attention.kind", block.attention.kind(), expected);
    };
    validate_attention(attention, index)
}

fn validate_attention(attention: &MultiHeadSpec, index: usize) -> Result<()> {
    let refuse = |name: &str, found: &str, expected: &str| {
        let field = format!("blocks.{index}.attention.{name}");
        let expected = format!("{expected} in a block that sees a compressed sequence");
        Err(Error::spec(field, found, expected))
    };
    if !attention.mechanism.is_softmax() {
        return refuse("mechanism", attention.mechanism.kind(), "softmax");
    }
    if attention.window.is_some() {
        return refuse("window", "given", "absent");
    }
    if attention.local.is_some() {
        return refuse("local", "given", "absent");
    }
    if attention.scale == Some(0.0) {
        return refuse("scale", "0", "another number");
    }
    match &attention.position {
        PositionSpec::None | PositionSpec::RelativeBuckets { .. } => Ok(()),
        other => refuse("position.kind", other.kind(), "none or relative-buckets"),
    }
}

/// The organisation. It has no parameters.
#[derive(Debug)]
pub struct Vcc {
    path: String,
    spec: VccSpec,
}

impl Vcc {
    /// Builds the organisation.
    pub fn new(spec: &VccSpec, parameters: Parameters<'_>) -> Self {
        Self {
            path: parameters.path().to_owned(),
            spec: spec.clone(),
        }
    }

    /// The whole pass of a model.
    pub(super) fn organise(
        &self,
        x: Signal,
        blocks: &[Arc<Block>],
        run: &Run<'_>,
        read: Read<'_>,
        cx: &Context<'_>,
    ) -> Result<Organised> {
        let (batch, length, _) = tensor(x.value().dims3())?;
        let mut x = x;
        let keep = cx.key_padding;
        let order = Order::new(&self.spec, read, keep, [batch, length], x.device())?;
        let segment = self.spec.segment.min(length.max(1));
        let masks = fold_mask(keep, [batch, length, segment], &x)?;
        let mut compressed: Option<Compressed> = None;
        for (index, block) in blocks.iter().enumerate() {
            if index < self.spec.segment_blocks {
                let cx = Context {
                    key_padding: masks.as_ref(),
                    ..*cx
                };
                x = unfold(&run(block, fold(&x, segment)?, &cx)?, batch, length)?;
            } else if self.spec.compresses(index) && order.blocks() > 0 {
                let form = match compressed.take() {
                    Some(form) => form,
                    None => Compressed::new(&x, &order)?,
                };
                compressed = Some(form.through(block, run, &self.spec, cx)?);
            } else {
                if let Some(form) = compressed.take() {
                    x = self.expanded(&form, cx)?;
                }
                x = run(block, x, cx)?;
            }
        }
        if self.spec.output == VccOutput::Vips {
            let vips = match compressed {
                Some(form) => form.vips()?,
                None => order.vips_of(&x)?,
            };
            return Ok(Organised {
                hidden: vips,
                padding: Some(order.vip_mask().clone()),
            });
        }
        if let Some(form) = compressed {
            x = self.expanded(&form, cx)?;
        }
        Ok(Organised {
            hidden: x,
            padding: keep.cloned(),
        })
    }

    fn expanded(&self, form: &Compressed, cx: &Context<'_>) -> Result<Signal> {
        let x = form.expanded()?;
        Ok(cx.trace.site(format_args!("{}.expanded", self.path), x)?)
    }
}
