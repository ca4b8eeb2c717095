//! ALBERT.

use lapidary_kernels::Activation;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::check::{self, Check};
use super::{ConfigError, overlay};

/// ALBERT's settings under their names in `config.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct AlbertConfig {
    pub vocab_size: usize,
    /// Width of all embeddings, mapped to `hidden_size` after their norm.
    pub embedding_size: usize,
    pub hidden_size: usize,
    pub num_hidden_layers: usize,
    /// Sets of weights; layers in a row share one.
    pub num_hidden_groups: usize,
    pub num_attention_heads: usize,
    pub intermediate_size: usize,
    /// Blocks of a set of weights.
    inner_group_num: usize,
    #[serde(with = "check::activation")]
    pub hidden_act: Activation,
    pub max_position_embeddings: usize,
    pub type_vocab_size: usize,
    pub layer_norm_eps: f64,
    pub tie_word_embeddings: bool,
    position_embedding_type: Option<String>,
}

impl AlbertConfig {
    fn defaults() -> Self {
        Self {
            vocab_size: 30000,
            embedding_size: 128,
            hidden_size: 4096,
            num_hidden_layers: 12,
            num_hidden_groups: 1,
            num_attention_heads: 64,
            intermediate_size: 16384,
            inner_group_num: 1,
            hidden_act: Activation::GeluTanh,
            max_position_embeddings: 512,
            type_vocab_size: 2,
            layer_norm_eps: 1e-12,
            tie_word_embeddings: true,
            position_embedding_type: None,
        }
    }

    pub(super) fn new(fields: &Map<String, Value>, check: &Check) -> Result<Self, ConfigError> {
        let config = overlay(Self::defaults(), &[], fields, check)?;
        check.between("vocab_size", config.vocab_size, check::VOCABULARY)?;
        check.between("embedding_size", config.embedding_size, check::WIDTH)?;
        check.between("hidden_size", config.hidden_size, check::WIDTH)?;
        check.between("num_hidden_layers", config.num_hidden_layers, check::LAYERS)?;
        let groups = 1..=config.num_hidden_layers;
        check.between("num_hidden_groups", config.num_hidden_groups, groups)?;
        let heads = config.num_attention_heads;
        check.between("num_attention_heads", heads, check::HEADS)?;
        check.divides(
            "num_attention_heads",
            heads,
            "hidden_size",
            config.hidden_size,
        )?;
        check.between(
            "intermediate_size",
            config.intermediate_size,
            check::INNER_WIDTH,
        )?;
        check.between(
            "max_position_embeddings",
            config.max_position_embeddings,
            check::LENGTH,
        )?;
        check.between("type_vocab_size", config.type_vocab_size, 0..=1 << 16)?;
        check.epsilon("layer_norm_eps", config.layer_norm_eps)?;
        if config.inner_group_num != 1 {
            let expected = "1: no published model has several blocks in a group";
            return Err(check.wrong("inner_group_num", config.inner_group_num, expected));
        }
        if let Some(kind) = config
            .position_embedding_type
            .as_ref()
            .filter(|kind| *kind != "absolute")
        {
            return Err(check.wrong("position_embedding_type", kind, "absolute"));
        }
        Ok(config)
    }

    /// How often each group of weights is passed through: layer `i` of `L` has group
    /// `⌊i G / L⌋`.
    pub fn repeats(&self) -> Vec<usize> {
        let mut repeats = vec![0; self.num_hidden_groups];
        for layer in 0..self.num_hidden_layers {
            let group = layer * self.num_hidden_groups / self.num_hidden_layers;
            repeats.iter_mut().skip(group).take(1).for_each(|n| *n += 1);
        }
        repeats
    }

    pub(super) fn matrix_parameters(&self) -> u128 {
        let [vocabulary, length, types, narrow, width, groups, inner] = [
            self.vocab_size,
            self.max_position_embeddings,
            self.type_vocab_size,
            self.embedding_size,
            self.hidden_size,
            self.num_hidden_groups,
            self.intermediate_size,
        ]
        .map(|size| size as u128);
        (vocabulary + length + types + width) * narrow
            + groups * (4 * width * width + 2 * width * inner)
    }
}
