//! Passes over the scores of all heads, a tile at a time.

use crate::host::{self, Shared};
use crate::product::{Into, Matrix, Repeated, Threads, multiply};
use crate::simd::{self, Real};
use crate::stack::Stack;
use std::ops::Range;

/// Rows of a tile.
const ROWS: usize = 64;
/// Columns of a tile.
const COLUMNS: usize = 3 * Repeated::<f32>::COLUMNS;

/// `s_ij = scale · a_i · b_j` of every pair.
#[derive(Clone, Copy)]
pub(super) struct Scores<'a, T> {
    pub(super) a: &'a Stack<'a, T>,
    pub(super) b: &'a Stack<'a, T>,
    pub(super) pairs: usize,
    pub(super) scale: T,
}

impl<T: Real> Scores<'_, T> {
    /// Columns as rows.
    pub(super) fn turned(self) -> Self {
        Self {
            a: self.b,
            b: self.a,
            ..self
        }
    }

    /// With those as rows that an iteration normalises.
    pub(super) fn normalising(self, iteration: usize) -> Self {
        match iteration % 2 {
            0 => self,
            _ => self.turned(),
        }
    }

    /// Calls `body` on blocks of the rows of all pairs.
    fn in_blocks(self, work_per_score: usize, body: impl Fn(&Block<T>, &mut [T]) + Sync) {
        let (rows, columns) = (self.a.rows, self.b.rows);
        let blocks = rows.div_ceil(ROWS);
        let work = ROWS * columns * (self.a.columns + work_per_score) / 8;
        host::share(self.pairs * blocks, work.max(1), |items| {
            let mut tile = host::unwritten::<T>(ROWS * COLUMNS);
            let mut known: Option<(usize, Repeated<T>)> = None;
            for item in items.clone() {
                let (pair, block) = (item / blocks, item % blocks);
                if known.as_ref().is_none_or(|known| known.0 != pair) {
                    let rest = (blocks - block).min(items.end - item) * ROWS;
                    let across = self.b.matrix(pair).transposed();
                    known = Some((pair, Repeated::new(across, rest)));
                }
                let Some((_, across)) = &known else { continue };
                let here = block * ROWS..rows.min((block + 1) * ROWS);
                let block = Block {
                    pair,
                    a: self.a.matrix(pair).part_of_rows(&here),
                    first: pair * rows + here.start,
                    across,
                    scale: self.scale,
                };
                body(&block, &mut tile);
            }
        });
    }
}

/// Some rows of a pair.
struct Block<'a, T> {
    pair: usize,
    a: Matrix<'a, T>,
    /// The first of its rows among those of all pairs.
    first: usize,
    /// `bᵀ`.
    across: &'a Repeated<'a, T>,
    scale: T,
}

impl<T: Real> Block<'_, T> {
    /// Its scores for some columns, packed.
    fn scores<'t>(&self, columns: &Range<usize>, tile: &'t mut [T]) -> &'t mut [T] {
        let tile = &mut tile[..self.a.rows * columns.len()];
        replace(tile, self.scale, self.a, self.across, columns);
        tile
    }
}

/// `tile = scale · a b` for some columns of `b`, packed.
fn replace<T: Real>(
    tile: &mut [T],
    scale: T,
    a: Matrix<T>,
    b: &Repeated<T>,
    columns: &Range<usize>,
) {
    assert!(a.rows * columns.len() <= tile.len());
    let to = (tile.as_mut_ptr(), columns.len());
    let part = (0..a.columns, columns.clone());
    // SAFETY: the tile is borrowed exclusively and large enough.
    unsafe { b.multiply_at(to, Into::Replace, scale, a, part) }
}

fn tiles(columns: usize) -> impl Iterator<Item = Range<usize>> {
    let starts = (0..columns).step_by(COLUMNS);
    starts.map(move |start| start..columns.min(start + COLUMNS))
}

/// `−ln Σ_j e^{s_ij + other_j}` of all rows; `-∞` for those that are `-∞` in `nothing`, or meet nothing.
pub(super) fn potentials<T: Real>(of: Scores<T>, other: &[T], nothing: &[T]) -> Vec<T> {
    let columns = of.b.rows;
    let mut found = nothing.to_vec();
    let shared = Shared::new(&mut found);
    of.in_blocks(4, |block, tile| {
        let mut maxima = [T::NEG_INFINITY; ROWS];
        let mut totals = [T::zero(); ROWS];
        for here in tiles(columns) {
            let scores = block.scores(&here, tile);
            let other = &other[block.pair * columns..][here.clone()];
            simd::vectorised(
                #[inline(always)]
                || {
                    for (row, scores) in scores.chunks_exact_mut(here.len()).enumerate() {
                        for (score, &other) in scores.iter_mut().zip(other) {
                            *score += other;
                        }
                        let maximum = maxima[row].larger(simd::maximum(scores));
                        if maximum == T::NEG_INFINITY {
                            continue;
                        }
                        if totals[row] > T::zero() {
                            totals[row] *= (maxima[row] - maximum).exp();
                        }
                        maxima[row] = maximum;
                        totals[row] += simd::exponentiate(scores, maximum);
                    }
                },
            );
        }
        // SAFETY: each block of rows is one item.
        let found = unsafe { shared.part(block.first, block.a.rows) };
        for (found, (&maximum, &total)) in found.iter_mut().zip(maxima.iter().zip(&totals)) {
            *found = match *found == T::zero() && total > T::zero() {
                true => -(maximum + total.ln()),
                false => T::NEG_INFINITY,
            };
        }
    });
    found
}

/// `Σ_j e^{s_ij + here_i + there_j} x_j` of all rows, packed.
pub(super) fn mixed<T: Real>(of: Scores<T>, [here, there]: [&[T]; 2], x: &Stack<T>) -> Vec<T> {
    let (columns, width) = (of.b.rows, x.columns);
    let mut result = vec![T::zero(); of.pairs * of.a.rows * width];
    let shared = Shared::new(&mut result);
    of.in_blocks(width + 4, |block, tile| {
        // SAFETY: each block of rows is one item.
        let result = unsafe { shared.part(block.first * width, block.a.rows * width) };
        let of_rows = &here[block.first..];
        for here in tiles(columns) {
            let weights = block.scores(&here, tile);
            let of_columns = &there[block.pair * columns..][here.clone()];
            simd::vectorised(
                #[inline(always)]
                || {
                    let rows = weights.chunks_exact_mut(here.len()).zip(of_rows);
                    for (weights, &of_row) in rows {
                        for (weight, &of_column) in weights.iter_mut().zip(of_columns) {
                            *weight = (*weight + of_row + of_column).exp();
                        }
                    }
                },
            );
            let weights = Matrix::packed(weights, block.a.rows, here.len());
            let x = x.matrix(block.pair).part_of_rows(&here);
            multiply(result, width, Into::Add, T::one(), weights, x, Threads::One);
        }
    });
    result
}

/// An iteration as the gradient of scores sees it.
pub(super) struct Step<'a, T> {
    /// Whether rows were normalised.
    pub(super) of_rows: bool,
    /// Potentials of rows and of columns behind it.
    pub(super) addends: [&'a [T]; 2],
    /// `∂h` of what it normalised.
    pub(super) slopes: &'a [T],
}

impl<T: Real> Step<'_, T> {
    /// Adds `P (D − ∂h)`, or `−P ∂h` of all but the last iteration, to the gradient of a row of scores.
    #[inline(always)]
    fn add(
        &self,
        (row, columns): (usize, &Range<usize>),
        scores: &[T],
        of_weights: Option<&[T]>,
        to: &mut [T],
    ) {
        let of_row = self.addends[0][row];
        let of_columns = &self.addends[1][columns.clone()];
        let each = to.iter_mut().zip(scores.iter().zip(of_columns));
        match (self.of_rows, of_weights) {
            (true, None) => {
                let slope = self.slopes[row];
                for (to, (&score, &of_column)) in each {
                    *to -= (score + of_row + of_column).exp() * slope;
                }
            }
            (true, Some(d)) => {
                let slope = self.slopes[row];
                for ((to, (&score, &of_column)), &d) in each.zip(d) {
                    *to += (score + of_row + of_column).exp() * (d - slope);
                }
            }
            (false, None) => {
                let slopes = &self.slopes[columns.clone()];
                for ((to, (&score, &of_column)), &slope) in each.zip(slopes) {
                    *to -= (score + of_row + of_column).exp() * slope;
                }
            }
            (false, Some(d)) => {
                let slopes = &self.slopes[columns.clone()];
                for ((to, (&score, &of_column)), (&d, &slope)) in each.zip(d.iter().zip(slopes)) {
                    *to += (score + of_row + of_column).exp() * (d - slope);
                }
            }
        }
    }
}

/// `∂q` and `∂k`, packed, by way of the gradients of scores: for `∂y` and values, whose products are those of
/// the last weights.
pub(super) fn of_scores<T: Real>(
    of: Scores<T>,
    steps: &[Step<T>],
    [d, v]: [&Stack<T>; 2],
) -> [Vec<T>; 2] {
    let (rows, columns, width) = (of.a.rows, of.b.rows, of.a.columns);
    let mut da = vec![T::zero(); of.pairs * rows * width];
    let mut db = vec![T::zero(); of.pairs * columns * width];
    let shared = [Shared::new(&mut da), Shared::new(&mut db)];
    let work = rows * columns * (2 * width + v.columns) / 4;
    host::share(of.pairs, work.max(1), |pairs| {
        let [mut scores, mut of_weights, mut slopes] =
            [(); 3].map(|()| host::unwritten::<T>(ROWS * COLUMNS));
        for pair in pairs {
            // SAFETY: each pair is one item.
            let [da, db] = unsafe {
                [
                    shared[0].part(pair * rows * width, rows * width),
                    shared[1].part(pair * columns * width, columns * width),
                ]
            };
            let (a, b) = (of.a.matrix(pair), of.b.matrix(pair));
            let [across, v_across] =
                [b, v.matrix(pair)].map(|x| Repeated::new(x.transposed(), rows));
            for start in (0..rows).step_by(ROWS) {
                let here = start..rows.min(start + ROWS);
                let (a, d) = (a.part_of_rows(&here), d.matrix(pair).part_of_rows(&here));
                let da = &mut da[here.start * width..here.end * width];
                for there in tiles(columns) {
                    let size = here.len() * there.len();
                    replace(&mut scores, of.scale, a, &across, &there);
                    replace(&mut of_weights, T::one(), d, &v_across, &there);
                    let slopes = &mut slopes[..size];
                    let places = pair * columns + there.start..pair * columns + there.end;
                    simd::vectorised(
                        #[inline(always)]
                        || {
                            let each = slopes.chunks_exact_mut(there.len()).enumerate();
                            for (row, to) in each {
                                let part = row * there.len()..(row + 1) * there.len();
                                let (scores, d) = (&scores[part.clone()], &of_weights[part]);
                                let row = pair * rows + here.start + row;
                                to.fill(T::zero());
                                for (number, step) in steps.iter().enumerate() {
                                    let d = (number + 1 == steps.len()).then_some(d);
                                    step.add((row, &places), scores, d, to);
                                }
                            }
                        },
                    );
                    let slopes = Matrix::packed(slopes, here.len(), there.len());
                    let add = |to: &mut [T], x: Matrix<T>, y: Matrix<T>| {
                        multiply(to, width, Into::Add, of.scale, x, y, Threads::One);
                    };
                    add(da, slopes, b.part_of_rows(&there));
                    let db = &mut db[there.start * width..there.end * width];
                    add(db, slopes.transposed(), a);
                }
            }
        }
    });
    [da, db]
}
