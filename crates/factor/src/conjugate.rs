//! A low value of a smooth function of many numbers by conjugate gradients, from its gradients
//! alone (Hager & Zhang, A New Conjugate Gradient Method with Guaranteed Descent and an Efficient
//! Line Search, SIAM Journal on Optimization 16, 2005).
//!
//! ```text
//! x ← x + t d,     d ← −g + β d,     β = (y − 2 d ‖y‖² / (d · y)) · g / (d · y),     y = Δg
//! ```
//!
//! `β` is kept from falling below `−1 / (‖d‖ min(0.01, ‖g‖))`. A few vectors as long as `x` are all
//! that is held: no matrix, and no history as in L-BFGS. Of `½ ‖X w − y‖²` with exact steps these are
//! the conjugate gradients of linear least squares (Hestenes & Stiefel 1952).
//!
//! The step `t` meets the strong Wolfe conditions, found by secants within a bracket: the value falls
//! by a share of what the slope promised, and a tenth of the slope is left at most. Directions are
//! conjugate only so far as steps end in the valley, so that this is stricter than in L-BFGS.

use crate::lbfgs::{FALL, Minimum, Place, TRIALS, add, dot};

/// When [`minimise_conjugate`] ends.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ConjugateOptions {
    /// Most steps.
    pub steps: usize,
    /// It ends where no entry of the gradient is larger.
    pub tolerance: f64,
}

impl Default for ConjugateOptions {
    fn default() -> Self {
        Self {
            steps: 100,
            tolerance: 1e-9,
        }
    }
}

/// Share of the slope that may be left behind a step.
const SLOPE: f64 = 0.1;
/// What bounds `β` from below.
const LEAST: f64 = 0.01;

/// Follows a function, which gives its value and its gradient, down from `start`. It ends where
/// the gradient is small, where no step lowers the value any more, or with the last step. A value is
/// known to about 16 digits, so that the gradient ends near the root of that at best, however small
/// the tolerance.
///
/// ```
/// use lapidary_factor::{ConjugateOptions, minimise_conjugate};
/// let bowl = |x: &[f64]| Ok::<_, std::convert::Infallible>((
///     (x[0] - 3.0).powi(2) + 10.0 * x[1].powi(2),
///     vec![2.0 * (x[0] - 3.0), 20.0 * x[1]],
/// ));
/// let found = minimise_conjugate(vec![0.0, 1.0], &ConjugateOptions::default(), bowl).unwrap();
/// assert!((found.point[0] - 3.0).abs() < 1e-6 && found.point[1].abs() < 1e-6);
/// ```
///
/// # Errors
/// Those of the function.
pub fn minimise_conjugate<E>(
    start: Vec<f64>,
    options: &ConjugateOptions,
    mut function: impl FnMut(&[f64]) -> Result<(f64, Vec<f64>), E>,
) -> Result<Minimum, E> {
    let mut here = Place::at(start, &mut function)?;
    let mut direction = steepest(&here.gradient);
    // Nothing is known of the curvature before the first step: it has length 1 at most.
    let mut first = 1.0 / dot(&here.gradient, &here.gradient).sqrt().max(1.0);
    let mut steps = 0;
    while steps < options.steps && here.steepest() > options.tolerance {
        let Some((next, length)) = search(&here, &direction, first, &mut function)? else {
            break;
        };
        let before = dot(&here.gradient, &direction);
        direction = turned(&direction, &here.gradient, &next.gradient);
        here = next;
        // The next step is tried at the length that promises as much as this one.
        first = match length * before / dot(&here.gradient, &direction) {
            promising if promising.is_finite() && promising > 0.0 => promising,
            _ => length,
        };
        steps += 1;
    }
    Ok(Minimum {
        point: here.point,
        value: here.value,
        steps,
    })
}

fn steepest(gradient: &[f64]) -> Vec<f64> {
    gradient.iter().map(|g| -g).collect()
}

/// `−g + β d` of the new gradient; `−g` where that would not lead down.
fn turned(direction: &[f64], before: &[f64], gradient: &[f64]) -> Vec<f64> {
    let change: Vec<f64> = gradient.iter().zip(before).map(|(g, b)| g - b).collect();
    let bend = dot(direction, &change);
    if bend.is_nan() || bend <= 0.0 {
        return steepest(gradient);
    }
    let mut towards = change.clone();
    add(&mut towards, -2.0 * dot(&change, &change) / bend, direction);
    let length = |x: &[f64]| dot(x, x).sqrt();
    let least = -1.0 / (length(direction) * length(before).min(LEAST));
    let beta = (dot(&towards, gradient) / bend).max(least);
    let mut next = steepest(gradient);
    add(&mut next, beta, direction);
    match dot(&next, gradient) < 0.0 {
        true => next,
        false => steepest(gradient),
    }
}

/// A length that was tried, and the slope along the direction there.
#[derive(Clone, Copy)]
struct End {
    length: f64,
    slope: f64,
}

/// The place behind a step that meets both conditions, and its length; where none is found, the
/// lowest that met the first; none where the value does not fall.
fn search<E>(
    here: &Place,
    direction: &[f64],
    first: f64,
    function: &mut impl FnMut(&[f64]) -> Result<(f64, Vec<f64>), E>,
) -> Result<Option<(Place, f64)>, E> {
    let slope = dot(&here.gradient, direction);
    if slope.is_nan() || slope >= 0.0 {
        return Ok(None);
    }
    let mut low = End { length: 0.0, slope };
    let (mut high, mut length) = (None, first);
    let mut best: Option<(Place, f64)> = None;
    for _ in 0..TRIALS {
        let mut point = here.point.clone();
        add(&mut point, length, direction);
        let place = Place::at(point, function)?;
        let end = End {
            length,
            slope: dot(&place.gradient, direction),
        };
        // A value that is no number falls short of the first condition; one that rounding leaves
        // where it was would be walked around in without end.
        let falls = place.value < here.value && place.value <= here.value + FALL * length * slope;
        if falls {
            if end.slope.abs() <= -SLOPE * slope {
                return Ok(Some((place, length)));
            }
            if best
                .as_ref()
                .is_none_or(|(best, _)| place.value < best.value)
            {
                best = Some((place, length));
            }
        }
        match falls && end.slope < 0.0 {
            true => low = end,
            false => high = Some(end),
        }
        length = between(slope, low, high);
    }
    Ok(best)
}

/// The length to try next: where the secant of the slopes crosses zero, well within the bracket, or
/// beyond what was tried as long as the value still falls there. `slope` is that of the start.
fn between(slope: f64, low: End, high: Option<End>) -> f64 {
    match high {
        Some(high) => {
            let share = match high.slope > 0.0 {
                true => low.slope / (low.slope - high.slope),
                false => 0.5,
            };
            low.length + share.clamp(0.1, 0.9) * (high.length - low.length)
        }
        None => {
            let times = match low.slope > slope {
                true => slope / (slope - low.slope),
                false => 4.0,
            };
            low.length * times.clamp(1.1, 10.0)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Matrix, Regression};
    use std::convert::Infallible;

    /// `½ ‖X W − Y‖²` by its value and its gradient, `Xᵀ (X W − Y)`: no second moment is formed.
    #[test]
    fn least_squares_are_those_of_the_direct_solution() {
        let x = Matrix::from_fn(30, 4, |i, j| {
            (5.0 * i as f64 + 3.0 * j as f64 + 0.7 * (i * j) as f64).sin()
        });
        let y = Matrix::from_fn(30, 3, |i, j| {
            (3.0 * i as f64 + 7.0 * j as f64 + 0.3 * (i * j) as f64).cos()
        });
        let squares = |numbers: &[f64]| {
            let map = Matrix::from_fn(4, 3, |i, j| numbers[3 * i + j]);
            let missed = &x * &map - &y;
            let slopes = x.transpose() * &missed;
            let gradient = (0..12).map(|at| slopes[(at / 3, at % 3)]);
            let gradient: Vec<f64> = gradient.collect();
            Ok::<_, Infallible>((0.5 * missed.squared_norm_l2(), gradient))
        };
        let options = ConjugateOptions {
            steps: 200,
            ..ConjugateOptions::default()
        };
        let found = minimise_conjugate(vec![0.0; 12], &options, squares).unwrap();
        let mut sums = Regression::through_origin(4, 3);
        sums.add(x.as_ref(), y.as_ref()).unwrap();
        let direct = sums.solve(0.0).unwrap().weight;
        for (at, number) in found.point.iter().enumerate() {
            let expected = direct[(at / 3, at % 3)];
            assert!((number - expected).abs() < 1e-6, "{number} {expected}");
        }
        // Four curvatures, each three times: about as many steps, since they end in the valley.
        assert!(found.steps < 60, "{}", found.steps);
    }

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
        let options = ConjugateOptions {
            steps: 500,
            ..ConjugateOptions::default()
        };
        let found = minimise_conjugate(vec![-1.2, 1.0], &options, valley).unwrap();
        assert!(found.steps < 500, "{found:?}");
        assert!(
            found.point.iter().all(|x| (x - 1.0).abs() < 1e-6),
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
            let options = ConjugateOptions {
                steps,
                ..ConjugateOptions::default()
            };
            let found = minimise_conjugate(start.clone(), &options, bowl).unwrap();
            assert_eq!(found.steps, steps);
            assert!(found.value < before, "{found:?}");
            before = found.value;
        }
        let rest = minimise_conjugate(vec![0.0; 12], &ConjugateOptions::default(), bowl).unwrap();
        assert_eq!((rest.steps, rest.value), (0, 0.0));
    }

    #[test]
    fn what_the_function_refuses_is_handed_on() {
        let refused = |_: &[f64]| Err::<(f64, Vec<f64>), _>("no");
        assert_eq!(
            minimise_conjugate(vec![1.0], &ConjugateOptions::default(), refused),
            Err("no")
        );
    }
}
