//! What the singular values `s_1 ≥ s_2 ≥ …` of the position vectors say about their rank.

/// Singular values below this share of the largest are rounding.
const ROUNDING: f64 = 1e-12;

/// Which rule found a rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RankRule {
    /// ScreeNOT, for noise of unknown correlation.
    ScreeNot,
    /// The median of the singular values, for white noise: where there are too few values for
    /// ScreeNOT's bound.
    Median,
}

impl RankRule {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::ScreeNot => "screenot",
            Self::Median => "median",
        }
    }
}

/// How many singular values stand out of the noise.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RankEstimate {
    /// Singular values above the threshold.
    pub rank: usize,
    /// The threshold.
    pub threshold: f64,
    /// The rule it comes from.
    pub rule: RankRule,
}

/// The rank of a matrix of `rows × columns` with singular values `s`, largest first, which is
/// known to be at most `bound`.
pub fn estimate_rank(s: &[f64], rows: usize, columns: usize, bound: usize) -> RankEstimate {
    let ratio = rows.min(columns) as f64 / rows.max(columns).max(1) as f64;
    let (threshold, rule) = match screenot_threshold(s, ratio, bound) {
        Some(threshold) => (threshold, RankRule::ScreeNot),
        None => (median_threshold(s, ratio), RankRule::Median),
    };
    let floor = s.first().copied().unwrap_or(0.0) * ROUNDING;
    RankEstimate {
        rank: s.iter().filter(|s| **s > threshold.max(floor)).count(),
        threshold,
        rule,
    }
}

/// ScreeNOT's threshold (Donoho, Gavish & Romanov, arXiv 2009.12297), for singular values `s`,
/// largest first, of a matrix whose shorter side is `ratio` times its longer one and whose
/// signal has a rank of at most `bound`.
///
/// The `bound` largest values are replaced by a tail that continues the noise, and with
/// `φ(y) = mean_i y / (y² − z_i²)` over the result and `φ̃ = ratio φ + (1 − ratio) / y`, the
/// threshold is the only `y` above all `z_i` where `y (φ φ̃)' / (φ φ̃) = −4`. `None` where there
/// are not more than `2 bound + 1` values.
pub fn screenot_threshold(s: &[f64], ratio: f64, bound: usize) -> Option<f64> {
    let noise = pseudo_noise(s, bound)?;
    let largest = noise.iter().copied().fold(0.0, f64::max);
    if largest == 0.0 || !largest.is_finite() {
        return Some(largest);
    }
    let count = noise.len() as f64;
    let slope = |y: f64| {
        let (mut phi, mut phi_slope) = (0.0, 0.0);
        for z in &noise {
            let gap = y * y - z * z;
            phi += y / gap / count;
            phi_slope -= (y * y + z * z) / (gap * gap) / count;
        }
        let dual = ratio * phi + (1.0 - ratio) / y;
        let dual_slope = ratio * phi_slope - (1.0 - ratio) / (y * y);
        y * (phi_slope / phi + dual_slope / dual)
    };
    // It rises from −∞ at the largest value to −2 far away.
    let (mut low, mut high) = (largest, 2.0 * largest);
    while slope(high) < -4.0 {
        (low, high) = (high, 2.0 * high);
    }
    while high - low > 1e-13 * high {
        let middle = 0.5 * (low + high);
        if middle <= low || middle >= high {
            break;
        }
        if slope(middle) < -4.0 {
            low = middle;
        } else {
            high = middle;
        }
    }
    Some(0.5 * (low + high))
}

/// The values with the `bound` largest replaced: value `l` (from 0) becomes
/// `z_{bound} + (1 − (l / bound)^{2/3}) / (2^{2/3} − 1) · (z_{bound} − z_{2 bound})`.
fn pseudo_noise(s: &[f64], bound: usize) -> Option<Vec<f64>> {
    if 2 * bound + 1 >= s.len() {
        return None;
    }
    let (edge, inner) = (*s.get(bound)?, *s.get(2 * bound)?);
    let power = 2.0 / 3.0;
    let replaced = (0..bound).map(|l| {
        let height = 1.0 - (l as f64 / bound as f64).powf(power);
        edge + height / (2f64.powf(power) - 1.0) * (edge - inner)
    });
    Some(replaced.chain(s.iter().skip(bound).copied()).collect())
}

/// `ω(ratio) · median(s)` (Gavish & Donoho, The optimal hard threshold for singular values is
/// 4/√3, arXiv 1305.5870): `ω = λ / √median of the Marchenko–Pastur law`; 2.858 for a square.
pub fn median_threshold(s: &[f64], ratio: f64) -> f64 {
    let middle = s.len() / 2;
    let at = |index: usize| s.get(index).copied().unwrap_or(0.0);
    let median = match s.len() {
        0 => return 0.0,
        count if count.is_multiple_of(2) => 0.5 * (at(middle - 1) + at(middle)),
        _ => at(middle),
    };
    let root = (ratio * ratio + 14.0 * ratio + 1.0).sqrt();
    let lambda = (2.0 * (ratio + 1.0) + 8.0 * ratio / (ratio + 1.0 + root)).sqrt();
    lambda / marchenko_pastur_median(ratio).sqrt() * median
}

/// Median of the law with density `√((b − x)(x − a)) / (2π ratio x)` on `[a, b] = (1 ∓ √ratio)²`.
///
/// With `x = m − r cos θ` the integrand is smooth, and is summed by midpoints.
fn marchenko_pastur_median(ratio: f64) -> f64 {
    const STEPS: usize = 20_000;
    let (centre, radius) = (1.0 + ratio, 2.0 * ratio.sqrt());
    let width = std::f64::consts::PI / STEPS as f64;
    let mut mass = 0.0;
    for step in 0..STEPS {
        let angle = (step as f64 + 0.5) * width;
        let x = centre - radius * angle.cos();
        let height = (radius * angle.sin()).powi(2);
        mass += height / (2.0 * std::f64::consts::PI * ratio * x) * width;
        if mass >= 0.5 {
            return x;
        }
    }
    centre + radius
}

/// `Σ s_i² / s_1²`; zero of zeros.
pub fn stable_rank(s: &[f64]) -> f64 {
    let largest = s.first().copied().unwrap_or(0.0);
    if largest == 0.0 {
        return 0.0;
    }
    s.iter().map(|s| (s / largest).powi(2)).sum()
}

/// `Σ_{i ≤ rank} s_i / Σ s_i`, of the values, not their squares.
pub fn explained_ratio(s: &[f64], rank: usize) -> f64 {
    let all: f64 = s.iter().sum();
    if all == 0.0 {
        return 0.0;
    }
    s.iter().take(rank).sum::<f64>() / all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_rule_has_its_published_constant() {
        let threshold = median_threshold(&[1.0; 9], 1.0);
        assert!((threshold - 2.858).abs() < 1e-3, "{threshold}");
        // The published polynomial for other shapes.
        for ratio in [0.1, 0.3, 0.5, 0.8f64] {
            let polynomial = 0.56 * ratio.powi(3) - 0.95 * ratio.powi(2) + 1.82 * ratio + 1.43;
            let found = median_threshold(&[1.0; 9], ratio);
            assert!((found - polynomial).abs() < 0.02, "{ratio}: {found}");
        }
    }

    #[test]
    fn values_that_stand_out_are_counted_by_either_rule() {
        let noise = |count: usize| (0..count).map(move |i| 1.0 - i as f64 / count as f64);
        let many: Vec<f64> = [50.0, 20.0, 9.0].into_iter().chain(noise(60)).collect();
        let estimate = estimate_rank(&many, 63, 80, 20);
        assert_eq!((estimate.rank, estimate.rule), (3, RankRule::ScreeNot));
        assert!(estimate.threshold > 1.0 && estimate.threshold < 9.0);
        let few: Vec<f64> = [50.0, 20.0].into_iter().chain(noise(20)).collect();
        let estimate = estimate_rank(&few, 22, 80, 20);
        assert_eq!((estimate.rank, estimate.rule), (2, RankRule::Median));
    }

    #[test]
    fn nothing_stands_out_of_nothing() {
        assert_eq!(estimate_rank(&[0.0; 50], 50, 60, 20).rank, 0);
        assert_eq!(stable_rank(&[0.0; 3]), 0.0);
        assert_eq!(explained_ratio(&[0.0; 3], 2), 0.0);
        // A matrix of rank two without noise.
        let mut exact = vec![1e-17; 50];
        (exact[0], exact[1]) = (3.0, 2.0);
        assert_eq!(estimate_rank(&exact, 50, 60, 20).rank, 2);
    }

    #[test]
    fn ranks_and_ratios_by_hand() {
        let s = [4.0, 2.0, 2.0];
        assert_eq!(stable_rank(&s), 1.5);
        assert_eq!(explained_ratio(&s, 2), 0.75);
    }
}
