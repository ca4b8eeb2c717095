//! The blocks of one size of one head, tile by tile.

use super::ResolutionOptions;
use super::choice::{Chosen, Lists};
use crate::product::{Matrix, Repeated};
use crate::simd::Real;
use std::ops::Range;

/// Rows of a tile.
pub(super) const ROWS: usize = 32;
/// Most columns of a tile.
pub(super) const KEYS: usize = 4 * Repeated::<f32>::COLUMNS;
/// Most keys that lie in panels of their own.
const PIECE: usize = 2 * Repeated::<f32>::COLUMNS;

/// Blocks of one size: those that larger ones gave way to, but for those that give way to smaller ones.
pub(super) struct Level<'a, T> {
    /// Which of the sizes it is.
    pub(super) number: usize,
    pub(super) size: usize,
    /// Blocks of rows, and of keys.
    pub(super) blocks: usize,
    /// How many of these make a larger one; all at the largest size.
    pub(super) each: usize,
    /// Whether rows meet them.
    pub(super) shown: bool,
    /// The larger ones that gave way; all at the largest size.
    larger: Option<&'a Lists>,
    /// Those that give way.
    hidden: Option<&'a Lists>,
    /// `ln n` of the rows of each block; nothing where blocks are single.
    counts: Vec<T>,
    causal: bool,
}

/// Keys of a tile that lie side by side.
pub(super) struct Piece {
    /// Which of [`Level::panels`] holds them.
    pub(super) number: usize,
    pub(super) keys: Range<usize>,
    /// The first column of the tile that is theirs.
    pub(super) column: usize,
}

impl<'a, T: Real> Level<'a, T> {
    /// One for each size, from the largest on.
    pub(super) fn all(options: &ResolutionOptions, chosen: &'a Chosen) -> Vec<Self> {
        let last = options.per_row.len();
        let length = chosen.length;
        let level = |(number, &size): (usize, &usize)| {
            let blocks = length.div_ceil(size);
            let before = number.checked_sub(1);
            let rows = |block: usize| size.min(length - block * size) as f64;
            let counts = 0..if size > 1 { blocks } else { 0 };
            Self {
                number,
                size,
                blocks,
                each: before.map_or(blocks.max(1), |before| options.sizes[before] / size),
                shown: number == last || !options.sparse,
                larger: before.and_then(|before| chosen.refined.get(before)),
                hidden: chosen.refined.get(number),
                counts: counts.map(|block| T::of(rows(block).ln())).collect(),
                causal: options.causal,
            }
        };
        options.sizes.iter().enumerate().map(level).collect()
    }

    /// The blocks that any row of a larger block may meet, in larger ones.
    fn met(&self, larger: usize) -> &[u32] {
        self.larger.map_or(&[0], |lists| lists.of(larger))
    }

    /// The blocks of which a larger one is made.
    fn within(&self, larger: usize) -> Range<usize> {
        larger * self.each..self.blocks.min((larger + 1) * self.each)
    }

    /// Where the keys end that a row may see: those before it, and itself where it is single.
    #[inline(always)]
    fn end(&self, row: usize) -> usize {
        match (self.causal, self.size) {
            (false, _) => self.blocks,
            (true, 1) => row + 1,
            (true, _) => row,
        }
    }

    fn pieces(&self, larger: usize) -> impl Iterator<Item = Range<usize>> + use<T> {
        let all = self.within(larger);
        let end = all.end;
        all.step_by(PIECE)
            .map(move |start| start..end.min(start + PIECE))
    }

    /// Whether any two blocks meet.
    pub(super) fn is_met(&self) -> bool {
        let any = match self.larger {
            None => self.blocks > usize::from(self.causal && self.size > 1),
            Some(lists) => !lists.is_empty(),
        };
        self.shown && any
    }

    /// Pairs of blocks that meet.
    pub(super) fn pairs(&self) -> u64 {
        let mut pairs = 0;
        for row in (0..self.blocks).filter(|_| self.shown) {
            let end = self.end(row);
            for &larger in self.met(row / self.each) {
                let keys = self.within(larger as usize);
                pairs += keys.end.min(end).saturating_sub(keys.start);
            }
            let hidden = self.hidden.map_or(&[][..], |lists| lists.of(row));
            pairs -= hidden.partition_point(|key| (*key as usize) < end);
        }
        pairs as u64
    }

    /// Keys or values `[blocks, width]`, transposed, as products with the rows of tiles read them.
    pub(super) fn panels<'b>(&self, x: Matrix<'b, T>) -> Vec<Repeated<'b, T>> {
        let larger = 0..self.blocks.div_ceil(self.each);
        let pieces = larger.flat_map(|larger| self.pieces(larger));
        pieces
            .map(|keys| Repeated::new(x.part_of_rows(&keys).transposed(), self.each))
            .collect()
    }

    /// Calls `tile` on some rows and the keys that they meet, with the number of these.
    pub(super) fn walk(&self, mut tile: impl FnMut(&Range<usize>, &[Piece], usize)) {
        let each = self.each.div_ceil(PIECE);
        for larger in 0..self.blocks.div_ceil(self.each) {
            let all = self.within(larger);
            for start in all.clone().step_by(ROWS) {
                let rows = start..all.end.min(start + ROWS);
                let end = self.end(rows.end - 1);
                let (mut pieces, mut columns) = (Vec::new(), 0);
                for &met in self.met(larger) {
                    for (number, keys) in (met as usize * each..).zip(self.pieces(met as usize)) {
                        let keys = keys.start..keys.end.min(end);
                        if keys.is_empty() {
                            continue;
                        }
                        if columns + keys.len() > KEYS {
                            tile(&rows, &pieces, columns);
                            pieces.clear();
                            columns = 0;
                        }
                        let column = columns;
                        columns += keys.len();
                        pieces.push(Piece {
                            number,
                            keys,
                            column,
                        });
                    }
                }
                if columns > 0 {
                    tile(&rows, &pieces, columns);
                }
            }
        }
    }

    /// Adds to the scores of a row what keys stand for, and hides what it does not see.
    #[inline(always)]
    pub(super) fn adjust(&self, row: usize, pieces: &[Piece], scores: &mut [T]) {
        for Piece { keys, column, .. } in pieces {
            let scores = &mut scores[*column..*column + keys.len()];
            if let Some(counts) = self.counts.get(keys.clone()) {
                for (score, count) in scores.iter_mut().zip(counts) {
                    *score += *count;
                }
            }
            let end = self.end(row);
            if end < keys.end {
                scores[end.saturating_sub(keys.start)..].fill(T::NEG_INFINITY);
            }
            let Some(hidden) = self.hidden else {
                continue;
            };
            let hidden = hidden.of(row);
            let first = hidden.partition_point(|key| (*key as usize) < keys.start);
            for key in &hidden[first..] {
                match scores.get_mut(*key as usize - keys.start) {
                    Some(score) => *score = T::NEG_INFINITY,
                    None => break,
                }
            }
        }
    }
}
