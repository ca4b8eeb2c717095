//! Attention by a Gaussian kernel of queries that is factored through a few landmarks (Lu et al., SOFT,
//! arXiv 2110.11945), without the kernel of queries and landmarks beyond one head of one sequence.
//!
//! ```text
//! P_ij = e^{−γ ‖q_i − l_j‖²},   y = P M Pᵀ v
//! C = Pᵀ v,  E = Pᵀ ∂y:   ∂v = P Mᵀ E,   ∂M = E Cᵀ,   ∂P = ∂y (M C)ᵀ + v (Mᵀ E)ᵀ
//! W = ∂P ∘ P:   ∂q_i = 2 γ Σ_j W_ij (l_j − q_i),   ∂l_j = 2 γ Σ_i W_ij (q_i − l_j)
//! ```
//!
//! `P` of a head lies in a thread's own memory while it is used, and is made again in the backward pass. Squared
//! distances are `‖q‖² + ‖l‖² − 2 q·l`, of points from which the mean of the landmarks is taken first: that
//! changes none of them but what rounding does.

mod head;

use crate::by_head::{ByHead, by_head};
use crate::host::fused;
use crate::product::Matrix;
use crate::simd::Real;
use crate::{DType, Error, Result, Tensor, naive};

/// `y = P M Pᵀ v` `[batch, heads, length, value_width]`, where `P` is the Gaussian kernel of `queries`
/// `[batch, heads, length, width]` and `landmarks` `[batch, heads, count, width]`, for `middle` `M`
/// `[batch, heads, count, count]` and `values` `[batch, heads, length, value_width]`. Rows of `P` are zero where
/// `kept` `[batch, length]` in `u8` is. Differentiable in the four tensors.
///
/// Time grows with `length · count · (width + value_width)`, memory with what comes in and, for each thread,
/// `length · count`.
///
/// # Errors
/// When the shapes do not fit each other, or `rate` is below 0.
///
/// ```
/// use lapidary_kernels::{DType, Device, Tensor, landmark_attention};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let q = Tensor::zeros((1, 1, 5, 4), DType::F32, &Device::Cpu)?;
/// let (landmark, middle) = (q.narrow(2, 0, 1)?, Tensor::ones((1, 1, 1, 1), DType::F32, &Device::Cpu)?);
/// let v = Tensor::ones((1, 1, 5, 2), DType::F32, &Device::Cpu)?;
/// let y = landmark_attention(&q, &landmark, &middle, &v, 0.5, None)?;
/// assert_eq!(y.flatten_all()?.to_vec1::<f32>()?, [5.0; 10]);
/// # Ok(())
/// # }
/// ```
pub fn landmark_attention(
    queries: &Tensor,
    landmarks: &Tensor,
    middle: &Tensor,
    values: &Tensor,
    rate: f64,
    kept: Option<&Tensor>,
) -> Result<Tensor> {
    let (batch, heads, length, width) = queries.dims4()?;
    let count = landmarks.dim(2)?;
    let value_width = values.dims4()?.3;
    let expected = [
        ("landmarks", landmarks, [batch, heads, count, width]),
        ("middle", middle, [batch, heads, count, count]),
        ("values", values, [batch, heads, length, value_width]),
    ];
    for (name, found, expected) in expected {
        if found.dims() != expected {
            let expected = format!("{expected:?}");
            return Err(Error::argument(
                "landmark attention",
                name,
                found.dims(),
                expected,
            ));
        }
    }
    // Below 0 a kernel would grow with the distance, without bound.
    if rate.is_nan() || rate < 0.0 {
        return Err(Error::argument(
            "landmark attention",
            "rate",
            rate,
            "not below 0",
        ));
    }
    if let Some(kept) = kept.filter(|kept| kept.dims() != [batch, length]) {
        let expected = format!("[{batch}, {length}]");
        return Err(Error::argument(
            "landmark attention",
            "kept",
            kept.dims(),
            expected,
        ));
    }
    if !fused(&[queries, landmarks, middle, values]) {
        return naive::landmark_attention(queries, landmarks, middle, values, rate, kept);
    }
    let operation = Factored {
        sizes: Sizes {
            heads,
            length,
            width,
            count,
            value_width,
        },
        rate,
        kept: match kept {
            None => None,
            Some(kept) => Some(kept.to_dtype(DType::U8)?.flatten_all()?.to_vec1::<u8>()?),
        },
    };
    // The middle lies beside the landmarks.
    let both = Tensor::cat(&[landmarks, middle], 3)?.contiguous()?;
    by_head(operation, queries, &both, values)
}

#[derive(Clone, Copy)]
struct Sizes {
    /// Of a sequence.
    heads: usize,
    length: usize,
    width: usize,
    count: usize,
    value_width: usize,
}

struct Factored {
    sizes: Sizes,
    rate: f64,
    /// `[batch, length]`.
    kept: Option<Vec<u8>>,
}

/// One head of one sequence.
struct Head<'a, T> {
    sizes: Sizes,
    rate: T,
    q: Matrix<'a, T>,
    v: Matrix<'a, T>,
    /// Of the landmarks.
    centre: Vec<T>,
    /// From which the centre is taken, `[count, width]`.
    landmarks: Vec<T>,
    /// `‖l‖²` of these.
    squares: Vec<T>,
    middle: Matrix<'a, T>,
    kept: Option<&'a [u8]>,
}

/// Gradients of one head.
struct Slopes<'a, T> {
    q: &'a mut [T],
    both: &'a mut [T],
    v: &'a mut [T],
}

impl ByHead for Factored {
    fn name(&self) -> &'static str {
        "landmark attention"
    }

    fn work(&self) -> usize {
        let Sizes {
            length,
            width,
            count,
            value_width,
            ..
        } = self.sizes;
        length * count * (width + 2 * value_width) / 8
    }

    fn forward<T: Real>(&self, index: usize, of: [Matrix<T>; 3], result: &mut [T]) {
        Head::new(self, index, of).forward(result);
    }

    fn backward<T: Real>(
        &self,
        index: usize,
        of: [Matrix<T>; 3],
        gradient: Matrix<T>,
        [q, both, v]: [&mut [T]; 3],
    ) {
        let slopes = Slopes { q, both, v };
        Head::new(self, index, of).backward(gradient, slopes);
    }
}

#[cfg(test)]
mod tests;
