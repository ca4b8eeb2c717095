//! What was observed.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::warp::{gaussian, standardised};
use crate::{Domain, Error, Point, Result};

/// How a process sees what was observed. Its prior mean is zero either way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Scale {
    /// As it is, as in the published code: where little is known, zero is expected. So zero should be
    /// a bad value, and the amplitudes should suit the values.
    AsGiven,
    /// Less the mean, over the standard deviation: where little is known, the mean is expected.
    Standardised,
    /// Bent by the power transform under which it looks most Gaussian, and standardised: a few values far
    /// from the others count less.
    Warped,
}

/// Points and what was observed there, in order.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct History {
    /// The points.
    pub points: Vec<Point>,
    /// What was observed at each.
    pub values: Vec<f64>,
}

impl History {
    /// Number of observations.
    pub fn len(&self) -> usize {
        self.values.len()
    }

    /// Whether nothing was observed.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// The least value and its point; of equal ones the first.
    pub fn best(&self) -> Option<(&[usize], f64)> {
        let all = self.points.iter().zip(&self.values);
        all.map(|(point, value)| (point.as_slice(), *value))
            .min_by(|a, b| a.1.total_cmp(&b.1))
    }

    /// Whether something was observed at a point.
    pub fn contains(&self, point: &[usize]) -> bool {
        self.points.iter().any(|other| other == point)
    }

    /// Whether something was observed at every point of a domain. Points may have been observed twice.
    pub(crate) fn exhausts(&self, domain: &Domain) -> bool {
        let size = domain.size();
        self.len() >= size && self.points.iter().collect::<BTreeSet<_>>().len() >= size
    }

    /// The values in a scale.
    pub(crate) fn scaled(&self, scale: Scale) -> Vec<f64> {
        match scale {
            Scale::AsGiven => self.values.clone(),
            Scale::Standardised => standardised(&self.values),
            Scale::Warped => gaussian(&self.values),
        }
    }

    pub(crate) fn push(&mut self, domain: &Domain, point: Point, value: f64) -> Result<()> {
        domain.check(&point)?;
        if !value.is_finite() {
            return Err(Error::invalid("observed value", value, "finite"));
        }
        self.points.push(point);
        self.values.push(value);
        Ok(())
    }

    /// Refuses observations that are not of the domain.
    pub(crate) fn check(&self, domain: &Domain) -> Result<()> {
        if self.points.len() != self.values.len() || self.values.iter().any(|v| !v.is_finite()) {
            return Err(Error::invalid(
                "history",
                format!(
                    "{} points and {} values",
                    self.points.len(),
                    self.values.len()
                ),
                "one finite value for each point",
            ));
        }
        self.points.iter().try_for_each(|point| domain.check(point))
    }
}

/// Of each coordinate, the places of the points.
pub(crate) fn columns(domain: &Domain, points: &[Point]) -> Vec<Vec<usize>> {
    (0..domain.dimensions())
        .map(|coordinate| points.iter().map(|point| point[coordinate]).collect())
        .collect()
}
