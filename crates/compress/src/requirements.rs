//! What methods need to know about a model before they cut it.

use std::collections::BTreeSet;
use std::fmt;

use lapidary_kernels::SecondMoment;
use lapidary_model::Model;
use serde::{Deserialize, Serialize};

/// One thing that a calibration can find out. Expectations over tokens leave padding out; those
/// over examples are of the gradient `G` `[output, input]` of one example's loss.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Statistic {
    /// `E[x_i²]` over the tokens at a site, `[width]`.
    InputSquares {
        /// The site.
        site: String,
    },
    /// `E[x_i]` over the tokens at a site, `[width]`.
    InputMeans {
        /// The site.
        site: String,
    },
    /// `E|x_i|` over the tokens at a site, `[width]`.
    InputMagnitudes {
        /// The site.
        site: String,
    },
    /// `max |x_i|` over the tokens at a site, `[width]`.
    InputPeaks {
        /// The site.
        site: String,
    },
    /// `E[x xᵀ]` over the tokens at a site, not centred, `[width, width]`.
    Covariance {
        /// The site.
        site: String,
    },
    /// `E[cos(x, y)]` over the tokens at two sites of one width, the first written first, `[]`.
    Similarity {
        /// The site of `x`.
        from: String,
        /// The site of `y`.
        to: String,
    },
    /// `Σ_o E[G_oi²]`, `[input]`.
    FisherInputs {
        /// Path of the linear layer.
        layer: String,
    },
    /// `Σ_i E[G_oi²]`, `[output]`.
    FisherOutputs {
        /// Path of the linear layer.
        layer: String,
    },
    /// `E[G_oi²]`, `[output, input]`.
    Fisher {
        /// Path of the linear layer.
        layer: String,
    },
    /// `A` `[input, input]` of `E[vec(G) vec(G)ᵀ] ≈ A ⊗ B`.
    KroneckerInput {
        /// Path of the linear layer.
        layer: String,
    },
    /// `B` `[output, output]` of `E[vec(G) vec(G)ᵀ] ≈ A ⊗ B`.
    KroneckerOutput {
        /// Path of the linear layer.
        layer: String,
    },
}

impl Statistic {
    /// The sites whose activations it needs.
    pub fn sites(&self) -> impl Iterator<Item = &str> {
        let (first, second) = match self {
            Self::InputSquares { site }
            | Self::InputMeans { site }
            | Self::InputMagnitudes { site }
            | Self::InputPeaks { site }
            | Self::Covariance { site } => (Some(site), None),
            Self::Similarity { from, to } => (Some(from), Some(to)),
            _ => (None, None),
        };
        first.into_iter().chain(second).map(String::as_str)
    }

    /// The layer whose gradients it needs.
    pub fn layer(&self) -> Option<&str> {
        match self {
            Self::InputSquares { .. }
            | Self::InputMeans { .. }
            | Self::InputMagnitudes { .. }
            | Self::InputPeaks { .. }
            | Self::Covariance { .. }
            | Self::Similarity { .. } => None,
            Self::FisherInputs { layer }
            | Self::FisherOutputs { layer }
            | Self::Fisher { layer }
            | Self::KroneckerInput { layer }
            | Self::KroneckerOutput { layer } => Some(layer),
        }
    }
}

impl fmt::Display for Statistic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InputSquares { site } => write!(f, "mean squared activation at {site}"),
            Self::InputMeans { site } => write!(f, "mean activation at {site}"),
            Self::InputMagnitudes { site } => write!(f, "mean size of activations at {site}"),
            Self::InputPeaks { site } => write!(f, "largest size of activations at {site}"),
            Self::Covariance { site } => write!(f, "second moment at {site}"),
            Self::Similarity { from, to } => write!(f, "mean cosine of {from} and {to}"),
            Self::FisherInputs { layer } => write!(f, "Fisher information per input of {layer}"),
            Self::FisherOutputs { layer } => write!(f, "Fisher information per output of {layer}"),
            Self::Fisher { layer } => write!(f, "Fisher information of {layer}"),
            Self::KroneckerInput { layer } => write!(f, "Fisher input factor of {layer}"),
            Self::KroneckerOutput { layer } => write!(f, "Fisher output factor of {layer}"),
        }
    }
}

/// What a calibration has to find out. Those of several methods unite, so that one calibration
/// serves them all.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Requirements {
    /// The statistics.
    pub statistics: BTreeSet<Statistic>,
}

impl Requirements {
    /// What both need.
    pub fn union(mut self, other: Self) -> Self {
        self.statistics.extend(other.statistics);
        self
    }

    /// Whether nothing has to be found out, so that no data is needed.
    pub fn is_empty(&self) -> bool {
        self.statistics.is_empty()
    }

    /// The sites whose activations are needed.
    pub fn sites(&self) -> BTreeSet<&str> {
        self.statistics.iter().flat_map(Statistic::sites).collect()
    }

    /// The layers whose gradients are needed; none when a forward pass suffices.
    pub fn gradients(&self) -> BTreeSet<&str> {
        self.statistics
            .iter()
            .filter_map(Statistic::layer)
            .collect()
    }

    /// Bytes that the statistics take, which is what a calibration holds beside the model and
    /// the activations of one batch.
    pub fn bytes(&self, model: &Model) -> u64 {
        let numbers = |statistic: &Statistic| -> u64 {
            let sizes = model.linears().iter().find_map(|linear| {
                let here = match statistic.layer() {
                    Some(layer) => linear.path == layer,
                    None => statistic.sites().any(|site| site == linear.input_site),
                };
                here.then_some((linear.input as u64, linear.output as u64))
            });
            let Some((input, output)) = sizes else {
                return 0;
            };
            match statistic {
                Statistic::Similarity { .. } => 1,
                Statistic::InputSquares { .. }
                | Statistic::InputMeans { .. }
                | Statistic::InputMagnitudes { .. }
                | Statistic::InputPeaks { .. }
                | Statistic::FisherInputs { .. } => input,
                Statistic::FisherOutputs { .. } => output,
                Statistic::Fisher { .. } => input * output,
                Statistic::Covariance { .. } => SecondMoment::held(input as usize) as u64,
                Statistic::KroneckerInput { .. } => input * input,
                Statistic::KroneckerOutput { .. } => output * output,
            }
        };
        8 * self.statistics.iter().map(numbers).sum::<u64>()
    }
}
