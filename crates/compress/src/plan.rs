//! Which rank each layer gets, before anything is cut.

use std::collections::BTreeMap;

use lapidary_factor::rank;
use lapidary_model::Model;
use serde::{Deserialize, Serialize};

use crate::selection::Layer;
use crate::{Error, Method, Result, Selection};

/// How much may be left.
#[derive(Clone, Debug, PartialEq)]
pub enum Budget {
    /// One share of its weights for every chosen layer, in `(0, 1]`: 0.7 cuts 30 %.
    Keep(f64),
    /// Parameters of the whole compressed model. The chosen layers get the largest common share
    /// that fits.
    Parameters(usize),
    /// A rank for each layer named, by path; the others stay.
    Ranks(BTreeMap<String, usize>),
}

/// What happens to one layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Change {
    /// It becomes two layers with `rank` features between them.
    Factorise {
        /// Features between the layers.
        rank: usize,
    },
    /// It stays as it is.
    Leave {
        /// Why.
        reason: String,
    },
}

/// One layer of a plan.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerPlan {
    /// Path of the layer.
    pub path: String,
    /// Width of its input.
    pub input: usize,
    /// Width of its output.
    pub output: usize,
    /// What happens to it.
    pub change: Change,
}

/// What a method will do to each chosen layer: plain data, to be read, kept or edited before it
/// is applied.
///
/// [`Plan::new`] never plans a rank that does not pay. [`Plan::apply`] does what the plan says,
/// so that a rank which someone writes into it by hand is obeyed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// How layers are factorised.
    pub method: Method,
    /// Every chosen layer.
    pub layers: Vec<LayerPlan>,
}

impl Plan {
    /// Plans the ranks of the chosen layers. A layer whose rank would not save weights, `r ≥
    /// input · output / (input + output)`, is left, and its entry says so.
    pub fn new(
        model: &Model,
        method: Method,
        selection: &Selection,
        budget: &Budget,
    ) -> Result<Self> {
        let layers = selection.chosen(model)?;
        let ranks = match budget {
            Budget::Keep(share) => {
                if !(*share > 0.0 && *share <= 1.0) {
                    return Err(Error::invalid(
                        "share of weights to keep",
                        share,
                        "above 0 and at most 1",
                    ));
                }
                at_share(&layers, *share)
            }
            Budget::Parameters(limit) => at_share(&layers, share(model, method, &layers, *limit)?),
            Budget::Ranks(ranks) => by_hand(&layers, ranks)?,
        };
        let layers = layers
            .into_iter()
            .map(|layer| LayerPlan {
                change: change(model, method, &layer, ranks.get(&layer.path).copied()),
                path: layer.path,
                input: layer.input,
                output: layer.output,
            })
            .collect();
        Ok(Self { method, layers })
    }

    /// Parameters of `model` once the plan is applied.
    pub fn parameters(&self, model: &Model) -> usize {
        let saved: usize = self
            .layers
            .iter()
            .map(|layer| match layer.change {
                Change::Factorise { rank } => (layer.input * layer.output)
                    .saturating_sub(rank::parameters(layer.input, layer.output, rank)),
                Change::Leave { .. } => 0,
            })
            .sum();
        model.parameter_count() - saved
    }
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

fn change(model: &Model, method: Method, layer: &Layer, rank: Option<usize>) -> Change {
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
fn share(model: &Model, method: Method, layers: &[Layer], limit: usize) -> Result<f64> {
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
