//! One process over all variables together.

use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use crate::stepper::{Course, State};
use crate::{
    AdditiveProcess, Domain, Fit, History, Hyperparameters, Optimiser, Point, Result, Scale,
};

/// Choices of [`GlobalProcess`].
#[derive(Clone, Debug, PartialEq)]
pub struct GlobalSettings {
    /// Points that are drawn before the first process.
    pub initial: usize,
    /// Variance of the noise, where observations have variance 1.
    pub noise: f64,
    /// `w_t = exploration · ln 2t`.
    pub exploration: f64,
    /// First length-scale over `√d` and the width of a grid.
    pub length: f64,
    /// How length-scales are fitted.
    pub fit: Fit,
    /// Observations between two fits; the process grows by one point at a time between them.
    pub refit: usize,
    /// Random points that the search for the least bound starts from the best of.
    pub draws: usize,
    /// Times that it goes through all coordinates.
    pub sweeps: usize,
    /// Places of a coordinate that it tries each time.
    pub trials: usize,
}

impl Default for GlobalSettings {
    fn default() -> Self {
        Self {
            initial: 10,
            noise: 0.01,
            exploration: 0.5,
            length: 0.3,
            fit: Fit {
                steps: 16,
                amplitudes: (1e-3, 1e2),
                ..Fit::default()
            },
            refit: 5,
            draws: 200,
            sweeps: 2,
            trials: 16,
        }
    }
}

/// Bayesian optimisation with a process of one term, all variables in it. Its bound has no exact
/// minimum that could be found: it is sought coordinate by coordinate.
#[derive(Clone, Debug)]
pub struct GlobalProcess {
    settings: GlobalSettings,
    state: State,
    process: Option<AdditiveProcess>,
}

impl GlobalProcess {
    /// A search over a domain.
    ///
    /// # Errors
    /// When a setting is not one that can be used.
    pub fn new(domain: Domain, settings: GlobalSettings, seed: u64) -> Result<Self> {
        let dimensions = domain.dimensions();
        let root = (dimensions as f64).sqrt();
        let course = Course {
            initial: settings.initial,
            scale: Scale::Standardised,
            noise: settings.noise,
            exploration: settings.exploration,
            fit: settings.fit.clone(),
        };
        // √(Σ v²) = 1.
        let scales = Hyperparameters::new(dimensions, settings.length * root, 1.0 / root);
        Ok(Self {
            state: State::new(domain, course, scales, seed)?,
            settings,
            process: None,
        })
    }

    /// The process of everything observed, grown from the last one where nothing is fitted anew.
    fn updated(&mut self) -> Result<AdditiveProcess> {
        let history = &self.state.history;
        let since = history.len() - self.state.course.initial;
        let grown = self.process.take().zip(history.points.last());
        if let Some((process, last)) = grown
            && !since.is_multiple_of(self.settings.refit.max(1))
            && let Ok(grown) = process.grown(
                &self.state.domain,
                last,
                &history.scaled(self.state.course.scale),
            )
        {
            return Ok(grown);
        }
        let all = vec![(0..self.state.domain.dimensions()).collect()];
        self.state.fit(&all)?;
        self.state.process(all)
    }

    fn least(&self, process: &AdditiveProcess, generator: &mut ChaCha8Rng) -> Result<Point> {
        let weight = self.state.exploration();
        let domain = &self.state.domain;
        let best_of = |points: Vec<Point>| -> Result<Option<Point>> {
            let marginals = process.predict(&points)?;
            let bounds = marginals
                .iter()
                .map(|m| m.mean - weight * m.variance.sqrt());
            let pairs = points.into_iter().zip(bounds);
            let best = pairs.min_by(|a, b| a.1.total_cmp(&b.1));
            Ok(best.map(|(point, _)| point))
        };
        let mut points: Vec<Point> = (0..self.settings.draws)
            .map(|_| domain.random(generator))
            .collect();
        points.extend(self.state.history.best().map(|(point, _)| point.to_vec()));
        let mut here = best_of(points)?.unwrap_or_else(|| domain.random(generator));
        for _ in 0..self.settings.sweeps {
            for coordinate in 0..domain.dimensions() {
                let mut moved = vec![here.clone()];
                for _ in 0..self.settings.trials {
                    let mut point = here.clone();
                    point[coordinate] = generator.random_range(0..domain.places(coordinate));
                    moved.push(point);
                }
                here = best_of(moved)?.unwrap_or(here);
            }
        }
        Ok(here)
    }
}

impl Optimiser for GlobalProcess {
    fn suggest(&mut self) -> Result<Point> {
        if let Some(pending) = &self.state.pending {
            return Ok(pending.clone());
        }
        let mut generator = self.state.generator();
        let point = match self.state.first_points(&mut generator)? {
            Some(point) => point,
            None => {
                let process = self.updated()?;
                let point = self.least(&process, &mut generator)?;
                self.process = Some(process);
                self.state.unseen(point, &mut generator)
            }
        };
        self.state.pending = Some(point.clone());
        Ok(point)
    }

    fn observe(&mut self, point: Point, value: f64) -> Result<()> {
        // Only what was suggested from a process can be added to it.
        if self.state.pending.is_none() {
            self.process = None;
        }
        self.state.observe(point, value)
    }

    fn history(&self) -> &History {
        &self.state.history
    }
}
