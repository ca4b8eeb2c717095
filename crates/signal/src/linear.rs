//! A linear layer's weights, dense or factorised.

use crate::{Error, Result};
use lapidary_kernels::{Activation, Tensor, linear, linear_activation};

/// The matrix of a linear layer.
#[derive(Clone, Debug)]
pub enum Weight {
    /// `[output, input]`.
    Dense(Tensor),
    /// `up · down` with `down` `[rank, input]` and `up` `[output, rank]`.
    LowRank {
        /// First factor, applied first.
        down: Tensor,
        /// Second factor.
        up: Tensor,
    },
}

/// `y = x Wᵀ + b`, with `W` dense or a product of two thin factors.
#[derive(Clone, Debug)]
pub struct Linear {
    weight: Weight,
    bias: Option<Tensor>,
}

impl Linear {
    /// A dense layer from `weight` `[output, input]` and `bias` `[output]`.
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Result<Self> {
        Self::from_weight(Weight::Dense(weight), bias)
    }

    /// A layer from any [`Weight`]; shapes that do not fit are an error.
    pub fn from_weight(weight: Weight, bias: Option<Tensor>) -> Result<Self> {
        let output = match &weight {
            Weight::Dense(weight) => weight.dims2().map_err(lapidary_kernels::Error::from)?.0,
            Weight::LowRank { down, up } => {
                let (rank, _) = down.dims2().map_err(lapidary_kernels::Error::from)?;
                let (output, up_rank) = up.dims2().map_err(lapidary_kernels::Error::from)?;
                if rank != up_rank {
                    return Err(Error::invalid(
                        "rank of the second factor",
                        up_rank,
                        format!("{rank}, as in the first"),
                    ));
                }
                output
            }
        };
        if let Some(bias) = &bias
            && bias.dims() != [output]
        {
            return Err(Error::invalid(
                "bias shape",
                bias.dims(),
                format!("[{output}]"),
            ));
        }
        Ok(Self { weight, bias })
    }

    /// The matrix.
    pub fn weight(&self) -> &Weight {
        &self.weight
    }

    /// `[output]`, when there is one.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// Width of the input.
    pub fn input(&self) -> usize {
        match &self.weight {
            Weight::Dense(weight) => weight.dims()[1],
            Weight::LowRank { down, .. } => down.dims()[1],
        }
    }

    /// Width of the output.
    pub fn output(&self) -> usize {
        match &self.weight {
            Weight::Dense(weight) => weight.dims()[0],
            Weight::LowRank { up, .. } => up.dims()[0],
        }
    }

    /// Number of multiplications per input row.
    pub fn multiplications(&self) -> usize {
        match &self.weight {
            Weight::Dense(weight) => weight.elem_count(),
            Weight::LowRank { down, up } => down.elem_count() + up.elem_count(),
        }
    }

    /// The factors multiplied out, `[output, input]`.
    pub fn dense_weight(&self) -> Result<Tensor> {
        match &self.weight {
            Weight::Dense(weight) => Ok(weight.clone()),
            Weight::LowRank { down, up } => crate::error::tensor(up.matmul(down)),
        }
    }

    /// Applies the layer to `x` `[.., input]`.
    pub fn apply(&self, x: &Tensor) -> Result<Tensor> {
        self.apply_activated(x, Activation::Identity)
    }

    /// Applies the layer, and an activation to what it gives.
    pub fn apply_activated(&self, x: &Tensor, activation: Activation) -> Result<Tensor> {
        self.apply_with(x, self.bias.as_ref(), activation)
    }

    /// Applies the matrix alone.
    pub fn apply_without_bias(&self, x: &Tensor) -> Result<Tensor> {
        self.apply_with(x, None, Activation::Identity)
    }

    fn apply_with(
        &self,
        x: &Tensor,
        bias: Option<&Tensor>,
        activation: Activation,
    ) -> Result<Tensor> {
        Ok(match &self.weight {
            Weight::Dense(weight) => linear_activation(x, weight, bias, activation)?,
            Weight::LowRank { down, up } => {
                linear_activation(&linear(x, down, None)?, up, bias, activation)?
            }
        })
    }
}
