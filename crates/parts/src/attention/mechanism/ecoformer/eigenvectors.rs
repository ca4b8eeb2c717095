//! Where hashes may start: without signs, a bit is best where
//!
//! ```text
//! max aᵀ κᵀ R κ a   for   aᵀ κᵀ κ a = n,
//! ```
//!
//! the leading eigenvector of `κᵀ R κ a = λ κᵀ κ a` (Liu et al., Supervised Hashing with Kernels, 2012,
//! equation 9).

use super::fit::{Residual, dot};
use lapidary_factor::{Matrix, symmetric_eigen};

/// Directions of `κᵀ κ` that are smaller than this share of the largest are none.
const LEAST: f64 = 1e-10;

/// The first `count` eigenvectors for what is left of sequences, largest eigenvalue first, each as long as
/// makes `‖κ a‖²` the number of tokens; fewer where kernel values have a lower rank.
pub(super) fn leading(left: &[Residual<'_>], count: usize) -> Vec<Vec<f64>> {
    let mut kernels = left.iter().flat_map(|left| &left.sample().kernels);
    let anchors = kernels.next().map_or(0, Vec::len);
    if anchors == 0 {
        return Vec::new();
    }
    let (mut agreement, mut squares) = (
        Matrix::zeros(anchors, anchors),
        Matrix::zeros(anchors, anchors),
    );
    let mut tokens = 0;
    for left in left {
        tokens += left.sample().kernels.len();
        let columns: Vec<Vec<f64>> = (0..anchors)
            .map(|j| {
                let rows = left.sample().kernels.iter();
                rows.map(|row| row.get(j).copied().unwrap_or(0.0)).collect()
            })
            .collect();
        for (j, column) in columns.iter().enumerate() {
            // Half of both sides is symmetric where R is not.
            let sides = left.both_sides(column);
            for (i, other) in columns.iter().enumerate() {
                agreement[(i, j)] += dot(other, &sides) / 2.0;
                squares[(i, j)] += dot(other, column);
            }
        }
    }
    whitened(&agreement, &squares, count).map_or_else(Vec::new, |found| {
        found
            .into_iter()
            .map(|a| scaled(a, &squares, tokens as f64))
            .collect()
    })
}

/// Eigenvectors of `A a = λ B a` for the largest `λ`, in the directions that `B` has.
fn whitened(a: &Matrix, b: &Matrix, count: usize) -> Option<Vec<Vec<f64>>> {
    let size = a.nrows();
    let of_b = symmetric_eigen("kernel values", b.as_ref()).ok()?;
    let largest = of_b.values.last().copied().filter(|value| *value > 0.0)?;
    let kept: Vec<usize> = (0..size)
        .filter(|k| {
            of_b.values
                .get(*k)
                .is_some_and(|value| *value > LEAST * largest)
        })
        .collect();
    // V Λ^{−1/2}, which makes B the identity.
    let basis = Matrix::from_fn(size, kept.len(), |i, k| {
        of_b.vectors[(i, kept[k])] / of_b.values[kept[k]].sqrt()
    });
    let within = basis.transpose() * a * &basis;
    let symmetric = Matrix::from_fn(kept.len(), kept.len(), |i, j| {
        (within[(i, j)] + within[(j, i)]) / 2.0
    });
    let found = symmetric_eigen("agreement", symmetric.as_ref()).ok()?;
    let back = &basis * &found.vectors;
    let columns = (0..kept.len()).rev().take(count);
    Some(
        columns
            .map(|k| (0..size).map(|i| back[(i, k)]).collect())
            .collect(),
    )
}

/// `a` with `aᵀ B a = length`, its largest entry positive.
fn scaled(mut a: Vec<f64>, b: &Matrix, length: f64) -> Vec<f64> {
    let mut square = 0.0;
    for (i, left) in a.iter().enumerate() {
        for (j, right) in a.iter().enumerate() {
            square += left * b[(i, j)] * right;
        }
    }
    let largest = a
        .iter()
        .copied()
        .fold(0.0, |m: f64, x| if x.abs() > m.abs() { x } else { m });
    let by = (length / square.max(f64::MIN_POSITIVE))
        .sqrt()
        .copysign(largest);
    a.iter_mut().for_each(|entry| *entry *= by);
    a
}
