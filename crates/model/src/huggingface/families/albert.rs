//! ALBERT (Lan et al., arXiv 1909.11942): BERT's block, passed through again and again with one
//! set of weights, and embeddings in a narrower space.

use super::{Architecture, NameTable, Tower, activation};
use crate::Result;
use crate::huggingface::config::AlbertConfig;
use crate::spec::{
    AbsolutePosition, HeadSpec, HeadTransform, InputSpec, ModelSpec, Pool, Projected, TokenInput,
};
use lapidary_parts::activation::ActivationSpec;
use lapidary_parts::attention::{MixerSpec, MultiHeadSpec};
use lapidary_parts::block::{BlockSpec, Wiring};
use lapidary_parts::feedforward::{DenseSpec, FeedforwardSpec};
use lapidary_parts::norm::NormSpec;

enum Kind {
    Bare { pooler: bool },
    MaskedLanguageModel,
    Classifier,
}

pub(super) fn tower(config: &AlbertConfig, architecture: &Architecture<'_>) -> Result<Tower> {
    let kind = match architecture.name {
        "AlbertModel" | "" => Kind::Bare {
            pooler: architecture.holds("pooler.weight"),
        },
        "AlbertForMaskedLM" | "AlbertForPreTraining" => Kind::MaskedLanguageModel,
        "AlbertForSequenceClassification" => Kind::Classifier,
        _ => {
            return Err(
                architecture.wrong("a bare model, ForMaskedLM or ForSequenceClassification")
            );
        }
    };
    let norm = NormSpec::Layer {
        epsilon: config.layer_norm_eps,
    };
    let act = activation(config.hidden_act, "hidden_act")?;
    let block = |repeat: usize| BlockSpec {
        repeat,
        shared: true,
        layer_scale: None,
        drop_path: 0.0,
        dropout_by_feature: false,
        coding_step: None,
        shortcuts: false,
        wiring: Wiring::PostNorm,
        norm,
        attention: MixerSpec::MultiHead(MultiHeadSpec::new(config.num_attention_heads)),
        cross_attention: None,
        feedforward: Some(FeedforwardSpec::Dense(DenseSpec {
            hidden: config.intermediate_size,
            activation: act,
            bias: true,
        })),
        dropout: 0.0,
    };
    let pooled = |labels| HeadSpec::Pooled {
        pool: Pool::First,
        norm: None,
        hidden: Some(ActivationSpec::Tanh),
        labels,
        bias: true,
    };
    let head = match kind {
        Kind::Bare { pooler: false } => HeadSpec::None,
        Kind::Bare { pooler: true } => pooled(None),
        Kind::MaskedLanguageModel => HeadSpec::LanguageModel {
            tied: config.tie_word_embeddings,
            bias: true,
            transform: Some(HeadTransform {
                activation: act,
                norm,
                narrows: true,
            }),
        },
        Kind::Classifier => pooled(Some(architecture.rows("classifier.weight")?)),
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
            token_types: config.type_vocab_size,
            norm: Some(norm),
            embedding_width: Some(config.embedding_size),
            projected: Projected::Sum,
            dropout: 0.0,
            dropout_by_feature: false,
        }),
        blocks: config.repeats().into_iter().map(block).collect(),
        final_norm: None,
        head,
        low_rank: Default::default(),
        quantised: Default::default(),
        organisation: None,
        initial: Default::default(),
    };
    Ok(Tower {
        name: "",
        table: names(config, &kind),
        spec,
    })
}

fn names(config: &AlbertConfig, kind: &Kind) -> NameTable {
    let prefix = match kind {
        Kind::Bare { .. } => "",
        _ => "albert.",
    };
    let mut table = NameTable::new(&["albert."]);
    let embeddings = format!("{prefix}embeddings");
    table.same(
        &format!("{embeddings}.word_embeddings.weight"),
        "embeddings.tokens.weight",
    );
    table.same(
        &format!("{embeddings}.position_embeddings.weight"),
        "embeddings.positions.weight",
    );
    if config.type_vocab_size > 0 {
        let stored = format!("{embeddings}.token_type_embeddings.weight");
        table.same(&stored, "embeddings.token_types.weight");
    }
    table.layer(&format!("{embeddings}.LayerNorm"), "embeddings.norm", true);
    let mapping = format!("{prefix}encoder.embedding_hidden_mapping_in");
    table.layer(&mapping, "embeddings.projection", true);
    let mut first = 0;
    for (group, repeat) in config.repeats().into_iter().enumerate() {
        let key = format!("{prefix}encoder.albert_layer_groups.{group}.albert_layers.0");
        for (stored, part) in [
            ("attention.query", "attention.query"),
            ("attention.key", "attention.key"),
            ("attention.value", "attention.value"),
            ("attention.dense", "attention.output"),
            ("attention.LayerNorm", "attention_norm"),
            ("ffn", "feedforward.up"),
            ("ffn_output", "feedforward.down"),
            ("full_layer_layer_norm", "feedforward_norm"),
        ] {
            let path = format!("blocks.{first}.{part}");
            table.layer(&format!("{key}.{stored}"), &path, true);
        }
        first += repeat;
    }
    match kind {
        Kind::Bare { pooler: false } => {}
        Kind::Bare { pooler: true } => {
            table.layer(&format!("{prefix}pooler"), "head.hidden", true);
        }
        Kind::Classifier => {
            table.layer("albert.pooler", "head.hidden", true);
            table.layer("classifier", "head.output", true);
        }
        Kind::MaskedLanguageModel => {
            table.layer("predictions.dense", "head.transform", true);
            table.layer("predictions.LayerNorm", "head.norm", true);
            table.same("predictions.bias", "head.output.bias");
            if !config.tie_word_embeddings {
                table.same("predictions.decoder.weight", "head.output.weight");
            }
        }
    }
    table
}
