//! What can go wrong in a kernel.

/// An error of a kernel or of the tensor engine below it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The tensor engine refused an operation.
    #[error(transparent)]
    Tensor(#[from] candle_core::Error),
    /// An argument has a shape, type or value that the kernel cannot take.
    #[error("{kernel}: {argument} is {found}, but must be {expected}")]
    Argument {
        /// The kernel that was called.
        kernel: &'static str,
        /// The argument that is wrong.
        argument: &'static str,
        /// What it is.
        found: String,
        /// What it would have to be.
        expected: String,
    },
}

/// The result of a kernel.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// Shorthand for [`Error::Argument`].
    pub fn argument(
        kernel: &'static str,
        argument: &'static str,
        found: impl std::fmt::Debug,
        expected: impl Into<String>,
    ) -> Self {
        Self::Argument {
            kernel,
            argument,
            found: format!("{found:?}"),
            expected: expected.into(),
        }
    }
}
