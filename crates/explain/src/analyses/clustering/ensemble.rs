//! Many systems from random starts, side by side.

use super::dynamics::{Dynamics, Scheme};
use super::particles::Particles;
use crate::{Error, Result};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

/// Most numbers that an ensemble may be asked to record.
const MOST_RECORDS: usize = 1 << 26;

/// What is run.
#[derive(Clone, Copy, Debug)]
pub struct Ensemble {
    /// Particles of a system.
    pub count: usize,
    /// Coordinates of a particle.
    pub dimension: usize,
    /// Independent systems.
    pub systems: usize,
    /// How long each runs.
    pub time: f64,
    /// Length of a step; shortened where the flow is fast ([`Dynamics::careful_step`]).
    pub step: f64,
    /// How steps are taken.
    pub scheme: Scheme,
    /// Particles with a larger inner product are one.
    pub threshold: f64,
    /// Seed of the starts; each system has a sequence of its own.
    pub seed: u64,
}

impl Default for Ensemble {
    /// 32 particles in 8 dimensions, 64 systems to time 30 in steps of 0.1.
    fn default() -> Self {
        Self {
            count: 32,
            dimension: 8,
            systems: 64,
            time: 30.0,
            step: 0.1,
            scheme: Scheme::Euler,
            threshold: 1.0 - 1e-3,
            seed: 0,
        }
    }
}

/// What was seen of one system, at `⌊time / step⌋ + 1` times from 0 on.
#[derive(Clone, Debug, PartialEq)]
pub struct Course {
    /// Share of ordered pairs that are closer than the threshold.
    pub close_pairs: Vec<f64>,
    /// Clusters at the end.
    pub clusters: usize,
}

/// The median over systems, at each time.
#[derive(Clone, Debug, PartialEq)]
pub struct Courses {
    /// The times.
    pub times: Vec<f64>,
    /// Median over systems of the share of close pairs.
    pub close_pairs: Vec<f64>,
    /// Median number of clusters at the end.
    pub clusters: f64,
}

impl Courses {
    /// The first time at which the median share of close pairs is at least `share`, interpolated
    /// between the times on both sides.
    pub fn reaches(&self, share: f64) -> Option<f64> {
        let index = self.close_pairs.iter().position(|value| *value >= share)?;
        let (after, time) = (*self.close_pairs.get(index)?, *self.times.get(index)?);
        let before = index
            .checked_sub(1)
            .and_then(|i| Some((self.close_pairs.get(i)?, self.times.get(i)?)));
        Some(match before {
            Some((value, earlier)) if after > *value => {
                earlier + (time - earlier) * (share - value) / (after - value)
            }
            _ => time,
        })
    }
}

impl Ensemble {
    fn steps(&self) -> Result<usize> {
        let steps = self.time / self.step;
        let fits = steps.is_finite() && steps >= 0.0 && self.step > 0.0;
        let most = MOST_RECORDS / self.systems.max(1);
        if !fits || steps > most as f64 || self.systems == 0 {
            return Err(Error::invalid(
                "time, step and systems",
                format!("{}, {} and {}", self.time, self.step, self.systems),
                format!("positive, with at most {MOST_RECORDS} steps of all systems together"),
            ));
        }
        Ok((steps + 1e-9) as usize)
    }

    /// The start of one of the systems.
    ///
    /// # Errors
    /// When there would be no particles, or too many.
    pub fn start(&self, system: usize) -> Result<Particles> {
        let mut generator = ChaCha8Rng::seed_from_u64(self.seed);
        generator.set_stream(system as u64);
        Particles::random(self.count, self.dimension, &mut generator)
    }

    /// How many smaller steps each step is taken in.
    fn within(&self, dynamics: &Dynamics, steps: usize) -> Result<usize> {
        let careful = dynamics.careful_step(self.step);
        let within = (self.step / careful).ceil().max(1.0);
        if within * steps as f64 > 1e8 {
            let expected = "slower: a smaller beta, or a shorter time";
            return Err(Error::invalid(
                "steps of the unnormalised flow",
                within * steps as f64,
                expected,
            ));
        }
        Ok(within as usize)
    }

    /// The first system at evenly spaced times, at most `most + 1` of them, the start among them.
    ///
    /// # Errors
    /// As [`Dynamics::step`].
    pub fn frames(&self, dynamics: &Dynamics, most: usize) -> Result<Vec<(f64, Particles)>> {
        let steps = self.steps()?;
        let within = self.within(dynamics, steps)?;
        let every = steps.div_ceil(most.max(1)).max(1);
        let mut frames = vec![(0.0, self.start(0)?)];
        for step in (every..=steps).step_by(every) {
            let Some((_, last)) = frames.last() else {
                break;
            };
            let smaller = self.step / within as f64;
            let next = dynamics.run(last.clone(), smaller, within * every, self.scheme)?;
            frames.push((step as f64 * self.step, next));
        }
        Ok(frames)
    }

    /// Runs one system.
    ///
    /// # Errors
    /// As [`Dynamics::step`].
    pub fn course(&self, dynamics: &Dynamics, system: usize) -> Result<Course> {
        let steps = self.steps()?;
        let within = self.within(dynamics, steps)?;
        let mut particles = self.start(system)?;
        let mut close_pairs = vec![particles.close_pairs(self.threshold)];
        for _ in 0..steps {
            // One cluster stays one: what attention writes is then the same for all.
            let done = close_pairs.last().is_some_and(|share| *share >= 1.0);
            if done && self.count > 1 {
                close_pairs.push(1.0);
                continue;
            }
            particles = dynamics.run(particles, self.step / within as f64, within, self.scheme)?;
            close_pairs.push(particles.close_pairs(self.threshold));
        }
        Ok(Course {
            close_pairs,
            clusters: particles.clusters(self.threshold),
        })
    }

    /// Runs every system, in parallel, and takes medians.
    ///
    /// # Errors
    /// As [`Ensemble::course`].
    pub fn run(&self, dynamics: &Dynamics) -> Result<Courses> {
        let steps = self.steps()?;
        let systems = (0..self.systems).into_par_iter();
        let courses = systems
            .map(|system| self.course(dynamics, system))
            .collect::<Result<Vec<_>>>()?;
        let at = |step: usize| {
            let values = courses.iter().filter_map(|c| c.close_pairs.get(step));
            median(values.copied().collect())
        };
        Ok(Courses {
            times: (0..=steps).map(|step| step as f64 * self.step).collect(),
            close_pairs: (0..=steps).map(at).collect(),
            clusters: median(
                courses
                    .iter()
                    .map(|course| course.clusters as f64)
                    .collect(),
            ),
        })
    }

    /// Runs the ensemble for each `β`: a phase diagram, one row for each.
    ///
    /// # Errors
    /// As [`Ensemble::run`].
    pub fn phases(
        &self,
        dynamics: impl Fn(f64) -> Result<Dynamics>,
        betas: &[f64],
    ) -> Result<Vec<Courses>> {
        betas
            .iter()
            .map(|beta| self.run(&dynamics(*beta)?))
            .collect()
    }
}

/// The median; of an even number, the mean of the two in the middle.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    let at = |index: usize| values.get(index).copied().unwrap_or(f64::NAN);
    match values.len() % 2 {
        1 => at(middle),
        _ => (at(middle.wrapping_sub(1)) + at(middle)) / 2.0,
    }
}
