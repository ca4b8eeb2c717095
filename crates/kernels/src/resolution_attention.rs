//! Attention whose matrix is put together of blocks of several sizes (Zeng et al., MRA, arXiv 2207.10284): all blocks
//! of the largest size, of which the best give way to their parts of the next size, and so on.
//!
//! ```text
//! S_XY = scale · q̃_X · k̃_Y + ln n_Y,   y_i = Σ_Y e^{S_XY − L_i} ṽ_Y,   L_i = ln Σ_Y e^{S_XY},   i ∈ X
//! ```
//!
//! over all blocks `X, Y` of any size that are left, where `q̃`, `k̃`, `ṽ` are means of the rows of a block and `n_Y` is
//! their number. Sizes are gone through from the largest on: the parts of a block go on with the softmax where that
//! stopped, so that nothing is merged at the end. In causal attention the first query of a block stands for it, and a
//! larger block sees those before it alone.
//!
//! Products of tiles read keys and values that are laid out once for each head, and what was chosen is a list of blocks:
//! nothing of the size of the matrix is laid out but the scores of the largest blocks while these are chosen.

mod averaged;
mod backward;
mod choice;
mod forward;
mod level;
#[cfg(test)]
mod tests;

pub use choice::largest_of;

use crate::backward::Apply;
use crate::host::{self, Host, Shared, by_dtype, fused};
use crate::product::Matrix;
use crate::simd::Real;
use crate::stack::Stack;
use crate::{D, DType, Device, Error, Result, Tensor, naive};
use candle_core::{CpuStorage, CustomOp3, Layout, Shape, WithDType};
use choice::Chosen;
use level::Level;
use rayon::prelude::*;
use std::sync::{Arc, OnceLock};

type Candle<T> = candle_core::Result<T>;

const NAME: &str = "attention of several resolutions";
/// Added to the score of a block that is refined before all others.
const PRIOR: f64 = 5e3;

/// Sizes of blocks, and which of them are refined.
#[derive(Clone, Debug)]
pub struct ResolutionOptions {
    /// Sides of blocks, each a divisor of the one before; down to 1 in causal attention.
    pub sizes: Vec<usize>,
    /// How many blocks of each size but the last are refined, for each row of such blocks: of all rows together, or in
    /// causal attention of each.
    pub per_row: Vec<usize>,
    /// Whether what is not refined is left out.
    pub sparse: bool,
    /// Whether a row sees only those up to itself. Blocks on the diagonal are then refined in any case, where any is.
    pub causal: bool,
    /// Width of a band around the diagonal, in blocks of the largest size, that is refined first; 0 for none.
    pub diagonal: usize,
    /// First rows and columns of such blocks that are.
    pub first: usize,
    /// Multiplies every score.
    pub scale: f64,
}

impl ResolutionOptions {
    /// What is added to the score of a block of the largest size when blocks are chosen.
    pub fn prior(&self, row: usize, column: usize) -> f64 {
        let near = self.diagonal > 0 && row.abs_diff(column) <= self.diagonal / 2;
        let first = row < self.first || column < self.first;
        PRIOR * (f64::from(u8::from(near)) + f64::from(u8::from(first)))
    }

    fn check(&self) -> Result<()> {
        let divide =
            |pair: &[usize]| matches!(pair, [a, b] if *b >= 1 && a > b && a.is_multiple_of(*b));
        let last = self.sizes.last().copied().unwrap_or(0);
        if last == 0 || !self.sizes.windows(2).all(divide) || (self.causal && last != 1) {
            let expected = "each a divisor of the one before, down to 1 in causal attention";
            return Err(Error::argument(NAME, "sizes", &self.sizes, expected));
        }
        if self.per_row.len() + 1 != self.sizes.len() {
            let expected = format!("{} numbers", self.sizes.len() - 1);
            return Err(Error::argument(NAME, "per_row", &self.per_row, expected));
        }
        if self.causal && self.per_row.contains(&0) {
            let expected = "above 0 in causal attention, whose diagonal is refined";
            return Err(Error::argument(NAME, "per_row", &self.per_row, expected));
        }
        Ok(())
    }
}

/// Blocks that were chosen for some queries and keys.
#[derive(Debug)]
pub struct ResolutionAttention {
    options: ResolutionOptions,
    /// `[batch, heads, rows, width]` of queries and of keys.
    dims: [usize; 4],
    /// Of each head of each sequence.
    chosen: Vec<Chosen>,
}

impl ResolutionAttention {
    /// Chooses blocks for queries `q` and keys `k`, both `[batch, heads, rows, width]`; only the first so many rows of
    /// each head of each sequence, `lengths`, are there. No gradient passes through the choice.
    ///
    /// # Errors
    /// When sizes do not divide each other, or shapes or lengths do not fit.
    ///
    /// ```
    /// use lapidary_kernels::{DType, Device, ResolutionAttention, ResolutionOptions, Tensor};
    /// use std::sync::Arc;
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let options = ResolutionOptions {
    ///     sizes: vec![2, 1],
    ///     per_row: vec![1],
    ///     sparse: true,
    ///     causal: false,
    ///     diagonal: 1,
    ///     first: 0,
    ///     scale: 1.0,
    /// };
    /// // Blocks of two on the diagonal, and no others.
    /// let q = Tensor::zeros((1, 1, 4, 3), DType::F32, &Device::Cpu)?;
    /// let attention = Arc::new(ResolutionAttention::new([&q, &q], &[4], options)?);
    /// let v = Tensor::new(&[1f32, 3.0, 5.0, 9.0], &Device::Cpu)?.reshape((1, 1, 4, 1))?;
    /// let y = attention.output([&q, &q, &v])?;
    /// assert_eq!(y.flatten_all()?.to_vec1::<f32>()?, [2.0, 2.0, 7.0, 7.0]);
    /// # Ok(()) }
    /// ```
    pub fn new(
        [q, k]: [&Tensor; 2],
        lengths: &[usize],
        options: ResolutionOptions,
    ) -> Result<Self> {
        options.check()?;
        let (batch, heads, rows, width) = q.dims4()?;
        if k.dims() != q.dims() {
            let expected = format!("{:?}", q.dims());
            return Err(Error::argument(NAME, "k", k.dims(), expected));
        }
        if lengths.len() != batch * heads || lengths.iter().any(|length| *length > rows) {
            let expected = format!("{} of at most {rows}", batch * heads);
            return Err(Error::argument(NAME, "lengths", lengths, expected));
        }
        let known = fused(&[q, k]);
        let side = |x: &Tensor| -> Result<Tensor> {
            let x = x.detach();
            match known {
                true => side_by_side(&x),
                false => side_by_side(&x.to_device(&Device::Cpu)?.to_dtype(DType::F64)?),
            }
        };
        let (q, k) = (side(q)?, side(k)?);
        let hosts = [&q, &k].map(Host::new);
        let chosen: Candle<Vec<Chosen>> = by_dtype!(q.dtype(), T => {
            let [q, k] = [stack::<T>(&hosts[0])?, stack::<T>(&hosts[1])?];
            let of = |(index, length): (usize, &usize)| {
                Chosen::new(&options, *length, [q.matrix(index), k.matrix(index)])
            };
            Ok(lengths.par_iter().enumerate().map(of).collect())
        });
        Ok(Self {
            options,
            dims: [batch, heads, rows, width],
            chosen: chosen?,
        })
    }

    /// What the queries get of values `v` `[batch, heads, rows, value_width]`, `[batch, heads, rows, value_width]`;
    /// zeros where a row is not there, or meets nothing. Differentiable in all three.
    ///
    /// # Errors
    /// When the shapes are not those that blocks were chosen for.
    pub fn output(self: &Arc<Self>, inputs: [&Tensor; 3]) -> Result<Tensor> {
        let [q, k, v] = inputs;
        for (name, x) in [("q", q), ("k", k)] {
            if x.dims() != self.dims {
                let expected = format!("{:?}", self.dims);
                return Err(Error::argument(NAME, name, x.dims(), expected));
            }
        }
        if v.rank() != 4 || v.dims()[..3] != self.dims[..3] {
            let expected = format!("{:?} and a width", &self.dims[..3]);
            return Err(Error::argument(NAME, "v", v.dims(), expected));
        }
        if !fused(&inputs) {
            return self.laid_out(inputs);
        }
        let operation = Operation {
            of: self.clone(),
            log_sums: OnceLock::new(),
        };
        let (q, k, v) = (side_by_side(q)?, side_by_side(k)?, side_by_side(v)?);
        Ok(q.apply3(&k, &v, operation)?)
    }

    fn laid_out(&self, inputs: [&Tensor; 3]) -> Result<Tensor> {
        let lengths: Vec<usize> = self.chosen.iter().map(|chosen| chosen.length).collect();
        let met = |index, i, j| self.met(index, i, j);
        naive::resolution_attention(inputs, &self.options, &lengths, met)
    }

    /// In which of the sizes rows `i` and `j` of a head of a sequence meet, if in any.
    fn met(&self, index: usize, i: usize, j: usize) -> Option<usize> {
        let chosen = self.chosen.get(index)?;
        if i >= chosen.length || j >= chosen.length {
            return None;
        }
        let last = self.options.per_row.len();
        for (number, size) in self.options.sizes.iter().enumerate() {
            let (row, column) = (i / size, j / size);
            let refined = chosen.refined.get(number);
            if refined.is_some_and(|lists| lists.of(row).contains(&(column as u32))) {
                continue;
            }
            let hidden = self.options.causal && column + usize::from(*size > 1) > row;
            let left_out = self.options.sparse && number < last;
            return (!hidden && !left_out).then_some(number);
        }
        None
    }

    /// Operations of choosing blocks, of means, and of [`ResolutionAttention::output`] for values of a width: for each
    /// pair of blocks that meet `2 width + 2 value_width + 5`, and `2 value_width + 4` for each row at each size where
    /// several have such pairs.
    pub fn operations(&self, value_width: usize) -> u64 {
        let [.., width] = self.dims;
        let sizes = &self.options.sizes;
        let (mut considered, mut pairs, mut met) = (0, 0, vec![false; sizes.len()]);
        for chosen in &self.chosen {
            considered += chosen.considered;
            for level in Level::<f64>::all(&self.options, chosen) {
                pairs += level.pairs();
                met[level.number] |= level.is_met();
            }
        }
        let longest = self.chosen.iter().map(|chosen| chosen.length).max();
        let rows = longest.unwrap_or(0).max(1).next_multiple_of(sizes[0]) * self.chosen.len();
        // Rows, and smaller blocks, that are added up to make larger ones.
        let (mut summed, mut finer) = (0, 1);
        for size in sizes.iter().rev().filter(|size| **size > 1) {
            summed += rows / finer;
            finer = *size;
        }
        let averaged = if self.options.causal { 1 } else { 2 };
        let means = summed * (averaged * width + value_width);
        let merged = match met.iter().filter(|met| **met).count() {
            0 | 1 => 0,
            several => several * rows * (2 * value_width + 4),
        };
        pairs * (2 * width + 2 * value_width + 5) as u64
            + (means + merged + 2 * width * considered) as u64
    }
}

/// The same with the numbers of a row side by side.
fn side_by_side(x: &Tensor) -> Result<Tensor> {
    match x.dim(D::Minus1)? == 1 || x.stride().last() == Some(&1) {
        true => Ok(x.clone()),
        false => Ok(x.contiguous()?),
    }
}

fn stack<'a, T: Real>(x: &'a Host<'_>) -> Candle<Stack<'a, T>> {
    Stack::new(x.storage()?, x.layout, &x.layout.dims()[..2])
}

struct Operation {
    of: Arc<ResolutionAttention>,
    /// `L` of every row, `[batch · heads · rows]`.
    log_sums: OnceLock<Tensor>,
}

impl Operation {
    /// About how long a head takes.
    fn work(&self, widths: usize) -> usize {
        let of = |chosen: &Chosen| -> u64 {
            let levels = Level::<f64>::all(&self.of.options, chosen);
            levels.iter().map(Level::pairs).sum()
        };
        let pairs = self.of.chosen.first().map_or(0, of) as usize;
        (pairs * widths / 8).max(1)
    }

    fn forward<T: Real>(&self, of: [&Stack<'_, T>; 3]) -> Candle<Vec<T>> {
        let [.., rows, width] = self.of.dims;
        let value_width = of[2].columns;
        let heads = self.of.chosen.len();
        let mut y = host::unwritten::<T>(heads * rows * value_width);
        let mut log_sums = host::unwritten::<T>(heads * rows);
        let shared = (Shared::new(&mut y), Shared::new(&mut log_sums));
        host::share(heads, self.work(width + value_width), |range| {
            for index in range {
                // SAFETY: heads are disjoint.
                let (y, log_sums) = unsafe {
                    let size = rows * value_width;
                    (
                        shared.0.part(index * size, size),
                        shared.1.part(index * rows, rows),
                    )
                };
                let of = of.map(|x| x.matrix(index));
                let (options, chosen) = (&self.of.options, &self.of.chosen[index]);
                forward::forward(options, chosen, of, y, log_sums);
            }
        });
        let count = log_sums.len();
        // A second forward of the same operation would give the same numbers.
        let _ = self.log_sums.set(host::tensor(log_sums, &[count])?);
        Ok(y)
    }

    fn backward<T: Real>(
        &self,
        of: [&Stack<'_, T>; 3],
        (y, log_sums): (&[T], &[T]),
        gradient: &Stack<'_, T>,
    ) -> [Vec<T>; 3] {
        let [.., rows, width] = self.of.dims;
        let value_width = of[2].columns;
        let heads = self.of.chosen.len();
        let sizes = of.map(|x| rows * x.columns);
        let mut results = sizes.map(|each| host::unwritten::<T>(heads * each));
        let shared = results.each_mut().map(|result| Shared::new(result));
        host::share(heads, 3 * self.work(width + value_width), |range| {
            for index in range {
                // SAFETY: heads are disjoint.
                let slopes = std::array::from_fn(|side| unsafe {
                    shared[side].part(index * sizes[side], sizes[side])
                });
                let saved = backward::Saved {
                    y: &y[index * rows * value_width..(index + 1) * rows * value_width],
                    log_sums: &log_sums[index * rows..(index + 1) * rows],
                    gradient: gradient.matrix(index),
                };
                let of: [Matrix<'_, T>; 3] = of.map(|x| x.matrix(index));
                let (options, chosen) = (&self.of.options, &self.of.chosen[index]);
                backward::backward(options, chosen, of, &saved, slopes);
            }
        });
        results
    }
}

impl CustomOp3 for Operation {
    fn name(&self) -> &'static str {
        NAME
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
        let pairs = |layout: &Layout| layout.dims()[..2].to_vec();
        by_dtype!(host::dtype(q), T => {
            let y = self.forward::<T>([
                &Stack::new(q, q_layout, &pairs(q_layout))?,
                &Stack::new(k, k_layout, &pairs(k_layout))?,
                &Stack::new(v, v_layout, &pairs(v_layout))?,
            ])?;
            Ok((T::to_cpu_storage_owned(y), v_layout.shape().clone()))
        })
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        y: &Tensor,
        gradient: &Tensor,
    ) -> Candle<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let Some(log_sums) = self.log_sums.get() else {
            candle_core::bail!("{NAME}: backward without forward")
        };
        let hosts = [q, k, v, y, log_sums, gradient].map(Host::new);
        let [of_q, of_k, of_v, y, log_sums, gradient] = &hosts;
        by_dtype!(q.dtype(), T => {
            let of = [&stack::<T>(of_q)?, &stack(of_k)?, &stack(of_v)?];
            let (y, log_sums) = (y.ordered::<T>()?, log_sums.ordered::<T>()?);
            let [dq, dk, dv] = self.backward::<T>(of, (&y, &log_sums), &stack(gradient)?);
            Ok((host::wanted(q, dq)?, host::wanted(k, dk)?, host::wanted(v, dv)?))
        })
    }
}
