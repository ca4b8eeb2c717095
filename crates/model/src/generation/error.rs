//! What can go wrong in generation.

use crate::tokenizer::TokenizerError;

/// Options that are invalid, or logits that no token can be chosen from.
#[derive(Debug, thiserror::Error)]
pub enum GenerationError {
    /// An option is out of its range.
    #[error("{option} is {found}, but must be {expected}")]
    Option {
        /// The option.
        option: &'static str,
        /// Its value.
        found: String,
        /// What would be valid.
        expected: &'static str,
    },
    /// The model's logits are unusable.
    #[error(
        "the logits have {nan} NaN and {infinite} infinite values among {total}; a token needs a finite one"
    )]
    Logits {
        /// How many are NaN.
        nan: usize,
        /// How many are infinite.
        infinite: usize,
        /// How many there are.
        total: usize,
    },
    /// Tokens could not be decoded.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
}
