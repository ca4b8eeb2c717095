//! Initial values that a model's spec asks for: by inputs and depth.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::{InitialValues, Input, Model, ModelSpec, Pass};
use lapidary_signal::Trace;

const WIDTH: usize = 64;
const BLOCKS: usize = 3;

fn spec(blocks: usize, more: &str) -> ModelSpec {
    let text = format!(
        "width = {WIDTH}
        final_norm = {{ kind = 'layer' }}
        {more}
        [input]
        kind = 'tokens'
        vocabulary = 300
        length = 64
        position = {{ kind = 'axial', columns = 8 }}
        [[blocks]]
        repeat = {blocks}
        attention = {{ kind = 'multi-head', heads = 4, causal = true }}
        feedforward = {{ kind = 'dense', hidden = 128 }}
        [head]
        kind = 'language-model'
        tied = false"
    );
    toml::from_str(&text).unwrap()
}

fn model(spec: ModelSpec) -> Model {
    Model::initialised(spec, 7, DType::F64, &Device::Cpu).unwrap()
}

/// The root of the mean square of a parameter's numbers.
fn size(x: &Tensor) -> f64 {
    let mean = x.sqr().unwrap().mean_all().unwrap();
    mean.to_scalar::<f64>().unwrap().sqrt()
}

const SCALED: &str = "initial = { kind = 'depth-scaled' }";

#[test]
fn deviations_go_by_inputs_and_depth() {
    let depth = ((2 * BLOCKS) as f64).sqrt();
    let by = |inputs: usize| 0.125 / (inputs as f64).sqrt();
    let scaled = model(spec(BLOCKS, SCALED));
    for block in 0..BLOCKS {
        for (name, expected) in [
            ("attention.query", by(WIDTH)),
            ("attention.value", by(WIDTH)),
            ("attention.output", by(WIDTH) / depth),
            ("feedforward.up", by(WIDTH)),
            ("feedforward.down", by(128) / depth),
        ] {
            let name = format!("blocks.{block}.{name}.weight");
            let found = size(&scaled.parameters()[&name]);
            // Of 4096 numbers and more, a root mean square has a deviation of about 1 %.
            assert!(
                (found / expected - 1.0).abs() < 0.06,
                "{name}: {found} {expected}"
            );
        }
    }
    for (name, expected, near) in [
        ("embeddings.tokens.weight", by(WIDTH), 0.05),
        // Two tables are summed, of 8 rows each.
        ("embeddings.positions.rows", by(2 * WIDTH), 0.2),
        ("embeddings.positions.columns", by(2 * WIDTH), 0.2),
    ] {
        let found = size(&scaled.parameters()[name]);
        assert!(
            (found / expected - 1.0).abs() < near,
            "{name}: {found} {expected}"
        );
    }
    assert_eq!(size(&scaled.parameters()["head.output.weight"]), 0.0);
    assert_eq!(
        size(&scaled.parameters()["blocks.0.attention.output.bias"]),
        0.0
    );
    assert_eq!(size(&scaled.parameters()["final_norm.weight"]), 1.0);
}

#[test]
fn without_depth_what_parts_write_begins_as_other_matrices_do() {
    let more = "initial = { kind = 'depth-scaled', gain = 1.0, by_depth = false }";
    let plain = model(spec(BLOCKS, more));
    for (name, inputs) in [("attention.output", WIDTH), ("feedforward.down", 128)] {
        let found = size(&plain.parameters()[&format!("blocks.1.{name}.weight")]);
        let expected = 1.0 / (inputs as f64).sqrt();
        assert!((found / expected - 1.0).abs() < 0.06, "{name}: {found}");
    }
}

#[test]
fn a_factorised_layer_begins_as_large_as_a_whole_one() {
    let mut spec = spec(BLOCKS, SCALED);
    let layer = "blocks.0.attention.output";
    spec.low_rank.insert(layer.to_owned(), 32);
    let parameters = model(spec);
    let of = |part: &str| parameters.parameters()[&format!("{layer}.{part}")].clone();
    let product = of("up").matmul(&of("down")).unwrap();
    let expected = 0.125 / (WIDTH as f64).sqrt() / ((2 * BLOCKS) as f64).sqrt();
    let found = size(&product);
    assert!((found / expected - 1.0).abs() < 0.15, "{found} {expected}");
}

#[test]
fn scores_begin_alike_and_the_stream_keeps_its_size_at_any_depth() {
    for blocks in [6, 24] {
        let model = model(spec(blocks, SCALED));
        let ids: Vec<u32> = (0..64u32).map(|i| i * 37 % 300).collect();
        let ids = Tensor::from_vec(ids, (1, 64), &Device::Cpu).unwrap();
        let trace = Trace::new().capture("blocks.*.{in,out}").unwrap();
        let pass = Pass {
            trace: Some(&trace),
            ..Pass::default()
        };
        let output = model.forward(&Input::tokens(ids), pass).unwrap();
        assert_eq!(size(output.into_logits().unwrap().value()), 0.0);
        let last = format!("blocks.{}.out", blocks - 1);
        let [first, last] = ["blocks.0.in", last.as_str()].map(|site| {
            let seen = trace.signal(site).unwrap();
            size(seen.value())
        });
        assert!(
            (0.5..=2.0).contains(&(last / first)),
            "{blocks}: {}",
            last / first
        );
    }
}

#[test]
fn a_spec_says_it_only_where_it_is_asked_for() {
    let usual = toml::to_string(&spec(1, "")).unwrap();
    assert!(!usual.contains("initial"), "{usual}");
    let told = spec(1, SCALED);
    assert_eq!(told.initial, InitialValues::depth_scaled());
    let back: ModelSpec = toml::from_str(&toml::to_string(&told).unwrap()).unwrap();
    assert_eq!(back, told);
}
