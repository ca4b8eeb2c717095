//! Text to token ids and back.
//!
//! A [`Tokenizer`] wraps the `tokenizers` crate: it reads the `tokenizer.json` of a model
//! directory, or the older vocabulary files that stand for one, or makes one of its own. What a
//! model cannot see is never dropped in silence: [`Encoding::dropped`] counts it.

mod chunks;
mod error;
mod files;
mod own;
mod words;

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use tokenizers::{
    EncodeInput, PaddingParams, PostProcessor, TruncationDirection, TruncationParams,
    TruncationStrategy, truncate_encodings,
};

pub use self::error::TokenizerError;
use crate::Limits;
use crate::files::{FileError, read_text, write_beside};

/// The file that a tokenizer is read from and saved to.
pub const TOKENIZER_FILE: &str = "tokenizer.json";

/// Bytes of a part of a long text.
const CHUNK: usize = 1 << 14;
const CHUNKS_AT_A_TIME: usize = 32;

/// Splits text into the tokens of a model.
///
/// ```
/// use lapidary_model::tokenizer::{EncodeOptions, Tokenizer};
///
/// let tokenizer = Tokenizer::byte_level(&["<end>"])?;
/// let encoding = tokenizer.encode("héllo", &EncodeOptions::default())?;
/// assert_eq!(encoding.ids, [104, 195, 169, 108, 108, 111]);
/// assert_eq!(tokenizer.decode(&encoding.ids, false)?, "héllo");
/// assert_eq!(tokenizer.id_of("<end>"), Some(256));
/// # Ok::<(), lapidary_model::tokenizer::TokenizerError>(())
/// ```
#[derive(Clone, Debug)]
pub struct Tokenizer {
    /// Without truncation and padding: both are asked for per call.
    inner: tokenizers::Tokenizer,
    /// What the file says about them, kept to be saved again.
    truncation: Option<TruncationParams>,
    padding: Option<PaddingParams>,
    model_length: Option<usize>,
}

/// What an encoding should hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EncodeOptions {
    /// Add the tokens that the model expects around a text, such as `[CLS]` and `[SEP]`.
    pub special_tokens: bool,
    /// Keep at most so many tokens, the special ones included. Of a pair, the longer text is
    /// shortened first.
    pub limit: Option<usize>,
}

impl Default for EncodeOptions {
    /// Special tokens, and all of the text.
    fn default() -> Self {
        Self {
            special_tokens: true,
            limit: None,
        }
    }
}

/// A text as tokens; all lists have one entry per token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoding {
    /// Ids in the vocabulary.
    pub ids: Vec<u32>,
    /// 0 for the first text and 1 for the second, where the model makes the difference.
    pub type_ids: Vec<u32>,
    /// The tokens as the vocabulary has them.
    pub tokens: Vec<String>,
    /// Which bytes of its text a token stands for; empty for added tokens.
    pub offsets: Vec<Range<usize>>,
    /// Which text a token is from, 0 or 1; `None` for added tokens.
    pub sequences: Vec<Option<usize>>,
    /// Whether a token was added rather than read from the text.
    pub special: Vec<bool>,
    /// Tokens of the text that are beyond the limit, and missing here.
    pub dropped: usize,
}

impl Tokenizer {
    /// Reads the tokenizer of a model directory: `tokenizer.json`, or else `vocab.txt` (BERT) or
    /// `vocab.json` with `merges.txt` (GPT-2, OPT, RoBERTa).
    ///
    /// # Errors
    /// When the directory has none of them, or one that is invalid.
    pub fn open(directory: &Path, limits: &Limits) -> Result<Self, TokenizerError> {
        let settings = files::Settings::read(directory, limits)?;
        let path = directory.join(TOKENIZER_FILE);
        let json = if path.exists() {
            read_text(&path, limits.text_file_bytes)?
        } else {
            files::stand_in(directory, &settings, limits)?
        };
        let mut tokenizer = Self::from_json(&path, &json)?;
        tokenizer.model_length = settings.model_length.or(tokenizer.model_length);
        Ok(tokenizer)
    }

    /// Parses the text of a `tokenizer.json`; `path` is for errors.
    pub fn from_json(path: &Path, json: &str) -> Result<Self, TokenizerError> {
        let invalid = |found: String| TokenizerError::Invalid {
            path: path.to_path_buf(),
            found,
        };
        serde_json::from_str::<Syntax>(json).map_err(|error| invalid(error.to_string()))?;
        let mut inner = guarded(|| tokenizers::Tokenizer::from_bytes(json)).map_err(invalid)?;
        let truncation = inner.get_truncation().cloned();
        let padding = inner.get_padding().cloned();
        inner.with_padding(None);
        inner
            .with_truncation(None)
            .map_err(|error| invalid(error.to_string()))?;
        let model_length = truncation.as_ref().map(|truncation| truncation.max_length);
        Ok(Self {
            inner,
            truncation,
            padding,
            model_length,
        })
    }

    /// A tokenizer whose ids are the bytes of the text, followed by `special` tokens from 256 on.
    /// It needs no training, and any text comes back from its ids.
    pub fn byte_level(special: &[&str]) -> Result<Self, TokenizerError> {
        own::byte_level(special)
    }

    /// A tokenizer of whole words and single punctuation marks: the most frequent of `texts`, up
    /// to `vocabulary` tokens with `<unk>` (id 0) and the `special` ones (from 1 on). Words as
    /// frequent as each other are taken in alphabetical order, so the result depends only on the
    /// texts. Decoding puts one space between tokens.
    pub fn word_level<'text>(
        texts: impl IntoIterator<Item = &'text str>,
        vocabulary: usize,
        special: &[&str],
    ) -> Result<Self, TokenizerError> {
        own::word_level(texts, vocabulary, special)
    }

    /// A tokenizer of a closed vocabulary: words between white space, each its place in `words` as
    /// id. The first starts every text. A word that is not among them is an error.
    pub fn of_words(words: &[&str]) -> Result<Self, TokenizerError> {
        own::of_words(words)
    }

    /// Saves `tokenizer.json` in a directory.
    pub fn save(&self, directory: &Path) -> Result<(), TokenizerError> {
        let path = directory.join(TOKENIZER_FILE);
        let json = self.to_json()?;
        write_beside(&path, |writer| {
            Ok(writer
                .write_all(json.as_bytes())
                .map_err(FileError::io("write", &path))?)
        })
    }

    /// The text of a `tokenizer.json`.
    pub fn to_json(&self) -> Result<String, TokenizerError> {
        let mut inner = self.inner.clone();
        inner.with_padding(self.padding.clone());
        inner
            .with_truncation(self.truncation.clone())
            .map_err(failed("save"))?;
        inner.to_string(false).map_err(failed("save"))
    }

    /// The longest text that the model of this directory takes, when its files say so.
    pub fn model_length(&self) -> Option<usize> {
        self.model_length
    }

    /// Tokens in the vocabulary, the added ones included.
    pub fn vocabulary_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The id of a token.
    pub fn id_of(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The token of an id, as the vocabulary has it.
    pub fn token_of(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Whether decoding leaves a token out as special.
    pub fn is_special(&self, id: u32) -> bool {
        self.inner
            .get_added_tokens_decoder()
            .get(&id)
            .is_some_and(|token| token.special)
    }

    /// An error when some id of the vocabulary is none of a model's `model_vocabulary` rows.
    pub fn check_fits(&self, model_vocabulary: usize) -> Result<(), TokenizerError> {
        let vocabulary = self.inner.get_vocab(true);
        let largest = vocabulary
            .iter()
            .max_by_key(|(token, id)| (**id, token.as_str()));
        match largest {
            Some((token, &id)) if id as usize >= model_vocabulary => {
                Err(TokenizerError::Vocabulary {
                    token: token.clone(),
                    id,
                    model_vocabulary,
                })
            }
            _ => Ok(()),
        }
    }

    /// A text as tokens.
    ///
    /// # Errors
    /// When the text has no token, or when the limit leaves no room for one.
    pub fn encode(&self, text: &str, options: &EncodeOptions) -> Result<Encoding, TokenizerError> {
        self.encode_both(text, None, options)
    }

    /// Two texts as tokens, in the way the model tells them apart.
    pub fn encode_pair(
        &self,
        first: &str,
        second: &str,
        options: &EncodeOptions,
    ) -> Result<Encoding, TokenizerError> {
        self.encode_both(first, Some(second), options)
    }

    /// The ids of a text alone, nothing added: those of [`Tokenizer::encode`] without special
    /// tokens, found without their offsets, and none where the text has no token.
    ///
    /// A long text is cut where that provably changes no token, and its parts are encoded by all
    /// threads.
    pub fn ids(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        self.ids_in_chunks(text, CHUNK)
    }

    fn ids_in_chunks(&self, text: &str, size: usize) -> Result<Vec<u32>, TokenizerError> {
        let parts = chunks::chunks(text, chunks::cuts(&self.inner, text), size);
        let mut ids = Vec::new();
        // Some at a time: an encoding is many times larger than its ids.
        for some in parts.chunks(CHUNKS_AT_A_TIME) {
            let encodings = guarded(|| self.inner.encode_batch_fast(some.to_vec(), false))
                .map_err(encoding_failed)?;
            for encoding in &encodings {
                ids.extend_from_slice(encoding.get_ids());
            }
        }
        Ok(ids)
    }

    /// The text of ids. Ids beyond the vocabulary have no text: a model may have more rows than
    /// its tokenizer has tokens.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, TokenizerError> {
        guarded(|| self.inner.decode(ids, skip_special)).map_err(|found| TokenizerError::Failed {
            action: "decode tokens",
            found,
        })
    }

    fn encode_both(
        &self,
        first: &str,
        second: Option<&str>,
        options: &EncodeOptions,
    ) -> Result<Encoding, TokenizerError> {
        let first = self.encode_bare(first)?;
        let second = second.map(|text| self.encode_bare(text)).transpose()?;
        let tokens = first.len() + second.as_ref().map_or(0, tokenizers::Encoding::len);
        if tokens == 0 {
            return Err(TokenizerError::Empty);
        }
        let room = self.room(second.is_some(), options)?;
        let dropped = tokens.saturating_sub(room);
        let encoded = guarded(|| {
            let (first, second) = truncate_encodings(first, second, &truncation(room))?;
            self.inner
                .post_process(first, second, options.special_tokens)
        });
        encoded
            .map(|encoding| Encoding::new(&encoding, dropped))
            .map_err(encoding_failed)
    }

    /// The tokens of a text alone, with nothing added.
    fn encode_bare(&self, text: &str) -> Result<tokenizers::Encoding, TokenizerError> {
        guarded(|| self.inner.encode(EncodeInput::from(text), false)).map_err(encoding_failed)
    }

    /// How many tokens of text the limit leaves beside the special ones.
    fn room(&self, pair: bool, options: &EncodeOptions) -> Result<usize, TokenizerError> {
        let Some(limit) = options.limit else {
            return Ok(usize::MAX);
        };
        let processor = self
            .inner
            .get_post_processor()
            .filter(|_| options.special_tokens);
        let added = processor.map_or(0, |processor| processor.added_tokens(pair));
        if limit <= added {
            return Err(TokenizerError::Limit { limit, added });
        }
        Ok(limit - added)
    }
}

fn truncation(room: usize) -> TruncationParams {
    TruncationParams {
        direction: TruncationDirection::Right,
        max_length: room,
        strategy: TruncationStrategy::LongestFirst,
        stride: 0,
    }
}

impl Encoding {
    fn new(encoding: &tokenizers::Encoding, dropped: usize) -> Self {
        let offsets = encoding.get_offsets().iter();
        let special = encoding.get_special_tokens_mask().iter();
        Self {
            ids: encoding.get_ids().to_vec(),
            type_ids: encoding.get_type_ids().to_vec(),
            tokens: encoding.get_tokens().to_vec(),
            offsets: offsets.map(|&(begin, end)| begin..end).collect(),
            sequences: encoding.get_sequence_ids(),
            special: special.map(|&mask| mask == 1).collect(),
            dropped,
        }
    }

    /// The number of tokens.
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    /// Whether there are no tokens. An encoding that [`Tokenizer::encode`] returns has some.
    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }
}

/// Read before the `tokenizers` crate reads the file: where that one meets a syntax error inside
/// the decoder, it panics.
#[derive(serde::Deserialize)]
struct Syntax {
    #[serde(rename = "decoder")]
    _decoder: Option<serde_json::Value>,
}

/// Runs a call into the `tokenizers` crate, so that a panic in it on an invalid file or an unusual
/// text is an error like any other.
fn guarded<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(_) => Err("its parts contradict each other".to_string()),
    }
}

fn failed(action: &'static str) -> impl FnOnce(tokenizers::Error) -> TokenizerError {
    move |error| TokenizerError::Failed {
        action,
        found: error.to_string(),
    }
}

fn encoding_failed(found: String) -> TokenizerError {
    TokenizerError::Failed {
        action: "encode the text",
        found,
    }
}

#[cfg(test)]
mod tests;
