//! Reversible blocks (Gomez et al., The Reversible Residual Network, 2017, arXiv 1707.04585; Kitaev et
//! al., Reformer, 2020, arXiv 2001.04451): two streams that both begin as the embeddings, each moved by
//! what a part makes of the other.
//!
//! ```text
//! y₁ = x₁ + A(N₁ x₂)            x₂ = y₂ − F(N₂ y₁)
//! y₂ = x₂ + F(N₂ y₁)            x₁ = y₁ − A(N₁ x₂)
//! ```
//!
//! Their mean is what comes out, or both side by side, `[y₁; y₂]`, as in the authors' program: then the
//! final norm and the head read twice the width. What flows into a block is had again from what flows
//! out of it, so that training which recomputes (`recompute = true`) remembers the last streams alone,
//! however many blocks there are; the backward pass runs every part once more. Dropout, rotations of hashes and
//! whatever else a pass draws are drawn again as they were; the buckets and clusters that tokens fell into are kept,
//! since what is had again has another rounding. Blocks have the parameters that they would have without.
//!
//! `F` sees each token alone. With a `chunk` it runs on so many tokens at a time, so that what is inside
//! it is held for a chunk and not for the sequence; in training too where blocks are recomputed, by
//! recomputing each chunk for itself, at the cost of running `F` once more.

use std::sync::Arc;

use super::Surroundings;
use crate::attention::MixerSpec;
use crate::block::{Block, Wiring};
use crate::error::{bounded, tensor};
use crate::recomputed::Again;
use crate::state::DecodeState;
use crate::{Context, Error, Result};
use lapidary_kernels::{Coupling, Recomputation};
use lapidary_signal::Signal;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

const MAX_CHUNK: usize = 1 << 24;

/// Reversible blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ReversibleSpec {
    /// What becomes of the two streams.
    #[serde(default)]
    pub output: Joined,
    /// Tokens that feed-forward parts run on at a time; all when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chunk: Option<usize>,
}

/// What becomes of two streams in the end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Joined {
    /// Their mean, `[batch, length, width]`.
    #[default]
    Mean,
    /// Both side by side, `[batch, length, 2 width]`.
    Concatenated,
}

impl ReversibleSpec {
    pub(super) fn validate(&self, model: &Surroundings<'_>, field: &str) -> Result<()> {
        if let Some(chunk) = self.chunk {
            bounded(format!("{field}.chunk"), chunk, 1..=MAX_CHUNK)?;
        }
        for (index, block) in model.blocks.iter().enumerate() {
            let refuse = |name: &str, found: &str, expected: &str| {
                let expected = format!("{expected} in a reversible organisation");
                Err(Error::spec(
                    format!("blocks.{index}.{name}"),
                    found,
                    expected,
                ))
            };
            if block.wiring != Wiring::PreNorm {
                return refuse("wiring", block.wiring.name(), "pre-norm");
            }
            if block.attention == MixerSpec::Absent {
                return refuse("attention.kind", "absent", "a mixer");
            }
            if block.feedforward.is_none() {
                return refuse("feedforward", "absent", "given");
            }
            if block.cross_attention.is_some() {
                return refuse("cross_attention", "given", "absent");
            }
            if block.shortcuts {
                return refuse("shortcuts", "true", "false");
            }
        }
        Ok(())
    }

    /// Features of what comes out of a model of `width`.
    pub(super) fn output_width(&self, width: usize) -> usize {
        match self.output {
            Joined::Mean => width,
            Joined::Concatenated => 2 * width,
        }
    }

    fn join(&self, first: Signal, second: Signal) -> Result<Signal> {
        match self.output {
            Joined::Mean => Ok(first.add(&second)?.scale(0.5)?),
            Joined::Concatenated => Ok(Signal::concatenate(&[first, second], 2)?),
        }
    }
}

/// Passes `x` `[batch, length, width]` through the blocks.
pub(super) fn forward(
    spec: &ReversibleSpec,
    x: Signal,
    blocks: &[Arc<Block>],
    recomputation: Option<&Recomputation>,
    mut state: Option<&mut DecodeState>,
    cx: &Context<'_>,
) -> Result<Signal> {
    if let Some(recomputation) = recomputation {
        let couplings = blocks
            .iter()
            .map(|block| coupling(block, spec.chunk, recomputation, cx));
        let couplings = couplings.collect::<Result<Vec<_>>>()?;
        let streams = recomputation.run_reversible([x.value(), x.value()], couplings)?;
        let [first, second] = streams.map(Signal::from);
        return spec.join(first, second);
    }
    let (mut first, mut second) = (x.clone(), x);
    for (index, block) in blocks.iter().enumerate() {
        let state = state.as_deref_mut();
        let mixer = state.and_then(|state| state.mixers.get_mut(index));
        if let Some(moved) = block.attended(&second, cx, mixer)? {
            first = first.add(&moved)?;
        }
        let feed = |x: Signal| fed(block, &x, cx);
        let made = in_chunks(&first, spec.chunk, cx, feed)?;
        second = second.add(&block.transformed(made, cx)?)?;
    }
    spec.join(first, second)
}

/// One block as two maps that can be run at any time.
fn coupling(
    block: &Arc<Block>,
    chunk: Option<usize>,
    recomputation: &Recomputation,
    cx: &Context<'_>,
) -> Result<Coupling> {
    let again = Again::new(cx)?;
    let [one, other] = [block.clone(), block.clone()];
    let attended = again.part(move |x, cx| {
        let moved = one.attended(&x, cx, None)?;
        moved.ok_or_else(|| Error::spec("mixer", "absent", "one in a reversible organisation"))
    });
    let (inner, recomputation) = (again.clone(), recomputation.clone());
    let transformed = again.part(move |x, cx| {
        // A sequence in one piece is remembered only while its own gradient is computed.
        let feed = |x: Signal| {
            if chunk.is_none() {
                return fed(&other, &x, cx);
            }
            let block = other.clone();
            let part = inner.part(move |x, cx| fed(&block, &x, cx));
            Ok(Signal::from(recomputation.run(x.value(), part)?))
        };
        let made = in_chunks(&x, chunk, cx, feed)?;
        other.transformed(made, cx)
    });
    Ok(Coupling::new(attended, transformed))
}

/// `F(N₂ x)` of a block that has a feed-forward part.
fn fed(block: &Block, x: &Signal, cx: &Context<'_>) -> Result<Signal> {
    let expected = "given in a reversible organisation";
    let made = block.fed(x, cx)?;
    made.ok_or_else(|| Error::spec("feedforward", "absent", expected))
}

/// What `part` makes of `x` `[batch, length, width]`, so many tokens at a time. Where sites are looked
/// at, whose names are those of whole sequences, all at once.
fn in_chunks(
    x: &Signal,
    chunk: Option<usize>,
    cx: &Context<'_>,
    part: impl Fn(Signal) -> Result<Signal>,
) -> Result<Signal> {
    let (_, length, _) = tensor(x.value().dims3())?;
    let Some(chunk) = chunk.filter(|chunk| *chunk < length && cx.trace.is_idle()) else {
        return part(x.clone());
    };
    let starts = (0..length).step_by(chunk);
    let chunks = starts.map(|start| part(x.narrow(1, start, chunk.min(length - start))?));
    Ok(Signal::concatenate(
        &chunks.collect::<Result<Vec<_>>>()?,
        1,
    )?)
}
