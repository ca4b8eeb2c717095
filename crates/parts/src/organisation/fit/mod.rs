//! FIT (Chen & Li, FIT: Far-reaching Interleaved Transformers, 2023, arXiv 2305.12689): data tokens
//! lie in groups that local blocks see one by one; each group owns a few latent tokens, which read
//! from it, meet the latents of all groups in global blocks, and write back.
//!
//! ```text
//! for each stage (a)g of the layout:
//!     x ← local blocks, a of them, on each group of n tokens
//!     if g > 0:
//!         z ← z + A(q = N z, kv = N x)              read, within the group
//!         z ← global blocks, g of them, on all t · m latents
//!         x ← x + A(q = N x, kv = N z)              write, within the group; not in the last stage
//! ```
//!
//! A group's positions are a table that all groups share; which group it is, only its latents know.
//!
//! Where the local blocks are causal the whole is: latents see those of their own and of earlier
//! groups, and what is written into a group are the latents of the group before it (zeros for the
//! first), so that no token hears of later ones of its own group by way of the latents. Reading and
//! writing have the width of the narrower side, and the fewer heads.
//!
//! Cost of `t` groups of `n`: `t n²` pairs of a query and a key for each local block, `(t m)²` for
//! each global one (about half when causal), `t n m` for each read and each write. With few latents
//! and `n = L^⅓` that is `O(L^{4/3})` for `L = t n` tokens. Parameters beside the blocks: `n width`
//! and `t m latent_width` for the tables, `4 · narrower · (width + latent_width) / 2` and two norms
//! for each read and write.

mod decode;
pub mod denoiser;
mod exchange;
pub mod layout;
mod network;
mod tables;

pub use decode::GroupMemory;
pub use network::Fit;

use super::Surroundings;
use crate::attention::{MixerSpec, MultiHeadSpec};
use crate::block::BlockSpec;
use crate::error::bounded;
use crate::feedforward::FeedforwardSpec;
use crate::position::PositionSpec;
use crate::{Error, Result};
use layout::Stage;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

const MAX_LENGTH: usize = 1 << 24;
const MAX_WIDTH: usize = 1 << 17;
const MAX_GROUP: usize = 1 << 16;
const MAX_LATENTS: usize = 1 << 12;
const MAX_CONDITION: usize = 1 << 12;

/// Local blocks on groups, global ones on latents. The model's blocks are the local ones, in order.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FitSpec {
    /// How many local and global blocks follow each other: `(2)4(2)`.
    pub layout: String,
    /// Tokens `n` of a group.
    pub group: usize,
    /// Groups `t` that there are latents for; a shorter input uses the first of them.
    pub groups: usize,
    /// Latents `m` of a group.
    #[serde(default)]
    pub latents: usize,
    /// Features of a latent; the model's width when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub width: Option<usize>,
    /// The global blocks, all alike.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub block: Option<Box<BlockSpec>>,
    /// Heads of reading and writing; the fewer of a local and a global block's when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exchange_heads: Option<usize>,
    /// What transforms a latent after it has read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub read_feedforward: Option<FeedforwardSpec>,
    /// Positions within a group.
    #[serde(default)]
    pub positions: GroupPositions,
    /// What tells one group's latents from another's.
    #[serde(default)]
    pub latent_positions: LatentPositions,
    /// Groups are tiles of a grid of tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tiles: Option<Tiles>,
    /// Tokens of the memory that each group has before its own, told what they are by a norm of a
    /// linear map: the memory has so many for every group of the input.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub condition: usize,
    /// What comes out.
    #[serde(default)]
    pub output: FitOutput,
}

#[allow(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde asks for a reference"
)]
fn is_zero(count: &usize) -> bool {
    *count == 0
}

/// Positions within a group, added to the embeddings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum GroupPositions {
    /// A learned table `[n, width]`.
    #[default]
    Learned,
    /// Sines and cosines of the place.
    Sinusoidal,
    /// Sines and cosines of row and column: of the tile, or of `√n · √n` tokens.
    Grid,
}

/// Where latents start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum LatentPositions {
    /// A learned table `[t · m, latent_width]`.
    #[default]
    Learned,
    /// Sines and cosines of the place among all latents.
    Sinusoidal,
}

/// Tiles of `height · width` tokens of a grid that is given row by row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Tiles {
    /// Columns of the whole grid.
    pub columns: usize,
    /// Rows of a tile.
    pub height: usize,
    /// Columns of a tile.
    pub width: usize,
}

/// What comes out of the blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum FitOutput {
    /// The data tokens.
    #[default]
    Tokens,
    /// The latents, `[batch, groups · latents, width]`.
    Latents,
}

impl FitSpec {
    /// The layout's stages.
    ///
    /// # Errors
    /// When it is no layout.
    pub fn stages(&self) -> Result<Vec<Stage>> {
        layout::parse(&self.layout, "organisation.layout")
    }

    /// Global blocks, and reads and writes.
    pub(super) fn counts(&self) -> (usize, usize) {
        let stages = self.stages().unwrap_or_default();
        let globals = stages.iter().map(|stage| stage.global).sum();
        let reads = stages.iter().filter(|stage| stage.global > 0).count();
        (globals, 2 * reads)
    }

    /// Features of a latent, in a model of `width`.
    pub fn latent_width(&self, width: usize) -> usize {
        self.width.unwrap_or(width)
    }

    /// What reads and writes: attention of the narrower width with the fewer heads.
    pub(super) fn exchange(&self, model: &Surroundings<'_>) -> MultiHeadSpec {
        let own = self.block.as_deref();
        let heads = model.blocks.iter().chain(own).filter_map(heads_of).min();
        let heads = self.exchange_heads.or(heads).unwrap_or(1).max(1);
        let narrower = model.width.min(self.latent_width(model.width));
        MultiHeadSpec {
            head_width: Some(narrower / heads),
            ..MultiHeadSpec::new(heads)
        }
    }

    /// Whether tokens are kept from seeing later ones: whether the blocks are causal.
    pub fn is_causal(blocks: &[BlockSpec]) -> bool {
        blocks
            .iter()
            .any(|block| block.attention != MixerSpec::Absent && block.attention.is_causal())
    }

    pub(super) fn validate(&self, model: &Surroundings<'_>, field: &str) -> Result<()> {
        let at = |name: &str| format!("{field}.{name}");
        let stages = layout::parse(&self.layout, &at("layout"))?;
        bounded(at("group"), self.group, 1..=MAX_GROUP)?;
        let most = MAX_LENGTH / self.group;
        bounded(at("groups"), self.groups, 1..=most)?;
        bounded(at("condition"), self.condition, 0..=MAX_CONDITION)?;
        let needed = model.length.div_ceil(self.group);
        if self.groups < needed {
            let expected = format!(
                "at least {needed}, the groups of {} in the input's {} tokens",
                self.group, model.length
            );
            return Err(Error::spec(at("groups"), self.groups, expected));
        }
        let locals: usize = stages.iter().map(|stage| stage.local).sum();
        if locals != model.blocks.len() {
            let expected = format!(
                "one with {} local layers, a block of the model for each",
                model.blocks.len()
            );
            return Err(Error::spec(at("layout"), &self.layout, expected));
        }
        self.validate_blocks(model)?;
        let globals: usize = stages.iter().map(|stage| stage.global).sum();
        self.validate_latents(globals, model, field)?;
        self.validate_positions(model, field)?;
        self.validate_output(globals, model, field)
    }

    fn validate_blocks(&self, model: &Surroundings<'_>) -> Result<()> {
        let causal = Self::is_causal(model.blocks);
        for (index, block) in model.blocks.iter().enumerate() {
            if block.cross_attention.is_some() {
                return Err(Error::spec(
                    format!("blocks.{index}.cross_attention"),
                    "given",
                    "absent in an interleaved organisation, whose blocks see groups",
                ));
            }
            if block.attention != MixerSpec::Absent && block.attention.is_causal() != causal {
                return Err(Error::spec(
                    format!("blocks.{index}.attention"),
                    "bidirectional beside causal blocks",
                    "causal in all local blocks or in none",
                ));
            }
        }
        Ok(())
    }

    fn validate_latents(
        &self,
        globals: usize,
        model: &Surroundings<'_>,
        field: &str,
    ) -> Result<()> {
        let at = |name: &str| format!("{field}.{name}");
        let Some(block) = self.block.as_deref().filter(|_| globals > 0) else {
            if globals > 0 {
                let expected = "a block: the layout has global layers";
                return Err(Error::spec(at("block"), "absent", expected));
            }
            let without = "the layout has no global layers";
            if self.latents > 0 {
                return Err(Error::spec(
                    at("latents"),
                    self.latents,
                    format!("0: {without}"),
                ));
            }
            let own_start = self.latent_positions != LatentPositions::default();
            let given = [
                ("block", self.block.is_some()),
                ("read_feedforward", self.read_feedforward.is_some()),
                ("exchange_heads", self.exchange_heads.is_some()),
                ("width", self.width.is_some()),
                ("latent_positions", own_start),
            ];
            if let Some((name, _)) = given.iter().find(|(_, given)| *given) {
                return Err(Error::spec(at(name), "given", format!("absent: {without}")));
            }
            return Ok(());
        };
        let most = (MAX_LENGTH / self.groups).clamp(1, MAX_LATENTS);
        bounded(at("latents"), self.latents, 1..=most)?;
        let width = self.latent_width(model.width);
        bounded(at("width"), width, 1..=MAX_WIDTH)?;
        block.validate(width, &at("block"))?;
        if block.repeat != 1 {
            let expected = "1: the layout says how many there are";
            return Err(Error::spec(at("block.repeat"), block.repeat, expected));
        }
        if block.shared {
            let expected = "false: each global layer has weights of its own";
            return Err(Error::spec(at("block.shared"), true, expected));
        }
        if block.cross_attention.is_some() {
            let expected = "absent: latents read by themselves";
            return Err(Error::spec(at("block.cross_attention"), "given", expected));
        }
        self.validate_direction(block, model, field)?;
        if let Some(feedforward) = &self.read_feedforward {
            feedforward.validate(&at("read_feedforward"))?;
        }
        let narrower = width.min(model.width);
        let heads = self.exchange(model).heads;
        if self.exchange_heads == Some(0) || !narrower.is_multiple_of(heads) {
            let expected = format!("a divisor of {narrower}, the narrower width");
            let found = self.exchange_heads.unwrap_or(heads);
            return Err(Error::spec(at("exchange_heads"), found, expected));
        }
        Ok(())
    }

    /// The global block looks back exactly where the local ones do.
    fn validate_direction(
        &self,
        block: &BlockSpec,
        model: &Surroundings<'_>,
        field: &str,
    ) -> Result<()> {
        let refuse = |name: &str, found: &str, expected: &str| {
            Err(Error::spec(
                format!("{field}.block.{name}"),
                found,
                expected,
            ))
        };
        let causal = Self::is_causal(model.blocks);
        let attention = match &block.attention {
            MixerSpec::MultiHead(attention) => attention,
            MixerSpec::Absent => {
                return refuse("attention.kind", "absent", "a mixer of latents");
            }
            other => match other.is_causal() {
                // A recurrence goes from latent to latent, not from group to group.
                true => {
                    return refuse(
                        "attention.kind",
                        other.kind(),
                        "multi-head, whose mask can be one of groups",
                    );
                }
                false if causal => {
                    return refuse("attention.kind", other.kind(), "causal multi-head");
                }
                false => return Ok(()),
            },
        };
        if attention.causal != causal {
            let expected = format!("{causal}, as in the local blocks");
            return Err(Error::spec(
                format!("{field}.block.attention.causal"),
                attention.causal,
                expected,
            ));
        }
        if !causal {
            return Ok(());
        }
        if !attention.mechanism.is_softmax() {
            let expected = "softmax, whose mask can be one of groups";
            return refuse("attention.mechanism", attention.mechanism.kind(), expected);
        }
        if attention.position != PositionSpec::None {
            let expected = "none where latents see groups";
            return refuse(
                "attention.position.kind",
                attention.position.kind(),
                expected,
            );
        }
        if attention.window.is_some() || attention.dropout > 0.0 {
            return refuse(
                "attention",
                "with a window or dropout of weights",
                "without either where latents see groups",
            );
        }
        Ok(())
    }

    fn validate_positions(&self, model: &Surroundings<'_>, field: &str) -> Result<()> {
        let at = |name: &str| format!("{field}.{name}");
        let root = self.group.isqrt();
        match self.positions {
            GroupPositions::Learned => {}
            GroupPositions::Sinusoidal if model.width.is_multiple_of(2) => {}
            GroupPositions::Sinusoidal => {
                let expected = "even for sinusoidal positions";
                return Err(Error::spec("width", model.width, expected));
            }
            GroupPositions::Grid if !model.width.is_multiple_of(4) => {
                let expected = "a multiple of 4 for positions on a grid";
                return Err(Error::spec("width", model.width, expected));
            }
            GroupPositions::Grid if self.tiles.is_none() && root * root != self.group => {
                let expected = "a square for positions on a grid, or tiles must be given";
                return Err(Error::spec(at("group"), self.group, expected));
            }
            GroupPositions::Grid => {}
        }
        let width = self.latent_width(model.width);
        if self.latent_positions == LatentPositions::Sinusoidal && !width.is_multiple_of(2) {
            let expected = "even for sinusoidal latents";
            return Err(Error::spec(at("width"), width, expected));
        }
        let Some(tiles) = self.tiles else {
            return Ok(());
        };
        if Self::is_causal(model.blocks) {
            let expected = "absent in a causal model, whose tokens have one order";
            return Err(Error::spec(at("tiles"), "given", expected));
        }
        let size = tiles.height.checked_mul(tiles.width);
        if size != Some(self.group) {
            let expected = format!(
                "as many rows and columns as make the {} tokens of a group",
                self.group
            );
            return Err(Error::spec(
                at("tiles"),
                (tiles.height, tiles.width),
                expected,
            ));
        }
        let band = tiles.columns.saturating_mul(tiles.height);
        let tokens = self.group * self.groups;
        if tiles.columns == 0
            || !tiles.columns.is_multiple_of(tiles.width)
            || !tokens.is_multiple_of(band)
            || model.length != tokens
        {
            let expected = format!(
                "a multiple of {} in a grid that is whole tiles and all of the input's {} tokens",
                tiles.width, model.length
            );
            return Err(Error::spec(at("tiles.columns"), tiles.columns, expected));
        }
        Ok(())
    }

    fn validate_output(&self, globals: usize, model: &Surroundings<'_>, field: &str) -> Result<()> {
        if self.output == FitOutput::Tokens {
            return Ok(());
        }
        let output = format!("{field}.output");
        if globals == 0 {
            let expected = "tokens: the layout has no global layers";
            return Err(Error::spec(output, "latents", expected));
        }
        let width = self.latent_width(model.width);
        if width != model.width {
            let expected = format!("tokens, or latents of the model's width {}", model.width);
            return Err(Error::spec(output, format!("latents of {width}"), expected));
        }
        Ok(())
    }
}

/// Heads of a block that has some.
fn heads_of(block: &BlockSpec) -> Option<usize> {
    match &block.attention {
        MixerSpec::MultiHead(attention) => Some(attention.heads),
        _ => None,
    }
}
