//! Means over the keys up to a query: chunks that read what came before them from `S` and `z`, and meet
//! themselves with their weights laid out.

use super::exponential::Features;
use super::{Sides, Slopes, add_row, along, split};
use crate::host::{self, Shared};
use crate::product::{Into, Matrix, Threads, multiply};
use crate::simd::{self, Real};
use crate::stack::Stack;
use std::ops::Range;

/// The rows of one head, and how they are divided.
struct Head<'a, T> {
    q: Operand<'a, T>,
    k: Operand<'a, T>,
    v: Matrix<'a, T>,
    chunk: usize,
}

/// Queries or keys of one head.
enum Operand<'a, T> {
    Given(Matrix<'a, T>),
    /// Made anew wherever a chunk of them is met.
    Features(Features<'a, T>),
}

/// Some rows of an operand.
enum Held<'a, T> {
    Given(Matrix<'a, T>),
    Made(Vec<T>, [usize; 2]),
}

impl<T: Real> Held<'_, T> {
    fn matrix(&self) -> Matrix<'_, T> {
        match self {
            Self::Given(rows) => *rows,
            Self::Made(rows, [count, columns]) => Matrix::packed(rows, *count, *columns),
        }
    }
}

impl<'a, T: Real> Operand<'a, T> {
    fn rows(&self) -> usize {
        match self {
            Self::Given(x) => x.rows,
            Self::Features(made) => made.x.rows,
        }
    }

    fn columns(&self) -> usize {
        match self {
            Self::Given(x) => x.columns,
            Self::Features(made) => made.count(),
        }
    }

    fn held(&self, range: &Range<usize>) -> Held<'a, T> {
        match self {
            Self::Given(x) => Held::Given(x.part_of_rows(range)),
            Self::Features(made) => Held::Made(made.of_rows(range), [range.len(), made.count()]),
        }
    }

    /// Hands the gradient of some rows on to those that they are made of, `to`, and to what made them.
    fn hand_over(
        &self,
        range: &Range<usize>,
        held: &Held<T>,
        slopes: &mut [T],
        (to, of_map): (&mut [T], &mut [T]),
    ) {
        match self {
            Self::Given(x) => {
                to[range.start * x.columns..range.end * x.columns].copy_from_slice(slopes);
            }
            Self::Features(made) => {
                let width = made.x.columns;
                let to = &mut to[range.start * width..range.end * width];
                made.gradients(range, held.matrix().data, slopes, (to, of_map));
            }
        }
    }
}

/// The rows of a chunk.
struct Chunk<'a, T> {
    q: Held<'a, T>,
    k: Held<'a, T>,
    v: Matrix<'a, T>,
    count: usize,
}

/// `Σ a_j b_jᵀ` `[features, width]` and `Σ c_j a_j` `[features]` over chunks that have passed.
struct State<T> {
    sums: Vec<T>,
    totals: Vec<T>,
}

/// Memory that chunks share.
struct Scratch<T> {
    state: State<T>,
    /// Of a chunk with itself.
    weights: Vec<T>,
    /// `∂n_i · v_j + h_i` of the same.
    slopes: Vec<T>,
    /// `∂n` of a chunk.
    of_sums: Vec<T>,
    /// `∂q` or `∂k` of a chunk.
    of_operand: Vec<T>,
    /// One over the sum of weights, and `h`, of every position.
    reciprocals: Vec<T>,
    heights: Vec<T>,
}

impl<T: Real> Scratch<T> {
    fn new(sides: &Sides<T>, chunk: usize) -> Self {
        let (features, width, length) = (sides.features(), sides.v.columns, sides.q.rows);
        Self {
            state: State {
                sums: vec![T::zero(); features * width],
                totals: vec![T::zero(); features],
            },
            weights: vec![T::zero(); chunk * chunk],
            slopes: vec![T::zero(); chunk * chunk],
            of_sums: vec![T::zero(); chunk * width],
            of_operand: vec![T::zero(); chunk * features],
            reciprocals: vec![T::zero(); length],
            heights: vec![T::zero(); length],
        }
    }
}

impl<T: Real> State<T> {
    fn clear(&mut self) {
        self.sums.fill(T::zero());
        self.totals.fill(T::zero());
    }

    /// Adds rows `a` and `b` of a chunk, those of `a` to the totals times their `scales`, or as they are.
    fn add(&mut self, a: Matrix<T>, b: Matrix<T>, scales: Option<&[T]>) {
        product(Into::Add, &mut self.sums, a.transposed(), b);
        let totals = &mut self.totals;
        simd::vectorised(
            #[inline(always)]
            || {
                for row in 0..a.rows {
                    let scale = scales.map_or(T::one(), |scales| scales[row]);
                    add_row(&a, row, scale, totals);
                }
            },
        );
    }

    /// Adds the totals times `scales`, or as they are, to the rows of `result`.
    fn spread(&self, scales: Option<&[T]>, result: &mut [T]) {
        let totals = &self.totals;
        simd::vectorised(
            #[inline(always)]
            || {
                let rows = result.chunks_exact_mut(totals.len().max(1));
                for (row, result) in rows.enumerate() {
                    let scale = scales.map_or(T::one(), |scales| scales[row]);
                    simd::add_scaled(result, totals, scale);
                }
            },
        );
    }

    fn matrix(&self, width: usize) -> Matrix<'_, T> {
        Matrix::packed(&self.sums, self.totals.len(), width)
    }
}

/// `result (+)= a b`, packed.
fn product<T: Real>(into: Into, result: &mut [T], a: Matrix<T>, b: Matrix<T>) {
    let columns = b.columns;
    multiply(result, columns, into, T::one(), a, b, Threads::One);
}

/// Puts zeros where a key lies behind its query.
fn hide<T: Real>(weights: &mut [T], count: usize) {
    for (i, row) in weights.chunks_exact_mut(count).enumerate() {
        row[i + 1..].fill(T::zero());
    }
}

impl<'a, T: Real> Head<'a, T> {
    fn new(sides: &'a Sides<'a, T>, pair: usize, chunk: usize) -> Self {
        let operand = |x: &'a Stack<'a, T>, are_keys: bool| match &sides.map {
            None => Operand::Given(x.matrix(pair)),
            Some(map) => Operand::Features(map.of(pair, x.matrix(pair), are_keys)),
        };
        Self {
            q: operand(&sides.q, false),
            k: operand(&sides.k, true),
            v: sides.v.matrix(pair),
            chunk,
        }
    }

    /// The positions of every chunk, in order.
    fn chunks(&self) -> Vec<Range<usize>> {
        let rows = self.q.rows();
        let starts = (0..rows).step_by(self.chunk);
        let of = |start: usize| start..rows.min(start + self.chunk);
        starts.map(of).collect()
    }

    fn rows(&self, range: &Range<usize>) -> Chunk<'a, T> {
        Chunk {
            q: self.q.held(range),
            k: self.k.held(range),
            v: self.v.part_of_rows(range),
            count: range.len(),
        }
    }

    /// Writes all means of the head, `[length, width]`.
    fn forward(&self, sides: &Sides<T>, scratch: &mut Scratch<T>, result: &mut [T]) {
        let width = self.v.columns;
        scratch.state.clear();
        for range in self.chunks() {
            let chunk = self.rows(&range);
            let (q, k) = (chunk.q.matrix(), chunk.k.matrix());
            let weights = &mut scratch.weights[..chunk.count * chunk.count];
            product(Into::Replace, weights, q, k.transposed());
            hide(weights, chunk.count);
            let y = &mut result[range.start * width..range.end * width];
            let weights = Matrix::packed(weights, chunk.count, chunk.count);
            product(Into::Replace, y, weights, chunk.v);
            product(Into::Add, y, q, scratch.state.matrix(width));
            let totals = &scratch.state.totals;
            simd::vectorised(
                #[inline(always)]
                || {
                    let rows = weights.data.chunks_exact(chunk.count);
                    let rows = rows.zip(y.chunks_exact_mut(width.max(1)));
                    for (i, (weights, y)) in rows.enumerate() {
                        let total = simd::sum(&weights[..i + 1]) + along(&q, i, totals);
                        let reciprocal = sides.reciprocal(total);
                        for y in y {
                            *y *= reciprocal;
                        }
                    }
                },
            );
            scratch.state.add(k, chunk.v, None);
        }
    }

    /// Writes `∂q` of all positions, and what else of them gradients need: a walk with time.
    fn of_queries(
        &self,
        sides: &Sides<T>,
        scratch: &mut Scratch<T>,
        [y, gradient]: [&[T]; 2],
        (dq, of_map): (&mut [T], &mut [T]),
    ) {
        let (features, width) = (self.q.columns(), self.v.columns);
        let mut here = vec![T::zero(); features];
        scratch.state.clear();
        for range in self.chunks() {
            let chunk = self.rows(&range);
            let (q, k) = (chunk.q.matrix(), chunk.k.matrix());
            here.copy_from_slice(&scratch.state.totals);
            let reciprocals = &mut scratch.reciprocals[range.clone()];
            simd::vectorised(
                #[inline(always)]
                || {
                    for (i, reciprocal) in reciprocals.iter_mut().enumerate() {
                        add_row(&k, i, T::one(), &mut here);
                        *reciprocal = sides.reciprocal(along(&q, i, &here));
                    }
                },
            );
            let place = range.start * width..range.end * width;
            let of_y = [&y[place.clone()], &gradient[place]];
            scratch.split(&range, of_y, width);
            scratch.lay_out(&range, &chunk);
            let slopes = Matrix::packed(&scratch.slopes, chunk.count, chunk.count);
            let of_sums = Matrix::packed(&scratch.of_sums, chunk.count, width);
            let of_q = &mut scratch.of_operand[..chunk.count * features];
            product(Into::Replace, of_q, slopes, k);
            let sums = scratch.state.matrix(width).transposed();
            product(Into::Add, of_q, of_sums, sums);
            let heights = &scratch.heights[range.clone()];
            scratch.state.spread(Some(heights), of_q);
            self.q
                .hand_over(&range, &chunk.q, of_q, (&mut *dq, &mut *of_map));
            scratch.state.add(k, chunk.v, None);
        }
    }

    /// Writes `∂k` and `∂v` of all positions: a walk against time, behind the other.
    fn of_keys(
        &self,
        scratch: &mut Scratch<T>,
        [y, gradient]: [&[T]; 2],
        ([dk, dv], of_map): ([&mut [T]; 2], &mut [T]),
    ) {
        let (features, width) = (self.q.columns(), self.v.columns);
        scratch.state.clear();
        for range in self.chunks().into_iter().rev() {
            let chunk = self.rows(&range);
            let (q, k) = (chunk.q.matrix(), chunk.k.matrix());
            let place = range.start * width..range.end * width;
            scratch.split(&range, [&y[place.clone()], &gradient[place.clone()]], width);
            scratch.lay_out(&range, &chunk);
            let weights = &mut scratch.weights[..chunk.count * chunk.count];
            product(Into::Replace, weights, q, k.transposed());
            hide(weights, chunk.count);
            let weights = Matrix::packed(weights, chunk.count, chunk.count).transposed();
            let slopes = Matrix::packed(&scratch.slopes, chunk.count, chunk.count).transposed();
            let of_sums = Matrix::packed(&scratch.of_sums, chunk.count, width);
            let sums = scratch.state.matrix(width);
            let dv = &mut dv[place];
            product(Into::Replace, dv, weights, of_sums);
            product(Into::Add, dv, k, sums);
            let of_k = &mut scratch.of_operand[..chunk.count * features];
            product(Into::Replace, of_k, slopes, q);
            product(Into::Add, of_k, chunk.v, sums.transposed());
            scratch.state.spread(None, of_k);
            self.k
                .hand_over(&range, &chunk.k, of_k, (&mut *dk, &mut *of_map));
            let heights = &scratch.heights[range];
            scratch.state.add(q, of_sums, Some(heights));
        }
    }
}

impl<T: Real> Scratch<T> {
    /// `∂n` and `h` of a chunk, whose rows of `y` and of its gradient are given.
    fn split(&mut self, range: &Range<usize>, [y, gradient]: [&[T]; 2], width: usize) {
        let of_sums = &mut self.of_sums[..range.len() * width];
        let heights = &mut self.heights[range.clone()];
        let reciprocals = &self.reciprocals[range.clone()];
        simd::vectorised(
            #[inline(always)]
            || {
                let each = heights.iter_mut().zip(reciprocals).enumerate();
                for (row, (height, reciprocal)) in each {
                    let at = row * width..(row + 1) * width;
                    let to = &mut of_sums[at.clone()];
                    *height = split(*reciprocal, &gradient[at.clone()], &y[at], to);
                }
            },
        );
    }

    /// `∂n_i · v_j + h_i` of a chunk with itself.
    fn lay_out(&mut self, range: &Range<usize>, chunk: &Chunk<T>) {
        let slopes = &mut self.slopes[..chunk.count * chunk.count];
        let of_sums = Matrix::packed(&self.of_sums, chunk.count, chunk.v.columns);
        product(Into::Replace, slopes, of_sums, chunk.v.transposed());
        let heights = &self.heights[range.clone()];
        let rows = slopes.chunks_exact_mut(chunk.count).zip(heights);
        for (i, (row, height)) in rows.enumerate() {
            for slope in &mut row[..i + 1] {
                *slope += *height;
            }
            row[i + 1..].fill(T::zero());
        }
    }
}

/// Element operations of a head.
fn work<T: Real>(sides: &Sides<T>, chunk: usize) -> usize {
    let (features, width) = (sides.features(), sides.v.columns);
    sides.q.rows * (features * width + chunk * (features + width)) / 8
}

/// `y`, packed.
pub(super) fn forward<T: Real>(sides: &Sides<T>, chunk: usize) -> Vec<T> {
    let chunk = chunk.clamp(1, sides.q.rows.max(1));
    let size = sides.q.rows * sides.v.columns;
    let mut result = host::unwritten::<T>(sides.pairs * size);
    let shared = Shared::new(&mut result);
    host::share(sides.pairs, work(sides, chunk), |pairs| {
        let mut scratch = Scratch::new(sides, chunk);
        for pair in pairs {
            // SAFETY: pairs are disjoint.
            let y = unsafe { shared.part(pair * size, size) };
            Head::new(sides, pair, chunk).forward(sides, &mut scratch, y);
        }
    });
    result
}

/// Gradients, for `y` and its gradient in order; those of frequencies of each pair behind them, where features
/// are made.
pub(super) fn backward<T: Real>(
    sides: &Sides<T>,
    chunk: usize,
    y: &[T],
    gradient: &[T],
) -> (Slopes<T>, Vec<T>) {
    let chunk = chunk.clamp(1, sides.q.rows.max(1));
    let [of_rows, of_values] = [&sides.q, &sides.v].map(|side| side.rows * side.columns);
    let of_map = sides.map.as_ref().map_or(0, |map| map.size());
    let mut dq = host::unwritten::<T>(sides.pairs * of_rows);
    let mut dk = host::unwritten::<T>(sides.pairs * of_rows);
    let mut dv = host::unwritten::<T>(sides.pairs * of_values);
    let mut d_map = vec![T::zero(); sides.pairs * of_map];
    let shared = [&mut dq, &mut dk, &mut dv, &mut d_map].map(|slopes| Shared::new(slopes));
    host::share(sides.pairs, 3 * work(sides, chunk), |pairs| {
        let mut scratch = Scratch::new(sides, chunk);
        for pair in pairs {
            let part = |which: usize, size: usize| {
                // SAFETY: pairs are disjoint.
                unsafe { shared[which].part(pair * size, size) }
            };
            let (dq, dk, dv) = (part(0, of_rows), part(1, of_rows), part(2, of_values));
            let d_map = part(3, of_map);
            let place = pair * of_values..(pair + 1) * of_values;
            let of_y = [&y[place.clone()], &gradient[place]];
            let head = Head::new(sides, pair, chunk);
            head.of_queries(sides, &mut scratch, of_y, (dq, &mut *d_map));
            head.of_keys(&mut scratch, of_y, ([dk, dv], d_map));
        }
    });
    ([dq, dk, dv], d_map)
}
