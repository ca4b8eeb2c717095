//! One model of several methods' modules.

use std::collections::BTreeMap;
use std::str::FromStr;

use lapidary_kernels::Tensor;
use lapidary_model::Model;

use super::Mix;
use super::candidates::removed_blocks;
use crate::edit::{Edit, block_of};
use crate::error::engine;
use crate::method::{Method, Settings, Task};
use crate::plan::{Change, ModulePlan, Plan};
use crate::{Calibration, CalibrationData, Error, Factorisation, Result};

/// Puts mixes together.
///
/// The factors of rank `k` of a factorisation are the first `k` directions of those of any larger
/// rank. So each matrix is decomposed once, at its full rank, and a mix takes as many directions
/// of it as it needs.
#[derive(Debug)]
pub(super) struct Composer<'a> {
    model: &'a Model,
    data: &'a CalibrationData,
    calibration: Calibration,
    settings: Settings,
    /// Of each method and matrix, `down` and `up` of full rank.
    factors: BTreeMap<(String, String), (Tensor, Tensor)>,
}

impl<'a> Composer<'a> {
    pub(super) fn new(
        model: &'a Model,
        data: &'a CalibrationData,
        calibration: Calibration,
        settings: Settings,
    ) -> Self {
        Self {
            model,
            data,
            calibration,
            settings,
            factors: BTreeMap::new(),
        }
    }

    pub(super) fn task(&self) -> Task<'_> {
        Task {
            model: self.model,
            calibration: Some(&self.calibration),
            data: Some(self.data),
            settings: Some(&self.settings),
        }
    }

    /// The model of a mix.
    pub(super) fn compose(&mut self, mix: &Mix) -> Result<Model> {
        let mut edit = Edit::of(self.model);
        let mut removed = Default::default();
        for plan in &mix.plans {
            if plan
                .modules
                .iter()
                .any(|module| module.change == Change::Remove)
            {
                removed = removed_blocks(plan);
            } else if Factorisation::from_str(&plan.method).is_ok() {
                self.factorise(&mut edit, plan)?;
            } else {
                let cut = Method::find(&plan.method)?.apply(&self.task(), plan)?;
                for planned in &plan.modules {
                    graft(&mut edit, &cut.model, &planned.path)?;
                }
            }
        }
        edit.remove_blocks(&removed)?;
        edit.finish()
    }

    fn factorise(&mut self, edit: &mut Edit, plan: &Plan) -> Result<()> {
        self.decompose(plan)?;
        for planned in &plan.modules {
            let path = &planned.path;
            let key = (plan.method.clone(), path.clone());
            let (Change::Factorise { rank }, Some((down, up))) =
                (&planned.change, self.factors.get(&key))
            else {
                return Err(Error::invalid(
                    format!("change of {path} in a mix"),
                    format!("{:?}", planned.change),
                    "factorise",
                ));
            };
            let down = engine(engine(down.narrow(0, 0, *rank))?.contiguous())?;
            let up = engine(engine(up.narrow(1, 0, *rank))?.contiguous())?;
            edit.parameters.remove(&format!("{path}.weight"));
            edit.parameters.insert(format!("{path}.down"), down);
            edit.parameters.insert(format!("{path}.up"), up);
            edit.spec.low_rank.insert(path.clone(), *rank);
        }
        Ok(())
    }

    /// Decomposes the matrices of a plan that were not, at full rank.
    fn decompose(&mut self, plan: &Plan) -> Result<()> {
        let unknown = |planned: &&ModulePlan| {
            let key = (plan.method.clone(), planned.path.clone());
            !self.factors.contains_key(&key)
        };
        let modules = plan
            .modules
            .iter()
            .filter(unknown)
            .map(|planned| ModulePlan {
                change: Change::Factorise {
                    rank: planned.input.min(planned.output),
                },
                ..planned.clone()
            });
        let whole = Plan {
            method: plan.method.clone(),
            modules: modules.collect(),
        };
        if whole.modules.is_empty() {
            return Ok(());
        }
        let cut = Method::find(&plan.method)?.apply(&self.task(), &whole)?;
        let parameters = cut.model.parameters();
        for planned in whole.modules {
            let get = |name: &str| {
                let name = format!("{}.{name}", planned.path);
                parameters.get(&name).cloned().ok_or_else(|| {
                    Error::invalid(format!("parameter {name}"), "absent", "one of two factors")
                })
            };
            let pair = (get("down")?, get("up")?);
            self.factors
                .insert((plan.method.clone(), planned.path), pair);
        }
        Ok(())
    }
}

/// Puts the module at `path` as another model has it in the place of the edited one.
fn graft(edit: &mut Edit, from: &Model, path: &str) -> Result<()> {
    let inside = |name: &str| {
        name.strip_prefix(path)
            .is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
    };
    edit.remove_parameters(path);
    let parameters = from.parameters().iter().filter(|(name, _)| inside(name));
    let parameters = parameters.map(|(name, tensor)| (name.clone(), tensor.clone()));
    edit.parameters.extend(parameters);
    let ranks = from.spec().low_rank.iter().filter(|(name, _)| inside(name));
    edit.spec
        .low_rank
        .extend(ranks.map(|(name, rank)| (name.clone(), *rank)));
    if let Some((index, "feedforward")) = block_of(path) {
        let blocks = from.spec().expanded_blocks();
        if let Some(block) = blocks.get(index) {
            edit.block(index)?
                .feedforward
                .clone_from(&block.feedforward);
        }
    }
    Ok(())
}
