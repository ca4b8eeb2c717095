//! Two of every four entries of a row, each with its place among the four in two bits: what the
//! sparse units of GPUs multiply (Mishra et al. 2021, arXiv 2104.08378).

use super::{Walk, dense, product, restored};
use crate::{Error, Result, Tensor};

/// Entries of a group, and how many of them are held.
const GROUP: usize = 4;
const HELD: usize = 2;

/// Bytes of the places of a matrix: half a byte for each group, row after row.
pub(super) fn index_bytes(rows: usize, columns: usize) -> usize {
    (rows * columns.div_ceil(GROUP)).div_ceil(2)
}

/// A matrix `[rows, columns]` with at most two entries in every four neighbours of a row; a last
/// group may be shorter.
#[derive(Clone, Debug)]
pub struct TwoOfFourMatrix {
    rows: usize,
    columns: usize,
    /// Two for each group; a zero where a group has fewer.
    values: Vec<f32>,
    /// Half a byte for each group: the first place in the lower two bits, then the second.
    places: Vec<u8>,
}

impl TwoOfFourMatrix {
    /// Stores a matrix `[rows, columns]` in `f32`.
    ///
    /// # Errors
    /// When a group has more than two entries, for other shapes and types, and those of the tensor
    /// engine.
    pub fn from_dense(matrix: &Tensor) -> Result<Self> {
        let (rows, columns, all) = dense("TwoOfFourMatrix", matrix)?;
        let mut values = Vec::with_capacity(rows * columns.div_ceil(GROUP) * HELD);
        let mut places = vec![0u8; index_bytes(rows, columns)];
        let groups = all
            .chunks(columns.max(1))
            .take(rows)
            .enumerate()
            .flat_map(|(row, values)| values.chunks(GROUP).map(move |group| (row, group)));
        for (index, (row, group)) in groups.enumerate() {
            let entries = group.iter().enumerate().filter(|(_, value)| **value != 0.0);
            if entries.clone().count() > HELD {
                return Err(Error::argument(
                    "TwoOfFourMatrix",
                    "matrix",
                    format!("{group:?} in row {row}"),
                    "at most two entries other than zero in every four",
                ));
            }
            let mut held = [(0, 0f32); HELD];
            for (slot, (place, value)) in held.iter_mut().zip(entries) {
                *slot = (place, *value);
            }
            let half = held[0].0 | held[1].0 << 2;
            places[index / 2] |= (half << (4 * (index % 2))) as u8;
            values.extend(held.map(|(_, value)| value));
        }
        Ok(Self {
            rows,
            columns,
            values,
            places,
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
        product("TwoOfFourMatrix", self, x)
    }

    /// Bytes that it takes.
    pub fn bytes(&self) -> usize {
        4 * self.values.len() + self.places.len()
    }
}

impl Walk for TwoOfFourMatrix {
    fn shape(&self) -> (usize, usize) {
        (self.rows, self.columns)
    }

    #[inline(always)]
    fn each(&self, row: usize, mut body: impl FnMut(usize, f32)) {
        let groups = self.columns.div_ceil(GROUP);
        for group in 0..groups {
            let index = row * groups + group;
            let half = self.places[index / 2] >> (4 * (index % 2));
            let first = GROUP * group;
            let [a, b] = [half & 3, (half >> 2) & 3].map(|place| first + place as usize);
            let (u, v) = (self.values[HELD * index], self.values[HELD * index + 1]);
            if u != 0.0 {
                body(a, u);
            }
            if v != 0.0 {
                body(b, v);
            }
        }
    }

    fn dot(&self, row: usize, x: &[f32]) -> f32 {
        let groups = self.columns.div_ceil(GROUP);
        let (mut first, mut second) = (0.0, 0.0);
        for group in 0..groups {
            let index = row * groups + group;
            let half = self.places[index / 2] >> (4 * (index % 2));
            let x = &x[GROUP * group..];
            // A value that fills up a group is zero, at a place that every group has.
            first += self.values[HELD * index] * x[(half & 3) as usize];
            second += self.values[HELD * index + 1] * x[((half >> 2) & 3) as usize];
        }
        first + second
    }

    fn work(&self) -> usize {
        self.columns / 2 + 1
    }
}
