//! Training with the term that keeps the stream from turning.

use super::BLOCKS;
use crate::experiments::decoder::{self, Recipe};
use crate::experiments::depth::{BATCH, Size, Subject};
use crate::experiments::texts::Sides;
use crate::experiments::{after_training, mean};
use crate::{Claim, Result, Scale, Setting};
use lapidary_explain::analyses::linearity::linearity;
use lapidary_train::{AlignmentKind, AlignmentSpec};

/// Terms and their weights, none first.
const TERMS: [(AlignmentKind, f64); 5] = [
    (AlignmentKind::Cosine, 0.0),
    (AlignmentKind::Cosine, 0.05),
    (AlignmentKind::Cosine, 0.2),
    (AlignmentKind::Cosine, 1.0),
    (AlignmentKind::Squared, 0.05),
];
const SEEDS: u64 = 3;

fn name(kind: AlignmentKind) -> &'static str {
    match kind {
        AlignmentKind::Cosine => "of the cosine",
        AlignmentKind::Squared => "of squared distances",
    }
}

/// What training with the term that keeps the stream from turning gives, over the seeds.
pub(super) struct Aligned {
    kind: AlignmentKind,
    weight: f64,
    score: f64,
    loss: f64,
}

/// Smaller decoders, since each weight and seed is trained from the start.
pub(super) fn run(setting: &Setting, text: &Sides) -> Result<Vec<Aligned>> {
    let mut size = Size::of(setting.scale);
    let seeds = match setting.scale {
        Scale::Smoke => 1,
        Scale::Small | Scale::Full => SEEDS,
    };
    size.blocks = size.blocks.min(BLOCKS) / 2;
    size.width = (size.width / 2).max(16);
    size.steps = size.steps * 2 / 3;
    let mut found = Vec::new();
    for (kind, weight) in TERMS {
        let (mut scores, mut losses) = (Vec::new(), Vec::new());
        for seed in setting.seed..setting.seed + seeds {
            setting.tell(|| {
                format!(
                    "trained with a term of {weight} {}, seed {seed}",
                    name(kind)
                )
            });
            let text = text.for_seed(seed)?;
            let windows = text.training.fixed_windows(size.calibration)?;
            let spec = decoder::spec(text.training.vocabulary(), size.width, size.blocks);
            let recipe = Recipe {
                alignment: Some(AlignmentSpec { kind, weight }),
                ..Recipe::default()
            };
            let task = text.training.task();
            let model = decoder::train_by(recipe, spec, task, size.steps, seed)?;
            scores.push(mean(
                linearity(&model, &windows, BATCH)?
                    .iter()
                    .map(|f| f.held_out),
            ));
            let subject = Subject::reading(model, text, size, seed)?;
            losses.push(subject.loss(&subject.model)?);
        }
        found.push(Aligned {
            kind,
            weight,
            score: mean(scores),
            loss: mean(losses),
        });
    }
    Ok(found)
}

pub(super) fn claim(scale: Scale, aligned: &[Aligned]) -> Claim {
    let plain = aligned.first();
    let better = |found: &&Aligned| {
        found.kind == AlignmentKind::Cosine
            && plain.is_some_and(|plain| found.score < plain.score && found.loss <= plain.loss)
    };
    let listed = aligned.iter().map(|found| {
        let Aligned {
            kind,
            weight,
            score,
            loss,
        } = found;
        format!(
            "λ = {weight} {}: score {score:.4}, {loss:.4} nats",
            name(*kind)
        )
    });
    Claim::new(
        "some weight of the cosine term in training lowers the score, and the loss is no worse",
        "direction only",
        listed.collect::<Vec<_>>().join("; "),
        after_training(scale, aligned.iter().skip(1).any(|found| better(&found))),
    )
    .noted(format!(
        "half as many blocks and features, {SEEDS} seeds; scores and losses held out; of squared distances, \
         the paper's control, one weight is listed"
    ))
}
