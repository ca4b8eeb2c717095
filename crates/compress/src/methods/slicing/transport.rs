//! Similar features merged into fewer by optimal transport (DOTResize: Verma, Murray &
//! Duh 2025, arXiv 2507.04517).
//!
//! ```text
//! C_ij = distance(H_:,i, H_:,S_j)        S the features that others are merged into
//! P    = entropic plan of C, marginals 1/D and 1/d
//! T    = D P                             each source's row sums to 1
//! T    = Q R                             thin QR; the stream is carried as h Q
//! ```
//!
//! An RMS norm commutes with orthogonal maps only, so that `R` goes into the layers around it and
//! cancels: a reader after `h T` would start with `T⁺ = R⁻¹ Qᵀ`, and `h T T⁺ = h Q Qᵀ`. The result
//! depends on `T` through its column space alone; whether rows of `T` or its columns sum to one
//! makes no difference. Where nothing commutes with rotations, between two layers of a feed-forward part,
//! it does: see `merged_features`.

use lapidary_factor::{Matrix, qr};
use lapidary_kernels::{DType, Tensor};
use rayon::prelude::*;

use super::coordinates::Selector;
use super::directions::{Choice, Directions, Stream};
use super::sinkhorn::{Transported, transport_plan};
use crate::error::engine;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// A column of a map counts as a combination of those before it when what is left of it is below
/// this share of the longest column.
const DEPENDENT: f64 = 1e-9;

/// How far two features are from each other, over tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Distance {
    /// `Σ |x_i − x_j|`.
    Absolute,
    /// `Σ (x_i − x_j)²`.
    Squared,
    /// `1 − Σ x_i x_j / √(Σ x_i² Σ x_j²)`.
    Cosine,
}

/// Distances between all features, `[width, width]`, divided by the median of those between
/// different ones. `rows` are `[tokens, width]` batch by batch, their absolute differences summed in `f64`; `second`
/// is `Σ xᵀx`, which the other distances come from.
pub(super) fn distances(rows: &[Tensor], second: &Matrix, distance: Distance) -> Result<Matrix> {
    let width = second.nrows();
    let length = |i: usize| second[(i, i)].max(0.0);
    let found = match distance {
        Distance::Absolute => absolute(rows, width)?,
        Distance::Squared => Matrix::from_fn(width, width, |i, j| {
            (length(i) + length(j) - 2.0 * second[(i, j)]).max(0.0)
        }),
        Distance::Cosine => Matrix::from_fn(width, width, |i, j| {
            let scale = (length(i) * length(j)).sqrt();
            match scale > 0.0 {
                true => (1.0 - second[(i, j)] / scale).max(0.0),
                false => f64::from(u8::from(i != j)),
            }
        }),
    };
    let mut apart: Vec<f64> = (0..width)
        .flat_map(|i| (0..i).map(move |j| (i, j)))
        .map(|(i, j)| found[(i, j)])
        .collect();
    apart.sort_by(f64::total_cmp);
    let median = apart.get(apart.len() / 2).copied().unwrap_or(0.0);
    let scale = if median > 0.0 { 1.0 / median } else { 1.0 };
    Ok(Matrix::from_fn(width, width, |i, j| scale * found[(i, j)]))
}

fn absolute(rows: &[Tensor], width: usize) -> Result<Matrix> {
    let mut sums = Matrix::zeros(width, width);
    for x in rows {
        let features = engine(engine(engine(x.to_dtype(DType::F64))?.t())?.contiguous())?;
        let features: Vec<Vec<f64>> = engine(features.to_vec2())?;
        // Each feature's distances from those before it, by one thread.
        let apart = features.par_iter().enumerate().map(|(i, a)| -> Vec<f64> {
            let before = features.iter().take(i);
            let from = |b: &Vec<f64>| a.iter().zip(b).map(|(a, b)| (a - b).abs()).sum::<f64>();
            before.map(from).collect()
        });
        let apart: Vec<Vec<f64>> = apart.collect();
        for (i, apart) in apart.iter().enumerate() {
            for (j, sum) in apart.iter().enumerate() {
                sums[(i, j)] += sum;
                sums[(j, i)] += sum;
            }
        }
    }
    Ok(sums)
}

/// An orthonormal basis `[rows, columns]` whose first columns span those of `map`, the number of
/// them, and the condition of the triangle `R` that belongs to them.
///
/// `Q` has the signs that make the diagonal of `R` positive, so that a map with orthonormal
/// columns is its own basis. Columns that are combinations of earlier ones are dropped, and
/// others put in their place that are orthogonal to all, so that there are as many as in the map.
pub fn orthonormal(map: &Matrix) -> (Matrix, usize, f64) {
    let (rows, columns) = (map.nrows(), map.ncols());
    let first = qr(map.as_ref());
    let diagonal: Vec<f64> = (0..rows.min(columns)).map(|k| first.r[(k, k)]).collect();
    let longest = (0..columns).fold(0.0, |m: f64, k| m.max(map.col(k).norm_l2()));
    let least = DEPENDENT * longest;
    let full = diagonal.iter().filter(|v| v.abs() > least).count() == columns;
    if full {
        let signed = |i: usize, k: usize| first.q[(i, k)] * diagonal[k].signum();
        let condition = condition(diagonal.iter().map(|v| v.abs()));
        return (Matrix::from_fn(rows, columns, signed), columns, condition);
    }
    let (kept, lengths) = independent(map, least);
    let condition = condition(lengths.iter().copied());
    // Householder's Q is orthogonal whatever follows the columns that are kept.
    let rank = kept.len();
    let completed = Matrix::from_fn(rows, rows.max(rank), |i, k| match kept.get(k) {
        Some(&column) => map[(i, column)],
        None => f64::from(u8::from(i == k - rank)),
    });
    let completed = qr(completed.as_ref()).q;
    let width = columns.min(rows);
    let basis = Matrix::from_fn(rows, width, |i, k| completed[(i, k)]);
    (basis, rank, condition)
}

/// The largest length over the smallest.
fn condition(lengths: impl Iterator<Item = f64> + Clone) -> f64 {
    lengths.clone().fold(0.0, f64::max) / lengths.fold(f64::INFINITY, f64::min)
}

/// The columns that are no combinations of those before them, and how long is what is left of each beside
/// those: more than `least`.
///
/// The triangle of Householder's QR does not say which these are: where nothing is left of a column, any direction
/// stands in its place, and it may be all that is left of a later one.
fn independent(map: &Matrix, least: f64) -> (Vec<usize>, Vec<f64>) {
    let (mut kept, mut lengths) = (Vec::new(), Vec::new());
    let mut basis: Vec<Vec<f64>> = Vec::new();
    for k in 0..map.ncols() {
        let mut left: Vec<f64> = (0..map.nrows()).map(|i| map[(i, k)]).collect();
        // Twice, since what rounding leaves the first time may be all there is.
        for _ in 0..2 {
            for direction in &basis {
                let along: f64 = left.iter().zip(direction).map(|(x, d)| x * d).sum();
                for (x, d) in left.iter_mut().zip(direction) {
                    *x -= along * d;
                }
            }
        }
        let length = left.iter().map(|x| x * x).sum::<f64>().sqrt();
        if length > least {
            kept.push(k);
            lengths.push(length);
            basis.push(left.into_iter().map(|x| x / length).collect());
        }
    }
    (kept, lengths)
}

/// Merging by optimal transport.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Transport {
    /// Which features others are merged into.
    pub selector: Selector,
    /// The cost of moving a feature to another.
    pub distance: Distance,
    /// `λ`, on costs whose median is 1.
    pub temperature: f64,
    /// Most iterations of Sinkhorn's.
    pub iterations: usize,
}

impl Default for Transport {
    fn default() -> Self {
        Self {
            selector: Selector::Magnitude,
            distance: Distance::Absolute,
            temperature: 0.1,
            iterations: 1000,
        }
    }
}

impl Transport {
    /// The plan between all features and the `width` that are chosen, `[width of the stream, width]`.
    ///
    /// # Errors
    /// When distances are missing, or the temperature is not positive.
    pub fn plan(&self, stream: &Stream, width: usize) -> Result<Transported> {
        let Some(distances) = &stream.distances else {
            let expected = "those that the method asked for";
            return Err(Error::invalid(
                "distances between features",
                "absent",
                expected,
            ));
        };
        let targets = self.selector.select(stream, width);
        let cost = Matrix::from_fn(stream.width(), targets.len(), |i, k| {
            distances[(i, targets[k])]
        });
        transport_plan(&cost, self.temperature, self.iterations)
    }
}

impl Directions for Transport {
    fn distance(&self) -> Option<Distance> {
        Some(self.distance)
    }

    fn choose(&self, stream: &Stream, width: usize) -> Result<Choice> {
        let found = self.plan(stream, width)?;
        let (rows, columns) = (found.plan.nrows(), found.plan.ncols());
        let sources = stream.width() as f64;
        let map = Matrix::from_fn(rows, columns, |i, k| sources * found.plan[(i, k)]);
        let (basis, rank, condition) = orthonormal(&map);
        Ok(Choice {
            basis,
            note: Some(format!(
                "map of rank {rank} of {columns}, condition of its triangle {condition:.1e}; marginals \
                 met to {:.0e} after {} iterations",
                found.error, found.iterations
            )),
        })
    }
}
