//! Matrix products of strided views, by the `gemm` crate.

use crate::simd::Real;

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
