//! The covariance: a sum over cliques of products over their variables.

use faer::Mat;
use serde::{Deserialize, Serialize};

use crate::{Domain, Error, Result};

/// What each variable brings to whatever clique it is in, so that it can be kept when the
/// cliques change.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Hyperparameters {
    /// `ℓ_i`, over the width of the variable's grid.
    pub lengths: Vec<f64>,
    /// `v_i`.
    pub amplitudes: Vec<f64>,
}

impl Hyperparameters {
    /// The same for each of `dimensions` variables.
    pub fn new(dimensions: usize, length: f64, amplitude: f64) -> Self {
        Self {
            lengths: vec![length; dimensions],
            amplitudes: vec![amplitude; dimensions],
        }
    }

    /// Refuses what is not a positive number for each of `dimensions` variables.
    ///
    /// # Errors
    /// When it is not.
    pub fn check(&self, dimensions: usize) -> Result<()> {
        for (what, values) in [
            ("length-scales", &self.lengths),
            ("amplitudes", &self.amplitudes),
        ] {
            let positive = values.iter().all(|v| v.is_finite() && *v > 0.0);
            if values.len() != dimensions || !positive {
                return Err(Error::invalid(
                    what,
                    format!("{values:?}"),
                    format!("{dimensions} positive numbers"),
                ));
            }
        }
        Ok(())
    }
}

/// `k(x, x') = Σ_c v_c Π_{i∈c} exp(−½ ((x_i − x'_i) / ℓ_i)²)`, `v_c = √(Σ_{i∈c} v_i²)`.
///
/// On a grid a factor depends on the number of places between two, so that it is looked up.
#[derive(Clone, Debug)]
pub(crate) struct Kernel {
    pub(crate) cliques: Vec<Vec<usize>>,
    /// `v_c`.
    pub(crate) variances: Vec<f64>,
    /// Of each variable and number of places apart, `((x_i − x'_i) / ℓ_i)²`.
    pub(crate) distances: Vec<Vec<f64>>,
    /// `exp(−½ ·)` of these.
    correlations: Vec<Vec<f64>>,
}

/// Of each variable, the places of the points that were observed.
pub(crate) type Columns = [Vec<usize>];

impl Kernel {
    pub(crate) fn new(
        domain: &Domain,
        cliques: Vec<Vec<usize>>,
        hyperparameters: &Hyperparameters,
    ) -> Result<Self> {
        let dimensions = domain.dimensions();
        hyperparameters.check(dimensions)?;
        if let Some(variable) = cliques.iter().flatten().find(|i| **i >= dimensions) {
            return Err(Error::invalid(
                "variable of a clique",
                variable,
                format!("below {dimensions}"),
            ));
        }
        let amplitudes = &hyperparameters.amplitudes;
        let variances = cliques
            .iter()
            .map(|clique| {
                clique
                    .iter()
                    .map(|i| amplitudes[*i].powi(2))
                    .sum::<f64>()
                    .sqrt()
            })
            .collect();
        let distances: Vec<Vec<f64>> = hyperparameters
            .lengths
            .iter()
            .enumerate()
            .map(|(variable, length)| {
                let places = domain.places(variable);
                let step = 1.0 / (places.saturating_sub(1).max(1) as f64 * length);
                (0..places)
                    .map(|apart| (apart as f64 * step).powi(2))
                    .collect()
            })
            .collect();
        let correlations = distances
            .iter()
            .map(|distances| distances.iter().map(|d| (-0.5 * d).exp()).collect())
            .collect();
        Ok(Self {
            cliques,
            variances,
            distances,
            correlations,
        })
    }

    /// Refuses what is no point of the grids.
    pub(crate) fn check(&self, point: &[usize]) -> Result<()> {
        if point.len() != self.distances.len() {
            return Err(Error::invalid(
                "number of coordinates of a point",
                point.len(),
                self.distances.len().to_string(),
            ));
        }
        let mut places = point.iter().enumerate();
        places.try_for_each(|(variable, place)| self.check_place(variable, *place))
    }

    /// Refuses a clique that there is not, and what are no places of its variables.
    pub(crate) fn check_term(&self, clique: usize, places: &[usize]) -> Result<()> {
        let Some(variables) = self.cliques.get(clique) else {
            return Err(Error::invalid(
                "number of a clique",
                clique,
                format!("below {}", self.cliques.len()),
            ));
        };
        if places.len() != variables.len() {
            return Err(Error::invalid(
                format!("number of places for clique {clique}"),
                places.len(),
                format!("{}, one for each of {variables:?}", variables.len()),
            ));
        }
        let mut places = variables.iter().zip(places);
        places.try_for_each(|(variable, place)| self.check_place(*variable, *place))
    }

    fn check_place(&self, variable: usize, place: usize) -> Result<()> {
        let count = self.distances.get(variable).map_or(0, Vec::len);
        match place < count {
            true => Ok(()),
            false => Err(Error::invalid(
                format!("place in coordinate {variable}"),
                place,
                format!("below {count}"),
            )),
        }
    }

    /// `k(x, x)`.
    pub(crate) fn total_variance(&self) -> f64 {
        self.variances.iter().sum()
    }

    /// `k_c` between a clique's `places` and the points from `first` on.
    pub(crate) fn against(
        &self,
        clique: usize,
        places: impl Iterator<Item = usize>,
        columns: &Columns,
        first: usize,
        out: &mut [f64],
    ) {
        out.fill(self.variances[clique]);
        for (variable, place) in self.cliques[clique].iter().zip(places) {
            let table = &self.correlations[*variable];
            let column = &columns[*variable][first..];
            for (value, other) in out.iter_mut().zip(column) {
                *value *= table[place.abs_diff(*other)];
            }
        }
    }

    /// `k_c` between point `of` and the points from `first` on.
    pub(crate) fn between(
        &self,
        clique: usize,
        of: usize,
        columns: &Columns,
        first: usize,
        out: &mut [f64],
    ) {
        let places = self.cliques[clique].iter().map(|i| columns[*i][of]);
        self.against(clique, places, columns, first, out);
    }

    /// `k` between point `of` and the points from `first` on.
    pub(crate) fn row(&self, of: usize, columns: &Columns, first: usize, out: &mut [f64]) {
        out.fill(0.0);
        let mut term = vec![0.0; out.len()];
        for clique in 0..self.cliques.len() {
            self.between(clique, of, columns, first, &mut term);
            for (sum, term) in out.iter_mut().zip(&term) {
                *sum += term;
            }
        }
    }

    /// The lower triangle of `K + noise I` over `points` points.
    pub(crate) fn gram(&self, columns: &Columns, points: usize, noise: f64) -> Mat<f64> {
        let mut gram = Mat::zeros(points, points);
        let mut buffer = vec![0.0; points];
        for column in 0..points {
            let values = &mut buffer[column..];
            self.row(column, columns, column, values);
            for (row, value) in (column..).zip(values.iter()) {
                gram[(row, column)] = *value;
            }
            gram[(column, column)] += noise;
        }
        gram
    }
}
