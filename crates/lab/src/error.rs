//! What can go wrong in an experiment.

/// An error of an experiment.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No system has that name.
    #[error("system {slug:?} is unknown; the systems are {known}")]
    Unknown {
        /// The name that was asked for.
        slug: String,
        /// Those that exist.
        known: String,
    },
    /// An experiment met something that it cannot go on from.
    #[error("{0}")]
    Experiment(String),
    /// Seeds, or runs with them, that are not joined.
    #[error("{0}")]
    Seeds(String),
    /// One of several seeds failed.
    #[error("seed {seed}: {cause}")]
    Seed {
        /// Which.
        seed: u64,
        /// Why.
        cause: Box<Error>,
    },
    /// A part or model failed.
    #[error(transparent)]
    Part(#[from] lapidary_parts::Error),
    /// A model failed.
    #[error(transparent)]
    Model(Box<lapidary_model::Error>),
    /// An explanation failed.
    #[error(transparent)]
    Explain(Box<lapidary_explain::Error>),
    /// A compression failed.
    #[error(transparent)]
    Compress(Box<lapidary_compress::Error>),
    /// A decomposition failed.
    #[error(transparent)]
    Factor(#[from] lapidary_factor::Error),
    /// Training failed.
    #[error(transparent)]
    Train(Box<lapidary_train::Error>),
    /// A search failed.
    #[error(transparent)]
    Search(#[from] lapidary_search::Error),
    /// A signal's operation failed.
    #[error(transparent)]
    Signal(#[from] lapidary_signal::Error),
    /// A kernel failed.
    #[error(transparent)]
    Kernel(#[from] lapidary_kernels::Error),
}

// The errors of whole rooms are large; boxed, they do not weigh on every result.
macro_rules! boxed {
    ($($variant:ident: $error:ty),*) => {
        $(impl From<$error> for Error {
            fn from(error: $error) -> Self {
                Self::$variant(Box::new(error))
            }
        })*
    };
}

boxed! {
    Model: lapidary_model::Error,
    Explain: lapidary_explain::Error,
    Compress: lapidary_compress::Error,
    Train: lapidary_train::Error
}

/// The result of an experiment.
pub type Result<T> = std::result::Result<T, Error>;

/// Lifts an error of the tensor engine.
pub(crate) fn engine<T, E: Into<lapidary_kernels::Error>>(
    result: std::result::Result<T, E>,
) -> Result<T> {
    result.map_err(|error| Error::Kernel(error.into()))
}
