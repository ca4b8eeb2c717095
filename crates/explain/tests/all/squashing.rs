//! What is exact about collapse and over-squashing.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

mod collapse;
mod sensitivity;

use std::collections::BTreeMap;

use crate::common;
use crate::common::{DECODER, GATED, model, tokens};
use lapidary_explain::Question;
use lapidary_explain::analyses::squashing::paths::{mixing, path_sums, uniform};
use lapidary_explain::analyses::squashing::{
    Alphabet, Directions, Emulated, Family, Flow, Inquiry, Probe, Separator, check_fits,
    jacobian_norms, lengths, path_bound, report,
};
use lapidary_kernels::{Device, Tensor};
use lapidary_model::{Input, Model, ModelSpec};
use lapidary_signal::rounding::{Format, Rounding, SoftmaxPrecision};

fn rounding(format: Format) -> Option<Rounding> {
    Some(Rounding {
        format,
        softmax: SoftmaxPrecision::Fused,
    })
}

fn alphabet() -> Alphabet {
    Alphabet {
        one: 1,
        zero: 0,
        digits: (0..10).collect(),
        ..Alphabet::default()
    }
}

/// A causal decoder that knows no positions.
fn no_positions() -> String {
    DECODER
        .replace("position = { kind = \"learned\" }\n", "")
        .replace("length = 12", "length = 600")
}

fn question_ids(length: u32) -> Vec<u32> {
    (0..length).map(|i| (i * 7 + i * i) % 20).collect()
}

#[test]
fn emulated_vectors_are_numbers_of_the_format() {
    let model = model(GATED, 8);
    let exact = Emulated::new(&model, None).unwrap();
    let exact = exact.last_vector(&question_ids(10)).unwrap();
    let mut errors = Vec::new();
    for format in Format::ALL {
        for softmax in [
            SoftmaxPrecision::Fused,
            SoftmaxPrecision::Wide,
            SoftmaxPrecision::Narrow,
        ] {
            let rounding = Some(Rounding { format, softmax });
            let emulated = Emulated::new(&model, rounding).unwrap();
            assert_eq!(emulated.format(), Some(format));
            let y = emulated.last_vector(&question_ids(10)).unwrap();
            let tensor = Tensor::from_slice(&y, y.len(), &Device::Cpu).unwrap();
            let rounded = format.round(&tensor).unwrap().to_vec1::<f64>().unwrap();
            assert_eq!(y, rounded);
            let pairs = y.iter().zip(&exact);
            errors.push(pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f64::max));
        }
    }
    // Narrowest first, three ways each: wider formats are nearer.
    assert!(
        errors[..3].iter().all(|e| *e < 0.3 && *e > errors[3]),
        "{errors:?}"
    );
    assert!(errors[6..].iter().all(|e| *e < 1e-4), "{errors:?}");
}

#[test]
fn sharpening_starts_where_it_is_told() {
    let model = model(&no_positions(), 9);
    let plain = Emulated::new(&model, None).unwrap();
    let sharp = Emulated::new(&model, None).unwrap().sharpened(16).unwrap();
    let ids = |length: usize| -> Vec<u32> { (0..length).map(|i| (i % 20) as u32).collect() };
    let of = |model: &Emulated, length| model.last_vector(&ids(length)).unwrap();
    assert_eq!(of(&plain, 16), of(&sharp, 16));
    assert_ne!(of(&plain, 40), of(&sharp, 40));
    let normed = GATED.replace(
        "bias = false,",
        "bias = false, query_key_norm = { norm = { kind = \"rms\" }, per_head = true },",
    );
    let normed = Emulated::new(&common::model(&normed, 9), None).unwrap();
    assert!(
        normed
            .sharpened(16)
            .unwrap_err()
            .to_string()
            .contains("queries")
    );
}

#[test]
fn sequences_must_fit() {
    let model = model(DECODER, 10);
    assert!(check_fits(&model, &alphabet(), 11).is_ok());
    let error = check_fits(&model, &alphabet(), 12).unwrap_err().to_string();
    assert!(error.contains("13") && error.contains("12"), "{error}");
    let far = Alphabet {
        one: 20,
        ..alphabet()
    };
    let error = check_fits(&model, &far, 3).unwrap_err().to_string();
    assert!(error.contains("token is 20"), "{error}");
}

#[test]
fn the_report_has_every_family_format_and_remedy() {
    let model = model(&no_positions(), 11);
    let inquiry = Inquiry {
        families: vec![
            Family::Ones,
            Family::OnesThenZero,
            Family::RepeatedLast { seed: 1 },
        ],
        alphabet: alphabet(),
        lengths: lengths(2, 64, 8),
        formats: vec![Format::Bf16, Format::F32],
        softmax: SoftmaxPrecision::Wide,
        separator: Some(Separator {
            token: 15,
            every: 4,
        }),
        sharpen: Some(8),
        prompts: vec![Probe::CopyLast.prompt(5, &alphabet()).unwrap()],
        seed: 1,
    };
    let found = report(&model, &inquiry).unwrap();
    assert_eq!(found.tables[0].rows.len(), 3 * 3 * 3);
    assert_eq!(found.tables[1].rows.len(), 3);
    assert_eq!(found.plots.len(), 4);
    // Jacobians of two kinds, the bound, and the theory of uniform attention.
    assert_eq!(found.plots[3].series.len(), 4);
    assert!(found.plots.iter().all(|plot| plot.to_svg().is_ok()));
    let input = Input::tokens(Tensor::new(&[[1u32, 2]], &Device::Cpu).unwrap());
    assert!(path_bound(&Question::new(&model, &input)).is_ok());
}

/// `x ← (1664525 x + 1013904223) mod 2³²`, as in the oracle: numbers of `f32` within ±0.6.
struct Numbers(u64);

impl Numbers {
    fn draw(&mut self, shape: &[usize]) -> Tensor {
        let count: usize = shape.iter().product();
        let values: Vec<f64> = (0..count)
            .map(|_| {
                self.0 = (1_664_525 * self.0 + 1_013_904_223) % (1 << 32);
                f64::from(((self.0 as f64 / 2f64.powi(32) - 0.5) * 1.2) as f32)
            })
            .collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    }
}

/// Against `tests/oracles/squashing.py`: every path walked by recursion, and PyTorch's autograd.
#[test]
fn the_numbers_are_those_of_an_independent_implementation() {
    let json = include_str!("../fixtures/squashing.json");
    let golden: serde_json::Value = serde_json::from_str(json).unwrap();
    let expected =
        |name: &str| -> Vec<f64> { serde_json::from_value(golden[name].clone()).unwrap() };
    let assert_all = |found: &[f64], name: &str| {
        let expected = expected(name);
        assert_eq!(found.len(), expected.len(), "{name}");
        for (a, b) in found.iter().zip(&expected) {
            assert!((a - b).abs() < 1e-9 * b.abs().max(1.0), "{name}: {a} {b}");
        }
    };
    let spec: ModelSpec = toml::from_str(
        r#"
width = 8
final_norm = { kind = "layer" }
[input]
kind = "tokens"
vocabulary = 6
length = 16
[[blocks]]
repeat = 2
attention = { kind = "multi-head", heads = 2, causal = true }
feedforward = { kind = "dense", hidden = 12, activation = "gelu" }
[head]
kind = "none"
"#,
    )
    .unwrap();
    let mut numbers = Numbers(2024);
    let mut parameters = BTreeMap::new();
    let table = numbers.draw(&[6, 8]);
    parameters.insert("embeddings.tokens.weight".to_owned(), table);
    let norm = |parameters: &mut BTreeMap<String, Tensor>, at: &str, numbers: &mut Numbers| {
        let weight = (numbers.draw(&[8]) + 1.0).unwrap();
        parameters.insert(format!("{at}.weight"), weight);
        parameters.insert(format!("{at}.bias"), numbers.draw(&[8]));
    };
    for block in 0..2 {
        let at = format!("blocks.{block}");
        norm(
            &mut parameters,
            &format!("{at}.attention_norm"),
            &mut numbers,
        );
        norm(
            &mut parameters,
            &format!("{at}.feedforward_norm"),
            &mut numbers,
        );
        for name in ["query", "key", "value", "output"] {
            let layer = format!("{at}.attention.{name}");
            parameters.insert(format!("{layer}.weight"), numbers.draw(&[8, 8]));
            parameters.insert(format!("{layer}.bias"), numbers.draw(&[8]));
        }
        for (name, shape) in [("up", [12, 8]), ("down", [8, 12])] {
            let layer = format!("{at}.feedforward.{name}");
            parameters.insert(format!("{layer}.weight"), numbers.draw(&shape));
            parameters.insert(format!("{layer}.bias"), numbers.draw(&shape[..1]));
        }
    }
    norm(&mut parameters, "final_norm", &mut numbers);
    let model = Model::new(spec, &mut parameters).unwrap();
    let ids: Vec<u32> = serde_json::from_value(golden["ids"].clone()).unwrap();
    let exact = Emulated::new(&model, None).unwrap();
    assert_all(&exact.last_vector(&ids).unwrap(), "last");
    let input = tokens(&ids);
    let question = Question::new(&model, &input);
    assert_all(&path_bound(&question).unwrap(), "bound");
    let frozen = jacobian_norms(&question, Flow::Frozen, Directions::Every).unwrap();
    assert_all(&frozen.operator.unwrap(), "frozen_operator");
    let whole = jacobian_norms(&question, Flow::All, Directions::Every).unwrap();
    assert_all(&whole.frobenius, "whole_frobenius");
    let layers = vec![mixing(&uniform(9), 1.5); 3];
    assert_all(&path_sums(&layers), "uniform_paths");
    let numbers = Tensor::from_slice(&expected("numbers"), 200, &Device::Cpu).unwrap();
    let rounded = Format::Bf16
        .round(&numbers)
        .unwrap()
        .to_vec1::<f64>()
        .unwrap();
    assert_eq!(rounded, expected("bf16"));
}
