//! The compressed form of a batch of sequences, and its way through one block.

use super::VccSpec;
use super::importance::Order;
use super::selection::{Chosen, choose};
use super::store::{TokenStore, means_and_rows};
use crate::block::Block;
use crate::error::tensor;
use crate::organisation::Run;
use crate::{Context, Result};
use lapidary_kernels::{DType, Device, Tensor, weighted_change};
use lapidary_signal::{Lens, Signal};
use std::sync::Arc;

/// VIP tokens, means of blocks, and how far the tokens of a block are from its mean.
#[derive(Debug)]
pub(super) struct Compressed<'a> {
    order: &'a Order,
    /// The store's last means are those of the blocks of all sequences and behind them their VIPs,
    /// `[batch · (blocks + vips), width]`.
    store: TokenStore,
    /// The VIPs' rows of what the store was given last, sequence by sequence.
    vip_rows: Vec<u32>,
    fixed: Arc<Fixed>,
}

/// What layers do not change.
#[derive(Debug)]
struct Fixed {
    /// Real tokens of each block, `[batch, blocks]` flat.
    counts: Vec<usize>,
    /// Whether a block has any, `[batch, blocks]`.
    keep: Tensor,
    /// The mean position of its real tokens, rounded.
    positions: Vec<u32>,
    /// The part of each VIP slot in choosing blocks, `[batch, vips]`.
    shares: Tensor,
}

impl Fixed {
    fn new(order: &Order, dtype: DType, device: &Device) -> Result<Self> {
        let [batch, vips, blocks, size] = order.sizes();
        let [_, positions] = order.positions();
        let (mut counts, mut keep, mut means) = (Vec::new(), Vec::new(), Vec::new());
        for (real, positions) in order.real().chunks(size).zip(positions.chunks(size)) {
            let count = real.iter().filter(|kept| **kept != 0).count();
            let of_real = positions.iter().zip(real).filter(|(_, kept)| **kept != 0);
            let sum: u64 = of_real.map(|(position, _)| u64::from(*position)).sum();
            means.push((sum as f64 / count.max(1) as f64).round() as u32);
            keep.push(u8::from(count > 0));
            counts.push(count);
        }
        let shares = tensor(Tensor::from_slice(order.shares(), (batch, vips), device))?;
        Ok(Self {
            counts,
            keep: tensor(Tensor::from_vec(keep, (batch, blocks), device))?,
            positions: means,
            shares: tensor(shares.to_dtype(dtype))?,
        })
    }
}

/// The rows of a block's real tokens.
fn real_rows(rows: impl Iterator<Item = Option<u32>>, real: &[u8]) -> Vec<u32> {
    let kept = rows.zip(real).filter(|(_, kept)| **kept != 0);
    kept.filter_map(|(row, _)| row).collect()
}

impl<'a> Compressed<'a> {
    /// Compresses `x` `[batch, length, width]`.
    pub(super) fn new(x: &Signal, order: &'a Order) -> Result<Self> {
        let (batch, length, width) = tensor(x.value().dims3())?;
        let [_, _, _, size] = order.sizes();
        let fixed = Arc::new(Fixed::new(order, x.dtype(), x.device())?);
        let tokens = x.reshape(&[batch * length, width])?;
        let rows = order.block_rows();
        let blocks = rows.chunks(size).zip(order.real().chunks(size));
        let lists = blocks.map(|(rows, real)| real_rows(rows.iter().copied(), real));
        let vip_rows = order.vip_rows().to_vec();
        let means = means_and_rows(&tokens, lists, vip_rows.iter().copied())?;
        Ok(Self {
            order,
            store: TokenStore::new(tokens, means, rows.to_vec(), size)?,
            vip_rows,
            fixed,
        })
    }

    /// The means of blocks `[batch, blocks, width]`.
    fn means(&self) -> Result<Signal> {
        let [batch, _, blocks, _] = self.order.sizes();
        let all = self.store.means()?;
        let (_, width) = tensor(all.value().dims2())?;
        let means = all.narrow(0, 0, batch * blocks)?;
        Ok(means.reshape(&[batch, blocks, width])?)
    }

    /// `[batch, vips, width]`.
    pub(super) fn vips(&self) -> Result<Signal> {
        let [batch, vips, blocks, _] = self.order.sizes();
        let all = self.store.means()?;
        let (_, width) = tensor(all.value().dims2())?;
        let behind = all.narrow(0, batch * blocks, batch * vips)?;
        Ok(behind.reshape(&[batch, vips, width])?)
    }

    /// The row of a VIP in what was written last.
    fn vip_row(&self, sequence: usize, slot: usize) -> u32 {
        let [_, vips, ..] = self.order.sizes();
        let row = self.vip_rows.get(sequence * vips + slot);
        row.copied().unwrap_or(0)
    }

    /// All tokens at their places, `[batch, length, width]`.
    pub(super) fn expanded(&self) -> Result<Signal> {
        let [batch, vips, blocks, size] = self.order.sizes();
        let mut reading = self.store.reading();
        for (sequence, places) in self.order.back().enumerate() {
            for place in places {
                match place.checked_sub(vips) {
                    None => reading.row(self.vip_row(sequence, *place)),
                    Some(place) => reading.token(sequence * blocks + place / size, place % size)?,
                }
            }
        }
        let tokens = reading.done()?;
        let (rows, width) = tensor(tokens.value().dims2())?;
        Ok(tokens.reshape(&[batch, rows / batch.max(1), width])?)
    }

    /// The form behind one block of the model.
    pub(super) fn through(
        mut self,
        block: &Arc<Block>,
        run: &Run<'_>,
        spec: &VccSpec,
        cx: &Context<'_>,
    ) -> Result<Self> {
        let [batch, _, blocks, _] = self.order.sizes();
        let fine_count = spec.fine.min(blocks);
        let fixed = self.fixed.clone();
        let chosen = match blocks - fine_count {
            // There is nothing to choose.
            0 => Chosen::all(&fixed.keep, self.store.means()?.dtype())?,
            _ => choose(
                block,
                spec,
                (&self.vips()?, &fixed.shares),
                (&self.means()?, &fixed.keep),
                cx,
            )?,
        };
        let importance = cx.trace.site(
            format_args!("{}.importance", block.path()),
            Signal::from(chosen.importance),
        )?;
        let short = Short::new(&chosen.ranking, fine_count, self.order, &fixed)?;
        let tokens = self.refined(&short)?;
        let device = tokens.device().clone();

        let weights = short.weights(importance.value(), &device)?;
        let counts = match spec.scale_correction {
            true => short.log_counts(batch, weights.dtype(), &device)?,
            false => tensor(weights.zeros_like())?,
        };
        let bias = tensor(tensor(weights.log())? + counts)?;
        let shape = (batch, short.length);
        let places = tensor(Tensor::from_slice(&short.positions, shape, &device))?;
        let keep = tensor(Tensor::from_slice(&short.keep, shape, &device))?;
        let inside = Context {
            key_padding: Some(&keep),
            key_bias: Some(&bias),
            places: Some(&places),
            ..*cx
        };
        let written = run(block, tokens.clone(), &inside)?;
        // out = w (h + F(x + h)) + x. As w is 1 that is what the block gives, with one more gradient.
        let gain = tensor(weights - 1.0)?;
        let written = match written.lens() {
            Lens::Plain => {
                let value = weighted_change(written.value(), tokens.value(), &gain)?;
                Signal::from(value)
            }
            _ => {
                let change = tensor(written.value() - tokens.value())?.detach();
                let gain = tensor(gain.unsqueeze(2))?;
                written.add_constant(&tensor(change.broadcast_mul(&gain))?)?
            }
        };
        self.write(&written, &short)?;
        Ok(self)
    }

    /// `U = [fine tokens; coarse means; VIPs]` of each sequence, `[batch, tokens, width]`.
    fn refined(&self, short: &Short) -> Result<Signal> {
        let [batch, vips, _, size] = self.order.sizes();
        let mut reading = self.store.reading();
        for sequence in 0..batch {
            for (block, _) in short.fine_of(sequence) {
                for token in 0..size {
                    reading.token(*block, token)?;
                }
            }
            for (block, _) in short.coarse_of(sequence) {
                reading.mean(*block)?;
            }
            for slot in 0..vips {
                reading.row(self.vip_row(sequence, slot));
            }
        }
        let tokens = reading.done()?;
        let (_, width) = tensor(tokens.value().dims2())?;
        Ok(tokens.reshape(&[batch, short.length, width])?)
    }

    /// Takes over what a block made of the short sequences: fine blocks are averaged anew, and coarse means
    /// replace the old ones.
    fn write(&mut self, written: &Signal, short: &Short) -> Result<()> {
        let [batch, vips, blocks, size] = self.order.sizes();
        let (_, length, width) = tensor(written.value().dims3())?;
        let written = written.reshape(&[batch * length, width])?;
        let mut lists = vec![Vec::new(); batch * blocks];
        for (block, first) in &short.fine {
            let real = self.order.real().get(block * size..(block + 1) * size);
            let rows = (*first..).map(Some);
            if let Some(list) = lists.get_mut(*block) {
                *list = real_rows(rows, real.unwrap_or(&[]));
            }
        }
        for (block, row) in &short.coarse {
            if let Some(list) = lists.get_mut(*block) {
                *list = vec![*row];
            }
        }
        let last = |sequence: usize| ((sequence + 1) * length - vips) as u32;
        self.vip_rows = (0..batch)
            .flat_map(|sequence| (last(sequence)..).take(vips))
            .collect();
        let means = means_and_rows(&written, lists, self.vip_rows.iter().copied())?;
        self.store
            .write((written, means), &short.fine, &short.coarse)
    }
}

/// The short sequences of a batch that a block of the model sees.
#[derive(Debug)]
struct Short {
    /// Tokens of each.
    length: usize,
    /// Fine blocks of all sequences, as rows of `batch · blocks`, each with the row of its first token among
    /// `batch · length`.
    fine: Vec<(usize, u32)>,
    /// Coarse ones, each with the row of its mean.
    coarse: Vec<(usize, u32)>,
    /// Fine and coarse blocks of a sequence.
    each: [usize; 2],
    /// For each token of the short sequences: whether it is real, how many it stands for, its
    /// position, its block as a row and how its weight depends on that block's importance.
    keep: Vec<u8>,
    counts: Vec<usize>,
    positions: Vec<u32>,
    block: Vec<u32>,
    sign: Vec<f64>,
}

impl Short {
    fn new(
        ranking: &[Vec<usize>],
        fine_count: usize,
        order: &Order,
        fixed: &Fixed,
    ) -> Result<Self> {
        let [_, vips, blocks, size] = order.sizes();
        let fine_count = fine_count.min(blocks);
        let coarse_count = blocks - fine_count;
        let length = fine_count * size + coarse_count + vips;
        let mut short = Self {
            length,
            fine: Vec::new(),
            coarse: Vec::new(),
            each: [fine_count, coarse_count],
            keep: Vec::new(),
            counts: Vec::new(),
            positions: Vec::new(),
            block: Vec::new(),
            sign: Vec::new(),
        };
        let [vip_positions, positions] = order.positions();
        let vip_mask = tensor(order.vip_mask().to_vec2::<u8>())?;
        for (sequence, ranking) in ranking.iter().enumerate() {
            let first = sequence * blocks;
            let (fine, coarse) = ranking.split_at(fine_count.min(ranking.len()));
            // In the order of the sequence, which says nothing to attention but reads better.
            let sorted = |blocks: &[usize]| {
                let mut blocks: Vec<usize> = blocks.iter().map(|block| first + block).collect();
                blocks.sort_unstable();
                blocks
            };
            let (fine, coarse) = (sorted(fine), sorted(coarse));
            let at = sequence * length;
            for (index, &row) in fine.iter().enumerate() {
                short.fine.push((row, (at + index * size) as u32));
                let tokens = row * size..(row + 1) * size;
                short
                    .keep
                    .extend(order.real().get(tokens.clone()).unwrap_or(&[]));
                short.positions.extend(positions.get(tokens).unwrap_or(&[]));
                for _ in 0..size {
                    short.stands_for(1, row, 1.0);
                }
            }
            for (index, &row) in coarse.iter().enumerate() {
                let place = at + fine_count * size + index;
                short.coarse.push((row, place as u32));
                let count = fixed.counts.get(row).copied().unwrap_or(0);
                short.keep.push(u8::from(count > 0));
                short.positions.extend(fixed.positions.get(row));
                short.stands_for(count.max(1), row, -1.0);
            }
            short
                .keep
                .extend(vip_mask.get(sequence).into_iter().flatten());
            let slots = sequence * vips..(sequence + 1) * vips;
            short
                .positions
                .extend(vip_positions.get(slots).unwrap_or(&[]));
            for _ in 0..vips {
                short.stands_for(1, first, 0.0);
            }
        }
        Ok(short)
    }

    fn fine_of(&self, sequence: usize) -> &[(usize, u32)] {
        let [count, _] = self.each;
        let own = sequence * count..(sequence + 1) * count;
        self.fine.get(own).unwrap_or(&[])
    }

    fn coarse_of(&self, sequence: usize) -> &[(usize, u32)] {
        let [_, count] = self.each;
        let own = sequence * count..(sequence + 1) * count;
        self.coarse.get(own).unwrap_or(&[])
    }

    fn stands_for(&mut self, count: usize, row: usize, sign: f64) {
        self.counts.push(count);
        self.block.push(row as u32);
        self.sign.push(sign);
    }

    /// `1 ± (π_b − sg π_b)`, `[batch, tokens]`: 1, with the gradient of the importance.
    fn weights(&self, importance: &Tensor, device: &Device) -> Result<Tensor> {
        let (batch, _) = tensor(importance.dims2())?;
        let tokens = self.block.len();
        let shape = (batch, tokens / batch.max(1));
        let rows = tensor(Tensor::from_vec(self.block.clone(), tokens, device))?;
        let of_block = tensor(tensor(importance.flatten_all())?.index_select(&rows, 0))?;
        let moved = tensor(&of_block - of_block.detach())?;
        let sign = tensor(Tensor::from_vec(self.sign.clone(), tokens, device))?;
        let signed = tensor(moved * tensor(sign.to_dtype(importance.dtype()))?)?;
        tensor(tensor(signed + 1.0)?.reshape(shape))
    }

    /// The logarithm of how many tokens each stands for, `[batch, tokens]`.
    fn log_counts(&self, batch: usize, dtype: DType, device: &Device) -> Result<Tensor> {
        let logarithms: Vec<f64> = self
            .counts
            .iter()
            .map(|count| (*count as f64).ln())
            .collect();
        let shape = (batch, logarithms.len() / batch.max(1));
        tensor(tensor(Tensor::from_vec(logarithms, shape, device))?.to_dtype(dtype))
    }
}

#[cfg(test)]
mod tests;
