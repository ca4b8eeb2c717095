//! MRA (Zeng, Pal, Kline, Fung, Singh, Multi Resolution Analysis (MRA) for Approximate Self-Attention, 2022,
//! arXiv 2207.10284): most of the matrix of softmax attention in large blocks of one value, the important
//! blocks in smaller ones, down to single entries.
//!
//! ```text
//! Â = Σ_{(s, x, y) ∈ J} μ_{s,x,y} B^s_{x,y},    μ_{s,x,y} = exp(scale · q̃_x · k̃_y) ≤ mean of exp(scale · q_i · k_j)
//! y_i = Σ_{(s, x, y) ∈ J, i ∈ x} μ_{s,x,y} n_y ṽ_y / Σ_{(s, x, y) ∈ J, i ∈ x} μ_{s,x,y} n_y
//! ```
//!
//! `B^s_{x,y}` is 1 on the `x, y`-th block of `s` by `s` entries; `q̃`, `k̃`, `ṽ` are means of the real tokens
//! of a block and `n_y` their number. `J` tiles the matrix: it starts with all blocks of the largest of
//! `scales`, and at each of them the `per_row` times its number of rows with the largest `μ`, each divided by
//! the largest of its row, give way to their parts of the next scale. With `scales = [32, 1]` that is
//! MRA-2; `sparse` leaves out what was not refined (MRA-2-s), and a token whose row has no refined block
//! gets nothing. `diagonal` and `first` name blocks of the largest scale that are refined before all others. No
//! gradient passes through the choice. What a token gets at different scales is one softmax
//! ([`ResolutionAttention`]), so that no logit is too large; while decoding it is merged by the log-sums (`blocks.rs`).
//!
//! On an image blocks of the largest scale are tiles. Blocks are of real tokens, numbered from 0: pads are
//! not there.
//!
//! The causal form, which the paper does not have: blocks before the diagonal alone, `per_row` of each row
//! refined, that on the diagonal always; and the first query of a block stands for it, since a mean would be
//! of later ones too. Decoding keeps queries beside keys and values.
//!
//! Cost of a head of `n` tokens with blocks of `s`: `2 head_width` for each block that may be refined,
//! `(n / s)²` of the largest scale; for each block of `J`, and each of the `per_row s n` single entries,
//! `2 head_width + 2 value_width + 5`; means and merging. No parameters.

mod layout;
mod step;

pub use step::RefinedMemory;

use super::sequences::Sequences;
use super::{Abilities, Describe, Heads, Mechanism, MechanismPass, Memory, Resumed};
use crate::error::{bounded, tensor};
use crate::parameters::Parameters;
use crate::state::MixerState;
use crate::{Error, Result};
use lapidary_kernels::{ResolutionAttention, ResolutionOptions, Tensor};
use lapidary_signal::Mixing;
use layout::Layout;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

const MAX_SIZE: usize = 1 << 16;
const MAX_SCALES: usize = 16;
const MAX_PER_ROW: usize = 1 << 20;
const MAX_COLUMNS: usize = 1 << 16;

/// Attention in blocks of several sizes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MraSpec {
    /// Sides of blocks, each a divisor of the one before.
    pub scales: Vec<usize>,
    /// How many blocks of each scale but the last are refined, for each row of such blocks.
    pub per_row: Vec<usize>,
    /// Whether what is not refined is left out.
    #[serde(default)]
    pub sparse: bool,
    /// Width of a band around the diagonal, in blocks of the largest scale, that is refined first; 0 for
    /// none.
    #[serde(default)]
    pub diagonal: usize,
    /// First rows and columns of such blocks that are.
    #[serde(default)]
    pub first: usize,
    /// How blocks lie where the sequence is an image, row by row.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<Tiles>,
}

/// Tiles of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Tiles {
    /// Tokens of a row of the image.
    pub columns: usize,
    /// Height and width of a tile, whose tokens are a block of the largest scale.
    pub tile: [usize; 2],
}

impl MraSpec {
    /// Blocks of a side of `size` of which `per_row` in each row are refined to single entries.
    pub fn new(size: usize, per_row: usize) -> Self {
        Self {
            scales: vec![size, 1],
            per_row: vec![per_row],
            sparse: false,
            diagonal: 0,
            first: 0,
            image: None,
        }
    }

    fn validate_scales(&self, heads: &Heads, field: &str) -> Result<()> {
        let at = |name: &str| format!("{field}.{name}");
        let count = format!("number of {}", at("scales"));
        bounded(count, self.scales.len(), 2..=MAX_SCALES)?;
        let divide =
            |pair: &[usize]| matches!(pair, [a, b] if *b >= 1 && a > b && a.is_multiple_of(*b));
        let largest = self.scales.first().copied().unwrap_or(0);
        if largest > MAX_SIZE || !self.scales.windows(2).all(divide) {
            let expected =
                format!("falling numbers of at most {MAX_SIZE}, each a divisor of the one before");
            return Err(Error::spec(at("scales"), &self.scales, expected));
        }
        if heads.causal && self.scales.last() != Some(&1) {
            return Err(Error::spec(
                at("scales"),
                &self.scales,
                "numbers down to 1 in causal attention, whose diagonal is of single entries",
            ));
        }
        if self.per_row.len() + 1 != self.scales.len() {
            let expected = format!("{}, one less than scales", self.scales.len() - 1);
            let count = format!("number of {}", at("per_row"));
            return Err(Error::spec(count, self.per_row.len(), expected));
        }
        let least = usize::from(self.sparse || heads.causal);
        for &per_row in &self.per_row {
            bounded(at("per_row"), per_row, least..=MAX_PER_ROW)?;
        }
        Ok(())
    }
}

impl Describe for MraSpec {
    fn kind(&self) -> &'static str {
        "mra"
    }

    fn abilities(&self) -> Abilities {
        Abilities {
            causal: true,
            bidirectional: true,
            ..Abilities::default()
        }
    }

    fn validate(&self, heads: &Heads, field: &str) -> Result<()> {
        self.validate_scales(heads, field)?;
        bounded(format!("{field}.diagonal"), self.diagonal, 0..=MAX_SIZE)?;
        bounded(format!("{field}.first"), self.first, 0..=MAX_SIZE)?;
        if self.per_row.first() == Some(&0) {
            let first_refined = [("diagonal", self.diagonal), ("first", self.first)];
            if let Some((name, blocks)) = first_refined.into_iter().find(|(_, blocks)| *blocks > 0)
            {
                let expected = "0 where per_row begins with 0: no block is refined";
                return Err(Error::spec(format!("{field}.{name}"), blocks, expected));
            }
        }
        let Some(Tiles { columns, tile }) = self.image else {
            return Ok(());
        };
        let at = |name: &str| format!("{field}.image.{name}");
        if heads.causal {
            return Err(Error::spec(
                format!("{field}.image"),
                "given",
                "absent in causal attention: tiles are not in the order of tokens",
            ));
        }
        bounded(at("columns"), columns, 1..=MAX_COLUMNS)?;
        let [high, wide] = tile;
        let largest = self.scales.first().copied().unwrap_or(0);
        if high.checked_mul(wide) != Some(largest) || !columns.is_multiple_of(wide) {
            let expected = format!(
                "a height and a width that make {largest}, the largest scale, together, the width a \
                 divisor of {columns} columns"
            );
            return Err(Error::spec(at("tile"), tile, expected));
        }
        Ok(())
    }

    fn build(&self, heads: &Heads, _: Parameters<'_>) -> Result<Box<dyn Mechanism>> {
        Ok(Box::new(Mra {
            spec: self.clone(),
            options: ResolutionOptions {
                sizes: self.scales.clone(),
                per_row: self.per_row.clone(),
                sparse: self.sparse,
                causal: heads.causal,
                diagonal: self.diagonal,
                first: self.first,
                scale: heads.scale,
            },
        }))
    }
}

/// The module.
#[derive(Debug)]
struct Mra {
    spec: MraSpec,
    options: ResolutionOptions,
}

impl Mechanism for Mra {
    fn mixing(&self, q: &Tensor, k: &Tensor, pass: &MechanismPass<'_>) -> Result<Box<dyn Mixing>> {
        let (queries, keys) = (tensor(q.dim(2))?, tensor(k.dim(2))?);
        if queries != keys {
            return Err(Error::spec(
                format!("number of queries at {}", pass.path),
                queries,
                format!("{keys}, as keys: mra's blocks are of queries and keys alike"),
            ));
        }
        Ok(Box::new(self.among(q, k, pass)?))
    }

    fn memory(&self) -> Memory {
        Memory::Own
    }

    fn resume(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        state: &mut MixerState,
        pass: &MechanismPass<'_>,
    ) -> Result<Resumed> {
        match state {
            MixerState::Empty => {
                let mixing = self.mixing(q, k, pass)?;
                *state = MixerState::Refined(self.start([q, k, v], pass)?);
                Ok(Resumed::Kept {
                    mixing,
                    values: v.clone(),
                })
            }
            MixerState::Refined(memory) => self.follow([q, k, v], memory, pass),
            other => Err(Error::spec(
                format!("decode state at {}", pass.path),
                other.name(),
                "means of blocks",
            )),
        }
    }
}

impl Mra {
    /// Attention of all tokens.
    fn among(&self, q: &Tensor, k: &Tensor, pass: &MechanismPass<'_>) -> Result<Resolutions> {
        let layout = Layout::new(&self.spec, &Sequences::new(q, k, pass)?)?;
        let (q, k) = (layout.lay(q)?, layout.lay(k)?);
        let attention = ResolutionAttention::new([&q, &k], &layout.lengths, self.options.clone())?;
        Ok(Resolutions {
            q,
            k,
            layout,
            attention: Arc::new(attention),
        })
    }
}

/// One softmax over blocks of several scales.
#[derive(Debug)]
struct Resolutions {
    /// Queries and keys in their places, `[batch, heads, token, head_width]`.
    q: Tensor,
    k: Tensor,
    layout: Layout,
    attention: Arc<ResolutionAttention>,
}

impl Mixing for Resolutions {
    fn sizes(&self) -> [usize; 4] {
        self.layout.sizes
    }

    fn mix(&self, values: &Tensor) -> lapidary_kernels::Result<Tensor> {
        let values = self.layout.lay(values)?;
        let mixed = self.attention.output([&self.q, &self.k, &values])?;
        self.layout.unlay(&mixed)
    }

    fn operations(&self, width: usize) -> u64 {
        self.attention.operations(width)
    }
}
