//! What a layer makes of queries and keys, before it is pooled.

use super::Pooling;
use crate::Result;
use crate::attention::mechanism::Heads;
use crate::attention::mechanism::spans::Pooled;
use crate::error::tensor;
use crate::parameters::{Init, Parameters};
use lapidary_kernels::{D, Tensor, linear, matmul};

/// `relu(W x + b)` of each head, for queries and for keys.
#[derive(Debug)]
pub(super) struct Layer {
    pooling: Pooling,
    queries: Affine,
    keys: Affine,
}

/// `W` `[heads, head_width, read]` and `b` `[heads, 1, head_width]`.
#[derive(Debug)]
pub(super) struct Affine {
    weight: Tensor,
    bias: Tensor,
}

impl Affine {
    /// Of what is as wide as its result.
    pub(super) fn new(heads: &Heads, gain: f64, parameters: Parameters<'_>) -> Result<Self> {
        Self::reading(heads.head_width, heads, gain, parameters)
    }

    /// Of `read` features. Weights begin with the variance `gain / read`.
    pub(super) fn reading(
        read: usize,
        heads: &Heads,
        gain: f64,
        mut parameters: Parameters<'_>,
    ) -> Result<Self> {
        let (count, width) = (heads.heads, heads.head_width);
        let deviation = (gain / read as f64).sqrt();
        Ok(Self {
            weight: parameters.tensor(
                "weight",
                &[count, width, read],
                Init::Normal { deviation },
            )?,
            bias: parameters.tensor("bias", &[count, 1, width], Init::Zeros)?,
        })
    }

    /// Of rows `[rows, read]` of one head, nothing cut off.
    pub(super) fn of_head(&self, x: &Tensor, head: usize) -> Result<Tensor> {
        let weight = tensor(self.weight.get(head))?;
        let bias = tensor(tensor(self.bias.get(head))?.squeeze(0))?;
        Ok(linear(x, &weight, Some(&bias))?)
    }

    /// Of `batch · heads · tokens` rows `[.., head_width]`: `[rows, head_width]`.
    fn forward(&self, x: &Tensor, [batch, heads]: [usize; 2]) -> Result<Tensor> {
        let width = tensor(x.dim(D::Minus1))?;
        let rows = x.elem_count() / width.max(1);
        let tokens = rows / (batch * heads).max(1);
        let each = tensor(x.reshape((batch, heads, tokens, width)))?;
        let y = matmul(&each, &tensor(self.weight.transpose(1, 2))?)?;
        let y = tensor(tensor(y.broadcast_add(&self.bias))?.relu())?;
        tensor(y.reshape((rows, width)))
    }
}

impl Layer {
    pub(super) fn new(
        pooling: Pooling,
        heads: &Heads,
        mut parameters: Parameters<'_>,
    ) -> Result<Self> {
        Ok(Self {
            pooling,
            // Half of what comes out is cut off.
            queries: Affine::new(heads, 2.0, parameters.at("query"))?,
            keys: Affine::new(heads, 2.0, parameters.at("key"))?,
        })
    }

    /// What it makes of queries and keys of `[batch, heads]`.
    pub(super) fn pooled(&self, [q, k]: [&Tensor; 2], sequences: [usize; 2]) -> Result<Pooled> {
        let width = tensor(q.dim(D::Minus1))?;
        let entries = q.elem_count() + k.elem_count();
        Ok(Pooled {
            queries: self.queries.forward(q, sequences)?,
            keys: self.keys.forward(k, sequences)?,
            by: self.pooling,
            row_keys: None,
            before: (entries * (2 * width + 2)) as u64,
        })
    }
}
