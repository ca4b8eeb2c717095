//! What can go wrong in a search.

/// An error of a search.
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
    /// A covariance is not positive definite.
    #[error(
        "the covariance of {points} points is not positive definite, even with {jitter:e} added \
         to its diagonal; give more noise"
    )]
    NotPositive {
        /// Points that were observed.
        points: usize,
        /// The most that was added.
        jitter: f64,
    },
    /// Every point of the domain was observed.
    #[error("all {points} points of the domain were observed: nothing is left to suggest")]
    Exhausted {
        /// Points of the domain.
        points: usize,
    },
}

/// The result of a search.
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
