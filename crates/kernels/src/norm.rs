//! Layer norm and root-mean-square norm over the last dimension.
//!
//! With `x̂ = (x - mean) / √(variance + ε)` (without the mean for the RMS norm) the result is
//! `y = γ x̂ + β`. Backward, with `h = γ ∂y` and `s` the reciprocal root:
//! `∂x = s (h - mean(h) - x̂ mean(h x̂))` (without `mean(h)` for the RMS norm),
//! `∂γ = Σ_rows ∂y x̂`, `∂β = Σ_rows ∂y`. The statistics are computed again, not saved.

use crate::backward::Apply;
use crate::host::{self, Host, Rows, Shared, by_dtype, fused, rows_and_width};
use crate::simd::{self, Real};
use crate::{Error, Result, Tensor, naive};
use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Shape};

type Candle<T> = candle_core::Result<T>;

/// `γ (x - mean) / √(variance + ε) + β` over the last dimension, biased variance.
///
/// # Errors
/// When `weight` or `bias` is not a vector as long as the last dimension of `x`.
pub fn layer_norm(
    x: &Tensor,
    weight: Option<&Tensor>,
    bias: Option<&Tensor>,
    epsilon: f64,
) -> Result<Tensor> {
    let norm = Norm {
        centred: true,
        epsilon,
    };
    norm.apply("layer_norm", x, weight, bias)
}

/// `γ x / √(mean(x²) + ε)` over the last dimension (Zhang & Sennrich, arXiv 1910.07467).
///
/// # Errors
/// When `weight` is not a vector as long as the last dimension of `x`.
pub fn rms_norm(x: &Tensor, weight: Option<&Tensor>, epsilon: f64) -> Result<Tensor> {
    let norm = Norm {
        centred: false,
        epsilon,
    };
    norm.apply("rms_norm", x, weight, None)
}

struct Norm {
    centred: bool,
    epsilon: f64,
}

type Argument<'a> = (&'a CpuStorage, &'a Layout);

impl Norm {
    fn apply(
        self,
        kernel: &'static str,
        x: &Tensor,
        weight: Option<&Tensor>,
        bias: Option<&Tensor>,
    ) -> Result<Tensor> {
        let Some(&width) = x.dims().last() else {
            return Err(Error::argument(kernel, "x", x.dims(), "[.., width]"));
        };
        let mut all = vec![x];
        for (name, vector) in [("weight", weight), ("bias", bias)] {
            if let Some(vector) = vector {
                if vector.dims() != [width] {
                    let expected = format!("[{width}]");
                    return Err(Error::argument(kernel, name, vector.dims(), expected));
                }
                all.push(vector);
            }
        }
        if !fused(&all) {
            return match self.centred {
                true => naive::layer_norm(x, weight, bias, self.epsilon),
                false => naive::rms_norm(x, weight, self.epsilon),
            };
        }
        Ok(match (weight, bias) {
            (None, None) => x.apply1(self)?,
            (Some(weight), None) => x.apply2(weight, self)?,
            (Some(weight), Some(bias)) => x.apply3(weight, bias, self)?,
            (None, Some(bias)) => x.apply3(&bias.ones_like()?, bias, self)?,
        })
    }

    /// Centre and reciprocal root of a row.
    #[inline(always)]
    fn statistics<T: Real>(&self, x: &[T]) -> (T, T) {
        let n = T::of(x.len() as f64);
        let centre = if self.centred {
            simd::sum(x) / n
        } else {
            T::zero()
        };
        let variance = simd::squares_about(x, centre) / n;
        (centre, T::one() / (variance + T::of(self.epsilon)).sqrt())
    }

    fn forward<T: Real>(
        &self,
        x: Argument,
        weight: Option<Argument>,
        bias: Option<Argument>,
    ) -> Candle<(CpuStorage, Shape)> {
        let (rows, width) = rows_and_width(x.1.dims());
        let x_rows = Rows::<T>::new(x.0, x.1)?;
        let vector = |v: Option<Argument>, fill: T| match v {
            Some((storage, layout)) => Ok(host::ordered::<T>(storage, layout)?.into_owned()),
            None => Candle::Ok(vec![fill; width]),
        };
        let (weight, bias) = (vector(weight, T::one())?, vector(bias, T::zero())?);
        let mut y = host::unwritten::<T>(rows * width);
        host::for_rows(
            &mut y,
            width,
            2,
            #[inline(always)]
            |row, y| {
                let x = x_rows.row(row);
                let (centre, scale) = self.statistics(x);
                for (((y, &x), &w), &b) in y.iter_mut().zip(x).zip(&weight).zip(&bias) {
                    *y = ((x - centre) * scale).mul_add(w, b);
                }
            },
        );
        Ok((T::to_cpu_storage_owned(y), x.1.shape().clone()))
    }

    fn backward<T: Real>(
        &self,
        x: &Tensor,
        weight: Option<&Tensor>,
        gradient: &Tensor,
    ) -> Candle<[Tensor; 3]> {
        let (rows, width) = rows_and_width(x.dims());
        let (x_host, g_host) = (Host::new(x), Host::new(gradient));
        let x_rows = Rows::<T>::new(x_host.storage()?, x_host.layout)?;
        let g_rows = Rows::<T>::new(g_host.storage()?, g_host.layout)?;
        let weight = match weight {
            Some(weight) => Host::new(weight).ordered::<T>()?.into_owned(),
            None => vec![T::one(); width],
        };
        let mut dx = host::unwritten::<T>(rows * width);
        // Sums over rows are made per block of rows, then over blocks: the same for any number
        // of threads.
        let blocks = rows.div_ceil(ROWS_PER_BLOCK);
        let mut partial = vec![T::zero(); blocks * 2 * width];
        {
            let shared_dx = Shared::new(&mut dx);
            let shared_partial = Shared::new(&mut partial);
            host::share(blocks, ROWS_PER_BLOCK * width * 4, |range| {
                simd::vectorised(
                    #[inline(always)]
                    || {
                        for block in range.clone() {
                            // SAFETY: each block is handled once.
                            let sums = unsafe { shared_partial.part(block * 2 * width, 2 * width) };
                            let (dw, db) = sums.split_at_mut(width);
                            let end = rows.min((block + 1) * ROWS_PER_BLOCK);
                            for row in block * ROWS_PER_BLOCK..end {
                                // SAFETY: each row belongs to one block.
                                let dx = unsafe { shared_dx.part(row * width, width) };
                                self.backward_row(
                                    x_rows.row(row),
                                    g_rows.row(row),
                                    &weight,
                                    dx,
                                    dw,
                                    db,
                                );
                            }
                        }
                    },
                );
            });
        }
        let mut sums = vec![T::zero(); 2 * width];
        for part in partial.chunks_exact((2 * width).max(1)) {
            for (sum, &p) in sums.iter_mut().zip(part) {
                *sum += p;
            }
        }
        let db = sums.split_off(width);
        Ok([
            host::tensor(dx, x.dims())?,
            host::tensor(sums, &[width])?,
            host::tensor(db, &[width])?,
        ])
    }

    #[inline(always)]
    fn backward_row<T: Real>(
        &self,
        x: &[T],
        g: &[T],
        weight: &[T],
        dx: &mut [T],
        dw: &mut [T],
        db: &mut [T],
    ) {
        let n = x.len();
        let (g, weight, dx) = (&g[..n], &weight[..n], &mut dx[..n]);
        let (dw, db) = (&mut dw[..n], &mut db[..n]);
        let (centre, scale) = self.statistics(x);
        for i in 0..n {
            let normed = (x[i] - centre) * scale;
            dw[i] = g[i].mul_add(normed, dw[i]);
            db[i] += g[i];
            dx[i] = g[i] * weight[i];
        }
        let count = T::of(n as f64);
        let mean = if self.centred {
            simd::sum(dx) / count
        } else {
            T::zero()
        };
        // mean(h x̂) = s (Σ h x - centre Σ h) / n would cancel; sum the product itself.
        let along = simd::dot_about(dx, x, centre) * scale / count;
        for i in 0..n {
            let normed = (x[i] - centre) * scale;
            dx[i] = scale * (dx[i] - mean - normed * along);
        }
    }
}

const ROWS_PER_BLOCK: usize = 64;

impl CustomOp1 for Norm {
    fn name(&self) -> &'static str {
        "norm"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Candle<(CpuStorage, Shape)> {
        by_dtype!(host::dtype(x), T => self.forward::<T>((x, layout), None, None))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, gradient: &Tensor) -> Candle<Option<Tensor>> {
        let [dx, ..] = by_dtype!(x.dtype(), T => self.backward::<T>(x, None, gradient))?;
        Ok(Some(dx))
    }
}

impl CustomOp2 for Norm {
    fn name(&self) -> &'static str {
        "norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Candle<(CpuStorage, Shape)> {
        by_dtype!(host::dtype(x), T => self.forward::<T>(
            (x, x_layout),
            Some((weight, weight_layout)),
            None,
        ))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Candle<(Option<Tensor>, Option<Tensor>)> {
        let [dx, dw, _] = by_dtype!(x.dtype(), T => self.backward::<T>(x, Some(weight), gradient))?;
        Ok((Some(dx), Some(dw)))
    }
}

impl CustomOp3 for Norm {
    fn name(&self) -> &'static str {
        "norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Candle<(CpuStorage, Shape)> {
        by_dtype!(host::dtype(x), T => self.forward::<T>(
            (x, x_layout),
            Some((weight, weight_layout)),
            Some((bias, bias_layout)),
        ))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Candle<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [dx, dw, db] =
            by_dtype!(x.dtype(), T => self.backward::<T>(x, Some(weight), gradient))?;
        Ok((Some(dx), Some(dw), Some(db)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;
    use crate::check::gradient_error;
    use crate::test_data::{arange, compare};
    use proptest::prelude::*;

    #[test]
    fn equals_the_composition() {
        for dims in [vec![1], vec![37], vec![0, 4], vec![3, 16], vec![2, 5, 70]] {
            let width = dims[dims.len() - 1];
            compare(1e-5, |dtype| {
                let x = arange(&dims, 1.0, dtype);
                let w = arange(&[width], 2.0, dtype);
                let b = arange(&[width], 3.0, dtype);
                let fused = layer_norm(&x, Some(&w), Some(&b), 1e-5).unwrap();
                (
                    fused,
                    naive::layer_norm(&x, Some(&w), Some(&b), 1e-5).unwrap(),
                )
            });
            compare(1e-5, |dtype| {
                let x = arange(&dims, 1.0, dtype);
                let w = arange(&[width], 2.0, dtype);
                let fused = rms_norm(&x, Some(&w), 1e-5).unwrap();
                (fused, naive::rms_norm(&x, Some(&w), 1e-5).unwrap())
            });
        }
    }

    #[test]
    fn without_weight_or_bias_and_strided() {
        compare(1e-5, |dtype| {
            let x = arange(&[6, 5, 4], 1.0, dtype).transpose(0, 2).unwrap();
            let b = arange(&[6], 3.0, dtype);
            let fused = layer_norm(&x, None, Some(&b), 1e-5).unwrap();
            (fused, naive::layer_norm(&x, None, Some(&b), 1e-5).unwrap())
        });
        compare(1e-5, |dtype| {
            let x = arange(&[6, 5, 4], 1.0, dtype).transpose(0, 1).unwrap();
            let fused = rms_norm(&x, None, 1e-5).unwrap();
            (fused, naive::rms_norm(&x, None, 1e-5).unwrap())
        });
    }

    #[test]
    fn a_large_offset_does_not_spoil_the_variance() {
        compare(2e-3, |dtype| {
            let x = (arange(&[4, 64], 1.0, dtype) + 1000.0).unwrap();
            let exact = naive::layer_norm(&x.to_dtype(DType::F64).unwrap(), None, None, 1e-5);
            let exact = exact.unwrap().to_dtype(dtype).unwrap();
            (layer_norm(&x, None, None, 1e-5).unwrap(), exact)
        });
    }

    #[test]
    fn gradients() {
        let x = arange(&[3, 2, 7], 1.0, DType::F64);
        let w = arange(&[7], 2.0, DType::F64);
        let b = arange(&[7], 3.0, DType::F64);
        let f = |a: &[Tensor]| layer_norm(&a[0], Some(&a[1]), Some(&a[2]), 1e-5);
        assert!(gradient_error(f, &[x.clone(), w.clone(), b.clone()]).unwrap() < 1e-8);
        let f = |a: &[Tensor]| layer_norm(&a[0], None, Some(&a[1]), 1e-5);
        assert!(gradient_error(f, &[x.clone(), b]).unwrap() < 1e-8);
        let f = |a: &[Tensor]| rms_norm(&a[0].transpose(0, 1)?, Some(&a[1]), 1e-5);
        assert!(gradient_error(f, &[x.clone(), w]).unwrap() < 1e-8);
        let f = |a: &[Tensor]| rms_norm(&a[0], None, 1e-5);
        assert!(gradient_error(f, &[x]).unwrap() < 1e-8);
    }

    #[test]
    fn wrong_shapes_are_named() {
        let x = arange(&[2, 3], 1.0, DType::F32);
        let w = arange(&[4], 1.0, DType::F32);
        let message = layer_norm(&x, Some(&w), None, 1e-5)
            .unwrap_err()
            .to_string();
        assert!(message.contains("weight") && message.contains("[3]"));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]
        #[test]
        fn gradients_of_any_shape(rows in 1usize..90, width in 2usize..6) {
            let x = arange(&[rows, width], 1.0, DType::F64);
            let w = arange(&[width], 2.0, DType::F64);
            let f = |a: &[Tensor]| layer_norm(&a[0], Some(&a[1]), None, 1e-3);
            prop_assert!(gradient_error(f, &[x, w]).unwrap() < 1e-6);
        }
    }
}
