//! What softmax sees of FIRE: differences between the keys of a row.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use crate::common::attention::{Given, HEADS, Subject, WIDTH};
use crate::common::{
    Map, assert_near, contracted, difference, position, random, span, tensor, values,
};
use lapidary_kernels::{DType, Device, Tensor, Var};
use lapidary_parts::attention::MultiHeadSpec;
use lapidary_parts::position::{FireSpec, PositionSpec, Span};

const LENGTH: usize = 12;

fn subject(layers: usize, initial_length: usize) -> Subject {
    let fire = FireSpec {
        layers,
        initial_length,
        ..FireSpec::default()
    };
    let spec = MultiHeadSpec {
        causal: true,
        position: PositionSpec::Fire(fire),
        ..MultiHeadSpec::new(HEADS)
    };
    Subject::new(spec, 4)
}

/// One and two hidden layers, all rows before `L`, and rows on both of its sides.
fn subjects() -> Vec<(usize, Subject)> {
    let each = [(1, 512), (2, 512), (1, 5), (2, 5)];
    each.map(|(layers, initial)| (layers, subject(layers, initial)))
        .into()
}

fn with(subject: &Subject, name: &str, tensor: Tensor) -> Subject {
    let mut map = subject.map.clone();
    assert!(map.insert(name.to_owned(), tensor).is_some(), "{name}");
    Subject {
        spec: subject.spec.clone(),
        map,
    }
}

fn largest(x: &Tensor) -> f64 {
    values(x).into_iter().map(f64::abs).fold(0.0, f64::max)
}

/// The largest entry of the gradient of a parameter.
fn gradient(subject: &Subject, name: &str, x: &Tensor) -> f64 {
    let variable = Var::from_tensor(&subject.map[name]).unwrap();
    let live = with(subject, name, variable.as_tensor().clone());
    let loss = contracted(&live.output(x, Given::default()));
    let gradients = loss.backward().unwrap();
    gradients.get(variable.as_tensor()).map_or(0.0, largest)
}

/// A row of scores that is shifted has the same softmax.
#[test]
fn the_last_bias_of_fire_changes_nothing() {
    let x = random(&[2, LENGTH, WIDTH], 1);
    for (layers, subject) in subjects() {
        let [weight, bias] =
            ["weight", "bias"].map(|kind| format!("position.layers.{layers}.{kind}"));
        let expected = subject.output(&x, Given::default());
        let shifted = (&subject.map[&bias] + 3.0).unwrap();
        let found = with(&subject, &bias, shifted).output(&x, Given::default());
        assert_near(&found, &expected, 1e-12, "a shift");
        assert!(gradient(&subject, &bias, &x) < 1e-12);
        assert!(gradient(&subject, &weight, &x) > 1e-3);
    }
}

/// A network that is 0 everywhere leaves attention without positions.
#[test]
fn fire_of_nothing_is_no_position() {
    let x = random(&[2, LENGTH, WIDTH], 1);
    for (layers, subject) in subjects() {
        let weight = format!("position.layers.{layers}.weight");
        let nothing = subject.map[&weight].zeros_like().unwrap();
        let found = with(&subject, &weight, nothing).output(&x, Given::default());
        let plain = Subject {
            spec: MultiHeadSpec {
                position: PositionSpec::None,
                ..subject.spec.clone()
            },
            map: subject.map.clone(),
        };
        let expected = plain.output(&x, Given::default());
        assert_near(&found, &expected, 1e-12, "no position");
        let positioned = subject.output(&x, Given::default());
        assert!(difference(&positioned, &expected) > 1e-3);
    }
}

/// Positions that training draws are different ones below the limit, in order, any of them as likely: a network
/// that gives its input back tells how far apart they are.
#[test]
fn random_positions_are_a_subset_in_order() {
    let (limit, count) = (6, 3);
    let fire = FireSpec {
        hidden: 1,
        layers: 1,
        initial_length: 100,
        randomised: Some(limit),
        ..FireSpec::default()
    };
    let one =
        |name: &str, value: f64, shape: &[usize]| (name.to_owned(), tensor(vec![value], shape));
    let map = Map::from([
        one("stretch", 0.1, &[1]),
        one("length", 1.0, &[1]),
        one("layers.0.weight", 1.0, &[1, 1]),
        one("layers.0.bias", 0.0, &[1]),
        one("layers.1.weight", 1.0, &[1, 1]),
        one("layers.1.bias", 0.0, &[1]),
    ]);
    let at = position(&PositionSpec::Fire(fire), 1, true, &map);
    let last_row = |span: Span| -> Vec<f64> {
        let bias = at.bias(span, DType::F64, &Device::Cpu).unwrap();
        let bias = bias.unwrap().laid_out(span.queries, span.keys).unwrap();
        let all = values(&bias);
        all[all.len() - span.keys..].to_vec()
    };
    let mut by_distance = last_row(span(limit, limit, 0));
    by_distance.reverse();
    let draws = 600;
    let mut apart = 0;
    for seed in 0..draws {
        let drawn = Span {
            draw: Some(seed),
            ..span(count, count, 0)
        };
        let distance = |bias: &f64| {
            let found = by_distance.iter().position(|at| (at - bias).abs() < 1e-9);
            found.unwrap()
        };
        let distances: Vec<usize> = last_row(drawn).iter().map(distance).collect();
        assert!(distances.is_sorted_by(|a, b| a > b), "{distances:?}");
        assert_eq!(distances[count - 1], 0);
        apart += distances[0];
    }
    // From the first to the last of three of six: 2, 3, 4 or 5 in 4, 6, 6 and 4 of 20 subsets.
    let (mean, deviation) = (apart as f64 / draws as f64, 1.05f64.sqrt());
    let error = deviation / (draws as f64).sqrt();
    assert!((mean - 3.5).abs() < 5.0 * error, "{mean}");
}
