//! CRATE: attention that compresses against subspaces and codes that are sparse, audited layer by
//! layer.
//!
//! The papers train image classifiers on ImageNet and decoders on OpenWebText. Here the theorem is
//! run as stated, printed digits are classified from their pixels, small decoders read bytes, and pictures of shapes
//! are learned without labels.
//!
//! What it costs: trainings that need nothing of each other, at small scale two classifiers of 1000 steps, a masked
//! autoencoder of 2000, three decoders of 500 and four self-distillations of 100, all of them jobs that threads share.
//! Every one of them has claims of its own.

mod audit;
mod digits;
mod distilled;
mod masked_images;
mod rate;
mod text;

use super::decoder::Recipe;
use super::jobs::in_parallel;
use super::mean;
use super::sequences::SIDE;
use crate::{Claim, Reproduction, Result, Scale, Setting, Verdict};
use audit::Curve;
use lapidary_factor::Matrix;
use lapidary_model::{InputSpec, Model, ModelSpec, PatchNorms};
use lapidary_parts::attention::{MixerSpec, MultiHeadSpec, QueryKeySharing};
use lapidary_parts::block::Wiring;
use lapidary_parts::feedforward::{FeedforwardSpec, SparseCodeSpec};
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

/// What a job gives.
enum Trained {
    Classifier(Box<digits::Classifier>),
    /// The loss of a decoder of text.
    Decoder(f64),
    Autoencoder(Box<masked_images::Found>),
    /// The teacher of a way of self-distillation.
    Teacher(&'static str, Box<distilled::Found>),
}

/// A training, and what is asked of what it leaves.
type Job<'a> = Box<dyn FnOnce() -> Result<Trained> + Send + 'a>;

/// Runs the experiment.
pub fn run(setting: &Setting) -> Result<Reproduction> {
    let size = Size::of(setting.scale);
    let mut claims = vec![gradient(setting.seed)?, denoising(setting)];
    claims.extend(steps(setting.seed)?);
    // Those that take longest come first, so that no thread is left with one in the end.
    let mut jobs = digits::jobs(setting, &size);
    jobs.extend(masked_images::jobs(setting, &size));
    jobs.extend(text::jobs(setting, &size)?);
    jobs.extend(distilled::jobs(setting, &size));
    let (mut classifiers, mut losses) = (Vec::new(), Vec::new());
    let (mut autoencoders, mut teachers) = (Vec::new(), Vec::new());
    for trained in in_parallel(setting, jobs, |job| job())? {
        match trained {
            Trained::Classifier(found) => classifiers.push(*found),
            Trained::Decoder(loss) => losses.push(loss),
            Trained::Autoencoder(found) => autoencoders.push(*found),
            Trained::Teacher(name, found) => teachers.push((name, *found)),
        }
    }
    let (more, mut plots) = digits::claimed(setting, &size, &classifiers)?;
    claims.extend(more);
    let (what, more) = text::claimed(setting, &losses);
    claims.extend(more);
    let (more, drawn) = masked_images::claimed(setting, autoencoders);
    claims.extend(more);
    plots.extend(drawn);
    let (more, drawn) = distilled::claimed(setting, &size, teachers);
    claims.extend(more);
    plots.extend(drawn);
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
