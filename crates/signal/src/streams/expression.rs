//! Streams as an expression, evaluated where its numbers are asked for.
//!
//! All that happens to streams between two mixings of positions acts on each position and each
//! stream alone: linear maps, slopes, means, shares of a bias. Such a chain is kept as written.
//! Its numbers are asked for in two ways:
//!
//! * [`Expression::dense`] multiplies it out, a few streams at a time, so that wide
//!   intermediates (the hidden features of a feed-forward part) exist for those few only;
//! * [`Expression::dot`] gives `S[k, r] · f[r]` for a field `f`, by pulling `f` back through the
//!   chain, which costs as much as one stream, and contracting where the streams are stored.
//!   The weights of a bias and the streams of a score are such products.
//!
//! Positions mix in [`Kind::Mix`]. With many queries the residual sum it flows into is stored on
//! first use; with one query it is pulled back like everything else. So the last mixing of a
//! model, and the feed-forward part before it, are never multiplied out for a single score.

mod evaluate;

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use super::share::Share;
use crate::error::tensor;
use crate::{Error, Linear, Result};
use lapidary_kernels::{
    D, DType, StreamAffine, Tensor, stream_affine, stream_dot, stream_mix, stream_sum,
};

/// Numbers up to which an expression that is asked for its norms is stored rather than
/// evaluated again later.
const STORED: usize = 1 << 26;

/// A node of an expression; cloning shares it.
#[derive(Clone, Debug)]
pub(crate) struct Expression(Arc<Node>);

#[derive(Debug)]
struct Node {
    /// Larger than that of every operand.
    id: u64,
    streams: usize,
    /// Shape of the value.
    shape: Vec<usize>,
    dtype: DType,
    kind: RwLock<Kind>,
    /// Sum over the streams, once asked for.
    total: Mutex<Option<Tensor>>,
}

/// Fields are `[rows, width]` or `[1, width]`, the rows being all dimensions but the last.
#[derive(Clone, Debug)]
pub(super) enum Kind {
    /// `[streams, ..shape]`.
    Dense(Tensor),
    /// The vector at position `i` of `axis` belongs to stream `stream_of[i]`.
    Own {
        value: Tensor,
        axis: usize,
        stream_of: Arc<[usize]>,
    },
    /// The value belongs to one stream.
    Whole {
        value: Tensor,
        stream: usize,
    },
    /// A linear layer without its bias.
    Linear(Expression, Linear),
    /// A field multiplies.
    Scale(Expression, Tensor),
    /// Each stream's mean over the width goes.
    Centre(Expression),
    Sum(Expression, Expression),
    /// A constant is shared among the streams.
    Share(Expression, Arc<Share>),
    /// The same rows under other dimensions.
    Reshape(Expression),
    /// Positions are mixed by weights `[batch, heads, query, key]`.
    Mix {
        source: Expression,
        weights: Tensor,
        groups: usize,
    },
}

fn next_id() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// A tensor that broadcasts to `shape`, as a field.
pub(super) fn field(t: &Tensor, shape: &[usize]) -> Result<Tensor> {
    let (rows, width) = rows_and_width(shape);
    let leading: usize = t.dims().iter().rev().skip(1).product();
    if leading == 1 && t.rank() <= shape.len() {
        let flat = tensor(t.reshape((1, t.elem_count())))?;
        return tensor(tensor(flat.broadcast_as((1, width)))?.contiguous());
    }
    tensor(tensor(t.broadcast_as(shape))?.reshape((rows, width)))
}

pub(super) fn rows_and_width(shape: &[usize]) -> (usize, usize) {
    match shape.split_last() {
        Some((width, rows)) => (rows.iter().product(), *width),
        None => (1, 1),
    }
}

impl Expression {
    fn new(kind: Kind, streams: usize, shape: Vec<usize>, dtype: DType) -> Self {
        Self(Arc::new(Node {
            id: next_id(),
            streams,
            shape,
            dtype,
            kind: RwLock::new(kind),
            total: Mutex::new(None),
        }))
    }

    /// Streams that are stored: `[streams, ..shape]`.
    pub(super) fn stored(dense: &Tensor) -> Result<Self> {
        let dense = tensor(dense.contiguous())?;
        let Some((streams, shape)) = dense.dims().split_first() else {
            return Err(Error::invalid("streams", dense.dims(), "[streams, ..]"));
        };
        let (streams, shape, dtype) = (*streams, shape.to_vec(), dense.dtype());
        Ok(Self::new(Kind::Dense(dense), streams, shape, dtype))
    }

    /// Positions that belong to one stream each.
    pub(super) fn own(
        value: &Tensor,
        axis: usize,
        stream_of: Arc<[usize]>,
        streams: usize,
    ) -> Result<Self> {
        let (shape, dtype) = (value.dims().to_vec(), value.dtype());
        if shape.get(axis) != Some(&stream_of.len()) {
            return Err(Error::invalid(
                format!("positions along axis {axis}"),
                shape,
                format!("{} of them", stream_of.len()),
            ));
        }
        if axis + 1 == shape.len() {
            return Self::stored(&own_streams(value, axis, &stream_of, 0..streams)?);
        }
        let value = value.clone();
        let kind = Kind::Own {
            value,
            axis,
            stream_of,
        };
        Ok(Self::new(kind, streams, shape, dtype))
    }

    /// A value that belongs to one stream.
    pub(super) fn whole(value: &Tensor, stream: usize, streams: usize) -> Self {
        let (shape, dtype) = (value.dims().to_vec(), value.dtype());
        let value = value.clone();
        Self::new(Kind::Whole { value, stream }, streams, shape, dtype)
    }

    fn then(&self, kind: Kind, shape: Vec<usize>) -> Self {
        Self::new(kind, self.0.streams, shape, self.0.dtype)
    }

    /// `S Wᵀ`.
    pub(super) fn linear(&self, layer: &Linear) -> Result<Self> {
        let mut shape = self.0.shape.clone();
        match shape.last_mut() {
            Some(last) if *last == layer.input() => *last = layer.output(),
            _ => {
                let expected = format!("[.., {}]", layer.input());
                return Err(Error::invalid("input of a linear layer", shape, expected));
            }
        }
        Ok(self.then(Kind::Linear(self.clone(), layer.clone()), shape))
    }

    /// `S ⊙ slope`, for a slope that broadcasts to the value.
    pub(super) fn scale(&self, slope: &Tensor) -> Result<Self> {
        let slope = field(&slope.detach(), &self.0.shape)?;
        Ok(self.then(Kind::Scale(self.clone(), slope), self.0.shape.clone()))
    }

    /// `S − mean(S)` over the width.
    pub(super) fn centre(&self) -> Self {
        self.then(Kind::Centre(self.clone()), self.0.shape.clone())
    }

    /// The sum of two, each repeated to the shape that both broadcast to.
    pub(super) fn add(&self, other: &Self) -> Result<Self> {
        let shape = broadcast_shape(&self.0.shape, &other.0.shape)?;
        let (a, b) = (self.broadcast(&shape)?, other.broadcast(&shape)?);
        Ok(self.then(Kind::Sum(a, b), shape))
    }

    /// Adds a constant, shared among the streams.
    pub(super) fn share(&self, share: Share) -> Self {
        self.then(
            Kind::Share(self.clone(), Arc::new(share)),
            self.0.shape.clone(),
        )
    }

    /// Positions of `[batch, key, groups · head]` mixed: `[batch, query, heads · head]`.
    pub(super) fn mix(&self, weights: &Tensor, groups: usize) -> Result<Self> {
        let (batch, heads, queries, keys) = tensor(weights.dims4())?;
        let width = match self.0.shape.as_slice() {
            [b, k, width] if (*b, *k) == (batch, keys) && groups > 0 => width / groups * heads,
            found => {
                let expected = format!("[{batch}, {keys}, width]");
                return Err(Error::invalid(
                    "values of attention",
                    found.to_vec(),
                    expected,
                ));
            }
        };
        let kind = Kind::Mix {
            source: self.clone(),
            weights: tensor(weights.detach().contiguous())?,
            groups,
        };
        Ok(self.then(kind, vec![batch, queries, width]))
    }

    /// The same rows under other leading dimensions.
    pub(super) fn reshape(&self, shape: &[usize]) -> Result<Self> {
        if rows_and_width(shape) != rows_and_width(&self.0.shape) {
            return Err(Error::invalid(
                "rows of a reshaped value",
                shape.to_vec(),
                format!("the rows of {:?}", self.0.shape),
            ));
        }
        Ok(self.then(Kind::Reshape(self.clone()), shape.to_vec()))
    }

    /// Repeats rows until the value's shape is `shape`.
    pub(super) fn broadcast(&self, shape: &[usize]) -> Result<Self> {
        if self.0.shape == shape {
            return Ok(self.clone());
        }
        if rows_and_width(shape) == rows_and_width(&self.0.shape) {
            return self.reshape(shape);
        }
        let mut aligned = vec![self.0.streams];
        aligned.resize(1 + shape.len().saturating_sub(self.0.shape.len()), 1);
        aligned.extend(&self.0.shape);
        let mut full = vec![self.0.streams];
        full.extend(shape);
        let dense = tensor(self.dense()?.reshape(aligned))?;
        Self::stored(&tensor(dense.broadcast_as(full))?)
    }

    pub(super) fn shape(&self) -> &[usize] {
        &self.0.shape
    }

    pub(super) fn streams(&self) -> usize {
        self.0.streams
    }

    pub(super) fn kind(&self) -> Kind {
        self.0
            .kind
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// What the kind reads.
    fn operands(&self) -> Vec<Self> {
        match self.kind() {
            Kind::Dense(_) | Kind::Own { .. } | Kind::Whole { .. } => Vec::new(),
            Kind::Linear(x, _)
            | Kind::Scale(x, _)
            | Kind::Centre(x)
            | Kind::Share(x, _)
            | Kind::Reshape(x)
            | Kind::Mix { source: x, .. } => vec![x],
            Kind::Sum(a, b) => vec![a, b],
        }
    }

    // ------------------------------------------------------------ pulling back

    /// `S[k, r] · f[r]` for a field, `[streams, rows]`.
    pub(super) fn dot(&self, f: &Tensor) -> Result<Tensor> {
        let (rows, _) = rows_and_width(&self.0.shape);
        let mut total = tensor(Tensor::zeros((self.0.streams, rows), f.dtype(), f.device()))?;
        let mut open = BTreeMap::from([(self.0.id, (self.clone(), f.clone()))]);
        let push = |open: &mut BTreeMap<_, (Self, Tensor)>, x: Self, f: Tensor| -> Result<()> {
            let f = match open.remove(&x.0.id) {
                Some((_, other)) => tensor(other.broadcast_add(&f))?,
                None => f,
            };
            open.insert(x.0.id, (x, f));
            Ok(())
        };
        // A node has a larger id than its operands, so every reader has been seen before it.
        while let Some((_, (node, f))) = open.pop_last() {
            if node.is_mixing_sum() {
                node.store()?;
            }
            match node.kind() {
                Kind::Dense(dense) => {
                    let (rows, width) = rows_and_width(&node.0.shape);
                    let dense = tensor(dense.reshape((node.0.streams, rows, width)))?;
                    total = tensor(total + stream_dot(&dense, &f)?)?;
                }
                Kind::Own {
                    value,
                    axis,
                    stream_of,
                } => {
                    let products = tensor(row_dot(&value, &f)?.reshape(rows_of(&value)))?;
                    let own = own_streams(&products, axis, &stream_of, 0..node.0.streams)?;
                    total = tensor(total + tensor(own.reshape((node.0.streams, rows)))?)?;
                }
                Kind::Whole { value, stream } => {
                    let products = tensor(row_dot(&value, &f)?.unsqueeze(0))?;
                    let after = node.0.streams - stream - 1;
                    total = tensor(total + tensor(products.pad_with_zeros(0, stream, after))?)?;
                }
                Kind::Linear(x, layer) => push(&mut open, x, layer.apply_transposed(&f)?)?,
                Kind::Scale(x, slope) => push(&mut open, x, tensor(f.broadcast_mul(&slope))?)?,
                Kind::Centre(x) => {
                    let mean = tensor(f.mean_keepdim(D::Minus1))?;
                    push(&mut open, x, tensor(f.broadcast_sub(&mean))?)?;
                }
                Kind::Sum(a, b) => {
                    push(&mut open, a, f.clone())?;
                    push(&mut open, b, f)?;
                }
                Kind::Reshape(x) => push(&mut open, x, f)?,
                Kind::Share(x, share) => {
                    total = tensor(total + share.dot(&x, &f)?)?;
                    push(&mut open, x, f)?;
                }
                Kind::Mix {
                    source,
                    weights,
                    groups,
                } => {
                    if tensor(weights.dim(2))? != 1 {
                        node.store()?;
                        push(&mut open, node, f)?;
                        continue;
                    }
                    let (batch, keys) = (tensor(weights.dim(0))?, tensor(weights.dim(3))?);
                    let pulled = source.dot(&pull_mix(&weights, &f, groups)?)?;
                    let pulled = tensor(pulled.reshape((node.0.streams, batch, keys)))?;
                    total = tensor(total + tensor(pulled.sum(2))?)?;
                }
            }
        }
        Ok(total)
    }

    /// Whether this is a sum that positions of many queries mix into directly: where a field
    /// that is pulled back stops and the streams are stored instead.
    fn is_mixing_sum(&self) -> bool {
        if !matches!(self.kind(), Kind::Sum(..)) {
            return false;
        }
        let mut mixing = false;
        self.visit(&mut |node| match node.kind() {
            Kind::Mix { weights, .. } => {
                mixing |= weights.dims().get(2) != Some(&1);
                false
            }
            Kind::Sum(..) => node.0.id == self.0.id,
            _ => true,
        });
        mixing
    }

    /// Stores the last sums that positions mixed into, so that no evaluation ever reaches
    /// further back than one mixing.
    pub(super) fn settle(&self) -> Result<()> {
        let mut sums = Vec::new();
        self.visit(&mut |node| {
            if node.is_mixing_sum() {
                sums.push(node.clone());
                return false;
            }
            true
        });
        sums.iter().try_for_each(Self::store)
    }

    // ------------------------------------------------------------ sums and rows

    /// `Σ_k S[k]`, the shape of the value. The weights of a share count as summing to one until
    /// they have been computed.
    pub(super) fn total(&self) -> Result<Tensor> {
        let lock = || self.0.total.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = lock().clone() {
            return Ok(known);
        }
        let (rows, width) = rows_and_width(&self.0.shape);
        let affine = |x: &Self, map: StreamAffine<'_>| -> Result<Tensor> {
            let x = tensor(x.total()?.reshape((1, rows, width)))?;
            Ok(stream_affine(&x, map)?)
        };
        let total = match self.kind() {
            Kind::Dense(dense) => {
                stream_sum(&tensor(dense.reshape((self.0.streams, rows, width)))?)?
            }
            Kind::Own { value, .. } | Kind::Whole { value, .. } => value,
            Kind::Linear(x, layer) => layer.apply_without_bias(&x.total()?)?,
            Kind::Scale(x, slope) => affine(
                &x,
                StreamAffine {
                    slope: Some(&slope),
                    ..StreamAffine::default()
                },
            )?,
            Kind::Centre(x) => affine(
                &x,
                StreamAffine {
                    centre: true,
                    ..StreamAffine::default()
                },
            )?,
            Kind::Sum(a, b) => tensor(a.total()? + b.total()?)?,
            Kind::Share(x, share) => {
                let x = tensor(x.total()?.reshape((rows, width)))?;
                tensor(x.broadcast_add(&share.total()?))?
            }
            Kind::Reshape(x) => x.total()?,
            Kind::Mix {
                source,
                weights,
                groups,
            } => stream_mix(&weights, &tensor(source.total()?.unsqueeze(0))?, groups)?,
        };
        let total = tensor(total.reshape(self.0.shape.as_slice()))?;
        *lock() = Some(total.clone());
        Ok(total)
    }

    /// Entries `start..start + length` along a dimension of the value that is not the last.
    pub(super) fn narrow(&self, dim: usize, start: usize, length: usize) -> Result<Self> {
        let size = self.0.shape.get(dim).copied().unwrap_or(0);
        if dim + 1 >= self.0.shape.len() || start + length > size {
            return Err(Error::invalid(
                format!("entries along dimension {dim} of {:?}", self.0.shape),
                start..start + length,
                format!("within {size}, and not of the last dimension"),
            ));
        }
        if length == size {
            return Ok(self.clone());
        }
        self.narrowed(dim, start, length, &mut HashMap::new())
    }

    fn narrowed(
        &self,
        dim: usize,
        start: usize,
        length: usize,
        memo: &mut HashMap<u64, Self>,
    ) -> Result<Self> {
        if let Some(known) = memo.get(&self.0.id) {
            return Ok(known.clone());
        }
        let mut shape = self.0.shape.clone();
        if let Some(size) = shape.get_mut(dim) {
            *size = length;
        }
        let mut below = |x: &Self| x.narrowed(dim, start, length, memo);
        let rows = |f: &Tensor| narrow_rows(f, &self.0.shape, dim, start, length);
        let kind = match self.kind() {
            Kind::Dense(dense) => {
                let dense = tensor(dense.narrow(dim + 1, start, length))?;
                Kind::Dense(tensor(dense.contiguous())?)
            }
            Kind::Own {
                value,
                axis,
                stream_of,
            } => Kind::Own {
                value: tensor(value.narrow(dim, start, length))?,
                axis,
                stream_of: match stream_of.get(start..start + length) {
                    Some(kept) if axis == dim => kept.into(),
                    _ => stream_of,
                },
            },
            Kind::Whole { value, stream } => Kind::Whole {
                value: tensor(value.narrow(dim, start, length))?,
                stream,
            },
            Kind::Linear(x, layer) => Kind::Linear(below(&x)?, layer),
            Kind::Scale(x, slope) => Kind::Scale(below(&x)?, rows(&slope)?),
            Kind::Centre(x) => Kind::Centre(below(&x)?),
            Kind::Sum(a, b) => Kind::Sum(below(&a)?, below(&b)?),
            Kind::Share(x, share) => {
                let share = share.narrow(&rows, &self.0.shape, dim, start, length)?;
                Kind::Share(below(&x)?, Arc::new(share))
            }
            Kind::Mix {
                source,
                weights,
                groups,
            } if dim <= 1 => Kind::Mix {
                source: if dim == 0 { below(&source)? } else { source },
                weights: tensor(tensor(weights.narrow(2 * dim, start, length))?.contiguous())?,
                groups,
            },
            Kind::Reshape(x)
                if x.0.shape.len() > dim + 1 && x.0.shape[..=dim] == self.0.shape[..=dim] =>
            {
                Kind::Reshape(below(&x)?)
            }
            // Other dimensions than below: the narrowed rows need not be a range there.
            Kind::Reshape(_) | Kind::Mix { .. } => {
                let dense = tensor(self.dense()?.narrow(dim + 1, start, length))?;
                Kind::Dense(tensor(dense.contiguous())?)
            }
        };
        let narrowed = self.then(kind, shape);
        memo.insert(self.0.id, narrowed.clone());
        Ok(narrowed)
    }
}

/// The shape that two broadcast to.
fn broadcast_shape(a: &[usize], b: &[usize]) -> Result<Vec<usize>> {
    let rank = a.len().max(b.len());
    let at = |shape: &[usize], i: usize| match (i + shape.len()).checked_sub(rank) {
        Some(index) => shape.get(index).copied().unwrap_or(1),
        None => 1,
    };
    (0..rank)
        .map(|i| match (at(a, i), at(b, i)) {
            (x, y) if x == y => Ok(x),
            (1, y) => Ok(y),
            (x, 1) => Ok(x),
            _ => Err(Error::invalid(
                "shape of the second value",
                b,
                format!("one that broadcasts with {a:?}"),
            )),
        })
        .collect()
}

/// Streams `range` of a value whose positions along `axis` belong to one stream each.
fn own_streams(
    value: &Tensor,
    axis: usize,
    stream_of: &[usize],
    range: Range<usize>,
) -> Result<Tensor> {
    let member: Vec<f64> = range
        .clone()
        .flat_map(|stream| {
            stream_of
                .iter()
                .map(move |of| f64::from(u8::from(*of == stream)))
        })
        .collect();
    let mut shape = vec![1; value.rank() + 1];
    if let [first, rest @ ..] = shape.as_mut_slice()
        && let Some(positions) = rest.get_mut(axis)
    {
        (*first, *positions) = (range.len(), stream_of.len());
    }
    let member = tensor(Tensor::from_vec(member, shape, value.device()))?;
    let member = tensor(member.to_dtype(value.dtype()))?;
    tensor(tensor(value.unsqueeze(0))?.broadcast_mul(&member))
}

/// `x[r] · f[r]`, `[rows]`.
fn row_dot(x: &Tensor, f: &Tensor) -> Result<Tensor> {
    let (rows, width) = rows_and_width(x.dims());
    let x = tensor(x.reshape((1, rows, width)))?;
    tensor(stream_dot(&x, f)?.squeeze(0))
}

/// The dimensions of a value but its last.
fn rows_of(value: &Tensor) -> &[usize] {
    value.dims().split_last().map_or(&[], |(_, rows)| rows)
}

/// The field over keys that a field over single queries is pulled back to:
/// `Σ_{h in group} α[b, h, 0, j] f[b, h]`, `[batch · key, groups · head]`.
fn pull_mix(weights: &Tensor, f: &Tensor, groups: usize) -> Result<Tensor> {
    let (batch, heads, _, keys) = tensor(weights.dims4())?;
    let width = tensor(f.dim(1))?;
    let head = width / heads.max(1);
    let f = tensor(f.broadcast_as((batch, width)))?;
    let f = tensor(f.reshape((batch, heads, 1, head)))?;
    // [batch, heads, key, head]
    let pulled = tensor(tensor(weights.transpose(2, 3))?.contiguous())?;
    let pulled = tensor(pulled.broadcast_mul(&f))?;
    let shape = vec![batch, groups, heads / groups.max(1), keys, head];
    let pulled = tensor(tensor(pulled.reshape(shape))?.sum(2))?;
    tensor(tensor(pulled.transpose(1, 2))?.reshape((batch * keys, groups * head)))
}

/// The rows of a field that narrowing a value of `shape` keeps.
fn narrow_rows(
    f: &Tensor,
    shape: &[usize],
    dim: usize,
    start: usize,
    length: usize,
) -> Result<Tensor> {
    if f.dims().first() == Some(&1) && rows_and_width(shape).0 != 1 {
        return Ok(f.clone());
    }
    let width = tensor(f.dim(1))?;
    let mut full = shape.to_vec();
    if let Some(last) = full.last_mut() {
        *last = width;
    }
    let kept = tensor(tensor(f.reshape(full))?.narrow(dim, start, length))?;
    tensor(kept.reshape(((), width)))
}
