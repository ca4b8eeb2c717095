//! Training steps against PyTorch's autograd and Adam, `tests/oracles/autoencoder.py`.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use lapidary_explain::autoencoder::{Autoencoder, Training, TrainingOptions};
use lapidary_kernels::{DType, Device, Tensor};
use rand::SeedableRng;
use serde::Deserialize;
use std::path::PathBuf;

#[derive(Deserialize)]
struct Options {
    sparsity: f64,
    rate: f64,
    beta1: f64,
    beta2: f64,
    warm_up: u64,
}

/// Matrices as PyTorch has them, `[in, out]`.
#[derive(Deserialize)]
#[allow(non_snake_case)]
struct Weights {
    W_enc: Vec<f64>,
    b_enc: Vec<f64>,
    W_dec: Vec<f64>,
    b_dec: Vec<f64>,
}

#[derive(Deserialize)]
struct Step {
    squared_error: f64,
    activation: f64,
    active: f64,
    #[serde(flatten)]
    weights: Weights,
}

#[derive(Deserialize)]
struct Fixture {
    width: usize,
    features: usize,
    options: Options,
    dead: Vec<usize>,
    resample_after: u64,
    example: Vec<f64>,
    start: Weights,
    batches: Vec<Vec<f64>>,
    steps: Vec<Step>,
}

fn rows(values: &[f64], width: usize) -> Tensor {
    let shape = (values.len() / width, width);
    Tensor::from_slice(values, shape, &Device::Cpu).unwrap()
}

fn close(found: &Tensor, expected: &[f64], what: &str, tolerance: f64) {
    let found = found.to_dtype(DType::F64).unwrap().flatten_all().unwrap();
    let found = found.to_vec1::<f64>().unwrap();
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(expected) {
        let error = (found - expected).abs();
        assert!(error < tolerance, "{what}: {found} for {expected}");
    }
}

#[test]
fn steps_and_a_resampling_give_the_weights_that_pytorch_gives() {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/autoencoder.json");
    let fixture: Fixture = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let (width, features) = (fixture.width, fixture.features);
    let vector = |values: &[f64]| Tensor::new(values, &Device::Cpu).unwrap();
    let start = Autoencoder::new(
        "anywhere",
        rows(&fixture.start.W_enc, features)
            .t()
            .unwrap()
            .contiguous()
            .unwrap(),
        vector(&fixture.start.b_enc),
        rows(&fixture.start.W_dec, width),
        vector(&fixture.start.b_dec),
    )
    .unwrap();
    let options = TrainingOptions {
        sparsity: fixture.options.sparsity,
        rate: fixture.options.rate,
        beta1: fixture.options.beta1,
        beta2: fixture.options.beta2,
        warm_up: fixture.options.warm_up,
        ..TrainingOptions::default()
    };
    let mut training = Training::new(&start, options).unwrap();
    for (batch, expected) in fixture.batches.iter().zip(&fixture.steps) {
        let name = format!("step {}", training.steps());
        if training.steps() == fixture.resample_after {
            let mut generator = rand_chacha::ChaCha8Rng::seed_from_u64(0);
            let example = rows(&fixture.example, width);
            let changed = training
                .resample(&example, &fixture.dead, &mut generator)
                .unwrap();
            assert_eq!(changed, fixture.dead[..1]);
        }
        let step = training.step(&rows(batch, width)).unwrap();
        assert!(
            (step.squared_error - expected.squared_error).abs() < 1e-10,
            "{name}"
        );
        assert!(
            (step.activation - expected.activation).abs() < 1e-10,
            "{name}"
        );
        assert!((step.active - expected.active).abs() < 1e-10, "{name}");
        let found = training.autoencoder().unwrap();
        let found = found.weights();
        let encoder = found.encoder.t().unwrap().contiguous().unwrap();
        close(&encoder, &expected.weights.W_enc, &name, 1e-9);
        close(found.encoder_bias, &expected.weights.b_enc, &name, 1e-9);
        close(found.decoder, &expected.weights.W_dec, &name, 1e-9);
        close(found.decoder_bias, &expected.weights.b_dec, &name, 1e-9);
    }
    assert_eq!(training.steps(), 8);
}
