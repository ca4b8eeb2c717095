//! Blocks as they are worked off, and what their queries see.

use super::BlockPart;
use crate::simd::Real;
use crate::{Error, Result};
use std::ops::Range;

/// Most queries of a piece: keys are laid out anew for each piece, and threads share them.
const PIECE: usize = 256;
/// Queries below which laying out keys and values is not worth it.
const FEW: usize = 8;

/// Blocks that were checked, in pieces.
#[derive(Debug)]
pub(super) struct Part {
    lists: BlockPart,
    pieces: Vec<Piece>,
    /// Whether positions decide anything.
    ruled: bool,
}

/// Some queries of a block and the keys that any of them may see, as places in the lists.
#[derive(Debug)]
pub(super) struct Piece {
    pub(super) queries: Range<usize>,
    pub(super) keys: Range<usize>,
    /// The keys of the whole block.
    block: Range<usize>,
    /// Where the biases of the first query and the first key of the block lie.
    bias: usize,
}

impl Piece {
    /// Whether it has so few queries that each goes from key to key.
    pub(super) fn is_small(&self) -> bool {
        self.queries.len() < FEW
    }

    /// Whether the keys of another that follows are laid out as its own are.
    pub(super) fn shares_keys(&self, next: &Self) -> bool {
        self.keys == next.keys && !self.is_small() && !next.is_small()
    }

    /// Where some of its keys are among all of them.
    pub(super) fn place(&self, keys: &Range<usize>) -> Range<usize> {
        keys.start - self.keys.start..keys.end - self.keys.start
    }

    /// Pairs of its queries and keys.
    pub(super) fn pairs(&self) -> usize {
        self.queries.len() * self.keys.len()
    }
}

fn refused<T>(argument: &'static str, found: impl std::fmt::Debug, expected: String) -> Result<T> {
    Err(Error::argument(
        "attention in blocks",
        argument,
        found,
        expected,
    ))
}

/// Lists as long as the others, of rows that are there.
fn check_lists(lists: &BlockPart, rows: [usize; 2]) -> Result<()> {
    let last = lists.ends.last().copied().unwrap_or_default();
    let sides = [("queries", &lists.queries), ("keys", &lists.keys)];
    for (((name, side), length), rows) in sides.into_iter().zip(last).zip(rows) {
        if (side.rows.len(), side.positions.len()) != (length, length) {
            let found = (side.rows.len(), side.positions.len());
            return refused(name, found, format!("{length} rows and positions"));
        }
        if let Some(row) = side.rows.iter().find(|row| **row as usize >= rows) {
            return refused(name, row, format!("rows below {rows}"));
        }
    }
    let rising = |pair: &[[usize; 2]]| matches!(pair, [[a, b], [c, d]] if a <= c && b <= d);
    if !lists.ends.windows(2).all(rising) {
        return refused("ends", "falling ones", "rising numbers".to_owned());
    }
    if lists.window == Some(0) {
        return refused("window", 0, "none or at least 1".to_owned());
    }
    let mut taken = vec![false; rows[0]];
    for row in &lists.queries.rows {
        if std::mem::replace(&mut taken[*row as usize], true) {
            return refused("queries", row, "in one block of a part at most".to_owned());
        }
    }
    Ok(())
}

/// Biases for as many keys or pairs as there are, and hidden pairs in order.
fn check_biases(lists: &BlockPart, pairs: usize) -> Result<()> {
    let keys = lists.keys.rows.len();
    if ![0, keys].contains(&lists.key_bias.len()) {
        let found = lists.key_bias.len();
        return refused("key_bias", found, format!("nothing or {keys} numbers"));
    }
    if ![0, pairs].contains(&lists.pair_bias.len()) {
        let found = lists.pair_bias.len();
        return refused("pair_bias", found, format!("nothing or {pairs} numbers"));
    }
    if !lists.hidden.is_sorted() {
        return refused("hidden", "out of order", "rising pairs".to_owned());
    }
    Ok(())
}

impl Part {
    pub(super) fn new(lists: BlockPart, rows: [usize; 2]) -> Result<Self> {
        check_lists(&lists, rows)?;
        let starts = std::iter::once(0).chain(lists.ends.iter().map(|end| end[0]));
        let sizes = starts.zip(&lists.ends).map(|(start, end)| end[0] - start);
        let pieces = sizes.map(|size| size.div_ceil(PIECE)).sum();
        let mut part = Self {
            ruled: lists.causal || lists.window.is_some() || lists.own != 0.0,
            pieces: Vec::with_capacity(pieces),
            lists,
        };
        let (mut start, mut bias) = ([0; 2], 0);
        for at in 0..part.lists.ends.len() {
            let end = part.lists.ends[at];
            let (queries, keys) = (start[0]..end[0], start[1]..end[1]);
            if !part.lists.keys.positions[keys.clone()].is_sorted() {
                let expected = "rising within a block".to_owned();
                return refused("positions of keys", "out of order", expected);
            }
            for first in queries.clone().step_by(PIECE) {
                let here = first..queries.end.min(first + PIECE);
                part.pieces.push(Piece {
                    keys: part.seen(&here, &keys),
                    bias: bias + (first - queries.start) * keys.len(),
                    block: keys.clone(),
                    queries: here,
                });
            }
            bias += queries.len() * keys.len();
            start = end;
        }
        check_biases(&part.lists, bias)?;
        part.pieces.retain(|piece| !piece.keys.is_empty());
        Ok(part)
    }

    pub(super) fn lists(&self) -> &BlockPart {
        &self.lists
    }

    pub(super) fn pieces(&self) -> &[Piece] {
        &self.pieces
    }

    pub(super) fn is_empty(&self) -> bool {
        self.lists.queries.rows.is_empty() || self.lists.keys.rows.is_empty()
    }

    /// Rows of some of the listed queries.
    pub(super) fn query_rows(&self, queries: &Range<usize>) -> &[u32] {
        &self.lists.queries.rows[queries.clone()]
    }

    /// Rows of some of the listed keys.
    pub(super) fn key_rows(&self, keys: &Range<usize>) -> &[u32] {
        &self.lists.keys.rows[keys.clone()]
    }

    /// Multiplications of a piece, on average.
    pub(super) fn work(&self, widths: usize) -> usize {
        let pairs: usize = self.pieces.iter().map(Piece::pairs).sum();
        (pairs / self.pieces.len().max(1) * widths / 8).max(1)
    }

    /// Multiplications of all pieces up to the end of each, about.
    pub(super) fn work_ends(&self, widths: usize) -> Vec<usize> {
        let work = self.pieces.iter().scan(0, |end, piece| {
            *end += (piece.pairs() * widths / 8).max(1);
            Some(*end)
        });
        work.collect()
    }

    /// The first and the last position that a query at `position` sees.
    #[inline(always)]
    fn bounds(&self, position: u32) -> [u32; 2] {
        let reach = self.lists.window.map_or(u32::MAX, |window| {
            u32::try_from(window).unwrap_or(u32::MAX).max(1) - 1
        });
        let last = match self.lists.causal {
            true => position,
            false => position.saturating_add(reach),
        };
        [position.saturating_sub(reach), last]
    }

    /// The least and the greatest position of some queries.
    fn extent(&self, queries: &Range<usize>) -> [u32; 2] {
        let positions = &self.lists.queries.positions[queries.clone()];
        let both = |[least, most]: [u32; 2], at: &u32| [least.min(*at), most.max(*at)];
        positions.iter().fold([u32::MAX, 0], both)
    }

    /// Those of `keys`, all of one block, that positions let any of `queries` see.
    pub(super) fn seen(&self, queries: &Range<usize>, keys: &Range<usize>) -> Range<usize> {
        if !self.ruled {
            return keys.clone();
        }
        let [least, most] = self.extent(queries);
        let (first, last) = (self.bounds(least)[0], self.bounds(most)[1]);
        let positions = &self.lists.keys.positions[keys.clone()];
        let start = positions.partition_point(|at| *at < first);
        let end = positions.partition_point(|at| *at <= last);
        keys.start + start..keys.start + end.max(start)
    }

    /// Whether positions leave every key to every query as it is.
    pub(super) fn all_seen(&self, queries: &Range<usize>, keys: &Range<usize>) -> bool {
        if !self.ruled || keys.is_empty() {
            return true;
        }
        let [least, most] = self.extent(queries);
        let positions = &self.lists.keys.positions;
        let (first, last) = (positions[keys.start], positions[keys.end - 1]);
        let met = self.lists.own != 0.0 && first <= most && last >= least;
        self.bounds(most)[0] <= first && last <= self.bounds(least)[1] && !met
    }

    /// Adds biases to the scores of a query and some of its piece's keys, and hides what it does not see;
    /// positions are looked at where they are asked for.
    #[inline(always)]
    pub(super) fn adjust<T: Real>(
        &self,
        piece: &Piece,
        query: usize,
        keys: &Range<usize>,
        by_position: bool,
        scores: &mut [T],
    ) {
        let lists = &self.lists;
        if !lists.key_bias.is_empty() {
            for (score, &bias) in scores.iter_mut().zip(&lists.key_bias[keys.clone()]) {
                *score += T::of(bias);
            }
        }
        if !lists.pair_bias.is_empty() {
            let row = piece.bias + (query - piece.queries.start) * piece.block.len();
            let biases = &lists.pair_bias[row + keys.start - piece.block.start..][..keys.len()];
            for (score, &bias) in scores.iter_mut().zip(biases) {
                *score += T::of(bias);
            }
        }
        if by_position {
            let position = lists.queries.positions[query];
            let ([first, last], own) = (self.bounds(position), T::of(lists.own));
            let positions = &lists.keys.positions[keys.clone()];
            for (score, &at) in scores.iter_mut().zip(positions) {
                let added = if at == position { own } else { T::zero() };
                let value = *score + added;
                *score = if (at < first) | (at > last) {
                    T::NEG_INFINITY
                } else {
                    value
                };
            }
        }
        if !lists.hidden.is_empty() {
            self.hide(query, keys, scores);
        }
    }

    fn hide<T: Real>(&self, query: usize, keys: &Range<usize>, scores: &mut [T]) {
        let hidden = &self.lists.hidden;
        let first = hidden.partition_point(|pair| (pair[0] as usize) < query);
        for &[of, key] in &hidden[first..] {
            if of as usize != query {
                break;
            }
            if keys.contains(&(key as usize)) {
                scores[key as usize - keys.start] = T::NEG_INFINITY;
            }
        }
    }

    /// Pairs of a query and a key that it sees.
    pub(super) fn pairs(&self) -> u64 {
        let lists = &self.lists;
        if lists.pair_bias.is_empty() && lists.key_bias.is_empty() && lists.hidden.is_empty() {
            return self
                .pieces
                .iter()
                .map(|piece| self.ruled_pairs(piece))
                .sum();
        }
        let mut pairs = 0;
        for piece in &self.pieces {
            let mut scores = vec![0f64; piece.keys.len()];
            for query in piece.queries.clone() {
                scores.fill(0.0);
                self.adjust(piece, query, &piece.keys, self.ruled, &mut scores);
                let seen = scores.iter().filter(|score| **score > f64::NEG_INFINITY);
                pairs += seen.count() as u64;
            }
        }
        pairs
    }

    /// Pairs of a piece that positions leave, by bisection.
    fn ruled_pairs(&self, piece: &Piece) -> u64 {
        if !self.ruled {
            return piece.pairs() as u64;
        }
        let mut pairs = 0;
        for query in piece.queries.clone() {
            let seen = self.seen(&(query..query + 1), &piece.keys);
            pairs += seen.len() as u64;
            if self.lists.own == f64::NEG_INFINITY {
                let position = self.lists.queries.positions[query];
                let positions = &self.lists.keys.positions[seen];
                let start = positions.partition_point(|at| *at < position);
                let end = positions.partition_point(|at| *at <= position);
                pairs -= (end - start) as u64;
            }
        }
        pairs
    }
}
