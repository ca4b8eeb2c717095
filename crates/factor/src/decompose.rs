//! The classical decompositions, in `f64`.

use std::ops::Range;

use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::cholesky::llt::factor::{
    LltRegularization, cholesky_in_place, cholesky_in_place_scratch,
};
use faer::{Side, Spec};

use crate::{Error, Matrix, MatrixView, Result};

/// A symmetric matrix may differ from its transpose by this much of its largest entry, which is
/// what accumulating it in `f32` can cost.
const SYMMETRY_TOLERANCE: f64 = 1e-4;

/// An eigenvalue this far below zero, relative to the largest, is rounding and counts as zero.
const NEGATIVE_TOLERANCE: f64 = 1e-6;

/// A thin singular value decomposition `A = U diag(s) Vᵀ`.
#[derive(Clone, Debug)]
pub struct Svd {
    /// Left singular vectors, `[rows, size]` with `size = min(rows, columns)`.
    pub u: Matrix,
    /// Singular values, largest first.
    pub s: Vec<f64>,
    /// Right singular vectors, transposed: `[size, columns]`.
    pub vt: Matrix,
}

impl Svd {
    /// `U_r diag(s_r) V_rᵀ`, the nearest matrix of rank `rank` in every unitarily invariant norm.
    /// A rank beyond the number of singular values keeps them all.
    pub fn truncated_product(&self, rank: usize) -> Matrix {
        let rank = rank.min(self.s.len());
        let scaled = Matrix::from_fn(self.u.nrows(), rank, |i, k| self.u[(i, k)] * self.s[k]);
        scaled * self.vt.as_ref().subrows(0, rank)
    }

    /// `Σ_{k > rank} s_k²`: the squared Frobenius norm of what truncation discards.
    pub fn discarded_energy(&self, rank: usize) -> f64 {
        // Smallest first, so that the small ones are not lost in the sum.
        self.s.iter().skip(rank).rev().map(|s| s * s).sum()
    }
}

/// The thin singular value decomposition of a matrix.
pub fn thin_svd(matrix: MatrixView<'_>) -> Result<Svd> {
    let svd = matrix.thin_svd().map_err(|_| Error::NoConvergence {
        what: "singular value decomposition",
        rows: matrix.nrows(),
        columns: matrix.ncols(),
    })?;
    Ok(Svd {
        u: svd.U().to_owned(),
        s: svd.S().column_vector().iter().copied().collect(),
        vt: svd.V().transpose().to_owned(),
    })
}

/// A thin QR decomposition `A = Q R`.
#[derive(Clone, Debug)]
pub struct Qr {
    /// Orthonormal columns, `[rows, size]` with `size = min(rows, columns)`.
    pub q: Matrix,
    /// Upper triangular (or trapezoidal), `[size, columns]`.
    pub r: Matrix,
}

/// The thin QR decomposition of a matrix, by Householder reflections.
pub fn qr(matrix: MatrixView<'_>) -> Qr {
    let decomposition = matrix.qr();
    Qr {
        q: decomposition.compute_thin_Q(),
        r: decomposition.thin_R().to_owned(),
    }
}

/// The eigendecomposition `A = V diag(values) Vᵀ` of a symmetric matrix.
#[derive(Clone, Debug)]
pub struct SymmetricEigen {
    /// Eigenvalues, smallest first.
    pub values: Vec<f64>,
    /// One orthonormal eigenvector per column.
    pub vectors: Matrix,
}

impl SymmetricEigen {
    /// `V diag(f(values)) Vᵀ`.
    pub fn map(&self, f: impl Fn(f64) -> f64) -> Matrix {
        let scaled = Matrix::from_fn(self.vectors.nrows(), self.values.len(), |i, k| {
            self.vectors[(i, k)] * f(self.values[k])
        });
        scaled * self.vectors.transpose()
    }
}

/// The eigendecomposition of a symmetric matrix, called `name` in errors.
pub fn symmetric_eigen(name: &'static str, matrix: MatrixView<'_>) -> Result<SymmetricEigen> {
    let symmetric = symmetrised(name, matrix)?;
    let eigen = symmetric
        .self_adjoint_eigen(Side::Lower)
        .map_err(|_| Error::NoConvergence {
            what: "eigendecomposition",
            rows: matrix.nrows(),
            columns: matrix.ncols(),
        })?;
    Ok(SymmetricEigen {
        values: eigen.S().column_vector().iter().copied().collect(),
        vectors: eigen.U().to_owned(),
    })
}

/// A Cholesky decomposition `A + jitter I = L Lᵀ`.
#[derive(Clone, Debug)]
pub struct Cholesky {
    /// Lower triangular.
    pub lower: Matrix,
    /// What had to be added to the diagonal; zero when the matrix was positive definite.
    pub jitter: f64,
}

impl Cholesky {
    /// Of a symmetric positive semi-definite matrix, in its place.
    ///
    /// A matrix that is singular to working precision gets the smallest of 1e-12, 1e-11, … 1e-4 times
    /// its mean diagonal added to the diagonal, and the result says how much. (What is summed in single
    /// precision over some thousand vectors can need 1e-6 and more.)
    ///
    /// # Errors
    /// For a matrix that is not symmetric, and for one that needs more.
    pub fn of(name: &'static str, mut matrix: Matrix) -> Result<Self> {
        symmetrise(name, &mut matrix)?;
        let size = matrix.nrows();
        let mean_diagonal = (0..size).map(|i| matrix[(i, i)]).sum::<f64>() / size as f64;
        if mean_diagonal <= 0.0 {
            return Err(Error::NotPositive {
                name,
                detail: format!("its mean diagonal entry is {mean_diagonal:e}"),
            });
        }
        // An attempt that fails leaves nothing of the half that it reads.
        let half = below(&matrix);
        let threads = faer::get_global_parallelism();
        let scratch = cholesky_in_place_scratch::<f64>(size, threads, Spec::default());
        let mut scratch = MemBuffer::new(scratch);
        let attempts = std::iter::once(0.0).chain((-12..=-4).map(|power| 10f64.powi(power)));
        for relative in attempts {
            let jitter = relative * mean_diagonal;
            if relative > 0.0 {
                write_below(&mut matrix, &half);
            }
            for i in 0..size {
                matrix[(i, i)] += jitter;
            }
            let done = cholesky_in_place(
                matrix.as_mut(),
                LltRegularization::default(),
                threads,
                MemStack::new(&mut scratch),
                Spec::default(),
            );
            if done.is_ok() {
                clear_above(&mut matrix);
                return Ok(Self {
                    lower: matrix,
                    jitter,
                });
            }
        }
        Err(Error::NotPositive {
            name,
            detail: format!(
                "Cholesky fails even with {:e} added to its diagonal",
                1e-4 * mean_diagonal
            ),
        })
    }

    /// `X` of `(A + jitter I) X = B`, for `B` with as many rows as `A`.
    ///
    /// # Errors
    /// When `B` has another number of rows.
    pub fn solve(&self, right: MatrixView<'_>) -> Result<Matrix> {
        let size = self.lower.nrows();
        if right.nrows() != size {
            return Err(Error::Shape {
                name: "right-hand side",
                found: vec![right.nrows(), right.ncols()],
                expected: vec![size, right.ncols()],
            });
        }
        let mut solution = right.to_owned();
        self.lower
            .solve_lower_triangular_in_place(solution.as_mut());
        self.lower
            .transpose()
            .solve_upper_triangular_in_place(solution.as_mut());
        Ok(solution)
    }

    /// The diagonal of `(A + jitter I)⁻¹`.
    pub fn inverse_diagonal(&self) -> Vec<f64> {
        // (L Lᵀ)⁻¹ = L⁻ᵀ L⁻¹, whose entry i is the squared length of column i of L⁻¹. Some columns at a
        // time: all above their first row is zero, and no inverse is held.
        const COLUMNS: usize = 256;
        let size = self.lower.nrows();
        let mut diagonal = Vec::with_capacity(size);
        for first in (0..size).step_by(COLUMNS) {
            let rows = size - first;
            let columns = COLUMNS.min(rows);
            let mut inverse = Matrix::identity(rows, columns);
            let lower = self.lower.as_ref().submatrix(first, first, rows, rows);
            lower.solve_lower_triangular_in_place(inverse.as_mut());
            diagonal.extend((0..columns).map(|i| inverse.col(i).squared_norm_l2()));
        }
        diagonal
    }
}

/// [`Cholesky::of`] a matrix that stays.
pub fn cholesky(name: &'static str, matrix: MatrixView<'_>) -> Result<Cholesky> {
    Cholesky::of(name, matrix.to_owned())
}

/// The diagonal and what is below it, column by column.
fn below(matrix: &Matrix) -> Vec<f64> {
    let size = matrix.nrows();
    let mut half = Vec::with_capacity(size * (size + 1) / 2);
    for j in 0..size {
        half.extend((j..size).map(|i| matrix[(i, j)]));
    }
    half
}

fn write_below(matrix: &mut Matrix, half: &[f64]) {
    let size = matrix.nrows();
    let places = (0..size).flat_map(|j| (j..size).map(move |i| (i, j)));
    for (place, value) in places.zip(half) {
        matrix[place] = *value;
    }
}

fn clear_above(matrix: &mut Matrix) {
    for j in 0..matrix.ncols() {
        for i in 0..j {
            matrix[(i, j)] = 0.0;
        }
    }
}

/// The symmetric square root of a positive semi-definite matrix.
pub fn square_root(name: &'static str, matrix: MatrixView<'_>) -> Result<Matrix> {
    Ok(positive_eigen(name, matrix)?.map(|value| value.max(0.0).sqrt()))
}

/// The symmetric inverse square root of a positive semi-definite matrix whose eigenvalues are
/// raised to at least `floor` times the largest of them.
pub fn inverse_square_root(
    name: &'static str,
    matrix: MatrixView<'_>,
    floor: f64,
) -> Result<Matrix> {
    let eigen = positive_eigen(name, matrix)?;
    let least = eigen.values.last().copied().unwrap_or(0.0) * floor;
    if least <= 0.0 && eigen.values.first().is_none_or(|&value| value <= 0.0) {
        return Err(Error::NotPositive {
            name,
            detail: "it is singular and the floor is zero, so it has no inverse".into(),
        });
    }
    Ok(eigen.map(|value| value.max(least).sqrt().recip()))
}

/// Eigenvalues that are not negative beyond rounding.
pub(crate) fn positive_eigen(name: &'static str, matrix: MatrixView<'_>) -> Result<SymmetricEigen> {
    let eigen = symmetric_eigen(name, matrix)?;
    let smallest = eigen.values.first().copied().unwrap_or(0.0);
    let largest = eigen.values.last().copied().unwrap_or(0.0);
    if smallest < -NEGATIVE_TOLERANCE * largest.abs().max(smallest.abs()) {
        return Err(Error::NotPositive {
            name,
            detail: format!("it has the eigenvalue {smallest:e} (the largest is {largest:e})"),
        });
    }
    Ok(eigen)
}

/// The mean of a matrix and its transpose, once they have been seen to agree.
fn symmetrised(name: &'static str, matrix: MatrixView<'_>) -> Result<Matrix> {
    let mut mean = matrix.to_owned();
    symmetrise(name, &mut mean)?;
    Ok(mean)
}

fn symmetrise(name: &'static str, matrix: &mut Matrix) -> Result<()> {
    let size = matrix.nrows();
    if matrix.ncols() != size {
        return Err(Error::Shape {
            name,
            found: vec![size, matrix.ncols()],
            expected: vec![size, size],
        });
    }
    let (mut difference, mut largest) = (0f64, 0f64);
    // By tiles, as one of the two entries is always in another column.
    for (rows, columns) in tiles(size) {
        for j in columns {
            for i in rows.start.max(j)..rows.end {
                let (below, above) = (matrix[(i, j)], matrix[(j, i)]);
                difference = difference.max((below - above).abs());
                largest = largest.max(below.abs()).max(above.abs());
                let mean = 0.5 * (below + above);
                matrix[(i, j)] = mean;
                matrix[(j, i)] = mean;
            }
        }
    }
    if difference > SYMMETRY_TOLERANCE * largest {
        return Err(Error::NotSymmetric {
            name,
            difference: difference / largest,
        });
    }
    Ok(())
}

/// Rows and columns of tiles that cover a square's lower half.
fn tiles(size: usize) -> impl Iterator<Item = (Range<usize>, Range<usize>)> {
    const TILE: usize = 64;
    let part = move |first: usize| first..(first + TILE).min(size);
    let firsts = (0..size).step_by(TILE);
    firsts.flat_map(move |column| {
        let rows = (column..size).step_by(TILE);
        rows.map(move |row| (part(row), part(column)))
    })
}
