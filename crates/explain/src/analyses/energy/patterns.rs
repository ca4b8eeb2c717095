//! Stored patterns, and energies that are low near them.

use crate::{Error, Result};

/// Most numbers that a set of patterns may have.
const MOST_NUMBERS: usize = 1 << 28;

/// Patterns `ρ_1 … ρ_M` in `n` dimensions.
#[derive(Clone, Debug)]
pub struct Patterns {
    dimension: usize,
    values: Vec<f64>,
}

impl Patterns {
    /// Patterns from their coordinates, `[count · dimension]`.
    ///
    /// # Errors
    /// When there are not a whole number of patterns, at least one, all finite.
    pub fn new(dimension: usize, values: Vec<f64>) -> Result<Self> {
        let whole = dimension > 0 && values.len().is_multiple_of(dimension);
        if !whole || values.is_empty() || values.len() > MOST_NUMBERS {
            return Err(Error::invalid(
                "coordinates of the patterns",
                values.len(),
                format!(
                    "a multiple of the dimension {dimension}, from one pattern to {MOST_NUMBERS} numbers"
                ),
            ));
        }
        if let Some(value) = values.iter().find(|value| !value.is_finite()) {
            return Err(Error::invalid("coordinate of a pattern", value, "finite"));
        }
        Ok(Self { dimension, values })
    }

    /// Number of patterns.
    pub fn count(&self) -> usize {
        self.values.len() / self.dimension
    }

    /// Number of coordinates.
    pub fn dimension(&self) -> usize {
        self.dimension
    }

    /// Each pattern.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &[f64]> + Clone {
        self.values.chunks_exact(self.dimension)
    }

    fn check(&self, x: &[f64]) -> Result<()> {
        match x.len() == self.dimension {
            true => Ok(()),
            false => Err(Error::invalid(
                "dimension of the state",
                x.len(),
                self.dimension.to_string(),
            )),
        }
    }

    /// `‖x − ρ_i‖`.
    ///
    /// # Errors
    /// When `x` is of another dimension, as everywhere below.
    pub fn distances(&self, x: &[f64]) -> Result<Vec<f64>> {
        self.check(x)?;
        Ok(self
            .iter()
            .map(|pattern| squared_distance(x, pattern).sqrt())
            .collect())
    }

    /// `E(x) = −ln Σ_i e^{−‖x − ρ_i‖}` (Niu, Bai, Deng & Han, Beyond Scaling Laws, 2024, arXiv
    /// 2405.08707, eq. 5): a soft minimum of the distances, between `d_min − ln M` and `d_min`.
    pub fn energy(&self, x: &[f64]) -> Result<f64> {
        let distances = self.distances(x)?;
        Ok(-log_sum_exp(distances.iter().map(|d| -d)))
    }

    /// `p = softmax(−‖x − ρ_i‖)`.
    pub fn shares(&self, x: &[f64]) -> Result<Vec<f64>> {
        let distances = self.distances(x)?;
        Ok(softmax(distances.into_iter().map(|d| -d).collect()))
    }

    /// `∇E = Σ_i p_i (x − ρ_i) / ‖x − ρ_i‖`; a pattern that `x` lies on, where there is no
    /// derivative, counts as zero.
    pub fn gradient(&self, x: &[f64]) -> Result<Vec<f64>> {
        let (distances, shares) = (self.distances(x)?, self.shares(x)?);
        let mut gradient = vec![0.0; self.dimension];
        for (pattern, (distance, share)) in self.iter().zip(distances.iter().zip(shares)) {
            if *distance > 0.0 {
                for (g, (x, p)) in gradient.iter_mut().zip(x.iter().zip(pattern)) {
                    *g += share * (x - p) / distance;
                }
            }
        }
        Ok(gradient)
    }

    /// `Q(x | at) = E(at) + Σ_i p_i(at) (‖x − ρ_i‖ − ‖at − ρ_i‖)`, which is nowhere below `E` and
    /// touches it at `at`: the soft minimum is concave in the distances.
    pub fn majoriser(&self, x: &[f64], at: &[f64]) -> Result<f64> {
        let shares = self.shares(at)?;
        let change = self.distances(x)?.into_iter().zip(self.distances(at)?);
        let change: f64 = change
            .zip(shares)
            .map(|((new, old), share)| share * (new - old))
            .sum();
        Ok(self.energy(at)? + change)
    }

    /// One step down the majoriser, which never raises the energy: `x ← Σ w_i ρ_i / Σ w_i` with
    /// `w_i = p_i / ‖x − ρ_i‖`, a step of Weiszfeld's towards the weighted geometric median. A
    /// state on a pattern stays.
    pub fn descend(&self, x: &[f64]) -> Result<Vec<f64>> {
        let (distances, shares) = (self.distances(x)?, self.shares(x)?);
        if distances.contains(&0.0) {
            return Ok(x.to_vec());
        }
        let weights = shares
            .iter()
            .zip(&distances)
            .map(|(share, distance)| share / distance);
        Ok(self.weighted_mean(weights.collect()))
    }

    /// `−(1/β) ln Σ_i e^{β ρ_i · x} + |x|²/2 + (1/β) ln M + max_i |ρ_i|²/2`: the energy of modern
    /// continuous Hopfield networks (Ramsauer et al., Hopfield Networks is All You Need, 2020, arXiv
    /// 2008.02217, eq. 3).
    ///
    /// # Errors
    /// When `beta` is not positive, as everywhere below.
    pub fn hopfield_energy(&self, x: &[f64], beta: f64) -> Result<f64> {
        self.check(x)?;
        check_beta(beta)?;
        let products = self.iter().map(|pattern| beta * dot(pattern, x));
        let longest = self.iter().map(|p| dot(p, p)).fold(0.0, f64::max);
        let count = (self.count() as f64).ln();
        Ok(-log_sum_exp(products) / beta + dot(x, x) / 2.0 + count / beta + longest / 2.0)
    }

    /// `x ← Σ_i softmax(β ρ · x)_i ρ_i`: attention with the patterns as keys and values, which never
    /// raises the Hopfield energy.
    pub fn hopfield_step(&self, x: &[f64], beta: f64) -> Result<Vec<f64>> {
        self.check(x)?;
        check_beta(beta)?;
        let products = self.iter().map(|pattern| beta * dot(pattern, x));
        Ok(self.weighted_mean(softmax(products.collect())))
    }

    /// `−(1/β) ln Σ_i e^{−(β/2) ‖x − ρ_i‖²}`. For patterns of equal length it is the Hopfield
    /// energy less `(1/β) ln M`.
    pub fn squared_energy(&self, x: &[f64], beta: f64) -> Result<f64> {
        self.check(x)?;
        check_beta(beta)?;
        let terms = self
            .iter()
            .map(|pattern| -beta / 2.0 * squared_distance(x, pattern));
        Ok(-log_sum_exp(terms) / beta)
    }

    /// The minimum of the majoriser of [`Patterns::squared_energy`]: `Σ_i p_i ρ_i`, an attention
    /// read by distances.
    pub fn squared_step(&self, x: &[f64], beta: f64) -> Result<Vec<f64>> {
        self.check(x)?;
        check_beta(beta)?;
        let terms = self
            .iter()
            .map(|pattern| -beta / 2.0 * squared_distance(x, pattern));
        Ok(self.weighted_mean(softmax(terms.collect())))
    }

    /// `Σ w_i ρ_i / Σ w_i`.
    fn weighted_mean(&self, weights: Vec<f64>) -> Vec<f64> {
        let sum: f64 = weights.iter().sum();
        let mut mean = vec![0.0; self.dimension];
        for (pattern, weight) in self.iter().zip(weights) {
            for (m, p) in mean.iter_mut().zip(pattern) {
                *m += weight / sum * p;
            }
        }
        mean
    }
}

fn check_beta(beta: f64) -> Result<()> {
    match beta.is_finite() && beta > 0.0 {
        true => Ok(()),
        false => Err(Error::invalid("beta", beta, "positive")),
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

pub(super) fn squared_distance(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum()
}

fn log_sum_exp(terms: impl Iterator<Item = f64> + Clone) -> f64 {
    let highest = terms.clone().fold(f64::NEG_INFINITY, f64::max);
    highest + terms.map(|term| (term - highest).exp()).sum::<f64>().ln()
}

fn softmax(mut terms: Vec<f64>) -> Vec<f64> {
    let highest = terms.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    terms
        .iter_mut()
        .for_each(|term| *term = (*term - highest).exp());
    let sum: f64 = terms.iter().sum();
    terms.iter_mut().for_each(|term| *term /= sum);
    terms
}
