//! A column of ones beside values, in one pass over them wherever they lie: with them, one sum gives both a
//! numerator and its weights.

use crate::backward::Apply;
use crate::host::{self, Host, Rows, by_dtype, fused, rows_and_width};
use crate::simd::Real;
use crate::{Error, Result, Tensor};
use candle_core::{CpuStorage, CustomOp1, Layout, Shape};

type Candle<T> = candle_core::Result<T>;

/// `x` `[.., width]` with a column of ones behind it, `[.., width + 1]`.
///
/// # Errors
/// When `x` has no dimension.
///
/// ```
/// use lapidary_kernels::{Device, Tensor, beside_ones};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let x = Tensor::new(&[[2f32, 3.0], [4.0, 5.0]], &Device::Cpu)?;
/// assert_eq!(beside_ones(&x)?.to_vec2::<f32>()?, [[2.0, 3.0, 1.0], [4.0, 5.0, 1.0]]);
/// # Ok(())
/// # }
/// ```
pub fn beside_ones(x: &Tensor) -> Result<Tensor> {
    let Some((last, before)) = x.dims().split_last() else {
        let expected = "[.., width]";
        return Err(Error::argument("beside ones", "x", x.dims(), expected));
    };
    if fused(&[x]) {
        return Ok(x.apply1(BesideOnes { width: *last })?);
    }
    let ones = Tensor::ones([before, &[1]].concat(), x.dtype(), x.device())?;
    Ok(Tensor::cat(&[x, &ones], before.len())?)
}

struct BesideOnes {
    width: usize,
}

impl BesideOnes {
    /// The first `width` numbers of each row, followed by `ones`.
    fn copied<T: Real>(&self, x: &Rows<T>, rows: usize, ones: usize) -> Vec<T> {
        let mut y = host::unwritten::<T>(rows * (self.width + ones));
        host::for_rows(
            &mut y,
            self.width + ones,
            1,
            #[inline(always)]
            |row, y| {
                let (values, ones) = y.split_at_mut(self.width);
                values.copy_from_slice(&x.row(row)[..self.width]);
                ones.fill(T::one());
            },
        );
        y
    }
}

impl CustomOp1 for BesideOnes {
    fn name(&self) -> &'static str {
        "beside ones"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Candle<(CpuStorage, Shape)> {
        let (rows, _) = rows_and_width(layout.dims());
        let mut dims = layout.dims().to_vec();
        if let Some(last) = dims.last_mut() {
            *last += 1;
        }
        by_dtype!(host::dtype(x), T => {
            let y = self.copied(&Rows::<T>::new(x, layout)?, rows, 1);
            let storage = <T as candle_core::WithDType>::to_cpu_storage_owned(y);
            Ok((storage, Shape::from(dims)))
        })
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, gradient: &Tensor) -> Candle<Option<Tensor>> {
        let (rows, _) = rows_and_width(x.dims());
        let gradient = Host::new(gradient);
        by_dtype!(x.dtype(), T => {
            let slopes = Rows::<T>::new(gradient.storage()?, gradient.layout)?;
            Ok(Some(host::tensor(self.copied(&slopes, rows, 0), x.dims())?))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;
    use crate::check::gradient_error;
    use crate::test_data::{arange, compare};

    #[test]
    fn equals_concatenation() {
        compare(0.0, |dtype| {
            let x = arange(&[2, 7, 3, 5], 1.0, dtype).transpose(1, 2).unwrap();
            let ones = Tensor::ones((2, 3, 7, 1), dtype, x.device()).unwrap();
            let plain = Tensor::cat(&[&x, &ones], 3).unwrap();
            (beside_ones(&x).unwrap(), plain)
        });
    }

    #[test]
    fn gradients_equal_finite_differences() {
        let x = arange(&[3, 2, 5], 1.0, DType::F64);
        let views = |x: &[Tensor]| Ok(beside_ones(&x[0].transpose(0, 1)?)?.sqr()?);
        assert!(gradient_error(views, &[x]).unwrap() < 1e-8);
    }

    #[test]
    fn a_number_is_refused() {
        assert!(beside_ones(&Tensor::new(1f32, &crate::Device::Cpu).unwrap()).is_err());
    }
}
