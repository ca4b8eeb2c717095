//! Attention whose rows and columns sum to one in turns (Sander et al., "Sinkformers", arXiv 2110.11773),
//! without the matrix: what is kept of each normalisation is one number for each query or key.
//!
//! ```text
//! h⁰_i = −ln Σ_j e^{s_ij},   h¹_j = −ln Σ_i e^{s_ij + h⁰_i},   h²_i = −ln Σ_j e^{s_ij + h¹_j},   …
//! y_i = Σ_j A_ij v_j,   A_ij = e^{s_ij + f_i + g_j},   s_ij = scale · q_i · k_j
//! ```
//!
//! with `f` and `g` the last of rows and of columns, 0 where there is none. Backward, scores are made again a
//! tile at a time. With `P^t_ij = e^{s_ij + h^t + h^{t−1}}` and `D_ij = ∂y_i · v_j`
//!
//! ```text
//! ∂v_j = Σ_i A_ij ∂y_i,   ∂f_i = ∂y_i · y_i,   ∂g_j = v_j · ∂v_j,   ∂h^{t−1} −= Σ P^t ∂h^t
//! ∂s_ij = A_ij D_ij − Σ_t P^t_ij ∂h^t,   ∂q_i = scale Σ_j ∂s_ij k_j,   ∂k_j = scale Σ_i ∂s_ij q_i
//! ```

mod passes;

use crate::backward::Apply;
use crate::host::{self, Host, by_dtype, fused};
use crate::simd::{self, Real};
use crate::stack::Stack;
use crate::{DType, Error, Result, Tensor, naive};
use candle_core::{CpuStorage, CustomOp3, Layout, Shape, WithDType};
use passes::{Scores, Step, mixed, of_scores, potentials};
use std::sync::OnceLock;

type Candle<T> = candle_core::Result<T>;

/// How scores are normalised.
#[derive(Clone, Debug)]
pub struct SinkhornOptions {
    /// Multiplies scores.
    pub scale: f64,
    /// Normalisations: of rows first, and then of columns and rows in turns.
    pub iterations: usize,
    /// `[batch, length]` in `u8`, 1 = a token that is there; others are no queries and no keys.
    pub keep: Option<Tensor>,
}

/// `A V` `[batch, heads, length, value_width]` for queries and keys `[batch, heads, length, width]` and values
/// `[batch, heads, length, value_width]`; zeros for a query that is not there.
///
/// Time grows with `iterations · length²`, memory with `iterations · length`.
///
/// # Errors
/// When the shapes do not fit each other, or there is no iteration.
///
/// ```
/// use lapidary_kernels::{Device, SinkhornOptions, Tensor, sinkhorn_attention};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let zeros = Tensor::new(&[[[[0f32], [0.0]]]], &Device::Cpu)?;
/// let v = Tensor::new(&[[[[1f32], [5.0]]]], &Device::Cpu)?;
/// let options = SinkhornOptions { scale: 1.0, iterations: 3, keep: None };
/// let y = sinkhorn_attention(&zeros, &zeros, &v, &options)?;
/// let y = y.flatten_all()?.to_vec1::<f32>()?;
/// assert!(y.iter().all(|y| (y - 3.0).abs() < 1e-5));
/// # Ok(()) }
/// ```
pub fn sinkhorn_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    options: &SinkhornOptions,
) -> Result<Tensor> {
    let (batch, heads, length, _) = q.dims4()?;
    let refuse = |name, found: &dyn std::fmt::Debug, expected: String| {
        Err(Error::argument("sinkhorn attention", name, found, expected))
    };
    if k.dims() != q.dims() {
        return refuse("k", &k.dims(), format!("{:?}", q.dims()));
    }
    let (v_batch, v_heads, v_length, _) = v.dims4()?;
    if (v_batch, v_heads, v_length) != (batch, heads, length) {
        let expected = format!("[{batch}, {heads}, {length}, width]");
        return refuse("v", &v.dims(), expected);
    }
    if options.iterations == 0 {
        return refuse("iterations", &0, "at least 1".to_owned());
    }
    let keep = match &options.keep {
        Some(keep) if keep.dims() != [batch, length] || keep.dtype() != DType::U8 => {
            let found = (keep.dims(), keep.dtype());
            return refuse("keep", &found, format!("[{batch}, {length}] in u8"));
        }
        Some(keep) => Some(keep.flatten_all()?.to_vec1::<u8>()?),
        None => None,
    };
    if !fused(&[q, k, v]) {
        return naive::sinkhorn_attention(q, k, v, options);
    }
    let operation = Sinkhorn {
        scale: options.scale,
        iterations: options.iterations,
        keep,
        potentials: OnceLock::new(),
    };
    Ok(q.apply3(k, v, operation)?)
}

struct Sinkhorn {
    scale: f64,
    iterations: usize,
    /// `[batch, length]`.
    keep: Option<Vec<u8>>,
    /// `h` of every iteration, `[iterations, batch · heads · length]`.
    potentials: OnceLock<Tensor>,
}

/// Queries, keys and values of all heads.
struct Sides<'a, T> {
    q: Stack<'a, T>,
    k: Stack<'a, T>,
    v: Stack<'a, T>,
    /// Heads of all sequences.
    pairs: usize,
}

impl<'a, T: Real> Sides<'a, T> {
    fn new(of: [(&'a CpuStorage, &Layout); 3]) -> Candle<Self> {
        let [q, k, v] = of;
        let pairs = &q.1.dims()[..2];
        Ok(Self {
            q: Stack::new(q.0, q.1, pairs)?,
            k: Stack::new(k.0, k.1, pairs)?,
            v: Stack::new(v.0, v.1, pairs)?,
            pairs: pairs.iter().product(),
        })
    }

    /// Queries against keys.
    fn scores(&self, scale: f64) -> Scores<'_, T> {
        Scores {
            a: &self.q,
            b: &self.k,
            pairs: self.pairs,
            scale: T::of(scale),
        }
    }
}

impl Sinkhorn {
    /// Potentials of nothing, `[pairs, length]`: 0, and `-∞` for tokens that are not there.
    fn nothing<T: Real>(&self, pairs: usize, length: usize) -> Vec<T> {
        let Some(keep) = &self.keep else {
            return vec![T::zero(); pairs * length];
        };
        let heads = (pairs * length / keep.len().max(1)).max(1);
        let each = (0..pairs).flat_map(|pair| &keep[pair / heads * length..][..length]);
        each.map(|keep| match keep {
            0 => T::NEG_INFINITY,
            _ => T::zero(),
        })
        .collect()
    }

    /// The potentials of every iteration, one behind the other, and the result.
    fn forward<T: Real>(&self, sides: &Sides<T>) -> (Vec<T>, Vec<T>) {
        let scores = sides.scores(self.scale);
        let nothing = self.nothing::<T>(sides.pairs, sides.q.rows);
        let mut all: Vec<T> = Vec::with_capacity(self.iterations * nothing.len());
        for iteration in 0..self.iterations {
            let before = all.len().checked_sub(nothing.len());
            let before = before.map_or(&nothing[..], |start| &all[start..]);
            let of = scores.normalising(iteration);
            let found = potentials(of, before, &nothing);
            all.extend(found);
        }
        let steps = Steps {
            potentials: &all,
            nothing: &nothing,
        };
        let y = mixed(scores, steps.addends(self.iterations - 1), &sides.v);
        (all, y)
    }

    fn backward<T: Real>(
        &self,
        sides: &Sides<T>,
        potentials: &[T],
        [y, gradient]: [&[T]; 2],
    ) -> [Vec<T>; 3] {
        let scores = sides.scores(self.scale);
        let (rows, width) = (sides.q.rows, sides.v.columns);
        let nothing = self.nothing::<T>(sides.pairs, rows);
        let steps = Steps {
            potentials,
            nothing: &nothing,
        };
        let d = Stack::packed(gradient, [sides.pairs, rows, width]);
        let [f, g] = steps.addends(self.iterations - 1);
        let dv = mixed(scores.turned(), [g, f], &d);
        let last = [
            of_rows(gradient, &Stack::packed(y, [sides.pairs, rows, width])),
            of_rows(&dv, &sides.v),
        ];
        let slopes = self.of_potentials(scores, &steps, last);
        let each = slopes.iter().enumerate().map(|(iteration, slopes)| Step {
            of_rows: iteration.is_multiple_of(2),
            addends: steps.addends(iteration),
            slopes,
        });
        let [dq, dk] = of_scores(scores, &each.collect::<Vec<_>>(), [&d, &sides.v]);
        [dq, dk, dv]
    }

    /// `∂h` of every iteration, for those of the last potentials of rows and of columns in `A`.
    fn of_potentials<T: Real>(
        &self,
        scores: Scores<T>,
        steps: &Steps<T>,
        [of_rows, of_columns]: [Vec<T>; 2],
    ) -> Vec<Vec<T>> {
        let count = steps.nothing.len();
        let (mut next, mut before) = match self.iterations % 2 {
            1 => (of_rows, of_columns),
            _ => (of_columns, of_rows),
        };
        let mut all = Vec::with_capacity(self.iterations);
        for iteration in (1..self.iterations).rev() {
            let [rows, columns] = steps.addends(iteration);
            let (of, addends) = match iteration % 2 {
                0 => (scores.turned(), [columns, rows]),
                _ => (scores, [rows, columns]),
            };
            let given = Stack::packed(&next, [of.pairs, count / of.pairs.max(1), 1]);
            let taken = mixed(of, addends, &given);
            for (before, taken) in before.iter_mut().zip(taken) {
                *before -= taken;
            }
            all.push(std::mem::replace(&mut next, before));
            before = vec![T::zero(); count];
        }
        all.push(next);
        all.reverse();
        all
    }
}

/// Potentials of all iterations.
struct Steps<'a, T> {
    potentials: &'a [T],
    /// Those before the first.
    nothing: &'a [T],
}

impl<T> Steps<'_, T> {
    /// What an iteration leaves scores with: potentials of rows and of columns.
    fn addends(&self, iteration: usize) -> [&[T]; 2] {
        let count = self.nothing.len();
        let of = |iteration: usize| &self.potentials[iteration * count..(iteration + 1) * count];
        let before = iteration.checked_sub(1).map_or(self.nothing, of);
        match iteration % 2 {
            0 => [of(iteration), before],
            _ => [before, of(iteration)],
        }
    }
}

/// `x_i · y_i` of all rows of all pairs, where those of `x` lie in order.
fn of_rows<T: Real>(x: &[T], y: &Stack<T>) -> Vec<T> {
    let mut products = vec![T::zero(); y.starts.len() * y.rows];
    let width = y.columns;
    host::for_rows(
        &mut products,
        1,
        width,
        #[inline(always)]
        |row, product| {
            let y_row = y
                .matrix(row / y.rows)
                .part_of_rows(&(row % y.rows..row % y.rows + 1));
            let x = &x[row * width..][..width];
            product[0] = match y_row.column_stride {
                1 => simd::dot(x, &y_row.data[..width]),
                step => {
                    let each = x.iter().enumerate();
                    each.map(|(at, x)| *x * y_row.data[at * step]).sum()
                }
            };
        },
    );
    products
}

impl CustomOp3 for Sinkhorn {
    fn name(&self) -> &'static str {
        "sinkhorn attention"
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
        by_dtype!(host::dtype(q), T => {
            let sides = Sides::<T>::new([(q, q_layout), (k, k_layout), (v, v_layout)])?;
            let (potentials, y) = self.forward(&sides);
            let dims = [self.iterations, sides.pairs * sides.q.rows];
            // A second forward of the same operation would give the same numbers.
            let _ = self.potentials.set(host::tensor(potentials, &dims)?);
            Ok((T::to_cpu_storage_owned(y), v_layout.shape().clone()))
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
        let Some(potentials) = self.potentials.get() else {
            candle_core::bail!("sinkhorn attention: backward without forward")
        };
        let hosts = [q, k, v, potentials, y, gradient].map(Host::new);
        let [q_host, k_host, v_host, potentials, y, gradient] = &hosts;
        by_dtype!(q.dtype(), T => {
            let sides = Sides::<T>::new([
                (q_host.storage()?, q_host.layout),
                (k_host.storage()?, k_host.layout),
                (v_host.storage()?, v_host.layout),
            ])?;
            let (y, gradient) = (y.ordered::<T>()?, gradient.ordered::<T>()?);
            let potentials = potentials.ordered::<T>()?;
            let [dq, dk, dv] = self.backward(&sides, &potentials, [&y, &gradient]);
            let slopes = |of: &Tensor, values: Vec<T>| host::tensor(values, of.dims()).map(Some);
            Ok((slopes(q, dq)?, slopes(k, dk)?, slopes(v, dv)?))
        })
    }
}

#[cfg(test)]
mod tests;
