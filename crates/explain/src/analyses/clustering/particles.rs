//! Points on the unit sphere, and what is counted of them.

use crate::analyses::random::on_sphere;
use crate::{Error, Result};
use lapidary_factor::{Matrix, symmetric_eigen};
use rand::Rng;

/// Most numbers that a set of particles may have.
const MOST_NUMBERS: usize = 1 << 26;

/// `count` points of the unit sphere in `dimension` dimensions.
#[derive(Clone, Debug, PartialEq)]
pub struct Particles {
    count: usize,
    dimension: usize,
    /// Point after point.
    points: Vec<f64>,
}

impl Particles {
    /// The directions of these points, `[count · dimension]`.
    ///
    /// # Errors
    /// When there are not a whole number of points, or one is zero or not finite.
    pub fn new(dimension: usize, points: Vec<f64>) -> Result<Self> {
        let count = check(points.len() / dimension.max(1), dimension)?;
        if points.len() != count * dimension {
            let expected = format!("a multiple of the dimension {dimension}");
            return Err(Error::invalid("coordinates", points.len(), expected));
        }
        let mut particles = Self {
            count,
            dimension,
            points,
        };
        for point in particles.points.chunks_exact_mut(dimension) {
            normalise(point)?;
        }
        Ok(particles)
    }

    /// Independent uniform points.
    ///
    /// # Errors
    /// When there would be none, or more than fit.
    pub fn random(count: usize, dimension: usize, generator: &mut impl Rng) -> Result<Self> {
        check(count, dimension)?;
        let points = (0..count).flat_map(|_| on_sphere(dimension, generator));
        Ok(Self {
            count,
            dimension,
            points: points.collect(),
        })
    }

    /// The first `count` unit vectors.
    ///
    /// # Errors
    /// When there are not so many.
    pub fn orthonormal(count: usize, dimension: usize) -> Result<Self> {
        check(count, dimension)?;
        if count > dimension {
            let expected = format!("at most the dimension {dimension}");
            return Err(Error::invalid("orthonormal points", count, expected));
        }
        let points = (0..count * dimension)
            .map(|index| f64::from(u8::from(index / dimension == index % dimension)));
        Ok(Self {
            count,
            dimension,
            points: points.collect(),
        })
    }

    /// Number of points.
    pub fn count(&self) -> usize {
        self.count
    }

    /// Number of coordinates.
    pub fn dimension(&self) -> usize {
        self.dimension
    }

    /// The points, one after the other.
    pub fn points(&self) -> &[f64] {
        &self.points
    }

    /// Each point.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = &[f64]> + Clone {
        self.points.chunks_exact(self.dimension)
    }

    /// Moves every point by `step` times its velocity `[count · dimension]` and back to the sphere.
    pub(super) fn moved(&self, velocity: &[f64], step: f64) -> Result<Self> {
        let points = self.points.iter().zip(velocity);
        Self::new(self.dimension, points.map(|(x, v)| x + step * v).collect())
    }

    /// The points moved by `step` times a velocity, not brought back to the sphere.
    pub(super) fn beside(&self, velocity: &[f64], step: f64) -> Self {
        let points = self.points.iter().zip(velocity);
        Self {
            points: points.map(|(x, v)| x + step * v).collect(),
            ..*self
        }
    }

    /// `⟨x_i, x_j⟩`, `[count][count]`.
    pub fn gram(&self) -> Vec<Vec<f64>> {
        self.iter()
            .map(|x| self.iter().map(|y| dot(x, y)).collect())
            .collect()
    }

    /// Share of ordered pairs `i ≠ j` with `⟨x_i, x_j⟩ > threshold`; 1 for a single point.
    pub fn close_pairs(&self, threshold: f64) -> f64 {
        let pairs = self.count * (self.count - 1);
        if pairs == 0 {
            return 1.0;
        }
        let mut close = 0usize;
        for (i, x) in self.iter().enumerate() {
            close += self
                .iter()
                .take(i)
                .filter(|y| dot(x, y) > threshold)
                .count();
        }
        (2 * close) as f64 / pairs as f64
    }

    /// Number of clusters: connected components when points with `⟨x_i, x_j⟩ > threshold` are
    /// joined.
    pub fn clusters(&self, threshold: f64) -> usize {
        let firsts = self.components(threshold);
        let is_first = |(point, first): &(usize, &usize)| point == *first;
        firsts.iter().enumerate().filter(is_first).count()
    }

    /// The first point of each point's cluster.
    pub fn components(&self, threshold: f64) -> Vec<usize> {
        let points: Vec<&[f64]> = self.iter().collect();
        let mut firsts = vec![usize::MAX; self.count];
        while let Some(start) = firsts.iter().position(|first| *first == usize::MAX) {
            firsts[start] = start;
            let mut waiting = vec![start];
            while let Some(i) = waiting.pop() {
                for (j, point) in points.iter().enumerate() {
                    if firsts[j] == usize::MAX && dot(points[i], point) > threshold {
                        firsts[j] = start;
                        waiting.push(j);
                    }
                }
            }
        }
        firsts
    }

    /// Eigenvalues of the Gram matrix, largest first.
    pub fn spectrum(&self) -> Result<Vec<f64>> {
        let gram = self.gram();
        let gram = Matrix::from_fn(self.count, self.count, |i, j| gram[i][j]);
        let mut values = symmetric_eigen("Gram matrix", gram.as_ref())?.values;
        values.reverse();
        Ok(values)
    }

    /// Number of eigenvalues of the Gram matrix above `tolerance` times the largest.
    pub fn rank(&self, tolerance: f64) -> Result<usize> {
        let spectrum = self.spectrum()?;
        let least = tolerance * spectrum.first().copied().unwrap_or(0.0);
        Ok(spectrum.iter().filter(|value| **value > least).count())
    }

    /// The exponential of the entropy of the Gram matrix's eigenvalues, as shares of their sum
    /// (Roy & Vetterli, The effective rank, 2007).
    pub fn effective_rank(&self) -> Result<f64> {
        let spectrum = self.spectrum()?;
        let positive = || spectrum.iter().filter(|value| **value > 0.0);
        let sum: f64 = positive().sum();
        let entropy: f64 = positive()
            .map(|value| -(value / sum) * (value / sum).ln())
            .sum();
        Ok(entropy.exp())
    }

    /// How many of the inner products of pairs `i < j` lie in each of `bins` equal parts of
    /// `[−1, 1]`.
    pub fn histogram(&self, bins: usize) -> Vec<usize> {
        let mut counts = vec![0; bins];
        for (i, x) in self.iter().enumerate() {
            for y in self.iter().take(i) {
                let place = (dot(x, y).clamp(-1.0, 1.0) + 1.0) / 2.0 * bins as f64;
                if let Some(count) = counts.get_mut((place as usize).min(bins.max(1) - 1)) {
                    *count += 1;
                }
            }
        }
        counts
    }

    /// Mean of the inner products of pairs `i ≠ j`; 1 for a single point.
    pub fn mean_cosine(&self) -> f64 {
        if self.count < 2 {
            return 1.0;
        }
        // |Σ x|² = n + Σ_{i≠j} ⟨x_i, x_j⟩
        let mut sum = vec![0.0; self.dimension];
        for point in self.iter() {
            sum.iter_mut().zip(point).for_each(|(sum, x)| *sum += x);
        }
        let count = self.count as f64;
        (dot(&sum, &sum) - count) / (count * (count - 1.0))
    }

    /// Whether all points lie on one open half of the sphere; nothing when `steps` of the search
    /// could not tell.
    ///
    /// The points do exactly when zero is not in their convex hull: the hull's point nearest to
    /// zero is approached (Gilbert, 1966) until it separates them or is zero to rounding.
    pub fn in_open_hemisphere(&self, steps: usize) -> Option<bool> {
        let mut nearest: Vec<f64> = self.iter().next()?.to_vec();
        for _ in 0..steps {
            let lowest = self
                .iter()
                .min_by(|a, b| dot(a, &nearest).total_cmp(&dot(b, &nearest)))?;
            let product = dot(lowest, &nearest);
            if product > 0.0 {
                return Some(true);
            }
            let length = dot(&nearest, &nearest);
            if length < 1e-14 {
                return Some(false);
            }
            // The point nearest to zero on the way from `nearest` to `lowest`.
            let way = length - 2.0 * product + dot(lowest, lowest);
            let share = ((length - product) / way).clamp(0.0, 1.0);
            for (x, y) in nearest.iter_mut().zip(lowest) {
                *x += share * (y - *x);
            }
        }
        None
    }
}

fn check(count: usize, dimension: usize) -> Result<usize> {
    let fits = count
        .checked_mul(dimension)
        .is_some_and(|n| (1..=MOST_NUMBERS).contains(&n));
    if !fits {
        return Err(Error::invalid(
            "particles times dimensions",
            format!("{count} · {dimension}"),
            format!("between 1 and {MOST_NUMBERS}"),
        ));
    }
    Ok(count)
}

fn normalise(point: &mut [f64]) -> Result<()> {
    let norm = dot(point, point).sqrt();
    if !(norm.is_finite() && norm > 0.0) {
        return Err(Error::invalid("length of a point", norm, "positive"));
    }
    point.iter_mut().for_each(|x| *x /= norm);
    Ok(())
}

/// The inner product, in four sums so that they are computed side by side.
pub(super) fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut sums = [0.0; 4];
    let (a_blocks, b_blocks) = (a.chunks_exact(4), b.chunks_exact(4));
    let rest = a_blocks.remainder().iter().zip(b_blocks.remainder());
    let rest: f64 = rest.map(|(x, y)| x * y).sum();
    for (x, y) in a_blocks.zip(b_blocks) {
        for (sum, (x, y)) in sums.iter_mut().zip(x.iter().zip(y)) {
            *sum += x * y;
        }
    }
    (sums[0] + sums[2]) + (sums[1] + sums[3]) + rest
}
