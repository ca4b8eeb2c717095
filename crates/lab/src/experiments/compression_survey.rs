//! A survey of Transformer compression, as an experiment: families of methods alone, in pairs and in
//! both orders, and what distillation gives back.
//!
//! The survey has no experiments of its own. Its statements about combinations are made on a decoder
//! of a few blocks: feed-forward features and blocks taken out, matrices factorised, weights rounded.

use super::compression_vision::{self, Seen};
use super::jobs::over_seeds;
use super::narrowing::{Bench, Size};
use super::texts::Sides;
use super::{after_learning, after_training, mean};
use crate::{Claim, Plot, Reproduction, Result, Scale, Series, Setting, Verdict};
use lapidary_compress::{
    Fingerprint, HealData, HealSettings, Interactions, Recipe, Settings, Stage, heal, interactions,
};
use lapidary_model::Model;

/// What is taken away by each method that takes anything.
const CUT: f64 = 0.25;

const CHANNELS: &str = "channel-magnitude";
const DEPTH: &str = "block-influence";
const RANKS: &str = "whitened";
const STREAM: &str = "slicegpt-shared";
const INT8: &str = "int8";
const INT4: &str = "int4";
/// Weight of the original's residual stream, whose error is relative, beside a divergence in nats.
const HINTS: f64 = 0.5;
/// Nats that a cut has to cost before there is something to give back.
const LOST: f64 = 0.01;
const METHODS: [&str; 5] = [CHANNELS, DEPTH, RANKS, INT8, INT4];

fn size(scale: Scale) -> Size {
    match scale {
        Scale::Smoke => Size {
            seeds: 1,
            width: 32,
            blocks: 4,
            steps: 20,
            calibration: 8,
            tests: 4,
        },
        _ => Size {
            seeds: 2,
            width: 96,
            blocks: 4,
            steps: 500,
            calibration: 64,
            tests: 64,
        },
    }
}

/// What distillation gave back to a student.
struct Recovered {
    whole: f64,
    cut: f64,
    healed: f64,
}

struct Run {
    table: Interactions,
    /// A student with fewer blocks.
    recovered: Recovered,
    /// A student with a narrower stream, without hints and with them.
    narrower: [Recovered; 2],
    /// A recipe on images.
    seen: Seen,
    /// Whether one recipe gave the same bytes twice.
    repeats: bool,
}

/// Runs the experiment.
pub fn run(setting: &Setting) -> Result<Reproduction> {
    let size = size(setting.scale);
    let steps = match setting.scale {
        Scale::Smoke => 4,
        _ => 100,
    };
    let text = Sides::of(setting)?;
    let runs = over_seeds(setting, size.seeds, |seed| {
        one_seed(&text.for_seed(seed)?, setting.scale, steps, seed)
    })?;
    Ok(Reproduction {
        setting: format!(
            "{}; gated decoder of {} blocks, width {}, {} steps of 16; a quarter \
             taken away by each method that takes, groups of 32; distillation of {steps} steps \
             after a quarter of the blocks, or of the residual stream; a vision Transformer of 4 blocks, width 64, on images of \
             generated glyphs; seeds: {}",
            text.what, size.blocks, size.width, size.steps, size.seeds,
        ),
        claims: claims(setting, &runs),
        plots: vec![plot(&runs)],
        ..Reproduction::default()
    })
}

fn stage(method: &str) -> Stage {
    Stage {
        method: method.to_owned(),
        ratio: (!method.starts_with("int")).then_some(CUT),
        settings: None,
    }
}

fn one_seed(text: &Sides, scale: Scale, steps: u64, seed: u64) -> Result<Run> {
    let bench = Bench::train(text, &size(scale), seed)?;
    let settings = Settings::default();
    let loss = |model: &Model| -> Result<f64> { Ok(bench.perplexity(model)?.ln()) };
    let table = interactions(
        &bench.model,
        &METHODS.map(stage),
        Some(&bench.data),
        &settings,
        loss,
    )?;
    let recipe = Recipe {
        stages: [CHANNELS, INT4].map(stage).to_vec(),
    };
    let once = || -> Result<Option<Fingerprint>> {
        let done = recipe.run(&bench.model, Some(&bench.data), &settings)?;
        match done.last() {
            Some(done) => Ok(Some(Fingerprint::of(&done.compressed.model)?)),
            None => Ok(None),
        }
    };
    Ok(Run {
        repeats: once()? == once()?,
        recovered: recovered(&bench, DEPTH, 0.0, steps, seed)?,
        narrower: [
            recovered(&bench, STREAM, 0.0, steps, seed)?,
            recovered(&bench, STREAM, HINTS, steps, seed)?,
        ],
        seen: compression_vision::run(scale, seed)?,
        table,
    })
}

/// A method takes out a quarter, and the rest learns what the whole says, and by `hints` where it says it.
fn recovered(bench: &Bench, method: &str, hints: f64, steps: u64, seed: u64) -> Result<Recovered> {
    let cut = bench.compress(method, 1.0 - CUT, &Settings::default())?;
    let data = HealData {
        training: &bench.data,
        validation: &bench.data,
        teacher: Some(&bench.model),
    };
    let settings = HealSettings {
        steps,
        rate: 1e-3,
        distil: 1.0,
        hints,
        seed,
        ..HealSettings::default()
    };
    let (healed, _) = heal(&cut.model, &data, &settings, |_, _| ())?;
    Ok(Recovered {
        whole: bench.perplexity(&bench.model)?.ln(),
        cut: bench.perplexity(&cut.model)?.ln(),
        healed: bench.perplexity(&healed)?.ln(),
    })
}

fn place(method: &str) -> usize {
    METHODS.iter().position(|name| *name == method).unwrap_or(0)
}

/// `Δ` of a method alone, the mean over runs.
fn alone(runs: &[Run], method: &str) -> f64 {
    mean(
        runs.iter()
            .filter_map(|run| run.table.alone.get(place(method)).copied()),
    )
}

/// `Δ` of one method after another, the mean over runs; of pairs that can be run in both orders.
fn in_order(runs: &[Run], first: &str, second: &str) -> Option<f64> {
    let (first, second) = (place(first), place(second));
    let found = runs.iter().filter_map(|run| {
        let pairs = &run.table.pairs;
        pairs.iter().find_map(|pair| {
            let (there, back) = pair.in_order.zip(pair.reversed)?;
            match (pair.first, pair.second) {
                (a, b) if (a, b) == (first, second) => Some(there),
                (a, b) if (a, b) == (second, first) => Some(back),
                _ => None,
            }
        })
    });
    let found: Vec<f64> = found.collect();
    (!found.is_empty()).then(|| mean(found))
}

fn claims(setting: &Setting, runs: &[Run]) -> Vec<Claim> {
    let scale = setting.scale;
    let (channels, int8) = (alone(runs, CHANNELS), alone(runs, INT8));
    let [both, cut_first, rounded_first] = [(CHANNELS, INT8), (CHANNELS, INT4), (INT4, CHANNELS)]
        .map(|(first, second)| in_order(runs, first, second).unwrap_or(f64::NAN));
    let gap = |of: fn(&Recovered) -> f64| mean(runs.iter().map(|run| of(&run.recovered)));
    let (whole, cut, healed) = (gap(|r| r.whole), gap(|r| r.cut), gap(|r| r.healed));
    let share = (cut - healed) / (cut - whole);
    let narrow = |at: usize, of: fn(&Recovered) -> f64| {
        mean(runs.iter().filter_map(|run| run.narrower.get(at).map(of)))
    };
    let narrow_cut = narrow(0, |r| r.cut);
    let [plain, hinted] = [0, 1].map(|at| narrow(at, |r| r.healed));
    let pairs: Vec<String> = METHODS
        .iter()
        .enumerate()
        .flat_map(|(index, first)| {
            METHODS
                .iter()
                .skip(index + 1)
                .map(move |second| (first, second))
        })
        .map(|(first, second)| {
            let orders = [(first, second), (second, first)];
            match orders.map(|(one, other)| in_order(runs, one, other)) {
                [Some(there), Some(back)] => {
                    let interaction = there.min(back) - alone(runs, first) - alone(runs, second);
                    format!("{first} and {second} {interaction:+.4}")
                }
                _ => format!("{first} and {second} not in both orders"),
            }
        })
        .collect();
    vec![
        Claim::new(
            "8 bits after a quarter of the features costs at most a tenth more than the sum of both",
            "families of compression combine",
            format!("features {channels:.4}, 8 bits {int8:.4}, both {both:.4} nats"),
            // A sum has a tenth more only where it is a cost.
            after_learning(
                scale,
                channels + int8 > 0.0,
                both <= 1.1 * (channels + int8),
            ),
        ),
        Claim::new(
            "at 4 bits, rounding before cutting is worse than cutting before rounding",
            "quantisation comes last",
            format!("cut first {cut_first:.4}, rounded first {rounded_first:.4} nats"),
            after_training(scale, rounded_first > cut_first),
        ),
        Claim::new(
            "distillation gives back at least 30 % of what a quarter of the blocks cost",
            "distillation recovers",
            format!(
                "{:.0} %: {whole:.3} nats whole, {cut:.3} cut, {healed:.3} after distillation",
                100.0 * share
            ),
            after_learning(scale, cut - whole >= LOST, share >= 0.3),
        )
        .noted(format!("told where the cut costs at least {LOST} nats")),
        Claim::new(
            "a student with a narrower stream loses no more with hints through learned maps than by \
             distillation alone",
            "hint-based distillation is a family of its own",
            format!(
                "{whole:.3} nats whole, {narrow_cut:.3} with three quarters of the stream, {plain:.3} after \
                 distillation, {hinted:.3} with hints"
            ),
            after_learning(scale, narrow_cut - whole >= LOST, hinted <= plain),
        )
        .noted(format!(
            "told where the narrower stream costs at least {LOST} nats"
        )),
        Claim::new(
            "one recipe gives the same bytes twice",
            "exact",
            format!("interactions of every pair, nats: {}", pairs.join("; ")),
            Verdict::of(runs.iter().all(|run| run.repeats)),
        ),
        compression_vision::claim(scale, &runs.iter().map(|run| &run.seen).collect::<Vec<_>>()),
    ]
}

fn plot(runs: &[Run]) -> Plot {
    let line = |name: &str, of: &dyn Fn(&str) -> Option<f64>| Series {
        name: name.to_owned(),
        points: METHODS
            .iter()
            .enumerate()
            .filter_map(|(index, method)| Some((index as f64, of(method)?)))
            .collect(),
    };
    Plot {
        title: "What each method costs alone, and with features taken out before".to_owned(),
        x: format!("0 to {}: {}", METHODS.len() - 1, METHODS.join(", ")),
        y: "nats per token".to_owned(),
        series: vec![
            line("alone", &|method| Some(alone(runs, method))),
            line("after a quarter of the features", &|method| match method {
                CHANNELS => Some(alone(runs, CHANNELS)),
                other => in_order(runs, CHANNELS, other),
            }),
        ],
    }
}
