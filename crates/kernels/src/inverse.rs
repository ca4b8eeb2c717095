//! Inverses of stacks of small symmetric matrices by Newton's iteration, their gradient in closed form.
//!
//! ```text
//! A_ε = A + ε I,   Y₀ = α A_ε,   α = 2 · 0.9 / ‖A‖₁²,   Y ← 2 Y − Y A_ε Y
//! ∂L/∂A = −Yᵀ ∂L/∂Y Yᵀ
//! ```
//!
//! After `t` steps an eigenvalue `λ` of `A_ε` has become `(1 − (1 − α λ²)^{2^t}) / λ`: those with
//! `α λ² ≪ 2^−t` are inverted in part only, which regularises. The gradient takes `Y` for the exact
//! inverse. All steps of a matrix are taken while it lies in the cache, without a tensor between them.

use crate::backward::Apply;
use crate::host::{self, Host, Shared, by_dtype, fused};
use crate::product::{Into, Matrix, Repeated, Threads, multiply};
use crate::simd::Real;
use crate::{Error, Result, Tensor, naive};
use candle_core::{CpuStorage, CustomOp1, Layout, Shape};

type Candle<T> = candle_core::Result<T>;

/// How much of the step that just converges is taken first.
pub(crate) const CAUTION: f64 = 0.9;

/// `Y` after so many `steps`, for symmetric matrices `a` `[.., size, size]` without negative entries, each
/// with an `α` of its own.
///
/// # Errors
/// When `a` is not a stack of square matrices.
///
/// ```
/// use lapidary_kernels::{Device, Tensor, newton_inverse};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let a = Tensor::new(&[[1f64, 0.5], [0.5, 1.0]], &Device::Cpu)?;
/// let y = newton_inverse(&a, 0.0, 30)?.to_vec2::<f64>()?;
/// assert!((y[0][0] - 4.0 / 3.0).abs() < 1e-12 && (y[0][1] + 2.0 / 3.0).abs() < 1e-12);
/// # Ok(())
/// # }
/// ```
pub fn newton_inverse(a: &Tensor, epsilon: f64, steps: usize) -> Result<Tensor> {
    let size = match a.dims() {
        [.., rows, columns] if rows == columns => *rows,
        other => {
            let expected = "[.., size, size]";
            return Err(Error::argument("newton inverse", "a", other, expected));
        }
    };
    if !fused(&[a]) {
        return naive::newton_inverse(a, epsilon, steps);
    }
    let operation = Newton {
        size,
        epsilon,
        steps,
    };
    Ok(a.apply1(operation)?)
}

struct Newton {
    size: usize,
    epsilon: f64,
    steps: usize,
}

/// `result (+)= scale · a b` of square matrices on this thread.
fn product<T: Real>(result: &mut [T], into: Into, scale: T, a: Matrix<T>, b: Matrix<T>) {
    multiply(result, b.columns, into, scale, a, b, Threads::One);
}

impl Newton {
    /// `work` on each matrix of what is made, in parallel.
    fn each<T: Real>(
        &self,
        count: usize,
        products: usize,
        work: impl Fn(usize, &mut [T]) + Sync,
    ) -> Vec<T> {
        let square = self.size * self.size;
        let mut result = host::unwritten::<T>(count * square);
        let shared = Shared::new(&mut result);
        host::share(count, products * square * self.size / 8, |range| {
            for index in range {
                // SAFETY: matrices are disjoint.
                work(index, unsafe { shared.part(index * square, square) });
            }
        });
        result
    }

    fn forward<T: Real>(&self, a: &[T]) -> Vec<T> {
        let (size, square) = (self.size, self.size * self.size);
        let count = a.len().checked_div(square).unwrap_or(0);
        self.each(count, 2 * self.steps, |index, y| {
            let mut raised = a[index * square..(index + 1) * square].to_vec();
            let sums = raised
                .chunks_exact(size)
                .map(|row| row.iter().copied().sum::<T>());
            let norm = sums.fold(T::NEG_INFINITY, T::larger);
            let alpha = T::of(2.0 * CAUTION) / (norm * norm);
            for at in 0..size {
                raised[at * size + at] += T::of(self.epsilon);
            }
            for (y, a) in y.iter_mut().zip(&raised) {
                *y = alpha * *a;
            }
            // The same in every step.
            let raised = Repeated::new(Matrix::packed(&raised, size, size), size);
            let [mut before, mut half] = [(); 2].map(|()| host::unwritten::<T>(square));
            for _ in 0..self.steps {
                for (before, y) in before.iter_mut().zip(y.iter_mut()) {
                    *before = *y;
                    *y += *before;
                }
                let old = Matrix::packed(&before, size, size);
                raised.multiply_whole(&mut half, Into::Replace, T::one(), old);
                let half = Matrix::packed(&half, size, size);
                product(y, Into::Add, -T::one(), half, old);
            }
        })
    }

    fn backward<T: Real>(&self, y: &[T], gradient: &[T]) -> Vec<T> {
        let (size, square) = (self.size, self.size * self.size);
        let count = y.len().checked_div(square).unwrap_or(0);
        self.each(count, 2, |index, result| {
            let range = index * square..(index + 1) * square;
            let y = Matrix::packed(&y[range.clone()], size, size).transposed();
            let gradient = Matrix::packed(&gradient[range], size, size);
            let mut half = host::unwritten::<T>(square);
            product(&mut half, Into::Replace, T::one(), y, gradient);
            let half = Matrix::packed(&half, size, size);
            product(result, Into::Replace, -T::one(), half, y);
        })
    }
}

impl CustomOp1 for Newton {
    fn name(&self) -> &'static str {
        "newton inverse"
    }

    fn cpu_fwd(&self, a: &CpuStorage, layout: &Layout) -> Candle<(CpuStorage, Shape)> {
        by_dtype!(host::dtype(a), T => {
            let y = self.forward(&host::ordered::<T>(a, layout)?);
            let storage = <T as candle_core::WithDType>::to_cpu_storage_owned(y);
            Ok((storage, layout.shape().clone()))
        })
    }

    fn bwd(&self, a: &Tensor, y: &Tensor, gradient: &Tensor) -> Candle<Option<Tensor>> {
        let hosts = [y, gradient].map(Host::new);
        let [y, gradient] = &hosts;
        by_dtype!(a.dtype(), T => {
            let of_a = self.backward(&y.ordered::<T>()?, &gradient.ordered::<T>()?);
            Ok(Some(host::tensor(of_a, a.dims())?))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{difference, gradient_error};
    use crate::test_data::{arange, compare};
    use crate::{D, DType, gaussian};

    /// Kernel matrices of points that lie apart.
    fn kernels(stack: &[usize], size: usize, dtype: DType) -> Tensor {
        let points = (arange(&[stack, &[size, 5]].concat(), 1.0, dtype) * 1.5).unwrap();
        let rate = Tensor::ones((), dtype, points.device()).unwrap();
        gaussian(&points, &points, &rate).unwrap().detach()
    }

    #[test]
    fn equals_the_composition() {
        for size in [1, 7, 33] {
            compare(1e-4, |dtype| {
                let a = kernels(&[2, 3], size, dtype);
                (
                    newton_inverse(&a, 0.01, 12).unwrap(),
                    naive::newton_inverse(&a, 0.01, 12).unwrap(),
                )
            });
        }
        // A view that does not lie in order.
        let a = kernels(&[2, 3], 7, DType::F64).transpose(0, 1).unwrap();
        let plain = naive::newton_inverse(&a, 0.01, 12).unwrap();
        let found = newton_inverse(&a, 0.01, 12).unwrap();
        assert!(difference(&found, &plain).unwrap() < 1e-11);
    }

    #[test]
    fn many_steps_invert() {
        let a = kernels(&[3], 9, DType::F64);
        let y = newton_inverse(&a, 0.0, 60).unwrap();
        let identity = Tensor::eye(9, DType::F64, a.device()).unwrap();
        let identity = identity.broadcast_as((3, 9, 9)).unwrap();
        let product = y.matmul(&a).unwrap();
        assert!(difference(&product, &identity).unwrap() < 1e-9);
    }

    #[test]
    fn the_gradient_is_that_of_an_inverse() {
        let a = kernels(&[2], 6, DType::F64);
        // Moved in all directions at once, a matrix stays symmetric only if its mirror moves too.
        let symmetric =
            |x: &Tensor| Ok::<_, Error>(((x + x.transpose(D::Minus1, D::Minus2)?)? * 0.5)?);
        let fused = |x: &[Tensor]| newton_inverse(&symmetric(&x[0])?, 0.01, 60);
        let error = gradient_error(fused, std::slice::from_ref(&a)).unwrap();
        assert!(error < 1e-6, "{error:e}");
    }

    #[test]
    fn what_is_not_square_is_refused() {
        let a = arange(&[2, 3, 4], 1.0, DType::F32);
        let message = newton_inverse(&a, 0.0, 1).unwrap_err().to_string();
        assert!(message.contains("[2, 3, 4]"), "{message}");
        let nothing = arange(&[2, 0, 0], 1.0, DType::F32);
        assert_eq!(newton_inverse(&nothing, 0.0, 1).unwrap().dims(), [2, 0, 0]);
    }
}
