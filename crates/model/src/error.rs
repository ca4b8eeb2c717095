//! What can go wrong between a file and a model.

use crate::checkpoint::CheckpointError;
use crate::files::FileError;
use crate::generation::GenerationError;
use crate::huggingface::ConfigError;
use crate::tokenizer::TokenizerError;

/// An error of this crate: each kind says in one sentence what was wrong and what would be right.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// A checkpoint is not what it claims to be.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A `config.json` asks for something that is unknown or invalid.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A spec is impossible, or a part failed.
    #[error(transparent)]
    Part(#[from] lapidary_parts::Error),
    /// A tokenizer is missing or refused its input.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// Generation was asked for something invalid.
    #[error(transparent)]
    Generation(#[from] GenerationError),
    /// A kernel refused its arguments.
    #[error(transparent)]
    Kernel(#[from] lapidary_kernels::Error),
}

/// The result of a function of this crate.
pub type Result<T> = std::result::Result<T, Error>;
