//! A linear layer's weights: dense, quantised, or factorised.

use crate::{Error, Result};
use lapidary_kernels::{
    Activation, DType, QuantisedMatrix, Tensor, activate, dropout, linear, linear_activation,
    quantised_linear,
};

/// A matrix `[output, input]` as it is stored.
#[derive(Clone, Debug)]
pub enum Matrix {
    /// Numbers.
    Dense(Tensor),
    /// Small integers with a scale for each group; `W = Q diag(r)`, and in some columns `+ K`.
    Quantised {
        /// `Q`.
        weight: QuantisedMatrix,
        /// `r` `[input]`, which multiplies the input; none where it is all ones.
        input_scale: Option<Tensor>,
        /// `K`, where some columns are numbers.
        kept: Option<KeptColumns>,
        /// The type that the weights have once they are written out.
        dtype: DType,
    },
}

/// Columns of a quantised matrix that keep what integers would lose: few inputs that are many times as
/// large as the others, and would be most of its error (Dettmers et al. 2022, LLM.int8, arXiv
/// 2208.07339).
#[derive(Clone, Debug)]
pub struct KeptColumns {
    /// Which, in rising order, `[columns]`.
    index: Tensor,
    /// What is added to each, `[output, columns]`.
    weights: Tensor,
}

impl KeptColumns {
    /// The columns `index` `[columns]` of a matrix with `input` of them, to which `weights` `[output,
    /// columns]` are added.
    ///
    /// # Errors
    /// When the indices do not rise or reach beyond the matrix, or there are not as many columns of
    /// weights.
    pub fn new(index: Tensor, weights: Tensor, input: usize) -> Result<Self> {
        let columns = crate::error::tensor(index.to_vec1::<u32>())?;
        let rising = columns.windows(2).all(|pair| pair.first() < pair.last());
        if !rising || columns.last().is_some_and(|last| *last as usize >= input) {
            return Err(Error::invalid(
                "columns that are kept",
                columns,
                format!("in rising order and below {input}"),
            ));
        }
        let (_, found) = crate::error::tensor(weights.dims2())?;
        if found != columns.len() {
            return Err(Error::invalid(
                "weights of columns that are kept",
                weights.dims(),
                format!("[output, {}]", columns.len()),
            ));
        }
        Ok(Self { index, weights })
    }

    /// How many.
    fn count(&self) -> Result<usize> {
        crate::error::tensor(self.index.dim(0))
    }

    /// `W + K` for `W` `[output, input]`.
    fn added_to(&self, weight: &Tensor) -> Result<Tensor> {
        crate::error::tensor(weight.index_add(&self.index, &self.weights, 1))
    }

    /// `x Kᵀ` for `x` `[.., input]`.
    fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let last = x.rank().saturating_sub(1);
        let x = crate::error::tensor(x.contiguous())?;
        let x = crate::error::tensor(x.index_select(&self.index, last))?;
        Ok(linear(&x, &self.weights, None)?)
    }
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
                kept,
                dtype,
            } => {
                let weight = weight.dequantised(*dtype)?;
                let weight = match input_scale {
                    Some(scale) => crate::error::tensor(weight.broadcast_mul(scale))?,
                    None => weight,
                };
                match kept {
                    Some(kept) => kept.added_to(&weight),
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
                input_scale,
                kept,
                ..
            } => {
                let scaled = match input_scale {
                    Some(scale) => crate::error::tensor(x.broadcast_mul(scale))?,
                    None => x.clone(),
                };
                match kept {
                    None => quantised_linear(&scaled, weight, bias, f)?,
                    Some(kept) => {
                        let y = quantised_linear(&scaled, weight, bias, Activation::Identity)?;
                        activate(&crate::error::tensor(y + kept.apply(x)?)?, f)?
                    }
                }
            }
        })
    }

    /// Numbers that an input row is multiplied with.
    fn elements(&self) -> Result<usize> {
        let [output, input] = self.dims()?;
        let kept = match self {
            Self::Quantised {
                kept: Some(kept), ..
            } => kept.count()?,
            _ => 0,
        };
        Ok(output * (input + kept))
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

    /// `f(x Wᵀ + b)`.
    fn apply(&self, x: &Tensor, bias: Option<&Tensor>, f: Activation) -> Result<Tensor> {
        match self {
            Self::Whole(matrix) => matrix.apply(x, bias, f),
            Self::LowRank { down, up } => {
                let inner = down.apply(x, None, Activation::Identity)?;
                up.apply(&inner, bias, f)
            }
        }
    }
}

/// A part of a layer's matrix that sees the input with dropout (as adapters do: Hu et al. 2021, LoRA,
/// arXiv 2106.09685).
#[derive(Clone, Debug)]
pub struct DroppedPart {
    /// The part `D` `[output, input]`, which the layer's matrix contains.
    pub weight: Weight,
    /// With which an element of the input is zero.
    pub probability: f64,
    /// The mask is a function of it and of the place of the element in the input.
    pub seed: u64,
}

/// `y = x Wᵀ + b`, with `W` one matrix or a product of two thin factors.
#[derive(Clone, Debug)]
pub struct Linear {
    weight: Weight,
    bias: Option<Tensor>,
    dropped: Option<Box<DroppedPart>>,
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
            dropped: None,
            dims,
            multiplications,
        })
    }

    /// The layer with dropout of the inputs of a part `D` of its matrix, for training:
    /// `y = x Wᵀ + (x ⊙ (m − 1)) Dᵀ + b`, so that `W − D` sees the input and `D` what the mask `m` leaves.
    ///
    /// # Errors
    /// When the part's shape is another, or the probability is not at least 0 and below 1.
    pub fn with_dropped(self, part: DroppedPart) -> Result<Self> {
        let dims = match &part.weight {
            Weight::Whole(matrix) => matrix.dims()?,
            Weight::LowRank { down, up } => {
                let ([rank, input], [output, up_rank]) = (down.dims()?, up.dims()?);
                if rank != up_rank {
                    let expected = format!("{rank}, as in the first");
                    return Err(Error::invalid(
                        "rank of the second factor",
                        up_rank,
                        expected,
                    ));
                }
                [output, input]
            }
        };
        if dims != self.dims {
            let expected = format!("{:?}, the matrix's", self.dims);
            return Err(Error::invalid(
                "shape of a part with dropout",
                dims,
                expected,
            ));
        }
        if !(0.0..1.0).contains(&part.probability) {
            let expected = "at least 0 and below 1";
            return Err(Error::invalid(
                "dropout of a part",
                part.probability,
                expected,
            ));
        }
        let dropped = (part.probability > 0.0).then(|| Box::new(part));
        Ok(Self { dropped, ..self })
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
        let bias = self.bias.as_ref();
        let Some(part) = &self.dropped else {
            return self.weight.apply(x, bias, activation);
        };
        let y = self.weight.apply(x, bias, Activation::Identity)?;
        let left = dropout(x, part.probability, part.seed)?;
        let change = crate::error::tensor(left - x)?;
        let change = part.weight.apply(&change, None, Activation::Identity)?;
        let y = crate::error::tensor(y + change)?;
        Ok(match activation {
            Activation::Identity => y,
            _ => activate(&y, activation)?,
        })
    }

    /// Applies the matrix alone.
    pub fn apply_without_bias(&self, x: &Tensor) -> Result<Tensor> {
        self.weight.apply(x, None, Activation::Identity)
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
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::{assert_close, numbers};
    use lapidary_kernels::check::gradient_error;

    fn part(weight: Weight, probability: f64, seed: u64) -> DroppedPart {
        DroppedPart {
            weight,
            probability,
            seed,
        }
    }

    #[test]
    fn a_part_alone_sees_what_dropout_leaves() {
        let (x, own) = (numbers(&[2, 3, 4], 0.0), numbers(&[5, 4], 1.0));
        let (down, up) = (numbers(&[2, 4], 2.0), numbers(&[5, 2], 3.0));
        let (bias, product) = (numbers(&[5], 4.0), up.matmul(&down).unwrap());
        let whole = (&own + &product).unwrap();
        let layer = || Linear::new(whole.clone(), Some(bias.clone())).unwrap();
        let factors = Weight::LowRank {
            down: Matrix::Dense(down),
            up: Matrix::Dense(up),
        };
        let left = dropout(&x, 0.4, 9).unwrap();
        let expected = linear(&x, &own, Some(&bias)).unwrap();
        let expected = (expected + linear(&left, &product, None).unwrap()).unwrap();
        for weight in [factors.clone(), Weight::dense(product.clone())] {
            let dropped = layer().with_dropped(part(weight, 0.4, 9)).unwrap();
            assert_close(&dropped.apply(&x).unwrap(), &expected, 1e-12, "sum");
            let found = dropped.apply_activated(&x, Activation::Gelu).unwrap();
            let expected = activate(&expected, Activation::Gelu).unwrap();
            assert_close(&found, &expected, 1e-12, "activated");
        }
        let none = layer().with_dropped(part(factors.clone(), 0.0, 9)).unwrap();
        assert_close(
            &none.apply(&x).unwrap(),
            &layer().apply(&x).unwrap(),
            0.0,
            "no rate",
        );
        assert!(layer().with_dropped(part(factors, 1.0, 9)).is_err());
        let wide = Weight::dense(numbers(&[5, 3], 1.0));
        assert!(layer().with_dropped(part(wide, 0.4, 9)).is_err());
    }

    #[test]
    fn gradients_of_input_and_part_equal_finite_differences() {
        let inputs = [&[3, 4][..], &[5, 4], &[2, 4], &[5, 2]].map(|dims| numbers(dims, 1.0));
        let f = |inputs: &[Tensor]| {
            let [x, own, down, up] = inputs else {
                return Ok(inputs[0].clone());
            };
            let whole = (own + up.matmul(down)?)?;
            let weight = Weight::LowRank {
                down: Matrix::Dense(down.clone()),
                up: Matrix::Dense(up.clone()),
            };
            let layer = Linear::new(whole, None).unwrap();
            let layer = layer.with_dropped(part(weight, 0.4, 9)).unwrap();
            Ok(layer.apply(x).unwrap())
        };
        assert!(gradient_error(f, &inputs).unwrap() < 1e-8);
    }
}
