//! Mamba (Gu & Dao, arXiv 2312.00752).

use super::recurrent::Recurrent;
use super::{Architecture, Tower, activation};
use crate::Result;
use crate::huggingface::config::MambaConfig;
use lapidary_parts::attention::MixerSpec;
use lapidary_parts::norm::NormSpec;
use lapidary_parts::recurrent::MambaSpec;

pub(super) fn tower(config: &MambaConfig, architecture: &Architecture<'_>) -> Result<Tower> {
    let language_model = match architecture.name {
        "MambaForCausalLM" | "" => true,
        "MambaModel" => false,
        _ => return Err(architecture.wrong("MambaForCausalLM or MambaModel")),
    };
    let norm = NormSpec::Rms {
        epsilon: config.layer_norm_epsilon,
    };
    let mixer = MambaSpec {
        inner: Some(config.intermediate_size),
        state: config.state_size,
        taps: config.conv_kernel,
        step_rank: Some(config.time_step_rank),
        activation: activation(config.hidden_act, "hidden_act")?,
        bias: config.use_bias,
        convolution_bias: config.use_conv_bias,
        scan: true,
    };
    let model = Recurrent {
        vocabulary: config.vocab_size,
        width: config.hidden_size,
        blocks: config.num_hidden_layers,
        norm,
        mixer: MixerSpec::Mamba(mixer),
        bias: config.use_bias,
        convolution_bias: config.use_conv_bias,
        language_model,
        tied: config.tie_word_embeddings,
    };
    Ok(model.tower(|table, key, path| {
        table.layer(
            &format!("{key}.x_proj"),
            &format!("{path}.selection"),
            false,
        );
        table.layer(&format!("{key}.dt_proj"), &format!("{path}.step"), true);
        table.same(&format!("{key}.A_log"), &format!("{path}.decay_log"));
        table.same(&format!("{key}.D"), &format!("{path}.skip"));
    }))
}
