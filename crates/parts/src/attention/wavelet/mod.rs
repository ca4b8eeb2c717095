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
pub mod transform;

use super::{Mixer, MixerSpec};
use crate::error::{bounded, tensor};
use crate::parameters::{Init, Parameters};
use crate::{Context, Error, Result};
use fourier::RealFourier;
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_signal::Signal;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use transform::{FilterBank, Halves, Lifting, lift, unlift};

const MAX_LEVELS: usize = 10;
const MAX_TAPS: usize = 40;

/// A mixer in the space of wavelet coefficients.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct WaveletSpec {
    /// What mixes the coefficients of a band: bidirectional attention.
    pub inner: Box<MixerSpec>,
    /// Levels `J`, one band more than levels; none leaves the inner mixer as it is.
    #[serde(default = "one")]
    pub levels: usize,
    /// Where filters come from.
    #[serde(default)]
    pub family: Family,
    /// The filter that a fixed family has and an adaptive one starts from.
    #[serde(default)]
    pub base: Base,
    /// Taps `w` of a filter, an even number; of an adaptive lifting any.
    #[serde(default = "taps")]
    pub taps: usize,
    /// What lies beyond the ends of the sequence.
    #[serde(default)]
    pub boundary: Boundary,
    /// How filters are applied.
    #[serde(default)]
    pub convolution: Convolution,
    /// Whether coefficients that no real token is in are masked.
    #[serde(default, skip_serializing_if = "is_not")]
    pub band_mask: bool,
}

/// Where filters come from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Family {
    /// The base.
    #[default]
    Fixed,
    /// Free parameters that start as the base (AdaWavSpA); the inverse is none any more.
    Adaptive,
    /// Angles: orthonormal whatever they are (OrthoWavSpA).
    Orthogonal,
    /// Means of neighbours (LiftWavSpA).
    Lifting,
    /// Lifting by learned filters behind a SiLU.
    AdaptiveLifting,
    /// No wavelets but a Fourier transform, to compare with.
    Fourier,
}

/// A filter to begin with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Base {
    /// Daubechies', with half as many vanishing moments as taps.
    #[default]
    Daubechies,
    /// The most symmetric one with as many.
    Symlet,
    /// The coiflet of 6, 12, 18, 24 or 30 taps, a third of whose number are vanishing moments of the wavelet and,
    /// but one, of the scaling function.
    Coiflet,
    /// Half a wave of a sinusoid, for an adaptive family.
    Sinusoid,
    /// Normal numbers, for an adaptive family.
    Normal,
}

impl Base {
    /// As in a spec.
    fn name(self) -> &'static str {
        match self {
            Self::Daubechies => "daubechies",
            Self::Symlet => "symlet",
            Self::Coiflet => "coiflet",
            Self::Sinusoid => "sinusoid",
            Self::Normal => "normal",
        }
    }
}

/// What lies beyond the ends of the sequence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Boundary {
    /// The other end.
    #[default]
    Periodised,
    /// Its mirror image.
    Reflect,
}

/// How filters are applied: the numbers are the same.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Convolution {
    /// Tap by tap.
    #[default]
    Direct,
    /// As products of Fourier transforms, for filters with very many taps.
    Fourier,
}

fn one() -> usize {
    1
}

fn taps() -> usize {
    8
}

#[allow(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde asks for a reference"
)]
fn is_not(flag: &bool) -> bool {
    !*flag
}

impl WaveletSpec {
    /// One level of Daubechies' wavelet with 8 taps around `inner`.
    pub fn new(inner: MixerSpec) -> Self {
        Self {
            inner: Box::new(inner),
            levels: 1,
            family: Family::default(),
            base: Base::default(),
            taps: taps(),
            boundary: Boundary::default(),
            convolution: Convolution::default(),
            band_mask: false,
        }
    }

    /// Bands of coefficients, each with a mixer.
    pub fn bands(&self) -> usize {
        match self.family {
            Family::Fourier => 1,
            _ => self.levels + 1,
        }
    }

    /// Whether it has filters with pairs of taps.
    fn filters(&self) -> bool {
        matches!(
            self.family,
            Family::Fixed | Family::Adaptive | Family::Orthogonal
        )
    }

    /// Refuses what cannot be built for tokens of `width`.
    ///
    /// # Errors
    /// Names the field, what it is and what it could be.
    pub fn validate(&self, width: usize, field: &str) -> Result<()> {
        let at = |name: &str| format!("{field}.{name}");
        let MixerSpec::MultiHead(inner) = self.inner.as_ref() else {
            let expected = "multi-head: a band of coefficients has no past and no future";
            return Err(Error::spec(at("inner.kind"), self.inner.kind(), expected));
        };
        if inner.causal {
            let expected = "false: every coefficient is made of later tokens too";
            return Err(Error::spec(at("inner.causal"), true, expected));
        }
        self.inner.validate(width, &at("inner"))?;
        bounded(at("levels"), self.levels, 0..=MAX_LEVELS)?;
        bounded(at("taps"), self.taps, 1..=MAX_TAPS)?;
        if self.filters() && !self.taps.is_multiple_of(2) {
            let expected = "an even number of taps, or an adaptive lifting";
            return Err(Error::spec(at("taps"), self.taps, expected));
        }
        let based = matches!(self.family, Family::Fixed | Family::Adaptive);
        if !based && self.base != Base::default() {
            let expected = "absent, or a fixed or an adaptive family: no other begins as a wavelet";
            return Err(Error::spec(at("base"), self.base.name(), expected));
        }
        if !self.filters() && self.convolution != Convolution::default() {
            let expected = "direct: this family has no filters to be convolved with";
            return Err(Error::spec(at("convolution"), "fourier", expected));
        }
        let without_taps = matches!(self.family, Family::Lifting | Family::Fourier);
        if without_taps && self.taps != taps() {
            let expected = "absent: this family has no taps to choose";
            return Err(Error::spec(at("taps"), self.taps, expected));
        }
        let mut coiflets = (1..=coiflets::MOST).map(|order| 6 * order);
        let none = !coiflets.any(|taps| taps == self.taps);
        if based && self.base == Base::Coiflet && none {
            let expected = "6, 12, 18, 24 or 30 for a coiflet";
            return Err(Error::spec(at("taps"), self.taps, expected));
        }
        if self.family == Family::Fixed && matches!(self.base, Base::Sinusoid | Base::Normal) {
            let expected = "daubechies, symlet or coiflet for a fixed family";
            return Err(Error::spec(at("base"), self.base.name(), expected));
        }
        if !self.filters() && self.boundary != Boundary::Periodised {
            let expected = "periodised: there are no filters to meet a boundary";
            return Err(Error::spec(at("boundary"), "reflect", expected));
        }
        if self.family == Family::Fourier && self.levels != 1 {
            let expected = "1: a Fourier transform has no levels";
            return Err(Error::spec(at("levels"), self.levels, expected));
        }
        if self.family == Family::Fourier && self.band_mask {
            let expected = "false: every coefficient of a Fourier transform has real tokens in it";
            return Err(Error::spec(at("band_mask"), true, expected));
        }
        Ok(())
    }
}

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
        let masks = self.masks(&coefficients, cx.key_padding)?;
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
        keep: Option<&Tensor>,
    ) -> Result<Vec<Option<Tensor>>> {
        let none = vec![None; coefficients.bands.len()];
        let Some(keep) = keep else {
            return Ok(none);
        };
        if self.spec.levels == 0 {
            return Ok(vec![Some(keep.clone())]);
        }
        if !self.spec.band_mask {
            return Ok(none);
        }
        let rows = tensor(tensor(keep.to_dtype(DType::U8))?.to_vec2::<u8>())?;
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
        let batch = tensor(keep.dim(0))?;
        let device = keep.device();
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
