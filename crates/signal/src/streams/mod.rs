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
//! stream of `i` alone, or the whole value to one stream. Mixed streams are an expression that
//! is multiplied out where its numbers are asked for, and only as far as they are.

mod expression;
#[cfg(test)]
mod for_tests;
mod rules;
mod share;

use std::sync::Arc;

use crate::error::tensor;
use crate::{Error, Linear, Result};
use expression::{Expression, field};
use lapidary_kernels::{
    Activation, D, DType, Tensor, activate, activation_secant, activation_tangent, naive,
};
use share::Share;

pub use rules::{BiasSite, BiasSplit, Partition, ProductSplit, Slope, StreamRules, StreamSpace};

#[derive(Clone, Debug)]
enum Form {
    /// The whole value belongs to one stream.
    Whole(usize),
    /// The vector at position `i` of this axis belongs to the stream of `i`.
    ByPosition(usize),
    /// Mixed.
    Mixed(Expression),
    /// Mixed, and split into heads: an expression of `[batch, position, groups · head]` for a
    /// value `[batch, position, groups, head]`, or with `across` `[batch, groups, position, head]`.
    Heads {
        merged: Expression,
        groups: usize,
        across: bool,
    },
}

/// The streams beside one value.
#[derive(Clone, Debug)]
pub struct Streams {
    space: Arc<StreamSpace>,
    form: Form,
    /// A bias that is in the value but not yet in any stream; shape of the value. Only mixed
    /// streams have one.
    pending: Option<Tensor>,
}

/// A change of shape, as far as streams can follow it without being multiplied out.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Change<'a> {
    Reshape(&'a [usize]),
    Transpose(usize, usize),
    Narrow {
        dim: usize,
        start: usize,
        length: usize,
    },
    /// The same shape.
    Contiguous,
    /// Anything else.
    Other,
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
        self.space.rules()
    }

    fn with_form(&self, form: Form) -> Self {
        Self {
            space: self.space.clone(),
            form,
            pending: None,
        }
    }

    fn mixed(&self, expression: Expression) -> Self {
        self.with_form(Form::Mixed(expression))
    }

    fn is_mixed(&self) -> bool {
        matches!(self.form, Form::Mixed(_) | Form::Heads { .. })
    }

    /// Whether streams at their own places keep everything that is added there.
    fn keeps_constants(&self) -> bool {
        !self.is_mixed() && self.rules().bias.stays_with_its_stream()
    }

    /// The streams as an expression; a pending bias stays out of it.
    fn expression(&self, value: &Tensor) -> Result<Expression> {
        match &self.form {
            Form::Whole(stream) => Ok(Expression::whole(value, *stream, self.count())),
            Form::ByPosition(axis) => {
                let stream_of = self.space.partition.position_stream.clone();
                let stream_of = stream_of.unwrap_or_else(|| Arc::from([]));
                Expression::own(value, *axis, stream_of, self.count())
            }
            Form::Mixed(expression) => Ok(expression.clone()),
            Form::Heads { .. } => Expression::stored(&self.dense(value)?),
        }
    }

    /// Multiplies the streams out, without a pending bias: `[streams, ..shape of the value]`.
    fn dense(&self, value: &Tensor) -> Result<Tensor> {
        match &self.form {
            Form::Heads {
                merged,
                groups,
                across,
            } => {
                let (k, batch, length, width) = tensor(merged.dense()?.dims4())?;
                let shape = (k, batch, length, *groups, width / (*groups).max(1));
                let split = tensor(merged.dense()?.reshape(shape))?;
                if *across {
                    tensor(split.transpose(2, 3))
                } else {
                    Ok(split)
                }
            }
            _ => self.expression(value)?.dense(),
        }
    }

    /// All contributions, a pending bias split among them: `[streams, ..shape of the value]`.
    pub(crate) fn contributions(&self, value: &Tensor) -> Result<Tensor> {
        self.resolve(value)?.dense(value)
    }

    /// The contributions' products with a vector along the last dimension, which goes.
    pub(crate) fn contributions_along(&self, value: &Tensor, vector: &Tensor) -> Result<Tensor> {
        let expression = self.resolve(value)?.expression(value)?;
        let products = expression.dot(&field(vector, expression.shape())?)?;
        let mut shape = vec![self.count()];
        shape.extend(value.dims().split_last().map_or(&[][..], |(_, rows)| rows));
        tensor(products.reshape(shape))
    }

    /// Splits a pending bias over the streams.
    fn resolve(&self, value: &Tensor) -> Result<Self> {
        match &self.pending {
            None => Ok(self.clone()),
            Some(pending) => {
                let expression = self.expression(value)?;
                Ok(self.mixed(self.split(&expression, pending)?))
            }
        }
    }

    pub(crate) fn conservation_error(&self, value: &Tensor) -> Result<f64> {
        let sum = match &self.form {
            Form::Whole(_) | Form::ByPosition(_) => return Ok(0.0),
            Form::Mixed(expression) => expression.total()?,
            Form::Heads {
                merged,
                groups,
                across,
            } => {
                let total = merged.total()?;
                let (batch, length, width) = tensor(total.dims3())?;
                let split =
                    tensor(total.reshape((batch, length, *groups, width / (*groups).max(1))))?;
                if *across {
                    tensor(split.transpose(1, 2))?
                } else {
                    split
                }
            }
        };
        let sum = match &self.pending {
            Some(pending) => tensor(sum.broadcast_add(pending))?,
            None => sum,
        };
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

    /// Adds a constant (broadcastable to the value) to `streams`, shared by the rule.
    fn split(&self, streams: &Expression, constant: &Tensor) -> Result<Expression> {
        match self.rules().bias {
            BiasSplit::Drop => Ok(streams.clone()),
            scheme => {
                let constant = field(&constant.detach(), streams.shape())?;
                Ok(streams.share(Share::new(constant, scheme)))
            }
        }
    }

    /// A linear layer on every stream, its bias split after it. `x` is the value before.
    pub(crate) fn linear(&self, x: &Tensor, layer: &Linear) -> Result<Self> {
        if self.keeps_constants() || (!self.is_mixed() && layer.bias().is_none()) {
            return Ok(self.clone());
        }
        let expression = self.resolve(x)?.expression(x)?.linear(layer)?;
        Ok(self.mixed(match layer.bias() {
            Some(bias) => self.split(&expression, bias)?,
            None => expression,
        }))
    }

    /// As [`Streams::linear`], each output a number of its own: its bias is split by the
    /// streams of that number alone.
    pub(crate) fn linear_scores(&self, x: &Tensor, layer: &Linear) -> Result<Self> {
        let (Some(bias), false) = (layer.bias(), self.keeps_constants()) else {
            return self.linear(x, layer);
        };
        let expression = self.resolve(x)?.expression(x)?.linear(layer)?;
        Ok(self.mixed(match self.rules().bias {
            BiasSplit::Drop => expression,
            scheme => {
                let constant = field(&bias.detach(), expression.shape())?;
                expression.share(Share::by_feature(constant, scheme))
            }
        }))
    }

    /// A linear layer on every stream, its bias left pending. With the bias of attention split
    /// after the residual, a value bias stays with a stream that is alone at its position.
    pub(crate) fn linear_deferred(&self, x: &Tensor, layer: &Linear) -> Result<Self> {
        let own = self.keeps_constants() && self.rules().bias_site == BiasSite::Residual;
        if own || (!self.is_mixed() && layer.bias().is_none()) {
            return Ok(self.clone());
        }
        let expression = self.expression(x)?.linear(layer)?;
        let mut pending = match &self.pending {
            Some(pending) => Some(layer.apply_without_bias(pending)?),
            None => None,
        };
        if let Some(bias) = layer.bias() {
            let bias = tensor(bias.detach().broadcast_as(expression.shape()))?;
            pending = Some(match pending {
                Some(pending) => tensor(pending + bias)?,
                None => bias,
            });
        }
        Ok(Self {
            pending,
            ..self.mixed(expression)
        })
    }

    /// The output projection of attention: its bias waits for the residual, or is split here.
    /// `x` is the value before, `y` the value after.
    pub(crate) fn linear_output(&self, x: &Tensor, layer: &Linear, y: &Tensor) -> Result<Self> {
        let out = self.linear_deferred(x, layer)?;
        match self.rules().bias_site {
            BiasSite::Residual => Ok(out),
            BiasSite::Attention => out.resolve(y),
        }
    }

    /// The form of two values joined elementwise into one of `rank` dimensions, when both lie
    /// with the same streams.
    fn common_form(&self, a: &Tensor, other: &Self, b: &Tensor) -> Option<Form> {
        let rank = a.rank().max(b.rank());
        match (&self.form, &other.form) {
            (Form::Whole(left), Form::Whole(right)) if left == right => Some(Form::Whole(*left)),
            (Form::ByPosition(left), Form::ByPosition(right))
                if left + b.rank() == right + a.rank()
                    && a.dims().get(*left) == b.dims().get(*right) =>
            {
                Some(Form::ByPosition(left + rank - a.rank()))
            }
            _ => None,
        }
    }

    /// Sum of two streamed values; a pending bias of either is split against the sum.
    pub(crate) fn add(&self, a: &Tensor, other: &Self, b: &Tensor) -> Result<Self> {
        self.same_space(other)?;
        if let Some(form) = self.common_form(a, other, b) {
            return Ok(self.with_form(form));
        }
        let sum = self.expression(a)?.add(&other.expression(b)?)?;
        let pending = match (&self.pending, &other.pending) {
            (Some(left), Some(right)) => Some(tensor(left.broadcast_add(right))?),
            (Some(one), None) | (None, Some(one)) => Some(one.clone()),
            (None, None) => None,
        };
        Ok(self.mixed(match pending {
            Some(pending) => self.split(&sum, &pending)?,
            None => sum,
        }))
    }

    /// Adds a value that has no streams, shared like a bias; the sum has `shape`.
    pub(crate) fn add_constant(
        &self,
        x: &Tensor,
        constant: &Tensor,
        shape: &[usize],
    ) -> Result<Self> {
        if self.keeps_constants() {
            return self.broadcast(x, shape);
        }
        let expression = self.resolve(x)?.expression(x)?.broadcast(shape)?;
        Ok(self.mixed(self.split(&expression, constant)?))
    }

    /// Multiplies by a value that has no streams; the product has `shape`.
    pub(crate) fn multiply_constant(
        &self,
        x: &Tensor,
        constant: &Tensor,
        shape: &[usize],
    ) -> Result<Self> {
        if !self.is_mixed() {
            return self.broadcast(x, shape);
        }
        let expression = self.resolve(x)?.expression(x)?.broadcast(shape)?;
        Ok(self.mixed(expression.scale(constant)?))
    }

    /// Repeats the value along dimensions of length one until its shape is `shape`.
    pub(crate) fn broadcast(&self, x: &Tensor, shape: &[usize]) -> Result<Self> {
        match &self.form {
            Form::Whole(_) => Ok(self.clone()),
            Form::ByPosition(axis)
                if x.dims().get(*axis) == shape.get(axis + shape.len() - x.rank()) =>
            {
                Ok(self.with_form(Form::ByPosition(axis + shape.len() - x.rank())))
            }
            _ => {
                let expression = self.expression(x)?.broadcast(shape)?;
                let pending = match &self.pending {
                    Some(pending) => Some(tensor(pending.broadcast_as(shape))?),
                    None => None,
                };
                Ok(Self {
                    pending,
                    ..self.mixed(expression)
                })
            }
        }
    }

    /// Multiplies by a number.
    pub(crate) fn scale(&self, x: &Tensor, factor: f64) -> Result<Self> {
        if !self.is_mixed() {
            return Ok(self.clone());
        }
        let number = tensor(Tensor::new(factor, x.device()))?;
        let number = tensor(number.to_dtype(x.dtype()))?;
        let pending = match &self.pending {
            Some(pending) => Some(tensor(pending * factor)?),
            None => None,
        };
        Ok(Self {
            pending,
            ..self.mixed(self.expression(x)?.scale(&number)?)
        })
    }

    /// Product of content `a` with a gate `b`, both streamed.
    pub(crate) fn gate(&self, a: &Tensor, other: &Self, b: &Tensor) -> Result<Self> {
        self.same_space(other)?;
        if let Some(form) = self.common_form(a, other, b) {
            return Ok(self.with_form(form));
        }
        let product = |streams: &Self, own: &Tensor, by: &Tensor| -> Result<Expression> {
            let shape = tensor(own.broadcast_mul(by))?.dims().to_vec();
            let expression = streams.resolve(own)?.expression(own)?;
            expression.broadcast(&shape)?.scale(by)
        };
        match self.rules().product {
            ProductSplit::FreezeGate => Ok(self.mixed(product(self, a, b)?)),
            ProductSplit::Half => {
                let content = product(self, a, &tensor(b * 0.5)?)?;
                let gate = product(other, b, &tensor(a * 0.5)?)?;
                Ok(self.mixed(content.add(&gate)?))
            }
        }
    }

    /// An activation replaced by a line through the true value.
    pub(crate) fn activate(&self, x: &Tensor, activation: Activation) -> Result<Self> {
        let secant = self.rules().activation == Slope::Secant && activation.passes_origin();
        if self.keeps_constants() || (secant && !self.is_mixed()) {
            return Ok(self.clone());
        }
        let expression = self.resolve(x)?.expression(x)?;
        if secant {
            let slope = activation_secant(x, activation)?;
            return Ok(self.mixed(expression.scale(&slope)?));
        }
        let tangent = activation_tangent(x, activation)?;
        let intercept = tensor(activate(x, activation)? - tensor(&tangent * x)?)?;
        Ok(self.mixed(self.split(&expression.scale(&tangent)?, &intercept)?))
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
        if self.keeps_constants() || (bias.is_none() && !self.is_mixed()) {
            return Ok(self.clone());
        }
        let mut expression = self.resolve(x)?.expression(x)?;
        let mut centred = x.detach();
        if centre {
            expression = expression.centre();
            centred = tensor(centred.broadcast_sub(&tensor(centred.mean_keepdim(D::Minus1))?))?;
        }
        let variance = tensor(tensor(centred.sqr())?.mean_keepdim(D::Minus1))?;
        let mut slope = tensor(tensor(tensor(variance + epsilon)?.sqrt())?.recip())?;
        slope = match weight {
            Some(weight) => tensor(slope.broadcast_mul(weight))?,
            None => tensor(slope.broadcast_as(x.dims()))?,
        };
        expression = expression.scale(&slope)?;
        Ok(self.mixed(match bias {
            Some(bias) => self.split(&expression, bias)?,
            None => expression,
        }))
    }

    /// Mixes positions by frozen attention weights `[batch, heads, query, key]`; the value is
    /// `[batch, groups, key, width]`.
    pub(crate) fn mix(&self, v: &Tensor, weights: &Tensor) -> Result<Self> {
        let heads = tensor(weights.dim(1))?;
        let (batch, groups, keys, width) = tensor(v.dims4())?;
        if groups == 0 || !heads.is_multiple_of(groups) {
            let expected = format!("a divisor of {heads} heads");
            return Err(Error::invalid("key/value groups", groups, expected));
        }
        let pending = match &self.pending {
            Some(pending) => {
                let spread = tensor(naive::repeat_groups(pending, heads)?.contiguous())?;
                Some(tensor(weights.matmul(&spread))?)
            }
            None => None,
        };
        let merge = |t: &Tensor, before: usize| -> Result<Tensor> {
            let mut shape = t.dims()[..before].to_vec();
            shape.extend([batch, keys, groups * width]);
            tensor(tensor(t.transpose(before + 1, before + 2))?.reshape(shape))
        };
        let merged = match &self.form {
            Form::Whole(_) => return Ok(self.clone()),
            Form::Heads {
                merged,
                groups: own,
                across: true,
            } if *own == groups => merged.clone(),
            Form::ByPosition(2) => {
                Self::expression(&self.with_form(Form::ByPosition(1)), &merge(v, 0)?)?
            }
            _ => Expression::stored(&merge(&self.dense(v)?, 1)?)?,
        };
        merged.settle()?;
        Ok(Self {
            pending,
            ..self.with_form(Form::Heads {
                merged: merged.mix(weights, groups)?,
                groups: heads,
                across: true,
            })
        })
    }

    /// Weighted sum over positions of `[batch, position, width]`, by weights `[batch, position]`.
    pub(crate) fn pool(&self, x: &Tensor, weights: &Tensor) -> Result<Self> {
        if let Form::Whole(_) = &self.form {
            return Ok(self.clone());
        }
        let (batch, length, width) = tensor(x.dims3())?;
        let weights = tensor(weights.reshape((batch, 1, 1, length)))?;
        let pooled = self.resolve(x)?.expression(x)?.mix(&weights, 1)?;
        Ok(self.mixed(pooled.reshape(&[batch, width])?))
    }

    /// A map that is linear and acts on each stream alone, such as a change of shape.
    ///
    /// `map(tensor, shift)` gets a tensor whose dimensions are those of the value moved by
    /// `shift`. `axis` says where the map takes the position axis, if it keeps it whole.
    pub(crate) fn map(
        &self,
        x: &Tensor,
        change: Change<'_>,
        map: &dyn Fn(&Tensor, usize) -> Result<Tensor>,
        axis: impl Fn(usize) -> Option<usize>,
    ) -> Result<Self> {
        let pending = match &self.pending {
            Some(pending) => Some(map(pending, 0)?),
            None => None,
        };
        let form = match self.follow(x, change)? {
            Some(form) => form,
            None => {
                let kept = match &self.form {
                    Form::Whole(stream) => Some(Form::Whole(*stream)),
                    Form::ByPosition(from) => axis(*from).map(Form::ByPosition),
                    _ => None,
                };
                match kept {
                    Some(form) => form,
                    None => Form::Mixed(Expression::stored(&map(&self.dense(x)?, 1)?)?),
                }
            }
        };
        Ok(Self {
            space: self.space.clone(),
            form,
            pending,
        })
    }

    /// The form after a change of shape that needs no multiplying out.
    fn follow(&self, x: &Tensor, change: Change<'_>) -> Result<Option<Form>> {
        Ok(match (&self.form, change) {
            (Form::Mixed(_) | Form::Heads { .. }, Change::Contiguous) => Some(self.form.clone()),
            (Form::Mixed(expression), Change::Narrow { dim, start, length })
                if dim + 1 < x.rank() =>
            {
                Some(Form::Mixed(expression.narrow(dim, start, length)?))
            }
            (Form::ByPosition(axis), Change::Narrow { dim, start, length })
                if dim == *axis && dim + 1 < x.rank() =>
            {
                let expression = self.expression(x)?.narrow(dim, start, length)?;
                Some(Form::Mixed(expression))
            }
            (Form::Mixed(expression), Change::Reshape(to)) => match (x.dims(), to) {
                (from, to) if from.last() == to.last() => {
                    Some(Form::Mixed(expression.reshape(to)?))
                }
                ([batch, length, _], [b, l, groups, _]) if (batch, length) == (b, l) => {
                    Some(Form::Heads {
                        merged: expression.clone(),
                        groups: *groups,
                        across: false,
                    })
                }
                _ => None,
            },
            (
                Form::Heads {
                    merged,
                    groups,
                    across,
                },
                Change::Transpose(1, 2) | Change::Transpose(2, 1),
            ) => Some(Form::Heads {
                merged: merged.clone(),
                groups: *groups,
                across: !across,
            }),
            (
                Form::Heads {
                    merged,
                    across: false,
                    ..
                },
                Change::Reshape(to),
            ) if merged.shape() == to => Some(Form::Mixed(merged.clone())),
            _ => None,
        })
    }

    /// Streams of zeros beside `value`.
    pub(crate) fn zeros(&self, value: &Tensor) -> Result<Self> {
        let mut shape = vec![self.count()];
        shape.extend(value.dims());
        let zero = tensor(Tensor::zeros(shape, value.dtype(), value.device()))?;
        Ok(self.mixed(Expression::stored(&zero)?))
    }

    /// Joins streamed values along `dim` of the value.
    pub(crate) fn concatenate(parts: &[(&Tensor, Self)], dim: usize) -> Result<Self> {
        let [(_, first), rest @ ..] = parts else {
            return Err(Error::invalid("signals to join", 0, "at least one"));
        };
        if rest.is_empty() {
            return Ok(first.clone());
        }
        let mut dense = Vec::with_capacity(parts.len());
        let mut one_whole = true;
        for (_, streams) in parts {
            first.same_space(streams)?;
            one_whole &= matches!((&first.form, &streams.form),
                (Form::Whole(left), Form::Whole(right)) if left == right);
        }
        if one_whole {
            return Ok(first.clone());
        }
        for (value, streams) in parts {
            dense.push(streams.contributions(value)?);
        }
        let joined = tensor(Tensor::cat(&dense, dim + 1))?;
        Ok(first.mixed(Expression::stored(&joined)?))
    }

    /// Streams of a value that belongs to none: zero everywhere, the value pending.
    pub(crate) fn of_constant(&self, value: &Tensor) -> Result<Self> {
        Ok(Self {
            pending: Some(value.clone()),
            ..self.zeros(value)?
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
