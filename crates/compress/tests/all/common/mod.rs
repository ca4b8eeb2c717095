//! Small models in f64 whose every parameter matters.
#![allow(dead_code, reason = "each test file uses a part of these")]
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use lapidary_compress::{
    Budget, Calibration, CalibrationData, CalibrationOptions, Change, Compressed, Example,
    Factorisation, Requirements, Selection,
};
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::{Initialiser, Input, Model, ModelSpec, Pass};
use lapidary_parts::parameters::{Init, ParameterSource};
use rand::{RngExt, SeedableRng};
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

/// A model of `spec` with these parameters.
pub fn with_parameters(spec: &str, parameters: BTreeMap<String, Tensor>) -> Model {
    let mut parameters = parameters;
    Model::new(toml::from_str(spec).unwrap(), &mut parameters).unwrap()
}

/// The same model with one parameter changed.
pub fn altered(model: &Model, name: &str, change: impl Fn(&Tensor) -> Tensor) -> Model {
    let mut parameters = model.parameters().clone();
    let changed = change(&parameters[name]);
    parameters.insert(name.to_owned(), changed);
    Model::new(model.spec().clone(), &mut parameters).unwrap()
}

/// Windows of different lengths, so that batches are padded.
pub fn windows(count: usize, seed: u64) -> CalibrationData {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    CalibrationData::windows((0..count).map(|_| {
        let length = rng.random_range(4..=9);
        (0..length).map(|_| rng.random_range(0..20)).collect()
    }))
    .unwrap()
}

/// The same with labels below `labels`.
pub fn labelled(count: usize, labels: u32, seed: u64) -> CalibrationData {
    let mut rng = ChaCha8Rng::seed_from_u64(seed ^ 0x5eed);
    let examples = windows(count, seed).examples().to_vec();
    CalibrationData::new(
        examples
            .into_iter()
            .map(|example| Example {
                target: lapidary_compress::Target::Label(rng.random_range(0..labels)),
                ..example
            })
            .collect(),
    )
    .unwrap()
}

/// The three kinds of model, each with data that suits it.
pub fn all() -> Vec<(&'static str, Model, CalibrationData)> {
    vec![
        ("encoder", model(ENCODER, 1), labelled(10, 3, 1)),
        ("decoder", model(DECODER, 2), windows(10, 2)),
        ("gated", model(GATED, 3), windows(10, 3)),
    ]
}

/// Everything that any method needs.
pub fn calibrate(model: &Model, data: &CalibrationData, selection: &Selection) -> Calibration {
    let requirements = Factorisation::ALL
        .iter()
        .map(|method| method.requirements(model, selection).unwrap())
        .fold(Requirements::default(), Requirements::union);
    Calibration::collect(model, data, &requirements, CalibrationOptions::default()).unwrap()
}

/// Factorises every layer of the selection at `rank`, whether it pays or not.
pub fn at_rank(
    model: &Model,
    method: Factorisation,
    selection: &Selection,
    rank: impl Fn(usize, usize) -> usize,
    calibration: &Calibration,
) -> Compressed {
    let mut plan = method.plan(model, selection, &Budget::Keep(0.5)).unwrap();
    for layer in &mut plan.modules {
        layer.change = Change::Factorise {
            rank: rank(layer.input, layer.output),
        };
    }
    plan.apply(model, Some(calibration)).unwrap()
}

/// The scores of each example by itself.
pub fn scores(model: &Model, data: &CalibrationData) -> Vec<f64> {
    let mut scores = Vec::new();
    for example in data.examples() {
        let lapidary_compress::Content::Tokens { ids, .. } = &example.content else {
            continue;
        };
        let ids = Tensor::from_slice(ids, (1, ids.len()), &Device::Cpu).unwrap();
        let output = model.forward(&Input::tokens(ids), Pass::default()).unwrap();
        let logits = output.into_logits().unwrap().into_value();
        scores.extend(values(&logits));
    }
    scores
}

pub fn values(tensor: &Tensor) -> Vec<f64> {
    let flat = tensor.to_dtype(DType::F64).unwrap().flatten_all().unwrap();
    flat.to_vec1().unwrap()
}

#[track_caller]
pub fn close(found: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len());
    let scale = expected.iter().fold(1e-12, |m: f64, v| m.max(v.abs()));
    for (index, (a, b)) in found.iter().zip(expected).enumerate() {
        assert!(
            (a - b).abs() <= tolerance * scale,
            "at {index}: found {a}, expected {b}"
        );
    }
}

/// The largest difference, relative to the largest value.
pub fn distance(a: &[f64], b: &[f64]) -> f64 {
    let scale = b.iter().fold(1e-12, |m: f64, v| m.max(v.abs()));
    a.iter()
        .zip(b)
        .fold(0.0, |m: f64, (a, b)| m.max((a - b).abs() / scale))
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

/// No blocks: the mean of embeddings through a dense layer, or straight to the scores, which is
/// logistic regression.
pub fn classifier(width: usize, vocabulary: usize, labels: usize, hidden: bool) -> String {
    let hidden = if hidden { "hidden = \"tanh\"" } else { "" };
    format!(
        r#"
width = {width}
blocks = []
[input]
kind = "tokens"
vocabulary = {vocabulary}
length = 8
[head]
kind = "pooled"
pool = "mean"
{hidden}
labels = {labels}
"#
    )
}
