//! Low-pass filters of orthonormal wavelets, computed and not looked up.
//!
//! A filter with `w` taps and `w / 2` vanishing moments is `lo(z) = c (1 + z)^{w/2} Π (z − z_k)`, where the
//! `z_k` are one of each pair `z, 1/z` of roots of Daubechies' polynomial (Daubechies, Orthonormal
//! Bases of Compactly Supported Wavelets, 1988): with `N = w / 2`,
//! `P(y) = Σ_{k<N} C(N − 1 + k, k) y^k` at `z + 1/z = 2 − 4 y`. Daubechies takes the roots inside the unit
//! circle, symlets the choice that makes the filter most symmetric. [`coiflet`]s are made otherwise.

use super::Base;
pub use super::coiflets::coiflet;
use super::coiflets::times;
use lapidary_factor::polynomial::{Complex, roots};

/// The roots inside the unit circle that the polynomial's roots in the upper half plane, and the real
/// ones, have: a complex one stands for itself and its conjugate.
fn inner_roots(moments: usize) -> Vec<Complex<f64>> {
    let mut coefficients = vec![1.0];
    for k in 1..moments {
        let last = coefficients.last().copied().unwrap_or(1.0);
        coefficients.push(last * (moments - 1 + k) as f64 / k as f64);
    }
    let mut inner = Vec::new();
    for y in roots(&coefficients) {
        // A real root has an imaginary part of rounding alone.
        let is_real = y.im.abs() < 1e-9 * y.norm();
        if !is_real && y.im < 0.0 {
            continue;
        }
        let y = if is_real { Complex::new(y.re, 0.0) } else { y };
        let half = Complex::new(1.0 - 2.0 * y.re, -2.0 * y.im);
        let root = (half * half - 1.0).sqrt();
        let z = half - root;
        inner.push(if z.norm() < 1.0 { z } else { half + root });
    }
    inner
}

/// `(1 + z)^moments Π (z − z_k)`, the lowest power last, with sum `√2`.
fn product(moments: usize, roots: &[Complex<f64>]) -> Vec<f64> {
    let mut filter = vec![1.0];
    for _ in 0..moments {
        filter = times(&filter, &[1.0, 1.0]);
    }
    for z in roots {
        filter = match z.im == 0.0 {
            true => times(&filter, &[1.0, -z.re]),
            false => times(&filter, &[1.0, -2.0 * z.re, z.re * z.re + z.im * z.im]),
        };
    }
    let sum: f64 = filter.iter().sum();
    filter.iter().map(|tap| tap * 2f64.sqrt() / sum).collect()
}

/// Daubechies' filter with `taps` taps, an even number: the extremal-phase one.
pub fn daubechies(taps: usize) -> Vec<f64> {
    product(taps / 2, &inner_roots(taps / 2))
}

/// The most symmetric filter with `taps` taps and as many vanishing moments as Daubechies': of all
/// choices of a root or its inverse the one with the largest `Σ_t lo_t lo_{k−t}` for some centre `k / 2`.
pub fn symlet(taps: usize) -> Vec<f64> {
    let inner = inner_roots(taps / 2);
    let mut best = product(taps / 2, &inner);
    let symmetry = |filter: &[f64]| {
        let about = |sum: usize| -> f64 {
            let pairs = filter.iter().enumerate().filter_map(|(t, a)| {
                let mirror = filter.get(sum.checked_sub(t)?)?;
                Some(a * mirror)
            });
            pairs.sum()
        };
        (0..2 * taps).map(about).fold(f64::MIN, f64::max)
    };
    let mut most = symmetry(&best);
    // The mirror image of a filter is as symmetric: one root stays.
    for choice in 1u32..1 << inner.len().saturating_sub(1) {
        let chosen: Vec<Complex<f64>> = inner
            .iter()
            .enumerate()
            .map(|(index, z)| match choice >> index & 1 {
                1 => z.inv(),
                _ => *z,
            })
            .map(|z| Complex::new(z.re, z.im.abs()))
            .collect();
        let filter = product(taps / 2, &chosen);
        let found = symmetry(&filter);
        if found > most {
            (best, most) = (filter, found);
        }
    }
    best
}

/// The filter of a base, `taps` numbers; none for a drawn one.
pub(super) fn base(base: Base, taps: usize) -> Option<Vec<f64>> {
    match base {
        Base::Daubechies => Some(daubechies(taps)),
        Base::Symlet => Some(symlet(taps)),
        Base::Coiflet => coiflet(taps / 6),
        Base::Sinusoid => {
            // Half a wave, with the norm of an orthonormal filter.
            let wave = |t: usize| (std::f64::consts::PI * (t as f64 + 0.5) / taps as f64).sin();
            let norm = (0..taps).map(|t| wave(t).powi(2)).sum::<f64>().sqrt();
            Some((0..taps).map(|t| wave(t) / norm).collect())
        }
        Base::Normal => None,
    }
}
