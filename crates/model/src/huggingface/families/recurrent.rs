//! What the recurrent families have in common: blocks of one mixer each behind an RMS norm, and the names of what
//! every such mixer has.

use super::{NameTable, Tower};
use crate::spec::{AbsolutePosition, HeadSpec, InputSpec, ModelSpec, TokenInput};
use lapidary_parts::attention::MixerSpec;
use lapidary_parts::block::{BlockSpec, Wiring};
use lapidary_parts::norm::NormSpec;

/// A recurrence has no longest input; this only bounds what is allocated at once.
const LENGTH: usize = 1 << 20;

/// A model of a recurrent family.
pub(super) struct Recurrent {
    pub(super) vocabulary: usize,
    pub(super) width: usize,
    pub(super) blocks: usize,
    pub(super) norm: NormSpec,
    pub(super) mixer: MixerSpec,
    /// Biases of the mixer's projections.
    pub(super) bias: bool,
    pub(super) convolution_bias: bool,
    pub(super) language_model: bool,
    /// The head is the token embedding.
    pub(super) tied: bool,
}

impl Recurrent {
    /// The tower, for which `recurrence` names what lies between convolution and output of the mixer that is stored
    /// under the first path and built under the second.
    pub(super) fn tower(self, recurrence: impl Fn(&mut NameTable, &str, &str)) -> Tower {
        Tower {
            name: "",
            table: self.names(recurrence),
            spec: self.spec(),
        }
    }

    fn spec(self) -> ModelSpec {
        let block = BlockSpec {
            repeat: self.blocks,
            wiring: Wiring::PreNorm,
            norm: self.norm,
            attention: self.mixer,
            cross_attention: None,
            shared: false,
            layer_scale: None,
            drop_path: 0.0,
            dropout_by_feature: false,
            coding_step: None,
            shortcuts: false,
            feedforward: None,
            dropout: 0.0,
        };
        ModelSpec {
            width: self.width,
            input: InputSpec::Tokens(TokenInput {
                vocabulary: self.vocabulary,
                length: LENGTH,
                position: AbsolutePosition::None,
                token_types: 0,
                norm: None,
                embedding_width: None,
                projected: Default::default(),
                dropout: 0.0,
                dropout_by_feature: false,
            }),
            blocks: vec![block],
            final_norm: Some(self.norm),
            head: if self.language_model {
                HeadSpec::LanguageModel {
                    tied: self.tied,
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
        }
    }

    fn names(&self, recurrence: impl Fn(&mut NameTable, &str, &str)) -> NameTable {
        let prefix = if self.language_model { "backbone." } else { "" };
        let mut table = NameTable::new(&["backbone."]);
        table.same(
            &format!("{prefix}embeddings.weight"),
            "embeddings.tokens.weight",
        );
        for index in 0..self.blocks {
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
                self.bias,
            );
            table.same(
                &format!("{key}.conv1d.weight"),
                &format!("{path}.convolution.weight"),
            );
            if self.convolution_bias {
                table.same(
                    &format!("{key}.conv1d.bias"),
                    &format!("{path}.convolution.bias"),
                );
            }
            recurrence(&mut table, &key, &path);
            table.layer(
                &format!("{key}.out_proj"),
                &format!("{path}.output"),
                self.bias,
            );
        }
        table.layer(&format!("{prefix}norm_f"), "final_norm", false);
        if self.language_model && !self.tied {
            table.same("lm_head.weight", "head.output.weight");
        }
        table
    }
}
