//! Type I: one nonlinearity between the matrices. Hidden features `h` stand for the others as far as
//! the data shows that they can (Nyström).
//!
//! With `C = E[h hᵀ]` and the ridge `λ`, the ridge leverage of a feature is
//!
//! ```text
//! s_i = [C (C + λ I)⁻¹]_ii = 1 − λ [(C + λ I)⁻¹]_ii
//! ```
//!
//! The features of largest leverage stay, `S` selecting them, and the matrix after them becomes
//! the least-squares optimum of `E‖h W_D − h S W_D'‖²`:
//!
//! ```text
//! W_D' = (Sᵀ C S)⁻¹ Sᵀ C W_D
//! ```

use lapidary_factor::{Cholesky, Matrix};

use crate::methods::channels::largest;
use crate::{Error, Result};

/// Indices of the `count` features of largest ridge leverage. `λ` is `ridge` times the mean
/// diagonal entry of `second_moment` `[hidden, hidden]`, so that it means the same whatever the
/// scale of a layer.
pub(crate) fn by_leverage(
    mut second_moment: Matrix,
    ridge: f64,
    count: usize,
) -> Result<Vec<usize>> {
    let hidden = second_moment.nrows();
    let mean = trace(&second_moment) / hidden.max(1) as f64;
    if mean <= 0.0 {
        // Nothing ever passes: any features do.
        return Ok((0..count.min(hidden)).collect());
    }
    let lambda = ridge * mean;
    if !(lambda > 0.0 && lambda.is_finite()) {
        return Err(Error::invalid(
            "ridge of the leverage scores",
            ridge,
            "above 0",
        ));
    }
    for i in 0..hidden {
        second_moment[(i, i)] += lambda;
    }
    let inverse = Cholesky::of("hidden second moment", second_moment)?.inverse_diagonal();
    let leverages: Vec<f64> = inverse.iter().map(|entry| 1.0 - lambda * entry).collect();
    Ok(largest(&leverages, count))
}

/// `W_D'ᵀ` `[output, kept]` for `down` = `W_Dᵀ` `[output, hidden]`. Where the kept features depend
/// on each other, the smallest ridge that makes the equations solvable is added, at most 1e-4 of
/// their mean square.
pub(crate) fn refitted(down: &Matrix, second_moment: Matrix, kept: &[usize]) -> Result<Matrix> {
    let hidden = second_moment.nrows();
    let energy: f64 = kept.iter().map(|i| second_moment[(*i, *i)]).sum();
    if kept.len() == hidden || energy <= 0.0 {
        return Ok(Matrix::from_fn(down.nrows(), kept.len(), |o, i| {
            down[(o, kept[i])]
        }));
    }
    // Columns, which lie together, for the rows of a symmetric matrix: C S, then Sᵀ C S of it.
    let columns = Matrix::from_fn(hidden, kept.len(), |i, j| second_moment[(i, kept[j])]);
    drop(second_moment);
    let right = columns.transpose() * down.transpose();
    let selected = Matrix::from_fn(kept.len(), kept.len(), |i, j| columns[(kept[i], j)]);
    drop(columns);
    let solved = Cholesky::of("second moment of kept features", selected)?.solve(right.as_ref())?;
    Ok(solved.transpose().to_owned())
}

fn trace(matrix: &Matrix) -> f64 {
    (0..matrix.nrows()).map(|i| matrix[(i, i)]).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::methods::modegpt::testing::{energy, random, second_moment};

    #[test]
    fn leverage_through_the_inverse_is_the_definition() {
        let c = second_moment(12, 6, 1);
        let ridge = 0.3;
        let lambda = ridge * trace(&c) / 6.0;
        let shifted = Matrix::from_fn(6, 6, |i, j| c[(i, j)] + if i == j { lambda } else { 0.0 });
        let solved = Cholesky::of("c", shifted)
            .unwrap()
            .solve(c.as_ref())
            .unwrap();
        let scores: Vec<f64> = (0..6).map(|i| solved[(i, i)]).collect();
        for count in 1..=6 {
            assert_eq!(
                by_leverage(c.clone(), ridge, count).unwrap(),
                largest(&scores, count)
            );
        }
    }

    #[test]
    fn the_refit_solves_the_normal_equations_and_no_other_does_better() {
        let c = second_moment(40, 10, 2);
        let down = random(4, 10, 3); // W_Dᵀ
        let kept = [0, 3, 4, 8];
        let fitted = refitted(&down, c.clone(), &kept).unwrap();
        let error = |fitted: &Matrix| {
            Matrix::from_fn(4, 10, |o, j| {
                let stays = kept.iter().position(|i| *i == j);
                down[(o, j)] - stays.map_or(0.0, |i| fitted[(o, i)])
            })
        };
        // SᵀC (W_D − S W_D') = 0
        let residual = &c * error(&fitted).transpose();
        for i in kept {
            assert!((0..4).all(|o| residual[(i, o)].abs() < 1e-12));
        }
        let least = energy(&error(&fitted), &c);
        for seed in 0..20 {
            let step = random(4, 4, 100 + seed);
            let other = Matrix::from_fn(4, 4, |o, i| fitted[(o, i)] + 0.01 * step[(o, i)]);
            assert!(energy(&error(&other), &c) > least);
        }
    }

    #[test]
    fn more_features_never_do_worse_and_dependent_ones_are_not_missed() {
        let c = second_moment(40, 9, 4);
        let down = random(3, 9, 5);
        let left = |c: &Matrix, kept: &[usize]| {
            let fitted = refitted(&down, c.clone(), kept).unwrap();
            let error = Matrix::from_fn(3, 9, |o, j| {
                let stays = kept.iter().position(|i| *i == j);
                down[(o, j)] - stays.map_or(0.0, |i| fitted[(o, i)])
            });
            energy(&error, c)
        };
        let order = [5, 2, 7, 0, 8, 1, 3, 6, 4];
        let errors: Vec<f64> = (1..=9).map(|count| left(&c, &order[..count])).collect();
        assert!(errors.windows(2).all(|two| two[1] <= two[0] + 1e-12));
        assert!(errors[0] > 1e-2 && errors[8] < 1e-18, "{errors:?}");

        // Features 6, 7 and 8 are sums of the others: C has rank 6.
        let free = random(40, 6, 6);
        let mix = random(6, 3, 7);
        let bound = &free * &mix;
        let h = Matrix::from_fn(40, 9, |t, i| {
            if i < 6 {
                free[(t, i)]
            } else {
                bound[(t, i - 6)]
            }
        });
        let c = h.transpose() * &h;
        assert!(left(&c, &[0, 1, 2, 3, 4, 5]) < 1e-9);
        assert!(left(&c, &[0, 1, 2, 3, 4]) > 1e-3);
    }
}
