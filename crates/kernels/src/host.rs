//! The seam between kernels and tensors: reading storage, building results, sharing work.
//!
//! A kernel for another device enters here: an operation asks [`fused`] whether the CPU kernel
//! applies, and otherwise takes the plain composition, which runs wherever Candle does.

use crate::simd::Real;
use candle_core::{CpuStorage, DType, Device, Layout, NdIter, Storage, StorageRef, Tensor};
use std::borrow::Cow;
use std::marker::PhantomData;
use std::ops::Range;

type Candle<T> = candle_core::Result<T>;

/// Whether the fused CPU kernels can take these tensors: all on the CPU, all `f32` or all `f64`.
pub(crate) fn fused(tensors: &[&Tensor]) -> bool {
    let Some(first) = tensors.first() else {
        return false;
    };
    matches!(first.dtype(), DType::F32 | DType::F64)
        && tensors
            .iter()
            .all(|t| matches!(t.device(), Device::Cpu) && t.dtype() == first.dtype())
}

/// Runs `$body` with `$T` standing for the Rust type of `$dtype`.
macro_rules! by_dtype {
    ($dtype:expr, $T:ident => $body:expr) => {
        match $dtype {
            candle_core::DType::F32 => {
                type $T = f32;
                $body
            }
            candle_core::DType::F64 => {
                type $T = f64;
                $body
            }
            other => Err(candle_core::Error::UnsupportedDTypeForOp(
                other,
                "fused kernel",
            )),
        }
    };
}
pub(crate) use by_dtype;

/// The elements of `storage` in the order of `layout`, borrowed when they lie so already.
pub(crate) fn ordered<'a, T: candle_core::WithDType>(
    storage: &'a CpuStorage,
    layout: &Layout,
) -> Candle<Cow<'a, [T]>> {
    let all = T::cpu_storage_as_slice(storage)?;
    if let Some((start, end)) = layout.contiguous_offsets() {
        return Ok(Cow::Borrowed(&all[start..end]));
    }
    let mut copy = Vec::with_capacity(layout.shape().elem_count());
    let blocks = NdIter::new([layout]);
    let (length, [stride]) = (blocks.inner_size, blocks.inner_strides);
    for [start] in blocks {
        if stride == 1 {
            copy.extend_from_slice(&all[start..start + length]);
        } else {
            copy.extend((0..length).map(|i| all[start + i * stride]));
        }
    }
    Ok(Cow::Owned(copy))
}

/// A CPU tensor whose storage is locked for reading.
pub(crate) struct Host<'a> {
    guard: StorageRef<'a>,
    pub(crate) layout: &'a Layout,
}

impl<'a> Host<'a> {
    pub(crate) fn new(tensor: &'a Tensor) -> Self {
        let (guard, layout) = tensor.storage_and_layout();
        Self { guard, layout }
    }

    pub(crate) fn storage(&self) -> Candle<&CpuStorage> {
        match &*self.guard {
            Storage::Cpu(storage) => Ok(storage),
            _ => candle_core::bail!("a fused CPU kernel was given a tensor of another device"),
        }
    }

    /// The elements in order.
    pub(crate) fn ordered<T: candle_core::WithDType>(&self) -> Candle<Cow<'_, [T]>> {
        ordered(self.storage()?, self.layout)
    }
}

/// A vector of `n` numbers whose content is arbitrary until a kernel has written it.
///
/// Zeroing results that are overwritten anyway would cost a memory pass per operation.
#[allow(clippy::uninit_vec)]
pub(crate) fn unwritten<T: Real>(n: usize) -> Vec<T> {
    let mut v = Vec::with_capacity(n);
    // SAFETY: the capacity is there, `T` is f32 or f64, for which every bit pattern is a value,
    // and callers write every element before they read it.
    unsafe { v.set_len(n) };
    v
}

/// Width of the last dimension and the number of rows before it.
pub(crate) fn rows_and_width(dims: &[usize]) -> (usize, usize) {
    let width = dims.last().copied().unwrap_or(1);
    let rows = dims.iter().rev().skip(1).product();
    (rows, width)
}

/// Work (roughly, element operations) below which handing it to other threads costs more than
/// it saves.
const WORK_PER_TASK: usize = 32 * 1024;

/// Calls `body` on ranges that partition `0..count`, in parallel when `count · work_per_item`
/// is worth it. The partition does not depend on timing.
pub(crate) fn share(count: usize, work_per_item: usize, body: impl Fn(Range<usize>) + Sync) {
    let threads = rayon::current_num_threads();
    let worth = count.saturating_mul(work_per_item) / WORK_PER_TASK;
    // A few tasks per thread even out what other programs do to the cores.
    let tasks = worth.min(4 * threads).min(count);
    if tasks <= 1 || threads == 1 {
        if count > 0 {
            body(0..count);
        }
        return;
    }
    split(0..count, tasks, &body);
}

/// [`share`] of items that differ: `ends` says what work there is up to the end of each, and ranges are of about
/// as much work.
pub(crate) fn share_by_work(ends: &[usize], body: impl Fn(Range<usize>) + Sync) {
    let threads = rayon::current_num_threads();
    let (count, total) = (ends.len(), ends.last().copied().unwrap_or(0));
    let tasks = (total / WORK_PER_TASK).min(4 * threads).min(count);
    if tasks <= 1 || threads == 1 {
        if count > 0 {
            body(0..count);
        }
        return;
    }
    let bound = |task: usize| match task == tasks {
        true => count,
        false => ends.partition_point(|end| *end <= total / tasks * task),
    };
    split(0..tasks, tasks, &|range| {
        body(bound(range.start)..bound(range.end));
    });
}

fn split(range: Range<usize>, tasks: usize, body: &(impl Fn(Range<usize>) + Sync)) {
    if tasks <= 1 {
        return body(range);
    }
    let left = tasks / 2;
    let middle = range.start + range.len() * left / tasks;
    rayon::join(
        || split(range.start..middle, left, body),
        || split(middle..range.end, tasks - left, body),
    );
}

/// A slice that several threads write, each its own part.
pub(crate) struct Shared<'a, T> {
    start: *mut T,
    len: usize,
    owner: PhantomData<&'a mut [T]>,
}

// SAFETY: the pointer is only reachable through `part`, whose contract keeps parts disjoint.
unsafe impl<T: Send> Sync for Shared<'_, T> {}
unsafe impl<T: Send> Send for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self {
            start: slice.as_mut_ptr(),
            len: slice.len(),
            owner: PhantomData,
        }
    }

    /// Elements `start..start + len`.
    ///
    /// # Safety
    /// No two live parts may overlap.
    #[inline(always)]
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn part(&self, start: usize, len: usize) -> &mut [T] {
        // SAFETY: in bounds by the assertion within, disjoint from other parts by the contract.
        unsafe { std::slice::from_raw_parts_mut(self.pointer(start, len), len) }
    }

    /// Where elements `start..start + len` lie.
    #[inline(always)]
    pub(crate) fn pointer(&self, start: usize, len: usize) -> *mut T {
        assert!(len == 0 || (start <= self.len && len <= self.len - start));
        // For an empty part the address is never used.
        self.start.wrapping_add(start)
    }
}

/// Calls `body(row, output_row)` for every row of `output`, in parallel, vectorised.
pub(crate) fn for_rows<T: Real>(
    output: &mut [T],
    width: usize,
    work_per_element: usize,
    body: impl Fn(usize, &mut [T]) + Sync,
) {
    if width == 0 || output.is_empty() {
        return;
    }
    let rows = output.len() / width;
    let shared = Shared::new(output);
    share(rows, width * work_per_element, |range| {
        vectorised_rows(
            range,
            #[inline(always)]
            |row| {
                // SAFETY: rows are disjoint and each belongs to one range.
                body(row, unsafe { shared.part(row * width, width) })
            },
        )
    });
}

/// [`for_rows`] for rows that differ in work, as [`share_by_work`] has it.
pub(crate) fn for_rows_by_work<T: Real>(
    output: &mut [T],
    width: usize,
    ends: &[usize],
    body: impl Fn(usize, &mut [T]) + Sync,
) {
    if width == 0 || output.is_empty() {
        return;
    }
    assert_eq!(ends.len(), output.len() / width);
    let shared = Shared::new(output);
    share_by_work(ends, |range| {
        vectorised_rows(
            range,
            #[inline(always)]
            |row| {
                // SAFETY: rows are disjoint and each belongs to one range.
                body(row, unsafe { shared.part(row * width, width) })
            },
        )
    });
}

#[inline(always)]
fn vectorised_rows(range: Range<usize>, body: impl Fn(usize)) {
    crate::simd::vectorised(
        #[inline(always)]
        || {
            for row in range.clone() {
                body(row);
            }
        },
    );
}

/// A tensor on the CPU made of `data`.
pub(crate) fn tensor<T: Real>(data: Vec<T>, dims: &[usize]) -> Candle<Tensor> {
    Tensor::from_vec(data, dims, &Device::Cpu)
}

/// The gradient of `of`, unless nothing asks for it.
pub(crate) fn wanted<T: Real>(of: &Tensor, slopes: Vec<T>) -> Candle<Option<Tensor>> {
    of.track_op().then(|| tensor(slopes, of.dims())).transpose()
}

/// The element type of a storage.
pub(crate) fn dtype(storage: &CpuStorage) -> DType {
    use candle_core::backend::BackendStorage;
    storage.dtype()
}

/// Where each row of a strided view starts, for views whose last dimension is adjacent.
pub(crate) struct RowStarts {
    dims: Vec<usize>,
    strides: Vec<usize>,
    offset: usize,
}

impl RowStarts {
    /// `None` when the elements of a row are not adjacent.
    pub(crate) fn new(layout: &Layout) -> Option<Self> {
        let (last, leading) = layout.stride().split_last()?;
        let (width, dims) = layout.dims().split_last()?;
        (*last == 1 || *width <= 1).then(|| Self {
            dims: dims.to_vec(),
            strides: leading.to_vec(),
            offset: layout.start_offset(),
        })
    }

    #[inline]
    pub(crate) fn start(&self, mut row: usize) -> usize {
        let mut start = self.offset;
        for (&dim, &stride) in self.dims.iter().zip(&self.strides).rev() {
            start += row % dim * stride;
            row /= dim;
        }
        start
    }
}

/// The rows of a tensor's last dimension, read where they lie if their elements are adjacent.
pub(crate) struct Rows<'a, T: Clone> {
    data: Cow<'a, [T]>,
    starts: RowStarts,
    width: usize,
}

impl<'a, T: Real> Rows<'a, T> {
    pub(crate) fn new(storage: &'a CpuStorage, layout: &Layout) -> Candle<Self> {
        let width = layout.dims().last().copied().unwrap_or(1);
        if let Some(starts) = RowStarts::new(layout) {
            return Ok(Self {
                data: Cow::Borrowed(T::cpu_storage_as_slice(storage)?),
                starts,
                width,
            });
        }
        let (rows, _) = rows_and_width(layout.dims());
        Ok(Self {
            data: ordered(storage, layout)?,
            starts: RowStarts {
                dims: vec![rows],
                strides: vec![width],
                offset: 0,
            },
            width,
        })
    }

    #[inline(always)]
    pub(crate) fn row(&self, row: usize) -> &[T] {
        let start = self.starts.start(row);
        &self.data[start..start + self.width]
    }
}
