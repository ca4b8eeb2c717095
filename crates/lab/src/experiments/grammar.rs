//! Sentences whose verb agrees with a subject that is known.
//!
//! ```text
//! S  -> the N (PP | RC)* V the N .
//! PP -> P the N        RC -> that the N V
//! ```
//!
//! Nouns and verbs have a singular and a plural; a verb has the number of its subject, that of a
//! relative clause the number of the noun before it. All other words, and the number of every noun
//! but the subject, tell nothing of the main verb's number. A noun between subject and verb whose
//! number is not the subject's is an *attractor*.

use lapidary_train::Generator;
use lapidary_train::data::{Batch, IGNORE, Task};
use rand::RngExt;

/// The token at the start of every sentence.
pub const START: u32 = 0;
const STOP: u32 = 1;
const THE: u32 = 2;
const THAT: u32 = 3;
const PREPOSITIONS: u32 = 4;
const PREPOSITION_COUNT: u32 = 6;
const NOUNS: u32 = PREPOSITIONS + PREPOSITION_COUNT;
const NOUN_COUNT: u32 = 60;
const VERBS: u32 = NOUNS + 2 * NOUN_COUNT;
const VERB_COUNT: u32 = 40;
/// Number of token ids.
pub const VOCABULARY: usize = (VERBS + 2 * VERB_COUNT) as usize;
/// Most phrases between subject and verb.
pub const MOST_PHRASES: usize = 3;
/// Where the subject stands.
pub const SUBJECT: usize = 2;

/// A sentence up to its verb, and the verb.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Agreement {
    /// [`START`], the subject at [`SUBJECT`], and what stands before the verb.
    pub prefix: Vec<u32>,
    /// The verb that follows.
    pub verb: u32,
    /// The same verb in the other number.
    pub wrong: u32,
}

/// Words in one number, 0 or 1, of the lemmas that start at `first`.
fn word(first: u32, count: u32, number: u32, generator: &mut Generator) -> u32 {
    first + 2 * generator.random_range(0..count) + number
}

/// A sentence with as many phrases between subject and verb as `numbers` has entries, each the
/// number of its noun relative to the subject's: `true` for an attractor.
fn agreement(attracts: &[bool], generator: &mut Generator) -> Agreement {
    let subject = generator.random_range(0..2);
    let mut prefix = vec![START, THE, word(NOUNS, NOUN_COUNT, subject, generator)];
    for attracts in attracts {
        let number = if *attracts { 1 - subject } else { subject };
        let is_clause = generator.random_bool(0.5);
        prefix.push(match is_clause {
            true => THAT,
            false => PREPOSITIONS + generator.random_range(0..PREPOSITION_COUNT),
        });
        prefix.push(THE);
        prefix.push(word(NOUNS, NOUN_COUNT, number, generator));
        if is_clause {
            prefix.push(word(VERBS, VERB_COUNT, number, generator));
        }
    }
    let verb = word(VERBS, VERB_COUNT, subject, generator);
    Agreement {
        prefix,
        verb,
        wrong: VERBS + ((verb - VERBS) ^ 1),
    }
}

/// A sentence whose phrases are all attractors.
pub fn attracted(attractors: usize, generator: &mut Generator) -> Agreement {
    agreement(&vec![true; attractors], generator)
}

/// A whole sentence, each noun between subject and verb an attractor or not at random.
pub fn sentence(generator: &mut Generator) -> Vec<u32> {
    let phrases = generator.random_range(0..=MOST_PHRASES);
    let attracts: Vec<bool> = (0..phrases).map(|_| generator.random_bool(0.5)).collect();
    let Agreement {
        mut prefix, verb, ..
    } = agreement(&attracts, generator);
    let number = generator.random_range(0..2);
    let object = word(NOUNS, NOUN_COUNT, number, generator);
    prefix.extend([verb, THE, object, STOP]);
    prefix
}

/// Tokens of the longest sentence but the last, which predicts nothing.
pub const LONGEST: usize = SUBJECT + 1 + 4 * MOST_PHRASES + 3;

/// Rows of one sentence each, so that a sentence starts where it does when it is explained.
#[derive(Clone, Copy, Debug)]
pub struct Sentences;

impl Task for Sentences {
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
            let row = sentence(generator);
            let rest = |of: u32| std::iter::repeat(of);
            let inputs = row.iter().copied().chain(rest(STOP));
            let targets = row.iter().copied().skip(1).chain(rest(IGNORE));
            batch.inputs.extend(inputs.take(length));
            batch.targets.extend(targets.take(length));
            batch.rows += 1;
        }
        Ok(batch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(token: u32) -> u32 {
        (token - NOUNS) % 2
    }

    #[test]
    fn verbs_agree_with_their_subjects() {
        let mut generator = lapidary_train::generator(1);
        for attractors in 0..=MOST_PHRASES {
            for _ in 0..100 {
                let one = attracted(attractors, &mut generator);
                let subject = number(one.prefix[SUBJECT]);
                assert!((VERBS..VOCABULARY as u32).contains(&one.verb));
                assert_eq!(number(one.verb), subject);
                assert_eq!(one.wrong / 2, one.verb / 2);
                assert_ne!(one.wrong, one.verb);
                let others = &one.prefix[SUBJECT + 1..];
                let nouns: Vec<u32> = others
                    .iter()
                    .copied()
                    .filter(|token| (NOUNS..VERBS).contains(token))
                    .collect();
                assert_eq!(nouns.len(), attractors);
                assert!(nouns.iter().all(|noun| number(*noun) != subject));
                // Verbs of relative clauses follow their noun's number.
                for pair in others.windows(2).filter(|pair| pair[1] >= VERBS) {
                    assert_eq!(number(pair[0]), number(pair[1]));
                }
            }
        }
    }

    #[test]
    fn the_numbers_of_other_nouns_tell_nothing() {
        let mut generator = lapidary_train::generator(2);
        let (mut same, mut all) = (0, 0);
        for _ in 0..4000 {
            let sentence = sentence(&mut generator);
            assert_eq!((sentence[0], sentence[sentence.len() - 1]), (START, STOP));
            let nouns = sentence
                .iter()
                .filter(|token| (NOUNS..VERBS).contains(token));
            let subject = number(sentence[SUBJECT]);
            for noun in nouns.skip(1) {
                all += 1;
                same += u32::from(number(*noun) == subject);
            }
        }
        let share = f64::from(same) / f64::from(all);
        assert!((share - 0.5).abs() < 0.02, "{share}");
    }

    #[test]
    fn rows_are_whole_sentences_from_their_start() {
        let batch = Sentences
            .batch(&mut lapidary_train::generator(3), 40, LONGEST)
            .unwrap();
        assert_eq!(batch.inputs.len(), 40 * LONGEST);
        assert_eq!(batch.targets.len(), 40 * LONGEST);
        let rows = batch.inputs.chunks(LONGEST);
        for (inputs, targets) in rows.zip(batch.targets.chunks(LONGEST)) {
            let last = targets
                .iter()
                .rposition(|target| *target != IGNORE)
                .unwrap();
            assert_eq!((inputs[0], targets[last]), (START, STOP));
            assert_eq!(inputs[1..=last], targets[..last]);
        }
    }
}
