//! Which tokens make one word.
//!
//! Tokenizers mark where words begin in the tokens themselves: WordPiece (BERT) puts `##` before
//! what continues a word, byte-level BPE (GPT-2) and SentencePiece (Llama, `▁`) keep the space
//! before a word in its first token, and CLIP's BPE ends a word with `</w>`. The marks alone are
//! read, so that ids without their text have words too.

use std::ops::Range;
use std::str::from_utf8;

use tokenizers::{DecoderWrapper, ModelWrapper};

use super::Tokenizer;
use super::own::byte_character;

/// The mark that SentencePiece keeps a space as.
const SPACE: char = '▁';

/// How tokens say where words begin.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Marks {
    /// What goes on with a word begins with this.
    Continuing(String),
    /// The last token of a word ends with this.
    Ending(String),
    /// The first token of a word begins with its space, as byte-level vocabularies write bytes.
    SpaceByte,
    /// The same, with the space as `▁`.
    SpaceMark,
    /// Each token is a word.
    None,
}

/// What a token is at one of its ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    /// Letters, digits, marks on them, and bytes of characters that are split over tokens.
    Word,
    Punctuation,
    /// A space, which may stand before the rest of its word.
    Space,
    /// The end of a line or another white space, after which a word begins.
    Break,
}

impl Tokenizer {
    /// The words of a sequence: neighbouring tokens that the tokenizer made of one word, in order
    /// and without gaps. Special tokens are alone, and so are punctuation marks that adjoin a word.
    /// Where a tokenizer has no marks for words, each token is one.
    ///
    /// ```
    /// use lapidary_model::Tokenizer;
    ///
    /// let tokenizer = Tokenizer::byte_level(&["<end>"])?;
    /// let ids = tokenizer.ids("the cat, too")?;
    /// assert_eq!(tokenizer.words(&ids), [0..3, 3..7, 7..8, 8..12]);
    /// # Ok::<(), lapidary_model::tokenizer::TokenizerError>(())
    /// ```
    pub fn words(&self, ids: &[u32]) -> Vec<Range<usize>> {
        let marks = self.marks();
        let mut words: Vec<Range<usize>> = Vec::new();
        let mut before: Option<(bool, String)> = None;
        for (position, id) in ids.iter().enumerate() {
            let token = (self.is_special(*id), self.token_of(*id).unwrap_or_default());
            let goes_on = match &before {
                Some(before) => !before.0 && !token.0 && marks.join(&before.1, &token.1),
                None => false,
            };
            match words.last_mut().filter(|_| goes_on) {
                Some(word) => word.end = position + 1,
                None => words.push(position..position + 1),
            }
            before = Some(token);
        }
        words
    }

    fn marks(&self) -> Marks {
        match self.inner.get_model() {
            ModelWrapper::WordPiece(model) => {
                return Marks::Continuing(model.continuing_subword_prefix.clone());
            }
            ModelWrapper::BPE(model) => {
                let given = |mark: &Option<String>| mark.clone().filter(|mark| !mark.is_empty());
                if let Some(suffix) = given(&model.end_of_word_suffix) {
                    return Marks::Ending(suffix);
                }
                if let Some(prefix) = given(&model.continuing_subword_prefix) {
                    return Marks::Continuing(prefix);
                }
            }
            ModelWrapper::WordLevel(_) => return Marks::None,
            ModelWrapper::Unigram(_) => {}
        }
        self.inner.get_decoder().map_or(Marks::None, marks_of)
    }
}

/// How a decoder makes spaces of tokens.
fn marks_of(decoder: &DecoderWrapper) -> Marks {
    match decoder {
        DecoderWrapper::ByteLevel(_) => Marks::SpaceByte,
        DecoderWrapper::Metaspace(_) => Marks::SpaceMark,
        DecoderWrapper::Replace(replace) if replace.content == " " => Marks::SpaceMark,
        DecoderWrapper::WordPiece(decoder) => Marks::Continuing(decoder.prefix.clone()),
        DecoderWrapper::Sequence(decoders) => decoders
            .get_decoders()
            .iter()
            .map(marks_of)
            .find(|marks| *marks != Marks::None)
            .unwrap_or(Marks::None),
        _ => Marks::None,
    }
}

impl Marks {
    /// Whether `token` goes on with the word that `before` is of.
    fn join(&self, before: &str, token: &str) -> bool {
        match self {
            Self::Continuing(prefix) => !prefix.is_empty() && token.starts_with(prefix),
            Self::Ending(suffix) => !before.ends_with(suffix),
            Self::SpaceByte => joined(last(&bytes(before)), first(&bytes(token))),
            Self::SpaceMark => joined(last(&marked_bytes(before)), first(&marked_bytes(token))),
            Self::None => false,
        }
    }
}

/// Whether a token that begins with `first` goes on after one that ends with `last`.
fn joined(last: Side, first: Side) -> bool {
    match (last, first) {
        (_, Side::Space | Side::Break) | (Side::Break, _) => false,
        // SentencePiece may keep the space of a rare word as a token of its own.
        (Side::Space, _) => true,
        (last, first) => last == first,
    }
}

/// The bytes that a token of a byte-level vocabulary stands for.
fn bytes(token: &str) -> Vec<u8> {
    let byte = |character: char| (0..=u8::MAX).find(|byte| byte_character(*byte) == character);
    token.chars().filter_map(byte).collect()
}

/// The bytes that a token of SentencePiece stands for: `<0xE2>` is one.
fn marked_bytes(token: &str) -> Vec<u8> {
    let digits = token
        .strip_prefix("<0x")
        .and_then(|rest| rest.strip_suffix('>'));
    match digits.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
        Some(byte) => vec![byte],
        None => token.replace(SPACE, " ").into_bytes(),
    }
}

fn first(token: &[u8]) -> Side {
    from_utf8(token).map_or_else(|_| side(token.first()), |text| of(text.chars().next()))
}

fn last(token: &[u8]) -> Side {
    from_utf8(token).map_or_else(|_| side(token.last()), |text| of(text.chars().next_back()))
}

/// The end of a token that is not whole characters.
fn side(byte: Option<&u8>) -> Side {
    match byte {
        Some(byte) if byte.is_ascii() => of(Some(char::from(*byte))),
        _ => Side::Word,
    }
}

fn of(character: Option<char>) -> Side {
    match character {
        Some(' ') => Side::Space,
        Some(character) if character.is_whitespace() => Side::Break,
        Some(character) if character.is_alphanumeric() => Side::Word,
        // Accents that follow their letter.
        Some('\u{300}'..='\u{36f}') | None => Side::Word,
        Some(_) => Side::Punctuation,
    }
}
