//! Means weighted by inner products: linear attention with its normaliser, whose sum of weights is never
//! a column beside the values (Katharopoulos et al., "Transformers are RNNs", arXiv 2006.16236).
//!
//! ```text
//! y_i = Σ_j (q_i · k_j) v_j / t_i,   t_i = Σ_j q_i · k_j + ε, or 1 where that is 0
//! ```
//!
//! over all keys, or over those up to the query. What queries read is `S = Σ_j k_j v_jᵀ` and
//! `z = Σ_j k_j`. With `∂n_i = ∂y_i / t_i` and `h_i = −∂n_i · y_i`, the gradients of the sums above and
//! below,
//!
//! ```text
//! ∂q_i = Σ_j (∂n_i · v_j + h_i) k_j,   ∂k_j = Σ_i (∂n_i · v_j + h_i) q_i,   ∂v_j = Σ_i (q_i · k_j) ∂n_i
//! ```
//!
//! of which all but `∂q` read `Σ_i q_i ∂n_iᵀ` and `Σ_i h_i q_i`.

mod codes;
mod exponential;
mod past;
#[cfg(test)]
mod tests;
mod whole;

pub use codes::code_means;
pub use exponential::{ExponentialMeans, causal_exponential_means};

use crate::backward::Apply;
use crate::host::{self, Host, by_dtype, fused};
use crate::product::Matrix;
use crate::simd::{self, Real};
use crate::stack::Stack;
use crate::{Error, Result, Tensor, naive};
use candle_core::{CpuStorage, CustomOp3, Layout, Shape, WithDType};
use exponential::Map;

type Candle<T> = candle_core::Result<T>;

/// `y` `[batch, heads, queries, width]` for `q` `[batch, heads, queries, features]`, `k`
/// `[batch, heads, keys, features]` and `v` `[batch, heads, keys, width]`: the mean of values weighted by
/// `q_i · k_j`, with `epsilon` added to the sum of weights, which counts as 1 where it is 0.
///
/// Time grows with `(queries + keys) · features · width`, memory with the result.
///
/// # Errors
/// When the shapes do not fit each other.
///
/// ```
/// use lapidary_kernels::{Device, Tensor, linear_means};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let device = Device::Cpu;
/// let q = Tensor::new(&[[[[1f32, 0.0], [0.0, 0.0]]]], &device)?;
/// let k = Tensor::new(&[[[[1f32, 5.0], [3.0, 5.0]]]], &device)?;
/// let v = Tensor::new(&[[[[4f32], [8.0]]]], &device)?;
/// let y = linear_means(&q, &k, &v, 0.0)?.flatten_all()?.to_vec1::<f32>()?;
/// // Weights of 1 and 3, and none.
/// assert_eq!(y, [7.0, 0.0]);
/// # Ok(())
/// # }
/// ```
pub fn linear_means(q: &Tensor, k: &Tensor, v: &Tensor, epsilon: f64) -> Result<Tensor> {
    means(q, k, v, epsilon, None)
}

/// [`linear_means`] over the keys up to a query's own position, of as many keys as queries; `chunk` positions
/// meet each other directly.
///
/// Time grows with `length · (chunk · (features + width) + features · width)`.
///
/// # Errors
/// As there.
pub fn causal_linear_means(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    epsilon: f64,
    chunk: usize,
) -> Result<Tensor> {
    means(q, k, v, epsilon, Some(chunk.max(1)))
}

fn means(q: &Tensor, k: &Tensor, v: &Tensor, epsilon: f64, chunk: Option<usize>) -> Result<Tensor> {
    let (batch, heads, queries, features) = q.dims4()?;
    let keys = match chunk {
        Some(_) => queries,
        None => k.dims4()?.2,
    };
    let refuse = |name: &'static str, found: &Tensor, expected: String| {
        Err(Error::argument(
            "linear means",
            name,
            found.dims(),
            expected,
        ))
    };
    if k.dims() != [batch, heads, keys, features] {
        return refuse("k", k, format!("[{batch}, {heads}, {keys}, {features}]"));
    }
    match v.dims() {
        [b, h, n, _] if [*b, *h, *n] == [batch, heads, keys] => {}
        _ => return refuse("v", v, format!("[{batch}, {heads}, {keys}, width]")),
    }
    match fused(&[q, k, v]) {
        true => Ok(q.apply3(k, v, Means { epsilon, chunk })?),
        false => naive::linear_means(q, k, v, epsilon, chunk.is_some()),
    }
}

struct Means {
    epsilon: f64,
    /// Under a causal mask, the positions that meet directly.
    chunk: Option<usize>,
}

/// The three operands of all heads.
struct Sides<'a, T> {
    q: Stack<'a, T>,
    k: Stack<'a, T>,
    v: Stack<'a, T>,
    pairs: usize,
    epsilon: T,
    /// What makes features of queries and keys, where these are not features themselves.
    map: Option<Map<'a, T>>,
}

impl<'a, T: Real> Sides<'a, T> {
    fn new(of: [(&'a CpuStorage, &Layout); 3], epsilon: f64) -> Candle<Self> {
        let [q, k, v] = of;
        let pairs = &q.1.dims()[..2];
        let stack =
            |(storage, layout): (&'a CpuStorage, &Layout)| Stack::new(storage, layout, pairs);
        Ok(Self {
            q: stack(q)?,
            k: stack(k)?,
            v: stack(v)?,
            pairs: pairs.iter().product(),
            epsilon: T::of(epsilon),
            map: None,
        })
    }

    /// Features of a query or a key.
    fn features(&self) -> usize {
        self.map.as_ref().map_or(self.q.columns, Map::count)
    }

    /// One over a sum of weights.
    #[inline(always)]
    fn reciprocal(&self, weights: T) -> T {
        reciprocal(weights + self.epsilon)
    }
}

/// One over a total, which counts as 1 where it is 0.
#[inline(always)]
fn reciprocal<T: Real>(total: T) -> T {
    match total == T::zero() {
        true => T::one(),
        false => T::one() / total,
    }
}

/// Gradients of queries, keys and values, packed.
type Slopes<T> = [Vec<T>; 3];

/// What the gradient of a row `y` is to the sums that it is a quotient of: writes `∂n` and gives `h`.
#[inline(always)]
fn split<T: Real>(reciprocal: T, gradient: &[T], y: &[T], of_sums: &mut [T]) -> T {
    for (slope, gradient) in of_sums.iter_mut().zip(gradient) {
        *slope = *gradient * reciprocal;
    }
    -simd::dot(of_sums, y)
}

/// A row of `x` times `with`.
#[inline(always)]
fn along<T: Real>(x: &Matrix<T>, row: usize, with: &[T]) -> T {
    let start = row * x.row_stride;
    if x.column_stride == 1 {
        return simd::dot(&x.data[start..start + x.columns], with);
    }
    let each = with.iter().enumerate();
    each.map(|(column, with)| x.data[start + column * x.column_stride] * *with)
        .sum()
}

/// Adds a row of `x` times `scale` to `sums`.
#[inline(always)]
fn add_row<T: Real>(x: &Matrix<T>, row: usize, scale: T, sums: &mut [T]) {
    let start = row * x.row_stride;
    if x.column_stride == 1 {
        return simd::add_scaled(sums, &x.data[start..start + x.columns], scale);
    }
    for (column, sum) in sums.iter_mut().enumerate() {
        *sum += scale * x.data[start + column * x.column_stride];
    }
}

impl Means {
    fn backward<T: Real>(&self, sides: &Sides<T>, y: &[T], gradient: &[T]) -> Slopes<T> {
        match self.chunk {
            None => whole::backward(sides, y, gradient),
            Some(chunk) => past::backward(sides, chunk, y, gradient).0,
        }
    }
}

impl CustomOp3 for Means {
    fn name(&self) -> &'static str {
        "linear means"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Candle<(CpuStorage, Shape)> {
        let (batch, heads, queries, _) = q_layout.shape().dims4()?;
        let shape = Shape::from((batch, heads, queries, v_layout.shape().dims4()?.3));
        by_dtype!(host::dtype(q), T => {
            let all = [(q, q_layout), (k, k_layout), (v, v_layout)];
            let sides = Sides::<T>::new(all, self.epsilon)?;
            let y = match self.chunk {
                None => whole::forward(&sides),
                Some(chunk) => past::forward(&sides, chunk),
            };
            Ok((T::to_cpu_storage_owned(y), shape))
        })
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        y: &Tensor,
        gradient: &Tensor,
    ) -> Candle<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let hosts = [q, k, v, y, gradient].map(Host::new);
        let [q_host, k_host, v_host, y, gradient] = &hosts;
        by_dtype!(q.dtype(), T => {
            let all = [
                (q_host.storage()?, q_host.layout),
                (k_host.storage()?, k_host.layout),
                (v_host.storage()?, v_host.layout),
            ];
            let sides = Sides::<T>::new(all, self.epsilon)?;
            let [dq, dk, dv] =
                self.backward(&sides, &y.ordered::<T>()?, &gradient.ordered::<T>()?);
            Ok((host::wanted(q, dq)?, host::wanted(k, dk)?, host::wanted(v, dv)?))
        })
    }
}
