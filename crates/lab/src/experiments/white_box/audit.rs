//! What is measured behind each block: how compact tokens lie, and how sparse they are.

use super::rate::rate;
use super::{BLOCKS, HEADS};
use crate::error::engine;
use crate::experiments::{classifier, mean, numbers};
use crate::{Result, Series};
use lapidary_factor::Matrix;
use lapidary_kernels::Tensor;
use lapidary_model::{Model, Pass};
use lapidary_signal::Trace;

/// One number behind each block.
#[derive(Clone, Debug, Default)]
pub(super) struct Audit {
    /// `½ log det(I + p/(N ε) W Wᵀ)` of tokens projected on a head's subspace and made as long as one,
    /// `ε = 0.01`; mean over heads and sequences.
    pub rates: Vec<f64>,
    /// Share of entries that are not zero.
    pub active: Vec<f64>,
}

/// The sites that `blocks` blocks are measured at.
pub(super) fn sites() -> Result<Trace> {
    Ok(Trace::new()
        .capture("blocks.*.attention.query")?
        .capture("blocks.*.out")?)
}

impl Audit {
    /// Of a pass over so many blocks by [`sites`]. What a block of codes gives is its code.
    pub(super) fn of(trace: &Trace, blocks: usize) -> Result<Self> {
        let mut audit = Self::default();
        for block in 0..blocks {
            let projected = trace.signal(&format!("blocks.{block}.attention.query"))?;
            audit.rates.push(of_heads(projected.value())?);
            let out = trace.signal(&format!("blocks.{block}.out"))?;
            let values = numbers(out.value())?;
            let active = values.iter().filter(|value| **value != 0.0).count();
            audit
                .active
                .push(active as f64 / values.len().max(1) as f64);
        }
        Ok(audit)
    }
}

/// The mean coding rate of heads of `projected` `[batch, length, heads · width]`.
fn of_heads(projected: &Tensor) -> Result<f64> {
    let (batch, length, width) = engine(projected.dims3())?;
    let each = width / HEADS;
    let values = numbers(projected)?;
    let mut rates = Vec::new();
    for sequence in 0..batch {
        for head in 0..HEADS {
            let token = |j: usize| {
                let start = (sequence * length + j) * width + head * each;
                values.get(start..start + each).unwrap_or(&[])
            };
            let lengths: Vec<f64> = (0..length)
                .map(|j| {
                    let square: f64 = token(j).iter().map(|x| x * x).sum();
                    square.sqrt().max(1e-12)
                })
                .collect();
            let w = Matrix::from_fn(each, length, |i, j| token(j)[i] / lengths[j]);
            let identity = Matrix::from_fn(each, each, |i, j| f64::from(u8::from(i == j)));
            // ε = 0.01 stands where the definition has ε², as in the authors' measurements.
            rates.push(rate(&w, &[identity], 0.1)?);
        }
    }
    Ok(mean(rates))
}

/// Of a model of sequences.
pub(super) fn of_sequences(model: &Model, sequences: &[&[u32]]) -> Result<Audit> {
    let (input, padding) = classifier::batch(sequences)?;
    let trace = sites()?;
    let pass = Pass {
        padding: Some(&padding),
        trace: Some(&trace),
        ..Pass::default()
    };
    model.forward(&input, pass)?;
    Audit::of(&trace, BLOCKS)
}

/// Means over several.
pub(super) fn averaged(audits: &[Audit]) -> Audit {
    let over = |of: fn(&Audit) -> &Vec<f64>| {
        let blocks = audits.first().map_or(0, |audit| of(audit).len());
        (0..blocks)
            .map(|block| {
                mean(
                    audits
                        .iter()
                        .filter_map(|audit| of(audit).get(block).copied())
                        .collect::<Vec<_>>(),
                )
            })
            .collect()
    };
    Audit {
        rates: over(|audit| &audit.rates),
        active: over(|audit| &audit.active),
    }
}

/// How often a number is below the one before.
pub(super) fn falls(values: &[f64]) -> usize {
    let pairs = values.windows(2);
    pairs.filter(|w| matches!(w, [a, b] if b < a)).count()
}

/// Numbers in words.
pub(super) fn told(values: &[f64]) -> String {
    let each: Vec<String> = values.iter().map(|value| format!("{value:.2}")).collect();
    each.join(", ")
}

/// Numbers as a line over the blocks.
pub(super) fn series(name: &str, values: &[f64]) -> Series {
    Series {
        name: name.to_owned(),
        points: (1..)
            .zip(values)
            .map(|(block, value)| (f64::from(block), *value))
            .collect(),
    }
}
