//! What is added to scores: a number for each pair of a query and a key, or one for each distance
//! between them, which is never laid out for the pairs, and whose gradient is summed tile by tile.

use super::tiles::{Heads, KEYS, Problem, QUERIES};
use crate::host;
use crate::simd::{self, Real};
use crate::{Error, Result, Tensor};
use candle_core::{CpuStorage, Layout};
use std::borrow::Cow;
use std::ops::Range;

type Candle<T> = candle_core::Result<T>;

/// What is added to the scaled scores of attention.
#[derive(Clone, Debug)]
pub enum ScoreBias {
    /// `[batch | 1, heads | 1, query, key]`: one for each pair of a query and a key.
    Pairs(Tensor),
    /// `[heads | 1, query + key − 1]`: one for each distance between them. That of query `i` and key
    /// `j` is entry `query − 1 − i + j`, so that a row of scores reads neighbours: distances rise from
    /// that of the first key from the last query to that of the last key from the first query.
    ByDistance(Tensor),
}

impl ScoreBias {
    /// The numbers, in whichever form.
    pub fn tensor(&self) -> &Tensor {
        match self {
            Self::Pairs(bias) | Self::ByDistance(bias) => bias,
        }
    }

    /// `[batch | 1, heads | 1, query, key]`, for what does not go by distance: as large as the scores.
    ///
    /// # Errors
    /// When there is another number of distances between so many queries and keys.
    pub fn laid_out(&self, queries: usize, keys: usize) -> Result<Tensor> {
        let table = match self {
            Self::Pairs(bias) => return Ok(bias.clone()),
            Self::ByDistance(table) => table,
        };
        let (heads, found) = table.dims2()?;
        if found != distances(queries, keys) {
            let expected = format!("[heads, {}]", distances(queries, keys));
            return Err(Error::argument(
                "bias by distance",
                "table",
                table.dims(),
                expected,
            ));
        }
        let places: Vec<u32> = (0..queries)
            .rev()
            .flat_map(|first| (first..first + keys).map(|place| place as u32))
            .collect();
        let places = Tensor::from_vec(places, queries * keys, table.device())?;
        let rows = table.contiguous()?.index_select(&places, 1)?;
        Ok(rows.reshape((1, heads, queries, keys))?)
    }

    /// Refuses what does not fit these sizes.
    pub(super) fn check(&self, [batch, heads, queries, keys]: [usize; 4]) -> Result<()> {
        let dims = self.tensor().dims();
        let one_or = |size: usize, of: usize| size == of || size == 1;
        let (fits, expected) = match self {
            Self::Pairs(_) => (
                matches!(*dims, [b, h, q, k]
                    if one_or(b, batch) && one_or(h, heads) && [q, k] == [queries, keys]),
                format!("[{batch} or 1, {heads} or 1, {queries}, {keys}]"),
            ),
            Self::ByDistance(_) => {
                let count = distances(queries, keys);
                (
                    matches!(*dims, [h, d] if one_or(h, heads) && d == count),
                    format!("[{heads} or 1, {count}] by distance"),
                )
            }
        };
        match fits {
            true => Ok(()),
            false => Err(Error::argument("attention", "bias", dims, expected)),
        }
    }
}

/// How many distances there are between so many queries and keys that lie in order.
fn distances(queries: usize, keys: usize) -> usize {
    (queries + keys).saturating_sub(1)
}

/// A bias as the tiles read it. The two forms differ in rank, by which they are told apart here.
pub(super) enum BiasRows<'a, T: Clone> {
    Pairs(Heads<'a, T>),
    ByDistance {
        /// `[heads | 1, query + key − 1]`.
        numbers: Cow<'a, [T]>,
        /// From one head to the next.
        step: usize,
        /// Of the queries.
        last: usize,
    },
}

impl<'a, T: Real> BiasRows<'a, T> {
    pub(super) fn new(p: &Problem, storage: &'a CpuStorage, layout: &Layout) -> Candle<Self> {
        if let [heads, count] = *layout.dims() {
            return Ok(Self::ByDistance {
                numbers: host::ordered(storage, layout)?,
                step: if heads == 1 { 0 } else { count },
                last: p.queries.saturating_sub(1),
            });
        }
        let full = layout.broadcast_as((p.batch, p.heads, p.queries, p.keys))?;
        Ok(Self::Pairs(Heads::new(storage, &full, p.heads)?))
    }

    /// What is added to the scores of query `i` and `keys`.
    #[inline(always)]
    fn row(&self, (batch, head): (usize, usize), i: usize, keys: &Range<usize>) -> &[T] {
        match self {
            Self::Pairs(heads) => {
                &heads.rows(batch, head, &(i..i + 1), keys.end).data[keys.clone()]
            }
            Self::ByDistance {
                numbers,
                step,
                last,
            } => &numbers[head * step + last - i + keys.start..][..keys.len()],
        }
    }

    /// Adds it to a tile of scores `[queries, keys]` of this batch and head.
    pub(super) fn add_to(
        &self,
        tile: &mut [T],
        of: (usize, usize),
        (queries, keys): (&Range<usize>, &Range<usize>),
    ) {
        simd::vectorised(
            #[inline(always)]
            || {
                let rows = tile.chunks_exact_mut(keys.len());
                for (row, i) in rows.zip(queries.clone()) {
                    for (score, &bias) in row.iter_mut().zip(self.row(of, i, keys)) {
                        *score += bias;
                    }
                }
            },
        );
    }

    /// Numbers in the gradient of one head of one sequence.
    pub(super) fn gradient_size(&self, p: &Problem) -> usize {
        match self {
            Self::Pairs(_) => p.queries * p.keys,
            Self::ByDistance { .. } => distances(p.queries, p.keys),
        }
    }

    /// Adds a tile `∂S` `[queries, keys]` to the gradient of its head, which began at zero.
    pub(super) fn add_gradient(
        &self,
        p: &Problem,
        gradient: &mut [T],
        slopes: &[T],
        (queries, keys): (&Range<usize>, &Range<usize>),
    ) {
        match self {
            Self::Pairs(_) => {
                for (row, i) in slopes.chunks_exact(keys.len()).zip(queries.clone()) {
                    let start = i * p.keys + keys.start;
                    gradient[start..start + keys.len()].copy_from_slice(row);
                }
            }
            Self::ByDistance { .. } => {
                let start = p.queries - queries.end + keys.start;
                let met = distances(queries.len(), keys.len());
                add_diagonals(slopes, keys.len(), &mut gradient[start..start + met]);
            }
        }
    }
}

/// Adds the sums of the diagonals of a tile, that of the lowest left corner first. They are taken by
/// themselves before they join what other tiles gave: a sum of sums loses less to rounding.
fn add_diagonals<T: Real>(tile: &[T], columns: usize, to: &mut [T]) {
    let mut sums = [T::zero(); QUERIES + KEYS - 1];
    simd::vectorised(
        #[inline(always)]
        || {
            for (first, row) in tile.chunks_exact(columns).rev().enumerate() {
                for (sum, &slope) in sums[first..first + columns].iter_mut().zip(row) {
                    *sum += slope;
                }
            }
            for (to, &sum) in to.iter_mut().zip(&sums) {
                *to += sum;
            }
        },
    );
}

/// The gradient of `bias` from that of each head of each sequence, summed over those that share it.
pub(super) fn gradient<T: Real>(p: &Problem, bias: &Tensor, each: Vec<T>) -> Candle<Tensor> {
    let mut sum = match bias.rank() {
        2 => host::tensor(each, &[p.batch, p.heads, distances(p.queries, p.keys)])?.sum(0)?,
        _ => host::tensor(each, &[p.batch, p.heads, p.queries, p.keys])?,
    };
    for (dim, &size) in bias.dims().iter().enumerate() {
        if size == 1 {
            sum = sum.sum_keepdim(dim)?;
        }
    }
    Ok(sum)
}

#[cfg(test)]
mod tests;
