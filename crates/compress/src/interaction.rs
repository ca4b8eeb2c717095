//! What two methods cost together beside what each costs alone, and whether their order counts.
//!
//! For a loss `L` and methods `A` and `B` that each take a fixed share,
//!
//! ```text
//! Δ(A) = L(A) − L        Δ(A, B) = L(A then B) − L
//! interaction = Δ(A, B) − Δ(A) − Δ(B)        order effect = Δ(A, B) − Δ(B, A)
//! ```
//!
//! Where the losses were linear and the methods touched different parts both would be zero. A method
//! that rounds and comes first is run again at the end, since the one after it needs numbers and
//! gives numbers: what remains of its being first is that the other one saw rounded weights.

use lapidary_model::Model;
use serde::Serialize;

use crate::method::{Method, Settings};
use crate::recipe::{Recipe, Stage};
use crate::{CalibrationData, Error, Result};

/// Two methods, together and alone.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Interaction {
    /// Place of one method in the list.
    pub first: usize,
    /// Place of the other.
    pub second: usize,
    /// `Δ` of the first, then the second; none where they cannot be run so.
    pub in_order: Option<f64>,
    /// `Δ` of the second, then the first; none where they cannot be run so.
    pub reversed: Option<f64>,
    /// `Δ(first, second) − Δ(first) − Δ(second)`, the smaller `Δ` of both orders.
    pub interaction: f64,
    /// `Δ(first, second) − Δ(second, first)`, of pairs that can be run in both orders.
    pub order_effect: Option<f64>,
    /// Why one of the orders cannot be run.
    pub refused: Option<String>,
}

/// Every pair of some methods.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Interactions {
    /// The loss of the model as it is.
    pub whole: f64,
    /// The methods.
    pub methods: Vec<Stage>,
    /// `Δ` of each alone.
    pub alone: Vec<f64>,
    /// Each pair once, those that go together in one order at least.
    pub pairs: Vec<Interaction>,
    /// Pairs that go together in no order, and why.
    pub left_out: Vec<(String, String, String)>,
}

/// Measures every pair of `stages` by `loss`, which is smaller for a better model.
///
/// # Errors
/// When a method by itself is not defined for the model, or the loss fails.
pub fn interactions<E: From<Error> + std::fmt::Display>(
    model: &Model,
    stages: &[Stage],
    data: Option<&CalibrationData>,
    settings: &Settings,
    mut loss: impl FnMut(&Model) -> std::result::Result<f64, E>,
) -> std::result::Result<Interactions, E> {
    let whole = loss(model)?;
    let mut rise = |chain: &[&Stage]| -> std::result::Result<f64, E> {
        Ok(loss(&after(model, chain, data, settings)?)? - whole)
    };
    let alone = stages
        .iter()
        .map(|stage| rise(&[stage]))
        .collect::<std::result::Result<Vec<_>, E>>()?;
    let (mut pairs, mut left_out) = (Vec::new(), Vec::new());
    for (first, one) in stages.iter().enumerate() {
        for (second, other) in stages.iter().enumerate().skip(first + 1) {
            let [there, back] = [[one, other], [other, one]].map(|order| {
                allowed(model, order, settings)
                    .map_err(E::from)
                    .and_then(|()| rise(&order))
            });
            let (in_order, reversed, refused) = match (there, back) {
                (Ok(there), Ok(back)) => (Some(there), Some(back), None),
                (Ok(there), Err(error)) => (Some(there), None, Some(error.to_string())),
                (Err(error), Ok(back)) => (None, Some(back), Some(error.to_string())),
                (Err(there), Err(back)) => {
                    let (there, back) = (there.to_string(), back.to_string());
                    let why = match there == back {
                        true => there,
                        false => format!("{there}; and the other way round {back}"),
                    };
                    left_out.push((one.method.clone(), other.method.clone(), why));
                    continue;
                }
            };
            let each = |index: usize| alone.get(index).copied().unwrap_or(0.0);
            let least = [in_order, reversed].into_iter().flatten();
            let least = least.fold(f64::INFINITY, f64::min);
            pairs.push(Interaction {
                first,
                second,
                in_order,
                reversed,
                interaction: least - each(first) - each(second),
                order_effect: in_order.zip(reversed).map(|(there, back)| there - back),
                refused,
            });
        }
    }
    Ok(Interactions {
        whole,
        methods: stages.to_vec(),
        alone,
        pairs,
        left_out,
    })
}

/// Refuses an order of which the second is sure not to be defined for what the first leaves.
fn allowed(model: &Model, order: [&Stage; 2], settings: &Settings) -> Result<()> {
    let recipe = Recipe {
        stages: order.map(Stage::clone).to_vec(),
    };
    recipe.check_model(model, settings)
}

/// The model after the stages, in numbers between them.
fn after(
    model: &Model,
    chain: &[&Stage],
    data: Option<&CalibrationData>,
    settings: &Settings,
) -> Result<Model> {
    let mut current: Option<Model> = None;
    let mut again: Vec<&Stage> = Vec::new();
    for (index, stage) in chain.iter().enumerate() {
        let rounds = Method::find(&stage.method)?.rounds();
        let mut next = alone(current.as_ref().unwrap_or(model), stage, data, settings)?;
        if rounds && index + 1 < chain.len() {
            next = next.dequantised()?;
            again.push(stage);
        }
        current = Some(next);
    }
    for stage in again {
        let cut = current.as_ref().unwrap_or(model);
        // Two methods that round give one rounding: the last.
        if cut.spec().quantised.is_empty() {
            current = Some(alone(cut, stage, data, settings)?);
        }
    }
    match current {
        Some(model) => Ok(model),
        None => model.written_out().map_err(Into::into),
    }
}

fn alone(
    model: &Model,
    stage: &Stage,
    data: Option<&CalibrationData>,
    settings: &Settings,
) -> Result<Model> {
    let recipe = Recipe {
        stages: vec![stage.clone()],
    };
    let mut done = recipe.run(model, data, settings)?;
    match done.pop() {
        Some(done) => Ok(done.compressed.model),
        None => model.written_out().map_err(Into::into),
    }
}
