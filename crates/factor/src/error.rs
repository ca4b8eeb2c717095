//! What can go wrong in a factorisation.

/// An error of a factorisation.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A tensor operation failed.
    #[error(transparent)]
    Kernel(#[from] lapidary_kernels::Error),
    /// A tensor has the wrong number of dimensions, or an empty one.
    #[error("{name} has shape {found:?}, but must be a matrix with no empty dimension")]
    NotMatrix {
        /// The argument.
        name: &'static str,
        /// Its shape.
        found: Vec<usize>,
    },
    /// Two arguments do not fit together.
    #[error("{name} has shape {found:?}, but must have shape {expected:?}")]
    Shape {
        /// The argument.
        name: &'static str,
        /// Its shape.
        found: Vec<usize>,
        /// The shape that fits.
        expected: Vec<usize>,
    },
    /// A number is infinite or not a number.
    #[error("{name} holds {value} at {position:?}, but must be finite")]
    NotFinite {
        /// The argument.
        name: &'static str,
        /// The offending number.
        value: f64,
        /// Its row and column.
        position: (usize, usize),
    },
    /// An importance is negative or not finite.
    #[error("{name} is {value} at index {index}, but must be finite and not negative")]
    Importance {
        /// The argument.
        name: &'static str,
        /// The offending number.
        value: f64,
        /// Where it stands.
        index: usize,
    },
    /// A rank that the matrix cannot have.
    #[error("rank {rank} is out of range: it must be between 1 and {largest}")]
    Rank {
        /// The rank asked for.
        rank: usize,
        /// The smaller side of the matrix.
        largest: usize,
    },
    /// A matrix that must be symmetric is not.
    #[error("{name} differs from its transpose by {difference:e}, but must be symmetric")]
    NotSymmetric {
        /// The argument.
        name: &'static str,
        /// The largest difference, relative to the largest entry.
        difference: f64,
    },
    /// A matrix that must be positive semi-definite is not.
    #[error("{name} is not positive semi-definite: {detail}")]
    NotPositive {
        /// The argument.
        name: &'static str,
        /// What showed it.
        detail: String,
    },
    /// A graph that is none, or is not the kind that is asked for.
    #[error("the graph {detail}")]
    Graph {
        /// What is wrong with it.
        detail: String,
    },
    /// An iteration did not converge.
    #[error("the {what} of a {rows} by {columns} matrix did not converge")]
    NoConvergence {
        /// The decomposition.
        what: &'static str,
        /// Rows of the matrix.
        rows: usize,
        /// Columns of the matrix.
        columns: usize,
    },
}

/// The result of a factorisation.
pub type Result<T> = std::result::Result<T, Error>;
