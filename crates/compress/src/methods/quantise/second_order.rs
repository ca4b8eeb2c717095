//! Rounding column by column, with what each rounding costs made good in the columns after it.
//!
//! Over inputs with second moment `H`, a row `w` that becomes `ŵ` costs `(w − ŵ) H (w − ŵ)ᵀ`. When
//! entry `q` has been fixed at `ŵ_q`, the best change of the entries after it is
//! `−(w_q − ŵ_q) / U_qq · U_q,>q` with `H⁻¹ = Uᵀ U`, `U` upper triangular (Hassibi & Stork 1993 for
//! one entry; Frantar et al. 2022, GPTQ, arXiv 2210.17323, for all rows in one order). `H` is damped
//! by a share of its mean diagonal.

use lapidary_factor::{Matrix, cholesky};
use lapidary_kernels::{DType, Device, Tensor};
use rayon::prelude::*;

use super::grid::{Grid, GridKind};
use super::rounded::Rounded;
use crate::Result;
use crate::error::engine;

/// Columns after which the columns beyond are brought up to date, at least.
const BLOCK: usize = 128;

/// `U` of `(H + damping · mean(diag H) I)⁻¹ = Uᵀ U`, row by row.
fn inverse_factor(moment: &Matrix, damping: f64) -> Result<Vec<f64>> {
    let size = moment.nrows();
    let mean = (0..size).map(|i| moment[(i, i)]).sum::<f64>() / size.max(1) as f64;
    let mut damped = moment.clone();
    for i in 0..size {
        damped[(i, i)] += damping * mean;
        // An input that is always zero asks for nothing.
        if damped[(i, i)] <= 0.0 {
            damped[(i, i)] = 1.0;
        }
    }
    let identity = Matrix::identity(size, size);
    let inverse = cholesky("second moment", damped.as_ref())?.solve(identity.as_ref())?;
    let lower = cholesky("inverse second moment", inverse.as_ref())?.lower;
    let mut upper = Vec::with_capacity(size * size);
    for row in 0..size {
        upper.extend((0..size).map(|column| lower[(column, row)]));
    }
    Ok(upper)
}

/// `weights` `[output, input]` row by row, rounded with compensation for inputs of second moment
/// `moment` `[input, input]`.
///
/// # Errors
/// When a group fits no grid, or the damped moment is not positive definite.
pub(crate) fn round(
    kind: GridKind,
    group: usize,
    [output, input]: [usize; 2],
    mut weights: Vec<f64>,
    moment: &Matrix,
    damping: f64,
) -> Result<Rounded> {
    let upper = inverse_factor(moment, damping)?;
    let block = group * BLOCK.div_ceil(group.max(1));
    let groups = input / group.max(1);
    let mut codes = vec![0; output * input];
    let mut grids: Vec<Option<Grid>> = vec![None; output * groups];
    for start in (0..input).step_by(block.max(1)) {
        let end = (start + block).min(input);
        // What is to be taken from the columns beyond, `[output, end − start]`.
        let mut errors = vec![0.0; output * (end - start)];
        let rows = weights.par_chunks_exact_mut(input);
        let rows = rows.zip(errors.par_chunks_exact_mut(end - start));
        let rows = rows.zip(codes.par_chunks_exact_mut(input));
        let rows = rows.zip(grids.par_chunks_exact_mut(groups.max(1)));
        let rows = rows.map(|(((weights, errors), codes), grids)| -> Result<()> {
            for first in (start..end).step_by(group) {
                let columns = first..(first + group).min(end);
                let grid = kind.fit(&weights[columns.clone()])?;
                grids[first / group] = Some(grid);
                let places = grid.places();
                for q in columns {
                    let code = places.code(weights[q]);
                    codes[q] = code;
                    let u = &upper[q * input..(q + 1) * input];
                    let error = (weights[q] - places.number(code)) / u[q];
                    errors[q - start] = error;
                    for (w, u) in weights[q + 1..end].iter_mut().zip(&u[q + 1..end]) {
                        *w -= error * u;
                    }
                }
            }
            Ok(())
        });
        // The first row that fits no grid is the one that is told.
        let done: Vec<Result<()>> = rows.collect();
        done.into_iter().collect::<Result<()>>()?;
        if end < input {
            update(&mut weights, &errors, &upper, input, start..end)?;
        }
    }
    let grids = grids.into_iter().flatten().collect();
    Ok(Rounded::from_parts(
        kind,
        group,
        [output, input],
        codes,
        grids,
    ))
}

/// `W[:, end..] −= E U[start..end, end..]`.
fn update(
    weights: &mut [f64],
    errors: &[f64],
    upper: &[f64],
    input: usize,
    block: std::ops::Range<usize>,
) -> Result<()> {
    let (width, beyond) = (block.len(), input - block.end);
    let rows = weights.len() / input;
    let tensor = |values: &[f64], rows: usize, columns: usize| {
        engine(Tensor::from_slice(values, (rows, columns), &Device::Cpu))
    };
    let errors = tensor(errors, rows, width)?;
    let upper = tensor(&upper[block.start * input..block.end * input], width, input)?;
    let upper = engine(upper.narrow(1, block.end, beyond))?;
    let product = engine(engine(errors.matmul(&engine(upper.contiguous())?))?.flatten_all())?;
    debug_assert_eq!(product.dtype(), DType::F64);
    let product = engine(product.to_vec1::<f64>())?;
    let rows = weights.chunks_exact_mut(input);
    for (weights, product) in rows.zip(product.chunks_exact(beyond)) {
        for (w, p) in weights[block.end..].iter_mut().zip(product) {
            *w -= p;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    const KIND: GridKind = GridKind {
        bits: 4,
        symmetric: true,
        search: false,
    };

    fn numbers(count: usize, seed: u64) -> Vec<f64> {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        (0..count).map(|_| random.random_range(-1.0..1.0)).collect()
    }

    /// The second moment of correlated inputs: `A Aᵀ` of `[n, n / 2]` and a little of the identity.
    fn moment(n: usize, seed: u64) -> Matrix {
        let a = numbers(n * n / 2, seed);
        let row = |i: usize| &a[i * n / 2..(i + 1) * n / 2];
        Matrix::from_fn(n, n, |i, j| {
            let product: f64 = row(i).iter().zip(row(j)).map(|(a, b)| a * b).sum();
            product + if i == j { 0.01 } else { 0.0 }
        })
    }

    /// `Σ (w − ŵ) H (w − ŵ)ᵀ` over rows.
    fn cost(weights: &[f64], rounded: &[f64], moment: &Matrix) -> f64 {
        let n = moment.nrows();
        let rows = weights.chunks_exact(n).zip(rounded.chunks_exact(n));
        rows.map(|(w, r)| {
            let d: Vec<f64> = w.iter().zip(r).map(|(w, r)| w - r).collect();
            (0..n)
                .map(|i| d[i] * (0..n).map(|j| moment[(i, j)] * d[j]).sum::<f64>())
                .sum::<f64>()
        })
        .sum()
    }

    #[test]
    fn inputs_alike_in_every_direction_leave_nothing_to_make_good() {
        let weights = numbers(5 * 64, 1);
        let identity = Matrix::identity(64, 64);
        let nearest = Rounded::to_nearest(KIND, 32, [5, 64], &weights).unwrap();
        let second = round(KIND, 32, [5, 64], weights, &identity, 0.01).unwrap();
        assert_eq!(second.numbers(), nearest.numbers());
    }

    #[test]
    fn it_costs_less_than_rounding_to_nearest_on_correlated_inputs() {
        let mut sums = [0.0; 2];
        for seed in 0..8 {
            let (weights, moment) = (numbers(6 * 160, seed), moment(160, 100 + seed));
            let nearest = Rounded::to_nearest(KIND, 32, [6, 160], &weights).unwrap();
            let second = round(KIND, 32, [6, 160], weights.clone(), &moment, 0.01).unwrap();
            let costs = [&nearest, &second].map(|r| cost(&weights, &r.numbers(), &moment));
            assert!(costs[1] < costs[0], "{costs:?}");
            sums = [sums[0] + costs[0], sums[1] + costs[1]];
        }
        assert!(sums[1] < 0.7 * sums[0], "{sums:?}");
    }

    #[test]
    fn blocks_change_nothing_about_the_order() {
        // One block of 160 columns against the textbook loop without blocks.
        let (input, output) = (160, 3);
        let (weights, moment) = (numbers(output * input, 3), moment(input, 4));
        let found = round(KIND, 32, [output, input], weights.clone(), &moment, 0.01).unwrap();
        let upper = inverse_factor(&moment, 0.01).unwrap();
        let found = found.numbers();
        for (row, found) in weights.chunks_exact(input).zip(found.chunks_exact(input)) {
            let mut w = row.to_vec();
            let mut grid = KIND.fit(&w[..32]).unwrap();
            for q in 0..input {
                if q % 32 == 0 {
                    grid = KIND.fit(&w[q..q + 32]).unwrap();
                }
                let number = grid.places().nearest(w[q]);
                assert!((number - found[q]).abs() < 1e-9);
                let error = (w[q] - number) / upper[q * input + q];
                for j in q + 1..input {
                    w[j] -= error * upper[q * input + j];
                }
            }
        }
    }

    #[test]
    fn fixing_one_weight_costs_what_the_inverse_says() {
        // Least of δ H δᵀ with δ_q = −w_q is w_q² / [H⁻¹]_qq, and compensation attains it.
        let n = 12;
        let (w, moment) = (numbers(n, 5), moment(n, 6));
        let upper = inverse_factor(&moment, 0.0).unwrap();
        // The first column has all others after it.
        let error = w[0] / upper[0];
        let moved: Vec<f64> = (0..n).map(|j| w[j] - error * upper[j]).collect();
        assert!(moved[0].abs() < 1e-12);
        let inverse_first: f64 = upper[0] * upper[0];
        let measured = cost(&w, &moved, &moment);
        assert!((measured - w[0] * w[0] / inverse_first).abs() < 1e-9 * measured);
        let mut zeroed = w.clone();
        zeroed[0] = 0.0;
        assert!(measured < cost(&w, &zeroed, &moment));
    }
}
