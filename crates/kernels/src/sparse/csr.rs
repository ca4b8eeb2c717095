//! Compressed sparse rows: the entries of a row one after another, each with its column.

use super::{START, Walk, dense, product, restored};
use crate::{Result, Tensor};

/// Columns, as narrow as the matrix allows.
#[derive(Clone, Debug)]
enum Columns {
    Short(Vec<u16>),
    Long(Vec<u32>),
}

/// A matrix `[rows, columns]` as entries with their columns.
///
/// ```
/// use lapidary_kernels::{CsrMatrix, Device, Tensor};
/// let w = Tensor::new(&[[0f32, 2.0, 0.0], [0.0, 0.0, 3.0]], &Device::Cpu)?;
/// let sparse = CsrMatrix::from_dense(&w)?;
/// assert_eq!(sparse.entries(), 2);
/// let y = sparse.multiply(&Tensor::new(&[1f32, 10.0, 100.0], &Device::Cpu)?)?;
/// assert_eq!(y.to_vec1::<f32>()?, [20.0, 300.0]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct CsrMatrix {
    rows: usize,
    columns: usize,
    /// Where each row starts, and where the last ends.
    starts: Vec<u32>,
    indices: Columns,
    values: Vec<f32>,
}

/// Bytes of a column of a matrix with so many.
pub(super) fn index_bytes(columns: usize) -> usize {
    match columns <= 1 << 16 {
        true => 2,
        false => 4,
    }
}

impl CsrMatrix {
    /// Stores a matrix `[rows, columns]` in `f32`.
    ///
    /// # Errors
    /// For other shapes and types, and those of the tensor engine.
    pub fn from_dense(matrix: &Tensor) -> Result<Self> {
        let (rows, columns, all) = dense("CsrMatrix", matrix)?;
        let (mut starts, mut indices, mut values) = (vec![0u32], Vec::new(), Vec::new());
        for row in (0..rows).map(|row| &all[row * columns..(row + 1) * columns]) {
            for (column, value) in (0u32..).zip(row) {
                if *value != 0.0 {
                    indices.push(column);
                    values.push(*value);
                }
            }
            starts.push(values.len() as u32);
        }
        Ok(Self {
            rows,
            columns,
            starts,
            indices: match index_bytes(columns) {
                2 => Columns::Short(indices.into_iter().map(|column| column as u16).collect()),
                _ => Columns::Long(indices),
            },
            values,
        })
    }

    /// The matrix with its zeros.
    ///
    /// # Errors
    /// Those of the tensor engine.
    pub fn to_dense(&self) -> Result<Tensor> {
        restored(self)
    }

    /// `x Wᵀ` `[.., rows]` of `x` `[.., columns]`, as a linear layer multiplies.
    ///
    /// # Errors
    /// When `x` is of another width or type.
    pub fn multiply(&self, x: &Tensor) -> Result<Tensor> {
        product("CsrMatrix", self, x)
    }

    /// Entries that are not zero.
    pub fn entries(&self) -> usize {
        self.values.len()
    }

    /// Bytes that it takes.
    pub fn bytes(&self) -> usize {
        let indices = match &self.indices {
            Columns::Short(indices) => 2 * indices.len(),
            Columns::Long(indices) => 4 * indices.len(),
        };
        4 * self.values.len() + indices + START * self.starts.len()
    }

    fn range(&self, row: usize) -> std::ops::Range<usize> {
        self.starts[row] as usize..self.starts[row + 1] as usize
    }
}

impl Walk for CsrMatrix {
    fn shape(&self) -> (usize, usize) {
        (self.rows, self.columns)
    }

    #[inline(always)]
    fn each(&self, row: usize, mut body: impl FnMut(usize, f32)) {
        let range = self.range(row);
        let values = &self.values[range.clone()];
        match &self.indices {
            Columns::Short(indices) => {
                for (column, value) in indices[range].iter().zip(values) {
                    body(*column as usize, *value);
                }
            }
            Columns::Long(indices) => {
                for (column, value) in indices[range].iter().zip(values) {
                    body(*column as usize, *value);
                }
            }
        }
    }

    fn dot(&self, row: usize, x: &[f32]) -> f32 {
        let range = self.range(row);
        let values = &self.values[range.clone()];
        match &self.indices {
            Columns::Short(indices) => gathered(values, &indices[range], x),
            Columns::Long(indices) => gathered(values, &indices[range], x),
        }
    }

    fn work(&self) -> usize {
        self.values.len() / self.rows.max(1) + 1
    }
}

/// Sums that do not wait for one another.
const LANES: usize = 8;

/// `Σ v_k x[i_k]`.
fn gathered<I: Copy + Into<u32>>(values: &[f32], indices: &[I], x: &[f32]) -> f32 {
    let mut sums = [0f32; LANES];
    let (values_of, indices_of) = (values.chunks_exact(LANES), indices.chunks_exact(LANES));
    let rest = values_of.remainder().iter().zip(indices_of.remainder());
    let rest: f32 = rest.map(|(v, i)| v * x[(*i).into() as usize]).sum();
    for (v, i) in values_of.zip(indices_of) {
        for lane in 0..LANES {
            sums[lane] += v[lane] * x[i[lane].into() as usize];
        }
    }
    sums.iter().sum::<f32>() + rest
}
