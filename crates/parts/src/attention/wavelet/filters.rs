//! Low-pass filters of orthonormal wavelets, computed and not looked up.
//!
//! A filter with `w` taps and `w / 2` vanishing moments is `lo(z) = c (1 + z)^{w/2} Π (z − z_k)`, where the
//! `z_k` are one of each pair `z, 1/z` of roots of Daubechies' polynomial (Daubechies, Orthonormal
//! Bases of Compactly Supported Wavelets, 1988): with `N = w / 2`,
//! `P(y) = Σ_{k<N} C(N − 1 + k, k) y^k` at `z + 1/z = 2 − 4 y`. Daubechies takes the roots inside the unit
//! circle, symlets the choice that makes the filter most symmetric.

use super::Base;

/// A complex number.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Complex {
    re: f64,
    im: f64,
}

impl Complex {
    const ONE: Self = Self::new(1.0, 0.0);

    const fn new(re: f64, im: f64) -> Self {
        Self { re, im }
    }

    fn plus(self, other: Self) -> Self {
        Self::new(self.re + other.re, self.im + other.im)
    }

    fn minus(self, other: Self) -> Self {
        Self::new(self.re - other.re, self.im - other.im)
    }

    fn times(self, other: Self) -> Self {
        Self::new(
            self.re * other.re - self.im * other.im,
            self.re * other.im + self.im * other.re,
        )
    }

    fn size(self) -> f64 {
        self.re.hypot(self.im)
    }

    fn inverse(self) -> Self {
        let square = self.re * self.re + self.im * self.im;
        Self::new(self.re / square, -self.im / square)
    }

    fn square_root(self) -> Self {
        let size = self.size();
        let re = ((size + self.re) / 2.0).max(0.0).sqrt();
        let im = ((size - self.re) / 2.0).max(0.0).sqrt();
        Self::new(re, im.copysign(self.im))
    }
}

/// All roots of the polynomial with these coefficients, the constant one first (Aberth, 1973).
fn roots(coefficients: &[f64]) -> Vec<Complex> {
    let degree = coefficients.len().saturating_sub(1);
    let value = |at: Complex| {
        let (mut p, mut slope) = (Complex::new(0.0, 0.0), Complex::new(0.0, 0.0));
        for coefficient in coefficients.iter().rev() {
            slope = slope.times(at).plus(p);
            p = p.times(at).plus(Complex::new(*coefficient, 0.0));
        }
        (p, slope)
    };
    // On a circle about as wide as the roots lie, none on the real axis.
    let (first, last) = (
        coefficients.first().copied().unwrap_or(1.0),
        coefficients.last().copied().unwrap_or(1.0),
    );
    let radius = (first / last).abs().powf(1.0 / degree.max(1) as f64);
    let mut found: Vec<Complex> = (0..degree)
        .map(|k| {
            let angle = 2.0 * std::f64::consts::PI * (k as f64 + 0.35) / degree as f64;
            Complex::new(radius * angle.cos(), radius * angle.sin())
        })
        .collect();
    for _ in 0..200 {
        let mut moved = 0f64;
        for index in 0..degree {
            let Some(here) = found.get(index).copied() else {
                continue;
            };
            let (p, slope) = value(here);
            if p.size() == 0.0 {
                continue;
            }
            let newton = p.times(slope.inverse());
            let mut others = Complex::new(0.0, 0.0);
            for (other, root) in found.iter().enumerate() {
                if other != index {
                    others = others.plus(here.minus(*root).inverse());
                }
            }
            let step = newton.times(Complex::ONE.minus(newton.times(others)).inverse());
            moved = moved.max(step.size() / here.size().max(1e-300));
            if let Some(root) = found.get_mut(index) {
                *root = here.minus(step);
            }
        }
        if moved < 1e-16 {
            break;
        }
    }
    found
}

/// The roots inside the unit circle that the polynomial's roots in the upper half plane, and the real
/// ones, have: a complex one stands for itself and its conjugate.
fn inner_roots(moments: usize) -> Vec<Complex> {
    let mut coefficients = vec![1.0];
    for k in 1..moments {
        let last = coefficients.last().copied().unwrap_or(1.0);
        coefficients.push(last * (moments - 1 + k) as f64 / k as f64);
    }
    let mut inner = Vec::new();
    for y in roots(&coefficients) {
        // A real root has an imaginary part of rounding alone.
        let is_real = y.im.abs() < 1e-9 * y.size();
        if !is_real && y.im < 0.0 {
            continue;
        }
        let y = if is_real { Complex::new(y.re, 0.0) } else { y };
        let half = Complex::new(1.0 - 2.0 * y.re, -2.0 * y.im);
        let root = half.times(half).minus(Complex::ONE).square_root();
        let z = half.minus(root);
        inner.push(if z.size() < 1.0 { z } else { half.plus(root) });
    }
    inner
}

/// `(1 + z)^moments Π (z − z_k)`, the lowest power last, with sum `√2`.
fn product(moments: usize, roots: &[Complex]) -> Vec<f64> {
    let mut filter = vec![1.0];
    let times = |filter: &[f64], factor: &[f64]| {
        let mut product = vec![0.0; filter.len() + factor.len() - 1];
        for (i, a) in filter.iter().enumerate() {
            for (j, b) in factor.iter().enumerate() {
                if let Some(sum) = product.get_mut(i + j) {
                    *sum += a * b;
                }
            }
        }
        product
    };
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
        let chosen: Vec<Complex> = inner
            .iter()
            .enumerate()
            .map(|(index, z)| match choice >> index & 1 {
                1 => z.inverse(),
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

/// The coiflet of six taps, whose scaling function has vanishing moments too.
pub fn coiflet() -> Vec<f64> {
    let root = 7f64.sqrt();
    let scale = 16.0 * 2f64.sqrt();
    [
        1.0 - root,
        5.0 + root,
        14.0 + 2.0 * root,
        14.0 - 2.0 * root,
        1.0 - root,
        -3.0 + root,
    ]
    .map(|tap| tap / scale)
    .to_vec()
}

/// The filter of a base, `taps` numbers; none for a drawn one.
pub(super) fn base(base: Base, taps: usize) -> Option<Vec<f64>> {
    match base {
        Base::Daubechies => Some(daubechies(taps)),
        Base::Symlet => Some(symlet(taps)),
        Base::Coiflet => Some(coiflet()),
        Base::Sinusoid => {
            // Half a wave, with the norm of an orthonormal filter.
            let wave = |t: usize| (std::f64::consts::PI * (t as f64 + 0.5) / taps as f64).sin();
            let norm = (0..taps).map(|t| wave(t).powi(2)).sum::<f64>().sqrt();
            Some((0..taps).map(|t| wave(t) / norm).collect())
        }
        Base::Normal => None,
    }
}
