//! Mamba-2.

use lapidary_kernels::Activation;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::check::{self, Check};
use super::floats::Float;
use super::{ConfigError, overlay};

/// Mamba-2's settings, resolved: what `config.json` leaves out has the value that `transformers`
/// gives it.
#[derive(Clone, Debug, PartialEq)]
pub struct Mamba2Config {
    /// Tokens in the vocabulary.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Blocks.
    pub num_hidden_layers: usize,
    /// Heads of the recurrence.
    pub num_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// Groups of heads that share what enters and leaves the state.
    pub n_groups: usize,
    /// States per channel.
    pub state_size: usize,
    /// Positions that the convolution sees.
    pub conv_kernel: usize,
    /// The smallest and the largest step size; the latter may be infinite.
    pub time_step_limit: [f64; 2],
    /// Added to the mean square in RMS norms.
    pub layer_norm_epsilon: f64,
    /// Activation after the convolution.
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
    num_heads: usize,
    head_dim: usize,
    n_groups: usize,
    state_size: usize,
    expand: f64,
    conv_kernel: usize,
    time_step_limit: [Float; 2],
    layer_norm_epsilon: f64,
    #[serde(with = "check::activation")]
    hidden_act: Activation,
    use_bias: bool,
    use_conv_bias: bool,
    tie_word_embeddings: bool,
}

impl Fields {
    fn defaults() -> Self {
        Self {
            vocab_size: 32768,
            hidden_size: 4096,
            num_hidden_layers: 64,
            num_heads: 128,
            head_dim: 64,
            n_groups: 8,
            state_size: 128,
            expand: 2.0,
            conv_kernel: 4,
            time_step_limit: [Float::from(0.0), Float::from(f64::INFINITY)],
            layer_norm_epsilon: 1e-5,
            hidden_act: Activation::Silu,
            use_bias: false,
            use_conv_bias: true,
            tie_word_embeddings: false,
        }
    }
}

impl Mamba2Config {
    pub(super) fn new(fields: &Map<String, Value>, check: &Check) -> Result<Self, ConfigError> {
        let read = overlay(Fields::defaults(), &[], fields, check)?;
        check.positive("expand", read.expand)?;
        // A conversion from floating point saturates, and the range is checked below.
        let inner = (read.expand * read.hidden_size as f64) as usize;
        let config = Self {
            vocab_size: read.vocab_size,
            hidden_size: read.hidden_size,
            num_hidden_layers: read.num_hidden_layers,
            num_heads: read.num_heads,
            head_dim: read.head_dim,
            n_groups: read.n_groups,
            state_size: read.state_size,
            conv_kernel: read.conv_kernel,
            time_step_limit: read.time_step_limit.map(f64::from),
            layer_norm_epsilon: read.layer_norm_epsilon,
            hidden_act: read.hidden_act,
            use_bias: read.use_bias,
            use_conv_bias: read.use_conv_bias,
            tie_word_embeddings: read.tie_word_embeddings,
        };
        check.between("vocab_size", config.vocab_size, check::VOCABULARY)?;
        check.between("hidden_size", config.hidden_size, check::WIDTH)?;
        check.between("expand times hidden_size", inner, check::INNER_WIDTH)?;
        check.between("num_hidden_layers", config.num_hidden_layers, check::LAYERS)?;
        check.between("num_heads", config.num_heads, check::HEADS)?;
        check.between("head_dim", config.head_dim, check::WIDTH)?;
        check.between("state_size", config.state_size, 1..=1 << 16)?;
        check.between("conv_kernel", config.conv_kernel, 1..=1 << 10)?;
        check.epsilon("layer_norm_epsilon", config.layer_norm_epsilon)?;
        if config.intermediate_size() != inner {
            return Err(check.wrong(
                "num_heads times head_dim",
                config.intermediate_size(),
                format!("expand times hidden_size, {inner}"),
            ));
        }
        if config.n_groups == 0 || !config.num_heads.is_multiple_of(config.n_groups) {
            let expected = format!("a divisor of num_heads, {}", config.num_heads);
            return Err(check.wrong("n_groups", config.n_groups, expected));
        }
        let [smallest, largest] = config.time_step_limit;
        if !(smallest >= 0.0 && smallest.is_finite() && largest >= smallest) {
            return Err(check.wrong(
                "time_step_limit",
                format!("[{smallest}, {largest}]"),
                "two numbers of at least 0, the first finite and at most the second",
            ));
        }
        Ok(config)
    }

    /// Width of the mixer.
    pub fn intermediate_size(&self) -> usize {
        self.num_heads * self.head_dim
    }

    pub(super) fn matrix_parameters(&self) -> u128 {
        let [
            vocabulary,
            width,
            layers,
            inner,
            heads,
            groups,
            states,
            kernel,
        ] = [
            self.vocab_size,
            self.hidden_size,
            self.num_hidden_layers,
            self.intermediate_size(),
            self.num_heads,
            self.n_groups,
            self.state_size,
            self.conv_kernel,
        ]
        .map(|size| size as u128);
        let convolved = inner + 2 * groups * states;
        let projections = width * (2 * inner + convolved + heads);
        vocabulary * width + layers * (projections + convolved * kernel)
    }
}
