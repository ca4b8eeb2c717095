//! Normalisation of each token over its features.
//!
//! * Layer norm (Ba et al., Layer Normalization, 2016, arXiv 1607.06450):
//!   `γ (x − mean x) / √(var x + ε) + β`, biased variance. `2 width` parameters, 8 operations
//!   per number.
//! * RMS norm (Zhang & Sennrich, 2019, arXiv 1910.07467): `γ x / √(mean(x²) + ε)`, which
//!   neither centres nor shifts. `width` parameters, 5 operations per number.
//! * None.

use crate::parameters::{Init, Parameters};
use crate::{Error, Result};
use lapidary_kernels::Tensor;
use lapidary_signal::Signal;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Which normalisation.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum NormSpec {
    /// `γ (x − mean) / √(var + ε) + β`.
    Layer {
        /// `ε`.
        #[serde(default = "layer_epsilon")]
        epsilon: f64,
    },
    /// `γ x / √(mean(x²) + ε)`.
    Rms {
        /// `ε`.
        #[serde(default = "rms_epsilon")]
        epsilon: f64,
    },
    /// Nothing.
    #[serde(deserialize_with = "crate::fields::none")]
    None,
}

fn layer_epsilon() -> f64 {
    1e-5
}

fn rms_epsilon() -> f64 {
    1e-6
}

impl Default for NormSpec {
    fn default() -> Self {
        Self::Layer {
            epsilon: layer_epsilon(),
        }
    }
}

impl NormSpec {
    /// Refuses an epsilon that is negative or not a number.
    pub fn validate(&self, field: &str) -> Result<()> {
        match self {
            Self::Layer { epsilon } | Self::Rms { epsilon }
                if !(epsilon.is_finite() && *epsilon >= 0.0) =>
            {
                Err(Error::spec(
                    format!("{field}.epsilon"),
                    epsilon,
                    "a number of at least 0",
                ))
            }
            _ => Ok(()),
        }
    }
}

/// A normalisation with its parameters.
#[derive(Clone, Debug)]
pub enum Norm {
    /// Layer norm.
    Layer {
        /// `γ`, `[width]`.
        weight: Tensor,
        /// `β`, `[width]`.
        bias: Tensor,
        /// `ε`.
        epsilon: f64,
    },
    /// RMS norm.
    Rms {
        /// `γ`, `[width]`.
        weight: Tensor,
        /// `ε`.
        epsilon: f64,
    },
    /// Nothing.
    None,
}

impl Norm {
    /// Builds the norm over `width` features.
    pub fn new(spec: &NormSpec, width: usize, mut parameters: Parameters<'_>) -> Result<Self> {
        Ok(match *spec {
            NormSpec::Layer { epsilon } => Self::Layer {
                weight: parameters.tensor("weight", &[width], Init::Ones)?,
                bias: parameters.tensor("bias", &[width], Init::Zeros)?,
                epsilon,
            },
            NormSpec::Rms { epsilon } => Self::Rms {
                weight: parameters.tensor("weight", &[width], Init::Ones)?,
                epsilon,
            },
            NormSpec::None => Self::None,
        })
    }

    /// Normalises the last dimension.
    pub fn forward(&self, x: &Signal) -> Result<Signal> {
        Ok(match self {
            Self::Layer {
                weight,
                bias,
                epsilon,
            } => x.layer_norm(Some(weight), Some(bias), *epsilon)?,
            Self::Rms { weight, epsilon } => x.rms_norm(Some(weight), *epsilon)?,
            Self::None => x.clone(),
        })
    }
}
