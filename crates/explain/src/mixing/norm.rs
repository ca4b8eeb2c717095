//! A norm whose statistics are held fixed, which makes it linear but for its bias.

use crate::error::engine;
use crate::{Error, Result};
use lapidary_kernels::{D, DType, Tensor};
use lapidary_model::Model;
use lapidary_parts::norm::NormSpec;

/// `v ↦ s_t γ ⊙ (v − mean v) + β` at each row `t`, with `s_t = 1 / σ_t` of the row that the norm
/// was fixed at; RMS norms do not centre, and the absent norm does nothing.
pub(crate) struct FixedNorm {
    weight: Option<Tensor>,
    bias: Option<Tensor>,
    centres: bool,
    /// `[rows, 1]`
    scale: Tensor,
}

impl FixedNorm {
    /// The norm at `path` of the model, fixed at the rows of `x` `[rows, width]`.
    pub(crate) fn at(model: &Model, path: &str, spec: &NormSpec, x: &Tensor) -> Result<Self> {
        let parameter = |name: &str| {
            let name = format!("{path}.{name}");
            let found = model.parameters().get(&name).cloned();
            found.ok_or_else(|| Error::invalid(name, "absent", "a parameter of the model"))
        };
        let (centres, epsilon) = match *spec {
            NormSpec::Layer { epsilon } => (true, epsilon),
            NormSpec::Rms { epsilon } => (false, epsilon),
            NormSpec::None => {
                return Ok(Self {
                    weight: None,
                    bias: None,
                    centres: false,
                    scale: engine(engine(x.narrow(1, 0, 1))?.ones_like())?,
                });
            }
        };
        let rows = if centres { centred(x)? } else { x.clone() };
        let squares = engine(engine(rows.sqr())?.mean_keepdim(D::Minus1))?;
        let scale = engine(engine(engine(squares + epsilon)?.sqrt())?.recip())?;
        Ok(Self {
            weight: Some(parameter("weight")?),
            bias: match centres {
                true => Some(parameter("bias")?),
                false => None,
            },
            centres,
            scale,
        })
    }

    /// `s`, `[rows, 1]`.
    pub(crate) fn scale(&self) -> &Tensor {
        &self.scale
    }

    /// `β`, `[width]`.
    pub(crate) fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// `γ ⊙ (v − mean v)` of `v` `[.., width]`: the map but for the number `s_t`.
    pub(crate) fn unscaled(&self, v: &Tensor) -> Result<Tensor> {
        let v = if self.centres { centred(v)? } else { v.clone() };
        match &self.weight {
            Some(weight) => engine(v.broadcast_mul(weight)),
            None => Ok(v),
        }
    }

    /// `s_t γ ⊙ (v − mean v)` of `v` `[rows, width]`.
    pub(crate) fn linear(&self, v: &Tensor) -> Result<Tensor> {
        engine(self.unscaled(v)?.broadcast_mul(&self.scale))
    }

    /// The norm of `v` `[rows, width]`.
    pub(crate) fn forward(&self, v: &Tensor) -> Result<Tensor> {
        let y = self.linear(v)?;
        match &self.bias {
            Some(bias) => engine(y.broadcast_add(bias)),
            None => Ok(y),
        }
    }

    /// The direction `u'` with `v · u' = linear(v)_t · u` at row `t`.
    pub(crate) fn pulled_back(&self, row: usize, direction: &[f64]) -> Result<Vec<f64>> {
        let width = direction.len();
        let u = engine(Tensor::from_slice(direction, width, self.scale.device()))?;
        let u = match &self.weight {
            Some(weight) => engine(u.mul(&engine(weight.to_dtype(DType::F64))?))?,
            None => u,
        };
        let u = if self.centres { centred(&u)? } else { u };
        let scale = engine(engine(self.scale.narrow(0, row, 1))?.to_dtype(DType::F64))?;
        let u = engine(u.broadcast_mul(&engine(scale.flatten_all())?))?;
        engine(u.to_vec1::<f64>())
    }
}

fn centred(v: &Tensor) -> Result<Tensor> {
    engine(v.broadcast_sub(&engine(v.mean_keepdim(D::Minus1))?))
}
