//! Training steps against PyTorch's autograd and Adam, `tests/oracles/autoencoder.py`.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use lapidary_explain::autoencoder::{Autoencoder, Training, TrainingOptions, from_bytes, load};
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

/// What `torch.save` wrote, with a config in another vocabulary.
#[derive(Deserialize)]
struct Values {
    x: Vec<Vec<f64>>,
    features: Vec<Vec<f64>>,
    reconstruction: Vec<Vec<f64>>,
}

#[test]
fn a_state_dict_of_pytorch_is_read() {
    let fixtures = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let path = fixtures.join("public-autoencoder.pt");
    let values = std::fs::read(fixtures.join("public-autoencoder-values.json")).unwrap();
    let values: Values = serde_json::from_slice(&values).unwrap();
    let autoencoder = load(&path, None).unwrap();
    assert_eq!(autoencoder.site(), "blocks.1.attention.mixed");
    assert_eq!((autoencoder.width(), autoencoder.features()), (16, 24));
    let close = |found: &Tensor, expected: &[Vec<f64>], what: &str| {
        let found: Vec<f64> = found
            .to_dtype(DType::F64)
            .and_then(|found| found.flatten_all()?.to_vec1())
            .unwrap();
        for (found, expected) in found.iter().zip(expected.iter().flatten()) {
            assert!(
                (found - expected).abs() < 1e-4,
                "{what}: {found} for {expected}"
            );
        }
    };
    let features = autoencoder.encode(&rows(&values.x.concat(), 16)).unwrap();
    close(&features, &values.features, "features");
    let reconstruction = autoencoder.decode(&features).unwrap();
    close(&reconstruction, &values.reconstruction, "reconstruction");
    // Its bytes say the same, whoever asks for a site is heard, and a file cut off is refused.
    let bytes = std::fs::read(&path).unwrap();
    let again = from_bytes("bytes", bytes.clone(), "blocks.0.out").unwrap();
    assert_eq!(again.site(), "blocks.0.out");
    close(
        &again.encode(&rows(&values.x.concat(), 16)).unwrap(),
        &values.features,
        "again",
    );
    assert_eq!(
        load(&path, Some("blocks.0.in")).unwrap().site(),
        "blocks.0.in"
    );
    for length in [4, 100, bytes.len() / 2, bytes.len() - 1] {
        assert!(from_bytes("cut", bytes[..length].to_vec(), "blocks.0.out").is_err());
    }
}

#[test]
fn configs_name_sites_in_either_vocabulary() {
    let fixtures = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("weights.pt");
    std::fs::copy(fixtures.join("public-autoencoder.pt"), &path).unwrap();
    let said = load(&path, None).unwrap_err().to_string();
    assert!(said.contains("site of the autoencoder"), "{said}");
    for (config, site) in [
        (r#"{"site": "z", "layer": 5}"#, "blocks.5.attention.mixed"),
        (
            r#"{"hook_point": "blocks.3.hook_resid_pre", "hook_point_layer": 3}"#,
            "blocks.3.in",
        ),
        (
            r#"{"hook_name": "blocks.3.hook_mlp_out"}"#,
            "blocks.3.feedforward.out",
        ),
        (r#"{"site": "blocks.2.out"}"#, "blocks.2.out"),
    ] {
        std::fs::write(directory.path().join("cfg.json"), config).unwrap();
        assert_eq!(load(&path, None).unwrap().site(), site, "{config}");
    }
    std::fs::write(directory.path().join("cfg.json"), "{}").unwrap();
    assert!(load(&path, None).is_err());
}

#[test]
fn no_byte_that_is_wrong_ends_the_program() {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let bytes = std::fs::read(path.join("public-autoencoder.pt")).unwrap();
    let mut accepted = 0;
    for index in 0..bytes.len() {
        for wrong in [0x00, 0x01, 0x71, 0x85, 0xff] {
            let mut changed = bytes.clone();
            changed[index] ^= wrong;
            let found = from_bytes("changed", changed, "blocks.0.out");
            accepted += usize::from(found.is_ok_and(|found| found.width() == 16));
        }
    }
    // The unchanged ones at least, and what changes nothing that is read.
    assert!(accepted >= bytes.len());
}
