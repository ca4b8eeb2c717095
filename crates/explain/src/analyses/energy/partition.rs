//! The mass around the patterns, in logarithms: dimensions are about a thousand.

use crate::{Error, Result};
use std::f64::consts::{E, PI};

/// `ln Γ(x)` for `x > 0`, by Lanczos' series (g = 7, nine terms).
pub fn log_gamma(x: f64) -> f64 {
    const COEFFICIENTS: [f64; 8] = [
        676.520_368_121_885_1,
        -1_259.139_216_722_402_8,
        771.323_428_777_653_1,
        -176.615_029_162_140_6,
        12.507_343_278_686_905,
        -0.138_571_095_265_720_12,
        9.984_369_578_019_572e-6,
        1.505_632_735_149_311_6e-7,
    ];
    if x < 0.5 {
        // Γ(x) Γ(1 − x) = π / sin πx
        return (PI / (PI * x).sin()).ln() - log_gamma(1.0 - x);
    }
    let x = x - 1.0;
    let terms = COEFFICIENTS.iter().zip(1..);
    let series: f64 = terms.map(|(c, k)| c / (x + f64::from(k))).sum();
    let t = x + 7.5;
    0.5 * (2.0 * PI).ln() + (x + 0.5) * t.ln() - t + (0.999_999_999_999_809_9 + series).ln()
}

/// `ln γ(s, x)` with `γ(s, x) = ∫_0^x t^{s−1} e^{−t} dt`, for positive `s` and `x`.
///
/// # Errors
/// When they are not.
pub fn log_lower_gamma(s: f64, x: f64) -> Result<f64> {
    if !(s.is_finite() && s > 0.0 && x.is_finite() && x > 0.0) {
        return Err(Error::invalid(
            "arguments of γ(s, x)",
            format!("{s}, {x}"),
            "positive",
        ));
    }
    if x < s + 1.0 {
        // x^s e^{−x} Σ_k x^k / (s (s + 1) … (s + k))
        let (mut term, mut sum, mut k) = (1.0 / s, 1.0 / s, s);
        while term > 1e-17 * sum {
            k += 1.0;
            term *= x / k;
            sum += term;
        }
        return Ok(s * x.ln() - x + sum.ln());
    }
    // γ = Γ (1 − q), q = x^s e^{−x} / Γ(s) times a continued fraction (modified Lentz).
    let tiny = 1e-300;
    let mut b = x + 1.0 - s;
    let mut c = 1.0 / tiny;
    let mut d = 1.0 / b;
    let mut fraction = d;
    for i in 1..100_000 {
        let i = f64::from(i);
        let a = -i * (i - s);
        b += 2.0;
        d = 1.0 / nonzero(a * d + b, tiny);
        c = nonzero(b + a / c, tiny);
        fraction *= d * c;
        if (d * c - 1.0).abs() < 1e-16 {
            break;
        }
    }
    let gamma = log_gamma(s);
    let upper = (s * x.ln() - x - gamma).exp() * fraction;
    Ok(gamma + (-upper.min(1.0)).ln_1p())
}

fn nonzero(value: f64, tiny: f64) -> f64 {
    if value.abs() < tiny { tiny } else { value }
}

/// `ln A_{n−1}`, the area of the unit sphere in `n` dimensions: `2 π^{n/2} / Γ(n/2)`.
pub fn log_sphere_area(dimension: usize) -> f64 {
    let half = dimension as f64 / 2.0;
    2f64.ln() + half * PI.ln() - log_gamma(half)
}

/// `ln Z` for `Z = M A_{n−1} γ(n, r)`: the integral of `e^{−E}` over disjoint balls of radius `r`
/// around `count` patterns, in each of which its own pattern alone counts.
///
/// # Errors
/// When there are no patterns or dimensions, or the radius is not positive.
pub fn log_partition(count: usize, dimension: usize, radius: f64) -> Result<f64> {
    if count == 0 || dimension == 0 {
        return Err(Error::invalid(
            "patterns and dimensions",
            format!("{count} and {dimension}"),
            "at least 1 of each",
        ));
    }
    let ball = log_lower_gamma(dimension as f64, radius)?;
    Ok((count as f64).ln() + log_sphere_area(dimension) + ball)
}

/// The cross-entropy `ln Z + 1/Z` of a model that is not large enough to be over-parameterised:
/// at least 1, which it is at `Z = 1`. Infinite where `1/Z` is too large for a number.
pub fn loss_bound(log_partition: f64) -> f64 {
    log_partition + (-log_partition).exp()
}

/// The radius at which a ball in `dimension` dimensions has volume 1, `π^{n/2} r^n / Γ(n/2 + 1) = 1`,
/// and `√(n / 2πe)`, which it approaches.
pub fn unit_ball_radius(dimension: usize) -> (f64, f64) {
    let n = dimension.max(1) as f64;
    let exact = ((log_gamma(n / 2.0 + 1.0) - n / 2.0 * PI.ln()) / n).exp();
    (exact, (n / (2.0 * PI * E)).sqrt())
}
