//! Texts of sixteen classes in which most words mean nothing.
//!
//! A text has a subject and a manner, each one of four, and its class is the pair of both. For
//! each of the two, three words of the true group and one of another stand in it; the other
//! words are nuisance, and 60 % of the vocabulary are. One label in ten is drawn at random, so
//! that the best classifier still has a loss, and with it Fisher information.

use super::classifier::Labelled;
use lapidary_train::Generator;
use rand::RngExt;
use rand::seq::SliceRandom;

/// Number of token ids.
pub const VOCABULARY: usize = 200;
/// Number of classes.
pub const LABELS: usize = GROUPS * GROUPS;
/// Most tokens of a text, the first included.
pub const LENGTH: usize = 25;

/// The token at the start of every text; token 0 is padding.
const CLS: u32 = 1;
const GROUPS: usize = 4;
/// First words of the subjects, of the manners and of the nuisance, between which six ids are
/// unused.
const SUBJECTS: u32 = 2;
const WORDS: u32 = 9;
const MANNERS: u32 = SUBJECTS + GROUPS as u32 * WORDS;
const NUISANCE: u32 = MANNERS + GROUPS as u32 * WORDS + 6;
const TRUE_WORDS: usize = 3;
const FALSE_WORDS: usize = 1;
const NOISE: f64 = 0.1;

/// Draws `count` texts whose labels are wrong now and then.
pub fn noisy(count: usize, generator: &mut Generator) -> Vec<Labelled> {
    let mut texts = clean(count, generator);
    for text in &mut texts {
        if generator.random_bool(NOISE) {
            text.label = generator.random_range(0..LABELS as u32);
        }
    }
    texts
}

/// Draws `count` texts with their true labels.
pub fn clean(count: usize, generator: &mut Generator) -> Vec<Labelled> {
    (0..count).map(|_| text(generator)).collect()
}

fn text(generator: &mut Generator) -> Labelled {
    let subject = generator.random_range(0..GROUPS as u32);
    let manner = generator.random_range(0..GROUPS as u32);
    let mut words = Vec::new();
    for (first, group) in [(SUBJECTS, subject), (MANNERS, manner)] {
        let other = (group + generator.random_range(1..GROUPS as u32)) % GROUPS as u32;
        for (group, count) in [(group, TRUE_WORDS), (other, FALSE_WORDS)] {
            for _ in 0..count {
                words.push(first + group * WORDS + generator.random_range(0..WORDS));
            }
        }
    }
    let length = generator.random_range(12..LENGTH);
    while words.len() < length {
        words.push(generator.random_range(NUISANCE..VOCABULARY as u32));
    }
    words.shuffle(generator);
    let tokens = std::iter::once(CLS).chain(words).collect();
    Labelled {
        tokens,
        label: subject * GROUPS as u32 + manner,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_class_is_the_majority_of_both_kinds_of_word() {
        for text in clean(500, &mut lapidary_train::generator(2)) {
            assert!(text.tokens.len() <= LENGTH);
            let majority = |first: u32| {
                let count = |group: u32| {
                    let start = first + group * WORDS;
                    text.tokens
                        .iter()
                        .filter(|t| (start..start + WORDS).contains(t))
                        .count()
                };
                (0..4).max_by_key(|group| count(*group)).unwrap()
            };
            assert_eq!(text.label, 4 * majority(SUBJECTS) + majority(MANNERS));
        }
    }

    #[test]
    fn three_fifths_of_the_vocabulary_mean_nothing() {
        assert_eq!(VOCABULARY as u32 - NUISANCE, 120);
    }

    #[test]
    fn one_label_in_ten_is_redrawn() {
        let (count, seed) = (4000, 5);
        let texts = |draw: fn(usize, &mut Generator) -> Vec<Labelled>| {
            draw(count, &mut lapidary_train::generator(seed))
        };
        let wrong = texts(noisy)
            .iter()
            .zip(&texts(clean))
            .filter(|(a, b)| a != b)
            .count();
        // A tenth, of which one in sixteen is right by chance: 375.
        assert!((300..450).contains(&wrong), "{wrong}");
    }
}
