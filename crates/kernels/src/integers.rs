//! Softmax, GELU and norms in integers, as an accelerator without floating point computes them (I-BERT:
//! Kim et al. 2021, arXiv 2101.01321; I-ViT: Li & Gu 2022, arXiv 2207.01405).
//!
//! ```text
//! exp(x)   x = r − z ln 2, r in (−ln 2, 0]        (0.3585 (r + 1.353)² + 0.344) ≫ z
//! erf(x)   sgn(x) (1 − 0.2888 (min(|x|, 1.769) − 1.769)²)
//! GELU(x)  ½ x (1 + erf(x / √2))
//! norm(x)  d ≪ k over the integer root of the mean of d², d = n x − Σ x
//! ```
//!
//! What a function reads comes from a wide accumulator: 16 bits in steps of the row's largest number, or
//! 2048 steps to an octave below a row's largest score. What it writes has `bits`, in steps of its row's
//! largest number, or `2⁻ᵇⁱᵗˢ` for weights. Between the two stand sums, products, shifts and divisions of
//! integers; steps are constants that multiply through. Nothing here has a gradient.

use crate::{DType, Error, Result, Tensor};

/// Steps of a score between two powers of two of its exponential, as a power of two.
const OCTAVE_BITS: u32 = 11;
/// Octaves below the largest score of a row, behind which an exponential is nothing.
const OCTAVES: i64 = 31;
/// `a (r + b)² + c` for `exp(r)`.
const EXPONENTIAL: [f64; 3] = [0.3585, 1.353, 0.344];
/// `1 − a (min(|x|, b) − b)²` for `erf(|x|)`.
const ERROR_FUNCTION: [f64; 2] = [0.2888, 1.769];
/// Largest integer that a function reads.
const READ: f64 = 32767.0;
/// Bits that erf's 1 has at least, however coarse the steps that are read.
const ONE_BITS: i32 = 15;
/// The finest steps that GELU and norms read in, so that their squares fit their accumulators.
const FINEST: [f64; 2] = [1e-6, 1e-12];
/// Bits behind the point of a standard deviation, and of what it divides.
const ROOT_BITS: u32 = 8;
const NORMAL_BITS: u32 = 15;

/// Functions of integers that write `bits` bits.
///
/// ```
/// use lapidary_kernels::{Device, IntegerFunctions, Tensor};
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let functions = IntegerFunctions::new(8)?;
/// let scores = Tensor::new(&[[1f64, 1.0, f64::NEG_INFINITY, 1.0]], &Device::Cpu)?;
/// // A third is 85 of 256.
/// let third = 85.0 / 256.0;
/// assert_eq!(functions.softmax(&scores)?.to_vec2::<f64>()?, [[third, third, 0.0, third]]);
/// assert!(IntegerFunctions::new(1).is_err());
/// # Ok(()) }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IntegerFunctions {
    bits: u32,
}

impl IntegerFunctions {
    /// Functions that write integers of `bits`.
    ///
    /// # Errors
    /// When these are not 2 to 16.
    pub fn new(bits: u32) -> Result<Self> {
        match (2..=16).contains(&bits) {
            true => Ok(Self { bits }),
            false => Err(Error::argument(
                "integer functions",
                "bits",
                bits,
                "2 to 16",
            )),
        }
    }

    /// Bits of what is written.
    pub fn bits(self) -> u32 {
        self.bits
    }

    /// Softmax over the last dimension. What is `−∞` gets nothing, and so does a row of nothing else. A row
    /// with what is no number, or has overflowed, holds no numbers; this holds for the other functions too.
    ///
    /// # Errors
    /// Those of the tensor engine.
    pub fn softmax(self, scores: &Tensor) -> Result<Tensor> {
        by_rows(scores, |row| self.softmax_row(row))
    }

    /// GELU.
    ///
    /// # Errors
    /// Those of the tensor engine.
    pub fn gelu(self, x: &Tensor) -> Result<Tensor> {
        by_rows(x, |row| self.gelu_row(row))
    }

    /// `γ (x − mean) / √(variance + ε) + β` over the last dimension.
    ///
    /// # Errors
    /// Those of the tensor engine.
    pub fn layer_norm(
        self,
        x: &Tensor,
        weight: Option<&Tensor>,
        bias: Option<&Tensor>,
        epsilon: f64,
    ) -> Result<Tensor> {
        self.norm(x, true, weight, bias, epsilon)
    }

    /// `γ x / √(mean(x²) + ε)` over the last dimension.
    ///
    /// # Errors
    /// Those of the tensor engine.
    pub fn rms_norm(self, x: &Tensor, weight: Option<&Tensor>, epsilon: f64) -> Result<Tensor> {
        self.norm(x, false, weight, None, epsilon)
    }

    fn norm(
        self,
        x: &Tensor,
        centred: bool,
        weight: Option<&Tensor>,
        bias: Option<&Tensor>,
        epsilon: f64,
    ) -> Result<Tensor> {
        let mut y = by_rows(x, |row| normalised(row, centred, epsilon))?;
        if let Some(weight) = weight {
            y = y.broadcast_mul(&weight.detach())?;
        }
        if let Some(bias) = bias {
            y = y.broadcast_add(&bias.detach())?;
        }
        by_rows(&y, |row| self.written(row))
    }

    fn softmax_row(self, row: &mut [f64]) {
        if is_lost(row, |x| x < f64::INFINITY) {
            return;
        }
        let largest = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        if largest == f64::NEG_INFINITY {
            row.fill(0.0);
            return;
        }
        let octave = 1i64 << OCTAVE_BITS;
        let step = std::f64::consts::LN_2 / octave as f64;
        let lowest = -(OCTAVES * octave);
        let read = |x: f64| ((x - largest) / step).round().max(lowest as f64) as i64;
        let exponentials: Vec<u64> = row.iter().map(|x| exponential(read(*x), step)).collect();
        let sum = exponentials.iter().sum::<u64>().max(1);
        for (weight, exponential) in row.iter_mut().zip(exponentials) {
            *weight = ((exponential << self.bits) / sum) as f64 / f64::from(1u32 << self.bits);
        }
    }

    fn gelu_row(self, row: &mut [f64]) {
        if is_lost(row, f64::is_finite) {
            return;
        }
        let (integers, step) = read(row, FINEST[0]);
        let [a, b] = ERROR_FUNCTION;
        let inner = step * std::f64::consts::FRAC_1_SQRT_2;
        // Where the square of a step is a large part of erf's 1, its parts are shifted by this much.
        let square = a * inner * inner;
        let shift = (square.log2().ceil() as i32)
            .saturating_add(ONE_BITS)
            .max(0);
        let unit = square / 2f64.powi(shift);
        let (bound, one) = ((b / inner).round() as i64, (1.0 / unit).round() as i64);
        for (value, q) in row.iter_mut().zip(integers) {
            let short = q.abs().min(bound) - bound;
            // Steps beyond erf's bound leave nothing to be shifted.
            let lacking = match short {
                0 => 0,
                short => (short * short) << shift,
            };
            let erf = q.signum() * (one - lacking);
            *value = (q * (one + erf)) as f64 * (0.5 * step * unit);
        }
        self.written(row);
    }

    /// The row in steps of its largest number.
    fn written(self, row: &mut [f64]) {
        let top = f64::from((1u32 << (self.bits - 1)) - 1);
        let step = row.iter().fold(0.0f64, |most, x| most.max(x.abs())) / top;
        if step > 0.0 {
            for value in row {
                *value = (*value / step).round() * step;
            }
        }
    }
}

/// Whether a row holds what is not a number as it should be: then it holds none any more. Steps of its
/// largest number would hide it.
fn is_lost(row: &mut [f64], should_be: impl Fn(f64) -> bool) -> bool {
    let lost = row.iter().any(|x| !should_be(*x));
    if lost {
        row.fill(f64::NAN);
    }
    lost
}

/// `x` in steps of its largest number, which are no finer than `finest`.
fn read(x: &[f64], finest: f64) -> (Vec<i64>, f64) {
    let largest = x.iter().fold(0.0f64, |most, x| most.max(x.abs()));
    let step = (largest / READ).max(finest);
    (x.iter().map(|x| (x / step).round() as i64).collect(), step)
}

/// `exp(q step)` in steps of `a step²`, for `q` not above 0 and a whole number of steps to an octave.
fn exponential(q: i64, step: f64) -> u64 {
    let [a, b, c] = EXPONENTIAL;
    let octaves = (-q) >> OCTAVE_BITS;
    let rest = q + (octaves << OCTAVE_BITS);
    let (b, c) = (
        (b / step).round() as i64,
        (c / (a * step * step)).round() as i64,
    );
    (((rest + b) * (rest + b) + c) >> octaves) as u64
}

/// A row over its standard deviation, or over its root mean square.
fn normalised(row: &mut [f64], centred: bool, epsilon: f64) {
    if is_lost(row, f64::is_finite) {
        return;
    }
    let (integers, step) = read(row, FINEST[1]);
    let count = row.len() as i64;
    let sum: i64 = if centred { integers.iter().sum() } else { 0 };
    let from_mean: Vec<i128> = integers
        .iter()
        .map(|q| i128::from(count * q - sum))
        .collect();
    let squares: u128 = from_mean.iter().map(|d| d.unsigned_abs().pow(2)).sum();
    let n = count as f64;
    let epsilon = (epsilon * n * n / (step * step)).round() as u128;
    let variance = squares / count.max(1) as u128 + epsilon;
    let deviation = integer_root(variance << (2 * ROOT_BITS)).max(1) as i128;
    for (value, d) in row.iter_mut().zip(from_mean) {
        let quotient = (d << (ROOT_BITS + NORMAL_BITS)) / deviation;
        *value = quotient as f64 / f64::from(1u32 << NORMAL_BITS);
    }
}

/// The largest integer whose square is at most `n`, by Newton's steps from above.
fn integer_root(n: u128) -> u128 {
    if n == 0 {
        return 0;
    }
    // A power of two that is not below the root.
    let mut root = 1u128 << (128 - n.leading_zeros()).div_ceil(2);
    loop {
        let next = (root + n / root) / 2;
        if next >= root {
            return root;
        }
        root = next;
    }
}

fn by_rows(x: &Tensor, row: impl Fn(&mut [f64])) -> Result<Tensor> {
    let width = x.dims().last().copied().unwrap_or(1).max(1);
    let flat = x.detach().flatten_all()?.to_dtype(DType::F64)?;
    let mut values = flat.to_vec1::<f64>()?;
    values.chunks_mut(width).for_each(row);
    Ok(Tensor::from_vec(values, x.dims(), x.device())?.to_dtype(x.dtype())?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Activation, Device, SoftmaxMask, naive};
    use proptest::prelude::*;

    const WIDTH: usize = 8;
    const BITS: [u32; 3] = [8, 12, 16];

    fn tensor(x: &[f64]) -> Tensor {
        Tensor::from_slice(x, (x.len() / WIDTH, WIDTH), &Device::Cpu).unwrap()
    }

    fn numbers(x: &Tensor) -> Vec<f64> {
        x.flatten_all().unwrap().to_vec1().unwrap()
    }

    fn largest(x: &[f64]) -> f64 {
        x.iter().fold(0.0, |most, x| most.max(x.abs()))
    }

    /// Half a step of what is written.
    fn half_step(row: &[f64], bits: u32) -> f64 {
        0.5 * largest(row) / f64::from((1u32 << (bits - 1)) - 1)
    }

    proptest! {
        #[test]
        fn the_integer_root_is_the_root(n in any::<u64>(), shift in 0u32..60) {
            let n = u128::from(n) << shift;
            let root = integer_root(n);
            prop_assert!(root * root <= n && n < (root + 1) * (root + 1));
        }

        /// The parabola is off by 3.1·10⁻³ of an exponential at most; half a step of the score and of the
        /// parabola's constants come to less than 1.5 steps more. The shift takes less than `a s²`, and the
        /// division less than a step of what is written.
        #[test]
        fn the_softmax_is_within_its_bound(
            x in prop::collection::vec(-12.0f64..12.0, 2 * WIDTH),
        ) {
            let exact = numbers(&naive::softmax(&tensor(&x), &SoftmaxMask::default()).unwrap());
            let step = std::f64::consts::LN_2 / 2048.0;
            let relative = 3.2e-3 + 1.5 * step;
            for bits in BITS {
                let found = numbers(&IntegerFunctions { bits }.softmax(&tensor(&x)).unwrap());
                let bound = 2.1 * relative + 1e-5 + 0.5f64.powi(bits as i32);
                for (found, exact) in found.iter().zip(&exact) {
                    prop_assert!((found - exact).abs() <= bound, "{found} {exact}, {bits} bits");
                }
                for row in found.chunks(WIDTH) {
                    let sum: f64 = row.iter().sum();
                    let lost = WIDTH as f64 * 0.5f64.powi(bits as i32);
                    prop_assert!(sum <= 1.0 && sum > 1.0 - lost, "{sum}");
                }
            }
        }

        /// The parabola is off by 0.0182 at most (0.018 in the paper). GELU's slope is below 1.13; half a step
        /// of the parabola's edge moves erf by half a step of its argument, its units by two of their own.
        #[test]
        fn gelu_is_within_its_bound(
            x in prop::collection::vec(-6.0f64..6.0, 2 * WIDTH),
            scale in 0.01f64..4.0,
        ) {
            let x: Vec<f64> = x.iter().map(|x| x * scale).collect();
            let exact = numbers(&naive::activate(&tensor(&x), Activation::Gelu).unwrap());
            for bits in BITS {
                let found = numbers(&IntegerFunctions { bits }.gelu(&tensor(&x)).unwrap());
                let rows = x.chunks(WIDTH).zip(found.chunks(WIDTH).zip(exact.chunks(WIDTH)));
                for (x, (found, exact)) in rows {
                    let step = (largest(x) / READ).max(FINEST[0]);
                    let inner = step / std::f64::consts::SQRT_2;
                    let erf = 0.52 * inner + 2.0 * ERROR_FUNCTION[0] * inner * inner;
                    let bound = 0.0182 + 1.13 * step / 2.0 + 0.5 * largest(x) * erf;
                    // What is written is in steps of a largest number that may be off by the bound.
                    let bound = bound + half_step(exact, bits) + bound * half_step(&[1.0], bits);
                    for (found, exact) in found.iter().zip(exact) {
                        prop_assert!((found - exact).abs() <= bound + 1e-12, "{found} {exact}");
                    }
                }
            }
        }

        /// Half a step of each number moves a standard deviation by half a step at most, and a number's
        /// distance from the mean by a whole one.
        #[test]
        fn norms_are_within_their_bounds(
            x in prop::collection::vec(-3.0f64..3.0, 2 * WIDTH),
            shift in -2.0f64..2.0,
            scale in 1e-3f64..1e3,
        ) {
            let x: Vec<f64> = x.iter().map(|x| scale * (x + shift)).collect();
            let epsilon = 1e-5;
            for bits in BITS {
                let functions = IntegerFunctions { bits };
                let pairs = [
                    (
                        functions.layer_norm(&tensor(&x), None, None, epsilon).unwrap(),
                        naive::layer_norm(&tensor(&x), None, None, epsilon).unwrap(),
                        true,
                    ),
                    (
                        functions.rms_norm(&tensor(&x), None, epsilon).unwrap(),
                        naive::rms_norm(&tensor(&x), None, epsilon).unwrap(),
                        false,
                    ),
                ];
                for (found, exact, centred) in pairs {
                    let (found, exact) = (numbers(&found), numbers(&exact));
                    let rows = x.chunks(WIDTH).zip(found.chunks(WIDTH).zip(exact.chunks(WIDTH)));
                    for (x, (found, exact)) in rows {
                        let step = largest(x) / READ;
                        let mean = match centred {
                            true => x.iter().sum::<f64>() / WIDTH as f64,
                            false => 0.0,
                        };
                        let squares = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>();
                        let deviation = (squares / WIDTH as f64 + epsilon).sqrt() - step / 2.0;
                        // Rows that hardly vary are lost in the steps that are read.
                        prop_assume!(deviation > 10.0 * step);
                        let most = largest(exact);
                        let read = 1.01 * (1.0 + most / 2.0) * step / deviation + 1e-4;
                        let bound = read + half_step(exact, bits) + read * half_step(&[1.0], bits);
                        for (found, exact) in found.iter().zip(exact) {
                            prop_assert!((found - exact).abs() <= bound, "{found} {exact}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn exponentials_are_within_their_bound() {
        let step = std::f64::consts::LN_2 / 2048.0;
        let unit = EXPONENTIAL[0] * step * step;
        for q in (-20 * 2048)..=0 {
            let exact = (q as f64 * step).exp();
            let found = exponential(q, step) as f64 * unit;
            assert!(
                (found - exact).abs() <= (3.2e-3 + step) * exact + unit,
                "{q}: {found} {exact}"
            );
        }
    }

    #[test]
    fn zeros_and_what_nobody_sees_stay_zeros() {
        let functions = IntegerFunctions::new(8).unwrap();
        let zeros = tensor(&[0.0; WIDTH]);
        assert_eq!(numbers(&functions.gelu(&zeros).unwrap()), [0.0; WIDTH]);
        let normal = functions.layer_norm(&zeros, None, None, 0.0).unwrap();
        assert_eq!(numbers(&normal), [0.0; WIDTH]);
        let hidden = tensor(&[f64::NEG_INFINITY; WIDTH]);
        assert_eq!(numbers(&functions.softmax(&hidden).unwrap()), [0.0; WIDTH]);
        assert!(IntegerFunctions::new(17).is_err());
    }

    #[test]
    fn what_is_no_number_stays_none() {
        let functions = IntegerFunctions::new(8).unwrap();
        let row = |of: f64| tensor(&[1.0, -2.0, of, 3.0, -1.0, 0.0, 2.0, -0.5]);
        for of in [f64::NAN, f64::INFINITY] {
            for y in [
                functions.softmax(&row(of)),
                functions.gelu(&row(of)),
                functions.layer_norm(&row(of), None, None, 1e-5),
                functions.rms_norm(&row(of), None, 1e-5),
            ] {
                assert!(numbers(&y.unwrap()).iter().all(|x| x.is_nan()), "{of}");
            }
        }
        let weights = numbers(&functions.softmax(&row(f64::NEG_INFINITY)).unwrap());
        assert!(weights[2] == 0.0 && weights[3] > 0.5, "{weights:?}");
    }

    /// Steps that reach beyond the error function's parabola, and far beyond it.
    #[test]
    fn gelu_of_large_numbers_is_themselves_or_nothing() {
        let functions = IntegerFunctions::new(16).unwrap();
        for large in [1e4, 1e5, 2e5, 1e9, 1e30] {
            let x = tensor(&[large, -large, 0.0, 0.5 * large, -0.5 * large, 0.0, 0.0, 0.0]);
            let y = numbers(&functions.gelu(&x).unwrap());
            for (at, expected) in [(0, 1.0), (1, 0.0), (2, 0.0), (3, 0.5), (4, 0.0)] {
                assert!((y[at] / large - expected).abs() < 1e-3, "{large}: {y:?}");
            }
        }
    }

    /// Gains and shifts are applied before what is written is rounded.
    #[test]
    fn norms_have_gains_and_shifts() {
        let functions = IntegerFunctions::new(16).unwrap();
        let x = tensor(&[1.0, -2.0, 0.5, 3.0, -1.0, 0.0, 2.0, -0.5]);
        let row = |factor: f64| {
            let values: Vec<f64> = (0..WIDTH).map(|i| factor * (i as f64 - 3.0)).collect();
            Tensor::from_vec(values, WIDTH, &Device::Cpu).unwrap()
        };
        let (gain, shift) = (row(0.5), row(-0.2));
        let found = functions.layer_norm(&x, Some(&gain), Some(&shift), 1e-5);
        let exact = naive::layer_norm(&x, Some(&gain), Some(&shift), 1e-5).unwrap();
        for (found, exact) in numbers(&found.unwrap()).iter().zip(numbers(&exact)) {
            assert!((found - exact).abs() < 2e-3, "{found} {exact}");
        }
    }
}
