//! What every search is from outside, and what those over additive processes share.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::acquisition::lower_confidence_bound;
use crate::{
    AdditiveProcess, Domain, Error, Fit, Forest, History, Hyperparameters, Point, Result, Scale,
    fitted, zoom,
};

/// A search that is asked where to look and told what was there.
pub trait Optimiser {
    /// Where to look next: the same until something is observed.
    ///
    /// # Errors
    /// When every point was observed, or the observations allow no process.
    fn suggest(&mut self) -> Result<Point>;

    /// What was seen at a point, which need not be the one that was suggested.
    ///
    /// # Errors
    /// When the point is not of the domain or the value not finite.
    fn observe(&mut self, point: Point, value: f64) -> Result<()>;

    /// What was observed.
    fn history(&self) -> &History;
}

/// Choices of every search over a process.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Course {
    /// Points that are drawn before the first process.
    pub(crate) initial: usize,
    /// How observations are seen.
    pub(crate) scale: Scale,
    /// Variance of the noise.
    pub(crate) noise: f64,
    /// `w_t = exploration · ln 2t`.
    pub(crate) exploration: f64,
    /// How hyper-parameters are fitted.
    pub(crate) fit: Fit,
}

/// What a search over a process knows. All of it is data: what is random is a function of the
/// seed and the number of observations, so that a search goes on from its state as if it had
/// never stopped.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct State {
    pub(crate) domain: Domain,
    pub(crate) course: Course,
    pub(crate) seed: u64,
    /// Points to look at first.
    pub(crate) starts: Vec<Point>,
    pub(crate) history: History,
    pub(crate) hyperparameters: Hyperparameters,
    /// What was suggested and not observed.
    pub(crate) pending: Option<Point>,
}

impl State {
    pub(crate) fn new(
        domain: Domain,
        course: Course,
        hyperparameters: Hyperparameters,
        seed: u64,
    ) -> Result<Self> {
        let state = Self {
            domain,
            course,
            seed,
            starts: Vec::new(),
            history: History::default(),
            hyperparameters,
            pending: None,
        };
        state.check()?;
        Ok(state)
    }

    /// Refuses what a file may hold and a search cannot go on from.
    pub(crate) fn check(&self) -> Result<()> {
        let course = &self.course;
        if course.initial == 0 {
            return Err(Error::invalid("number of initial points", 0, "at least 1"));
        }
        for (what, value) in [("noise", course.noise), ("exploration", course.exploration)] {
            if !(value >= 0.0 && value.is_finite()) {
                return Err(Error::invalid(what, value, "at least 0"));
            }
        }
        course.fit.check()?;
        self.hyperparameters.check(self.domain.dimensions())?;
        self.history.check(&self.domain)?;
        let points = self.starts.iter().chain(&self.pending);
        for point in points {
            self.domain.check(point)?;
        }
        Ok(())
    }

    /// What is random at this step.
    pub(crate) fn generator(&self) -> ChaCha8Rng {
        let mut generator = ChaCha8Rng::seed_from_u64(self.seed);
        generator.set_stream(self.history.len() as u64);
        generator
    }

    /// The next point that needs no process.
    pub(crate) fn first_points(&self, generator: &mut ChaCha8Rng) -> Result<Option<Point>> {
        let step = self.history.len();
        if self.history.exhausts(&self.domain) {
            return Err(Error::Exhausted {
                points: self.domain.size(),
            });
        }
        if let Some(start) = self.starts.get(step) {
            return Ok(Some(start.clone()));
        }
        if step >= self.course.initial {
            return Ok(None);
        }
        let random = self.domain.random(generator);
        Ok(Some(self.unseen(random, generator)))
    }

    /// The weight of what is not known.
    pub(crate) fn exploration(&self) -> f64 {
        self.course.exploration * (2.0 * self.history.len().max(1) as f64).ln()
    }

    /// Fits hyper-parameters to these cliques, from those before.
    pub(crate) fn fit(&mut self, cliques: &[Vec<usize>]) -> Result<()> {
        self.hyperparameters = fitted(
            &self.domain,
            cliques,
            &self.hyperparameters,
            self.course.noise,
            &self.history.points,
            &self.history.scaled(self.course.scale),
            &self.course.fit,
        )?;
        Ok(())
    }

    pub(crate) fn process(&self, cliques: Vec<Vec<usize>>) -> Result<AdditiveProcess> {
        AdditiveProcess::new(
            &self.domain,
            cliques,
            &self.hyperparameters,
            self.course.noise,
            &self.history.points,
            &self.history.scaled(self.course.scale),
        )
    }

    /// The point of the least bound on a forest that was not observed.
    pub(crate) fn step(
        &mut self,
        forest: &Forest,
        chunks: usize,
        generator: &mut ChaCha8Rng,
    ) -> Result<Point> {
        self.fit(&forest.cliques())?;
        let process = self.process(forest.cliques())?;
        let weight = self.exploration();
        let (point, _) = zoom(&self.domain, forest, chunks, generator, |candidates| {
            lower_confidence_bound(&process, forest, candidates, weight)
        })?;
        Ok(self.unseen(point, generator))
    }

    /// Moves a point that was observed until it is one that was not. There has to be one.
    pub(crate) fn unseen(&self, mut point: Point, generator: &mut ChaCha8Rng) -> Point {
        while self.history.contains(&point) {
            self.domain.perturb(&mut point, generator);
        }
        point
    }

    pub(crate) fn observe(&mut self, point: Point, value: f64) -> Result<()> {
        self.history.push(&self.domain, point, value)?;
        self.pending = None;
        Ok(())
    }
}
