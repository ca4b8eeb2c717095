//! Softmax and its logarithm over the last dimension.
//!
//! Forward: `y = e^{x - max} / Σ e^{x - max}`. Backward: for the softmax
//! `∂x = y ∘ (∂y - Σ ∂y ∘ y)`, for its logarithm `∂x = ∂y - e^y Σ ∂y`.

use crate::backward::Apply;
use crate::host::{self, Host, Rows, by_dtype, fused, rows_and_width};
use crate::simd::{self, Real};
use crate::{Result, SoftmaxMask, Tensor, naive};
use candle_core::{CpuStorage, CustomOp1, Layout, Shape};

type Candle<T> = candle_core::Result<T>;

/// Softmax over the last dimension of a masked `x`. A row with every entry masked gives zeros.
///
/// # Errors
/// When the mask cannot be broadcast to the shape of `x`.
pub fn softmax(x: &Tensor, mask: &SoftmaxMask) -> Result<Tensor> {
    if !applies(x, mask) {
        return naive::softmax(x, mask);
    }
    Ok(x.apply1(Softmax::new(x, mask, false)?)?)
}

/// Logarithm of the softmax over the last dimension. A row with every entry masked gives `-∞`.
///
/// # Errors
/// When the mask cannot be broadcast to the shape of `x`.
pub fn log_softmax(x: &Tensor, mask: &SoftmaxMask) -> Result<Tensor> {
    if !applies(x, mask) {
        return naive::log_softmax(x, mask);
    }
    Ok(x.apply1(Softmax::new(x, mask, true)?)?)
}

fn applies(x: &Tensor, mask: &SoftmaxMask) -> bool {
    x.rank() >= 1
        && match &mask.additive {
            Some(additive) => fused(&[x, additive]),
            None => fused(&[x]),
        }
}

struct Softmax {
    /// Broadcast to the shape of the argument.
    additive: Option<Tensor>,
    causal: Option<usize>,
    logarithm: bool,
}

impl Softmax {
    fn new(x: &Tensor, mask: &SoftmaxMask, logarithm: bool) -> Result<Self> {
        if mask.causal.is_some() && x.rank() < 2 {
            return Err(crate::Error::argument(
                "softmax",
                "x under a causal mask",
                x.dims(),
                "[.., rows, columns]",
            ));
        }
        let additive = match &mask.additive {
            Some(additive) => Some(additive.detach().broadcast_as(x.shape())?),
            None => None,
        };
        Ok(Self {
            additive,
            causal: mask.causal,
            logarithm,
        })
    }

    fn forward<T: Real>(&self, storage: &CpuStorage, layout: &Layout) -> Candle<CpuStorage> {
        let dims = layout.dims();
        let (rows, width) = rows_and_width(dims);
        let lines = dims.iter().rev().nth(1).copied().unwrap_or(1);
        let x = Rows::<T>::new(storage, layout)?;
        let mask_host = self.additive.as_ref().map(Host::new);
        let mask = mask_host
            .as_ref()
            .map(|host| Rows::<T>::new(host.storage()?, host.layout))
            .transpose()?;
        let mut y = host::unwritten::<T>(rows * width);
        host::for_rows(
            &mut y,
            width,
            4,
            #[inline(always)]
            |row, y| {
                y.copy_from_slice(x.row(row));
                if let Some(mask) = &mask {
                    for (y, &m) in y.iter_mut().zip(mask.row(row)) {
                        *y += m;
                    }
                }
                let kept = match self.causal {
                    Some(offset) => (row % lines + offset + 1).min(width),
                    None => width,
                };
                let (y, hidden) = y.split_at_mut(kept);
                let maximum = simd::maximum(y);
                if self.logarithm {
                    hidden.fill(T::NEG_INFINITY);
                    log_softmax_row(y, maximum);
                } else {
                    hidden.fill(T::zero());
                    softmax_row(y, maximum);
                }
            },
        );
        Ok(T::to_cpu_storage_owned(y))
    }

    fn backward<T: Real>(&self, y: &Tensor, gradient: &Tensor) -> Candle<Tensor> {
        let (y_host, g_host) = (Host::new(y), Host::new(gradient));
        let y_rows = Rows::<T>::new(y_host.storage()?, y_host.layout)?;
        let g_rows = Rows::<T>::new(g_host.storage()?, g_host.layout)?;
        let (rows, width) = rows_and_width(y.dims());
        let mut dx = host::unwritten::<T>(rows * width);
        host::for_rows(
            &mut dx,
            width,
            2,
            #[inline(always)]
            |row, dx| {
                let (y, g) = (y_rows.row(row), g_rows.row(row));
                if self.logarithm {
                    let total = simd::sum(g);
                    for ((dx, &y), &g) in dx.iter_mut().zip(y).zip(g) {
                        *dx = g - y.exp() * total;
                    }
                } else {
                    let inner = simd::dot(y, g);
                    for ((dx, &y), &g) in dx.iter_mut().zip(y).zip(g) {
                        *dx = y * (g - inner);
                    }
                }
            },
        );
        host::tensor(dx, y.dims())
    }
}

#[inline(always)]
fn softmax_row<T: Real>(y: &mut [T], maximum: T) {
    if maximum == T::NEG_INFINITY {
        simd::without_hidden(y);
        return;
    }
    let inverse = T::one() / simd::exponentiate(y, maximum);
    for y in y {
        *y *= inverse;
    }
}

#[inline(always)]
fn log_softmax_row<T: Real>(y: &mut [T], maximum: T) {
    // Everything is hidden, or no number: it stays so.
    if maximum == T::NEG_INFINITY {
        return;
    }
    let shift = maximum + simd::exponential_sum(y, maximum).ln();
    for y in y {
        *y -= shift;
    }
}

impl CustomOp1 for Softmax {
    fn name(&self) -> &'static str {
        "softmax"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Candle<(CpuStorage, Shape)> {
        let y = by_dtype!(host::dtype(x), T => self.forward::<T>(x, layout))?;
        Ok((y, layout.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, y: &Tensor, gradient: &Tensor) -> Candle<Option<Tensor>> {
        by_dtype!(y.dtype(), T => self.backward::<T>(y, gradient)).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{difference, gradient_error};
    use crate::test_data::{arange, compare};
    use crate::{DType, Device};
    use proptest::prelude::*;

    fn masks(dtype: DType, dims: &[usize]) -> Vec<SoftmaxMask> {
        let width = dims[dims.len() - 1];
        let additive = arange(&[width], 5.0, dtype);
        let mut masks = vec![
            SoftmaxMask::default(),
            SoftmaxMask {
                additive: Some(additive),
                causal: None,
            },
        ];
        if dims.len() > 1 {
            masks.push(SoftmaxMask {
                additive: None,
                causal: Some(0),
            });
            masks.push(SoftmaxMask {
                additive: Some(arange(&dims[dims.len() - 2..], 6.0, dtype)),
                causal: Some(2),
            });
        }
        masks
    }

    #[test]
    fn rows_of_half_precision_with_nothing_in_them_are_zeros() {
        let hidden = [[0f32, 0.0, 0.0], [f32::NEG_INFINITY; 3]];
        for dtype in [DType::F16, DType::BF16] {
            let additive = Tensor::new(&hidden, &Device::Cpu).unwrap();
            let mask = SoftmaxMask {
                additive: Some(additive.to_dtype(dtype).unwrap()),
                causal: None,
            };
            let x = arange(&[2, 3], 1.0, dtype);
            let y = softmax(&x, &mask).unwrap().to_dtype(DType::F32).unwrap();
            let y = y.to_vec2::<f32>().unwrap();
            assert!((y[0].iter().sum::<f32>() - 1.0).abs() < 0.02, "{y:?}");
            assert_eq!(y[1], [0.0; 3]);
        }
    }

    #[test]
    fn what_is_no_number_stays_none() {
        let row = [[f64::NAN, f64::NEG_INFINITY, f64::NAN]];
        let x = Tensor::new(&row, &Device::Cpu).unwrap();
        for of in [softmax, log_softmax] {
            let y = of(&x, &SoftmaxMask::default()).unwrap();
            let y = y.to_vec2::<f64>().unwrap();
            assert!(y[0][0].is_nan() && y[0][2].is_nan(), "{y:?}");
        }
    }

    #[test]
    fn equals_the_composition() {
        for dims in [
            vec![1],
            vec![19],
            vec![3, 1],
            vec![2, 5, 33],
            vec![2, 3, 4, 130],
        ] {
            for index in 0..4 {
                compare(2e-6, |dtype| {
                    let masks = masks(dtype, &dims);
                    let mask = &masks[index % masks.len()];
                    let x = arange(&dims, 1.0, dtype);
                    (
                        softmax(&x, mask).unwrap(),
                        naive::softmax(&x, mask).unwrap(),
                    )
                });
            }
            compare(2e-6, |dtype| {
                let x = arange(&dims, 1.0, dtype);
                let mask = SoftmaxMask::default();
                (
                    log_softmax(&x, &mask).unwrap(),
                    naive::log_softmax(&x, &mask).unwrap(),
                )
            });
        }
    }

    #[test]
    fn reads_strided_input() {
        compare(2e-6, |dtype| {
            let x = arange(&[5, 4, 9], 1.0, dtype).transpose(0, 2).unwrap();
            let mask = SoftmaxMask::default();
            (
                softmax(&x, &mask).unwrap(),
                naive::softmax(&x, &mask).unwrap(),
            )
        });
        compare(2e-6, |dtype| {
            let x = arange(&[5, 4, 9], 1.0, dtype).transpose(0, 1).unwrap();
            let mask = SoftmaxMask::default();
            (
                softmax(&x, &mask).unwrap(),
                naive::softmax(&x, &mask).unwrap(),
            )
        });
    }

    #[test]
    fn gradients() {
        let x = arange(&[2, 3, 5], 1.0, DType::F64);
        for mask in masks(DType::F64, &[2, 3, 5]) {
            let f = |a: &[Tensor]| softmax(&a[0], &mask);
            assert!(gradient_error(f, std::slice::from_ref(&x)).unwrap() < 1e-9);
        }
        let f = |a: &[Tensor]| log_softmax(&a[0], &SoftmaxMask::default());
        assert!(gradient_error(f, &[x]).unwrap() < 1e-9);
    }

    #[test]
    fn masked_rows_and_large_numbers() {
        let x = Tensor::new(
            &[[1e30f32, -1e30, 3.0], [700.0, 700.0, -700.0]],
            &Device::Cpu,
        )
        .unwrap();
        let y = softmax(&x, &SoftmaxMask::default()).unwrap();
        assert_eq!(
            y.to_vec2::<f32>().unwrap(),
            [[1.0, 0.0, 0.0], [0.5, 0.5, 0.0]]
        );
        let mask = SoftmaxMask {
            additive: Some(Tensor::new(&[f32::NEG_INFINITY; 3], &Device::Cpu).unwrap()),
            causal: None,
        };
        assert_eq!(
            softmax(&x, &mask).unwrap().to_vec2::<f32>().unwrap(),
            [[0.0; 3]; 2]
        );
        let logs = log_softmax(&x, &mask).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(logs, [[f32::NEG_INFINITY; 3]; 2]);
        let empty = Tensor::zeros((2, 0), DType::F32, &Device::Cpu).unwrap();
        assert_eq!(
            softmax(&empty, &SoftmaxMask::default()).unwrap().dims(),
            [2, 0]
        );
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn rows_sum_to_one(rows in 1usize..20, width in 1usize..100, scale in 0.1f64..50.0) {
            let x = (arange(&[rows, width], 1.0, DType::F32) * scale).unwrap();
            let y = softmax(&x, &SoftmaxMask::default()).unwrap();
            let sums = y.sum(1).unwrap();
            prop_assert!(difference(&sums, &sums.ones_like().unwrap()).unwrap() < 1e-5);
        }
    }
}
