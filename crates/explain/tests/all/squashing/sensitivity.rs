//! Norms of Jacobians, and the bounds over paths that hold for them.

use std::collections::BTreeMap;

use super::{no_positions, question_ids};
use crate::common::{self, DECODER, ENCODER, GATED, model, tokens};
use lapidary_explain::Question;
use lapidary_explain::analyses::squashing::{Directions, Flow, jacobian_norms, path_bound};
use lapidary_kernels::{Device, Tensor};
use lapidary_model::{Model, ModelSpec, Pass};
use lapidary_signal::{Signal, Trace};

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
    // Weights through learned projections are of both signs.
    let signed = DECODER.replace(
        "heads = 4, causal = true",
        "heads = 4, mechanism = { kind = \"linformer\", slots = 3, longest = 12 }",
    );
    assert_ne!(signed, DECODER);
    for spec in [
        DECODER,
        GATED,
        &parallel,
        &silent,
        ENCODER,
        &after,
        &gated_after,
        &signed,
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
    // Weights say nothing of a filter, and one matrix for all is no product of two.
    for (attention, named) in [
        (
            "heads = 4, local = { side = 3 }",
            "a filter beside the heads",
        ),
        (
            "heads = 4, sharing = \"all\", output = \"tied\", bias = false",
            "tied to the queries",
        ),
        (
            "heads = 4, sharing = \"all\", bias = false",
            "tied to the queries",
        ),
    ] {
        let spec = DECODER.replace("heads = 4, causal = true", attention);
        assert_ne!(spec, DECODER);
        let model = common::model(&spec, 1);
        let error = path_bound(&Question::new(&model, &input)).unwrap_err();
        assert!(error.to_string().contains(named), "{error}");
    }
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
