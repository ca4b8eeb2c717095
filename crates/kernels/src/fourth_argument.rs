//! A fourth argument of an operation, of which the engine allows three.

use crate::backward::Apply;
use crate::host::{self, by_dtype};
use crate::{Result, Tensor};
use candle_core::{CpuStorage, CustomOp2, Layout, Shape, WithDType};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::ThreadId;

type Candle<T> = candle_core::Result<T>;

/// What an operation knows of its fourth argument: where its backward pass leaves the gradient.
///
/// A backward pass runs on one thread, and comes to what reads a tensor before it comes to what made it: on each thread
/// [`Fourth::leave`] is called before the gradient is fetched.
#[derive(Clone)]
pub(crate) struct Fourth {
    left: Arc<Mutex<HashMap<ThreadId, Tensor>>>,
}

impl Fourth {
    /// One of the three arguments as it is, a copy of it best made of the smallest; it has to be among those that the
    /// operation reads. Where it came from, `fourth` is given the gradient that the operation leaves.
    pub(crate) fn riding_on(carrier: &Tensor, fourth: &Tensor) -> Result<(Tensor, Self)> {
        let slot = Self {
            left: Arc::default(),
        };
        let carrier = carrier.apply2(fourth, Carried(slot.clone()))?;
        Ok((carrier, slot))
    }

    /// Leaves the gradient of the fourth argument.
    pub(crate) fn leave(&self, gradient: Tensor) {
        let thread = std::thread::current().id();
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        left.insert(thread, gradient);
    }

    fn fetch(&self) -> Option<Tensor> {
        let thread = std::thread::current().id();
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        left.remove(&thread)
    }
}

struct Carried(Fourth);

impl CustomOp2 for Carried {
    fn name(&self) -> &'static str {
        "with a fourth argument"
    }

    fn cpu_fwd(
        &self,
        carrier: &CpuStorage,
        layout: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Candle<(CpuStorage, Shape)> {
        by_dtype!(host::dtype(carrier), T => {
            let same = host::ordered::<T>(carrier, layout)?.into_owned();
            Ok((T::to_cpu_storage_owned(same), layout.shape().clone()))
        })
    }

    fn bwd(
        &self,
        _: &Tensor,
        _: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Candle<(Option<Tensor>, Option<Tensor>)> {
        Ok((Some(gradient.clone()), self.0.fetch()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Device, Var};
    use candle_core::CustomOp1;

    /// `x y`, of which `y` is no argument.
    struct Times(f64, Option<Fourth>);

    impl CustomOp1 for Times {
        fn name(&self) -> &'static str {
            "times"
        }

        fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Candle<(CpuStorage, Shape)> {
            let product: Vec<f64> = host::ordered::<f64>(x, layout)?
                .iter()
                .map(|x| x * self.0)
                .collect();
            Ok((f64::to_cpu_storage_owned(product), layout.shape().clone()))
        }

        fn bwd(&self, x: &Tensor, _: &Tensor, gradient: &Tensor) -> Candle<Option<Tensor>> {
            if let Some(fourth) = &self.1 {
                fourth.leave((x * gradient)?.sum_all()?);
            }
            Ok(Some((gradient * self.0)?))
        }
    }

    #[test]
    fn two_arguments_of_an_operation_with_one_have_their_gradients_each_time() {
        let x = Var::new(&[1f64, 2.0], &Device::Cpu).unwrap();
        let y = Var::new(3f64, &Device::Cpu).unwrap();
        let (carrier, fourth) = Fourth::riding_on(&x, &y).unwrap();
        let product = carrier.apply1(Times(3.0, Some(fourth))).unwrap();
        let weighted = |factor: f64| {
            let weights = Tensor::new(&[factor, 1.0], &Device::Cpu).unwrap();
            let loss = (&product * weights).unwrap().sum_all().unwrap();
            let gradients = loss.backward().unwrap();
            let of_x = gradients.get(&x).unwrap().to_vec1::<f64>().unwrap();
            let of_y = gradients.get(&y).unwrap().to_scalar::<f64>().unwrap();
            (of_x, of_y)
        };
        for factor in [10.0, -1.0] {
            let expected = (vec![3.0 * factor, 3.0], factor + 2.0);
            assert_eq!(weighted(factor), expected);
        }
        // Threads that go through one graph at the same time do not meet each other's.
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let weighted = &weighted;
                scope.spawn(move || {
                    for _ in 0..200 {
                        assert_eq!(weighted(f64::from(thread)).1, f64::from(thread) + 2.0);
                    }
                });
            }
        });
    }
}
