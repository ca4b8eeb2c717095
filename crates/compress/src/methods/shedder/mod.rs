//! Leaves out, one after another, the pieces without which perplexity is least (Mamba-Shedder:
//! Muñoz, Yuan & Jain 2025, arXiv 2501.17088): mixers and feed-forward parts, groups of hidden
//! features, or the scans of selective recurrences alone.
//!
//! ```text
//! S ← ∅;   repeat:  c* = argmin_{c ∉ S} perplexity(model without S ∪ {c});   S ← S ∪ {c*}
//! ```
//!
//! Every candidate is measured together with all that is gone already, `M − t` of them at step
//! `t`. A block of nothing but a mixer goes as a whole; of others the mixer and the feed-forward
//! part are candidates of their own, so that a hybrid's recurrences, attention and feed-forward
//! parts compete. Hidden features go in groups, one from the end of some feed-forward part at a step:
//! they are ordered by `‖gate row‖₁ + ‖up row‖₁`, as the published program does. Without its scan a
//! recurrence passes on what its convolution gives; of a Mamba-2 mixer the rows of the projection and
//! the channels of the convolution that only the scan read go with it.

mod pieces;
mod search;

pub use pieces::Shed;
pub use search::{Granularities, Search, SearchStep};

use std::collections::{BTreeMap, BTreeSet};

use lapidary_model::Model;
use lapidary_parts::block::BlockSpec;
use serde::{Deserialize, Serialize};

use self::pieces::{Cut, channels_of, parts, scans, weights_of, weights_of_feature};
use crate::ahead::Refused;
use crate::method::{Effect, Method, Schedule, Settings, Task};
use crate::methods::attention_cosine::removed_of;
use crate::methods::block_influence::{in_one_basis, removable};
use crate::methods::channels::{feedforward, planned_features};
use crate::plan::{Budget, Change, ModulePlan, Plan};
use crate::quality::predicts;
use crate::report::{Compressed, ModuleReport};
use crate::{Error, Requirements, Result};

/// Shedding of parts in the list of methods.
pub(crate) const MAMBA_SHEDDER: Method = Method {
    name: "mamba-shedder",
    summary: "Leaves out, greedily by perplexity, mixers and feed-forward parts",
    source: "Muñoz, Yuan & Jain 2025, arXiv 2501.17088",
    schedule: Schedule::Iterative,
    effect: Effect::Depth,
    observes: true,
    leaves: &[],
    refuses: |_| &[Refused::Shortcuts],
    requirements: |model, settings| requirements(MAMBA_SHEDDER.name, model, settings, whole_parts),
    plan: |task, budget| plan(MAMBA_SHEDDER.name, task, budget, whole_parts),
    apply: |task, plan| apply(MAMBA_SHEDDER.name, task, plan),
    cut: None,
};

/// Shedding of scans in the list of methods.
pub(crate) const MAMBA_SHEDDER_SCAN: Method = Method {
    name: "mamba-shedder-scan",
    summary: "Leaves out, greedily by perplexity, the scans of selective recurrences",
    source: "Muñoz, Yuan & Jain 2025, arXiv 2501.17088",
    schedule: Schedule::Iterative,
    effect: Effect::Depth,
    observes: true,
    leaves: &[],
    refuses: |_| &[],
    requirements: |model, settings| {
        requirements(MAMBA_SHEDDER_SCAN.name, model, settings, of_scans)
    },
    plan: |task, budget| plan(MAMBA_SHEDDER_SCAN.name, task, budget, of_scans),
    apply: |task, plan| apply(MAMBA_SHEDDER_SCAN.name, task, plan),
    cut: None,
};

/// Shedding of hidden features in the list of methods. Groups of them are pieces as parts and scans
/// are, and go between the two.
pub(crate) const MAMBA_SHEDDER_WIDTH: Method = Method {
    name: "mamba-shedder-width",
    summary: "Leaves out, greedily by perplexity, groups of feed-forward features",
    source: "Muñoz, Yuan & Jain 2025, arXiv 2501.17088",
    schedule: Schedule::Iterative,
    effect: Effect::Depth,
    observes: true,
    leaves: &[],
    refuses: |_| &[Refused::Factors("feedforward")],
    requirements: |model, settings| requirements(MAMBA_SHEDDER_WIDTH.name, model, settings, groups),
    plan: |task, budget| plan(MAMBA_SHEDDER_WIDTH.name, task, budget, groups),
    apply: |task, plan| apply(MAMBA_SHEDDER_WIDTH.name, task, plan),
    cut: None,
};

/// How feed-forward parts are narrowed by `mamba-shedder-width`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ShedderSettings {
    /// Hidden features that go at a step; a tenth of each part's when absent, as published for
    /// Zamba2-2.7B (1024 of 10240).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub channel_group: Option<usize>,
}

/// The candidates of a method.
type Candidates = fn(&[BlockSpec], &Settings) -> Result<Vec<Shed>>;

fn whole_parts(blocks: &[BlockSpec], _: &Settings) -> Result<Vec<Shed>> {
    Ok(parts(blocks))
}

fn of_scans(blocks: &[BlockSpec], _: &Settings) -> Result<Vec<Shed>> {
    Ok(scans(blocks))
}

fn groups(blocks: &[BlockSpec], settings: &Settings) -> Result<Vec<Shed>> {
    channels_of(blocks, settings.shedder.channel_group)
}

fn requirements(
    name: &str,
    model: &Model,
    settings: &Settings,
    candidates: Candidates,
) -> Result<Requirements> {
    removable(model, name)?;
    if !predicts(model) {
        return Err(Error::invalid(
            "the model",
            "not a causal language model",
            format!(
                "one for {name}, which goes by perplexity; block-influence leaves out blocks of others"
            ),
        ));
    }
    let found = candidates(&model.spec().expanded_blocks(), settings)?;
    // A feed-forward part's shortcut goes with it, and both with a block of which nothing is left.
    let part = |piece: &Shed| matches!(piece, Shed::Mixer(_) | Shed::Feedforward(_));
    if found.iter().any(part) {
        in_one_basis(model, name)?;
    }
    if found.is_empty() {
        return Err(Error::invalid(
            format!("pieces that {name} can leave out"),
            0,
            "at least 1: mamba-shedder-scan takes models with selective recurrences, \
             mamba-shedder-width feed-forward parts with hidden features, and mamba-shedder all; \
             block-influence leaves out whole blocks",
        ));
    }
    Ok(Requirements::default())
}

fn plan(name: &str, task: &Task<'_>, budget: &Budget, candidates: Candidates) -> Result<Plan> {
    let settings = task.settings();
    requirements(name, task.model, &settings, candidates)?;
    let blocks = task.model.spec().expanded_blocks();
    let candidates = candidates(&blocks, &settings)?;
    let search = match removed_of(candidates.len(), name, budget)? {
        0 => Search::default(),
        steps => {
            let data = task.observed(name)?;
            Search::run(task.model, data, settings.batch, &candidates, steps)?
        }
    };
    let cut = Cut::of(&blocks, &search.shed());
    let width = task.model.spec().width;
    let modules = modules(&candidates)
        .into_iter()
        .map(|(path, piece)| ModulePlan {
            path,
            input: width,
            output: width,
            change: change(piece, &cut),
        });
    Ok(Plan {
        method: name.to_owned(),
        modules: modules.collect(),
    })
}

/// What a plan speaks of: each piece, and all groups of a feed-forward part together.
fn modules(candidates: &[Shed]) -> Vec<(String, Shed)> {
    let named = |piece: &Shed| match *piece {
        Shed::Channels { group, .. } if group > 0 => None,
        Shed::Channels { block, .. } => Some((feedforward(block), *piece)),
        Shed::Mixer(_) | Shed::Feedforward(_) | Shed::Scan(_) => Some((piece.to_string(), *piece)),
    };
    candidates.iter().filter_map(named).collect()
}

fn change(piece: Shed, cut: &Cut) -> Change {
    let left = cut.features.get(&piece.block());
    match (piece, left) {
        (Shed::Channels { .. }, Some(features)) => Change::Narrow {
            features: *features,
        },
        _ if cut.gone.contains(&piece) => Change::Remove,
        _ => Change::Leave {
            reason: "perplexity rises more without it".to_owned(),
        },
    }
}

/// A plan may mix parts, hidden features and scans, whichever search made it.
fn apply(name: &str, task: &Task<'_>, plan: &Plan) -> Result<Compressed> {
    plan.check_once()?;
    removable(task.model, name)?;
    let blocks = task.model.spec().expanded_blocks();
    let mut known = parts(&blocks);
    known.extend(scans(&blocks));
    let known: BTreeMap<String, Shed> = known
        .into_iter()
        .map(|piece| (piece.to_string(), piece))
        .collect();
    let width = task.model.spec().width;
    let mut cut = Cut::default();
    let mut modules = Vec::new();
    let leaves = planned_removals(plan);
    for planned in &plan.modules {
        let (Some(piece), true) = (known.get(&planned.path), planned.input == width) else {
            return Err(planned.of_another_model());
        };
        let before = match piece {
            // What goes with its mixer is counted there.
            Shed::Scan(block) if leaves.contains(Shed::Mixer(*block).to_string().as_str()) => 0,
            _ => weights_of(task.model, *piece),
        };
        let after = match (&planned.change, piece) {
            (Change::Remove, _) => {
                cut.gone.insert(*piece);
                0
            }
            (Change::Leave { .. }, _) => before,
            (Change::Narrow { .. }, Shed::Feedforward(index)) => {
                let lost = narrowed(task.model, &blocks, *index, planned, &mut cut)?;
                before.saturating_sub(lost)
            }
            (other, _) => {
                return Err(Error::invalid(
                    format!("change of {} in a plan of {name}", planned.path),
                    format!("{other:?}"),
                    "remove or leave, or narrow a feed-forward part",
                ));
            }
        };
        modules.push(ModuleReport::new(planned, before, after));
    }
    Compressed::new(name, task, cut.apply(task.model)?, modules)
}

/// Paths of what a plan leaves out.
fn planned_removals(plan: &Plan) -> BTreeSet<&str> {
    let removed = plan
        .modules
        .iter()
        .filter(|planned| planned.change == Change::Remove);
    removed.map(|planned| planned.path.as_str()).collect()
}

/// Writes down how many hidden features a feed-forward part keeps; the parameters that it loses.
fn narrowed(
    model: &Model,
    blocks: &[BlockSpec],
    index: usize,
    planned: &ModulePlan,
    cut: &mut Cut,
) -> Result<usize> {
    let Some((block, part)) = blocks
        .get(index)
        .and_then(|block| Some((block, block.feedforward.as_ref()?)))
    else {
        return Ok(0);
    };
    let hidden = part.hidden();
    let Some(features) = planned_features(planned, hidden)? else {
        return Ok(0);
    };
    cut.features.insert(index, features);
    Ok((hidden - features) * weights_of_feature(model, index, block))
}
