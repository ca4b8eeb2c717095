//! Columns that stay numbers since their inputs are outliers.
//!
//! `y = Q x + K x`: `Q` is rounded with zeros in those columns, so that they widen no grid and none of
//! the errors of the others is made good in them, and `K` holds what then is missing there.

use lapidary_factor::Matrix;

use super::QuantiseSettings;
use crate::{Error, Result};

/// The size from which an input is an outlier, where any is.
///
/// # Errors
/// When it is below zero or no number.
pub(crate) fn threshold(settings: &QuantiseSettings) -> Result<Option<f64>> {
    let size = settings.outliers;
    if size == 0.0 {
        return Ok(None);
    }
    if size > 0.0 && size.is_finite() {
        return Ok(Some(size));
    }
    Err(Error::invalid(
        "size of outliers",
        size,
        "above 0, or 0 for none",
    ))
}

/// The inputs whose largest sizes come to `threshold`, in rising order.
pub(crate) fn columns(peaks: &[f64], threshold: f64) -> Vec<usize> {
    let large = peaks.iter().enumerate();
    let large = large.filter(|(_, peak)| **peak >= threshold);
    large.map(|(column, _)| column).collect()
}

/// `weights` `[output, input]` row by row, with zeros in `columns`.
pub(super) fn without(weights: &[f64], [_, input]: [usize; 2], columns: &[usize]) -> Vec<f64> {
    let mut without = weights.to_vec();
    for row in without.chunks_exact_mut(input.max(1)) {
        for column in columns {
            row[*column] = 0.0;
        }
    }
    without
}

/// Takes `columns` out of a second moment: as if their inputs had to do with no other.
pub(super) fn detach(moment: &mut Matrix, columns: &[usize]) {
    for &column in columns {
        for other in 0..moment.nrows() {
            moment[(column, other)] = 0.0;
            moment[(other, column)] = 0.0;
        }
        moment[(column, column)] = 1.0;
    }
}

/// Makes `numbers` exact in `columns`, and gives what was missing there, `[output, columns]` row by row.
pub(super) fn take_up(
    weights: &[f64],
    numbers: &mut [f64],
    [output, input]: [usize; 2],
    columns: &[usize],
) -> Vec<f64> {
    let mut lost = Vec::with_capacity(output * columns.len());
    let rows = weights.chunks_exact(input.max(1));
    for (weights, numbers) in rows.zip(numbers.chunks_exact_mut(input.max(1))) {
        for &column in columns {
            lost.push(weights[column] - numbers[column]);
            numbers[column] = weights[column];
        }
    }
    lost
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_those_that_come_to_the_size() {
        assert_eq!(columns(&[5.9, 6.0, 0.0, 7.5], 6.0), [1, 3]);
        assert!(columns(&[5.9, 6.0], 8.0).is_empty());
    }

    #[test]
    fn what_is_taken_up_makes_a_matrix_exact_there_and_nowhere_else() {
        let weights = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        assert_eq!(
            without(&weights, [2, 3], &[1]),
            [1.0, 0.0, 3.0, 4.0, 0.0, 6.0]
        );
        let mut numbers = [0.9, 0.1, 3.0, 4.2, -0.1, 6.1];
        let lost = take_up(&weights, &mut numbers, [2, 3], &[1]);
        assert_eq!(lost, [1.9, 5.1]);
        assert_eq!(numbers, [0.9, 2.0, 3.0, 4.2, 5.0, 6.1]);
    }

    #[test]
    fn a_moment_without_a_column_has_nothing_to_do_with_it() {
        let mut moment = Matrix::from_fn(3, 3, |i, j| (1 + i + j) as f64);
        detach(&mut moment, &[1]);
        let expected = [[1.0, 0.0, 3.0], [0.0, 1.0, 0.0], [3.0, 0.0, 5.0]];
        for (i, row) in expected.iter().enumerate() {
            for (j, value) in row.iter().enumerate() {
                assert_eq!(moment[(i, j)], *value);
            }
        }
    }

    #[test]
    fn sizes_that_mean_nothing_are_refused() {
        let told = |outliers| QuantiseSettings {
            outliers,
            ..QuantiseSettings::default()
        };
        assert_eq!(threshold(&told(0.0)).unwrap(), None);
        assert_eq!(threshold(&told(6.0)).unwrap(), Some(6.0));
        for wrong in [-1.0, f64::NAN, f64::INFINITY] {
            assert!(threshold(&told(wrong)).is_err());
        }
    }
}
