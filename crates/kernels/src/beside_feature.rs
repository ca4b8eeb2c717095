//! One more feature behind those of each head, in one pass over values wherever they lie.

use crate::backward::Apply;
use crate::host::{self, Host, Rows, by_dtype, fused};
use crate::{Error, Result, Tensor, naive};
use candle_core::{CpuStorage, CustomOp2, Layout, Shape};

type Candle<T> = candle_core::Result<T>;

/// `x` `[batch, length, heads · width]` with the number of its token in `feature` `[batch, length]` behind the
/// features of each head: `[batch, length, heads · (width + 1)]`.
///
/// # Errors
/// When the shapes do not fit each other or the number of heads.
///
/// ```
/// use lapidary_kernels::{Device, Tensor, beside_feature};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let x = Tensor::new(&[[[2f32, 3.0], [4.0, 5.0]]], &Device::Cpu)?;
/// let feature = Tensor::new(&[[7f32, 8.0]], &Device::Cpu)?;
/// let y = beside_feature(&x, &feature, 2)?;
/// assert_eq!(y.to_vec3::<f32>()?, [[[2.0, 7.0, 3.0, 7.0], [4.0, 8.0, 5.0, 8.0]]]);
/// # Ok(())
/// # }
/// ```
pub fn beside_feature(x: &Tensor, feature: &Tensor, heads: usize) -> Result<Tensor> {
    let (batch, length, width) = x.dims3()?;
    if feature.dims() != [batch, length] {
        let expected = format!("[{batch}, {length}]");
        let found = feature.dims();
        return Err(Error::argument(
            "beside feature",
            "feature",
            found,
            expected,
        ));
    }
    if heads == 0 || !width.is_multiple_of(heads) {
        let expected = format!("[batch, length, a multiple of {heads}]");
        return Err(Error::argument("beside feature", "x", x.dims(), expected));
    }
    match fused(&[x, feature]) {
        true => Ok(x.apply2(&feature.contiguous()?, BesideFeature { heads })?),
        false => naive::beside_feature(x, feature, heads),
    }
}

struct BesideFeature {
    heads: usize,
}

impl CustomOp2 for BesideFeature {
    fn name(&self) -> &'static str {
        "beside feature"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        feature: &CpuStorage,
        feature_layout: &Layout,
    ) -> Candle<(CpuStorage, Shape)> {
        use candle_core::WithDType;
        let (batch, length, all) = x_layout.shape().dims3()?;
        let width = all / self.heads;
        let wide = self.heads * (width + 1);
        by_dtype!(host::dtype(x), T => {
            let rows = Rows::<T>::new(x, x_layout)?;
            let feature = host::ordered::<T>(feature, feature_layout)?;
            let mut y = host::unwritten::<T>(batch * length * wide);
            host::for_rows(&mut y, wide, 1, #[inline(always)] |row, y| {
                let x = rows.row(row);
                for head in 0..self.heads {
                    let to = &mut y[head * (width + 1)..][..=width];
                    to[..width].copy_from_slice(&x[head * width..][..width]);
                    to[width] = feature[row];
                }
            });
            Ok((T::to_cpu_storage_owned(y), Shape::from((batch, length, wide))))
        })
    }

    fn bwd(
        &self,
        x: &Tensor,
        feature: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Candle<(Option<Tensor>, Option<Tensor>)> {
        let (_, _, all) = x.dims3()?;
        let width = all / self.heads;
        let gradient = Host::new(gradient);
        by_dtype!(x.dtype(), T => {
            let slopes = Rows::<T>::new(gradient.storage()?, gradient.layout)?;
            let mut dx = host::unwritten::<T>(x.elem_count());
            host::for_rows(&mut dx, all, 1, #[inline(always)] |row, dx| {
                for (head, dx) in dx.chunks_exact_mut(width.max(1)).enumerate() {
                    dx.copy_from_slice(&slopes.row(row)[head * (width + 1)..][..width]);
                }
            });
            let d_feature = match feature.track_op() {
                false => None,
                true => {
                    let sum = |row: usize| {
                        let own = slopes.row(row).chunks_exact(width + 1);
                        own.fold(T::default(), |sum, head| sum + head[width])
                    };
                    let sums = (0..feature.elem_count()).map(sum).collect();
                    Some(host::tensor::<T>(sums, feature.dims())?)
                }
            };
            Ok((host::wanted(x, dx)?, d_feature))
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
        for (heads, width) in [(1, 1), (1, 7), (3, 4), (4, 33)] {
            compare(0.0, |dtype| {
                let x = arange(&[5, 2, heads * width], 1.0, dtype);
                let x = x.transpose(0, 1).unwrap();
                let feature = arange(&[5, 2], 2.0, dtype).t().unwrap();
                (
                    beside_feature(&x, &feature, heads).unwrap(),
                    naive::beside_feature(&x, &feature, heads).unwrap(),
                )
            });
        }
    }

    #[test]
    fn gradients_equal_finite_differences() {
        let (x, feature) = (
            arange(&[2, 3, 6], 1.0, DType::F64),
            arange(&[2, 3], 2.0, DType::F64),
        );
        let f = |x: &[Tensor]| Ok(beside_feature(&x[0], &x[1], 2)?.sqr()?);
        assert!(gradient_error(f, &[x.clone(), feature.clone()]).unwrap() < 1e-8);
        let alone = |x: &[Tensor]| beside_feature(&x[0], &feature, 3);
        assert!(gradient_error(alone, &[x]).unwrap() < 1e-8);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let x = arange(&[2, 3, 6], 1.0, DType::F32);
        let feature = |dims: &[usize]| arange(dims, 2.0, DType::F32);
        assert!(beside_feature(&x, &feature(&[3, 2]), 2).is_err());
        assert!(beside_feature(&x, &feature(&[2, 3]), 4).is_err());
        assert!(beside_feature(&x, &feature(&[2, 3]), 0).is_err());
    }
}
