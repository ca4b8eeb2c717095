//! Matrix products of strided views: those in `f32` blocked here unless a side is very short, all
//! others by the `gemm` crate.

mod blocked;

use crate::host::Shared;
use crate::simd::Real;
use blocked::{Panels, Right};
use std::ops::Range;

/// A strided matrix inside a slice.
#[derive(Clone, Copy)]
pub(crate) struct Matrix<'a, T> {
    pub(crate) data: &'a [T],
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(crate) row_stride: usize,
    pub(crate) column_stride: usize,
}

impl<'a, T> Matrix<'a, T> {
    /// A matrix whose rows lie one after the other.
    pub(crate) fn packed(data: &'a [T], rows: usize, columns: usize) -> Self {
        Self::spaced(data, rows, columns, columns)
    }

    /// A matrix whose rows start `row_stride` apart.
    pub(crate) fn spaced(data: &'a [T], rows: usize, columns: usize, row_stride: usize) -> Self {
        Self {
            data,
            rows,
            columns,
            row_stride,
            column_stride: 1,
        }
    }

    pub(crate) fn transposed(self) -> Self {
        Self {
            data: self.data,
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
        }
    }

    pub(crate) fn part_of_rows(self, range: &Range<usize>) -> Self {
        Self {
            data: self
                .data
                .get(range.start * self.row_stride..)
                .unwrap_or(&[]),
            rows: range.len(),
            ..self
        }
    }

    pub(crate) fn part_of_columns(self, range: &Range<usize>) -> Self {
        let start = range.start * self.column_stride;
        Self {
            data: self.data.get(start..).unwrap_or(&[]),
            columns: range.len(),
            ..self
        }
    }

    /// The same matrix, if it is of `f32`.
    fn single(self) -> Option<Matrix<'a, f32>>
    where
        T: Real,
    {
        Some(Matrix {
            data: T::single(self.data)?,
            rows: self.rows,
            columns: self.columns,
            row_stride: self.row_stride,
            column_stride: self.column_stride,
        })
    }
}

/// One past the last element that a strided matrix touches.
fn extent(rows: usize, columns: usize, row_stride: usize, column_stride: usize) -> usize {
    if rows == 0 || columns == 0 {
        0
    } else {
        (rows - 1) * row_stride + (columns - 1) * column_stride + 1
    }
}

/// What happens to the values already in the result of a product.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Into {
    /// They are not read.
    Replace,
    /// The product is added to them.
    Add,
}

/// How many threads a product may use.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Threads {
    One,
    All,
}

/// Multiplications below which a product stays on one thread.
const PARALLEL_PRODUCT: usize = 1 << 19;

/// Rows and columns from which on a product is worth its panels.
const BLOCKED_ROWS: usize = 8;
const BLOCKED_COLUMNS: usize = 16;

/// [`multiply`] in blocks, shared among all threads: by rows where there are more of them than
/// columns, so that what each thread has to copy for itself is the smaller operand.
fn multiply_blocked(
    result: &mut [f32],
    row_stride: usize,
    into: Into,
    scale: f32,
    a: Matrix<f32>,
    b: Matrix<f32>,
) {
    let by_rows = a.rows >= b.columns;
    let (count, unit) = match by_rows {
        true => (a.rows, blocked::TILE_ROWS),
        false => (b.columns, blocked::PANEL_COLUMNS),
    };
    let threads = rayon::current_num_threads().max(1);
    let each = count.div_ceil(threads).next_multiple_of(unit);
    let shared = Shared::new(result);
    let part = |range: Range<usize>| {
        let (start, a, b) = match by_rows {
            true => (range.start * row_stride, a.part_of_rows(&range), b),
            false => (range.start, a, b.part_of_columns(&range)),
        };
        let task = blocked::Task {
            result: shared.pointer(start, extent(a.rows, b.columns, row_stride, 1)),
            row_stride,
            add: into == Into::Add,
            scale,
            a,
            b: Right::Plain(b),
        };
        // SAFETY: parts are disjoint rows or columns of a result that is borrowed exclusively.
        unsafe { task.run() }
    };
    let parts = count.div_ceil(each);
    in_parallel(0..parts, &|index| {
        part(index * each..((index + 1) * each).min(count));
    });
}

/// Calls `body` on every index, each in a task of its own.
fn in_parallel(range: Range<usize>, body: &(impl Fn(usize) + Sync)) {
    if range.len() <= 1 {
        return range.for_each(body);
    }
    let middle = range.start + range.len() / 2;
    rayon::join(
        || in_parallel(range.start..middle, body),
        || in_parallel(middle..range.end, body),
    );
}

/// Operands in `f32` whose product is worth its panels. How a number is summed depends on the
/// sizes alone, never on the threads.
fn blockable<'a, T: Real>(
    a: Matrix<'a, T>,
    b: Matrix<'a, T>,
) -> Option<(Matrix<'a, f32>, Matrix<'a, f32>)> {
    // Few rows pay for panels only where threads share them out.
    let large = a.rows * a.columns * b.columns >= PARALLEL_PRODUCT;
    let rows = if large {
        BLOCKED_ROWS
    } else {
        2 * BLOCKED_ROWS
    };
    // Blocks of an empty inner dimension would leave the result unwritten.
    let worth = a.columns > 0 && a.rows >= rows && b.columns >= BLOCKED_COLUMNS;
    worth.then(|| a.single().zip(b.single())).flatten()
}

/// `result (+)= scale · a b`, where rows of `result` start `row_stride` apart.
pub(crate) fn multiply<T: Real>(
    result: &mut [T],
    row_stride: usize,
    into: Into,
    scale: T,
    a: Matrix<T>,
    b: Matrix<T>,
    threads: Threads,
) {
    assert!(extent(a.rows, b.columns, row_stride, 1) <= result.len());
    let parallel = threads == Threads::All && a.rows * a.columns * b.columns >= PARALLEL_PRODUCT;
    if parallel
        && let Some((a, b)) = blockable(a, b)
        && let Some(result) = T::single_mut(result)
    {
        return multiply_blocked(result, row_stride, into, scale.to_f64() as f32, a, b);
    }
    // SAFETY: `result` is borrowed exclusively and large enough.
    unsafe { multiply_at(result.as_mut_ptr(), row_stride, into, scale, a, b, parallel) }
}

/// [`multiply`] into memory that other threads may hold the gaps of.
///
/// # Safety
/// `result` must be valid for `a.rows` rows of `b.columns` elements, `row_stride` apart, that
/// nobody else reads or writes meanwhile.
pub(crate) unsafe fn multiply_at<T: Real>(
    result: *mut T,
    row_stride: usize,
    into: Into,
    scale: T,
    a: Matrix<T>,
    b: Matrix<T>,
    parallel: bool,
) {
    if let Some((a, b)) = blockable(a, b) {
        let task = blocked::Task {
            result: result.cast::<f32>(),
            row_stride,
            add: into == Into::Add,
            scale: scale.to_f64() as f32,
            a,
            b: Right::Plain(b),
        };
        // SAFETY: by contract; both operands are of `f32`, and so is the result.
        return unsafe { task.run() };
    }
    let (m, k, n) = (a.rows, a.columns, b.columns);
    assert_eq!(k, b.rows, "inner dimensions of a product");
    assert!(extent(m, k, a.row_stride, a.column_stride) <= a.data.len());
    assert!(extent(k, n, b.row_stride, b.column_stride) <= b.data.len());
    // SAFETY: reads are in bounds as just checked, writes by contract.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            result,
            1,
            row_stride as isize,
            into == Into::Add,
            a.data.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
            T::one(),
            scale,
            false,
            false,
            false,
            if parallel {
                gemm::Parallelism::Rayon(0)
            } else {
                gemm::Parallelism::None
            },
        );
    }
}

/// The right operand of many products, which is copied into the shape that tiles read only once.
pub(crate) struct Repeated<'a, T> {
    matrix: Matrix<'a, T>,
    /// Where it is worth it.
    panels: Option<Panels>,
}

impl<'a, T: Real> Repeated<'a, T> {
    /// An operand for products with `rows` rows of left operands in all.
    pub(crate) fn new(matrix: Matrix<'a, T>, rows: usize) -> Self {
        Self::part(matrix, rows, matrix.columns)
    }

    /// As [`Repeated::new`] for a part of an operand of so many `columns`, which meets a part of so many
    /// `rows`: the whole decides what is worth it, so that a number is summed in the same order whichever part
    /// a thread has.
    pub(crate) fn part(matrix: Matrix<'a, T>, rows: usize, columns: usize) -> Self {
        let worth = rows >= BLOCKED_ROWS && columns >= BLOCKED_COLUMNS;
        let panels = worth.then(|| matrix.single()).flatten().map(Panels::new);
        Self { matrix, panels }
    }

    /// Columns that a part of the operand best begins at a multiple of.
    pub(crate) const COLUMNS: usize = blocked::PANEL_COLUMNS;

    /// `result (+)= scale · a b` for the given rows and columns of the operand `b`, on this thread; rows of `result`
    /// start `row_stride` apart.
    pub(crate) fn multiply(
        &self,
        result: &mut [T],
        row_stride: usize,
        into: Into,
        scale: T,
        a: Matrix<T>,
        part: (Range<usize>, Range<usize>),
    ) {
        assert!(extent(a.rows, part.1.len(), row_stride, 1) <= result.len());
        // SAFETY: the result is borrowed exclusively and large enough.
        unsafe { self.multiply_at((result.as_mut_ptr(), row_stride), into, scale, a, part) }
    }

    /// [`multiply`] of `a` and the operand, on this thread, into rows that lie one after the other.
    pub(crate) fn multiply_whole(&self, result: &mut [T], into: Into, scale: T, a: Matrix<T>) {
        let Matrix { rows, columns, .. } = self.matrix;
        assert_eq!(result.len(), a.rows * columns);
        let to = (result.as_mut_ptr(), columns);
        // SAFETY: the result is borrowed exclusively and as large as the product.
        unsafe { self.multiply_at(to, into, scale, a, (0..rows, 0..columns)) }
    }

    /// [`multiply_at`] of `a` and the given rows and columns of the operand, on this thread.
    ///
    /// # Safety
    /// As [`multiply_at`].
    pub(crate) unsafe fn multiply_at(
        &self,
        (result, row_stride): (*mut T, usize),
        into: Into,
        scale: T,
        a: Matrix<T>,
        (rows, columns): (Range<usize>, Range<usize>),
    ) {
        if let (Some(panels), Some(a)) = (&self.panels, a.single())
            && panels.begins(columns.start)
        {
            let task = blocked::Task {
                result: result.cast::<f32>(),
                row_stride,
                add: into == Into::Add,
                scale: scale.to_f64() as f32,
                a,
                b: Right::Packed(panels, rows, columns),
            };
            // SAFETY: by contract; the operands are of `f32`, and so is the result.
            return unsafe { task.run() };
        }
        let b = self.matrix.part_of_rows(&rows).part_of_columns(&columns);
        // SAFETY: by contract.
        unsafe { multiply_at(result, row_stride, into, scale, a, b, false) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(count: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / 8_388_608.0 - 1.0
        };
        (0..count).map(|_| next()).collect()
    }

    /// `(rows, inner, columns)`: tiles and panels that are whole, cut short, and deeper than a
    /// block.
    const SIZES: [(usize, usize, usize); 7] = [
        (8, 1, 48),
        (13, 70, 37),
        (64, 384, 96),
        (9, 385, 400),
        (100, 800, 17),
        (17, 5, 1000),
        (130, 129, 128),
    ];

    #[test]
    fn blocked_products_equal_sums_in_double_precision() {
        for (m, k, n) in SIZES {
            let (x, y) = (numbers(m * k, 1), numbers(k * n, 2));
            for transposed in [(false, false), (false, true), (true, false), (true, true)] {
                let a = match transposed.0 {
                    false => Matrix::packed(&x, m, k),
                    true => Matrix::packed(&x, k, m).transposed(),
                };
                let b = match transposed.1 {
                    false => Matrix::packed(&y, k, n),
                    true => Matrix::packed(&y, n, k).transposed(),
                };
                let expected = |i: usize, j: usize| -> f64 {
                    (0..k)
                        .map(|p| {
                            let a = a.data[i * a.row_stride + p * a.column_stride];
                            let b = b.data[p * b.row_stride + j * b.column_stride];
                            f64::from(a) * f64::from(b)
                        })
                        .sum()
                };
                for (into, scale) in [(Into::Replace, 1.0), (Into::Add, -0.5)] {
                    // Rows of the result lie apart; what is between them stays.
                    let stride = n + 3;
                    let mut result = vec![7f32; m * stride];
                    multiply_blocked(&mut result, stride, into, scale, a, b);
                    for (i, row) in result.chunks(stride).enumerate() {
                        assert_eq!(row[n..], [7.0; 3]);
                        for (j, found) in row[..n].iter().enumerate() {
                            let start = if into == Into::Add { 7.0 } else { 0.0 };
                            let expected = start + f64::from(scale) * expected(i, j);
                            let error = (f64::from(*found) - expected).abs();
                            assert!(error < 1e-4, "{m} {k} {n} {transposed:?}: {error}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_product_of_nothing_is_zero() {
        let mut result = vec![7f32; 20 * 30];
        let (a, b) = (Matrix::packed(&[], 20, 0), Matrix::packed(&[], 0, 30));
        multiply(&mut result, 30, Into::Add, 1.0, a, b, Threads::All);
        assert_eq!(result, [7.0; 600]);
        multiply(&mut result, 30, Into::Replace, 1.0, a, b, Threads::All);
        assert_eq!(result, [0.0; 600]);
    }

    #[test]
    fn rows_that_are_one_and_the_same_multiply() {
        let (rows, inner, columns) = (20, 70, 33);
        let (x, y) = (numbers(rows * inner, 1), numbers(columns, 2));
        let a = Matrix::packed(&x, rows, inner);
        // One column more than whole registers, however wide these are.
        let b = Matrix::spaced(&y, inner, columns, 0);
        let mut result = vec![f32::NAN; rows * columns];
        multiply(&mut result, columns, Into::Replace, 1.0, a, b, Threads::One);
        for (x, row) in x.chunks(inner).zip(result.chunks(columns)) {
            let sum: f64 = x.iter().map(|x| f64::from(*x)).sum();
            for (y, found) in y.iter().zip(row) {
                assert!((sum * f64::from(*y) - f64::from(*found)).abs() < 1e-4);
            }
        }
    }

    #[test]
    fn a_repeated_operand_multiplies_in_parts() {
        let (rows, inner, columns) = (21, 70, 200);
        let (x, y) = (numbers(rows * inner, 1), numbers(inner * columns, 2));
        let b = Matrix::packed(&y, inner, columns);
        let repeated = Repeated::new(b, rows);
        for (depth, part) in [
            (0..inner, 0..columns),
            (10..33, 48..96),
            (5..70, 144..171),
            (0..64, 7..60),
        ] {
            let a = Matrix::spaced(&x, rows, depth.len(), inner);
            let size = rows * part.len();
            let [mut found, mut expected] = [vec![1f32; size], vec![1f32; size]];
            let to = (found.as_mut_ptr(), part.len());
            // SAFETY: the result is as large and nobody else's.
            unsafe {
                repeated.multiply_at(to, Into::Add, 0.5, a, (depth.clone(), part.clone()));
            }
            let b = b.part_of_rows(&depth).part_of_columns(&part);
            multiply(
                &mut expected,
                part.len(),
                Into::Add,
                0.5,
                a,
                b,
                Threads::One,
            );
            for (found, expected) in found.iter().zip(&expected) {
                assert!((found - expected).abs() < 1e-4, "{depth:?} {part:?}");
            }
        }
    }

    #[test]
    fn a_product_does_not_depend_on_the_number_of_threads() {
        let (x, y) = (numbers(300 * 500, 3), numbers(500 * 200, 4));
        let with = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
            pool.build().unwrap().install(|| {
                let mut result = vec![0f32; 300 * 200];
                let (a, b) = (Matrix::packed(&x, 300, 500), Matrix::packed(&y, 500, 200));
                multiply(&mut result, 200, Into::Replace, 1.0, a, b, Threads::All);
                result
            })
        };
        let one = with(1);
        assert!([2, 3, 7].into_iter().all(|threads| with(threads) == one));
    }
}
