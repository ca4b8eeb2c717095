//! What a method could not take away of the share that it was asked for.

use std::collections::BTreeMap;
use std::fmt;

use lapidary_factor::rank;
use lapidary_parts::attention::MixerSpec;
use serde::Serialize;

use crate::Layer;
use crate::method::Task;
use crate::methods::{Pattern, Scope, channels};
use crate::plan::{Budget, Change, Plan};

/// A share that was asked for and not reached: there is a least of what a method leaves. That whole parts come
/// to a little less than a share is none.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Shortfall {
    /// Of what the shares are.
    pub of: &'static str,
    /// The share that was to go.
    pub asked: f64,
    /// The share that goes.
    pub taken: f64,
    /// What keeps the rest.
    pub why: String,
}

impl fmt::Display for Shortfall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            of,
            asked,
            taken,
            why,
        } = self;
        let [asked, taken] = [asked, taken].map(|share| 100.0 * share);
        write!(
            f,
            "of {of} {asked:.1} % were to go, and {taken:.1} % went: {why}"
        )
    }
}

/// What of a budget a plan does not reach, if it is a share.
pub(crate) fn shortfall(task: &Task<'_>, plan: &Plan, budget: &Budget) -> Option<Shortfall> {
    let Budget::Keep(keep) = *budget else {
        return None;
    };
    of_ranks(plan, keep)
        .or_else(|| of_zeros(task, plan, keep))
        .or_else(|| of_heads(task, plan, keep))
}

/// Of matrices that become factors: no rank is below 1.
fn of_ranks(plan: &Plan, keep: f64) -> Option<Shortfall> {
    let (mut whole, mut left, mut layers, mut least) = (0, 0, 0, 0);
    for module in &plan.modules {
        let Change::Factorise { rank } = module.change else {
            continue;
        };
        let weights = module.input * module.output;
        let factors = rank::parameters(module.input, module.output, rank);
        whole += weights;
        left += factors;
        layers += 1;
        least += usize::from(rank == 1 && factors as f64 > keep * weights as f64);
    }
    (least > 0 && left as f64 > keep * whole as f64 + 0.5).then(|| Shortfall {
        of: "the weights of its layers",
        asked: 1.0 - keep,
        taken: 1.0 - left as f64 / whole.max(1) as f64,
        why: format!("{least} of {layers} layers are at rank 1, the least there is"),
    })
}

/// Of single weights: some of each matrix stay.
fn of_zeros(task: &Task<'_>, plan: &Plan, keep: f64) -> Option<Shortfall> {
    let settings = task.settings().pruning;
    let dense: BTreeMap<String, usize> = Layer::all(task.model)
        .into_iter()
        .filter(|layer| layer.rank.is_none())
        .map(|layer| (layer.path.clone(), layer.weights()))
        .collect();
    let (mut whole, mut gone) = (0.0, 0.0);
    for module in &plan.modules {
        let Some(weights) = dense.get(&module.path) else {
            continue;
        };
        match module.change {
            Change::Prune { share } => gone += share * *weights as f64,
            Change::Leave { .. } => {}
            _ => return None,
        }
        whole += *weights as f64;
    }
    let asked = (1.0 - keep) * whole;
    // A pattern is the ratio, and less only where it does not divide a row.
    let reached = gone > asked - 1.0 || settings.pattern != Pattern::Unstructured;
    (gone > 0.0 && !reached).then(|| Shortfall {
        of: "the weights of its layers",
        asked: 1.0 - keep,
        taken: gone / whole,
        why: format!(
            "{} % of each matrix stay whatever the scores say (pruning.keep_at_least)",
            100.0 * settings.keep_at_least
        ),
    })
}

/// Of heads: each attention keeps one, or one group of those that read the same keys and values.
fn of_heads(task: &Task<'_>, plan: &Plan, keep: f64) -> Option<Shortfall> {
    let changed = plan
        .modules
        .iter()
        .filter_map(|module| match module.change {
            Change::FewerHeads { heads } => Some((module.path.as_str(), heads)),
            _ => None,
        });
    let changed: BTreeMap<&str, usize> = changed.collect();
    if changed.is_empty() {
        return None;
    }
    let (mut all, mut left, mut blocks) = (0, 0, 0);
    for (index, block) in task.model.spec().expanded_blocks().iter().enumerate() {
        let MixerSpec::MultiHead(spec) = &block.attention else {
            continue;
        };
        let groups = spec.groups();
        let each = (spec.heads / groups.max(1)).max(1);
        let heads = changed.get(channels::attention(index).as_str());
        all += groups;
        left += heads.map_or(groups, |heads| heads / each);
        blocks += 1;
    }
    // Half a group is what a share comes to that is no whole number, in all or in each block.
    let rounding = match task.settings().pruning.scope {
        None | Some(Scope::Global) => 0.5,
        Some(Scope::Layer | Scope::Row) => 0.5 * f64::from(blocks),
    };
    let asked = (1.0 - keep) * all as f64;
    let gone = all - left;
    (asked - gone as f64 > rounding + 1e-9).then(|| Shortfall {
        of: "the heads",
        asked: 1.0 - keep,
        taken: gone as f64 / all.max(1) as f64,
        why: "every attention keeps a head, or a group of those with the same keys and values"
            .to_owned(),
    })
}
