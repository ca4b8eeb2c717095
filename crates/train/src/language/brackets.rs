//! Balanced brackets of three shapes, with objects between them.

use rand::RngExt;

use super::words::{BRACKETS, OBJECTS};
use super::{Kind, Sentence, Split, draw_on, pick};
use crate::Generator;

const OPEN: usize = 0;
const CLOSE: usize = 1;

/// A bracket of a pattern: its shape, and whether it opens or closes.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Bracket {
    shape: usize,
    side: usize,
}

/// `( box [ cup ] lamp ) .`
///
/// The target is any closing bracket; the foil closes another shape, one that occurs before the
/// target if there is one.
pub(super) fn balanced(split: Split, generator: &mut Generator) -> Sentence {
    let (pattern, combination) = draw_on(split, generator, pattern, |pattern| {
        let symbols = pattern.iter().map(|b| BRACKETS[b.shape][b.side]);
        format!("brackets {}", symbols.collect::<String>())
    });

    let mut words: Vec<&'static str> = Vec::new();
    let mut open: Vec<(usize, usize)> = Vec::new();
    // Closing brackets as shape, position, and position of the opening one.
    let mut closed = Vec::new();
    for bracket in &pattern {
        if bracket.side == OPEN {
            open.push((bracket.shape, words.len()));
        } else if let Some((shape, position)) = open.pop() {
            closed.push((shape, words.len(), position));
        }
        words.push(BRACKETS[bracket.shape][bracket.side]);
        if !open.is_empty() && generator.random_bool(0.5) {
            words.push(pick(&OBJECTS, generator));
        }
    }
    words.push(".");

    let (shape, target, opening) = pick(&closed, generator);
    let others: Vec<usize> = (0..BRACKETS.len()).filter(|&s| s != shape).collect();
    let present: Vec<usize> = others
        .iter()
        .copied()
        .filter(|&s| words[..target].contains(&BRACKETS[s][OPEN]))
        .collect();
    let foil = pick(
        if present.is_empty() {
            &others
        } else {
            &present
        },
        generator,
    );
    Sentence {
        words,
        kind: Kind::Brackets,
        target,
        foil: BRACKETS[foil][CLOSE],
        evidence: vec![opening],
        combination,
    }
}

/// A balanced pattern of two to five pairs inside one another or side by side, never empty at the
/// outermost level before its end.
fn pattern(generator: &mut Generator) -> Vec<Bracket> {
    let pairs = generator.random_range(2..=5);
    let mut pattern = Vec::with_capacity(2 * pairs);
    let mut open = Vec::new();
    let mut opened = 0;
    while opened < pairs || !open.is_empty() {
        // The outermost bracket closes last: until all pairs are opened, one stays open.
        let must_open = open.len() <= 1 && opened < pairs;
        if must_open || (opened < pairs && generator.random_bool(0.5)) {
            let shape = generator.random_range(0..BRACKETS.len());
            open.push(shape);
            opened += 1;
            pattern.push(Bracket { shape, side: OPEN });
        } else if let Some(shape) = open.pop() {
            pattern.push(Bracket { shape, side: CLOSE });
        }
    }
    pattern
}
