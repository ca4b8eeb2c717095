//! Replaces a run of blocks by one linear map that the block before it absorbs (ReplaceMe:
//! Shopkhoev et al. 2025, arXiv 2505.02819).
//!
//! With `Y_l` the residual stream that the last part of block `l` is added to, `M_l` what that
//! part writes, and `X` the stream behind the `n` blocks that go,
//!
//! ```text
//! X_{l+n} ≈ M_l T + Y_l,      T = argmin_T Σ ‖M_l T − (X_{l+n} − Y_l)‖² + α ‖T‖²
//! W_down ← Tᵀ W_down,  b_down ← Tᵀ b_down
//! ```
//!
//! so that the result has the architecture it had, and no new parameter. `T` may be held to a form
//! ([`MapForm`]), and to small or few entries. The cut is the run over
//! which the stream turns least, by the mean angle `(1/π) arccos cos(X_l, X_{l+n})` at the last
//! token of each sequence (at every token where tokens see later ones); several cuts are those over
//! which it turns least together.
//!
//! The map is merged into whatever writes last in block `l`: the down-projection of a
//! feed-forward part, of each expert of a mixture (a router's weights are numbers, with which the
//! map commutes), or a mixer's output where there is no feed-forward part. Where the block scales the
//! features of what it adds, `M_l` is what it adds scaled, and the scale is merged before the map. With
//! a norm behind the addition (post-norm) it cannot be merged.

mod cosine;
mod cut;
mod form;
mod merge;
mod run;
mod spans;

use lapidary_factor::{AffineMap, Regression, matrix_from_tensor};
use lapidary_kernels::Tensor;
use lapidary_model::Model;

use self::cosine::descend;
pub use self::cosine::{CosineDescent, DescentSolver};
pub use self::cut::angular_distances;
use self::cut::{Cut, choose, cuts_of, plan_of};
pub use self::form::MapForm;
use self::form::{identity, solve};
use self::merge::{merge, outputs, written};
pub use self::run::{RunInput, run_regression};
use crate::ahead::Refused;
use crate::edit::Edit;
use crate::error::engine;
use crate::method::{Effect, Method, Schedule, Settings, Task};
use crate::methods::block_influence::{block_weights, in_one_basis, removable, removed_blocks};
use crate::observe::{Seen, observe};
use crate::plan::{Budget, Change, Plan};
use crate::report::{Compressed, LayerErrors, ModuleReport};
use crate::{CalibrationData, Error, Requirements, Result};
use serde::{Deserialize, Serialize};

/// ReplaceMe by least squares in the list of methods.
pub(crate) const REPLACE_ME: Method = Method {
    name: "replaceme",
    summary: "Replaces a run of blocks by a linear map, merged into the block before it",
    source: "Shopkhoev et al. 2025, arXiv 2505.02819",
    schedule: Schedule::OneShot,
    effect: Effect::Depth,
    observes: true,
    leaves: &[],
    refuses: |_| &[Refused::Shortcuts],
    requirements: |model, settings| requirements(REPLACE_ME.name, model, settings),
    plan: |task, budget| plan(REPLACE_ME.name, task, budget),
    apply: |task, plan| least_squares(task, plan),
    cut: None,
};

/// ReplaceMe by the angle in the list of methods.
pub(crate) const REPLACE_ME_COSINE: Method = Method {
    name: "replaceme-cosine",
    summary: "ReplaceMe with the map that turns least, found by descent",
    source: "Shopkhoev et al. 2025, arXiv 2505.02819",
    schedule: Schedule::LayerByLayer,
    effect: Effect::Depth,
    observes: true,
    leaves: &[],
    refuses: |_| &[Refused::Shortcuts],
    requirements: |model, settings| requirements(REPLACE_ME_COSINE.name, model, settings),
    plan: |task, budget| plan(REPLACE_ME_COSINE.name, task, budget),
    apply: |task, plan| by_angle(task, plan),
    cut: None,
};

/// How a run of blocks is replaced.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ReplaceMe {
    /// Runs that the removed blocks are shared out to, each with a map of its own. Runs that meet
    /// become one.
    pub cuts: usize,
    /// What the map may look like.
    pub form: MapForm,
    /// `α`, relative to the mean square of an entry of `M`, summed over the tokens; as it is in
    /// the descent by angles.
    pub ridge: f64,
    /// `β` of `β Σ |T_ij|`, as a share of the least one that leaves no entry of the best map by
    /// squares; as it is in the descent by angles. Not for a map of rank one by squares.
    pub lasso: f64,
    /// How the angle is made small.
    pub cosine: CosineDescent,
}

impl Default for ReplaceMe {
    fn default() -> Self {
        Self {
            cuts: 1,
            form: MapForm::Full,
            ridge: 0.0,
            lasso: 0.0,
            cosine: CosineDescent::default(),
        }
    }
}

impl ReplaceMe {
    fn check(&self) -> Result<()> {
        for (what, value) in [
            ("ridge of a map", self.ridge),
            ("lasso of a map", self.lasso),
        ] {
            if !(value.is_finite() && value >= 0.0) {
                return Err(Error::invalid(what, value, "0 or more"));
            }
        }
        Ok(())
    }
}

/// `Y` passes as it is what goes: with shortcuts in the run, `M T + Y` would be in the basis before it,
/// and what it is compared with in the one behind it. A block at least has to be one that takes a map in.
fn replaceable(model: &Model, name: &str) -> Result<()> {
    removable(model, name)?;
    in_one_basis(model, name)?;
    let blocks = model.spec().expanded_blocks();
    let mut takers = blocks.iter().map(outputs);
    match takers.next() {
        Some(first) if takers.all(|taker| taker.is_err()) => first.map(|_| ()),
        _ => Ok(()),
    }
}

fn requirements(name: &str, model: &Model, settings: &Settings) -> Result<Requirements> {
    settings.replace_me.check()?;
    replaceable(model, name)?;
    Ok(Requirements::default())
}

fn plan(name: &str, task: &Task<'_>, budget: &Budget) -> Result<Plan> {
    replaceable(task.model, name)?;
    let removed = removed_blocks(task.model, name, budget)?;
    let settings = task.settings();
    let runs = match removed {
        0 => Vec::new(),
        _ => choose(
            task.model,
            task.observed(name)?,
            settings.batch,
            removed,
            settings.replace_me.cuts,
        )?,
    };
    Ok(plan_of(name, task.model, &runs))
}

/// Every cut is fitted on what the whole model writes.
fn least_squares(task: &Task<'_>, plan: &Plan) -> Result<Compressed> {
    let name = REPLACE_ME.name;
    task.settings().replace_me.check()?;
    let cuts = cuts_of(name, task.model, plan)?;
    let mut edit = Edit::of(task.model);
    let mut errors = Vec::new();
    if !cuts.is_empty() {
        let settings = task.settings();
        let sums = fits(task.model, task.observed(name)?, settings.batch, &cuts)?;
        for (cut, sums) in cuts.iter().zip(&sums) {
            let map = solve(sums, &settings.replace_me)?;
            merge(&mut edit, cut.anchor, &map)?;
            errors.push(relative_errors(sums, &map));
        }
    }
    finish(name, task, plan, edit, &cuts, &errors)
}

/// Each cut is fitted on what the model writes once the cuts before it have been made.
fn by_angle(task: &Task<'_>, plan: &Plan) -> Result<Compressed> {
    let name = REPLACE_ME_COSINE.name;
    task.settings().replace_me.check()?;
    let cuts = cuts_of(name, task.model, plan)?;
    let settings = task.settings();
    let mut whole = Edit::of(task.model);
    let mut errors = Vec::new();
    let mut gone = 0;
    for cut in &cuts {
        let data = task.observed(name)?;
        let mut so_far = whole.clone();
        so_far.remove_blocks(&removed_before(&cuts, cut.anchor))?;
        let here = Cut {
            anchor: cut.anchor - gone,
            ..*cut
        };
        let model = so_far.finish()?;
        let rows = Rows::seen(&model, data, settings.batch, here)?;
        let map = descend(&rows, &settings.replace_me, settings.seed)?;
        merge(&mut whole, cut.anchor, &map)?;
        errors.push(relative_errors(&rows.sums()?, &map));
        gone += cut.blocks;
    }
    finish(name, task, plan, whole, &cuts, &errors)
}

/// Blocks that the cuts before `anchor` take out.
fn removed_before(cuts: &[Cut], anchor: usize) -> std::collections::BTreeSet<usize> {
    let before = cuts.iter().filter(|cut| cut.anchor < anchor);
    before.flat_map(|cut| cut.removed()).collect()
}

/// Of the map, and of leaving the run out (`T = I`), relative to what the run adds.
fn relative_errors(sums: &Regression, map: &AffineMap) -> [f64; 2] {
    [map, &identity(map.weight.nrows())].map(|map| match sums.total() {
        total if total > 0.0 => (sums.squared_error(map) / total).sqrt(),
        _ => 0.0,
    })
}

/// `M` and `X − Y` of one batch, `[tokens, width]`.
fn pair(seen: &Seen, model: &Model, cut: Cut) -> Result<(Tensor, Tensor)> {
    let added = seen.rows(&written(model, cut.anchor)?)?;
    // Y = X_l − M_l, whichever way the block is wired.
    let stream = engine(seen.rows(&format!("blocks.{}.out", cut.anchor))? - added)?;
    let behind = seen.rows(&format!("blocks.{}.out", cut.anchor + cut.blocks))?;
    Ok((added.clone(), engine(behind - stream)?))
}

fn sites(model: &Model, cuts: &[Cut]) -> Result<Vec<String>> {
    let mut sites = Vec::new();
    for cut in cuts {
        sites.push(written(model, cut.anchor)?);
        sites.push(format!("blocks.{}.out", cut.anchor));
        sites.push(format!("blocks.{}.out", cut.anchor + cut.blocks));
    }
    sites.sort();
    sites.dedup();
    Ok(sites)
}

/// The sums of every cut's regression, in one pass.
fn fits(
    model: &Model,
    data: &CalibrationData,
    batch: usize,
    cuts: &[Cut],
) -> Result<Vec<Regression>> {
    let width = model.spec().width;
    let mut sums = vec![Regression::through_origin(width, width); cuts.len()];
    observe(model, data, batch, &sites(model, cuts)?, |seen| {
        for (cut, sums) in cuts.iter().zip(&mut sums) {
            let (added, wanted) = pair(seen, model, *cut)?;
            sums.add(
                matrix_from_tensor("what a block adds", &added)?.as_ref(),
                matrix_from_tensor("what it should add", &wanted)?.as_ref(),
            )?;
        }
        Ok(())
    })?;
    Ok(sums)
}

/// The rows of one cut, kept: descent passes over them many times.
struct Rows {
    /// `M`, `[tokens, width]`.
    added: Tensor,
    /// `X − Y`.
    wanted: Tensor,
    /// `Y`.
    stream: Tensor,
}

impl Rows {
    fn seen(model: &Model, data: &CalibrationData, batch: usize, cut: Cut) -> Result<Self> {
        let (mut added, mut wanted, mut stream) = (Vec::new(), Vec::new(), Vec::new());
        observe(model, data, batch, &sites(model, &[cut])?, |seen| {
            let (here, target) = pair(seen, model, cut)?;
            let behind = seen.rows(&format!("blocks.{}.out", cut.anchor + cut.blocks))?;
            stream.push(engine(behind - &target)?);
            added.push(here);
            wanted.push(target);
            Ok(())
        })?;
        let whole = |parts: &[Tensor]| engine(Tensor::cat(parts, 0));
        Ok(Self {
            added: whole(&added)?,
            wanted: whole(&wanted)?,
            stream: whole(&stream)?,
        })
    }

    fn sums(&self) -> Result<Regression> {
        let added = matrix_from_tensor("what a block adds", &self.added)?;
        let wanted = matrix_from_tensor("what it should add", &self.wanted)?;
        let mut sums = Regression::through_origin(added.ncols(), wanted.ncols());
        sums.add(added.as_ref(), wanted.as_ref())?;
        Ok(sums)
    }
}

fn finish(
    name: &str,
    task: &Task<'_>,
    plan: &Plan,
    mut edit: Edit,
    cuts: &[Cut],
    errors: &[[f64; 2]],
) -> Result<Compressed> {
    let weights = block_weights(task.model);
    let modules = plan.modules.iter().zip(&weights).enumerate();
    let modules = modules.map(|(index, (planned, before))| {
        let leaves = matches!(planned.change, Change::Leave { .. });
        let mut module = ModuleReport::new(planned, *before, if leaves { *before } else { 0 });
        let cut = cuts
            .iter()
            .zip(errors)
            .find(|(cut, _)| cut.anchor + 1 == index);
        if let Some((cut, [map, none])) = cut {
            let errors = |value| LayerErrors {
                weighted: value,
                unweighted: value,
                predicted_loss_rise: None,
            };
            module.chosen = Some(errors(*map));
            module.note = Some(format!(
                "blocks.{} absorbs the map; without one the error is {none:.4}",
                cut.anchor
            ));
        }
        module
    });
    let modules = modules.collect();
    edit.remove_blocks(&cuts.iter().flat_map(|cut| cut.removed()).collect())?;
    Compressed::new(name, task, edit.finish()?, modules)
}
