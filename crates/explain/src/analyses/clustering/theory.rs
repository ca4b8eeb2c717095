//! What is known of the flows in closed form.

use super::dynamics::Flow;
use crate::{Error, Result};

/// `γ'` where all inner products of `count` particles are `γ`, `Q = K = V = 1`; they then stay
/// equal: `2 e^{βγ} (1 − γ)((n − 1)γ + 1) / (e^β + (n − 1) e^{βγ})` for self-attention,
/// `(2/n) e^{βγ} (1 − γ)((n − 1)γ + 1)` unnormalised.
pub fn equal_angle_rate(flow: Flow, beta: f64, count: usize, gamma: f64) -> f64 {
    let n = count as f64;
    let shape = 2.0 * (1.0 - gamma) * ((n - 1.0) * gamma + 1.0);
    match flow {
        Flow::SelfAttention => shape / ((beta * (1.0 - gamma)).exp() + n - 1.0),
        Flow::Unnormalised => shape * (beta * gamma).exp() / n,
    }
}

/// `γ` at a time, from `start` at time 0.
pub fn equal_angle(flow: Flow, beta: f64, count: usize, start: f64, time: f64) -> f64 {
    let (mut gamma, mut now) = (start, 0.0);
    while now < time {
        let step = careful(flow, beta, count, gamma).min(time - now);
        gamma = advanced(flow, beta, count, gamma, step);
        now += step;
    }
    gamma
}

/// The time at which `γ`, from `start`, reaches `level`; nothing when that is after `limit`.
///
/// # Errors
/// When the levels are not in order below 1.
pub fn merging_time(
    flow: Flow,
    beta: f64,
    count: usize,
    [start, level]: [f64; 2],
    limit: f64,
) -> Result<Option<f64>> {
    if !(start < level && level < 1.0) {
        return Err(Error::invalid(
            "level to reach",
            level,
            format!("between {start} and 1"),
        ));
    }
    let (mut gamma, mut now) = (start, 0.0);
    while now < limit {
        let step = careful(flow, beta, count, gamma);
        let next = advanced(flow, beta, count, gamma, step);
        if next >= level {
            // Within one short step the curve is a line.
            return Ok(Some(now + step * (level - gamma) / (next - gamma)).filter(|t| *t <= limit));
        }
        (gamma, now) = (next, now + step);
    }
    Ok(None)
}

/// A step within which `1 − γ` changes by about a hundredth.
fn careful(flow: Flow, beta: f64, count: usize, gamma: f64) -> f64 {
    let rate = equal_angle_rate(flow, beta, count, gamma).abs();
    0.01 / (rate / (1.0 - gamma).max(1e-300)).max(1.0)
}

/// One Runge–Kutta step.
fn advanced(flow: Flow, beta: f64, count: usize, gamma: f64, step: f64) -> f64 {
    let rate = |gamma: f64| equal_angle_rate(flow, beta, count, gamma);
    let first = rate(gamma);
    let second = rate(gamma + step / 2.0 * first);
    let third = rate(gamma + step / 2.0 * second);
    let fourth = rate(gamma + step * third);
    gamma + step / 6.0 * (first + 2.0 * second + 2.0 * third + fourth)
}

/// The angle between two particles at `β = 0`: `tan(φ/2) = e^{−t} tan(φ_0/2)`.
pub fn angle_of_two(start: f64, time: f64) -> f64 {
    2.0 * ((start / 2.0).tan() * (-time).exp()).atan()
}

/// `θ_i' = −(1/n) Σ_j e^{β cos(θ_i − θ_j)} sin(θ_i − θ_j)`: the unnormalised flow on the circle,
/// which at `β = 0` is Kuramoto's model of oscillators.
pub fn circle_velocity(beta: f64, angles: &[f64]) -> Vec<f64> {
    let count = angles.len().max(1) as f64;
    let of = |a: &f64| {
        let each = angles.iter().map(|b| (a - b).sin_cos());
        let sum: f64 = each.map(|(sin, cos)| (beta * cos).exp() * sin).sum();
        -sum / count
    };
    angles.iter().map(of).collect()
}

/// The probability that `count` independent uniform points lie on one open half of the sphere in
/// `dimension` dimensions (Wendel, A problem in geometric probability, 1962):
/// `2^{−(n−1)} Σ_{k<d} C(n − 1, k)`.
pub fn wendel(count: usize, dimension: usize) -> f64 {
    if count <= dimension {
        return 1.0;
    }
    let others = (count - 1) as f64;
    // ln C(n − 1, k) − (n − 1) ln 2, one k after the other.
    let mut logarithm = -others * std::f64::consts::LN_2;
    let mut sum = 0.0;
    for k in 0..dimension {
        sum += logarithm.exp();
        logarithm += ((others - k as f64) / (k as f64 + 1.0)).ln();
    }
    sum.min(1.0)
}

/// Slope and `R²` of the least-squares line through points.
///
/// # Errors
/// When there are fewer than three points, or they are all at one place.
pub fn line(points: &[(f64, f64)]) -> Result<(f64, f64)> {
    let count = points.len() as f64;
    let mean = |of: fn(&(f64, f64)) -> f64| points.iter().map(of).sum::<f64>() / count;
    let (x_mean, y_mean) = (mean(|p| p.0), mean(|p| p.1));
    let sum = |of: &dyn Fn(f64, f64) -> f64| -> f64 {
        points.iter().map(|(x, y)| of(x - x_mean, y - y_mean)).sum()
    };
    let (xx, xy, yy) = (sum(&|x, _| x * x), sum(&|x, y| x * y), sum(&|_, y| y * y));
    if points.len() < 3 || xx.is_nan() || xx <= 0.0 {
        return Err(Error::invalid(
            "points of a line",
            points.len(),
            "at least 3, at different places",
        ));
    }
    let explained = if yy > 0.0 { xy * xy / (xx * yy) } else { 1.0 };
    Ok((xy / xx, explained))
}
