//! Small models in f64 whose every parameter matters.
#![allow(dead_code, reason = "each test file uses a part of these")]
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::path::PathBuf;

use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::{Initialiser, Input, Model, ModelSpec};
use lapidary_parts::parameters::{Init, ParameterSource};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

/// Initial values large enough that nonlinearities bend and biases count.
struct Lively(Initialiser);

impl ParameterSource for Lively {
    fn parameter(
        &mut self,
        name: &str,
        shape: &[usize],
        init: Init,
    ) -> lapidary_parts::Result<Tensor> {
        let noise = self
            .0
            .parameter(name, shape, Init::Normal { deviation: 0.3 })?;
        match init {
            Init::Ones => Ok((noise + 1.0).map_err(lapidary_kernels::Error::from)?),
            _ => Ok(noise),
        }
    }
}

pub fn model(spec: &str, seed: u64) -> Model {
    let spec: ModelSpec = toml::from_str(spec).unwrap();
    Model::new(
        spec,
        &mut Lively(Initialiser::new(seed, DType::F64, Device::Cpu)),
    )
    .unwrap()
}

pub fn tokens(ids: &[u32]) -> Input {
    Input::tokens(Tensor::from_slice(ids, (1, ids.len()), &Device::Cpu).unwrap())
}

pub fn generator(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}

/// What other programs computed.
pub fn fixtures() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

/// Differences are relative to the largest number of both.
#[track_caller]
pub fn close(a: &[f64], b: &[f64], tolerance: f64) {
    assert_eq!(a.len(), b.len());
    let scale = a.iter().chain(b).fold(1e-30, |m: f64, v| m.max(v.abs()));
    for (x, y) in a.iter().zip(b) {
        assert!((x - y).abs() <= tolerance * scale, "{a:?}\n{b:?}");
    }
}

/// Differences are relative to the largest number expected.
#[track_caller]
pub fn assert_near(found: &[f64], expected: &[f64], tolerance: f64, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let largest = expected.iter().fold(1e-12, |m: f64, v| m.max(v.abs()));
    for (found, expected) in found.iter().zip(expected) {
        let error = (found - expected).abs() / largest;
        assert!(error < tolerance, "{what}: {error}: {found} {expected}");
    }
}

/// A post-norm encoder with token types and a tanh pooler, as BERT classifies.
pub const ENCODER: &str = r#"
width = 16
[input]
kind = "tokens"
vocabulary = 20
length = 12
token_types = 2
position = { kind = "learned" }
norm = { kind = "layer" }
[[blocks]]
repeat = 2
wiring = "post-norm"
attention = { kind = "multi-head", heads = 4 }
feedforward = { kind = "dense", hidden = 24 }
[head]
kind = "pooled"
hidden = "tanh"
labels = 3
"#;

/// A pre-norm decoder as GPT-2.
pub const DECODER: &str = r#"
width = 16
final_norm = { kind = "layer" }
[input]
kind = "tokens"
vocabulary = 20
length = 12
position = { kind = "learned" }
[[blocks]]
repeat = 2
attention = { kind = "multi-head", heads = 4, causal = true }
feedforward = { kind = "dense", hidden = 24, activation = "gelu-tanh" }
[head]
kind = "language-model"
"#;

/// A gated decoder with grouped heads and rotary positions, as Llama.
pub const GATED: &str = r#"
width = 16
final_norm = { kind = "rms" }
[input]
kind = "tokens"
vocabulary = 20
length = 12
[[blocks]]
repeat = 2
norm = { kind = "rms" }
attention = { kind = "multi-head", heads = 4, groups = 2, causal = true, bias = false, position = { kind = "rotary" } }
feedforward = { kind = "gated", hidden = 24 }
[head]
kind = "language-model"
tied = false
"#;
