//! GPT-2 (Radford et al., 2019). Its linear layers are stored as `[input, output]`, and query,
//! key and value as one.

use super::{Architecture, Layout, NameTable, Tower, activation};
use crate::Result;
use crate::huggingface::config::Gpt2Config;
use crate::spec::{AbsolutePosition, HeadSpec, InputSpec, ModelSpec, TokenInput};
use lapidary_parts::attention::{MixerSpec, MultiHeadSpec};
use lapidary_parts::block::{BlockSpec, Wiring};
use lapidary_parts::feedforward::{DenseSpec, FeedforwardSpec};
use lapidary_parts::norm::NormSpec;

pub(super) fn tower(config: &Gpt2Config, architecture: &Architecture<'_>) -> Result<Tower> {
    let width = config.n_embd;
    let norm = NormSpec::Layer {
        epsilon: config.layer_norm_epsilon,
    };
    let language_model = match architecture.name {
        "GPT2LMHeadModel" | "" => true,
        "GPT2Model" => false,
        _ => return Err(architecture.wrong("GPT2LMHeadModel or GPT2Model")),
    };
    let hidden = config.inner_width();
    let head_width = width / config.n_head;
    let blocks = (0..config.n_layer)
        .map(|index| {
            let mut attention = MultiHeadSpec {
                causal: true,
                ..MultiHeadSpec::new(config.n_head)
            };
            let scale = if config.scale_attn_weights {
                1.0 / (head_width as f64).sqrt()
            } else {
                1.0
            };
            if config.scale_attn_by_inverse_layer_idx {
                attention.scale = Some(scale / (index + 1) as f64);
            } else if !config.scale_attn_weights {
                attention.scale = Some(1.0);
            }
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
                feedforward: Some(FeedforwardSpec::Dense(DenseSpec {
                    hidden,
                    activation: activation(config.activation_function, "activation_function")?,
                    bias: true,
                })),
                dropout: 0.0,
            })
        })
        .collect::<Result<Vec<_>>>()?;
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
        width,
        input: InputSpec::Tokens(TokenInput {
            vocabulary: config.vocab_size,
            length: config.n_positions,
            position: AbsolutePosition::Learned {
                offset: 0,
                skip_padding: false,
            },
            token_types: 0,
            norm: None,
            embedding_width: None,
            projected: Default::default(),
            dropout: 0.0,
            dropout_by_feature: false,
        }),
        blocks,
        final_norm: Some(norm),
        head,
        low_rank: Default::default(),
        quantised: Default::default(),
        organisation: None,
        initial: Default::default(),
    };
    let prefix = if language_model { "transformer." } else { "" };
    let mut table = NameTable::new(&["transformer."]);
    table.same(&format!("{prefix}wte.weight"), "embeddings.tokens.weight");
    table.same(
        &format!("{prefix}wpe.weight"),
        "embeddings.positions.weight",
    );
    for index in 0..config.n_layer {
        let (key, path) = (format!("{prefix}h.{index}"), format!("blocks.{index}"));
        table.layer(
            &format!("{key}.ln_1"),
            &format!("{path}.attention_norm"),
            true,
        );
        table.layer(
            &format!("{key}.ln_2"),
            &format!("{path}.feedforward_norm"),
            true,
        );
        let weights = ["query", "key", "value"].map(|n| format!("{path}.attention.{n}.weight"));
        let biases = ["query", "key", "value"].map(|n| format!("{path}.attention.{n}.bias"));
        table.add(
            format!("{key}.attn.c_attn.weight"),
            &weights.each_ref().map(String::as_str),
            Layout::StackedTransposed(vec![width; 3]),
        );
        table.add(
            format!("{key}.attn.c_attn.bias"),
            &biases.each_ref().map(String::as_str),
            Layout::Stacked(vec![width; 3]),
        );
        for (stored, part) in [
            ("attn.c_proj", "attention.output"),
            ("mlp.c_fc", "feedforward.up"),
            ("mlp.c_proj", "feedforward.down"),
        ] {
            let weight = format!("{path}.{part}.weight");
            table.add(
                format!("{key}.{stored}.weight"),
                &[&weight],
                Layout::Transposed,
            );
            table.same(
                &format!("{key}.{stored}.bias"),
                &format!("{path}.{part}.bias"),
            );
        }
    }
    table.layer(&format!("{prefix}ln_f"), "final_norm", true);
    if language_model && !config.tie_word_embeddings {
        table.same("lm_head.weight", "head.output.weight");
    }
    Ok(Tower {
        name: "",
        spec,
        table,
    })
}
