//! A grammar of questions: a sentence, what is asked for, and the sentence or its question.
//!
//! `S . decl S .` or `S . quest Q ?` with `S = NP MOD AUX V NP`, `Q = AUX NP MOD V NP`: the auxiliary
//! of the main clause, not the first one, goes to the front (McCoy, Frank & Linzen, Does syntax need
//! to grow on trees?, 2020, arXiv 2001.03632). Modifiers are prepositional phrases and relative
//! clauses. Each token comes with `−ln p` given all before it, so that the least loss that any
//! predictor can have on a text is known exactly.

use lapidary_train::Generator;
use lapidary_train::data::{Batch, IGNORE, Task};
use rand::RngExt;

const DETERMINERS: u32 = 4;
const NOUNS: u32 = 24;
const PREPOSITIONS: u32 = 6;
const AUXILIARIES: u32 = 4;
const VERBS: u32 = 20;
/// Where each class of words begins.
const NOUN: u32 = DETERMINERS;
const PREPOSITION: u32 = NOUN + NOUNS;
const AUXILIARY: u32 = PREPOSITION + PREPOSITIONS;
const VERB: u32 = AUXILIARY + AUXILIARIES;
const THAT: u32 = VERB + VERBS;
const STOP: u32 = THAT + 1;
const ASKED: u32 = THAT + 2;
const DECLARATIVE: u32 = THAT + 3;
const QUEST: u32 = THAT + 4;
/// Words and marks.
pub(super) const VOCABULARY: usize = QUEST as usize + 1;

/// Probability of a further modifier, of at most [`MODIFIERS`]; half are relative clauses.
const MODIFIED: f64 = 0.4;
const MODIFIERS: usize = 2;

/// Tokens with what each says that was not known before, in nats.
#[derive(Default)]
pub(super) struct Text {
    pub(super) tokens: Vec<u32>,
    pub(super) surprise: Vec<f64>,
}

impl Text {
    fn push(&mut self, token: u32, surprise: f64) {
        self.tokens.push(token);
        self.surprise.push(surprise);
    }

    /// One of a class of words, all equally likely, after a decision of this surprise.
    fn word(&mut self, first: u32, count: u32, decision: f64, generator: &mut Generator) -> u32 {
        let token = first + generator.random_range(0..count);
        self.push(token, decision + f64::from(count).ln());
        token
    }

    fn noun_phrase(&mut self, generator: &mut Generator) {
        self.word(0, DETERMINERS, 0.0, generator);
        self.word(NOUN, NOUNS, 0.0, generator);
    }

    /// A declarative sentence without its stop, and where its main auxiliary stands.
    fn sentence(&mut self, generator: &mut Generator) -> usize {
        self.noun_phrase(generator);
        let mut ends = 0.0;
        for _ in 0..MODIFIERS {
            if !generator.random_bool(MODIFIED) {
                ends = -(1.0 - MODIFIED).ln();
                break;
            }
            let decision = -(MODIFIED / 2.0).ln();
            if generator.random_bool(0.5) {
                self.word(PREPOSITION, PREPOSITIONS, decision, generator);
            } else {
                self.push(THAT, decision);
                self.word(AUXILIARY, AUXILIARIES, 0.0, generator);
                self.word(VERB, VERBS, 0.0, generator);
            }
            self.noun_phrase(generator);
        }
        let main = self.tokens.len();
        self.word(AUXILIARY, AUXILIARIES, ends, generator);
        self.word(VERB, VERBS, 0.0, generator);
        self.noun_phrase(generator);
        main
    }

    /// A sentence, a mark, and the sentence or its question.
    fn pair(&mut self, generator: &mut Generator) {
        let start = self.tokens.len();
        let main = self.sentence(generator);
        let mut copied = self.tokens.get(start..).unwrap_or_default().to_vec();
        self.push(STOP, 0.0);
        let asked = generator.random_bool(0.5);
        self.push(if asked { QUEST } else { DECLARATIVE }, 2f64.ln());
        if asked {
            copied
                .get_mut(..=main - start)
                .unwrap_or_default()
                .rotate_right(1);
        }
        // All of the rest follows from what came before.
        for token in copied {
            self.push(token, 0.0);
        }
        self.push(if asked { ASKED } else { STOP }, 0.0);
    }

    /// Pairs, from the beginning of one, cut at `length`.
    pub(super) fn window(length: usize, generator: &mut Generator) -> Self {
        let mut text = Self::default();
        while text.tokens.len() < length {
            text.pair(generator);
        }
        text.tokens.truncate(length);
        text.surprise.truncate(length);
        text
    }
}

/// Windows to train on: some, over and over, or new ones for ever.
pub(super) enum Windows {
    Fixed(Vec<Vec<u32>>),
    New,
}

impl Task for Windows {
    fn vocabulary(&self) -> usize {
        VOCABULARY
    }

    fn batch(
        &mut self,
        generator: &mut Generator,
        rows: usize,
        length: usize,
    ) -> lapidary_train::Result<Batch> {
        let mut batch = Batch::with_capacity(rows, length);
        for _ in 0..rows {
            let window = match self {
                Self::New => Text::window(length, generator).tokens,
                Self::Fixed(windows) => {
                    let index = generator.random_range(0..windows.len().max(1));
                    windows.get(index).cloned().unwrap_or_default()
                }
            };
            let targets = window
                .iter()
                .skip(1)
                .copied()
                .chain(std::iter::repeat(IGNORE));
            batch.targets.extend(targets.take(length));
            batch.inputs.extend(
                window
                    .iter()
                    .copied()
                    .chain(std::iter::repeat(STOP))
                    .take(length),
            );
            batch.rows += 1;
        }
        Ok(batch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lapidary_train::generator;
    use std::collections::HashMap;

    #[test]
    fn the_main_auxiliary_goes_to_the_front_and_the_rest_is_known() {
        let mut rng = generator(1);
        let mut moved_past_another = false;
        for _ in 0..200 {
            let mut text = Text::default();
            text.pair(&mut rng);
            let stop = text.tokens.iter().position(|t| *t == STOP).unwrap();
            let (sentence, rest) = text.tokens.split_at(stop);
            let second = &rest[2..rest.len() - 1];
            assert_eq!(sentence.len(), second.len());
            let is_auxiliary = |t: &u32| (AUXILIARY..VERB).contains(t);
            if rest[1] == DECLARATIVE {
                assert_eq!(sentence, second);
            } else {
                // The main auxiliary is the last one.
                let main = sentence.iter().rposition(is_auxiliary).unwrap();
                assert_eq!(second[0], sentence[main]);
                let mut left = sentence.to_vec();
                left.remove(main);
                assert_eq!(left, second[1..]);
                moved_past_another |= sentence[..main].iter().any(is_auxiliary);
            }
            assert!(text.surprise[stop + 2..].iter().all(|s| *s == 0.0));
        }
        assert!(moved_past_another);
    }

    /// The surprise of a token is what counting says: here of what follows the first noun.
    #[test]
    fn surprises_are_those_of_frequencies() {
        let mut rng = generator(2);
        let (mut counts, mut told) = (HashMap::new(), HashMap::new());
        let draws = 40_000;
        for _ in 0..draws {
            let text = Text::window(3, &mut rng);
            *counts.entry(text.tokens[2]).or_insert(0u32) += 1;
            told.insert(text.tokens[2], text.surprise[2]);
        }
        let total: f64 = told.values().map(|s| (-s).exp()).sum();
        assert!((total - 1.0).abs() < 1e-9, "{total}");
        for (token, count) in counts {
            let share = f64::from(count) / f64::from(draws);
            assert!((share - (-told[&token]).exp()).abs() < 0.015);
        }
    }
}
