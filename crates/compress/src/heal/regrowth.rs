//! Zeros that change places while a pruned model is trained (RigL: Evci et al. 2020, arXiv 1911.11134).
//!
//! Each turn, of a matrix with `k` weights that are not masked, the `n` smallest are masked, and of all
//! that are masked then the `n` of the largest gradient are trained again, from zero:
//!
//! ```text
//! n = k · α/2 · (1 + cos(π t / T))      while t ≤ T, three quarters of the steps
//! ```
//!
//! The gradient of a masked weight is that at zero, which says how fast the loss falls when it grows.

use std::collections::BTreeMap;
use std::f64::consts::PI;

use lapidary_kernels::{DType, GradStore, Tensor, Var};
use lapidary_train::Masks;

use super::HealSettings;
use crate::Result;
use crate::error::engine;

/// The turns of one training.
pub(super) struct Regrowth {
    /// `α`.
    share: f64,
    every: u64,
    /// `T`.
    last: u64,
    /// Which entries of each matrix were kept at first.
    first: BTreeMap<String, Tensor>,
}

impl Regrowth {
    pub(super) fn new(settings: &HealSettings, masks: &Masks) -> Self {
        Self {
            share: settings.regrow,
            every: match settings.regrow_every {
                0 => (settings.steps / 10).max(1),
                every => every,
            },
            last: settings.steps * 3 / 4,
            first: masks.tensors().clone(),
        }
    }

    /// The masks from this step on, where they change: by the weights before the step and the gradients
    /// of its loss, masked ones included.
    pub(super) fn turn(
        &self,
        step: u64,
        variables: &BTreeMap<String, Var>,
        gradients: &GradStore,
        masks: &Masks,
    ) -> Result<Option<Masks>> {
        if self.share <= 0.0 || !step.is_multiple_of(self.every) || step > self.last {
            return Ok(None);
        }
        let share = 0.5 * self.share * (1.0 + (PI * step as f64 / self.last as f64).cos());
        let mut turned = masks.tensors().clone();
        for (name, mask) in &mut turned {
            let Some(variable) = variables.get(name) else {
                continue;
            };
            let Some(gradient) = gradients.get(variable.as_tensor()) else {
                continue;
            };
            let active: Vec<bool> = flat::<u8>(mask)?.into_iter().map(|one| one == 1).collect();
            let kept = active.iter().filter(|active| **active).count();
            let next = exchanged(
                &numbers(variable.as_tensor())?,
                &numbers(gradient)?,
                &active,
                (share * kept as f64).round() as usize,
            );
            let next: Vec<u8> = next.into_iter().map(u8::from).collect();
            *mask = engine(Tensor::from_vec(next, mask.dims(), mask.device()))?;
        }
        Ok(Some(Masks::new(turned)?))
    }

    /// Entries that are kept by these masks and were not at first.
    pub(super) fn regrown(&self, masks: &Masks) -> Result<usize> {
        let mut count = 0;
        for (name, mask) in masks.tensors() {
            let Some(first) = self.first.get(name) else {
                continue;
            };
            let pairs = flat::<u8>(mask)?.into_iter().zip(flat::<u8>(first)?);
            count += pairs.filter(|pair| *pair == (1, 0)).count();
        }
        Ok(count)
    }
}

/// Which weights are active when the `count` smallest of those that are, are no more, and then, of all
/// that are not, as many of the largest gradient are. Of equal ones the first goes, and the first comes.
fn exchanged(weights: &[f64], gradients: &[f64], active: &[bool], count: usize) -> Vec<bool> {
    let mut next = active.to_vec();
    let first = |wanted: bool, next: &[bool], by: &dyn Fn(usize) -> f64| -> Vec<usize> {
        let all = next.iter().enumerate();
        let mut order: Vec<usize> = all
            .filter(|(_, active)| **active == wanted)
            .map(|(index, _)| index)
            .collect();
        order.sort_by(|a, b| by(*a).total_cmp(&by(*b)).then(a.cmp(b)));
        order.truncate(count);
        order
    };
    let size = |values: &[f64], index: usize| values.get(index).map_or(0.0, |value| value.abs());
    for index in first(true, &next, &|index| size(weights, index)) {
        if let Some(active) = next.get_mut(index) {
            *active = false;
        }
    }
    for index in first(false, &next, &|index| -size(gradients, index)) {
        if let Some(active) = next.get_mut(index) {
            *active = true;
        }
    }
    next
}

fn flat<T: lapidary_kernels::WithDType>(tensor: &Tensor) -> Result<Vec<T>> {
    engine(engine(tensor.flatten_all())?.to_vec1::<T>())
}

fn numbers(tensor: &Tensor) -> Result<Vec<f64>> {
    flat(&engine(tensor.detach().to_dtype(DType::F64))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smallest_go_and_those_of_the_largest_gradient_come() {
        let weights = [0.5, -0.1, 0.0, 2.0, 0.0, 0.3];
        let gradients = [9.0, 1.0, -4.0, 9.0, 3.0, 2.0];
        let active = [true, true, false, true, false, true];
        let turned = |count| exchanged(&weights, &gradients, &active, count);
        assert_eq!(turned(0), active);
        // −0.1 goes, and the entry of gradient −4 comes.
        assert_eq!(turned(1), [true, false, true, true, false, true]);
        // 0.3 goes too, and the entry of gradient 3 comes.
        assert_eq!(turned(2), [true, false, true, true, true, false]);
        // 0.5 goes and comes back, since no masked weight has a larger gradient.
        assert_eq!(turned(3), [true, false, true, true, true, false]);
    }

    #[test]
    fn what_is_equal_goes_and_comes_in_order() {
        let active = [true, true, false, false];
        let found = exchanged(&[1.0, -1.0, 0.0, 0.0], &[0.0, 0.0, 2.0, -2.0], &active, 1);
        assert_eq!(found, [false, true, true, false]);
    }
}
