//! Leaves out the attention that turns the residual stream least (He et al. 2024, What Matters in
//! Transformers? Not All Attention is Needed, arXiv 2406.15786); the feed-forward part of the
//! block stays.
//!
//! ```text
//! score_l = 1 − E[cos(x_l, x_l + A_l(x_l))]
//! ```
//!
//! over real tokens. And what methods share that leave out attention.

use std::collections::BTreeSet;

use lapidary_kernels::{D, DType, Tensor};
use lapidary_model::Model;
use lapidary_parts::attention::MixerSpec;
use lapidary_parts::block::BlockSpec;

use crate::ahead::{Left, Refused};
use crate::edit::Edit;
use crate::error::engine;
use crate::method::{Effect, Method, Schedule, Settings, Task};
use crate::methods::block_influence::{in_one_basis, least, removable};
use crate::observe::observe;
use crate::plan::{Budget, Change, ModulePlan, Plan};
use crate::report::{Compressed, ModuleReport};
use crate::{CalibrationData, Error, Requirements, Result};

/// Attention by its angle in the list of methods.
pub(crate) const ATTENTION_COSINE: Method = Method {
    name: "attention-cosine",
    summary: "Leaves out the attention that turns the stream least; feed-forward parts stay",
    source: "He et al. 2024, arXiv 2406.15786",
    schedule: Schedule::OneShot,
    effect: Effect::Depth,
    observes: true,
    leaves: &[Left::Gaps],
    refuses: |_| &[Refused::Shortcuts],
    requirements,
    plan,
    apply: |task, plan| without_attention(ATTENTION_COSINE.name, task, plan),
    cut: None,
};

/// Below this length a vector turns nothing.
const SHORTEST: f64 = 1e-30;

fn requirements(model: &Model, _: &Settings) -> Result<Requirements> {
    attentions(model, ATTENTION_COSINE.name)?;
    Ok(Requirements::default())
}

/// Whether a block has attention, and something else that is left of it without.
pub(crate) fn has_attention(block: &BlockSpec) -> bool {
    matches!(block.attention, MixerSpec::MultiHead(_)) && block.feedforward.is_some()
}

/// The site of what the attention of `block` adds to the stream: what it writes, behind the block's
/// scale of features where it has one.
pub(crate) fn attention_added(index: usize, block: &BlockSpec) -> String {
    let site = match block.layer_scale {
        Some(_) => "scaled",
        None => "out",
    };
    format!("blocks.{index}.attention.{site}")
}

/// The blocks whose attention can go.
///
/// # Errors
/// When there are none, or the model is none whose parts are additions to one stream.
pub(crate) fn attentions(model: &Model, method: &str) -> Result<Vec<usize>> {
    removable(model, method)?;
    in_one_basis(model, method)?;
    let blocks = model.spec().expanded_blocks();
    let blocks: Vec<usize> = blocks
        .iter()
        .enumerate()
        .filter_map(|(index, block)| has_attention(block).then_some(index))
        .collect();
    if blocks.is_empty() {
        return Err(Error::invalid(
            "blocks with attention beside a feed-forward part",
            0,
            format!("at least 1 for {method}; mamba-shedder leaves out other mixers"),
        ));
    }
    Ok(blocks)
}

/// How many of `candidates` a budget takes out.
pub(crate) fn removed_of(candidates: usize, method: &str, budget: &Budget) -> Result<usize> {
    Ok(((1.0 - budget.share(method)?) * candidates as f64).round() as usize)
}

/// `1 − E[cos(x, x + A(x))]` of each of `blocks`.
pub(crate) fn turns(
    model: &Model,
    data: &CalibrationData,
    batch: usize,
    blocks: &[usize],
) -> Result<Vec<f64>> {
    let specs = model.spec().expanded_blocks();
    let sites: Vec<[String; 2]> = blocks
        .iter()
        .filter_map(|index| Some((index, specs.get(*index)?)))
        .map(|(index, block)| [format!("blocks.{index}.in"), attention_added(*index, block)])
        .collect();
    let (mut sums, mut rows) = (vec![0.0; blocks.len()], 0);
    observe(model, data, batch, &sites.concat(), |seen| {
        for ([entering, added], sum) in sites.iter().zip(&mut sums) {
            let exact = |site: &str| -> Result<_> { engine(seen.rows(site)?.to_dtype(DType::F64)) };
            let before = exact(entering)?;
            let behind = engine(&before + exact(added)?)?;
            let dot = |x: &Tensor, y: &Tensor| engine(engine(x * y)?.sum(D::Minus1));
            let squares = engine(dot(&before, &before)? * dot(&behind, &behind)?)?;
            let lengths = engine(engine(squares.sqrt())?.maximum(SHORTEST))?;
            let cosines = engine(dot(&before, &behind)? / lengths)?;
            *sum += engine(engine(cosines.sum_all())?.to_scalar::<f64>())?;
        }
        rows += seen.lengths.iter().sum::<usize>();
        Ok(())
    })?;
    Ok(sums
        .iter()
        .map(|sum| 1.0 - sum / rows.max(1) as f64)
        .collect())
}

fn plan(task: &Task<'_>, budget: &Budget) -> Result<Plan> {
    let name = ATTENTION_COSINE.name;
    let blocks = attentions(task.model, name)?;
    let count = removed_of(blocks.len(), name, budget)?;
    let scores = match count {
        0 => vec![0.0; blocks.len()],
        _ => turns(
            task.model,
            task.observed(name)?,
            task.settings().batch,
            &blocks,
        )?,
    };
    let removed: BTreeSet<usize> = least(&scores, count)
        .into_iter()
        .filter_map(|place| blocks.get(place).copied())
        .collect();
    let reason = "it turns the stream more than those that go";
    Ok(attention_plan(name, task.model, &blocks, &removed, |_| {
        reason.to_owned()
    }))
}

/// A plan over the attention of `blocks`, those of `removed` left out.
pub(crate) fn attention_plan(
    method: &str,
    model: &Model,
    blocks: &[usize],
    removed: &BTreeSet<usize>,
    reason: impl Fn(usize) -> String,
) -> Plan {
    let width = model.spec().width;
    let modules = blocks.iter().map(|index| ModulePlan {
        path: format!("blocks.{index}.attention"),
        input: width,
        output: width,
        change: match removed.contains(index) {
            true => Change::Remove,
            false => Change::Leave {
                reason: reason(*index),
            },
        },
    });
    Plan {
        method: method.to_owned(),
        modules: modules.collect(),
    }
}

/// Carries out a plan that leaves out attention.
pub(crate) fn without_attention(method: &str, task: &Task<'_>, plan: &Plan) -> Result<Compressed> {
    let candidates = attentions(task.model, method)?;
    let width = task.model.spec().width;
    let mut edit = Edit::of(task.model);
    let mut modules = Vec::new();
    for planned in &plan.modules {
        let here = |index: &&usize| planned.path == format!("blocks.{index}.attention");
        let (Some(index), true) = (candidates.iter().find(here), planned.input == width) else {
            return Err(planned.of_another_model());
        };
        let before = weights_below(task.model, &planned.path);
        let after = match planned.is_removed(method)? {
            true => {
                edit.remove_mixer(*index)?;
                0
            }
            false => before,
        };
        modules.push(ModuleReport::new(planned, before, after));
    }
    Compressed::new(method, task, edit.finish()?, modules)
}

/// Parameters of the part at `path` and of the norm before it.
pub(crate) fn weights_below(model: &Model, path: &str) -> usize {
    let below = |name: &&String| {
        name.strip_prefix(path).is_some_and(|rest| {
            [".", "_norm.", "_scale."]
                .iter()
                .any(|own| rest.starts_with(own))
        })
    };
    let parameters = model.parameters().iter();
    parameters
        .filter(|(name, _)| below(name))
        .map(|(_, tensor)| tensor.elem_count())
        .sum()
}
