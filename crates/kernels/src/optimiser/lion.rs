//! Lion (Chen et al., Symbolic Discovery of Optimization Algorithms, 2023, arXiv 2302.06675).

use super::{OptimiserState, Parameter, Rule, Slot, restore, slots, state_of};
use crate::simd::Real;
use crate::{GradStore, Result};

/// The constants of [`Lion`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LionOptions {
    /// The rate that a schedule starts from; [`Lion::step`] takes the rate of the moment.
    pub learning_rate: f64,
    /// Share of the momentum in what a step goes by.
    pub beta1: f64,
    /// Share of the momentum that survives a step.
    pub beta2: f64,
    /// Decoupled weight decay, unless a [`Parameter`] says otherwise.
    pub weight_decay: f64,
}

impl Default for LionOptions {
    fn default() -> Self {
        Self {
            learning_rate: 1e-4,
            beta1: 0.9,
            beta2: 0.99,
            weight_decay: 0.0,
        }
    }
}

/// Steps of one length in every coordinate, over many tensors at once and in place:
/// `w = w - η (sign(β₁ m + (1 - β₁) g) + λ w)`, then `m = β₂ m + (1 - β₂) g`.
#[derive(Debug)]
pub struct Lion {
    slots: Vec<Slot<1>>,
    options: LionOptions,
    step: u64,
}

impl Lion {
    /// An optimiser of `parameters` at rest.
    ///
    /// # Errors
    /// When a parameter is neither `f32` nor `f64` on the CPU.
    pub fn new<P: Into<Parameter>>(parameters: Vec<P>, options: LionOptions) -> Result<Self> {
        let parameters = parameters.into_iter().map(Into::into).collect();
        Ok(Self {
            slots: slots("Lion", parameters)?,
            options,
            step: 0,
        })
    }

    /// One step at `learning_rate`, with every gradient multiplied by `gradient_scale`.
    /// Parameters without a gradient stay as they are.
    ///
    /// # Errors
    /// When a gradient has another shape or type than its parameter.
    pub fn step(
        &mut self,
        gradients: &GradStore,
        learning_rate: f64,
        gradient_scale: f64,
    ) -> Result<()> {
        self.step += 1;
        for slot in &mut self.slots {
            let parameter = &slot.parameter;
            let Some(gradient) = gradients.get(&parameter.variable) else {
                continue;
            };
            let rule = Step {
                rate: learning_rate * parameter.rate_factor,
                beta1: self.options.beta1,
                beta2: self.options.beta2,
                weight_decay: parameter.weight_decay.unwrap_or(self.options.weight_decay),
                gradient_scale,
            };
            slot.step(gradient, &rule)?;
        }
        Ok(())
    }

    /// What has to be kept to resume, besides the weights.
    ///
    /// # Errors
    /// Those of the tensor engine.
    pub fn state(&self) -> Result<OptimiserState> {
        state_of(self.step, &self.slots)
    }

    /// Takes up a state that [`Self::state`] gave for the same parameters.
    ///
    /// # Errors
    /// When the state does not fit the parameters; nothing has changed then.
    pub fn load_state(&mut self, state: &OptimiserState) -> Result<()> {
        restore("Lion", &mut self.slots, state)?;
        self.step = state.step;
        Ok(())
    }
}

struct Step {
    rate: f64,
    beta1: f64,
    beta2: f64,
    weight_decay: f64,
    gradient_scale: f64,
}

impl Rule<1> for Step {
    #[inline(always)]
    fn apply<T: Real>(&self, w: &mut [T], [m]: [&mut [T]; 1], g: &[T]) {
        let (beta1, rest1) = (T::of(self.beta1), T::of(1.0 - self.beta1));
        let (beta2, rest2) = (T::of(self.beta2), T::of(1.0 - self.beta2));
        let (rate, scale) = (T::of(self.rate), T::of(self.gradient_scale));
        let (decay, nought) = (T::of(self.weight_decay), T::of(0.0));
        for ((w, m), &g) in w.iter_mut().zip(m).zip(g) {
            let g = g * scale;
            let direction = beta1 * *m + rest1 * g;
            // Neither way where it is nought.
            let up = T::of(f64::from(u8::from(direction > nought)));
            let down = T::of(f64::from(u8::from(direction < nought)));
            *w -= rate * (up - down + decay * *w);
            *m = beta2 * *m + rest2 * g;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Device, Tensor, Var};

    #[test]
    fn three_steps_by_hand() {
        let start = [2.0f64, -1.0, 0.5];
        let w = Var::from_tensor(&Tensor::new(&start, &Device::Cpu).unwrap()).unwrap();
        let options = LionOptions {
            weight_decay: 0.5,
            ..LionOptions::default()
        };
        let mut optimiser = Lion::new(vec![w.clone()], options).unwrap();
        let (mut weights, mut momenta) = (start, [0.0; 3]);
        // The third coordinate has no gradient: only decay moves it.
        for slopes in [[3.0, -1.0, 0.0], [-3.1, 20.0, 0.0], [0.1, 0.2, 0.0]] {
            let slope = Tensor::new(&slopes, &Device::Cpu).unwrap();
            let loss = (w.as_tensor() * slope).unwrap().sum_all().unwrap();
            optimiser.step(&loss.backward().unwrap(), 0.1, 2.0).unwrap();
            for ((weight, momentum), slope) in weights.iter_mut().zip(&mut momenta).zip(slopes) {
                let g: f64 = 2.0 * slope;
                let direction: f64 = 0.9 * *momentum + 0.1 * g;
                let sign = match direction {
                    0.0 => 0.0,
                    _ => direction.signum(),
                };
                *weight -= 0.1 * (sign + 0.5 * *weight);
                *momentum = 0.99 * *momentum + 0.01 * g;
            }
            let found = w.to_vec1::<f64>().unwrap();
            assert!(
                found
                    .iter()
                    .zip(&weights)
                    .all(|(a, b)| (a - b).abs() < 1e-14)
            );
        }
        let state = optimiser.state().unwrap();
        assert_eq!(state.step, 3);
        let mut resumed = Lion::new(vec![w], options).unwrap();
        resumed.load_state(&state).unwrap();
        let kept = resumed.state().unwrap().moments[0][0].to_vec1::<f64>();
        assert!(
            kept.unwrap()
                .iter()
                .zip(&momenta)
                .all(|(a, b)| (a - b).abs() < 1e-14)
        );
    }
}
