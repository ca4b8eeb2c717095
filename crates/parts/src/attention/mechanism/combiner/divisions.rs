//! Which tokens are met directly and which in spans, form by form.

use super::super::blocks::{Bias, Blocks, Part, Rule, operations};
use super::super::sequences::{At, Sequence, Sequences};
use super::summaries::{Lists, Summaries};
use super::{ALL, CAUSAL, Division, OTHERS};
use crate::Result;
use crate::error::tensor;
use lapidary_kernels::Tensor;

/// What the divisions of a pass are made from.
pub(super) struct Tokens<'a> {
    pub(super) sequences: &'a Sequences,
    /// Rows of the queries that attend, of all queries, and of keys.
    pub(super) queries: Tensor,
    pub(super) all: Tensor,
    pub(super) keys: Tensor,
    pub(super) causal: bool,
    pub(super) scale: f64,
    pub(super) log_count: bool,
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

    pub(super) fn fixed(&self, segment: usize) -> Result<Division> {
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

    pub(super) fn log_sparse(&self) -> Result<Division> {
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
                let spans = (length.saturating_sub(1) >> level).div_ceil(2);
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
    pub(super) fn row_and_column(&self, columns: usize) -> Result<Vec<Part>> {
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

    pub(super) fn vertical(&self, columns: usize) -> Result<Vec<(Summaries, Part)>> {
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

    pub(super) fn horizontal(&self, columns: usize) -> Result<Vec<(Summaries, Part)>> {
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

    pub(super) fn row_major(&self, columns: usize) -> Result<Division> {
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
                let summaries = Summaries {
                    keys: part.attend(&self.keys)?.output()?,
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
