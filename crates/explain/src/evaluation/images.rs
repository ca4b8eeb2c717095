//! Methods on images whose evidence is a region that is known.

use std::time::Instant;

use super::run::softmax;
use crate::error::engine;
use crate::explainer::Explainer;
use crate::faithfulness::Summary;
use crate::faithfulness::image::{
    Example, First, Segmentation, deletion_and_insertion, enlarge, perturbation,
};
use crate::report::{Report, Table};
use crate::{Error, Options, Question, Result, Target, Unit};
use lapidary_kernels::{DType, Tensor};
use lapidary_model::{Input, InputSpec, Model, Pass, PatchInput};
use serde::Serialize;

/// An image and the region that decides its class.
#[derive(Clone, Debug, PartialEq)]
pub struct ImageExample {
    /// `channels · height · width`, not yet normalised.
    pub image: Vec<f32>,
    /// The class that is asked for.
    pub class: usize,
    /// `height · width`: where the evidence lies.
    pub mask: Vec<bool>,
}

/// What one method is worth on images.
#[derive(Clone, Debug, Default, Serialize)]
pub struct ImageRow {
    /// Its name.
    pub method: String,
    /// Share of the positive heat that lies in the region.
    pub mass: Summary,
    /// Share of the pixels that are rightly inside or outside, with a threshold at the mean.
    pub pixel_accuracy: f64,
    /// Mean intersection over union of region and rest.
    pub intersection_over_union: f64,
    /// Mean average precision of both.
    pub average_precision: f64,
    /// Area under the accuracy as the hottest pixels are removed; lower is better.
    pub positive_perturbation: f64,
    /// Area under the accuracy as the coldest pixels are removed; higher is better.
    pub negative_perturbation: f64,
    /// Area under the probability as the hottest pixels are removed; lower is better.
    pub deletion: f64,
    /// Area under the probability as the hottest pixels are put in; higher is better.
    pub insertion: f64,
    /// Seconds for one image.
    pub seconds: Summary,
    /// Why it could not be used, if so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub refused: Option<String>,
}

/// Every method over a set of images.
#[derive(Clone, Debug, Default, Serialize)]
pub struct ImageEvaluation {
    /// Images.
    pub examples: usize,
    /// Those whose class the model scores highest, which alone are scored.
    pub right: usize,
    /// In the order of the methods asked for; those that score patches.
    pub rows: Vec<ImageRow>,
}

/// Images run at one time.
const AT_ONCE: usize = 64;

/// Scores `methods` on the images that `model`, a classifier of patches, gets right. `input`
/// normalises images as the model wants them.
///
/// # Errors
/// When the model reads no patches, or fails on an image. A method that is not defined for it is
/// a row that says so.
pub fn evaluate_images(
    model: &Model,
    examples: &[ImageExample],
    input: &dyn Fn(&[Vec<f32>]) -> Result<Input>,
    methods: &[&Explainer],
    options: &Options,
) -> Result<ImageEvaluation> {
    let InputSpec::Patches(patches) = &model.spec().input else {
        return Err(Error::invalid("input of the model", "tokens", "patches"));
    };
    let judge = Judge {
        model,
        patches,
        input,
        options,
    };
    let images: Vec<Vec<f32>> = examples.iter().map(|one| one.image.clone()).collect();
    let said = judge.probabilities(&images)?;
    let is_right = |(example, said): &(&ImageExample, Vec<f64>)| {
        crate::faithfulness::masking::most_likely(said) == example.class
    };
    let right = examples.iter().zip(said).filter(is_right);
    let right: Vec<&ImageExample> = right.map(|(example, _)| example).collect();
    let over_patches = methods.iter().filter(|method| method.unit == Unit::Token);
    let rows = over_patches.map(|method| {
        judge.row(method, &right).unwrap_or_else(|error| ImageRow {
            method: method.name.to_owned(),
            refused: Some(error.to_string()),
            ..ImageRow::default()
        })
    });
    Ok(ImageEvaluation {
        examples: examples.len(),
        right: right.len(),
        rows: rows.collect(),
    })
}

struct Judge<'a> {
    model: &'a Model,
    patches: &'a PatchInput,
    input: &'a dyn Fn(&[Vec<f32>]) -> Result<Input>,
    options: &'a Options,
}

impl Judge<'_> {
    fn row(&self, method: &Explainer, examples: &[&ImageExample]) -> Result<ImageRow> {
        let (mut heats, mut seconds, mut masses) = (Vec::new(), Vec::new(), Vec::new());
        let mut segmentation = Segmentation::new();
        for example in examples {
            let started = Instant::now();
            let heat = self.heat(method, example)?;
            seconds.push(started.elapsed().as_secs_f64());
            masses.push(mass(&heat, &example.mask));
            segmentation.add(&heat, &example.mask)?;
            heats.push(heat);
        }
        let scored: Vec<Example<'_>> = examples
            .iter()
            .zip(&heats)
            .map(|(example, heat)| Example {
                image: &example.image,
                heat,
                class: example.class,
            })
            .collect();
        let predict = |images: &[Vec<f32>]| self.probabilities(images);
        let (deletion, insertion) = deletion_and_insertion(&scored, predict)?;
        Ok(ImageRow {
            method: method.name.to_owned(),
            mass: Summary::of(masses),
            pixel_accuracy: segmentation.pixel_accuracy(),
            intersection_over_union: segmentation.mean_intersection_over_union(),
            average_precision: segmentation.mean_average_precision(),
            positive_perturbation: perturbation(&scored, First::Highest, predict)?.area(),
            negative_perturbation: perturbation(&scored, First::Lowest, predict)?.area(),
            deletion: deletion.area(),
            insertion: insertion.area(),
            seconds: Summary::of(seconds),
            refused: None,
        })
    }

    /// Scores of the patches, enlarged to pixels.
    fn heat(&self, method: &Explainer, example: &ImageExample) -> Result<Vec<f64>> {
        let input = (self.input)(std::slice::from_ref(&example.image))?;
        let question = Question::new(self.model, &input);
        let target = Target::class(example.class);
        let scores = method.explain(&question, target, self.options)?.scores;
        let [rows, columns] = self
            .patches
            .image
            .map(|size| size / self.patches.patch.max(1));
        let first = self.patches.class_tokens;
        let patches = scores.get(first..first + rows * columns);
        let patches = patches.ok_or_else(|| {
            let expected = format!("{}, one for each token", first + rows * columns);
            Error::invalid("number of scores", scores.len(), expected)
        })?;
        enlarge(patches, rows, columns, self.patches.patch)
    }

    fn probabilities(&self, images: &[Vec<f32>]) -> Result<Vec<Vec<f64>>> {
        let mut all = Vec::with_capacity(images.len());
        for chunk in images.chunks(AT_ONCE) {
            let output = self.model.forward(&(self.input)(chunk)?, Pass::default())?;
            let logits: Tensor = output.into_logits()?.into_value();
            let logits = engine(engine(logits.to_dtype(DType::F64))?.to_vec2::<f64>())?;
            all.extend(logits.iter().map(|scores| softmax(scores)));
        }
        Ok(all)
    }
}

/// Share of the positive heat inside the region; zero where there is none.
fn mass(heat: &[f64], mask: &[bool]) -> f64 {
    let total: f64 = heat.iter().map(|heat| heat.max(0.0)).sum();
    let inside = heat.iter().zip(mask).filter(|(_, inside)| **inside);
    let inside: f64 = inside.map(|(heat, _)| heat.max(0.0)).sum();
    if total > 0.0 { inside / total } else { 0.0 }
}

impl ImageEvaluation {
    /// The rows as a table.
    pub fn report(&self, title: &str) -> Report {
        let mut table = Table::new(
            "Heat maps against the known region, and against the model",
            &[
                "method",
                "mass ↑",
                "pixel accuracy ↑",
                "mIoU ↑",
                "mAP ↑",
                "positive ↓",
                "negative ↑",
                "deletion ↓",
                "insertion ↑",
                "seconds",
            ],
        );
        let mut notes = vec![format!(
            "{} images, of which the model gets {} right; those are scored; ± is a 95 % interval",
            self.examples, self.right
        )];
        for row in &self.rows {
            if let Some(reason) = &row.refused {
                notes.push(format!("{} was left out: {reason}", row.method));
                continue;
            }
            table.push([
                row.method.as_str().into(),
                format!("{:.3}", row.mass).into(),
                row.pixel_accuracy.into(),
                row.intersection_over_union.into(),
                row.average_precision.into(),
                row.positive_perturbation.into(),
                row.negative_perturbation.into(),
                row.deletion.into(),
                row.insertion.into(),
                format!("{:.2e}", row.seconds.mean).into(),
            ]);
        }
        Report {
            title: title.to_owned(),
            notes,
            tables: vec![table],
            ..Report::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mass_counts_what_is_positive() {
        let mask = [true, false, true, false];
        assert_eq!(mass(&[3.0, 1.0, -5.0, 0.0], &mask), 0.75);
        assert_eq!(mass(&[0.0, -1.0, 0.0, 0.0], &mask), 0.0);
    }
}
