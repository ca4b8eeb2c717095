//! Mamba-2 (Dao & Gu, arXiv 2405.21060).

use super::{Architecture, NameTable, Tower, activation};
use crate::Result;
use crate::huggingface::config::Mamba2Config;
use crate::spec::{AbsolutePosition, HeadSpec, InputSpec, ModelSpec, TokenInput};
use lapidary_parts::attention::MixerSpec;
use lapidary_parts::block::{BlockSpec, Wiring};
use lapidary_parts::norm::NormSpec;
use lapidary_parts::recurrent::Mamba2Spec;

/// A recurrence has no longest input; this only bounds what is allocated at once.
const LENGTH: usize = 1 << 20;

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
    let block = BlockSpec {
        repeat: config.num_hidden_layers,
        wiring: Wiring::PreNorm,
        norm,
        attention: MixerSpec::Mamba2(mixer),
        cross_attention: None,
        shared: false,
        layer_scale: None,
        drop_path: 0.0,
        shortcuts: false,
        feedforward: None,
        dropout: 0.0,
    };
    let spec = ModelSpec {
        width: config.hidden_size,
        input: InputSpec::Tokens(TokenInput {
            vocabulary: config.vocab_size,
            length: LENGTH,
            position: AbsolutePosition::None,
            token_types: 0,
            norm: None,
            embedding_width: None,
            projected: Default::default(),
            dropout: 0.0,
        }),
        blocks: vec![block],
        final_norm: Some(norm),
        head: if language_model {
            HeadSpec::LanguageModel {
                tied: config.tie_word_embeddings,
                bias: false,
                transform: None,
            }
        } else {
            HeadSpec::None
        },
        low_rank: Default::default(),
        quantised: Default::default(),
        organisation: None,
    };
    let prefix = if language_model { "backbone." } else { "" };
    let mut table = NameTable::new(&["backbone."]);
    table.same(
        &format!("{prefix}embeddings.weight"),
        "embeddings.tokens.weight",
    );
    for index in 0..config.num_hidden_layers {
        let (key, path) = (
            format!("{prefix}layers.{index}.mixer"),
            format!("blocks.{index}.attention"),
        );
        table.layer(
            &format!("{prefix}layers.{index}.norm"),
            &format!("blocks.{index}.attention_norm"),
            false,
        );
        table.layer(
            &format!("{key}.in_proj"),
            &format!("{path}.input"),
            config.use_bias,
        );
        table.same(
            &format!("{key}.conv1d.weight"),
            &format!("{path}.convolution.weight"),
        );
        if config.use_conv_bias {
            table.same(
                &format!("{key}.conv1d.bias"),
                &format!("{path}.convolution.bias"),
            );
        }
        for (theirs, ours) in [
            ("dt_bias", "step_bias"),
            ("A_log", "decay_log"),
            ("D", "skip"),
            ("norm.weight", "norm.weight"),
        ] {
            table.same(&format!("{key}.{theirs}"), &format!("{path}.{ours}"));
        }
        table.layer(
            &format!("{key}.out_proj"),
            &format!("{path}.output"),
            config.use_bias,
        );
    }
    table.layer(&format!("{prefix}norm_f"), "final_norm", false);
    if language_model && !config.tie_word_embeddings {
        table.same("lm_head.weight", "head.output.weight");
    }
    Ok(Tower {
        name: "",
        spec,
        table,
    })
}
