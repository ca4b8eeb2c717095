//! Keys of rows that a layer makes of the weighted keys or values of their tokens.

use super::RowSource;
use super::layer::Affine;
use crate::Result;
use crate::attention::mechanism::Heads;
use crate::attention::mechanism::spans::RowKeys;
use crate::error::tensor;
use crate::parameters::Parameters;
use lapidary_kernels::{Tensor, embedding, layer_norm};

const EPSILON: f64 = 1e-5;

/// `W₂ N(k_c + W₁ k̄ + b₁) + b₂` of each head, or of `v̄` in the place of `k̄`, `N` a layer norm without parameters of its
/// own.
#[derive(Debug)]
pub(super) struct RowProjection {
    inner: Affine,
    outer: Affine,
    heads: usize,
}

impl RowProjection {
    pub(super) fn new(
        of: RowSource,
        heads: &Heads,
        mut parameters: Parameters<'_>,
    ) -> Result<Self> {
        let width = match of {
            RowSource::Keys => heads.head_width,
            RowSource::Values => heads.value_width,
        };
        Ok(Self {
            inner: Affine::reading(width, heads, 1.0, parameters.at("inner"))?,
            outer: Affine::new(heads, 1.0, parameters.at("outer"))?,
            heads: heads.heads,
        })
    }
}

impl RowKeys for RowProjection {
    fn keys(&self, weighted: &Tensor, own: &Tensor, head_of: &[usize]) -> Result<Tensor> {
        // Those of a head side by side, for one product each.
        let mut order: Vec<usize> = (0..head_of.len()).collect();
        order.sort_by_key(|&row| head_of[row]);
        let [weighted, own] = [weighted, own].map(|x| rows(x, &order));
        let (weighted, own) = (weighted?, own?);
        let (mut made, mut start) = (Vec::new(), 0);
        for head in 0..self.heads {
            let count = head_of.iter().filter(|of| **of == head).count();
            if count == 0 {
                continue;
            }
            let part = |x: &Tensor| tensor(x.narrow(0, start, count));
            let moved = self.inner.of_head(&part(&weighted)?, head)?;
            let sum = tensor(part(&own)? + moved)?;
            let normed = layer_norm(&sum, None, None, EPSILON)?;
            made.push(self.outer.of_head(&normed, head)?);
            start += count;
        }
        let mut back = vec![0; order.len()];
        for (place, &row) in order.iter().enumerate() {
            back[row] = place;
        }
        rows(&tensor(Tensor::cat(&made, 0))?, &back)
    }

    /// Two products, two sums and a norm.
    fn operations(&self, [width, read]: [usize; 2]) -> u64 {
        (2 * width * (width + read) + 11 * width) as u64
    }
}

/// Some rows of `x` `[rows, width]`.
fn rows(x: &Tensor, which: &[usize]) -> Result<Tensor> {
    let which: Vec<u32> = which.iter().map(|row| *row as u32).collect();
    let count = which.len();
    let which = tensor(Tensor::from_vec(which, count, x.device()))?;
    Ok(embedding(x, &which)?)
}
