//! The passes over one head.

use super::{Factored, Head, Sizes, Slopes};
use crate::host;
use crate::product::{Into, Matrix, Repeated, Threads, multiply};
use crate::simd::{self, Real};
use std::ops::Range;

/// Rows whose distances are taken at one time.
const BLOCK: usize = 64;

/// A product on this thread.
fn product<T: Real>(result: &mut [T], into: Into, a: Matrix<T>, b: Matrix<T>) {
    multiply(result, b.columns, into, T::one(), a, b, Threads::One);
}

/// The product of two matrices, packed.
fn made<T: Real>(a: Matrix<T>, b: Matrix<T>) -> Vec<T> {
    let mut result = host::unwritten::<T>(a.rows * b.columns);
    product(&mut result, Into::Replace, a, b);
    result
}

impl<'a, T: Real> Head<'a, T> {
    /// Of queries, landmarks with the middle beside them, and values.
    pub(super) fn new(
        operation: &'a Factored,
        index: usize,
        [q, both, v]: [Matrix<'a, T>; 3],
    ) -> Self {
        let sizes = operation.sizes;
        let Sizes {
            width,
            count,
            length,
            ..
        } = sizes;
        let (row_stride, column_stride) = (both.row_stride, both.column_stride);
        let row = |at: usize| {
            (0..width).map(move |column| both.data[at * row_stride + column * column_stride])
        };
        let mut centre = vec![T::zero(); width];
        for at in 0..count {
            for (sum, x) in centre.iter_mut().zip(row(at)) {
                *sum += x;
            }
        }
        let share = T::of(1.0 / count.max(1) as f64);
        centre.iter_mut().for_each(|sum| *sum *= share);
        let mut landmarks = Vec::with_capacity(count * width);
        for at in 0..count {
            landmarks.extend(row(at).zip(&centre).map(|(x, c)| x - *c));
        }
        let squares = landmarks.chunks_exact(width.max(1));
        let squares = squares.map(|row| simd::dot(row, row)).collect();
        let sequence = index / sizes.heads.max(1);
        Self {
            sizes,
            rate: T::of(operation.rate),
            q,
            v,
            centre,
            landmarks,
            squares,
            middle: Matrix {
                data: both.data.get(width * column_stride..).unwrap_or(&[]),
                columns: count,
                ..both
            },
            kept: operation
                .kept
                .as_deref()
                .map(|all| &all[sequence * length..(sequence + 1) * length]),
        }
    }

    fn landmarks(&self) -> Matrix<'_, T> {
        Matrix::packed(&self.landmarks, self.sizes.count, self.sizes.width)
    }

    /// A matrix `[count, value_width]`.
    fn small<'b>(&self, data: &'b [T]) -> Matrix<'b, T> {
        Matrix::packed(data, self.sizes.count, self.sizes.value_width)
    }

    /// Where blocks of rows start and end.
    fn blocks(&self) -> impl Iterator<Item = Range<usize>> + use<T> {
        let length = self.sizes.length;
        (0..length)
            .step_by(BLOCK)
            .map(move |start| start..length.min(start + BLOCK))
    }

    /// Queries of a block without the centre, `[rows, width]`.
    fn centred<'b>(&self, range: &Range<usize>, into: &'b mut [T]) -> &'b [T] {
        let width = self.sizes.width;
        let q = self.q.part_of_rows(range);
        let into = &mut into[..range.len() * width];
        simd::vectorised(
            #[inline(always)]
            || {
                for (row, to) in into.chunks_exact_mut(width.max(1)).enumerate() {
                    let start = row * q.row_stride;
                    if q.column_stride == 1 {
                        let from = &q.data[start..start + width];
                        for ((to, x), c) in to.iter_mut().zip(from).zip(&self.centre) {
                            *to = *x - *c;
                        }
                    } else {
                        for (column, (to, c)) in to.iter_mut().zip(&self.centre).enumerate() {
                            *to = q.data[start + column * q.column_stride] - *c;
                        }
                    }
                }
            },
        );
        into
    }

    /// `P` `[length, count]`.
    fn kernel(&self) -> Vec<T> {
        let Sizes {
            length,
            width,
            count,
            ..
        } = self.sizes;
        let mut kernel = host::unwritten::<T>(length * count);
        let mut rows = host::unwritten::<T>(BLOCK * width);
        // Every block meets all landmarks.
        let landmarks = Repeated::new(self.landmarks().transposed(), length);
        for range in self.blocks() {
            let q = self.centred(&range, &mut rows);
            let tile = &mut kernel[range.start * count..range.end * count];
            let a = Matrix::packed(q, range.len(), width);
            landmarks.multiply_whole(tile, Into::Replace, T::of(2.0), a);
            simd::vectorised(
                #[inline(always)]
                || {
                    let rows = tile.chunks_exact_mut(count.max(1));
                    for (row, q) in rows.zip(q.chunks_exact(width.max(1))) {
                        let square = simd::dot(q, q);
                        for (value, other) in row.iter_mut().zip(&self.squares) {
                            // Rounding must not make a distance negative.
                            let near = *value - square - *other;
                            let near = if near > T::zero() { T::zero() } else { near };
                            *value = (self.rate * near).exp_of_negative();
                        }
                    }
                },
            );
            for (row, &keep) in self
                .kept
                .iter()
                .flat_map(|kept| kept[range.clone()].iter().enumerate())
            {
                if keep == 0 {
                    tile[row * count..(row + 1) * count].fill(T::zero());
                }
            }
        }
        kernel
    }

    pub(super) fn forward(&self, y: &mut [T]) {
        let Sizes {
            length,
            count,
            value_width,
            ..
        } = self.sizes;
        let kernel = self.kernel();
        let kernel = Matrix::packed(&kernel, length, count);
        let collected = made(kernel.transposed(), self.v);
        let spread = made(self.middle, Matrix::packed(&collected, count, value_width));
        product(
            y,
            Into::Replace,
            kernel,
            Matrix::packed(&spread, count, value_width),
        );
    }

    pub(super) fn backward(&self, gradient: Matrix<T>, slopes: Slopes<'_, T>) {
        let Sizes {
            length,
            width,
            count,
            ..
        } = self.sizes;
        let values = self.kernel();
        let kernel = Matrix::packed(&values, length, count);
        let collected = made(kernel.transposed(), self.v);
        let of_spread = made(kernel.transposed(), gradient);
        let spread = made(self.middle, self.small(&collected));
        let of_collected = made(self.middle.transposed(), self.small(&of_spread));
        product(slopes.v, Into::Replace, kernel, self.small(&of_collected));

        let [of_y, of_v] =
            [&spread, &of_collected].map(|of| Repeated::new(self.small(of).transposed(), length));
        let landmarks = Repeated::new(self.landmarks(), length);
        let mut tile = host::unwritten::<T>(BLOCK * count);
        let mut rows = host::unwritten::<T>(BLOCK * width);
        let mut of_landmarks = vec![T::zero(); count * width];
        let mut of_columns = vec![T::zero(); count];
        let twice = self.rate + self.rate;
        for range in self.blocks() {
            let tile = &mut tile[..range.len() * count];
            let g = gradient.part_of_rows(&range);
            of_y.multiply_whole(tile, Into::Replace, T::one(), g);
            let v = self.v.part_of_rows(&range);
            of_v.multiply_whole(tile, Into::Add, T::one(), v);
            let mut of_rows = [T::zero(); BLOCK];
            let kernel = &values[range.start * count..range.end * count];
            simd::vectorised(
                #[inline(always)]
                || {
                    for (w, k) in tile.iter_mut().zip(kernel) {
                        *w *= *k;
                    }
                    for (row, total) in tile.chunks_exact(count.max(1)).zip(&mut of_rows) {
                        *total = simd::sum(row);
                        for (column, w) in of_columns.iter_mut().zip(row) {
                            *column += *w;
                        }
                    }
                },
            );
            let weights = Matrix::packed(tile, range.len(), count);
            let q = self.centred(&range, &mut rows);
            let of_q = &mut slopes.q[range.start * width..range.end * width];
            landmarks.multiply_whole(of_q, Into::Replace, T::one(), weights);
            let packed = Matrix::packed(q, range.len(), width);
            product(&mut of_landmarks, Into::Add, weights.transposed(), packed);
            simd::vectorised(
                #[inline(always)]
                || {
                    let rows = of_q.chunks_exact_mut(width.max(1));
                    for ((slope, q), &total) in rows.zip(q.chunks_exact(width.max(1))).zip(&of_rows)
                    {
                        for (slope, &q) in slope.iter_mut().zip(q) {
                            *slope = twice * (*slope - total * q);
                        }
                    }
                },
            );
        }
        let of_middle = made(self.small(&of_spread), self.small(&collected).transposed());
        let each = slopes
            .both
            .chunks_exact_mut((width + count).max(1))
            .enumerate();
        for (landmark, row) in each {
            let (point, middle) = row.split_at_mut(width);
            let here = landmark * width..(landmark + 1) * width;
            let mixed = of_landmarks[here.clone()].iter().zip(&self.landmarks[here]);
            for (to, (mixed, l)) in point.iter_mut().zip(mixed) {
                *to = twice * (*mixed - of_columns[landmark] * *l);
            }
            middle.copy_from_slice(&of_middle[landmark * count..(landmark + 1) * count]);
        }
    }
}
