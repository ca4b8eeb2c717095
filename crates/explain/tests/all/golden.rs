//! DecompX against an independent PyTorch implementation, `tests/oracles/decompx.py`.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use lapidary_explain::{Target, decompx};
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::{Input, Model, ModelSpec, Pass};
use lapidary_signal::streams::StreamRules;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::path::PathBuf;

#[derive(Deserialize)]
struct Fixture {
    spec: ModelSpec,
    input_ids: Vec<u32>,
    logits: Vec<f64>,
    /// `[token][class]`
    streams: Vec<Vec<f64>>,
}

fn fixture(name: &str) -> (Fixture, BTreeMap<String, Tensor>) {
    let directory = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let json = std::fs::read(directory.join(format!("decompx-{name}.json"))).unwrap();
    let bytes = std::fs::read(directory.join(format!("decompx-{name}.safetensors"))).unwrap();
    let stored = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let parameters = stored
        .tensors()
        .into_iter()
        .map(|(name, view)| {
            let values: Vec<f32> = view
                .data()
                .chunks_exact(4)
                .map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()))
                .collect();
            let tensor = Tensor::from_vec(values, view.shape(), &Device::Cpu).unwrap();
            (name, tensor)
        })
        .collect();
    (serde_json::from_slice(&json).unwrap(), parameters)
}

fn assert_golden(name: &str) {
    let (fixture, parameters) = fixture(name);
    for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::F64, 1e-9)] {
        let mut parameters: BTreeMap<String, Tensor> = parameters
            .iter()
            .map(|(name, tensor)| (name.clone(), tensor.to_dtype(dtype).unwrap()))
            .collect();
        let model = Model::new(fixture.spec.clone(), &mut parameters).unwrap();
        let length = fixture.input_ids.len();
        let ids = Tensor::from_slice(&fixture.input_ids, (1, length), &Device::Cpu).unwrap();
        let input = Input::tokens(ids);
        let logits = model.forward(&input, Pass::default()).unwrap();
        let logits = logits.into_logits().unwrap().into_value();
        let logits = logits.flatten_all().unwrap().to_dtype(DType::F64).unwrap();
        let logits = logits.to_vec1::<f64>().unwrap();
        let last = &logits[logits.len() - fixture.logits.len()..];
        let largest = |values: &[f64]| values.iter().fold(0.0, |m: f64, v| m.max(v.abs()));
        for (found, expected) in last.iter().zip(&fixture.logits) {
            let error = (found - expected).abs() / largest(&fixture.logits);
            assert!(error < tolerance, "{name} {dtype:?} logit: {error}");
        }
        for class in 0..fixture.logits.len() {
            let target = Target::class(class);
            let found = decompx(&model, &input, None, target, StreamRules::default()).unwrap();
            let expected: Vec<f64> = fixture.streams.iter().map(|s| s[class]).collect();
            assert_eq!(found.scores.len(), expected.len());
            for (found, of_token) in found.scores.iter().zip(&expected) {
                let error = (found - of_token).abs() / largest(&expected);
                assert!(error < tolerance, "{name} {dtype:?} class {class}: {error}");
            }
        }
    }
}

#[test]
fn a_bert_classifier_is_explained_as_in_the_authors_code() {
    assert_golden("bert");
}

#[test]
fn a_roberta_head_is_explained_as_in_the_authors_code() {
    assert_golden("roberta");
}

#[test]
fn a_gpt2_decoder_is_explained_by_the_same_rules() {
    assert_golden("gpt2");
}
