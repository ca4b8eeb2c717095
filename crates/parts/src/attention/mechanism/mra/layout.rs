//! Tokens of sequences side by side, so that blocks of them are neighbours.

use super::super::blocks::rows;
use super::super::sequences::Sequences;
use super::{MraSpec, Tiles};
use crate::Result;
use crate::error::tensor;
use lapidary_kernels::{Device, Tensor, embedding};

/// Where tokens lie, for each head of each sequence: real tokens first, in order or tile by tile, and pads behind them.
#[derive(Debug)]
pub(super) struct Layout {
    /// `[batch, heads, queries, keys]`.
    pub(super) sizes: [usize; 4],
    /// Real tokens of each head of each sequence.
    pub(super) lengths: Vec<usize>,
    /// The row of the token in each place, and the place of that in each row, `[batch · heads · keys]`; nothing where
    /// places are rows.
    orders: Option<[Tensor; 2]>,
}

impl Tiles {
    /// The tokens of an image in the order of their places.
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
    /// That of tokens which all are queries.
    pub(super) fn new(spec: &MraSpec, sequences: &Sequences<'_>) -> Result<Self> {
        let [batch, heads, _, keys] = sequences.sizes;
        let count = batch * heads * keys;
        let mut lengths = Vec::with_capacity(batch * heads);
        let mut order: Vec<u32> = Vec::with_capacity(count);
        for sequence in sequences.iter() {
            let tokens = match spec.image {
                None => (0..sequence.len()).collect(),
                Some(tiles) => tiles.order(sequence.len()),
            };
            order.extend(tokens.iter().map(|token| sequence.key(*token).row as u32));
            let pads = (0..keys).filter(|place| sequence.token(*place).is_none());
            order.extend(pads.map(|place| sequence.row(place) as u32));
            lengths.push(sequence.len());
        }
        let mut back = vec![0; count];
        for (row, place) in order.iter().zip(0..) {
            if let Some(at) = back.get_mut(*row as usize) {
                *at = place;
            }
        }
        let in_order = order.iter().zip(0..).all(|(row, place)| *row == place);
        let index = |rows: Vec<u32>| tensor(Tensor::from_vec(rows, count, &Device::Cpu));
        let orders = match in_order {
            true => None,
            false => Some([index(order)?, index(back)?]),
        };
        Ok(Self {
            sizes: sequences.sizes,
            lengths,
            orders,
        })
    }

    /// `x` `[batch, heads, token, width]` with tokens in their places.
    pub(super) fn lay(&self, x: &Tensor) -> lapidary_kernels::Result<Tensor> {
        moved(x, self.orders.as_ref().map(|[order, _]| order))
    }

    /// The way back.
    pub(super) fn unlay(&self, x: &Tensor) -> lapidary_kernels::Result<Tensor> {
        moved(x, self.orders.as_ref().map(|[_, back]| back))
    }
}

/// Rows of `x` in another order.
fn moved(x: &Tensor, order: Option<&Tensor>) -> lapidary_kernels::Result<Tensor> {
    match order {
        None => Ok(x.clone()),
        Some(order) => Ok(embedding(&rows(x)?, order)?.reshape(x.shape())?),
    }
}
