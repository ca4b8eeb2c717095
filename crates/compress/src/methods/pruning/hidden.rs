//! Takes out the hidden features of feed-forward parts whose weights matter least to the loss.
//!
//! A feature's score is the sum of `w² E[(∂L/∂w)²]` over its rows of gate and up and its column of
//! down (Molchanov et al. 2019, arXiv 1906.10771, of weights), by what the whole model showed. The
//! experts of a mixture lose as many each.

use std::collections::BTreeSet;

use lapidary_model::Model;

use super::settings::{PruneSettings, Scope};
use super::{cap, select};
use crate::ahead::{Left, Refused};
use crate::edit::Edit;
use crate::method::{Effect, Method, Schedule, Settings, Task};
use crate::methods::channels::{self, Unit};
use crate::plan::{Budget, Change, ModulePlan, Plan};
use crate::report::{Compressed, ModuleReport};
use crate::requirements::{Requirements, Statistic};
use crate::{Calibration, Error, Result};

/// Channels by gradient in the list of methods.
pub(crate) const CHANNEL_GRADIENT: Method = Method {
    name: "channel-gradient",
    summary: "Takes out the feed-forward features whose weights matter least to the loss",
    source: "Molchanov et al. 2019, arXiv 1906.10771",
    schedule: Schedule::OneShot,
    effect: Effect::Parts,
    observes: false,
    leaves: &[Left::UnevenFeatures],
    refuses: |_| &[Refused::Factors("feedforward")],
    requirements,
    plan,
    apply,
    cut: None,
};

/// Every block with hidden features, and their units.
fn units(model: &Model) -> Result<Vec<(usize, Vec<Unit>)>> {
    let blocks = model.spec().expanded_blocks();
    let units = blocks.iter().enumerate();
    let units = units.map(|(index, block)| (index, Unit::of(index, block)));
    let units: Vec<_> = units.filter(|(_, units)| !units.is_empty()).collect();
    match units.is_empty() {
        false => Ok(units),
        true => Err(Error::invalid(
            "the model",
            "one without hidden features in feed-forward parts",
            "one with them for channel-gradient; first-order takes others",
        )),
    }
}

/// Whether a share is sure to leave blocks with different numbers of hidden features, whatever their scores.
pub(crate) fn uneven_features(model: &Model, keep: f64, settings: &PruneSettings) -> Result<bool> {
    let all = units(model)?;
    let first = |units: &[Unit]| units.first().map_or(0, |unit| unit.hidden);
    let features: Vec<usize> = all.iter().map(|(_, units)| first(units)).collect();
    Ok(uneven(&features, keep, settings))
}

fn fisher(layer: String) -> Statistic {
    Statistic::Fisher { layer }
}

fn requirements(model: &Model, settings: &Settings) -> Result<Requirements> {
    settings.pruning.check()?;
    let mut statistics = BTreeSet::new();
    for unit in units(model)?.iter().flat_map(|(_, units)| units) {
        let layers = unit.writers().into_iter().chain([unit.reader()]);
        statistics.extend(layers.map(fisher));
    }
    Ok(Requirements { statistics })
}

/// The score of each hidden feature of a unit.
fn scores(edit: &Edit, unit: &Unit, calibration: &Calibration) -> Result<Vec<f64>> {
    let mut total = super::saliency(edit, &unit.reader(), calibration)?.by_input();
    for writer in unit.writers() {
        let rows = super::saliency(edit, &writer, calibration)?.by_output();
        total
            .iter_mut()
            .zip(rows)
            .for_each(|(sum, row)| *sum += row);
    }
    Ok(total)
}

/// What each next feature of a block costs: the mean over its units, each beginning with its least.
fn costs(edit: &Edit, units: &[Unit], calibration: &Calibration) -> Result<Vec<f64>> {
    let mut costs = vec![0.0; units.first().map_or(0, |unit| unit.hidden)];
    for unit in units {
        let mut scores = scores(edit, unit, calibration)?;
        scores.sort_by(f64::total_cmp);
        let share = 1.0 / units.len() as f64;
        let pairs = costs.iter_mut().zip(scores);
        pairs.for_each(|(cost, score)| *cost += share * score);
    }
    Ok(costs)
}

fn plan(task: &Task<'_>, budget: &Budget) -> Result<Plan> {
    let keep = budget.share(CHANNEL_GRADIENT.name)?;
    let calibration = task.calibrated(CHANNEL_GRADIENT.name)?;
    let all = units(task.model)?;
    let edit = Edit::of(task.model);
    let costs = all
        .iter()
        .map(|(_, units)| costs(&edit, units, calibration))
        .collect::<Result<Vec<_>>>()?;
    let removed = removed(&costs, keep, &task.settings().pruning);
    let width = task.model.spec().width;
    let modules = all.iter().zip(costs).zip(removed);
    let modules = modules.map(|(((index, _), costs), removed)| ModulePlan {
        path: channels::feedforward(*index),
        input: width,
        output: width,
        change: match removed {
            0 => Change::Leave {
                reason: "none of its features is to go".to_owned(),
            },
            _ => Change::Narrow {
                features: costs.len() - removed,
            },
        },
    });
    Ok(Plan {
        method: CHANNEL_GRADIENT.name.to_owned(),
        modules: modules.collect(),
    })
}

/// How many of each list go; one of each stays.
pub(super) fn removed(costs: &[Vec<f64>], keep: f64, settings: &PruneSettings) -> Vec<usize> {
    let caps = costs.iter().map(|list| most(settings, list.len()));
    let caps: Vec<usize> = caps.collect();
    match settings.scope.unwrap_or(Scope::Global) {
        Scope::Global => {
            let all = costs.iter().map(Vec::len).sum();
            select::shares(costs, &caps, share_of(keep, all))
        }
        Scope::Layer | Scope::Row => {
            let each = costs.iter().zip(caps);
            each.map(|(list, cap)| share_of(keep, list.len()).min(cap))
                .collect()
        }
    }
}

/// How many of so many may go.
fn most(settings: &PruneSettings, count: usize) -> usize {
    cap(settings, count).min(count.saturating_sub(1))
}

/// How many of so many are to go.
fn share_of(keep: f64, count: usize) -> usize {
    ((1.0 - keep) * count as f64).round() as usize
}

/// Whether lists that are as long as each other are sure to lose different numbers: what goes of all is no
/// multiple of how many lists there are.
pub(super) fn uneven(counts: &[usize], keep: f64, settings: &PruneSettings) -> bool {
    let (Some(first), Scope::Global) = (counts.first(), settings.scope.unwrap_or(Scope::Global))
    else {
        return false;
    };
    let lists = counts.len();
    let gone = share_of(keep, first * lists).min(most(settings, *first) * lists);
    counts.iter().all(|count| count == first) && !gone.is_multiple_of(lists)
}

fn apply(task: &Task<'_>, plan: &Plan) -> Result<Compressed> {
    let model = task.model;
    let calibration = task.calibrated(CHANNEL_GRADIENT.name)?;
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
            let scores = scores(&edit, unit, calibration)?;
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
    Compressed::new(CHANNEL_GRADIENT.name, task, narrowed, modules)
}
