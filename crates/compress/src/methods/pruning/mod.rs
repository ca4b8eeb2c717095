//! Weights set to zero, and whole heads and channels taken out: the baselines that every structured
//! method has to beat.
//!
//! A mask `M ∈ {0, 1}` of each chosen matrix keeps the weights of largest score: `W ⊙ M`. Criteria
//! differ in the score ([`scores`]; [`movement`], which is learned), among which weights it is compared
//! ([`Scope`]), and in whether what is left makes up for what went ([`second_order`]). Norms, biases and tables of positions are
//! never touched; the table of token embeddings and the head only where the selection names them.
//!
//! Masks of one shot are nested: a larger share takes what a smaller one took. The shares of a plan
//! are obeyed, so that those of the whole model, which need scores, are in the plan.
//!
//! Zeros take as much room as other numbers until something stores them otherwise; the report says
//! what they would take then. Heads and channels make the model smaller as it stands.

mod heads;
mod hidden;
mod matrices;
mod movement;
mod scores;
mod second_order;
mod select;
mod settings;

pub(crate) use heads::{PRUNE_HEADS, uneven_heads};
pub(crate) use hidden::{CHANNEL_GRADIENT, uneven_features};
pub(crate) use movement::MOVEMENT;
pub(crate) use second_order::SECOND_ORDER;
pub use settings::{MovementSettings, Pattern, PruneSettings, Scope};

use lapidary_kernels::SparseSizes;
use lapidary_model::Model;

use crate::ahead::Refused;
use crate::edit::Edit;
use crate::error::engine;
use crate::method::{Effect, Method, Schedule, Settings, Task};
use crate::plan::{Budget, Change, ModulePlan, Plan, readable};
use crate::report::{Compressed, ModuleReport};
use crate::requirements::{Requirements, Statistic};
use crate::{Calibration, Error, Layer, Result};
use scores::{Criterion, normalised};
use select::{Rule, shares};

/// Magnitude in the list of methods.
pub(crate) const MAGNITUDE: Method = Method {
    name: "magnitude",
    summary: "Sets the smallest weights to zero",
    source: "Han et al. 2015, arXiv 1506.02626",
    schedule: Schedule::OneShot,
    effect: Effect::Weights,
    observes: false,
    leaves: &[],
    refuses: |_| &[Refused::ChosenFactors],
    requirements: |model, settings| requirements(Criterion::Magnitude, model, settings),
    plan: |task, budget| plan(MAGNITUDE.name, Criterion::Magnitude, task, budget),
    apply: |task, plan| apply(MAGNITUDE.name, Criterion::Magnitude, task, plan),
    cut: None,
};

/// Chance in the list of methods.
pub(crate) const RANDOM_WEIGHTS: Method = Method {
    name: "random-weights",
    summary: "Sets weights to zero by chance: a baseline",
    source: "baseline",
    schedule: Schedule::OneShot,
    effect: Effect::Weights,
    observes: false,
    leaves: &[],
    refuses: |_| &[Refused::ChosenFactors],
    requirements: |model, settings| requirements(Criterion::Random, model, settings),
    plan: |task, budget| plan(RANDOM_WEIGHTS.name, Criterion::Random, task, budget),
    apply: |task, plan| apply(RANDOM_WEIGHTS.name, Criterion::Random, task, plan),
    cut: None,
};

/// First order in the list of methods.
pub(crate) const FIRST_ORDER: Method = Method {
    name: "first-order",
    summary: "Sets weights to zero whose loss changes least with them, to first order",
    source: "Molchanov et al. 2019, arXiv 1906.10771",
    schedule: Schedule::OneShot,
    effect: Effect::Weights,
    observes: false,
    leaves: &[],
    refuses: |_| &[Refused::ChosenFactors],
    requirements: |model, settings| requirements(Criterion::FirstOrder, model, settings),
    plan: |task, budget| plan(FIRST_ORDER.name, Criterion::FirstOrder, task, budget),
    apply: |task, plan| apply(FIRST_ORDER.name, Criterion::FirstOrder, task, plan),
    cut: None,
};

/// Activation-aware magnitude in the list of methods.
pub(crate) const WANDA: Method = Method {
    name: "wanda",
    summary: "Sets the smallest weights of each row to zero, in units of what they read (Wanda)",
    source: "Sun et al. 2023, arXiv 2306.11695",
    schedule: Schedule::OneShot,
    effect: Effect::Weights,
    observes: false,
    leaves: &[],
    refuses: |_| &[Refused::ChosenFactors],
    requirements: |model, settings| requirements(Criterion::ActivationAware, model, settings),
    plan: |task, budget| plan(WANDA.name, Criterion::ActivationAware, task, budget),
    apply: |task, plan| apply(WANDA.name, Criterion::ActivationAware, task, plan),
    cut: None,
};

fn requirements(criterion: Criterion, model: &Model, settings: &Settings) -> Result<Requirements> {
    settings.pruning.check()?;
    let (layers, _) = matrices::chosen(model, &settings.selection)?;
    Ok(criterion.requirements(&layers))
}

/// Refuses a share that a pattern does not come to.
fn check_pattern(settings: &PruneSettings, method: &str, share: f64) -> Result<()> {
    match settings.pattern {
        Pattern::NOfM { n, m } if (share - n as f64 / m as f64).abs() > 1e-9 => {
            Err(Error::invalid(
                format!("share of weights that {method} keeps"),
                readable(share),
                format!("{}, which {n} of {m} are", readable(n as f64 / m as f64)),
            ))
        }
        _ => Ok(()),
    }
}

/// Weights of a matrix that may go.
fn cap(settings: &PruneSettings, weights: usize) -> usize {
    weights - ((settings.keep_at_least * weights as f64).ceil() as usize).min(weights)
}

fn plan(
    method: &'static str,
    criterion: Criterion,
    task: &Task<'_>,
    budget: &Budget,
) -> Result<Plan> {
    let all = task.settings();
    let settings = &all.pruning;
    settings.check()?;
    let keep = budget.share(method)?;
    check_pattern(settings, method, keep)?;
    let (layers, factorised) = matrices::chosen(task.model, &all.selection)?;
    let scope = settings.scope.unwrap_or(criterion.scope());
    let shares = match (scope, settings.pattern) {
        (Scope::Global, Pattern::Unstructured) => {
            let edit = Edit::of(task.model);
            let mut lists = Vec::new();
            for layer in &layers {
                let weights = matrices::read(&edit, layer)?;
                let scores = criterion.scores(layer, &weights, task.calibration, all.seed)?;
                lists.push(match settings.normalise && criterion.has_scale() {
                    true => normalised(scores),
                    false => scores,
                });
            }
            global(&lists, settings, keep)
        }
        _ => layers
            .iter()
            .map(|layer| uniform(layer, settings, keep))
            .collect(),
    };
    let chosen = layers.iter().zip(shares);
    let chosen = chosen.map(|(layer, share)| matrices::planned(layer, pruned(share)));
    Ok(Plan {
        method: method.to_owned(),
        modules: chosen.chain(matrices::left(&factorised)).collect(),
    })
}

/// Every layer's share when the smallest scores of all go.
fn global(lists: &[Vec<f64>], settings: &PruneSettings, keep: f64) -> Vec<f64> {
    let caps: Vec<usize> = lists.iter().map(|list| cap(settings, list.len())).collect();
    let total: usize = lists.iter().map(Vec::len).sum();
    let count = ((1.0 - keep) * total as f64).round() as usize;
    let counts = shares(lists, &caps, count).into_iter().zip(lists);
    counts
        .map(|(count, list)| count as f64 / list.len().max(1) as f64)
        .collect()
}

/// A layer's share when all lose as much.
fn uniform(layer: &Layer, settings: &PruneSettings, keep: f64) -> f64 {
    let weights = layer.weights();
    match settings.pattern.pruned(layer.input) {
        Some(of_a_row) => of_a_row as f64 / layer.input.max(1) as f64,
        None => (1.0 - keep).min(cap(settings, weights) as f64 / weights.max(1) as f64),
    }
}

fn pruned(share: f64) -> Change {
    match share > 0.0 {
        true => Change::Prune { share },
        false => Change::Leave {
            reason: "none of its weights is to go".to_owned(),
        },
    }
}

fn apply(
    method: &'static str,
    criterion: Criterion,
    task: &Task<'_>,
    plan: &Plan,
) -> Result<Compressed> {
    let all = task.settings();
    all.pruning.check()?;
    let by_row = all.pruning.scope.unwrap_or(criterion.scope()) == Scope::Row;
    let mut edit = Edit::of(task.model);
    for module in &plan.modules {
        let Some((layer, share)) = matrices::asked(task.model, module)? else {
            continue;
        };
        let rule = rule(&all.pruning, &layer, share, by_row)?;
        let mut weights = matrices::read(&edit, &layer)?;
        let scores = criterion.scores(&layer, &weights, task.calibration, all.seed)?;
        let pruned = rule.pruned(&scores, layer.input);
        for (weight, _) in weights.iter_mut().zip(pruned).filter(|(_, pruned)| *pruned) {
            *weight = 0.0;
        }
        matrices::write(&mut edit, &layer, weights)?;
    }
    finished(method, task, plan, edit)
}

/// `w² E[(∂L/∂w)²]` of every weight of a matrix.
struct Saliency {
    scores: Vec<f64>,
    columns: usize,
}

/// The saliency of the layer at `path`.
fn saliency(edit: &Edit, path: &str, calibration: &Calibration) -> Result<Saliency> {
    let weights = edit.get(&Layer::weight_name(path))?;
    let columns = engine(weights.dim(1))?;
    let weights = engine(engine(weights.flatten_all())?.to_vec1::<f64>())?;
    let statistic = Statistic::Fisher {
        layer: path.to_owned(),
    };
    let squares = engine(calibration.tensor(&statistic)?.flatten_all())?;
    let squares = engine(squares.to_vec1::<f64>())?;
    let scores = weights.iter().zip(squares).map(|(w, g)| w * w * g);
    Ok(Saliency {
        scores: scores.collect(),
        columns: columns.max(1),
    })
}

impl Saliency {
    /// Summed over inputs, for each output.
    fn by_output(&self) -> Vec<f64> {
        let rows = self.scores.chunks(self.columns);
        rows.map(|row| row.iter().sum()).collect()
    }

    /// Summed over outputs, for each input.
    fn by_input(&self) -> Vec<f64> {
        let mut sums = vec![0.0; self.columns];
        for row in self.scores.chunks(self.columns) {
            let pairs = sums.iter_mut().zip(row);
            pairs.for_each(|(sum, score)| *sum += score);
        }
        sums
    }
}

/// The rule of a layer, whose share has to be the pattern's where there is one.
fn rule(settings: &PruneSettings, layer: &Layer, share: f64, by_row: bool) -> Result<Rule> {
    if let Some(of_a_row) = settings.pattern.pruned(layer.input) {
        let expected = of_a_row as f64 / layer.input.max(1) as f64;
        if (share - expected).abs() > 1e-9 {
            return Err(Error::invalid(
                format!("share of {}", layer.path),
                share,
                format!("{expected}, which the pattern takes"),
            ));
        }
    }
    Ok(Rule::of(
        share,
        settings.pattern,
        by_row,
        layer.output,
        layer.input,
    ))
}

/// The pruned model with its report.
fn finished(method: &str, task: &Task<'_>, plan: &Plan, edit: Edit) -> Result<Compressed> {
    let value = task.model.dtype().size_in_bytes();
    let mut modules = Vec::new();
    let mut sizes = Vec::new();
    for module in &plan.modules {
        modules.push(report(task, module, &edit, value, &mut sizes)?);
    }
    let mut compressed = Compressed::new(method, task, edit.finish()?, modules)?;
    if !sizes.is_empty() {
        let stored = matrices::stored(&matrices::together(&sizes));
        let changed = sizes.len();
        let pruned = compressed.report.modules.iter();
        let pruned = pruned.filter(|module| matches!(module.change, Change::Prune { .. }));
        let (mut before, mut after) = (0, 0);
        for module in pruned {
            before += module.parameters_before;
            after += module.parameters_after;
        }
        compressed.report.notes = vec![format!(
            "{changed} pruned matrices: {stored}; without their zeros {after} of {before} multiply-adds for \
             each row that they read"
        )];
    }
    Ok(compressed)
}

fn report(
    task: &Task<'_>,
    module: &ModulePlan,
    edit: &Edit,
    value: usize,
    sizes: &mut Vec<SparseSizes>,
) -> Result<ModuleReport> {
    match matrices::asked(task.model, module)? {
        None => {
            let weights = module.input * module.output;
            Ok(ModuleReport::new(module, weights, weights))
        }
        Some((layer, _)) => {
            let (report, size) = matrices::report(module, &matrices::read(edit, &layer)?, value);
            sizes.push(size);
            Ok(report)
        }
    }
}
