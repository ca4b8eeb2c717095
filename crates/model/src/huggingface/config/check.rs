//! Checks of fields, with errors that name the field, its value and what would be valid.

use std::fmt::Display;
use std::ops::RangeInclusive;
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::ConfigError;
use crate::Limits;

/// No published model comes near these. With them, every product of a config's sizes fits `u128`.
pub(super) const VOCABULARY: RangeInclusive<usize> = 1..=1 << 24;
pub(super) const WIDTH: RangeInclusive<usize> = 1..=1 << 20;
pub(super) const INNER_WIDTH: RangeInclusive<usize> = 1..=1 << 22;
pub(super) const LAYERS: RangeInclusive<usize> = 1..=1 << 12;
pub(super) const HEADS: RangeInclusive<usize> = 1..=1 << 12;
pub(super) const LENGTH: RangeInclusive<usize> = 1..=1 << 28;
pub(super) const EXPERTS: RangeInclusive<usize> = 1..=1 << 12;

/// Where the fields being checked come from.
pub(super) struct Check<'file> {
    path: &'file Path,
    limits: &'file Limits,
    /// The object inside the file, as `text_config.`, or nothing.
    prefix: &'static str,
}

impl<'file> Check<'file> {
    pub fn new(path: &'file Path, limits: &'file Limits) -> Self {
        Self {
            path,
            limits,
            prefix: "",
        }
    }

    /// For the fields of an object inside the file; `prefix` ends with a dot.
    pub fn inside(&self, prefix: &'static str) -> Self {
        Self { prefix, ..*self }
    }

    pub fn wrong(
        &self,
        field: &str,
        found: impl Display,
        expected: impl Into<String>,
    ) -> ConfigError {
        let mut found = found.to_string();
        if found.chars().count() > LONGEST_SHOWN {
            found = found.chars().take(LONGEST_SHOWN).chain(['…']).collect();
        }
        ConfigError::Field {
            path: self.path.to_path_buf(),
            field: format!("{}{field}", self.prefix),
            found,
            expected: expected.into(),
        }
    }

    /// A field that may be absent or null.
    pub fn read<T: DeserializeOwned>(
        &self,
        fields: &Map<String, Value>,
        name: &str,
    ) -> Result<Option<T>, ConfigError> {
        match fields.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => {
                let parsed = serde_json::from_value(value.clone());
                parsed
                    .map(Some)
                    .map_err(|error| self.wrong(name, value, readable(&error)))
            }
        }
    }

    /// A struct of defaults as an object.
    pub fn to_object(&self, defaults: impl Serialize) -> Result<Map<String, Value>, ConfigError> {
        match serde_json::to_value(defaults) {
            Ok(Value::Object(fields)) => Ok(fields),
            Ok(other) => Err(self.wrong("defaults", other, "an object")),
            Err(error) => Err(self.wrong("defaults", error, "an object")),
        }
    }

    /// An object as a struct; a wrong type is reported with its field.
    pub fn parse_object<T: DeserializeOwned>(
        &self,
        fields: Map<String, Value>,
    ) -> Result<T, ConfigError> {
        let value = Value::Object(fields);
        serde_path_to_error::deserialize(&value).map_err(|error| {
            let field = error.path().to_string();
            let found = value.get(&field).cloned().unwrap_or_default();
            self.wrong(&field, found, readable(error.inner()))
        })
    }

    pub fn between(
        &self,
        field: &str,
        value: usize,
        range: RangeInclusive<usize>,
    ) -> Result<(), ConfigError> {
        if range.contains(&value) {
            return Ok(());
        }
        let expected = format!("between {} and {}", range.start(), range.end());
        Err(self.wrong(field, value, expected))
    }

    /// `value` divides `whole`, for instance the heads the width.
    pub fn divides(
        &self,
        field: &str,
        value: usize,
        whole_field: &str,
        whole: usize,
    ) -> Result<(), ConfigError> {
        if value != 0 && whole.is_multiple_of(value) {
            return Ok(());
        }
        let expected = format!("a divisor of {}{whole_field}, {whole}", self.prefix);
        Err(self.wrong(field, value, expected))
    }

    /// A norm's epsilon.
    pub fn epsilon(&self, field: &str, value: f64) -> Result<(), ConfigError> {
        if (0.0..=1.0).contains(&value) {
            return Ok(());
        }
        Err(self.wrong(field, value, "between 0 and 1"))
    }

    pub fn positive(&self, field: &str, value: f64) -> Result<(), ConfigError> {
        if value > 0.0 && value.is_finite() {
            return Ok(());
        }
        Err(self.wrong(field, value, "a positive number"))
    }

    pub fn parameters(&self, found: u128) -> Result<(), ConfigError> {
        if found <= u128::from(self.limits.parameters) {
            return Ok(());
        }
        Err(ConfigError::TooLarge {
            path: self.path.to_path_buf(),
            found,
            limit: self.limits.parameters,
        })
    }
}

const LONGEST_SHOWN: usize = 100;

/// Activations under their names in `transformers`, for `#[serde(with = "activation")]`.
pub(super) mod activation {
    use lapidary_kernels::Activation;
    use serde::de::{Deserialize, Deserializer, Error as _};
    use serde::ser::{Error as _, Serializer};

    /// Names that compute the same stand for one activation; the first is the one written.
    const NAMES: [(&str, Activation); 12] = [
        ("gelu", Activation::Gelu),
        ("gelu_python", Activation::Gelu),
        ("gelu_new", Activation::GeluTanh),
        ("gelu_fast", Activation::GeluTanh),
        ("gelu_pytorch_tanh", Activation::GeluTanh),
        ("quick_gelu", Activation::QuickGelu),
        ("relu", Activation::Relu),
        ("silu", Activation::Silu),
        ("swish", Activation::Silu),
        ("tanh", Activation::Tanh),
        ("sigmoid", Activation::Sigmoid),
        ("linear", Activation::Identity),
    ];

    pub fn serialize<S: Serializer>(value: &Activation, serializer: S) -> Result<S::Ok, S::Error> {
        let found = NAMES.iter().find(|(_, activation)| activation == value);
        let (name, _) = found.ok_or_else(|| S::Error::custom("an activation without a name"))?;
        serializer.serialize_str(name)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Activation, D::Error> {
        let name = String::deserialize(deserializer)?;
        let found = NAMES.iter().find(|(known, _)| *known == name);
        found.map(|(_, activation)| *activation).ok_or_else(|| {
            let names: Vec<&str> = NAMES.iter().map(|(name, _)| *name).collect();
            D::Error::custom(format!("expected one of {}", names.join(", ")))
        })
    }
}

/// What serde expected: `invalid type: string "a", expected usize` becomes `usize` in words.
fn readable(error: &serde_json::Error) -> String {
    let message = error.to_string();
    let expected = message
        .rsplit_once("expected ")
        .map_or(message.as_str(), |(_, end)| end);
    match expected {
        "usize" | "u32" | "u64" => "a whole number that is not negative".to_string(),
        "f64" => "a number".to_string(),
        "a boolean" => "true or false".to_string(),
        other => other.to_string(),
    }
}
