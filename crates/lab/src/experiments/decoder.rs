//! A small decoder trained on the generated language.

use super::classifier::Narrow;
use crate::Result;
use lapidary_kernels::{DType, Device};
use lapidary_model::{
    AbsolutePosition, HeadSpec, Initialiser, InputSpec, Model, ModelSpec, TokenInput,
};
use lapidary_parts::activation::ActivationSpec;
use lapidary_parts::attention::{MixerSpec, MultiHeadSpec};
use lapidary_parts::block::{BlockSpec, Wiring};
use lapidary_parts::feedforward::{DenseSpec, FeedforwardSpec};
use lapidary_parts::norm::NormSpec;
use lapidary_parts::parameters::ParameterSource;
use lapidary_parts::position::PositionSpec;
use lapidary_train::data::{LanguageTask, Task};
use lapidary_train::language::{Corpus, Language, Mixture, Split};
use lapidary_train::spec::{DataSpec, OptimiserSpec, ScheduleSpec, ValidationSpec};
use lapidary_train::{AlignmentSpec, Decay, Step, TrainSpec, Trainer};
use std::collections::BTreeMap;

/// Tokens of a sequence.
pub const LENGTH: usize = 64;
/// Sequences of a step.
pub const BATCH: usize = 16;

/// A decoder as GPT-2 with heads of 16 and the output tied to the embeddings.
pub fn spec(vocabulary: usize, width: usize, blocks: usize) -> ModelSpec {
    ModelSpec {
        width,
        input: InputSpec::Tokens(TokenInput {
            vocabulary,
            length: 2 * LENGTH,
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
        blocks: vec![BlockSpec {
            repeat: blocks,
            wiring: Wiring::PreNorm,
            norm: NormSpec::default(),
            attention: MixerSpec::MultiHead(MultiHeadSpec {
                causal: true,
                ..MultiHeadSpec::new((width / 16).max(1))
            }),
            cross_attention: None,
            shared: false,
            layer_scale: None,
            drop_path: 0.0,
            dropout_by_feature: false,
            coding_step: None,
            shortcuts: false,
            feedforward: Some(FeedforwardSpec::Dense(DenseSpec {
                hidden: 4 * width,
                activation: ActivationSpec::Gelu,
                bias: true,
            })),
            dropout: 0.0,
        }],
        final_norm: Some(NormSpec::default()),
        head: HeadSpec::LanguageModel {
            tied: true,
            bias: false,
            transform: None,
        },
        low_rank: BTreeMap::new(),
        quantised: BTreeMap::new(),
        organisation: None,
        initial: Default::default(),
    }
}

/// How a decoder knows positions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Positions {
    /// A table of vectors.
    Learned,
    /// Rotated queries and keys.
    Rotary,
    /// A bias that falls with the distance.
    Alibi,
    /// Not but by causality.
    None,
}

impl Positions {
    /// Its name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Learned => "learned",
            Self::Rotary => "rotary",
            Self::Alibi => "ALiBi",
            Self::None => "no positions",
        }
    }

    /// The decoder of [`spec`], knowing positions so.
    pub fn spec(self, vocabulary: usize, width: usize, blocks: usize) -> ModelSpec {
        let mut spec = spec(vocabulary, width, blocks);
        if self != Self::Learned
            && let InputSpec::Tokens(tokens) = &mut spec.input
        {
            tokens.position = AbsolutePosition::None;
        }
        for block in &mut spec.blocks {
            if let MixerSpec::MultiHead(attention) = &mut block.attention {
                attention.position = match self {
                    Self::Rotary => PositionSpec::Rotary(Default::default()),
                    Self::Alibi => PositionSpec::Alibi,
                    Self::Learned | Self::None => PositionSpec::None,
                };
            }
        }
        spec
    }
}

/// One side of the language's split, for a seed.
pub fn corpus(split: Split, seed: u64) -> Result<Corpus> {
    Ok(Corpus::new(
        Language::new(seed),
        split,
        Mixture::default(),
        seed,
    )?)
}

/// How a decoder is trained.
#[derive(Clone, Copy, Debug)]
pub struct Recipe {
    /// Sequences of a step.
    pub batch: usize,
    /// Tokens of a sequence.
    pub length: usize,
    /// The highest learning rate.
    pub peak: f64,
    /// A term that keeps the residual stream from turning.
    pub alignment: Option<AlignmentSpec>,
    /// Last steps in which mixers draw nothing.
    pub dense_steps: u64,
    /// Whether initial weights have the deviation `1 / √input`, as suits narrow models.
    pub narrow: bool,
}

impl Default for Recipe {
    fn default() -> Self {
        Self {
            batch: BATCH,
            length: LENGTH,
            peak: 3e-3,
            alignment: None,
            dense_steps: 0,
            narrow: false,
        }
    }
}

/// Trains `model` on `task` for `steps` of [`BATCH`] sequences of [`LENGTH`].
pub fn train(model: ModelSpec, task: Box<dyn Task>, steps: u64, seed: u64) -> Result<Model> {
    train_by(Recipe::default(), model, task, steps, seed)
}

/// Trains `model` on `task` for `steps` by a recipe.
pub fn train_by(
    recipe: Recipe,
    model: ModelSpec,
    task: Box<dyn Task>,
    steps: u64,
    seed: u64,
) -> Result<Model> {
    train_watched(recipe, model, task, steps, seed, |_, _| Ok(()))
}

/// Trains as [`train_by`]; `watch` gets the model behind each step.
pub fn train_watched(
    recipe: Recipe,
    model: ModelSpec,
    task: Box<dyn Task>,
    steps: u64,
    seed: u64,
    watch: impl FnMut(&Step, &Model) -> Result<()>,
) -> Result<Model> {
    let mut plain = Initialiser::new(seed, DType::F32, Device::Cpu);
    let mut narrow = Narrow(Initialiser::new(seed, DType::F32, Device::Cpu));
    let source: &mut dyn ParameterSource = match recipe.narrow {
        true => &mut narrow,
        false => &mut plain,
    };
    train_from(source, recipe, model, task, steps, seed, watch)
}

/// Trains a copy of `model` further.
pub fn train_further(
    model: &Model,
    recipe: Recipe,
    task: Box<dyn Task>,
    steps: u64,
    seed: u64,
) -> Result<Model> {
    let mut source = model.parameters().clone();
    let spec = model.spec().clone();
    train_from(&mut source, recipe, spec, task, steps, seed, |_, _| Ok(()))
}

/// Trains a model that starts from what `source` gives; `watch` gets it behind each step.
pub fn train_from(
    source: &mut dyn ParameterSource,
    recipe: Recipe,
    model: ModelSpec,
    task: Box<dyn Task>,
    steps: u64,
    seed: u64,
    mut watch: impl FnMut(&Step, &Model) -> Result<()>,
) -> Result<Model> {
    let spec = TrainSpec {
        seed,
        steps,
        batch: recipe.batch,
        length: recipe.length,
        accumulate: 1,
        clip: Some(1.0),
        average: None,
        dense_steps: recipe.dense_steps,
        annealed_steps: 0,
        masking: None,
        self_distillation: None,
        recompute: false,
        loss_chunk: None,
        alignment: recipe.alignment,
        schedule: ScheduleSpec {
            peak: recipe.peak,
            floor: recipe.peak / 100.0,
            warm_up: steps / 10,
            decay: Decay::Cosine,
        },
        optimiser: OptimiserSpec::Adamw {
            beta1: 0.9,
            beta2: 0.99,
            epsilon: 1e-8,
            weight_decay: 0.01,
        },
        groups: Vec::new(),
        validation: ValidationSpec::default(),
        checkpoint: Default::default(),
        data: DataSpec::Language {
            seed,
            mixture: Mixture::default(),
        },
        model,
    };
    // The trainer wants a validation task; what is measured here is measured outside of it.
    let validation = Box::new(Nothing(task.vocabulary()));
    let mut trainer = Trainer::with_source(spec, source, task, validation)?;
    for _ in 0..steps {
        let step = trainer.step()?;
        watch(&step, trainer.model())?;
    }
    Ok(trainer.finished()?)
}

/// Trains a decoder of the language's vocabulary on its training side.
pub fn train_on_language(width: usize, blocks: usize, steps: u64, seed: u64) -> Result<Model> {
    let corpus = corpus(Split::Training, seed)?;
    let spec = spec(corpus.language().vocabulary().size(), width, blocks);
    train(spec, Box::new(LanguageTask::new(corpus)), steps, seed)
}

/// A task without any data.
struct Nothing(usize);

impl Task for Nothing {
    fn vocabulary(&self) -> usize {
        self.0
    }

    fn batch(
        &mut self,
        _generator: &mut lapidary_train::Generator,
        _rows: usize,
        length: usize,
    ) -> lapidary_train::Result<lapidary_train::data::Batch> {
        Ok(lapidary_train::data::Batch::with_capacity(0, length))
    }
}
