//! What can go wrong in training.

use std::path::{Path, PathBuf};

/// An error of training or of its data.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A tensor operation failed.
    #[error(transparent)]
    Kernel(#[from] lapidary_kernels::Error),
    /// A site could not be read.
    #[error(transparent)]
    Signal(#[from] lapidary_signal::Error),
    /// A model could not be made, run or written.
    #[error(transparent)]
    Model(#[from] lapidary_model::Error),
    /// A file could not be read or written.
    #[error("cannot {action} {}: {reason}", path.display())]
    File {
        /// What was attempted.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why it failed. The message says it, so that it is no `source` which would say it again.
        reason: std::io::Error,
    },
    /// A file is not what it should be.
    #[error("{} is not a valid {what}: {detail}", path.display())]
    Format {
        /// What the file should be.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        detail: String,
    },
    /// A setting has a value it cannot have.
    #[error("{name} is {found}, but must be {expected}")]
    Setting {
        /// The setting.
        name: &'static str,
        /// Its value.
        found: String,
        /// What it would have to be.
        expected: &'static str,
    },
    /// A word that the vocabulary does not have.
    #[error("the word {word:?} is not in the vocabulary")]
    UnknownWord {
        /// The word.
        word: String,
    },
    /// A token beyond the vocabulary.
    #[error("token {token} is out of range: the vocabulary has {vocabulary} entries")]
    TokenRange {
        /// The token.
        token: u32,
        /// Entries of the vocabulary.
        vocabulary: u32,
    },
    /// Too little data for what is asked of it.
    #[error("{what} has {found} tokens, but {needed} are needed")]
    TooShort {
        /// The data.
        what: String,
        /// Its tokens.
        found: u64,
        /// Tokens needed.
        needed: u64,
    },
    /// A part of a file that not one window of a sequence fits into.
    #[error(
        "validation.fraction = {fraction} leaves {found} of the {tokens} tokens of {} for {side}, but a window takes \
         {needed}, length and one more: change either, or take a longer file",
        path.display()
    )]
    TooShortSide {
        /// What the part is for: training, or validation.
        side: &'static str,
        /// The file.
        path: PathBuf,
        /// Its tokens.
        tokens: u64,
        /// Those of the part.
        found: u64,
        /// The share that is for validation.
        fraction: f64,
        /// Tokens of a window.
        needed: u64,
    },
    /// A tensor that should be there is missing, or is not of the expected form.
    #[error("tensor {name:?}: {detail}")]
    Tensor {
        /// The tensor.
        name: String,
        /// What is wrong with it.
        detail: String,
    },
}

/// The result of something in training.
pub type Result<T> = std::result::Result<T, Error>;

impl From<lapidary_model::files::FileError> for Error {
    fn from(error: lapidary_model::files::FileError) -> Self {
        Self::Model(error.into())
    }
}

impl Error {
    /// For `map_err` on an operation of the file system.
    pub(crate) fn file(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        move |reason| Self::File {
            action,
            path: path.to_path_buf(),
            reason,
        }
    }

    /// A malformed file.
    pub(crate) fn format(what: &'static str, path: &Path, detail: impl Into<String>) -> Self {
        Self::Format {
            what,
            path: path.to_path_buf(),
            detail: detail.into(),
        }
    }
}

/// What the tensor engine gives, its errors as these.
pub(crate) fn engine<T, E: Into<lapidary_kernels::Error>>(
    result: std::result::Result<T, E>,
) -> Result<T> {
    result.map_err(|error| Error::Kernel(error.into()))
}
