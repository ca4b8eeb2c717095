//! Analysis and synthesis along the sequence, each channel with its own filters, written in the
//! operations of signals: every lens looks through them.

use super::{Boundary, Convolution};
use crate::Result;
use crate::error::tensor;
use lapidary_kernels::{Activation, Tensor};
use lapidary_signal::Signal;

/// A pair of filters, from the low-pass one `[taps, channels]` by conjugate quadrature:
/// `hi_i = (−1)^{i+1} lo_{w−1−i}`.
#[derive(Clone, Debug)]
pub struct FilterBank {
    low: Tensor,
    high: Tensor,
    boundary: Boundary,
    convolution: Convolution,
}

/// The two halves that a level makes of a signal.
#[derive(Clone, Debug)]
pub struct Halves {
    /// Averages, `[batch, channels, half]`.
    pub low: Signal,
    /// Details, `[batch, channels, half]`.
    pub high: Signal,
}

impl Halves {
    /// Both, laid out channel by channel.
    pub(super) fn contiguous(&self) -> Result<Self> {
        Ok(Self {
            low: self.low.contiguous()?,
            high: self.high.contiguous()?,
        })
    }
}

impl FilterBank {
    /// From `low` `[taps, channels]`, an even number of taps.
    ///
    /// # Errors
    /// Those of the tensor engine.
    pub fn new(low: Tensor, boundary: Boundary, convolution: Convolution) -> Result<Self> {
        let taps = tensor(low.dim(0))?;
        let signs: Vec<f64> = (0..taps)
            .map(|i| if i.is_multiple_of(2) { -1.0 } else { 1.0 })
            .collect();
        let signs = tensor(Tensor::from_vec(signs, (taps, 1), low.device()))?;
        let mirrored = flipped(&low, 0)?;
        let high = tensor(mirrored.broadcast_mul(&tensor(signs.to_dtype(low.dtype()))?))?;
        Ok(Self {
            low,
            high,
            boundary,
            convolution,
        })
    }

    /// The low-pass filters and then the high-pass ones, `[2, taps, channels]`.
    ///
    /// # Errors
    /// Those of the tensor engine.
    pub fn filters(&self) -> Result<Tensor> {
        tensor(Tensor::stack(&[&self.low, &self.high], 0))
    }

    fn taps(&self) -> usize {
        self.low.dims().first().copied().unwrap_or(2)
    }

    /// Zeros or reflections beyond each end of a signal, where the boundary is not periodic.
    fn reach(&self) -> usize {
        (2 * self.taps() - 3) / 2
    }

    /// `a_m = Σ_t lo_t x_{2m+t}` and the same with `hi`, for `x` `[batch, channels, length]` of an even
    /// length where the boundary is periodic.
    ///
    /// # Errors
    /// Those of the tensor engine.
    pub fn analyse(&self, x: &Signal) -> Result<Halves> {
        let x = match self.boundary {
            Boundary::Periodised => x.clone(),
            Boundary::Reflect => {
                let (_, _, length) = tensor(x.value().dims3())?;
                let reach = self.reach();
                let right = reach + length % 2;
                let places = (0..reach + length + right)
                    .map(|place| reflected(place as i64 - reach as i64, length));
                x.select(2, &listed(places, x)?)?
            }
        };
        match self.convolution {
            Convolution::Direct => self.analyse_by_taps(&x),
            Convolution::Fourier => self.analyse_by_transforms(&x),
        }
    }

    /// Tap by tap, channels side by side.
    fn analyse_by_taps(&self, x: &Signal) -> Result<Halves> {
        let tokens = x.transpose(1, 2)?.contiguous()?;
        let (_, length, _) = tensor(tokens.value().dims3())?;
        let count = match self.boundary {
            Boundary::Periodised => length / 2,
            Boundary::Reflect => (length / 2).saturating_sub(self.beyond()),
        };
        let halves = tokens.wavelet_analysis(&self.filters()?, count)?;
        let half = |which: usize| -> Result<Signal> {
            Ok(halves.narrow(0, which, 1)?.squeeze(0)?.transpose(1, 2)?)
        };
        Ok(Halves {
            low: half(0)?,
            high: half(1)?,
        })
    }

    fn analyse_by_transforms(&self, x: &Signal) -> Result<Halves> {
        let (even, odd) = apart(&x.contiguous()?)?;
        let (even, odd) = (self.reaching_behind(&even)?, self.reaching_behind(&odd)?);
        let half = |filter: &Tensor| -> Result<Signal> {
            let from_even = self.correlate(&even, &phase(filter, 0)?)?;
            Ok(from_even.add(&self.correlate(&odd, &phase(filter, 1)?)?)?)
        };
        Ok(Halves {
            low: half(&self.low)?,
            high: half(&self.high)?,
        })
    }

    /// The transposed map, to `length` numbers: the inverse where the filters are orthonormal and the
    /// boundary is periodic.
    ///
    /// # Errors
    /// Those of the tensor engine.
    pub fn synthesise(&self, halves: &Halves, length: usize) -> Result<Signal> {
        let x = match self.convolution {
            Convolution::Direct => self.synthesise_by_taps(halves)?,
            Convolution::Fourier => self.synthesise_by_transforms(&halves.contiguous()?)?,
        };
        let start = match self.boundary {
            Boundary::Periodised => 0,
            Boundary::Reflect => self.reach(),
        };
        Ok(x.narrow(2, start, length)?)
    }

    /// All numbers that the filters reach, `[batch, channels, length]`.
    fn synthesise_by_taps(&self, halves: &Halves) -> Result<Signal> {
        let (_, _, count) = tensor(halves.low.value().dims3())?;
        let length = match self.boundary {
            Boundary::Periodised => 2 * count,
            Boundary::Reflect => 2 * (count + self.beyond()),
        };
        let side = |half: &Signal| -> Result<Signal> { Ok(half.transpose(1, 2)?.unsqueeze(0)?) };
        let both = Signal::concatenate(&[side(&halves.low)?, side(&halves.high)?], 0)?;
        let tokens = both.wavelet_synthesis(&self.filters()?, length)?;
        Ok(tokens.transpose(1, 2)?)
    }

    fn synthesise_by_transforms(&self, halves: &Halves) -> Result<Signal> {
        let low = self.reaching_before(&halves.low)?;
        let high = self.reaching_before(&halves.high)?;
        let side = |which: usize| -> Result<Signal> {
            let from_low = self.spread(&low, &phase(&self.low, which)?)?;
            Ok(from_low.add(&self.spread(&high, &phase(&self.high, which)?)?)?)
        };
        woven(&side(0)?, &side(1)?)
    }

    /// Places beyond an end of a half that a filter's every second tap reaches.
    fn beyond(&self) -> usize {
        (self.taps() / 2).saturating_sub(1)
    }

    /// A half with what is correlated beyond its end.
    fn reaching_behind(&self, x: &Signal) -> Result<Signal> {
        match self.boundary {
            Boundary::Periodised => around(x, 0, self.beyond()),
            Boundary::Reflect => Ok(x.clone()),
        }
    }

    /// A half with what is spread from beyond its end: from before its beginning on a circle.
    fn reaching_before(&self, x: &Signal) -> Result<Signal> {
        match (self.boundary, self.beyond()) {
            (Boundary::Periodised, before) => around(x, before, 0),
            (Boundary::Reflect, 0) => Ok(x.clone()),
            (Boundary::Reflect, behind) => {
                let (batch, channels, _) = tensor(x.value().dims3())?;
                let zeros = Tensor::zeros((batch, channels, behind), x.dtype(), x.device());
                let zeros = Signal::from(tensor(zeros)?);
                Ok(Signal::concatenate(&[x.clone(), zeros], 2)?)
            }
        }
    }

    /// `y_m = Σ_s k_s x_{m+s}` for `kernel` `[channels, taps]`, of what [`FilterBank::reaching_behind`] gives.
    fn correlate(&self, x: &Signal, kernel: &Tensor) -> Result<Signal> {
        let (_, _, length) = tensor(x.value().dims3())?;
        let behind = self.beyond();
        let y = x.fft_convolution(&flipped(kernel, 1)?)?;
        Ok(y.narrow(2, behind, length - behind)?)
    }

    /// `y_m = Σ_s k_s x_{m−s}`, of what [`FilterBank::reaching_before`] gives.
    fn spread(&self, x: &Signal, kernel: &Tensor) -> Result<Signal> {
        let y = x.fft_convolution(kernel)?;
        match self.boundary {
            Boundary::Periodised => {
                let (_, _, length) = tensor(x.value().dims3())?;
                let before = self.beyond();
                Ok(y.narrow(2, before, length - before)?)
            }
            Boundary::Reflect => Ok(y),
        }
    }
}

/// Lifting with fixed weights:
/// `d_k = odd_k − ½ (even_k + even_{k+1})`, `a_k = even_k + ¼ (d_{k−1} + d_k)`.
///
/// # Errors
/// Those of the tensor engine.
pub fn lift(x: &Signal) -> Result<Halves> {
    let (even, odd) = apart(x)?;
    let high = odd.add(&predicted(&even)?.scale(-1.0)?)?;
    let low = even.add(&updated(&high)?)?;
    Ok(Halves { low, high })
}

/// The way back of [`lift`].
///
/// # Errors
/// Those of the tensor engine.
pub fn unlift(halves: &Halves) -> Result<Signal> {
    let even = halves.low.add(&updated(&halves.high)?.scale(-1.0)?)?;
    let odd = halves.high.add(&predicted(&even)?)?;
    woven(&even, &odd)
}

fn predicted(even: &Signal) -> Result<Signal> {
    Ok(even.add(&turned(even, 1)?)?.scale(0.5)?)
}

fn updated(high: &Signal) -> Result<Signal> {
    Ok(high.add(&turned(high, -1)?)?.scale(0.25)?)
}

/// Filters `p` and `u` `[channels, taps]` of a lifting that learns what it predicts and updates by:
/// `d = odd − ½ SiLU(even ⋆ p)`, `a = even + ¼ SiLU(d ⋆ u)`, invertible whatever they are.
#[derive(Clone, Debug)]
pub struct Lifting {
    /// `p`.
    pub predict: Tensor,
    /// `u`.
    pub update: Tensor,
}

impl Lifting {
    /// The two halves of `x` `[batch, channels, length]`, of an even length.
    ///
    /// # Errors
    /// Those of the tensor engine.
    pub fn lift(&self, x: &Signal) -> Result<Halves> {
        let (even, odd) = apart(x)?;
        let high = odd.add(&bent(&even, &self.predict)?.scale(-0.5)?)?;
        let low = even.add(&bent(&high, &self.update)?.scale(0.25)?)?;
        Ok(Halves { low, high })
    }

    /// The way back of [`Lifting::lift`].
    ///
    /// # Errors
    /// Those of the tensor engine.
    pub fn unlift(&self, halves: &Halves) -> Result<Signal> {
        let updated = bent(&halves.high, &self.update)?;
        let even = halves.low.add(&updated.scale(-0.25)?)?;
        let predicted = bent(&even, &self.predict)?;
        let odd = halves.high.add(&predicted.scale(0.5)?)?;
        woven(&even, &odd)
    }
}

/// `SiLU(x ⋆ k)`, the correlation circular and about each place: `Σ_s k_s x_{m+s−⌊(taps−1)/2⌋}`.
fn bent(x: &Signal, kernel: &Tensor) -> Result<Signal> {
    let (_, _, length) = tensor(x.value().dims3())?;
    let reach = tensor(kernel.dim(1))? - 1;
    let before = reach / 2;
    let wide = around(x, before, reach - before)?;
    let y = wide.depthwise_convolution(kernel, None)?;
    Ok(y.narrow(2, reach, length)?.activate(Activation::Silu)?)
}

/// Even and odd places of `[batch, channels, length]`.
fn apart(x: &Signal) -> Result<(Signal, Signal)> {
    let (batch, channels, length) = tensor(x.value().dims3())?;
    let pairs = x.reshape(&[batch, channels, length / 2, 2])?;
    let side = |which: usize| -> Result<Signal> {
        Ok(pairs.narrow(3, which, 1)?.squeeze(3)?.contiguous()?)
    };
    Ok((side(0)?, side(1)?))
}

/// The way back of [`apart`].
fn woven(even: &Signal, odd: &Signal) -> Result<Signal> {
    let (batch, channels, half) = tensor(even.value().dims3())?;
    let pairs = Signal::concatenate(&[even.unsqueeze(3)?, odd.unsqueeze(3)?], 3)?;
    Ok(pairs.reshape(&[batch, channels, 2 * half])?)
}

/// A signal on a circle with so many of its numbers again before and behind it.
fn around(x: &Signal, before: usize, behind: usize) -> Result<Signal> {
    if before + behind == 0 {
        return Ok(x.clone());
    }
    let (_, _, length) = tensor(x.value().dims3())?;
    let places = (0..before + length + behind)
        .map(|place| (place as i64 - before as i64).rem_euclid(length.max(1) as i64) as u32);
    Ok(x.select(2, &listed(places, x)?)?)
}

/// `y_k = x_{k+by}` on a circle.
fn turned(x: &Signal, by: i64) -> Result<Signal> {
    let (_, _, length) = tensor(x.value().dims3())?;
    let places = (0..length as i64).map(|k| (k + by).rem_euclid(length.max(1) as i64) as u32);
    Ok(x.select(2, &listed(places, x)?)?)
}

/// The place that a reflection at both ends takes `place` to.
fn reflected(place: i64, length: usize) -> u32 {
    let period = (2 * length as i64 - 2).max(1);
    let place = place.rem_euclid(period);
    place.min(period - place).min(length as i64 - 1) as u32
}

fn listed(places: impl Iterator<Item = u32>, like: &Signal) -> Result<Tensor> {
    let places: Vec<u32> = places.collect();
    let count = places.len();
    tensor(Tensor::from_vec(places, count, like.device()))
}

/// Every second tap of `filter` `[taps, channels]`, `[channels, taps / 2]`.
fn phase(filter: &Tensor, which: usize) -> Result<Tensor> {
    let (taps, channels) = tensor(filter.dims2())?;
    let pairs = tensor(tensor(filter.contiguous())?.reshape((taps / 2, 2, channels)))?;
    let one = tensor(tensor(pairs.narrow(1, which, 1))?.squeeze(1))?;
    tensor(tensor(one.t())?.contiguous())
}

fn flipped(x: &Tensor, dim: usize) -> Result<Tensor> {
    let length = tensor(x.dim(dim))?;
    let places: Vec<u32> = (0..length as u32).rev().collect();
    let places = tensor(Tensor::from_vec(places, length, x.device()))?;
    tensor(tensor(x.contiguous())?.index_select(&places, dim))
}
