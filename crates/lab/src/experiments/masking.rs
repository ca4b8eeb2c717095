//! What a model loses when the tokens that an explanation scores highest are hidden.
//!
//! For each ratio `r`, the `round(r n)` highest-scored of a sentence's `n` words become masks.
//! With `p(y|x)` the probability of the class `y` that the model predicts on the intact input,
//! `AOPC(r)` is the mean of `p(y|x) − p(y|x⁽ʳ⁾)`, and `accuracy(r)` that of the gold label.

use super::classifier::Labelled;
use super::mean;
use crate::Result;

/// Ratios in per cent.
pub const RATIOS: [usize; 10] = [0, 10, 20, 30, 40, 50, 60, 70, 80, 90];

/// What is hidden and with what.
#[derive(Clone, Copy, Debug)]
pub struct Masks {
    /// The token that stands in.
    pub token: u32,
    /// Tokens that are never hidden.
    pub is_special: fn(u32) -> bool,
}

/// A mean for each ratio.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Curve {
    /// `AOPC(r)`.
    pub drop: Vec<f64>,
    /// `accuracy(r)`.
    pub accuracy: Vec<f64>,
}

impl Curve {
    /// Mean of the drops over the ratios.
    pub fn aopc(&self) -> f64 {
        mean(self.drop.iter().copied())
    }

    /// Mean of the accuracies over the ratios.
    pub fn mean_accuracy(&self) -> f64 {
        mean(self.accuracy.iter().copied())
    }
}

/// `tokens` with `ratio` per cent of its words hidden, the highest-scored first; of equal scores
/// the earlier.
pub fn masked(tokens: &[u32], scores: &[f64], ratio: usize, masks: Masks) -> Vec<u32> {
    let mut words: Vec<(usize, f64)> = (0..)
        .zip(tokens.iter().zip(scores))
        .filter(|(_, (token, _))| !(masks.is_special)(**token))
        .map(|(position, (_, score))| (position, *score))
        .collect();
    words.sort_by(|a, b| b.1.total_cmp(&a.1));
    let hidden = (ratio as f64 / 100.0 * words.len() as f64).round() as usize;
    let mut masked = tokens.to_vec();
    for (position, _) in words.into_iter().take(hidden) {
        if let Some(token) = masked.get_mut(position) {
            *token = masks.token;
        }
    }
    masked
}

/// The curve of the model `predict`, which gives class probabilities, under one score per token
/// of each sentence.
pub fn curve(
    sentences: &[Labelled],
    scores: &[Vec<f64>],
    masks: Masks,
    predict: impl Fn(&[Vec<u32>]) -> Result<Vec<Vec<f64>>>,
) -> Result<Curve> {
    let hidden = |ratio: usize| -> Vec<Vec<u32>> {
        let each = sentences.iter().zip(scores);
        each.map(|(sentence, scores)| masked(&sentence.tokens, scores, ratio, masks))
            .collect()
    };
    let intact = predict(&hidden(0))?;
    let mut curve = Curve::default();
    for ratio in RATIOS {
        let now = if ratio == 0 {
            intact.clone()
        } else {
            predict(&hidden(ratio))?
        };
        let drops = intact.iter().zip(&now).map(|(intact, now)| {
            let class = most_likely(intact);
            probability(intact, class) - probability(now, class)
        });
        let right = sentences.iter().zip(&now).map(|(sentence, now)| {
            f64::from(u8::from(most_likely(now) == sentence.label as usize))
        });
        curve.drop.push(mean(drops));
        curve.accuracy.push(mean(right));
    }
    Ok(curve)
}

fn probability(of: &[f64], class: usize) -> f64 {
    of.get(class).copied().unwrap_or(0.0)
}

/// Index of the largest number; of equal ones the first.
pub fn most_likely(probabilities: &[f64]) -> usize {
    let mut best = 0;
    for (class, value) in probabilities.iter().enumerate() {
        if *value > probability(probabilities, best) {
            best = class;
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    const MASKS: Masks = Masks {
        token: 9,
        is_special: |token| token == 0,
    };

    #[test]
    fn special_tokens_stay_and_counts_are_rounded() {
        let tokens = [0, 5, 6, 7, 8, 5];
        let scores = [100.0, 1.0, 3.0, 2.0, -1.0, 0.0];
        assert_eq!(masked(&tokens, &scores, 0, MASKS), tokens);
        // 30 % of five words is 1.5, rounded to 2.
        assert_eq!(masked(&tokens, &scores, 30, MASKS), [0, 5, 9, 9, 8, 5]);
        // 90 % is 4.5, rounded to 5.
        assert_eq!(masked(&tokens, &scores, 90, MASKS), [0, 9, 9, 9, 9, 9]);
    }

    /// A model that says class 1 with probability 0.9 while token 7 is there, else 0.2.
    fn predict(sequences: &[Vec<u32>]) -> Result<Vec<Vec<f64>>> {
        Ok(sequences
            .iter()
            .map(|tokens| {
                if tokens.contains(&7) {
                    vec![0.1, 0.9]
                } else {
                    vec![0.8, 0.2]
                }
            })
            .collect())
    }

    #[test]
    fn the_area_of_a_model_that_reads_one_token() {
        // Ten words: r per cent hides r / 10 of them.
        let tokens = vec![0, 7, 1, 1, 1, 1, 1, 1, 1, 1, 1];
        let sentences = [Labelled { tokens, label: 1 }];
        let first = vec![0.0, 5.0, 0., 0., 0., 0., 0., 0., 0., 0., 0.];
        let best = curve(&sentences, &[first], MASKS, predict).unwrap();
        // Hidden at nine of ten ratios: 0.9 · (0.9 − 0.2).
        assert!((best.aopc() - 0.63).abs() < 1e-12, "{best:?}");
        assert!((best.mean_accuracy() - 0.1).abs() < 1e-12);
        let last = vec![0.0, -5.0, 0., 0., 0., 0., 0., 0., 0., 0., 0.];
        let worst = curve(&sentences, &[last], MASKS, predict).unwrap();
        assert!(worst.aopc().abs() < 1e-12);
        assert!((worst.mean_accuracy() - 1.0).abs() < 1e-12);
    }
}
