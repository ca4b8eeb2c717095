//! `Σ x xᵀ` over many vectors, in double precision: what calibrations sum.

use crate::host::{self, Host, Shared};
use crate::product::{Into, Matrix, Threads, multiply};
use crate::{DType, Device, Error, Result, Tensor};

/// Vectors whose products are summed at a time.
const CHUNK: usize = 1024;

/// Columns of the sum that are made at a time.
const PANEL: usize = 256;

/// `Σ x xᵀ` `[width, width]` of vectors that come a batch at a time.
///
/// The sum is symmetric, so that little more than half of it is computed. All of it is in double
/// precision: of fewer vectors than numbers in each it is singular, and rounding to single precision
/// would give it negative eigenvalues.
///
/// ```
/// use lapidary_kernels::{Device, SecondMoment, Tensor};
/// let mut moment = SecondMoment::new(2);
/// moment.add(&Tensor::new(&[[1f32, 2.0], [0.0, 1.0]], &Device::Cpu)?)?;
/// moment.add(&Tensor::new(&[[3f32, 0.0]], &Device::Cpu)?)?;
/// assert_eq!(moment.sum()?.to_vec2::<f64>()?, [[10.0, 2.0], [2.0, 5.0]]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct SecondMoment {
    width: usize,
    /// `[width, width]`; valid from the first row of a column's panel on.
    sums: Vec<f64>,
}

impl SecondMoment {
    /// No vectors yet, of `width` numbers each.
    pub fn new(width: usize) -> Self {
        Self {
            width,
            sums: vec![0.0; width * width],
        }
    }

    /// Adds the vectors `x` `[vectors, width]`.
    ///
    /// # Errors
    /// For other shapes, and those of the tensor engine.
    pub fn add(&mut self, x: &Tensor) -> Result<()> {
        if x.dims().len() != 2 || x.dims().last() != Some(&self.width) {
            let expected = format!("[vectors, {}]", self.width);
            return Err(Error::argument("second moment", "x", x.dims(), expected));
        }
        let x = x.to_device(&Device::Cpu)?;
        let count = x.dim(0)?;
        for first in (0..count).step_by(CHUNK) {
            let chunk = x.narrow(0, first, CHUNK.min(count - first))?;
            let chunk = chunk.to_dtype(DType::F64)?;
            let read = Host::new(&chunk);
            self.add_chunk(&read.ordered::<f64>()?);
        }
        Ok(())
    }

    fn add_chunk(&mut self, x: &[f64]) {
        let width = self.width;
        let rows = x.len() / width.max(1);
        let mut products = host::unwritten::<f64>(width * PANEL.min(width));
        for first in (0..width).step_by(PANEL) {
            let columns = PANEL.min(width - first);
            // Entries above the diagonal's panel are those below it.
            let from_here = Matrix::spaced(&x[first..], rows, width - first, width);
            let panel = Matrix::spaced(&x[first..], rows, columns, width);
            let products = &mut products[..(width - first) * columns];
            multiply(
                products,
                columns,
                Into::Replace,
                1.0,
                from_here.transposed(),
                panel,
                Threads::All,
            );
            let sums = Shared::new(&mut self.sums);
            let products = &*products;
            host::share(width - first, columns, |range| {
                for row in range {
                    // SAFETY: rows are disjoint.
                    let sums = unsafe { sums.part((first + row) * width + first, columns) };
                    let products = &products[row * columns..(row + 1) * columns];
                    for (sum, product) in sums.iter_mut().zip(products) {
                        *sum += product;
                    }
                }
            });
        }
    }

    /// The sum, `[width, width]` in `f64`.
    ///
    /// # Errors
    /// Those of the tensor engine.
    pub fn sum(&self) -> Result<Tensor> {
        let width = self.width;
        let entry = |at: usize| {
            let (row, column) = (at / width, at % width);
            self.sums[row.max(column) * width + row.min(column)]
        };
        let all: Vec<f64> = (0..width * width).map(entry).collect();
        Ok(Tensor::from_vec(all, (width, width), &Device::Cpu)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_data::arange;

    fn difference(a: &Tensor, b: &Tensor) -> f64 {
        let worst = (a - b).unwrap().abs().unwrap().flatten_all().unwrap();
        worst.max(0).unwrap().to_scalar::<f64>().unwrap()
    }

    #[test]
    fn sums_equal_products_in_double_precision() {
        for (rows, width) in [(1, 1), (3, 5), (1500, 17), (40, 300), (1030, 520)] {
            let x = arange(&[rows, width], 1.0, DType::F64);
            let truth = x.t().unwrap().matmul(&x).unwrap();
            for (dtype, tolerance) in [(DType::F64, 1e-11), (DType::F32, 1e-6)] {
                let mut moment = SecondMoment::new(width);
                let x = x.to_dtype(dtype).unwrap();
                let half = rows / 2;
                moment.add(&x.narrow(0, 0, half).unwrap()).unwrap();
                moment
                    .add(&x.narrow(0, half, rows - half).unwrap())
                    .unwrap();
                let sum = moment.sum().unwrap();
                let error = difference(&sum, &truth) / rows as f64;
                assert!(error < tolerance, "{rows}×{width} {dtype:?}: {error}");
                assert_eq!(difference(&sum, &sum.t().unwrap()), 0.0);
            }
        }
    }

    #[test]
    fn strided_and_half_precision_vectors_count_too() {
        let x = arange(&[6, 10], 1.0, DType::F32);
        let mut whole = SecondMoment::new(6);
        whole.add(&x.t().unwrap()).unwrap();
        let copy = x.t().unwrap().contiguous().unwrap();
        let mut copied = SecondMoment::new(6);
        copied.add(&copy).unwrap();
        assert_eq!(whole.sums, copied.sums);
        copied.add(&copy.to_dtype(DType::F16).unwrap()).unwrap();
        let twice = (whole.sum().unwrap() * 2.0).unwrap();
        assert!(difference(&copied.sum().unwrap(), &twice) < 0.05);
        assert!(copied.add(&x).is_err());
    }
}
