//! Where a search may look: a grid for each coordinate.

use rand::{Rng, RngExt};
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// A place in each coordinate's grid.
pub type Point = Vec<usize>;

/// The product of a grid for each coordinate.
///
/// How far two places of a grid are apart is told by their places, `|i − j| / (places − 1)`, not by
/// what stands there: a grid that is even in the logarithm is searched in the logarithm.
///
/// ```
/// use lapidary_search::Domain;
/// let domain = Domain::new(vec![vec![0.0, 1.0], vec![1.0, 10.0, 100.0]])?;
/// assert_eq!(domain.values(&[1, 2])?, [1.0, 100.0]);
/// assert!(domain.values(&[1, 3]).is_err());
/// # Ok::<(), lapidary_search::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Vec<Vec<f64>>", into = "Vec<Vec<f64>>")]
pub struct Domain {
    grids: Vec<Vec<f64>>,
}

impl TryFrom<Vec<Vec<f64>>> for Domain {
    type Error = Error;

    fn try_from(grids: Vec<Vec<f64>>) -> Result<Self> {
        Self::new(grids)
    }
}

impl From<Domain> for Vec<Vec<f64>> {
    fn from(domain: Domain) -> Self {
        domain.grids
    }
}

impl Domain {
    /// A domain of these grids.
    ///
    /// # Errors
    /// When there is no coordinate, or a grid is empty or holds a number that is not finite.
    pub fn new(grids: Vec<Vec<f64>>) -> Result<Self> {
        if grids.is_empty() {
            return Err(Error::invalid("number of coordinates", 0, "at least 1"));
        }
        for (coordinate, grid) in grids.iter().enumerate() {
            if grid.is_empty() || grid.iter().any(|value| !value.is_finite()) {
                return Err(Error::invalid(
                    format!("grid of coordinate {coordinate}"),
                    format!("{grid:?}"),
                    "at least one finite number",
                ));
            }
        }
        Ok(Self { grids })
    }

    /// `places` even steps from `low` to `high` in each of `dimensions` coordinates.
    ///
    /// # Errors
    /// When one of the numbers is zero or not finite.
    pub fn uniform(dimensions: usize, low: f64, high: f64, places: usize) -> Result<Self> {
        let step = (high - low) / places.saturating_sub(1).max(1) as f64;
        let grid = (0..places).map(|place| low + step * place as f64).collect();
        Self::new(vec![grid; dimensions])
    }

    /// Number of coordinates.
    pub fn dimensions(&self) -> usize {
        self.grids.len()
    }

    /// Places of a coordinate; none of one that there is not.
    pub fn places(&self, coordinate: usize) -> usize {
        self.grids.get(coordinate).map_or(0, Vec::len)
    }

    /// Points of the domain, as far as they can be counted.
    pub fn size(&self) -> usize {
        let grids = self.grids.iter();
        grids.fold(1, |size: usize, grid| size.saturating_mul(grid.len()))
    }

    /// Refuses what is no point of the domain.
    ///
    /// # Errors
    /// When the number of coordinates or a place is wrong.
    pub fn check(&self, point: &[usize]) -> Result<()> {
        if point.len() != self.grids.len() {
            return Err(Error::invalid(
                "number of coordinates of a point",
                point.len(),
                self.grids.len().to_string(),
            ));
        }
        for (coordinate, (place, grid)) in point.iter().zip(&self.grids).enumerate() {
            if *place >= grid.len() {
                return Err(Error::invalid(
                    format!("place in coordinate {coordinate}"),
                    place,
                    format!("below {}", grid.len()),
                ));
            }
        }
        Ok(())
    }

    /// What stands at a point's places.
    ///
    /// # Errors
    /// When it is no point of the domain.
    pub fn values(&self, point: &[usize]) -> Result<Vec<f64>> {
        self.check(point)?;
        let values = point.iter().zip(&self.grids);
        Ok(values
            .filter_map(|(place, grid)| grid.get(*place).copied())
            .collect())
    }

    /// A point, each as likely as any other.
    pub fn random(&self, generator: &mut impl Rng) -> Point {
        let grids = self.grids.iter();
        grids
            .map(|grid| generator.random_range(0..grid.len()))
            .collect()
    }

    /// Moves one coordinate, of those that can move, to a neighbouring place.
    pub(crate) fn perturb(&self, point: &mut [usize], generator: &mut impl Rng) {
        let movable: Vec<usize> = (0..self.grids.len())
            .filter(|coordinate| self.places(*coordinate) > 1)
            .collect();
        if movable.is_empty() {
            return;
        }
        let coordinate = movable[generator.random_range(0..movable.len())];
        let last = self.places(coordinate) - 1;
        let place = &mut point[coordinate];
        let up = match *place {
            0 => true,
            place if place == last => false,
            _ => generator.random(),
        };
        *place = if up { *place + 1 } else { *place - 1 };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;

    #[test]
    fn a_perturbed_point_is_a_neighbour_inside_the_domain() {
        let domain = Domain::new(vec![vec![1.0], vec![0.0, 1.0], vec![0.0, 1.0, 2.0]]).unwrap();
        let mut generator = rand_chacha::ChaCha8Rng::seed_from_u64(1);
        let mut seen = std::collections::BTreeSet::new();
        let mut point = vec![0, 0, 0];
        for _ in 0..200 {
            let before = point.clone();
            domain.perturb(&mut point, &mut generator);
            domain.check(&point).unwrap();
            let apart: usize = before.iter().zip(&point).map(|(a, b)| a.abs_diff(*b)).sum();
            assert_eq!(apart, 1);
            seen.insert(point.clone());
        }
        assert_eq!(seen.len(), domain.size());
    }

    #[test]
    fn what_is_no_domain_is_refused_also_in_json() {
        assert!(Domain::new(vec![]).is_err());
        assert!(Domain::new(vec![vec![1.0], vec![]]).is_err());
        assert!(Domain::new(vec![vec![f64::NAN]]).is_err());
        assert!(serde_json::from_str::<Domain>("[[1.0],[]]").is_err());
        let domain = Domain::uniform(2, -4.0, 4.0, 150).unwrap();
        let text = serde_json::to_string(&domain).unwrap();
        assert_eq!(serde_json::from_str::<Domain>(&text).unwrap(), domain);
        let error = domain.check(&[0, 150]).unwrap_err().to_string();
        assert!(error.contains("below 150"), "{error}");
    }
}
