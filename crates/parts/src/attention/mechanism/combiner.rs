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

use super::blocks::{
    At, Bias, Blocks, Part, Rule, Sequence, Sequences, apart, merge, operations, resumed, rows,
    side_by_side,
};
use super::{Abilities, Describe, Heads, Mechanism, MechanismPass, Memory, Resumed};
use crate::error::{bounded, tensor};
use crate::parameters::Parameters;
use crate::state::MixerState;
use crate::{Error, Result};
use lapidary_kernels::{Tensor, embedding};
use lapidary_signal::Mixing;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

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
        let new = tensor(q.dim(2))?;
        let both = tensor(Tensor::cat(&[q, k], 3))?;
        let (both, values) = state.cache(&side_by_side(&both)?, &side_by_side(v)?)?;
        let both = apart(&both, heads)?;
        let values = apart(&values, heads)?;
        let [all, keys] = [0, 1].map(|half| both.chunk(2, 3).map(|halves| halves[half].clone()));
        let whole = self.among(q, &tensor(all)?, &tensor(keys)?, pass)?;
        resumed(whole, &values, new)
    }
}

/// Summaries of spans.
#[derive(Debug)]
struct Summaries {
    /// `[spans, head_width]`.
    keys: Tensor,
    /// Which make the values of some of the spans each, one after the other.
    parts: Vec<Part>,
    /// Tokens of each span.
    counts: Vec<usize>,
    /// Operations that keys took, comparisons aside.
    before: u64,
}

impl Summaries {
    /// Values of spans, `[spans, width]`, from those of tokens.
    fn values(&self, values: &Tensor) -> lapidary_kernels::Result<Tensor> {
        let width = values.dim(1)?;
        let each = self.parts.iter().map(|part| {
            let output = part.attend(values)?.output;
            Ok(output.reshape(((), width))?)
        });
        let each = each.collect::<lapidary_kernels::Result<Vec<_>>>()?;
        Ok(Tensor::cat(&each, 0)?)
    }
}

/// Lists of tokens, each of which makes a span, or a span for each of its beginnings.
struct Lists<'a> {
    lists: &'a [Vec<At>],
    longest: usize,
    tokens: [&'a Tensor; 2],
    scale: f64,
}

impl<'a> Lists<'a> {
    /// Of rows of queries and keys `tokens`; nothing of no lists.
    fn new(lists: &'a [Vec<At>], tokens: [&'a Tensor; 2], scale: f64) -> Option<Self> {
        let longest = lists
            .iter()
            .map(Vec::len)
            .max()
            .filter(|longest| *longest > 0)?;
        Some(Self {
            lists,
            longest,
            tokens,
            scale,
        })
    }

    /// `[lists, longest, width]`, `−∞` behind the end of a list.
    fn laid_out(&self, x: &Tensor) -> Result<Tensor> {
        let (mut rows, mut behind) = (Vec::new(), Vec::new());
        for list in self.lists {
            rows.extend(list.iter().map(|at| at.row as u32));
            behind.resize(rows.len(), 0f32);
            rows.resize(rows.len() + self.longest - list.len(), 0);
            behind.resize(rows.len(), f32::NEG_INFINITY);
        }
        let shape = (self.lists.len(), self.longest, tensor(x.dim(1))?);
        let rows = tensor(Tensor::from_vec(rows, (shape.0 * shape.1,), x.device()))?;
        let laid = tensor(embedding(x, &rows)?.reshape(shape))?;
        let behind = tensor(Tensor::from_vec(behind, (shape.0, shape.1, 1), x.device()))?;
        tensor(laid.broadcast_add(&tensor(behind.to_dtype(x.dtype()))?))
    }

    /// A span for each list.
    fn whole(&self) -> Result<Summaries> {
        let [q, k] = self.tokens;
        let pooled = |x: &Tensor| tensor(self.laid_out(x)?.max(1));
        let mut blocks = Blocks::default();
        for (span, list) in self.lists.iter().enumerate() {
            let at = At {
                row: span,
                position: 0,
            };
            blocks.push([at], list.iter().copied());
        }
        let part = Part::new(blocks, ALL, (&pooled(q)?, k), self.scale, None)?;
        Ok(Summaries {
            keys: pooled(k)?,
            parts: part.into_iter().collect(),
            counts: self.lists.iter().map(Vec::len).collect(),
            before: 0,
        })
    }

    /// A span for every beginning of each list, `[lists · longest]` of them, those left out that
    /// nobody has `used`.
    fn beginnings(&self, used: &[bool]) -> Result<Summaries> {
        let [q, k] = self.tokens;
        let pooled = |x: &Tensor| -> Result<Tensor> {
            let all = running_maximum(&self.laid_out(x)?)?;
            tensor(all.flatten(0, 1))
        };
        let mut blocks = Blocks::default();
        for (start, list) in self.lists.iter().enumerate() {
            let start = start * self.longest;
            let ends = (0..list.len()).filter(|end| used.get(start + end) == Some(&true));
            let spans = ends.map(|end| At {
                row: start + end,
                position: end,
            });
            let tokens = list.iter().enumerate();
            blocks.push(spans, tokens.map(|(position, at)| At { position, ..*at }));
        }
        let part = Part::new(blocks, CAUSAL, (&pooled(q)?, k), self.scale, None)?;
        Ok(Summaries {
            keys: pooled(k)?,
            parts: part.into_iter().collect(),
            counts: (0..self.lists.len() * self.longest)
                .map(|span| span % self.longest + 1)
                .collect(),
            before: 0,
        })
    }
}

/// The maximum of all entries so far along the middle dimension, by doubling.
fn running_maximum(x: &Tensor) -> Result<Tensor> {
    let length = tensor(x.dim(1))?;
    let (mut x, mut step) = (x.clone(), 1);
    while step < length {
        let first = tensor(x.narrow(1, 0, step))?;
        let rest = tensor(x.narrow(1, step, length - step))?;
        let before = tensor(x.narrow(1, 0, length - step))?;
        x = tensor(Tensor::cat(&[first, tensor(rest.maximum(&before))?], 1))?;
        step *= 2;
    }
    Ok(x)
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

/// What the divisions of a pass are made from.
struct Tokens<'a> {
    sequences: &'a Sequences,
    /// Rows of the queries that attend, of all queries, and of keys.
    queries: Tensor,
    all: Tensor,
    keys: Tensor,
    causal: bool,
    scale: f64,
    log_count: bool,
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

impl Tokens<'_> {
    fn direct(&self, blocks: Blocks, rule: Rule) -> Result<Option<Part>> {
        let tokens = (&self.queries, &self.keys);
        Part::new(blocks, rule, tokens, self.scale, None)
    }

    /// Attention over `summaries`, whose spans are the keys of `blocks`.
    fn over(
        &self,
        summaries: Summaries,
        blocks: Blocks,
        rule: Rule,
    ) -> Result<Option<(Summaries, Part)>> {
        let bias = |_: At, span: At| {
            let count = summaries.counts.get(span.row).copied().unwrap_or(1);
            (count as f64).ln()
        };
        let bias: Option<Bias<'_>> = match self.log_count {
            true => Some(&bias),
            false => None,
        };
        let tokens = (&self.queries, &summaries.keys);
        let part = Part::new(blocks, rule, tokens, self.scale, bias)?;
        Ok(part.map(|part| (summaries, part)))
    }

    fn lists<'a>(&'a self, lists: &'a [Vec<At>]) -> Option<Lists<'a>> {
        Lists::new(lists, [&self.all, &self.keys], self.scale)
    }

    fn fixed(&self, segment: usize) -> Result<Division> {
        let (mut own, mut others) = (Blocks::default(), Blocks::default());
        let mut lists = Vec::new();
        for sequence in self.sequences.iter() {
            let (queries, length) = (sequence.queries(), sequence.len());
            for start in (0..length).step_by(segment) {
                let end = length.min(start + segment);
                let of = start.max(queries.start)..end;
                own.push(of.map(|i| sequence.query(i)), keys(&sequence, start..end));
            }
            // The last segment has no later one that would look back at it.
            let spans = match self.causal {
                true => length.saturating_sub(1) / segment,
                false => length.div_ceil(segment),
            };
            let first = lists.len();
            lists.extend((0..spans).map(|span| {
                let end = length.min((span + 1) * segment);
                keys(&sequence, span * segment..end).collect::<Vec<_>>()
            }));
            others.push(
                queries.map(|i| At {
                    position: i / segment,
                    ..sequence.query(i)
                }),
                (0..spans).map(|span| At {
                    row: first + span,
                    position: span + usize::from(self.causal),
                }),
            );
        }
        let (near, far) = match self.causal {
            true => (CAUSAL, CAUSAL),
            false => (ALL, OTHERS),
        };
        let spans = match self.lists(&lists) {
            None => None,
            Some(lists) => self.over(lists.whole()?, others, far)?,
        };
        Ok(Division {
            direct: self.direct(own, near)?.into_iter().collect(),
            spans: spans.into_iter().collect(),
        })
    }

    fn log_sparse(&self) -> Result<Division> {
        let mut own = Blocks::default();
        for sequence in self.sequences.iter() {
            for i in sequence.queries() {
                own.push([sequence.query(i)], [sequence.key(i)]);
            }
        }
        let mut division = Division {
            direct: self.direct(own, ALL)?.into_iter().collect(),
            spans: Vec::new(),
        };
        // What is behind a token is before it from the other end.
        let ends: &[bool] = if self.causal {
            &[false]
        } else {
            &[false, true]
        };
        for &mirrored in ends {
            division.spans.extend(self.doubling(mirrored)?);
        }
        Ok(division)
    }

    /// Spans of `1, 2, 4, …` tokens before each token, counted from the end where `mirrored`.
    fn doubling(&self, mirrored: bool) -> Result<Option<(Summaries, Part)>> {
        let longest = self.sequences.lengths().into_iter().max().unwrap_or(0);
        let mut levels = Vec::new();
        let mut met: Vec<Vec<At>> = Vec::new();
        let mut total = 0;
        for level in (0..usize::BITS).take_while(|level| 1usize << level < longest) {
            let mut lists: Vec<Vec<At>> = Vec::new();
            let mut query = 0;
            for sequence in self.sequences.iter() {
                let length = sequence.len();
                let token = |i: usize| if mirrored { length - 1 - i } else { i };
                let first = total + lists.len();
                // Only spans of an even number that another one follows are looked back at.
                let spans = ((length.saturating_sub(1) >> level) + 1) / 2;
                lists.extend((0..spans).map(|span| {
                    let start = (2 * span) << level;
                    let span = start..start + (1 << level);
                    span.map(|i| sequence.key(token(i))).collect()
                }));
                for i in sequence.queries() {
                    let place = token(i) >> level;
                    if met.len() == query {
                        met.push(Vec::new());
                    }
                    if let Some(met) = met.get_mut(query).filter(|_| place % 2 == 1) {
                        met.push(At {
                            row: first + place / 2,
                            position: 0,
                        });
                    }
                    query += 1;
                }
            }
            total += lists.len();
            if let Some(lists) = self.lists(&lists) {
                levels.push(lists.whole()?);
            }
        }
        let mut blocks = Blocks::default();
        let queries = self
            .sequences
            .iter()
            .flat_map(|sequence| sequence.queries().map(move |i| sequence.query(i)));
        for (query, met) in queries.zip(met) {
            blocks.push([query], met);
        }
        if levels.is_empty() {
            return Ok(None);
        }
        let keys: Vec<&Tensor> = levels.iter().map(|level| &level.keys).collect();
        let summaries = Summaries {
            keys: tensor(Tensor::cat(&keys, 0))?,
            counts: levels
                .iter()
                .flat_map(|level| level.counts.clone())
                .collect(),
            parts: levels.into_iter().flat_map(|level| level.parts).collect(),
            before: 0,
        };
        self.over(summaries, blocks, ALL)
    }

    /// Own column above and own row so far.
    fn row_and_column(&self, columns: usize) -> Result<Vec<Part>> {
        let (mut above, mut left) = (Blocks::default(), Blocks::default());
        for sequence in self.sequences.iter() {
            let queries = sequence.queries();
            for column in column_lists(&sequence, columns) {
                let of = column.iter().filter(|i| queries.contains(i));
                above.push(
                    of.map(|&i| sequence.query(i)),
                    column.iter().map(|&j| sequence.key(j)),
                );
            }
            for row in row_lists(&sequence, columns) {
                let of = row.clone().filter(|i| queries.contains(i));
                left.push(of.map(|i| sequence.query(i)), keys(&sequence, row));
            }
        }
        // The token itself is in its column.
        let before = Rule {
            causal: true,
            ..OTHERS
        };
        let parts = [self.direct(above, CAUSAL)?, self.direct(left, before)?];
        Ok(parts.into_iter().flatten().collect())
    }

    fn vertical(&self, columns: usize) -> Result<Vec<(Summaries, Part)>> {
        let mut lists = Vec::new();
        let longest = self.sequences.lengths().into_iter().max().unwrap_or(0);
        let longest = longest.div_ceil(columns);
        let mut blocks = Blocks::default();
        for sequence in self.sequences.iter() {
            let first = lists.len();
            for column in column_lists(&sequence, columns) {
                lists.push(column.iter().map(|&j| sequence.key(j)).collect::<Vec<_>>());
            }
            let above = lists.len() - first;
            for (row, tokens) in row_lists(&sequence, columns).enumerate().skip(1) {
                let of = tokens.filter(|i| sequence.queries().contains(i));
                blocks.push(
                    of.map(|i| At {
                        position: i % columns,
                        ..sequence.query(i)
                    }),
                    (0..above).map(|column| At {
                        row: (first + column) * longest + row - 1,
                        position: column,
                    }),
                );
            }
        }
        let Some(lists) = self.lists(&lists).filter(|_| !blocks.is_empty()) else {
            return Ok(Vec::new());
        };
        let summaries = lists.beginnings(&blocks.met())?;
        Ok(self.over(summaries, blocks, OTHERS)?.into_iter().collect())
    }

    fn horizontal(&self, columns: usize) -> Result<Vec<(Summaries, Part)>> {
        let mut lists = Vec::new();
        let mut blocks = Blocks::default();
        for sequence in self.sequences.iter() {
            let first = lists.len();
            let whole = sequence.len() / columns;
            // Every row from the left, and from the right.
            for row in row_lists(&sequence, columns).take(whole) {
                lists.push(keys(&sequence, row.clone()).collect::<Vec<_>>());
                lists.push(keys(&sequence, row).rev().collect::<Vec<_>>());
            }
            for column in column_lists(&sequence, columns) {
                let Some(&top) = column.first() else {
                    continue;
                };
                let of = column.iter().filter(|i| sequence.queries().contains(i));
                let spans = (0..whole).flat_map(|row| {
                    let span = |right: usize, tokens: usize| {
                        (tokens > 0).then(|| At {
                            row: (first + 2 * row + right) * columns + tokens - 1,
                            position: row + 1,
                        })
                    };
                    [span(0, top), span(1, columns - 1 - top)]
                });
                blocks.push(
                    of.map(|&i| At {
                        position: i / columns,
                        ..sequence.query(i)
                    }),
                    spans.flatten(),
                );
            }
        }
        let Some(lists) = self.lists(&lists).filter(|_| !blocks.is_empty()) else {
            return Ok(Vec::new());
        };
        let summaries = lists.beginnings(&blocks.met())?;
        Ok(self.over(summaries, blocks, CAUSAL)?.into_iter().collect())
    }

    fn row_major(&self, columns: usize) -> Result<Division> {
        let (mut own, mut inside, mut earlier) =
            (Blocks::default(), Blocks::default(), Blocks::default());
        for sequence in self.sequences.iter() {
            let queries = sequence.queries();
            let whole = sequence.len() / columns;
            for row in row_lists(&sequence, columns) {
                let of = row.clone().filter(|i| queries.contains(i));
                own.push(of.map(|i| sequence.query(i)), keys(&sequence, row.clone()));
            }
            for row in row_lists(&sequence, columns).take(whole) {
                // All queries lie where their keys do.
                inside.push(keys(&sequence, row.clone()), keys(&sequence, row));
            }
            for column in column_lists(&sequence, columns) {
                let of = column.iter().filter(|i| queries.contains(i));
                earlier.push(
                    of.map(|&i| At {
                        position: i / columns,
                        ..sequence.query(i)
                    }),
                    column.iter().take(whole).map(|&j| At {
                        position: j / columns + 1,
                        ..sequence.key(j)
                    }),
                );
            }
        }
        let direct = self.direct(own, CAUSAL)?.into_iter().collect();
        let tokens = (&self.all, &self.keys);
        let inside = Part::new(inside, ALL, tokens, self.scale, None)?;
        let spans = match inside {
            None => None,
            Some(part) => {
                let (count, width) = tensor(self.keys.dims2())?;
                let keys = part.attend(&self.keys)?.output;
                let summaries = Summaries {
                    keys: tensor(keys.reshape((count, width)))?,
                    before: operations([&part], 0, [width; 2]),
                    parts: vec![part],
                    counts: vec![columns; count],
                };
                self.over(summaries, earlier, CAUSAL)?
            }
        };
        Ok(Division {
            direct,
            spans: spans.into_iter().collect(),
        })
    }
}

fn keys<'a>(
    sequence: &'a Sequence<'_>,
    tokens: std::ops::Range<usize>,
) -> impl DoubleEndedIterator<Item = At> + 'a {
    tokens.map(|j| sequence.key(j))
}

/// The tokens of each column of a grid.
fn column_lists(sequence: &Sequence<'_>, columns: usize) -> impl Iterator<Item = Vec<usize>> {
    let length = sequence.len();
    (0..columns.min(length)).map(move |column| (column..length).step_by(columns).collect())
}

/// The tokens of each row of a grid; the last may be shorter.
fn row_lists(
    sequence: &Sequence<'_>,
    columns: usize,
) -> impl Iterator<Item = std::ops::Range<usize>> {
    let length = sequence.len();
    let starts = (0..length).step_by(columns);
    starts.map(move |start| start..length.min(start + columns))
}
