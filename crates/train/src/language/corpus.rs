//! An endless text in the language, without storing any of it.

use rand::RngExt;
use serde::{Deserialize, Serialize};

use super::{Kind, Language, Sentence, Split};
use crate::{Error, Generator, Result, generator};

/// How often each kind of sentence occurs, in any unit.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Mixture {
    /// Weight of [`Kind::NumberAgreement`].
    pub number_agreement: f64,
    /// Weight of [`Kind::ReflexiveAgreement`].
    pub reflexive_agreement: f64,
    /// Weight of [`Kind::LearnedFact`].
    pub learned_fact: f64,
    /// Weight of [`Kind::ContextFact`].
    pub context_fact: f64,
    /// Weight of [`Kind::NameCopy`].
    pub name_copy: f64,
    /// Weight of [`Kind::Brackets`].
    pub brackets: f64,
}

impl Default for Mixture {
    fn default() -> Self {
        Self {
            number_agreement: 1.0,
            reflexive_agreement: 1.0,
            learned_fact: 1.0,
            context_fact: 1.0,
            name_copy: 1.0,
            brackets: 1.0,
        }
    }
}

impl Mixture {
    /// The weight of one kind.
    pub fn weight(&self, kind: Kind) -> f64 {
        match kind {
            Kind::NumberAgreement => self.number_agreement,
            Kind::ReflexiveAgreement => self.reflexive_agreement,
            Kind::LearnedFact => self.learned_fact,
            Kind::ContextFact => self.context_fact,
            Kind::NameCopy => self.name_copy,
            Kind::Brackets => self.brackets,
        }
    }

    fn total(&self) -> f64 {
        Kind::ALL.into_iter().map(|kind| self.weight(kind)).sum()
    }

    fn draw(&self, generator: &mut Generator) -> Kind {
        let mut left = generator.random_range(0.0..self.total());
        let mut chosen = Kind::ALL[0];
        for kind in Kind::ALL {
            let weight = self.weight(kind);
            if weight > 0.0 {
                chosen = kind;
                if left < weight {
                    break;
                }
                left -= weight;
            }
        }
        chosen
    }
}

/// One side of the language's split as numbered windows of tokens: window `n` is a function of the
/// seed and `n` alone, so there is no position to keep.
#[derive(Clone, Debug)]
pub struct Corpus {
    language: Language,
    split: Split,
    mixture: Mixture,
    seed: u64,
}

impl Corpus {
    /// A corpus over one side of the split. Refuses a mixture with a negative weight or none above
    /// zero.
    pub fn new(language: Language, split: Split, mixture: Mixture, seed: u64) -> Result<Self> {
        for kind in Kind::ALL {
            let weight = mixture.weight(kind);
            if !weight.is_finite() || weight < 0.0 {
                return Err(Error::Setting {
                    name: kind.name(),
                    found: weight.to_string(),
                    expected: "a finite weight, zero or more",
                });
            }
        }
        if mixture.total() <= 0.0 {
            return Err(Error::Setting {
                name: "data.mixture",
                found: "no weight above zero".into(),
                expected: "at least one kind with a weight above zero",
            });
        }
        Ok(Self {
            language,
            split,
            mixture,
            seed,
        })
    }

    /// The language of the corpus.
    pub fn language(&self) -> &Language {
        &self.language
    }

    /// The endless sequence of sentences of which window `index` is the beginning.
    pub fn sentences(&self, index: u64) -> impl Iterator<Item = Sentence> + '_ {
        let mut generator = generator(self.seed);
        generator.set_stream(index);
        std::iter::repeat_with(move || {
            let kind = self.mixture.draw(&mut generator);
            self.language.sentence(kind, self.split, &mut generator)
        })
    }

    /// Window `index`: exactly `length` tokens of whole sentences, each after a
    /// [`START`](super::START), the last one cut where the window ends.
    pub fn window(&self, index: u64, length: usize) -> Result<Vec<u32>> {
        let mut tokens = Vec::with_capacity(length);
        let mut sentences = self.sentences(index);
        while tokens.len() < length
            && let Some(sentence) = sentences.next()
        {
            tokens.extend(sentence.tokens(&self.language.vocabulary)?);
        }
        tokens.truncate(length);
        Ok(tokens)
    }
}
