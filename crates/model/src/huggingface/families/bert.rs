//! BERT (Devlin et al., arXiv 1810.04805) and RoBERTa (Liu et al., arXiv 1907.11692), which
//! differ in how they count positions and name their heads.

use super::{Architecture, NameTable, Tower, activation};
use crate::Result;
use crate::huggingface::config::{BertConfig, BertKind};
use crate::spec::{
    AbsolutePosition, HeadSpec, HeadTransform, InputSpec, ModelSpec, Pool, TokenInput,
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

pub(super) fn tower(config: &BertConfig, architecture: &Architecture<'_>) -> Result<Tower> {
    let kind = match architecture.name {
        "BertModel" | "RobertaModel" | "" => Kind::Bare {
            pooler: architecture.holds("pooler.dense.weight"),
        },
        "BertForMaskedLM" | "RobertaForMaskedLM" | "BertForPreTraining" => {
            Kind::MaskedLanguageModel
        }
        "BertForSequenceClassification" | "RobertaForSequenceClassification" => Kind::Classifier,
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
    let block = BlockSpec {
        repeat: config.num_hidden_layers,
        wiring: Wiring::PostNorm,
        norm,
        attention: MixerSpec::MultiHead(MultiHeadSpec::new(config.num_attention_heads)),
        cross_attention: None,
        shared: false,
        layer_scale: None,
        drop_path: 0.0,
        dropout_by_feature: false,
        coding_step: None,
        shortcuts: false,
        feedforward: Some(FeedforwardSpec::Dense(DenseSpec {
            hidden: config.intermediate_size,
            activation: act,
            bias: true,
        })),
        dropout: 0.0,
    };
    let tanh = Some(ActivationSpec::Tanh);
    let pooled = |hidden, labels| HeadSpec::Pooled {
        pool: Pool::First,
        norm: None,
        hidden,
        labels,
        bias: true,
    };
    let head = match kind {
        Kind::Bare { pooler: false } => HeadSpec::None,
        Kind::Bare { pooler: true } => pooled(tanh, None),
        Kind::MaskedLanguageModel => HeadSpec::LanguageModel {
            tied: config.tie_word_embeddings,
            bias: true,
            transform: Some(HeadTransform {
                activation: if config.kind == BertKind::Roberta {
                    ActivationSpec::Gelu
                } else {
                    act
                },
                norm,
                narrows: false,
            }),
        },
        Kind::Classifier => {
            let stored = match config.kind {
                BertKind::Bert => "classifier.weight",
                BertKind::Roberta => "classifier.out_proj.weight",
            };
            pooled(tanh, Some(architecture.rows(stored)?))
        }
    };
    let roberta = config.kind == BertKind::Roberta;
    let spec = ModelSpec {
        width: config.hidden_size,
        input: InputSpec::Tokens(TokenInput {
            vocabulary: config.vocab_size,
            length: config.max_positions(),
            position: AbsolutePosition::Learned {
                offset: config.first_position(),
                skip_padding: roberta,
            },
            token_types: config.type_vocab_size,
            norm: Some(norm),
            embedding_width: None,
            projected: Default::default(),
            dropout: 0.0,
            dropout_by_feature: false,
        }),
        blocks: vec![block],
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

fn names(config: &BertConfig, kind: &Kind) -> NameTable {
    let (base, bare) = match config.kind {
        BertKind::Bert => ("bert.", matches!(kind, Kind::Bare { .. })),
        BertKind::Roberta => ("roberta.", matches!(kind, Kind::Bare { .. })),
    };
    let prefix = if bare { "" } else { base };
    let mut table = NameTable::new(&[base]);
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
    for index in 0..config.num_hidden_layers {
        let (key, path) = (
            format!("{prefix}encoder.layer.{index}"),
            format!("blocks.{index}"),
        );
        for (stored, part) in [
            ("attention.self.query", "attention.query"),
            ("attention.self.key", "attention.key"),
            ("attention.self.value", "attention.value"),
            ("attention.output.dense", "attention.output"),
            ("attention.output.LayerNorm", "attention_norm"),
            ("intermediate.dense", "feedforward.up"),
            ("output.dense", "feedforward.down"),
            ("output.LayerNorm", "feedforward_norm"),
        ] {
            table.layer(&format!("{key}.{stored}"), &format!("{path}.{part}"), true);
        }
    }
    match (kind, config.kind) {
        (Kind::Bare { pooler: false }, _) => {}
        (Kind::Bare { pooler: true }, _) => {
            table.layer(&format!("{prefix}pooler.dense"), "head.hidden", true);
        }
        (Kind::Classifier, BertKind::Bert) => {
            table.layer("bert.pooler.dense", "head.hidden", true);
            table.layer("classifier", "head.output", true);
        }
        (Kind::Classifier, BertKind::Roberta) => {
            table.layer("classifier.dense", "head.hidden", true);
            table.layer("classifier.out_proj", "head.output", true);
        }
        (Kind::MaskedLanguageModel, BertKind::Bert) => {
            table.layer("cls.predictions.transform.dense", "head.transform", true);
            table.layer("cls.predictions.transform.LayerNorm", "head.norm", true);
            table.same("cls.predictions.bias", "head.output.bias");
            if !config.tie_word_embeddings {
                table.same("cls.predictions.decoder.weight", "head.output.weight");
            }
        }
        (Kind::MaskedLanguageModel, BertKind::Roberta) => {
            table.layer("lm_head.dense", "head.transform", true);
            table.layer("lm_head.layer_norm", "head.norm", true);
            table.same("lm_head.bias", "head.output.bias");
            if !config.tie_word_embeddings {
                table.same("lm_head.decoder.weight", "head.output.weight");
            }
        }
    }
    table
}
