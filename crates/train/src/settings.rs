//! What a run that goes on has to have in common with the one that began.

use serde_json::Value;

use crate::{Error, Result, TrainSpec};

/// Characters of a value that an error shows.
const SHOWN: usize = 60;

impl TrainSpec {
    /// The settings that a resumed run must share: all but how often it looks up. The number of steps is one of
    /// them, since the rate of each step depends on it.
    pub(crate) fn settings(&self) -> Result<Value> {
        let mut spec = self.clone();
        spec.checkpoint = Default::default();
        spec.validation.every = 0;
        serde_json::to_value(&spec).map_err(|error| Error::Setting {
            name: "training spec",
            found: error.to_string(),
            expected: "one that serialises",
        })
    }

    /// Refuses the settings of a saved run that are other ones.
    pub(crate) fn check_settings(&self, saved: &Value) -> Result<()> {
        match difference(saved, &self.settings()?, "") {
            None => Ok(()),
            Some(difference) => Err(Error::Setting {
                name: "the saved run's spec",
                found: format!("another ({difference})"),
                expected: "the same as now; start a new run in another directory",
            }),
        }
    }
}

/// The first field in which settings differ, with what it was and is.
fn difference(before: &Value, now: &Value, path: &str) -> Option<String> {
    if before == now {
        return None;
    }
    let below = |name: &str| match path {
        "" => name.to_owned(),
        _ => format!("{path}.{name}"),
    };
    match (before, now) {
        (Value::Object(before), Value::Object(now)) => {
            let added = now.keys().filter(|name| !before.contains_key(*name));
            before.keys().chain(added).find_map(|name| {
                let of = |all: &serde_json::Map<String, Value>| {
                    all.get(name).cloned().unwrap_or(Value::Null)
                };
                difference(&of(before), &of(now), &below(name))
            })
        }
        (Value::Array(before), Value::Array(now)) if before.len() == now.len() => {
            let mut pairs = before.iter().zip(now).enumerate();
            pairs.find_map(|(place, (before, now))| {
                difference(before, now, &below(&place.to_string()))
            })
        }
        _ => Some(format!("{path} was {}, and is {}", said(before), said(now))),
    }
}

/// A value, or the beginning of a long one.
fn said(value: &Value) -> String {
    if value.is_null() {
        return "absent".to_owned();
    }
    let whole = value.to_string();
    match whole.char_indices().nth(SHOWN) {
        Some((end, _)) => format!("{}…", &whole[..end]),
        None => whole,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_first_difference_is_told_with_its_path() {
        let told = |before: Value, now: Value| difference(&before, &now, "");
        assert_eq!(
            told(json!({ "a": 1, "b": 2 }), json!({ "b": 2, "a": 1 })),
            None
        );
        for (before, now, expected) in [
            (
                json!({ "steps": 2 }),
                json!({ "steps": 3 }),
                "steps was 2, and is 3",
            ),
            (
                json!({ "model": { "blocks": [{ "heads": 2 }, { "heads": 2 }] } }),
                json!({ "model": { "blocks": [{ "heads": 2 }, { "heads": 4 }] } }),
                "model.blocks.1.heads was 2, and is 4",
            ),
            (
                json!({ "clip": 0.5 }),
                json!({}),
                "clip was 0.5, and is absent",
            ),
            (
                json!({}),
                json!({ "clip": 0.5 }),
                "clip was absent, and is 0.5",
            ),
            (
                json!({ "at": [1] }),
                json!({ "at": [1, 2] }),
                "at was [1], and is [1,2]",
            ),
        ] {
            assert_eq!(told(before, now).as_deref(), Some(expected));
        }
    }

    #[test]
    fn long_values_are_cut_between_characters() {
        let said = said(&json!("ü".repeat(100)));
        assert_eq!(said.chars().count(), SHOWN + 1);
        assert!(said.ends_with('…') && said.starts_with("\"ü"));
    }
}
