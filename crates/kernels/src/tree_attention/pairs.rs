//! How tokens are apart, in pieces.

use super::NAME;
use crate::{Error, Result};
use std::ops::Range;

/// One side of a cut: tokens that the cut's vertex parts from those of the other side.
#[derive(Clone, Debug, PartialEq)]
pub struct TreeSide {
    pub(super) tokens: Vec<u32>,
    /// How far each is from the cut, rising.
    pub(super) distances: Vec<u32>,
    /// Whether each token is one step farther than the one before.
    pub(super) is_run: bool,
}

impl TreeSide {
    /// A side of tokens with their distances from the cut.
    pub fn new(mut tokens: Vec<(u32, u32)>) -> Self {
        tokens.sort_by_key(|(token, distance)| (*distance, *token));
        let (tokens, distances): (Vec<u32>, Vec<u32>) = tokens.into_iter().unzip();
        Self {
            // They rise: no difference is below 0.
            is_run: distances.windows(2).all(|pair| pair[1] - pair[0] == 1),
            tokens,
            distances,
        }
    }

    fn farthest(&self) -> usize {
        self.distances.last().map_or(0, |last| *last as usize)
    }
}

/// A part of all pairs of tokens.
#[derive(Clone, Debug, PartialEq)]
pub enum TreePiece {
    /// Tokens that meet each other and themselves.
    Leaf {
        /// Which.
        tokens: Vec<u32>,
        /// The distance of each pair, `[tokens, tokens]`; that of their places in `tokens` when absent.
        distances: Option<Vec<u32>>,
    },
    /// Tokens of either side meet those of the other, by way of what lies between.
    Cut([TreeSide; 2]),
}

/// The distance of all pairs of tokens: whole numbers, which are places in a table.
///
/// Every pair of two tokens is in one piece. A token may be in several leaves, in which it meets itself
/// again: as often as it stands in `again` less is counted.
#[derive(Clone, Debug, PartialEq)]
pub struct TreePairs {
    tokens: usize,
    distances: usize,
    pieces: Vec<TreePiece>,
    again: Vec<u32>,
}

impl TreePairs {
    /// Pairs of `tokens` tokens.
    ///
    /// # Errors
    /// When a piece has a token that there isn't, or no distance of a pair, or a distance that is no `u32`.
    pub fn new(tokens: usize, pieces: Vec<TreePiece>, again: Vec<u32>) -> Result<Self> {
        let known = |list: &[u32]| list.iter().all(|token| (*token as usize) < tokens);
        let expected = || format!("below {tokens}, the number of tokens");
        let mut distances = 1;
        for piece in &pieces {
            match piece {
                TreePiece::Leaf {
                    tokens: leaf,
                    distances: pairs,
                } => {
                    if !known(leaf) {
                        return Err(Error::argument(NAME, "token of a leaf", leaf, expected()));
                    }
                    let farthest = match pairs {
                        None => leaf.len().saturating_sub(1),
                        Some(pairs) if pairs.len() == leaf.len() * leaf.len() => {
                            pairs.iter().copied().max().unwrap_or(0) as usize
                        }
                        Some(pairs) => {
                            let expected = format!("{}, a pair each", leaf.len() * leaf.len());
                            let found = pairs.len();
                            return Err(Error::argument(NAME, "distances", found, expected));
                        }
                    };
                    distances = distances.max(farthest + 1);
                }
                TreePiece::Cut(sides) => {
                    if let Some(side) = sides.iter().find(|side| !known(&side.tokens)) {
                        let found = &side.tokens;
                        return Err(Error::argument(NAME, "token of a side", found, expected()));
                    }
                    let across = sides[0].farthest() + sides[1].farthest();
                    if across > u32::MAX as usize {
                        let expected = format!("at most {}", u32::MAX);
                        return Err(Error::argument(NAME, "distance", across, expected));
                    }
                    distances = distances.max(across + 1);
                }
            }
        }
        if !known(&again) {
            return Err(Error::argument(NAME, "again", again, expected()));
        }
        Ok(Self {
            tokens,
            distances,
            pieces,
            again,
        })
    }

    /// The pairs of the first `tokens` tokens, or of all where there are fewer.
    pub fn first(&self, tokens: usize) -> Self {
        let is_kept = |token: u32| (token as usize) < tokens;
        let pieces = self.pieces.iter().filter_map(|piece| match piece {
            TreePiece::Leaf { tokens, distances } => {
                let places = 0..tokens.len();
                let kept: Vec<usize> = places.filter(|at| is_kept(tokens[*at])).collect();
                let is_run = kept.windows(2).all(|pair| pair[1] == pair[0] + 1);
                let apart = |i: usize, j: usize| match distances {
                    None => i.abs_diff(j) as u32,
                    Some(pairs) => pairs[i * tokens.len() + j],
                };
                let listed = distances.is_some() || !is_run;
                let pairs = kept.iter().flat_map(|i| kept.iter().map(move |j| (*i, *j)));
                (!kept.is_empty()).then(|| TreePiece::Leaf {
                    tokens: kept.iter().map(|at| tokens[*at]).collect(),
                    distances: listed.then(|| pairs.map(|(i, j)| apart(i, j)).collect()),
                })
            }
            TreePiece::Cut(sides) => {
                let sides = sides.each_ref().map(|side| {
                    let each = side.tokens.iter().copied();
                    let each = each.zip(side.distances.iter().copied());
                    TreeSide::new(each.filter(|(token, _)| is_kept(*token)).collect())
                });
                let is_empty = sides.iter().any(|side| side.tokens.is_empty());
                (!is_empty).then_some(TreePiece::Cut(sides))
            }
        });
        let again = self.again.iter().copied();
        Self {
            tokens: self.tokens.min(tokens),
            distances: self.distances,
            pieces: pieces.collect(),
            again: again.filter(|token| is_kept(*token)).collect(),
        }
    }

    /// How many tokens there are.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// One more than the longest distance.
    pub fn distances(&self) -> usize {
        self.distances
    }

    pub(super) fn pieces(&self) -> &[TreePiece] {
        &self.pieces
    }

    pub(super) fn again(&self) -> &[u32] {
        &self.again
    }

    /// The distance of every pair, `[tokens, tokens]`: for small numbers of tokens.
    pub fn table(&self) -> Vec<u32> {
        let mut table = vec![0; self.tokens * self.tokens];
        let mut put = |i: u32, j: u32, distance: u32| {
            table[i as usize * self.tokens + j as usize] = distance;
        };
        for piece in &self.pieces {
            match piece {
                TreePiece::Leaf { tokens, distances } => {
                    for (row, i) in tokens.iter().enumerate() {
                        for (column, j) in tokens.iter().enumerate() {
                            let distance = match distances {
                                None => row.abs_diff(column) as u32,
                                Some(pairs) => pairs[row * tokens.len() + column],
                            };
                            put(*i, *j, distance);
                        }
                    }
                }
                TreePiece::Cut([left, right]) => {
                    for (i, x) in left.tokens.iter().zip(&left.distances) {
                        for (j, y) in right.tokens.iter().zip(&right.distances) {
                            put(*i, *j, x + y);
                            put(*j, *i, x + y);
                        }
                    }
                }
            }
        }
        table
    }
}

/// Tokens that ask and tokens that are asked, and how far each pair is apart.
#[derive(Clone, Copy)]
pub(super) struct Meeting<'a> {
    pub(super) rows: &'a [u32],
    pub(super) columns: &'a [u32],
    pub(super) apart: Apart<'a>,
}

#[derive(Clone, Copy)]
pub(super) enum Apart<'a> {
    /// As their places are.
    Run,
    /// `[rows, columns]`.
    Listed(&'a [u32]),
    /// Both distances from a cut.
    Across {
        rows: &'a [u32],
        columns: &'a [u32],
        is_run: bool,
    },
}

/// Where the factors of some columns of one row are in a table that is mirrored about distance 0.
pub(super) enum Factors<'a> {
    /// From there on.
    Run(usize),
    /// At each of these, so many farther.
    Listed(usize, &'a [u32]),
}

impl<'a> Meeting<'a> {
    pub(super) fn leaf(tokens: &'a [u32], distances: Option<&'a [u32]>) -> Self {
        Self {
            rows: tokens,
            columns: tokens,
            apart: distances.map_or(Apart::Run, Apart::Listed),
        }
    }

    pub(super) fn across(
        (rows, row_range): (&'a TreeSide, Range<usize>),
        (columns, column_range): (&'a TreeSide, Range<usize>),
    ) -> Self {
        Self {
            rows: &rows.tokens[row_range.clone()],
            columns: &columns.tokens[column_range.clone()],
            apart: Apart::Across {
                rows: &rows.distances[row_range],
                columns: &columns.distances[column_range],
                is_run: columns.is_run,
            },
        }
    }

    /// Those of a row, where distance 0 is at `centre`.
    #[inline(always)]
    pub(super) fn factors(&self, row: usize, columns: Range<usize>, centre: usize) -> Factors<'a> {
        match self.apart {
            Apart::Run => Factors::Run(centre + columns.start - row),
            Apart::Listed(pairs) => {
                let start = row * self.columns.len();
                let listed = &pairs[start + columns.start..start + columns.end];
                Factors::Listed(centre, listed)
            }
            Apart::Across {
                rows,
                columns: across,
                is_run,
            } => {
                let near = centre + rows[row] as usize;
                match is_run {
                    true => Factors::Run(near + across[columns.start] as usize),
                    false => Factors::Listed(near, &across[columns]),
                }
            }
        }
    }
}
