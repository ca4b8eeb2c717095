//! Stacks of matrices inside a tensor's storage, wherever they lie.

use crate::product::Matrix;
use crate::simd::Real;
use candle_core::{CpuStorage, Layout};

type Candle<T> = candle_core::Result<T>;

/// Matrices inside one storage, one for each pair.
pub(crate) struct Stack<'a, T> {
    pub(crate) data: &'a [T],
    /// Where the matrix of each pair starts.
    pub(crate) starts: Vec<usize>,
    pub(crate) rows: usize,
    pub(crate) columns: usize,
    pub(crate) row_stride: usize,
    pub(crate) column_stride: usize,
}

impl<'a, T: Real> Stack<'a, T> {
    pub(crate) fn new(storage: &'a CpuStorage, layout: &Layout, pairs: &[usize]) -> Candle<Self> {
        let (dims, strides) = (layout.dims(), layout.stride());
        let at = dims.len() - 2;
        Ok(Self {
            data: T::cpu_storage_as_slice(storage)?,
            starts: places(layout, pairs)?,
            rows: dims[at],
            columns: dims[at + 1],
            row_stride: strides[at],
            column_stride: strides[at + 1],
        })
    }

    /// Matrices `[pairs, rows, columns]`, one behind the other.
    pub(crate) fn packed(data: &'a [T], [pairs, rows, columns]: [usize; 3]) -> Self {
        Self {
            data,
            starts: (0..pairs).map(|pair| pair * rows * columns).collect(),
            rows,
            columns,
            row_stride: columns,
            column_stride: 1,
        }
    }

    pub(crate) fn matrix(&self, pair: usize) -> Matrix<'_, T> {
        Matrix {
            data: self.data.get(self.starts[pair]..).unwrap_or(&[]),
            rows: self.rows,
            columns: self.columns,
            row_stride: self.row_stride,
            column_stride: self.column_stride,
        }
    }

    pub(crate) fn transposed(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }
}

/// Where the matrix of each pair starts when the matrices of `layout` are broadcast to `pairs`.
pub(crate) fn places(layout: &Layout, pairs: &[usize]) -> Candle<Vec<usize>> {
    let matrix = &layout.dims()[layout.dims().len() - 2..];
    let full = layout.broadcast_as([pairs, matrix].concat())?;
    let mut places = vec![full.start_offset()];
    for (&dim, &stride) in pairs.iter().zip(full.stride()) {
        places = places
            .iter()
            .flat_map(|place| (0..dim).map(move |index| place + index * stride))
            .collect();
    }
    Ok(places)
}
