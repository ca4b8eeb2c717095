//! What an explainer gives.

use std::ops::Range;

use crate::leaks::Leak;
use crate::{Error, Result};
use schemars::JsonSchema;
use serde::Serialize;

/// What the scores are over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Unit {
    /// Tokens of the input.
    Token,
    /// Words of the input, each a token or more.
    Word,
    /// Groups of tokens.
    Phrase,
    /// Parts of the model.
    Component,
    /// Heads of attention.
    Head,
    /// Features of a dictionary.
    Feature,
}

impl Unit {
    /// Whether the scores lie side by side over the whole input.
    pub fn is_of_the_text(self) -> bool {
        matches!(self, Self::Token | Self::Word)
    }
}

/// What an explanation leaves out.
#[derive(Clone, Debug, Default, PartialEq, Serialize, JsonSchema)]
pub struct Account {
    /// The number that is explained.
    pub explained: f64,
    /// Sum of the scores.
    pub attributed: f64,
    /// Parts of the number that are known but no unit's, by name.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub elsewhere: Vec<(String, f64)>,
    /// `explained − attributed − elsewhere`: what is nobody's, by design (dropped biases, detached
    /// factors) or by rounding.
    pub unattributed: f64,
    /// Largest relative difference, over all sites, between the value and the sum of its
    /// streams; absent for methods that carry no streams.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub largest_site_error: Option<f64>,
    /// What the method leaves out by its definition, in words.
    pub left_out: Vec<String>,
    /// What each part of the model keeps of the relevance that arrives at it, from the outputs
    /// down; for methods that propagate relevance.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub leaks: Vec<Leak>,
}

/// Scores over the units of an input or a model.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
pub struct Explanation {
    /// The method's name.
    pub method: String,
    /// What the scores are over.
    pub unit: Unit,
    /// Names of the units, where they have any.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub labels: Vec<String>,
    /// One score for each unit.
    pub scores: Vec<f64>,
    /// What the scores leave out.
    pub account: Account,
}

impl Explanation {
    /// Assembles an explanation of the number `explained`.
    pub(crate) fn new(
        method: impl Into<String>,
        unit: Unit,
        scores: Vec<f64>,
        explained: f64,
        left_out: Vec<String>,
    ) -> Self {
        let attributed = scores.iter().sum::<f64>();
        let account = Account {
            explained,
            attributed,
            elsewhere: Vec::new(),
            unattributed: explained - attributed,
            largest_site_error: None,
            left_out,
            leaks: Vec::new(),
        };
        Self {
            method: method.into(),
            unit,
            labels: Vec::new(),
            scores,
            account,
        }
    }

    /// The same with what each part of the model keeps.
    pub(crate) fn with_leaks(mut self, leaks: Vec<Leak>) -> Self {
        self.account.leaks = leaks;
        self
    }

    /// The same with the units' names.
    pub fn with_labels(mut self, labels: Vec<String>) -> Self {
        self.labels = labels;
        self
    }

    /// The same with parts of the number that are no unit's; no longer unattributed.
    pub(crate) fn with_elsewhere(mut self, elsewhere: Vec<(String, f64)>) -> Self {
        for (_, amount) in &elsewhere {
            self.account.unattributed -= amount;
        }
        self.account.elsewhere.extend(elsewhere);
        self
    }

    /// The scores of tokens summed to scores of `words`, which follow each other from the first
    /// token on; what is scored beyond the tokens, such as biases, stays as it is at the end. The
    /// account is the same, for sums are.
    ///
    /// # Errors
    /// As [`over_words`], and when the scores are not over tokens.
    pub fn by_word(mut self, words: &[Range<usize>]) -> Result<Self> {
        if self.unit != Unit::Token {
            let expected = "over tokens, whose words can be scored";
            return Err(Error::invalid(
                "unit of the scores",
                format!("{:?}", self.unit),
                expected,
            ));
        }
        self.scores = over_words(&self.scores, words)?;
        self.unit = Unit::Word;
        self.labels.clear();
        Ok(self)
    }

    /// Indices of the units by descending score.
    pub fn ranking(&self) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.scores.len()).collect();
        order.sort_by(|a, b| self.scores[*b].total_cmp(&self.scores[*a]));
        order
    }
}

/// The sum of the scores of each word, a word being neighbouring tokens. Scores beyond the last
/// word follow as they are.
///
/// ```
/// use lapidary_explain::over_words;
///
/// assert_eq!(over_words(&[1.0, 2.0, 4.0, 0.5], &[0..1, 1..3])?, [1.0, 6.0, 0.5]);
/// # Ok::<(), lapidary_explain::Error>(())
/// ```
///
/// # Errors
/// When the words do not follow each other from 0 on, or there are fewer scores than they have
/// tokens.
pub fn over_words(scores: &[f64], words: &[Range<usize>]) -> Result<Vec<f64>> {
    let mut sums = Vec::with_capacity(words.len());
    let mut next = 0;
    for word in words {
        let own = scores
            .get(word.clone())
            .filter(|_| word.start == next && !word.is_empty());
        let own = own.ok_or_else(|| {
            let expected = format!("from {next} on, and up to at most {}", scores.len());
            Error::invalid("tokens of a word", format!("{word:?}"), expected)
        })?;
        sums.push(own.iter().sum());
        next = word.end;
    }
    sums.extend(scores.iter().skip(next));
    Ok(sums)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// However tokens are grouped, nothing is lost, and scores beyond the words stay.
        #[test]
        fn sums_are_conserved(
            scores in prop::collection::vec(-64i32..64, 1..30),
            cuts in prop::collection::vec(any::<bool>(), 30),
            beyond in 0usize..3,
        ) {
            // Multiples of 1/8 sum without rounding, so that equality is meant.
            let scores: Vec<f64> = scores.into_iter().map(|n| f64::from(n) / 8.0).collect();
            let tokens = scores.len().saturating_sub(beyond);
            let mut words: Vec<Range<usize>> = Vec::new();
            for (token, joins) in cuts.iter().enumerate().take(tokens) {
                match words.last_mut().filter(|_| *joins) {
                    Some(word) => word.end = token + 1,
                    None => words.push(token..token + 1),
                }
            }
            let account = Explanation::new("m", Unit::Token, scores.clone(), 3.5, vec![]);
            let by_word = account.clone().by_word(&words).unwrap();
            prop_assert_eq!(by_word.unit, Unit::Word);
            prop_assert_eq!(&by_word.account, &account.account);
            prop_assert_eq!(by_word.scores.iter().sum::<f64>(), scores.iter().sum::<f64>());
            prop_assert_eq!(by_word.scores.len(), words.len() + scores.len() - tokens);
            for (word, score) in words.iter().zip(&by_word.scores) {
                prop_assert_eq!(*score, scores[word.clone()].iter().sum::<f64>());
            }
        }
    }

    #[test]
    fn words_that_are_none_are_refused() {
        let refused = |words: &[(usize, usize)]| {
            let words: Vec<Range<usize>> = words.iter().map(|(from, to)| *from..*to).collect();
            let said = over_words(&[1.0, 2.0, 3.0], &words)
                .unwrap_err()
                .to_string();
            assert!(said.contains("tokens of a word"), "{said}");
        };
        refused(&[(1, 2)]);
        refused(&[(0, 1), (2, 3)]);
        refused(&[(0, 4)]);
        refused(&[(0, 2), (1, 3)]);
        refused(&[(0, 0)]);
        let heads = Explanation::new("m", Unit::Head, vec![1.0, 2.0], 1.0, vec![]);
        let said = heads.by_word(&[0..1, 1..2]).unwrap_err().to_string();
        assert!(said.contains("Head"), "{said}");
    }
}
