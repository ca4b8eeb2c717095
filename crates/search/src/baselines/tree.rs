//! A decomposition that is learned, in the manner of Han, Arora, Scarlett 2021 (arXiv 2012.13088):
//! a forest that is mutated at random, by the likelihood of what was observed.

use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use crate::stepper::State;
use crate::{Domain, Forest, History, Optimiser, Point, RducbSettings, Result};

/// Choices of [`LearnedTree`].
#[derive(Clone, Debug, PartialEq)]
pub struct TreeSettings {
    /// Everything but the number of edges, which is learned.
    pub search: RducbSettings,
    /// Observations between two rounds of learning.
    pub every: usize,
    /// Mutations tried in a round, for each variable.
    pub mutations: usize,
}

impl Default for TreeSettings {
    fn default() -> Self {
        Self {
            search: RducbSettings::default(),
            every: 10,
            mutations: 4,
        }
    }
}

/// Bayesian optimisation over a forest that is sampled from its posterior.
///
/// A mutation takes a random pair of variables: an edge between them goes; where there is none, it
/// comes, in the place of a random one of those that it would close a circle with. It is accepted
/// by the rule of Metropolis, with every forest as likely as any other before anything is seen.
#[derive(Clone, Debug)]
pub struct LearnedTree {
    settings: TreeSettings,
    state: State,
    forest: Forest,
}

impl LearnedTree {
    /// A search over a domain.
    ///
    /// # Errors
    /// When a setting is not one that can be used.
    pub fn new(domain: Domain, settings: TreeSettings, seed: u64) -> Result<Self> {
        Ok(Self {
            forest: Forest::new(domain.dimensions(), Vec::new())?,
            state: settings.search.state(domain, seed)?,
            settings,
        })
    }

    /// The decomposition as it was last learned.
    pub fn forest(&self) -> &Forest {
        &self.forest
    }

    fn learn(&mut self, generator: &mut ChaCha8Rng) -> Result<()> {
        let dimensions = self.forest.dimensions();
        if dimensions < 2 {
            return Ok(());
        }
        let mut likelihood = self.likelihood(&self.forest)?;
        for _ in 0..self.settings.mutations * dimensions {
            let mutant = mutated(&self.forest, generator)?;
            let other = self.likelihood(&mutant)?;
            if generator.random::<f64>() < (other - likelihood).exp() {
                likelihood = other;
                self.forest = mutant;
            }
        }
        Ok(())
    }

    fn likelihood(&self, forest: &Forest) -> Result<f64> {
        Ok(self.state.process(forest.cliques())?.log_likelihood())
    }
}

fn mutated(forest: &Forest, generator: &mut ChaCha8Rng) -> Result<Forest> {
    let dimensions = forest.dimensions();
    let i = generator.random_range(0..dimensions);
    let j = (i + generator.random_range(1..dimensions)) % dimensions;
    let pair = (i.min(j), i.max(j));
    let mut edges = forest.edges().to_vec();
    if let Some(place) = edges.iter().position(|edge| *edge == pair) {
        edges.remove(place);
    } else {
        if let Some(circle) = forest.path(i, j) {
            edges.remove(circle[generator.random_range(0..circle.len())]);
        }
        edges.push(pair);
    }
    Forest::new(dimensions, edges)
}

impl Optimiser for LearnedTree {
    fn suggest(&mut self) -> Result<Point> {
        if let Some(pending) = &self.state.pending {
            return Ok(pending.clone());
        }
        let mut generator = self.state.generator();
        let point = match self.state.first_points(&mut generator)? {
            Some(point) => point,
            None => {
                let learned = self.state.history.len() - self.state.course.initial;
                if learned.is_multiple_of(self.settings.every.max(1)) {
                    self.learn(&mut generator)?;
                }
                let forest = self.forest.clone();
                let chunks = self.settings.search.chunks;
                self.state.step(&forest, chunks, &mut generator)?
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_strong_pair_is_learned() {
        let domain = Domain::uniform(4, -1.0, 1.0, 21).unwrap();
        let settings = TreeSettings {
            every: 1,
            search: RducbSettings {
                initial: 60,
                length: 0.5,
                ..RducbSettings::standardised(4)
            },
            ..TreeSettings::default()
        };
        let mut search = LearnedTree::new(domain.clone(), settings, 3).unwrap();
        for _ in 0..60 {
            let point = search.suggest().unwrap();
            let x = domain.values(&point).unwrap();
            search.observe(point, x[1] * x[3] + 0.2 * x[0]).unwrap();
        }
        search.suggest().unwrap();
        assert!(
            search.forest().edges().contains(&(1, 3)),
            "{:?}",
            search.forest()
        );
    }
}
