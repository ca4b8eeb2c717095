//! Positions of patches between which others lie: those of images of another size than a table is of.
//!
//! Along each side a new place `i` of `n` reads the old ones of `m` around `x = (i + ½) m/n − ½` by the cubic
//! convolution of Keys (Cubic Convolution Interpolation for Digital Image Processing, 1981) with `a = −¾`, the first and
//! the last repeated beyond the edge, as small views are read in DINO (Caron et al., arXiv 2104.14294).

use crate::input::engine;
use lapidary_kernels::Tensor;
use lapidary_parts::Result;

const SHARPNESS: f64 = -0.75;

/// What a place at a distance is read with.
fn kernel(distance: f64) -> f64 {
    let (a, d) = (SHARPNESS, distance.abs());
    match d {
        d if d <= 1.0 => ((a + 2.0) * d - (a + 3.0)) * d * d + 1.0,
        d if d < 2.0 => ((a * d - 5.0 * a) * d + 8.0 * a) * d - 4.0 * a,
        _ => 0.0,
    }
}

/// For each of `to` places the weights of `from`.
fn along(from: usize, to: usize) -> Vec<Vec<f64>> {
    let last = from.saturating_sub(1);
    let each = (0..to).map(|place| {
        let at = (place as f64 + 0.5) * from as f64 / to as f64 - 0.5;
        let mut weights = vec![0.0; from];
        for offset in -1..=2 {
            let neighbour = at.floor() + f64::from(offset);
            let index = (neighbour.max(0.0) as usize).min(last);
            if let Some(weight) = weights.get_mut(index) {
                *weight += kernel(at - neighbour);
            }
        }
        weights
    });
    each.collect()
}

/// A table `[before + rows · columns, width]` of a grid `from` `[rows, columns]` as one of a grid `to`: the rows `before`
/// the grid are as they were. Differentiable in the table.
///
/// # Errors
/// Those of the tensor engine, as for a table of another length.
pub(crate) fn resized(
    table: &Tensor,
    before: usize,
    from: [usize; 2],
    to: [usize; 2],
) -> Result<Tensor> {
    if from == to {
        return Ok(table.clone());
    }
    let (of_rows, of_columns) = (along(from[0], to[0]), along(from[1], to[1]));
    let mut weights = Vec::with_capacity(to[0] * to[1] * from[0] * from[1]);
    for row in &of_rows {
        for column in &of_columns {
            let pairs = row.iter().flat_map(|r| column.iter().map(move |c| r * c));
            weights.extend(pairs);
        }
    }
    let shape = (to[0] * to[1], from[0] * from[1]);
    let weights = engine(Tensor::from_vec(weights, shape, table.device()))?;
    let weights = engine(weights.to_dtype(table.dtype()))?;
    let grid = engine(engine(table.narrow(0, before, shape.1))?.contiguous())?;
    let grid = engine(weights.matmul(&grid))?;
    if before == 0 {
        return Ok(grid);
    }
    let first = engine(table.narrow(0, 0, before))?;
    engine(Tensor::cat(&[&first, &grid], 0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use lapidary_kernels::{Device, Var};

    fn numbers(table: &Tensor) -> Vec<f64> {
        table.flatten_all().unwrap().to_vec1().unwrap()
    }

    /// `[count, 2]`, numbers that are not the same twice.
    fn table(count: usize) -> Tensor {
        let numbers = (0..2 * count).map(|at| (at as f64 * 1.3).sin()).collect();
        Tensor::from_vec::<_, f64>(numbers, (count, 2), &Device::Cpu).unwrap()
    }

    #[test]
    fn places_read_those_around_them() {
        for (from, to) in [(4, 4), (5, 3), (3, 7), (1, 4), (8, 1)] {
            for weights in along(from, to) {
                assert!((weights.iter().sum::<f64>() - 1.0).abs() < 1e-12);
            }
        }
        // The same places are the same.
        for (place, weights) in along(4, 4).iter().enumerate() {
            let expected = |index: usize| f64::from(u8::from(index == place));
            let near = |(index, weight): (usize, &f64)| (weight - expected(index)).abs() < 1e-12;
            assert!(weights.iter().enumerate().all(near));
        }
        // In the middle of four, and between two that stand for four.
        assert_eq!(along(4, 1), [[-0.09375, 0.59375, 0.59375, -0.09375]]);
        assert_eq!(along(2, 1), [[0.5, 0.5]]);
    }

    /// Rows and columns by themselves, what is before the grid untouched.
    #[test]
    fn a_grid_is_read_row_by_row_and_column_by_column() {
        let (from, to) = ([4, 3], [2, 5]);
        let table = table(1 + 12);
        let found = resized(&table, 1, from, to).unwrap();
        assert_eq!(found.dims(), [11, 2]);
        let (old, new) = (numbers(&table), numbers(&found));
        assert_eq!(old[..2], new[..2]);
        let (rows, columns) = (along(4, 2), along(3, 5));
        for (r, row) in rows.iter().enumerate() {
            for (c, column) in columns.iter().enumerate() {
                for feature in 0..2 {
                    let mut expected = 0.0;
                    for (i, by_row) in row.iter().enumerate() {
                        for (j, by_column) in column.iter().enumerate() {
                            expected += by_row * by_column * old[2 * (1 + 3 * i + j) + feature];
                        }
                    }
                    let at = new[2 * (1 + 5 * r + c) + feature];
                    assert!((at - expected).abs() < 1e-12);
                }
            }
        }
        let same = resized(&table, 1, from, from).unwrap();
        assert_eq!(numbers(&same), old);
        assert_eq!(resized(&table, 0, [13, 1], [2, 1]).unwrap().dims(), [2, 2]);
    }

    /// Each position learns by what is read of it.
    #[test]
    fn gradients_come_back_to_the_table() {
        let table = Var::from_tensor(&table(1 + 6)).unwrap();
        let small = resized(table.as_tensor(), 1, [2, 3], [1, 1]).unwrap();
        let gradients = small.sum_all().unwrap().backward().unwrap();
        let found = numbers(gradients.get(table.as_tensor()).unwrap());
        assert_eq!(found[..2], [1.0, 1.0]);
        let (rows, columns) = (along(2, 1), along(3, 1));
        for (place, of_place) in found[2..].chunks(2).enumerate() {
            let expected = rows[0][place / 3] * columns[0][place % 3];
            assert!(of_place.iter().all(|g| (g - expected).abs() < 1e-12));
        }
    }
}
