//! A search in few random directions (REMBO: Wang, Hutter, Zoghi, Matheson, de Freitas 2016, arXiv
//! 1301.1942).

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use crate::gaussian::normal;
use crate::{Domain, Error, GlobalProcess, GlobalSettings, History, Optimiser, Point, Result};

/// Places in each direction.
const PLACES: usize = 150;

/// Bayesian optimisation of `f(clip(A z))` over `z` in `[−√k, √k]^k`, `A` a matrix of standard
/// normal numbers and the domain scaled to `[−1, 1]^d`.
#[derive(Clone, Debug)]
pub struct Rembo {
    domain: Domain,
    /// `[d, k]`.
    directions: Vec<Vec<f64>>,
    inner: GlobalProcess,
    below: Domain,
    history: History,
}

impl Rembo {
    /// A search in `directions` random directions of a domain.
    ///
    /// # Errors
    /// When there are none, or a setting is not one that can be used.
    pub fn new(
        domain: Domain,
        directions: usize,
        settings: GlobalSettings,
        seed: u64,
    ) -> Result<Self> {
        let half = (directions as f64).sqrt();
        let below = Domain::uniform(directions, -half, half, PLACES)?;
        let mut generator = ChaCha8Rng::seed_from_u64(seed);
        let mut row = || (0..directions).map(|_| normal(&mut generator)).collect();
        Ok(Self {
            directions: (0..domain.dimensions()).map(|_| row()).collect(),
            inner: GlobalProcess::new(below.clone(), settings, seed)?,
            domain,
            below,
            history: History::default(),
        })
    }

    /// The place of the domain that is nearest to `clip(A z)`.
    fn image(&self, z: &[f64]) -> Point {
        let rows = self.directions.iter().enumerate();
        rows.map(|(coordinate, row)| {
            let x: f64 = row.iter().zip(z).map(|(a, z)| a * z).sum();
            let last = self.domain.places(coordinate) - 1;
            ((x.clamp(-1.0, 1.0) + 1.0) * 0.5 * last as f64).round() as usize
        })
        .collect()
    }
}

impl Optimiser for Rembo {
    fn suggest(&mut self) -> Result<Point> {
        let below = self.inner.suggest()?;
        Ok(self.image(&self.below.values(&below)?))
    }

    /// Takes only what it suggested: of other points it knows no way down.
    fn observe(&mut self, point: Point, value: f64) -> Result<()> {
        let below = self.inner.suggest()?;
        if self.image(&self.below.values(&below)?) != point {
            return Err(Error::invalid(
                "observed point",
                format!("{point:?}"),
                "the one that was suggested",
            ));
        }
        self.inner.observe(below, value)?;
        self.history.push(&self.domain, point, value)
    }

    fn history(&self) -> &History {
        &self.history
    }
}
