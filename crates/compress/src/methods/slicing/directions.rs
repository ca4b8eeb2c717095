//! Which directions of the stream are kept.

use lapidary_factor::{Matrix, qr, symmetric_eigen};
use lapidary_kernels::{SecondMoment, Tensor};
use rand::{Rng, RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::transport::{Distance, distances, orthonormal};
use crate::error::engine;
use crate::{Error, Result};

/// What is known of the stream at one site, or on average over several.
#[derive(Clone, Debug)]
pub struct Stream {
    /// `Σ xᵀx / Σ ‖x‖²` over real tokens, `[width, width]`: its trace is 1, so that the mean over
    /// sites gives each the same say.
    pub covariance: Matrix,
    /// Distances between features, `[width, width]`, their median 1, where they are asked for.
    pub distances: Option<Matrix>,
}

impl Stream {
    /// Sums over `rows`, `[tokens, width]` batch by batch: long ones in `f64`, and those of single precision in
    /// short ones first, as [`SecondMoment`] does.
    pub(crate) fn of(rows: &[Tensor], distance: Option<Distance>) -> Result<Self> {
        let Some(first) = rows.first() else {
            return Err(Error::invalid("tokens to look at", 0, "at least 1"));
        };
        let mut sum = SecondMoment::new(engine(first.dim(1))?);
        for x in rows {
            sum.add(x)?;
        }
        let sum = sum.sum()?;
        let sum = lapidary_factor::matrix_from_tensor("second moment of the stream", &sum)?;
        let energy = trace(&sum);
        if energy <= 0.0 {
            return Err(Error::invalid(
                "what tokens carry",
                "zero",
                "something, to choose features by",
            ));
        }
        Ok(Self {
            covariance: scaled(&sum, 1.0 / energy),
            distances: match distance {
                Some(distance) => Some(distances(rows, &sum, distance)?),
                None => None,
            },
        })
    }

    /// The mean over sites.
    pub(crate) fn mean(streams: &[Self]) -> Result<Self> {
        let Some(first) = streams.first() else {
            return Err(Error::invalid("sites", 0, "at least 1"));
        };
        let share = 1.0 / streams.len() as f64;
        let mut covariance = scaled(&first.covariance, 0.0);
        let mut distances = first.distances.as_ref().map(|found| scaled(found, 0.0));
        for stream in streams {
            covariance += scaled(&stream.covariance, share);
            if let (Some(sum), Some(found)) = (&mut distances, &stream.distances) {
                *sum += scaled(found, share);
            }
        }
        Ok(Self {
            covariance,
            distances,
        })
    }

    /// Features of the stream.
    pub fn width(&self) -> usize {
        self.covariance.nrows()
    }

    /// `Σ x_i² / Σ ‖x‖²` of each feature.
    pub fn energies(&self) -> Vec<f64> {
        (0..self.width())
            .map(|index| self.covariance[(index, index)])
            .collect()
    }

    /// `tr(Qᵀ H Q) / tr(H)`: the share of the squared length that a basis keeps.
    pub fn kept(&self, basis: &Matrix) -> f64 {
        trace(&(basis.transpose() * (&self.covariance * basis)))
    }
}

fn trace(matrix: &Matrix) -> f64 {
    (0..matrix.nrows().min(matrix.ncols()))
        .map(|index| matrix[(index, index)])
        .sum()
}

fn scaled(matrix: &Matrix, factor: f64) -> Matrix {
    Matrix::from_fn(matrix.nrows(), matrix.ncols(), |i, j| {
        factor * matrix[(i, j)]
    })
}

/// A basis, and what is to be said about it.
#[derive(Clone, Debug)]
pub struct Choice {
    /// `[width, narrower]` with orthonormal columns.
    pub basis: Matrix,
    /// For the report.
    pub note: Option<String>,
}

impl From<Matrix> for Choice {
    fn from(basis: Matrix) -> Self {
        Self { basis, note: None }
    }
}

/// A way to choose the directions that stay.
pub trait Directions {
    /// Which distances between features it looks at.
    fn distance(&self) -> Option<Distance> {
        None
    }

    /// A basis of `width` directions.
    ///
    /// # Errors
    /// When the stream has no such basis.
    fn choose(&self, stream: &Stream, width: usize) -> Result<Choice>;
}

/// The eigenvectors of the largest eigenvalues: no other `width` directions keep more of the
/// squared length. (Published code adds a hundredth of the mean diagonal to the diagonal first,
/// which moves eigenvalues and no eigenvector.)
#[derive(Clone, Copy, Debug)]
pub struct Principal;

impl Directions for Principal {
    fn choose(&self, stream: &Stream, width: usize) -> Result<Choice> {
        let vectors = symmetric_eigen("second moment", stream.covariance.as_ref())?.vectors;
        let last = stream.width().checked_sub(1);
        let column = |k: usize| last.map_or(0, |last| last.saturating_sub(k));
        let width = width.min(stream.width());
        Ok(Matrix::from_fn(stream.width(), width, |i, k| vectors[(i, column(k))]).into())
    }
}

/// The eigenvectors of the smallest eigenvalues: the worst that can be kept.
#[derive(Clone, Copy, Debug)]
pub struct Trailing;

impl Directions for Trailing {
    fn choose(&self, stream: &Stream, width: usize) -> Result<Choice> {
        let vectors = symmetric_eigen("second moment", stream.covariance.as_ref())?.vectors;
        let width = width.min(stream.width());
        Ok(Matrix::from_fn(stream.width(), width, |i, k| vectors[(i, k)]).into())
    }
}

/// Directions drawn at random, anew at each site.
#[derive(Debug)]
pub struct Random(std::cell::RefCell<ChaCha8Rng>);

impl Random {
    /// With a seed.
    pub fn new(seed: u64) -> Self {
        Self(std::cell::RefCell::new(ChaCha8Rng::seed_from_u64(seed)))
    }
}

impl Directions for Random {
    fn choose(&self, stream: &Stream, width: usize) -> Result<Choice> {
        let mut generator = self.0.borrow_mut();
        let normal = gaussian(stream.width(), width.min(stream.width()), &mut *generator);
        Ok(qr(normal.as_ref()).q.into())
    }
}

/// What others choose, turned by a random rotation within the directions they chose, which
/// changes no score: producers, consumers and shortcuts cancel it.
#[derive(Debug)]
pub struct Leading<D>(
    /// Who chooses.
    pub D,
    /// Seed of the rotation.
    pub u64,
);

impl<D: Directions> Directions for Leading<D> {
    fn distance(&self) -> Option<Distance> {
        self.0.distance()
    }

    fn choose(&self, stream: &Stream, width: usize) -> Result<Choice> {
        let choice = self.0.choose(stream, width)?;
        let mut generator = ChaCha8Rng::seed_from_u64(self.1);
        let size = choice.basis.ncols();
        let rotation = qr(gaussian(size, size, &mut generator).as_ref()).q;
        let (basis, ..) = orthonormal(&(&choice.basis * rotation));
        Ok(Choice { basis, ..choice })
    }
}

/// Independent standard normal entries, by Box and Muller's transform.
fn gaussian(rows: usize, columns: usize, generator: &mut impl Rng) -> Matrix {
    Matrix::from_fn(rows, columns, |_, _| {
        let radius = (-2.0 * (1.0 - generator.random::<f64>()).ln()).sqrt();
        radius * (std::f64::consts::TAU * generator.random::<f64>()).cos()
    })
}
