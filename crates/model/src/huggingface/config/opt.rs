//! OPT.

use lapidary_kernels::Activation;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::check::{self, Check};
use super::{ConfigError, overlay};

/// OPT's settings under their names in `config.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct OptConfig {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub ffn_dim: usize,
    /// Positions of text; the table has two rows more.
    pub max_position_embeddings: usize,
    /// Width of the token embedding, projected to and from `hidden_size` where they differ.
    pub word_embed_proj_dim: usize,
    /// Normalise before each sub-layer; after it when false, as in OPT-350m.
    pub do_layer_norm_before: bool,
    /// Leave out the norm after the last layer of a pre-norm model.
    #[serde(rename = "_remove_final_layer_norm")]
    pub remove_final_layer_norm: bool,
    #[serde(with = "check::activation")]
    pub activation_function: Activation,
    pub enable_bias: bool,
    pub layer_norm_elementwise_affine: bool,
    pub pad_token_id: Option<u32>,
    pub tie_word_embeddings: bool,
}

impl OptConfig {
    fn defaults() -> Self {
        Self {
            vocab_size: 50272,
            hidden_size: 768,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            ffn_dim: 3072,
            max_position_embeddings: 2048,
            word_embed_proj_dim: 768,
            do_layer_norm_before: true,
            remove_final_layer_norm: false,
            activation_function: Activation::Relu,
            enable_bias: true,
            layer_norm_elementwise_affine: true,
            pad_token_id: Some(1),
            tie_word_embeddings: true,
        }
    }

    pub(super) fn new(fields: &Map<String, Value>, check: &Check) -> Result<Self, ConfigError> {
        let mut config = overlay(Self::defaults(), &[], fields, check)?;
        if fields.get("word_embed_proj_dim").is_none_or(Value::is_null) {
            config.word_embed_proj_dim = config.hidden_size;
        }
        check.between("vocab_size", config.vocab_size, check::VOCABULARY)?;
        check.between("hidden_size", config.hidden_size, check::WIDTH)?;
        check.between("num_hidden_layers", config.num_hidden_layers, check::LAYERS)?;
        check.between(
            "num_attention_heads",
            config.num_attention_heads,
            check::HEADS,
        )?;
        check.divides(
            "num_attention_heads",
            config.num_attention_heads,
            "hidden_size",
            config.hidden_size,
        )?;
        check.between("ffn_dim", config.ffn_dim, check::INNER_WIDTH)?;
        check.between(
            "max_position_embeddings",
            config.max_position_embeddings,
            check::LENGTH,
        )?;
        check.between(
            "word_embed_proj_dim",
            config.word_embed_proj_dim,
            check::WIDTH,
        )?;
        Ok(config)
    }

    pub(super) fn matrix_parameters(&self) -> u128 {
        let [vocabulary, length, width, embedding, layers, inner] = [
            self.vocab_size,
            self.max_position_embeddings + 2,
            self.hidden_size,
            self.word_embed_proj_dim,
            self.num_hidden_layers,
            self.ffn_dim,
        ]
        .map(|size| size as u128);
        let projections = if embedding == width {
            0
        } else {
            2 * embedding * width
        };
        vocabulary * embedding
            + length * width
            + projections
            + layers * (4 * width * width + 2 * width * inner)
    }
}
