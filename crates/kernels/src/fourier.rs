//! Discrete Fourier transforms of real signals of any length, by `realfft`.
//!
//! Forward `X_f = Σ_t x_t e^{-2πi f t / n}` for `f ≤ n / 2`. Its transpose, which the backward
//! pass needs, is `∂x_t = Σ_f Re(∂X_f e^{2πi f t / n})`: an unnormalised inverse transform in
//! which frequencies that stand for two (all but `0` and `n / 2`) count half.

mod convolution;

pub use convolution::{causal_depthwise_convolution, fft_convolution};

use crate::backward::Apply;
use crate::host::{self, Host, Shared, by_dtype, fused, rows_and_width};
use crate::simd::Real;
use crate::{Error, Result, Tensor, naive};
use candle_core::{CpuStorage, CustomOp1, Layout, Shape, WithDType};
use realfft::num_complex::Complex;
use realfft::{ComplexToReal, RealFftPlanner, RealToComplex};
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

type Candle<T> = candle_core::Result<T>;

/// Numbers that transforms are planned for. Plans are made once per length and kept.
trait Planned: Real + realfft::FftNum {
    fn forward_plan(n: usize) -> Arc<dyn RealToComplex<Self>>;
    fn inverse_plan(n: usize) -> Arc<dyn ComplexToReal<Self>>;
}

macro_rules! planned {
    ($T:ty, $planner:ident) => {
        static $planner: LazyLock<Mutex<RealFftPlanner<$T>>> =
            LazyLock::new(|| Mutex::new(RealFftPlanner::new()));

        impl Planned for $T {
            fn forward_plan(n: usize) -> Arc<dyn RealToComplex<Self>> {
                // A planner is a cache; one that a panic left behind is still valid.
                let mut planner = $planner.lock().unwrap_or_else(PoisonError::into_inner);
                planner.plan_fft_forward(n)
            }
            fn inverse_plan(n: usize) -> Arc<dyn ComplexToReal<Self>> {
                let mut planner = $planner.lock().unwrap_or_else(PoisonError::into_inner);
                planner.plan_fft_inverse(n)
            }
        }
    };
}
planned!(f32, PLANNER_F32);
planned!(f64, PLANNER_F64);

/// Discrete Fourier transform of the real last dimension:
/// `[.., n] -> [.., n / 2 + 1, 2]`, the last pair being real and imaginary part. Unnormalised.
///
/// # Errors
/// When `x` has no dimension, or an empty last one.
pub fn real_fft(x: &Tensor) -> Result<Tensor> {
    match x.dims().last() {
        None | Some(0) => {
            return Err(Error::argument(
                "real_fft",
                "x",
                x.dims(),
                "[.., n] with n > 0",
            ));
        }
        Some(_) if !fused(&[x]) => return naive::real_fft(x),
        Some(_) => {}
    }
    Ok(x.apply1(Forward)?)
}

/// Inverse of [`real_fft`] for a signal of length `n`, normalised by `1/n`:
/// `[.., n / 2 + 1, 2] -> [.., n]`.
///
/// # Errors
/// When `n` is zero or `x` has another number of frequencies.
pub fn inverse_real_fft(x: &Tensor, n: usize) -> Result<Tensor> {
    let half = n / 2 + 1;
    if n == 0 {
        return Err(Error::argument("inverse_real_fft", "n", n, "above 0"));
    }
    if x.rank() < 2 || x.dims()[x.rank() - 2..] != [half, 2] {
        let expected = format!("[.., {half}, 2]");
        return Err(Error::argument("inverse_real_fft", "x", x.dims(), expected));
    }
    if !fused(&[x]) {
        return naive::inverse_real_fft(x, n);
    }
    Ok(x.apply1(Inverse { n })?)
}

/// Whether frequency `f` stands for itself and its mirror image.
fn doubled(f: usize, n: usize) -> bool {
    f != 0 && 2 * f != n
}

/// Transforms rows of `n` numbers into rows of `n / 2 + 1` pairs, then scales each frequency.
fn transform<T: Planned>(x: &[T], n: usize, scale: impl Fn(usize) -> T + Sync) -> Candle<Vec<T>> {
    let half = n / 2 + 1;
    let rows = x.len() / n;
    let plan = T::forward_plan(n);
    let mut y = host::unwritten::<T>(rows * half * 2);
    let shared = Shared::new(&mut y);
    try_rows(rows, n, |range| {
        let (mut input, mut output) = (plan.make_input_vec(), plan.make_output_vec());
        let mut scratch = plan.make_scratch_vec();
        for row in range {
            input.copy_from_slice(&x[row * n..][..n]);
            plan.process_with_scratch(&mut input, &mut output, &mut scratch)
                .map_err(candle_core::Error::wrap)?;
            // SAFETY: each row is handled once.
            let y = unsafe { shared.part(row * half * 2, half * 2) };
            for (f, (pair, value)) in y.chunks_exact_mut(2).zip(&output).enumerate() {
                let scale = scale(f);
                pair[0] = value.re * scale;
                pair[1] = value.im * scale;
            }
        }
        Ok(())
    })?;
    Ok(y)
}

/// Transforms rows of `n / 2 + 1` pairs, each frequency scaled, into rows of `n` numbers.
fn transform_back<T: Planned>(
    x: &[T],
    n: usize,
    scale: impl Fn(usize) -> T + Sync,
) -> Candle<Vec<T>> {
    let half = n / 2 + 1;
    let rows = x.len() / (2 * half);
    let plan = T::inverse_plan(n);
    let mut y = host::unwritten::<T>(rows * n);
    let shared = Shared::new(&mut y);
    try_rows(rows, n, |range| {
        let mut input = plan.make_input_vec();
        let mut scratch = plan.make_scratch_vec();
        for row in range {
            let pairs = x[row * half * 2..][..half * 2].chunks_exact(2);
            for (f, (value, pair)) in input.iter_mut().zip(pairs).enumerate() {
                let scale = scale(f);
                // What has no mirror image has no imaginary part to give.
                let imaginary = if doubled(f, n) {
                    pair[1] * scale
                } else {
                    T::default()
                };
                *value = Complex::new(pair[0] * scale, imaginary);
            }
            // SAFETY: each row is handled once.
            let y = unsafe { shared.part(row * n, n) };
            plan.process_with_scratch(&mut input, y, &mut scratch)
                .map_err(candle_core::Error::wrap)?;
        }
        Ok(())
    })?;
    Ok(y)
}

/// [`host::share`] for transforms of length `n`, whose first error is kept.
fn try_rows(
    rows: usize,
    n: usize,
    body: impl Fn(std::ops::Range<usize>) -> Candle<()> + Sync,
) -> Candle<()> {
    let failure = Mutex::new(None);
    host::share(rows, n * (1 + n.ilog2() as usize), |range| {
        if let Err(error) = body(range) {
            *failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
        }
    });
    match failure.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => Err(error),
        None => Ok(()),
    }
}

struct Forward;

impl CustomOp1 for Forward {
    fn name(&self) -> &'static str {
        "real_fft"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Candle<(CpuStorage, Shape)> {
        let mut dims = layout.dims().to_vec();
        let n = dims.pop().unwrap_or(1);
        dims.extend([n / 2 + 1, 2]);
        let y = by_dtype!(host::dtype(x), T => {
            let y = transform::<T>(&host::ordered(x, layout)?, n, |_| 1.0)?;
            Ok(T::to_cpu_storage_owned(y))
        })?;
        Ok((y, Shape::from(dims)))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, gradient: &Tensor) -> Candle<Option<Tensor>> {
        let (_, n) = rows_and_width(x.dims());
        let g = Host::new(gradient);
        by_dtype!(x.dtype(), T => {
            let half = |f| if doubled(f, n) { 0.5 } else { 1.0 };
            let dx = transform_back::<T>(&g.ordered()?, n, half)?;
            host::tensor(dx, x.dims()).map(Some)
        })
    }
}

struct Inverse {
    n: usize,
}

impl CustomOp1 for Inverse {
    fn name(&self) -> &'static str {
        "inverse_real_fft"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Candle<(CpuStorage, Shape)> {
        let n = self.n;
        let mut dims = layout.dims()[..layout.dims().len() - 2].to_vec();
        dims.push(n);
        let y = by_dtype!(host::dtype(x), T => {
            let y = transform_back::<T>(&host::ordered(x, layout)?, n, |_| 1.0 / n as T)?;
            Ok(T::to_cpu_storage_owned(y))
        })?;
        Ok((y, Shape::from(dims)))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, gradient: &Tensor) -> Candle<Option<Tensor>> {
        let n = self.n;
        let g = Host::new(gradient);
        by_dtype!(x.dtype(), T => {
            let weight = |f| if doubled(f, n) { 2.0 / n as T } else { 1.0 / n as T };
            let mut dx = transform::<T>(&g.ordered()?, n, weight)?;
            // The imaginary parts that the inverse ignores get no gradient.
            for row in dx.chunks_exact_mut((n / 2 + 1) * 2) {
                for (f, pair) in row.chunks_exact_mut(2).enumerate() {
                    if !doubled(f, n) {
                        pair[1] = 0.0;
                    }
                }
            }
            host::tensor(dx, x.dims()).map(Some)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;
    use crate::check::{difference, gradient_error};
    use crate::test_data::{arange, compare};
    use proptest::prelude::*;

    #[test]
    fn equal_the_compositions() {
        for n in [1, 2, 3, 4, 5, 8, 13, 30, 64, 97] {
            compare(1e-5, |dtype| {
                let x = arange(&[2, n, 3], 1.0, dtype).transpose(1, 2).unwrap();
                (real_fft(&x).unwrap(), naive::real_fft(&x).unwrap())
            });
            compare(1e-5, |dtype| {
                let x = arange(&[3, n / 2 + 1, 2], 1.0, dtype);
                let fused = inverse_real_fft(&x, n).unwrap();
                (fused, naive::inverse_real_fft(&x, n).unwrap())
            });
        }
    }

    #[test]
    fn gradients() {
        for n in [1, 2, 5, 8] {
            let x = arange(&[2, n], 1.0, DType::F64);
            let f = |a: &[Tensor]| real_fft(&a[0]);
            assert!(gradient_error(f, &[x]).unwrap() < 1e-8);
            let x = arange(&[2, n / 2 + 1, 2], 1.0, DType::F64);
            let f = |a: &[Tensor]| inverse_real_fft(&a[0], n);
            assert!(gradient_error(f, &[x]).unwrap() < 1e-8);
        }
    }

    #[test]
    fn wrong_shapes_are_named() {
        let x = arange(&[2, 3, 2], 1.0, DType::F32);
        assert!(inverse_real_fft(&x, 6).is_err());
        assert!(inverse_real_fft(&x, 0).is_err());
        assert!(real_fft(&arange(&[2, 0], 1.0, DType::F32)).is_err());
        let none = arange(&[0, 4], 1.0, DType::F32);
        assert_eq!(real_fft(&none).unwrap().dims(), [0, 3, 2]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn there_and_back(rows in 1usize..5, n in 1usize..200) {
            let x = arange(&[rows, n], 1.0, DType::F64);
            let back = inverse_real_fft(&real_fft(&x).unwrap(), n).unwrap();
            prop_assert!(difference(&x, &back).unwrap() < 1e-12);
        }
    }
}
