//! Self-distillation without labels: what a model of CRATE's blocks learns of pictures that nobody named, beside a
//! Transformer of the same width, heads and blocks.

mod claims;

use super::audit::{Audit, of_input};
use super::{BLOCKS, HEADS, Job, Size, Trained, white_box};
use crate::error::engine;
use crate::experiments::attributes::{self, Draw, Picture, SHAPE, Scene};
use crate::experiments::classifier::Narrow;
use crate::experiments::probe::{Row, percent_by_neighbours, percent_by_ridge};
use crate::experiments::{mean, mini_clip, numbers};
use crate::{Claim, Error, Plot, Result, Setting};
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
/// Pictures that what is behind the blocks is measured on.
const AUDITED: usize = 32;
/// The teacher's temperature, and the one at which all teachers are asked what they tell.
const TEMPERATURE: f64 = 0.04;

const OWN: &str = "CRATE";
const USUAL: &str = "Transformer";
const UNCENTRED: &str = "CRATE without a centre";
const BLUNT: &str = "CRATE without sharpening";

/// What is asked of a trained teacher.
pub(super) struct Found {
    /// After training and before.
    trained: Told,
    untrained: Told,
    /// Nats that an output tells of its picture at [`TEMPERATURE`].
    information: f64,
    /// Nats of a picture's outputs there.
    entropy: f64,
    /// What is behind the blocks before training, in its middle and after.
    audits: [Audit; 3],
}

/// What a teacher's attention and features tell.
struct Told {
    /// Mean overlap of the best head's map with the shape.
    overlap: f64,
    /// Percent of shapes that are named by neighbours.
    neighbours: f64,
    /// Percent of shapes that are named by a linear map of the features.
    probe: f64,
}

/// What was found in each way, by seed.
struct All(Vec<(&'static str, Found)>);

impl All {
    fn of(&self, name: &str) -> impl Iterator<Item = &Found> {
        let seeds = self.0.iter().filter(move |(known, _)| *known == name);
        seeds.map(|(_, found)| found)
    }

    fn mean(&self, name: &str, of: fn(&Found) -> f64) -> f64 {
        mean(self.of(name).map(of))
    }
}

/// A training for each way and seed.
pub(super) fn jobs<'a>(setting: &Setting, size: &'a Size) -> Vec<(String, Job<'a>)> {
    let uncentred = SelfDistillationSpec {
        // It stays where it begins, at zero.
        centre_momentum: 1.0,
        ..objective(size)
    };
    let ways = [
        (OWN, true, objective(size)),
        (USUAL, false, objective(size)),
        (UNCENTRED, true, uncentred),
        (BLUNT, true, blunt(size)),
    ];
    let mut jobs = Vec::new();
    for (name, own, objective) in ways {
        for seed in (setting.seed..).take(size.seeds as usize) {
            let objective = objective.clone();
            let job = move || -> Result<Trained> {
                let found = distilled(size, own, objective, seed)?;
                Ok(Trained::Teacher(name, Box::new(found)))
            };
            let name = format!("self-distillation: {name}, seed {seed}");
            jobs.push((name, Box::new(job) as Job<'a>));
        }
    }
    jobs
}

/// Measures what was learned.
pub(super) fn claimed(
    setting: &Setting,
    size: &Size,
    found: Vec<(&'static str, Found)>,
) -> (Vec<Claim>, Vec<Plot>) {
    let found = All(found);
    let note = format!(
        "{} pictures of {SIDE} by {SIDE} pixels with one shape before a texture, patches of {PATCH} by {PATCH}, {} \
         steps of {BATCH} pictures in {} views, small ones half as high and wide; heads and features are the teacher's; \
         pictures that are asked about have \
         colours, places and textures together that no other has",
        size.pictures,
        size.distillation_steps,
        objective(size).crops.count()
    );
    let mut all = vec![
        claims::of_collapse(setting, size, &found).noted(note.clone()),
        claims::of_maps(setting, &found),
    ];
    all.extend(claims::of_features(setting, &found).map(|claim| claim.noted(note.clone())));
    let (more, plots) = claims::of_blocks(setting, &found);
    all.extend(more);
    (all, plots.into())
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
        teacher_temperature: TEMPERATURE,
        first_teacher_temperature: TEMPERATURE,
        crops: CropSpec {
            locals: 2,
            local: [0.15, 0.4],
            local_size: Some([SIDE / 2; 2]),
            ..CropSpec::default()
        },
        ..SelfDistillationSpec::default()
    }
}

/// A teacher as blunt as its student.
fn blunt(size: &Size) -> SelfDistillationSpec {
    let sharp = objective(size);
    SelfDistillationSpec {
        teacher_temperature: sharp.student_temperature,
        first_teacher_temperature: sharp.student_temperature,
        ..sharp
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
            around: None,
            norm: None,
            deviation: PatchInput::DEVIATION,
            position: Default::default(),
            mask_token: false,
            resized: true,
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
            dropout_by_feature: false,
            coding_step: None,
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
        initial: Default::default(),
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

/// Whether pictures of a scene are held out: one in five of all that there can be around a shape, so that what is asked
/// about has no twin among what is known.
fn is_held_out(scene: &Scene) -> bool {
    let [colour, _, place, texture] = scene.values;
    (colour + place + texture).is_multiple_of(5)
}

/// Pictures to train on, or held out.
fn drawn(count: usize, held_out: bool, seed: u64) -> Vec<(Scene, Picture)> {
    let mut random = generator(seed);
    let draw = Draw::balanced();
    let mut pictures = Vec::with_capacity(count);
    while pictures.len() < count {
        let scene = draw.scene(&mut random);
        if is_held_out(&scene) == held_out {
            pictures.push((scene, attributes::draw(scene, SIDE, &mut random)));
        }
    }
    pictures
}

fn distilled(size: &Size, own: bool, objective: SelfDistillationSpec, seed: u64) -> Result<Found> {
    // Apart in the upper half, so that no other seed has either.
    let training = drawn(size.pictures, false, seed ^ (0xd1500 << 32));
    let held_out = drawn(size.pictures / 4, true, seed ^ (0xd1501 << 32));
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
    let audited = input(held_out.get(..AUDITED).unwrap_or(&held_out))?;
    let until = |distiller: &mut Distiller, steps: u64| -> Result<(Model, Audit)> {
        while distiller.steps_done() < steps {
            distiller.step()?;
        }
        let teacher = distiller.finished()?;
        let audit = of_input(&teacher, &audited, None)?;
        Ok((teacher, audit))
    };
    let (untrained, before) = until(&mut distiller, 0)?;
    let (_, middle) = until(&mut distiller, size.distillation_steps / 2)?;
    let (trained, after) = until(&mut distiller, size.distillation_steps)?;
    let spread = distiller.spread_at(TEMPERATURE)?;
    Ok(Found {
        trained: told(&trained, &training, &held_out)?,
        untrained: told(&untrained, &training, &held_out)?,
        information: spread.information(),
        entropy: spread.entropy,
        audits: [before, middle, after],
    })
}

fn told(
    model: &Model,
    training: &[(Scene, Picture)],
    held_out: &[(Scene, Picture)],
) -> Result<Told> {
    let (known, asked) = (features(model, training)?, features(model, held_out)?);
    Ok(Told {
        overlap: mean(overlaps(model, held_out)?),
        neighbours: percent_by_neighbours(&known, &asked, SHAPES, NEIGHBOURS),
        probe: percent_by_ridge(&known, &asked, SHAPES)?,
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

/// The shape of each picture and its features.
fn features(model: &Model, pictures: &[(Scene, Picture)]) -> Result<Vec<Row>> {
    let mut all = Vec::new();
    for chunk in pictures.chunks(AT_ONCE) {
        let output = model.forward(&input(chunk)?, Pass::default())?;
        let pooled = output
            .pooled
            .ok_or_else(|| Error::Experiment("the model pools nothing".to_owned()))?;
        let rows = numbers(pooled.value())?;
        let width = (rows.len() / chunk.len()).max(1);
        for ((scene, _), row) in chunk.iter().zip(rows.chunks(width)) {
            all.push((scene.values[SHAPE], row.to_vec()));
        }
    }
    Ok(all)
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

    /// No colour, place and texture are met on both sides, and all shapes are met with each on theirs.
    #[test]
    fn what_is_held_out_has_no_twin() {
        let around = |scene: &Scene| [scene.values[0], scene.values[2], scene.values[3]];
        let [known, asked] = [(false, 200, 1), (true, 50, 2)].map(|(held_out, count, seed)| {
            let pictures = drawn(count, held_out, seed);
            assert_eq!(pictures.len(), count);
            pictures
        });
        for (scene, _) in &asked {
            assert!(
                known
                    .iter()
                    .all(|(other, _)| around(other) != around(scene))
            );
            for shape in 0..SHAPES {
                let mut other = *scene;
                other.values[SHAPE] = shape;
                assert!(is_held_out(&other));
            }
        }
        let shares = Scene::all()
            .iter()
            .filter(|scene| is_held_out(scene))
            .count();
        assert!((200..260).contains(&shares), "{shares}");
    }

    #[test]
    fn a_blunt_teacher_is_as_blunt_as_its_student() {
        let size = Size::of(crate::Scale::Smoke);
        for step in [0, 1000] {
            let found = blunt(&size).temperatures_at(step);
            assert_eq!(found.teacher, found.student);
            let sharp = objective(&size).temperatures_at(step);
            assert_eq!((sharp.teacher, sharp.student), (TEMPERATURE, found.student));
        }
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
