//! What can go wrong when a signal flows.

/// An error of an operation on a [`Signal`](crate::Signal).
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A kernel refused its arguments.
    #[error(transparent)]
    Kernel(#[from] lapidary_kernels::Error),
    /// The lens has no rule for this operation.
    #[error("the {lens} lens has no rule for {operation}: {advice}")]
    Undefined {
        /// The lens that is on.
        lens: &'static str,
        /// The operation that was asked for.
        operation: &'static str,
        /// What can be done instead.
        advice: &'static str,
    },
    /// Two signals under different lenses met.
    #[error(
        "{operation}: one signal is under the {left} lens and the other under {right}; start both at one site"
    )]
    LensMismatch {
        /// The operation that joins them.
        operation: &'static str,
        /// Lens of the first.
        left: &'static str,
        /// Lens of the second.
        right: &'static str,
    },
    /// A setting or shape is impossible.
    #[error("{what} is {found}, but must be {expected}")]
    Invalid {
        /// What is wrong.
        what: String,
        /// Its value.
        found: String,
        /// What it would have to be.
        expected: String,
    },
    /// A site pattern cannot be read.
    #[error("site pattern {pattern:?} is not a valid glob: {reason}")]
    Pattern {
        /// The pattern as given.
        pattern: String,
        /// What the glob parser says.
        reason: String,
    },
    /// A site that was asked for was never written.
    #[error("no site matches {pattern:?}; the model wrote {written}")]
    NoSuchSite {
        /// The name or pattern that was asked for.
        pattern: String,
        /// Names that exist.
        written: String,
    },
}

/// The result of an operation on a signal.
pub type Result<T> = std::result::Result<T, Error>;

/// Candle's own errors arrive as kernel errors.
pub(crate) fn tensor<T, E: Into<lapidary_kernels::Error>>(
    result: std::result::Result<T, E>,
) -> Result<T> {
    result.map_err(|error| Error::Kernel(error.into()))
}

impl Error {
    /// Shorthand for [`Error::Invalid`].
    pub fn invalid(
        what: impl Into<String>,
        found: impl std::fmt::Debug,
        expected: impl Into<String>,
    ) -> Self {
        Self::Invalid {
            what: what.into(),
            found: format!("{found:?}"),
            expected: expected.into(),
        }
    }
}
