//! What can go wrong between text and tokens.

use std::path::PathBuf;

use crate::files::FileError;

/// A tokenizer that is missing or invalid, or a text that it cannot take.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// A file could not be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// The directory has no tokenizer.
    #[error(
        "{directory} has no tokenizer{found}; a model of text has tokenizer.json, vocab.txt, or \
         vocab.json with merges.txt"
    )]
    Missing {
        /// The directory.
        directory: PathBuf,
        /// A tokenizer in another format that is there, as `" (but tokenizer.model …)"`.
        found: String,
    },
    /// A tokenizer file is invalid.
    #[error("{path} is not a valid tokenizer: {found}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        found: String,
    },
    /// The text has no token.
    #[error("the text is empty, but it must have at least one token")]
    Empty,
    /// A limit leaves no room for text.
    #[error(
        "the limit is {limit} tokens, but must be more than the {added} that are added to a text"
    )]
    Limit {
        /// The limit asked for.
        limit: usize,
        /// Tokens that are added around a text.
        added: usize,
    },
    /// The tokenizer has ids that its model doesn't.
    #[error(
        "the tokenizer gives `{token}` the id {id}, but the model has only {model_vocabulary} rows; \
         they are not of one model"
    )]
    Vocabulary {
        /// The token with the largest id.
        token: String,
        /// Its id.
        id: u32,
        /// Rows of the model's token embedding.
        model_vocabulary: usize,
    },
    /// A vocabulary to be made is impossible.
    #[error("{field} is {found}, but must be {expected}")]
    Own {
        /// The argument.
        field: &'static str,
        /// Its value.
        found: String,
        /// What would be valid.
        expected: String,
    },
    /// The tokenizer refused.
    #[error("cannot {action}: {found}")]
    Failed {
        /// What was tried.
        action: &'static str,
        /// Why not.
        found: String,
    },
}
