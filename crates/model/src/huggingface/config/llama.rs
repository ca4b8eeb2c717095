//! Llama and what is built like it: Mistral, Qwen2, and with experts Mixtral and OLMoE.

use lapidary_kernels::Activation;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::check::{self, Check};
use super::{ConfigError, RopeConfig, overlay};

/// Which of Llama's look-alikes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum LlamaKind {
    Llama,
    /// Attends to a window of the past.
    Mistral,
    /// Queries, keys and values have biases; the upper layers may attend to a window.
    Qwen2,
    /// Experts in place of the feed-forward layer, their weights summing to one.
    Mixtral,
    /// Experts, and normalised queries and keys.
    Olmoe,
}

/// The settings of Llama and its look-alikes, resolved: what `config.json` leaves out has the
/// value that `transformers` gives it.
#[derive(Clone, Debug, PartialEq)]
pub struct LlamaConfig {
    /// Which look-alike.
    pub kind: LlamaKind,
    /// Tokens in the vocabulary.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward layer, or of one expert.
    pub intermediate_size: usize,
    /// Blocks.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key/value heads, a divisor of the query heads.
    pub num_key_value_heads: usize,
    /// Width of a head, even; usually but not always `hidden_size / num_attention_heads`.
    pub head_dim: usize,
    /// Activation of the gate.
    pub hidden_act: Activation,
    /// The longest text.
    pub max_position_embeddings: usize,
    /// Added to the mean square in RMS norms.
    pub rms_norm_eps: f64,
    /// The head is the token embedding.
    pub tie_word_embeddings: bool,
    /// Biases on queries, keys and values.
    pub query_key_value_bias: bool,
    /// A bias on the attention's output.
    pub attention_output_bias: bool,
    /// Biases in the feed-forward layer.
    pub mlp_bias: bool,
    /// Rotary position embedding.
    pub rope: RopeConfig,
    /// Of each layer: how many positions back it attends, itself included; `None` is all.
    pub windows: Vec<Option<usize>>,
    /// Mixture of experts.
    pub experts: Option<ExpertsConfig>,
    /// Queries, keys and values are clamped to plus or minus this.
    pub clip_qkv: Option<f64>,
}

/// How a mixture of experts is routed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertsConfig {
    /// Experts of a layer.
    pub num_experts: usize,
    /// Experts that a token goes to.
    pub num_experts_per_tok: usize,
    /// The chosen experts' weights are scaled to sum to one.
    pub norm_topk_prob: bool,
}

/// The fields as the file has them.
#[derive(Serialize, Deserialize)]
struct Fields {
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    #[serde(with = "check::activation")]
    hidden_act: Activation,
    max_position_embeddings: usize,
    rms_norm_eps: f64,
    tie_word_embeddings: bool,
    attention_bias: bool,
    mlp_bias: bool,
    sliding_window: Option<usize>,
    use_sliding_window: bool,
    max_window_layers: usize,
    layer_types: Option<Vec<String>>,
    num_experts: usize,
    num_experts_per_tok: usize,
    norm_topk_prob: bool,
    clip_qkv: Option<f64>,
}

impl Fields {
    fn defaults(kind: LlamaKind) -> Self {
        let llama = Self {
            vocab_size: 32000,
            hidden_size: 4096,
            intermediate_size: 11008,
            num_hidden_layers: 32,
            num_attention_heads: 32,
            num_key_value_heads: None,
            head_dim: None,
            hidden_act: Activation::Silu,
            max_position_embeddings: 2048,
            rms_norm_eps: 1e-6,
            tie_word_embeddings: false,
            attention_bias: false,
            mlp_bias: false,
            sliding_window: None,
            use_sliding_window: false,
            max_window_layers: 28,
            layer_types: None,
            num_experts: 8,
            num_experts_per_tok: 2,
            norm_topk_prob: true,
            clip_qkv: None,
        };
        match kind {
            LlamaKind::Llama => llama,
            LlamaKind::Mistral => Self {
                intermediate_size: 14336,
                num_key_value_heads: Some(8),
                max_position_embeddings: 131_072,
                sliding_window: Some(4096),
                ..llama
            },
            LlamaKind::Qwen2 => Self {
                vocab_size: 151_936,
                intermediate_size: 22016,
                num_key_value_heads: Some(32),
                max_position_embeddings: 32768,
                sliding_window: Some(4096),
                ..llama
            },
            LlamaKind::Mixtral => Self {
                intermediate_size: 14336,
                num_key_value_heads: Some(8),
                max_position_embeddings: 131_072,
                rms_norm_eps: 1e-5,
                ..llama
            },
            LlamaKind::Olmoe => Self {
                vocab_size: 50304,
                hidden_size: 2048,
                intermediate_size: 2048,
                num_hidden_layers: 16,
                num_attention_heads: 16,
                max_position_embeddings: 4096,
                rms_norm_eps: 1e-5,
                num_experts: 64,
                num_experts_per_tok: 8,
                norm_topk_prob: false,
                ..llama
            },
        }
    }

    fn check(&self, check: &Check) -> Result<(), ConfigError> {
        check.between("vocab_size", self.vocab_size, check::VOCABULARY)?;
        check.between("hidden_size", self.hidden_size, check::WIDTH)?;
        check.between(
            "intermediate_size",
            self.intermediate_size,
            check::INNER_WIDTH,
        )?;
        check.between("num_hidden_layers", self.num_hidden_layers, check::LAYERS)?;
        check.between(
            "num_attention_heads",
            self.num_attention_heads,
            check::HEADS,
        )?;
        check.between(
            "max_position_embeddings",
            self.max_position_embeddings,
            check::LENGTH,
        )?;
        check.epsilon("rms_norm_eps", self.rms_norm_eps)
    }

    fn head_dim(&self, check: &Check) -> Result<usize, ConfigError> {
        let width = match self.head_dim {
            Some(width) => width,
            None => {
                check.divides(
                    "num_attention_heads",
                    self.num_attention_heads,
                    "hidden_size",
                    self.hidden_size,
                )?;
                self.hidden_size / self.num_attention_heads
            }
        };
        if width.is_multiple_of(2) && (2..=1 << 16).contains(&width) {
            return Ok(width);
        }
        let expected = "an even number between 2 and 65536: rotation turns pairs of features";
        Err(check.wrong("head_dim", width, expected))
    }

    fn windows(&self, kind: LlamaKind, check: &Check) -> Result<Vec<Option<usize>>, ConfigError> {
        let window = match kind {
            LlamaKind::Llama | LlamaKind::Olmoe => None,
            LlamaKind::Qwen2 if !self.use_sliding_window => None,
            LlamaKind::Mistral | LlamaKind::Mixtral | LlamaKind::Qwen2 => self.sliding_window,
        };
        if let Some(window) = window {
            check.between("sliding_window", window, check::LENGTH)?;
        }
        let first = if kind == LlamaKind::Qwen2 {
            self.max_window_layers
        } else {
            0
        };
        let layers = 0..self.num_hidden_layers;
        let Some(types) = self
            .layer_types
            .as_ref()
            .filter(|_| kind == LlamaKind::Qwen2)
        else {
            return Ok(layers
                .map(|layer| window.filter(|_| layer >= first))
                .collect());
        };
        if types.len() != layers.len() {
            let expected = format!("one type for each of the {} layers", layers.len());
            return Err(check.wrong("layer_types", format!("{} types", types.len()), expected));
        }
        let window_of = |kind: &String| match kind.as_str() {
            "full_attention" => Ok(None),
            "sliding_attention" => Ok(window),
            other => Err(check.wrong("layer_types", other, "full_attention or sliding_attention")),
        };
        types.iter().map(window_of).collect()
    }

    fn experts(
        &self,
        kind: LlamaKind,
        check: &Check,
    ) -> Result<Option<ExpertsConfig>, ConfigError> {
        let count_field = match kind {
            LlamaKind::Mixtral => "num_local_experts",
            LlamaKind::Olmoe => "num_experts",
            LlamaKind::Llama | LlamaKind::Mistral | LlamaKind::Qwen2 => return Ok(None),
        };
        check.between(count_field, self.num_experts, check::EXPERTS)?;
        check.between(
            "num_experts_per_tok",
            self.num_experts_per_tok,
            1..=self.num_experts,
        )?;
        Ok(Some(ExpertsConfig {
            num_experts: self.num_experts,
            num_experts_per_tok: self.num_experts_per_tok,
            norm_topk_prob: kind == LlamaKind::Mixtral || self.norm_topk_prob,
        }))
    }
}

impl LlamaConfig {
    pub(super) fn new(
        kind: LlamaKind,
        fields: &Map<String, Value>,
        check: &Check,
    ) -> Result<Self, ConfigError> {
        let aliases = [("num_local_experts", "num_experts")];
        let read = overlay(Fields::defaults(kind), &aliases, fields, check)?;
        read.check(check)?;
        let heads = read.num_attention_heads;
        let groups = read.num_key_value_heads.unwrap_or(heads);
        check.divides("num_key_value_heads", groups, "num_attention_heads", heads)?;
        if let Some(limit) = read.clip_qkv {
            check.positive("clip_qkv", limit)?;
        }
        let has_attention_bias =
            matches!(kind, LlamaKind::Llama | LlamaKind::Olmoe) && read.attention_bias;
        let default_theta = if kind == LlamaKind::Mixtral { 1e6 } else { 1e4 };
        Ok(Self {
            kind,
            vocab_size: read.vocab_size,
            hidden_size: read.hidden_size,
            intermediate_size: read.intermediate_size,
            num_hidden_layers: read.num_hidden_layers,
            num_attention_heads: heads,
            num_key_value_heads: groups,
            head_dim: read.head_dim(check)?,
            hidden_act: read.hidden_act,
            max_position_embeddings: read.max_position_embeddings,
            rms_norm_eps: read.rms_norm_eps,
            tie_word_embeddings: read.tie_word_embeddings,
            query_key_value_bias: has_attention_bias || kind == LlamaKind::Qwen2,
            attention_output_bias: has_attention_bias,
            mlp_bias: kind == LlamaKind::Llama && read.mlp_bias,
            rope: RopeConfig::new(default_theta, read.max_position_embeddings, fields, check)?,
            windows: read.windows(kind, check)?,
            experts: read.experts(kind, check)?,
            clip_qkv: read.clip_qkv.filter(|_| kind == LlamaKind::Olmoe),
        })
    }

    pub(super) fn matrix_parameters(&self) -> u128 {
        let [vocabulary, width, layers, inner, heads, groups, head_width] = [
            self.vocab_size,
            self.hidden_size,
            self.num_hidden_layers,
            self.intermediate_size,
            self.num_attention_heads,
            self.num_key_value_heads,
            self.head_dim,
        ]
        .map(|size| size as u128);
        let experts = self
            .experts
            .map_or(0, |experts| experts.num_experts as u128);
        let attention = 2 * width * head_width * (heads + groups);
        let feed_forward = 3 * width * inner * experts.max(1) + width * experts;
        let embeddings = vocabulary * width * if self.tie_word_embeddings { 1 } else { 2 };
        embeddings + layers * (attention + feed_forward)
    }
}
