//! Rows of one head at every size of blocks.

use crate::product::Matrix;
use crate::simd::{self, Real};

/// Rows `[length, width]` and, for each size of blocks, what stands for these: their mean, or their first row.
pub(super) struct Averaged<'a, T> {
    rows: Matrix<'a, T>,
    sizes: &'a [usize],
    /// Of each size `[blocks, width]`; nothing where rows stand for themselves.
    means: Vec<Vec<T>>,
    firsts: bool,
}

impl<'a, T: Real> Averaged<'a, T> {
    /// Of the first `length` rows, of which the numbers lie side by side.
    pub(super) fn new(x: Matrix<'a, T>, length: usize, sizes: &'a [usize], firsts: bool) -> Self {
        let mut averaged = Self {
            rows: x.part_of_rows(&(0..length)),
            sizes,
            means: vec![Vec::new(); sizes.len()],
            firsts,
        };
        if !firsts {
            averaged.average();
        }
        averaged
    }

    /// Sums of smaller blocks make those of larger ones.
    fn average(&mut self) {
        let (length, width) = (self.rows.rows, self.rows.columns);
        let (mut finer, mut sums) = (1, Vec::new());
        for (level, &size) in self.sizes.iter().enumerate().rev() {
            if size == 1 {
                continue;
            }
            let mut larger = vec![T::zero(); length.div_ceil(size) * width];
            simd::vectorised(
                #[inline(always)]
                || {
                    for at in 0..length.div_ceil(finer) {
                        let row = match finer {
                            1 => row(&self.rows, at),
                            _ => &sums[at * width..(at + 1) * width],
                        };
                        let block = at * finer / size;
                        simd::add_scaled(&mut larger[block * width..][..width], row, T::one());
                    }
                },
            );
            sums = larger;
            let mut means = sums.clone();
            for (block, mean) in means.chunks_exact_mut(width.max(1)).enumerate() {
                let share = self.share(block, size);
                mean.iter_mut().for_each(|x| *x *= share);
            }
            self.means[level] = means;
            finer = size;
        }
    }

    /// One over the rows of a block.
    fn share(&self, block: usize, size: usize) -> T {
        T::of(1.0 / size.min(self.rows.rows - block * size) as f64)
    }

    /// What stands for blocks of one of the sizes, `[blocks, width]`.
    pub(super) fn at(&self, level: usize) -> Matrix<'_, T> {
        let size = self.sizes[level];
        let blocks = self.rows.rows.div_ceil(size);
        match size > 1 && !self.firsts {
            true => Matrix::packed(&self.means[level], blocks, self.rows.columns),
            false => Matrix {
                rows: blocks,
                row_stride: self.rows.row_stride * size,
                ..self.rows
            },
        }
    }

    /// Adds to the gradients of rows what that of [`Averaged::at`] gives them.
    pub(super) fn give(&self, level: usize, slopes: &[T], to: &mut [T]) {
        let (size, width) = (self.sizes[level], self.rows.columns);
        let (step, share) = match self.firsts {
            true => (size, None),
            false => (1, Some(size)),
        };
        simd::vectorised(
            #[inline(always)]
            || {
                for at in (0..self.rows.rows).step_by(step) {
                    let block = at / size;
                    let share = share.map_or(T::one(), |size| self.share(block, size));
                    let from = &slopes[block * width..(block + 1) * width];
                    simd::add_scaled(&mut to[at * width..(at + 1) * width], from, share);
                }
            },
        );
    }
}

/// A row whose numbers lie side by side.
#[inline(always)]
pub(super) fn row<'a, T>(x: &Matrix<'a, T>, at: usize) -> &'a [T] {
    &x.data[at * x.row_stride..][..x.columns]
}
