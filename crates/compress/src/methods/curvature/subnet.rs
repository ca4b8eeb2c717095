//! What the edit is compared with: a mask on single weights, learned so that some texts are
//! forgotten and others are not (BalancedSubnet: Sakarvadia et al. 2025, arXiv 2410.02159).
//!
//! ```text
//! minimise over M   r L_retain(W ⊙ M) − (1 − r) L_forget(W ⊙ M)
//! S ← S − W ⊙ ∂L/∂(W ⊙ M),     M = 0 for the lowest S
//! ```
//!
//! Each weight has a score; the gradient by the masked weight passes straight through the mask to
//! it (Ramanujan et al. 2020). Scores begin at zero, where the rate is one factor of all of them
//! and decides nothing. So many weights are masked as carry a given squared norm, so that the mask
//! takes as much away as an edit of another kind.

use std::collections::BTreeMap;

use lapidary_kernels::{DType, Tensor, Var, backward};
use lapidary_model::Model;

use crate::data::Batch;
use crate::edit::Edit;
use crate::error::engine;
use crate::heal::{Order, number, trained};
use crate::{CalibrationData, Error, Objective, Result};

/// How a mask is learned.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Subnet {
    /// Steps, each on examples of both sides.
    pub steps: u64,
    /// Examples of either side in a step.
    pub batch: usize,
    /// `r`, the weight of what is to be retained.
    pub retain: f64,
    /// Seed of the order of the examples.
    pub seed: u64,
}

impl Default for Subnet {
    fn default() -> Self {
        Self {
            steps: 100,
            batch: 8,
            retain: 0.5,
            seed: 0,
        }
    }
}

impl Subnet {
    /// The model with weights masked in the layers that `removed` names by their paths, of a
    /// squared norm of at most what it says, as much as whole weights allow.
    ///
    /// # Errors
    /// When a layer has no weight of its own, a norm is negative, `retain` is not within 0 and 1,
    /// the data does not suit the model, or the loss is not finite.
    pub fn learn(
        &self,
        model: &Model,
        forget: &CalibrationData,
        retain: &CalibrationData,
        removed: &BTreeMap<String, f64>,
    ) -> Result<Model> {
        if !(0.0..=1.0).contains(&self.retain) {
            return Err(Error::invalid(
                "weight of what is retained",
                self.retain,
                "0 to 1",
            ));
        }
        let student = Model::trainable(model.spec().clone(), &mut trained(model)?)?;
        let mut masked = removed
            .iter()
            .map(|(path, norm)| Masked::new(&student, path, *norm))
            .collect::<Result<Vec<_>>>()?;
        let sides = [(forget, self.retain - 1.0), (retain, self.retain)];
        let mut sides = sides
            .into_iter()
            .zip(0..)
            .map(|((data, weight), side)| {
                let order = Order::new(data, self.seed.wrapping_add(side));
                Ok((order, Objective::of(model, data)?, weight))
            })
            .collect::<Result<Vec<_>>>()?;
        for step in 1..=self.steps {
            let mut loss: Option<Tensor> = None;
            for (order, objective, weight) in &mut sides {
                let examples = order.next(self.batch.max(1));
                let batch = Batch::new(&examples, &student.device())?;
                let output = crate::calibration::forward(&student, &batch, None)?;
                let side = engine(objective.losses(&output, &batch)?.mean_all())?;
                let side = engine(side.affine(*weight, 0.0))?;
                loss = Some(match loss {
                    Some(before) => engine(before + side)?,
                    None => side,
                });
            }
            let Some(loss) = loss else { break };
            if !number(&loss)?.is_finite() {
                return Err(Error::NotFinite {
                    what: format!("the loss of step {step} of a mask"),
                });
            }
            let gradients = engine(backward(&loss))?;
            for layer in &mut masked {
                let gradient = gradients.get(layer.variable.as_tensor());
                layer.score(gradient)?;
                layer.mask()?;
            }
        }
        let mut edit = Edit::of(model);
        for layer in &masked {
            edit.put(layer.name.clone(), &layer.tensor()?)?;
        }
        edit.finish()
    }
}

/// One weight under its mask; numbers as they lie.
struct Masked {
    name: String,
    /// `W ⊙ M`.
    variable: Var,
    weights: Vec<f64>,
    scores: Vec<f64>,
    /// What `M` clears.
    cleared: Vec<bool>,
    /// The squared norm that may go.
    removed: f64,
}

impl Masked {
    fn new(student: &Model, path: &str, removed: f64) -> Result<Self> {
        let name = format!("{path}.weight");
        let variable = student.variables().get(&name).cloned().ok_or_else(|| {
            Error::invalid(
                format!("layer {path}"),
                "without a weight of its own",
                "a dense linear layer of the model",
            )
        })?;
        if removed.is_nan() || removed < 0.0 {
            return Err(Error::invalid(
                format!("squared norm that {path} loses"),
                removed,
                "0 or more",
            ));
        }
        let weights = numbers(variable.as_tensor())?;
        Ok(Self {
            name,
            scores: vec![0.0; weights.len()],
            cleared: vec![false; weights.len()],
            weights,
            variable,
            removed,
        })
    }

    /// `S ← S − W ⊙ ∂L/∂(W ⊙ M)`; nothing where the loss does not depend on the weight.
    fn score(&mut self, gradient: Option<&Tensor>) -> Result<()> {
        let Some(gradient) = gradient else {
            return Ok(());
        };
        let terms = self.weights.iter().zip(numbers(gradient)?);
        for (score, (weight, slope)) in self.scores.iter_mut().zip(terms) {
            *score -= weight * slope;
        }
        Ok(())
    }

    fn mask(&mut self) -> Result<()> {
        self.cleared = lowest(&self.scores, &self.weights, self.removed);
        let masked = engine(self.tensor()?.to_dtype(self.variable.dtype()))?;
        engine(self.variable.set(&masked))
    }

    fn tensor(&self) -> Result<Tensor> {
        let kept = self.weights.iter().zip(&self.cleared);
        let kept: Vec<f64> = kept
            .map(|(weight, cleared)| if *cleared { 0.0 } else { *weight })
            .collect();
        let shape = self.variable.dims();
        engine(Tensor::from_vec(kept, shape, self.variable.device()))
    }
}

/// Marks the weights of lowest score, the first of equal ones, as long as their squares sum to at
/// most `removed`.
fn lowest(scores: &[f64], weights: &[f64], removed: f64) -> Vec<bool> {
    let mut order: Vec<(f64, usize, f64)> = scores
        .iter()
        .zip(weights)
        .enumerate()
        .map(|(place, (score, weight))| (*score, place, weight * weight))
        .collect();
    order.sort_unstable_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
    let mut marks = vec![false; weights.len()];
    let mut sum = 0.0;
    for (_, place, square) in order {
        sum += square;
        if sum > removed {
            break;
        }
        if let Some(mark) = marks.get_mut(place) {
            *mark = true;
        }
    }
    marks
}

fn numbers(tensor: &Tensor) -> Result<Vec<f64>> {
    let flat = engine(engine(tensor.detach().to_dtype(DType::F64))?.flatten_all())?;
    engine(flat.to_vec1::<f64>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_scores_go_until_the_norm_is_spent() {
        let (scores, weights) = ([0.5, -1.0, -3.0, 0.0], [1.0, 2.0, 1.0, 3.0]);
        // 1, then 4, then 9 of squared norm.
        for (removed, expected) in [
            (0.9, [false, false, false, false]),
            (1.0, [false, false, true, false]),
            (4.9, [false, false, true, false]),
            (5.0, [false, true, true, false]),
            (100.0, [true, true, true, true]),
        ] {
            assert_eq!(lowest(&scores, &weights, removed), expected, "{removed}");
        }
        assert_eq!(lowest(&[0.0; 3], &[1.0; 3], 2.0), [true, true, false]);
    }
}
