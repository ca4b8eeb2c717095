//! What is kept of earlier tokens: summaries, and what may still be met or made of them.

use std::collections::HashMap;

use super::ended::{Earlier, Ended};
use super::span::{Sort, Span};
use super::{Pooled, Summaries};
use crate::Result;
use crate::attention::mechanism::MechanismPass;
use crate::attention::mechanism::blocks::flat;
use crate::attention::mechanism::met::Met;
use crate::attention::mechanism::sequences::Sequences;
use crate::error::tensor;
use crate::state::{Buffers, Kept};
use lapidary_kernels::{Tensor, embedding};

/// What later tokens need of earlier ones.
pub(in super::super) trait Rules {
    /// Sorts of spans, where the longest sequence has so many tokens.
    fn sorts(&self, longest: usize) -> Vec<Sort>;

    /// Whether tokens from `next` on meet this one by itself, or a summary is yet to be made of it.
    fn keeps_token(&self, token: usize, next: usize) -> bool;

    /// Whether they need its query.
    fn keeps_query(&self, token: usize, next: usize) -> bool;

    /// Whether they meet a span that is over by `next`.
    fn keeps_span(&self, span: Span, next: usize) -> bool;

    /// What scores are multiplied by.
    fn scale(&self) -> f64;

    /// What summaries pool, of `batch · heads · tokens` rows of queries and keys `[.., head_width]`, and of values
    /// `[.., value_width]` where these are known.
    fn pooled(
        &self,
        tokens: [&Tensor; 2],
        _values: Option<&Tensor>,
        _sequences: [usize; 2],
    ) -> Result<Pooled> {
        Ok(Pooled::largest(tokens))
    }
}

/// Summaries of spans that are over, and those tokens that later ones may meet or make summaries of.
/// What nobody needs any more is forgotten when the buffers are full.
#[derive(Debug)]
pub struct SpanMemory {
    /// Keys and values.
    tokens: Kept,
    queries: Kept,
    /// Keys and values.
    summaries: Buffers,
    /// The column of each summary, for each sequence of the batch.
    columns: Vec<HashMap<Span, usize>>,
    /// For each head of each sequence the cluster of every token's key so far, those that are forgotten too;
    /// nothing where tokens are in none.
    clusters: Vec<Vec<u32>>,
}

impl SpanMemory {
    /// How many tokens' keys and values, tokens' queries and summaries are held.
    pub fn held(&self) -> [usize; 3] {
        let [tokens, queries] = [&self.tokens, &self.queries].map(|kept| kept.places().len());
        [tokens, queries, self.summaries.len()]
    }

    /// Of the first tokens, `[batch, heads, length, width]` each.
    pub(in super::super) fn new([q, k, v]: [&Tensor; 3]) -> Result<Self> {
        let batch = tensor(q.dim(0))?;
        let (keys, values) = (flat(k)?, flat(v)?);
        Ok(Self {
            summaries: Buffers::empty(&[&keys, &values])?,
            tokens: Kept::new(&[&keys, &values])?,
            queries: Kept::new(&[&flat(q)?])?,
            columns: (0..batch).map(|_| HashMap::new()).collect(),
            clusters: Vec::new(),
        })
    }

    /// Appends tokens that follow.
    pub(in super::super) fn append(&mut self, [q, k, v]: [&Tensor; 3]) -> Result<()> {
        self.tokens.append(&[&flat(k)?, &flat(v)?])?;
        self.queries.append(&[&flat(q)?])
    }

    /// Says in which clusters the keys of the last tokens are, `[batch · heads, tokens]`.
    pub(in super::super) fn put(&mut self, clusters: &[u32], sequences: usize) {
        self.clusters.resize(sequences, Vec::new());
        let each = clusters.len() / sequences.max(1);
        let given = clusters.chunks(each.max(1));
        for (known, new) in self.clusters.iter_mut().zip(given) {
            known.extend_from_slice(new);
        }
    }

    /// The clusters of the tokens that are left, `[batch · heads, tokens]`.
    pub(in super::super) fn clusters(&self) -> Vec<u32> {
        let places = self.tokens.places();
        let of = |known: &Vec<u32>| -> Vec<u32> {
            let each = places.iter().map(|place| known.get(*place).copied());
            each.map(Option::unwrap_or_default).collect()
        };
        self.clusters.iter().flat_map(of).collect()
    }

    /// The sequences whose last tokens have the queries `q`: keys are columns of summaries, and then those
    /// of the tokens that are left.
    pub(in super::super) fn sequences(
        &self,
        q: &Tensor,
        pass: &MechanismPass<'_>,
    ) -> Result<Sequences<'_>> {
        Sequences::kept(q, self.tokens.places(), self.summaries.len(), pass)
    }

    /// Where summaries lie.
    pub(in super::super) fn earlier(&self) -> &Earlier {
        &self.columns
    }

    /// Keys (0) or values (1) of some columns, `[batch · heads, columns, width]`.
    pub(in super::super) fn recall(&self, sort: usize, columns: &[usize]) -> Result<Tensor> {
        let (summaries, tokens) = self.split(columns);
        let tokens = self.tokens.rows().pick(sort, &tokens)?;
        self.behind(sort, summaries, tokens)
    }

    /// The queries that go with keys, where they are kept; anything elsewhere.
    pub(in super::super) fn recall_queries(&self, columns: &[usize]) -> Result<Tensor> {
        let (summaries, tokens) = self.split(columns);
        let places = self.tokens.places();
        let places = tokens.iter().filter_map(|column| places.get(*column));
        let queries = self.queries_at(places.copied())?;
        self.behind(0, summaries, queries)
    }

    /// The queries of some tokens that are kept, `[batch · heads, tokens, width]`.
    pub(in super::super) fn queries_at(
        &self,
        places: impl Iterator<Item = usize>,
    ) -> Result<Tensor> {
        let known = self.queries.places();
        let columns = places.map(|place| known.binary_search(&place).unwrap_or(0));
        let columns: Vec<usize> = columns.collect();
        self.queries.rows().pick(0, &columns)
    }

    /// Columns of summaries, and of tokens.
    fn split<'a>(&self, columns: &'a [usize]) -> (&'a [usize], Vec<usize>) {
        let before = self.summaries.len();
        let (summaries, tokens) = columns.split_at(columns.partition_point(|at| *at < before));
        (summaries, tokens.iter().map(|at| at - before).collect())
    }

    /// Keys (0) or values (1) of some summaries, `[batch · heads, columns, width]`.
    pub(in super::super) fn recall_summaries(
        &self,
        sort: usize,
        columns: &[usize],
    ) -> Result<Tensor> {
        self.summaries.pick(sort, columns)
    }

    fn behind(&self, sort: usize, summaries: &[usize], rows: Tensor) -> Result<Tensor> {
        if summaries.is_empty() {
            return Ok(rows);
        }
        let summaries = self.summaries.pick(sort, summaries)?;
        tensor(Tensor::cat(&[summaries, rows], 1))
    }

    /// Makes the summaries of all spans that ended with the queries `q` and that later tokens meet, and
    /// says how many operations that took.
    pub(in super::super) fn remember(
        &mut self,
        rules: &dyn Rules,
        q: &Tensor,
        pass: &MechanismPass<'_>,
    ) -> Result<u64> {
        let sequences = self.sequences(q, pass)?;
        let longest = sequences.lengths().into_iter().max().unwrap_or(0);
        let sorts = rules.sorts(longest);
        let ended = Ended::new(&sorts, &sequences, &self.columns);
        let [batch, heads, ..] = sequences.sizes;
        let mut spans: Vec<Vec<Span>> = vec![Vec::new(); batch];
        let mut numbers: Vec<Vec<usize>> = Vec::with_capacity(batch * heads);
        for sequence in sequences.iter() {
            let mut here = Vec::new();
            for (number, sort) in sorts.iter().enumerate() {
                for span in sort.later(sequence.first(), sequence.len()) {
                    here.push(ended.made(number, &sequence, span));
                    if let Some(spans) = spans
                        .get_mut(sequence.batch())
                        .filter(|_| sequence.head == 0)
                    {
                        spans.push(span);
                    }
                }
            }
            numbers.push(here);
        }
        let most = spans.iter().map(Vec::len).max().unwrap_or(0);
        if most == 0 {
            return Ok(0);
        }
        let keys: usize = [batch, heads, sequences.sizes[3]].iter().product();
        let met = numbers.iter().flatten().map(|number| keys + number);
        let (mut making, ranks) = ended.making(met);
        let listed = making.iter().flat_map(|making| making.keys());
        let met = Met::new(listed.map(|key| key.row), sequences.sizes, 0);
        for key in making.iter_mut().flat_map(|making| making.keys_mut()) {
            met.carry(key);
        }
        let queries = self.recall_queries(met.columns())?;
        let [keys, values] = [0, 1].map(|sort| self.recall(sort, met.columns()));
        let [queries, keys, values] = [queries, keys?, values?].map(|x| x.flatten(0, 1));
        let (queries, keys, values) = (tensor(queries)?, tensor(keys)?, tensor(values)?);
        let tokens = [&queries, &keys];
        let pooled = rules.pooled(tokens, Some(&values), [batch, heads])?;
        let Some(made) = Summaries::new(&making, tokens, &pooled, rules.scale())? else {
            return Ok(0);
        };
        let nothing = tensor(made.keys.dim(0))?;
        let table = numbers.iter().flat_map(|numbers| {
            let ranks = numbers.iter().map(|number| ranks.rank(*number));
            ranks.chain(std::iter::repeat(nothing)).take(most)
        });
        let table: Vec<u32> = table.map(|rank| rank as u32).collect();
        let keys = laid(&made.keys, &table, batch * heads)?;
        let values = laid(&made.values(&values)?, &table, batch * heads)?;
        let start = self.summaries.len();
        self.summaries.append(&[&keys, &values])?;
        for (columns, spans) in self.columns.iter_mut().zip(spans) {
            columns.extend(spans.into_iter().zip(start..));
        }
        Ok(made.operations([tensor(keys.dim(2))?, tensor(values.dim(2))?]))
    }

    /// Makes room, where there is none, by what later tokens do not need.
    pub(in super::super) fn forget(
        &mut self,
        rules: &dyn Rules,
        q: &Tensor,
        pass: &MechanismPass<'_>,
    ) -> Result<()> {
        // Of a prompt most may be needless.
        let start = tensor(q.dim(2))? == self.tokens.places().len();
        let tokens = start || self.tokens.rows().is_full();
        let queries = start || self.queries.rows().is_full();
        let summaries = self.summaries.is_full();
        if !(tokens || queries || summaries) {
            return Ok(());
        }
        let places = self.tokens.places().to_vec();
        let sequences = Sequences::kept(q, &places, 0, pass)?;
        let needed = |place: usize, keeps: &dyn Fn(usize, usize) -> bool| {
            // Heads have the same tokens.
            let mut each = sequences.iter().filter(|sequence| sequence.head == 0);
            each.any(|one| {
                one.token(place)
                    .is_some_and(|token| keeps(token, one.len()))
            })
        };
        if tokens {
            self.tokens
                .retain(|place| needed(place, &|token, next| rules.keeps_token(token, next)))?;
        }
        if queries {
            self.queries
                .retain(|place| needed(place, &|token, next| rules.keeps_query(token, next)))?;
        }
        if summaries {
            self.forget_summaries(rules, &sequences.lengths())?;
        }
        Ok(())
    }

    fn forget_summaries(&mut self, rules: &dyn Rules, lengths: &[usize]) -> Result<()> {
        for (columns, length) in self.columns.iter_mut().zip(lengths) {
            columns.retain(|span, _| rules.keeps_span(*span, *length));
        }
        let all = self.columns.iter().flat_map(|columns| columns.values());
        let mut left: Vec<usize> = all.copied().collect();
        left.sort_unstable();
        left.dedup();
        self.summaries.retain(&left)?;
        for column in self
            .columns
            .iter_mut()
            .flat_map(|columns| columns.values_mut())
        {
            *column = left.partition_point(|other| other < column);
        }
        Ok(())
    }
}

/// Rows of `x` by a table `[sequences, columns]`, zeros behind all of them.
fn laid(x: &Tensor, table: &[u32], sequences: usize) -> Result<Tensor> {
    let width = tensor(x.dim(1))?;
    let nothing = tensor(Tensor::zeros((1, width), x.dtype(), x.device()))?;
    let x = tensor(Tensor::cat(&[x, &nothing], 0))?;
    let columns = table.len() / sequences.max(1);
    let table = tensor(Tensor::from_slice(table, (sequences, columns), x.device()))?;
    Ok(embedding(&x, &table)?)
}
