//! The language keeps its grammar, as seen by a reader who knows only the words.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use lapidary_train::language::{Corpus, Kind, Language, Mixture, Sentence, Split, Vocabulary};
use lapidary_train::{Generator, generator};

const SPLITS: [Split; 2] = [Split::Training, Split::HeldOut];

fn sample(kind: Kind, split: Split, count: usize) -> Vec<Sentence> {
    let language = Language::new(1);
    let mut generator: Generator = generator(kind as u64 + 100);
    (0..count)
        .map(|_| language.sentence(kind, split, &mut generator))
        .collect()
}

/// A second reading of the grammar, from the words up to the target alone. It shares no table with
/// the generator: number is in the letters of a word, gender in the list below.
mod reader {
    const MASCULINE: [&str; 16] = [
        "king",
        "boy",
        "father",
        "brother",
        "uncle",
        "son",
        "nephew",
        "monk",
        "wizard",
        "lord",
        "husband",
        "grandfather",
        "knight",
        "groom",
        "hero",
        "cowboy",
    ];

    pub fn is_plural(noun: &str) -> bool {
        noun.ends_with('s')
    }

    /// The head of the subject is the word after the first `the`.
    fn head<'a>(words: &[&'a str]) -> &'a str {
        words[1 + words.iter().position(|&w| w == "the").unwrap()]
    }

    pub fn verb_fits(before: &[&str], verb: &str) -> bool {
        let verb_is_singular = verb == "is" || verb.ends_with('s');
        verb_is_singular != is_plural(head(before))
    }

    pub fn reflexive(before: &[&str]) -> &'static str {
        let head = head(before);
        match (is_plural(head), MASCULINE.contains(&head)) {
            (true, _) => "themselves",
            (false, true) => "himself",
            (false, false) => "herself",
        }
    }

    /// `.. NAME lives in VALUE .. so NAME sleeps in`, or the same with boxes and their colours.
    pub fn stated(before: &[&str]) -> String {
        let so = before.iter().position(|&w| w == "so").unwrap();
        let (facts, question) = (&before[..so], &before[so + 1..]);
        let (asked, offset) = match question {
            [name, "sleeps", "in"] => (*name, 3),
            ["the", _, "of", name, "is"] => (*name, 3),
            other => panic!("not a question: {other:?}"),
        };
        let mention = facts.iter().position(|&w| w == asked).unwrap();
        facts[mention + offset].to_string()
    }

    /// Of the two names, the one that is said once: names are the words that a list of all others
    /// does not have.
    pub fn unrepeated<'a>(before: &[&'a str]) -> &'a str {
        let (first, second) = if before[0] == "when" {
            (before[1], before[3])
        } else {
            (before[0], before[2])
        };
        let count = |name| before.iter().filter(|&&w| w == name).count();
        assert_eq!(count(first) + count(second), 3);
        if count(first) == 1 { first } else { second }
    }

    /// The bracket that must close next, and where it was opened.
    pub fn open_bracket(words: &[&str]) -> (&'static str, usize) {
        let mut open = Vec::new();
        for (position, &word) in words.iter().enumerate() {
            match word {
                "(" => open.push((")", position)),
                "[" => open.push(("]", position)),
                "{" => open.push(("}", position)),
                ")" | "]" | "}" => assert_eq!(open.pop().unwrap().0, word),
                _ => assert!(!open.is_empty(), "{word} is outside all brackets"),
            }
        }
        open.pop().unwrap()
    }
}

#[test]
fn every_sentence_is_well_formed() {
    let vocabulary = Vocabulary::new();
    for kind in Kind::ALL {
        for split in SPLITS {
            for sentence in sample(kind, split, 500) {
                assert_eq!(sentence.kind, kind);
                assert_eq!(sentence.words.last(), Some(&"."));
                assert_eq!(sentence.words.iter().filter(|&&w| w == ".").count(), 1);
                assert_ne!(sentence.target_word(), sentence.foil);
                assert!(!sentence.evidence.is_empty());
                assert!(sentence.evidence.is_sorted());
                assert!(sentence.evidence.iter().all(|&e| e < sentence.target));
                assert!(vocabulary.identifier(sentence.foil).is_ok());
                let tokens = sentence.tokens(&vocabulary).unwrap();
                assert_eq!(vocabulary.decode(&tokens[1..]).unwrap(), sentence.text());
                assert_eq!(vocabulary.encode(&sentence.text()).unwrap(), tokens[1..]);
            }
        }
    }
}

#[test]
fn verbs_agree_with_the_head_and_with_nothing_else() {
    // By whether the head and the noun nearest to the verb are plural.
    let mut together = [[0i32; 2]; 2];
    for split in SPLITS {
        for sentence in sample(Kind::NumberAgreement, split, 1000) {
            let before = sentence.prefix();
            assert!(
                reader::verb_fits(before, sentence.target_word()),
                "{sentence:?}"
            );
            assert!(!reader::verb_fits(before, sentence.foil), "{sentence:?}");
            assert_eq!(sentence.evidence, [1]);
            let head = before[1];
            let others: Vec<&str> = before
                .windows(2)
                .skip(1)
                .filter(|pair| pair[0] == "the")
                .map(|pair| pair[1])
                .collect();
            assert!(!others.is_empty(), "no distractor: {sentence:?}");
            let nearest = reader::is_plural(others[others.len() - 1]);
            together[usize::from(reader::is_plural(head))][usize::from(nearest)] += 1;
        }
    }
    // 500 in each cell, standard deviation 19: the distractor tells nothing about the head.
    for count in together.into_iter().flatten() {
        assert!((count - 500).abs() < 90, "{together:?}");
    }
}

#[test]
fn reflexives_agree_with_the_head_and_foils_with_a_distractor() {
    let mut attracted = 0;
    for split in SPLITS {
        for sentence in sample(Kind::ReflexiveAgreement, split, 1000) {
            let before = sentence.prefix();
            assert_eq!(
                reader::reflexive(before),
                sentence.target_word(),
                "{sentence:?}"
            );
            assert_eq!(sentence.evidence, [1]);
            let misleading = before
                .windows(2)
                .skip(1)
                .filter(|pair| pair[0] == "the")
                .map(reader::reflexive)
                .rfind(|reflexive| *reflexive != sentence.target_word());
            if let Some(misleading) = misleading {
                assert_eq!(misleading, sentence.foil, "{sentence:?}");
                attracted += 1;
            }
        }
    }
    assert!((1300..1800).contains(&attracted), "{attracted} of 2000");
}

#[test]
fn learned_facts_are_those_of_the_table() {
    let language = Language::new(1);
    let table: HashMap<(&str, &str), &str> = language
        .facts()
        .all()
        .map(|(country, relation, value)| ((country, relation), value))
        .collect();
    assert_eq!(table.len(), 48);
    assert_eq!(
        table.values().collect::<HashSet<_>>().len(),
        48,
        "values differ"
    );
    for split in SPLITS {
        for sentence in sample(Kind::LearnedFact, split, 1000) {
            let [position] = sentence.evidence[..] else {
                panic!("one country is the evidence: {sentence:?}");
            };
            let country = sentence.words[position];
            let relation = ["capital", "river"]
                .into_iter()
                .find(|relation| sentence.words.contains(relation))
                .unwrap();
            assert_eq!(table[&(country, relation)], sentence.target_word());
            let foil_country = table
                .iter()
                .find(|((_, r), value)| *r == relation && **value == sentence.foil)
                .unwrap()
                .0
                .0;
            assert_ne!(foil_country, country);
            if sentence.words[0] == "unlike" {
                assert_eq!(sentence.words[1], foil_country);
            }
            assert!(!sentence.prefix().contains(&sentence.target_word()));
        }
    }
    let other: Vec<_> = Language::new(2).facts().all().map(|f| f.2).collect();
    let same: Vec<_> = language.facts().all().map(|f| f.2).collect();
    assert_ne!(same, other, "the seed decides the table");
}

#[test]
fn facts_in_context_are_those_stated() {
    for split in SPLITS {
        for sentence in sample(Kind::ContextFact, split, 1000) {
            let before = sentence.prefix();
            let target = sentence.target_word();
            assert_eq!(reader::stated(before), target, "{sentence:?}");
            assert!(before.contains(&sentence.foil));
            let [value, asked] = sentence.evidence[..] else {
                panic!("a value and a name are the evidence: {sentence:?}");
            };
            assert_eq!(sentence.words[value], target);
            // Asking about the other person makes the foil right.
            let other = before
                .windows(4)
                .find(|w| w[3] == sentence.foil && (w[1] == "lives" || w[1] == "picks"))
                .unwrap()[0];
            let mut asking_other = before.to_vec();
            asking_other[asked] = other;
            assert_eq!(reader::stated(&asking_other), sentence.foil);
        }
    }
}

#[test]
fn the_name_to_copy_is_the_one_not_repeated() {
    for split in SPLITS {
        for sentence in sample(Kind::NameCopy, split, 1000) {
            let before = sentence.prefix();
            assert_eq!(reader::unrepeated(before), sentence.target_word());
            let [mention, repeated] = sentence.evidence[..] else {
                panic!("two mentions are the evidence: {sentence:?}");
            };
            assert_eq!(before[mention], sentence.target_word());
            assert_eq!(before[repeated], sentence.foil);
            assert_eq!(
                before.iter().rposition(|&w| w == sentence.foil),
                Some(repeated)
            );
            let mut other = before.to_vec();
            other[repeated] = sentence.target_word();
            assert_eq!(reader::unrepeated(&other), sentence.foil);
        }
    }
}

#[test]
fn brackets_balance_and_the_target_closes_the_evidence() {
    for split in SPLITS {
        for sentence in sample(Kind::Brackets, split, 1000) {
            let (closing, opened) = reader::open_bracket(sentence.prefix());
            assert_eq!(closing, sentence.target_word());
            assert_eq!(sentence.evidence, [opened]);
            let all = &sentence.words[..sentence.words.len() - 1];
            let count = |set: [&str; 3]| all.iter().filter(|w| set.contains(*w)).count();
            assert_eq!(count(["(", "[", "{"]), count([")", "]", "}"]));
            assert!(count(["(", "[", "{"]) >= 2);
            reader::open_bracket(&all[..all.len() - 1]);
        }
    }
}

#[test]
fn either_word_of_a_pair_is_the_target_equally_often() {
    for kind in Kind::ALL {
        // First of the two words in the order of the alphabet: how often it is target, and foil.
        let mut pairs: BTreeMap<(&str, &str), (usize, usize)> = BTreeMap::new();
        for sentence in sample(kind, Split::Training, 20_000) {
            let (target, foil) = (sentence.target_word(), sentence.foil);
            let counts = pairs
                .entry((target.min(foil), target.max(foil)))
                .or_default();
            if target < foil {
                counts.0 += 1;
            } else {
                counts.1 += 1;
            }
        }
        // Sum of squared standard scores: chi-squared with one degree of freedom per pair.
        let chi_squared: f64 = pairs
            .values()
            .map(|&(a, b)| (a as f64 - b as f64).powi(2) / (a + b) as f64)
            .sum();
        let freedom = pairs.len() as f64;
        let limit = freedom + 4.0 * (2.0 * freedom).sqrt() + 4.0;
        assert!(
            chi_squared < limit,
            "{kind:?}: {chi_squared} over {freedom} pairs"
        );
    }
}

#[test]
fn held_out_combinations_are_never_in_training() {
    let mut sides: [BTreeSet<String>; 2] = Default::default();
    for kind in Kind::ALL {
        for (side, split) in sides.iter_mut().zip(SPLITS) {
            side.extend(sample(kind, split, 4000).into_iter().map(|s| s.combination));
        }
    }
    assert!(sides[0].is_disjoint(&sides[1]));
    assert!(sides[1].len() > 300, "only {} are held out", sides[1].len());
}

/// The same by the words themselves, where a combination could come in by another door.
#[test]
fn held_out_pairs_are_not_in_any_training_sentence() {
    let pairs = |split| {
        let mut pairs = BTreeSet::new();
        for s in sample(Kind::ContextFact, split, 4000) {
            let asked_only = split == Split::HeldOut;
            for w in s
                .words
                .windows(4)
                .filter(|w| w[1] == "lives" || w[1] == "picks")
            {
                if !asked_only || w[3] == s.target_word() {
                    pairs.insert((w[0], w[3]));
                }
            }
        }
        pairs
    };
    assert!(pairs(Split::Training).is_disjoint(&pairs(Split::HeldOut)));

    let subjects = |split| {
        let subject = |s: Sentence| {
            let singular = |w: &'static str| w.strip_suffix('s').unwrap_or(w);
            let verb = match s.target_word() {
                "is" | "are" => "be",
                verb => singular(verb),
            };
            (singular(s.words[1]), verb)
        };
        let all: BTreeSet<_> = sample(Kind::NumberAgreement, split, 8000)
            .into_iter()
            .map(subject)
            .collect();
        all
    };
    assert!(subjects(Split::Training).is_disjoint(&subjects(Split::HeldOut)));
}

#[test]
fn every_fact_is_taught() {
    let taught: BTreeSet<(&str, bool)> = sample(Kind::LearnedFact, Split::Training, 3000)
        .into_iter()
        .map(|s| (s.words[s.evidence[0]], s.words.contains(&"capital")))
        .collect();
    assert_eq!(taught.len(), 48);
}

#[test]
fn the_vocabulary_is_small_and_every_word_is_used() {
    let vocabulary = Vocabulary::new();
    assert!(vocabulary.size() <= 512, "{}", vocabulary.size());
    let distinct: HashSet<_> = vocabulary.words().iter().collect();
    assert_eq!(distinct.len(), vocabulary.size());
    let mut unused = distinct;
    for kind in Kind::ALL {
        for sentence in sample(kind, Split::Training, 6000) {
            for word in &sentence.words {
                unused.remove(word);
            }
        }
    }
    assert_eq!(unused.into_iter().collect::<Vec<_>>(), [&"<start>"]);
    assert!(vocabulary.encode("the unicorn sings .").is_err());
    assert!(vocabulary.word(vocabulary.size() as u32).is_err());
}

#[test]
fn a_corpus_is_a_function_of_its_seed() {
    let corpus =
        |seed| Corpus::new(Language::new(1), Split::Training, Mixture::default(), seed).unwrap();
    let window = corpus(3).window(17, 300).unwrap();
    assert_eq!(window, corpus(3).window(17, 300).unwrap());
    assert_eq!(window[..100], corpus(3).window(17, 100).unwrap());
    assert_ne!(window, corpus(4).window(17, 300).unwrap());
    assert_ne!(window, corpus(3).window(18, 300).unwrap());

    let vocabulary = Vocabulary::new();
    let mut expected = Vec::new();
    for sentence in corpus(3).sentences(17).take(40) {
        expected.extend(sentence.tokens(&vocabulary).unwrap());
    }
    assert_eq!(window, expected[..300]);
    assert!(corpus(3).window(0, 0).unwrap().is_empty());
}

#[test]
fn a_mixture_decides_what_is_said() {
    let only_brackets = Mixture {
        number_agreement: 0.0,
        reflexive_agreement: 0.0,
        learned_fact: 0.0,
        context_fact: 1.0,
        name_copy: 0.0,
        brackets: 3.0,
    };
    let corpus = |mixture| Corpus::new(Language::new(1), Split::HeldOut, mixture, 5);
    let corpus_of_two = corpus(only_brackets).unwrap();
    let kinds: Vec<Kind> = corpus_of_two
        .sentences(0)
        .take(4000)
        .map(|s| s.kind)
        .collect();
    let brackets = kinds.iter().filter(|&&k| k == Kind::Brackets).count();
    let facts = kinds.iter().filter(|&&k| k == Kind::ContextFact).count();
    assert_eq!(brackets + facts, 4000);
    assert!((2850..3150).contains(&brackets), "{brackets}");
    let broken = |brackets| Mixture {
        brackets,
        ..Mixture::default()
    };
    assert!(corpus(broken(-1.0)).is_err());
    assert!(corpus(broken(f64::NAN)).is_err());
    let silent = Mixture {
        context_fact: 0.0,
        brackets: 0.0,
        ..only_brackets
    };
    assert!(corpus(silent).is_err());
}
