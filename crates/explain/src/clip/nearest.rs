//! Images or texts by what one head says of them.

use crate::{Error, Result};
use lapidary_factor::MatrixView;

/// The `count` rows of `vectors` `[rows, features]` with the largest product with `query`, and
/// the products, largest first: the images whose head output points most to a text, or the texts
/// to which a head output points most.
///
/// # Errors
/// When the features differ.
pub fn nearest(vectors: MatrixView<'_>, query: &[f64], count: usize) -> Result<Vec<(usize, f64)>> {
    check(vectors, query)?;
    let product = |row: usize| -> f64 {
        let both = vectors.row(row).iter().zip(query);
        both.map(|(a, b)| a * b).sum()
    };
    Ok(ranked((0..vectors.nrows()).map(product), count))
}

/// The `count` rows of `vectors` `[rows, features]` most like `query`, and the cosines, largest
/// first: the images of which a head says what it says of a given image.
///
/// # Errors
/// When the features differ.
pub fn most_similar(
    vectors: MatrixView<'_>,
    query: &[f64],
    count: usize,
) -> Result<Vec<(usize, f64)>> {
    check(vectors, query)?;
    let length = query.iter().map(|x| x * x).sum::<f64>().sqrt();
    let cosine = |row: usize| -> f64 {
        let row = vectors.row(row);
        let product: f64 = row.iter().zip(query).map(|(a, b)| a * b).sum();
        product / (row.norm_l2() * length).max(f64::MIN_POSITIVE)
    };
    Ok(ranked((0..vectors.nrows()).map(cosine), count))
}

fn ranked(scores: impl Iterator<Item = f64>, count: usize) -> Vec<(usize, f64)> {
    let mut scores: Vec<(usize, f64)> = scores.enumerate().collect();
    scores.sort_by(|a, b| b.1.total_cmp(&a.1));
    scores.truncate(count);
    scores
}

fn check(vectors: MatrixView<'_>, query: &[f64]) -> Result<()> {
    if vectors.ncols() != query.len() {
        let expected = format!("{}", vectors.ncols());
        return Err(Error::invalid(
            "features of the query",
            query.len(),
            expected,
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use lapidary_factor::Matrix;

    #[test]
    fn long_rows_are_near_and_parallel_ones_similar() {
        let rows = [[3.0, 3.0], [1.0, 0.0], [-1.0, 0.0]];
        let vectors = Matrix::from_fn(3, 2, |i, j| rows[i][j]);
        let order = |found: Vec<(usize, f64)>| -> Vec<usize> {
            found.into_iter().map(|(index, _)| index).collect()
        };
        let query = [1.0, 0.0];
        assert_eq!(order(nearest(vectors.as_ref(), &query, 2).unwrap()), [0, 1]);
        let similar = most_similar(vectors.as_ref(), &query, 3).unwrap();
        assert_eq!(similar[0], (1, 1.0));
        assert_eq!(order(similar), [1, 0, 2]);
        assert!(nearest(vectors.as_ref(), &[1.0], 1).is_err());
    }
}
