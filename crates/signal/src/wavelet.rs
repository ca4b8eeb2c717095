//! A level of a wavelet transform along tokens, and the way back.

use crate::error::tensor;
use crate::streams::Change;
use crate::{Result, Signal};
use lapidary_kernels::{Tensor, wavelet_analysis, wavelet_synthesis};

impl Signal {
    /// The first `count` averages and details `[2, batch, count, channels]` of this signal
    /// `[batch, length, channels]` on a circle of an even length, by `filters` `[2, taps, channels]`.
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn wavelet_analysis(&self, filters: &Tensor, count: usize) -> Result<Self> {
        let value = self.mapped_value(|value| Ok(wavelet_analysis(value, filters, count)?))?;
        let taps = tensor(filters.dim(1))? as u64;
        self.count(2 * taps, &[&self.value, filters], &value);
        let analyse = |t: &Tensor, shift: usize| -> Result<Tensor> {
            if shift == 0 {
                return Ok(wavelet_analysis(t, filters, count)?);
            }
            // Streams stand before everything else, the two sides included.
            let (streams, batch) = (tensor(t.dim(0))?, tensor(t.dim(1))?);
            let folded = wavelet_analysis(&tensor(t.flatten(0, 1))?, filters, count)?;
            let channels = tensor(t.dim(3))?;
            let apart = tensor(folded.reshape((2, streams, batch, count, channels)))?;
            tensor(tensor(apart.transpose(0, 1))?.contiguous())
        };
        self.linear_map(&self.value, value, Change::Other, &analyse, |_| None)
    }

    /// The transposed map of [`Signal::wavelet_analysis`]: `[batch, length, channels]` of this signal
    /// `[2, batch, count, channels]`.
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn wavelet_synthesis(&self, filters: &Tensor, length: usize) -> Result<Self> {
        let value = self.mapped_value(|value| Ok(wavelet_synthesis(value, filters, length)?))?;
        // Half of the taps of either side meet a token.
        let taps = tensor(filters.dim(1))? as u64;
        self.count(2 * taps, &[&self.value, filters], &value);
        let synthesise = |t: &Tensor, shift: usize| -> Result<Tensor> {
            if shift == 0 {
                return Ok(wavelet_synthesis(t, filters, length)?);
            }
            let (streams, batch) = (tensor(t.dim(0))?, tensor(t.dim(2))?);
            let channels = tensor(t.dim(4))?;
            let sides = tensor(tensor(t.transpose(0, 1))?.contiguous())?;
            let folded = wavelet_synthesis(&tensor(sides.flatten(1, 2))?, filters, length)?;
            tensor(folded.reshape((streams, batch, length, channels)))
        };
        self.linear_map(&self.value, value, Change::Other, &synthesise, |_| None)
    }
}
