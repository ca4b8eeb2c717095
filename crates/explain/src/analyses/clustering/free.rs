//! The flow without a norm (Geshkovski, Letrouit, Polyanskiy & Rigollet, The emergence of clusters
//! in self-attention dynamics, 2023, arXiv 2305.05465).
//!
//! `x_i' = Σ_j A_ij V x_j` with `A` the softmax of `⟨Q x_i, K x_j⟩` grows or shrinks like
//! `e^{tV}`; what it does to the tokens' shape is seen in `z_i = e^{−tV} x_i`, which follow
//! `z_i' = Σ_j A_ij V (z_j − z_i)`.

use crate::{Error, Result};
use lapidary_factor::Matrix;

/// The flow without a norm.
#[derive(Clone, Debug)]
pub struct FreeDynamics {
    query: Matrix,
    key: Matrix,
    value: Matrix,
}

impl FreeDynamics {
    /// `Q`, `K` and `V`, each `[dimension, dimension]`.
    ///
    /// # Errors
    /// When they are not square and of one size.
    pub fn new(query: Matrix, key: Matrix, value: Matrix) -> Result<Self> {
        let size = value.nrows();
        let shape = |matrix: &Matrix| (matrix.nrows(), matrix.ncols());
        for matrix in [&query, &key, &value] {
            if shape(matrix) != (size, size) || size == 0 {
                let expected = format!("({size}, {size}), as the values'");
                return Err(Error::invalid(
                    "matrix",
                    format!("{:?}", shape(matrix)),
                    expected,
                ));
            }
        }
        Ok(Self { query, key, value })
    }

    /// The weights `A_ij` of `points` `[count, dimension]`.
    pub fn weights(&self, points: &Matrix) -> Matrix {
        let queries = points * self.query.transpose();
        let keys = points * self.key.transpose();
        let mut weights = queries * keys.transpose();
        for i in 0..weights.nrows() {
            let row = weights.row(i);
            let highest = row.iter().fold(f64::NEG_INFINITY, |m, x| m.max(*x));
            let sum: f64 = row.iter().map(|x| (x - highest).exp()).sum();
            for j in 0..weights.ncols() {
                weights[(i, j)] = (weights[(i, j)] - highest).exp() / sum;
            }
        }
        weights
    }

    /// The rescaled points `z` `[count, dimension]` after `steps` Runge–Kutta steps of length
    /// `step` from `start`, and the weights there.
    ///
    /// # Errors
    /// When the points are of another dimension, or `e^{tV}` overflows.
    pub fn rescaled(&self, start: &Matrix, step: f64, steps: usize) -> Result<(Matrix, Matrix)> {
        if start.ncols() != self.value.nrows() {
            let expected = self.value.nrows().to_string();
            return Err(Error::invalid(
                "dimension of the points",
                start.ncols(),
                expected,
            ));
        }
        let mut z = start.clone();
        for index in 0..steps {
            let time = index as f64 * step;
            let [now, middle, end] = [0.0, 0.5, 1.0].map(|part| self.growth(time + part * step));
            let (now, middle, end) = (now?, middle?, end?);
            let first = self.slope(&z, &now);
            let second = self.slope(&beside(&z, &first, step / 2.0), &middle);
            let third = self.slope(&beside(&z, &second, step / 2.0), &middle);
            let fourth = self.slope(&beside(&z, &third, step), &end);
            z = Matrix::from_fn(z.nrows(), z.ncols(), |i, j| {
                let sum =
                    first[(i, j)] + 2.0 * second[(i, j)] + 2.0 * third[(i, j)] + fourth[(i, j)];
                z[(i, j)] + step / 6.0 * sum
            });
        }
        let points = &z * self.growth(steps as f64 * step)?;
        let weights = self.weights(&points);
        Ok((z, weights))
    }

    /// `(e^{tV})ᵀ`, so that rows `z` become rows `x`.
    fn growth(&self, time: f64) -> Result<Matrix> {
        let size = self.value.nrows();
        let scaled = Matrix::from_fn(size, size, |i, j| time * self.value[(j, i)]);
        let grown = exponential(&scaled);
        match grown.norm_max().is_finite() {
            true => Ok(grown),
            false => Err(Error::invalid(
                "e^{tV}",
                "too large for a number",
                "smaller: a shorter time",
            )),
        }
    }

    /// `Σ_j A_ij V (z_j − z_i)`; the weights' rows sum to one.
    fn slope(&self, z: &Matrix, growth: &Matrix) -> Matrix {
        let weights = self.weights(&(z * growth));
        (weights * z - z) * self.value.transpose()
    }
}

fn beside(z: &Matrix, slope: &Matrix, step: f64) -> Matrix {
    Matrix::from_fn(z.nrows(), z.ncols(), |i, j| {
        z[(i, j)] + step * slope[(i, j)]
    })
}

/// `e^M` by scaling, a Taylor series, and squaring.
pub(super) fn exponential(matrix: &Matrix) -> Matrix {
    let size = matrix.nrows();
    let halvings = matrix.norm_l2().max(1e-300).log2().ceil().clamp(0.0, 64.0) as i32 + 1;
    let scale = 0.5f64.powi(halvings);
    let scaled = Matrix::from_fn(size, size, |i, j| scale * matrix[(i, j)]);
    let mut term = Matrix::identity(size, size);
    let mut sum = term.clone();
    for order in 1..=18 {
        let next = &term * &scaled;
        term = Matrix::from_fn(size, size, |i, j| next[(i, j)] / f64::from(order));
        sum += &term;
    }
    for _ in 0..halvings {
        sum = &sum * &sum;
    }
    sum
}
