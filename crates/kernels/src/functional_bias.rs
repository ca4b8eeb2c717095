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
pub(crate) mod tests;

pub(crate) use pairs::{LANES, Pairs, Part, Row};

use crate::backward::Apply;
use crate::host::{self, Host, by_dtype, fused};
use crate::simd::Real;
use crate::{Error, Result, Tensor, naive};
use candle_core::{CpuStorage, CustomOp1, Layout, Shape, WithDType};
use pieces::{Pieces, Widths};

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
    FunctionalBias::new(distances, scales, network, span)?.laid_out()
}

/// The bias that [`functional_bias`] lays out, as the numbers that it is made of. Attention adds it to the scores of
/// a tile at a time and sums its gradient so
/// ([`ScoreBias::Functional`](crate::ScoreBias::Functional)), in memory that grows with positions and pieces.
#[derive(Clone, Debug)]
pub struct FunctionalBias {
    /// Distances, scales, and each layer's weights and biases, one behind the other: an operation takes them as one.
    numbers: Tensor,
    form: FunctionalForm,
}

/// What the numbers of a [`FunctionalBias`] are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FunctionalForm {
    /// Distances, and scales.
    positions: usize,
    widths: Widths,
    span: BiasSpan,
}

impl FunctionalBias {
    /// Of the arguments of [`functional_bias`].
    ///
    /// # Errors
    /// When the shapes do not fit each other, or the network has other than one or two hidden layers.
    pub fn new(
        distances: &Tensor,
        scales: &Tensor,
        network: &[(Tensor, Tensor)],
        span: BiasSpan,
    ) -> Result<Self> {
        let widths = widths(network, span)?;
        let least = span.positions();
        for (name, found) in [("distances", distances), ("scales", scales)] {
            if found.rank() != 1 || found.elem_count() < least || found.dims() != distances.dims() {
                let expected = format!("[positions], at least {least}, of distances as of scales");
                return Err(Error::argument(NAME, name, found.dims(), expected));
            }
        }
        let layers = network.iter().flat_map(|(weight, bias)| [weight, bias]);
        let all = [distances, scales].into_iter().chain(layers);
        let flat = all.map(Tensor::flatten_all).collect::<Candle<Vec<_>>>()?;
        Ok(Self {
            numbers: Tensor::cat(&flat, 0)?,
            form: FunctionalForm {
                positions: distances.elem_count(),
                widths,
                span,
            },
        })
    }

    /// Its queries and keys.
    pub fn span(&self) -> BiasSpan {
        self.form.span
    }

    /// The heads that it has a bias for.
    pub fn heads(&self) -> usize {
        self.form.heads()
    }

    pub(crate) fn numbers(&self) -> &Tensor {
        &self.numbers
    }

    pub(crate) fn form(&self) -> FunctionalForm {
        self.form
    }

    /// `[heads, query, key]`.
    ///
    /// # Errors
    /// Those of the tensor engine.
    pub fn laid_out(&self) -> Result<Tensor> {
        if fused(&[&self.numbers]) {
            return Ok(self.numbers.apply1(LaidOut(self.form))?);
        }
        let FunctionalForm {
            positions,
            widths,
            span,
        } = self.form;
        let mut start = 0;
        let mut next = |count: usize| {
            start += count;
            self.numbers.narrow(0, start - count, count)
        };
        let (distances, scales) = (next(positions)?, next(positions)?);
        let mut input = 1;
        let outputs = [Some(widths.first), widths.second, Some(widths.outputs)];
        let mut network = Vec::with_capacity(outputs.len());
        for output in outputs.into_iter().flatten() {
            let weight = next(output * input)?.reshape((output, input))?;
            network.push((weight, next(output)?));
            input = output;
        }
        naive::functional_bias(&distances, &scales, &network, span)
    }
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

impl FunctionalForm {
    pub(crate) fn heads(&self) -> usize {
        self.span.heads(self.widths.outputs)
    }

    /// All pairs, of the numbers of a bias.
    pub(crate) fn pairs<T: Real>(&self, numbers: &[T]) -> Pairs {
        let mut distances: Vec<f64> = numbers.iter().map(|number| number.to_f64()).collect();
        let mut scales = distances.split_off(self.positions);
        let mut network = scales.split_off(self.positions);
        // What is no number anywhere is none everywhere, rather than a unit that is off.
        if network.iter().any(|number| !number.is_finite()) {
            network.fill(f64::NAN);
        }
        let pieces = Pieces::new(self.widths, &network);
        Pairs::new(pieces, distances, scales, self.span)
    }
}

struct LaidOut(FunctionalForm);

impl CustomOp1 for LaidOut {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, numbers: &CpuStorage, layout: &Layout) -> Candle<(CpuStorage, Shape)> {
        let LaidOut(form) = self;
        by_dtype!(host::dtype(numbers), T => {
            let pairs = form.pairs::<T>(&host::ordered::<T>(numbers, layout)?);
            let shape = Shape::from((form.heads(), form.span.queries, form.span.keys));
            Ok((T::to_cpu_storage_owned(pairs.forward::<T>()), shape))
        })
    }

    fn bwd(&self, numbers: &Tensor, _: &Tensor, gradient: &Tensor) -> Candle<Option<Tensor>> {
        let LaidOut(form) = self;
        let hosts = [numbers, gradient].map(Host::new);
        by_dtype!(numbers.dtype(), T => {
            let pairs = form.pairs::<T>(&hosts[0].ordered::<T>()?);
            let slopes = pairs.backward::<T>(&hosts[1].ordered::<T>()?);
            let slopes = slopes.into_iter().map(T::of).collect::<Vec<T>>();
            Ok(Some(host::tensor(slopes, numbers.dims())?))
        })
    }
}
