//! A bit for each entry, and the entries that are not zero one after another.

use super::{START, Walk, dense, product, restored};
use crate::{Result, Tensor};

/// Bits of a word.
pub(super) const WORD: usize = 64;

/// Words for the bits of a row.
pub(super) fn words(columns: usize) -> usize {
    columns.div_ceil(WORD)
}

/// A matrix `[rows, columns]` as a bit for each entry and the entries that are not zero.
#[derive(Clone, Debug)]
pub struct BitmapMatrix {
    rows: usize,
    columns: usize,
    /// Where each row's values start, and where the last ends.
    starts: Vec<u32>,
    /// Each row's bits, the first column lowest.
    bits: Vec<u64>,
    values: Vec<f32>,
}

impl BitmapMatrix {
    /// Stores a matrix `[rows, columns]` in `f32`.
    ///
    /// # Errors
    /// For other shapes and types, and those of the tensor engine.
    pub fn from_dense(matrix: &Tensor) -> Result<Self> {
        let (rows, columns, all) = dense("BitmapMatrix", matrix)?;
        let (mut starts, mut bits, mut values) = (vec![0u32], Vec::new(), Vec::new());
        for row in (0..rows).map(|row| &all[row * columns..(row + 1) * columns]) {
            for part in row.chunks(WORD) {
                let mut word = 0u64;
                for (place, value) in part.iter().enumerate() {
                    if *value != 0.0 {
                        word |= 1 << place;
                        values.push(*value);
                    }
                }
                bits.push(word);
            }
            starts.push(values.len() as u32);
        }
        Ok(Self {
            rows,
            columns,
            starts,
            bits,
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
        product("BitmapMatrix", self, x)
    }

    /// Bytes that it takes.
    pub fn bytes(&self) -> usize {
        4 * self.values.len() + WORD / 8 * self.bits.len() + START * self.starts.len()
    }
}

impl Walk for BitmapMatrix {
    fn shape(&self) -> (usize, usize) {
        (self.rows, self.columns)
    }

    #[inline(always)]
    fn each(&self, row: usize, mut body: impl FnMut(usize, f32)) {
        let words = words(self.columns);
        let mut values = self.values[self.starts[row] as usize..].iter();
        for (index, word) in self.bits[row * words..(row + 1) * words].iter().enumerate() {
            let mut left = *word;
            while left != 0 {
                let place = left.trailing_zeros() as usize;
                left &= left - 1;
                if let Some(value) = values.next() {
                    body(index * WORD + place, *value);
                }
            }
        }
    }

    fn dot(&self, row: usize, x: &[f32]) -> f32 {
        let mut sum = 0.0;
        self.each(row, |column, value| sum += value * x[column]);
        sum
    }

    fn work(&self) -> usize {
        self.values.len() / self.rows.max(1) + 1
    }
}
