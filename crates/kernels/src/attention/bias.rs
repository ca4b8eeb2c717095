//! What is added to scores: a number for each pair of a query and a key; one for each distance between them; or
//! a function of one number for each pair. The last two are never laid out for the pairs, and their gradients
//! are summed tile by tile.

use super::tiles::{Heads, KEYS, Problem, QUERIES};
use crate::functional_bias::{self, FunctionalBias, FunctionalForm, Part};
use crate::host::{self, Shared};
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
    /// A function of one number for each pair, of as many heads or 1: queries and keys are those of its span, in
    /// order.
    Functional(FunctionalBias),
}

/// Which of them it is.
#[derive(Clone, Copy, Debug)]
pub(super) enum Form {
    Pairs,
    ByDistance,
    Functional(FunctionalForm),
}

impl ScoreBias {
    /// The numbers, in whichever form.
    pub(super) fn numbers(&self) -> &Tensor {
        match self {
            Self::Pairs(bias) | Self::ByDistance(bias) => bias,
            Self::Functional(bias) => bias.numbers(),
        }
    }

    pub(super) fn form(&self) -> Form {
        match self {
            Self::Pairs(_) => Form::Pairs,
            Self::ByDistance(_) => Form::ByDistance,
            Self::Functional(bias) => Form::Functional(bias.form()),
        }
    }

    /// `[batch | 1, heads | 1, query, key]`, for what has no use for another form: as large as the scores.
    ///
    /// # Errors
    /// When it is of other numbers of queries and keys.
    pub fn laid_out(&self, queries: usize, keys: usize) -> Result<Tensor> {
        let table = match self {
            Self::Pairs(bias) => return Ok(bias.clone()),
            Self::ByDistance(table) => table,
            Self::Functional(bias) => {
                let span = bias.span();
                if [span.queries, span.keys] != [queries, keys] {
                    let expected = format!("{queries} queries and {keys} keys");
                    return Err(Error::argument("functional bias", "span", span, expected));
                }
                return Ok(bias.laid_out()?.unsqueeze(0)?);
            }
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
        let one_or = |size: usize, of: usize| size == of || size == 1;
        let (found, fits, expected) = match self {
            Self::Pairs(bias) => (
                bias.dims().to_vec(),
                matches!(*bias.dims(), [b, h, q, k]
                    if one_or(b, batch) && one_or(h, heads) && [q, k] == [queries, keys]),
                format!("[{batch} or 1, {heads} or 1, {queries}, {keys}]"),
            ),
            Self::ByDistance(table) => {
                let count = distances(queries, keys);
                (
                    table.dims().to_vec(),
                    matches!(*table.dims(), [h, d] if one_or(h, heads) && d == count),
                    format!("[{heads} or 1, {count}] by distance"),
                )
            }
            Self::Functional(bias) => {
                let span = bias.span();
                let found = [bias.heads(), span.queries, span.keys];
                (
                    found.to_vec(),
                    one_or(found[0], heads) && found[1..] == [queries, keys],
                    format!("[{heads} or 1, {queries}, {keys}] of a function"),
                )
            }
        };
        match fits {
            true => Ok(()),
            false => Err(Error::argument("attention", "bias", found, expected)),
        }
    }
}

/// How many distances there are between so many queries and keys that lie in order.
fn distances(queries: usize, keys: usize) -> usize {
    (queries + keys).saturating_sub(1)
}

/// A bias as the tiles read it.
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
    Functional(Box<functional_bias::Pairs>),
}

/// Room for the row of a function in a tile.
struct Room<T> {
    row: functional_bias::Row,
    numbers: [T; KEYS + functional_bias::LANES],
}

impl<T: Real> Room<T> {
    fn new() -> Self {
        Self {
            row: functional_bias::Row::default(),
            numbers: [T::zero(); KEYS + functional_bias::LANES],
        }
    }
}

impl<'a, T: Real> BiasRows<'a, T> {
    /// The numbers of the problem's bias.
    pub(super) fn new(p: &Problem, storage: &'a CpuStorage, layout: &Layout) -> Candle<Self> {
        Ok(match (p.bias, layout.dims()) {
            (Some(Form::ByDistance), [heads, count]) => Self::ByDistance {
                numbers: host::ordered(storage, layout)?,
                step: if *heads == 1 { 0 } else { *count },
                last: p.queries.saturating_sub(1),
            },
            (Some(Form::Functional(form)), _) => Self::Functional(Box::new(
                form.pairs::<T>(&host::ordered::<T>(storage, layout)?),
            )),
            _ => {
                let full = layout.broadcast_as((p.batch, p.heads, p.queries, p.keys))?;
                Self::Pairs(Heads::new(storage, &full, p.heads)?)
            }
        })
    }

    /// What is added to the scores of query `i` and `keys`.
    #[inline(always)]
    fn row<'r>(
        &'r self,
        (batch, head): (usize, usize),
        i: usize,
        keys: &Range<usize>,
        room: &'r mut Room<T>,
    ) -> &'r [T] {
        match self {
            Self::Pairs(heads) => {
                &heads.rows(batch, head, &(i..i + 1), keys.end).data[keys.clone()]
            }
            Self::ByDistance {
                numbers,
                step,
                last,
            } => &numbers[head * step + last - i + keys.start..][..keys.len()],
            Self::Functional(pairs) => {
                let head = own_heads(pairs, head..head + 1).start;
                pairs.lay(i, keys, &mut room.row);
                pairs.write(head, &room.row, &mut room.numbers);
                &room.numbers[..keys.len()]
            }
        }
    }

    /// Adds it to a tile of scores `[queries, keys]` of this batch and head.
    pub(super) fn add_to(
        &self,
        tile: &mut [T],
        of: (usize, usize),
        (queries, keys): (&Range<usize>, &Range<usize>),
    ) {
        let mut room = Room::new();
        simd::vectorised(
            #[inline(always)]
            || {
                let rows = tile.chunks_exact_mut(keys.len());
                for (row, i) in rows.zip(queries.clone()) {
                    for (score, &bias) in row.iter_mut().zip(self.row(of, i, keys, &mut room)) {
                        *score += bias;
                    }
                }
            },
        );
    }

    /// No gradient yet.
    pub(super) fn no_gradient(&self, p: &Problem) -> BiasGradient<T> {
        let groups = 0..p.batch * p.groups;
        let per_group = p.heads / p.groups;
        BiasGradient {
            numbers: vec![T::zero(); p.batch * p.heads * self.numbers(p)],
            parts: match self {
                Self::Functional(pairs) => groups
                    .map(|group| group % p.groups * per_group)
                    .map(|first| pairs.part(own_heads(pairs, first..first + per_group)))
                    .collect(),
                _ => Vec::new(),
            },
        }
    }

    /// Numbers in the gradient of one head of one sequence.
    fn numbers(&self, p: &Problem) -> usize {
        match self {
            Self::Pairs(_) => p.queries * p.keys,
            Self::ByDistance { .. } => distances(p.queries, p.keys),
            Self::Functional(_) => 0,
        }
    }

    /// The gradient of `bias`, summed over the heads and sequences that share it.
    pub(super) fn gradient(
        &self,
        p: &Problem,
        bias: &Tensor,
        each: BiasGradient<T>,
    ) -> Candle<Tensor> {
        let mut sum = match self {
            Self::Pairs(_) => host::tensor(each.numbers, &[p.batch, p.heads, p.queries, p.keys])?,
            Self::ByDistance { .. } => {
                let dims = [p.batch, p.heads, distances(p.queries, p.keys)];
                host::tensor(each.numbers, &dims)?.sum(0)?
            }
            Self::Functional(pairs) => {
                let joined = pairs.joined(each.parts.iter()).into_iter();
                return host::tensor(joined.map(T::of).collect(), bias.dims());
            }
        };
        for (dim, &size) in bias.dims().iter().enumerate() {
            if size == 1 {
                sum = sum.sum_keepdim(dim)?;
            }
        }
        Ok(sum)
    }
}

/// The heads of a function that some heads have: the one that there is, or their own.
#[inline(always)]
fn own_heads(pairs: &functional_bias::Pairs, heads: Range<usize>) -> Range<usize> {
    match pairs.heads() {
        1 => 0..1,
        _ => heads,
    }
}

/// The gradient of a bias before it is summed over what shares it.
pub(super) struct BiasGradient<T> {
    /// Those of each head of each sequence.
    numbers: Vec<T>,
    /// Those of a function, for each group of each sequence.
    parts: Vec<Part>,
}

/// A [`BiasGradient`] to which several threads add, each what belongs to a group of its own.
pub(super) struct SharedGradient<'g, T: Clone> {
    bias: &'g BiasRows<'g, T>,
    numbers: Shared<'g, T>,
    parts: Shared<'g, Part>,
}

impl<'g, T: Real> SharedGradient<'g, T> {
    pub(super) fn new(bias: &'g BiasRows<'g, T>, gradient: &'g mut BiasGradient<T>) -> Self {
        Self {
            bias,
            numbers: Shared::new(&mut gradient.numbers),
            parts: Shared::new(&mut gradient.parts),
        }
    }

    /// Adds a tile `∂S` `[queries, keys]` of this batch and head.
    ///
    /// # Safety
    /// No two threads may add to the same group of the same batch.
    pub(super) unsafe fn add(
        &self,
        p: &Problem,
        (batch, head): (usize, usize),
        slopes: &[T],
        (queries, keys): (&Range<usize>, &Range<usize>),
    ) {
        let size = self.bias.numbers(p);
        // SAFETY: by contract the thread has the group for itself, and with it its heads.
        let numbers = || unsafe { self.numbers.part((batch * p.heads + head) * size, size) };
        match self.bias {
            BiasRows::Pairs(_) => {
                let numbers = numbers();
                for (row, i) in slopes.chunks_exact(keys.len()).zip(queries.clone()) {
                    let start = i * p.keys + keys.start;
                    numbers[start..start + keys.len()].copy_from_slice(row);
                }
            }
            BiasRows::ByDistance { .. } => {
                let start = p.queries - queries.end + keys.start;
                let met = distances(queries.len(), keys.len());
                add_diagonals(slopes, keys.len(), &mut numbers()[start..start + met]);
            }
            BiasRows::Functional(pairs) => {
                let group = batch * p.groups + head / (p.heads / p.groups);
                let head = own_heads(pairs, head..head + 1).start;
                // SAFETY: as above.
                let parts = unsafe { self.parts.part(group, 1) };
                let mut row = functional_bias::Row::default();
                simd::vectorised(
                    #[inline(always)]
                    || {
                        let rows = slopes.chunks_exact(keys.len()).zip(queries.clone());
                        for (slopes, i) in rows {
                            pairs.lay(i, keys, &mut row);
                            let of_head = std::iter::once((head, slopes));
                            pairs.pull_row(&mut row, of_head, &mut parts[0]);
                        }
                    },
                );
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

#[cfg(test)]
mod tests;
