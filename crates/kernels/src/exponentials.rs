//! Exponentials between two sets of points: Gaussian kernels, and positive features of their kernel.
//!
//! ```text
//! E_ij = e^{γ (x a_i · b_j − l ‖a_i‖² − r ‖b_j‖²) + s}
//! ```
//!
//! which is `e^{−γ ‖a_i − b_j‖²}` for `x = 2`, `l = r = 1`, and `e^{ω_j · a_i − l ‖a_i‖²}` for frequencies
//! `b = ω`, `x = 1`, `r = 0`. A block of rows is one product and one pass while it lies in the cache.
//! With `W = ∂E ∘ E` the backward pass is
//!
//! ```text
//! ∂a_i = γ (x Σ_j W_ij b_j − 2 l Σ_j W_ij a_i),   ∂b_j = γ (x Σ_i W_ij a_i − 2 r Σ_i W_ij b_j)
//! ∂γ = Σ_ij W_ij (x a_i · b_j − l ‖a_i‖² − r ‖b_j‖²)
//! ```
//!
//! and `W` is never held for more than a block.

use crate::backward::Apply;
use crate::host::{self, Host, Shared, by_dtype, fused};
use crate::product::{Into, Matrix, Threads, multiply};
use crate::simd::{self, Real};
use crate::stack::Stack;
use crate::{Error, Result, Tensor};
use candle_core::{CpuStorage, CustomOp3, Layout, Shape, WithDType};

type Candle<T> = candle_core::Result<T>;

/// Rows of a block.
const BLOCK: usize = 64;

/// `[.., rows, columns]` for points `a` `[.., rows, width]`, `b` `[.., columns, width]` and `γ`
/// `[..]`; the dimensions before the last two are broadcast to those of `a`.
///
/// # Errors
/// When the shapes do not fit each other.
///
/// ```
/// use lapidary_kernels::{DType, Device, Tensor, gaussian};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let a = Tensor::new(&[[0f64, 0.0], [1.0, 1.0]], &Device::Cpu)?;
/// let half = Tensor::new(0.5f64, &Device::Cpu)?;
/// let kernel = gaussian(&a, &a, &half)?.to_vec2::<f64>()?;
/// assert_eq!(kernel[0][0], 1.0);
/// assert!((kernel[0][1] - (-1f64).exp()).abs() < 1e-12);
/// # Ok(())
/// # }
/// ```
pub fn gaussian(a: &Tensor, b: &Tensor, rate: &Tensor) -> Result<Tensor> {
    let form = Form {
        name: "gaussian",
        cross: 2.0,
        left: 1.0,
        right: 1.0,
        shift: 0.0,
    };
    exponentials(form, a, b, rate)
}

/// `e^{ω_j · x_i − decay ‖x_i‖²} / √count` `[.., rows, count]` for points `x` `[.., rows, width]` and
/// `frequencies` `ω` `[.., count, width]`, whose dimensions before the last two are broadcast to those
/// of `x`: positive features, whose inner products are on average a kernel of the points (Choromanski
/// et al., Performer, 2021, with `decay = ½`).
///
/// # Errors
/// When the shapes do not fit each other.
pub fn exponential_features(x: &Tensor, frequencies: &Tensor, decay: f64) -> Result<Tensor> {
    let count = frequencies.dims().iter().rev().nth(1).copied().unwrap_or(1);
    let form = Form {
        name: "exponential features",
        cross: 1.0,
        left: decay,
        right: 0.0,
        shift: -0.5 * (count.max(1) as f64).ln(),
    };
    let one = Tensor::ones((), x.dtype(), x.device())?;
    exponentials(form, x, frequencies, &one)
}

fn exponentials(form: Form, a: &Tensor, b: &Tensor, rate: &Tensor) -> Result<Tensor> {
    let wrong = |name, found: &Tensor, expected: String| {
        Error::argument(form.name, name, found.dims(), expected)
    };
    let [stack @ .., _, width] = a.dims() else {
        return Err(wrong("a", a, "[.., rows, width]".to_owned()));
    };
    let fits = |x: &Tensor, matrix: &[usize]| x.broadcast_as([stack, matrix].concat()).ok();
    let columns = b.dims().iter().rev().nth(1).copied().unwrap_or(0);
    let Some(b) = fits(b, &[columns, *width]) else {
        let expected = format!("[.., columns, {width}], broadcast to {stack:?}");
        return Err(wrong("b", b, expected));
    };
    let Some(rate) = fits(rate, &[]) else {
        return Err(wrong("rate", rate, format!("{stack:?}, or fewer")));
    };
    match fused(&[a, &b, &rate]) {
        true => Ok(a.apply3(&b, &rate, form)?),
        false => form.composed(a, &b, &rate),
    }
}

/// What an exponent is made of.
#[derive(Clone, Copy)]
struct Form {
    name: &'static str,
    cross: f64,
    left: f64,
    right: f64,
    shift: f64,
}

impl Form {
    fn composed(&self, a: &Tensor, b: &Tensor, rate: &Tensor) -> Result<Tensor> {
        let last = candle_core::D::Minus1;
        let squares = |x: &Tensor| x.sqr()?.sum_keepdim(last);
        let products = a.contiguous()?.matmul(&b.t()?.contiguous()?)?;
        let mut exponents = (products * self.cross)?
            .broadcast_sub(&(squares(a)? * self.left)?)?
            .broadcast_sub(&(squares(b)? * self.right)?.t()?)?;
        if self.is_distance() {
            exponents = exponents.minimum(0.0)?;
        }
        let rate = rate.unsqueeze(last)?.unsqueeze(last)?;
        Ok((exponents.broadcast_mul(&rate)? + self.shift)?.exp()?)
    }

    /// Whether the exponent is a distance, which rounding must not make negative.
    fn is_distance(&self) -> bool {
        self.right > 0.0
    }
}

/// The points of both sides and the rates of all pairs.
struct Points<'a, T> {
    a: Stack<'a, T>,
    b: Stack<'a, T>,
    rates: Vec<T>,
}

impl<'a, T: Real> Points<'a, T> {
    fn new(
        a: (&'a CpuStorage, &Layout),
        b: (&'a CpuStorage, &Layout),
        rate: (&CpuStorage, &Layout),
    ) -> Candle<Self> {
        let dims = a.1.dims();
        let pairs = &dims[..dims.len() - 2];
        Ok(Self {
            a: Stack::new(a.0, a.1, pairs)?,
            b: Stack::new(b.0, b.1, pairs)?,
            rates: host::ordered(rate.0, rate.1)?.into_owned(),
        })
    }

    /// Blocks of the rows of one pair.
    fn blocks(&self) -> usize {
        self.a.rows.div_ceil(BLOCK)
    }
}

/// `‖x‖²` of each row.
fn squares<T: Real>(x: &Matrix<T>) -> Vec<T> {
    let of = |row: usize| {
        let start = row * x.row_stride;
        let each = (0..x.columns).map(|at| x.data[start + at * x.column_stride]);
        each.fold(T::zero(), |sum, value| sum + value * value)
    };
    (0..x.rows).map(of).collect()
}

impl Form {
    fn forward<T: Real>(&self, points: &Points<T>) -> Vec<T> {
        let [left, right, shift] = [self.left, self.right, self.shift].map(T::of);
        let most = if self.is_distance() {
            T::zero()
        } else {
            -T::NEG_INFINITY
        };
        let (rows, columns) = (points.a.rows, points.b.rows);
        let mut result = host::unwritten::<T>(points.rates.len() * rows * columns);
        let shared = Shared::new(&mut result);
        let blocks = points.blocks();
        let work = BLOCK * columns * (points.a.columns / 8 + 4);
        host::share(points.rates.len() * blocks, work, |range| {
            let mut of_b = (usize::MAX, Vec::new());
            for item in range {
                let (pair, start) = (item / blocks, item % blocks * BLOCK);
                let here = start..rows.min(start + BLOCK);
                let (a, b) = (
                    points.a.matrix(pair).part_of_rows(&here),
                    points.b.matrix(pair),
                );
                if of_b.0 != pair {
                    of_b = (pair, squares(&b));
                }
                // SAFETY: each block of rows of a pair is one item.
                let tile =
                    unsafe { shared.part((pair * rows + start) * columns, here.len() * columns) };
                multiply(
                    tile,
                    columns,
                    Into::Replace,
                    T::of(self.cross),
                    a,
                    b.transposed(),
                    Threads::One,
                );
                let (of_a, rate) = (squares(&a), points.rates[pair]);
                simd::vectorised(
                    #[inline(always)]
                    || {
                        for (row, &of_a) in tile.chunks_exact_mut(columns.max(1)).zip(&of_a) {
                            for (value, &of_b) in row.iter_mut().zip(&of_b.1) {
                                let exponent = *value - left * of_a - right * of_b;
                                let exponent = if exponent > most { most } else { exponent };
                                *value = (rate * exponent + shift).exp();
                            }
                        }
                    },
                );
            }
        });
        result
    }

    /// Gradients of both points, packed, and of the rates.
    fn backward<T: Real>(
        &self,
        points: &Points<T>,
        kernel: &[T],
        gradient: &[T],
    ) -> (Vec<T>, Vec<T>, Vec<T>) {
        let (rows, columns, width) = (points.a.rows, points.b.rows, points.a.columns);
        let pairs = points.rates.len();
        let [cross, left, right] = [self.cross, self.left, self.right].map(T::of);
        let two = T::of(2.0);
        let mut da = host::unwritten::<T>(pairs * rows * width);
        let mut db = vec![T::zero(); pairs * columns * width];
        let mut d_rates = vec![T::zero(); pairs];
        let parts = (
            Shared::new(&mut da),
            Shared::new(&mut db),
            Shared::new(&mut d_rates),
        );
        let work = rows * columns * (width / 2 + 2);
        host::share(pairs, work, |range| {
            let mut tile = host::unwritten::<T>(BLOCK * columns);
            let mut scaled = host::unwritten::<T>(BLOCK * width);
            for pair in range {
                let (b, rate) = (points.b.matrix(pair), points.rates[pair]);
                // SAFETY: each pair is one item.
                let (da, db, d_rate) = unsafe {
                    (
                        parts.0.part(pair * rows * width, rows * width),
                        parts.1.part(pair * columns * width, columns * width),
                        parts.2.part(pair, 1),
                    )
                };
                let mut of_columns = vec![T::zero(); columns];
                let mut sum = T::zero();
                for start in (0..rows).step_by(BLOCK) {
                    let here = start..rows.min(start + BLOCK);
                    let a = points.a.matrix(pair).part_of_rows(&here);
                    let from = (pair * rows + start) * columns;
                    let tile = &mut tile[..here.len() * columns];
                    let mut of_rows = [T::zero(); BLOCK];
                    simd::vectorised(
                        #[inline(always)]
                        || {
                            let gradient = &gradient[from..from + tile.len()];
                            let kernel = &kernel[from..from + tile.len()];
                            for ((w, &g), &k) in tile.iter_mut().zip(gradient).zip(kernel) {
                                *w = g * k;
                            }
                            for (row, total) in tile.chunks_exact(columns.max(1)).zip(&mut of_rows)
                            {
                                *total = simd::sum(row);
                                for (of_column, &w) in of_columns.iter_mut().zip(row) {
                                    *of_column += w;
                                }
                            }
                        },
                    );
                    let weights = Matrix::packed(tile, here.len(), columns);
                    let mixed = &mut da[start * width..here.end * width];
                    multiply(
                        mixed,
                        width,
                        Into::Replace,
                        T::one(),
                        weights,
                        b,
                        Threads::One,
                    );
                    multiply(
                        db,
                        width,
                        Into::Add,
                        T::one(),
                        weights.transposed(),
                        a,
                        Threads::One,
                    );
                    let scaled = &mut scaled[..mixed.len()];
                    for (row, to) in scaled.chunks_exact_mut(width.max(1)).enumerate() {
                        let at = row * a.row_stride;
                        for (column, to) in to.iter_mut().enumerate() {
                            *to = a.data[at + column * a.column_stride];
                        }
                    }
                    simd::vectorised(
                        #[inline(always)]
                        || {
                            let rows = mixed.chunks_exact_mut(width.max(1));
                            let rows = rows.zip(scaled.chunks_exact(width.max(1)));
                            for ((mixed, a), &total) in rows.zip(&of_rows) {
                                sum += cross * simd::dot(a, mixed) - left * total * simd::dot(a, a);
                                for (mixed, &a) in mixed.iter_mut().zip(a) {
                                    *mixed = rate * (cross * *mixed - two * left * total * a);
                                }
                            }
                        },
                    );
                }
                for (column, row) in db.chunks_exact_mut(width.max(1)).enumerate() {
                    let (at, total) = (column * b.row_stride, of_columns[column]);
                    for (index, value) in row.iter_mut().enumerate() {
                        let b = b.data[at + index * b.column_stride];
                        sum -= right * total * b * b;
                        *value = rate * (cross * *value - two * right * total * b);
                    }
                }
                d_rate[0] = sum;
            }
        });
        (da, db, d_rates)
    }
}

impl CustomOp3 for Form {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        a_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
        rate: &CpuStorage,
        rate_layout: &Layout,
    ) -> Candle<(CpuStorage, Shape)> {
        by_dtype!(host::dtype(a), T => {
            let points = Points::<T>::new((a, a_layout), (b, b_layout), (rate, rate_layout))?;
            let mut dims = a_layout.dims().to_vec();
            if let Some(last) = dims.last_mut() {
                *last = points.b.rows;
            }
            Ok((T::to_cpu_storage_owned(self.forward(&points)), Shape::from(dims)))
        })
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        rate: &Tensor,
        kernel: &Tensor,
        gradient: &Tensor,
    ) -> Candle<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let hosts = [a, b, rate, kernel, gradient].map(Host::new);
        let [a_host, b_host, rate_host, kernel, gradient] = &hosts;
        by_dtype!(a.dtype(), T => {
            let points = Points::<T>::new(
                (a_host.storage()?, a_host.layout),
                (b_host.storage()?, b_host.layout),
                (rate_host.storage()?, rate_host.layout),
            )?;
            let (da, db, d_rates) =
                self.backward(&points, &kernel.ordered::<T>()?, &gradient.ordered::<T>()?);
            Ok((host::wanted(a, da)?, host::wanted(b, db)?, host::wanted(rate, d_rates)?))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::DType;
    use crate::check::{difference, gradient_error};
    use crate::test_data::{arange, compare};

    /// The definition, by differences.
    fn plain(a: &Tensor, b: &Tensor, rate: &Tensor) -> Tensor {
        let rank = a.rank();
        let apart = a
            .unsqueeze(rank - 1)
            .unwrap()
            .broadcast_sub(&b.unsqueeze(rank - 2).unwrap())
            .unwrap();
        let distances = apart.sqr().unwrap().sum(rank).unwrap();
        let rate = rate
            .unsqueeze(rank - 2)
            .unwrap()
            .unsqueeze(rank - 1)
            .unwrap();
        distances
            .broadcast_mul(&rate)
            .unwrap()
            .neg()
            .unwrap()
            .exp()
            .unwrap()
    }

    #[test]
    fn equals_the_definition() {
        // In f32 what is left of three sums that nearly cancel.
        compare(1e-4, |dtype| {
            let a = arange(&[2, 3, 70, 17], 1.0, dtype);
            let b = arange(&[2, 3, 33, 17], 2.0, dtype);
            let rate = arange(&[2, 3], 3.0, dtype).sqr().unwrap();
            (gaussian(&a, &b, &rate).unwrap(), plain(&a, &b, &rate))
        });
        compare(1e-5, |dtype| {
            let a = arange(&[5, 2, 9], 1.0, dtype).transpose(1, 2).unwrap();
            let b = arange(&[4, 2], 2.0, dtype);
            let rate = arange(&[1], 3.0, dtype).sqr().unwrap();
            (gaussian(&a, &b, &rate).unwrap(), {
                let b = b.broadcast_as((5, 4, 2)).unwrap();
                plain(&a, &b, &rate.broadcast_as(5).unwrap())
            })
        });
    }

    #[test]
    fn gradients() {
        let f = |x: &[Tensor]| gaussian(&x[0], &x[1], &x[2].sqr()?);
        for (a, b, rate) in [
            (vec![2, 66, 3], vec![2, 4, 3], vec![2]),
            (vec![2, 3, 3], vec![4, 3], vec![]),
        ] {
            let [a, b, rate] = [(a, 1.0), (b, 2.0), (rate, 3.0)]
                .map(|(dims, phase)| arange(&dims, phase, DType::F64));
            let error = gradient_error(f, &[(a * 0.3).unwrap(), (b * 0.3).unwrap(), rate]);
            assert!(error.unwrap() < 1e-7);
        }
    }

    #[test]
    fn features_are_the_exponentials_of_projections() {
        compare(1e-5, |dtype| {
            let x = (arange(&[2, 3, 70, 17], 1.0, dtype) * 0.3).unwrap();
            let frequencies = arange(&[3, 33, 17], 2.0, dtype);
            let along = x.broadcast_matmul(&frequencies.t().unwrap().contiguous().unwrap());
            let squares = (x.sqr().unwrap().sum_keepdim(3).unwrap() * 0.5).unwrap();
            let exponents = along.unwrap().broadcast_sub(&squares).unwrap();
            let plain = (exponents.exp().unwrap() / 33f64.sqrt()).unwrap();
            (exponential_features(&x, &frequencies, 0.5).unwrap(), plain)
        });
        let f = |x: &[Tensor]| exponential_features(&x[0], &x[1], 0.7);
        let x = arange(&[2, 66, 3], 1.0, DType::F64);
        assert!(gradient_error(f, &[x, arange(&[5, 3], 2.0, DType::F64)]).unwrap() < 1e-6);
    }

    #[test]
    fn equals_its_composition() {
        let points = |n, phase| (arange(&[3, n, 5], phase, DType::F64) * 0.2).unwrap();
        let (a, b) = (points(20, 1.0), points(7, 2.0));
        let rate = arange(&[3], 3.0, DType::F64).sqr().unwrap();
        for (left, right) in [(1.0, 1.0), (0.5, 0.0)] {
            let form = Form {
                name: "test",
                cross: 2.0 * left,
                left,
                right,
                shift: -0.3,
            };
            let found = exponentials(form, &a, &b, &rate).unwrap();
            let composed = form.composed(&a, &b, &rate).unwrap();
            assert!(difference(&found, &composed).unwrap() < 1e-12);
        }
    }

    #[test]
    fn of_a_point_with_itself_is_one_at_most() {
        let a = (arange(&[30, 64], 1.0, DType::F32) * 10.0).unwrap();
        let half = Tensor::new(0.5f32, &crate::Device::Cpu).unwrap();
        let kernel = gaussian(&a, &a, &half).unwrap().to_vec2::<f32>().unwrap();
        for (i, row) in kernel.iter().enumerate() {
            assert!(row.iter().all(|value| *value <= 1.0));
            assert!(row[i] > 0.9);
        }
    }

    #[test]
    fn does_not_depend_on_the_number_of_threads() {
        let a = arange(&[3, 200, 32], 1.0, DType::F32);
        let b = arange(&[3, 50, 32], 2.0, DType::F32);
        let rate = arange(&[3], 3.0, DType::F32);
        let with = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
            pool.build()
                .unwrap()
                .install(|| gaussian(&a, &b, &rate).unwrap())
        };
        let one = with(1);
        assert!(
            [2, 5]
                .iter()
                .all(|&n| difference(&with(n), &one).unwrap() == 0.0)
        );
    }

    #[test]
    fn wrong_shapes_are_named() {
        let [a, b, rate] = [&[2, 3, 4][..], &[2, 3, 5], &[2]].map(|d| arange(d, 1.0, DType::F32));
        let message = gaussian(&a, &b, &rate).unwrap_err().to_string();
        assert!(message.contains("gaussian") && message.contains("[2, 3, 5]"));
        assert!(gaussian(&a, &a, &arange(&[3], 1.0, DType::F32)).is_err());
        assert!(gaussian(&rate, &a, &rate).is_err());
    }
}
