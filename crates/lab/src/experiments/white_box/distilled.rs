//! Self-distillation without labels: what a model of CRATE's blocks learns of pictures that nobody named, beside a
//! Transformer of the same width, heads and blocks.

use super::{BLOCKS, HEADS, Size, white_box};
use crate::error::engine;
use crate::experiments::attributes::{self, Draw, Picture, SHAPE, Scene};
use crate::experiments::classifier::Narrow;
use crate::experiments::jobs::by_seed;
use crate::experiments::{after_training, mean, mini_clip, numbers};
use crate::{Claim, Error, Result, Setting};
use lapidary_kernels::{DType, Device};
use lapidary_model::{
    HeadSpec, Initialiser, Input, InputSpec, Model, ModelSpec, Pass, PatchInput, Pool,
};
use lapidary_parts::activation::ActivationSpec;
use lapidary_parts::attention::{MixerSpec, MultiHeadSpec};
use lapidary_parts::block::{BlockSpec, Wiring};
use lapidary_parts::feedforward::{DenseSpec, FeedforwardSpec};
use lapidary_parts::norm::NormSpec;
use lapidary_signal::Trace;
use lapidary_train::self_distillation::{CropSpec, Distiller, Image, Images, SelfDistillationSpec};
use lapidary_train::spec::{
    CheckpointSpec, DataSpec, OptimiserSpec, ScheduleSpec, TrainSpec, ValidationSpec,
};
use lapidary_train::{Decay, generator};
use std::collections::BTreeMap;

/// Height and width of a picture, and of a patch.
const SIDE: usize = 24;
const PATCH: usize = 3;
/// Share of a head's attention that its patches have to carry to be its map.
const MASS: f64 = 0.6;
/// Neighbours that name a picture.
const NEIGHBOURS: usize = 10;
const SHAPES: usize = 4;

const OWN: &str = "CRATE";
const USUAL: &str = "Transformer";
const UNCENTRED: &str = "CRATE without a centre";
const BLUNT: &str = "CRATE without sharpening";

/// What is asked of a trained teacher.
struct Found {
    /// Mean overlap of the best head's map with the shape, after training and before.
    overlap: [f64; 2],
    /// Percent of shapes that are named by neighbours, after training and before.
    named: [f64; 2],
    /// Nats that an output tells of its picture.
    information: f64,
    /// Nats of a picture's outputs.
    entropy: f64,
}

/// Trains and asks.
pub(super) fn run(setting: &Setting, size: &Size) -> Result<Vec<Claim>> {
    let ways = [
        (OWN, (true, objective(size))),
        (USUAL, (false, objective(size))),
        (
            UNCENTRED,
            (
                true,
                SelfDistillationSpec {
                    // It stays where it begins, at zero.
                    centre_momentum: 1.0,
                    ..objective(size)
                },
            ),
        ),
        (
            BLUNT,
            (
                true,
                SelfDistillationSpec {
                    teacher_temperature: 1.0,
                    first_teacher_temperature: 1.0,
                    ..objective(size)
                },
            ),
        ),
    ];
    let found = by_seed(
        setting,
        "self-distillation",
        &ways,
        size.seeds,
        |way, seed| {
            let (own, objective) = way;
            distilled(size, *own, objective.clone(), seed)
        },
    )?;
    let over = |name: &str, of: fn(&Found) -> f64| {
        let seeds = found.iter().filter(|(known, _)| *known == name);
        mean(seeds.flat_map(|(_, each)| each.iter().map(of)))
    };
    let information = |name: &str| over(name, |found| found.information);
    let told = |name: &str| {
        format!(
            "{name} {:.3} of {:.2}",
            information(name),
            (size.prototypes as f64).ln()
        )
    };
    let (own, usual) = (
        over(OWN, |found| found.overlap[0]),
        over(USUAL, |found| found.overlap[0]),
    );
    let (named, other) = (
        over(OWN, |found| found.named[0]),
        over(USUAL, |found| found.named[0]),
    );
    let before = over(OWN, |found| found.named[1]);
    let note = format!(
        "{} pictures of {SIDE} by {SIDE} pixels with one shape before a texture, patches of {PATCH} by {PATCH}, {} \
         steps of {BATCH} pictures in {} views; heads and neighbours are the teacher's",
        size.pictures,
        size.distillation_steps,
        objective(size).crops.count()
    );
    Ok(vec![
        Claim::new(
            "self-distillation: centre and sharpening keep the teacher from saying the same of every picture; without \
             either its outputs tell less of it",
            "DINO, figure: without either the divergence of student and teacher falls to 0",
            format!(
                "nats told: {}, {} (entropy {:.2}), {} (entropy {:.2})",
                told(OWN),
                told(UNCENTRED),
                over(UNCENTRED, |found| found.entropy),
                told(BLUNT),
                over(BLUNT, |found| found.entropy)
            ),
            after_training(
                setting.scale,
                information(OWN) > information(UNCENTRED) && information(OWN) > information(BLUNT),
            ),
        )
        .noted(note.clone()),
        Claim::new(
            "self-distillation: the class token's attention in the last block overlaps the shape more in CRATE than in \
             a Transformer",
            "COCO, masks of supervised models, AP50: CRATE-B 2.9, ViT-B 0.8; DINO, VOC12, Jaccard: 45.9 of a ViT-S \
             distilled, 27.3 of one supervised",
            format!(
                "mean Jaccard index of the best head {own:.3} against {usual:.3}; untrained {:.3} against {:.3}",
                over(OWN, |found| found.overlap[1]),
                over(USUAL, |found| found.overlap[1])
            ),
            after_training(setting.scale, own > usual),
        )
        .noted(format!(
            "a head's map: the patches that carry {:.0} % of its attention; of each picture the head that overlaps most",
            100.0 * MASS
        )),
        Claim::new(
            "self-distillation: the ten nearest of named pictures name shapes better than before training, and with \
             CRATE within 5 points of a Transformer",
            "DINO, ImageNet: ViT-S/16 74.5 % by neighbours",
            format!(
                "CRATE {named:.1} %, before {before:.1} %; Transformer {other:.1} %, before {:.1} %",
                over(USUAL, |found| found.named[1])
            ),
            after_training(setting.scale, named > before && named >= other - 5.0),
        )
        .noted(note),
    ])
}

/// Pictures of a step.
const BATCH: usize = 16;

fn objective(size: &Size) -> SelfDistillationSpec {
    SelfDistillationSpec {
        outputs: size.prototypes,
        hidden: 2 * size.width,
        bottleneck: size.width,
        // Runs are short: a teacher that moves as slowly as the published one stays where it began.
        momentum: 0.97,
        crops: CropSpec {
            locals: 2,
            local: [0.15, 0.4],
            ..CropSpec::default()
        },
        ..SelfDistillationSpec::default()
    }
}

/// A vision transformer without a classifier.
fn usual(width: usize) -> ModelSpec {
    ModelSpec {
        width,
        input: InputSpec::Patches(PatchInput {
            image: [SIDE; 2],
            patch: PATCH,
            channels: 3,
            class_tokens: 1,
            bias: true,
            norm: None,
            position: Default::default(),
            mask_token: false,
        }),
        blocks: vec![BlockSpec {
            repeat: BLOCKS,
            wiring: Wiring::PreNorm,
            norm: NormSpec::default(),
            attention: MixerSpec::MultiHead(MultiHeadSpec::new(HEADS)),
            cross_attention: None,
            shared: false,
            layer_scale: None,
            drop_path: 0.0,
            shortcuts: false,
            feedforward: Some(FeedforwardSpec::Dense(DenseSpec {
                hidden: 4 * width,
                activation: ActivationSpec::Gelu,
                bias: true,
            })),
            dropout: 0.0,
        }],
        final_norm: Some(NormSpec::default()),
        head: HeadSpec::Pooled {
            pool: Pool::First,
            norm: None,
            hidden: None,
            labels: None,
            bias: true,
        },
        low_rank: BTreeMap::new(),
        quantised: BTreeMap::new(),
        organisation: None,
    }
}

fn course(size: &Size, model: ModelSpec, own: SelfDistillationSpec, seed: u64) -> TrainSpec {
    TrainSpec {
        seed,
        steps: size.distillation_steps,
        batch: BATCH,
        length: 0,
        accumulate: 1,
        clip: Some(3.0),
        average: None,
        dense_steps: 0,
        annealed_steps: 0,
        masking: None,
        recompute: false,
        loss_chunk: None,
        alignment: None,
        schedule: ScheduleSpec {
            peak: 2e-3,
            floor: 2e-5,
            warm_up: size.distillation_steps / 10,
            decay: Decay::Cosine,
        },
        optimiser: OptimiserSpec::default(),
        groups: Vec::new(),
        validation: ValidationSpec::default(),
        checkpoint: CheckpointSpec::default(),
        data: DataSpec::Shapes {
            seed,
            count: size.pictures,
        },
        self_distillation: Some(own),
        model,
    }
}

fn drawn(count: usize, seed: u64) -> Vec<(Scene, Picture)> {
    let mut random = generator(seed);
    let draw = Draw::balanced();
    (0..count)
        .map(|_| {
            let scene = draw.scene(&mut random);
            (scene, attributes::draw(scene, SIDE, &mut random))
        })
        .collect()
}

fn distilled(size: &Size, own: bool, objective: SelfDistillationSpec, seed: u64) -> Result<Found> {
    let training = drawn(size.pictures, seed ^ 0xd1500);
    let held_out = drawn(size.pictures / 4, seed ^ 0xd1501);
    let images = |pictures: &[(Scene, Picture)]| -> Result<Vec<Image>> {
        let each = pictures
            .iter()
            .map(|(_, picture)| Ok(Image::new([3, SIDE, SIDE], picture.pixels.clone())?));
        each.collect()
    };
    let images = Images {
        training: images(&training)?,
        validation: images(&held_out)?,
    };
    let model = match own {
        true => white_box(&usual(size.width), None),
        false => usual(size.width),
    };
    let mut source = Narrow(Initialiser::new(seed, DType::F32, Device::Cpu));
    let spec = course(size, model, objective, seed);
    let mut distiller = Distiller::with_source(spec, &mut source, images)?;
    let untrained = distiller.finished()?;
    while distiller.steps_done() < size.distillation_steps {
        distiller.step()?;
    }
    let (_, spread) = distiller.validate()?;
    let trained = distiller.finished()?;
    let named = |model: &Model| -> Result<f64> {
        let known = features(model, &training)?;
        Ok(percent_named(&known, &features(model, &held_out)?))
    };
    Ok(Found {
        overlap: [
            mean(overlaps(&trained, &held_out)?),
            mean(overlaps(&untrained, &held_out)?),
        ],
        named: [named(&trained)?, named(&untrained)?],
        information: spread.information(),
        entropy: spread.entropy,
    })
}

/// Pictures run at one time.
const AT_ONCE: usize = 64;

fn input(pictures: &[(Scene, Picture)]) -> Result<Input> {
    let pictures: Vec<Picture> = pictures
        .iter()
        .map(|(_, picture)| picture.clone())
        .collect();
    Ok(Input::Pixels(mini_clip::pixels(&pictures, SIDE)?))
}

/// The shape of each picture and its features, of length one.
fn features(model: &Model, pictures: &[(Scene, Picture)]) -> Result<Vec<(usize, Vec<f64>)>> {
    let mut all = Vec::new();
    for chunk in pictures.chunks(AT_ONCE) {
        let output = model.forward(&input(chunk)?, Pass::default())?;
        let pooled = output
            .pooled
            .ok_or_else(|| Error::Experiment("the model pools nothing".to_owned()))?;
        let rows = numbers(pooled.value())?;
        let width = (rows.len() / chunk.len()).max(1);
        for ((scene, _), row) in chunk.iter().zip(rows.chunks(width)) {
            let length = row.iter().map(|x| x * x).sum::<f64>().sqrt().max(1e-12);
            let unit = row.iter().map(|x| x / length).collect();
            all.push((scene.values[SHAPE], unit));
        }
    }
    Ok(all)
}

/// How many of a hundred are of the shape that most of their nearest have, by the cosine.
fn percent_named(known: &[(usize, Vec<f64>)], asked: &[(usize, Vec<f64>)]) -> f64 {
    let right = asked.iter().filter(|(shape, asked)| {
        let cosine = |other: &[f64]| -> f64 { asked.iter().zip(other).map(|(a, b)| a * b).sum() };
        let mut near: Vec<(f64, usize)> = known
            .iter()
            .map(|(shape, other)| (cosine(other), *shape))
            .collect();
        near.sort_by(|a, b| b.0.total_cmp(&a.0));
        let mut votes = [0usize; SHAPES];
        for (_, shape) in near.iter().take(NEIGHBOURS) {
            if let Some(votes) = votes.get_mut(*shape) {
                *votes += 1;
            }
        }
        // Of equal votes the first shape.
        let said = (0..SHAPES).rev().max_by_key(|shape| votes[*shape]);
        said == Some(*shape)
    });
    100.0 * right.count() as f64 / asked.len().max(1) as f64
}

/// For each picture the best head's overlap, `|map ∩ shape| / |map ∪ shape|` in pixels, of what the class token
/// attends to in the last block.
fn overlaps(model: &Model, pictures: &[(Scene, Picture)]) -> Result<Vec<f64>> {
    let site = format!("blocks.{}.attention.weights", BLOCKS - 1);
    let mut all = Vec::new();
    for chunk in pictures.chunks(AT_ONCE) {
        let trace = Trace::new().capture(&site)?;
        let pass = Pass {
            trace: Some(&trace),
            ..Pass::default()
        };
        model.forward(&input(chunk)?, pass)?;
        let weights = trace.signal(&site)?;
        let (_, heads, queries, keys) = engine(weights.value().dims4())?;
        let weights = numbers(weights.value())?;
        let of_picture = weights.chunks((heads * queries * keys).max(1));
        for ((_, picture), weights) in chunk.iter().zip(of_picture) {
            let each = weights.chunks((queries * keys).max(1));
            // The first row is the class token's, and its first weight that of itself.
            let each = each.filter_map(|head| head.get(1..keys));
            let best = each.map(|patches| overlap(patches, &picture.mask));
            all.push(best.fold(0.0, f64::max));
        }
    }
    Ok(all)
}

/// Jaccard's index of the patches that carry most of the attention and a mask of pixels.
fn overlap(attention: &[f64], mask: &[bool]) -> f64 {
    let mut order: Vec<usize> = (0..attention.len()).collect();
    order.sort_by(|a, b| attention[*b].total_cmp(&attention[*a]));
    let mut chosen = vec![false; attention.len()];
    let (mut sum, total) = (0.0, attention.iter().sum::<f64>());
    for patch in order {
        if sum >= MASS * total {
            break;
        }
        sum += attention[patch];
        chosen[patch] = true;
    }
    let patch_of = |pixel: usize| pixel / SIDE / PATCH * (SIDE / PATCH) + pixel % SIDE / PATCH;
    let (mut both, mut either) = (0usize, 0usize);
    for (pixel, shape) in mask.iter().enumerate() {
        let map = chosen.get(patch_of(pixel)).copied().unwrap_or(false);
        both += usize::from(map && *shape);
        either += usize::from(map || *shape);
    }
    both as f64 / either.max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATCHES: usize = (SIDE / PATCH) * (SIDE / PATCH);

    #[test]
    fn a_map_of_the_shape_itself_overlaps_it_wholly() {
        // The patch in the second row and third column.
        let place = SIDE / PATCH + 2;
        let mask: Vec<bool> = (0..SIDE * SIDE)
            .map(|pixel| pixel / SIDE / PATCH == 1 && pixel % SIDE / PATCH == 2)
            .collect();
        let mut attention = vec![0.001; PATCHES];
        attention[place] = 1.0;
        assert_eq!(overlap(&attention, &mask), 1.0);
        // A second patch of the same weight is as much besides.
        attention[0] = 1.0;
        assert_eq!(overlap(&attention, &mask), 0.5);
        let none = vec![false; SIDE * SIDE];
        assert_eq!(overlap(&attention, &none), 0.0);
    }

    #[test]
    fn neighbours_vote() {
        let unit = |angle: f64| vec![angle.cos(), angle.sin()];
        // Eleven of shape 1 nearby, and as many of shape 2 across.
        let known: Vec<(usize, Vec<f64>)> = (0..11)
            .flat_map(|i| {
                let by = 0.01 * i as f64;
                [(1, unit(by)), (2, unit(3.0 + by))]
            })
            .collect();
        let asked = [(1, unit(0.05)), (2, unit(3.05)), (1, unit(3.0))];
        let found = percent_named(&known, &asked);
        assert!((found - 200.0 / 3.0).abs() < 1e-9);
    }

    #[test]
    fn both_models_are_valid_and_crate_has_the_smaller_blocks() {
        let usual = usual(32);
        usual.validate().unwrap();
        let own = white_box(&usual, None);
        own.validate().unwrap();
        let parameters = |spec: ModelSpec| {
            let model = Model::initialised(spec, 0, DType::F32, &Device::Cpu).unwrap();
            super::super::in_blocks(&model)
        };
        assert!(10 * parameters(own) < 4 * parameters(usual));
    }
}
