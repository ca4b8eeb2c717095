//! Recomputing instead of remembering: a part of a network whose intermediates are thrown away
//! after the forward pass and made again in the backward pass (Chen et al., Training Deep Nets
//! with Sublinear Memory Cost, 2016, arXiv 1604.06174).

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Storage};

use crate::{Error, Result, Tensor, Var};

type Part = Arc<dyn Fn(&Tensor) -> Result<Tensor> + Send + Sync>;

/// Collects the gradients of parameters that recomputed parts use. The tensor engine hands a
/// custom operation's gradient to its arguments alone, so those of the parameters inside are kept
/// here until [`Recomputation::add_to`] joins them with the rest.
#[derive(Clone, Default)]
pub struct Recomputation {
    gradients: Arc<Mutex<Vec<GradStore>>>,
}

impl Recomputation {
    /// Nothing recomputed yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// `part(x)`, of which only the result is remembered. `part` must give the same result when
    /// it runs again.
    pub fn run(
        &self,
        x: &Tensor,
        part: impl Fn(&Tensor) -> Result<Tensor> + Send + Sync + 'static,
    ) -> Result<Tensor> {
        let y = part(&x.detach())?.detach().contiguous()?;
        let op = Recomputed {
            part: Arc::new(part),
            value: y,
            gradients: self.gradients.clone(),
        };
        Ok(x.apply_op1(op)?)
    }

    /// Adds the gradients of the parameters inside recomputed parts to those of the backward
    /// pass that has just been done.
    pub fn add_to(&self, gradients: &mut GradStore) -> Result<()> {
        let inside = std::mem::take(
            &mut *self
                .gradients
                .lock()
                .unwrap_or_else(PoisonError::into_inner),
        );
        for store in inside {
            gradients.extend(store)?;
        }
        Ok(())
    }
}

struct Recomputed {
    part: Part,
    value: Tensor,
    gradients: Arc<Mutex<Vec<GradStore>>>,
}

fn engine(error: Error) -> candle_core::Error {
    match error {
        Error::Tensor(error) => error,
        other => candle_core::Error::Msg(other.to_string()),
    }
}

impl CustomOp1 for Recomputed {
    fn name(&self) -> &'static str {
        "recompute"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let (storage, layout) = self.value.storage_and_layout();
        match &*storage {
            // A contiguous tensor that owns exactly its elements is copied as it is.
            Storage::Cpu(cpu) if layout.start_offset() == 0 => {
                Ok((cpu.clone(), self.value.shape().clone()))
            }
            _ => Err(candle_core::Error::Msg(
                "recompute: the part's value is not on the CPU".into(),
            )),
        }
    }

    fn bwd(
        &self,
        x: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> candle_core::Result<Option<Tensor>> {
        let x = Var::from_tensor(&x.detach())?;
        let y = (self.part)(x.as_tensor()).map_err(engine)?;
        let mut gradients = (y * gradient.detach())?.sum_all()?.backward()?;
        let of_input = gradients.remove(x.as_tensor());
        self.gradients
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(gradients);
        Ok(of_input)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Activation, Device, activate, linear};

    #[test]
    fn gradients_are_those_of_the_remembered_part() {
        let make = |values: &[f64], shape: (usize, usize)| {
            Var::from_tensor(&Tensor::from_slice(values, shape, &Device::Cpu).unwrap()).unwrap()
        };
        let x = make(&[0.3, -1.2, 0.7, 2.0], (2, 2));
        let w = make(&[0.5, -0.4, 1.1, 0.9], (2, 2));
        let part = {
            let w = w.as_tensor().clone();
            move |x: &Tensor| activate(&linear(x, &w, None)?, Activation::Tanh)
        };
        let plain = part(x.as_tensor())
            .unwrap()
            .sqr()
            .unwrap()
            .sum_all()
            .unwrap();
        let plain = plain.backward().unwrap();
        let recomputation = Recomputation::new();
        let y = recomputation.run(x.as_tensor(), part).unwrap();
        let mut again = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        recomputation.add_to(&mut again).unwrap();
        for variable in [&x, &w] {
            let expected = plain
                .get(variable.as_tensor())
                .unwrap()
                .to_vec2::<f64>()
                .unwrap();
            let found = again
                .get(variable.as_tensor())
                .unwrap()
                .to_vec2::<f64>()
                .unwrap();
            assert_eq!(expected, found);
        }
    }
}
