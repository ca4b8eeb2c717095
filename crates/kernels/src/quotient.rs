//! Weighted sums divided by the sums of their weights, which lie beside them as a last column.
//!
//! ```text
//! y_i = s_i / t,   t = s_w + ε, or 1 where that is 0
//! ∂s_i = ∂y_i / t,   ∂s_w = −Σ_i ∂y_i y_i / t
//! ```

use crate::backward::Apply;
use crate::host::{self, Host, Shared, by_dtype, fused};
use crate::simd::{self, Real};
use crate::{Error, Result, Tensor, naive};
use candle_core::{CpuStorage, CustomOp1, Layout, Shape, WithDType};

type Candle<T> = candle_core::Result<T>;

/// All but the last column of `sums` `[.., width + 1]`, divided by the last one and `epsilon`:
/// `[.., width]`. Where the divisor is 0, by 1.
///
/// # Errors
/// When there is no column to divide by.
///
/// ```
/// use lapidary_kernels::{Device, Tensor, quotients};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let sums = Tensor::new(&[[2f32, 6.0, 4.0], [0.0, 0.0, 0.0]], &Device::Cpu)?;
/// let y = quotients(&sums, 0.0)?.to_vec2::<f32>()?;
/// assert_eq!(y, [[0.5, 1.5], [0.0, 0.0]]);
/// # Ok(())
/// # }
/// ```
pub fn quotients(sums: &Tensor, epsilon: f64) -> Result<Tensor> {
    let width = sums.dims().last().copied().unwrap_or(0);
    if width == 0 {
        let expected = "[.., width + 1]";
        return Err(Error::argument("quotients", "sums", sums.dims(), expected));
    }
    match fused(&[sums]) {
        true => Ok(sums.apply1(Quotients { epsilon })?),
        false => naive::quotients(sums, epsilon),
    }
}

struct Quotients {
    epsilon: f64,
}

/// Rows of one task.
const BLOCK: usize = 256;

impl Quotients {
    fn total<T: Real>(&self, last: T) -> T {
        let total = last + T::of(self.epsilon);
        if total == T::zero() { T::one() } else { total }
    }

    /// `body` on blocks of rows of `from` `[rows, width + 1]` and of what is made of them, whose rows are
    /// `made` long.
    fn in_blocks<T: Real>(
        from: &[T],
        width: usize,
        made: usize,
        body: impl Fn(usize, &[T], &mut [T]) + Sync,
    ) -> Vec<T> {
        let rows = from.len() / (width + 1);
        let mut result = host::unwritten::<T>(rows * made);
        let shared = Shared::new(&mut result);
        host::share(rows.div_ceil(BLOCK), BLOCK * (width / 4 + 1), |blocks| {
            for block in blocks {
                let here = block * BLOCK..rows.min((block + 1) * BLOCK);
                // SAFETY: blocks are disjoint.
                let result = unsafe { shared.part(here.start * made, here.len() * made) };
                let from = &from[here.start * (width + 1)..here.end * (width + 1)];
                simd::vectorised(
                    #[inline(always)]
                    || body(here.start, from, result),
                );
            }
        });
        result
    }

    fn forward<T: Real>(&self, sums: &[T], width: usize) -> Vec<T> {
        Self::in_blocks(
            sums,
            width,
            width,
            #[inline(always)]
            |_, sums, y| {
                for (sums, y) in sums
                    .chunks_exact(width + 1)
                    .zip(y.chunks_exact_mut(width.max(1)))
                {
                    let reciprocal = T::one() / self.total(sums[width]);
                    for (y, sum) in y.iter_mut().zip(sums) {
                        *y = *sum * reciprocal;
                    }
                }
            },
        )
    }

    fn backward<T: Real>(&self, sums: &[T], gradient: &[T], width: usize) -> Vec<T> {
        Self::in_blocks(
            sums,
            width,
            width + 1,
            #[inline(always)]
            |start, sums, slopes| {
                let gradient = gradient[start * width..].chunks_exact(width.max(1));
                let rows = sums
                    .chunks_exact(width + 1)
                    .zip(slopes.chunks_exact_mut(width + 1));
                for ((sums, slopes), gradient) in rows.zip(gradient) {
                    let reciprocal = T::one() / self.total(sums[width]);
                    for (slope, g) in slopes.iter_mut().zip(gradient) {
                        *slope = *g * reciprocal;
                    }
                    slopes[width] = -simd::dot(&slopes[..width], &sums[..width]) * reciprocal;
                }
            },
        )
    }
}

impl CustomOp1 for Quotients {
    fn name(&self) -> &'static str {
        "quotients"
    }

    fn cpu_fwd(&self, sums: &CpuStorage, layout: &Layout) -> Candle<(CpuStorage, Shape)> {
        by_dtype!(host::dtype(sums), T => {
            let mut dims = layout.dims().to_vec();
            let width = dims.last_mut().map_or(0, |last| {
                *last -= 1;
                *last
            });
            let y = self.forward(&host::ordered::<T>(sums, layout)?, width);
            Ok((T::to_cpu_storage_owned(y), Shape::from(dims)))
        })
    }

    fn bwd(&self, sums: &Tensor, _: &Tensor, gradient: &Tensor) -> Candle<Option<Tensor>> {
        let (host, of_result) = (Host::new(sums), Host::new(gradient));
        let width = gradient.dims().last().copied().unwrap_or(0);
        by_dtype!(sums.dtype(), T => {
            let slopes = self.backward(&host.ordered::<T>()?, &of_result.ordered::<T>()?, width);
            Ok(Some(host::tensor(slopes, sums.dims())?))
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
    fn equal_a_division() {
        for dims in [[2, 3, 5], [1, 700, 17], [4, 3, 1]] {
            compare(1e-5, |dtype| {
                let sums = arange(&dims, 1.0, dtype);
                (
                    quotients(&sums, 0.25).unwrap(),
                    naive::quotients(&sums, 0.25).unwrap(),
                )
            });
        }
    }

    #[test]
    fn gradients_equal_finite_differences() {
        let sums = (arange(&[2, 5, 4], 1.0, DType::F64).abs().unwrap() + 0.5).unwrap();
        assert!(gradient_error(|x| quotients(&x[0], 1e-3), &[sums]).unwrap() < 1e-7);
    }

    #[test]
    fn what_has_no_weight_is_divided_by_one() {
        let sums =
            Tensor::new(&[[3f32, -1.0, 0.5], [0.0, 0.0, -0.5]], &crate::Device::Cpu).unwrap();
        let y = quotients(&sums, 0.5).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(y, [[3.0, -1.0], [0.0, 0.0]]);
    }
}
