//! How linear the blocks of a small decoder are, and what replacing them by maps costs.
//!
//! The paper measures published decoders and finds scores near 1. Here the decoder is small and
//! learned Tiny Shakespeare, or without it the generated language; its most and least linear blocks become linear maps, or go. The score is
//! followed through its training and through a further one on other facts.

mod aligned;
mod course;
mod replaced;

use super::depth::{BATCH, Size, Subject};
use super::texts::Sides;
use super::{after_training, mean};
use crate::{Claim, Plot, Reproduction, Result, Scale, Series, Setting, Verdict};
use aligned::Aligned;
use course::Course;
use lapidary_explain::analyses::linearity::{Linearity, linearity};
use replaced::{Cost, Cut};

/// Most blocks of the decoder.
const BLOCKS: usize = 8;

/// Runs the experiment.
pub fn run(setting: &Setting) -> Result<Reproduction> {
    let mut size = Size::of(setting.scale);
    size.blocks = size.blocks.min(BLOCKS);
    // A score needs many times as many tokens as features.
    size.calibration *= 2;
    setting.tell(|| "a decoder to be cut".to_owned());
    let text = Sides::of(setting)?;
    let windows = text.training.fixed_windows(size.calibration)?;
    let (model, pretraining) = course::pretrained(&text, size, setting.seed, &windows)?;
    let subject = Subject::reading(model, text, size, setting.seed)?;
    let whole = subject.loss(&subject.model)?;
    setting.tell(|| "trained further on other facts".to_owned());
    let course = Course {
        pretraining,
        tuning: course::tuned(&subject, size, setting.seed, &windows)?,
    };
    let profile = linearity(&subject.model, &windows, BATCH)?;
    let mut order: Vec<usize> = (0..profile.len()).collect();
    let score = |block: &usize| profile.get(*block).map_or(f64::NAN, |found| found.score);
    order.sort_by(|a, b| score(b).total_cmp(&score(a)));
    let steps = size.steps / 10;
    let mut costs = Vec::new();
    for (what, blocks) in [
        (
            "the most linear",
            order.iter().take(1).copied().collect::<Vec<_>>(),
        ),
        (
            "the two most linear",
            order.iter().take(2).copied().collect(),
        ),
        (
            "the least linear",
            order.iter().rev().take(1).copied().collect(),
        ),
        (
            "the two least linear",
            order.iter().rev().take(2).copied().collect(),
        ),
    ] {
        setting.tell(|| format!("without {what}"));
        costs.push(replaced::cost(&subject, what, blocks, steps, setting.seed)?);
    }
    let cuts = replaced::cuts(&subject, size, steps)?;
    let aligned = aligned::run(setting, &subject.text)?;
    let baseline = subject.loss(&subject.tuned(&subject.model, steps)?)?;
    let lesson = replaced::Lesson::new(&subject, steps, setting.seed)?;
    let taught = subject.loss(&lesson.distilled(&subject.model)?)?;
    let measured = Measured {
        profile,
        costs,
        cuts,
        aligned,
        course,
        whole,
        baseline,
        taught,
    };
    Ok(Reproduction {
        setting: format!(
            "{}; whole model at {whole:.4} nats, {baseline:.4} after the {steps} steps of further \
             training that replaced models get, {taught:.4} with the streams of its blocks held to what \
             they were",
            size.describe_on(&subject.text.what)
        ),
        claims: claims(setting.scale, &measured),
        plots: vec![
            profile_plot(&measured.profile),
            cost_plot(&measured.costs, whole),
            measured.course.plot(),
        ],
        ..Reproduction::default()
    })
}

/// Everything that claims are made of.
struct Measured {
    profile: Vec<Linearity>,
    costs: Vec<Cost>,
    cuts: Vec<Cut>,
    aligned: Vec<Aligned>,
    course: Course,
    /// Loss of the whole model.
    whole: f64,
    /// The same after as many further steps as replaced models get.
    baseline: f64,
    /// The same with the streams of its blocks as a lesson.
    taught: f64,
}

fn profile_plot(profile: &[Linearity]) -> Plot {
    let series = |name: &str, of: fn(&Linearity) -> Option<f64>| Series {
        name: name.to_owned(),
        points: profile
            .iter()
            .enumerate()
            .filter_map(|(block, found)| of(found).map(|value| (block as f64, value)))
            .collect(),
    };
    Plot {
        title: "Share of variance that a linear map explains".to_owned(),
        x: "block".to_owned(),
        y: "share, held out".to_owned(),
        series: vec![
            series("stream", |found| Some(found.held_out)),
            series("what the block adds", |found| found.residual_free_held_out),
            series("stream, by rotation", |found| found.rotation),
        ],
    }
}

fn cost_plot(costs: &[Cost], whole: f64) -> Plot {
    let series = |name: &str, of: fn(&Cost) -> f64| Series {
        name: name.to_owned(),
        points: costs
            .iter()
            .enumerate()
            .map(|(at, cost)| (at as f64, of(cost) - whole))
            .collect(),
    };
    let names = costs
        .iter()
        .map(|cost| cost.what)
        .collect::<Vec<_>>()
        .join(", ");
    Plot {
        title: "Rise of the loss without blocks".to_owned(),
        x: names,
        y: "nats".to_owned(),
        series: vec![
            series("left out", |cost| cost.deleted),
            series("linear map", |cost| cost.replaced),
            series("linear map, trained further", |cost| cost.tuned),
            series("linear map, distilled", |cost| cost.distilled),
        ],
    }
}

fn claims(scale: Scale, measured: &Measured) -> Vec<Claim> {
    let Measured { profile, costs, .. } = measured;
    let whole = measured.whole;
    let inner = profile
        .get(1..profile.len().saturating_sub(1))
        .unwrap_or_default();
    let high = inner.iter().filter(|found| found.held_out >= 0.9).count();
    let raw = mean(profile.iter().map(|found| found.held_out));
    let free = mean(
        profile
            .iter()
            .filter_map(|found| found.residual_free_held_out),
    );
    let rotated = profile
        .iter()
        .filter_map(|found| Some((found.rotation?, found.score)));
    let rotated: Vec<(f64, f64)> = rotated.collect();
    let bounded = rotated
        .iter()
        .all(|(rotation, score)| *rotation <= score + 1e-6);
    let at = |what: &str| costs.iter().find(|cost| cost.what == what);
    let rises =
        |what: &str, of: fn(&Cost) -> f64| at(what).map_or(f64::NAN, |cost| of(cost) - whole);
    let two = |of: fn(&Cost) -> f64| at("the two most linear").map_or(f64::NAN, of);
    let (tuned, distilled) = (two(|cost| cost.tuned), two(|cost| cost.distilled));
    let (baseline, taught) = (measured.baseline, measured.taught);
    let named = |what: &str| at(what).map_or_else(Vec::new, |cost| cost.blocks.clone());
    let (most, least) = (
        rises("the most linear", |cost| cost.replaced),
        rises("the least linear", |cost| cost.replaced),
    );
    let better = costs
        .iter()
        .filter(|cost| cost.replaced < cost.deleted)
        .count();
    vec![
        Claim::new(
            "rotations explain no more than linear maps do",
            "exact",
            format!("in {} of {} blocks", rotated.len(), profile.len()),
            Verdict::of(bounded && !rotated.is_empty()),
        ),
        Claim::new(
            "the stream behind most inner blocks is linear in that before them, to 0.9 or more",
            "about 0.99 in GPT, LLaMA, OPT and BLOOM",
            format!("in {high} of {} inner blocks; mean over all {raw:.3}", inner.len()),
            after_training(scale, 2 * high > inner.len()),
        ),
        Claim::new(
            "what blocks add is less linear by 0.2 or more on average",
            "lower without the residual",
            format!("stream {raw:.3}, what is added {free:.3}, both held out"),
            after_training(scale, raw - free >= 0.2),
        ),
        Claim::new(
            "a block replaced by its map costs less than the block left out",
            "maps are proposed in place of blocks",
            format!("in {better} of {} cases", costs.len()),
            after_training(scale, better == costs.len()),
        ),
        Claim::new(
            "with the two most linear blocks replaced, and trained further, the loss is at most 2 % \
             above that of the whole model trained as much",
            "hardly changed",
            format!(
                "{:+.1} % (blocks {:?}): {distilled:.4} against {taught:.4} nats",
                100.0 * (distilled / taught - 1.0),
                named("the two most linear")
            ),
            after_training(scale, distilled <= 1.02 * taught),
        )
        .noted(format!(
            "by the loss of the language model and the streams behind all blocks; by the former alone {:+.1} \
             %: {tuned:.4} against {baseline:.4} nats",
            100.0 * (tuned / baseline - 1.0)
        )),
        Claim::new(
            "replacing the least linear block costs at least three times as much as the most linear",
            "estimate",
            format!(
                "{least:+.4} (block {:?}) against {most:+.4} nats (block {:?})",
                named("the least linear"),
                named("the most linear")
            ),
            // Three times a rise below zero would be less than it.
            after_training(scale, least > 0.0 && least >= 3.0 * most),
        ),
        replaced::claim(scale, &measured.cuts),
        course::falls(scale, &measured.course),
        course::rises(scale, &measured.course),
        aligned::claim(scale, &measured.aligned),
    ]
}
