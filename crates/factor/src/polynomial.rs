//! Roots of polynomials.

pub use realfft::num_complex::Complex;

/// All roots of `c₀ + c₁ x + …`, each as often as it is one (Aberth, Iteration methods for finding all zeros
/// of a polynomial simultaneously, 1973). Coefficients of nothing at the end are left out; roots that are
/// one and the same several times come out near each other.
pub fn roots(coefficients: &[f64]) -> Vec<Complex<f64>> {
    let Some(last) = coefficients.iter().rposition(|c| *c != 0.0) else {
        return Vec::new();
    };
    let coefficients = coefficients.get(..=last).unwrap_or(&[]);
    // Roots at zero, which have no circle.
    let zeros = coefficients.iter().take_while(|c| **c == 0.0).count();
    let coefficients = coefficients.get(zeros..).unwrap_or(&[]);
    let degree = coefficients.len().saturating_sub(1);
    let value = |at: Complex<f64>| {
        let (mut p, mut slope) = (Complex::new(0.0, 0.0), Complex::new(0.0, 0.0));
        for coefficient in coefficients.iter().rev() {
            slope = slope * at + p;
            p = p * at + coefficient;
        }
        (p, slope)
    };
    // On a circle about as wide as the roots lie, none on the real axis.
    let (first, last) = (
        coefficients.first().copied().unwrap_or(1.0),
        coefficients.last().copied().unwrap_or(1.0),
    );
    let radius = (first / last).abs().powf(1.0 / degree.max(1) as f64);
    let mut found: Vec<Complex<f64>> = (0..degree)
        .map(|k| {
            let angle = 2.0 * std::f64::consts::PI * (k as f64 + 0.35) / degree as f64;
            Complex::from_polar(radius, angle)
        })
        .collect();
    for _ in 0..200 {
        let mut moved = 0f64;
        for index in 0..degree {
            let Some(here) = found.get(index).copied() else {
                continue;
            };
            let (p, slope) = value(here);
            if p.norm() == 0.0 {
                continue;
            }
            let newton = p / slope;
            let mut others = Complex::new(0.0, 0.0);
            for (other, root) in found.iter().enumerate() {
                if other != index {
                    others += (here - root).inv();
                }
            }
            let step = newton / (Complex::new(1.0, 0.0) - newton * others);
            moved = moved.max(step.norm() / here.norm().max(1e-300));
            if let Some(root) = found.get_mut(index) {
                *root = here - step;
            }
        }
        if moved < 1e-16 {
            break;
        }
    }
    found.resize(degree + zeros, Complex::new(0.0, 0.0));
    found
}
