//! Linear attention in which every feature of a head's keys has a decay of its own (Yang et al., Gated Linear
//! Attention Transformers with Hardware-Efficient Training, 2023, arXiv 2312.06635, for the past).
//!
//! ```text
//! past:    y_i = Σ_{j ≤ i} Σ_f q_if k_jf e^{a_{j+1,f} + … + a_if} v_j
//! future:  y_i = Σ_{j ≥ i} Σ_f q_if k_jf e^{a_{i+1,f} + … + a_jf} v_j
//! ```
//!
//! No factor stands before the whole inner product, and `e^{a_1 + …} k / e^{a_1 + …}` would leave the range of
//! numbers. So a chunk of positions is cut in half, and the halves again: between two halves that meet in the
//! middle `m`, on the past,
//!
//! ```text
//! Σ_f (q_if e^{a_mf + … + a_if}) (k_jf e^{a_{j+1,f} + … + a_{m−1,f}}),   j < m ≤ i,
//! ```
//!
//! where both factors are products of decays, so that they are at most 1 and nothing is divided. A few positions
//! meet one by one. What lies before the chunk is read from `S = Σ_j … k_j v_jᵀ`, which is carried from chunk to
//! chunk; chunks of one position are the recurrence. The future is the past read from the end.
//!
//! Backward, with `w_ijf` for what stands between `q_if` and `k_jf`,
//!
//! ```text
//! ∂q_if = Σ_j w_ijf k_jf (∂y_i · v_j),   ∂k_jf = Σ_i w_ijf q_if (∂y_i · v_j),   ∂v_j = Σ_i Σ_f w_ijf q_if k_jf ∂y_i
//! ∂a_tf = Σ_{j < t ≤ i} w_ijf q_if k_jf (∂y_i · v_j) = Σ_{s ≥ t} (q_sf ∂q_sf − k_sf ∂k_sf)
//! ```
//!
//! the last without what a position has of itself, which no decay stands before.

mod backward;

use crate::host::{self, Host, Shared, by_dtype, fused};
use crate::product::{Into, Matrix, Threads, multiply};
use crate::simd::{self, Real};
use crate::stack::Stack;
use crate::{Direction, Error, Result, Tensor, naive};
use backward::Slopes;
use candle_core::{CpuStorage, CustomOp3, Layout, Shape, WithDType};
use std::ops::Range;

type Candle<T> = candle_core::Result<T>;

/// Positions that meet one by one instead of half by half.
const FEW: usize = 8;

/// `Σ_j Σ_f q_if k_jf e^{…} v_j`, `[batch, heads, length, value_width]`, over the past or the future, for `q`, `k` and
/// `a` = `log_decay` `[batch, heads, length, features]`, of which `a` is not positive, and `v`
/// `[batch, heads, length, value_width]`. `chunk` positions meet each other directly; the result does not depend on it
/// beyond rounding. Nothing is normalised: a column of ones in `v` gives the sum of the weights.
///
/// Time grows with `length · (chunk (features + value_width) + features · value_width)`, memory with what comes in.
///
/// # Errors
/// When the shapes do not fit each other.
///
/// ```
/// use lapidary_kernels::{DType, Device, Direction, Tensor, linear_attention_by_feature};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let one = Tensor::ones((1, 1, 3, 2), DType::F32, &Device::Cpu)?;
/// let value = Tensor::ones((1, 1, 3, 1), DType::F32, &Device::Cpu)?;
/// // One feature fades by half on each step, the other does not.
/// let decay = Tensor::new(&[0.5f32.ln(), 0.0], &Device::Cpu)?.broadcast_as((1, 1, 3, 2))?;
/// let y = linear_attention_by_feature(&one, &one, &value, &decay, Direction::Past, 64)?;
/// assert_eq!(y.flatten_all()?.to_vec1::<f32>()?, [2.0, 3.5, 4.75]);
/// # Ok(())
/// # }
/// ```
pub fn linear_attention_by_feature(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    log_decay: &Tensor,
    direction: Direction,
    chunk: usize,
) -> Result<Tensor> {
    let (batch, heads, length, features) = q.dims4()?;
    let value_width = v.dims4()?.3;
    let refuse = |name: &'static str, found: &Tensor, expected: String| {
        Err(Error::argument(
            "linear attention by feature",
            name,
            found.dims(),
            expected,
        ))
    };
    for (name, x) in [("k", k), ("log_decay", log_decay)] {
        if x.dims() != q.dims() {
            return refuse(name, x, format!("{:?}", q.dims()));
        }
    }
    if v.dims() != [batch, heads, length, value_width] {
        return refuse("v", v, format!("[{batch}, {heads}, {length}, width]"));
    }
    if !fused(&[q, k, v, log_decay]) {
        return naive::linear_attention_by_feature(q, k, v, log_decay, direction);
    }
    let operation = ByFeature {
        sizes: Sizes {
            length,
            features,
            value_width,
            chunk: chunk.clamp(1, length.max(1)),
            direction,
        },
    };
    // An operation has at most three arguments: decays are further features of the keys.
    let keys = Tensor::cat(&[k, log_decay], 3)?;
    Ok(q.apply_op3(&keys, v, operation)?)
}

/// Multiplications and additions of [`linear_attention_by_feature`] for one head: every pair of positions of a chunk,
/// and for each position the adding to and the reading of a state; decays are left out.
pub fn operations_by_feature(
    length: usize,
    features: usize,
    value_width: usize,
    chunk: usize,
) -> u64 {
    let chunk = chunk.clamp(1, length.max(1));
    let (whole, rest) = (length / chunk, length % chunk);
    let pairs = whole * (chunk * (chunk + 1) / 2) + rest * (rest + 1) / 2;
    (2 * pairs * (features + value_width) + 4 * length * features * value_width) as u64
}

#[derive(Clone, Copy)]
struct Sizes {
    length: usize,
    features: usize,
    value_width: usize,
    chunk: usize,
    direction: Direction,
}

impl Sizes {
    /// The position that a walk over all of them comes to at a step, earlier ones before later ones on the past.
    fn position(&self, step: usize) -> usize {
        match self.direction {
            Direction::Past => step,
            Direction::Future => self.length - 1 - step,
        }
    }

    /// The position whose decay stands between a step and the one before it; none before the first.
    fn between(&self, step: usize) -> Option<usize> {
        let step = match self.direction {
            Direction::Past => step.checked_sub(1).map(|_| step),
            Direction::Future => step.checked_sub(1),
        };
        step.map(|step| self.position(step))
    }

    /// The steps of each chunk.
    fn chunks(self) -> impl DoubleEndedIterator<Item = Range<usize>> {
        let Self { length, chunk, .. } = self;
        (0..length.div_ceil(chunk)).map(move |index| index * chunk..length.min((index + 1) * chunk))
    }
}

/// One head of one sequence.
struct Head<'a, T> {
    sizes: Sizes,
    q: Matrix<'a, T>,
    /// Keys, and beside them the logarithms of decays.
    keys: Matrix<'a, T>,
    v: Matrix<'a, T>,
}

/// What a chunk's positions have, in the order of the walk, row by row.
struct Chunk<T> {
    rows: usize,
    features: usize,
    value_width: usize,
    q: Vec<T>,
    k: Vec<T>,
    v: Vec<T>,
    /// The decay `e^a` between each position and the one before it; 1 before the first of all.
    fade: Vec<T>,
}

/// What is left of each feature on a way, `[rows, features]`.
struct Fades<T> {
    /// From before the first row to each row.
    reach: Vec<T>,
    /// From each row to the last.
    rest: Vec<T>,
}

/// Some columns of some rows, one row after the other.
fn picked<T: Real>(
    from: Matrix<T>,
    columns: Range<usize>,
    rows: impl Iterator<Item = usize>,
) -> Vec<T> {
    let mut picked = Vec::new();
    for row in rows {
        let start = row * from.row_stride;
        if from.column_stride == 1 {
            picked.extend_from_slice(&from.data[start + columns.start..start + columns.end]);
        } else {
            let columns = columns.clone();
            picked.extend(columns.map(|column| from.data[start + column * from.column_stride]));
        }
    }
    picked
}

/// Where a row lies.
#[inline(always)]
fn row(index: usize, width: usize) -> Range<usize> {
    index * width..(index + 1) * width
}

/// `x ⊙ y`.
fn scaled<T: Real>(x: &[T], y: &[T]) -> Vec<T> {
    let mut product = x.to_vec();
    simd::vectorised(
        #[inline(always)]
        || times(&mut product, y),
    );
    product
}

/// `x ⊙= y`.
#[inline(always)]
fn times<T: Real>(x: &mut [T], y: &[T]) {
    for (x, y) in x.iter_mut().zip(y) {
        *x *= *y;
    }
}

/// `x += y ⊙ z`.
#[inline(always)]
fn add_product<T: Real>(x: &mut [T], y: &[T], z: &[T]) {
    for ((x, y), z) in x.iter_mut().zip(y).zip(z) {
        *x = y.mul_add(*z, *x);
    }
}

/// Adds `y ⊙ z` to rows `x`.
fn add_scaled_rows<T: Real>(x: &mut [T], y: &[T], z: &[T]) {
    simd::vectorised(
        #[inline(always)]
        || add_product(x, y, z),
    );
}

impl<T: Real> Chunk<T> {
    /// `[rows, width]` of one of its vectors.
    fn part<'b>(x: &'b [T], rows: &Range<usize>, width: usize) -> &'b [T] {
        &x[rows.start * width..rows.end * width]
    }

    fn matrix<'b>(x: &'b [T], rows: &Range<usize>, width: usize) -> Matrix<'b, T> {
        Matrix::packed(Self::part(x, rows, width), rows.len(), width)
    }

    /// Products of decays from before the first of some rows to each of them.
    fn reach(&self, rows: &Range<usize>) -> Vec<T> {
        let features = self.features;
        let mut reach = Self::part(&self.fade, rows, features).to_vec();
        simd::vectorised(
            #[inline(always)]
            || {
                for row in 1..rows.len() {
                    let (before, here) = reach.split_at_mut(row * features);
                    times(&mut here[..features], &before[(row - 1) * features..]);
                }
            },
        );
        reach
    }

    /// Products of decays from each of some rows to the last of them.
    fn rest(&self, rows: &Range<usize>) -> Vec<T> {
        let features = self.features;
        let mut rest = vec![T::one(); rows.len() * features];
        simd::vectorised(
            #[inline(always)]
            || {
                for row in (1..rows.len()).rev() {
                    let (before, here) = rest.split_at_mut(row * features);
                    let before = &mut before[(row - 1) * features..];
                    before.copy_from_slice(&here[..features]);
                    times(before, &self.fade[self::row(rows.start + row, features)]);
                }
            },
        );
        rest
    }

    fn fades(&self) -> Fades<T> {
        let rows = 0..self.rows;
        Fades {
            reach: self.reach(&rows),
            rest: self.rest(&rows),
        }
    }

    /// What is left of each feature from before the first row to the last.
    fn across<'b>(&self, fades: &'b Fades<T>) -> &'b [T] {
        &fades.reach[(self.rows - 1) * self.features..]
    }

    /// Adds to `y` `[rows, value_width]` what some rows get from each other.
    fn within(&self, rows: Range<usize>, y: &mut [T]) {
        if rows.len() <= FEW {
            return self.one_by_one(rows, y);
        }
        let middle = rows.start + rows.len() / 2;
        let (earlier, later) = (rows.start..middle, middle..rows.end);
        self.within(earlier.clone(), y);
        self.within(later.clone(), y);
        let halves = Halves::new(self, earlier, later);
        let width = self.value_width;
        multiply(
            &mut y[halves.later.start * width..halves.later.end * width],
            width,
            Into::Add,
            T::one(),
            halves.scores(),
            Self::matrix(&self.v, &halves.earlier, width),
            Threads::One,
        );
    }

    fn one_by_one(&self, rows: Range<usize>, y: &mut [T]) {
        let (features, width) = (self.features, self.value_width);
        let mut faded = vec![T::zero(); features];
        simd::vectorised(
            #[inline(always)]
            || {
                for i in rows.clone() {
                    faded.copy_from_slice(&self.q[row(i, features)]);
                    for j in (rows.start..=i).rev() {
                        let score = simd::dot(&faded, &self.k[row(j, features)]);
                        simd::add_scaled(&mut y[row(i, width)], &self.v[row(j, width)], score);
                        times(&mut faded, &self.fade[row(j, features)]);
                    }
                }
            },
        );
    }
}

/// Later rows that meet earlier ones right before them.
struct Halves<T> {
    earlier: Range<usize>,
    later: Range<usize>,
    /// What is left from the middle to each later row, `[later, features]`, and of each earlier row there.
    reach: Vec<T>,
    rest: Vec<T>,
    /// Queries and keys by these.
    q: Vec<T>,
    k: Vec<T>,
    scores: Vec<T>,
}

impl<T: Real> Halves<T> {
    fn new(chunk: &Chunk<T>, earlier: Range<usize>, later: Range<usize>) -> Self {
        let features = chunk.features;
        let (reach, rest) = (chunk.reach(&later), chunk.rest(&earlier));
        let q = scaled(Chunk::part(&chunk.q, &later, features), &reach);
        let k = scaled(Chunk::part(&chunk.k, &earlier, features), &rest);
        let mut scores = host::unwritten::<T>(later.len() * earlier.len());
        multiply(
            &mut scores,
            earlier.len(),
            Into::Replace,
            T::one(),
            Matrix::packed(&q, later.len(), features),
            Matrix::packed(&k, earlier.len(), features).transposed(),
            Threads::One,
        );
        Self {
            earlier,
            later,
            reach,
            rest,
            q,
            k,
            scores,
        }
    }

    /// `[later, earlier]`.
    fn scores(&self) -> Matrix<'_, T> {
        Matrix::packed(&self.scores, self.later.len(), self.earlier.len())
    }
}

/// `Σ … k_j v_jᵀ`, or the same of queries and gradients, `[features, width]`.
struct State<T> {
    sums: Vec<T>,
    features: usize,
    width: usize,
}

impl<T: Real> State<T> {
    fn new(sizes: &Sizes) -> Self {
        Self {
            sums: vec![T::zero(); sizes.features * sizes.value_width],
            features: sizes.features,
            width: sizes.value_width,
        }
    }

    fn matrix(&self) -> Matrix<'_, T> {
        Matrix::packed(&self.sums, self.features, self.width)
    }

    /// Lets each feature fade, and adds rows `x` `[rows, features]` with what belongs to them.
    fn add(&mut self, across: &[T], x: &[T], of: Matrix<T>) {
        let width = self.width;
        simd::vectorised(
            #[inline(always)]
            || {
                let features = self.sums.chunks_exact_mut(width.max(1));
                for (sums, &across) in features.zip(across) {
                    for sum in sums {
                        *sum *= across;
                    }
                }
            },
        );
        multiply(
            &mut self.sums,
            width,
            Into::Add,
            T::one(),
            Matrix::packed(x, of.rows, self.features).transposed(),
            of,
            Threads::One,
        );
    }
}

impl<'a, T: Real> Head<'a, T> {
    fn new(
        sizes: Sizes,
        index: usize,
        q: &'a Stack<T>,
        keys: &'a Stack<T>,
        v: &'a Stack<T>,
    ) -> Self {
        Self {
            sizes,
            q: q.matrix(index),
            keys: keys.matrix(index),
            v: v.matrix(index),
        }
    }

    fn chunk(&self, steps: &Range<usize>) -> Chunk<T> {
        let Sizes {
            features,
            value_width,
            ..
        } = self.sizes;
        let sizes = self.sizes;
        let positions = || steps.clone().map(move |step| sizes.position(step));
        let mut fade = Vec::with_capacity(steps.len() * features);
        for step in steps.clone() {
            match self.sizes.between(step) {
                None => fade.resize(features, T::zero()),
                at => fade.extend(picked(self.keys, features..2 * features, at.into_iter())),
            }
        }
        simd::vectorised(
            #[inline(always)]
            || {
                for a in &mut fade {
                    *a = a.exp();
                }
            },
        );
        Chunk {
            rows: steps.len(),
            features,
            value_width,
            q: picked(self.q, 0..features, positions()),
            k: picked(self.keys, 0..features, positions()),
            v: picked(self.v, 0..value_width, positions()),
            fade,
        }
    }

    /// Writes the sums of all positions, `[length, value_width]`.
    fn forward(&self, output: &mut [T]) {
        let width = self.sizes.value_width;
        let mut state = State::new(&self.sizes);
        for steps in self.sizes.chunks() {
            let chunk = self.chunk(&steps);
            let (rows, fades) = (0..chunk.rows, chunk.fades());
            let mut y = vec![T::zero(); chunk.rows * width];
            let read = scaled(&chunk.q, &fades.reach);
            let read = Chunk::matrix(&read, &rows, chunk.features);
            let one = Threads::One;
            multiply(
                &mut y,
                width,
                Into::Add,
                T::one(),
                read,
                state.matrix(),
                one,
            );
            chunk.within(rows.clone(), &mut y);
            let kept = scaled(&chunk.k, &fades.rest);
            let values = Chunk::matrix(&chunk.v, &rows, width);
            state.add(chunk.across(&fades), &kept, values);
            for (step, y) in steps.zip(y.chunks_exact(width.max(1))) {
                output[row(self.sizes.position(step), width)].copy_from_slice(y);
            }
        }
    }
}

struct ByFeature {
    sizes: Sizes,
}

impl ByFeature {
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
        let each = self.sizes.length * self.sizes.value_width;
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

    /// Gradients of queries, of keys with their decays beside them, and of values, packed.
    fn backward<T: Real>(&self, [q, keys, v, gradient]: [&Stack<T>; 4]) -> [Vec<T>; 3] {
        let Sizes {
            length,
            features,
            value_width,
            ..
        } = self.sizes;
        let heads = q.starts.len();
        let sizes = [features, 2 * features, value_width].map(|width| length * width);
        let mut results = sizes.map(|each| host::unwritten::<T>(heads * each));
        let [of_q, of_keys, of_v] = &mut results;
        let shared = [Shared::new(of_q), Shared::new(of_keys), Shared::new(of_v)];
        host::share(heads, 3 * self.work(), |range| {
            for index in range {
                // SAFETY: heads are disjoint.
                let [q_part, keys_part, v_part] = std::array::from_fn(|of| unsafe {
                    shared[of].part(index * sizes[of], sizes[of])
                });
                let head = Head::new(self.sizes, index, q, keys, v);
                let slopes = Slopes::of(&head, gradient.matrix(index));
                slopes.write(&head, [q_part, keys_part, v_part]);
            }
        });
        results
    }
}

/// The matrices of all heads of a tensor `[batch, heads, ..]`.
fn stack<'a, T: Real>(storage: &'a CpuStorage, layout: &Layout) -> Candle<Stack<'a, T>> {
    Stack::new(storage, layout, &layout.dims()[..2])
}

impl CustomOp3 for ByFeature {
    fn name(&self) -> &'static str {
        "linear attention by feature"
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
            Ok((T::to_cpu_storage_owned(sums), v_layout.shape().clone()))
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
