//! All mechanisms of attention beside each other: the same width, blocks, steps and data, five tasks,
//! what they get right against the time that a step takes and the memory that it holds.
//!
//! No paper has this comparison. What a mechanism is good at at length 64 says little of length 8 192;
//! `lapidary bench mixers` has the times of long sequences.

use super::after_training;
use super::attending;
use super::classifier::{Labelled, Narrow};
use super::decoder::{Recipe, train_by};
use super::jobs::in_parallel;
use super::masked;
use super::sequences::{
    Course, LEVELS, LIST_TOKENS, Measures, digits, lists_up_to, milliseconds_a_step, percent_right,
    train,
};
use crate::mechanisms::{Mechanism, mechanisms};
use crate::{Claim, Plot, Reproduction, Result, Scale, Series, Setting, Verdict};
use lapidary_kernels::{DType, Device, memory};
use lapidary_model::{HeadSpec, Initialiser, Model, ModelSpec};
use lapidary_parts::attention::MixerSpec;
use lapidary_train::generator;
use rand::RngExt;
use rand::seq::SliceRandom;

const WIDTH: usize = 32;
const HEADS: usize = 4;
const BLOCKS: usize = 2;
/// The longest sequence of a task.
const LONGEST: usize = 128;

/// How much is done.
struct Size {
    examples: usize,
    /// On digits and on the order of motifs.
    steps: u64,
    /// On lists and recall, where small models soon guess from what occurs and stay with that.
    steps_of_guesses: u64,
    /// Tokens of a list.
    longest_list: usize,
    batch: usize,
    text_steps: u64,
    text_batch: usize,
    text_batches: usize,
    /// Every so many mechanisms one is run.
    every: usize,
}

impl Size {
    fn of(scale: Scale) -> Self {
        match scale {
            Scale::Smoke => Self {
                examples: 40,
                steps: 1,
                steps_of_guesses: 1,
                longest_list: 48,
                batch: 8,
                text_steps: 1,
                text_batch: 2,
                text_batches: 1,
                every: 3,
            },
            Scale::Small => Self {
                examples: 4000,
                steps: 400,
                steps_of_guesses: 200,
                longest_list: 48,
                batch: 16,
                text_steps: 200,
                text_batch: 4,
                text_batches: 16,
                every: 1,
            },
            Scale::Full => Self {
                examples: 40_000,
                steps: 10_000,
                steps_of_guesses: 10_000,
                longest_list: 120,
                batch: 32,
                text_steps: 10_000,
                text_batch: 8,
                text_batches: 64,
                every: 1,
            },
        }
    }
}

/// A task of sequences with one answer each.
struct Task {
    name: &'static str,
    vocabulary: usize,
    labels: usize,
    steps: u64,
    training: Vec<Labelled>,
    held_out: Vec<Labelled>,
}

impl Task {
    fn spec(&self, candidate: &Mechanism) -> ModelSpec {
        let measures = Measures {
            vocabulary: self.vocabulary,
            length: LONGEST,
            labels: self.labels,
            width: WIDTH,
            heads: HEADS,
            blocks: BLOCKS,
        };
        arranged(measures.spec(Default::default(), true), candidate, LONGEST)
    }
}

fn tasks(size: &Size, seed: u64) -> Vec<Task> {
    let halves = |make: &dyn Fn(usize, u64) -> Vec<Labelled>| {
        (
            make(size.examples, seed),
            make(size.examples / 8, seed ^ 0x7e57),
        )
    };
    let task = |name, sizes: [usize; 2], steps, make: &dyn Fn(usize, u64) -> Vec<Labelled>| {
        let ([vocabulary, labels], (training, held_out)) = (sizes, halves(make));
        Task {
            name,
            vocabulary,
            labels,
            steps,
            training,
            held_out,
        }
    };
    let lists = |count, seed| lists_up_to(size.longest_list, count, seed);
    vec![
        task("digits", [LEVELS, 10], size.steps, &digits),
        task("lists", [LIST_TOKENS, 10], size.steps_of_guesses, &lists),
        task("recall", [24, 8], size.steps_of_guesses, &recall),
        task("order", [16, 2], size.steps, &order),
    ]
}

/// Eight pairs of a key (0 to 15) and a value (16 to 23), then one of the keys: its value is the answer.
fn recall(count: usize, seed: u64) -> Vec<Labelled> {
    let mut random = generator(seed);
    (0..count)
        .map(|_| {
            let mut keys: Vec<u32> = (0..16).collect();
            keys.shuffle(&mut random);
            let pairs: Vec<(u32, u32)> = keys
                .into_iter()
                .take(8)
                .map(|key| (key, random.random_range(0..8)))
                .collect();
            let mut tokens: Vec<u32> = pairs.iter().flat_map(|&(k, v)| [k, 16 + v]).collect();
            let asked = random.random_range(0..pairs.len());
            let (key, label) = pairs.get(asked).copied().unwrap_or_default();
            tokens.push(key);
            Labelled { tokens, label }
        })
        .collect()
}

/// Noise (tokens 0 to 11) with the motifs `12 13` and `14 15` somewhere: which comes first.
fn order(count: usize, seed: u64) -> Vec<Labelled> {
    const LENGTH: usize = 64;
    let mut random = generator(seed);
    (0..count)
        .map(|_| {
            let mut tokens: Vec<u32> = (0..LENGTH).map(|_| random.random_range(0..12)).collect();
            let first = random.random_range(0..LENGTH / 2 - 1);
            let second = random.random_range(LENGTH / 2..LENGTH - 1);
            let label = random.random_range(0..2u32);
            let [early, late] = if label == 0 { [12, 14] } else { [14, 12] };
            for (at, motif) in [(first, early), (second, late)] {
                for (token, new) in tokens.iter_mut().skip(at).take(2).zip([motif, motif + 1]) {
                    *token = new;
                }
            }
            Labelled { tokens, label }
        })
        .collect()
}

/// The attention of every block, as a mechanism is compared.
fn arranged(mut spec: ModelSpec, candidate: &Mechanism, longest: usize) -> ModelSpec {
    for block in &mut spec.blocks {
        if let MixerSpec::MultiHead(attention) = &block.attention {
            block.attention = candidate.mixer(attention.heads, longest);
        }
    }
    spec
}

/// What one mechanism did.
struct Row {
    name: &'static str,
    causal: bool,
    /// Percent right, task by task.
    right: Vec<f64>,
    /// Nats of a next byte where it is causal, of a hidden one otherwise.
    text: f64,
    parameters: usize,
    /// Milliseconds of a training step on digits.
    step: f64,
    /// Most bytes that training on digits holds beyond the model, where they are counted.
    held: Option<usize>,
}

/// Runs the experiment.
pub fn run(setting: &Setting) -> Result<Reproduction> {
    let size = Size::of(setting.scale);
    let tasks = tasks(&size, setting.seed);
    let what = masked::text(setting)?.what;
    let candidates: Vec<&Mechanism> = mechanisms().iter().step_by(size.every).collect();
    let scores = scores(setting, &size, &tasks, &candidates)?;
    let mut rows = Vec::new();
    for (candidate, scores) in candidates.iter().zip(scores.chunks(tasks.len() + 1)) {
        rows.push(costs(setting, &size, &tasks, candidate, scores)?);
    }
    let mut claims = vec![budget(&rows)];
    claims.extend(rows.iter().map(|row| told(setting, &tasks, row)));
    let series = rows
        .iter()
        .map(|row| Series {
            name: row.name.to_owned(),
            points: vec![(row.step, super::mean(row.right.iter().copied()))],
        })
        .collect();
    Ok(Reproduction {
        setting: format!(
            "{BLOCKS} blocks of width {WIDTH} with {HEADS} heads and a table of positions; {} examples in steps \
             of {}, {} steps on digits and order, {} on recall and on lists of at most {} tokens; {what}, {} steps \
             of {} windows of {LONGEST}; one seed; time and memory of training on digits, the model itself left \
             out",
            size.examples,
            size.batch,
            size.steps,
            size.steps_of_guesses,
            size.longest_list,
            size.text_steps,
            size.text_batch
        ),
        claims,
        plots: vec![Plot {
            title: "Mean accuracy of four tasks against the time of a training step".to_owned(),
            x: format!("milliseconds a step, {} sequences of 64", size.batch),
            y: "percent right".to_owned(),
            series,
        }],
        ..Reproduction::default()
    })
}

/// What every mechanism in turn gets right of each task, in percent, and its loss of text.
fn scores(
    setting: &Setting,
    size: &Size,
    tasks: &[Task],
    candidates: &[&Mechanism],
) -> Result<Vec<f64>> {
    let mut jobs = Vec::new();
    for &candidate in candidates {
        for task in tasks.iter().map(Some).chain([None]) {
            let on = task.map_or("text", |task| task.name);
            jobs.push((format!("{} on {on}", candidate.name), (candidate, task)));
        }
    }
    in_parallel(setting, jobs, |(candidate, task)| match task {
        None => on_text(setting, size, candidate),
        Some(task) => {
            let course = course(size, task, setting.seed);
            let model = train(task.spec(candidate), &task.training, &course)?;
            percent_right(&model, &task.held_out)
        }
    })
}

fn course(size: &Size, task: &Task, seed: u64) -> Course {
    Course {
        steps: task.steps,
        batch: size.batch,
        rate: 3e-3,
        seed,
    }
}

/// A mechanism's scores with what it costs on the first task, which is measured while nothing else runs.
fn costs(
    setting: &Setting,
    size: &Size,
    tasks: &[Task],
    candidate: &Mechanism,
    scores: &[f64],
) -> Result<Row> {
    setting.tell(|| format!("{}, time and memory", candidate.name));
    let (mut step, mut held, mut parameters) = (f64::NAN, None, 0);
    if let Some(task) = tasks.first() {
        let mut source = Narrow(Initialiser::new(setting.seed, DType::F32, Device::Cpu));
        let model = Model::trainable(task.spec(candidate), &mut source)?;
        parameters = model.parameter_count();
        let course = course(size, task, setting.seed);
        let steps = || milliseconds_a_step(&model, &task.training, &course);
        let (taken, most) = memory::most_held(steps);
        (step, held) = (taken?, most);
    }
    Ok(Row {
        name: candidate.name,
        causal: candidate.causal,
        right: scores.iter().take(tasks.len()).copied().collect(),
        text: scores.last().copied().unwrap_or(f64::NAN),
        parameters,
        step,
        held,
    })
}

/// Nats of a next byte where the mechanism is causal, of a hidden one otherwise; not a number without text.
fn on_text(setting: &Setting, size: &Size, candidate: &Mechanism) -> Result<f64> {
    if !candidate.causal {
        let mut text = masked::text(setting)?;
        let measures = Measures {
            vocabulary: text.vocabulary + 1,
            length: LONGEST,
            labels: 1,
            width: WIDTH,
            heads: HEADS,
            blocks: BLOCKS,
        };
        let mut spec = arranged(measures.spec(Default::default(), true), candidate, LONGEST);
        spec.head = HeadSpec::LanguageModel {
            tied: true,
            bias: true,
            transform: None,
        };
        let course = masked::Course {
            steps: size.text_steps,
            batch: size.text_batch,
            length: LONGEST,
            hidden: 0.15,
            rate: 3e-3,
            questions: size.text_batches,
            seed: setting.seed,
        };
        return Ok(text.study(spec, &course)?.loss);
    }
    let Some([training, held_out]) = attending::shakespeare(setting)? else {
        return Ok(f64::NAN);
    };
    let attention = candidate.attention(HEADS, LONGEST);
    let spec = attending::spec(256, WIDTH, LONGEST, &vec![attention; BLOCKS]);
    let recipe = Recipe {
        batch: size.text_batch,
        length: LONGEST,
        peak: 3e-3,
        alignment: None,
        narrow: true,
        dense_steps: 0,
    };
    let model = train_by(
        recipe,
        spec,
        Box::new(training),
        size.text_steps,
        setting.seed,
    )?;
    let mut task = held_out;
    Ok(attending::measure(&model, &mut task, recipe, size.text_batches)?.loss)
}

/// That the comparison is one of equals.
fn budget(rows: &[Row]) -> Claim {
    let counts: Vec<f64> = rows.iter().map(|row| row.parameters as f64).collect();
    let most = counts.iter().copied().fold(0.0, f64::max);
    let usual = counts.first().copied().unwrap_or(f64::NAN);
    let largest = rows
        .iter()
        .max_by_key(|row| row.parameters)
        .map_or("", |row| row.name);
    Claim::new(
        "no mechanism has more than twice the parameters of softmax in the same model",
        "not compared anywhere",
        format!("softmax {usual:.0}, at most {most:.0} ({largest})"),
        Verdict::of(most <= 2.0 * usual),
    )
}

fn told(setting: &Setting, tasks: &[Task], row: &Row) -> Claim {
    let each: Vec<String> = tasks
        .iter()
        .zip(&row.right)
        .map(|(task, right)| format!("{} {right:.1} %", task.name))
        .collect();
    let chance = |task: &Task| 100.0 / task.labels as f64;
    let learns = tasks
        .iter()
        .zip(&row.right)
        .all(|(task, right)| *right > chance(task) + 3.0);
    let text = match (row.text.is_nan(), row.causal) {
        (true, _) => "no text".to_owned(),
        (false, true) => format!("{:.3} nats of a next byte", row.text),
        (false, false) => format!("{:.3} nats of a hidden token", row.text),
    };
    let held = match row.held {
        None => "memory not counted".to_owned(),
        Some(bytes) => format!("{:.1} MiB held", bytes as f64 / f64::from(1 << 20)),
    };
    Claim::new(
        &format!(
            "{}: at least three points above chance on all four tasks with one answer",
            row.name
        ),
        "not compared anywhere",
        format!(
            "{}; {text}; {:.1} ms a step, {held}, {} parameters",
            each.join(", "),
            row.step,
            row.parameters
        ),
        after_training(setting.scale, learns),
    )
}
