//! Biases of attention scores by a small network of one number for each query and key, without a hidden unit being
//! laid out.
//!
//! ```text
//! b(i, j) = f( u(i − j) · w(i) )     for j ≤ i
//! ```
//!
//! where `f` has one or two hidden layers of units `max(x, 0)` and an output for each head (FIRE; Li et al., "Functional
//! Interpolation for Relative Positions Improves Long Context Transformers", 2023, arXiv 2310.04418). Such a function of
//! one number consists of straight pieces, some for each unit. They are found once, in double precision; then a pair
//! costs the finding of its piece, which along a row are runs of keys, and one multiplication for each head, whatever
//! the width of the network. The gradients of the weights are functions of two sums over the pairs of a piece.
//!
//! Where a pair lies on a corner between two pieces, both slopes are subgradients: here that to the right counts.

mod pairs;
mod pieces;
#[cfg(test)]
mod tests;

use crate::host::{self, Host, by_dtype, fused};
use crate::simd::Real;
use crate::{Error, Result, Tensor, naive};
use candle_core::{CpuStorage, CustomOp3, Layout, Shape, WithDType};
use pairs::Pairs;
use pieces::{Pieces, Widths};
use std::borrow::Cow;

type Candle<T> = candle_core::Result<T>;

const NAME: &str = "functional bias";

/// The queries and keys of a [`functional_bias`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BiasSpan {
    /// Number of queries.
    pub queries: usize,
    /// Number of keys, from position 0.
    pub keys: usize,
    /// Position of the first query.
    pub offset: usize,
    /// Whether keys later than their query are masked. Their bias then is 0, and has no gradient.
    pub causal: bool,
}

impl BiasSpan {
    /// Positions up to the last query and key.
    pub(crate) fn positions(&self) -> usize {
        self.keys.max(self.offset + self.queries)
    }

    /// The heads of a network with so many outputs.
    pub(crate) fn heads(&self, outputs: usize) -> usize {
        match self.causal {
            true => outputs,
            false => outputs / 2,
        }
    }
}

/// The bias `[heads, query, key]`, `f(u(i − j) · w(i))` for the query at position `i` and the key at `j`, of `u` =
/// `distances` and `w` = `scales`, both `[positions]`, and `f` = `network`: the weights `[output, input]` and biases
/// `[output]` of its layers, with `max(x, 0)` between them.
///
/// The network has an output for each head. Where attention isn't causal, it has as many again, for keys that come
/// later: `f(u(|i − j|) · w(max(i, j)))`.
///
/// Time grows with `heads · queries · keys`, and for the network itself with its weights times the heads; memory with
/// the result. A weight that is not finite leaves no output that is a number.
///
/// # Errors
/// When the shapes do not fit each other, or the network has other than one or two hidden layers.
///
/// ```
/// use lapidary_kernels::{BiasSpan, DType, Device, Tensor, functional_bias};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let device = Device::Cpu;
/// let distances = Tensor::new(&[0f32, 1.0, 2.0], &device)?;
/// let scales = Tensor::ones(3, DType::F32, &device)?;
/// // −max(t − 1, 0)
/// let network = [
///     (Tensor::new(&[[1f32]], &device)?, Tensor::new(&[-1f32], &device)?),
///     (Tensor::new(&[[-1f32]], &device)?, Tensor::new(&[0f32], &device)?),
/// ];
/// let span = BiasSpan { queries: 1, keys: 3, offset: 2, causal: true };
/// let bias = functional_bias(&distances, &scales, &network, span)?;
/// assert_eq!(bias.flatten_all()?.to_vec1::<f32>()?, [-1.0, 0.0, 0.0]);
/// # Ok(())
/// # }
/// ```
pub fn functional_bias(
    distances: &Tensor,
    scales: &Tensor,
    network: &[(Tensor, Tensor)],
    span: BiasSpan,
) -> Result<Tensor> {
    let widths = widths(network, span)?;
    let least = span.positions();
    for (name, found) in [("distances", distances), ("scales", scales)] {
        if found.rank() != 1 || found.elem_count() < least || found.dims() != distances.dims() {
            let expected = format!("[positions], at least {least}, of distances as of scales");
            return Err(Error::argument(NAME, name, found.dims(), expected));
        }
    }
    let numbers = || network.iter().flat_map(|(weight, bias)| [weight, bias]);
    let all: Vec<&Tensor> = [distances, scales].into_iter().chain(numbers()).collect();
    if !fused(&all) {
        return naive::functional_bias(distances, scales, network, span);
    }
    let flat = numbers().map(Tensor::flatten_all);
    let numbers = Tensor::cat(&flat.collect::<Candle<Vec<_>>>()?, 0)?;
    let operation = FunctionalBias { widths, span };
    Ok(distances.apply_op3(scales, &numbers, operation)?)
}

fn widths(network: &[(Tensor, Tensor)], span: BiasSpan) -> Result<Widths> {
    let mut widths = Vec::with_capacity(network.len());
    for (weight, bias) in network {
        let input = widths.last().copied().unwrap_or(1);
        match (weight.dims(), bias.dims()) {
            ([output, inputs], [biases]) if *output > 0 && *inputs == input && biases == output => {
                widths.push(*output);
            }
            found => {
                let expected = format!("[output, {input}] and [output], with an output");
                return Err(Error::argument(NAME, "a layer", found, expected));
            }
        }
    }
    let (first, second, outputs) = match *widths {
        [first, outputs] => (first, None, outputs),
        [first, second, outputs] => (first, Some(second), outputs),
        _ => {
            let expected = "those of one or two hidden layers and of the outputs";
            return Err(Error::argument(NAME, "layers", widths.len(), expected));
        }
    };
    if !span.causal && outputs % 2 != 0 {
        let expected = "two for each head, since attention isn't causal";
        return Err(Error::argument(NAME, "outputs", outputs, expected));
    }
    Ok(Widths {
        first,
        second,
        outputs,
    })
}

struct FunctionalBias {
    widths: Widths,
    span: BiasSpan,
}

impl FunctionalBias {
    fn pieces<T: Real>(&self, numbers: &[T]) -> Pieces {
        let mut numbers = doubles(numbers);
        // What is no number anywhere is none everywhere, rather than a unit that is off.
        if numbers.iter().any(|number| !number.is_finite()) {
            numbers.fill(f64::NAN);
        }
        Pieces::new(self.widths, &numbers)
    }
}

fn doubles<T: Real>(numbers: &[T]) -> Vec<f64> {
    numbers.iter().map(|number| number.to_f64()).collect()
}

impl CustomOp3 for FunctionalBias {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        distances: &CpuStorage,
        distances_layout: &Layout,
        scales: &CpuStorage,
        scales_layout: &Layout,
        numbers: &CpuStorage,
        numbers_layout: &Layout,
    ) -> Candle<(CpuStorage, Shape)> {
        by_dtype!(host::dtype(distances), T => {
            let pieces = self.pieces(&host::ordered::<T>(numbers, numbers_layout)?);
            let distances: Cow<[T]> = host::ordered(distances, distances_layout)?;
            let scales: Cow<[T]> = host::ordered(scales, scales_layout)?;
            let pairs = Pairs::new(&pieces, doubles(&distances), doubles(&scales), self.span);
            let shape = Shape::from((pairs.heads(), self.span.queries, self.span.keys));
            Ok((T::to_cpu_storage_owned(pairs.forward::<T>()), shape))
        })
    }

    fn bwd(
        &self,
        distances: &Tensor,
        scales: &Tensor,
        numbers: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Candle<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let hosts = [distances, scales, numbers, gradient].map(Host::new);
        by_dtype!(distances.dtype(), T => {
            let [by_distance, by_scale, by_number, gradient] =
                [&hosts[0], &hosts[1], &hosts[2], &hosts[3]].map(Host::ordered::<T>);
            let pieces = self.pieces(&by_number?);
            let (by_distance, by_scale) = (doubles(&by_distance?), doubles(&by_scale?));
            let slopes = Pairs::new(&pieces, by_distance, by_scale, self.span).backward(&gradient?);
            let of_numbers = pieces.backward(&slopes.lines);
            let single = |slopes: Vec<f64>| slopes.into_iter().map(T::of).collect::<Vec<T>>();
            Ok((
                host::wanted(distances, single(slopes.distances))?,
                host::wanted(scales, single(slopes.scales))?,
                host::wanted(numbers, single(of_numbers))?,
            ))
        })
    }
}
