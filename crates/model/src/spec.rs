//! A model as data.
//!
//! A [`ModelSpec`] reads and writes as TOML or JSON. Blocks may differ from each other, and any
//! linear layer may be factorised by giving it a rank.
//!
//! ```
//! let spec: lapidary_model::ModelSpec = toml::from_str(r#"
//!     width = 64
//!     [input]
//!     kind = "tokens"
//!     vocabulary = 256
//!     length = 128
//!     [[blocks]]
//!     repeat = 2
//!     attention = { kind = "multi-head", heads = 4, causal = true }
//!     feedforward = { kind = "dense", hidden = 256 }
//!     [head]
//!     kind = "language-model"
//! "#)?;
//! spec.validate()?;
//! assert_eq!(spec.expanded_blocks().len(), 2);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use std::collections::BTreeMap;

use crate::grids;
use crate::initial::InitialValues;
use crate::shared;
use crate::vips;
use lapidary_parts::activation::ActivationSpec;
use lapidary_parts::block::BlockSpec;
use lapidary_parts::norm::NormSpec;
use lapidary_parts::organisation::{OrganisationSpec, Surroundings};
use lapidary_parts::parameters::Quantisation;
use lapidary_parts::{Draws, Error, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

mod patches;

pub use patches::{PatchInput, PatchNorms, PatchPosition};

/// Bounds that keep a spec from asking for more memory than any machine has.
const MAX_WIDTH: usize = 1 << 17;
const MAX_BLOCKS: usize = 4096;
const MAX_VOCABULARY: usize = 1 << 24;
const MAX_LENGTH: usize = 1 << 24;
const MAX_LABELS: usize = 1 << 24;

/// A model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ModelSpec {
    /// Features of a token.
    pub width: usize,
    /// What goes in.
    pub input: InputSpec,
    /// The blocks in order.
    pub blocks: Vec<BlockSpec>,
    /// Norm after the last block.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub final_norm: Option<NormSpec>,
    /// What comes out.
    #[serde(default)]
    pub head: HeadSpec,
    /// Rank of each factorised linear layer, by path (`blocks.0.attention.query`).
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub low_rank: BTreeMap<String, usize>,
    /// How each quantised matrix is stored, by the parameter that it stands for
    /// (`blocks.0.attention.query.weight`).
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub quantised: BTreeMap<String, Quantisation>,
    /// How tokens are organised above the blocks; these run one after the other on the whole
    /// sequence when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub organisation: Option<OrganisationSpec>,
    /// How parameters begin that are not read.
    #[serde(default, skip_serializing_if = "InitialValues::is_of_parts")]
    pub initial: InitialValues,
}

/// What a model reads.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum InputSpec {
    /// Token ids.
    Tokens(TokenInput),
    /// Images cut into patches.
    Patches(PatchInput),
}

/// Embedding of token ids.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TokenInput {
    /// Number of token ids.
    pub vocabulary: usize,
    /// Most tokens at a time.
    pub length: usize,
    /// Positions added to the embeddings.
    #[serde(default)]
    pub position: AbsolutePosition,
    /// Number of token types (segments); 0 for none.
    #[serde(default)]
    pub token_types: usize,
    /// Norm of the embeddings.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub norm: Option<NormSpec>,
    /// Width of the embedding table, where it differs from the model's: a linear map follows it
    /// and, in a language model, another precedes the output.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub embedding_width: Option<usize>,
    /// What that linear map reads, where there is one.
    #[serde(default, skip_serializing_if = "Projected::is_default")]
    pub projected: Projected,
    /// Probability with which an entry of the embeddings is dropped in training.
    #[serde(default)]
    pub dropout: f64,
    /// Whether it leaves out whole features of a sequence, alike in all of its tokens, as a block's may.
    #[serde(default, skip_serializing_if = "is_not")]
    pub dropout_by_feature: bool,
}

/// What is mapped from the embedding's width to the model's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Projected {
    /// The token's row alone, without a bias; positions, types and the norm have the model's width.
    #[default]
    Token,
    /// The sum of the token's, position's and type's rows after its norm, with a bias: all tables
    /// have the embedding's width (Lan et al., ALBERT, arXiv 1909.11942).
    Sum,
}

impl Projected {
    #[allow(
        clippy::trivially_copy_pass_by_ref,
        reason = "serde asks for a reference"
    )]
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// Positions added to the embeddings.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum AbsolutePosition {
    /// None.
    #[default]
    #[serde(deserialize_with = "lapidary_parts::fields::none")]
    None,
    /// A table with a row for each position.
    Learned {
        /// Rows of the table before that of the first position.
        #[serde(default)]
        offset: usize,
        /// Whether padding is skipped in counting; pads then take row `offset − 1`.
        #[serde(default)]
        skip_padding: bool,
    },
    /// `sin(t θ_i), cos(t θ_i)` (Vaswani et al., arXiv 1706.03762).
    #[serde(deserialize_with = "lapidary_parts::fields::none")]
    Sinusoidal,
    /// A table for each dimension of the grid that the sequence is, row by row: token `t` stands in
    /// row `t / (columns · channels)`.
    Axial {
        /// Columns of the grid.
        columns: usize,
        /// Tokens of a place of the grid.
        #[serde(default = "one", skip_serializing_if = "is_one")]
        channels: usize,
        /// Features that tell the row, beside which those that tell the column are laid (Kitaev et
        /// al., Reformer, arXiv 2001.04451); when absent the tables have the whole width and are
        /// summed (Child et al., Sparse Transformer, arXiv 1904.10509).
        #[serde(default, skip_serializing_if = "Option::is_none")]
        row_width: Option<usize>,
    },
}

impl AbsolutePosition {
    /// Refuses what cannot be built for sequences of `length` tokens of `width`, the width of
    /// `width_field`.
    fn validate(&self, length: usize, width: usize, width_field: &str) -> Result<()> {
        match *self {
            Self::Learned { offset, .. } if offset > 1024 => {
                Err(Error::spec("input.position.offset", offset, "at most 1024"))
            }
            Self::Sinusoidal if !width.is_multiple_of(2) => {
                let expected = "even for sinusoidal positions";
                Err(Error::spec(width_field, width, expected))
            }
            Self::Axial {
                columns,
                channels,
                row_width,
            } => {
                bounded("input.position.columns", columns, length)?;
                bounded("input.position.channels", channels, length)?;
                match row_width {
                    Some(_) if channels > 1 => Err(Error::spec(
                        "input.position.row_width",
                        "given",
                        "absent where there are channels: three tables are summed",
                    )),
                    Some(row_width) if row_width == 0 || row_width >= width => Err(Error::spec(
                        "input.position.row_width",
                        row_width,
                        format!("at least 1 and below {width}"),
                    )),
                    _ => Ok(()),
                }
            }
            Self::None | Self::Learned { .. } | Self::Sinusoidal => Ok(()),
        }
    }
}

#[allow(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde asks for a reference"
)]
fn is_one(number: &usize) -> bool {
    *number == 1
}

fn one() -> usize {
    1
}

fn yes() -> bool {
    true
}

/// What a model gives.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum HeadSpec {
    /// The hidden vectors.
    #[default]
    #[serde(deserialize_with = "lapidary_parts::fields::none")]
    None,
    /// A score for each token id at each position.
    LanguageModel {
        /// Whether the output matrix is the embedding table.
        #[serde(default = "yes")]
        tied: bool,
        /// Whether the scores have a bias.
        #[serde(default)]
        bias: bool,
        /// A dense layer before the output matrix.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        transform: Option<HeadTransform>,
    },
    /// One vector for each sequence.
    Pooled {
        /// Which token stands for the sequence.
        #[serde(default)]
        pool: Pool,
        /// Norm of the pooled vector.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        norm: Option<NormSpec>,
        /// Activation of a dense layer on the pooled vector, which is there when this is given.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        hidden: Option<ActivationSpec>,
        /// Number of scores, or features of a projection.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        labels: Option<usize>,
        /// Whether the scores have a bias.
        #[serde(default = "yes")]
        bias: bool,
    },
    /// The pixels of each patch, from its token.
    #[serde(deserialize_with = "lapidary_parts::fields::none")]
    Pixels,
}

#[allow(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde asks for a reference"
)]
fn is_not(flag: &bool) -> bool {
    !*flag
}

/// `norm(f(x Wᵀ + b))` before the output matrix of a masked language model.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HeadTransform {
    /// `f`.
    pub activation: ActivationSpec,
    /// The norm after it.
    pub norm: NormSpec,
    /// Whether `W` goes to the width of the embedding table at once, where another map would do so
    /// after the norm.
    #[serde(default, skip_serializing_if = "is_not")]
    pub narrows: bool,
}

impl HeadSpec {
    /// Whether the layer before the output matrix goes to the embedding's width by itself.
    pub(crate) fn narrows(&self) -> bool {
        let Self::LanguageModel { transform, .. } = self else {
            return false;
        };
        transform.is_some_and(|transform| transform.narrows)
    }
}

/// Which token stands for a sequence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Pool {
    /// The first.
    #[default]
    First,
    /// The mean over real tokens.
    Mean,
    /// The last real token.
    Last,
    /// The token with the highest id: the end of text in CLIP's first checkpoints.
    HighestId,
    /// The first token with this id, such as an end of text.
    AtToken(u32),
    /// The mean of the scores of two heads, one on the first and one on the second token
    /// (DeiT's class and distillation token).
    FirstTwo,
}

impl ModelSpec {
    /// The blocks, repetitions written out, shared ones too: what a pass goes through.
    pub fn expanded_blocks(&self) -> Vec<BlockSpec> {
        self.blocks
            .iter()
            .flat_map(|block| {
                let single = BlockSpec {
                    repeat: 1,
                    shared: false,
                    ..block.clone()
                };
                std::iter::repeat_n(single, block.repeat)
            })
            .collect()
    }

    /// Whether every block is causal, so that the model can generate.
    pub fn is_causal(&self) -> bool {
        !self.blocks.is_empty() && self.blocks.iter().all(|block| block.attention.is_causal())
    }

    /// What it draws anew in training: whether passes that draw nothing are other ones.
    pub fn draws(&self) -> Draws {
        let organisation = self.organisation.as_ref().map(OrganisationSpec::draws);
        let blocks = self.blocks.iter().map(BlockSpec::draws);
        blocks.chain(organisation).collect()
    }

    /// Most tokens the model takes at a time, where its input bounds them.
    pub fn length(&self) -> usize {
        match &self.input {
            InputSpec::Tokens(tokens) => tokens.length,
            InputSpec::Patches(patches) => patches.patches().saturating_add(patches.class_tokens),
        }
    }

    /// Number of token ids, for models that read tokens.
    pub fn vocabulary(&self) -> Option<usize> {
        match &self.input {
            InputSpec::Tokens(tokens) => Some(tokens.vocabulary),
            InputSpec::Patches(_) => None,
        }
    }

    /// Refuses what cannot be built, naming the field, its value and what would be valid.
    pub fn validate(&self) -> Result<()> {
        bounded("width", self.width, MAX_WIDTH)?;
        let blocks: usize = self
            .blocks
            .iter()
            .map(|block| block.repeat)
            .fold(0, usize::saturating_add);
        if blocks > MAX_BLOCKS {
            return Err(Error::spec(
                "blocks",
                blocks,
                format!("at most {MAX_BLOCKS}"),
            ));
        }
        match &self.input {
            InputSpec::Tokens(tokens) => {
                bounded("input.vocabulary", tokens.vocabulary, MAX_VOCABULARY)?;
                bounded("input.length", tokens.length, MAX_LENGTH)?;
                if tokens.token_types > 1024 {
                    return Err(Error::spec(
                        "input.token_types",
                        tokens.token_types,
                        "at most 1024",
                    ));
                }
                if let Some(width) = tokens.embedding_width {
                    bounded("input.embedding_width", width, MAX_WIDTH)?;
                } else if tokens.projected != Projected::Token {
                    return Err(Error::spec(
                        "input.projected",
                        "sum",
                        "token where there is no embedding_width",
                    ));
                }
                let (field, added) = match (tokens.projected, tokens.embedding_width) {
                    (Projected::Sum, Some(width)) => ("input.embedding_width", width),
                    _ => ("width", self.width),
                };
                tokens.position.validate(tokens.length, added, field)?;
                if !(0.0..1.0).contains(&tokens.dropout) {
                    return Err(Error::spec(
                        "input.dropout",
                        tokens.dropout,
                        "at least 0 and below 1",
                    ));
                }
                if tokens.dropout_by_feature && tokens.dropout == 0.0 {
                    let expected = "false where input.dropout is 0";
                    return Err(Error::spec("input.dropout_by_feature", true, expected));
                }
                validate_norm(&tokens.norm, "input.norm")?;
            }
            InputSpec::Patches(patches) => patches.validate(self.width)?,
        }
        for (index, block) in self.blocks.iter().enumerate() {
            block.validate(self.width, &format!("blocks.{index}"))?;
        }
        grids::validate(self)?;
        shared::validate(self)?;
        validate_norm(&self.final_norm, "final_norm")?;
        self.validate_organisation()?;
        self.validate_head()?;
        self.initial.validate(self)?;
        self.validate_size()
    }

    /// Features of what the final norm and the head read: the width, but where an organisation gives more.
    pub fn read_width(&self) -> usize {
        let organisation = self.organisation.as_ref();
        organisation.map_or(self.width, |organisation| {
            organisation.output_width(self.width)
        })
    }

    fn validate_organisation(&self) -> Result<()> {
        let Some(organisation) = &self.organisation else {
            return Ok(());
        };
        let blocks = self.expanded_blocks();
        let model = Surroundings {
            blocks: &blocks,
            width: self.width,
            length: self.length(),
        };
        organisation.validate(&model, "organisation")?;
        vips::validate(self)?;
        if organisation.gives_tokens() {
            return validate_last_stage(organisation);
        }
        let by_token = match &self.head {
            HeadSpec::LanguageModel { .. } => Some("language-model"),
            HeadSpec::Pooled { pool, .. } => match pool {
                Pool::HighestId => Some("pooled at the highest id"),
                Pool::AtToken(_) => Some("pooled at a token"),
                Pool::First | Pool::Mean | Pool::Last | Pool::FirstTwo => None,
            },
            HeadSpec::Pixels => Some("pixels"),
            HeadSpec::None => None,
        };
        match by_token {
            None => Ok(()),
            Some(head) => Err(Error::spec(
                "organisation.output",
                format!("not the tokens, before a head that is {head}"),
                "tokens, or a head that pools by place",
            )),
        }
    }

    fn validate_head(&self) -> Result<()> {
        match &self.head {
            HeadSpec::None => Ok(()),
            HeadSpec::Pixels if self.vocabulary().is_some() => Err(Error::spec(
                "head.kind",
                "pixels",
                "another for a model that reads tokens",
            )),
            HeadSpec::Pixels => Ok(()),
            HeadSpec::LanguageModel { .. } if self.vocabulary().is_none() => Err(Error::spec(
                "head.kind",
                "language-model",
                "pooled or none for a model that reads patches",
            )),
            HeadSpec::LanguageModel { transform, .. } => {
                let alike = match &self.input {
                    InputSpec::Tokens(tokens) => tokens.embedding_width.is_none(),
                    InputSpec::Patches(_) => false,
                };
                if self.head.narrows() && alike && self.read_width() == self.width {
                    let expected =
                        "false where the table of embeddings is as wide as what the head reads";
                    return Err(Error::spec("head.transform.narrows", true, expected));
                }
                validate_norm(
                    &transform.map(|transform| transform.norm),
                    "head.transform.norm",
                )
            }
            HeadSpec::Pooled {
                pool,
                norm,
                hidden,
                labels,
                bias,
            } => {
                validate_norm(norm, "head.norm")?;
                if !*bias && labels.is_none() {
                    let expected = "absent where there are no labels, whose scores have none then";
                    return Err(Error::spec("head.bias", false, expected));
                }
                let between = [("norm", norm.is_some()), ("hidden", hidden.is_some())];
                let given = between.into_iter().find(|(_, given)| *given);
                if let (Pool::FirstTwo, Some((name, _))) = (pool, given) {
                    let expected = "absent beside pool = \"first-two\", whose scores are of the tokens as they are";
                    return Err(Error::spec(format!("head.{name}"), "given", expected));
                }
                if let (Pool::AtToken(id), Some(vocabulary)) = (pool, self.vocabulary())
                    && *id as usize >= vocabulary
                {
                    let expected = format!("below {vocabulary}, the input's vocabulary");
                    return Err(Error::spec("head.pool.at-token", id, expected));
                }
                if let Some(labels) = *labels {
                    bounded("head.labels", labels, MAX_LABELS)?;
                }
                if matches!(pool, Pool::HighestId | Pool::AtToken(_)) && self.vocabulary().is_none()
                {
                    return Err(Error::spec("head.pool", pool, "first or mean for patches"));
                }
                if *pool == Pool::FirstTwo && labels.is_none() {
                    return Err(Error::spec(
                        "head.labels",
                        labels,
                        "a number: first-two averages scores",
                    ));
                }
                Ok(())
            }
        }
    }
}

/// Refuses latents that go through global layers behind the last that tokens hear of, where tokens are what comes out.
fn validate_last_stage(organisation: &OrganisationSpec) -> Result<()> {
    let OrganisationSpec::Interleaved(fit) = organisation else {
        return Ok(());
    };
    match fit.stages()?.last() {
        Some(stage) if stage.global > 0 => Err(Error::spec(
            "organisation.layout",
            &fit.layout,
            format!(
                "{}(0) at least, or output = \"latents\": tokens hear of global layers before the next brackets",
                fit.layout
            ),
        )),
        _ => Ok(()),
    }
}

fn validate_norm(norm: &Option<NormSpec>, field: &str) -> Result<()> {
    norm.as_ref().map_or(Ok(()), |norm| norm.validate(field))
}

fn bounded(field: &str, value: usize, most: usize) -> Result<()> {
    if value == 0 || value > most {
        return Err(Error::spec(field, value, format!("between 1 and {most}")));
    }
    Ok(())
}
