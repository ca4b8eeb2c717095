//! Tokenizers of our own making, for small models: the bytes, and the words of a corpus.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::{Map, Value, json};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::punctuation::Punctuation;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::whitespace::WhitespaceSplit;
use tokenizers::{OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer};

use super::{Tokenizer, TokenizerError};

const UNKNOWN: &str = "<unk>";

pub(super) fn byte_level(special: &[&str]) -> Result<Tokenizer, TokenizerError> {
    check_special(special)?;
    let vocabulary: Map<String, Value> = (0..=255u8)
        .map(|byte| (byte_character(byte).to_string(), byte.into()))
        .collect();
    let whole_text = json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false,
    });
    let json = json!({
        "version": "1.0",
        "added_tokens": added_tokens(256, special),
        "pre_tokenizer": whole_text,
        "post_processor": whole_text,
        "decoder": whole_text,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    });
    Tokenizer::from_json(Path::new("byte-level tokenizer"), &json.to_string())
}

pub(super) fn word_level<'text>(
    texts: impl IntoIterator<Item = &'text str>,
    vocabulary: usize,
    special: &[&str],
) -> Result<Tokenizer, TokenizerError> {
    check_special(special)?;
    let first_word = 1 + special.len();
    if vocabulary <= first_word {
        return Err(TokenizerError::Own {
            field: "vocabulary",
            found: vocabulary.to_string(),
            expected: format!("more than its {first_word} special tokens"),
        });
    }
    let splitter = Sequence::new(vec![
        PreTokenizerWrapper::WhitespaceSplit(WhitespaceSplit),
        PreTokenizerWrapper::Punctuation(Punctuation::default()),
    ]);
    let mut words = frequent_words(texts, &splitter)?;
    words.retain(|word| word != UNKNOWN && !special.contains(&word.as_str()));
    words.truncate(vocabulary - first_word);
    let mut reserved = vec![UNKNOWN];
    reserved.extend(special);
    let tokens = reserved.iter().map(|token| token.to_string()).chain(words);
    let ids: Map<String, Value> = tokens
        .zip(0u32..)
        .map(|(token, id)| (token, id.into()))
        .collect();
    let json = json!({
        "version": "1.0",
        "added_tokens": added_tokens(0, &reserved),
        "pre_tokenizer": splitter,
        "model": {"type": "WordLevel", "vocab": ids, "unk_token": UNKNOWN},
    });
    Tokenizer::from_json(Path::new("word-level tokenizer"), &json.to_string())
}

pub(super) fn of_words(words: &[&str]) -> Result<Tokenizer, TokenizerError> {
    let [start, ..] = words else {
        return Err(TokenizerError::Own {
            field: "words",
            found: "none".to_owned(),
            expected: "at least the one that starts a text".to_owned(),
        });
    };
    let ids: Map<String, Value> = words
        .iter()
        .zip(0u32..)
        .map(|(word, id)| ((*word).to_owned(), id.into()))
        .collect();
    let json = json!({
        "version": "1.0",
        "added_tokens": added_tokens(0, &[*start]),
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": start, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                {"SpecialToken": {"id": start, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": start, "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}},
            ],
            "special_tokens": {*start: {"id": start, "ids": [0], "tokens": [start]}},
        },
        // A closed vocabulary: this token is in no text, and a word that is unknown is an error.
        "model": {"type": "WordLevel", "vocab": ids, "unk_token": UNKNOWN},
    });
    Tokenizer::from_json(
        Path::new("tokenizer of a closed vocabulary"),
        &json.to_string(),
    )
}

/// Every word of the texts, the most frequent first and then in alphabetical order.
fn frequent_words<'text>(
    texts: impl IntoIterator<Item = &'text str>,
    splitter: &Sequence,
) -> Result<Vec<String>, TokenizerError> {
    let mut counts: BTreeMap<String, u64> = BTreeMap::new();
    for text in texts {
        let mut split = PreTokenizedString::from(text);
        splitter
            .pre_tokenize(&mut split)
            .map_err(super::failed("split the text"))?;
        for (word, _, _) in split.get_splits(OffsetReferential::Original, OffsetType::Byte) {
            match counts.get_mut(word) {
                Some(count) => *count += 1,
                None => {
                    counts.insert(word.to_string(), 1);
                }
            }
        }
    }
    let mut words: Vec<(String, u64)> = counts.into_iter().collect();
    words.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    Ok(words.into_iter().map(|(word, _)| word).collect())
}

fn check_special(special: &[&str]) -> Result<(), TokenizerError> {
    let distinct: BTreeSet<&&str> = special.iter().collect();
    if distinct.len() == special.len() && !special.contains(&"") && !special.contains(&UNKNOWN) {
        return Ok(());
    }
    Err(TokenizerError::Own {
        field: "special",
        found: format!("{special:?}"),
        expected: format!("distinct tokens that are not empty and not {UNKNOWN}"),
    })
}

/// Special tokens with ids from `first` on, as `tokenizer.json` lists them.
pub(super) fn added_tokens(first: u32, tokens: &[&str]) -> Vec<Value> {
    let ids = first..;
    ids.zip(tokens)
        .map(|(id, token)| added_token(id, token))
        .collect()
}

pub(super) fn added_token(id: u32, token: &str) -> Value {
    json!({
        "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
        "normalized": false, "special": true,
    })
}

/// The character that stands for a byte in byte-level vocabularies (GPT-2): itself where it is
/// printable, and otherwise the next free one from 256 on.
pub(super) fn byte_character(byte: u8) -> char {
    let is_printable = |byte: &u8| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    if is_printable(&byte) {
        return char::from(byte);
    }
    let earlier = (0..byte).filter(|byte| !is_printable(byte)).count() as u32;
    char::from_u32(256 + earlier).unwrap_or(char::REPLACEMENT_CHARACTER)
}
