//! OPT (Zhang et al., arXiv 2205.01068). Positions skip padding and start at row 2.

use super::{Architecture, NameTable, Tower, activation};
use crate::Result;
use crate::huggingface::config::OptConfig;
use crate::spec::{AbsolutePosition, HeadSpec, InputSpec, ModelSpec, TokenInput};
use lapidary_parts::attention::{MixerSpec, MultiHeadSpec};
use lapidary_parts::block::{BlockSpec, Wiring};
use lapidary_parts::feedforward::{DenseSpec, FeedforwardSpec};
use lapidary_parts::norm::NormSpec;

pub(super) fn tower(config: &OptConfig, architecture: &Architecture<'_>) -> Result<Tower> {
    let language_model = match architecture.name {
        "OPTForCausalLM" | "" => true,
        "OPTModel" => false,
        _ => return Err(architecture.wrong("OPTForCausalLM or OPTModel")),
    };
    if !config.layer_norm_elementwise_affine {
        let expected = "true: norms without parameters are not stored by any published OPT";
        return Err(
            lapidary_parts::Error::spec("layer_norm_elementwise_affine", false, expected).into(),
        );
    }
    let norm = NormSpec::Layer { epsilon: 1e-5 };
    let bias = config.enable_bias;
    let block = BlockSpec {
        repeat: config.num_hidden_layers,
        wiring: if config.do_layer_norm_before {
            Wiring::PreNorm
        } else {
            Wiring::PostNorm
        },
        norm,
        attention: MixerSpec::MultiHead(MultiHeadSpec {
            causal: true,
            bias,
            ..MultiHeadSpec::new(config.num_attention_heads)
        }),
        cross_attention: None,
        shared: false,
        layer_scale: None,
        drop_path: 0.0,
        dropout_by_feature: false,
        coding_step: None,
        shortcuts: false,
        feedforward: Some(FeedforwardSpec::Dense(DenseSpec {
            hidden: config.ffn_dim,
            activation: activation(config.activation_function, "activation_function")?,
            bias,
        })),
        dropout: 0.0,
    };
    let final_norm = config.do_layer_norm_before && !config.remove_final_layer_norm;
    let projected = config.word_embed_proj_dim != config.hidden_size;
    let head = if language_model {
        HeadSpec::LanguageModel {
            tied: config.tie_word_embeddings,
            bias: false,
            transform: None,
        }
    } else {
        HeadSpec::None
    };
    let spec = ModelSpec {
        width: config.hidden_size,
        input: InputSpec::Tokens(TokenInput {
            vocabulary: config.vocab_size,
            length: config.max_position_embeddings,
            position: AbsolutePosition::Learned {
                offset: 2,
                skip_padding: true,
            },
            token_types: 0,
            norm: None,
            embedding_width: projected.then_some(config.word_embed_proj_dim),
            projected: Default::default(),
            dropout: 0.0,
            dropout_by_feature: false,
        }),
        blocks: vec![block],
        final_norm: final_norm.then_some(norm),
        head,
        low_rank: Default::default(),
        quantised: Default::default(),
        organisation: None,
        initial: Default::default(),
    };
    let prefix = if language_model {
        "model.decoder."
    } else {
        "decoder."
    };
    let mut table = NameTable::new(&["model.", "model.decoder."]);
    table.same(
        &format!("{prefix}embed_tokens.weight"),
        "embeddings.tokens.weight",
    );
    table.same(
        &format!("{prefix}embed_positions.weight"),
        "embeddings.positions.weight",
    );
    if projected {
        table.same(
            &format!("{prefix}project_in.weight"),
            "embeddings.projection.weight",
        );
        if language_model {
            table.same(
                &format!("{prefix}project_out.weight"),
                "head.projection.weight",
            );
        }
    }
    for index in 0..config.num_hidden_layers {
        let (key, path) = (format!("{prefix}layers.{index}"), format!("blocks.{index}"));
        for (stored, part) in [
            ("self_attn.q_proj", "attention.query"),
            ("self_attn.k_proj", "attention.key"),
            ("self_attn.v_proj", "attention.value"),
            ("self_attn.out_proj", "attention.output"),
            ("fc1", "feedforward.up"),
            ("fc2", "feedforward.down"),
        ] {
            table.layer(&format!("{key}.{stored}"), &format!("{path}.{part}"), bias);
        }
        table.layer(
            &format!("{key}.self_attn_layer_norm"),
            &format!("{path}.attention_norm"),
            true,
        );
        table.layer(
            &format!("{key}.final_layer_norm"),
            &format!("{path}.feedforward_norm"),
            true,
        );
    }
    if final_norm {
        table.layer(&format!("{prefix}final_layer_norm"), "final_norm", true);
    }
    if language_model && !config.tie_word_embeddings {
        table.same("lm_head.weight", "head.output.weight");
    }
    Ok(Tower {
        name: "",
        spec,
        table,
    })
}
