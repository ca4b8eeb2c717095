//! Codes by kernels with anchors, with every distance laid out.

use crate::hashed_codes::LEAST;
use crate::{CodeHash, Result, Tensor};

/// `(κ − μ) Aᵀ` `[batch, heads, length, bits]`, whose signs are [`crate::hashed_codes`].
pub fn hash_arguments(x: &Tensor, kept: Option<&Tensor>, hash: &CodeHash) -> Result<Tensor> {
    let (batch, heads, length, _) = x.dims4()?;
    let (_, anchors, _) = hash.anchors.dims3()?;
    let lengths = x.sqr()?.sum_keepdim(3)?.maximum(LEAST * LEAST)?.sqrt()?;
    let units = x.contiguous()?.broadcast_div(&lengths)?;
    // [1, heads, anchors, width]
    let a = hash.anchors.detach().unsqueeze(0)?;
    let products = units.broadcast_matmul(&a.transpose(2, 3)?.contiguous()?)?;
    let squares = units.sqr()?.sum_keepdim(3)?;
    let squares = squares.broadcast_add(&a.sqr()?.sum_keepdim(3)?.transpose(2, 3)?)?;
    // [batch, heads, length, anchors]
    let distances = (squares - (products * 2.0)?)?.maximum(0.0)?;
    let bandwidths = match &hash.bandwidths {
        Some(fitted) => fitted.detach().reshape((1, heads, 1, 1))?,
        None => {
            let kept = match kept {
                Some(kept) => kept.detach(),
                None => Tensor::ones((batch, 1, length, 1), x.dtype(), x.device())?,
            };
            let count = (kept.sum_keepdim(2)?.maximum(1.0)? * anchors as f64)?;
            let sums = distances.broadcast_mul(&kept)?.sum_keepdim(3)?;
            sums.sum_keepdim(2)?.broadcast_div(&count)?
        }
    };
    let rates = (bandwidths * 2.0)?.maximum(LEAST)?.recip()?;
    let kernels = distances.broadcast_mul(&rates)?.neg()?.exp()?;
    let means = hash.means.detach().reshape((1, heads, 1, anchors))?;
    let across = hash.hashes.detach().transpose(1, 2)?.unsqueeze(0)?;
    Ok(kernels
        .broadcast_sub(&means)?
        .broadcast_matmul(&across.contiguous()?)?)
}

/// `1` from zero on and `−1` below; a gradient passes where `x` is below 1 in size.
pub fn passing_signs(x: &Tensor) -> Result<Tensor> {
    let above = x.detach().ge(0.0)?.to_dtype(x.dtype())?;
    let signs = above.affine(2.0, -1.0)?;
    if !x.track_op() {
        return Ok(signs);
    }
    let near = x.detach().abs()?.lt(1.0)?.to_dtype(x.dtype())?;
    let passes = (x * near)?;
    // Nothing in value.
    Ok((signs + (&passes - passes.detach())?)?)
}

/// [`crate::hashed_codes`].
pub fn hashed_codes(x: &Tensor, kept: Option<&Tensor>, hash: &CodeHash) -> Result<Tensor> {
    passing_signs(&hash_arguments(x, kept, hash)?)
}

/// [`crate::hashed_features`].
pub fn hashed_features(
    x: &Tensor,
    kept: Option<&Tensor>,
    hash: &CodeHash,
    offset: f64,
) -> Result<[Tensor; 2]> {
    features(&hashed_codes(x, kept, hash)?, kept, offset)
}

/// `[b, offset]` and `[b, 1]`, the second times `kept`.
fn features(codes: &Tensor, kept: Option<&Tensor>, offset: f64) -> Result<[Tensor; 2]> {
    let one = codes.narrow(3, 0, 1)?.ones_like()?;
    let queries = Tensor::cat(&[codes, &(&one * offset)?], 3)?;
    let keys = Tensor::cat(&[codes, &one], 3)?;
    let keys = match kept {
        Some(kept) => keys.broadcast_mul(&kept.detach())?,
        None => keys,
    };
    Ok([queries, keys])
}

/// [`crate::code_means`].
pub fn code_means(
    codes: &Tensor,
    v: &Tensor,
    kept: Option<&Tensor>,
    offset: f64,
) -> Result<Tensor> {
    let [queries, keys] = features(codes, kept, offset)?;
    super::linear_means(&queries, &keys, v, 0.0, false)
}
