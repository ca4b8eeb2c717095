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

use crate::host::{self, Host, Shared, by_dtype, fused};
use crate::product::{Into, Matrix, Threads, multiply};
use crate::simd::{self, Real};
use crate::stack::Stack;
use crate::{DType, Error, Result, Tensor, naive};
use candle_core::{CpuStorage, CustomOp3, Layout, Shape, WithDType};
use std::ops::Range;

type Candle<T> = candle_core::Result<T>;

/// Rows whose distances are taken at one time.
const BLOCK: usize = 64;

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

/// A product on this thread.
fn product<T: Real>(result: &mut [T], into: Into, a: Matrix<T>, b: Matrix<T>) {
    multiply(result, b.columns, into, T::one(), a, b, Threads::One);
}

/// The product of two matrices, packed.
fn made<T: Real>(a: Matrix<T>, b: Matrix<T>) -> Vec<T> {
    let mut result = host::unwritten::<T>(a.rows * b.columns);
    product(&mut result, Into::Replace, a, b);
    result
}

impl<'a, T: Real> Head<'a, T> {
    /// `both` is landmarks and middle side by side, rows one after the other.
    fn new(
        operation: &'a Factored,
        index: usize,
        q: &'a Stack<T>,
        both: &'a [T],
        v: &'a Stack<T>,
    ) -> Self {
        let sizes = operation.sizes;
        let Sizes {
            width,
            count,
            length,
            ..
        } = sizes;
        let stride = width + count;
        let both = &both[index * count * stride..(index + 1) * count * stride];
        let rows = || both.chunks_exact(stride.max(1));
        let mut centre = vec![T::zero(); width];
        for row in rows() {
            for (sum, x) in centre.iter_mut().zip(&row[..width]) {
                *sum += *x / T::of(count as f64);
            }
        }
        let mut landmarks = Vec::with_capacity(count * width);
        for row in rows() {
            landmarks.extend(row[..width].iter().zip(&centre).map(|(x, c)| *x - *c));
        }
        let squares = landmarks.chunks_exact(width.max(1));
        let squares = squares.map(|row| simd::dot(row, row)).collect();
        let sequence = index / sizes.heads.max(1);
        Self {
            sizes,
            rate: T::of(operation.rate),
            q: q.matrix(index),
            v: v.matrix(index),
            centre,
            landmarks,
            squares,
            middle: Matrix::spaced(both.get(width..).unwrap_or(&[]), count, count, stride),
            kept: operation
                .kept
                .as_deref()
                .map(|all| &all[sequence * length..(sequence + 1) * length]),
        }
    }

    fn landmarks(&self) -> Matrix<'_, T> {
        Matrix::packed(&self.landmarks, self.sizes.count, self.sizes.width)
    }

    /// A matrix `[count, value_width]`.
    fn small<'b>(&self, data: &'b [T]) -> Matrix<'b, T> {
        Matrix::packed(data, self.sizes.count, self.sizes.value_width)
    }

    /// Where blocks of rows start and end.
    fn blocks(&self) -> impl Iterator<Item = Range<usize>> + use<T> {
        let length = self.sizes.length;
        (0..length)
            .step_by(BLOCK)
            .map(move |start| start..length.min(start + BLOCK))
    }

    /// Queries of a block without the centre, `[rows, width]`.
    fn centred<'b>(&self, range: &Range<usize>, into: &'b mut [T]) -> &'b [T] {
        let width = self.sizes.width;
        let q = self.q.part_of_rows(range);
        let into = &mut into[..range.len() * width];
        for (row, to) in into.chunks_exact_mut(width.max(1)).enumerate() {
            let start = row * q.row_stride;
            if q.column_stride == 1 {
                let from = &q.data[start..start + width];
                for ((to, x), c) in to.iter_mut().zip(from).zip(&self.centre) {
                    *to = *x - *c;
                }
            } else {
                for (column, (to, c)) in to.iter_mut().zip(&self.centre).enumerate() {
                    *to = q.data[start + column * q.column_stride] - *c;
                }
            }
        }
        into
    }

    /// `P` `[length, count]`.
    fn kernel(&self) -> Vec<T> {
        let Sizes {
            length,
            width,
            count,
            ..
        } = self.sizes;
        let mut kernel = host::unwritten::<T>(length * count);
        let mut rows = host::unwritten::<T>(BLOCK * width);
        for range in self.blocks() {
            let q = self.centred(&range, &mut rows);
            let tile = &mut kernel[range.start * count..range.end * count];
            let a = Matrix::packed(q, range.len(), width);
            let b = self.landmarks().transposed();
            multiply(tile, count, Into::Replace, T::of(2.0), a, b, Threads::One);
            simd::vectorised(
                #[inline(always)]
                || {
                    let rows = tile.chunks_exact_mut(count.max(1));
                    for (row, q) in rows.zip(q.chunks_exact(width.max(1))) {
                        let square = simd::dot(q, q);
                        for (value, other) in row.iter_mut().zip(&self.squares) {
                            // Rounding must not make a distance negative.
                            let near = *value - square - *other;
                            let near = if near > T::zero() { T::zero() } else { near };
                            *value = (self.rate * near).exp_of_negative();
                        }
                    }
                },
            );
            for (row, &keep) in self
                .kept
                .iter()
                .flat_map(|kept| kept[range.clone()].iter().enumerate())
            {
                if keep == 0 {
                    tile[row * count..(row + 1) * count].fill(T::zero());
                }
            }
        }
        kernel
    }

    fn forward(&self, y: &mut [T]) {
        let Sizes {
            length,
            count,
            value_width,
            ..
        } = self.sizes;
        let kernel = self.kernel();
        let kernel = Matrix::packed(&kernel, length, count);
        let collected = made(kernel.transposed(), self.v);
        let spread = made(self.middle, Matrix::packed(&collected, count, value_width));
        product(
            y,
            Into::Replace,
            kernel,
            Matrix::packed(&spread, count, value_width),
        );
    }

    fn backward(&self, gradient: Matrix<T>, slopes: Slopes<'_, T>) {
        let Sizes {
            length,
            width,
            count,
            ..
        } = self.sizes;
        let values = self.kernel();
        let kernel = Matrix::packed(&values, length, count);
        let collected = made(kernel.transposed(), self.v);
        let of_spread = made(kernel.transposed(), gradient);
        let spread = made(self.middle, self.small(&collected));
        let of_collected = made(self.middle.transposed(), self.small(&of_spread));
        product(slopes.v, Into::Replace, kernel, self.small(&of_collected));

        let mut tile = host::unwritten::<T>(BLOCK * count);
        let mut rows = host::unwritten::<T>(BLOCK * width);
        let mut of_landmarks = vec![T::zero(); count * width];
        let mut of_columns = vec![T::zero(); count];
        let twice = self.rate + self.rate;
        for range in self.blocks() {
            let tile = &mut tile[..range.len() * count];
            let g = gradient.part_of_rows(&range);
            product(tile, Into::Replace, g, self.small(&spread).transposed());
            let v = self.v.part_of_rows(&range);
            product(tile, Into::Add, v, self.small(&of_collected).transposed());
            let mut of_rows = [T::zero(); BLOCK];
            let kernel = &values[range.start * count..range.end * count];
            simd::vectorised(
                #[inline(always)]
                || {
                    for (w, k) in tile.iter_mut().zip(kernel) {
                        *w *= *k;
                    }
                    for (row, total) in tile.chunks_exact(count.max(1)).zip(&mut of_rows) {
                        *total = simd::sum(row);
                        for (column, w) in of_columns.iter_mut().zip(row) {
                            *column += *w;
                        }
                    }
                },
            );
            let weights = Matrix::packed(tile, range.len(), count);
            let q = self.centred(&range, &mut rows);
            let of_q = &mut slopes.q[range.start * width..range.end * width];
            product(of_q, Into::Replace, weights, self.landmarks());
            let packed = Matrix::packed(q, range.len(), width);
            product(&mut of_landmarks, Into::Add, weights.transposed(), packed);
            simd::vectorised(
                #[inline(always)]
                || {
                    let rows = of_q.chunks_exact_mut(width.max(1));
                    for ((slope, q), &total) in rows.zip(q.chunks_exact(width.max(1))).zip(&of_rows)
                    {
                        for (slope, &q) in slope.iter_mut().zip(q) {
                            *slope = twice * (*slope - total * q);
                        }
                    }
                },
            );
        }
        let of_middle = made(self.small(&of_spread), self.small(&collected).transposed());
        let each = slopes
            .both
            .chunks_exact_mut((width + count).max(1))
            .enumerate();
        for (landmark, row) in each {
            let (point, middle) = row.split_at_mut(width);
            let here = landmark * width..(landmark + 1) * width;
            let mixed = of_landmarks[here.clone()].iter().zip(&self.landmarks[here]);
            for (to, (mixed, l)) in point.iter_mut().zip(mixed) {
                *to = twice * (*mixed - of_columns[landmark] * *l);
            }
            middle.copy_from_slice(&of_middle[landmark * count..(landmark + 1) * count]);
        }
    }
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
mod tests {
    use super::*;
    use crate::check::{difference, gradient_error};
    use crate::test_data::{arange, compare};

    /// Queries and values that lie heads side by side, landmarks and a middle.
    fn given(length: usize, count: usize, dtype: DType) -> [Tensor; 4] {
        let side_by_side = |width, phase| {
            let x = (arange(&[2, length, 3, width], phase, dtype) * 0.5).unwrap();
            x.transpose(1, 2).unwrap()
        };
        [
            side_by_side(17, 1.0),
            (arange(&[2, 3, count, 17], 2.0, dtype) * 0.5).unwrap(),
            arange(&[2, 3, count, count], 3.0, dtype),
            side_by_side(5, 4.0),
        ]
    }

    fn kept(length: usize) -> Tensor {
        let kept: Vec<u8> = (0..2 * length).map(|at| u8::from(at % 3 != 1)).collect();
        Tensor::from_vec(kept, (2, length), &crate::Device::Cpu).unwrap()
    }

    #[test]
    fn equals_the_kernel_laid_out() {
        for (length, count) in [(1, 1), (64, 9), (150, 33)] {
            for kept in [None, Some(kept(length))] {
                compare(1e-4, |dtype| {
                    let [q, l, m, v] = given(length, count, dtype);
                    let kept = kept.as_ref();
                    (
                        landmark_attention(&q, &l, &m, &v, 0.3, kept).unwrap(),
                        naive::landmark_attention(&q, &l, &m, &v, 0.3, kept).unwrap(),
                    )
                });
            }
        }
    }

    #[test]
    fn gradients_equal_finite_differences() {
        let inputs = [
            (arange(&[2, 1, 66, 3], 1.0, DType::F64) * 0.5).unwrap(),
            (arange(&[2, 1, 4, 3], 2.0, DType::F64) * 0.5).unwrap(),
            arange(&[2, 1, 4, 4], 3.0, DType::F64),
            arange(&[2, 1, 66, 2], 4.0, DType::F64),
        ];
        for kept in [None, Some(kept(66))] {
            let f =
                |x: &[Tensor]| landmark_attention(&x[0], &x[1], &x[2], &x[3], 0.4, kept.as_ref());
            let error = gradient_error(f, &inputs).unwrap();
            assert!(error < 1e-6, "{error:e}");
        }
    }

    /// What all points have in common is taken away before anything is squared.
    #[test]
    fn points_far_away_lose_nothing() {
        let [q, l, m, v] = given(100, 8, DType::F32);
        let near = landmark_attention(&q, &l, &m, &v, 0.3, None).unwrap();
        let (q, l) = ((q + 64.0).unwrap(), (l + 64.0).unwrap());
        let far = landmark_attention(&q, &l, &m, &v, 0.3, None).unwrap();
        let size = near
            .abs()
            .unwrap()
            .max_all()
            .unwrap()
            .to_scalar::<f32>()
            .unwrap();
        assert!(difference(&near, &far).unwrap() < 1e-4 * f64::from(size));
    }

    #[test]
    fn does_not_depend_on_the_number_of_threads() {
        let [q, l, m, v] = given(300, 16, DType::F32);
        let with = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
            let run = || landmark_attention(&q, &l, &m, &v, 0.3, None).unwrap();
            pool.build().unwrap().install(run)
        };
        let one = with(1);
        assert!(
            [2, 5]
                .iter()
                .all(|&n| difference(&with(n), &one).unwrap() == 0.0)
        );
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let [q, l, m, v] = given(10, 4, DType::F32);
        let refused = |q: &Tensor, l: &Tensor, m: &Tensor, v: &Tensor, kept: Option<&Tensor>| {
            let error = landmark_attention(q, l, m, v, 0.3, kept).unwrap_err();
            error.to_string()
        };
        assert!(refused(&q, &v, &m, &v, None).contains("landmarks"));
        assert!(refused(&q, &l, &l, &v, None).contains("middle"));
        assert!(refused(&q, &l, &m, &l, None).contains("values"));
        assert!(refused(&q, &l, &m, &v, Some(&kept(9))).contains("kept"));
    }
}
