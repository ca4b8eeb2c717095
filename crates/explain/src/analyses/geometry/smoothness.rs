//! How smoothly vectors change with position: their Gram matrix in frequencies.

use lapidary_factor::Matrix;

/// `G = P̂ P̂ᵀ`, `[positions, positions]`, for the rows of `positions` scaled to norm one; rows of
/// zeros stay zero.
pub fn gram(positions: &Matrix) -> Matrix {
    let norms: Vec<f64> = (0..positions.nrows())
        .map(|t| positions.row(t).norm_l2())
        .collect();
    let unit = Matrix::from_fn(positions.nrows(), positions.ncols(), |t, i| {
        match norms[t] {
            0.0 => 0.0,
            norm => positions[(t, i)] / norm,
        }
    });
    &unit * unit.transpose()
}

/// The orthonormal cosine basis (DCT-II): column `k` is
/// `√((1 + [k > 0]) / n) cos(π (t + ½) k / n)`.
pub fn cosine_basis(size: usize) -> Matrix {
    let n = size as f64;
    Matrix::from_fn(size, size, |t, k| {
        let scale = if k == 0 { 1.0 / n } else { 2.0 / n };
        scale.sqrt() * (std::f64::consts::PI * (t as f64 + 0.5) * k as f64 / n).cos()
    })
}

/// `F = Dᵀ G D`, the two-dimensional DCT-II of a square matrix.
pub fn frequencies(gram: &Matrix) -> Matrix {
    let basis = cosine_basis(gram.nrows());
    basis.transpose() * gram * &basis
}

/// The share of `‖F‖²` in the first `cutoff` rows and columns; zero of zeros.
pub fn low_frequency_share(frequencies: &Matrix, cutoff: usize) -> f64 {
    let all = frequencies.norm_l2().powi(2);
    if all == 0.0 {
        return 0.0;
    }
    let cutoff = cutoff.min(frequencies.nrows());
    let low = frequencies.as_ref().submatrix(0, 0, cutoff, cutoff);
    low.norm_l2().powi(2) / all
}

/// `‖G − G_K‖ / ‖G‖` in the Frobenius norm for each cutoff `K`, with `G_K` the part of the first
/// `K` frequencies. For a kernel that is even about both ends and whose mixed differences of
/// order `m` are bounded it falls like `K^{−m}` or faster.
pub fn truncation_errors(frequencies: &Matrix, cutoffs: &[usize]) -> Vec<f64> {
    let all = frequencies.norm_l2();
    let error = |cutoff: &usize| {
        // Summed from the outside, as `1 − share` would lose the small ones.
        let mut rest = 0.0;
        for i in 0..frequencies.nrows() {
            for j in 0..frequencies.ncols() {
                if i >= *cutoff || j >= *cutoff {
                    rest += frequencies[(i, j)].powi(2);
                }
            }
        }
        if all == 0.0 { 0.0 } else { rest.sqrt() / all }
    };
    cutoffs.iter().map(error).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::analyses::power_law::PowerLaw;

    #[test]
    fn the_cosine_basis_is_orthonormal() {
        for size in [1, 2, 7, 32] {
            let basis = cosine_basis(size);
            let product = basis.transpose() * &basis;
            let identity = Matrix::identity(size, size);
            assert!((product - identity).norm_max() < 1e-12);
        }
    }

    #[test]
    fn a_wave_has_one_frequency() {
        let size = 32;
        let basis = cosine_basis(size);
        let wave = Matrix::from_fn(size, size, |s, t| basis[(s, 3)] * basis[(t, 5)]);
        let found = frequencies(&wave);
        assert!((found[(3, 5)] - 1.0).abs() < 1e-12);
        assert!((found.norm_l2() - 1.0).abs() < 1e-12);
        assert!(low_frequency_share(&found, 5) < 1e-20);
        assert!((low_frequency_share(&found, 6) - 1.0).abs() < 1e-12);
    }

    #[test]
    fn white_noise_has_the_share_of_its_area() {
        // An orthogonal matrix: G of independent vectors is the identity.
        let size = 40;
        let share = low_frequency_share(&frequencies(&Matrix::identity(size, size)), 10);
        assert!((share - 0.25).abs() < 1e-12, "{share}");
    }

    /// Kernels on `[0, 1]²` that are even about both ends, so that the order of their smoothness
    /// is that inside: `Σ_k k^{−p} cos(πks) cos(πkt)` has error `∝ K^{½ − p}`.
    #[test]
    fn the_error_falls_at_the_rate_of_the_smoothness() {
        let size = 128;
        let at = |t: usize| std::f64::consts::PI * (t as f64 + 0.5) / size as f64;
        for order in [1.5, 2.0, 3.0] {
            let kernel = Matrix::from_fn(size, size, |s, t| {
                (1..size)
                    .map(|k| {
                        let k = k as f64;
                        k.powf(-order) * (k * at(s)).cos() * (k * at(t)).cos()
                    })
                    .sum()
            });
            let cutoffs = [4, 6, 8, 12, 16, 24];
            let errors = truncation_errors(&frequencies(&kernel), &cutoffs);
            let points: Vec<(f64, f64)> = cutoffs
                .iter()
                .zip(&errors)
                .map(|(k, e)| (*k as f64, *e))
                .collect();
            let law = PowerLaw::fit(&points).unwrap();
            assert!(
                (law.exponent + (order - 0.5)).abs() < 0.25,
                "{order}: {law:?}"
            );
            assert!(law.r_squared > 0.99);
        }
        // Analytic: no power is fast enough.
        let analytic = Matrix::from_fn(size, size, |s, t| (at(s).cos() * at(t).cos()).exp());
        let errors = truncation_errors(&frequencies(&analytic), &[4, 8]);
        assert!(errors[1] < errors[0] * 1e-3, "{errors:?}");
    }

    #[test]
    fn the_gram_matrix_has_ones_on_its_diagonal() {
        let positions = Matrix::from_fn(3, 2, |t, i| (t + 2 * i) as f64);
        let gram = gram(&positions);
        for t in 0..3 {
            assert!((gram[(t, t)] - 1.0).abs() < 1e-12);
        }
        assert_eq!(super::gram(&Matrix::zeros(3, 2)).norm_max(), 0.0);
    }
}
