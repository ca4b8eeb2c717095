//! What memory a computation holds, counted at the allocator.

use std::alloc::{GlobalAlloc, Layout};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// Pieces smaller than this many bytes are not counted: there are many of them, and tensors are larger.
const LEAST: usize = 1024;

static COUNTS: AtomicBool = AtomicBool::new(false);
static HELD: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);
static LARGEST: AtomicUsize = AtomicUsize::new(0);

/// An allocator that counts the bytes it has given out and not got back, in pieces of at least 1 KiB. A
/// program installs it around the one that it uses:
///
/// ```
/// use lapidary_kernels::memory::{Counting, largest_piece, most_held};
/// use std::alloc::System;
///
/// #[global_allocator]
/// static ALLOCATOR: Counting<System> = Counting(System);
///
/// let (sum, held) = most_held(|| vec![1u64; 1 << 10].iter().sum::<u64>());
/// assert_eq!((sum, held), (1 << 10, Some(8 << 10)));
/// let (_, largest) = largest_piece(|| [vec![1u8; 2 << 10], vec![1; 4 << 10]]);
/// assert_eq!(largest, Some(4 << 10));
/// ```
#[derive(Debug)]
pub struct Counting<A>(
    /// What the memory is had from.
    pub A,
);

fn taken(bytes: usize) {
    if bytes >= LEAST {
        if !COUNTS.load(Ordering::Relaxed) {
            COUNTS.store(true, Ordering::Relaxed);
        }
        let held = HELD.fetch_add(bytes, Ordering::Relaxed) + bytes;
        MOST.fetch_max(held, Ordering::Relaxed);
        LARGEST.fetch_max(bytes, Ordering::Relaxed);
    }
}

fn returned(bytes: usize) {
    if bytes >= LEAST {
        HELD.fetch_sub(bytes, Ordering::Relaxed);
    }
}

// SAFETY: every call is passed on as it is.
unsafe impl<A: GlobalAlloc> GlobalAlloc for Counting<A> {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        taken(layout.size());
        // SAFETY: by contract.
        unsafe { self.0.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        taken(layout.size());
        // SAFETY: by contract.
        unsafe { self.0.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        returned(layout.size());
        // SAFETY: by contract.
        unsafe { self.0.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        taken(size);
        // SAFETY: by contract.
        let moved = unsafe { self.0.realloc(pointer, layout, size) };
        // Where nothing could be had, the old piece is still there.
        returned(if moved.is_null() { size } else { layout.size() });
        moved
    }
}

/// What `run` gives, and the most bytes that the whole program held meanwhile beyond those it held before;
/// nothing where no [`Counting`] allocator is installed. Other threads' memory counts too.
pub fn most_held<T>(run: impl FnOnce() -> T) -> (T, Option<usize>) {
    let before = HELD.load(Ordering::Relaxed);
    MOST.store(before, Ordering::Relaxed);
    let given = run();
    let most = MOST.load(Ordering::Relaxed).saturating_sub(before);
    (given, COUNTS.load(Ordering::Relaxed).then_some(most))
}

/// What `run` gives, and the bytes of the largest piece of at least 1 KiB that the whole program asked for
/// meanwhile; nothing where no [`Counting`] allocator is installed.
pub fn largest_piece<T>(run: impl FnOnce() -> T) -> (T, Option<usize>) {
    LARGEST.store(0, Ordering::Relaxed);
    let given = run();
    let largest = LARGEST.load(Ordering::Relaxed);
    (given, COUNTS.load(Ordering::Relaxed).then_some(largest))
}
