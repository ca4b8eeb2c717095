//! Text for small decoders: the bytes of Tiny Shakespeare where the data is there, otherwise sentences of
//! the generated language.

use super::bigram::{TextTask, bytes_split};
use super::decoder::{self, LENGTH};
use crate::{Result, Setting};
use lapidary_compress::quality::{Window, sliding_windows};
use lapidary_train::Generator;
use lapidary_train::data::{BYTE_VOCABULARY, LanguageTask, Task};
use lapidary_train::language::{Corpus, Split};

/// What is read.
#[derive(Clone)]
pub enum Text {
    /// Bytes of a file.
    Bytes(Vec<u32>),
    /// One side of the generated language.
    Language(Box<Corpus>),
}

impl Text {
    /// Its number of tokens.
    pub fn vocabulary(&self) -> usize {
        match self {
            Self::Bytes(_) => BYTE_VOCABULARY as usize,
            Self::Language(corpus) => corpus.language().vocabulary().size(),
        }
    }

    /// Sentences of another language as this text is written: in words, or letter by letter in bytes.
    pub fn likewise(&self, corpus: Corpus) -> Self {
        match self {
            Self::Language(_) => Self::Language(Box::new(corpus)),
            Self::Bytes(_) => Self::Bytes(spelled(&corpus)),
        }
    }

    /// What trains on it.
    pub fn task(&self) -> Box<dyn Task> {
        match self {
            Self::Bytes(tokens) => Box::new(TextTask::new(tokens.clone(), self.vocabulary())),
            Self::Language(corpus) => Box::new(LanguageTask::new(corpus.as_ref().clone())),
        }
    }

    /// Windows of [`LENGTH`] at random places.
    pub fn windows(&self, count: usize, generator: &mut Generator) -> Result<Vec<Vec<u32>>> {
        let batch = self.task().batch(generator, count, LENGTH)?;
        Ok(batch.inputs.chunks(LENGTH).map(<[u32]>::to_vec).collect())
    }

    /// Windows of [`LENGTH`] that are the same each time: spread over the bytes, or the first of the
    /// language.
    pub fn fixed_windows(&self, count: u64) -> Result<Vec<Vec<u32>>> {
        let window = |index: u64| -> Result<Vec<u32>> {
            match self {
                Self::Language(corpus) => Ok(corpus.window(index, LENGTH)?),
                Self::Bytes(tokens) => {
                    let places = tokens.len().saturating_sub(LENGTH) as u64;
                    let from = (index * places / count.max(1)) as usize;
                    Ok(tokens.iter().skip(from).take(LENGTH).copied().collect())
                }
            }
        };
        (0..count).map(window).collect()
    }
}

/// Bytes that a text in bytes has of another language.
const SPELLED: usize = 1 << 17;

/// The bytes of sentences, each on a line.
fn spelled(corpus: &Corpus) -> Vec<u32> {
    let mut bytes = Vec::with_capacity(SPELLED);
    for sentence in corpus.sentences(0) {
        bytes.extend(sentence.text().bytes().map(u32::from));
        bytes.push(u32::from(b'\n'));
        if bytes.len() >= SPELLED {
            break;
        }
    }
    bytes
}

/// A side to train on and one that is held out.
#[derive(Clone)]
pub struct Sides {
    /// What is trained on.
    pub training: Text,
    /// What is measured on.
    pub held_out: Text,
    /// What both are, in words.
    pub what: String,
}

impl Sides {
    /// What a setting has data for.
    ///
    /// # Errors
    /// When the file is there and cannot be read.
    pub fn of(setting: &Setting) -> Result<Self> {
        let file = setting
            .data
            .as_ref()
            .map(|directory| directory.join("tiny_shakespeare.txt"));
        let Some(file) = file.filter(|file| file.is_file()) else {
            return Self::language(setting.seed);
        };
        let (training, held_out) = bytes_split(&file)?;
        Ok(Self {
            training: Text::Bytes(training),
            held_out: Text::Bytes(held_out),
            what: "the bytes of Tiny Shakespeare".to_owned(),
        })
    }

    /// The generated language of a seed.
    ///
    /// # Errors
    /// Those of the corpus.
    pub fn language(seed: u64) -> Result<Self> {
        let side =
            |split| -> Result<Text> { Ok(Text::Language(Box::new(decoder::corpus(split, seed)?))) };
        Ok(Self {
            training: side(Split::Training)?,
            held_out: side(Split::HeldOut)?,
            what: "the generated language".to_owned(),
        })
    }

    /// The same for another seed: another language, or the same file.
    ///
    /// # Errors
    /// As [`Self::language`].
    pub fn for_seed(&self, seed: u64) -> Result<Self> {
        match self.training {
            Text::Bytes(_) => Ok(self.clone()),
            Text::Language(_) => Self::language(seed),
        }
    }

    /// Windows of the side held out, all tokens but the first of which are scored.
    ///
    /// # Errors
    /// When the text has no window.
    pub fn tests(&self, count: u64) -> Result<Vec<Window>> {
        let mut tests = Vec::new();
        for tokens in self.held_out.fixed_windows(count)? {
            tests.extend(sliding_windows(&tokens, LENGTH, LENGTH - 1)?);
        }
        Ok(tests)
    }
}
