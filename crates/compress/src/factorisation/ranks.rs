//! Which rank each layer gets, before anything is cut.

use std::collections::BTreeMap;

use lapidary_factor::rank;
use lapidary_model::Model;

use crate::plan::{Budget, Change, ModulePlan, Plan};
use crate::selection::Layer;
use crate::{Error, Factorisation, Result, Selection};

impl Factorisation {
    /// Plans the ranks of the chosen layers. A layer whose rank would not save weights, `r ≥
    /// input · output / (input + output)`, is left, and its entry says so.
    ///
    /// # Errors
    /// When the selection matches no layer or the budget cannot be met.
    pub fn plan(self, model: &Model, selection: &Selection, budget: &Budget) -> Result<Plan> {
        let layers = selection.chosen(model)?;
        let ranks = match budget {
            Budget::Keep(_) => at_share(&layers, budget.share(self.name())?),
            Budget::Parameters(limit) => at_share(&layers, share(model, self, &layers, *limit)?),
            Budget::Ranks(ranks) => by_hand(&layers, ranks)?,
        };
        let modules = layers
            .into_iter()
            .map(|layer| ModulePlan {
                change: change(model, self, &layer, ranks.get(&layer.path).copied()),
                path: layer.path,
                input: layer.input,
                output: layer.output,
            })
            .collect();
        Ok(Plan {
            method: self.name().to_owned(),
            modules,
        })
    }
}

/// Parameters of `model` once a plan of factorisations is applied.
pub fn parameters_after(plan: &Plan, model: &Model) -> usize {
    let saved: usize = plan
        .modules
        .iter()
        .map(|layer| match layer.change {
            Change::Factorise { rank } => (layer.input * layer.output)
                .saturating_sub(rank::parameters(layer.input, layer.output, rank)),
            _ => 0,
        })
        .sum();
    model.parameter_count() - saved
}

/// Whether `rank` saves weights.
fn pays(input: usize, output: usize, rank: usize) -> bool {
    rank::parameters(input, output, rank) < input * output
}

fn at_share(layers: &[Layer], share: f64) -> BTreeMap<String, usize> {
    layers
        .iter()
        .map(|layer| {
            let rank = rank::for_ratio(layer.input, layer.output, share);
            (layer.path.clone(), rank)
        })
        .collect()
}

fn by_hand(layers: &[Layer], ranks: &BTreeMap<String, usize>) -> Result<BTreeMap<String, usize>> {
    for (path, rank) in ranks {
        let Some(layer) = layers.iter().find(|layer| layer.path == *path) else {
            return Err(Error::invalid(
                format!("rank of {path}"),
                rank,
                "absent: this is not a chosen layer",
            ));
        };
        let largest = layer.input.min(layer.output);
        if *rank == 0 || *rank > largest {
            return Err(Error::invalid(
                format!("rank of {path}"),
                rank,
                format!("between 1 and {largest}"),
            ));
        }
    }
    Ok(ranks.clone())
}

fn change(model: &Model, method: Factorisation, layer: &Layer, rank: Option<usize>) -> Change {
    let reason = match (method.obstacle(model, layer), rank) {
        (Some(obstacle), _) => obstacle.to_owned(),
        (None, None) => "no rank was asked for".to_owned(),
        (None, Some(rank)) if pays(layer.input, layer.output, rank) => {
            return Change::Factorise { rank };
        }
        (None, Some(rank)) => format!(
            "rank {rank} has {} weights, no fewer than the {} of the whole layer",
            rank::parameters(layer.input, layer.output, rank),
            layer.input * layer.output
        ),
    };
    Change::Leave { reason }
}

/// The largest common share at which the model has at most `limit` parameters.
fn share(model: &Model, method: Factorisation, layers: &[Layer], limit: usize) -> Result<f64> {
    let cut: Vec<&Layer> = layers
        .iter()
        .filter(|layer| method.obstacle(model, layer).is_none())
        .collect();
    let dense: usize = cut.iter().map(|layer| layer.weights()).sum();
    let fixed = model.parameter_count() - dense;
    let total = |share: f64| -> usize {
        let weights = cut.iter().map(|layer| {
            let rank = rank::for_ratio(layer.input, layer.output, share);
            if pays(layer.input, layer.output, rank) {
                rank::parameters(layer.input, layer.output, rank)
            } else {
                layer.weights()
            }
        });
        fixed + weights.sum::<usize>()
    };
    let least = total(0.0);
    if least > limit {
        return Err(Error::invalid(
            "parameter budget",
            limit,
            format!("at least {least}, what is left at rank 1 of every chosen layer"),
        ));
    }
    if total(1.0) <= limit {
        return Ok(1.0);
    }
    // The total is a rising staircase in the share: after 60 halvings the step is found.
    let (mut low, mut high) = (0.0, 1.0);
    for _ in 0..60 {
        let middle = 0.5 * (low + high);
        if total(middle) <= limit {
            low = middle;
        } else {
            high = middle;
        }
    }
    Ok(low)
}
