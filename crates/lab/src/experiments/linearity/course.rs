//! The score through training, and through a further one on other facts.

use std::collections::BTreeSet;

use crate::experiments::decoder::{self, Recipe};
use crate::experiments::depth::{BATCH, Size, Subject};
use crate::experiments::texts::Sides;
use crate::experiments::{after_training, mean};
use crate::{Claim, Plot, Result, Scale, Series};
use lapidary_explain::analyses::linearity::linearity;
use lapidary_model::Model;
use lapidary_train::language::{Corpus, Language, Mixture, Split};

/// Parts of a training behind which the score is measured, beside its end.
const PARTS: [f64; 6] = [0.02, 0.05, 0.1, 0.2, 0.4, 0.7];

/// Mean scores over blocks, held out, behind a step.
#[derive(Clone, Copy, Debug)]
pub(super) struct Point {
    step: u64,
    /// Of the stream.
    score: f64,
    /// Of what blocks add.
    added: f64,
}

impl Point {
    fn of(step: u64, model: &Model, windows: &[Vec<u32>]) -> Result<Self> {
        let found = linearity(model, windows, BATCH)?;
        Ok(Self {
            step,
            score: mean(found.iter().map(|block| block.held_out)),
            added: mean(
                found
                    .iter()
                    .filter_map(|block| block.residual_free_held_out),
            ),
        })
    }
}

/// Both trainings.
pub(super) struct Course {
    pub(super) pretraining: Vec<Point>,
    pub(super) tuning: Vec<Point>,
}

fn marks(steps: u64) -> BTreeSet<u64> {
    let marks = PARTS.map(|part| (part * steps as f64).ceil() as u64);
    marks.into_iter().filter(|mark| *mark < steps).collect()
}

/// The decoder of a size, trained, and its scores on the way.
pub(super) fn pretrained(
    text: &Sides,
    size: Size,
    seed: u64,
    windows: &[Vec<u32>],
) -> Result<(Model, Vec<Point>)> {
    let spec = decoder::spec(text.training.vocabulary(), size.width, size.blocks);
    let task = text.training.task();
    let (marks, mut points) = (marks(size.steps), Vec::new());
    let watch = |step: &lapidary_train::Step, model: &Model| {
        if marks.contains(&step.step) {
            points.push(Point::of(step.step, model, windows)?);
        }
        Ok(())
    };
    let model = decoder::train_watched(Recipe::default(), spec, task, size.steps, seed, watch)?;
    points.push(Point::of(size.steps, &model, windows)?);
    Ok((model, points))
}

/// The scores, on the text of before, while the model learns the facts of another language, which stands
/// for the fine-tuning to a task. A model of bytes reads them letter by letter.
pub(super) fn tuned(
    subject: &Subject,
    size: Size,
    seed: u64,
    windows: &[Vec<u32>],
) -> Result<Vec<Point>> {
    let facts = Mixture {
        number_agreement: 0.0,
        reflexive_agreement: 0.0,
        learned_fact: 1.0,
        context_fact: 0.0,
        name_copy: 0.0,
        brackets: 0.0,
    };
    let other = seed.wrapping_add(1);
    let corpus = Corpus::new(Language::new(other), Split::Training, facts, other)?;
    let text = subject.text.training.likewise(corpus);
    let model = &subject.model;
    let recipe = Recipe {
        peak: 1e-3,
        ..Recipe::default()
    };
    let steps = (size.steps / 3).max(1);
    let (marks, mut points) = (marks(steps), vec![Point::of(0, model, windows)?]);
    let watch = |step: &lapidary_train::Step, model: &Model| {
        if marks.contains(&step.step) {
            points.push(Point::of(step.step, model, windows)?);
        }
        Ok(())
    };
    let mut source = model.parameters().clone();
    let (spec, task) = (model.spec().clone(), text.task());
    let tuned = decoder::train_from(&mut source, recipe, spec, task, steps, other, watch)?;
    points.push(Point::of(steps, &tuned, windows)?);
    Ok(points)
}

fn ends(points: &[Point]) -> [f64; 2] {
    [points.first(), points.last()].map(|point| point.map_or(f64::NAN, |point| point.score))
}

fn listed(points: &[Point]) -> String {
    let each = points
        .iter()
        .map(|point| format!("{:.4} behind {} steps", point.score, point.step));
    each.collect::<Vec<_>>().join(", ")
}

pub(super) fn falls(scale: Scale, course: &Course) -> Claim {
    let [first, last] = ends(&course.pretraining);
    Claim::new(
        "the mean score falls in pretraining, from its first fiftieth to its end",
        "falls during pretraining",
        listed(&course.pretraining),
        after_training(scale, last < first),
    )
}

pub(super) fn rises(scale: Scale, course: &Course) -> Claim {
    let [first, last] = ends(&course.tuning);
    Claim::new(
        "the mean score rises when the model is trained further on one kind of sentence",
        "rises during fine-tuning to a task",
        listed(&course.tuning),
        after_training(scale, last > first),
    )
    .noted("on the text of before; the further training is on the facts of another language alone")
}

impl Course {
    /// One training behind the other.
    pub(super) fn plot(&self) -> Plot {
        let before = self.pretraining.last().map_or(0, |point| point.step);
        let series = |name: &str, points: &[Point], from: u64, of: fn(&Point) -> f64| Series {
            name: name.to_owned(),
            points: points
                .iter()
                .map(|point| ((from + point.step) as f64, of(point)))
                .collect(),
        };
        let stream: fn(&Point) -> f64 = |point| point.score;
        let added: fn(&Point) -> f64 = |point| point.added;
        Plot {
            title: "Mean score through training".to_owned(),
            x: "steps".to_owned(),
            y: "share of variance that a linear map explains, held out".to_owned(),
            series: vec![
                series("stream", &self.pretraining, 0, stream),
                series("what blocks add", &self.pretraining, 0, added),
                series("stream, other facts", &self.tuning, before, stream),
                series("what blocks add, other facts", &self.tuning, before, added),
            ],
        }
    }
}
