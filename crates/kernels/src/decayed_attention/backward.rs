//! The backward pass of one head: the same two walks over its chunks, with queries carried along too.

use super::walks::scaled;
use super::{Fades, Head, Sizes, State, Walk};
use crate::host;
use crate::product::{Into, Matrix, Threads, multiply};
use crate::simd::{self, Real};
use std::ops::Range;

/// Gradients of one head.
pub(super) struct Slopes<'a, T> {
    q: &'a mut [T],
    /// `[length, features + 1]`, those of the decay last.
    keys: &'a mut [T],
    v: &'a mut [T],
    /// `C` and `E` of every position.
    of_sums: [Vec<T>; 2],
}

impl<'a, T: Real> Slopes<'a, T> {
    pub(super) fn new(length: usize, [q, keys, v]: [&'a mut [T]; 3]) -> Self {
        Self {
            q,
            keys,
            v,
            of_sums: [(); 2].map(|()| vec![T::zero(); length]),
        }
    }
}

/// `∂y` of a chunk.
struct Given<'a, T> {
    /// `g` `[rows, value_width]`.
    values: Matrix<'a, T>,
    /// `h`.
    weights: Vec<T>,
}

/// Memory that chunks share.
struct Scratch<T> {
    scores: Vec<T>,
    /// `p`.
    slopes: Vec<T>,
    faded: Vec<T>,
    part: Vec<T>,
}

impl<T: Real> Head<'_, T> {
    pub(super) fn backward(&self, gradient: Matrix<T>, mut slopes: Slopes<'_, T>) {
        let Sizes {
            features, chunk, ..
        } = self.sizes;
        let mut scratch = Scratch {
            scores: host::unwritten(chunk * chunk),
            slopes: host::unwritten(chunk * chunk),
            faded: host::unwritten(chunk * features),
            part: host::unwritten(chunk * features),
        };
        for step in 0..self.chunks() {
            let range = self.step(Walk::FromTheBeginning, step, self.chunks());
            let given = self.given(gradient, &range);
            self.slopes_within(&range, &given, &mut scratch, &mut slopes);
        }
        for walk in [Walk::FromTheBeginning, Walk::FromTheEnd] {
            self.slopes_along(walk, gradient, &mut scratch, &mut slopes);
        }
        let [of_until, of_through] = &slopes.of_sums;
        let (mut later, mut from_here) = (T::zero(), T::zero());
        let rows = slopes.keys.chunks_exact_mut(features + 1).enumerate();
        for (at, row) in rows.rev() {
            from_here += of_through[at];
            row[features] = later + from_here;
            later += of_until[at];
        }
    }

    fn given<'b>(&self, gradient: Matrix<'b, T>, range: &Range<usize>) -> Given<'b, T> {
        let width = self.sizes.value_width;
        let rows = gradient.part_of_rows(range);
        let last =
            (0..rows.rows).map(|row| rows.data[row * rows.row_stride + width * rows.column_stride]);
        Given {
            weights: last.collect(),
            values: Matrix {
                columns: width,
                ..rows
            },
        }
    }

    /// Writes what positions of a chunk say of each other.
    fn slopes_within(
        &self,
        range: &Range<usize>,
        given: &Given<T>,
        scratch: &mut Scratch<T>,
        slopes: &mut Slopes<'_, T>,
    ) {
        let Sizes {
            features,
            value_width,
            ..
        } = self.sizes;
        let (count, one) = (range.len(), Threads::One);
        let mask = self.mask(range);
        let [q, k, v] = [self.q, self.k, self.v].map(|x| x.part_of_rows(range));
        let scores = &mut scratch.scores[..count * count];
        let of_scores = &mut scratch.slopes[..count * count];
        self.scores(range, scores);
        multiply(
            of_scores,
            count,
            Into::Replace,
            T::one(),
            given.values,
            v.transposed(),
            one,
        );
        let [of_until, of_through] = &mut slopes.of_sums;
        let (of_until, of_through) = (&mut of_until[range.clone()], &mut of_through[range.clone()]);
        simd::vectorised(
            #[inline(always)]
            || {
                for i in 0..count {
                    let here = i * count..(i + 1) * count;
                    let (row, mask) = (&mut of_scores[here.clone()], &mask[here.clone()]);
                    for (p, m) in row.iter_mut().zip(mask) {
                        *p = (*p + given.weights[i]) * *m;
                    }
                    // What belongs to the decays: earlier keys and later ones.
                    let scores = &mut scores[here];
                    let (earlier, later) = (0..i, i + 1..count);
                    of_until[i] += simd::dot(&row[earlier.clone()], &scores[earlier.clone()]);
                    of_through[i] -= simd::dot(&row[later.clone()], &scores[later.clone()]);
                    take(
                        &mut of_until[earlier.clone()],
                        &row[earlier.clone()],
                        &scores[earlier],
                        -T::one(),
                    );
                    take(
                        &mut of_through[later.clone()],
                        &row[later.clone()],
                        &scores[later],
                        T::one(),
                    );
                    for (score, m) in scores.iter_mut().zip(mask) {
                        *score *= *m;
                    }
                }
            },
        );
        let scores = Matrix::packed(scores, count, count);
        let of_scores = Matrix::packed(of_scores, count, count);
        let of_v = &mut slopes.v[range.start * value_width..range.end * value_width];
        multiply(
            of_v,
            value_width,
            Into::Replace,
            T::one(),
            scores.transposed(),
            given.values,
            one,
        );
        let of_q = &mut slopes.q[range.start * features..range.end * features];
        multiply(of_q, features, Into::Replace, T::one(), of_scores, k, one);
        let of_k = &mut slopes.keys[range.start * (features + 1)..range.end * (features + 1)];
        multiply(
            of_k,
            features + 1,
            Into::Replace,
            T::one(),
            of_scores.transposed(),
            q,
            one,
        );
    }

    /// Adds what positions of different chunks say of each other: queries of a chunk and keys behind it, keys
    /// of it and queries behind it, from the end; those ahead of it, from the beginning.
    fn slopes_along(
        &self,
        walk: Walk,
        gradient: Matrix<T>,
        scratch: &mut Scratch<T>,
        slopes: &mut Slopes<'_, T>,
    ) {
        let [mut keys, mut queries] = [(); 2].map(|()| State::new(&self.sizes));
        // Causal queries lie behind their keys alone.
        let causal = self.sizes.is_causal;
        let sees_queries = !causal || walk == Walk::FromTheEnd;
        let sees_keys = !causal || walk == Walk::FromTheBeginning;
        for step in 0..self.chunks() {
            let range = self.step(walk, step, self.chunks());
            let given = self.given(gradient, &range);
            let fades = self.fades(&range);
            if sees_keys && !keys.is_empty {
                self.of_queries(walk, &range, &given, &fades, &keys, scratch, slopes);
            }
            if sees_queries && !queries.is_empty {
                self.of_keys(walk, &range, &fades, &queries, scratch, slopes);
            }
            let [q, k, v] = [self.q, self.k, self.v].map(|x| x.part_of_rows(&range));
            let (of_keys, of_queries) = match walk {
                Walk::FromTheEnd => (&fades.through, &fades.before),
                Walk::FromTheBeginning => (&fades.rest, &fades.after),
            };
            if sees_keys {
                let faded = scaled(k, of_keys, &mut scratch.faded);
                keys.add(fades.across, faded, v, |_| T::one());
            }
            if sees_queries {
                let faded = scaled(q, of_queries, &mut scratch.faded);
                queries.add(fades.across, faded, given.values, |row| given.weights[row]);
            }
        }
    }

    /// Adds to `∂q` of a chunk, given the state of keys.
    #[allow(
        clippy::too_many_arguments,
        reason = "what a chunk is, what is known of it, and where results go"
    )]
    fn of_queries(
        &self,
        walk: Walk,
        range: &Range<usize>,
        given: &Given<T>,
        fades: &Fades<T>,
        keys: &State<T>,
        scratch: &mut Scratch<T>,
        slopes: &mut Slopes<'_, T>,
    ) {
        let features = self.sizes.features;
        let part = &mut scratch.part[..range.len() * features];
        let products = keys.products(&self.sizes).transposed();
        multiply(
            part,
            features,
            Into::Replace,
            T::one(),
            given.values,
            products,
            Threads::One,
        );
        let (factors, sums, sign) = match walk {
            Walk::FromTheEnd => (&fades.after, &mut slopes.of_sums[1], -T::one()),
            Walk::FromTheBeginning => (&fades.before, &mut slopes.of_sums[0], T::one()),
        };
        let q = self.q.part_of_rows(range);
        let to = &mut slopes.q[range.start * features..range.end * features];
        simd::vectorised(
            #[inline(always)]
            || {
                let rows = part.chunks_exact_mut(features.max(1));
                for (row, (part, to)) in rows.zip(to.chunks_exact_mut(features.max(1))).enumerate()
                {
                    simd::add_scaled(part, &keys.weights, given.weights[row]);
                    sums[range.start + row] += sign * factors[row] * along(q, row, part);
                    simd::add_scaled(to, part, factors[row]);
                }
            },
        );
    }

    /// Adds to `∂k` and `∂v` of a chunk, given the state of queries.
    fn of_keys(
        &self,
        walk: Walk,
        range: &Range<usize>,
        fades: &Fades<T>,
        queries: &State<T>,
        scratch: &mut Scratch<T>,
        slopes: &mut Slopes<'_, T>,
    ) {
        let Sizes {
            features,
            value_width,
            ..
        } = self.sizes;
        let [k, v] = [self.k, self.v].map(|x| x.part_of_rows(range));
        let part = &mut scratch.part[..range.len() * features];
        let products = queries.products(&self.sizes);
        multiply(
            part,
            features,
            Into::Replace,
            T::one(),
            v,
            products.transposed(),
            Threads::One,
        );
        let (factors, sums, sign) = match walk {
            Walk::FromTheEnd => (&fades.rest, &mut slopes.of_sums[0], -T::one()),
            Walk::FromTheBeginning => (&fades.through, &mut slopes.of_sums[1], T::one()),
        };
        let to = &mut slopes.keys[range.start * (features + 1)..range.end * (features + 1)];
        simd::vectorised(
            #[inline(always)]
            || {
                let rows = part.chunks_exact_mut(features.max(1));
                for (row, (part, to)) in rows.zip(to.chunks_exact_mut(features + 1)).enumerate() {
                    simd::add_scaled(part, &queries.weights, T::one());
                    sums[range.start + row] += sign * factors[row] * along(k, row, part);
                    simd::add_scaled(&mut to[..features], part, factors[row]);
                }
            },
        );
        let faded = scaled(k, factors, &mut scratch.faded);
        let faded = Matrix::packed(faded, range.len(), features);
        let to = &mut slopes.v[range.start * value_width..range.end * value_width];
        multiply(
            to,
            value_width,
            Into::Add,
            T::one(),
            faded,
            products,
            Threads::One,
        );
    }
}

/// `sums_j += sign · p_j s_j`.
#[inline(always)]
fn take<T: Real>(sums: &mut [T], p: &[T], s: &[T], sign: T) {
    for ((sum, p), s) in sums.iter_mut().zip(p).zip(s) {
        *sum += sign * *p * *s;
    }
}

/// `x_row · y`.
#[inline(always)]
fn along<T: Real>(x: Matrix<T>, row: usize, y: &[T]) -> T {
    let start = row * x.row_stride;
    if x.column_stride == 1 {
        return simd::dot(&x.data[start..start + y.len()], y);
    }
    let each = y.iter().enumerate();
    each.fold(T::zero(), |sum, (column, y)| {
        sum + x.data[start + column * x.column_stride] * *y
    })
}
