//! ALTI, ALTI-Logit and GlobEnc against an independent PyTorch implementation,
//! `tests/oracles/alti.py`.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use crate::common::fixtures;
use lapidary_explain::{Options, Question, Target, explainer, logit_updates};
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::{Input, Model, ModelSpec};
use serde::Deserialize;
use std::collections::BTreeMap;

#[derive(Deserialize)]
struct Fixture {
    input_ids: Vec<u32>,
    target: usize,
    foil: usize,
    decoders: BTreeMap<String, Decoder>,
    encoder: Encoder,
}

#[derive(Deserialize)]
struct Decoder {
    spec: ModelSpec,
    explained: f64,
    scores: Vec<f64>,
    embedding: f64,
    feedforward: Vec<f64>,
    output_bias: Vec<f64>,
    norm_bias: f64,
    alti: Vec<f64>,
}

#[derive(Deserialize)]
struct Encoder {
    spec: ModelSpec,
    logits: Vec<f64>,
    alti: Vec<f64>,
    globenc: Vec<f64>,
}

fn fixture() -> Fixture {
    let json = std::fs::read(fixtures().join("alti.json")).unwrap();
    serde_json::from_slice(&json).unwrap()
}

fn model(name: &str, spec: &ModelSpec, dtype: DType) -> Model {
    let bytes = std::fs::read(fixtures().join(format!("{name}.safetensors"))).unwrap();
    let stored = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut parameters: BTreeMap<String, Tensor> = stored
        .tensors()
        .into_iter()
        .map(|(name, view)| {
            let numbers = view.data().chunks_exact(4);
            let values: Vec<f32> = numbers
                .map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()))
                .collect();
            let tensor = Tensor::from_vec(values, view.shape(), &Device::Cpu).unwrap();
            (name, tensor.to_dtype(dtype).unwrap())
        })
        .collect();
    Model::new(spec.clone(), &mut parameters).unwrap()
}

fn close(what: &str, found: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len());
    let scale = expected.iter().fold(1e-30, |m: f64, v| m.max(v.abs()));
    for (a, b) in found.iter().zip(expected) {
        let error = (a - b).abs() / scale;
        assert!(
            error < tolerance,
            "{what}: {error}\n{found:?}\n{expected:?}"
        );
    }
}

const DTYPES: [(DType, f64); 2] = [(DType::F32, 2e-4), (DType::F64, 1e-9)];

#[test]
fn decoders_are_taken_apart_as_in_pytorch() {
    let fixture = fixture();
    let ids = fixture.input_ids.as_slice();
    let input = Input::tokens(Tensor::from_slice(ids, (1, ids.len()), &Device::Cpu).unwrap());
    for (name, expected) in &fixture.decoders {
        for (dtype, tolerance) in DTYPES {
            let model = model(name, &expected.spec, dtype);
            let question = Question::new(&model, &input);
            let target = Target::Score {
                class: fixture.target,
                foil: Some(fixture.foil),
                position: None,
            };
            let updates = logit_updates(&question, &[target]).unwrap().pop().unwrap();
            let check = |what: &str, found: &[f64], expected: &[f64]| {
                close(
                    &format!("{name} {dtype:?} {what}"),
                    found,
                    expected,
                    tolerance,
                );
            };
            let each = |of: fn(&lapidary_explain::BlockUpdates) -> f64| -> Vec<f64> {
                updates.blocks.iter().map(of).collect()
            };
            check("number", &[updates.explained], &[expected.explained]);
            check("embedding", &[updates.embedding], &[expected.embedding]);
            check(
                "feed-forward",
                &each(|b| b.feedforward),
                &expected.feedforward,
            );
            check("biases", &each(|b| b.output_bias), &expected.output_bias);
            if expected.norm_bias != 0.0 {
                check("final norm", &[updates.norm_bias], &[expected.norm_bias]);
            }
            let scores = updates.explanation(&Options::default()).scores;
            check("scores", &scores, &expected.scores);
            let alti = explainer("alti").unwrap();
            let alti = alti
                .explain(&question, target, &Options::default())
                .unwrap();
            check("alti", &alti.scores, &expected.alti);
        }
    }
}

#[test]
fn an_encoder_is_mixed_as_in_pytorch() {
    let fixture = fixture();
    let ids = fixture.input_ids.as_slice();
    let input = Input::tokens(Tensor::from_slice(ids, (1, ids.len()), &Device::Cpu).unwrap());
    let expected = &fixture.encoder;
    for (dtype, tolerance) in DTYPES {
        let model = model("decompx-bert", &expected.spec, dtype);
        let question = Question::new(&model, &input);
        for (name, scores) in [("alti", &expected.alti), ("globenc", &expected.globenc)] {
            let method = explainer(name).unwrap();
            let found = method
                .explain(&question, Target::class(1), &Options::default())
                .unwrap();
            close(
                &format!("{name} {dtype:?}"),
                &found.scores,
                scores,
                tolerance,
            );
            let explained = found.account.explained;
            close("logit", &[explained], &expected.logits[1..2], tolerance);
        }
    }
}
