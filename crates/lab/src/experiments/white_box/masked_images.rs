//! The masked autoencoder: blocks that compress and make sparse, and as many that turn them around.

mod probed;

use super::audit::{Audit, averaged, sites};
use super::{HEADS, Job, Size, Trained};
use crate::error::engine;
use crate::experiments::classifier::{Labelled, Narrow, fit};
use crate::experiments::sequences::{SIDE, digits};
use crate::experiments::{after_training, mean, number, numbers};
use crate::{Claim, Error, Plot, Result, Setting};
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::{
    HeadSpec, Initialiser, Input, InputSpec, Model, ModelSpec, Pass, PatchInput, PatchPosition,
};
use lapidary_parts::attention::{MixerSpec, MultiHeadSpec, QueryKeySharing};
use lapidary_parts::block::{BlockSpec, Wiring};
use lapidary_parts::feedforward::{FeedforwardSpec, LinearSpec, SparseCodeSpec};
use lapidary_parts::norm::NormSpec;
use lapidary_signal::Trace;
use lapidary_train::masked_patches::{reconstruction_loss, visible};
use lapidary_train::{Generator, generator};
use probed::{LEARNED, Probed};
use rand::RngExt;
use std::collections::BTreeMap;

/// Blocks of the encoder, and of the decoder.
const DEPTH: usize = 4;
const PATCH: usize = 2;
/// Share of patches that are hidden.
const HIDDEN: f64 = 0.75;
/// Images of a step.
pub(super) const BATCH: usize = 32;

/// What is asked of a trained autoencoder.
pub(super) struct Found {
    /// The error on hidden patches, over that of the mean patch.
    share: f64,
    audit: Audit,
    /// What each block of the encoder reads beside what the block opposite it writes, in decibels.
    matches: Vec<f64>,
    probed: Probed,
}

/// A training for each seed.
pub(super) fn jobs<'a>(setting: &Setting, size: &'a Size) -> Vec<(String, Job<'a>)> {
    let seeds = (setting.seed..).take(size.seeds as usize);
    seeds
        .map(|seed| {
            let job = move || -> Result<Trained> {
                Ok(Trained::Autoencoder(Box::new(found(size, seed)?)))
            };
            let name = format!("a masked autoencoder, seed {seed}");
            (name, Box::new(job) as Job<'a>)
        })
        .collect()
}

fn found(size: &Size, seed: u64) -> Result<Found> {
    let training = Images::new(&digits(size.digits, seed))?;
    let held_out = Images::new(&digits(size.digits / 4, seed ^ 0xd161))?;
    let model = train(size, &training, seed)?;
    let (loss, mean_patch) = asked(&model, &training, &held_out, seed)?;
    let (audit, matches) = inside(&model, &held_out, seed)?;
    let untrained = Model::new(spec(size.width), &mut source(seed))?;
    Ok(Found {
        share: loss / mean_patch,
        audit,
        matches,
        probed: Probed::of(&model, &untrained, &training, &held_out)?,
    })
}

/// Measures what was learned.
pub(super) fn claimed(setting: &Setting, found: Vec<Found>) -> (Vec<Claim>, Vec<Plot>) {
    let (mut shares, mut audits, mut matches) = (Vec::new(), Vec::new(), Vec::new());
    let mut probes = Vec::new();
    for found in found {
        shares.push(found.share);
        audits.push(found.audit);
        matches.push(found.matches);
        probes.push(found.probed);
    }
    let audit = averaged(&audits);
    let [encoder, decoder] = audit.rates.split_at(DEPTH);
    let ratios: Vec<f64> = (0..DEPTH)
        .map(|layer| mean(matches.iter().filter_map(|each| each.get(layer).copied())))
        .collect();
    let share = mean(shares);
    let mut claims = vec![
        Claim::new(
            "masked autoencoder: hidden patches of digits are drawn with at most 0.6 times the error of \
             the mean patch",
            "estimate; ImageNet: figures of reconstructions",
            format!("{share:.2} times the error of the mean of all patches at a place"),
            after_training(setting.scale, share <= 0.6),
        )
        .noted(format!(
            "{DEPTH} blocks and {DEPTH} turned around, patches of {PATCH} by {PATCH} black and white \
             pixels of which one in twenty is turned over"
        )),
        Claim::new(
            "masked autoencoder: the coding rate falls through the encoder and rises through the decoder",
            "figure, ImageNet",
            format!("{}; {}", encoder.told(), decoder.told()),
            after_training(
                setting.scale,
                encoder.dropped() > 0.0 && decoder.dropped() < 0.0,
            ),
        ),
        Claim::new(
            "masked autoencoder: what a block of the encoder reads is near what the block opposite it \
             writes: nearer than zero is, in each of them",
            "figure: pairs of layers match",
            format!(
                "signal over difference, first block to last: {} dB",
                listed(&ratios)
            ),
            after_training(setting.scale, ratios.iter().all(|ratio| *ratio > 0.0)),
        ),
    ];
    claims.extend(probed::claims(setting, &probes, share <= LEARNED));
    let plot = Plot {
        title: "Coding rate in a masked autoencoder".to_owned(),
        x: format!("block, the last {DEPTH} those of the decoder"),
        y: "mean over heads".to_owned(),
        series: vec![audit.rates.series("trained")],
    };
    (claims, vec![plot])
}

/// Numbers in words.
fn listed(values: &[f64]) -> String {
    let each: Vec<String> = values.iter().map(|value| format!("{value:.2}")).collect();
    each.join(", ")
}

/// CRATE-MAE for digits.
fn spec(width: usize) -> ModelSpec {
    let block = |wiring, feedforward| BlockSpec {
        repeat: DEPTH,
        wiring,
        norm: NormSpec::default(),
        attention: MixerSpec::MultiHead(MultiHeadSpec {
            sharing: QueryKeySharing::All,
            bias: false,
            output_bias: Some(true),
            ..MultiHeadSpec::new(HEADS)
        }),
        cross_attention: None,
        shared: false,
        layer_scale: None,
        drop_path: 0.0,
        dropout_by_feature: false,
        coding_step: None,
        shortcuts: false,
        feedforward: Some(feedforward),
        dropout: 0.0,
    };
    ModelSpec {
        width,
        input: InputSpec::Patches(input()),
        blocks: vec![
            block(
                Wiring::Replacing,
                FeedforwardSpec::SparseCode(SparseCodeSpec::default()),
            ),
            block(
                Wiring::Reversed,
                FeedforwardSpec::Linear(LinearSpec { bias: false }),
            ),
        ],
        final_norm: Some(NormSpec::default()),
        head: HeadSpec::Pixels,
        low_rank: BTreeMap::new(),
        quantised: BTreeMap::new(),
        organisation: None,
        initial: Default::default(),
    }
}

fn input() -> PatchInput {
    PatchInput {
        image: [SIDE; 2],
        patch: PATCH,
        channels: 1,
        class_tokens: 1,
        bias: true,
        around: None,
        norm: None,
        deviation: PatchInput::DEVIATION,
        position: PatchPosition::SineCosine,
        mask_token: true,
        resized: false,
    }
}

/// Digits, black and white.
struct Images {
    pixels: Vec<Vec<f32>>,
    /// Which digit each is.
    labels: Vec<usize>,
}

impl Images {
    fn new(examples: &[Labelled]) -> Result<Self> {
        let lit = |token: &u32| if *token > 8 { 1.0 } else { 0.0 };
        if examples.is_empty() {
            return Err(Error::Experiment("no digits to learn from".to_owned()));
        }
        let (pixels, labels) = examples
            .iter()
            .map(|example| {
                let pixels: Vec<f32> = example.tokens.iter().map(lit).collect();
                (pixels, example.label as usize)
            })
            .unzip();
        Ok(Self { pixels, labels })
    }

    fn count(&self) -> usize {
        self.pixels.len()
    }

    /// `[images, 1, height, width]`.
    fn tensor(&self, places: impl Iterator<Item = usize>) -> Result<Tensor> {
        let chosen: Vec<&Vec<f32>> = places.filter_map(|place| self.pixels.get(place)).collect();
        let shape = (chosen.len(), 1, SIDE, SIDE);
        let pixels: Vec<f32> = chosen.into_iter().flatten().copied().collect();
        engine(Tensor::from_vec(pixels, shape, &Device::Cpu))
    }

    fn drawn(&self, generator: &mut Generator) -> Result<Tensor> {
        self.tensor((0..BATCH).map(|_| generator.random_range(0..self.count())))
    }

    fn all(&self) -> Result<Tensor> {
        self.tensor(0..self.count())
    }
}

/// The loss of a model on images of which some patches are hidden.
fn loss(model: &Model, images: &Tensor, keep: &Tensor, step: Option<u64>) -> Result<Tensor> {
    let pass = Pass {
        visible: Some(keep),
        draw: step,
        ..Pass::default()
    };
    let output = model.forward(&Input::Pixels(images.clone()), pass)?;
    let pixels = output
        .pixels
        .ok_or_else(|| Error::Experiment("the model draws no pixels".to_owned()))?;
    let targets = input().cut(images)?;
    Ok(reconstruction_loss(pixels.value(), &targets, keep, false)?)
}

/// The values that training begins with.
fn source(seed: u64) -> Narrow {
    Narrow(Initialiser::new(seed, DType::F32, Device::Cpu))
}

fn train(size: &Size, images: &Images, seed: u64) -> Result<Model> {
    let model = Model::trainable(spec(size.width), &mut source(seed))?;
    let mut draws = generator(seed);
    fit(&model, size.masked_steps, 3e-3, |step| {
        let drawn = images.drawn(&mut draws)?;
        let keep = visible(BATCH, input().patches(), HIDDEN, &mut draws)?;
        loss(&model, &drawn, &keep, Some(step))
    })
}

/// The error on hidden patches of held-out images, and that of the mean of all patches at their place.
fn asked(model: &Model, training: &Images, held_out: &Images, seed: u64) -> Result<(f64, f64)> {
    let images = held_out.all()?;
    let count = held_out.count();
    let keep = visible(
        count,
        input().patches(),
        HIDDEN,
        &mut generator(seed ^ 0xa5c),
    )?;
    let found = number(&loss(model, &images, &keep, None)?)?;
    let targets = input().cut(&images)?;
    let means = engine(input().cut(&training.all()?)?.mean_keepdim(0))?;
    let means = engine(engine(means.broadcast_as(targets.dims()))?.contiguous())?;
    let of_mean = number(&reconstruction_loss(&means, &targets, &keep, false)?)?;
    Ok((found, of_mean))
}

/// What lies in the blocks, and for each block of the encoder `10 lg(‖a‖² / ‖a − b‖²)` of what it reads and
/// what the block opposite it in the decoder writes.
fn inside(model: &Model, images: &Images, seed: u64) -> Result<(Audit, Vec<f64>)> {
    let count = images.count().min(BATCH);
    let images = images.tensor(0..count)?;
    let keep = visible(count, input().patches(), HIDDEN, &mut generator(seed))?;
    let trace: Trace = sites()?.capture("blocks.*.in")?;
    let pass = Pass {
        visible: Some(&keep),
        trace: Some(&trace),
        ..Pass::default()
    };
    model.forward(&Input::Pixels(images), pass)?;
    let mut ratios = Vec::new();
    for layer in 0..DEPTH {
        let read = trace.signal(&format!("blocks.{layer}.in"))?;
        let opposite = 2 * DEPTH - 1 - layer;
        let written = trace.signal(&format!("blocks.{opposite}.out"))?;
        let (read, written) = (numbers(read.value())?, numbers(written.value())?);
        let signal: f64 = read.iter().map(|a| a * a).sum();
        let apart: f64 = read
            .iter()
            .zip(&written)
            .map(|(a, b)| (a - b).powi(2))
            .sum();
        ratios.push(10.0 * (signal / apart).log10());
    }
    Ok((Audit::of(&trace, 2 * DEPTH)?, ratios))
}
