//! Numbers that JSON has no word for, as Python programs write them.
//!
//! `transformers` writes infinity as `{"__float__": "Infinity"}`, and before version 5 as the bare
//! word, which `json.dumps` puts where a number stands and no other reader takes.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

/// A number of a config that may be infinite.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(
    untagged,
    expecting = "expected a number, or {\"__float__\": \"Infinity\"}"
)]
pub(super) enum Float {
    Finite(f64),
    Named {
        #[serde(rename = "__float__")]
        name: Name,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(super) enum Name {
    Infinity,
    #[serde(rename = "-Infinity")]
    MinusInfinity,
    NaN,
}

/// The bare words, longest first where one ends with another.
const WORDS: [&str; 3] = ["-Infinity", "Infinity", "NaN"];

impl From<f64> for Float {
    fn from(number: f64) -> Self {
        let name = match number {
            number if number.is_finite() => return Self::Finite(number),
            number if number.is_nan() => Name::NaN,
            number if number > 0.0 => Name::Infinity,
            _ => Name::MinusInfinity,
        };
        Self::Named { name }
    }
}

impl From<Float> for f64 {
    fn from(float: Float) -> Self {
        match float {
            Float::Finite(number) => number,
            Float::Named { name } => match name {
                Name::Infinity => f64::INFINITY,
                Name::MinusInfinity => f64::NEG_INFINITY,
                Name::NaN => f64::NAN,
            },
        }
    }
}

/// The text with every bare word outside of strings as an object that names it: JSON, if the rest is.
pub(super) fn named(text: &str) -> Cow<'_, str> {
    if !WORDS.iter().any(|word| text.contains(word)) {
        return Cow::Borrowed(text);
    }
    let mut output = String::with_capacity(text.len() + 64);
    let mut rest = text;
    while let Some(next) = rest.chars().next() {
        let word = WORDS.iter().find(|word| rest.starts_with(**word));
        let taken = match (next, word) {
            ('"', _) => string_length(rest),
            (_, Some(word)) => {
                output.push_str(&format!("{{\"__float__\": \"{word}\"}}"));
                rest = rest.get(word.len()..).unwrap_or_default();
                continue;
            }
            (other, None) => other.len_utf8(),
        };
        let (piece, left) = rest.split_at_checked(taken).unwrap_or((rest, ""));
        output.push_str(piece);
        rest = left;
    }
    Cow::Owned(output)
}

/// Bytes of the string that `text` begins with, both quotes included; all of it where none ends it.
fn string_length(text: &str) -> usize {
    let mut escaped = true; // The first quote ends nothing.
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => return at + 1,
            _ => {}
        }
    }
    text.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bare_words_are_named_and_strings_stay() {
        let text = r#"{"a": [0.0, Infinity, -Infinity], "NaN \" Infinity": "NaN\\", "b": NaN}"#;
        assert_eq!(
            named(text),
            r#"{"a": [0.0, {"__float__": "Infinity"}, {"__float__": "-Infinity"}], "NaN \" Infinity": "NaN\\", "b": {"__float__": "NaN"}}"#
        );
        for same in [r#"{"a": 1.0}"#, r#"{"Infinity": "ünd"}"#, r#"{"Infinity"#] {
            assert_eq!(named(same), same);
        }
    }

    #[test]
    fn numbers_come_back() {
        for number in [0.5, f64::INFINITY, f64::NEG_INFINITY] {
            let text = serde_json::to_string(&Float::from(number)).unwrap();
            let back: Float = serde_json::from_str(&text).unwrap();
            assert_eq!(f64::from(back), number, "{text}");
        }
        assert!(f64::from(Float::from(f64::NAN)).is_nan());
    }
}
