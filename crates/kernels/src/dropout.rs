//! Dropout whose mask is a function of a seed and of where an element stands (Srivastava et al., JMLR 15, 2014):
//! it is never stored, comes out the same when it is drawn again, and does not depend on the order of the work.

use crate::backward::Apply;
use crate::host::{self, Rows, by_dtype, fused, rows_and_width};
use crate::{Error, Result, Tensor, naive};
use candle_core::{CpuStorage, CustomOp1, Layout, Shape, WithDType};

type Candle<T> = candle_core::Result<T>;

/// `x ⊙ m`, where each element of `m` is 0 with `probability` and `1 / (1 − probability)` otherwise, independently of
/// the others.
///
/// # Errors
/// When the probability is not at least 0 and below 1.
///
/// ```
/// use lapidary_kernels::{DType, Device, Tensor, dropout};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let x = Tensor::ones((2, 8), DType::F32, &Device::Cpu)?;
/// let y = dropout(&x, 0.5, 7)?.to_vec2::<f32>()?;
/// assert!(y.iter().flatten().all(|y| [0.0, 2.0].contains(y)));
/// assert_eq!(y, dropout(&x, 0.5, 7)?.to_vec2::<f32>()?);
/// # Ok(()) }
/// ```
pub fn dropout(x: &Tensor, probability: f64, seed: u64) -> Result<Tensor> {
    if !(0.0..1.0).contains(&probability) {
        let expected = "at least 0 and below 1";
        return Err(Error::argument(
            "dropout",
            "probability",
            probability,
            expected,
        ));
    }
    if probability == 0.0 {
        return Ok(x.clone());
    }
    let mask = DropoutMask::new(probability, seed);
    match fused(&[x]) && x.rank() > 0 {
        true => Ok(x.apply1(mask)?),
        false => naive::dropout(x, &mask),
    }
}

/// What elements are multiplied by.
#[derive(Clone, Copy, Debug)]
pub struct DropoutMask {
    kept: f64,
    /// Of 2⁵³ equally likely numbers, those below it drop an element.
    below: u64,
    start: u64,
}

/// One in 2⁵³.
const BITS: u32 = 53;

impl DropoutMask {
    /// Which drops each element with a `probability` of at least 0 and below 1.
    pub fn new(probability: f64, seed: u64) -> Self {
        Self {
            kept: 1.0 / (1.0 - probability),
            below: (probability * (1u64 << BITS) as f64).round() as u64,
            // Neighbouring seeds are far apart.
            start: scrambled(seed),
        }
    }

    /// What the element with this index, counted in order, is multiplied by.
    #[inline(always)]
    pub fn at(&self, index: usize) -> f64 {
        const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
        let counter = self.start.wrapping_add((index as u64).wrapping_mul(STEP));
        match scrambled(counter) >> (u64::BITS - BITS) < self.below {
            true => 0.0,
            false => self.kept,
        }
    }
}

/// The bijection of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014).
#[inline(always)]
fn scrambled(number: u64) -> u64 {
    let number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ (number >> 31)
}

impl CustomOp1 for DropoutMask {
    fn name(&self) -> &'static str {
        "dropout"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Candle<(CpuStorage, Shape)> {
        let (rows, width) = rows_and_width(layout.dims());
        let y = by_dtype!(host::dtype(x), T => {
            let x = Rows::<T>::new(x, layout)?;
            let kept = self.kept as T;
            let mut y = host::unwritten::<T>(rows * width);
            host::for_rows(&mut y, width, 4, #[inline(always)] |row, y| {
                for ((place, y), &x) in (row * width..).zip(y).zip(x.row(row)) {
                    *y = if self.at(place) == 0.0 { 0.0 } else { x * kept };
                }
            });
            Ok(T::to_cpu_storage_owned(y))
        })?;
        Ok((y, layout.shape().clone()))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, gradient: &Tensor) -> Candle<Option<Tensor>> {
        gradient.apply_op1_no_bwd(self).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{difference, gradient_error};
    use crate::test_data::{arange, compare};
    use crate::{DType, Device};

    fn drawn(probability: f64, seed: u64, dims: &[usize]) -> Vec<f64> {
        let ones = Tensor::ones(dims, DType::F64, &Device::Cpu).unwrap();
        let y = dropout(&ones, probability, seed).unwrap();
        y.flatten_all().unwrap().to_vec1().unwrap()
    }

    #[test]
    fn equals_the_composition() {
        for dims in [&[3, 5][..], &[2, 3, 70], &[1]] {
            compare(1e-6, |dtype| {
                let x = arange(dims, 1.0, dtype);
                let mask = DropoutMask::new(0.3, 5);
                let plain = naive::dropout(&x, &mask).unwrap();
                (dropout(&x, 0.3, 5).unwrap(), plain)
            });
        }
        // By where an element stands, not by where it lies.
        compare(1e-6, |dtype| {
            let x = arange(&[6, 4], 1.0, dtype).t().unwrap();
            let copy = x.contiguous().unwrap();
            (
                dropout(&x, 0.3, 5).unwrap(),
                dropout(&copy, 0.3, 5).unwrap(),
            )
        });
    }

    #[test]
    fn the_rate_and_the_mean_are_kept() {
        for (probability, seed) in [(0.1, 1), (0.5, 2), (0.9, 3)] {
            let y = drawn(probability, seed, &[200, 500]);
            let count = y.len() as f64;
            let zeros = y.iter().filter(|y| **y == 0.0).count() as f64;
            // Six standard deviations.
            let apart = 6.0 * (probability * (1.0 - probability) / count).sqrt();
            assert!((zeros / count - probability).abs() < apart, "{probability}");
            let kept = 1.0 / (1.0 - probability);
            let mean = y.iter().sum::<f64>() / count;
            assert!((mean - 1.0).abs() < apart * kept, "{probability}");
            assert!(y.iter().all(|y| *y == 0.0 || (y - kept).abs() < 1e-14));
        }
    }

    #[test]
    fn elements_are_drawn_one_by_one() {
        // Of neighbours in a row, in a column and under the next seed, both are dropped as often as two draws say.
        let (rows, width) = (300, 301);
        let [y, other] = [4, 5].map(|seed| drawn(0.5, seed, &[rows, width]));
        let pairs = |apart: usize, with: &[f64]| {
            let both = y.iter().zip(&with[apart..]);
            let both = both.filter(|(a, b)| **a == 0.0 && **b == 0.0).count();
            both as f64 / (y.len() - apart) as f64
        };
        let most = 6.0 * (0.25f64 * 0.75 / y.len() as f64).sqrt();
        for found in [
            pairs(1, &y),
            pairs(width, &y),
            pairs(0, &other),
            pairs(1, &other),
        ] {
            assert!((found - 0.25).abs() < most, "{found}");
        }
    }

    #[test]
    fn a_seed_says_the_mask_and_no_rate_is_nothing() {
        assert_eq!(drawn(0.3, 9, &[7, 9]), drawn(0.3, 9, &[7, 9]));
        assert_ne!(drawn(0.3, 9, &[7, 9]), drawn(0.3, 10, &[7, 9]));
        let x = arange(&[4, 5], 1.0, DType::F32);
        assert_eq!(difference(&dropout(&x, 0.0, 3).unwrap(), &x).unwrap(), 0.0);
        for wrong in [1.0, -0.1, f64::NAN] {
            assert!(dropout(&x, wrong, 3).is_err());
        }
        let none = Tensor::zeros((0, 3), DType::F32, &Device::Cpu).unwrap();
        assert_eq!(dropout(&none, 0.5, 3).unwrap().dims(), [0, 3]);
    }

    #[test]
    fn gradients_equal_finite_differences() {
        let x = arange(&[3, 4, 5], 1.0, DType::F64);
        let f = |x: &[Tensor]| Ok(dropout(&x[0].transpose(0, 1)?, 0.4, 8)?.sqr()?);
        assert!(gradient_error(f, &[x]).unwrap() < 1e-8);
    }
}
