//! Words and their identifiers.

use std::collections::HashMap;

use super::words;
use crate::{Error, Result};

/// The word that opens every sentence in a stream of tokens.
pub const START: &str = "<start>";

/// The word-level vocabulary of the language: fixed, at most 512 words.
#[derive(Clone, Debug)]
pub struct Vocabulary {
    words: Vec<&'static str>,
    identifiers: HashMap<&'static str, u32>,
}

impl Default for Vocabulary {
    fn default() -> Self {
        Self::new()
    }
}

impl Vocabulary {
    /// The vocabulary of the language. [`START`] is word 0.
    pub fn new() -> Self {
        let words: Vec<&'static str> = std::iter::once(START).chain(words::all()).collect();
        let identifiers = words.iter().copied().zip(0..).collect();
        Self { words, identifiers }
    }

    /// All words, in the order of their identifiers.
    pub fn words(&self) -> &[&'static str] {
        &self.words
    }

    /// How many words there are.
    pub fn size(&self) -> usize {
        self.words.len()
    }

    /// The identifier of [`START`].
    pub fn start(&self) -> u32 {
        0
    }

    /// The identifier of a word.
    pub fn identifier(&self, word: &str) -> Result<u32> {
        self.identifiers
            .get(word)
            .copied()
            .ok_or_else(|| Error::UnknownWord { word: word.into() })
    }

    /// The word of an identifier.
    pub fn word(&self, identifier: u32) -> Result<&'static str> {
        self.words
            .get(identifier as usize)
            .copied()
            .ok_or(Error::TokenRange {
                token: identifier,
                vocabulary: self.size() as u32,
            })
    }

    /// Splits at white space and looks every word up.
    ///
    /// ```
    /// # fn main() -> lapidary_train::Result<()> {
    /// let vocabulary = lapidary_train::language::Vocabulary::new();
    /// let tokens = vocabulary.encode("the farmer near the dogs sings .")?;
    /// assert_eq!(vocabulary.decode(&tokens)?, "the farmer near the dogs sings .");
    /// # Ok(())
    /// # }
    /// ```
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        text.split_whitespace()
            .map(|word| self.identifier(word))
            .collect()
    }

    /// The words of `tokens`, one space between them.
    pub fn decode(&self, tokens: &[u32]) -> Result<String> {
        let words: Result<Vec<&str>> = tokens.iter().map(|&token| self.word(token)).collect();
        Ok(words?.join(" "))
    }
}
