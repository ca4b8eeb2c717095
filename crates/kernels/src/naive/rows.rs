//! Rows that are read, pooled, moved and put behind one another.

use crate::{D, Error, Result, RowPooling, RowSums, Tensor};

/// Rows of `x` `[rows, width]` in each list, those up to its one of `ends`, as one: `[lists, width]`.
pub fn pooled_rows(
    x: &Tensor,
    rows: &[u32],
    ends: &[usize],
    pooling: RowPooling,
) -> Result<Tensor> {
    if ends.is_empty() {
        return Ok(x.narrow(0, 0, 0)?);
    }
    let x = x.contiguous()?;
    let mut start = 0;
    let mut pooled = Vec::with_capacity(ends.len());
    for &end in ends {
        if start == end {
            pooled.push(Tensor::zeros((1, x.dim(1)?), x.dtype(), x.device())?);
            continue;
        }
        let list = Tensor::from_slice(&rows[start..end], end - start, x.device())?;
        let list = x.index_select(&list, 0)?;
        pooled.push(match pooling {
            RowPooling::Maximum => list.max_keepdim(0)?,
            RowPooling::Sum => list.sum_keepdim(0)?,
            RowPooling::Mean => list.mean_keepdim(0)?,
        });
        start = end;
    }
    Ok(Tensor::cat(&pooled, 0)?)
}

/// `y + w (y − x)` for each row of `after` and `before` `[.., width]`, the change a constant.
pub fn weighted_change(after: &Tensor, before: &Tensor, weights: &Tensor) -> Result<Tensor> {
    let change = (after.detach() - before.detach())?;
    let weights = weights.unsqueeze(D::Minus1)?;
    Ok((after + change.broadcast_mul(&weights)?)?)
}

/// `x` `[batch, length, heads · width]` with the number of its token in `feature` `[batch, length]` behind the
/// features of each head.
pub fn beside_feature(x: &Tensor, feature: &Tensor, heads: usize) -> Result<Tensor> {
    let (batch, length, width) = x.dims3()?;
    let split = x.reshape((batch, length, heads, width / heads))?;
    let each = feature.reshape((batch, length, 1, 1))?;
    let each = each.broadcast_as((batch, length, heads, 1))?.contiguous()?;
    Ok(Tensor::cat(&[&split, &each], 3)?.reshape((batch, length, width + heads))?)
}

/// The rows that `sums` says of `sources` `[.., width]`: those of each weighted and added where they belong.
pub fn summed_rows(sources: &[&Tensor], sums: &RowSums) -> Result<Tensor> {
    let Some(first) = sources.first() else {
        return Err(Error::argument("summed rows", "sources", 0, "at least 1"));
    };
    let (width, dtype, device) = (first.dim(D::Minus1)?, first.dtype(), first.device());
    let mut y = Tensor::zeros((sums.len(), width), dtype, device)?;
    for (source, x) in sources.iter().enumerate() {
        let (mut rows, mut places, mut weights) = (Vec::new(), Vec::new(), Vec::new());
        for (terms, place) in sums.rows().zip(0u32..) {
            for term in terms.iter().filter(|term| term.source == source) {
                rows.push(term.row);
                places.push(place);
                weights.push(term.weight);
            }
        }
        let count = rows.len();
        if count == 0 {
            continue;
        }
        let rows = Tensor::from_vec(rows, count, device)?;
        let places = Tensor::from_vec(places, count, device)?;
        let weights = Tensor::from_vec(weights, (count, 1), device)?.to_dtype(dtype)?;
        let picked = x
            .contiguous()?
            .reshape(((), width))?
            .index_select(&rows, 0)?;
        y = y.index_add(&places, &picked.broadcast_mul(&weights)?, 0)?;
    }
    Ok(y)
}

/// Rows of `more` `[rows, width]` behind those of `x` `[.., width]`.
pub fn appended_rows(x: &Tensor, more: &Tensor) -> Result<Tensor> {
    let width = more.dim(D::Minus1)?;
    Ok(Tensor::cat(&[&x.reshape(((), width))?, more], 0)?)
}
