//! Linear attention under a function of the distance in a tree (Choromanski et al., Fast Tree-Field Integrators,
//! arXiv 2406.15881).
//!
//! ```text
//! y_i = Σ_j f(dist(i, j)) (q_i · k_j) (v_j, 1)
//! ```
//!
//! All pairs of tokens come in pieces: leaves, whose tokens meet pair by pair, and cuts, where what is on one side meets
//! what is on the other at a distance that is a sum of two. There `f` between a few distances of either side is enough
//! where it is smooth, and tokens meet by way of sums of outer products at those, `2 · nodes · features · width` for
//! each token; elsewhere they meet pair by pair as well, whichever is less. No outer product is held but those at the
//! nodes of one block, and nothing is kept for the gradient, which makes the sums again.
//!
//! The gradient of `f` comes as that of its table, at the distances that it was read at. Where it was read off a few, it
//! is theirs alone: right for every change of `f` that is read off them as well, which those of
//! [`TreeMask::directions`] are seen to be.

mod features;
mod head;
mod laid_out;
mod pairs;
mod plan;
mod sums;
#[cfg(test)]
mod tests;

pub use features::TreeFeatures;
pub use pairs::{TreePairs, TreePiece, TreeSide};

use crate::backward::Apply;
use crate::fourth_argument::Fourth;
use crate::host::{self, Host, Shared, by_dtype, fused};
use crate::product::Matrix;
use crate::simd::Real;
use crate::stack::Stack;
use crate::{DType, Error, Result, Tensor, naive};
use candle_core::{CpuStorage, CustomOp3, Layout, Shape, WithDType};
use head::{Head, Slopes};
use plan::{Plan, Tables, Work};
use std::sync::Arc;

type Candle<T> = candle_core::Result<T>;

const NAME: &str = "tree attention";

/// Heads, or shares of their work where there are fewer, that are worked on at once at least.
const SHARES: usize = 4;

/// A function of the distance of two tokens.
#[derive(Clone, Debug)]
pub struct TreeMask {
    /// How far tokens are apart.
    pub pairs: Arc<TreePairs>,
    /// `f` by distance, `[1 or heads, distances]`, in `f64`; differentiated.
    pub values: Tensor,
    /// What `values` may be changed by, `[1 or heads, any, distances]`, in `f64`: their derivatives with respect to
    /// whatever they are made of. Not differentiated.
    pub directions: Tensor,
}

/// `Σ_j f(dist(i, j)) (φ(q_i) · φ(k_j)) (v_j, 1)`, `[batch, heads, tokens, width + 1]`: sums of values, the sum of their
/// weights behind them, for `q` and `k` `[batch, heads, tokens, features]` and `v` `[batch, heads, tokens, width]`. Of
/// features that are not given only those of the heads that are worked on are held.
///
/// In `f32` a mask is read to `10⁻⁷` of its largest value in a block, in `f64` to `10⁻¹³`.
///
/// # Errors
/// When shapes do not fit each other.
///
/// ```
/// use lapidary_kernels::{DType, Device, Tensor, TreeFeatures, TreeMask, TreePairs, TreePiece, tree_attention};
/// use std::sync::Arc;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// // Three tokens in a row.
/// let leaf = TreePiece::Leaf { tokens: vec![0, 1, 2], distances: None };
/// let mask = TreeMask {
///     pairs: Arc::new(TreePairs::new(3, vec![leaf], vec![])?),
///     values: Tensor::new(&[[1f64, 0.5, 0.25]], &Device::Cpu)?,
///     directions: Tensor::zeros((1, 0, 3), DType::F64, &Device::Cpu)?,
/// };
/// let one = Tensor::ones((1, 1, 3, 1), DType::F32, &Device::Cpu)?;
/// let y = tree_attention([&one; 3], TreeFeatures::Given, &mask)?;
/// let weights = y.narrow(3, 1, 1)?.flatten_all()?.to_vec1::<f32>()?;
/// assert_eq!(weights, [1.75, 2.0, 1.75]);
/// # Ok(())
/// # }
/// ```
pub fn tree_attention(
    [q, k, v]: [&Tensor; 3],
    phi: TreeFeatures,
    mask: &TreeMask,
) -> Result<Tensor> {
    let (batch, heads, tokens, features) = q.dims4()?;
    let width = v.dims4()?.3;
    let refuse = |name: &'static str, found: &Tensor, expected: String| {
        Err(Error::argument(NAME, name, found.dims(), expected))
    };
    if tokens != mask.pairs.tokens() {
        let expected = format!("[batch, heads, {}, features]", mask.pairs.tokens());
        return refuse("q", q, expected);
    }
    if k.dims() != q.dims() {
        return refuse("k", k, format!("{:?}", q.dims()));
    }
    if v.dims() != [batch, heads, tokens, width] {
        return refuse("v", v, format!("[{batch}, {heads}, {tokens}, width]"));
    }
    let rows = mask.rows()?;
    if rows != 1 && rows != heads {
        let expected = format!("[1 or {heads}, distances]");
        return refuse("values", &mask.values, expected);
    }
    let is_empty = q.elem_count() * v.elem_count() == 0;
    if is_empty || !fused(&[q, k, v]) || !fused(&[&mask.values]) {
        return naive::tree_attention([q, k, v], phi, mask);
    }
    let (values, learned) = match q.track_op() {
        true => {
            let (values, fourth) = Fourth::riding_on(&mask.values, q)?;
            (values, Some(fourth))
        }
        false => (mask.values.clone(), None),
    };
    let operation = TreeAttention {
        q: q.detach(),
        phi,
        learned,
        masks_learn: mask.values.track_op(),
        pairs: mask.pairs.clone(),
        directions: mask.directions.flatten_all()?.to_vec1()?,
        heads,
        rows,
        sizes: [features, width],
    };
    Ok(k.apply3(v, &values, operation)?)
}

/// Multiplications and additions of [`tree_attention`] for all heads of one sequence, `width` that of the values with
/// the weights' own sums beside them.
///
/// # Errors
/// When shapes do not fit each other.
pub fn tree_attention_operations(
    mask: &TreeMask,
    heads: usize,
    features: usize,
    width: usize,
) -> Result<u64> {
    let rows = mask.rows()?;
    let values: Vec<f64> = mask.values.flatten_all()?.to_vec1()?;
    let each = values
        .chunks_exact(values.len() / rows.max(1))
        .map(|values| {
            let tables = Tables {
                mask: values,
                directions: Vec::new(),
                tolerance: tolerance(DType::F32),
            };
            Plan::<f32>::new(&mask.pairs, &tables, [features, width]).operations()
        });
    let all: u64 = each.sum();
    Ok(all * heads as u64 / rows.max(1) as u64)
}

/// How far from a table, as a part of its largest number, what is read may be.
fn tolerance(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => 1e-13,
        _ => 1e-7,
    }
}

impl TreeMask {
    /// How many masks there are.
    fn rows(&self) -> Result<usize> {
        let (rows, distances) = self.values.dims2()?;
        let refuse = |name: &'static str, found: &Tensor, expected: String| {
            Err(Error::argument(NAME, name, found.dims(), expected))
        };
        let least = self.pairs.distances();
        if rows == 0 || distances < least || self.values.dtype() != DType::F64 {
            let expected = format!("[1 or heads, {least} or more] in f64");
            return refuse("values", &self.values, expected);
        }
        match self.directions.dims() {
            [r, _, d] if [*r, *d] == [rows, distances] && self.directions.dtype() == DType::F64 => {
                Ok(rows)
            }
            _ => {
                let expected = format!("[{rows}, any, {distances}] in f64");
                refuse("directions", &self.directions, expected)
            }
        }
    }
}

struct TreeAttention {
    /// Queries, beside the three arguments.
    q: Tensor,
    phi: TreeFeatures,
    /// Where their gradient goes, when it is asked for.
    learned: Option<Fourth>,
    /// Whether the masks have a gradient, and do not only carry the queries'.
    masks_learn: bool,
    pairs: Arc<TreePairs>,
    /// `[rows, any, distances]`.
    directions: Vec<f64>,
    heads: usize,
    /// Masks: 1, or one for each head.
    rows: usize,
    /// Features, and values without the weights' own sums.
    sizes: [usize; 2],
}

/// One mask, as kernels read it.
struct Prepared<T> {
    /// Mirrored about distance 0.
    values: Vec<T>,
    plan: Plan<T>,
}

impl TreeAttention {
    /// All masks, read with whatever changes them where their gradient is asked for.
    fn prepared<T: Real>(&self, values: &[f64], with_directions: bool) -> Vec<Prepared<T>> {
        let distances = values.len() / self.rows;
        let all = (self.directions.len() / self.rows).max(1);
        let mut all = self.directions.chunks_exact(all);
        let [features, width] = self.sizes;
        let each = values.chunks_exact(distances).map(|mask| {
            let directions = match (with_directions, all.next()) {
                (true, Some(directions)) => directions.chunks_exact(distances).collect(),
                _ => Vec::new(),
            };
            let tables = Tables {
                mask,
                directions,
                tolerance: tolerance(T::DTYPE),
            };
            let mirrored = mask.iter().skip(1).rev().chain(mask);
            Prepared {
                values: mirrored.map(|value| T::of(*value)).collect(),
                plan: Plan::new(&self.pairs, &tables, [features, width + 1]),
            }
        });
        each.collect()
    }

    /// Shares of the work of one head: sums of which are added up in order, however many threads there are.
    fn shares(&self, heads: usize) -> usize {
        (SHARES / heads.max(1)).max(1)
    }

    /// One head, with `rooms` for features of queries and keys that are not given.
    fn head<'a, T: Real>(
        &self,
        at: usize,
        [q, k, v]: [&'a Stack<'_, T>; 3],
        mask: &'a Prepared<T>,
        [of_queries, of_keys]: &'a mut [Vec<T>; 2],
    ) -> Head<'a, T> {
        Head {
            q: self.phi.of_head(q.matrix(at), of_queries),
            k: self.phi.of_head(k.matrix(at), of_keys),
            v: v.matrix(at),
            mask: &mask.values,
            centre: mask.values.len() / 2,
        }
    }

    fn forward<T: Real>(&self, given: [&Stack<T>; 3], mask: &[f64]) -> Vec<T> {
        let masks = self.prepared::<T>(mask, false);
        let heads = given[0].starts.len();
        let shares = self.shares(heads);
        let work = divided(&masks, shares);
        let size = self.pairs.tokens() * (self.sizes[1] + 1);
        let mut all = vec![T::zero(); heads * shares * size];
        let shared = Shared::new(&mut all);
        host::share(heads * shares, self.cost(&masks, shares), |items| {
            let mut rooms = [Vec::new(), Vec::new()];
            for item in items {
                let (at, share) = (item / shares, item % shares);
                let row = at % self.heads % self.rows;
                let head = self.head(at, given, &masks[row], &mut rooms);
                // SAFETY: each share of each head is one item.
                let y = unsafe { shared.part(item * size, size) };
                head.forward(&self.pairs, &work[row][share], y);
                if share == 0 {
                    head.without(self.pairs.again(), y);
                }
            }
        });
        added_up(all, shares, size)
    }

    /// Gradients of queries, keys and values, and the masks, where those are asked for.
    fn backward<T: Real>(
        &self,
        (given, gradient): ([&Stack<T>; 3], &Stack<T>),
        mask: &[f64],
        of_masks: bool,
    ) -> ([Vec<T>; 3], Vec<f64>) {
        let masks = self.prepared::<T>(mask, of_masks);
        let heads = gradient.starts.len();
        let shares = self.shares(heads);
        let work = divided(&masks, shares);
        let tokens = self.pairs.tokens();
        let [of_features, of_values] = self.sizes.map(|width| tokens * width);
        let of_mask = 2 * (mask.len() / self.rows) - 1;
        let mut q_slopes = vec![T::zero(); heads * shares * of_features];
        let mut k_slopes = q_slopes.clone();
        let mut v_slopes = vec![T::zero(); heads * shares * of_values];
        let mut mask_slopes = vec![T::zero(); heads * shares * of_mask];
        let shared = (
            Shared::new(&mut q_slopes),
            Shared::new(&mut k_slopes),
            Shared::new(&mut v_slopes),
            Shared::new(&mut mask_slopes),
        );
        host::share(heads * shares, 3 * self.cost(&masks, shares), |items| {
            let mut rooms = [Vec::new(), Vec::new()];
            for item in items {
                let (at, share) = (item / shares, item % shares);
                let row = at % self.heads % self.rows;
                let head = self.head(at, given, &masks[row], &mut rooms);
                let gradient: Matrix<'_, T> = gradient.matrix(at);
                // SAFETY: each share of each head is one item.
                let mut slopes = unsafe {
                    Slopes {
                        q: shared.0.part(item * of_features, of_features),
                        k: shared.1.part(item * of_features, of_features),
                        v: shared.2.part(item * of_values, of_values),
                        mask: shared.3.part(item * of_mask, of_mask),
                    }
                };
                head.backward(&self.pairs, &work[row][share], &gradient, &mut slopes);
                if share == 0 {
                    head.without_slopes(self.pairs.again(), &gradient, &mut slopes);
                }
            }
        });
        let mut of_table = vec![0.0; mask.len()];
        let distances = mask.len() / self.rows;
        for (item, mirrored) in mask_slopes.chunks_exact(of_mask).enumerate() {
            let row = item / shares % self.heads % self.rows;
            let table = &mut of_table[row * distances..(row + 1) * distances];
            for (place, slope) in mirrored.iter().enumerate() {
                table[place.abs_diff(distances - 1)] += slope.to_f64();
            }
        }
        let mut slopes = [
            added_up(q_slopes, shares, of_features),
            added_up(k_slopes, shares, of_features),
            added_up(v_slopes, shares, of_values),
        ];
        for (slopes, given) in slopes.iter_mut().zip(given).take(2) {
            self.phi.chain(slopes, given);
        }
        (slopes, of_table)
    }

    /// About how long a share takes.
    fn cost<T: Real>(&self, masks: &[Prepared<T>], shares: usize) -> usize {
        let all: u64 = masks.iter().map(|mask| mask.plan.operations()).sum();
        (all as usize / masks.len().max(1) / shares / 16).max(1)
    }
}

/// The work of each mask in shares.
fn divided<T: Real>(masks: &[Prepared<T>], shares: usize) -> Vec<Vec<Vec<&Work<T>>>> {
    masks.iter().map(|mask| mask.plan.shares(shares)).collect()
}

/// Sums `[.., size]` of numbers `[.., shares, size]`, in place.
fn added_up<T: Real>(mut all: Vec<T>, shares: usize, size: usize) -> Vec<T> {
    if shares == 1 {
        return all;
    }
    let count = all.len() / (shares * size).max(1);
    for at in 0..count {
        // Where sums go to, they have been read already.
        all.copy_within(at * shares * size..(at * shares + 1) * size, at * size);
        for share in at * shares + 1..(at + 1) * shares {
            let (sums, rest) = all.split_at_mut(share * size);
            let sums = &mut sums[at * size..(at + 1) * size];
            for (sum, number) in sums.iter_mut().zip(&rest[..size]) {
                *sum += *number;
            }
        }
    }
    all.truncate(count * size);
    all.shrink_to_fit();
    all
}

/// The matrices of all heads of a tensor `[batch, heads, ..]`.
fn stack<'a, T: Real>(storage: &'a CpuStorage, layout: &Layout) -> Candle<Stack<'a, T>> {
    Stack::new(storage, layout, &layout.dims()[..2])
}

impl CustomOp3 for TreeAttention {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(
        &self,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
        mask: &CpuStorage,
        mask_layout: &Layout,
    ) -> Candle<(CpuStorage, Shape)> {
        let mask = host::ordered::<f64>(mask, mask_layout)?;
        let q = Host::new(&self.q);
        by_dtype!(host::dtype(v), T => {
            let given = [
                &stack(q.storage()?, q.layout)?,
                &stack(k, k_layout)?,
                &stack(v, v_layout)?,
            ];
            let sums = self.forward::<T>(given, &mask);
            let (batch, heads, tokens, width) = v_layout.shape().dims4()?;
            let shape = Shape::from((batch, heads, tokens, width + 1));
            Ok((T::to_cpu_storage_owned(sums), shape))
        })
    }

    fn bwd(
        &self,
        k: &Tensor,
        v: &Tensor,
        mask: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Candle<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let hosts = [&self.q, k, v, mask, gradient].map(Host::new);
        let [q_host, k_host, v_host, mask_host, g_host] = &hosts;
        let values = mask_host.ordered::<f64>()?;
        by_dtype!(v.dtype(), T => {
            let given = [
                &stack(q_host.storage()?, q_host.layout)?,
                &stack(k_host.storage()?, k_host.layout)?,
                &stack(v_host.storage()?, v_host.layout)?,
            ];
            let gradient = stack(g_host.storage()?, g_host.layout)?;
            let ([of_q, of_k, of_v], of_mask) =
                self.backward::<T>((given, &gradient), &values, self.masks_learn);
            if let Some(learned) = &self.learned {
                learned.leave(host::tensor(of_q, self.q.dims())?);
            }
            let wanted = |of: &Tensor, slopes: Vec<T>| {
                of.track_op().then(|| host::tensor(slopes, of.dims())).transpose()
            };
            let of_mask = host::tensor(of_mask, mask.dims())?;
            Ok((wanted(k, of_k)?, wanted(v, of_v)?, Some(of_mask)))
        })
    }
}
