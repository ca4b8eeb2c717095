//! Rotary position embedding as configs spell it.
//!
//! Since transformers 5 it is `rope_parameters`, one object with `rope_theta` in it; before, it
//! was `rope_theta` beside `rope_scaling`, whose kind was called `type` at first. All three are
//! read, and `rope_scaling` wins, as in transformers.

use serde_json::{Map, Value};

use super::ConfigError;
use super::check::Check;

/// The base of the rotation frequencies and how they are stretched.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RopeConfig {
    /// Feature pair `i` of a head of width `d` turns by `theta^(-2i/d)` per position.
    pub theta: f64,
    /// How the frequencies are changed for longer texts.
    pub scaling: RopeScaling,
}

/// A change of the rotation frequencies.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// As they are.
    None,
    /// All divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3.1: slow frequencies divided by `factor`, fast ones kept, interpolated between.
    Llama3 {
        /// The divisor of slow frequencies.
        factor: f64,
        /// Frequencies that turn less often than this in the original length are slow.
        low_freq_factor: f64,
        /// Frequencies that turn more often than this in the original length are fast.
        high_freq_factor: f64,
        /// The length that the model was trained on first.
        original_max_position_embeddings: usize,
    },
}

impl RopeConfig {
    pub(super) fn new(
        default_theta: f64,
        max_position_embeddings: usize,
        fields: &Map<String, Value>,
        check: &Check,
    ) -> Result<Self, ConfigError> {
        let scaling: Option<Map<String, Value>> = check.read(fields, "rope_scaling")?;
        let (parameters, check) = match scaling.filter(|scaling| !scaling.is_empty()) {
            Some(scaling) => (scaling, check.inside("rope_scaling.")),
            None => {
                let parameters = check.read(fields, "rope_parameters")?.unwrap_or_default();
                (parameters, check.inside("rope_parameters."))
            }
        };
        let theta = match check.read(&parameters, "rope_theta")? {
            Some(theta) => theta,
            None => check
                .inside("")
                .read(fields, "rope_theta")?
                .unwrap_or(default_theta),
        };
        check.positive("rope_theta", theta)?;
        let partial: Option<f64> = check.read(&parameters, "partial_rotary_factor")?;
        if let Some(partial) = partial.filter(|&partial| partial != 1.0) {
            return Err(check.wrong("partial_rotary_factor", partial, "1 in this family"));
        }
        let scaling = RopeScaling::new(max_position_embeddings, &parameters, &check)?;
        Ok(Self { theta, scaling })
    }
}

impl RopeScaling {
    fn new(
        max_position_embeddings: usize,
        parameters: &Map<String, Value>,
        check: &Check,
    ) -> Result<Self, ConfigError> {
        let kind: Option<String> = match check.read(parameters, "rope_type")? {
            Some(kind) => Some(kind),
            None => check.read(parameters, "type")?,
        };
        let number = |name: &str| -> Result<f64, ConfigError> {
            let value = check
                .read(parameters, name)?
                .ok_or_else(|| check.wrong(name, "missing", "a positive number"))?;
            check.positive(name, value)?;
            Ok(value)
        };
        match kind.as_deref().unwrap_or("default") {
            "default" => Ok(Self::None),
            "linear" => Ok(Self::Linear {
                factor: number("factor")?,
            }),
            "llama3" => {
                let original = "original_max_position_embeddings";
                let length = check
                    .read(parameters, original)?
                    .unwrap_or(max_position_embeddings);
                check.between(original, length, super::check::LENGTH)?;
                let (low, high) = (number("low_freq_factor")?, number("high_freq_factor")?);
                if low >= high {
                    let expected = format!("less than high_freq_factor, {high}");
                    return Err(check.wrong("low_freq_factor", low, expected));
                }
                Ok(Self::Llama3 {
                    factor: number("factor")?,
                    low_freq_factor: low,
                    high_freq_factor: high,
                    original_max_position_embeddings: length,
                })
            }
            other => Err(check.wrong("rope_type", other, "one of default, linear, llama3")),
        }
    }
}
