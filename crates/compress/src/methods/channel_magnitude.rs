//! Takes out the hidden features of least weight, and corrects nothing: what methods that look at
//! data are compared with.
//!
//! A feature's magnitude is `‖gate row‖ + ‖up row‖ + ‖down column‖` (Li et al. 2016, arXiv
//! 1608.08710, for filters). Attention stays whole.

use lapidary_model::Model;

use super::channels::{self, Unit};
use crate::ahead::Refused;
use crate::edit::Edit;
use crate::method::{Effect, Method, Schedule, Settings, Task};
use crate::plan::{Budget, Change, ModulePlan, Plan};
use crate::report::{Compressed, ModuleReport};
use crate::{Error, Requirements, Result};

/// Channels by magnitude in the list of methods.
pub(crate) const CHANNEL_MAGNITUDE: Method = Method {
    name: "channel-magnitude",
    summary: "Takes out the feed-forward features of least weight",
    source: "Li et al. 2016, arXiv 1608.08710",
    schedule: Schedule::OneShot,
    effect: Effect::Parts,
    observes: false,
    leaves: &[],
    refuses: |_| &[Refused::Factors("feedforward")],
    requirements,
    plan,
    apply,
    cut: None,
};

fn requirements(model: &Model, _: &Settings) -> Result<Requirements> {
    let blocks = model.spec().expanded_blocks();
    let mut hidden = blocks
        .iter()
        .enumerate()
        .map(|(index, block)| channels::hidden(index, block));
    if hidden.all(|hidden| hidden.is_none()) {
        return Err(Error::invalid(
            "the model",
            "one without hidden features in feed-forward parts",
            "one with them for channel-magnitude; svd and the other factorisations take these",
        ));
    }
    Ok(Requirements::default())
}

fn plan(task: &Task<'_>, budget: &Budget) -> Result<Plan> {
    let name = CHANNEL_MAGNITUDE.name;
    let share = budget.share(name)?;
    requirements(task.model, &task.settings())?;
    let width = task.model.spec().width;
    let blocks = task.model.spec().expanded_blocks();
    let modules = blocks.iter().enumerate().filter_map(|(index, block)| {
        let hidden = channels::hidden(index, block)?;
        let features = ((share * hidden as f64).round() as usize).clamp(1, hidden);
        let features = channels::aligned(block, features, hidden);
        Some(ModulePlan {
            path: channels::feedforward(index),
            input: width,
            output: width,
            change: match features == hidden {
                true => Change::Leave {
                    reason: "all of it is kept".to_owned(),
                },
                false => Change::Narrow { features },
            },
        })
    });
    Ok(Plan {
        method: name.to_owned(),
        modules: modules.collect(),
    })
}

fn apply(task: &Task<'_>, plan: &Plan) -> Result<Compressed> {
    let model = task.model;
    let blocks = model.spec().expanded_blocks();
    let mut edit = Edit::of(model);
    for planned in &plan.modules {
        let index = channels::block_of(model, planned, "feedforward")?;
        let units = blocks.get(index).map(|block| Unit::of(index, block));
        let units = units.unwrap_or_default();
        let hidden = units.first().map_or(0, |unit| unit.hidden);
        let Some(features) = channels::planned_features(planned, hidden)? else {
            continue;
        };
        for unit in &units {
            let scores = channels::magnitudes(&edit, unit, None)?;
            unit.keep(&mut edit, &channels::largest(&scores, features))?;
        }
        channels::set_hidden(&mut edit, index, features)?;
    }
    let narrowed = edit.finish()?;
    let report = |planned: &ModulePlan| {
        let weights = |model: &Model| channels::weights(model, &planned.path);
        ModuleReport::new(planned, weights(model), weights(&narrowed))
    };
    let modules = plan.modules.iter().map(report).collect();
    Compressed::new(CHANNEL_MAGNITUDE.name, task, narrowed, modules)
}
