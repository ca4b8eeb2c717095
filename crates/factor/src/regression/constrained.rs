//! Maps that may not be everything: lower-triangular, of low rank, or with few entries.

use super::{AffineMap, LEAST_VARIANCE, Regression};
use crate::{Error, Matrix, Result, cholesky, symmetric_eigen, thin_svd};

/// Sweeps over the entries of a column that descent makes at most.
const SWEEPS: usize = 10_000;

/// Descent ends with the sweep that lowers the error by less than this share of all that there is.
const LEAST_GAIN: f64 = 1e-20;

impl Regression {
    /// The best map `A` with nothing above its diagonal, so that output `j` is made of inputs `j`
    /// and later; for as many outputs as inputs. Where inputs determine each other, what
    /// [`cholesky`] adds to the diagonal decides among the maps.
    ///
    /// Backwards, the inputs of each output are the first ones, and the Cholesky factor of a
    /// leading block is the leading block of the factor: one factorisation serves all outputs.
    ///
    /// # Errors
    /// When there are no rows, all inputs are zero, or the numbers of inputs and outputs differ.
    pub fn solve_lower_triangular(&self, ridge: f64) -> Result<AffineMap> {
        self.refuse_nothing()?;
        let size = self.refuse_oblong("a lower-triangular map")?;
        let from_end = |i: usize| size - 1 - i;
        let reversed = Matrix::from_fn(size, size, |i, j| {
            let entry = self.xx[(from_end(i), from_end(j))];
            if i == j { entry + ridge } else { entry }
        });
        let lower = cholesky("second moment of the inputs", reversed.as_ref())?.lower;
        let mut forward = Matrix::from_fn(size, size, |i, j| self.xy[(from_end(i), j)]);
        lower.solve_lower_triangular_in_place(forward.as_mut());
        let mut weight = Matrix::zeros(size, size);
        for j in 0..size {
            let rows = size - j;
            let mut column = forward.as_ref().submatrix(0, j, rows, 1).to_owned();
            let leading = lower.as_ref().submatrix(0, 0, rows, rows);
            leading
                .transpose()
                .solve_upper_triangular_in_place(column.as_mut());
            for i in 0..rows {
                weight[(from_end(i), j)] = column[(i, 0)];
            }
        }
        Ok(self.with_bias(weight))
    }

    /// The best map of at most this rank (reduced-rank regression: Izenman 1975): with
    /// `S = XᵀX + α I`, `A = S^(−1/2) [S^(−1/2) XᵀY]_rank`, the brackets truncating to the largest
    /// singular values.
    ///
    /// # Errors
    /// When there are no rows, a decomposition fails, or the rank is not between 1 and the smaller
    /// side of the map.
    pub fn solve_of_rank(&self, rank: usize, ridge: f64) -> Result<AffineMap> {
        self.refuse_nothing()?;
        let largest = self.xy.nrows().min(self.xy.ncols());
        if rank == 0 || rank > largest {
            return Err(Error::Rank { rank, largest });
        }
        let eigen = symmetric_eigen("second moment of the inputs", self.xx.as_ref())?;
        let least = LEAST_VARIANCE * eigen.values.last().copied().unwrap_or(0.0).max(0.0);
        let root = eigen.map(|value| match value > least {
            true => 1.0 / (value + ridge).sqrt(),
            false => 0.0,
        });
        let svd = thin_svd((&root * &self.xy).as_ref())?;
        Ok(self.with_bias(root * svd.truncated_product(rank)))
    }

    /// The best map when `lasso · Σ |a_ij|` is added to the error beside the ridge, among those
    /// whose entries other than `may(input, output)` are zero; by descent along one entry after
    /// another (Friedman, Hastie & Tibshirani 2010), from zero.
    ///
    /// # Errors
    /// When there are no rows.
    pub fn solve_sparse(
        &self,
        lasso: f64,
        ridge: f64,
        may: impl Fn(usize, usize) -> bool,
    ) -> Result<AffineMap> {
        self.refuse_nothing()?;
        let (inputs, outputs) = (self.xy.nrows(), self.xy.ncols());
        let mut weight = Matrix::zeros(inputs, outputs);
        for j in 0..outputs {
            let free: Vec<usize> = (0..inputs).filter(|i| may(*i, j)).collect();
            let entries = self.sparse_column(j, &free, lasso, ridge);
            for (i, entry) in entries.into_iter().enumerate() {
                weight[(i, j)] = entry;
            }
        }
        Ok(self.with_bias(weight))
    }

    /// The least `lasso` for which the best map is zero: `2 max |Σ x_i y_j|`.
    pub fn emptying_lasso(&self) -> f64 {
        2.0 * self.xy.norm_max()
    }

    fn sparse_column(&self, j: usize, free: &[usize], lasso: f64, ridge: f64) -> Vec<f64> {
        let inputs = self.xx.nrows();
        let mut entries = vec![0.0; inputs];
        // Σ x_i (y − x a): what is missed along each input.
        let mut missed: Vec<f64> = (0..inputs).map(|i| self.xy[(i, j)]).collect();
        for _ in 0..SWEEPS {
            let mut gained = 0.0;
            for &i in free {
                let (square, before) = (self.xx[(i, i)], entries[i]);
                if square + ridge <= 0.0 {
                    continue;
                }
                let wanted = missed[i] + square * before;
                let beyond = (wanted.abs() - 0.5 * lasso).max(0.0);
                let change = wanted.signum() * beyond / (square + ridge) - before;
                if change == 0.0 {
                    continue;
                }
                entries[i] += change;
                for (k, missed) in missed.iter_mut().enumerate() {
                    *missed -= self.xx[(k, i)] * change;
                }
                gained += (square + ridge) * change * change;
            }
            if gained <= LEAST_GAIN * self.yy {
                break;
            }
        }
        entries
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{drawn, far};
    use super::*;

    fn sums(x: &Matrix, y: &Matrix) -> Regression {
        let mut sums = Regression::through_origin(x.ncols(), y.ncols());
        sums.add(x.as_ref(), y.as_ref()).unwrap();
        sums
    }

    #[test]
    fn a_triangular_map_leaves_nothing_along_its_inputs() {
        let (x, y) = (drawn(60, 5, 1), drawn(60, 5, 2));
        let fitted = sums(&x, &y);
        for ridge in [0.0, 2.5] {
            let weight = fitted.solve_lower_triangular(ridge).unwrap().weight;
            let left = x.transpose() * (&y - &x * &weight) - faer::Scale(ridge) * &weight;
            for (i, j) in (0..5).flat_map(|i| (0..5).map(move |j| (i, j))) {
                match i < j {
                    true => assert_eq!(weight[(i, j)], 0.0),
                    false => assert!(left[(i, j)].abs() < 1e-11, "{}", left[(i, j)]),
                }
            }
        }
        let triangle = Matrix::from_fn(5, 5, |i, j| if i < j { 0.0 } else { y[(i, j)] });
        let found = sums(&x, &(&x * &triangle)).solve_lower_triangular(0.0);
        assert!(far(&found.unwrap().weight, &triangle) < 1e-11);
        let oblong = sums(&x, &drawn(60, 4, 3));
        assert!(oblong.solve_lower_triangular(0.0).is_err());
    }

    #[test]
    fn a_map_of_low_rank_is_stationary_and_of_full_rank_the_best() {
        let (x, y) = (drawn(60, 4, 4), drawn(60, 4, 5));
        let fitted = sums(&x, &y);
        let ridge = 1.5;
        let second = x.transpose() * &x + faer::Scale(ridge) * Matrix::identity(4, 4);
        let crossed = x.transpose() * &y;
        let mut before = f64::INFINITY;
        for rank in 1..=4 {
            let a = fitted.solve_of_rank(rank, ridge).unwrap().weight;
            // A = U Vᵀ is best in U for its V, and in V for its U.
            assert!(far(&(&second * &a * a.transpose()), &(&crossed * a.transpose())) < 1e-10);
            assert!(far(&(a.transpose() * &second * &a), &(a.transpose() * &crossed)) < 1e-10);
            let values = thin_svd(a.as_ref()).unwrap().s;
            assert!(
                values.iter().skip(rank).all(|value| *value < 1e-10),
                "{values:?}"
            );
            let error = (&y - &x * &a).squared_norm_l2() + ridge * a.squared_norm_l2();
            assert!(error < before);
            before = error;
        }
        let whole = fitted.solve_of_rank(4, ridge).unwrap().weight;
        assert!(far(&whole, &fitted.solve(ridge).unwrap().weight) < 1e-11);
        let single = drawn(4, 1, 6) * drawn(1, 4, 7);
        let found = sums(&x, &(&x * &single)).solve_of_rank(1, 0.0).unwrap();
        assert!(far(&found.weight, &single) < 1e-11);
        for rank in [0, 5] {
            assert!(fitted.solve_of_rank(rank, 0.0).is_err());
        }
    }

    #[test]
    fn a_sparse_map_meets_the_conditions_of_its_minimum() {
        let (x, y) = (drawn(80, 5, 8), drawn(80, 5, 9));
        let fitted = sums(&x, &y);
        let (lasso, ridge) = (0.3 * fitted.emptying_lasso(), 2.0);
        let weight = fitted
            .solve_sparse(lasso, ridge, |_, _| true)
            .unwrap()
            .weight;
        // 2 (Xᵀ(Y − X A) − α A) is β sign(A) where A is not zero, and within β where it is.
        let slope = x.transpose() * (&y - &x * &weight) - faer::Scale(ridge) * &weight;
        let (mut zeros, mut others) = (0, 0);
        for (i, j) in (0..5).flat_map(|i| (0..5).map(move |j| (i, j))) {
            let (entry, slope) = (weight[(i, j)], 2.0 * slope[(i, j)]);
            match entry == 0.0 {
                true => {
                    zeros += 1;
                    assert!(slope.abs() <= lasso + 1e-9);
                }
                false => {
                    others += 1;
                    assert!(
                        (slope - lasso * entry.signum()).abs() < 1e-7,
                        "{slope} {lasso}"
                    );
                }
            }
        }
        assert!(zeros > 0 && others > 0, "{zeros} {others}");
    }

    #[test]
    fn a_sparse_map_goes_from_the_best_to_none() {
        let (x, y) = (drawn(80, 4, 10), drawn(80, 4, 11));
        let fitted = sums(&x, &y);
        let at = |lasso, may: fn(usize, usize) -> bool| {
            fitted.solve_sparse(lasso, 0.5, may).unwrap().weight
        };
        let all: fn(usize, usize) -> bool = |_, _| true;
        assert!(far(&at(0.0, all), &fitted.solve(0.5).unwrap().weight) < 1e-8);
        let diagonal = fitted.solve_diagonal(0.5).unwrap().weight;
        assert!(far(&at(0.0, |i, j| i == j), &diagonal) < 1e-10);
        let triangle = fitted.solve_lower_triangular(0.5).unwrap().weight;
        assert!(far(&at(0.0, |i, j| i >= j), &triangle) < 1e-8);
        assert_eq!(at(fitted.emptying_lasso() * 1.000_001, all).norm_max(), 0.0);
        assert!(at(fitted.emptying_lasso() * 0.99, all).norm_max() > 0.0);
    }
}
