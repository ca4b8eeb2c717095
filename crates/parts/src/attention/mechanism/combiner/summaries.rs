//! Spans of tokens in summary.

use super::super::blocks::{Blocks, Part};
use super::super::sequences::At;
use super::{ALL, CAUSAL};
use crate::Result;
use crate::error::tensor;
use lapidary_kernels::{Tensor, embedding};

/// Summaries of spans.
#[derive(Debug)]
pub(super) struct Summaries {
    /// `[spans, head_width]`.
    pub(super) keys: Tensor,
    /// Which make the values of some of the spans each, one after the other.
    pub(super) parts: Vec<Part>,
    /// Tokens of each span.
    pub(super) counts: Vec<usize>,
    /// Operations that keys took, comparisons aside.
    pub(super) before: u64,
}

impl Summaries {
    /// Values of spans, `[spans, width]`, from those of tokens.
    pub(super) fn values(&self, values: &Tensor) -> lapidary_kernels::Result<Tensor> {
        let each = self.parts.iter().map(|part| part.attend(values)?.output());
        let each = each.collect::<lapidary_kernels::Result<Vec<_>>>()?;
        Ok(Tensor::cat(&each, 0)?)
    }
}

/// Lists of tokens, each of which makes a span, or a span for each of its beginnings.
pub(super) struct Lists<'a> {
    lists: &'a [Vec<At>],
    longest: usize,
    tokens: [&'a Tensor; 2],
    scale: f64,
}

impl<'a> Lists<'a> {
    /// Of rows of queries and keys `tokens`; nothing of no lists.
    pub(super) fn new(lists: &'a [Vec<At>], tokens: [&'a Tensor; 2], scale: f64) -> Option<Self> {
        let longest = lists
            .iter()
            .map(Vec::len)
            .max()
            .filter(|longest| *longest > 0)?;
        Some(Self {
            lists,
            longest,
            tokens,
            scale,
        })
    }

    /// `[lists, longest, width]`, `−∞` behind the end of a list.
    fn laid_out(&self, x: &Tensor) -> Result<Tensor> {
        let (mut rows, mut behind) = (Vec::new(), Vec::new());
        for list in self.lists {
            rows.extend(list.iter().map(|at| at.row as u32));
            behind.resize(rows.len(), 0f32);
            rows.resize(rows.len() + self.longest - list.len(), 0);
            behind.resize(rows.len(), f32::NEG_INFINITY);
        }
        let shape = (self.lists.len(), self.longest, tensor(x.dim(1))?);
        let rows = tensor(Tensor::from_vec(rows, (shape.0 * shape.1,), x.device()))?;
        let laid = tensor(embedding(x, &rows)?.reshape(shape))?;
        let behind = tensor(Tensor::from_vec(behind, (shape.0, shape.1, 1), x.device()))?;
        tensor(laid.broadcast_add(&tensor(behind.to_dtype(x.dtype()))?))
    }

    /// A span for each list.
    pub(super) fn whole(&self) -> Result<Summaries> {
        let [q, k] = self.tokens;
        let pooled = |x: &Tensor| tensor(self.laid_out(x)?.max(1));
        let mut blocks = Blocks::default();
        for (span, list) in self.lists.iter().enumerate() {
            let at = At {
                row: span,
                position: 0,
            };
            blocks.push([at], list.iter().copied());
        }
        let part = Part::new(blocks, ALL, (&pooled(q)?, k), self.scale, None)?;
        Ok(Summaries {
            keys: pooled(k)?,
            parts: part.into_iter().collect(),
            counts: self.lists.iter().map(Vec::len).collect(),
            before: 0,
        })
    }

    /// A span for every beginning of each list, `[lists · longest]` of them, those left out that
    /// nobody has `used`.
    pub(super) fn beginnings(&self, used: &[bool]) -> Result<Summaries> {
        let [q, k] = self.tokens;
        let pooled = |x: &Tensor| -> Result<Tensor> {
            let all = running_maximum(&self.laid_out(x)?)?;
            tensor(all.flatten(0, 1))
        };
        let mut blocks = Blocks::default();
        for (start, list) in self.lists.iter().enumerate() {
            let start = start * self.longest;
            let ends = (0..list.len()).filter(|end| used.get(start + end) == Some(&true));
            let spans = ends.map(|end| At {
                row: start + end,
                position: end,
            });
            let tokens = list.iter().enumerate();
            blocks.push(spans, tokens.map(|(position, at)| At { position, ..*at }));
        }
        let part = Part::new(blocks, CAUSAL, (&pooled(q)?, k), self.scale, None)?;
        Ok(Summaries {
            keys: pooled(k)?,
            parts: part.into_iter().collect(),
            counts: (0..self.lists.len() * self.longest)
                .map(|span| span % self.longest + 1)
                .collect(),
            before: 0,
        })
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
