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
//! gradient passes through the choice. What a token gets at different scales is merged by the log-sums
//! (`blocks.rs`), so that no logit is too large.
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
mod plan;
mod step;

pub use step::RefinedMemory;

use super::blocks::{Bias, Blocks, Meetings, Rule, merge, operations};
use super::sequences::{At, Sequences};
use super::{Abilities, Describe, Heads, Mechanism, MechanismPass, Memory, Resumed};
use crate::error::{bounded, tensor};
use crate::parameters::Parameters;
use crate::state::MixerState;
use crate::{Error, Result};
use lapidary_kernels::{BlockPart, Tensor};
use lapidary_signal::Mixing;
use layout::Layout;
use plan::{Plan, Refined, Scaled};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

const MAX_SIZE: usize = 1 << 16;
const MAX_SCALES: usize = 16;
const MAX_PER_ROW: usize = 1 << 20;
const MAX_COLUMNS: usize = 1 << 16;
/// Added to the logit of a block that is refined first.
const PRIOR: f64 = 5e3;

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
            causal: heads.causal,
            scale: heads.scale,
        }))
    }
}

/// The module.
#[derive(Debug)]
struct Mra {
    spec: MraSpec,
    causal: bool,
    scale: f64,
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
        let width = tensor(q.dim(3))?;
        let layout = Layout::new(&self.spec, &Sequences::new(q, k, pass)?)?;
        let scales = &self.spec.scales;
        let (q, k) = (layout.lay(q)?, layout.lay(k)?);
        let keys = layout.means(&k, scales)?;
        let queries = match self.causal {
            false => layout.means(&q, scales)?,
            true => scales
                .iter()
                .map(|&size| layout.firsts(&q, size))
                .collect::<lapidary_kernels::Result<Vec<_>>>()?,
        };
        let scaled = Scaled {
            q: &queries,
            k: &keys,
            scale: self.scale,
        };
        let plan = Plan::new(&self.spec, self.causal, &layout, &scaled)?;
        let mut parts = Vec::new();
        for (level, &size) in scales.iter().enumerate() {
            if self.spec.sparse && level + 1 < scales.len() {
                continue;
            }
            let refined = plan.levels.get(level);
            let (Some(q), Some(k)) = (queries.get(level), keys.get(level)) else {
                continue;
            };
            let all = match level
                .checked_sub(1)
                .and_then(|above| plan.levels.get(above))
            {
                None => vec![self.whole(&layout, size)],
                Some(above) => {
                    let coarse = scales.get(level - 1).copied().unwrap_or(size);
                    let at_once = self.spec.per_row.get(level - 1).copied().unwrap_or(1);
                    self.inside(&layout, above, [coarse, size], at_once.max(1))
                }
            };
            let all = all.into_iter();
            let all = all.map(|blocks| self.listed(&layout, (size, blocks), refined));
            let meetings = Meetings::new(all.collect(), (q, k), self.scale)?;
            parts.extend(meetings.map(|meetings| Scale {
                size,
                level,
                meetings,
            }));
        }
        // Means of queries and keys, and looking at blocks.
        let averaged = if self.causal { 1 } else { 2 };
        let before = averaged * summed(&layout, scales) * width + 2 * width * plan.considered;
        Ok(Resolutions {
            head_width: width,
            scales: scales.clone(),
            layout,
            parts,
            before: before as u64,
        })
    }

    /// All blocks of the largest scale.
    fn whole(&self, layout: &Layout, size: usize) -> Blocks {
        let mut blocks = Blocks::default();
        for of in 0..layout.count() {
            let all = layout.blocks(of, size);
            let at = |position: usize| At {
                row: layout.row(of, position, size),
                position,
            };
            // In causal attention no row has anything of its own block or later ones at this scale.
            let keys = if self.causal {
                all.saturating_sub(1)
            } else {
                all
            };
            blocks.push((0..all).map(at), (0..keys).map(at));
        }
        blocks
    }

    /// What refined blocks of one scale are made of at the next: `at_once` of a row in the first of some
    /// parts, and twice as many as before in each further one, so that rows with many do not make those
    /// with few as long.
    fn inside(
        &self,
        layout: &Layout,
        refined: &Refined,
        [coarse, size]: [usize; 2],
        at_once: usize,
    ) -> Vec<Blocks> {
        let each = coarse / size;
        let mut parts: Vec<Blocks> = Vec::new();
        for (&(of, x), keys) in &refined.by_row {
            let all = layout.blocks(of, size);
            let at = |position: usize| At {
                row: layout.row(of, position, size),
                position,
            };
            let within = |block: usize| block * each..all.min((block + 1) * each);
            let (mut rest, mut count, mut part) = (keys.as_slice(), at_once, 0);
            while !rest.is_empty() {
                let (here, further) = rest.split_at(count.min(rest.len()));
                if parts.len() == part {
                    parts.push(Blocks::default());
                }
                if let Some(blocks) = parts.get_mut(part) {
                    let keys = here.iter().flat_map(|&block| within(block));
                    blocks.push(within(x).map(at), keys.map(at));
                }
                (rest, count, part) = (further, 2 * count, part + 1);
            }
        }
        parts
    }

    /// Blocks of one scale, those left out that are refined further.
    fn listed(
        &self,
        layout: &Layout,
        (size, blocks): (usize, Blocks),
        refined: Option<&Refined>,
    ) -> BlockPart {
        let each = layout.slots / size;
        let count =
            |key: At| -> f64 { (layout.tokens(key.row / each, key.position, size) as f64).ln() };
        let none: &[usize] = &[];
        let further = |query: At| {
            let row = (query.row / each, query.position);
            let keys = refined.and_then(|refined| refined.by_row.get(&row));
            keys.map_or(none, Vec::as_slice)
        };
        let bias = match size {
            1 => Bias::default(),
            _ => Bias {
                of_key: Some(&count),
                hidden: Some(&further),
                ..Bias::default()
            },
        };
        let rule = Rule {
            causal: self.causal,
            // In causal attention a larger block has nothing of its own.
            own: match self.causal && size > 1 {
                true => f64::NEG_INFINITY,
                false => 0.0,
            },
            ..Rule::default()
        };
        blocks.listed(rule, bias)
    }
}

/// Tokens and blocks that are added up to make the means of all scales.
fn summed(layout: &Layout, scales: &[usize]) -> usize {
    let mut finer = 1;
    let mut all = 0;
    for &size in scales.iter().rev().filter(|size| **size > 1) {
        all += layout.count() * layout.slots / finer;
        finer = size;
    }
    all
}

/// Some of the blocks of one scale.
#[derive(Debug)]
struct Scale {
    size: usize,
    /// Which of the scales it is.
    level: usize,
    meetings: Meetings,
}

/// One softmax over blocks of several scales.
#[derive(Debug)]
struct Resolutions {
    head_width: usize,
    scales: Vec<usize>,
    layout: Layout,
    parts: Vec<Scale>,
    before: u64,
}

impl Resolutions {
    /// Rows of all slots.
    fn rows(&self) -> usize {
        self.layout.count() * self.layout.slots
    }
}

impl Mixing for Resolutions {
    fn sizes(&self) -> [usize; 4] {
        self.layout.sizes
    }

    fn mix(&self, values: &Tensor) -> lapidary_kernels::Result<Tensor> {
        let laid = self.layout.lay(values)?;
        let means = self.layout.means(&laid, &self.scales)?;
        let mut parts = Vec::with_capacity(self.parts.len());
        for scale in &self.parts {
            let values = means.get(scale.level).unwrap_or(&laid);
            // What blocks got, for each of their tokens.
            parts.push(scale.meetings.attended(values)?.repeated(scale.size));
        }
        self.layout.unlay(&merge(&parts, self.rows(), &laid)?)
    }

    fn operations(&self, width: usize) -> u64 {
        let parts = self.parts.iter().map(|scale| &scale.meetings);
        let means = summed(&self.layout, &self.scales) * width;
        self.before + means as u64 + operations(parts, self.rows(), [self.head_width, width])
    }
}
