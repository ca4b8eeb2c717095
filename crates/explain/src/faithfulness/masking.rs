//! What a classifier loses when the tokens that scores put highest are hidden, or keeps when only
//! they are left (DeYoung et al. 2020, ERASER, arXiv 1911.03429; DecompX, arXiv 2306.02873).
//!
//! For each ratio `r`, the `k = round(r n)` highest-scored of a text's `n` tokens are chosen;
//! special tokens never are. With `p(y|x)` the probability of the class `y` that the model
//! predicts on the intact text, `x⁽ʳ⁾` the text whose chosen tokens are masks and `x₍ᵣ₎` the text
//! whose other tokens are:
//!
//! - comprehensiveness, whose mean over ratios is AOPC: `p(y|x) − p(y|x⁽ʳ⁾)`, higher is better;
//! - log-odds: `log p(y|x⁽ʳ⁾) − log p(y|x)`, lower is better;
//! - accuracy of the gold label on `x⁽ʳ⁾`, lower is better;
//! - sufficiency: `p(y|x) − p(y|x₍ᵣ₎)`, lower is better.

use super::Summary;
use crate::Error;
use serde::Serialize;
use std::result::Result;

/// The ratios of DecompX, in per cent.
pub const RATIOS: [usize; 10] = [0, 10, 20, 30, 40, 50, 60, 70, 80, 90];

/// What tokens are hidden with, and which never are.
#[derive(Clone, Copy)]
pub struct Masks<'a> {
    /// The token that stands in.
    pub token: u32,
    /// Tokens that are never hidden.
    pub is_special: &'a dyn Fn(u32) -> bool,
}

/// A text and the scores that are put to the test.
#[derive(Clone, Copy, Debug)]
pub struct Example<'a> {
    /// Token ids.
    pub tokens: &'a [u32],
    /// One for each token.
    pub scores: &'a [f64],
    /// The gold label, where there is one.
    pub label: Option<usize>,
}

impl Example<'_> {
    /// The text with `ratio` per cent of its tokens hidden, the highest-scored first; of equal
    /// scores the earlier.
    pub fn without_highest(&self, ratio: usize, masks: Masks<'_>) -> Vec<u32> {
        self.hidden(masks, |rank, chosen| rank < chosen, ratio)
    }

    /// The text with all but `ratio` per cent of its tokens hidden, the highest-scored kept.
    pub fn only_highest(&self, ratio: usize, masks: Masks<'_>) -> Vec<u32> {
        self.hidden(masks, |rank, chosen| rank >= chosen, ratio)
    }

    fn hidden(
        &self,
        masks: Masks<'_>,
        hides: impl Fn(usize, usize) -> bool,
        ratio: usize,
    ) -> Vec<u32> {
        let mut words: Vec<(usize, f64)> = (0..)
            .zip(self.tokens.iter().zip(self.scores))
            .filter(|(_, (token, _))| !(masks.is_special)(**token))
            .map(|(position, (_, score))| (position, *score))
            .collect();
        words.sort_by(|a, b| b.1.total_cmp(&a.1));
        let chosen = (ratio as f64 / 100.0 * words.len() as f64).round() as usize;
        let mut text = self.tokens.to_vec();
        for (rank, (position, _)) in words.into_iter().enumerate() {
            if hides(rank, chosen)
                && let Some(token) = text.get_mut(position)
            {
                *token = masks.token;
            }
        }
        text
    }
}

/// The measures at one ratio, over texts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Point {
    /// Per cent of the tokens that are chosen.
    pub ratio: usize,
    /// `p(y|x) − p(y|x⁽ʳ⁾)`.
    pub comprehensiveness: Summary,
    /// `log p(y|x⁽ʳ⁾) − log p(y|x)`, in nats.
    pub log_odds: Summary,
    /// Over the texts with a gold label.
    pub accuracy: Summary,
    /// `p(y|x) − p(y|x₍ᵣ₎)`.
    pub sufficiency: Summary,
}

/// The measures at each ratio.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Curve {
    /// One for each ratio.
    pub points: Vec<Point>,
    /// Each text's mean comprehensiveness over the ratios: AOPC.
    pub aopc: Summary,
    /// Each text's mean log-odds over the ratios, in nats.
    pub log_odds: Summary,
    /// Each text's mean accuracy over the ratios.
    pub accuracy: Summary,
    /// Each text's mean sufficiency over the ratios.
    pub sufficiency: Summary,
}

/// Smallest probability whose logarithm is taken.
const LEAST: f64 = 1e-12;

/// The curve, at `ratios` in per cent, of the model `predict`, which gives class probabilities of
/// texts.
///
/// # Errors
/// Those of `predict`, and when it gives not one prediction for each text, or an example not one
/// score for each token.
///
/// ```
/// use lapidary_explain::faithfulness::masking::{Example, Masks, RATIOS, curve};
///
/// // A model that is certain of class 1 while it sees token 7.
/// let predict = |texts: &[Vec<u32>]| {
///     let seen = |text: &Vec<u32>| if text.contains(&7) { vec![0.0, 1.0] } else { vec![0.5, 0.5] };
///     Ok::<_, lapidary_explain::Error>(texts.iter().map(seen).collect())
/// };
/// let example = Example { tokens: &[0, 7, 5], scores: &[0.0, 2.0, 1.0], label: Some(1) };
/// let masks = Masks { token: 9, is_special: &|token| token == 0 };
/// let curve = curve(&[example], masks, &RATIOS, predict)?;
/// // Of two words, one is hidden from 30 per cent on, at seven of ten ratios.
/// assert!((curve.aopc.mean - 0.35).abs() < 1e-12);
/// # Ok::<(), lapidary_explain::Error>(())
/// ```
pub fn curve<E: From<Error>>(
    examples: &[Example<'_>],
    masks: Masks<'_>,
    ratios: &[usize],
    predict: impl Fn(&[Vec<u32>]) -> Result<Vec<Vec<f64>>, E>,
) -> Result<Curve, E> {
    for example in examples {
        if example.scores.len() != example.tokens.len() {
            let expected = format!("{}, one for each token", example.tokens.len());
            let found = example.scores.len();
            return Err(Error::invalid("the number of scores", found, expected).into());
        }
    }
    let asked = |texts: Vec<Vec<u32>>| -> Result<Vec<Vec<f64>>, E> {
        let predictions = predict(&texts)?;
        if predictions.len() != texts.len() {
            let expected = format!("{}, one for each text", texts.len());
            let found = predictions.len();
            return Err(Error::invalid("the number of predictions", found, expected).into());
        }
        Ok(predictions)
    };
    let texts = |of: &dyn Fn(&Example<'_>) -> Vec<u32>| examples.iter().map(of).collect();
    let intact = asked(texts(&|example| example.tokens.to_vec()))?;
    let mut points = Vec::with_capacity(ratios.len());
    let mut all = vec![Measures::default(); examples.len()];
    for ratio in ratios {
        let without = asked(texts(&|example| example.without_highest(*ratio, masks)))?;
        let only = asked(texts(&|example| example.only_highest(*ratio, masks)))?;
        let measures: Vec<Measures> = (examples.iter().zip(&intact))
            .zip(without.iter().zip(&only))
            .map(|((example, intact), (without, only))| {
                Measures::of(example.label, intact, without, only)
            })
            .collect();
        points.push(point(*ratio, &measures));
        for (sum, measures) in all.iter_mut().zip(&measures) {
            sum.add(measures, 1.0 / ratios.len() as f64);
        }
    }
    let whole = point(0, &all);
    Ok(Curve {
        points,
        aopc: whole.comprehensiveness,
        log_odds: whole.log_odds,
        accuracy: whole.accuracy,
        sufficiency: whole.sufficiency,
    })
}

/// The measures of one text.
#[derive(Clone, Copy, Debug, Default)]
struct Measures {
    comprehensiveness: f64,
    log_odds: f64,
    accuracy: Option<f64>,
    sufficiency: f64,
}

impl Measures {
    fn of(label: Option<usize>, intact: &[f64], without: &[f64], only: &[f64]) -> Self {
        let class = most_likely(intact);
        let [intact, hidden, kept] =
            [intact, without, only].map(|probabilities| probability(probabilities, class));
        Self {
            comprehensiveness: intact - hidden,
            log_odds: hidden.max(LEAST).ln() - intact.max(LEAST).ln(),
            accuracy: label.map(|label| f64::from(u8::from(most_likely(without) == label))),
            sufficiency: intact - kept,
        }
    }

    fn add(&mut self, other: &Self, factor: f64) {
        self.comprehensiveness += factor * other.comprehensiveness;
        self.log_odds += factor * other.log_odds;
        self.sufficiency += factor * other.sufficiency;
        if let Some(accuracy) = other.accuracy {
            *self.accuracy.get_or_insert(0.0) += factor * accuracy;
        }
    }
}

fn point(ratio: usize, measures: &[Measures]) -> Point {
    let over = |of: fn(&Measures) -> f64| Summary::of(measures.iter().map(of));
    Point {
        ratio,
        comprehensiveness: over(|m| m.comprehensiveness),
        log_odds: over(|m| m.log_odds),
        accuracy: Summary::of(measures.iter().filter_map(|m| m.accuracy)),
        sufficiency: over(|m| m.sufficiency),
    }
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

    const MASKS: Masks<'static> = Masks {
        token: 9,
        is_special: &|token| token == 0,
    };

    #[test]
    fn special_tokens_stay_and_counts_are_rounded() {
        let example = Example {
            tokens: &[0, 5, 6, 7, 8, 5],
            scores: &[100.0, 1.0, 3.0, 2.0, -1.0, 0.0],
            label: None,
        };
        let without = |ratio| example.without_highest(ratio, MASKS);
        assert_eq!(without(0), example.tokens);
        // 30 % of five words is 1.5, rounded to 2.
        assert_eq!(without(30), [0, 5, 9, 9, 8, 5]);
        // 90 % is 4.5, rounded to 5.
        assert_eq!(without(90), [0, 9, 9, 9, 9, 9]);
        assert_eq!(example.only_highest(0, MASKS), [0, 9, 9, 9, 9, 9]);
        assert_eq!(example.only_highest(30, MASKS), [0, 9, 6, 7, 9, 9]);
        assert_eq!(example.only_highest(100, MASKS), example.tokens);
    }

    /// A model that says class 1 with probability 0.9 while token 7 is there, else 0.2.
    fn predict(sequences: &[Vec<u32>]) -> crate::Result<Vec<Vec<f64>>> {
        let probabilities = |tokens: &Vec<u32>| match tokens.contains(&7) {
            true => vec![0.1, 0.9],
            false => vec![0.8, 0.2],
        };
        Ok(sequences.iter().map(probabilities).collect())
    }

    /// The curve of ten words, of which the first matters and is scored so.
    fn of_ten_words(score: f64) -> Curve {
        let tokens = [0, 7, 1, 1, 1, 1, 1, 1, 1, 1, 1];
        let mut scores = [0.0; 11];
        scores[1] = score;
        let example = Example {
            tokens: &tokens,
            scores: &scores,
            label: Some(1),
        };
        curve(&[example], MASKS, &RATIOS, predict).unwrap()
    }

    #[test]
    fn the_measures_of_a_model_that_reads_one_token() {
        // The word that matters is hidden at nine of ten ratios, and kept at the same nine.
        let best = of_ten_words(5.0);
        let close = |a: f64, b: f64| assert!((a - b).abs() < 1e-12, "{a} is not {b}: {best:?}");
        close(best.aopc.mean, 0.9 * 0.7);
        close(best.accuracy.mean, 0.1);
        close(best.log_odds.mean, 0.9 * (0.2f64 / 0.9).ln());
        close(best.sufficiency.mean, 0.1 * 0.7);
        close(best.points[1].comprehensiveness.mean, 0.7);
        assert_eq!(best.points[1].ratio, 10);
    }

    #[test]
    fn the_measures_of_scores_that_have_it_backwards() {
        let worst = of_ten_words(-5.0);
        assert!(worst.aopc.mean.abs() < 1e-12);
        assert!((worst.accuracy.mean - 1.0).abs() < 1e-12);
        assert!(worst.log_odds.mean.abs() < 1e-12);
        assert!((worst.sufficiency.mean - 0.7).abs() < 1e-12);
    }

    #[test]
    fn texts_without_a_label_count_for_no_accuracy() {
        let example = |label| Example {
            tokens: &[7, 1],
            scores: &[1.0, 0.0],
            label,
        };
        let curve = curve(&[example(None), example(Some(1))], MASKS, &[0, 50], predict).unwrap();
        assert_eq!((curve.accuracy.count, curve.accuracy.mean), (1, 0.5));
        assert_eq!((curve.aopc.count, curve.aopc.half_width), (2, 0.0));
    }

    #[test]
    fn wrong_counts_are_refused() {
        let example = Example {
            tokens: &[7, 1],
            scores: &[1.0],
            label: None,
        };
        let error = curve(&[example], MASKS, &RATIOS, predict).unwrap_err();
        assert!(
            error.to_string().contains("number of scores is 1"),
            "{error}"
        );
    }
}
