//! The inverse of a kernel matrix by Newton's iteration, and its gradient in closed form.
//!
//! ```text
//! A_ε = A + ε I,   Y₀ = α A_ε,   α = 2 · 0.9 / ‖A‖₁²,   Y ← 2 Y − Y A_ε Y
//! ∂L/∂A = −Yᵀ ∂L/∂Y Yᵀ
//! ```
//!
//! After `t` steps an eigenvalue `λ` of `A_ε` has become `(1 − (1 − α λ²)^{2^t}) / λ`: those with
//! `α λ² ≪ 2^−t` are inverted in part only, which regularises. The gradient takes `Y` for the exact
//! inverse, at the cost of two products instead of a graph of all steps.

use crate::Result;
use lapidary_kernels::Tensor;

/// `Y` after so many steps, for symmetric matrices `a` `[.., m, m]` without negative entries, each
/// with an `α` of its own; no gradient passes.
///
/// # Errors
/// When they are not square.
pub fn newton_inverse(a: &Tensor, epsilon: f64, steps: usize) -> Result<Tensor> {
    regularised_inverse(&a.detach(), epsilon, steps)
}

/// As [`newton_inverse`], with the gradient of an exact inverse.
///
/// # Errors
/// As there.
pub fn regularised_inverse(a: &Tensor, epsilon: f64, steps: usize) -> Result<Tensor> {
    Ok(lapidary_kernels::newton_inverse(a, epsilon, steps)?)
}
