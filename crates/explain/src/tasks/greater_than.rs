//! Greater-than.

use super::{Generated, Prompt, Read, one_of, usable, usable_templates};
use crate::{Error, Result};
use lapidary_model::Tokenizer;
use rand_chacha::ChaCha8Rng;

/// `N` is what lasted, `C` the century and `Y` the year in it.
pub(super) const TEMPLATES: [&str; 3] = [
    "The {N} went on from the year {C}{Y} until the year {C}",
    "The {N} started in {C}{Y} and was over by {C}",
    "They say that the {N} lasted from {C}{Y} to {C}",
];

const NOUNS: [&str; 16] = [
    "war", "trade", "strike", "peace", "journey", "reign", "study", "project", "trial", "dispute",
    "drought", "search", "work", "crisis", "campaign", "siege",
];

const CENTURIES: [u32; 8] = [11, 12, 13, 14, 15, 16, 17, 18];

/// A century with its years that are one token each.
struct Century {
    number: u32,
    /// Years from 0 to 99 with the token of each as next token, in order.
    years: Vec<(u32, usize)>,
}

pub(super) fn generate(
    tokenizer: &Tokenizer,
    template: Option<usize>,
    count: usize,
    generator: &mut ChaCha8Rng,
) -> Result<Generated> {
    let mut notes = Vec::new();
    let nouns = usable(tokenizer, "nouns", &NOUNS, 1, &mut notes)?;
    let noun = nouns.first().copied().unwrap_or_default();
    let of = |template: usize| centuries(tokenizer, template, noun);
    let reads = |template: usize| !of(template).is_empty();
    let templates = usable_templates(TEMPLATES.len(), template, reads, &mut notes)?;
    let all: Vec<Vec<Century>> = templates.iter().map(|template| of(*template)).collect();
    let mut generated = Generated {
        notes,
        ..Generated::default()
    };
    for _ in 0..count {
        let index = *one_of(&(0..templates.len()).collect::<Vec<_>>(), generator)?;
        let template = templates.get(index).copied().unwrap_or(0);
        let century = one_of(all.get(index).map_or(&[], Vec::as_slice), generator)?;
        let noun = *one_of(&nouns, generator)?;
        // Later years must be left.
        let before_last = century.years.len() - 1;
        let first = one_of(
            century.years.get(..before_last).unwrap_or_default(),
            generator,
        )?
        .0;
        let lowest = century.years.first().map_or(0, |year| year.0);
        let mut made = |year: u32| {
            prompt(tokenizer, template, noun, century, year, generator)?.ok_or_else(|| {
                let text = filled(template, noun, century.number, year).0;
                Error::invalid("a prompt", text, "with century and year as one token each")
            })
        };
        generated.prompts.push(made(first)?);
        // After the lowest year every year is as right: the answer has no reason to be high.
        generated.reference.push(made(lowest)?);
    }
    Ok(generated)
}

/// The text, and where the first year starts in it.
fn filled(template: usize, noun: &str, century: u32, year: u32) -> (String, usize) {
    let century = century.to_string();
    let text = TEMPLATES.get(template).copied().unwrap_or_default();
    let text = text.replace("{N}", noun).replace("{C}", &century);
    let start = text.find("{Y}").unwrap_or(0);
    (text.replace("{Y}", &format!("{year:02}")), start)
}

/// Centuries that are one token before their years, with at least two such years.
fn centuries(tokenizer: &Tokenizer, template: usize, noun: &str) -> Vec<Century> {
    let century = |number: u32| {
        let years = (0..100).filter_map(|year| {
            let (text, start) = filled(template, noun, number, year);
            let read = Read::new(tokenizer, &text)?;
            is_split(tokenizer, &read, &text, start)?;
            Some((year, next(tokenizer, &read, &text, year)?))
        });
        Century {
            number,
            years: years.collect(),
        }
    };
    let all = CENTURIES.into_iter().map(century);
    all.filter(|century| century.years.len() >= 2).collect()
}

/// Positions of the century and the year, when they are one token each, as is the last century.
fn is_split(
    tokenizer: &Tokenizer,
    read: &Read,
    text: &str,
    start: usize,
) -> Option<(usize, usize, usize)> {
    let century = read.only(tokenizer, text, start - 2..start)?;
    let year = read.only(tokenizer, text, start..start + 2)?;
    let end = read.only(tokenizer, text, text.len() - 2..text.len())?;
    (year == century + 1 && end + 1 == read.ids.len()).then_some((century, year, end))
}

/// The token of `year` after the text.
fn next(tokenizer: &Tokenizer, read: &Read, text: &str, year: u32) -> Option<usize> {
    let whole = format!("{text}{year:02}");
    let longer = Read::new(tokenizer, &whole)?;
    let position = longer.only(tokenizer, &whole, text.len()..whole.len())?;
    let follows = longer.ids.get(..position)? == read.ids.as_slice();
    follows.then(|| longer.ids.get(position).map(|id| *id as usize))?
}

fn prompt(
    tokenizer: &Tokenizer,
    template: usize,
    noun: &str,
    century: &Century,
    year: u32,
    generator: &mut ChaCha8Rng,
) -> Result<Option<Prompt>> {
    let (text, start) = filled(template, noun, century.number, year);
    let Some(read) = Read::new(tokenizer, &text) else {
        return Ok(None);
    };
    let Some((at_century, at_year, end)) = is_split(tokenizer, &read, &text, start) else {
        return Ok(None);
    };
    let tokens = |later: bool| -> Vec<usize> {
        let years = century
            .years
            .iter()
            .filter(|(one, _)| (*one > year) == later);
        years.map(|(_, token)| *token).collect()
    };
    let (right, wrong) = (tokens(true), tokens(false));
    let pair = (*one_of(&right, generator)?, *one_of(&wrong, generator)?);
    Ok(Some(Prompt {
        right,
        wrong,
        pair,
        roles: vec![("XX", at_century), ("YY", at_year), ("END", end)],
        evidence: "YY",
        template,
        special: read.special,
        ids: read.ids,
        text,
    }))
}
