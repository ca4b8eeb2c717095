//! Rows of tensors as products ask for them.

use crate::host;
use crate::product::{Into, Matrix, Repeated};
use crate::simd::{self, Real};
use candle_core::{CpuStorage, Layout};
use std::borrow::Cow;
use std::ops::Range;

type Candle<T> = candle_core::Result<T>;

/// Queries of a tile.
pub(super) const QUERIES: usize = 32;
/// Keys of a tile.
pub(super) const KEYS: usize = 3 * Repeated::<f32>::COLUMNS;

/// Rows of a tensor, where they lie, and perhaps others behind them.
pub(super) struct Table<'a, T: Clone> {
    data: Cow<'a, [T]>,
    starts: Vec<usize>,
    /// Rows of their own, packed.
    behind: &'a [T],
    pub(super) width: usize,
}

impl<'a, T: Real> Table<'a, T> {
    /// Those of the last dimension.
    pub(super) fn new(storage: &'a CpuStorage, layout: &Layout) -> Candle<Self> {
        let width = layout.dims().last().copied().unwrap_or(0);
        let adjacent = layout.stride().last() == Some(&1);
        let packed;
        let (data, layout) = if adjacent {
            (Cow::Borrowed(T::cpu_storage_as_slice(storage)?), layout)
        } else {
            packed = Layout::contiguous(layout.shape());
            (host::ordered(storage, layout)?, &packed)
        };
        let mut starts = vec![layout.start_offset()];
        let outer = layout.dims().len().saturating_sub(1);
        for (&dim, &stride) in layout.dims().iter().zip(layout.stride()).take(outer) {
            let mut each = Vec::with_capacity(starts.len() * dim);
            for start in starts {
                each.extend((0..dim).map(|at| start + at * stride));
            }
            starts = each;
        }
        Ok(Self {
            data,
            starts,
            behind: &[],
            width,
        })
    }

    /// Rows one behind the other.
    pub(super) fn packed(rows: &'a [T], width: usize) -> Self {
        Self {
            data: Cow::Borrowed(&[]),
            starts: Vec::new(),
            behind: rows,
            width,
        }
    }

    /// The same with packed rows behind them.
    pub(super) fn with(self, behind: &'a [T]) -> Self {
        Self { behind, ..self }
    }

    /// What a row lies in, and where.
    #[inline(always)]
    fn place(&self, row: u32) -> (bool, usize) {
        match self.starts.get(row as usize) {
            Some(start) => (true, *start),
            None => (false, (row as usize - self.starts.len()) * self.width),
        }
    }

    fn rows(&self, own: bool) -> &[T] {
        if own { &self.data } else { self.behind }
    }

    /// One row.
    #[inline(always)]
    pub(super) fn row(&self, row: u32) -> &[T] {
        let (own, start) = self.place(row);
        &self.rows(own)[start..][..self.width]
    }

    /// Listed rows as a matrix: where they lie if they are as far from each other, otherwise copied.
    pub(super) fn gathered<'b>(&'b self, rows: &[u32], copy: &'b mut Vec<T>) -> Matrix<'b, T> {
        let place = |row: &u32| self.place(*row);
        let (own, first) = rows.first().map_or((true, 0), place);
        let step = rows
            .get(1)
            .map_or(self.width, |second| place(second).1.saturating_sub(first));
        let mut expected = (0..).map(|at| (own, first + at * step));
        if step >= self.width
            && rows
                .iter()
                .zip(&mut expected)
                .all(|(row, at)| place(row) == at)
        {
            return Matrix::spaced(&self.rows(own)[first..], rows.len(), self.width, step);
        }
        copy.clear();
        for &row in rows {
            copy.extend_from_slice(self.row(row));
        }
        Matrix::packed(copy, rows.len(), self.width)
    }
}

/// Queries, keys and values.
pub(super) struct Inputs<'a, T: Clone> {
    pub(super) q: Table<'a, T>,
    pub(super) k: Table<'a, T>,
    pub(super) v: Table<'a, T>,
    pub(super) scale: T,
}

impl<T: Clone> Inputs<'_, T> {
    /// Of queries and keys, and of values.
    pub(super) fn widths(&self) -> [usize; 2] {
        [self.q.width, self.v.width]
    }
}

/// What the backward pass takes over from the forward one.
pub(super) struct Saved<'a, T> {
    /// `L` of every query.
    pub(super) log_sums: &'a [T],
    /// Outputs, and their gradient.
    pub(super) rows: &'a [T],
    pub(super) gradient: &'a [T],
    /// Values in a row of these.
    pub(super) width: usize,
    /// Whether log-sums stand behind them.
    pub(super) sums: bool,
}

impl<T: Real> Saved<'_, T> {
    fn step(&self) -> usize {
        self.width + usize::from(self.sums)
    }

    /// The gradient of the output of a query.
    #[inline(always)]
    pub(super) fn gradient(&self, query: u32) -> &[T] {
        &self.gradient[query as usize * self.step()..][..self.width]
    }

    /// Those of several, as a matrix.
    pub(super) fn gradients<'b>(&'b self, rows: &[u32], copy: &'b mut Vec<T>) -> Matrix<'b, T> {
        let first = rows.first().copied().unwrap_or(0);
        if rows.iter().zip(first..).all(|(row, at)| *row == at) {
            let data = &self.gradient[first as usize * self.step()..];
            return Matrix::spaced(data, rows.len(), self.width, self.step());
        }
        copy.clear();
        for &row in rows {
            copy.extend_from_slice(self.gradient(row));
        }
        Matrix::packed(copy, rows.len(), self.width)
    }

    /// `δ_i = ∂y_i · y_i − ∂L_i`.
    #[inline(always)]
    pub(super) fn delta(&self, query: usize) -> T {
        let start = query * self.step();
        let output = &self.rows[start..][..self.width];
        let product = simd::dot(output, self.gradient(query as u32));
        match self.sums {
            true => product - self.gradient[start + self.width],
            false => product,
        }
    }
}

/// Ranges of at most `size` that make up `all`.
pub(super) fn tiles(all: Range<usize>, size: usize) -> impl Iterator<Item = Range<usize>> {
    let end = all.end;
    all.step_by(size)
        .map(move |start| start..end.min(start + size))
}

/// Tiles of the keys `seen` among those laid out from `first` on; each begins where a panel may.
pub(super) fn key_tiles(seen: Range<usize>, first: usize) -> impl Iterator<Item = Range<usize>> {
    let unit = Repeated::<f32>::COLUMNS;
    let start = first + (seen.start - first) / unit * unit;
    tiles(start..seen.end, KEYS)
}

/// `to (+)= scale · a b` for the given rows and columns of `b`, rows of `to` one behind the other.
pub(super) fn multiply<T: Real>(
    to: &mut [T],
    into: Into,
    scale: T,
    a: Matrix<T>,
    b: &Repeated<T>,
    part: (Range<usize>, Range<usize>),
) {
    let columns = part.1.len();
    b.multiply(to, columns, into, scale, a, part);
}
