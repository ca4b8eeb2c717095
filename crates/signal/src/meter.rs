//! The meter lens: how much work a model does, counted while it does it.
//!
//! One multiply-add is two floating-point operations. Attention is counted with both of its
//! products over the keys that a query may see. Bytes moved are what an operation reads and
//! writes at the least: each operand once, the result once. Live bytes are those of the signals
//! that exist at the same time; a view holds the memory of what it looks at and no more.
//!
//! Elementwise operations count by convention: 1 for each element of an activation, sum, product
//! or reduction, 3 of a rotation, 5 of a softmax or RMS norm, 8 of a layer norm.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use lapidary_kernels::Tensor;

/// Counted work.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Floating-point operations.
    pub flops: u64,
    /// Bytes read and written.
    pub bytes: u64,
}

impl std::ops::AddAssign for Cost {
    fn add_assign(&mut self, other: Self) {
        self.flops += other.flops;
        self.bytes += other.bytes;
    }
}

/// Counts the work of every signal that flows through it.
#[derive(Debug, Default)]
pub struct Meter {
    pending: Mutex<Cost>,
    sites: Mutex<BTreeMap<String, Cost>>,
    live: AtomicU64,
    peak: AtomicU64,
}

/// Keeps a tensor's bytes counted as live for as long as a signal holds it.
#[derive(Debug)]
pub struct Live {
    meter: Arc<Meter>,
    bytes: u64,
}

impl Drop for Live {
    fn drop(&mut self) {
        self.meter.live.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

pub(crate) fn bytes_of(tensor: &Tensor) -> u64 {
    (tensor.elem_count() * tensor.dtype().size_in_bytes()) as u64
}

impl Meter {
    /// A meter at zero.
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    pub(crate) fn hold(self: &Arc<Self>, tensor: &Tensor) -> Arc<Live> {
        let bytes = bytes_of(tensor);
        let live = self.live.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.peak.fetch_max(live, Ordering::Relaxed);
        Arc::new(Live {
            meter: self.clone(),
            bytes,
        })
    }

    pub(crate) fn count(&self, flops: u64, bytes: u64) {
        *lock(&self.pending) += Cost { flops, bytes };
    }

    /// Books everything counted since the last site under `site`.
    pub(crate) fn close(&self, site: &str) {
        let cost = std::mem::take(&mut *lock(&self.pending));
        *lock(&self.sites).entry(site.to_owned()).or_default() += cost;
    }

    /// Work per site: what was done between the site before and this one.
    pub fn sites(&self) -> BTreeMap<String, Cost> {
        lock(&self.sites).clone()
    }

    /// All work counted so far.
    pub fn total(&self) -> Cost {
        let mut total = *lock(&self.pending);
        for cost in lock(&self.sites).values() {
            total += *cost;
        }
        total
    }

    /// Bytes that signals hold now.
    pub fn live_bytes(&self) -> u64 {
        self.live.load(Ordering::Relaxed)
    }

    /// The most bytes that signals held at one time.
    pub fn peak_live_bytes(&self) -> u64 {
        self.peak.load(Ordering::Relaxed)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // A panic elsewhere leaves plain counters behind, which are still readable.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
