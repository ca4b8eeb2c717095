//! AdamW: Adam with decoupled weight decay (Loshchilov & Hutter, arXiv 1711.05101).

use super::{OptimiserState, Parameter, Rule, Slot, restore, slots, state_of};
use crate::simd::Real;
use crate::{Error, GradStore, Result, Tensor, Var};

/// The constants of [`AdamW`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWOptions {
    /// The rate that a schedule starts from; [`AdamW::step`] takes the rate of the moment.
    pub learning_rate: f64,
    /// Decay of the mean of the gradient.
    pub beta1: f64,
    /// Decay of the mean of its square.
    pub beta2: f64,
    /// Added to the root of the latter.
    pub epsilon: f64,
    /// Share of a weight that is taken off per unit of learning rate, unless its
    /// [`Parameter`] says otherwise.
    pub weight_decay: f64,
}

impl Default for AdamWOptions {
    fn default() -> Self {
        Self {
            learning_rate: 1e-3,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.01,
        }
    }
}

/// Adam with decoupled weight decay, over many tensors at once and in place:
/// `m = β₁ m + (1-β₁) g`, `v = β₂ v + (1-β₂) g²`,
/// `w = w - η (λ w + m̂ / (√v̂ + ε))` with `m̂ = m / (1-β₁ᵗ)`, `v̂ = v / (1-β₂ᵗ)`.
#[derive(Debug)]
pub struct AdamW {
    slots: Vec<Slot<2>>,
    options: AdamWOptions,
    step: u64,
}

impl AdamW {
    /// An optimiser of `parameters` with moments at zero.
    ///
    /// # Errors
    /// When a parameter is neither `f32` nor `f64` on the CPU.
    pub fn new<P: Into<Parameter>>(parameters: Vec<P>, options: AdamWOptions) -> Result<Self> {
        let parameters = parameters.into_iter().map(Into::into).collect();
        Ok(Self {
            slots: slots("AdamW", parameters)?,
            options,
            step: 0,
        })
    }

    /// The constants in use.
    pub fn options(&self) -> &AdamWOptions {
        &self.options
    }

    /// The parameters, in order.
    pub fn parameters(&self) -> impl Iterator<Item = &Parameter> {
        self.slots.iter().map(|slot| &slot.parameter)
    }

    /// One step at `learning_rate`, with every gradient multiplied by `gradient_scale`
    /// (1, or what clipping asks for). Parameters without a gradient stay as they are.
    ///
    /// # Errors
    /// When a gradient has another shape or type than its parameter.
    pub fn step(
        &mut self,
        gradients: &GradStore,
        learning_rate: f64,
        gradient_scale: f64,
    ) -> Result<()> {
        let gradient_of = |_, variable: &Var| gradients.get(variable);
        self.step_by(gradient_of, learning_rate, gradient_scale)
    }

    /// As [`Self::step`], with one gradient for each parameter, in their order: for gradients
    /// that no backward pass made.
    ///
    /// # Errors
    /// When a gradient is missing, or has another shape or type than its parameter.
    pub fn step_with(&mut self, gradients: &[Tensor], learning_rate: f64) -> Result<()> {
        if gradients.len() != self.slots.len() {
            return Err(Error::argument(
                "AdamW",
                "number of gradients",
                gradients.len(),
                format!("{}, one for each parameter", self.slots.len()),
            ));
        }
        self.step_by(|index, _| gradients.get(index), learning_rate, 1.0)
    }

    fn step_by<'a>(
        &mut self,
        gradient_of: impl Fn(usize, &Var) -> Option<&'a Tensor>,
        learning_rate: f64,
        gradient_scale: f64,
    ) -> Result<()> {
        self.step += 1;
        for (index, slot) in self.slots.iter_mut().enumerate() {
            let parameter = &slot.parameter;
            let Some(gradient) = gradient_of(index, &parameter.variable) else {
                continue;
            };
            let rule = Step::new(
                &self.options,
                self.step,
                learning_rate * parameter.rate_factor,
                parameter.weight_decay.unwrap_or(self.options.weight_decay),
                gradient_scale,
            );
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
        restore("AdamW", &mut self.slots, state)?;
        self.step = state.step;
        Ok(())
    }
}

/// The constants of one step for one parameter.
struct Step {
    beta1: f64,
    beta2: f64,
    /// `1 / √(1 - β₂ᵗ)`.
    root_correction: f64,
    epsilon: f64,
    /// `η / (1 - β₁ᵗ)`.
    rate: f64,
    /// `1 - η λ`.
    keep: f64,
    gradient_scale: f64,
}

impl Step {
    fn new(
        options: &AdamWOptions,
        step: u64,
        rate: f64,
        weight_decay: f64,
        gradient_scale: f64,
    ) -> Self {
        let power = |beta: f64| beta.powf(step as f64);
        Self {
            beta1: options.beta1,
            beta2: options.beta2,
            root_correction: 1.0 / (1.0 - power(options.beta2)).sqrt(),
            epsilon: options.epsilon,
            rate: rate / (1.0 - power(options.beta1)),
            keep: 1.0 - rate * weight_decay,
            gradient_scale,
        }
    }
}

impl Rule<2> for Step {
    #[inline(always)]
    fn apply<T: Real>(&self, w: &mut [T], [m, v]: [&mut [T]; 2], g: &[T]) {
        let (beta1, beta2) = (T::of(self.beta1), T::of(self.beta2));
        let (new1, new2) = (T::of(1.0 - self.beta1), T::of(1.0 - self.beta2));
        let (correction, epsilon) = (T::of(self.root_correction), T::of(self.epsilon));
        let (rate, keep, scale) = (
            T::of(self.rate),
            T::of(self.keep),
            T::of(self.gradient_scale),
        );
        for (((w, m), v), &g) in w.iter_mut().zip(m).zip(v).zip(g) {
            let g = g * scale;
            *m = beta1 * *m + new1 * g;
            *v = beta2 * *v + new2 * g * g;
            *w = keep * *w - rate * *m / (v.sqrt() * correction + epsilon);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::difference;
    use crate::test_data::arange;
    use crate::{DType, Device};

    fn gradients(variables: &[Var], step: usize) -> GradStore {
        let mut loss = Tensor::zeros((), variables[0].dtype(), &Device::Cpu).unwrap();
        for v in variables {
            let target = arange(v.dims(), step as f64, v.dtype());
            let part = (v.as_tensor() - target).unwrap().sqr().unwrap().sum_all();
            loss = (loss + part.unwrap()).unwrap();
        }
        loss.backward().unwrap()
    }

    fn variables(dtype: DType) -> Vec<Var> {
        [vec![3, 5], vec![1], vec![70, 130], vec![0]]
            .iter()
            .map(|dims| Var::from_tensor(&arange(dims, 1.0, dtype)).unwrap())
            .collect()
    }

    #[test]
    fn equals_the_formula() {
        for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::F64, 1e-13)] {
            let variables = variables(dtype);
            let mut weights: Vec<Tensor> = variables.iter().map(|v| v.copy().unwrap()).collect();
            let mut first: Vec<Tensor> = weights.iter().map(|w| w.zeros_like().unwrap()).collect();
            let mut second = first.clone();
            let options = AdamWOptions::default();
            let mut parameters: Vec<Parameter> =
                variables.iter().cloned().map(Parameter::from).collect();
            parameters[1].weight_decay = Some(0.5);
            parameters[2].rate_factor = 0.3;
            let mut optimiser = AdamW::new(parameters, options).unwrap();
            for step in 1..=3 {
                let gradients = gradients(&variables, step);
                optimiser.step(&gradients, 0.01, 0.7).unwrap();
                for (i, variable) in variables.iter().enumerate() {
                    let g = (gradients.get(variable).unwrap() * 0.7).unwrap();
                    let decay = if i == 1 { 0.5 } else { options.weight_decay };
                    let rate = if i == 2 { 0.003 } else { 0.01 };
                    first[i] = ((&first[i] * 0.9).unwrap() + (&g * (1.0 - 0.9)).unwrap()).unwrap();
                    second[i] = ((&second[i] * 0.999).unwrap()
                        + (g.sqr().unwrap() * (1.0 - 0.999)).unwrap())
                    .unwrap();
                    let m = (&first[i] / (1.0 - 0.9f64.powi(step as i32))).unwrap();
                    let v = (&second[i] / (1.0 - 0.999f64.powi(step as i32))).unwrap();
                    let move_by = (m / (v.sqrt().unwrap() + 1e-8).unwrap()).unwrap();
                    let kept = (&weights[i] * (1.0 - rate * decay)).unwrap();
                    weights[i] = (kept - (move_by * rate).unwrap()).unwrap();
                    assert!(difference(variable, &weights[i]).unwrap() < tolerance);
                }
            }
        }
    }

    #[test]
    fn resumes_bit_for_bit() {
        let straight = variables(DType::F32);
        let mut optimiser = AdamW::new(straight.clone(), AdamWOptions::default()).unwrap();
        let interrupted = variables(DType::F32);
        let mut before = AdamW::new(interrupted.clone(), AdamWOptions::default()).unwrap();
        for step in 0..3 {
            optimiser
                .step(&gradients(&straight, step), 0.01, 1.0)
                .unwrap();
            before
                .step(&gradients(&interrupted, step), 0.01, 1.0)
                .unwrap();
        }
        let state = before.state().unwrap();
        let mut after = AdamW::new(interrupted.clone(), AdamWOptions::default()).unwrap();
        after.load_state(&state).unwrap();
        for step in 3..6 {
            optimiser
                .step(&gradients(&straight, step), 0.01, 1.0)
                .unwrap();
            after
                .step(&gradients(&interrupted, step), 0.01, 1.0)
                .unwrap();
        }
        for (a, b) in straight.iter().zip(&interrupted) {
            assert_eq!(difference(a, b).unwrap(), 0.0);
        }
    }

    #[test]
    fn a_state_that_does_not_fit_is_refused() {
        let mut optimiser = AdamW::new(variables(DType::F32), AdamWOptions::default()).unwrap();
        let mut state = optimiser.state().unwrap();
        state.moments[0].pop();
        assert!(optimiser.load_state(&state).is_err());
        assert!(optimiser.load_state(&OptimiserState::default()).is_err());
        let integers = Var::from_tensor(&Tensor::new(&[1u32], &Device::Cpu).unwrap()).unwrap();
        assert!(AdamW::new(vec![integers], AdamWOptions::default()).is_err());
    }

    #[test]
    fn gradients_by_hand_do_what_those_of_a_backward_pass_do() {
        let by_store = variables(DType::F32);
        let by_hand = variables(DType::F32);
        let mut first = AdamW::new(by_store.clone(), AdamWOptions::default()).unwrap();
        let mut second = AdamW::new(by_hand.clone(), AdamWOptions::default()).unwrap();
        for step in 0..2 {
            let store = gradients(&by_store, step);
            let all: Vec<Tensor> = by_store
                .iter()
                .map(|variable| store.get(variable).unwrap().clone())
                .collect();
            first.step(&store, 0.01, 1.0).unwrap();
            second.step_with(&all, 0.01).unwrap();
            assert!(second.step_with(&all[1..], 0.01).is_err());
        }
        for (a, b) in by_store.iter().zip(&by_hand) {
            assert_eq!(difference(a, b).unwrap(), 0.0);
        }
    }

    #[test]
    fn parameters_without_gradient_stay() {
        let variables = variables(DType::F64);
        let kept = variables[0].copy().unwrap();
        let mut optimiser = AdamW::new(variables.clone(), AdamWOptions::default()).unwrap();
        optimiser
            .step(&gradients(&variables[1..], 0), 0.1, 1.0)
            .unwrap();
        assert_eq!(difference(&variables[0], &kept).unwrap(), 0.0);
    }
}
