//! Coding rates of tokens, and the idealised layers that lower them (Yu et al., CRATE, arXiv
//! 2306.01129; the journal version, arXiv 2311.13110). Tokens are columns of `Z` `[width, tokens]`.
//!
//! ```text
//! R(Z)        = ½ log det(I + d/(N ε²) Zᵀ Z)
//! R^c(Z | U)  = ½ Σ_k log det(I + p/(N ε²) (U_kᵀ Z)ᵀ (U_kᵀ Z))
//! ```

use lapidary_factor::{Matrix, cholesky, qr, symmetric_eigen};
use lapidary_train::Generator;
use rand::RngExt;

use crate::Result;

/// Independent normal numbers.
pub(super) fn normal(rows: usize, columns: usize, generator: &mut Generator) -> Matrix {
    Matrix::from_fn(rows, columns, |_, _| {
        // Box and Muller's transform of two uniform numbers.
        let radius = (-2.0 * (1.0 - generator.random::<f64>()).ln()).sqrt();
        radius * (2.0 * std::f64::consts::PI * generator.random::<f64>()).cos()
    })
}

/// Orthonormal bases `[width, width / subspaces]` that together span everything.
pub(super) fn subspaces(width: usize, subspaces: usize, generator: &mut Generator) -> Vec<Matrix> {
    let all = qr(normal(width, width, generator).as_ref()).q;
    let each = width / subspaces.max(1);
    (0..subspaces)
        .map(|k| Matrix::from_fn(width, each, |i, j| all[(i, k * each + j)]))
        .collect()
}

/// `½ log det(I + scale · Wᵀ W)`.
fn half_log_det(projected: &Matrix, scale: f64) -> Result<f64> {
    // The smaller of the two Gram matrices has the same determinant.
    let gram = match projected.nrows() < projected.ncols() {
        true => projected * projected.transpose(),
        false => projected.transpose() * projected,
    };
    let size = gram.nrows();
    let shifted = Matrix::from_fn(size, size, |i, j| {
        scale * gram[(i, j)] + if i == j { 1.0 } else { 0.0 }
    });
    let eigen = symmetric_eigen("Gram matrix", shifted.as_ref())?;
    Ok(0.5 * eigen.values.iter().map(|value| value.ln()).sum::<f64>())
}

/// `R^c(Z | U)`.
pub(super) fn rate(z: &Matrix, bases: &[Matrix], precision: f64) -> Result<f64> {
    let mut sum = 0.0;
    for basis in bases {
        let scale = basis.ncols() as f64 / (z.ncols() as f64 * precision * precision);
        sum += half_log_det(&(basis.transpose() * z), scale)?;
    }
    Ok(sum)
}

/// `∇R^c = p/(N ε²) Σ_k U_k U_kᵀ Z (I + p/(N ε²) (U_kᵀ Z)ᵀ (U_kᵀ Z))⁻¹`.
pub(super) fn rate_gradient(z: &Matrix, bases: &[Matrix], precision: f64) -> Result<Matrix> {
    let mut sum = Matrix::zeros(z.nrows(), z.ncols());
    for basis in bases {
        let scale = basis.ncols() as f64 / (z.ncols() as f64 * precision * precision);
        let projected = basis.transpose() * z;
        let size = projected.nrows();
        // W (I + s Wᵀ W)⁻¹ = (I + s W Wᵀ)⁻¹ W, which is small.
        let gram = &projected * projected.transpose();
        let shifted = Matrix::from_fn(size, size, |i, j| {
            scale * gram[(i, j)] + if i == j { 1.0 } else { 0.0 }
        });
        let solved = cholesky("Gram matrix", shifted.as_ref())?.solve(projected.as_ref())?;
        let step = basis * solved;
        sum = Matrix::from_fn(z.nrows(), z.ncols(), |i, j| {
            sum[(i, j)] + scale * step[(i, j)]
        });
    }
    Ok(sum)
}

/// `Σ_k U_k (U_kᵀ Z) f((U_kᵀ Z)ᵀ (U_kᵀ Z))`, `f` working on the column of scores of each token.
pub(super) fn attend(z: &Matrix, bases: &[Matrix], f: impl Fn(&mut [f64])) -> Matrix {
    let mut sum = Matrix::zeros(z.nrows(), z.ncols());
    for basis in bases {
        let projected = basis.transpose() * z;
        let scores = projected.transpose() * &projected;
        let tokens = z.ncols();
        let mut weights = Matrix::zeros(tokens, tokens);
        let mut column = vec![0.0; tokens];
        for j in 0..tokens {
            for (i, score) in column.iter_mut().enumerate() {
                *score = scores[(i, j)];
            }
            f(&mut column);
            for (i, weight) in column.iter().enumerate() {
                weights[(i, j)] = *weight;
            }
        }
        sum += basis * (projected * weights);
    }
    sum
}

/// Softmax of one token's scores.
pub(super) fn softmax(scores: &mut [f64]) {
    let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let mut sum = 0.0;
    for score in scores.iter_mut() {
        *score = (*score - most).exp();
        sum += *score;
    }
    scores.iter_mut().for_each(|score| *score /= sum);
}

/// Tokens of a mixture of subspaces: `U_k a + δ Σ_{j ≠ k} U_j e`, as many of each, one class after
/// another.
pub(super) fn mixture(
    bases: &[Matrix],
    each: usize,
    noise: f64,
    generator: &mut Generator,
) -> Matrix {
    let width = bases.first().map_or(0, Matrix::nrows);
    let mut z = Matrix::zeros(width, each * bases.len());
    for k in 0..bases.len() {
        for (j, basis) in bases.iter().enumerate() {
            let scale = if j == k { 1.0 } else { noise };
            let part = basis * normal(basis.ncols(), each, generator);
            for column in 0..each {
                for row in 0..width {
                    z[(row, k * each + column)] += scale * part[(row, column)];
                }
            }
        }
    }
    z
}

/// `‖U_k U_kᵀ Z_k‖ / ‖(I − U_k U_kᵀ) Z_k‖` of each class of a mixture.
pub(super) fn signal_to_noise(z: &Matrix, bases: &[Matrix]) -> Vec<f64> {
    let each = z.ncols() / bases.len().max(1);
    bases
        .iter()
        .enumerate()
        .map(|(k, basis)| {
            let own = Matrix::from_fn(z.nrows(), each, |i, j| z[(i, k * each + j)]);
            let inside = basis * (basis.transpose() * &own);
            let norm = |m: &Matrix| lapidary_factor::frobenius_norm(m.as_ref());
            norm(&inside) / norm(&(own - &inside))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use lapidary_train::generator;

    #[test]
    fn the_gradient_of_the_rate_equals_finite_differences() {
        let mut random = generator(1);
        let bases = subspaces(12, 3, &mut random);
        let z = normal(12, 7, &mut random);
        let gradient = rate_gradient(&z, &bases, 0.7).unwrap();
        for (i, j) in [(0, 0), (3, 5), (11, 6), (7, 2)] {
            let moved = |by: f64| {
                let mut other = z.clone();
                other[(i, j)] += by;
                rate(&other, &bases, 0.7).unwrap()
            };
            let slope = (moved(1e-5) - moved(-1e-5)) / 2e-5;
            assert!((slope - gradient[(i, j)]).abs() < 1e-7);
        }
    }

    #[test]
    fn both_gram_matrices_give_one_rate() {
        let mut random = generator(2);
        let z = normal(5, 9, &mut random);
        let whole = [Matrix::from_fn(5, 5, |i, j| f64::from(u8::from(i == j)))];
        let wide = rate(&z, &whole, 0.5).unwrap();
        let scale = 5.0 / (9.0 * 0.25);
        let gram = z.transpose() * &z;
        let shifted = Matrix::from_fn(9, 9, |i, j| {
            scale * gram[(i, j)] + f64::from(u8::from(i == j))
        });
        let eigen = symmetric_eigen("Gram", shifted.as_ref()).unwrap();
        let long: f64 = eigen.values.iter().map(|v| 0.5 * v.ln()).sum();
        assert!((wide - long).abs() < 1e-10);
    }

    #[test]
    fn bases_together_are_an_orthonormal_one() {
        let bases = subspaces(12, 3, &mut generator(4));
        let mut sum = Matrix::zeros(12, 12);
        for (k, basis) in bases.iter().enumerate() {
            sum += basis * basis.transpose();
            for (j, other) in bases.iter().enumerate() {
                let gram = basis.transpose() * other;
                let expected = |a: usize, b: usize| f64::from(u8::from(k == j && a == b));
                let near = |a: usize, b: usize| (gram[(a, b)] - expected(a, b)).abs() < 1e-12;
                assert!((0..4).all(|a| (0..4).all(|b| near(a, b))), "{k} {j}");
            }
        }
        for i in 0..12 {
            for j in 0..12 {
                let expected = f64::from(u8::from(i == j));
                assert!((sum[(i, j)] - expected).abs() < 1e-12);
            }
        }
    }

    /// Down its exact gradient by `κ`, or by attention's step `(1 − κ s) Z + κ s · s MSSA(Z)` with `s = p/(N ε²)`.
    #[test]
    fn small_steps_lower_the_rate() {
        let mut random = generator(5);
        let bases = subspaces(64, 4, &mut random);
        let z = mixture(&bases, 32, 0.3, &mut random);
        for precision in [0.5, 1.0] {
            let before = rate(&z, &bases, precision).unwrap();
            let scale = 16.0 / (128.0 * precision * precision);
            let gradient = rate_gradient(&z, &bases, precision).unwrap();
            let attended = attend(&z, &bases, softmax);
            for step in [1e-3, 1e-2, 1e-1] {
                let moved = |of: &dyn Fn(usize, usize) -> f64| {
                    let z = Matrix::from_fn(64, 128, of);
                    rate(&z, &bases, precision).unwrap() - before
                };
                let down = moved(&|i, j| z[(i, j)] - step * gradient[(i, j)]);
                assert!(down < 0.0, "{precision} {step}: {down}");
                // To first order the rate falls by κ ‖∇‖².
                if step < 1e-2 {
                    let norm = lapidary_factor::frobenius_norm(gradient.as_ref());
                    let expected = -step * norm * norm;
                    assert!((down / expected - 1.0).abs() < 0.01, "{down} {expected}");
                }
                let by = step * scale;
                let attention =
                    moved(&|i, j| (1.0 - by) * z[(i, j)] + by * scale * attended[(i, j)]);
                assert!(attention < 0.0, "{precision} {step}: {attention}");
            }
        }
    }

    /// The first-order approximation of the inverse errs by the square of what is inverted.
    #[test]
    fn the_first_order_approximation_errs_by_the_square() {
        let mut random = generator(3);
        let bases = subspaces(12, 3, &mut random);
        let z = normal(12, 7, &mut random);
        let error = |scale: f64| {
            let z = Matrix::from_fn(12, 7, |i, j| scale * z[(i, j)]);
            let exact = rate_gradient(&z, &bases, 1.0).unwrap();
            let factor = 4.0 / 7.0;
            let attended = attend(&z, &bases, |_| {});
            let first = Matrix::from_fn(12, 7, |i, j| {
                factor * (z[(i, j)] - factor * attended[(i, j)])
            });
            let norm = |m: &Matrix| lapidary_factor::frobenius_norm(m.as_ref());
            norm(&(&first - &exact)) / norm(&z)
        };
        // Relative to Z the error is of fourth order in its scale: the square of the Gram matrix.
        let slope = (error(0.05) / error(0.025)).log2();
        assert!((slope - 4.0).abs() < 0.1, "{slope}");
    }
}
