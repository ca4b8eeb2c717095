//! Sentences whose sentiment is known word by word.
//!
//! Positive words count `+1` and negative ones `−1`. A negator flips, and an intensifier
//! doubles, the next polar word when that is at most two tokens away. The label is the sign of
//! the sum; sentences with the sum zero do not occur. So the true effect of each polar word is
//! known, and explanations can be held to it.

use super::classifier::Labelled;
use lapidary_train::Generator;
use rand::RngExt;
use std::ops::Range;

/// Padding.
pub const PAD: u32 = 0;
/// The token at the start of every sentence.
pub const CLS: u32 = 1;
/// Stands in for a token that is hidden.
pub const MASK: u32 = 2;
/// Number of token ids.
pub const VOCABULARY: usize = 200;

const POSITIVE: Range<u32> = 3..23;
const NEGATIVE: Range<u32> = 23..43;
const NEGATOR: Range<u32> = 43..47;
const INTENSIFIER: Range<u32> = 47..51;
const NEUTRAL: Range<u32> = 51..VOCABULARY as u32;
/// Furthest that a negator or intensifier reaches.
const REACH: usize = 2;
const LENGTHS: std::ops::RangeInclusive<usize> = 8..=24;

/// A sentence with the effect of each token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sentence {
    /// Token ids, [`CLS`] first.
    pub tokens: Vec<u32>,
    /// What each token adds to the sum; zero for all that are not polar.
    pub effects: Vec<i32>,
    /// 1 when the sum is positive, 0 when it is negative.
    pub label: u32,
}

impl Sentence {
    /// Tokens and label.
    pub fn labelled(&self) -> Labelled {
        Labelled {
            tokens: self.tokens.clone(),
            label: self.label,
        }
    }
}

/// Whether a token is none of the sentence's words.
pub fn is_special(token: u32) -> bool {
    matches!(token, PAD | CLS | MASK)
}

/// `+1`, `−1`, or nothing for a word that is not polar.
fn polarity(token: u32) -> Option<i32> {
    if POSITIVE.contains(&token) {
        Some(1)
    } else if NEGATIVE.contains(&token) {
        Some(-1)
    } else {
        None
    }
}

/// What each token adds to the sum.
pub fn effects(tokens: &[u32]) -> Vec<i32> {
    let mut effects: Vec<i32> = tokens
        .iter()
        .map(|token| polarity(*token).unwrap_or(0))
        .collect();
    for (position, token) in tokens.iter().enumerate() {
        let factor = if NEGATOR.contains(token) {
            -1
        } else if INTENSIFIER.contains(token) {
            2
        } else {
            continue;
        };
        let reached = effects.iter_mut().skip(position + 1).take(REACH);
        if let Some(effect) = reached.into_iter().find(|effect| **effect != 0) {
            *effect *= factor;
        }
    }
    effects
}

/// Draws one sentence.
pub fn sentence(generator: &mut Generator) -> Sentence {
    loop {
        let length = generator.random_range(LENGTHS);
        let mut tokens = vec![CLS];
        tokens.extend((0..length).map(|_| word(generator)));
        let effects = effects(&tokens);
        let sum: i32 = effects.iter().sum();
        if sum != 0 {
            return Sentence {
                tokens,
                effects,
                label: u32::from(sum > 0),
            };
        }
    }
}

fn word(generator: &mut Generator) -> u32 {
    let kind = match generator.random_range(0..20) {
        0..3 => POSITIVE,
        3..6 => NEGATIVE,
        6..8 => NEGATOR,
        8..10 => INTENSIFIER,
        _ => NEUTRAL,
    };
    generator.random_range(kind)
}

/// Draws `count` sentences.
pub fn sentences(count: usize, generator: &mut Generator) -> Vec<Sentence> {
    (0..count).map(|_| sentence(generator)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The label written the other way round: each polar word looks back.
    fn label_looking_back(tokens: &[u32]) -> Option<u32> {
        let mut sum = 0;
        for i in 0..tokens.len() {
            let base = match tokens[i] {
                3..23 => 1,
                23..43 => -1,
                _ => continue,
            };
            let mut factor = 1;
            for back in 1..=2 {
                let Some(j) = i.checked_sub(back) else { break };
                match tokens[j] {
                    3..43 => break,
                    43..47 => factor *= -1,
                    47..51 => factor *= 2,
                    _ => {}
                }
            }
            sum += base * factor;
        }
        (sum != 0).then_some(u32::from(sum > 0))
    }

    #[test]
    fn labels_are_those_of_a_second_reading() {
        let mut generator = lapidary_train::generator(3);
        let mut positive = 0;
        for sentence in sentences(2000, &mut generator) {
            assert_eq!(sentence.tokens[0], CLS);
            assert!((9..=25).contains(&sentence.tokens.len()));
            assert!(
                sentence
                    .tokens
                    .iter()
                    .all(|token| (*token as usize) < VOCABULARY)
            );
            assert_eq!(label_looking_back(&sentence.tokens), Some(sentence.label));
            positive += sentence.label;
        }
        assert!(
            (800..1200).contains(&positive),
            "{positive} of 2000 are positive"
        );
    }

    #[test]
    fn modifiers_reach_two_tokens_and_stop_at_the_first_polar_word() {
        // [CLS] not neutral good good
        assert_eq!(effects(&[CLS, 43, 60, 3, 3]), [0, 0, 0, -1, 1]);
        // not very bad: both act.
        assert_eq!(effects(&[CLS, 43, 47, 23]), [0, 0, 0, 2]);
        // Three tokens away is too far.
        assert_eq!(effects(&[CLS, 43, 60, 61, 3]), [0, 0, 0, 0, 1]);
    }

    #[test]
    fn a_seed_gives_the_same_sentences() {
        let draw = |seed| sentences(5, &mut lapidary_train::generator(seed));
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
    }
}
