//! Length-scales and amplitudes from what was observed, by marginal likelihood.

use serde::{Deserialize, Serialize};

use crate::{AdditiveProcess, Domain, Hyperparameters, Point, Result};

/// How hyper-parameters are fitted: steps of resilient propagation (Riedmiller & Braun 1993) on
/// their logarithms, where each has a step of its own that grows while the gradient keeps its sign
/// and shrinks when it changes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fit {
    /// Steps each time; 0 leaves them as they are.
    pub steps: usize,
    /// Least and largest length-scale.
    pub lengths: (f64, f64),
    /// Least and largest amplitude.
    pub amplitudes: (f64, f64),
}

impl Default for Fit {
    fn default() -> Self {
        Self {
            steps: 16,
            lengths: (0.02, 10.0),
            amplitudes: (1e-3, 1e2),
        }
    }
}

const FIRST_STEP: f64 = 0.1;
const LARGEST_STEP: f64 = 0.5;
const GROWTH: f64 = 1.2;
const SHRINKAGE: f64 = 0.5;

/// The hyper-parameters of the largest likelihood that was met from `start` on.
///
/// # Errors
/// When [`AdditiveProcess::new`] refuses the arguments.
pub fn fitted(
    domain: &Domain,
    cliques: &[Vec<usize>],
    start: &Hyperparameters,
    noise: f64,
    points: &[Point],
    values: &[f64],
    fit: &Fit,
) -> Result<Hyperparameters> {
    let process = |scales: &Hyperparameters| {
        AdditiveProcess::new(domain, cliques.to_vec(), scales, noise, points, values)
    };
    let mut here = start.clone();
    let mut best = (f64::NEG_INFINITY, here.clone());
    let dimensions = domain.dimensions();
    let mut lengths = Steps::new(dimensions);
    let mut amplitudes = Steps::new(dimensions);
    for step in 0..=fit.steps {
        let process = process(&here)?;
        let likelihood = process.log_likelihood();
        if likelihood > best.0 {
            best = (likelihood, here.clone());
        }
        if step == fit.steps {
            break;
        }
        let gradient = process.gradient();
        lengths.climb(&mut here.lengths, &gradient.lengths, fit.lengths);
        amplitudes.climb(&mut here.amplitudes, &gradient.amplitudes, fit.amplitudes);
    }
    Ok(best.1)
}

struct Steps {
    sizes: Vec<f64>,
    slopes: Vec<f64>,
}

impl Steps {
    fn new(count: usize) -> Self {
        Self {
            sizes: vec![FIRST_STEP; count],
            slopes: vec![0.0; count],
        }
    }

    fn climb(&mut self, values: &mut [f64], slopes: &[f64], (low, high): (f64, f64)) {
        for (i, value) in values.iter_mut().enumerate() {
            let slope = slopes[i];
            let agreement = slope * self.slopes[i];
            if agreement > 0.0 {
                self.sizes[i] = (self.sizes[i] * GROWTH).min(LARGEST_STEP);
            } else if agreement < 0.0 {
                self.sizes[i] *= SHRINKAGE;
            }
            self.slopes[i] = slope;
            if slope != 0.0 && slope.is_finite() {
                *value = (*value * (self.sizes[i] * slope.signum()).exp()).clamp(low, high);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    #[test]
    fn fitting_raises_the_likelihood_and_tells_variables_that_matter() {
        let domain = Domain::uniform(3, 0.0, 1.0, 30).unwrap();
        let mut generator = ChaCha8Rng::seed_from_u64(2);
        let points: Vec<Point> = (0..40).map(|_| domain.random(&mut generator)).collect();
        // Only the first variable matters.
        let values: Vec<f64> = points.iter().map(|p| (p[0] as f64 / 6.0).sin()).collect();
        let start = Hyperparameters::new(3, 0.1, 0.5);
        let cliques = vec![vec![0], vec![1], vec![2]];
        let likelihood = |scales: &Hyperparameters| {
            AdditiveProcess::new(&domain, cliques.clone(), scales, 0.01, &points, &values)
                .unwrap()
                .log_likelihood()
        };
        let fit = Fit {
            steps: 40,
            ..Fit::default()
        };
        let found = fitted(&domain, &cliques, &start, 0.01, &points, &values, &fit).unwrap();
        assert!(likelihood(&found) > likelihood(&start) + 10.0);
        assert!(found.amplitudes[0] > 10.0 * found.amplitudes[1].max(found.amplitudes[2]));
        let none = Fit {
            steps: 0,
            ..Fit::default()
        };
        let same = fitted(&domain, &cliques, &start, 0.01, &points, &values, &none).unwrap();
        assert_eq!(same, start);
    }
}
