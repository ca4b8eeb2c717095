//! `Σ x xᵀ` over many vectors, in double precision: what calibrations sum.

use crate::host::Host;
use crate::product::{Into, Matrix, Threads, multiply};
use crate::{DType, Device, Error, Result, Tensor};
use rayon::prelude::*;

/// Vectors whose products are summed at a time.
const CHUNK: usize = 1024;

/// Columns of a panel.
const PANEL: usize = 256;

/// Width from which on there are panels enough for each thread to take whole ones.
const WIDE: usize = 8 * PANEL;

/// `Σ x xᵀ` `[width, width]` of vectors that come a batch at a time.
///
/// The sum is symmetric, so that little more than half of it is computed and held. All of it is in
/// double precision: of fewer vectors than numbers in each it is singular, and rounding to single
/// precision would give it negative eigenvalues.
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
    /// Panels of [`PANEL`] columns, one after the other, each from its first column's row on:
    /// `[width − first, columns]`.
    sums: Vec<f64>,
}

impl SecondMoment {
    /// No vectors yet, of `width` numbers each.
    pub fn new(width: usize) -> Self {
        Self {
            width,
            sums: vec![0.0; Self::held(width)],
        }
    }

    /// How many numbers are held for vectors of `width`: little more than half of the square.
    pub fn held(width: usize) -> usize {
        panels(width)
            .map(|(first, columns)| (width - first) * columns)
            .sum()
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
        let add = |(first, columns, sums): (usize, usize, &mut [f64]), threads: Threads| {
            // Entries above the diagonal's panel are those below it.
            let from_here = Matrix::spaced(&x[first..], rows, width - first, width);
            let panel = Matrix::spaced(&x[first..], rows, columns, width);
            let from_here = from_here.transposed();
            multiply(sums, columns, Into::Add, 1.0, from_here, panel, threads);
        };
        let panels = split(width, &mut self.sums);
        match width >= WIDE {
            true => panels
                .into_par_iter()
                .for_each(|panel| add(panel, Threads::One)),
            false => panels
                .into_iter()
                .for_each(|panel| add(panel, Threads::All)),
        }
    }

    /// Whether no sum has overflowed or become undefined.
    pub fn is_finite(&self) -> bool {
        self.sums.iter().all(|sum| sum.is_finite())
    }

    /// The sum, `[width, width]` in `f64`.
    ///
    /// # Errors
    /// Those of the tensor engine.
    pub fn sum(&self) -> Result<Tensor> {
        self.scaled(1.0)
    }

    /// The sum times `scale`, `[width, width]` in `f64`: the mean, for one over the number of vectors.
    ///
    /// # Errors
    /// Those of the tensor engine.
    pub fn scaled(&self, scale: f64) -> Result<Tensor> {
        let width = self.width;
        let mut all = vec![0.0; width * width];
        let mut rest = self.sums.as_slice();
        for (first, columns) in panels(width) {
            let (panel, after) = rest.split_at((width - first) * columns);
            rest = after;
            for (row, sums) in (first..width).zip(panel.chunks_exact(columns)) {
                for (column, sum) in (first..=row).zip(sums) {
                    all[row * width + column] = scale * sum;
                    all[column * width + row] = scale * sum;
                }
            }
        }
        Ok(Tensor::from_vec(all, (width, width), &Device::Cpu)?)
    }
}

/// First column and columns of each panel.
fn panels(width: usize) -> impl Iterator<Item = (usize, usize)> {
    let firsts = (0..width).step_by(PANEL);
    firsts.map(move |first| (first, PANEL.min(width - first)))
}

/// First column, columns and sums of each panel.
fn split(width: usize, mut sums: &mut [f64]) -> Vec<(usize, usize, &mut [f64])> {
    let mut found = Vec::with_capacity(width.div_ceil(PANEL));
    for (first, columns) in panels(width) {
        let (panel, after) = sums.split_at_mut((width - first) * columns);
        sums = after;
        found.push((first, columns, panel));
    }
    found
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
        for (rows, width) in [
            (1, 1),
            (3, 5),
            (1500, 17),
            (40, 300),
            (1030, 520),
            (6, WIDE + 3),
        ] {
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

    #[test]
    fn little_more_than_half_is_held_and_infinities_are_seen() {
        assert_eq!(SecondMoment::held(0), 0);
        assert_eq!(SecondMoment::held(PANEL), PANEL * PANEL);
        let width = 12 * PANEL;
        assert_eq!(SecondMoment::held(width), 78 * PANEL * PANEL); // of 144
        let mut moment = SecondMoment::new(2);
        assert!(moment.is_finite());
        let large = Tensor::new(&[[1e200f64, 1.0]], &Device::Cpu).unwrap();
        moment.add(&large).unwrap();
        assert!(!moment.is_finite());
    }

    #[test]
    fn means_are_scaled_sums() {
        let x = arange(&[8, 3], 1.0, DType::F64);
        let mut moment = SecondMoment::new(3);
        moment.add(&x).unwrap();
        let eighth = (moment.sum().unwrap() * 0.125).unwrap();
        assert_eq!(difference(&moment.scaled(0.125).unwrap(), &eighth), 0.0);
    }
}
