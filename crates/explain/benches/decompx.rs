//! DecompX of a BERT of random weights: 6 layers, width 384, 12 heads, feed-forward 1536.
//!
//! `scripts/bench_decompx.py` times a straightforward PyTorch version of the same work. With the
//! argument `once N` the program explains one input of `N` tokens three times and prints the
//! seconds and its own peak memory as JSON, so that the memory is that of this work alone.
#![allow(
    clippy::expect_used,
    reason = "a benchmark that cannot start should stop"
)]

use criterion::{BenchmarkId, Criterion};
use lapidary_explain::{Target, decompx};
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::{Initialiser, Input, Model, ModelSpec};
use lapidary_parts::parameters::{Init, ParameterSource};
use lapidary_signal::streams::StreamRules;
use std::time::Instant;

const SPEC: &str = r#"
width = 384
[input]
kind = "tokens"
vocabulary = 1000
length = 512
token_types = 2
position = { kind = "learned" }
norm = { kind = "layer", epsilon = 1e-12 }
[[blocks]]
repeat = 6
wiring = "post-norm"
norm = { kind = "layer", epsilon = 1e-12 }
attention = { kind = "multi-head", heads = 12 }
feedforward = { kind = "dense", hidden = 1536 }
[head]
kind = "pooled"
hidden = "tanh"
labels = 2
"#;

/// Initial values with biases that are not zero, so that they are split as those of a trained
/// model are.
struct Biased(Initialiser);

impl ParameterSource for Biased {
    fn parameter(
        &mut self,
        name: &str,
        shape: &[usize],
        init: Init,
    ) -> lapidary_parts::Result<Tensor> {
        let init = match init {
            Init::Zeros => Init::Normal { deviation: 0.1 },
            other => other,
        };
        self.0.parameter(name, shape, init)
    }
}

fn model() -> Model {
    let spec: ModelSpec = toml::from_str(SPEC).expect("the spec is valid");
    let mut source = Biased(Initialiser::new(0, DType::F32, Device::Cpu));
    Model::new(spec, &mut source).expect("the model can be built")
}

fn input(tokens: usize) -> Input {
    let ids: Vec<u32> = (0..tokens as u32).map(|i| i * 7 % 1000).collect();
    let ids = Tensor::from_vec(ids, (1, tokens), &Device::Cpu).expect("ids");
    Input::tokens(ids)
}

fn explain(model: &Model, input: &Input) -> lapidary_explain::Explanation {
    decompx(model, input, None, Target::class(1), StreamRules::default()).expect("an explanation")
}

/// Most memory that this process had, in MiB, where the system tells.
fn peak_mib() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    let kib: f64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib / 1024.0)
}

/// Seconds of processor time that this process has used, where the system tells.
fn cpu_seconds() -> Option<f64> {
    const TICKS_PER_SECOND: f64 = 100.0;
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The name before the last parenthesis may hold spaces; user and system time follow.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let user: f64 = fields.next()?.parse().ok()?;
    let system: f64 = fields.next()?.parse().ok()?;
    Some((user + system) / TICKS_PER_SECOND)
}

fn once(tokens: usize) {
    let (model, input) = (model(), input(tokens));
    let before = peak_mib();
    let cpu = cpu_seconds();
    let mut seconds = Vec::new();
    let mut unattributed = 0.0;
    for _ in 0..3 {
        let start = Instant::now();
        unattributed = explain(&model, &input).account.unattributed;
        seconds.push(start.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    let cpu = cpu_seconds()
        .zip(cpu)
        .map(|(after, before)| (after - before) / 3.0);
    println!(
        "{{\"program\": \"lapidary\", \"tokens\": {tokens}, \"seconds\": {}, \
         \"cpu_seconds\": {}, \"all_seconds\": {seconds:?}, \"peak_rss_mib\": {}, \"rss_before_mib\": {}, \
         \"completeness_error\": {unattributed:e}}}",
        seconds[1],
        cpu.unwrap_or(f64::NAN),
        peak_mib().unwrap_or(f64::NAN),
        before.unwrap_or(f64::NAN),
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
    let mut group = criterion.benchmark_group("decompx-6x384");
    for tokens in [32, 128] {
        let input = input(tokens);
        group.bench_function(BenchmarkId::from_parameter(tokens), |bencher| {
            bencher.iter(|| explain(&model, &input));
        });
    }
    group.finish();
    criterion.final_summary();
}
