//! The spans that end in a pass.

use std::collections::HashMap;

use super::span::{Sort, Span, Way};
use crate::attention::mechanism::sequences::{At, Sequence, Sequences};
use crate::{Error, Result};

/// The columns of the summaries that each sequence of a batch has from earlier passes.
pub(in super::super) type Earlier = [HashMap<Span, usize>];

/// Lists of tokens, from which the summaries of spans that end in a pass can be made. Their rows are
/// counted on from those of the keys, sort by sort.
#[derive(Debug)]
pub(in super::super) struct Ended<'a> {
    groups: Vec<Group>,
    earlier: &'a Earlier,
    /// Rows of keys.
    keys: usize,
    /// Rows of summaries.
    rows: usize,
}

/// Lists of one sort.
#[derive(Debug)]
struct Group {
    sort: Sort,
    lists: Vec<Vec<At>>,
    /// The first list of each head of each sequence.
    first: Vec<usize>,
    /// Summaries that each list could make.
    each: usize,
    /// Rows of sorts before.
    before: usize,
}

impl Group {
    fn new(sort: Sort, sequences: &Sequences<'_>, before: usize) -> Self {
        let (mut lists, mut first) = (Vec::new(), Vec::new());
        for sequence in sequences.iter() {
            first.push(lists.len());
            let tokens = sort.lists(sequence.first(), sequence.len());
            lists.extend(tokens.into_iter().map(|list| {
                let keys = list.into_iter().map(|token| sequence.key(token));
                keys.collect::<Vec<_>>()
            }));
        }
        let longest = lists.iter().map(Vec::len).max().unwrap_or(0);
        Self {
            sort,
            lists,
            first,
            each: match sort.way() {
                Way::Whole | Way::Mean => 1,
                Way::Beginnings | Way::Each => longest,
            },
            before,
        }
    }
}

/// Some of the summaries that lists of one sort make, in the order of lists.
#[derive(Debug)]
pub(in super::super) struct Making {
    pub(super) way: Way,
    /// Tokens, and at which of them summaries end or which sum up.
    pub(super) lists: Vec<(Vec<At>, Vec<usize>)>,
}

impl Making {
    /// Summaries of beginnings of lists, those that end at the given tokens of each.
    pub(in super::super) fn beginnings(lists: Vec<(Vec<At>, Vec<usize>)>) -> Self {
        Self {
            way: Way::Beginnings,
            lists,
        }
    }

    /// Rows of all lists, and where each ends among them, where whole lists are summed up.
    pub(in super::super) fn whole(&self) -> Option<(Vec<u32>, Vec<usize>)> {
        if self.way != Way::Whole {
            return None;
        }
        let rows = self.keys().map(|key| key.row as u32).collect();
        let ends = self.lists.iter().scan(0, |end, (list, _)| {
            *end += list.len();
            Some(*end)
        });
        Some((rows, ends.collect()))
    }

    /// The tokens of all lists.
    pub(in super::super) fn keys(&self) -> impl Iterator<Item = &At> {
        self.lists.iter().flat_map(|(list, _)| list)
    }

    /// The tokens of all lists, to be moved.
    pub(in super::super) fn keys_mut(&mut self) -> impl Iterator<Item = &mut At> {
        self.lists.iter_mut().flat_map(|(list, _)| list)
    }
}

impl<'a> Ended<'a> {
    /// Those of `sorts`.
    pub(in super::super) fn new(
        sorts: &[Sort],
        sequences: &Sequences<'_>,
        earlier: &'a Earlier,
    ) -> Self {
        let [batch, heads, _, keys] = sequences.sizes;
        let (mut groups, mut rows) = (Vec::new(), 0);
        for &sort in sorts {
            let group = Group::new(sort, sequences, rows);
            rows += group.lists.len() * group.each;
            groups.push(group);
        }
        Self {
            groups,
            earlier,
            keys: batch * heads * keys,
            rows,
        }
    }

    /// How many sorts.
    pub(in super::super) fn sorts(&self) -> usize {
        self.groups.len()
    }

    /// The row of a span of the `sort`-th sort: one that was made before the first query was kept, others
    /// are made.
    pub(in super::super) fn row(
        &self,
        sort: usize,
        sequence: &Sequence<'_>,
        span: Span,
    ) -> Result<usize> {
        let group = self.groups.get(sort);
        if group.is_some_and(|group| group.sort.made_at(span) >= sequence.first()) {
            return Ok(self.keys + self.made(sort, sequence, span));
        }
        let known = self.earlier.get(sequence.batch());
        let column = known.and_then(|known| known.get(&span));
        let column = column.ok_or_else(|| {
            let expected =
                "among those of the decode state: does the mask of its tokens still hold?";
            Error::spec("summary of earlier tokens", format!("{span:?}"), expected)
        })?;
        Ok(sequence.row(*column))
    }

    /// The number of a span among those that could be made.
    pub(super) fn made(&self, sort: usize, sequence: &Sequence<'_>, span: Span) -> usize {
        let Some(group) = self.groups.get(sort) else {
            return 0;
        };
        let first = group.first.get(sequence.index).copied().unwrap_or(0);
        let [list, end] = group.sort.place(span, sequence.first());
        let end = if group.each == 1 { 0 } else { end };
        group.before + (first + list) * group.each + end
    }

    /// Those of the summaries that are `met`, rows of keys among these, and what the number of each is when
    /// no others are made.
    pub(in super::super) fn making(self, met: impl Iterator<Item = usize>) -> (Vec<Making>, Ranks) {
        let mut used = vec![false; self.rows];
        for row in met.filter_map(|row| row.checked_sub(self.keys)) {
            if let Some(used) = used.get_mut(row) {
                *used = true;
            }
        }
        let mut all: Vec<Making> = Vec::new();
        for group in self.groups {
            let mut lists = Vec::new();
            for (number, list) in group.lists.into_iter().enumerate() {
                let start = group.before + number * group.each;
                let here = used.get(start..start + group.each).unwrap_or_default();
                let ends = here.iter().enumerate().filter(|(_, used)| **used);
                let ends: Vec<usize> = ends.map(|(end, _)| end).collect();
                if !ends.is_empty() {
                    lists.push((list, ends));
                }
            }
            let way = group.sort.way();
            match all.last_mut() {
                // Summaries of whole lists are made alike, however long these are.
                Some(Making {
                    way: Way::Whole,
                    lists: before,
                }) if way == Way::Whole => {
                    before.extend(lists);
                }
                _ if lists.is_empty() => {}
                _ => all.push(Making { way, lists }),
            }
        }
        (all, Ranks::new(self.keys, &used))
    }
}

/// Rows of summaries, counted among those that are made.
#[derive(Debug)]
pub(in super::super) struct Ranks {
    keys: usize,
    ranks: Vec<usize>,
}

impl Ranks {
    fn new(keys: usize, used: &[bool]) -> Self {
        let mut count = 0;
        let ranks = used.iter().map(|used| {
            count += usize::from(*used);
            count - usize::from(*used)
        });
        Self {
            keys,
            ranks: ranks.collect(),
        }
    }

    /// The number of a summary among those that are made.
    pub(super) fn rank(&self, number: usize) -> usize {
        self.ranks.get(number).copied().unwrap_or(0)
    }

    /// Moves a summary to where its row is now; keys stay.
    pub(in super::super) fn carry(&self, key: &mut At) {
        if let Some(number) = key.row.checked_sub(self.keys) {
            key.row = self.keys + self.rank(number);
        }
    }
}
