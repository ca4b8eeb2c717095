//! The way back of blocks of tokens: from the gradient of codes to that of vectors.

use super::LEAST;
use super::pass::{BLOCK, Operands, Pass, Scratch, floored, product};
use super::prepared::Prepared;
use crate::host::{self, Shared};
use crate::product::Matrix;
use crate::simd::{self, Real};
use std::ops::Range;

impl<T: Real> Pass<'_, T> {
    /// The gradient of `x`, packed, for that of the result.
    pub(super) fn backward(&self, gradient: &[T]) -> Vec<T> {
        let width = self.prepared.width;
        let mut slopes = host::unwritten::<T>(self.pairs() * self.length * width);
        let mut parts = vec![T::zero(); self.pairs() * self.blocks()];
        let shared = (Shared::new(&mut slopes), Shared::new(&mut parts));
        let operands = self.operands(true);
        self.share(2 * self.work(), |items| {
            let mut scratch = Scratch::new(self.prepared);
            for item in items {
                let (pair, tokens) = self.block(item);
                let first = (pair * self.length + tokens.start) * width;
                // SAFETY: each block is one item.
                let (slopes, part) = unsafe {
                    let slopes = shared.0.part(first, tokens.len() * width);
                    (slopes, shared.1.part(item, 1))
                };
                let operands = &operands[pair % operands.len()];
                self.hash((pair, &tokens), operands, &mut scratch);
                self.pass_signs(pair, &tokens, gradient, &mut scratch.arguments);
                part[0] = self.of_units((pair, &tokens), operands, &mut scratch, slopes);
                if self.head(pair).bandwidth.is_some() {
                    self.of_vectors((pair, &tokens), T::zero(), slopes);
                }
            }
        });
        if self
            .prepared
            .heads
            .iter()
            .any(|head| head.bandwidth.is_none())
        {
            self.through_bandwidths(&parts, &mut slopes);
        }
        slopes
    }

    /// Turns `p` of a block into its gradient.
    fn pass_signs(&self, pair: usize, tokens: &Range<usize>, gradient: &[T], arguments: &mut [T]) {
        let bits = self.prepared.bits;
        let columns = bits + usize::from(self.offset.is_some());
        let plane = self.pairs() * self.length;
        let rows = arguments.chunks_exact_mut(bits).zip(tokens.clone());
        for (arguments, token) in rows {
            let row = pair * self.length + token;
            let of = |row: usize| &gradient[row * columns..row * columns + bits];
            let passed = |argument: T, slope: T| match argument.abs() < T::one() {
                true => slope,
                false => T::zero(),
            };
            match self.offset {
                None => {
                    for (argument, slope) in arguments.iter_mut().zip(of(row)) {
                        *argument = passed(*argument, *slope);
                    }
                }
                Some(_) => {
                    let kept = self.kept(pair, token);
                    let slopes = of(row).iter().zip(of(plane + row));
                    for (argument, (query, key)) in arguments.iter_mut().zip(slopes) {
                        *argument = passed(*argument, *query + kept * *key);
                    }
                }
            }
        }
    }

    /// `∂u` of a block but for what comes through the bandwidth, from `∂p`; gives
    /// `−Σ W_ij ‖u_i − a_j‖²`, the gradient of `ρ`.
    fn of_units(
        &self,
        (pair, tokens): (usize, &Range<usize>),
        operands: &Operands<T>,
        scratch: &mut Scratch<T>,
        slopes: &mut [T],
    ) -> T {
        let Prepared {
            anchors,
            bits,
            width,
            ..
        } = *self.prepared;
        let Some([hashes, across]) = &operands.back else {
            return T::zero();
        };
        let count = tokens.len();
        let twice = T::of(2.0) * self.rate(pair);
        let exponents = &scratch.exponents[..count * anchors];
        let weights = &mut scratch.kernels[..count * anchors];
        let of_kernels = &mut scratch.slopes[..count * anchors];
        let mut of_rate = T::zero();
        let mut totals = [T::zero(); BLOCK];
        let arguments = Matrix::packed(&scratch.arguments, count, bits);
        product(of_kernels, 1.0, arguments, (hashes, anchors));
        simd::vectorised(
            #[inline(always)]
            || {
                for (weight, slope) in weights.iter_mut().zip(of_kernels.iter()) {
                    *weight *= *slope;
                }
                of_rate = simd::dot(weights, exponents);
                for (total, weights) in totals.iter_mut().zip(weights.chunks_exact(anchors)) {
                    *total = simd::sum(weights);
                }
            },
        );
        let weights = Matrix::packed(weights, count, anchors);
        product(slopes, 1.0, weights, (across, width));
        simd::vectorised(
            #[inline(always)]
            || {
                let units = scratch.units.chunks_exact(width);
                let rows = slopes.chunks_exact_mut(width).zip(units);
                for ((slopes, unit), total) in rows.zip(&totals) {
                    for (slope, unit) in slopes.iter_mut().zip(unit) {
                        *slope = twice * (*slope - *total * *unit);
                    }
                }
            },
        );
        of_rate
    }

    /// Adds to `∂u` of all tokens what comes through `σ²`, and makes it `∂x`.
    fn through_bandwidths(&self, parts: &[T], slopes: &mut [T]) {
        let width = self.prepared.width;
        let shared = Shared::new(slopes);
        let of_bandwidth = |pair: usize| {
            let of_rate: T = parts[pair * self.blocks()..(pair + 1) * self.blocks()]
                .iter()
                .copied()
                .sum();
            let rate = self.rate(pair);
            // At the least value it is a constant.
            match T::of(2.0) * self.bandwidths[pair] > T::of(LEAST) {
                true => -T::of(2.0) * rate * rate * of_rate,
                false => T::zero(),
            }
        };
        let of_bandwidths: Vec<T> = (0..self.pairs()).map(of_bandwidth).collect();
        self.share(width, |items| {
            for item in items {
                let (pair, tokens) = self.block(item);
                let first = (pair * self.length + tokens.start) * width;
                // SAFETY: each block is one item.
                let slopes = unsafe { shared.part(first, tokens.len() * width) };
                self.of_vectors((pair, &tokens), of_bandwidths[pair], slopes);
            }
        });
    }

    /// Makes `∂x` of a block of `∂u`, to which a gradient of `σ²` is added.
    fn of_vectors(
        &self,
        (pair, tokens): (usize, &Range<usize>),
        of_bandwidth: T,
        slopes: &mut [T],
    ) {
        let width = self.prepared.width;
        let mean = &self.head(pair).mean;
        let share = self.shares[pair / self.prepared.heads.len()];
        simd::vectorised(
            #[inline(always)]
            || {
                let rows = slopes.chunks_exact_mut(width).zip(tokens.clone());
                for (slopes, token) in rows {
                    let x = self.rows.row(pair * self.length + token);
                    let length = simd::squares_about(x, T::zero()).sqrt();
                    let scale = T::one() / floored(length);
                    let moves = T::of(2.0) * of_bandwidth * share * self.kept(pair, token);
                    for ((slope, x), mean) in slopes.iter_mut().zip(x).zip(mean) {
                        *slope += moves * (*x * scale - *mean);
                    }
                    // What is shorter than the least length is divided by a constant.
                    let turned = match length > T::of(LEAST) {
                        true => simd::dot(slopes, x) * scale * scale,
                        false => T::zero(),
                    };
                    for (slope, x) in slopes.iter_mut().zip(x) {
                        *slope = (*slope - turned * *x) * scale;
                    }
                }
            },
        );
    }
}
