//! The best low-rank pair for a layer, in a norm that knows what the layer is for.
//!
//! Papers: *Language model compression with weighted low-rank factorization* (FWSVD; Hsu, Hua,
//! Chang, Lou, Shen, Jin 2022, arXiv 2207.00112) for rows weighted by Fisher information;
//! *ASVD* (Yuan et al. 2023, arXiv 2312.05821) for inputs scaled by their activations; *SVD-LLM*
//! (Wang et al. 2024, arXiv 2403.07378) for whitening by the full input covariance; *Generalized
//! Fisher-Weighted SVD* (Chekalina et al. 2025, arXiv 2505.17974) for a Kronecker-factored Fisher.
//!
//! All of them are one problem. For a stored weight `W [output, input]`, with `y = x Wᵀ`, find the
//! matrix of rank `r` that minimises
//!
//! ```text
//! ‖ Q (W − Ŵ) P ‖_F        P [input, input], Q [output, output]
//! ```
//!
//! Let `Q W P = U S Vᵀ`. The minimum is `√(Σ_{k>r} S_k²)` (Eckart and Young), reached by
//!
//! ```text
//! Ŵ = Q⁻¹ U_r U_rᵀ Q W
//! ```
//!
//! which equals the papers' `Q⁻¹ U_r S_r V_rᵀ P⁻¹` where `P` has an inverse but never divides by
//! `P`: an input that the metric ignores costs no accuracy. (The papers store `W` transposed;
//! their rows are our inputs.)
//!
//! Each of the `r` directions is scaled so that its row of `down` and its column of `up` have the
//! same norm. For plain SVD that is the usual `√S` on either side; for the others, `√S` is in the
//! unit of the metric, and two factors of very different size fine-tune badly.

use faer::linalg::solvers::Solve;
use lapidary_kernels::{DType, Device, Tensor};

use crate::decompose::positive_eigen;
use crate::{
    Error, Matrix, Result, Svd, cholesky, frobenius_norm, matrix_from_tensor, matrix_to_tensor,
    thin_svd,
};

/// `√importance` is raised to at least this fraction of the largest, so that inputs of no
/// importance come last instead of in no order at all.
const SCALE_FLOOR: f64 = 1e-8;

/// Eigenvalues of a covariance are raised to at least this fraction of the largest, to the same
/// end.
const COVARIANCE_FLOOR: f64 = 1e-12;

/// What makes one error of a weight worse than another.
#[derive(Clone, Copy, Debug)]
pub enum Metric<'a> {
    /// Every weight counts the same: plain SVD.
    Plain,
    /// `Σ importance[i] (W − Ŵ)[o, i]²`: one importance per input, the Fisher information of the
    /// weights that read it summed over outputs (FWSVD).
    Rows(&'a [f64]),
    /// `Σ E[x_i²] (W − Ŵ)[o, i]²`: the mean squared activation of each input.
    InputSquares(&'a [f64]),
    /// `E‖x (W − Ŵ)ᵀ‖²`: the mean squared error of the layer's output, for inputs with second
    /// moment `C = E[xᵀ x]`, `[input, input]`.
    Covariance(&'a Tensor),
    /// `vec(W − Ŵ)ᵀ (A ⊗ B) vec(W − Ŵ)` with `input` `A [input, input]` and `output`
    /// `B [output, output]`, the Kronecker factors of the Fisher information.
    Kronecker {
        /// The factor of the inputs.
        input: &'a Tensor,
        /// The factor of the outputs.
        output: &'a Tensor,
    },
    /// `Σ input[i] output[o] (W − Ŵ)[o, i]²`.
    RowsAndColumns {
        /// One importance per input.
        input: &'a [f64],
        /// One importance per output.
        output: &'a [f64],
    },
}

/// Two thin layers in place of one: `y = (x downᵀ) upᵀ`.
#[derive(Clone, Debug)]
pub struct LowRank {
    /// `[rank, input]`.
    pub down: Tensor,
    /// `[output, rank]`.
    pub up: Tensor,
}

impl LowRank {
    /// The dense weight `up · down`, `[output, input]`.
    pub fn merged(&self) -> lapidary_kernels::Result<Tensor> {
        Ok(self.up.matmul(&self.down)?)
    }

    /// The number of directions kept.
    pub fn rank(&self) -> usize {
        self.down.dims().first().copied().unwrap_or(0)
    }
}

/// A low-rank pair and what it costs, in the metric and in the plain Frobenius norm.
#[derive(Clone, Debug)]
pub struct Approximation {
    /// The pair, in the type and on the device of the weight.
    pub factors: LowRank,
    /// `Σ_{k>r} S_k²`: the squared error in the metric, which no other pair of this rank beats.
    pub discarded_energy: f64,
    /// `‖Q W P‖_F²`, of which `discarded_energy` is a part.
    pub total_energy: f64,
    /// `‖W − Ŵ‖_F`, before rounding to the weight's type.
    pub plain_error: f64,
    /// `‖W‖_F`.
    pub plain_norm: f64,
}

/// The decomposition of one weight under one metric, from which any rank can be taken.
#[derive(Clone, Debug)]
pub struct WeightedSvd {
    weight: Matrix,
    /// `U` of `Q W P`, as the columns `Q⁻¹ U`: `[output, size]`.
    up: Matrix,
    /// `Uᵀ Q W`: `[size, input]`.
    down: Matrix,
    svd: Svd,
    dtype: DType,
    device: Device,
}

impl WeightedSvd {
    /// Decomposes `weight`, `[output, input]`, under `metric`.
    pub fn new(weight: &Tensor, metric: &Metric<'_>) -> Result<Self> {
        let matrix = matrix_from_tensor("weight", weight)?;
        let (output, input) = (matrix.nrows(), matrix.ncols());
        let (output_side, input_side) = sides(metric, output, input)?;

        let scaled = output_side.times(&matrix); // Q W
        let svd = thin_svd(input_side.applied_to_the_right_of(&scaled).as_ref())?;
        let down = svd.u.transpose() * &scaled;
        let up = output_side.inverse_times(&svd.u);
        Ok(Self {
            weight: matrix,
            up,
            down,
            svd,
            dtype: weight.dtype(),
            device: weight.device().clone(),
        })
    }

    /// The singular values of `Q W P`, largest first: in the unit of the metric.
    pub fn singular_values(&self) -> &[f64] {
        &self.svd.s
    }

    /// The best pair of this rank, `1 ..= min(input, output)`.
    pub fn truncate(&self, rank: usize) -> Result<Approximation> {
        let largest = self.svd.s.len();
        if rank == 0 || rank > largest {
            return Err(Error::Rank { rank, largest });
        }
        let (up, down) = self.balanced(rank);
        let plain_error = frobenius_norm((&self.weight - &up * &down).as_ref());
        Ok(Approximation {
            factors: LowRank {
                down: matrix_to_tensor(down.as_ref(), self.dtype, &self.device)?,
                up: matrix_to_tensor(up.as_ref(), self.dtype, &self.device)?,
            },
            discarded_energy: self.svd.discarded_energy(rank),
            total_energy: self.svd.discarded_energy(0),
            plain_error,
            plain_norm: frobenius_norm(self.weight.as_ref()),
        })
    }

    /// The first `rank` directions, each scaled to equal norms in `up` and `down`.
    fn balanced(&self, rank: usize) -> (Matrix, Matrix) {
        let scale: Vec<f64> = (0..rank)
            .map(|k| {
                let up = self.up.col(k).norm_l2();
                let down = self.down.row(k).norm_l2();
                // A direction in which the weight is zero stays zero on both sides.
                if up > 0.0 && down > 0.0 {
                    (down / up).sqrt()
                } else {
                    0.0
                }
            })
            .collect();
        let up = Matrix::from_fn(self.up.nrows(), rank, |o, k| self.up[(o, k)] * scale[k]);
        let down = Matrix::from_fn(rank, self.down.ncols(), |k, i| {
            if scale[k] > 0.0 {
                self.down[(k, i)] / scale[k]
            } else {
                0.0
            }
        });
        (up, down)
    }
}

/// Plain SVD at one rank.
pub fn plain(weight: &Tensor, rank: usize) -> Result<Approximation> {
    WeightedSvd::new(weight, &Metric::Plain)?.truncate(rank)
}

/// FWSVD at one rank: see [`Metric::Rows`].
pub fn row_weighted(weight: &Tensor, importance: &[f64], rank: usize) -> Result<Approximation> {
    WeightedSvd::new(weight, &Metric::Rows(importance))?.truncate(rank)
}

/// Activation-weighted SVD at one rank: see [`Metric::InputSquares`].
pub fn input_scaled(weight: &Tensor, mean_squares: &[f64], rank: usize) -> Result<Approximation> {
    WeightedSvd::new(weight, &Metric::InputSquares(mean_squares))?.truncate(rank)
}

/// The best output error at one rank: see [`Metric::Covariance`].
pub fn covariance_whitened(
    weight: &Tensor,
    covariance: &Tensor,
    rank: usize,
) -> Result<Approximation> {
    WeightedSvd::new(weight, &Metric::Covariance(covariance))?.truncate(rank)
}

/// Generalised FWSVD at one rank: see [`Metric::Kronecker`].
pub fn kronecker_weighted(
    weight: &Tensor,
    input: &Tensor,
    output: &Tensor,
    rank: usize,
) -> Result<Approximation> {
    WeightedSvd::new(weight, &Metric::Kronecker { input, output })?.truncate(rank)
}

/// Row and column importances at one rank: see [`Metric::RowsAndColumns`].
pub fn row_column_weighted(
    weight: &Tensor,
    input: &[f64],
    output: &[f64],
    rank: usize,
) -> Result<Approximation> {
    WeightedSvd::new(weight, &Metric::RowsAndColumns { input, output })?.truncate(rank)
}

/// One side of the metric: `Q` or `P`.
enum Side {
    Identity,
    Diagonal(Vec<f64>),
    /// `P`, only ever multiplied with.
    Dense(Matrix),
    /// `Q = Lᵀ` for a lower triangular `L`.
    TransposedLower(Matrix),
}

impl Side {
    /// `self · matrix`.
    fn times(&self, matrix: &Matrix) -> Matrix {
        match self {
            Self::Identity => matrix.clone(),
            Self::Diagonal(scale) => Matrix::from_fn(matrix.nrows(), matrix.ncols(), |i, j| {
                scale[i] * matrix[(i, j)]
            }),
            Self::Dense(dense) => dense * matrix,
            Self::TransposedLower(lower) => lower.transpose() * matrix,
        }
    }

    /// `matrix · self`.
    fn applied_to_the_right_of(&self, matrix: &Matrix) -> Matrix {
        match self {
            Self::Identity => matrix.clone(),
            Self::Diagonal(scale) => Matrix::from_fn(matrix.nrows(), matrix.ncols(), |i, j| {
                matrix[(i, j)] * scale[j]
            }),
            Self::Dense(dense) => matrix * dense,
            Self::TransposedLower(lower) => matrix * lower.transpose(),
        }
    }

    /// `self⁻¹ · matrix`.
    fn inverse_times(&self, matrix: &Matrix) -> Matrix {
        match self {
            Self::Identity => matrix.clone(),
            Self::Diagonal(scale) => Matrix::from_fn(matrix.nrows(), matrix.ncols(), |i, j| {
                matrix[(i, j)] / scale[i]
            }),
            Self::Dense(dense) => dense.partial_piv_lu().solve(matrix),
            Self::TransposedLower(lower) => {
                let mut solution = matrix.clone();
                lower
                    .transpose()
                    .solve_upper_triangular_in_place(solution.as_mut());
                solution
            }
        }
    }
}

/// `Q` and `P` of a metric.
fn sides(metric: &Metric<'_>, output: usize, input: usize) -> Result<(Side, Side)> {
    Ok(match *metric {
        Metric::Plain => (Side::Identity, Side::Identity),
        Metric::Rows(importance) => (
            Side::Identity,
            diagonal("row importance", importance, input)?,
        ),
        Metric::InputSquares(squares) => (
            Side::Identity,
            diagonal("mean squared input", squares, input)?,
        ),
        Metric::Covariance(covariance) => (
            Side::Identity,
            Side::Dense(floored_square_root(
                "covariance",
                square_from_tensor("covariance", covariance, input)?,
            )?),
        ),
        Metric::Kronecker {
            input: a,
            output: b,
        } => {
            let a = square_from_tensor("input Kronecker factor", a, input)?;
            let b = square_from_tensor("output Kronecker factor", b, output)?;
            (
                Side::TransposedLower(cholesky("output Kronecker factor", b.as_ref())?.lower),
                Side::Dense(cholesky("input Kronecker factor", a.as_ref())?.lower),
            )
        }
        Metric::RowsAndColumns {
            input: rows,
            output: columns,
        } => (
            diagonal("output importance", columns, output)?,
            diagonal("input importance", rows, input)?,
        ),
    })
}

/// `diag(√importance)`, floored; all ones when nothing has any importance.
fn diagonal(name: &'static str, importance: &[f64], size: usize) -> Result<Side> {
    if importance.len() != size {
        return Err(Error::Shape {
            name,
            found: vec![importance.len()],
            expected: vec![size],
        });
    }
    let invalid = |value: &f64| !(value.is_finite() && *value >= 0.0);
    if let Some(index) = importance.iter().position(invalid) {
        return Err(Error::Importance {
            name,
            value: importance[index],
            index,
        });
    }
    let largest = importance.iter().copied().fold(0.0, f64::max);
    if largest == 0.0 {
        return Ok(Side::Identity);
    }
    let floor = SCALE_FLOOR * largest.sqrt();
    Ok(Side::Diagonal(
        importance.iter().map(|v| v.sqrt().max(floor)).collect(),
    ))
}

/// `C^{1/2}` with its eigenvalues floored; the identity when `C` is zero.
fn floored_square_root(name: &'static str, covariance: Matrix) -> Result<Matrix> {
    let eigen = positive_eigen(name, covariance.as_ref())?;
    let floor = COVARIANCE_FLOOR * eigen.values.last().copied().unwrap_or(0.0);
    if floor <= 0.0 {
        return Ok(Matrix::identity(covariance.nrows(), covariance.ncols()));
    }
    Ok(eigen.map(|value| value.max(floor).sqrt()))
}

fn square_from_tensor(name: &'static str, tensor: &Tensor, size: usize) -> Result<Matrix> {
    if tensor.dims() != [size, size] {
        return Err(Error::Shape {
            name,
            found: tensor.dims().to_vec(),
            expected: vec![size, size],
        });
    }
    matrix_from_tensor(name, tensor)
}
