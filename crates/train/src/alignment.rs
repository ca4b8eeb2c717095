//! A term of the loss that keeps the residual stream from turning (Razzhigaev et al. 2024, Your
//! Transformer is Secretly Linear, arXiv 2405.12250):
//!
//! ```text
//! L + λ Σ_l E[1 − cos(E_l, E_{l−1})]        or        L + λ Σ_l E[‖E_l − E_{l−1}‖²]
//! ```
//!
//! over the tokens of a batch, `E_l` the stream behind block `l` and `E_0` that before the first.

use lapidary_kernels::{D, Tensor};
use lapidary_model::Model;
use lapidary_signal::Trace;
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// The term and its weight.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AlignmentSpec {
    /// What is measured between consecutive streams.
    #[serde(default)]
    pub kind: AlignmentKind,
    /// `λ`.
    pub weight: f64,
}

/// What is measured between consecutive streams.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AlignmentKind {
    /// `1 − cos`, the published term.
    #[default]
    Cosine,
    /// `‖·‖²`, its control.
    Squared,
}

/// Added to squared lengths, so that a vector of zeros has a gradient.
const LEAST: f64 = 1e-12;

impl AlignmentSpec {
    /// `loss` with the term of the streams that a pass of `model` wrote to `trace`.
    pub(crate) fn added(&self, loss: Tensor, trace: &Trace, model: &Model) -> Result<Tensor> {
        let records = trace.records();
        let blocks = model.spec().expanded_blocks().len();
        let sites = (0..blocks).map(|block| format!("blocks.{block}.out"));
        let sites = std::iter::once("blocks.0.in".to_owned()).chain(sites);
        let streams: Vec<Tensor> = sites
            .filter_map(|site| records.get(&site).map(|found| found.signal.value().clone()))
            .collect();
        match self.kind.between(&streams)? {
            None => Ok(loss),
            Some(term) => {
                let weighted = term.affine(self.weight, 0.0).map_err(kernel)?;
                (loss + weighted).map_err(kernel)
            }
        }
    }
}

impl AlignmentKind {
    /// The sum over consecutive pairs of `streams` `[batch, length, width]` of the mean over
    /// tokens. Differentiable.
    ///
    /// # Errors
    /// When the streams have different shapes.
    pub fn between(self, streams: &[Tensor]) -> Result<Option<Tensor>> {
        let mut total: Option<Tensor> = None;
        for pair in streams.windows(2) {
            let [before, behind] = pair else { continue };
            let term = self.term(before, behind).map_err(kernel)?;
            total = Some(match total {
                None => term,
                Some(total) => (total + term).map_err(kernel)?,
            });
        }
        Ok(total)
    }

    fn term(self, before: &Tensor, behind: &Tensor) -> lapidary_kernels::Result<Tensor> {
        let dot = |a: &Tensor, b: &Tensor| -> lapidary_kernels::Result<Tensor> {
            Ok((a * b)?.sum(D::Minus1)?)
        };
        Ok(match self {
            Self::Squared => {
                let apart = (behind - before)?;
                dot(&apart, &apart)?.mean_all()?
            }
            Self::Cosine => {
                let lengths = (dot(before, before)? + LEAST)? * (dot(behind, behind)? + LEAST)?;
                let cosine = (dot(before, behind)? / lengths?.sqrt()?)?;
                cosine.affine(-1.0, 1.0)?.mean_all()?
            }
        })
    }
}

fn kernel<E: Into<lapidary_kernels::Error>>(error: E) -> Error {
    Error::from(error.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use lapidary_kernels::{Device, Var};

    fn stream(seed: usize) -> Tensor {
        let numbers = (0..2 * 3 * 4).map(|i| ((i * 7 + seed * 5) % 11) as f64 / 5.0 - 1.0);
        Tensor::from_vec(numbers.collect::<Vec<_>>(), (2, 3, 4), &Device::Cpu).unwrap()
    }

    fn value(kind: AlignmentKind, streams: &[Tensor]) -> f64 {
        kind.between(streams).unwrap().unwrap().to_scalar().unwrap()
    }

    #[test]
    fn parallel_streams_cost_nothing_and_others_do() {
        let (x, y) = (stream(1), stream(2));
        // Each token by a factor of its own.
        let factors = Tensor::new(
            &[[[2.0f64], [0.5], [7.0]], [[1.0], [3.0], [9.0]]],
            &Device::Cpu,
        );
        let longer = x.broadcast_mul(&factors.unwrap()).unwrap();
        let cosine = AlignmentKind::Cosine;
        assert!(value(cosine, &[x.clone(), longer.clone()]).abs() < 1e-10);
        assert!((value(cosine, &[x.clone(), x.neg().unwrap()]) - 2.0).abs() < 1e-10);
        assert!(value(cosine, &[x.clone(), y.clone()]) > 1e-3);
        assert!(value(AlignmentKind::Squared, &[x.clone(), longer]) > 1e-3);
        assert_eq!(value(AlignmentKind::Squared, &[x.clone(), x.clone()]), 0.0);
        // Terms add up, and one stream has none.
        let both = value(cosine, &[x.clone(), y.clone(), x.clone()]);
        assert!((both - 2.0 * value(cosine, &[x.clone(), y])).abs() < 1e-12);
        assert!(cosine.between(&[x]).unwrap().is_none());
    }

    #[test]
    fn gradients_equal_central_differences() {
        for kind in [AlignmentKind::Cosine, AlignmentKind::Squared] {
            let variable = Var::from_tensor(&stream(3)).unwrap();
            let streams = [stream(4), variable.as_tensor().clone(), stream(5)];
            let loss = kind.between(&streams).unwrap().unwrap();
            let gradients = loss.backward().unwrap();
            let gradient = gradients.get(variable.as_tensor()).unwrap();
            let gradient = gradient.flatten_all().unwrap().to_vec1::<f64>().unwrap();
            for (at, expected) in gradient.iter().enumerate() {
                let moved = |by: f64| {
                    let mut entries = stream(3).flatten_all().unwrap().to_vec1::<f64>().unwrap();
                    entries[at] += by;
                    let moved = Tensor::from_vec(entries, (2, 3, 4), &Device::Cpu).unwrap();
                    value(kind, &[stream(4), moved, stream(5)])
                };
                let found = (moved(1e-6) - moved(-1e-6)) / 2e-6;
                assert!(
                    (found - expected).abs() < 1e-7,
                    "{kind:?} {at}: {found} {expected}"
                );
            }
        }
    }
}
