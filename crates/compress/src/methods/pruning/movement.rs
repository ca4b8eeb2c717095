//! Sets weights to zero that training moves towards zero (Sanh, Wolf & Rush 2020, arXiv 2005.07683).
//!
//! ```text
//! S = − Σ_t w_t ∂L/∂w̄_t        w̄ = w ⊙ M,   M keeps the weights of largest S
//! ```
//!
//! A step of descent moves `w` by `−∂L/∂w`, so that a term is positive where the step leads away from
//! zero, however large the weight is. The gradient by the masked weight `w̄` counts for `w` as if there
//! were no mask, so that a weight that is masked still has a score and may come back, with the value
//! that it had; while it is masked it is not trained and does not decay. The mask follows the cubic
//! ramp over the first part of the steps and is fixed in the rest.
//!
//! What comes out is the model of the last step, or where some examples are held out the one of least loss on
//! these from the last mask on, the schedule being the same: earlier models have fewer zeros.
//!
//! A weight that is zero to begin with stays zero.

use std::collections::BTreeMap;

use lapidary_kernels::{DType, GradStore, Tensor, Var, backward};
use lapidary_model::Model;
use lapidary_train::{Decay, Masks, Schedule as Rates, UpdateOptions, Updates};

use super::settings::{MovementSettings, PruneSettings, Scope};
use super::{Pattern, check_pattern, finished, global, matrices, pruned, rule, uniform};
use crate::ahead::Refused;
use crate::data::Batch;
use crate::edit::Edit;
use crate::error::engine;
use crate::heal::{Order, adam, cubic_sparsity, number, trained};
use crate::method::{Effect, Method, Schedule, Task};
use crate::plan::{Budget, Plan};
use crate::report::Compressed;
use crate::requirements::Requirements;
use crate::{CalibrationData, Error, Layer, Objective, Result};

/// Movement in the list of methods.
pub(crate) const MOVEMENT: Method = Method {
    name: "movement",
    summary: "Sets weights to zero that training moves towards zero, while it trains",
    source: "Sanh, Wolf & Rush 2020, arXiv 2005.07683",
    schedule: Schedule::Training,
    effect: Effect::Weights,
    observes: true,
    leaves: &[],
    refuses: |_| &[Refused::ChosenFactors],
    requirements: |model, settings| {
        settings.pruning.check()?;
        matrices::chosen(model, &settings.selection)?;
        Ok(Requirements::default())
    },
    plan,
    apply,
    cut: None,
};

fn plan(task: &Task<'_>, budget: &Budget) -> Result<Plan> {
    let all = task.settings();
    let settings = &all.pruning;
    settings.check()?;
    let keep = budget.share(MOVEMENT.name)?;
    check_pattern(settings, MOVEMENT.name, keep)?;
    let (layers, factorised) = matrices::chosen(task.model, &all.selection)?;
    let each: Vec<f64> = layers
        .iter()
        .map(|layer| uniform(layer, settings, keep))
        .collect();
    let shares = match (settings.scope, settings.pattern) {
        // Scores are changes of one loss, which compare. They are those of a training in which every
        // matrix loses as much.
        (Some(Scope::Global), Pattern::Unstructured) if each.iter().any(|share| *share > 0.0) => {
            let wanted: Vec<(Layer, f64)> = layers.iter().cloned().zip(each).collect();
            global(&learn(task, &wanted)?.scores, settings, keep)
        }
        _ => each,
    };
    let chosen = layers.iter().zip(shares);
    let chosen = chosen.map(|(layer, share)| matrices::planned(layer, pruned(share)));
    Ok(Plan {
        method: MOVEMENT.name.to_owned(),
        modules: chosen.chain(matrices::left(&factorised)).collect(),
    })
}

fn apply(task: &Task<'_>, plan: &Plan) -> Result<Compressed> {
    task.settings().pruning.check()?;
    let mut wanted = Vec::new();
    for module in &plan.modules {
        wanted.extend(matrices::asked(task.model, module)?);
    }
    let mut edit = Edit::of(task.model);
    if !wanted.is_empty() {
        for (name, tensor) in learn(task, &wanted)?.parameters {
            edit.put(name, &tensor)?;
        }
    }
    finished(MOVEMENT.name, task, plan, edit)
}

/// What training left.
struct Learned {
    parameters: BTreeMap<String, Tensor>,
    /// Of each matrix that was asked for, as they compare with those of the others.
    scores: Vec<Vec<f64>>,
}

/// Trains the model while these layers lose these shares of their weights.
fn learn(task: &Task<'_>, wanted: &[(Layer, f64)]) -> Result<Learned> {
    let all = task.settings();
    let told = &all.pruning.movement;
    let all_examples = task.observed(MOVEMENT.name)?;
    let objective = Objective::of(task.model, all_examples)?;
    let sides = sides(all_examples, told.held_out)?;
    let (data, held_out) = match &sides {
        Some((training, held_out)) => (training, Some(held_out)),
        None => (all_examples, None),
    };
    let student = Model::trainable(task.model.spec().clone(), &mut trained(task.model)?)?;
    let mut updates = Updates::new(
        &student,
        &UpdateOptions {
            optimiser: adam(told.weight_decay),
            peak: told.rate,
            clip: Some(1.0),
            ..UpdateOptions::default()
        },
    )?;
    let mut moving = wanted
        .iter()
        .map(|(layer, share)| Moving::new(&student, layer, *share))
        .collect::<Result<Vec<_>>>()?;
    updates.set_masks(masks(&moving)?)?;
    let rates = Rates {
        peak: told.rate,
        floor: 0.0,
        warm_up: told.steps / 10,
        steps: told.steps,
        decay: Decay::Cosine,
    };
    let last = last_mask(told);
    let mut order = Order::new(data, all.seed);
    let mut best: Option<(f64, BTreeMap<String, Tensor>)> = None;
    for step in 1..=told.steps {
        let examples = order.next(told.batch);
        let batch = Batch::new(&examples, &student.device())?;
        let output = crate::calibration::forward(&student, &batch, None)?;
        let loss = engine(objective.losses(&output, &batch)?.mean_all())?;
        if !number(&loss)?.is_finite() {
            return Err(Error::NotFinite {
                what: format!("the loss of step {step} of movement, at rate {}", told.rate),
            });
        }
        let mut gradients = engine(backward(&loss))?;
        for matrix in &mut moving {
            matrix.score(&gradients)?;
        }
        updates.step(&mut gradients, rates.rate(step - 1), 1.0)?;
        for matrix in &mut moving {
            matrix.follow()?;
        }
        if step == last || (step < last && step.is_multiple_of(told.every)) {
            for matrix in &mut moving {
                matrix.mask(&all.pruning, step as f64 / last as f64)?;
            }
            updates.set_masks(masks(&moving)?)?;
        }
        let measured = (step - last.min(step)).is_multiple_of(told.every) || step == told.steps;
        if let Some(held_out) = held_out.filter(|_| measured && step >= last) {
            let loss = objective.mean(&student, held_out, told.batch)?;
            let better = |(least, _): &(f64, _)| loss.total_cmp(least).is_lt();
            if best.as_ref().is_none_or(better) {
                best = Some((loss, updates.parameters()?));
            }
        }
    }
    let least = moving
        .iter()
        .map(Moving::least)
        .fold(f64::INFINITY, f64::min);
    Ok(Learned {
        parameters: match best {
            Some((_, parameters)) => parameters,
            None => updates.parameters()?,
        },
        scores: moving.iter().map(|matrix| matrix.compared(least)).collect(),
    })
}

/// The examples that are trained on, and those that are held out, one of `one_of`; none of these where it is 0.
fn sides(
    data: &CalibrationData,
    one_of: usize,
) -> Result<Option<(CalibrationData, CalibrationData)>> {
    if one_of == 0 {
        return Ok(None);
    }
    if data.len() < 2 {
        let expected = "at least 2, one of them to be held out, or pruning.movement.held_out 0";
        return Err(Error::invalid("examples of movement", data.len(), expected));
    }
    let side = |wanted: bool| {
        let examples = data.examples().iter().enumerate();
        let here = examples.filter(|(index, _)| (index % one_of == 1) == wanted);
        CalibrationData::new(here.map(|(_, example)| example.clone()).collect())
    };
    Ok(Some((side(false)?, side(true)?)))
}

/// The step behind which the mask is fixed.
fn last_mask(told: &MovementSettings) -> u64 {
    ((told.ramp * told.steps as f64).ceil() as u64).clamp(1, told.steps)
}

/// The masks of those matrices that have any zero.
fn masks(moving: &[Moving]) -> Result<Masks> {
    let masked = moving.iter().filter(|matrix| matrix.pruned.contains(&true));
    let tensors = masked.map(|matrix| {
        let kept = matrix
            .pruned
            .iter()
            .map(|pruned| f64::from(u8::from(!pruned)));
        let mask = matrix.laid_out(kept.collect())?;
        let name = Layer::weight_name(&matrix.layer.path);
        Ok((name, engine(mask.to_dtype(DType::U8))?))
    });
    Ok(Masks::new(tensors.collect::<Result<_>>()?)?)
}

/// A matrix that loses weights while it is trained; its numbers row after row.
struct Moving {
    layer: Layer,
    /// The share that goes in the end.
    share: f64,
    /// `w̄`.
    variable: Var,
    /// `w`.
    weights: Vec<f64>,
    /// `S`.
    scores: Vec<f64>,
    /// What was zero to begin with.
    gone: Vec<bool>,
    /// What is masked.
    pruned: Vec<bool>,
}

impl Moving {
    fn new(student: &Model, layer: &Layer, share: f64) -> Result<Self> {
        let name = Layer::weight_name(&layer.path);
        let variable = student.variables().get(&name).cloned();
        let variable = variable.ok_or_else(|| {
            Error::invalid(
                format!("layer {}", layer.path),
                "without a weight of its own",
                "a dense linear layer of the model",
            )
        })?;
        let weights = matrices::entries(layer, variable.as_tensor())?;
        let gone: Vec<bool> = weights.iter().map(|weight| *weight == 0.0).collect();
        Ok(Self {
            layer: layer.clone(),
            share,
            scores: vec![0.0; weights.len()],
            pruned: gone.clone(),
            variable,
            weights,
            gone,
        })
    }

    /// Adds `−w ∂L/∂w̄`.
    fn score(&mut self, gradients: &GradStore) -> Result<()> {
        let Some(gradient) = gradients.get(self.variable.as_tensor()) else {
            return Ok(());
        };
        let gradient = matrices::entries(&self.layer, gradient)?;
        let terms = self.weights.iter().zip(gradient);
        for (score, (weight, slope)) in self.scores.iter_mut().zip(terms) {
            *score -= weight * slope;
        }
        Ok(())
    }

    /// Takes over what a step made of the weights that are not masked.
    fn follow(&mut self) -> Result<()> {
        let found = matrices::entries(&self.layer, self.variable.as_tensor())?;
        let pairs = self.weights.iter_mut().zip(found).zip(&self.pruned);
        for ((weight, found), _) in pairs.filter(|(_, pruned)| !**pruned) {
            *weight = found;
        }
        Ok(())
    }

    /// Masks by the scores so far, at such a share of the ramp.
    fn mask(&mut self, settings: &PruneSettings, progress: f64) -> Result<()> {
        let share = match settings.pattern {
            Pattern::Unstructured => cubic_sparsity(0.0, self.share, progress),
            Pattern::NOfM { .. } => self.share,
        };
        let by_row = settings.scope == Some(Scope::Row);
        let rule = rule(settings, &self.layer, share, by_row)?;
        self.pruned = rule.pruned(&self.compared(self.least()), self.layer.input);
        let mut kept = self.weights.clone();
        let marks = self.pruned.iter_mut().zip(&self.gone);
        for ((pruned, gone), weight) in marks.zip(&mut kept) {
            *pruned |= gone;
            if *pruned {
                *weight = 0.0;
            }
        }
        let kept = engine(self.laid_out(kept)?.to_dtype(self.variable.dtype()))?;
        engine(self.variable.set(&kept))
    }

    /// The least score of what was not zero to begin with.
    fn least(&self) -> f64 {
        let scores = self.scores.iter().zip(&self.gone);
        let scores = scores.filter(|(_, gone)| !**gone).map(|(score, _)| *score);
        scores.fold(f64::INFINITY, f64::min)
    }

    /// The scores above the least of all, and below them zero for what was zero to begin with.
    fn compared(&self, least: f64) -> Vec<f64> {
        let scores = self.scores.iter().zip(&self.gone);
        scores
            .map(|(score, gone)| match gone {
                true => 0.0,
                false => score - least + f64::MIN_POSITIVE,
            })
            .collect()
    }

    /// Entries as the weight lies.
    fn laid_out(&self, entries: Vec<f64>) -> Result<Tensor> {
        matrices::laid_out(&self.layer, entries, self.variable.device())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lapidary_kernels::Device;

    /// A matrix `[2, 3]` of which half is to go, one entry being zero to begin with.
    fn moving() -> Moving {
        let weight = Tensor::new(&[[1f64, -2.0, 3.0], [0.0, 0.5, -4.0]], &Device::Cpu).unwrap();
        let variable = Var::from_tensor(&weight).unwrap();
        let layer = Layer {
            path: "layer".to_owned(),
            input_site: "in".to_owned(),
            input: 3,
            output: 2,
            rank: None,
        };
        let weights = matrices::entries(&layer, variable.as_tensor()).unwrap();
        let gone: Vec<bool> = weights.iter().map(|weight| *weight == 0.0).collect();
        Moving {
            layer,
            share: 0.5,
            variable,
            scores: vec![0.0; 6],
            pruned: gone.clone(),
            weights,
            gone,
        }
    }

    fn now(matrix: &Moving) -> Vec<f64> {
        matrices::entries(&matrix.layer, matrix.variable.as_tensor()).unwrap()
    }

    #[test]
    fn a_weight_that_is_masked_has_a_score_and_comes_back_as_it_was() {
        let (mut matrix, settings) = (moving(), PruneSettings::default());
        // L = Σ c w̄, whose gradient is c.
        let slopes = [[2f64, 1.0, -1.0], [5.0, -3.0, 0.25]];
        let score = |matrix: &mut Moving, sign: f64| {
            let slopes = Tensor::new(&slopes, &Device::Cpu).unwrap();
            let slopes = slopes.affine(sign, 0.0).unwrap();
            let loss = (matrix.variable.as_tensor() * slopes).unwrap();
            let loss = loss.sum_all().unwrap();
            matrix.score(&loss.backward().unwrap()).unwrap();
        };
        score(&mut matrix, 1.0);
        // −w c of [1, −2, 3, 0, ½, −4] and [2, 1, −1, 5, −3, ¼].
        assert_eq!(matrix.scores, [-2.0, 2.0, 3.0, 0.0, 1.5, 1.0]);
        matrix.mask(&settings, 1.0).unwrap();
        // The zero goes before any score, then −2 and 1.
        assert_eq!(matrix.pruned, [true, false, false, true, false, true]);
        assert_eq!(now(&matrix), [0.0, -2.0, 3.0, 0.0, 0.5, 0.0]);
        for _ in 0..2 {
            score(&mut matrix, -1.0);
        }
        matrix.follow().unwrap();
        assert_eq!(matrix.scores, [2.0, -2.0, -3.0, 0.0, -1.5, -1.0]);
        matrix.mask(&settings, 1.0).unwrap();
        assert_eq!(now(&matrix), [1.0, 0.0, 0.0, 0.0, 0.5, -4.0]);
    }

    #[test]
    fn rows_lose_alike_where_they_are_asked_to() {
        let mut matrix = moving();
        matrix.scores = vec![9.0, 8.0, 7.0, 0.0, -1.0, -2.0];
        let settings = PruneSettings {
            scope: Some(Scope::Row),
            ..PruneSettings::default()
        };
        matrix.share = 1.0 / 3.0;
        matrix.mask(&settings, 1.0).unwrap();
        assert_eq!(now(&matrix), [1.0, -2.0, 0.0, 0.0, 0.5, -4.0]);
        // At the start of the ramp only what is gone is masked.
        matrix.mask(&settings, 0.0).unwrap();
        assert_eq!(now(&matrix), [1.0, -2.0, 3.0, 0.0, 0.5, -4.0]);
    }

    #[test]
    fn the_ramp_ends_within_the_steps() {
        let told = |steps, ramp| MovementSettings {
            steps,
            ramp,
            ..MovementSettings::default()
        };
        assert_eq!(last_mask(&told(100, 0.7)), 70);
        assert_eq!(last_mask(&told(100, 1.0)), 100);
        assert_eq!(last_mask(&told(3, 1e-9)), 1);
    }
}
