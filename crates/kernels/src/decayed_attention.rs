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

use crate::host::{self, Host, Shared, by_dtype, fused};
use crate::product::Matrix;
use crate::simd::Real;
use crate::stack::Stack;
use crate::{Error, Result, Tensor, naive};
use backward::Slopes;
use candle_core::{CpuStorage, CustomOp3, Layout, Shape, WithDType};

type Candle<T> = candle_core::Result<T>;

/// `Σ_j M_ij (q_i · k_j) (v_j, 1)`, `[batch, heads, length, value_width + 1]`: sums over all positions, or over a
/// position and those before it, the sum of the weights behind them, for `q` and `k`
/// `[batch, heads, length, features]`, `v` `[batch, heads, length, value_width]` and `a` = `log_decay`
/// `[batch, heads, length]`, which is not positive. `chunk` positions meet each other directly; the result does not
/// depend on it beyond rounding.
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
    // An operation has at most three arguments: the decay is a last feature of the keys.
    let keys = Tensor::cat(&[k, &log_decay.unsqueeze(3)?], 3)?;
    Ok(q.apply_op3(&keys, v, operation)?)
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

impl Decayed {
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

    fn forward<T: Real>(&self, q: &Stack<T>, keys: &Stack<T>, v: &Stack<T>) -> Vec<T> {
        let each = self.sizes.length * (self.sizes.value_width + 1);
        let heads = q.starts.len();
        let mut output = host::unwritten::<T>(heads * each);
        let shared = Shared::new(&mut output);
        host::share(heads, self.work(), |range| {
            for index in range {
                // SAFETY: heads are disjoint.
                let output = unsafe { shared.part(index * each, each) };
                Head::new(self.sizes, index, q, keys, v).forward(output);
            }
        });
        output
    }

    /// Gradients of queries, of keys with their decay beside them, and of values, packed.
    fn backward<T: Real>(&self, [q, keys, v, gradient]: [&Stack<T>; 4]) -> [Vec<T>; 3] {
        let Sizes {
            length,
            features,
            value_width,
            ..
        } = self.sizes;
        let heads = q.starts.len();
        let sizes = [features, features + 1, value_width].map(|width| length * width);
        let mut results = sizes.map(|each| host::unwritten::<T>(heads * each));
        let [of_q, of_keys, of_v] = &mut results;
        let shared = [Shared::new(of_q), Shared::new(of_keys), Shared::new(of_v)];
        host::share(heads, 3 * self.work(), |range| {
            for index in range {
                // SAFETY: heads are disjoint.
                let [q_part, keys_part, v_part] = std::array::from_fn(|of| unsafe {
                    shared[of].part(index * sizes[of], sizes[of])
                });
                let slopes = Slopes::new(length, [q_part, keys_part, v_part]);
                Head::new(self.sizes, index, q, keys, v).backward(gradient.matrix(index), slopes);
            }
        });
        results
    }
}

/// The matrices of all heads of a tensor `[batch, heads, ..]`.
fn stack<'a, T: Real>(storage: &'a CpuStorage, layout: &Layout) -> Candle<Stack<'a, T>> {
    Stack::new(storage, layout, &layout.dims()[..2])
}

impl CustomOp3 for Decayed {
    fn name(&self) -> &'static str {
        "decayed attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        keys: &CpuStorage,
        keys_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Candle<(CpuStorage, Shape)> {
        by_dtype!(host::dtype(q), T => {
            let sums = self.forward::<T>(
                &stack(q, q_layout)?,
                &stack(keys, keys_layout)?,
                &stack(v, v_layout)?,
            );
            let (batch, heads, length, width) = v_layout.shape().dims4()?;
            let shape = Shape::from((batch, heads, length, width + 1));
            Ok((T::to_cpu_storage_owned(sums), shape))
        })
    }

    fn bwd(
        &self,
        q: &Tensor,
        keys: &Tensor,
        v: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Candle<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let hosts = [q, keys, v, gradient].map(Host::new);
        let [q_host, keys_host, v_host, g_host] = &hosts;
        by_dtype!(q.dtype(), T => {
            let [of_q, of_keys, of_v] = self.backward::<T>([
                &stack(q_host.storage()?, q_host.layout)?,
                &stack(keys_host.storage()?, keys_host.layout)?,
                &stack(v_host.storage()?, v_host.layout)?,
                &stack(g_host.storage()?, g_host.layout)?,
            ]);
            let wanted = |of: &Tensor, slopes: Vec<T>| {
                of.track_op().then(|| host::tensor(slopes, of.dims())).transpose()
            };
            Ok((wanted(q, of_q)?, wanted(keys, of_keys)?, wanted(v, of_v)?))
        })
    }
}

#[cfg(test)]
mod tests;
