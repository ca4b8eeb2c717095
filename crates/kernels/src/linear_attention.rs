//! Attention whose scores are inner products, so that keys and values meet first: sums over all
//! earlier or later positions in time linear in their number, with a decay (Katharopoulos et al.,
//! "Transformers are RNNs", arXiv 2006.16236, for the sums; Yang et al., "Gated Linear Attention
//! Transformers with Hardware-Efficient Training", arXiv 2312.06635, for chunks with decay).
//!
//! ```text
//! past:    y_i = Σ_{j ≤ i} e^{a_{j+1} + … + a_i} (q_i · k_j) v_j
//! future:  y_i = Σ_{j ≥ i} e^{a_{i+1} + … + a_j} (q_i · k_j) v_j
//! ```
//!
//! A chunk of positions reads what came before it from one matrix `S = Σ_j … k_j v_jᵀ`, and meets
//! itself with its scores laid out. Backward: with `M_ij` for what stands before the inner product,
//! `∂q_i = Σ_j M_ij (∂y_i · v_j) k_j`, `∂k_j = Σ_i M_ij (v_j · ∂y_i) q_i` and
//! `∂v_j = Σ_i M_ij (k_j · q_i) ∂y_i` are sums of the same two kinds, and with
//! `C_i = a_0 + … + a_i` on the past `∂C_i = q_i · ∂q_i − k_i · ∂k_i`, on the future its negative.

use crate::backward::Apply;
use crate::host::{self, Host, Shared, by_dtype, fused};
use crate::product::{Into, Matrix, Threads, multiply};
use crate::simd::{self, Real};
use crate::{Error, Result, Tensor, naive};
use candle_core::{CpuStorage, CustomOp3, Layout, Shape, WithDType};
use std::ops::Range;

type Candle<T> = candle_core::Result<T>;

/// Positions that meet each other directly, unless another number is asked for.
const CHUNK: usize = 64;

/// Which positions are summed over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// A position and all earlier ones.
    Past,
    /// A position and all later ones.
    Future,
}

impl Direction {
    fn reversed(self) -> Self {
        match self {
            Self::Past => Self::Future,
            Self::Future => Self::Past,
        }
    }
}

/// `Σ_j M_ij (q_i · k_j) v_j`, `[batch, heads, length, value_width]`, for `q` and `k`
/// `[batch, heads, length, features]` and `v` `[batch, heads, length, value_width]`: over the past,
/// `M_ij = e^{a_{j+1} + … + a_i}`, over the future `M_ij = e^{a_{i+1} + … + a_j}`, where `a` is
/// `log_decay` `[batch, heads, length]`, or 1. Nothing is normalised: a column of ones in `v` gives
/// the sum of the scores.
///
/// Time grows with `length · (features + value_width + features · value_width)`, memory with what
/// comes in.
///
/// # Errors
/// When the shapes do not fit each other.
pub fn linear_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    log_decay: Option<&Tensor>,
    direction: Direction,
) -> Result<Tensor> {
    linear_attention_in_chunks(q, k, v, log_decay, direction, CHUNK)
}

/// [`linear_attention`], where `chunk` positions meet each other directly: with 1 it is the
/// recurrence, and from the length on all scores are laid out.
///
/// # Errors
/// As there.
pub fn linear_attention_in_chunks(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    log_decay: Option<&Tensor>,
    direction: Direction,
    chunk: usize,
) -> Result<Tensor> {
    let (batch, heads, length, features) = q.dims4()?;
    let refuse = |name: &'static str, found: &[usize], expected: String| {
        Err(Error::argument("linear attention", name, found, expected))
    };
    if k.dims() != q.dims() {
        return refuse("k", k.dims(), format!("{:?}", q.dims()));
    }
    let (v_batch, v_heads, v_length, value_width) = v.dims4()?;
    if (v_batch, v_heads, v_length) != (batch, heads, length) {
        return refuse(
            "v",
            v.dims(),
            format!("[{batch}, {heads}, {length}, width]"),
        );
    }
    if let Some(decay) = log_decay.filter(|decay| decay.dims() != [batch, heads, length]) {
        let expected = format!("[{batch}, {heads}, {length}]");
        return refuse("log_decay", decay.dims(), expected);
    }
    let mut all = vec![q, k, v];
    all.extend(log_decay);
    if !fused(&all) {
        return naive::linear_attention(q, k, v, log_decay, direction);
    }
    let operation = Sums {
        direction,
        sizes: Sizes {
            heads: batch * heads,
            length,
            features,
            value_width,
            chunk: chunk.clamp(1, length.max(1)),
        },
        decays: log_decay.is_some(),
    };
    // An operation has at most three arguments: the decay is a last feature of the keys.
    let keys = match log_decay {
        Some(decay) => Tensor::cat(&[k, &decay.unsqueeze(3)?], 3)?,
        None => k.clone(),
    };
    Ok(q.apply3(&keys, v, operation)?)
}

/// Multiplications and additions of [`linear_attention`] for one head: the products of each chunk
/// with itself, and for each position the adding to and the reading of the state, decays left out.
pub fn linear_attention_operations(length: usize, features: usize, value_width: usize) -> u64 {
    operations_in_chunks(length, features, value_width, CHUNK)
}

/// [`linear_attention_operations`] for [`linear_attention_in_chunks`].
pub fn operations_in_chunks(
    length: usize,
    features: usize,
    value_width: usize,
    chunk: usize,
) -> u64 {
    let chunk = chunk.clamp(1, length.max(1));
    let (whole, rest) = ((length / chunk) as u64, (length % chunk) as u64);
    let pairs = whole * (chunk * chunk) as u64 + rest * rest;
    let (features, width) = (features as u64, value_width as u64);
    2 * pairs * (features + width) + 4 * length as u64 * features * width
}

#[derive(Clone, Copy)]
struct Sizes {
    /// Of all sequences.
    heads: usize,
    length: usize,
    features: usize,
    value_width: usize,
    chunk: usize,
}

/// Rows of all heads, `stride` apart.
#[derive(Clone, Copy)]
struct Side<'a, T> {
    data: &'a [T],
    width: usize,
    stride: usize,
}

impl<'a, T: Real> Side<'a, T> {
    fn new(data: &'a [T], width: usize) -> Self {
        Self {
            data,
            width,
            stride: width,
        }
    }

    fn rows(&self, head: usize, length: usize, range: &Range<usize>) -> Matrix<'a, T> {
        let start = (head * length + range.start) * self.stride;
        let data = self.data.get(start..).unwrap_or(&[]);
        Matrix::spaced(data, range.len(), self.width, self.stride)
    }
}

/// The sums of one head in one direction.
struct Head<'a, T> {
    direction: Direction,
    length: usize,
    chunk: usize,
    index: usize,
    q: Side<'a, T>,
    k: Side<'a, T>,
    v: Side<'a, T>,
    /// `a` of every position.
    decay: Option<&'a [T]>,
}

/// Memory that chunks share.
struct Scratch<T> {
    /// `Σ … k_j v_jᵀ` of all chunks so far, `[features, value_width]`.
    state: Vec<T>,
    scores: Vec<T>,
    read: Vec<T>,
    scaled: Vec<T>,
    /// `a_start + … + a_i` of each position in the chunk.
    sums: Vec<T>,
}

impl<T: Real> Scratch<T> {
    fn new(features: usize, value_width: usize, chunk: usize) -> Self {
        Self {
            state: vec![T::zero(); features * value_width],
            scores: vec![T::zero(); chunk * chunk],
            read: vec![T::zero(); chunk * value_width],
            scaled: vec![T::zero(); chunk * features],
            sums: vec![T::zero(); chunk],
        }
    }
}

impl<T: Real> Head<'_, T> {
    /// Writes all positions of the head, `[length, value_width]`.
    fn run(&self, scratch: &mut Scratch<T>, output: &mut [T]) {
        scratch.state.fill(T::zero());
        let chunks = self.length.div_ceil(self.chunk);
        for step in 0..chunks {
            let index = match self.direction {
                Direction::Past => step,
                Direction::Future => chunks - 1 - step,
            };
            let range = index * self.chunk..self.length.min((index + 1) * self.chunk);
            let width = self.v.width;
            let output = &mut output[range.start * width..range.end * width];
            self.chunk(&range, step == 0, scratch, output);
        }
    }

    fn chunk(&self, range: &Range<usize>, first: bool, scratch: &mut Scratch<T>, output: &mut [T]) {
        let (count, width) = (range.len(), self.v.width);
        let q = self.q.rows(self.index, self.length, range);
        let k = self.k.rows(self.index, self.length, range);
        let v = self.v.rows(self.index, self.length, range);
        let one = Threads::One;
        self.sum_decay(range, &mut scratch.sums);
        let scores = &mut scratch.scores[..count * count];
        multiply(
            scores,
            count,
            Into::Replace,
            T::one(),
            q,
            k.transposed(),
            one,
        );
        let sums = self.decay.map(|_| &scratch.sums[..count]);
        simd::vectorised(
            #[inline(always)]
            || weigh(scores, count, sums, self.direction),
        );
        let scores = Matrix::packed(scores, count, count);
        multiply(output, width, Into::Replace, T::one(), scores, v, one);
        if !first {
            let state = Matrix::packed(&scratch.state, self.q.width, width);
            match self.decay {
                None => multiply(output, width, Into::Add, T::one(), q, state, one),
                Some(_) => {
                    let read = &mut scratch.read[..count * width];
                    multiply(read, width, Into::Replace, T::one(), q, state, one);
                    for (i, (y, read)) in output
                        .chunks_exact_mut(width.max(1))
                        .zip(read.chunks_exact(width.max(1)))
                        .enumerate()
                    {
                        simd::add_scaled(y, read, self.reach(range, i, &scratch.sums));
                    }
                }
            }
        }
        self.remember(range, k, v, scratch);
    }

    fn sum_decay(&self, range: &Range<usize>, sums: &mut [T]) {
        let Some(decay) = self.decay else { return };
        let mut sum = T::zero();
        for (total, a) in sums.iter_mut().zip(&decay[range.clone()]) {
            sum += *a;
            *total = sum;
        }
    }

    /// What the state has decayed to when position `i` of the chunk reads it.
    fn reach(&self, range: &Range<usize>, i: usize, sums: &[T]) -> T {
        match self.direction {
            Direction::Past => sums[i].exp(),
            Direction::Future => {
                let next = self.decay.and_then(|decay| decay.get(range.end));
                (sums[range.len() - 1] - sums[i] + next.copied().unwrap_or(T::zero())).exp()
            }
        }
    }

    /// Adds the chunk to the state, seen from its last position on the past, from its first on the
    /// future.
    fn remember(&self, range: &Range<usize>, k: Matrix<T>, v: Matrix<T>, scratch: &mut Scratch<T>) {
        let width = self.v.width;
        let add = |state: &mut [T], k: Matrix<T>| {
            let keys = k.transposed();
            multiply(state, width, Into::Add, T::one(), keys, v, Threads::One);
        };
        if self.decay.is_none() {
            return add(&mut scratch.state, k);
        }
        let (count, features) = (range.len(), self.k.width);
        let last = scratch.sums[count - 1];
        let across = match self.direction {
            Direction::Past => last.exp(),
            Direction::Future => self.reach(range, 0, &scratch.sums),
        };
        for number in &mut scratch.state {
            *number *= across;
        }
        let scaled = &mut scratch.scaled[..count * features];
        for (j, row) in scaled.chunks_exact_mut(features.max(1)).enumerate() {
            let factor = match self.direction {
                Direction::Past => last - scratch.sums[j],
                Direction::Future => scratch.sums[j] - scratch.sums[0],
            }
            .exp();
            for (to, from) in row.iter_mut().zip(&k.data[j * k.row_stride..]) {
                *to = *from * factor;
            }
        }
        add(&mut scratch.state, Matrix::packed(scaled, count, features));
    }
}

/// Multiplies the scores of a chunk with itself by their decay; those on the wrong side vanish.
#[inline(always)]
fn weigh<T: Real>(scores: &mut [T], count: usize, sums: Option<&[T]>, direction: Direction) {
    for (i, row) in scores.chunks_exact_mut(count).enumerate() {
        let (seen, hidden) = match direction {
            Direction::Past => (0..i + 1, i + 1..count),
            Direction::Future => (i..count, 0..i),
        };
        row[hidden].fill(T::zero());
        if let Some(sums) = sums {
            let here = sums[i];
            let row = &mut row[seen.clone()];
            for (score, there) in row.iter_mut().zip(&sums[seen]) {
                let distance = match direction {
                    Direction::Past => here - *there,
                    Direction::Future => *there - here,
                };
                *score *= distance.exp();
            }
        }
    }
}

struct Sums {
    direction: Direction,
    sizes: Sizes,
    decays: bool,
}

impl Sums {
    /// Runs all heads: sums over `k` and `v` for `q`.
    fn run<T: Real>(
        &self,
        direction: Direction,
        [q, k, v]: [Side<T>; 3],
        decay: Option<&[T]>,
    ) -> Vec<T> {
        let Sizes {
            heads,
            length,
            chunk,
            ..
        } = self.sizes;
        let (features, width) = (q.width, v.width);
        let mut output = host::unwritten::<T>(heads * length * width);
        let shared = Shared::new(&mut output);
        let work = length * (features * width + chunk * (features + width));
        host::share(heads, work, |range| {
            let mut scratch = Scratch::new(features, width, chunk);
            for index in range {
                // SAFETY: heads are disjoint.
                let output = unsafe { shared.part(index * length * width, length * width) };
                let head = Head {
                    direction,
                    length,
                    chunk,
                    index,
                    q,
                    k,
                    v,
                    decay: decay.map(|all| &all[index * length..(index + 1) * length]),
                };
                head.run(&mut scratch, output);
            }
        });
        output
    }

    /// The keys without their decay, and the decay of every position.
    fn keys<'a, T: Real>(&self, packed: &'a [T]) -> (Side<'a, T>, Option<Vec<T>>) {
        let features = self.sizes.features;
        let stride = features + usize::from(self.decays);
        let side = Side {
            data: packed,
            width: features,
            stride,
        };
        let decay = self.decays.then(|| {
            let rows = packed.chunks_exact(stride);
            rows.map(|row| row[features]).collect()
        });
        (side, decay)
    }

    fn backward<T: Real>(
        &self,
        [q, packed, v]: [&Tensor; 3],
        gradient: &Tensor,
    ) -> Candle<[Option<Tensor>; 3]> {
        let hosts = [q, packed, v, gradient].map(Host::new);
        let [q_all, packed_all, v_all, d_all] = &hosts;
        let (q_all, packed_all) = (q_all.ordered::<T>()?, packed_all.ordered::<T>()?);
        let (v_all, d_all) = (v_all.ordered::<T>()?, d_all.ordered::<T>()?);
        let (keys, decay) = self.keys(&packed_all);
        let decay = decay.as_deref();
        let Sizes {
            features,
            value_width,
            ..
        } = self.sizes;
        let queries = Side::new(&q_all, features);
        let values = Side::new(&v_all, value_width);
        let d = Side::new(&d_all, value_width);
        let (here, back) = (self.direction, self.direction.reversed());
        let dq = self.run(here, [d, values, keys], decay);
        let dk = self.run(back, [values, d, queries], decay);
        let dv = self.run(back, [keys, queries, d], decay);
        let dk = match decay {
            None => dk,
            Some(_) => self.with_decay(queries, keys, &dq, dk),
        };
        Ok([
            Some(host::tensor(dq, q.dims())?),
            Some(host::tensor(dk, packed.dims())?),
            Some(host::tensor(dv, v.dims())?),
        ])
    }

    /// Gradients of keys with that of the decay behind each: `∂a_t = Σ_{i ≥ t} ∂C_i`.
    fn with_decay<T: Real>(&self, queries: Side<T>, keys: Side<T>, dq: &[T], dk: Vec<T>) -> Vec<T> {
        let Sizes {
            heads,
            length,
            features,
            ..
        } = self.sizes;
        let mut packed = vec![T::zero(); heads * length * (features + 1)];
        for head in 0..heads {
            let mut sum = T::zero();
            for at in (head * length..(head + 1) * length).rev() {
                let part = at * features..(at + 1) * features;
                let (dq, dk) = (&dq[part.clone()], &dk[part]);
                let q = &queries.data[at * features..][..features];
                let k = &keys.data[at * keys.stride..][..features];
                let slope = simd::dot(q, dq) - simd::dot(k, dk);
                sum += match self.direction {
                    Direction::Past => slope,
                    Direction::Future => -slope,
                };
                let row = &mut packed[at * (features + 1)..(at + 1) * (features + 1)];
                row[..features].copy_from_slice(dk);
                row[features] = sum;
            }
        }
        packed
    }
}

impl CustomOp3 for Sums {
    fn name(&self) -> &'static str {
        "linear attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Candle<(CpuStorage, Shape)> {
        by_dtype!(host::dtype(q), T => {
            let q_all = host::ordered::<T>(q, q_layout)?;
            let packed = host::ordered::<T>(k, k_layout)?;
            let v_all = host::ordered::<T>(v, v_layout)?;
            let (keys, decay) = self.keys(&packed);
            let sides = [
                Side::new(&q_all, self.sizes.features),
                keys,
                Side::new(&v_all, self.sizes.value_width),
            ];
            let output = self.run(self.direction, sides, decay.as_deref());
            Ok((T::to_cpu_storage_owned(output), v_layout.shape().clone()))
        })
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Candle<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [dq, dk, dv] = by_dtype!(q.dtype(), T => self.backward::<T>([q, k, v], gradient))?;
        Ok((dq, dk, dv))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{difference, gradient_error};
    use crate::test_data::{arange, compare};
    use crate::{DType, Device};

    const BOTH: [Direction; 2] = [Direction::Past, Direction::Future];

    fn decay(dims: &[usize], dtype: DType) -> Tensor {
        let x = arange(dims, 5.0, dtype);
        (x.sqr().unwrap() * -0.3).unwrap()
    }

    #[test]
    fn equals_scores_laid_out() {
        for length in [1, 2, 63, 64, 65, 200] {
            for direction in BOTH {
                for decays in [false, true] {
                    compare(3e-5, |dtype| {
                        let q = arange(&[2, 3, length, 5], 1.0, dtype);
                        let k = arange(&[2, 3, 5, length], 2.0, dtype)
                            .transpose(2, 3)
                            .unwrap();
                        let v = arange(&[2, length, 3, 4], 3.0, dtype)
                            .transpose(1, 2)
                            .unwrap();
                        let decay = decays.then(|| decay(&[2, 3, length], dtype));
                        let decay = decay.as_ref();
                        (
                            linear_attention(&q, &k, &v, decay, direction).unwrap(),
                            naive::linear_attention(&q, &k, &v, decay, direction).unwrap(),
                        )
                    });
                }
            }
        }
    }

    #[test]
    fn gradients_equal_finite_differences() {
        for direction in BOTH {
            for length in [3, 70] {
                let inputs = [
                    arange(&[1, 2, length, 3], 1.0, DType::F64),
                    arange(&[1, 2, length, 3], 2.0, DType::F64),
                    arange(&[1, 2, length, 2], 3.0, DType::F64),
                    decay(&[1, 2, length], DType::F64),
                ];
                let with =
                    |x: &[Tensor]| linear_attention(&x[0], &x[1], &x[2], Some(&x[3]), direction);
                assert!(gradient_error(with, &inputs).unwrap() < 1e-6);
                let without = |x: &[Tensor]| linear_attention(&x[0], &x[1], &x[2], None, direction);
                assert!(gradient_error(without, &inputs[..3]).unwrap() < 1e-6);
            }
        }
    }

    /// Products of decays leave every floating-point range long before this length; their
    /// logarithms do not.
    #[test]
    fn long_sequences_with_strong_decay_stay_finite() {
        let length = 16_384;
        let shape = (1, 1, length, 1);
        let ones = Tensor::ones(shape, DType::F32, &Device::Cpu).unwrap();
        let decay = (Tensor::ones((1, 1, length), DType::F32, &Device::Cpu).unwrap() * 0.5f64.ln())
            .unwrap();
        for direction in BOTH {
            let y = linear_attention(&ones, &ones, &ones, Some(&decay), direction).unwrap();
            // In the middle Σ_k 2^-k = 2 from both sides.
            let middle = y.flatten_all().unwrap().to_vec1::<f32>().unwrap()[length / 2];
            assert!((middle - 2.0).abs() < 1e-5);
        }
    }

    #[test]
    fn the_past_read_backwards_is_the_future() {
        let length = 130;
        let flip = |x: &Tensor| {
            let order: Vec<u32> = (0..length as u32).rev().collect();
            let order = Tensor::from_vec(order, length, &Device::Cpu).unwrap();
            x.contiguous().unwrap().index_select(&order, 2).unwrap()
        };
        let q = arange(&[1, 2, length, 4], 1.0, DType::F64);
        let k = arange(&[1, 2, length, 4], 2.0, DType::F64);
        let v = arange(&[1, 2, length, 3], 3.0, DType::F64);
        let past = linear_attention(&q, &k, &v, None, Direction::Past).unwrap();
        let future =
            linear_attention(&flip(&q), &flip(&k), &flip(&v), None, Direction::Future).unwrap();
        assert!(difference(&past, &flip(&future)).unwrap() < 1e-12);
    }

    #[test]
    fn the_size_of_chunks_changes_nothing() {
        for direction in BOTH {
            let length = 70;
            let q = arange(&[1, 2, length, 4], 1.0, DType::F64);
            let k = arange(&[1, 2, length, 4], 2.0, DType::F64);
            let v = arange(&[1, 2, length, 3], 3.0, DType::F64);
            let decay = decay(&[1, 2, length], DType::F64);
            let of = |chunk| {
                linear_attention_in_chunks(&q, &k, &v, Some(&decay), direction, chunk).unwrap()
            };
            let laid_out = of(length);
            for chunk in [1, 3, 64, 1000] {
                assert!(difference(&of(chunk), &laid_out).unwrap() < 1e-12);
            }
        }
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() {
        let x = |dims: &[usize]| arange(dims, 1.0, DType::F32);
        let (q, v) = (x(&[1, 2, 5, 3]), x(&[1, 2, 5, 4]));
        assert!(linear_attention(&q, &q, &v, None, Direction::Past).is_ok());
        assert!(linear_attention(&q, &v, &v, None, Direction::Past).is_err());
        assert!(linear_attention(&q, &q, &x(&[1, 2, 4, 4]), None, Direction::Past).is_err());
        let decay = x(&[1, 2, 4]);
        assert!(linear_attention(&q, &q, &v, Some(&decay), Direction::Past).is_err());
    }
}
