//! The backward pass, on which gradients of variables go past the engine.
//!
//! Of every argument of every operation the engine makes zeros first and adds the gradient to them: a second copy of
//! it, and two more ways through memory. What flows on backwards has to be handed over like that; what belongs to a
//! variable, a weight mostly, is at its end, and is kept here as the operation made it.

use crate::{GradStore, Result, Tensor, TensorId};
use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Shape};
use std::cell::RefCell;
use std::collections::HashMap;

type Candle<T> = candle_core::Result<T>;
type Kept = HashMap<TensorId, Tensor>;

thread_local! {
    /// What the backward passes of this thread have kept, the innermost last: one may run another, to recompute.
    static PASSES: RefCell<Vec<Kept>> = const { RefCell::new(Vec::new()) };
}

/// The gradient of the sum of all elements of `loss` in each variable that it depends on, as [`Tensor::backward`] finds it, in less
/// time and memory.
///
/// # Errors
/// Those of an operation that has no backward pass.
///
/// ```
/// use lapidary_kernels::{Device, Var, backward, linear};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let x = Var::new(&[[1f32, 2.0]], &Device::Cpu)?;
/// let w = Var::new(&[[3f32, 4.0]], &Device::Cpu)?;
/// let gradients = backward(&linear(&x, &w, None)?)?;
/// assert_eq!(gradients.get(&w).unwrap().to_vec2::<f32>()?, [[1.0, 2.0]]);
/// # Ok(())
/// # }
/// ```
pub fn backward(loss: &Tensor) -> Result<GradStore> {
    let pass = Pass::begun();
    let mut gradients = loss.backward()?;
    for (id, kept) in pass.ended() {
        let sum = match gradients.get_id(id) {
            Some(other) => (other + kept)?,
            None => kept,
        };
        gradients.insert_id(id, sum);
    }
    Ok(gradients)
}

/// A backward pass under way, which ends where this is dropped too.
struct Pass;

impl Pass {
    fn begun() -> Self {
        PASSES.with_borrow_mut(|passes| passes.push(Kept::new()));
        Self
    }

    /// What was kept since it began.
    fn ended(self) -> Kept {
        PASSES
            .with_borrow_mut(|passes| passes.last_mut().map(std::mem::take))
            .unwrap_or_default()
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        PASSES.with_borrow_mut(Vec::pop);
    }
}

/// What is left for the engine of an argument's gradient: nothing where it has been kept.
fn handed_over(argument: &Tensor, gradient: Option<Tensor>) -> Candle<Option<Tensor>> {
    let Some(gradient) = gradient else {
        return Ok(None);
    };
    if !argument.is_variable() || gradient.shape() != argument.shape() {
        // Of a wrong shape the engine says what is wrong.
        return Ok(Some(gradient));
    }
    PASSES.with_borrow_mut(|passes| {
        let Some(kept) = passes.last_mut() else {
            return Ok(Some(gradient));
        };
        let sum = match kept.get(&argument.id()) {
            Some(other) => (other + gradient)?,
            None => gradient.contiguous()?,
        };
        kept.insert(argument.id(), sum.detach());
        Ok(None)
    })
}

/// Runs an operation of this crate on tensors.
pub(crate) trait Apply {
    fn apply1(&self, operation: impl CustomOp1 + Send + Sync + 'static) -> Candle<Tensor>;

    fn apply2(
        &self,
        second: &Tensor,
        operation: impl CustomOp2 + Send + Sync + 'static,
    ) -> Candle<Tensor>;

    fn apply3(
        &self,
        second: &Tensor,
        third: &Tensor,
        operation: impl CustomOp3 + Send + Sync + 'static,
    ) -> Candle<Tensor>;
}

impl Apply for Tensor {
    fn apply1(&self, operation: impl CustomOp1 + Send + Sync + 'static) -> Candle<Tensor> {
        self.apply_op1(Keeping(operation))
    }

    fn apply2(
        &self,
        second: &Tensor,
        operation: impl CustomOp2 + Send + Sync + 'static,
    ) -> Candle<Tensor> {
        self.apply_op2(second, Keeping(operation))
    }

    fn apply3(
        &self,
        second: &Tensor,
        third: &Tensor,
        operation: impl CustomOp3 + Send + Sync + 'static,
    ) -> Candle<Tensor> {
        self.apply_op3(second, third, Keeping(operation))
    }
}

/// An operation whose gradients of variables are kept.
struct Keeping<O>(O);

impl<O: CustomOp1> CustomOp1 for Keeping<O> {
    fn name(&self) -> &'static str {
        self.0.name()
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Candle<(CpuStorage, Shape)> {
        self.0.cpu_fwd(x, layout)
    }

    fn bwd(&self, x: &Tensor, result: &Tensor, gradient: &Tensor) -> Candle<Option<Tensor>> {
        handed_over(x, self.0.bwd(x, result, gradient)?)
    }
}

impl<O: CustomOp2> CustomOp2 for Keeping<O> {
    fn name(&self) -> &'static str {
        self.0.name()
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        y: &CpuStorage,
        y_layout: &Layout,
    ) -> Candle<(CpuStorage, Shape)> {
        self.0.cpu_fwd(x, x_layout, y, y_layout)
    }

    fn bwd(
        &self,
        x: &Tensor,
        y: &Tensor,
        result: &Tensor,
        gradient: &Tensor,
    ) -> Candle<(Option<Tensor>, Option<Tensor>)> {
        let (of_x, of_y) = self.0.bwd(x, y, result, gradient)?;
        Ok((handed_over(x, of_x)?, handed_over(y, of_y)?))
    }
}

impl<O: CustomOp3> CustomOp3 for Keeping<O> {
    fn name(&self) -> &'static str {
        self.0.name()
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        y: &CpuStorage,
        y_layout: &Layout,
        z: &CpuStorage,
        z_layout: &Layout,
    ) -> Candle<(CpuStorage, Shape)> {
        self.0.cpu_fwd(x, x_layout, y, y_layout, z, z_layout)
    }

    fn bwd(
        &self,
        x: &Tensor,
        y: &Tensor,
        z: &Tensor,
        result: &Tensor,
        gradient: &Tensor,
    ) -> Candle<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let (of_x, of_y, of_z) = self.0.bwd(x, y, z, result, gradient)?;
        Ok((
            handed_over(x, of_x)?,
            handed_over(y, of_y)?,
            handed_over(z, of_z)?,
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Device, Recomputation, Var, add, layer_norm, linear};

    fn variable(shape: &[usize], shift: f64) -> Var {
        let n = shape.iter().product::<usize>();
        let values: Vec<f64> = (0..n).map(|i| (i as f64 + shift).sin()).collect();
        Var::from_tensor(&Tensor::from_vec(values, shape, &Device::Cpu).unwrap()).unwrap()
    }

    fn difference(a: &Tensor, b: &Tensor) -> f64 {
        let differences = (a - b).unwrap().abs().unwrap().flatten_all().unwrap();
        differences.max(0).unwrap().to_scalar().unwrap()
    }

    /// Of a weight that is used twice, once by the engine alone, and of one that a view of is used.
    #[test]
    fn gradients_are_those_of_the_engine() {
        let (x, w, b) = (
            variable(&[3, 4], 0.1),
            variable(&[4, 4], 0.2),
            variable(&[8], 0.3),
        );
        let loss = || {
            let half = b.narrow(0, 2, 4).unwrap();
            let y = linear(&x, &w, Some(&half)).unwrap();
            let y = add(&y, &x).unwrap();
            let y = linear(&y, &w, None).unwrap();
            let y = layer_norm(&y, Some(&half), None, 1e-5).unwrap();
            (y.matmul(&w).unwrap() * x.as_tensor())
                .unwrap()
                .sum_all()
                .unwrap()
        };
        let (ours, engines) = (backward(&loss()).unwrap(), loss().backward().unwrap());
        assert_eq!(ours.get_ids().count(), engines.get_ids().count());
        for variable in [&x, &w, &b] {
            let error = difference(ours.get(variable).unwrap(), engines.get(variable).unwrap());
            assert!(error < 1e-12, "{error}");
        }
    }

    #[test]
    fn an_argument_that_is_the_whole_loss_of_two_has_both_gradients() {
        let x = variable(&[2], 0.0);
        let gradients = backward(&add(&x, &x).unwrap()).unwrap();
        assert_eq!(
            gradients.get(&x).unwrap().to_vec1::<f64>().unwrap(),
            [2.0, 2.0]
        );
    }

    /// A pass inside of another keeps what is its own.
    #[test]
    fn passes_nest() {
        let (x, w) = (variable(&[3, 4], 0.1), variable(&[4, 4], 0.2));
        let recomputation = Recomputation::of([&w]);
        let inner = w.as_tensor().clone();
        let part = move |x: &Tensor| linear(&linear(x, &inner, None)?, &inner, None);
        let plain = linear(&part(&x).unwrap(), &w, None).unwrap();
        let expected = plain.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        let y = linear(&recomputation.run(&x, part).unwrap(), &w, None).unwrap();
        let mut found = backward(&y.sqr().unwrap().sum_all().unwrap()).unwrap();
        recomputation.add_to(&mut found).unwrap();
        for variable in [&x, &w] {
            let error = difference(
                found.get(variable).unwrap(),
                expected.get(variable).unwrap(),
            );
            assert!(error < 1e-12, "{error}");
        }
    }

    /// A pass that fails ends too: nothing of it is found by the next, or kept from the engine.
    #[test]
    fn a_pass_that_fails_leaves_nothing() {
        struct Fails;
        impl CustomOp1 for Fails {
            fn name(&self) -> &'static str {
                "fails"
            }
            fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Candle<(CpuStorage, Shape)> {
                Ok((x.clone(), layout.shape().clone()))
            }
        }
        let x = variable(&[2], 0.0);
        let failing = x.apply1(Fails).unwrap();
        let error = backward(&add(&failing, &x).unwrap()).unwrap_err();
        assert!(error.to_string().contains("fails"), "{error}");
        let left = add(&x, &x).unwrap().backward().unwrap();
        assert_eq!(left.get(&x).unwrap().to_vec1::<f64>().unwrap(), [2.0, 2.0]);
    }
}
