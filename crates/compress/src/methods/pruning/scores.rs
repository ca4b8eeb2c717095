//! What a weight is worth by itself, apart from what could make up for it.
//!
//! | criterion | score of `w` |
//! |---|---|
//! | magnitude | `|w|` |
//! | chance | a number drawn for its place |
//! | first order | `w² E[(∂L/∂w)²]`: the mean square of `w ∂L/∂w`, the loss's first-order change |
//! | activation-aware | `|w_ij| ‖x_j‖₂`, `x_j` what its column reads |
//!
//! A weight that is zero scores zero, so that pruning again starts from what is gone.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use super::settings::Scope;
use crate::error::engine;
use crate::requirements::{Requirements, Statistic};
use crate::{Calibration, Error, Layer, Result};

/// What weights are compared by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Criterion {
    Magnitude,
    Random,
    FirstOrder,
    ActivationAware,
}

impl Criterion {
    /// Among which weights the criterion's source compares.
    pub(super) fn scope(self) -> Scope {
        match self {
            Self::Magnitude | Self::Random => Scope::Layer,
            Self::FirstOrder => Scope::Global,
            Self::ActivationAware => Scope::Row,
        }
    }

    /// Whether its scores have the scale of their layer.
    pub(super) fn has_scale(self) -> bool {
        matches!(self, Self::Magnitude | Self::ActivationAware)
    }

    /// What it has to know about a layer.
    pub(super) fn statistic(self, layer: &Layer) -> Option<Statistic> {
        match self {
            Self::Magnitude | Self::Random => None,
            Self::FirstOrder => Some(Statistic::Fisher {
                layer: layer.path.clone(),
            }),
            Self::ActivationAware => Some(Statistic::InputSquares {
                site: layer.input_site.clone(),
            }),
        }
    }

    pub(super) fn requirements(self, layers: &[Layer]) -> Requirements {
        Requirements {
            statistics: layers
                .iter()
                .filter_map(|layer| self.statistic(layer))
                .collect(),
        }
    }

    /// The scores of a layer's weights `[output, input]`, row after row.
    pub(super) fn scores(
        self,
        layer: &Layer,
        weights: &[f64],
        calibration: Option<&Calibration>,
        seed: u64,
    ) -> Result<Vec<f64>> {
        let known = || -> Result<Vec<f64>> {
            let statistic = self.statistic(layer);
            let found = calibration.zip(statistic.as_ref());
            let (calibration, statistic) = found.ok_or_else(|| {
                let statistic = statistic.as_ref().map(Statistic::to_string);
                Error::NotCollected {
                    statistic: statistic.unwrap_or_default(),
                }
            })?;
            let tensor = engine(calibration.tensor(statistic)?.flatten_all())?;
            engine(tensor.to_vec1::<f64>())
        };
        Ok(match self {
            Self::Magnitude => weights.iter().map(|w| w.abs()).collect(),
            Self::Random => {
                let seed = xxh3_64_with_seed(layer.path.as_bytes(), seed);
                let mut random = ChaCha8Rng::seed_from_u64(seed);
                let drawn = weights.iter().map(|w| (w, random.random_range(0.5..1.0)));
                drawn
                    .map(|(w, score)| if *w == 0.0 { 0.0 } else { score })
                    .collect()
            }
            Self::FirstOrder => {
                let squares = known()?;
                weights
                    .iter()
                    .zip(squares)
                    .map(|(w, g)| w * w * g)
                    .collect()
            }
            Self::ActivationAware => {
                let lengths: Vec<f64> = known()?.into_iter().map(f64::sqrt).collect();
                let columns = lengths.iter().cycle();
                weights
                    .iter()
                    .zip(columns)
                    .map(|(w, x)| w.abs() * x)
                    .collect()
            }
        })
    }
}

/// Scores in units of their root mean square; unchanged where all are zero.
pub(super) fn normalised(mut scores: Vec<f64>) -> Vec<f64> {
    let square: f64 = scores.iter().map(|score| score * score).sum();
    let root = (square / scores.len().max(1) as f64).sqrt();
    if root > 0.0 {
        scores.iter_mut().for_each(|score| *score /= root);
    }
    scores
}
