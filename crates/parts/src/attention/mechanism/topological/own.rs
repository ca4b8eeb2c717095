//! Sequences of a batch with trees of their own.
//!
//! Random trees over a row or a grid hang on how many tokens there are. Pads are none, so that a sequence has the trees
//! that it has alone.

use super::super::sums::Sums;
use super::OnTrees;
use crate::Result;
use crate::error::tensor;
use lapidary_kernels::{Device, Tensor};

/// The places of tokens that are no pads, sequence by sequence.
pub(super) fn real_places(keep: &Tensor) -> Result<Vec<Vec<u32>>> {
    let rows = tensor(keep.to_vec2::<u8>())?;
    let places = rows.iter().map(|row| {
        let real = row.iter().zip(0u32..).filter(|(kept, _)| **kept != 0);
        real.map(|(_, place)| place).collect()
    });
    Ok(places.collect())
}

/// Real tokens of one sequence on its trees.
#[derive(Debug)]
pub(super) struct Own {
    /// Of the real tokens, `[1, heads, real, width]`.
    pub trees: OnTrees,
    /// Where they stand, `[real]`.
    pub places: Tensor,
    /// Which of them each token is, `[length]`; one more than there are, at pads.
    pub rows: Tensor,
}

impl Own {
    /// Which of the tokens at `places` each of `length` tokens is.
    pub(super) fn rows(places: &[u32], length: usize, device: &Device) -> Result<Tensor> {
        let mut rows = vec![places.len() as u32; length];
        for (row, place) in places.iter().zip(0u32..).map(|(place, row)| (row, *place)) {
            if let Some(at) = rows.get_mut(place as usize) {
                *at = row;
            }
        }
        tensor(Tensor::from_vec(rows, length, device))
    }
}

/// Sequence by sequence; nothing where all tokens are pads.
#[derive(Debug)]
pub(super) struct OnOwnTrees {
    /// `[batch, heads, query, key]`.
    pub sizes: [usize; 4],
    pub each: Vec<Option<Own>>,
}

impl Sums for OnOwnTrees {
    fn sizes(&self) -> [usize; 4] {
        self.sizes
    }

    fn sums(&self, values: &Tensor) -> lapidary_kernels::Result<Tensor> {
        let (_, heads, length, width) = values.dims4()?;
        let zeros = |rows: usize| {
            let shape = (1, heads, rows, width);
            Tensor::zeros(shape, values.dtype(), values.device())
        };
        let mut found = Vec::with_capacity(self.each.len());
        for (sequence, own) in self.each.iter().enumerate() {
            let Some(own) = own else {
                found.push(zeros(length)?);
                continue;
            };
            let values = values.narrow(0, sequence, 1)?.contiguous()?;
            let sums = own.trees.sums(&values.index_select(&own.places, 2)?)?;
            let behind = Tensor::cat(&[&sums, &zeros(1)?], 2)?;
            found.push(behind.contiguous()?.index_select(&own.rows, 2)?);
        }
        Ok(Tensor::cat(&found, 0)?)
    }

    fn operations(&self, width: usize) -> u64 {
        let each = self.each.iter().flatten();
        each.map(|own| own.trees.operations(width)).sum()
    }
}
