//! Values and places bent so that a stationary Gaussian process suits them, as in HEBO (Cowen-Rivers et
//! al. 2020, arXiv 2012.03826).

use crate::{Domain, Point};

/// Exponents that are tried for values: 1 leaves them as they are.
const EXPONENTS: std::ops::RangeInclusive<i32> = -8..=24;
const EXPONENT: f64 = 0.125;

/// Less the mean, over the standard deviation.
pub(crate) fn standardised(values: &[f64]) -> Vec<f64> {
    let (mean, variance) = moments(values);
    // Values that are all the same say nothing, whatever they are divided by.
    let scale = if variance > 0.0 { variance.sqrt() } else { 1.0 };
    values.iter().map(|y| (y - mean) / scale).collect()
}

fn moments(values: &[f64]) -> (f64, f64) {
    let count = values.len().max(1) as f64;
    let mean = values.iter().sum::<f64>() / count;
    let variance = values.iter().map(|y| (y - mean).powi(2)).sum::<f64>() / count;
    (mean, variance)
}

/// The power transform of Yeo & Johnson 2000, standardised before and after, with the exponent under which
/// the values are most likely those of a Gaussian:
///
/// ```text
/// −n/2 ln Var ψ_λ(y) + (λ − 1) Σ sign(y) ln(1 + |y|)
/// ```
///
/// The order of values is kept.
pub(crate) fn gaussian(values: &[f64]) -> Vec<f64> {
    let values = standardised(values);
    let count = values.len() as f64;
    let slope: f64 = values.iter().map(|y| y.signum() * y.abs().ln_1p()).sum();
    let mut best = (values.clone(), f64::NEG_INFINITY);
    for step in EXPONENTS {
        let exponent = f64::from(step) * EXPONENT;
        let bent: Vec<f64> = values.iter().map(|y| yeo_johnson(*y, exponent)).collect();
        let (_, variance) = moments(&bent);
        let likelihood = -0.5 * count * variance.ln() + (exponent - 1.0) * slope;
        if likelihood.is_finite() && likelihood > best.1 {
            best = (bent, likelihood);
        }
    }
    standardised(&best.0)
}

/// `ψ_λ(y)`: `((y + 1)^λ − 1) / λ` where `y ≥ 0`, and `−((1 − y)^(2 − λ) − 1) / (2 − λ)` below.
fn yeo_johnson(y: f64, exponent: f64) -> f64 {
    let power = |base: f64, exponent: f64| match exponent.abs() < 1e-12 {
        true => base.ln(),
        false => (base.powf(exponent) - 1.0) / exponent,
    };
    match y >= 0.0 {
        true => power(1.0 + y, exponent),
        false => -power(1.0 - y, 2.0 - exponent),
    }
}

/// Shapes that are tried for a variable: `1 − (1 − u^a)^b`, the distribution function of Kumaraswamy, of
/// which the first leaves places where they are.
pub(crate) const SHAPES: [(f64, f64); 7] = [
    (1.0, 1.0),
    (0.5, 1.0),
    (2.0, 1.0),
    (1.0, 0.5),
    (1.0, 2.0),
    (0.5, 0.5),
    (2.0, 2.0),
];

/// Of each variable and place, the place that a process sees it at.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct InputWarp {
    maps: Vec<Vec<usize>>,
}

impl InputWarp {
    /// Every place where it is.
    pub(crate) fn identity(domain: &Domain) -> Self {
        let maps = (0..domain.dimensions()).map(|variable| (0..domain.places(variable)).collect());
        Self {
            maps: maps.collect(),
        }
    }

    /// The same with one variable in another shape.
    pub(crate) fn with(&self, variable: usize, shape: (f64, f64)) -> Self {
        let mut changed = self.clone();
        if let Some(map) = changed.maps.get_mut(variable) {
            let last = map.len().saturating_sub(1) as f64;
            for (place, seen) in map.iter_mut().enumerate() {
                let along = place as f64 / last.max(1.0);
                let bent = 1.0 - (1.0 - along.powf(shape.0)).powf(shape.1);
                *seen = (bent * last).round() as usize;
            }
        }
        changed
    }

    /// Where a process sees places of one variable.
    fn seen(&self, variable: usize, place: usize) -> usize {
        let map = self.maps.get(variable);
        map.and_then(|map| map.get(place)).copied().unwrap_or(place)
    }

    /// Where it sees points.
    pub(crate) fn points(&self, points: &[Point]) -> Vec<Point> {
        let point = |point: &Point| -> Point {
            let places = point.iter().enumerate();
            places
                .map(|(variable, place)| self.seen(variable, *place))
                .collect()
        };
        points.iter().map(point).collect()
    }

    /// Where it sees some places of each variable.
    pub(crate) fn candidates(&self, candidates: &[Vec<usize>]) -> Vec<Vec<usize>> {
        let variables = candidates.iter().enumerate();
        let seen = variables.map(|(variable, places)| {
            let places = places.iter().map(|place| self.seen(variable, *place));
            places.collect()
        });
        seen.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exponents_are_those_of_the_definition() {
        for y in [-2.0, -0.3, 0.0, 0.7, 5.0] {
            assert!((yeo_johnson(y, 1.0) - y).abs() < 1e-12);
        }
        assert!((yeo_johnson(3.0, 0.5) - 2.0).abs() < 1e-12);
        assert!((yeo_johnson(1.0, 0.0) - 2f64.ln()).abs() < 1e-12);
        assert!((yeo_johnson(-1.0, 2.0) + 2f64.ln()).abs() < 1e-12);
        assert!((yeo_johnson(-3.0, 1.5) + 2.0).abs() < 1e-12);
    }

    #[test]
    fn skew_goes_and_the_order_stays() {
        let values: Vec<f64> = (0..40).map(|i| (f64::from(i) / 8.0).exp()).collect();
        let skew = |values: &[f64]| {
            let cubes = standardised(values).iter().map(|y| y.powi(3)).sum::<f64>();
            (cubes / values.len() as f64).abs()
        };
        let bent = gaussian(&values);
        assert!(skew(&bent) < 0.5 * skew(&values), "{}", skew(&bent));
        assert!(bent.windows(2).all(|pair| pair[0] < pair[1]));
        let (mean, variance) = moments(&bent);
        assert!(mean.abs() < 1e-12 && (variance - 1.0).abs() < 1e-12);
        assert_eq!(gaussian(&[3.0, 3.0]), [0.0, 0.0]);
        assert_eq!(gaussian(&[]), [0.0; 0]);
    }

    #[test]
    fn warped_places_keep_their_ends_and_their_order() {
        let domain = Domain::new(vec![vec![0.0; 30], vec![0.0], vec![0.0; 7]]).unwrap();
        let identity = InputWarp::identity(&domain);
        for variable in 0..3 {
            assert_eq!(identity.with(variable, SHAPES[0]), identity);
            for shape in SHAPES {
                let warp = identity.with(variable, shape);
                let last = domain.places(variable) - 1;
                assert_eq!(warp.seen(variable, 0), 0);
                assert_eq!(warp.seen(variable, last), last);
                let seen: Vec<usize> = (0..=last).map(|place| warp.seen(variable, place)).collect();
                assert!(seen.is_sorted());
            }
        }
        // √u and u² of place 15 of 0 to 29: 20.86 and 7.76.
        let warp = identity.with(0, (0.5, 1.0));
        assert_eq!(warp.points(&[vec![15, 0, 3]]), [[21, 0, 3]]);
        let warp = identity.with(0, (2.0, 1.0));
        assert_eq!(warp.points(&[vec![15, 0, 3]]), [[8, 0, 3]]);
        assert_eq!(
            warp.candidates(&[vec![15, 29], vec![0], vec![3]])[0],
            [8, 29]
        );
    }
}
