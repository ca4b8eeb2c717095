//! All bits at once, for codes `Y` `[token, bit]`:
//!
//! ```text
//! ‖β S − Y Yᵀ‖² = ‖β S‖² + 2 n β J,   J = (½ ‖Yᵀ Y‖² − β tr Yᵀ S Y) / n β,   Y = 2 σ(κ Aᵀ) − 1
//! ```
//!
//! of which bit by bit each has its own part, given those before it. Here none comes first: gradient descent
//! with Nesterov's momentum on all hashes, averaged over sequences, whose end is taken where `J` of the
//! signs is lower.

use super::fit::{Bit, Fit, Residual, Sample, dot, sigmoid};

/// `J`, for the entries of each bit.
fn objective(left: &Residual<'_>, codes: &[Vec<f64>]) -> f64 {
    let grams = codes
        .iter()
        .flat_map(|a| codes.iter().map(move |b| dot(a, b)));
    let squares: f64 = grams.map(|gram| gram * gram).sum();
    let agreement: f64 = codes.iter().map(|code| left.agreement(code)).sum();
    left.scale() * (0.5 * squares - agreement)
}

/// `∂J/∂A`, a row for each bit.
fn gradient(left: &Residual<'_>, hashes: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let codes: Vec<Vec<f64>> = hashes
        .iter()
        .map(|hash| {
            let projected = left.sample().projected(hash).into_iter();
            projected.map(|x| 2.0 * sigmoid(x) - 1.0).collect()
        })
        .collect();
    let of = |code: &Vec<f64>| {
        let mut slopes: Vec<f64> = left.both_sides(code).into_iter().map(|x| -x).collect();
        for other in &codes {
            let share = 2.0 * dot(code, other);
            for (slope, entry) in slopes.iter_mut().zip(other) {
                *slope += share * entry;
            }
        }
        let mut sum = vec![0.0; hashes.first().map_or(0, Vec::len)];
        let rows = left.sample().kernels.iter().zip(slopes).zip(code);
        for ((kernels, slope), y) in rows {
            // dy/dz = 2 σ (1 − σ) = (1 − y²) / 2
            let slope = left.scale() * slope * (1.0 - y * y) / 2.0;
            for (sum, kernel) in sum.iter_mut().zip(kernels) {
                *sum += slope * kernel;
            }
        }
        sum
    };
    codes.iter().map(of).collect()
}

/// Learns one head's hashes from `start` together; gives them and what became of them.
pub(super) fn learn(samples: &[Sample], start: &[Vec<f64>], fit: &Fit) -> (Vec<Vec<f64>>, Bit) {
    let each = 1.0 / samples.len().max(1) as f64;
    let left: Vec<Residual<'_>> = samples
        .iter()
        .map(|sample| Residual::new(sample, start.len()))
        .collect();
    let mut hashes = start.to_vec();
    let mut velocities: Vec<Vec<f64>> = start.iter().map(|hash| vec![0.0; hash.len()]).collect();
    for _ in 0..fit.iterations {
        let mut slopes: Vec<Vec<f64>> = start.iter().map(|hash| vec![0.0; hash.len()]).collect();
        for left in &left {
            let found = gradient(left, &hashes).into_iter().flatten();
            for (slope, one) in slopes.iter_mut().flatten().zip(found) {
                *slope += each * one;
            }
        }
        let all = hashes.iter_mut().flatten();
        let all = all.zip(velocities.iter_mut().flatten());
        for ((at, velocity), slope) in all.zip(slopes.into_iter().flatten()) {
            *velocity = fit.momentum * *velocity + slope;
            *at -= fit.rate * (slope + fit.momentum * *velocity);
        }
    }
    let of_signs = |hashes: &[Vec<f64>]| -> Vec<f64> {
        let one = |left: &Residual<'_>| {
            let codes: Vec<Vec<f64>> = hashes.iter().map(|h| left.sample().signs(h)).collect();
            objective(left, &codes)
        };
        left.iter().map(one).collect()
    };
    let (before, found) = (of_signs(start), of_signs(&hashes));
    let mean = |objectives: &[f64]| each * objectives.iter().sum::<f64>();
    let accepted = mean(&found) < mean(&before);
    let after = if accepted { &found } else { &before };
    let residuals = left
        .iter()
        .zip(after)
        .map(|(left, objective)| left.squares() + 2.0 * objective / left.scale());
    let bit = Bit {
        before: mean(&before),
        after: mean(after),
        accepted,
        residual: residuals.sum(),
    };
    match accepted {
        true => (hashes, bit),
        false => (start.to_vec(), bit),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gradient_equals_central_differences() {
        let number = |at: usize| (at as f64 * 1.7 + 0.3).sin();
        let sample = Sample {
            kernels: (0..5)
                .map(|i| (0..3).map(|j| number(3 * i + j)).collect())
                .collect(),
            targets: (0..5)
                .map(|i| vec![(i, 1.0), ((i + 2) % 5, -1.0)])
                .collect(),
        };
        let left = Residual::new(&sample, 2);
        let hashes: Vec<Vec<f64>> = (0..2)
            .map(|r| (0..3).map(|j| number(20 + 3 * r + j)).collect())
            .collect();
        let smooth = |hashes: &[Vec<f64>]| {
            let codes: Vec<Vec<f64>> = hashes
                .iter()
                .map(|hash| {
                    let projected = sample.projected(hash).into_iter();
                    projected.map(|x| 2.0 * sigmoid(x) - 1.0).collect()
                })
                .collect();
            objective(&left, &codes)
        };
        let found = gradient(&left, &hashes);
        for r in 0..2 {
            for j in 0..3 {
                let moved = |by: f64| {
                    let mut hashes = hashes.clone();
                    hashes[r][j] += by;
                    smooth(&hashes)
                };
                let slope = (moved(1e-5) - moved(-1e-5)) / 2e-5;
                assert!((found[r][j] - slope).abs() < 1e-8);
            }
        }
    }
}
