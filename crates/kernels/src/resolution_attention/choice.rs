//! Which blocks of one head are refined.

use super::ResolutionOptions;
use super::averaged::{Averaged, row};
use crate::product::{Into, Matrix, Threads, multiply};
use crate::simd::{self, Real};

/// Blocks of keys of one size, for each row of blocks in order.
#[derive(Debug, Default)]
pub(super) struct Lists {
    ends: Vec<usize>,
    blocks: Vec<u32>,
}

impl Lists {
    /// Of pairs of a row and a block, in order, for so many rows.
    fn new(pairs: &[[u32; 2]], rows: usize) -> Self {
        let end = |row: usize| pairs.partition_point(|pair| pair[0] as usize <= row);
        Self {
            ends: (0..rows).map(end).collect(),
            blocks: pairs.iter().map(|pair| pair[1]).collect(),
        }
    }

    /// Those of a row.
    #[inline(always)]
    pub(super) fn of(&self, row: usize) -> &[u32] {
        let start = row.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.blocks[start..self.ends[row]]
    }

    pub(super) fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }
}

/// What is refined in one head, at every size but the last.
#[derive(Debug)]
pub(super) struct Chosen {
    /// Rows that are there.
    pub(super) length: usize,
    pub(super) refined: Vec<Lists>,
    /// Blocks whose scores were looked at.
    pub(super) considered: usize,
}

impl Chosen {
    /// Looks at all blocks of the largest size, refines the best, looks at what they became, and so on.
    pub(super) fn new<T: Real>(
        options: &ResolutionOptions,
        length: usize,
        [q, k]: [Matrix<'_, T>; 2],
    ) -> Self {
        let sizes = &options.sizes;
        let queries = Averaged::new(q, length, sizes, options.causal);
        let keys = Averaged::new(k, length, sizes, false);
        let last = options.per_row.len();
        let mut chosen = Self {
            length,
            refined: Vec::with_capacity(last),
            considered: 0,
        };
        let largest = sizes[0];
        let blocks = length.div_ceil(largest) as u32;
        let seen = |row: u32| match options.causal {
            true => row + 1,
            false => blocks,
        };
        let mut current: Vec<[u32; 2]> = (0..blocks)
            .flat_map(|row| (0..seen(row)).map(move |block| [row, block]))
            .collect();
        // The largest score of each row of the largest blocks.
        let mut most = vec![f64::NEG_INFINITY; blocks as usize];
        for level in 0..last {
            let (size, finer) = (sizes[level], sizes[level + 1]);
            chosen.considered += current.len();
            let sides = [table(&queries.at(level)), table(&keys.at(level))];
            let width = queries.at(level).columns;
            let mut values = match level {
                0 => all_scores(&sides, &current, width),
                _ => scores(&sides, &current, width),
            };
            for (value, [x, _]) in values.iter_mut().zip(&current) {
                *value *= options.scale;
                if level == 0 {
                    most[*x as usize] = most[*x as usize].max(*value);
                }
            }
            for (value, [x, y]) in values.iter_mut().zip(&current) {
                *value -= most[*x as usize * size / largest];
                if level == 0 {
                    *value += options.prior(*x as usize, *y as usize);
                }
            }
            let rows = length.div_ceil(size);
            let mut best = match options.causal {
                true => largest_of_rows(&current, &values, options.per_row[level]),
                false => {
                    let best = largest_of(&values, options.per_row[level].saturating_mul(rows));
                    best.into_iter().map(|at| current[at]).collect()
                }
            };
            best.sort_unstable();
            current.clear();
            let (each, all) = ((size / finer) as u32, length.div_ceil(finer) as u32);
            // What the last of them become is single, and nothing is chosen of it.
            for &[x, y] in best.iter().filter(|_| level + 1 < last) {
                for x in x * each..all.min((x + 1) * each) {
                    let end = if options.causal { all.min(x + 1) } else { all };
                    current.extend((y * each..end.min((y + 1) * each)).map(|y| [x, y]));
                }
            }
            chosen.refined.push(Lists::new(&best, rows));
        }
        chosen
    }
}

/// Rows one after the other in double precision.
fn table<T: Real>(x: &Matrix<'_, T>) -> Vec<f64> {
    let rows = (0..x.rows).flat_map(|at| row(x, at));
    rows.map(|number| number.to_f64()).collect()
}

/// Products of rows, all of them together.
fn all_scores([q, k]: &[Vec<f64>; 2], pairs: &[[u32; 2]], width: usize) -> Vec<f64> {
    let rows = q.len() / width.max(1);
    let mut all = vec![0.0; rows * rows];
    let [q, k] = [q, k].map(|x| Matrix::packed(x, rows, width));
    let one = Threads::One;
    multiply(&mut all, rows, Into::Replace, 1.0, q, k.transposed(), one);
    match pairs.len() == all.len() {
        true => all,
        false => {
            let at = |[x, y]: &[u32; 2]| all.get(*x as usize * rows + *y as usize).copied();
            pairs.iter().map(|pair| at(pair).unwrap_or(0.0)).collect()
        }
    }
}

/// Products of some pairs of rows.
fn scores([q, k]: &[Vec<f64>; 2], pairs: &[[u32; 2]], width: usize) -> Vec<f64> {
    let mut scores = vec![0.0; pairs.len()];
    simd::vectorised(
        #[inline(always)]
        || {
            for (score, [x, y]) in scores.iter_mut().zip(pairs) {
                let [x, y] = [x, y].map(|at| *at as usize * width);
                *score = simd::dot(&q[x..x + width], &k[y..y + width]);
            }
        },
    );
    scores
}

/// The places of the `count` largest of `values`, rising; the first of those that are equal.
///
/// ```
/// assert_eq!(lapidary_kernels::largest_of(&[1.0, 3.0, 2.0, 3.0, 2.0], 3), [1, 2, 3]);
/// ```
pub fn largest_of(values: &[f64], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    if count < order.len() {
        order.select_nth_unstable_by(count, |a, b| {
            values[*b].total_cmp(&values[*a]).then(a.cmp(b))
        });
        order.truncate(count);
        order.sort_unstable();
    }
    order
}

/// Of each row the block on the diagonal, and the best before it, `count` together.
fn largest_of_rows(pairs: &[[u32; 2]], values: &[f64], count: usize) -> Vec<[u32; 2]> {
    let mut order: Vec<usize> = (0..pairs.len()).collect();
    // Stable: those of a row stay in order.
    order.sort_by_key(|at| pairs[*at][0]);
    let mut best = Vec::new();
    for row in order.chunk_by(|a, b| pairs[*a][0] == pairs[*b][0]) {
        let value = |at: &usize| match pairs[*at] {
            [x, y] if x == y => f64::INFINITY,
            _ => values[*at],
        };
        let values: Vec<f64> = row.iter().map(value).collect();
        best.extend(
            largest_of(&values, count)
                .into_iter()
                .map(|at| pairs[row[at]]),
        );
    }
    best
}
