//! How much of a block's vector at each token comes from each token.

use super::{Captured, FixedNorm};
use crate::error::engine;
use crate::{Error, Result};
use lapidary_kernels::{DType, Tensor, VectorNorm};
use lapidary_parts::block::Wiring;

/// Which measure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Contributions {
    /// ALTI (Ferrando et al. 2022, arXiv 2203.04212): how much nearer token `j` brings the sum,
    ///
    /// ```text
    /// c_tj = max(0, ‖y_t‖₁ − ‖y_t − T̃_t(x_j)‖₁),   T̃_t(x_j) = T_t(x_j) + [j = t] x_t
    /// ```
    ///
    /// with `y` the residual stream after attention; in post-norm blocks after its norm, which
    /// then is linearised around each `T̃`.
    Alti,
    /// GlobEnc (Modarressi et al. 2022, arXiv 2205.03286), of post-norm blocks: the length of the
    /// share through both norms and both residuals, the feed-forward part left out,
    /// `c_tj = ‖L₂(L₁(T̃_t(x_j)))‖₂`.
    GlobEnc,
}

impl Contributions {
    /// `C` of block `index`, `[token][token]`; rows sum to one. A row without any contribution
    /// counts as the token's own.
    pub(crate) fn of(self, captured: &Captured<'_>, index: usize) -> Result<Vec<Vec<f64>>> {
        let shares = match (self, captured.spec(index)?.wiring) {
            (_, wiring @ (Wiring::Replacing | Wiring::Reversed)) => {
                return Err(Error::invalid(
                    format!("the wiring of block {index}"),
                    wiring.name(),
                    "one with a residual around each part; decompx takes any",
                ));
            }
            (Self::Alti, Wiring::PostNorm) => alti_after_norm(captured, index)?,
            (Self::Alti, Wiring::PreNorm | Wiring::Parallel) => alti(captured, index)?,
            (Self::GlobEnc, Wiring::PostNorm) => globenc(captured, index)?,
            (Self::GlobEnc, Wiring::PreNorm | Wiring::Parallel) => {
                return Err(Error::invalid(
                    format!("the wiring of block {index}"),
                    "with the norm before its parts",
                    "post-norm for globenc; alti and attention-rollout take either",
                ));
            }
        };
        let mut rows = engine(engine(shares.to_dtype(DType::F64))?.to_vec2::<f64>())?;
        for (token, row) in rows.iter_mut().enumerate() {
            let sum: f64 = row.iter().sum();
            if sum > 0.0 && sum.is_finite() {
                row.iter_mut().for_each(|entry| *entry /= sum);
            } else {
                for (other, entry) in row.iter_mut().enumerate() {
                    *entry = f64::from(u8::from(other == token));
                }
            }
        }
        Ok(rows)
    }
}

fn alti(captured: &Captured<'_>, index: usize) -> Result<Tensor> {
    let attention = captured.attention(index)?;
    let reference = attention.sum()?;
    let as_it_is = |sources: &Tensor| Ok(sources.clone());
    let own = &attention.read;
    nearer(attention.distances(as_it_is, None, own, &reference, VectorNorm::L1)?)
}

fn alti_after_norm(captured: &Captured<'_>, index: usize) -> Result<Tensor> {
    let attention = captured.attention(index)?;
    let norm = first_norm(captured, index, &attention.sum()?)?;
    let reference = norm.forward(&attention.sum()?)?;
    let own = norm.linear(&attention.read)?;
    let through = |sources: &Tensor| norm.unscaled(sources);
    let scale = Some(norm.scale());
    nearer(attention.distances(through, scale, &own, &reference, VectorNorm::L1)?)
}

fn globenc(captured: &Captured<'_>, index: usize) -> Result<Tensor> {
    let attention = captured.attention(index)?;
    let sum = attention.sum()?;
    let first = first_norm(captured, index, &sum)?;
    let Some(written) = captured.feedforward(index)? else {
        let own = first.linear(&attention.read)?;
        let through = |sources: &Tensor| first.unscaled(sources);
        let nothing = engine(own.zeros_like())?;
        let scale = Some(first.scale());
        return Ok(attention
            .distances(through, scale, &own, &nothing, VectorNorm::L2)?
            .0);
    };
    let second = FixedNorm::at(
        captured.model(),
        &format!("blocks.{index}.feedforward_norm"),
        &captured.spec(index)?.norm,
        &engine(first.forward(&sum)? + written)?,
    )?;
    let own = second.linear(&first.linear(&attention.read)?)?;
    let through = |sources: &Tensor| second.unscaled(&first.unscaled(sources)?);
    let scale = engine(first.scale() * second.scale())?;
    let nothing = engine(own.zeros_like())?;
    Ok(attention
        .distances(through, Some(&scale), &own, &nothing, VectorNorm::L2)?
        .0)
}

fn first_norm(captured: &Captured<'_>, index: usize, x: &Tensor) -> Result<FixedNorm> {
    FixedNorm::at(
        captured.model(),
        &format!("blocks.{index}.attention_norm"),
        &captured.spec(index)?.norm,
        x,
    )
}

/// `max(0, ‖y_t‖ − ‖y_t − T̃_t(x_j)‖)`.
fn nearer((distances, lengths): (Tensor, Tensor)) -> Result<Tensor> {
    let lengths = engine(lengths.unsqueeze(1))?;
    engine(engine(lengths.broadcast_sub(&distances))?.relu())
}

/// `C M`: what a block's mixing makes of the mixing before it.
pub(crate) fn after(mixing: &[Vec<f64>], before: &[Vec<f64>]) -> Vec<Vec<f64>> {
    mixing
        .iter()
        .map(|row| {
            let mut mixed = vec![0.0; before.len()];
            for (share, before) in row.iter().zip(before).filter(|(share, _)| **share != 0.0) {
                for (mixed, before) in mixed.iter_mut().zip(before) {
                    *mixed += share * before;
                }
            }
            mixed
        })
        .collect()
}

/// `M⁰ = I`.
pub(crate) fn identity(tokens: usize) -> Vec<Vec<f64>> {
    let row = |token| (0..tokens).map(move |other| f64::from(u8::from(other == token)));
    (0..tokens).map(|token| row(token).collect()).collect()
}

/// `M = C^L ⋯ C^1` of `[token][token]` matrices, the first block's first.
///
/// ```
/// let half = vec![vec![1.0, 0.0], vec![0.5, 0.5]];
/// let rolled = lapidary_explain::mixing::rollout(&[half.clone(), half]);
/// assert_eq!(rolled[1], [0.75, 0.25]);
/// ```
pub fn rollout(mixings: &[Vec<Vec<f64>>]) -> Vec<Vec<f64>> {
    let tokens = mixings.first().map_or(0, Vec::len);
    mixings
        .iter()
        .fold(identity(tokens), |before, mixing| after(mixing, &before))
}
