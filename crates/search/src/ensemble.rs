//! A random forest in the place of the kernel of another search, in the manner of HEBO (Cowen-Rivers et
//! al. 2020, arXiv 2012.03826).
//!
//! Values and places are bent so that a stationary process suits them, and three acquisitions are made good at
//! once: the lower confidence bound, the expected improvement and the probability of improvement. The next
//! point is a random one of those than which none is better in all three.

use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use crate::acquisition::lower_confidence_bound;
use crate::stepper::State;
use crate::warp::{InputWarp, SHAPES};
use crate::{
    AdditiveProcess, Domain, Fit, Forest, History, Hyperparameters, Marginal, Optimiser, Point,
    RducbSettings, Result, Scale, fitted, zoom,
};

/// Which variables go together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decomposition {
    /// A fresh random forest at each step.
    RandomForest,
    /// All of them.
    Whole,
}

/// Choices of [`Ensemble`].
#[derive(Clone, Debug, PartialEq)]
pub struct EnsembleSettings {
    /// The process, the number of edges and the exploration.
    pub search: RducbSettings,
    /// Which variables go together.
    pub decomposition: Decomposition,
    /// Variables of which other shapes are tried at each step, by the likelihood.
    pub warped: usize,
    /// Random points among those that the next one is chosen from.
    pub draws: usize,
    /// Copies with one other place, of each promising point, among them.
    pub neighbours: usize,
}

impl EnsembleSettings {
    /// For a number of variables.
    pub fn new(dimensions: usize, decomposition: Decomposition) -> Self {
        let standardised = RducbSettings::standardised(dimensions);
        let root = (dimensions.max(1) as f64).sqrt();
        let search = match decomposition {
            Decomposition::RandomForest => standardised,
            Decomposition::Whole => RducbSettings {
                length: 0.3 * root,
                amplitude: 1.0 / root,
                fit: Fit {
                    amplitudes: (1e-3, 1e2),
                    ..standardised.fit.clone()
                },
                ..standardised
            },
        };
        Self {
            search: RducbSettings {
                scale: Scale::Warped,
                ..search
            },
            decomposition,
            warped: 2,
            draws: 100,
            neighbours: 20,
        }
    }
}

/// Bayesian optimisation by several acquisitions over bent values and places.
#[derive(Clone, Debug)]
pub struct Ensemble {
    settings: EnsembleSettings,
    state: State,
    warp: InputWarp,
}

impl Ensemble {
    /// A search over a domain.
    ///
    /// # Errors
    /// When a setting is not one that can be used.
    pub fn new(domain: Domain, settings: EnsembleSettings, seed: u64) -> Result<Self> {
        Ok(Self {
            warp: InputWarp::identity(&domain),
            state: settings.search.state(domain, seed)?,
            settings,
        })
    }

    fn forest(&self, generator: &mut ChaCha8Rng) -> Result<Option<Forest>> {
        let dimensions = self.state.domain.dimensions();
        match self.settings.decomposition {
            Decomposition::Whole => Ok(None),
            Decomposition::RandomForest => {
                let edges = self.settings.search.edge_count(dimensions);
                Ok(Some(Forest::random(dimensions, edges, generator)?))
            }
        }
    }

    /// The process of what was observed, seen through a warp.
    fn process(
        &self,
        warp: &InputWarp,
        cliques: &[Vec<usize>],
        scales: &Hyperparameters,
        values: &[f64],
    ) -> Result<AdditiveProcess> {
        let points = warp.points(&self.state.history.points);
        let noise = self.state.course.noise;
        let domain = &self.state.domain;
        AdditiveProcess::new(domain, cliques.to_vec(), scales, noise, &points, values)
    }

    /// Fits hyper-parameters, and the shape of a few variables, to what was observed.
    fn fit(
        &mut self,
        cliques: &[Vec<usize>],
        values: &[f64],
        generator: &mut ChaCha8Rng,
    ) -> Result<AdditiveProcess> {
        let state = &self.state;
        let scales = fitted(
            &state.domain,
            cliques,
            &state.hyperparameters,
            state.course.noise,
            &self.warp.points(&state.history.points),
            values,
            &state.course.fit,
        )?;
        let mut best = self.process(&self.warp, cliques, &scales, values)?;
        let mut warp = self.warp.clone();
        for _ in 0..self.settings.warped {
            let variable = generator.random_range(0..state.domain.dimensions());
            for shape in SHAPES {
                let other = warp.with(variable, shape);
                let process = self.process(&other, cliques, &scales, values)?;
                if process.log_likelihood() > best.log_likelihood() {
                    (warp, best) = (other, process);
                }
            }
        }
        self.state.hyperparameters = scales;
        self.warp = warp;
        Ok(best)
    }

    /// Points that may be next and were not observed.
    fn pool(
        &self,
        process: &AdditiveProcess,
        forest: Option<&Forest>,
        generator: &mut ChaCha8Rng,
    ) -> Result<Vec<Point>> {
        let domain = &self.state.domain;
        let weight = self.state.exploration();
        let mut promising: Vec<Point> = Vec::new();
        promising.extend(self.state.history.best().map(|(point, _)| point.to_vec()));
        if let Some(forest) = forest {
            for weight in [0.0, weight, 2.0 * weight] {
                let chunks = self.settings.search.chunks;
                let (point, _) = zoom(domain, forest, chunks, generator, |candidates| {
                    let seen = self.warp.candidates(candidates);
                    lower_confidence_bound(process, forest, &seen, weight)
                })?;
                promising.push(point);
            }
        } else if let Some(start) = promising.first().cloned() {
            promising.push(self.descended(process, start, weight, generator)?);
        }
        let mut pool: Vec<Point> = Vec::new();
        for point in promising {
            for _ in 0..self.settings.neighbours {
                pool.push(self.neighbour(&point, generator));
            }
            pool.push(point);
        }
        pool.extend((0..self.settings.draws).map(|_| domain.random(generator)));
        pool.sort();
        pool.dedup();
        pool.retain(|point| !self.state.history.contains(point));
        Ok(pool)
    }

    /// A point of a low bound, coordinate by coordinate: where the bound has no exact minimum that could be
    /// found.
    fn descended(
        &self,
        process: &AdditiveProcess,
        mut here: Point,
        weight: f64,
        generator: &mut ChaCha8Rng,
    ) -> Result<Point> {
        for coordinate in 0..self.state.domain.dimensions() {
            let mut moved = vec![here.clone()];
            for _ in 0..self.settings.neighbours {
                let mut point = here.clone();
                point[coordinate] = generator.random_range(0..self.state.domain.places(coordinate));
                moved.push(point);
            }
            let found = process.predict(&self.warp.points(&moved))?;
            let bounds = found.iter().map(|m| m.mean - weight * m.variance.sqrt());
            let best = moved
                .into_iter()
                .zip(bounds)
                .min_by(|a, b| a.1.total_cmp(&b.1));
            if let Some((point, _)) = best {
                here = point;
            }
        }
        Ok(here)
    }

    /// The point with one coordinate at another place.
    fn neighbour(&self, point: &Point, generator: &mut ChaCha8Rng) -> Point {
        let mut moved = point.clone();
        let coordinate = generator.random_range(0..moved.len());
        moved[coordinate] = generator.random_range(0..self.state.domain.places(coordinate));
        moved
    }
}

impl Optimiser for Ensemble {
    fn suggest(&mut self) -> Result<Point> {
        if let Some(pending) = &self.state.pending {
            return Ok(pending.clone());
        }
        let mut generator = self.state.generator();
        let point = match self.state.first_points(&mut generator)? {
            Some(point) => point,
            None => {
                let forest = self.forest(&mut generator)?;
                let all = || vec![(0..self.state.domain.dimensions()).collect()];
                let cliques = forest.as_ref().map_or_else(all, Forest::cliques);
                let values = self.state.history.scaled(self.state.course.scale);
                let process = self.fit(&cliques, &values, &mut generator)?;
                let mut pool = self.pool(&process, forest.as_ref(), &mut generator)?;
                let least = values.iter().copied().fold(f64::INFINITY, f64::min);
                let weight = self.state.exploration();
                let scores: Vec<[f64; 3]> = process
                    .predict(&self.warp.points(&pool))?
                    .iter()
                    .map(|marginal| acquisitions(marginal, least, weight))
                    .collect();
                let front = front(&scores);
                match front.is_empty() {
                    true => {
                        let random = self.state.domain.random(&mut generator);
                        self.state.unseen(random, &mut generator)
                    }
                    false => pool.swap_remove(front[generator.random_range(0..front.len())]),
                }
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

/// The lower confidence bound, and the negatives of the expected improvement on `least` and of its
/// probability: the lower the better.
///
/// ```text
/// μ − w s        s (z Φ(z) + φ(z))        Φ(z)        z = (least − μ) / s
/// ```
fn acquisitions(marginal: &Marginal, least: f64, weight: f64) -> [f64; 3] {
    let deviation = marginal.variance.sqrt();
    let normal = Normal::at((least - marginal.mean) / deviation);
    [
        marginal.mean - weight * deviation,
        -deviation * normal.excess,
        -normal.below,
    ]
}

/// The standard normal distribution at `z`.
struct Normal {
    /// `Φ(z)`.
    below: f64,
    /// `∫ max(z − x, 0) φ(x) dx = z Φ(z) + φ(z)`.
    excess: f64,
}

/// From here on outwards the series would leave nothing of the tail but rounding.
const TAIL: f64 = 3.0;
/// Levels of the continued fraction, of which there is nothing left to see in the tail.
const LEVELS: u32 = 60;

impl Normal {
    fn at(z: f64) -> Self {
        let density = density(z);
        if z < -TAIL {
            let (below, excess) = tail(-z);
            return Self {
                below: density * below,
                excess: density * excess,
            };
        }
        if z > TAIL {
            let (above, excess) = tail(z);
            return Self {
                below: 1.0 - density * above,
                excess: z + density * excess,
            };
        }
        // Φ(z) = ½ + φ(z) (z + z³/3 + z⁵/(3·5) + …)
        let (mut term, mut sum, mut odd) = (z, z, 1.0);
        while term.abs() > 1e-17 * sum.abs() {
            odd += 2.0;
            term *= z * z / odd;
            sum += term;
        }
        let below = 0.5 + density * sum;
        Self {
            below,
            excess: z * below + density,
        }
    }
}

/// `φ(z)`.
fn density(z: f64) -> f64 {
    (-0.5 * z * z).exp() / std::f64::consts::TAU.sqrt()
}

/// `Φ(−x) / φ(x)` and `(φ(x) − x Φ(−x)) / φ(x)` for `x` in the tail, by the continued fraction of Laplace
///
/// ```text
/// Φ(−x) / φ(x) = 1 / (x + r)        r = 1 / (x + 2 / (x + 3 / (x + …)))
/// ```
///
/// so that the second, `r / (x + r)`, is no difference of numbers that are nearly equal.
fn tail(x: f64) -> (f64, f64) {
    let rest = (1..=LEVELS)
        .rev()
        .fold(0.0, |below, level| f64::from(level) / (x + below));
    (1.0 / (x + rest), rest / (x + rest))
}

/// Those than which no other is as low in all and lower in one.
fn front(scores: &[[f64; 3]]) -> Vec<usize> {
    let dominates = |a: &[f64; 3], b: &[f64; 3]| {
        let pairs = || a.iter().zip(b);
        pairs().all(|(a, b)| a <= b) && pairs().any(|(a, b)| a < b)
    };
    let all = scores.iter().enumerate();
    let best = all.filter(|(_, score)| !scores.iter().any(|other| dominates(other, score)));
    best.map(|(index, _)| index).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_normal_distribution_is_the_tabulated_one() {
        for (z, expected) in [
            (0.0, 0.5),
            (1.0, 0.841_344_746_068_542_9),
            (-1.96, 0.024_997_895_148_220_435),
            (2.0, 0.977_249_868_051_820_8),
            (-3.0, 0.001_349_898_031_630_094_6),
        ] {
            assert!((Normal::at(z).below - expected).abs() < 1e-14, "{z}");
        }
        // Far out what counts is the share of a small number.
        for (z, expected) in [
            (-5.0, 2.866_515_718_791_939e-7),
            (-10.0, 7.619_853_024_160_527e-24),
        ] {
            let found = Normal::at(z).below;
            assert!((found / expected - 1.0).abs() < 1e-12, "{z}: {found:e}");
        }
        assert_eq!(Normal::at(9.0).below, 1.0);
    }

    /// A larger `z` promises more, through the change from the series to the tail and beyond it.
    #[test]
    fn what_is_promised_rises_all_the_way() {
        let all: Vec<Normal> = (-3000..=1200)
            .map(|i| Normal::at(f64::from(i) / 100.0))
            .collect();
        for pair in all.windows(2) {
            assert!(pair[0].excess < pair[1].excess && pair[0].excess > 0.0);
            assert!(pair[0].below <= pair[1].below && pair[0].below > 0.0);
        }
        // The slope of one is the other.
        for z in [-12.0, -7.5, -3.2, -1.0, 0.4, 3.3] {
            let step = 1e-4;
            let rise = Normal::at(z + step).excess - Normal::at(z - step).excess;
            let below = Normal::at(z).below;
            assert!((rise / (2.0 * step) / below - 1.0).abs() < 1e-5, "{z}");
        }
    }

    #[test]
    fn the_expected_improvement_is_its_integral() {
        let marginal = Marginal {
            mean: 0.4,
            variance: 0.49,
        };
        let least = 0.1;
        let found = acquisitions(&marginal, least, 2.0);
        // ∫ max(least − y, 0) p(y) dy by the midpoint rule.
        let (step, mut integral, mut below) = (1e-4, 0.0, 0.0);
        for i in 0..80_000 {
            let y = least - (f64::from(i) + 0.5) * step;
            let density = density((y - 0.4) / 0.7) / 0.7;
            integral += step * (least - y) * density;
            below += step * density;
        }
        assert!((found[0] - (0.4 - 1.4)).abs() < 1e-12);
        assert!((found[1] + integral).abs() < 1e-7, "{found:?} {integral}");
        assert!((found[2] + below).abs() < 1e-7, "{found:?} {below}");
    }

    #[test]
    fn the_front_has_what_nothing_beats() {
        let scores = [
            [0.0, 5.0, 5.0],
            [1.0, 1.0, 1.0],
            [1.0, 1.0, 2.0],
            [2.0, 0.0, 3.0],
            [1.0, 1.0, 1.0],
            [3.0, 3.0, 3.0],
        ];
        assert_eq!(front(&scores), [0, 1, 3, 4]);
        assert!(front(&[]).is_empty());
    }
}
