//! BERT and RoBERTa.

use lapidary_kernels::Activation;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::check::{self, Check};
use super::{ConfigError, overlay};

/// BERT or RoBERTa, which differ in how they count positions and in their heads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum BertKind {
    #[default]
    Bert,
    /// Positions start after `pad_token_id` and skip padding.
    Roberta,
}

/// BERT's settings under their names in `config.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct BertConfig {
    #[serde(skip)]
    pub kind: BertKind,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub intermediate_size: usize,
    #[serde(with = "check::activation")]
    pub hidden_act: Activation,
    /// Rows of the position table. RoBERTa's first `pad_token_id + 1` stand for no position.
    pub max_position_embeddings: usize,
    pub type_vocab_size: usize,
    pub layer_norm_eps: f64,
    pub pad_token_id: Option<u32>,
    pub tie_word_embeddings: bool,
    is_decoder: bool,
    position_embedding_type: Option<String>,
}

impl BertConfig {
    fn defaults(kind: BertKind) -> Self {
        Self {
            kind,
            vocab_size: if kind == BertKind::Bert { 30522 } else { 50265 },
            hidden_size: 768,
            num_hidden_layers: 12,
            num_attention_heads: 12,
            intermediate_size: 3072,
            hidden_act: Activation::Gelu,
            max_position_embeddings: 512,
            type_vocab_size: 2,
            layer_norm_eps: 1e-12,
            pad_token_id: Some(if kind == BertKind::Bert { 0 } else { 1 }),
            tie_word_embeddings: true,
            is_decoder: false,
            position_embedding_type: None,
        }
    }

    pub(super) fn new(
        kind: BertKind,
        fields: &Map<String, Value>,
        check: &Check,
    ) -> Result<Self, ConfigError> {
        let config = Self {
            kind,
            ..overlay(Self::defaults(kind), &[], fields, check)?
        };
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
        config.check_kind(check)?;
        Ok(config)
    }

    fn check_kind(&self, check: &Check) -> Result<(), ConfigError> {
        if self.is_decoder {
            return Err(check.wrong(
                "is_decoder",
                true,
                "false: this family is read as an encoder",
            ));
        }
        if let Some(kind) = self
            .position_embedding_type
            .as_ref()
            .filter(|kind| *kind != "absolute")
        {
            return Err(check.wrong("position_embedding_type", kind, "absolute"));
        }
        if self.max_positions() == 0 {
            let expected = "more than pad_token_id + 1, after which RoBERTa's positions start";
            return Err(check.wrong(
                "max_position_embeddings",
                self.max_position_embeddings,
                expected,
            ));
        }
        Ok(())
    }

    /// The longest text: the rows of the position table that stand for one.
    pub fn max_positions(&self) -> usize {
        self.max_position_embeddings
            .saturating_sub(self.first_position())
    }

    /// The row of the position table that the first token gets.
    pub fn first_position(&self) -> usize {
        match self.kind {
            BertKind::Bert => 0,
            BertKind::Roberta => self.pad_token_id.map_or(0, |pad| pad as usize + 1),
        }
    }

    pub(super) fn matrix_parameters(&self) -> u128 {
        let [vocabulary, length, types, width, layers, inner] = [
            self.vocab_size,
            self.max_position_embeddings,
            self.type_vocab_size,
            self.hidden_size,
            self.num_hidden_layers,
            self.intermediate_size,
        ]
        .map(|size| size as u128);
        (vocabulary + length + types) * width + layers * (4 * width * width + 2 * width * inner)
    }
}
