//! Which tokens are met directly and which in spans, form by form.

use super::super::blocks::{Blocks, Rule};
use super::super::sequences::{At, Sequence, Sequences};
use super::super::spans::{Ended, Sort, Span};
use super::{ALL, CAUSAL, CombinerForm, OTHERS};
use crate::Result;

/// One division of the tokens: who meets which by itself, and which spans.
#[derive(Debug, Default)]
pub(super) struct Division {
    pub(super) direct: Vec<(Blocks, Rule)>,
    pub(super) spans: Vec<(Blocks, Rule)>,
    /// How many tokens a span has.
    pub(super) counts: Vec<(At, usize)>,
}

impl Division {
    fn blocks(&self) -> impl Iterator<Item = &Blocks> {
        let all = self.direct.iter().chain(&self.spans);
        all.map(|(blocks, _)| blocks)
    }

    /// All keys, spans among them.
    pub(super) fn keys(&self) -> impl Iterator<Item = &At> {
        self.blocks().flat_map(Blocks::keys)
    }

    /// All keys, spans among them, to be moved.
    pub(super) fn keys_mut(&mut self) -> impl Iterator<Item = &mut At> {
        let all = self.direct.iter_mut().chain(&mut self.spans);
        let keys = all.flat_map(|(blocks, _)| blocks.keys_mut());
        keys.chain(self.counts.iter_mut().map(|(at, _)| at))
    }
}

impl CombinerForm {
    /// Sorts of spans, where the longest sequence has so many tokens; those of one token are among them where
    /// they are `single`, otherwise they are met as that token.
    pub(super) fn sorts(self, causal: bool, longest: usize, single: bool) -> Vec<Sort> {
        match self {
            Self::Fixed { segment } => vec![Sort::Segments {
                size: segment,
                open: !causal,
            }],
            Self::LogSparse => {
                let levels = least_level(single)..usize::BITS;
                let levels = levels.take_while(|level| 1usize << level <= longest);
                // What is behind a token is before it from the other end.
                let ends: &[bool] = if causal { &[false] } else { &[false, true] };
                levels
                    .flat_map(|level| {
                        let sort = move |&mirrored| Sort::Doubling { level, mirrored };
                        ends.iter().map(sort)
                    })
                    .collect()
            }
            Self::Vertical { columns } => vec![Sort::Columns(columns)],
            Self::Horizontal { columns } => vec![Sort::Sides(columns)],
            Self::RowMajor { columns } => vec![Sort::Rows(columns)],
            Self::Mixture { columns, .. } => vec![Sort::Columns(columns), Sort::Sides(columns)],
            // What is in a cluster is known of each pass alone.
            Self::Routed { .. } => Vec::new(),
        }
    }
}

/// The least level of spans that have summaries.
fn least_level(single: bool) -> u32 {
    u32::from(!single)
}

/// What the divisions of a pass are made from.
pub(super) struct Tokens<'a> {
    pub(super) sequences: &'a Sequences<'a>,
    /// Of [`CombinerForm::sorts`].
    pub(super) ended: &'a Ended<'a>,
    pub(super) causal: bool,
    /// Whether anybody asks how many tokens a span has.
    pub(super) counted: bool,
    /// Whether a span of one token is more than that token.
    pub(super) single: bool,
}

impl Tokens<'_> {
    /// Those of a form; the mean is taken over them.
    pub(super) fn divisions(&self, form: CombinerForm) -> Result<Vec<Division>> {
        let one = match form {
            // Divided by what tokens say, not by where they stand.
            CombinerForm::Routed { .. } => return Ok(Vec::new()),
            CombinerForm::Fixed { segment } => self.fixed(segment)?,
            CombinerForm::LogSparse => self.log_sparse()?,
            CombinerForm::RowMajor { columns } => self.row_major(columns)?,
            CombinerForm::Vertical { columns } => self.grid(columns, [true, false])?,
            CombinerForm::Horizontal { columns } => self.grid(columns, [false, true])?,
            CombinerForm::Mixture {
                columns,
                joint: true,
            } => self.grid(columns, [true, true])?,
            CombinerForm::Mixture {
                columns,
                joint: false,
            } => {
                let each = [[true, false], [false, true]];
                return each
                    .map(|which| self.grid(columns, which))
                    .into_iter()
                    .collect();
            }
        };
        Ok(vec![one])
    }

    /// A span of the `sort`-th sort, standing at `position`.
    fn span(
        &self,
        (sort, sequence): (usize, &Sequence<'_>),
        (span, position): (Span, usize),
        division: &mut Division,
    ) -> Result<At> {
        let row = self.ended.row(sort, sequence, span)?;
        let at = At { row, position };
        if self.counted {
            division.counts.push((at, span.count));
        }
        Ok(at)
    }

    fn fixed(&self, segment: usize) -> Result<Division> {
        let (mut own, mut others) = (Blocks::default(), Blocks::default());
        let mut division = Division::default();
        for sequence in self.sequences.iter() {
            let (queries, length) = (sequence.queries(), sequence.len());
            if queries.is_empty() {
                continue;
            }
            let first = queries.start / segment * segment;
            for start in (first..length).step_by(segment) {
                let end = length.min(start + segment);
                let of = start.max(queries.start)..end;
                own.push(of.map(|i| sequence.query(i)), keys(&sequence, start..end));
            }
            // The last segment has no later one that would look back at it.
            let spans = match self.causal {
                true => length.saturating_sub(1) / segment,
                false => length.div_ceil(segment),
            };
            let spans = (0..spans).map(|number| {
                let start = number * segment;
                let span = Span::run(start, segment.min(length - start));
                let position = number + usize::from(self.causal);
                self.span((0, &sequence), (span, position), &mut division)
            });
            let spans = spans.collect::<Result<Vec<_>>>()?;
            others.push(queries.map(|i| in_block(&sequence, i, segment)), spans);
        }
        let (near, far) = match self.causal {
            true => (CAUSAL, CAUSAL),
            false => (ALL, OTHERS),
        };
        division.direct.push((own, near));
        division.spans.push((others, far));
        Ok(division)
    }

    /// Each token with itself and its spans in one list.
    fn log_sparse(&self) -> Result<Division> {
        let ends: &[bool] = if self.causal {
            &[false]
        } else {
            &[false, true]
        };
        let (mut blocks, mut division) = (Blocks::default(), Division::default());
        let mut met = Vec::new();
        for sequence in self.sequences.iter() {
            for i in sequence.queries() {
                met.push(anywhere(sequence.key(i)));
                for &mirrored in ends {
                    self.doubling((&sequence, i), mirrored, (&mut met, &mut division))?;
                }
                blocks.push([sequence.query(i)], met.drain(..));
            }
        }
        division.spans.push((blocks, ALL));
        Ok(division)
    }

    /// Spans of `1, 2, 4, …` tokens before a token, counted from the end where `mirrored`.
    fn doubling(
        &self,
        (sequence, i): (&Sequence<'_>, usize),
        mirrored: bool,
        (met, division): (&mut Vec<At>, &mut Division),
    ) -> Result<()> {
        let ends = if self.causal { 1 } else { 2 };
        let counted = |i: usize| match mirrored {
            true => sequence.len() - 1 - i,
            false => i,
        };
        let (token, least) = (counted(i), least_level(self.single));
        let levels = (0..usize::BITS).take_while(|level| token >> level > 0);
        for level in levels.filter(|level| (token >> level) % 2 == 1) {
            // One of an even number, which stands before the token's own.
            let start = ((token >> level) - 1) << level;
            met.push(match level.checked_sub(least) {
                None => anywhere(sequence.key(counted(start))),
                Some(level_of_sort) => {
                    let sort = level_of_sort as usize * ends + usize::from(mirrored);
                    let span = (Span::run(start, 1 << level), 0);
                    self.span((sort, sequence), span, division)?
                }
            });
        }
        Ok(())
    }

    /// Own row and column, and `[vertical, horizontal]` spans.
    fn grid(&self, columns: usize, [vertical, horizontal]: [bool; 2]) -> Result<Division> {
        let mut division = Division::default();
        let (mut above, mut left) = (Blocks::default(), Blocks::default());
        for sequence in self.sequences.iter() {
            for (of, column) in columns_of(&sequence, columns) {
                let column = column.map(|j| sequence.key(j));
                above.push(of.map(|i| sequence.query(i)), column);
            }
            for (of, row) in rows_of(&sequence, columns) {
                left.push(of.map(|i| sequence.query(i)), keys(&sequence, row));
            }
        }
        // The token itself is in its column.
        let before = Rule {
            causal: true,
            ..OTHERS
        };
        division.direct.extend([(above, CAUSAL), (left, before)]);
        if vertical {
            let blocks = self.vertical(columns, &mut division)?;
            division.spans.push((blocks, OTHERS));
        }
        if horizontal {
            // Behind those of columns, where there are both.
            let sort = self.ended.sorts() - 1;
            let blocks = self.horizontal((sort, columns), &mut division)?;
            division.spans.push((blocks, CAUSAL));
        }
        Ok(division)
    }

    fn vertical(&self, columns: usize, division: &mut Division) -> Result<Blocks> {
        let mut blocks = Blocks::default();
        for sequence in self.sequences.iter() {
            for (of, row) in rows_of(&sequence, columns) {
                let height = row.start / columns;
                // The first row has nothing above it, however wide it is.
                let filled = if height > 0 { columns } else { 0 };
                let above = (0..filled).map(|column| {
                    let span = Span::column(column, columns, height);
                    self.span((0, &sequence), (span, column), division)
                });
                let above = above.collect::<Result<Vec<_>>>()?;
                let of = of.map(|i| At {
                    position: i % columns,
                    ..sequence.query(i)
                });
                blocks.push(of, above);
            }
        }
        Ok(blocks)
    }

    fn horizontal(
        &self,
        (sort, columns): (usize, usize),
        division: &mut Division,
    ) -> Result<Blocks> {
        let mut blocks = Blocks::default();
        for sequence in self.sequences.iter() {
            // The last row has no later one that would look back at it.
            let whole = sequence.len().saturating_sub(1) / columns;
            for (of, mut column) in columns_of(&sequence, columns) {
                let top = column.next().unwrap_or(0);
                // Every row from the left, and from the right.
                let spans = (0..whole).flat_map(|row| {
                    let (start, end) = (row * columns, (row + 1) * columns);
                    let right = columns - 1 - top;
                    [(start, top), (end - right, right)].map(|span| (span, row + 1))
                });
                let there = spans.filter(|((_, count), _)| *count > 0);
                let met = there.map(|((start, count), position)| {
                    let span = Span::run(start, count);
                    self.span((sort, &sequence), (span, position), division)
                });
                let met = met.collect::<Result<Vec<_>>>()?;
                blocks.push(of.map(|i| in_block(&sequence, i, columns)), met);
            }
        }
        Ok(blocks)
    }

    fn row_major(&self, columns: usize) -> Result<Division> {
        let (mut own, mut earlier) = (Blocks::default(), Blocks::default());
        let mut division = Division::default();
        for sequence in self.sequences.iter() {
            let whole = sequence.len().saturating_sub(1) / columns;
            for (of, row) in rows_of(&sequence, columns) {
                own.push(of.map(|i| sequence.query(i)), keys(&sequence, row));
            }
            for (of, column) in columns_of(&sequence, columns) {
                let met = column.take(whole).map(|token| {
                    let span = (Span::row_of(token, columns), token / columns + 1);
                    self.span((0, &sequence), span, &mut division)
                });
                let met = met.collect::<Result<Vec<_>>>()?;
                earlier.push(of.map(|i| in_block(&sequence, i, columns)), met);
            }
        }
        division.direct.push((own, CAUSAL));
        division.spans.push((earlier, CAUSAL));
        Ok(division)
    }
}

/// A key where no rule asks for its position.
fn anywhere(key: At) -> At {
    At { position: 0, ..key }
}

fn keys<'a>(
    sequence: &'a Sequence<'_>,
    tokens: std::ops::Range<usize>,
) -> impl Iterator<Item = At> + 'a {
    tokens.map(|j| sequence.key(j))
}

/// A token as a query that stands where its block does.
fn in_block(sequence: &Sequence<'_>, token: usize, size: usize) -> At {
    At {
        position: token / size,
        ..sequence.query(token)
    }
}

type Stepped = std::iter::StepBy<std::ops::Range<usize>>;

/// The columns of a grid that have queries: these, and all tokens.
fn columns_of(sequence: &Sequence<'_>, columns: usize) -> impl Iterator<Item = (Stepped, Stepped)> {
    let (first, length) = (sequence.first(), sequence.len());
    (first..length.min(first + columns)).map(move |i| {
        let tokens = |first: usize| (first..length).step_by(columns);
        (tokens(i), tokens(i % columns))
    })
}

/// The rows of a grid that have queries: these, and all tokens; the last may be shorter.
fn rows_of(
    sequence: &Sequence<'_>,
    columns: usize,
) -> impl Iterator<Item = (std::ops::Range<usize>, std::ops::Range<usize>)> {
    let (first, length) = (sequence.first(), sequence.len());
    let start = match first < length {
        true => first / columns * columns,
        false => length,
    };
    let starts = (start..length).step_by(columns);
    starts.map(move |start| {
        let end = length.min(start + columns);
        (start.max(first)..end, start..end)
    })
}
