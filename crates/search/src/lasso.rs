//! Penalties of a weighted LASSO, one for each coefficient, as what is searched: many variables of which few
//! matter, and no noise but that of the data (the kind of task of LassoBench: Šehić, Gramfort, Salmon,
//! Nardi 2022, arXiv 2111.02790, on data made here).
//!
//! ```text
//! β(λ) = argmin_β 1/(2n) ‖y − X β‖² + Σ_j λ_j |β_j|        f(λ) = 1/m ‖y' − X' β(λ)‖²
//! ```
//!
//! with `X', y'` rows to validate on. A coordinate `t` from −1 to 1 stands for the penalty
//! `λ_max 10^(5 (t − 1) / 2)`, where `λ_max = max_j |x_jᵀ y| / n` leaves no coefficient.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use crate::gaussian::normal;
use crate::{Domain, Error, Result};

/// Decades between the least penalty and the largest.
const DECADES: f64 = 5.0;
/// Passes over all coefficients, if they have not come to rest before.
const SWEEPS: usize = 1000;
/// The change of a coefficient in a pass, relative to the largest, at which they have.
const REST: f64 = 1e-9;

/// What data a [`Lasso`] is made of.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LassoSettings {
    /// Coefficients, and so variables of the search.
    pub coefficients: usize,
    /// Those that are not zero: 1 and −1 in turn, spread evenly.
    pub active: usize,
    /// Rows to fit; as many again validate, and as many test.
    pub rows: usize,
    /// Correlation of neighbouring inputs; of others its power by their distance.
    pub correlation: f64,
    /// Deviation of the noise, in units of that of what it is added to.
    pub noise: f64,
}

impl LassoSettings {
    /// A tenth of the coefficients, at least one, matters; there are half as many rows again as coefficients.
    pub fn new(coefficients: usize) -> Self {
        Self {
            coefficients,
            active: (coefficients / 10).max(1),
            rows: coefficients + coefficients / 2,
            correlation: 0.6,
            noise: 0.3,
        }
    }
}

/// Inputs and what is to be said of each.
#[derive(Clone, Debug, PartialEq)]
struct Rows {
    /// Of each coefficient, its column `[rows]`.
    columns: Vec<Vec<f64>>,
    /// `[rows]`
    targets: Vec<f64>,
}

/// The validation error of a weighted LASSO, by the penalty of each coefficient.
///
/// ```
/// use lapidary_search::{Lasso, LassoSettings};
/// let lasso = Lasso::new(LassoSettings::new(20), 7)?;
/// // The largest penalties leave no coefficient.
/// assert!(lasso.fitted(&[1.0; 20]).iter().all(|beta| *beta == 0.0));
/// let (place, error) = lasso.best_common(21);
/// assert!(place < 1.0 && error < lasso.value(&[1.0; 20]));
/// # Ok::<(), lapidary_search::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Lasso {
    training: Rows,
    validation: Rows,
    tests: Rows,
    largest: f64,
}

impl Lasso {
    /// A task with data drawn by `seed`.
    ///
    /// # Errors
    /// When there is no coefficient or row, more coefficients matter than there are, or a number is none that
    /// can be used.
    pub fn new(settings: LassoSettings, seed: u64) -> Result<Self> {
        let LassoSettings {
            coefficients,
            active,
            rows,
            correlation,
            noise,
        } = settings;
        if coefficients == 0 || rows == 0 {
            let found = format!("{coefficients} and {rows}");
            let expected = "at least 1 each";
            return Err(Error::invalid(
                "coefficients and rows of a LASSO",
                found,
                expected,
            ));
        }
        if active == 0 || active > coefficients {
            let expected = format!("1 to {coefficients}, all there are");
            return Err(Error::invalid("coefficients that matter", active, expected));
        }
        if !(0.0..1.0).contains(&correlation) {
            let expected = "at least 0 and below 1";
            return Err(Error::invalid(
                "correlation of inputs",
                correlation,
                expected,
            ));
        }
        if !(noise >= 0.0 && noise.is_finite()) {
            return Err(Error::invalid("noise of a LASSO", noise, "at least 0"));
        }
        let mut truth = vec![0.0; coefficients];
        for index in 0..active {
            if let Some(beta) = truth.get_mut(index * coefficients / active) {
                *beta = if index % 2 == 0 { 1.0 } else { -1.0 };
            }
        }
        let mut generator = ChaCha8Rng::seed_from_u64(seed);
        let mut draw = || Rows::drawn(&truth, rows, correlation, noise, &mut generator);
        let (training, validation, tests) = (draw(), draw(), draw());
        let products = training.columns.iter();
        let products = products.map(|column| dot(column, &training.targets).abs());
        let largest = products.fold(0.0, f64::max) / rows as f64;
        Ok(Self {
            training,
            validation,
            tests,
            largest,
        })
    }

    /// Number of variables.
    pub fn dimensions(&self) -> usize {
        self.training.columns.len()
    }

    /// A grid of `places` penalties for each coefficient, even in their logarithms.
    ///
    /// # Errors
    /// When there are none.
    pub fn domain(&self, places: usize) -> Result<Domain> {
        Domain::uniform(self.dimensions(), -1.0, 1.0, places)
    }

    /// The mean squared error on the rows to validate on, with penalties at `places` from −1 to 1. Of
    /// coefficients beyond those given the penalty is the largest.
    pub fn value(&self, places: &[f64]) -> f64 {
        self.validation.error(&self.fitted(places))
    }

    /// The same on rows that nothing else looks at.
    pub fn test_error(&self, places: &[f64]) -> f64 {
        self.tests.error(&self.fitted(places))
    }

    /// The best of `count` penalties that all coefficients share: its place and its validation error.
    pub fn best_common(&self, count: usize) -> (f64, f64) {
        let last = count.saturating_sub(1).max(1) as f64;
        let places = (0..count.max(1)).map(|index| 1.0 - 2.0 * index as f64 / last);
        let errors = places.map(|place| (place, self.value(&vec![place; self.dimensions()])));
        errors
            .min_by(|a, b| a.1.total_cmp(&b.1))
            .unwrap_or((1.0, f64::INFINITY))
    }

    /// The coefficients that penalties at `places` leave.
    pub fn fitted(&self, places: &[f64]) -> Vec<f64> {
        let penalties: Vec<f64> = (0..self.dimensions())
            .map(|index| {
                let place = places.get(index).copied().unwrap_or(1.0);
                self.largest * 10f64.powf(0.5 * DECADES * (place - 1.0))
            })
            .collect();
        self.training.fitted(&penalties)
    }
}

impl Rows {
    fn drawn(
        truth: &[f64],
        rows: usize,
        correlation: f64,
        noise: f64,
        generator: &mut ChaCha8Rng,
    ) -> Self {
        let fresh = (1.0 - correlation * correlation).sqrt();
        let mut columns: Vec<Vec<f64>> = Vec::with_capacity(truth.len());
        for _ in truth {
            let column = match columns.last() {
                None => (0..rows).map(|_| normal(generator)).collect(),
                Some(before) => before
                    .iter()
                    .map(|x| correlation * x + fresh * normal(generator))
                    .collect(),
            };
            columns.push(column);
        }
        let mut targets = vec![0.0; rows];
        for (column, beta) in columns.iter().zip(truth) {
            add(&mut targets, *beta, column);
        }
        let deviation = (dot(&targets, &targets) / rows as f64).sqrt();
        for target in &mut targets {
            *target += noise * deviation * normal(generator);
        }
        Self { columns, targets }
    }

    /// The weighted LASSO by coordinate descent: each coefficient in turn is the best while the others stand,
    /// `β_j ← S(x_jᵀ (r + x_j β_j) / n, λ_j) / (x_jᵀ x_j / n)` with `S(ρ, λ) = sgn(ρ) max(|ρ| − λ, 0)`.
    fn fitted(&self, penalties: &[f64]) -> Vec<f64> {
        let count = self.targets.len() as f64;
        let squares: Vec<f64> = self
            .columns
            .iter()
            .map(|column| dot(column, column) / count)
            .collect();
        let mut betas = vec![0.0f64; self.columns.len()];
        let mut rest = self.targets.clone();
        for _ in 0..SWEEPS {
            let mut moved = 0.0f64;
            for (index, beta) in betas.iter_mut().enumerate() {
                let (column, square) = (&self.columns[index], squares[index]);
                if square == 0.0 {
                    continue;
                }
                let reach = dot(column, &rest) / count + square * *beta;
                let next = reach.signum() * (reach.abs() - penalties[index]).max(0.0) / square;
                if next != *beta {
                    add(&mut rest, *beta - next, column);
                    moved = moved.max((next - *beta).abs());
                    *beta = next;
                }
            }
            let most = betas.iter().fold(0.0f64, |most, beta| most.max(beta.abs()));
            if moved <= REST * most {
                break;
            }
        }
        betas
    }

    /// Mean squared error.
    fn error(&self, betas: &[f64]) -> f64 {
        let mut rest = self.targets.clone();
        for (column, beta) in self.columns.iter().zip(betas) {
            add(&mut rest, -beta, column);
        }
        dot(&rest, &rest) / rest.len() as f64
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// `to += factor · of`
fn add(to: &mut [f64], factor: f64, of: &[f64]) {
    for (to, of) in to.iter_mut().zip(of) {
        *to += factor * of;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Columns that are orthogonal and of square 1 on average leave each coefficient to itself.
    #[test]
    fn orthogonal_inputs_are_thresholded_one_by_one() {
        let signs = [[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]];
        let column = |index: usize| signs.iter().map(|row| row[index]).collect::<Vec<f64>>();
        let rows = Rows {
            columns: vec![column(0), column(1)],
            targets: vec![3.0, 1.0, -1.0, -2.0],
        };
        // x_jᵀ y / 4: (3 + 1 + 1 + 2) / 4 and (3 − 1 − 1 + 2) / 4.
        let found = rows.fitted(&[0.5, 1.0]);
        assert!(
            (found[0] - 1.25).abs() < 1e-12 && found[1] == 0.0,
            "{found:?}"
        );
        let found = rows.fitted(&[0.0, 0.25]);
        assert!((found[0] - 1.75).abs() < 1e-12 && (found[1] - 0.5).abs() < 1e-12);
        let expected = [3.0 - 2.25, 1.0 - 1.25, -1.0 + 1.25, -2.0 + 2.25].map(|r: f64| r * r);
        assert!((rows.error(&found) - expected.iter().sum::<f64>() / 4.0).abs() < 1e-12);
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 16, ..ProptestConfig::default() })]

        /// The subgradient of the objective is zero: `|x_jᵀ r| / n` is at most the penalty, and with the
        /// coefficient's sign exactly that where there is one.
        #[test]
        fn what_is_fitted_is_the_optimum(
            places in prop::collection::vec(-1.0f64..1.0, 12),
            seed in 0u64..100,
        ) {
            // Rows enough that the descent comes to rest.
            let settings = LassoSettings { rows: 60, ..LassoSettings::new(12) };
            let lasso = Lasso::new(settings, seed).unwrap();
            let betas = lasso.fitted(&places);
            let Rows { columns, targets } = &lasso.training;
            let mut rest = targets.clone();
            for (column, beta) in columns.iter().zip(&betas) {
                add(&mut rest, -beta, column);
            }
            for ((column, beta), place) in columns.iter().zip(&betas).zip(&places) {
                let reach = dot(column, &rest) / targets.len() as f64;
                let penalty = lasso.largest * 10f64.powf(2.5 * (place - 1.0));
                let tolerance = 1e-6 * lasso.largest;
                prop_assert!(reach.abs() <= penalty + tolerance, "{reach} {penalty}");
                if *beta != 0.0 {
                    prop_assert!((reach - beta.signum() * penalty).abs() <= tolerance);
                }
            }
        }
    }

    #[test]
    fn the_same_seed_is_the_same_task_and_a_common_penalty_is_one_of_many() {
        let settings = LassoSettings::new(10);
        let [one, again, other] = [1, 1, 2].map(|seed| Lasso::new(settings, seed).unwrap());
        assert_eq!(one, again);
        let (place, error) = one.best_common(11);
        assert_eq!(one.value(&[place; 10]), error);
        assert_ne!(one.value(&[place; 10]), other.value(&[place; 10]));
        assert_ne!(one.test_error(&[place; 10]), error);
        let squares = dot(&one.validation.targets, &one.validation.targets);
        assert_eq!(one.value(&[1.0; 10]), squares / 15.0);
        assert_eq!(one.domain(5).unwrap().dimensions(), 10);
        for wrong in [
            LassoSettings {
                active: 0,
                ..settings
            },
            LassoSettings {
                active: 11,
                ..settings
            },
            LassoSettings {
                rows: 0,
                ..settings
            },
            LassoSettings {
                correlation: 1.0,
                ..settings
            },
            LassoSettings {
                noise: f64::NAN,
                ..settings
            },
        ] {
            assert!(Lasso::new(wrong, 1).is_err(), "{wrong:?}");
        }
    }
}
