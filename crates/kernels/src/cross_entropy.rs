//! Mean cross-entropy without a tensor of log-probabilities.
//!
//! With `L = ln Σ e^x` per row, target `t` and smoothing `s` over `V` classes the loss of a row
//! is `L - (1 - s) x_t - s mean(x)` and its gradient `e^{x - L} - (1 - s) [class = t] - s / V`.

use crate::backward::Apply;
use crate::host::{self, Host, Rows, by_dtype, fused};
use crate::simd::{self, Real};
use crate::{CrossEntropyOptions, DType, Error, Result, Tensor, naive};
use candle_core::{CpuStorage, CustomOp1, Layout, Shape};
use std::sync::OnceLock;

type Candle<T> = candle_core::Result<T>;

/// Mean cross-entropy of `logits` `[rows, classes]` against `targets` `[rows]` (`u32`), in nats.
///
/// Rows whose target is `ignore_index` are left out; with none left the loss is zero.
///
/// # Errors
/// When the shapes differ, or a target is not below the number of classes.
pub fn cross_entropy(
    logits: &Tensor,
    targets: &Tensor,
    options: &CrossEntropyOptions,
) -> Result<Tensor> {
    let (rows, classes) = logits.dims2()?;
    if targets.dims() != [rows] || targets.dtype() != DType::U32 {
        return Err(Error::argument(
            "cross_entropy",
            "targets",
            (targets.dims(), targets.dtype()),
            format!("[{rows}] in u32"),
        ));
    }
    if !(0.0..1.0).contains(&options.label_smoothing) {
        return Err(Error::argument(
            "cross_entropy",
            "label_smoothing",
            options.label_smoothing,
            "in [0, 1)",
        ));
    }
    if !fused(&[logits]) {
        return naive::cross_entropy(logits, targets, options);
    }
    let targets: Vec<Option<u32>> = targets
        .to_vec1::<u32>()?
        .into_iter()
        .map(|target| (Some(target) != options.ignore_index).then_some(target))
        .collect();
    if let Some(target) = targets.iter().flatten().find(|&&t| t as usize >= classes) {
        return Err(Error::argument(
            "cross_entropy",
            "a target",
            target,
            format!("below the {classes} classes, or the ignored index"),
        ));
    }
    let count = targets.iter().flatten().count().max(1);
    Ok(logits.apply1(CrossEntropy {
        targets,
        count,
        smoothing: options.label_smoothing,
        log_sums: OnceLock::new(),
    })?)
}

struct CrossEntropy {
    /// The class of each row, none for ignored rows.
    targets: Vec<Option<u32>>,
    count: usize,
    smoothing: f64,
    /// `L` of each row.
    log_sums: OnceLock<Vec<f64>>,
}

impl CrossEntropy {
    fn forward<T: Real>(&self, storage: &CpuStorage, layout: &Layout) -> Candle<CpuStorage> {
        let x_rows = Rows::<T>::new(storage, layout)?;
        let classes = layout.dims()[1];
        let mut log_sums = vec![0f64; self.targets.len()];
        let mut losses = vec![0f64; self.targets.len()];
        let shared = host::Shared::new(&mut log_sums);
        let shared_losses = host::Shared::new(&mut losses);
        host::share(self.targets.len(), classes * 4, |range| {
            simd::vectorised(
                #[inline(always)]
                || {
                    for row in range.clone() {
                        let Some(target) = self.targets[row] else {
                            continue;
                        };
                        let x = x_rows.row(row);
                        let maximum = simd::maximum(x);
                        let log_sum =
                            maximum.to_f64() + simd::exponential_sum(x, maximum).to_f64().ln();
                        let smoothed = if self.smoothing > 0.0 {
                            self.smoothing * simd::sum(x).to_f64() / classes as f64
                        } else {
                            0.0
                        };
                        let picked = (1.0 - self.smoothing) * x[target as usize].to_f64();
                        // SAFETY: each row is handled once.
                        unsafe {
                            shared.part(row, 1)[0] = log_sum;
                            shared_losses.part(row, 1)[0] = log_sum - picked - smoothed;
                        }
                    }
                },
            );
        });
        let mean = losses.iter().sum::<f64>() / self.count as f64;
        let _ = self.log_sums.set(log_sums);
        Ok(T::to_cpu_storage_owned(vec![T::of(mean)]))
    }

    fn backward<T: Real>(&self, logits: &Tensor, gradient: &Tensor) -> Candle<Tensor> {
        let Some(log_sums) = self.log_sums.get() else {
            candle_core::bail!("cross_entropy: backward without forward")
        };
        let x_host = Host::new(logits);
        let x_rows = Rows::<T>::new(x_host.storage()?, x_host.layout)?;
        let (rows, classes) = logits.dims2()?;
        let scale = T::of(gradient.to_dtype(DType::F64)?.to_scalar::<f64>()? / self.count as f64);
        let uniform = T::of(self.smoothing / classes.max(1) as f64);
        let mut dx = host::unwritten::<T>(rows * classes);
        host::for_rows(
            &mut dx,
            classes,
            4,
            #[inline(always)]
            |row, dx| {
                let Some(target) = self.targets[row] else {
                    dx.fill(T::zero());
                    return;
                };
                let log_sum = T::of(log_sums[row]);
                for (dx, &x) in dx.iter_mut().zip(x_rows.row(row)) {
                    *dx = ((x - log_sum).exp() - uniform) * scale;
                }
                dx[target as usize] -= T::of(1.0 - self.smoothing) * scale;
            },
        );
        host::tensor(dx, logits.dims())
    }
}

impl CustomOp1 for CrossEntropy {
    fn name(&self) -> &'static str {
        "cross_entropy"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Candle<(CpuStorage, Shape)> {
        let loss = by_dtype!(host::dtype(x), T => self.forward::<T>(x, layout))?;
        Ok((loss, Shape::from(())))
    }

    fn bwd(&self, logits: &Tensor, _: &Tensor, gradient: &Tensor) -> Candle<Option<Tensor>> {
        by_dtype!(logits.dtype(), T => self.backward::<T>(logits, gradient)).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Device;
    use crate::check::gradient_error;
    use crate::test_data::{arange, compare};
    use proptest::prelude::*;

    fn targets(rows: usize, classes: usize) -> Tensor {
        let values: Vec<u32> = (0..rows).map(|i| (i * 7 % classes) as u32).collect();
        Tensor::from_vec(values, rows, &Device::Cpu).unwrap()
    }

    fn every_option() -> [CrossEntropyOptions; 3] {
        [
            CrossEntropyOptions::default(),
            CrossEntropyOptions {
                ignore_index: Some(0),
                label_smoothing: 0.0,
            },
            CrossEntropyOptions {
                ignore_index: Some(1),
                label_smoothing: 0.1,
            },
        ]
    }

    #[test]
    fn equals_the_composition() {
        for (rows, classes) in [(1, 1), (5, 3), (33, 130)] {
            for options in every_option() {
                compare(2e-6, |dtype| {
                    let x = arange(&[rows, classes], 1.0, dtype);
                    let t = targets(rows, classes);
                    let fused = cross_entropy(&x, &t, &options).unwrap();
                    (fused, naive::cross_entropy(&x, &t, &options).unwrap())
                });
                compare(2e-6, |dtype| {
                    let x = arange(&[classes, rows], 1.0, dtype).t().unwrap();
                    let t = targets(rows, classes);
                    let fused = cross_entropy(&x, &t, &options).unwrap();
                    (fused, naive::cross_entropy(&x, &t, &options).unwrap())
                });
            }
        }
    }

    #[test]
    fn gradients() {
        for options in every_option() {
            let f = |a: &[Tensor]| cross_entropy(&a[0], &targets(6, 5), &options);
            let x = arange(&[6, 5], 1.0, DType::F64);
            assert!(gradient_error(f, &[x]).unwrap() < 1e-9);
        }
    }

    #[test]
    fn edges() {
        let options = CrossEntropyOptions {
            ignore_index: Some(2),
            label_smoothing: 0.0,
        };
        let x = Tensor::new(&[[1f32, 2.0], [3.0, 4.0]], &Device::Cpu).unwrap();
        let ignored = Tensor::new(&[2u32, 2], &Device::Cpu).unwrap();
        let loss = cross_entropy(&x, &ignored, &options).unwrap();
        assert_eq!(loss.to_scalar::<f32>().unwrap(), 0.0);
        let wrong = Tensor::new(&[0u32, 9], &Device::Cpu).unwrap();
        let message = cross_entropy(&x, &wrong, &options).unwrap_err().to_string();
        assert!(
            message.contains("9") && message.contains("2 classes"),
            "{message}"
        );
        let large = Tensor::new(&[[1000f32, -1000.0]], &Device::Cpu).unwrap();
        let second = Tensor::new(&[1u32], &Device::Cpu).unwrap();
        let loss = cross_entropy(&large, &second, &CrossEntropyOptions::default()).unwrap();
        assert_eq!(loss.to_scalar::<f32>().unwrap(), 2000.0);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]
        #[test]
        fn uniform_logits_cost_the_logarithm(rows in 1usize..20, classes in 1usize..200) {
            let x = Tensor::zeros((rows, classes), DType::F64, &Device::Cpu).unwrap();
            let loss = cross_entropy(&x, &targets(rows, classes), &CrossEntropyOptions::default()).unwrap();
            prop_assert!((loss.to_scalar::<f64>().unwrap() - (classes as f64).ln()).abs() < 1e-12);
        }
    }
}
