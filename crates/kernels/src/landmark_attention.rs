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

use crate::host::{self, Host, Shared, by_dtype, fused};
use crate::product::Matrix;
use crate::simd::Real;
use crate::stack::Stack;
use crate::{DType, Error, Result, Tensor, naive};
use candle_core::{CpuStorage, CustomOp3, Layout, Shape, WithDType};

type Candle<T> = candle_core::Result<T>;

/// `y = P M Pᵀ v` `[batch, heads, length, value_width]`, where `P` is the Gaussian kernel of `queries`
/// `[batch, heads, length, width]` and `landmarks` `[batch, heads, count, width]`, for `middle` `M`
/// `[batch, heads, count, count]` and `values` `[batch, heads, length, value_width]`. Rows of `P` are zero where
/// `kept` `[batch, length]` in `u8` is. Differentiable in the four tensors.
///
/// Time grows with `length · count · (width + value_width)`, memory with what comes in and, for each thread,
/// `length · count`.
///
/// # Errors
/// When the shapes do not fit each other.
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
    // An operation has at most three arguments: the middle lies beside the landmarks.
    let both = Tensor::cat(&[landmarks, middle], 3)?;
    Ok(queries.apply_op3(&both, values, operation)?)
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

impl Factored {
    /// The dimensions before the last two.
    fn pairs(layout: &Layout) -> &[usize] {
        &layout.dims()[..2]
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

    fn forward<T: Real>(&self, q: &Stack<T>, both: &[T], v: &Stack<T>) -> Vec<T> {
        let each = self.sizes.length * self.sizes.value_width;
        let heads = q.starts.len();
        let mut output = host::unwritten::<T>(heads * each);
        let shared = Shared::new(&mut output);
        host::share(heads, self.work(), |range| {
            for index in range {
                // SAFETY: heads are disjoint.
                let y = unsafe { shared.part(index * each, each) };
                Head::new(self, index, q, both, v).forward(y);
            }
        });
        output
    }

    /// Gradients of queries, of landmarks with the middle beside them, and of values, packed.
    fn backward<T: Real>(
        &self,
        q: &Stack<T>,
        both: &[T],
        v: &Stack<T>,
        gradient: &Stack<T>,
    ) -> [Vec<T>; 3] {
        let Sizes {
            length,
            width,
            count,
            value_width,
            ..
        } = self.sizes;
        let heads = q.starts.len();
        let sizes = [
            length * width,
            count * (width + count),
            length * value_width,
        ];
        let mut results = sizes.map(|each| host::unwritten::<T>(heads * each));
        let [of_q, of_both, of_v] = &mut results;
        let shared = [Shared::new(of_q), Shared::new(of_both), Shared::new(of_v)];
        host::share(heads, 3 * self.work(), |range| {
            for index in range {
                // SAFETY: heads are disjoint.
                let [q_part, both_part, v_part] = std::array::from_fn(|of| unsafe {
                    shared[of].part(index * sizes[of], sizes[of])
                });
                let slopes = Slopes {
                    q: q_part,
                    both: both_part,
                    v: v_part,
                };
                Head::new(self, index, q, both, v).backward(gradient.matrix(index), slopes);
            }
        });
        results
    }
}

impl CustomOp3 for Factored {
    fn name(&self) -> &'static str {
        "landmark attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        both: &CpuStorage,
        both_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Candle<(CpuStorage, Shape)> {
        by_dtype!(host::dtype(q), T => {
            let q = Stack::<T>::new(q, q_layout, Self::pairs(q_layout))?;
            let both = host::ordered::<T>(both, both_layout)?;
            let v = Stack::<T>::new(v, v_layout, Self::pairs(v_layout))?;
            let y = self.forward(&q, &both, &v);
            Ok((T::to_cpu_storage_owned(y), v_layout.shape().clone()))
        })
    }

    fn bwd(
        &self,
        q: &Tensor,
        both: &Tensor,
        v: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Candle<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let hosts = [q, both, v, gradient].map(Host::new);
        let [q_host, both_host, v_host, g_host] = &hosts;
        by_dtype!(q.dtype(), T => {
            let [of_q, of_both, of_v] = self.backward(
                &Stack::<T>::new(q_host.storage()?, q_host.layout, Self::pairs(q_host.layout))?,
                &both_host.ordered::<T>()?,
                &Stack::<T>::new(v_host.storage()?, v_host.layout, Self::pairs(v_host.layout))?,
                &Stack::<T>::new(g_host.storage()?, g_host.layout, Self::pairs(g_host.layout))?,
            );
            let wanted = |of: &Tensor, slopes: Vec<T>| {
                of.track_op().then(|| host::tensor(slopes, of.dims())).transpose()
            };
            Ok((wanted(q, of_q)?, wanted(both, of_both)?, wanted(v, of_v)?))
        })
    }
}

#[cfg(test)]
mod tests;
