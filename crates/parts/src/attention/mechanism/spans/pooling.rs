//! What a span's query and key are made of.

use crate::Result;
use crate::attention::mechanism::sequences::At;
use crate::error::tensor;
use lapidary_kernels::{RowPooling, Tensor, cumulative_sum, pooled_rows};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::sync::Arc;

/// How what is made of the tokens of a span becomes one, feature by feature.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Pooling {
    /// The largest.
    #[default]
    Max,
    /// The mean.
    Mean,
    /// The sum.
    Sum,
}

/// What is pooled: rows `[.., head_width]` of queries and of keys.
#[derive(Debug)]
pub(in super::super) struct Pooled {
    pub(in super::super) queries: Tensor,
    pub(in super::super) keys: Tensor,
    pub(in super::super) by: Pooling,
    /// What makes the keys of rows that their tokens sum up; the weighted keys are these when absent.
    pub(in super::super) row_keys: Option<Rows>,
    /// Operations that it took to make them.
    pub(in super::super) before: u64,
}

/// Rows whose keys are made.
#[derive(Debug)]
pub(in super::super) struct Rows {
    /// By what.
    pub(in super::super) by: Arc<dyn RowKeys>,
    /// `[batch, heads]`.
    pub(in super::super) sequences: [usize; 2],
    /// The values of tokens, `[.., value_width]`, where keys of rows are made of these rather than of keys.
    pub(in super::super) values: Option<Tensor>,
}

/// What makes the key of a row that a token sums up.
pub(in super::super) trait RowKeys: fmt::Debug + Send + Sync {
    /// Of the weighted keys or values of rows, `[summaries, width]`, and of the keys of the tokens that sum them up,
    /// `[summaries, head_width]`, each of such a head.
    ///
    /// # Errors
    /// Those of the tensor engine.
    fn keys(&self, weighted: &Tensor, own: &Tensor, head_of: &[usize]) -> Result<Tensor>;

    /// Operations that one takes, for keys of one width that are made of what has another.
    fn operations(&self, widths: [usize; 2]) -> u64;
}

impl Pooled {
    /// The largest features of queries and keys themselves.
    pub(in super::super) fn largest([queries, keys]: [&Tensor; 2]) -> Self {
        Self {
            queries: queries.clone(),
            keys: keys.clone(),
            by: Pooling::Max,
            row_keys: None,
            before: 0,
        }
    }
}

impl Pooling {
    /// What stands behind the end of a list, so that it counts for nothing: added to the largest,
    /// otherwise multiplied.
    pub(super) fn behind(self, x: &Tensor, there: &[bool]) -> Result<Tensor> {
        let (lists, longest, _) = tensor(x.dims3())?;
        let [kept, left] = match self {
            Self::Max => [0.0, f32::NEG_INFINITY],
            Self::Mean | Self::Sum => [1.0, 0.0],
        };
        let numbers = there.iter().map(|there| if *there { kept } else { left });
        let numbers: Vec<f32> = numbers.collect();
        let numbers = tensor(Tensor::from_vec(numbers, (lists, longest, 1), x.device()))?;
        let numbers = tensor(numbers.to_dtype(x.dtype()))?;
        tensor(match self {
            Self::Max => x.broadcast_add(&numbers),
            Self::Mean | Self::Sum => x.broadcast_mul(&numbers),
        })
    }

    /// Of the rows of `x` `[.., width]` in each list: `[lists, width]`.
    pub(super) fn whole(self, x: &Tensor, lists: &[&[At]]) -> Result<Tensor> {
        let pooling = match self {
            Self::Max => RowPooling::Maximum,
            Self::Mean => RowPooling::Mean,
            Self::Sum => RowPooling::Sum,
        };
        let rows = lists.iter().copied().flatten().map(|at| at.row as u32);
        let ends = lists.iter().scan(0, |end, list| {
            *end += list.len();
            Some(*end)
        });
        Ok(pooled_rows(x, rows.collect(), ends.collect(), pooling)?)
    }

    /// Of each beginning of each list of `x` `[lists, longest, width]`, sums not yet divided, and as long.
    pub(super) fn beginnings(self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Max => running_maximum(x),
            Self::Mean | Self::Sum => Ok(cumulative_sum(x, 1)?),
        }
    }

    /// What is pooled `[summaries, width]`, of so many tokens each.
    pub(super) fn divided(self, x: Tensor, counts: Vec<usize>) -> Result<Tensor> {
        if self != Self::Mean {
            return Ok(x);
        }
        let shares: Vec<f64> = counts.iter().map(|count| 1.0 / *count as f64).collect();
        let shares = tensor(Tensor::from_vec(shares, (counts.len(), 1), x.device()))?;
        tensor(x.broadcast_mul(&tensor(shares.to_dtype(x.dtype()))?))
    }
}

/// The maximum of all entries so far along the middle dimension, by doubling.
fn running_maximum(x: &Tensor) -> Result<Tensor> {
    let length = tensor(x.dim(1))?;
    let (mut x, mut step) = (x.clone(), 1);
    while step < length {
        let first = tensor(x.narrow(1, 0, step))?;
        let rest = tensor(x.narrow(1, step, length - step))?;
        let before = tensor(x.narrow(1, 0, length - step))?;
        x = tensor(Tensor::cat(&[first, tensor(rest.maximum(&before))?], 1))?;
        step *= 2;
    }
    Ok(x)
}
