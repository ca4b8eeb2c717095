//! Changes of shape: linear, and the same for every stream.

use crate::error::tensor;
use crate::meter::bytes_of;
use crate::streams::{Change, Streams};
use crate::{Error, Lens, Result, Signal};
use lapidary_kernels::{D, Tensor};

impl Signal {
    /// Continues with `value`, made of `x`, whose streams are those of `x` passed through `map`.
    pub(crate) fn linear_map(
        &self,
        x: &Tensor,
        value: Tensor,
        change: Change<'_>,
        map: &dyn Fn(&Tensor, usize) -> Result<Tensor>,
        axis: impl Fn(usize) -> Option<usize>,
    ) -> Result<Self> {
        Ok(match &self.lens {
            Lens::Streams(streams) => {
                Self::carry_streams(value, streams.map(x, change, map, axis)?)
            }
            Lens::Contextual(parts) => {
                let parts = parts.with(map(parts.relevant(), 1)?);
                Self::from(value).with_contextual(parts)
            }
            _ => self.computed(value)?,
        })
    }

    /// A result of its own memory; `flops` of each element of this signal and `bytes` moved
    /// are counted.
    fn moved(
        &self,
        flops_per_element: u64,
        map: &dyn Fn(&Tensor, usize) -> Result<Tensor>,
        axis: impl Fn(usize) -> Option<usize>,
    ) -> Result<Self> {
        self.moved_as(map(&self.value, 0)?, flops_per_element, map, axis)
    }

    /// As [`Signal::moved`], for elements that are weighted or added up on the way.
    pub(crate) fn summed(
        &self,
        flops_per_element: u64,
        map: &dyn Fn(&Tensor, usize) -> Result<Tensor>,
        axis: impl Fn(usize) -> Option<usize>,
    ) -> Result<Self> {
        let value = self.mapped_value(|value| map(value, 0))?;
        self.moved_as(value, flops_per_element, map, axis)
    }

    fn moved_as(
        &self,
        value: Tensor,
        flops_per_element: u64,
        map: &dyn Fn(&Tensor, usize) -> Result<Tensor>,
        axis: impl Fn(usize) -> Option<usize>,
    ) -> Result<Self> {
        if let Lens::Meter(meter, _) = &self.lens {
            let flops = flops_per_element * self.value.elem_count() as u64;
            meter.count(flops, bytes_of(&self.value) + bytes_of(&value));
        }
        self.linear_map(&self.value, value, Change::Other, map, axis)
    }

    /// A view: no work, and the memory of this signal.
    fn viewed(
        &self,
        change: Change<'_>,
        map: &dyn Fn(&Tensor, usize) -> Result<Tensor>,
        axis: impl Fn(usize) -> Option<usize>,
    ) -> Result<Self> {
        let value = map(&self.value, 0)?;
        match &self.lens {
            Lens::Streams(_) | Lens::Contextual(_) => {
                self.linear_map(&self.value, value, change, map, axis)
            }
            _ => Ok(self.carry_view(value)),
        }
    }

    /// The same elements in another shape.
    pub fn reshape(&self, shape: &[usize]) -> Result<Self> {
        let from = self.dims().to_vec();
        let map = |t: &Tensor, shift: usize| {
            let mut full = t.dims()[..shift].to_vec();
            full.extend(shape);
            tensor(t.reshape(full))
        };
        // An axis survives where the same number of elements lies before it and it keeps its
        // length.
        let axis = |axis: usize| {
            let before: usize = from[..axis].iter().product();
            let mut product = 1;
            for (to, size) in shape.iter().enumerate() {
                if product == before && *size == from[axis] {
                    return Some(to);
                }
                product *= size;
            }
            None
        };
        // Elements that lie out of order are copied.
        if self.value.is_contiguous() || matches!(self.lens, Lens::Streams(_)) {
            return self.viewed(Change::Reshape(shape), &map, axis);
        }
        self.moved(0, &map, axis)
    }

    /// Swaps two dimensions.
    pub fn transpose(&self, first: usize, second: usize) -> Result<Self> {
        let map = |t: &Tensor, shift: usize| tensor(t.transpose(first + shift, second + shift));
        self.viewed(Change::Transpose(first, second), &map, |axis| {
            Some(match axis {
                axis if axis == first => second,
                axis if axis == second => first,
                axis => axis,
            })
        })
    }

    /// `[batch, length, heads · width] -> [batch, heads, length, width]`.
    pub fn split_heads(&self, heads: usize) -> Result<Self> {
        let (batch, length, width) = tensor(self.value.dims3())?;
        self.reshape(&[batch, length, heads, width / heads.max(1)])?
            .transpose(1, 2)
    }

    /// `[batch, heads, length, width] -> [batch, length, heads · width]`.
    pub fn merge_heads(&self) -> Result<Self> {
        let (batch, heads, length, width) = tensor(self.value.dims4())?;
        self.transpose(1, 2)?
            .reshape(&[batch, length, heads * width])
    }

    /// Lays the elements out in order.
    pub fn contiguous(&self) -> Result<Self> {
        let map = |t: &Tensor, _: usize| tensor(t.contiguous());
        if self.value.is_contiguous() || matches!(self.lens, Lens::Streams(_)) {
            return self.viewed(Change::Contiguous, &map, Some);
        }
        self.moved(0, &map, Some)
    }

    /// Entries `start..start + length` along `dim`.
    pub fn narrow(&self, dim: usize, start: usize, length: usize) -> Result<Self> {
        self.viewed(
            Change::Narrow { dim, start, length },
            &|t, shift| tensor(t.narrow(dim + shift, start, length)),
            |axis| (axis != dim).then_some(axis),
        )
    }

    /// The entries along `dim` that `indices` (`u32`, one-dimensional) name.
    pub fn select(&self, dim: usize, indices: &Tensor) -> Result<Self> {
        self.moved(
            0,
            &|t, shift| tensor(tensor(t.contiguous())?.index_select(indices, dim + shift)),
            |axis| (axis != dim).then_some(axis),
        )
    }

    /// Zeros of length `length` along `dim`, with this signal's entries added at `indices`.
    pub fn place(&self, dim: usize, indices: &Tensor, length: usize) -> Result<Self> {
        self.summed(
            0,
            &|t, shift| {
                let mut shape = t.dims().to_vec();
                match shape.get_mut(dim + shift) {
                    Some(size) => *size = length,
                    None => {
                        let expected = format!("below {}", shape.len() - shift);
                        return Err(Error::invalid("dimension to place along", dim, expected));
                    }
                }
                let zero = tensor(Tensor::zeros(shape, t.dtype(), t.device()))?;
                tensor(zero.index_add(indices, &tensor(t.contiguous())?, dim + shift))
            },
            |axis| (axis != dim).then_some(axis),
        )
    }

    /// A new dimension of length one.
    pub fn unsqueeze(&self, dim: usize) -> Result<Self> {
        let map = |t: &Tensor, shift: usize| tensor(t.unsqueeze(dim + shift));
        let shape = map(&self.value, 0)?.dims().to_vec();
        self.viewed(Change::Reshape(&shape), &map, |axis| {
            Some(if axis >= dim { axis + 1 } else { axis })
        })
    }

    /// Drops a dimension of length one.
    pub fn squeeze(&self, dim: usize) -> Result<Self> {
        let map = |t: &Tensor, shift: usize| tensor(t.squeeze(dim + shift));
        let shape = map(&self.value, 0)?.dims().to_vec();
        if shape.len() == self.dims().len() {
            return Err(Error::invalid(
                format!("length of dimension {dim}"),
                self.dims().get(dim),
                "1 to be dropped",
            ));
        }
        self.viewed(Change::Reshape(&shape), &map, |axis| match axis {
            axis if axis == dim => None,
            axis if axis > dim => Some(axis - 1),
            axis => Some(axis),
        })
    }

    /// Repeats along dimensions of length one, and new leading ones, until the shape is `shape`.
    pub fn broadcast(&self, shape: &[usize]) -> Result<Self> {
        let value = tensor(self.value.broadcast_as(shape))?;
        match &self.lens {
            Lens::Streams(streams) => {
                let streams = streams.broadcast(&self.value, shape)?;
                Ok(Self::carry_streams(value, streams))
            }
            Lens::Contextual(parts) => Self::contextual_broadcast(parts, value),
            _ => Ok(self.carry_view(value)),
        }
    }

    /// Mean over `dim`, which goes.
    pub fn mean(&self, dim: usize) -> Result<Self> {
        if let (Lens::Streams(streams), [batch, length, _], 1) = (&self.lens, self.dims(), dim) {
            let each = tensor(Tensor::ones((*batch, *length), self.dtype(), self.device()))?;
            let weights = tensor(each / *length as f64)?;
            let value = tensor(self.value.mean(dim))?;
            let streams = streams.pool(&self.value, &weights)?;
            return Ok(Self::carry_streams(value, streams));
        }
        self.summed(1, &|t, shift| tensor(t.mean(dim + shift)), |axis| {
            (axis != dim).then_some(if axis > dim { axis - 1 } else { axis })
        })
    }

    /// Sum over the last dimension, which goes.
    pub fn sum_last(&self) -> Result<Self> {
        let last = self.dims().len().saturating_sub(1);
        self.summed(1, &|t, _| tensor(t.sum(D::Minus1)), |axis| {
            (axis != last).then_some(axis)
        })
    }

    /// Sum of all entries of `weights ⊙ x` over `dim`, for constant `weights` broadcastable to
    /// the signal.
    pub fn weighted_sum(&self, weights: &Tensor, dim: usize) -> Result<Self> {
        if let (Lens::Streams(streams), [batch, length, _], 1, [b, l, 1]) =
            (&self.lens, self.dims(), dim, weights.dims())
            && (b, l) == (batch, length)
        {
            let value = tensor(tensor(self.value.broadcast_mul(weights))?.sum(dim))?;
            let streams = streams.pool(&self.value, &tensor(weights.squeeze(2))?)?;
            return Ok(Self::carry_streams(value, streams));
        }
        self.summed(
            2,
            &|t, shift| tensor(tensor(t.broadcast_mul(weights))?.sum(dim + shift)),
            |axis| (axis != dim).then_some(if axis > dim { axis - 1 } else { axis }),
        )
    }

    /// Joins signals along `dim`. Signals without streams beside streamed ones are constants.
    pub fn concatenate(signals: &[Self], dim: usize) -> Result<Self> {
        let values: Vec<&Tensor> = signals.iter().map(|signal| &signal.value).collect();
        let value = tensor(Tensor::cat(&values, dim))?;
        let mut lenses = signals.iter().map(|signal| &signal.lens);
        let Some(lens) = lenses.find(|lens| !matches!(lens, Lens::Plain)) else {
            return Ok(Self::from(value));
        };
        let fits = |other: &Lens| {
            matches!(other, Lens::Plain)
                || std::mem::discriminant(other) == std::mem::discriminant(lens)
        };
        if let Some(other) = lenses.find(|other| !fits(other)) {
            return Err(Error::LensMismatch {
                operation: "concatenate",
                left: lens.name(),
                right: other.name(),
            });
        }
        match lens {
            Lens::Plain => Ok(Self::from(value)),
            Lens::Relevance(rules) => Ok(Self {
                value,
                lens: Lens::Relevance(rules.clone()),
            }),
            Lens::Contextual(parts) => Self::contextual_concatenation(signals, parts, dim, value),
            Lens::Meter(meter, _) => {
                meter.count(0, 2 * bytes_of(&value));
                Ok(Self::from(value).into_metered(meter.clone()))
            }
            Lens::Rounded(rounding) => Self::from(value).into_rounded(*rounding),
            Lens::Integers(functions) => Ok(Self::from(value).into_integers(*functions)),
            Lens::Streams(space) => {
                let mut parts = Vec::with_capacity(signals.len());
                for signal in signals {
                    let streams = match &signal.lens {
                        Lens::Streams(streams) => streams.clone(),
                        _ => space.of_constant(&signal.value)?,
                    };
                    parts.push((&signal.value, streams));
                }
                let streams = Streams::concatenate(&parts, dim)?;
                Ok(Self::carry_streams(value, streams))
            }
        }
    }
}
