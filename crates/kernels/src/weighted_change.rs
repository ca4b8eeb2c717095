//! A change of rows that counts more or less, for weights that learn from what it is good for.

use crate::backward::Apply;
use crate::host::{self, Host, Rows, by_dtype, fused, rows_and_width};
use crate::simd;
use crate::{Error, Result, Tensor, naive};
use candle_core::{CpuStorage, CustomOp2, Layout, Shape, WithDType};

type Candle<T> = candle_core::Result<T>;

/// `y_r + w_r (y_r − x_r)` for rows of `after` and `before` `[.., width]` and `weights` `[..]`: what became of
/// `x`, and so much of the change once more. The change counts as a constant: `∂y` is that of the result, `∂x`
/// is nothing and `∂w_r = ∂_r · (y_r − x_r)`. With weights of zero, which say nothing but what they would be
/// worth, the result is `after` itself.
///
/// # Errors
/// When the shapes do not fit each other.
///
/// ```
/// use lapidary_kernels::{Device, Tensor, weighted_change};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let before = Tensor::new(&[[1f32, 5.0], [2.0, 0.0]], &Device::Cpu)?;
/// let after = Tensor::new(&[[2f32, 5.0], [2.0, 4.0]], &Device::Cpu)?;
/// let y = weighted_change(&after, &before, &Tensor::new(&[0f32, 0.5], &Device::Cpu)?)?;
/// assert_eq!(y.to_vec2::<f32>()?, [[2.0, 5.0], [2.0, 6.0]]);
/// # Ok(()) }
/// ```
pub fn weighted_change(after: &Tensor, before: &Tensor, weights: &Tensor) -> Result<Tensor> {
    let refused = |argument, found: &[usize], expected: &[usize]| {
        let expected = format!("{expected:?}");
        Err(Error::argument(
            "weighted change",
            argument,
            found,
            expected,
        ))
    };
    let Some((_, rows)) = after.dims().split_last() else {
        return refused("after", after.dims(), &[1, 1]);
    };
    if before.dims() != after.dims() {
        return refused("before", before.dims(), after.dims());
    }
    if weights.dims() != rows {
        return refused("weights", weights.dims(), rows);
    }
    if !fused(&[after, before, weights]) {
        return naive::weighted_change(after, before, weights);
    }
    let before = before.detach();
    Ok(after.apply2(&weights.contiguous()?, Change { before })?)
}

struct Change {
    before: Tensor,
}

impl CustomOp2 for Change {
    fn name(&self) -> &'static str {
        "weighted change"
    }

    fn cpu_fwd(
        &self,
        after: &CpuStorage,
        layout: &Layout,
        weights: &CpuStorage,
        weights_layout: &Layout,
    ) -> Candle<(CpuStorage, Shape)> {
        let (rows, width) = rows_and_width(layout.dims());
        let before = Host::new(&self.before);
        let y = by_dtype!(host::dtype(after), T => {
            let after = Rows::<T>::new(after, layout)?;
            let before = Rows::<T>::new(before.storage()?, before.layout)?;
            let weights = host::ordered::<T>(weights, weights_layout)?;
            let mut y = host::unwritten::<T>(rows * width);
            host::for_rows(&mut y, width, 1, #[inline(always)] |row, y| {
                let (after, weight) = (after.row(row), weights[row]);
                y.copy_from_slice(after);
                if weight != T::default() {
                    for ((y, &after), &before) in y.iter_mut().zip(after).zip(before.row(row)) {
                        *y = (after - before).mul_add(weight, *y);
                    }
                }
            });
            Ok(T::to_cpu_storage_owned(y))
        })?;
        Ok((y, layout.shape().clone()))
    }

    fn bwd(
        &self,
        after: &Tensor,
        weights: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Candle<(Option<Tensor>, Option<Tensor>)> {
        let d_after = after.track_op().then(|| gradient.clone());
        if !weights.track_op() {
            return Ok((d_after, None));
        }
        let hosts = [after, &self.before, gradient].map(Host::new);
        let (_, width) = rows_and_width(after.dims());
        let d_weights = by_dtype!(after.dtype(), T => {
            let [after, before] = [hosts[0].ordered::<T>()?, hosts[1].ordered::<T>()?];
            let slopes = hosts[2].ordered::<T>()?;
            let mut worth = host::unwritten::<T>(weights.elem_count());
            host::for_rows(&mut worth, 1, width, #[inline(always)] |row, worth| {
                let own = row * width..(row + 1) * width;
                let slopes = &slopes[own.clone()];
                worth[0] = simd::dot(slopes, &after[own.clone()]) - simd::dot(slopes, &before[own]);
            });
            host::tensor(worth, weights.dims())
        })?;
        Ok((d_after, Some(d_weights)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;
    use crate::check::{difference, gradient_error};
    use crate::test_data::{arange, compare};
    use crate::{Device, Var};

    #[test]
    fn equals_the_composition() {
        for dims in [&[3, 2, 7][..], &[1, 40], &[5]] {
            compare(1e-6, |dtype| {
                let (x, y) = (arange(dims, 1.0, dtype), arange(dims, 2.0, dtype));
                let weights = arange(&dims[..dims.len() - 1], 3.0, dtype);
                (
                    weighted_change(&y, &x, &weights).unwrap(),
                    naive::weighted_change(&y, &x, &weights).unwrap(),
                )
            });
        }
        compare(1e-6, |dtype| {
            let (x, y) = (arange(&[4, 6], 1.0, dtype), arange(&[6, 4], 2.0, dtype));
            let (y, weights) = (y.t().unwrap(), arange(&[4], 3.0, dtype));
            (
                weighted_change(&y, &x, &weights).unwrap(),
                naive::weighted_change(&y, &x, &weights).unwrap(),
            )
        });
    }

    #[test]
    fn weights_of_zero_change_nothing() {
        let (x, y) = (
            arange(&[4, 6], 1.0, DType::F32),
            arange(&[4, 6], 2.0, DType::F32),
        );
        let zeros = Tensor::zeros(4, DType::F32, &Device::Cpu).unwrap();
        let same = weighted_change(&y, &x, &zeros).unwrap();
        assert_eq!(difference(&same, &y).unwrap(), 0.0);
    }

    #[test]
    fn gradients() {
        let (x, y) = (
            arange(&[2, 3, 5], 1.0, DType::F64),
            arange(&[2, 3, 5], 2.0, DType::F64),
        );
        let weights = arange(&[2, 3], 3.0, DType::F64);
        // That of the weights is a derivative; that of the rows leaves the change out.
        let of_weights = |w: &[Tensor]| weighted_change(&y, &x, &w[0]);
        assert!(gradient_error(of_weights, std::slice::from_ref(&weights)).unwrap() < 1e-8);
        let [x, y, weights] = [&x, &y, &weights].map(|t| Var::from_tensor(t).unwrap());
        let inputs = [y.as_tensor(), x.as_tensor(), weights.as_tensor()];
        let slopes = arange(&[2, 3, 5], 4.0, DType::F64);
        let found = |of: fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor>| {
            let result = of(inputs[0], inputs[1], inputs[2]).unwrap();
            (result * &slopes)
                .unwrap()
                .sum_all()
                .unwrap()
                .backward()
                .unwrap()
        };
        let (ours, plain) = (found(weighted_change), found(naive::weighted_change));
        for variable in [&y, &weights] {
            let [a, b] = [&ours, &plain].map(|found| found.get(variable).unwrap());
            assert!(difference(a, b).unwrap() < 1e-12);
        }
        assert_eq!(difference(ours.get(&y).unwrap(), &slopes).unwrap(), 0.0);
        assert!(ours.get(&x).is_none());
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let x = arange(&[3, 2], 1.0, DType::F32);
        let weights = arange(&[3], 1.0, DType::F32);
        assert!(weighted_change(&x, &x.t().unwrap(), &weights).is_err());
        assert!(weighted_change(&x, &x, &arange(&[2], 1.0, DType::F32)).is_err());
        let number = Tensor::new(1f32, &Device::Cpu).unwrap();
        assert!(weighted_change(&number, &number, &number).is_err());
    }
}
