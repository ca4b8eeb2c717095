//! One or two steps towards a sparse code of each token in a learned dictionary (Yu et al., White-Box
//! Transformers via Sparse Rate Reduction, NeurIPS 2023, arXiv 2306.01129; over-complete for text in
//! the follow-up, arXiv 2405.20299).
//!
//! A step of ISTA for `min_{a ≥ 0} λ ‖a‖₁ + ½ ‖y − D a‖²`, from `a₀ = y` where the dictionary is
//! square:
//!
//! ```text
//! out = ReLU(y + η Dᵀ (y − D y) − η λ)
//! ```
//!
//! and two steps from nothing, read back through the dictionary, where it has `atoms` columns:
//!
//! ```text
//! a₀  = ReLU(η Dᵀ y − η λ)
//! a₁  = ReLU(a₀ + η Dᵀ (y − D a₀) − η λ)
//! out = D a₁
//! ```
//!
//! There is no residual: in a block of [`Wiring::Replacing`](crate::block::Wiring) the code takes the
//! place of the stream. Cost per token: `4 width² + 6 width`, or `8 width · atoms + 7 atoms + 2 width`;
//! parameters: those of `D`.

use crate::error::{bounded, tensor};
use crate::parameters::{Init, Parameters};
use crate::{Context, Error, Result};
use lapidary_kernels::{Activation, Tensor};
use lapidary_signal::{Linear, Signal};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

const MAX_ATOMS: usize = 1 << 20;

/// A sparse code of each token.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SparseCodeSpec {
    /// Columns of an over-complete dictionary; it is square when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub atoms: Option<usize>,
    /// Size `η` of a step.
    pub step: f64,
    /// Weight `λ` of the code's `ℓ₁` norm.
    pub penalty: f64,
}

impl Default for SparseCodeSpec {
    fn default() -> Self {
        Self {
            atoms: None,
            step: 0.1,
            penalty: 0.1,
        }
    }
}

impl SparseCodeSpec {
    pub(super) fn validate(&self, field: &str) -> Result<()> {
        if let Some(atoms) = self.atoms {
            bounded(format!("{field}.atoms"), atoms, 1..=MAX_ATOMS)?;
        }
        for (name, number) in [("step", self.step), ("penalty", self.penalty)] {
            if !(number.is_finite() && number >= 0.0) {
                let field = format!("{field}.{name}");
                return Err(Error::spec(field, number, "a number of at least 0"));
            }
        }
        Ok(())
    }
}

/// The part with its dictionary.
#[derive(Debug)]
pub struct SparseCode {
    path: String,
    spec: SparseCodeSpec,
    /// `D`, from code to token.
    synthesis: Linear,
    /// `Dᵀ`.
    analysis: Linear,
    /// `−η λ`.
    threshold: Tensor,
}

impl SparseCode {
    /// Builds the part for tokens of `width`.
    pub fn new(
        spec: &SparseCodeSpec,
        width: usize,
        mut parameters: Parameters<'_>,
    ) -> Result<Self> {
        let atoms = spec.atoms.unwrap_or(width);
        // Kaiming's bounds of the published code, for the features that a coefficient reads: wide enough that a
        // code of few steps is of the size of its token, however many atoms there are.
        let most = (6.0 / width.max(1) as f64).sqrt();
        let init = Init::Uniform {
            low: -most,
            high: most,
        };
        let dictionary = parameters.tensor("dictionary", &[width, atoms], init)?;
        let transposed = tensor(dictionary.t())?;
        let threshold = tensor(Tensor::new(
            &[-spec.step * spec.penalty],
            dictionary.device(),
        ))?;
        Ok(Self {
            path: parameters.path().to_owned(),
            spec: spec.clone(),
            threshold: tensor(threshold.to_dtype(dictionary.dtype()))?,
            synthesis: Linear::new(dictionary, None)?,
            analysis: Linear::new(transposed, None)?,
        })
    }

    /// Codes each token of `x` `[batch, length, width]`.
    pub fn forward(&self, x: &Signal, cx: &Context<'_>) -> Result<Signal> {
        let site = |name: &str, signal: Signal| {
            cx.trace.site(format_args!("{}.{name}", self.path), signal)
        };
        let y = site("in", x.clone())?;
        let out = match self.spec.atoms {
            None => site("code", self.step(&y, &y)?)?,
            Some(_) => {
                let first = self.shrunk(&y.linear(&self.analysis)?.scale(self.spec.step)?)?;
                let code = site("code", self.step(&first, &y)?)?;
                code.linear(&self.synthesis)?
            }
        };
        Ok(site("out", out)?)
    }

    /// `ReLU(a + η Dᵀ (y − D a) − η λ)`.
    fn step(&self, code: &Signal, y: &Signal) -> Result<Signal> {
        let error = y.add(&code.linear(&self.synthesis)?.scale(-1.0)?)?;
        let slope = error.linear(&self.analysis)?.scale(self.spec.step)?;
        self.shrunk(&code.add(&slope)?)
    }

    fn shrunk(&self, code: &Signal) -> Result<Signal> {
        let shifted = code.add_constant(&self.threshold)?;
        Ok(shifted.activate(Activation::Relu)?)
    }
}
