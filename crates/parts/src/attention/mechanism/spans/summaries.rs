//! Keys and values of spans, from those of their tokens.

use super::ended::Making;
use super::pooling::{Pooled, Pooling, Rows};
use super::span::Way;
use crate::Result;
use crate::attention::mechanism::blocks::{Bias, Blocks, Meetings, Rule, operations};
use crate::attention::mechanism::sequences::At;
use crate::error::tensor;
use lapidary_kernels::{D, Tensor, embedding};

/// Summaries of spans, those of one list behind those of another.
#[derive(Debug)]
pub(in super::super) struct Summaries {
    /// `[spans, head_width]`.
    pub(in super::super) keys: Tensor,
    /// Which make the values of some of the spans each, one after the other.
    parts: Vec<Meetings>,
    /// Operations that keys took, comparisons aside.
    before: u64,
}

impl Summaries {
    /// Those of lists of rows of queries and keys `tokens`, `[.., head_width]`, their own queries and keys
    /// made of what is `pooled`; nothing of no lists.
    pub(in super::super) fn new(
        making: &[Making],
        tokens: [&Tensor; 2],
        pooled: &Pooled,
        scale: f64,
    ) -> Result<Option<Self>> {
        let (mut keys, mut parts, mut before) = (Vec::new(), Vec::new(), pooled.before);
        for making in making {
            let lists = Lists::new(making, tokens, pooled);
            let [_, k] = tokens;
            let queries = lists.queries()?;
            let blocks = lists.blocks().listed(lists.rule(), Bias::default());
            let Some(part) = Meetings::new(vec![blocks], (&queries, k), scale)? else {
                continue;
            };
            keys.push(match making.way {
                Way::Whole | Way::Beginnings => {
                    before += lists.additions(tensor(k.dim(D::Minus1))?);
                    lists.pooled(&pooled.keys)?
                }
                Way::Each | Way::Mean => {
                    let width = tensor(k.dim(D::Minus1))?;
                    let rows = pooled.row_keys.as_ref();
                    let rows = rows.filter(|_| making.way == Way::Each);
                    let read = rows.and_then(|rows| rows.values.as_ref()).unwrap_or(k);
                    let widths = [width, tensor(read.dim(D::Minus1))?];
                    before += operations([&part], 0, widths);
                    let weighted = part.output(read)?;
                    match rows {
                        None => weighted,
                        Some(Rows { by, sequences, .. }) => {
                            let own = lists.summing_up();
                            before += own.len() as u64 * by.operations(widths);
                            let rows = k.elem_count() / width.max(1);
                            let [batch, heads] = *sequences;
                            let each = (rows / (batch * heads).max(1)).max(1);
                            let head_of = own.iter().map(|row| *row as usize / each % heads);
                            let head_of: Vec<usize> = head_of.collect();
                            by.keys(&weighted, &picked(k, own)?, &head_of)?
                        }
                    }
                }
            });
            parts.push(part);
        }
        if keys.is_empty() {
            return Ok(None);
        }
        let keys = match keys.as_slice() {
            [one] => one.clone(),
            _ => tensor(Tensor::cat(&keys, 0))?,
        };
        Ok(Some(Self {
            keys,
            parts,
            before,
        }))
    }

    /// Values of spans, `[spans, width]`, from those of tokens `[.., width]`.
    pub(in super::super) fn values(&self, values: &Tensor) -> lapidary_kernels::Result<Tensor> {
        let each = self.parts.iter().map(|part| part.output(values));
        let each = each.collect::<lapidary_kernels::Result<Vec<_>>>()?;
        match each.as_slice() {
            [one] => Ok(one.clone()),
            _ => Ok(Tensor::cat(&each, 0)?),
        }
    }

    /// What keys and values of `[head_width, width]` take.
    pub(in super::super) fn operations(&self, widths: [usize; 2]) -> u64 {
        // Values of different spans are put side by side, with nothing to merge.
        self.before + operations(&self.parts, 0, widths)
    }
}

/// Lists of tokens that become summaries in the same way.
struct Lists<'a> {
    making: &'a Making,
    longest: usize,
    tokens: [&'a Tensor; 2],
    pooled: &'a Pooled,
}

impl<'a> Lists<'a> {
    fn new(making: &'a Making, tokens: [&'a Tensor; 2], pooled: &'a Pooled) -> Self {
        let lengths = making.lists.iter().map(|(list, _)| list.len());
        Self {
            making,
            longest: lengths.max().unwrap_or(0),
            tokens,
            pooled,
        }
    }

    /// Which keys the query of a summary meets.
    fn rule(&self) -> Rule {
        Rule {
            causal: self.making.way == Way::Beginnings,
            window: None,
            own: 0.0,
        }
    }

    fn blocks(&self) -> Blocks {
        let mut blocks = Blocks::default();
        let mut row = 0;
        for (list, ends) in &self.making.lists {
            let summaries = ends.iter().zip(row..);
            let tokens = list.iter().enumerate();
            blocks.push(
                summaries.map(|(&position, row)| At { row, position }),
                tokens.map(|(position, at)| At { position, ..*at }),
            );
            row += ends.len();
        }
        blocks
    }

    /// The query of each summary, `[summaries, head_width]`.
    fn queries(&self) -> Result<Tensor> {
        let [q, _] = self.tokens;
        match self.making.way {
            Way::Whole | Way::Beginnings => self.pooled(&self.pooled.queries),
            Way::Each => picked(q, self.summing_up()),
            // Weighs all tokens alike.
            Way::Mean => {
                let shape = (self.making.lists.len(), tensor(q.dim(D::Minus1))?);
                tensor(Tensor::zeros(shape, q.dtype(), q.device()))
            }
        }
    }

    /// The row of the token that sums up each summary, where one of the list does.
    fn summing_up(&self) -> Vec<u32> {
        let lists = self.making.lists.iter();
        let each = lists.flat_map(|(list, ends)| ends.iter().filter_map(|end| list.get(*end)));
        each.map(|at| at.row as u32).collect()
    }

    /// Additions of queries and keys, where these are sums.
    fn additions(&self, width: usize) -> u64 {
        let tokens: usize = self.making.lists.iter().map(|(list, _)| list.len()).sum();
        match self.pooled.by {
            Pooling::Max => 0,
            Pooling::Mean | Pooling::Sum => (2 * tokens * width) as u64,
        }
    }

    /// What is pooled of the tokens of each summary, `[summaries, width]`.
    fn pooled(&self, x: &Tensor) -> Result<Tensor> {
        let by = self.pooled.by;
        let lists = self.making.lists.iter();
        if self.making.way != Way::Beginnings {
            let lists = lists.map(|(list, _)| list.as_slice());
            return by.whole(x, &lists.collect::<Vec<_>>());
        }
        let laid = self.laid_out(x)?;
        let all = tensor(by.beginnings(&laid)?.flatten(0, 1))?;
        let starts = (0..).step_by(self.longest.max(1));
        let ends = lists.clone().zip(starts);
        let rows =
            ends.flat_map(|((_, ends), start)| ends.iter().map(move |end| start + *end as u32));
        let counts = lists.flat_map(|(_, ends)| ends.iter().map(|end| end + 1));
        by.divided(picked(&all, rows.collect())?, counts.collect())
    }

    /// `[lists, longest, width]`, behind the end of a list what counts for nothing.
    fn laid_out(&self, x: &Tensor) -> Result<Tensor> {
        let (mut rows, mut there) = (Vec::new(), Vec::new());
        for (list, _) in &self.making.lists {
            rows.extend(list.iter().map(|at| at.row as u32));
            there.resize(rows.len(), true);
            rows.resize(rows.len() + self.longest - list.len(), 0);
            there.resize(rows.len(), false);
        }
        let (lists, width) = (self.making.lists.len(), tensor(x.dim(D::Minus1))?);
        let laid = picked(x, rows)?;
        let laid = tensor(laid.reshape((lists, self.longest, width)))?;
        match there.iter().all(|there| *there) {
            true => Ok(laid),
            false => self.pooled.by.behind(&laid, &there),
        }
    }
}

fn picked(x: &Tensor, rows: Vec<u32>) -> Result<Tensor> {
    let (count, width) = (rows.len(), tensor(x.dim(D::Minus1))?);
    let rows = tensor(Tensor::from_vec(rows, count, x.device()))?;
    Ok(embedding(&tensor(x.reshape(((), width)))?, &rows)?)
}
