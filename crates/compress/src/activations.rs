//! Activations as small integers, simulated: what linear layers read is rounded where it is written.
//!
//! ```text
//! x̂ = s clamp(round(x / s), −t, t)        t = 2ᵇ⁻¹ − 1
//! ```
//!
//! with a step `s = max|x| / t` for each token, which is found while the model runs, or one for each
//! site, from the largest activation that the calibration saw there: what is larger is clipped (Jacob et
//! al. 2017, arXiv 1712.05877). Inputs that come to a given size anywhere in the calibration are left as
//! they are, and count for no step (Dettmers et al. 2022, LLM.int8, arXiv 2208.07339): they are few, and
//! would make the step of all others too wide.
//!
//! With [`ActivationSettings::functions`] what stands between linear layers is in integers as well: softmax,
//! GELU and norms by polynomials of the second order and integer roots ([`lapidary_kernels::IntegerFunctions`]).
//!
//! Layers that read one site read the same integers. What flows between the two factors of a layer is
//! not rounded, nor is anything that no linear layer of the selection reads.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use lapidary_kernels::{D, Device, IntegerFunctions, Tensor};
use lapidary_model::Model;
use lapidary_signal::{Signal, Trace};
use serde::{Deserialize, Serialize};

use crate::error::engine;
use crate::method::Settings;
use crate::methods::quantise::kept;
use crate::{Calibration, Error, Requirements, Result, Statistic};

/// What shares a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ActivationRange {
    /// The features of one token, by what they are: dynamic.
    PerToken,
    /// Everything that is written at a site, by what the calibration saw: static.
    PerTensor,
}

impl fmt::Display for ActivationRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::PerToken => "per-token",
            Self::PerTensor => "per-tensor",
        })
    }
}

impl FromStr for ActivationRange {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "per-token" => Ok(Self::PerToken),
            "per-tensor" => Ok(Self::PerTensor),
            other => Err(Error::invalid(
                "range of activations",
                format!("{other:?}"),
                "per-token or per-tensor",
            )),
        }
    }
}

/// How activations are rounded, when a model is measured. Which sites follows from the selection of
/// layers, which inputs stay from `quantise.outliers`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ActivationSettings {
    /// What shares a step; nothing is rounded when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub range: Option<ActivationRange>,
    /// Bits of an integer, 2 to 16.
    pub bits: u32,
    /// Whether softmax, GELU and norms are computed by integers too, and write as many bits.
    pub functions: bool,
}

impl Default for ActivationSettings {
    fn default() -> Self {
        Self {
            range: None,
            bits: 8,
            functions: false,
        }
    }
}

impl ActivationSettings {
    /// Whether they mean something, whatever the model.
    ///
    /// # Errors
    /// For integers of other bits, and where functions are to be in integers but nothing is rounded.
    pub fn check(&self) -> Result<()> {
        if !(2..=16).contains(&self.bits) {
            return Err(Error::invalid("bits of activations", self.bits, "2 to 16"));
        }
        if self.functions && self.range.is_none() {
            return Err(Error::invalid(
                "activations.functions",
                "true, and activations.range absent",
                "given with a range, per-token or per-tensor",
            ));
        }
        Ok(())
    }
}

/// The activations of one model, and how each site's are rounded.
///
/// ```
/// use lapidary_compress::quality::{perplexity, perplexity_rounded, sliding_windows};
/// use lapidary_compress::{ActivationRange, ActivationSettings, RoundedActivations, Settings};
/// use lapidary_kernels::{DType, Device};
/// use lapidary_model::{Model, ModelSpec};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let spec: ModelSpec = toml::from_str(r#"
///     width = 16
///     input = { kind = "tokens", vocabulary = 32, length = 8 }
///     head = { kind = "language-model" }
///     [[blocks]]
///     attention = { kind = "multi-head", heads = 2, causal = true }
/// "#)?;
/// let model = Model::initialised(spec, 1, DType::F32, &Device::Cpu)?;
/// let settings = Settings {
///     activations: ActivationSettings {
///         range: Some(ActivationRange::PerToken),
///         ..ActivationSettings::default()
///     },
///     ..Settings::default()
/// };
/// // One step for each token needs no calibration.
/// let rounded = RoundedActivations::new(&model, &settings, None)?.ok_or("a range was given")?;
/// let windows = sliding_windows(&[1, 2, 3, 4, 5, 6], 4, 2)?;
/// let (whole, simulated) =
///     (perplexity(&model, &windows, 2)?, perplexity_rounded(&model, &windows, 2, &rounded)?);
/// assert!((whole.value - simulated.value).abs() < 0.01 * whole.value);
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct RoundedActivations {
    range: ActivationRange,
    bits: u32,
    /// What softmax, GELU and norms are computed by, unless in floating point.
    functions: Option<IntegerFunctions>,
    sites: BTreeMap<String, Site>,
}

/// How what is written at a site is rounded.
#[derive(Clone, Debug)]
struct Site {
    /// 1 where a feature is rounded and 0 where it is left, `[width]`.
    mask: Tensor,
    /// Features that are left.
    kept: usize,
    width: usize,
    /// The step that all tokens share.
    step: Option<f64>,
}

impl RoundedActivations {
    /// What has to be found out about a model first: nothing for a step of each token without
    /// outliers.
    ///
    /// # Errors
    /// When the settings mean nothing, or select no layer of the model.
    pub fn requirements(model: &Model, settings: &Settings) -> Result<Requirements> {
        settings.activations.check()?;
        let outliers = kept::threshold(&settings.quantise)?;
        let looks = match settings.activations.range {
            None => false,
            Some(ActivationRange::PerToken) => outliers.is_some(),
            Some(ActivationRange::PerTensor) => true,
        };
        if !looks {
            return Ok(Requirements::default());
        }
        let layers = settings.selection.chosen(model)?.into_iter();
        let layers = layers.filter(|layer| !layer.is_table());
        Ok(Requirements {
            statistics: layers
                .map(|layer| Statistic::InputPeaks {
                    site: layer.input_site,
                })
                .collect(),
        })
    }

    /// The activations of `model`, with a `calibration` of these very weights where the requirements
    /// are not empty; nothing where the settings round none.
    ///
    /// # Errors
    /// When the settings mean nothing, or the calibration is missing or of other weights.
    pub fn new(
        model: &Model,
        settings: &Settings,
        calibration: Option<&Calibration>,
    ) -> Result<Option<Self>> {
        settings.activations.check()?;
        let ActivationSettings {
            range,
            bits,
            functions,
        } = settings.activations;
        let Some(range) = range else {
            return Ok(None);
        };
        let requirements = Self::requirements(model, settings)?;
        if let Some(calibration) = calibration {
            calibration.check(model)?;
        }
        let outliers = kept::threshold(&settings.quantise)?;
        let mut sites = BTreeMap::new();
        for layer in settings.selection.chosen(model)? {
            if layer.is_table() || sites.contains_key(&layer.input_site) {
                continue;
            }
            let name = layer.input_site;
            let peaks = match requirements.is_empty() {
                true => None,
                false => Some(peaks(calibration, &name)?),
            };
            let site = Site::new(layer.input, peaks, outliers, range, bits)?;
            sites.insert(name, site);
        }
        let functions = functions.then(|| IntegerFunctions::new(bits)).transpose()?;
        Ok(Some(Self {
            range,
            bits,
            functions,
            sites,
        }))
    }

    /// What shares a step.
    pub fn range(&self) -> ActivationRange {
        self.range
    }

    /// Bits of an integer.
    pub fn bits(&self) -> u32 {
        self.bits
    }

    /// Whether softmax, GELU and norms are computed by integers.
    pub fn has_integer_functions(&self) -> bool {
        self.functions.is_some()
    }

    /// Sites that are rounded, features at all of them, and how many of these are left as they are.
    pub fn counts(&self) -> [usize; 3] {
        let sum = |of: fn(&Site) -> usize| self.sites.values().map(of).sum();
        [
            self.sites.len(),
            sum(|site| site.width),
            sum(|site| site.kept),
        ]
    }

    /// A trace that rounds what it passes.
    ///
    /// # Errors
    /// Those of [`Trace::replace`].
    pub fn trace(&self) -> Result<Trace> {
        let (top, functions) = (top(self.bits), self.functions);
        // What flows from a site on is under the lens; what is written anew there begins it again.
        let flowing = move |signal: Signal| match functions {
            Some(functions) => signal.into_integers(functions),
            None => signal,
        };
        let mut trace = Trace::new();
        if functions.is_some() {
            trace = trace.replace("embeddings", move |_, signal| Ok(flowing(signal)))?;
        }
        for (name, site) in &self.sites {
            let site = site.clone();
            trace = trace.replace(name, move |_, signal| {
                let rounded = site.round(signal.value(), top)?;
                Ok(flowing(Signal::from(rounded)))
            })?;
        }
        Ok(trace)
    }
}

fn peaks(calibration: Option<&Calibration>, site: &str) -> Result<Vec<f64>> {
    let calibration = calibration.ok_or_else(|| {
        Error::invalid(
            "calibration of activations",
            "absent",
            "given, for a step of each site or outliers",
        )
    })?;
    calibration.vector(&Statistic::InputPeaks {
        site: site.to_owned(),
    })
}

/// The largest integer.
fn top(bits: u32) -> f64 {
    f64::from((1u32 << (bits - 1)) - 1)
}

impl Site {
    fn new(
        width: usize,
        peaks: Option<Vec<f64>>,
        outliers: Option<f64>,
        range: ActivationRange,
        bits: u32,
    ) -> Result<Self> {
        let columns = match (&peaks, outliers) {
            (Some(peaks), Some(threshold)) => kept::columns(peaks, threshold),
            _ => Vec::new(),
        };
        let mut mask = vec![1.0; width];
        for column in &columns {
            if let Some(entry) = mask.get_mut(*column) {
                *entry = 0.0;
            }
        }
        let largest = peaks.map(|peaks| {
            let rounded = peaks.iter().zip(&mask).map(|(peak, mask)| peak * mask);
            rounded.fold(0.0, f64::max)
        });
        Ok(Self {
            mask: engine(Tensor::from_vec(mask, width, &Device::Cpu))?,
            kept: columns.len(),
            width,
            step: match range {
                ActivationRange::PerToken => None,
                ActivationRange::PerTensor => largest.map(|largest| largest / top(bits)),
            },
        })
    }

    /// `x` `[.., width]` in steps, but for the features that are left.
    fn round(&self, x: &Tensor, top: f64) -> lapidary_kernels::Result<Tensor> {
        // A step of a token whose features are all zero.
        const LEAST: f64 = 1e-30;
        let mask = self.mask.to_dtype(x.dtype())?.to_device(x.device())?;
        let small = x.broadcast_mul(&mask)?;
        let left = (x - &small)?;
        let rounded = match self.step {
            // The calibration saw nothing here but zeros, so that there are no steps.
            Some(step) if step < LEAST => small.zeros_like()?,
            Some(step) => small
                .affine(1.0 / step, 0.0)?
                .round()?
                .clamp(-top, top)?
                .affine(step, 0.0)?,
            None => {
                let largest = small.abs()?.max_keepdim(D::Minus1)?;
                let step = largest.affine(1.0 / top, 0.0)?.maximum(LEAST)?;
                let steps = small.broadcast_div(&step)?.round()?;
                steps.broadcast_mul(&step)?
            }
        };
        Ok((rounded + left)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lapidary_kernels::DType;
    use proptest::prelude::*;

    const WIDTH: usize = 6;

    fn site(peaks: &[f64], outliers: Option<f64>, range: ActivationRange) -> Site {
        Site::new(peaks.len(), Some(peaks.to_vec()), outliers, range, 8).unwrap()
    }

    fn rounded(site: &Site, x: &[f64]) -> Vec<f64> {
        let shape = (1, x.len() / site.width, site.width);
        let x = Tensor::from_slice(x, shape, &Device::Cpu).unwrap();
        let y = site.round(&x, top(8)).unwrap();
        assert_eq!(y.dtype(), DType::F64);
        y.flatten_all().unwrap().to_vec1().unwrap()
    }

    proptest! {
        /// Each number moves by half a step at most, and what is on the grid stays.
        #[test]
        fn rounding_moves_a_number_by_at_most_half_a_step(
            x in prop::collection::vec(-4.0f64..4.0, 3 * WIDTH),
        ) {
            let peaks: Vec<f64> = (0..WIDTH)
                .map(|i| (0..3).map(|row| x[row * WIDTH + i].abs()).fold(0.0, f64::max))
                .collect();
            let largest = |x: &[f64]| x.iter().fold(0.0f64, |most, x| most.max(x.abs()));
            for range in [ActivationRange::PerToken, ActivationRange::PerTensor] {
                let site = site(&peaks, None, range);
                let y = rounded(&site, &x);
                for (row, (before, after)) in x.chunks(WIDTH).zip(y.chunks(WIDTH)).enumerate() {
                    let most = match range {
                        ActivationRange::PerToken => largest(before),
                        ActivationRange::PerTensor => largest(&peaks),
                    };
                    for (a, b) in before.iter().zip(after) {
                        prop_assert!((a - b).abs() <= 0.5 * most / 127.0 + 1e-12, "row {row}");
                    }
                }
                for (once, twice) in y.iter().zip(rounded(&site, &y)) {
                    prop_assert!((once - twice).abs() < 1e-12);
                }
            }
        }
    }

    #[test]
    fn what_is_larger_than_the_calibration_saw_is_clipped() {
        let site = site(&[1.0, 2.54], None, ActivationRange::PerTensor);
        let y = rounded(&site, &[9.0, -9.0, 0.031, 0.0]);
        for (found, expected) in y.iter().zip([2.54, -2.54, 0.04, 0.0]) {
            assert!((found - expected).abs() < 1e-12, "{found} {expected}");
        }
    }

    #[test]
    fn outliers_are_left_and_widen_no_step() {
        for range in [ActivationRange::PerToken, ActivationRange::PerTensor] {
            let x = [100.123, 0.5, -1.27];
            let kept = site(&[100.123, 1.0, 1.27], Some(6.0), range);
            assert_eq!((kept.kept, kept.width), (1, 3));
            let y = rounded(&kept, &x);
            assert!((y[0] - x[0]).abs() < 1e-12);
            assert!((y[1] - 0.5).abs() <= 0.005 + 1e-12, "{y:?}");
            // Among the others' steps, this is one of 0.79.
            let wide = rounded(&site(&[100.123, 1.0, 1.27], None, range), &x);
            assert!((wide[1] - 0.5).abs() > 0.1, "{wide:?}");
        }
    }

    #[test]
    fn zeros_stay_zeros() {
        for range in [ActivationRange::PerToken, ActivationRange::PerTensor] {
            let site = site(&[0.0, 0.0], None, range);
            assert_eq!(rounded(&site, &[0.0, 0.0]), [0.0, 0.0]);
        }
    }
}
