//! Names of activations in specs.

use lapidary_kernels::Activation;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// An elementwise nonlinearity, by its name in a spec.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ActivationSpec {
    /// `x`.
    Identity,
    /// `max(x, 0)`.
    Relu,
    /// GELU with the exact normal distribution function.
    #[default]
    Gelu,
    /// GELU in its tanh form.
    GeluTanh,
    /// `x σ(1.702 x)`.
    QuickGelu,
    /// `x σ(x)`.
    Silu,
    /// Hyperbolic tangent.
    Tanh,
    /// Logistic function.
    Sigmoid,
}

impl From<ActivationSpec> for Activation {
    fn from(spec: ActivationSpec) -> Self {
        match spec {
            ActivationSpec::Identity => Self::Identity,
            ActivationSpec::Relu => Self::Relu,
            ActivationSpec::Gelu => Self::Gelu,
            ActivationSpec::GeluTanh => Self::GeluTanh,
            ActivationSpec::QuickGelu => Self::QuickGelu,
            ActivationSpec::Silu => Self::Silu,
            ActivationSpec::Tanh => Self::Tanh,
            ActivationSpec::Sigmoid => Self::Sigmoid,
        }
    }
}
