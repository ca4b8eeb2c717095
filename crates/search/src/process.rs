//! A Gaussian process that is a sum of processes of few variables.
//!
//! With `K = Σ_c K_c + σ² I` over the points that were observed, each term has a posterior of its
//! own (Duvenaud, Nickisch, Rasmussen 2011, arXiv 1112.4394):
//!
//! ```text
//! μ_c(x) = k_c(x, X) K⁻¹ y        s_c²(x) = k_c(x, x) − k_c(x, X) K⁻¹ k_c(X, x)
//! ```
//!
//! The means add up to that of the sum. The variances do not: terms share what they do not know.

use faer::Mat;

use crate::cholesky::Cholesky;
use crate::history::columns;
use crate::kernel::Kernel;
use crate::{Domain, Error, Hyperparameters, Point, Result};

/// A variance below this is rounding.
const LEAST_VARIANCE: f64 = 1e-10;

/// Mean and variance of one function value.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Marginal {
    /// The mean.
    pub mean: f64,
    /// The variance, above zero.
    pub variance: f64,
}

/// An additive process, given what was observed.
///
/// ```
/// use lapidary_search::{AdditiveProcess, Domain, Hyperparameters};
/// let domain = Domain::uniform(2, 0.0, 1.0, 5)?;
/// let cliques = vec![vec![0], vec![1]];
/// let scales = Hyperparameters::new(2, 0.5, 1.0);
/// let points = [vec![0, 0], vec![4, 4]];
/// let process = AdditiveProcess::new(&domain, cliques, &scales, 1e-6, &points, &[1.0, 3.0])?;
/// let terms = process.marginals(&[(0, &[4]), (1, &[4])])?;
/// assert!((terms[0].mean + terms[1].mean - 3.0).abs() < 1e-3);
/// # Ok::<(), lapidary_search::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct AdditiveProcess {
    pub(crate) kernel: Kernel,
    pub(crate) columns: Vec<Vec<usize>>,
    pub(crate) amplitudes: Vec<f64>,
    pub(crate) cholesky: Cholesky,
    /// `K⁻¹ y`.
    pub(crate) weights: Vec<f64>,
    values: Vec<f64>,
    noise: f64,
}

impl AdditiveProcess {
    /// The posterior, given `values` with noise of variance `noise` at `points`. The prior's mean is
    /// zero.
    ///
    /// # Errors
    /// When there are no points, the numbers of points and values differ, a point or clique
    /// is not of the domain, or the covariance is not positive definite.
    pub fn new(
        domain: &Domain,
        cliques: Vec<Vec<usize>>,
        hyperparameters: &Hyperparameters,
        noise: f64,
        points: &[Point],
        values: &[f64],
    ) -> Result<Self> {
        if points.is_empty() || points.len() != values.len() {
            return Err(Error::invalid(
                "number of values",
                format!("{} at {} points", values.len(), points.len()),
                "one at each point, and at least one",
            ));
        }
        if !(noise >= 0.0 && noise.is_finite()) {
            return Err(Error::invalid("noise", noise, "at least 0"));
        }
        for point in points {
            domain.check(point)?;
        }
        let kernel = Kernel::new(domain, cliques, hyperparameters)?;
        let columns = columns(domain, points);
        let cholesky = Cholesky::new(&kernel.gram(&columns, points.len(), noise))?;
        Ok(Self {
            weights: cholesky.solve(values),
            amplitudes: hyperparameters.amplitudes.clone(),
            values: values.to_vec(),
            kernel,
            columns,
            cholesky,
            noise,
        })
    }

    /// The posterior with one more point and other values: in `O(n²)`, since the factor grows.
    ///
    /// # Errors
    /// When the point is not of the domain, there is not one value for each point, or the grown
    /// covariance is singular.
    pub(crate) fn grown(&self, domain: &Domain, point: &[usize], values: &[f64]) -> Result<Self> {
        domain.check(point)?;
        let size = self.values.len();
        if values.len() != size + 1 {
            let expected = (size + 1).to_string();
            return Err(Error::invalid("number of values", values.len(), expected));
        }
        let mut columns = self.columns.clone();
        for (column, place) in columns.iter_mut().zip(point) {
            column.push(*place);
        }
        let mut row = vec![0.0; size + 1];
        self.kernel.row(size, &columns, 0, &mut row);
        let diagonal = row.pop().unwrap_or_default() + self.noise;
        let cholesky = self.cholesky.grown(&row, diagonal)?;
        Ok(Self {
            kernel: self.kernel.clone(),
            amplitudes: self.amplitudes.clone(),
            weights: cholesky.solve(values),
            values: values.to_vec(),
            columns,
            cholesky,
            noise: self.noise,
        })
    }

    /// The variance of the noise.
    pub(crate) fn noise(&self) -> f64 {
        self.noise
    }

    /// The terms: the variables of each.
    pub fn cliques(&self) -> &[Vec<usize>] {
        &self.kernel.cliques
    }

    /// The posterior of single terms, each query a clique's number and the places of its
    /// variables, in their order.
    ///
    /// # Errors
    /// When there is no clique of a number, or the places are not one of the grid of each of its
    /// variables.
    pub fn marginals(&self, queries: &[(usize, &[usize])]) -> Result<Vec<Marginal>> {
        for (clique, places) in queries {
            self.kernel.check_term(*clique, places)?;
        }
        let size = self.values.len();
        let mut rows = Mat::zeros(size, queries.len());
        let mut buffer = vec![0.0; size];
        for (query, (clique, places)) in queries.iter().enumerate() {
            let places = places.iter().copied();
            self.kernel
                .against(*clique, places, &self.columns, 0, &mut buffer);
            rows.col_mut(query)
                .iter_mut()
                .zip(&buffer)
                .for_each(|(to, from)| *to = *from);
        }
        let priors: Vec<f64> = queries
            .iter()
            .map(|(clique, _)| self.kernel.variances[*clique])
            .collect();
        Ok(self.conditioned(rows, &priors))
    }

    /// The posterior of the sum at whole points.
    ///
    /// # Errors
    /// When a point is not of the domain.
    pub fn predict(&self, points: &[Point]) -> Result<Vec<Marginal>> {
        for point in points {
            self.kernel.check(point)?;
        }
        let size = self.values.len();
        let mut rows = Mat::zeros(size, points.len());
        let mut buffer = vec![0.0; size];
        for (number, point) in points.iter().enumerate() {
            for (clique, variables) in self.kernel.cliques.iter().enumerate() {
                let places = variables.iter().map(|i| point[*i]);
                self.kernel
                    .against(clique, places, &self.columns, 0, &mut buffer);
                rows.col_mut(number)
                    .iter_mut()
                    .zip(&buffer)
                    .for_each(|(to, from)| *to += *from);
            }
        }
        let priors = vec![self.kernel.total_variance(); points.len()];
        Ok(self.conditioned(rows, &priors))
    }

    /// Marginals of function values of which `rows` holds the covariances with the points
    /// `[points, values]`, and `priors` the variances.
    fn conditioned(&self, mut rows: Mat<f64>, priors: &[f64]) -> Vec<Marginal> {
        let inner = |column: faer::ColRef<'_, f64>| -> f64 {
            column.iter().zip(&self.weights).map(|(k, w)| k * w).sum()
        };
        let means: Vec<f64> = (0..priors.len()).map(|q| inner(rows.col(q))).collect();
        // k K⁻¹ k = ‖L⁻¹ k‖².
        self.cholesky.forward(rows.as_mut());
        let each = means.into_iter().zip(priors).enumerate();
        each.map(|(query, (mean, prior))| Marginal {
            mean,
            variance: (prior - rows.col(query).squared_norm_l2()).max(LEAST_VARIANCE),
        })
        .collect()
    }

    /// `−½ yᵀ K⁻¹ y − ½ log |K| − n/2 log 2π`.
    pub fn log_likelihood(&self) -> f64 {
        let fit: f64 = self
            .values
            .iter()
            .zip(&self.weights)
            .map(|(y, w)| y * w)
            .sum();
        let constant = self.values.len() as f64 * std::f64::consts::TAU.ln();
        -0.5 * (fit + self.cholesky.log_determinant() + constant)
    }

    /// The gradient of [`Self::log_likelihood`] by the logarithms of length-scales and amplitudes:
    /// `½ tr((K⁻¹ y yᵀ K⁻¹ − K⁻¹) ∂K)`.
    pub fn gradient(&self) -> Hyperparameters {
        let size = self.values.len();
        // The factor ½ tr counts each pair below the diagonal once.
        let mut pull = self.cholesky.inverse();
        for column in 0..size {
            for row in column..size {
                let outer = self.weights[row] * self.weights[column];
                let half = if row == column { 0.5 } else { 1.0 };
                pull[(row, column)] = half * (outer - pull[(row, column)]);
            }
        }
        let dimensions = self.amplitudes.len();
        let mut gradient = Hyperparameters::new(dimensions, 0.0, 0.0);
        let mut by_variance = vec![0.0; self.kernel.cliques.len()];
        let mut buffer = vec![0.0; size];
        for of in 0..size {
            let pull = pull.col(of).subrows(of, size - of);
            for (clique, variables) in self.kernel.cliques.iter().enumerate() {
                let terms = &mut buffer[of..];
                self.kernel.between(clique, of, &self.columns, of, terms);
                for (term, pull) in terms.iter_mut().zip(pull.iter()) {
                    *term *= pull;
                }
                by_variance[clique] += terms.iter().sum::<f64>();
                for variable in variables {
                    let distances = &self.kernel.distances[*variable];
                    let column = &self.columns[*variable][of..];
                    let sum: f64 = terms
                        .iter()
                        .zip(column)
                        .map(|(term, place)| term * distances[place.abs_diff(column[0])])
                        .sum();
                    gradient.lengths[*variable] += sum;
                }
            }
        }
        for (clique, variables) in self.kernel.cliques.iter().enumerate() {
            // ∂ log v_c / ∂ log v_i = v_i² / v_c².
            let share = by_variance[clique] / self.kernel.variances[clique].powi(2);
            for variable in variables {
                gradient.amplitudes[*variable] += share * self.amplitudes[*variable].powi(2);
            }
        }
        gradient
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Forest;
    use proptest::prelude::*;
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    /// Points, values and hyper-parameters drawn for a domain of uneven grids.
    struct Drawn {
        domain: Domain,
        scales: Hyperparameters,
        points: Vec<Point>,
        values: Vec<f64>,
        generator: ChaCha8Rng,
    }

    fn drawn(dimensions: usize, count: usize, seed: u64) -> Drawn {
        let mut generator = ChaCha8Rng::seed_from_u64(seed);
        let grids = (0..dimensions).map(|i| (0..5 + 3 * i).map(|p| p as f64).collect());
        let domain = Domain::new(grids.collect()).unwrap();
        let mut positive = |low: f64, high: f64| -> Vec<f64> {
            (0..dimensions)
                .map(|_| generator.random_range(low..high))
                .collect()
        };
        let scales = Hyperparameters {
            lengths: positive(0.1, 0.6),
            amplitudes: positive(0.3, 1.5),
        };
        let points = (0..count).map(|_| domain.random(&mut generator)).collect();
        let values = (0..count)
            .map(|_| generator.random_range(-1.0..1.0))
            .collect();
        Drawn {
            domain,
            scales,
            points,
            values,
            generator,
        }
    }

    impl Drawn {
        fn process(&self, cliques: Vec<Vec<usize>>, noise: f64) -> AdditiveProcess {
            let (points, values) = (&self.points, &self.values);
            AdditiveProcess::new(&self.domain, cliques, &self.scales, noise, points, values)
                .unwrap()
        }
    }

    /// The covariance written out, from what stands in the paper.
    fn covariance(drawn: &Drawn, cliques: &[Vec<usize>], a: &[usize], b: &[usize]) -> f64 {
        let term = |clique: &Vec<usize>| -> f64 {
            let variance = clique
                .iter()
                .map(|i| drawn.scales.amplitudes[*i].powi(2))
                .sum::<f64>();
            let distance = clique.iter().map(|i| {
                let width = (drawn.domain.places(*i) - 1) as f64;
                ((a[*i] as f64 - b[*i] as f64) / width / drawn.scales.lengths[*i]).powi(2)
            });
            variance.sqrt() * (-0.5 * distance.sum::<f64>()).exp()
        };
        cliques.iter().map(term).sum()
    }

    proptest! {
        #[test]
        fn means_add_up_and_variances_are_positive(seed: u64, edges in 0usize..5) {
            let mut drawn = drawn(5, 12, seed);
            let forest = Forest::random(5, edges, &mut drawn.generator).unwrap();
            let process = drawn.process(forest.cliques(), 0.05);
            for _ in 0..5 {
                let point = drawn.domain.random(&mut drawn.generator);
                let places: Vec<Vec<usize>> = process.cliques().iter()
                    .map(|clique| clique.iter().map(|i| point[*i]).collect()).collect();
                let queries: Vec<(usize, &[usize])> =
                    places.iter().enumerate().map(|(c, p)| (c, p.as_slice())).collect();
                let terms = process.marginals(&queries).unwrap();
                let whole = process.predict(std::slice::from_ref(&point)).unwrap()[0];
                let sum: f64 = terms.iter().map(|term| term.mean).sum();
                prop_assert!((sum - whole.mean).abs() < 1e-9, "{} {}", sum, whole.mean);
                prop_assert!(terms.iter().all(|term| term.variance > 0.0));
                prop_assert!(whole.variance > 0.0);
            }
        }
    }

    #[test]
    fn one_clique_is_an_ordinary_process_and_the_factor_agrees_with_the_inverse() {
        let mut drawn = drawn(3, 10, 11);
        for cliques in [vec![vec![0, 1, 2]], vec![vec![0, 2], vec![1]]] {
            let process = drawn.process(cliques.clone(), 0.02);
            let gram = Mat::from_fn(10, 10, |i, j| {
                let noise = if i == j { 0.02 } else { 0.0 };
                covariance(&drawn, &cliques, &drawn.points[i], &drawn.points[j]) + noise
            });
            // An inverse that never sees a Cholesky factor.
            let eigen = gram.self_adjoint_eigen(faer::Side::Lower).unwrap();
            let inverse = Mat::from_fn(10, 10, |i, j| -> f64 {
                let vectors = eigen.U();
                let values = eigen.S().column_vector();
                (0..10)
                    .map(|k| vectors[(i, k)] * vectors[(j, k)] / values[k])
                    .sum()
            });
            for _ in 0..10 {
                let point = drawn.domain.random(&mut drawn.generator);
                let row: Vec<f64> = drawn
                    .points
                    .iter()
                    .map(|other| covariance(&drawn, &cliques, &point, other))
                    .collect();
                let product = |i: usize| -> f64 { (0..10).map(|j| inverse[(i, j)] * row[j]).sum() };
                let mean: f64 = (0..10).map(|i| product(i) * drawn.values[i]).sum();
                let explained: f64 = (0..10).map(|i| product(i) * row[i]).sum();
                let prior = covariance(&drawn, &cliques, &point, &point);
                let found = process.predict(&[point]).unwrap()[0];
                assert!((found.mean - mean).abs() < 1e-9);
                assert!((found.variance - (prior - explained)).abs() < 1e-9);
            }
        }
    }

    #[test]
    fn without_noise_it_passes_through_what_was_observed() {
        let mut drawn = drawn(4, 9, 2);
        drawn.points.sort();
        drawn.points.dedup();
        drawn.values.truncate(drawn.points.len());
        let far = |noise: f64| -> f64 {
            let process = drawn.process(vec![vec![0, 1, 2, 3]], noise);
            let found = process.predict(&drawn.points).unwrap();
            let errors = found.iter().zip(&drawn.values);
            errors.map(|(f, y)| (f.mean - y).abs()).fold(0.0, f64::max)
        };
        assert!(far(1e-10) < 1e-6, "{}", far(1e-10));
        assert!(far(1e-2) > far(1e-4) && far(1e-4) > far(1e-6));
    }

    #[test]
    fn a_grown_process_is_the_process_of_all_points() {
        let drawn = drawn(4, 12, 4);
        let cliques = vec![vec![0, 3], vec![1], vec![2]];
        let (points, values) = (&drawn.points[..11], &drawn.values[..11]);
        let before = AdditiveProcess::new(
            &drawn.domain,
            cliques.clone(),
            &drawn.scales,
            0.01,
            points,
            values,
        );
        let grown = before
            .unwrap()
            .grown(&drawn.domain, &drawn.points[11], &drawn.values)
            .unwrap();
        let fresh = drawn.process(cliques, 0.01);
        assert!((grown.log_likelihood() - fresh.log_likelihood()).abs() < 1e-9);
        let [found, expected] =
            [&grown, &fresh].map(|process| process.predict(&drawn.points).unwrap());
        for (a, b) in found.iter().zip(&expected) {
            assert!((a.mean - b.mean).abs() < 1e-9 && (a.variance - b.variance).abs() < 1e-9);
        }
    }

    #[test]
    fn the_gradient_is_that_of_finite_differences() {
        let drawn = drawn(5, 14, 8);
        for cliques in [
            vec![vec![0, 1], vec![1, 2], vec![3], vec![4]],
            vec![vec![0, 1, 2, 3, 4]],
        ] {
            let gradient = drawn.process(cliques.clone(), 0.03).gradient();
            let at = |scales: Hyperparameters| {
                let (points, values) = (&drawn.points, &drawn.values);
                AdditiveProcess::new(
                    &drawn.domain,
                    cliques.clone(),
                    &scales,
                    0.03,
                    points,
                    values,
                )
                .unwrap()
                .log_likelihood()
            };
            let step: f64 = 1e-5;
            for variable in 0..5 {
                let moved = |of_length: bool, by: f64| {
                    let mut scales = drawn.scales.clone();
                    match of_length {
                        true => scales.lengths[variable] *= by.exp(),
                        false => scales.amplitudes[variable] *= by.exp(),
                    }
                    at(scales)
                };
                for (of_length, found) in [
                    (true, gradient.lengths[variable]),
                    (false, gradient.amplitudes[variable]),
                ] {
                    let slope = (moved(of_length, step) - moved(of_length, -step)) / (2.0 * step);
                    assert!(
                        (found - slope).abs() < 1e-6 * (1.0 + slope.abs()),
                        "{found} {slope}"
                    );
                }
            }
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let drawn = drawn(2, 3, 1);
        let make = |cliques, scales: &Hyperparameters, values: &[f64]| {
            AdditiveProcess::new(&drawn.domain, cliques, scales, 0.1, &drawn.points, values)
        };
        assert!(make(vec![vec![2]], &drawn.scales, &drawn.values).is_err());
        assert!(make(vec![vec![0]], &drawn.scales, &[1.0]).is_err());
        let negative = Hyperparameters::new(2, -1.0, 1.0);
        assert!(make(vec![vec![0]], &negative, &drawn.values).is_err());
        let long = make(
            vec![vec![0]],
            &Hyperparameters::new(3, 1.0, 1.0),
            &drawn.values,
        );
        let error = long.unwrap_err().to_string();
        assert!(error.ends_with("must be 2 positive numbers"), "{error}");
    }

    #[test]
    fn a_question_about_what_is_not_there_is_refused() {
        // Grids of 5 and of 8 places.
        let drawn = drawn(2, 3, 1);
        let process = drawn.process(vec![vec![1], vec![1, 0]], 0.1);
        let terms = |clique: usize, places: &[usize]| process.marginals(&[(clique, places)]);
        let whole = |point: &[usize]| process.predict(&[point.to_vec()]);
        assert_eq!(terms(1, &[7, 4]).unwrap().len(), 1);
        assert_eq!(whole(&[4, 7]).unwrap().len(), 1);
        for (found, expected) in [
            (
                terms(2, &[0]),
                "number of a clique is 2, but must be below 2",
            ),
            (
                terms(1, &[0]),
                "number of places for clique 1 is 1, but must be 2, one for each of [1, 0]",
            ),
            (
                terms(0, &[0, 0]),
                "number of places for clique 0 is 2, but must be 1, one for each of [1]",
            ),
            (
                terms(1, &[4, 7]),
                "place in coordinate 0 is 7, but must be below 5",
            ),
            (
                whole(&[4, 8]),
                "place in coordinate 1 is 8, but must be below 8",
            ),
            (
                whole(&[4]),
                "number of coordinates of a point is 1, but must be 2",
            ),
        ] {
            assert_eq!(found.unwrap_err().to_string(), expected);
        }
    }
}
