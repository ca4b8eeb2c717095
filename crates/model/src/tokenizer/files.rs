//! The older files of a tokenizer, rewritten as the `tokenizer.json` that they stand for.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::{Map, Value, json};

use super::TokenizerError;
use super::own::added_token;
use crate::Limits;
use crate::files::read_text;

/// What `tokenizer_config.json` and `special_tokens_map.json` say, as far as it matters here.
#[derive(Debug, Default)]
pub(super) struct Settings {
    fields: Map<String, Value>,
    pub model_length: Option<usize>,
}

/// The fields that name a special token.
const SPECIAL: [&str; 7] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
];

impl Settings {
    pub fn read(directory: &Path, limits: &Limits) -> Result<Self, TokenizerError> {
        let mut fields = Map::new();
        for file in ["special_tokens_map.json", "tokenizer_config.json"] {
            let path = directory.join(file);
            if path.exists() {
                let more: Map<String, Value> =
                    parse(&path, &read_text(&path, limits.text_file_bytes)?)?;
                fields.extend(more);
            }
        }
        // Where there is no bound, the field holds a number like 1e30.
        let length = fields.get("model_max_length").and_then(Value::as_u64);
        let model_length = length
            .filter(|&length| length <= 1 << 32)
            .and_then(|n| n.try_into().ok());
        Ok(Self {
            fields,
            model_length,
        })
    }

    /// A special token, written as itself or as an object with its content.
    fn token(&self, field: &str) -> Option<&str> {
        let value = self.fields.get(field)?;
        value.as_str().or_else(|| value.get("content")?.as_str())
    }

    fn flag(&self, field: &str, default: bool) -> bool {
        self.fields
            .get(field)
            .and_then(Value::as_bool)
            .unwrap_or(default)
    }

    fn class(&self) -> &str {
        self.fields
            .get("tokenizer_class")
            .and_then(Value::as_str)
            .unwrap_or_default()
    }
}

type Vocabulary = BTreeMap<String, u32>;

/// The `tokenizer.json` that a directory's older files stand for.
pub(super) fn stand_in(
    directory: &Path,
    settings: &Settings,
    limits: &Limits,
) -> Result<String, TokenizerError> {
    let missing = |found: String| TokenizerError::Missing {
        directory: directory.to_path_buf(),
        found,
    };
    if settings.class().starts_with("CLIP") {
        return Err(missing(format!(
            " (but files of a {}, which need conversion)",
            settings.class()
        )));
    }
    let path = |file: &str| Some(directory.join(file)).filter(|path| path.exists());
    if let Some(vocabulary) = path("vocab.txt") {
        let text = read_text(&vocabulary, limits.text_file_bytes)?;
        return word_piece(&vocabulary, &text, settings);
    }
    if let (Some(vocabulary), Some(merges)) = (path("vocab.json"), path("merges.txt")) {
        let text = read_text(&vocabulary, limits.text_file_bytes)?;
        let merges_text = read_text(&merges, limits.text_file_bytes)?;
        return byte_level_bpe(&vocabulary, &text, (&merges, &merges_text), settings);
    }
    let other = [
        "tokenizer.model",
        "spiece.model",
        "sentencepiece.bpe.model",
        "vocab.json",
    ];
    let found = other.iter().find(|file| path(file).is_some());
    Err(missing(
        found
            .map(|file| format!(" (but {file}, which is not enough)"))
            .unwrap_or_default(),
    ))
}

/// BERT's WordPiece from `vocab.txt`, one token a line.
fn word_piece(path: &Path, text: &str, settings: &Settings) -> Result<String, TokenizerError> {
    let vocabulary: Vocabulary = text
        .lines()
        .map(|line| line.trim_end().to_string())
        .zip(0u32..)
        .collect();
    let required = |field: &str, default: &str| -> Result<(String, u32), TokenizerError> {
        let token = settings.token(field).unwrap_or(default);
        let id = id_in(&vocabulary, token, path)?;
        Ok((token.to_string(), id))
    };
    let separator = required("sep_token", "[SEP]")?;
    let class = required("cls_token", "[CLS]")?;
    let unknown = required("unk_token", "[UNK]")?.0;
    let lowercase = settings.flag("do_lower_case", true);
    let defaults = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"];
    let json = json!({
        "version": "1.0",
        "added_tokens": special_tokens(settings, &defaults, &vocabulary),
        "normalizer": {
            "type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
            "strip_accents": settings.fields.get("strip_accents"), "lowercase": lowercase,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {"type": "BertProcessing", "sep": separator, "cls": class},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "model": {
            "type": "WordPiece", "unk_token": unknown, "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100, "vocab": vocabulary,
        },
    });
    Ok(json.to_string())
}

/// Byte-level BPE (GPT-2, OPT, RoBERTa) from `vocab.json` and `merges.txt`.
fn byte_level_bpe(
    path: &Path,
    text: &str,
    (merges_path, merges_text): (&Path, &str),
    settings: &Settings,
) -> Result<String, TokenizerError> {
    let vocabulary: Vocabulary = parse(path, text)?;
    let mut merges = Vec::new();
    for line in merges_text
        .lines()
        .filter(|line| !line.starts_with("#version") && !line.is_empty())
    {
        let Some((left, right)) = line.split_once(' ') else {
            return Err(TokenizerError::Invalid {
                path: merges_path.to_path_buf(),
                found: format!(
                    "`{}` is not a pair of tokens",
                    line.chars().take(80).collect::<String>()
                ),
            });
        };
        merges.push([left, right]);
    }
    let prefix_space = settings.flag("add_prefix_space", false);
    let json = json!({
        "version": "1.0",
        "added_tokens": special_tokens(settings, &[], &vocabulary),
        "pre_tokenizer": {
            "type": "ByteLevel", "add_prefix_space": prefix_space, "trim_offsets": true, "use_regex": true,
        },
        "post_processor": byte_level_processor(path, &vocabulary, prefix_space, settings)?,
        "decoder": {
            "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true,
        },
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges},
    });
    Ok(json.to_string())
}

/// What is put around a text: RoBERTa's `<s> … </s>`, a first token where `add_bos_token` says so
/// (OPT), or nothing.
fn byte_level_processor(
    path: &Path,
    vocabulary: &Vocabulary,
    prefix_space: bool,
    settings: &Settings,
) -> Result<Value, TokenizerError> {
    let required = |field: &str, default: &str| -> Result<(String, u32), TokenizerError> {
        let token = settings.token(field).unwrap_or(default);
        Ok((token.to_string(), id_in(vocabulary, token, path)?))
    };
    if settings.class().starts_with("Roberta") {
        return Ok(json!({
            "type": "RobertaProcessing", "sep": required("sep_token", "</s>")?,
            "cls": required("cls_token", "<s>")?, "trim_offsets": true, "add_prefix_space": prefix_space,
        }));
    }
    if settings.flag("add_bos_token", false) {
        let (token, id) = required("bos_token", "</s>")?;
        let special = json!({"SpecialToken": {"id": token, "type_id": 0}});
        let text = |id: &str, type_id: u32| json!({"Sequence": {"id": id, "type_id": type_id}});
        let mut tokens = Map::new();
        tokens.insert(
            token.clone(),
            json!({"id": token, "ids": [id], "tokens": [token]}),
        );
        return Ok(json!({
            "type": "TemplateProcessing",
            "single": [special, text("A", 0)],
            "pair": [special, text("A", 0), text("B", 1)],
            "special_tokens": tokens,
        }));
    }
    Ok(
        json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true}),
    )
}

/// The special tokens that the settings name, and `defaults`, where the vocabulary has them.
fn special_tokens(settings: &Settings, defaults: &[&str], vocabulary: &Vocabulary) -> Vec<Value> {
    let named = SPECIAL.iter().filter_map(|field| settings.token(field));
    let tokens: BTreeSet<(u32, &str)> = named
        .chain(defaults.iter().copied())
        .filter_map(|token| Some((*vocabulary.get(token)?, token)))
        .collect();
    tokens
        .into_iter()
        .map(|(id, token)| added_token(id, token))
        .collect()
}

fn id_in(vocabulary: &Vocabulary, token: &str, path: &Path) -> Result<u32, TokenizerError> {
    vocabulary
        .get(token)
        .copied()
        .ok_or_else(|| TokenizerError::Invalid {
            path: path.to_path_buf(),
            found: format!("it lacks the special token `{token}`"),
        })
}

fn parse<T: serde::de::DeserializeOwned>(path: &Path, text: &str) -> Result<T, TokenizerError> {
    serde_json::from_str(text).map_err(|error| TokenizerError::Invalid {
        path: path.to_path_buf(),
        found: error.to_string(),
    })
}
