//! Relevance against an independent PyTorch implementation, `tests/oracles/relevance.py`.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use crate::common::{assert_near, fixtures};
use lapidary_explain::{Options, Question, Target, explainer};
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::{Input, InputSpec, Model, ModelSpec, Pass};
use serde::Deserialize;
use std::collections::BTreeMap;

#[derive(Deserialize)]
struct Fixture {
    models: BTreeMap<String, Case>,
}

#[derive(Deserialize)]
struct Case {
    spec: ModelSpec,
    /// Token ids, or pixels.
    input: Vec<f64>,
    logits: Vec<f64>,
    targets: Vec<Explained>,
}

#[derive(Deserialize)]
struct Explained {
    class: usize,
    /// By method, one for each token.
    scores: BTreeMap<String, Vec<f64>>,
}

/// The parameters of every model, by `model/name`.
fn parameters() -> BTreeMap<String, Tensor> {
    let bytes = std::fs::read(fixtures().join("relevance.safetensors")).unwrap();
    let stored = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let one = |(name, view): (String, safetensors::tensor::TensorView<'_>)| {
        let values: Vec<f64> = view
            .data()
            .chunks_exact(4)
            .map(|bytes| f64::from(f32::from_le_bytes(bytes.try_into().unwrap())))
            .collect();
        let tensor = Tensor::from_vec(values, view.shape(), &Device::Cpu).unwrap();
        (name, tensor)
    };
    stored.tensors().into_iter().map(one).collect()
}

fn input(case: &Case) -> Input {
    match &case.spec.input {
        InputSpec::Patches(patches) => {
            let shape = (1, patches.channels, patches.image[0], patches.image[1]);
            let pixels = Tensor::from_vec(case.input.clone(), shape, &Device::Cpu);
            Input::Pixels(pixels.unwrap())
        }
        InputSpec::Tokens(_) => {
            let ids: Vec<u32> = case.input.iter().map(|id| *id as u32).collect();
            Input::tokens(Tensor::from_slice(&ids, (1, ids.len()), &Device::Cpu).unwrap())
        }
    }
}

#[test]
fn every_method_on_every_family_is_as_printed() {
    let json = std::fs::read(fixtures().join("relevance.json")).unwrap();
    let fixture: Fixture = serde_json::from_slice(&json).unwrap();
    let all = parameters();
    assert_eq!(fixture.models.len(), 4);
    for (name, case) in &fixture.models {
        let mut own: BTreeMap<String, Tensor> = all
            .iter()
            .filter_map(|(path, tensor)| {
                let path = path.strip_prefix(&format!("{name}/"))?;
                Some((path.to_owned(), tensor.clone()))
            })
            .collect();
        let model = Model::new(case.spec.clone(), &mut own).unwrap();
        let input = input(case);
        let logits = model.forward(&input, Pass::default()).unwrap();
        let logits = logits.into_logits().unwrap().into_value();
        let logits = logits.flatten_all().unwrap().to_dtype(DType::F64).unwrap();
        let logits = logits.to_vec1::<f64>().unwrap();
        let last = &logits[logits.len() - case.logits.len()..];
        assert_near(last, &case.logits, 1e-6, name);
        let question = Question::new(&model, &input);
        for target in &case.targets {
            for (method, expected) in &target.scores {
                let (listed, tolerance) = match method.as_str() {
                    "attnlrp" | "cp-lrp" => (format!("{method}-explicit"), 1e-7),
                    // Halves are taken before the stabiliser there and after it here.
                    other => (other.to_owned(), 1e-5),
                };
                let found = explainer(&listed)
                    .unwrap()
                    .explain(&question, Target::class(target.class), &Options::default())
                    .unwrap();
                let what = format!("{name} {method} {}", target.class);
                assert_near(&found.scores, expected, tolerance, &what);
            }
        }
    }
}
