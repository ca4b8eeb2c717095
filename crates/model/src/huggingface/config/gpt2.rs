//! GPT-2.

use lapidary_kernels::Activation;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::check::{self, Check};
use super::{ConfigError, overlay};

/// GPT-2's settings under their names in `config.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Gpt2Config {
    pub vocab_size: usize,
    pub n_positions: usize,
    pub n_embd: usize,
    pub n_layer: usize,
    pub n_head: usize,
    /// Width of the feed-forward layer; 4 `n_embd` when absent.
    pub n_inner: Option<usize>,
    #[serde(with = "check::activation")]
    pub activation_function: Activation,
    pub layer_norm_epsilon: f64,
    /// Divide the scores by the square root of the head's width.
    pub scale_attn_weights: bool,
    /// Divide the scores of layer `i` by `i + 1` as well.
    pub scale_attn_by_inverse_layer_idx: bool,
    pub tie_word_embeddings: bool,
    add_cross_attention: bool,
}

impl Gpt2Config {
    fn defaults() -> Self {
        Self {
            vocab_size: 50257,
            n_positions: 1024,
            n_embd: 768,
            n_layer: 12,
            n_head: 12,
            n_inner: None,
            activation_function: Activation::GeluTanh,
            layer_norm_epsilon: 1e-5,
            scale_attn_weights: true,
            scale_attn_by_inverse_layer_idx: false,
            tie_word_embeddings: true,
            add_cross_attention: false,
        }
    }

    pub(super) fn new(fields: &Map<String, Value>, check: &Check) -> Result<Self, ConfigError> {
        let aliases = [
            ("hidden_size", "n_embd"),
            ("max_position_embeddings", "n_positions"),
            ("num_attention_heads", "n_head"),
            ("num_hidden_layers", "n_layer"),
        ];
        let config = overlay(Self::defaults(), &aliases, fields, check)?;
        check.between("vocab_size", config.vocab_size, check::VOCABULARY)?;
        check.between("n_positions", config.n_positions, check::LENGTH)?;
        check.between("n_embd", config.n_embd, check::WIDTH)?;
        check.between("n_layer", config.n_layer, check::LAYERS)?;
        check.between("n_head", config.n_head, check::HEADS)?;
        check.divides("n_head", config.n_head, "n_embd", config.n_embd)?;
        check.between("n_inner", config.inner_width(), check::INNER_WIDTH)?;
        check.epsilon("layer_norm_epsilon", config.layer_norm_epsilon)?;
        if config.add_cross_attention {
            return Err(check.wrong(
                "add_cross_attention",
                true,
                "false: there is no encoder to attend to",
            ));
        }
        Ok(config)
    }

    /// Width of the feed-forward layer.
    pub fn inner_width(&self) -> usize {
        self.n_inner.unwrap_or(self.n_embd.saturating_mul(4))
    }

    pub(super) fn matrix_parameters(&self) -> u128 {
        let [vocabulary, length, width, layers, inner] = [
            self.vocab_size,
            self.n_positions,
            self.n_embd,
            self.n_layer,
            self.inner_width(),
        ]
        .map(|size| size as u128);
        (vocabulary + length) * width + layers * (4 * width * width + 2 * width * inner)
    }
}
