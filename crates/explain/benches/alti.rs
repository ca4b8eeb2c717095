//! ALTI-Logit of a GPT-2 of random weights: 12 layers, width 768, 12 heads, 50 257 tokens.
//!
//! `scripts/bench_alti.py` times a straightforward PyTorch version of the same work. With the
//! argument `once N` the program explains one input of `N` tokens five times and prints the
//! seconds as JSON.
#![allow(
    clippy::expect_used,
    reason = "a benchmark that cannot start should stop"
)]

use criterion::{BenchmarkId, Criterion};
use lapidary_explain::{Question, Target, logit_updates};
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::{Input, Model, ModelSpec, Pass};
use std::time::Instant;

const SPEC: &str = r#"
width = 768
final_norm = { kind = "layer" }
[input]
kind = "tokens"
vocabulary = 50257
length = 1024
position = { kind = "learned" }
[[blocks]]
repeat = 12
attention = { kind = "multi-head", heads = 12, causal = true }
feedforward = { kind = "dense", hidden = 3072, activation = "gelu-tanh" }
[head]
kind = "language-model"
"#;

fn model() -> Model {
    let spec: ModelSpec = toml::from_str(SPEC).expect("the spec is valid");
    Model::initialised(spec, 0, DType::F32, &Device::Cpu).expect("the model can be built")
}

fn input(tokens: usize) -> Input {
    let ids: Vec<u32> = (0..tokens as u32).map(|i| i * 7 % 1000).collect();
    let ids = Tensor::from_vec(ids, (1, tokens), &Device::Cpu).expect("ids");
    Input::tokens(ids)
}

/// The amount that is unaccounted for.
fn explain(model: &Model, input: &Input) -> f64 {
    let question = Question::new(model, input);
    let updates = logit_updates(&question, &[Target::class(1)]).expect("an explanation");
    let of_one = |one: &lapidary_explain::LogitUpdates| {
        one.explanation(&Default::default()).account.unattributed
    };
    updates.first().map_or(f64::NAN, of_one)
}

fn once(tokens: usize) {
    let (model, input) = (model(), input(tokens));
    let time = |body: &dyn Fn() -> f64| {
        let mut last = body();
        let mut seconds: Vec<f64> = (0..5)
            .map(|_| {
                let start = Instant::now();
                last = body();
                start.elapsed().as_secs_f64()
            })
            .collect();
        seconds.sort_by(f64::total_cmp);
        (seconds.get(2).copied().unwrap_or(f64::NAN), last)
    };
    let (seconds, unattributed) = time(&|| explain(&model, &input));
    let (forward, _) = time(&|| {
        let pass = Pass {
            only_last: true,
            ..Pass::default()
        };
        model.forward(&input, pass).expect("a forward pass");
        0.0
    });
    println!(
        "{{\"program\": \"lapidary\", \"tokens\": {tokens}, \"seconds\": {seconds}, \
         \"forward_seconds\": {forward}, \"unattributed\": {unattributed:e}}}"
    );
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if let Some(at) = arguments.iter().position(|argument| argument == "once") {
        let tokens = arguments.get(at + 1).and_then(|n| n.parse().ok());
        return once(tokens.unwrap_or(128));
    }
    let model = model();
    let mut criterion = Criterion::default().configure_from_args().sample_size(10);
    let mut group = criterion.benchmark_group("alti-logit-12x768");
    for tokens in [32, 128] {
        let input = input(tokens);
        group.bench_function(BenchmarkId::from_parameter(tokens), |bencher| {
            bencher.iter(|| explain(&model, &input));
        });
    }
    group.finish();
    criterion.final_summary();
}
