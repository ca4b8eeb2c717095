//! An exponential moving average of the parameters.

use lapidary_kernels::{Tensor, Var};

use crate::{Error, Result};

/// A shadow of every parameter that follows it slowly:
/// `shadow ← decay · shadow + (1 − decay) · parameter`.
///
/// With `warm_up`, the decay of update `t` (from 0) is at most `(1 + t) / (10 + t)`, so that the
/// initial values are forgotten early.
#[derive(Clone, Debug)]
pub struct MovingAverage {
    decay: f64,
    warm_up: bool,
    updates: u64,
    shadow: Vec<Tensor>,
}

impl MovingAverage {
    /// Starts at the present values. `decay` is in `[0, 1)`.
    pub fn new(parameters: &[Var], decay: f64, warm_up: bool) -> Result<Self> {
        if !(0.0..1.0).contains(&decay) {
            return Err(Error::Setting {
                name: "decay of the moving average",
                found: decay.to_string(),
                expected: "at least 0 and below 1",
            });
        }
        let shadow: lapidary_kernels::Result<_> = parameters
            .iter()
            .map(|parameter| Ok(parameter.as_tensor().copy()?.detach()))
            .collect();
        Ok(Self {
            decay,
            warm_up,
            updates: 0,
            shadow: shadow?,
        })
    }

    /// Goes on from saved values.
    pub fn resume(&mut self, shadow: Vec<Tensor>, updates: u64) -> Result<()> {
        let fits = shadow.len() == self.shadow.len()
            && shadow
                .iter()
                .zip(&self.shadow)
                .all(|(new, old)| new.shape() == old.shape() && new.dtype() == old.dtype());
        if !fits {
            return Err(Error::Tensor {
                name: "moving average".into(),
                detail: "the saved tensors are not those of this model's parameters".into(),
            });
        }
        self.shadow = shadow;
        self.updates = updates;
        Ok(())
    }

    /// Moves towards the present values.
    pub fn update(&mut self, parameters: &[Var]) -> lapidary_kernels::Result<()> {
        let decay = if self.warm_up {
            let t = self.updates as f64;
            self.decay.min((1.0 + t) / (10.0 + t))
        } else {
            self.decay
        };
        self.update_by(parameters, decay)
    }

    /// As [`MovingAverage::update`], by a decay of this update's own.
    pub fn update_by(&mut self, parameters: &[Var], decay: f64) -> lapidary_kernels::Result<()> {
        for (shadow, parameter) in self.shadow.iter_mut().zip(parameters) {
            let moved = parameter.as_tensor().detach().affine(1.0 - decay, 0.0)?;
            *shadow = (shadow.affine(decay, 0.0)? + moved)?;
        }
        self.updates += 1;
        Ok(())
    }

    /// The averages, in the order of the parameters.
    pub fn shadow(&self) -> &[Tensor] {
        &self.shadow
    }

    /// How many updates there have been.
    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// Puts the averages in the place of the parameters, for validation, and the parameters in the
    /// place of the averages; a second call undoes it exactly.
    pub fn swap(&mut self, parameters: &[Var]) -> lapidary_kernels::Result<()> {
        for (shadow, parameter) in self.shadow.iter_mut().zip(parameters) {
            let present = parameter.as_tensor().copy()?.detach();
            parameter.set(shadow)?;
            *shadow = present;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use lapidary_kernels::Device;

    use super::*;

    fn value(tensor: &Tensor) -> f64 {
        tensor.to_vec1::<f64>().unwrap()[0]
    }

    #[test]
    fn the_average_follows_the_recurrence() {
        let parameters = [Var::new(&[1f64], &Device::Cpu).unwrap()];
        let mut average = MovingAverage::new(&parameters, 0.9, false).unwrap();
        let mut expected = 1.0;
        for step in 0..20 {
            let next = f64::from(step);
            parameters[0]
                .set(&Tensor::new(&[next], &Device::Cpu).unwrap())
                .unwrap();
            average.update(&parameters).unwrap();
            expected = 0.9 * expected + 0.1 * next;
            assert!((value(&average.shadow()[0]) - expected).abs() < 1e-12);
        }
    }

    #[test]
    fn an_update_may_have_a_decay_of_its_own() {
        let parameters = [Var::new(&[2f64], &Device::Cpu).unwrap()];
        let mut average = MovingAverage::new(&parameters, 0.9, false).unwrap();
        parameters[0]
            .set(&Tensor::new(&[10f64], &Device::Cpu).unwrap())
            .unwrap();
        average.update_by(&parameters, 1.0).unwrap();
        assert_eq!(value(&average.shadow()[0]), 2.0);
        average.update_by(&parameters, 0.25).unwrap();
        assert_eq!(value(&average.shadow()[0]), 0.25 * 2.0 + 0.75 * 10.0);
        average.update_by(&parameters, 0.0).unwrap();
        assert_eq!(value(&average.shadow()[0]), 10.0);
        assert_eq!(average.updates(), 3);
    }

    #[test]
    fn swapping_twice_restores_the_bits() {
        let parameters = [Var::new(&[0.1f64, 0.7], &Device::Cpu).unwrap()];
        let mut average = MovingAverage::new(&parameters, 0.5, true).unwrap();
        parameters[0]
            .set(&Tensor::new(&[0.3f64, 0.9], &Device::Cpu).unwrap())
            .unwrap();
        average.update(&parameters).unwrap();
        let before = parameters[0].to_vec1::<f64>().unwrap();
        let shadow = average.shadow()[0].to_vec1::<f64>().unwrap();
        average.swap(&parameters).unwrap();
        assert_eq!(parameters[0].to_vec1::<f64>().unwrap(), shadow);
        average.swap(&parameters).unwrap();
        assert_eq!(parameters[0].to_vec1::<f64>().unwrap(), before);
        assert_eq!(average.shadow()[0].to_vec1::<f64>().unwrap(), shadow);
    }

    #[test]
    fn a_decay_of_one_and_foreign_tensors_are_refused() {
        let parameters = [Var::new(&[1f64], &Device::Cpu).unwrap()];
        assert!(MovingAverage::new(&parameters, 1.0, false).is_err());
        let mut average = MovingAverage::new(&parameters, 0.5, false).unwrap();
        let foreign = Tensor::new(&[1f64, 2.0], &Device::Cpu).unwrap();
        assert!(average.resume(vec![foreign], 3).is_err());
    }
}
