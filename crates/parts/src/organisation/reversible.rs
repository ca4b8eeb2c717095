//! Reversible blocks (Gomez et al., The Reversible Residual Network, 2017, arXiv 1707.04585; Kitaev et
//! al., Reformer, 2020, arXiv 2001.04451): two streams that both begin as the embeddings, each moved by
//! what a part makes of the other.
//!
//! ```text
//! y₁ = x₁ + A(N₁ x₂)            x₂ = y₂ − F(N₂ y₁)
//! y₂ = x₂ + F(N₂ y₁)            x₁ = y₁ − A(N₁ x₂)
//! ```
//!
//! Their mean is what comes out. What flows into a block is had again from what flows out of it, so
//! that training which recomputes (`recompute = true`) remembers the last streams alone, however many
//! blocks there are; the backward pass runs every part once more. Dropout, hashes and whatever else a
//! pass draws are drawn again as they were. Blocks have the parameters that they would have without.

use std::sync::Arc;

use super::Surroundings;
use crate::attention::MixerSpec;
use crate::block::{Block, Wiring};
use crate::recomputed::Again;
use crate::state::DecodeState;
use crate::{Context, Error, Result};
use lapidary_kernels::{Coupling, Recomputation};
use lapidary_signal::Signal;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Reversible blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ReversibleSpec {}

impl ReversibleSpec {
    pub(super) fn validate(&self, model: &Surroundings<'_>) -> Result<()> {
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
}

/// Passes `x` `[batch, length, width]` through the blocks.
pub(super) fn forward(
    x: Signal,
    blocks: &[Arc<Block>],
    recomputation: Option<&Recomputation>,
    mut state: Option<&mut DecodeState>,
    cx: &Context<'_>,
) -> Result<Signal> {
    if let Some(recomputation) = recomputation {
        let couplings = blocks.iter().map(|block| coupling(block, cx));
        let couplings = couplings.collect::<Result<Vec<_>>>()?;
        let streams = recomputation.run_reversible([x.value(), x.value()], couplings)?;
        let [first, second] = streams.map(Signal::from);
        return mean(&first, &second);
    }
    let (mut first, mut second) = (x.clone(), x);
    for (index, block) in blocks.iter().enumerate() {
        let state = state.as_deref_mut();
        let mixer = state.and_then(|state| state.mixers.get_mut(index));
        if let Some(moved) = block.attended(&second, cx, mixer)? {
            first = first.add(&moved)?;
        }
        if let Some(moved) = block.transformed(&first, cx)? {
            second = second.add(&moved)?;
        }
    }
    mean(&first, &second)
}

fn mean(first: &Signal, second: &Signal) -> Result<Signal> {
    Ok(first.add(second)?.scale(0.5)?)
}

/// One block as two maps that can be run at any time.
fn coupling(block: &Arc<Block>, cx: &Context<'_>) -> Result<Coupling> {
    let again = Again::new(cx)?;
    let [one, other] = [block.clone(), block.clone()];
    let attended = again.part(move |x, cx| {
        let moved = one.attended(&x, cx, None)?;
        moved.ok_or_else(|| Error::spec("mixer", "absent", "one in a reversible organisation"))
    });
    let transformed = again.part(move |x, cx| {
        let moved = other.transformed(&x, cx)?;
        moved.ok_or_else(|| {
            Error::spec(
                "feedforward",
                "absent",
                "given in a reversible organisation",
            )
        })
    });
    Ok(Coupling::new(attended, transformed))
}
