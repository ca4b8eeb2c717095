//! Rows behind others.

use crate::backward::Apply;
use crate::host::{self, Host, Rows, by_dtype, fused, rows_and_width};
use crate::simd::Real;
use crate::{Error, Result, Tensor, naive};
use candle_core::{CpuStorage, CustomOp2, Layout, Shape};

type Candle<T> = candle_core::Result<T>;

/// The rows of `x` `[.., width]`, wherever they lie, and behind them those of `more` `[rows, width]`:
/// `[all, width]`.
///
/// # Errors
/// When the widths differ.
///
/// ```
/// use lapidary_kernels::{Device, Tensor, appended_rows};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let x = Tensor::new(&[[[1f32, 2.0]], [[3.0, 4.0]]], &Device::Cpu)?;
/// let y = appended_rows(&x, &Tensor::new(&[[5f32, 6.0]], &Device::Cpu)?)?;
/// assert_eq!(y.to_vec2::<f32>()?, [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]);
/// # Ok(()) }
/// ```
pub fn appended_rows(x: &Tensor, more: &Tensor) -> Result<Tensor> {
    let (_, width) = rows_and_width(x.dims());
    let (_, wide) = more.dims2()?;
    if x.rank() == 0 || width != wide {
        let expected = format!("[rows, {width}] for x of {:?}", x.dims());
        return Err(Error::argument(
            "appended rows",
            "more",
            more.dims(),
            expected,
        ));
    }
    if !fused(&[x, more]) {
        return naive::appended_rows(x, more);
    }
    Ok(x.apply2(more, Appended)?)
}

struct Appended;

/// Some rows of a gradient as a tensor of such a shape.
fn part<T: Real>(gradient: &[T], first: usize, like: &Tensor) -> Candle<Tensor> {
    let (_, width) = rows_and_width(like.dims());
    let mut part = host::unwritten::<T>(like.elem_count());
    host::for_rows(
        &mut part,
        width,
        1,
        #[inline(always)]
        |row, to| to.copy_from_slice(&gradient[(first + row) * width..][..width]),
    );
    host::tensor(part, like.dims())
}

impl CustomOp2 for Appended {
    fn name(&self) -> &'static str {
        "appended rows"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        more: &CpuStorage,
        more_layout: &Layout,
    ) -> Candle<(CpuStorage, Shape)> {
        use candle_core::WithDType;
        let ((before, width), (behind, _)) = (
            rows_and_width(x_layout.dims()),
            rows_and_width(more_layout.dims()),
        );
        let y = by_dtype!(host::dtype(x), T => {
            let (x, more) = (Rows::<T>::new(x, x_layout)?, Rows::<T>::new(more, more_layout)?);
            let mut y = host::unwritten::<T>((before + behind) * width);
            host::for_rows(&mut y, width, 1, #[inline(always)] |row, to| {
                to.copy_from_slice(match row.checked_sub(before) {
                    None => x.row(row),
                    Some(row) => more.row(row),
                });
            });
            Ok(T::to_cpu_storage_owned(y))
        })?;
        Ok((y, Shape::from((before + behind, width))))
    }

    fn bwd(
        &self,
        x: &Tensor,
        more: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Candle<(Option<Tensor>, Option<Tensor>)> {
        let host = Host::new(gradient);
        let (before, _) = rows_and_width(x.dims());
        by_dtype!(x.dtype(), T => {
            let gradient = host.ordered::<T>()?;
            Ok((Some(part(&gradient, 0, x)?), Some(part(&gradient, before, more)?)))
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
    fn equals_the_composition() {
        compare(0.0, |dtype| {
            let x = arange(&[2, 3, 4, 5], 1.0, dtype);
            let more = arange(&[7, 5], 2.0, dtype);
            let x = x.transpose(1, 2).unwrap();
            let plain = naive::appended_rows(&x, &more).unwrap();
            (appended_rows(&x, &more).unwrap(), plain)
        });
    }

    #[test]
    fn gradients() {
        let (x, more) = (
            arange(&[2, 3, 4], 1.0, DType::F64),
            arange(&[2, 4], 2.0, DType::F64),
        );
        let f = |x: &[Tensor]| appended_rows(&x[0].transpose(0, 1)?, &x[1]);
        assert!(gradient_error(f, &[x.clone(), more]).unwrap() < 1e-8);
        assert!(appended_rows(&x, &arange(&[2, 3], 1.0, DType::F64)).is_err());
    }
}
