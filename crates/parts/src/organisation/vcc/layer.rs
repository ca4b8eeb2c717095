//! The compressed form of a batch of sequences, and its way through one block.

use super::VccSpec;
use super::importance::Order;
use super::selection::{Chosen, choose};
use super::store::DifferenceStore;
use crate::block::Block;
use crate::error::tensor;
use crate::organisation::Run;
use crate::{Context, Result};
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_signal::Signal;
use std::sync::Arc;

/// VIP tokens, means of blocks, and how far the tokens of a block are from its mean.
#[derive(Debug)]
pub(super) struct Compressed<'a> {
    order: &'a Order,
    /// `[batch, vips, width]`.
    vips: Signal,
    /// `[batch, blocks, width]`.
    means: Signal,
    differences: DifferenceStore,
    fixed: Arc<Fixed>,
}

/// What layers do not change.
#[derive(Debug)]
struct Fixed {
    /// `1 / count` at each real token of a block and 0 at pads, `[batch · blocks, size, 1]`.
    averaging: Tensor,
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
        let (mut averaging, mut counts) = (Vec::new(), Vec::new());
        let (mut keep, mut means) = (Vec::new(), Vec::new());
        for (real, positions) in order.real().chunks(size).zip(positions.chunks(size)) {
            let count = real.iter().filter(|kept| **kept != 0).count();
            let each = 1.0 / count.max(1) as f64;
            averaging.extend(
                real.iter()
                    .map(|kept| each * f64::from(u8::from(*kept != 0))),
            );
            let of_real = positions.iter().zip(real).filter(|(_, kept)| **kept != 0);
            let sum: u64 = of_real.map(|(position, _)| u64::from(*position)).sum();
            means.push((sum as f64 / count.max(1) as f64).round() as u32);
            keep.push(u8::from(count > 0));
            counts.push(count);
        }
        let numbers = |values: Vec<f64>, shape: &[usize]| {
            tensor(tensor(Tensor::from_vec(values, shape, device))?.to_dtype(dtype))
        };
        Ok(Self {
            averaging: numbers(averaging, &[batch * blocks, size, 1])?,
            counts,
            keep: tensor(Tensor::from_vec(keep, (batch, blocks), device))?,
            positions: means,
            shares: numbers(order.shares().to_vec(), &[batch, vips])?,
        })
    }
}

/// Means `[rows, width]` of `x` `[rows, size, width]` and the differences from them,
/// `[rows, size · width]`.
fn coarsen(x: &Signal, averaging: &Tensor) -> Result<(Signal, Signal)> {
    let (rows, size, width) = tensor(x.value().dims3())?;
    let means = x.weighted_sum(averaging, 1)?;
    let spread = means.unsqueeze(1)?.broadcast(&[rows, size, width])?;
    let differences = spread.add(&x.scale(-1.0)?)?;
    Ok((means, differences.reshape(&[rows, size * width])?))
}

/// Tokens `[rows, size, width]` of blocks with these means `[rows, width]` and differences.
fn refine(means: &Signal, differences: &Signal, size: usize) -> Result<Signal> {
    let (rows, width) = tensor(means.value().dims2())?;
    let spread = means.unsqueeze(1)?.broadcast(&[rows, size, width])?;
    let differences = differences.reshape(&[rows, size, width])?;
    Ok(spread.add(&differences.scale(-1.0)?)?)
}

impl<'a> Compressed<'a> {
    /// Compresses `x` `[batch, length, width]`.
    pub(super) fn new(x: &Signal, order: &'a Order) -> Result<Self> {
        let [batch, _, blocks, size] = order.sizes();
        let width = x.dims().last().copied().unwrap_or(0);
        let (vips, tokens) = order.apply(x)?;
        let fixed = Arc::new(Fixed::new(order, x.dtype(), x.device())?);
        let tokens = tokens.reshape(&[batch * blocks, size, width])?;
        let (means, differences) = coarsen(&tokens, &fixed.averaging)?;
        Ok(Self {
            order,
            vips,
            means: means.reshape(&[batch, blocks, width])?,
            differences: DifferenceStore::new(differences)?,
            fixed,
        })
    }

    pub(super) fn vips(&self) -> &Signal {
        &self.vips
    }

    /// All tokens at their places, `[batch, length, width]`.
    pub(super) fn expanded(&self) -> Result<Signal> {
        let [batch, _, blocks, size] = self.order.sizes();
        let width = self.vips.dims().last().copied().unwrap_or(0);
        let means = self.means.reshape(&[batch * blocks, width])?;
        let all: Vec<usize> = (0..batch * blocks).collect();
        let tokens = refine(&means, &self.differences.read(&all)?, size)?;
        let tokens = tokens.reshape(&[batch, blocks * size, width])?;
        self.order.undo(&self.vips, &tokens)
    }

    /// The form behind one block of the model.
    pub(super) fn through(
        self,
        block: &Arc<Block>,
        run: &Run<'_>,
        spec: &VccSpec,
        cx: &Context<'_>,
    ) -> Result<Self> {
        let [batch, vips, blocks, size] = self.order.sizes();
        let width = self.vips.dims().last().copied().unwrap_or(0);
        let fine_count = spec.fine.min(blocks);
        let coarse_count = blocks - fine_count;
        let fixed = self.fixed.clone();
        let chosen = match coarse_count {
            // There is nothing to choose.
            0 => Chosen::all(&fixed.keep, self.means.dtype())?,
            _ => choose(
                block,
                spec,
                (&self.vips, &fixed.shares),
                (&self.means, &fixed.keep),
                cx,
            )?,
        };
        let importance = cx.trace.site(
            format_args!("{}.importance", block.path()),
            Signal::from(chosen.importance),
        )?;
        let short = Short::new(&chosen.ranking, fine_count, self.order, &fixed)?;

        // U = [fine tokens; coarse means; VIPs].
        let means = self.means.reshape(&[batch * blocks, width])?;
        let device = self.vips.device().clone();
        let rows = |blocks: &[usize]| -> Result<Tensor> {
            let rows: Vec<u32> = blocks.iter().map(|block| *block as u32).collect();
            tensor(Tensor::from_vec(rows, blocks.len(), &device))
        };
        let fine_means = means.select(0, &rows(&short.fine)?)?;
        let fine = refine(&fine_means, &self.differences.read(&short.fine)?, size)?;
        let fine = fine.reshape(&[batch, fine_count * size, width])?;
        let mut parts = vec![fine];
        if coarse_count > 0 {
            let coarse = means.select(0, &rows(&short.coarse)?)?;
            parts.push(coarse.reshape(&[batch, coarse_count, width])?);
        }
        parts.push(self.vips.clone());
        let tokens = Signal::concatenate(&parts, 1)?;

        let weights = short.weights(importance.value(), &device)?;
        let counts = match spec.scale_correction {
            true => short.log_counts(batch, weights.dtype(), &device)?,
            false => tensor(weights.zeros_like())?,
        };
        let bias = tensor(tensor(weights.log())? + counts)?;
        let listed = |values: &[u32]| {
            let shape = (batch, values.len() / batch.max(1));
            tensor(Tensor::from_vec(values.to_vec(), shape, &device))
        };
        let places = listed(&short.positions)?;
        let length = short.keep.len() / batch.max(1);
        let keep = tensor(Tensor::from_vec(
            short.keep.clone(),
            (batch, length),
            &device,
        ))?;
        let inside = Context {
            key_padding: Some(&keep),
            key_bias: Some(&bias),
            places: Some(&places),
            ..*cx
        };
        let written = run(block, tokens.clone(), &inside)?;
        // out = w (h + F(x + h)) + x. As w is 1 that is what the block gives, with one more gradient.
        let change = tensor(written.value() - tokens.value())?.detach();
        let gain = tensor(tensor(weights - 1.0)?.unsqueeze(2))?;
        let written = written.add_constant(&tensor(change.broadcast_mul(&gain))?)?;

        // Fine blocks are averaged anew; coarse means replace the old ones.
        let fine = written.narrow(1, 0, fine_count * size)?;
        let fine = fine.reshape(&[batch * fine_count, size, width])?;
        let averaging = tensor(fixed.averaging.index_select(&rows(&short.fine)?, 0))?;
        let (fine_means, differences) = coarsen(&fine, &averaging)?;
        let mut means = vec![fine_means.reshape(&[batch, fine_count, width])?];
        if coarse_count > 0 {
            means.push(written.narrow(1, fine_count * size, coarse_count)?);
        }
        let means = Signal::concatenate(&means, 1)?.reshape(&[batch * blocks, width])?;
        let means = means.select(0, &rows(&short.back)?)?;
        let mut store = self.differences;
        store.write(&short.fine, differences)?;
        Ok(Self {
            order: self.order,
            vips: written.narrow(1, length - vips, vips)?,
            means: means.reshape(&[batch, blocks, width])?,
            differences: store,
            fixed,
        })
    }
}

/// The short sequences of a batch that a block of the model sees.
#[derive(Debug)]
struct Short {
    /// Fine and coarse blocks of all sequences, as rows of `batch · blocks`.
    fine: Vec<usize>,
    coarse: Vec<usize>,
    /// For each block where it lies among fine and coarse means, as rows of `batch · blocks`.
    back: Vec<usize>,
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
        let mut short = Self {
            fine: Vec::new(),
            coarse: Vec::new(),
            back: vec![0; ranking.len() * blocks],
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
            for (place, row) in fine.iter().chain(&coarse).enumerate() {
                if let Some(back) = short.back.get_mut(*row) {
                    *back = first + place;
                }
            }
            for &row in &fine {
                let tokens = row * size..(row + 1) * size;
                short
                    .keep
                    .extend(order.real().get(tokens.clone()).unwrap_or(&[]));
                short.positions.extend(positions.get(tokens).unwrap_or(&[]));
                for _ in 0..size {
                    short.stands_for(1, row, 1.0);
                }
            }
            for &row in &coarse {
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
            short.fine.extend(fine);
            short.coarse.extend(coarse);
        }
        Ok(short)
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
