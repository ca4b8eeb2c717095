//! Agreement of a verb and of a reflexive with the head of the subject, across other nouns.

use rand::RngExt;

use super::words::{
    ADJECTIVES, COPULA, GENDERED_NOUNS, INTRANSITIVE_VERBS, NEUTRAL_NOUNS, Noun, PREPOSITIONS,
    REFLEXIVES, TRANSITIVE_VERBS,
};
use super::{Kind, Sentence, Split, draw_on, pick};
use crate::Generator;

/// Index into a [`Noun`] and into the present tense of a verb.
const SINGULAR: usize = 0;
const PLURAL: usize = 1;
/// Index of the past tense of a transitive verb, which shows no number.
const PAST: usize = 2;

/// `the farmer near the dogs sings .`
pub(super) fn number(split: Split, generator: &mut Generator) -> Sentence {
    let ((noun, verb), combination) = draw_on(
        split,
        generator,
        |generator| (any_noun(generator), main_verb(generator)),
        |(noun, verb)| format!("number {} {}", noun[SINGULAR], verb[PLURAL]),
    );
    let number = generator.random_range(SINGULAR..=PLURAL);

    let mut words = vec!["the", noun[number]];
    distract(&mut words, generator, |generator| {
        let number = generator.random_range(SINGULAR..=PLURAL);
        (any_noun(generator), number)
    });
    let target = words.len();
    words.push(verb[number]);
    if verb == COPULA {
        words.push(pick(&ADJECTIVES, generator));
    }
    words.push(".");
    Sentence {
        words,
        kind: Kind::NumberAgreement,
        target,
        foil: verb[1 - number],
        evidence: vec![1],
        combination,
    }
}

/// `the king beside the queens praised himself .`
///
/// The foil is the reflexive of the distracting noun nearest to the verb that would mislead, if
/// there is one.
pub(super) fn reflexive(split: Split, generator: &mut Generator) -> Sentence {
    let class = generator.random_range(0..REFLEXIVES.len());
    let ((noun, verb), combination) = draw_on(
        split,
        generator,
        |generator| {
            let [_, _, past] = pick(&TRANSITIVE_VERBS, generator);
            (noun_of_class(class, generator), past)
        },
        |((noun, _), verb)| format!("reflexive {} {verb}", noun[SINGULAR]),
    );
    let (head, number) = noun;

    let mut words = vec!["the", head[number]];
    let mut foil_class = (class + generator.random_range(1..REFLEXIVES.len())) % REFLEXIVES.len();
    distract(&mut words, generator, |generator| {
        let distractor_class = generator.random_range(0..REFLEXIVES.len());
        if distractor_class != class {
            foil_class = distractor_class;
        }
        noun_of_class(distractor_class, generator)
    });
    words.push(verb);
    let target = words.len();
    words.extend([REFLEXIVES[class], "."]);
    Sentence {
        words,
        kind: Kind::ReflexiveAgreement,
        target,
        foil: REFLEXIVES[foil_class],
        evidence: vec![1],
        combination,
    }
}

/// Appends one of three structures between the head noun and its verb: one to three prepositional
/// phrases; `that chased the dogs`; `that the dogs chase`. No word of it but the distracting nouns
/// and the verb that agrees with one of them shows any number, and these are independent of the
/// head: nothing but the head tells what agrees with it.
fn distract(
    words: &mut Vec<&'static str>,
    generator: &mut Generator,
    mut noun: impl FnMut(&mut Generator) -> (Noun, usize),
) {
    match generator.random_range(0..4) {
        0 => {
            let (distractor, number) = noun(generator);
            let verb = pick(&TRANSITIVE_VERBS, generator)[PAST];
            words.extend(["that", verb, "the", distractor[number]]);
        }
        1 => {
            let (distractor, number) = noun(generator);
            let verb = pick(&TRANSITIVE_VERBS, generator)[number];
            words.extend(["that", "the", distractor[number], verb]);
        }
        _ => {
            for _ in 0..generator.random_range(1..=3) {
                let (distractor, number) = noun(generator);
                words.extend([pick(&PREPOSITIONS, generator), "the", distractor[number]]);
            }
        }
    }
}

fn any_noun(generator: &mut Generator) -> Noun {
    let gendered = 2 * GENDERED_NOUNS.len();
    let index = generator.random_range(0..gendered + NEUTRAL_NOUNS.len());
    if index < gendered {
        GENDERED_NOUNS[index / 2][index % 2]
    } else {
        NEUTRAL_NOUNS[index - gendered]
    }
}

/// One of the intransitive verbs, or the copula one time in four.
fn main_verb(generator: &mut Generator) -> [&'static str; 2] {
    if generator.random_bool(0.25) {
        COPULA
    } else {
        pick(&INTRANSITIVE_VERBS, generator)
    }
}

/// A noun and the number in which its reflexive is `REFLEXIVES[class]`.
fn noun_of_class(class: usize, generator: &mut Generator) -> (Noun, usize) {
    let pair = pick(&GENDERED_NOUNS, generator);
    if class < 2 {
        (pair[class], SINGULAR)
    } else {
        (pick(&pair, generator), PLURAL)
    }
}
