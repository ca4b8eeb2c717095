//! The affine map `z = x Wᵀ + b`, and `y = f(z)` where an activation follows.
//!
//! The bias is written into the result first and the product accumulates on it. The backward
//! pass is `∂z = ∂y f'(z)`, `∂x = ∂z W`, `∂W = ∂zᵀ x`, `∂b = Σ_rows ∂z`. With the activation in the
//! same operation, `z` and `∂z` are not tensors of the graph, whose every gradient costs passes of
//! its own.

use crate::backward::Apply;
use crate::host::{self, Host, Shared, by_dtype, fused, rows_and_width};
use crate::product::{Into, Matrix, Threads, multiply};
use crate::simd::{self, Real};
use crate::{Activation, Error, Result, Tensor, elementwise, naive};
use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Shape};
use std::borrow::Cow;
use std::sync::OnceLock;

type Candle<T> = candle_core::Result<T>;

/// `x Wᵀ + b` for `x` `[.., input]`, `weight` `[output, input]`, `bias` `[output]`.
///
/// `weight` may be a transposed view: it is read where it lies.
///
/// # Errors
/// When the shapes do not fit each other.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    linear_activation(x, weight, bias, Activation::Identity)
}

/// `f(x Wᵀ + b)`, with shapes as in [`linear`].
///
/// # Errors
/// When the shapes do not fit each other.
pub fn linear_activation(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    activation: Activation,
) -> Result<Tensor> {
    let (output, input) = weight.dims2()?;
    if x.dims().last() != Some(&input) {
        return Err(Error::argument(
            "linear",
            "x",
            x.dims(),
            format!("[.., {input}]"),
        ));
    }
    let op = Linear {
        activation,
        preactivation: OnceLock::new(),
    };
    match bias {
        Some(bias) if bias.dims() != [output] => Err(Error::argument(
            "linear",
            "bias",
            bias.dims(),
            format!("[{output}]"),
        )),
        Some(bias) if fused(&[x, weight, bias]) => Ok(x.apply3(weight, bias, op)?),
        None if fused(&[x, weight]) => Ok(x.apply2(weight, op)?),
        _ => naive::activate(&naive::linear(x, weight, bias)?, activation),
    }
}

struct Linear {
    activation: Activation,
    /// `z`, where an activation follows it.
    preactivation: OnceLock<Tensor>,
}

/// A tensor seen as a matrix of its last dimension, copied only where no stride describes it.
struct Flat<'a, T: Clone> {
    data: Cow<'a, [T]>,
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a, T: Real> Flat<'a, T> {
    fn new(storage: &'a CpuStorage, layout: &Layout) -> Candle<Self> {
        let (rows, columns) = rows_and_width(layout.dims());
        Ok(match uniform_row_stride(layout) {
            Some(row_stride) => Self {
                data: Cow::Borrowed(&T::cpu_storage_as_slice(storage)?[layout.start_offset()..]),
                rows,
                columns,
                row_stride,
                column_stride: layout.stride().last().copied().unwrap_or(1),
            },
            None => Self {
                data: host::ordered(storage, layout)?,
                rows,
                columns,
                row_stride: columns,
                column_stride: 1,
            },
        })
    }

    fn matrix(&self) -> Matrix<'_, T> {
        Matrix {
            data: &self.data,
            rows: self.rows,
            columns: self.columns,
            row_stride: self.row_stride,
            column_stride: self.column_stride,
        }
    }
}

/// The distance between rows when all dimensions before the last step as one.
fn uniform_row_stride(layout: &Layout) -> Option<usize> {
    let (dims, strides) = (layout.dims(), layout.stride());
    let leading = dims.len().checked_sub(1)?;
    let mut uniform = None;
    let mut next = 0;
    for (&dim, &stride) in dims[..leading].iter().zip(&strides[..leading]).rev() {
        if dim == 1 {
            continue;
        }
        match uniform {
            None => uniform = Some(stride),
            Some(_) if stride == next => {}
            Some(_) => return None,
        }
        next = stride * dim;
    }
    Some(uniform.unwrap_or(dims[leading]))
}

impl Linear {
    fn forward<T: Real>(
        &self,
        x: (&CpuStorage, &Layout),
        weight: (&CpuStorage, &Layout),
        bias: Option<(&CpuStorage, &Layout)>,
    ) -> Candle<(CpuStorage, Shape)> {
        let x_flat = Flat::<T>::new(x.0, x.1)?;
        let w = Flat::<T>::new(weight.0, weight.1)?;
        let (rows, output) = (x_flat.rows, w.rows);
        let mut y = host::unwritten(rows * output);
        let into = match bias {
            Some((storage, layout)) => {
                let bias = host::ordered::<T>(storage, layout)?;
                for row in y.chunks_exact_mut(output.max(1)) {
                    row.copy_from_slice(&bias);
                }
                Into::Add
            }
            None => Into::Replace,
        };
        multiply(
            &mut y,
            output,
            into,
            T::one(),
            x_flat.matrix(),
            w.matrix().transposed(),
            Threads::All,
        );
        let mut dims = x.1.dims().to_vec();
        if let Some(last) = dims.last_mut() {
            *last = output;
        }
        if self.activation != Activation::Identity {
            let z = std::mem::take(&mut y);
            y = elementwise::values(self.activation, &z);
            // A second forward of the same operation would give the same numbers.
            let _ = self.preactivation.set(host::tensor(z, &dims[..])?);
        }
        Ok((T::to_cpu_storage_owned(y), Shape::from(dims)))
    }

    fn backward<T: Real>(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        gradient: &Tensor,
    ) -> Candle<[Option<Tensor>; 3]> {
        let (x_host, w_host, g_host) = (Host::new(x), Host::new(weight), Host::new(gradient));
        let x_flat = Flat::<T>::new(x_host.storage()?, x_host.layout)?;
        let w = Flat::<T>::new(w_host.storage()?, w_host.layout)?;
        let g = match self.preactivation.get() {
            Some(z) => {
                let z = Host::new(z);
                let slope =
                    elementwise::chain(self.activation, &z.ordered::<T>()?, &g_host.ordered()?);
                Cow::Owned(slope)
            }
            None => g_host.ordered::<T>()?,
        };
        let (rows, input, output) = (x_flat.rows, w.columns, w.rows);
        let g_matrix = Matrix::packed(&g, rows, output);
        let product = |a, b, dims: &[usize], width: usize| {
            let mut result = host::unwritten::<T>(dims.iter().product());
            multiply(
                &mut result,
                width,
                Into::Replace,
                T::one(),
                a,
                b,
                Threads::All,
            );
            host::tensor(result, dims)
        };
        let dx = x
            .track_op()
            .then(|| product(g_matrix, w.matrix(), x.dims(), input))
            .transpose()?;
        let dw = weight
            .track_op()
            .then(|| product(g_matrix.transposed(), x_flat.matrix(), weight.dims(), input))
            .transpose()?;
        let db = bias
            .filter(|bias| bias.track_op())
            .map(|bias| host::tensor(sum_rows(&g, output), bias.dims()))
            .transpose()?;
        Ok([dx, dw, db])
    }
}

/// Sum of the rows of a matrix, in a fixed order.
pub(crate) fn sum_rows<T: Real>(matrix: &[T], columns: usize) -> Vec<T> {
    let mut total = vec![T::zero(); columns];
    if columns == 0 || matrix.is_empty() {
        return total;
    }
    let shared = Shared::new(&mut total);
    let rows = matrix.len() / columns;
    // Columns are shared out in blocks, so that no sum depends on the number of threads.
    const BLOCK: usize = 64;
    host::share(columns.div_ceil(BLOCK), rows * BLOCK, |blocks| {
        simd::vectorised(
            #[inline(always)]
            || {
                for block in blocks.clone() {
                    let start = block * BLOCK;
                    let width = BLOCK.min(columns - start);
                    // SAFETY: column blocks are disjoint.
                    let part = unsafe { shared.part(start, width) };
                    if width == BLOCK {
                        let mut sums = [T::zero(); BLOCK];
                        for row in matrix.chunks_exact(columns) {
                            for (s, &v) in sums.iter_mut().zip(&row[start..start + BLOCK]) {
                                *s += v;
                            }
                        }
                        part.copy_from_slice(&sums);
                    } else {
                        for row in matrix.chunks_exact(columns) {
                            for (s, &v) in part.iter_mut().zip(&row[start..start + width]) {
                                *s += v;
                            }
                        }
                    }
                }
            },
        )
    });
    total
}

impl CustomOp2 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Candle<(CpuStorage, Shape)> {
        by_dtype!(host::dtype(x), T => self.forward::<T>((x, x_layout), (weight, weight_layout), None))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Candle<(Option<Tensor>, Option<Tensor>)> {
        let [dx, dw, _] = by_dtype!(x.dtype(), T => self.backward::<T>(x, weight, None, gradient))?;
        Ok((dx, dw))
    }
}

impl CustomOp3 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> Candle<(CpuStorage, Shape)> {
        by_dtype!(host::dtype(x), T => self.forward::<T>(
            (x, x_layout),
            (weight, weight_layout),
            Some((bias, bias_layout)),
        ))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        bias: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Candle<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [dx, dw, db] =
            by_dtype!(x.dtype(), T => self.backward::<T>(x, weight, Some(bias), gradient))?;
        Ok((dx, dw, db))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::{difference, gradient_error};
    use crate::test_data::{arange, compare};
    use proptest::prelude::*;

    #[test]
    fn equals_the_composition_on_odd_sizes() {
        for dims in [vec![1], vec![7], vec![2, 3], vec![0], vec![3, 1, 5]] {
            for (input, output) in [(1, 1), (5, 3), (17, 33), (64, 70)] {
                let mut shape = dims.clone();
                shape.push(input);
                compare(1e-5, |dtype| {
                    let x = arange(&shape, 1.0, dtype);
                    let w = arange(&[output, input], 2.0, dtype);
                    let b = arange(&[output], 3.0, dtype);
                    (
                        linear(&x, &w, Some(&b)).unwrap(),
                        naive::linear(&x, &w, Some(&b)).unwrap(),
                    )
                });
            }
        }
    }

    #[test]
    fn an_activation_after_it_equals_the_composition() {
        for activation in Activation::ALL {
            compare(1e-5, |dtype| {
                let x = arange(&[2, 3, 17], 1.0, dtype);
                let w = arange(&[33, 17], 2.0, dtype);
                let b = arange(&[33], 3.0, dtype);
                let plain = naive::linear(&x, &w, Some(&b)).unwrap();
                (
                    linear_activation(&x, &w, Some(&b), activation).unwrap(),
                    naive::activate(&plain, activation).unwrap(),
                )
            });
        }
    }

    #[test]
    fn reads_strided_arguments_where_they_lie() {
        compare(1e-5, |dtype| {
            let x = arange(&[4, 6, 10], 1.0, dtype)
                .transpose(0, 1)
                .unwrap()
                .narrow(2, 1, 8)
                .unwrap();
            let w = arange(&[8, 5], 2.0, dtype).t().unwrap();
            (
                linear(&x, &w, None).unwrap(),
                naive::linear(&x.contiguous().unwrap(), &w, None).unwrap(),
            )
        });
        compare(1e-5, |dtype| {
            let x = arange(&[7, 9], 1.0, dtype).t().unwrap();
            let w = arange(&[3, 7], 2.0, dtype);
            (
                linear(&x, &w, None).unwrap(),
                naive::linear(&x.contiguous().unwrap(), &w, None).unwrap(),
            )
        });
    }

    #[test]
    fn gradients() {
        let f64 = crate::DType::F64;
        let x = arange(&[2, 3, 5], 1.0, f64);
        let w = arange(&[4, 5], 2.0, f64);
        let b = arange(&[4], 3.0, f64);
        let with_bias = |a: &[Tensor]| linear(&a[0], &a[1], Some(&a[2]));
        assert!(gradient_error(with_bias, &[x.clone(), w.clone(), b.clone()]).unwrap() < 1e-8);
        for activation in [Activation::Gelu, Activation::Silu, Activation::Tanh] {
            let f = |a: &[Tensor]| linear_activation(&a[0], &a[1], Some(&a[2]), activation);
            assert!(gradient_error(f, &[x.clone(), w.clone(), b.clone()]).unwrap() < 1e-8);
            let f = |a: &[Tensor]| linear_activation(&a[0], &a[1], None, activation);
            assert!(gradient_error(f, &[x.clone(), w.clone()]).unwrap() < 1e-8);
        }
        let transposed = |a: &[Tensor]| {
            let x = a[0].transpose(0, 1)?;
            linear(&x, &a[1].t()?, None)
        };
        let w = w.t().unwrap().contiguous().unwrap();
        assert!(gradient_error(transposed, &[x, w]).unwrap() < 1e-8);
    }

    #[test]
    fn wrong_shapes_are_named() {
        let f = crate::DType::F32;
        let x = arange(&[2, 3], 1.0, f);
        let message = linear(&x, &arange(&[4, 5], 1.0, f), None)
            .unwrap_err()
            .to_string();
        assert!(message.contains("linear") && message.contains("[.., 5]"));
        assert!(linear(&x, &arange(&[4, 3], 1.0, f), Some(&arange(&[3], 1.0, f))).is_err());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn any_shape(rows in 0usize..40, input in 1usize..40, output in 1usize..90) {
            let dtype = crate::DType::F32;
            let x = arange(&[rows, input], 1.0, dtype);
            let w = arange(&[output, input], 2.0, dtype);
            let b = arange(&[output], 3.0, dtype);
            let fused = linear(&x, &w, Some(&b)).unwrap();
            let plain = naive::linear(&x, &w, Some(&b)).unwrap();
            prop_assert!(difference(&fused, &plain).unwrap() < 1e-4);
        }
    }
}
