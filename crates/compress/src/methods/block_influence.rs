//! Leaves out the blocks that turn their input least (ShortGPT: Men et al. 2024, arXiv
//! 2403.03853), which other ways to choose blocks are compared with.
//!
//! ```text
//! influence_l = 1 − E[cos(x_l, x_{l+1})]
//! ```
//!
//! over real tokens, `x_l` the residual stream before block `l`. The blocks of least influence
//! go, all at once.

use std::collections::BTreeSet;

use lapidary_model::Model;

use crate::ahead::Refused;
use crate::edit::Edit;
use crate::method::{Effect, Method, Schedule, Settings, Task};
use crate::plan::{Budget, Change, ModulePlan, Plan};
use crate::report::{Compressed, ModuleReport};
use crate::requirements::{Requirements, Statistic};
use crate::{Calibration, Error, Result};

/// Block influence in the list of methods.
pub(crate) const BLOCK_INFLUENCE: Method = Method {
    name: "block-influence",
    summary: "Leaves out the blocks that turn their input least (ShortGPT)",
    source: "Men et al. 2024, arXiv 2403.03853",
    schedule: Schedule::OneShot,
    effect: Effect::Depth,
    observes: false,
    leaves: &[],
    refuses: |_| &[Refused::Shortcuts],
    requirements,
    plan,
    apply,
    cut: None,
};

fn requirements(model: &Model, _: &Settings) -> Result<Requirements> {
    removable(model, BLOCK_INFLUENCE.name)?;
    in_one_basis(model, BLOCK_INFLUENCE.name)?;
    let blocks = model.spec().expanded_blocks().len();
    Ok(Requirements {
        statistics: (0..blocks).map(similarity).collect(),
    })
}

pub(crate) fn similarity(block: usize) -> Statistic {
    Statistic::Similarity {
        from: format!("blocks.{block}.in"),
        to: format!("blocks.{block}.out"),
    }
}

/// `1 − E[cos]` of each block.
pub fn influences(model: &Model, calibration: &Calibration) -> Result<Vec<f64>> {
    (0..model.spec().expanded_blocks().len())
        .map(|block| Ok(1.0 - calibration.number(&similarity(block))?))
        .collect()
}

fn plan(task: &Task<'_>, budget: &Budget) -> Result<Plan> {
    let name = BLOCK_INFLUENCE.name;
    removable(task.model, name)?;
    let scores = influences(task.model, task.calibrated(name)?)?;
    let removed = least(&scores, removed_blocks(task.model, name, budget)?);
    Ok(plan_of(name, task.model, &removed))
}

fn apply(task: &Task<'_>, plan: &Plan) -> Result<Compressed> {
    without_blocks(BLOCK_INFLUENCE.name, task, plan)
}

/// Refuses models whose blocks are not additions to one residual stream.
pub(crate) fn removable(model: &Model, method: &str) -> Result<()> {
    for (index, block) in model.spec().expanded_blocks().iter().enumerate() {
        if !block.wiring.adds() {
            return Err(Error::invalid(
                format!("the wiring of block {index}"),
                block.wiring.name(),
                format!(
                    "pre-norm or parallel for {method}: only there a block is an addition to the \
                     residual stream; macro-influence and linearise take others"
                ),
            ));
        }
        if block.cross_attention.is_some() {
            return Err(Error::invalid(
                format!("block {index}"),
                "one with cross-attention",
                format!("one without for {method}"),
            ));
        }
    }
    Ok(())
}

/// Refuses models whose residual passes shortcuts: what a block turns by its shortcut is not told from
/// what it adds, and would go with it.
pub(crate) fn in_one_basis(model: &Model, method: &str) -> Result<()> {
    let blocks = model.spec().expanded_blocks();
    match blocks.iter().position(|block| block.shortcuts) {
        None => Ok(()),
        Some(index) => Err(Error::invalid(
            format!("block {index}"),
            "one with shortcuts",
            format!("one without for {method}: leave out first what is to go, then cut the stream"),
        )),
    }
}

/// How many blocks a budget takes out: the nearest number to its share.
pub(crate) fn removed_blocks(model: &Model, method: &str, budget: &Budget) -> Result<usize> {
    let blocks = model.spec().expanded_blocks().len();
    let removed = ((1.0 - budget.share(method)?) * blocks as f64).round() as usize;
    if removed >= blocks {
        return Err(Error::invalid(
            format!("number of blocks that {method} would leave out"),
            removed,
            format!("below {blocks}, all there are"),
        ));
    }
    Ok(removed)
}

/// Indices of the `count` least scores; of equal ones the first.
pub(crate) fn least(scores: &[f64], count: usize) -> BTreeSet<usize> {
    let mut order: Vec<(usize, f64)> = scores.iter().copied().enumerate().collect();
    order.sort_by(|a, b| a.1.total_cmp(&b.1));
    order
        .into_iter()
        .take(count)
        .map(|(index, _)| index)
        .collect()
}

/// A plan that leaves these blocks out.
pub(crate) fn plan_of(method: &str, model: &Model, removed: &BTreeSet<usize>) -> Plan {
    let width = model.spec().width;
    let blocks = model.spec().expanded_blocks().len();
    let modules = (0..blocks).map(|index| ModulePlan {
        path: format!("blocks.{index}"),
        input: width,
        output: width,
        change: match removed.contains(&index) {
            true => Change::Remove,
            false => Change::Leave {
                reason: "it has more influence than those that go".to_owned(),
            },
        },
    });
    Plan {
        method: method.to_owned(),
        modules: modules.collect(),
    }
}

/// Carries out a plan that leaves whole blocks out.
pub(crate) fn without_blocks(method: &str, task: &Task<'_>, plan: &Plan) -> Result<Compressed> {
    let mut removed = BTreeSet::new();
    let mut modules = Vec::new();
    let weights = block_weights(task.model);
    let width = task.model.spec().width;
    for planned in &plan.modules {
        let number = planned.path.strip_prefix("blocks.");
        let index: Option<usize> = number.and_then(|number| number.parse().ok());
        let found = index.and_then(|index| Some((index, *weights.get(index)?)));
        let (Some((index, before)), true) = (found, planned.input == width) else {
            return Err(planned.of_another_model());
        };
        let after = match planned.is_removed(method)? {
            true => {
                removed.insert(index);
                0
            }
            false => before,
        };
        modules.push(ModuleReport::new(planned, before, after));
    }
    let mut edit = Edit::of(task.model);
    edit.remove_blocks(&removed)?;
    Compressed::new(method, task, edit.finish()?, modules)
}

/// Parameters of each block.
pub(crate) fn block_weights(model: &Model) -> Vec<usize> {
    let mut weights = vec![0; model.spec().expanded_blocks().len()];
    for (name, tensor) in model.parameters() {
        if let Some((index, _)) = crate::edit::block_of(name)
            && let Some(weights) = weights.get_mut(index)
        {
            *weights += tensor.elem_count();
        }
    }
    weights
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_scores_go_first_and_ties_by_index() {
        let scores = [0.3, 0.1, 0.2, 0.1];
        assert_eq!(least(&scores, 2), BTreeSet::from([1, 3]));
        assert_eq!(least(&scores, 1), BTreeSet::from([1]));
        assert_eq!(least(&scores, 0), BTreeSet::new());
    }
}
