//! What was cut, and what it cost.

use lapidary_model::{HeadSpec, InputSpec, Model};
use serde::Serialize;

use crate::{Fingerprint, Method, Objective};

/// Errors of one approximation of a layer, relative to the layer itself: 0 is exact, 1 is as
/// bad as leaving the layer out.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct LayerErrors {
    /// In the norm that the method minimises.
    pub weighted: f64,
    /// In the Frobenius norm.
    pub unweighted: f64,
    /// `½ Σ Î Δ²`, in nats per example, where the calibration has the Fisher information of
    /// every weight.
    pub predicted_loss_rise: Option<f64>,
}

/// One layer before and after.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct LayerReport {
    /// Path of the layer.
    pub path: String,
    /// Width of its input.
    pub input: usize,
    /// Width of its output.
    pub output: usize,
    /// Its rank, when it was factorised.
    pub rank: Option<usize>,
    /// Why it was left, or what was unusual about it.
    pub note: Option<String>,
    /// Its weights before, without bias.
    pub parameters_before: usize,
    /// Its weights after.
    pub parameters_after: usize,
    /// Errors of what was chosen, rounding to the model's type included.
    pub chosen: Option<LayerErrors>,
    /// Errors that plain SVD makes at the same rank: larger in the method's norm and smaller in
    /// the Frobenius norm, which is the paper's observation that the latter is not what counts.
    pub plain: Option<LayerErrors>,
    /// `√(E‖x (W − Ŵ)ᵀ‖² / E‖x Wᵀ‖²)` over data, once it was measured
    /// ([`crate::Compressed::measure_outputs`]).
    pub output_error: Option<f64>,
}

/// Size of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Size {
    /// Parameters, tied ones counted once.
    pub parameters: usize,
    /// Bytes of the parameters.
    pub bytes: usize,
    /// Floating-point operations per token in linear layers and a language model's output, a
    /// multiply-add being two. Attention over other tokens is not in it, nor are layers on a
    /// pooled vector, which run once per sequence.
    pub flops_per_token: usize,
}

impl Size {
    /// The size of a model.
    pub fn of(model: &Model) -> Self {
        let mut multiplications: usize = model
            .linears()
            .iter()
            .filter(|linear| {
                !linear.path.starts_with("head.")
                    || matches!(model.spec().head, HeadSpec::LanguageModel { .. })
            })
            .map(|linear| match linear.rank {
                Some(rank) => rank * (linear.input + linear.output),
                None => linear.input * linear.output,
            })
            .sum();
        if let (HeadSpec::LanguageModel { tied: true, .. }, InputSpec::Tokens(tokens)) =
            (&model.spec().head, &model.spec().input)
        {
            let width = tokens.embedding_width.unwrap_or(model.spec().width);
            multiplications += tokens.vocabulary * width;
        }
        Self {
            parameters: model.parameter_count(),
            bytes: model
                .parameters()
                .values()
                .map(|tensor| tensor.elem_count() * tensor.dtype().size_in_bytes())
                .sum(),
            flops_per_token: 2 * multiplications,
        }
    }
}

/// What was done to a model.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Report {
    /// How.
    pub method: Method,
    /// The weights that were compressed.
    pub original: Fingerprint,
    /// The loss whose gradients weighed the weights, where a method needed them.
    pub objective: Option<Objective>,
    /// Examples that the calibration saw.
    pub examples: usize,
    /// Tokens that the calibration saw.
    pub tokens: usize,
    /// Every chosen layer.
    pub layers: Vec<LayerReport>,
    /// The model before.
    pub before: Size,
    /// The model after.
    pub after: Size,
}

impl Report {
    /// The layers that were factorised.
    pub fn factorised(&self) -> impl Iterator<Item = &LayerReport> {
        self.layers.iter().filter(|layer| layer.rank.is_some())
    }

    /// Parameters after over parameters before.
    pub fn kept(&self) -> f64 {
        self.after.parameters as f64 / self.before.parameters.max(1) as f64
    }
}
