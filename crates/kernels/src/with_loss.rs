//! A loss that is made where it can be known, deep inside of a network, and has its gradient there.

use crate::backward::Apply;
use crate::host::{self, by_dtype, fused};
use crate::{Error, Result, Tensor};
use candle_core::{CpuStorage, CustomOp2, Layout, Shape, WithDType};

type Candle<T> = candle_core::Result<T>;

/// `x` as it is, whose backward pass gives the single number `loss` a gradient of 1 whatever that of `x` is: where `x`
/// goes into what is differentiated, the gradient is that of the result plus `loss`.
///
/// # Errors
/// When `loss` is no single number, or `x` is neither `f32` nor `f64` on the CPU, as all variables are.
///
/// ```
/// use lapidary_kernels::{Device, Tensor, Var, with_loss};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let x = Var::new(&[1f64, 2.0], &Device::Cpu)?;
/// let w = Var::new(3f64, &Device::Cpu)?;
/// let y = with_loss(&x, &w.sqr()?)?;
/// let gradients = (y.sum_all()? * 10.0)?.backward()?;
/// assert_eq!(gradients.get(&x).unwrap().to_vec1::<f64>()?, [10.0, 10.0]);
/// assert_eq!(gradients.get(&w).unwrap().to_scalar::<f64>()?, 6.0);
/// # Ok(())
/// # }
/// ```
pub fn with_loss(x: &Tensor, loss: &Tensor) -> Result<Tensor> {
    if !loss.dims().is_empty() {
        return Err(Error::argument(
            "with_loss",
            "loss",
            loss.dims(),
            "a single number, without dimensions",
        ));
    }
    if !fused(&[x, loss]) {
        return Err(Error::argument(
            "with_loss",
            "x",
            (x.dtype(), loss.dtype()),
            "f32 or f64 on the CPU, as the loss",
        ));
    }
    Ok(x.apply2(loss, WithLoss)?)
}

struct WithLoss;

impl CustomOp2 for WithLoss {
    fn name(&self) -> &'static str {
        "with loss"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        layout: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Candle<(CpuStorage, Shape)> {
        by_dtype!(host::dtype(x), T => {
            let same = host::ordered::<T>(x, layout)?.into_owned();
            Ok((T::to_cpu_storage_owned(same), layout.shape().clone()))
        })
    }

    fn bwd(
        &self,
        _: &Tensor,
        loss: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Candle<(Option<Tensor>, Option<Tensor>)> {
        Ok((Some(gradient.clone()), Some(loss.ones_like()?)))
    }
}
