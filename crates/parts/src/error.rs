//! What can go wrong while a part is specified, built or run.

/// An error of a part.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A spec asks for something impossible.
    #[error("{field} is {found}, but must be {expected}")]
    Spec {
        /// Path of the field, such as `blocks.3.attention.heads`.
        field: String,
        /// Its value.
        found: String,
        /// What would be valid.
        expected: String,
    },
    /// A parameter cannot be had.
    #[error("parameter {name}: {reason}")]
    Parameter {
        /// Full name of the parameter.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
    /// An operation failed.
    #[error(transparent)]
    Signal(#[from] lapidary_signal::Error),
    /// A kernel failed.
    #[error(transparent)]
    Kernel(#[from] lapidary_kernels::Error),
}

/// The result of building or running a part.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// Shorthand for [`Error::Spec`].
    pub fn spec(
        field: impl Into<String>,
        found: impl std::fmt::Debug,
        expected: impl Into<String>,
    ) -> Self {
        Self::Spec {
            field: field.into(),
            found: format!("{found:?}"),
            expected: expected.into(),
        }
    }
}

/// Lifts an error of the tensor engine.
pub(crate) fn tensor<T, E: Into<lapidary_kernels::Error>>(
    result: std::result::Result<T, E>,
) -> Result<T> {
    result.map_err(|error| Error::Kernel(error.into()))
}

/// Refuses a number outside `range`.
pub(crate) fn bounded(
    field: impl Into<String>,
    value: usize,
    range: std::ops::RangeInclusive<usize>,
) -> Result<()> {
    if range.contains(&value) {
        return Ok(());
    }
    let expected = format!("between {} and {}", range.start(), range.end());
    Err(Error::spec(field, value, expected))
}
