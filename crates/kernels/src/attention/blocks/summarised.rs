//! Attention to keys and to summaries of some of them (Ren et al., Combiner, 2021, arXiv 2107.05768), in one
//! operation.
//!
//! The rows of a list become one query and one key, feature by feature, and one value by attention among
//! themselves; queries then meet keys and summaries in listed blocks, under one softmax:
//!
//! ```text
//! q_l = max_{j in list l} q_j,   k_l = max_j k_j,   v_l = Σ_j softmax_j(scale · q_l · k_j) v_j
//! ```
//!
//! Keys and values stay where they lie, with summaries behind them in memory of their own. Backward, what
//! summaries hand on is added to the gradients that their tokens have already.

use super::backward::backward;
use super::forward::forward;
use super::rows::{Inputs, Saved, Table};
use super::{BlockAttention, BlockPart, Candle, Listed};
use crate::backward::Apply;
use crate::host::{self, Host, Rows, by_dtype, fused};
use crate::pooled_rows::Lists;
use crate::simd::Real;
use crate::{Result, RowPooling, Tensor, appended_rows};
use candle_core::{CpuStorage, CustomOp3, Layout, Shape};
use std::sync::{Arc, OnceLock};

/// Attention of queries over keys, and over summaries of lists of these, in the blocks of several parts.
#[derive(Debug)]
pub struct SummaryAttention {
    lists: Lists,
    /// Summaries over their tokens.
    inner: Arc<BlockAttention>,
    /// Queries over keys and summaries.
    outer: Arc<BlockAttention>,
}

impl SummaryAttention {
    /// Blocks among so many `tokens`, rows of queries and of keys alike, and summaries behind the keys: of the
    /// rows `listed`, one list behind the other, those of each up to its one of `ends`. Scores of both kinds are
    /// multiplied by `scale`.
    ///
    /// # Errors
    /// When a list has no row, ends before it begins, or names a row that is not there; and as
    /// [`BlockAttention::new`].
    ///
    /// ```
    /// use lapidary_kernels::{BlockPart, DType, Device, Listed, SummaryAttention, Tensor};
    /// use std::sync::Arc;
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// // Token 2 meets itself, and tokens 0 and 1 as one.
    /// let part = BlockPart {
    ///     ends: vec![[1, 2]],
    ///     queries: Listed { rows: vec![2], positions: vec![0] },
    ///     keys: Listed { rows: vec![2, 3], positions: vec![0, 0] },
    ///     ..BlockPart::default()
    /// };
    /// let attention = SummaryAttention::new((vec![0, 1], vec![2]), vec![part], 3, 1.0)?;
    /// let x = Tensor::zeros((3, 4), DType::F32, &Device::Cpu)?;
    /// let v = Tensor::new(&[[2f32], [4.0], [9.0]], &Device::Cpu)?;
    /// let y = Arc::new(attention).output([&x, &x, &v])?;
    /// assert_eq!(y.to_vec2::<f32>()?, [[0.0], [0.0], [6.0]]);
    /// # Ok(()) }
    /// ```
    pub fn new(
        (listed, ends): (Vec<u32>, Vec<usize>),
        parts: Vec<BlockPart>,
        tokens: usize,
        scale: f64,
    ) -> Result<Self> {
        let lists = Lists::new(listed, ends, RowPooling::Maximum, tokens)?;
        let summaries = lists.ends().len();
        let ends = lists.ends().iter().enumerate();
        let summing = BlockPart {
            ends: ends.map(|(list, end)| [list + 1, *end]).collect(),
            queries: Listed {
                rows: (0..summaries as u32).collect(),
                positions: vec![0; summaries],
            },
            keys: Listed {
                rows: lists.rows().to_vec(),
                positions: vec![0; lists.rows().len()],
            },
            ..BlockPart::default()
        };
        let inner = BlockAttention::new(vec![summing], [summaries, tokens], scale)?;
        let outer = BlockAttention::new(parts, [tokens, tokens + summaries], scale)?;
        Ok(Self {
            lists,
            inner: Arc::new(inner),
            outer: Arc::new(outer),
        })
    }

    /// Pairs of a query and a key or summary that it sees, and of a summary and its tokens.
    pub fn pairs(&self) -> [u64; 2] {
        [self.outer.pairs(), self.inner.pairs()]
    }

    /// Parts that have blocks.
    pub fn parts(&self) -> usize {
        self.outer.parts()
    }

    /// What queries `[tokens, width]` get of keys `[tokens, width]` with values `[tokens, value_width]`, and of
    /// their summaries: `[tokens, value_width]`; zeros for a query that sees nothing. Differentiable. Rows may
    /// have several dimensions, as in `[batch, heads, length, width]`, and lie anywhere.
    ///
    /// # Errors
    /// When the shapes do not fit each other or the blocks.
    pub fn output(self: &Arc<Self>, inputs: [&Tensor; 3]) -> Result<Tensor> {
        let [tokens, _] = self.outer.rows;
        self.outer.check_rows(inputs, [tokens; 2])?;
        if !fused(&inputs) {
            return self.composed(inputs);
        }
        let operation = Operation {
            of: self.clone(),
            saved: OnceLock::new(),
        };
        let [q, k, v] = inputs;
        Ok(q.apply3(k, v, operation)?)
    }

    /// The same by operations of their own.
    fn composed(&self, [q, k, v]: [&Tensor; 3]) -> Result<Tensor> {
        let [of_queries, of_keys] = [q, k].map(|x| self.lists.clone().of(x));
        let (of_queries, of_keys) = (of_queries?, of_keys?);
        let of_values = self.inner.output([&of_queries, k, v])?;
        let (k, v) = (appended_rows(k, &of_keys)?, appended_rows(v, &of_values)?);
        self.outer.output([q, &k, &v])
    }
}

struct Operation {
    of: Arc<SummaryAttention>,
    saved: OnceLock<Summaries>,
}

/// What the backward pass takes over from the forward one.
struct Summaries {
    /// Queries, keys and values.
    rows: [Tensor; 3],
    /// `L` of every summary, and of every query.
    log_sums: [Tensor; 2],
}

impl Operation {
    fn forward<T: Real>(
        &self,
        [q, k, v]: [(&CpuStorage, &Layout); 3],
    ) -> Candle<(CpuStorage, Shape)> {
        let of = &self.of;
        let width = q.1.dims().last().copied().unwrap_or(0);
        let pooled = |x: (&CpuStorage, &Layout)| -> Candle<Vec<T>> {
            Ok(of.lists.forward(&Rows::<T>::new(x.0, x.1)?, width))
        };
        let (of_queries, of_keys) = (pooled(q)?, pooled(k)?);
        let [keys, values] = [k, v].map(|x| Table::new(x.0, x.1));
        let summing = Inputs {
            q: Table::packed(&of_queries, width),
            k: keys?,
            v: values?,
            scale: T::of(of.inner.scale),
        };
        let (of_values, sums) = forward(&of.inner, &summing, false);
        let x = Inputs {
            q: Table::new(q.0, q.1)?,
            k: summing.k.with(&of_keys),
            v: summing.v.with(&of_values),
            scale: T::of(of.outer.scale),
        };
        let (y, log_sums) = forward(&of.outer, &x, false);
        let (queries, value_width) = (log_sums.len(), x.v.width);
        let lists = of_queries.len() / width.max(1);
        let saved = Summaries {
            rows: [
                host::tensor(of_queries, &[lists, width])?,
                host::tensor(of_keys, &[lists, width])?,
                host::tensor(of_values, &[lists, value_width])?,
            ],
            log_sums: [
                host::tensor(sums, &[lists])?,
                host::tensor(log_sums, &[queries])?,
            ],
        };
        // A second forward of the same operation would give the same numbers.
        let _ = self.saved.set(saved);
        let shape = Shape::from((queries, value_width));
        Ok((T::to_cpu_storage_owned(y), shape))
    }

    fn backward<T: Real>(
        &self,
        inputs: [&Tensor; 3],
        y: &Tensor,
        gradient: &Tensor,
    ) -> Candle<[Option<Tensor>; 3]> {
        let Some(saved) = self.saved.get() else {
            candle_core::bail!("attention to summaries: backward without forward")
        };
        let of = &self.of;
        let [q, k, v] = &inputs.map(Host::new);
        let [of_queries, of_keys, of_values] = &saved.rows.each_ref().map(Host::new);
        let (of_queries, of_keys) = (of_queries.ordered::<T>()?, of_keys.ordered::<T>()?);
        let of_values = of_values.ordered::<T>()?;
        let [sums, log_sums] = &saved.log_sums.each_ref().map(Host::new);
        let [y, gradient] = &[y, gradient].map(Host::new);
        let x = Inputs {
            q: Table::new(q.storage()?, q.layout)?,
            k: Table::new(k.storage()?, k.layout)?.with(&of_keys),
            v: Table::new(v.storage()?, v.layout)?.with(&of_values),
            scale: T::of(of.outer.scale),
        };
        let [width, value_width] = x.widths();
        let [tokens, all] = of.outer.rows;
        let zeros = |rows: usize, width: usize| vec![T::zero(); rows * width];
        let outer = Saved {
            log_sums: &log_sums.ordered::<T>()?,
            rows: &y.ordered::<T>()?,
            gradient: &gradient.ordered::<T>()?,
            width: value_width,
            sums: false,
        };
        let start = [
            zeros(tokens, width),
            zeros(all, width),
            zeros(all, value_width),
        ];
        let [dq, mut dk, mut dv] = backward(&of.outer, &x, &outer, start);
        let slopes_of_keys = dk.split_off(tokens * width);
        let slopes_of_values = dv.split_off(tokens * value_width);
        let summing = Inputs {
            q: Table::packed(&of_queries, width),
            ..x
        };
        let inner = Saved {
            log_sums: &sums.ordered::<T>()?,
            rows: &of_values,
            gradient: &slopes_of_values,
            width: value_width,
            sums: false,
        };
        let start = [zeros(all - tokens, width), dk, dv];
        let [slopes_of_queries, dk, dv] = backward(&of.inner, &summing, &inner, start);
        let pooled = |x: &Host, y: &[T], slopes: &[T], into: Vec<T>| -> Candle<Vec<T>> {
            let rows = Rows::<T>::new(x.storage()?, x.layout)?;
            Ok(of.lists.backward(&rows, [y, slopes], width, into))
        };
        let dq = pooled(q, &of_queries, &slopes_of_queries, dq)?;
        let dk = pooled(k, &of_keys, &slopes_of_keys, dk)?;
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
        "attention to summaries"
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
        y: &Tensor,
        gradient: &Tensor,
    ) -> Candle<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [dq, dk, dv] = by_dtype!(q.dtype(), T => self.backward::<T>([q, k, v], y, gradient))?;
        Ok((dq, dk, dv))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{difference, gradient_error};
    use crate::test_data::{arange, compare};
    use crate::{DType, Device, Var};

    const TOKENS: usize = 150;

    fn listed(rows: impl IntoIterator<Item = u32>) -> Listed {
        let rows: Vec<u32> = rows.into_iter().collect();
        Listed {
            positions: (0..rows.len() as u32).collect(),
            rows,
        }
    }

    /// Segments of 40 tokens and the rest, which every later segment meets with its own tokens; and a part of
    /// single queries, with tokens and summaries among their keys.
    fn segments() -> Arc<SummaryAttention> {
        let rows = (0..TOKENS as u32).collect();
        let mut own = BlockPart::default();
        let mut far = BlockPart::default();
        for (segment, start) in (0..TOKENS as u32).step_by(40).enumerate() {
            let tokens = start..(start + 40).min(TOKENS as u32);
            let add = |side: &mut Listed, rows: Listed| {
                side.rows.extend(rows.rows);
                side.positions.extend(rows.positions);
                side.rows.len()
            };
            let ends = [
                add(&mut own.queries, listed(tokens.clone())),
                add(&mut own.keys, listed(tokens.clone())),
            ];
            own.ends.push(ends);
            let summaries = (0..segment as u32).map(|before| TOKENS as u32 + before);
            let few = tokens.step_by(9);
            for query in few {
                // A summary between keys that lie apart.
                let met = summaries.clone().chain([query, TOKENS as u32 + 3]);
                let ends = [
                    add(&mut far.queries, listed([query])),
                    add(&mut far.keys, listed(met)),
                ];
                far.ends.push(ends);
            }
        }
        own.causal = true;
        far.key_bias = (0..far.keys.rows.len())
            .map(|key| (key as f64).sin())
            .collect();
        // All queries with all summaries.
        let all = BlockPart {
            ends: vec![[TOKENS, 4]],
            queries: listed(0..TOKENS as u32),
            keys: listed(TOKENS as u32..TOKENS as u32 + 4),
            ..BlockPart::default()
        };
        let lists = (rows, vec![40, 80, 120, TOKENS]);
        let attention = SummaryAttention::new(lists, vec![own, far, all], TOKENS, 0.3);
        Arc::new(attention.unwrap())
    }

    fn inputs([width, value_width]: [usize; 2], dtype: DType) -> [Tensor; 3] {
        // Heads side by side, so that rows do not lie in their order.
        let of = |width: usize, phase: f64| {
            let x = arange(&[TOKENS / 3, 3, width], phase, dtype);
            x.transpose(0, 1).unwrap()
        };
        [of(width, 1.0), of(width, 2.0), of(value_width, 3.0)]
    }

    #[test]
    fn equals_operations_of_their_own() {
        for widths in [[5, 3], [24, 40]] {
            compare(2e-5, |dtype| {
                let [q, k, v] = inputs(widths, dtype);
                let of = segments();
                let inputs = [&q, &k, &v];
                (of.output(inputs).unwrap(), of.composed(inputs).unwrap())
            });
        }
        let pairs = segments().pairs();
        assert_eq!(pairs[1], TOKENS as u64);
        assert_eq!(segments().parts(), 3);
    }

    fn slopes(dtype: DType, of: impl Fn([&Tensor; 3]) -> Result<Tensor>) -> Vec<Tensor> {
        let x = inputs([24, 40], dtype).map(|x| Var::from_tensor(&x).unwrap());
        let y = of([0, 1, 2].map(|side: usize| x[side].as_tensor())).unwrap();
        let loss = y.sin().unwrap().sum_all().unwrap();
        let gradients = loss.backward().unwrap();
        let mut all: Vec<Tensor> = x
            .iter()
            .map(|x| gradients.get(x).unwrap().clone())
            .collect();
        all.push(y.detach());
        all
    }

    #[test]
    fn gradients_equal_those_of_operations_of_their_own() {
        for (dtype, tolerance) in [(DType::F64, 1e-10), (DType::F32, 2e-4)] {
            let of = segments();
            let ours = slopes(dtype, |x| of.output(x));
            let plain = slopes(dtype, |x| of.composed(x));
            for (ours, plain) in ours.iter().zip(&plain) {
                assert!(difference(ours, plain).unwrap() < tolerance, "{dtype:?}");
            }
        }
    }

    #[test]
    fn gradients_equal_finite_differences() {
        // Two tokens in a list, one in two, and one that is a list.
        let lists = (vec![0, 3, 1, 2, 3, 4], vec![2, 5, 6]);
        let part = BlockPart {
            ends: vec![[2, 3], [3, 7]],
            queries: listed([0, 2, 4]),
            keys: listed([1, 5, 6, 0, 4, 7, 6]),
            ..BlockPart::default()
        };
        let of = Arc::new(SummaryAttention::new(lists, vec![part], 5, 0.7).unwrap());
        let inputs = [[5, 3], [5, 3], [5, 2]];
        let phases = [1.0, 2.0, 3.0];
        let inputs = inputs.iter().zip(phases);
        let inputs: Vec<Tensor> = inputs
            .map(|(dims, phase)| arange(dims, phase, DType::F64))
            .collect();
        let output = |x: &[Tensor]| of.output([&x[0], &x[1], &x[2]]);
        assert!(gradient_error(output, &inputs).unwrap() < 1e-7);
    }

    #[test]
    fn does_not_depend_on_the_number_of_threads() {
        let with = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
            let pool = pool.build().unwrap();
            pool.install(|| slopes(DType::F32, |x| segments().output(x)))
        };
        let one = with(1);
        for threads in [2, 3] {
            for (one, many) in one.iter().zip(with(threads)) {
                assert_eq!(difference(one, &many).unwrap(), 0.0);
            }
        }
    }

    #[test]
    fn what_is_not_there_is_refused() {
        let new = |rows: Vec<u32>, ends: Vec<usize>| {
            SummaryAttention::new((rows, ends), Vec::new(), 3, 1.0).is_err()
        };
        assert!(!new(vec![0, 2], vec![1, 2]));
        assert!(new(vec![0, 3], vec![2]));
        assert!(new(vec![0, 1], vec![0, 2]));
        assert!(new(vec![0, 1], vec![1]));
        let of = Arc::new(SummaryAttention::new((vec![0], vec![1]), Vec::new(), 3, 1.0).unwrap());
        let x = |rows: usize, width: usize| {
            Tensor::zeros((rows, width), DType::F32, &Device::Cpu).unwrap()
        };
        assert!(of.output([&x(3, 2), &x(3, 2), &x(3, 1)]).is_ok());
        assert!(of.output([&x(4, 2), &x(3, 2), &x(3, 1)]).is_err());
        assert!(of.output([&x(3, 2), &x(4, 2), &x(3, 1)]).is_err());
        assert!(of.output([&x(3, 2), &x(3, 2), &x(4, 1)]).is_err());
    }
}
