//! Vector arithmetic shared by the kernels.
//!
//! Functions are written branch-free on single numbers and loops on fixed-size lanes; run inside
//! [`vectorised`], they are compiled once per instruction set (AVX-512, AVX2, baseline) and the
//! best one that the processor has is chosen at run time.

use candle_core::{CpuStorage, WithDType};
use std::ops::Neg;

/// Lanes of an accumulator: one AVX-512 register of `f32`, two of `f64`.
pub(crate) const LANES: usize = 16;

/// Runs `body` once, compiled for the best instruction set of this processor.
///
/// `body`, and every closure that it calls, must be marked `#[inline(always)]`: what is not
/// inlined here is compiled for the oldest processor, without vectors, and there a fused
/// multiply-add is a call into the mathematics library.
#[inline(always)]
pub(crate) fn vectorised<R>(body: impl FnMut() -> R) -> R {
    pulp::Arch::new().dispatch(Body(body))
}

/// A closure that is called through `FnMut`: called through `FnOnce`, as the dispatcher would
/// call it, it stands behind a shim that does not inherit its `#[inline(always)]`.
struct Body<F>(F);

impl<R, F: FnMut() -> R> pulp::NullaryFnOnce for Body<F> {
    type Output = R;

    #[inline(always)]
    fn call(mut self) -> R {
        (self.0)()
    }
}

/// The two floating-point types that the kernels compute in.
pub(crate) trait Real: WithDType + Neg<Output = Self> + Default + std::iter::Sum {
    const NEG_INFINITY: Self;
    fn of(x: f64) -> Self;
    fn mul_add(self, a: Self, b: Self) -> Self;
    fn sqrt(self) -> Self;
    fn ln(self) -> Self;
    fn ln_1p(self) -> Self;
    fn abs(self) -> Self;
    /// `e^x`, with results below the smallest normal number flushed to zero.
    fn exp(self) -> Self;
    /// `e^x` for `x ≤ 0`, in fewer steps.
    #[inline(always)]
    fn exp_of_negative(self) -> Self {
        self.exp()
    }
    fn tanh(self) -> Self;
    fn erf(self) -> Self;
    fn order(&self, other: &Self) -> std::cmp::Ordering;
    /// The same numbers, if they are `f32`.
    fn single(_: &[Self]) -> Option<&[f32]> {
        None
    }
    /// The same numbers to be changed, if they are `f32`.
    fn single_mut(_: &mut [Self]) -> Option<&mut [f32]> {
        None
    }
    /// The numbers in a storage of this type, to be changed.
    fn slice_mut(storage: &mut CpuStorage) -> candle_core::Result<&mut [Self]>;

    /// `max(self, other)`, `self` when `other` is not a number.
    #[inline(always)]
    fn larger(self, other: Self) -> Self {
        if other > self { other } else { self }
    }

    /// `1 / (1 + e^{-x})`.
    #[inline(always)]
    fn sigmoid(self) -> Self {
        Self::one() / (Self::one() + (-self).exp())
    }

    /// `c₀ + c₁ x + c₂ x² + …` by Horner's rule.
    #[inline(always)]
    fn polynomial<const N: usize>(self, coefficients: [f64; N]) -> Self {
        let mut sum = Self::zero();
        let mut k = N;
        // A counted loop unrolls at every level of optimisation, which an iterator does not.
        while k > 0 {
            k -= 1;
            sum = sum.mul_add(self, Self::of(coefficients[k]));
        }
        sum
    }
}

/// `1 / k!`, the coefficients of the exponential series.
const INVERSE_FACTORIALS: [f64; 14] = {
    let mut coefficients = [1.0; 14];
    let mut k = 1;
    while k < 14 {
        coefficients[k] = coefficients[k - 1] / k as f64;
        k += 1;
    }
    coefficients
};

const fn leading<const N: usize>(all: [f64; 14]) -> [f64; N] {
    let mut head = [0.0; N];
    let mut k = 0;
    while k < N {
        head[k] = all[k];
        k += 1;
    }
    head
}

/// `e^r` and `n` of `e^x = 2^n e^r` with `n = round(x / ln 2)`, `|r| ≤ ln 2 / 2`, by the series up to
/// `r⁷`.
#[inline(always)]
fn exponential_parts(x: f32) -> (f32, i32) {
    // Adding and removing 1.5·2²³ rounds to an integer, which then stands in the low bits.
    const ROUND: f32 = 12_582_912.0;
    const LN_2_HIGH: f32 = 0.693_359_4;
    const LN_2_LOW: f32 = (std::f64::consts::LN_2 - LN_2_HIGH as f64) as f32;
    let shifted = Real::mul_add(x, std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = Real::mul_add(n, -LN_2_LOW, Real::mul_add(n, -LN_2_HIGH, x));
    let series = r.polynomial(leading::<8>(INVERSE_FACTORIALS));
    (
        series,
        shifted.to_bits().wrapping_sub(ROUND.to_bits()) as i32,
    )
}

impl Real for f32 {
    const NEG_INFINITY: Self = f32::NEG_INFINITY;

    fn single(numbers: &[Self]) -> Option<&[f32]> {
        Some(numbers)
    }

    fn single_mut(numbers: &mut [Self]) -> Option<&mut [f32]> {
        Some(numbers)
    }

    fn slice_mut(storage: &mut CpuStorage) -> candle_core::Result<&mut [Self]> {
        match storage {
            CpuStorage::F32(values) => Ok(values),
            _ => candle_core::bail!("expected a storage of f32"),
        }
    }

    #[inline(always)]
    fn of(x: f64) -> Self {
        x as f32
    }
    #[inline(always)]
    fn mul_add(self, a: Self, b: Self) -> Self {
        f32::mul_add(self, a, b)
    }
    #[inline(always)]
    fn sqrt(self) -> Self {
        f32::sqrt(self)
    }
    #[inline(always)]
    fn ln(self) -> Self {
        f32::ln(self)
    }
    #[inline(always)]
    fn ln_1p(self) -> Self {
        f32::ln_1p(self)
    }
    #[inline(always)]
    fn abs(self) -> Self {
        f32::abs(self)
    }
    #[inline(always)]
    fn order(&self, other: &Self) -> std::cmp::Ordering {
        self.total_cmp(other)
    }

    #[inline(always)]
    fn exp(self) -> Self {
        let (series, n) = exponential_parts(self);
        // 2^n in two factors, as n may be 128.
        let half = n >> 1;
        let first = f32::from_bits((half.wrapping_add(127) as u32) << 23);
        let second = f32::from_bits(((n.wrapping_sub(half)).wrapping_add(127) as u32) << 23);
        let result = series * first * second;
        let result = if self > 88.722_84 {
            f32::INFINITY
        } else {
            result
        };
        if self < -87.336_54 { 0.0 } else { result }
    }

    /// As [`exp`](Real::exp), whose second factor of `2^n` and upper bound it does without.
    #[inline(always)]
    fn exp_of_negative(self) -> Self {
        let (series, n) = exponential_parts(self);
        let result = series * f32::from_bits((n.wrapping_add(127) as u32) << 23);
        if self < -87.336_54 { 0.0 } else { result }
    }

    /// Near zero `x P(x²)`, elsewhere `1 - 2 / (e^{2x} + 1)`.
    #[inline(always)]
    fn tanh(self) -> Self {
        const NEAR: [f64; 7] = [
            0.999999999775161,
            -0.33333327994906964,
            0.1333312607028505,
            -0.053937922246061705,
            0.021655771223008137,
            -0.008071723119807982,
            0.002049797379669475,
        ];
        let x = self.abs();
        let near = self * (self * self).polynomial(NEAR);
        let far = 1.0 - 2.0 / (Real::exp(2.0 * x) + 1.0);
        if x < 0.65 { near } else { far.copysign(self) }
    }

    /// Near zero `x P(x²)`, elsewhere `1 - e^{-Q(|x|)}`; both polynomials fitted to 5e-10.
    #[inline(always)]
    fn erf(self) -> Self {
        const NEAR: [f64; 7] = [
            1.1283791665798113,
            -0.3761263318843542,
            0.11283687188811475,
            -0.026858941513648968,
            0.00519990667587698,
            -0.0008130012712575939,
            8.316775304932481e-05,
        ];
        const FAR: [f64; 8] = [
            -0.00017468329740211175,
            1.1295149246763656,
            0.6333469186928058,
            0.10828007501813844,
            -0.025119417519394418,
            0.004171059056996486,
            -0.0004344617481314553,
            2.10949707817845e-05,
        ];
        let x = self.abs();
        let near = self * (self * self).polynomial(NEAR);
        // Beyond 4 the result rounds to one; NaN stays NaN.
        let clamped = if x > 4.0 { 4.0 } else { x };
        let far = 1.0 - Real::exp(-clamped.polynomial(FAR));
        if x < 0.925 { near } else { far.copysign(self) }
    }
}

impl Real for f64 {
    const NEG_INFINITY: Self = f64::NEG_INFINITY;

    fn slice_mut(storage: &mut CpuStorage) -> candle_core::Result<&mut [Self]> {
        match storage {
            CpuStorage::F64(values) => Ok(values),
            _ => candle_core::bail!("expected a storage of f64"),
        }
    }

    #[inline(always)]
    fn of(x: f64) -> Self {
        x
    }
    #[inline(always)]
    fn mul_add(self, a: Self, b: Self) -> Self {
        f64::mul_add(self, a, b)
    }
    #[inline(always)]
    fn sqrt(self) -> Self {
        f64::sqrt(self)
    }
    #[inline(always)]
    fn ln(self) -> Self {
        f64::ln(self)
    }
    #[inline(always)]
    fn ln_1p(self) -> Self {
        f64::ln_1p(self)
    }
    #[inline(always)]
    fn abs(self) -> Self {
        f64::abs(self)
    }
    #[inline(always)]
    fn order(&self, other: &Self) -> std::cmp::Ordering {
        self.total_cmp(other)
    }

    /// As for `f32`, with the series up to `r¹³`.
    #[inline(always)]
    fn exp(self) -> Self {
        const ROUND: f64 = 6_755_399_441_055_744.0;
        // ln 2 split so that n times the first part is exact.
        const LN_2_HIGH: f64 = 0.693_147_180_369_123_8;
        const LN_2_LOW: f64 = 1.908_214_929_270_587_7e-10;
        let shifted = self.mul_add(std::f64::consts::LOG2_E, ROUND);
        let n = shifted - ROUND;
        let r = n.mul_add(-LN_2_LOW, n.mul_add(-LN_2_HIGH, self));
        let series = r.polynomial(INVERSE_FACTORIALS);
        let n = shifted.to_bits().wrapping_sub(ROUND.to_bits()) as i64;
        let half = n >> 1;
        let first = f64::from_bits((half.wrapping_add(1023) as u64) << 52);
        let second = f64::from_bits(((n.wrapping_sub(half)).wrapping_add(1023) as u64) << 52);
        let result = series * first * second;
        let result = if self > 709.782_712_893_384 {
            f64::INFINITY
        } else {
            result
        };
        if self < -708.396_418_532_264_1 {
            0.0
        } else {
            result
        }
    }

    #[inline(always)]
    fn tanh(self) -> Self {
        f64::tanh(self)
    }

    #[inline(always)]
    fn erf(self) -> Self {
        candle_core::cpu::erf::erf_f64(self)
    }
}

/// All lanes folded into one, by halves, which vectors do at once.
#[inline(always)]
fn together<T: Real>(lanes: [T; LANES], join: impl Fn(T, T) -> T + Copy) -> T {
    let eight: [T; 8] = std::array::from_fn(
        #[inline(always)]
        |i| join(lanes[i], lanes[i + 8]),
    );
    let four: [T; 4] = std::array::from_fn(
        #[inline(always)]
        |i| join(eight[i], eight[i + 4]),
    );
    join(join(four[0], four[2]), join(four[1], four[3]))
}

/// Folds `value(i)` for `i < n` in [`LANES`] independent accumulators, then those into one.
#[inline(always)]
fn fold<T: Real>(
    n: usize,
    start: T,
    value: impl Fn(usize) -> T,
    join: impl Fn(T, T) -> T + Copy,
) -> T {
    let mut lanes = [start; LANES];
    let whole = n - n % LANES;
    let mut i = 0;
    while i < whole {
        for (l, lane) in lanes.iter_mut().enumerate() {
            *lane = join(*lane, value(i + l));
        }
        i += LANES;
    }
    let mut total = together(lanes, join);
    for i in whole..n {
        total = join(total, value(i));
    }
    total
}

/// `Σ x_i`.
#[inline(always)]
pub(crate) fn sum<T: Real>(x: &[T]) -> T {
    fold(x.len(), T::zero(), |i| x[i], |a, b| a + b)
}

/// `Σ x_i y_i`.
#[inline(always)]
pub(crate) fn dot<T: Real>(x: &[T], y: &[T]) -> T {
    let n = x.len().min(y.len());
    let (x, y) = (&x[..n], &y[..n]);
    fold(n, T::zero(), |i| x[i] * y[i], |a, b| a + b)
}

/// `Σ x_i (y_i - centre)`.
#[inline(always)]
pub(crate) fn dot_about<T: Real>(x: &[T], y: &[T], centre: T) -> T {
    let n = x.len().min(y.len());
    let (x, y) = (&x[..n], &y[..n]);
    fold(n, T::zero(), |i| x[i] * (y[i] - centre), |a, b| a + b)
}

/// `Σ (x_i - centre)²`.
#[inline(always)]
pub(crate) fn squares_about<T: Real>(x: &[T], centre: T) -> T {
    fold(
        x.len(),
        T::zero(),
        |i| (x[i] - centre) * (x[i] - centre),
        |a, b| a + b,
    )
}

/// The largest `x_i`, `-∞` for none. Not-a-number entries are passed over.
#[inline(always)]
pub(crate) fn maximum<T: Real>(x: &[T]) -> T {
    fold(x.len(), T::NEG_INFINITY, |i| x[i], |a, b| a.larger(b))
}

/// Replaces `x_i` by `e^{x_i - shift}` and gives the sum of the results. No `x_i` may exceed
/// `shift`.
#[inline(always)]
pub(crate) fn exponentiate<T: Real>(x: &mut [T], shift: T) -> T {
    let mut lanes = [T::zero(); LANES];
    let mut chunks = x.chunks_exact_mut(LANES);
    for chunk in &mut chunks {
        for (value, lane) in chunk.iter_mut().zip(lanes.iter_mut()) {
            *value = (*value - shift).exp_of_negative();
            *lane += *value;
        }
    }
    let mut total = T::zero();
    for value in chunks.into_remainder() {
        *value = (*value - shift).exp_of_negative();
        total += *value;
    }
    total
        + together(
            lanes,
            #[inline(always)]
            |a, b| a + b,
        )
}

/// Replaces `-∞` by 0 where no `x_i` is larger, and gives the sum of the results: 0, or not a number where
/// an `x_i` is none.
#[inline(always)]
pub(crate) fn without_hidden<T: Real>(x: &mut [T]) -> T {
    for value in x.iter_mut() {
        *value = if *value == T::NEG_INFINITY {
            T::zero()
        } else {
            *value
        };
    }
    sum(x)
}

/// `Σ e^{x_i - shift}`.
#[inline(always)]
pub(crate) fn exponential_sum<T: Real>(x: &[T], shift: T) -> T {
    fold(x.len(), T::zero(), |i| (x[i] - shift).exp(), |a, b| a + b)
}

/// `y_i += scale · x_i`.
#[inline(always)]
pub(crate) fn add_scaled<T: Real>(y: &mut [T], x: &[T], scale: T) {
    for (y, x) in y.iter_mut().zip(x) {
        *y = x.mul_add(scale, *y);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn worst<T: Real>(low: f64, high: f64, fast: fn(T) -> T, exact: fn(f64) -> f64) -> f64 {
        let count = 20_001;
        (0..count)
            .map(|i| low + (high - low) * i as f64 / (count - 1) as f64)
            .map(|x| {
                let x = T::of(x);
                let truth = exact(x.to_f64());
                (fast(x).to_f64() - truth).abs() / truth.abs().max(1e-30)
            })
            .fold(0.0, f64::max)
    }

    #[test]
    fn f32_functions_are_accurate_to_two_units_in_the_last_place() {
        assert!(worst::<f32>(-87.0, 88.7, Real::exp, f64::exp) < 2.4e-7);
        assert!(worst::<f32>(-10.0, 10.0, Real::tanh, f64::tanh) < 2.4e-7);
        let erf = candle_core::cpu::erf::erf_f64;
        assert!(worst::<f32>(-6.0, 6.0, Real::erf, erf) < 2.4e-7);
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        assert!(worst::<f32>(-80.0, 80.0, Real::sigmoid, sigmoid) < 4e-7);
    }

    #[test]
    fn f64_exponential_is_accurate() {
        assert!(worst::<f64>(-708.0, 709.7, Real::exp, f64::exp) < 1e-15);
        assert!(worst::<f64>(-1.0, 1.0, Real::exp, f64::exp) < 5e-16);
    }

    #[test]
    fn the_ends_of_the_range() {
        assert_eq!(Real::exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(Real::exp(-1000f32), 0.0);
        assert_eq!(Real::exp(1000f32), f32::INFINITY);
        assert_eq!(Real::exp(f32::INFINITY), f32::INFINITY);
        assert!(Real::exp(f32::NAN).is_nan());
        assert_eq!(Real::exp(f64::NEG_INFINITY), 0.0);
        assert_eq!(Real::exp(f64::INFINITY), f64::INFINITY);
        assert!(Real::exp(f64::NAN).is_nan());
        assert_eq!(Real::tanh(f32::INFINITY), 1.0);
        assert_eq!(Real::tanh(f32::NEG_INFINITY), -1.0);
        assert!(Real::tanh(f32::NAN).is_nan());
        for x in [0f32, -0.3, -87.3, -1000.0, f32::NEG_INFINITY] {
            assert_eq!(x.exp_of_negative(), Real::exp(x));
        }
        assert!(f32::NAN.exp_of_negative().is_nan());
        assert_eq!(Real::erf(f32::NEG_INFINITY), -1.0);
        assert_eq!(Real::erf(1e30f32), 1.0);
        assert!(Real::erf(f32::NAN).is_nan());
        assert_eq!(Real::tanh(0f32), 0.0);
        assert_eq!(Real::erf(0f32), 0.0);
    }

    #[test]
    fn reductions_of_every_length() {
        for n in 0..70 {
            let x: Vec<f64> = (0..n).map(|i| (i as f64 * 0.7).sin()).collect();
            assert!((sum(&x) - x.iter().sum::<f64>()).abs() < 1e-12);
            assert!((dot(&x, &x) - squares_about(&x, 0.0)).abs() < 1e-12);
            let largest = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            assert_eq!(maximum(&x), largest);
            let mut e = x.clone();
            let total = vectorised(|| exponentiate(&mut e, 1.0));
            let truth: f64 = x.iter().map(|v| (v - 1.0).exp()).sum();
            assert!((total - truth).abs() < 1e-12);
        }
    }
}
