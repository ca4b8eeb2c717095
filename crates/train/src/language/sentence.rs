//! One sentence and what is known about it.

use serde::{Deserialize, Serialize};

use super::Vocabulary;
use crate::Result;

/// What a sentence asks of its reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A verb agrees with its subject across nouns of either number.
    NumberAgreement,
    /// A reflexive agrees with its subject in number and gender.
    ReflexiveAgreement,
    /// A fact that only training can have taught: `the capital of X is Y`.
    LearnedFact,
    /// A fact stated earlier in the sentence: `… alice lives in Y …`.
    ContextFact,
    /// The one of two names that is left to be said.
    NameCopy,
    /// The closing bracket that matches an open one.
    Brackets,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Self; 6] = [
        Self::NumberAgreement,
        Self::ReflexiveAgreement,
        Self::LearnedFact,
        Self::ContextFact,
        Self::NameCopy,
        Self::Brackets,
    ];

    /// The name used in files and tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::NumberAgreement => "number_agreement",
            Self::ReflexiveAgreement => "reflexive_agreement",
            Self::LearnedFact => "learned_fact",
            Self::ContextFact => "context_fact",
            Self::NameCopy => "name_copy",
            Self::Brackets => "brackets",
        }
    }
}

/// Which side of the split a sentence is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Split {
    /// Seen in training.
    Training,
    /// Its combination of words never occurs in training.
    HeldOut,
}

/// A sentence with the word to predict, a word that would be wrong in its place, and the words
/// that decide between the two.
///
/// *Evidence* is what decides between target and foil: the head noun for agreement; the country for a learned fact; the stated value and the name
/// asked about for a fact in context; the mention of the name to copy and the second mention of
/// the other name; the open bracket that the target closes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Sentence {
    /// The words, punctuation included.
    pub words: Vec<&'static str>,
    /// What it asks.
    pub kind: Kind,
    /// Position in `words` of the word to predict from those before it.
    pub target: usize,
    /// The wrong alternative: never correct at `target`.
    pub foil: &'static str,
    /// Positions in `words` of the evidence, ascending, all before `target`.
    pub evidence: Vec<usize>,
    /// What the training/held-out split is made by: words of this sentence that, taken together,
    /// occur on one side only.
    pub combination: String,
}

impl Sentence {
    /// The word to predict.
    pub fn target_word(&self) -> &'static str {
        self.words[self.target]
    }

    /// The words before the target.
    pub fn prefix(&self) -> &[&'static str] {
        &self.words[..self.target]
    }

    /// The words with one space between them.
    pub fn text(&self) -> String {
        self.words.join(" ")
    }

    /// [`START`](super::START) and the words, as identifiers: word `i` is token `i + 1`.
    pub fn tokens(&self, vocabulary: &Vocabulary) -> Result<Vec<u32>> {
        std::iter::once(Ok(vocabulary.start()))
            .chain(self.words.iter().map(|word| vocabulary.identifier(word)))
            .collect()
    }
}
