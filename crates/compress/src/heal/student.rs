//! What is trained while a model heals, and the model that passes see of it.

use std::collections::BTreeMap;
use std::ops::Deref;

use lapidary_kernels::{Tensor, Var};
use lapidary_model::Model;
use lapidary_train::Masks;

use super::adapters::{AdapterReport, Adapters, Step};
use super::rounded::SeenRounded;
use super::{HealSettings, trained};
use crate::error::engine;
use crate::{Error, Result, RoundingGoal};

/// What is trained.
enum Trained {
    /// Every parameter.
    Whole(Box<Model>),
    /// Adapters beside layers that stay.
    Adapters(Box<Adapters>),
}

/// A model that is trained.
pub(super) struct Student {
    trained: Trained,
    seen: Option<SeenRounded>,
}

/// The student as a pass sees it.
pub(super) enum Acting<'a> {
    /// Itself.
    Itself(&'a Model),
    /// Made for the pass.
    Made(Box<Model>),
}

impl Deref for Acting<'_> {
    type Target = Model;

    fn deref(&self) -> &Model {
        match self {
            Self::Itself(model) => model,
            Self::Made(model) => model,
        }
    }
}

impl Student {
    /// `masks` name what stays zero.
    ///
    /// # Errors
    /// When adapters or the rounding fit no layer, or each other.
    pub(super) fn new(model: &Model, settings: &HealSettings, masks: &Masks) -> Result<Self> {
        let goal = settings.rounding.as_ref();
        let trained = match &settings.adapters {
            None => {
                let student = Model::trainable(model.spec().clone(), &mut trained(model)?)?;
                Trained::Whole(Box::new(student))
            }
            Some(told) => {
                let adapters = Adapters::new(model, told, masks, settings.seed)?;
                refuse_factors(&adapters.report(), goal)?;
                Trained::Adapters(Box::new(adapters))
            }
        };
        let seen = goal.map(|goal| SeenRounded::new(goal, model)).transpose()?;
        Ok(Self { trained, seen })
    }

    /// What is moved, by name.
    pub(super) fn variables(&self) -> &BTreeMap<String, Var> {
        match &self.trained {
            Trained::Whole(model) => model.variables(),
            Trained::Adapters(adapters) => adapters.variables(),
        }
    }

    /// Of the zeros, those that whoever moves the variables has to keep; adapters keep theirs themselves.
    pub(super) fn masks(&self, masks: Masks) -> Masks {
        match &self.trained {
            Trained::Whole(_) => masks,
            Trained::Adapters(_) => Masks::default(),
        }
    }

    /// What the report says of adapters.
    pub(super) fn adapters(&self) -> Option<AdapterReport> {
        match &self.trained {
            Trained::Whole(_) => None,
            Trained::Adapters(adapters) => Some(adapters.report()),
        }
    }

    /// The model that a pass sees: of a training step, or, for none, of a validation.
    pub(super) fn acting(&self, step: Option<u64>) -> Result<Acting<'_>> {
        let (spec, mut made) = match &self.trained {
            Trained::Whole(model) if self.seen.is_none() => return Ok(Acting::Itself(model)),
            Trained::Whole(model) => (model.spec(), Step::of(model.parameters().clone())),
            Trained::Adapters(adapters) => (adapters.spec(), adapters.step(step)?),
        };
        if let Some(seen) = &self.seen {
            seen.round(&mut made.parameters)?;
        }
        let model = Model::new(spec.clone(), &mut made)?;
        Ok(Acting::Made(Box::new(model)))
    }

    /// The model with these values of what was trained, in the types of `original`; `original` where
    /// there are none.
    pub(super) fn finished(
        &self,
        values: Option<BTreeMap<String, Tensor>>,
        original: &Model,
    ) -> Result<Model> {
        let mut parameters = match (&self.trained, values) {
            (Trained::Adapters(adapters), Some(values)) => {
                return adapters.taken_in(&values, original);
            }
            (Trained::Whole(_), Some(values)) => values,
            (_, None) => trained(original)?,
        };
        for (name, tensor) in original.parameters() {
            if let Some(healed) = parameters.get_mut(name) {
                *healed = engine(healed.to_dtype(tensor.dtype()))?;
            }
        }
        Ok(Model::new(original.spec().clone(), &mut parameters)?)
    }
}

/// What is factored again after is rounded otherwise than it was seen.
fn refuse_factors(adapters: &AdapterReport, goal: Option<&RoundingGoal>) -> Result<()> {
    match (adapters.factorised, goal) {
        (0, _) | (_, None) => Ok(()),
        (factorised, Some(_)) => Err(Error::invalid(
            "layers with adapters that are seen rounded",
            format!("factorised, {factorised} of {}", adapters.layers),
            "dense ones: factors are found anew when adapters are taken in",
        )),
    }
}
