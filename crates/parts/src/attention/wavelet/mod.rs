//! Wavelet space attention (Zhuang et al., WavSpA: Wavelet Space Attention for Boosting Transformers'
//! Long Sequence Learning Ability, 2022, arXiv 2210.01989): a discrete wavelet transform along the
//! sequence, a mixer of its own for each band of coefficients, and the inverse transform.
//!
//! ```text
//! a_m = Σ_t lo_t x_{2m+t}, d_m = Σ_t hi_t x_{2m+t}     each channel by filters of its own
//! [a_J, d_J, …, d_1]                                   J levels: a is transformed again
//! y = inverse([A_J(a_J), B_J(d_J), …, B_1(d_1)])
//! ```
//!
//! By default the transform is on a circle (*periodised*): zeros are added up to a multiple of `2^J`, and
//! orthonormal filters make an orthogonal matrix, whose transpose is the inverse. With *reflect* the
//! sequence is reflected at its ends, as in the published code, and the inverse is none near them.
//!
//! Filters are fixed (Daubechies, symlets, coiflets), free (starting there, from a sinusoid or from
//! normal numbers), or orthonormal for all parameters: with `w / 2` angles a channel, `S` the cyclic shift of
//! `w` places and `R(θ)` blocks `[[sin θ, cos θ], [cos θ, −sin θ]]`,
//! `lo = e₁ᵀ R(θ₁) S R(θ₂) S … R(θ_L) S S⁻¹`. Or there are none, and lifting steps instead, whose inverse
//! is exact whatever they predict by ([`transform`]). A Fourier transform, whose coefficients are all one
//! band of real and imaginary parts, is there to compare with.
//!
//! A coefficient is made of several tokens, later ones too: there is no causal form. Pads are zeroed
//! before the transform, and mixed with what is real by it: coefficients are not masked unless the spec
//! says so. Within the orthogonal matrix pads reach the filters' length and no further, but the mixers of
//! the bands see all coefficients.
//!
//! Cost beside the mixers: `4 w` operations for each number and level of either direction, `N / 2^j`
//! numbers at level `j`. Dense attention in two bands has half of the pairs of a query and a key.
//! Parameters: `w width` for free filters, `w width / 2` for angles, `2 w width` for a learned lifting.

mod coiflets;
pub mod filters;
mod fourier;
mod spec;
pub mod transform;

pub use spec::{Base, Boundary, Convolution, Family, WaveletSpec};

use super::{Mixer, MixerSpec};
use crate::error::tensor;
use crate::parameters::{Init, Parameters};
use crate::{Context, Error, Result};
use fourier::RealFourier;
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_signal::Signal;
use transform::{FilterBank, Halves, Lifting, lift, unlift};

/// Where the filters of a pass come from.
#[derive(Debug)]
enum Source {
    /// Taps that all channels share.
    Fixed(Vec<f64>),
    /// `[taps, width]`, added to taps that all channels share.
    Adaptive(Option<Vec<f64>>, Tensor),
    /// `[taps / 2 · width]`.
    Angles(Tensor),
    Lifting,
    /// `p` and `u`, `[taps, width]`.
    AdaptiveLifting([Tensor; 2]),
    Fourier,
}

/// The transform of one pass, its filters laid out.
#[derive(Debug)]
enum Transform {
    Filters(FilterBank),
    Lifting,
    AdaptiveLifting(Lifting),
}

/// Coefficients of a sequence.
#[derive(Clone, Debug)]
pub struct Coefficients {
    /// `[a_J, d_J, …, d_1]`, each `[batch, coefficients, width]`.
    pub bands: Vec<Signal>,
    /// Tokens, and numbers before each level, the first level's first.
    lengths: Vec<usize>,
}

/// A mixer in the space of wavelet coefficients, with its parameters.
#[derive(Debug)]
pub struct Wavelet {
    path: String,
    spec: WaveletSpec,
    width: usize,
    source: Source,
    bands: Vec<Mixer>,
}

impl Wavelet {
    /// Builds the mixer for tokens of `width`.
    ///
    /// # Errors
    /// When a parameter cannot be had.
    pub fn new(spec: &WaveletSpec, width: usize, mut parameters: Parameters<'_>) -> Result<Self> {
        let path = parameters.path().to_owned();
        let shape = [spec.taps, width];
        let source = match spec.family {
            _ if spec.levels == 0 => Source::Lifting,
            Family::Fixed => Source::Fixed(filters::base(spec.base, spec.taps).unwrap_or_default()),
            Family::Adaptive => {
                let base = filters::base(spec.base, spec.taps);
                // What is learned is how far a filter is from its start.
                let start = match base {
                    Some(_) => Init::Zeros,
                    None => Init::Normal {
                        deviation: 1.0 / (spec.taps as f64).sqrt(),
                    },
                };
                Source::Adaptive(base, parameters.tensor("filters", &shape, start)?)
            }
            Family::Orthogonal => {
                // In one row, so that nobody takes it for a matrix of weights that should decay.
                let turn = Init::Uniform {
                    low: 0.0,
                    high: 2.0 * std::f64::consts::PI,
                };
                let angles = spec.taps / 2 * width;
                Source::Angles(parameters.tensor("angles", &[angles], turn)?)
            }
            Family::Lifting => Source::Lifting,
            Family::AdaptiveLifting => {
                let narrow = Init::Normal { deviation: 0.02 };
                Source::AdaptiveLifting([
                    parameters.tensor("predict", &shape, narrow)?,
                    parameters.tensor("update", &shape, narrow)?,
                ])
            }
            Family::Fourier => Source::Fourier,
        };
        let mut bands = Vec::with_capacity(spec.bands());
        for index in 0..spec.bands() {
            let mut own = parameters.at("bands");
            bands.extend(Mixer::new(&spec.inner, width, own.at(index))?);
        }
        Ok(Self {
            path,
            spec: spec.clone(),
            width,
            source,
            bands,
        })
    }

    /// The low-pass filters, `[taps, width]`, for families that have some.
    ///
    /// # Errors
    /// Those of the tensor engine.
    pub fn low_pass(&self, dtype: DType, device: &Device) -> Result<Option<Tensor>> {
        let taps = self.spec.taps;
        let shared = |taps: &[f64]| -> Result<Tensor> {
            let column = Tensor::from_vec(taps.to_vec(), (taps.len(), 1), device);
            let column = tensor(tensor(column)?.to_dtype(dtype))?;
            tensor(column.broadcast_as((taps.len(), self.width)))
        };
        Ok(match &self.source {
            Source::Fixed(base) => Some(tensor(shared(base)?.contiguous())?),
            Source::Adaptive(Some(base), change) => Some(tensor(shared(base)? + change)?),
            Source::Adaptive(None, filters) => Some(filters.clone()),
            Source::Angles(angles) => {
                let angles = tensor(angles.reshape((taps / 2, self.width)))?;
                Some(orthonormal(&angles)?)
            }
            Source::Lifting | Source::AdaptiveLifting(_) | Source::Fourier => None,
        })
    }

    fn transform(&self, like: &Signal) -> Result<Transform> {
        if let Some(low) = self.low_pass(like.dtype(), like.device())? {
            let bank = FilterBank::new(low, self.spec.boundary, self.spec.convolution)?;
            return Ok(Transform::Filters(bank));
        }
        let by_channel = |filter: &Tensor| tensor(tensor(filter.t())?.contiguous());
        Ok(match &self.source {
            Source::AdaptiveLifting([predict, update]) => Transform::AdaptiveLifting(Lifting {
                predict: by_channel(predict)?,
                update: by_channel(update)?,
            }),
            _ => Transform::Lifting,
        })
    }

    /// The coefficients of `x` `[batch, length, width]`.
    ///
    /// # Errors
    /// Those of the tensor engine.
    pub fn analyse(&self, x: &Signal) -> Result<Coefficients> {
        let (batch, length, width) = tensor(x.value().dims3())?;
        let mut lengths = vec![length];
        if self.spec.family == Family::Fourier {
            let transform = RealFourier::of(batch, width, length);
            return Ok(Coefficients {
                bands: vec![along_sequence(x, &transform)?],
                lengths,
            });
        }
        if self.spec.levels == 0 {
            return Ok(Coefficients {
                bands: vec![x.clone()],
                lengths,
            });
        }
        let transform = self.transform(x)?;
        // Channels first in name only: who wants them so lays them out.
        let mut low = self.filled(x)?.transpose(1, 2)?;
        let mut bands = Vec::with_capacity(self.spec.bands());
        for _ in 0..self.spec.levels {
            lengths.push(tensor(low.value().dim(2))?);
            let halves = match &transform {
                Transform::Filters(bank) => bank.analyse(&low)?,
                Transform::Lifting => lift(&low.contiguous()?)?,
                Transform::AdaptiveLifting(lifting) => lifting.lift(&low.contiguous()?)?,
            };
            bands.push(halves.high);
            low = halves.low;
        }
        bands.push(low);
        bands.reverse();
        let tokens = bands
            .iter()
            .map(|band| Ok(band.transpose(1, 2)?.contiguous()?))
            .collect::<Result<Vec<_>>>()?;
        Ok(Coefficients {
            bands: tokens,
            lengths,
        })
    }

    /// Zeros behind the tokens up to a multiple of `2^J`, where the transform is on a circle.
    fn filled(&self, x: &Signal) -> Result<Signal> {
        let (batch, length, width) = tensor(x.value().dims3())?;
        let missing = match self.spec.boundary {
            Boundary::Periodised => self.padded(length) - length,
            Boundary::Reflect => 0,
        };
        if missing == 0 {
            return Ok(x.clone());
        }
        let zeros = Tensor::zeros((batch, missing, width), x.dtype(), x.device());
        let zeros = Signal::from(tensor(zeros)?);
        Ok(Signal::concatenate(&[x.clone(), zeros], 1)?)
    }

    fn padded(&self, length: usize) -> usize {
        length.next_multiple_of(1 << self.spec.levels)
    }

    /// The way back of [`Wavelet::analyse`], as far as there is one: `[batch, length, width]`.
    ///
    /// # Errors
    /// When there are other bands than that gives.
    pub fn synthesise(&self, coefficients: &Coefficients) -> Result<Signal> {
        let (Some(first), Some(&length)) =
            (coefficients.bands.first(), coefficients.lengths.first())
        else {
            return Err(Error::spec("bands", 0, "at least 1"));
        };
        let (batch, _, width) = tensor(first.value().dims3())?;
        if self.spec.family == Family::Fourier {
            let transform = RealFourier::back(batch, width, length);
            return along_sequence(first, &transform);
        }
        if self.spec.levels == 0 {
            return Ok(first.clone());
        }
        let transform = self.transform(first)?;
        let mut low = first.transpose(1, 2)?;
        let before = coefficients.lengths.iter().skip(1).rev();
        for (band, &length) in coefficients.bands.iter().skip(1).zip(before) {
            let halves = Halves {
                low,
                high: band.transpose(1, 2)?,
            };
            low = match &transform {
                Transform::Filters(bank) => bank.synthesise(&halves, length)?,
                Transform::Lifting => unlift(&halves.contiguous()?)?,
                Transform::AdaptiveLifting(lifting) => lifting.unlift(&halves.contiguous()?)?,
            };
        }
        let x = low.transpose(1, 2)?.contiguous()?;
        Ok(x.narrow(1, 0, length)?)
    }

    /// Mixes the tokens of `x` `[batch, length, width]`.
    ///
    /// # Errors
    /// In a decoding step, and where scores of keys are biased.
    pub fn forward(&self, x: &Signal, cx: &Context<'_>, decodes: bool) -> Result<Signal> {
        if decodes || cx.offset > 0 {
            let expected = "absent: coefficients are made of later tokens too";
            return Err(Error::spec("decode state", "given", expected));
        }
        if cx.key_bias.is_some() || cx.places.is_some() {
            let field = format!("bias or places of tokens at {}", self.path);
            return Err(Error::spec(field, "given", "absent for coefficients"));
        }
        let mut x = cx.trace.site(format_args!("{}.in", self.path), x.clone())?;
        if let Some(keep) = cx.key_padding.filter(|_| self.spec.levels > 0) {
            let real = tensor(tensor(keep.to_dtype(x.dtype()))?.unsqueeze(2))?;
            x = x.multiply_constant(&real)?;
        }
        let mut coefficients = self.analyse(&x)?;
        let masks = self.masks(&coefficients, &x, cx.key_padding)?;
        let bands = self.bands.iter().zip(&mut coefficients.bands);
        for ((mixer, band), mask) in bands.zip(&masks) {
            let cx = Context {
                key_padding: mask.as_ref(),
                ..*cx
            };
            *band = mixer.forward(band, &cx, None)?;
        }
        let y = self.synthesise(&coefficients)?;
        Ok(cx.trace.site(format_args!("{}.out", self.path), y)?)
    }

    /// Which coefficients have a real token in them, band by band.
    fn masks(
        &self,
        coefficients: &Coefficients,
        x: &Signal,
        keep: Option<&Tensor>,
    ) -> Result<Vec<Option<Tensor>>> {
        let none = vec![None; coefficients.bands.len()];
        if self.spec.levels == 0 {
            return Ok(vec![keep.cloned()]);
        }
        if !self.spec.band_mask {
            return Ok(none);
        }
        let (batch, length, _) = tensor(x.value().dims3())?;
        let filled = self.spec.boundary == Boundary::Periodised && self.padded(length) > length;
        let rows = match keep {
            Some(keep) => tensor(tensor(keep.to_dtype(DType::U8))?.to_vec2::<u8>())?,
            // What was added to the length is no token, whether others of the batch have pads or not.
            None if filled => vec![vec![1; length]; batch],
            None => return Ok(none),
        };
        let mut bands: Vec<Vec<u8>> = vec![Vec::new(); coefficients.bands.len()];
        for mut row in rows {
            if self.spec.boundary == Boundary::Periodised {
                row.resize(self.padded(row.len()), 0);
            }
            for band in bands.iter_mut().skip(1).rev() {
                let [low, high] = self.touched(&row);
                band.extend(high);
                row = low;
            }
            if let Some(first) = bands.first_mut() {
                first.extend(row);
            }
        }
        let device = x.device();
        let mask = |band: Vec<u8>| -> Result<Option<Tensor>> {
            let shape = (batch, band.len() / batch.max(1));
            Ok(Some(tensor(Tensor::from_vec(band, shape, device))?))
        };
        bands.into_iter().map(mask).collect()
    }

    /// Which averages and details some of `real` are in.
    fn touched(&self, real: &[u8]) -> [Vec<u8>; 2] {
        let length = real.len() as i64;
        let at = |place: i64| real.get(place.rem_euclid(length.max(1)) as usize).copied();
        let any = |first: i64, last: i64| {
            let mut places = first..=last;
            u8::from(places.any(|place| at(place).unwrap_or(0) != 0))
        };
        let taps = self.spec.taps as i64;
        let half = length / 2;
        match self.source {
            Source::Lifting => {
                let high = (0..half).map(|k| any(2 * k, 2 * k + 2));
                let low = (0..half).map(|k| any(2 * k - 2, 2 * k + 2));
                [low.collect(), high.collect()]
            }
            Source::AdaptiveLifting(_) => {
                let before = (taps - 1) / 2;
                // What is made of its own place and of the others' about it.
                let lifted = |own: &[u8], others: &[u8]| -> Vec<u8> {
                    let about = |k: i64| {
                        let mut near = k - before..k - before + taps;
                        near.any(|place| {
                            let place = place.rem_euclid(others.len().max(1) as i64);
                            others.get(place as usize).is_some_and(|real| *real != 0)
                        })
                    };
                    let each = own.iter().zip(0..);
                    each.map(|(own, k)| u8::from(*own != 0 || about(k)))
                        .collect()
                };
                let places = |first: usize| -> Vec<u8> {
                    let places = real.iter().skip(first).step_by(2);
                    places.copied().collect()
                };
                let even = places(0);
                let high = lifted(&places(1), &even);
                [lifted(&even, &high), high]
            }
            _ if self.spec.boundary == Boundary::Reflect => {
                let reach = (2 * taps - 3) / 2;
                let wide = length + 2 * reach + length % 2;
                let count = (wide - taps) / 2 + 1;
                let period = (2 * length - 2).max(1);
                let mirrored = |place: i64| {
                    let place = (place - reach).rem_euclid(period);
                    place.min(period - place).min(length - 1)
                };
                let each = (0..count).map(|m| {
                    let mut places = (2 * m..2 * m + taps).map(mirrored);
                    u8::from(places.any(|place| at(place).unwrap_or(0) != 0))
                });
                let each: Vec<u8> = each.collect();
                [each.clone(), each]
            }
            _ => {
                let each: Vec<u8> = (0..half).map(|m| any(2 * m, 2 * m + taps - 1)).collect();
                [each.clone(), each]
            }
        }
    }
}

/// `[batch, length, width]` through a map along the sequence, each feature by itself.
fn along_sequence(x: &Signal, transform: &RealFourier) -> Result<Signal> {
    let channels = x.transpose(1, 2)?.unsqueeze(3)?.contiguous()?;
    let mixed = channels.mix_through(transform)?;
    Ok(mixed.squeeze(3)?.transpose(1, 2)?.contiguous()?)
}

/// `lo = e₁ᵀ (R(θ₁) S) … (R(θ_L) S) S⁻¹` for `angles` `[L, channels]`: `[2 L, channels]`.
fn orthonormal(angles: &Tensor) -> Result<Tensor> {
    let (count, channels) = tensor(angles.dims2())?;
    let taps = 2 * count;
    let (sines, cosines) = (tensor(angles.sin())?, tensor(angles.cos())?);
    let mut first = vec![0.0; taps];
    if let Some(one) = first.first_mut() {
        *one = 1.0;
    }
    let first = tensor(Tensor::from_vec(first, (taps, 1), angles.device()))?;
    let first = tensor(first.to_dtype(angles.dtype()))?;
    let mut row = tensor(tensor(first.broadcast_as((taps, channels)))?.contiguous())?;
    for step in 0..count {
        let sine = tensor(sines.narrow(0, step, 1))?;
        let cosine = tensor(cosines.narrow(0, step, 1))?;
        let pairs = tensor(row.reshape((count, 2, channels)))?;
        let side = |which: usize| tensor(tensor(pairs.narrow(1, which, 1))?.squeeze(1));
        let (left, right) = (side(0)?, side(1)?);
        let turned = |a: &Tensor, b: &Tensor| -> Result<Tensor> {
            let sum = tensor(a.broadcast_mul(&sine))? + tensor(b.broadcast_mul(&cosine))?;
            tensor(sum)
        };
        let new_left = turned(&left, &right)?;
        let new_right = {
            let from_left = tensor(left.broadcast_mul(&cosine))?;
            tensor(from_left - tensor(right.broadcast_mul(&sine))?)?
        };
        let pairs = tensor(Tensor::stack(&[new_left, new_right], 1))?;
        row = tensor(pairs.reshape((taps, channels)))?;
        if step + 1 < count {
            // The last shift and its inverse cancel.
            let last = tensor(row.narrow(0, taps - 1, 1))?;
            let others = tensor(row.narrow(0, 0, taps - 1))?;
            row = tensor(Tensor::cat(&[last, others], 0))?;
        }
    }
    Ok(row)
}
