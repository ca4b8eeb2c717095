//! Kinds that have no fields.

use serde::{Deserialize, Deserializer};

/// Reads a kind without fields, beside which serde would pass over any: `deserialize_with` of a unit variant.
///
/// # Errors
/// When there is a field.
pub fn none<'de, D: Deserializer<'de>>(deserializer: D) -> Result<(), D::Error> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Nothing {}
    Nothing::deserialize(deserializer).map(|Nothing {}| ())
}
