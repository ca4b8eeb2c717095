//! Weights set to zero while the others of their row make up for it (Optimal Brain Surgeon: Hassibi
//! & Stork 1992; row by row: Frantar & Alistarh 2022, arXiv 2208.11580; column by column: SparseGPT,
//! 2023, arXiv 2301.00774).
//!
//! A row `w` of a layer that reads `x` may change by `δ` at the cost `δᵀ H δ`, `H = E[x xᵀ] + λ I`. To
//! force `w_q = 0` costs at least
//!
//! ```text
//! w_q² / [H⁻¹]_qq        with        δ = − w_q / [H⁻¹]_qq · H⁻¹ e_q
//! ```
//!
//! and a set `S` of weights `w_Sᵀ ([H⁻¹]_SS)⁻¹ w_S`, with `δ = − H⁻¹_{:,S} ([H⁻¹]_SS)⁻¹ w_S`.
//!
//! Columns are gone through in blocks from left to right. In a block each row gives up its cheapest
//! weight, one after another, `H⁻¹` being that of the columns which may still change: those of the
//! block and to the right. With `H⁻¹ = Uᵀ U`, `U` upper triangular, the inverse of the part of `H` from
//! column `c` on is `U_{c:,c:}ᵀ U_{c:,c:}`, so that one decomposition serves all rows and blocks. A block
//! as wide as the layer is the exact greedy choice.
//!
//! Layers are pruned by what they read once those before them are.

use lapidary_factor::{Matrix, cholesky, matrix_from_tensor};
use lapidary_model::Model;

use super::settings::{Pattern, PruneSettings, Scope};
use super::{check_pattern, finished, matrices, pruned, rule, uniform};
use crate::ahead::Refused;
use crate::edit::{Edit, block_of};
use crate::method::{Effect, Method, Schedule, Settings, Task};
use crate::plan::{Budget, Plan};
use crate::report::Compressed;
use crate::requirements::{Requirements, Statistic};
use crate::{Calibration, CalibrationOptions, Error, Layer, Result};

/// Second order in the list of methods.
pub(crate) const SECOND_ORDER: Method = Method {
    name: "second-order",
    summary: "Sets weights to zero and lets the others of their row make up for it (OBS, SparseGPT)",
    source: "Frantar & Alistarh 2023, arXiv 2301.00774",
    schedule: Schedule::LayerByLayer,
    effect: Effect::Weights,
    observes: true,
    leaves: &[],
    refuses: |_| &[Refused::ChosenFactors],
    requirements,
    plan,
    apply,
    cut: None,
};

fn requirements(model: &Model, settings: &Settings) -> Result<Requirements> {
    settings.pruning.check()?;
    scope(&settings.pruning)?;
    let (layers, _) = matrices::chosen(model, &settings.selection)?;
    match layers.iter().find(|layer| layer.is_table()) {
        None => Ok(Requirements::default()),
        Some(layer) => Err(Error::invalid(
            format!("layer {}", layer.path),
            "chosen",
            "left out for second-order, whose second moment of token ids would be as large as the \
             vocabulary; magnitude, first-order and wanda take it",
        )),
    }
}

/// Whether rows lose as much each, or as many together as suits them.
fn scope(settings: &PruneSettings) -> Result<Scope> {
    match settings.scope.unwrap_or(Scope::Layer) {
        Scope::Global => Err(Error::invalid(
            "scope of second-order",
            "the whole model",
            "a layer or a row: its scores are errors of one layer's output",
        )),
        scope => Ok(scope),
    }
}

fn plan(task: &Task<'_>, budget: &Budget) -> Result<Plan> {
    let all = task.settings();
    let keep = budget.share(SECOND_ORDER.name)?;
    requirements(task.model, &all)?;
    check_pattern(&all.pruning, SECOND_ORDER.name, keep)?;
    let (layers, factorised) = matrices::chosen(task.model, &all.selection)?;
    let share = |layer: &Layer| pruned(uniform(layer, &all.pruning, keep));
    let chosen = layers
        .iter()
        .map(|layer| matrices::planned(layer, share(layer)));
    Ok(Plan {
        method: SECOND_ORDER.name.to_owned(),
        modules: chosen.chain(matrices::left(&factorised)).collect(),
    })
}

fn apply(task: &Task<'_>, plan: &Plan) -> Result<Compressed> {
    let all = task.settings();
    requirements(task.model, &all)?;
    let scope = scope(&all.pruning)?;
    let mut asked = Vec::new();
    for module in &plan.modules {
        asked.extend(matrices::asked(task.model, module)?);
    }
    let mut edit = Edit::of(task.model);
    // Neighbours that read the same are pruned by one look.
    for together in asked.chunk_by(|(a, _), (b, _)| a.input_site == b.input_site) {
        let Some((first, _)) = together.first() else {
            continue;
        };
        let moment = look(task, &edit, first)?;
        let inverse = Inverse::of(&moment, all.pruning.damping)?;
        for (layer, share) in together {
            rule(&all.pruning, layer, *share, scope == Scope::Row)?;
            let mut weights = matrices::read(&edit, layer)?;
            let rule = Choice {
                share: *share,
                by_row: scope == Scope::Row,
                pattern: all.pruning.pattern,
                block: match all.pruning.pattern {
                    Pattern::Unstructured => all.pruning.block,
                    Pattern::NOfM { m, .. } => all.pruning.block.next_multiple_of(m),
                },
            };
            prune(&mut weights, &inverse, rule)?;
            matrices::write(&mut edit, layer, weights)?;
        }
    }
    finished(SECOND_ORDER.name, task, plan, edit)
}

/// `E[x xᵀ]` of what a layer reads now. Blocks after it are not run.
fn look(task: &Task<'_>, edit: &Edit, layer: &Layer) -> Result<Matrix> {
    let data = task.observed(SECOND_ORDER.name)?;
    let model = match block_of(&layer.path) {
        Some((index, _)) => edit.through(index)?,
        None => edit.clone().finish()?,
    };
    let statistic = Statistic::Covariance {
        site: layer.input_site.clone(),
    };
    let requirements = Requirements {
        statistics: [statistic.clone()].into(),
    };
    let options = CalibrationOptions {
        batch: task.settings().batch,
        ..CalibrationOptions::default()
    };
    let calibration = Calibration::collect(&model, data, &requirements, options)?;
    let moment = calibration.tensor(&statistic)?;
    Ok(matrix_from_tensor("second moment of inputs", &moment)?)
}

/// `U` of `H⁻¹ = Uᵀ U`, upper triangular.
struct Inverse {
    upper: Matrix,
}

impl Inverse {
    /// Of `H = E[x xᵀ] + λ I`, `λ` being `damping` mean squares; 1 where all inputs are zero.
    fn of(moment: &Matrix, damping: f64) -> Result<Self> {
        let size = moment.nrows();
        let mean = (0..size).map(|i| moment[(i, i)]).sum::<f64>() / size.max(1) as f64;
        let lambda = if mean > 0.0 { damping * mean } else { 1.0 };
        let damped = Matrix::from_fn(size, size, |i, j| {
            moment[(i, j)] + if i == j { lambda } else { 0.0 }
        });
        let identity = Matrix::identity(size, size);
        let inverse = cholesky("second moment of inputs", damped.as_ref())?;
        let inverse = inverse.solve(identity.as_ref())?;
        let lower = cholesky("inverse second moment of inputs", inverse.as_ref())?.lower;
        Ok(Self {
            upper: lower.transpose().to_owned(),
        })
    }

    /// The first `width` rows of the inverse of the part of `H` from `start` on,
    /// `[width, size − start]`.
    fn from(&self, start: usize, width: usize) -> Matrix {
        let size = self.upper.ncols();
        let rows = self
            .upper
            .as_ref()
            .submatrix(start, start, width, size - start);
        let square = self.upper.as_ref().submatrix(start, start, width, width);
        square.transpose() * rows
    }
}

/// How many weights go, and where.
#[derive(Clone, Copy, Debug)]
struct Choice {
    share: f64,
    by_row: bool,
    pattern: Pattern,
    block: usize,
}

/// Prunes weights `[rows, columns]`, row after row.
fn prune(weights: &mut [f64], inverse: &Inverse, choice: Choice) -> Result<()> {
    let columns = inverse.upper.ncols();
    let rows = weights.len() / columns.max(1);
    let target = |count: usize| (choice.share * count as f64).round() as usize;
    // What was zero before stays so, whatever would make up for something there.
    let zeros: Vec<bool> = weights.iter().map(|weight| *weight == 0.0).collect();
    let mut gone = vec![0; rows];
    for start in (0..columns).step_by(choice.block.max(1)) {
        let width = choice.block.min(columns - start);
        let part = inverse.from(start, width);
        let orders: Vec<Vec<Removal>> = weights
            .chunks(columns)
            .zip(zeros.chunks(columns))
            .map(|(row, zeros)| {
                let block = start..start + width;
                let row = row.get(block.clone()).unwrap_or_default();
                order(
                    row,
                    zeros.get(block).unwrap_or_default(),
                    &part,
                    choice.pattern,
                )
            })
            .collect();
        let end = start + width;
        let counts = match (choice.pattern, choice.by_row) {
            (Pattern::NOfM { .. }, _) => orders.iter().map(Vec::len).collect(),
            (Pattern::Unstructured, true) => {
                let left = gone.iter().map(|gone| target(end).saturating_sub(*gone));
                left.collect()
            }
            (Pattern::Unstructured, false) => {
                let gone: usize = gone.iter().sum();
                cheapest(&orders, target(rows * end).saturating_sub(gone))
            }
        };
        for ((row, order), (count, gone)) in weights
            .chunks_mut(columns)
            .zip(&orders)
            .zip(counts.into_iter().zip(&mut gone))
        {
            let zeros = order.iter().take_while(|removal| removal.was_zero).count();
            let removed: Vec<usize> = order
                .iter()
                .take(count.max(zeros))
                .map(|removal| removal.place)
                .collect();
            *gone += removed.len();
            if let Some(rest) = row.get_mut(start..) {
                remove(rest, &part, &removed)?;
            }
        }
    }
    Ok(())
}

/// One weight that goes.
#[derive(Clone, Copy, Debug)]
struct Removal {
    /// Its column in the block.
    place: usize,
    /// What it adds to the error, at least as much as the one before it.
    rise: f64,
    was_zero: bool,
}

/// The order in which a row gives up the weights of a block, `inverse` being `[H⁻¹]` of what may
/// change, the block first: those that were zero, then the cheapest one of what is left each time,
/// within what the pattern lets go.
fn order(block: &[f64], zeros: &[bool], inverse: &Matrix, pattern: Pattern) -> Vec<Removal> {
    let width = block.len();
    let mut weights = block.to_vec();
    // Rows of the block's own part, updated as weights go.
    let mut own: Vec<Vec<f64>> = (0..width)
        .map(|i| (0..width).map(|j| inverse[(i, j)]).collect())
        .collect();
    let mut stays = vec![true; width];
    let mut removals: Vec<Removal> = Vec::new();
    while let Some((place, rise)) = next(&weights, zeros, &own, &stays, pattern) {
        let last = removals.last().map_or(0.0, |last| last.rise);
        let pivot = own.get(place).cloned().unwrap_or_default();
        let (Some(diagonal), Some(weight)) = (pivot.get(place), weights.get(place).copied()) else {
            break;
        };
        let was_zero = zeros.get(place).is_some_and(|zero| *zero);
        removals.push(Removal {
            place,
            rise: if was_zero { 0.0 } else { rise.max(last) },
            was_zero,
        });
        // w ← w − w_q / [H⁻¹]_qq H⁻¹ e_q, and H⁻¹ ← H⁻¹ − H⁻¹ e_q e_qᵀ H⁻¹ / [H⁻¹]_qq
        for (i, row) in own.iter_mut().enumerate() {
            if i == place || !stays.get(i).is_some_and(|stays| *stays) {
                continue;
            }
            let factor = pivot.get(i).copied().unwrap_or(0.0) / diagonal;
            for (entry, other) in row.iter_mut().zip(&pivot) {
                *entry -= factor * other;
            }
            if let Some(other) = weights.get_mut(i) {
                *other -= weight * factor;
            }
        }
        if let Some(stays) = stays.get_mut(place) {
            *stays = false;
        }
    }
    removals
}

/// The cheapest weight that may go, and `w² / [H⁻¹]_qq`; what was zero from the beginning first.
fn next(
    weights: &[f64],
    zeros: &[bool],
    own: &[Vec<f64>],
    stays: &[bool],
    pattern: Pattern,
) -> Option<(usize, f64)> {
    let may_go = |place: usize| match pattern {
        Pattern::Unstructured => true,
        Pattern::NOfM { n, m } => {
            let group = place / m.max(1) * m;
            let group = stays.get(group..(group + m).min(stays.len()));
            group.is_some_and(|group| group.iter().filter(|stays| **stays).count() > n)
        }
    };
    let candidates = weights.iter().zip(zeros).zip(own).zip(stays).enumerate();
    let candidates = candidates.filter(|(place, (_, stays))| **stays && may_go(*place));
    let costs = candidates.filter_map(|(place, (((weight, zero), row), _))| {
        let diagonal = row.get(place)?.max(f64::MIN_POSITIVE);
        Some((place, !zero, weight * weight / diagonal))
    });
    costs
        .min_by(|a, b| a.1.cmp(&b.1).then(a.2.total_cmp(&b.2)))
        .map(|(place, _, cost)| (place, cost))
}

/// How many each row gives up when the `count` cheapest removals of all rows are made.
fn cheapest(orders: &[Vec<Removal>], count: usize) -> Vec<usize> {
    let mut all: Vec<(f64, usize)> = Vec::new();
    for (row, order) in orders.iter().enumerate() {
        all.extend(order.iter().map(|removal| (removal.rise, row)));
    }
    all.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    let mut counts = vec![0; orders.len()];
    for (_, row) in all.into_iter().take(count) {
        if let Some(count) = counts.get_mut(row) {
            *count += 1;
        }
    }
    counts
}

/// `w ← w − H⁻¹_{:,S} ([H⁻¹]_SS)⁻¹ w_S`, and the weights of `S` exactly zero. `row` begins with the block.
fn remove(row: &mut [f64], inverse: &Matrix, removed: &[usize]) -> Result<()> {
    let weight = |place: &usize| row.get(*place).copied().unwrap_or(0.0);
    if removed.iter().any(|place| weight(place) != 0.0) {
        let count = removed.len();
        let among = Matrix::from_fn(count, count, |a, b| {
            let pair = removed.get(a).zip(removed.get(b));
            pair.map_or(0.0, |(i, j)| inverse[(*i, *j)])
        });
        let right = Matrix::from_fn(count, 1, |a, _| removed.get(a).map_or(0.0, weight));
        let solved = cholesky("inverse second moment of what goes", among.as_ref())?;
        let solved = solved.solve(right.as_ref())?;
        for (index, place) in removed.iter().enumerate() {
            let factor = solved[(index, 0)];
            for (column, weight) in row.iter_mut().enumerate() {
                *weight -= factor * inverse[(*place, column)];
            }
        }
    }
    for place in removed {
        if let Some(weight) = row.get_mut(*place) {
            *weight = 0.0;
        }
    }
    Ok(())
}
