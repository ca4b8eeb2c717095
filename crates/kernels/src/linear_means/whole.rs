//! Means over all keys: one pass over keys, one over queries.

use super::{Sides, Slopes, add_row, along, split};
use crate::host::{self, Shared};
use crate::product::{Into, Matrix, Threads, multiply};
use crate::simd::{self, Real};
use std::ops::Range;

/// Rows whose sums one task makes, however many threads there are.
const PART: usize = 1024;
/// Rows that are read while they lie in the cache.
pub(super) const BLOCK: usize = 64;

/// Sums of `size` numbers over the rows of each pair, `[pairs, size]`: `body` adds those of some rows of a
/// pair, and what it made of each part is added up in order.
pub(super) fn summed<T: Real>(
    (pairs, rows): (usize, usize),
    size: usize,
    work_per_row: usize,
    body: impl Fn(usize, Range<usize>, &mut [T]) + Sync,
) -> Vec<T> {
    let parts = rows.div_ceil(PART).max(1);
    let mut all = vec![T::zero(); pairs * parts * size];
    let shared = Shared::new(&mut all);
    host::share(pairs * parts, PART.min(rows) * work_per_row, |items| {
        for item in items {
            let (pair, start) = (item / parts, item % parts * PART);
            // SAFETY: each part of a pair is one item.
            let sums = unsafe { shared.part(item * size, size) };
            body(pair, start..rows.min(start + PART), sums);
        }
    });
    if parts == 1 {
        return all;
    }
    let mut sums = vec![T::zero(); pairs * size];
    for (pair, sums) in sums.chunks_exact_mut(size.max(1)).enumerate() {
        let here = &all[pair * parts * size..(pair + 1) * parts * size];
        for part in here.chunks_exact(size.max(1)) {
            for (sum, part) in sums.iter_mut().zip(part) {
                *sum += *part;
            }
        }
    }
    sums
}

/// Calls `body` on blocks of the rows of all pairs.
pub(super) fn in_blocks(
    (pairs, rows): (usize, usize),
    work_per_row: usize,
    body: impl Fn(usize, Range<usize>) + Sync,
) {
    let blocks = rows.div_ceil(BLOCK);
    host::share(pairs * blocks, BLOCK * work_per_row, |items| {
        for item in items {
            let (pair, start) = (item / blocks, item % blocks * BLOCK);
            body(pair, start..rows.min(start + BLOCK));
        }
    });
}

/// What keys and values of each head come to: `S` `[features, width]`, and `z` `[features]` behind it.
struct Context<T> {
    all: Vec<T>,
    features: usize,
    width: usize,
}

impl<T: Real> Context<T> {
    fn new(sides: &Sides<T>) -> Self {
        let (features, width) = (sides.k.columns, sides.v.columns);
        let over = (sides.pairs, sides.k.rows);
        let all = summed(
            over,
            features * (width + 1),
            features * width / 8,
            |pair, rows, sums| {
                let (k, v) = (
                    sides.k.matrix(pair).part_of_rows(&rows),
                    sides.v.matrix(pair).part_of_rows(&rows),
                );
                let (sums, totals) = sums.split_at_mut(features * width);
                add_product(sums, k.transposed(), v);
                simd::vectorised(
                    #[inline(always)]
                    || {
                        for row in 0..k.rows {
                            add_row(&k, row, T::one(), totals);
                        }
                    },
                );
            },
        );
        Self {
            all,
            features,
            width,
        }
    }

    /// `S` and `z` of a pair.
    fn of(&self, pair: usize) -> (Matrix<'_, T>, &[T]) {
        let size = self.features * (self.width + 1);
        let (sums, totals) =
            self.all[pair * size..(pair + 1) * size].split_at(self.features * self.width);
        (Matrix::packed(sums, self.features, self.width), totals)
    }
}

/// `result += a b`, packed.
pub(super) fn add_product<T: Real>(result: &mut [T], a: Matrix<T>, b: Matrix<T>) {
    let columns = b.columns;
    multiply(result, columns, Into::Add, T::one(), a, b, Threads::One);
}

/// `result = a b`, packed.
pub(super) fn product<T: Real>(result: &mut [T], a: Matrix<T>, b: Matrix<T>) {
    let columns = b.columns;
    multiply(result, columns, Into::Replace, T::one(), a, b, Threads::One);
}

/// `y`, packed.
pub(super) fn forward<T: Real>(sides: &Sides<T>) -> Vec<T> {
    let context = Context::new(sides);
    let (features, width) = (context.features, context.width);
    let over = (sides.pairs, sides.q.rows);
    let mut result = host::unwritten::<T>(over.0 * over.1 * width);
    let shared = Shared::new(&mut result);
    in_blocks(over, features * width / 8 + width, |pair, rows| {
        let q = sides.q.matrix(pair).part_of_rows(&rows);
        let (sums, totals) = context.of(pair);
        // SAFETY: each block of rows of a pair is one item.
        let y = unsafe { shared.part((pair * over.1 + rows.start) * width, rows.len() * width) };
        product(y, q, sums);
        simd::vectorised(
            #[inline(always)]
            || {
                for (row, y) in y.chunks_exact_mut(width.max(1)).enumerate() {
                    let reciprocal = sides.reciprocal(along(&q, row, totals));
                    for y in y {
                        *y *= reciprocal;
                    }
                }
            },
        );
    });
    result
}

/// Gradients, for `y` and its gradient in order.
pub(super) fn backward<T: Real>(sides: &Sides<T>, y: &[T], gradient: &[T]) -> Slopes<T> {
    let context = Context::new(sides);
    let (features, width) = (context.features, context.width);
    let (pairs, queries, keys) = (sides.pairs, sides.q.rows, sides.k.rows);
    let mut dq = host::unwritten::<T>(pairs * queries * features);
    let shared = Shared::new(&mut dq);
    let size = features * (width + 1);
    // Σ_i q_i ∂n_iᵀ, and Σ_i h_i q_i behind it.
    let all = summed(
        (pairs, queries),
        size,
        features * width / 4,
        |pair, rows, sums| {
            let (of_sums, of_totals) = sums.split_at_mut(features * width);
            let (sums, totals) = context.of(pair);
            let mut slopes = host::unwritten::<T>(BLOCK.min(rows.len()) * width);
            for start in rows.clone().step_by(BLOCK) {
                let rows = start..rows.end.min(start + BLOCK);
                let q = sides.q.matrix(pair).part_of_rows(&rows);
                let slopes = &mut slopes[..rows.len() * width];
                let first = pair * queries + rows.start;
                let mut heights = [T::zero(); BLOCK];
                simd::vectorised(
                    #[inline(always)]
                    || {
                        for (row, height) in heights.iter_mut().enumerate().take(rows.len()) {
                            let at = (first + row) * width..(first + row + 1) * width;
                            let reciprocal = sides.reciprocal(along(&q, row, totals));
                            let to = &mut slopes[row * width..(row + 1) * width];
                            *height = split(reciprocal, &gradient[at.clone()], &y[at], to);
                            add_row(&q, row, *height, of_totals);
                        }
                    },
                );
                let slopes = Matrix::packed(slopes, rows.len(), width);
                add_product(of_sums, q.transposed(), slopes);
                // SAFETY: each block of rows of a pair is in one item.
                let dq = unsafe { shared.part(first * features, rows.len() * features) };
                product(dq, slopes, sums.transposed());
                simd::vectorised(
                    #[inline(always)]
                    || {
                        let rows = dq.chunks_exact_mut(features.max(1));
                        for (dq, height) in rows.zip(&heights) {
                            simd::add_scaled(dq, totals, *height);
                        }
                    },
                );
            }
        },
    );
    let slopes = Context {
        all,
        features,
        width,
    };
    let mut dk = host::unwritten::<T>(pairs * keys * features);
    let mut dv = host::unwritten::<T>(pairs * keys * width);
    let shared = (Shared::new(&mut dk), Shared::new(&mut dv));
    in_blocks((pairs, keys), features * width / 4, |pair, rows| {
        let (k, v) = (
            sides.k.matrix(pair).part_of_rows(&rows),
            sides.v.matrix(pair).part_of_rows(&rows),
        );
        let (of_sums, of_totals) = slopes.of(pair);
        let first = pair * keys + rows.start;
        // SAFETY: each block of rows of a pair is one item.
        let (dk, dv) = unsafe {
            (
                shared.0.part(first * features, rows.len() * features),
                shared.1.part(first * width, rows.len() * width),
            )
        };
        product(dv, k, of_sums);
        product(dk, v, of_sums.transposed());
        simd::vectorised(
            #[inline(always)]
            || {
                for dk in dk.chunks_exact_mut(features.max(1)) {
                    simd::add_scaled(dk, of_totals, T::one());
                }
            },
        );
    });
    [dq, dk, dv]
}
