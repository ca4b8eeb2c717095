//! The largest, the sum or the mean of some rows, feature by feature.

use crate::backward::Apply;
use crate::host::{self, Host, Rows, Shared, by_dtype, fused, rows_and_width};
use crate::simd::{self, Real};
use crate::{Error, Result, Tensor, naive};
use candle_core::{CpuStorage, CustomOp1, Layout, Shape};

type Candle<T> = candle_core::Result<T>;

/// What becomes of the rows of a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowPooling {
    /// The largest of each feature. The gradient goes to all rows that have it.
    Maximum,
    /// The sum; zeros for a list without rows.
    Sum,
    /// The mean; zeros for a list without rows.
    Mean,
}

/// `y_l = max_{r in list l} x_r`, `Σ_{r in list l} x_r` or that sum's share of one row, feature by feature: of rows
/// of `x` `[.., width]`, wherever they lie, that stand in `rows` one list behind the other, those of each list up to
/// its one of `ends`, `[lists, width]`.
///
/// # Errors
/// When `x` has no dimension, a list ends before it begins, or has no row that could be the largest, when the
/// last one does not end with `rows`, or a row is out of range.
///
/// ```
/// use lapidary_kernels::{Device, RowPooling, Tensor, pooled_rows};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let x = Tensor::new(&[[1f32, 5.0], [2.0, 0.0], [3.0, 4.0]], &Device::Cpu)?;
/// let y = pooled_rows(&x, vec![0, 1, 2, 1], vec![2, 4], RowPooling::Maximum)?;
/// assert_eq!(y.to_vec2::<f32>()?, [[2.0, 5.0], [3.0, 4.0]]);
/// # Ok(()) }
/// ```
pub fn pooled_rows(
    x: &Tensor,
    rows: Vec<u32>,
    ends: Vec<usize>,
    pooling: RowPooling,
) -> Result<Tensor> {
    let (count, _) = rows_and_width(x.dims());
    if x.rank() == 0 {
        let expected = "[.., width]";
        return Err(Error::argument("pooled rows", "x", x.dims(), expected));
    }
    Lists::new(rows, ends, pooling, count)?.of(x)
}

/// Rows of each list, one list behind the other.
#[derive(Clone, Debug)]
pub(crate) struct Lists {
    rows: Vec<u32>,
    ends: Vec<usize>,
    pooling: RowPooling,
}

impl Lists {
    /// Lists among so many rows.
    pub(crate) fn new(
        rows: Vec<u32>,
        ends: Vec<usize>,
        pooling: RowPooling,
        count: usize,
    ) -> Result<Self> {
        let refused = |argument, found: &dyn std::fmt::Debug, expected: String| {
            Err(Error::argument("pooled rows", argument, found, expected))
        };
        // Nothing is the largest of no rows.
        let least = usize::from(pooling == RowPooling::Maximum);
        let starts = std::iter::once(0).chain(ends.iter().copied());
        let rising = starts
            .zip(&ends)
            .all(|(start, end)| end.checked_sub(start).is_some_and(|rows| rows >= least));
        if !rising || ends.last().copied().unwrap_or(0) != rows.len() {
            let expected = match least {
                1 => format!("above 0, rising, the last {}", rows.len()),
                _ => format!("not falling, the last {}", rows.len()),
            };
            return refused("ends", &ends, expected);
        }
        if let Some(row) = rows.iter().find(|row| **row as usize >= count) {
            return refused("rows", row, format!("below {count}"));
        }
        Ok(Self {
            rows,
            ends,
            pooling,
        })
    }

    /// All rows.
    pub(crate) fn rows(&self) -> &[u32] {
        &self.rows
    }

    /// Where those of each list end.
    pub(crate) fn ends(&self) -> &[usize] {
        &self.ends
    }

    /// What becomes of rows of `x` that are known to be there.
    pub(crate) fn of(self, x: &Tensor) -> Result<Tensor> {
        let (count, width) = rows_and_width(x.dims());
        match fused(&[x]) {
            true => Ok(x.apply1(self)?),
            false => naive::pooled_rows(
                &x.reshape((count, width))?,
                &self.rows,
                &self.ends,
                self.pooling,
            ),
        }
    }

    fn list(&self, list: usize) -> &[u32] {
        let start = list.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.rows[start..self.ends[list]]
    }

    /// What a row counts for in its list.
    fn share<T: Real>(&self, list: usize) -> T {
        match self.pooling {
            RowPooling::Maximum | RowPooling::Sum => T::one(),
            RowPooling::Mean => T::of(1.0 / self.list(list).len() as f64),
        }
    }

    /// `y`, packed.
    pub(crate) fn forward<T: Real>(&self, x: &Rows<T>, width: usize) -> Vec<T> {
        let mut y = host::unwritten::<T>(self.ends.len() * width);
        // Lists may be of very different lengths.
        let work: Vec<usize> = self.ends.iter().map(|end| end * width).collect();
        host::for_rows_by_work(
            &mut y,
            width,
            &work,
            #[inline(always)]
            |list, y| {
                let row = |row: u32| x.row(row as usize);
                let Some((&first, rest)) = self.list(list).split_first() else {
                    return y.fill(T::zero());
                };
                y.copy_from_slice(row(first));
                match self.pooling {
                    RowPooling::Maximum => {
                        for &other in rest {
                            for (y, &x) in y.iter_mut().zip(row(other)) {
                                *y = y.larger(x);
                            }
                        }
                    }
                    RowPooling::Sum | RowPooling::Mean => {
                        for &other in rest {
                            simd::add_scaled(y, row(other), T::one());
                        }
                        let share = self.share::<T>(list);
                        y.iter_mut().for_each(|y| *y *= share);
                    }
                }
            },
        );
        y
    }

    /// The gradient of all rows, packed, added to `dx`.
    pub(crate) fn backward<T: Real>(
        &self,
        x: &Rows<T>,
        [y, gradient]: [&[T]; 2],
        width: usize,
        mut dx: Vec<T>,
    ) -> Vec<T> {
        // Columns that fill a line of the cache; threads have columns of their own, since lists may have
        // rows in common.
        const COLUMNS: usize = 16;
        let all = self.pooling != RowPooling::Maximum;
        let shared = Shared::new(&mut dx);
        let work = self.rows.len() * COLUMNS;
        host::share(width.div_ceil(COLUMNS), work, |range| {
            let columns = range.start * COLUMNS..width.min(range.end * COLUMNS);
            simd::vectorised(
                #[inline(always)]
                || {
                    for list in 0..self.ends.len() {
                        let at = list * width + columns.start..list * width + columns.end;
                        let (y, gradient) = (&y[at.clone()], &gradient[at]);
                        let share = self.share::<T>(list);
                        for &row in self.list(list) {
                            let start = row as usize * width + columns.start;
                            // SAFETY: ranges of columns are disjoint.
                            let dx = unsafe { shared.part(start, columns.len()) };
                            if all {
                                simd::add_scaled(dx, gradient, share);
                                continue;
                            }
                            let x = &x.row(row as usize)[columns.clone()];
                            for (((dx, &x), &y), &d) in dx.iter_mut().zip(x).zip(y).zip(gradient) {
                                *dx += if x == y { d } else { T::zero() };
                            }
                        }
                    }
                },
            );
        });
        dx
    }
}

impl CustomOp1 for Lists {
    fn name(&self) -> &'static str {
        "pooled rows"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Candle<(CpuStorage, Shape)> {
        use candle_core::WithDType;
        let width = layout.dims().last().copied().unwrap_or(0);
        let y = by_dtype!(host::dtype(x), T => {
            let y = self.forward(&Rows::<T>::new(x, layout)?, width);
            Ok(T::to_cpu_storage_owned(y))
        })?;
        Ok((y, Shape::from((self.ends.len(), width))))
    }

    fn bwd(&self, x: &Tensor, y: &Tensor, gradient: &Tensor) -> Candle<Option<Tensor>> {
        let width = x.dims().last().copied().unwrap_or(0);
        let hosts = [x, y, gradient].map(Host::new);
        by_dtype!(x.dtype(), T => {
            let rows = Rows::<T>::new(hosts[0].storage()?, hosts[0].layout)?;
            let [y, gradient] = [hosts[1].ordered::<T>()?, hosts[2].ordered::<T>()?];
            let start = vec![T::default(); x.elem_count()];
            let dx = self.backward(&rows, [&y, &gradient], width, start);
            host::tensor(dx, x.dims()).map(Some)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{difference, gradient_error};
    use crate::test_data::{arange, compare};
    use crate::{DType, Device, Var};

    const ALL: [RowPooling; 3] = [RowPooling::Maximum, RowPooling::Sum, RowPooling::Mean];

    /// Rows that several lists have.
    fn lists(pooling: RowPooling) -> Lists {
        Lists {
            rows: vec![0, 3, 5, 6, 5, 4, 3, 2, 1, 6],
            ends: vec![3, 4, 9, 10],
            pooling,
        }
    }

    fn plain(lists: Lists, x: &Tensor) -> Tensor {
        naive::pooled_rows(x, &lists.rows, &lists.ends, lists.pooling).unwrap()
    }

    fn of(x: &Tensor, pooling: RowPooling) -> Result<Tensor> {
        let Lists { rows, ends, .. } = lists(pooling);
        pooled_rows(x, rows, ends, pooling)
    }

    #[test]
    fn equals_the_composition() {
        for (width, pooling) in [1, 7, 40]
            .into_iter()
            .flat_map(|width| ALL.map(|by| (width, by)))
        {
            compare(1e-6, |dtype| {
                let x = arange(&[width, 7], 1.0, dtype).t().unwrap();
                (of(&x, pooling).unwrap(), plain(lists(pooling), &x))
            });
        }
        let x = arange(&[7, 3], 1.0, DType::F64);
        let none = pooled_rows(&x, vec![], vec![], RowPooling::Sum).unwrap();
        assert_eq!(none.dims(), [0, 3]);
        for pooling in [RowPooling::Sum, RowPooling::Mean] {
            let lists = || Lists {
                rows: vec![4, 2],
                ends: vec![0, 2, 2],
                pooling,
            };
            let Lists { rows, ends, .. } = lists();
            let ours = pooled_rows(&x, rows, ends, pooling).unwrap();
            assert_eq!(difference(&ours, &plain(lists(), &x)).unwrap(), 0.0);
            assert_eq!(ours.to_vec2::<f64>().unwrap()[0], [0.0; 3]);
        }
    }

    #[test]
    fn gradients() {
        let x = arange(&[7, 40], 1.0, DType::F64);
        for pooling in ALL {
            let error = gradient_error(|x| of(&x[0], pooling), std::slice::from_ref(&x));
            assert!(error.unwrap() < 1e-8);
        }
    }

    #[test]
    fn gradients_of_equal_rows_are_those_of_the_composition() {
        let same = [[1f64, 2.0], [1.0, 2.0], [1.0, 0.0]];
        let x = Var::new(&same, &Device::Cpu).unwrap();
        let lists = || Lists {
            rows: vec![0, 1, 2, 2],
            ends: vec![3, 4],
            pooling: RowPooling::Maximum,
        };
        let Lists {
            rows,
            ends,
            pooling,
        } = lists();
        let ours = pooled_rows(x.as_tensor(), rows, ends, pooling).unwrap();
        let plain = plain(lists(), x.as_tensor());
        let [ours, plain] = [ours, plain].map(|y| {
            let gradients = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
            gradients.get(&x).unwrap().clone()
        });
        assert_eq!(difference(&ours, &plain).unwrap(), 0.0);
    }

    #[test]
    fn lists_that_are_not_there_are_refused() {
        let x = arange(&[3, 2], 1.0, DType::F32);
        for (rows, ends) in [
            (vec![0, 3], vec![2]),
            (vec![0, 1], vec![1]),
            (vec![0, 1], vec![1, 1, 2]),
            (vec![0], vec![0, 1]),
            (vec![0, 1], vec![2, 1]),
            (vec![0], vec![usize::MAX, 1]),
        ] {
            assert!(pooled_rows(&x, rows, ends, RowPooling::Maximum).is_err());
        }
        assert!(pooled_rows(&x, vec![0, 1], vec![2, 1, 2], RowPooling::Mean).is_err());
        let number = Tensor::new(1f32, &Device::Cpu).unwrap();
        assert!(pooled_rows(&number, vec![0], vec![1], RowPooling::Sum).is_err());
    }
}
