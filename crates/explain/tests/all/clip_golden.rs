//! The decomposition and TextSpan against an independent NumPy implementation,
//! `tests/oracles/clip.py`.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use lapidary_explain::clip::{Component, ImageTower, text_span};
use lapidary_factor::matrix_from_tensor;
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::{Model, ModelSpec};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::PathBuf;

#[derive(Deserialize)]
struct Fixture {
    spec: ModelSpec,
    choices: usize,
    heads: Vec<Head>,
}

#[derive(Deserialize)]
struct Head {
    layer: usize,
    head: usize,
    texts: Vec<usize>,
    /// `[image][feature]`
    rebuilt: Vec<Vec<f64>>,
}

fn fixture() -> (Fixture, BTreeMap<String, Tensor>) {
    let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let json = std::fs::read(directory.join("clip.json")).unwrap();
    let bytes = std::fs::read(directory.join("clip.safetensors")).unwrap();
    let stored = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let tensor = |view: &safetensors::tensor::TensorView<'_>| {
        let values: Vec<f64> = match view.dtype() {
            safetensors::Dtype::F64 => view
                .data()
                .chunks_exact(8)
                .map(|bytes| f64::from_le_bytes(bytes.try_into().unwrap()))
                .collect(),
            _ => view
                .data()
                .chunks_exact(4)
                .map(|bytes| f64::from(f32::from_le_bytes(bytes.try_into().unwrap())))
                .collect(),
        };
        Tensor::from_vec(values, view.shape(), &Device::Cpu).unwrap()
    };
    let tensors = stored
        .tensors()
        .into_iter()
        .map(|(name, view)| (name, tensor(&view)))
        .collect();
    (serde_json::from_slice(&json).unwrap(), tensors)
}

fn model(fixture: &Fixture, tensors: &BTreeMap<String, Tensor>, dtype: DType) -> Model {
    let mut parameters = tensors
        .iter()
        .filter_map(|(name, tensor)| {
            let name = name.strip_prefix("model.")?;
            Some((name.to_owned(), tensor.to_dtype(dtype).unwrap()))
        })
        .collect::<BTreeMap<_, _>>();
    Model::new(fixture.spec.clone(), &mut parameters).unwrap()
}

fn difference(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.dims(), b.dims());
    let difference = (a.to_dtype(DType::F64).unwrap() - b).unwrap();
    let largest = difference.abs().unwrap().max_all().unwrap();
    largest.to_scalar::<f64>().unwrap()
}

#[test]
fn every_entry_is_that_of_the_independent_implementation() {
    let (fixture, tensors) = fixture();
    for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::F64, 1e-10)] {
        let model = model(&fixture, &tensors, dtype);
        let tower = ImageTower::new(&model).unwrap();
        let decomposition = tower.decompose(&tensors["images"]).unwrap();
        let close = |found: &Tensor, expected: &Tensor| {
            let error = difference(found, expected);
            assert!(error < tolerance, "{dtype:?}: {error}");
        };
        close(decomposition.embeddings(), &tensors["expected.embeddings"]);
        close(
            &decomposition.tokens().unwrap(),
            &tensors["expected.tokens"],
        );
        let components = decomposition.components().unwrap();
        let heads = &tensors["expected.heads"]; // [images, layers, heads, features]
        let direct = &tensors["expected.direct"]; // [images, layers + 1, features]
        for (index, component) in tower.components().iter().enumerate() {
            let found = components.narrow(1, index, 1).unwrap().squeeze(1).unwrap();
            let expected = match *component {
                Component::Embeddings => direct.narrow(1, 0, 1).unwrap().squeeze(1).unwrap(),
                Component::Feedforward { layer } => {
                    direct.narrow(1, layer + 1, 1).unwrap().squeeze(1).unwrap()
                }
                Component::Head { layer, head } => {
                    let layer = heads.narrow(1, layer, 1).unwrap().squeeze(1).unwrap();
                    layer.narrow(1, head, 1).unwrap().squeeze(1).unwrap()
                }
            };
            close(&found, &expected);
        }
        for layer in 0..tower.depth() {
            // [tokens, heads, features] -> [heads, tokens, features]
            let expected = tensors["expected.first_image"].get(layer).unwrap();
            let expected = expected.transpose(0, 1).unwrap();
            close(
                &decomposition.entries(layer).unwrap().get(0).unwrap(),
                &expected,
            );
        }
    }
}

#[test]
fn heads_are_named_as_by_the_printed_algorithm() {
    let (fixture, tensors) = fixture();
    let model = model(&fixture, &tensors, DType::F64);
    let tower = ImageTower::new(&model).unwrap();
    let components = tower
        .decompose(&tensors["images"])
        .unwrap()
        .components()
        .unwrap();
    let texts = matrix_from_tensor("texts", &tensors["texts"]).unwrap();
    for head in &fixture.heads {
        let component = Component::Head {
            layer: head.layer,
            head: head.head,
        };
        let index = tower.index_of(component).unwrap();
        let outputs = components.narrow(1, index, 1).unwrap().squeeze(1).unwrap();
        let outputs = matrix_from_tensor("outputs", &outputs).unwrap();
        let rank = tower.head_width(head.layer);
        let span = text_span(outputs.as_ref(), texts.as_ref(), rank, fixture.choices).unwrap();
        assert_eq!(span.texts, head.texts, "{component}");
        let rebuilt = span.reconstruct(outputs.as_ref());
        for (image, row) in head.rebuilt.iter().enumerate() {
            for (feature, expected) in row.iter().enumerate() {
                assert!(
                    (rebuilt[(image, feature)] - expected).abs() < 1e-9,
                    "{component}"
                );
            }
        }
    }
}
