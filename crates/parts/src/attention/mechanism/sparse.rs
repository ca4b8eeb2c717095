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
//! LogSparse (Li et al., 2019, arXiv 1907.00235): the token itself and those `1, 2, 4, …` before.
//!
//! Nothing outside a pattern is computed: `i − j < l` is attention of runs of `l` queries over `2 l`
//! keys, the second step of strided is block-local attention once the sequence is laid out as
//! `[l, n / l]`, and the columns of fixed are gathered. What a query sees in both steps counts once
//! when they are merged. A token that sees no key, as in the second step of fixed before the first
//! column, gets zeros.
//!
//! Cost: for each pair that a pattern leaves `2 head_width + 2 value_width + 5`; at most
//! `l + ⌈n / l⌉` pairs for a query (strided, axial), or `l + c ⌈n / l⌉` (fixed). No parameters.
//!
//! While decoding, keys and values are kept only as long as a later token may see them: the last `l`
//! in the first step of strided, the own block in that of the others, the columns in the second
//! step of fixed; every column of strided and axial is read again, and all of it is kept.

use super::blocks::{Blocks, Rule, Sparse, apart, side_by_side};
use super::sequences::{At, Sequence, Sequences};
use super::{Abilities, Describe, Heads, Mechanism, MechanismPass, Memory, Resumed};
use crate::error::{bounded, tensor};
use crate::parameters::Parameters;
use crate::state::MixerState;
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
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
    LogSparse,
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

    fn validate(&self, heads: &Heads, field: &str) -> Result<()> {
        let at = |name: &str| format!("{field}.{name}");
        match self.pattern {
            SparsePattern::LogSparse if self.steps != Steps::Merged => {
                return Err(Error::spec(
                    at("steps"),
                    self.steps,
                    "merged: log-sparse has one step",
                ));
            }
            SparsePattern::LogSparse => {}
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
    fn among(&self, sequences: &Sequences, q: &Tensor, k: &Tensor) -> Result<Sparse> {
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
        let causal = Rule {
            causal: true,
            ..Rule::default()
        };
        let window = match self.spec.pattern {
            SparsePattern::Strided { stride } => Some(stride),
            _ => None,
        };
        let steps = [(near, Rule { window, ..causal }), (far, causal)];
        Sparse::new(sequences, (q, k), self.scale, steps)
    }

    /// Which of the rows of keys, and where they are from, a later token may still see.
    fn needed(&self, sequences: &Sequences, places: &[usize]) -> Vec<(usize, usize)> {
        let mut needed = vec![false; places.last().map_or(0, |last| last + 1)];
        for sequence in sequences.iter() {
            for token in 0..sequence.len() {
                let place = needed.get_mut(sequence.place(token));
                if let Some(needed) = place.filter(|needed| !**needed) {
                    *needed = self.spec.keeps(sequence.head, token, sequence.len());
                }
            }
        }
        let all = places.iter().copied().enumerate();
        all.filter(|(_, place)| needed.get(*place) == Some(&true))
            .collect()
    }
}

impl Mechanism for SparseAttention {
    fn mixing(&self, q: &Tensor, k: &Tensor, pass: &MechanismPass<'_>) -> Result<Box<dyn Mixing>> {
        let sequences = Sequences::new(q, k, pass)?;
        Ok(Box::new(self.among(&sequences, q, k)?))
    }

    fn memory(&self) -> Memory {
        match (self.spec.pattern, self.spec.steps) {
            (SparsePattern::Fixed { .. }, _) | (_, Steps::First) => Memory::Own,
            // Every token is in a column that is read again.
            (SparsePattern::Strided { .. } | SparsePattern::Axial { .. }, _)
            | (SparsePattern::LogSparse, _) => Memory::KeysAndValues,
        }
    }

    fn resume(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        state: &mut MixerState,
        pass: &MechanismPass<'_>,
    ) -> Result<Resumed> {
        let (_, heads, new, _) = tensor(k.dims4())?;
        let (mut keys, mut values) = (side_by_side(k)?, side_by_side(v)?);
        let (mut places, earlier) = match state {
            MixerState::Empty => (Vec::new(), 0),
            MixerState::Kept {
                keys: old_keys,
                values: old_values,
                places,
                length,
            } => {
                keys = tensor(Tensor::cat(&[&*old_keys, &keys], 1))?;
                values = tensor(Tensor::cat(&[&*old_values, &values], 1))?;
                (std::mem::take(places), *length)
            }
            _ => {
                return Err(Error::spec(
                    format!("decode state at {}", pass.path),
                    "another mixer's",
                    "that of a pattern",
                ));
            }
        };
        let length = earlier + new;
        places.extend(earlier..length);
        let all = apart(&keys, heads)?;
        let sequences = Sequences::kept(q, &all, &places, pass)?;
        let whole = self.among(&sequences, q, &all)?;
        let step = Resumed::Kept {
            mixing: Box::new(whole),
            values: apart(&values, heads)?,
        };
        let needed = self.needed(&sequences, &places);
        let rows: Vec<u32> = needed.iter().map(|(row, _)| *row as u32).collect();
        let rows = tensor(Tensor::new(rows, keys.device()))?;
        let left = |x: &Tensor| tensor(x.detach().index_select(&rows, 1));
        *state = MixerState::Kept {
            keys: left(&keys)?,
            values: left(&values)?,
            places: needed.into_iter().map(|(_, place)| place).collect(),
            length,
        };
        Ok(step)
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
                for column in 0..stride.min(length) {
                    let column = (column..length).step_by(stride);
                    let of = column.clone().filter(|i| queries.contains(i));
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
                        let run = end - behind - summaries..end - behind;
                        run.filter(|j| *j < length).map(move |j| At {
                            position: if merged { end } else { j },
                            ..sequence.key(j)
                        })
                    });
                blocks.push(queries.map(|i| sequence.query(i)), over);
            }
            SparsePattern::LogSparse => {}
        }
    }
}
