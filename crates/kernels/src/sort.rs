//! Sorting and selecting along the last dimension.
//!
//! The permutation is found without regard to gradients; the values are then gathered by it,
//! which carries the gradient back to where each value came from.

use crate::host::{self, Host, Shared, by_dtype, fused, rows_and_width};
use crate::simd::Real;
use crate::{Error, Result, Tensor, gather, naive};
use std::cmp::Ordering;

/// Sorts the last dimension, giving values and indices (`u32`). Ties keep their order;
/// not-a-number sorts as larger than everything.
///
/// # Errors
/// When `x` has no dimension.
pub fn sort(x: &Tensor, descending: bool) -> Result<(Tensor, Tensor)> {
    let width = last_width("sort", x)?;
    if !fused(&[x]) {
        return naive::sort(x, descending);
    }
    select(x, width, descending)
}

/// The `k` largest entries of the last dimension, largest first, with their indices (`u32`).
///
/// # Errors
/// When `k` exceeds the last dimension.
pub fn top_k(x: &Tensor, k: usize) -> Result<(Tensor, Tensor)> {
    let width = last_width("top_k", x)?;
    if k > width {
        return Err(Error::argument("top_k", "k", k, format!("at most {width}")));
    }
    if !fused(&[x]) {
        return naive::top_k(x, k);
    }
    select(x, k, true)
}

fn last_width(kernel: &'static str, x: &Tensor) -> Result<usize> {
    match x.dims().last() {
        Some(&width) => Ok(width),
        None => Err(Error::argument(kernel, "x", x.dims(), "[.., width]")),
    }
}

/// The first `k` of each row in order.
fn select(x: &Tensor, k: usize, descending: bool) -> Result<(Tensor, Tensor)> {
    let mut dims = x.dims().to_vec();
    if let Some(last) = dims.last_mut() {
        *last = k;
    }
    let read = Host::new(x);
    let indices = by_dtype!(x.dtype(), T => {
        Ok(first_indices::<T>(&read.ordered::<T>()?, x.dims(), k, descending))
    })?;
    drop(read);
    let indices = Tensor::from_vec(indices, dims, x.device())?;
    Ok((gather(x, &indices, x.rank() - 1)?, indices))
}

fn first_indices<T: Real>(x: &[T], dims: &[usize], k: usize, descending: bool) -> Vec<u32> {
    let (rows, width) = rows_and_width(dims);
    let mut indices = vec![0u32; rows * k];
    let shared = Shared::new(&mut indices);
    let work = width * (1 + width.max(1).ilog2() as usize) * 2;
    host::share(rows, work, |range| {
        let mut order: Vec<u32> = Vec::with_capacity(width);
        for row in range {
            let x = &x[row * width..][..width];
            // Ties are broken by position, which makes every order of comparison stable.
            let compare = |a: &u32, b: &u32| -> Ordering {
                let ordering = x[*a as usize].order(&x[*b as usize]);
                let ordering = if descending {
                    ordering.reverse()
                } else {
                    ordering
                };
                ordering.then(a.cmp(b))
            };
            order.clear();
            order.extend(0..width as u32);
            if k < width && k > 0 {
                order.select_nth_unstable_by(k - 1, compare);
            }
            let first = &mut order[..k];
            first.sort_unstable_by(compare);
            // SAFETY: each row is handled once.
            unsafe { shared.part(row * k, k) }.copy_from_slice(first);
        }
    });
    indices
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{difference, gradient_error};
    use crate::test_data::{arange, compare};
    use crate::{DType, Device};
    use proptest::prelude::*;

    #[test]
    fn equal_the_compositions() {
        for dims in [vec![1], vec![9], vec![3, 40], vec![2, 3, 5]] {
            for descending in [false, true] {
                compare(0.0, |dtype| {
                    let x = arange(&dims, 1.0, dtype);
                    (
                        sort(&x, descending).unwrap().0,
                        naive::sort(&x, descending).unwrap().0,
                    )
                });
                let x = arange(&dims, 1.0, DType::F32);
                let (a, b) = (
                    sort(&x, descending).unwrap().1,
                    naive::sort(&x, descending).unwrap().1,
                );
                assert_eq!(difference(&a, &b).unwrap(), 0.0);
            }
            let width = dims[dims.len() - 1];
            for k in [0, 1, width / 2, width] {
                if k > width {
                    continue;
                }
                let x = arange(&dims, 1.0, DType::F64);
                let (values, indices) = top_k(&x, k).unwrap();
                let (v, i) = naive::top_k(&x, k).unwrap();
                assert_eq!(difference(&values, &v).unwrap(), 0.0);
                assert_eq!(difference(&indices, &i).unwrap(), 0.0);
            }
        }
    }

    #[test]
    fn nothing_to_sort() {
        let x = arange(&[2, 0], 1.0, DType::F32);
        let (values, indices) = sort(&x, false).unwrap();
        assert_eq!((values.dims(), indices.dims()), (&[2, 0][..], &[2, 0][..]));
        assert_eq!(top_k(&x, 0).unwrap().0.dims(), [2, 0]);
    }

    #[test]
    fn ties_keep_their_order_and_strided_input_is_read() {
        let x = Tensor::new(&[[1f32, 2.0], [2.0, 1.0], [1.0, 2.0]], &Device::Cpu).unwrap();
        let x = x.t().unwrap();
        let (_, indices) = sort(&x, false).unwrap();
        assert_eq!(indices.to_vec2::<u32>().unwrap(), [[0, 2, 1], [1, 0, 2]]);
        let (_, indices) = top_k(&x, 2).unwrap();
        assert_eq!(indices.to_vec2::<u32>().unwrap(), [[1, 0], [0, 2]]);
        assert!(top_k(&x, 4).is_err());
    }

    #[test]
    fn gradients() {
        let x = arange(&[3, 6], 1.0, DType::F64);
        let f = |a: &[Tensor]| Ok(sort(&a[0].t()?, true)?.0);
        assert!(gradient_error(f, std::slice::from_ref(&x)).unwrap() < 1e-8);
        let f = |a: &[Tensor]| Ok(top_k(&a[0], 2)?.0);
        assert!(gradient_error(f, &[x]).unwrap() < 1e-8);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn a_permutation_in_order(values in proptest::collection::vec(-5i32..5, 1..60)) {
            let x: Vec<f32> = values.iter().map(|&v| v as f32).collect();
            let x = Tensor::new(x, &Device::Cpu).unwrap();
            let (sorted, indices) = sort(&x, false).unwrap();
            let sorted = sorted.to_vec1::<f32>().unwrap();
            prop_assert!(sorted.windows(2).all(|w| w[0] <= w[1]));
            let mut indices = indices.to_vec1::<u32>().unwrap();
            indices.sort_unstable();
            prop_assert!(indices.iter().enumerate().all(|(i, &j)| i == j as usize));
        }
    }
}
