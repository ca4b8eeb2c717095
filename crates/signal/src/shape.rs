//! Changes of shape: linear, and the same for every stream.

use crate::error::tensor;
use crate::{Lens, Result, Signal};
use lapidary_kernels::{D, Tensor};

impl Signal {
    /// Continues with `value`, whose streams are those of this signal passed through `map`.
    pub(crate) fn linear_map(
        &self,
        value: Tensor,
        map: &dyn Fn(&Tensor, usize) -> Result<Tensor>,
        axis: impl Fn(usize) -> Option<usize>,
    ) -> Result<Self> {
        Ok(match &self.lens {
            Lens::Streams(streams) => {
                Self::carry_streams(value, streams.map(&self.value, map, axis)?)
            }
            _ => self.carry(value),
        })
    }

    fn shaped(
        &self,
        map: &dyn Fn(&Tensor, usize) -> Result<Tensor>,
        axis: impl Fn(usize) -> Option<usize>,
    ) -> Result<Self> {
        self.linear_map(map(&self.value, 0)?, map, axis)
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
        self.shaped(&map, |axis| {
            let before: usize = from[..axis].iter().product();
            let mut product = 1;
            for (to, size) in shape.iter().enumerate() {
                if product == before && *size == from[axis] {
                    return Some(to);
                }
                product *= size;
            }
            None
        })
    }

    /// Swaps two dimensions.
    pub fn transpose(&self, first: usize, second: usize) -> Result<Self> {
        let map = |t: &Tensor, shift: usize| tensor(t.transpose(first + shift, second + shift));
        self.shaped(&map, |axis| {
            Some(match axis {
                axis if axis == first => second,
                axis if axis == second => first,
                axis => axis,
            })
        })
    }

    /// Lays the elements out in order.
    pub fn contiguous(&self) -> Result<Self> {
        self.shaped(&|t, _| tensor(t.contiguous()), Some)
    }

    /// Entries `start..start + length` along `dim`.
    pub fn narrow(&self, dim: usize, start: usize, length: usize) -> Result<Self> {
        self.shaped(
            &|t, shift| tensor(t.narrow(dim + shift, start, length)),
            |axis| (axis != dim).then_some(axis),
        )
    }

    /// The entries along `dim` that `indices` (`u32`, one-dimensional) name.
    pub fn select(&self, dim: usize, indices: &Tensor) -> Result<Self> {
        self.shaped(
            &|t, shift| tensor(tensor(t.contiguous())?.index_select(indices, dim + shift)),
            |axis| (axis != dim).then_some(axis),
        )
    }

    /// Zeros of length `length` along `dim`, with this signal's entries added at `indices`.
    pub fn place(&self, dim: usize, indices: &Tensor, length: usize) -> Result<Self> {
        self.shaped(
            &|t, shift| {
                let mut shape = t.dims().to_vec();
                shape[dim + shift] = length;
                let zero = tensor(Tensor::zeros(shape, t.dtype(), t.device()))?;
                tensor(zero.index_add(indices, &tensor(t.contiguous())?, dim + shift))
            },
            |axis| (axis != dim).then_some(axis),
        )
    }

    /// A new dimension of length one.
    pub fn unsqueeze(&self, dim: usize) -> Result<Self> {
        self.shaped(&|t, shift| tensor(t.unsqueeze(dim + shift)), |axis| {
            Some(if axis >= dim { axis + 1 } else { axis })
        })
    }

    /// Drops a dimension of length one.
    pub fn squeeze(&self, dim: usize) -> Result<Self> {
        self.shaped(
            &|t, shift| tensor(t.squeeze(dim + shift)),
            |axis| match axis {
                axis if axis == dim => None,
                axis if axis > dim => Some(axis - 1),
                axis => Some(axis),
            },
        )
    }

    /// Repeats along dimensions of length one until the shape is `shape`.
    pub fn broadcast(&self, shape: &[usize]) -> Result<Self> {
        self.shaped(
            &|t, shift| {
                let mut full = t.dims()[..shift].to_vec();
                full.extend(shape);
                tensor(t.broadcast_as(full))
            },
            Some,
        )
    }

    /// Mean over `dim`, which goes.
    pub fn mean(&self, dim: usize) -> Result<Self> {
        self.shaped(&|t, shift| tensor(t.mean(dim + shift)), |axis| {
            (axis != dim).then_some(if axis > dim { axis - 1 } else { axis })
        })
    }

    /// Sum over the last dimension, which goes.
    pub fn sum_last(&self) -> Result<Self> {
        let last = self.dims().len().saturating_sub(1);
        self.shaped(&|t, _| tensor(t.sum(D::Minus1)), |axis| {
            (axis != last).then_some(axis)
        })
    }

    /// Sum of all entries of `weights ⊙ x` over `dim`, for constant `weights` broadcastable to
    /// the signal.
    pub fn weighted_sum(&self, weights: &Tensor, dim: usize) -> Result<Self> {
        self.shaped(
            &|t, shift| tensor(tensor(t.broadcast_mul(weights))?.sum(dim + shift)),
            |axis| (axis != dim).then_some(if axis > dim { axis - 1 } else { axis }),
        )
    }

    /// Joins signals along `dim`. Signals without streams beside streamed ones are constants.
    pub fn concatenate(signals: &[Self], dim: usize) -> Result<Self> {
        let values: Vec<&Tensor> = signals.iter().map(|signal| &signal.value).collect();
        let value = tensor(Tensor::cat(&values, dim))?;
        let Some(like) = signals
            .iter()
            .find(|signal| !matches!(signal.lens, Lens::Plain))
        else {
            return Ok(Self::from(value));
        };
        let Lens::Streams(space) = &like.lens else {
            return Ok(like.carry(value));
        };
        let mut parts = Vec::with_capacity(signals.len());
        for signal in signals {
            let streams = match &signal.lens {
                Lens::Streams(streams) => streams.clone(),
                _ => space.of_constant(&signal.value)?,
            };
            parts.push((&signal.value, streams));
        }
        let streams = crate::streams::Streams::concatenate(&parts, dim)?;
        Ok(Self::carry_streams(value, streams))
    }
}
