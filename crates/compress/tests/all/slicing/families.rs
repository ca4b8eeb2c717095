//! Published families, and another program's scores.

use std::collections::BTreeMap;

use super::cut;
use crate::common;
use crate::common::{close, distance, family, images, scores, windows};
use lapidary_compress::CalibrationData;
use lapidary_compress::slicing::{Directions, Principal, Transport, slice};
use lapidary_kernels::{Device, Tensor};
use lapidary_model::{Model, OpenOptions, Package};

#[test]
fn published_families_are_sliced() {
    for name in [
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
        let package = Package::open(&family(name), &OpenOptions::default()).unwrap();
        let model = package.single_model().unwrap();
        let width = model.spec().width;
        let data = match model.spec().vocabulary() {
            Some(_) => windows(6, 15),
            None => images(model, 6),
        };
        let logits = |model: &Model| scores(model, &data);
        let before = logits(model);
        let same = slice(model, &data, width, false, &Principal, 4).unwrap();
        let apart = distance(&logits(&same.model), &before);
        assert!(apart < 1e-3, "{name}: {apart:e}");
        let half = slice(model, &data, width / 2, false, &Principal, 4).unwrap();
        assert!(
            logits(&half.model).iter().all(|score| score.is_finite()),
            "{name}"
        );
    }
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
