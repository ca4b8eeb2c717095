//! Which tokens are VIPs, and the order in which they come first.

use super::VccSpec;
use super::store::means_and_rows;
use crate::error::tensor;
use crate::organisation::Read;
use crate::{Error, Result};
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_signal::Signal;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Which tokens are VIPs. Where there are more than slots for them the first ones are; where there are
/// fewer, the tokens that come first otherwise take the slots, but do not choose blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Importance {
    /// The first real tokens of a sequence: a class token, or a question before its text.
    #[default]
    #[serde(deserialize_with = "crate::fields::none")]
    First,
    /// Those with an id: the hidden ones of a masked language model, say.
    Token {
        /// The id.
        id: u32,
    },
    /// Those of a token type: a question's.
    TokenType {
        /// The type.
        id: u32,
    },
}

/// VIP tokens first, and behind them blocks of the others; the order of each stays.
#[derive(Debug)]
pub struct Order {
    batch: usize,
    length: usize,
    vips: usize,
    blocks: usize,
    size: usize,
    /// The token in each VIP slot, and at each place of the blocks where there is one, among
    /// `batch · length`.
    vip_rows: Vec<u32>,
    block_rows: Vec<Option<u32>>,
    /// The place of each token among the `vips + blocks · size` of its sequence.
    back: Vec<usize>,
    /// `[batch, vips]`.
    vip_mask: Tensor,
    /// The share of each slot in choosing blocks, `[batch, vips]`.
    shares: Vec<f64>,
    /// Whether the token at each place of the blocks is real, sequence by sequence.
    real: Vec<u8>,
    /// The position of the token in each VIP slot, and at each place of the blocks.
    vip_positions: Vec<u32>,
    block_positions: Vec<u32>,
}

impl Order {
    pub(super) fn new(
        spec: &VccSpec,
        read: Read<'_>,
        keep: Option<&Tensor>,
        [batch, length]: [usize; 2],
        device: &Device,
    ) -> Result<Self> {
        let vips = spec.vips.min(length);
        let size = spec.size.min((length - vips).max(1));
        let blocks = (length - vips).div_ceil(size);
        let places = vips + blocks * size;
        let kept = match keep {
            Some(keep) => tensor(tensor(keep.to_dtype(DType::U8))?.to_vec2::<u8>())?,
            None => vec![vec![1; length]; batch],
        };
        let important = important(spec, read, &kept)?;
        let (mut vip_rows, mut block_rows, mut back) = (Vec::new(), Vec::new(), Vec::new());
        let (mut vip_mask, mut shares, mut real) = (Vec::new(), Vec::new(), Vec::new());
        let (mut vip_positions, mut block_positions) = (Vec::new(), Vec::new());
        for (sequence, (kept, important)) in kept.iter().zip(&important).enumerate() {
            let mut order: Vec<usize> = (0..length).collect();
            order.sort_by_key(|token| !important.get(*token).copied().unwrap_or(false));
            let mut back_here = vec![0; length];
            for (place, token) in order.iter().enumerate() {
                if let Some(slot) = back_here.get_mut(*token) {
                    *slot = place;
                }
            }
            back.extend(back_here);
            order.resize(places, length);
            let is_real = |token: &usize| kept.get(*token).copied().unwrap_or(0);
            let (first, others) = order.split_at(vips);
            let chosen = |token: &usize| important.get(*token).copied().unwrap_or(false);
            let count = first.iter().filter(|token| chosen(token)).count().max(1);
            let share = |token: &usize| f64::from(u8::from(chosen(token))) / count as f64;
            let row = |token: &usize| (sequence * length + token) as u32;
            vip_rows.extend(first.iter().map(row));
            block_rows.extend(
                others
                    .iter()
                    .map(|token| (*token < length).then(|| row(token))),
            );
            vip_mask.extend(first.iter().map(is_real));
            shares.extend(first.iter().map(share));
            real.extend(others.iter().map(is_real));
            vip_positions.extend(first.iter().map(|token| *token as u32));
            block_positions.extend(others.iter().map(|token| *token as u32));
        }
        Ok(Self {
            batch,
            length,
            vips,
            blocks,
            size,
            vip_rows,
            block_rows,
            back,
            vip_mask: tensor(Tensor::from_vec(vip_mask, (batch, vips), device))?,
            shares,
            real,
            vip_positions,
            block_positions,
        })
    }

    /// Number of blocks of a sequence.
    pub(super) fn blocks(&self) -> usize {
        self.blocks
    }

    /// Sequences, VIP slots, blocks and tokens of a block.
    pub(super) fn sizes(&self) -> [usize; 4] {
        [self.batch, self.vips, self.blocks, self.size]
    }

    pub(super) fn vip_mask(&self) -> &Tensor {
        &self.vip_mask
    }

    pub(super) fn shares(&self) -> &[f64] {
        &self.shares
    }

    pub(super) fn real(&self) -> &[u8] {
        &self.real
    }

    pub(super) fn positions(&self) -> [&[u32]; 2] {
        [&self.vip_positions, &self.block_positions]
    }

    /// The tokens in the VIP slots, as rows of `batch · length`.
    pub(super) fn vip_rows(&self) -> &[u32] {
        &self.vip_rows
    }

    /// The tokens at the places of the blocks, as rows of `batch · length`; none behind the last token.
    pub(super) fn block_rows(&self) -> &[Option<u32>] {
        &self.block_rows
    }

    /// The place of each token of a sequence, VIP slots first, sequence by sequence.
    pub(super) fn back(&self) -> impl Iterator<Item = &[usize]> {
        self.back.chunks(self.length.max(1))
    }

    /// The VIPs of `x` `[batch, length, width]` alone, `[batch, vips, width]`.
    pub(super) fn vips_of(&self, x: &Signal) -> Result<Signal> {
        let (batch, length, width) = tensor(x.value().dims3())?;
        let rows = x.reshape(&[batch * length, width])?;
        let vips = means_and_rows(&rows, [], self.vip_rows.iter().copied())?;
        Ok(vips.reshape(&[batch, self.vips, width])?)
    }
}

/// Whether each token is important, sequence by sequence.
fn important(spec: &VccSpec, read: Read<'_>, kept: &[Vec<u8>]) -> Result<Vec<Vec<bool>>> {
    let given = |what: Option<&Tensor>, name: &str| -> Result<Vec<Vec<u32>>> {
        let what = what.ok_or_else(|| {
            let expected = "given: they say which tokens are VIPs";
            Error::spec(name, "absent", expected)
        })?;
        tensor(what.to_vec2::<u32>())
    };
    let (rows, wanted) = match spec.importance {
        Importance::First => {
            let first = |kept: &Vec<u8>| {
                let mut left = spec.vips;
                let mut take = |kept: &u8| {
                    let takes = *kept != 0 && left > 0;
                    left -= usize::from(takes);
                    takes
                };
                kept.iter().map(&mut take).collect()
            };
            return Ok(kept.iter().map(first).collect());
        }
        Importance::Token { id } => (given(read.ids, "token ids")?, id),
        Importance::TokenType { id } => (given(read.token_types, "token types")?, id),
    };
    let each = |(row, kept): (&Vec<u32>, &Vec<u8>)| {
        let pairs = row.iter().zip(kept);
        pairs
            .map(|(id, kept)| *id == wanted && *kept != 0)
            .collect()
    };
    Ok(rows.iter().zip(kept).map(each).collect())
}
