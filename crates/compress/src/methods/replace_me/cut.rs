//! Which blocks go.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use lapidary_factor::{Matrix, matrix_from_tensor};
use lapidary_model::Model;

use super::spans::{Kind, cheapest};
use crate::observe::observe;
use crate::plan::{Change, ModulePlan, Plan};
use crate::{CalibrationData, Error, Result};

/// A run of blocks that goes, and the block before it that absorbs its map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cut {
    /// The block that stays.
    pub(super) anchor: usize,
    /// Blocks behind it that go.
    pub(super) blocks: usize,
}

impl Cut {
    pub(super) fn removed(&self) -> Range<usize> {
        self.anchor + 1..self.anchor + 1 + self.blocks
    }
}

/// `d(l) = mean (1/π) arccos cos(X_l, X_{l+n})` over the last real token of each sequence (all
/// tokens, where they see later ones), `X_l` the stream behind block `l`, for every `l` that has
/// `n` blocks behind it. In `[0, 1]`; 0 where nothing turns.
///
/// # Errors
/// When there are not more than `n` blocks.
pub fn angular_distances(
    model: &Model,
    data: &CalibrationData,
    batch: usize,
    n: usize,
) -> Result<Vec<f64>> {
    let found = all_distances(model, data, batch, &BTreeSet::from([n]))?;
    Ok(found.into_iter().flatten().collect())
}

/// The distances for each number of blocks, in one pass.
fn all_distances(
    model: &Model,
    data: &CalibrationData,
    batch: usize,
    numbers: &BTreeSet<usize>,
) -> Result<Vec<Vec<f64>>> {
    let blocks = model.spec().expanded_blocks().len();
    if let Some(n) = numbers.iter().find(|n| **n >= blocks) {
        let expected = format!("below {blocks}: the block before a run stays");
        return Err(Error::invalid("number of blocks in a run", n, expected));
    }
    let sites: Vec<String> = (0..blocks).map(|l| format!("blocks.{l}.out")).collect();
    let last_alone = model.spec().is_causal();
    let mut sums: Vec<Vec<f64>> = numbers.iter().map(|n| vec![0.0; blocks - n]).collect();
    let mut count = 0;
    observe(model, data, batch, &sites, |seen| {
        let last: Vec<usize> = seen.last().into_iter().map(|row| row as usize).collect();
        let mut streams = Vec::with_capacity(blocks);
        for site in &sites {
            streams.push(matrix_from_tensor("residual stream", seen.rows(site)?)?);
        }
        let all = streams.first().map_or(0, Matrix::nrows);
        let rows = if last_alone { last } else { (0..all).collect() };
        count += rows.len();
        for (n, sums) in numbers.iter().zip(&mut sums) {
            for (sum, (from, to)) in sums
                .iter_mut()
                .zip(streams.iter().zip(streams.iter().skip(*n)))
            {
                *sum += rows.iter().map(|row| angle(from, to, *row)).sum::<f64>();
            }
        }
        Ok(())
    })?;
    for sum in sums.iter_mut().flatten() {
        *sum /= count.max(1) as f64;
    }
    Ok(sums)
}

/// `(1/π) arccos cos` of a row of both; 0 where a row has no direction.
fn angle(a: &Matrix, b: &Matrix, row: usize) -> f64 {
    let (a, b) = (a.row(row), b.row(row));
    let (length_a, length_b) = (a.norm_l2(), b.norm_l2());
    if length_a == 0.0 || length_b == 0.0 {
        return 0.0;
    }
    // 2 atan2(‖â − b̂‖, ‖â + b̂‖) keeps the digits of small angles, which arccos loses.
    let (mut apart, mut together) = (0.0, 0.0);
    for (x, y) in a.iter().zip(b.iter()) {
        let (x, y) = (x / length_a, y / length_b);
        apart += (x - y).powi(2);
        together += (x + y).powi(2);
    }
    2.0 * apart.sqrt().atan2(together.sqrt()) / std::f64::consts::PI
}

/// The runs that go, `removed` blocks in `cuts` of nearly equal length, where the stream turns least
/// over all of them together; runs that meet become one. The first block always stays.
///
/// The paper takes one run after the other, each where the stream turns least among the places left,
/// which costs more where one stands in the way of two, and may leave no place for the last.
pub(super) fn choose(
    model: &Model,
    data: &CalibrationData,
    batch: usize,
    removed: usize,
    cuts: usize,
) -> Result<Vec<Cut>> {
    let blocks = model.spec().expanded_blocks().len();
    if cuts == 0 || cuts > removed {
        let expected = format!("between 1 and {removed}, the number of blocks that go");
        return Err(Error::invalid("number of cuts", cuts, expected));
    }
    let (length, longer) = (removed / cuts, removed % cuts);
    let sizes = [(length + 1, longer), (length, cuts - longer)];
    let used = sizes.iter().filter(|(_, count)| *count > 0);
    let numbers: BTreeSet<usize> = used.map(|(length, _)| *length).collect();
    let distances = all_distances(model, data, batch, &numbers)?;
    if distances.iter().flatten().any(|distance| distance.is_nan()) {
        let what = "the angle by which the stream turns".to_owned();
        return Err(Error::NotFinite { what });
    }
    let distances: BTreeMap<usize, Vec<f64>> = numbers.into_iter().zip(distances).collect();
    let kinds = sizes.map(|(length, count)| Kind {
        length,
        count,
        costs: distances
            .get(&length)
            .map(Vec::as_slice)
            .unwrap_or_default(),
    });
    let Some(chosen) = cheapest(blocks, &kinds) else {
        let expected = format!("below {blocks}: the first block stays");
        return Err(Error::invalid(
            "number of blocks that go",
            removed,
            expected,
        ));
    };
    Ok(runs(&chosen.into_iter().flatten().collect()))
}

/// Sets of blocks in a row.
fn runs(gone: &BTreeSet<usize>) -> Vec<Cut> {
    let mut cuts: Vec<Cut> = Vec::new();
    for block in gone {
        match cuts.last_mut() {
            Some(cut) if cut.anchor + cut.blocks + 1 == *block => cut.blocks += 1,
            _ => cuts.push(Cut {
                anchor: block.saturating_sub(1),
                blocks: 1,
            }),
        }
    }
    cuts
}

/// The cuts as a plan: the first block of a run says how long it is.
pub(super) fn plan_of(method: &str, model: &Model, cuts: &[Cut]) -> Plan {
    let width = model.spec().width;
    let change = |index: usize| {
        let Some(cut) = cuts.iter().find(|cut| cut.removed().contains(&index)) else {
            return Change::Leave {
                reason: "the stream turns more over runs that it is in".to_owned(),
            };
        };
        match cut.anchor + 1 == index {
            true => Change::Linearise { blocks: cut.blocks },
            false => Change::Remove,
        }
    };
    let blocks = model.spec().expanded_blocks().len();
    let modules = (0..blocks).map(|index| ModulePlan {
        path: format!("blocks.{index}"),
        input: width,
        output: width,
        change: change(index),
    });
    Plan {
        method: method.to_owned(),
        modules: modules.collect(),
    }
}

/// The cuts of a plan.
pub(super) fn cuts_of(method: &str, model: &Model, plan: &Plan) -> Result<Vec<Cut>> {
    let width = model.spec().width;
    let blocks = model.spec().expanded_blocks().len();
    let fits = |(index, module): (usize, &ModulePlan)| {
        module.path == format!("blocks.{index}") && module.input == width
    };
    if plan.modules.len() != blocks || !plan.modules.iter().enumerate().all(fits) {
        let found = format!("for {} blocks", plan.modules.len());
        return Err(Error::invalid(
            "plan",
            found,
            "one that was made for this model",
        ));
    }
    let mut cuts: Vec<Cut> = Vec::new();
    for (index, module) in plan.modules.iter().enumerate() {
        let path = &module.path;
        let inside = cuts
            .last()
            .is_some_and(|cut| cut.removed().contains(&index));
        let refused = |found: &str, expected: &str| {
            let what = format!("change of {path} in a plan of {method}");
            Err(Error::invalid(what, found, expected))
        };
        match (&module.change, inside) {
            (Change::Remove, true) | (Change::Leave { .. }, false) => {}
            (Change::Linearise { blocks }, false) => {
                if !(1..=plan.modules.len() - index).contains(blocks) {
                    return refused(
                        &format!("a map for {blocks} blocks"),
                        "one for those there are",
                    );
                }
                let cut = Cut {
                    anchor: match index.checked_sub(1) {
                        Some(anchor) => anchor,
                        None => return refused("a map", "left: no block before it can absorb one"),
                    },
                    blocks: *blocks,
                };
                if cuts.last().is_some_and(|last| last.removed().end == index) {
                    return refused("a map", "part of the run before it, which it meets");
                }
                cuts.push(cut);
            }
            (Change::Remove, false) => {
                return refused(
                    "remove",
                    "behind the first block of a run, which has the map",
                );
            }
            (_, true) => return refused("left", "removed: a run that began earlier covers it"),
            (other, false) => {
                return refused(&format!("{other:?}"), "a linear map, remove or leave");
            }
        }
    }
    Ok(cuts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_that_meet_become_one() {
        let cut = |anchor, blocks| Cut { anchor, blocks };
        assert_eq!(runs(&BTreeSet::from([3, 4, 7])), [cut(2, 2), cut(6, 1)]);
        assert_eq!(runs(&BTreeSet::new()), []);
    }

    #[test]
    fn angles_lie_between_the_same_and_the_opposite_direction() {
        let a = Matrix::from_fn(4, 2, |i, j| {
            [[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0], [0.0, 0.0]][i][j]
        });
        let b = Matrix::from_fn(4, 2, |_, j| [5.0, 0.0][j]);
        let found: Vec<f64> = (0..4).map(|row| angle(&a, &b, row)).collect();
        assert_eq!(found, [0.0, 0.5, 1.0, 0.0]);
    }
}
