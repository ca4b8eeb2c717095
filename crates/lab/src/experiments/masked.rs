//! Masked language modelling: text with tokens hidden, and how well a model names them.

use super::classifier::{Narrow, fit};
use super::{attending, decoder, mean, number, numbers};
use crate::error::engine;
use crate::{Result, Setting};
use lapidary_kernels::{CrossEntropyOptions, DType, Device, Tensor, cross_entropy};
use lapidary_model::{Initialiser, Input, Model, ModelSpec, Pass};
use lapidary_parts::parameters::ParameterSource;
use lapidary_train::data::{LanguageTask, Task};
use lapidary_train::language::Split;
use lapidary_train::{Generator, generator};
use rand::RngExt;
use std::collections::BTreeMap;

/// What is not predicted.
const IGNORED: u32 = u32::MAX;

/// Text to learn from and text to be asked about.
pub struct Text {
    /// What it is.
    pub what: String,
    /// Number of token ids.
    pub vocabulary: usize,
    /// Windows to learn from.
    pub training: Box<dyn Task>,
    /// Windows to be asked about.
    pub held_out: Box<dyn Task>,
}

/// Characters of Shakespeare where the file is there, otherwise words of the generated language.
pub fn text(setting: &Setting) -> Result<Text> {
    if let Some([training, held_out]) = attending::shakespeare(setting)? {
        return Ok(Text {
            what: "the bytes of Tiny Shakespeare".to_owned(),
            vocabulary: training.vocabulary(),
            training: Box::new(training),
            held_out: Box::new(held_out),
        });
    }
    let task = |split| -> Result<Box<dyn Task>> {
        let corpus = decoder::corpus(split, setting.seed)?;
        Ok(Box::new(LanguageTask::new(corpus)))
    };
    let training = task(Split::Training)?;
    Ok(Text {
        what: "the generated language".to_owned(),
        vocabulary: training.vocabulary(),
        training,
        held_out: task(Split::HeldOut)?,
    })
}

/// How a model is trained and asked.
#[derive(Clone, Copy, Debug)]
pub struct Course {
    /// Steps.
    pub steps: u64,
    /// Sequences in a step.
    pub batch: usize,
    /// Tokens of a sequence.
    pub length: usize,
    /// Share of tokens that are hidden.
    pub hidden: f64,
    /// The highest learning rate.
    pub rate: f64,
    /// Batches that a model is asked about.
    pub questions: usize,
    /// Seed of everything random.
    pub seed: u64,
}

/// A trained model and what it knows of held-out text.
pub struct Study {
    /// The model.
    pub model: Model,
    /// Share of hidden tokens that it names, in percent.
    pub accuracy: f64,
    /// Share of the hidden tokens that are the most frequent one, in percent.
    pub commonest: f64,
    /// Mean cross-entropy of hidden tokens, in nats.
    pub loss: f64,
}

impl Study {
    /// Whether the model knows more than which token is the most frequent: five points more.
    pub fn has_learned(&self) -> bool {
        self.accuracy >= self.commonest + 5.0
    }
}

impl Text {
    /// The token that hides others: one more than those of the text.
    pub fn mask(&self) -> u32 {
        self.vocabulary as u32
    }

    /// Trains a model whose vocabulary is one larger than the text's, and gives the share of hidden
    /// tokens of held-out text that it names, in percent.
    pub fn accuracy(&mut self, spec: ModelSpec, course: &Course) -> Result<f64> {
        Ok(self.study(spec, course)?.accuracy)
    }

    /// Trains such a model and asks it about held-out text.
    pub fn study(&mut self, spec: ModelSpec, course: &Course) -> Result<Study> {
        let mut source = Narrow(Initialiser::new(course.seed, DType::F32, Device::Cpu));
        self.study_from(spec, &mut source, course)
    }

    /// [`Text::study`] from other initial values.
    pub fn study_from(
        &mut self,
        spec: ModelSpec,
        source: &mut dyn ParameterSource,
        course: &Course,
    ) -> Result<Study> {
        let model = Model::trainable(spec, source)?;
        let mut draws = generator(course.seed);
        let mask = self.mask();
        let trained = fit(&model, course.steps, course.rate, |step| {
            let (inputs, targets) = hide(self.training.as_mut(), course, mask, &mut draws)?;
            let logits = logits(&model, &inputs, Some(step))?;
            let options = CrossEntropyOptions {
                ignore_index: Some(IGNORED),
                ..CrossEntropyOptions::default()
            };
            Ok(cross_entropy(
                &logits,
                &engine(targets.flatten_all())?,
                &options,
            )?)
        })?;
        self.ask(trained, course)
    }

    /// Asks a model about held-out text, every model the same.
    pub fn ask(&mut self, model: Model, course: &Course) -> Result<Study> {
        let mask = self.mask();
        let mut draws = generator(course.seed ^ 0xa5c);
        let (mut shares, mut losses) = (Vec::new(), Vec::new());
        let mut counts = BTreeMap::<u32, usize>::new();
        for _ in 0..course.questions {
            let (inputs, targets) = hide(self.held_out.as_mut(), course, mask, &mut draws)?;
            let logits = logits(&model, &inputs, None)?;
            let options = CrossEntropyOptions {
                ignore_index: Some(IGNORED),
                ..CrossEntropyOptions::default()
            };
            let loss = cross_entropy(&logits, &engine(targets.flatten_all())?, &options)?;
            losses.push(number(&loss)?);
            let said = engine(logits.argmax(1))?;
            let pairs = numbers(&said)?.into_iter().zip(numbers(&targets)?);
            for (said, target) in pairs.filter(|(_, target)| *target != f64::from(IGNORED)) {
                shares.push(f64::from(u8::from(said == target)));
                *counts.entry(target as u32).or_default() += 1;
            }
        }
        let most = counts.values().copied().max().unwrap_or(0);
        Ok(Study {
            model,
            commonest: 100.0 * most as f64 / shares.len().max(1) as f64,
            accuracy: 100.0 * mean(shares),
            loss: mean(losses),
        })
    }

    /// Sequences of held-out text as they are, `[rows, length]`.
    pub fn windows(&mut self, rows: usize, length: usize, seed: u64) -> Result<Tensor> {
        let batch = self.held_out.batch(&mut generator(seed), rows, length)?;
        engine(Tensor::from_vec(batch.inputs, (rows, length), &Device::Cpu))
    }
}

/// `[rows · length, vocabulary]`.
fn logits(model: &Model, inputs: &Tensor, draw: Option<u64>) -> Result<Tensor> {
    let pass = Pass {
        draw,
        ..Pass::default()
    };
    let output = model.forward(&Input::tokens(inputs.clone()), pass)?;
    let logits = output.into_logits()?.into_value();
    let classes = logits.dims().last().copied().unwrap_or(0);
    engine(logits.reshape(((), classes)))
}

/// Sequences `[rows, length]` with tokens hidden, and the tokens that were.
fn hide(
    task: &mut dyn Task,
    course: &Course,
    mask: u32,
    draws: &mut Generator,
) -> Result<(Tensor, Tensor)> {
    let batch = task.batch(draws, course.batch, course.length)?;
    let (mut inputs, mut targets) = (Vec::new(), Vec::new());
    for token in batch.inputs {
        let hidden = draws.random_bool(course.hidden);
        inputs.push(if hidden { mask } else { token });
        targets.push(if hidden { token } else { IGNORED });
    }
    let shape = (course.batch, course.length);
    Ok((
        engine(Tensor::from_vec(inputs, shape, &Device::Cpu))?,
        engine(Tensor::from_vec(targets, shape, &Device::Cpu))?,
    ))
}
