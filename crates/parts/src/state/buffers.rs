//! Rows that one is appended to at a time.

use crate::error::tensor;
use crate::{Error, Result};
use lapidary_kernels::Tensor;

const LEAST: usize = 16;

/// Rows of a few sorts, such as keys and values, `[sequences, columns, width]` each, in buffers that
/// grow by doubling, so that appending a column copies one column.
#[derive(Debug)]
pub struct Buffers {
    sorts: Vec<Tensor>,
    length: usize,
}

impl Buffers {
    /// Buffers that hold `rows`, one tensor for each sort.
    pub fn new(rows: &[&Tensor]) -> Result<Self> {
        let length = columns(rows)?;
        let capacity = (length + 1).next_power_of_two().max(LEAST);
        let sorts = rows.iter().map(|rows| roomy(rows, length, capacity));
        Ok(Self {
            sorts: sorts.collect::<Result<_>>()?,
            length,
        })
    }

    /// Buffers for rows like these that hold none yet.
    pub fn empty(like: &[&Tensor]) -> Result<Self> {
        let sorts = like.iter().map(|rows| roomy(rows, 0, LEAST));
        Ok(Self {
            sorts: sorts.collect::<Result<_>>()?,
            length: 0,
        })
    }

    /// Sorts of rows.
    pub fn sorts(&self) -> usize {
        self.sorts.len()
    }

    /// Columns held.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Columns that there is room for.
    pub fn capacity(&self) -> usize {
        let first = self.sorts.first();
        first.map_or(0, |buffer| buffer.dims().get(1).copied().unwrap_or(0))
    }

    /// Whether the next column makes the buffers grow.
    pub fn is_full(&self) -> bool {
        self.length >= self.capacity()
    }

    /// Appends as many columns of each sort.
    ///
    /// # Errors
    /// When they are of other sequences or widths than those held.
    pub fn append(&mut self, rows: &[&Tensor]) -> Result<()> {
        let length = self.length + columns(rows)?;
        if length > self.capacity() {
            let capacity = length.next_power_of_two();
            for buffer in &mut self.sorts {
                *buffer = roomy(buffer, self.length, capacity)?;
            }
        }
        for (buffer, rows) in self.sorts.iter().zip(rows) {
            let (batch, _, width) = tensor(rows.dims3())?;
            let (known_batch, _, known_width) = tensor(buffer.dims3())?;
            if (batch, width) != (known_batch, known_width) {
                return Err(Error::spec(
                    "batch and width of the decode state",
                    (known_batch, known_width),
                    format!("{:?}, as in this pass", (batch, width)),
                ));
            }
            tensor(buffer.slice_set(&tensor(rows.detach().contiguous())?, 1, self.length))?;
        }
        self.length = length;
        Ok(())
    }

    /// All of one sort, `[sequences, columns, width]`, without a copy.
    pub fn all(&self, sort: usize) -> Result<Tensor> {
        tensor(self.buffer(sort)?.narrow(1, 0, self.length))
    }

    /// Some columns of one sort, `[sequences, picked, width]`; no others are read.
    pub fn pick(&self, sort: usize, columns: &[usize]) -> Result<Tensor> {
        picked(self.buffer(sort)?, columns)
    }

    /// Forgets all columns but these, and leaves room for as many again.
    pub fn retain(&mut self, columns: &[usize]) -> Result<()> {
        let (kept, capacity) = (columns.len(), (2 * columns.len()).max(LEAST));
        for buffer in &mut self.sorts {
            *buffer = match kept {
                0 => roomy(buffer, 0, capacity)?,
                _ => roomy(&picked(buffer, columns)?, kept, capacity)?,
            };
        }
        self.length = kept;
        Ok(())
    }

    fn buffer(&self, sort: usize) -> Result<&Tensor> {
        self.sorts.get(sort).ok_or_else(|| {
            let count = self.sorts.len();
            Error::spec("sort of rows", sort, format!("below {count}"))
        })
    }
}

fn columns(rows: &[&Tensor]) -> Result<usize> {
    rows.first().map_or(Ok(0), |rows| tensor(rows.dim(1)))
}

/// The first `length` columns of `x` `[sequences, columns, width]` with room for `capacity`.
fn roomy(x: &Tensor, length: usize, capacity: usize) -> Result<Tensor> {
    let (sequences, _, width) = tensor(x.dims3())?;
    let shape = (sequences, capacity.max(length), width);
    let buffer = tensor(Tensor::zeros(shape, x.dtype(), x.device()))?;
    if length > 0 {
        let rows = tensor(tensor(x.detach().narrow(1, 0, length))?.contiguous())?;
        tensor(buffer.slice_set(&rows, 1, 0))?;
    }
    Ok(buffer)
}

fn picked(x: &Tensor, columns: &[usize]) -> Result<Tensor> {
    let columns: Vec<u32> = columns.iter().map(|column| *column as u32).collect();
    let count = columns.len();
    let columns = tensor(Tensor::from_vec(columns, count, x.device()))?;
    tensor(x.index_select(&columns, 1))
}

#[cfg(test)]
mod tests {
    use super::*;
    use lapidary_kernels::{DType, Device};

    fn column(value: f64) -> Tensor {
        (Tensor::ones((2, 1, 3), DType::F64, &Device::Cpu).unwrap() * value).unwrap()
    }

    fn firsts(buffers: &Buffers) -> Vec<f64> {
        let all = buffers.all(0).unwrap().narrow(2, 0, 1).unwrap();
        all.get(1)
            .unwrap()
            .flatten_all()
            .unwrap()
            .to_vec1()
            .unwrap()
    }

    #[test]
    fn columns_are_appended_picked_and_forgotten() {
        let mut buffers = Buffers::empty(&[&column(0.0)]).unwrap();
        for value in 0..40 {
            buffers.append(&[&column(f64::from(value))]).unwrap();
        }
        assert_eq!(firsts(&buffers), (0..40).map(f64::from).collect::<Vec<_>>());
        assert_eq!(buffers.capacity(), 64);
        let picked = buffers.pick(0, &[3, 30]).unwrap();
        assert_eq!(picked.dims(), [2, 2, 3]);
        buffers.retain(&[1, 5, 39]).unwrap();
        assert_eq!((buffers.len(), buffers.capacity()), (3, LEAST));
        buffers.append(&[&column(40.0)]).unwrap();
        assert_eq!(firsts(&buffers), [1.0, 5.0, 39.0, 40.0]);
        buffers.retain(&[]).unwrap();
        assert!(buffers.is_empty());
        assert!(
            buffers
                .append(&[&column(1.0).narrow(2, 0, 2).unwrap()])
                .is_err()
        );
    }
}
