//! How a constant is shared among streams.

use std::ops::Range;
use std::sync::OnceLock;

use super::expression::{Expression, rows_and_width};
use super::rules::BiasSplit;
use crate::Result;
use crate::error::tensor;
use lapidary_kernels::{D, DType, Tensor};

/// Columns up to which the streams of scores are computed one score at a time.
const FEW_COLUMNS: usize = 8;

/// A constant field and the weights by which the streams share it.
///
/// The weights are normalised to sum to one over the streams, without the reference's
/// `+ 1e-12`, so that they are complete however small the products are. Where all are zero, the
/// streams that are not zero share equally, and all of them where none is.
#[derive(Debug)]
pub(super) struct Share {
    /// `[rows, width]` or `[1, width]`.
    constant: Tensor,
    scheme: BiasSplit,
    /// Whether each feature is a number of its own, shared by itself.
    by_feature: bool,
    /// `[streams, rows]`, or by feature `[streams, rows, width]`.
    weights: OnceLock<Tensor>,
}

impl Share {
    pub(super) fn new(constant: Tensor, scheme: BiasSplit) -> Self {
        Self {
            constant,
            scheme,
            by_feature: false,
            weights: OnceLock::new(),
        }
    }

    /// Each feature by itself, as the scores of classes.
    pub(super) fn by_feature(constant: Tensor, scheme: BiasSplit) -> Self {
        Self {
            by_feature: true,
            ..Self::new(constant, scheme)
        }
    }

    pub(super) fn is_by_feature(&self) -> bool {
        self.by_feature
    }

    pub(super) fn constant(&self) -> &Tensor {
        &self.constant
    }

    /// The weights against `x`, the streams before the constant is added.
    pub(super) fn weights(&self, x: &Expression) -> Result<Tensor> {
        if let Some(known) = self.weights.get() {
            return Ok(known.clone());
        }
        let weights = if self.by_feature {
            self.by_number(&tensor(x.dense()?.reshape((
                x.streams(),
                rows_and_width(x.shape()).0,
                (),
            )))?)?
        } else {
            self.by_vector(x)?
        };
        Ok(self.weights.get_or_init(|| weights).clone())
    }

    fn by_vector(&self, x: &Expression) -> Result<Tensor> {
        let (rows, _) = rows_and_width(x.shape());
        let norm = || tensor(x.squares()?.sqrt());
        let dot = || x.dot(&self.constant);
        let raw = match self.scheme {
            BiasSplit::First => return self.one(0, &[x.streams(), rows]),
            BiasSplit::Extra => return self.one(x.streams() - 1, &[x.streams(), rows]),
            BiasSplit::Drop => {
                return tensor(Tensor::zeros(
                    (x.streams(), rows),
                    self.constant.dtype(),
                    self.constant.device(),
                ));
            }
            BiasSplit::AbsoluteDot => tensor(dot()?.abs())?,
            BiasSplit::Dot => dot()?,
            BiasSplit::Norm => norm()?,
            BiasSplit::Equal => not_zero(&norm()?)?,
            BiasSplit::AbsoluteCosine => {
                let norm = norm()?;
                let zero = tensor(tensor(norm.eq(0.0))?.to_dtype(norm.dtype()))?;
                tensor(tensor(dot()?.abs())? / tensor(norm + zero)?)?
            }
        };
        let constant = tensor(tensor(self.constant.abs())?.max(D::Minus1))?;
        normalised(raw, &constant, norm)
    }

    /// `streams` `[streams, rows, width]`, every number by itself.
    fn by_number(&self, streams: &Tensor) -> Result<Tensor> {
        let raw = match self.scheme {
            BiasSplit::First => return self.one(0, streams.dims()),
            BiasSplit::Extra => {
                let last = streams.dims().first().map_or(0, |k| k - 1);
                return self.one(last, streams.dims());
            }
            BiasSplit::Drop => return tensor(streams.zeros_like()),
            BiasSplit::AbsoluteDot => tensor(tensor(streams.broadcast_mul(&self.constant))?.abs())?,
            BiasSplit::Dot => tensor(streams.broadcast_mul(&self.constant))?,
            BiasSplit::Norm => tensor(streams.abs())?,
            BiasSplit::Equal | BiasSplit::AbsoluteCosine => not_zero(streams)?,
        };
        normalised(raw, &self.constant, || Ok(streams.clone()))
    }

    /// All to one stream.
    fn one(&self, stream: usize, shape: &[usize]) -> Result<Tensor> {
        let streams = shape.first().copied().unwrap_or(0);
        let mut one = vec![0f32; streams];
        if let Some(entry) = one.get_mut(stream) {
            *entry = 1.0;
        }
        let mut thin = vec![1; shape.len()];
        if let Some(first) = thin.first_mut() {
            *first = streams;
        }
        let one = tensor(Tensor::from_vec(one, thin, self.constant.device()))?;
        let one = tensor(one.to_dtype(self.constant.dtype()))?;
        tensor(tensor(one.broadcast_as(shape))?.contiguous())
    }

    /// The constant's shares of the streams `range`, by feature: `[.., rows, width]`.
    pub(super) fn features(&self, x: &Expression, range: Range<usize>) -> Result<Tensor> {
        let weights = tensor(self.weights(x)?.narrow(0, range.start, range.len()))?;
        tensor(weights.broadcast_mul(&self.constant))
    }

    /// `share[k, r] · f[r]`, `[streams, rows]`, `x` being the streams before.
    pub(super) fn dot(&self, x: &Expression, f: &Tensor) -> Result<Tensor> {
        if !self.by_feature {
            let product = tensor(self.constant.broadcast_mul(f))?;
            let product = tensor(tensor(product.sum(D::Minus1))?.unsqueeze(0))?;
            return tensor(self.weights(x)?.broadcast_mul(&product));
        }
        let columns = columns(f)?;
        if columns.len() > FEW_COLUMNS {
            let shares = self.features(x, 0..x.streams())?;
            return tensor(tensor(shares.broadcast_mul(f))?.sum(D::Minus1));
        }
        let (rows, width) = rows_and_width(x.shape());
        let mut total = tensor(Tensor::zeros((x.streams(), rows), f.dtype(), f.device()))?;
        for column in columns {
            let mut pick = vec![0f32; width];
            if let Some(entry) = pick.get_mut(column) {
                *entry = 1.0;
            }
            let pick = tensor(Tensor::from_vec(pick, (1, width), f.device()))?;
            let scores = x.dot(&tensor(pick.to_dtype(f.dtype()))?)?;
            let constant = tensor(self.constant.narrow(1, column, 1))?;
            let alone = Self::by_feature(constant.clone(), self.scheme);
            let weights = tensor(alone.by_number(&tensor(scores.unsqueeze(2))?)?.squeeze(2))?;
            let weight = tensor(constant.broadcast_mul(&tensor(f.narrow(1, column, 1))?))?;
            total = tensor(total + tensor(weights.broadcast_mul(&tensor(weight.t())?))?)?;
        }
        Ok(total)
    }

    /// Sum of the shares over the streams: a field.
    pub(super) fn total(&self) -> Result<Tensor> {
        let Some(weights) = self.weights.get() else {
            return Ok(self.constant.clone());
        };
        let sum = tensor(weights.sum(0))?;
        let sum = if self.by_feature {
            sum
        } else {
            tensor(sum.unsqueeze(1))?
        };
        tensor(sum.broadcast_mul(&self.constant))
    }

    /// The same over fewer rows of a value of `shape`.
    pub(super) fn narrow(
        &self,
        rows: &dyn Fn(&Tensor) -> Result<Tensor>,
        shape: &[usize],
        dim: usize,
        start: usize,
        length: usize,
    ) -> Result<Self> {
        let weights = OnceLock::new();
        if let Some(known) = self.weights.get() {
            let mut full = vec![known.dims().first().copied().unwrap_or(0)];
            full.extend(shape);
            if !self.by_feature {
                full.pop();
            }
            let streams = full.first().copied().unwrap_or(0);
            let kept = tensor(tensor(known.reshape(full))?.narrow(dim + 1, start, length))?;
            let kept = if self.by_feature {
                tensor(kept.reshape((streams, (), shape.last().copied().unwrap_or(1))))?
            } else {
                tensor(kept.reshape((streams, ())))?
            };
            weights.get_or_init(|| kept);
        }
        Ok(Self {
            constant: rows(&self.constant)?,
            scheme: self.scheme,
            by_feature: self.by_feature,
            weights,
        })
    }
}

fn not_zero(t: &Tensor) -> Result<Tensor> {
    tensor(tensor(t.ne(0.0))?.to_dtype(t.dtype()))
}

/// `raw` `[streams, ..]` divided by its sum over the streams. Where that is zero although the
/// constant is not, the streams of non-zero `size` share equally, or else all.
fn normalised(
    raw: Tensor,
    constant: &Tensor,
    size: impl FnOnce() -> Result<Tensor>,
) -> Result<Tensor> {
    let streams = tensor(raw.dim(0))? as f64;
    let mut total = tensor(raw.sum_keepdim(0))?;
    let zero = tensor(tensor(total.eq(0.0))?.to_dtype(total.dtype()))?;
    let needed = tensor(zero.broadcast_mul(&not_zero(constant)?))?;
    let needed =
        tensor(tensor(tensor(needed.sum_all())?.to_dtype(DType::F64))?.to_scalar::<f64>())?;
    let mut raw = raw;
    if needed > 0.0 {
        let present = not_zero(&size()?)?;
        let count = tensor(present.sum_keepdim(0))?;
        let none = tensor(tensor(count.eq(0.0))?.to_dtype(count.dtype()))?;
        let equal = tensor(present.broadcast_add(&none))?;
        let count = tensor(count + tensor(none * streams)?)?;
        let equal = tensor(equal.broadcast_div(&count))?;
        raw = tensor(raw + tensor(equal.broadcast_mul(&zero))?)?;
        total = tensor(raw.sum_keepdim(0))?;
        let still = tensor(tensor(total.eq(0.0))?.to_dtype(total.dtype()))?;
        total = tensor(total + still)?;
    } else {
        total = tensor(total + zero)?;
    }
    tensor(raw.broadcast_div(&total))
}

/// The columns of a field that are not all zero.
fn columns(f: &Tensor) -> Result<Vec<usize>> {
    let largest = tensor(tensor(f.abs())?.max(0))?;
    let largest = tensor(tensor(largest.to_dtype(DType::F64))?.to_vec1::<f64>())?;
    let nonzero = largest.iter().enumerate().filter(|(_, v)| **v != 0.0);
    Ok(nonzero.map(|(column, _)| column).collect())
}
