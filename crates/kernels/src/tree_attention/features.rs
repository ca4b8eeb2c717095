//! Features that are numbers of queries and keys one by one, made where they are read.

use crate::host::{self, Shared};
use crate::product::Matrix;
use crate::simd::{self, Real};
use crate::stack::Stack;
use crate::{Activation, Result, Tensor, activate};

/// What is made of each number of queries and keys.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TreeFeatures {
    /// Nothing: features are given.
    #[default]
    Given,
    /// `max(x, 0)`.
    Relu,
    /// `x²`.
    Square,
    /// `x⁴`.
    Fourth,
}

impl TreeFeatures {
    #[inline(always)]
    fn of<T: Real>(self, x: T) -> T {
        match self {
            Self::Given => x,
            Self::Relu => T::zero().larger(x),
            Self::Square => x * x,
            Self::Fourth => (x * x) * (x * x),
        }
    }

    #[inline(always)]
    fn slope<T: Real>(self, x: T) -> T {
        match self {
            Self::Given => T::one(),
            Self::Relu if x > T::zero() => T::one(),
            Self::Relu => T::zero(),
            Self::Square => x + x,
            Self::Fourth => T::of(4.0) * x * x * x,
        }
    }

    /// The features of a tensor, as operations of their own give them.
    pub(crate) fn laid_out(self, x: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Self::Given => x.clone(),
            Self::Relu => activate(x, Activation::Relu)?,
            Self::Square => x.sqr()?,
            Self::Fourth => x.sqr()?.sqr()?,
        })
    }

    /// Those of one head: where it lies if they are given, otherwise in `room`.
    pub(super) fn of_head<'a, T: Real>(
        self,
        x: Matrix<'a, T>,
        room: &'a mut Vec<T>,
    ) -> Matrix<'a, T> {
        if self == Self::Given {
            return x;
        }
        room.resize(x.rows * x.columns, T::zero());
        simd::vectorised(
            #[inline(always)]
            || {
                for (row, to) in room.chunks_exact_mut(x.columns).enumerate() {
                    for (to, from) in to.iter_mut().zip(row_of(&x, row)) {
                        *to = self.of(from);
                    }
                }
            },
        );
        Matrix::packed(room, x.rows, x.columns)
    }

    /// Makes the gradients of features, packed, those of what they are made of.
    pub(super) fn chain<T: Real>(self, slopes: &mut [T], given: &Stack<'_, T>) {
        let size = given.rows * given.columns;
        if self == Self::Given || size == 0 {
            return;
        }
        let heads = slopes.len() / size;
        let slopes = Shared::new(slopes);
        host::share(heads, size, |range| {
            for at in range {
                let x = given.matrix(at);
                // SAFETY: each head has slopes of its own.
                let slopes = unsafe { slopes.part(at * size, size) };
                simd::vectorised(
                    #[inline(always)]
                    || {
                        for (row, slopes) in slopes.chunks_exact_mut(given.columns).enumerate() {
                            for (slope, x) in slopes.iter_mut().zip(row_of(&x, row)) {
                                *slope *= self.slope(x);
                            }
                        }
                    },
                );
            }
        });
    }
}

#[inline(always)]
fn row_of<'a, T: Real>(x: &Matrix<'a, T>, row: usize) -> impl Iterator<Item = T> + use<'a, T> {
    let (numbers, stride) = (
        x.data.get(row * x.row_stride..).unwrap_or(&[]),
        x.column_stride,
    );
    // Features that were spread out of one have no stride at all.
    (0..x.columns).map(move |column| numbers[column * stride])
}
