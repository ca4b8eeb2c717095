//! The walks over the chunks of one head, and what they carry along.

use super::{Fades, Head, Sizes, State, Walk};
use crate::host;
use crate::product::{Into, Matrix, Threads, multiply};
use crate::simd::{self, Real};
use std::ops::Range;

impl<T: Real> State<T> {
    pub(super) fn new(sizes: &Sizes) -> Self {
        Self {
            products: vec![T::zero(); sizes.features * sizes.value_width],
            weights: vec![T::zero(); sizes.features],
            is_empty: true,
        }
    }

    pub(super) fn products(&self, sizes: &Sizes) -> Matrix<'_, T> {
        Matrix::packed(&self.products, sizes.features, sizes.value_width)
    }

    /// Lets all fade, and adds rows `x` with what belongs to them, which counts `shares` times in the weights.
    pub(super) fn add(&mut self, across: T, x: &[T], of: Matrix<T>, shares: impl Fn(usize) -> T) {
        if !self.is_empty {
            for number in self.products.iter_mut().chain(&mut self.weights) {
                *number *= across;
            }
        }
        self.is_empty = false;
        let features = self.weights.len();
        let rows = Matrix::packed(x, of.rows, features).transposed();
        multiply(
            &mut self.products,
            of.columns,
            Into::Add,
            T::one(),
            rows,
            of,
            Threads::One,
        );
        simd::vectorised(
            #[inline(always)]
            || {
                for (row, x) in x.chunks_exact(features.max(1)).enumerate() {
                    simd::add_scaled(&mut self.weights, x, shares(row));
                }
            },
        );
    }
}

/// Replaces `x` by `e^x`.
#[inline(always)]
fn exponentials<T: Real>(x: &mut [T]) {
    for x in x {
        *x = x.exp();
    }
}

/// Rows of a matrix, each multiplied by its factor, one after the other.
pub(super) fn scaled<'a, T: Real>(x: Matrix<T>, factors: &[T], into: &'a mut [T]) -> &'a [T] {
    let width = x.columns;
    let into = &mut into[..x.rows * width];
    simd::vectorised(
        #[inline(always)]
        || {
            let rows = into.chunks_exact_mut(width.max(1)).zip(factors);
            for (row, (to, &factor)) in rows.enumerate() {
                let from = &x.data[row * x.row_stride..];
                if x.column_stride == 1 {
                    for (to, from) in to.iter_mut().zip(&from[..width]) {
                        *to = factor * *from;
                    }
                } else {
                    for (column, to) in to.iter_mut().enumerate() {
                        *to = factor * from[column * x.column_stride];
                    }
                }
            }
        },
    );
    into
}

impl<'a, T: Real> Head<'a, T> {
    /// Of queries, keys with their decay beside them, and values.
    pub(super) fn new(sizes: Sizes, [q, keys, v]: [Matrix<'a, T>; 3]) -> Self {
        let decay = (0..sizes.length)
            .map(|at| keys.data[at * keys.row_stride + sizes.features * keys.column_stride]);
        Self {
            sizes,
            q,
            k: Matrix {
                columns: sizes.features,
                ..keys
            },
            v,
            decay: decay.collect(),
        }
    }

    /// Sums of decays from the beginning of a chunk to each position, without its own and with it, and to the end.
    pub(super) fn sums(&self, range: &Range<usize>) -> ([Vec<T>; 2], T) {
        let mut sum = T::zero();
        let (mut until, mut through) = (Vec::new(), Vec::new());
        for a in &self.decay[range.clone()] {
            until.push(sum);
            sum += *a;
            through.push(sum);
        }
        ([until, through], sum)
    }

    pub(super) fn fades(&self, range: &Range<usize>) -> Fades<T> {
        let ([until, through], all) = self.sums(range);
        let [mut rest, mut after] = [&until, &through].map(|sums| {
            let left = sums.iter().map(|sum| all - *sum);
            left.collect::<Vec<T>>()
        });
        let (mut before, mut through, mut across) = (until, through, [all]);
        simd::vectorised(
            #[inline(always)]
            || {
                for sums in [&mut before, &mut through, &mut rest, &mut after] {
                    exponentials(sums);
                }
                exponentials(&mut across);
            },
        );
        Fades {
            before,
            through,
            rest,
            after,
            across: across[0],
        }
    }

    /// `M` of a chunk with itself.
    pub(super) fn mask(&self, range: &Range<usize>) -> Vec<T> {
        let ([until, through], _) = self.sums(range);
        let count = range.len();
        let mut mask = host::unwritten::<T>(count * count);
        simd::vectorised(
            #[inline(always)]
            || {
                for (i, row) in mask.chunks_exact_mut(count).enumerate() {
                    let (earlier, rest) = row.split_at_mut(i);
                    for (m, there) in earlier.iter_mut().zip(&until) {
                        *m = (until[i] - *there).exp();
                    }
                    let (own, later) = rest.split_at_mut(1);
                    own.fill(T::one());
                    if self.sizes.is_causal {
                        later.fill(T::zero());
                        continue;
                    }
                    for (m, there) in later.iter_mut().zip(&through[i + 1..]) {
                        *m = (*there - through[i]).exp();
                    }
                }
            },
        );
        mask
    }

    /// The chunk that a walk comes to as one of so many.
    pub(super) fn step(&self, walk: Walk, step: usize, count: usize) -> Range<usize> {
        let index = match walk {
            Walk::FromTheEnd => count - 1 - step,
            Walk::FromTheBeginning => step,
        };
        let start = index * self.sizes.chunk;
        start..self.sizes.length.min(start + self.sizes.chunk)
    }

    pub(super) fn chunks(&self) -> usize {
        self.sizes.length.div_ceil(self.sizes.chunk)
    }

    /// Adds to a chunk's sums `[rows, value_width + 1]` what its queries, faded, find in a state.
    pub(super) fn read(&self, q: &[T], state: &State<T>, y: &mut [T]) {
        if state.is_empty {
            return;
        }
        let Sizes {
            features,
            value_width,
            ..
        } = self.sizes;
        let queries = Matrix::packed(q, q.len() / features.max(1), features);
        let products = state.products(&self.sizes);
        multiply(
            y,
            value_width + 1,
            Into::Add,
            T::one(),
            queries,
            products,
            Threads::One,
        );
        simd::vectorised(
            #[inline(always)]
            || {
                let rows = y.chunks_exact_mut(value_width + 1);
                for (y, q) in rows.zip(q.chunks_exact(features.max(1))) {
                    y[value_width] += simd::dot(q, &state.weights);
                }
            },
        );
    }

    /// The scores of a chunk with itself, before they fade.
    pub(super) fn scores(&self, range: &Range<usize>, scores: &mut [T]) {
        let (q, k) = (self.q.part_of_rows(range), self.k.part_of_rows(range));
        multiply(
            scores,
            range.len(),
            Into::Replace,
            T::one(),
            q,
            k.transposed(),
            Threads::One,
        );
    }

    /// Writes the sums of all positions, `[length, value_width + 1]`.
    pub(super) fn forward(&self, output: &mut [T]) {
        let mut scores = host::unwritten::<T>(self.sizes.chunk * self.sizes.chunk);
        for step in 0..self.chunks() {
            let range = self.step(Walk::FromTheBeginning, step, self.chunks());
            self.within(&range, &mut scores, output);
        }
        self.walk(Walk::FromTheBeginning, output);
        if !self.sizes.is_causal {
            self.walk(Walk::FromTheEnd, output);
        }
    }

    /// Writes what positions of a chunk get from each other.
    pub(super) fn within(&self, range: &Range<usize>, scores: &mut [T], output: &mut [T]) {
        let (count, value_width) = (range.len(), self.sizes.value_width);
        let width = value_width + 1;
        let mask = self.mask(range);
        let y = &mut output[range.start * width..range.end * width];
        let scores = &mut scores[..count * count];
        self.scores(range, scores);
        simd::vectorised(
            #[inline(always)]
            || {
                for (score, m) in scores.iter_mut().zip(&mask) {
                    *score *= *m;
                }
                let rows = scores.chunks_exact(count).zip(y.chunks_exact_mut(width));
                for (scores, y) in rows {
                    y[value_width] = simd::sum(scores);
                }
            },
        );
        let scores = Matrix::packed(scores, count, count);
        let v = self.v.part_of_rows(range);
        multiply(y, width, Into::Replace, T::one(), scores, v, Threads::One);
    }

    /// Adds what positions get from the chunks that a walk has passed.
    pub(super) fn walk(&self, walk: Walk, output: &mut [T]) {
        let width = self.sizes.value_width + 1;
        let mut faded = host::unwritten::<T>(self.sizes.chunk * self.sizes.features);
        let mut state = State::new(&self.sizes);
        for step in 0..self.chunks() {
            let range = self.step(walk, step, self.chunks());
            let fades = self.fades(&range);
            let [q, k, v] = [self.q, self.k, self.v].map(|x| x.part_of_rows(&range));
            let (of_queries, of_keys) = match walk {
                Walk::FromTheEnd => (&fades.after, &fades.through),
                Walk::FromTheBeginning => (&fades.before, &fades.rest),
            };
            let y = &mut output[range.start * width..range.end * width];
            self.read(scaled(q, of_queries, &mut faded), &state, y);
            let keys = scaled(k, of_keys, &mut faded);
            state.add(fades.across, keys, v, |_| T::one());
        }
    }
}
