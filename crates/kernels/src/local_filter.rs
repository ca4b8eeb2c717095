//! A filter of each head, slid over tokens that lie in a line or row by row in an image: every feature
//! of a token is summed with the same feature of its neighbours, weighted by where they lie.
//!
//! ```text
//! y_i = Σ_{r, c} w_{rc} x_{i + (r, c)},   ∂x_j = Σ_{r, c} w_{rc} ∂y_{j − (r, c)},   ∂w_{rc} = Σ_i ∂y_i · x_{i + (r, c)}
//! ```
//!
//! where offsets are counted from the middle of the filter, and what lies outside is zero. A token's
//! features are read where they lie, tap by tap; nothing is laid out.

use crate::backward::Apply;
use crate::host::{self, Host, Shared, by_dtype, fused};
use crate::simd::{self, Real};
use crate::{Error, Result, Tensor, naive};
use candle_core::{CpuStorage, CustomOp2, Layout, Shape, WithDType};
use std::ops::Range;

type Candle<T> = candle_core::Result<T>;

/// `[batch, heads, length, width]` for `x` of that shape, whose tokens lie row by row in `columns`
/// columns (the last row may be short), and `filters` `[heads, high, wide]` of odd sides.
///
/// # Errors
/// When shapes do not fit, or a side is even.
///
/// ```
/// use lapidary_kernels::{Device, Tensor, local_filter};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let x = Tensor::new(&[[[[1f32], [10.0], [100.0]]]], &Device::Cpu)?;
/// let filters = Tensor::new(&[[[2f32, 1.0, 0.0]]], &Device::Cpu)?;
/// let y = local_filter(&x, &filters, 3)?.flatten_all()?.to_vec1::<f32>()?;
/// assert_eq!(y, [1.0, 12.0, 120.0]);
/// # Ok(())
/// # }
/// ```
pub fn local_filter(x: &Tensor, filters: &Tensor, columns: usize) -> Result<Tensor> {
    let (batch, heads, length, width) = x.dims4()?;
    let (of_heads, high, wide) = filters.dims3()?;
    if of_heads != heads || high % 2 == 0 || wide % 2 == 0 {
        let expected = format!("[{heads}, high, wide] with odd sides");
        return Err(Error::argument(
            "local filter",
            "filters",
            filters.dims(),
            expected,
        ));
    }
    if columns == 0 {
        return Err(Error::argument(
            "local filter",
            "columns",
            columns,
            "at least 1",
        ));
    }
    if !fused(&[x, filters]) {
        return naive::local_filter(x, filters, columns);
    }
    let operation = Filter {
        rows: batch * heads,
        heads,
        length,
        width,
        columns,
        high,
        wide,
    };
    Ok(x.apply2(filters, operation)?)
}

#[derive(Clone, Copy)]
struct Filter {
    /// Heads of all sequences.
    rows: usize,
    heads: usize,
    length: usize,
    width: usize,
    columns: usize,
    high: usize,
    wide: usize,
}

/// Tokens of one task.
const BLOCK: usize = 256;

impl Filter {
    fn taps(&self) -> usize {
        self.high * self.wide
    }

    /// The neighbour of a token under a tap, if there is one; `back` looks the other way.
    fn neighbour(&self, token: usize, tap: usize, back: bool) -> Option<usize> {
        let away = |at: usize, tap: usize, side: usize| match back {
            false => (at + tap).checked_sub(side / 2),
            true => (at + side / 2).checked_sub(tap),
        };
        let row = away(token / self.columns, tap / self.wide, self.high)?;
        let column = away(token % self.columns, tap % self.wide, self.wide)?;
        let there = row * self.columns + column;
        (column < self.columns && there < self.length).then_some(there)
    }

    /// `y` for `x`, or `∂x` for `∂y` when `back`.
    fn run<T: Real>(&self, x: &[T], filters: &[T], back: bool) -> Vec<T> {
        let mut y = vec![T::zero(); self.rows * self.length * self.width];
        let shared = Shared::new(&mut y);
        let blocks = self.length.div_ceil(BLOCK);
        let work = BLOCK * self.taps() * self.width.div_ceil(8);
        host::share(self.rows * blocks, work, |items| {
            for item in items {
                let (row, tokens) = self.block(item, blocks);
                let x = &x[row * self.length * self.width..][..self.length * self.width];
                let filter = self.of_head(filters, row);
                let start = (row * self.length + tokens.start) * self.width;
                // SAFETY: blocks are disjoint.
                let y = unsafe { shared.part(start, tokens.len() * self.width) };
                simd::vectorised(
                    #[inline(always)]
                    || {
                        for (token, y) in tokens.clone().zip(y.chunks_exact_mut(self.width.max(1)))
                        {
                            for (tap, &weight) in filter.iter().enumerate() {
                                if let Some(there) = self.neighbour(token, tap, back) {
                                    simd::add_scaled(y, self.token(x, there), weight);
                                }
                            }
                        }
                    },
                );
            }
        });
        y
    }

    /// `∂w` `[heads, taps]`: summed over the tokens of a block, then over blocks in order.
    fn of_filters<T: Real>(&self, x: &[T], gradient: &[T]) -> Vec<T> {
        let blocks = self.length.div_ceil(BLOCK);
        let taps = self.taps();
        let mut parts = vec![T::zero(); self.rows * blocks * taps];
        let shared = Shared::new(&mut parts);
        let work = BLOCK * taps * self.width.div_ceil(8);
        host::share(self.rows * blocks, work, |items| {
            for item in items {
                let (row, tokens) = self.block(item, blocks);
                let whole = row * self.length * self.width..(row + 1) * self.length * self.width;
                let (x, gradient) = (&x[whole.clone()], &gradient[whole]);
                // SAFETY: blocks are disjoint.
                let sums = unsafe { shared.part(item * taps, taps) };
                simd::vectorised(
                    #[inline(always)]
                    || {
                        for token in tokens.clone() {
                            let gradient = self.token(gradient, token);
                            for (tap, sum) in sums.iter_mut().enumerate() {
                                if let Some(there) = self.neighbour(token, tap, false) {
                                    *sum += simd::dot(gradient, self.token(x, there));
                                }
                            }
                        }
                    },
                );
            }
        });
        let mut total = vec![T::zero(); self.heads * taps];
        for (item, part) in parts.chunks_exact(taps.max(1)).enumerate() {
            let head = item / blocks.max(1) % self.heads;
            simd::add_scaled(&mut total[head * taps..(head + 1) * taps], part, T::one());
        }
        total
    }

    fn block(&self, item: usize, blocks: usize) -> (usize, Range<usize>) {
        let start = item % blocks * BLOCK;
        (item / blocks, start..self.length.min(start + BLOCK))
    }

    fn of_head<'a, T>(&self, filters: &'a [T], row: usize) -> &'a [T] {
        &filters[row % self.heads * self.taps()..][..self.taps()]
    }

    #[inline(always)]
    fn token<'a, T>(&self, x: &'a [T], token: usize) -> &'a [T] {
        &x[token * self.width..(token + 1) * self.width]
    }
}

impl CustomOp2 for Filter {
    fn name(&self) -> &'static str {
        "local filter"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        filters: &CpuStorage,
        filters_layout: &Layout,
    ) -> Candle<(CpuStorage, Shape)> {
        by_dtype!(host::dtype(x), T => {
            let x = host::ordered::<T>(x, x_layout)?;
            let filters = host::ordered::<T>(filters, filters_layout)?;
            let y = self.run(&x, &filters, false);
            Ok((T::to_cpu_storage_owned(y), x_layout.shape().clone()))
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
        let [x_all, filters_all, gradient] = &hosts;
        by_dtype!(x.dtype(), T => {
            let gradient = gradient.ordered::<T>()?;
            let of_x = self.run(&gradient, &filters_all.ordered::<T>()?, true);
            let of_filters = self.of_filters(&x_all.ordered::<T>()?, &gradient);
            Ok((
                Some(host::tensor(of_x, x.dims())?),
                Some(host::tensor(of_filters, filters.dims())?),
            ))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;
    use crate::check::gradient_error;
    use crate::test_data::{arange, compare};

    /// `(length, columns, high, wide)`: a line, images with a whole and with a short last row, a filter
    /// larger than what it lies on.
    const CASES: [(usize, usize, usize, usize); 5] = [
        (7, 7, 1, 3),
        (300, 300, 1, 5),
        (12, 4, 3, 3),
        (14, 4, 3, 5),
        (2, 2, 5, 7),
    ];

    #[test]
    fn equals_the_engines_convolution() {
        for (length, columns, high, wide) in CASES {
            compare(1e-5, |dtype| {
                let x = arange(&[2, length, 3, 5], 1.0, dtype)
                    .transpose(1, 2)
                    .unwrap();
                let filters = arange(&[3, high, wide], 2.0, dtype);
                (
                    local_filter(&x, &filters, columns).unwrap(),
                    naive::local_filter(&x, &filters, columns).unwrap(),
                )
            });
        }
    }

    #[test]
    fn gradients_equal_finite_differences() {
        for (length, columns, high, wide) in [(5, 5, 1, 3), (11, 4, 3, 3)] {
            let inputs = [
                arange(&[2, 2, length, 3], 1.0, DType::F64),
                arange(&[2, high, wide], 2.0, DType::F64),
            ];
            let filtered = |x: &[Tensor]| local_filter(&x[0], &x[1], columns);
            assert!(gradient_error(filtered, &inputs).unwrap() < 1e-7);
        }
    }

    #[test]
    fn a_filter_of_its_middle_alone_changes_nothing() {
        let x = arange(&[1, 2, 20, 4], 1.0, DType::F32);
        let middle = Tensor::new(
            &[[[0f32, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]; 2],
            x.device(),
        );
        let y = local_filter(&x, &middle.unwrap(), 6).unwrap();
        assert_eq!(
            y.flatten_all().unwrap().to_vec1::<f32>().unwrap(),
            x.flatten_all().unwrap().to_vec1::<f32>().unwrap()
        );
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let x = arange(&[1, 2, 6, 4], 1.0, DType::F32);
        let filters = |dims: &[usize]| arange(dims, 1.0, DType::F32);
        assert!(local_filter(&x, &filters(&[2, 1, 3]), 6).is_ok());
        assert!(local_filter(&x, &filters(&[2, 1, 2]), 6).is_err());
        assert!(local_filter(&x, &filters(&[3, 1, 3]), 6).is_err());
        assert!(local_filter(&x, &filters(&[2, 1, 3]), 0).is_err());
    }
}
