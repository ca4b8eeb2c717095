//! Stochastic gradient descent with momentum.

use super::{OptimiserState, Parameter, Rule, Slot, restore, slots, state_of};
use crate::simd::Real;
use crate::{GradStore, Result};

/// The constants of [`Sgd`].
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SgdOptions {
    /// The rate that a schedule starts from; [`Sgd::step`] takes the rate of the moment.
    pub learning_rate: f64,
    /// Share of the velocity that survives a step.
    pub momentum: f64,
    /// Whether to move by the velocity that the next step would start with (Nesterov).
    pub nesterov: bool,
    /// Multiple of the weight added to its gradient, unless its [`Parameter`] says otherwise.
    pub weight_decay: f64,
}

/// Gradient descent with momentum, over many tensors at once and in place:
/// `g' = g + λ w`, `u = μ u + g'`, `w = w - η u` (Nesterov: `w - η (g' + μ u)`).
#[derive(Debug)]
pub struct Sgd {
    slots: Vec<Slot<1>>,
    options: SgdOptions,
    step: u64,
}

impl Sgd {
    /// An optimiser of `parameters` at rest.
    ///
    /// # Errors
    /// When a parameter is neither `f32` nor `f64` on the CPU.
    pub fn new<P: Into<Parameter>>(parameters: Vec<P>, options: SgdOptions) -> Result<Self> {
        let parameters = parameters.into_iter().map(Into::into).collect();
        Ok(Self {
            slots: slots("SGD", parameters)?,
            options,
            step: 0,
        })
    }

    /// The constants in use.
    pub fn options(&self) -> &SgdOptions {
        &self.options
    }

    /// The parameters, in order.
    pub fn parameters(&self) -> impl Iterator<Item = &Parameter> {
        self.slots.iter().map(|slot| &slot.parameter)
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
                momentum: self.options.momentum,
                nesterov: self.options.nesterov,
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
        restore("SGD", &mut self.slots, state)?;
        self.step = state.step;
        Ok(())
    }
}

struct Step {
    rate: f64,
    momentum: f64,
    nesterov: bool,
    weight_decay: f64,
    gradient_scale: f64,
}

impl Rule<1> for Step {
    #[inline(always)]
    fn apply<T: Real>(&self, w: &mut [T], [u]: [&mut [T]; 1], g: &[T]) {
        let (rate, momentum) = (T::of(self.rate), T::of(self.momentum));
        let (decay, scale) = (T::of(self.weight_decay), T::of(self.gradient_scale));
        for ((w, u), &g) in w.iter_mut().zip(u).zip(g) {
            let g = g * scale + decay * *w;
            *u = momentum * *u + g;
            let step = if self.nesterov { g + momentum * *u } else { *u };
            *w -= rate * step;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Device, Tensor, Var};

    #[test]
    fn two_steps_by_hand() {
        for nesterov in [false, true] {
            let w = Var::from_tensor(&Tensor::new(&[2.0f64], &Device::Cpu).unwrap()).unwrap();
            let options = SgdOptions {
                learning_rate: 0.1,
                momentum: 0.9,
                nesterov,
                weight_decay: 0.5,
            };
            let mut optimiser = Sgd::new(vec![w.clone()], options).unwrap();
            let (mut weight, mut velocity) = (2.0, 0.0);
            for _ in 0..2 {
                let loss = (w.as_tensor() * 3.0).unwrap().sum_all().unwrap();
                optimiser.step(&loss.backward().unwrap(), 0.1, 2.0).unwrap();
                let g = 6.0 + 0.5 * weight;
                velocity = 0.9 * velocity + g;
                weight -= 0.1
                    * if nesterov {
                        g + 0.9 * velocity
                    } else {
                        velocity
                    };
                assert!((w.to_vec1::<f64>().unwrap()[0] - weight).abs() < 1e-14);
            }
            let state = optimiser.state().unwrap();
            assert_eq!(state.step, 2);
            let mut resumed = Sgd::new(vec![w.clone()], options).unwrap();
            resumed.load_state(&state).unwrap();
            assert_eq!(
                resumed.state().unwrap().moments[0][0]
                    .to_vec1::<f64>()
                    .unwrap(),
                [velocity]
            );
        }
    }
}
