//! Linear attention with a decay on the way from key to query, over the past or over both directions at once (Afzal
//! et al., LION, arXiv 2502.16249).
//!
//! ```text
//! y_i = Σ_j M_ij (q_i · k_j) (v_j, 1)
//! M_ij = e^{a_j + … + a_{i−1}}  for j < i,   e^{a_{i+1} + … + a_j}  for j > i,   M_ii = 1
//! ```
//!
//! where a causal `M` is zero for `j > i`. A chunk of positions meets itself with all its scores laid out, once for
//! both directions, and reads what lies before it and behind it from two matrices `Σ_j … k_j v_jᵀ`, one carried from
//! the first chunk to the last and one from the last to the first. The weights' own sums are carried beside them,
//! without values of one.
//!
//! Backward, with `∂y_i = (g_i, h_i)` and `p_ij = M_ij (g_i · v_j + h_i)`,
//!
//! ```text
//! ∂q_i = Σ_j p_ij k_j,   ∂k_j = Σ_i p_ij q_i,   ∂v_j = Σ_i M_ij (q_i · k_j) g_i
//! ```
//!
//! are sums of the same kind, in which queries are carried along too. `t_ij = p_ij (q_i · k_j)` belongs to every
//! `a` between `j` and `i`: with `C_i = Σ_{j<i} t_ij − Σ_{j>i} t_ji` and `E_i = Σ_{j<i} t_ji − Σ_{j>i} t_ij`,
//! `∂a_n = Σ_{i>n} C_i + Σ_{i≥n} E_i`.

mod backward;
mod walks;

use crate::by_head::{ByHead, by_head};
use crate::host::fused;
use crate::product::Matrix;
use crate::simd::Real;
use crate::{Error, Result, Tensor, naive};
use backward::Slopes;

/// `Σ_j M_ij (q_i · k_j) (v_j, 1)`, `[batch, heads, length, value_width + 1]`: sums over all positions, or over a
/// position and those before it, the sum of the weights behind them, for `q` and `k`
/// `[batch, heads, length, features]`, `v` `[batch, heads, length, value_width]` and `a` = `log_decay`
/// `[batch, heads, length]`, which is finite and not positive. `chunk` positions meet each other directly; the
/// result does not depend on it beyond rounding.
///
/// # Errors
/// When the shapes do not fit each other.
///
/// ```
/// use lapidary_kernels::{DType, Device, Tensor, decayed_attention};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let one = Tensor::ones((1, 1, 3, 1), DType::F32, &Device::Cpu)?;
/// let half = Tensor::full(0.5f32.ln(), (1, 1, 3), &Device::Cpu)?;
/// let y = decayed_attention(&one, &one, &one, &half, false, 64)?;
/// let weights = y.narrow(3, 1, 1)?.flatten_all()?.to_vec1::<f32>()?;
/// assert_eq!(weights, [1.75, 2.0, 1.75]);
/// # Ok(())
/// # }
/// ```
pub fn decayed_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    log_decay: &Tensor,
    is_causal: bool,
    chunk: usize,
) -> Result<Tensor> {
    let (batch, heads, length, features) = q.dims4()?;
    let value_width = v.dims4()?.3;
    let refuse = |name: &'static str, found: &Tensor, expected: String| {
        Err(Error::argument(
            "decayed attention",
            name,
            found.dims(),
            expected,
        ))
    };
    if k.dims() != q.dims() {
        return refuse("k", k, format!("{:?}", q.dims()));
    }
    if v.dims() != [batch, heads, length, value_width] {
        return refuse("v", v, format!("[{batch}, {heads}, {length}, width]"));
    }
    if log_decay.dims() != [batch, heads, length] {
        return refuse(
            "log_decay",
            log_decay,
            format!("[{batch}, {heads}, {length}]"),
        );
    }
    if !fused(&[q, k, v, log_decay]) {
        return naive::decayed_attention(q, k, v, log_decay, is_causal);
    }
    let operation = Decayed {
        sizes: Sizes {
            length,
            features,
            value_width,
            is_causal,
            chunk: chunk.clamp(1, length.max(1)),
        },
    };
    // The decay is a last feature of the keys.
    let keys = Tensor::cat(&[k, &log_decay.unsqueeze(3)?], 3)?;
    by_head(operation, q, &keys, v)
}

/// Multiplications and additions of [`decayed_attention`] for one head: the products of each chunk with itself, and
/// for each position the adding to and the reading of one state or two, decays left out.
pub fn decayed_attention_operations(
    length: usize,
    features: usize,
    value_width: usize,
    is_causal: bool,
    chunk: usize,
) -> u64 {
    // The weights are summed as if there were a value more.
    let width = value_width + 1;
    let once = crate::operations_in_chunks(length, features, width, chunk);
    match is_causal {
        true => once,
        false => once + 4 * (length * features * width) as u64,
    }
}

#[derive(Clone, Copy)]
struct Sizes {
    length: usize,
    features: usize,
    value_width: usize,
    is_causal: bool,
    chunk: usize,
}

/// One head of one sequence.
struct Head<'a, T> {
    sizes: Sizes,
    q: Matrix<'a, T>,
    k: Matrix<'a, T>,
    v: Matrix<'a, T>,
    /// `a` of every position.
    decay: Vec<T>,
}

/// What is left of a position on the way through its chunk.
struct Fades<T> {
    /// From the beginning to the position, without its own decay.
    before: Vec<T>,
    /// As `before`, with its own.
    through: Vec<T>,
    /// From the position to the end, with its own.
    rest: Vec<T>,
    /// As `rest`, without its own.
    after: Vec<T>,
    /// From the beginning to the end.
    across: T,
}

/// Which way a walk over the chunks goes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Walk {
    FromTheEnd,
    FromTheBeginning,
}

/// Sums of outer products of features and of what belongs to them, and of the features alone.
struct State<T> {
    /// `[features, value_width]`.
    products: Vec<T>,
    /// `[features]`.
    weights: Vec<T>,
    is_empty: bool,
}

struct Decayed {
    sizes: Sizes,
}

impl ByHead for Decayed {
    fn name(&self) -> &'static str {
        "decayed attention"
    }

    fn work(&self) -> usize {
        let Sizes {
            length,
            features,
            value_width,
            chunk,
            ..
        } = self.sizes;
        length * (4 * features * value_width + chunk * (features + value_width)) / 8
    }

    fn width(&self, of_values: usize) -> usize {
        of_values + 1
    }

    fn forward<T: Real>(&self, _: usize, of: [Matrix<T>; 3], result: &mut [T]) {
        Head::new(self.sizes, of).forward(result);
    }

    fn backward<T: Real>(
        &self,
        _: usize,
        of: [Matrix<T>; 3],
        gradient: Matrix<T>,
        slopes: [&mut [T]; 3],
    ) {
        let slopes = Slopes::new(self.sizes.length, slopes);
        Head::new(self.sizes, of).backward(gradient, slopes);
    }
}

#[cfg(test)]
mod tests;
