//! Attention to tokens and summaries alike.

use super::Summaries;
use crate::Result;
use crate::attention::mechanism::blocks::{Meetings, operations, output};
use crate::error::tensor;
use lapidary_kernels::{BlockPart, SummaryAttention, Tensor, appended_rows};
use lapidary_signal::Mixing;
use std::sync::Arc;

/// The mean over divisions of what queries meet, each one softmax over keys and summaries.
#[derive(Debug)]
pub(in super::super) struct Summarised {
    /// `[batch, heads, queries, keys]`.
    pub(in super::super) sizes: [usize; 4],
    pub(in super::super) head_width: usize,
    /// Summaries that stand behind the keys.
    pub(in super::super) made: Option<Summaries>,
    /// Where queries and keys meet in each division.
    pub(in super::super) divisions: Vec<Vec<Meetings>>,
    /// Where weights are dropped, the same of each division with none of them dropped; empty otherwise.
    pub(in super::super) whole: Vec<Option<Meetings>>,
    /// Operations of whatever stood before.
    pub(in super::super) before: u64,
}

impl Mixing for Summarised {
    fn sizes(&self) -> [usize; 4] {
        self.sizes
    }

    fn mix(&self, values: &Tensor) -> lapidary_kernels::Result<Tensor> {
        let [batch, heads, queries, _] = self.sizes;
        let values = match &self.made {
            None => values.clone(),
            Some(made) => appended_rows(values, &made.values(values)?)?,
        };
        let mut sum: Option<Tensor> = None;
        for (at, division) in self.divisions.iter().enumerate() {
            let mixed = match (division.as_slice(), self.whole.get(at)) {
                ([kept], Some(Some(whole))) => kept.share_of(whole, &values)?,
                _ => output(division, batch * heads * queries, &values)?,
            };
            sum = Some(match sum {
                None => mixed,
                Some(sum) => (sum + mixed)?,
            });
        }
        let sum = match sum {
            None => output(&[], batch * heads * queries, &values)?,
            Some(sum) if self.divisions.len() == 1 => sum,
            Some(sum) => (sum / self.divisions.len() as f64)?,
        };
        Ok(sum.reshape((batch, heads, queries, ()))?)
    }

    fn operations(&self, width: usize) -> u64 {
        let queries: usize = self.sizes[..3].iter().product();
        let widths = [self.head_width, width];
        let each = self.divisions.iter();
        let attended = each.map(|meetings| operations(meetings, queries, widths));
        let made = self.made.as_ref().map_or(0, |made| made.operations(widths));
        let averaged = match self.divisions.len() {
            0 | 1 => 0,
            count => count * queries * width,
        };
        let shared = self.whole.iter().flatten().map(|whole| {
            let shares = (queries * width) as u64;
            shares + operations([whole], queries, [self.head_width, 1])
        });
        self.before + made + attended.sum::<u64>() + shared.sum::<u64>() + averaged as u64
    }
}

/// One softmax over keys and summaries of whole lists by the largest features of their tokens, in one operation.
#[derive(Debug)]
pub(in super::super) struct Joined {
    /// `[batch, heads, queries, keys]`.
    sizes: [usize; 4],
    head_width: usize,
    q: Tensor,
    k: Tensor,
    attention: Arc<SummaryAttention>,
    /// Operations of whatever stood before.
    before: u64,
}

impl Joined {
    /// Attention of `q` over `k`, both `[batch, heads, length, head_width]`, and over summaries of `lists` of
    /// rows, which parts count on from those of keys.
    pub(in super::super) fn new(
        sizes: [usize; 4],
        (q, k): (&Tensor, &Tensor),
        lists: (Vec<u32>, Vec<usize>),
        parts: Vec<BlockPart>,
        (scale, before): (f64, u64),
    ) -> Result<Self> {
        let tokens = sizes[..3].iter().product();
        Ok(Self {
            sizes,
            head_width: tensor(q.dim(3))?,
            q: q.clone(),
            k: k.clone(),
            attention: Arc::new(SummaryAttention::new(lists, parts, tokens, scale)?),
            before,
        })
    }
}

impl Mixing for Joined {
    fn sizes(&self) -> [usize; 4] {
        self.sizes
    }

    fn mix(&self, values: &Tensor) -> lapidary_kernels::Result<Tensor> {
        let [batch, heads, queries, _] = self.sizes;
        let mixed = self.attention.output([&self.q, &self.k, values])?;
        Ok(mixed.reshape((batch, heads, queries, ()))?)
    }

    /// As those of [`Summarised`].
    fn operations(&self, width: usize) -> u64 {
        let queries: usize = self.sizes[..3].iter().product();
        let pairs: u64 = self.attention.pairs().into_iter().sum();
        let merged = match self.attention.parts() {
            0 | 1 => 0,
            parts => parts * queries * (2 * width + 4),
        };
        self.before + pairs * (2 * self.head_width + 2 * width + 5) as u64 + merged as u64
    }
}
