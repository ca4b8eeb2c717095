//! Takes blocks out one after another and has their neighbours take them in (FuseGPT: Pei et al.
//! 2024, arXiv 2411.14507).
//!
//! The block goes without which the last hidden vectors turn least, found anew each time. Of the
//! blocks around it every matrix `W` takes in the corresponding matrix `W_f` of the block that goes,
//! entry by entry through a learned gate, beside a correction of low rank:
//!
//! ```text
//! MI_i  = 1 − mean cos(h, h^{(−i)})
//! W_eff = W + B A + Σ_j (P_j Q_j) ⊙ W_f^{(j)}
//! ```
//!
//! `P` and `B` start at zero, so that at first the block is only left out; then the group is tuned
//! to give what it gave with the block. At the end `W ← W_eff`: the result has the architecture it
//! had and no new parameter.

mod influence;
mod stack;
#[cfg(test)]
mod testing;
mod tune;
mod weights;

use std::collections::BTreeSet;

use lapidary_model::Model;

pub use self::influence::macro_influences;
use self::influence::{first, influences};
use self::stack::{Stack, alike, group};
use self::tune::{Distances, Group, tune};
pub use self::weights::Gate;
use crate::ahead::Refused;
use crate::method::{Effect, Method, Schedule, Settings, Task};
use crate::methods::block_influence::{
    block_weights, in_one_basis, plan_of, removed_blocks, without_blocks,
};
use crate::methods::linearise::one_stream;
use crate::plan::{Budget, Change, ModulePlan, Plan};
use crate::report::{Compressed, LayerErrors, ModuleReport};
use crate::{CalibrationData, Error, Requirements, Result};
use serde::{Deserialize, Serialize};

/// What both methods that fuse cannot be run on.
const FUSIBLE: &[Refused] = &[
    Refused::Shortcuts,
    Refused::Gaps,
    Refused::AnyFactors,
    Refused::Uneven,
];

/// FuseGPT in the list of methods.
pub(crate) const FUSEGPT: Method = Method {
    name: "fusegpt",
    summary: "Leaves blocks out by macro influence; their neighbours learn to take them in",
    source: "Pei et al. 2024, arXiv 2411.14507",
    schedule: Schedule::Training,
    effect: Effect::Depth,
    observes: true,
    leaves: &[],
    refuses: |_| FUSIBLE,
    requirements: |model: &Model, _: &Settings| fusible(model, FUSEGPT.name),
    plan: |task, budget| plan(FUSEGPT.name, task, budget, true),
    apply: |task, plan| apply(FUSEGPT.name, task, plan, true),
    cut: Some(|task, budget| cut(FUSEGPT.name, task, budget, true)),
};

/// FuseGPT without what goes, in the list of methods.
pub(crate) const FUSE_LORA: Method = Method {
    name: "fuse-lora",
    summary: "FuseGPT's control: the neighbours of what goes are tuned without taking it in",
    source: "Pei et al. 2024, arXiv 2411.14507",
    schedule: Schedule::Training,
    effect: Effect::Depth,
    observes: true,
    leaves: &[],
    refuses: |_| FUSIBLE,
    requirements: |model: &Model, _: &Settings| fusible(model, FUSE_LORA.name),
    plan: |task, budget| plan(FUSE_LORA.name, task, budget, false),
    apply: |task, plan| apply(FUSE_LORA.name, task, plan, false),
    cut: Some(|task, budget| cut(FUSE_LORA.name, task, budget, false)),
};

/// Deletion by macro influence in the list of methods.
pub(crate) const MACRO_INFLUENCE: Method = Method {
    name: "macro-influence",
    summary: "Leaves out, one after another, the blocks that turn the last hidden vectors least",
    source: "Pei et al. 2024, arXiv 2411.14507",
    schedule: Schedule::Iterative,
    effect: Effect::Depth,
    observes: true,
    leaves: &[],
    refuses: |_| &[Refused::Shortcuts],
    requirements: |model: &Model, _: &Settings| {
        deletable(model, MACRO_INFLUENCE.name)?;
        Ok(Requirements::default())
    },
    plan: delete,
    apply: |task, plan| without_blocks(MACRO_INFLUENCE.name, task, plan),
    cut: None,
};

/// What a group of blocks is tuned towards.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FuseLoss {
    /// `KL(softmax(Y) ‖ softmax(Ŷ))` over the features of each token, the mean over tokens.
    #[default]
    Divergence,
    /// The mean of `(Ŷ − Y)²`.
    SquaredError,
}

/// How blocks are fused, as published.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct FuseSettings {
    /// Rank of a gate and of a correction, at most that of the matrix.
    pub rank: usize,
    /// How entries of what goes are weighed.
    pub gate: Gate,
    /// Blocks in a row that are tuned together, the one that goes among them.
    pub group: usize,
    /// Passes over the calibration data for each block that goes.
    pub epochs: usize,
    /// Learning rate of gates.
    pub gate_rate: f64,
    /// Learning rate of corrections, biases and norms.
    pub rate: f64,
    /// What the group is tuned towards.
    pub loss: FuseLoss,
    /// Sequences that influence is measured on: the first of the calibration data.
    pub evaluation: usize,
    /// Whether influence is measured anew on the fused blocks, so that planning trains too, or on
    /// blocks that are only left out.
    pub rescore_fused: bool,
}

impl Default for FuseSettings {
    fn default() -> Self {
        Self {
            rank: 128,
            gate: Gate::LowRank,
            group: 8,
            epochs: 20,
            gate_rate: 1e-3,
            rate: 9.65e-6,
            loss: FuseLoss::Divergence,
            evaluation: 32,
            rescore_fused: true,
        }
    }
}

impl FuseSettings {
    fn check(&self) -> Result<()> {
        if self.group < 2 {
            let expected = "at least 2: the block that goes and one that stays";
            return Err(Error::invalid("blocks of a group", self.group, expected));
        }
        if self.rank == 0 {
            return Err(Error::invalid("rank of gates", 0, "at least 1"));
        }
        for (what, rate) in [
            ("learning rate of gates", self.gate_rate),
            ("learning rate of corrections", self.rate),
        ] {
            if !(rate.is_finite() && rate >= 0.0) {
                return Err(Error::invalid(what, rate, "at least 0"));
            }
        }
        Ok(())
    }
}

/// Without a block its shortcut is gone too, so that influence is mostly that of the basis which every
/// later block misses.
fn deletable(model: &Model, name: &str) -> Result<()> {
    one_stream(model, name)?;
    in_one_basis(model, name)
}

/// Entries of two blocks' matrices correspond only where both read and write the same features.
fn fusible(model: &Model, name: &str) -> Result<Requirements> {
    deletable(model, name)?;
    alike(model, name)?;
    Ok(Requirements::default())
}

/// The block that goes next.
fn least_influence(stack: &Stack, data: &CalibrationData, batch: usize) -> Result<Option<usize>> {
    let scores = influences(&stack.model(stack.left())?, data, batch)?;
    let numbered = stack.left().iter().zip(scores);
    let least = numbered.min_by(|a, b| a.1.total_cmp(&b.1));
    Ok(least.map(|(block, _)| *block))
}

/// The plan of plain deletion.
fn delete(task: &Task<'_>, budget: &Budget) -> Result<Plan> {
    let name = MACRO_INFLUENCE.name;
    deletable(task.model, name)?;
    let count = removed_blocks(task.model, name, budget)?;
    let mut gone = BTreeSet::new();
    if count > 0 {
        let settings = task.settings();
        let data = first(task.observed(name)?, settings.fuse.evaluation)?;
        let mut stack = Stack::of(task.model, settings.seed)?;
        for _ in 0..count {
            let Some(block) = least_influence(&stack, &data, settings.batch)? else {
                break;
            };
            stack.remove(block);
            gone.insert(block);
        }
    }
    Ok(plan_of(name, task.model, &gone))
}

/// A plan, and the blocks as they were planned with.
struct Planned {
    plan: Plan,
    stack: Stack,
    /// Of each block that goes, where its group was tuned.
    distances: Vec<Option<Distances>>,
}

/// A plan in the order in which it is carried out: a block that goes, then those that take it in.
fn plan(name: &str, task: &Task<'_>, budget: &Budget, recycle: bool) -> Result<Plan> {
    let rescore = task.settings().fuse.rescore_fused;
    // Nothing is looked for behind the last block that goes.
    let planned = planned(name, task, budget, recycle, |left| rescore && left > 0)?;
    Ok(planned.plan)
}

/// Plans and carries the plan out at one time: a model that is fused to look for the next block is not fused
/// again.
fn cut(name: &str, task: &Task<'_>, budget: &Budget, recycle: bool) -> Result<(Plan, Compressed)> {
    if !task.settings().fuse.rescore_fused {
        let plan = plan(name, task, budget, recycle)?;
        let compressed = apply(name, task, &plan, recycle)?;
        return Ok((plan, compressed));
    }
    let Planned {
        plan,
        stack,
        distances,
    } = planned(name, task, budget, recycle, |_| true)?;
    let modules = reports(task.model, &plan, &distances);
    let compressed = Compressed::new(name, task, stack.fold(task.model)?, modules)?;
    Ok((plan, compressed))
}

/// Plans, and tunes the group around a block that goes where `tunes` says so of how many are still to go.
fn planned(
    name: &str,
    task: &Task<'_>,
    budget: &Budget,
    recycle: bool,
    tunes: impl Fn(usize) -> bool,
) -> Result<Planned> {
    fusible(task.model, name)?;
    let settings = task.settings();
    settings.fuse.check()?;
    let count = removed_blocks(task.model, name, budget)?;
    let width = task.model.spec().width;
    let module = |block: usize, change: Change| ModulePlan {
        path: format!("blocks.{block}"),
        input: width,
        output: width,
        change,
    };
    let mut stack = Stack::of(task.model, settings.seed)?;
    let (mut modules, mut distances) = (Vec::new(), Vec::new());
    let mut touched = BTreeSet::new();
    for step in 0..count {
        let data = task.observed(name)?;
        let measured = first(data, settings.fuse.evaluation)?;
        let Some(gone) = least_influence(&stack, &measured, settings.batch)? else {
            break;
        };
        let group = around(gone, settings.fuse.group, &stack);
        modules.push(module(gone, Change::Remove));
        let survivors = group.survivors.iter();
        modules.extend(survivors.map(|block| module(*block, Change::Fuse { from: gone })));
        touched.extend(group.blocks.iter().copied());
        distances.push(match tunes(count - step - 1) {
            true => {
                let (batch, fuse) = (settings.batch, &settings.fuse);
                Some(tune(&mut stack, &group, data, batch, recycle, fuse)?)
            }
            false => {
                stack.remove(gone);
                None
            }
        });
    }
    let blocks = 0..task.model.spec().expanded_blocks().len();
    let others = blocks.filter(|block| !touched.contains(block));
    modules.extend(others.map(|block| {
        let reason = "it is in no group around a block that goes".to_owned();
        module(block, Change::Leave { reason })
    }));
    let method = name.to_owned();
    Ok(Planned {
        plan: Plan { method, modules },
        stack,
        distances,
    })
}

/// The group around a block that is left.
fn around(gone: usize, size: usize, stack: &Stack) -> Group {
    let left = stack.left();
    let place = left.iter().position(|block| *block == gone).unwrap_or(0);
    let places = group(place, size, left.len());
    let blocks: Vec<usize> = left.get(places).unwrap_or_default().to_vec();
    let survivors = blocks.iter().copied().filter(|block| *block != gone);
    Group {
        survivors: survivors.collect(),
        blocks,
        gone,
    }
}

/// A block that goes and what takes it in.
struct Step {
    gone: usize,
    survivors: Vec<usize>,
}

fn steps(name: &str, model: &Model, plan: &Plan) -> Result<Vec<Step>> {
    let width = model.spec().width;
    let mut left: BTreeSet<usize> = (0..model.spec().expanded_blocks().len()).collect();
    let mut steps: Vec<Step> = Vec::new();
    for planned in &plan.modules {
        let number = planned.path.strip_prefix("blocks.");
        let block = number.and_then(|number| number.parse::<usize>().ok());
        let block = block.filter(|block| left.contains(block) && planned.input == width);
        let leaves = matches!(planned.change, Change::Leave { .. });
        let Some(block) = block else {
            return Err(Error::invalid(
                "plan",
                format!("for {} of width {}", planned.path, planned.input),
                "one that was made for this model, each block named while it is there",
            ));
        };
        match (&planned.change, steps.last_mut()) {
            (Change::Remove, _) => {
                left.remove(&block);
                steps.push(Step {
                    gone: block,
                    survivors: Vec::new(),
                });
            }
            (Change::Fuse { from }, Some(step)) if *from == step.gone => {
                step.survivors.push(block);
            }
            _ if leaves => {}
            (other, _) => {
                return Err(Error::invalid(
                    format!("change of {} in a plan of {name}", planned.path),
                    format!("{other:?}"),
                    "remove, fuse from the block that the last remove names, or leave",
                ));
            }
        }
    }
    Ok(steps)
}

fn apply(name: &str, task: &Task<'_>, plan: &Plan, recycle: bool) -> Result<Compressed> {
    fusible(task.model, name)?;
    let settings = task.settings();
    settings.fuse.check()?;
    let mut stack = Stack::of(task.model, settings.seed)?;
    let mut distances = Vec::new();
    for step in steps(name, task.model, plan)? {
        if step.survivors.is_empty() {
            stack.remove(step.gone);
            distances.push(None);
            continue;
        }
        let named = |block: &&usize| **block == step.gone || step.survivors.contains(block);
        let places: Vec<usize> = (0..)
            .zip(stack.left())
            .filter(|(_, block)| named(block))
            .map(|(place, _)| place)
            .collect();
        let (from, to) = (places.first().copied(), places.last().copied());
        let run = from
            .zip(to)
            .and_then(|(from, to)| stack.left().get(from..=to));
        let group = Group {
            blocks: run.unwrap_or_default().to_vec(),
            gone: step.gone,
            survivors: step.survivors,
        };
        let data = task.observed(name)?;
        let fuse = &settings.fuse;
        let found = tune(&mut stack, &group, data, settings.batch, recycle, fuse)?;
        distances.push(Some(found));
    }
    let model = stack.fold(task.model)?;
    Compressed::new(name, task, model, reports(task.model, plan, &distances))
}

/// What became of each module, with how near a group came to what it gave beside the block that
/// went.
fn reports(model: &Model, plan: &Plan, distances: &[Option<Distances>]) -> Vec<ModuleReport> {
    let weights = block_weights(model);
    let mut distances = distances.iter();
    let modules = plan.modules.iter().map(|planned| {
        let number = planned.path.strip_prefix("blocks.");
        let block = number.and_then(|number| number.parse::<usize>().ok());
        let before = block.and_then(|block| weights.get(block)).copied();
        let before = before.unwrap_or(0);
        if planned.change != Change::Remove {
            return ModuleReport::new(planned, before, before);
        }
        let mut module = ModuleReport::new(planned, before, 0);
        if let Some(Distances { before, after }) = distances.next().copied().flatten() {
            module.chosen = Some(LayerErrors {
                weighted: after,
                unweighted: after,
                predicted_loss_rise: None,
            });
            module.note = Some(format!(
                "its group misses what it gave by {after:.4}; untuned by {before:.4}"
            ));
        }
        module
    });
    modules.collect()
}
