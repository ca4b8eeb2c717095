//! Mamba.

use lapidary_kernels::Activation;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::check::{self, Check};
use super::{ConfigError, overlay};

/// Mamba's settings, resolved: what `config.json` leaves out has the value that `transformers`
/// gives it.
#[derive(Clone, Debug, PartialEq)]
pub struct MambaConfig {
    /// Tokens in the vocabulary.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the mixer: `expand · hidden_size`. A file's own `intermediate_size` is not read,
    /// nor is it by transformers.
    pub intermediate_size: usize,
    /// Blocks.
    pub num_hidden_layers: usize,
    /// States per channel.
    pub state_size: usize,
    /// Positions that the convolution sees.
    pub conv_kernel: usize,
    /// Rank of the step size's projection.
    pub time_step_rank: usize,
    /// Added to the mean square in RMS norms.
    pub layer_norm_epsilon: f64,
    /// Activation after the convolution; the gate's is always SiLU.
    pub hidden_act: Activation,
    /// Biases on the mixer's input and output projections.
    pub use_bias: bool,
    /// A bias on the convolution.
    pub use_conv_bias: bool,
    /// The head is the token embedding.
    pub tie_word_embeddings: bool,
}

/// The fields as the file has them.
#[derive(Serialize, Deserialize)]
struct Fields {
    vocab_size: usize,
    hidden_size: usize,
    num_hidden_layers: usize,
    state_size: usize,
    expand: f64,
    conv_kernel: usize,
    time_step_rank: Rank,
    layer_norm_epsilon: f64,
    #[serde(with = "check::activation")]
    hidden_act: Activation,
    use_bias: bool,
    use_conv_bias: bool,
    tie_word_embeddings: bool,
}

/// A rank, or the word `auto` for a sixteenth of the width.
#[derive(Serialize, Deserialize)]
#[serde(untagged, expecting = "expected a whole number or \"auto\"")]
enum Rank {
    Given(usize),
    Auto(AutoWord),
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum AutoWord {
    Auto,
}

impl Fields {
    fn defaults() -> Self {
        Self {
            vocab_size: 50280,
            hidden_size: 768,
            num_hidden_layers: 32,
            state_size: 16,
            expand: 2.0,
            conv_kernel: 4,
            time_step_rank: Rank::Auto(AutoWord::Auto),
            layer_norm_epsilon: 1e-5,
            hidden_act: Activation::Silu,
            use_bias: false,
            use_conv_bias: true,
            tie_word_embeddings: true,
        }
    }
}

impl MambaConfig {
    pub(super) fn new(fields: &Map<String, Value>, check: &Check) -> Result<Self, ConfigError> {
        let read = overlay(Fields::defaults(), &[], fields, check)?;
        check.positive("expand", read.expand)?;
        let config = Self {
            vocab_size: read.vocab_size,
            hidden_size: read.hidden_size,
            // A conversion from floating point saturates, and the range is checked below.
            intermediate_size: (read.expand * read.hidden_size as f64) as usize,
            num_hidden_layers: read.num_hidden_layers,
            state_size: read.state_size,
            conv_kernel: read.conv_kernel,
            time_step_rank: match read.time_step_rank {
                Rank::Given(rank) => rank,
                Rank::Auto(_) => read.hidden_size.div_ceil(16),
            },
            layer_norm_epsilon: read.layer_norm_epsilon,
            hidden_act: read.hidden_act,
            use_bias: read.use_bias,
            use_conv_bias: read.use_conv_bias,
            tie_word_embeddings: read.tie_word_embeddings,
        };
        check.between("vocab_size", config.vocab_size, check::VOCABULARY)?;
        check.between("hidden_size", config.hidden_size, check::WIDTH)?;
        check.between(
            "expand times hidden_size",
            config.intermediate_size,
            check::INNER_WIDTH,
        )?;
        check.between("num_hidden_layers", config.num_hidden_layers, check::LAYERS)?;
        check.between("state_size", config.state_size, 1..=1 << 16)?;
        check.between("conv_kernel", config.conv_kernel, 1..=1 << 10)?;
        check.between("time_step_rank", config.time_step_rank, check::WIDTH)?;
        check.epsilon("layer_norm_epsilon", config.layer_norm_epsilon)?;
        Ok(config)
    }

    pub(super) fn matrix_parameters(&self) -> u128 {
        let [vocabulary, width, layers, inner, states, kernel, rank] = [
            self.vocab_size,
            self.hidden_size,
            self.num_hidden_layers,
            self.intermediate_size,
            self.state_size,
            self.conv_kernel,
            self.time_step_rank,
        ]
        .map(|size| size as u128);
        let selection = inner * (rank + 2 * states) + rank * inner + inner * states;
        vocabulary * width + layers * (3 * width * inner + inner * kernel + selection)
    }
}
