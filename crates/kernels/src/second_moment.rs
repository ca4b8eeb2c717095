//! `Σ x xᵀ` over many vectors, in double precision: what calibrations sum.

use crate::host::Host;
use crate::product::{Into, Matrix, Threads, multiply};
use crate::{DType, Device, Error, Result, Tensor};
use rayon::prelude::*;
use std::ops::Range;

/// Vectors that are turned to double precision at a time.
const CHUNK: usize = 1024;

/// Vectors whose products are summed in single precision before they join the sum in double: few, so
/// that the short sum rounds hardly more than each product does.
const SHORT: usize = 256;

/// Vectors that a tile goes through at a time in single precision: many, since its sums in double come from memory.
const LONG: usize = 16 * SHORT;

/// Columns of a panel, and rows of its tiles: a tile's sums stay in a processor's own cache.
const PANEL: usize = 256;
const TILE: usize = 256;

/// `Σ x xᵀ` `[width, width]` of vectors that come a batch at a time.
///
/// The sum is symmetric, so that little more than half of it is computed and held, in double precision.
/// Vectors in single precision are multiplied in single precision, 256 of them at a time, which takes half
/// the time: each entry is then off by some 1e-7 of its features' mean squares, less the more vectors there are. Not the first ones, as many as there
/// are numbers in each: as long as the sum is singular, rounding would give it negative eigenvalues.
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
    /// Vectors that have come.
    count: usize,
    /// Panels of [`PANEL`] columns, one after the other, each from its first column's row on:
    /// `[width − first, columns]`.
    sums: Vec<f64>,
}

impl SecondMoment {
    /// No vectors yet, of `width` numbers each.
    pub fn new(width: usize) -> Self {
        Self {
            width,
            count: 0,
            sums: vec![0.0; Self::held(width)],
        }
    }

    /// How many numbers are held for vectors of `width`: little more than half of the square.
    pub fn held(width: usize) -> usize {
        panels(width)
            .map(|(first, columns)| (width - first) * columns)
            .sum()
    }

    /// Numbers in a vector.
    pub fn width(&self) -> usize {
        self.width
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
        let double = match x.dtype() {
            DType::F64 => count,
            _ => self.width.saturating_sub(self.count).min(count),
        };
        for range in chunks(0..double, CHUNK) {
            let chunk = x.narrow(0, range.start, range.len())?;
            let chunk = chunk.to_dtype(DType::F64)?;
            let read = Host::new(&chunk);
            self.add_chunk(&read.ordered::<f64>()?, add_in_double);
        }
        for range in chunks(double..count, LONG) {
            let chunk = x.narrow(0, range.start, range.len())?;
            let chunk = chunk.to_dtype(DType::F32)?;
            let read = Host::new(&chunk);
            self.add_chunk(&read.ordered::<f32>()?, add_in_single);
        }
        self.count += count;
        Ok(())
    }

    /// Adds vectors that lie one after the other. `add` adds `leftᵀ right` to the sums of a tile.
    fn add_chunk<T: Copy + Sync>(
        &mut self,
        x: &[T],
        add: impl Fn(&mut [f64], Matrix<T>, Matrix<T>) + Sync,
    ) {
        let width = self.width;
        let vectors = x.len() / width.max(1);
        let numbers =
            |first: usize, count: usize| Matrix::spaced(&x[first..], vectors, count, width);
        let tiles = tiles(width, &mut self.sums);
        tiles.into_par_iter().for_each(|tile| {
            let right = numbers(tile.column, tile.columns);
            add(tile.sums, numbers(tile.row, tile.rows), right);
        });
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
        self.for_each(|row, column, sum| {
            all[row * width + column] = scale * sum;
            all[column * width + row] = scale * sum;
        });
        Ok(Tensor::from_vec(all, (width, width), &Device::Cpu)?)
    }

    /// Hands over row, column and sum of each entry on the diagonal and below.
    pub fn for_each(&self, mut take: impl FnMut(usize, usize, f64)) {
        let mut rest = self.sums.as_slice();
        for (first, columns) in panels(self.width) {
            let (panel, after) = rest.split_at((self.width - first) * columns);
            rest = after;
            for (row, sums) in (first..self.width).zip(panel.chunks_exact(columns)) {
                for (column, sum) in (first..=row).zip(sums) {
                    take(row, column, *sum);
                }
            }
        }
    }
}

/// First column and columns of each panel.
fn panels(width: usize) -> impl Iterator<Item = (usize, usize)> {
    let firsts = (0..width).step_by(PANEL);
    firsts.map(move |first| (first, PANEL.min(width - first)))
}

/// Part of a panel: the sums of some rows and columns.
struct Tile<'a> {
    row: usize,
    rows: usize,
    column: usize,
    columns: usize,
    sums: &'a mut [f64],
}

/// All tiles. Entries above the diagonal's tiles are those below it.
fn tiles(width: usize, mut sums: &mut [f64]) -> Vec<Tile<'_>> {
    let mut found = Vec::new();
    for (column, columns) in panels(width) {
        let (panel, after) = sums.split_at_mut((width - column) * columns);
        sums = after;
        let firsts = (column..width).step_by(TILE);
        for (row, sums) in firsts.zip(panel.chunks_mut(TILE * columns)) {
            let rows = TILE.min(width - row);
            found.push(Tile {
                row,
                rows,
                column,
                columns,
                sums,
            });
        }
    }
    found
}

/// Parts of a range, of `size` at most.
fn chunks(range: Range<usize>, size: usize) -> impl Iterator<Item = Range<usize>> {
    let firsts = range.clone().step_by(size);
    firsts.map(move |first| first..(first + size).min(range.end))
}

/// `sums += leftᵀ right`.
fn add_in_double(sums: &mut [f64], left: Matrix<f64>, right: Matrix<f64>) {
    let columns = right.columns;
    multiply(
        sums,
        columns,
        Into::Add,
        1.0,
        left.transposed(),
        right,
        Threads::One,
    );
}

/// `sums += leftᵀ right`, by short sums in single precision.
fn add_in_single(sums: &mut [f64], left: Matrix<f32>, right: Matrix<f32>) {
    let columns = right.columns;
    let mut short = vec![0f32; sums.len()];
    for first in (0..right.rows).step_by(SHORT) {
        let range = first..(first + SHORT).min(right.rows);
        multiply(
            &mut short,
            columns,
            Into::Replace,
            1.0,
            left.part_of_rows(&range).transposed(),
            right.part_of_rows(&range),
            Threads::One,
        );
        for (sum, short) in sums.iter_mut().zip(&short) {
            *sum += f64::from(*short);
        }
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
        for (rows, width) in [
            (1, 1),
            (3, 5),
            (1500, 17),
            (40, 300),
            (1030, 520),
            (6, 8 * PANEL + 3),
            (700, PANEL + TILE + 1),
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
    fn the_first_vectors_are_exact_and_the_others_nearly_so() {
        let width = 300;
        let x = arange(&[1200, width], 1.0, DType::F32);
        let exact = x.to_dtype(DType::F64).unwrap();
        let truth = |rows: usize| {
            let part = exact.narrow(0, 0, rows).unwrap();
            part.t().unwrap().matmul(&part).unwrap()
        };
        let mut moment = SecondMoment::new(width);
        moment.add(&x.narrow(0, 0, 100).unwrap()).unwrap();
        moment.add(&x.narrow(0, 100, 200).unwrap()).unwrap();
        assert!(difference(&moment.sum().unwrap(), &truth(300)) < 1e-11);
        moment.add(&x.narrow(0, 300, 900).unwrap()).unwrap();
        let error = difference(&moment.sum().unwrap(), &truth(1200));
        assert!((1e-9..1e-6 * 1200.0).contains(&error), "{error}");
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
