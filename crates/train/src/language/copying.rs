//! Copying the one of two names that has not been repeated.

use rand::RngExt;

use super::words::{NAMES, OBJECTS, PLACES};
use super::{Kind, Sentence, Split, draw_on, pick, two_of};
use crate::Generator;

/// `when bob and alice went to the park , bob gave the map to alice .` or
/// `alice told bob about the map , then bob gave it to alice .`
///
/// Either name may stand first, so that order alone does not tell which is repeated.
pub(super) fn name(split: Split, generator: &mut Generator) -> Sentence {
    let ((giver, receiver), combination) = draw_on(
        split,
        generator,
        |generator| {
            let (giver, receiver) = two_of(NAMES.len(), generator);
            (NAMES[giver], NAMES[receiver])
        },
        |&(giver, receiver)| format!("names {} {}", giver.min(receiver), giver.max(receiver)),
    );
    let receiver_first = generator.random_bool(0.5);
    let (first, second) = if receiver_first {
        (receiver, giver)
    } else {
        (giver, receiver)
    };
    let object = pick(&OBJECTS, generator);

    let (mut words, first_mention, repeated) = if generator.random_bool(0.5) {
        let place = pick(&PLACES, generator);
        let words = vec![
            "when", first, "and", second, "went", "to", "the", place, ",", giver, "gave", "the",
            object, "to",
        ];
        (words, if receiver_first { 1 } else { 3 }, 9)
    } else {
        let words = vec![
            first, "told", second, "about", "the", object, ",", "then", giver, "gave", "it", "to",
        ];
        (words, if receiver_first { 0 } else { 2 }, 8)
    };
    let target = words.len();
    words.extend([receiver, "."]);
    Sentence {
        words,
        kind: Kind::NameCopy,
        target,
        foil: giver,
        evidence: vec![first_mention, repeated],
        combination,
    }
}
