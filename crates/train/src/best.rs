//! The weights of the least validation loss, for runs that keep these and not the last.

use std::collections::BTreeMap;

use lapidary_kernels::Tensor;
use lapidary_model::Model;

use crate::spec::Keep;
use crate::state::TrainingState;
use crate::{Error, Result, TrainSpec};

/// Names in a saved state: each weight's begins with the first; the loss is there as its bits, which JSON leaves alone.
const WEIGHT: &str = "best.";
const STEP: &str = "best step";
const LOSS: &str = "best loss";

/// Weights that were validated.
pub(crate) struct Validated {
    /// Steps done when they were.
    pub(crate) step: u64,
    /// Their loss, in nats.
    pub(crate) loss: f64,
    pub(crate) model: Model,
}

/// The best weights so far. They are a part of the run's state, so that a run goes on with those it had when that was
/// saved, whatever it found and lost after it.
pub(crate) struct Best<'a> {
    spec: &'a TrainSpec,
    found: Option<Validated>,
}

impl<'a> Best<'a> {
    /// None yet.
    pub(crate) fn new(spec: &'a TrainSpec) -> Self {
        Self { spec, found: None }
    }

    /// Takes the weights of a step if the spec asks for the best and there were none of so small a loss; of equal ones
    /// the earlier stay. Says whether it took them.
    pub(crate) fn offer(
        &mut self,
        step: u64,
        loss: f64,
        weights: impl FnOnce() -> Result<Model>,
    ) -> Result<bool> {
        let is_better = match &self.found {
            None => true,
            Some(found) => worth(loss) < worth(found.loss),
        };
        if self.spec.validation.keep == Keep::Last || !is_better {
            return Ok(false);
        }
        let model = weights()?;
        self.found = Some(Validated { step, loss, model });
        Ok(true)
    }

    /// Adds them to a state of the run.
    pub(crate) fn save(&self, state: &mut TrainingState) {
        let Some(found) = &self.found else { return };
        state.positions.insert(STEP.to_owned(), found.step);
        state
            .positions
            .insert(LOSS.to_owned(), found.loss.to_bits());
        for (name, weight) in found.model.parameters() {
            state
                .tensors
                .insert(format!("{WEIGHT}{name}"), weight.clone());
        }
    }

    /// Goes on from a state of the run; there are none in one that was saved before the first validation.
    ///
    /// # Errors
    /// When weights are missing there.
    pub(crate) fn restore(&mut self, state: &TrainingState) -> Result<()> {
        let position = |name| state.positions.get(name).copied();
        self.found = match (position(STEP), position(LOSS)) {
            (Some(step), Some(bits)) => {
                let named = state.tensors.iter().filter_map(|(name, tensor)| {
                    Some((name.strip_prefix(WEIGHT)?.to_owned(), tensor.clone()))
                });
                let mut weights: BTreeMap<String, Tensor> = named.collect();
                let model = Model::new(self.spec.model.clone(), &mut weights)
                    .map_err(lapidary_model::Error::from)?;
                let loss = f64::from_bits(bits);
                Some(Validated { step, loss, model })
            }
            (None, None) => None,
            (step, _) => {
                return Err(Error::Setting {
                    name: "position of the saved run",
                    found: format!("no {}", if step.is_none() { STEP } else { LOSS }),
                    expected: "both step and loss of the best weights",
                });
            }
        };
        Ok(())
    }

    /// The best of all.
    pub(crate) fn into_found(self) -> Option<Validated> {
        self.found
    }
}

/// What losses are compared by: one that is no number is no better than any.
fn worth(loss: f64) -> f64 {
    if loss.is_nan() { f64::INFINITY } else { loss }
}

#[cfg(test)]
mod tests {
    use lapidary_kernels::{DType, Device};

    use super::*;

    fn spec(keep: &str) -> TrainSpec {
        serde_json::from_value(serde_json::json!({
            "steps": 9, "batch": 1, "length": 4,
            "schedule": { "peak": 1e-2 },
            "validation": { "every": 1, "keep": keep },
            "data": { "kind": "copying", "symbols": 3 },
            "model": {
                "width": 4,
                "input": { "kind": "tokens", "vocabulary": 4, "length": 4 },
                "blocks": [{ "attention": { "kind": "multi-head", "heads": 1, "causal": true } }],
                "head": { "kind": "language-model" }
            }
        }))
        .unwrap()
    }

    /// Weights that differ by the step.
    fn weights(spec: &TrainSpec, step: u64) -> Result<Model> {
        let model = Model::initialised(spec.model.clone(), step, DType::F32, &Device::Cpu);
        Ok(model.map_err(lapidary_model::Error::from)?)
    }

    fn bits(model: &Model) -> Vec<u32> {
        let all = model.parameters().values();
        all.flat_map(|tensor| tensor.flatten_all().unwrap().to_vec1::<f32>().unwrap())
            .map(f32::to_bits)
            .collect()
    }

    /// The step that is kept of losses that are those of steps 1, 2 and so on.
    fn kept(losses: &[f64]) -> Option<u64> {
        let spec = spec("best");
        let mut best = Best::new(&spec);
        for (step, loss) in (1..).zip(losses) {
            best.offer(step, *loss, || weights(&spec, step)).unwrap();
        }
        best.into_found().map(|found| found.step)
    }

    #[test]
    fn the_least_loss_is_kept_the_earlier_of_equal_ones_and_no_number_last() {
        assert_eq!(kept(&[]), None);
        assert_eq!(kept(&[3.0, 1.0, 2.0]), Some(2));
        assert_eq!(kept(&[1.0, 1.0]), Some(1));
        assert_eq!(kept(&[f64::NAN, 5.0, f64::NAN]), Some(2));
        assert_eq!(kept(&[f64::NAN.copysign(-1.0), 5.0]), Some(2));
        assert_eq!(kept(&[5.0, f64::NAN.copysign(-1.0)]), Some(1));
        assert_eq!(kept(&[f64::NAN]), Some(1));
    }

    #[test]
    fn the_best_go_through_a_state_bit_for_bit() {
        let spec = spec("best");
        let mut best = Best::new(&spec);
        let mut state = TrainingState::default();
        best.save(&mut state);
        assert!(state.positions.is_empty() && state.tensors.is_empty());
        best.restore(&state).unwrap();
        assert!(best.found.is_none());

        let loss = 0.1 + 0.2;
        assert!(best.offer(7, loss, || weights(&spec, 7)).unwrap());
        best.save(&mut state);
        let mut other = Best::new(&spec);
        other.restore(&state).unwrap();
        // What came after the state is not known to it, and what is no better is not taken.
        assert!(!other.offer(8, loss, || weights(&spec, 8)).unwrap());
        let found = other.into_found().unwrap();
        assert_eq!((found.step, found.loss.to_bits()), (7, loss.to_bits()));
        assert_eq!(bits(&found.model), bits(&weights(&spec, 7).unwrap()));

        for missing in [STEP, LOSS] {
            let mut state = state.clone();
            state.positions.remove(missing);
            let said = Best::new(&spec).restore(&state).unwrap_err().to_string();
            assert!(said.contains(&format!("no {missing}")), "{said}");
        }
        let name = state.tensors.keys().next().cloned().unwrap();
        state.tensors.remove(&name);
        let said = Best::new(&spec).restore(&state).unwrap_err().to_string();
        assert!(said.contains("is missing"), "{said}");
    }

    #[test]
    fn where_the_last_are_kept_none_are_taken() {
        let spec = spec("last");
        let mut best = Best::new(&spec);
        assert!(
            !best
                .offer(1, 0.5, || panic!("weights were asked for"))
                .unwrap()
        );
        assert!(best.into_found().is_none());
    }
}
