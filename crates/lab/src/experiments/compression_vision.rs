//! The survey's vision side: a recipe for text on a small vision Transformer.

use super::glyphs::{self, Alphabet, Course, Scene};
use super::mean;
use crate::error::engine;
use crate::{Claim, Error, Result, Scale};
use lapidary_compress::quality::{accuracy, agreement_rounded};
use lapidary_compress::{
    ActivationRange, ActivationSettings, Calibration, CalibrationData, CalibrationOptions, Content,
    Example, HealData, HealSettings, Recipe, RoundedActivations, Settings, Target, heal,
};
use lapidary_model::{Input, Model};
use lapidary_train::generator;

/// Images in a pass that only measures.
const BATCH: usize = 32;

/// Shares of images that are named right, stage by stage.
pub(super) struct Seen {
    whole: f64,
    cut: f64,
    healed: f64,
    rounded: f64,
    /// Of images, those that the last stage with activations of 8 bits names as without.
    same: f64,
    /// The same with softmax, GELU and norms by integers.
    integers: f64,
}

/// How the classifier is trained, images to calibrate and heal on, to test on, and steps of healing.
fn size(scale: Scale) -> (Course, usize, usize, u64) {
    let course = Course {
        width: 64,
        heads: 4,
        blocks: 4,
        steps: 600,
        batch: 32,
        rate: 2e-3,
    };
    match scale {
        Scale::Smoke => {
            let course = Course {
                width: 32,
                blocks: 2,
                steps: 2,
                batch: 4,
                ..course
            };
            (course, 8, 4, 2)
        }
        _ => (course, 256, 200, 100),
    }
}

/// A quarter of the features of feed-forward parts, distillation, 4 bits.
pub(super) fn run(scale: Scale, seed: u64) -> Result<Seen> {
    let (course, count, tests, steps) = size(scale);
    let alphabet = Alphabet::new(seed);
    let original = glyphs::train(&alphabet, &course, seed)?;
    let mut random = generator(seed ^ 0x0c0d);
    let mut images = |count: usize| -> Result<CalibrationData> {
        let scenes = (0..count).map(|_| glyphs::scene(&alphabet, 1, &mut random));
        let examples = scenes.map(|scene| example(&scene)).collect::<Result<_>>()?;
        Ok(CalibrationData::new(examples)?)
    };
    let (data, held_out) = (images(count)?, images(tests)?);
    let settings = Settings::default();
    let last = |recipe: &str, ratio: &str, model: &Model| -> Result<Option<Model>> {
        let done = Recipe::of(recipe, ratio)?.run(model, Some(&data), &settings)?;
        Ok(done
            .into_iter()
            .next_back()
            .map(|done| done.compressed.model))
    };
    let right = |model: &Model| -> Result<f64> { Ok(accuracy(model, &held_out, BATCH)?) };
    let cut = last("channel-magnitude", "0.25", &original)?;
    let cut = cut.as_ref().unwrap_or(&original);
    let learned = HealData {
        training: &data,
        validation: &data,
        teacher: Some(&original),
    };
    let told = HealSettings {
        steps,
        rate: 1e-3,
        distil: 0.5,
        hints: 0.5,
        seed,
        ..HealSettings::default()
    };
    let (healed, _) = heal(cut, &learned, &told, |_, _| ())?;
    // A method that rounds has no ratio: the text is not read.
    let rounded = last("gptq", "0.25", &healed)?;
    let rounded = rounded.as_ref().unwrap_or(&healed);
    Ok(Seen {
        whole: right(&original)?,
        cut: right(cut)?,
        healed: right(&healed)?,
        rounded: right(rounded)?,
        same: same(rounded, &data, &held_out, false)?,
        integers: same(rounded, &data, &held_out, true)?,
    })
}

/// A scene with the class of its first glyph.
pub(super) fn example(scene: &Scene) -> Result<Example> {
    let Input::Pixels(pixels) = glyphs::input(&[&scene.image])? else {
        return Err(Error::Experiment(
            "the input of a scene is no image".to_owned(),
        ));
    };
    let class = scene.glyphs.first().map(|placed| placed.class as u32);
    Ok(Example {
        content: Content::Pixels(engine(pixels.squeeze(0))?),
        target: class.map_or(Target::None, Target::Label),
    })
}

/// How often a model with activations of 8 bits, one step for each site, says what it says without; with
/// `functions`, softmax, GELU and norms are computed by integers too.
fn same(
    model: &Model,
    data: &CalibrationData,
    held_out: &CalibrationData,
    functions: bool,
) -> Result<f64> {
    let settings = Settings {
        activations: ActivationSettings {
            range: Some(ActivationRange::PerTensor),
            bits: 8,
            functions,
        },
        ..Settings::default()
    };
    let requirements = RoundedActivations::requirements(model, &settings)?;
    let options = CalibrationOptions::default();
    let calibration = Calibration::collect(model, data, &requirements, options)?;
    let by = RoundedActivations::new(model, &settings, Some(&calibration))?;
    Ok(match by {
        Some(by) => agreement_rounded(model, model, held_out, BATCH, &by)?.top1,
        None => 1.0,
    })
}

/// What the recipe cost, the mean over runs.
pub(super) fn claim(scale: Scale, runs: &[&Seen]) -> Claim {
    let share = |of: fn(&Seen) -> f64| mean(runs.iter().map(|seen| of(seen)));
    let (whole, rounded) = (share(|seen| seen.whole), share(|seen| seen.rounded));
    Claim::new(
        "on a vision Transformer, a quarter of the features, distillation and 4 bits cost at most 5 points",
        "the same families for vision",
        format!(
            "right on held-out images {:.1} % whole, {:.1} % cut, {:.1} % after distillation, {:.1} % in 4 bits; with \
             activations of 8 bits {:.1} % of the answers are the same, and {:.1} % with softmax, GELU and norms by \
             integers as well",
            100.0 * whole,
            100.0 * share(|seen| seen.cut),
            100.0 * share(|seen| seen.healed),
            100.0 * rounded,
            100.0 * share(|seen| seen.same),
            100.0 * share(|seen| seen.integers),
        ),
        super::after_learning(scale, whole >= 0.8, whole - rounded <= 0.05),
    )
}
