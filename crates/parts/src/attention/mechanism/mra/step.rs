//! Decoding: the blocks of earlier tokens are known by their means, and a row of blocks by its choice.

use std::collections::{BTreeSet, HashMap};

use super::Mra;
use crate::Result;
use crate::attention::mechanism::blocks::{Bias, Blocks, Meetings, Rule};
use crate::attention::mechanism::met::Met;
use crate::attention::mechanism::sequences::{At, Sequence, Sequences};
use crate::attention::mechanism::spans::{
    Ended, Pooled, Rules, Sort, Span, SpanMemory, Summaries, Summarised,
};
use crate::attention::mechanism::{MechanismPass, Resumed};
use crate::error::tensor;
use lapidary_kernels::{DType, Tensor, embedding, largest_of};

/// Means of blocks that are over, keys and values, and which blocks the open rows refine.
#[derive(Debug)]
pub struct RefinedMemory {
    means: SpanMemory,
    choices: Choices,
}

impl RefinedMemory {
    /// Means of blocks, and tokens.
    pub fn means(&self) -> &SpanMemory {
        &self.means
    }
}

/// For a head of a sequence, a scale and a row of blocks, the blocks that it refines, in order.
type Choices = HashMap<(usize, usize, usize), Vec<usize>>;

impl Rules for Mra {
    fn sorts(&self, _: usize) -> Vec<Sort> {
        let sizes = self.spec.scales.iter().filter(|size| **size > 1);
        sizes.map(|size| Sort::Blocks(*size)).collect()
    }

    fn keeps_token(&self, _: usize, _: usize) -> bool {
        true
    }

    /// The first of the open blocks stand for them.
    fn keeps_query(&self, token: usize, next: usize) -> bool {
        let largest = self.spec.scales.first().copied().unwrap_or(1);
        token / largest == next / largest
    }

    fn keeps_span(&self, _: Span, _: usize) -> bool {
        true
    }

    fn scale(&self) -> f64 {
        self.options.scale
    }
}

/// The rows of a tensor on the host.
struct Table {
    values: Vec<f64>,
    width: usize,
}

impl Table {
    fn new(x: &Tensor) -> Result<Self> {
        let flat = tensor(tensor(x.detach().to_dtype(DType::F64))?.flatten_all())?;
        Ok(Self {
            values: tensor(flat.to_vec1())?,
            width: tensor(x.dim(1))?,
        })
    }

    fn row(&self, row: usize) -> &[f64] {
        self.values
            .get(row * self.width..(row + 1) * self.width)
            .unwrap_or_default()
    }
}

/// The product of two rows, summed up in several lanes at once.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    const LANES: usize = 8;
    let (a, b) = (a.chunks(LANES), b.chunks(LANES));
    let mut sums = [0.0; LANES];
    for (a, b) in a.zip(b) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
    sums.iter().sum()
}

/// Who meets what at one scale.
struct Level {
    size: usize,
    blocks: Blocks,
}

impl Mra {
    /// The memory of the first tokens.
    pub(super) fn start(
        &self,
        [q, k, v]: [&Tensor; 3],
        pass: &MechanismPass<'_>,
    ) -> Result<RefinedMemory> {
        let mut means = SpanMemory::new([q, k, v])?;
        means.remember(self, q, pass)?;
        means.forget(self, q, pass)?;
        Ok(RefinedMemory {
            means,
            choices: Choices::new(),
        })
    }

    /// Attention of tokens that follow those of a memory.
    pub(super) fn follow(
        &self,
        [q, k, v]: [&Tensor; 3],
        memory: &mut RefinedMemory,
        pass: &MechanismPass<'_>,
    ) -> Result<Resumed> {
        let RefinedMemory { means, choices } = memory;
        means.append([q, k, v])?;
        let remembered = means.remember(self, q, pass)?;
        let sequences = means.sequences(q, pass)?;
        let mut considered = 0;
        for sequence in sequences.iter() {
            considered += self.choose(&sequence, means, choices)?;
        }
        let (mut mixing, values) = self.mixing_by(&sequences, means, choices, q)?;
        let width = mixing.head_width;
        mixing.before = remembered + (2 * width * considered) as u64;
        let lengths: Vec<usize> = sequences.iter().map(|sequence| sequence.len()).collect();
        choices.retain(|(of, level, row), _| {
            let size = self.spec.scales.get(*level).copied().unwrap_or(1);
            lengths
                .get(*of)
                .is_some_and(|length| (row + 1) * size > *length)
        });
        means.forget(self, q, pass)?;
        Ok(Resumed::Kept {
            mixing: Box::new(mixing),
            values,
        })
    }

    /// Lets the rows of blocks of a head of a sequence choose that have queries and have not chosen yet, and
    /// says how many blocks were looked at.
    fn choose(
        &self,
        sequence: &Sequence<'_>,
        means: &SpanMemory,
        choices: &mut Choices,
    ) -> Result<usize> {
        let mut considered = 0;
        let levels = self.spec.scales.iter().zip(&self.spec.per_row);
        for (level, (&size, &count)) in levels.enumerate() {
            for row in touched(sequence, size) {
                let key = (sequence.index, level, row);
                if choices.contains_key(&key) {
                    continue;
                }
                let blocks = self.candidates((sequence.index, level, row), choices);
                let chosen = match blocks.len() <= count {
                    true => blocks,
                    false => {
                        considered += blocks.len();
                        self.best(sequence, (level, row), &blocks, means)?
                    }
                };
                choices.insert(key, chosen);
            }
        }
        Ok(considered)
    }

    /// The blocks that a row may refine: those before it and its own that no larger one stands for.
    fn candidates(&self, (of, level, row): (usize, usize, usize), choices: &Choices) -> Vec<usize> {
        let size = self.spec.scales.get(level).copied().unwrap_or(1);
        let Some(above) = level.checked_sub(1) else {
            return (0..=row).collect();
        };
        let each = self.spec.scales.get(above).copied().unwrap_or(size) / size;
        let chosen = choices.get(&(of, above, row / each));
        let chosen = chosen.into_iter().flatten();
        let within = chosen.flat_map(|block| block * each..(block + 1) * each);
        within.filter(|block| *block <= row).collect()
    }

    /// The best of some blocks by the first query of a row.
    fn best(
        &self,
        sequence: &Sequence<'_>,
        (level, row): (usize, usize),
        blocks: &[usize],
        means: &SpanMemory,
    ) -> Result<Vec<usize>> {
        let size = self.spec.scales.get(level).copied().unwrap_or(1);
        let first = sequence.place(row * size);
        let query = means.queries_at(std::iter::once(first))?;
        let query = Table::new(&tensor(query.get(sequence.index))?)?;
        let known = means.earlier().get(sequence.batch());
        // That of the diagonal is not over yet, and chosen in any case.
        let column = |block: &usize| known?.get(&Span::run(block * size, size)).copied();
        let columns: Vec<Option<usize>> = blocks.iter().map(column).collect();
        let picked: Vec<usize> = columns.iter().copied().flatten().collect();
        let keys = means.recall_summaries(0, &picked)?;
        let keys = Table::new(&tensor(keys.get(sequence.index))?)?;
        let mut place = 0;
        let values = blocks.iter().zip(columns).map(|(&key, column)| {
            let mut value = f64::NEG_INFINITY;
            if column.is_some() {
                value = self.options.scale * dot(query.row(0), keys.row(place));
                place += 1;
            }
            match (key == row, level) {
                (true, _) => f64::INFINITY,
                (false, 0) => value + self.options.prior(row, key),
                (false, _) => value,
            }
        });
        let values: Vec<f64> = values.collect();
        let best = largest_of(&values, self.count(level));
        Ok(best
            .into_iter()
            .filter_map(|at| blocks.get(at).copied())
            .collect())
    }

    fn count(&self, level: usize) -> usize {
        self.spec.per_row.get(level).copied().unwrap_or(1)
    }

    /// What queries meet at each scale.
    fn levels(
        &self,
        sequences: &Sequences<'_>,
        ended: &Ended<'_>,
        choices: &Choices,
    ) -> Result<Vec<Level>> {
        let mut levels = Vec::new();
        let last = self.spec.per_row.len();
        for (level, &size) in self.spec.scales.iter().enumerate() {
            if self.spec.sparse && level < last {
                continue;
            }
            let mut blocks = Blocks::default();
            for sequence in sequences.iter() {
                match level == last {
                    false => self.coarse((level, size), &sequence, ended, choices, &mut blocks)?,
                    true => self.single(&sequence, choices, &mut blocks),
                }
            }
            if !blocks.is_empty() {
                levels.push(Level { size, blocks });
            }
        }
        Ok(levels)
    }

    /// Blocks of one scale that are not refined.
    fn coarse(
        &self,
        (level, size): (usize, usize),
        sequence: &Sequence<'_>,
        ended: &Ended<'_>,
        choices: &Choices,
        blocks: &mut Blocks,
    ) -> Result<()> {
        for row in touched(sequence, size) {
            let key = (sequence.index, level, row);
            let chosen = choices.get(&key).map(Vec::as_slice).unwrap_or_default();
            let rest = self.candidates(key, choices).into_iter();
            let rest = rest.filter(|block| *block < row && chosen.binary_search(block).is_err());
            let keys = rest.map(|position| {
                let span = Span::run(position * size, size);
                let row = ended.row(level, sequence, span)?;
                Ok(At { row, position })
            });
            let keys = keys.collect::<Result<Vec<_>>>()?;
            let of = queries_of(sequence, row, size);
            blocks.push(of.map(|i| sequence.query(i)), keys);
        }
        Ok(())
    }

    /// The tokens of the smallest blocks that are refined.
    fn single(&self, sequence: &Sequence<'_>, choices: &Choices, blocks: &mut Blocks) {
        let level = self.spec.per_row.len().saturating_sub(1);
        let size = self.spec.scales.get(level).copied().unwrap_or(1);
        for row in touched(sequence, size) {
            let chosen = choices.get(&(sequence.index, level, row));
            let tokens = chosen.into_iter().flatten().flat_map(|block| {
                let end = sequence.len().min((block + 1) * size);
                block * size..end
            });
            let of = queries_of(sequence, row, size);
            blocks.push(
                of.map(|i| sequence.query(i)),
                tokens.map(|j| sequence.key(j)),
            );
        }
    }

    /// One softmax over what queries meet at all scales, and the values that it mixes.
    fn mixing_by(
        &self,
        sequences: &Sequences<'_>,
        means: &SpanMemory,
        choices: &Choices,
        q: &Tensor,
    ) -> Result<(Summarised, Tensor)> {
        let [batch, heads, queries, _] = sequences.sizes;
        let ended = Ended::new(&self.sorts(0), sequences, means.earlier());
        let mut levels = self.levels(sequences, &ended, choices)?;
        let keys = levels.iter().flat_map(|level| level.blocks.keys());
        let (mut making, ranks) = ended.making(keys.map(|key| key.row));
        for key in levels.iter_mut().flat_map(|level| level.blocks.keys_mut()) {
            ranks.carry(key);
        }
        let keys = levels.iter().flat_map(|level| level.blocks.keys());
        let keys = keys.chain(making.iter().flat_map(|making| making.keys()));
        let met = Met::new(keys.map(|key| key.row), sequences.sizes, queries);
        let keys = levels.iter_mut().flat_map(|level| level.blocks.keys_mut());
        for key in keys.chain(making.iter_mut().flat_map(|making| making.keys_mut())) {
            met.carry(key);
        }
        let columns = met.columns();
        let width = tensor(q.dim(3))?;
        let tokens = tensor(means.recall(0, columns)?.reshape(((), width)))?;
        let both = [&tokens, &tokens];
        let made = Summaries::new(&making, both, &Pooled::largest(both), self.options.scale)?;
        let keys = match &made {
            None => tokens,
            Some(made) => tensor(Tensor::cat(&[&tokens, &made.keys], 0))?,
        };
        let mut meetings = Vec::new();
        for Level { size, blocks } in levels {
            let count = (size as f64).ln();
            let counted = |_: At| count;
            let (queries, bias) = match size {
                1 => (q.clone(), Bias::default()),
                _ => {
                    let bias = Bias {
                        of_key: Some(&counted),
                        ..Bias::default()
                    };
                    (first_queries(sequences, means, size)?, bias)
                }
            };
            let rule = Rule {
                causal: size == 1,
                ..Rule::default()
            };
            let part = blocks.listed(rule, bias);
            meetings.extend(Meetings::new(
                vec![part],
                (&queries, &keys),
                self.options.scale,
            )?);
        }
        let values = means.recall(1, columns)?;
        let values = tensor(values.reshape((batch, heads, columns.len(), ())))?;
        let mixing = Summarised {
            sizes: [batch, heads, queries, columns.len()],
            head_width: width,
            made,
            divisions: vec![meetings],
            whole: Vec::new(),
            before: 0,
        };
        Ok((mixing, values))
    }
}

/// Rows of blocks that have queries.
fn touched(sequence: &Sequence<'_>, size: usize) -> std::ops::Range<usize> {
    let queries = sequence.queries();
    match queries.is_empty() {
        true => 0..0,
        false => queries.start / size..queries.end.div_ceil(size),
    }
}

/// The queries of a row of blocks.
fn queries_of(sequence: &Sequence<'_>, row: usize, size: usize) -> std::ops::Range<usize> {
    let queries = sequence.queries();
    queries.start.max(row * size)..queries.end.min((row + 1) * size)
}

/// For each query that of the first token of its block, `[batch · heads · queries, width]`.
fn first_queries(sequences: &Sequences<'_>, means: &SpanMemory, size: usize) -> Result<Tensor> {
    let [batch, heads, queries, _] = sequences.sizes;
    let place = |sequence: &Sequence<'_>, i: usize| sequence.place(i / size * size);
    let mut places = BTreeSet::new();
    for sequence in sequences.iter() {
        places.extend(sequence.queries().map(|i| place(&sequence, i)));
    }
    let places: Vec<usize> = places.into_iter().collect();
    let mut table = vec![0u32; batch * heads * queries];
    for sequence in sequences.iter() {
        for i in sequence.queries() {
            let place = place(&sequence, i);
            let at = places.partition_point(|other| *other < place);
            if let Some(row) = table.get_mut(sequence.query(i).row) {
                *row = (sequence.index * places.len() + at) as u32;
            }
        }
    }
    let firsts = tensor(means.queries_at(places.into_iter())?.flatten(0, 1))?;
    let count = table.len();
    let table = tensor(Tensor::from_vec(table, count, firsts.device()))?;
    Ok(embedding(&firsts, &table)?)
}
