//! The sum of two tensors, as residual connections and tables of positions need it.
//!
//! The backward pass hands the gradient of the sum to both as it is; an argument that was repeated
//! over leading dimensions gets its sum over them.

use crate::backward::Apply;
use crate::host::{self, Host, Rows, by_dtype, fused, rows_and_width};
use crate::linear::sum_rows;
use crate::simd::Real;
use crate::{Result, Tensor};
use candle_core::{CpuStorage, CustomOp2, Layout, Shape, WithDType};

type Candle<T> = candle_core::Result<T>;

/// `a + b`; shapes broadcast.
///
/// # Errors
/// When the shapes do not broadcast to one.
pub fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let ends = |all: &Tensor, last: &Tensor| last.rank() > 0 && all.dims().ends_with(last.dims());
    if fused(&[a, b]) && ends(a, b) {
        return Ok(a.apply2(b, Add)?);
    }
    if fused(&[a, b]) && ends(b, a) {
        return Ok(b.apply2(a, Add)?);
    }
    // Other broadcasting is rare, and left to the engine.
    Ok(a.broadcast_add(b)?)
}

/// `a + b` where the dimensions of `b` are the last ones of `a`.
struct Add;

impl CustomOp2 for Add {
    fn name(&self) -> &'static str {
        "add"
    }

    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        a_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> Candle<(CpuStorage, Shape)> {
        let y = by_dtype!(host::dtype(a), T => {
            let (a, b) = (Rows::<T>::new(a, a_layout)?, Rows::<T>::new(b, b_layout)?);
            Ok(T::to_cpu_storage_owned(sum(&a, a_layout, &b, b_layout)))
        })?;
        Ok((y, a_layout.shape().clone()))
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Candle<(Option<Tensor>, Option<Tensor>)> {
        let da = a.track_op().then(|| gradient.clone());
        let db = if !b.track_op() {
            None
        } else if a.dims() == b.dims() {
            Some(gradient.clone())
        } else {
            let g = Host::new(gradient);
            by_dtype!(b.dtype(), T => {
                host::tensor(sum_rows(&g.ordered::<T>()?, b.elem_count()), b.dims()).map(Some)
            })?
        };
        Ok((da, db))
    }
}

fn sum<T: Real>(a: &Rows<T>, a_layout: &Layout, b: &Rows<T>, b_layout: &Layout) -> Vec<T> {
    let (rows, width) = rows_and_width(a_layout.dims());
    let (b_rows, _) = rows_and_width(b_layout.dims());
    let mut y = host::unwritten::<T>(rows * width);
    host::for_rows(
        &mut y,
        width,
        1,
        #[inline(always)]
        |row, y| {
            for ((y, &a), &b) in y.iter_mut().zip(a.row(row)).zip(b.row(row % b_rows)) {
                *y = a + b;
            }
        },
    );
    y
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;
    use crate::check::gradient_error;
    use crate::test_data::{arange, compare};

    const SHAPES: [(&[usize], &[usize]); 8] = [
        (&[3, 4], &[3, 4]),
        (&[2, 3, 70], &[3, 70]),
        (&[5, 2, 3], &[3]),
        (&[3], &[4, 3]),
        (&[0, 4], &[4]),
        (&[2, 3], &[]),
        (&[], &[]),
        (&[2, 1, 3], &[4, 1]),
    ];

    #[test]
    fn equals_the_composition() {
        for (left, right) in SHAPES {
            compare(1e-6, |dtype| {
                let (a, b) = (arange(left, 1.0, dtype), arange(right, 2.0, dtype));
                (add(&a, &b).unwrap(), a.broadcast_add(&b).unwrap())
            });
        }
        compare(1e-6, |dtype| {
            let a = arange(&[3, 5, 4], 1.0, dtype).transpose(0, 1).unwrap();
            let b = arange(&[4, 3], 2.0, dtype).t().unwrap();
            (add(&a, &b).unwrap(), a.broadcast_add(&b).unwrap())
        });
        let a = arange(&[2, 3], 1.0, DType::F32);
        assert!(add(&a, &arange(&[2], 1.0, DType::F32)).is_err());
    }

    #[test]
    fn gradients() {
        for (left, right) in SHAPES {
            let (a, b) = (
                arange(left, 1.0, DType::F64),
                arange(right, 2.0, DType::F64),
            );
            if a.elem_count() > 0 {
                assert!(gradient_error(|x| add(&x[0], &x[1]), &[a, b]).unwrap() < 1e-8);
            }
        }
        let x = arange(&[3, 3], 1.0, DType::F64);
        let twice = |x: &[Tensor]| add(&x[0], &x[0].t()?);
        assert!(gradient_error(twice, &[x]).unwrap() < 1e-8);
    }
}
