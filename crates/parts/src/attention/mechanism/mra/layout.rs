//! Tokens of sequences side by side, so that blocks of them are neighbours.

use super::super::sequences::Sequences;
use super::{MraSpec, Tiles};
use crate::Result;
use crate::error::tensor;
use lapidary_kernels::{D, Device, RowPooling, Tensor, appended_rows, embedding, pooled_rows};

/// Where real tokens lie, for each head of each sequence as many slots, whole blocks of the largest scale:
/// real tokens first, in order or tile by tile.
#[derive(Debug)]
pub(super) struct Layout {
    /// `[batch, heads, queries, keys]`.
    pub(super) sizes: [usize; 4],
    /// Slots of a head of a sequence.
    pub(super) slots: usize,
    /// Real tokens of each head of each sequence.
    pub(super) lengths: Vec<usize>,
    /// The row of the token in each slot, `[batch · heads · slots]`, behind all where there is none; nothing
    /// where slots are rows.
    order: Option<Tensor>,
    /// The slot of each query, `[batch · heads · queries]`, behind all where it is a pad.
    back: Option<Tensor>,
}

/// As an index of rows, unless it is all of them in order.
fn index(rows: Vec<u32>, all: usize) -> Result<Option<Tensor>> {
    let in_order = rows.len() == all && rows.iter().zip(0..).all(|(row, at)| *row == at);
    if in_order {
        return Ok(None);
    }
    let count = rows.len();
    Ok(Some(tensor(Tensor::from_vec(rows, count, &Device::Cpu))?))
}

/// Rows of `x` `[.., width]` by an index that may point behind them, to a row of zeros.
fn picked(x: &Tensor, index: Option<&Tensor>) -> lapidary_kernels::Result<Tensor> {
    let Some(index) = index else {
        return Ok(x.clone());
    };
    let width = x.dim(D::Minus1)?;
    let nothing = Tensor::zeros((1, width), x.dtype(), x.device())?;
    embedding(&appended_rows(x, &nothing)?, index)
}

impl Tiles {
    /// The tokens of an image in the order of their slots.
    fn order(self, length: usize) -> Vec<usize> {
        let [high, wide] = self.tile;
        let mut order: Vec<usize> = (0..length).collect();
        order.sort_by_key(|token| {
            let (row, column) = (token / self.columns, token % self.columns);
            (row / high, column / wide, row % high, column % wide)
        });
        order
    }
}

impl Layout {
    pub(super) fn new(spec: &MraSpec, sequences: &Sequences<'_>) -> Result<Self> {
        let [batch, heads, queries, keys] = sequences.sizes;
        let block = spec.scales.first().copied().unwrap_or(1);
        let lengths: Vec<usize> = sequences.iter().map(|sequence| sequence.len()).collect();
        let longest = lengths.iter().copied().max().unwrap_or(0);
        let slots = longest.div_ceil(block).max(1) * block;
        let mut order = vec![(batch * heads * keys) as u32; batch * heads * slots];
        let mut back = vec![(batch * heads * slots) as u32; batch * heads * queries];
        for sequence in sequences.iter() {
            let tokens = match spec.image {
                None => (0..sequence.len()).collect(),
                Some(tiles) => tiles.order(sequence.len()),
            };
            let start = sequence.index * slots;
            for (token, slot) in tokens.into_iter().zip(start..) {
                if let Some(at) = order.get_mut(slot) {
                    *at = sequence.key(token).row as u32;
                }
                if let Some(at) = back.get_mut(sequence.query(token).row) {
                    *at = slot as u32;
                }
            }
        }
        Ok(Self {
            sizes: sequences.sizes,
            slots,
            lengths,
            order: index(order, batch * heads * keys)?,
            back: index(back, batch * heads * slots)?,
        })
    }

    /// Heads of sequences.
    pub(super) fn count(&self) -> usize {
        self.lengths.len()
    }

    /// A row for each slot, `[.., width]`, of `x` `[batch, heads, key, width]`, zeros where there is no token.
    pub(super) fn lay(&self, x: &Tensor) -> lapidary_kernels::Result<Tensor> {
        picked(x, self.order.as_ref())
    }

    /// The way back for queries, `[batch, heads, query, width]`.
    pub(super) fn unlay(&self, x: &Tensor) -> lapidary_kernels::Result<Tensor> {
        let [batch, heads, queries, _] = self.sizes;
        let x = picked(x, self.back.as_ref())?;
        Ok(x.reshape((batch, heads, queries, ()))?)
    }

    /// Real tokens of block `at` of this size, of one head of a sequence.
    pub(super) fn tokens(&self, of: usize, at: usize, size: usize) -> usize {
        let length = self.lengths.get(of).copied().unwrap_or(0);
        length.saturating_sub(at * size).min(size)
    }

    /// Blocks of this size that have real tokens, of one head of a sequence.
    pub(super) fn blocks(&self, of: usize, size: usize) -> usize {
        self.lengths
            .get(of)
            .map_or(0, |length| length.div_ceil(size))
    }

    /// The row of block `at` of this size.
    pub(super) fn row(&self, of: usize, at: usize, size: usize) -> usize {
        of * (self.slots / size) + at
    }

    /// The means of real tokens of blocks of each of `scales`, from the largest on, each a divisor of the one
    /// before, `[blocks of all, width]`; of what [`Layout::lay`] gives.
    pub(super) fn means(
        &self,
        x: &Tensor,
        scales: &[usize],
    ) -> lapidary_kernels::Result<Vec<Tensor>> {
        let (mut finer, mut sums) = (1, x.clone());
        let mut all = Vec::with_capacity(scales.len());
        for &size in scales.iter().rev() {
            let each = size / finer;
            if each > 1 {
                let rows = self.count() * self.slots / finer;
                let ends = (each..=rows).step_by(each).collect();
                let every = (0..rows as u32).collect();
                sums = pooled_rows(&sums, every, ends, RowPooling::Sum)?;
            }
            finer = size;
            all.push(match size {
                1 => sums.clone(),
                _ => sums.broadcast_mul(&self.shares(size, x)?)?,
            });
        }
        all.reverse();
        Ok(all)
    }

    /// One over the real tokens of each block, `[blocks of all, 1]`.
    fn shares(&self, size: usize, like: &Tensor) -> lapidary_kernels::Result<Tensor> {
        let each = self.slots / size;
        let shares: Vec<f64> = (0..self.count() * each)
            .map(|row| 1.0 / self.tokens(row / each, row % each, size).max(1) as f64)
            .collect();
        let shares = Tensor::from_vec(shares, (self.count() * each, 1), &Device::Cpu)?;
        Ok(shares.to_dtype(like.dtype())?.to_device(like.device())?)
    }

    /// Rows of the first tokens of blocks of this size.
    pub(super) fn firsts(&self, x: &Tensor, size: usize) -> lapidary_kernels::Result<Tensor> {
        if size == 1 {
            return Ok(x.clone());
        }
        let rows = self.count() * self.slots / size;
        let firsts = (0..rows).map(|row| (row * size) as u32).collect();
        pooled_rows(x, firsts, (1..=rows).collect(), RowPooling::Sum)
    }
}
