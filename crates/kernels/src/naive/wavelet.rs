//! A level of a wavelet transform, tap by tap.

use crate::{Result, Tensor};

/// The first `count` averages and details `[2, batch, count, channels]` of `x`
/// `[batch, length, channels]` on a circle, by `filters` `[2, taps, channels]`.
pub fn wavelet_analysis(x: &Tensor, filters: &Tensor, count: usize) -> Result<Tensor> {
    let (batch, length, channels) = x.dims3()?;
    let taps = filters.dim(1)?;
    let x = x.contiguous()?;
    let mut halves = Vec::with_capacity(2);
    for side in 0..2 {
        let mut half = Tensor::zeros((batch, count, channels), x.dtype(), x.device())?;
        for tap in 0..taps {
            let met = x.index_select(&met_tokens(tap, count, length, &x)?, 1)?;
            let filter = filters.narrow(0, side, 1)?.narrow(1, tap, 1)?;
            half = (half + met.broadcast_mul(&filter)?)?;
        }
        halves.push(half);
    }
    Ok(Tensor::stack(&halves, 0)?)
}

/// The transposed map of [`wavelet_analysis`]: `[batch, length, channels]` for `halves`
/// `[2, batch, count, channels]`.
pub fn wavelet_synthesis(halves: &Tensor, filters: &Tensor, length: usize) -> Result<Tensor> {
    let (_, batch, count, channels) = halves.dims4()?;
    let taps = filters.dim(1)?;
    let mut x = Tensor::zeros((batch, length, channels), halves.dtype(), halves.device())?;
    for side in 0..2 {
        let half = halves.narrow(0, side, 1)?.squeeze(0)?;
        for tap in 0..taps {
            let filter = filters.narrow(0, side, 1)?.narrow(1, tap, 1)?;
            let spread = half.broadcast_mul(&filter)?.contiguous()?;
            x = x.index_add(&met_tokens(tap, count, length, &x)?, &spread, 1)?;
        }
    }
    Ok(x)
}

/// The token of a circle that a tap meets, for each coefficient.
fn met_tokens(tap: usize, count: usize, length: usize, like: &Tensor) -> Result<Tensor> {
    let tokens: Vec<u32> = (0..count)
        .map(|place| ((2 * place + tap) % length) as u32)
        .collect();
    Ok(Tensor::from_vec(tokens, count, like.device())?)
}
