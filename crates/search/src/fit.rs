//! Length-scales and amplitudes from what was observed, by marginal likelihood.

use serde::{Deserialize, Serialize};

use crate::{AdditiveProcess, Domain, Error, Hyperparameters, Point, Result};

/// How hyper-parameters are fitted: by a few steps up the gradient of the likelihood each time, none
/// longer than `reach`. They are carried from one time to the next, so that they change slowly
/// while little is known.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fit {
    /// Steps each time; 0 leaves them as they are.
    pub steps: usize,
    /// Longest step, over all length-scales and amplitudes together.
    pub reach: f64,
    /// Least and largest length-scale.
    pub lengths: (f64, f64),
    /// Least and largest amplitude.
    pub amplitudes: (f64, f64),
}

impl Default for Fit {
    fn default() -> Self {
        Self {
            steps: 2,
            reach: 1.0,
            lengths: (1e-2, 1e5),
            amplitudes: (0.1f64.sqrt(), 1e5),
        }
    }
}

impl Fit {
    /// Refuses steps and bounds that nothing can be fitted by.
    pub(crate) fn check(&self) -> Result<()> {
        if !(self.reach >= 0.0 && self.reach.is_finite()) {
            return Err(Error::invalid("reach", self.reach, "at least 0"));
        }
        for (what, (low, high)) in [
            ("bounds of length-scales", self.lengths),
            ("bounds of amplitudes", self.amplitudes),
        ] {
            if !(low > 0.0 && high >= low && high.is_finite()) {
                let expected = "two positive numbers, the larger one last";
                return Err(Error::invalid(what, format!("{low} and {high}"), expected));
            }
        }
        Ok(())
    }
}

/// Times that a step which does not climb is halved before it is given up.
const HALVINGS: i32 = 6;

/// Hyper-parameters of a likelihood no smaller than that of `start`.
///
/// # Errors
/// When the reach or the bounds of `fit` are none, or [`AdditiveProcess::new`] refuses the other
/// arguments.
pub fn fitted(
    domain: &Domain,
    cliques: &[Vec<usize>],
    start: &Hyperparameters,
    noise: f64,
    points: &[Point],
    values: &[f64],
    fit: &Fit,
) -> Result<Hyperparameters> {
    fit.check()?;
    let process = |scales: &Hyperparameters| {
        AdditiveProcess::new(domain, cliques.to_vec(), scales, noise, points, values)
    };
    let mut here = start.clone();
    let mut current = process(&here)?;
    for _ in 0..fit.steps {
        let slope = slope(&current, &here);
        let norm = slope.lengths.iter().chain(&slope.amplitudes);
        let norm = norm.map(|s| s * s).sum::<f64>().sqrt();
        if !(norm > 0.0 && norm.is_finite()) {
            break;
        }
        let longest = fit.reach.min(norm) / norm;
        let mut found = None;
        for halving in 0..HALVINGS {
            let there = moved(&here, &slope, longest * 0.5f64.powi(halving), fit);
            let next = process(&there)?;
            if next.log_likelihood() > current.log_likelihood() {
                found = Some((there, next));
                break;
            }
        }
        let Some((there, next)) = found else {
            break;
        };
        (here, current) = (there, next);
    }
    Ok(here)
}

/// The gradient by the numbers themselves.
fn slope(process: &AdditiveProcess, at: &Hyperparameters) -> Hyperparameters {
    let gradient = process.gradient();
    let over = |slopes: Vec<f64>, values: &[f64]| {
        let pairs = slopes.into_iter().zip(values);
        pairs.map(|(slope, value)| slope / value).collect()
    };
    Hyperparameters {
        lengths: over(gradient.lengths, &at.lengths),
        amplitudes: over(gradient.amplitudes, &at.amplitudes),
    }
}

fn moved(from: &Hyperparameters, slope: &Hyperparameters, by: f64, fit: &Fit) -> Hyperparameters {
    let within = |values: &[f64], slopes: &[f64], (low, high): (f64, f64)| {
        let pairs = values.iter().zip(slopes);
        pairs
            .map(|(value, slope)| (value + by * slope).clamp(low, high))
            .collect()
    };
    Hyperparameters {
        lengths: within(&from.lengths, &slope.lengths, fit.lengths),
        amplitudes: within(&from.amplitudes, &slope.amplitudes, fit.amplitudes),
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
            amplitudes: (1e-3, 1e2),
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

    #[test]
    fn reaches_and_bounds_that_are_none_are_refused() {
        let domain = Domain::uniform(1, 0.0, 1.0, 3).unwrap();
        let start = Hyperparameters::new(1, 0.1, 0.5);
        let fit = Fit::default();
        let turned = Fit {
            lengths: (2.0, 1.0),
            ..fit.clone()
        };
        let zero = Fit {
            amplitudes: (0.0, 1.0),
            ..fit.clone()
        };
        let backwards = Fit {
            reach: -1.0,
            ..fit.clone()
        };
        let fitted = |fit: &Fit| {
            let points = [vec![0], vec![2]];
            fitted(&domain, &[vec![0]], &start, 0.1, &points, &[0.0, 1.0], fit)
        };
        assert!(fitted(&fit).is_ok());
        for (fit, expected) in [
            (
                turned,
                "bounds of length-scales is 2 and 1, but must be two positive numbers, the larger one last",
            ),
            (
                zero,
                "bounds of amplitudes is 0 and 1, but must be two positive numbers, the larger one last",
            ),
            (backwards, "reach is -1, but must be at least 0"),
        ] {
            assert_eq!(fitted(&fit).unwrap_err().to_string(), expected);
        }
    }
}
