//! Small matrices for tests.

use lapidary_factor::Matrix;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

pub(super) fn random(rows: usize, columns: usize, seed: u64) -> Matrix {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    Matrix::from_fn(rows, columns, |_, _| rng.random_range(-1.0..1.0))
}

/// `XᵀX` of random `X` `[rows, size]`.
pub(super) fn second_moment(rows: usize, size: usize, seed: u64) -> Matrix {
    let x = random(rows, size, seed);
    x.transpose() * &x
}

/// `‖C^{1/2} Δᵀ‖²` of `Δ` `[output, input]`.
pub(super) fn energy(difference: &Matrix, c: &Matrix) -> f64 {
    let product = difference * c * difference.transpose();
    (0..product.nrows()).map(|i| product[(i, i)]).sum()
}
