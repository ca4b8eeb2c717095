//! Projections along the sequence: every slot of a head is a weighted sum of its positions (Wang et al.,
//! Linformer, arXiv 2006.04768).
//!
//! ```text
//! y_rd = Σ_t E_rt κ_t x_td,   ∂x_td = κ_t Σ_r E_rt ∂y_rd,   ∂E_rt = κ_t Σ_d ∂y_rd x_td
//! ```
//!
//! with `κ` 0 for pads and 1 otherwise. Heads are read where they lie, and so are tokens without pads among
//! them; pads before, behind or for a whole [`BLOCK`] take no part, and a block with pads in its middle is
//! copied without them, one block at a time. How a number is summed follows from sizes and pads alone.

use crate::backward::Apply;
use crate::host::{self, Host, Shared, by_dtype, fused};
use crate::product::{Into, Matrix, Threads, multiply, multiply_at};
use crate::simd::Real;
use crate::stack::Stack;
use crate::{DType, Error, Result, Tensor, naive};
use candle_core::{CpuStorage, CustomOp2, Layout, Shape};
use std::ops::Range;

type Candle<T> = candle_core::Result<T>;

/// Positions whose pads are looked at together, and columns of a matrix's gradient that are made at a time.
const BLOCK: usize = 256;

/// `y` `[batch, heads, slots, width]` for `x` `[batch, heads, length, width]`, `matrix`
/// `[heads or 1, slots, length]`, one for each head or for all of them, and `kept` `[batch, length]` in `u8`:
/// positions where it is 0 weigh nothing, whatever they hold. Differentiable in `x` and `matrix`.
///
/// Time grows with `slots · length · width`, memory with what comes in and goes out.
///
/// # Errors
/// When the shapes do not fit each other.
///
/// ```
/// use lapidary_kernels::{Device, Tensor, sequence_projection};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let device = Device::Cpu;
/// let x = Tensor::new(&[[[[1f32, 2.0], [3.0, 4.0], [f32::NAN, 0.0]]]], &device)?;
/// let sums = Tensor::ones((1, 1, 3), x.dtype(), &device)?;
/// let kept = Tensor::new(&[[1u8, 1, 0]], &device)?;
/// let y = sequence_projection(&x, &sums, Some(&kept))?;
/// assert_eq!(y.flatten_all()?.to_vec1::<f32>()?, [4.0, 6.0]);
/// # Ok(())
/// # }
/// ```
pub fn sequence_projection(x: &Tensor, matrix: &Tensor, kept: Option<&Tensor>) -> Result<Tensor> {
    let (batch, heads, length, _) = x.dims4()?;
    let refused = |name: &'static str, found: &Tensor, expected: String| {
        let found = found.dims();
        Err(Error::argument(
            "sequence projection",
            name,
            found,
            expected,
        ))
    };
    match matrix.dims() {
        [of, _, columns] if (*of == heads || *of == 1) && *columns == length => {}
        _ => return refused("matrix", matrix, format!("[{heads} or 1, slots, {length}]")),
    }
    if let Some(kept) = kept.filter(|kept| kept.dims() != [batch, length]) {
        return refused("kept", kept, format!("[{batch}, {length}]"));
    }
    if !fused(&[x, matrix]) {
        return naive::sequence_projection(x, matrix, kept);
    }
    let sequences = match kept {
        None => vec![Vec::from_iter(Piece::new(0..length)); batch],
        Some(kept) => {
            let kept = kept.to_dtype(DType::U8)?.flatten_all()?.to_vec1::<u8>()?;
            let of = |sequence: usize| pieces(&kept[sequence * length..][..length]);
            (0..batch).map(of).collect()
        }
    };
    let operation = Projection {
        padded: kept.is_some(),
        sequences,
    };
    Ok(x.apply2(matrix, operation)?)
}

/// Tokens that stand side by side and enter one product.
#[derive(Clone, Debug, PartialEq)]
struct Piece {
    range: Range<usize>,
    /// Which of them are kept, where pads are among them.
    kept: Option<Vec<u8>>,
}

impl Piece {
    /// Tokens without pads; nothing where there are none.
    fn new(range: Range<usize>) -> Option<Self> {
        (!range.is_empty()).then_some(Self { range, kept: None })
    }

    /// The part of it that lies in `range`.
    fn within(&self, range: &Range<usize>) -> Option<Self> {
        let start = self.range.start.max(range.start);
        let end = self.range.end.min(range.end);
        let part = Self::new(start..end)?;
        let first = start - self.range.start;
        let kept = self.kept.as_ref();
        Some(Self {
            kept: kept.map(|kept| kept[first..first + part.range.len()].to_vec()),
            ..part
        })
    }

    /// Its rows of `x` `[length, width]`, zeros for pads.
    fn rows<'a, T: Real>(&self, x: Matrix<'a, T>, copy: &'a mut Vec<T>) -> Matrix<'a, T> {
        let x = x.part_of_rows(&self.range);
        let Some(kept) = &self.kept else {
            return x;
        };
        copy.clear();
        for (row, &kept) in kept.iter().enumerate() {
            let value = |column| x.data[row * x.row_stride + column * x.column_stride];
            match kept {
                0 => copy.resize(copy.len() + x.columns, T::zero()),
                _ => copy.extend((0..x.columns).map(value)),
            }
        }
        Matrix::packed(copy, x.rows, x.columns)
    }
}

/// The pieces of a sequence: none begins or ends with a pad, and only those within a block have pads in them.
fn pieces(kept: &[u8]) -> Vec<Piece> {
    let mut pieces: Vec<Piece> = Vec::new();
    for (block, kept) in kept.chunks(BLOCK).enumerate() {
        let is_token = |kept: &u8| *kept != 0;
        let ends = kept
            .iter()
            .position(is_token)
            .zip(kept.iter().rposition(is_token));
        let Some((first, last)) = ends else {
            continue;
        };
        let (start, kept) = (block * BLOCK, &kept[first..=last]);
        let here = Piece {
            range: start + first..start + last + 1,
            kept: kept.contains(&0).then(|| kept.to_vec()),
        };
        match pieces.last_mut() {
            Some(before)
                if before.kept.is_none()
                    && here.kept.is_none()
                    && before.range.end == here.range.start =>
            {
                before.range.end = here.range.end;
            }
            _ => pieces.push(here),
        }
    }
    pieces
}

struct Projection {
    /// Whether some sequence may have pads.
    padded: bool,
    /// The pieces of each.
    sequences: Vec<Vec<Piece>>,
}

/// Calls `of` on every pair of a sequence and a head with its part of `result`. Enough pairs keep every thread
/// busy without help from the others.
fn by_pair<T: Real>(
    result: &mut [T],
    each: usize,
    work: usize,
    of: impl Fn(usize, &mut [T], Threads) + Sync,
) {
    let pairs = result.len().checked_div(each).unwrap_or(0);
    if pairs < 2 * rayon::current_num_threads() {
        for (pair, part) in result.chunks_exact_mut(each.max(1)).enumerate() {
            of(pair, part, Threads::All);
        }
        return;
    }
    let shared = Shared::new(result);
    host::share(pairs, work, |range| {
        for pair in range {
            // SAFETY: each pair owns its part.
            let part = unsafe { shared.part(pair * each, each) };
            of(pair, part, Threads::One);
        }
    });
}

impl Projection {
    /// The pieces of the sequence of a pair.
    fn pieces(&self, pair: usize, pairs: usize) -> &[Piece] {
        &self.sequences[pair * self.sequences.len() / pairs]
    }

    /// `E κ x` of every head.
    fn forward<T: Real>(&self, x: &Stack<T>, matrix: &Stack<T>) -> Vec<T> {
        let (pairs, slots, width) = (x.starts.len(), matrix.rows, x.columns);
        let mut y = host::unwritten::<T>(pairs * slots * width);
        let work = slots * width * x.rows / 8;
        by_pair(&mut y, slots * width, work, |pair, y, threads| {
            let (x, matrix) = (x.matrix(pair), matrix.matrix(pair));
            let (mut into, mut copy) = (Into::Replace, Vec::new());
            for piece in self.pieces(pair, pairs) {
                let weights = matrix.part_of_columns(&piece.range);
                let rows = piece.rows(x, &mut copy);
                multiply(y, width, into, T::one(), weights, rows, threads);
                into = Into::Add;
            }
            if into == Into::Replace {
                y.fill(T::zero());
            }
        });
        y
    }

    /// `κ Eᵀ ∂y` of every head.
    fn of_x<T: Real>(&self, matrix: &Stack<T>, gradient: &Stack<T>) -> Vec<T> {
        let (pairs, length, width) = (gradient.starts.len(), matrix.columns, gradient.columns);
        let mut slopes = host::unwritten::<T>(pairs * length * width);
        let work = length * width * matrix.rows / 8;
        let each = length * width;
        by_pair(&mut slopes, each, work, |pair, slopes, threads| {
            if self.padded {
                slopes.fill(T::zero());
            }
            let (matrix, gradient) = (matrix.matrix(pair), gradient.matrix(pair));
            for piece in self.pieces(pair, pairs) {
                let weights = matrix.part_of_columns(&piece.range).transposed();
                let rows = &mut slopes[piece.range.start * width..piece.range.end * width];
                multiply(
                    rows,
                    width,
                    Into::Replace,
                    T::one(),
                    weights,
                    gradient,
                    threads,
                );
                let kept = piece.kept.iter().flatten();
                for (row, kept) in rows.chunks_exact_mut(width).zip(kept) {
                    if *kept == 0 {
                        row.fill(T::zero());
                    }
                }
            }
        });
        slopes
    }

    /// `Σ ∂y (κ x)ᵀ` `[count, slots, length]` over the heads of each of `count` matrices and all sequences, by
    /// blocks of columns.
    fn of_matrix<T: Real>(&self, x: &Stack<T>, gradient: &Stack<T>, count: usize) -> Vec<T> {
        let (pairs, slots, length) = (x.starts.len(), gradient.rows, x.rows);
        let mut slopes = vec![T::zero(); count * slots * length];
        if slopes.is_empty() {
            return slopes;
        }
        let shared = Shared::new(&mut slopes);
        let blocks = length.div_ceil(BLOCK);
        let work = pairs / count.max(1) * slots * x.columns * BLOCK / 8;
        host::share(count * blocks, work, |items| {
            let mut copy = Vec::new();
            for item in items {
                let (index, start) = (item / blocks, item % blocks * BLOCK);
                let block = start..length.min(start + BLOCK);
                // Heads are the inner dimension of pairs.
                for pair in (index..pairs).step_by(count) {
                    let here = self.pieces(pair, pairs).iter();
                    for piece in here.filter_map(|piece| piece.within(&block)) {
                        let columns = piece.rows(x.matrix(pair), &mut copy).transposed();
                        let at = index * slots * length + piece.range.start;
                        let extent = (slots - 1) * length + piece.range.len();
                        let rows = gradient.matrix(pair);
                        // SAFETY: the rows of columns that this item alone has, within the result.
                        unsafe {
                            let to = shared.pointer(at, extent);
                            multiply_at(to, length, Into::Add, T::one(), rows, columns, false);
                        }
                    }
                }
            }
        });
        slopes
    }

    fn backward<T: Real>(
        &self,
        x: &Tensor,
        matrix: &Tensor,
        gradient: &Tensor,
    ) -> Candle<(Option<Tensor>, Option<Tensor>)> {
        let hosts = [x, matrix, gradient].map(Host::new);
        let pairs = &x.dims()[..2];
        let stack = |of: usize| Stack::<T>::new(hosts[of].storage()?, hosts[of].layout, pairs);
        let gradient = stack(2)?;
        let of_x = match x.track_op() {
            true => Some(host::tensor(self.of_x(&stack(1)?, &gradient), x.dims())?),
            false => None,
        };
        let of_matrix = match matrix.track_op() {
            true => {
                let slopes = self.of_matrix(&stack(0)?, &gradient, matrix.dims()[0]);
                Some(host::tensor(slopes, matrix.dims())?)
            }
            false => None,
        };
        Ok((of_x, of_matrix))
    }
}

impl CustomOp2 for Projection {
    fn name(&self) -> &'static str {
        "sequence projection"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        matrix: &CpuStorage,
        matrix_layout: &Layout,
    ) -> Candle<(CpuStorage, Shape)> {
        use candle_core::WithDType;
        let (batch, heads, _, width) = x_layout.shape().dims4()?;
        by_dtype!(host::dtype(x), T => {
            let x = Stack::<T>::new(x, x_layout, &[batch, heads])?;
            let matrix = Stack::<T>::new(matrix, matrix_layout, &[batch, heads])?;
            let y = T::to_cpu_storage_owned(self.forward(&x, &matrix));
            Ok((y, Shape::from((batch, heads, matrix.rows, width))))
        })
    }

    fn bwd(
        &self,
        x: &Tensor,
        matrix: &Tensor,
        _: &Tensor,
        gradient: &Tensor,
    ) -> Candle<(Option<Tensor>, Option<Tensor>)> {
        by_dtype!(x.dtype(), T => self.backward::<T>(x, matrix, gradient))
    }
}

#[cfg(test)]
mod tests;
