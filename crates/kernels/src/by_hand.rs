//! Operations that another crate computes on the host, their gradients written by hand.
//!
//! For what no composition of tensor operations does without keeping every intermediate, and what
//! is of no use outside the crate that it is written in: a circuit that is run backwards, a tree
//! that is walked twice.

use crate::backward::Apply;
use crate::host::{self, Host, by_dtype};
use crate::simd::Real;
use crate::{DType, Device, Error, Result, Tensor};
use candle_core::{CpuStorage, CustomOp1, Layout, Shape, WithDType};

type Candle<T> = candle_core::Result<T>;

/// A map of a few flat arrays to one, in `f64`.
pub trait ByHand: Send + Sync + 'static {
    /// Its name in errors.
    fn name(&self) -> &'static str;

    /// The result, for inputs of the sizes that were given.
    fn forward(&self, inputs: &[&[f64]]) -> Vec<f64>;

    /// The gradient of each input, of its size, for the `gradient` of the result.
    fn backward(&self, inputs: &[&[f64]], gradient: &[f64]) -> Vec<Vec<f64>>;
}

/// What `operation` makes of `inputs` of any float type, as a tensor of `shape`, differentiable in
/// each of them. Tensors of another device come to the host and go back.
///
/// # Errors
/// When there is no input, or the operation gives another number of elements.
pub fn by_hand(operation: impl ByHand, inputs: &[&Tensor], shape: &[usize]) -> Result<Tensor> {
    let Some(first) = inputs.first() else {
        return Err(Error::argument(operation.name(), "inputs", 0, "at least 1"));
    };
    let dtype = first.dtype();
    let flat: Vec<Tensor> = inputs
        .iter()
        .map(|input| {
            let here = input.to_device(&Device::Cpu)?.flatten_all()?;
            match dtype {
                DType::F32 | DType::F64 => here.to_dtype(dtype),
                _ => here.to_dtype(DType::F32),
            }
        })
        .collect::<Candle<_>>()?;
    let lengths = flat.iter().map(Tensor::elem_count).collect();
    // One argument, since an operation of the engine has at most three.
    let packed = Packed {
        operation,
        lengths,
        shape: shape.to_vec(),
    };
    let result = Tensor::cat(&flat, 0)?.apply1(packed)?;
    Ok(result.to_dtype(dtype)?.to_device(first.device())?)
}

struct Packed<O> {
    operation: O,
    lengths: Vec<usize>,
    shape: Vec<usize>,
}

impl<O: ByHand> Packed<O> {
    fn split<'a>(&self, mut flat: &'a [f64]) -> Vec<&'a [f64]> {
        let mut parts = Vec::with_capacity(self.lengths.len());
        for &length in &self.lengths {
            let (part, rest) = flat.split_at(length);
            parts.push(part);
            flat = rest;
        }
        parts
    }

    fn fits(&self, found: usize, expected: usize) -> Candle<()> {
        if found == expected {
            return Ok(());
        }
        let name = self.operation.name();
        candle_core::bail!("{name}: {found} numbers where {expected} are asked for")
    }
}

fn wide<T: Real>(numbers: &[T]) -> Vec<f64> {
    numbers.iter().map(|number| number.to_f64()).collect()
}

fn narrow<T: Real>(numbers: Vec<f64>) -> Vec<T> {
    numbers.into_iter().map(T::of).collect()
}

impl<O: ByHand> CustomOp1 for Packed<O> {
    fn name(&self) -> &'static str {
        self.operation.name()
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Candle<(CpuStorage, Shape)> {
        by_dtype!(host::dtype(storage), T => {
            let flat = wide(&host::ordered::<T>(storage, layout)?);
            let result = self.operation.forward(&self.split(&flat));
            self.fits(result.len(), self.shape.iter().product())?;
            Ok((T::to_cpu_storage_owned(narrow(result)), Shape::from(&self.shape[..])))
        })
    }

    fn bwd(&self, flat: &Tensor, _: &Tensor, gradient: &Tensor) -> Candle<Option<Tensor>> {
        let (flat_host, gradient) = (Host::new(flat), Host::new(gradient));
        by_dtype!(flat.dtype(), T => {
            let numbers = wide(&flat_host.ordered::<T>()?);
            let gradient = wide(&gradient.ordered::<T>()?);
            let each = self.operation.backward(&self.split(&numbers), &gradient);
            self.fits(each.iter().map(Vec::len).sum(), numbers.len())?;
            let mut all = Vec::with_capacity(numbers.len());
            for part in each {
                all.extend(part.into_iter().map(T::of));
            }
            Ok(Some(host::tensor::<T>(all, flat.dims())?))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Var;

    /// `x_i · y_0`.
    struct Scaled;

    impl ByHand for Scaled {
        fn name(&self) -> &'static str {
            "scaled"
        }

        fn forward(&self, inputs: &[&[f64]]) -> Vec<f64> {
            inputs[0].iter().map(|x| x * inputs[1][0]).collect()
        }

        fn backward(&self, inputs: &[&[f64]], gradient: &[f64]) -> Vec<Vec<f64>> {
            let x = gradient.iter().map(|g| g * inputs[1][0]).collect();
            let y = inputs[0].iter().zip(gradient).map(|(x, g)| x * g).sum();
            vec![x, vec![y]]
        }
    }

    #[test]
    fn values_and_gradients_are_the_operations_own() {
        let x = Var::new(&[[1f32, 2.0], [3.0, 4.0]], &Device::Cpu).unwrap();
        let y = Var::new(&[3f32], &Device::Cpu).unwrap();
        // A view that does not lie in order.
        let turned = x.as_tensor().t().unwrap();
        let z = by_hand(Scaled, &[&turned, y.as_tensor()], &[4]).unwrap();
        assert_eq!(z.to_vec1::<f32>().unwrap(), [3.0, 9.0, 6.0, 12.0]);
        let gradients = z.sum_all().unwrap().backward().unwrap();
        let of = |variable: &Var| {
            let gradient = gradients.get(variable.as_tensor()).unwrap();
            gradient.flatten_all().unwrap().to_vec1::<f32>().unwrap()
        };
        assert_eq!(of(&x), [3.0; 4]);
        assert_eq!(of(&y), [10.0]);
        assert!(by_hand(Scaled, &[&turned, y.as_tensor()], &[5]).is_err());
    }
}
