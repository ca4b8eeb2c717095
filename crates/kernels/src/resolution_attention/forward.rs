//! The forward pass over one head.

use super::ResolutionOptions;
use super::averaged::Averaged;
use super::choice::Chosen;
use super::level::{KEYS, Level, ROWS};
use crate::host;
use crate::online_softmax::{State, online};
use crate::product::{Into, Matrix, Repeated};
use crate::simd::{self, Real};

/// What rows of blocks have of what they met so far, not yet divided by their sums.
struct Reached<T> {
    states: Vec<State<T>>,
    /// `[blocks, width]`.
    rows: Vec<T>,
    width: usize,
}

impl<T: Real> Reached<T> {
    /// Of one row that met nothing.
    fn nothing(width: usize) -> Self {
        Self {
            states: vec![State::nothing()],
            rows: vec![T::zero(); width],
            width,
        }
    }

    /// Of smaller blocks, `each` to one: they go on from where that is.
    fn divided(&self, each: usize, blocks: usize) -> Self {
        let mut rows = Vec::with_capacity(blocks * self.width);
        for block in 0..blocks {
            rows.extend_from_slice(&self.rows[block / each * self.width..][..self.width]);
        }
        Self {
            states: (0..blocks).map(|block| self.states[block / each]).collect(),
            rows,
            width: self.width,
        }
    }
}

/// Writes the outputs `[length, value_width]` and the log-sums of a head.
pub(super) fn forward<T: Real>(
    options: &ResolutionOptions,
    chosen: &Chosen,
    [q, k, v]: [Matrix<'_, T>; 3],
    y: &mut [T],
    log_sums: &mut [T],
) {
    let (sizes, length) = (&options.sizes, chosen.length);
    let queries = Averaged::new(q, length, sizes, options.causal);
    let [keys, values] = [k, v].map(|x| Averaged::new(x, length, sizes, false));
    let mut reached = Reached::nothing(v.columns);
    for level in Level::all(options, chosen) {
        reached = reached.divided(level.each, level.blocks);
        if level.is_met() {
            let at = [&queries, &keys, &values].map(|x| x.at(level.number));
            attend(&level, T::of(options.scale), at, &mut reached);
        }
    }
    let last = sizes.last().copied().unwrap_or(1);
    let width = v.columns;
    simd::vectorised(
        #[inline(always)]
        || {
            for (token, log_sum) in log_sums[..length].iter_mut().enumerate() {
                let state = reached.states[token / last];
                let (mut inverse, mut sum) = (T::zero(), T::NEG_INFINITY);
                if state.total != T::zero() {
                    inverse = T::one() / state.total;
                    sum = state.maximum + state.total.ln();
                }
                *log_sum = sum;
                let from = &reached.rows[token / last * width..][..width];
                for (to, from) in y[token * width..][..width].iter_mut().zip(from) {
                    *to = *from * inverse;
                }
            }
        },
    );
    y[length * width..].fill(T::zero());
    log_sums[length..].fill(T::NEG_INFINITY);
}

/// Adds what rows of one size meet.
fn attend<T: Real>(
    level: &Level<'_, T>,
    scale: T,
    [q, k, v]: [Matrix<'_, T>; 3],
    reached: &mut Reached<T>,
) {
    let (width, value_width) = (q.columns, v.columns);
    let across = level.panels(k);
    let values = Repeated::new(v, level.blocks);
    let mut room = host::unwritten::<T>(ROWS * KEYS);
    level.walk(|rows, pieces, columns| {
        let tile = &mut room[..rows.len() * columns];
        let q = q.part_of_rows(rows);
        for piece in pieces {
            let (to, part) = (&mut tile[piece.column..], (0..width, 0..piece.keys.len()));
            across[piece.number].multiply(to, columns, Into::Replace, scale, q, part);
        }
        simd::vectorised(
            #[inline(always)]
            || {
                for (scores, row) in tile.chunks_exact_mut(columns).zip(rows.clone()) {
                    level.adjust(row, pieces, scores);
                    let factor = online(scores, &mut reached.states[row]);
                    if factor != T::one() {
                        let row = &mut reached.rows[row * value_width..][..value_width];
                        for o in row {
                            *o *= factor;
                        }
                    }
                }
            },
        );
        let to = &mut reached.rows[rows.start * value_width..rows.end * value_width];
        for piece in pieces {
            let weights = &tile[piece.column..];
            let weights = Matrix::spaced(weights, rows.len(), piece.keys.len(), columns);
            let part = (piece.keys.clone(), 0..value_width);
            values.multiply(to, value_width, Into::Add, T::one(), weights, part);
        }
    });
}
