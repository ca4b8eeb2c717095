//! Factorisations of matrices, with no network in them.
//!
//! Everything is computed in `f64` by faer, threaded; tensors of any float type enter through
//! [`matrix_from_tensor`] and leave through [`matrix_to_tensor`], rounded once.
//!
//! - [`thin_svd`], [`qr`], [`symmetric_eigen`], [`cholesky`], [`square_root`],
//!   [`inverse_square_root`]: the classical decompositions, with errors as values.
//! - [`WeightedSvd`]: the best low-rank pair of layers for a stored weight under a [`Metric`],
//!   from plain SVD to the Kronecker-factored Fisher information.
//! - [`Regression`]: the best linear map between rows, of several forms, streaming; [`nearest_distances`].
//! - [`minimise`], [`minimise_conjugate`]: a low value of a smooth function, by L-BFGS or by
//!   conjugate gradients.
//! - [`trees`]: products with functions of the distances in a tree, without the matrix.
//! - [`polynomial`]: all roots at once.
//! - [`rank`]: how many parameters a rank costs, and which rank a budget buys.
//!
//! ```
//! use lapidary_factor::{Metric, WeightedSvd};
//! use lapidary_kernels::{Device, Tensor};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let weight = Tensor::new(&[[1f32, 2., 3.], [2., 4., 6.]], &Device::Cpu)?; // rank one
//! let decomposition = WeightedSvd::new(&weight, &Metric::Plain)?;
//! let approximation = decomposition.truncate(1)?;
//! assert!(approximation.plain_error < 1e-12);
//! assert_eq!(approximation.factors.down.dims(), [1, 3]);
//! # Ok(())
//! # }
//! ```

mod conjugate;
mod decompose;
mod error;
mod lbfgs;
mod matrix;
mod neighbours;
pub mod polynomial;
pub mod rank;
mod regression;
pub mod trees;
mod weighted;

pub use conjugate::{ConjugateOptions, minimise_conjugate};
pub use decompose::{
    Cholesky, Qr, Svd, SymmetricEigen, cholesky, inverse_square_root, qr, square_root,
    symmetric_eigen, thin_svd,
};
pub use error::{Error, Result};
pub use lbfgs::{LbfgsOptions, Minimum, minimise};
pub use matrix::{Matrix, MatrixView, frobenius_norm, matrix_from_tensor, matrix_to_tensor};
pub use neighbours::nearest_distances;
pub use regression::{AffineMap, Regression};
pub use weighted::{
    Approximation, LowRank, Metric, WeightedSvd, covariance_whitened, input_scaled,
    kronecker_weighted, plain, row_column_weighted, row_weighted,
};
