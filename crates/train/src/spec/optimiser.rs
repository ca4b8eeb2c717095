//! Which optimiser trains, and by which numbers.

use lapidary_kernels::{AdamWOptions, LionOptions};
use serde::{Deserialize, Serialize};

use super::{BELOW_ONE, NOT_NEGATIVE};
use crate::{Error, Result};

/// Which optimiser.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum OptimiserSpec {
    /// Adam with decoupled weight decay (Loshchilov & Hutter, arXiv 1711.05101).
    Adamw {
        /// Decay of the mean gradient.
        #[serde(default = "beta1")]
        beta1: f64,
        /// Decay of the mean squared gradient.
        #[serde(default = "beta2")]
        beta2: f64,
        /// Added to the root of the latter.
        #[serde(default = "epsilon")]
        epsilon: f64,
        /// Decay of matrices; norms and biases are never decayed.
        #[serde(default)]
        weight_decay: f64,
    },
    /// Steps of one length in every coordinate, by the sign of a momentum (Chen et al., Lion, arXiv
    /// 2302.06675).
    Lion {
        /// Share of the momentum in what a step goes by.
        #[serde(default = "lion_beta1")]
        beta1: f64,
        /// Decay of the momentum.
        #[serde(default = "lion_beta2")]
        beta2: f64,
        /// Decay of matrices; norms and biases are never decayed.
        #[serde(default)]
        weight_decay: f64,
    },
    /// Gradient descent with momentum.
    Sgd {
        /// Share of the last step that goes into the next.
        #[serde(default)]
        momentum: f64,
        /// Whether the gradient is taken ahead of the step (Nesterov).
        #[serde(default)]
        nesterov: bool,
        /// Decay of matrices; norms and biases are never decayed.
        #[serde(default)]
        weight_decay: f64,
    },
}

fn beta1() -> f64 {
    AdamWOptions::default().beta1
}

fn beta2() -> f64 {
    AdamWOptions::default().beta2
}

fn lion_beta1() -> f64 {
    LionOptions::default().beta1
}

fn lion_beta2() -> f64 {
    LionOptions::default().beta2
}

fn epsilon() -> f64 {
    AdamWOptions::default().epsilon
}

impl Default for OptimiserSpec {
    fn default() -> Self {
        Self::Adamw {
            beta1: beta1(),
            beta2: beta2(),
            epsilon: epsilon(),
            weight_decay: 0.0,
        }
    }
}

impl OptimiserSpec {
    pub(super) fn validate(&self) -> Result<()> {
        let (below_one, not_negative) = match *self {
            Self::Adamw {
                beta1,
                beta2,
                epsilon,
                weight_decay,
            } => (
                vec![("optimiser.beta1", beta1), ("optimiser.beta2", beta2)],
                vec![
                    ("optimiser.epsilon", epsilon),
                    ("optimiser.weight_decay", weight_decay),
                ],
            ),
            Self::Lion {
                beta1,
                beta2,
                weight_decay,
            } => (
                vec![("optimiser.beta1", beta1), ("optimiser.beta2", beta2)],
                vec![("optimiser.weight_decay", weight_decay)],
            ),
            Self::Sgd {
                momentum,
                weight_decay,
                ..
            } => (
                vec![("optimiser.momentum", momentum)],
                vec![("optimiser.weight_decay", weight_decay)],
            ),
        };
        let wrong = |(name, found): (&'static str, f64), expected| Error::Setting {
            name,
            found: found.to_string(),
            expected,
        };
        if let Some(found) = below_one.into_iter().find(|(_, x)| !(0.0..1.0).contains(x)) {
            return Err(wrong(found, BELOW_ONE));
        }
        // What has had no gradient yet, such as a token that does not occur, would become 0 / 0.
        if let Self::Adamw { epsilon, .. } = *self
            && epsilon < f64::from(f32::MIN_POSITIVE)
        {
            let expected = "a number above 0, in f32 too";
            return Err(wrong(("optimiser.epsilon", epsilon), expected));
        }
        if let Self::Sgd {
            momentum,
            nesterov: true,
            ..
        } = *self
            && momentum == 0.0
        {
            let expected = "false without a momentum, ahead of which the gradient would be taken";
            return Err(Error::Setting {
                name: "optimiser.nesterov",
                found: "true".into(),
                expected,
            });
        }
        let is_negative = |x: f64| !(x.is_finite() && x >= 0.0);
        match not_negative.into_iter().find(|(_, x)| is_negative(*x)) {
            Some(found) => Err(wrong(found, NOT_NEGATIVE)),
            None => Ok(()),
        }
    }

    pub(crate) fn weight_decay(&self) -> f64 {
        match self {
            Self::Adamw { weight_decay, .. }
            | Self::Lion { weight_decay, .. }
            | Self::Sgd { weight_decay, .. } => *weight_decay,
        }
    }
}
