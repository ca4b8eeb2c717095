//! Rows as directions: their lengths, and what lies along them.

use crate::host::{self, Host, by_dtype, for_rows, fused};
use crate::simd::{self, Real};
use crate::{Error, Result, Tensor, naive};

/// Every row of `x` `[.., width]` divided by its Euclidean length; rows of zeros stay. Not
/// differentiable.
///
/// # Errors
/// Those of the tensor engine.
pub fn unit_rows(x: &Tensor) -> Result<Tensor> {
    if !fused(&[x]) {
        return naive::unit_rows(x);
    }
    Ok(by_dtype!(x.dtype(), T => {
        let read = Host::new(x);
        host::tensor(unit::<T>(&read.ordered::<T>()?, width(x)), x.dims())
    })?)
}

/// `x_i − (x_i · d_i) d_i / ‖d_i‖²` for every row of `x` and `directions`, both `[.., width]`:
/// what is left of a gradient when rows may turn but not grow. Not differentiable.
///
/// # Errors
/// When the shapes differ.
pub fn reject_rows(x: &Tensor, directions: &Tensor) -> Result<Tensor> {
    if x.dims() != directions.dims() {
        return Err(Error::argument(
            "reject_rows",
            "directions",
            directions.dims(),
            format!("{:?}", x.dims()),
        ));
    }
    if !fused(&[x, directions]) {
        return naive::reject_rows(x, directions);
    }
    Ok(by_dtype!(x.dtype(), T => {
        let (read, along) = (Host::new(x), Host::new(directions));
        let rest = rejected::<T>(&read.ordered::<T>()?, &along.ordered::<T>()?, width(x));
        host::tensor(rest, x.dims())
    })?)
}

fn width(x: &Tensor) -> usize {
    x.dims().last().copied().unwrap_or(1)
}

fn unit<T: Real>(x: &[T], width: usize) -> Vec<T> {
    let mut y = host::unwritten::<T>(x.len());
    for_rows(
        &mut y,
        width,
        2,
        #[inline(always)]
        |row, y| {
            let x = &x[row * width..(row + 1) * width];
            let square = simd::squares_about(x, T::zero());
            let scale = if square > T::zero() {
                T::one() / square.sqrt()
            } else {
                T::zero()
            };
            for (y, x) in y.iter_mut().zip(x) {
                *y = *x * scale;
            }
        },
    );
    y
}

fn rejected<T: Real>(x: &[T], directions: &[T], width: usize) -> Vec<T> {
    let mut y = host::unwritten::<T>(x.len());
    for_rows(
        &mut y,
        width,
        4,
        #[inline(always)]
        |row, y| {
            let part = row * width..(row + 1) * width;
            let (x, d) = (&x[part.clone()], &directions[part]);
            let square = simd::squares_about(d, T::zero());
            let along = if square > T::zero() {
                simd::dot(x, d) / square
            } else {
                T::zero()
            };
            y.copy_from_slice(x);
            simd::add_scaled(y, d, -along);
        },
    );
    y
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;
    use crate::test_data::{arange, compare};

    #[test]
    fn equal_the_compositions() {
        for dims in [vec![1, 1], vec![7, 5], vec![2, 3, 70], vec![0, 4]] {
            compare(1e-6, |dtype| {
                let x = arange(&dims, 1.0, dtype);
                (unit_rows(&x).unwrap(), naive::unit_rows(&x).unwrap())
            });
            compare(1e-5, |dtype| {
                let (x, d) = (arange(&dims, 1.0, dtype), arange(&dims, 2.0, dtype));
                (
                    reject_rows(&x, &d).unwrap(),
                    naive::reject_rows(&x, &d).unwrap(),
                )
            });
        }
    }

    #[test]
    fn what_is_left_is_orthogonal_and_zeros_stay() {
        let x = arange(&[5, 9], 1.0, DType::F64);
        let d = arange(&[5, 9], 2.0, DType::F64);
        let along = (reject_rows(&x, &d).unwrap() * &d).unwrap();
        let along = along.sum(1).unwrap().abs().unwrap().max_all().unwrap();
        assert!(along.to_scalar::<f64>().unwrap() < 1e-13);
        let zeros = x.zeros_like().unwrap();
        let unit = unit_rows(&zeros).unwrap().flatten_all().unwrap();
        assert!(unit.to_vec1::<f64>().unwrap().iter().all(|v| *v == 0.0));
        assert!(reject_rows(&x, &d.narrow(0, 0, 2).unwrap()).is_err());
    }
}
