//! A low value of a smooth function of many numbers, from its gradients (L-BFGS: Liu & Nocedal
//! 1989).
//!
//! ```text
//! x ← x − t H g,     H from the last pairs s = Δx, y = Δg:  H y = s
//! ```
//!
//! The step `t` meets the weak Wolfe conditions, found by bisection (Lewis & Overton 2013):
//! the value falls by a share of what the slope promised, and the slope becomes less steep.

use std::collections::VecDeque;

/// When [`minimise`] ends, and what it remembers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LbfgsOptions {
    /// Most steps.
    pub steps: usize,
    /// Pairs that are remembered.
    pub memory: usize,
    /// It ends where no entry of the gradient is larger.
    pub tolerance: f64,
}

impl Default for LbfgsOptions {
    fn default() -> Self {
        Self {
            steps: 100,
            memory: 10,
            tolerance: 1e-9,
        }
    }
}

/// Where a descent ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Minimum {
    /// The numbers.
    pub point: Vec<f64>,
    /// The function's value there, which is at most that of the start.
    pub value: f64,
    /// Steps that were made.
    pub steps: usize,
}

/// Share of the promised fall that a step has to bring.
pub(super) const FALL: f64 = 1e-4;
/// Share of the slope that may be left behind a step.
const SLOPE: f64 = 0.9;
/// Lengths that are tried for one step.
pub(super) const TRIALS: usize = 50;

/// Follows a function, which gives its value and its gradient, down from `start`. It ends where
/// the gradient is small, where no step lowers the value any more, or with the last step.
///
/// ```
/// use lapidary_factor::{LbfgsOptions, minimise};
/// let bowl = |x: &[f64]| Ok::<_, std::convert::Infallible>((
///     (x[0] - 3.0).powi(2) + 10.0 * x[1].powi(2),
///     vec![2.0 * (x[0] - 3.0), 20.0 * x[1]],
/// ));
/// let found = minimise(vec![0.0, 1.0], &LbfgsOptions::default(), bowl).unwrap();
/// assert!((found.point[0] - 3.0).abs() < 1e-8 && found.point[1].abs() < 1e-8);
/// ```
///
/// # Errors
/// Those of the function.
pub fn minimise<E>(
    start: Vec<f64>,
    options: &LbfgsOptions,
    mut function: impl FnMut(&[f64]) -> Result<(f64, Vec<f64>), E>,
) -> Result<Minimum, E> {
    let mut here = Place::at(start, &mut function)?;
    let mut pairs: VecDeque<Pair> = VecDeque::new();
    let mut steps = 0;
    while steps < options.steps && here.steepest() > options.tolerance {
        let direction = direction(&here.gradient, &pairs);
        // Nothing is known of the curvature before the first step: it has length 1 at most.
        let first = match pairs.is_empty() {
            true => 1.0 / dot(&here.gradient, &here.gradient).sqrt().max(1.0),
            false => 1.0,
        };
        let Some(next) = step(&here, &direction, first, &mut function)? else {
            break;
        };
        let pair = Pair::between(&here, &next);
        // The Wolfe conditions leave it above zero, but for rounding.
        if pair.bend > 0.0 {
            pairs.push_back(pair);
            if pairs.len() > options.memory.max(1) {
                pairs.pop_front();
            }
        }
        here = next;
        steps += 1;
    }
    Ok(Minimum {
        point: here.point,
        value: here.value,
        steps,
    })
}

/// A point with what the function says of it.
pub(super) struct Place {
    pub(super) point: Vec<f64>,
    pub(super) value: f64,
    pub(super) gradient: Vec<f64>,
}

impl Place {
    pub(super) fn at<E>(
        point: Vec<f64>,
        function: &mut impl FnMut(&[f64]) -> Result<(f64, Vec<f64>), E>,
    ) -> Result<Self, E> {
        let (value, gradient) = function(&point)?;
        Ok(Self {
            point,
            value,
            gradient,
        })
    }

    /// The largest entry of the gradient.
    pub(super) fn steepest(&self) -> f64 {
        self.gradient.iter().fold(0.0, |most, g| most.max(g.abs()))
    }
}

/// What one step showed of the curvature.
struct Pair {
    /// `s`.
    moved: Vec<f64>,
    /// `y`.
    turned: Vec<f64>,
    /// `s · y`.
    bend: f64,
}

impl Pair {
    fn between(from: &Place, to: &Place) -> Self {
        let less = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a - b).collect();
        let moved: Vec<f64> = less(&to.point, &from.point);
        let turned: Vec<f64> = less(&to.gradient, &from.gradient);
        Self {
            bend: dot(&moved, &turned),
            moved,
            turned,
        }
    }
}

/// `−H g`, by two passes over the pairs.
fn direction(gradient: &[f64], pairs: &VecDeque<Pair>) -> Vec<f64> {
    let mut direction: Vec<f64> = gradient.iter().map(|g| -g).collect();
    let mut shares = Vec::with_capacity(pairs.len());
    for pair in pairs.iter().rev() {
        let share = dot(&pair.moved, &direction) / pair.bend;
        add(&mut direction, -share, &pair.turned);
        shares.push(share);
    }
    if let Some(last) = pairs.back() {
        let scale = last.bend / dot(&last.turned, &last.turned);
        direction.iter_mut().for_each(|d| *d *= scale);
    }
    for (pair, share) in pairs.iter().zip(shares.into_iter().rev()) {
        let back = dot(&pair.turned, &direction) / pair.bend;
        add(&mut direction, share - back, &pair.moved);
    }
    direction
}

/// The place behind a step that meets both conditions; where none is found, behind the longest
/// that met the first; none where the value does not fall.
fn step<E>(
    here: &Place,
    direction: &[f64],
    first: f64,
    function: &mut impl FnMut(&[f64]) -> Result<(f64, Vec<f64>), E>,
) -> Result<Option<Place>, E> {
    let slope = dot(&here.gradient, direction);
    if slope.is_nan() || slope >= 0.0 {
        return Ok(None);
    }
    let (mut short, mut long, mut length) = (0.0, f64::INFINITY, first);
    let mut best = None;
    for _ in 0..TRIALS {
        let mut point = here.point.clone();
        add(&mut point, length, direction);
        let place = Place::at(point, function)?;
        let falls = place.value <= here.value + FALL * length * slope;
        let flatter = dot(&place.gradient, direction) >= SLOPE * slope;
        // A value that is no number falls short of the first condition.
        if falls {
            best = Some(place);
            if flatter {
                break;
            }
            short = length;
        } else {
            long = length;
        }
        length = match long.is_finite() {
            true => 0.5 * (short + long),
            false => 2.0 * length,
        };
    }
    Ok(best)
}

pub(super) fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

pub(super) fn add(to: &mut [f64], times: f64, what: &[f64]) {
    for (to, what) in to.iter_mut().zip(what) {
        *to += times * what;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::convert::Infallible;

    #[test]
    fn a_bent_valley_is_followed_to_its_end() {
        // Rosenbrock's: (1 − x)² + 100 (y − x²)².
        let valley = |p: &[f64]| {
            let (x, y) = (p[0], p[1]);
            let off = y - x * x;
            let value = (1.0 - x).powi(2) + 100.0 * off * off;
            let gradient = vec![-2.0 * (1.0 - x) - 400.0 * x * off, 200.0 * off];
            Ok::<_, Infallible>((value, gradient))
        };
        let options = LbfgsOptions {
            steps: 300,
            ..LbfgsOptions::default()
        };
        let found = minimise(vec![-1.2, 1.0], &options, valley).unwrap();
        assert!(found.steps < 300, "{found:?}");
        assert!(
            found.point.iter().all(|x| (x - 1.0).abs() < 1e-7),
            "{found:?}"
        );
    }

    #[test]
    fn no_step_goes_up_and_a_minimum_is_left_alone() {
        let bowl = |p: &[f64]| {
            let weight = |i: usize| 10f64.powi(i as i32 % 4);
            let value: f64 = p.iter().enumerate().map(|(i, x)| weight(i) * x * x).sum();
            let gradient = p.iter().enumerate().map(|(i, x)| 2.0 * weight(i) * x);
            Ok::<_, Infallible>((value, gradient.collect::<Vec<f64>>()))
        };
        let start = vec![1.0; 12];
        let mut before = bowl(&start).unwrap().0;
        for steps in 1..8 {
            let options = LbfgsOptions {
                steps,
                ..LbfgsOptions::default()
            };
            let found = minimise(start.clone(), &options, bowl).unwrap();
            assert_eq!(found.steps, steps);
            assert!(found.value < before, "{found:?}");
            before = found.value;
        }
        let rest = minimise(vec![0.0; 12], &LbfgsOptions::default(), bowl).unwrap();
        assert_eq!((rest.steps, rest.value), (0, 0.0));
    }

    #[test]
    fn what_the_function_refuses_is_handed_on() {
        let refused = |_: &[f64]| Err::<(f64, Vec<f64>), _>("no");
        assert_eq!(
            minimise(vec![1.0], &LbfgsOptions::default(), refused),
            Err("no")
        );
    }
}
