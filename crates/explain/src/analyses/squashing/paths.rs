//! How much of an early token can reach the last vector: sums over paths through layers.
//!
//! With attention weights `α` and the deviations of norms held fixed, and a feed-forward part of
//! Lipschitz constant `σ`,
//!
//! `‖∂y_n / ∂v_i‖ ≤ K Σ_{i ≤ k_1 ≤ … ≤ n} ᾱ^{(L−1)}_{n,k} … ᾱ^{(0)}_{k,i}`,
//! `ᾱ_{ij} = α_{ij} / β_1 + δ_{ij}`, `K = (1 / β_3) Π_l (σ / β_2 + 1)`,
//!
//! and the sum is the last row of a product of matrices: `L n²` operations.

use lapidary_factor::Matrix;

/// `ᾱ = α / β_1 + δ` of weights `[query, key]`.
pub fn mixing(weights: &Matrix, beta: f64) -> Matrix {
    Matrix::from_fn(weights.nrows(), weights.ncols(), |i, j| {
        weights[(i, j)] / beta + if i == j { 1.0 } else { 0.0 }
    })
}

/// Weights of a causal head that cannot tell its keys apart: `α_ij = 1 / i`.
pub fn uniform(length: usize) -> Matrix {
    Matrix::from_fn(length, length, |i, j| {
        if j <= i { 1.0 / (i + 1) as f64 } else { 0.0 }
    })
}

/// The last row of `layers[L − 1] · … · layers[0]`, each `[n, n]`; empty of no layers.
pub fn path_sums(layers: &[Matrix]) -> Vec<f64> {
    let size = layers.first().map_or(0, Matrix::nrows);
    let mut row = vec![0.0; size];
    if let Some(last) = row.last_mut() {
        *last = 1.0;
    }
    for layer in layers.iter().rev() {
        let mut next = vec![0.0; size];
        for (i, weight) in row.iter().enumerate() {
            if *weight == 0.0 {
                continue;
            }
            for (j, sum) in next.iter_mut().enumerate() {
                *sum += weight * layer[(i, j)];
            }
        }
        row = next;
    }
    row
}

/// `K` of the paper's bound.
pub fn lipschitz_factor(sigma: f64, feedforward_betas: &[f64], final_beta: f64) -> f64 {
    let layers = feedforward_betas.iter().map(|beta| sigma / beta + 1.0);
    layers.product::<f64>() / final_beta
}

/// The least and the largest weight that a softmax over `count` logits within `[−b, b]` can give:
/// `e^{∓2b} / n`. Attention over a fixed vocabulary fades as sequences grow.
pub fn dilution(b: f64, count: usize) -> (f64, f64) {
    let n = count.max(1) as f64;
    ((-2.0 * b).exp() / n, (2.0 * b).exp() / n)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_over_paths_are_rows_of_a_product() {
        let size = 6;
        let layers: Vec<Matrix> = (0..3)
            .map(|l| {
                Matrix::from_fn(size, size, |i, j| {
                    if j <= i {
                        ((i * 7 + j * 3 + l) % 5) as f64 + 0.5
                    } else {
                        0.0
                    }
                })
            })
            .collect();
        let product = &layers[2] * &layers[1] * &layers[0];
        for (i, sum) in path_sums(&layers).iter().enumerate() {
            assert!((sum - product[(size - 1, i)]).abs() < 1e-9);
        }
    }

    #[test]
    fn uniform_attention_favours_early_tokens() {
        let size = 20;
        let beta = 1.7;
        for layers in 1..5 {
            let sums = path_sums(&vec![mixing(&uniform(size), beta); layers]);
            for pair in sums[..size - 1].windows(2) {
                match layers {
                    1 => assert!((pair[0] - pair[1]).abs() < 1e-12),
                    _ => assert!(pair[0] > pair[1], "{layers}: {pair:?}"),
                }
            }
            let total: f64 = sums.iter().sum();
            let expected = (1.0 / beta + 1.0).powi(layers as i32);
            assert!((total - expected).abs() < 1e-9 * expected);
        }
    }

    #[test]
    fn logits_within_bounds_cannot_stay_sharp() {
        for (count, b) in [(1, 0.3), (7, 1.0), (300, 2.5)] {
            let (least, most) = dilution(b, count);
            let logits: Vec<f64> = (0..count)
                .map(|i| b * ((i * i) as f64 * 0.77 + b).sin())
                .collect();
            let sum: f64 = logits.iter().map(|logit| logit.exp()).sum();
            for logit in logits {
                let weight = logit.exp() / sum;
                assert!(least <= weight && weight <= most);
            }
        }
        // The extremes come close: one logit against all others.
        let (_, most) = dilution(1.0, 1000);
        let sharpest = 1f64.exp() / (1f64.exp() + 999.0 * (-1f64).exp());
        assert!(sharpest <= most && sharpest > 0.98 * most);
    }

    #[test]
    fn the_factor_by_hand() {
        assert_eq!(lipschitz_factor(2.0, &[1.0, 4.0], 0.5), 3.0 * 1.5 / 0.5);
    }
}
