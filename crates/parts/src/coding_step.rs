//! The step of CRATE as it is derived (Yu et al., White-Box Transformers via Sparse Rate Reduction, 2023, arXiv
//! 2306.01129): attention takes a step down the coding rate of `N` tokens `Z` in the subspaces of its heads, of
//! `p` features each, at a precision `ε`,
//!
//! ```text
//! R^c(Z) = ½ Σ_k log det(I + s (U_kᵀ Z)ᵀ (U_kᵀ Z)),   s = p / (N ε²)
//! Z − κ ∇R^c(Z) ≈ (1 − κ s) Z + κ s · MSSA(Z),   MSSA(Z) = s Σ_k U_k (U_kᵀ Z) softmax((U_kᵀ Z)ᵀ (U_kᵀ Z))
//! ```
//!
//! where a residual block has `Z + A(Z)`, and `Σ_k U_k (U_kᵀ Z) softmax(…)` is attention whose output is tied.
//!
//! Cost: three operations for each feature of a token, in the place of one.

use crate::attention::{MixerSpec, QueryKeySharing};
use crate::block::{BlockSpec, Wiring};
use crate::error::tensor;
use crate::{Error, Result};
use lapidary_kernels::Tensor;
use lapidary_signal::Signal;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How far attention moves tokens down their coding rate.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CodingStep {
    /// Length `κ` of the step.
    pub kappa: f64,
    /// Precision `ε` that tokens are coded at.
    pub epsilon: f64,
}

impl CodingStep {
    /// Refuses numbers that are no step, and a block that has no tokens in subspaces to take it for.
    pub(crate) fn validate(&self, block: &BlockSpec, field: &str) -> Result<()> {
        for (name, number) in [("kappa", self.kappa), ("epsilon", self.epsilon)] {
            if !(number.is_finite() && number > 0.0) {
                let field = format!("{field}.{name}");
                return Err(Error::spec(field, number, "a number above 0"));
            }
        }
        let refuse =
            |expected: &str| Err(Error::spec(field, "given", format!("absent {expected}")));
        if block.wiring != Wiring::Replacing {
            return refuse("in a block whose wiring is another than replacing");
        }
        let MixerSpec::MultiHead(attention) = &block.attention else {
            return refuse("beside another mixer than multi-head");
        };
        if attention.sharing != QueryKeySharing::All || !attention.mechanism.is_softmax() {
            return refuse(
                "beside another attention than softmax with sharing = \"all\", whose heads are subspaces",
            );
        }
        if attention.causal || attention.window.is_some() {
            return refuse(
                "in causal attention or under a window: the rate is of all tokens of a sequence together",
            );
        }
        Ok(())
    }

    /// `(1 − κ s) x + κ s² y` of tokens `x` and what attention `y` wrote for them, both `[batch, length, width]`, with `p`
    /// features in a head; pads, where `keep` `[batch, length]` is 0, are not among the `N` tokens.
    ///
    /// # Errors
    /// Those of the tensor engine.
    pub(crate) fn forward(
        &self,
        x: &Signal,
        y: &Signal,
        features: usize,
        keep: Option<&Tensor>,
    ) -> Result<Signal> {
        let factors = |tokens: f64| {
            let scale = features as f64 / (tokens.max(1.0) * self.epsilon * self.epsilon);
            [1.0 - self.kappa * scale, self.kappa * scale * scale]
        };
        let Some(keep) = keep else {
            let [kept, moved] = factors(x.dims().get(1).map_or(1.0, |length| *length as f64));
            return Ok(x.scale(kept)?.add(&y.scale(moved)?)?);
        };
        let rows = tensor(keep.to_vec2::<u8>())?;
        let (mut kept, mut moved) = (Vec::new(), Vec::new());
        for row in &rows {
            let [of_token, of_step] =
                factors(row.iter().filter(|there| **there != 0).count() as f64);
            kept.push(of_token);
            moved.push(of_step);
        }
        let times = |signal: &Signal, factors: Vec<f64>| -> Result<Signal> {
            let factors = tensor(Tensor::from_vec(factors, (rows.len(), 1, 1), x.device()))?;
            let factors = tensor(factors.to_dtype(x.dtype()))?;
            Ok(signal.multiply_constant(&factors)?)
        };
        Ok(times(x, kept)?.add(&times(y, moved)?)?)
    }
}
