//! How linear the blocks of a small decoder are, and what replacing them by maps costs.
//!
//! The paper measures published decoders and finds scores near 1. Here the decoder is small and
//! learned the generated language; its most and least linear blocks become linear maps, or go.

use super::decoder::Recipe;
use super::depth::{BATCH, Size, Subject};
use super::{after_training, decoder, mean};
use crate::{Claim, Plot, Reproduction, Result, Scale, Series, Setting, Verdict};
use lapidary_compress::Change;
use lapidary_explain::analyses::linearity::{Linearity, linearity};
use lapidary_train::data::LanguageTask;
use lapidary_train::language::Split;
use lapidary_train::{AlignmentKind, AlignmentSpec};

/// Losses when blocks are replaced or go.
struct Cost {
    what: &'static str,
    blocks: Vec<usize>,
    deleted: f64,
    replaced: f64,
    tuned: f64,
}

/// Runs the experiment.
pub fn run(setting: &Setting) -> Result<Reproduction> {
    let mut size = Size::of(setting.scale);
    // A score needs many times as many tokens as features.
    size.calibration *= 2;
    setting.tell(|| "a decoder to be cut".to_owned());
    let subject = Subject::trained(size, setting.seed)?;
    let whole = subject.loss(&subject.model)?;
    let corpus = decoder::corpus(Split::Training, setting.seed)?;
    let windows = (0..size.calibration)
        .map(|index| Ok(corpus.window(index, decoder::LENGTH)?))
        .collect::<Result<Vec<_>>>()?;
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
        costs.push(cost(&subject, what, blocks, steps)?);
    }
    let aligned = aligned(setting)?;
    let baseline = subject.loss(&subject.tuned(&subject.model, steps)?)?;
    Ok(Reproduction {
        setting: format!(
            "{}; whole model at {whole:.4} nats, {baseline:.4} after the {steps} steps of further \
             training that replaced models get",
            size.describe()
        ),
        claims: claims(setting.scale, &profile, &costs, whole, baseline, &aligned),
        plots: vec![profile_plot(&profile), cost_plot(&costs, whole)],
        ..Reproduction::default()
    })
}

fn cost(subject: &Subject, what: &'static str, blocks: Vec<usize>, steps: u64) -> Result<Cost> {
    let changed = |method: &str, change: Change| -> Result<_> {
        let mut plan = subject.empty_plan(method)?;
        for block in &blocks {
            if let Some(module) = plan.modules.get_mut(*block) {
                module.change = change.clone();
            }
        }
        Ok(subject.apply(&plan)?.model)
    };
    let replaced = changed("linearise", Change::Linearise { blocks: 1 })?;
    Ok(Cost {
        what,
        deleted: subject.loss(&changed("delete-linear", Change::Remove)?)?,
        tuned: subject.loss(&subject.tuned(&replaced, steps)?)?,
        replaced: subject.loss(&replaced)?,
        blocks,
    })
}

/// What training with the term that keeps the stream from turning gives, over the seeds.
struct Aligned {
    weight: f64,
    score: f64,
    loss: f64,
}

/// Smaller decoders, since each weight and seed is trained from the start.
fn aligned(setting: &Setting) -> Result<Vec<Aligned>> {
    let (mut size, seeds) = (Size::of(setting.scale), 2);
    size.blocks /= 2;
    size.width = (size.width / 2).max(16);
    size.steps = size.steps * 2 / 3;
    let mut found = Vec::new();
    for weight in [0.0, 0.05, 0.2, 1.0] {
        let (mut scores, mut losses) = (Vec::new(), Vec::new());
        for seed in setting.seed..setting.seed + seeds {
            setting.tell(|| format!("trained with a term of {weight}, seed {seed}"));
            let corpus = decoder::corpus(Split::Training, seed)?;
            let windows = (0..size.calibration)
                .map(|index| Ok(corpus.window(index, decoder::LENGTH)?))
                .collect::<Result<Vec<_>>>()?;
            let spec = decoder::spec(
                corpus.language().vocabulary().size(),
                size.width,
                size.blocks,
            );
            let recipe = Recipe {
                alignment: Some(AlignmentSpec {
                    kind: AlignmentKind::Cosine,
                    weight,
                }),
                ..Recipe::default()
            };
            let task = Box::new(LanguageTask::new(corpus));
            let model = decoder::train_by(recipe, spec, task, size.steps, seed)?;
            scores.push(mean(
                linearity(&model, &windows, BATCH)?
                    .iter()
                    .map(|f| f.held_out),
            ));
            let subject = Subject::of(model, size, seed)?;
            losses.push(subject.loss(&subject.model)?);
        }
        found.push(Aligned {
            weight,
            score: mean(scores),
            loss: mean(losses),
        });
    }
    Ok(found)
}

fn regularised_claim(scale: Scale, aligned: &[Aligned]) -> Claim {
    let plain = aligned.first();
    let better = |found: &&Aligned| {
        plain.is_some_and(|plain| found.score < plain.score && found.loss <= plain.loss)
    };
    let listed = aligned.iter().map(|found| {
        let Aligned {
            weight,
            score,
            loss,
        } = found;
        format!("λ = {weight}: score {score:.4}, {loss:.4} nats")
    });
    Claim::new(
        "some weight of the cosine term in training lowers the score, and the loss is no worse",
        "direction only",
        listed.collect::<Vec<_>>().join("; "),
        after_training(scale, aligned.iter().skip(1).any(|found| better(&found))),
    )
    .noted("half as many blocks and features, two seeds; scores and losses held out")
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
        ],
    }
}

fn claims(
    scale: Scale,
    profile: &[Linearity],
    costs: &[Cost],
    whole: f64,
    baseline: f64,
    aligned: &[Aligned],
) -> Vec<Claim> {
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
    let bounded = profile.iter().all(|found| {
        found
            .rotation
            .is_none_or(|rotation| rotation <= found.score + 1e-6)
    });
    let at = |what: &str| costs.iter().find(|cost| cost.what == what);
    let rises =
        |what: &str, of: fn(&Cost) -> f64| at(what).map_or(f64::NAN, |cost| of(cost) - whole);
    let tuned = at("the two most linear").map_or(f64::NAN, |cost| cost.tuned);
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
            format!("in {} blocks", profile.len()),
            Verdict::of(bounded),
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
                "{:+.1} % (blocks {:?}): {tuned:.4} against {baseline:.4} nats",
                100.0 * (tuned / baseline - 1.0),
                named("the two most linear")
            ),
            after_training(scale, tuned <= 1.02 * baseline),
        )
        .noted("trained on the loss of the language model alone, without distilling hidden states"),
        Claim::new(
            "replacing the least linear block costs at least three times as much as the most linear",
            "estimate",
            format!(
                "{least:+.4} (block {:?}) against {most:+.4} nats (block {:?})",
                named("the least linear"),
                named("the most linear")
            ),
            after_training(scale, least >= 3.0 * most),
        ),
        regularised_claim(scale, aligned),
    ]
}
