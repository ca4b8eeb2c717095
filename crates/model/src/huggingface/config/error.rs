//! What can be wrong with a config.

use std::path::PathBuf;

use crate::files::FileError;

/// A `config.json` that cannot be read or that asks for something invalid.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error(transparent)]
    File(#[from] FileError),
    /// It isn't a JSON object.
    #[error("{path} is not a JSON object: {found}")]
    Json {
        /// The file.
        path: PathBuf,
        /// What the parser says.
        found: String,
    },
    /// A field is of the wrong type, out of its range, or at odds with another.
    #[error("{path}: {field} is {found}, but must be {expected}")]
    Field {
        /// The file.
        path: PathBuf,
        /// The field, with the object it is in: `text_config.hidden_size`.
        field: String,
        /// Its value.
        found: String,
        /// What would be valid.
        expected: String,
    },
    /// The fields are fine one by one but make a model beyond the limit.
    #[error("{path} asks for about {found} parameters, but at most {limit} are allowed")]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Parameters in its matrices.
        found: u128,
        /// The limit.
        limit: u64,
    },
}
