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
use crate::error::tensor;
use lapidary_kernels::{D, Tensor, matmul};

/// How much of the step that just converges is taken first.
const CAUTION: f64 = 0.9;

/// `Y` after so many steps, for symmetric matrices `a` `[.., m, m]` without negative entries, each
/// with an `α` of its own; no gradient passes.
///
/// # Errors
/// Those of the tensor engine.
pub fn newton_inverse(a: &Tensor, epsilon: f64, steps: usize) -> Result<Tensor> {
    let a = a.detach();
    let size = tensor(a.dim(D::Minus1))?;
    let norm = tensor(tensor(a.sum_keepdim(D::Minus1))?.max_keepdim(D::Minus2))?;
    let identity = tensor(Tensor::eye(size, a.dtype(), a.device()))?;
    let a = tensor(a.broadcast_add(&tensor(identity * epsilon)?))?;
    let alpha = tensor(tensor(tensor(norm.sqr())?.recip())? * (2.0 * CAUTION))?;
    let mut y = tensor(a.broadcast_mul(&alpha))?;
    for _ in 0..steps {
        let twice = tensor(&y * 2.0)?;
        y = tensor(twice - matmul(&matmul(&y, &a)?, &y)?)?;
    }
    Ok(y)
}

/// As [`newton_inverse`], with the gradient of an exact inverse.
///
/// # Errors
/// Those of the tensor engine.
pub fn regularised_inverse(a: &Tensor, epsilon: f64, steps: usize) -> Result<Tensor> {
    let y = newton_inverse(a, epsilon, steps)?;
    if !a.track_op() {
        return Ok(y);
    }
    // Nothing in value; its derivative is d(A⁻¹) = −A⁻¹ dA A⁻¹.
    let change = tensor(a - a.detach())?;
    let moved = matmul(&matmul(&y, &change)?, &y)?;
    tensor(y - moved)
}
