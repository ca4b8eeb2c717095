//! A training run as data.

use std::path::PathBuf;

use lapidary_model::{HeadSpec, InputSpec, ModelSpec};
use lapidary_parts::organisation::OrganisationSpec;
use serde::{Deserialize, Serialize};

use crate::data::{MaskingSpec, Order};
use crate::language::Mixture;
use crate::self_distillation::SelfDistillationSpec;
use crate::{AlignmentSpec, Decay, Error, Result, Schedule};

mod optimiser;

pub use optimiser::OptimiserSpec;

/// Everything that decides what a run computes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainSpec {
    /// Seed of initial values, data order and dropout.
    #[serde(default)]
    pub seed: u64,
    /// Steps in all.
    pub steps: u64,
    /// Sequences in a step, all micro-batches together; images, where images are read.
    pub batch: usize,
    /// Tokens of a sequence; absent where images are read.
    #[serde(default, skip_serializing_if = "is_none_long")]
    pub length: usize,
    /// Micro-batches that a step is divided into.
    #[serde(default = "one")]
    pub accumulate: usize,
    /// Largest norm of a step's gradient.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clip: Option<f64>,
    /// Decay of a moving average of the parameters, which is then what is validated and saved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub average: Option<f64>,
    /// Last steps in which mixers draw nothing: they consolidate what was trained on subsets of keys.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub dense_steps: u64,
    /// Steps before those in which mixers come to see all keys: where they keep one of `c`, `c` falls to 1.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub annealed_steps: u64,
    /// Recompute blocks in the backward pass instead of remembering their intermediates.
    #[serde(default)]
    pub recompute: bool,
    /// Positions of which scores over the vocabulary are laid out at a time, in either pass; all at once when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_chunk: Option<usize>,
    /// A term of the loss that keeps the residual stream from turning.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alignment: Option<AlignmentSpec>,
    /// The learning rate over the steps.
    pub schedule: ScheduleSpec,
    /// The optimiser.
    #[serde(default)]
    pub optimiser: OptimiserSpec,
    /// Parameters that are trained otherwise than the rest.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub groups: Vec<GroupSpec>,
    /// When to validate, and on how much.
    #[serde(default)]
    pub validation: ValidationSpec,
    /// When the state is saved.
    #[serde(default)]
    pub checkpoint: CheckpointSpec,
    /// What is read.
    pub data: DataSpec,
    /// Tokens that are hidden from a model that looks ahead, which is to name them instead of the next.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub masking: Option<MaskingSpec>,
    /// Self-distillation without labels, of a model that reads images, instead of naming tokens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub self_distillation: Option<SelfDistillationSpec>,
    /// What is trained.
    pub model: ModelSpec,
}

fn one() -> usize {
    1
}

#[allow(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde asks for a reference"
)]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

#[allow(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde asks for a reference"
)]
fn is_none_long(length: &usize) -> bool {
    *length == 0
}

/// The learning rate over the run's steps.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScheduleSpec {
    /// The highest rate.
    pub peak: f64,
    /// The rate at the end.
    #[serde(default)]
    pub floor: f64,
    /// Steps until the peak.
    #[serde(default)]
    pub warm_up: u64,
    /// The shape of the decay.
    #[serde(default)]
    pub decay: Decay,
}

/// Tokens of a step.
const MAX_TOKENS: usize = 1 << 26;

/// Pictures that are generated.
const MAX_SHAPES: usize = 1_000_000;

/// Numbers of all views of a step.
const MAX_PIXELS: usize = 1 << 30;

const BELOW_ONE: &str = "at least 0 and below 1";
const NOT_NEGATIVE: &str = "a number of at least 0";

/// Parameters whose name begins with a path, trained otherwise than the rest.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupSpec {
    /// Beginning of the parameters' names (`embeddings.`).
    pub path: String,
    /// Multiplies the learning rate; 0 freezes.
    #[serde(default = "unit")]
    pub rate_factor: f64,
    /// Their weight decay.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight_decay: Option<f64>,
}

fn unit() -> f64 {
    1.0
}

/// When to validate, and on how much.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ValidationSpec {
    /// Steps between validations; 0 for the end only.
    pub every: u64,
    /// Batches in each.
    pub batches: usize,
    /// Share of a text that is kept for validation.
    pub fraction: f64,
    /// Which weights become the model that [`run`](crate::run()) writes.
    #[serde(skip_serializing_if = "Keep::is_last")]
    pub keep: Keep,
}

/// Which weights of a run become its model.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Keep {
    /// Those of the last step.
    #[default]
    Last,
    /// Those of the validation with the least loss, the earlier of equal ones.
    Best,
}

impl Keep {
    /// States of runs that keep the last say nothing of it, as those from before there was a choice.
    #[allow(
        clippy::trivially_copy_pass_by_ref,
        reason = "serde asks for a reference"
    )]
    fn is_last(&self) -> bool {
        *self == Self::Last
    }
}

impl Default for ValidationSpec {
    fn default() -> Self {
        Self {
            every: 0,
            batches: 8,
            fraction: 0.05,
            keep: Keep::Last,
        }
    }
}

/// When the state is saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CheckpointSpec {
    /// Steps between states; 0 for the end only.
    pub every: u64,
    /// States that are kept.
    pub keep: usize,
}

impl Default for CheckpointSpec {
    fn default() -> Self {
        Self { every: 0, keep: 2 }
    }
}

/// How a text becomes tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TokenizerSpec {
    /// One token for each byte.
    #[default]
    Bytes,
    /// The most frequent words of the text, up to so many.
    Words(usize),
    /// The tokenizer of a model directory.
    Directory(PathBuf),
}

/// What is read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum DataSpec {
    /// The small English-like language.
    Language {
        /// Decides its facts and the order of its sentences.
        #[serde(default)]
        seed: u64,
        /// How often each kind of sentence occurs.
        #[serde(default)]
        mixture: Mixture,
    },
    /// A text file.
    Text {
        /// The file; may be given on the command line instead.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        file: Option<PathBuf>,
        /// How it becomes tokens.
        #[serde(default)]
        tokenizer: TokenizerSpec,
        /// In which order its windows are read.
        #[serde(default = "shuffled")]
        order: Order,
    },
    /// A token file, as this crate writes it.
    Tokens {
        /// The file.
        file: PathBuf,
        /// In which order its windows are read.
        #[serde(default = "shuffled")]
        order: Order,
    },
    /// The vertices of a graph, some of which are to be named: a [`crate::data::VerticesFile`]. The graph is that
    /// of the model's attention.
    Vertices {
        /// The file.
        file: PathBuf,
    },
    /// A random word, to be said again.
    Copying {
        /// Different symbols.
        symbols: usize,
    },
    /// Pairs of keys and values, and the value of a key.
    Recall {
        /// Different keys.
        keys: usize,
        /// Different values.
        values: usize,
    },
    /// What followed the last symbol when it occurred before.
    Induction {
        /// Different symbols.
        symbols: usize,
    },
    /// The PNG and JPEG files of a directory, for self-distillation.
    Images {
        /// The directory; may be given on the command line instead.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        directory: Option<PathBuf>,
    },
    /// Generated pictures of one shape before a texture, for self-distillation.
    Shapes {
        /// Decides what is on them.
        #[serde(default)]
        seed: u64,
        /// How many there are, those for validation among them.
        #[serde(default = "thousand")]
        count: usize,
    },
}

fn thousand() -> usize {
    1000
}

fn shuffled() -> Order {
    Order::Shuffled { seed: 0 }
}

impl DataSpec {
    /// The kind's name, where it is one of images.
    pub fn of_images(&self) -> Option<&'static str> {
        match self {
            Self::Images { .. } => Some("images"),
            Self::Shapes { .. } => Some("shapes"),
            Self::Language { .. }
            | Self::Text { .. }
            | Self::Tokens { .. }
            | Self::Vertices { .. }
            | Self::Copying { .. }
            | Self::Recall { .. }
            | Self::Induction { .. } => None,
        }
    }
}

fn wrong(name: &'static str, found: String, expected: &'static str) -> Result<()> {
    Err(Error::Setting {
        name,
        found,
        expected,
    })
}

impl TrainSpec {
    /// The schedule over the run's steps.
    pub fn schedule(&self) -> Schedule {
        let ScheduleSpec {
            peak,
            floor,
            warm_up,
            decay,
        } = self.schedule;
        Schedule {
            peak,
            floor,
            warm_up: warm_up.min(self.steps),
            steps: self.steps,
            decay,
        }
    }

    /// Whether mixers draw in a step (the first is 0), and how far they are on the way to all keys.
    pub(crate) fn draws(&self, step: u64) -> (bool, f64) {
        let drawing = self.steps.saturating_sub(self.dense_steps);
        let constant = drawing.saturating_sub(self.annealed_steps);
        // The step behind the last of them would be dense.
        let gone = (step + 1).saturating_sub(constant);
        let annealing = gone as f64 / (self.annealed_steps + 1) as f64;
        (step < drawing, annealing.min(1.0))
    }

    /// Refuses settings that cannot be trained with.
    pub fn validate(&self) -> Result<()> {
        self.schedule().validate()?;
        let ScheduleSpec {
            peak, floor, decay, ..
        } = self.schedule;
        if decay == Decay::Constant && floor != 0.0 && floor != peak {
            let expected = "absent with schedule.decay = \"constant\", which falls to no floor";
            return wrong("schedule.floor", floor.to_string(), expected);
        }
        self.model
            .check_can_be_made()
            .map_err(lapidary_model::Error::from)?;
        if self.batch == 0 || self.batch.saturating_mul(self.length) > MAX_TOKENS {
            return wrong(
                "batch",
                self.batch.to_string(),
                "at least 1, and at most 67 108 864 tokens in all",
            );
        }
        self.optimiser.validate()?;
        let groups = self.groups.iter();
        for (name, factor) in groups.flat_map(|group| {
            let decay = group
                .weight_decay
                .map(|decay| ("groups.weight_decay", decay));
            [("groups.rate_factor", group.rate_factor)]
                .into_iter()
                .chain(decay)
        }) {
            if !(factor.is_finite() && factor >= 0.0) {
                return wrong(name, factor.to_string(), NOT_NEGATIVE);
            }
        }
        if let Some(alignment) = self.alignment {
            let weight = alignment.weight;
            if !(weight.is_finite() && weight >= 0.0) {
                return wrong("alignment.weight", weight.to_string(), NOT_NEGATIVE);
            }
            if self.recompute {
                let expected = "false with alignment, which reads the stream between blocks";
                return wrong("recompute", "true".into(), expected);
            }
            self.check_streams()?;
        }
        if let Some(decay) = self.average.filter(|decay| !(0.0..1.0).contains(decay)) {
            return wrong("average", decay.to_string(), BELOW_ONE);
        }
        let fraction = self.validation.fraction;
        if !(0.0..1.0).contains(&fraction) {
            return wrong("validation.fraction", fraction.to_string(), BELOW_ONE);
        }
        if self.accumulate == 0 || !self.batch.is_multiple_of(self.accumulate) {
            return wrong(
                "accumulate",
                self.accumulate.to_string(),
                "a divisor of the batch",
            );
        }
        if let Some(clip) = self.clip.filter(|clip| !(clip.is_finite() && *clip > 0.0)) {
            return wrong("clip", clip.to_string(), "a positive number");
        }
        if self.validation.batches == 0 {
            return wrong("validation.batches", "0".into(), "at least 1");
        }
        if self.validation.keep == Keep::Best && self.validation.every == 0 {
            let expected = "at least 1 with validation.keep = \"best\", which compares validations";
            return wrong("validation.every", "0".into(), expected);
        }
        match &self.self_distillation {
            Some(own) => self.validate_images(own)?,
            None => self.validate_tokens()?,
        }
        self.check_sequences()
    }

    /// Alignment compares the stream in front of each block with that behind it: there has to be one, and all of
    /// one shape.
    fn check_streams(&self) -> Result<()> {
        match &self.model.organisation {
            None | Some(OrganisationSpec::Interleaved(_)) => Ok(()),
            Some(other @ (OrganisationSpec::VipCentric(_) | OrganisationSpec::Reversible(_))) => {
                let expected = "absent or interleaved with alignment, which needs one stream";
                wrong("model.organisation", other.kind().into(), expected)
            }
        }
    }

    /// What is asked of a run over tokens alone.
    fn validate_tokens(&self) -> Result<()> {
        if let Some(kind) = self.data.of_images() {
            let expected = "data of tokens, or self_distillation beside it";
            return wrong("data.kind", kind.into(), expected);
        }
        if self.length == 0 || self.length > self.model.length() {
            return wrong(
                "length",
                self.length.to_string(),
                "at least 1 and at most the model's length",
            );
        }
        if self.dense_steps > self.steps {
            let expected = "at most the number of steps";
            return wrong("dense_steps", self.dense_steps.to_string(), expected);
        }
        if self.annealed_steps > self.steps - self.dense_steps {
            let expected = "at most the number of steps before the dense ones";
            return wrong("annealed_steps", self.annealed_steps.to_string(), expected);
        }
        let draws = self.model.draws();
        if self.dense_steps > 0 && !draws.any {
            let expected = "0, or a model that draws something in training";
            return wrong("dense_steps", self.dense_steps.to_string(), expected);
        }
        if self.annealed_steps > 0 && !draws.keys {
            let expected = "0, or a model with subsampled attention, whose subsets grow";
            return wrong("annealed_steps", self.annealed_steps.to_string(), expected);
        }
        if self.loss_chunk == Some(0) {
            return wrong("loss_chunk", "0".into(), "at least 1, or absent");
        }
        if let Some(masking) = &self.masking {
            masking.validate(self.length)?;
            if self.model.is_causal() {
                let expected = "absent for a causal model, which does not see what follows";
                return wrong("masking", "given".into(), expected);
            }
        }
        if !matches!(self.model.head, HeadSpec::LanguageModel { .. }) {
            return wrong("model.head", "no language model".into(), "a language model");
        }
        Ok(())
    }

    /// What is asked of self-distillation: a model of images that gives one vector for each, images, and none
    /// of the settings that mean something to sequences alone.
    fn validate_images(&self, own: &SelfDistillationSpec) -> Result<()> {
        own.validate()?;
        if let DataSpec::Shapes { count, .. } = self.data
            && !(2..=MAX_SHAPES).contains(&count)
        {
            let expected = "between 2 and 1 000 000";
            return wrong("data.count", count.to_string(), expected);
        }
        if self.data.of_images().is_none() {
            let expected = "images or shapes with self_distillation";
            return wrong("data.kind", "one of tokens".into(), expected);
        }
        let InputSpec::Patches(input) = &self.model.input else {
            return wrong(
                "model.input",
                "tokens".into(),
                "patches with self_distillation",
            );
        };
        if !matches!(self.model.head, HeadSpec::Pooled { labels: None, .. }) {
            let expected = "pooled, without labels, with self_distillation";
            return wrong("model.head", "another".into(), expected);
        }
        if let Some(size) = own.crops.local_size {
            let fits = size.iter().zip(input.image).all(|(side, whole)| {
                (1..=whole).contains(side) && side.is_multiple_of(input.patch.max(1))
            });
            if !fits {
                let expected = "whole patches, and no larger than the model's images";
                let name = "self_distillation.crops.local_size";
                return wrong(name, format!("{size:?}"), expected);
            }
            if size != input.image && !input.resized {
                let expected = "true with small views of a size of their own";
                return wrong("model.input.resized", "false".into(), expected);
            }
        }
        let pixels = input.image.iter().fold(input.channels, |product, side| {
            product.saturating_mul(*side)
        });
        let in_a_step = self.batch.saturating_mul(own.crops.count());
        if pixels.saturating_mul(in_a_step) > MAX_PIXELS {
            let expected = "so small that all views have at most 1 073 741 824 numbers";
            return wrong("batch", self.batch.to_string(), expected);
        }
        let given = [
            ("length", self.length != 0),
            ("accumulate", self.accumulate != 1),
            ("average", self.average.is_some()),
            ("dense_steps", self.dense_steps != 0),
            ("annealed_steps", self.annealed_steps != 0),
            ("recompute", self.recompute),
            ("loss_chunk", self.loss_chunk.is_some()),
            ("alignment", self.alignment.is_some()),
            ("masking", self.masking.is_some()),
            // A teacher that is surer makes its student's loss less: losses of different steps cannot be compared.
            ("validation.keep", self.validation.keep != Keep::Last),
        ];
        match given.into_iter().find(|(_, given)| *given) {
            Some((name, _)) => wrong(name, "given".into(), "absent with self_distillation"),
            None => Ok(()),
        }
    }
}
