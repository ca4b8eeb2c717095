//! The search over random decompositions.

use serde::{Deserialize, Serialize};

use crate::stepper::{Course, State};
use crate::{
    Domain, Error, Fit, Forest, History, Hyperparameters, Optimiser, Point, Result, Scale,
};

/// Choices of [`Rducb`]; those of the published code by default.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RducbSettings {
    /// Points that are drawn before the first process.
    pub initial: usize,
    /// Edges of a forest over the number of variables: below 1.
    pub edges: f64,
    /// How observations are seen.
    pub scale: Scale,
    /// Variance of the noise, in this scale.
    pub noise: f64,
    /// `w_t = exploration · ln 2t`.
    pub exploration: f64,
    /// Stretches that a grid is cut into at a time.
    pub chunks: usize,
    /// First length-scale of every variable, over the width of its grid.
    pub length: f64,
    /// First amplitude of every variable.
    pub amplitude: f64,
    /// How both are fitted at each step.
    pub fit: Fit,
}

impl Default for RducbSettings {
    fn default() -> Self {
        Self {
            initial: 10,
            edges: 0.2,
            scale: Scale::AsGiven,
            noise: 0.1,
            exploration: 0.5,
            chunks: 4,
            length: 0.1,
            amplitude: 0.5,
            fit: Fit::default(),
        }
    }
}

impl RducbSettings {
    /// For values of which only differences count: standardised, with amplitudes that together make
    /// a variance of about 1 over `dimensions` variables, and bounds that reach less far.
    pub fn standardised(dimensions: usize) -> Self {
        let defaults = Self::default();
        Self {
            scale: Scale::Standardised,
            exploration: 0.1,
            noise: 0.01,
            amplitude: 1.0 / dimensions.max(1) as f64,
            fit: Fit {
                amplitudes: (1e-4, 1e2),
                ..defaults.fit
            },
            ..defaults
        }
    }

    /// Edges of a forest over so many variables.
    pub(crate) fn edge_count(&self, dimensions: usize) -> usize {
        edge_count(self.edges, dimensions)
    }

    pub(crate) fn state(&self, domain: Domain, seed: u64) -> Result<State> {
        let dimensions = domain.dimensions();
        let course = Course {
            initial: self.initial,
            scale: self.scale,
            noise: self.noise,
            exploration: self.exploration,
            fit: self.fit.clone(),
        };
        let scales = Hyperparameters::new(dimensions, self.length, self.amplitude);
        State::new(domain, course, scales, seed)
    }
}

/// `max(1, ⌊edges · d⌋)`, none of a single variable.
fn edge_count(edges: f64, dimensions: usize) -> usize {
    let edges = (edges * dimensions as f64).floor() as usize;
    edges.max(1).min(dimensions.saturating_sub(1))
}

/// Bayesian optimisation with a new random forest at each step.
///
/// Its state is plain data: written down and read again, it suggests what it would have
/// suggested.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Stored", into = "Stored")]
pub struct Rducb {
    edges: f64,
    chunks: usize,
    state: State,
}

/// A search in a file, which may hold anything.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    edges: f64,
    chunks: usize,
    state: State,
}

impl From<Rducb> for Stored {
    fn from(search: Rducb) -> Self {
        Self {
            edges: search.edges,
            chunks: search.chunks,
            state: search.state,
        }
    }
}

impl TryFrom<Stored> for Rducb {
    type Error = Error;

    fn try_from(stored: Stored) -> Result<Self> {
        Self::checked(stored.edges, stored.chunks, stored.state)
    }
}

impl Rducb {
    /// A search over a domain.
    ///
    /// # Errors
    /// When a setting is not one that can be used.
    pub fn new(domain: Domain, settings: RducbSettings, seed: u64) -> Result<Self> {
        let state = settings.state(domain, seed)?;
        Self::checked(settings.edges, settings.chunks, state)
    }

    fn checked(edges: f64, chunks: usize, state: State) -> Result<Self> {
        if !(0.0..1.0).contains(&edges) {
            return Err(Error::invalid("edges", edges, "at least 0 and below 1"));
        }
        if chunks < 2 {
            return Err(Error::invalid("number of chunks", chunks, "at least 2"));
        }
        state.check()?;
        Ok(Self {
            edges,
            chunks,
            state,
        })
    }

    /// The same, looking at these points first; they count as initial ones.
    ///
    /// # Errors
    /// When a point is not of the domain.
    pub fn starting_at(mut self, points: Vec<Point>) -> Result<Self> {
        self.state.starts = points;
        self.state.check()?;
        Ok(self)
    }

    /// Where it looks.
    pub fn domain(&self) -> &Domain {
        &self.state.domain
    }

    /// Length-scales and amplitudes as they were last fitted.
    pub fn hyperparameters(&self) -> &Hyperparameters {
        &self.state.hyperparameters
    }
}

impl Optimiser for Rducb {
    fn suggest(&mut self) -> Result<Point> {
        if let Some(pending) = &self.state.pending {
            return Ok(pending.clone());
        }
        let mut generator = self.state.generator();
        let point = match self.state.first_points(&mut generator)? {
            Some(point) => point,
            None => {
                let dimensions = self.state.domain.dimensions();
                let edges = edge_count(self.edges, dimensions);
                let forest = Forest::random(dimensions, edges, &mut generator)?;
                self.state.step(&forest, self.chunks, &mut generator)?
            }
        };
        self.state.pending = Some(point.clone());
        Ok(point)
    }

    fn observe(&mut self, point: Point, value: f64) -> Result<()> {
        self.state.observe(point, value)
    }

    fn history(&self) -> &History {
        &self.state.history
    }
}
