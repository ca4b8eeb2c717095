//! What frozen features tell of classes: by the nearest of known rows, and by a linear map of them. The encoder
//! learns nothing here, and rows that are asked about choose nothing.

use crate::Result;
use lapidary_factor::{AffineMap, Matrix, Regression};

/// A class and the features of what belongs to it.
pub(crate) type Row = (usize, Vec<f64>);

/// Ridges that are tried, as a share of the rows; inputs have variance one.
const RIDGES: [f64; 6] = [1.0, 0.3, 0.1, 1e-2, 1e-3, 1e-4];
/// One row in so many of those that are known chooses the ridge.
const CHOOSING: usize = 5;

/// How many of a hundred are of the class that most of their `count` nearest have, by the cosine; of equal votes the
/// first class.
pub(crate) fn percent_by_neighbours(
    known: &[Row],
    asked: &[Row],
    classes: usize,
    count: usize,
) -> f64 {
    let [known, asked] = [known, asked].map(|rows| -> Vec<Row> {
        let rows = rows.iter();
        rows.map(|(class, row)| (*class, unit(row))).collect()
    });
    percent(&asked, |row| {
        let cosine = |other: &[f64]| -> f64 { row.iter().zip(other).map(|(a, b)| a * b).sum() };
        let mut near: Vec<(f64, usize)> = known
            .iter()
            .map(|(class, other)| (cosine(other), *class))
            .collect();
        near.sort_by(|a, b| b.0.total_cmp(&a.0));
        let mut votes = vec![0.0; classes];
        for (_, class) in near.iter().take(count) {
            if let Some(votes) = votes.get_mut(*class) {
                *votes += 1.0;
            }
        }
        largest(&votes)
    })
}

/// How many of a hundred are of the class whose number is largest in a linear map of their features: least squares
/// towards 1 for the class and 0 for others, with the ridge that is best on a fifth of the known rows for a map of
/// the rest; of equally good ones the strongest.
///
/// # Errors
/// When nothing is known, or a decomposition fails.
pub(crate) fn percent_by_ridge(known: &[Row], asked: &[Row], classes: usize) -> Result<f64> {
    let standard = Standard::of(known);
    let [known, asked] = [known, asked].map(|rows| standard.applied(rows));
    let (choosing, fitted) = known.split_at(known.len() / CHOOSING);
    let sums = Sums::of(fitted, classes)?;
    let mut best = (f64::NEG_INFINITY, RIDGES[0]);
    for ridge in RIDGES {
        let right = sums.map(ridge)?.percent(choosing);
        if right > best.0 {
            best = (right, ridge);
        }
    }
    Ok(Sums::of(&known, classes)?.map(best.1)?.percent(&asked))
}

/// How many of a hundred are given their class.
fn percent(asked: &[Row], named: impl Fn(&[f64]) -> Option<usize>) -> f64 {
    let right = asked
        .iter()
        .filter(|(class, row)| named(row) == Some(*class));
    100.0 * right.count() as f64 / asked.len().max(1) as f64
}

/// The place of the largest number, the first of equal ones.
fn largest(numbers: &[f64]) -> Option<usize> {
    let places = (0..numbers.len()).rev();
    places.max_by(|a, b| numbers[*a].total_cmp(&numbers[*b]))
}

/// At length one.
fn unit(row: &[f64]) -> Vec<f64> {
    let length = row.iter().map(|x| x * x).sum::<f64>().sqrt().max(1e-12);
    row.iter().map(|x| x / length).collect()
}

/// What makes mean and variance of each feature of known rows 0 and 1.
struct Standard {
    means: Vec<f64>,
    /// 0 where a feature is the same everywhere.
    factors: Vec<f64>,
}

impl Standard {
    fn of(rows: &[Row]) -> Self {
        let width = rows.first().map_or(0, |(_, row)| row.len());
        let count = rows.len().max(1) as f64;
        let mean =
            |of: &dyn Fn(&[f64]) -> f64| rows.iter().map(|(_, row)| of(row)).sum::<f64>() / count;
        let means: Vec<f64> = (0..width).map(|j| mean(&|row: &[f64]| row[j])).collect();
        let factors = (0..width).map(|j| {
            let deviation = mean(&|row: &[f64]| (row[j] - means[j]).powi(2)).sqrt();
            if deviation > 1e-9 * means[j].abs().max(1e-9) {
                1.0 / deviation
            } else {
                0.0
            }
        });
        Self {
            factors: factors.collect(),
            means,
        }
    }

    fn applied(&self, rows: &[Row]) -> Vec<Row> {
        let of = |(class, row): &Row| {
            let each = row.iter().zip(&self.means).zip(&self.factors);
            (
                *class,
                each.map(|((x, mean), factor)| (x - mean) * factor)
                    .collect(),
            )
        };
        rows.iter().map(of).collect()
    }
}

/// Sums over rows, from which maps of any ridge are found.
struct Sums(Regression);

impl Sums {
    fn of(rows: &[Row], classes: usize) -> Result<Self> {
        let width = rows.first().map_or(0, |(_, row)| row.len());
        let x = Matrix::from_fn(rows.len(), width, |i, j| rows[i].1[j]);
        let y = Matrix::from_fn(rows.len(), classes, |i, class| {
            f64::from(u8::from(rows[i].0 == class))
        });
        let mut sums = Regression::with_intercept(width, classes);
        sums.add(x.as_ref(), y.as_ref())?;
        Ok(Self(sums))
    }

    fn map(&self, ridge: f64) -> Result<Probe> {
        Ok(Probe(self.0.solve(ridge * self.0.rows() as f64)?))
    }
}

/// A linear map of features to a number for each class.
struct Probe(AffineMap);

impl Probe {
    fn percent(&self, asked: &[Row]) -> f64 {
        let Self(map) = self;
        percent(asked, |row| {
            let each = map.bias.iter().enumerate().map(|(class, bias)| {
                let inputs = row.iter().enumerate();
                bias + inputs.map(|(j, x)| x * map.weight[(j, class)]).sum::<f64>()
            });
            largest(&each.collect::<Vec<f64>>())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_vote() {
        let at = |angle: f64, length: f64| vec![length * angle.cos(), length * angle.sin()];
        // Eleven of class 1 nearby, and as many of class 2 across; lengths say nothing.
        let known: Vec<Row> = (0..11)
            .flat_map(|i| {
                let by = 0.01 * f64::from(i);
                [(1, at(by, 1.0 + by)), (2, at(3.0 + by, 9.0 - by))]
            })
            .collect();
        let asked = [(1, at(0.05, 4.0)), (2, at(3.05, 0.1)), (1, at(3.0, 1.0))];
        let found = percent_by_neighbours(&known, &asked, 4, 10);
        assert!((found - 200.0 / 3.0).abs() < 1e-9);
    }

    /// Two rows of each noise, one of each class, so that noise and class have no covariance: whatever the ridge, the
    /// map reads the small feature that tells, and not those far larger ones in which neighbours agree.
    fn noisy(pairs: std::ops::Range<usize>) -> Vec<Row> {
        pairs
            .flat_map(|i| {
                let noise = [(i * 37 % 41) as f64 - 20.0, (i * 53 % 59) as f64 - 29.0];
                [0, 1].map(|class| {
                    let told = if class == 0 { -0.01 } else { 0.01 };
                    (class, vec![told, noise[0], noise[1], 7.0])
                })
            })
            .collect()
    }

    #[test]
    fn a_linear_map_finds_the_feature_that_tells() {
        let known = noisy(0..40);
        let found = percent_by_ridge(&known, &noisy(40..60), 2).unwrap();
        assert_eq!(found, 100.0);
    }

    /// Classes that are told apart by nothing all get the commonest of known rows, not of those asked about.
    #[test]
    fn features_that_say_nothing_leave_the_commonest_class() {
        let row = |class: usize| (class, vec![2.0, -1.0]);
        let known: Vec<Row> = [1, 1, 0, 1, 2].map(row).to_vec();
        let asked: Vec<Row> = [0, 1, 0, 2].map(row).to_vec();
        assert_eq!(percent_by_ridge(&known, &asked, 3).unwrap(), 25.0);
        assert!(percent_by_ridge(&[], &asked, 3).is_err());
    }
}
