//! Sparse Transformer (Child et al., Generating Long Sequences with Sparse Transformers, 2019,
//! arXiv 1904.10509): causal attention in two steps of about `√n` keys each, which together reach
//! every earlier token.
//!
//! With a stride `l`, a query `i` sees of the keys `j ≤ i`
//!
//! ```text
//!           first step                second step
//! strided   i − j < l                 (i − j) mod l = 0
//! fixed     ⌊j / l⌋ = ⌊i / l⌋         j mod l in the last c of 0 … l − 1
//! axial     ⌊j / l⌋ = ⌊i / l⌋         (i − j) mod l = 0
//! ```
//!
//! Strided is for data with a period of `l`, such as the rows of an image; fixed for text, where
//! `c` columns at the end of each block carry it on; axial sees row and column of a grid of width
//! `l`. The steps stand in different blocks of a model (`steps` is `first` in one and `second` in
//! the next), in the even and the odd heads of one (`by-head`), or one softmax is taken over the
//! keys of both (`merged`). Heads of the fixed pattern may each have columns of their own: the
//! `h mod groups`-th run of `c` counted from the end of the block. Beside them stands the pattern of
//! LogSparse (Li et al., 2019, arXiv 1907.00235): the token itself and those `1, 2, 4, …` before, and layouts
//! that are written out block by block ([`BlockLayout`]).
//!
//! Nothing outside a pattern is computed: `i − j < l` is attention of runs of `l` queries over `2 l`
//! keys, the second step of strided is block-local attention once the sequence is laid out as
//! `[l, n / l]`, and the columns of fixed are gathered. What a query sees in both steps counts once
//! when they are merged. A token that sees no key, as in the second step of fixed before the first
//! column, gets zeros.
//!
//! Cost: for each pair that a pattern leaves `2 head_width + 2 value_width + 5`; at most
//! `l + ⌈n / l⌉` pairs for a query (strided, axial), or `l + c ⌈n / l⌉` (fixed). Rows of a layout are laid out
//! together that name about as many blocks, which are merged where there are several kinds. No parameters.
//!
//! While decoding, a step gathers the keys and values of its pattern alone. They are kept only as long
//! as a later token may see them (at times twice as many, until there is no room): the last `l`
//! in the first step of strided, the own block in that of the others, the columns in the second
//! step of fixed; every column of strided and axial is read again, and all of it is kept. Of a layout it is
//! the blocks that a later row names.

mod layout;

pub use layout::BlockLayout;

use super::blocks::{Bias, Blocks, Rule, Sparse, flat};
use super::met::Met;
use super::sequences::{At, Sequence, Sequences};
use super::{Abilities, Describe, Heads, Mechanism, MechanismPass, Memory, Resumed};
use crate::error::{bounded, tensor};
use crate::parameters::Parameters;
use crate::state::{Kept, MixerState};
use crate::{Error, Result};
use lapidary_kernels::Tensor;
use lapidary_signal::Mixing;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

const MAX_STRIDE: usize = 1 << 24;

/// Attention over a pattern of earlier tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SparseSpec {
    /// Which earlier tokens.
    pub pattern: SparsePattern,
    /// Which of the pattern's two steps this attention takes.
    #[serde(default)]
    pub steps: Steps,
}

/// Which earlier tokens a token sees.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum SparsePattern {
    /// The last `stride`; every `stride`-th.
    Strided {
        /// The stride `l`.
        stride: usize,
    },
    /// Those of the same block of `stride`; the last columns of every block.
    Fixed {
        /// The stride `l`.
        stride: usize,
        /// The columns `c` that a head sees of each block.
        summaries: usize,
        /// Runs of columns that heads take in turn, counted from the end of a block.
        #[serde(default = "one")]
        groups: usize,
    },
    /// Those of the same row of `stride`; those of the same column.
    Axial {
        /// The stride `l`.
        stride: usize,
    },
    /// Those `0, 1, 2, 4, 8, …` before, in one step.
    #[serde(deserialize_with = "crate::fields::none")]
    LogSparse,
    /// Those of the blocks that a layout names, in one step.
    Layout(BlockLayout),
}

/// Which steps of a pattern an attention takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Steps {
    /// The near one.
    First,
    /// The far one.
    Second,
    /// Both, under one softmax.
    #[default]
    Merged,
    /// The near one in even heads, the far one in odd heads.
    ByHead,
}

fn one() -> usize {
    1
}

impl Steps {
    /// As in a spec.
    fn name(self) -> &'static str {
        match self {
            Self::First => "first",
            Self::Second => "second",
            Self::Merged => "merged",
            Self::ByHead => "by-head",
        }
    }
}

impl Describe for SparseSpec {
    fn kind(&self) -> &'static str {
        "sparse"
    }

    fn abilities(&self) -> Abilities {
        Abilities {
            causal: true,
            ..Abilities::default()
        }
    }

    fn longest(&self) -> Option<(String, usize)> {
        match &self.pattern {
            SparsePattern::Layout(layout) => Some(("pattern.heads".to_owned(), layout.tokens())),
            _ => None,
        }
    }

    fn validate(&self, heads: &Heads, field: &str) -> Result<()> {
        let at = |name: &str| format!("{field}.{name}");
        match self.pattern {
            SparsePattern::LogSparse | SparsePattern::Layout(_) if self.steps != Steps::Merged => {
                return Err(Error::spec(
                    at("steps"),
                    self.steps.name(),
                    "merged: log-sparse and layouts have one step",
                ));
            }
            SparsePattern::LogSparse => {}
            SparsePattern::Layout(ref layout) => {
                layout.validate(heads.heads, &at("pattern"))?;
            }
            SparsePattern::Strided { stride } | SparsePattern::Axial { stride } => {
                bounded(at("pattern.stride"), stride, 1..=MAX_STRIDE)?;
            }
            SparsePattern::Fixed {
                stride,
                summaries,
                groups,
            } => {
                bounded(at("pattern.stride"), stride, 1..=MAX_STRIDE)?;
                bounded(at("pattern.summaries"), summaries, 1..=stride)?;
                bounded(at("pattern.groups"), groups, 1..=stride / summaries)?;
            }
        }
        if self.steps == Steps::ByHead && heads.heads < 2 {
            return Err(Error::spec(
                at("steps"),
                "by-head with one head",
                "first, second or merged, or two heads at least",
            ));
        }
        Ok(())
    }

    fn build(&self, heads: &Heads, _: Parameters<'_>) -> Result<Box<dyn Mechanism>> {
        Ok(Box::new(SparseAttention {
            spec: self.clone(),
            scale: heads.scale,
        }))
    }
}

/// The module.
#[derive(Debug)]
struct SparseAttention {
    spec: SparseSpec,
    scale: f64,
}

impl SparseAttention {
    /// Attention of `q` over `k`, of which it is said which queries meet which keys.
    fn attend(
        &self,
        sizes: [usize; 4],
        (q, k): (&Tensor, &Tensor),
        blocks: Vec<(Blocks, Rule)>,
    ) -> Result<Sparse> {
        let [_, heads, queries, _] = sizes;
        let masked = match &self.spec.pattern {
            SparsePattern::Layout(layout) if layout.is_masked() => Some(layout),
            _ => None,
        };
        let seen = |query: At, key: At| {
            let head = query.row / queries.max(1) % heads.max(1);
            match masked.is_none_or(|layout| layout.sees(head, query.position, key.position)) {
                true => 0.0,
                false => f64::NEG_INFINITY,
            }
        };
        let bias = Bias {
            of_pair: masked.map(|_| &seen as &dyn Fn(At, At) -> f64),
            ..Bias::default()
        };
        let parts = blocks.into_iter();
        let parts = parts.map(|(blocks, rule)| blocks.listed(rule, bias));
        Sparse::new(sizes, (q, k), self.scale, parts.collect())
    }

    /// Which queries meet which keys, in each step, or of a layout in each part.
    fn blocks(
        &self,
        sequences: &Sequences<'_>,
        pass: &MechanismPass<'_>,
    ) -> Result<Vec<(Blocks, Rule)>> {
        let causal = Rule {
            causal: true,
            ..Rule::default()
        };
        if let SparsePattern::Layout(layout) = &self.spec.pattern {
            let longest = sequences.lengths().into_iter().max().unwrap_or(0);
            layout.holds(longest, pass.path)?;
            let mut parts = Vec::new();
            for sequence in sequences.iter() {
                layout.meet(&sequence, &mut parts);
            }
            return Ok(parts.into_iter().map(|part| (part, causal)).collect());
        }
        let (mut near, mut far) = (Blocks::default(), Blocks::default());
        for sequence in sequences.iter() {
            let (takes_near, takes_far) = self.spec.takes(sequence.head);
            if takes_near {
                self.spec.near(&sequence, &mut near);
            }
            if takes_far {
                self.spec.far(&sequence, &mut far);
            }
        }
        let window = match self.spec.pattern {
            SparsePattern::Strided { stride } => Some(stride),
            _ => None,
        };
        Ok(vec![(near, Rule { window, ..causal }), (far, causal)])
    }

    /// The first tokens; all is at hand.
    fn start(&self, [q, k, v]: [&Tensor; 3], pass: &MechanismPass<'_>) -> Result<(Resumed, Kept)> {
        let sequences = Sequences::new(q, k, pass)?;
        let blocks = self.blocks(&sequences, pass)?;
        let mixing = self.attend(sequences.sizes, (q, k), blocks)?;
        let mut kept = Kept::new(&[&flat(k)?, &flat(v)?])?;
        self.forget(&mut kept, &sequences)?;
        let step = Resumed::Kept {
            mixing: Box::new(mixing),
            values: v.clone(),
        };
        Ok((step, kept))
    }

    /// Tokens that follow those that are `kept`.
    fn follow(
        &self,
        [q, k, v]: [&Tensor; 3],
        kept: &mut Kept,
        pass: &MechanismPass<'_>,
    ) -> Result<Resumed> {
        kept.append(&[&flat(k)?, &flat(v)?])?;
        let step = self.among(q, kept, pass)?;
        if kept.rows().is_full() {
            let places = kept.places().to_vec();
            self.forget(kept, &Sequences::kept(q, &places, 0, pass)?)?;
        }
        Ok(step)
    }

    /// Attention of the last tokens that are `kept`.
    fn among(&self, q: &Tensor, kept: &Kept, pass: &MechanismPass<'_>) -> Result<Resumed> {
        let sequences = Sequences::kept(q, kept.places(), 0, pass)?;
        let [batch, heads, queries, _] = sequences.sizes;
        let mut blocks = self.blocks(&sequences, pass)?;
        let rows = blocks.iter().flat_map(|(blocks, _)| blocks.keys());
        let met = Met::new(rows.map(|key| key.row), sequences.sizes, queries);
        for key in blocks.iter_mut().flat_map(|(blocks, _)| blocks.keys_mut()) {
            met.carry(key);
        }
        let sizes = [batch, heads, queries, met.columns().len()];
        let gathered = |sort: usize| -> Result<Tensor> {
            let rows = kept.rows().pick(sort, met.columns())?;
            tensor(rows.reshape((batch, heads, met.columns().len(), ())))
        };
        let keys = gathered(0)?;
        Ok(Resumed::Kept {
            mixing: Box::new(self.attend(sizes, (q, &keys), blocks)?),
            values: gathered(1)?,
        })
    }

    /// Leaves what a later token may still see.
    fn forget(&self, kept: &mut Kept, sequences: &Sequences<'_>) -> Result<()> {
        kept.retain(|place| {
            sequences.iter().any(|sequence| {
                let keeps = |token| self.spec.keeps(sequence.head, token, sequence.len());
                sequence.token(place).is_some_and(keeps)
            })
        })
    }
}

impl Mechanism for SparseAttention {
    fn mixing(&self, q: &Tensor, k: &Tensor, pass: &MechanismPass<'_>) -> Result<Box<dyn Mixing>> {
        let sequences = Sequences::new(q, k, pass)?;
        let blocks = self.blocks(&sequences, pass)?;
        Ok(Box::new(self.attend(sequences.sizes, (q, k), blocks)?))
    }

    fn memory(&self) -> Memory {
        Memory::Own
    }

    fn resume(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        state: &mut MixerState,
        pass: &MechanismPass<'_>,
    ) -> Result<Resumed> {
        match state {
            MixerState::Empty => {
                let (step, kept) = self.start([q, k, v], pass)?;
                *state = MixerState::Kept(kept);
                Ok(step)
            }
            MixerState::Kept(kept) => self.follow([q, k, v], kept, pass),
            other => Err(Error::spec(
                format!("decode state at {}", pass.path),
                other.name(),
                "keys and values of a pattern",
            )),
        }
    }
}

impl SparseSpec {
    /// Which steps a head takes.
    fn takes(&self, head: usize) -> (bool, bool) {
        let even = head.is_multiple_of(2);
        match self.steps {
            Steps::First => (true, false),
            Steps::Second => (false, true),
            Steps::Merged => (true, true),
            Steps::ByHead => (even, !even),
        }
    }

    /// Which of the `groups` runs of columns a head sees.
    fn run_of(&self, head: usize, groups: usize) -> usize {
        match self.steps {
            Steps::ByHead => head / 2 % groups,
            _ => head % groups,
        }
    }

    /// Whether a head sees `token` from `next` on.
    fn keeps(&self, head: usize, token: usize, next: usize) -> bool {
        let (near, far) = self.takes(head);
        match self.pattern {
            SparsePattern::Strided { stride } => far || next - token < stride,
            SparsePattern::Axial { stride } => far || token / stride == next / stride,
            SparsePattern::Fixed {
                stride,
                summaries,
                groups,
            } => {
                let run = (stride - 1 - token % stride) / summaries;
                (near && token / stride == next / stride)
                    || (far && run == self.run_of(head, groups))
            }
            SparsePattern::LogSparse => true,
            SparsePattern::Layout(ref layout) => layout.keeps(head, token, next),
        }
    }

    /// Blocks of the first step.
    fn near(&self, sequence: &Sequence<'_>, blocks: &mut Blocks) {
        let (queries, length) = (sequence.queries(), sequence.len());
        let mut meet = |of: std::ops::Range<usize>, over: std::ops::Range<usize>| {
            blocks.push(of.map(|i| sequence.query(i)), over.map(|j| sequence.key(j)));
        };
        match self.pattern {
            SparsePattern::Strided { stride } => {
                for start in queries.clone().step_by(stride) {
                    let end = (start + stride).min(length);
                    meet(start..end, (start + 1).saturating_sub(stride)..end);
                }
            }
            SparsePattern::Fixed { stride, .. } | SparsePattern::Axial { stride } => {
                for block in queries.start / stride..length.div_ceil(stride) {
                    let (start, end) = (block * stride, length.min((block + 1) * stride));
                    meet(start.max(queries.start)..end, start..end);
                }
            }
            SparsePattern::LogSparse => {
                for i in queries {
                    let before = (0..usize::BITS).map(|power| 1usize << power);
                    let before = before.take_while(|before| *before <= i);
                    let seen = std::iter::once(i).chain(before.map(|before| i - before));
                    blocks.push([sequence.query(i)], seen.map(|j| sequence.key(j)));
                }
            }
            // Its blocks are told apart by how many meet, not by steps.
            SparsePattern::Layout(_) => {}
        }
    }

    /// Blocks of the second step. Where both are merged, what the first has seen stands so far
    /// ahead that the second doesn't see it again.
    fn far(&self, sequence: &Sequence<'_>, blocks: &mut Blocks) {
        let (queries, length) = (sequence.queries(), sequence.len());
        let merged = self.steps == Steps::Merged;
        match self.pattern {
            // The sequence as [stride, length / stride].
            SparsePattern::Strided { stride } | SparsePattern::Axial { stride } => {
                for first in queries.start..length.min(queries.start + stride) {
                    let of = (first..length).step_by(stride);
                    let column = (first % stride..length).step_by(stride);
                    let ahead = if merged { stride } else { 0 };
                    let over = column.map(|j| At {
                        position: j + ahead,
                        ..sequence.key(j)
                    });
                    blocks.push(of.map(|i| sequence.query(i)), over);
                }
            }
            SparsePattern::Fixed {
                stride,
                summaries,
                groups,
            } => {
                // The run ends that many columns before its block does.
                let behind = self.run_of(sequence.head, groups) * summaries;
                let over = (stride..=length.next_multiple_of(stride))
                    .step_by(stride)
                    .flat_map(|end| {
                        let run = end - behind - summaries..length.min(end - behind);
                        run.map(move |j| At {
                            position: if merged { end } else { j },
                            ..sequence.key(j)
                        })
                    });
                blocks.push(queries.map(|i| sequence.query(i)), over);
            }
            SparsePattern::LogSparse | SparsePattern::Layout(_) => {}
        }
    }
}
