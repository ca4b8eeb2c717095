//! Products of `f32` matrices, blocked for the caches.
//!
//! `B` is copied into panels as wide as the registers of a tile hold, a block of the inner
//! dimension at a time; `A` is read where it lies when its rows do, and copied when it is
//! transposed. A tile of the result stays in registers while the block's depth passes by. Each
//! thread makes whole rows or whole columns of the result and the panels it needs, so that threads
//! meet once per product; and every number is summed in the same order whatever their count.

use super::{Matrix, extent};
use pulp::{Simd, WithSimd};
use std::ops::Range;

/// Inner dimension of a block.
const DEPTH: usize = 384;
/// Columns of a block of `B`, which stays in the second cache: a multiple of every panel's width.
const COLUMNS: usize = 384;
/// Rows of the tiles for the last rows of a result, when no more are left.
const LAST_ROWS: usize = 4;
/// Tiles of rows of a transposed `A` that are copied together.
const TILES_TOGETHER: usize = 4;
/// Rows and columns that a thread's share of a result is best a multiple of.
pub(super) const TILE_ROWS: usize = 8;
pub(super) const PANEL_COLUMNS: usize = 48;

/// What a thread makes: rows and columns of `result (+)= scale · a b`.
pub(super) struct Task<'a> {
    pub(super) result: *mut f32,
    pub(super) row_stride: usize,
    pub(super) add: bool,
    pub(super) scale: f32,
    pub(super) a: Matrix<'a, f32>,
    pub(super) b: Right<'a>,
}

/// The right operand of a product.
pub(super) enum Right<'a> {
    /// Copied into panels block by block.
    Plain(Matrix<'a, f32>),
    /// Rows and columns of what is in panels already; the first column begins a panel.
    Packed(&'a Panels, Range<usize>, Range<usize>),
}

impl Task<'_> {
    /// # Safety
    /// `result` must be valid for the rows of the product, and nobody else use them meanwhile.
    pub(super) unsafe fn run(self) {
        let a = &self.a;
        assert!(extent(a.rows, a.columns, a.row_stride, a.column_stride) <= a.data.len());
        match &self.b {
            Right::Plain(b) => {
                assert_eq!(a.columns, b.rows);
                assert!(extent(b.rows, b.columns, b.row_stride, b.column_stride) <= b.data.len());
            }
            Right::Packed(panels, rows, columns) => {
                assert_eq!(a.columns, rows.len());
                assert!(rows.end <= panels.rows && columns.end <= panels.columns);
                assert!(panels.begins(columns.start));
            }
        }
        pulp::Arch::new().dispatch(self);
    }
}

impl WithSimd for Task<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        // A tile of 8 × 3 registers wants 28 of the 32 that there are, one of 6 × 2 wants 15 of 16; of
        // 4 × 3, which wants all 16, compilers keep some in memory.
        // SAFETY: by the contract of `run`.
        unsafe {
            if S::F32_LANES >= 16 {
                self.blocks::<S, TILE_ROWS>(simd)
            } else {
                self.blocks::<S, 6>(simd)
            }
        }
    }
}

/// Registers across the panels of so many columns: as even as can be, so that no panel is left
/// with one register alone, whose tile would wait for its own sums.
fn across(columns: usize, lanes: usize) -> usize {
    let most = if lanes >= 16 { 3 } else { 2 };
    let registers = columns.div_ceil(lanes).max(1);
    registers.div_ceil(registers.div_ceil(most))
}

/// The right operand of many products, copied into panels once.
pub(super) struct Panels {
    data: Vec<f32>,
    rows: usize,
    columns: usize,
    /// Columns of a panel.
    width: usize,
    lanes: usize,
}

impl Panels {
    pub(super) fn new(b: Matrix<f32>) -> Self {
        assert!(extent(b.rows, b.columns, b.row_stride, b.column_stride) <= b.data.len());
        pulp::Arch::new().dispatch(Packing(b))
    }

    /// Whether a panel begins at this column.
    pub(super) fn begins(&self, column: usize) -> bool {
        column.is_multiple_of(self.width)
    }
}

struct Packing<'a>(Matrix<'a, f32>);

impl WithSimd for Packing<'_> {
    type Output = Panels;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> Panels {
        let (b, lanes) = (self.0, S::F32_LANES);
        let width = across(b.columns, lanes) * lanes;
        let mut data = crate::host::unwritten(b.rows * b.columns.next_multiple_of(lanes));
        for left in (0..b.columns).step_by(width) {
            let columns = left..b.columns.min(left + width);
            pack(&b, 0..b.rows, columns, &mut data[left * b.rows..], lanes);
        }
        Panels {
            data,
            rows: b.rows,
            columns: b.columns,
            width,
            lanes,
        }
    }
}

/// Rows of the right operand as tiles read them.
#[derive(Clone, Copy)]
struct Block {
    /// The first panel.
    panels: *const f32,
    /// Rows that panels hold, and the first of `depth` that are read.
    rows: usize,
    first: usize,
    depth: usize,
    /// Columns of a panel, that panels hold, and that are wanted.
    width: usize,
    held: usize,
    columns: usize,
}

/// What a tile reads besides `a`, and where it is written.
#[derive(Clone, Copy)]
struct Tile {
    depth: usize,
    /// From one number of a row of `a` to the next.
    step: usize,
    b: *const f32,
    /// Registers from one row of `b` to the next.
    held: usize,
    to: *mut f32,
    /// Rows and columns that are wanted.
    rows: usize,
    width: usize,
    add: bool,
}

impl Task<'_> {
    #[inline(always)]
    unsafe fn blocks<S: Simd, const ROWS: usize>(&self, simd: S) {
        let lanes = S::F32_LANES;
        let b = match &self.b {
            Right::Plain(b) => b,
            Right::Packed(panels, rows, columns) => {
                assert_eq!(panels.lanes, lanes);
                let block = Block {
                    panels: panels.data[columns.start * panels.rows..].as_ptr(),
                    rows: panels.rows,
                    first: rows.start,
                    depth: rows.len(),
                    width: panels.width,
                    held: panels.columns - columns.start,
                    columns: columns.len(),
                };
                // SAFETY: within the panels as `run` checked.
                return unsafe { self.rows_of_tiles::<S, ROWS>(simd, 0, 0, block) };
            }
        };
        // One column beyond whole registers would cost as much as a register of them.
        let alone = b.columns % lanes == 1;
        let (k, n) = (b.rows, b.columns - usize::from(alone));
        let width = across(n.min(COLUMNS), lanes) * lanes;
        let mut packed =
            crate::host::unwritten::<f32>(DEPTH.min(k) * COLUMNS.min(n).next_multiple_of(lanes));
        for p in (0..k).step_by(DEPTH) {
            let depth = DEPTH.min(k - p);
            for left in (0..n).step_by(COLUMNS) {
                let columns = COLUMNS.min(n - left);
                for j in (0..columns).step_by(width) {
                    let from = left + j..left + columns.min(j + width);
                    pack(b, p..p + depth, from, &mut packed[j * depth..], lanes);
                }
                let block = Block {
                    panels: packed.as_ptr(),
                    rows: depth,
                    first: 0,
                    depth,
                    width,
                    held: columns,
                    columns,
                };
                // SAFETY: the block was packed just now.
                unsafe { self.rows_of_tiles::<S, ROWS>(simd, p, left, block) };
            }
        }
        if alone {
            // SAFETY: by the contract of `run`.
            unsafe { self.column(simd, b, n) };
        }
    }

    /// One column of the result, without panels.
    #[inline(always)]
    unsafe fn column<S: Simd>(&self, simd: S, b: &Matrix<'_, f32>, at: usize) {
        let a = &self.a;
        // Loops, not closures, which would not be compiled for the instructions at hand.
        let mut column = Vec::with_capacity(b.rows);
        for p in 0..b.rows {
            // Rows of a broadcast operand are one and the same, with no step between them.
            column.push(b.data[p * b.row_stride + at * b.column_stride]);
        }
        let mut sums = vec![0.0; a.rows];
        if a.column_stride == 1 {
            for (i, sum) in sums.iter_mut().enumerate() {
                *sum = dot(simd, &a.data[i * a.row_stride..][..a.columns], &column);
            }
        } else {
            for (p, &y) in column.iter().enumerate() {
                let from = &a.data[p * a.column_stride..];
                if a.row_stride == 1 {
                    crate::simd::add_scaled(&mut sums, &from[..a.rows], y);
                } else {
                    for (i, sum) in sums.iter_mut().enumerate() {
                        *sum += from[i * a.row_stride] * y;
                    }
                }
            }
        }
        for (i, sum) in sums.into_iter().enumerate() {
            // SAFETY: the column is one of the result's.
            unsafe {
                let to = self.result.add(i * self.row_stride + at);
                *to = self.scale * sum + if self.add { *to } else { 0.0 };
            }
        }
    }

    /// Adds the product with a block that begins at row `p` and column `left` of `b`.
    #[inline(always)]
    unsafe fn rows_of_tiles<S: Simd, const ROWS: usize>(
        &self,
        simd: S,
        p: usize,
        left: usize,
        block: Block,
    ) {
        let a = &self.a;
        let Block { depth, columns, .. } = block;
        let apart = a.column_stride != 1;
        let together = ROWS * TILES_TOGETHER;
        let mut packed_a = crate::host::unwritten::<f32>(match apart {
            true => depth * together.min(a.rows.next_multiple_of(ROWS)),
            false => 0,
        });
        for i in (0..a.rows).step_by(ROWS) {
            let rows = ROWS.min(a.rows - i);
            let (starts, step) = if apart {
                let within = i % together;
                if within == 0 {
                    let rows = i..a.rows.min(i + together);
                    pack_rows::<ROWS>(a, rows, p..p + depth, &mut packed_a);
                }
                let start = packed_a[within * depth..].as_ptr();
                (
                    std::array::from_fn::<_, ROWS, _>(|row| start.wrapping_add(row)),
                    ROWS,
                )
            } else {
                // Rows past the last are read as the last. Without an inner dimension nothing lies
                // there, and nothing is read.
                let at = |row: usize| {
                    let place = (i + row.min(rows - 1)) * a.row_stride + p * a.column_stride;
                    a.data.as_ptr().wrapping_add(place)
                };
                (std::array::from_fn::<_, ROWS, _>(at), 1)
            };
            for j in (0..columns).step_by(block.width) {
                let width = block.width.min(columns - j);
                // Registers of a row of this panel; the last panel may be narrower.
                let held = block.width.min(block.held - j).div_ceil(S::F32_LANES);
                // SAFETY: the panel is in the block, the place in the result.
                unsafe {
                    let from = block
                        .panels
                        .add(j * block.rows + block.first * held * S::F32_LANES);
                    let to = self.result.add(i * self.row_stride + left + j);
                    let add = self.add || p > 0;
                    let tile = Tile {
                        depth,
                        step,
                        b: from,
                        held,
                        to,
                        rows,
                        width,
                        add,
                    };
                    match starts.first_chunk::<LAST_ROWS>() {
                        Some(starts) if rows <= LAST_ROWS => self.tiles(simd, *starts, tile),
                        _ => self.tiles(simd, starts, tile),
                    }
                }
            }
        }
    }

    /// A tile as wide as is wanted.
    #[inline(always)]
    unsafe fn tiles<S: Simd, const ROWS: usize>(&self, simd: S, a: [*const f32; ROWS], tile: Tile) {
        // SAFETY: by the contract of `tile`.
        unsafe {
            match tile.width.div_ceil(S::F32_LANES) {
                1 => self.tile::<S, ROWS, 1>(simd, a, tile),
                2 => self.tile::<S, ROWS, 2>(simd, a, tile),
                // Where registers are few, panels are no wider than two of them.
                _ => self.tile::<S, ROWS, 3>(simd, a, tile),
            }
        }
    }

    /// A tile of `ROWS × V` registers, of which `rows × width` numbers are wanted.
    ///
    /// # Safety
    /// `depth` numbers lie `step` apart at each of `a`, as many rows of `held` registers at `b`, and
    /// `rows × width` numbers of the result at `to`.
    #[inline(always)]
    unsafe fn tile<S: Simd, const ROWS: usize, const V: usize>(
        &self,
        simd: S,
        a: [*const f32; ROWS],
        tile: Tile,
    ) {
        let Tile {
            depth,
            step,
            b,
            held,
            to,
            rows,
            width,
            add,
        } = tile;
        let mut sum = [[simd.splat_f32s(0.0); V]; ROWS];
        // SAFETY: by contract.
        unsafe {
            let mut b = b.cast::<S::f32s>();
            let mut at = 0;
            for _ in 0..depth {
                let row: [S::f32s; V] = std::array::from_fn(
                    #[inline(always)]
                    |v| b.add(v).read_unaligned(),
                );
                for i in 0..ROWS {
                    let x = simd.splat_f32s(*a[i].add(at));
                    for v in 0..V {
                        sum[i][v] = simd.mul_add_f32s(x, row[v], sum[i][v]);
                    }
                }
                b = b.add(held);
                at += step;
            }
        }
        let scale = simd.splat_f32s(self.scale);
        for (i, row) in sum.into_iter().enumerate() {
            if i == rows {
                break;
            }
            for (v, sum) in row.into_iter().enumerate() {
                let start = v * S::F32_LANES;
                let left = width.saturating_sub(start).min(S::F32_LANES);
                // SAFETY: `rows × width` numbers lie in the result.
                unsafe {
                    let to = to.add(i * self.row_stride + start);
                    if left == S::F32_LANES {
                        let to = to.cast::<S::f32s>();
                        let value = match add {
                            true => simd.mul_add_f32s(scale, sum, to.read_unaligned()),
                            false => simd.mul_f32s(scale, sum),
                        };
                        to.write_unaligned(value);
                        continue;
                    }
                    // The last columns of a result that no register ends with.
                    let mut numbers = [0f32; PANEL_COLUMNS];
                    let whole = numbers.as_mut_ptr().cast::<S::f32s>();
                    whole.write_unaligned(simd.mul_f32s(scale, sum));
                    for (j, value) in numbers.iter().take(left).enumerate() {
                        let to = to.add(j);
                        *to = if add { *to + value } else { *value };
                    }
                }
            }
        }
    }
}

/// `Σ x_p y_p`.
#[inline(always)]
fn dot<S: Simd>(simd: S, x: &[f32], y: &[f32]) -> f32 {
    let ((x, x_rest), (y, y_rest)) = (S::as_simd_f32s(x), S::as_simd_f32s(y));
    let mut sum = simd.splat_f32s(0.0);
    for (x, y) in x.iter().zip(y) {
        sum = simd.mul_add_f32s(*x, *y, sum);
    }
    let mut rest = 0.0;
    for (x, y) in x_rest.iter().zip(y_rest) {
        rest += x * y;
    }
    simd.reduce_sum_f32s(sum) + rest
}

/// Copies `rows` and columns `depth` of `a` into tiles `[depth, ROWS]`, one behind the other: numbers of a
/// column that lie in one line of memory are read together, however far the next column is. Rows that
/// the last tile lacks are zeros.
#[inline(always)]
fn pack_rows<const ROWS: usize>(
    a: &Matrix<'_, f32>,
    rows: Range<usize>,
    depth: Range<usize>,
    to: &mut [f32],
) {
    let each = ROWS * depth.len();
    let to = &mut to[..each * rows.len().div_ceil(ROWS)];
    if a.row_stride == 1 && rows.len() == ROWS * TILES_TOGETHER {
        for (q, column) in depth.enumerate() {
            let from = &a.data[rows.start + column * a.column_stride..][..ROWS * TILES_TOGETHER];
            for tile in 0..TILES_TOGETHER {
                // SAFETY: `from` has a tile's rows so often, and `to` a column of each of its tiles.
                unsafe {
                    let from = from.as_ptr().add(tile * ROWS).cast::<[f32; ROWS]>();
                    let to = to.as_mut_ptr().add(tile * each + q * ROWS);
                    to.cast::<[f32; ROWS]>()
                        .write_unaligned(from.read_unaligned());
                }
            }
        }
        return;
    }
    for (first, tile) in rows
        .clone()
        .step_by(ROWS)
        .zip(to.chunks_exact_mut(each.max(1)))
    {
        for (column, to) in depth.clone().zip(tile.chunks_exact_mut(ROWS)) {
            for (row, to) in to.iter_mut().enumerate() {
                *to = match first + row < rows.end {
                    true => a.data[(first + row) * a.row_stride + column * a.column_stride],
                    false => 0.0,
                };
            }
        }
    }
}

/// Copies rows `depth` and `columns` of `b` into a panel `[depth, width]`, its width rounded up to
/// whole registers by zeros.
#[inline(always)]
fn pack(
    b: &Matrix<'_, f32>,
    depth: Range<usize>,
    columns: Range<usize>,
    to: &mut [f32],
    lanes: usize,
) {
    const SIDE: usize = 8;
    let count = columns.len();
    let width = count.next_multiple_of(lanes);
    let to = &mut to[..width * depth.len()];
    if b.column_stride == 1 {
        for (p, to) in depth.zip(to.chunks_exact_mut(width)) {
            let from = &b.data[p * b.row_stride + columns.start..][..count];
            to[..count].copy_from_slice(from);
            to[count..].fill(0.0);
        }
        return;
    }
    if count < width {
        for to in to.chunks_exact_mut(width) {
            to[count..].fill(0.0);
        }
    }
    if b.row_stride == 1 {
        // Columns lie in memory: small squares, so that few lines are open at a time.
        for j in (0..count).step_by(SIDE) {
            let wide = SIDE.min(count - j);
            let mut p = 0;
            while p < depth.len() {
                let high = (2 * SIDE).min(depth.len() - p);
                let from = |c: usize| (columns.start + j + c) * b.column_stride + depth.start + p;
                if wide == SIDE && high == 2 * SIDE {
                    let mut square = [[0f32; 2 * SIDE]; SIDE];
                    for (c, column) in square.iter_mut().enumerate() {
                        column.copy_from_slice(&b.data[from(c)..][..2 * SIDE]);
                    }
                    for q in 0..2 * SIDE {
                        let to = &mut to[(p + q) * width + j..][..SIDE];
                        for (to, column) in to.iter_mut().zip(&square) {
                            *to = column[q];
                        }
                    }
                } else {
                    for c in 0..wide {
                        for q in 0..high {
                            to[(p + q) * width + j + c] = b.data[from(c) + q];
                        }
                    }
                }
                p += high;
            }
        }
        return;
    }
    for (p, to) in depth.zip(to.chunks_exact_mut(width)) {
        for (column, to) in columns.clone().zip(to) {
            *to = b.data[p * b.row_stride + column * b.column_stride];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Products by the instructions of `simd`, against sums in double precision.
    fn assert_products(simd: impl Simd) {
        for (m, k, n) in [
            (13, 70, 37),
            (9, 385, 50),
            (11, 390, 65),
            (4, 3, 24),
            (1, 1, 1),
        ] {
            let x: Vec<f32> = (0..m * k)
                .map(|i| (i * 37 % 101) as f32 / 50.0 - 1.0)
                .collect();
            let y: Vec<f32> = (0..k * n)
                .map(|i| (i * 53 % 89) as f32 / 44.0 - 1.0)
                .collect();
            for transposed in [false, true] {
                let (a, b) = match transposed {
                    false => (Matrix::packed(&x, m, k), Matrix::packed(&y, k, n)),
                    true => (
                        Matrix::packed(&x, k, m).transposed(),
                        Matrix::packed(&y, n, k).transposed(),
                    ),
                };
                let mut result = vec![f32::NAN; m * n];
                let task = Task {
                    result: result.as_mut_ptr(),
                    row_stride: n,
                    add: false,
                    scale: 1.0,
                    a,
                    b: Right::Plain(b),
                };
                simd.vectorize(task);
                for (index, found) in result.into_iter().enumerate() {
                    let (i, j) = (index / n, index % n);
                    let term = |p: usize| {
                        let a = a.data[i * a.row_stride + p * a.column_stride];
                        let b = b.data[p * b.row_stride + j * b.column_stride];
                        f64::from(a) * f64::from(b)
                    };
                    let expected: f64 = (0..k).map(term).sum();
                    assert!((f64::from(found) - expected).abs() < 1e-3, "{m} {k} {n}");
                }
            }
        }
    }

    #[test]
    fn every_instruction_set_multiplies() {
        assert_products(pulp::Scalar::new());
        #[cfg(target_arch = "x86_64")]
        {
            if let Some(simd) = pulp::x86::V3::try_new() {
                assert_products(simd);
            }
            if let Some(simd) = pulp::x86::V4::try_new() {
                assert_products(simd);
            }
        }
    }
}
