//! The language model that knows one word back, and text as a task.

use crate::{Error, Result};
use lapidary_train::Generator;
use lapidary_train::data::{Batch, Task};
use rand::RngExt;

/// Counts of pairs of tokens: `p(b|a) = (n(a, b) + α) / (n(a) + α V)`.
#[derive(Clone, Debug)]
pub struct Bigram {
    vocabulary: usize,
    /// `[vocabulary · vocabulary]`, row `a`.
    pairs: Vec<u64>,
    /// `[vocabulary]`.
    firsts: Vec<u64>,
}

/// `α`.
const SMOOTHING: f64 = 0.1;

impl Bigram {
    /// A model that has read nothing.
    pub fn new(vocabulary: usize) -> Self {
        Self {
            vocabulary,
            pairs: vec![0; vocabulary * vocabulary],
            firsts: vec![0; vocabulary],
        }
    }

    /// Counts the pairs of a text.
    pub fn read(&mut self, tokens: &[u32]) {
        for pair in tokens.windows(2) {
            if let [a, b] = *pair {
                self.count(a as usize, b as usize);
            }
        }
    }

    fn count(&mut self, a: usize, b: usize) {
        if b < self.vocabulary
            && let Some(first) = self.firsts.get_mut(a)
            && let Some(pair) = self.pairs.get_mut(a * self.vocabulary + b)
        {
            *first += 1;
            *pair += 1;
        }
    }

    /// `p(b|a)`.
    pub fn probability(&self, a: u32, b: u32) -> f64 {
        let at = a as usize * self.vocabulary + b as usize;
        let pair = self.pairs.get(at).copied().unwrap_or(0) as f64;
        let first = self.firsts.get(a as usize).copied().unwrap_or(0) as f64;
        (pair + SMOOTHING) / (first + SMOOTHING * self.vocabulary as f64)
    }

    /// Mean negative log-likelihood of a batch's targets, in nats.
    pub fn loss(&self, batch: &Batch) -> f64 {
        let each = batch.inputs.iter().zip(&batch.targets);
        super::mean(each.map(|(a, b)| -self.probability(*a, *b).ln()))
    }
}

/// Windows at random places of a text.
#[derive(Clone, Debug)]
pub struct TextTask {
    tokens: Vec<u32>,
    vocabulary: usize,
}

impl TextTask {
    /// A task over `tokens`, which must be longer than any window that is asked for.
    pub fn new(tokens: Vec<u32>, vocabulary: usize) -> Self {
        Self { tokens, vocabulary }
    }
}

/// A text's bytes, the last tenth apart.
pub fn bytes_split(path: &std::path::Path) -> Result<(Vec<u32>, Vec<u32>)> {
    let text = std::fs::read(path).map_err(|error| {
        Error::Experiment(format!("{} cannot be read: {error}", path.display()))
    })?;
    let mut tokens: Vec<u32> = text.into_iter().map(u32::from).collect();
    let held_out = tokens.split_off(tokens.len() - tokens.len() / 10);
    Ok((tokens, held_out))
}

impl Task for TextTask {
    fn vocabulary(&self) -> usize {
        self.vocabulary
    }

    fn batch(
        &mut self,
        generator: &mut Generator,
        rows: usize,
        length: usize,
    ) -> lapidary_train::Result<Batch> {
        let Some(places) = self
            .tokens
            .len()
            .checked_sub(length)
            .filter(|places| *places > 0)
        else {
            return Err(lapidary_train::Error::TooShort {
                what: "the text".to_owned(),
                found: self.tokens.len() as u64,
                needed: length as u64 + 1,
            });
        };
        let mut batch = Batch::with_capacity(rows, length);
        for _ in 0..rows {
            let start = generator.random_range(0..places);
            let window = self.tokens.iter().skip(start);
            batch.inputs.extend(window.clone().take(length));
            batch.targets.extend(window.skip(1).take(length));
            batch.rows += 1;
        }
        Ok(batch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_are_smoothed_counts_and_sum_to_one() {
        let mut bigram = Bigram::new(3);
        bigram.read(&[0, 1, 0, 1, 0, 2]);
        // After 0: 1 twice, 2 once.
        assert!((bigram.probability(0, 1) - 2.1 / 3.3).abs() < 1e-12);
        assert!((bigram.probability(0, 2) - 1.1 / 3.3).abs() < 1e-12);
        // Token 2 was never first: uniform.
        assert!((bigram.probability(2, 0) - 1.0 / 3.0).abs() < 1e-12);
        for a in 0..3 {
            let sum: f64 = (0..3).map(|b| bigram.probability(a, b)).sum();
            assert!((sum - 1.0).abs() < 1e-12);
        }
    }

    #[test]
    fn the_loss_is_the_mean_over_the_targets() {
        let mut bigram = Bigram::new(2);
        bigram.read(&[0, 1, 0, 1]);
        let batch = Batch {
            rows: 1,
            length: 2,
            inputs: vec![0, 1],
            targets: vec![1, 1],
        };
        let expected = -((2.1f64 / 2.2).ln() + (0.1f64 / 1.2).ln()) / 2.0;
        assert!((bigram.loss(&batch) - expected).abs() < 1e-12);
    }

    #[test]
    fn windows_are_pieces_of_the_text_and_targets_come_next() {
        let mut task = TextTask::new((0..20).collect(), 20);
        let batch = task.batch(&mut lapidary_train::generator(1), 8, 5).unwrap();
        assert_eq!((batch.rows, batch.inputs.len()), (8, 40));
        assert!(
            batch
                .inputs
                .iter()
                .zip(&batch.targets)
                .all(|(a, b)| a + 1 == *b)
        );
        assert!(
            task.batch(&mut lapidary_train::generator(1), 1, 20)
                .is_err()
        );
    }
}
