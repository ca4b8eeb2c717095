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
mod chunk;

use crate::by_head::{ByHead, by_head};
use crate::host::fused;
use crate::product::{Into, Matrix, Threads, multiply};
use crate::simd::{self, Real};
use crate::{Direction, Error, Result, Tensor, naive};
use backward::Slopes;
use chunk::{Chunk, State, picked, row, scaled};
use std::ops::Range;

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
    // Decays are further features of the keys.
    let keys = Tensor::cat(&[k, log_decay], 3)?;
    by_head(operation, q, &keys, v)
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

impl<'a, T: Real> Head<'a, T> {
    fn new(sizes: Sizes, [q, keys, v]: [Matrix<'a, T>; 3]) -> Self {
        Self { sizes, q, keys, v }
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

impl ByHead for ByFeature {
    fn name(&self) -> &'static str {
        "linear attention by feature"
    }

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

    fn forward<T: Real>(&self, _: usize, of: [Matrix<T>; 3], result: &mut [T]) {
        Head::new(self.sizes, of).forward(result);
    }

    fn backward<T: Real>(
        &self,
        _: usize,
        of: [Matrix<T>; 3],
        gradient: Matrix<T>,
        slopes: [&mut [T]; 3],
    ) {
        let head = Head::new(self.sizes, of);
        Slopes::of(&head, gradient).write(&head, slopes);
    }
}

#[cfg(test)]
mod tests;
