//! Coiflets, whose scaling functions have vanishing moments as their wavelets have.
//!
//! Of order `K`, with `6 K` taps, centre `2 K` and `c = cos²(ξ/2)`, `s = sin²(ξ/2)` (Daubechies, Ten Lectures on
//! Wavelets, 1992, section 8.2):
//!
//! ```text
//! m₀(ξ) = c^K (Σ_{k<K} C(K − 1 + k, k) s^k + s^K f(ξ)),   f(ξ) = Σ_{n<2K} f_n e^{−inξ}
//! ```
//!
//! has `2 K` vanishing moments and, about its centre, `2 K − 1` of the scaling function, whatever `f` is. `f` is
//! where shifts by two are orthonormal: `2 K` numbers by Newton's steps from a start of one decimal, which
//! says which of the solutions is meant. Steps are taken in an orthonormal basis of what `f` moves, since the
//! powers themselves are nearly dependent.

use lapidary_factor::{Matrix, qr, thin_svd};

/// Where `f` starts, by order.
const STARTS: [&[f64]; 5] = [
    &[0.8, 0.2],
    &[3.0, 0.5, -0.3, -0.1],
    &[11.0, 1.5, -2.0, -0.7, 0.2, 0.1],
    &[41.4, 4.5, -9.6, -3.4, 1.7, 0.8, -0.2, -0.1],
    &[157.2, 14.1, -42.6, -14.7, 9.7, 4.4, -1.5, -0.8, 0.1, 0.1],
];

/// The highest order.
pub const MOST: usize = STARTS.len();

/// Newton's steps: they come to rest long before where they can.
const STEPS: usize = 40;

/// The coiflet of an order from 1 to [`MOST`], with `6 order` taps; none of another.
pub fn coiflet(order: usize) -> Option<Vec<f64>> {
    let start = STARTS.get(order.checked_sub(1)?)?;
    let taps = 6 * order;
    let cosine = power(&[0.25, 0.5, 0.25], order);
    let sine = |k: usize| power(&[-0.25, 0.5, -0.25], k);
    let root = 2f64.sqrt();
    let mut filter = vec![0.0; taps];
    let mut choose = 1.0;
    for k in 0..order {
        if k > 0 {
            choose *= (order - 1 + k) as f64 / k as f64;
        }
        // It reaches as far to both sides of the centre.
        let term = times(&cosine, &sine(k));
        for (tap, entry) in filter.iter_mut().skip(order - k).zip(term) {
            *tap += root * choose * entry;
        }
    }
    let last = times(&cosine, &sine(order));
    let moves = Matrix::from_fn(taps, 2 * order, |t, n| {
        let entry = t.checked_sub(n).and_then(|at| last.get(at));
        root * entry.copied().unwrap_or(0.0)
    });
    for (t, tap) in filter.iter_mut().enumerate() {
        *tap += start
            .iter()
            .enumerate()
            .map(|(n, f)| moves[(t, n)] * f)
            .sum::<f64>();
    }
    let basis = qr(moves.as_ref()).q;
    for _ in 0..STEPS {
        let step = newton(&filter, &basis)?;
        for (t, tap) in filter.iter_mut().enumerate() {
            *tap += step
                .iter()
                .enumerate()
                .map(|(n, by)| basis[(t, n)] * by)
                .sum::<f64>();
        }
    }
    Some(filter)
}

/// The step along `basis` `[taps, 2 K]` that makes a filter orthonormal to its shifts to first order, the least
/// where there are several.
fn newton(filter: &[f64], basis: &Matrix) -> Option<Vec<f64>> {
    let taps = filter.len();
    let tap = |t: Option<usize>| t.and_then(|t| filter.get(t)).copied().unwrap_or(0.0);
    let slopes = Matrix::from_fn(taps / 2, basis.ncols(), |shift, n| {
        let each = (0..taps)
            .map(|t| basis[(t, n)] * (tap(Some(t + 2 * shift)) + tap(t.checked_sub(2 * shift))));
        each.sum()
    });
    let off: Vec<f64> = (0..taps / 2)
        .map(|shift| {
            let pairs = filter.iter().zip(filter.iter().skip(2 * shift));
            let product: f64 = pairs.map(|(a, b)| a * b).sum();
            product - f64::from(u8::from(shift == 0))
        })
        .collect();
    let svd = thin_svd(slopes.as_ref()).ok()?;
    let mut step = vec![0.0; basis.ncols()];
    for (k, size) in svd.s.iter().enumerate().filter(|(_, size)| **size > 1e-14) {
        let along: f64 = off
            .iter()
            .enumerate()
            .map(|(i, off)| svd.u[(i, k)] * off)
            .sum();
        for (n, step) in step.iter_mut().enumerate() {
            *step -= along / size * svd.vt[(k, n)];
        }
    }
    Some(step)
}

/// The coefficients of a product.
pub(super) fn times(a: &[f64], b: &[f64]) -> Vec<f64> {
    let mut product = vec![0.0; (a.len() + b.len()).saturating_sub(1)];
    for (i, a) in a.iter().enumerate() {
        for (j, b) in b.iter().enumerate() {
            if let Some(sum) = product.get_mut(i + j) {
                *sum += a * b;
            }
        }
    }
    product
}

fn power(factor: &[f64], times_over: usize) -> Vec<f64> {
    (0..times_over).fold(vec![1.0], |product, _| times(&product, factor))
}
