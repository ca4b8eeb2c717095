//! Indirect object identification.

use super::{Generated, Prompt, Read, one_of, usable, usable_templates};
use crate::{Error, Result};
use lapidary_model::Tokenizer;
use rand_chacha::ChaCha8Rng;

/// Each text is two templates: the indirect object is named first in the one with an even number,
/// second in the other, so that a template has each role at one position.
pub(super) const TEMPLATES: usize = 2 * TEXTS.len();

/// `A` and `B` are the people in order, `S` the one named again, `P` a place and `O` an object.
const TEXTS: [&str; 6] = [
    "When {A} and {B} arrived at the {P}, {S} handed a {O} to",
    "After {A} and {B} left the {P}, {S} offered a {O} to",
    "While {A} and {B} waited near the {P}, {S} showed a {O} to",
    "Then {A} and {B} met at the {P}, and {S} gave a {O} to",
    "Once {A} and {B} had walked to the {P}, {S} passed a {O} to",
    "Yesterday {A} and {B} drove to the {P}, where {S} lent a {O} to",
];

const NAMES: [&str; 32] = [
    "Mary", "John", "Tom", "Anna", "Paul", "Laura", "Kevin", "Sarah", "David", "Emma", "Peter",
    "Alice", "Mark", "Julia", "James", "Kate", "Simon", "Helen", "George", "Rachel", "Adam",
    "Lisa", "Daniel", "Jane", "Robert", "Lucy", "Martin", "Rose", "Andrew", "Maria", "Michael",
    "Amy",
];

const PLACES: [&str; 12] = [
    "school", "market", "station", "garden", "office", "library", "beach", "farm", "hotel",
    "museum", "river", "church",
];

const OBJECTS: [&str; 12] = [
    "book", "ring", "letter", "key", "drink", "ball", "map", "card", "lamp", "coat", "gift",
    "phone",
];

/// What is filled into a template.
#[derive(Clone, Copy)]
struct Words<'a> {
    first: &'a str,
    second: &'a str,
    again: &'a str,
    place: &'a str,
    object: &'a str,
}

pub(super) fn generate(
    tokenizer: &Tokenizer,
    template: Option<usize>,
    count: usize,
    generator: &mut ChaCha8Rng,
) -> Result<Generated> {
    let mut notes = Vec::new();
    let names = usable(tokenizer, "names", &NAMES, 3, &mut notes)?;
    let places = usable(tokenizer, "places", &PLACES, 1, &mut notes)?;
    let objects = usable(tokenizer, "objects", &OBJECTS, 1, &mut notes)?;
    let reads = |template: usize| match (names.as_slice(), places.first(), objects.first()) {
        ([first, second, ..], Some(place), Some(object)) => {
            let words = Words {
                first,
                second,
                again: second,
                place,
                object,
            };
            prompt(tokenizer, template, words).is_some()
        }
        _ => false,
    };
    let templates = usable_templates(TEMPLATES, template, reads, &mut notes)?;
    let mut generated = Generated {
        notes,
        ..Generated::default()
    };
    for _ in 0..count {
        let template = *one_of(&templates, generator)?;
        let drawn = rand::seq::index::sample(generator, names.len(), 3);
        let name = |index: usize| names.get(drawn.index(index)).copied().unwrap_or_default();
        let (first, second) = (name(0), name(1));
        let again = if template % 2 == 0 { second } else { first };
        let words = Words {
            first,
            second,
            again,
            place: one_of(&places, generator)?,
            object: one_of(&objects, generator)?,
        };
        let made = |words| {
            prompt(tokenizer, template, words).ok_or_else(|| {
                let expected = "with each name as one token";
                Error::invalid("a prompt", filled(template, words).0, expected)
            })
        };
        generated.prompts.push(made(words)?);
        // A third person in place of the one named again: nobody is named twice.
        generated.reference.push(made(Words {
            again: name(2),
            ..words
        })?);
    }
    Ok(generated)
}

/// The text, and where the names start in it.
fn filled(template: usize, words: Words<'_>) -> (String, [usize; 3]) {
    let mut text = String::new();
    let mut starts = [0; 3];
    let mut rest = TEXTS.get(template / 2).copied().unwrap_or_default();
    while let Some((before, after)) = rest.split_once('{') {
        text += before;
        let (key, after) = after.split_once('}').unwrap_or(("", after));
        let (word, place) = match key {
            "A" => (words.first, Some(0)),
            "B" => (words.second, Some(1)),
            "S" => (words.again, Some(2)),
            "P" => (words.place, None),
            _ => (words.object, None),
        };
        if let Some(start) = place.and_then(|place| starts.get_mut(place)) {
            *start = text.len();
        }
        text += word;
        rest = after;
    }
    (text + rest, starts)
}

/// `None` where a name is not one token, or the answer is not.
fn prompt(tokenizer: &Tokenizer, template: usize, words: Words<'_>) -> Option<Prompt> {
    let (text, [first, second, again]) = filled(template, words);
    let read = Read::new(tokenizer, &text)?;
    let at = |start: usize, name: &str| read.only(tokenizer, &text, start..start + name.len());
    let first = at(first, words.first)?;
    let second = at(second, words.second)?;
    let again = at(again, words.again)?;
    let (subject, object) = match words.again == words.first {
        true => (first, second),
        false => (second, first),
    };
    // The names as they follow the text: elsewhere they may be other tokens, as at its start.
    let answer = |name: &str| {
        let whole = format!("{text} {name}");
        let longer = Read::new(tokenizer, &whole)?;
        let position = longer.only(tokenizer, &whole, text.len() + 1..whole.len())?;
        let follows = longer.ids.get(..position)? == read.ids.as_slice();
        follows.then(|| longer.ids.get(position).map(|id| *id as usize))?
    };
    let (right, wrong) = match words.again == words.first {
        true => (answer(words.second)?, answer(words.first)?),
        false => (answer(words.first)?, answer(words.second)?),
    };
    let end = read.ids.len().checked_sub(1)?;
    Some(Prompt {
        right: vec![right],
        wrong: vec![wrong],
        pair: (right, wrong),
        roles: vec![
            ("IO", object),
            ("S1", subject),
            ("S1+1", subject + 1),
            ("S2", again),
            ("END", end),
        ],
        evidence: "IO",
        template,
        special: read.special,
        ids: read.ids,
        text,
    })
}
