//! What a model recites: greedy continuations beside the texts they should be.

use std::cmp::Ordering;
use std::ops::ControlFlow;

use lapidary_kernels::{DType, Tensor};
use lapidary_model::Model;
use lapidary_model::generation::{GenerationOptions, generate};
use serde::Serialize;

use super::output;
use crate::data::real_rows;
use crate::error::engine;
use crate::{CalibrationData, Error, Result};

/// Similarity from which a continuation counts as recited loosely.
const LOOSE: f64 = 0.75;

/// How near continuations come to what they should be (the measures of Merullo et al. 2025, arXiv
/// 2510.24256), means over sequences.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Recitation {
    /// Share that is right to the last token.
    pub strict: f64,
    /// Share whose Levenshtein similarity is at least 0.75.
    pub loose: f64,
    /// Levenshtein distance, as a share of the longer sequence.
    pub distance: f64,
    /// Sequences compared.
    pub sequences: usize,
}

impl Recitation {
    /// Compares what was said with what should have been.
    ///
    /// # Errors
    /// When there is nothing to compare, or not as many of either.
    pub fn of(said: &[Vec<u32>], expected: &[Vec<u32>]) -> Result<Self> {
        if expected.is_empty() || said.len() != expected.len() {
            return Err(Error::invalid(
                "number of continuations",
                said.len(),
                format!("{}, as many as texts, and at least 1", expected.len()),
            ));
        }
        let (mut strict, mut loose, mut distance) = (0, 0, 0.0);
        for (said, expected) in said.iter().zip(expected) {
            let longer = said.len().max(expected.len()).max(1);
            let apart = edit_distance(said, expected) as f64 / longer as f64;
            strict += usize::from(said == expected);
            loose += usize::from(1.0 - apart >= LOOSE);
            distance += apart;
        }
        let count = expected.len() as f64;
        Ok(Self {
            strict: strict as f64 / count,
            loose: loose as f64 / count,
            distance: distance / count,
            sequences: expected.len(),
        })
    }
}

/// Shows a causal language model the first `shown` tokens of each text, has it go on greedily, and
/// compares with the rest of the text.
///
/// # Errors
/// When a text is not longer than what is shown, or longer than the model goes, or the model cannot
/// generate.
pub fn recitation(model: &Model, texts: &[Vec<u32>], shown: usize) -> Result<Recitation> {
    // What it is given, and the token after that.
    let longest = model.spec().length().saturating_add(1);
    let (mut prompts, mut rests) = (Vec::new(), Vec::new());
    for (index, text) in texts.iter().enumerate() {
        // It would be cut short there, and pass for not recited.
        if text.len() > longest {
            return Err(Error::invalid(
                format!("length of text {index}"),
                text.len(),
                format!("at most {longest}: the model's length, and the token after it"),
            ));
        }
        match text.split_at_checked(shown) {
            Some((prompt, rest)) if !prompt.is_empty() && !rest.is_empty() => {
                prompts.push(prompt.to_vec());
                rests.push(rest.to_vec());
            }
            _ => {
                return Err(Error::invalid(
                    "tokens that are shown",
                    shown,
                    format!(
                        "between 1 and {}: text {index} has {} tokens",
                        text.len().saturating_sub(1),
                        text.len()
                    ),
                ));
            }
        }
    }
    let options = GenerationOptions {
        new_tokens: rests.iter().map(Vec::len).max().unwrap_or(0),
        ..GenerationOptions::default()
    };
    let mut said = generate(model, &prompts, &options, |_, _| ControlFlow::Continue(()))?;
    for (said, rest) in said.iter_mut().zip(&rests) {
        said.truncate(rest.len());
    }
    Recitation::of(&said, &rests)
}

/// The least number of insertions, deletions and substitutions that make one sequence of the other
/// (Levenshtein 1966).
///
/// ```
/// use lapidary_compress::quality::edit_distance;
/// assert_eq!(edit_distance(&[1, 2, 3, 4], &[2, 3, 5, 4]), 2);
/// ```
pub fn edit_distance(a: &[u32], b: &[u32]) -> usize {
    // Distances of what was read of `a` from each beginning of `b`.
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (read, x) in a.iter().enumerate() {
        let mut diagonal = read;
        let mut left = read + 1;
        if let Some(first) = row.first_mut() {
            *first = left;
        }
        for (above, y) in row.iter_mut().skip(1).zip(b) {
            let replaced = diagonal + usize::from(x != y);
            diagonal = *above;
            left = replaced.min(left + 1).min(diagonal + 1);
            *above = left;
        }
    }
    row.last().copied().unwrap_or(0)
}

/// How well a model keeps another's ranking of next tokens: the mean of [`ndcg`] over the positions
/// of the data, from 0 to 1.
///
/// # Errors
/// When the models' scores are not of the same shape or not numbers, or `first` is 0.
pub fn ranking_kept(
    original: &Model,
    edited: &Model,
    data: &CalibrationData,
    batch: usize,
    first: usize,
) -> Result<f64> {
    if first == 0 {
        let expected = "at least 1";
        return Err(Error::invalid(
            "tokens whose ranking is compared",
            first,
            expected,
        ));
    }
    let (mut sum, mut count) = (0.0, 0usize);
    for batch in data.batches(batch, &original.device()) {
        let batch = batch?;
        let rows = |model: &Model| -> Result<Vec<Vec<f64>>> {
            let logits = output(model, &batch, None)?.into_logits()?.into_value();
            let rows: Tensor = real_rows(&logits, batch.real.as_ref())?;
            let rows = engine(engine(rows.to_dtype(DType::F64))?.to_vec2::<f64>())?;
            let broken = rows.iter().flatten().any(|score| score.is_nan());
            match broken {
                false => Ok(rows),
                true => Err(Error::NotFinite {
                    what: "a score of a next token".to_owned(),
                }),
            }
        };
        let (before, after) = (rows(original)?, rows(edited)?);
        if before.len() != after.len()
            || before.first().map(Vec::len) != after.first().map(Vec::len)
        {
            return Err(Error::invalid(
                "scores of the edited model",
                "of another shape",
                "of the original's",
            ));
        }
        for (before, after) in before.iter().zip(&after) {
            sum += ndcg(before, after, first);
            count += 1;
        }
    }
    Ok(sum / count.max(1) as f64)
}

/// The normalised discounted cumulative gain of a ranking of the `first` highest scores (Järvelin &
/// Kekäläinen 2002): the token that `reference` ranks at place `p` of 1 to `first` is worth
/// `first + 1 − p`, others nothing, and what is found at place `p` counts for `1 / log₂(p + 1)` of
/// its worth. 1 for the reference's own ranking, 0 where none of its first tokens is found.
///
/// ```
/// use lapidary_compress::quality::ndcg;
/// let scores = [3.0, 2.0, 1.0, 0.0];
/// assert_eq!(ndcg(&scores, &scores, 2), 1.0);
/// assert_eq!(ndcg(&scores, &[0.0, 1.0, 2.0, 3.0], 2), 0.0);
/// ```
pub fn ndcg(reference: &[f64], scores: &[f64], first: usize) -> f64 {
    let (wanted, found) = (highest(reference, first), highest(scores, first));
    let discount = |place: usize| 1.0 / (place as f64 + 2.0).log2();
    let worth = |place: usize| (wanted.len() - place) as f64;
    let most: f64 = (0..wanted.len())
        .map(|place| worth(place) * discount(place))
        .sum();
    let gained: f64 = found
        .iter()
        .enumerate()
        .filter_map(|(place, token)| {
            let ranked = wanted.iter().position(|wanted| wanted == token)?;
            Some(worth(ranked) * discount(place))
        })
        .sum();
    if most > 0.0 { gained / most } else { 0.0 }
}

/// Places of the highest scores, the highest first; of equal ones the earlier.
fn highest(scores: &[f64], first: usize) -> Vec<usize> {
    let first = first.min(scores.len());
    let score = |place: &usize| scores.get(*place).copied().unwrap_or(f64::NEG_INFINITY);
    let order = |a: &usize, b: &usize| -> Ordering { score(b).total_cmp(&score(a)).then(a.cmp(b)) };
    let mut places: Vec<usize> = (0..scores.len()).collect();
    if (1..scores.len()).contains(&first) {
        places.select_nth_unstable_by(first - 1, order);
    }
    places.truncate(first);
    places.sort_unstable_by(order);
    places
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// By the recursion of its definition.
    fn plain(a: &[u32], b: &[u32]) -> usize {
        match (a.split_last(), b.split_last()) {
            (None, _) => b.len(),
            (_, None) => a.len(),
            (Some((x, shorter)), Some((y, other))) => (plain(shorter, other) + usize::from(x != y))
                .min(plain(shorter, b) + 1)
                .min(plain(a, other) + 1),
        }
    }

    proptest! {
        #[test]
        fn edit_distances_are_those_of_the_definition(
            a in proptest::collection::vec(0u32..3, 0..6),
            b in proptest::collection::vec(0u32..3, 0..6),
        ) {
            prop_assert_eq!(edit_distance(&a, &b), plain(&a, &b));
        }

        #[test]
        fn a_ranking_is_worth_most_to_itself(
            reference in proptest::collection::vec(-1.0f64..1.0, 3..12),
            scores in proptest::collection::vec(-1.0f64..1.0, 12..13),
            first in 1usize..6,
        ) {
            let scores = &scores[..reference.len()];
            let found = ndcg(&reference, scores, first);
            prop_assert!((0.0..=1.0 + 1e-12).contains(&found), "{}", found);
            // Only the order counts.
            let bent: Vec<f64> = reference.iter().map(|x| (3.0 * x).exp()).collect();
            prop_assert!((ndcg(&reference, &bent, first) - 1.0).abs() < 1e-12);
        }
    }

    #[test]
    fn gains_are_discounted_by_place() {
        // The first two of the reference, in the other order: 1 · 1 + 2 / log₂ 3 of 2 + 1 / log₂ 3.
        let swapped = ndcg(&[9.0, 8.0, 1.0], &[8.0, 9.0, 1.0], 2);
        let discount = 1.0 / 3f64.log2();
        let expected = (1.0 + 2.0 * discount) / (2.0 + discount);
        assert!((swapped - expected).abs() < 1e-12, "{swapped}");
        assert_eq!(highest(&[1.0, 5.0, 5.0, 0.0], 3), [1, 2, 0]);
        assert_eq!(highest(&[1.0, 5.0], 9), [1, 0]);
        assert_eq!(ndcg(&[], &[], 3), 0.0);
    }

    #[test]
    fn strict_is_equal_and_loose_three_of_four() {
        let expected = vec![vec![1, 2, 3, 4], vec![1, 2, 3, 4], vec![1, 2, 3, 4]];
        let said = vec![vec![1, 2, 3, 4], vec![1, 9, 3, 4], vec![8, 9, 3, 4]];
        let found = Recitation::of(&said, &expected).unwrap();
        assert_eq!(
            found,
            Recitation {
                strict: 1.0 / 3.0,
                loose: 2.0 / 3.0,
                distance: 0.25,
                sequences: 3
            }
        );
        // What was not said at all is as far as can be.
        let silent = Recitation::of(&[vec![]], &[vec![5, 6]]).unwrap();
        assert_eq!((silent.strict, silent.distance), (0.0, 1.0));
        assert!(Recitation::of(&[], &[]).is_err());
        assert!(Recitation::of(&said, &expected[..2]).is_err());
    }
}
