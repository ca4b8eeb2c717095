//! A Cholesky factor that can grow.

use faer::{Mat, MatMut, Side};

use crate::{Error, Result};

/// `L` of `A + jitter I = L Lᵀ`.
#[derive(Clone, Debug)]
pub(crate) struct Cholesky {
    lower: Mat<f64>,
}

impl Cholesky {
    /// Factorises a symmetric matrix, of which the lower triangle is read. One that is singular to
    /// working precision gets 1e-12, 1e-10, … 1e-6 of its mean diagonal added to the diagonal.
    pub(crate) fn new(matrix: &Mat<f64>) -> Result<Self> {
        let size = matrix.nrows();
        let mean = (0..size).map(|i| matrix[(i, i)]).sum::<f64>() / size.max(1) as f64;
        for relative in [0.0, 1e-12, 1e-10, 1e-8, 1e-6] {
            let mut shifted = matrix.clone();
            for i in 0..size {
                shifted[(i, i)] += relative * mean;
            }
            if let Ok(found) = shifted.llt(Side::Lower) {
                return Ok(Self {
                    lower: found.L().to_owned(),
                });
            }
        }
        Err(Error::NotPositive {
            points: size,
            jitter: 1e-6 * mean,
        })
    }

    pub(crate) fn size(&self) -> usize {
        self.lower.nrows()
    }

    /// The factor of the matrix with one more row and column, in `O(n²)`: the new row of `L` is
    /// `l = L⁻¹ a` and `√(d − ‖l‖²)`.
    pub(crate) fn grown(&self, column: &[f64], diagonal: f64) -> Result<Self> {
        let size = self.size();
        let mut row = Mat::from_fn(size, 1, |i, _| column[i]);
        self.forward(row.as_mut());
        let rest = diagonal - row.squared_norm_l2();
        if rest <= 1e-12 * diagonal {
            return Err(Error::NotPositive {
                points: size + 1,
                jitter: 0.0,
            });
        }
        let lower = Mat::from_fn(size + 1, size + 1, |i, j| match (i < size, j < size) {
            (true, true) => self.lower[(i, j)],
            (false, true) => row[(j, 0)],
            (false, false) => rest.sqrt(),
            (true, false) => 0.0,
        });
        Ok(Self { lower })
    }

    /// `B ← L⁻¹ B`.
    pub(crate) fn forward(&self, right: MatMut<'_, f64>) {
        self.lower.solve_lower_triangular_in_place(right);
    }

    /// `(L Lᵀ)⁻¹ b`.
    pub(crate) fn solve(&self, right: &[f64]) -> Vec<f64> {
        let mut solution = Mat::from_fn(right.len(), 1, |i, _| right[i]);
        self.forward(solution.as_mut());
        self.lower
            .transpose()
            .solve_upper_triangular_in_place(solution.as_mut());
        solution.col(0).iter().copied().collect()
    }

    /// `(L Lᵀ)⁻¹`.
    pub(crate) fn inverse(&self) -> Mat<f64> {
        let mut half = Mat::identity(self.size(), self.size());
        self.forward(half.as_mut());
        half.transpose() * &half
    }

    /// `log |L Lᵀ|`.
    pub(crate) fn log_determinant(&self) -> f64 {
        2.0 * (0..self.size())
            .map(|i| self.lower[(i, i)].ln())
            .sum::<f64>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A positive definite matrix.
    fn matrix(size: usize) -> Mat<f64> {
        Mat::from_fn(size, size, |i, j| {
            let apart = i.abs_diff(j) as f64;
            (-0.05 * apart * apart).exp() + if i == j { 0.1 } else { 0.0 }
        })
    }

    #[test]
    fn a_grown_factor_is_that_of_the_larger_matrix() {
        let whole = matrix(9);
        let mut grown = Cholesky::new(&whole.as_ref().submatrix(0, 0, 3, 3).to_owned()).unwrap();
        for size in 3..9 {
            let column: Vec<f64> = (0..size).map(|i| whole[(i, size)]).collect();
            grown = grown.grown(&column, whole[(size, size)]).unwrap();
        }
        let fresh = Cholesky::new(&whole).unwrap();
        assert!((&grown.lower - &fresh.lower).norm_max() < 1e-12);
        assert!(grown.grown(&[1.0; 9], 0.01).is_err());
    }

    #[test]
    fn solutions_agree_with_the_inverse() {
        let whole = matrix(7);
        let factor = Cholesky::new(&whole).unwrap();
        let inverse = factor.inverse();
        assert!((&whole * &inverse - Mat::<f64>::identity(7, 7)).norm_max() < 1e-10);
        let right: Vec<f64> = (0..7).map(|i| f64::from(i) - 2.5).collect();
        let solved = factor.solve(&right);
        for i in 0..7 {
            let direct: f64 = (0..7).map(|j| inverse[(i, j)] * right[j]).sum();
            assert!((solved[i] - direct).abs() < 1e-10);
        }
        let eigen = whole.self_adjoint_eigenvalues(Side::Lower).unwrap();
        let sum: f64 = eigen.iter().map(|value| value.ln()).sum();
        assert!((factor.log_determinant() - sum).abs() < 1e-10);
    }

    #[test]
    fn what_is_not_positive_is_refused() {
        let mut indefinite = matrix(4);
        indefinite[(2, 2)] = -1.0;
        assert!(Cholesky::new(&indefinite).is_err());
    }
}
