//! Which methods take, or go by, something in a model's depth that the organisation of its tokens rules out.

use lapidary_model::Model;
use lapidary_parts::organisation::OrganisationSpec;

use crate::method::{Effect, Method};
use crate::{Error, Result};

/// What a method takes out of blocks, or of a model's depth.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Takes {
    /// Something inside a part: every block keeps both of its parts.
    Insides,
    /// The same, as much of each block as it turns the stream little.
    InsidesByTurns,
    /// Attention, of blocks that stay.
    Attention,
    /// Whole blocks.
    Blocks,
    /// Whole blocks, by what the model gives that is begun behind them.
    BlocksFromTheMiddle,
}

impl Takes {
    fn of(method: &Method) -> Option<Self> {
        Some(match (method.effect, method.name) {
            (_, "modegpt") => Self::InsidesByTurns,
            (Effect::Depth, "mamba-shedder-scan" | "mamba-shedder-width") => Self::Insides,
            (Effect::Depth, "attention-cosine" | "entropy-attention" | "linearise") => {
                Self::Attention
            }
            (Effect::Depth, "macro-influence" | "fusegpt" | "fuse-lora") => {
                Self::BlocksFromTheMiddle
            }
            (Effect::Depth, _) => Self::Blocks,
            _ => return None,
        })
    }
}

/// Refuses a model in whose organisation what the method takes cannot be missed.
///
/// # Errors
/// Says why, and what applies instead.
pub(crate) fn check(method: &Method, model: &Model) -> Result<()> {
    use OrganisationSpec::{Interleaved, Reversible, VipCentric};
    let Some((organisation, takes)) = model.spec().organisation.as_ref().zip(Takes::of(method))
    else {
        return Ok(());
    };
    let why = match (organisation, takes) {
        (_, Takes::Insides)
        | (Interleaved(_), Takes::Attention | Takes::InsidesByTurns)
        | (VipCentric(_), Takes::Blocks | Takes::InsidesByTurns) => return Ok(()),
        (Interleaved(_), Takes::Blocks | Takes::BlocksFromTheMiddle) => {
            "its layout counts the blocks; attention-cosine and linearise leave all of them"
        }
        (VipCentric(_), Takes::Attention) => {
            "a block that sees the compressed sequence has attention; block-influence and \
             delete-linear leave out whole blocks"
        }
        (VipCentric(_), Takes::BlocksFromTheMiddle) => {
            "its passes begin at the first block; block-influence and delete-linear leave out blocks"
        }
        (Reversible(_), _) => {
            "its blocks move two streams, by an attention and a feed-forward part each; svd and the \
             other factorisations take these"
        }
    };
    Err(Error::invalid(
        "the organisation of tokens",
        organisation.kind(),
        format!("none for {}: {why}", method.name),
    ))
}
