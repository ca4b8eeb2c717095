//! Which pairs of eigenvectors carry a share of the curvature.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

/// A pair with its product; the largest product first, of equal ones the one of the lower row.
#[derive(PartialEq)]
struct Pair {
    product: f64,
    row: usize,
    column: usize,
}

impl Eq for Pair {}

impl Ord for Pair {
    fn cmp(&self, other: &Self) -> Ordering {
        self.product
            .total_cmp(&other.product)
            .then(other.row.cmp(&self.row))
            .then(other.column.cmp(&self.column))
    }
}

impl PartialOrd for Pair {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// The smallest set of pairs `(i, j)`, taken in falling order of `rows_i · columns_j`, whose sum
/// reaches `mass · Σ rows · Σ columns`, of two spectra that fall and are not negative.
///
/// The set is a staircase: of row `i` it has the first `result[i]` columns, and the numbers do
/// not rise. The products are merged from a heap of one pair for each row that was reached, and
/// never laid out. No mass takes no pair, all of it takes every pair.
pub(super) fn staircase(rows: &[f64], columns: &[f64], mass: f64) -> Vec<usize> {
    if mass >= 1.0 {
        return vec![columns.len(); rows.len()];
    }
    let mut taken = vec![0; rows.len()];
    let wanted = mass * rows.iter().sum::<f64>() * columns.iter().sum::<f64>();
    let pair = |row: usize, column: usize| {
        let product = rows.get(row)? * columns.get(column)?;
        Some(Pair {
            product,
            row,
            column,
        })
    };
    let mut heap: BinaryHeap<Pair> = pair(0, 0).into_iter().collect();
    let mut sum = 0.0;
    while sum < wanted {
        let Some(Pair {
            product,
            row,
            column,
        }) = heap.pop()
        else {
            break;
        };
        sum += product;
        if let Some(taken) = taken.get_mut(row) {
            *taken = column + 1;
        }
        heap.extend(pair(row, column + 1));
        if column == 0 {
            heap.extend(pair(row + 1, 0));
        }
    }
    taken
}

/// The rectangle that a truncation of both sides by themselves keeps: the fewest rows and the
/// fewest columns whose sums reach `mass` of each spectrum.
pub(super) fn rectangle(rows: &[f64], columns: &[f64], mass: f64) -> Vec<usize> {
    let fewest = |spectrum: &[f64]| {
        let wanted = mass * spectrum.iter().sum::<f64>();
        let mut sum = 0.0;
        let reached = spectrum.iter().position(|value| {
            sum += value;
            sum >= wanted
        });
        match mass {
            mass if mass >= 1.0 => spectrum.len(),
            mass if mass <= 0.0 => 0,
            _ => reached.map_or(spectrum.len(), |index| index + 1),
        }
    };
    let (height, width) = (fewest(rows), fewest(columns));
    (0..rows.len())
        .map(|row| if row < height { width } else { 0 })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn spectrum(longest: usize) -> impl Strategy<Value = Vec<f64>> {
        let value = prop_oneof![0.0f64..1.0, Just(0.5), Just(0.0)];
        proptest::collection::vec(value, 1..longest).prop_map(|mut values| {
            values.sort_by(|a, b| b.total_cmp(a));
            values
        })
    }

    proptest! {
        #[test]
        fn the_heap_takes_what_a_full_sort_takes(
            rows in spectrum(64), columns in spectrum(64), mass in 0.01f64..0.99,
        ) {
            let taken = staircase(&rows, &columns, mass);
            prop_assert!(taken.is_sorted_by(|a, b| a >= b), "{taken:?}");
            let total = rows.iter().sum::<f64>() * columns.iter().sum::<f64>();
            let mut products: Vec<f64> = Vec::new();
            let mut kept: Vec<f64> = Vec::new();
            for (row, count) in rows.iter().zip(&taken) {
                for (index, column) in columns.iter().enumerate() {
                    products.push(row * column);
                    if index < *count {
                        kept.push(row * column);
                    }
                }
            }
            products.sort_by(|a, b| b.total_cmp(a));
            kept.sort_by(|a, b| b.total_cmp(a));
            prop_assert_eq!(&kept, &products[..kept.len()].to_vec());
            let sum: f64 = kept.iter().sum();
            prop_assert!(sum >= mass * total - 1e-9);
            if let Some(last) = kept.last() {
                prop_assert!(sum - last < mass * total + 1e-9);
            }
        }
    }

    #[test]
    fn nothing_and_everything() {
        let (rows, columns) = ([3.0, 1.0], [2.0, 1.0, 0.0]);
        assert_eq!(staircase(&rows, &columns, 0.0), [0, 0]);
        assert_eq!(staircase(&rows, &columns, 1.0), [3, 3]);
        // 6 of 12, then 3, then 2.
        assert_eq!(staircase(&rows, &columns, 0.5), [1, 0]);
        assert_eq!(staircase(&rows, &columns, 0.7), [2, 0]);
        assert_eq!(staircase(&rows, &columns, 0.9), [2, 1]);
        assert_eq!(rectangle(&rows, &columns, 0.7), [2, 0]);
        assert_eq!(rectangle(&rows, &columns, 0.8), [2, 2]);
        assert_eq!(rectangle(&rows, &columns, 0.0), [0, 0]);
    }
}
