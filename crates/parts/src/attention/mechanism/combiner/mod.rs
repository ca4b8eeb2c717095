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
//! `n log₂ n`. While decoding, queries are kept beside keys and values, and the summaries that a
//! step needs are made again. No parameters.

mod divisions;
mod summaries;

use super::blocks::{Part, Rule, apart, merge, operations, rows, side_by_side};
use super::sequences::Sequences;
use super::{Abilities, Describe, Heads, Mechanism, MechanismPass, Memory, Resumed};
use crate::error::{bounded, tensor};
use crate::parameters::Parameters;
use crate::state::MixerState;
use crate::{Error, Result};
use divisions::Tokens;
use lapidary_kernels::Tensor;
use lapidary_signal::Mixing;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use summaries::Summaries;

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
        Ok(Box::new(self.among(q, q, k, pass)?))
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
        let heads = tensor(q.dim(1))?;
        let both = tensor(Tensor::cat(&[q, k], 3))?;
        let (both, values) = state.cache(&side_by_side(&both)?, &side_by_side(v)?)?;
        let both = apart(&both, heads)?;
        let values = apart(&values, heads)?;
        let [all, keys] = [0, 1].map(|half| both.chunk(2, 3).map(|halves| halves[half].clone()));
        let whole = self.among(q, &tensor(all)?, &tensor(keys)?, pass)?;
        Ok(Resumed::Kept {
            mixing: Box::new(whole),
            values,
        })
    }
}

/// One division of the tokens.
#[derive(Debug)]
struct Division {
    direct: Vec<Part>,
    /// Attention over summaries.
    spans: Vec<(Summaries, Part)>,
}

impl Division {
    /// `[queries, width]`, from `values` `[keys, width]`.
    fn mix(&self, values: &Tensor, queries: usize) -> lapidary_kernels::Result<Tensor> {
        let mut parts = Vec::new();
        for part in &self.direct {
            parts.push(part.attend(values)?);
        }
        for (summaries, part) in &self.spans {
            parts.push(part.attend(&summaries.values(values)?)?);
        }
        merge(&parts, queries, values)
    }

    fn operations(&self, queries: usize, widths: [usize; 2]) -> u64 {
        let outer = self
            .direct
            .iter()
            .chain(self.spans.iter().map(|(_, part)| part));
        let inner = self.spans.iter().map(|(summaries, _)| {
            // Values of different spans are put side by side, with nothing to merge.
            summaries.before + operations(&summaries.parts, 0, widths)
        });
        operations(outer, queries, widths) + inner.sum::<u64>()
    }
}

/// The mean over divisions.
#[derive(Debug)]
pub(super) struct Divisions {
    sizes: [usize; 4],
    head_width: usize,
    divisions: Vec<Division>,
}

impl Mixing for Divisions {
    fn sizes(&self) -> [usize; 4] {
        self.sizes
    }

    fn mix(&self, values: &Tensor) -> lapidary_kernels::Result<Tensor> {
        let [batch, heads, queries, _] = self.sizes;
        let values = rows(values)?;
        let mut sum: Option<Tensor> = None;
        for division in &self.divisions {
            let mixed = division.mix(&values, batch * heads * queries)?;
            sum = Some(match sum {
                None => mixed,
                Some(sum) => (sum + mixed)?,
            });
        }
        let sum = match sum {
            None => merge(&[], batch * heads * queries, &values)?,
            Some(sum) if self.divisions.len() == 1 => sum,
            Some(sum) => (sum / self.divisions.len() as f64)?,
        };
        Ok(sum.reshape((batch, heads, queries, ()))?)
    }

    fn operations(&self, width: usize) -> u64 {
        let queries: usize = self.sizes[..3].iter().product();
        let each = self.divisions.iter();
        let attended = each.map(|one| one.operations(queries, [self.head_width, width]));
        let averaged = match self.divisions.len() {
            0 | 1 => 0,
            count => count * queries * width,
        };
        attended.sum::<u64>() + averaged as u64
    }
}

impl Combiner {
    /// Attention of the queries `q`, the last of `all`, over `k`.
    fn among(
        &self,
        q: &Tensor,
        all: &Tensor,
        k: &Tensor,
        pass: &MechanismPass<'_>,
    ) -> Result<Divisions> {
        let sequences = Sequences::new(q, k, pass)?;
        let tokens = Tokens {
            sequences: &sequences,
            queries: rows(q)?,
            all: rows(all)?,
            keys: rows(k)?,
            causal: self.causal,
            scale: self.scale,
            log_count: self.spec.log_count,
        };
        let divisions = match self.spec.form {
            CombinerForm::Fixed { segment } => vec![tokens.fixed(segment)?],
            CombinerForm::LogSparse => vec![tokens.log_sparse()?],
            CombinerForm::Vertical { columns } => vec![Division {
                direct: tokens.row_and_column(columns)?,
                spans: tokens.vertical(columns)?,
            }],
            CombinerForm::Horizontal { columns } => vec![Division {
                direct: tokens.row_and_column(columns)?,
                spans: tokens.horizontal(columns)?,
            }],
            CombinerForm::RowMajor { columns } => vec![tokens.row_major(columns)?],
            CombinerForm::Mixture { columns, joint } => {
                let direct = || tokens.row_and_column(columns);
                let (mut vertical, horizontal) =
                    (tokens.vertical(columns)?, tokens.horizontal(columns)?);
                let rest = match joint {
                    true => {
                        vertical.extend(horizontal);
                        None
                    }
                    false => Some(Division {
                        direct: direct()?,
                        spans: horizontal,
                    }),
                };
                let first = Division {
                    direct: direct()?,
                    spans: vertical,
                };
                std::iter::once(first).chain(rest).collect()
            }
        };
        Ok(Divisions {
            sizes: sequences.sizes,
            head_width: tensor(q.dim(3))?,
            divisions,
        })
    }
}
