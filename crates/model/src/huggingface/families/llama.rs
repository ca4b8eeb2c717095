//! Llama (Touvron et al., arXiv 2302.13971) and what is built like it: Mistral, Qwen2, Mixtral
//! and OLMoE.

use super::{Architecture, NameTable, Tower, activation};
use crate::Result;
use crate::huggingface::config::{LlamaConfig, LlamaKind, RopeScaling};
use crate::spec::{AbsolutePosition, HeadSpec, InputSpec, ModelSpec, TokenInput};
use lapidary_parts::attention::{MixerSpec, MultiHeadSpec, QueryKeyNorm};
use lapidary_parts::block::{BlockSpec, Wiring};
use lapidary_parts::feedforward::{FeedforwardSpec, GatedSpec, MixtureSpec};
use lapidary_parts::norm::NormSpec;
use lapidary_parts::position::{PositionSpec, RotaryScaling, RotarySpec};

pub(super) fn tower(config: &LlamaConfig, architecture: &Architecture<'_>) -> Result<Tower> {
    let language_model =
        if architecture.name.is_empty() || architecture.name.ends_with("ForCausalLM") {
            true
        } else if architecture.name.ends_with("Model") {
            false
        } else {
            return Err(architecture.wrong("a causal language model or a bare model"));
        };
    if let Some(clip) = config.clip_qkv {
        let expected = "absent: clipped queries, keys and values are not supported";
        return Err(lapidary_parts::Error::spec("clip_qkv", clip, expected).into());
    }
    let norm = NormSpec::Rms {
        epsilon: config.rms_norm_eps,
    };
    let scaling = match config.rope.scaling {
        RopeScaling::None => RotaryScaling::None,
        RopeScaling::Linear { factor } => RotaryScaling::Linear { factor },
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } => RotaryScaling::Llama3 {
            factor,
            low_frequency_factor: low_freq_factor,
            high_frequency_factor: high_freq_factor,
            original_length: original_max_position_embeddings,
        },
    };
    let whole_norm = config.kind == LlamaKind::Olmoe;
    let blocks = (0..config.num_hidden_layers)
        .map(|index| {
            let attention = MultiHeadSpec {
                groups: Some(config.num_key_value_heads),
                head_width: Some(config.head_dim),
                causal: true,
                window: config.windows.get(index).copied().flatten(),
                bias: config.query_key_value_bias,
                output_bias: Some(config.attention_output_bias),
                position: PositionSpec::Rotary(RotarySpec {
                    theta: config.rope.theta,
                    scaling: scaling.clone(),
                    ..RotarySpec::default()
                }),
                query_key_norm: whole_norm.then_some(QueryKeyNorm {
                    norm,
                    per_head: false,
                }),
                ..MultiHeadSpec::new(config.num_attention_heads)
            };
            let act = activation(config.hidden_act, "hidden_act")?;
            let feedforward = match &config.experts {
                Some(experts) => FeedforwardSpec::Mixture(MixtureSpec {
                    hidden: config.intermediate_size,
                    experts: experts.num_experts,
                    active: experts.num_experts_per_tok,
                    activation: act,
                    normalise: experts.norm_topk_prob,
                }),
                None => FeedforwardSpec::Gated(GatedSpec {
                    hidden: config.intermediate_size,
                    activation: act,
                    bias: config.mlp_bias,
                }),
            };
            Ok(BlockSpec {
                repeat: 1,
                wiring: Wiring::PreNorm,
                norm,
                attention: MixerSpec::MultiHead(attention),
                cross_attention: None,
                shared: false,
                layer_scale: None,
                drop_path: 0.0,
                dropout_by_feature: false,
                coding_step: None,
                shortcuts: false,
                feedforward: Some(feedforward),
                dropout: 0.0,
            })
        })
        .collect::<Result<Vec<_>>>()?;
    let spec = ModelSpec {
        width: config.hidden_size,
        input: InputSpec::Tokens(TokenInput {
            vocabulary: config.vocab_size,
            length: config.max_position_embeddings,
            position: AbsolutePosition::None,
            token_types: 0,
            norm: None,
            embedding_width: None,
            projected: Default::default(),
            dropout: 0.0,
            dropout_by_feature: false,
        }),
        blocks,
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
        initial: Default::default(),
    };
    let prefix = if language_model { "model." } else { "" };
    Ok(Tower {
        name: "",
        spec,
        table: names(config, prefix, language_model),
    })
}

fn names(config: &LlamaConfig, prefix: &str, language_model: bool) -> NameTable {
    let mut table = NameTable::new(&["model."]);
    table.same(
        &format!("{prefix}embed_tokens.weight"),
        "embeddings.tokens.weight",
    );
    for index in 0..config.num_hidden_layers {
        let (key, path) = (format!("{prefix}layers.{index}"), format!("blocks.{index}"));
        let bias = config.query_key_value_bias;
        for (stored, part, bias) in [
            ("self_attn.q_proj", "attention.query", bias),
            ("self_attn.k_proj", "attention.key", bias),
            ("self_attn.v_proj", "attention.value", bias),
            (
                "self_attn.o_proj",
                "attention.output",
                config.attention_output_bias,
            ),
            ("input_layernorm", "attention_norm", false),
            ("post_attention_layernorm", "feedforward_norm", false),
        ] {
            table.layer(&format!("{key}.{stored}"), &format!("{path}.{part}"), bias);
        }
        if config.kind == LlamaKind::Olmoe {
            table.layer(
                &format!("{key}.self_attn.q_norm"),
                &format!("{path}.attention.query_norm"),
                false,
            );
            table.layer(
                &format!("{key}.self_attn.k_norm"),
                &format!("{path}.attention.key_norm"),
                false,
            );
        }
        let Some(experts) = &config.experts else {
            for (stored, part) in [
                ("gate_proj", "gate"),
                ("up_proj", "up"),
                ("down_proj", "down"),
            ] {
                let path = format!("{path}.feedforward.{part}");
                table.layer(&format!("{key}.mlp.{stored}"), &path, config.mlp_bias);
            }
            continue;
        };
        // Mixtral and OLMoE name the same three matrices differently.
        let (module, names) = match config.kind {
            LlamaKind::Mixtral => ("block_sparse_moe", ["w1", "w3", "w2"]),
            _ => ("mlp", ["gate_proj", "up_proj", "down_proj"]),
        };
        table.layer(
            &format!("{key}.{module}.gate"),
            &format!("{path}.feedforward.router"),
            false,
        );
        for expert in 0..experts.num_experts {
            for (stored, part) in names.iter().zip(["gate", "up", "down"]) {
                table.layer(
                    &format!("{key}.{module}.experts.{expert}.{stored}"),
                    &format!("{path}.feedforward.experts.{expert}.{part}"),
                    false,
                );
            }
        }
    }
    table.layer(&format!("{prefix}norm"), "final_norm", false);
    if language_model && !config.tie_word_embeddings {
        table.same("lm_head.weight", "head.output.weight");
    }
    table
}
