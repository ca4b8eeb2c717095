//! The backward pass of one head: its chunks from the first to the last with the sums of keys, and back with those
//! of queries.

use super::chunk::{
    Chunk, FEW, Halves, State, add_product, add_scaled_rows, picked, row, scaled, times,
};
use super::{Head, Sizes};
use crate::host;
use crate::product::{Into, Matrix, Threads, multiply};
use crate::simd::{self, Real};
use std::ops::Range;

/// Gradients of one head in the order of the walk, without what positions have of themselves.
pub(super) struct Slopes<T> {
    /// `[length, features]`.
    q: Vec<T>,
    k: Vec<T>,
    /// `[length, value_width]`, with what positions have of themselves.
    v: Vec<T>,
    /// `∂y_i · v_i`.
    own: Vec<T>,
}

/// Gradients of a chunk's rows.
struct Part<'a, T> {
    q: &'a mut [T],
    k: &'a mut [T],
    v: &'a mut [T],
    own: &'a mut [T],
}

impl<T: Real> Slopes<T> {
    /// For `∂y` `[length, value_width]`.
    pub(super) fn of(head: &Head<'_, T>, gradient: Matrix<T>) -> Self {
        let Sizes {
            length,
            features,
            value_width,
            ..
        } = head.sizes;
        let mut slopes = Self {
            q: vec![T::zero(); length * features],
            k: vec![T::zero(); length * features],
            v: vec![T::zero(); length * value_width],
            own: vec![T::zero(); length],
        };
        slopes.walk_on(head, gradient);
        slopes.walk_back(head, gradient);
        slopes
    }

    fn part(&mut self, steps: &Range<usize>, features: usize, width: usize) -> Part<'_, T> {
        let of = |width: usize| steps.start * width..steps.end * width;
        Part {
            q: &mut self.q[of(features)],
            k: &mut self.k[of(features)],
            v: &mut self.v[of(width)],
            own: &mut self.own[of(1)],
        }
    }

    /// Inside of chunks, and queries of each with the keys of those before it.
    fn walk_on(&mut self, head: &Head<'_, T>, gradient: Matrix<T>) {
        let (features, width) = (head.sizes.features, head.sizes.value_width);
        let mut keys = State::new(&head.sizes);
        for steps in head.sizes.chunks() {
            let chunk = head.chunk(&steps);
            let given = given(head, gradient, &steps);
            let (rows, fades) = (0..chunk.rows, chunk.fades());
            let part = &mut self.part(&steps, features, width);
            let mut of_queries = host::unwritten::<T>(chunk.rows * features);
            multiply(
                &mut of_queries,
                features,
                Into::Replace,
                T::one(),
                Chunk::matrix(&given, &rows, width),
                keys.matrix().transposed(),
                Threads::One,
            );
            add_scaled_rows(part.q, &of_queries, &fades.reach);
            chunk.slopes_within(rows.clone(), &given, part);
            let kept = scaled(&chunk.k, &fades.rest);
            let values = Chunk::matrix(&chunk.v, &rows, width);
            keys.add(chunk.across(&fades), &kept, values);
        }
    }

    /// Keys and values of chunks with the queries of those behind them.
    fn walk_back(&mut self, head: &Head<'_, T>, gradient: Matrix<T>) {
        let (features, width) = (head.sizes.features, head.sizes.value_width);
        let mut queries = State::new(&head.sizes);
        for steps in head.sizes.chunks().rev() {
            let chunk = head.chunk(&steps);
            let given = given(head, gradient, &steps);
            let (rows, fades) = (0..chunk.rows, chunk.fades());
            let part = &mut self.part(&steps, features, width);
            let mut of_keys = host::unwritten::<T>(chunk.rows * features);
            multiply(
                &mut of_keys,
                features,
                Into::Replace,
                T::one(),
                Chunk::matrix(&chunk.v, &rows, width),
                queries.matrix().transposed(),
                Threads::One,
            );
            add_scaled_rows(part.k, &of_keys, &fades.rest);
            let kept = scaled(&chunk.k, &fades.rest);
            multiply(
                part.v,
                width,
                Into::Add,
                T::one(),
                Chunk::matrix(&kept, &rows, features),
                queries.matrix(),
                Threads::One,
            );
            let read = scaled(&chunk.q, &fades.reach);
            let given = Chunk::matrix(&given, &rows, width);
            queries.add(chunk.across(&fades), &read, given);
        }
    }

    /// Writes them position by position: those of queries, of keys with those of decays beside them, and of values.
    pub(super) fn write(&self, head: &Head<'_, T>, [q, keys, v]: [&mut [T]; 3]) {
        let sizes = &head.sizes;
        let (features, width) = (sizes.features, sizes.value_width);
        // Decays stand behind the keys of their position.
        let decays = |at: usize| row(2 * at + 1, features);
        // Σ_{s ≥ t} (q_s ∂q_s − k_s ∂k_s)
        let mut sums = vec![0f64; features];
        for step in (0..sizes.length).rev() {
            let at = sizes.position(step);
            let [own_q, own_k] =
                [head.q, head.keys].map(|of| picked(of, 0..features, std::iter::once(at)));
            let (of_q, of_k) = (&self.q[row(step, features)], &self.k[row(step, features)]);
            for (f, sum) in sums.iter_mut().enumerate() {
                *sum += (own_q[f] * of_q[f] - own_k[f] * of_k[f]).to_f64();
            }
            if let Some(between) = sizes.between(step) {
                for (to, sum) in keys[decays(between)].iter_mut().zip(&sums) {
                    *to = T::of(*sum);
                }
            }
            let own = self.own[step];
            for (f, to) in q[row(at, features)].iter_mut().enumerate() {
                *to = own_k[f].mul_add(own, of_q[f]);
            }
            for (f, to) in keys[row(2 * at, features)].iter_mut().enumerate() {
                *to = own_q[f].mul_add(own, of_k[f]);
            }
            v[row(at, width)].copy_from_slice(&self.v[row(step, width)]);
        }
        // In either direction the first position's decay stands before nothing that is summed.
        if sizes.length > 0 {
            keys[decays(0)].fill(T::zero());
        }
    }
}

/// `∂y` of a chunk's rows.
fn given<T: Real>(head: &Head<'_, T>, gradient: Matrix<T>, steps: &Range<usize>) -> Vec<T> {
    let positions = steps.clone().map(|step| head.sizes.position(step));
    picked(gradient, 0..head.sizes.value_width, positions)
}

impl<T: Real> Chunk<T> {
    /// Adds what some rows say of each other, for their `∂y`.
    fn slopes_within(&self, rows: Range<usize>, given: &[T], part: &mut Part<'_, T>) {
        if rows.len() <= FEW {
            return self.slopes_one_by_one(rows, given, part);
        }
        let middle = rows.start + rows.len() / 2;
        let (earlier, later) = (rows.start..middle, middle..rows.end);
        self.slopes_within(earlier.clone(), given, part);
        self.slopes_within(later.clone(), given, part);
        let halves = Halves::new(self, earlier, later);
        let (features, width) = (self.features, self.value_width);
        let (before, behind) = (halves.earlier.clone(), halves.later.clone());
        let given = Self::matrix(given, &behind, width);
        let one = Threads::One;
        let mut of_scores = host::unwritten::<T>(behind.len() * before.len());
        multiply(
            &mut of_scores,
            before.len(),
            Into::Replace,
            T::one(),
            given,
            Self::matrix(&self.v, &before, width).transposed(),
            one,
        );
        let of_scores = Matrix::packed(&of_scores, behind.len(), before.len());
        let mut of_q = host::unwritten::<T>(behind.len() * features);
        let k = Matrix::packed(&halves.k, before.len(), features);
        multiply(
            &mut of_q,
            features,
            Into::Replace,
            T::one(),
            of_scores,
            k,
            one,
        );
        let to = &mut part.q[behind.start * features..behind.end * features];
        add_scaled_rows(to, &of_q, &halves.reach);
        let mut of_k = host::unwritten::<T>(before.len() * features);
        let q = Matrix::packed(&halves.q, behind.len(), features);
        let turned = of_scores.transposed();
        multiply(&mut of_k, features, Into::Replace, T::one(), turned, q, one);
        let to = &mut part.k[before.start * features..before.end * features];
        add_scaled_rows(to, &of_k, &halves.rest);
        let to = &mut part.v[before.start * width..before.end * width];
        let scores = halves.scores().transposed();
        multiply(to, width, Into::Add, T::one(), scores, given, one);
    }

    fn slopes_one_by_one(&self, rows: Range<usize>, given: &[T], part: &mut Part<'_, T>) {
        let (features, width) = (self.features, self.value_width);
        // What is left between the two, and the query by it.
        let (mut left, mut faded) = (vec![T::zero(); features], vec![T::zero(); features]);
        simd::vectorised(
            #[inline(always)]
            || {
                for i in rows.clone() {
                    let given = &given[row(i, width)];
                    left.fill(T::one());
                    for j in (rows.start..=i).rev() {
                        faded.copy_from_slice(&self.q[row(i, features)]);
                        times(&mut faded, &left);
                        let score = simd::dot(&faded, &self.k[row(j, features)]);
                        simd::add_scaled(&mut part.v[row(j, width)], given, score);
                        let slope = simd::dot(given, &self.v[row(j, width)]);
                        if i == j {
                            part.own[i] = slope;
                        } else {
                            simd::add_scaled(&mut part.k[row(j, features)], &faded, slope);
                            faded.copy_from_slice(&self.k[row(j, features)]);
                            for number in &mut faded {
                                *number *= slope;
                            }
                            add_product(&mut part.q[row(i, features)], &faded, &left);
                        }
                        times(&mut left, &self.fade[row(j, features)]);
                    }
                }
            },
        );
    }
}
