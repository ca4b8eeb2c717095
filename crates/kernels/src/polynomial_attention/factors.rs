//! The monomials of a vector.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::FactorDropout;
use crate::product::Matrix;
use crate::simd::{self, Real};

/// How a vector becomes weighted monomials: `1`, each entry, and each pair of entries once.
#[derive(Clone, Copy)]
pub(super) struct Factors {
    pub(super) width: usize,
    pub(super) count: usize,
    pub(super) has_pairs: bool,
    /// Of the constant, of entries, of their squares, and of products of two.
    pub(super) weights: [f64; 4],
    pub(super) dropout: Option<FactorDropout>,
}

impl Factors {
    /// The monomials of the rows of `x`, `[rows, count]`, kept in `written`. `stream` tells the
    /// first row's dropout from that of all others.
    pub(super) fn expand<'a, T: Real>(
        &self,
        x: &[T],
        stream: u64,
        written: &'a mut Vec<T>,
    ) -> Matrix<'a, T> {
        let rows = x.len() / self.width.max(1);
        written.resize(rows * self.count, T::zero());
        simd::vectorised(
            #[inline(always)]
            || {
                let each = written.chunks_exact_mut(self.count);
                for (x, written) in x.chunks_exact(self.width.max(1)).zip(each) {
                    self.expand_row(x, written);
                }
            },
        );
        self.drop_factors(stream, written);
        Matrix::packed(written, rows, self.count)
    }

    #[inline(always)]
    pub(super) fn expand_row<T: Real>(&self, x: &[T], written: &mut [T]) {
        let [constant, linear, square, product] = self.weights.map(T::of);
        let width = x.len();
        written[0] = constant;
        let (entries, pairs) = written[1..].split_at_mut(width);
        for (to, x) in entries.iter_mut().zip(x) {
            *to = linear * *x;
        }
        if !self.has_pairs {
            return;
        }
        let mut start = 0;
        for (m, own) in x.iter().enumerate() {
            let pairs = &mut pairs[start..start + width - m];
            pairs[0] = square * *own * *own;
            let scale = product * *own;
            for (to, x) in pairs[1..].iter_mut().zip(&x[m + 1..]) {
                *to = scale * *x;
            }
            start += width - m;
        }
    }

    /// Adds to `gradient` `[rows, width]` what `slopes` `[rows, count]`, derivatives with respect to
    /// the monomials of the rows of `x`, say of `x`.
    pub(super) fn contract<T: Real>(
        &self,
        x: &[T],
        stream: u64,
        slopes: &mut [T],
        gradient: &mut [T],
    ) {
        self.drop_factors(stream, slopes);
        let width = self.width.max(1);
        simd::vectorised(
            #[inline(always)]
            || {
                let rows = x.chunks_exact(width).zip(gradient.chunks_exact_mut(width));
                for ((x, gradient), slopes) in rows.zip(slopes.chunks_exact(self.count)) {
                    self.contract_row(x, slopes, gradient);
                }
            },
        );
    }

    #[inline(always)]
    pub(super) fn contract_row<T: Real>(&self, x: &[T], slopes: &[T], gradient: &mut [T]) {
        let [_, linear, square, product] = self.weights.map(T::of);
        let width = x.len();
        let (entries, pairs) = slopes[1..].split_at(width);
        simd::add_scaled(gradient, entries, linear);
        if !self.has_pairs {
            return;
        }
        let mut start = 0;
        for (m, own) in x.iter().enumerate() {
            let pairs = &pairs[start..start + width - m];
            let others = product * simd::dot(&pairs[1..], &x[m + 1..]);
            gradient[m] += (square + square) * *own * pairs[0] + others;
            simd::add_scaled(&mut gradient[m + 1..], &pairs[1..], product * *own);
            start += width - m;
        }
    }

    /// Applies the dropout of rows from `stream` on, two apart, to monomials or their derivatives.
    pub(super) fn drop_factors<T: Real>(&self, stream: u64, rows: &mut [T]) {
        let Some(FactorDropout { probability, seed }) = self.dropout else {
            return;
        };
        let keep = T::of(1.0 / (1.0 - probability));
        let dropped = match self.has_pairs {
            true => 1 + self.width..self.count,
            false => 1..self.count,
        };
        for (row, stream) in rows.chunks_exact_mut(self.count).zip((stream..).step_by(2)) {
            let mut generator = ChaCha8Rng::seed_from_u64(seed);
            generator.set_stream(stream);
            for number in &mut row[dropped.clone()] {
                *number *= match generator.random_bool(probability) {
                    true => T::zero(),
                    false => keep,
                };
            }
        }
    }
}
