//! Statistics as a calibration holds them: second moments by their lower half, all others whole.

use std::sync::Arc;

use lapidary_factor::{Matrix, matrix_from_tensor};
use lapidary_kernels::{SecondMoment, Tensor};

use crate::Result;
use crate::error::engine;

/// One statistic.
#[derive(Clone, Debug)]
pub(crate) enum Held {
    /// In `f64`.
    Values(Tensor),
    /// A sum and one over the number of vectors.
    Moment(Arc<SecondMoment>, f64),
}

impl Held {
    /// In `f64`, whole.
    pub(crate) fn tensor(&self) -> Result<Tensor> {
        match self {
            Self::Values(tensor) => Ok(tensor.clone()),
            Self::Moment(sum, scale) => Ok(sum.scaled(*scale)?),
        }
    }

    /// A statistic of two dimensions, whole and by itself: what was held is not copied on the way.
    pub(crate) fn matrix(&self, name: &'static str) -> Result<Matrix> {
        match self {
            Self::Values(tensor) => Ok(matrix_from_tensor(name, tensor)?),
            Self::Moment(sum, scale) => {
                let mut matrix = Matrix::zeros(sum.width(), sum.width());
                sum.for_each(|row, column, sum| {
                    matrix[(row, column)] = scale * sum;
                    matrix[(column, row)] = scale * sum;
                });
                Ok(matrix)
            }
        }
    }

    /// Whether every number is one.
    pub(crate) fn is_finite(&self) -> Result<bool> {
        match self {
            Self::Values(tensor) => {
                let sum = engine(engine(tensor.abs())?.sum_all())?;
                Ok(engine(sum.to_scalar::<f64>())?.is_finite())
            }
            Self::Moment(sum, _) => Ok(sum.is_finite()),
        }
    }

    /// Whether both are one statistic, not merely equal.
    pub(crate) fn is(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Values(one), Self::Values(other)) => one.id() == other.id(),
            (Self::Moment(one, _), Self::Moment(other, _)) => Arc::ptr_eq(one, other),
            _ => false,
        }
    }
}
