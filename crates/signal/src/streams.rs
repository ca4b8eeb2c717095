//! The streams lens: a value carried as the sum of `K` contributions.
//!
//! With `S` `[K, ..]` the streams and `x` the value, `Σ_k S[k] = x` holds at every site as long
//! as every rule in use is complete. Linear maps act on each stream alone. What is not linear is
//! frozen at the true value: attention weights, the standard deviation of a norm, the slope of
//! an activation (Kobayashi et al., arXiv 2004.10102; Modarressi et al., DecompX, arXiv
//! 2306.02873). What a rule cannot attribute by linearity, biases above all, is split over the
//! streams by a [`BiasSplit`].
//!
//! Streams that nothing has mixed yet are not stored: a vector at position `i` belongs to the
//! stream of `i` alone, or the whole value to one stream. They are multiplied out at the first
//! operation that mixes them.

use std::sync::Arc;

use crate::error::tensor;
use crate::{Error, Linear, Result};
use lapidary_kernels::{
    Activation, D, DType, Tensor, activate, activation_secant, activation_tangent, naive,
};

/// How a bias, or any other constant that is added, is shared among the streams.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BiasSplit {
    /// By `|S[k] · b|`.
    #[default]
    AbsoluteDot,
    /// By `|cos(S[k], b)|`; a stream of norm zero gets nothing.
    AbsoluteCosine,
    /// By `‖S[k]‖₂`.
    Norm,
    /// Equally over the streams that are not zero.
    Equal,
    /// All to the first stream.
    First,
    /// By the signed `S[k] · b`; unstable where the dot products cancel.
    Dot,
    /// Dropped: the streams no longer sum to the value.
    Drop,
    /// All to one additional, last stream.
    Extra,
}

impl BiasSplit {
    /// Every scheme.
    pub const ALL: [Self; 8] = [
        Self::AbsoluteDot,
        Self::AbsoluteCosine,
        Self::Norm,
        Self::Equal,
        Self::First,
        Self::Dot,
        Self::Drop,
        Self::Extra,
    ];

    /// The scheme's name on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::AbsoluteDot => "absdot",
            Self::AbsoluteCosine => "abssim",
            Self::Norm => "norm",
            Self::Equal => "equal",
            Self::First => "cls",
            Self::Dot => "dot",
            Self::Drop => "none",
            Self::Extra => "token",
        }
    }

    /// The scheme of that name.
    pub fn from_name(name: &str) -> Result<Self> {
        Self::ALL
            .into_iter()
            .find(|scheme| scheme.name() == name)
            .ok_or_else(|| {
                let names: Vec<_> = Self::ALL.iter().map(|scheme| scheme.name()).collect();
                Error::invalid("bias split", name, format!("one of {}", names.join(", ")))
            })
    }

    /// Whether a stream that is alone at its position keeps a bias added there to itself.
    const fn stays_with_its_stream(self) -> bool {
        !matches!(self, Self::First | Self::Drop | Self::Extra)
    }
}

/// Where the bias of an attention block (`Σ_h b_V W_O + b_O`) is split.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BiasSite {
    /// After the residual is added, by the sums; what DecompX's published code does. A value
    /// bias in the first layer stays with its own token.
    #[default]
    Residual,
    /// Among the attention's own outputs; what its paper writes.
    Attention,
}

/// The line that replaces an activation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Slope {
    /// Through the origin and `(x, f(x))`; needs no intercept when `f(0) = 0`. Activations that
    /// do not pass the origin use the tangent.
    #[default]
    Secant,
    /// The tangent at `x`; its intercept `f(x) - f'(x) x` is split like a bias.
    Tangent,
}

/// How the product of two streamed values is shared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ProductSplit {
    /// `½ (S_a b + a S_b)`: complete and symmetric.
    #[default]
    Half,
    /// The gate is a constant: `S_a b`.
    FreezeGate,
}

/// One rule for each kind of operation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StreamRules {
    /// Biases and other constants.
    pub bias: BiasSplit,
    /// Where attention's bias is split.
    pub bias_site: BiasSite,
    /// Activations.
    pub activation: Slope,
    /// Products of two signals.
    pub product: ProductSplit,
}

/// What the streams stand for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Partition {
    axis: usize,
    /// Stream of each position, or `None` where streams are not positions.
    position_stream: Option<Vec<usize>>,
    count: usize,
}

impl Partition {
    /// One stream for each of `count` positions along axis 1 of `[batch, position, width]`.
    pub fn positions(count: usize) -> Self {
        Self {
            axis: 1,
            position_stream: Some((0..count).collect()),
            count,
        }
    }

    /// Position `i` belongs to stream `stream_of[i]`; there are `max + 1` streams.
    pub fn groups(stream_of: Vec<usize>) -> Self {
        let count = stream_of.iter().max().map_or(0, |last| last + 1);
        Self {
            axis: 1,
            position_stream: Some(stream_of),
            count,
        }
    }

    /// `count` streams that whole values are assigned to, such as the modules of a model.
    pub fn components(count: usize) -> Self {
        Self {
            axis: 1,
            position_stream: None,
            count,
        }
    }
}

/// The streams of one forward pass: how many, what they stand for, and the rules they obey.
#[derive(Debug)]
pub struct StreamSpace {
    partition: Partition,
    rules: StreamRules,
}

impl StreamSpace {
    /// A space for signals to join.
    pub fn new(partition: Partition, rules: StreamRules) -> Arc<Self> {
        Arc::new(Self { partition, rules })
    }

    /// Number of streams, the extra bias stream included.
    pub fn count(&self) -> usize {
        self.partition.count + usize::from(self.rules.bias == BiasSplit::Extra)
    }

    /// The rules in force.
    pub fn rules(&self) -> &StreamRules {
        &self.rules
    }
}

#[derive(Clone, Debug)]
enum Form {
    /// The whole value belongs to one stream.
    Whole(usize),
    /// The vector at position `i` of this axis belongs to the stream of `i`.
    ByPosition(usize),
    /// `[streams, ..shape of the value]`.
    Dense(Tensor),
}

/// The streams beside one value.
#[derive(Clone, Debug)]
pub struct Streams {
    space: Arc<StreamSpace>,
    form: Form,
    /// A bias that is in the value but not yet in any stream; shape of the value.
    pending: Option<Tensor>,
}

impl Streams {
    pub(crate) fn by_position(space: Arc<StreamSpace>, value: &Tensor) -> Result<Self> {
        let axis = space.partition.axis;
        let Some(stream_of) = &space.partition.position_stream else {
            return Err(Error::invalid("partition", "components", "positions"));
        };
        let found = value.dims().get(axis).copied();
        if found != Some(stream_of.len()) {
            return Err(Error::invalid(
                format!("positions along axis {axis} of the value"),
                found,
                format!(
                    "{}, one for each position of the partition",
                    stream_of.len()
                ),
            ));
        }
        Ok(Self {
            space,
            form: Form::ByPosition(axis),
            pending: None,
        })
    }

    pub(crate) fn whole(space: Arc<StreamSpace>, stream: usize) -> Result<Self> {
        if stream >= space.count() {
            return Err(Error::invalid(
                "stream",
                stream,
                format!("below {}", space.count()),
            ));
        }
        Ok(Self {
            space,
            form: Form::Whole(stream),
            pending: None,
        })
    }

    /// The space that these streams belong to.
    pub fn space(&self) -> &Arc<StreamSpace> {
        &self.space
    }

    /// Number of streams.
    pub fn count(&self) -> usize {
        self.space.count()
    }

    fn rules(&self) -> &StreamRules {
        &self.space.rules
    }

    fn with_dense(&self, dense: Tensor) -> Self {
        Self {
            space: self.space.clone(),
            form: Form::Dense(dense),
            pending: None,
        }
    }

    fn same_form(&self) -> Self {
        Self {
            space: self.space.clone(),
            form: self.form.clone(),
            pending: None,
        }
    }

    /// Whether what is added at a position stays with the one stream that is there.
    fn is_unmixed(&self) -> bool {
        self.rules().bias.stays_with_its_stream()
            && self.pending.is_none()
            && !matches!(self.form, Form::Dense(_))
    }

    /// `[positions, streams]`-membership, transposed and shaped to broadcast over
    /// `[streams, ..value]` with the positions on `axis`.
    fn membership(&self, axis: usize, value: &Tensor) -> Result<Tensor> {
        let stream_of = self
            .space
            .partition
            .position_stream
            .as_deref()
            .unwrap_or_default();
        let positions = stream_of.len();
        let mut one_hot = vec![0f32; self.count() * positions];
        for (position, stream) in stream_of.iter().enumerate() {
            one_hot[stream * positions + position] = 1.0;
        }
        let mut shape = vec![1; value.rank() + 1];
        shape[0] = self.count();
        shape[axis + 1] = positions;
        tensor(tensor(Tensor::from_vec(one_hot, shape, value.device()))?.to_dtype(value.dtype()))
    }

    /// Multiplies the streams out: `[streams, ..shape of the value]`.
    pub(crate) fn dense(&self, value: &Tensor) -> Result<Tensor> {
        match &self.form {
            Form::Dense(dense) => Ok(dense.clone()),
            Form::ByPosition(axis) => {
                tensor(tensor(value.unsqueeze(0))?.broadcast_mul(&self.membership(*axis, value)?))
            }
            Form::Whole(stream) => {
                let value = tensor(value.unsqueeze(0))?;
                tensor(value.pad_with_zeros(0, *stream, self.count() - stream - 1))
            }
        }
    }

    /// Streams of zeros beside `value`.
    pub(crate) fn zeros(&self, value: &Tensor) -> Result<Self> {
        let mut shape = vec![self.count()];
        shape.extend(value.dims());
        Ok(self.with_dense(tensor(Tensor::zeros(shape, value.dtype(), value.device()))?))
    }

    /// Splits a pending bias over the streams now.
    pub(crate) fn resolve(&self, value: &Tensor) -> Result<Self> {
        match &self.pending {
            None => Ok(self.clone()),
            Some(pending) => Ok(self.with_dense(self.split(self.dense(value)?, pending)?)),
        }
    }

    pub(crate) fn conservation_error(&self, value: &Tensor) -> Result<f64> {
        let Form::Dense(dense) = &self.form else {
            return Ok(0.0);
        };
        let mut sum = tensor(dense.sum(0))?;
        if let Some(pending) = &self.pending {
            sum = tensor(sum.broadcast_add(pending))?;
        }
        let largest = |t: &Tensor| -> Result<f64> {
            let largest = tensor(tensor(tensor(t.abs())?.flatten_all())?.max(0))?;
            tensor(tensor(largest.to_dtype(DType::F64))?.to_scalar::<f64>())
        };
        let error = largest(&tensor(sum - value)?)?;
        let scale = largest(value)?;
        Ok(if error == 0.0 {
            0.0
        } else {
            error / scale.max(f64::MIN_POSITIVE)
        })
    }

    /// Adds the constant `b` (broadcastable to the value) to `streams`, shared by the rule.
    ///
    /// The weights are normalised without the reference's `+ 1e-12`, so that they sum to one
    /// however small they are; where all are zero the streams share equally.
    fn split(&self, streams: Tensor, b: &Tensor) -> Result<Tensor> {
        let k = self.count();
        let b = tensor(b.broadcast_as(&streams.dims()[1..]))?;
        let scheme = self.rules().bias;
        let to_one = |stream: usize| -> Result<Tensor> {
            tensor(
                &streams
                    + tensor(tensor(b.unsqueeze(0))?.pad_with_zeros(0, stream, k - stream - 1))?,
            )
        };
        let norm = || tensor(tensor(tensor(streams.sqr())?.sum_keepdim(D::Minus1))?.sqrt());
        let dot = || tensor(tensor(streams.broadcast_mul(&b))?.sum_keepdim(D::Minus1));
        // [streams, .., 1]
        let raw = match scheme {
            BiasSplit::Drop => return Ok(streams),
            BiasSplit::First => return to_one(0),
            BiasSplit::Extra => return to_one(k - 1),
            BiasSplit::AbsoluteDot => tensor(dot()?.abs())?,
            BiasSplit::Dot => dot()?,
            BiasSplit::Norm => norm()?,
            BiasSplit::Equal => tensor(tensor(norm()?.gt(0.0))?.to_dtype(streams.dtype()))?,
            BiasSplit::AbsoluteCosine => {
                let norm = norm()?;
                let zero = tensor(norm.eq(0.0))?;
                let safe = tensor(&norm + tensor(zero.to_dtype(norm.dtype()))?)?;
                tensor(tensor(dot()?.abs())? / safe)?
            }
        };
        let total = tensor(raw.sum_keepdim(0))?;
        let none = tensor(total.eq(0.0))?;
        let none_as_number = tensor(none.to_dtype(total.dtype()))?;
        let weights = tensor(raw.broadcast_div(&tensor(&total + &none_as_number)?))?;
        let weights = tensor(weights.broadcast_add(&tensor(none_as_number / k as f64)?))?;
        tensor(streams + tensor(weights.broadcast_mul(&tensor(b.unsqueeze(0))?))?)
    }

    /// A linear layer on every stream, its bias left pending or split here. `x` is the value
    /// before the layer.
    pub(crate) fn linear(&self, x: &Tensor, layer: &Linear, defer: bool) -> Result<Self> {
        let own_token = !defer || self.rules().bias_site == BiasSite::Residual;
        if self.is_unmixed() && (layer.bias().is_none() || own_token) {
            return Ok(self.same_form());
        }
        let current = if defer {
            self.clone()
        } else {
            self.resolve(x)?
        };
        let dense = layer.apply_without_bias(&current.dense(x)?)?;
        if !defer {
            let dense = match layer.bias() {
                Some(bias) => self.split(dense, bias)?,
                None => dense,
            };
            return Ok(self.with_dense(dense));
        }
        let mut pending = match &current.pending {
            Some(pending) => Some(layer.apply_without_bias(pending)?),
            None => None,
        };
        if let Some(bias) = layer.bias() {
            let shape = &dense.dims()[1..];
            pending = Some(match pending {
                Some(pending) => tensor(pending.broadcast_add(bias))?,
                None => tensor(bias.broadcast_as(shape))?,
            });
        }
        Ok(Self {
            pending,
            ..self.with_dense(dense)
        })
    }

    /// The output projection of attention: its bias waits for the residual, or is split here.
    pub(crate) fn linear_output(&self, x: &Tensor, layer: &Linear) -> Result<Self> {
        let out = self.linear(x, layer, true)?;
        match self.rules().bias_site {
            BiasSite::Residual => Ok(out),
            BiasSite::Attention => match &out.form {
                Form::Dense(dense) => out.resolve(&tensor(dense.sum(0))?),
                _ => Ok(out),
            },
        }
    }

    /// Sum of two streamed values; a pending bias of either is split against the sum.
    pub(crate) fn add(&self, a: &Tensor, other: &Self, b: &Tensor) -> Result<Self> {
        self.same_space(other)?;
        if self.pending.is_none() && other.pending.is_none() {
            match (&self.form, &other.form) {
                (Form::Whole(left), Form::Whole(right)) if left == right => return Ok(self.clone()),
                (Form::ByPosition(left), Form::ByPosition(right)) if left == right => {
                    return Ok(self.clone());
                }
                _ => {}
            }
        }
        let dense = tensor(self.dense(a)?.broadcast_add(&other.dense(b)?))?;
        let pending = match (&self.pending, &other.pending) {
            (Some(left), Some(right)) => Some(tensor(left.broadcast_add(right))?),
            (Some(one), None) | (None, Some(one)) => Some(one.clone()),
            (None, None) => None,
        };
        match pending {
            Some(pending) => Ok(self.with_dense(self.split(dense, &pending)?)),
            None => Ok(self.with_dense(dense)),
        }
    }

    /// Adds a value that has no streams, shared like a bias.
    pub(crate) fn add_constant(&self, x: &Tensor, constant: &Tensor) -> Result<Self> {
        if self.is_unmixed() {
            return Ok(self.clone());
        }
        let current = self.resolve(x)?;
        Ok(self.with_dense(self.split(current.dense(x)?, constant)?))
    }

    /// Multiplies by a value that has no streams.
    pub(crate) fn multiply_constant(&self, x: &Tensor, constant: &Tensor) -> Result<Self> {
        match &self.form {
            Form::Dense(_) => {
                let current = self.resolve(x)?;
                Ok(self.with_dense(tensor(current.dense(x)?.broadcast_mul(constant))?))
            }
            _ => Ok(self.same_form()),
        }
    }

    /// Multiplies by a number.
    pub(crate) fn scale(&self, factor: f64) -> Result<Self> {
        let form = match &self.form {
            Form::Dense(dense) => Form::Dense(tensor(dense * factor)?),
            unmixed => unmixed.clone(),
        };
        let pending = match &self.pending {
            Some(pending) => Some(tensor(pending * factor)?),
            None => None,
        };
        Ok(Self {
            space: self.space.clone(),
            form,
            pending,
        })
    }

    /// Product of content `a` with a gate `b`, both streamed.
    pub(crate) fn gate(&self, a: &Tensor, other: &Self, b: &Tensor) -> Result<Self> {
        self.same_space(other)?;
        if self.is_unmixed() && other.is_unmixed() {
            match (&self.form, &other.form) {
                (Form::Whole(left), Form::Whole(right)) if left == right => return Ok(self.clone()),
                (Form::ByPosition(left), Form::ByPosition(right)) if left == right => {
                    return Ok(self.clone());
                }
                _ => {}
            }
        }
        let content = tensor(self.resolve(a)?.dense(a)?.broadcast_mul(b))?;
        match self.rules().product {
            ProductSplit::FreezeGate => Ok(self.with_dense(content)),
            ProductSplit::Half => {
                let gate = tensor(other.resolve(b)?.dense(b)?.broadcast_mul(a))?;
                Ok(self.with_dense(tensor(tensor(content + gate)? * 0.5)?))
            }
        }
    }

    /// An activation replaced by a line through the true value.
    pub(crate) fn activate(&self, x: &Tensor, activation: Activation) -> Result<Self> {
        if self.is_unmixed() {
            return Ok(self.same_form());
        }
        let dense = self.resolve(x)?.dense(x)?;
        if self.rules().activation == Slope::Secant && activation.passes_origin() {
            let secant = activation_secant(x, activation)?;
            return Ok(self.with_dense(tensor(dense.broadcast_mul(&secant))?));
        }
        let tangent = activation_tangent(x, activation)?;
        let intercept = tensor(activate(x, activation)? - tensor(&tangent * x)?)?;
        let dense = tensor(dense.broadcast_mul(&tangent))?;
        Ok(self.with_dense(self.split(dense, &intercept)?))
    }

    /// Layer norm (`centre`) or RMS norm, with the value's own deviation:
    /// `γ (S[k] − mean S[k]) / √(var(x) + ε)`, then `β` is split.
    pub(crate) fn norm(
        &self,
        x: &Tensor,
        centre: bool,
        weight: Option<&Tensor>,
        bias: Option<&Tensor>,
        epsilon: f64,
    ) -> Result<Self> {
        if self.is_unmixed() {
            return Ok(self.same_form());
        }
        let mut dense = self.resolve(x)?.dense(x)?;
        let mut centred = x.clone();
        if centre {
            dense = tensor(dense.broadcast_sub(&tensor(dense.mean_keepdim(D::Minus1))?))?;
            centred = tensor(x.broadcast_sub(&tensor(x.mean_keepdim(D::Minus1))?))?;
        }
        let variance = tensor(tensor(centred.sqr())?.mean_keepdim(D::Minus1))?;
        let mut slope = tensor(tensor(tensor(variance + epsilon)?.sqrt())?.recip())?;
        if let Some(weight) = weight {
            slope = tensor(slope.broadcast_mul(weight))?;
        }
        dense = tensor(dense.broadcast_mul(&slope))?;
        Ok(self.with_dense(match bias {
            Some(bias) => self.split(dense, bias)?,
            None => dense,
        }))
    }

    /// Mixes positions by frozen attention weights `[batch, heads, query, key]`; the value is
    /// `[batch, groups, key, width]`.
    pub(crate) fn mix(&self, v: &Tensor, weights: &Tensor) -> Result<Self> {
        let heads = tensor(weights.dim(1))?;
        let k = self.count();
        let spread =
            |t: &Tensor| -> Result<Tensor> { tensor(naive::repeat_groups(t, heads)?.contiguous()) };
        let pending = match &self.pending {
            Some(pending) => Some(tensor(
                weights.matmul(&spread(&tensor(pending.contiguous())?)?),
            )?),
            None => None,
        };
        let dense = match &self.form {
            Form::Whole(_) => {
                return Ok(Self {
                    pending,
                    ..self.same_form()
                });
            }
            Form::ByPosition(_) | Form::Dense(_) => self.dense(v)?,
        };
        let (_, groups, keys, width) = tensor(v.dims4())?;
        let (batch, _, queries, _) = tensor(weights.dims4())?;
        // [streams · batch, groups, key, width] -> [batch, heads, key, streams · width], so that
        // each head is one matrix product for all streams.
        let folded = tensor(dense.reshape((k * batch, groups, keys, width)))?;
        let folded =
            tensor(naive::repeat_groups(&folded, heads)?.reshape((k, batch, heads, keys, width)))?;
        let folded = tensor(tensor(folded.permute((1, 2, 3, 0, 4)))?.reshape((
            batch,
            heads,
            keys,
            k * width,
        )))?;
        let mixed = tensor(weights.matmul(&folded))?;
        let mixed = tensor(mixed.reshape((batch, heads, queries, k, width)))?;
        let dense = tensor(tensor(mixed.permute((3, 0, 1, 2, 4)))?.contiguous())?;
        Ok(Self {
            pending,
            ..self.with_dense(dense)
        })
    }

    /// A map that is linear and acts on each stream alone, such as a change of shape.
    ///
    /// `map(tensor, shift)` gets a tensor whose dimensions are those of the value moved by
    /// `shift`. `axis` says where the map takes the position axis, if it keeps it whole.
    pub(crate) fn map(
        &self,
        x: &Tensor,
        map: &dyn Fn(&Tensor, usize) -> Result<Tensor>,
        axis: impl Fn(usize) -> Option<usize>,
    ) -> Result<Self> {
        let pending = match &self.pending {
            Some(pending) => Some(map(pending, 0)?),
            None => None,
        };
        let form = match &self.form {
            Form::Whole(stream) => Form::Whole(*stream),
            Form::ByPosition(from) => match axis(*from) {
                Some(to) => Form::ByPosition(to),
                None => Form::Dense(map(&self.dense(x)?, 1)?),
            },
            Form::Dense(dense) => Form::Dense(map(dense, 1)?),
        };
        Ok(Self {
            space: self.space.clone(),
            form,
            pending,
        })
    }

    /// Joins streamed values along `dim` of the value.
    pub(crate) fn concatenate(parts: &[(&Tensor, Self)], dim: usize) -> Result<Self> {
        let [(_, first), ..] = parts else {
            return Err(Error::invalid("signals to join", 0, "at least one"));
        };
        let mut dense = Vec::with_capacity(parts.len());
        for (value, streams) in parts {
            first.same_space(streams)?;
            dense.push(streams.resolve(value)?.dense(value)?);
        }
        Ok(first.with_dense(tensor(Tensor::cat(&dense, dim + 1))?))
    }

    /// Streams of a value that belongs to none: zero everywhere, the value pending.
    pub(crate) fn of_constant(&self, value: &Tensor) -> Result<Self> {
        let mut shape = vec![self.count()];
        shape.extend(value.dims());
        let zero = tensor(Tensor::zeros(shape, value.dtype(), value.device()))?;
        Ok(Self {
            pending: Some(value.clone()),
            ..self.with_dense(zero)
        })
    }

    fn same_space(&self, other: &Self) -> Result<()> {
        if Arc::ptr_eq(&self.space, &other.space) {
            return Ok(());
        }
        Err(Error::invalid(
            "streams of the two signals",
            "from two different starts",
            "started once",
        ))
    }
}
