//! Running sums and products.
//!
//! `y_t = Σ_{s ≤ t} x_s` has `∂x_t = Σ_{s ≥ t} ∂y_s`. `y_t = Π_{s ≤ t} x_s` has
//! `∂x_t = y_{t-1} r_t` with `r_t = ∂y_t + x_{t+1} r_{t+1}`, which needs no division and so holds
//! at zeros.

use super::Sequences;
use crate::backward::Apply;
use crate::host::{self, Host, Shared, by_dtype, fused};
use crate::simd::Real;
use crate::{Error, Result, Tensor, naive};
use candle_core::{CpuStorage, CustomOp1, Layout, Shape};

type Candle<T> = candle_core::Result<T>;

/// Running sum along `dim`: `y_t = Σ_{s ≤ t} x_s`.
///
/// # Errors
/// When `x` has no dimension `dim`.
pub fn cumulative_sum(x: &Tensor, dim: usize) -> Result<Tensor> {
    check("cumulative_sum", x, dim)?;
    if !fused(&[x]) {
        return naive::cumulative_sum(x, dim);
    }
    let product = false;
    Ok(x.apply1(Cumulative { dim, product })?)
}

/// Running product along `dim`: `y_t = Π_{s ≤ t} x_s`.
///
/// # Errors
/// When `x` has no dimension `dim`.
pub fn cumulative_product(x: &Tensor, dim: usize) -> Result<Tensor> {
    check("cumulative_product", x, dim)?;
    if !fused(&[x]) {
        return naive::cumulative_product(x, dim);
    }
    let product = true;
    Ok(x.apply1(Cumulative { dim, product })?)
}

fn check(kernel: &'static str, x: &Tensor, dim: usize) -> Result<()> {
    if dim < x.rank() {
        return Ok(());
    }
    let expected = format!("below the {} dimensions of x", x.rank());
    Err(Error::argument(kernel, "dim", dim, expected))
}

struct Cumulative {
    dim: usize,
    product: bool,
}

impl Cumulative {
    fn forward<T: Real>(&self, storage: &CpuStorage, layout: &Layout) -> Candle<CpuStorage> {
        let sequences = Sequences::new(layout.dims(), self.dim);
        let mut y = host::ordered::<T>(storage, layout)?.into_owned();
        let shared = Shared::new(&mut y);
        sequences.share(|outer, columns| {
            for t in 1..sequences.length {
                let width = columns.len();
                // SAFETY: different times never overlap, and columns belong to one task.
                let (before, now) = unsafe {
                    (
                        shared.part(sequences.at(outer, t - 1, &columns), width),
                        shared.part(sequences.at(outer, t, &columns), width),
                    )
                };
                if self.product {
                    for (now, &before) in now.iter_mut().zip(&*before) {
                        *now *= before;
                    }
                } else {
                    for (now, &before) in now.iter_mut().zip(&*before) {
                        *now += before;
                    }
                }
            }
        });
        Ok(T::to_cpu_storage_owned(y))
    }

    fn backward<T: Real>(&self, x: &Tensor, y: &Tensor, gradient: &Tensor) -> Candle<Tensor> {
        let sequences = Sequences::new(x.dims(), self.dim);
        let (x_host, y_host) = (Host::new(x), Host::new(y));
        let (x_values, y_values) = (x_host.ordered::<T>()?, y_host.ordered::<T>()?);
        let mut dx = Host::new(gradient).ordered::<T>()?.into_owned();
        let shared = Shared::new(&mut dx);
        sequences.share(|outer, columns| {
            let width = columns.len();
            let at = |t| sequences.at(outer, t, &columns);
            for t in (0..sequences.length.saturating_sub(1)).rev() {
                // SAFETY: as in the forward pass.
                let (now, after) =
                    unsafe { (shared.part(at(t), width), shared.part(at(t + 1), width)) };
                if self.product {
                    let x = &x_values[at(t + 1)..][..width];
                    for ((now, &after), &x) in now.iter_mut().zip(&*after).zip(x) {
                        *now += x * after;
                    }
                } else {
                    for (now, &after) in now.iter_mut().zip(&*after) {
                        *now += after;
                    }
                }
            }
            if self.product {
                for t in 1..sequences.length {
                    // SAFETY: as in the forward pass.
                    let now = unsafe { shared.part(at(t), width) };
                    for (now, &y) in now.iter_mut().zip(&y_values[at(t - 1)..][..width]) {
                        *now *= y;
                    }
                }
            }
        });
        host::tensor(dx, x.dims())
    }
}

impl CustomOp1 for Cumulative {
    fn name(&self) -> &'static str {
        "cumulative"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Candle<(CpuStorage, Shape)> {
        let y = by_dtype!(host::dtype(x), T => self.forward::<T>(x, layout))?;
        Ok((y, layout.shape().clone()))
    }

    fn bwd(&self, x: &Tensor, y: &Tensor, gradient: &Tensor) -> Candle<Option<Tensor>> {
        by_dtype!(x.dtype(), T => self.backward::<T>(x, y, gradient)).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::gradient_error;
    use crate::test_data::{arange, compare};
    use crate::{DType, Device};

    #[test]
    fn equal_the_compositions() {
        for dims in [vec![1], vec![9], vec![3, 4], vec![2, 7, 300], vec![5, 1, 2]] {
            for dim in 0..dims.len() {
                compare(1e-5, |dtype| {
                    let x = arange(&dims, 1.0, dtype);
                    let fused = cumulative_sum(&x, dim).unwrap();
                    (fused, naive::cumulative_sum(&x, dim).unwrap())
                });
                compare(1e-5, |dtype| {
                    let x = arange(&dims, 1.0, dtype);
                    let fused = cumulative_product(&x, dim).unwrap();
                    (fused, naive::cumulative_product(&x, dim).unwrap())
                });
            }
        }
        compare(1e-5, |dtype| {
            let x = arange(&[4, 6, 3], 1.0, dtype).transpose(0, 1).unwrap();
            let fused = cumulative_sum(&x, 1).unwrap();
            (
                fused,
                naive::cumulative_sum(&x.contiguous().unwrap(), 1).unwrap(),
            )
        });
        let empty = Tensor::zeros((2, 0, 3), DType::F32, &Device::Cpu).unwrap();
        assert_eq!(cumulative_sum(&empty, 1).unwrap().dims(), [2, 0, 3]);
        assert!(cumulative_sum(&empty, 3).is_err());
    }

    #[test]
    fn gradients_also_at_zeros() {
        let x = arange(&[2, 5, 3], 1.0, DType::F64);
        for dim in 0..3 {
            let f = |a: &[Tensor]| cumulative_sum(&a[0], dim);
            assert!(gradient_error(f, std::slice::from_ref(&x)).unwrap() < 1e-8);
            let f = |a: &[Tensor]| cumulative_product(&a[0], dim);
            assert!(gradient_error(f, std::slice::from_ref(&x)).unwrap() < 1e-8);
        }
        let zeros = Tensor::new(&[2.0f64, 0.0, 3.0, 0.0, 1.5], &Device::Cpu).unwrap();
        let f = |a: &[Tensor]| cumulative_product(&a[0], 0);
        assert!(gradient_error(f, &[zeros]).unwrap() < 1e-8);
    }
}
