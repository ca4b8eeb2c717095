//! What a map may look like, and the numbers that it is made of.

use lapidary_factor::{AffineMap, Matrix, Regression};
use serde::{Deserialize, Serialize};

use super::ReplaceMe;
use crate::{Error, Result};

/// What `T` may look like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MapForm {
    /// Any matrix.
    #[default]
    Full,
    /// Each feature is scaled by itself.
    Diagonal,
    /// Nothing above the diagonal: feature `j` is made of features `j` and later.
    LowerTriangular,
    /// `u vᵀ`: one number of what the block adds decides what is added, along one direction.
    RankOne,
}

impl MapForm {
    /// Whether entry `(i, j)` may differ from zero.
    fn has(self, i: usize, j: usize) -> bool {
        match self {
            Self::Full | Self::RankOne => true,
            Self::Diagonal => i == j,
            Self::LowerTriangular => i >= j,
        }
    }

    /// The numbers that descent starts from: those of the identity, and where that has not the
    /// form, of the least squares.
    pub(super) fn start(self, sums: &Regression, width: usize) -> Result<Vec<f64>> {
        if self != Self::RankOne {
            let identity = |at: usize| f64::from(u8::from(at / width == at % width));
            return Ok((0..width * width).map(identity).collect());
        }
        // u vᵀ of the largest entry's row and column, both as long.
        let map = sums.solve_of_rank(1, 0.0)?.weight;
        let places = (0..width).flat_map(|i| (0..width).map(move |j| (i, j)));
        let largest = places.max_by(|a, b| map[*a].abs().total_cmp(&map[*b].abs()));
        let (row, column) = largest.unwrap_or((0, 0));
        let entry = map[(row, column)];
        let u: Vec<f64> = (0..width).map(|i| map[(i, column)]).collect();
        let v: Vec<f64> = (0..width).map(|j| map[(row, j)] / entry).collect();
        let length = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
        let balance = (length(&v) / length(&u)).sqrt();
        if !(balance.is_finite() && balance > 0.0) {
            return Err(Error::invalid(
                "what the removed blocks add",
                "nothing along what the block before adds",
                "something, for a map of rank one to begin with",
            ));
        }
        let u = u.into_iter().map(|u| u * balance);
        Ok(u.chain(v.into_iter().map(|v| v / balance)).collect())
    }

    /// `T` row by row, from its numbers.
    pub(super) fn map(self, numbers: &[f64], width: usize) -> Vec<f64> {
        match self {
            Self::RankOne => {
                let (u, v) = numbers.split_at(width);
                u.iter()
                    .flat_map(|u| v.iter().map(move |v| u * v))
                    .collect()
            }
            Self::Full | Self::Diagonal | Self::LowerTriangular => numbers.to_vec(),
        }
    }

    /// The gradient by the numbers, from that by the entries of `T`.
    pub(super) fn pulled(self, numbers: &[f64], by_map: &[f64], width: usize) -> Vec<f64> {
        if self == Self::RankOne {
            let (u, v) = numbers.split_at(width);
            let (mut by_u, mut by_v) = (vec![0.0; width], vec![0.0; width]);
            for (at, slope) in by_map.iter().enumerate() {
                let (i, j) = (at / width, at % width);
                by_u[i] += slope * v[j];
                by_v[j] += slope * u[i];
            }
            by_u.extend(by_v);
            return by_u;
        }
        let entries = by_map.iter().enumerate();
        entries
            .map(|(at, slope)| match self.has(at / width, at % width) {
                true => *slope,
                false => 0.0,
            })
            .collect()
    }
}

/// The map of least squared error of this form, with what is added to the error.
pub(super) fn solve(sums: &Regression, choice: &ReplaceMe) -> Result<AffineMap> {
    let ridge = choice.ridge * sums.mean_square();
    if choice.lasso > 0.0 {
        if choice.form == MapForm::RankOne {
            return Err(Error::invalid(
                "form of the map",
                "rank-one with a lasso",
                "another, or without: the best such map by squares is not known",
            ));
        }
        let lasso = choice.lasso * sums.emptying_lasso();
        return Ok(sums.solve_sparse(lasso, ridge, |i, j| choice.form.has(i, j))?);
    }
    Ok(match choice.form {
        MapForm::Full => sums.solve(ridge)?,
        MapForm::Diagonal => sums.solve_diagonal(ridge)?,
        MapForm::LowerTriangular => sums.solve_lower_triangular(ridge)?,
        MapForm::RankOne => sums.solve_of_rank(1, ridge)?,
    })
}

/// The identity, which leaves a run of blocks out.
pub(super) fn identity(width: usize) -> AffineMap {
    AffineMap {
        weight: Matrix::identity(width, width),
        bias: vec![0.0; width],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_every_form_make_maps_of_that_form_and_gradients_follow() {
        let width = 3;
        let slopes: Vec<f64> = (0..9).map(|i| (i as f64 * 1.7).sin()).collect();
        // Σ c_ij T_ij, whose gradient by T is c.
        let value = |form: MapForm, numbers: &[f64]| -> f64 {
            let map = form.map(numbers, width);
            map.iter().zip(&slopes).map(|(t, c)| t * c).sum()
        };
        for form in [
            MapForm::Full,
            MapForm::Diagonal,
            MapForm::LowerTriangular,
            MapForm::RankOne,
        ] {
            let count = if form == MapForm::RankOne { 6 } else { 9 };
            let numbers: Vec<f64> = (0..count).map(|i| (i as f64 * 0.9).cos()).collect();
            let pulled = form.pulled(&numbers, &slopes, width);
            assert_eq!(pulled.len(), count);
            for (at, found) in pulled.iter().enumerate() {
                if count == 9 && !form.has(at / width, at % width) {
                    assert_eq!(*found, 0.0);
                    continue;
                }
                let moved = |by: f64| {
                    let mut numbers = numbers.clone();
                    numbers[at] += by;
                    value(form, &numbers)
                };
                let expected = (moved(1e-6) - moved(-1e-6)) / 2e-6;
                assert!(
                    (found - expected).abs() < 1e-8,
                    "{form:?} {found} {expected}"
                );
            }
        }
    }

    #[test]
    fn descent_of_rank_one_starts_at_the_least_squares() {
        let entry = |i: usize, j: usize| ((i * 5 + j * 3) % 7) as f64 - 3.0;
        let x = Matrix::from_fn(20, 3, |i, j| (entry(i, j) + 0.1 * i as f64).sin());
        let y = Matrix::from_fn(20, 3, |i, j| entry(j, i).cos());
        let mut sums = Regression::through_origin(3, 3);
        sums.add(x.as_ref(), y.as_ref()).unwrap();
        let best = sums.solve_of_rank(1, 0.0).unwrap().weight;
        let start = MapForm::RankOne.start(&sums, 3).unwrap();
        let map = MapForm::RankOne.map(&start, 3);
        for (at, entry) in map.iter().enumerate() {
            assert!((entry - best[(at / 3, at % 3)]).abs() < 1e-10);
        }
        let square = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>();
        assert!((square(&start[..3]) - square(&start[3..])).abs() < 1e-10);
    }
}
