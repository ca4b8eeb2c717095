//! LoRAP beside its parts and its variants, on a trained decoder with rotary positions and grouped
//! heads.
//!
//! The paper compresses LLaMA-7B; perplexity on WikiText-2 at a context of 128 rises from 12.62 to
//! 15.69 at 20 % fewer weights.

use super::narrowing::{Bench, Size};
use super::texts::Sides;
use super::{after_training, mean};
use crate::error::engine;
use crate::{Claim, Error, Plot, Reproduction, Result, Scale, Series, Setting, Verdict};
use lapidary_compress::{
    AdapterSettings, HealData, HealSettings, LorapDecomposition, LorapSettings, Settings, heal,
};
use lapidary_factor::{Metric, WeightedSvd};
use lapidary_model::Model;

const SHARES: [f64; 2] = [0.8, 0.5];
/// Names of what is compared, in order of [`variants`].
const NAMES: [&str; 8] = [
    "lorap",
    "attention by variance of outputs",
    "attention by plain SVD",
    "equal ranks (a = 1)",
    "lowest channels go",
    "one shot",
    "svd everywhere",
    "channel-magnitude",
];

fn size(scale: Scale) -> Size {
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
            seeds: 2,
            width: 64,
            blocks: 3,
            steps: 250,
            calibration: 48,
            tests: 40,
        },
        Scale::Full => Size {
            seeds: 3,
            width: 192,
            blocks: 6,
            steps: 3000,
            calibration: 128,
            tests: 100,
        },
    }
}

/// Places of ways to factorise attention, and of what spares no channel, in [`NAMES`].
const FEATURES: usize = 1;
const PLAIN: usize = 2;
const LOWEST: usize = 4;

fn variants() -> [(&'static str, Settings); 8] {
    let with = |lorap: LorapSettings| Settings {
        lorap,
        ..Settings::default()
    };
    let defaults = LorapSettings::default;
    [
        ("lorap", with(defaults())),
        (
            "lorap",
            with(LorapSettings {
                decomposition: LorapDecomposition::Features,
                ..defaults()
            }),
        ),
        (
            "lorap",
            with(LorapSettings {
                decomposition: LorapDecomposition::Plain,
                ..defaults()
            }),
        ),
        (
            "lorap",
            with(LorapSettings {
                ratio: 1.0,
                ..defaults()
            }),
        ),
        (
            "lorap",
            with(LorapSettings {
                spared: 0.0,
                ..defaults()
            }),
        ),
        (
            "lorap",
            with(LorapSettings {
                one_shot: true,
                ..defaults()
            }),
        ),
        ("svd", Settings::default()),
        ("channel-magnitude", Settings::default()),
    ]
}

struct Run {
    whole: f64,
    /// Perplexity when everything is kept.
    kept: f64,
    /// Perplexity by variant, then by share.
    found: Vec<Vec<f64>>,
    /// Energy in each eighth of the singular values: query and key, value and output, feed-forward.
    energy: [Vec<f64>; 3],
    /// By share, what adapters made of LoRAP's model.
    tuned: Vec<Tuned>,
}

/// A model that took adapters in.
struct Tuned {
    perplexity: f64,
    /// Its loss over that with the adapters, less 1.
    refactored: f64,
}

/// Matrices whose spectra are compared.
const PARTS: [&str; 3] = ["query and key", "value and output", "feed-forward"];
/// Eighths of the singular values at which claims about spectra are read: a quarter.
const QUARTER: usize = 2;

/// Runs the experiment.
pub fn run(setting: &Setting) -> Result<Reproduction> {
    let size = size(setting.scale);
    let text = Sides::of(setting)?;
    let runs = (setting.seed..)
        .take(size.seeds as usize)
        .map(|seed| {
            let text = text.for_seed(seed)?;
            one_seed(&text, &size, tuning(setting.scale), seed)
        })
        .collect::<Result<Vec<_>>>()?;
    let at = |variant: usize, share: usize| {
        let of = |run: &Run| run.found.get(variant).and_then(|f| f.get(share)).copied();
        mean(runs.iter().filter_map(of))
    };
    let whole = mean(runs.iter().map(|run| run.whole));
    let listed = |share: usize| {
        let each: Vec<String> = (0..NAMES.len())
            .zip(NAMES)
            .map(|(variant, name)| format!("{name} {:.2}", at(variant, share)))
            .collect();
        format!("whole {whole:.2}; {}", each.join(", "))
    };
    let spectrum = |part: usize, eighths: usize| {
        let of = |run: &Run| run.energy.get(part)?.get(eighths - 1).copied();
        mean(runs.iter().filter_map(of))
    };
    let energy = |part: usize| spectrum(part, QUARTER);
    let tuned = |share: usize| {
        mean(
            runs.iter()
                .filter_map(|run| Some(run.tuned.get(share)?.perplexity)),
        )
    };
    let refactored = runs.iter().flat_map(|run| &run.tuned);
    let refactored = refactored.fold(0.0, |m: f64, tuned| m.max(tuned.refactored.abs()));
    let signs: Vec<String> = runs
        .iter()
        .map(|run| {
            let of = |variant: usize| run.found.get(variant).and_then(|f| f.first()).copied();
            format!(
                "{:+.3}",
                of(LOWEST).unwrap_or(f64::NAN) - of(0).unwrap_or(f64::NAN)
            )
        })
        .collect();
    let claim = |text: &str, published: &str, measured: String, holds: bool| {
        Claim::new(
            text,
            published,
            measured,
            after_training(setting.scale, holds),
        )
    };
    let best = |share: usize| (1..NAMES.len()).all(|other| at(0, share) <= at(other, share));
    let kept = mean(runs.iter().map(|run| run.kept));
    let claims = vec![
        Claim::new(
            "a budget of all weights changes nothing",
            "exact",
            format!("perplexity {whole:.4} before, {kept:.4} after"),
            Verdict::of(runs.iter().all(|run| run.kept == run.whole)),
        ),
        claim(
            "at 20 % fewer weights, LoRAP leaves the lowest perplexity of its variants and baselines",
            "15.69, LLM-Pruner 19.09, dense 12.62 (LLaMA-7B, context 128)",
            listed(0),
            best(0),
        )
        .noted("context 64, no fine-tuning; by magnitude only feed-forward parts lose weights, as many in all"),
        claim(
            "at half of the weights, LoRAP leaves the lowest perplexity of its variants and baselines",
            "56.96, LLM-Pruner 112.44 (LLaMA-7B, context 128)",
            listed(1),
            best(1),
        ),
        claim(
            "at half of the weights, factors weighted by inputs leave a lower perplexity than plain SVD and \
             than those by the variance of outputs",
            "chosen over both; figures not at hand",
            format!(
                "{} {:.2}, {} {:.2}, {} {:.2}",
                NAMES[0],
                at(0, 1),
                NAMES[PLAIN],
                at(PLAIN, 1),
                NAMES[FEATURES],
                at(FEATURES, 1)
            ),
            at(0, 1) < at(PLAIN, 1) && at(0, 1) < at(FEATURES, 1),
        ),
        Claim::new(
            "factored again at its rank and the adapter's, a layer is what was trained",
            "plain SVD at k + 8",
            format!("loss changes by {refactored:.1e} of itself in f32"),
            Verdict::of(refactored < 1e-3),
        ),
        claim(
            "adapters lower the perplexity at half of the weights",
            "56.96 without, 30.90 with; at 20 % 15.69 and 16.35 (LLaMA-7B, rank 8, two epochs of Alpaca)",
            format!(
                "{:.2} without, {:.2} with; at 20 % {:.2} and {:.2}",
                at(0, 1),
                tuned(1),
                at(0, 0),
                tuned(0)
            ),
            tuned(1) < at(0, 1),
        )
        .noted(format!(
            "rank {RANK}, {} steps on the calibration's windows",
            tuning(setting.scale)
        )),
        claim(
            "attention is of lower rank than the feed-forward part, and query and key than value and \
             output",
            "observed on LLaMA-7B",
            format!(
                "share of squared singular values in the largest quarter of them: query and key {:.3}, \
                 value and output {:.3}, feed-forward {:.3}",
                energy(0),
                energy(1),
                energy(2)
            ),
            energy(0) > energy(1) && energy(1) > energy(2),
        )
        .noted("a quarter of each matrix's own: grouped keys and values have half as many as the width"),
        claim(
            "taking out the channels of least importance instead of sparing them raises perplexity at \
             every seed",
            "the least 1 % matter disproportionately",
            format!("change at 20 %: {}", signs.join(", ")),
            runs.iter().all(|run| {
                let of = |variant: usize| run.found.get(variant).and_then(|f| f.first());
                of(LOWEST) > of(0)
            }),
        ),
    ];
    let line = |(variant, name): (usize, &str)| Series {
        name: name.to_owned(),
        points: SHARES
            .iter()
            .enumerate()
            .map(|(i, s)| (*s, at(variant, i)))
            .collect(),
    };
    let curve = |(part, name): (usize, &str)| Series {
        name: name.to_owned(),
        points: (1..=EIGHTHS)
            .map(|eighths| (eighths as f64 / EIGHTHS as f64, spectrum(part, eighths)))
            .collect(),
    };
    Ok(Reproduction {
        setting: format!(
            "{}; decoder of {} blocks, width {}, rotary, grouped heads, gated; {} \
             steps; {} calibration windows of 64; seeds: {}",
            text.what, size.blocks, size.width, size.steps, size.calibration, size.seeds
        ),
        claims,
        plots: vec![
            Plot {
                title: "Held-out perplexity without fine-tuning".to_owned(),
                x: "share of weights kept".to_owned(),
                y: "perplexity".to_owned(),
                series: NAMES.into_iter().enumerate().map(line).collect(),
            },
            Plot {
                title: "Squared singular values that the largest hold".to_owned(),
                x: "share of the singular values".to_owned(),
                y: "share".to_owned(),
                series: PARTS.into_iter().enumerate().map(curve).collect(),
            },
        ],
        ..Reproduction::default()
    })
}

/// Features of an adapter.
const RANK: usize = 8;
/// Parts of a spectrum that its sum is read at.
const EIGHTHS: usize = 8;

/// Steps that adapters are trained for.
fn tuning(scale: Scale) -> u64 {
    match scale {
        Scale::Smoke => 2,
        Scale::Small => 60,
        Scale::Full => 500,
    }
}

fn one_seed(text: &Sides, size: &Size, tuning: u64, seed: u64) -> Result<Run> {
    let bench = Bench::train(text, size, seed)?;
    let mut found = Vec::new();
    let mut left = Vec::new(); // parameters of LoRAP's models
    for (method, settings) in variants() {
        let mut of_shares = Vec::new();
        for (index, share) in SHARES.into_iter().enumerate() {
            let model = match (method, left.get(index)) {
                ("channel-magnitude", Some(left)) => bench.with_parameters(method, *left)?,
                _ => bench.compress(method, share, &settings)?.model,
            };
            if left.len() == index {
                left.push(model.parameter_count());
            }
            of_shares.push(bench.perplexity(&model)?);
        }
        found.push(of_shares);
    }
    let tuned = SHARES.map(|share| tuned(&bench, share, tuning, seed));
    Ok(Run {
        tuned: tuned.into_iter().collect::<Result<Vec<_>>>()?,
        whole: bench.perplexity(&bench.model)?,
        kept: bench.perplexity(&bench.compress("lorap", 1.0, &Settings::default())?.model)?,
        found,
        energy: [
            energy(&bench.model, &["attention.query", "attention.key"])?,
            energy(&bench.model, &["attention.value", "attention.output"])?,
            energy(
                &bench.model,
                &["feedforward.gate", "feedforward.up", "feedforward.down"],
            )?,
        ],
    })
}

/// LoRAP's model at a share, with adapters that were trained on the calibration's windows taken in.
fn tuned(bench: &Bench, share: f64, steps: u64, seed: u64) -> Result<Tuned> {
    let cut = bench.compress("lorap", share, &Settings::default())?.model;
    let data = HealData {
        training: &bench.data,
        validation: &bench.data,
        teacher: None,
    };
    let settings = HealSettings {
        steps,
        rate: 1e-3,
        adapters: Some(AdapterSettings {
            rank: RANK,
            ..AdapterSettings::default()
        }),
        seed,
        ..HealSettings::default()
    };
    let (model, report) = heal(&cut, &data, &settings, |_, _| ())?;
    let measured = HealSettings {
        steps: 0,
        adapters: None,
        ..settings
    };
    let (_, again) = heal(&model, &data, &measured, |_, _| ())?;
    Ok(Tuned {
        perplexity: bench.perplexity(&model)?,
        refactored: again.before / report.after - 1.0,
    })
}

/// The mean share of squared singular values that the largest hold, as many as eighths of a matrix's own: a matrix
/// that is half as wide has half as many to begin with.
fn energy(model: &Model, parts: &[&str]) -> Result<Vec<f64>> {
    let mut shares = vec![Vec::new(); EIGHTHS];
    for linear in model.linears() {
        if !parts.iter().any(|part| linear.path.ends_with(part)) {
            continue;
        }
        let Some(weight) = model.parameters().get(&format!("{}.weight", linear.path)) else {
            continue;
        };
        let weight = engine(weight.to_dtype(lapidary_kernels::DType::F64))?;
        let svd = WeightedSvd::new(&weight, &Metric::Plain)
            .map_err(|error| Error::from(lapidary_compress::Error::from(error)))?;
        let squares = || svd.singular_values().iter().map(|s| s * s);
        for (eighths, shares) in (1..).zip(&mut shares) {
            let rank = svd.singular_values().len() * eighths / EIGHTHS;
            shares.push(squares().take(rank).sum::<f64>() / squares().sum::<f64>());
        }
    }
    Ok(shares.into_iter().map(mean).collect())
}
