//! Optimisers that update many tensors in place, without temporary tensors.

mod adamw;
mod lion;
mod sgd;

pub use adamw::{AdamW, AdamWOptions};
pub use lion::{Lion, LionOptions};
pub use sgd::{Sgd, SgdOptions};

use crate::host::{self, Host, Shared};
use crate::simd::{self, Real};
use crate::{DType, Error, Result, Tensor, Var};
use candle_core::{CpuStorage, InplaceOp2, Layout};
use std::cell::RefCell;

/// A tensor under training and what is particular to it.
#[derive(Clone, Debug)]
pub struct Parameter {
    /// What is trained.
    pub variable: Var,
    /// Overrides the weight decay of the options; zero for norms and biases by custom.
    pub weight_decay: Option<f64>,
    /// Multiplies the learning rate of the step, usually 1.
    pub rate_factor: f64,
}

impl From<Var> for Parameter {
    fn from(variable: Var) -> Self {
        Self {
            variable,
            weight_decay: None,
            rate_factor: 1.0,
        }
    }
}

/// Everything an optimiser remembers; with the weights it resumes a run bit for bit.
#[derive(Clone, Debug, Default)]
pub struct OptimiserState {
    /// Steps taken.
    pub step: u64,
    /// Per parameter, in order: its moments (AdamW: first and second; Lion: the momentum; SGD: the velocity).
    pub moments: Vec<Vec<Tensor>>,
}

/// `N` numbers remembered per element of a parameter.
#[derive(Debug)]
enum Moments<const N: usize> {
    F32([Vec<f32>; N]),
    F64([Vec<f64>; N]),
}

/// A parameter together with its moments.
#[derive(Debug)]
struct Slot<const N: usize> {
    parameter: Parameter,
    moments: Moments<N>,
}

/// What a step does to one parameter.
trait Rule<const N: usize>: Sync {
    /// Moves some of its weights, and what is remembered of them, by their gradients.
    fn apply<T: Real>(&self, w: &mut [T], moments: [&mut [T]; N], g: &[T]);
}

impl<const N: usize> Slot<N> {
    fn step(&mut self, gradient: &Tensor, rule: &impl Rule<N>) -> Result<()> {
        let variable = &self.parameter.variable;
        match &mut self.moments {
            Moments::F32(moments) => update(variable, moments, gradient, rule),
            Moments::F64(moments) => update(variable, moments, gradient, rule),
        }
    }
}

fn slots<const N: usize>(kernel: &'static str, parameters: Vec<Parameter>) -> Result<Vec<Slot<N>>> {
    parameters
        .into_iter()
        .map(|parameter| {
            let n = parameter.variable.elem_count();
            let moments = match (parameter.variable.dtype(), parameter.variable.device()) {
                (DType::F32, crate::Device::Cpu) => Moments::F32([(); N].map(|_| vec![0.0; n])),
                (DType::F64, crate::Device::Cpu) => Moments::F64([(); N].map(|_| vec![0.0; n])),
                found => {
                    let expected = "f32 or f64 on the CPU";
                    return Err(Error::argument(kernel, "a parameter", found, expected));
                }
            };
            Ok(Slot { parameter, moments })
        })
        .collect()
}

fn state_of<const N: usize>(step: u64, slots: &[Slot<N>]) -> Result<OptimiserState> {
    let moments = slots
        .iter()
        .map(|slot| {
            let dims = slot.parameter.variable.dims();
            Ok(match &slot.moments {
                Moments::F32(all) => all
                    .iter()
                    .map(|m| host::tensor(m.clone(), dims))
                    .collect::<candle_core::Result<_>>()?,
                Moments::F64(all) => all
                    .iter()
                    .map(|m| host::tensor(m.clone(), dims))
                    .collect::<candle_core::Result<_>>()?,
            })
        })
        .collect::<Result<_>>()?;
    Ok(OptimiserState { step, moments })
}

/// Replaces the moments by those of `state`, or leaves everything as it was.
fn restore<const N: usize>(
    kernel: &'static str,
    slots: &mut [Slot<N>],
    state: &OptimiserState,
) -> Result<()> {
    if state.moments.len() != slots.len() {
        let expected = format!("moments of {} parameters", slots.len());
        return Err(Error::argument(
            kernel,
            "state",
            state.moments.len(),
            expected,
        ));
    }
    let mut restored = Vec::with_capacity(slots.len());
    for (slot, moments) in slots.iter().zip(&state.moments) {
        let variable = &slot.parameter.variable;
        let fits = moments.len() == N
            && moments
                .iter()
                .all(|m| m.dims() == variable.dims() && m.dtype() == variable.dtype());
        if !fits {
            let found: Vec<_> = moments.iter().map(|m| (m.dims(), m.dtype())).collect();
            let expected = format!("{N} of {:?} in {:?}", variable.dims(), variable.dtype());
            return Err(Error::argument(
                kernel,
                "moments in the state",
                found,
                expected,
            ));
        }
        restored.push(match slot.moments {
            Moments::F32(_) => Moments::F32(read_all(moments)?),
            Moments::F64(_) => Moments::F64(read_all(moments)?),
        });
    }
    for (slot, moments) in slots.iter_mut().zip(restored) {
        slot.moments = moments;
    }
    Ok(())
}

fn read_all<T: Real, const N: usize>(tensors: &[Tensor]) -> Result<[Vec<T>; N]> {
    let mut all = [(); N].map(|_| Vec::new());
    for (moments, tensor) in all.iter_mut().zip(tensors) {
        *moments = tensor.flatten_all()?.to_vec1::<T>()?;
    }
    Ok(all)
}

/// Elements that one parallel task updates at a time.
const CHUNK: usize = 4096;

/// Applies the rule to chunks of parameters, moments and gradients, in parallel and in place.
fn update<T: Real, const N: usize>(
    variable: &Var,
    moments: &mut [Vec<T>; N],
    gradient: &Tensor,
    rule: &impl Rule<N>,
) -> Result<()> {
    if gradient.dims() != variable.dims() || gradient.dtype() != variable.dtype() {
        return Err(Error::argument(
            "optimiser",
            "a gradient",
            (gradient.dims(), gradient.dtype()),
            format!("{:?} in {:?}", variable.dims(), variable.dtype()),
        ));
    }
    let in_place = InPlace {
        body: RefCell::new(|parameters: &mut [T], gradients: &[T]| {
            let count = parameters.len();
            let parameters = Shared::new(parameters);
            let moments = moments.each_mut().map(|m| Shared::new(m.as_mut_slice()));
            host::share(count.div_ceil(CHUNK), CHUNK, |chunks| {
                let start = chunks.start * CHUNK;
                let len = count.min(chunks.end * CHUNK) - start;
                // SAFETY: chunks are disjoint.
                let (parameters, mut moments) = unsafe {
                    (
                        parameters.part(start, len),
                        moments.each_ref().map(|m| m.part(start, len)),
                    )
                };
                simd::vectorised(
                    #[inline(always)]
                    || {
                        let moments = moments.each_mut().map(|moment| &mut **moment);
                        rule.apply(parameters, moments, &gradients[start..start + len]);
                    },
                );
            });
        }),
        element: std::marker::PhantomData,
    };
    Ok(variable.inplace_op2(gradient, &in_place)?)
}

struct InPlace<T, F> {
    body: RefCell<F>,
    element: std::marker::PhantomData<T>,
}

impl<T: Real, F: FnMut(&mut [T], &[T])> InplaceOp2 for InPlace<T, F> {
    fn name(&self) -> &'static str {
        "optimiser"
    }

    fn cpu_fwd(
        &self,
        parameters: &mut CpuStorage,
        layout: &Layout,
        gradients: &CpuStorage,
        gradients_layout: &Layout,
    ) -> candle_core::Result<()> {
        let Some((start, end)) = layout.contiguous_offsets() else {
            candle_core::bail!("optimiser: a parameter that is not contiguous")
        };
        let gradients = host::ordered::<T>(gradients, gradients_layout)?;
        let parameters = T::slice_mut(parameters)?;
        (self.body.borrow_mut())(&mut parameters[start..end], &gradients);
        Ok(())
    }
}

/// The Euclidean norm of all the tensors taken as one vector, summed in `f64`.
///
/// The order of summation is fixed, so that the result does not depend on the threads.
///
/// # Errors
/// For tensors that are neither `f32` nor `f64` on the CPU, those of converting them.
pub fn global_gradient_norm(gradients: &[&Tensor]) -> Result<f64> {
    let mut total = 0.0;
    for gradient in gradients {
        total += if host::fused(&[gradient]) {
            let read = Host::new(gradient);
            host::by_dtype!(gradient.dtype(), T => {
                Ok(sum_of_squares::<T>(&read.ordered::<T>()?))
            })?
        } else {
            gradient
                .to_dtype(DType::F64)?
                .sqr()?
                .sum_all()?
                .to_scalar::<f64>()?
        };
    }
    Ok(total.sqrt())
}

fn sum_of_squares<T: Real>(x: &[T]) -> f64 {
    let mut sums = vec![0f64; x.len().div_ceil(CHUNK)];
    let shared = Shared::new(&mut sums);
    host::share(x.len().div_ceil(CHUNK), CHUNK, |chunks| {
        simd::vectorised(
            #[inline(always)]
            || {
                for chunk in chunks.clone() {
                    let part = &x[chunk * CHUNK..x.len().min((chunk + 1) * CHUNK)];
                    // Squares in f64: those of large f32 gradients would overflow.
                    let mut lanes = [0f64; simd::LANES];
                    for values in part.chunks(simd::LANES) {
                        for (lane, &v) in lanes.iter_mut().zip(values) {
                            let v = v.to_f64();
                            *lane += v * v;
                        }
                    }
                    // SAFETY: each chunk has a sum of its own.
                    unsafe { shared.part(chunk, 1)[0] = lanes.iter().sum() };
                }
            },
        );
    });
    sums.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_data::arange;

    #[test]
    fn the_norm_of_several_tensors() {
        for dtype in [DType::F32, DType::F64] {
            let a = arange(&[100, 101], 1.0, dtype);
            let b = arange(&[7, 3], 2.0, dtype).t().unwrap();
            let empty = arange(&[0], 1.0, dtype);
            let square = |x: &Tensor| {
                let x = x.to_dtype(DType::F64).unwrap();
                x.sqr()
                    .unwrap()
                    .sum_all()
                    .unwrap()
                    .to_scalar::<f64>()
                    .unwrap()
            };
            let truth = (square(&a) + square(&b)).sqrt();
            let norm = global_gradient_norm(&[&a, &b, &empty]).unwrap();
            assert!((norm - truth).abs() < 1e-9 * truth);
        }
        let large = Tensor::new(&[1e30f32, 1e30], &crate::Device::Cpu).unwrap();
        assert!((global_gradient_norm(&[&large]).unwrap() / 1e30 - 2f64.sqrt()).abs() < 1e-6);
        assert_eq!(global_gradient_norm(&[]).unwrap(), 0.0);
    }
}
