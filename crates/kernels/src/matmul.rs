//! Products of stacks of matrices, `Y = A B` for each pair of them.
//!
//! Operands are read where they lie, transposed, broadcast or with gaps. Threads share out the
//! pairs where there are enough of them, and the rows of each product otherwise. The backward pass
//! is `∂A = ∂Y Bᵀ`, `∂B = Aᵀ ∂Y`; an operand that several pairs have in common gets their sum
//! without a tensor that holds one for each.

use crate::backward::Apply;
use crate::host::{self, Host, Shared, by_dtype, fused};
use crate::product::{Into, Threads, multiply};
use crate::simd::Real;
use crate::stack::{Stack, places};
use crate::{Error, Result, Tensor};
use candle_core::{CpuStorage, CustomOp2, Layout, Shape};

type Candle<T> = candle_core::Result<T>;

/// `a b` for `a` `[.., rows, inner]` and `b` `[.., inner, columns]`; the dimensions before the last
/// two are broadcast against each other.
///
/// # Errors
/// When the shapes do not fit each other.
///
/// ```
/// use lapidary_kernels::{DType, Device, Tensor, matmul};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let heads = Tensor::ones((2, 4, 10, 8), DType::F32, &Device::Cpu)?;
/// let scores = matmul(&heads, &heads.transpose(2, 3)?)?;
/// assert_eq!(scores.dims(), [2, 4, 10, 10]);
/// let projection = Tensor::ones((3, 10), DType::F32, &Device::Cpu)?;
/// assert_eq!(matmul(&projection, &heads)?.dims(), [2, 4, 3, 8]);
/// # Ok(())
/// # }
/// ```
pub fn matmul(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let Some(pairs) = pairs(a.dims(), b.dims()) else {
        return Err(Error::argument(
            "matmul",
            "b",
            b.dims(),
            format!("[.., columns of a, any] for a of {:?}", a.dims()),
        ));
    };
    if fused(&[a, b]) {
        return Ok(a.apply2(b, Product { pairs })?);
    }
    Ok(a.contiguous()?.broadcast_matmul(&b.contiguous()?)?)
}

/// The dimensions of the stack of products, where `a` and `b` fit each other.
fn pairs(a: &[usize], b: &[usize]) -> Option<Vec<usize>> {
    let ([of_a @ .., _, inner], [of_b @ .., other, _]) = (a, b) else {
        return None;
    };
    if inner != other {
        return None;
    }
    let rank = of_a.len().max(of_b.len());
    let from_right = |dims: &[usize], at: usize| dims.iter().rev().nth(at).copied().unwrap_or(1);
    (0..rank)
        .rev()
        .map(|at| match (from_right(of_a, at), from_right(of_b, at)) {
            (one, other) if one == other || other == 1 => Some(one),
            (1, other) => Some(other),
            _ => None,
        })
        .collect()
}

/// For each matrix of an operand, in order, the pairs that have it.
fn sharers(operand: &Tensor, pairs: &[usize]) -> Candle<Vec<Vec<usize>>> {
    let ordered = Layout::contiguous(operand.shape());
    let size = operand
        .dims()
        .iter()
        .rev()
        .take(2)
        .product::<usize>()
        .max(1);
    let mut sharers = vec![Vec::new(); operand.elem_count() / size];
    for (pair, place) in places(&ordered, pairs)?.into_iter().enumerate() {
        if let Some(matrix) = sharers.get_mut(place / size) {
            matrix.push(pair);
        }
    }
    Ok(sharers)
}

/// The sums `Σ_pair A B` over each of `groups`, packed one after the other.
fn products<T: Real>(a: &Stack<T>, b: &Stack<T>, groups: &[Vec<usize>]) -> Vec<T> {
    let (rows, inner, columns) = (a.rows, a.columns, b.columns);
    let size = rows * columns;
    let mut result = host::unwritten::<T>(groups.len() * size);
    if size == 0 {
        return result;
    }
    let sum = |group: &[usize], result: &mut [T], threads| {
        if group.is_empty() || inner == 0 {
            result.fill(T::zero());
            return;
        }
        for (count, &pair) in group.iter().enumerate() {
            let into = if count == 0 { Into::Replace } else { Into::Add };
            let (a, b) = (a.matrix(pair), b.matrix(pair));
            multiply(result, columns, into, T::one(), a, b, threads);
        }
    };
    // Enough of them keep every thread busy without help from the others.
    if groups.len() >= 2 * rayon::current_num_threads() {
        let shared = Shared::new(&mut result);
        let members = groups.first().map_or(1, Vec::len);
        let work = (size * inner / 8 * members).max(1);
        host::share(groups.len(), work, |range| {
            for index in range {
                // SAFETY: each group owns its part.
                let part = unsafe { shared.part(index * size, size) };
                sum(&groups[index], part, Threads::One);
            }
        });
    } else {
        for (group, result) in groups.iter().zip(result.chunks_exact_mut(size)) {
            sum(group, result, Threads::All);
        }
    }
    result
}

struct Product {
    /// Dimensions of the stack of pairs.
    pairs: Vec<usize>,
}

impl Product {
    fn forward<T: Real>(
        &self,
        a: (&CpuStorage, &Layout),
        b: (&CpuStorage, &Layout),
    ) -> Candle<(CpuStorage, Shape)> {
        let a = Stack::<T>::new(a.0, a.1, &self.pairs)?;
        let b = Stack::<T>::new(b.0, b.1, &self.pairs)?;
        let each: Vec<Vec<usize>> = (0..a.starts.len()).map(|pair| vec![pair]).collect();
        let dims = [&self.pairs[..], &[a.rows, b.columns]].concat();
        Ok((
            T::to_cpu_storage_owned(products(&a, &b, &each)),
            Shape::from(dims),
        ))
    }

    fn backward<T: Real>(
        &self,
        a: &Tensor,
        b: &Tensor,
        gradient: &Tensor,
    ) -> Candle<(Option<Tensor>, Option<Tensor>)> {
        let hosts = [Host::new(a), Host::new(b), Host::new(gradient)];
        let stack = |of: usize| {
            let host = &hosts[of];
            Stack::<T>::new(host.storage()?, host.layout, &self.pairs)
        };
        let sums = |of: &Tensor, x: Stack<T>, y: Stack<T>| {
            host::tensor(products(&x, &y, &sharers(of, &self.pairs)?), of.dims())
        };
        let da = match a.track_op() {
            true => Some(sums(a, stack(2)?, stack(1)?.transposed())?),
            false => None,
        };
        let db = match b.track_op() {
            true => Some(sums(b, stack(0)?.transposed(), stack(2)?)?),
            false => None,
        };
        Ok((da, db))
    }
}

impl CustomOp2 for Product {
    fn name(&self) -> &'static str {
        "matmul"
    }

    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        a_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> Candle<(CpuStorage, Shape)> {
        by_dtype!(host::dtype(a), T => self.forward::<T>((a, a_layout), (b, b_layout)))
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Candle<(Option<Tensor>, Option<Tensor>)> {
        by_dtype!(a.dtype(), T => self.backward::<T>(a, b, gradient))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;
    use crate::check::{difference, gradient_error};
    use crate::test_data::{arange, compare};
    use proptest::prelude::*;

    fn plain(a: &Tensor, b: &Tensor) -> Tensor {
        a.contiguous()
            .unwrap()
            .broadcast_matmul(&b.contiguous().unwrap())
            .unwrap()
    }

    #[test]
    fn equals_candle_on_views_and_broadcast_stacks() {
        compare(1e-5, |dtype| {
            let a = arange(&[2, 7, 3, 40], 1.0, dtype).transpose(1, 2).unwrap();
            let b = arange(&[2, 3, 50, 40], 2.0, dtype).transpose(2, 3).unwrap();
            (matmul(&a, &b).unwrap(), plain(&a, &b))
        });
        for [a, b] in [
            [vec![5, 9], vec![2, 3, 9, 4]],
            [vec![2, 1, 20, 9], vec![3, 9, 33]],
            [vec![3, 0, 9], vec![3, 9, 4]],
            [vec![3, 4, 0], vec![3, 0, 4]],
        ] {
            compare(1e-5, |dtype| {
                let (a, b) = (arange(&a, 1.0, dtype), arange(&b, 2.0, dtype));
                (matmul(&a, &b).unwrap(), plain(&a, &b))
            });
        }
    }

    #[test]
    fn gradients() {
        let product = |x: &[Tensor]| matmul(&x[0], &x[1]);
        for [a, b] in [
            [vec![2, 3, 4], vec![2, 4, 5]],
            [vec![3, 4], vec![2, 2, 4, 2]],
            [vec![2, 2, 3, 4], vec![2, 1, 4, 2]],
        ] {
            let arguments = [arange(&a, 1.0, DType::F64), arange(&b, 2.0, DType::F64)];
            assert!(gradient_error(product, &arguments).unwrap() < 1e-8);
        }
        let views = |x: &[Tensor]| matmul(&x[0].transpose(0, 1)?, &x[1].t()?);
        let arguments = [&[3, 2, 4], &[2, 5, 4]].map(|dims| arange(dims, 1.0, DType::F64));
        assert!(gradient_error(views, &arguments).unwrap() < 1e-8);
    }

    #[test]
    fn does_not_depend_on_the_number_of_threads() {
        let a = arange(&[5, 70, 64], 1.0, DType::F32);
        let b = arange(&[5, 64, 90], 2.0, DType::F32);
        let with = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
            pool.build().unwrap().install(|| matmul(&a, &b).unwrap())
        };
        let one = with(1);
        for threads in [2, 4, 7] {
            assert_eq!(difference(&with(threads), &one).unwrap(), 0.0);
        }
    }

    #[test]
    fn wrong_shapes_are_named() {
        let [a, b] = [[2, 3, 4], [2, 3, 4]].map(|dims| arange(&dims, 1.0, DType::F32));
        let message = matmul(&a, &b).unwrap_err().to_string();
        assert!(message.contains("matmul") && message.contains("[2, 3, 4]"));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn any_shape(stack in 1usize..6, rows in 1usize..40, inner in 1usize..90, columns in 1usize..90) {
            let a = arange(&[stack, rows, inner], 1.0, DType::F32);
            let b = arange(&[stack, inner, columns], 2.0, DType::F32);
            let error = difference(&matmul(&a, &b).unwrap(), &plain(&a, &b)).unwrap();
            prop_assert!(error < 1e-3);
        }
    }
}
