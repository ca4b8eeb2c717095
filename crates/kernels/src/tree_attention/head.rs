//! One head of one sequence.

use super::laid_out;
use super::pairs::{Meeting, TreePairs, TreePiece, TreeSide};
use super::plan::Work;
use super::sums;
use crate::product::Matrix;
use crate::simd::{self, Real};
use std::ops::Range;

/// What is given of one head.
pub(super) struct Head<'a, T> {
    pub(super) q: Matrix<'a, T>,
    pub(super) k: Matrix<'a, T>,
    pub(super) v: Matrix<'a, T>,
    /// By distance, mirrored about distance 0, which is at `centre`.
    pub(super) mask: &'a [T],
    pub(super) centre: usize,
}

/// Gradients that are added to, packed, and that of the mask as the mask is.
pub(super) struct Slopes<'a, T> {
    pub(super) q: &'a mut [T],
    pub(super) k: &'a mut [T],
    pub(super) v: &'a mut [T],
    pub(super) mask: &'a mut [T],
}

impl<T: Real> Head<'_, T> {
    /// Adds what comes of some work to `y` `[tokens, width + 1]`.
    pub(super) fn forward(&self, pairs: &TreePairs, work: &[&Work<T>], y: &mut [T]) {
        for work in work {
            match work {
                Work::Leaf(at) => {
                    if let Some(meeting) = leaf(pairs, *at) {
                        laid_out::forward(self, &meeting, y);
                    }
                }
                Work::Block(block) => {
                    let TreePiece::Cut([left, right]) = &pairs.pieces()[block.cut] else {
                        continue;
                    };
                    let [one, other] = &block.sides;
                    match &block.factored {
                        Some(factored) => {
                            let tokens = [&left.tokens[one.clone()], &right.tokens[other.clone()]];
                            sums::forward(self, factored, tokens, y);
                        }
                        None => {
                            for meeting in meetings((left, one), (right, other)) {
                                laid_out::forward(self, &meeting, y);
                            }
                        }
                    }
                }
            }
        }
    }

    /// Adds the gradients of some work, for that of `y`.
    pub(super) fn backward(
        &self,
        pairs: &TreePairs,
        work: &[&Work<T>],
        gradient: &Matrix<'_, T>,
        slopes: &mut Slopes<'_, T>,
    ) {
        for work in work {
            match work {
                Work::Leaf(at) => {
                    if let Some(meeting) = leaf(pairs, *at) {
                        laid_out::backward(self, gradient, &meeting, slopes);
                    }
                }
                Work::Block(block) => {
                    let TreePiece::Cut([left, right]) = &pairs.pieces()[block.cut] else {
                        continue;
                    };
                    let [one, other] = &block.sides;
                    match &block.factored {
                        Some(factored) => {
                            let tokens = [&left.tokens[one.clone()], &right.tokens[other.clone()]];
                            sums::backward(self, factored, tokens, gradient, slopes);
                        }
                        None => {
                            for meeting in meetings((left, one), (right, other)) {
                                laid_out::backward(self, gradient, &meeting, slopes);
                            }
                        }
                    }
                }
            }
        }
    }

    /// Takes off what tokens have of themselves once too often.
    pub(super) fn without(&self, again: &[u32], y: &mut [T]) {
        let width = self.v.columns;
        for token in again {
            let at = *token as usize;
            let [q, k] = [&self.q, &self.k].map(|x| gathered(x, &[*token]));
            let weight = -self.mask[self.centre] * simd::dot(&q, &k);
            let y = &mut y[at * (width + 1)..(at + 1) * (width + 1)];
            simd::add_scaled(y, &gathered(&self.v, &[*token]), weight);
            y[width] += weight;
        }
    }

    /// Takes off the gradients of what [`Head::without`] takes off.
    pub(super) fn without_slopes(
        &self,
        again: &[u32],
        gradient: &Matrix<'_, T>,
        slopes: &mut Slopes<'_, T>,
    ) {
        let (features, width) = (self.q.columns, self.v.columns);
        let own = self.mask[self.centre];
        for token in again {
            let at = *token as usize;
            let [q, k, v, g] =
                [&self.q, &self.k, &self.v, gradient].map(|x| gathered(x, &[*token]));
            let (score, p) = (simd::dot(&q, &k), simd::dot(&g, &v) + g[width]);
            let features = at * features..(at + 1) * features;
            simd::add_scaled(&mut slopes.q[features.clone()], &k, -own * p);
            simd::add_scaled(&mut slopes.k[features], &q, -own * p);
            let of_v = &mut slopes.v[at * width..(at + 1) * width];
            simd::add_scaled(of_v, &g, -own * score);
            slopes.mask[self.centre] -= score * p;
        }
    }
}

fn leaf(pairs: &TreePairs, at: usize) -> Option<Meeting<'_>> {
    match &pairs.pieces()[at] {
        TreePiece::Leaf { tokens, distances } => Some(Meeting::leaf(tokens, distances.as_deref())),
        TreePiece::Cut(_) => None,
    }
}

/// Parts of two sides, either meeting the other.
fn meetings<'a>(
    (left, one): (&'a TreeSide, &Range<usize>),
    (right, other): (&'a TreeSide, &Range<usize>),
) -> [Meeting<'a>; 2] {
    let there = Meeting::across((left, one.clone()), (right, other.clone()));
    let back = Meeting::across((right, other.clone()), (left, one.clone()));
    [there, back]
}

/// Rows of some tokens, packed.
pub(super) fn gathered<T: Real>(x: &Matrix<'_, T>, tokens: &[u32]) -> Vec<T> {
    let mut rows = Vec::with_capacity(tokens.len() * x.columns);
    for token in tokens {
        let start = *token as usize * x.row_stride;
        if x.column_stride == 1 {
            rows.extend_from_slice(&x.data[start..start + x.columns]);
        } else {
            let each = (0..x.columns).map(|column| x.data[start + column * x.column_stride]);
            rows.extend(each);
        }
    }
    rows
}

/// Adds packed rows to those of some tokens, which are `stride` apart.
pub(super) fn add_rows<T: Real>(
    (to, stride): (&mut [T], usize),
    tokens: &[u32],
    rows: &[T],
    width: usize,
) {
    simd::vectorised(
        #[inline(always)]
        || {
            for (token, row) in tokens.iter().zip(rows.chunks_exact(width.max(1))) {
                let start = *token as usize * stride;
                for (sum, number) in to[start..start + width].iter_mut().zip(row) {
                    *sum += *number;
                }
            }
        },
    );
}
