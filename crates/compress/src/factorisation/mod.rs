//! Low-rank factorisation weighted by Fisher information, and its relatives.
//!
//! Paper: *Language model compression with weighted low-rank factorization* (FWSVD), Yen-Chang
//! Hsu, Ting Hua, Sungen Chang, Qian Lou, Yilin Shen, Hongxia Jin, 2022, arXiv 2207.00112.
//!
//! A linear layer `y = x Wᵀ + b` with `W [output, input]` becomes `y = (x downᵀ) upᵀ + b` with
//! `down [rank, input]` and `up [output, rank]`. Plain SVD minimises `‖W − Ŵ‖_F`, as if all
//! weights mattered alike. FWSVD gives each *input* of the layer one importance, the empirical
//! Fisher information of the weights that read it,
//!
//! ```text
//! I_i = Σ_o Î(W_oi)        minimise Σ_oi I_i (W − Ŵ)_oi²
//! ```
//!
//! because importances of single weights have no closed-form solution, and importances shared by
//! an input's weights have one: the SVD of `W diag(√I)`. (The paper writes `z = x W`, so what
//! it calls rows are inputs here.) [`lapidary_factor::WeightedSvd`] solves it, with a floor
//! under `√I` so that inputs without importance come last and never divide by zero.
//!
//! | method | error that is minimised | needs |
//! |---|---|---|
//! | `svd` | `Σ Δ_oi²` | nothing |
//! | `fwsvd` | `Σ I_i Δ_oi²` | gradients |
//! | `activation-weighted` | `Σ E[x_i²] Δ_oi²` (LoRAP, arXiv 2404.09695, and ASVD, arXiv 2312.05821) | activations |
//! | `row-column-fisher` | `Σ I_i J_o Δ_oi²`, `J_o = Σ_i Î(W_oi)` | gradients |
//! | `generalised-fisher` | `vec(Δ)ᵀ (A ⊗ B) vec(Δ)` (GFWSVD, arXiv 2505.17974) | gradients |
//! | `whitened` | `E‖x Δᵀ‖²` (SVD-LLM, arXiv 2403.07378) | activations |
//!
//! The paper's authors published no code. A third party's (s-nlp/lora_fwsvd) squares the mean
//! gradient of a batch where the paper squares that of an example, and takes the row-and-column
//! variant by default; here the paper is followed, and the variant has its own name.

mod apply;
mod ranks;

pub(crate) use apply::merged;
pub use ranks::parameters_after;

use std::fmt;
use std::str::FromStr;

use lapidary_factor::Metric;
use lapidary_kernels::{DType, Tensor};
use lapidary_model::Model;
use serde::{Deserialize, Serialize};

use crate::ahead::Left;
use crate::error::engine;
use crate::method::{Effect, Method, Schedule};
use crate::requirements::{Requirements, Statistic};
use crate::selection::{Layer, Selection};
use crate::{Calibration, Error, Result};

/// How linear layers are factorised.
///
/// ```
/// use lapidary_compress::Factorisation;
/// assert_eq!("fwsvd".parse::<Factorisation>()?, Factorisation::Fwsvd);
/// assert!("fwsdv".parse::<Factorisation>().unwrap_err().to_string().contains("whitened"));
/// # Ok::<(), lapidary_compress::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Factorisation {
    /// Plain SVD.
    Svd,
    /// Inputs weighted by Fisher information.
    Fwsvd,
    /// Inputs weighted by their mean square.
    ActivationWeighted,
    /// Inputs and outputs weighted by Fisher information.
    RowColumnFisher,
    /// Kronecker-factored Fisher information.
    GeneralisedFisher,
    /// Whitened by the second moment of the inputs: the least output error of each layer.
    Whitened,
}

impl Factorisation {
    /// Every method.
    pub const ALL: [Self; 6] = [
        Self::Svd,
        Self::Fwsvd,
        Self::ActivationWeighted,
        Self::RowColumnFisher,
        Self::GeneralisedFisher,
        Self::Whitened,
    ];

    /// The method's name on the command line and in files.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Svd => "svd",
            Self::Fwsvd => "fwsvd",
            Self::ActivationWeighted => "activation-weighted",
            Self::RowColumnFisher => "row-column-fisher",
            Self::GeneralisedFisher => "generalised-fisher",
            Self::Whitened => "whitened",
        }
    }

    /// What has to be known about the chosen layers of a model.
    pub fn requirements(self, model: &Model, selection: &Selection) -> Result<Requirements> {
        let layers = selection.chosen(model)?;
        Ok(Requirements {
            statistics: layers
                .iter()
                .filter(|layer| layer.rank.is_none() && self.obstacle(model, layer).is_none())
                .flat_map(|layer| self.statistics(layer))
                .collect(),
        })
    }

    /// Why the method cannot be used on a layer, if it cannot.
    pub(crate) fn obstacle(self, model: &Model, layer: &Layer) -> Option<&'static str> {
        use lapidary_model::HeadSpec;
        if layer.rank.is_some() {
            return Some("it is factorised already; multiply it out first");
        }
        if !layer.is_table() {
            return None;
        }
        if matches!(model.spec().head, HeadSpec::LanguageModel { .. }) {
            return Some("the language-model head shares the table or its width");
        }
        (self == Self::GeneralisedFisher)
            .then_some("a Kronecker factor over the whole vocabulary is too large")
    }

    fn statistics(self, layer: &Layer) -> Vec<Statistic> {
        let path = || layer.path.clone();
        let site = layer.input_site.clone();
        match self {
            Self::Svd => vec![],
            Self::Fwsvd => vec![Statistic::FisherInputs { layer: path() }],
            Self::ActivationWeighted => vec![Statistic::InputSquares { site }],
            Self::RowColumnFisher => vec![
                Statistic::FisherInputs { layer: path() },
                Statistic::FisherOutputs { layer: path() },
            ],
            Self::GeneralisedFisher => vec![
                Statistic::KroneckerInput { layer: path() },
                Statistic::KroneckerOutput { layer: path() },
            ],
            // The second moment of vectors with a single one is diagonal.
            Self::Whitened if layer.is_table() => vec![Statistic::InputSquares { site }],
            Self::Whitened => vec![Statistic::Covariance { site }],
        }
    }

    /// The importance of a layer's weights in this method's eyes.
    pub(crate) fn importance(
        self,
        layer: &Layer,
        calibration: Option<&Calibration>,
    ) -> Result<Importance> {
        let statistics = self.statistics(layer);
        let found = |index: usize| -> Result<Tensor> {
            let statistic = statistics
                .get(index)
                .ok_or_else(|| Error::invalid("statistic", index, "one that the method needs"))?;
            match calibration {
                Some(calibration) => calibration.tensor(statistic),
                None => Err(Error::NotCollected {
                    statistic: statistic.to_string(),
                }),
            }
        };
        let vector = |index: usize| engine(found(index)?.to_vec1::<f64>());
        let importance = match self {
            Self::Svd => Importance::Plain,
            Self::Fwsvd => Importance::Rows(vector(0)?),
            Self::ActivationWeighted => Importance::InputSquares(vector(0)?),
            Self::RowColumnFisher => Importance::RowsAndColumns {
                input: vector(0)?,
                output: vector(1)?,
            },
            Self::GeneralisedFisher => Importance::Kronecker {
                input: found(0)?,
                output: found(1)?,
            },
            Self::Whitened if layer.is_table() => Importance::InputSquares(vector(0)?),
            Self::Whitened => Importance::Covariance(found(0)?),
        };
        Ok(importance)
    }
}

impl fmt::Display for Factorisation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Factorisation {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL
            .into_iter()
            .find(|method| method.name() == name)
            .ok_or_else(|| {
                let names: Vec<&str> = Self::ALL.iter().map(|method| method.name()).collect();
                Error::invalid(
                    "method",
                    format!("{name:?}"),
                    format!("one of {}", names.join(", ")),
                )
            })
    }
}

/// A [`Metric`] that owns its numbers.
#[derive(Clone, Debug)]
pub(crate) enum Importance {
    Plain,
    Rows(Vec<f64>),
    InputSquares(Vec<f64>),
    Covariance(Tensor),
    Kronecker { input: Tensor, output: Tensor },
    RowsAndColumns { input: Vec<f64>, output: Vec<f64> },
}

impl Importance {
    pub(crate) fn metric(&self) -> Metric<'_> {
        match self {
            Self::Plain => Metric::Plain,
            Self::Rows(values) => Metric::Rows(values),
            Self::InputSquares(values) => Metric::InputSquares(values),
            Self::Covariance(matrix) => Metric::Covariance(matrix),
            Self::Kronecker { input, output } => Metric::Kronecker { input, output },
            Self::RowsAndColumns { input, output } => Metric::RowsAndColumns { input, output },
        }
    }

    /// Whether every weight is without importance: the loss never saw the layer.
    pub(crate) fn is_zero(&self) -> Result<bool> {
        let none = |values: &[f64]| values.iter().all(|value| *value == 0.0);
        Ok(match self {
            Self::Plain => false,
            Self::Rows(values) | Self::InputSquares(values) => none(values),
            Self::RowsAndColumns { input, output } => none(input) || none(output),
            Self::Covariance(matrix) | Self::Kronecker { input: matrix, .. } => {
                engine(engine(engine(matrix.abs())?.max_all())?.to_scalar::<f64>())? == 0.0
            }
        })
    }

    /// The error that the method minimises, of a difference `Δ` `[output, input]` in `f64`.
    pub(crate) fn energy(&self, difference: &Tensor) -> Result<f64> {
        let device = difference.device();
        let (output, input) = engine(difference.dims2())?;
        let row = |values: &[f64]| engine(Tensor::from_slice(values, (1, input), device));
        let weighted = match self {
            Self::Plain => difference.clone(),
            Self::Rows(values) | Self::InputSquares(values) => {
                engine(difference.broadcast_mul(&row(values)?))?
            }
            Self::RowsAndColumns {
                input: rows,
                output: columns,
            } => {
                let columns = engine(Tensor::from_slice(columns, (output, 1), device))?;
                let weighted = engine(difference.broadcast_mul(&row(rows)?))?;
                engine(weighted.broadcast_mul(&columns))?
            }
            Self::Covariance(covariance) => engine(difference.matmul(covariance))?,
            Self::Kronecker {
                input: a,
                output: b,
            } => engine(b.matmul(&engine(difference.matmul(a))?))?,
        };
        let energy = engine(engine(engine(weighted * difference)?.sum_all())?.to_scalar::<f64>())?;
        // A semi-definite form is negative by rounding only.
        Ok(energy.max(0.0))
    }
}

/// `½ Σ Î(W_oi) Δ_oi²`: the rise of the loss to second order, for weights at an optimum whose
/// curvature is the diagonal of the Fisher information.
pub(crate) fn predicted_loss_rise(fisher: &Tensor, difference: &Tensor) -> Result<f64> {
    let squares = engine(engine(difference.to_dtype(DType::F64))?.sqr())?;
    let sum = engine(engine(fisher * squares)?.sum_all())?;
    Ok(0.5 * engine(sum.to_scalar::<f64>())?)
}

/// Entries of the list of methods.
macro_rules! methods {
    ($($name:ident = $which:ident, $summary:literal, $source:literal;)*) => {
        $(pub(crate) const $name: Method = Method {
            name: Factorisation::$which.name(),
            summary: $summary,
            source: $source,
            schedule: Schedule::OneShot,
            effect: Effect::Ranks,
            observes: false,
            leaves: &[Left::Factors],
            refuses: |_| &[],
            requirements: |model, settings| {
                Factorisation::$which.requirements(model, &settings.selection)
            },
            plan: |task, budget| {
                Factorisation::$which.plan(task.model, &task.settings().selection, budget)
            },
            apply: |task, plan| Factorisation::$which.apply(task, plan),
            cut: None,
        };)*
    };
}

methods! {
    SVD = Svd, "Low rank by plain SVD", "Eckart & Young 1936";
    FWSVD = Fwsvd, "Low rank, inputs weighted by Fisher information (FWSVD)",
        "Hsu et al. 2022, arXiv 2207.00112";
    ACTIVATION_WEIGHTED = ActivationWeighted, "Low rank, inputs weighted by their mean square",
        "Yuan et al. 2023, arXiv 2312.05821";
    ROW_COLUMN_FISHER = RowColumnFisher,
        "Low rank, inputs and outputs weighted by Fisher information", "variant of FWSVD";
    GENERALISED_FISHER = GeneralisedFisher, "Low rank, Kronecker-factored Fisher information",
        "GFWSVD 2025, arXiv 2505.17974";
    WHITENED = Whitened, "Low rank with the least output error of each layer (SVD-LLM)",
        "Wang et al. 2024, arXiv 2403.07378";
}
