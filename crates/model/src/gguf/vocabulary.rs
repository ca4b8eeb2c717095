//! The vocabulary of a GGUF file.

use serde::Deserialize;

use super::format::Value;
use crate::{Model, Result, Tokenizer};

/// The part of a `tokenizer.json` that is asked for.
#[derive(Deserialize)]
struct Json {
    model: Pairs,
    #[serde(default)]
    pre_tokenizer: Option<serde_json::Value>,
}

#[derive(Deserialize)]
struct Pairs {
    #[serde(default, rename = "type")]
    kind: Option<String>,
    #[serde(default)]
    merges: Vec<Merge>,
}

/// Two tokens that become one, as older and newer files write them.
#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Text(String),
    Pair(String, String),
}

/// What the file says of the vocabulary, and the kind: `gpt2` for byte-level pairs, else `none`.
pub(super) fn entries(
    tokenizer: Option<&Tokenizer>,
    model: &Model,
) -> Result<(&'static str, Vec<(String, Value)>)> {
    let key = |name: &str| format!("tokenizer.ggml.{name}");
    let none = || ("none", vec![(key("model"), Value::text("none"))]);
    let Some(tokenizer) = tokenizer else {
        return Ok(none());
    };
    let Ok(json) = serde_json::from_str::<Json>(&tokenizer.to_json()?) else {
        return Ok(none());
    };
    let pre_tokenizer = json.pre_tokenizer.unwrap_or_default().to_string();
    if json.model.kind.as_deref() != Some("BPE") || !pre_tokenizer.contains("ByteLevel") {
        return Ok(none());
    }
    let size = model.spec().vocabulary().unwrap_or(0) as u32;
    let (mut tokens, mut kinds) = (Vec::new(), Vec::new());
    for id in 0..size {
        let [normal, control, unused] = [1, 3, 5];
        let token = tokenizer.token_of(id);
        kinds.push(match &token {
            None => unused,
            Some(_) if tokenizer.is_special(id) => control,
            Some(_) => normal,
        });
        tokens.push(token.unwrap_or_else(|| format!("[PAD{id}]")));
    }
    let merges = json.model.merges.into_iter().map(|merge| match merge {
        Merge::Text(text) => text,
        Merge::Pair(first, second) => format!("{first} {second}"),
    });
    let split = pre_tokenizer.contains("Split");
    let pre = if split { "default" } else { "gpt-2" };
    Ok((
        "gpt2",
        vec![
            (key("model"), Value::text("gpt2")),
            (key("pre"), Value::text(pre)),
            (key("tokens"), Value::Texts(tokens)),
            (key("token_type"), Value::I32s(kinds)),
            (key("merges"), Value::Texts(merges.collect())),
        ],
    ))
}
