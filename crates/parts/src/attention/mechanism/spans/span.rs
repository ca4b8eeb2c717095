//! Which spans there are, and when they are over.

/// Tokens that are met in summary: `count` of them from `start` on, every `step`-th.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(in super::super) struct Span {
    pub(in super::super) start: usize,
    pub(in super::super) step: usize,
    pub(in super::super) count: usize,
    /// The token whose query sums it up, where that is not one of the span's own.
    pub(in super::super) by: Option<usize>,
}

impl Span {
    /// Tokens side by side.
    pub(in super::super) fn run(start: usize, count: usize) -> Self {
        Self {
            start,
            step: 1,
            count,
            by: None,
        }
    }

    /// The first `count` tokens of a column of a grid.
    pub(in super::super) fn column(column: usize, columns: usize, count: usize) -> Self {
        Self {
            step: columns,
            ..Self::run(column, count)
        }
    }

    /// The row of a token of a grid, summed up by that token.
    pub(in super::super) fn row_of(token: usize, columns: usize) -> Self {
        Self {
            by: Some(token),
            ..Self::run(token / columns * columns, columns)
        }
    }

    /// Its last token: later ones don't change it.
    fn last(&self) -> usize {
        self.start + self.count.saturating_sub(1) * self.step
    }
}

/// How lists of tokens become summaries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum Way {
    /// One for each list, by the largest of its queries and keys, feature by feature.
    Whole,
    /// The same for each beginning of each list.
    Beginnings,
    /// One for each token of each list, by its query; keys are weighted as values are.
    Each,
    /// The mean of each list.
    Mean,
}

/// Sorts of spans.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum Sort {
    /// Segments of so many tokens, and where `open` the last one, which may have fewer.
    Segments { size: usize, open: bool },
    /// The same, of which there are means.
    Blocks(usize),
    /// Those of `2^level` tokens that others of the same size follow, counted from the end where
    /// `mirrored`.
    Doubling { level: u32, mirrored: bool },
    /// Beginnings of columns of a grid of so many.
    Columns(usize),
    /// Beginnings and ends of the rows of a grid of so many columns.
    Sides(usize),
    /// Rows of such a grid, by each of their tokens.
    Rows(usize),
}

impl Sort {
    pub(super) fn way(self) -> Way {
        match self {
            Self::Segments { .. } | Self::Doubling { .. } => Way::Whole,
            Self::Blocks(_) => Way::Mean,
            Self::Columns(_) | Self::Sides(_) => Way::Beginnings,
            Self::Rows(_) => Way::Each,
        }
    }

    /// The token whose pass makes a span.
    pub(super) fn made_at(self, span: Span) -> usize {
        match self {
            // Both sides of a row once it is whole: nobody looks at them before.
            Self::Sides(columns) => (span.start / columns + 1) * columns - 1,
            _ => span.last(),
        }
    }

    /// The lists of tokens that those spans are made of that are over by `length` and were not when
    /// there were `from` tokens.
    pub(super) fn lists(self, from: usize, length: usize) -> Vec<Vec<usize>> {
        let run = |start: usize, count: usize| (start..length.min(start + count)).collect();
        match self {
            Self::Segments { size, open: true } => (from / size..length.div_ceil(size))
                .map(|segment| run(segment * size, size))
                .collect(),
            Self::Segments { size, open: false } | Self::Blocks(size) | Self::Rows(size) => {
                let segments = from / size..length / size;
                segments.map(|segment| run(segment * size, size)).collect()
            }
            Self::Doubling { level, mirrored } => {
                let first = (from >> level).next_multiple_of(2);
                let token = |i: usize| if mirrored { length - 1 - i } else { i };
                let spans = (first..length >> level).step_by(2);
                spans
                    .map(|span| (span << level..(span + 1) << level).map(token).collect())
                    .collect()
            }
            Self::Columns(columns) => (from..length.min(from + columns))
                .map(|i| (i % columns..length).step_by(columns).collect())
                .collect(),
            Self::Sides(columns) => (from / columns..length / columns)
                .flat_map(|row| {
                    let row = row * columns..(row + 1) * columns;
                    [row.clone().collect(), row.rev().collect()]
                })
                .collect(),
        }
    }

    /// The list of [`Sort::lists`] that a span is made of, and where it ends in it, or which of its
    /// tokens sums it up.
    pub(super) fn place(self, span: Span, from: usize) -> [usize; 2] {
        let end = span.count.saturating_sub(1);
        match self {
            Self::Segments { size, .. } | Self::Blocks(size) => {
                [(span.start / size).saturating_sub(from / size), end]
            }
            Self::Doubling { level, .. } => {
                let first = (from >> level).next_multiple_of(2);
                [(span.start >> level).saturating_sub(first) / 2, end]
            }
            Self::Columns(columns) => [(span.start + columns - from % columns) % columns, end],
            Self::Sides(columns) => {
                let row = (span.start / columns).saturating_sub(from / columns);
                let right = usize::from(!span.start.is_multiple_of(columns));
                [2 * row + right, end]
            }
            Self::Rows(columns) => {
                let row = (span.start / columns).saturating_sub(from / columns);
                [row, span.by.unwrap_or(span.start) - span.start]
            }
        }
    }

    /// The spans among those of [`Sort::lists`] that tokens from `length` on meet.
    pub(super) fn later(self, from: usize, length: usize) -> Vec<Span> {
        match self {
            Self::Segments { size, .. } | Self::Blocks(size) => (from / size..length / size)
                .map(|segment| Span::run(segment * size, size))
                .collect(),
            Self::Doubling { level, .. } => {
                let place = length >> level;
                let over = place % 2 == 1 && place << level > from;
                let before = || Span::run((place - 1) << level, 1 << level);
                over.then(before).into_iter().collect()
            }
            Self::Columns(columns) => {
                let (row, column) = (length / columns, length % columns);
                let heights =
                    |c: usize| [row, row + 1].into_iter().take(1 + usize::from(c < column));
                (0..columns)
                    .flat_map(|c| heights(c).map(move |height| Span::column(c, columns, height)))
                    .filter(|span| span.count > 0 && span.last() >= from)
                    .collect()
            }
            Self::Sides(columns) => (from / columns..length / columns)
                .flat_map(|row| (1..columns).map(move |count| (row * columns, count)))
                .flat_map(|(start, count)| {
                    [start, start + columns - count].map(|start| Span::run(start, count))
                })
                .collect(),
            Self::Rows(columns) => (from / columns * columns..length / columns * columns)
                .map(|token| Span::row_of(token, columns))
                .collect(),
        }
    }

    /// Whether tokens from `length` on meet a span of this sort that is over by then.
    pub(in super::super) fn keeps(self, span: Span, length: usize) -> bool {
        match self {
            Self::Doubling { .. } => span.start + 2 * span.count > length,
            Self::Columns(columns) => span.count >= length / columns,
            Self::Segments { .. } | Self::Blocks(_) | Self::Sides(_) | Self::Rows(_) => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sorts() -> Vec<Sort> {
        let mut all = vec![Sort::Blocks(3)];
        for level in 0..5 {
            all.push(Sort::Doubling {
                level,
                mirrored: false,
            });
        }
        for size in [1, 3, 4] {
            all.push(Sort::Segments { size, open: false });
            all.extend([Sort::Columns(size), Sort::Sides(size), Sort::Rows(size)]);
        }
        all
    }

    /// What later tokens meet is made in the pass that ends it, of the right tokens, and once.
    #[test]
    fn every_span_is_made_when_it_is_over() {
        for sort in sorts() {
            for (from, length) in (0..14).flat_map(|from| (from..24).map(move |to| (from, to))) {
                let lists = sort.lists(from, length);
                let later = sort.later(from, length);
                for span in &later {
                    assert!(
                        (from..length).contains(&sort.made_at(*span)),
                        "{sort:?} {span:?}"
                    );
                    assert!(sort.keeps(*span, length));
                    let [list, end] = sort.place(*span, from);
                    let list = &lists[list];
                    let mut made = match sort.way() {
                        Way::Beginnings => list[..=end].to_vec(),
                        _ => list.clone(),
                    };
                    if let Some(by) = span.by {
                        assert_eq!(list[end], by);
                    }
                    made.sort_unstable();
                    let tokens = (0..span.count).map(|i| span.start + i * span.step);
                    assert!(made.into_iter().eq(tokens), "{sort:?} {span:?}");
                }
                // In two passes as in one, but for what the second makes needless.
                for middle in from..=length {
                    let mut twice = sort.later(from, middle);
                    twice.retain(|span| sort.keeps(*span, length));
                    twice.extend(sort.later(middle, length));
                    assert_eq!(
                        twice.len(),
                        later.len(),
                        "{sort:?} {from} {middle} {length}"
                    );
                    assert!(twice.iter().all(|span| later.contains(span)));
                }
            }
        }
    }
}
