//! The value that flows, and which lens it flows through.

use std::sync::Arc;

use crate::contextual::Contextual;
use crate::error::tensor;
use crate::meter::{Live, Meter};
use crate::relevance::RelevanceRules;
use crate::rounding::Rounding;
use crate::streams::{Partition, StreamRules, StreamSpace, Streams};
use crate::{Error, Result};
use lapidary_kernels::{DType, Device, IntegerFunctions, Tensor, Var};

/// A value on its way through a model, with the lens it is looked at through.
///
/// Cloning is cheap: tensors are shared.
#[derive(Clone, Debug)]
pub struct Signal {
    pub(crate) value: Tensor,
    pub(crate) lens: Lens,
}

/// What travels with the value.
#[derive(Clone, Debug)]
pub enum Lens {
    /// Nothing: the value alone.
    Plain,
    /// The value as a sum of contributions.
    Streams(Streams),
    /// The value as a relevant part and the rest.
    Contextual(Contextual),
    /// Rules that the backward pass follows instead of the derivative.
    Relevance(Arc<RelevanceRules>),
    /// A count of the work done.
    Meter(Arc<Meter>, Arc<Live>),
    /// A format that every result is rounded to.
    Rounded(Rounding),
    /// Softmax, GELU and norms by integers.
    Integers(IntegerFunctions),
}

impl Lens {
    /// The lens's name in messages.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Streams(_) => "streams",
            Self::Contextual(_) => "contextual",
            Self::Relevance(_) => "relevance",
            Self::Meter(..) => "meter",
            Self::Rounded(_) => "rounded",
            Self::Integers(_) => "integers",
        }
    }
}

impl From<Tensor> for Signal {
    fn from(value: Tensor) -> Self {
        Self {
            value,
            lens: Lens::Plain,
        }
    }
}

impl Signal {
    /// The tensor itself.
    pub fn value(&self) -> &Tensor {
        &self.value
    }

    /// The tensor itself, dropping the lens.
    pub fn into_value(self) -> Tensor {
        self.value
    }

    /// The lens that is on.
    pub fn lens(&self) -> &Lens {
        &self.lens
    }

    /// Shape of the value.
    pub fn dims(&self) -> &[usize] {
        self.value.dims()
    }

    /// Element type of the value.
    pub fn dtype(&self) -> DType {
        self.value.dtype()
    }

    /// Where the value lives.
    pub fn device(&self) -> &Device {
        self.value.device()
    }

    /// The same value without its lens: a constant to every operation it meets.
    pub fn constant(&self) -> Self {
        Self::from(self.value.detach())
    }

    /// The streams, when that lens is on.
    pub fn streams(&self) -> Option<&Streams> {
        match &self.lens {
            Lens::Streams(streams) => Some(streams),
            _ => None,
        }
    }

    /// Splits the value into streams by position along an axis, each position's vector belonging
    /// wholly to one stream.
    pub fn into_streams(self, partition: Partition, rules: StreamRules) -> Result<Self> {
        let space = StreamSpace::new(partition, rules);
        let streams = Streams::by_position(space, &self.value)?;
        Ok(Self {
            value: self.value,
            lens: Lens::Streams(streams),
        })
    }

    /// Gives the whole value to one stream of `space`, as when a module's write to the residual
    /// stream is followed from there on.
    pub fn into_whole_stream(self, space: &Arc<StreamSpace>, stream: usize) -> Result<Self> {
        let streams = Streams::whole(space.clone(), stream)?;
        Ok(Self {
            value: self.value,
            lens: Lens::Streams(streams),
        })
    }

    /// The value with streams that are all zero: what is written here is followed no further,
    /// while whatever depends on the true value stays as it is. Without the streams lens, the
    /// signal itself.
    pub fn unfollowed(self) -> Result<Self> {
        match &self.lens {
            Lens::Streams(streams) => {
                let streams = streams.zeros(&self.value)?;
                Ok(Self::carry_streams(self.value, streams))
            }
            _ => Ok(self),
        }
    }

    /// Puts the relevance lens on. The value becomes a leaf, given back beside the signal; from
    /// what a backward pass brings there, [`RelevanceRules::relevance`] makes its relevance.
    ///
    /// # Errors
    /// When the rules have a number out of range, or a modified gradient cannot carry them.
    pub fn into_relevance(self, rules: RelevanceRules) -> Result<(Self, Var)> {
        rules.validate()?;
        let leaf = tensor(Var::from_tensor(&self.value.detach()))?;
        let value = leaf.as_tensor().clone();
        Ok((
            Self {
                value,
                lens: Lens::Relevance(Arc::new(rules)),
            },
            leaf,
        ))
    }

    /// Puts the meter on: everything that happens to the signal from here is counted.
    pub fn into_metered(self, meter: Arc<Meter>) -> Self {
        let live = meter.hold(&self.value);
        Self {
            value: self.value,
            lens: Lens::Meter(meter, live),
        }
    }

    /// The contributions `[streams, ..shape of the value]`; a bias that waits to be split is
    /// split among them.
    ///
    /// # Errors
    /// When the streams lens is not on.
    pub fn contributions(&self) -> Result<Tensor> {
        self.streams_or_error()?.contributions(&self.value)
    }

    /// The contributions' products with `vector` `[width]` along the last dimension:
    /// `[streams, ..shape of the value without its last dimension]`.
    ///
    /// The numbers are those of [`Signal::contributions`] contracted, at a fraction of the cost:
    /// what no other position or stream needs is never computed.
    ///
    /// # Errors
    /// When the streams lens is not on, or the vector does not fit.
    pub fn contributions_along(&self, vector: &Tensor) -> Result<Tensor> {
        let streams = self.streams_or_error()?;
        if self.dims().last().copied() != Some(vector.elem_count()) || vector.rank() != 1 {
            return Err(Error::invalid(
                "shape of the vector",
                vector.dims(),
                format!("the last of {:?}", self.dims()),
            ));
        }
        streams.contributions_along(&self.value, vector)
    }

    fn streams_or_error(&self) -> Result<&Streams> {
        self.streams()
            .ok_or_else(|| Error::invalid("lens", self.lens.name(), "streams"))
    }

    /// Largest `|Σ_k S_k − value|`, relative to the largest `|value|`: zero but for rounding
    /// wherever the rules are complete. `None` without the streams lens.
    pub fn conservation_error(&self) -> Result<Option<f64>> {
        match &self.lens {
            Lens::Streams(streams) => streams.conservation_error(&self.value).map(Some),
            _ => Ok(None),
        }
    }

    /// Continues with `value` under this signal's lens when that lens holds nothing but rules.
    pub(crate) fn carry(&self, value: Tensor) -> Self {
        let lens = match &self.lens {
            Lens::Plain => Lens::Plain,
            Lens::Relevance(rules) => Lens::Relevance(rules.clone()),
            Lens::Meter(meter, _) => Lens::Meter(meter.clone(), meter.hold(&value)),
            Lens::Streams(streams) => Lens::Streams(streams.clone()),
            Lens::Rounded(rounding) => Lens::Rounded(*rounding),
            Lens::Integers(functions) => Lens::Integers(*functions),
            Lens::Contextual(parts) => Lens::Contextual(parts.clone()),
        };
        Self { value, lens }
    }

    /// As [`Signal::carry`], for a `value` that shares this signal's memory.
    pub(crate) fn carry_view(&self, value: Tensor) -> Self {
        Self {
            value,
            lens: self.lens.clone(),
        }
    }

    /// Continues with `value` and `streams`.
    pub(crate) fn carry_streams(value: Tensor, streams: Streams) -> Self {
        Self {
            value,
            lens: Lens::Streams(streams),
        }
    }
}
