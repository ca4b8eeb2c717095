//! What is remembered of tokens that were averaged: how far each was from the mean of its block.

use crate::error::tensor;
use crate::{Error, Result};
use lapidary_kernels::Tensor;
use lapidary_signal::Signal;

/// Differences `δ_bt = c_b − x_bt` of every block, and where each block's are: in the piece that was
/// written when the block was last refined. A layer writes a piece for its fine blocks alone, nothing
/// else is copied; pieces that no block has differences in are let go.
#[derive(Clone, Debug)]
pub struct DifferenceStore {
    /// `[blocks of the piece, size · width]`.
    pieces: Vec<Option<Signal>>,
    /// Piece and row of every block.
    places: Vec<(usize, u32)>,
}

impl DifferenceStore {
    /// All blocks' differences, `[blocks, size · width]`.
    ///
    /// # Errors
    /// Those of the tensor engine.
    pub fn new(differences: Signal) -> Result<Self> {
        let (blocks, _) = tensor(differences.value().dims2())?;
        Ok(Self {
            pieces: vec![Some(differences)],
            places: (0..blocks as u32).map(|row| (0, row)).collect(),
        })
    }

    /// The differences of some blocks, `[blocks, size · width]`, in their order.
    ///
    /// # Errors
    /// When there is no such block.
    pub fn read(&self, blocks: &[usize]) -> Result<Signal> {
        let mut parts = Vec::new();
        let mut order = vec![0u32; blocks.len()];
        let mut behind = 0;
        for (index, piece) in self.pieces.iter().enumerate() {
            let Some(piece) = piece else {
                continue;
            };
            let mut rows = Vec::new();
            for (slot, block) in order.iter_mut().zip(blocks) {
                let (at, row) = self.place(*block)?;
                if at == index {
                    *slot = behind + rows.len() as u32;
                    rows.push(row);
                }
            }
            if rows.is_empty() {
                continue;
            }
            behind += rows.len() as u32;
            parts.push(piece.select(0, &listed(rows, piece)?)?);
        }
        match parts.as_slice() {
            [] => Err(Error::spec("blocks to read", 0, "at least 1")),
            [only] => Ok(only.clone()),
            _ => {
                let joined = Signal::concatenate(&parts, 0)?;
                let order = listed(order, &joined)?;
                Ok(joined.select(0, &order)?)
            }
        }
    }

    /// Writes the differences of some blocks, `[blocks, size · width]`, anew.
    ///
    /// # Errors
    /// When there is no such block.
    pub fn write(&mut self, blocks: &[usize], differences: Signal) -> Result<()> {
        let piece = self.pieces.len();
        for (block, row) in blocks.iter().zip(0..) {
            self.place(*block)?;
            if let Some(place) = self.places.get_mut(*block) {
                *place = (piece, row);
            }
        }
        self.pieces.push(Some(differences));
        let mut used = vec![false; self.pieces.len()];
        for (piece, _) in &self.places {
            if let Some(used) = used.get_mut(*piece) {
                *used = true;
            }
        }
        for (piece, used) in self.pieces.iter_mut().zip(used) {
            if !used {
                *piece = None;
            }
        }
        Ok(())
    }

    /// Rows that are held, those of no block any more among them.
    pub fn rows(&self) -> usize {
        let held = self.pieces.iter().flatten();
        held.map(|piece| piece.dims().first().copied().unwrap_or(0))
            .sum()
    }

    fn place(&self, block: usize) -> Result<(usize, u32)> {
        let expected = || format!("below {}", self.places.len());
        let place = self.places.get(block).copied();
        place.ok_or_else(|| Error::spec("block", block, expected()))
    }
}

fn listed(rows: Vec<u32>, like: &Signal) -> Result<Tensor> {
    let count = rows.len();
    tensor(Tensor::from_vec(rows, count, like.device()))
}
