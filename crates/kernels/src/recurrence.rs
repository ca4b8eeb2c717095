//! Running sums, running products and linear recurrences along one dimension.
//!
//! A tensor is taken as `[outer, length, inner]`; each of the `outer · inner` columns is a
//! sequence of its own. Neighbouring columns advance together in vector registers, and blocks of
//! them are shared out over threads.

mod cumulative;
mod scan;

pub use cumulative::{cumulative_product, cumulative_sum};
pub use scan::linear_scan;

use crate::host;
use std::ops::Range;

/// A tensor's shape around the dimension that a recurrence runs along.
#[derive(Clone, Copy)]
struct Sequences {
    outer: usize,
    length: usize,
    inner: usize,
}

/// Columns that advance together.
const BLOCK: usize = 256;

impl Sequences {
    fn new(dims: &[usize], dim: usize) -> Self {
        Self {
            outer: dims[..dim].iter().product(),
            length: dims[dim],
            inner: dims[dim + 1..].iter().product(),
        }
    }

    /// Calls `body(outer, columns)` for every block of columns, in parallel, vectorised.
    fn share(&self, body: impl Fn(usize, Range<usize>) + Sync) {
        let blocks = self.inner.div_ceil(BLOCK);
        let work = self.length * self.inner.min(BLOCK) * 2;
        host::share(self.outer * blocks, work, |items| {
            crate::simd::vectorised(
                #[inline(always)]
                || {
                    for item in items.clone() {
                        let start = item % blocks * BLOCK;
                        body(item / blocks, start..self.inner.min(start + BLOCK));
                    }
                },
            );
        });
    }

    /// Where the row of `columns` at time `t` starts.
    #[inline(always)]
    fn at(&self, outer: usize, t: usize, columns: &Range<usize>) -> usize {
        (outer * self.length + t) * self.inner + columns.start
    }
}
