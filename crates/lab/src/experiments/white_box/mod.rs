//! CRATE: attention that compresses against subspaces and codes that are sparse, audited layer by
//! layer.
//!
//! The papers train image classifiers on ImageNet and decoders on OpenWebText. Here the theorem is
//! run as stated, printed digits are classified from their pixels, small decoders read bytes, and pictures of shapes
//! are learned without labels.

mod audit;
mod distilled;
mod masked_images;
mod rate;

use super::attending;
use super::decoder::{Recipe, train_by};
use super::jobs::{by_seed, in_parallel};
use super::sequences::{Course, LEVELS, Measures, SIDE, digits, percent_right, train};
use super::{after_training, mean};
use crate::{Claim, Plot, Reproduction, Result, Scale, Setting, Verdict};
use audit::{Curve, averaged, of_sequences};
use lapidary_factor::Matrix;
use lapidary_model::{Initialiser, InputSpec, Model, ModelSpec, PatchNorms};
use lapidary_parts::attention::{MechanismSpec, MixerSpec, MultiHeadSpec, QueryKeySharing};
use lapidary_parts::block::Wiring;
use lapidary_parts::feedforward::{DenseSpec, FeedforwardSpec, SparseCodeSpec};
use lapidary_train::generator;
use rate::{attend, mixture, rate, rate_gradient, signal_to_noise, softmax, subspaces};

const HEADS: usize = 4;
const BLOCKS: usize = 4;

/// How much is done.
struct Size {
    digits: usize,
    steps: u64,
    batch: usize,
    /// Steps of the masked autoencoder, which sees a quarter of each image.
    masked_steps: u64,
    seeds: u64,
    text: Recipe,
    text_steps: u64,
    text_batches: usize,
    width: usize,
    /// Of self-distillation: pictures, steps and prototypes.
    pictures: usize,
    distillation_steps: u64,
    prototypes: usize,
}

impl Size {
    fn of(scale: Scale) -> Self {
        let text = Recipe {
            batch: 8,
            length: 128,
            peak: 2e-3,
            alignment: None,
            narrow: true,
            dense_steps: 0,
        };
        match scale {
            Scale::Smoke => Self {
                digits: 40,
                steps: 2,
                batch: 8,
                masked_steps: 2,
                seeds: 1,
                text: Recipe {
                    batch: 1,
                    length: 16,
                    ..text
                },
                text_steps: 1,
                text_batches: 1,
                width: 16,
                pictures: 32,
                distillation_steps: 1,
                prototypes: 16,
            },
            Scale::Small => Self {
                digits: 4000,
                steps: 1000,
                batch: 32,
                masked_steps: 2000,
                seeds: 1,
                text,
                text_steps: 500,
                text_batches: 20,
                width: 64,
                pictures: 400,
                distillation_steps: 100,
                prototypes: 64,
            },
            Scale::Full => Self {
                digits: 20_000,
                steps: 5000,
                batch: 32,
                masked_steps: 20_000,
                seeds: 3,
                text: Recipe { batch: 32, ..text },
                text_steps: 3000,
                text_batches: 40,
                width: 128,
                pictures: 10_000,
                distillation_steps: 5000,
                prototypes: 1024,
            },
        }
    }
}

/// Runs the experiment.
pub fn run(setting: &Setting) -> Result<Reproduction> {
    let size = Size::of(setting.scale);
    let mut claims = vec![gradient(setting.seed)?, denoising(setting)];
    claims.extend(steps(setting.seed)?);
    let (more, plots) = on_digits(setting, &size)?;
    claims.extend(more);
    let (what, more) = on_text(setting, &size)?;
    claims.extend(more);
    let (more, drawn) = masked_images::run(setting, &size)?;
    claims.extend(more);
    let (more, of_pictures) = distilled::run(setting, &size)?;
    claims.extend(more);
    let plots = plots.into_iter().chain(drawn).chain(of_pictures).collect();
    Ok(Reproduction {
        setting: format!(
            "printed digits as {} pixels, {BLOCKS} blocks of width {} with {HEADS} heads, {} steps of \
             {}, {} seed(s), as images with three of four patches hidden too, {} steps of {}; {what}, {} steps \
             of {} windows of {}; {} pictures of shapes without labels, {} steps",
            SIDE * SIDE,
            size.width,
            size.steps,
            size.batch,
            size.seeds,
            size.masked_steps,
            masked_images::BATCH,
            size.text_steps,
            size.text.batch,
            size.text.length,
            size.pictures,
            size.distillation_steps
        ),
        claims,
        plots,
        ..Reproduction::default()
    })
}

fn gradient(seed: u64) -> Result<Claim> {
    let mut random = generator(seed);
    let bases = subspaces(24, 3, &mut random);
    let z = rate::normal(24, 10, &mut random);
    let exact = rate_gradient(&z, &bases, 0.6)?;
    let mut worst = 0f64;
    for at in (0..24 * 10).step_by(7) {
        let (i, j) = (at / 10, at % 10);
        let moved = |by: f64| -> Result<f64> {
            let mut other = z.clone();
            other[(i, j)] += by;
            rate(&other, &bases, 0.6)
        };
        let slope = (moved(1e-5)? - moved(-1e-5)?) / 2e-5;
        worst = worst.max((slope - exact[(i, j)]).abs());
    }
    Ok(Claim::new(
        "the gradient of the coding rate is what attention approximates: it equals finite differences",
        "derivation",
        format!("largest difference {worst:.1e}"),
        Verdict::of(worst < 1e-5),
    ))
}

/// Size `η` of a step in the theorem of denoising.
const DENOISING_STEP: f64 = 0.5;
/// Thresholds `τ`: the theorem allows those above a half and up to `1 / (1 + N exp(−9p/32))`, which is nearly 1 here.
const THRESHOLDS: [f64; 2] = [0.75, 0.99];

/// The theorem holds with high probability: it is asked of several draws of subspaces and tokens.
fn denoising(setting: &Setting) -> Claim {
    const SUBSPACES: usize = 4;
    const DIMENSION: usize = 64;
    const EACH: usize = 64;
    let draws = match setting.scale {
        Scale::Smoke => 1,
        Scale::Small | Scale::Full => 10,
    };
    let mut exact = [0usize; THRESHOLDS.len()];
    let mut random = generator(setting.seed);
    for _ in 0..draws {
        let bases = subspaces(SUBSPACES * DIMENSION, SUBSPACES, &mut random);
        let z = mixture(&bases, EACH, 0.2, &mut random);
        for (exact, threshold) in exact.iter_mut().zip(THRESHOLDS) {
            *exact += usize::from(farthest(z.clone(), &bases, threshold) < 1e-4);
        }
    }
    let told: Vec<String> = THRESHOLDS
        .iter()
        .zip(exact)
        .map(|(threshold, exact)| format!("τ = {threshold}: in {exact} of {draws} draws"))
        .collect();
    let [_, highest] = exact;
    Claim::new(
        "a layer multiplies the ratio of signal to noise of every class by 1 + ητ",
        "theorem, with high probability",
        format!(
            "within 1e-4 through 8 layers, {SUBSPACES} subspaces of dimension {DIMENSION}, {} tokens: {}",
            SUBSPACES * EACH,
            told.join("; ")
        ),
        Verdict::of(10 * highest >= 9 * draws),
    )
    .noted(
        "holds where nine of ten draws do at the higher threshold: a token is taken for one of another class \
         where it has a weight above τ there, at a lower τ more often. Tokens are divided by 1 + ητ between \
         layers, which changes no ratio: without it scores grow until a token attends to one of another class",
    )
}

/// How far from `1 + ητ` a layer of `Z ← Z + η Σ_k U_k U_kᵀ Z φ(…)` multiplies a ratio at most, where `φ` keeps `τ` of a
/// softmax weight above `τ` and nothing of the others.
fn farthest(mut z: Matrix, bases: &[Matrix], threshold: f64) -> f64 {
    const LAYERS: usize = 8;
    let grown = 1.0 + DENOISING_STEP * threshold;
    let mut worst = 0f64;
    for _ in 0..LAYERS {
        let before = signal_to_noise(&z, bases);
        let attended = attend(&z, bases, |scores| {
            softmax(scores);
            for weight in scores {
                *weight = if *weight > threshold { threshold } else { 0.0 };
            }
        });
        // What the theorem asks of tokens, a signal of variance one, holds again after a division.
        z = Matrix::from_fn(z.nrows(), z.ncols(), |i, j| {
            (z[(i, j)] + DENOISING_STEP * attended[(i, j)]) / grown
        });
        for (before, after) in before.iter().zip(signal_to_noise(&z, bases)) {
            worst = worst.max((after / before - grown).abs());
        }
    }
    worst
}

/// `Z ← (1 − κ s) Z + κ s · MSSA(Z)` with the true subspaces.
fn steps(seed: u64) -> Result<[Claim; 2]> {
    const STEP: f64 = 0.1;
    const LAYERS: usize = 8;
    let mut random = generator(seed ^ 0x5eed);
    let bases = subspaces(64, 4, &mut random);
    let mut z = mixture(&bases, 32, 0.3, &mut random);
    let mut rates = vec![rate(&z, &bases, 0.5)?];
    let mut ratios = vec![mean(signal_to_noise(&z, &bases))];
    for _ in 0..LAYERS {
        let attended = attend(&z, &bases, softmax);
        z = Matrix::from_fn(z.nrows(), z.ncols(), |i, j| {
            (1.0 - STEP) * z[(i, j)] + STEP * attended[(i, j)]
        });
        rates.push(rate(&z, &bases, 0.5)?);
        ratios.push(mean(signal_to_noise(&z, &bases)));
    }
    let falling = rates
        .windows(2)
        .take_while(|w| matches!(w, [a, b] if b < a))
        .count();
    let rising = ratios
        .windows(2)
        .take_while(|w| matches!(w, [a, b] if b > a))
        .count();
    let ends = |values: &[f64]| {
        let (first, last) = (values.first(), values.last());
        format!(
            "{:.2} to {:.2}",
            first.copied().unwrap_or(f64::NAN),
            last.copied().unwrap_or(f64::NAN)
        )
    };
    let note = "attention alone: a sparse code has coordinates of its own, in which these subspaces mean \
                nothing";
    let published = "estimate; the theory of compression by gradient steps";
    Ok([
        Claim::new(
            "untrained attention against the true subspaces lowers the coding rate for at least six \
             layers",
            published,
            format!("it falls for {falling} of {LAYERS} layers ({})", ends(&rates)),
            Verdict::of(falling >= 6),
        )
        .noted(note),
        Claim::new(
            "and signal over noise rises for as many",
            published,
            format!(
                "it rises for the first {rising} of {LAYERS} layers ({})",
                ends(&ratios)
            ),
            Verdict::of(rising >= 6),
        )
        .noted(note),
    ])
}

/// The same model with CRATE's blocks, and of patches with CRATE's embedding too.
fn white_box(spec: &ModelSpec, atoms: Option<usize>) -> ModelSpec {
    let mut spec = spec.clone();
    if let InputSpec::Patches(patches) = &mut spec.input {
        patches.around = Some(PatchNorms::default());
        patches.deviation = 1.0;
    }
    for block in &mut spec.blocks {
        block.wiring = Wiring::Replacing;
        block.feedforward = Some(FeedforwardSpec::SparseCode(SparseCodeSpec {
            atoms,
            ..SparseCodeSpec::default()
        }));
        if let MixerSpec::MultiHead(attention) = &mut block.attention {
            *attention = MultiHeadSpec {
                sharing: QueryKeySharing::All,
                bias: false,
                output_bias: Some(true),
                ..attention.clone()
            };
        }
    }
    spec
}

fn on_digits(setting: &Setting, size: &Size) -> Result<(Vec<Claim>, Vec<Plot>)> {
    let measures = Measures {
        vocabulary: LEVELS,
        length: SIDE * SIDE,
        labels: 10,
        width: size.width,
        heads: HEADS,
        blocks: BLOCKS,
    };
    let mut usual = measures.spec(MechanismSpec::Softmax, true);
    for block in &mut usual.blocks {
        block.feedforward = Some(FeedforwardSpec::Dense(DenseSpec {
            hidden: 4 * size.width,
            activation: Default::default(),
            bias: true,
        }));
    }
    let own = white_box(&usual, None);
    let asked = |seed: u64| digits(size.digits / 4, seed ^ 0xd161);
    let ways = [("Transformer", usual), ("CRATE", own.clone())];
    let found = by_seed(setting, "digits", &ways, size.seeds, |spec, seed| {
        let course = Course {
            steps: size.steps,
            batch: size.batch,
            rate: 3e-3,
            seed,
        };
        let model = train(spec.clone(), &digits(size.digits, seed), &course)?;
        Ok((percent_right(&model, &asked(seed))?, model))
    })?;
    let of = |name: &'static str| {
        let models = found.iter().filter(move |(known, _)| *known == name);
        models.flat_map(|(_, each)| each)
    };
    let [usual_right, own_right] =
        ["Transformer", "CRATE"].map(|name| mean(of(name).map(|(right, _)| *right)));
    let [usual_parameters, own_parameters] = ["Transformer", "CRATE"]
        .map(|name| of(name).next().map_or(0, |(_, model)| in_blocks(model)));
    let share = own_parameters as f64 / usual_parameters as f64;
    let (mut audits, mut initial) = (Vec::new(), Vec::new());
    for (seed, (_, model)) in (setting.seed..).zip(of("CRATE")) {
        let held_out = asked(seed);
        let sequences: Vec<&[u32]> = held_out
            .iter()
            .take(32)
            .map(|e| e.tokens.as_slice())
            .collect();
        audits.push(of_sequences(model, &sequences)?);
        let mut source = super::classifier::Narrow(Initialiser::new(
            seed,
            lapidary_kernels::DType::F32,
            lapidary_kernels::Device::Cpu,
        ));
        initial.push(of_sequences(
            &Model::new(own.clone(), &mut source)?,
            &sequences,
        )?);
    }
    let (trained, untrained) = (averaged(&audits), averaged(&initial));
    let claims = vec![
        Claim::new(
            "with less than 40 % of the blocks' parameters it comes within 2 points of a Transformer of \
             the same width, heads and blocks",
            "ImageNet: CRATE-B 70.8 % with 22.8 M parameters, ViT-S 72.4 % with 22.1 M",
            format!(
                "{own_right:.1} % with {:.0} % of the parameters; {usual_right:.1} %",
                100.0 * share
            ),
            after_training(setting.scale, own_right >= usual_right - 2.0 && share < 0.4),
        ),
        Claim::new(
            "after training the coding rate falls from block to block, at least twice of three times, and by \
             more than before training",
            "figure: it falls through the layers, the last one or two aside",
            beside("rates", &trained.rates, &untrained.rates),
            after_training(setting.scale, learned(&trained.rates, &untrained.rates)),
        ),
        Claim::new(
            "and so does the share of entries that are not zero",
            "figure",
            beside("shares", &trained.active, &untrained.active),
            after_training(setting.scale, learned(&trained.active, &untrained.active)),
        ),
    ];
    let plots = vec![
        Plot {
            title: "Coding rate of tokens against each block's subspaces".to_owned(),
            x: "block".to_owned(),
            y: "mean over heads".to_owned(),
            series: vec![
                trained.rates.series("trained"),
                untrained.rates.series("untrained"),
            ],
        },
        Plot {
            title: "Entries of each block's code that are not zero".to_owned(),
            x: "block".to_owned(),
            y: "share".to_owned(),
            series: vec![
                trained.active.series("trained"),
                untrained.active.series("untrained"),
            ],
        },
    ];
    Ok((claims, plots))
}

/// Whether what is behind the blocks falls between most of them, and by more than it does untrained: it may fall
/// without having learned anything.
fn learned(trained: &Curve, untrained: &Curve) -> bool {
    trained.falls() + 2 >= BLOCKS && trained.dropped() > untrained.dropped()
}

fn beside(name: &str, trained: &Curve, untrained: &Curve) -> String {
    format!(
        "{name} {}; before training {}",
        trained.told(),
        untrained.told()
    )
}

fn in_blocks(model: &Model) -> usize {
    let of_blocks = model
        .parameters()
        .iter()
        .filter(|(name, _)| name.starts_with("blocks."));
    of_blocks.map(|(_, parameter)| parameter.elem_count()).sum()
}

fn on_text(setting: &Setting, size: &Size) -> Result<(String, Vec<Claim>)> {
    let usual = "within 0.25 nats of a Transformer's block of the same width and depth";
    let more = "an over-complete dictionary is better than a square one";
    let Some([training, held_out]) = attending::shakespeare(setting)? else {
        let missing = |claim: &str| {
            Claim::new(
                &format!("on text, causal: {claim}"),
                "OpenWebText: CRATE-GPT2-Base 3.37 (60 M), GPT2-Small 3.04 (64 M)",
                "no text: give --data with tiny_shakespeare.txt",
                Verdict::NotMeasured,
            )
        };
        return Ok(("no text".to_owned(), vec![missing(usual), missing(more)]));
    };
    let attention = MultiHeadSpec {
        causal: true,
        ..MultiHeadSpec::new(HEADS)
    };
    let gpt = attending::spec(256, size.width, size.text.length, &vec![attention; BLOCKS]);
    let jobs = [
        ("Transformer", gpt.clone()),
        ("square", white_box(&gpt, None)),
        ("over-complete", white_box(&gpt, Some(4 * size.width))),
    ];
    let jobs = jobs.map(|(name, spec)| (format!("a decoder of text, {name}"), spec));
    let losses = in_parallel(setting, jobs.into(), |spec| {
        let task = Box::new(training.clone());
        let model = train_by(size.text, spec, task, size.text_steps, setting.seed)?;
        let mut task = held_out.clone();
        Ok(attending::measure(&model, &mut task, size.text, size.text_batches)?.loss)
    })?;
    let [gpt, square, over] = losses.as_slice() else {
        return Ok(("no text".to_owned(), Vec::new()));
    };
    let told =
        format!("Transformer {gpt:.3}, square {square:.3}, over-complete {over:.3} nats a byte");
    Ok((
        "the bytes of Tiny Shakespeare".to_owned(),
        vec![
            Claim::new(
                &format!("on text, causal: {usual}"),
                "OpenWebText: CRATE-GPT2-Base 3.37 (60 M), GPT2-Small 3.04 (64 M)",
                told.clone(),
                after_training(setting.scale, square - gpt <= 0.25),
            ),
            Claim::new(
                &format!("on text, causal: {more}"),
                "the group's follow-up recommends it",
                told,
                after_training(setting.scale, over < square),
            ),
        ],
    ))
}
