//! A rational function that makes the distances of a tree those of a graph.

use super::Function;

/// What a fit is: minimise `‖M_f − D‖_F / ‖D‖_F` over pairs of vertices, with `M_f` a function of their
/// distance in the tree and `D` their distance in the graph, by gradient descent on the coefficients
/// of
///
/// ```text
/// f(x) = (a₀ + a₁ t + …) / (1 + b₁² t + b₂² t² + …),   t = x / s
/// ```
///
/// `s` is the largest distance in the tree. The denominator has no zero where distances are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RationalFit {
    /// Degree of the numerator.
    pub numerator: usize,
    /// Degree of the denominator.
    pub denominator: usize,
    /// Steps of gradient descent, with a rate that falls to nothing.
    pub steps: usize,
    /// The first rate.
    pub rate: f64,
}

impl Default for RationalFit {
    fn default() -> Self {
        Self {
            numerator: 2,
            denominator: 2,
            steps: 4000,
            rate: 0.02,
        }
    }
}

/// A rate divided by the root of a decayed mean of squares (Adam), for one coefficient.
#[derive(Clone, Copy, Default)]
struct Moments {
    mean: f64,
    square: f64,
}

impl RationalFit {
    /// The function that fits `pairs` of a distance in the tree and one in the graph, and the relative
    /// error that is left. It starts from `f(x) = x / (1 + …)` with a denominator near 1.
    pub fn fit(&self, pairs: &[(f64, f64)]) -> (Function, f64) {
        let scale = pairs.iter().fold(0.0, |m: f64, pair| m.max(pair.0));
        let scale = if scale > 0.0 { scale } else { 1.0 };
        let (up, down) = (self.numerator + 1, self.denominator);
        // a, and then b.
        let mut c = vec![0.0; up + down];
        if let Some(slope) = c.get_mut(1).filter(|_| up > 1) {
            *slope = scale;
        }
        // Where all b are 0 their gradient is too.
        c.iter_mut().skip(up).for_each(|b| *b = 0.1);
        let norm: f64 = pairs.iter().map(|pair| pair.1 * pair.1).sum();
        let mut moments = vec![Moments::default(); c.len()];
        let mut best = (f64::INFINITY, c.clone());
        for step in 0..=self.steps {
            let (error, gradient) = self.error(&c, scale, pairs);
            if error < best.0 {
                best = (error, c.clone());
            }
            let decays = [0.9f64, 0.999].map(|b| 1.0 - b.powf(step as f64 + 1.0));
            let rate = self.rate * (1.0 - step as f64 / self.steps.max(1) as f64);
            for (place, (c, (moments, g))) in c
                .iter_mut()
                .zip(moments.iter_mut().zip(&gradient))
                .enumerate()
            {
                moments.mean = 0.9 * moments.mean + 0.1 * g;
                moments.square = 0.999 * moments.square + 0.001 * g * g;
                let step =
                    (moments.mean / decays[0]) / ((moments.square / decays[1]).sqrt() + 1e-12);
                // Coefficients of the numerator are of the size of distances.
                *c -= rate * step * if place < up { scale } else { 1.0 };
            }
        }
        let (error, c) = best;
        let power = |k: usize| scale.powi(i32::try_from(k).unwrap_or(i32::MAX));
        let numerator = c.iter().take(up).enumerate();
        let denominator = c.iter().skip(up).zip(1..);
        let function = Function::Rational {
            numerator: numerator.map(|(k, a)| a / power(k)).collect(),
            denominator: std::iter::once(1.0)
                .chain(denominator.map(|(b, k)| b * b / power(k)))
                .collect(),
        };
        (function, (error / norm.max(f64::MIN_POSITIVE)).sqrt())
    }

    /// The sum of squared errors and its gradient.
    fn error(&self, c: &[f64], scale: f64, pairs: &[(f64, f64)]) -> (f64, Vec<f64>) {
        let up = self.numerator + 1;
        let (a, b) = c.split_at(up);
        let mut gradient = vec![0.0; c.len()];
        let mut sum = 0.0;
        for (tree, graph) in pairs {
            let t = tree / scale;
            let numerator = a.iter().rev().fold(0.0, |sum, a| sum * t + a);
            let denominator = 1.0 + t * b.iter().rev().fold(0.0, |sum, b| sum * t + b * b);
            let found = numerator / denominator;
            let off = found - graph;
            sum += off * off;
            let mut power = 1.0;
            for gradient in gradient.iter_mut().take(up) {
                *gradient += 2.0 * off * power / denominator;
                power *= t;
            }
            let mut power = t;
            for (gradient, b) in gradient.iter_mut().skip(up).zip(b) {
                *gradient -= 2.0 * off * found / denominator * 2.0 * b * power;
                power *= t;
            }
        }
        (sum, gradient)
    }
}
