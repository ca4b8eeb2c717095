//! Combiner (Ren et al., Combiner: Full Attention Transformer with Sparse Computation Cost, 2021,
//! arXiv 2107.05768): every token attends to some keys directly and to all others through
//! summaries of spans, under one softmax.
//!
//! The tokens that `i` may see are divided into those of `Ω⁰`, met one by one, and spans `Ω^r`:
//!
//! ```text
//! y_i = 1/Z_i ( Σ_{j ∈ Ω⁰} e^{s q_i·k_j} v_j + Σ_r e^{s q_i·k_{Ω^r}} v_{Ω^r} )
//! v_Ω = Σ_{j ∈ Ω} softmax_j( s q_Ω·k_j ) v_j,   k_Ω = max_{j ∈ Ω} k_j,   q_Ω = max_{j ∈ Ω} q_j
//! ```
//!
//! with the maximum taken feature by feature, `s` the attention's scale and `Z_i` the sum of all
//! exponentials. The forms, for a sequence in segments or rows of `m`:
//!
//! * *fixed*: own segment directly; every other segment a span;
//! * *log-sparse*: itself directly; spans of `2^ℓ` tokens, those that stand before it where
//!   `⌊i / 2^ℓ⌋` is odd, which tile everything before it; both sides alike without causality;
//! * *vertical*: own column above and own row directly; what every other column has above the row
//!   a span;
//! * *horizontal*: the same directly; of each earlier row what is to the left a span, and to the
//!   right;
//! * *row-major*: own row directly; each earlier row a span, summed up by its token in the same
//!   column: `q_Ω` is the query of that token and `k_Ω` the keys weighted as the values are;
//! * *mixture*: the mean of vertical and horizontal attention, or, where `joint`, both sorts of spans
//!   under one softmax, as the authors' program has it, which covers earlier tokens twice.
//!
//! A span whose keys are all alike counts as one key, not as its number of tokens; `log_count`
//! adds the logarithm of that number to its score.
//!
//! Left out: summaries by a learned layer, and keys of row-major spans that are projections of their
//! values, which would make weights depend on values.
//!
//! Cost: for each pair of a query and a key or summary, and of a summary and a token of its span,
//! `2 head_width + 2 value_width + 5`; for `n` tokens about `n (m + n / m)` pairs of each sort, or
//! `n log₂ n`. No parameters.
//!
//! While decoding, a summary is made once, in the step that ends its span, and a step gathers those rows
//! alone that its queries meet: `m + n / m` or `log₂ n` of them. Kept are
//!
//! * *fixed*, *row-major*: a summary for each segment, or for each token of each earlier row; queries, keys
//!   and values of the segment or row that is not over;
//! * *log-sparse*: the summaries that tile what is before the next token, `log₂ n` of them; queries, keys and
//!   values of all tokens, since a span of twice the length is made of them: half a token's work for each
//!   level on average, all of it in the step that ends the span;
//! * *vertical*: a summary or two for each column; queries, keys and values of all tokens, since a column is
//!   summed up again when it grows;
//! * *horizontal*: two summaries for each token of each earlier row; keys and values of all tokens, which are
//!   met in their column, and queries of the last row;
//! * *mixture*: what both of these need.

mod divisions;

use super::blocks::{Bias, Part, Rule, rows};
use super::met::Met;
use super::sequences::{At, Sequences};
use super::spans::{Ended, Making, Rules, Sort, Span, SpanMemory, Summaries, Summarised};
use super::{Abilities, Describe, Heads, Mechanism, MechanismPass, Memory, Resumed};
use crate::error::{bounded, tensor};
use crate::parameters::Parameters;
use crate::state::MixerState;
use crate::{Error, Result};
use divisions::{Division, Tokens};
use lapidary_kernels::Tensor;
use lapidary_signal::Mixing;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;

const MAX_SEGMENT: usize = 1 << 24;

/// Attention to all tokens, most of them in summary.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CombinerSpec {
    /// What is met directly and what in which spans.
    pub form: CombinerForm,
    /// Whether the logarithm of a span's number of tokens is added to its score.
    #[serde(default)]
    pub log_count: bool,
}

/// How the tokens that one may see are divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum CombinerForm {
    /// Own segment; other segments.
    Fixed {
        /// Tokens of a segment.
        segment: usize,
    },
    /// Itself; spans whose length doubles.
    LogSparse,
    /// Row and column; other columns above.
    Vertical {
        /// Tokens of a row.
        columns: usize,
    },
    /// Row and column; both sides of earlier rows.
    Horizontal {
        /// Tokens of a row.
        columns: usize,
    },
    /// Row; earlier rows.
    RowMajor {
        /// Tokens of a row.
        columns: usize,
    },
    /// Vertical and horizontal.
    Mixture {
        /// Tokens of a row.
        columns: usize,
        /// Whether there is one softmax for both.
        #[serde(default)]
        joint: bool,
    },
}

impl Describe for CombinerSpec {
    fn kind(&self) -> &'static str {
        "combiner"
    }

    fn abilities(&self) -> Abilities {
        Abilities {
            causal: true,
            bidirectional: matches!(
                self.form,
                CombinerForm::Fixed { .. } | CombinerForm::LogSparse
            ),
            ..Abilities::default()
        }
    }

    fn validate(&self, _: &Heads, field: &str) -> Result<()> {
        let (name, size) = match self.form {
            CombinerForm::LogSparse => return Ok(()),
            CombinerForm::Fixed { segment } => ("segment", segment),
            CombinerForm::Vertical { columns }
            | CombinerForm::Horizontal { columns }
            | CombinerForm::RowMajor { columns }
            | CombinerForm::Mixture { columns, .. } => ("columns", columns),
        };
        bounded(format!("{field}.form.{name}"), size, 1..=MAX_SEGMENT)
    }

    fn build(&self, heads: &Heads, _: Parameters<'_>) -> Result<Box<dyn Mechanism>> {
        Ok(Box::new(Combiner {
            spec: self.clone(),
            causal: heads.causal,
            scale: heads.scale,
        }))
    }
}

const CAUSAL: Rule = Rule {
    causal: true,
    window: None,
    own: 0.0,
};

/// All but what stands where the query does.
const OTHERS: Rule = Rule {
    causal: false,
    window: None,
    own: f64::NEG_INFINITY,
};

const ALL: Rule = Rule {
    causal: false,
    window: None,
    own: 0.0,
};

/// The module.
#[derive(Debug)]
struct Combiner {
    spec: CombinerSpec,
    causal: bool,
    scale: f64,
}

impl Mechanism for Combiner {
    fn mixing(&self, q: &Tensor, k: &Tensor, pass: &MechanismPass<'_>) -> Result<Box<dyn Mixing>> {
        let (queries, keys) = (tensor(q.dim(2))?, tensor(k.dim(2))?);
        if queries != keys {
            return Err(Error::spec(
                format!("number of queries at {}", pass.path),
                queries,
                format!("{keys}, as keys: combiner's summaries ask for all queries so far"),
            ));
        }
        Ok(Box::new(self.whole(q, k, pass)?))
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
                let mixing = self.whole(q, k, pass)?;
                let mut memory = SpanMemory::new([q, k, v])?;
                let step = self.remembered(&mut memory, q, (mixing, v.clone()), pass)?;
                *state = MixerState::Spans(memory);
                Ok(step)
            }
            MixerState::Spans(memory) => {
                memory.append([q, k, v])?;
                let step = self.follow(q, memory, pass)?;
                self.remembered(memory, q, step, pass)
            }
            other => Err(Error::spec(
                format!("decode state at {}", pass.path),
                other.name(),
                "summaries of spans",
            )),
        }
    }
}

impl Rules for Combiner {
    fn sorts(&self, longest: usize) -> Vec<Sort> {
        self.spec.form.sorts(self.causal, longest)
    }

    fn keeps_token(&self, token: usize, next: usize) -> bool {
        match self.spec.form {
            CombinerForm::Fixed { segment: size } | CombinerForm::RowMajor { columns: size } => {
                token / size == next / size
            }
            // Made into longer spans, or met in the column.
            CombinerForm::LogSparse
            | CombinerForm::Vertical { .. }
            | CombinerForm::Horizontal { .. }
            | CombinerForm::Mixture { .. } => true,
        }
    }

    fn keeps_query(&self, token: usize, next: usize) -> bool {
        match self.spec.form {
            CombinerForm::Horizontal { columns } => token / columns == next / columns,
            _ => self.keeps_token(token, next),
        }
    }

    fn keeps_span(&self, span: Span, next: usize) -> bool {
        let sort = match self.spec.form {
            CombinerForm::LogSparse => Sort::Doubling {
                level: 0,
                mirrored: false,
            },
            // Spans of rows have no step.
            CombinerForm::Vertical { columns } | CombinerForm::Mixture { columns, .. }
                if span.step == columns =>
            {
                Sort::Columns(columns)
            }
            _ => return true,
        };
        sort.keeps(span, next)
    }

    fn scale(&self) -> f64 {
        self.scale
    }
}

/// Who meets what, and the summaries that are made for it.
struct Plan {
    divisions: Vec<Division>,
    making: Vec<Making>,
}

impl Plan {
    /// All keys, and the tokens of spans.
    fn keys(&self) -> impl Iterator<Item = &At> {
        let met = self.divisions.iter().flat_map(Division::keys);
        met.chain(self.making.iter().flat_map(Making::keys))
    }

    /// The same, to be moved.
    fn keys_mut(&mut self) -> impl Iterator<Item = &mut At> {
        let met = self.divisions.iter_mut().flat_map(Division::keys_mut);
        met.chain(self.making.iter_mut().flat_map(Making::keys_mut))
    }
}

impl Combiner {
    /// Who meets what, where summaries of earlier tokens are known.
    fn plan(&self, sequences: &Sequences<'_>, earlier: &[HashMap<Span, usize>]) -> Result<Plan> {
        let longest = sequences.lengths().into_iter().max().unwrap_or(0);
        let ended = Ended::new(&self.sorts(longest), sequences, earlier);
        let tokens = Tokens {
            sequences,
            ended: &ended,
            causal: self.causal,
            counted: self.spec.log_count,
        };
        let mut divisions = tokens.divisions(self.spec.form)?;
        let met = divisions.iter().flat_map(Division::keys);
        let (making, ranks) = ended.making(met.map(|key| key.row));
        for key in divisions.iter_mut().flat_map(Division::keys_mut) {
            ranks.carry(key);
        }
        Ok(Plan { divisions, making })
    }

    /// Attention of all tokens.
    fn whole(&self, q: &Tensor, k: &Tensor, pass: &MechanismPass<'_>) -> Result<Summarised> {
        let sequences = Sequences::new(q, k, pass)?;
        let plan = self.plan(&sequences, &[])?;
        self.mixing_by(plan, sequences.sizes, [q, q, k])
    }

    /// The step, once its summaries are in `memory`.
    fn remembered(
        &self,
        memory: &mut SpanMemory,
        q: &Tensor,
        (mut mixing, values): (Summarised, Tensor),
        pass: &MechanismPass<'_>,
    ) -> Result<Resumed> {
        mixing.before += memory.remember(self, q, pass)?;
        memory.forget(self, q, pass)?;
        Ok(Resumed::Kept {
            mixing: Box::new(mixing),
            values,
        })
    }

    /// Attention of the last tokens of `memory`, which `q` are the queries of, and the values that it
    /// mixes.
    fn follow(
        &self,
        q: &Tensor,
        memory: &SpanMemory,
        pass: &MechanismPass<'_>,
    ) -> Result<(Summarised, Tensor)> {
        let sequences = memory.sequences(q, pass)?;
        let [batch, heads, queries, _] = sequences.sizes;
        let mut plan = self.plan(&sequences, memory.earlier())?;
        let met = Met::new(plan.keys().map(|key| key.row), sequences.sizes, queries);
        for key in plan.keys_mut() {
            met.carry(key);
        }
        let columns = met.columns();
        let sizes = [batch, heads, queries, columns.len()];
        let apart = |rows: Tensor| tensor(rows.reshape((batch, heads, columns.len(), ())));
        let keys = apart(memory.recall(0, columns)?)?;
        let all = match plan.making.is_empty() {
            true => keys.clone(),
            false => apart(memory.recall_queries(columns)?)?,
        };
        let values = apart(memory.recall(1, columns)?)?;
        Ok((self.mixing_by(plan, sizes, [q, &all, &keys])?, values))
    }

    /// Attention of the queries `q`, the last of `all`, over `k` and summaries of these.
    fn mixing_by(
        &self,
        plan: Plan,
        sizes: [usize; 4],
        [q, all, k]: [&Tensor; 3],
    ) -> Result<Summarised> {
        let (queries, all, tokens) = (rows(q)?, rows(all)?, rows(k)?);
        let made = Summaries::new(&plan.making, [&all, &tokens], self.scale)?;
        let keys = match &made {
            None => tokens,
            Some(made) => tensor(Tensor::cat(&[&tokens, &made.keys], 0))?,
        };
        let mut divisions = Vec::with_capacity(plan.divisions.len());
        for division in plan.divisions {
            let counts = division.counts.into_iter();
            let counts: HashMap<usize, usize> = counts.map(|(at, count)| (at.row, count)).collect();
            let bias = |_: At, span: At| {
                let count = counts.get(&span.row).copied().unwrap_or(1);
                (count as f64).ln()
            };
            let bias: Option<Bias<'_>> = match self.spec.log_count {
                true => Some(&bias),
                false => None,
            };
            let mut parts = Vec::new();
            for (blocks, rule) in division.direct {
                parts.extend(Part::new(
                    blocks,
                    rule,
                    (&queries, &keys),
                    self.scale,
                    None,
                )?);
            }
            for (blocks, rule) in division.spans {
                parts.extend(Part::new(
                    blocks,
                    rule,
                    (&queries, &keys),
                    self.scale,
                    bias,
                )?);
            }
            divisions.push(parts);
        }
        Ok(Summarised {
            sizes,
            head_width: tensor(q.dim(3))?,
            made,
            divisions,
            before: 0,
        })
    }
}
