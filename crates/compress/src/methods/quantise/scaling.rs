//! Rounding with the scale of activations moved into the weights.
//!
//! `W x = (W diag(m)) (diag(m)⁻¹ x)`: columns whose inputs are large are made large before they are
//! rounded, and so lose less. `m = (E|x|)^α`, with the `α` of a grid whose error on the inputs,
//! `Σ δ H δᵀ` over the rows' changes `δ` and the inputs' second moment `H`, is least (Lin et al. 2023,
//! AWQ, arXiv 2306.00978). `α = 0` is rounding to nearest, so that nothing is lost but time.

use lapidary_kernels::{DType, Device, Tensor};

use super::grid::GridKind;
use super::rounded::Rounded;
use crate::Result;
use crate::error::engine;

/// Exponents that are tried: 0, 0.05, … 0.95.
const EXPONENTS: usize = 20;

/// A matrix rounded as `W diag(m)`.
pub(crate) struct Scaled {
    pub(crate) rounded: Rounded,
    /// `1 / m`, which multiplies the input; none where `m` is all ones.
    pub(crate) input_scale: Option<Vec<f64>>,
}

impl Scaled {
    /// The numbers that `W` became, row by row.
    pub(crate) fn numbers(&self) -> Vec<f64> {
        let numbers = self.rounded.numbers();
        match &self.input_scale {
            None => numbers,
            Some(scale) => {
                let columns = scale.iter().cycle();
                numbers.iter().zip(columns).map(|(w, r)| w * r).collect()
            }
        }
    }
}

/// `m` for an exponent, with a geometric mean of 1 so that grids keep their range.
fn scale(magnitudes: &[f64], exponent: f64) -> Vec<f64> {
    let largest = magnitudes.iter().copied().fold(0.0, f64::max);
    // An input that is never anything is no reason for a scale without bound.
    let floor = largest * 1e-4;
    let powers = magnitudes
        .iter()
        .map(|m| exponent * m.max(floor).max(f64::MIN_POSITIVE).ln());
    let logs: Vec<f64> = powers.collect();
    let mean = logs.iter().sum::<f64>() / logs.len().max(1) as f64;
    logs.iter().map(|log| (log - mean).exp()).collect()
}

/// `weights` `[output, input]` row by row, for inputs of mean size `magnitudes` `[input]` and second
/// moment `moment` `[input, input]`.
///
/// # Errors
/// When a group fits no grid.
pub(crate) fn round(
    kind: GridKind,
    group: usize,
    dims: [usize; 2],
    weights: &[f64],
    magnitudes: &[f64],
    moment: &Tensor,
) -> Result<Scaled> {
    let moment = engine(moment.to_dtype(DType::F32))?;
    let mut best: Option<(f64, Scaled)> = None;
    for step in 0..EXPONENTS {
        let exponent = step as f64 / EXPONENTS as f64;
        let scaled = one(kind, group, dims, weights, magnitudes, exponent)?;
        let error = error_on(dims, weights, &scaled.numbers(), &moment)?;
        if best.as_ref().is_none_or(|(least, _)| error < *least) {
            best = Some((error, scaled));
        }
    }
    match best {
        Some((_, scaled)) => Ok(scaled),
        None => one(kind, group, dims, weights, magnitudes, 0.0),
    }
}

fn one(
    kind: GridKind,
    group: usize,
    dims: [usize; 2],
    weights: &[f64],
    magnitudes: &[f64],
    exponent: f64,
) -> Result<Scaled> {
    if exponent == 0.0 {
        return Ok(Scaled {
            rounded: Rounded::to_nearest(kind, group, dims, weights)?,
            input_scale: None,
        });
    }
    let m = scale(magnitudes, exponent);
    let columns = m.iter().cycle();
    let larger: Vec<f64> = weights.iter().zip(columns).map(|(w, m)| w * m).collect();
    Ok(Scaled {
        rounded: Rounded::to_nearest(kind, group, dims, &larger)?,
        input_scale: Some(m.iter().map(|m| 1.0 / m).collect()),
    })
}

/// `Σ δ H δᵀ` over the rows of `weights − rounded`.
pub(crate) fn error_on(
    dims: [usize; 2],
    weights: &[f64],
    rounded: &[f64],
    moment: &Tensor,
) -> Result<f64> {
    let change = weights.iter().zip(rounded).map(|(w, r)| w - r).collect();
    let change = engine(Tensor::from_vec(change, &dims[..], &Device::Cpu))?;
    let change = engine(change.to_dtype(moment.dtype()))?;
    let product = engine(engine(change.matmul(moment))? * change)?;
    let sum = engine(engine(product.sum_all())?.to_dtype(DType::F64))?;
    engine(sum.to_scalar::<f64>())
}

#[cfg(test)]
mod tests {
    use super::*;

    const KIND: GridKind = GridKind {
        bits: 4,
        symmetric: true,
        search: false,
    };

    fn weights() -> Vec<f64> {
        (0..4 * 64).map(|i| (f64::from(i) * 0.37).sin()).collect()
    }

    /// Inputs of which every eighth is fifty times as large as the others.
    fn magnitudes() -> Vec<f64> {
        let large = |i: usize| if i.is_multiple_of(8) { 5.0 } else { 0.1 };
        (0..64).map(large).collect()
    }

    #[test]
    fn moving_a_scale_leaves_the_function_as_it_was() {
        let (weights, m) = (weights(), scale(&magnitudes(), 0.5));
        let x: Vec<f64> = (0..64).map(|i| (f64::from(i) * 1.3).cos()).collect();
        for row in weights.chunks_exact(64) {
            let before: f64 = row.iter().zip(&x).map(|(w, x)| w * x).sum();
            let parts = row.iter().zip(&x).zip(&m);
            let after: f64 = parts.map(|((w, x), m)| (w * m) * (x / m)).sum();
            assert!((before - after).abs() < 1e-12);
        }
    }

    #[test]
    fn it_costs_less_where_some_inputs_are_large_and_never_more() {
        let diagonal = |m: &[f64]| {
            let values = (0..64 * 64)
                .map(|i| {
                    if i / 64 == i % 64 {
                        m[i / 64] * m[i / 64]
                    } else {
                        0.0
                    }
                })
                .collect::<Vec<f64>>();
            Tensor::from_vec(values, (64, 64), &Device::Cpu).unwrap()
        };
        let weights = weights();
        let cost = |m: &[f64]| {
            let moment = diagonal(m);
            let scaled = round(KIND, 32, [4, 64], &weights, m, &moment).unwrap();
            let nearest = Rounded::to_nearest(KIND, 32, [4, 64], &weights).unwrap();
            [scaled.numbers(), nearest.numbers()]
                .map(|numbers| error_on([4, 64], &weights, &numbers, &moment).unwrap())
        };
        let [scaled, nearest] = cost(&magnitudes());
        assert!(scaled < 0.8 * nearest, "{scaled} against {nearest}");
        let [scaled, nearest] = cost(&[1.0; 64]);
        assert!(scaled <= nearest * (1.0 + 1e-5));
    }
}
