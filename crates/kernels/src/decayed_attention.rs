//! Linear attention with a decay on the way from key to query, over the past or over both directions at once (Afzal
//! et al., LION, arXiv 2502.16249).
//!
//! ```text
//! y_i = Σ_j M_ij (q_i · k_j) (v_j, 1)
//! M_ij = e^{a_j + … + a_{i−1}}  for j < i,   e^{a_{i+1} + … + a_j}  for j > i,   M_ii = 1
//! ```
//!
//! where a causal `M` is zero for `j > i`. A chunk of positions meets itself with all its scores laid out, once for
//! both directions, and reads what lies before it and behind it from two matrices `Σ_j … k_j v_jᵀ`, one carried from
//! the first chunk to the last and one from the last to the first. The weights' own sums are carried beside them,
//! without values of one.
//!
//! Backward, with `∂y_i = (g_i, h_i)` and `p_ij = M_ij (g_i · v_j + h_i)`,
//!
//! ```text
//! ∂q_i = Σ_j p_ij k_j,   ∂k_j = Σ_i p_ij q_i,   ∂v_j = Σ_i M_ij (q_i · k_j) g_i
//! ```
//!
//! are sums of the same kind, in which queries are carried along too. `t_ij = p_ij (q_i · k_j)` belongs to every
//! `a` between `j` and `i`: with `C_i = Σ_{j<i} t_ij − Σ_{j>i} t_ji` and `E_i = Σ_{j<i} t_ji − Σ_{j>i} t_ij`,
//! `∂a_n = Σ_{i>n} C_i + Σ_{i≥n} E_i`.

mod backward;

use crate::host::{self, Host, Shared, by_dtype, fused};
use crate::product::{Into, Matrix, Threads, multiply};
use crate::simd::{self, Real};
use crate::stack::Stack;
use crate::{Error, Result, Tensor, naive};
use backward::Slopes;
use candle_core::{CpuStorage, CustomOp3, Layout, Shape, WithDType};
use std::ops::Range;

type Candle<T> = candle_core::Result<T>;

/// `Σ_j M_ij (q_i · k_j) (v_j, 1)`, `[batch, heads, length, value_width + 1]`: sums over all positions, or over a
/// position and those before it, the sum of the weights behind them, for `q` and `k`
/// `[batch, heads, length, features]`, `v` `[batch, heads, length, value_width]` and `a` = `log_decay`
/// `[batch, heads, length]`, which is not positive. `chunk` positions meet each other directly; the result does not
/// depend on it beyond rounding.
///
/// # Errors
/// When the shapes do not fit each other.
///
/// ```
/// use lapidary_kernels::{DType, Device, Tensor, decayed_attention};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let one = Tensor::ones((1, 1, 3, 1), DType::F32, &Device::Cpu)?;
/// let half = Tensor::full(0.5f32.ln(), (1, 1, 3), &Device::Cpu)?;
/// let y = decayed_attention(&one, &one, &one, &half, false, 64)?;
/// let weights = y.narrow(3, 1, 1)?.flatten_all()?.to_vec1::<f32>()?;
/// assert_eq!(weights, [1.75, 2.0, 1.75]);
/// # Ok(())
/// # }
/// ```
pub fn decayed_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    log_decay: &Tensor,
    is_causal: bool,
    chunk: usize,
) -> Result<Tensor> {
    let (batch, heads, length, features) = q.dims4()?;
    let value_width = v.dims4()?.3;
    let refuse = |name: &'static str, found: &Tensor, expected: String| {
        Err(Error::argument(
            "decayed attention",
            name,
            found.dims(),
            expected,
        ))
    };
    if k.dims() != q.dims() {
        return refuse("k", k, format!("{:?}", q.dims()));
    }
    if v.dims() != [batch, heads, length, value_width] {
        return refuse("v", v, format!("[{batch}, {heads}, {length}, width]"));
    }
    if log_decay.dims() != [batch, heads, length] {
        return refuse(
            "log_decay",
            log_decay,
            format!("[{batch}, {heads}, {length}]"),
        );
    }
    if !fused(&[q, k, v, log_decay]) {
        return naive::decayed_attention(q, k, v, log_decay, is_causal);
    }
    let operation = Decayed {
        sizes: Sizes {
            length,
            features,
            value_width,
            is_causal,
            chunk: chunk.clamp(1, length.max(1)),
        },
    };
    // An operation has at most three arguments: the decay is a last feature of the keys.
    let keys = Tensor::cat(&[k, &log_decay.unsqueeze(3)?], 3)?;
    Ok(q.apply_op3(&keys, v, operation)?)
}

/// Multiplications and additions of [`decayed_attention`] for one head: the products of each chunk with itself, and
/// for each position the adding to and the reading of one state or two, decays left out.
pub fn decayed_attention_operations(
    length: usize,
    features: usize,
    value_width: usize,
    is_causal: bool,
    chunk: usize,
) -> u64 {
    // The weights are summed as if there were a value more.
    let width = value_width + 1;
    let once = crate::operations_in_chunks(length, features, width, chunk);
    match is_causal {
        true => once,
        false => once + 4 * (length * features * width) as u64,
    }
}

#[derive(Clone, Copy)]
struct Sizes {
    length: usize,
    features: usize,
    value_width: usize,
    is_causal: bool,
    chunk: usize,
}

/// One head of one sequence.
struct Head<'a, T> {
    sizes: Sizes,
    q: Matrix<'a, T>,
    k: Matrix<'a, T>,
    v: Matrix<'a, T>,
    /// `a` of every position.
    decay: Vec<T>,
}

/// What is left of a position on the way through its chunk.
struct Fades<T> {
    /// From the beginning to the position, without its own decay.
    before: Vec<T>,
    /// As `before`, with its own.
    through: Vec<T>,
    /// From the position to the end, with its own.
    rest: Vec<T>,
    /// As `rest`, without its own.
    after: Vec<T>,
    /// From the beginning to the end.
    across: T,
}

/// Which way a walk over the chunks goes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Walk {
    FromTheEnd,
    FromTheBeginning,
}

/// Sums of outer products of features and of what belongs to them, and of the features alone.
struct State<T> {
    /// `[features, value_width]`.
    products: Vec<T>,
    /// `[features]`.
    weights: Vec<T>,
    is_empty: bool,
}

impl<T: Real> State<T> {
    fn new(sizes: &Sizes) -> Self {
        Self {
            products: vec![T::zero(); sizes.features * sizes.value_width],
            weights: vec![T::zero(); sizes.features],
            is_empty: true,
        }
    }

    fn products(&self, sizes: &Sizes) -> Matrix<'_, T> {
        Matrix::packed(&self.products, sizes.features, sizes.value_width)
    }

    /// Lets all fade, and adds rows `x` with what belongs to them, which counts `shares` times in the weights.
    fn add(&mut self, across: T, x: &[T], of: Matrix<T>, shares: impl Fn(usize) -> T) {
        if !self.is_empty {
            for number in self.products.iter_mut().chain(&mut self.weights) {
                *number *= across;
            }
        }
        self.is_empty = false;
        let features = self.weights.len();
        let rows = Matrix::packed(x, of.rows, features).transposed();
        multiply(
            &mut self.products,
            of.columns,
            Into::Add,
            T::one(),
            rows,
            of,
            Threads::One,
        );
        simd::vectorised(
            #[inline(always)]
            || {
                for (row, x) in x.chunks_exact(features.max(1)).enumerate() {
                    simd::add_scaled(&mut self.weights, x, shares(row));
                }
            },
        );
    }
}

/// Replaces `x` by `e^x`.
#[inline(always)]
fn exponentials<T: Real>(x: &mut [T]) {
    for x in x {
        *x = x.exp();
    }
}

/// Rows of a matrix, each multiplied by its factor, one after the other.
fn scaled<'a, T: Real>(x: Matrix<T>, factors: &[T], into: &'a mut [T]) -> &'a [T] {
    let width = x.columns;
    let into = &mut into[..x.rows * width];
    simd::vectorised(
        #[inline(always)]
        || {
            let rows = into.chunks_exact_mut(width.max(1)).zip(factors);
            for (row, (to, &factor)) in rows.enumerate() {
                let from = &x.data[row * x.row_stride..];
                if x.column_stride == 1 {
                    for (to, from) in to.iter_mut().zip(&from[..width]) {
                        *to = factor * *from;
                    }
                } else {
                    for (column, to) in to.iter_mut().enumerate() {
                        *to = factor * from[column * x.column_stride];
                    }
                }
            }
        },
    );
    into
}

impl<'a, T: Real> Head<'a, T> {
    fn new(
        sizes: Sizes,
        index: usize,
        q: &'a Stack<T>,
        keys: &'a Stack<T>,
        v: &'a Stack<T>,
    ) -> Self {
        let all = keys.matrix(index);
        let decay = (0..sizes.length)
            .map(|at| all.data[at * all.row_stride + sizes.features * all.column_stride]);
        Self {
            sizes,
            q: q.matrix(index),
            k: Matrix {
                columns: sizes.features,
                ..all
            },
            v: v.matrix(index),
            decay: decay.collect(),
        }
    }

    /// Sums of decays from the beginning of a chunk to each position, without its own and with it, and to the end.
    fn sums(&self, range: &Range<usize>) -> ([Vec<T>; 2], T) {
        let mut sum = T::zero();
        let (mut until, mut through) = (Vec::new(), Vec::new());
        for a in &self.decay[range.clone()] {
            until.push(sum);
            sum += *a;
            through.push(sum);
        }
        ([until, through], sum)
    }

    fn fades(&self, range: &Range<usize>) -> Fades<T> {
        let ([until, through], all) = self.sums(range);
        let [mut rest, mut after] = [&until, &through].map(|sums| {
            let left = sums.iter().map(|sum| all - *sum);
            left.collect::<Vec<T>>()
        });
        let (mut before, mut through, mut across) = (until, through, [all]);
        simd::vectorised(
            #[inline(always)]
            || {
                for sums in [&mut before, &mut through, &mut rest, &mut after] {
                    exponentials(sums);
                }
                exponentials(&mut across);
            },
        );
        Fades {
            before,
            through,
            rest,
            after,
            across: across[0],
        }
    }

    /// `M` of a chunk with itself.
    fn mask(&self, range: &Range<usize>) -> Vec<T> {
        let ([until, through], _) = self.sums(range);
        let count = range.len();
        let mut mask = host::unwritten::<T>(count * count);
        simd::vectorised(
            #[inline(always)]
            || {
                for (i, row) in mask.chunks_exact_mut(count).enumerate() {
                    let (earlier, rest) = row.split_at_mut(i);
                    for (m, there) in earlier.iter_mut().zip(&until) {
                        *m = (until[i] - *there).exp();
                    }
                    let (own, later) = rest.split_at_mut(1);
                    own.fill(T::one());
                    if self.sizes.is_causal {
                        later.fill(T::zero());
                        continue;
                    }
                    for (m, there) in later.iter_mut().zip(&through[i + 1..]) {
                        *m = (*there - through[i]).exp();
                    }
                }
            },
        );
        mask
    }

    /// The chunk that a walk comes to as one of so many.
    fn step(&self, walk: Walk, step: usize, count: usize) -> Range<usize> {
        let index = match walk {
            Walk::FromTheEnd => count - 1 - step,
            Walk::FromTheBeginning => step,
        };
        let start = index * self.sizes.chunk;
        start..self.sizes.length.min(start + self.sizes.chunk)
    }

    fn chunks(&self) -> usize {
        self.sizes.length.div_ceil(self.sizes.chunk)
    }

    /// Adds to a chunk's sums `[rows, value_width + 1]` what its queries, faded, find in a state.
    fn read(&self, q: &[T], state: &State<T>, y: &mut [T]) {
        if state.is_empty {
            return;
        }
        let Sizes {
            features,
            value_width,
            ..
        } = self.sizes;
        let queries = Matrix::packed(q, q.len() / features.max(1), features);
        let products = state.products(&self.sizes);
        multiply(
            y,
            value_width + 1,
            Into::Add,
            T::one(),
            queries,
            products,
            Threads::One,
        );
        simd::vectorised(
            #[inline(always)]
            || {
                let rows = y.chunks_exact_mut(value_width + 1);
                for (y, q) in rows.zip(q.chunks_exact(features.max(1))) {
                    y[value_width] += simd::dot(q, &state.weights);
                }
            },
        );
    }

    /// The scores of a chunk with itself, before they fade.
    fn scores(&self, range: &Range<usize>, scores: &mut [T]) {
        let (q, k) = (self.q.part_of_rows(range), self.k.part_of_rows(range));
        multiply(
            scores,
            range.len(),
            Into::Replace,
            T::one(),
            q,
            k.transposed(),
            Threads::One,
        );
    }

    /// Writes the sums of all positions, `[length, value_width + 1]`.
    fn forward(&self, output: &mut [T]) {
        let mut scores = host::unwritten::<T>(self.sizes.chunk * self.sizes.chunk);
        for step in 0..self.chunks() {
            let range = self.step(Walk::FromTheBeginning, step, self.chunks());
            self.within(&range, &mut scores, output);
        }
        self.walk(Walk::FromTheBeginning, output);
        if !self.sizes.is_causal {
            self.walk(Walk::FromTheEnd, output);
        }
    }

    /// Writes what positions of a chunk get from each other.
    fn within(&self, range: &Range<usize>, scores: &mut [T], output: &mut [T]) {
        let (count, value_width) = (range.len(), self.sizes.value_width);
        let width = value_width + 1;
        let mask = self.mask(range);
        let y = &mut output[range.start * width..range.end * width];
        let scores = &mut scores[..count * count];
        self.scores(range, scores);
        simd::vectorised(
            #[inline(always)]
            || {
                for (score, m) in scores.iter_mut().zip(&mask) {
                    *score *= *m;
                }
                let rows = scores.chunks_exact(count).zip(y.chunks_exact_mut(width));
                for (scores, y) in rows {
                    y[value_width] = simd::sum(scores);
                }
            },
        );
        let scores = Matrix::packed(scores, count, count);
        let v = self.v.part_of_rows(range);
        multiply(y, width, Into::Replace, T::one(), scores, v, Threads::One);
    }

    /// Adds what positions get from the chunks that a walk has passed.
    fn walk(&self, walk: Walk, output: &mut [T]) {
        let width = self.sizes.value_width + 1;
        let mut faded = host::unwritten::<T>(self.sizes.chunk * self.sizes.features);
        let mut state = State::new(&self.sizes);
        for step in 0..self.chunks() {
            let range = self.step(walk, step, self.chunks());
            let fades = self.fades(&range);
            let [q, k, v] = [self.q, self.k, self.v].map(|x| x.part_of_rows(&range));
            let (of_queries, of_keys) = match walk {
                Walk::FromTheEnd => (&fades.after, &fades.through),
                Walk::FromTheBeginning => (&fades.before, &fades.rest),
            };
            let y = &mut output[range.start * width..range.end * width];
            self.read(scaled(q, of_queries, &mut faded), &state, y);
            let keys = scaled(k, of_keys, &mut faded);
            state.add(fades.across, keys, v, |_| T::one());
        }
    }
}

struct Decayed {
    sizes: Sizes,
}

impl Decayed {
    fn work(&self) -> usize {
        let Sizes {
            length,
            features,
            value_width,
            chunk,
            ..
        } = self.sizes;
        length * (4 * features * value_width + chunk * (features + value_width)) / 8
    }

    fn forward<T: Real>(&self, q: &Stack<T>, keys: &Stack<T>, v: &Stack<T>) -> Vec<T> {
        let each = self.sizes.length * (self.sizes.value_width + 1);
        let heads = q.starts.len();
        let mut output = host::unwritten::<T>(heads * each);
        let shared = Shared::new(&mut output);
        host::share(heads, self.work(), |range| {
            for index in range {
                // SAFETY: heads are disjoint.
                let output = unsafe { shared.part(index * each, each) };
                Head::new(self.sizes, index, q, keys, v).forward(output);
            }
        });
        output
    }

    /// Gradients of queries, of keys with their decay beside them, and of values, packed.
    fn backward<T: Real>(&self, [q, keys, v, gradient]: [&Stack<T>; 4]) -> [Vec<T>; 3] {
        let Sizes {
            length,
            features,
            value_width,
            ..
        } = self.sizes;
        let heads = q.starts.len();
        let sizes = [features, features + 1, value_width].map(|width| length * width);
        let mut results = sizes.map(|each| host::unwritten::<T>(heads * each));
        let [of_q, of_keys, of_v] = &mut results;
        let shared = [Shared::new(of_q), Shared::new(of_keys), Shared::new(of_v)];
        host::share(heads, 3 * self.work(), |range| {
            for index in range {
                // SAFETY: heads are disjoint.
                let [q_part, keys_part, v_part] = std::array::from_fn(|of| unsafe {
                    shared[of].part(index * sizes[of], sizes[of])
                });
                let slopes = Slopes::new(length, [q_part, keys_part, v_part]);
                Head::new(self.sizes, index, q, keys, v).backward(gradient.matrix(index), slopes);
            }
        });
        results
    }
}

/// The matrices of all heads of a tensor `[batch, heads, ..]`.
fn stack<'a, T: Real>(storage: &'a CpuStorage, layout: &Layout) -> Candle<Stack<'a, T>> {
    Stack::new(storage, layout, &layout.dims()[..2])
}

impl CustomOp3 for Decayed {
    fn name(&self) -> &'static str {
        "decayed attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        keys: &CpuStorage,
        keys_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Candle<(CpuStorage, Shape)> {
        by_dtype!(host::dtype(q), T => {
            let sums = self.forward::<T>(
                &stack(q, q_layout)?,
                &stack(keys, keys_layout)?,
                &stack(v, v_layout)?,
            );
            let (batch, heads, length, width) = v_layout.shape().dims4()?;
            let shape = Shape::from((batch, heads, length, width + 1));
            Ok((T::to_cpu_storage_owned(sums), shape))
        })
    }

    fn bwd(
        &self,
        q: &Tensor,
        keys: &Tensor,
        v: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Candle<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let hosts = [q, keys, v, gradient].map(Host::new);
        let [q_host, keys_host, v_host, g_host] = &hosts;
        by_dtype!(q.dtype(), T => {
            let [of_q, of_keys, of_v] = self.backward::<T>([
                &stack(q_host.storage()?, q_host.layout)?,
                &stack(keys_host.storage()?, keys_host.layout)?,
                &stack(v_host.storage()?, v_host.layout)?,
                &stack(g_host.storage()?, g_host.layout)?,
            ]);
            let wanted = |of: &Tensor, slopes: Vec<T>| {
                of.track_op().then(|| host::tensor(slopes, of.dims())).transpose()
            };
            Ok((wanted(q, of_q)?, wanted(keys, of_keys)?, wanted(v, of_v)?))
        })
    }
}

#[cfg(test)]
mod tests;
