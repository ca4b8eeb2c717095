//! The backward pass over one head: weights are computed again, tile by tile.
//!
//! A block of rows `X` is to the blocks of keys that it meets what one row is, with
//!
//! ```text
//! L_X = −ln Σ_{i ∈ X} e^{−L_i},   g_X = Σ_{i ∈ X} e^{L_X − L_i} ∂y_i,   δ_X = Σ_{i ∈ X} e^{L_X − L_i} δ_i
//! P_XY = e^{S_XY − L_X} = Σ_{i ∈ X} e^{S_XY − L_i},   ∂S_XY = P_XY (g_X · ṽ_Y − δ_X),   ∂ṽ_Y += P_XY g_X
//! ```

use super::ResolutionOptions;
use super::averaged::{Averaged, row};
use super::choice::Chosen;
use super::level::{KEYS, Level, Piece, ROWS};
use crate::attention::weights_and_slopes;
use crate::host;
use crate::product::{Into, Matrix, Repeated};
use crate::simd::{self, Real};

/// What the forward pass gave of a head, and the gradient of it.
pub(super) struct Saved<'a, T> {
    /// `[length, value_width]`.
    pub(super) y: &'a [T],
    pub(super) log_sums: &'a [T],
    /// `[length, value_width]`.
    pub(super) gradient: Matrix<'a, T>,
}

/// What blocks of rows are asked for.
struct Asked<T> {
    /// `g`, `[blocks, width]`.
    gradients: Vec<T>,
    log_sums: Vec<T>,
    deltas: Vec<T>,
    width: usize,
}

impl<T: Real> Asked<T> {
    /// Of rows themselves.
    fn new(saved: &Saved<'_, T>, length: usize) -> Self {
        let g = &saved.gradient;
        let mut gradients = Vec::with_capacity(length * g.columns);
        for at in 0..length {
            if g.column_stride == 1 {
                gradients.extend_from_slice(row(g, at));
            } else {
                let from = at * g.row_stride;
                let numbers = 0..g.columns;
                gradients.extend(numbers.map(|column| g.data[from + column * g.column_stride]));
            }
        }
        let mut deltas = vec![T::zero(); length];
        simd::vectorised(
            #[inline(always)]
            || {
                for (row, delta) in deltas.iter_mut().enumerate() {
                    let at = row * g.columns..(row + 1) * g.columns;
                    *delta = simd::dot(&saved.y[at.clone()], &gradients[at]);
                }
            },
        );
        Self {
            gradients,
            log_sums: saved.log_sums[..length].to_vec(),
            deltas,
            width: g.columns,
        }
    }

    /// Of larger blocks, made of `each` of these.
    fn together(&self, each: usize) -> Self {
        let (all, width) = (self.log_sums.len(), self.width);
        let blocks = all.div_ceil(each);
        let mut larger = Self {
            gradients: vec![T::zero(); blocks * width],
            log_sums: vec![T::NEG_INFINITY; blocks],
            deltas: vec![T::zero(); blocks],
            width,
        };
        simd::vectorised(
            #[inline(always)]
            || {
                for block in 0..blocks {
                    let rows = block * each..all.min((block + 1) * each);
                    // Rows that met nothing are not there.
                    let mut least = -T::NEG_INFINITY;
                    for &sum in &self.log_sums[rows.clone()] {
                        let there = sum > T::NEG_INFINITY && sum < least;
                        least = if there { sum } else { least };
                    }
                    let mut total = T::zero();
                    for &sum in &self.log_sums[rows.clone()] {
                        if sum > T::NEG_INFINITY {
                            total += (least - sum).exp_of_negative();
                        }
                    }
                    if total == T::zero() {
                        continue;
                    }
                    larger.log_sums[block] = least - total.ln();
                    let gradient = &mut larger.gradients[block * width..][..width];
                    for row in rows {
                        let sum = self.log_sums[row];
                        if sum > T::NEG_INFINITY {
                            let weight = (least - sum).exp_of_negative() / total;
                            larger.deltas[block] += weight * self.deltas[row];
                            let from = &self.gradients[row * width..][..width];
                            simd::add_scaled(gradient, from, weight);
                        }
                    }
                }
            },
        );
        larger
    }

    fn gradients(&self) -> Matrix<'_, T> {
        Matrix::packed(&self.gradients, self.log_sums.len(), self.width)
    }
}

/// Writes the gradients of queries, keys and values of a head, packed.
pub(super) fn backward<T: Real>(
    options: &ResolutionOptions,
    chosen: &Chosen,
    [q, k, v]: [Matrix<'_, T>; 3],
    saved: &Saved<'_, T>,
    mut slopes: [&mut [T]; 3],
) {
    let (sizes, length) = (&options.sizes, chosen.length);
    let queries = Averaged::new(q, length, sizes, options.causal);
    let [keys, values] = [k, v].map(|x| Averaged::new(x, length, sizes, false));
    let sides = [&queries, &keys, &values];
    for slopes in &mut slopes {
        slopes.fill(T::zero());
    }
    let mut asked = Asked::new(saved, length);
    let mut finer = 1;
    for level in Level::all(options, chosen).iter().rev() {
        if level.size > finer {
            asked = asked.together(level.size / finer);
            finer = level.size;
        }
        if !level.is_met() {
            continue;
        }
        let pass = Pass {
            level,
            scale: T::of(options.scale),
            asked: &asked,
            of: sides.map(|x| x.at(level.number)),
        };
        if level.size == 1 {
            pass.run(slopes.each_mut().map(|slopes| &mut **slopes));
            continue;
        }
        let mut given = pass.of.map(|x| vec![T::zero(); x.rows * x.columns]);
        pass.run(given.each_mut().map(Vec::as_mut_slice));
        for ((side, given), slopes) in sides.iter().zip(&given).zip(&mut slopes) {
            side.give(level.number, given, slopes);
        }
    }
}

/// The blocks of one size.
struct Pass<'a, T> {
    level: &'a Level<'a, T>,
    scale: T,
    asked: &'a Asked<T>,
    /// Queries, keys and values of this size.
    of: [Matrix<'a, T>; 3],
}

impl<T: Real> Pass<'_, T> {
    /// Adds to the gradients of queries, keys and values of this size.
    fn run(&self, [dq, dk, dv]: [&mut [T]; 3]) {
        let (level, scale, one) = (self.level, self.scale, T::one());
        let [q, k, v] = self.of;
        let (width, value_width) = (q.columns, v.columns);
        let g = self.asked.gradients();
        let (k_across, v_across) = (level.panels(k), level.panels(v));
        let [q_right, k_right, g_right] = [q, k, g].map(|x| Repeated::new(x, level.blocks));
        let mut room = [0; 2].map(|_| host::unwritten::<T>(ROWS * KEYS));
        level.walk(|rows, pieces, columns| {
            let [weights, slopes] = room
                .each_mut()
                .map(|room| &mut room[..rows.len() * columns]);
            let (q, g) = (q.part_of_rows(rows), g.part_of_rows(rows));
            for piece in pieces {
                let number = piece.number;
                let to = &mut weights[piece.column..];
                let part = (0..width, 0..piece.keys.len());
                k_across[number].multiply(to, columns, Into::Replace, scale, q, part);
                let to = &mut slopes[piece.column..];
                let part = (0..value_width, 0..piece.keys.len());
                v_across[number].multiply(to, columns, Into::Replace, one, g, part);
            }
            simd::vectorised(
                #[inline(always)]
                || {
                    let each = weights.chunks_exact_mut(columns).zip(rows.clone());
                    for (scores, row) in each {
                        level.adjust(row, pieces, scores);
                    }
                    let log_sums = &self.asked.log_sums[rows.clone()];
                    let deltas = &self.asked.deltas[rows.clone()];
                    weights_and_slopes(weights, slopes, columns, log_sums, deltas);
                },
            );
            for Piece { keys, column, .. } in pieces {
                let of = |tile| Matrix::spaced(tile, rows.len(), keys.len(), columns);
                let [weights, slopes] = [&weights[*column..], &slopes[*column..]].map(of);
                let part = (rows.clone(), 0..value_width);
                let to = &mut dv[keys.start * value_width..];
                g_right.multiply(to, value_width, Into::Add, one, weights.transposed(), part);
                let part = (rows.clone(), 0..width);
                let to = &mut dk[keys.start * width..];
                q_right.multiply(to, width, Into::Add, scale, slopes.transposed(), part);
                let part = (keys.clone(), 0..width);
                let to = &mut dq[rows.start * width..];
                k_right.multiply(to, width, Into::Add, scale, slopes, part);
            }
        });
    }
}
