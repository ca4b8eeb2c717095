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
//!   `⌊i / 2^ℓ⌋` is odd, which tile everything before it; both sides alike without causality; a span of one
//!   token is that token, unless a layer makes something else of it;
//! * *vertical*: own column above and own row directly; what every other column has above the row
//!   a span;
//! * *horizontal*: the same directly; of each earlier row what is to the left a span, and to the
//!   right;
//! * *row-major*: own row directly; each earlier row a span, summed up by its token in the same
//!   column: `q_Ω` is the query of that token and `k_Ω` the keys weighted as the values are;
//! * *mixture*: the mean of vertical and horizontal attention, or, where `joint`, both sorts of spans
//!   under one softmax, as the authors' program has it, which covers earlier tokens twice;
//! * *routed*: clusters of tokens by what they say, see `clustering.rs`: keys of the query's own cluster directly,
//!   those of every other one a span, of which under a causal mask only what is not later counts.
//!
//! In place of the maximum of keys and queries themselves, summaries may pool what a layer makes of them
//! (`deep-sets`; Zaheer et al., Deep Sets, 2017, arXiv 1703.06114), its weights those of each head:
//!
//! ```text
//! k_Ω = pool_{j ∈ Ω} relu(W_k k_j + b_k),   q_Ω = pool_{j ∈ Ω} relu(W_q q_j + b_q),   pool = max, mean, Σ
//! ```
//!
//! And the key of a row, in row-major form, may be what a layer makes of the weighted keys `k̄` of its tokens and of the key
//! `k_c` of the token that sums it up (`projected`), with a layer norm `N`:
//!
//! ```text
//! k_Ω = W₂ N(k_c + W₁ k̄ + b₁) + b₂
//! ```
//!
//! or, of what attention over the row gives (`projected` of `values`, as the authors' program has it), the same with
//! `v̄ = v_Ω` in the place of `k̄`.
//!
//! A span whose keys are all alike counts as one key, not as its number of tokens; `log_count`
//! adds the logarithm of that number to its score.
//!
//! Dropout is of the weights of keys that are met directly, in training: each is zeroed, or divided by
//! `1 − dropout`, once they are weights; those of spans are left as they are.
//!
//! Cost: for each pair of a query and a key or summary, and of a summary and a token of its span,
//! `2 head_width + 2 value_width + 5`; for `n` tokens about `n (m + n / m)` pairs of each sort, or
//! `n log₂ n`; in `c` clusters of one size `n² / c` pairs of each sort, `n c` of queries and summaries, and
//! `2 c head_width` for each query and key; a layer takes `2 head_width² + 2 head_width` for each, and a
//! projected row `4 head_width² + 11 head_width`. Parameters:
//! none, or `2 (head_width² + head_width)` for each head with a layer of either kind, `c head_width` with clusters. Of values,
//! a row takes `2 head_width (head_width + value_width) + 11 head_width`, and a head `head_width (head_width + value_width +
//! 2)` parameters.
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
//! * *mixture*: what both of these need;
//! * *routed*: queries, keys and values of all tokens, and the cluster of each key, which is found when it comes; a
//!   step sums up the clusters that it meets again, since they grow, at the cost of a step of dense attention.

mod clustering;
mod divisions;
mod layer;
mod row_keys;
mod spec;

pub use super::spans::Pooling;
pub use clustering::{Fit, Fitted};
pub use spec::{CombinerForm, CombinerSpec, RowSource, Summary};

use super::blocks::{Bias, Meetings, Rule, dropped};
use super::met::Met;
use super::sequences::{At, Sequences};
use super::spans::{
    Ended, Joined, Making, Pooled, RowKeys, Rows, Rules, Sort, Span, SpanMemory, Summaries,
    Summarised,
};
use super::{Mechanism, MechanismPass, Memory, Resumed};
use crate::dropout::seed_of_site;
use crate::error::tensor;
use crate::state::MixerState;
use crate::{Error, Result};
use clustering::{Clustering, Found};
use divisions::{Division, Tokens};
use lapidary_kernels::{BlockPart, DropoutMask, Tensor, appended_rows, with_loss};
use lapidary_signal::Mixing;
use layer::Layer;
use row_keys::RowProjection;
use std::collections::HashMap;
use std::sync::Arc;

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
    /// Where tokens are divided by what they say.
    clustering: Option<Clustering>,
    /// Where summaries pool what it makes of queries and keys.
    layer: Option<Layer>,
    /// Where rows have keys that it makes.
    row_keys: Option<Arc<RowProjection>>,
}

impl Mechanism for Combiner {
    fn mixing(&self, q: &Tensor, k: &Tensor, pass: &MechanismPass<'_>) -> Result<Box<dyn Mixing>> {
        match self.reads_values() {
            true => Err(Error::spec(
                format!("values at {}", pass.path),
                "absent",
                "given: keys of rows are made of them",
            )),
            false => self.of_all(q, k, None, pass),
        }
    }

    fn reads_values(&self) -> bool {
        matches!(
            self.spec.summary,
            Summary::Projected {
                of: RowSource::Values
            }
        )
    }

    fn mixing_by_values(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        pass: &MechanismPass<'_>,
    ) -> Result<Box<dyn Mixing>> {
        self.of_all(q, k, Some(v), pass)
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
                let found = self.found(q, k, pass)?;
                let mixing = self.whole([q, k, v], found.as_ref(), pass)?;
                let mut memory = SpanMemory::new([q, k, v])?;
                if let Some(found) = &found {
                    memory.put(&found.keys, sequences_of(q)?);
                }
                let step = self.remembered(&mut memory, q, (mixing, v.clone()), pass)?;
                *state = MixerState::Spans(memory);
                Ok(step)
            }
            MixerState::Spans(memory) => {
                memory.append([q, k, v])?;
                let found = match &self.clustering {
                    None => None,
                    Some(clustering) => {
                        let (queries, new) = (clustering.clusters(q)?, clustering.clusters(k)?);
                        memory.put(&new, sequences_of(q)?);
                        Some(Found {
                            rows: queries.len() + new.len(),
                            queries,
                            keys: memory.clusters(),
                        })
                    }
                };
                let step = self.follow(q, memory, found.as_ref(), pass)?;
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
        let single = self.layer.is_some();
        self.spec.form.sorts(self.causal, longest, single)
    }

    fn keeps_token(&self, token: usize, next: usize) -> bool {
        match self.spec.form {
            CombinerForm::Fixed { segment: size } | CombinerForm::RowMajor { columns: size } => {
                token / size == next / size
            }
            // Made into longer spans, or met in the column or the cluster.
            CombinerForm::LogSparse
            | CombinerForm::Vertical { .. }
            | CombinerForm::Horizontal { .. }
            | CombinerForm::Mixture { .. }
            | CombinerForm::Routed { .. } => true,
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

    fn pooled(
        &self,
        tokens: [&Tensor; 2],
        values: Option<&Tensor>,
        sequences: [usize; 2],
    ) -> Result<Pooled> {
        match &self.layer {
            None => Ok(Pooled {
                row_keys: self.row_keys.clone().map(|keys| {
                    let by: Arc<dyn RowKeys> = keys;
                    Rows {
                        by,
                        sequences,
                        values: values.filter(|_| self.reads_values()).cloned(),
                    }
                }),
                ..Pooled::largest(tokens)
            }),
            Some(layer) => layer.pooled(tokens, sequences),
        }
    }
}

/// Who meets what, and the summaries that are made for it.
struct Plan {
    divisions: Vec<Division>,
    making: Vec<Making>,
    /// Operations that it took to find out.
    before: u64,
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

/// Heads of all sequences.
fn sequences_of(q: &Tensor) -> Result<usize> {
    let (batch, heads, ..) = tensor(q.dims4())?;
    Ok(batch * heads)
}

impl Combiner {
    /// The clusters of queries and keys, where they decide who meets whom.
    fn found(&self, q: &Tensor, k: &Tensor, pass: &MechanismPass<'_>) -> Result<Option<Found>> {
        let Some(clustering) = &self.clustering else {
            return Ok(None);
        };
        let both = pass.context.decided(pass.path, || {
            Ok([clustering.clusters(q)?, clustering.clusters(k)?].concat())
        })?;
        let (queries, keys) = both.split_at(both.len() / 2);
        Ok(Some(Found {
            queries: queries.to_vec(),
            keys: keys.to_vec(),
            rows: both.len(),
        }))
    }

    /// `q`, with a gradient that pulls centroids beside its own where they are trained.
    fn pulled(
        &self,
        q: &Tensor,
        k: &Tensor,
        found: Option<&Found>,
        pass: &MechanismPass<'_>,
    ) -> Result<Tensor> {
        let both = self.clustering.as_ref().zip(found);
        let trained =
            both.filter(|(clustering, _)| self.spec.pull > 0.0 && clustering.is_trained());
        let Some((clustering, found)) = trained else {
            return Ok(q.clone());
        };
        let strayed = clustering.strayed([q, k], found, pass.keep)?;
        Ok(with_loss(q, &tensor(strayed * self.spec.pull)?)?)
    }

    /// Who meets what, where summaries of earlier tokens, or clusters, are known.
    fn plan(
        &self,
        sequences: &Sequences<'_>,
        earlier: &[HashMap<Span, usize>],
        found: Option<&Found>,
    ) -> Result<Plan> {
        if let Some((clustering, found)) = self.clustering.as_ref().zip(found) {
            let (division, making) = clustering.divide(sequences, found, self.causal);
            return Ok(Plan {
                divisions: vec![division],
                making: making.into_iter().collect(),
                before: clustering.operations(found.rows),
            });
        }
        let longest = sequences.lengths().into_iter().max().unwrap_or(0);
        let ended = Ended::new(&self.sorts(longest), sequences, earlier);
        let tokens = Tokens {
            sequences,
            ended: &ended,
            causal: self.causal,
            counted: self.spec.log_count,
            single: self.layer.is_some(),
        };
        let mut divisions = tokens.divisions(self.spec.form)?;
        let met = divisions.iter().flat_map(Division::keys);
        let (making, ranks) = ended.making(met.map(|key| key.row));
        for key in divisions.iter_mut().flat_map(Division::keys_mut) {
            ranks.carry(key);
        }
        Ok(Plan {
            divisions,
            making,
            before: 0,
        })
    }

    /// Attention of all tokens in a pass that remembers none.
    fn of_all(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: Option<&Tensor>,
        pass: &MechanismPass<'_>,
    ) -> Result<Box<dyn Mixing>> {
        let (queries, keys) = (tensor(q.dim(2))?, tensor(k.dim(2))?);
        if queries != keys {
            return Err(Error::spec(
                format!("number of queries at {}", pass.path),
                queries,
                format!("{keys}, as keys: combiner's summaries ask for all queries so far"),
            ));
        }
        let found = self.found(q, k, pass)?;
        let q = self.pulled(q, k, found.as_ref(), pass)?;
        let sequences = Sequences::new(&q, k, pass)?;
        let plan = self.plan(&sequences, &[], found.as_ref())?;
        let mask = self.mask(pass);
        let lists = match (plan.making.as_slice(), plan.divisions.as_slice()) {
            ([one], [_]) if self.layer.is_none() && mask.is_none() => one.whole(),
            _ => None,
        };
        let Some(lists) = lists else {
            let sizes = sequences.sizes;
            let mixing = self.mixing_by(plan, sizes, ([&q, &q, k], v), mask.as_ref())?;
            return Ok(Box::new(mixing));
        };
        let parts = plan.divisions.into_iter();
        let parts = parts.flat_map(|division| self.parts(division)).collect();
        let of = (self.scale, plan.before);
        let joined = Joined::new(sequences.sizes, (&q, k), lists, parts, of)?;
        Ok(Box::new(joined))
    }

    /// Attention of all tokens.
    fn whole(
        &self,
        [q, k, v]: [&Tensor; 3],
        found: Option<&Found>,
        pass: &MechanismPass<'_>,
    ) -> Result<Summarised> {
        let sequences = Sequences::new(q, k, pass)?;
        let plan = self.plan(&sequences, &[], found)?;
        self.mixing_by(plan, sequences.sizes, ([q, q, k], Some(v)), None)
    }

    /// Which weights of keys that are met directly are dropped in this pass.
    fn mask(&self, pass: &MechanismPass<'_>) -> Option<DropoutMask> {
        let probability = self.spec.dropout;
        let seed = pass.context.dropout_seed.filter(|_| probability > 0.0)?;
        let seed = seed_of_site(seed, &format!("{}.weights", pass.path));
        Some(DropoutMask::new(probability, seed))
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
        found: Option<&Found>,
        pass: &MechanismPass<'_>,
    ) -> Result<(Summarised, Tensor)> {
        let sequences = memory.sequences(q, pass)?;
        let [batch, heads, queries, _] = sequences.sizes;
        let mut plan = self.plan(&sequences, memory.earlier(), found)?;
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
        let tokens = ([q, &all, &keys], Some(&values));
        let mixing = self.mixing_by(plan, sizes, tokens, None)?;
        Ok((mixing, values))
    }

    /// Attention of the queries `q`, the last of `all`, over `k` and summaries of these, which may read the values `v`;
    /// with weights dropped where a mask is given.
    fn mixing_by(
        &self,
        plan: Plan,
        sizes: [usize; 4],
        ([q, all, k], v): ([&Tensor; 3], Option<&Tensor>),
        mask: Option<&DropoutMask>,
    ) -> Result<Summarised> {
        let both = [all, k];
        let made = match plan.making.as_slice() {
            [] => None,
            making => {
                let pooled = self.pooled(both, v, [sizes[0], sizes[1]])?;
                Summaries::new(making, both, &pooled, self.scale)?
            }
        };
        let keys = match &made {
            None => k.clone(),
            Some(made) => appended_rows(k, &made.keys)?,
        };
        // Rows of tokens; those of summaries are behind them.
        let rows = sizes[0] * sizes[1] * sizes[3];
        let mut divisions = Vec::with_capacity(plan.divisions.len());
        let mut whole = Vec::new();
        for division in plan.divisions {
            let mut parts = self.parts(division);
            if let Some(mask) = mask {
                whole.push(Meetings::new(parts.clone(), (q, &keys), self.scale)?);
                let all = parts.into_iter();
                parts = all.map(|part| dropped(part, mask, rows)).collect();
            }
            let meetings = Meetings::new(parts, (q, &keys), self.scale)?;
            divisions.push(meetings.into_iter().collect());
        }
        Ok(Summarised {
            sizes,
            head_width: tensor(q.dim(3))?,
            made,
            divisions,
            whole,
            before: plan.before,
        })
    }

    /// What a kernel reads of a division, tokens before spans.
    fn parts(&self, division: Division) -> Vec<BlockPart> {
        let counts = division.counts.into_iter();
        let counts: HashMap<usize, usize> = counts.map(|(at, count)| (at.row, count)).collect();
        let counted = |span: At| {
            let count = counts.get(&span.row).copied().unwrap_or(1);
            (count as f64).ln()
        };
        let bias = Bias {
            of_key: self.spec.log_count.then_some(&counted),
            ..Bias::default()
        };
        let direct = division.direct.into_iter();
        let direct = direct.map(|(blocks, rule)| blocks.listed(rule, Bias::default()));
        let spans = division.spans.into_iter();
        let spans = spans.map(|(blocks, rule)| blocks.listed(rule, bias));
        direct.chain(spans).collect()
    }
}
