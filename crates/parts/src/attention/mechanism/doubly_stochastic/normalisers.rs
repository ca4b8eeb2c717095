//! Softmax and Sinkhorn: what makes rows, or rows and columns, of scores sum to one.

use super::Scored;
use crate::Result;
use crate::error::tensor;
use lapidary_kernels::Tensor;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A score that is as good as none, and yet a number.
const HIDDEN: f64 = -1e30;
/// Added to variances.
const TINY: f64 = 1e-12;

/// What a temperature is at most, beside `1 / scale`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Statistic {
    /// The standard deviation of the scores.
    #[default]
    Deviation,
    /// Their variance.
    Variance,
}

/// Which scores a statistic is of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Over {
    /// Those of each query.
    #[default]
    Row,
    /// Those of all queries of a head.
    Matrix,
}

/// How Sinkhorn's iterations are computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum SinkhornForm {
    /// As potentials of rows and columns, which overflow nowhere.
    #[default]
    Log,
    /// By dividing exponentials by their sums.
    Naive,
}

/// Rows of exponentials that sum to one; those of pads are zero.
pub(super) fn softmax(scores: &Tensor, scored: &Scored) -> Result<Tensor> {
    let scores = scored.hidden(scores, HIDDEN)?;
    scored.real(&lapidary_kernels::softmax(&scores, &Default::default())?)
}

/// `softmax(M / min(τ, statistic of M))` for raw scores `M` and `τ = 1 / scale` (NormSoftmax).
pub(super) fn norm_softmax(
    raw: &Tensor,
    scored: &Scored,
    scale: f64,
    (statistic, over): (Statistic, Over),
) -> Result<Tensor> {
    let sum = |x: &Tensor| -> Result<Tensor> {
        let rows = tensor(x.sum_keepdim(3))?;
        match over {
            Over::Row => Ok(rows),
            Over::Matrix => tensor(rows.sum_keepdim(2)),
        }
    };
    let pairs = scored.pairs(raw)?;
    // A row of a pad has none; what it then gives is hidden.
    let count = tensor(sum(&pairs)?.maximum(1.0))?;
    let mean = tensor(sum(&tensor(raw.mul(&pairs))?)?.div(&count))?;
    let off = tensor(tensor(raw.broadcast_sub(&mean))?.mul(&pairs))?;
    let variance = tensor(sum(&tensor(off.sqr())?)?.div(&count))?;
    let variance = tensor(variance + TINY)?;
    let temperature = match statistic {
        Statistic::Deviation => tensor(variance.sqrt())?,
        Statistic::Variance => variance,
    };
    let temperature = tensor(temperature.minimum(1.0 / scale))?;
    softmax(&tensor(raw.broadcast_div(&temperature))?, scored)
}

/// Sinkhorn's iterations on `e^{M / ε}`: rows are made to sum to one, then columns, then rows, ….
///
/// With potentials `f` of rows and `g` of columns, both 0 at first,
/// `f_i ← −ln Σ_j e^{M_ij/ε + g_j}` and `g_j ← −ln Σ_i e^{M_ij/ε + f_i}` in turns, and
/// `A_ij = e^{M_ij/ε + f_i + g_j}`. With uniform marginals `1 / T` and `A` multiplied by `T`, as optimal
/// transport has it, that is the same.
pub(super) fn sinkhorn(
    scores: &Tensor,
    scored: &Scored,
    iterations: usize,
    form: SinkhornForm,
) -> Result<Tensor> {
    let scores = scored.hidden(scores, HIDDEN)?;
    match form {
        SinkhornForm::Naive => {
            // A row's factor is taken away again by its first sum.
            let largest = tensor(scores.max_keepdim(3))?.detach();
            let mut weights = tensor(tensor(scores.broadcast_sub(&largest))?.exp())?;
            weights = scored.real(&weights)?;
            for iteration in 0..iterations {
                let sums = tensor(weights.sum_keepdim(if iteration % 2 == 0 { 3 } else { 2 }))?;
                let none = tensor(tensor(sums.eq(0.0))?.to_dtype(sums.dtype()))?;
                weights = tensor(weights.broadcast_div(&tensor(sums + none)?))?;
            }
            Ok(weights)
        }
        SinkhornForm::Log => {
            let mut potentials: [Option<Tensor>; 2] = [None, None];
            for iteration in 0..iterations {
                // Rows in even ones, which sum over columns.
                let side = iteration % 2;
                let shifted = match &potentials[1 - side] {
                    None => scores.clone(),
                    Some(other) => tensor(scores.broadcast_add(other))?,
                };
                let found = tensor(log_sum(&shifted, 3 - side)?.neg())?;
                potentials[side] = Some(scored.real_side(&found, side)?);
            }
            let mut logs = scores;
            for potential in potentials.iter().flatten() {
                logs = tensor(logs.broadcast_add(potential))?;
            }
            scored.real(&tensor(logs.exp())?)
        }
    }
}

/// `ln Σ e^x` along a dimension, which stays.
fn log_sum(x: &Tensor, dimension: usize) -> Result<Tensor> {
    let largest = tensor(x.max_keepdim(dimension))?.detach();
    let sum = tensor(tensor(x.broadcast_sub(&largest))?.exp())?;
    let sum = tensor(tensor(sum.sum_keepdim(dimension))?.log())?;
    tensor(sum + largest)
}
