//! What a decomposition lets observations say, and what it gets wrong.
//!
//! A process with larger terms has more to learn from as many points: its information gain is larger, and
//! with it the bound on regret. One with smaller terms may miss what goes together. Both can be counted
//! for any decomposition, before anything is observed.

use rand::Rng;
use rand::seq::SliceRandom;

use crate::{AdditiveProcess, Error, Point, Result};

impl AdditiveProcess {
    /// What the observations say about the function at their points, `½ log |I + K/σ²|`, in nats. It does
    /// not depend on what was observed.
    ///
    /// ```
    /// use lapidary_search::{AdditiveProcess, Domain, Hyperparameters};
    /// let domain = Domain::uniform(1, 0.0, 1.0, 5)?;
    /// let scales = Hyperparameters::new(1, 0.5, 2.0);
    /// let cliques = vec![vec![0]];
    /// let process = AdditiveProcess::new(&domain, cliques, &scales, 0.5, &[vec![1]], &[0.0])?;
    /// // A variance of 2 beside a noise of ½.
    /// assert!((process.information_gain()? - 0.5 * 5f64.ln()).abs() < 1e-12);
    /// # Ok::<(), lapidary_search::Error>(())
    /// ```
    ///
    /// # Errors
    /// When there is no noise, so that the gain is infinite.
    pub fn information_gain(&self) -> Result<f64> {
        let noise = self.noise();
        if noise <= 0.0 {
            let expected = "above 0, for a finite information gain";
            return Err(Error::invalid("noise", noise, expected));
        }
        let points = self.cholesky.size() as f64;
        Ok(0.5 * (self.cholesky.log_determinant() - points * noise.ln()))
    }

    /// At each of `tests`, the expected squared error of this process's mean when the function is drawn
    /// from `truth` instead and observed at the same points with the noise of `truth`:
    ///
    /// ```text
    /// k*(x, x) − 2 wᵀ k*(X, x) + wᵀ (K* + σ*² I) w        w = K⁻¹ k(X, x)
    /// ```
    ///
    /// No process has a smaller one than `truth` itself, whose error is its posterior variance.
    ///
    /// # Errors
    /// When the two were observed at different points, or a test is no point of the domain of both.
    pub fn expected_errors(&self, truth: &Self, tests: &[Point]) -> Result<Vec<f64>> {
        if self.columns != truth.columns {
            return Err(Error::invalid(
                "points of the other process",
                "other ones",
                "the same, in the same order",
            ));
        }
        for test in tests {
            for process in [self, truth] {
                process.kernel.check(test)?;
            }
        }
        let size = self.cholesky.size();
        let gram = truth.kernel.gram(&truth.columns, size, truth.noise());
        let errors = tests.iter().map(|test| {
            let weights = self.cholesky.solve(&self.covariances(test));
            let covariances = truth.covariances(test);
            let mut error = truth.kernel.total_variance();
            for (row, (weight, covariance)) in weights.iter().zip(&covariances).enumerate() {
                error -= 2.0 * weight * covariance;
                // The lower triangle is filled.
                error += weight * weight * gram[(row, row)];
                let before = weights.iter().take(row).enumerate();
                let products = before.map(|(column, other)| other * gram[(row, column)]);
                error += 2.0 * weight * products.sum::<f64>();
            }
            error
        });
        Ok(errors.collect())
    }

    /// `k(X, x)`.
    fn covariances(&self, point: &[usize]) -> Vec<f64> {
        let size = self.cholesky.size();
        let (mut sum, mut term) = (vec![0.0; size], vec![0.0; size]);
        for (clique, variables) in self.kernel.cliques.iter().enumerate() {
            let places = variables.iter().map(|i| point[*i]);
            self.kernel
                .against(clique, places, &self.columns, 0, &mut term);
            for (sum, term) in sum.iter_mut().zip(&term) {
                *sum += term;
            }
        }
        sum
    }
}

/// Draws a decomposition of `dimensions` variables into cliques of `size`, none of which overlap; the last
/// has the rest.
///
/// # Errors
/// When cliques of no variables are asked for.
pub fn random_partition(
    dimensions: usize,
    size: usize,
    generator: &mut impl Rng,
) -> Result<Vec<Vec<usize>>> {
    if size == 0 {
        return Err(Error::invalid("variables of a clique", 0, "at least 1"));
    }
    let mut order: Vec<usize> = (0..dimensions).collect();
    order.shuffle(generator);
    Ok(order.chunks(size).map(<[usize]>::to_vec).collect())
}

/// The share of all pairs of `dimensions` variables that are in no clique together: the probability that
/// an adversary's pair, drawn evenly, is missed.
pub fn missed_pairs(dimensions: usize, cliques: &[Vec<usize>]) -> f64 {
    let mut missed = 0usize;
    let mut all = 0usize;
    for i in 0..dimensions {
        for j in i + 1..dimensions {
            all += 1;
            let together = |clique: &Vec<usize>| clique.contains(&i) && clique.contains(&j);
            missed += usize::from(!cliques.iter().any(together));
        }
    }
    missed as f64 / all.max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Domain, Forest, Hyperparameters};
    use proptest::prelude::*;
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    const DIMENSIONS: usize = 5;

    fn process(cliques: Vec<Vec<usize>>, points: &[Point], noise: f64) -> AdditiveProcess {
        let domain = Domain::uniform(DIMENSIONS, 0.0, 1.0, 9).unwrap();
        let scales = Hyperparameters {
            lengths: vec![0.2, 0.5, 0.3, 0.8, 0.4],
            amplitudes: vec![1.0, 0.4, 0.7, 0.5, 0.9],
        };
        let zeros = vec![0.0; points.len()];
        AdditiveProcess::new(&domain, cliques, &scales, noise, points, &zeros).unwrap()
    }

    fn drawn(count: usize, generator: &mut ChaCha8Rng) -> Vec<Point> {
        let domain = Domain::uniform(DIMENSIONS, 0.0, 1.0, 9).unwrap();
        (0..count).map(|_| domain.random(generator)).collect()
    }

    proptest! {
        /// Point by point, each says `½ log(1 + s²/σ²)`, `s²` its variance given those before it.
        #[test]
        fn the_gain_is_the_sum_of_what_each_point_says(seed: u64, edges in 0usize..5) {
            let mut generator = ChaCha8Rng::seed_from_u64(seed);
            let points = drawn(8, &mut generator);
            let cliques = Forest::random(DIMENSIONS, edges, &mut generator).unwrap().cliques();
            let noise = 0.07;
            let first = process(cliques.clone(), &points[..1], noise);
            let variance = first.kernel.total_variance();
            let mut sum = 0.5 * (1.0 + variance / noise).ln();
            for count in 1..points.len() {
                let before = process(cliques.clone(), &points[..count], noise);
                let found = before.predict(&points[count..=count]).unwrap()[0];
                sum += 0.5 * (1.0 + found.variance / noise).ln();
            }
            let whole = process(cliques, &points, noise).information_gain().unwrap();
            prop_assert!((whole - sum).abs() < 1e-6, "{} {}", whole, sum);
        }

        /// The truth errs by its posterior variance, and whatever else is assumed by no less.
        #[test]
        fn no_decomposition_errs_less_than_the_true_one(seed: u64, size in 1usize..=5) {
            let mut generator = ChaCha8Rng::seed_from_u64(seed);
            let (points, tests) = (drawn(10, &mut generator), drawn(6, &mut generator));
            let truth = Forest::random(DIMENSIONS, 3, &mut generator).unwrap().cliques();
            let truth = process(truth, &points, 0.05);
            let assumed = random_partition(DIMENSIONS, size, &mut generator).unwrap();
            let assumed = process(assumed, &points, 0.05);
            let own = truth.expected_errors(&truth, &tests).unwrap();
            let other = assumed.expected_errors(&truth, &tests).unwrap();
            let predicted = truth.predict(&tests).unwrap();
            for ((own, other), found) in own.iter().zip(other).zip(predicted) {
                prop_assert!((own - found.variance).abs() < 1e-8);
                prop_assert!(other >= own - 1e-9, "{} {}", other, own);
            }
        }

        #[test]
        fn a_partition_has_every_variable_once(dimensions in 1usize..30, size in 1usize..9, seed: u64) {
            let mut generator = ChaCha8Rng::seed_from_u64(seed);
            let cliques = random_partition(dimensions, size, &mut generator).unwrap();
            prop_assert!(cliques.iter().rev().skip(1).all(|clique| clique.len() == size));
            let mut all: Vec<usize> = cliques.concat();
            all.sort_unstable();
            prop_assert_eq!(all, (0..dimensions).collect::<Vec<_>>());
        }
    }

    #[test]
    fn pairs_are_missed_that_no_clique_has() {
        let all = vec![vec![0, 1, 2, 3]];
        assert_eq!(missed_pairs(4, &all), 0.0);
        assert_eq!(missed_pairs(4, &[vec![0], vec![1], vec![2], vec![3]]), 1.0);
        // 0–1 and 2–1 of six.
        let overlapping = [vec![0, 1], vec![2, 1], vec![3]];
        assert!((missed_pairs(4, &overlapping) - 4.0 / 6.0).abs() < 1e-12);
        assert_eq!(missed_pairs(1, &[vec![0]]), 0.0);
    }

    #[test]
    fn what_cannot_be_compared_is_refused() {
        let mut generator = ChaCha8Rng::seed_from_u64(1);
        let points = drawn(4, &mut generator);
        let a = process(vec![vec![0, 1]], &points, 0.1);
        let b = process(vec![vec![0, 1]], &points[..3], 0.1);
        assert!(a.expected_errors(&b, &points).is_err());
        assert!(a.expected_errors(&a, &[vec![0]]).is_err());
        let error = a.expected_errors(&a, &[vec![0, 0, 0, 9, 0]]).unwrap_err();
        let error = error.to_string();
        assert!(
            error.contains("coordinate 3") && error.contains("below 9"),
            "{error}"
        );
        assert!(random_partition(3, 0, &mut generator).is_err());
        let exact = process(vec![vec![0, 1, 2, 3, 4]], &points[..1], 0.0);
        assert!(exact.information_gain().is_err());
    }
}
