//! Small models in f64 whose every parameter matters.
#![allow(dead_code, reason = "each test file uses a part of these")]
#![allow(clippy::panic, clippy::result_large_err, clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use lapidary_compress::{
    Budget, Calibration, CalibrationData, CalibrationOptions, Change, Compressed, Content, Example,
    Factorisation, Method, Requirements, Selection, Settings, Target, Task,
};
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::{Initialiser, Input, InputSpec, Model, ModelSpec, Pass, PatchInput};
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

/// The model without what its parameters named so write: those whose names begin with `start` are zero.
pub fn zeroed(model: &Model, start: &str) -> Model {
    let mut parameters = model.parameters().clone();
    for (name, parameter) in &mut parameters {
        if name.starts_with(start) {
            *parameter = parameter.zeros_like().unwrap();
        }
    }
    Model::new(model.spec().clone(), &mut parameters).unwrap()
}

/// A block whose parts write nothing.
pub fn silenced(model: &Model, block: usize) -> Model {
    let model = zeroed(model, &format!("blocks.{block}.attention.output"));
    zeroed(&model, &format!("blocks.{block}.feedforward.down"))
}

/// One of the specs here with `count` blocks.
pub fn with_blocks(spec: &str, count: usize) -> String {
    spec.replace("repeat = 2", &format!("repeat = {count}"))
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
                target: Target::Label(rng.random_range(0..labels)),
                ..example
            })
            .collect(),
    )
    .unwrap()
}

/// Windows in which each token is followed by the one three further on, now and then by another.
pub fn text(count: usize, seed: u64) -> CalibrationData {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    CalibrationData::windows((0..count).map(|_| {
        let mut token = random.random_range(0..20u32);
        (0..10)
            .map(|_| {
                token = match random.random_bool(0.9) {
                    true => (token + 3) % 20,
                    false => random.random_range(0..20),
                };
                token
            })
            .collect()
    }))
    .unwrap()
}

/// An image as the model sees them, each number by its place.
pub fn image(patches: &PatchInput, number: impl FnMut(usize) -> f32) -> Example {
    let shape = (patches.channels, patches.image[0], patches.image[1]);
    let pixels: Vec<f32> = (0..shape.0 * shape.1 * shape.2).map(number).collect();
    Example {
        content: Content::Pixels(Tensor::from_vec(pixels, shape, &Device::Cpu).unwrap()),
        target: Target::None,
    }
}

/// Images of noise for a model that sees patches.
pub fn images(model: &Model, count: usize) -> CalibrationData {
    let InputSpec::Patches(patches) = &model.spec().input else {
        panic!("{:?}", model.spec().input);
    };
    let mut generator = ChaCha8Rng::seed_from_u64(15);
    let examples = (0..count).map(|_| image(patches, |_| generator.random_range(-1.0..1.0)));
    CalibrationData::new(examples.collect()).unwrap()
}

/// Ten tokens, each by its place and brought into the vocabulary, or an image, whichever the model reads.
pub fn example(model: &Model, seed: usize, token: impl Fn(usize) -> usize) -> Example {
    match &model.spec().input {
        InputSpec::Tokens(tokens) => {
            let ids = (0..10).map(|at| (token(at) % tokens.vocabulary) as u32);
            Example::window(ids.collect::<Vec<u32>>())
        }
        InputSpec::Patches(patches) => image(patches, |i| {
            ((i * 37 + seed * 101) % 29) as f32 / 14.0 - 1.0
        }),
    }
}

/// An example by itself, as a model reads it.
pub fn input(example: &Example) -> Input {
    match &example.content {
        Content::Tokens { ids, .. } => {
            Input::tokens(Tensor::from_slice(ids, (1, ids.len()), &Device::Cpu).unwrap())
        }
        Content::Pixels(pixels) => Input::Pixels(pixels.unsqueeze(0).unwrap()),
    }
}

/// Where the small checkpoint of a published family lies.
pub fn family(name: &str) -> PathBuf {
    let families = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/families");
    families.join(name)
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

/// A task for a method that looks at data by itself.
pub fn task<'a>(model: &'a Model, data: &'a CalibrationData, settings: &'a Settings) -> Task<'a> {
    Task {
        data: Some(data),
        settings: Some(settings),
        ..Task::new(model)
    }
}

/// What a method makes of a model with `keep` of what it measures, calibrated where it asks for that.
pub fn cut_by(
    model: &Model,
    data: &CalibrationData,
    method: &str,
    keep: f64,
    settings: &Settings,
) -> lapidary_compress::Result<Compressed> {
    let method = Method::find(method)?;
    let requirements = method.requirements(model, settings)?;
    let options = CalibrationOptions::default();
    let calibration = match requirements.is_empty() {
        true => None,
        false => Some(Calibration::collect(model, data, &requirements, options)?),
    };
    let task = Task {
        calibration: calibration.as_ref(),
        ..task(model, data, settings)
    };
    let plan = method.plan(&task, &Budget::Keep(keep))?;
    method.apply(&task, &plan)
}

/// The same with default settings, where it is defined.
pub fn cut(model: &Model, data: &CalibrationData, method: &str, keep: f64) -> Compressed {
    cut_by(model, data, method, keep, &Settings::default()).unwrap()
}

/// The weights of every linear layer of the blocks, by path.
pub fn weights(model: &Model) -> BTreeMap<String, Vec<f64>> {
    let linears = model.linears().iter();
    let linears = linears.filter(|linear| linear.path.starts_with("blocks."));
    linears
        .map(|linear| {
            let weight = &model.parameters()[&format!("{}.weight", linear.path)];
            (linear.path.clone(), values(weight))
        })
        .collect()
}

pub fn zeros(values: &[f64]) -> usize {
    values.iter().filter(|value| **value == 0.0).count()
}

/// The scores of each example by itself.
pub fn scores(model: &Model, data: &CalibrationData) -> Vec<f64> {
    let mut scores = Vec::new();
    for example in data.examples() {
        let output = model.forward(&input(example), Pass::default()).unwrap();
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
