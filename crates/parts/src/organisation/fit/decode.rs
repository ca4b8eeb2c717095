//! A causal FIT that goes on from earlier tokens.
//!
//! A token sees the earlier ones of its own group, and what the latents of the group before it write.
//! The latents of its own group read it when the group is full, and no token of that group hears of
//! them. Kept are therefore, of the group that is being decoded, what local blocks keep and the tokens
//! that each stage's latents will read; of the group before, its latents at each stage; and what global
//! blocks keep of all latents. A step costs what its own group and the latents before it are, and a
//! group's latents are computed once, with its last token. Latents of a last stage, which are not
//! written, are not computed.

use super::FitSpec;
use super::network::Fit;
use crate::block::Block;
use crate::error::tensor;
use crate::organisation::Organised;
use crate::state::{DecodeState, MixerState};
use crate::{Context, Error, Result};
use lapidary_kernels::Tensor;
use lapidary_signal::Signal;
use std::sync::Arc;

/// What is kept between steps beside the states of local blocks. Earlier tokens are constants to any
/// lens.
#[derive(Debug, Default)]
pub struct GroupMemory {
    /// One for each stage that writes.
    stages: Vec<StageMemory>,
    /// One for each global block.
    globals: Vec<MixerState>,
}

#[derive(Debug, Default)]
struct StageMemory {
    /// The tokens so far of the group that is being decoded, as latents will read them, `[batch,
    /// tokens, width]`.
    unread: Option<Tensor>,
    /// Latents of the group before, `[batch, m, latent_width]`.
    latents: Option<Tensor>,
}

/// Where a piece of a group lies.
#[derive(Clone, Copy)]
struct Place {
    group: usize,
    /// Tokens of the group before the piece.
    within: usize,
    /// Tokens of the piece.
    count: usize,
}

impl FitSpec {
    /// Whether a model whose blocks are `causal` can be decoded step by step.
    pub(in crate::organisation) fn decodes(&self, causal: bool) -> bool {
        let block = self.block.as_deref();
        causal
            && block.is_none_or(|block| block.attention.is_causal())
            && self.condition == 0
            && self.output == super::FitOutput::Tokens
    }
}

impl Fit {
    /// The next tokens `x` `[batch, length, width]` of sequences that `state` is of.
    pub(in crate::organisation) fn decode(
        &self,
        x: &Signal,
        blocks: &[Arc<Block>],
        state: &mut DecodeState,
        cx: &Context<'_>,
    ) -> Result<Organised> {
        if cx.key_padding.is_some() {
            let expected = "absent: groups of a sequence that is decoded are full of tokens";
            return Err(Error::spec("padding", "given", expected));
        }
        let (_, length, _) = tensor(x.value().dims3())?;
        self.check_length(cx.offset + length)?;
        let group = self.spec.group;
        let mut pieces = Vec::new();
        let mut done = 0;
        while done < length {
            let token = cx.offset + done;
            let place = Place {
                group: token / group,
                within: token % group,
                count: (group - token % group).min(length - done),
            };
            let piece = x.narrow(1, done, place.count)?;
            pieces.push(self.piece(piece, place, blocks, state, cx)?);
            done += place.count;
        }
        Ok(Organised {
            hidden: Signal::concatenate(&pieces, 1)?,
            padding: None,
        })
    }

    /// Tokens of one group through all stages.
    fn piece(
        &self,
        x: Signal,
        place: Place,
        blocks: &[Arc<Block>],
        state: &mut DecodeState,
        cx: &Context<'_>,
    ) -> Result<Signal> {
        let DecodeState { mixers, groups, .. } = state;
        let batch = tensor(x.value().dim(0))?;
        if place.within == 0 {
            mixers.fill_with(MixerState::default);
        }
        let writes = self.writes.len();
        groups.stages.resize_with(writes, StageMemory::default);
        groups
            .globals
            .resize_with(self.globals.len(), MixerState::default);
        let local = Context {
            offset: place.within,
            memory: None,
            ..*cx
        };
        let positions = self.group_positions(place.within + place.count, x.dtype(), x.device())?;
        let positions = tensor(positions.narrow(0, place.within, place.count))?;
        let mut x = x.add_constant(&positions)?;
        let mut locals = blocks.iter().zip(mixers);
        let mut globals = self.globals.iter().zip(&mut groups.globals);
        let mut latent = None;
        let exchanges = self.reads.iter().zip(&self.writes);
        let mut exchanges = exchanges.zip(&mut groups.stages);
        for stage in &self.stages {
            for (block, state) in locals.by_ref().take(stage.local) {
                x = block.forward(x, &local, Some(state))?;
            }
            let Some(((read, write), memory)) = exchanges.next() else {
                continue;
            };
            let tokens = match memory.unread.take() {
                Some(earlier) => Signal::concatenate(&[Signal::from(earlier), x.clone()], 1)?,
                None => x.clone(),
            };
            // Before this group's latents take the place of those that write into it.
            let written = match memory.latents.take() {
                Some(latents) => latents,
                None => self.nothing(batch, x.dtype(), x.device())?,
            };
            x = write.forward(&x, &Signal::from(written.clone()), None, &local)?;
            if place.within + place.count < self.spec.group {
                memory.unread = Some(tokens.into_value());
                memory.latents = Some(written);
                continue;
            }
            let start = match latent.take() {
                Some(latent) => latent,
                None => {
                    let own = (place.group * self.spec.latents, self.spec.latents);
                    self.latents(batch, own, x.dtype(), x.device())?
                }
            };
            let read = read.forward(&start, &tokens, None, &local)?;
            let own = globals.by_ref().take(stage.global);
            let read = through_globals(read, place.group, own, &local)?;
            memory.latents = Some(read.value().clone());
            latent = Some(read);
        }
        Ok(x)
    }
}

/// Latents of one group `[batch, m, latent_width]` through global blocks that keep those of the groups
/// before it.
fn through_globals<'a>(
    mut latent: Signal,
    group: usize,
    blocks: impl Iterator<Item = (&'a Arc<Block>, &'a mut MixerState)>,
    local: &Context<'_>,
) -> Result<Signal> {
    let (batch, latents, _) = tensor(latent.value().dims3())?;
    // The last group sees all of itself and all groups before it.
    let row = (0..=group as u32).flat_map(|group| std::iter::repeat_n(group, latents));
    let row: Vec<u32> = row.collect();
    let places = Tensor::from_vec(row.repeat(batch), (batch, row.len()), latent.device());
    let places = tensor(places)?;
    let global = Context {
        places: Some(&places),
        offset: group * latents,
        ..*local
    };
    for (block, state) in blocks {
        latent = block.forward(latent, &global, Some(state))?;
    }
    Ok(latent)
}
