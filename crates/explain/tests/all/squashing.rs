//! What is exact about collapse and over-squashing.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use crate::common;
use crate::common::{DECODER, ENCODER, GATED, model, tokens};
use lapidary_explain::Question;
use lapidary_explain::analyses::squashing::paths::{dilution, mixing, path_sums, uniform};
use lapidary_explain::analyses::squashing::{
    Alphabet, Directions, Distance, Emulated, Family, Flow, Inquiry, Probe, Separator, check_fits,
    collapse_length, decline, jacobian_norms, lengths, path_bound, report,
};
use lapidary_kernels::{Device, Tensor};
use lapidary_model::{Input, Model, ModelSpec, Pass};
use lapidary_signal::rounding::{Format, Rounding, SoftmaxPrecision};
use lapidary_signal::{Signal, Trace};
use std::collections::BTreeMap;

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

/// `y_n = x_n + mean_{j ≤ n} x_j`: one head with uniform attention and no norm. `x` is `one` or
/// `zero`.
fn uniform_model(one: [f64; 4], zero: [f64; 4]) -> Model {
    let spec: ModelSpec = toml::from_str(
        r#"
width = 4
[input]
kind = "tokens"
vocabulary = 2
length = 4096
[[blocks]]
norm = { kind = "none" }
attention = { kind = "multi-head", heads = 1, causal = true, bias = false }
[head]
kind = "none"
"#,
    )
    .unwrap();
    let eye = Tensor::eye(4, lapidary_kernels::DType::F64, &Device::Cpu).unwrap();
    let mut parameters = BTreeMap::new();
    for name in ["query", "key"] {
        let zero = eye.zeros_like().unwrap();
        parameters.insert(format!("blocks.0.attention.{name}.weight"), zero);
    }
    for name in ["value", "output"] {
        parameters.insert(format!("blocks.0.attention.{name}.weight"), eye.clone());
    }
    let table = Tensor::new(&[zero, one], &Device::Cpu).unwrap();
    parameters.insert("embeddings.tokens.weight".to_owned(), table);
    Model::new(spec, &mut parameters).unwrap()
}

/// `‖y − y*‖ = |c| (1/n − 1/(n + 1))` with `c = x_0 − x_1`.
#[test]
fn one_layer_of_uniform_attention_collapses_as_the_formula_says() {
    let (one, zero) = ([0.5, -1.0, 0.25, 2.0], [1.5, 0.5, -0.75, 1.0]);
    let exact = Emulated::new(&uniform_model(one, zero), None).unwrap();
    let lengths = lengths(8, 1000, 20);
    let found = exact
        .distances(Family::OnesThenZero, &alphabet(), &lengths)
        .unwrap();
    let c = 1.5; // the largest of |zero − one|
    for distance in &found {
        let n = distance.n as f64;
        let expected = c * (1.0 / n - 1.0 / (n + 1.0));
        assert!((distance.largest - expected).abs() < 1e-14, "{distance:?}");
    }
    let law = decline(&found[8..]).unwrap();
    assert!(
        (law.exponent + 2.0).abs() < 0.02 && law.r_squared > 0.9999,
        "{law:?}"
    );
}

/// `D < ε ‖y‖` from `n ≈ √(|c| / (ε ‖y‖))` on: `2^{3.5}` times the root of the ratio of norms in
/// bf16, near where the difference is half a spacing.
#[test]
fn formats_collapse_where_the_formula_says() {
    let cases = [
        (Format::Bf16, 1.0),
        (Format::Bf16, 0.25),
        (Format::F16, 1.0),
        (Format::F16, 0.25),
        (Format::F32, 1.0 / 64.0),
    ];
    for (format, ratio) in cases {
        // `y = x_0 + x_1 + c / n`: norm 2, and `c` is `2 · ratio`.
        let model = uniform_model([1.0 - ratio, 0.0, 0.0, 0.0], [1.0 + ratio, 0.0, 0.0, 0.0]);
        let predicted = (ratio / format.epsilon()).sqrt();
        let least = (predicted / 3.0).max(2.0) as usize;
        let lengths = lengths(least, (3.0 * predicted) as usize, 24);
        let emulated = Emulated::new(&model, rounding(format)).unwrap();
        let found = emulated
            .distances(Family::OnesThenZero, &alphabet(), &lengths)
            .unwrap();
        let n = collapse_length(&found, format).unwrap();
        let factor = n as f64 / predicted;
        assert!(
            (0.5..=2.0).contains(&factor),
            "{format:?} {ratio}: {n} {predicted}"
        );
    }
}

#[test]
fn collapse_wants_five_in_a_row() {
    let distance = |n: usize, largest: f64| Distance {
        n,
        largest,
        relative: largest,
        norm: 1.0,
        equal: largest == 0.0,
    };
    let tiny = 1e-3; // below the epsilon of bf16
    let found: Vec<Distance> = [1.0, 0.0, tiny, 1.0, tiny, 0.0, tiny, tiny, 0.0, tiny]
        .iter()
        .enumerate()
        .map(|(n, largest)| distance(n, *largest))
        .collect();
    assert_eq!(collapse_length(&found, Format::Bf16), Some(4));
    assert_eq!(collapse_length(&found, Format::F32), None);
    assert_eq!(collapse_length(&found[..8], Format::Bf16), None);
}

#[test]
fn equal_tokens_without_positions_have_equal_rows() {
    for spec in [
        no_positions(),
        GATED.replace(", position = { kind = \"rotary\" }", ""),
    ] {
        let model = model(&spec, 2);
        let ones = [7; 11];
        for format in Format::ALL {
            let emulated = Emulated::new(&model, rounding(format)).unwrap();
            let spread = emulated.row_spread(&ones).unwrap();
            assert_eq!(spread, [0.0, 0.0], "{format:?}: not equal bit for bit");
            assert_eq!(
                emulated.last_vector(&ones[..5]).unwrap(),
                emulated.last_vector(&ones).unwrap()
            );
        }
        let exact = Emulated::new(&model, None).unwrap();
        assert!(
            exact
                .row_spread(&ones)
                .unwrap()
                .iter()
                .all(|spread| *spread < 1e-13)
        );
    }
    let learned = Emulated::new(&model(DECODER, 2), None).unwrap();
    assert!(learned.row_spread(&[7; 11]).unwrap()[0] > 1e-3);
}

#[test]
fn without_a_mask_and_positions_only_proportions_count() {
    let spec = ENCODER.replace("kind = \"learned\"", "kind = \"none\"");
    let model = model(&spec, 3);
    let hidden = |ids: &[u32]| {
        let output = model.forward(&tokens(ids), Pass::default()).unwrap();
        let rows = output.hidden.value().get(0).unwrap();
        rows.to_vec2::<f64>().unwrap()
    };
    let once = hidden(&[3, 9, 9, 1, 4, 9]);
    let twice = hidden(&[3, 9, 9, 1, 4, 9, 3, 9, 9, 1, 4, 9]);
    for (row, expected) in twice.iter().zip(once.iter().cycle()) {
        for (a, b) in row.iter().zip(expected) {
            assert!((a - b).abs() < 1e-6, "{a} {b}");
        }
    }
}

/// The most that attention with bounded scores can give one token, on a real model.
#[test]
fn attention_is_diluted_as_the_bound_says() {
    let model = model(&no_positions(), 4);
    for length in [3, 30, 300] {
        let ids: Vec<u32> = (0..length).map(|i| (i * i % 20) as u32).collect();
        let trace = Trace::new().capture("blocks.*.attention.weights").unwrap();
        let pass = Pass {
            trace: Some(&trace),
            ..Pass::default()
        };
        model.forward(&tokens(&ids), pass).unwrap();
        for block in 0..2 {
            let weights = trace
                .signal(&format!("blocks.{block}.attention.weights"))
                .unwrap();
            let weights = weights
                .into_value()
                .get(0)
                .unwrap()
                .to_vec3::<f64>()
                .unwrap();
            for head in weights {
                let row = head.last().unwrap();
                let most = row.iter().copied().fold(0.0, f64::max);
                let least = row.iter().copied().fold(1.0, f64::min);
                // Scores are known up to a constant: `b` is half of their range.
                let b = 0.5 * (most / least).ln();
                let (low, high) = dilution(b, length);
                assert!(low <= least * 1.000_001 && most <= high * 1.000_001);
            }
        }
    }
}

fn question_ids(length: u32) -> Vec<u32> {
    (0..length).map(|i| (i * 7 + i * i) % 20).collect()
}

#[test]
fn the_bound_over_paths_holds_where_attention_and_norms_are_fixed() {
    let parallel = DECODER.replace("repeat = 2", "repeat = 2\nwiring = \"parallel\"");
    let silent = GATED.replace(
        "[head]",
        "[low_rank]\n\"blocks.0.attention.value\" = 3\n[head]",
    );
    let post = "wiring = \"post-norm\"";
    let after = DECODER.replace("repeat = 2", &format!("repeat = 2\n{post}"));
    let gated_after = GATED.replace("repeat = 2", &format!("repeat = 3\n{post}"));
    for spec in [
        DECODER,
        GATED,
        &parallel,
        &silent,
        ENCODER,
        &after,
        &gated_after,
    ] {
        for seed in 0..3 {
            let model = model(spec, seed);
            let input = tokens(&question_ids(9));
            let question = Question::new(&model, &input);
            let bound = path_bound(&question).unwrap();
            let norms = jacobian_norms(&question, Flow::Frozen, Directions::Every).unwrap();
            let operator = norms.operator.unwrap();
            assert_eq!(bound.len(), operator.len());
            for (i, (bound, norm)) in bound.iter().zip(&operator).enumerate() {
                assert!(norm <= &(bound * (1.0 + 1e-9)), "{i}: {norm} above {bound}");
                assert!(*norm > 0.0);
            }
            for (operator, frobenius) in operator.iter().zip(&norms.frobenius) {
                assert!(*operator <= frobenius * (1.0 + 1e-9));
            }
        }
    }
}

#[test]
fn what_has_no_bound_says_so() {
    let mixer = r#"attention = { kind = "mamba", inner = 16, state = 4, step_rank = 2 }"#;
    let line = DECODER.lines().find(|line| line.starts_with("attention"));
    let model = model(&DECODER.replace(line.unwrap(), mixer), 1);
    let input = tokens(&[1, 2, 3]);
    let error = path_bound(&Question::new(&model, &input)).unwrap_err();
    assert!(error.to_string().contains("multi-head"), "{error}");
}

/// One feature, a linear feed-forward part, and nothing negative: the bound is the Jacobian.
#[test]
fn the_bound_is_attained_in_one_dimension() {
    for wiring in ["pre-norm", "post-norm", "parallel"] {
        let model = one_feature(wiring);
        let input = tokens(&[0, 3, 1, 4, 2, 2, 0, 1]);
        let question = Question::new(&model, &input);
        let bound = path_bound(&question).unwrap();
        let norms = jacobian_norms(&question, Flow::Frozen, Directions::Every).unwrap();
        for (bound, norm) in bound.iter().zip(&norms.operator.unwrap()) {
            assert!(
                (bound - norm).abs() < 1e-9 * bound,
                "{wiring}: {bound} {norm}"
            );
        }
    }
}

fn one_feature(wiring: &str) -> Model {
    let spec = format!(
        r#"
width = 1
final_norm = {{ kind = "rms" }}
[input]
kind = "tokens"
vocabulary = 5
length = 16
[[blocks]]
repeat = 3
wiring = "{wiring}"
norm = {{ kind = "rms" }}
attention = {{ kind = "multi-head", heads = 1, causal = true, bias = false }}
feedforward = {{ kind = "dense", hidden = 1, activation = "identity", bias = false }}
[head]
kind = "none"
"#
    );
    let spec: ModelSpec = toml::from_str(&spec).unwrap();
    let mut parameters = BTreeMap::new();
    let scalar = |value: f64| Tensor::new(&[[value]], &Device::Cpu).unwrap();
    let gain = |value: f64| Tensor::new(&[value], &Device::Cpu).unwrap();
    for block in 0..3 {
        let at = |name: &str| format!("blocks.{block}.{name}.weight");
        let own = 1.0 + block as f64;
        parameters.insert(at("attention.query"), scalar(0.9 * own));
        parameters.insert(at("attention.key"), scalar(-0.7));
        parameters.insert(at("attention.value"), scalar(1.3));
        parameters.insert(at("attention.output"), scalar(0.6 * own));
        parameters.insert(at("feedforward.up"), scalar(0.8));
        parameters.insert(at("feedforward.down"), scalar(1.1));
        parameters.insert(at("attention_norm"), gain(1.2));
        parameters.insert(at("feedforward_norm"), gain(0.7));
    }
    parameters.insert("final_norm.weight".to_owned(), gain(1.4));
    let table = Tensor::new(&[[0.5], [1.0], [1.5], [0.2], [2.5]], &Device::Cpu).unwrap();
    parameters.insert("embeddings.tokens.weight".to_owned(), table);
    Model::new(spec, &mut parameters).unwrap()
}

/// A post-norm encoder written down a second time, with its attention weights and the deviations
/// of its norms held at those of the first input: what the bound bounds.
struct Held<'a> {
    model: &'a Model,
    heads: usize,
    weights: Vec<Tensor>,
    deviations: std::cell::RefCell<Vec<Tensor>>,
}

impl Held<'_> {
    fn linear(&self, path: &str, x: &Tensor) -> Tensor {
        let get = |name: &str| &self.model.parameters()[&format!("{path}.{name}")];
        let y = x.matmul(&get("weight").t().unwrap()).unwrap();
        y.broadcast_add(get("bias")).unwrap()
    }

    /// The norm of a sum; the first pass records deviations, later ones use them in order.
    fn norm(&self, path: &str, x: Tensor, call: usize) -> Tensor {
        let get = |name: &str| &self.model.parameters()[&format!("{path}.{name}")];
        let x = x.broadcast_sub(&x.mean_keepdim(1).unwrap()).unwrap();
        let mut known = self.deviations.borrow_mut();
        if known.len() == call {
            let variance = x.sqr().unwrap().mean_keepdim(1).unwrap();
            known.push((variance + 1e-5).unwrap().sqrt().unwrap());
        }
        let x = x.broadcast_div(&known[call]).unwrap();
        let x = x.broadcast_mul(get("weight")).unwrap();
        x.broadcast_add(get("bias")).unwrap()
    }

    /// `[length, width]` to the last row of the last block's output.
    fn last(&self, mut x: Tensor) -> Vec<f64> {
        let width = x.dims()[1] / self.heads;
        for (index, weights) in self.weights.iter().enumerate() {
            let at = |name: &str| format!("blocks.{index}.{name}");
            let value = self.linear(&at("attention.value"), &x);
            let mixed: Vec<Tensor> = (0..self.heads)
                .map(|head| {
                    let own = value.narrow(1, head * width, width).unwrap();
                    let own = own.contiguous().unwrap();
                    weights.get(head).unwrap().matmul(&own).unwrap()
                })
                .collect();
            let written = self.linear(&at("attention.output"), &Tensor::cat(&mixed, 1).unwrap());
            let y = self.norm(&at("attention_norm"), (x + written).unwrap(), 2 * index);
            let hidden = self.linear(&at("feedforward.up"), &y).gelu_erf().unwrap();
            let written = self.linear(&at("feedforward.down"), &hidden);
            x = self.norm(
                &at("feedforward_norm"),
                (y + written).unwrap(),
                2 * index + 1,
            );
        }
        let rows = x.dims()[0];
        x.get(rows - 1).unwrap().to_vec1::<f64>().unwrap()
    }
}

/// `[feature, direction]` of each token's Jacobian by central differences.
#[test]
fn the_bound_after_sums_holds_for_finite_differences() {
    let model = model(&ENCODER.replace("repeat = 2", "repeat = 3"), 5);
    let ids = question_ids(7);
    let input = tokens(&ids);
    let question = Question::new(&model, &input);
    let trace = Trace::new().capture("*").unwrap();
    let pass = Pass {
        trace: Some(&trace),
        ..Pass::default()
    };
    let output = model.forward(&input, pass).unwrap();
    let site = |name: &str| trace.signal(name).unwrap().into_value().get(0).unwrap();
    let held = Held {
        model: &model,
        heads: 4,
        weights: (0..3)
            .map(|index| site(&format!("blocks.{index}.attention.weights")))
            .collect(),
        deviations: Default::default(),
    };
    let embeddings = site("embeddings");
    let (length, width) = embeddings.dims2().unwrap();
    let own = held.last(embeddings.clone());
    let hidden = output.hidden.value().get(0).unwrap();
    let expected = hidden.get(length - 1).unwrap().to_vec1::<f64>().unwrap();
    for (a, b) in own.iter().zip(&expected) {
        assert!((a - b).abs() < 1e-9, "written twice: {a} {b}");
    }
    let bound = path_bound(&question).unwrap();
    let frozen = jacobian_norms(&question, Flow::Frozen, Directions::Every).unwrap();
    let step = 1e-5;
    for token in 0..length {
        let mut columns = Vec::new();
        for feature in 0..width {
            let mut bump = vec![0.0; length * width];
            bump[token * width + feature] = step;
            let bump = Tensor::from_vec(bump, (length, width), &Device::Cpu).unwrap();
            let up = held.last((&embeddings + &bump).unwrap());
            let down = held.last((&embeddings - &bump).unwrap());
            let slopes = up.iter().zip(&down).map(|(a, b)| (a - b) / (2.0 * step));
            columns.push(slopes.collect::<Vec<f64>>());
        }
        let jacobian = lapidary_factor::Matrix::from_fn(width, width, |i, j| columns[j][i]);
        let norm = lapidary_factor::thin_svd(jacobian.as_ref()).unwrap().s[0];
        assert!(
            norm <= bound[token] && norm > 0.0,
            "{token}: {norm} above {}",
            bound[token]
        );
        let operator = frozen.operator.as_ref().unwrap()[token];
        assert!(
            (operator - norm).abs() < 1e-6 * norm,
            "{token}: {operator} {norm}"
        );
    }
}

/// `‖∂y_n / ∂v_i‖` by central differences, with attention weights held at those of `ids` or not.
fn by_differences(model: &Model, ids: &[u32], frozen: bool) -> Vec<f64> {
    let trace = Trace::new();
    let trace = trace.capture("blocks.*.attention.weights").unwrap();
    let trace = trace.capture("embeddings").unwrap();
    let pass = Pass {
        trace: Some(&trace),
        ..Pass::default()
    };
    model.forward(&tokens(ids), pass).unwrap();
    let kept: BTreeMap<String, Tensor> = trace
        .records()
        .into_iter()
        .map(|(name, record)| (name, record.signal.into_value()))
        .collect();
    let embeddings = kept["embeddings"].clone();
    let (_, length, width) = embeddings.dims3().unwrap();
    let step = 1e-5;
    let last = |moved: Tensor| {
        let kept = kept.clone();
        let mut trace = Trace::new()
            .replace("embeddings", move |_, _| Ok(Signal::from(moved.clone())))
            .unwrap();
        if frozen {
            trace = trace
                .replace("blocks.*.attention.weights", move |name, _| {
                    Ok(Signal::from(kept[name].clone()))
                })
                .unwrap();
        }
        let pass = Pass {
            trace: Some(&trace),
            ..Pass::default()
        };
        let hidden = model.forward(&tokens(ids), pass).unwrap().hidden;
        let last = hidden.value().get(0).unwrap().get(length - 1).unwrap();
        last.to_vec1::<f64>().unwrap()
    };
    let mut norms = Vec::new();
    for token in 0..length {
        let mut squares = 0.0;
        for feature in 0..width {
            let mut bump = vec![0.0; length * width];
            bump[token * width + feature] = step;
            let bump = Tensor::from_vec(bump, (1, length, width), &Device::Cpu).unwrap();
            let up = last((&embeddings + &bump).unwrap());
            let down = last((&embeddings - &bump).unwrap());
            let slopes = up.iter().zip(&down).map(|(a, b)| (a - b) / (2.0 * step));
            squares += slopes.map(|slope| slope * slope).sum::<f64>();
        }
        norms.push(squares.sqrt());
    }
    norms
}

#[test]
fn jacobians_are_those_of_finite_differences() {
    // Without norms, holding attention is holding everything that the bound holds.
    let bare = no_positions()
        .replace("final_norm = { kind = \"layer\" }\n", "")
        .replace("repeat = 2", "repeat = 2\nnorm = { kind = \"none\" }");
    let ids = question_ids(5);
    for (spec, flow) in [
        (bare.as_str(), Flow::Frozen),
        (DECODER, Flow::All),
        (GATED, Flow::All),
    ] {
        let model = model(spec, 6);
        let input = tokens(&ids);
        let found = jacobian_norms(&Question::new(&model, &input), flow, Directions::Every);
        let expected = by_differences(&model, &ids, flow == Flow::Frozen);
        for (found, expected) in found.unwrap().frobenius.iter().zip(&expected) {
            assert!(
                (found - expected).abs() < 1e-6 * expected,
                "{flow:?}: {found} {expected}"
            );
        }
    }
}

#[test]
fn random_directions_estimate_the_norms() {
    let model = model(DECODER, 7);
    let input = tokens(&question_ids(6));
    let question = Question::new(&model, &input);
    let exact = jacobian_norms(&question, Flow::All, Directions::Every).unwrap();
    let random = Directions::Random {
        count: 600,
        seed: 3,
    };
    let found = jacobian_norms(&question, Flow::All, random).unwrap();
    assert!(found.operator.is_none());
    for (a, b) in found.frobenius.iter().zip(&exact.frobenius) {
        assert!((a - b).abs() < 0.15 * b, "{a} {b}");
    }
    let none = Directions::Random { count: 0, seed: 3 };
    assert!(jacobian_norms(&question, Flow::All, none).is_err());
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
