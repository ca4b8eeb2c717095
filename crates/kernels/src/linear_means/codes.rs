//! Means weighted by what codes of ±1 have in common, of queries and keys that are one and the same (Liu et
//! al., EcoFormer, 2022, arXiv 2209.09004).
//!
//! ```text
//! y_i = Σ_j κ_j (b_i · b_j + o) v_j / t_i,   t_i = Σ_j κ_j (b_i · b_j + o), or 1 where that is 0
//!     = (b_i · S + o s) / t_i,               t_i = b_i · z + o n
//! S = Σ_j κ_j b_j v_jᵀ,   z = Σ_j κ_j b_j,   s = Σ_j κ_j v_j,   n = Σ_j κ_j
//! ```
//!
//! The constant `o` is never a feature beside the codes, and these are read where they lie for both sides. With
//! `∂n_i = ∂y_i / t_i` and `h_i = −∂n_i · y_i`
//!
//! ```text
//! ∂b_i = S ∂n_i + h_i z + κ_i (B v_i + ζ),   ∂v_j = κ_j (b_j · B + o c)
//! B = Σ_i b_i ∂n_iᵀ,   ζ = Σ_i h_i b_i,   c = Σ_i ∂n_i
//! ```

use super::whole::{BLOCK, add_product, in_blocks, product, summed};
use super::{add_row, along, reciprocal, split};
use crate::backward::Apply;
use crate::host::{self, Host, Shared, by_dtype, fused};
use crate::product::Matrix;
use crate::simd::{self, Real};
use crate::stack::Stack;
use crate::{Error, Result, Tensor, naive};
use candle_core::{CpuStorage, CustomOp2, Layout, Shape, WithDType};
use std::ops::Range;

type Candle<T> = candle_core::Result<T>;

/// `y` `[batch, heads, length, width]` for `codes` `[batch, heads, length, bits]` and `v`
/// `[batch, heads, length, width]`: the mean of values weighted by `b_i · b_j + offset`, of those tokens that
/// `kept` `[batch, 1, length, 1]` has 1 for and not 0. A sum of weights that is 0 counts as 1. Differentiable in
/// codes, which may be any numbers, and values.
///
/// Time grows with `length · bits · width`, memory with the result.
///
/// # Errors
/// When the shapes do not fit each other.
///
/// ```
/// use lapidary_kernels::{Device, Tensor, code_means};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let device = Device::Cpu;
/// let codes = Tensor::new(&[[[[1f32, 1.0], [1.0, -1.0]]]], &device)?;
/// let v = Tensor::new(&[[[[3f32], [8.0]]]], &device)?;
/// let y = code_means(&codes, &v, None, 3.0)?.flatten_all()?.to_vec1::<f32>()?;
/// // Weights of 5 for itself and of 3 for the other.
/// assert_eq!(y, [39.0 / 8.0, 49.0 / 8.0]);
/// # Ok(())
/// # }
/// ```
pub fn code_means(
    codes: &Tensor,
    v: &Tensor,
    kept: Option<&Tensor>,
    offset: f64,
) -> Result<Tensor> {
    let (batch, heads, length, _) = codes.dims4()?;
    let refuse = |name: &'static str, found: &Tensor, expected: String| {
        Err(Error::argument("code means", name, found.dims(), expected))
    };
    match v.dims() {
        [b, h, n, _] if [*b, *h, *n] == [batch, heads, length] => {}
        _ => return refuse("v", v, format!("[{batch}, {heads}, {length}, width]")),
    }
    if let Some(kept) = kept.filter(|kept| kept.dims() != [batch, 1, length, 1]) {
        return refuse("kept", kept, format!("[{batch}, 1, {length}, 1]"));
    }
    let mut all = vec![codes, v];
    all.extend(kept);
    if !fused(&all) {
        return naive::code_means(codes, v, kept, offset);
    }
    let means = Means {
        kept: kept.map(Tensor::detach),
        offset,
    };
    Ok(codes.apply2(v, means)?)
}

struct Means {
    kept: Option<Tensor>,
    offset: f64,
}

/// What all pairs of a sequence and a head read.
struct Sides<'a, T> {
    codes: Stack<'a, T>,
    v: Stack<'a, T>,
    pairs: usize,
    heads: usize,
    /// `κ` `[batch, length]`.
    kept: Option<&'a [T]>,
    offset: T,
}

impl<T: Real> Sides<'_, T> {
    /// Tokens, bits and width of values.
    fn sizes(&self) -> [usize; 3] {
        [self.codes.rows, self.codes.columns, self.v.columns]
    }

    /// Codes and values of some tokens of a pair.
    fn rows(&self, pair: usize, rows: &Range<usize>) -> [Matrix<'_, T>; 2] {
        [&self.codes, &self.v].map(|side| side.matrix(pair).part_of_rows(rows))
    }

    /// `κ` of some tokens of a pair, where not all are 1.
    fn kept(&self, pair: usize, rows: &Range<usize>) -> Option<&[T]> {
        let start = pair / self.heads.max(1) * self.codes.rows;
        let kept = self.kept?;
        Some(&kept[start + rows.start..start + rows.end])
    }
}

/// Sums over the tokens of every pair: `[bits, width]`, behind them `[bits]`, `[width]` and a number.
struct Sums<T> {
    all: Vec<T>,
    sizes: [usize; 3],
}

/// How many numbers the sums of a pair are.
fn size([_, bits, width]: [usize; 3]) -> usize {
    bits * width + bits + width + 1
}

/// The sums of a pair, one sort behind the other.
fn sorts<T>(sums: &mut [T], [_, bits, width]: [usize; 3]) -> [&mut [T]; 4] {
    let (products, rest) = sums.split_at_mut(bits * width);
    let (codes, rest) = rest.split_at_mut(bits);
    let (values, count) = rest.split_at_mut(width);
    [products, codes, values, count]
}

/// Those of one pair.
struct OfPair<'a, T> {
    products: Matrix<'a, T>,
    codes: &'a [T],
    values: &'a [T],
    count: T,
}

impl<T: Real> Sums<T> {
    fn of(&self, pair: usize) -> OfPair<'_, T> {
        let [_, bits, width] = self.sizes;
        let sums = &self.all[pair * size(self.sizes)..(pair + 1) * size(self.sizes)];
        let (products, rest) = sums.split_at(bits * width);
        let (codes, rest) = rest.split_at(bits);
        OfPair {
            products: Matrix::packed(products, bits, width),
            codes,
            values: &rest[..width],
            count: rest[width],
        }
    }

    /// `S`, `z`, `s` and `n`.
    fn of_keys(sides: &Sides<T>) -> Self {
        let sizes = sides.sizes();
        let [length, bits, width] = sizes;
        let over = (sides.pairs, length);
        let all = summed(over, size(sizes), bits * width / 8, |pair, rows, sums| {
            let [codes, v] = sides.rows(pair, &rows);
            let [products, of_codes, of_values, count] = sorts(sums, sizes);
            let kept = sides.kept(pair, &rows);
            let mut there = Vec::new();
            let keys = match kept {
                None => codes,
                Some(kept) => {
                    there.resize(rows.len() * bits, T::zero());
                    for ((row, there), kept) in
                        there.chunks_exact_mut(bits.max(1)).enumerate().zip(kept)
                    {
                        add_row(&codes, row, *kept, there);
                    }
                    Matrix::packed(&there, rows.len(), bits)
                }
            };
            add_product(products, keys.transposed(), v);
            simd::vectorised(
                #[inline(always)]
                || {
                    for row in 0..rows.len() {
                        let kept = kept.map_or(T::one(), |kept| kept[row]);
                        add_row(&codes, row, kept, of_codes);
                        add_row(&v, row, kept, of_values);
                        count[0] += kept;
                    }
                },
            );
        });
        Self { all, sizes }
    }
}

/// `y`, packed.
fn forward<T: Real>(sides: &Sides<T>) -> Vec<T> {
    let sums = Sums::of_keys(sides);
    let [length, bits, width] = sides.sizes();
    let mut result = host::unwritten::<T>(sides.pairs * length * width);
    let shared = Shared::new(&mut result);
    let over = (sides.pairs, length);
    in_blocks(over, bits * width / 8 + width, |pair, rows| {
        let ([codes, _], sums) = (sides.rows(pair, &rows), sums.of(pair));
        // SAFETY: each block of rows of a pair is one item.
        let y = unsafe { shared.part((pair * length + rows.start) * width, rows.len() * width) };
        product(y, codes, sums.products);
        simd::vectorised(
            #[inline(always)]
            || {
                let constant = sides.offset * sums.count;
                for (row, y) in y.chunks_exact_mut(width.max(1)).enumerate() {
                    let scale = reciprocal(along(&codes, row, sums.codes) + constant);
                    for (y, value) in y.iter_mut().zip(sums.values) {
                        *y = (*y + sides.offset * *value) * scale;
                    }
                }
            },
        );
    });
    result
}

/// Gradients of codes and values, packed, for `y` and its gradient in order.
fn backward<T: Real>(sides: &Sides<T>, y: &[T], gradient: &[T]) -> [Vec<T>; 2] {
    let sums = Sums::of_keys(sides);
    let sizes = sides.sizes();
    let [length, bits, width] = sizes;
    let over = (sides.pairs, length);
    let mut of_codes = host::unwritten::<T>(sides.pairs * length * bits);
    let shared = Shared::new(&mut of_codes);
    // B, ζ and c; what queries' codes get is written on the way.
    let all = summed(over, size(sizes), bits * width / 4, |pair, rows, all| {
        let [products, codes_sum, values_sum, _] = sorts(all, sizes);
        let sums = sums.of(pair);
        let mut slopes = host::unwritten::<T>(BLOCK.min(rows.len()) * width);
        for start in rows.clone().step_by(BLOCK) {
            let rows = start..rows.end.min(start + BLOCK);
            let [codes, _] = sides.rows(pair, &rows);
            let slopes = &mut slopes[..rows.len() * width];
            let first = pair * length + rows.start;
            let mut heights = [T::zero(); BLOCK];
            simd::vectorised(
                #[inline(always)]
                || {
                    let constant = sides.offset * sums.count;
                    for (row, height) in heights.iter_mut().enumerate().take(rows.len()) {
                        let at = (first + row) * width..(first + row + 1) * width;
                        let scale = reciprocal(along(&codes, row, sums.codes) + constant);
                        let to = &mut slopes[row * width..(row + 1) * width];
                        *height = split(scale, &gradient[at.clone()], &y[at], to);
                        add_row(&codes, row, *height, codes_sum);
                        simd::add_scaled(values_sum, to, T::one());
                    }
                },
            );
            let slopes = Matrix::packed(slopes, rows.len(), width);
            add_product(products, codes.transposed(), slopes);
            // SAFETY: each block of rows of a pair is in one item.
            let of_codes = unsafe { shared.part(first * bits, rows.len() * bits) };
            product(of_codes, slopes, sums.products.transposed());
            simd::vectorised(
                #[inline(always)]
                || {
                    let rows = of_codes.chunks_exact_mut(bits.max(1));
                    for (of_codes, height) in rows.zip(&heights) {
                        simd::add_scaled(of_codes, sums.codes, *height);
                    }
                },
            );
        }
    });
    let slopes = Sums { all, sizes };
    let mut of_values = host::unwritten::<T>(sides.pairs * length * width);
    let shared = (Shared::new(&mut of_codes), Shared::new(&mut of_values));
    in_blocks(over, bits * width / 4, |pair, rows| {
        let ([codes, v], slopes) = (sides.rows(pair, &rows), slopes.of(pair));
        let (first, count) = (pair * length + rows.start, rows.len());
        // SAFETY: each block of rows of a pair is one item.
        let (of_codes, of_values) = unsafe {
            let of_values = shared.1.part(first * width, count * width);
            (shared.0.part(first * bits, count * bits), of_values)
        };
        let mut of_keys = host::unwritten::<T>(count * bits);
        product(of_values, codes, slopes.products);
        product(&mut of_keys, v, slopes.products.transposed());
        let kept = sides.kept(pair, &rows);
        simd::vectorised(
            #[inline(always)]
            || {
                for (row, of_values) in of_values.chunks_exact_mut(width.max(1)).enumerate() {
                    let kept = kept.map_or(T::one(), |kept| kept[row]);
                    for (to, value) in of_values.iter_mut().zip(slopes.values) {
                        *to = kept * (*to + sides.offset * *value);
                    }
                }
                let rows = of_codes.chunks_exact_mut(bits.max(1));
                let rows = rows.zip(of_keys.chunks_exact(bits.max(1)));
                for (row, (of_codes, of_keys)) in rows.enumerate() {
                    let kept = kept.map_or(T::one(), |kept| kept[row]);
                    simd::add_scaled(of_codes, of_keys, kept);
                    simd::add_scaled(of_codes, slopes.codes, kept);
                }
            },
        );
    });
    [of_codes, of_values]
}

impl Means {
    /// `body` on both sides.
    fn sides<T: Real, R>(
        &self,
        [codes, v]: [(&CpuStorage, &Layout); 2],
        body: impl FnOnce(&Sides<T>) -> R,
    ) -> Candle<R> {
        let pairs = &codes.1.dims()[..2];
        let kept = self.kept.as_ref().map(Host::new);
        let kept = kept.as_ref().map(Host::ordered::<T>).transpose()?;
        Ok(body(&Sides {
            codes: Stack::new(codes.0, codes.1, pairs)?,
            v: Stack::new(v.0, v.1, pairs)?,
            pairs: pairs.iter().product(),
            heads: pairs[1],
            kept: kept.as_deref(),
            offset: T::of(self.offset),
        }))
    }
}

impl CustomOp2 for Means {
    fn name(&self) -> &'static str {
        "code means"
    }

    fn cpu_fwd(
        &self,
        codes: &CpuStorage,
        codes_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Candle<(CpuStorage, Shape)> {
        let shape = v_layout.shape().clone();
        by_dtype!(host::dtype(v), T => {
            let y = self.sides::<T, _>([(codes, codes_layout), (v, v_layout)], forward)?;
            Ok((T::to_cpu_storage_owned(y), shape))
        })
    }

    fn bwd(
        &self,
        codes: &Tensor,
        v: &Tensor,
        y: &Tensor,
        gradient: &Tensor,
    ) -> Candle<(Option<Tensor>, Option<Tensor>)> {
        let [b, values, y, gradient] = &[codes, v, y, gradient].map(Host::new);
        by_dtype!(v.dtype(), T => {
            let (y, gradient) = (y.ordered::<T>()?, gradient.ordered::<T>()?);
            let sides = [(b.storage()?, b.layout), (values.storage()?, values.layout)];
            let slopes = self.sides::<T, _>(sides, |sides| backward(sides, &y, &gradient))?;
            let [dc, dv] = slopes;
            Ok((host::wanted(codes, dc)?, host::wanted(v, dv)?))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{difference, gradient_error};
    use crate::test_data::{arange, compare};
    use crate::{DType, Device, Var};

    /// Tokens of a sequence, bits and width.
    const SIZES: [[usize; 3]; 5] = [
        [1, 1, 1],
        [3, 16, 64],
        [130, 5, 7],
        [64, 33, 8],
        [1100, 16, 24],
    ];

    fn inputs([length, bits, width]: [usize; 3], dtype: DType) -> [Tensor; 2] {
        let codes = arange(&[2, 3, length, bits], 1.0, dtype);
        let signs = codes.ge(0.0).unwrap().to_dtype(dtype).unwrap();
        // Values with heads side by side, as a projection leaves them.
        let v = arange(&[2, length, 3, width], 2.0, dtype);
        [
            ((signs * 2.0).unwrap() - 1.0).unwrap(),
            v.transpose(1, 2).unwrap(),
        ]
    }

    /// Every third token of the first sequence is left out, and all of the second.
    fn kept(length: usize, dtype: DType) -> Tensor {
        let all =
            (0..2 * length).map(|token| f64::from(u8::from(token < length && token % 3 != 1)));
        let all = Tensor::from_vec(all.collect::<Vec<_>>(), (2, 1, length, 1), &Device::Cpu);
        all.unwrap().to_dtype(dtype).unwrap()
    }

    #[test]
    fn equal_the_composition() {
        for sizes in SIZES {
            for masked in [false, true] {
                compare(2e-5, |dtype| {
                    let [codes, v] = inputs(sizes, dtype);
                    let kept = masked.then(|| kept(sizes[0], dtype));
                    let offset = sizes[1] as f64 + 1.0;
                    let ours = code_means(&codes, &v, kept.as_ref(), offset);
                    let plain = naive::code_means(&codes, &v, kept.as_ref(), offset);
                    (ours.unwrap(), plain.unwrap())
                });
            }
        }
    }

    #[test]
    fn are_those_of_every_pair() {
        let [length, bits, width] = [70, 4, 3];
        let [codes, v] = inputs([length, bits, width], DType::F64);
        let ours = code_means(&codes, &v, None, 5.0).unwrap();
        let weights = codes.matmul(&codes.t().unwrap()).unwrap();
        let weights = (weights + 5.0).unwrap();
        let sums = weights.sum_keepdim(3).unwrap();
        let plain = weights.broadcast_div(&sums).unwrap();
        let plain = plain.matmul(&v.contiguous().unwrap()).unwrap();
        assert!(difference(&ours, &plain).unwrap() < 1e-12);
    }

    #[test]
    fn gradients_equal_finite_differences() {
        for masked in [false, true] {
            let kept = masked.then(|| kept(5, DType::F64));
            let [codes, v] =
                [3, 2].map(|width| arange(&[2, 3, 5, width], width as f64, DType::F64));
            let of = |x: &[Tensor]| code_means(&x[0], &x[1], kept.as_ref(), 7.0);
            assert!(gradient_error(of, &[codes, v]).unwrap() < 1e-7);
        }
    }

    fn slopes(
        x: &[Tensor; 2],
        of: impl Fn(&Tensor, &Tensor) -> Result<Tensor>,
    ) -> (Tensor, [Tensor; 2]) {
        let x = [0, 1].map(|side: usize| Var::from_tensor(&x[side]).unwrap());
        let y = of(x[0].as_tensor(), x[1].as_tensor()).unwrap();
        let weights = arange(y.dims(), 4.0, y.dtype());
        let loss = (&y * weights).unwrap().sum_all().unwrap();
        let gradients = loss.backward().unwrap();
        let of = [0, 1].map(|side: usize| gradients.get(&x[side]).unwrap().clone());
        (y.detach(), of)
    }

    #[test]
    fn gradients_equal_those_of_the_composition() {
        for sizes in SIZES {
            for (dtype, tolerance) in [(DType::F64, 1e-10), (DType::F32, 2e-4)] {
                let kept = kept(sizes[0], dtype);
                let x = inputs(sizes, dtype);
                let (_, ours) = slopes(&x, |b, v| code_means(b, v, Some(&kept), 40.0));
                let (_, plain) = slopes(&x, |b, v| naive::code_means(b, v, Some(&kept), 40.0));
                for (ours, plain) in ours.iter().zip(&plain) {
                    assert!(
                        difference(ours, plain).unwrap() < tolerance,
                        "{sizes:?} {dtype:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn do_not_depend_on_the_number_of_threads() {
        let x = inputs([2100, 16, 24], DType::F32);
        let with = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
            let pool = pool.build().unwrap();
            pool.install(|| slopes(&x, |b, v| code_means(b, v, None, 17.0)))
        };
        let (one, of_one) = with(1);
        for threads in [2, 5] {
            let (many, of_many) = with(threads);
            assert_eq!(difference(&one, &many).unwrap(), 0.0);
            for (one, many) in of_one.iter().zip(&of_many) {
                assert_eq!(difference(one, many).unwrap(), 0.0);
            }
        }
    }

    #[test]
    fn wrong_shapes_are_named() {
        let [codes, v] = inputs([4, 3, 2], DType::F32);
        let said = |codes: &Tensor, v: &Tensor, kept: Option<&Tensor>| {
            code_means(codes, v, kept, 1.0).unwrap_err().to_string()
        };
        let other = arange(&[2, 3, 5, 2], 1.0, DType::F32);
        assert!(said(&codes, &other, None).contains("v is [2, 3, 5, 2]"));
        let kept = kept(5, DType::F32);
        assert!(said(&codes, &v, Some(&kept)).contains("kept is [2, 1, 5, 1]"));
    }
}
