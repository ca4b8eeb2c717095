//! How fast something falls: `y ≈ c xᵏ`, by least squares on logarithms.

/// A fitted power law.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PowerLaw {
    /// `k`.
    pub exponent: f64,
    /// `c`.
    pub factor: f64,
    /// Share of the variance of `ln y` that is explained.
    pub r_squared: f64,
}

impl PowerLaw {
    /// The law nearest to points `(x, y)`; those that are not positive are left out. None of
    /// fewer than two different `x`.
    pub fn fit(points: &[(f64, f64)]) -> Option<Self> {
        let logs: Vec<(f64, f64)> = points
            .iter()
            .filter(|(x, y)| *x > 0.0 && *y > 0.0 && x.is_finite() && y.is_finite())
            .map(|(x, y)| (x.ln(), y.ln()))
            .collect();
        let count = logs.len() as f64;
        let mean = |of: fn(&(f64, f64)) -> f64| logs.iter().map(of).sum::<f64>() / count;
        let (x_mean, y_mean) = (mean(|point| point.0), mean(|point| point.1));
        let (mut xx, mut xy, mut yy) = (0.0, 0.0, 0.0);
        for (x, y) in &logs {
            xx += (x - x_mean).powi(2);
            xy += (x - x_mean) * (y - y_mean);
            yy += (y - y_mean).powi(2);
        }
        if logs.len() < 2 || xx == 0.0 {
            return None;
        }
        let exponent = xy / xx;
        Some(Self {
            exponent,
            factor: (y_mean - exponent * x_mean).exp(),
            r_squared: if yy == 0.0 { 1.0 } else { xy * xy / (xx * yy) },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_power_law_is_found() {
        let points: Vec<(f64, f64)> = (1..20).map(|n| (n as f64, 3.0 / (n * n) as f64)).collect();
        let law = PowerLaw::fit(&points).unwrap();
        assert!((law.exponent + 2.0).abs() < 1e-12 && (law.factor - 3.0).abs() < 1e-12);
        assert!((law.r_squared - 1.0).abs() < 1e-12);
        assert_eq!(PowerLaw::fit(&[(1.0, 2.0), (2.0, 0.0)]), None);
    }

    #[test]
    fn scatter_lowers_the_share_that_is_explained() {
        let points = [(1.0, 1.0), (2.0, 3.0), (3.0, 0.5), (4.0, 2.0)];
        assert!(PowerLaw::fit(&points).unwrap().r_squared < 0.2);
    }
}
