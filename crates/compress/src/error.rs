//! What can go wrong while a model is cut down.

/// An error of a compression.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An argument is not one that can be used.
    #[error("{what} is {found}, but must be {expected}")]
    Invalid {
        /// The argument.
        what: String,
        /// Its value.
        found: String,
        /// What would be valid.
        expected: String,
    },
    /// A stage of a recipe is defined for the model as it was and not for what those before it left.
    #[error("{method} cannot be run on what {before} left: {reason}")]
    Later {
        /// The stage's method.
        method: String,
        /// Those before it.
        before: String,
        /// What it refused.
        reason: Box<Error>,
    },
    /// Statistics were collected on other weights than the ones they are used for.
    #[error(
        "the calibration belongs to weights {calibrated}, but this model has weights {found}: \
         calibrate it anew"
    )]
    Stale {
        /// Fingerprint of the weights that were calibrated.
        calibrated: String,
        /// Fingerprint of the model at hand.
        found: String,
    },
    /// A method needs a statistic that was not collected.
    #[error(
        "{statistic} is missing from the calibration: collect it with the requirements of the \
         method"
    )]
    NotCollected {
        /// The statistic.
        statistic: String,
    },
    /// A gradient or an activation is infinite or not a number.
    #[error("{what} is not finite, so nothing can be weighted by it")]
    NotFinite {
        /// Where it was seen.
        what: String,
    },
    /// A factorisation failed.
    #[error("layer {layer}: {reason}")]
    Layer {
        /// Path of the layer.
        layer: String,
        /// What failed.
        reason: lapidary_factor::Error,
    },
    /// A factorisation failed.
    #[error(transparent)]
    Factor(#[from] lapidary_factor::Error),
    /// The model or a part of it failed.
    #[error(transparent)]
    Model(#[from] lapidary_parts::Error),
    /// Generation failed.
    #[error(transparent)]
    Generation(Box<lapidary_model::Error>),
    /// An operation failed.
    #[error(transparent)]
    Signal(#[from] lapidary_signal::Error),
    /// Training failed.
    #[error(transparent)]
    Training(Box<lapidary_train::Error>),
    /// A kernel failed.
    #[error(transparent)]
    Kernel(#[from] lapidary_kernels::Error),
    /// A search failed.
    #[error(transparent)]
    Search(#[from] lapidary_search::Error),
}

/// The result of a compression.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// Shorthand for [`Error::Invalid`].
    pub(crate) fn invalid(
        what: impl Into<String>,
        found: impl std::fmt::Display,
        expected: impl Into<String>,
    ) -> Self {
        Self::Invalid {
            what: what.into(),
            found: found.to_string(),
            expected: expected.into(),
        }
    }
}

/// Lifts an error of the tensor engine.
pub(crate) fn engine<T, E: Into<lapidary_kernels::Error>>(
    result: std::result::Result<T, E>,
) -> Result<T> {
    result.map_err(|error| Error::Kernel(error.into()))
}

impl From<lapidary_model::Error> for Error {
    fn from(error: lapidary_model::Error) -> Self {
        Self::Generation(Box::new(error))
    }
}

impl From<lapidary_train::Error> for Error {
    fn from(error: lapidary_train::Error) -> Self {
        Self::Training(Box::new(error))
    }
}
