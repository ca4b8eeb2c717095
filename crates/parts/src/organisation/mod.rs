//! How tokens are organised above the blocks that mix them: which of them a block sees together, and
//! in which form.
//!
//! Without an organisation a model's blocks are run one after the other on the whole sequence. One
//! that is given one hands its blocks over; paths of parameters and sites of the blocks stay what
//! they are, and what belongs to the organisation itself is under `organisation.`.
//!
//! * [`fit`]: groups of tokens, and latent tokens through which groups hear of each other.
//! * [`reversible`]: two streams, of which earlier ones can be had from later ones.
//! * [`vcc`]: a few tokens kept as they are, all others in a compressed form.

pub mod fit;
mod fold;
pub mod reversible;
pub mod vcc;

use std::sync::Arc;

use crate::block::{Block, BlockSpec};
use crate::parameters::Parameters;
use crate::recomputed::recomputed;
use crate::state::DecodeState;
use crate::{Context, Draws, Error, Result};
use fit::{Fit, FitSpec};
use lapidary_kernels::{Recomputation, Tensor};
use lapidary_signal::Signal;
use reversible::ReversibleSpec;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use vcc::{Vcc, VccSpec};

/// Which organisation, and how it is set up.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "kebab-case")]
#[allow(
    clippy::large_enum_variant,
    reason = "a spec is made once for each model"
)]
pub enum OrganisationSpec {
    /// Local blocks on groups of tokens between global ones on latents (Chen & Li, FIT, arXiv
    /// 2305.12689).
    Interleaved(FitSpec),
    /// A compressed form of the sequence around a few tokens (Zeng et al., Vcc, arXiv 2305.04241).
    VipCentric(VccSpec),
    /// Two streams that can be had back (Gomez et al., arXiv 1707.04585).
    Reversible(ReversibleSpec),
}

/// The model that an organisation is asked for.
#[derive(Clone, Copy, Debug)]
pub struct Surroundings<'a> {
    /// The model's blocks, repetitions written out.
    pub blocks: &'a [BlockSpec],
    /// Features of a token.
    pub width: usize,
    /// Most tokens.
    pub length: usize,
}

impl OrganisationSpec {
    /// The kind's name in a spec.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Interleaved(_) => "interleaved",
            Self::VipCentric(_) => "vip-centric",
            Self::Reversible(_) => "reversible",
        }
    }

    /// Refuses what cannot be built for such a model.
    ///
    /// # Errors
    /// Names the field, what it is and what it could be.
    pub fn validate(&self, model: &Surroundings<'_>, field: &str) -> Result<()> {
        match self {
            Self::Interleaved(spec) => spec.validate(model, field),
            Self::VipCentric(spec) => spec.validate(model, field),
            Self::Reversible(spec) => spec.validate(model, field),
        }
    }

    /// Blocks of its own, and linear layers beside them.
    pub fn own(&self) -> (Option<&BlockSpec>, usize, usize) {
        match self {
            Self::Interleaved(spec) => {
                let (globals, exchanges) = spec.counts();
                (spec.block.as_deref(), globals, 8 * exchanges + 1)
            }
            Self::VipCentric(_) | Self::Reversible(_) => (None, 0, 0),
        }
    }

    /// What it draws anew in training, beside the model's blocks.
    pub fn draws(&self) -> Draws {
        match self {
            Self::Interleaved(spec) => {
                let block = spec.block.as_deref().map(BlockSpec::draws);
                block.unwrap_or_default()
            }
            Self::VipCentric(spec) => {
                Draws::anything(spec.exploration > 0.0 || spec.selection == vcc::Selection::Random)
            }
            Self::Reversible(_) => Draws::default(),
        }
    }

    /// Whether what comes out are the tokens that went in, each at its place.
    pub fn gives_tokens(&self) -> bool {
        match self {
            Self::Interleaved(spec) => spec.output == fit::FitOutput::Tokens,
            Self::VipCentric(spec) => spec.output == vcc::VccOutput::Tokens,
            Self::Reversible(_) => true,
        }
    }

    /// Features of what comes out of the blocks of a model of `width`.
    pub fn output_width(&self, width: usize) -> usize {
        match self {
            Self::Interleaved(_) | Self::VipCentric(_) => width,
            Self::Reversible(spec) => spec.output_width(width),
        }
    }

    /// Whether a sequence can be gone on with from what is kept of it, in a model whose blocks are
    /// `causal`.
    pub fn decodes(&self, causal: bool) -> bool {
        match self {
            Self::Interleaved(spec) => spec.decodes(causal),
            Self::VipCentric(_) => false,
            Self::Reversible(_) => true,
        }
    }
}

/// What a model reads, for organisations that choose tokens by it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Read<'a> {
    /// Token ids `[batch, length]` in `u32`.
    pub ids: Option<&'a Tensor>,
    /// Token types `[batch, length]` in `u32`.
    pub token_types: Option<&'a Tensor>,
}

/// Runs one block in a context, remembering or recomputing what is inside.
pub type Run<'a> = dyn Fn(&Arc<Block>, Signal, &Context<'_>) -> Result<Signal> + 'a;

/// What an organisation gives.
#[derive(Clone, Debug)]
pub struct Organised {
    /// `[batch, length, width]`: the tokens, or what stands in their place, of
    /// [`OrganisationSpec::output_width`].
    pub hidden: Signal,
    /// `[batch, length]` in `u8`, 1 = real; all when absent.
    pub padding: Option<Tensor>,
}

/// An organisation with its parameters.
#[derive(Debug)]
pub enum Organisation {
    /// Groups and latents.
    Interleaved(Box<Fit>),
    /// Some tokens and blocks of the others.
    VipCentric(Box<Vcc>),
    /// Two streams.
    Reversible(ReversibleSpec),
}

impl Organisation {
    /// Builds the organisation for such a model.
    ///
    /// # Errors
    /// When a parameter cannot be had.
    pub fn new(
        spec: &OrganisationSpec,
        model: &Surroundings<'_>,
        parameters: Parameters<'_>,
    ) -> Result<Self> {
        Ok(match spec {
            OrganisationSpec::Interleaved(spec) => {
                Self::Interleaved(Box::new(Fit::new(spec, model, false, parameters)?))
            }
            OrganisationSpec::VipCentric(spec) => {
                Self::VipCentric(Box::new(Vcc::new(spec, parameters)))
            }
            OrganisationSpec::Reversible(spec) => Self::Reversible(*spec),
        })
    }

    /// Passes embeddings `x` `[batch, length, width]` through `blocks`, with what is inside them
    /// remembered, or recomputed in the backward pass.
    ///
    /// # Errors
    /// When the length, the memory or the state does not fit, or a block cannot be run so.
    pub fn forward(
        &self,
        x: Signal,
        blocks: &[Arc<Block>],
        read: Read<'_>,
        cx: &Context<'_>,
        recomputation: Option<&Recomputation>,
        state: Option<&mut DecodeState>,
    ) -> Result<Organised> {
        let decodes = match self {
            Self::Interleaved(fit) => fit.decodes() && state.is_some(),
            Self::VipCentric(_) => false,
            Self::Reversible(_) => true,
        };
        if (cx.offset > 0 || state.is_some()) && !decodes {
            let expected = "0, and no state: such a sequence is not decoded step by step";
            return Err(Error::spec("offset", cx.offset, expected));
        }
        let run = |block: &Arc<Block>, x: Signal, cx: &Context<'_>| match recomputation {
            Some(recomputation) => recomputed(recomputation, block, &x, cx),
            None => block.forward(x, cx, None),
        };
        match self {
            Self::Interleaved(fit) => match state {
                Some(state) => fit.decode(&x, blocks, state, cx),
                None => fit.organise(x, blocks, &run, cx),
            },
            Self::VipCentric(vcc) => vcc.organise(x, blocks, &run, read, cx),
            Self::Reversible(spec) => Ok(Organised {
                hidden: reversible::forward(spec, x, blocks, recomputation, state, cx)?,
                padding: cx.key_padding.cloned(),
            }),
        }
    }
}
