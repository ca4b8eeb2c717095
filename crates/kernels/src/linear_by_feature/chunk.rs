//! The positions of a chunk in the order of the walk, what is left on the ways between them, and the sums that are carried
//! past them.

use super::Sizes;
use crate::host;
use crate::product::{Into, Matrix, Threads, multiply};
use crate::simd::{self, Real};
use std::ops::Range;

/// Positions that meet one by one instead of half by half.
pub(super) const FEW: usize = 8;

/// What a chunk's positions have, in the order of the walk, row by row.
pub(super) struct Chunk<T> {
    pub(super) rows: usize,
    pub(super) features: usize,
    pub(super) value_width: usize,
    pub(super) q: Vec<T>,
    pub(super) k: Vec<T>,
    pub(super) v: Vec<T>,
    /// The decay `e^a` between each position and the one before it; 1 before the first of all.
    pub(super) fade: Vec<T>,
}

/// What is left of each feature on a way, `[rows, features]`.
pub(super) struct Fades<T> {
    /// From before the first row to each row.
    pub(super) reach: Vec<T>,
    /// From each row to the last.
    pub(super) rest: Vec<T>,
}

/// Some columns of some rows, one row after the other.
pub(super) fn picked<T: Real>(
    from: Matrix<T>,
    columns: Range<usize>,
    rows: impl Iterator<Item = usize>,
) -> Vec<T> {
    let mut picked = Vec::new();
    for row in rows {
        let start = row * from.row_stride;
        if from.column_stride == 1 {
            picked.extend_from_slice(&from.data[start + columns.start..start + columns.end]);
        } else {
            let columns = columns.clone();
            picked.extend(columns.map(|column| from.data[start + column * from.column_stride]));
        }
    }
    picked
}

/// Where a row lies.
#[inline(always)]
pub(super) fn row(index: usize, width: usize) -> Range<usize> {
    index * width..(index + 1) * width
}

/// `x ⊙ y`.
pub(super) fn scaled<T: Real>(x: &[T], y: &[T]) -> Vec<T> {
    let mut product = x.to_vec();
    simd::vectorised(
        #[inline(always)]
        || times(&mut product, y),
    );
    product
}

/// `x ⊙= y`.
#[inline(always)]
pub(super) fn times<T: Real>(x: &mut [T], y: &[T]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x *= *y;
    }
}

/// `x += y ⊙ z`.
#[inline(always)]
pub(super) fn add_product<T: Real>(x: &mut [T], y: &[T], z: &[T]) {
    for ((x, y), z) in x.iter_mut().zip(y).zip(z) {
        *x = y.mul_add(*z, *x);
    }
}

/// Adds `y ⊙ z` to rows `x`.
pub(super) fn add_scaled_rows<T: Real>(x: &mut [T], y: &[T], z: &[T]) {
    simd::vectorised(
        #[inline(always)]
        || add_product(x, y, z),
    );
}

impl<T: Real> Chunk<T> {
    /// `[rows, width]` of one of its vectors.
    pub(super) fn part<'b>(x: &'b [T], rows: &Range<usize>, width: usize) -> &'b [T] {
        &x[rows.start * width..rows.end * width]
    }

    pub(super) fn matrix<'b>(x: &'b [T], rows: &Range<usize>, width: usize) -> Matrix<'b, T> {
        Matrix::packed(Self::part(x, rows, width), rows.len(), width)
    }

    /// Products of decays from before the first of some rows to each of them.
    pub(super) fn reach(&self, rows: &Range<usize>) -> Vec<T> {
        let features = self.features;
        let mut reach = Self::part(&self.fade, rows, features).to_vec();
        simd::vectorised(
            #[inline(always)]
            || {
                for row in 1..rows.len() {
                    let (before, here) = reach.split_at_mut(row * features);
                    times(&mut here[..features], &before[(row - 1) * features..]);
                }
            },
        );
        reach
    }

    /// Products of decays from each of some rows to the last of them.
    pub(super) fn rest(&self, rows: &Range<usize>) -> Vec<T> {
        let features = self.features;
        let mut rest = vec![T::one(); rows.len() * features];
        simd::vectorised(
            #[inline(always)]
            || {
                for row in (1..rows.len()).rev() {
                    let (before, here) = rest.split_at_mut(row * features);
                    let before = &mut before[(row - 1) * features..];
                    before.copy_from_slice(&here[..features]);
                    times(before, &self.fade[self::row(rows.start + row, features)]);
                }
            },
        );
        rest
    }

    pub(super) fn fades(&self) -> Fades<T> {
        let rows = 0..self.rows;
        Fades {
            reach: self.reach(&rows),
            rest: self.rest(&rows),
        }
    }

    /// What is left of each feature from before the first row to the last.
    pub(super) fn across<'b>(&self, fades: &'b Fades<T>) -> &'b [T] {
        &fades.reach[(self.rows - 1) * self.features..]
    }

    /// Adds to `y` `[rows, value_width]` what some rows get from each other.
    pub(super) fn within(&self, rows: Range<usize>, y: &mut [T]) {
        if rows.len() <= FEW {
            return self.one_by_one(rows, y);
        }
        let middle = rows.start + rows.len() / 2;
        let (earlier, later) = (rows.start..middle, middle..rows.end);
        self.within(earlier.clone(), y);
        self.within(later.clone(), y);
        let halves = Halves::new(self, earlier, later);
        let width = self.value_width;
        multiply(
            &mut y[halves.later.start * width..halves.later.end * width],
            width,
            Into::Add,
            T::one(),
            halves.scores(),
            Self::matrix(&self.v, &halves.earlier, width),
            Threads::One,
        );
    }

    fn one_by_one(&self, rows: Range<usize>, y: &mut [T]) {
        let (features, width) = (self.features, self.value_width);
        let mut faded = vec![T::zero(); features];
        simd::vectorised(
            #[inline(always)]
            || {
                for i in rows.clone() {
                    faded.copy_from_slice(&self.q[row(i, features)]);
                    for j in (rows.start..=i).rev() {
                        let score = simd::dot(&faded, &self.k[row(j, features)]);
                        simd::add_scaled(&mut y[row(i, width)], &self.v[row(j, width)], score);
                        times(&mut faded, &self.fade[row(j, features)]);
                    }
                }
            },
        );
    }
}

/// Later rows that meet earlier ones right before them.
pub(super) struct Halves<T> {
    pub(super) earlier: Range<usize>,
    pub(super) later: Range<usize>,
    /// What is left from the middle to each later row, `[later, features]`, and of each earlier row there.
    pub(super) reach: Vec<T>,
    pub(super) rest: Vec<T>,
    /// Queries and keys by these.
    pub(super) q: Vec<T>,
    pub(super) k: Vec<T>,
    pub(super) scores: Vec<T>,
}

impl<T: Real> Halves<T> {
    pub(super) fn new(chunk: &Chunk<T>, earlier: Range<usize>, later: Range<usize>) -> Self {
        let features = chunk.features;
        let (reach, rest) = (chunk.reach(&later), chunk.rest(&earlier));
        let q = scaled(Chunk::part(&chunk.q, &later, features), &reach);
        let k = scaled(Chunk::part(&chunk.k, &earlier, features), &rest);
        let mut scores = host::unwritten::<T>(later.len() * earlier.len());
        multiply(
            &mut scores,
            earlier.len(),
            Into::Replace,
            T::one(),
            Matrix::packed(&q, later.len(), features),
            Matrix::packed(&k, earlier.len(), features).transposed(),
            Threads::One,
        );
        Self {
            earlier,
            later,
            reach,
            rest,
            q,
            k,
            scores,
        }
    }

    /// `[later, earlier]`.
    pub(super) fn scores(&self) -> Matrix<'_, T> {
        Matrix::packed(&self.scores, self.later.len(), self.earlier.len())
    }
}

/// `Σ … k_j v_jᵀ`, or the same of queries and gradients, `[features, width]`.
pub(super) struct State<T> {
    pub(super) sums: Vec<T>,
    pub(super) features: usize,
    pub(super) width: usize,
}

impl<T: Real> State<T> {
    pub(super) fn new(sizes: &Sizes) -> Self {
        Self {
            sums: vec![T::zero(); sizes.features * sizes.value_width],
            features: sizes.features,
            width: sizes.value_width,
        }
    }

    pub(super) fn matrix(&self) -> Matrix<'_, T> {
        Matrix::packed(&self.sums, self.features, self.width)
    }

    /// Lets each feature fade, and adds rows `x` `[rows, features]` with what belongs to them.
    pub(super) fn add(&mut self, across: &[T], x: &[T], of: Matrix<T>) {
        let width = self.width;
        simd::vectorised(
            #[inline(always)]
            || {
                let features = self.sums.chunks_exact_mut(width.max(1));
                for (sums, &across) in features.zip(across) {
                    for sum in sums {
                        *sum *= across;
                    }
                }
            },
        );
        multiply(
            &mut self.sums,
            width,
            Into::Add,
            T::one(),
            Matrix::packed(x, of.rows, self.features).transposed(),
            of,
            Threads::One,
        );
    }
}
