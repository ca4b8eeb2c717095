//! A small English-like language with known structure.
//!
//! Six [`Kind`]s of sentence, each with a word to predict, a foil, and the words that decide
//! between them, so that an explanation of a model's prediction can be scored against the truth:
//!
//! | kind | example, target in capitals | foil |
//! |---|---|---|
//! | number agreement | `the farmer near the dogs SINGS .` | `sing` |
//! | reflexive agreement | `the king beside the queens praised HIMSELF .` | `themselves` |
//! | learned fact | `the capital of alvonia is TARSK .` | the capital of another country |
//! | fact in context | `alice lives in kesh and bob lives in drim , so alice sleeps in KESH .` | `drim` |
//! | copying a name | `when bob and alice went to the park , bob gave the map to ALICE .` | `bob` |
//! | brackets | `( box [ cup ] lamp ) .` | `}` |
//!
//! Within every unordered pair of words, either is target and foil equally often: no unigram
//! frequency helps. The split into training and held-out is by construction: a combination of
//! words (subject and verb, name and value, two names, fact and phrasing, bracket pattern) is on
//! one side of it, for good.

mod agreement;
mod brackets;
mod copying;
mod corpus;
mod facts;
mod sentence;
mod vocabulary;
mod words;

pub use corpus::{Corpus, Mixture};
pub use facts::Facts;
pub use sentence::{Kind, Sentence, Split};
pub use vocabulary::{START, Vocabulary};

use rand::RngExt;

use crate::Generator;

/// One combination in this many is held out.
const HELD_OUT_ONE_IN: u64 = 8;

/// The language: its vocabulary and its table of facts.
#[derive(Clone, Debug)]
pub struct Language {
    vocabulary: Vocabulary,
    facts: Facts,
}

impl Language {
    /// The language in which `seed` has decided which city is whose capital.
    pub fn new(seed: u64) -> Self {
        Self {
            vocabulary: Vocabulary::new(),
            facts: Facts::new(seed),
        }
    }

    /// Its words.
    pub fn vocabulary(&self) -> &Vocabulary {
        &self.vocabulary
    }

    /// What is true in it.
    pub fn facts(&self) -> &Facts {
        &self.facts
    }

    /// A random sentence of one kind from one side of the split.
    ///
    /// ```
    /// use lapidary_train::language::{Kind, Language, Split};
    /// use lapidary_train::generator;
    ///
    /// let language = Language::new(1);
    /// let sentence = language.sentence(Kind::NameCopy, Split::Training, &mut generator(7));
    /// assert!(sentence.prefix().contains(&sentence.foil));
    /// ```
    pub fn sentence(&self, kind: Kind, split: Split, generator: &mut Generator) -> Sentence {
        match kind {
            Kind::NumberAgreement => agreement::number(split, generator),
            Kind::ReflexiveAgreement => agreement::reflexive(split, generator),
            Kind::LearnedFact => self.facts.learned(split, generator),
            Kind::ContextFact => facts::in_context(split, generator),
            Kind::NameCopy => copying::name(split, generator),
            Kind::Brackets => brackets::balanced(split, generator),
        }
    }
}

/// The side of the split a combination is on: a hash of its text, the same in every run.
fn split_of(combination: &str) -> Split {
    if stable_hash(combination).is_multiple_of(HELD_OUT_ONE_IN) {
        Split::HeldOut
    } else {
        Split::Training
    }
}

/// FNV-1a, with its bits mixed once more so that the low ones are usable.
fn stable_hash(text: &str) -> u64 {
    let hash = text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let mixed = (hash ^ (hash >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    mixed ^ (mixed >> 33)
}

/// Draws until the combination is on the side asked for. One in eight is held out, so this takes
/// eight draws on average at the most.
fn draw_on<T>(
    split: Split,
    generator: &mut Generator,
    draw: impl Fn(&mut Generator) -> T,
    combination: impl Fn(&T) -> String,
) -> (T, String) {
    loop {
        let candidate = draw(generator);
        let combination = combination(&candidate);
        if split_of(&combination) == split {
            return (candidate, combination);
        }
    }
}

/// One of several.
fn pick<T: Copy>(choices: &[T], generator: &mut Generator) -> T {
    choices[generator.random_range(0..choices.len())]
}

/// Two different indices below `count`.
fn two_of(count: usize, generator: &mut Generator) -> (usize, usize) {
    let first = generator.random_range(0..count);
    let second = (first + generator.random_range(1..count)) % count;
    (first, second)
}
