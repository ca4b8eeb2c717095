//! Which features of the stream are kept, when features themselves are kept.

use lapidary_factor::Matrix;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use super::directions::{Choice, Directions, Stream};
use crate::Result;
use serde::{Deserialize, Serialize};

/// Two features whose difference has at most this share of their squared length are one.
const SAME: f64 = 1e-12;

/// How features are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Selector {
    /// The longest columns `‖H_:,j‖`. A copy of a chosen feature comes after all others.
    Magnitude,
    /// One after another, the feature of which the chosen ones explain least in the sense of
    /// least squares: pivoted Cholesky of the second moment.
    Spread,
    /// Drawn with a seed.
    Random(u64),
}

impl Selector {
    /// `count` features, the first chosen first.
    pub fn select(self, stream: &Stream, count: usize) -> Vec<usize> {
        let mut chosen = match self {
            Self::Magnitude => longest(stream),
            Self::Spread => spread(stream, count),
            Self::Random(seed) => {
                let mut order: Vec<usize> = (0..stream.width()).collect();
                order.shuffle(&mut ChaCha8Rng::seed_from_u64(seed));
                order
            }
        };
        chosen.truncate(count);
        chosen
    }
}

/// All features, longest first, copies last.
fn longest(stream: &Stream) -> Vec<usize> {
    let energies = stream.energies();
    let mut order: Vec<(usize, f64)> = energies.into_iter().enumerate().collect();
    order.sort_by(|a, b| b.1.total_cmp(&a.1));
    let (mut chosen, mut copies): (Vec<(usize, f64)>, Vec<usize>) = Default::default();
    for (index, energy) in order {
        let is_copy = |&(other, length): &(usize, f64)| {
            let difference = energy + length - 2.0 * stream.covariance[(index, other)];
            difference <= SAME * (energy + length)
        };
        match chosen.iter().any(is_copy) {
            true => copies.push(index),
            false => chosen.push((index, energy)),
        }
    }
    let chosen = chosen.into_iter().map(|(index, _)| index);
    chosen.chain(copies).collect()
}

/// Pivots of the Cholesky decomposition of the second moment.
fn spread(stream: &Stream, count: usize) -> Vec<usize> {
    let width = stream.width();
    let mut left = stream.energies();
    let mut columns: Vec<Vec<f64>> = Vec::new();
    let mut chosen: Vec<usize> = Vec::new();
    for _ in 0..count.min(width) {
        let free = (0..width).filter(|index| !chosen.contains(index));
        let Some(pivot) = free.max_by(|a, b| left[*a].total_cmp(&left[*b])) else {
            break;
        };
        let root = left[pivot].max(f64::MIN_POSITIVE).sqrt();
        let column: Vec<f64> = (0..width)
            .map(|i| {
                let explained: f64 = columns.iter().map(|c| c[i] * c[pivot]).sum();
                (stream.covariance[(i, pivot)] - explained) / root
            })
            .collect();
        for (left, entry) in left.iter_mut().zip(&column) {
            *left = (*left - entry * entry).max(0.0);
        }
        columns.push(column);
        chosen.push(pivot);
    }
    chosen
}

/// Features themselves, the others left out: what rotations and merging are compared with.
#[derive(Clone, Copy, Debug)]
pub struct Coordinates {
    /// How they are chosen.
    pub selector: Selector,
}

impl Directions for Coordinates {
    fn choose(&self, stream: &Stream, width: usize) -> Result<Choice> {
        let chosen = self.selector.select(stream, width);
        let entry = |i: usize, k: usize| f64::from(u8::from(chosen[k] == i));
        Ok(Matrix::from_fn(stream.width(), chosen.len(), entry).into())
    }
}
