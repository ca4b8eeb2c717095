//! Choosing the next token from logits.
//!
//! Each processor is a pure function on a slice of logits, one per token of the vocabulary; a
//! token that is ruled out gets minus infinity. They mean what they mean in `transformers`, and
//! [`Sampler`] applies them in its order: repetition penalty, temperature, top-k, top-p.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::GenerationError;

/// How the next token is chosen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SamplingOptions {
    /// Divides the logits; 0 takes the most probable token and draws nothing.
    pub temperature: f32,
    /// Keep only so many of the most probable tokens.
    pub top_k: Option<usize>,
    /// Keep only the most probable tokens that together have this probability.
    pub top_p: Option<f32>,
    /// Makes tokens that occurred already less probable when above 1.
    pub repetition_penalty: f32,
    /// Seed of the draws.
    pub seed: u64,
}

impl Default for SamplingOptions {
    /// Draws from the model's own distribution, with seed 0.
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: None,
            top_p: None,
            repetition_penalty: 1.0,
            seed: 0,
        }
    }
}

impl SamplingOptions {
    /// Always the most probable token.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            ..Self::default()
        }
    }

    /// Checks each option's range.
    pub fn check(&self) -> Result<(), GenerationError> {
        let check = |valid: bool, option, found: String, expected| match valid {
            true => Ok(()),
            false => Err(GenerationError::Option {
                option,
                found,
                expected,
            }),
        };
        let Self {
            temperature,
            repetition_penalty,
            ..
        } = *self;
        check(
            temperature >= 0.0 && temperature.is_finite(),
            "temperature",
            temperature.to_string(),
            "0 (greedy) or a positive number",
        )?;
        check(
            repetition_penalty > 0.0 && repetition_penalty.is_finite(),
            "repetition_penalty",
            repetition_penalty.to_string(),
            "a positive number",
        )?;
        check(
            self.top_k != Some(0),
            "top_k",
            "0".to_string(),
            "at least 1",
        )?;
        let top_p = self.top_p.unwrap_or(1.0);
        check(
            top_p > 0.0 && top_p <= 1.0,
            "top_p",
            top_p.to_string(),
            "above 0 and at most 1",
        )
    }
}

/// Draws tokens by [`SamplingOptions`]. The same seed and logits give the same tokens.
///
/// ```
/// use lapidary_model::generation::{Sampler, SamplingOptions};
///
/// let mut sampler = Sampler::new(SamplingOptions::greedy())?;
/// assert_eq!(sampler.next(&[0.1, 2.0, -1.0], &[])?, 1);
/// # Ok::<(), lapidary_model::generation::GenerationError>(())
/// ```
#[derive(Clone, Debug)]
pub struct Sampler {
    options: SamplingOptions,
    generator: ChaCha8Rng,
}

impl Sampler {
    /// A sampler at the start of its seed's stream.
    pub fn new(options: SamplingOptions) -> Result<Self, GenerationError> {
        Self::for_sequence(options, 0)
    }

    /// The sampler of one sequence of a batch. Each draws from a stream of its own, so that a
    /// sequence comes out the same alone and among others.
    pub fn for_sequence(options: SamplingOptions, sequence: u64) -> Result<Self, GenerationError> {
        options.check()?;
        let mut generator = ChaCha8Rng::seed_from_u64(options.seed);
        generator.set_stream(sequence);
        Ok(Self { options, generator })
    }

    /// The options.
    pub fn options(&self) -> &SamplingOptions {
        &self.options
    }

    /// The next token: `logits` has one entry per token of the vocabulary, `history` the tokens
    /// so far, the prompt included.
    ///
    /// # Errors
    /// When a logit is NaN or plus infinity, or when none is finite.
    pub fn next(&mut self, logits: &[f32], history: &[u32]) -> Result<u32, GenerationError> {
        check_logits(logits)?;
        let options = &self.options;
        let mut logits = logits.to_vec();
        apply_repetition_penalty(&mut logits, history, options.repetition_penalty);
        if options.temperature == 0.0 {
            return Ok(most_probable(&logits));
        }
        apply_temperature(&mut logits, options.temperature);
        if let Some(count) = options.top_k {
            keep_top_k(&mut logits, count);
        }
        if let Some(probability) = options.top_p {
            keep_top_p(&mut logits, probability);
        }
        Ok(draw(&logits, self.generator.random()))
    }
}

fn check_logits(logits: &[f32]) -> Result<(), GenerationError> {
    let nan = logits.iter().filter(|logit| logit.is_nan()).count();
    let infinite = logits.iter().filter(|logit| logit.is_infinite()).count();
    let is_usable = nan == 0 && infinite < logits.len() && !logits.contains(&f32::INFINITY);
    match is_usable {
        true => Ok(()),
        false => Err(GenerationError::Logits {
            nan,
            infinite,
            total: logits.len(),
        }),
    }
}

/// Divides the positive logits of tokens in `history` by `penalty` and multiplies the negative
/// ones, each once (Keskar et al., CTRL, arXiv 1909.05858).
pub fn apply_repetition_penalty(logits: &mut [f32], history: &[u32], penalty: f32) {
    if penalty == 1.0 {
        return;
    }
    let mut seen = history.to_vec();
    seen.sort_unstable();
    seen.dedup();
    for token in seen {
        if let Some(logit) = logits.get_mut(token as usize) {
            *logit = if *logit < 0.0 {
                *logit * penalty
            } else {
                *logit / penalty
            };
        }
    }
}

/// Divides the logits by `temperature`, which is positive. The largest becomes 0, which changes no
/// probability and keeps a very small temperature from overflowing.
pub fn apply_temperature(logits: &mut [f32], temperature: f32) {
    let largest = largest(logits);
    for logit in logits {
        *logit = (*logit - largest) / temperature;
    }
}

/// Rules out every logit below the `count`-th largest. Of equal ones all stay.
pub fn keep_top_k(logits: &mut [f32], count: usize) {
    if count == 0 || count >= logits.len() {
        return;
    }
    let mut sorted = logits.to_vec();
    let (_, &mut threshold, _) = sorted.select_nth_unstable_by(count - 1, |a, b| b.total_cmp(a));
    for logit in logits {
        if *logit < threshold {
            *logit = f32::NEG_INFINITY;
        }
    }
}

/// Keeps the smallest set of most probable tokens whose probabilities sum to at least
/// `probability`, always the first (nucleus sampling; Holtzman et al., arXiv 1904.09751).
pub fn keep_top_p(logits: &mut [f32], probability: f32) {
    let probabilities = probabilities(logits);
    let mut order: Vec<usize> = (0..logits.len()).collect();
    // A stable sort: of equal tokens the first is kept first.
    order.sort_by(|&a, &b| probabilities[b].total_cmp(&probabilities[a]));
    let mut before = 0.0;
    for (rank, &token) in order.iter().enumerate() {
        if rank > 0 && before >= f64::from(probability) {
            logits[token] = f32::NEG_INFINITY;
        }
        before += probabilities[token];
    }
}

/// `e^(x_i) / Σ e^(x_j)`, in double precision.
pub fn probabilities(logits: &[f32]) -> Vec<f64> {
    let largest = f64::from(largest(logits));
    let mut values: Vec<f64> = logits
        .iter()
        .map(|&logit| (f64::from(logit) - largest).exp())
        .collect();
    let total: f64 = values.iter().sum();
    values.iter_mut().for_each(|value| *value /= total);
    values
}

/// The token with the largest logit, the first of equal ones.
pub fn most_probable(logits: &[f32]) -> u32 {
    let better = |best: (usize, f32), (token, &logit): (usize, &f32)| match logit > best.1 {
        true => (token, logit),
        false => best,
    };
    logits
        .iter()
        .enumerate()
        .fold((0, f32::NEG_INFINITY), better)
        .0 as u32
}

/// The token in whose share of the unit interval `point` falls.
pub fn draw(logits: &[f32], point: f64) -> u32 {
    let mut remaining = point;
    let probabilities = probabilities(logits);
    for (token, &probability) in probabilities.iter().enumerate() {
        if remaining < probability {
            return token as u32;
        }
        remaining -= probability;
    }
    // Rounding can leave the sum just below the point: the last token that has any probability.
    probabilities
        .iter()
        .rposition(|&probability| probability > 0.0)
        .unwrap_or(0) as u32
}

fn largest(logits: &[f32]) -> f32 {
    logits.iter().copied().fold(f32::NEG_INFINITY, f32::max)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;
    use serde_json::Value;

    use super::*;

    #[derive(Deserialize)]
    struct Golden {
        logits: Vec<Vec<f32>>,
        history: Vec<Vec<u32>>,
        processed: BTreeMap<String, Vec<Vec<Option<f32>>>>,
    }

    fn golden() -> Golden {
        let path = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../../tests/fixtures/text/sampling.json"
        );
        serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
    }

    #[test]
    fn processors_are_those_of_transformers() {
        let golden = golden();
        for (name, rows) in &golden.processed {
            let (processor, value) = name.split_once(' ').unwrap();
            for ((row, history), expected) in golden.logits.iter().zip(&golden.history).zip(rows) {
                let mut logits = row.clone();
                match processor {
                    "temperature" => apply_temperature(&mut logits, value.parse().unwrap()),
                    "top_k" => keep_top_k(&mut logits, value.parse().unwrap()),
                    "top_p" => keep_top_p(&mut logits, value.parse().unwrap()),
                    "repetition_penalty" => {
                        apply_repetition_penalty(&mut logits, history, value.parse().unwrap());
                    }
                    other => panic!("unknown processor {other}"),
                }
                let expected: Vec<f32> = expected
                    .iter()
                    .map(|value| value.unwrap_or(f32::NEG_INFINITY))
                    .collect();
                // Ours are shifted by the temperature: compare what they mean.
                let (found, expected) = (probabilities(&logits), probabilities(&expected));
                for (a, b) in found.iter().zip(&expected) {
                    assert!(
                        (a - b).abs() < 1e-6,
                        "{name}: {found:?} is not {expected:?}"
                    );
                }
            }
        }
        assert_eq!(golden.processed.len(), 9);
    }

    #[test]
    fn draws_follow_the_probabilities() {
        let logits = [0.1f32, 0.2, 0.3, 0.4].map(f32::ln);
        assert_eq!(
            [0.05, 0.15, 0.35, 0.65, 0.9999].map(|point| draw(&logits, point)),
            [0, 1, 2, 3, 3]
        );
        let mut sampler = Sampler::new(SamplingOptions::default()).unwrap();
        let mut counts = [0.0; 4];
        let draws = 20_000;
        for _ in 0..draws {
            counts[sampler.next(&logits, &[]).unwrap() as usize] += 1.0 / f64::from(draws);
        }
        for (count, expected) in counts.iter().zip([0.1, 0.2, 0.3, 0.4]) {
            // Five standard deviations of a frequency.
            assert!(
                (count - expected).abs()
                    < 5.0 * (expected * (1.0 - expected) / f64::from(draws)).sqrt()
            );
        }
    }

    #[test]
    fn seeds_and_streams_repeat() {
        let logits = vec![0.0; 1000];
        let tokens = |seed, sequence| -> Vec<u32> {
            let options = SamplingOptions {
                seed,
                ..SamplingOptions::default()
            };
            let mut sampler = Sampler::for_sequence(options, sequence).unwrap();
            (0..10)
                .map(|_| sampler.next(&logits, &[]).unwrap())
                .collect()
        };
        assert_eq!(tokens(1, 0), tokens(1, 0));
        assert_ne!(tokens(1, 0), tokens(2, 0));
        assert_ne!(tokens(1, 0), tokens(1, 1));
    }

    #[test]
    fn extremes_are_greedy() {
        let logits = [1.0, 3.0, 2.0, 3.0];
        let options = |change: fn(&mut SamplingOptions)| {
            let mut options = SamplingOptions::default();
            change(&mut options);
            options
        };
        for options in [
            SamplingOptions::greedy(),
            options(|options| options.temperature = 1e-38),
            options(|options| options.top_p = Some(1e-9)),
        ] {
            let mut sampler = Sampler::new(options.clone()).unwrap();
            for _ in 0..20 {
                let token = sampler.next(&logits, &[]).unwrap();
                assert!(
                    token == 1 || options.temperature == 1e-38 && token == 3,
                    "{options:?}"
                );
            }
        }
    }

    #[test]
    fn penalty_turns_away_from_what_was_said() {
        let options = SamplingOptions {
            repetition_penalty: 2.0,
            ..SamplingOptions::greedy()
        };
        let mut sampler = Sampler::new(options).unwrap();
        assert_eq!(sampler.next(&[3.0, 2.0, -1.0], &[0, 0]).unwrap(), 1);
        assert_eq!(sampler.next(&[-3.0, -2.0, -2.5], &[1, 99]).unwrap(), 2);
    }

    #[test]
    fn invalid_options_and_logits_are_named() {
        let message = |json: Value| {
            let options: SamplingOptions = serde_json::from_value(json).unwrap();
            options.check().unwrap_err().to_string()
        };
        assert_eq!(
            message(serde_json::json!({"temperature": -1.0})),
            "temperature is -1, but must be 0 (greedy) or a positive number"
        );
        assert_eq!(
            message(serde_json::json!({"top_k": 0})),
            "top_k is 0, but must be at least 1"
        );
        assert_eq!(
            message(serde_json::json!({"top_p": 1.5})),
            "top_p is 1.5, but must be above 0 and at most 1"
        );
        assert!(
            message(serde_json::json!({"repetition_penalty": 0.0})).contains("a positive number")
        );
        let mut sampler = Sampler::new(SamplingOptions::default()).unwrap();
        for logits in [
            vec![],
            vec![f32::NAN, 1.0],
            vec![f32::NEG_INFINITY],
            vec![f32::INFINITY, 0.0],
        ] {
            assert!(sampler.next(&logits, &[]).is_err(), "{logits:?}");
        }
        assert_eq!(sampler.next(&[f32::NEG_INFINITY, 0.0], &[]).unwrap(), 1);
    }

    proptest! {
        #[test]
        fn a_drawn_token_was_kept(
            logits in proptest::collection::vec(-50f32..50.0, 1..40),
            temperature in 0.01f32..5.0,
            top_k in 1usize..50,
            top_p in 0.01f32..=1.0,
            seed in any::<u64>(),
        ) {
            let options = SamplingOptions {
                temperature, top_k: Some(top_k), top_p: Some(top_p), repetition_penalty: 1.0, seed,
            };
            let token = Sampler::new(options).unwrap().next(&logits, &[]).unwrap() as usize;
            let larger = logits.iter().filter(|&&logit| logit > logits[token]).count();
            prop_assert!(larger < top_k);
            let mass: f64 = {
                let mut scaled = logits.clone();
                apply_temperature(&mut scaled, temperature);
                keep_top_k(&mut scaled, top_k);
                let probabilities = probabilities(&scaled);
                probabilities.iter().filter(|&&p| p > probabilities[token]).sum()
            };
            prop_assert!(mass < f64::from(top_p) + 1e-9);
        }
    }
}
