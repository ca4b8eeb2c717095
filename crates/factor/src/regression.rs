//! Least squares over rows that are never all held at once.
//!
//! ```text
//! minimise Σ_t ‖y_t − x_t A − b‖² + α ‖A‖²
//! ```
//!
//! Only sums over the rows are kept: means and centred second moments, batches joined as Chan,
//! Golub & LeVeque (1983) join them, so that rows far from the origin lose no digits.

mod constrained;

use crate::{Error, Matrix, MatrixView, Result, symmetric_eigen, thin_svd};

/// A direction of the inputs whose variance is below this share of the largest is taken for none:
/// singular values of the rows below `1e-6` of the largest.
const LEAST_VARIANCE: f64 = 1e-12;

/// A map `x A + b` of rows.
#[derive(Clone, Debug)]
pub struct AffineMap {
    /// `A`, `[inputs, outputs]`.
    pub weight: Matrix,
    /// `b`, `[outputs]`; zeros without an intercept.
    pub bias: Vec<f64>,
}

/// Sums over pairs of rows, from which the best linear map is found.
///
/// ```
/// use lapidary_factor::{Matrix, Regression};
/// let x = Matrix::from_fn(5, 1, |i, _| i as f64);
/// let y = Matrix::from_fn(5, 1, |i, _| 3.0 * i as f64 + 1.0);
/// let mut sums = Regression::with_intercept(1, 1);
/// sums.add(x.as_ref(), y.as_ref())?;
/// let map = sums.solve(0.0)?;
/// assert!((map.weight[(0, 0)] - 3.0).abs() < 1e-12 && (map.bias[0] - 1.0).abs() < 1e-12);
/// assert!((sums.explained(&map).unwrap() - 1.0).abs() < 1e-12);
/// # Ok::<(), lapidary_factor::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Regression {
    intercept: bool,
    rows: usize,
    /// Zero without an intercept.
    mean_x: Vec<f64>,
    mean_y: Vec<f64>,
    /// `Σ (x − x̄)ᵀ (x − x̄)`, `[inputs, inputs]`.
    xx: Matrix,
    /// `Σ (x − x̄)ᵀ (y − ȳ)`, `[inputs, outputs]`.
    xy: Matrix,
    /// `Σ ‖y − ȳ‖²`.
    yy: f64,
}

impl Regression {
    /// No rows yet; the map will have a bias.
    pub fn with_intercept(inputs: usize, outputs: usize) -> Self {
        Self {
            intercept: true,
            rows: 0,
            mean_x: vec![0.0; inputs],
            mean_y: vec![0.0; outputs],
            xx: Matrix::zeros(inputs, inputs),
            xy: Matrix::zeros(inputs, outputs),
            yy: 0.0,
        }
    }

    /// No rows yet; the map will be linear, and nothing is centred.
    pub fn through_origin(inputs: usize, outputs: usize) -> Self {
        Self {
            intercept: false,
            ..Self::with_intercept(inputs, outputs)
        }
    }

    /// Rows so far.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Adds rows `x` `[rows, inputs]` and what they should give, `y` `[rows, outputs]`.
    ///
    /// # Errors
    /// When the shapes do not fit.
    pub fn add(&mut self, x: MatrixView<'_>, y: MatrixView<'_>) -> Result<()> {
        for (name, found, columns) in [
            ("inputs of a regression", x, self.mean_x.len()),
            ("outputs of a regression", y, self.mean_y.len()),
        ] {
            if (found.nrows(), found.ncols()) != (x.nrows(), columns) {
                return Err(Error::Shape {
                    name,
                    found: vec![found.nrows(), found.ncols()],
                    expected: vec![x.nrows(), columns],
                });
            }
        }
        let added = x.nrows();
        if added == 0 {
            return Ok(());
        }
        if !self.intercept {
            self.xx += x.transpose() * x;
            self.xy += x.transpose() * y;
            self.yy += y.squared_norm_l2();
            self.rows += added;
            return Ok(());
        }
        let (here_x, here_y) = (means(x), means(y));
        let (x, y) = (centred(x, &here_x), centred(y, &here_y));
        // M ← M + M' + (x̄' − x̄)ᵀ(x̄' − x̄) n n' / (n + n')
        let (old, new) = (self.rows as f64, added as f64);
        let apart = |old: &[f64], new: &[f64]| -> Matrix {
            Matrix::from_fn(1, old.len(), |_, j| new[j] - old[j])
        };
        let (dx, dy) = (apart(&self.mean_x, &here_x), apart(&self.mean_y, &here_y));
        let weight = old * new / (old + new);
        self.xx += x.transpose() * &x + faer::Scale(weight) * (dx.transpose() * &dx);
        self.xy += x.transpose() * &y + faer::Scale(weight) * (dx.transpose() * &dy);
        self.yy += y.squared_norm_l2() + weight * dy.squared_norm_l2();
        let towards = new / (old + new);
        shift(&mut self.mean_x, &dx, towards);
        shift(&mut self.mean_y, &dy, towards);
        self.rows += added;
        Ok(())
    }

    /// The map of least squared error with `ridge` times the squared entries of `A` added to it;
    /// of several the smallest.
    ///
    /// # Errors
    /// When there are no rows, or a decomposition fails.
    pub fn solve(&self, ridge: f64) -> Result<AffineMap> {
        self.refuse_nothing()?;
        let eigen = symmetric_eigen("second moment of the inputs", self.xx.as_ref())?;
        let least = LEAST_VARIANCE * eigen.values.last().copied().unwrap_or(0.0).max(0.0);
        let inverse = eigen.map(|value| match value > least {
            true => 1.0 / (value + ridge),
            false => 0.0,
        });
        Ok(self.with_bias(inverse * &self.xy))
    }

    /// The best map that scales each input by itself, for as many outputs as inputs.
    ///
    /// # Errors
    /// When there are no rows, or the numbers of inputs and outputs differ.
    pub fn solve_diagonal(&self, ridge: f64) -> Result<AffineMap> {
        self.refuse_nothing()?;
        let inputs = self.refuse_oblong("a diagonal map")?;
        let entry = |i: usize| match self.xx[(i, i)] {
            square if square + ridge > 0.0 => self.xy[(i, i)] / (square + ridge),
            _ => 0.0,
        };
        Ok(
            self.with_bias(Matrix::from_fn(inputs, inputs, |i, j| match i == j {
                true => entry(i),
                false => 0.0,
            })),
        )
    }

    fn with_bias(&self, weight: Matrix) -> AffineMap {
        let at = |j: usize| -> f64 {
            let mapped = (0..self.mean_x.len()).map(|i| self.mean_x[i] * weight[(i, j)]);
            self.mean_y[j] - mapped.sum::<f64>()
        };
        AffineMap {
            bias: (0..self.mean_y.len()).map(at).collect(),
            weight,
        }
    }

    /// The number of inputs, where there are as many outputs.
    fn refuse_oblong(&self, name: &'static str) -> Result<usize> {
        let (inputs, outputs) = (self.mean_x.len(), self.mean_y.len());
        match inputs == outputs {
            true => Ok(inputs),
            false => Err(Error::Shape {
                name,
                found: vec![inputs, outputs],
                expected: vec![inputs, inputs],
            }),
        }
    }

    fn refuse_nothing(&self) -> Result<()> {
        match self.rows {
            0 => Err(Error::Shape {
                name: "rows of a regression",
                found: vec![0, self.mean_x.len()],
                expected: vec![1, self.mean_x.len()],
            }),
            _ => Ok(()),
        }
    }

    /// `Σ ‖y − x A − b‖²` of any map, on these rows.
    pub fn squared_error(&self, map: &AffineMap) -> f64 {
        let weight = &map.weight;
        // Σ‖y‖² − 2 tr(Aᵀ Σxᵀy) + tr(Aᵀ Σxᵀx A) of centred rows, and n times the means' error.
        let crossed = inner(weight, &self.xy);
        let squared = inner(weight, &(&self.xx * weight));
        let means = self.with_bias(weight.clone()).bias;
        let apart: f64 = means
            .iter()
            .zip(&map.bias)
            .map(|(a, b)| (a - b).powi(2))
            .sum();
        (self.yy - 2.0 * crossed + squared + self.rows as f64 * apart).max(0.0)
    }

    /// The same rows with the inputs added to the outputs, as by a residual; there have to be as
    /// many of either.
    pub fn beside_inputs(&self) -> Self {
        let crossed: f64 = (0..self.xx.nrows()).map(|i| self.xy[(i, i)]).sum();
        let inputs: f64 = (0..self.xx.nrows()).map(|i| self.xx[(i, i)]).sum();
        let means = self.mean_x.iter().zip(&self.mean_y);
        Self {
            mean_y: means.map(|(x, y)| x + y).collect(),
            xy: &self.xx + &self.xy,
            yy: (inputs + 2.0 * crossed + self.yy).max(0.0),
            ..self.clone()
        }
    }

    /// `Σ ‖x − x̄‖² / inputs`: what a ridge is measured by.
    pub fn mean_square(&self) -> f64 {
        let diagonal = (0..self.xx.nrows()).map(|i| self.xx[(i, i)]);
        diagonal.sum::<f64>() / self.xx.nrows().max(1) as f64
    }

    /// `Σ ‖y − ȳ‖²`, not centred without an intercept.
    pub fn total(&self) -> f64 {
        self.yy
    }

    /// `1 − Σ‖y − x A − b‖² / Σ‖y − ȳ‖²`: the share of the outputs' variance that a map explains,
    /// which is below 0 for a map worse than none; nothing when the outputs do not vary.
    pub fn explained(&self, map: &AffineMap) -> Option<f64> {
        (self.yy > 0.0).then(|| 1.0 - self.squared_error(map) / self.yy)
    }

    /// The same of the best rotation (or reflection) and scale: `‖XᵀY‖_*² / (‖X‖² ‖Y‖²)`, the sum
    /// of singular values squared (Schönemann 1966). Nothing when either side does not vary.
    ///
    /// # Errors
    /// When a decomposition fails.
    pub fn explained_by_rotation(&self) -> Result<Option<f64>> {
        let spread: f64 = (0..self.xx.nrows()).map(|i| self.xx[(i, i)]).sum();
        if !(spread > 0.0 && self.yy > 0.0) {
            return Ok(None);
        }
        let nuclear: f64 = thin_svd(self.xy.as_ref())?.s.iter().sum();
        Ok(Some(nuclear * nuclear / (spread * self.yy)))
    }

    /// Share of the inputs' variance that lies in its first direction, `σ₁² / Σ σ²`.
    ///
    /// # Errors
    /// When a decomposition fails.
    pub fn anisotropy(&self) -> Result<Option<f64>> {
        let values = symmetric_eigen("second moment of the inputs", self.xx.as_ref())?.values;
        let sum: f64 = values.iter().map(|value| value.max(0.0)).sum();
        Ok(values.last().filter(|_| sum > 0.0).map(|first| first / sum))
    }
}

fn means(rows: MatrixView<'_>) -> Vec<f64> {
    (0..rows.ncols())
        .map(|j| rows.col(j).iter().sum::<f64>() / rows.nrows() as f64)
        .collect()
}

fn centred(rows: MatrixView<'_>, means: &[f64]) -> Matrix {
    Matrix::from_fn(rows.nrows(), rows.ncols(), |i, j| rows[(i, j)] - means[j])
}

fn shift(means: &mut [f64], apart: &Matrix, share: f64) {
    for (j, mean) in means.iter_mut().enumerate() {
        *mean += share * apart[(0, j)];
    }
}

/// `Σ a_ij b_ij`.
fn inner(a: &Matrix, b: &Matrix) -> f64 {
    (0..a.ncols())
        .map(|j| {
            a.col(j)
                .iter()
                .zip(b.col(j).iter())
                .map(|(a, b)| a * b)
                .sum::<f64>()
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Numbers in `[−1, 1]` with no pattern that a linear map could use.
    pub(super) fn drawn(rows: usize, columns: usize, seed: u64) -> Matrix {
        let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        Matrix::from_fn(rows, columns, |_, _| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 11) as f64 / (1u64 << 52) as f64 - 1.0
        })
    }

    pub(super) fn far(a: &Matrix, b: &Matrix) -> f64 {
        (a - b).norm_max()
    }

    #[test]
    fn a_linear_map_is_found_again_from_batches_far_from_the_origin() {
        let (x, a) = (drawn(200, 5, 1), drawn(5, 3, 2));
        let x = Matrix::from_fn(200, 5, |i, j| x[(i, j)] + 1e5 * (j as f64 + 1.0));
        let product = &x * &a;
        let y = Matrix::from_fn(200, 3, |i, j| product[(i, j)] - 7.0);
        let mut whole = Regression::with_intercept(5, 3);
        whole.add(x.as_ref(), y.as_ref()).unwrap();
        let mut parts = Regression::with_intercept(5, 3);
        for (start, count) in [(0, 1), (1, 60), (61, 139)] {
            let rows = |m: &Matrix| m.as_ref().subrows(start, count).to_owned();
            parts.add(rows(&x).as_ref(), rows(&y).as_ref()).unwrap();
        }
        for sums in [&whole, &parts] {
            let map = sums.solve(0.0).unwrap();
            assert!(far(&map.weight, &a) < 1e-8, "{}", far(&map.weight, &a));
            assert!((sums.explained(&map).unwrap() - 1.0).abs() < 1e-10);
        }
    }

    #[test]
    fn residuals_are_orthogonal_and_the_ridge_shrinks() {
        let (x, y) = (drawn(60, 4, 3), drawn(60, 2, 4));
        let mut sums = Regression::through_origin(4, 2);
        sums.add(x.as_ref(), y.as_ref()).unwrap();
        let map = sums.solve(0.0).unwrap();
        let residual = &y - &x * &map.weight;
        assert!((x.transpose() * &residual).norm_max() < 1e-12);
        assert!((sums.squared_error(&map) - residual.squared_norm_l2()).abs() < 1e-10);
        assert!(map.bias.iter().all(|b| *b == 0.0));
        // (XᵀX + αI) A = XᵀY.
        let ridged = sums.solve(3.0).unwrap().weight;
        let left = x.transpose() * &x * &ridged + faer::Scale(3.0) * &ridged;
        assert!(far(&left, &(x.transpose() * &y)) < 1e-12);
        assert!(sums.solve(1e12).unwrap().weight.norm_max() < 1e-10);
    }

    #[test]
    fn a_direction_without_variance_is_left_alone() {
        let x = drawn(50, 3, 5);
        let twice = Matrix::from_fn(50, 4, |i, j| x[(i, j.min(2))]);
        let mut sums = Regression::with_intercept(4, 1);
        let y = Matrix::from_fn(50, 1, |i, _| 2.0 * x[(i, 2)]);
        sums.add(twice.as_ref(), y.as_ref()).unwrap();
        let map = sums.solve(0.0).unwrap();
        // Of all ways to share 2 among two equal columns, the smallest.
        assert!((map.weight[(2, 0)] - 1.0).abs() < 1e-9 && (map.weight[(3, 0)] - 1.0).abs() < 1e-9);
    }

    #[test]
    fn rotations_explain_rotated_rows_and_no_more_than_maps_do() {
        let x = drawn(80, 2, 6);
        let turn = Matrix::from_fn(2, 2, |i, j| [[0.6, 0.8], [-0.8, 0.6]][i][j]);
        let mut sums = Regression::with_intercept(2, 2);
        sums.add(x.as_ref(), (faer::Scale(5.0) * (&x * &turn)).as_ref())
            .unwrap();
        assert!((sums.explained_by_rotation().unwrap().unwrap() - 1.0).abs() < 1e-12);
        let mut sums = Regression::with_intercept(2, 2);
        let sheared = Matrix::from_fn(2, 2, |i, j| [[1.0, 3.0], [0.0, 0.1]][i][j]);
        sums.add(x.as_ref(), (&x * &sheared).as_ref()).unwrap();
        let rotated = sums.explained_by_rotation().unwrap().unwrap();
        let mapped = sums.explained(&sums.solve(0.0).unwrap()).unwrap();
        assert!(rotated < 0.95 && (mapped - 1.0).abs() < 1e-10, "{rotated}");
    }

    #[test]
    fn a_diagonal_map_scales_each_column() {
        let x = drawn(40, 3, 7);
        let y = Matrix::from_fn(40, 3, |i, j| x[(i, j)] * (j as f64 - 1.0));
        let mut sums = Regression::through_origin(3, 3);
        sums.add(x.as_ref(), y.as_ref()).unwrap();
        let weight = sums.solve_diagonal(0.0).unwrap().weight;
        assert!(
            far(
                &weight,
                &Matrix::from_fn(3, 3, |i, j| match i == j {
                    true => i as f64 - 1.0,
                    false => 0.0,
                })
            ) < 1e-12
        );
    }
}
