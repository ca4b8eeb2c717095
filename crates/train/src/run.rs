//! A run in a directory: data, states, logs, and in the end a model.
//!
//! ```text
//! RUN/run.toml        what the run was told, as it last began or went on
//! RUN/data.tokens     the text as tokens, when the data is a text
//! RUN/states/         what it resumes from
//! RUN/log.jsonl       one line for each step; RUN/events… the same for TensorBoard
//! RUN/model/          the trained model with its tokenizer
//! ```

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use lapidary_kernels::Device;
use lapidary_model::files::{FileBeside, read_text};
use lapidary_model::{Limits, Model, Package, Tokenizer};

use crate::best::{Best, Validated};
use crate::claim::Claim;
use crate::data::{
    AssociativeRecall, Copying, Induction, LanguageTask, Order, Task, TokenFile, Vertices, Windows,
    each_piece, split, write_text,
};
use crate::language::{Corpus, Language, Split};
use crate::log::{EventFile, JsonLines, Progress};
use crate::self_distillation::{Distiller, Images, Spread};
use crate::spec::{DataSpec, TokenizerSpec};
use crate::state::TrainingState;
use crate::{Error, Result, Step, TrainSpec, Trainer, generator, state};

/// What a finished run left.
#[derive(Clone, Debug)]
pub struct Finished {
    /// The last step's loss on its batch.
    pub loss: Option<f64>,
    /// Mean loss of the trained model on the validation batches, in nats.
    pub validation_loss: f64,
    /// Steps done in all.
    pub steps: u64,
    /// The step whose weights the trained model has: the last one, or that of the least validation loss.
    pub kept_step: u64,
    /// Mean loss of the last step's weights on the validation batches, in nats.
    pub last_validation_loss: f64,
    /// The directory of the trained model.
    pub model: PathBuf,
    /// Tokens per second over the steps done now; patches and class tokens, where images are read.
    pub tokens_per_second: f64,
    /// What the teacher says of the validation images, after self-distillation.
    pub spread: Option<Spread>,
}

/// Training and validation data, and the tokenizer of the model to be.
struct Sources {
    training: Box<dyn Task>,
    validation: Box<dyn Task>,
    tokenizer: Option<Tokenizer>,
}

/// What is trained, a step at a time.
trait Learner {
    fn steps_done(&self) -> u64;

    fn step(&mut self) -> Result<Step>;

    /// The loss on what is not trained on.
    fn validate(&mut self) -> Result<f64>;

    /// What the last step's teacher said, where there is one.
    fn spread(&self) -> Option<Spread>;

    /// The same of what is not trained on.
    fn validation_spread(&self) -> Result<Option<Spread>>;

    fn state(&self) -> Result<TrainingState>;

    fn resume(&mut self, state: &TrainingState) -> Result<()>;

    fn finished(&mut self) -> Result<Model>;
}

impl Learner for Trainer {
    fn steps_done(&self) -> u64 {
        self.steps_done()
    }

    fn step(&mut self) -> Result<Step> {
        self.step()
    }

    fn validate(&mut self) -> Result<f64> {
        self.validate()
    }

    fn spread(&self) -> Option<Spread> {
        None
    }

    fn validation_spread(&self) -> Result<Option<Spread>> {
        Ok(None)
    }

    fn state(&self) -> Result<TrainingState> {
        self.state()
    }

    fn resume(&mut self, state: &TrainingState) -> Result<()> {
        self.resume(state)
    }

    fn finished(&mut self) -> Result<Model> {
        self.finished()
    }
}

impl Learner for Distiller {
    fn steps_done(&self) -> u64 {
        self.steps_done()
    }

    fn step(&mut self) -> Result<Step> {
        self.step()
    }

    fn validate(&mut self) -> Result<f64> {
        Ok(Distiller::validate(self)?.0)
    }

    fn spread(&self) -> Option<Spread> {
        self.spread()
    }

    fn validation_spread(&self) -> Result<Option<Spread>> {
        Ok(Some(Distiller::validate(self)?.1))
    }

    fn state(&self) -> Result<TrainingState> {
        self.state()
    }

    fn resume(&mut self, state: &TrainingState) -> Result<()> {
        self.resume(state)
    }

    fn finished(&mut self) -> Result<Model> {
        Distiller::finished(self)
    }
}

/// Runs `spec` in `directory`; with `resume`, from the newest state there.
///
/// # Errors
/// When the directory holds a run and `resume` is false, or a run of another spec, or one that has not
/// ended; when not one window of a file fits into what is for training, or for validation; and whatever
/// the spec, the data or the disk give cause for.
pub fn run(spec: &TrainSpec, directory: &Path, resume: bool, device: &Device) -> Result<Finished> {
    spec.validate()?;
    let mut claim = Claim::new(spec, directory, resume)?;
    let mut sources = sources(spec, &mut claim)?;
    for task in [&mut sources.training, &mut sources.validation] {
        // Before a sequence is made: of symbols that no model reads there may be too many for any.
        spec.check_vocabulary(task.vocabulary())?;
        check_length(spec, task.as_mut())?;
    }
    let trainer = Trainer::new(spec.clone(), sources.training, sources.validation, device)?;
    drive(spec, trainer, sources.tokenizer, claim, device)
}

/// As [`run`], for self-distillation, of `images` that were read or made as `spec.data` says.
///
/// # Errors
/// As there.
pub fn run_on_images(
    spec: &TrainSpec,
    images: Images,
    directory: &Path,
    resume: bool,
    device: &Device,
) -> Result<Finished> {
    spec.validate()?;
    let claim = Claim::new(spec, directory, resume)?;
    let distiller = Distiller::new(spec.clone(), images, device)?;
    drive(spec, distiller, None, claim, device)
}

/// Refuses a task that has no sequences of the spec's length: one is made, and the task is then as before.
fn check_length(spec: &TrainSpec, task: &mut dyn Task) -> Result<()> {
    let position = task.position();
    task.batch(&mut generator(spec.seed), 1, spec.length)?;
    task.seek(position);
    Ok(())
}

/// Writes the spec as it runs, if what is there does not say the same in its own words.
fn write_spec(spec: &TrainSpec, directory: &Path) -> Result<()> {
    let path = directory.join("run.toml");
    let there = read_text(&path, Limits::default().text_file_bytes).ok();
    let there = there.and_then(|text| toml::from_str::<TrainSpec>(&text).ok());
    if there.as_ref() == Some(spec) {
        return Ok(());
    }
    let text = toml::to_string(spec)
        .map_err(|error| Error::format("training spec", &path, error.to_string()))?;
    let mut file = FileBeside::create(&path)?;
    file.write(text.as_bytes())?;
    Ok(file.stage(|_| Ok(()))?.publish()?)
}

fn drive(
    spec: &TrainSpec,
    mut learner: impl Learner,
    tokenizer: Option<Tokenizer>,
    mut claim: Claim<'_>,
    device: &Device,
) -> Result<Finished> {
    claim.make()?;
    let directory = claim.directory();
    let states = directory.join("states");
    let model_directory = directory.join("model");
    let mut best = Best::new(spec);
    let latest = state::latest(&states)?;
    if let Some(latest) = &latest {
        let state = state::load(latest, device, &state::Limits::default())?;
        learner.resume(&state)?;
        best.restore(&state)?;
    }
    write_spec(spec, directory)?;
    let start = learner.steps_done();
    let mut log = JsonLines::open(&directory.join("log.jsonl"), start + 1)?;
    let mut events = EventFile::create(directory)?;
    let mut progress = Progress::new(start, spec.steps);
    let started = std::time::Instant::now();
    let (mut last, mut tokens) = (None, 0);
    let due = |every: u64, step: u64| every > 0 && step.is_multiple_of(every);
    while learner.steps_done() < spec.steps {
        let step = learner.step()?;
        tokens += step.tokens;
        progress.step(step.step, step.loss, step.tokens);
        let mut values = values(&step);
        if let Some(spread) = learner.spread() {
            values.push(("teacher_entropy", spread.entropy));
            values.push(("teacher_information", spread.information()));
        }
        if due(spec.validation.every, step.step) && step.step < spec.steps {
            let loss = learner.validate()?;
            values.push(("validation_loss", loss));
            best.offer(step.step, loss, || learner.finished())?;
        }
        log.write(step.step, &values)?;
        events.write(step.step, &values)?;
        if due(spec.checkpoint.every, step.step) && step.step < spec.steps {
            log.sync()?;
            save(spec, &states, &learner, &best)?;
        }
        last = Some(step.loss);
    }
    progress.finish();
    let seconds = started.elapsed().as_secs_f64();
    // Before the validation: whatever ends that, no step is done again.
    if last.is_some() || latest.is_none() {
        log.sync()?;
        save(spec, &states, &learner, &best)?;
    }
    let steps = learner.steps_done();
    let last_validation_loss = learner.validate()?;
    let spread = learner.validation_spread()?;
    if best.offer(steps, last_validation_loss, || learner.finished())? {
        save(spec, &states, &learner, &best)?;
    }
    let kept = match best.into_found() {
        Some(found) => found,
        None => Validated {
            step: steps,
            loss: last_validation_loss,
            model: learner.finished()?,
        },
    };
    // A model that is there was left by this very run: it is made again from the resumed state.
    Package::new(kept.model, tokenizer).replace(&model_directory, None)?;
    Ok(Finished {
        loss: last,
        validation_loss: kept.loss,
        steps,
        kept_step: kept.step,
        last_validation_loss,
        model: model_directory,
        tokens_per_second: tokens as f64 / seconds.max(f64::MIN_POSITIVE),
        spread,
    })
}

/// Saves where a run is, with the best weights that it has found.
fn save(spec: &TrainSpec, states: &Path, learner: &impl Learner, best: &Best<'_>) -> Result<()> {
    let mut state = learner.state()?;
    best.save(&mut state);
    state::save(states, &state, spec.checkpoint.keep).map(|_| ())
}

fn values(step: &Step) -> Vec<(&'static str, f64)> {
    vec![
        ("loss", step.loss),
        ("gradient_norm", step.gradient_norm),
        ("rate", step.rate),
    ]
}

fn sources(spec: &TrainSpec, claim: &mut Claim<'_>) -> Result<Sources> {
    Ok(match &spec.data {
        DataSpec::Language { seed, mixture } => {
            let corpus = |split, stream: u64| {
                Corpus::new(
                    Language::new(*seed),
                    split,
                    *mixture,
                    seed.wrapping_add(stream),
                )
            };
            let training = corpus(Split::Training, 0)?;
            let words = training.language().vocabulary().words().to_vec();
            Sources {
                training: Box::new(LanguageTask::new(training)),
                validation: Box::new(LanguageTask::new(corpus(Split::HeldOut, 1)?)),
                tokenizer: Some(Tokenizer::of_words(&words).map_err(lapidary_model::Error::from)?),
            }
        }
        DataSpec::Text {
            file,
            tokenizer,
            order,
        } => {
            let Some(text) = file else {
                return Err(Error::Setting {
                    name: "data.file",
                    found: "absent".into(),
                    expected: "a text file, in the spec or on the command line",
                });
            };
            let tokenizer = text_tokenizer(text, tokenizer)?;
            spec.check_vocabulary(tokenizer.vocabulary_size())?;
            let ids = |piece: &str| -> Result<Vec<u32>> {
                Ok(tokenizer.ids(piece).map_err(lapidary_model::Error::from)?)
            };
            check_text(spec, text, ids)?;
            claim.make()?;
            let tokens = claim.directory().join("data.tokens");
            write_text(text, &tokens, tokenizer.vocabulary_size() as u32, ids)?;
            let (training, validation) = windows(spec, &tokens, text, *order)?;
            Sources {
                training,
                validation,
                tokenizer: Some(tokenizer),
            }
        }
        DataSpec::Tokens { file, order } => {
            let (training, validation) = windows(spec, file, file, *order)?;
            Sources {
                training,
                validation,
                tokenizer: None,
            }
        }
        DataSpec::Vertices { file } => {
            let training = Vertices::open(file)?;
            Sources {
                validation: Box::new(training.asked()?),
                training: Box::new(training),
                tokenizer: None,
            }
        }
        DataSpec::Images { .. } | DataSpec::Shapes { .. } => {
            return Err(Error::Setting {
                name: "data.kind",
                found: spec.data.of_images().unwrap_or_default().into(),
                expected: "one of tokens: images are handed to run_on_images",
            });
        }
        DataSpec::Copying { symbols } => generated(|| Copying::new(*symbols))?,
        DataSpec::Recall { keys, values } => generated(|| AssociativeRecall::new(*keys, *values))?,
        DataSpec::Induction { symbols } => generated(|| Induction::new(*symbols))?,
    })
}

fn generated<T: Task + 'static>(make: impl Fn() -> Result<T>) -> Result<Sources> {
    Ok(Sources {
        training: Box::new(make()?),
        validation: Box::new(make()?),
        tokenizer: None,
    })
}

type TrainingAndValidation = (Box<dyn Task>, Box<dyn Task>);

/// Windows over the tokens in `file`, which are those of `named`.
fn windows(
    spec: &TrainSpec,
    file: &Path,
    named: &Path,
    order: Order,
) -> Result<TrainingAndValidation> {
    let tokens = Arc::new(TokenFile::open(file)?);
    check_sides(spec, named, tokens.len())?;
    let (training, validation) = split(tokens.len(), spec.validation.fraction)?;
    let training = Windows::new(tokens.clone(), training, order)?;
    let validation = Windows::new(tokens, validation, Order::Sequential)?;
    Ok((Box::new(training), Box::new(validation)))
}

/// Refuses so many tokens of `file`, if there is not a window for training and one for validation.
fn check_sides(spec: &TrainSpec, file: &Path, tokens: u64) -> Result<()> {
    let (training, validation) = split(tokens, spec.validation.fraction)?;
    let needed = spec.length as u64 + 1;
    for (side, range) in [("training", training), ("validation", validation)] {
        let found = range.end - range.start;
        if found < needed {
            return Err(Error::TooShortSide {
                side,
                path: file.to_path_buf(),
                tokens,
                found,
                fraction: spec.validation.fraction,
                needed,
            });
        }
    }
    Ok(())
}

/// The same of a text, of which no more is read than it takes to know.
fn check_text(
    spec: &TrainSpec,
    text: &Path,
    mut ids: impl FnMut(&str) -> Result<Vec<u32>>,
) -> Result<()> {
    // What it gives is counted when it has been written.
    if is_read_once(text) {
        return Ok(());
    }
    let mut tokens = 0;
    each_piece(text, |piece| {
        tokens += ids(piece)?.len() as u64;
        Ok(match check_sides(spec, text, tokens) {
            Ok(()) => ControlFlow::Break(()),
            Err(_) => ControlFlow::Continue(()),
        })
    })?;
    check_sides(spec, text, tokens)
}

/// Whether it is a pipe or the like, of which nothing is left when it has been read.
fn is_read_once(text: &Path) -> bool {
    std::fs::metadata(text).is_ok_and(|found| !found.is_file() && !found.is_dir())
}

fn text_tokenizer(text: &Path, spec: &TokenizerSpec) -> Result<Tokenizer> {
    let tokenizer = match spec {
        TokenizerSpec::Bytes => Tokenizer::byte_level(&[]),
        TokenizerSpec::Words(_) if is_read_once(text) => {
            return Err(Error::Setting {
                name: "data.tokenizer",
                found: "words".into(),
                expected: "another for a pipe, which can be read but once: words are counted before",
            });
        }
        TokenizerSpec::Words(count) => {
            let text = read_text(text, Limits::default().text_file_bytes)
                .map_err(lapidary_model::Error::from)?;
            Tokenizer::word_level(text.lines(), *count, &[])
        }
        TokenizerSpec::Directory(directory) => Tokenizer::open(directory, &Limits::default()),
    };
    Ok(tokenizer.map_err(lapidary_model::Error::from)?)
}
