//! What is left of a list.

use super::super::{after_training, mean};
use crate::error::engine;
use crate::{Claim, Error, Plot, Result, Scale, Series};
use lapidary_explain::Question;
use lapidary_explain::analyses::channels::{
    Channel, ChannelOptions, ComponentEdit, Components, Composition, HeadId, Heads, Steering,
    channels, scale_components,
};
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::{Input, Model, Pass};
use lapidary_signal::Trace;
use lapidary_train::data::{Batch, IGNORE, Task};
use lapidary_train::{Generator, generator};
use rand::RngExt;
use rand::seq::SliceRandom;
use std::ops::RangeInclusive;

/// Objects that lists are made of.
pub(super) const NOUNS: usize = 64;
const ON_THE_TABLE: u32 = NOUNS as u32;
const TAKEN: u32 = ON_THE_TABLE + 1;
const LEFT: u32 = ON_THE_TABLE + 2;
const PAD: u32 = ON_THE_TABLE + 3;
/// Nouns, three words between them, and padding.
pub(super) const VOCABULARY: usize = NOUNS + 4;
const SIZES: RangeInclusive<usize> = 3..=8;
/// Tokens of a row: the longest prompt and its answer, less one.
pub(super) const LENGTH: usize = 2 * *SIZES.end() + 2;

/// One list: its prompt ends where the answer is asked for.
struct Prompt {
    tokens: Vec<u32>,
    /// Where in the list the answer stands.
    place: usize,
}

impl Prompt {
    fn draw(size: usize, generator: &mut Generator) -> Self {
        let mut nouns: Vec<u32> = (0..NOUNS as u32).collect();
        nouns.shuffle(generator);
        nouns.truncate(size);
        let place = generator.random_range(0..size);
        let taken = nouns
            .iter()
            .enumerate()
            .filter(|(index, _)| *index != place);
        let mut taken: Vec<u32> = taken.map(|(_, noun)| *noun).collect();
        taken.shuffle(generator);
        let tokens = [ON_THE_TABLE].into_iter().chain(nouns);
        let tokens = tokens.chain([TAKEN]).chain(taken).chain([LEFT]);
        Self {
            tokens: tokens.collect(),
            place,
        }
    }

    fn list(&self) -> &[u32] {
        let size = (self.tokens.len() - 2) / 2;
        self.tokens.get(1..=size).unwrap_or_default()
    }

    fn answer(&self) -> u32 {
        self.list().get(self.place).copied().unwrap_or(PAD)
    }
}

/// Lists of every size, with every next token to be predicted.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lists;

impl Task for Lists {
    fn vocabulary(&self) -> usize {
        VOCABULARY
    }

    fn batch(
        &mut self,
        generator: &mut Generator,
        rows: usize,
        length: usize,
    ) -> lapidary_train::Result<Batch> {
        let mut batch = Batch::with_capacity(rows, length);
        for _ in 0..rows {
            let prompt = Prompt::draw(generator.random_range(SIZES), generator);
            let targets = prompt
                .tokens
                .iter()
                .skip(1)
                .copied()
                .chain([prompt.answer()]);
            let targets = targets.chain(std::iter::repeat(IGNORE));
            batch.targets.extend(targets.take(length));
            let inputs = prompt.tokens.iter().copied().chain(std::iter::repeat(PAD));
            batch.inputs.extend(inputs.take(length));
            batch.rows += 1;
        }
        Ok(batch)
    }
}

fn prompts(size: usize, count: usize, seed: u64) -> Vec<Prompt> {
    let mut generator = generator(seed);
    generator.set_stream(1 + size as u64);
    (0..count)
        .map(|_| Prompt::draw(size, &mut generator))
        .collect()
}

/// Rows of one length.
fn input(prompts: &[&Prompt]) -> Result<Input> {
    let tokens: Vec<u32> = prompts
        .iter()
        .flat_map(|p| p.tokens.iter().copied())
        .collect();
    let shape = (prompts.len(), tokens.len() / prompts.len().max(1));
    Ok(Input::tokens(engine(Tensor::from_vec(
        tokens,
        shape,
        &Device::Cpu,
    ))?))
}

/// How often the most probable of the list's objects is the one that is left.
fn accuracy(model: &Model, prompts: &[&Prompt], trace: Option<&Trace>) -> Result<f64> {
    let pass = Pass {
        trace,
        only_last: true,
        ..Pass::default()
    };
    let logits = model
        .forward(&input(prompts)?, pass)?
        .into_logits()?
        .into_value();
    let logits = engine(engine(logits.squeeze(1))?.to_dtype(DType::F64))?;
    let logits = engine(logits.to_vec2::<f64>())?;
    let right = prompts.iter().zip(logits).map(|(prompt, logits)| {
        let of = |noun: &u32| {
            logits
                .get(*noun as usize)
                .copied()
                .unwrap_or(f64::NEG_INFINITY)
        };
        let best = prompt.list().iter().max_by(|a, b| of(a).total_cmp(&of(b)));
        f64::from(u8::from(best == Some(&prompt.answer())))
    });
    Ok(mean(right))
}

/// Loss of everything before the answer, in nats: what an edit does to text in general.
fn text_loss(model: &Model, prompts: &[&Prompt]) -> Result<f64> {
    let logits = model
        .forward(&input(prompts)?, Pass::default())?
        .into_logits()?
        .into_value();
    let (rows, length, vocabulary) = engine(logits.dims3())?;
    let logits = engine(logits.narrow(1, 0, length - 1))?;
    let logits = engine(logits.reshape((rows * (length - 1), vocabulary)))?;
    let targets: Vec<u32> = prompts
        .iter()
        .flat_map(|p| p.tokens.iter().skip(1).copied())
        .collect();
    let targets = engine(Tensor::from_slice(&targets, targets.len(), logits.device()))?;
    let loss = lapidary_kernels::cross_entropy(&logits, &targets, &Default::default())?;
    super::super::number(&loss)
}

/// The head of the last block that looks most at the answer from the end.
fn mover(model: &Model, prompts: &[&Prompt]) -> Result<HeadId> {
    let block = model.spec().expanded_blocks().len() - 1;
    let site = format!("blocks.{block}.attention.weights");
    let trace = Trace::new().capture(&site)?;
    accuracy(model, prompts, Some(&trace))?;
    let weights = trace.signal(&site)?.into_value();
    let (_, heads, length, _) = engine(weights.dims4())?;
    let mut best = (0, f64::NEG_INFINITY);
    for head in 0..heads {
        let last = engine(
            weights
                .narrow(1, head, 1)
                .and_then(|w| w.narrow(2, length - 1, 1)),
        )?;
        let last = engine(engine(last.squeeze(2))?.squeeze(1))?;
        let last = engine(engine(last.to_dtype(DType::F64))?.to_vec2::<f64>())?;
        let on_answer = prompts
            .iter()
            .zip(&last)
            .filter_map(|(p, row)| row.get(1 + p.place));
        let weight = mean(on_answer.copied());
        if weight > best.1 {
            best = (head, weight);
        }
    }
    Ok(HeadId {
        block,
        head: best.0,
    })
}

/// Accuracy at each size, as it is and repaired.
pub(super) struct Repair {
    mover: HeadId,
    sizes: Vec<usize>,
    plain: Vec<f64>,
    scaled: Vec<f64>,
    zeroed: Vec<f64>,
    /// At the largest size alone.
    steered: f64,
    factors: Vec<f64>,
    text_change: f64,
    chance_of_steering: f64,
}

/// What a component's singular value is tried at.
const FACTORS: [f64; 6] = [0.0, 0.5, 1.5, 2.0, 3.0, 5.0];
/// Components that are scaled, and of these, directions that are steered along.
const SCALED: usize = 6;
const STEERED: usize = 2;
/// Deviations from the mean coordinate that are tried, on each axis.
const GRID: [f64; 7] = [-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0];

impl Repair {
    pub(super) fn measure(model: &Model, count: usize, seed: u64) -> Result<Self> {
        let largest = *SIZES.end();
        let training = prompts(largest, 2 * count, seed ^ 0xa11);
        let testing: Vec<Vec<Prompt>> = SIZES
            .map(|size| prompts(size, 2 * count, seed ^ 0x7e57))
            .collect();
        let training: Vec<&Prompt> = training.iter().collect();
        let testing: Vec<Vec<&Prompt>> = testing.iter().map(|p| p.iter().collect()).collect();
        let mover = mover(model, &training)?;
        let read = most_read(model, mover, seed)?;
        let each = |model: &Model| -> Result<Vec<f64>> {
            testing
                .iter()
                .map(|prompts| accuracy(model, prompts, None))
                .collect()
        };

        let (factors, repaired) = scale(model, &read, &training)?;
        let zero = read
            .iter()
            .map(|channel| edit(channel, 0.0))
            .collect::<Vec<_>>();
        let at_largest = testing
            .last()
            .ok_or_else(|| Error::Experiment("there are no sizes of lists".to_owned()))?;
        let (steered, chance_of_steering) = steer(model, mover, &read, &training, at_largest)?;
        Ok(Self {
            mover,
            sizes: SIZES.collect(),
            plain: each(model)?,
            scaled: each(&repaired)?,
            zeroed: each(&scale_components(model, &zero)?)?,
            steered,
            factors,
            text_change: text_loss(&repaired, at_largest)? - text_loss(model, at_largest)?,
            chance_of_steering,
        })
    }

    pub(super) fn claims(&self, scale: Scale) -> Vec<Claim> {
        let last = |values: &[f64]| values.last().copied().unwrap_or(f64::NAN);
        let first = self.plain.first().copied().unwrap_or(f64::NAN);
        let shown = |values: &[f64]| {
            let each: Vec<String> = values.iter().map(|v| format!("{:.0}", 100.0 * v)).collect();
            each.join(", ")
        };
        let gain = |to: f64| 100.0 * (to - last(&self.plain));
        let (scaling, steering) = (gain(last(&self.scaled)), gain(self.steered));
        vec![
            Claim::new(
                "(b) accuracy falls as the list grows",
                "GPT-2: 64 % at 3 objects, 51 % at 8",
                format!("{} % at 3 to 8 objects", shown(&self.plain)),
                after_training(scale, last(&self.plain) < first),
            ),
            Claim::new(
                "(b) scaling the components that the mover head reads, or steering along them, as \
                 learned on training prompts, gains at least 10 points at 8 objects on test prompts",
                "often over 20 points: 64 to 86 % at 3 objects, 51 to 67 % at 8",
                format!(
                    "mover {}: scaling by {:?} {scaling:+.0} points; steering {steering:+.0} points",
                    self.mover, self.factors
                ),
                after_training(scale, scaling.max(steering) >= 10.0),
            )
            .noted(format!(
                "steering is told where in the list the answer stands, as in the paper; always \
                 steering as for one place gives {:.0} %",
                100.0 * self.chance_of_steering
            )),
            Claim::new(
                "(b) the loss of other text changes by less than 0.05 under the scaled weights",
                "none published",
                format!("{:+.3} nats", self.text_change),
                after_training(scale, self.text_change.abs() < 0.05),
            )
            .noted(format!(
                "with the components zeroed, accuracy is {} %",
                shown(&self.zeroed)
            )),
        ]
    }

    pub(super) fn plot(&self) -> Plot {
        let line = |name: &str, values: &[f64]| Series {
            name: name.to_owned(),
            points: self
                .sizes
                .iter()
                .map(|s| *s as f64)
                .zip(values.iter().copied())
                .collect(),
        };
        Plot {
            title: "What is left of a list".to_owned(),
            x: "objects".to_owned(),
            y: "accuracy".to_owned(),
            series: vec![
                line("as trained", &self.plain),
                line("components scaled", &self.scaled),
                line("components zeroed", &self.zeroed),
                Series {
                    name: "steered".to_owned(),
                    points: self
                        .sizes
                        .last()
                        .map(|s| (*s as f64, self.steered))
                        .into_iter()
                        .collect(),
                },
            ],
        }
    }
}

fn edit(channel: &Channel, factor: f64) -> ComponentEdit {
    ComponentEdit {
        head: channel.writer,
        component: channel.component,
        factor,
    }
}

/// The components that the mover's queries read most.
fn most_read(model: &Model, mover: HeadId, seed: u64) -> Result<Vec<Channel>> {
    let all = ChannelOptions {
        threshold: f64::MIN,
        draws: 1,
    };
    let mut found = channels(&Heads::of(model)?, &all, &mut generator(seed))?;
    found.retain(|c| c.reader == mover && c.composition == Composition::Query);
    found.truncate(SCALED);
    Ok(found)
}

/// One pass over the components: each takes the factor that helps most on the training prompts.
fn scale(model: &Model, read: &[Channel], training: &[&Prompt]) -> Result<(Vec<f64>, Model)> {
    let mut factors = vec![1.0; read.len()];
    let edited = |factors: &[f64]| -> Result<Model> {
        let edits: Vec<_> = read.iter().zip(factors).map(|(c, f)| edit(c, *f)).collect();
        Ok(scale_components(model, &edits)?)
    };
    let mut best = accuracy(model, training, None)?;
    for index in 0..read.len() {
        for factor in FACTORS {
            let mut tried = factors.clone();
            if let Some(value) = tried.get_mut(index) {
                *value = factor;
            }
            let found = accuracy(&edited(&tried)?, training, None)?;
            if found > best {
                (best, factors) = (found, tried);
            }
        }
    }
    let repaired = edited(&factors)?;
    Ok((factors, repaired))
}

/// Test accuracy when each answer's place is steered to the coordinates that were best for it on
/// training prompts; and the best that steering to one place for all would give.
fn steer(
    model: &Model,
    mover: HeadId,
    read: &[Channel],
    training: &[&Prompt],
    testing: &[&Prompt],
) -> Result<(f64, f64)> {
    let heads = Heads::of(model)?;
    let directions = read
        .iter()
        .take(STEERED)
        .map(|c| Ok(Components::of(&heads.head(c.writer)?)?.direction(c.component)?))
        .collect::<Result<Vec<_>>>()?;
    let end = 2 * *SIZES.end() + 1;
    let steering = Steering::new(mover.block, end, &directions)?;
    let axes = natural(model, &steering, training)?;
    let mut grid = vec![Vec::new()];
    for (centre, spread) in axes {
        grid = grid
            .into_iter()
            .flat_map(|start: Vec<f64>| {
                GRID.map(|step| {
                    start
                        .iter()
                        .copied()
                        .chain([centre + step * spread])
                        .collect()
                })
            })
            .collect();
    }
    let (mut right, mut counted) = (0.0, 0.0);
    let mut for_all = vec![0.0; grid.len()];
    for place in 0..*SIZES.end() {
        let [own, test] = [training, testing].map(|prompts| -> Vec<&Prompt> {
            prompts
                .iter()
                .filter(|p| p.place == place)
                .copied()
                .collect()
        });
        if own.is_empty() || test.is_empty() {
            continue;
        }
        let mut best = (accuracy(model, &own, None)?, None);
        for (index, coordinates) in grid.iter().enumerate() {
            let trace = steering.trace(coordinates)?;
            let found = accuracy(model, &own, Some(&trace))?;
            if let Some(sum) = for_all.get_mut(index) {
                *sum += found * own.len() as f64;
            }
            if found > best.0 {
                best = (found, Some(coordinates));
            }
        }
        let trace = best
            .1
            .map(|coordinates| steering.trace(coordinates))
            .transpose()?;
        right += accuracy(model, &test, trace.as_ref())? * test.len() as f64;
        counted += test.len() as f64;
    }
    let best = for_all.into_iter().fold(0.0, f64::max) / training.len() as f64;
    Ok((right / f64::max(counted, 1.0), best))
}

/// Mean and deviation of each coordinate over prompts.
fn natural(model: &Model, steering: &Steering, prompts: &[&Prompt]) -> Result<Vec<(f64, f64)>> {
    let mut found = Vec::new();
    for prompt in prompts.iter().copied().take(48) {
        let input = input(&[prompt])?;
        found.push(steering.coordinates(&Question::new(model, &input))?);
    }
    let axes = found.first().map_or(0, Vec::len);
    let of = |axis: usize| found.iter().filter_map(move |c| c.get(axis).copied());
    Ok((0..axes)
        .map(|axis| {
            let centre = mean(of(axis));
            let spread = mean(of(axis).map(|x| (x - centre).powi(2))).sqrt();
            (centre, spread)
        })
        .collect())
}
