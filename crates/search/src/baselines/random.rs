//! Points without a plan.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use crate::{Domain, Error, History, Optimiser, Point, Result};

/// Looks at random points, none twice.
#[derive(Clone, Debug)]
pub struct RandomSearch {
    domain: Domain,
    seed: u64,
    history: History,
}

impl RandomSearch {
    /// A search over a domain.
    pub fn new(domain: Domain, seed: u64) -> Self {
        Self {
            domain,
            seed,
            history: History::default(),
        }
    }
}

impl Optimiser for RandomSearch {
    fn suggest(&mut self) -> Result<Point> {
        if self.history.exhausts(&self.domain) {
            let points = self.domain.size();
            return Err(Error::Exhausted { points });
        }
        let mut generator = ChaCha8Rng::seed_from_u64(self.seed);
        generator.set_stream(self.history.len() as u64);
        loop {
            let point = self.domain.random(&mut generator);
            if !self.history.contains(&point) {
                return Ok(point);
            }
        }
    }

    fn observe(&mut self, point: Point, value: f64) -> Result<()> {
        self.history.push(&self.domain, point, value)
    }

    fn history(&self) -> &History {
        &self.history
    }
}
