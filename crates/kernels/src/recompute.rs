//! Recomputing instead of remembering: a part of a network whose intermediates are thrown away
//! after the forward pass and made again in the backward pass, from what flowed into the part (Chen
//! et al., Training Deep Nets with Sublinear Memory Cost, 2016, arXiv 1604.06174) or, where parts can
//! be undone, from what flowed out of all of them (Gomez et al., The Reversible Residual Network,
//! 2017, arXiv 1707.04585).

use crate::backward::Apply;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Storage};

use crate::{Error, Result, Tensor, TensorId, Var, backward};

type Part = Arc<dyn Fn(&Tensor) -> Result<Tensor> + Send + Sync>;

/// Two streams, each moved by what a part makes of the other:
///
/// ```text
/// y₁ = x₁ + f(x₂)          x₂ = y₂ − g(y₁)
/// y₂ = x₂ + g(y₁)          x₁ = y₁ − f(x₂)
/// ```
///
/// Both parts keep the shape of their input and give the same result when they run again.
#[derive(Clone)]
pub struct Coupling {
    first: Part,
    second: Part,
}

impl Coupling {
    /// Of `f` and `g`.
    pub fn new(
        first: impl Fn(&Tensor) -> Result<Tensor> + Send + Sync + 'static,
        second: impl Fn(&Tensor) -> Result<Tensor> + Send + Sync + 'static,
    ) -> Self {
        Self {
            first: Arc::new(first),
            second: Arc::new(second),
        }
    }

    /// `y` of `x`.
    ///
    /// # Errors
    /// Those of the parts; when one changes the shape.
    pub fn forward(&self, [x1, x2]: [Tensor; 2]) -> Result<[Tensor; 2]> {
        let y1 = (x1 + (self.first)(&x2)?)?;
        let y2 = (x2 + (self.second)(&y1)?)?;
        Ok([y1, y2])
    }

    /// `x` of `y`.
    ///
    /// # Errors
    /// As [`Coupling::forward`].
    pub fn inverse(&self, [y1, y2]: [Tensor; 2]) -> Result<[Tensor; 2]> {
        let x2 = (y2 - (self.second)(&y1)?)?;
        let x1 = (y1 - (self.first)(&x2)?)?;
        Ok([x1, x2])
    }
}

/// Collects the gradients of parameters that recomputed parts use. The tensor engine hands a
/// custom operation's gradient to its arguments alone, so those of the parameters inside are kept
/// here until [`Recomputation::add_to`] joins them with the rest. What the engine finds for anything
/// else, constants and masks too, is let go.
#[derive(Clone)]
pub struct Recomputation {
    gradients: Gradients,
}

/// The gradient so far of each variable; none yet of most.
type Gradients = Arc<Mutex<HashMap<TensorId, Option<Tensor>>>>;

fn locked(gradients: &Gradients) -> MutexGuard<'_, HashMap<TensorId, Option<Tensor>>> {
    gradients.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Recomputation {
    /// Nothing recomputed yet, in parts that are differentiated in these variables.
    pub fn of<'a>(variables: impl IntoIterator<Item = &'a Var>) -> Self {
        let variables = variables.into_iter();
        let none = variables.map(|variable| (variable.as_tensor().id(), None));
        Self {
            gradients: Arc::new(Mutex::new(none.collect())),
        }
    }

    /// `part(x)`, of which only the result is remembered. `part` must give the same result when
    /// it runs again.
    pub fn run(
        &self,
        x: &Tensor,
        part: impl Fn(&Tensor) -> Result<Tensor> + Send + Sync + 'static,
    ) -> Result<Tensor> {
        let y = part(&x.detach())?.detach().contiguous()?;
        let gradients = self.gradients.clone();
        apart("recompute", x, y, move |x, _, gradient| {
            let (_, of_input) = again(&part, x, gradient, &gradients)?;
            Ok(of_input)
        })
    }

    /// All `couplings` in turn, of which only the last result is remembered: what flowed into each is
    /// had again by undoing it, so that memory does not grow with their number.
    pub fn run_reversible(
        &self,
        [x1, x2]: [&Tensor; 2],
        couplings: Vec<Coupling>,
    ) -> Result<[Tensor; 2]> {
        let mut streams = [x1.detach(), x2.detach()];
        for coupling in &couplings {
            streams = coupling.forward(streams)?.map(|stream| stream.detach());
        }
        let [y1, y2] = streams;
        let (x, y) = (Tensor::stack(&[x1, x2], 0)?, Tensor::stack(&[y1, y2], 0)?);
        let gradients = self.gradients.clone();
        let both = apart("reversible", &x, y, move |_, y, gradient| {
            slope_of_streams(&couplings, y, gradient, &gradients).map(Some)
        })?;
        Ok([both.get(0)?, both.get(1)?])
    }

    /// `Σ part(x_i, i)` over pieces `x_i` of `x` `[rows, ..]`, of `rows` rows each from row `i` on, the last perhaps of
    /// fewer: of which only the sum is remembered, so that what is inside is held for one piece at a time, in either
    /// pass. `part` gives a single number, and must give the same when it runs again; no rows sum to zero.
    ///
    /// # Errors
    /// Those of the part.
    pub fn run_summed(
        &self,
        x: &Tensor,
        rows: usize,
        part: impl Fn(&Tensor, usize) -> Result<Tensor> + Send + Sync + 'static,
    ) -> Result<Tensor> {
        let mut sum = Tensor::zeros((), x.dtype(), x.device())?;
        for (start, piece) in pieces(x, rows)? {
            sum = (sum + part(&piece, start)?.detach())?;
        }
        let gradients = self.gradients.clone();
        apart("recompute a sum", x, sum, move |x, _, gradient| {
            slope_of_pieces(&part, rows, x, gradient, &gradients).map(Some)
        })
    }

    /// Adds the gradients of the parameters inside recomputed parts to those of the backward
    /// pass that has just been done.
    pub fn add_to(&self, gradients: &mut GradStore) -> Result<()> {
        for (id, inside) in locked(&self.gradients).iter_mut() {
            let Some(inside) = inside.take() else {
                continue;
            };
            let sum = match gradients.get_id(*id) {
                Some(outside) => (outside + inside)?,
                None => inside,
            };
            gradients.insert_id(*id, sum);
        }
        Ok(())
    }
}

/// A `value` of `x` that was computed apart from the tensor engine, whose gradient in `x` is what `slope` makes of `x`,
/// the value and its gradient.
fn apart<S>(name: &'static str, x: &Tensor, value: Tensor, slope: S) -> Result<Tensor>
where
    S: Fn(&Tensor, &Tensor, &Tensor) -> candle_core::Result<Option<Tensor>> + Send + Sync + 'static,
{
    Ok(x.apply1(Apart { name, value, slope })?)
}

struct Apart<S> {
    name: &'static str,
    value: Tensor,
    slope: S,
}

impl<S> CustomOp1 for Apart<S>
where
    S: Fn(&Tensor, &Tensor, &Tensor) -> candle_core::Result<Option<Tensor>>,
{
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        copied(&self.value)
    }

    fn bwd(
        &self,
        x: &Tensor,
        y: &Tensor,
        gradient: &Tensor,
    ) -> candle_core::Result<Option<Tensor>> {
        (self.slope)(x, y, gradient)
    }
}

fn engine(error: Error) -> candle_core::Error {
    match error {
        Error::Tensor(error) => error,
        other => candle_core::Error::Msg(other.to_string()),
    }
}

/// Pieces of so many rows, detached, and the first row of each.
fn pieces(x: &Tensor, rows: usize) -> candle_core::Result<Vec<(usize, Tensor)>> {
    let (x, all) = (x.detach(), x.dim(0)?);
    let starts = (0..all).step_by(rows.max(1));
    starts
        .map(|start| Ok((start, x.narrow(0, start, rows.max(1).min(all - start))?)))
        .collect()
}

/// The gradient of `x`, whose pieces of so many rows `part` makes one sum of.
fn slope_of_pieces(
    part: &dyn Fn(&Tensor, usize) -> Result<Tensor>,
    rows: usize,
    x: &Tensor,
    gradient: &Tensor,
    gradients: &Gradients,
) -> candle_core::Result<Tensor> {
    let mut slopes = Vec::new();
    for (start, piece) in pieces(x, rows)? {
        let here = |piece: &Tensor| part(piece, start);
        let (_, of_piece) = again(&here, &piece, gradient, gradients)?;
        slopes.push(match of_piece {
            Some(slope) => slope,
            None => piece.zeros_like()?,
        });
    }
    match slopes.is_empty() {
        // The engine wants a gradient of every argument, of no rows too.
        true => x.zeros_like(),
        false => Tensor::cat(&slopes, 0),
    }
}

/// The gradient of both streams `[2, …]` before the `couplings`, for what they are behind them.
fn slope_of_streams(
    couplings: &[Coupling],
    y: &Tensor,
    gradient: &Tensor,
    gradients: &Gradients,
) -> candle_core::Result<Tensor> {
    let [mut y1, mut y2] = [y.get(0)?.detach(), y.get(1)?.detach()];
    let gradient = gradient.detach();
    let [mut of_1, mut of_2] = [gradient.get(0)?, gradient.get(1)?];
    let joined = |sum: Tensor, part: Option<Tensor>| match part {
        Some(part) => sum + part.detach(),
        None => Ok(sum),
    };
    for coupling in couplings.iter().rev() {
        let (moved, through) = again(&*coupling.second, &y1, &of_2, gradients)?;
        y2 = (y2 - moved)?;
        of_1 = joined(of_1, through)?;
        let (moved, through) = again(&*coupling.first, &y2, &of_1, gradients)?;
        y1 = (y1 - moved)?;
        of_2 = joined(of_2, through)?;
    }
    Tensor::stack(&[of_1, of_2], 0)
}

/// The storage of a contiguous tensor that owns exactly its elements.
fn copied(value: &Tensor) -> candle_core::Result<(CpuStorage, Shape)> {
    let (storage, layout) = value.storage_and_layout();
    match &*storage {
        Storage::Cpu(cpu) if layout.start_offset() == 0 => Ok((cpu.clone(), value.shape().clone())),
        _ => Err(candle_core::Error::Msg(
            "recompute: the part's value is not on the CPU".into(),
        )),
    }
}

/// Runs `part` on `x` again; gives its value and, for the `gradient` of that, the gradient of `x`.
/// Those of parameters inside go to `gradients`.
fn again(
    part: &dyn Fn(&Tensor) -> Result<Tensor>,
    x: &Tensor,
    gradient: &Tensor,
    gradients: &Gradients,
) -> candle_core::Result<(Tensor, Option<Tensor>)> {
    let x = Var::from_tensor(&x.detach())?;
    let y = part(x.as_tensor()).map_err(engine)?;
    let mut found = backward(&(&y * gradient.detach())?.sum_all()?).map_err(engine)?;
    // What a gradient was made of is held no longer than it takes.
    let of_input = found
        .remove(x.as_tensor())
        .map(|gradient| gradient.detach());
    for (id, sum) in locked(gradients).iter_mut() {
        let Some(inside) = found.get_id(*id) else {
            continue;
        };
        *sum = Some(match sum.take() {
            Some(sum) => (sum + inside.detach())?,
            None => inside.detach(),
        });
    }
    Ok((y.detach(), of_input))
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
        let recomputation = Recomputation::of([&w]);
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

    /// Pieces of which the last is shorter, each with a factor of its own.
    #[test]
    fn sums_over_pieces_have_the_gradients_of_the_whole() {
        let made = |values: Vec<f64>, shape: (usize, usize)| {
            Var::from_tensor(&Tensor::from_vec(values, shape, &Device::Cpu).unwrap()).unwrap()
        };
        let numbers = |count: usize| (0..count).map(|i| ((i * 37) % 23) as f64 / 11.0 - 1.0);
        let (x, w) = (
            made(numbers(21).collect(), (7, 3)),
            made(numbers(6).collect(), (2, 3)),
        );
        let part = {
            let w = w.as_tensor().clone();
            move |x: &Tensor, start: usize| -> Result<Tensor> {
                let y = activate(&linear(x, &w, None)?, Activation::Tanh)?;
                Ok((y.sum_all()? * (1.0 + start as f64))?)
            }
        };
        let piece = |start: usize, rows: usize| {
            part(&x.as_tensor().narrow(0, start, rows).unwrap(), start).unwrap()
        };
        let plain = ((piece(0, 3) + piece(3, 3)).unwrap() + piece(6, 1)).unwrap();
        let recomputation = Recomputation::of([&w]);
        let found = recomputation
            .run_summed(x.as_tensor(), 3, part.clone())
            .unwrap();
        let number = |x: &Tensor| x.to_scalar::<f64>().unwrap();
        assert!((number(&plain) - number(&found)).abs() < 1e-12);
        // The gradient of the sum is not 1.
        let expected = plain.sqr().unwrap().backward().unwrap();
        let mut store = found.sqr().unwrap().backward().unwrap();
        recomputation.add_to(&mut store).unwrap();
        for variable in [&x, &w] {
            let of = |store: &GradStore| store.get(variable.as_tensor()).unwrap().clone();
            let apart = (of(&expected) - of(&store)).unwrap().abs().unwrap();
            let apart = apart.flatten_all().unwrap().max(0).unwrap();
            assert!(number(&apart) < 1e-12);
        }
    }

    #[test]
    fn reversible_gradients_are_those_of_remembered_streams() {
        let make = |seed: usize, shape: (usize, usize)| {
            let count = shape.0 * shape.1;
            let values = (0..count).map(|i| ((seed * 37 + i * 17) % 23) as f64 / 23.0 - 0.5);
            let values: Vec<f64> = values.collect();
            Var::from_tensor(&Tensor::from_vec(values, shape, &Device::Cpu).unwrap()).unwrap()
        };
        let (x1, x2) = (make(1, (3, 4)), make(2, (3, 4)));
        let weights: Vec<Var> = (3..13).map(|seed| make(seed, (4, 4))).collect();
        let part = |w: &Var| {
            let w = w.as_tensor().clone();
            move |x: &Tensor| activate(&linear(x, &w, None)?, Activation::Tanh)
        };
        let couplings: Vec<Coupling> = weights
            .chunks(2)
            .map(|pair| Coupling::new(part(&pair[0]), part(&pair[1])))
            .collect();
        // The streams count differently, so that neither gradient stands in for the other's.
        let loss = |[y1, y2]: [Tensor; 2]| {
            let cubes = (y2.sqr().unwrap() * &y2).unwrap();
            (y1.sqr().unwrap() + cubes).unwrap().sum_all().unwrap()
        };
        let mut streams = [x1.as_tensor().clone(), x2.as_tensor().clone()];
        for coupling in &couplings {
            streams = coupling.forward(streams).unwrap();
        }
        let mut undone = streams.clone();
        for coupling in couplings.iter().rev() {
            undone = coupling.inverse(undone).unwrap();
        }
        let recomputation = Recomputation::of(&weights);
        let found = recomputation
            .run_reversible([x1.as_tensor(), x2.as_tensor()], couplings)
            .unwrap();
        let difference = |a: &Tensor, b: &Tensor| {
            let parts = (a - b).unwrap().abs().unwrap().flatten_all().unwrap();
            parts.max(0).unwrap().to_scalar::<f64>().unwrap()
        };
        for ((undone, x), (found, y)) in undone
            .iter()
            .zip([&x1, &x2])
            .zip(found.iter().zip(&streams))
        {
            assert!(difference(undone, x.as_tensor()) < 1e-14);
            assert_eq!(difference(found, y), 0.0);
        }
        let plain = loss(streams).backward().unwrap();
        let mut again = loss(found).backward().unwrap();
        recomputation.add_to(&mut again).unwrap();
        for variable in weights.iter().chain([&x1, &x2]) {
            let of = |store: &GradStore| store.get(variable.as_tensor()).unwrap().clone();
            assert!(difference(&of(&plain), &of(&again)) < 1e-12);
        }
    }
}
