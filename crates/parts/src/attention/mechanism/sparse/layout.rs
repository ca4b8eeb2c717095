//! A pattern of blocks that is written out: which blocks of queries meet which blocks of keys, head by
//! head (the contract of the kernels of Gray, Radford, Kingma, GPU Kernels for Block-Sparse Weights, 2017,
//! by which Child et al., arXiv 1904.10509, compute their patterns).

use super::super::blocks::Blocks;
use super::super::sequences::{At, Sequence};
use crate::error::bounded;
use crate::{Error, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Tokens of a block.
const SIZES: [usize; 4] = [8, 16, 32, 64];
/// Most blocks of a sequence.
const MAX_BLOCKS: usize = 1 << 10;
const NOTHING: u8 = b'.';
const ALL: u8 = b'#';

/// Blocks of queries and the blocks of keys that they meet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BlockLayout {
    /// Tokens of a block: 8, 16, 32 or 64.
    pub block: usize,
    /// For each head, or once for all of them, a row for each block of queries with a character for each
    /// block of keys up to its own: `.` where they do not meet, `#` where they do, and a letter where they
    /// meet by that mask.
    pub heads: Vec<Vec<String>>,
    /// Masks of single blocks by letter, `a` to `z`: a row for each query of a block with a character for
    /// each key, `#` = seen, `.` = not. Later keys are not seen whatever a mask says.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub masks: BTreeMap<String, Vec<String>>,
}

impl BlockLayout {
    pub(super) fn validate(&self, heads: usize, field: &str) -> Result<()> {
        if !SIZES.contains(&self.block) {
            let field = format!("{field}.block");
            return Err(Error::spec(field, self.block, "8, 16, 32 or 64"));
        }
        if self.heads.len() != 1 && self.heads.len() != heads {
            return Err(Error::spec(
                format!("{field}.heads"),
                self.heads.len(),
                format!("the layout of one head, for all, or of {heads}"),
            ));
        }
        for (letter, rows) in &self.masks {
            let field = format!("{field}.masks.{letter}");
            if !matches!(letter.as_bytes(), [b'a'..=b'z']) {
                return Err(Error::spec(field, "a mask", "named by one letter, a to z"));
            }
            let fits = |row: &String| {
                row.len() == self.block && row.bytes().all(|mark| [NOTHING, ALL].contains(&mark))
            };
            if rows.len() != self.block || !rows.iter().all(fits) {
                let expected = format!("{0} rows of {0} characters, . or #", self.block);
                return Err(Error::spec(field, rows.join(" "), expected));
            }
        }
        for (head, rows) in self.heads.iter().enumerate() {
            let field = format!("{field}.heads.{head}");
            bounded(field.clone(), rows.len(), 1..=MAX_BLOCKS)?;
            for (row, marks) in rows.iter().enumerate() {
                let known = |mark: u8| {
                    [NOTHING, ALL].contains(&mark)
                        || self
                            .masks
                            .contains_key(char::from(mark).to_string().as_str())
                };
                if marks.len() != row + 1 || !marks.bytes().all(known) {
                    return Err(Error::spec(
                        format!("{field}.{row}"),
                        marks,
                        format!(
                            "{} of the characters ., # and the letters of masks",
                            row + 1
                        ),
                    ));
                }
            }
        }
        for letter in self.masks.keys() {
            let mut rows = self.heads.iter().flatten();
            if !rows.any(|row| row.contains(letter.as_str())) {
                let field = format!("{field}.masks.{letter}");
                return Err(Error::spec(field, "given", "named in a row of heads"));
            }
        }
        Ok(())
    }

    fn rows(&self, head: usize) -> &[String] {
        let rows = self.heads.get(head).or(self.heads.first());
        rows.map_or(&[], Vec::as_slice)
    }

    /// Most tokens of a sequence.
    pub(super) fn tokens(&self) -> usize {
        let rows = self.heads.iter().map(Vec::len).min();
        rows.unwrap_or(0) * self.block
    }

    /// Refuses a sequence with more tokens than the layout says anything of.
    pub(super) fn holds(&self, longest: usize, path: &str) -> Result<()> {
        if longest > self.tokens() {
            return Err(Error::spec(
                format!("number of tokens at {path}"),
                longest,
                format!("at most {}, those of the layout", self.tokens()),
            ));
        }
        Ok(())
    }

    /// The blocks of keys that a row meets.
    fn columns(&self, head: usize, row: usize) -> impl Iterator<Item = usize> + '_ {
        let marks = self.rows(head).get(row).map_or("", String::as_str);
        let marks = marks.bytes().enumerate();
        marks.filter_map(|(column, mark)| (mark != NOTHING).then_some(column))
    }

    /// Whether a mask is used at all.
    pub(super) fn is_masked(&self) -> bool {
        let mut marks = self.heads.iter().flatten().flat_map(|row| row.bytes());
        marks.any(|mark| ![NOTHING, ALL].contains(&mark))
    }

    /// Whether a block's mask leaves a key for a query, both of which stand in blocks that meet.
    pub(super) fn sees(&self, head: usize, query: usize, key: usize) -> bool {
        let (row, column) = (query / self.block, key / self.block);
        let row = self.rows(head).get(row);
        let mark = row.and_then(|row| row.as_bytes().get(column)).copied();
        match mark {
            None | Some(NOTHING) => false,
            Some(ALL) => true,
            Some(letter) => {
                let mask = self.masks.get(char::from(letter).to_string().as_str());
                let line = mask.and_then(|mask| mask.get(query % self.block));
                line.is_some_and(|line| line.as_bytes().get(key % self.block) == Some(&ALL))
            }
        }
    }

    /// Whether a head sees the block of `token` from `next` on.
    pub(super) fn keeps(&self, head: usize, token: usize, next: usize) -> bool {
        let column = token / self.block;
        let rows = self.rows(head).iter().skip(next / self.block);
        let mut marks = rows.filter_map(|row| row.as_bytes().get(column));
        marks.any(|mark| *mark != NOTHING)
    }

    /// Adds the blocks of a sequence to those of rows that meet about as many: up to one block of keys, up
    /// to two, up to four, …, so that none is laid out much longer than it is.
    pub(super) fn meet(&self, sequence: &Sequence<'_>, parts: &mut Vec<Blocks>) {
        let (queries, length) = (sequence.queries(), sequence.len());
        if queries.is_empty() {
            return;
        }
        for row in queries.start / self.block..length.div_ceil(self.block) {
            let of = (row * self.block).max(queries.start)..length.min((row + 1) * self.block);
            let over: Vec<At> = self
                .columns(sequence.head, row)
                .flat_map(|column| column * self.block..length.min((column + 1) * self.block))
                .map(|token| sequence.key(token))
                .collect();
            let blocks = over.len().div_ceil(self.block).max(1);
            let part = blocks.next_power_of_two().ilog2() as usize;
            if parts.len() <= part {
                parts.resize_with(part + 1, Blocks::default);
            }
            if let Some(part) = parts.get_mut(part) {
                part.push(of.map(|token| sequence.query(token)), over);
            }
        }
    }
}
