//! The rounding lens: a model as it computes in a narrower floating-point format.
//!
//! Products, sums and functions are computed in the dtype of the tensors, which stands for the
//! wide accumulators of real hardware, and what every operation writes is rounded to the format,
//! to nearest with ties to even. Parameters are used as they are: whoever emulates a checkpoint
//! in the format rounds them too. Tables of angles are not rounded.

use crate::error::tensor;
use crate::{Lens, Result, Signal};
use lapidary_kernels::{AttentionOptions, D, DType, SoftmaxMask, Tensor, naive};

/// A floating-point format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// bfloat16: 8 significant bits.
    Bf16,
    /// IEEE half precision: 11 significant bits; overflows above 65504.
    F16,
    /// IEEE single precision: 24 significant bits.
    F32,
}

impl Format {
    /// Every format, narrowest first.
    pub const ALL: [Self; 3] = [Self::Bf16, Self::F16, Self::F32];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "bf16",
            Self::F16 => "f16",
            Self::F32 => "f32",
        }
    }

    /// Distance from 1 to the next number.
    pub fn epsilon(self) -> f64 {
        match self {
            Self::Bf16 => 2f64.powi(-7),
            Self::F16 => 2f64.powi(-10),
            Self::F32 => 2f64.powi(-23),
        }
    }

    /// The nearest numbers of the format, ties to even, in the tensor's own dtype.
    pub fn round(self, value: &Tensor) -> Result<Tensor> {
        let narrow = match self {
            Self::Bf16 => DType::BF16,
            Self::F16 => DType::F16,
            Self::F32 => DType::F32,
        };
        tensor(tensor(value.to_dtype(narrow))?.to_dtype(value.dtype()))
    }
}

/// What is rounded between the scores of attention and what it mixes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SoftmaxPrecision {
    /// Nothing: one fused kernel, which rounds what it writes.
    Fused,
    /// Scores and weights; exponentials and their sum are wide.
    #[default]
    Wide,
    /// Scores, exponentials, every partial sum, and weights.
    Narrow,
}

/// How a model rounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rounding {
    /// What is rounded to.
    pub format: Format,
    /// Where attention rounds.
    pub softmax: SoftmaxPrecision,
}

impl Rounding {
    /// Weights `[batch, heads, query, key]` of queries `[batch, heads, query, width]` for keys
    /// `[batch, groups, key, width]`.
    pub(crate) fn attention_weights(
        &self,
        q: &Tensor,
        k: &Tensor,
        options: &AttentionOptions,
    ) -> Result<Tensor> {
        if self.softmax == SoftmaxPrecision::Fused {
            return Ok(naive::attention_weights(q, k, options)?);
        }
        let round = |value: Tensor| self.format.round(&value);
        let scores = scores(q, k, options, round)?;
        match self.softmax {
            SoftmaxPrecision::Narrow => self.narrow_softmax(&scores),
            _ => round(naive::softmax(&scores, &SoftmaxMask::default())?),
        }
    }

    /// `e^{s − max} / Σ` with each step rounded, the sum after every term.
    fn narrow_softmax(&self, scores: &Tensor) -> Result<Tensor> {
        let round = |value: Tensor| self.format.round(&value);
        // A row that sees nothing has −∞ as its maximum, and gets zeros.
        let most = tensor(tensor(scores.max_keepdim(D::Minus1))?.maximum(f64::from(f32::MIN)))?;
        let terms = round(tensor(round(tensor(scores.broadcast_sub(&most))?)?.exp())?)?;
        let mut sum = tensor(most.zeros_like())?;
        for key in 0..tensor(terms.dim(D::Minus1))? {
            sum = round(tensor(sum + tensor(terms.narrow(D::Minus1, key, 1))?)?)?;
        }
        let nothing = tensor(tensor(sum.eq(0.0))?.to_dtype(sum.dtype()))?;
        round(tensor(terms.broadcast_div(&tensor(sum + nothing)?))?)
    }
}

/// Scores `[batch, heads, query, key]` of queries for keys, `−∞` where they are hidden, each step
/// through `round`.
pub(crate) fn scores(
    q: &Tensor,
    k: &Tensor,
    options: &AttentionOptions,
    round: impl Fn(Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let keys = naive::repeat_groups(k, tensor(q.dim(1))?)?;
    let transposed = tensor(tensor(keys.transpose(2, 3))?.contiguous())?;
    let products = round(tensor(tensor(q.contiguous())?.matmul(&transposed))?)?;
    let mut scores = round(tensor(products * options.scale)?)?;
    if let Some(bias) = &options.bias {
        let bias = bias.laid_out(tensor(q.dim(2))?, tensor(k.dim(2))?)?;
        scores = round(tensor(scores.broadcast_add(&bias))?)?;
    }
    let hidden = Tensor::full(f64::NEG_INFINITY, scores.shape(), scores.device());
    let hidden = tensor(tensor(hidden)?.to_dtype(scores.dtype()))?;
    tensor(visible(q, k, options)?.where_cond(&scores, &hidden))
}

/// 1 where a query may see a key, `[batch, heads, query, key]` in `u8`: where weights would be
/// positive if all scores were equal.
fn visible(q: &Tensor, k: &Tensor, options: &AttentionOptions) -> Result<Tensor> {
    let equal = AttentionOptions {
        bias: None,
        ..options.clone()
    };
    let weights =
        naive::attention_weights(&tensor(q.zeros_like())?, &tensor(k.zeros_like())?, &equal)?;
    tensor(weights.gt(0.0))
}

impl Signal {
    /// Puts the rounding lens on; the value is rounded first.
    ///
    /// ```
    /// use lapidary_kernels::{Device, Tensor};
    /// use lapidary_signal::{Signal, rounding::{Format, Rounding, SoftmaxPrecision}};
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let rounding = Rounding { format: Format::Bf16, softmax: SoftmaxPrecision::Wide };
    /// let x = Signal::from(Tensor::new(&[256f64], &Device::Cpu)?).into_rounded(rounding)?;
    /// let one = Tensor::new(&[1f64], &Device::Cpu)?;
    /// // The next number after 256 is 258, and 257 lies half-way: ties go to the even one.
    /// assert_eq!(x.add_constant(&one)?.value().to_vec1::<f64>()?, [256.0]);
    /// # Ok(()) }
    /// ```
    pub fn into_rounded(self, rounding: Rounding) -> Result<Self> {
        Ok(Self {
            value: rounding.format.round(&self.value)?,
            lens: Lens::Rounded(rounding),
        })
    }

    /// Continues with what an operation computed: as [`Signal::carry`], rounded when that lens is
    /// on.
    pub(crate) fn computed(&self, value: Tensor) -> Result<Self> {
        match &self.lens {
            Lens::Rounded(rounding) => Ok(self.carry(rounding.format.round(&value)?)),
            _ => Ok(self.carry(value)),
        }
    }
}
