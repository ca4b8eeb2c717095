//! The relevancy of attention maps on images of two glyphs, of which either is asked for.
//!
//! The paper's figures are of ViT-B/16 on ImageNet. Here a vision transformer is trained to name
//! the one glyph of an image; with two glyphs on it, a method that knows of classes can say which
//! is which. Pixels are removed, and heat is compared with the glyph's square, by the paper's own
//! measures.

use super::glyphs::{self, Alphabet, CANVAS, Course, PATCH, Scene};
use super::{after_training, difference, keep, mean};
use crate::error::engine;
use crate::{Claim, Plot, Reproduction, Result, Scale, Series, Setting, Verdict};
use lapidary_explain::faithfulness::image::{
    Curve, Example, First, Segmentation, enlarge, perturbation,
};
use lapidary_explain::{
    Explanation, Options, Question, Relevancy, Target, chefer, explainer, full_lrp, patch_heat,
    relevancy_of_batch,
};
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::{Input, Model};
use lapidary_train::generator;
use std::collections::BTreeMap;

/// The method, and what it is compared with.
const METHODS: [&str; 6] = [
    CHEFER,
    ROLLOUT,
    RAW,
    "attention-gradcam",
    "partial-lrp",
    "full-lrp",
];
const CHEFER: &str = "chefer";
const ROLLOUT: &str = "attention-rollout";
const RAW: &str = "raw-attention";

/// As in the paper's evaluations, block 0 takes no part.
const START_LAYER: usize = 1;

struct Size {
    course: Course,
    /// Images of one glyph, and of two.
    tests: usize,
}

impl Size {
    fn of(scale: Scale) -> Self {
        let course = Course {
            width: 64,
            heads: 4,
            blocks: 6,
            steps: 4700,
            batch: 64,
            rate: 1e-3,
        };
        match scale {
            Scale::Smoke => Self {
                course: Course {
                    width: 16,
                    heads: 2,
                    blocks: 2,
                    steps: 2,
                    batch: 4,
                    ..course
                },
                tests: 4,
            },
            Scale::Small => Self {
                course: Course {
                    width: 40,
                    blocks: 4,
                    steps: 900,
                    batch: 32,
                    rate: 2e-3,
                    ..course
                },
                tests: 60,
            },
            Scale::Full => Self { course, tests: 500 },
        }
    }
}

/// What one method achieves.
#[derive(Default)]
struct Measured {
    /// Heat in the asked glyph's square, of all heat.
    mass: Vec<f64>,
    /// Heat in the asked glyph's square, of that in both.
    of_both: Vec<f64>,
    segmentation: Segmentation,
    positive: Option<Curve>,
    negative: Option<Curve>,
}

impl Measured {
    fn area(&self, first: First) -> f64 {
        let curve = match first {
            First::Highest => &self.positive,
            First::Lowest => &self.negative,
        };
        curve.as_ref().map_or(f64::NAN, Curve::area)
    }

    fn mass(&self) -> f64 {
        mean(self.mass.iter().copied())
    }
}

/// Runs the experiment.
pub fn run(setting: &Setting) -> Result<Reproduction> {
    let size = Size::of(setting.scale);
    let alphabet = Alphabet::new(setting.seed);
    let model = glyphs::train(&alphabet, &size.course, setting.seed)?;
    keep(setting, "glyphs", &model, &[])?;
    let mut generator = generator(setting.seed ^ 0x7e57);
    let mut scenes = |count: usize| -> Vec<Scene> {
        (0..size.tests)
            .map(|_| glyphs::scene(&alphabet, count, &mut generator))
            .collect()
    };
    let (singles, doubles) = (scenes(1), scenes(2));
    let accuracy = glyphs::accuracy(&model, &singles)?;
    let mut measured = BTreeMap::new();
    for method in METHODS {
        measured.insert(method, measure(method, &model, &singles, &doubles)?);
    }
    let course = &size.course;
    let mut claims = vec![trained(setting.scale, accuracy)];
    claims.extend(compared(setting.scale, &measured));
    claims.extend(exact(&model, &doubles)?);
    Ok(Reproduction {
        setting: format!(
            "vision transformer of {} blocks, width {}, {} heads on 32×32 images in patches of 4, \
             after {} steps of {} new images of one of 10 glyphs on noise; {} images of one glyph \
             (perturbation) and {} of two (mass and segmentation, either glyph asked for); heat \
             from block {START_LAYER} on; one seed",
            course.blocks,
            course.width,
            course.heads,
            course.steps,
            course.batch,
            size.tests,
            size.tests,
        ),
        claims,
        plots: plots(&measured),
        ..Reproduction::default()
    })
}

/// The heat of every pixel for each class, from one call of the method.
fn heats(method: &str, model: &Model, scene: &Scene, classes: &[usize]) -> Result<Vec<Vec<f64>>> {
    let input = glyphs::input(&[&scene.image])?;
    let question = Question::new(model, &input);
    let targets: Vec<Target> = classes.iter().map(|class| Target::class(*class)).collect();
    let options = Options {
        start_layer: START_LAYER,
        ..Options::default()
    };
    let side = CANVAS / PATCH;
    let heat = |explanation: Explanation| -> Result<Vec<f64>> {
        let patches = patch_heat(model, &explanation.scores)?;
        // Relevance may be negative; only what speaks for the class is heat.
        let patches: Vec<f64> = patches.into_iter().map(|heat| heat.max(0.0)).collect();
        Ok(enlarge(&patches, side, side, PATCH)?)
    };
    let explanations = (explainer(method)?.explain)(&question, &targets, &options)?;
    explanations.into_iter().map(heat).collect()
}

fn measure(
    method: &'static str,
    model: &Model,
    singles: &[Scene],
    doubles: &[Scene],
) -> Result<Measured> {
    let mut measured = Measured::default();
    for scene in doubles {
        let classes: Vec<usize> = scene.glyphs.iter().map(|placed| placed.class).collect();
        let heats = heats(method, model, scene, &classes)?;
        for (asked, heat) in heats.iter().enumerate() {
            let inside: Vec<f64> = scene
                .glyphs
                .iter()
                .map(|placed| {
                    let pixels = heat.iter().zip(placed.mask());
                    let inside = pixels.filter(|(_, inside)| *inside);
                    inside.map(|(heat, _)| heat).sum()
                })
                .collect();
            let own = inside.get(asked).copied().unwrap_or(0.0);
            let share = |of: f64| if of > 0.0 { own / of } else { 0.0 };
            measured.mass.push(share(heat.iter().sum()));
            measured.of_both.push(share(inside.iter().sum()));
            if let Some(placed) = scene.glyphs.get(asked) {
                measured.segmentation.add(heat, &placed.mask())?;
            }
        }
    }
    let mut single_heats = Vec::with_capacity(singles.len());
    for scene in singles {
        let classes: Vec<usize> = scene.glyphs.iter().map(|placed| placed.class).collect();
        single_heats.extend(heats(method, model, scene, &classes)?);
    }
    let examples: Vec<Example<'_>> = singles
        .iter()
        .zip(&single_heats)
        .map(|(scene, heat)| Example {
            image: &scene.image,
            heat,
            class: scene.glyphs.first().map_or(0, |placed| placed.class),
        })
        .collect();
    let curve = |first| {
        perturbation(&examples, first, |images| {
            glyphs::probabilities(model, images)
        })
    };
    measured.positive = Some(curve(First::Highest)?);
    measured.negative = Some(curve(First::Lowest)?);
    Ok(measured)
}

fn trained(scale: Scale, accuracy: f64) -> Claim {
    Claim::new(
        "The model names the glyph of over 95 % of new images",
        "not of the paper: what the rest stands on",
        format!("{:.1} %", 100.0 * accuracy),
        after_training(scale, accuracy > 0.95),
    )
}

/// The paper's comparisons.
fn compared(scale: Scale, measured: &BTreeMap<&'static str, Measured>) -> Vec<Claim> {
    let listed = |of: &dyn Fn(&Measured) -> f64| -> String {
        let one = |method: &&str| {
            let value = measured.get(*method).map_or(f64::NAN, of);
            format!("{method} {value:.3}")
        };
        METHODS.iter().map(one).collect::<Vec<_>>().join(", ")
    };
    let of =
        |method: &str, of: &dyn Fn(&Measured) -> f64| measured.get(method).map_or(f64::NAN, of);
    let mass = |m: &Measured| m.mass();
    let of_both = |m: &Measured| mean(m.of_both.iter().copied());
    let positive = |m: &Measured| m.area(First::Highest);
    let negative = |m: &Measured| m.area(First::Lowest);
    let overlap = |m: &Measured| m.segmentation.mean_intersection_over_union();
    let pixels = |m: &Measured| m.segmentation.pixel_accuracy();
    let precision = |m: &Measured| m.segmentation.mean_average_precision();
    let best_of = |measure: &dyn Fn(&Measured) -> f64| of(ROLLOUT, measure).max(of(RAW, measure));
    vec![
        Claim::new(
            "With two glyphs on an image, at least 0.6 of the heat lies in the square of the one \
             asked for, and at most 0.45 of a rollout's",
            "by eye: maps of cat and dog on one photograph",
            listed(&mass),
            after_training(
                scale,
                of(CHEFER, &mass) >= 0.6 && of(ROLLOUT, &mass) <= 0.45,
            ),
        )
        .noted(format!("of the heat in both squares: {}", listed(&of_both))),
        Claim::new(
            "Removing the hottest pixels first costs more accuracy than by rollout and raw \
             attention (area under the curve, lower is better)",
            "17.03 % against 20.05 % and 23.99 %",
            listed(&positive),
            after_training(
                scale,
                of(CHEFER, &positive) < of(ROLLOUT, &positive)
                    && of(CHEFER, &positive) < of(RAW, &positive),
            ),
        ),
        Claim::new(
            "Removing the coldest pixels first costs less accuracy than by rollout and raw \
             attention (area under the curve, higher is better)",
            "54.16 % against 53.1 % (rollout)",
            listed(&negative),
            after_training(scale, of(CHEFER, &negative) > best_of(&negative)),
        ),
        Claim::new(
            "As a segmentation it gains at least 5 points of mean intersection over union on \
             rollout",
            "61.95 against 55.42",
            listed(&overlap),
            after_training(scale, of(CHEFER, &overlap) >= of(ROLLOUT, &overlap) + 0.05),
        ),
        Claim::new(
            "It has the better pixel accuracy and average precision of the two",
            "79.70 against 73.54, 86.03 against 84.76",
            format!(
                "accuracy: {}; precision: {}",
                listed(&pixels),
                listed(&precision)
            ),
            after_training(
                scale,
                of(CHEFER, &pixels) > of(ROLLOUT, &pixels)
                    && of(CHEFER, &precision) > of(ROLLOUT, &precision),
            ),
        ),
    ]
}

/// What holds for any model, checked at double precision.
fn exact(model: &Model, doubles: &[Scene]) -> Result<Vec<Claim>> {
    let mut parameters = BTreeMap::new();
    for (name, tensor) in model.parameters() {
        parameters.insert(name.clone(), engine(tensor.to_dtype(DType::F64))?);
    }
    let model = Model::new(model.spec().clone(), &mut parameters)?;
    let scenes: Vec<&Scene> = doubles.iter().take(4).collect();
    let images: Vec<&[f32]> = scenes.iter().map(|scene| scene.image.as_slice()).collect();
    let Input::Pixels(pixels) = glyphs::input(&images)? else {
        return Ok(Vec::new());
    };
    let pixels = engine(pixels.to_dtype(DType::F64))?;
    let class = |scene: &Scene, index: usize| {
        Target::class(scene.glyphs.get(index).map_or(0, |placed| placed.class))
    };
    let targets: Vec<Target> = scenes.iter().map(|scene| class(scene, 0)).collect();
    let batch = Input::Pixels(pixels.clone());
    let together = relevancy_of_batch(
        &Question::new(&model, &batch),
        &targets,
        Relevancy::default(),
    )?;
    let (mut batch_error, mut drift, mut distances) = (0f64, 0f64, Vec::new());
    let mut worst = String::new();
    for (index, scene) in scenes.iter().enumerate() {
        let one = Input::Pixels(engine(pixels.narrow(0, index, 1))?);
        let question = Question::new(&model, &one);
        let alone = chefer(&model, &one, None, class(scene, 0), 0)?;
        let other = chefer(&model, &one, None, class(scene, 1), 0)?;
        if let Some(together) = together.get(index) {
            batch_error = batch_error.max(distance(&together.scores, &alone.scores)?);
        }
        distances.push(distance(&other.scores, &alone.scores)?);
        for leak in full_lrp(&question, class(scene, 0))?.account.leaks {
            if leak.lost().abs() >= drift {
                drift = leak.lost().abs();
                worst = leak.part.clone();
            }
        }
    }
    let least = distances.iter().copied().fold(f64::INFINITY, f64::min);
    Ok(vec![
        Claim::new(
            "A batch of images gives what each gives alone",
            "not so in the authors' code, which balances sums over the batch",
            format!("largest relative difference {batch_error:.1e}"),
            Verdict::of(batch_error < 1e-9),
        ),
        Claim::new(
            "The relevance that the outputs start with, 1, is there at every boundary of layers",
            "stated",
            format!("largest drift of any part {drift:.1e} ({worst})"),
            Verdict::of(drift < 1e-3),
        ),
        Claim::new(
            "The maps of two classes differ",
            "shown",
            format!("least relative difference {least:.2}"),
            Verdict::of(least > 1e-6),
        ),
    ])
}

fn distance(a: &[f64], b: &[f64]) -> Result<f64> {
    let tensor = |values: &[f64]| engine(Tensor::from_slice(values, values.len(), &Device::Cpu));
    difference(&tensor(a)?, &tensor(b)?)
}

fn plots(measured: &BTreeMap<&'static str, Measured>) -> Vec<Plot> {
    let plot = |first: First, title: &str| {
        let line = |method: &&str| {
            let found = measured.get(*method)?;
            let curve = match first {
                First::Highest => found.positive.as_ref()?,
                First::Lowest => found.negative.as_ref()?,
            };
            let points = curve
                .fractions
                .iter()
                .copied()
                .zip(curve.values.iter().copied());
            Some(Series {
                name: (*method).to_owned(),
                points: points.collect(),
            })
        };
        Plot {
            title: title.to_owned(),
            x: "share of pixels set to 0".to_owned(),
            y: "accuracy".to_owned(),
            series: METHODS.iter().filter_map(line).collect(),
        }
    };
    vec![
        plot(First::Highest, "Hottest pixels first"),
        plot(First::Lowest, "Coldest pixels first"),
    ]
}
