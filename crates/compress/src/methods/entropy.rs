//! Leaves out the attention, or the blocks, that add least to the entropy of the residual stream
//! (EntroDrop: Yang et al. 2025, arXiv 2504.03794), see [`crate::entropy`].
//!
//! Entropy falls over the first blocks of a trained model and rises afterwards. Of the first stage
//! nothing goes, and neither do the first two blocks nor the last; of the others those of least
//! `ΔH` do, all at once.

use std::collections::BTreeSet;

use lapidary_model::Model;

use crate::ahead::{Left, Refused};
use crate::entropy::EntropyProfile;
use crate::method::{Effect, Method, Schedule, Settings, Task};
use crate::methods::attention_cosine::{attention_plan, attentions, removed_of, without_attention};
use crate::methods::block_influence::{
    in_one_basis, least, plan_of, removable, removed_blocks, without_blocks,
};
use crate::plan::{Budget, Change, Plan};
use crate::{Error, Requirements, Result};

/// Attention by its entropy in the list of methods.
pub(crate) const ENTROPY_ATTENTION: Method = Method {
    name: "entropy-attention",
    summary: "Leaves out the attention that adds least entropy; feed-forward parts stay",
    source: "Yang et al. 2025, arXiv 2504.03794",
    schedule: Schedule::OneShot,
    effect: Effect::Depth,
    observes: true,
    leaves: &[Left::Gaps],
    refuses: |_| &[Refused::Shortcuts],
    requirements: |model: &Model, _: &Settings| {
        attentions(model, ENTROPY_ATTENTION.name)?;
        Ok(Requirements::default())
    },
    plan: plan_attention,
    apply: |task, plan| without_attention(ENTROPY_ATTENTION.name, task, plan),
    cut: None,
};

/// Blocks by their entropy in the list of methods.
pub(crate) const ENTROPY_BLOCKS: Method = Method {
    name: "entropy-blocks",
    summary: "Leaves out the blocks that add least entropy",
    source: "Yang et al. 2025, arXiv 2504.03794",
    schedule: Schedule::OneShot,
    effect: Effect::Depth,
    observes: true,
    leaves: &[],
    refuses: |_| &[Refused::Shortcuts],
    requirements: |model: &Model, _: &Settings| {
        removable(model, ENTROPY_BLOCKS.name)?;
        in_one_basis(model, ENTROPY_BLOCKS.name)?;
        Ok(Requirements::default())
    },
    plan: plan_blocks,
    apply: |task, plan| without_blocks(ENTROPY_BLOCKS.name, task, plan),
    cut: None,
};

fn plan_attention(task: &Task<'_>, budget: &Budget) -> Result<Plan> {
    let name = ENTROPY_ATTENTION.name;
    let blocks = attentions(task.model, name)?;
    let count = removed_of(blocks.len(), name, budget)?;
    let (removed, profile) = chosen(task, name, count, |profile, index| {
        profile.attention.get(index).copied().flatten()
    })?;
    let reason = |index| {
        let score = profile
            .as_ref()
            .and_then(|p| p.attention.get(index).copied().flatten());
        reason(score)
    };
    Ok(attention_plan(name, task.model, &blocks, &removed, reason))
}

fn plan_blocks(task: &Task<'_>, budget: &Budget) -> Result<Plan> {
    let name = ENTROPY_BLOCKS.name;
    removable(task.model, name)?;
    let count = removed_blocks(task.model, name, budget)?;
    let (removed, profile) = chosen(task, name, count, |profile, index| {
        profile.blocks.get(index).copied()
    })?;
    let mut plan = plan_of(name, task.model, &removed);
    for (index, module) in plan.modules.iter_mut().enumerate() {
        if let Change::Leave { reason: why } = &mut module.change {
            *why = reason(profile.as_ref().and_then(|p| p.blocks.get(index).copied()));
        }
    }
    Ok(plan)
}

fn reason(score: Option<f64>) -> String {
    match score {
        Some(score) => format!("it adds {score:.3} nats, more than those that go, or is kept"),
        None => "nothing goes".to_owned(),
    }
}

/// The `count` candidates of least score, and the profile they were chosen by.
fn chosen(
    task: &Task<'_>,
    name: &str,
    count: usize,
    score: impl Fn(&EntropyProfile, usize) -> Option<f64>,
) -> Result<(BTreeSet<usize>, Option<EntropyProfile>)> {
    if count == 0 {
        return Ok((BTreeSet::new(), None));
    }
    let settings = task.settings();
    let choice = &settings.entropy;
    let profile =
        EntropyProfile::measure(task.model, task.observed(name)?, settings.batch, choice)?;
    let blocks = profile.blocks.len();
    let stage = if choice.stages { profile.stage() } else { 0 };
    let first = stage.max(choice.first);
    let last = blocks.saturating_sub(choice.last);
    let candidates: Vec<(usize, f64)> = (first..last)
        .filter_map(|index| score(&profile, index).map(|score| (index, score)))
        .collect();
    if count > candidates.len() {
        let expected = format!(
            "at most {}: of {blocks} blocks the first {first} and the last {} stay{}",
            candidates.len(),
            choice.last.min(blocks),
            if stage > choice.first {
                ", entropy being least there (entropy.stages, entropy.last)"
            } else {
                " (entropy.first, entropy.last)"
            },
        );
        return Err(Error::invalid(
            format!("number of removals of {name}"),
            count,
            expected,
        ));
    }
    let scores: Vec<f64> = candidates.iter().map(|(_, score)| *score).collect();
    let places = least(&scores, count).into_iter();
    let removed = places.filter_map(|place| candidates.get(place).map(|(index, _)| *index));
    Ok((removed.collect(), Some(profile)))
}
