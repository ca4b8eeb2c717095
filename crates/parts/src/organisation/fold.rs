//! Cutting sequences into groups that a block sees as sequences of their own.

use crate::Result;
use crate::error::tensor;
use lapidary_kernels::{DType, Tensor};
use lapidary_signal::Signal;

/// A sequence `[batch, length, width]` as `[batch · groups, size, width]`, zeros added at its end
/// where the last group is not full.
pub(super) fn fold(x: &Signal, size: usize) -> Result<Signal> {
    let (batch, length, width) = tensor(x.value().dims3())?;
    let groups = length.div_ceil(size);
    let x = lengthened(x, groups * size)?;
    Ok(x.reshape(&[batch * groups, size, width])?)
}

/// The way back of [`fold`], to so many tokens.
pub(super) fn unfold(x: &Signal, batch: usize, length: usize) -> Result<Signal> {
    let (rows, size, width) = tensor(x.value().dims3())?;
    let full = rows / batch.max(1) * size;
    let x = x.reshape(&[batch, full, width])?;
    match full == length {
        true => Ok(x),
        false => Ok(x.narrow(1, 0, length)?),
    }
}

/// Zeros behind the tokens, until there are `length`.
pub(super) fn lengthened(x: &Signal, length: usize) -> Result<Signal> {
    let (batch, tokens, width) = tensor(x.value().dims3())?;
    if tokens == length {
        return Ok(x.clone());
    }
    let zeros = Tensor::zeros(
        (batch, length.saturating_sub(tokens), width),
        x.dtype(),
        x.device(),
    );
    Ok(Signal::concatenate(
        &[x.clone(), Signal::from(tensor(zeros)?)],
        1,
    )?)
}

/// A mask `[batch, length]` as `[batch · groups, size]`; none where nothing is masked and every
/// group is full.
pub(super) fn fold_mask(
    keep: Option<&Tensor>,
    [batch, length, size]: [usize; 3],
    like: &Signal,
) -> Result<Option<Tensor>> {
    let groups = length.div_ceil(size);
    let keep = match keep {
        Some(keep) => tensor(keep.to_dtype(DType::U8))?,
        None if length == groups * size => return Ok(None),
        None => tensor(Tensor::ones((batch, length), DType::U8, like.device()))?,
    };
    let missing = groups * size - length;
    let keep = match missing {
        0 => keep,
        _ => {
            let pads = tensor(Tensor::zeros((batch, missing), DType::U8, like.device()))?;
            tensor(Tensor::cat(&[&keep, &pads], 1))?
        }
    };
    Ok(Some(tensor(
        tensor(keep.contiguous())?.reshape((batch * groups, size)),
    )?))
}
