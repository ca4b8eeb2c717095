//! Gathering, scattering and embedding look-up by index.

use crate::backward::Apply;
use crate::host::{self, Host, Shared, by_dtype, fused, rows_and_width};
use crate::simd::Real;
use crate::{DType, Error, Result, Tensor, naive};
use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Shape, WithDType};
use std::sync::Arc;

type Candle<T> = candle_core::Result<T>;

/// `y[.., i, ..] = x[.., indices[.., i, ..], ..]` along `dim`; `indices` (`u32`) has the shape of
/// the result.
///
/// # Errors
/// When the shapes differ outside `dim`, or an index is out of range.
pub fn gather(x: &Tensor, indices: &Tensor, dim: usize) -> Result<Tensor> {
    if !fused(&[x]) {
        return naive::gather(x, indices, dim);
    }
    let picks = Picks::new("gather", x.dims(), indices, dim)?;
    Ok(x.apply1(Gather(picks))?)
}

/// Adds `source` into a copy of `x`: `y[.., indices[.., i, ..], ..] += source[.., i, ..]`.
///
/// # Errors
/// When the shapes differ outside `dim`, or an index is out of range.
pub fn scatter_add(x: &Tensor, indices: &Tensor, source: &Tensor, dim: usize) -> Result<Tensor> {
    if !fused(&[x, source]) {
        return naive::scatter_add(x, indices, source, dim);
    }
    let picks = Picks::new("scatter_add", x.dims(), indices, dim)?;
    if source.dims() != indices.dims() {
        let expected = format!("{:?}", indices.dims());
        return Err(Error::argument(
            "scatter_add",
            "source",
            source.dims(),
            expected,
        ));
    }
    Ok(x.apply2(source, ScatterAdd(picks))?)
}

/// Rows of `table` `[vocabulary, width]` by `ids` (`u32`, any shape), giving `[.., width]`.
///
/// The backward pass touches only the rows that were looked up.
///
/// # Errors
/// When an id is not below the vocabulary.
pub fn embedding(table: &Tensor, ids: &Tensor) -> Result<Tensor> {
    let (vocabulary, width) = table.dims2()?;
    if ids.dtype() != DType::U32 {
        return Err(Error::argument("embedding", "ids", ids.dtype(), "u32"));
    }
    let mut dims = ids.dims().to_vec();
    dims.push(width);
    let flat = ids.flatten_all()?;
    if !fused(&[table]) {
        return Ok(table.index_select(&flat, 0)?.reshape(dims)?);
    }
    let ids = flat.to_vec1::<u32>()?;
    if let Some(id) = ids.iter().find(|&&id| id as usize >= vocabulary) {
        let expected = format!("below the vocabulary of {vocabulary}");
        return Err(Error::argument("embedding", "an id", id, expected));
    }
    Ok(table.apply1(Embedding { ids, dims })?)
}

/// Checked indices along one dimension: everything is seen as `[outer, length, inner]`.
#[derive(Clone)]
struct Picks {
    indices: Arc<Vec<u32>>,
    dims: Vec<usize>,
    /// Length along the dimension, of the tensor picked from and of the result.
    from: usize,
    to: usize,
    inner: usize,
}

impl Picks {
    fn new(kernel: &'static str, x: &[usize], indices: &Tensor, dim: usize) -> Result<Self> {
        let dims = indices.dims();
        let fits = dims.len() == x.len()
            && dim < x.len()
            && dims
                .iter()
                .zip(x)
                .enumerate()
                .all(|(d, (a, b))| d == dim || a == b);
        if !fits || indices.dtype() != DType::U32 {
            return Err(Error::argument(
                kernel,
                "indices",
                (dims, indices.dtype()),
                format!("{x:?} in u32, free only in dimension {dim}"),
            ));
        }
        let values = indices.flatten_all()?.to_vec1::<u32>()?;
        if let Some(index) = values.iter().find(|&&index| index as usize >= x[dim]) {
            let expected = format!("below {}", x[dim]);
            return Err(Error::argument(kernel, "an index", index, expected));
        }
        Ok(Self {
            indices: Arc::new(values),
            dims: dims.to_vec(),
            from: x[dim],
            to: dims[dim],
            inner: x[dim + 1..].iter().product(),
        })
    }

    fn gather<T: Real>(&self, x: &[T]) -> Vec<T> {
        let mut y = host::unwritten::<T>(self.indices.len());
        let block = self.to * self.inner;
        host::for_rows(
            &mut y,
            block,
            1,
            #[inline(always)]
            |outer, y| {
                let x = &x[outer * self.from * self.inner..][..self.from * self.inner];
                let indices = &self.indices[outer * block..][..block];
                if self.inner == 1 {
                    for (y, &index) in y.iter_mut().zip(indices) {
                        *y = x[index as usize];
                    }
                    return;
                }
                for (position, (y, &index)) in y.iter_mut().zip(indices).enumerate() {
                    *y = x[index as usize * self.inner + position % self.inner];
                }
            },
        );
        y
    }

    fn scatter_add<T: Real>(&self, into: &mut [T], source: &[T]) {
        let block = self.to * self.inner;
        host::for_rows(
            into,
            self.from * self.inner,
            1,
            #[inline(always)]
            |outer, into| {
                let indices = &self.indices[outer * block..][..block];
                let source = &source[outer * block..][..block];
                for (position, (&value, &index)) in source.iter().zip(indices).enumerate() {
                    into[index as usize * self.inner + position % self.inner] += value;
                }
            },
        );
    }
}

struct Gather(Picks);

impl CustomOp1 for Gather {
    fn name(&self) -> &'static str {
        "gather"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Candle<(CpuStorage, Shape)> {
        let y = by_dtype!(host::dtype(x), T => {
            Ok(T::to_cpu_storage_owned(self.0.gather(&host::ordered::<T>(x, layout)?)))
        })?;
        Ok((y, Shape::from(&self.0.dims[..])))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, gradient: &Tensor) -> Candle<Option<Tensor>> {
        let g = Host::new(gradient);
        by_dtype!(x.dtype(), T => {
            let mut dx = vec![T::default(); x.elem_count()];
            self.0.scatter_add(&mut dx, &g.ordered::<T>()?);
            host::tensor(dx, x.dims()).map(Some)
        })
    }
}

struct ScatterAdd(Picks);

impl CustomOp2 for ScatterAdd {
    fn name(&self) -> &'static str {
        "scatter_add"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        layout: &Layout,
        source: &CpuStorage,
        source_layout: &Layout,
    ) -> Candle<(CpuStorage, Shape)> {
        let y = by_dtype!(host::dtype(x), T => {
            let mut y = host::ordered::<T>(x, layout)?.into_owned();
            self.0.scatter_add(&mut y, &host::ordered::<T>(source, source_layout)?);
            Ok(T::to_cpu_storage_owned(y))
        })?;
        Ok((y, layout.shape().clone()))
    }

    fn bwd(
        &self,
        _: &Tensor,
        source: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Candle<(Option<Tensor>, Option<Tensor>)> {
        let g = Host::new(gradient);
        let d_source = by_dtype!(source.dtype(), T => {
            host::tensor(self.0.gather(&g.ordered::<T>()?), source.dims())
        })?;
        Ok((Some(gradient.clone()), Some(d_source)))
    }
}

struct Embedding {
    ids: Vec<u32>,
    dims: Vec<usize>,
}

impl Embedding {
    fn backward<T: Real>(&self, table: &Tensor, gradient: &Tensor) -> Candle<Tensor> {
        let (vocabulary, width) = rows_and_width(table.dims());
        let g_host = Host::new(gradient);
        let g = g_host.ordered::<T>()?;
        let mut d_table = vec![T::zero(); vocabulary * width];
        let shared = Shared::new(&mut d_table);
        // A task owns a range of ids and adds in the order of the text: no races, and the same
        // sums for any number of threads.
        let work = (self.ids.len() * width / vocabulary.max(1)).max(1);
        host::share(vocabulary, work, |range| {
            for (position, &id) in self.ids.iter().enumerate() {
                let id = id as usize;
                if range.contains(&id) {
                    // SAFETY: ids of different tasks differ.
                    let row = unsafe { shared.part(id * width, width) };
                    for (d, &g) in row.iter_mut().zip(&g[position * width..][..width]) {
                        *d += g;
                    }
                }
            }
        });
        host::tensor(d_table, table.dims())
    }
}

impl CustomOp1 for Embedding {
    fn name(&self) -> &'static str {
        "embedding"
    }

    fn cpu_fwd(&self, table: &CpuStorage, layout: &Layout) -> Candle<(CpuStorage, Shape)> {
        let width = layout.dims()[1];
        let y = by_dtype!(host::dtype(table), T => {
            let rows = host::Rows::<T>::new(table, layout)?;
            let mut y = host::unwritten::<T>(self.ids.len() * width);
            host::for_rows(&mut y, width, 1, #[inline(always)] |position, y| {
                y.copy_from_slice(rows.row(self.ids[position] as usize));
            });
            Ok(T::to_cpu_storage_owned(y))
        })?;
        Ok((y, Shape::from(&self.dims[..])))
    }

    fn bwd(&self, table: &Tensor, _: &Tensor, gradient: &Tensor) -> Candle<Option<Tensor>> {
        by_dtype!(table.dtype(), T => self.backward::<T>(table, gradient)).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Device;
    use crate::check::gradient_error;
    use crate::test_data::{arange, compare};

    fn indices(dims: &[usize], below: usize) -> Tensor {
        let count: usize = dims.iter().product();
        let values: Vec<u32> = (0..count).map(|i| (i * i % below) as u32).collect();
        Tensor::from_vec(values, dims, &Device::Cpu).unwrap()
    }

    #[test]
    fn equal_the_compositions_along_every_dimension() {
        for (dims, dim, to) in [
            (vec![7], 0, 3),
            (vec![3, 5], 1, 9),
            (vec![3, 5], 0, 2),
            (vec![2, 4, 3], 1, 6),
        ] {
            let mut picked = dims.clone();
            picked[dim] = to;
            compare(1e-6, |dtype| {
                let x = arange(&dims, 1.0, dtype);
                let at = indices(&picked, dims[dim]);
                let fused = gather(&x, &at, dim).unwrap();
                (fused, naive::gather(&x, &at, dim).unwrap())
            });
            compare(1e-5, |dtype| {
                let x = arange(&dims, 1.0, dtype);
                let source = arange(&picked, 2.0, dtype);
                let at = indices(&picked, dims[dim]);
                let fused = scatter_add(&x, &at, &source, dim).unwrap();
                (fused, naive::scatter_add(&x, &at, &source, dim).unwrap())
            });
        }
    }

    #[test]
    fn gradients() {
        let x = arange(&[4, 3, 2], 1.0, DType::F64);
        let at = indices(&[3, 5, 2], 4);
        let f = |a: &[Tensor]| gather(&a[0].transpose(0, 1)?, &at, 1);
        assert!(gradient_error(f, std::slice::from_ref(&x)).unwrap() < 1e-8);
        let source = arange(&[3, 5, 2], 2.0, DType::F64);
        let f = |a: &[Tensor]| scatter_add(&a[0].transpose(0, 1)?, &at, &a[1], 1);
        assert!(gradient_error(f, &[x, source]).unwrap() < 1e-8);
        let table = arange(&[6, 3], 1.0, DType::F64);
        let ids = Tensor::new(&[[0u32, 5, 0], [2, 2, 2]], &Device::Cpu).unwrap();
        let f = |a: &[Tensor]| embedding(&a[0], &ids);
        assert!(gradient_error(f, &[table]).unwrap() < 1e-8);
    }

    #[test]
    fn embedding_looks_up_rows() {
        let table = arange(&[5, 4], 1.0, DType::F32);
        let ids = Tensor::new(&[[4u32, 0], [1, 1]], &Device::Cpu).unwrap();
        let y = embedding(&table, &ids).unwrap();
        assert_eq!(y.dims(), [2, 2, 4]);
        let rows = table.to_vec2::<f32>().unwrap();
        let picked = y.flatten(0, 1).unwrap().to_vec2::<f32>().unwrap();
        assert_eq!(picked, [4, 0, 1, 1].map(|i: usize| rows[i].clone()));
        let strided = embedding(&table.t().unwrap().contiguous().unwrap().t().unwrap(), &ids);
        assert_eq!(
            strided
                .unwrap()
                .flatten(0, 1)
                .unwrap()
                .to_vec2::<f32>()
                .unwrap(),
            picked
        );
        let none = Tensor::zeros((0,), DType::U32, &Device::Cpu).unwrap();
        assert_eq!(embedding(&table, &none).unwrap().dims(), [0, 4]);
        let message = embedding(&table, &Tensor::new(&[5u32], &Device::Cpu).unwrap());
        assert!(message.unwrap_err().to_string().contains("vocabulary of 5"));
    }

    #[test]
    fn indices_out_of_range_are_refused() {
        let x = arange(&[2, 3], 1.0, DType::F32);
        let at = Tensor::new(&[[3u32], [0]], &Device::Cpu).unwrap();
        assert!(gather(&x, &at, 1).is_err());
        assert!(gather(&x, &at, 2).is_err());
        assert!(scatter_add(&x, &at, &x.narrow(1, 0, 1).unwrap(), 1).is_err());
    }
}
