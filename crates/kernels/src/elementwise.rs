//! Activations, their derivatives and their secants, one pass each.

use crate::backward::Apply;
use crate::host::{self, Host, by_dtype, fused};
use crate::simd::{self, Real};
use crate::{Activation, Error, Result, Tensor, naive};
use candle_core::{CpuStorage, CustomOp1, Layout, Shape, WithDType};

type Candle<T> = candle_core::Result<T>;

/// Applies `activation` to every element.
///
/// # Errors
/// Those of the tensor engine.
pub fn activate(x: &Tensor, activation: Activation) -> Result<Tensor> {
    if activation == Activation::Identity {
        return Ok(x.clone());
    }
    if !fused(&[x]) {
        return naive::activate(x, activation);
    }
    Ok(x.apply1(Pointwise {
        activation,
        what: What::Value,
    })?)
}

/// The derivative `f'(x)`, elementwise; at ReLU's corner 0. Not differentiable further.
///
/// # Errors
/// Those of the tensor engine.
pub fn activation_tangent(x: &Tensor, activation: Activation) -> Result<Tensor> {
    if !fused(&[x]) {
        return naive::activation_tangent(x, activation);
    }
    Ok(x.apply_op1_no_bwd(&Pointwise {
        activation,
        what: What::Tangent,
    })?)
}

/// The zero-origin secant `f(x) / x`, elementwise; `f'(0)` where `|x| < 1e-6`.
///
/// Not differentiable.
///
/// # Errors
/// When `f(0) ≠ 0` ([`Activation::passes_origin`]).
pub fn activation_secant(x: &Tensor, activation: Activation) -> Result<Tensor> {
    if !activation.passes_origin() {
        return Err(Error::argument(
            "activation_secant",
            "activation",
            activation,
            "one with f(0) = 0; use the tangent",
        ));
    }
    if !fused(&[x]) {
        return naive::activation_secant(x, activation);
    }
    Ok(x.apply_op1_no_bwd(&Pointwise {
        activation,
        what: What::Secant,
    })?)
}

struct Pointwise {
    activation: Activation,
    what: What,
}

enum What {
    Value,
    Tangent,
    Secant,
}

/// Runs `$body` with the constant `$A` standing for `$activation`, so that the choice is made
/// once per tensor and not once per element.
macro_rules! with_constant {
    ($activation:expr, $A:ident => $body:expr, $($variant:ident)*) => {
        match $activation {
            $(Activation::$variant => {
                const $A: Activation = Activation::$variant;
                $body
            })*
        }
    };
    ($activation:expr, $A:ident => $body:expr) => {
        with_constant!(
            $activation, $A => $body,
            Identity Relu Gelu GeluTanh QuickGelu Silu Tanh Sigmoid Exp Softplus
        )
    };
}

impl CustomOp1 for Pointwise {
    fn name(&self) -> &'static str {
        "activation"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Candle<(CpuStorage, Shape)> {
        let y = by_dtype!(host::dtype(storage), T => {
            let x = host::ordered::<T>(storage, layout)?;
            let y = match self.what {
                What::Value => values(self.activation, &x),
                What::Tangent => with_constant!(self.activation, A => {
                    map(&x, #[inline(always)] |x| tangent(A, x))
                }),
                What::Secant => with_constant!(self.activation, A => {
                    map(&x, #[inline(always)] |x| secant(A, x))
                }),
            };
            Ok(T::to_cpu_storage_owned(y))
        })?;
        Ok((y, layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, gradient: &Tensor) -> Candle<Option<Tensor>> {
        let (x_host, g_host) = (Host::new(x), Host::new(gradient));
        by_dtype!(x.dtype(), T => {
            let dx = chain(self.activation, &x_host.ordered::<T>()?, &g_host.ordered::<T>()?);
            host::tensor(dx, x.dims()).map(Some)
        })
    }
}

/// `f(x)` of each element.
pub(crate) fn values<T: Real>(activation: Activation, x: &[T]) -> Vec<T> {
    with_constant!(activation, A => map(x, #[inline(always)] |x| value(A, x)))
}

/// The chain rule, `g f'(x)` of each element.
pub(crate) fn chain<T: Real>(activation: Activation, x: &[T], g: &[T]) -> Vec<T> {
    with_constant!(activation, A => zip(x, g, #[inline(always)] |x, g| g * tangent(A, x)))
}

/// Elements that one parallel task handles at a time.
const CHUNK: usize = 4096;
/// Work of one element, in additions.
const WORK: usize = 4;

fn map<T: Real>(x: &[T], f: impl Fn(T) -> T + Sync) -> Vec<T> {
    zip(
        x,
        x,
        #[inline(always)]
        |x, _| f(x),
    )
}

fn zip<T: Real>(x: &[T], g: &[T], f: impl Fn(T, T) -> T + Sync) -> Vec<T> {
    let mut y = host::unwritten::<T>(x.len());
    let shared = host::Shared::new(&mut y);
    host::share(x.len().div_ceil(CHUNK), CHUNK * WORK, |chunks| {
        let range = chunks.start * CHUNK..(chunks.end * CHUNK).min(x.len());
        // SAFETY: chunks are disjoint.
        let y = unsafe { shared.part(range.start, range.len()) };
        let (x, g) = (&x[range.clone()], &g[range]);
        simd::vectorised(
            #[inline(always)]
            || {
                for ((y, &x), &g) in y.iter_mut().zip(x).zip(g) {
                    *y = f(x, g);
                }
            },
        );
    });
    y
}

#[inline(always)]
fn value<T: Real>(activation: Activation, x: T) -> T {
    let half = T::of(0.5);
    match activation {
        Activation::Identity => x,
        // NaN stays NaN.
        Activation::Relu => {
            if x < T::zero() {
                T::zero()
            } else {
                x
            }
        }
        Activation::Gelu => {
            half * x * (T::one() + (x * T::of(std::f64::consts::FRAC_1_SQRT_2)).erf())
        }
        Activation::GeluTanh => {
            let inner = T::of(GELU_SCALE) * x * (x * x).mul_add(T::of(GELU_CUBE), T::one());
            half * x * (T::one() + inner.tanh())
        }
        Activation::QuickGelu => x * (x * T::of(1.702)).sigmoid(),
        Activation::Silu => x * x.sigmoid(),
        Activation::Tanh => x.tanh(),
        Activation::Sigmoid => x.sigmoid(),
        Activation::Exp => x.exp(),
        // ln(1 + e^x) = max(x, 0) + ln(1 + e^{-|x|})
        Activation::Softplus => x.larger(T::zero()) + (-x.abs()).exp().ln_1p(),
    }
}

/// `√(2/π)`.
const GELU_SCALE: f64 = std::f64::consts::FRAC_2_SQRT_PI * std::f64::consts::FRAC_1_SQRT_2;
const GELU_CUBE: f64 = 0.044715;

#[inline(always)]
fn tangent<T: Real>(activation: Activation, x: T) -> T {
    let (one, half) = (T::one(), T::of(0.5));
    match activation {
        Activation::Identity => one,
        Activation::Relu => {
            if x > T::zero() {
                one
            } else {
                T::zero()
            }
        }
        // Φ(x) + x φ(x)
        Activation::Gelu => {
            let cumulative = half * (one + (x * T::of(std::f64::consts::FRAC_1_SQRT_2)).erf());
            let density = T::of(0.5 * GELU_SCALE) * (-half * x * x).exp();
            x.mul_add(density, cumulative)
        }
        Activation::GeluTanh => {
            let square = x * x;
            let inner = T::of(GELU_SCALE) * x * square.mul_add(T::of(GELU_CUBE), one);
            let t = inner.tanh();
            let slope = T::of(GELU_SCALE) * square.mul_add(T::of(3.0 * GELU_CUBE), one);
            half * (one + t) + half * x * (one - t * t) * slope
        }
        Activation::QuickGelu => {
            let s = (x * T::of(1.702)).sigmoid();
            s + T::of(1.702) * x * s * (one - s)
        }
        Activation::Silu => {
            let s = x.sigmoid();
            s + x * s * (one - s)
        }
        Activation::Tanh => {
            let t = x.tanh();
            one - t * t
        }
        Activation::Sigmoid => {
            let s = x.sigmoid();
            s * (one - s)
        }
        Activation::Exp => x.exp(),
        Activation::Softplus => x.sigmoid(),
    }
}

#[inline(always)]
fn secant<T: Real>(activation: Activation, x: T) -> T {
    let near_zero = x.abs() < T::of(1e-6);
    let safe = if near_zero { T::one() } else { x };
    let slope = value(activation, safe) / safe;
    if near_zero {
        tangent(activation, T::zero())
    } else {
        slope
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{difference, gradient_error};
    use crate::test_data::{arange, compare};
    use crate::{DType, Device};

    #[test]
    fn everything_equals_the_composition() {
        for activation in Activation::ALL {
            for dims in [vec![], vec![0], vec![1], vec![5, 7], vec![3, 5000]] {
                for scale in [1.0, 8.0] {
                    let x = |dtype| (arange(&dims, 1.0, dtype) * scale).unwrap();
                    compare(3e-6, |dtype| {
                        let fused = activate(&x(dtype), activation).unwrap();
                        (fused, naive::activate(&x(dtype), activation).unwrap())
                    });
                    compare(3e-6, |dtype| {
                        let fused = activation_tangent(&x(dtype), activation).unwrap();
                        (
                            fused,
                            naive::activation_tangent(&x(dtype), activation).unwrap(),
                        )
                    });
                    if activation.passes_origin() {
                        compare(3e-6, |dtype| {
                            let fused = activation_secant(&x(dtype), activation).unwrap();
                            (
                                fused,
                                naive::activation_secant(&x(dtype), activation).unwrap(),
                            )
                        });
                    }
                }
            }
            compare(3e-6, |dtype| {
                let x = arange(&[4, 6, 5], 1.0, dtype).transpose(0, 2).unwrap();
                let fused = activate(&x, activation).unwrap();
                (fused, naive::activate(&x, activation).unwrap())
            });
        }
    }

    #[test]
    fn gradients() {
        let x = arange(&[4, 5], 1.0, DType::F64);
        for activation in Activation::ALL {
            if activation == Activation::Identity {
                continue;
            }
            let f = |a: &[Tensor]| activate(&a[0].t()?, activation);
            let error = gradient_error(f, std::slice::from_ref(&x)).unwrap();
            assert!(error < 1e-8, "{activation:?}: {error}");
        }
    }

    #[test]
    fn the_secant_near_zero_is_the_slope() {
        let x = Tensor::new(&[0f64, 1e-9, -1e-12], &Device::Cpu).unwrap();
        for (activation, slope) in [
            (Activation::Gelu, 0.5),
            (Activation::Silu, 0.5),
            (Activation::Tanh, 1.0),
            (Activation::Relu, 0.0),
        ] {
            let s = activation_secant(&x, activation).unwrap();
            assert_eq!(s.to_vec1::<f64>().unwrap(), [slope; 3]);
        }
        assert!(activation_secant(&x, Activation::Exp).is_err());
    }

    #[test]
    fn extremes() {
        let x = Tensor::new(&[-1e30f32, -200.0, 200.0, 1e30], &Device::Cpu).unwrap();
        for activation in [
            Activation::Gelu,
            Activation::GeluTanh,
            Activation::Silu,
            Activation::QuickGelu,
        ] {
            let y = activate(&x, activation).unwrap();
            let relu = x.relu().unwrap();
            assert!(difference(&y, &relu).unwrap() == 0.0, "{activation:?} {y}");
        }
        let nan = Tensor::new(&[f32::NAN], &Device::Cpu).unwrap();
        for activation in Activation::ALL {
            let y = activate(&nan, activation)
                .unwrap()
                .to_vec1::<f32>()
                .unwrap();
            assert!(
                y[0].is_nan() || activation == Activation::Softplus,
                "{activation:?}"
            );
        }
    }
}
