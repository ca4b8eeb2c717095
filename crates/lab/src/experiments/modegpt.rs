//! MoDeGPT beside SliceGPT, plain and whitened SVD of single layers and channels by magnitude, on a trained
//! decoder with rotary positions and grouped heads. Each is given as many parameters as MoDeGPT leaves, wherever it
//! takes them from.
//!
//! The paper compresses Llama-2-7B; perplexity on WikiText-2 rises from 5.12 to 6.16 at 20 % fewer
//! weights. Here the decoder is small, and so is its text.

use super::narrowing::{Bench, Size};
use super::texts::Sides;
use super::{after_training, mean};
use crate::{Claim, Plot, Reproduction, Result, Scale, Series, Setting, Verdict};
use lapidary_compress::{Budget, Calibration, CalibrationOptions, Change, Method, ModegptSettings};
use lapidary_compress::{Settings, Task};
use lapidary_model::Model;

const METHODS: [&str; 5] = [
    "modegpt",
    "slicegpt",
    "whitened",
    "svd",
    "channel-magnitude",
];
/// The share of block weights kept at which claims are read.
const SHARE: f64 = 0.7;

fn size(scale: Scale) -> Size {
    let full = Size {
        seeds: 3,
        width: 192,
        blocks: 6,
        steps: 3000,
        calibration: 128,
        tests: 100,
    };
    match scale {
        Scale::Smoke => Size {
            seeds: 1,
            width: 32,
            blocks: 2,
            steps: 3,
            calibration: 4,
            tests: 2,
        },
        Scale::Small => Size {
            seeds: 1,
            width: 64,
            blocks: 4,
            steps: 400,
            calibration: 64,
            tests: 40,
        },
        Scale::Full => full,
    }
}

struct Run {
    whole: f64,
    /// Perplexity when everything is kept.
    kept: f64,
    /// Perplexity by method and share of the blocks' weights that is left.
    points: Vec<(&'static str, f64, f64)>,
    /// At [`SHARE`], as much from each block.
    uniform: f64,
    /// So, and heads of a shape that configs can say.
    stock: f64,
    /// Loss that hidden features chosen by leverage cost, with and without the refit.
    refit: (f64, f64),
}

/// Runs the experiment.
pub fn run(setting: &Setting) -> Result<Reproduction> {
    let size = size(setting.scale);
    let shares: &[f64] = match setting.scale {
        Scale::Smoke => &[SHARE],
        _ => &[0.5, 0.6, SHARE, 0.8, 0.9],
    };
    let text = Sides::of(setting)?;
    let runs = (setting.seed..)
        .take(size.seeds as usize)
        .map(|seed| one_seed(&text.for_seed(seed)?, &size, shares, seed))
        .collect::<Result<Vec<_>>>()?;
    let at = |method: &str, share: f64| {
        let points = runs.iter().flat_map(|run| &run.points);
        let here = points.filter(|(name, s, _)| *name == method && *s == share);
        mean(here.map(|(_, _, value)| *value))
    };
    let line = |method: &'static str| Series {
        name: method.to_owned(),
        points: shares.iter().map(|s| (*s, at(method, *s))).collect(),
    };
    let whole = mean(runs.iter().map(|run| run.whole));
    let measured: Vec<String> = METHODS
        .iter()
        .map(|method| format!("{method} {:.2}", at(method, SHARE)))
        .collect();
    let measured = format!("whole {whole:.2}; {}", measured.join(", "));
    let ours = at("modegpt", SHARE);
    let uniform = mean(runs.iter().map(|run| run.uniform));
    let stock = mean(runs.iter().map(|run| run.stock));
    let (free, bound) = ((uniform / whole).ln(), (stock / whole).ln());
    let refit = mean(runs.iter().map(|run| run.refit.0));
    let dropped = mean(runs.iter().map(|run| run.refit.1));
    let claim = |text: &str, published: &str, measured: String, holds: bool| {
        Claim::new(
            text,
            published,
            measured,
            after_training(setting.scale, holds),
        )
    };
    let kept = mean(runs.iter().map(|run| run.kept));
    let claims = vec![
        Claim::new(
            "a budget of all weights changes nothing",
            "exact",
            format!("perplexity {whole:.4} before, {kept:.4} after"),
            Verdict::of(runs.iter().all(|run| run.kept == run.whole)),
        ),
        claim(
            "at 30 % fewer weights, MoDeGPT leaves a lower perplexity than SVD of single layers",
            "7.51 at 30 %, dense 5.12 (Llama-2-7B)",
            measured.clone(),
            ours < at("svd", SHARE) && ours < at("whitened", SHARE),
        )
        .noted("perplexity at a context of 64 tokens; no fine-tuning; as many parameters left by each"),
        claim(
            "at 30 % fewer weights, MoDeGPT leaves a lower perplexity than SliceGPT",
            "7.51 and 10.47 at 30 % (Llama-2-7B)",
            measured.clone(),
            ours < at("slicegpt", SHARE),
        )
        .noted("the widest stream of at most as many parameters, shortcuts, embeddings and head included"),
        claim(
            "at 30 % fewer weights, MoDeGPT leaves a lower perplexity than channels taken out by magnitude",
            "not compared",
            measured,
            ours < at("channel-magnitude", SHARE),
        )
        .noted("by magnitude feed-forward parts alone lose them, attention nothing"),
        claim(
            "the refit of the matrix after the hidden features at least halves the loss that choosing \
             them costs",
            "estimate",
            format!("rise of log-perplexity {refit:.3} with, {dropped:.3} without"),
            refit <= 0.5 * dropped,
        ),
        claim(
            "blocks that lose by their influence leave a lower perplexity than equal losses",
            "better at every rate",
            format!("{ours:.2} by influence, {uniform:.2} with equal losses"),
            ours < uniform,
        ),
        claim(
            "heads of a shape that a Llama config can say cost less than twice what heads narrowed freely do",
            "a custom config, or a table of frequencies",
            format!("rise of log-perplexity {bound:.3} with, {free:.3} without, equal losses"),
            bound < 2.0 * free,
        )
        .noted("pairs a step apart that is the same in all heads, values as wide as queries"),
    ];
    Ok(Reproduction {
        setting: format!(
            "{}; decoder of {} blocks, width {}, rotary, grouped heads, gated; {} \
             steps; {} calibration windows; seeds: {}",
            text.what, size.blocks, size.width, size.steps, size.calibration, size.seeds
        ),
        claims,
        plots: vec![Plot {
            title: "Held-out perplexity without fine-tuning".to_owned(),
            x: "share of weights kept".to_owned(),
            y: "perplexity".to_owned(),
            series: METHODS.into_iter().map(line).collect(),
        }],
        ..Reproduction::default()
    })
}

fn one_seed(text: &Sides, size: &Size, shares: &[f64], seed: u64) -> Result<Run> {
    let bench = Bench::train(text, size, seed)?;
    let defaults = Settings::default();
    let mut points = Vec::new();
    for share in shares {
        let ours = bench.compress(METHODS[0], *share, &defaults)?.model;
        points.push((METHODS[0], *share, bench.perplexity(&ours)?));
        for method in METHODS.into_iter().skip(1) {
            let theirs = bench.with_parameters(method, ours.parameter_count())?;
            points.push((method, *share, bench.perplexity(&theirs)?));
        }
    }
    let even = Settings {
        modegpt: ModegptSettings {
            smoothing: f64::INFINITY,
            ..ModegptSettings::default()
        },
        ..Settings::default()
    };
    let uniform = bench.compress("modegpt", SHARE, &even)?.model;
    let mut shaped = even.clone();
    shaped.modegpt.stock = true;
    let stock = bench.compress("modegpt", SHARE, &shaped)?.model;
    let whole = bench.perplexity(&bench.model)?;
    Ok(Run {
        stock: bench.perplexity(&stock)?,
        uniform: bench.perplexity(&uniform)?,
        refit: refit(&bench, &even, whole)?,
        whole,
        kept: bench.perplexity(&bench.compress("modegpt", 1.0, &defaults)?.model)?,
        points,
    })
}

/// The rise of the loss when only hidden features go, with the refit and without it.
fn refit(bench: &Bench, settings: &Settings, whole: f64) -> Result<(f64, f64)> {
    let method = Method::find("modegpt")?;
    let requirements = method.requirements(&bench.model, settings)?;
    let options = CalibrationOptions::default();
    let calibration = Calibration::collect(&bench.model, &bench.data, &requirements, options)?;
    let task = Task {
        calibration: Some(&calibration),
        settings: Some(settings),
        ..Task::new(&bench.model)
    };
    let mut plan = method.plan(&task, &Budget::Keep(SHARE))?;
    for module in &mut plan.modules {
        if module.path.ends_with(".attention") {
            let reason = "only hidden features go".to_owned();
            module.change = Change::Leave { reason };
        }
    }
    let fitted = method.apply(&task, &plan)?.model;
    let dropped = unfitted(&bench.model, &fitted)?;
    let rise = |value: f64| (value / whole).ln();
    Ok((
        rise(bench.perplexity(&fitted)?),
        rise(bench.perplexity(&dropped)?),
    ))
}

/// The narrowed model with the weights that the kept hidden features had in the whole one.
fn unfitted(whole: &Model, narrowed: &Model) -> Result<Model> {
    use crate::error::engine;
    use lapidary_kernels::Tensor;
    let mut parameters = narrowed.parameters().clone();
    let names: Vec<String> = parameters.keys().cloned().collect();
    for name in names
        .iter()
        .filter(|name| name.ends_with("feedforward.down.weight"))
    {
        let up = name.replace(".down.", ".up.");
        let rows = |model: &Model| -> Result<Vec<Vec<f32>>> {
            match model.parameters().get(&up) {
                Some(tensor) => engine(tensor.to_vec2::<f32>()),
                None => Ok(Vec::new()),
            }
        };
        let (all, kept) = (rows(whole)?, rows(narrowed)?);
        // A kept feature still reads what it read.
        let place = |row: &Vec<f32>| all.iter().position(|other| other == row);
        let places: Vec<u32> = kept.iter().filter_map(place).map(|i| i as u32).collect();
        if let Some(down) = whole.parameters().get(name) {
            let places = engine(Tensor::from_slice(&places, places.len(), down.device()))?;
            parameters.insert(name.clone(), engine(down.index_select(&places, 1))?);
        }
    }
    Ok(Model::new(narrowed.spec().clone(), &mut parameters)?)
}
