//! Means weighted by inner products of positive features that are never laid out for more than a chunk.
//!
//! ```text
//! φ_f(x) = e^{ω_f · x − decay ‖x‖²} / √count,   y_i = Σ_{j ≤ i} (φ(q_i) · φ(k_j)) v_j / t_i
//! ```
//!
//! The backward pass makes them again. With `W = ∂φ ∘ φ` of queries or keys `x`
//!
//! ```text
//! ∂x_i = Σ_f W_if ω_f − 2 decay Σ_f W_if x_i,   ∂ω_f = Σ_i W_if x_i
//! ```

use super::{Sides, add_row, along, past};
use crate::backward::Apply;
use crate::host::{self, Host, by_dtype, fused};
use crate::product::{Into, Matrix, Threads, multiply};
use crate::simd::{self, Real};
use crate::stack::Stack;
use crate::{Error, Result, Tensor, naive};
use candle_core::{CpuStorage, CustomOp3, Layout, Shape, WithDType};
use std::ops::Range;

type Candle<T> = candle_core::Result<T>;

/// How queries and keys become features, and these means.
#[derive(Clone, Debug)]
pub struct ExponentialMeans {
    /// Multiplies the squared length of a query or a key.
    pub decay: f64,
    /// Added to the sum of weights.
    pub epsilon: f64,
    /// Positions that meet each other directly.
    pub chunk: usize,
    /// `[batch, key]`, 1 = a key that is there; all of them are where absent.
    pub keep: Option<Vec<u8>>,
}

/// [`crate::causal_linear_means`] `[batch, heads, length, value_width]` of the
/// [`crate::exponential_features`] of `q` and `k` `[batch, heads, length, width]`, for `frequencies`
/// `[.., count, width]` that are broadcast to the heads of all sequences.
///
/// Memory grows with `length · (width + value_width)` and `count · (width + value_width)`, not with their
/// product.
///
/// # Errors
/// When the shapes do not fit each other.
pub fn causal_exponential_means(
    [q, k, v]: [&Tensor; 3],
    frequencies: &Tensor,
    options: &ExponentialMeans,
) -> Result<Tensor> {
    let (batch, heads, length, width) = q.dims4()?;
    let refuse = |name, found: &Tensor, expected: String| {
        Err(Error::argument(
            "exponential means",
            name,
            found.dims(),
            expected,
        ))
    };
    if k.dims() != q.dims() {
        return refuse("k", k, format!("{:?}", q.dims()));
    }
    let (v_batch, v_heads, v_length, _) = v.dims4()?;
    if (v_batch, v_heads, v_length) != (batch, heads, length) {
        return refuse("v", v, format!("[{batch}, {heads}, {length}, width]"));
    }
    let count = frequencies.dims().iter().rev().nth(1).copied().unwrap_or(0);
    let Ok(each) = frequencies.broadcast_as((batch, heads, count, width)) else {
        let expected = format!("[.., count, {width}], broadcast to [{batch}, {heads}]");
        return refuse("frequencies", frequencies, expected);
    };
    let kept = options.keep.as_ref().map_or(batch * length, Vec::len);
    if kept != batch * length {
        let expected = format!("{batch} times {length}");
        return Err(Error::argument("exponential means", "keep", kept, expected));
    }
    if !fused(&[q, k, v, frequencies]) {
        return naive::causal_exponential_means([q, k, v], frequencies, options);
    }
    // An operation has at most three arguments: keys lie behind the queries of their head.
    let both = Tensor::cat(&[q, k], 2)?;
    Ok(both.apply3(v, &each, Operation(options.clone()))?)
}

/// What makes features of queries and keys.
pub(super) struct Map<'a, T> {
    /// Frequencies of each pair, `[count, width]`.
    frequencies: Stack<'a, T>,
    decay: T,
    /// `−½ ln count`.
    shift: T,
    /// `[batch, key]`.
    keep: Option<&'a [u8]>,
    heads: usize,
}

impl<'a, T: Real> Map<'a, T> {
    /// Features of a row.
    pub(super) fn count(&self) -> usize {
        self.frequencies.rows
    }

    /// Numbers in the frequencies of a pair.
    pub(super) fn size(&self) -> usize {
        self.frequencies.rows * self.frequencies.columns
    }

    /// Features of the queries or the keys `x` of a pair.
    pub(super) fn of(&'a self, pair: usize, x: Matrix<'a, T>, are_keys: bool) -> Features<'a, T> {
        let keep = self.keep.filter(|_| are_keys);
        let batch = pair / self.heads.max(1);
        Features {
            keep: keep.map(|keep| &keep[batch * x.rows..(batch + 1) * x.rows]),
            frequencies: self.frequencies.matrix(pair),
            map: self,
            x,
        }
    }
}

/// Features of the queries or the keys of a pair.
pub(super) struct Features<'a, T> {
    pub(super) x: Matrix<'a, T>,
    frequencies: Matrix<'a, T>,
    /// Which of them are there.
    keep: Option<&'a [u8]>,
    map: &'a Map<'a, T>,
}

impl<T: Real> Features<'_, T> {
    pub(super) fn count(&self) -> usize {
        self.frequencies.rows
    }

    /// Those of some rows, packed; zeros for rows that are not there.
    pub(super) fn of_rows(&self, range: &Range<usize>) -> Vec<T> {
        let (x, count) = (self.x.part_of_rows(range), self.count());
        let mut made = host::unwritten::<T>(range.len() * count);
        product(Into::Replace, &mut made, x, self.frequencies.transposed());
        let mut row_of_x = vec![T::zero(); x.columns];
        simd::vectorised(
            #[inline(always)]
            || {
                for (row, made) in made.chunks_exact_mut(count.max(1)).enumerate() {
                    if self.keep.is_some_and(|keep| keep[range.start + row] == 0) {
                        made.fill(T::zero());
                        continue;
                    }
                    row_of_x.fill(T::zero());
                    add_row(&x, row, T::one(), &mut row_of_x);
                    let shift = self.map.shift - self.map.decay * along(&x, row, &row_of_x);
                    for value in made {
                        *value = (*value + shift).exp();
                    }
                }
            },
        );
        made
    }

    /// Writes the gradients of some rows `to`, and adds those of frequencies to `of_map`, for their features
    /// `made` and the gradient of these, which becomes `W`.
    pub(super) fn gradients(
        &self,
        range: &Range<usize>,
        made: &[T],
        slopes: &mut [T],
        (to, of_map): (&mut [T], &mut [T]),
    ) {
        let (x, count) = (self.x.part_of_rows(range), self.count());
        simd::vectorised(
            #[inline(always)]
            || {
                for (slope, &made) in slopes.iter_mut().zip(made) {
                    *slope *= made;
                }
            },
        );
        let weights = Matrix::packed(slopes, range.len(), count);
        product(Into::Replace, to, weights, self.frequencies);
        product(Into::Add, of_map, weights.transposed(), x);
        let twice = T::of(2.0) * self.map.decay;
        simd::vectorised(
            #[inline(always)]
            || {
                let rows = to.chunks_exact_mut(x.columns.max(1));
                let rows = rows.zip(weights.data.chunks_exact(count.max(1)));
                for (row, (to, weights)) in rows.enumerate() {
                    add_row(&x, row, -(twice * simd::sum(weights)), to);
                }
            },
        );
    }
}

/// `result (+)= a b`, packed.
fn product<T: Real>(into: Into, result: &mut [T], a: Matrix<T>, b: Matrix<T>) {
    let columns = b.columns;
    multiply(result, columns, into, T::one(), a, b, Threads::One);
}

struct Operation(ExponentialMeans);

impl Operation {
    /// Queries, the keys behind them, values and frequencies of all heads.
    fn sides<'a, T: Real>(
        &'a self,
        [both, v, frequencies]: [(&'a CpuStorage, &Layout); 3],
    ) -> Candle<Sides<'a, T>> {
        let (batch, heads, rows, _) = both.1.shape().dims4()?;
        let length = rows / 2;
        let [q, k] = [0, length].map(|start| both.1.narrow(2, start, length));
        let (q, k) = (q?, k?);
        let frequencies = Stack::new(frequencies.0, frequencies.1, &[batch, heads])?;
        let count = frequencies.rows.max(1) as f64;
        Ok(Sides {
            map: Some(Map {
                frequencies,
                decay: T::of(self.0.decay),
                shift: T::of(-0.5 * count.ln()),
                keep: self.0.keep.as_deref(),
                heads,
            }),
            ..Sides::new([(both.0, &q), (both.0, &k), v], self.0.epsilon)?
        })
    }
}

impl CustomOp3 for Operation {
    fn name(&self) -> &'static str {
        "exponential means"
    }

    fn cpu_fwd(
        &self,
        both: &CpuStorage,
        both_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
        frequencies: &CpuStorage,
        frequencies_layout: &Layout,
    ) -> Candle<(CpuStorage, Shape)> {
        by_dtype!(host::dtype(v), T => {
            let of = [(both, both_layout), (v, v_layout), (frequencies, frequencies_layout)];
            let y = past::forward(&self.sides::<T>(of)?, self.0.chunk);
            Ok((T::to_cpu_storage_owned(y), v_layout.shape().clone()))
        })
    }

    fn bwd(
        &self,
        both: &Tensor,
        v: &Tensor,
        frequencies: &Tensor,
        y: &Tensor,
        gradient: &Tensor,
    ) -> Candle<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let hosts = [both, v, frequencies, y, gradient].map(Host::new);
        let [both_host, v_host, frequencies_host, y, gradient] = &hosts;
        by_dtype!(v.dtype(), T => {
            let sides = self.sides::<T>([
                (both_host.storage()?, both_host.layout),
                (v_host.storage()?, v_host.layout),
                (frequencies_host.storage()?, frequencies_host.layout),
            ])?;
            let (y, gradient) = (y.ordered::<T>()?, gradient.ordered::<T>()?);
            let ([dq, dk, dv], d_map) = past::backward(&sides, self.0.chunk, &y, &gradient);
            let each = sides.q.rows * sides.q.columns;
            let mut d_both = host::unwritten::<T>(dq.len() + dk.len());
            for (pair, to) in d_both.chunks_exact_mut((2 * each).max(1)).enumerate() {
                let (of_q, of_k) = to.split_at_mut(each);
                of_q.copy_from_slice(&dq[pair * each..][..each]);
                of_k.copy_from_slice(&dk[pair * each..][..each]);
            }
            Ok((
                host::wanted(both, d_both)?,
                host::wanted(v, dv)?,
                host::wanted(frequencies, d_map)?,
            ))
        })
    }
}
