//! Attention in blocks: lists of queries, and of the keys that they meet.
//!
//! A sparse mechanism says which queries meet which keys by naming, for every head of every
//! sequence, blocks of a few queries and a few keys ([`Blocks`]). One kernel reads their rows where they
//! lie and gives each query one softmax over all the keys that it meets in any of several parts
//! ([`Meetings`]). Where parts have queries or keys of their own, what a query got in each is merged by
//! the log-sums:
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
use lapidary_kernels::{Attended, BlockAttention, BlockPart, D, DropoutMask, Listed, Tensor};
use lapidary_signal::Mixing;
use std::ops::Range;
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

/// What else is added to scores, or hidden.
#[derive(Clone, Copy, Default)]
pub(super) struct Bias<'a> {
    /// Added to all scores of a key.
    pub(super) of_key: Option<&'a dyn Fn(At) -> f64>,
    /// Added to the score of a query and a key; `-∞` hides it.
    pub(super) of_pair: Option<&'a dyn Fn(At, At) -> f64>,
}

/// Blocks of queries and the keys that they meet. A query is in one of them at most.
#[derive(Debug, Default)]
pub(super) struct Blocks {
    /// The queries, and the keys, of one block behind those of another.
    sides: [Vec<At>; 2],
    /// Where those of each block end.
    ends: Vec<[usize; 2]>,
}

impl Blocks {
    /// Adds a block; nothing where either side is empty.
    pub(super) fn push(
        &mut self,
        queries: impl IntoIterator<Item = At>,
        keys: impl IntoIterator<Item = At>,
    ) {
        let [before, start] = [0, 1].map(|side: usize| self.sides[side].len());
        let [of, over] = &mut self.sides;
        of.extend(queries);
        over.extend(keys);
        if of.len() > before && over.len() > start {
            self.ends.push([of.len(), over.len()]);
        } else {
            of.truncate(before);
            over.truncate(start);
        }
    }

    /// Whether there is none.
    pub(super) fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// All keys of all blocks.
    pub(super) fn keys(&self) -> impl Iterator<Item = &At> {
        self.sides[1].iter()
    }

    /// All keys of all blocks, to be moved.
    pub(super) fn keys_mut(&mut self) -> impl Iterator<Item = &mut At> {
        self.sides[1].iter_mut()
    }

    /// As the kernel reads them: keys in the order of their positions.
    pub(super) fn listed(mut self, rule: Rule, bias: Bias<'_>) -> BlockPart {
        let [queries, keys] = &mut self.sides;
        for [_, over] in each(&self.ends) {
            let keys = &mut keys[over];
            if !keys.is_sorted_by_key(|key| key.position) {
                keys.sort_by_key(|key| key.position);
            }
        }
        let (queries, keys) = (&*queries, &*keys);
        let mut pair_bias = Vec::new();
        if let Some(bias) = bias.of_pair {
            for [of, over] in each(&self.ends) {
                for query in &queries[of] {
                    pair_bias.extend(keys[over.clone()].iter().map(|key| bias(*query, *key)));
                }
            }
        }
        let listed = |side: &[At]| Listed {
            rows: side.iter().map(|at| at.row as u32).collect(),
            positions: side.iter().map(|at| at.position as u32).collect(),
        };
        let key_bias = bias.of_key.map(|bias| keys.iter().map(|key| bias(*key)));
        BlockPart {
            queries: listed(queries),
            keys: listed(keys),
            ends: self.ends,
            causal: rule.causal,
            window: rule.window,
            own: rule.own,
            key_bias: key_bias.into_iter().flatten().collect(),
            pair_bias,
            hidden: Vec::new(),
        }
    }
}

/// Each block, as places in both lists, by where they end.
fn each(ends: &[[usize; 2]]) -> impl Iterator<Item = [Range<usize>; 2]> + '_ {
    let starts = std::iter::once(&[0; 2]).chain(ends);
    let both = starts.zip(ends);
    both.map(|(start, end)| [start[0]..end[0], start[1]..end[1]])
}

/// The same part with the logarithm of what a mask says of each pair added to its score, for keys among the first
/// `rows`; others, which are summaries, are left as they are.
pub(super) fn dropped(part: BlockPart, mask: &DropoutMask, rows: usize) -> BlockPart {
    if part.keys.rows.iter().all(|&key| key as usize >= rows) {
        return part;
    }
    let mut pair_bias = Vec::new();
    for [of, over] in each(&part.ends) {
        for &query in &part.queries.rows[of] {
            let first = query as usize * rows;
            let keys = part.keys.rows[over.clone()].iter();
            pair_bias.extend(keys.map(|&key| match key as usize {
                key if key < rows => mask.at(first + key).ln(),
                _ => 0.0,
            }));
        }
    }
    for (to, own) in pair_bias.iter_mut().zip(&part.pair_bias) {
        *to += own;
    }
    BlockPart { pair_bias, ..part }
}

/// Queries, keys, and the blocks in which they meet under one softmax.
#[derive(Debug)]
pub(super) struct Meetings {
    /// Rows of queries, `[.., head_width]`.
    q: Tensor,
    /// Rows of keys, `[.., head_width]`.
    k: Tensor,
    queries: usize,
    attention: Arc<BlockAttention>,
}

impl Meetings {
    /// Those of rows of queries `q` `[.., width]` and keys `k` `[.., width]`; nothing where there is no block.
    pub(super) fn new(
        parts: Vec<BlockPart>,
        (q, k): (&Tensor, &Tensor),
        scale: f64,
    ) -> Result<Option<Self>> {
        if parts.iter().all(|part| part.ends.is_empty()) {
            return Ok(None);
        }
        let rows = [q, k].map(|x| x.elem_count() / x.dims().last().copied().unwrap_or(1).max(1));
        Ok(Some(Self {
            q: q.clone(),
            k: k.clone(),
            queries: rows[0],
            attention: Arc::new(BlockAttention::new(parts, rows, scale)?),
        }))
    }

    /// What each query gets of rows of values `[.., width]`: `[queries, width]`.
    pub(super) fn output(&self, values: &Tensor) -> lapidary_kernels::Result<Tensor> {
        self.attention.output([&self.q, &self.k, values])
    }

    /// The same, to be merged with more.
    pub(super) fn attended(&self, values: &Tensor) -> lapidary_kernels::Result<Attended> {
        let queries = Arc::new((0..self.queries as u32).collect());
        Attended::new([&self.q, &self.k, values], &self.attention, queries)
    }

    /// What each query gets where these are `whole` with some pairs left out and the others' scores raised: weights
    /// are shares of what all pairs of `whole` sum to, so that each is dropped or raised by itself.
    pub(super) fn share_of(
        &self,
        whole: &Self,
        values: &Tensor,
    ) -> lapidary_kernels::Result<Tensor> {
        let mut one = values.dims().to_vec();
        if let Some(last) = one.last_mut() {
            *last = 1;
        }
        // Whose log-sums alone are asked for.
        let nothing = Tensor::zeros(one, values.dtype(), values.device())?;
        let all = whole.attended(&nothing)?.log_sums()?;
        let kept = self.attended(values)?;
        // Finite, so that a query that meets nothing gets zeros.
        let share = (kept.log_sums()? - all.maximum(-1e30)?)?.exp()?;
        Ok(kept.output()?.broadcast_mul(&share.unsqueeze(1)?)?)
    }

    /// Pairs of a query and a key that it sees.
    pub(super) fn pairs(&self) -> u64 {
        self.attention.pairs()
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
    match Attended::merged_output(parts)? {
        Some(merged) => Ok(merged),
        None => {
            let shape = (queries, like.dim(D::Minus1)?);
            Ok(Tensor::zeros(shape, like.dtype(), like.device())?)
        }
    }
}

/// What queries get of `values` in all of some meetings, as one softmax.
pub(super) fn output(
    meetings: &[Meetings],
    queries: usize,
    values: &Tensor,
) -> lapidary_kernels::Result<Tensor> {
    if let [one] = meetings {
        return one.output(values);
    }
    let parts = meetings.iter().map(|each| each.attended(values));
    let parts = parts.collect::<lapidary_kernels::Result<Vec<_>>>()?;
    merge(&parts, queries, values)
}

/// Operations of attention in all of some meetings and of merging their parts.
pub(super) fn operations<'a>(
    meetings: impl IntoIterator<Item = &'a Meetings>,
    queries: usize,
    [head_width, width]: [usize; 2],
) -> u64 {
    let (mut count, mut pairs) = (0, 0);
    for each in meetings {
        count += each.attention.parts();
        pairs += each.pairs();
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
    /// Absent where nobody meets anybody.
    meetings: Option<Meetings>,
    /// Operations of whatever stood before.
    before: u64,
}

impl Sparse {
    /// Attention of `q` `[batch, heads, query, head_width]` over `k` in such blocks.
    pub(super) fn new(
        sizes: [usize; 4],
        (q, k): (&Tensor, &Tensor),
        scale: f64,
        parts: Vec<BlockPart>,
    ) -> Result<Self> {
        Ok(Self {
            sizes,
            head_width: tensor(q.dim(3))?,
            meetings: Meetings::new(parts, (q, k), scale)?,
            before: 0,
        })
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
        let mixed = output(self.meetings.as_slice(), self.queries(), values)?;
        Ok(mixed.reshape((batch, heads, queries, ()))?)
    }

    fn operations(&self, width: usize) -> u64 {
        self.before + operations(&self.meetings, self.queries(), [self.head_width, width])
    }
}
