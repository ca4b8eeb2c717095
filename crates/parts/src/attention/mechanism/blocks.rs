//! Attention in blocks: lists of queries, and of the keys that they meet.
//!
//! A sparse mechanism says which queries meet which keys by naming, for every head of every
//! sequence, blocks of a few queries and a few keys ([`Blocks`]). Their rows are gathered, each
//! block is attention of its own, and what a query got in several parts is
//! merged by the log-sums into one softmax over all the keys that it met:
//!
//! ```text
//! o = Σ_r e^{L^r − L} o^r,   L = ln Σ_r e^{L^r},   L^r = ln Σ_{j in part r} e^{s_j}
//! ```
//!
//! A query that meets no key gets zeros.
//!
//! Cost: for each pair of a query and a key that it may see `2 head_width + 2 value_width + 5`, and
//! `2 value_width + 4` for each query of each part where there are several.

use super::sequences::At;
use crate::Result;
use crate::error::tensor;
use lapidary_kernels::{Attended, AttentionOptions, PartOptions, Tensor, embedding};
use lapidary_signal::Mixing;
use std::sync::Arc;

/// Which keys of a block a query sees.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Rule {
    /// Those that stand where it does or before.
    pub(super) causal: bool,
    /// Those that stand less than this away.
    pub(super) window: Option<usize>,
    /// Added to the score of a key that stands where the query does; `-∞` hides it.
    pub(super) own: f64,
}

impl Rule {
    pub(super) fn sees(&self, query: At, key: At) -> bool {
        (!self.causal || key.position <= query.position)
            && self
                .window
                .is_none_or(|window| key.position.abs_diff(query.position) < window)
            && !(key.position == query.position && self.own == f64::NEG_INFINITY)
    }
}

/// Blocks of queries and the keys that they meet. A query is in one of them at most.
#[derive(Debug, Default)]
pub(super) struct Blocks {
    blocks: Vec<[Vec<At>; 2]>,
}

impl Blocks {
    /// Adds a block; nothing where either side is empty.
    pub(super) fn push(
        &mut self,
        queries: impl IntoIterator<Item = At>,
        keys: impl IntoIterator<Item = At>,
    ) {
        let block = [
            queries.into_iter().collect::<Vec<_>>(),
            keys.into_iter().collect::<Vec<_>>(),
        ];
        if block.iter().all(|side| !side.is_empty()) {
            self.blocks.push(block);
        }
    }

    /// Whether there is none.
    pub(super) fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// All keys of all blocks.
    pub(super) fn keys(&self) -> impl Iterator<Item = &At> {
        self.blocks.iter().flat_map(|[_, keys]| keys)
    }

    /// All keys of all blocks, to be moved.
    pub(super) fn keys_mut(&mut self) -> impl Iterator<Item = &mut At> {
        self.blocks.iter_mut().flat_map(|[_, keys]| keys)
    }

    /// Most queries and keys of a block.
    fn sizes(&self) -> [usize; 2] {
        [0, 1].map(|side| {
            let lengths = self.blocks.iter().map(|block| block[side].len());
            lengths.max().unwrap_or_default()
        })
    }

    /// Some number of each place of one side, `[blocks · size]`, and `fill` where there is none.
    fn listed<T: Clone>(&self, side: usize, fill: T, of: impl Fn(At) -> T) -> Vec<T> {
        let size = self.sizes()[side];
        let mut all = Vec::with_capacity(self.blocks.len() * size);
        for block in &self.blocks {
            all.extend(block[side].iter().map(|at| of(*at)));
            all.resize(all.len() + size - block[side].len(), fill.clone());
        }
        all
    }

    /// What is added to each score, `[blocks, query, key]`, and how many pairs are then left.
    fn biases(&self, rule: Rule, bias: Bias<'_>) -> (Vec<f64>, u64) {
        let [queries, keys] = self.sizes();
        let mut all = Vec::with_capacity(self.blocks.len() * queries * keys);
        let mut left = 0;
        for [of, over] in &self.blocks {
            for query in of {
                for key in over {
                    let added = bias(*query, *key);
                    left += u64::from(rule.sees(*query, *key) && added > f64::NEG_INFINITY);
                    all.push(added);
                }
                all.resize(all.len() + keys - over.len(), 0.0);
            }
            all.resize(all.len() + (queries - of.len()) * keys, 0.0);
        }
        (all, left)
    }

    fn filled(&self, side: usize) -> bool {
        let size = self.sizes()[side];
        self.blocks.iter().any(|block| block[side].len() < size)
    }
}

/// What is added to the score of a query and a key; `-∞` hides it.
pub(super) type Bias<'a> = &'a dyn Fn(At, At) -> f64;

/// One part of the keys that queries meet: gathered queries and keys, and the way back.
#[derive(Debug)]
pub(super) struct Part {
    blocks: Blocks,
    rule: Rule,
    /// Pairs that a bias leaves, where there is one.
    left: Option<u64>,
    /// `[blocks, 1, query, head_width]`.
    q: Tensor,
    /// `[blocks, 1, key, head_width]`.
    k: Tensor,
    /// The rows of the keys, `[blocks · key]`.
    keys: Tensor,
    /// Where each query lies among those of the blocks.
    back: Arc<Vec<u32>>,
    options: PartOptions,
}

impl Part {
    /// Gathers queries `q` `[queries, width]` and keys `k` `[keys, width]`; nothing where there is
    /// no block.
    pub(super) fn new(
        blocks: Blocks,
        rule: Rule,
        (q, k): (&Tensor, &Tensor),
        scale: f64,
        bias: Option<Bias<'_>>,
    ) -> Result<Option<Self>> {
        let (count, [queries, keys]) = (blocks.blocks.len(), blocks.sizes());
        if count == 0 {
            return Ok(None);
        }
        let device = q.device();
        let listed =
            |values: Vec<u32>, shape: &[usize]| tensor(Tensor::from_vec(values, shape, device));
        let rows = |side: usize| blocks.listed(side, 0, |at| at.row as u32);
        let positions = |side: usize| blocks.listed(side, 0, |at| at.position as u32);
        let query_rows = listed(rows(0), &[count * queries])?;
        let key_rows = listed(rows(1), &[count * keys])?;
        let (total, width) = tensor(q.dims2())?;
        let mut back = vec![Attended::NOWHERE; total];
        for (block, place) in blocks.blocks.iter().zip(0..) {
            for (at, lies) in block[0].iter().zip(place * queries..) {
                if let Some(back) = back.get_mut(at.row) {
                    *back = lies as u32;
                }
            }
        }
        let key_padding = match blocks.filled(1) {
            false => None,
            true => {
                let keep = blocks.listed(1, 0u8, |_| 1);
                Some(tensor(Tensor::from_vec(keep, (count, keys), device))?)
            }
        };
        let (mut left, mut added) = (None, None);
        if let Some(bias) = bias {
            let (all, seen) = blocks.biases(rule, bias);
            let all = tensor(Tensor::from_vec(all, (count, 1, queries, keys), device))?;
            added = Some(tensor(all.to_dtype(q.dtype()))?);
            left = Some(seen);
        }
        let options = PartOptions {
            attention: AttentionOptions {
                scale,
                causal: rule.causal,
                window: rule.window,
                key_padding,
                bias: added,
                ..AttentionOptions::new(width)
            },
            positions: Some([
                listed(positions(0), &[count, queries])?,
                listed(positions(1), &[count, keys])?,
            ]),
            own: rule.own,
        };
        Ok(Some(Self {
            q: tensor(embedding(q, &query_rows)?.reshape((count, 1, queries, width)))?,
            k: tensor(embedding(k, &key_rows)?.reshape((count, 1, keys, width)))?,
            keys: key_rows,
            back: Arc::new(back),
            options,
            left,
            blocks,
            rule,
        }))
    }

    /// What each query gets from this part of values `[keys, width]`.
    pub(super) fn attend(&self, values: &Tensor) -> lapidary_kernels::Result<Attended> {
        let (count, _, keys, _) = self.k.dims4()?;
        let v = embedding(values, &self.keys)?.reshape((count, 1, keys, ()))?;
        Attended::new([&self.q, &self.k, &v], &self.options, self.back.clone())
    }

    /// Pairs of a query and a key that it sees.
    pub(super) fn pairs(&self) -> u64 {
        if let Some(left) = self.left {
            return left;
        }
        let sees = |query: &At, keys: &[At]| {
            let seen = keys.iter().filter(|key| self.rule.sees(*query, **key));
            seen.count() as u64
        };
        let each = |[queries, keys]: &[Vec<At>; 2]| -> u64 {
            queries.iter().map(|query| sees(query, keys)).sum()
        };
        self.blocks.blocks.iter().map(each).sum()
    }
}

/// Rows `[batch · heads · length, width]` of `[batch, heads, length, width]`.
pub(super) fn rows(x: &Tensor) -> lapidary_kernels::Result<Tensor> {
    let (batch, heads, length, width) = x.dims4()?;
    Ok(x.contiguous()?.reshape((batch * heads * length, width))?)
}

/// `[batch · heads, length, width]` of `[batch, heads, length, width]`, as memories hold them.
pub(super) fn flat(x: &Tensor) -> Result<Tensor> {
    let (batch, heads, length, width) = tensor(x.dims4())?;
    tensor(tensor(x.contiguous())?.reshape((batch * heads, length, width)))
}

/// What queries got from several parts, as one softmax: `[queries, width]`; zeros without a part.
pub(super) fn merge(
    parts: &[Attended],
    queries: usize,
    like: &Tensor,
) -> lapidary_kernels::Result<Tensor> {
    match Attended::merged(parts)? {
        Some(merged) => merged.output(),
        None => {
            let shape = (queries, like.dim(1)?);
            Ok(Tensor::zeros(shape, like.dtype(), like.device())?)
        }
    }
}

/// Operations of attention over `parts` and of merging them.
pub(super) fn operations<'a>(
    parts: impl IntoIterator<Item = &'a Part>,
    queries: usize,
    [head_width, width]: [usize; 2],
) -> u64 {
    let (mut count, mut pairs) = (0, 0);
    for part in parts {
        count += 1;
        pairs += part.pairs();
    }
    let attended = pairs * (2 * head_width + 2 * width + 5) as u64;
    match count {
        0 | 1 => attended,
        count => attended + (count * queries * (2 * width + 4)) as u64,
    }
}

/// `[batch, heads, length, width]` with heads side by side, as caches hold them.
pub(super) fn side_by_side(x: &Tensor) -> Result<Tensor> {
    let (batch, heads, length, width) = tensor(x.dims4())?;
    let x = tensor(tensor(x.transpose(1, 2))?.contiguous())?;
    tensor(x.reshape((batch, length, heads * width)))
}

/// The way back of [`side_by_side`].
pub(super) fn apart(x: &Tensor, heads: usize) -> Result<Tensor> {
    let (batch, length, width) = tensor(x.dims3())?;
    let x = tensor(tensor(x.contiguous())?.reshape((batch, length, heads, width / heads)))?;
    tensor(tensor(x.transpose(1, 2))?.contiguous())
}

/// One softmax over the keys that each query meets in any of some parts.
#[derive(Debug)]
pub(super) struct Sparse {
    sizes: [usize; 4],
    head_width: usize,
    parts: Vec<Part>,
    /// Operations of whatever stood before.
    before: u64,
}

impl Sparse {
    /// Attention of `q` `[batch, heads, query, head_width]` over `k` in such blocks, with `bias` added to all
    /// scores.
    pub(super) fn new(
        sizes: [usize; 4],
        (q, k): (&Tensor, &Tensor),
        scale: f64,
        blocks: impl IntoIterator<Item = (Blocks, Rule)>,
        bias: Option<Bias<'_>>,
    ) -> Result<Self> {
        let (q_rows, k_rows) = (rows(q)?, rows(k)?);
        let mut parts = Vec::new();
        for (blocks, rule) in blocks {
            parts.extend(Part::new(blocks, rule, (&q_rows, &k_rows), scale, bias)?);
        }
        Ok(Self::of(sizes, tensor(q.dim(3))?, parts))
    }

    /// Attention over ready parts.
    pub(super) fn of(sizes: [usize; 4], head_width: usize, parts: Vec<Part>) -> Self {
        Self {
            sizes,
            head_width,
            parts,
            before: 0,
        }
    }

    /// The same behind as many operations of another kind.
    pub(super) fn after(self, operations: u64) -> Self {
        Self {
            before: operations,
            ..self
        }
    }

    fn queries(&self) -> usize {
        self.sizes[..3].iter().product()
    }
}

impl Mixing for Sparse {
    fn sizes(&self) -> [usize; 4] {
        self.sizes
    }

    fn mix(&self, values: &Tensor) -> lapidary_kernels::Result<Tensor> {
        let [batch, heads, queries, _] = self.sizes;
        let values = rows(values)?;
        let parts = self.parts.iter().map(|part| part.attend(&values));
        let parts = parts.collect::<lapidary_kernels::Result<Vec<_>>>()?;
        let merged = merge(&parts, self.queries(), &values)?;
        Ok(merged.reshape((batch, heads, queries, ()))?)
    }

    fn operations(&self, width: usize) -> u64 {
        self.before + operations(&self.parts, self.queries(), [self.head_width, width])
    }
}
