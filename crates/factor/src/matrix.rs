//! The door between tensors and matrices.

use lapidary_kernels::{DType, Device, Tensor};

use crate::{Error, Result};

/// A dense matrix in `f64`.
pub type Matrix = faer::Mat<f64>;
/// A borrowed [`Matrix`], possibly strided or transposed.
pub type MatrixView<'a> = faer::MatRef<'a, f64>;

/// Reads a two-dimensional tensor of any float type as a matrix in `f64`.
///
/// `name` is what an error calls the tensor. Refuses other shapes, empty dimensions and entries
/// that are not finite.
pub fn matrix_from_tensor(name: &'static str, tensor: &Tensor) -> Result<Matrix> {
    let (rows, columns) = match *tensor.dims() {
        [rows, columns] if rows > 0 && columns > 0 => (rows, columns),
        _ => {
            return Err(Error::NotMatrix {
                name,
                found: tensor.dims().to_vec(),
            });
        }
    };
    let values = values_of(tensor)?;
    if let Some((index, &value)) = values.iter().enumerate().find(|(_, v)| !v.is_finite()) {
        return Err(Error::NotFinite {
            name,
            value,
            position: (index / columns, index % columns),
        });
    }
    Ok(from_row_major(&values, rows, columns))
}

/// A matrix whose columns lie one after the other, of values whose rows do: by tiles, so that neither
/// side is far from what was read just before.
fn from_row_major(values: &[f64], rows: usize, columns: usize) -> Matrix {
    const TILE: usize = 32;
    let mut matrix = Matrix::zeros(rows, columns);
    for top in (0..rows).step_by(TILE) {
        for left in (0..columns).step_by(TILE) {
            for column in left..(left + TILE).min(columns) {
                for row in top..(top + TILE).min(rows) {
                    matrix[(row, column)] = values[row * columns + column];
                }
            }
        }
    }
    matrix
}

/// Writes a matrix as a tensor `[rows, columns]`, rounding once to `dtype`.
pub fn matrix_to_tensor(
    matrix: MatrixView<'_>,
    dtype: DType,
    device: &Device,
) -> lapidary_kernels::Result<Tensor> {
    let (rows, columns) = (matrix.nrows(), matrix.ncols());
    let mut values: Vec<f64> = Vec::with_capacity(rows * columns);
    for row in 0..rows {
        values.extend(matrix.row(row).iter());
    }
    Ok(Tensor::from_vec(values, (rows, columns), device)?.to_dtype(dtype)?)
}

/// The square root of the sum of the squared entries.
pub fn frobenius_norm(matrix: MatrixView<'_>) -> f64 {
    matrix.norm_l2()
}

fn values_of(tensor: &Tensor) -> lapidary_kernels::Result<Vec<f64>> {
    Ok(tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?)
}
