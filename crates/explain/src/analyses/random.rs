//! Random numbers that several analyses draw.

use rand::{Rng, RngExt};

/// A standard normal number by the Box–Muller transform.
pub(crate) fn normal(generator: &mut impl Rng) -> f64 {
    let radius = (-2.0 * (1.0 - generator.random::<f64>()).ln()).sqrt();
    radius * (2.0 * std::f64::consts::PI * generator.random::<f64>()).cos()
}

/// A uniform point of the unit sphere in `dimension` dimensions.
pub(crate) fn on_sphere(dimension: usize, generator: &mut impl Rng) -> Vec<f64> {
    loop {
        let point: Vec<f64> = (0..dimension).map(|_| normal(generator)).collect();
        let norm = point.iter().map(|x| x * x).sum::<f64>().sqrt();
        if norm > 1e-12 {
            return point.into_iter().map(|x| x / norm).collect();
        }
    }
}
