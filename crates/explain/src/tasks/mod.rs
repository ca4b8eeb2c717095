//! Generated prompts of two behaviours that are well known, with the position of each role.
//!
//! * Indirect object identification (Wang et al., Interpretability in the Wild, 2022, arXiv
//!   2211.00593): two people are named, one of them again, and the other is to be named last.
//! * Greater-than (Hanna, Liu, Variengien, How does GPT-2 compute greater-than?, 2023, arXiv
//!   2305.00586): something that began in a year ends in a later year of the same century.
//!
//! Names, nouns and years are those that are one token of the model's own tokenizer inside the
//! sentence, so that all prompts of a template have their roles at the same positions. What is
//! replaced by its mean takes that of reference prompts of the same template, in which what the
//! answer follows from is missing.

mod greater_than;
mod ioi;

use std::ops::Range;

use crate::contextual::{Case, Contrast};
use crate::error::engine;
use crate::evaluation::Example;
use crate::{Error, Result, Target};
use lapidary_kernels::Tensor;
use lapidary_model::tokenizer::EncodeOptions;
use lapidary_model::{Input, Model, Tokenizer};
use rand::RngExt;
use rand_chacha::ChaCha8Rng;

/// A behaviour that prompts are generated for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// Indirect object identification.
    Ioi,
    /// Greater-than.
    GreaterThan,
}

/// A prompt with what is right and wrong as its next token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prompt {
    /// The text.
    pub text: String,
    /// Token ids, with those that start a sequence.
    pub ids: Vec<u32>,
    /// Right next tokens: the indirect object, or the later years.
    pub right: Vec<usize>,
    /// Wrong ones: the subject, or the years at or before the first.
    pub wrong: Vec<usize>,
    /// Each role's position, by name.
    pub roles: Vec<(&'static str, usize)>,
    /// Index of its template.
    pub template: usize,
    /// Positions of special tokens.
    special: Vec<usize>,
    /// The token to score and what it is compared with, where one of each is asked for.
    pair: (usize, usize),
    /// The role that decides.
    evidence: &'static str,
}

/// Prompts, and those that means are taken over.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Generated {
    /// The prompts.
    pub prompts: Vec<Prompt>,
    /// As many of the same templates, without what the answer follows from.
    pub reference: Vec<Prompt>,
    /// What was left out, in words.
    pub notes: Vec<String>,
}

impl Task {
    /// Every task.
    pub const ALL: [Self; 2] = [Self::Ioi, Self::GreaterThan];

    /// Its name.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ioi => "ioi",
            Self::GreaterThan => "greater-than",
        }
    }

    /// The task of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|task| task.name() == name)
    }

    /// Number of templates.
    pub const fn templates(self) -> usize {
        match self {
            Self::Ioi => ioi::TEMPLATES,
            Self::GreaterThan => greater_than::TEMPLATES.len(),
        }
    }

    /// `count` prompts, of one template or of any.
    ///
    /// # Errors
    /// When there is no such template, or the tokenizer has too few of the words as one token.
    pub fn generate(
        self,
        tokenizer: &Tokenizer,
        template: Option<usize>,
        count: usize,
        generator: &mut ChaCha8Rng,
    ) -> Result<Generated> {
        if let Some(template) = template.filter(|template| *template >= self.templates()) {
            let expected = format!("below {}", self.templates());
            return Err(Error::invalid("template", template, expected));
        }
        match self {
            Self::Ioi => ioi::generate(tokenizer, template, count, generator),
            Self::GreaterThan => greater_than::generate(tokenizer, template, count, generator),
        }
    }
}

impl Prompt {
    /// As an example of a data set: one right token beside one wrong, and the role that decides.
    pub fn example(&self) -> Example {
        let evidence = self.roles.iter().filter(|(role, _)| *role == self.evidence);
        Example {
            ids: self.ids.clone(),
            target: self.pair.0,
            foil: Some(self.pair.1),
            evidence: evidence.map(|(_, position)| *position).collect(),
            position: None,
            special: self.special.clone(),
            words: Vec::new(),
        }
    }

    /// As input of `model`.
    ///
    /// # Errors
    /// When the prompt is longer than the model.
    pub fn input(&self, model: &Model) -> Result<Input> {
        if self.ids.len() > model.spec().length() {
            let expected = format!("at most {}, the length of the model", model.spec().length());
            return Err(Error::invalid(
                "tokens of a prompt",
                self.ids.len(),
                expected,
            ));
        }
        let shape = (1, self.ids.len());
        let ids = engine(Tensor::from_slice(&self.ids, shape, &model.device()))?;
        Ok(Input::tokens(ids))
    }

    /// As a case for circuits: all right tokens beside all wrong.
    ///
    /// # Errors
    /// As [`Prompt::input`].
    pub fn case(&self, model: &Model) -> Result<Case> {
        Ok(Case {
            input: self.input(model)?,
            target: Target::Score {
                class: self.pair.0,
                foil: Some(self.pair.1),
                position: None,
            },
            contrast: Some(Contrast {
                right: self.right.clone(),
                wrong: self.wrong.clone(),
            }),
        })
    }

    /// The position of a role.
    pub fn role(&self, name: &str) -> Option<usize> {
        let found = self.roles.iter().find(|(role, _)| *role == name);
        found.map(|(_, position)| *position)
    }
}

/// A text's tokens without those that end a sequence.
struct Read {
    ids: Vec<u32>,
    offsets: Vec<Range<usize>>,
    special: Vec<usize>,
}

impl Read {
    /// `None` where the tokenizer cannot read the text.
    fn new(tokenizer: &Tokenizer, text: &str) -> Option<Self> {
        let encoding = tokenizer.encode(text, &EncodeOptions::default()).ok()?;
        let trailing = encoding
            .special
            .iter()
            .rev()
            .take_while(|special| **special);
        let length = encoding.len() - trailing.count();
        let special = (0..length).zip(&encoding.special);
        Some(Self {
            special: special
                .filter(|(_, is)| **is)
                .map(|(index, _)| index)
                .collect(),
            ids: encoding.ids.into_iter().take(length).collect(),
            offsets: encoding.offsets.into_iter().take(length).collect(),
        })
    }

    /// The position of the one token that stands for the bytes of `text` and for no other letter
    /// or digit; `None` when there is none.
    fn only(&self, tokenizer: &Tokenizer, text: &str, span: Range<usize>) -> Option<usize> {
        let overlaps =
            |offsets: &Range<usize>| offsets.start < span.end && span.start < offsets.end;
        let mut found = (0..)
            .zip(&self.offsets)
            .filter(|(_, offsets)| overlaps(offsets));
        let (position, _) = found.next()?;
        let id = *self.ids.get(position)?;
        // A token for everything unknown does not read as the word.
        let read = tokenizer.decode(&[id], false).ok()?;
        let same = read
            .trim()
            .eq_ignore_ascii_case(text.get(span.clone())?.trim());
        (same && found.next().is_none()).then_some(position)
    }
}

/// One of `of`, which is not empty.
fn one_of<'a, T>(of: &'a [T], generator: &mut ChaCha8Rng) -> Result<&'a T> {
    let index = generator.random_range(0..of.len().max(1));
    of.get(index)
        .ok_or_else(|| Error::invalid("words to choose from", "none", "some"))
}

/// The words that are one token after "the", and a note on the others.
fn usable<'a>(
    tokenizer: &Tokenizer,
    what: &str,
    words: &[&'a str],
    least: usize,
    notes: &mut Vec<String>,
) -> Result<Vec<&'a str>> {
    let is_one = |word: &&str| {
        let text = format!("the {word}");
        let read = Read::new(tokenizer, &text);
        read.is_some_and(|read| read.only(tokenizer, &text, 4..text.len()).is_some())
    };
    let (kept, refused): (Vec<&str>, Vec<&str>) = words.iter().partition(|word| is_one(word));
    if kept.len() < least {
        let found = format!("{} of {} ({})", kept.len(), words.len(), kept.join(", "));
        let expected = format!("at least {least}; {} are not one token", refused.join(", "));
        return Err(Error::invalid(
            format!("{what} that are one token of this model"),
            found,
            expected,
        ));
    }
    if !refused.is_empty() {
        notes.push(format!(
            "{what} left out, not one token: {}",
            refused.join(", ")
        ));
    }
    Ok(kept)
}

/// Templates that the tokenizer reads, of those asked for.
fn usable_templates(
    count: usize,
    asked: Option<usize>,
    reads: impl Fn(usize) -> bool,
    notes: &mut Vec<String>,
) -> Result<Vec<usize>> {
    let asked: Vec<usize> = asked.map_or_else(|| (0..count).collect(), |one| vec![one]);
    let (kept, refused): (Vec<usize>, Vec<usize>) = asked.into_iter().partition(|one| reads(*one));
    if kept.is_empty() {
        return Err(Error::invalid(
            "templates that this model's tokenizer reads, with each role as one token",
            "none",
            "at least one",
        ));
    }
    if !refused.is_empty() {
        notes.push(format!(
            "templates left out, which the tokenizer does not read: {refused:?}"
        ));
    }
    Ok(kept)
}
