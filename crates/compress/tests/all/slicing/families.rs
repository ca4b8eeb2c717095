//! Published families, and another program's scores.

use std::collections::BTreeMap;

use super::cut;
use crate::common;
use crate::common::{close, distance, scores, values, windows};
use lapidary_compress::slicing::{Directions, Principal, Transport, slice};
use lapidary_compress::{CalibrationData, Content, Example, Target};
use lapidary_kernels::{Device, Tensor};
use lapidary_model::{Input, Model, OpenOptions, Package, Pass};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

#[test]
fn published_families_are_sliced() {
    let fixtures = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/families");
    for family in [
        "gpt2",
        "opt",
        "llama",
        "llama-tied",
        "mistral",
        "mixtral",
        "olmoe",
        "qwen2",
        "mamba",
        "opt-projected-pre-norm",
        "vit",
    ] {
        let path = std::path::Path::new(fixtures).join(family);
        let package = Package::open(&path, &OpenOptions::default()).unwrap();
        let model = package.single_model().unwrap();
        let width = model.spec().width;
        let data = match model.spec().vocabulary() {
            Some(_) => windows(6, 15),
            None => images(model),
        };
        let logits = |model: &Model| all_scores(model, &data);
        let before = logits(model);
        let same = slice(model, &data, width, false, &Principal, 4).unwrap();
        let apart = distance(&logits(&same.model), &before);
        assert!(apart < 1e-3, "{family}: {apart:e}");
        let half = slice(model, &data, width / 2, false, &Principal, 4).unwrap();
        assert!(
            logits(&half.model).iter().all(|score| score.is_finite()),
            "{family}"
        );
    }
}

fn images(model: &Model) -> CalibrationData {
    let lapidary_model::InputSpec::Patches(patches) = &model.spec().input else {
        panic!("{:?}", model.spec().input);
    };
    let shape = (patches.channels, patches.image[0], patches.image[1]);
    let mut generator = ChaCha8Rng::seed_from_u64(15);
    let mut example = || {
        let count = shape.0 * shape.1 * shape.2;
        let pixels: Vec<f32> = (0..count)
            .map(|_| generator.random_range(-1.0..1.0))
            .collect();
        Example {
            content: Content::Pixels(Tensor::from_vec(pixels, shape, &Device::Cpu).unwrap()),
            target: Target::None,
        }
    };
    CalibrationData::new((0..6).map(|_| example()).collect()).unwrap()
}

fn all_scores(model: &Model, data: &CalibrationData) -> Vec<f64> {
    let mut found = Vec::new();
    for example in data.examples() {
        let input = match &example.content {
            Content::Tokens { ids, .. } => {
                Input::tokens(Tensor::from_slice(ids, (1, ids.len()), &Device::Cpu).unwrap())
            }
            Content::Pixels(pixels) => Input::Pixels(pixels.unsqueeze(0).unwrap()),
        };
        let output = model.forward(&input, Pass::default()).unwrap();
        found.extend(values(output.into_logits().unwrap().value()));
    }
    found
}

#[test]
fn an_independent_program_cuts_to_the_same_scores() {
    let golden: serde_json::Value =
        serde_json::from_str(include_str!("../../fixtures/slicing.json")).unwrap();
    let numbers = |value: &serde_json::Value| -> Vec<f64> {
        let entries = value.as_array().unwrap().iter();
        entries
            .flat_map(|entry| match entry.as_array() {
                Some(row) => row.iter().map(|v| v.as_f64().unwrap()).collect(),
                None => vec![entry.as_f64().unwrap()],
            })
            .collect()
    };
    let mut parameters = BTreeMap::new();
    for (name, value) in golden["parameters"].as_object().unwrap() {
        let rows = value.as_array().unwrap().len();
        let flat = numbers(value);
        let shape = match flat.len() / rows {
            1 => vec![rows],
            columns => vec![rows, columns],
        };
        let tensor = Tensor::from_vec(flat, shape, &Device::Cpu).unwrap();
        parameters.insert(name.clone(), tensor);
    }
    let spec = r#"
width = 8
final_norm = { kind = "layer" }
[input]
kind = "tokens"
vocabulary = 11
length = 7
position = { kind = "learned" }
[[blocks]]
repeat = 2
attention = { kind = "multi-head", heads = 2, causal = true }
feedforward = { kind = "dense", hidden = 12, activation = "relu" }
[head]
kind = "language-model"
"#;
    let model = common::with_parameters(spec, parameters);
    let texts = golden["texts"].as_array().unwrap().iter();
    let texts = texts.map(|text| numbers(text).iter().map(|id| *id as u32).collect());
    let data = CalibrationData::windows(texts).unwrap();
    let ways: [(&str, &dyn Directions); 2] = [
        ("slicegpt", &Principal),
        ("dotresize", &Transport::default()),
    ];
    for (name, way) in ways {
        let sliced = cut(&model, &data, 5, way);
        close(&scores(&sliced, &data), &numbers(&golden[name]), 1e-7);
    }
}
