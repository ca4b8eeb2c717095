//! Mamba-2 (Dao & Gu, arXiv 2405.21060).

use super::recurrent::Recurrent;
use super::{Architecture, Tower, activation};
use crate::Result;
use crate::huggingface::config::Mamba2Config;
use lapidary_parts::attention::MixerSpec;
use lapidary_parts::norm::NormSpec;
use lapidary_parts::recurrent::Mamba2Spec;

pub(super) fn tower(config: &Mamba2Config, architecture: &Architecture<'_>) -> Result<Tower> {
    let language_model = match architecture.name {
        "Mamba2ForCausalLM" | "" => true,
        "Mamba2Model" => false,
        _ => return Err(architecture.wrong("Mamba2ForCausalLM or Mamba2Model")),
    };
    let norm = NormSpec::Rms {
        epsilon: config.layer_norm_epsilon,
    };
    let [smallest, largest] = config.time_step_limit;
    let mixer = Mamba2Spec {
        inner: Some(config.intermediate_size()),
        head_width: config.head_dim,
        groups: config.n_groups,
        state: config.state_size,
        taps: config.conv_kernel,
        activation: activation(config.hidden_act, "hidden_act")?,
        norm,
        smallest_step: (smallest > 0.0).then_some(smallest),
        largest_step: largest.is_finite().then_some(largest),
        bias: config.use_bias,
        convolution_bias: config.use_conv_bias,
        ..Mamba2Spec::default()
    };
    let model = Recurrent {
        vocabulary: config.vocab_size,
        width: config.hidden_size,
        blocks: config.num_hidden_layers,
        norm,
        mixer: MixerSpec::Mamba2(mixer),
        bias: config.use_bias,
        convolution_bias: config.use_conv_bias,
        language_model,
        tied: config.tie_word_embeddings,
    };
    Ok(model.tower(|table, key, path| {
        for (theirs, ours) in [
            ("dt_bias", "step_bias"),
            ("A_log", "decay_log"),
            ("D", "skip"),
            ("norm.weight", "norm.weight"),
        ] {
            table.same(&format!("{key}.{theirs}"), &format!("{path}.{ours}"));
        }
    }))
}
