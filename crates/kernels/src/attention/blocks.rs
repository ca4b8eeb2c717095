//! Attention in listed blocks: a few queries and the keys that they meet, wherever their rows lie.
//!
//! A block names rows of queries and rows of keys. In a part each query is in one block at most; over all
//! parts it gets one softmax, in which a key that it meets several times counts several times:
//!
//! ```text
//! y_i = Σ_r Σ_{j in part r} e^{s_ij − L_i} v_j,   s_ij = scale · q_i · k_j + b_ij,   L_i = ln Σ_r Σ_j e^{s_ij}
//! ∂s_ij = e^{s_ij − L_i} (∂y_i · v_j − δ_i),   δ_i = ∂y_i · y_i − ∂L_i
//! ```
//!
//! Rows are read where they lie: only those of one block at a time are copied, into the shape that products
//! ask for. Backward, blocks that have a query or a key in common, such as those of a head, follow one another:
//! each adds its gradients where they belong, and no sum depends on the threads.

mod backward;
mod forward;
mod groups;
mod pieces;
mod rows;
mod summarised;
#[cfg(test)]
mod tests;

pub use summarised::SummaryAttention;

use crate::backward::Apply;
use crate::host::{self, Host, by_dtype, fused, rows_and_width};
use crate::simd::Real;
use crate::{Error, Result, Tensor, naive};
use candle_core::{CpuStorage, CustomOp3, Layout, Shape};
use pieces::Part;
use rows::{Inputs, Saved, Table};
use std::sync::{Arc, OnceLock};

type Candle<T> = candle_core::Result<T>;

/// One side of blocks.
#[derive(Clone, Debug, Default)]
pub struct Listed {
    /// Rows of queries or of keys and values.
    pub rows: Vec<u32>,
    /// Where each stands when it is asked who sees whom; those of keys rise within a block.
    pub positions: Vec<u32>,
}

/// Blocks of queries and keys, and what a query sees of its block's keys.
#[derive(Clone, Debug, Default)]
pub struct BlockPart {
    /// Where the queries and the keys of each block end in their lists.
    pub ends: Vec<[usize; 2]>,
    /// The queries of one block behind those of another.
    pub queries: Listed,
    /// The keys likewise.
    pub keys: Listed,
    /// Whether a query sees only keys that stand where it does or before.
    pub causal: bool,
    /// Whether it sees only keys that stand less than this away.
    pub window: Option<usize>,
    /// Added to the score of a key that stands where the query does; `-∞` hides it.
    pub own: f64,
    /// Added to the scores of each listed key; nothing for none.
    pub key_bias: Vec<f64>,
    /// Added to the score of each pair, `[query, key]` of one block behind those of another; `-∞` hides a
    /// pair, nothing stands for none.
    pub pair_bias: Vec<f64>,
    /// Pairs that do not meet, as places in the lists of queries and of keys, rising.
    pub hidden: Vec<[u32; 2]>,
}

/// Attention of queries over keys in the blocks of several parts.
#[derive(Debug)]
pub struct BlockAttention {
    parts: Vec<Part>,
    /// Rows of queries and of keys.
    rows: [usize; 2],
    scale: f64,
}

impl BlockAttention {
    /// Blocks among so many rows of queries and of keys, whose scores are multiplied by `scale`.
    ///
    /// # Errors
    /// When a list does not fit the others, a row is out of range, a part has a query twice or the keys of a
    /// block out of order.
    ///
    /// ```
    /// use lapidary_kernels::{BlockAttention, BlockPart, DType, Device, Listed, Tensor};
    /// use std::sync::Arc;
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// // Query 1 meets keys 0 and 2, query 0 meets nothing.
    /// let part = BlockPart {
    ///     ends: vec![[1, 2]],
    ///     queries: Listed { rows: vec![1], positions: vec![0] },
    ///     keys: Listed { rows: vec![0, 2], positions: vec![0, 0] },
    ///     ..BlockPart::default()
    /// };
    /// let attention = Arc::new(BlockAttention::new(vec![part], [2, 3], 1.0)?);
    /// let q = Tensor::zeros((2, 4), DType::F32, &Device::Cpu)?;
    /// let k = Tensor::zeros((3, 4), DType::F32, &Device::Cpu)?;
    /// let v = Tensor::new(&[[2f32], [5.0], [4.0]], &Device::Cpu)?;
    /// let y = attention.output([&q, &k, &v])?;
    /// assert_eq!(y.to_vec2::<f32>()?, [[0.0], [3.0]]);
    /// # Ok(()) }
    /// ```
    pub fn new(parts: Vec<BlockPart>, rows: [usize; 2], scale: f64) -> Result<Self> {
        let parts = parts.into_iter().map(|part| Part::new(part, rows));
        Ok(Self {
            parts: parts.collect::<Result<_>>()?,
            rows,
            scale,
        })
    }

    /// Pairs of a query and a key that it sees.
    pub fn pairs(&self) -> u64 {
        self.parts.iter().map(Part::pairs).sum()
    }

    /// Parts that have blocks.
    pub fn parts(&self) -> usize {
        self.parts.iter().filter(|part| !part.is_empty()).count()
    }

    /// What queries `[queries, width]` get of keys `[keys, width]` with values `[keys, value_width]`,
    /// `[queries, value_width]`; zeros for a query that sees no key. Differentiable. Rows may have several
    /// dimensions, as in `[batch, heads, length, width]`, and lie anywhere.
    ///
    /// # Errors
    /// When the shapes do not fit each other or the blocks.
    pub fn output(self: &Arc<Self>, inputs: [&Tensor; 3]) -> Result<Tensor> {
        let width = self.check(inputs)?;
        if fused(&inputs) {
            return self.apply(inputs, false);
        }
        Ok(self.laid_out(inputs)?.narrow(1, 0, width)?.contiguous()?)
    }

    /// The same with the log-sum `L` behind each output, `[queries, value_width + 1]`; `-∞` for a query that
    /// sees no key.
    pub(super) fn rows(self: &Arc<Self>, inputs: [&Tensor; 3]) -> Result<Tensor> {
        self.check(inputs)?;
        match fused(&inputs) {
            true => self.apply(inputs, true),
            false => self.laid_out(inputs),
        }
    }

    fn apply(self: &Arc<Self>, [q, k, v]: [&Tensor; 3], sums: bool) -> Result<Tensor> {
        let operation = Operation {
            of: self.clone(),
            sums,
            log_sums: OnceLock::new(),
        };
        Ok(q.apply3(k, v, operation)?)
    }

    fn laid_out(&self, inputs: [&Tensor; 3]) -> Result<Tensor> {
        let [q, k, v] = inputs.map(|x| -> Result<Tensor> {
            let (rows, width) = rows_and_width(x.dims());
            Ok(x.reshape((rows, width))?)
        });
        naive::block_rows(
            [&q?, &k?, &v?],
            self.parts.iter().map(Part::lists),
            self.scale,
        )
    }

    /// Fails where tensors do not fit each other or the blocks; the width of values.
    fn check(&self, inputs: [&Tensor; 3]) -> Result<usize> {
        self.check_rows(inputs, self.rows)
    }

    /// The same for so many rows of queries and of keys.
    fn check_rows(&self, [q, k, v]: [&Tensor; 3], [queries, keys]: [usize; 2]) -> Result<usize> {
        let width = q.dims().last().copied().unwrap_or(0);
        let argument = |name, tensor: &Tensor, expected: String| {
            Error::argument("attention in blocks", name, tensor.dims(), expected)
        };
        let fits = |x: &Tensor, rows: usize| x.rank() > 0 && rows_and_width(x.dims()).0 == rows;
        if !fits(q, queries) {
            return Err(argument("q", q, format!("{queries} rows")));
        }
        if !fits(k, keys) || k.dims().last() != Some(&width) {
            return Err(argument("k", k, format!("{keys} rows of {width}")));
        }
        if !fits(v, keys) {
            return Err(argument("v", v, format!("{keys} rows")));
        }
        Ok(v.dims().last().copied().unwrap_or(0))
    }
}

struct Operation {
    of: Arc<BlockAttention>,
    /// Whether log-sums stand behind outputs.
    sums: bool,
    /// `L` of every query.
    log_sums: OnceLock<Tensor>,
}

impl Operation {
    fn inputs<'a, T: Real>(
        &self,
        [q, k, v]: [(&'a CpuStorage, &Layout); 3],
    ) -> Candle<Inputs<'a, T>> {
        Ok(Inputs {
            q: Table::new(q.0, q.1)?,
            k: Table::new(k.0, k.1)?,
            v: Table::new(v.0, v.1)?,
            scale: T::of(self.of.scale),
        })
    }

    fn forward<T: Real>(&self, inputs: [(&CpuStorage, &Layout); 3]) -> Candle<(CpuStorage, Shape)> {
        let inputs = self.inputs::<T>(inputs)?;
        let (rows, log_sums) = forward::forward(&self.of, &inputs, self.sums);
        let queries = log_sums.len();
        // A second forward of the same operation would give the same numbers.
        let _ = self.log_sums.set(host::tensor(log_sums, &[queries])?);
        let columns = inputs.v.width + usize::from(self.sums);
        let shape = Shape::from((queries, columns));
        Ok((T::to_cpu_storage_owned(rows), shape))
    }

    fn backward<T: Real>(
        &self,
        inputs: [&Tensor; 3],
        rows: &Tensor,
        gradient: &Tensor,
    ) -> Candle<[Option<Tensor>; 3]> {
        let Some(log_sums) = self.log_sums.get() else {
            candle_core::bail!("attention in blocks: backward without forward")
        };
        let [q, k, v] = &inputs.map(Host::new);
        let x = self.inputs::<T>([
            (q.storage()?, q.layout),
            (k.storage()?, k.layout),
            (v.storage()?, v.layout),
        ])?;
        let [log_sums, rows, gradient] = &[log_sums, rows, gradient].map(Host::new);
        let saved = Saved {
            log_sums: &log_sums.ordered::<T>()?,
            rows: &rows.ordered::<T>()?,
            gradient: &gradient.ordered::<T>()?,
            width: x.v.width,
            sums: self.sums,
        };
        let [queries, keys] = self.of.rows;
        let [width, value_width] = x.widths();
        let start = [[queries, width], [keys, width], [keys, value_width]];
        let start = start.map(|[rows, width]| vec![T::zero(); rows * width]);
        let [dq, dk, dv] = backward::backward(&self.of, &x, &saved, start);
        let [q, k, v] = inputs;
        Ok([
            Some(host::tensor(dq, q.dims())?),
            Some(host::tensor(dk, k.dims())?),
            Some(host::tensor(dv, v.dims())?),
        ])
    }
}

impl CustomOp3 for Operation {
    fn name(&self) -> &'static str {
        "attention in blocks"
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
        by_dtype!(host::dtype(q), T => self.forward::<T>([(q, q_layout), (k, k_layout), (v, v_layout)]))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        rows: &Tensor,
        gradient: &Tensor,
    ) -> Candle<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [dq, dk, dv] =
            by_dtype!(q.dtype(), T => self.backward::<T>([q, k, v], rows, gradient))?;
        Ok((dq, dk, dv))
    }
}
