//! Which transform, and what mixes its coefficients.

use super::{MixerSpec, coiflets};
use crate::error::bounded;
use crate::{Error, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

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
        self.validate_levels(field)?;
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

impl WaveletSpec {
    /// Refuses to say of a transform without levels, which is none, what it is.
    fn validate_levels(&self, field: &str) -> Result<()> {
        if self.levels > 0 {
            return Ok(());
        }
        let given = [
            ("family", self.family != Family::default()),
            ("base", self.base != Base::default()),
            ("taps", self.taps != taps()),
            ("boundary", self.boundary != Boundary::default()),
            ("convolution", self.convolution != Convolution::default()),
            ("band_mask", self.band_mask),
        ];
        match given.into_iter().find(|(_, given)| *given) {
            None => Ok(()),
            Some((name, _)) => Err(Error::spec(
                format!("{field}.{name}"),
                "given",
                "absent where levels is 0: nothing is transformed",
            )),
        }
    }
}
