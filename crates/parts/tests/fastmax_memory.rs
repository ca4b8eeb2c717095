//! Fastmax, forward and backward, never holds the monomials of a sequence.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

#[path = "all/common/mod.rs"]
mod common;

use std::alloc::System;

use common::{Map, build, random};
use lapidary_kernels::memory::{Counting, largest_piece};
use lapidary_kernels::{DType, Tensor, Var};
use lapidary_parts::Context;
use lapidary_parts::attention::QueryKeySharing;
use lapidary_parts::attention::mechanism::fastmax::FastmaxSpec;
use lapidary_parts::attention::mechanism::{Describe, Heads, MechanismPass};
use lapidary_signal::Trace;

#[global_allocator]
static ALLOCATOR: Counting<System> = Counting(System);

/// Bytes of the largest piece of memory that one pass and its gradient ask for.
fn largest(length: usize, width: usize, causal: bool) -> usize {
    let heads = Heads {
        width,
        heads: 1,
        head_width: width,
        value_width: width,
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
    let run = || {
        let y = module.mixing(q, k, &pass).unwrap().mix(v).unwrap();
        y.sum_all().unwrap().backward().unwrap();
    };
    largest_piece(run).1.unwrap()
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
