//! Low rank for attention, fewer channels for the feed-forward part (LoRAP: Li et al. 2024, arXiv
//! 2404.09695).
//!
//! Each matrix of attention is factorised under the norm `Σ_j c_j ‖(W − L R)_{:,j}‖²`, `c_j` the
//! mean square of its input `j`, or in another way ([`decomposition`]), at ranks that favour values and
//! output ([`ranks`]). A channel of the feed-forward part counts
//!
//! ```text
//! ‖gate row ⊙ √c‖ + ‖up row ⊙ √c‖ + ‖down column √c‖
//! ```
//!
//! and of the channels in rising order the first hundredth stays, which the paper found to matter
//! more than its weights say, the next ones go, the others stay. The score is no invariant: an up
//! row times `α` with its down column by `α` is the same part with another score.
//!
//! Blocks are cut one after the other, each by what it reads once those before it are cut. An
//! input that is always zero is given a floor by the factorisation where the authors write 1e-4.

mod decomposition;
mod ranks;

pub use decomposition::LorapDecomposition;

use std::collections::{BTreeMap, BTreeSet};

use lapidary_model::Model;
use lapidary_parts::attention::MixerSpec;
use lapidary_parts::block::BlockSpec;

use super::channels::{self, Unit};
use crate::ahead::{Left, Refused};
use crate::edit::Edit;
use crate::method::{Effect, Method, Schedule, Settings, Task};
use crate::plan::{Budget, Change, ModulePlan, Plan, readable};
use crate::report::{Compressed, ModuleReport};
use crate::requirements::{Requirements, Statistic};
use crate::{Calibration, CalibrationOptions, Error, Result};
use serde::{Deserialize, Serialize};

/// LoRAP in the list of methods.
pub(crate) const LORAP: Method = Method {
    name: "lorap",
    summary: "Low rank for attention, fewer feed-forward channels, by mean squared inputs (LoRAP)",
    source: "Li et al. 2024, arXiv 2404.09695",
    schedule: Schedule::LayerByLayer,
    effect: Effect::Ranks,
    observes: true,
    leaves: &[Left::Factors],
    refuses: |settings| match settings.lorap.attention {
        true => &[
            Refused::Gaps,
            Refused::Factors("attention"),
            Refused::Factors("feedforward"),
        ],
        false => &[Refused::Factors("feedforward")],
    },
    requirements,
    plan,
    apply,
    cut: None,
};

const MATRICES: [&str; 4] = ["query", "key", "value", "output"];

/// What [`Method`] `lorap` can be told.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LorapSettings {
    /// How attention's matrices are factorised.
    pub decomposition: LorapDecomposition,
    /// Weights of value and output over those of query and key.
    pub ratio: f64,
    /// The share of channels of least importance that stays.
    pub spared: f64,
    /// Whether every block is cut by what the whole model showed, from the calibration, instead
    /// of by what it reads once those before it are cut.
    pub one_shot: bool,
    /// Whether attention is factorised too. Without, only feed-forward parts change, all alike: a
    /// shape that configs of published families can say.
    pub attention: bool,
}

impl Default for LorapSettings {
    fn default() -> Self {
        Self {
            decomposition: LorapDecomposition::default(),
            ratio: 3.0,
            spared: 0.01,
            one_shot: false,
            attention: true,
        }
    }
}

impl LorapSettings {
    fn check(&self) -> Result<()> {
        if !(self.ratio > 0.0 && self.ratio.is_finite()) {
            return Err(Error::invalid(
                "ratio of value and output to query and key",
                self.ratio,
                "above 0",
            ));
        }
        if !(0.0..1.0).contains(&self.spared) {
            return Err(Error::invalid(
                "share of spared channels",
                self.spared,
                "at least 0 and below 1",
            ));
        }
        Ok(())
    }
}

fn requirements(model: &Model, settings: &Settings) -> Result<Requirements> {
    settings.lorap.check()?;
    let blocks = model.spec().expanded_blocks();
    if settings.lorap.attention {
        for (index, block) in blocks.iter().enumerate() {
            attention(index, block)?;
        }
    }
    if !settings.lorap.one_shot {
        return Ok(Requirements::default());
    }
    let of_block =
        |(index, block): (usize, &BlockSpec)| block_requirements(index, block, &settings.lorap);
    let all = blocks.iter().enumerate().map(of_block);
    Ok(all.fold(Requirements::default(), Requirements::union))
}

/// What is to be known of everything that a block's layers read: mean squares in the feed-forward part,
/// what the decomposition asks for in attention, where it can be factorised.
fn block_requirements(index: usize, block: &BlockSpec, settings: &LorapSettings) -> Requirements {
    let units = Unit::of(index, block).into_iter();
    let sites = units.flat_map(|unit| [unit.input_site(), unit.hidden_site()]);
    let mut statistics: BTreeSet<Statistic> = sites.map(squares).collect();
    if attention(index, block).is_ok() {
        let path = channels::attention(index);
        for site in [format!("{path}.in"), format!("{path}.mixed")] {
            statistics.extend(settings.decomposition.statistics(&site));
        }
    }
    Requirements { statistics }
}

fn squares(site: String) -> Statistic {
    Statistic::InputSquares { site }
}

fn attention(index: usize, block: &BlockSpec) -> Result<()> {
    match &block.attention {
        MixerSpec::MultiHead(spec) => match spec.peculiarity() {
            None => Ok(()),
            Some(peculiarity) => Err(Error::invalid(
                format!("the attention of block {index}"),
                peculiarity,
                "softmax with projections of its own for lorap; the factorisations take others",
            )),
        },
        other => Err(Error::invalid(
            format!("the mixer of block {index}"),
            other.kind(),
            "multi-head attention for lorap; block-influence and the factorisations take others",
        )),
    }
}

fn plan(task: &Task<'_>, budget: &Budget) -> Result<Plan> {
    let settings = task.settings().lorap;
    let keep = budget.share(LORAP.name)?;
    requirements(task.model, &task.settings())?;
    let mut modules = Vec::new();
    for (index, block) in task.model.spec().expanded_blocks().iter().enumerate() {
        if settings.attention {
            modules.extend(planned_attention(task.model, index, keep, settings.ratio)?);
        }
        modules.extend(planned_feedforward(
            task.model, index, block, keep, &settings,
        )?);
    }
    Ok(Plan {
        method: LORAP.name.to_owned(),
        modules,
    })
}

fn planned_attention(
    model: &Model,
    index: usize,
    keep: f64,
    ratio: f64,
) -> Result<Vec<ModulePlan>> {
    let paths = MATRICES.map(|name| format!("{}.{name}", channels::attention(index)));
    let mut shapes = [(0, 0); 4];
    for (shape, path) in shapes.iter_mut().zip(&paths) {
        *shape = dense_shape(model, path)?;
    }
    let ranks = ranks::ranks(shapes, keep, ratio);
    let each = paths.into_iter().zip(shapes).zip(ranks);
    each.map(|((path, (input, output)), rank)| {
        let change = match rank {
            Some(0) => {
                return Err(Error::invalid(
                    format!("rank that is left to {path}"),
                    0,
                    format!(
                        "at least 1: {} of its weights is too little; keep more",
                        readable(keep)
                    ),
                ));
            }
            Some(rank) => Change::Factorise { rank },
            None => Change::Leave {
                reason: "its share of the weights is no less than all of them".to_owned(),
            },
        };
        Ok(ModulePlan {
            path,
            input,
            output,
            change,
        })
    })
    .collect()
}

fn dense_shape(model: &Model, path: &str) -> Result<ranks::Shape> {
    let found = model.linears().iter().find(|linear| linear.path == path);
    match found {
        Some(linear) if linear.rank.is_none() => Ok((linear.input, linear.output)),
        _ => Err(Error::invalid(
            format!("layer {path}"),
            "factorised already",
            "dense: multiply it out first",
        )),
    }
}

fn planned_feedforward(
    model: &Model,
    index: usize,
    block: &BlockSpec,
    keep: f64,
    settings: &LorapSettings,
) -> Result<Option<ModulePlan>> {
    let Some(hidden) = channels::hidden(index, block) else {
        return Ok(None);
    };
    let removed = ranks::removed(hidden, keep, settings.spared);
    let path = channels::feedforward(index);
    if removed >= hidden {
        return Err(Error::invalid(
            format!("channels that {path} would keep"),
            0,
            "at least 1: keep more",
        ));
    }
    let width = model.spec().width;
    Ok(Some(ModulePlan {
        path,
        input: width,
        output: width,
        change: match removed {
            0 => Change::Leave {
                reason: "its share of the loss is less than one channel".to_owned(),
            },
            _ => Change::Narrow {
                features: channels::aligned(block, hidden - removed, hidden),
            },
        },
    }))
}

fn apply(task: &Task<'_>, plan: &Plan) -> Result<Compressed> {
    let model = task.model;
    let settings = task.settings();
    settings.lorap.check()?;
    let blocks = model.spec().expanded_blocks();
    let mut by_block: Vec<Vec<&ModulePlan>> = vec![Vec::new(); blocks.len()];
    for planned in &plan.modules {
        let index = block_of(model, planned)?;
        if let (Some(block), false) = (by_block.get_mut(index), leaves(planned)) {
            block.push(planned);
        }
    }
    let mut edit = Edit::of(model);
    let mut notes = BTreeMap::new();
    for ((index, block), planned) in blocks.iter().enumerate().zip(by_block) {
        if planned.is_empty() {
            continue;
        }
        let seen;
        let calibration = match settings.lorap.one_shot {
            true => task.calibrated(LORAP.name)?,
            false => {
                seen = look(task, &edit, index, block, &settings.lorap)?;
                &seen
            }
        };
        for planned in planned {
            let note = cut(
                &mut edit,
                index,
                block,
                planned,
                &settings.lorap,
                calibration,
            )?;
            notes.extend(note.map(|note| (planned.path.clone(), note)));
        }
    }
    let compressed = edit.finish()?;
    let report = |planned: &ModulePlan| {
        let weights = |model: &Model| channels::weights(model, &planned.path);
        let mut report = ModuleReport::new(planned, weights(model), weights(&compressed));
        report.note = notes.remove(&planned.path).or(report.note);
        report
    };
    let modules = plan.modules.iter().map(report).collect();
    Compressed::new(LORAP.name, task, compressed, modules)
}

fn leaves(planned: &ModulePlan) -> bool {
    matches!(planned.change, Change::Leave { .. })
}

/// The block that a planned module belongs to: one of attention's matrices, or the feed-forward
/// part.
fn block_of(model: &Model, planned: &ModulePlan) -> Result<usize> {
    if planned.path.ends_with(".feedforward") {
        return channels::block_of(model, planned, "feedforward");
    }
    let shape = (planned.input, planned.output);
    let found = crate::edit::block_of(&planned.path).filter(|(_, rest)| {
        let matrix = rest.strip_prefix("attention.").unwrap_or_default();
        MATRICES.contains(&matrix)
    });
    match found {
        Some((index, _)) if dense_shape(model, &planned.path)? == shape => Ok(index),
        _ => Err(Error::invalid(
            "plan",
            format!("for {} of {shape:?}", planned.path),
            "one that was made for this model",
        )),
    }
}

/// What a block reads now that those before it are cut. The blocks after it are not run.
fn look(
    task: &Task<'_>,
    edit: &Edit,
    index: usize,
    block: &BlockSpec,
    settings: &LorapSettings,
) -> Result<Calibration> {
    let data = task.observed(LORAP.name)?;
    let so_far = edit.through(index)?;
    let options = CalibrationOptions {
        batch: task.settings().batch,
        ..CalibrationOptions::default()
    };
    let requirements = block_requirements(index, block, settings);
    Calibration::collect(&so_far, data, &requirements, options)
}

/// Cuts one module, and says what there is to say of it.
fn cut(
    edit: &mut Edit,
    index: usize,
    block: &BlockSpec,
    planned: &ModulePlan,
    settings: &LorapSettings,
    calibration: &Calibration,
) -> Result<Option<String>> {
    if let Change::Factorise { rank } = planned.change
        && !planned.path.ends_with(".feedforward")
    {
        let site = match planned.path.ends_with(".output") {
            true => "mixed",
            false => "in",
        };
        let site = format!("{}.{site}", channels::attention(index));
        let way = settings.decomposition;
        return decomposition::factorise(edit, &planned.path, rank, way, &site, calibration)
            .map(Some);
    }
    let units = match planned.path.ends_with(".feedforward") {
        true => Unit::of(index, block),
        false => Vec::new(),
    };
    let hidden = units.first().map_or(0, |unit| unit.hidden);
    let Some(features) = channels::planned_features(planned, hidden)? else {
        return Ok(None);
    };
    for unit in &units {
        let scale = |site: String| -> Result<Vec<f64>> {
            let squares = calibration.vector(&squares(site))?;
            Ok(squares.into_iter().map(f64::sqrt).collect())
        };
        let (input, inner) = (scale(unit.input_site())?, scale(unit.hidden_site())?);
        let scores = channels::magnitudes(edit, unit, Some((&input, &inner)))?;
        unit.keep(edit, &kept(&scores, features, settings.spared))?;
    }
    channels::set_hidden(edit, index, features)?;
    Ok(None)
}

/// The channels that stay, in their order: the least important ones and the most important ones.
fn kept(scores: &[f64], features: usize, spared: f64) -> Vec<usize> {
    let mut order: Vec<(usize, f64)> = scores.iter().copied().enumerate().collect();
    order.sort_by(|a, b| a.1.total_cmp(&b.1));
    let gap = ranks::gap(scores.len(), scores.len() - features, spared);
    let stays = order.into_iter().enumerate();
    let stays = stays.filter(|(place, _)| !gap.contains(place));
    let mut kept: Vec<usize> = stays.map(|(_, (channel, _))| channel).collect();
    kept.sort_unstable();
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_hundredth_survives_and_order_follows_the_channels() {
        let scores: Vec<f64> = (0..200).map(|i| f64::from((i * 77) % 200)).collect();
        let stays = kept(&scores, 160, 0.01);
        for (channel, score) in scores.iter().enumerate() {
            let expected = *score < 2.0 || *score >= 42.0;
            assert_eq!(stays.contains(&channel), expected, "{score}");
        }
        // Channels in another order keep the same ones.
        let turned: Vec<f64> = scores.iter().rev().copied().collect();
        let back: Vec<usize> = kept(&turned, 160, 0.01)
            .iter()
            .rev()
            .map(|i| 199 - i)
            .collect();
        assert_eq!(back, stays);
    }
}
