//! What can become of each group of matrices, and what that costs.

use std::collections::{BTreeMap, BTreeSet};

use lapidary_model::Model;
use lapidary_search::{Domain, Point};
use serde::{Deserialize, Serialize};

use super::methods::{leaves_out_blocks, not_mixed};
use super::{AutomaticSettings, Mix};
use crate::edit::block_of;
use crate::method::{Method, Schedule, Task};
use crate::methods::block_influence::block_weights;
use crate::methods::channels::Unit;
use crate::plan::{Budget, Change, ModulePlan, Plan};
use crate::{Error, Result};

/// Shares at which a method is asked for its plan.
const SHARES: usize = 64;

/// Of so many shares one is asked for where each plan takes a search over the data. What is searched
/// for are groups of features, which are coarse by themselves.
const SEARCHED: usize = 8;

/// Matrices of a block that are cut by one method to one density.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Group {
    /// Queries and keys.
    QueryKey,
    /// Values and the output of attention.
    ValueOutput,
    /// Whatever else mixes tokens.
    Mixer,
    /// The feed-forward part.
    Feedforward,
}

impl Group {
    /// The block and group of a module, when it is in a block.
    fn of(path: &str) -> Option<(usize, Self)> {
        let (block, rest) = block_of(path)?;
        let group = match rest {
            "attention.query" | "attention.key" => Self::QueryKey,
            "attention.value" | "attention.output" => Self::ValueOutput,
            _ if rest.starts_with("feedforward") => Self::Feedforward,
            _ => Self::Mixer,
        };
        Some((block, group))
    }
}

/// One thing that a method can make of a group.
#[derive(Clone, Debug)]
pub(super) struct Step {
    /// The modules that change.
    pub(super) modules: Vec<ModulePlan>,
    /// Parameters that it saves.
    pub(super) saved: usize,
}

/// All that a method can make of a group, the most that it saves first; the last saves nothing.
#[derive(Clone, Debug)]
pub(super) struct Way {
    pub(super) method: &'static str,
    pub(super) steps: Vec<Step>,
}

/// One group of one block.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub(super) block: usize,
    /// Weights of its matrices.
    pub(super) weights: usize,
    /// At least one.
    pub(super) ways: Vec<Way>,
}

/// Everything that a mix is put together from.
#[derive(Clone, Debug)]
pub(super) struct Candidates {
    pub(super) places: Vec<Place>,
    /// The depth method, and the blocks that go when none, one, .. may.
    pub(super) depth: Option<(&'static str, Vec<Plan>)>,
    pub(super) block_weights: Vec<usize>,
    /// Parameters of the original.
    pub(super) whole: usize,
    /// Parameters that may be left.
    pub(super) limit: usize,
    pub(super) left_out: Vec<(String, String)>,
}

/// A point of the search, in the terms of the model.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Proposal {
    /// Blocks that go.
    pub(super) removed: usize,
    /// Of each place, its density among the others'.
    pub(super) densities: Vec<f64>,
    /// Of each place, which of its ways.
    pub(super) ways: Vec<usize>,
}

impl Candidates {
    pub(super) fn new(
        task: &Task<'_>,
        methods: &[&'static Method],
        mut left_out: Vec<(String, String)>,
        settings: &AutomaticSettings,
    ) -> Result<Self> {
        let model = task.model;
        let mut depth: Option<(&'static str, Vec<Plan>)> = None;
        let mut ways: BTreeMap<(usize, Group), Vec<Way>> = BTreeMap::new();
        for method in methods {
            let removals = match leaves_out_blocks(method) {
                true => removals(task, method, settings.removable),
                false => Vec::new(),
            };
            if !removals.is_empty() {
                depth = Some((method.name, removals));
                continue;
            }
            match of_method(task, method) {
                Ok(found) => {
                    for (place, way) in found {
                        ways.entry(place).or_default().push(way);
                    }
                }
                Err(error) => left_out.push((method.name.to_owned(), error.to_string())),
            }
        }
        let mut candidates = Self {
            places: ways
                .into_iter()
                .map(|((block, group), ways)| Place {
                    block,
                    weights: group_weights(model, block, group),
                    ways,
                })
                .collect(),
            depth,
            block_weights: block_weights(model),
            whole: model.parameter_count(),
            limit: settings.parameters,
            left_out,
        };
        candidates.check()?;
        candidates.keep_useful_removals();
        Ok(candidates)
    }

    /// Refuses a budget that some choice of methods could not meet.
    fn check(&self) -> Result<()> {
        if self.places.is_empty() {
            let reasons = self.left_out.iter();
            let reasons: Vec<String> = reasons
                .map(|(method, reason)| format!("{method}: {reason}"))
                .collect();
            let found = match &self.depth {
                Some((name, _)) => format!("{name} alone, which leaves out whole blocks"),
                None => "none that can be mixed for this model".to_owned(),
            };
            return Err(Error::invalid(
                "methods to mix",
                match reasons.is_empty() {
                    true => found,
                    false => format!("{found} ({})", reasons.join("; ")),
                },
                "with at least one that factorises or narrows modules, by which a budget is met",
            ));
        }
        let saved = |place: &Place| {
            let most = place.ways.iter().filter_map(|way| way.steps.first());
            most.map(|step| step.saved).min().unwrap_or(0)
        };
        let least = self.whole - self.places.iter().map(saved).sum::<usize>();
        if self.limit < least {
            return Err(Error::invalid(
                "parameters that may be left",
                self.limit,
                format!(
                    "at least {least} of {}, which every choice of methods can reach",
                    self.whole
                ),
            ));
        }
        Ok(())
    }

    /// Removals that leave less than the budget would waste it; the first that does may be all that
    /// there is.
    fn keep_useful_removals(&mut self) {
        let Some((name, plans)) = self.depth.take() else {
            return;
        };
        let useful = |plan: &Plan| self.whole - self.removed_weights(plan) >= self.limit;
        let kept = plans.into_iter().take_while(useful).collect();
        self.depth = Some((name, kept));
    }

    pub(super) fn removed_weights(&self, plan: &Plan) -> usize {
        let blocks = removed_blocks(plan);
        let weights = blocks
            .iter()
            .filter_map(|block| self.block_weights.get(*block));
        weights.sum()
    }

    /// Coordinates: blocks left out, then the density of each place, then the way of each place
    /// that has several.
    pub(super) fn domain(&self, settings: &AutomaticSettings) -> Result<Domain> {
        let steps = |count: usize| (0..count).map(|step| step as f64).collect::<Vec<f64>>();
        // From half to double, even in the logarithm.
        let last = settings.levels.saturating_sub(1).max(1) as f64;
        let levels: Vec<f64> = (0..settings.levels)
            .map(|level| (2.0 * level as f64 / last - 1.0).exp2())
            .collect();
        let mut grids = vec![steps(
            self.depth.as_ref().map_or(0, |(_, plans)| plans.len()) + 1,
        )];
        grids.extend(self.places.iter().map(|_| levels.clone()));
        grids.extend(self.contested().map(|place| steps(place.ways.len())));
        Ok(Domain::new(grids)?)
    }

    fn contested(&self) -> impl Iterator<Item = &Place> {
        self.places.iter().filter(|place| place.ways.len() > 1)
    }

    pub(super) fn proposal(&self, values: &[f64]) -> Proposal {
        let mut values = values.iter().copied();
        let removed = values.next().unwrap_or(0.0) as usize;
        let densities = values.by_ref().take(self.places.len()).collect();
        let ways = self
            .places
            .iter()
            .map(|place| match place.ways.len() {
                0 | 1 => 0,
                _ => values.next().unwrap_or(0.0) as usize,
            })
            .collect();
        Proposal {
            removed,
            densities,
            ways,
        }
    }

    /// Methods that some place can be cut by, in the order of their names.
    fn methods(&self) -> BTreeSet<&'static str> {
        let ways = self.places.iter().flat_map(|place| &place.ways);
        ways.map(|way| way.method).collect()
    }

    pub(super) fn start_names(&self) -> Vec<String> {
        self.uniform().into_iter().map(|(name, _)| name).collect()
    }

    /// The uniform mixes, no two of them the same.
    pub(super) fn starts(&self, settings: &AutomaticSettings) -> Vec<Point> {
        let start = |ways: Vec<usize>| -> Point {
            let densities = self.places.iter().map(|_| settings.levels / 2);
            std::iter::once(0).chain(densities).chain(ways).collect()
        };
        let uniform = self.uniform().into_iter();
        uniform.map(|(_, ways)| start(ways)).collect()
    }

    /// Names and ways of the uniform mixes: of each method, where it can be used, and the first of the
    /// others elsewhere. Methods that cut different places may have one and the same.
    fn uniform(&self) -> Vec<(String, Vec<usize>)> {
        let mut uniform: Vec<(String, Vec<usize>)> = Vec::new();
        for method in self.methods() {
            let ways = self.contested().map(|place| {
                let found = place.ways.iter().position(|way| way.method == method);
                found.unwrap_or(0)
            });
            let ways: Vec<usize> = ways.collect();
            match uniform.iter_mut().find(|(_, known)| *known == ways) {
                Some((name, _)) => *name += &format!(" and {method}"),
                None => uniform.push((format!("uniform {method}"), ways)),
            }
        }
        uniform
    }

    /// The mix that a proposal comes to under the budget.
    pub(super) fn projected(&self, proposal: &Proposal) -> Mix {
        let removal = proposal
            .removed
            .checked_sub(1)
            .and_then(|index| self.depth.as_ref()?.1.get(index));
        let chosen = self.steps_of(proposal, removal);
        let mut by_method: BTreeMap<&str, Vec<ModulePlan>> = BTreeMap::new();
        let mut parameters = self.whole - removal.map_or(0, |plan| self.removed_weights(plan));
        for (method, step) in chosen {
            parameters -= step.saved;
            let modules = by_method.entry(method).or_default();
            modules.extend(step.modules.iter().cloned());
        }
        let plans = by_method
            .into_iter()
            .filter(|(_, modules)| !modules.is_empty())
            .map(|(method, modules)| Plan {
                method: method.to_owned(),
                modules,
            })
            .chain(removal.cloned());
        Mix {
            plans: plans.collect(),
            parameters,
        }
    }
}

/// The blocks that a plan leaves out.
pub(super) fn removed_blocks(plan: &Plan) -> BTreeSet<usize> {
    let removed = plan
        .modules
        .iter()
        .filter(|module| module.change == Change::Remove);
    removed
        .filter_map(|module| block_number(&module.path))
        .collect()
}

fn block_number(path: &str) -> Option<usize> {
    path.strip_prefix("blocks.")?.parse().ok()
}

/// Plans that leave out one block, two, .. at most `most`; none of a method that leaves out none.
fn removals(task: &Task<'_>, method: &Method, most: usize) -> Vec<Plan> {
    let blocks = task.model.spec().expanded_blocks().len();
    let plan = |count: usize| {
        let keep = 1.0 - count as f64 / blocks as f64;
        let mut plan = method.plan(task, &Budget::Keep(keep)).ok()?;
        plan.modules
            .retain(|module| module.change == Change::Remove);
        let whole = plan
            .modules
            .iter()
            .all(|module| block_number(&module.path).is_some());
        (whole && plan.modules.len() == count).then_some(plan)
    };
    (1..=most.min(blocks.saturating_sub(1)))
        .map_while(plan)
        .collect()
}

/// What a method can make of each group, from its plans at rising shares.
fn of_method(task: &Task<'_>, method: &'static Method) -> Result<Vec<((usize, Group), Way)>> {
    let mut steps: BTreeMap<(usize, Group), Vec<Step>> = BTreeMap::new();
    let (mut failure, mut changed) = (None, false);
    let every = match method.schedule {
        Schedule::Iterative => SEARCHED,
        Schedule::OneShot | Schedule::LayerByLayer | Schedule::Training => 1,
    };
    for share in (1..=SHARES).step_by(every) {
        let keep = share as f64 / SHARES as f64;
        let plan = match method.plan(task, &Budget::Keep(keep)) {
            Ok(plan) => plan,
            Err(error) => {
                failure = Some(error);
                continue;
            }
        };
        let leaves = |planned: &ModulePlan| matches!(planned.change, Change::Leave { .. });
        changed |= !plan.modules.iter().all(leaves);
        let mut here: BTreeMap<(usize, Group), Step> = BTreeMap::new();
        for planned in plan.modules {
            let (Some(place), Some(saved)) =
                (Group::of(&planned.path), saved(task.model, &planned))
            else {
                continue;
            };
            let step = here.entry(place).or_insert(Step {
                modules: Vec::new(),
                saved: 0,
            });
            step.saved += saved;
            step.modules.push(planned);
        }
        for (place, step) in here {
            steps.entry(place).or_default().push(step);
        }
    }
    let ways: Vec<_> = steps
        .into_iter()
        .map(|(place, mut steps)| {
            steps.push(Step {
                modules: Vec::new(),
                saved: 0,
            });
            steps.sort_by_key(|step| std::cmp::Reverse(step.saved));
            steps.dedup_by_key(|step| step.saved);
            let method = method.name;
            (place, Way { method, steps })
        })
        .filter(|(_, way)| way.steps.len() > 1)
        .collect();
    match (ways.is_empty(), failure) {
        (false, _) => Ok(ways),
        // What it changes is no reason where a plan changed nothing.
        (true, Some(error)) if !changed => Err(error),
        (true, _) => Err(not_mixed(method)),
    }
}

/// Parameters that a planned change saves; nothing of changes that are not mixed.
fn saved(model: &Model, planned: &ModulePlan) -> Option<usize> {
    match planned.change {
        Change::Factorise { .. } | Change::Narrow { .. } => {
            let (before, after) = weights(model, planned);
            before.checked_sub(after).filter(|saved| *saved > 0)
        }
        _ => None,
    }
}

/// Parameters of a module that a change has to do with, before and after it.
pub(super) fn weights(model: &Model, planned: &ModulePlan) -> (usize, usize) {
    let dense = planned.input * planned.output;
    match planned.change {
        Change::Factorise { rank } => {
            let after = lapidary_factor::rank::parameters(planned.input, planned.output, rank);
            (dense, after)
        }
        Change::Narrow { features } => {
            let block = Group::of(&planned.path).and_then(|(index, _)| {
                let block = model.spec().expanded_blocks().get(index)?.clone();
                Some((index, block))
            });
            let units = block.map_or_else(Vec::new, |(index, block)| Unit::of(index, &block));
            let each = units.iter().map(|unit| {
                let inside = unit_parameters(model, unit);
                (inside, inside / unit.hidden.max(1) * features)
            });
            each.fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1))
        }
        Change::Remove => {
            let index = block_number(&planned.path);
            let weights = block_weights(model);
            (index.and_then(|i| weights.get(i).copied()).unwrap_or(0), 0)
        }
        _ => (dense, dense),
    }
}

/// Parameters of a unit's hidden features: as many of each.
fn unit_parameters(model: &Model, unit: &Unit) -> usize {
    let writers = unit.writers();
    let names = writers
        .iter()
        .flat_map(|path| [format!("{path}.weight"), format!("{path}.bias")])
        .chain([format!("{}.weight", unit.reader())]);
    names
        .filter_map(|name| model.parameters().get(&name))
        .map(|tensor| tensor.elem_count())
        .sum()
}

/// Weights of the matrices of a group.
fn group_weights(model: &Model, block: usize, group: Group) -> usize {
    let linears = model.linears().iter();
    linears
        .filter(|linear| Group::of(&linear.path) == Some((block, group)))
        .map(|linear| match linear.rank {
            Some(rank) => lapidary_factor::rank::parameters(linear.input, linear.output, rank),
            None => linear.input * linear.output,
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of each place the methods that can cut it.
    fn candidates(methods: &[&[&'static str]]) -> Candidates {
        let step = |saved| Step {
            modules: Vec::new(),
            saved,
        };
        let way = |&method: &&'static str| Way {
            method,
            steps: vec![step(4), step(0)],
        };
        let place = |(block, methods): (usize, &&[&'static str])| Place {
            block,
            weights: 10,
            ways: methods.iter().map(way).collect(),
        };
        Candidates {
            places: methods.iter().enumerate().map(place).collect(),
            depth: None,
            block_weights: vec![10; methods.len()],
            whole: 10 * methods.len(),
            limit: 8 * methods.len(),
            left_out: Vec::new(),
        }
    }

    #[test]
    fn uniform_mixes_that_are_the_same_are_tried_once() {
        let settings = AutomaticSettings::new(24);
        let apart = candidates(&[&["a"], &["b"], &["c", "d"]]);
        // Only in the third block is there a choice.
        assert_eq!(apart.start_names(), ["uniform a and b and c", "uniform d"]);
        assert_eq!(
            apart.starts(&settings),
            [vec![0, 4, 4, 4, 0], vec![0, 4, 4, 4, 1]]
        );
        let everywhere = candidates(&[&["a", "b"], &["a", "b"]]);
        assert_eq!(everywhere.start_names(), ["uniform a", "uniform b"]);
        assert_eq!(
            everywhere.starts(&settings),
            [vec![0, 4, 4, 0, 0], vec![0, 4, 4, 1, 1]]
        );
    }
}
