//! What softmax sees of FIRE: differences between the keys of a row.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use crate::common::attention::{Given, HEADS, Subject, WIDTH};
use crate::common::{assert_near, contracted, difference, random, values};
use lapidary_kernels::{Tensor, Var};
use lapidary_parts::attention::MultiHeadSpec;
use lapidary_parts::position::{FireSpec, PositionSpec};

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
