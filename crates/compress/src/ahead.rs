//! What one stage of a recipe rules out for a later one, known before either is run.
//!
//! A method declares what it leaves in every model that it cuts ([`Left`]), and what it cannot be run on
//! ([`Refused`]). What follows from the data alone (which parts go, and most often which widths differ) is not
//! told here: a stage refuses it when its turn comes ([`Error::Later`]).

use std::collections::BTreeSet;

use lapidary_model::Model;

use crate::method::{Effect, Method, Settings, Task};
use crate::methods::attention_cosine::attentions;
use crate::methods::block_influence::removed_blocks;
use crate::methods::pruning::{uneven_features, uneven_heads};
use crate::plan::{Budget, Change};
use crate::recipe::{Recipe, Stage};
use crate::{Error, Result};

/// What a method leaves in every model that it cuts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Left {
    /// Shortcuts of its own in every block.
    Shortcuts,
    /// Blocks without attention.
    Gaps,
    /// Linear maps in place of blocks.
    Maps,
    /// Factors in place of matrices: of those that its plan says, which follows from the budget alone.
    Factors,
    /// Blocks with different numbers of heads, where those that go are no multiple of the blocks.
    UnevenHeads,
    /// The same of hidden features.
    UnevenFeatures,
}

/// What a method cannot be run on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// Shortcuts.
    Shortcuts,
    /// Blocks without attention, linear maps among them.
    Gaps,
    /// Linear maps in place of blocks.
    Maps,
    /// Factors anywhere in a block.
    AnyFactors,
    /// Factors for every matrix of that part of the blocks.
    Factors(&'static str),
    /// Factors for every layer that it may touch.
    ChosenFactors,
    /// Blocks of different shapes.
    Uneven,
}

impl Recipe {
    /// Refuses stages that cannot be run on what an earlier one is sure to leave of `model`, before
    /// anything is calibrated or cut.
    ///
    /// # Errors
    /// Says which two, and why; and as [`Recipe::check`] of names and ratios.
    pub fn check_model(&self, model: &Model, whole: &Settings) -> Result<()> {
        for (later, second) in self.stages.iter().enumerate() {
            let before = || self.stages.iter().take(later).enumerate();
            for (earlier, first) in before() {
                let mut others = Others::default();
                for (index, stage) in before().filter(|(index, _)| *index != earlier) {
                    let method = stage.method()?;
                    let takes = method.effect == Effect::Depth;
                    others.are_there = true;
                    others.take_blocks |= takes;
                    others.spoil_factors |= takes && index > earlier;
                    others.spoil_factors |= method.leaves.contains(&Left::Maps);
                }
                if let Some(left) = ruled_out((first, second), others, model, whole)? {
                    return Err(refusal(first, second, left));
                }
            }
        }
        Ok(())
    }
}

/// What stages beside two of a recipe, before the second of them, may do.
#[derive(Clone, Copy, Default)]
struct Others {
    /// Be there at all: what one of several leaves uneven may be made even by another.
    are_there: bool,
    /// Take out blocks, those that would be refused perhaps.
    take_blocks: bool,
    /// Take out blocks with the factors that the first has made, or leave a whole matrix in the place of a block.
    spoil_factors: bool,
}

/// What the first stage leaves that the second cannot be run on, if that is sure.
fn ruled_out(
    (first, second): (&Stage, &Stage),
    others: Others,
    model: &Model,
    whole: &Settings,
) -> Result<Option<Left>> {
    let [one, other] = [first.method()?, second.method()?];
    let settings = Recipe::settings(second, whole);
    let refused = (other.refuses)(settings);
    for left in one.leaves {
        let clash = match left {
            Left::Shortcuts => refused.contains(&Refused::Shortcuts),
            Left::Gaps => {
                refused.contains(&Refused::Gaps)
                    && !others.take_blocks
                    && attentions(model, one.name)
                        .is_ok_and(|found| goes(found.len(), &first.budget(), one))
            }
            Left::Maps => {
                let takes = [Refused::Gaps, Refused::Maps];
                takes.iter().any(|kind| refused.contains(kind))
                    && !others.take_blocks
                    && first.budget().is_ok_and(|budget| {
                        removed_blocks(model, one.name, &budget).is_ok_and(|count| count > 0)
                    })
            }
            Left::Factors => {
                !others.spoil_factors && {
                    let factors = factorised(first, one, model, Recipe::settings(first, whole))?;
                    clashes(refused, &factors, model, settings)?
                }
            }
            Left::UnevenHeads | Left::UnevenFeatures => {
                let uneven = match left {
                    Left::UnevenHeads => uneven_heads,
                    _ => uneven_features,
                };
                let settings = &Recipe::settings(first, whole).pruning;
                let keep = first.budget().and_then(|budget| budget.share(one.name));
                refused.contains(&Refused::Uneven)
                    && !others.are_there
                    && keep
                        .and_then(|keep| uneven(model, keep, settings))
                        .unwrap_or(false)
            }
        };
        if clash {
            return Ok(Some(*left));
        }
    }
    Ok(None)
}

/// Whether a budget takes out any of so many candidates.
fn goes(candidates: usize, budget: &Result<Budget>, method: &Method) -> bool {
    let share = budget
        .as_ref()
        .ok()
        .and_then(|it| it.share(method.name).ok());
    share.is_some_and(|share| ((1.0 - share) * candidates as f64).round() >= 1.0)
}

/// The layers that a stage makes factors of.
fn factorised(
    stage: &Stage,
    method: &Method,
    model: &Model,
    settings: &Settings,
) -> Result<BTreeSet<String>> {
    let task = Task {
        settings: Some(settings),
        ..Task::new(model)
    };
    // Where it has no plan for this model it says so itself, or its turn comes on another.
    let Ok(plan) = (method.plan)(&task, &stage.budget()?) else {
        return Ok(BTreeSet::new());
    };
    let modules = plan.modules.into_iter();
    let factors = modules.filter(|module| matches!(module.change, Change::Factorise { .. }));
    Ok(factors.map(|module| module.path).collect())
}

/// Whether such factors are among what is refused.
fn clashes(
    refused: &[Refused],
    factors: &BTreeSet<String>,
    model: &Model,
    settings: &Settings,
) -> Result<bool> {
    let all =
        |paths: &[&str]| !paths.is_empty() && paths.iter().all(|path| factors.contains(*path));
    for kind in refused {
        let clash = match kind {
            Refused::Shortcuts | Refused::Gaps | Refused::Maps | Refused::Uneven => false,
            Refused::AnyFactors => factors.iter().any(|path| path.starts_with("blocks.")),
            Refused::Factors(part) => {
                let linears = model.linears().iter().map(|linear| linear.path.as_str());
                let here = linears.filter(|path| part_of(path) == Some(*part));
                all(&here.collect::<Vec<_>>())
            }
            Refused::ChosenFactors => {
                let chosen = settings.selection.chosen(model)?;
                let paths = chosen.iter().map(|layer| layer.path.as_str());
                all(&paths.collect::<Vec<_>>())
            }
        };
        if clash {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The part of a block that a path of a layer is in: `attention` of `blocks.0.attention.query`.
fn part_of(path: &str) -> Option<&str> {
    path.strip_prefix("blocks.")?.split('.').nth(1)
}

fn refusal(first: &Stage, second: &Stage, left: Left) -> Error {
    let (one, other) = (first.method.as_str(), second.method.as_str());
    let (leaves, takes) = match left {
        Left::Shortcuts => ("shortcuts in every block", "blocks without"),
        Left::Gaps => ("blocks without attention", "blocks with theirs"),
        Left::Maps => ("linear maps in place of blocks", "blocks with both parts"),
        Left::Factors => ("factors in place of its matrices", "whole ones"),
        Left::UnevenHeads | Left::UnevenFeatures => (
            "blocks of different shapes at this ratio",
            "blocks that are alike",
        ),
    };
    let place = match (one == other, left) {
        (true, Left::Factors) => "on other layers",
        (true, _) => "left out",
        (false, Left::Factors) => "before it or on other layers (--layers, or settings of a stage)",
        (false, _) => "before it",
    };
    Error::invalid(
        format!("place of {other}"),
        format!("after {one}, which leaves {leaves}"),
        format!("{place}: {other} takes {takes}"),
    )
}
