//! Facts: those that only the weights can hold, and those that the sentence states.

use rand::RngExt;
use rand::seq::SliceRandom;

use super::words::{CITIES, COLOURS, COUNTRIES, NAMES, OBJECTS, RELATIONS};
use super::{Kind, Sentence, Split, draw_on, pick, stable_hash, two_of};
use crate::{Generator, generator};

/// Ways to say a learned fact. One of them is held out for each fact.
const PHRASINGS: usize = 4;

/// The table of learned facts: every country has one capital and one river, at random.
#[derive(Clone, Debug)]
pub struct Facts {
    /// `values[relation][country]` is an index into the table of the relation.
    values: Vec<Vec<usize>>,
}

impl Facts {
    /// The table that `seed` decides.
    pub fn new(seed: u64) -> Self {
        let mut generator = generator(seed);
        let values = RELATIONS
            .iter()
            .map(|(_, table)| {
                let mut order: Vec<usize> = (0..table.len()).collect();
                order.shuffle(&mut generator);
                order
            })
            .collect();
        Self { values }
    }

    /// Every fact, as country, relation and value: `("alvonia", "capital", "tarsk")`.
    pub fn all(&self) -> impl Iterator<Item = (&'static str, &'static str, &'static str)> + '_ {
        (0..RELATIONS.len()).flat_map(move |relation| {
            COUNTRIES.iter().enumerate().map(move |(country, &name)| {
                (name, RELATIONS[relation].0, self.value(relation, country))
            })
        })
    }

    fn value(&self, relation: usize, country: usize) -> &'static str {
        RELATIONS[relation].1[self.values[relation][country]]
    }

    /// `the capital of alvonia is tarsk .`, in one of four phrasings.
    ///
    /// The foil is the same thing of another country, which the fourth phrasing names. A fact
    /// cannot be held out, but its phrasing can: each is learned from three of them.
    pub(super) fn learned(&self, split: Split, generator: &mut Generator) -> Sentence {
        let relation = generator.random_range(0..RELATIONS.len());
        let (country, other) = two_of(COUNTRIES.len(), generator);
        let (name, other_name) = (COUNTRIES[country], COUNTRIES[other]);
        let relation_name = RELATIONS[relation].0;
        let held_out =
            (stable_hash(&format!("{name} {relation_name}")) % PHRASINGS as u64) as usize;
        let phrasing = match split {
            Split::HeldOut => held_out,
            Split::Training => (held_out + generator.random_range(1..PHRASINGS)) % PHRASINGS,
        };
        let (mut words, evidence) = match phrasing {
            0 => (vec!["the", relation_name, "of", name, "is"], 3),
            1 => (vec!["in", name, "the", relation_name, "is"], 1),
            2 => (
                vec![
                    "people",
                    "from",
                    name,
                    "know",
                    "that",
                    "the",
                    relation_name,
                    "is",
                ],
                2,
            ),
            _ => (
                vec!["unlike", other_name, ",", name, "has", "the", relation_name],
                3,
            ),
        };
        let target = words.len();
        words.extend([self.value(relation, country), "."]);
        Sentence {
            words,
            kind: Kind::LearnedFact,
            target,
            foil: self.value(relation, other),
            evidence: vec![evidence],
            combination: format!("fact {name} {relation_name} {phrasing}"),
        }
    }
}

/// `alice lives in kesh and bob lives in drim , so alice sleeps in kesh .` or
/// `alice picks the red box and bob picks the blue box , so the box of alice is red .`
///
/// Two or three people; any of them is asked about; the foil is what another one has.
pub(super) fn in_context(split: Split, generator: &mut Generator) -> Sentence {
    let living = generator.random_bool(0.5);
    let values: &[&'static str] = if living { &CITIES } else { &COLOURS };
    let object = pick(&OBJECTS, generator);
    let people = generator.random_range(2..=3);
    let asked = generator.random_range(0..people);

    let mut stated: Vec<(&'static str, &'static str)> = Vec::with_capacity(people);
    let mut combination = String::new();
    for person in 0..people {
        // The other people's pairs are always from training, so that a held-out pair is in no
        // sentence of training, asked about or not.
        let side = if person == asked {
            split
        } else {
            Split::Training
        };
        let ((name, value), pair) = draw_on(
            side,
            generator,
            |generator| loop {
                let pair = (pick(&NAMES, generator), pick(values, generator));
                if stated.iter().all(|(n, v)| *n != pair.0 && *v != pair.1) {
                    break pair;
                }
            },
            |(name, value)| format!("context {name} {value}"),
        );
        stated.push((name, value));
        if person == asked {
            combination = pair;
        }
    }

    let mut words = Vec::new();
    let mut evidence = Vec::with_capacity(2);
    for (person, (name, value)) in stated.iter().enumerate() {
        match person {
            0 => {}
            last if last + 1 == people => words.push("and"),
            _ => words.push(","),
        }
        if living {
            words.extend([*name, "lives", "in", value]);
        } else {
            words.extend([*name, "picks", "the", value, object]);
        }
        if person == asked {
            evidence.push(words.len() - if living { 1 } else { 2 });
        }
    }
    let (name, value) = stated[asked];
    words.extend([",", "so"]);
    if living {
        evidence.push(words.len());
        words.extend([name, "sleeps", "in"]);
    } else {
        evidence.push(words.len() + 3);
        words.extend(["the", object, "of", name, "is"]);
    }
    let target = words.len();
    words.extend([value, "."]);
    let other = (asked + generator.random_range(1..people)) % people;
    Sentence {
        words,
        kind: Kind::ContextFact,
        target,
        foil: stated[other].1,
        evidence,
        combination,
    }
}
