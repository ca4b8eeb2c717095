//! How tokens move under attention, in continuous depth.

use super::particles::{Particles, dot};
use crate::analyses::random::normal;
use crate::{Error, Result};
use lapidary_factor::Matrix;
use rand::Rng;

/// Most dimensions that matrices are drawn for.
const MOST_DIMENSIONS: usize = 1 << 13;

/// Which of the two flows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Flow {
    /// `x_i' = P_{x_i} (1/Z_i) Σ_j e^{β⟨Q x_i, K x_j⟩} V x_j`, `Z_i = Σ_j e^{β⟨Q x_i, K x_j⟩}`.
    #[default]
    SelfAttention,
    /// `x_i' = P_{x_i} (1/n) Σ_j e^{β⟨Q x_i, K x_j⟩} V x_j`, which is simpler to analyse.
    Unnormalised,
}

/// A flow with its inverse temperature and matrices, `P_x y = y − ⟨x, y⟩ x`.
#[derive(Clone, Debug, Default)]
pub struct Dynamics {
    flow: Flow,
    beta: f64,
    /// `Qᵀ K`; the identity when absent.
    query_key: Option<Matrix>,
    /// `V`; the identity when absent.
    value: Option<Matrix>,
}

/// Which `Qᵀ K` and `V` a flow has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Matrices {
    /// Both the identity.
    #[default]
    Identity,
    /// `Q`, `K` and `V` with independent normal entries of variance `1/d`.
    Gaussian,
    /// `Qᵀ K = V` from the Gaussian orthogonal ensemble: symmetric, so that the energy rises.
    Symmetric,
    /// The identity and its negative: particles repel each other, and the energy falls.
    Repulsive,
}

/// How a step is taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Scheme {
    /// `(x + h x') / |x + h x'|`: first order.
    #[default]
    Euler,
    /// `(x + h m) / |x + h m|` with `m` what attention writes, before any projection: what a
    /// Transformer's block with its norm after the residual does. First order.
    Block,
    /// The classical fourth-order Runge–Kutta step, and back to the sphere.
    RungeKutta,
}

/// What attention writes for every particle, and its normalisers.
struct Written {
    /// `[count · dimension]`.
    mean: Vec<f64>,
    /// `ln Z_i`.
    log_normaliser: Vec<f64>,
}

impl Dynamics {
    /// A flow with `Q = K = V = 1`.
    ///
    /// # Errors
    /// When `beta` is not finite.
    pub fn new(flow: Flow, beta: f64) -> Result<Self> {
        if !beta.is_finite() {
            return Err(Error::invalid("beta", beta, "a number"));
        }
        Ok(Self {
            flow,
            beta,
            query_key: None,
            value: None,
        })
    }

    /// The same with another `Qᵀ K` and `V`, each `[dimension, dimension]`.
    ///
    /// # Errors
    /// When they are not square.
    pub fn with_matrices(self, query_key: Option<Matrix>, value: Option<Matrix>) -> Result<Self> {
        for matrix in query_key.iter().chain(&value) {
            if matrix.nrows() != matrix.ncols() {
                return Err(Error::invalid(
                    "matrix of the dynamics",
                    format!("{} by {}", matrix.nrows(), matrix.ncols()),
                    "square",
                ));
            }
        }
        Ok(Self {
            query_key,
            value,
            ..self
        })
    }

    /// The same with matrices of a kind, in `dimension` dimensions.
    ///
    /// # Errors
    /// When there are no dimensions, or the matrices would be too large.
    pub fn with_drawn(
        self,
        matrices: Matrices,
        dimension: usize,
        generator: &mut impl Rng,
    ) -> Result<Self> {
        if !(1..=MOST_DIMENSIONS).contains(&dimension) {
            let expected = format!("between 1 and {MOST_DIMENSIONS}");
            return Err(Error::invalid(
                "dimension of the matrices",
                dimension,
                expected,
            ));
        }
        let deviation = 1.0 / (dimension as f64).sqrt();
        let mut gaussian =
            || Matrix::from_fn(dimension, dimension, |_, _| deviation * normal(generator));
        match matrices {
            Matrices::Identity => self.with_matrices(None, None),
            Matrices::Gaussian => {
                let (query, key, value) = (gaussian(), gaussian(), gaussian());
                self.with_matrices(Some(query.transpose() * key), Some(value))
            }
            Matrices::Symmetric => {
                let noise = gaussian();
                let symmetric = Matrix::from_fn(dimension, dimension, |i, j| {
                    (noise[(i, j)] + noise[(j, i)]) / f64::sqrt(2.0)
                });
                self.with_matrices(Some(symmetric.clone()), Some(symmetric))
            }
            Matrices::Repulsive => {
                let minus =
                    Matrix::from_fn(dimension, dimension, |i, j| -f64::from(u8::from(i == j)));
                self.with_matrices(None, Some(minus))
            }
        }
    }

    /// The inverse temperature.
    pub fn beta(&self) -> f64 {
        self.beta
    }

    fn check(&self, particles: &Particles) -> Result<()> {
        let dimension = particles.dimension();
        let matrices = self.query_key.iter().chain(&self.value);
        match matrices.map(|m| m.nrows()).find(|rows| *rows != dimension) {
            Some(rows) => Err(Error::invalid(
                "dimension of the particles",
                dimension,
                format!("{rows}, as the matrices have"),
            )),
            None => Ok(()),
        }
    }

    /// `Σ_j w_ij V x_j` with the flow's weights.
    fn written(&self, particles: &Particles) -> Written {
        let (count, dimension) = (particles.count(), particles.dimension());
        // Rows y_i = x_i Qᵀ K, so that ⟨Q x_i, K x_j⟩ = ⟨y_i, x_j⟩; and V x_j.
        let keys = self
            .query_key
            .as_ref()
            .map(|m| applied(particles, m, false));
        let values = self.value.as_ref().map(|m| applied(particles, m, true));
        let rows = keys.as_deref().unwrap_or(particles.points());
        let values = values.as_deref().unwrap_or(particles.points());
        let mut mean = vec![0.0; count * dimension];
        let mut log_normaliser = Vec::with_capacity(count);
        let mut weights = vec![0.0; count];
        let each = rows
            .chunks_exact(dimension)
            .zip(mean.chunks_exact_mut(dimension));
        for (row, mean) in each {
            let mut highest = f64::NEG_INFINITY;
            for (weight, x) in weights.iter_mut().zip(particles.iter()) {
                *weight = self.beta * dot(row, x);
                highest = highest.max(*weight);
            }
            let mut sum = 0.0;
            for weight in &mut weights {
                *weight = (*weight - highest).exp();
                sum += *weight;
            }
            log_normaliser.push(highest + sum.ln());
            let scale = match self.flow {
                Flow::SelfAttention => 1.0 / sum,
                Flow::Unnormalised => highest.exp() / count as f64,
            };
            for (weight, value) in weights.iter().zip(values.chunks_exact(dimension)) {
                let weight = weight * scale;
                mean.iter_mut()
                    .zip(value)
                    .for_each(|(m, v)| *m += weight * v);
            }
        }
        Written {
            mean,
            log_normaliser,
        }
    }

    /// `x_i'` of every particle, `[count · dimension]`.
    ///
    /// # Errors
    /// When the matrices are of another dimension.
    pub fn velocity(&self, particles: &Particles) -> Result<Vec<f64>> {
        self.check(particles)?;
        Ok(projected(particles, self.written(particles).mean))
    }

    /// `ln Z_i` of every particle.
    ///
    /// # Errors
    /// When the matrices are of another dimension.
    pub fn log_normalisers(&self, particles: &Particles) -> Result<Vec<f64>> {
        self.check(particles)?;
        Ok(self.written(particles).log_normaliser)
    }

    /// `E = (1 / 2 β n²) Σ_ij e^{β ⟨Q x_i, K x_j⟩}`, which both flows ascend when `V = Qᵀ K` is
    /// symmetric, and descend when `V = −Qᵀ K`. At `β = 0`, where it is constant but for its slope
    /// in `β`: `(1 / 2 n²) Σ_ij ⟨Q x_i, K x_j⟩`.
    ///
    /// # Errors
    /// When the matrices are of another dimension.
    pub fn energy(&self, particles: &Particles) -> Result<f64> {
        self.check(particles)?;
        let square = (particles.count() as f64).powi(2);
        if self.beta == 0.0 {
            let keys = self
                .query_key
                .as_ref()
                .map(|m| applied(particles, m, false));
            let rows = keys.as_deref().unwrap_or(particles.points());
            let each = rows.chunks_exact(particles.dimension());
            let sum: f64 = each
                .flat_map(|row| particles.iter().map(|x| dot(row, x)))
                .sum();
            return Ok(sum / (2.0 * square));
        }
        let normalisers = self.written(particles).log_normaliser;
        let sum: f64 = normalisers.iter().map(|z| z.exp()).sum();
        Ok(sum / (2.0 * self.beta * square))
    }

    /// `dE/dt` along the flow when `V = Qᵀ K` is symmetric: `(1/n) Σ |x_i'|²` unnormalised,
    /// `(1/n²) Σ Z_i |x_i'|²` for self-attention.
    ///
    /// # Errors
    /// When the matrices are of another dimension.
    pub fn energy_rate(&self, particles: &Particles) -> Result<f64> {
        self.check(particles)?;
        let written = self.written(particles);
        let velocity = projected(particles, written.mean);
        let squares = velocity
            .chunks_exact(particles.dimension())
            .map(|v| dot(v, v));
        let count = particles.count() as f64;
        Ok(match self.flow {
            Flow::Unnormalised => squares.sum::<f64>() / count,
            Flow::SelfAttention => {
                let weighted = squares.zip(&written.log_normaliser);
                weighted.map(|(square, z)| z.exp() * square).sum::<f64>() / (count * count)
            }
        })
    }

    /// The step that moves no particle much farther than `step` does where nothing is hurried:
    /// `step / max(√β e^{β − 1/2}, 1)` for the unnormalised flow, whose speeds grow with `e^β`.
    pub fn careful_step(&self, step: f64) -> f64 {
        match self.flow {
            Flow::SelfAttention => step,
            Flow::Unnormalised => {
                let fastest = self.beta.max(0.0).sqrt() * (self.beta - 0.5).exp();
                step / fastest.max(1.0)
            }
        }
    }

    /// One step of length `step`.
    ///
    /// # Errors
    /// When the matrices are of another dimension, or a particle is driven to zero or infinity.
    pub fn step(&self, particles: &Particles, step: f64, scheme: Scheme) -> Result<Particles> {
        self.check(particles)?;
        match scheme {
            Scheme::Block => particles.moved(&self.written(particles).mean, step),
            Scheme::Euler => particles.moved(&self.velocity(particles)?, step),
            Scheme::RungeKutta => {
                let first = self.velocity(particles)?;
                let second = self.velocity(&particles.beside(&first, step / 2.0))?;
                let third = self.velocity(&particles.beside(&second, step / 2.0))?;
                let fourth = self.velocity(&particles.beside(&third, step))?;
                let slopes = first.iter().zip(&second).zip(third.iter().zip(&fourth));
                let slope: Vec<f64> = slopes
                    .map(|((a, b), (c, d))| (a + 2.0 * b + 2.0 * c + d) / 6.0)
                    .collect();
                particles.moved(&slope, step)
            }
        }
    }

    /// `steps` steps of length `step`.
    ///
    /// # Errors
    /// As [`Dynamics::step`].
    pub fn run(
        &self,
        particles: Particles,
        step: f64,
        steps: usize,
        scheme: Scheme,
    ) -> Result<Particles> {
        (0..steps).try_fold(particles, |particles, _| {
            self.step(&particles, step, scheme)
        })
    }
}

/// `x_i M` for every particle, or `M x_i` when `transposed`.
fn applied(particles: &Particles, matrix: &Matrix, transposed: bool) -> Vec<f64> {
    let dimension = particles.dimension();
    let mut result = vec![0.0; particles.points().len()];
    for (x, y) in particles.iter().zip(result.chunks_exact_mut(dimension)) {
        for (i, x) in x.iter().enumerate() {
            for (j, y) in y.iter_mut().enumerate() {
                *y += x * if transposed {
                    matrix[(j, i)]
                } else {
                    matrix[(i, j)]
                };
            }
        }
    }
    result
}

/// `P_{x_i} y_i = y_i − ⟨x_i, y_i⟩ x_i`.
fn projected(particles: &Particles, mut vectors: Vec<f64>) -> Vec<f64> {
    for (x, y) in particles
        .iter()
        .zip(vectors.chunks_exact_mut(particles.dimension()))
    {
        let along = dot(x, y);
        y.iter_mut().zip(x).for_each(|(y, x)| *y -= along * x);
    }
    vectors
}
