//! ViT (Dosovitskiy et al., arXiv 2010.11929) and DeiT (Touvron et al., arXiv 2012.12877), which
//! has a distillation token beside the class token.

use super::{Architecture, Layout, NameTable, Tower, activation};
use crate::Result;
use crate::huggingface::config::{VitConfig, VitKind};
use crate::spec::{HeadSpec, InputSpec, ModelSpec, PatchInput, Pool};
use lapidary_parts::attention::{MixerSpec, MultiHeadSpec};
use lapidary_parts::block::{BlockSpec, Wiring};
use lapidary_parts::feedforward::{DenseSpec, FeedforwardSpec};
use lapidary_parts::norm::NormSpec;

enum Kind {
    Bare { pooler: bool },
    Classifier,
    WithTeacher,
}

pub(super) fn tower(config: &VitConfig, architecture: &Architecture<'_>) -> Result<Tower> {
    let kind = match architecture.name {
        "ViTModel" | "DeiTModel" | "" => Kind::Bare {
            pooler: architecture.holds("pooler.dense.weight"),
        },
        "ViTForImageClassification" | "DeiTForImageClassification" => Kind::Classifier,
        "DeiTForImageClassificationWithTeacher" => Kind::WithTeacher,
        _ => return Err(architecture.wrong("a bare model or ForImageClassification")),
    };
    let image = config.image_size.sides();
    let [patch, patch_width] = config.patch_size.sides();
    if patch != patch_width {
        let expected = "square patches";
        return Err(
            lapidary_parts::Error::spec("patch_size", [patch, patch_width], expected).into(),
        );
    }
    let norm = NormSpec::Layer {
        epsilon: config.layer_norm_eps,
    };
    let block = BlockSpec {
        repeat: config.num_hidden_layers,
        wiring: Wiring::PreNorm,
        norm,
        attention: MixerSpec::MultiHead(MultiHeadSpec {
            bias: config.qkv_bias,
            output_bias: Some(true),
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
            hidden: config.intermediate_size,
            activation: activation(config.hidden_act, "hidden_act")?,
            bias: true,
        })),
        dropout: 0.0,
    };
    let head = match kind {
        Kind::Bare { pooler: false } => HeadSpec::None,
        Kind::Bare { pooler: true } => HeadSpec::Pooled {
            pool: Pool::First,
            norm: None,
            hidden: Some(activation(config.pooler_act, "pooler_act")?),
            labels: None,
            bias: true,
        },
        Kind::Classifier => HeadSpec::Pooled {
            pool: Pool::First,
            norm: None,
            hidden: None,
            labels: Some(architecture.rows("classifier.weight")?),
            bias: true,
        },
        Kind::WithTeacher => HeadSpec::Pooled {
            pool: Pool::FirstTwo,
            norm: None,
            hidden: None,
            labels: Some(architecture.rows("cls_classifier.weight")?),
            bias: true,
        },
    };
    let input = PatchInput {
        image,
        patch,
        channels: config.num_channels,
        class_tokens: config.prefix_tokens(),
        bias: true,
        around: None,
        norm: None,
        deviation: PatchInput::DEVIATION,
        position: Default::default(),
        mask_token: false,
        resized: false,
    };
    let table = names(config, &kind, &input);
    let spec = ModelSpec {
        width: config.hidden_size,
        input: InputSpec::Patches(input),
        blocks: vec![block],
        final_norm: Some(norm),
        head,
        low_rank: Default::default(),
        quantised: Default::default(),
        organisation: None,
        initial: Default::default(),
    };
    Ok(Tower {
        name: "",
        spec,
        table,
    })
}

fn names(config: &VitConfig, kind: &Kind, input: &PatchInput) -> NameTable {
    let base = match config.kind {
        VitKind::Vit => "vit.",
        VitKind::Deit => "deit.",
    };
    let prefix = if matches!(kind, Kind::Bare { .. }) {
        ""
    } else {
        base
    };
    let width = config.hidden_size;
    let mut table = NameTable::new(&[base]);
    let embeddings = format!("{prefix}embeddings");
    let tokens = ["cls_token", "distillation_token"];
    for (row, stored) in tokens.iter().take(input.class_tokens).enumerate() {
        table.add(
            format!("{embeddings}.{stored}"),
            &["embeddings.class_tokens"],
            Layout::Row {
                row,
                rows: input.class_tokens,
                shape: vec![1, 1, width],
            },
        );
    }
    table.add(
        format!("{embeddings}.patch_embeddings.projection.weight"),
        &["embeddings.patches.weight"],
        Layout::Reshaped(vec![width, input.channels, input.patch, input.patch]),
    );
    table.same(
        &format!("{embeddings}.patch_embeddings.projection.bias"),
        "embeddings.patches.bias",
    );
    table.add(
        format!("{embeddings}.position_embeddings"),
        &["embeddings.positions.weight"],
        Layout::Reshaped(vec![1, input.patches() + input.class_tokens, width]),
    );
    for index in 0..config.num_hidden_layers {
        let (key, path) = (
            format!("{prefix}encoder.layer.{index}"),
            format!("blocks.{index}"),
        );
        for (stored, part, bias) in [
            (
                "attention.attention.query",
                "attention.query",
                config.qkv_bias,
            ),
            ("attention.attention.key", "attention.key", config.qkv_bias),
            (
                "attention.attention.value",
                "attention.value",
                config.qkv_bias,
            ),
            ("attention.output.dense", "attention.output", true),
            ("layernorm_before", "attention_norm", true),
            ("layernorm_after", "feedforward_norm", true),
            ("intermediate.dense", "feedforward.up", true),
            ("output.dense", "feedforward.down", true),
        ] {
            table.layer(&format!("{key}.{stored}"), &format!("{path}.{part}"), bias);
        }
    }
    table.layer(&format!("{prefix}layernorm"), "final_norm", true);
    match kind {
        Kind::Bare { pooler: false } => {}
        Kind::Bare { pooler: true } => {
            table.layer(&format!("{prefix}pooler.dense"), "head.hidden", true)
        }
        Kind::Classifier => table.layer("classifier", "head.output", true),
        Kind::WithTeacher => {
            table.layer("cls_classifier", "head.output", true);
            table.layer("distillation_classifier", "head.second_output", true);
        }
    }
    table
}
