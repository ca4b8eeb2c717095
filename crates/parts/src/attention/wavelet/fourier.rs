//! The Fourier transform of a real sequence as one band of real and imaginary parts.

use lapidary_kernels::{Tensor, inverse_real_fft, real_fft};
use lapidary_signal::Mixing;

/// From `n` numbers to the real and then the imaginary parts of `n / 2 + 1` frequencies, divided by
/// `√n`; or the way back.
#[derive(Debug)]
pub(super) struct RealFourier {
    /// Batch and channels.
    rows: [usize; 2],
    length: usize,
    inverse: bool,
}

impl RealFourier {
    pub(super) fn of(batch: usize, channels: usize, length: usize) -> Self {
        Self {
            rows: [batch, channels],
            length,
            inverse: false,
        }
    }

    pub(super) fn back(batch: usize, channels: usize, length: usize) -> Self {
        Self {
            inverse: true,
            ..Self::of(batch, channels, length)
        }
    }
}

impl Mixing for RealFourier {
    fn sizes(&self) -> [usize; 4] {
        let [batch, channels] = self.rows;
        let parts = 2 * (self.length / 2 + 1);
        match self.inverse {
            false => [batch, channels, parts, self.length],
            true => [batch, channels, self.length, parts],
        }
    }

    fn mix(&self, values: &Tensor) -> lapidary_kernels::Result<Tensor> {
        let (batch, channels, _, width) = values.dims4()?;
        let (frequencies, root) = (self.length / 2 + 1, (self.length as f64).sqrt());
        // [batch, channels, width, places]: the transform is along the last dimension.
        let x = values.transpose(2, 3)?.contiguous()?;
        let y = match self.inverse {
            false => {
                let parts = real_fft(&x)?.transpose(3, 4)?.contiguous()?;
                (parts.reshape((batch, channels, width, 2 * frequencies))? / root)?
            }
            true => {
                let parts = x.reshape((batch, channels, width, 2, frequencies))?;
                let parts = parts.transpose(3, 4)?.contiguous()?;
                (inverse_real_fft(&parts, self.length)? * root)?
            }
        };
        Ok(y.transpose(2, 3)?.contiguous()?)
    }

    fn operations(&self, width: usize) -> u64 {
        let [batch, channels] = self.rows;
        // Half of the 5 n log₂ n of a complex transform.
        let each = 2.5 * self.length as f64 * (self.length as f64).log2().max(1.0);
        (batch * channels * width) as u64 * each as u64
    }
}
