//! FuseGPT beside deletion, its own control, and ReplaceMe.
//!
//! The paper takes a quarter of the blocks of Llama-2-7B. Here small decoders of the generated
//! language lose a quarter of theirs, with the published rates and passes, and every way that is
//! fitted sees the same windows as often.
//!
//! What it costs at small scale: for each of three seeds a decoder of eight blocks is trained for 300 steps, and four
//! ways tune seven and then six of its blocks for 160 steps each. Decoders, and then ways on them, are jobs that threads
//! share. The squared error, by which no claim is judged, is left to the full scale.

use super::depth::{Size, Subject};
use super::jobs::{in_parallel, over_seeds};
use super::texts::Sides;
use super::{after_training, mean};
use crate::error::engine;
use crate::{Claim, Error, Plot, Reproduction, Result, Scale, Series, Setting, Verdict};
use lapidary_compress::{
    Budget, Change, Compressed, CosineDescent, FuseLoss, FuseSettings, Gate, Method, ReplaceMe,
    Settings, Task, macro_influences,
};
use lapidary_model::Model;

/// Sequences of a step, as published.
const BATCH: usize = 8;

/// Rate of corrections in the control that is given that of gates.
const GATE_RATE: f64 = 1e-3;

/// A way to take blocks out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    BlockInfluence,
    MacroInfluence,
    ReplaceMe,
    ReplaceMeCosine,
    Lora,
    FastLora,
    Fuse,
    FuseRows,
    FuseSquares,
}

impl Way {
    const ALL: [Self; 9] = [
        Self::BlockInfluence,
        Self::MacroInfluence,
        Self::ReplaceMe,
        Self::ReplaceMeCosine,
        Self::Lora,
        Self::FastLora,
        Self::Fuse,
        Self::FuseRows,
        Self::FuseSquares,
    ];

    /// Those that are measured at a scale.
    fn at(scale: Scale) -> impl Iterator<Item = Self> {
        // The smallest scale tries all that the largest does.
        let judged = move |way: &Self| scale != Scale::Small || *way != Self::FuseSquares;
        Self::ALL.into_iter().filter(judged)
    }

    fn name(self) -> &'static str {
        match self {
            Self::BlockInfluence => "block influence",
            Self::MacroInfluence => "macro influence",
            Self::ReplaceMe => "ReplaceMe",
            Self::ReplaceMeCosine => "ReplaceMe by angle",
            Self::Lora => "LoRA alone",
            Self::FastLora => "LoRA alone at the gates' rate",
            Self::Fuse => "FuseGPT",
            Self::FuseRows => "FuseGPT, a gate for each row",
            Self::FuseSquares => "FuseGPT, squared error",
        }
    }

    fn method(self) -> &'static str {
        match self {
            Self::BlockInfluence => "block-influence",
            Self::MacroInfluence => "macro-influence",
            Self::ReplaceMe => "replaceme",
            Self::ReplaceMeCosine => "replaceme-cosine",
            Self::Lora | Self::FastLora => "fuse-lora",
            Self::Fuse | Self::FuseRows | Self::FuseSquares => "fusegpt",
        }
    }

    fn settings(self, scale: Scale, seed: u64) -> Settings {
        let fuse = fuse(scale);
        Settings {
            batch: BATCH,
            seed,
            fuse: FuseSettings {
                rate: match self {
                    Self::FastLora => GATE_RATE,
                    _ => fuse.rate,
                },
                gate: match self {
                    Self::FuseRows => Gate::Row,
                    _ => fuse.gate,
                },
                loss: match self {
                    Self::FuseSquares => FuseLoss::SquaredError,
                    _ => fuse.loss,
                },
                ..fuse
            },
            replace_me: ReplaceMe {
                // The published rate is for thousands of steps; here there are hundreds.
                cosine: CosineDescent {
                    rate: 1e-3,
                    epochs: fuse.epochs,
                    batch: BATCH * super::decoder::LENGTH,
                    ..CosineDescent::default()
                },
                ..ReplaceMe::default()
            },
            ..Settings::default()
        }
    }
}

fn fuse(scale: Scale) -> FuseSettings {
    FuseSettings {
        epochs: match scale {
            Scale::Smoke => 1,
            Scale::Small | Scale::Full => 20,
        },
        ..FuseSettings::default()
    }
}

fn seeds(scale: Scale) -> u64 {
    match scale {
        Scale::Smoke => 1,
        Scale::Small | Scale::Full => 3,
    }
}

/// One way on one decoder.
struct Point {
    way: Way,
    loss: f64,
    /// How far the last group that was tuned stayed from what it gave.
    missed: Option<f64>,
}

/// What one decoder showed.
struct Trial {
    points: Vec<Point>,
    beside: Beside,
}

/// What is measured of a decoder beside the ways.
struct Beside {
    whole: f64,
    /// Losses when 1, 2, … blocks are deleted in either order.
    by_blocks: Vec<[f64; 2]>,
    exact: Exact,
}

/// What holds of any weights.
struct Exact {
    /// Between fusing with no step and deleting, in nats.
    untuned: f64,
    /// Macro influence of a block that does nothing, and whether it is chosen.
    silent: f64,
    chosen: bool,
}

/// What is asked of a decoder at one time.
#[derive(Clone, Copy)]
enum Question {
    Way(Way),
    Beside,
}

impl Question {
    fn name(self) -> &'static str {
        match self {
            Self::Way(way) => way.name(),
            Self::Beside => "deletion by either influence",
        }
    }
}

enum Answer {
    Way(Point),
    Beside(Beside),
}

/// Runs the experiment.
pub fn run(setting: &Setting) -> Result<Reproduction> {
    let size = Size::of(setting.scale);
    let removed = size.blocks / 4;
    let text = Sides::of(setting)?;
    let trials = trials(setting, &text, size, removed)?;
    let settings = fuse(setting.scale);
    Ok(Reproduction {
        setting: format!(
            "{}; {} seeds; {removed} of {} blocks go; {} passes in batches of {BATCH}, gates at \
             rate {}, corrections at {}, rank {} or less, groups of {}",
            size.describe_on(&text.what),
            trials.len(),
            size.blocks,
            settings.epochs,
            settings.gate_rate,
            settings.rate,
            settings.rank,
            settings.group
        ),
        claims: claims(setting.scale, &trials),
        plots: vec![
            Plot {
                title: "Perplexity with a quarter of the blocks gone".to_owned(),
                x: "seed".to_owned(),
                y: "held-out perplexity".to_owned(),
                series: Way::at(setting.scale)
                    .map(|way| Series {
                        name: way.name().to_owned(),
                        points: (0..)
                            .map(f64::from)
                            .zip(&trials)
                            .map(|(seed, trial)| (seed, trial.loss(way).exp()))
                            .collect(),
                    })
                    .collect(),
            },
            Plot {
                title: "Blocks deleted by either influence".to_owned(),
                x: "blocks removed".to_owned(),
                y: "held-out perplexity, mean over seeds".to_owned(),
                series: [(0, "macro influence"), (1, "block influence")]
                    .map(|(order, name)| Series {
                        name: name.to_owned(),
                        points: depths(&trials, order),
                    })
                    .to_vec(),
            },
        ],
        ..Reproduction::default()
    })
}

impl Trial {
    fn point(&self, way: Way) -> Option<&Point> {
        self.points.iter().find(|point| point.way == way)
    }

    fn loss(&self, way: Way) -> f64 {
        self.point(way).map_or(f64::NAN, |point| point.loss)
    }

    fn missed(&self, way: Way) -> f64 {
        let missed = self.point(way).and_then(|point| point.missed);
        missed.unwrap_or(f64::NAN)
    }
}

fn trials(setting: &Setting, text: &Sides, size: Size, removed: usize) -> Result<Vec<Trial>> {
    let scale = setting.scale;
    let subjects = over_seeds(setting, seeds(scale), |seed| {
        Subject::trained(text.for_seed(seed)?, size, seed)
    })?;
    let asked: Vec<Question> = Way::at(scale)
        .map(Question::Way)
        .chain([Question::Beside])
        .collect();
    let mut jobs = Vec::new();
    for (seed, subject) in (setting.seed..).zip(&subjects) {
        for question in &asked {
            let name = format!("{}, seed {seed}", question.name());
            jobs.push((name, (seed, subject, *question)));
        }
    }
    let answers = in_parallel(setting, jobs, |(seed, subject, question)| {
        Ok(match question {
            Question::Way(way) => {
                let settings = way.settings(scale, seed);
                let cut = subject.without(way.method(), removed, size.blocks, &settings)?;
                Answer::Way(Point {
                    way,
                    loss: subject.loss(&cut.model)?,
                    missed: missed(&cut),
                })
            }
            Question::Beside => Answer::Beside(beside(subject, size, removed, scale, seed)?),
        })
    })?;
    let mut answers = answers.into_iter();
    let each = subjects.iter().map(|_| {
        let (mut points, mut found) = (Vec::new(), None);
        for answer in answers.by_ref().take(asked.len()) {
            match answer {
                Answer::Way(point) => points.push(point),
                Answer::Beside(beside) => found = Some(beside),
            }
        }
        let nothing = || Error::Experiment("nothing was measured beside the ways".to_owned());
        Ok(Trial {
            points,
            beside: found.ok_or_else(nothing)?,
        })
    });
    each.collect()
}

fn beside(
    subject: &Subject,
    size: Size,
    removed: usize,
    scale: Scale,
    seed: u64,
) -> Result<Beside> {
    let most = (size.blocks - 2).min(6);
    let by_blocks = (1..=most)
        .map(|count| {
            let loss = |way: Way| -> Result<f64> {
                let settings = way.settings(scale, seed);
                let cut = subject.without(way.method(), count, size.blocks, &settings)?;
                subject.loss(&cut.model)
            };
            Ok([loss(Way::MacroInfluence)?, loss(Way::BlockInfluence)?])
        })
        .collect::<Result<Vec<_>>>()?;
    Ok(Beside {
        whole: subject.loss(&subject.model)?,
        by_blocks,
        exact: exact(subject, size, removed, seed)?,
    })
}

/// Of the block that went last.
fn missed(cut: &Compressed) -> Option<f64> {
    let gone = cut.report.modules.iter();
    let mut gone = gone.filter(|module| module.change == Change::Remove);
    gone.next_back()?.chosen.map(|errors| errors.unweighted)
}

fn exact(subject: &Subject, size: Size, removed: usize, seed: u64) -> Result<Exact> {
    let still = Settings {
        batch: BATCH,
        seed,
        fuse: FuseSettings {
            epochs: 0,
            ..FuseSettings::default()
        },
        ..Settings::default()
    };
    let loss = |method: &str| -> Result<f64> {
        let cut = subject.without(method, removed, size.blocks, &still)?;
        subject.loss(&cut.model)
    };
    let mut parameters = subject.model.parameters().clone();
    for (name, tensor) in &mut parameters {
        let writes = ["attention.output", "feedforward.down"];
        if writes
            .iter()
            .any(|part| name.starts_with(&format!("blocks.1.{part}")))
        {
            *tensor = engine(tensor.zeros_like())?;
        }
    }
    let silent = Model::new(subject.model.spec().clone(), &mut parameters)?;
    let scores = macro_influences(&silent, &subject.data, BATCH)?;
    let task = Task {
        data: Some(&subject.data),
        settings: Some(&still),
        ..Task::new(&silent)
    };
    let keep = 1.0 - 1.0 / size.blocks as f64;
    let plan = Method::find("fusegpt")?.plan(&task, &Budget::Keep(keep))?;
    Ok(Exact {
        untuned: (loss("fusegpt")? - loss("macro-influence")?).abs(),
        silent: scores.get(1).copied().unwrap_or(f64::NAN),
        chosen: plan
            .modules
            .first()
            .is_some_and(|module| module.path == "blocks.1"),
    })
}

/// Mean perplexities by the number of blocks deleted.
fn depths(trials: &[Trial], order: usize) -> Vec<(f64, f64)> {
    let most = trials
        .iter()
        .map(|trial| trial.beside.by_blocks.len())
        .max();
    (0..most.unwrap_or(0))
        .map(|place| {
            let losses = trials.iter().filter_map(|trial| {
                let both = trial.beside.by_blocks.get(place)?;
                both.get(order).map(|loss| loss.exp())
            });
            ((place + 1) as f64, mean(losses))
        })
        .collect()
}

fn claims(scale: Scale, trials: &[Trial]) -> Vec<Claim> {
    let perplexity = |way: Way| mean(trials.iter().map(|trial| trial.loss(way).exp()));
    let missed = |way: Way| mean(trials.iter().map(|trial| trial.missed(way)));
    let listed = |ways: &[Way], of: &dyn Fn(Way) -> f64| {
        let measured = |way: &&Way| trials.iter().any(|trial| trial.point(**way).is_some());
        let each = ways
            .iter()
            .filter(measured)
            .map(|way| format!("{} {:.3}", way.name(), of(*way)));
        each.collect::<Vec<_>>().join(", ")
    };
    let wins = |better: Way, worse: Way| {
        let won = |trial: &&Trial| trial.loss(better) < trial.loss(worse);
        trials.iter().filter(won).count()
    };
    let all = trials.len();
    let whole = mean(trials.iter().map(|trial| trial.beside.whole.exp()));
    let largest = |of: fn(&Exact) -> f64| {
        let each = trials.iter().map(|trial| of(&trial.beside.exact));
        each.fold(0.0, f64::max)
    };
    let (untuned, silent) = (largest(|e| e.untuned), largest(|e| e.silent));
    let chosen = trials.iter().all(|trial| trial.beside.exact.chosen);
    let (by_macro, by_block) = (depths(trials, 0), depths(trials, 1));
    let pairs = by_macro.iter().zip(&by_block);
    let no_worse = pairs.filter(|(a, b)| a.1 <= b.1 * (1.0 + 1e-9)).count();
    let pair = |points: &[(f64, f64)]| {
        let each = points.iter().map(|(_, value)| format!("{value:.2}"));
        each.collect::<Vec<_>>().join(" ")
    };
    vec![
        Claim::new(
            "before it is tuned, a fused model is the one with the blocks deleted",
            "exact",
            format!("loss differs by {untuned:.1e} nats"),
            Verdict::of(untuned == 0.0),
        ),
        Claim::new(
            "a block that does nothing has macro influence 0 and goes first",
            "exact",
            format!("{silent:.1e}, chosen: {chosen}"),
            Verdict::of(silent == 0.0 && chosen),
        ),
        Claim::new(
            "FuseGPT keeps more than LoRA alone, and LoRA alone more than deletion",
            "expected of a quarter of the blocks",
            format!(
                "whole {:.3}, {}; FuseGPT before LoRA on {} of {all} seeds",
                whole,
                listed(&[Way::Fuse, Way::Lora, Way::MacroInfluence], &perplexity),
                wins(Way::Fuse, Way::Lora)
            ),
            after_training(
                scale,
                perplexity(Way::Fuse) < perplexity(Way::Lora)
                    && perplexity(Way::Lora) < perplexity(Way::MacroInfluence),
            ),
        )
        .noted("perplexities are means over seeds"),
        Claim::new(
            "what goes is worth recycling: FuseGPT keeps more than LoRA alone at the gates' rate",
            "not published: the control has a hundredth of the gates' rate",
            format!(
                "{}; on {} of {all} seeds",
                listed(&[Way::Fuse, Way::FastLora], &perplexity),
                wins(Way::Fuse, Way::FastLora)
            ),
            after_training(scale, perplexity(Way::Fuse) < perplexity(Way::FastLora)),
        ),
        Claim::new(
            "FuseGPT keeps more than prior methods",
            "below them at 25 % when they are at 20 %",
            listed(
                &[
                    Way::Fuse,
                    Way::ReplaceMe,
                    Way::ReplaceMeCosine,
                    Way::BlockInfluence,
                ],
                &perplexity,
            ),
            after_training(
                scale,
                [Way::ReplaceMe, Way::ReplaceMeCosine, Way::BlockInfluence]
                    .iter()
                    .all(|way| perplexity(Way::Fuse) < perplexity(*way)),
            ),
        )
        .noted("all at 25 %"),
        Claim::new(
            "the fused group comes nearer to what it gave than that of LoRA alone",
            "none: both are tuned by a divergence, here the squared error is compared",
            listed(
                &[Way::Fuse, Way::Lora, Way::FastLora, Way::FuseSquares],
                &missed,
            ),
            after_training(scale, missed(Way::Fuse) < missed(Way::Lora)),
        )
        .noted("relative to what the group adds; the last group, by each method's own order"),
        Claim::new(
            "a gate of low rank keeps more than one number for each row",
            "ablation",
            listed(&[Way::Fuse, Way::FuseRows], &perplexity),
            after_training(scale, perplexity(Way::Fuse) < perplexity(Way::FuseRows)),
        ),
        Claim::new(
            "deleting by macro influence keeps more than by the angle over each block",
            "a better order than adjacent cosines",
            format!(
                "no worse for {no_worse} of {} numbers of blocks: {} against {}",
                by_macro.len(),
                pair(&by_macro),
                pair(&by_block)
            ),
            after_training(scale, no_worse == by_macro.len()),
        ),
    ]
}
