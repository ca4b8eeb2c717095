//! CLIP (Radford et al., arXiv 2103.00020): a text tower and a vision tower, each ending in a
//! projection to the same space.

use super::{Layout, NameTable, Tower, activation};
use crate::Result;
use crate::huggingface::config::{ClipConfig, ClipTextConfig, ClipVisionConfig};
use crate::spec::{AbsolutePosition, HeadSpec, InputSpec, ModelSpec, PatchInput, Pool, TokenInput};
use lapidary_kernels::Activation;
use lapidary_parts::attention::{MixerSpec, MultiHeadSpec};
use lapidary_parts::block::{BlockSpec, Wiring};
use lapidary_parts::feedforward::{DenseSpec, FeedforwardSpec};
use lapidary_parts::norm::NormSpec;

pub(super) fn towers(config: &ClipConfig) -> Result<Vec<Tower>> {
    Ok(vec![
        text(&config.text_config, config.projection_dim)?,
        vision(&config.vision_config, config.projection_dim)?,
    ])
}

fn block(
    layers: usize,
    heads: usize,
    causal: bool,
    hidden: usize,
    act: Activation,
    norm: NormSpec,
) -> Result<BlockSpec> {
    Ok(BlockSpec {
        repeat: layers,
        wiring: Wiring::PreNorm,
        norm,
        attention: MixerSpec::MultiHead(MultiHeadSpec {
            causal,
            ..MultiHeadSpec::new(heads)
        }),
        cross_attention: None,
        shared: false,
        layer_scale: None,
        drop_path: 0.0,
        dropout_by_feature: false,
        coding_step: None,
        shortcuts: false,
        feedforward: Some(FeedforwardSpec::Dense(DenseSpec {
            hidden,
            activation: activation(act, "hidden_act")?,
            bias: true,
        })),
        dropout: 0.0,
    })
}

fn block_names(table: &mut NameTable, prefix: &str, layers: usize) {
    for index in 0..layers {
        let (key, path) = (
            format!("{prefix}encoder.layers.{index}"),
            format!("blocks.{index}"),
        );
        for (stored, part) in [
            ("self_attn.q_proj", "attention.query"),
            ("self_attn.k_proj", "attention.key"),
            ("self_attn.v_proj", "attention.value"),
            ("self_attn.out_proj", "attention.output"),
            ("layer_norm1", "attention_norm"),
            ("layer_norm2", "feedforward_norm"),
            ("mlp.fc1", "feedforward.up"),
            ("mlp.fc2", "feedforward.down"),
        ] {
            table.layer(&format!("{key}.{stored}"), &format!("{path}.{part}"), true);
        }
    }
}

fn text(config: &ClipTextConfig, projection: usize) -> Result<Tower> {
    let norm = NormSpec::Layer {
        epsilon: config.layer_norm_eps,
    };
    let spec = ModelSpec {
        width: config.hidden_size,
        input: InputSpec::Tokens(TokenInput {
            vocabulary: config.vocab_size,
            length: config.max_position_embeddings,
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
        blocks: vec![block(
            config.num_hidden_layers,
            config.num_attention_heads,
            true,
            config.intermediate_size,
            config.hidden_act,
            norm,
        )?],
        final_norm: Some(norm),
        head: HeadSpec::Pooled {
            // Configs from before the end token was recorded correctly say 2; their tokenizer's
            // end token is the highest id.
            pool: match config.eos_token_id {
                2 => Pool::HighestId,
                id => Pool::AtToken(id),
            },
            norm: None,
            hidden: None,
            labels: Some(projection),
            bias: false,
        },
        low_rank: Default::default(),
        quantised: Default::default(),
        organisation: None,
        initial: Default::default(),
    };
    let mut table = NameTable::new(&[]);
    table.same(
        "text_model.embeddings.token_embedding.weight",
        "embeddings.tokens.weight",
    );
    table.same(
        "text_model.embeddings.position_embedding.weight",
        "embeddings.positions.weight",
    );
    block_names(&mut table, "text_model.", config.num_hidden_layers);
    table.layer("text_model.final_layer_norm", "final_norm", true);
    table.same("text_projection.weight", "head.output.weight");
    Ok(Tower {
        name: "text",
        spec,
        table,
    })
}

fn vision(config: &ClipVisionConfig, projection: usize) -> Result<Tower> {
    let norm = NormSpec::Layer {
        epsilon: config.layer_norm_eps,
    };
    let [patch, patch_width] = config.patch_size.sides();
    if patch != patch_width {
        let expected = "square patches";
        return Err(
            lapidary_parts::Error::spec("patch_size", [patch, patch_width], expected).into(),
        );
    }
    let width = config.hidden_size;
    let channels = config.num_channels;
    let spec = ModelSpec {
        width,
        input: InputSpec::Patches(PatchInput {
            image: config.image_size.sides(),
            patch,
            channels,
            class_tokens: 1,
            bias: false,
            around: None,
            norm: Some(norm),
            deviation: PatchInput::DEVIATION,
            position: Default::default(),
            mask_token: false,
            resized: false,
        }),
        blocks: vec![block(
            config.num_hidden_layers,
            config.num_attention_heads,
            false,
            config.intermediate_size,
            config.hidden_act,
            norm,
        )?],
        final_norm: None,
        head: HeadSpec::Pooled {
            pool: Pool::First,
            norm: Some(norm),
            hidden: None,
            labels: Some(projection),
            bias: false,
        },
        low_rank: Default::default(),
        quantised: Default::default(),
        organisation: None,
        initial: Default::default(),
    };
    let mut table = NameTable::new(&[]);
    table.add(
        "vision_model.embeddings.class_embedding",
        &["embeddings.class_tokens"],
        Layout::Row {
            row: 0,
            rows: 1,
            shape: vec![width],
        },
    );
    table.add(
        "vision_model.embeddings.patch_embedding.weight",
        &["embeddings.patches.weight"],
        Layout::Reshaped(vec![width, channels, patch, patch]),
    );
    table.same(
        "vision_model.embeddings.position_embedding.weight",
        "embeddings.positions.weight",
    );
    table.layer("vision_model.pre_layrnorm", "embeddings.norm", true);
    block_names(&mut table, "vision_model.", config.num_hidden_layers);
    table.layer("vision_model.post_layernorm", "head.norm", true);
    table.same("visual_projection.weight", "head.output.weight");
    Ok(Tower {
        name: "vision",
        spec,
        table,
    })
}
