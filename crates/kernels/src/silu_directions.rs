//! Rows of positive features of length one (Afzal et al., LION, arXiv 2502.16249).
//!
//! ```text
//! u = x σ(x) + ½,   y = u / ‖u‖₂,   ∂u = (∂y − (∂y · y) y) / ‖u‖₂,   ∂x = silu′(x) ∂u
//! ```
//!
//! `u ≥ 0.22`, so that no row is without a direction. Nothing is saved but `x`.

use crate::backward::Apply;
use crate::host::{self, Host, Rows, by_dtype, fused, rows_and_width};
use crate::simd::{self, Real};
use crate::{Result, Tensor, naive};
use candle_core::{CpuStorage, CustomOp1, Layout, Shape};

type Candle<T> = candle_core::Result<T>;

/// `(silu(x) + ½) / ‖silu(x) + ½‖₂` of each row of `x` `[.., width]`.
///
/// # Errors
/// Those of the tensor engine.
///
/// ```
/// use lapidary_kernels::{Device, Tensor, silu_directions};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let x = Tensor::new(&[[0f64, 0.0, 0.0, 0.0]], &Device::Cpu)?;
/// assert_eq!(silu_directions(&x)?.to_vec2::<f64>()?, [[0.5; 4]]);
/// # Ok(())
/// # }
/// ```
pub fn silu_directions(x: &Tensor) -> Result<Tensor> {
    match fused(&[x]) && x.rank() > 0 {
        true => Ok(x.apply1(Directions)?),
        false => naive::silu_directions(x),
    }
}

struct Directions;

/// Writes `u` of a row, and gives `1 / ‖u‖`.
#[inline(always)]
fn shifted<T: Real>(x: &[T], u: &mut [T]) -> T {
    let half = T::of(0.5);
    for (u, &x) in u.iter_mut().zip(x) {
        *u = x.mul_add(x.sigmoid(), half);
    }
    T::one() / simd::dot(u, u).sqrt()
}

impl Directions {
    fn forward<T: Real>(x: &Rows<T>, rows: usize, width: usize) -> Vec<T> {
        let mut y = host::unwritten::<T>(rows * width);
        host::for_rows(
            &mut y,
            width,
            4,
            #[inline(always)]
            |row, y| {
                let scale = shifted(x.row(row), y);
                for y in y {
                    *y *= scale;
                }
            },
        );
        y
    }

    fn backward<T: Real>(x: &Rows<T>, gradient: &Rows<T>, rows: usize, width: usize) -> Vec<T> {
        let (one, half) = (T::one(), T::of(0.5));
        let mut slopes = host::unwritten::<T>(rows * width);
        host::for_rows(
            &mut slopes,
            width,
            8,
            #[inline(always)]
            |row, slopes| {
                let (x, gradient) = (x.row(row), gradient.row(row));
                let scale = shifted(x, slopes);
                let along = simd::dot(gradient, slopes) * scale * scale;
                for ((slope, &g), &x) in slopes.iter_mut().zip(gradient).zip(x) {
                    let gate = x.sigmoid();
                    // silu′ = σ + x σ (1 − σ) = σ + (u − ½)(1 − σ)
                    let steepness = gate + (*slope - half) * (one - gate);
                    *slope = steepness * scale * (g - along * *slope);
                }
            },
        );
        slopes
    }
}

impl CustomOp1 for Directions {
    fn name(&self) -> &'static str {
        "silu directions"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Candle<(CpuStorage, Shape)> {
        let (rows, width) = rows_and_width(layout.dims());
        by_dtype!(host::dtype(x), T => {
            let y = Self::forward(&Rows::<T>::new(x, layout)?, rows, width);
            let storage = <T as candle_core::WithDType>::to_cpu_storage_owned(y);
            Ok((storage, layout.shape().clone()))
        })
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, gradient: &Tensor) -> Candle<Option<Tensor>> {
        let (rows, width) = rows_and_width(x.dims());
        let (x_host, gradient) = (Host::new(x), Host::new(gradient));
        by_dtype!(x.dtype(), T => {
            let of_x = Rows::<T>::new(x_host.storage()?, x_host.layout)?;
            let gradient = Rows::<T>::new(gradient.storage()?, gradient.layout)?;
            Ok(Some(host::tensor(Self::backward(&of_x, &gradient, rows, width), x.dims())?))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;
    use crate::check::gradient_error;
    use crate::test_data::{arange, compare};

    #[test]
    fn equal_the_composition() {
        compare(1e-6, |dtype| {
            let x = (arange(&[2, 7, 3, 21], 1.0, dtype) * 3.0).unwrap();
            let x = x.transpose(1, 2).unwrap();
            (
                silu_directions(&x).unwrap(),
                naive::silu_directions(&x).unwrap(),
            )
        });
    }

    #[test]
    fn gradients_equal_finite_differences() {
        let x = arange(&[3, 2, 5], 1.0, DType::F64);
        let views = |x: &[Tensor]| silu_directions(&x[0].transpose(0, 1)?);
        assert!(gradient_error(views, &[x]).unwrap() < 1e-8);
    }
}
