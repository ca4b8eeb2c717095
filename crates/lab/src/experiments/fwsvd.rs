//! FWSVD beside plain SVD and its relatives, on a trained classifier and a language model.
//!
//! The paper compresses BERT-base on GLUE. Here a four-layer encoder learns [`topics`], whose
//! words mostly mean nothing, so that weights differ in importance; every linear layer of its
//! blocks is then factorised at several shares of its weights, and fine-tuned for the same
//! number of steps or not at all.

use super::classifier::{self, Course, Encoder, Labelled};
use super::{after_training, decoder, difference, mean, topics};
use crate::{Claim, Plot, Reproduction, Result, Scale, Series, Setting, Verdict};
use lapidary_compress::quality::{perplexity, sliding_windows};
use lapidary_compress::{
    Budget, Calibration, CalibrationData, CalibrationOptions, Change, Compressed, Example,
    Factorisation, Requirements, Selection, Statistic, export_dense,
};
use lapidary_kernels::{DType, Device};
use lapidary_model::{Initialiser, Model, Pass};
use lapidary_train::generator;
use lapidary_train::language::{Corpus, Split};
use std::collections::BTreeMap;

const METHODS: [Factorisation; 5] = [
    Factorisation::Svd,
    Factorisation::Fwsvd,
    Factorisation::ActivationWeighted,
    Factorisation::GeneralisedFisher,
    Factorisation::Whitened,
];
/// The share of weights kept at which claims are read, or nearest to which.
const MIDDLE: f64 = 0.5;

struct Size {
    seeds: u64,
    blocks: usize,
    width: usize,
    examples: usize,
    steps: u64,
    fine_tuning: u64,
    calibration: usize,
    tests: usize,
    shares: &'static [f64],
    language: Option<(u64, usize)>,
}

impl Size {
    fn of(scale: Scale) -> Self {
        let full = Self {
            seeds: 3,
            blocks: 4,
            width: 128,
            examples: 20_000,
            steps: 3000,
            fine_tuning: 300,
            calibration: 1000,
            tests: 2000,
            shares: &[0.1, 0.2, 0.3, 0.4, MIDDLE, 0.6, 0.7],
            language: Some((2000, 128)),
        };
        match scale {
            Scale::Smoke => Self {
                seeds: 1,
                blocks: 1,
                width: 32,
                examples: 200,
                steps: 5,
                fine_tuning: 2,
                calibration: 16,
                tests: 50,
                shares: &[MIDDLE],
                language: None,
            },
            Scale::Small => Self {
                seeds: 1,
                examples: 10_000,
                steps: 700,
                fine_tuning: 60,
                calibration: 200,
                tests: 800,
                shares: &[0.1, 0.3, MIDDLE, 0.7],
                language: Some((500, 64)),
                ..full
            },
            Scale::Full => full,
        }
    }
}

/// One method at one share.
#[derive(Clone, Copy, Debug)]
struct Point {
    method: Factorisation,
    share: f64,
    /// Accuracy as compressed.
    compressed: f64,
    /// Accuracy after fine-tuning.
    tuned: f64,
}

struct Run {
    /// Accuracy of the whole model.
    whole: f64,
    points: Vec<Point>,
    /// Layers factorised by FWSVD, and those of them whose weighted error is not above, and
    /// plain error not below, that of plain SVD.
    errors: (usize, usize),
    /// Layers compared, and those where the predicted loss rises are in the order of the
    /// measured ones.
    predicted: (usize, usize),
    /// Largest relative difference of scores between factorised and merged models.
    merged: f64,
}

/// Runs the experiment.
pub fn run(setting: &Setting) -> Result<Reproduction> {
    let size = Size::of(setting.scale);
    let runs = (0..size.seeds)
        .map(|index| one_seed(&size, setting.seed + index))
        .collect::<Result<Vec<_>>>()?;
    let language = match size.language {
        Some((steps, width)) => Some(on_language(steps, width, setting.seed)?),
        None => None,
    };
    Ok(Reproduction {
        setting: format!(
            "{} classes of text, 60 % of the vocabulary nuisance; post-norm encoder of {} \
             blocks, width {}, {} steps of 32; all linear layers of the blocks factorised; {} \
             calibration examples, {} fine-tuning steps, seeds: {}; whole model {:.1} % right \
             on {} texts",
            topics::LABELS,
            size.blocks,
            size.width,
            size.steps,
            size.calibration,
            size.fine_tuning,
            size.seeds,
            100.0 * mean(runs.iter().map(|run| run.whole)),
            size.tests,
        ),
        claims: claims(setting.scale, &runs, language.as_deref()),
        plots: vec![
            plot("Accuracy without fine-tuning", &runs, &size, |point| {
                point.compressed
            }),
            plot("Accuracy after fine-tuning", &runs, &size, |point| {
                point.tuned
            }),
        ],
        ..Reproduction::default()
    })
}

fn course(steps: u64, rate: f64, seed: u64) -> Course {
    Course {
        steps,
        batch: 32,
        rate,
        masking: None,
        seed,
    }
}

fn one_seed(size: &Size, seed: u64) -> Result<Run> {
    let mut generator = generator(seed);
    let training = topics::noisy(size.examples, &mut generator);
    let tests = topics::clean(size.tests, &mut generator);
    let spec = Encoder {
        vocabulary: topics::VOCABULARY,
        length: topics::LENGTH,
        width: size.width,
        heads: 4,
        blocks: size.blocks,
        labels: topics::LABELS,
    }
    .spec();
    let mut initial = Initialiser::new(seed, DType::F32, Device::Cpu);
    let start = Model::trainable(spec, &mut initial)?;
    let model = classifier::train(&start, &training, &course(size.steps, 1e-3, seed))?;

    let sample = training.get(..size.calibration).unwrap_or(&training);
    let calibration = calibrate(&model, &calibration_data(sample)?)?;
    let (mut points, mut merged) = (Vec::new(), 0f64);
    let mut errors = (0, 0);
    for share in size.shares {
        for method in METHODS {
            let compressed = compress(&model, method, *share, &calibration)?;
            merged = merged.max(merged_difference(&compressed.model, sample)?);
            if method == Factorisation::Fwsvd {
                let found = error_orders(&compressed);
                errors = (errors.0 + found.0, errors.1 + found.1);
            }
            let tuned = classifier::train(
                &compressed.trainable()?,
                &training,
                &course(size.fine_tuning, 3e-4, seed + 1),
            )?;
            points.push(Point {
                method,
                share: *share,
                compressed: classifier::accuracy(&compressed.model, &tests)?,
                tuned: classifier::accuracy(&tuned, &tests)?,
            });
        }
    }
    Ok(Run {
        whole: classifier::accuracy(&model, &tests)?,
        points,
        errors,
        predicted: predicted_orders(&model, sample, &calibration)?,
        merged,
    })
}

fn calibration_data(examples: &[Labelled]) -> Result<CalibrationData> {
    let labelled = |text: &Labelled| Example::labelled(text.tokens.clone(), text.label);
    Ok(CalibrationData::new(
        examples.iter().map(labelled).collect(),
    )?)
}

/// Everything that any of the methods needs, and the Fisher information of every weight.
fn calibrate(model: &Model, data: &CalibrationData) -> Result<Calibration> {
    let selection = Selection::default();
    let mut requirements = Requirements::default();
    for method in METHODS {
        requirements = requirements.union(method.requirements(model, &selection)?);
    }
    for layer in selection.chosen(model)? {
        requirements
            .statistics
            .insert(Statistic::Fisher { layer: layer.path });
    }
    Ok(Calibration::collect(
        model,
        data,
        &requirements,
        CalibrationOptions::default(),
    )?)
}

fn compress(
    model: &Model,
    method: Factorisation,
    share: f64,
    calibration: &Calibration,
) -> Result<Compressed> {
    let plan = method.plan(model, &Selection::default(), &Budget::Keep(share))?;
    Ok(plan.apply(model, Some(calibration))?)
}

/// How far the scores of a factorised model are from those of its merged twin.
fn merged_difference(factorised: &Model, sample: &[Labelled]) -> Result<f64> {
    let sequences: Vec<&[u32]> = sample
        .iter()
        .take(16)
        .map(|e| e.tokens.as_slice())
        .collect();
    let (input, padding) = classifier::batch(&sequences)?;
    let scores = |model: &Model| -> Result<_> {
        let pass = Pass {
            padding: Some(&padding),
            ..Pass::default()
        };
        Ok(model.forward(&input, pass)?.into_logits()?.into_value())
    };
    difference(&scores(factorised)?, &scores(&export_dense(factorised)?)?)
}

/// Layers, and those where FWSVD is no worse in its own norm and no better in the plain one.
fn error_orders(compressed: &Compressed) -> (usize, usize) {
    // Errors are relative; rounding to f32 moves them by about 1e-7.
    const ROUNDING: f64 = 1e-6;
    let (mut layers, mut as_published) = (0, 0);
    for layer in compressed.report.factorised() {
        if let (Some(chosen), Some(plain)) = (layer.chosen, layer.plain) {
            layers += 1;
            let weighted = chosen.weighted <= plain.weighted + ROUNDING;
            as_published +=
                usize::from(weighted && chosen.unweighted + ROUNDING >= plain.unweighted);
        }
    }
    (layers, as_published)
}

/// Layers, and those where `½ Σ Î (ΔW)²` puts SVD and FWSVD of that layer alone, at half its
/// full rank, in the order of the measured rises of the loss on the calibration data.
fn predicted_orders(
    model: &Model,
    sample: &[Labelled],
    calibration: &Calibration,
) -> Result<(usize, usize)> {
    let before = classifier::mean_loss(model, sample)?;
    let layers = Selection::default().chosen(model)?;
    let mut agreeing = 0;
    for layer in &layers {
        let rank = (layer.input.min(layer.output) / 2).max(1);
        let mut rises = Vec::new();
        for method in [Factorisation::Svd, Factorisation::Fwsvd] {
            let budget = Budget::Ranks(BTreeMap::from([(layer.path.clone(), rank)]));
            let selection = Selection::layers([layer.path.as_str()]);
            let mut plan = method.plan(model, &selection, &budget)?;
            for planned in &mut plan.modules {
                // At half the rank a square layer saves nothing, and a plan would leave it.
                planned.change = Change::Factorise { rank };
            }
            let compressed = plan.apply(model, Some(calibration))?;
            let errors = compressed
                .report
                .modules
                .first()
                .and_then(|layer| layer.chosen);
            let predicted = errors.and_then(|errors| errors.predicted_loss_rise);
            let measured = classifier::mean_loss(&compressed.model, sample)? - before;
            rises.push((predicted.unwrap_or(f64::NAN), measured));
        }
        if let [(svd, svd_rise), (fwsvd, fwsvd_rise)] = rises[..] {
            agreeing += usize::from((svd > fwsvd) == (svd_rise > fwsvd_rise));
        }
    }
    Ok((layers.len(), agreeing))
}

/// Perplexity of a language model, whole and as each method leaves it at the middle share.
fn on_language(steps: u64, width: usize, seed: u64) -> Result<Vec<(&'static str, f64)>> {
    let model = decoder::train_on_language(width, 2, steps, seed)?;
    let window = |corpus: &Corpus, index: u64| -> Result<Vec<u32>> {
        Ok(corpus.window(index, decoder::LENGTH)?)
    };
    let training = decoder::corpus(Split::Training, seed)?;
    let sample = (0..64)
        .map(|index| window(&training, index))
        .collect::<Result<Vec<_>>>()?;
    let calibration = calibrate(&model, &CalibrationData::windows(sample)?)?;
    let held_out = decoder::corpus(Split::HeldOut, seed)?;
    let mut windows = Vec::new();
    for index in 0..100 {
        let tokens = window(&held_out, index)?;
        windows.extend(sliding_windows(
            &tokens,
            decoder::LENGTH,
            decoder::LENGTH / 2,
        )?);
    }
    let mut found = vec![("whole", perplexity(&model, &windows, 16)?.value)];
    for method in METHODS {
        let compressed = compress(&model, method, MIDDLE, &calibration)?;
        found.push((
            method.name(),
            perplexity(&compressed.model, &windows, 16)?.value,
        ));
    }
    Ok(found)
}

/// The mean over the runs at one method and share.
fn at(runs: &[Run], method: Factorisation, share: f64, of: impl Fn(&Point) -> f64) -> f64 {
    let points = runs.iter().flat_map(|run| &run.points);
    mean(
        points
            .filter(|p| p.method == method && p.share == share)
            .map(of),
    )
}

fn claims(scale: Scale, runs: &[Run], language: Option<&[(&'static str, f64)]>) -> Vec<Claim> {
    let whole = mean(runs.iter().map(|run| run.whole));
    let total = |of: &dyn Fn(&Run) -> (usize, usize)| {
        runs.iter()
            .map(of)
            .fold((0, 0), |a, b| (a.0 + b.0, a.1 + b.1))
    };
    let merged = runs.iter().fold(0.0, |m: f64, run| m.max(run.merged));
    let (layers, as_published) = total(&|run| run.errors);
    let (compared, agreeing) = total(&|run| run.predicted);
    let mut claims = vec![
        recovery(scale, runs, whole),
        Claim::new(
            "per layer, FWSVD has the smaller weighted error and the larger plain error",
            "observed on BERT-base",
            format!("{as_published} of {layers} layers"),
            Verdict::of(layers == as_published),
        ),
        Claim::new(
            "½ Σ Î (ΔW)² puts SVD and FWSVD of one layer in the order of the measured rise of \
             the loss in at least 80 % of layers",
            "estimate; second-order theory",
            format!("{agreeing} of {compared} layers"),
            after_training(scale, 5 * agreeing >= 4 * compared),
        ),
        Claim::new(
            "the factorised model equals the merged one",
            "exact",
            format!("largest relative difference of scores {merged:.1e} in f32"),
            Verdict::of(merged < 1e-4),
        ),
        fine_tuned(scale, runs, whole),
    ];
    if let Some(language) = language {
        claims.push(language_claim(scale, language));
    }
    claims
}

/// FWSVD's share of what plain SVD loses, where that loses something: accuracy saturates, and a share at which nothing
/// is lost says nothing of what is recovered.
fn recovery(scale: Scale, runs: &[Run], whole: f64) -> Claim {
    // Less than this is lost to chance.
    const LEAST: f64 = 0.02;
    let left = |method, share| at(runs, method, share, |point| point.compressed);
    let shares = runs.iter().flat_map(|run| &run.points).map(|p| p.share);
    let telling = shares.filter(|share| whole - left(Factorisation::Svd, *share) >= LEAST);
    let apart = |share: &f64| (share - MIDDLE).abs();
    let nearest = telling.min_by(|a, b| apart(a).total_cmp(&apart(b)));
    let share = nearest.unwrap_or(MIDDLE);
    let accuracy = |method| left(method, share);
    let each: Vec<String> = METHODS
        .iter()
        .map(|method| format!("{method} {:.1}", 100.0 * accuracy(*method)))
        .collect();
    let lost = whole - accuracy(Factorisation::Svd);
    let recovered = (accuracy(Factorisation::Fwsvd) - accuracy(Factorisation::Svd)) / lost;
    let claim = "at the share of weights nearest to a half at which plain SVD loses at least two points \
                 without fine-tuning, FWSVD recovers at least 50 % of the accuracy that it loses";
    let measured = format!(
        "at {:.0} % kept: whole {:.1} %; {}",
        100.0 * share,
        100.0 * whole,
        each.join(", ")
    );
    if nearest.is_none() {
        return Claim::new(
            claim,
            "most of the gap (BERT-base, GLUE)",
            measured,
            Verdict::NotMeasured,
        )
        .noted(format!(
            "plain SVD loses {:.1} points, and nowhere two: nothing to recover",
            100.0 * lost
        ));
    }
    Claim::new(
        claim,
        "most of the gap (BERT-base, GLUE)",
        format!("{:.0} % recovered: {measured}", 100.0 * recovered),
        after_training(scale, recovered >= 0.5),
    )
}

/// The loss that remains after fine-tuning, at the largest share.
fn fine_tuned(scale: Scale, runs: &[Run], whole: f64) -> Claim {
    let shares = runs
        .iter()
        .flat_map(|run| &run.points)
        .map(|point| point.share);
    let share = shares.fold(0.0, f64::max);
    let tuned = |method| at(runs, method, share, |point| point.tuned);
    let (fwsvd, svd) = (tuned(Factorisation::Fwsvd), tuned(Factorisation::Svd));
    Claim::new(
        "after fine-tuning, a compact model without 9 to 30 % of its weights loses little: at \
         most one point",
        "insignificant loss at 9 to 30 % fewer (GLUE)",
        format!(
            "at {:.0} % kept: FWSVD {:.1} %, SVD {:.1} %, whole {:.1} %",
            100.0 * share,
            100.0 * fwsvd,
            100.0 * svd,
            100.0 * whole
        ),
        after_training(scale, fwsvd >= whole - 0.01),
    )
    .noted("the whole model gets no further steps")
}

fn language_claim(scale: Scale, language: &[(&'static str, f64)]) -> Claim {
    let of = |method: Factorisation| {
        let found = language.iter().find(|(name, _)| *name == method.name());
        found.map_or(f64::NAN, |(_, value)| *value)
    };
    let activations = of(Factorisation::ActivationWeighted).min(of(Factorisation::Whitened));
    let others = of(Factorisation::Svd)
        .min(of(Factorisation::Fwsvd))
        .min(of(Factorisation::GeneralisedFisher));
    let each: Vec<String> = language
        .iter()
        .map(|(name, value)| format!("{name} {value:.2}"))
        .collect();
    Claim::new(
        "on a language model, the methods weighted by activations leave the lowest perplexity",
        "estimate",
        each.join(", "),
        after_training(scale, activations < others),
    )
    .noted("half of the weights, no fine-tuning, one seed")
}

fn plot(title: &str, runs: &[Run], size: &Size, of: impl Fn(&Point) -> f64) -> Plot {
    let line = |method: Factorisation| Series {
        name: method.name().to_owned(),
        points: size
            .shares
            .iter()
            .map(|share| (*share, at(runs, method, *share, &of)))
            .collect(),
    };
    Plot {
        title: title.to_owned(),
        x: "share of weights kept".to_owned(),
        y: "accuracy".to_owned(),
        series: METHODS.into_iter().map(line).collect(),
    }
}
