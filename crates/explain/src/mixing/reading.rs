//! Which of the last vectors a target reads, and along what.

use crate::error::engine;
use crate::target::number;
use crate::{Result, Target};
use lapidary_kernels::{DType, Tensor, backward};
use lapidary_model::Output;
use lapidary_signal::Trace;

/// The explained number as a function of the vectors after the final norm, at first order:
/// `y ≈ Σ_t u_t · h_t + rest`, exact for heads that are affine.
pub(crate) struct Reading {
    /// The explained number `y`.
    pub(crate) explained: f64,
    /// The positions that are read, each with its `u_t` `[width]`.
    pub(crate) at: Vec<(usize, Vec<f64>)>,
    /// `y − Σ u_t · h_t`: the head's bias, and what its linearisation leaves.
    pub(crate) rest: f64,
    tokens: usize,
}

impl Reading {
    /// `final_norm` was tapped in the pass that gave `output`.
    pub(crate) fn new(target: &Target, output: &Output, trace: &Trace) -> Result<Self> {
        let explained = target.number(output)?;
        let gradients = engine(backward(&explained))?;
        let record = trace.record("final_norm")?;
        let rows = |tensor: &Tensor| -> Result<Vec<Vec<f64>>> {
            let double = engine(engine(tensor.detach().get(0))?.to_dtype(DType::F64))?;
            engine(double.to_vec2::<f64>())
        };
        let hidden = rows(record.signal.value())?;
        let directions = rows(&record.gradient(&gradients)?)?;
        let explained = number(&explained)?;
        let mut rest = explained;
        let mut at = Vec::new();
        for (position, (u, h)) in directions.into_iter().zip(&hidden).enumerate() {
            if u.iter().all(|entry| *entry == 0.0) {
                continue;
            }
            rest -= dot(&u, h);
            at.push((position, u));
        }
        Ok(Self {
            explained,
            at,
            rest,
            tokens: hidden.len(),
        })
    }

    /// The mean of the rows of `matrix` `[tokens][tokens]` that are read; of a target that reads
    /// nothing, the last row.
    pub(crate) fn mean_row(&self, matrix: &[Vec<f64>]) -> Vec<f64> {
        let mut positions: Vec<usize> = self.at.iter().map(|(position, _)| *position).collect();
        if positions.is_empty() {
            positions.extend(self.tokens.checked_sub(1));
        }
        let mut mean = vec![0.0; self.tokens];
        for row in positions
            .iter()
            .filter_map(|position| matrix.get(*position))
        {
            for (mean, entry) in mean.iter_mut().zip(row) {
                *mean += entry / positions.len() as f64;
            }
        }
        mean
    }
}

pub(crate) fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}
