//! Standard normal numbers.

use rand::RngExt;
use rand_chacha::ChaCha8Rng;

/// A standard normal number (Box & Muller).
pub(crate) fn normal(generator: &mut ChaCha8Rng) -> f64 {
    let radius = (-2.0 * (1.0 - generator.random::<f64>()).ln()).sqrt();
    radius * (std::f64::consts::TAU * generator.random::<f64>()).cos()
}
