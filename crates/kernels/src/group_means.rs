//! Means of the rows of each group of a sequence, every row read once.
//!
//! ```text
//! y_g = Σ_{i ∈ g} x_i / |g|,   ∂x_i = ∂y_{g(i)} / |g(i)|
//! ```

use crate::host::{self, Host, Rows, Shared, by_dtype, fused};
use crate::simd::{self, Real};
use crate::{Error, Result, Tensor, naive};
use candle_core::{CpuStorage, CustomOp1, Layout, Shape, WithDType};

type Candle<T> = candle_core::Result<T>;

/// Which rows of each sequence belong together: all heads of a sequence are divided alike.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Groups {
    count: usize,
    length: usize,
    /// The group of each row, `[batch, length]`.
    of: Vec<Option<usize>>,
    /// Rows of each group, `[batch, count]`.
    sizes: Vec<usize>,
}

impl Groups {
    /// `count` groups in every sequence of `length` rows, by the group of each row `[batch, length]`;
    /// rows in none count nowhere.
    ///
    /// # Errors
    /// When there are no whole sequences of them, or a group is not below `count`.
    pub fn new(of: Vec<Option<usize>>, length: usize, count: usize) -> Result<Self> {
        let batch = of.len() / length.max(1);
        if batch * length != of.len() {
            let expected = format!("a multiple of {length}");
            return Err(Error::argument(
                "groups",
                "length of of",
                of.len(),
                expected,
            ));
        }
        let mut sizes = vec![0; batch * count];
        for (at, &group) in of.iter().enumerate() {
            let Some(group) = group else { continue };
            if group >= count {
                let expected = format!("below {count}");
                return Err(Error::argument("groups", "a group", group, expected));
            }
            sizes[at / length * count + group] += 1;
        }
        Ok(Self {
            count,
            length,
            of,
            sizes,
        })
    }

    /// Rows of each group, `[batch, count]`.
    pub fn sizes(&self) -> &[usize] {
        &self.sizes
    }

    /// `(row, group, share)` of the rows of a sequence that are in a group, where the share is one over the
    /// group's rows.
    #[inline(always)]
    pub(crate) fn shares(&self, batch: usize) -> impl Iterator<Item = (usize, usize, f64)> {
        let of = &self.of[batch * self.length..(batch + 1) * self.length];
        let sizes = &self.sizes[batch * self.count..(batch + 1) * self.count];
        let rows = of.iter().enumerate();
        rows.filter_map(move |(row, group)| {
            let group = (*group)?;
            Some((row, group, 1.0 / sizes[group] as f64))
        })
    }

    /// Groups of a sequence.
    pub(crate) fn count(&self) -> usize {
        self.count
    }
}

/// The mean of each group of rows, `[batch, heads, group, width]`, of `x` `[batch, heads, length, width]`;
/// that of an empty group is zero.
///
/// # Errors
/// When the groups are not those of such sequences.
///
/// ```
/// use lapidary_kernels::{Device, Groups, Tensor, group_means};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let x = Tensor::new(&[[[[1f32], [3.0], [10.0]]]], &Device::Cpu)?;
/// let groups = Groups::new(vec![Some(0), Some(0), Some(1)], 3, 2)?;
/// let means = group_means(&x, &groups)?.flatten_all()?.to_vec1::<f32>()?;
/// assert_eq!(means, [2.0, 10.0]);
/// # Ok(())
/// # }
/// ```
pub fn group_means(x: &Tensor, groups: &Groups) -> Result<Tensor> {
    let (batch, heads, length, width) = x.dims4()?;
    if length != groups.length || batch * length != groups.of.len() {
        let expected = format!(
            "[batch, heads, {}, width] of {} rows in all sequences",
            groups.length,
            groups.of.len()
        );
        return Err(Error::argument("group means", "x", x.dims(), expected));
    }
    if !fused(&[x]) {
        return naive::group_means(x, groups);
    }
    let operation = Means {
        groups: groups.clone(),
        batch,
        heads,
        width,
    };
    Ok(x.apply_op1(operation)?)
}

struct Means {
    groups: Groups,
    batch: usize,
    heads: usize,
    width: usize,
}

impl Means {
    /// `work` on what is made for each head of each sequence, `each` numbers, in parallel.
    fn heads<T: Real>(&self, each: usize, work: impl Fn(usize, &mut [T]) + Sync) -> Vec<T> {
        let mut result = host::unwritten::<T>(self.batch * self.heads * each);
        let shared = Shared::new(&mut result);
        let cost = self.groups.length * self.width;
        host::share(self.batch * self.heads, cost, |range| {
            for head in range {
                // SAFETY: heads are disjoint.
                work(head, unsafe { shared.part(head * each, each) });
            }
        });
        result
    }

    fn forward<T: Real>(&self, x: &Rows<T>) -> Vec<T> {
        let (length, width) = (self.groups.length, self.width);
        self.heads(self.groups.count * width, |head, means| {
            means.fill(T::zero());
            simd::vectorised(
                #[inline(always)]
                || {
                    for (row, group, share) in self.groups.shares(head / self.heads) {
                        let mean = &mut means[group * width..(group + 1) * width];
                        simd::add_scaled(mean, x.row(head * length + row), T::of(share));
                    }
                },
            );
        })
    }

    fn backward<T: Real>(&self, gradient: &Rows<T>) -> Vec<T> {
        let (count, width) = (self.groups.count, self.width);
        self.heads(self.groups.length * width, |head, slopes| {
            slopes.fill(T::zero());
            simd::vectorised(
                #[inline(always)]
                || {
                    for (row, group, share) in self.groups.shares(head / self.heads) {
                        let slope = &mut slopes[row * width..(row + 1) * width];
                        simd::add_scaled(slope, gradient.row(head * count + group), T::of(share));
                    }
                },
            );
        })
    }
}

impl CustomOp1 for Means {
    fn name(&self) -> &'static str {
        "group means"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Candle<(CpuStorage, Shape)> {
        by_dtype!(host::dtype(x), T => {
            let means = self.forward(&Rows::<T>::new(x, layout)?);
            let shape = (self.batch, self.heads, self.groups.count, self.width);
            Ok((T::to_cpu_storage_owned(means), Shape::from(shape)))
        })
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, gradient: &Tensor) -> Candle<Option<Tensor>> {
        let gradient = Host::new(gradient);
        by_dtype!(x.dtype(), T => {
            let rows = Rows::<T>::new(gradient.storage()?, gradient.layout)?;
            Ok(Some(host::tensor(self.backward(&rows), x.dims())?))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;
    use crate::check::gradient_error;
    use crate::test_data::{arange, compare};

    /// Two sequences of seven rows in three groups: one of them empty in the second.
    fn groups() -> Groups {
        let first = [0, 0, 1, 2, 2, 2, 1].map(Some);
        let second = [Some(2), None, Some(0), Some(0), None, Some(2), Some(2)];
        Groups::new([first, second].concat(), 7, 3).unwrap()
    }

    #[test]
    fn equal_shares_laid_out() {
        compare(1e-6, |dtype| {
            let x = arange(&[2, 7, 3, 5], 1.0, dtype).transpose(1, 2).unwrap();
            (
                group_means(&x, &groups()).unwrap(),
                naive::group_means(&x, &groups()).unwrap(),
            )
        });
        assert_eq!(groups().sizes(), [2, 2, 3, 2, 0, 3]);
    }

    #[test]
    fn gradients_equal_finite_differences() {
        let x = arange(&[2, 2, 7, 3], 1.0, DType::F64);
        assert!(gradient_error(|x| group_means(&x[0], &groups()), &[x]).unwrap() < 1e-8);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        assert!(Groups::new(vec![Some(0); 7], 3, 1).is_err());
        assert!(Groups::new(vec![Some(1)], 1, 1).is_err());
        let x = arange(&[1, 2, 7, 3], 1.0, DType::F32);
        assert!(group_means(&x, &groups()).is_err());
    }
}
