//! Replaces the most linear blocks by linear maps, or leaves them out (Razzhigaev et al. 2024,
//! Your Transformer is Secretly Linear, arXiv 2405.12250).
//!
//! With `X` and `Y` the residual stream before and behind a block, rows being tokens,
//!
//! ```text
//! score = 1 − min_{A,b} ‖X A + b − Y‖² / ‖Y − mean Y‖²
//! ```
//!
//! the share of the variance of `Y` that one linear map of `X` explains. The residual alone makes
//! it high. A block that is replaced becomes a block without mixer and norm whose feed-forward
//! part is the map `A − I` with the bias `b`. A plan may also ask for one map in place of several
//! blocks in a row.

use std::collections::BTreeMap;

use lapidary_factor::{Matrix, Regression, matrix_from_tensor, matrix_to_tensor};
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::Model;
use lapidary_parts::attention::MixerSpec;
use lapidary_parts::block::{BlockSpec, Wiring};
use lapidary_parts::feedforward::{FeedforwardSpec, LinearSpec};
use lapidary_parts::norm::NormSpec;

use crate::ahead::{Left, Refused};
use crate::edit::Edit;
use crate::error::engine;
use crate::method::{Effect, Method, Schedule, Settings, Task};
use crate::methods::block_influence::{
    block_weights, in_one_basis, least, plan_of, removable, removed_blocks, without_blocks,
};
use crate::observe::observe;
use crate::plan::{Budget, Change, Plan};
use crate::report::{Compressed, LayerErrors, ModuleReport};
use crate::{CalibrationData, Error, Requirements, Result};

/// Linear blocks in the list of methods.
pub(crate) const LINEARISE: Method = Method {
    name: "linearise",
    summary: "Replaces the most linear blocks by their least-squares maps",
    source: "Razzhigaev et al. 2024, arXiv 2405.12250",
    schedule: Schedule::OneShot,
    effect: Effect::Depth,
    observes: true,
    leaves: &[Left::Maps],
    refuses: |_| &[],
    requirements: |model: &Model, _: &Settings| {
        one_stream(model, LINEARISE.name)?;
        Ok(Requirements::default())
    },
    plan: |task, budget| {
        one_stream(task.model, LINEARISE.name)?;
        let mut plan = plan(LINEARISE.name, task, budget)?;
        for module in &mut plan.modules {
            if module.change == Change::Remove {
                module.change = Change::Linearise { blocks: 1 };
            }
        }
        Ok(plan)
    },
    apply: linearise,
    cut: None,
};

/// Linear blocks left out, in the list of methods.
pub(crate) const DELETE_LINEAR: Method = Method {
    name: "delete-linear",
    summary: "Leaves out the most linear blocks",
    source: "Razzhigaev et al. 2024, arXiv 2405.12250",
    schedule: Schedule::OneShot,
    effect: Effect::Depth,
    observes: true,
    leaves: &[],
    refuses: |_| &[Refused::Shortcuts],
    requirements: |model: &Model, _: &Settings| {
        removable(model, DELETE_LINEAR.name)?;
        in_one_basis(model, DELETE_LINEAR.name)?;
        Ok(Requirements::default())
    },
    plan: |task, budget| {
        removable(task.model, DELETE_LINEAR.name)?;
        plan(DELETE_LINEAR.name, task, budget)
    },
    apply: |task, plan| without_blocks(DELETE_LINEAR.name, task, plan),
    cut: None,
};

/// Blocks of any wiring read and write one stream, unless they read a memory too.
pub(crate) fn one_stream(model: &Model, method: &str) -> Result<()> {
    let blocks = model.spec().expanded_blocks();
    match blocks
        .iter()
        .position(|block| block.cross_attention.is_some())
    {
        None => Ok(()),
        Some(index) => Err(Error::invalid(
            format!("block {index}"),
            "one with cross-attention",
            format!("one without for {method}"),
        )),
    }
}

fn plan(name: &str, task: &Task<'_>, budget: &Budget) -> Result<Plan> {
    let count = removed_blocks(task.model, name, budget)?;
    let blocks = task.model.spec().expanded_blocks().len();
    let scores = match count {
        0 => vec![0.0; blocks],
        _ => linearity_scores(task.model, task.observed(name)?, task.settings().batch)?,
    };
    let bent: Vec<f64> = scores.iter().map(|score| 1.0 - score).collect();
    let mut plan = plan_of(name, task.model, &least(&bent, count));
    for (module, score) in plan.modules.iter_mut().zip(scores) {
        if let Change::Leave { reason } = &mut module.change {
            *reason = format!("its score is {score:.4}, less than of those that go");
        }
    }
    Ok(plan)
}

/// The share of the variance of what each block gives that a linear map of what it reads
/// explains, on the data itself; 1 for a block whose output does not vary.
///
/// # Errors
/// When there are not more tokens than features, where every score is 1.
pub fn linearity_scores(model: &Model, data: &CalibrationData, batch: usize) -> Result<Vec<f64>> {
    let blocks = 0..model.spec().expanded_blocks().len();
    let runs = blocks.map(|first| (first, 1));
    let sums = regressions(model, data, batch, &runs.collect())?;
    let score = |sums: &Regression| Ok(sums.explained(&sums.solve(0.0)?).unwrap_or(1.0));
    sums.values().map(score).collect()
}

/// The regression, by the first block, of what each run of blocks gives on what it reads; `runs`
/// has the number of blocks of each.
fn regressions(
    model: &Model,
    data: &CalibrationData,
    batch: usize,
    runs: &BTreeMap<usize, usize>,
) -> Result<BTreeMap<usize, Regression>> {
    let width = model.spec().width;
    let ends = |first: usize, blocks: usize| {
        let last = first + blocks - 1;
        [format!("blocks.{first}.in"), format!("blocks.{last}.out")]
    };
    let sites: Vec<String> = runs
        .iter()
        .flat_map(|(first, blocks)| ends(*first, *blocks))
        .collect();
    let fresh = |first: &usize| (*first, Regression::with_intercept(width, width));
    let mut sums: BTreeMap<usize, Regression> = runs.keys().map(fresh).collect();
    observe(model, data, batch, &sites, |seen| {
        for ((first, sums), blocks) in sums.iter_mut().zip(runs.values()) {
            let rows = |site: &str| -> Result<Matrix> {
                Ok(matrix_from_tensor("residual stream", seen.rows(site)?)?)
            };
            let [read, written] = ends(*first, *blocks);
            sums.add(rows(&read)?.as_ref(), rows(&written)?.as_ref())?;
        }
        Ok(())
    })?;
    match sums.values().map(Regression::rows).min() {
        Some(rows) if rows <= width + 1 => Err(Error::invalid(
            "tokens of the data",
            rows,
            format!("well above {width}, the width: with fewer every block is linear"),
        )),
        _ => Ok(sums),
    }
}

/// The runs of blocks that a plan makes one map of, by the first block, with their lengths.
fn runs_of(task: &Task<'_>, plan: &Plan, blocks: usize) -> Result<BTreeMap<usize, usize>> {
    let name = LINEARISE.name;
    let width = task.model.spec().width;
    let made_for = "one that was made for this model";
    if plan.modules.len() != blocks {
        let found = format!("for {} blocks", plan.modules.len());
        return Err(Error::invalid("plan", found, made_for));
    }
    let mut runs = BTreeMap::new();
    let mut end = 0;
    for (index, planned) in plan.modules.iter().enumerate() {
        if planned.path != format!("blocks.{index}") || planned.input != width {
            return Err(planned.of_another_model());
        }
        match (&planned.change, index < end) {
            (Change::Linearise { blocks: count }, false)
                if (1..=blocks - index).contains(count) =>
            {
                runs.insert(index, *count);
                end = index + count;
            }
            (Change::Leave { .. }, false) | (Change::Remove, true) => {}
            (other, inside) => {
                return Err(Error::invalid(
                    format!("change of {} in a plan of {name}", planned.path),
                    format!("{other:?}"),
                    match inside {
                        true => "remove: it belongs to a run that has a map",
                        false => "a linear map for blocks that there are, or leave",
                    },
                ));
            }
        }
    }
    Ok(runs)
}

fn linearise(task: &Task<'_>, plan: &Plan) -> Result<Compressed> {
    let name = LINEARISE.name;
    let weights = block_weights(task.model);
    let width = task.model.spec().width;
    let runs = runs_of(task, plan, weights.len())?;
    let sums = match runs.is_empty() {
        true => BTreeMap::new(),
        false => regressions(
            task.model,
            task.observed(name)?,
            task.settings().batch,
            &runs,
        )?,
    };
    let mut edit = Edit::of(task.model);
    let mut modules = Vec::new();
    for (index, (planned, before)) in plan.modules.iter().zip(&weights).enumerate() {
        let Some(sums) = sums.get(&index) else {
            let left = if planned.change == Change::Remove {
                0
            } else {
                *before
            };
            modules.push(ModuleReport::new(planned, *before, left));
            continue;
        };
        let map = sums.solve(0.0)?;
        put_map(&mut edit, index, &map)?;
        let missed = sums
            .explained(&map)
            .map_or(0.0, |score| (1.0 - score).max(0.0).sqrt());
        let mut module = ModuleReport::new(planned, *before, width * width + width);
        module.chosen = Some(LayerErrors {
            weighted: missed,
            unweighted: missed,
            predicted_loss_rise: None,
        });
        modules.push(module);
    }
    let gone = runs
        .iter()
        .flat_map(|(first, blocks)| first + 1..first + blocks);
    edit.remove_blocks(&gone.collect())?;
    Compressed::new(name, task, edit.finish()?, modules)
}

/// Makes a block the map `x A + b`.
fn put_map(edit: &mut Edit, index: usize, map: &lapidary_factor::AffineMap) -> Result<()> {
    *edit.block(index)? = BlockSpec {
        repeat: 1,
        wiring: Wiring::PreNorm,
        norm: NormSpec::None,
        attention: MixerSpec::Absent,
        cross_attention: None,
        shared: false,
        layer_scale: None,
        drop_path: 0.0,
        dropout_by_feature: false,
        coding_step: None,
        shortcuts: false,
        feedforward: Some(FeedforwardSpec::Linear(LinearSpec { bias: true })),
        dropout: 0.0,
    };
    let device = edit.device();
    edit.remove_parameters(&format!("blocks.{index}"));
    let width = map.weight.nrows();
    // Beside the residual the map is A − I; weights are stored [output, input].
    let beside = &map.weight - Matrix::identity(width, width);
    let weight = matrix_to_tensor(beside.transpose(), DType::F64, &Device::Cpu)?;
    let bias = engine(Tensor::from_slice(&map.bias, width, &Device::Cpu))?;
    let path = format!("blocks.{index}.feedforward.map");
    edit.put(
        format!("{path}.weight"),
        &engine(weight.to_device(&device))?,
    )?;
    edit.put(format!("{path}.bias"), &engine(bias.to_device(&device))?)
}
