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
    /// A figure could not be drawn.
    #[error("the plot {title:?} could not be drawn: {reason}")]
    Plot {
        /// The figure's title.
        title: String,
        /// What the plotting library says.
        reason: String,
    },
    /// An experiment met something that it cannot go on from.
    #[error("{0}")]
    Experiment(String),
    /// A part or model failed.
    #[error(transparent)]
    Part(#[from] lapidary_parts::Error),
    /// A model failed.
    #[error(transparent)]
    Model(#[from] lapidary_model::Error),
    /// An explanation failed.
    #[error(transparent)]
    Explain(#[from] lapidary_explain::Error),
    /// A compression failed.
    #[error(transparent)]
    Compress(#[from] lapidary_compress::Error),
    /// Training failed.
    #[error(transparent)]
    Train(#[from] lapidary_train::Error),
    /// A signal's operation failed.
    #[error(transparent)]
    Signal(#[from] lapidary_signal::Error),
    /// A kernel failed.
    #[error(transparent)]
    Kernel(#[from] lapidary_kernels::Error),
}

/// The result of an experiment.
pub type Result<T> = std::result::Result<T, Error>;

/// Lifts an error of the tensor engine.
pub(crate) fn engine<T, E: Into<lapidary_kernels::Error>>(
    result: std::result::Result<T, E>,
) -> Result<T> {
    result.map_err(|error| Error::Kernel(error.into()))
}
