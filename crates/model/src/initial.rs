//! How parameters begin that are not read, where a whole model is to begin otherwise than its parts say.

use std::collections::BTreeMap;

use crate::spec::{AbsolutePosition, InputSpec, ModelSpec, Projected};
use lapidary_kernels::{DType, Tensor};
use lapidary_parts::block::Wiring;
use lapidary_parts::parameters::{Init, ParameterSource};
use lapidary_parts::{Error, Result};
use lapidary_signal::DroppedPart;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How parameters begin that are not read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum InitialValues {
    /// As each part has it; matrices, as a rule, with deviation 0.02.
    #[default]
    #[serde(deserialize_with = "lapidary_parts::fields::none")]
    OfParts,
    /// Matrices by their inputs and by the depth of the model, so that what flows through it has the size that it
    /// began with (Child et al., Sparse Transformer, 2019, arXiv 1904.10509), for `n` blocks of
    ///
    /// ```text
    /// W       N(0, gain² / inputs)
    /// output  N(0, gain² / (2 n · inputs)), of what attention and feed-forward parts write
    /// tokens  N(0, gain² / width)
    /// tables  N(0, gain² / (width · count)), of positions of which `count` are summed
    /// scores  0
    /// ```
    ///
    /// Biases and norms begin as ever, and so does what parts let begin in a way of their own (steps and convolutions
    /// of state spaces, shortcuts, dictionaries), class tokens and positions of patches, mechanisms of attention, biases
    /// of scores, and what an organisation has of its own.
    DepthScaled {
        /// What `1 / √inputs` is multiplied by; the authors' later program has `√0.125`.
        #[serde(default = "eighth")]
        gain: f64,
        /// Whether what parts write begins by `√(2 n)` smaller than other matrices.
        #[serde(default = "yes")]
        by_depth: bool,
    },
}

fn eighth() -> f64 {
    0.125
}

fn yes() -> bool {
    true
}

impl InitialValues {
    /// Those of the Sparse Transformer.
    pub fn depth_scaled() -> Self {
        Self::DepthScaled {
            gain: eighth(),
            by_depth: true,
        }
    }

    /// Whether each part has its own.
    pub(crate) fn is_of_parts(&self) -> bool {
        *self == Self::OfParts
    }

    /// Refuses what means nothing for such a model.
    pub(crate) fn validate(&self, spec: &ModelSpec) -> Result<()> {
        let Self::DepthScaled { gain, by_depth } = *self else {
            return Ok(());
        };
        if !(gain.is_finite() && gain > 0.0) {
            let expected = "a number above 0";
            return Err(Error::spec("initial.gain", gain, expected));
        }
        let replaces = |wiring: Wiring| matches!(wiring, Wiring::Replacing | Wiring::Reversed);
        let mut blocks = spec.blocks.iter().map(|block| block.wiring);
        match blocks.find(|wiring| by_depth && replaces(*wiring)) {
            None => Ok(()),
            Some(wiring) => Err(Error::spec(
                "initial.by_depth",
                format!("true beside a {} block", wiring.name()),
                "false, or blocks whose parts add to a residual stream",
            )),
        }
    }
}

/// A source whose parameters begin as a model's spec says.
pub(crate) struct Beginning<'a> {
    source: &'a mut dyn ParameterSource,
    values: InitialValues,
    ranks: BTreeMap<String, usize>,
    /// Whether tokens are read: then the features of their positions, as often as tables of these are summed.
    positions: Option<usize>,
    blocks: usize,
}

impl<'a> Beginning<'a> {
    pub(crate) fn new(source: &'a mut dyn ParameterSource, spec: &ModelSpec) -> Self {
        let positions = match &spec.input {
            InputSpec::Patches(_) => None,
            InputSpec::Tokens(tokens) => {
                let width = match (tokens.projected, tokens.embedding_width) {
                    (Projected::Sum, Some(width)) => width,
                    _ => spec.width,
                };
                let tables = match tokens.position {
                    AbsolutePosition::Axial {
                        row_width: None,
                        channels,
                        ..
                    } => 2 + usize::from(channels > 1),
                    _ => 1,
                };
                Some(tables * width)
            }
        };
        Self {
            source,
            values: spec.initial,
            ranks: spec.low_rank.clone(),
            positions,
            blocks: spec.blocks.iter().map(|block| block.repeat).sum(),
        }
    }

    /// How the parameter `name` of `shape` begins, `init` being how its part has it.
    fn of(&self, name: &str, shape: &[usize], init: Init) -> Init {
        let (InitialValues::DepthScaled { gain, by_depth }, [.., inputs]) = (self.values, shape)
        else {
            return init;
        };
        if init != Init::USUAL {
            return init;
        }
        let by = |gain: f64, inputs: usize| Init::Normal {
            deviation: gain / (inputs.max(1) as f64).sqrt(),
        };
        if let Some(own) = name.strip_prefix("embeddings.") {
            return match (own, self.positions) {
                ("patches.weight" | "projection.weight", _) => by(gain, *inputs),
                (_, Some(features)) if own.starts_with("positions.") => by(gain, features),
                (_, Some(_)) => by(gain, *inputs),
                (_, None) => init,
            };
        }
        let Some((layer, gain)) = self.layer(name, gain) else {
            return init;
        };
        let last = !self.ranks.contains_key(layer) || name.ends_with(".up");
        if layer.starts_with("head.") {
            return match layer {
                "head.output" | "head.second_output" if last => Init::Zeros,
                _ => by(gain, *inputs),
            };
        }
        let of_attention = [".mechanism.", ".position."];
        if !layer.starts_with("blocks.") || of_attention.iter().any(|part| layer.contains(part)) {
            return init;
        }
        let writes = [".output", ".down", ".map"];
        match by_depth && last && writes.iter().any(|end| layer.ends_with(end)) {
            true => by(gain / ((2 * self.blocks) as f64).sqrt(), *inputs),
            false => by(gain, *inputs),
        }
    }

    /// The linear layer that the parameter `name` is the matrix of, or a factor of it, and what `1 / √inputs` is
    /// multiplied by: the second factor keeps the size of what the first gives, so that their product begins as a
    /// whole matrix does.
    fn layer<'n>(&self, name: &'n str, gain: f64) -> Option<(&'n str, f64)> {
        let (layer, matrix) = name.rsplit_once('.')?;
        match (matrix, self.ranks.contains_key(layer)) {
            ("weight", _) | ("down", true) => Some((layer, gain)),
            ("up", true) => Some((layer, 1.0)),
            _ => None,
        }
    }
}

impl ParameterSource for Beginning<'_> {
    fn parameter(&mut self, name: &str, shape: &[usize], init: Init) -> Result<Tensor> {
        let init = self.of(name, shape, init);
        self.source.parameter(name, shape, init)
    }

    fn packed(&mut self, name: &str, shape: &[usize], dtype: DType) -> Result<Tensor> {
        self.source.packed(name, shape, dtype)
    }

    fn dropped(&mut self, stored: &str, path: &str) -> Result<Option<DroppedPart>> {
        self.source.dropped(stored, path)
    }

    fn dtype(&self) -> DType {
        self.source.dtype()
    }
}
