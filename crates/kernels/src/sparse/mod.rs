//! Matrices of which many entries are zero, stored without them, and their products.
//!
//! | format | bytes for `z` entries of a matrix `[rows, columns]` |
//! |---|---|
//! | dense | `4 rows columns` |
//! | [`BitmapMatrix`] | `4 z`, a bit for each entry in words of 64, and `4 (rows + 1)` |
//! | [`CsrMatrix`] | `4 z`, `2 z` for columns (`4 z` from 65 537 columns on), and `4 (rows + 1)` |
//! | [`TwoOfFourMatrix`] | `2 rows columns`, and two bits for each of these entries |
//!
//! All hold `f32` on the CPU and are not differentiable: they are what a pruned matrix would take,
//! and how fast it would be, not what models are made of.

mod bitmap;
mod csr;
mod two_of_four;

pub use bitmap::BitmapMatrix;
pub use csr::CsrMatrix;
pub use two_of_four::TwoOfFourMatrix;

use crate::host::{self, Shared};
use crate::{DType, Device, Error, Result, Tensor};

/// Bytes that one matrix takes in each format.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SparseSizes {
    /// With its zeros.
    pub dense: usize,
    /// As a bit for each entry, and the entries that are not zero.
    pub bitmap: usize,
    /// As entries with their columns, row by row.
    pub csr: usize,
    /// As two of every four entries; absent where some four have more.
    pub two_of_four: Option<usize>,
}

impl SparseSizes {
    /// The sizes of a matrix `[rows, columns]` with so many entries that are not zero, each of
    /// `value` bytes; `fits` says whether no four neighbours of a row have more than two.
    pub fn of(rows: usize, columns: usize, entries: usize, value: usize, fits: bool) -> Self {
        let values = entries * value;
        let starts = START * (rows + 1);
        Self {
            dense: rows * columns * value,
            bitmap: values + rows * bitmap::words(columns) * bitmap::WORD / 8 + starts,
            csr: values + entries * csr::index_bytes(columns) + starts,
            two_of_four: fits.then(|| {
                rows * columns.div_ceil(4) * 2 * value + two_of_four::index_bytes(rows, columns)
            }),
        }
    }
}

/// Bytes of the place where a row starts.
const START: usize = 4;

/// From this many rows of `x` on, all of them are multiplied at once.
const TOGETHER: usize = 4;

/// A matrix that can be walked row by row.
trait Walk: Sync {
    fn shape(&self) -> (usize, usize);

    /// Calls `body` with the column and value of every entry of a row, in order.
    fn each(&self, row: usize, body: impl FnMut(usize, f32));

    /// A row times a vector.
    fn dot(&self, row: usize, x: &[f32]) -> f32;

    /// Entries of a row, roughly: what a row costs.
    fn work(&self) -> usize;
}

/// `y = x Wᵀ` of `x` `[.., columns]` and `W` `[rows, columns]`: `[.., rows]`.
fn product(kernel: &'static str, matrix: &impl Walk, x: &Tensor) -> Result<Tensor> {
    let (rows, columns) = matrix.shape();
    let mut dims = x.dims().to_vec();
    match dims.last_mut() {
        Some(last) if *last == columns && x.dtype() == DType::F32 => *last = rows,
        _ => {
            let expected = format!("f32 [.., {columns}]");
            return Err(Error::argument(
                kernel,
                "x",
                (x.dtype(), x.dims()),
                expected,
            ));
        }
    }
    let x = x.to_device(&Device::Cpu)?.flatten_all()?.to_vec1::<f32>()?;
    let count: usize = dims.iter().rev().skip(1).product();
    let y = match count < TOGETHER {
        true => one_by_one(matrix, &x, count),
        false => together(matrix, &x, count),
    };
    Ok(Tensor::from_vec(y, dims, &Device::Cpu)?)
}

fn one_by_one(matrix: &impl Walk, x: &[f32], count: usize) -> Vec<f32> {
    let (rows, columns) = matrix.shape();
    let mut y = vec![0f32; count * rows];
    for (x, y) in x
        .chunks(columns.max(1))
        .zip(y.chunks_mut(rows.max(1)))
        .take(count)
    {
        let shared = Shared::new(y);
        host::share(rows, matrix.work(), |range| {
            // SAFETY: ranges are disjoint.
            let part = unsafe { shared.part(range.start, range.len()) };
            for (row, y) in range.zip(part) {
                *y = matrix.dot(row, x);
            }
        });
    }
    y
}

/// Every entry meets its column of all rows of `x` at once.
fn together(matrix: &impl Walk, x: &[f32], count: usize) -> Vec<f32> {
    let (rows, columns) = matrix.shape();
    let by_column = transposed(x, count, columns); // [columns, count]
    let mut by_row = vec![0f32; rows * count]; // [rows, count]
    host::for_rows(
        &mut by_row,
        count,
        matrix.work(),
        #[inline(always)]
        |row, y| {
            matrix.each(
                row,
                #[inline(always)]
                |column, value| {
                    let x = &by_column[column * count..(column + 1) * count];
                    for (y, x) in y.iter_mut().zip(x) {
                        *y += value * x;
                    }
                },
            );
        },
    );
    transposed(&by_row, rows, count)
}

/// `[rows, columns]` as `[columns, rows]`.
fn transposed(x: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    let mut y = vec![0f32; x.len()];
    for (row, values) in x.chunks(columns.max(1)).enumerate() {
        for (column, value) in values.iter().enumerate() {
            y[column * rows + row] = *value;
        }
    }
    y
}

/// The shape and entries of a matrix that is to be stored otherwise.
fn dense(kernel: &'static str, matrix: &Tensor) -> Result<(usize, usize, Vec<f32>)> {
    let &[rows, columns] = matrix.dims() else {
        return Err(Error::argument(
            kernel,
            "matrix",
            matrix.dims(),
            "[rows, columns]",
        ));
    };
    if matrix.dtype() != DType::F32 || rows * columns > u32::MAX as usize {
        let expected = "f32, of fewer than 2³² entries";
        return Err(Error::argument(
            kernel,
            "matrix",
            (matrix.dtype(), matrix.dims()),
            expected,
        ));
    }
    let values = matrix.to_device(&Device::Cpu)?.flatten_all()?;
    Ok((rows, columns, values.to_vec1::<f32>()?))
}

/// The matrix with its zeros.
fn restored(matrix: &impl Walk) -> Result<Tensor> {
    let (rows, columns) = matrix.shape();
    let mut values = vec![0f32; rows * columns];
    for (row, values) in values.chunks_mut(columns.max(1)).enumerate().take(rows) {
        matrix.each(row, |column, value| values[column] = value);
    }
    Ok(Tensor::from_vec(values, (rows, columns), &Device::Cpu)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    /// `[rows, columns]` with about this share of zeros; at most `most` entries of each four.
    fn matrix(rows: usize, columns: usize, zeros: f64, most: usize, seed: u64) -> Tensor {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let mut values = Vec::with_capacity(rows * columns);
        for _ in 0..rows {
            let mut here = 0;
            for column in 0..columns {
                here = if column % 4 == 0 { 0 } else { here };
                let stays = here < most && !random.random_bool(zeros);
                here += usize::from(stays);
                values.push(match stays {
                    true => random.random_range(0.1f32..1.0),
                    false => 0.0,
                });
            }
        }
        Tensor::from_vec(values, (rows, columns), &Device::Cpu).unwrap()
    }

    fn largest_difference(a: &Tensor, b: &Tensor) -> f32 {
        let difference = (a - b).unwrap().abs().unwrap().flatten_all().unwrap();
        let all = difference.to_vec1::<f32>().unwrap();
        all.into_iter().fold(0.0, f32::max)
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

        #[test]
        fn every_format_gives_the_matrix_back_and_multiplies_as_it_does(
            rows in 1usize..40,
            columns in 1usize..150,
            count in 1usize..9,
            zeros in 0.0f64..1.0,
            seed in 0u64..1000,
        ) {
            let any = matrix(rows, columns, zeros, 4, seed);
            let narrow = matrix(rows, columns, zeros, 2, seed);
            let x = matrix(count, columns, 0.2, 4, seed + 1);
            let expected = |w: &Tensor| x.matmul(&w.t().unwrap()).unwrap();
            let csr = CsrMatrix::from_dense(&any).unwrap();
            let bitmap = BitmapMatrix::from_dense(&any).unwrap();
            let pairs = TwoOfFourMatrix::from_dense(&narrow).unwrap();
            for (w, back, y) in [
                (&any, csr.to_dense().unwrap(), csr.multiply(&x).unwrap()),
                (&any, bitmap.to_dense().unwrap(), bitmap.multiply(&x).unwrap()),
                (&narrow, pairs.to_dense().unwrap(), pairs.multiply(&x).unwrap()),
            ] {
                prop_assert_eq!(largest_difference(w, &back), 0.0);
                prop_assert!(largest_difference(&expected(w), &y) < 1e-4);
            }
        }

        #[test]
        fn sizes_are_those_of_what_is_held(
            rows in 1usize..30,
            columns in 1usize..150,
            zeros in 0.0f64..1.0,
            seed in 0u64..1000,
        ) {
            let w = matrix(rows, columns, zeros, 2, seed);
            let values = w.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let entries = values.iter().filter(|value| **value != 0.0).count();
            let sizes = SparseSizes::of(rows, columns, entries, 4, true);
            prop_assert_eq!(sizes.dense, 4 * rows * columns);
            prop_assert_eq!(sizes.csr, CsrMatrix::from_dense(&w).unwrap().bytes());
            prop_assert_eq!(sizes.bitmap, BitmapMatrix::from_dense(&w).unwrap().bytes());
            prop_assert_eq!(
                sizes.two_of_four,
                Some(TwoOfFourMatrix::from_dense(&w).unwrap().bytes())
            );
        }
    }

    #[test]
    fn wide_matrices_have_wide_columns() {
        let wide = matrix(2, 70_000, 0.999, 4, 1);
        let csr = CsrMatrix::from_dense(&wide).unwrap();
        let entries = csr.entries();
        assert_eq!(csr.bytes(), 8 * entries + 12);
        assert_eq!(largest_difference(&csr.to_dense().unwrap(), &wide), 0.0);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let full = matrix(3, 8, 0.0, 4, 2);
        let error = TwoOfFourMatrix::from_dense(&full).unwrap_err();
        assert!(error.to_string().contains("row 0"), "{error}");
        assert!(CsrMatrix::from_dense(&full.to_dtype(DType::F64).unwrap()).is_err());
        assert!(BitmapMatrix::from_dense(&full.flatten_all().unwrap()).is_err());
        let csr = CsrMatrix::from_dense(&full).unwrap();
        assert!(csr.multiply(&matrix(1, 7, 0.0, 4, 3)).is_err());
    }

    /// Sums of nothing are zeros.
    #[test]
    fn a_matrix_without_columns_multiplies() {
        let empty = |rows: usize| Tensor::zeros((rows, 0), DType::F32, &Device::Cpu).unwrap();
        let (csr, bitmap) = (
            CsrMatrix::from_dense(&empty(3)).unwrap(),
            BitmapMatrix::from_dense(&empty(3)).unwrap(),
        );
        let pairs = TwoOfFourMatrix::from_dense(&empty(3)).unwrap();
        for count in [2, 5] {
            let x = empty(count);
            for y in [csr.multiply(&x), bitmap.multiply(&x), pairs.multiply(&x)] {
                assert_eq!(y.unwrap().to_vec2::<f32>().unwrap(), vec![[0f32; 3]; count]);
            }
        }
        assert_eq!(csr.to_dense().unwrap().dims(), [3, 0]);
    }

    #[test]
    fn two_of_four_takes_half_the_values_and_an_eighth_of_their_bits() {
        let w = matrix(64, 64, 0.0, 2, 4);
        // 2048 values of 4 bytes, and 2048 indices of two bits.
        let bytes = TwoOfFourMatrix::from_dense(&w).unwrap().bytes();
        assert_eq!(bytes, 4 * 2048 + 512);
    }
}
