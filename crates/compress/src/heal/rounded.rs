//! Training with weights as they will be rounded.
//!
//! A pass sees the rounded weights, and their gradient is taken as that of the weights themselves, which
//! is to say that rounding passes gradients straight through:
//!
//! ```text
//! ŵ = w + sg(round(w) − w)        ∂L/∂w ← ∂L/∂ŵ
//! ```
//!
//! with `sg` what no gradient passes (Bengio et al. 2013, arXiv 1308.3432; Jacob et al. 2017, arXiv
//! 1712.05877). Grids are those of the weights at each step.

use std::collections::BTreeMap;

use lapidary_kernels::Tensor;
use lapidary_model::Model;

use crate::error::engine;
use crate::{Error, Result, RoundingGoal};

/// The parameters of a model that are seen rounded.
pub(super) struct SeenRounded {
    goal: RoundingGoal,
    names: Vec<String>,
}

impl SeenRounded {
    /// # Errors
    /// When the goal is none for this model.
    pub(super) fn new(goal: &RoundingGoal, model: &Model) -> Result<Self> {
        let names = goal.matrices(model)?;
        if names.is_empty() {
            return Err(Error::invalid(
                "layers to be rounded",
                format!("none with whole groups of {}", goal.quantise.group),
                "some, or training without rounding",
            ));
        }
        Ok(Self {
            goal: goal.clone(),
            names,
        })
    }

    /// Rounds weights among `parameters`, so that gradients reach what they were.
    ///
    /// # Errors
    /// When a group fits no grid.
    pub(super) fn round(&self, parameters: &mut BTreeMap<String, Tensor>) -> Result<()> {
        for name in &self.names {
            if let Some(weight) = parameters.get_mut(name) {
                let own = weight.detach();
                let moved = engine(self.goal.nearest(&own)? - &own)?.detach();
                *weight = engine(&*weight + moved)?;
            }
        }
        Ok(())
    }
}
