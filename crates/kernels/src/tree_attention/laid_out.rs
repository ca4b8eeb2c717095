//! Tokens that meet pair by pair, a tile of queries and keys at a time.
//!
//! ```text
//! Y = (M ∘ S)(V, 1),   S = Q Kᵀ,   P = G Vᵀ + h 1ᵀ
//! ∂Q = (M ∘ P) K,   ∂K = (M ∘ P)ᵀ Q,   ∂V = (M ∘ S)ᵀ G,   ∂M = S ∘ P
//! ```

use super::head::{Head, Slopes, add_rows, gathered};
use super::pairs::{Factors, Meeting};
use crate::host;
use crate::product::{Into, Matrix, Repeated, Threads, multiply};
use crate::simd::{self, Real};
use std::ops::Range;

/// Queries of a tile.
const ROWS: usize = 64;
/// Keys of a tile, a multiple of what products are made of.
const COLUMNS: usize = 4 * Repeated::<f32>::COLUMNS;

/// Adds what the columns give the rows to `y` `[tokens, width + 1]`.
pub(super) fn forward<T: Real>(head: &Head<'_, T>, meeting: &Meeting<'_>, y: &mut [T]) {
    let (features, width) = (head.q.columns, head.v.columns);
    let (rows, columns) = (meeting.rows.len(), meeting.columns.len());
    let [keys, values] = [&head.k, &head.v].map(|x| gathered(x, meeting.columns));
    let keys = Repeated::new(Matrix::packed(&keys, columns, features).transposed(), rows);
    let values = Repeated::new(Matrix::packed(&values, columns, width), rows);
    let mut scores = host::unwritten::<T>(ROWS.min(rows) * COLUMNS.min(columns));
    let mut sums = host::unwritten::<T>(ROWS.min(rows) * width);
    for tile in tiles(rows, ROWS) {
        let q = gathered(&head.q, &meeting.rows[tile.clone()]);
        let q = Matrix::packed(&q, tile.len(), features);
        let mut totals = [T::zero(); ROWS];
        for part in tiles(columns, COLUMNS) {
            let scores = &mut scores[..tile.len() * part.len()];
            product(scores, Into::Replace, q, &keys, (0..features, part.clone()));
            simd::vectorised(
                #[inline(always)]
                || {
                    let each = scores.chunks_exact_mut(part.len());
                    for ((row, scores), total) in tile.clone().zip(each).zip(&mut totals) {
                        *total += mask(
                            head,
                            meeting.factors(row, part.clone(), head.centre),
                            scores,
                        );
                    }
                },
            );
            let into = match part.start {
                0 => Into::Replace,
                _ => Into::Add,
            };
            let scores = Matrix::packed(scores, tile.len(), part.len());
            product(&mut sums, into, scores, &values, (part, 0..width));
        }
        let tokens = &meeting.rows[tile];
        add_rows((y, width + 1), tokens, &sums, width);
        for (token, total) in tokens.iter().zip(&totals) {
            y[*token as usize * (width + 1) + width] += *total;
        }
    }
}

/// Adds the gradients of what the columns give the rows.
pub(super) fn backward<T: Real>(
    head: &Head<'_, T>,
    gradient: &Matrix<'_, T>,
    meeting: &Meeting<'_>,
    slopes: &mut Slopes<'_, T>,
) {
    let (features, width) = (head.q.columns, head.v.columns);
    let (rows, columns) = (meeting.rows.len(), meeting.columns.len());
    let [keys, values] = [&head.k, &head.v].map(|x| gathered(x, meeting.columns));
    let keys = Matrix::packed(&keys, columns, features);
    let across = Repeated::new(keys.transposed(), rows);
    let keys = Repeated::new(keys, rows);
    let values = Repeated::new(Matrix::packed(&values, columns, width).transposed(), rows);
    let size = ROWS.min(rows) * COLUMNS.min(columns);
    let mut tile_scores = host::unwritten::<T>(size);
    let mut tile_slopes = host::unwritten::<T>(size);
    let mut of_q = host::unwritten::<T>(ROWS.min(rows) * features);
    let mut of_k = vec![T::zero(); columns * features];
    let mut of_v = vec![T::zero(); columns * width];
    for tile in tiles(rows, ROWS) {
        let tokens = &meeting.rows[tile.clone()];
        let q = gathered(&head.q, tokens);
        let q = Matrix::packed(&q, tile.len(), features);
        let gradients = gathered(gradient, tokens);
        let g = Matrix::spaced(&gradients, tile.len(), width, width + 1);
        for part in tiles(columns, COLUMNS) {
            let scores = &mut tile_scores[..tile.len() * part.len()];
            product(
                scores,
                Into::Replace,
                q,
                &across,
                (0..features, part.clone()),
            );
            let of_scores = &mut tile_slopes[..tile.len() * part.len()];
            product(
                of_scores,
                Into::Replace,
                g,
                &values,
                (0..width, part.clone()),
            );
            let of_mask = &mut *slopes.mask;
            simd::vectorised(
                #[inline(always)]
                || {
                    let each = scores.chunks_exact_mut(part.len());
                    let each = each.zip(of_scores.chunks_exact_mut(part.len()));
                    let beside = gradients.chunks_exact(width + 1);
                    for ((row, (scores, of_scores)), g) in tile.clone().zip(each).zip(beside) {
                        let factors = meeting.factors(row, part.clone(), head.centre);
                        mask_both(head, factors, (scores, of_scores, g[width]), of_mask);
                    }
                },
            );
            let into = match part.start {
                0 => Into::Replace,
                _ => Into::Add,
            };
            let scores = Matrix::packed(scores, tile.len(), part.len());
            let of_scores = Matrix::packed(of_scores, tile.len(), part.len());
            product(
                &mut of_q,
                into,
                of_scores,
                &keys,
                (part.clone(), 0..features),
            );
            add_product(
                &mut of_k[part.start * features..],
                of_scores.transposed(),
                q,
            );
            add_product(&mut of_v[part.start * width..], scores.transposed(), g);
        }
        add_rows((slopes.q, features), tokens, &of_q, features);
    }
    add_rows((slopes.k, features), meeting.columns, &of_k, features);
    add_rows((slopes.v, width), meeting.columns, &of_v, width);
}

fn tiles(count: usize, size: usize) -> impl Iterator<Item = Range<usize>> {
    (0..count)
        .step_by(size)
        .map(move |start| start..count.min(start + size))
}

/// `result (+)= a b`, packed, of some rows and columns of `b`.
fn product<T: Real>(
    result: &mut [T],
    into: Into,
    a: Matrix<'_, T>,
    b: &Repeated<'_, T>,
    (rows, columns): (Range<usize>, Range<usize>),
) {
    assert!(a.rows * columns.len() <= result.len());
    let to = (result.as_mut_ptr(), columns.len());
    // SAFETY: the result is borrowed exclusively, and as large as was just asserted.
    unsafe { b.multiply_at(to, into, T::one(), a, (rows, columns)) }
}

/// `result += a b`, packed.
fn add_product<T: Real>(result: &mut [T], a: Matrix<'_, T>, b: Matrix<'_, T>) {
    let columns = b.columns;
    multiply(result, columns, Into::Add, T::one(), a, b, Threads::One);
}

/// Multiplies scores of one query by the mask, and gives their sum.
#[inline(always)]
fn mask<T: Real>(head: &Head<'_, T>, factors: Factors<'_>, scores: &mut [T]) -> T {
    match factors {
        Factors::Run(start) => {
            let mask = &head.mask[start..start + scores.len()];
            for (score, factor) in scores.iter_mut().zip(mask) {
                *score *= *factor;
            }
        }
        Factors::Listed(start, places) => {
            let mask = &head.mask[start..];
            for (score, place) in scores.iter_mut().zip(places) {
                *score *= mask[*place as usize];
            }
        }
    }
    simd::sum(scores)
}

/// Makes `M ∘ S` and `M ∘ P` of scores `S` and of `G Vᵀ` of one query, whose `h` is beside them, and adds `S ∘ P`
/// to the slope of the mask.
#[inline(always)]
fn mask_both<T: Real>(
    head: &Head<'_, T>,
    factors: Factors<'_>,
    (scores, of_scores, beside): (&mut [T], &mut [T], T),
    of_mask: &mut [T],
) {
    let both = scores.iter_mut().zip(of_scores);
    match factors {
        Factors::Run(start) => {
            let mask = &head.mask[start..start + both.len()];
            let of_mask = &mut of_mask[start..start + both.len()];
            for (((score, slope), factor), sum) in both.zip(mask).zip(of_mask) {
                let p = *slope + beside;
                *sum += *score * p;
                *slope = *factor * p;
                *score *= *factor;
            }
        }
        Factors::Listed(start, places) => {
            let (mask, of_mask) = (&head.mask[start..], &mut of_mask[start..]);
            for ((score, slope), place) in both.zip(places) {
                let (p, place) = (*slope + beside, *place as usize);
                let factor = mask[place];
                of_mask[place] += *score * p;
                *slope = factor * p;
                *score *= factor;
            }
        }
    }
}
