//! Attention with a bias that is a function of one number for each pair never holds a number for each pair, forward
//! or backward.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use lapidary_kernels::memory::{Counting, largest_piece};
use lapidary_kernels::{
    AttentionOptions, BiasSpan, Device, FunctionalBias, ScoreBias, Tensor, Var, attention,
};
use std::alloc::System;

#[global_allocator]
static ALLOCATOR: Counting<System> = Counting(System);

const HEADS: usize = 4;

/// Irregular numbers.
fn variable(dims: &[usize]) -> Var {
    let count: usize = dims.iter().product();
    let numbers = (0..count).map(|i| (1.0 + 1.7 * i as f32).sin()).collect();
    Var::from_vec(numbers, dims, &Device::Cpu).unwrap()
}

/// Bytes of the largest piece of memory that a pass and its gradient ask for.
fn largest(tokens: usize, causal: bool, laid_out: bool) -> usize {
    let [q, k, v] = [(); 3].map(|()| variable(&[1, HEADS, tokens, 8]));
    let sides = if causal { 1 } else { 2 };
    let layers = [[32, 1], [32, 32], [sides * HEADS, 32]];
    let layers = layers.map(|dims| (variable(&dims), variable(&dims[..1])));
    let network = layers.each_ref().map(|(weight, bias)| {
        let (weight, bias) = (weight.as_tensor(), bias.as_tensor());
        (weight.clone(), bias.clone())
    });
    let distances: Vec<f32> = (0..tokens).map(|d| (0.1 * d as f32).ln_1p()).collect();
    let distances = Tensor::from_vec(distances, tokens, &Device::Cpu).unwrap();
    let scales = distances.affine(0.1, 1.0).unwrap().recip().unwrap();
    let span = BiasSpan {
        queries: tokens,
        keys: tokens,
        offset: 0,
        causal,
    };
    let run = || {
        let bias = FunctionalBias::new(&distances, &scales, &network, span).unwrap();
        let bias = match laid_out {
            true => ScoreBias::Pairs(bias.laid_out().unwrap().unsqueeze(0).unwrap()),
            false => ScoreBias::Functional(bias),
        };
        let options = AttentionOptions {
            causal,
            bias: Some(bias),
            ..AttentionOptions::new(8)
        };
        let y = attention(&q, &k, &v, &options).unwrap();
        let gradients = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
        assert!(gradients.get(&layers[0].0).is_some());
    };
    largest_piece(run).1.unwrap()
}

#[test]
fn memory_grows_with_the_tokens_and_not_with_their_pairs() {
    for causal in [true, false] {
        let [shorter, longer] = [1024, 2048].map(|tokens| largest(tokens, causal, false));
        // An eighth of the numbers of one head's pairs.
        assert!(longer < 4 * 2048 * 2048 / 8, "{longer}");
        assert!(longer <= 2 * shorter + (64 << 10), "{shorter}, {longer}");
        let pairs = 4 * HEADS * 1024 * 1024;
        assert!(largest(1024, causal, true) >= pairs);
    }
}
