//! A pair of filters of each channel along tokens, one number in two kept, and the transposed map: a level
//! of a wavelet transform and its inverse.
//!
//! ```text
//! z_{s m} = Σ_t f_{s t} x_{2m+t},   x_i = Σ_s Σ_{m, t: 2m+t = i} f_{s t} z_{s m},   ∂f_{s t} = Σ_m z_{s m} x_{2m+t}
//! ```
//!
//! on a circle of an even length, for the sides `s` (averages, then details). Either map is the other's
//! gradient, and both have the same gradient of filters. Channels lie side by side, so that a tap is one
//! product of rows; nothing is laid out, and tokens are read where they lie.

use crate::backward::Apply;
use crate::host::{self, Host, Shared, by_dtype, fused};
use crate::simd::{self, Real};
use crate::{Error, Result, Tensor, naive};
use candle_core::{CpuStorage, CustomOp2, Layout, Shape, WithDType};
use std::ops::Range;

type Candle<T> = candle_core::Result<T>;

/// The first `count` averages and details `[2, batch, count, channels]` of `x`
/// `[batch, length, channels]`, of an even length, by `filters` `[2, taps, channels]`.
///
/// # Errors
/// When shapes do not fit, the length is odd, or `count` is above half of it.
///
/// ```
/// use lapidary_kernels::{Device, Tensor, wavelet_analysis};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let x = Tensor::new(&[[[1f32], [2.0], [10.0], [20.0]]], &Device::Cpu)?;
/// let sums_and_differences = Tensor::new(&[[[1f32], [1.0]], [[-1.0], [1.0]]], &Device::Cpu)?;
/// let z = wavelet_analysis(&x, &sums_and_differences, 2)?;
/// assert_eq!(z.flatten_all()?.to_vec1::<f32>()?, [3.0, 30.0, 1.0, 10.0]);
/// # Ok(())
/// # }
/// ```
pub fn wavelet_analysis(x: &Tensor, filters: &Tensor, count: usize) -> Result<Tensor> {
    let (batch, length, channels) = x.dims3()?;
    let bank = Bank::new(
        "wavelet analysis",
        filters,
        [batch, length, count, channels],
    )?;
    if !fused(&[x, filters]) {
        return naive::wavelet_analysis(x, filters, count);
    }
    Ok(x.apply2(filters, Analysis(bank))?)
}

/// The transposed map of [`wavelet_analysis`], its inverse where filters are orthonormal and the halves
/// whole: `[batch, length, channels]` for `halves` `[2, batch, count, channels]`.
///
/// # Errors
/// When shapes do not fit, the length is odd, or there are more numbers in a half than half of it.
pub fn wavelet_synthesis(halves: &Tensor, filters: &Tensor, length: usize) -> Result<Tensor> {
    const NAME: &str = "wavelet synthesis";
    let (sides, batch, count, channels) = halves.dims4()?;
    if sides != 2 {
        let expected = format!("[2, {batch}, {count}, {channels}]");
        return Err(Error::argument(NAME, "halves", halves.dims(), expected));
    }
    let bank = Bank::new(NAME, filters, [batch, length, count, channels])?;
    if !fused(&[halves, filters]) {
        return naive::wavelet_synthesis(halves, filters, length);
    }
    Ok(halves.apply2(filters, Synthesis(bank))?)
}

/// Sizes of a level.
#[derive(Clone, Copy)]
struct Bank {
    batch: usize,
    length: usize,
    count: usize,
    channels: usize,
    taps: usize,
}

/// Rows of one task.
const BLOCK: usize = 64;

/// Coefficients whose share of a filter's gradient is one sum.
const GRADIENT_BLOCK: usize = 512;

impl Bank {
    fn new(
        operation: &'static str,
        filters: &Tensor,
        [batch, length, count, channels]: [usize; 4],
    ) -> Result<Self> {
        let (sides, taps, of_channels) = filters.dims3()?;
        if sides != 2 || of_channels != channels {
            let expected = format!("[2, taps, {channels}]");
            return Err(Error::argument(
                operation,
                "filters",
                filters.dims(),
                expected,
            ));
        }
        if !length.is_multiple_of(2) {
            return Err(Error::argument(operation, "length", length, "even"));
        }
        if count > length / 2 {
            let expected = format!("at most {}", length / 2);
            return Err(Error::argument(operation, "count", count, expected));
        }
        Ok(Self {
            batch,
            length,
            count,
            channels,
            taps,
        })
    }

    /// Work of a row of coefficients or of two of tokens.
    fn work(&self) -> usize {
        2 * self.taps * self.channels.div_ceil(8)
    }

    /// `z` `[2, batch, count, channels]` for `x` `[batch, length, channels]`.
    fn halves<T: Real>(&self, x: &[T], filters: &[T]) -> Vec<T> {
        let Self { count, taps, .. } = *self;
        let half = self.batch * count * self.channels;
        let mut z = vec![T::zero(); 2 * half];
        let shared = Shared::new(&mut z);
        let blocks = count.div_ceil(BLOCK);
        host::share(self.batch * blocks, BLOCK * self.work(), |items| {
            for item in items {
                let (sequence, places) = block(item, blocks, BLOCK, count);
                let start = (sequence * count + places.start) * self.channels;
                let size = places.len() * self.channels;
                // SAFETY: blocks are disjoint, and so are the two halves.
                let low = unsafe { shared.part(start, size) };
                // SAFETY: as above.
                let high = unsafe { shared.part(half + start, size) };
                let width = self.channels.max(1);
                simd::vectorised(
                    #[inline(always)]
                    || {
                        let rows = low.chunks_exact_mut(width);
                        let rows = rows.zip(high.chunks_exact_mut(width));
                        for (place, (low, high)) in places.clone().zip(rows) {
                            for tap in 0..taps {
                                let token = (2 * place + tap) % self.length;
                                let x = self.row(x, sequence * self.length + token);
                                add_products(low, x, self.row(filters, tap));
                                add_products(high, x, self.row(filters, taps + tap));
                            }
                        }
                    },
                );
            }
        });
        z
    }

    /// `x` `[batch, length, channels]` for `z` `[2, batch, count, channels]`.
    fn whole<T: Real>(&self, z: &[T], filters: &[T]) -> Vec<T> {
        let Self { length, taps, .. } = *self;
        let mut x = vec![T::zero(); self.batch * length * self.channels];
        let shared = Shared::new(&mut x);
        let blocks = length.div_ceil(BLOCK);
        host::share(self.batch * blocks, BLOCK / 2 * self.work(), |items| {
            for item in items {
                let (sequence, tokens) = block(item, blocks, BLOCK, length);
                let start = (sequence * length + tokens.start) * self.channels;
                // SAFETY: blocks are disjoint.
                let x = unsafe { shared.part(start, tokens.len() * self.channels) };
                let width = self.channels.max(1);
                simd::vectorised(
                    #[inline(always)]
                    || {
                        for (token, x) in tokens.clone().zip(x.chunks_exact_mut(width)) {
                            let mut tap = token % 2;
                            while tap < taps {
                                let place = self.place(token, tap);
                                if place < self.count {
                                    let low = sequence * self.count + place;
                                    let high = self.batch * self.count + low;
                                    add_products(x, self.row(z, low), self.row(filters, tap));
                                    let filter = self.row(filters, taps + tap);
                                    add_products(x, self.row(z, high), filter);
                                }
                                tap += 2;
                            }
                        }
                    },
                );
            }
        });
        x
    }

    /// The `m` on the circle of which `2m + tap = token`, both even or both odd.
    #[inline(always)]
    fn place(&self, token: usize, tap: usize) -> usize {
        // Whole turns, so that nothing is negative.
        (token + self.taps * self.length - tap) / 2 % (self.length / 2)
    }

    /// `∂f` `[2, taps, channels]`: summed over the coefficients of a block, then over blocks in order.
    fn of_filters<T: Real>(&self, x: &[T], z: &[T]) -> Vec<T> {
        let Self { count, taps, .. } = *self;
        let size = 2 * taps * self.channels;
        let blocks = count.div_ceil(GRADIENT_BLOCK);
        let mut parts = vec![T::zero(); self.batch * blocks * size];
        let shared = Shared::new(&mut parts);
        let work = GRADIENT_BLOCK * self.work();
        host::share(self.batch * blocks, work, |items| {
            for item in items {
                let (sequence, places) = block(item, blocks, GRADIENT_BLOCK, count);
                // SAFETY: each block has sums of its own.
                let sums = unsafe { shared.part(item * size, size) };
                let width = self.channels.max(1);
                simd::vectorised(
                    #[inline(always)]
                    || {
                        for place in places.clone() {
                            let low = self.row(z, sequence * count + place);
                            let high = self.row(z, (self.batch + sequence) * count + place);
                            let (lows, highs) = sums.split_at_mut(taps * self.channels);
                            let rows = lows.chunks_exact_mut(width);
                            let rows = rows.zip(highs.chunks_exact_mut(width));
                            for (tap, (of_low, of_high)) in rows.enumerate() {
                                let token = (2 * place + tap) % self.length;
                                let x = self.row(x, sequence * self.length + token);
                                add_products(of_low, x, low);
                                add_products(of_high, x, high);
                            }
                        }
                    },
                );
            }
        });
        let mut total = vec![T::zero(); size];
        for part in parts.chunks_exact(size.max(1)) {
            simd::add_scaled(&mut total, part, T::one());
        }
        total
    }

    #[inline(always)]
    fn row<'a, T>(&self, rows: &'a [T], row: usize) -> &'a [T] {
        &rows[row * self.channels..(row + 1) * self.channels]
    }
}

/// The sequence and the rows of a task, of `blocks` for each sequence of `count` rows.
fn block(item: usize, blocks: usize, rows: usize, count: usize) -> (usize, Range<usize>) {
    let start = item % blocks * rows;
    (item / blocks, start..count.min(start + rows))
}

/// `y_c += x_c f_c`.
#[inline(always)]
fn add_products<T: Real>(y: &mut [T], x: &[T], factors: &[T]) {
    for ((y, x), factor) in y.iter_mut().zip(x).zip(factors) {
        *y = x.mul_add(*factor, *y);
    }
}

struct Analysis(Bank);

impl CustomOp2 for Analysis {
    fn name(&self) -> &'static str {
        "wavelet analysis"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        filters: &CpuStorage,
        filters_layout: &Layout,
    ) -> Candle<(CpuStorage, Shape)> {
        let bank = self.0;
        by_dtype!(host::dtype(x), T => {
            let x = host::ordered::<T>(x, x_layout)?;
            let filters = host::ordered::<T>(filters, filters_layout)?;
            let z = bank.halves(&x, &filters);
            let shape = Shape::from((2, bank.batch, bank.count, bank.channels));
            Ok((T::to_cpu_storage_owned(z), shape))
        })
    }

    fn bwd(
        &self,
        x: &Tensor,
        filters: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Candle<(Option<Tensor>, Option<Tensor>)> {
        let hosts = [x, filters, gradient].map(Host::new);
        let [x_host, filters_host, gradient] = &hosts;
        by_dtype!(x.dtype(), T => {
            let gradient = gradient.ordered::<T>()?;
            let of_x = match x.track_op() {
                true => Some(host::tensor(
                    self.0.whole(&gradient, &filters_host.ordered::<T>()?),
                    x.dims(),
                )?),
                false => None,
            };
            let of_filters = match filters.track_op() {
                true => Some(host::tensor(
                    self.0.of_filters(&x_host.ordered::<T>()?, &gradient),
                    filters.dims(),
                )?),
                false => None,
            };
            Ok((of_x, of_filters))
        })
    }
}

struct Synthesis(Bank);

impl CustomOp2 for Synthesis {
    fn name(&self) -> &'static str {
        "wavelet synthesis"
    }

    fn cpu_fwd(
        &self,
        z: &CpuStorage,
        z_layout: &Layout,
        filters: &CpuStorage,
        filters_layout: &Layout,
    ) -> Candle<(CpuStorage, Shape)> {
        let bank = self.0;
        by_dtype!(host::dtype(z), T => {
            let z = host::ordered::<T>(z, z_layout)?;
            let filters = host::ordered::<T>(filters, filters_layout)?;
            let x = bank.whole(&z, &filters);
            let shape = Shape::from((bank.batch, bank.length, bank.channels));
            Ok((T::to_cpu_storage_owned(x), shape))
        })
    }

    fn bwd(
        &self,
        z: &Tensor,
        filters: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Candle<(Option<Tensor>, Option<Tensor>)> {
        let hosts = [z, filters, gradient].map(Host::new);
        let [z_host, filters_host, gradient] = &hosts;
        by_dtype!(z.dtype(), T => {
            let gradient = gradient.ordered::<T>()?;
            let of_z = match z.track_op() {
                true => Some(host::tensor(
                    self.0.halves(&gradient, &filters_host.ordered::<T>()?),
                    z.dims(),
                )?),
                false => None,
            };
            let of_filters = match filters.track_op() {
                true => Some(host::tensor(
                    self.0.of_filters(&gradient, &z_host.ordered::<T>()?),
                    filters.dims(),
                )?),
                false => None,
            };
            Ok((of_z, of_filters))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;
    use crate::check::gradient_error;
    use crate::test_data::{arange, compare};

    /// `(length, count, taps, channels)`: whole halves and parts of them, filters longer than the circle, an
    /// odd number of taps, more rows than a task has.
    const CASES: [(usize, usize, usize, usize); 5] = [
        (6, 3, 2, 1),
        (10, 3, 4, 19),
        (2, 1, 8, 3),
        (12, 6, 5, 7),
        (300, 150, 8, 5),
    ];

    #[test]
    fn equal_the_compositions() {
        for (length, count, taps, channels) in CASES {
            compare(1e-5, |dtype| {
                // Neither lies in order.
                let x = arange(&[2, channels, length], 1.0, dtype);
                let x = x.transpose(1, 2).unwrap();
                let filters = arange(&[2, channels, taps], 2.0, dtype);
                let filters = filters.transpose(1, 2).unwrap();
                (
                    wavelet_analysis(&x, &filters, count).unwrap(),
                    naive::wavelet_analysis(&x, &filters, count).unwrap(),
                )
            });
            compare(1e-5, |dtype| {
                let z = arange(&[2, 2, channels, count], 1.0, dtype);
                let z = z.transpose(2, 3).unwrap();
                let filters = arange(&[2, taps, channels], 2.0, dtype);
                (
                    wavelet_synthesis(&z, &filters, length).unwrap(),
                    naive::wavelet_synthesis(&z, &filters, length).unwrap(),
                )
            });
        }
    }

    #[test]
    fn gradients_equal_finite_differences() {
        for (length, count, taps) in [(6, 3, 4), (8, 2, 3), (2, 1, 6)] {
            let filters = arange(&[2, taps, 3], 2.0, DType::F64);
            let x = arange(&[2, length, 3], 1.0, DType::F64);
            let analysed = |x: &[Tensor]| wavelet_analysis(&x[0], &x[1], count);
            assert!(gradient_error(analysed, &[x, filters.clone()]).unwrap() < 1e-7);
            let z = arange(&[2, 2, count, 3], 1.0, DType::F64);
            let synthesised = |x: &[Tensor]| wavelet_synthesis(&x[0], &x[1], length);
            assert!(gradient_error(synthesised, &[z, filters]).unwrap() < 1e-7);
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let x = arange(&[1, 6, 4], 1.0, DType::F32);
        let filters = |dims: &[usize]| arange(dims, 1.0, DType::F32);
        assert!(wavelet_analysis(&x, &filters(&[2, 3, 4]), 3).is_ok());
        assert!(wavelet_analysis(&x, &filters(&[2, 3, 4]), 4).is_err());
        assert!(wavelet_analysis(&x, &filters(&[1, 3, 4]), 3).is_err());
        assert!(wavelet_analysis(&x, &filters(&[2, 3, 5]), 3).is_err());
        let odd = x.narrow(1, 0, 5).unwrap();
        assert!(wavelet_analysis(&odd, &filters(&[2, 3, 4]), 2).is_err());
        let z = arange(&[2, 1, 3, 4], 1.0, DType::F32);
        assert!(wavelet_synthesis(&z, &filters(&[2, 3, 4]), 6).is_ok());
        assert!(wavelet_synthesis(&z, &filters(&[2, 3, 4]), 7).is_err());
        assert!(wavelet_synthesis(&z, &filters(&[2, 3, 4]), 4).is_err());
        let three = arange(&[3, 1, 3, 4], 1.0, DType::F32);
        assert!(wavelet_synthesis(&three, &filters(&[2, 3, 4]), 6).is_err());
    }
}
