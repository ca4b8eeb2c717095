//! A linear layer's weights: dense, quantised, or factorised.

use crate::{Error, Result};
use lapidary_kernels::{
    Activation, DType, QuantisedMatrix, Tensor, linear, linear_activation, quantised_linear,
};

/// A matrix `[output, input]` as it is stored.
#[derive(Clone, Debug)]
pub enum Matrix {
    /// Numbers.
    Dense(Tensor),
    /// Small integers with a scale for each group; `W = Q diag(r)`.
    Quantised {
        /// `Q`.
        weight: QuantisedMatrix,
        /// `r` `[input]`, which multiplies the input; none where it is all ones.
        input_scale: Option<Tensor>,
        /// The type that the weights have once they are written out.
        dtype: DType,
    },
}

impl Matrix {
    /// `[output, input]`.
    ///
    /// # Errors
    /// When a dense one has other than two dimensions.
    pub fn dims(&self) -> Result<[usize; 2]> {
        Ok(match self {
            Self::Dense(weight) => crate::error::tensor(weight.dims2())?.into(),
            Self::Quantised { weight, .. } => [weight.output(), weight.input()],
        })
    }

    /// The numbers, `[output, input]`.
    ///
    /// # Errors
    /// Those of the tensor engine.
    pub fn dense(&self) -> Result<Tensor> {
        match self {
            Self::Dense(weight) => Ok(weight.clone()),
            Self::Quantised {
                weight,
                input_scale,
                dtype,
            } => {
                let weight = weight.dequantised(*dtype)?;
                match input_scale {
                    Some(scale) => crate::error::tensor(weight.broadcast_mul(scale)),
                    None => Ok(weight),
                }
            }
        }
    }

    /// `f(x Wᵀ + b)`.
    fn apply(&self, x: &Tensor, bias: Option<&Tensor>, f: Activation) -> Result<Tensor> {
        Ok(match self {
            Self::Dense(weight) => linear_activation(x, weight, bias, f)?,
            Self::Quantised {
                weight,
                input_scale: Some(scale),
                ..
            } => {
                let x = crate::error::tensor(x.broadcast_mul(scale))?;
                quantised_linear(&x, weight, bias, f)?
            }
            Self::Quantised { weight, .. } => quantised_linear(x, weight, bias, f)?,
        })
    }

    fn elements(&self) -> Result<usize> {
        Ok(self.dims()?.into_iter().product())
    }
}

/// The matrix of a linear layer.
#[derive(Clone, Debug)]
pub enum Weight {
    /// `[output, input]`.
    Whole(Matrix),
    /// `up · down` with `down` `[rank, input]` and `up` `[output, rank]`.
    LowRank {
        /// First factor, applied first.
        down: Matrix,
        /// Second factor.
        up: Matrix,
    },
}

impl Weight {
    /// From numbers `[output, input]`.
    pub fn dense(weight: Tensor) -> Self {
        Self::Whole(Matrix::Dense(weight))
    }
}

/// `y = x Wᵀ + b`, with `W` one matrix or a product of two thin factors.
#[derive(Clone, Debug)]
pub struct Linear {
    weight: Weight,
    bias: Option<Tensor>,
    /// Widths of the output and the input.
    dims: [usize; 2],
    multiplications: usize,
}

impl Linear {
    /// A dense layer from `weight` `[output, input]` and `bias` `[output]`.
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Result<Self> {
        Self::from_weight(Weight::dense(weight), bias)
    }

    /// A layer from any [`Weight`]; shapes that do not fit are an error.
    pub fn from_weight(weight: Weight, bias: Option<Tensor>) -> Result<Self> {
        let (dims, multiplications) = match &weight {
            Weight::Whole(matrix) => (matrix.dims()?, matrix.elements()?),
            Weight::LowRank { down, up } => {
                let ([rank, input], [output, up_rank]) = (down.dims()?, up.dims()?);
                if rank != up_rank {
                    return Err(Error::invalid(
                        "rank of the second factor",
                        up_rank,
                        format!("{rank}, as in the first"),
                    ));
                }
                ([output, input], down.elements()? + up.elements()?)
            }
        };
        let [output, _] = dims;
        if let Some(bias) = &bias
            && bias.dims() != [output]
        {
            return Err(Error::invalid(
                "bias shape",
                bias.dims(),
                format!("[{output}]"),
            ));
        }
        Ok(Self {
            weight,
            bias,
            dims,
            multiplications,
        })
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
        self.dims[1]
    }

    /// Width of the output.
    pub fn output(&self) -> usize {
        self.dims[0]
    }

    /// Number of multiplications per input row.
    pub fn multiplications(&self) -> usize {
        self.multiplications
    }

    /// Factors multiplied out and integers as numbers, `[output, input]`.
    pub fn dense_weight(&self) -> Result<Tensor> {
        match &self.weight {
            Weight::Whole(matrix) => matrix.dense(),
            Weight::LowRank { down, up } => {
                crate::error::tensor(up.dense()?.matmul(&down.dense()?))
            }
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

    /// Applies the transposed matrix to `f` `[.., output]`: `f W`.
    pub(crate) fn apply_transposed(&self, f: &Tensor) -> Result<Tensor> {
        let one = |f: &Tensor, matrix: &Matrix| -> Result<Tensor> {
            let transposed = crate::error::tensor(matrix.dense()?.t())?;
            Ok(linear(f, &transposed, None)?)
        };
        match &self.weight {
            Weight::Whole(matrix) => one(f, matrix),
            Weight::LowRank { down, up } => one(&one(f, up)?, down),
        }
    }

    fn apply_with(
        &self,
        x: &Tensor,
        bias: Option<&Tensor>,
        activation: Activation,
    ) -> Result<Tensor> {
        match &self.weight {
            Weight::Whole(matrix) => matrix.apply(x, bias, activation),
            Weight::LowRank { down, up } => {
                let inner = down.apply(x, None, Activation::Identity)?;
                up.apply(&inner, bias, activation)
            }
        }
    }
}
