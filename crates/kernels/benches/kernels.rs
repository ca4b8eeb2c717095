//! Each kernel beside the plain composition of tensor operations that it replaces.

#![allow(clippy::expect_used)] // A bench that cannot run should stop.

use criterion::{Criterion, criterion_group, criterion_main};
use lapidary_kernels::{
    Activation, AttentionOptions, CrossEntropyOptions, DType, Device, Result, RotaryPairs,
    SoftmaxMask, Tensor, Var, backward, naive,
};
use std::hint::black_box;
use std::time::Duration;

#[cfg(not(target_env = "msvc"))]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn random(dims: &[usize]) -> Var {
    Var::randn_f64(0.0, 1.0, dims, DType::F32, &Device::Cpu).expect("a tensor")
}

/// Times the forward pass of both, and forward with backward.
fn pair(
    c: &mut Criterion,
    name: &str,
    fused: impl Fn() -> Result<Tensor>,
    plain: impl Fn() -> Result<Tensor>,
) {
    let mut group = c.benchmark_group(name);
    group.sample_size(10);
    group.warm_up_time(Duration::from_millis(200));
    group.measurement_time(Duration::from_millis(600));
    let variants: [(&str, &dyn Fn() -> Result<Tensor>); 2] = [("fused", &fused), ("plain", &plain)];
    for (variant, f) in variants {
        group.bench_function(format!("{variant} forward"), |b| {
            b.iter(|| black_box(f().expect("a result")));
        });
        group.bench_function(format!("{variant} forward and backward"), |b| {
            b.iter(|| {
                let y = f().and_then(|y| Ok(y.sum_all()?)).expect("a result");
                black_box(backward(&y).expect("gradients"))
            });
        });
    }
    group.finish();
}

fn transformer(c: &mut Criterion) {
    let x = random(&[2048, 256]);
    let hidden = random(&[2048, 1024]);
    let (w, b) = (random(&[1024, 256]), random(&[1024]));
    pair(
        c,
        "linear",
        || lapidary_kernels::linear(&x, &w, Some(&b)),
        || naive::linear(&x, &w, Some(&b)),
    );
    pair(
        c,
        "linear and GELU",
        || lapidary_kernels::linear_activation(&x, &w, Some(&b), Activation::Gelu),
        || naive::activate(&naive::linear(&x, &w, Some(&b))?, Activation::Gelu),
    );
    let residual = random(&[2048, 256]);
    pair(
        c,
        "residual sum",
        || lapidary_kernels::add(&x, &residual),
        || Ok((x.as_tensor() + residual.as_tensor())?),
    );
    let qkv = [(); 3].map(|_| random(&[8, 4, 256, 64]));
    let [q, k, v] = &qkv;
    let options = AttentionOptions {
        causal: true,
        ..AttentionOptions::new(64)
    };
    pair(
        c,
        "attention",
        || lapidary_kernels::attention(q, k, v, &options),
        || naive::attention(q, k, v, &options),
    );
    let (gain, shift) = (random(&[256]), random(&[256]));
    pair(
        c,
        "layer norm",
        || lapidary_kernels::layer_norm(&x, Some(&gain), Some(&shift), 1e-5),
        || naive::layer_norm(&x, Some(&gain), Some(&shift), 1e-5),
    );
    pair(
        c,
        "rms norm",
        || lapidary_kernels::rms_norm(&x, Some(&gain), 1e-5),
        || naive::rms_norm(&x, Some(&gain), 1e-5),
    );
    for activation in [Activation::Gelu, Activation::GeluTanh, Activation::Silu] {
        pair(
            c,
            &format!("{activation:?}"),
            || lapidary_kernels::activate(&hidden, activation),
            || naive::activate(&hidden, activation),
        );
    }
    let mask = SoftmaxMask::default();
    pair(
        c,
        "softmax",
        || lapidary_kernels::softmax(&hidden, &mask),
        || naive::softmax(&hidden, &mask),
    );
    let targets: Vec<u32> = (0..2048).map(|i| i % 1024).collect();
    let targets = Tensor::from_vec(targets, 2048, &Device::Cpu).expect("targets");
    let options = CrossEntropyOptions::default();
    pair(
        c,
        "cross-entropy",
        || lapidary_kernels::cross_entropy(&hidden, &targets, &options),
        || naive::cross_entropy(&hidden, &targets, &options),
    );
    let angles = random(&[256, 32]);
    let (cos, sin) = (
        angles.cos().expect("cos").detach(),
        angles.sin().expect("sin").detach(),
    );
    pair(
        c,
        "rotary",
        || lapidary_kernels::rotary(q, &cos, &sin, RotaryPairs::Halves),
        || naive::rotary(q, &cos, &sin, RotaryPairs::Halves),
    );
}

fn sequences(c: &mut Criterion) {
    let x = random(&[8, 256, 256]);
    let a = (x.tanh().expect("tanh") * 0.9).expect("scaled").detach();
    pair(
        c,
        "cumulative sum",
        || lapidary_kernels::cumulative_sum(&x, 1),
        || naive::cumulative_sum(&x, 1),
    );
    pair(
        c,
        "linear scan",
        || lapidary_kernels::linear_scan(&a, &x, None),
        || naive::linear_scan(&a, &x, None),
    );
    pair(
        c,
        "real FFT",
        || lapidary_kernels::real_fft(&x),
        || naive::real_fft(&x),
    );
    let kernel = random(&[256, 64]);
    pair(
        c,
        "FFT convolution",
        || lapidary_kernels::fft_convolution(&x, &kernel),
        || naive::fft_convolution(&x, &kernel),
    );
    let taps = random(&[256, 4]);
    pair(
        c,
        "causal depthwise convolution",
        || lapidary_kernels::causal_depthwise_convolution(&x, &taps, None),
        || naive::causal_depthwise_convolution(&x, &taps, None),
    );
    pair(
        c,
        "top-k",
        || Ok(lapidary_kernels::top_k(&x, 16)?.0),
        || Ok(naive::top_k(&x, 16)?.0),
    );
}

criterion_group!(benches, transformer, sequences);
criterion_main!(benches);
