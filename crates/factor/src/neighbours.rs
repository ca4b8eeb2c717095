//! Distances to nearest neighbours, by looking at every pair: `O(rows² columns)`.

use crate::{Error, Matrix, Result};

/// Euclidean distances of each row to its `count` nearest other rows, nearest first. Differences
/// are taken before they are squared, so that near rows keep their distance.
///
/// # Errors
/// When there are not more rows than neighbours.
pub fn nearest_distances(points: &Matrix, count: usize) -> Result<Vec<Vec<f64>>> {
    let (rows, columns) = (points.nrows(), points.ncols());
    if count >= rows {
        return Err(Error::Shape {
            name: "points with neighbours",
            found: vec![rows, columns],
            expected: vec![count + 1, columns],
        });
    }
    // One row after another in memory.
    let turned = points.transpose().to_owned();
    let row = |i: usize| turned.col(i).try_as_col_major().map(|col| col.as_slice());
    let mut nearest = Vec::with_capacity(rows);
    let mut squares = Vec::with_capacity(rows);
    for i in 0..rows {
        squares.clear();
        let Some(here) = row(i) else { continue };
        for there in (0..rows).filter(|j| *j != i).filter_map(row) {
            let square = here
                .iter()
                .zip(there)
                .map(|(a, b)| (a - b) * (a - b))
                .sum::<f64>();
            squares.push(square);
        }
        let (near, last, _) = squares.select_nth_unstable_by(count.max(1) - 1, f64::total_cmp);
        let mut near: Vec<f64> = near.iter().chain([&*last]).map(|s| s.sqrt()).collect();
        near.truncate(count);
        near.sort_by(f64::total_cmp);
        nearest.push(near);
    }
    Ok(nearest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_on_a_line() {
        let at = [0.0, 1.0, 3.0, 7.0];
        let points = Matrix::from_fn(4, 2, |i, j| if j == 0 { at[i] } else { 5.0 });
        let found = nearest_distances(&points, 2).unwrap();
        assert_eq!(
            found,
            [[1.0, 3.0], [1.0, 2.0], [2.0, 3.0], [4.0, 6.0]].map(|d| d.to_vec())
        );
        assert!(nearest_distances(&points, 4).is_err());
    }
}
