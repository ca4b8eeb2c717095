//! Fastmax, forward and backward, never holds the monomials of a sequence.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

#[path = "all/common/mod.rs"]
mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use common::{Map, build, random};
use lapidary_kernels::{DType, Tensor, Var};
use lapidary_parts::Context;
use lapidary_parts::attention::QueryKeySharing;
use lapidary_parts::attention::mechanism::fastmax::FastmaxSpec;
use lapidary_parts::attention::mechanism::{Describe, Heads, MechanismPass};
use lapidary_signal::Trace;

/// The system's allocator, and the largest piece that was asked of it.
struct Watching;

static LARGEST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is passed on as it is.
unsafe impl GlobalAlloc for Watching {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LARGEST.fetch_max(layout.size(), Ordering::Relaxed);
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        LARGEST.fetch_max(size, Ordering::Relaxed);
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Watching = Watching;

/// Bytes of the largest piece of memory that one pass and its gradient ask for.
fn largest(length: usize, width: usize, causal: bool) -> usize {
    let heads = Heads {
        width,
        heads: 1,
        head_width: width,
        causal,
        scale: 1.0,
        sharing: QueryKeySharing::None,
    };
    let spec = FastmaxSpec::default();
    let module = build(&Map::new(), |p| spec.build(&heads, p)).unwrap();
    let inputs = [1, 2, 3].map(|seed| {
        let x = random(&[1, 1, length, width], seed);
        Var::from_tensor(&x.to_dtype(DType::F32).unwrap()).unwrap()
    });
    let [q, k, v]: [&Tensor; 3] = [&inputs[0], &inputs[1], &inputs[2]];
    let trace = Trace::new();
    let context = Context::new(&trace);
    let pass = MechanismPass {
        path: "m",
        tokens: q,
        keep: None,
        offset: 0,
        context: &context,
    };
    LARGEST.store(0, Ordering::Relaxed);
    let y = module.mixing(q, k, &pass).unwrap().mix(v).unwrap();
    y.sum_all().unwrap().backward().unwrap();
    LARGEST.load(Ordering::Relaxed)
}

#[test]
fn memory_of_a_token_grows_with_its_features_and_not_with_their_square() {
    for causal in [false, true] {
        let length = 4096;
        for width in [32, 64] {
            // Values with their ones in single precision, and room for what products pack.
            let bound = 4 * 4 * length * (width + 1);
            let monomials = 4 * length * width * (width + 1) / 2;
            assert!(2 * bound < monomials);
            let found = largest(length, width, causal);
            assert!(found <= bound, "{found} bytes for heads of {width}");
        }
    }
}
