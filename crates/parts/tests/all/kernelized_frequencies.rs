//! Frequencies that a network makes of noise, against the network laid out by hand.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use crate::common::attention::dot;
use crate::common::{Map, build, draw, heads, random, values};
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_parts::attention::mechanism::Describe;
use lapidary_parts::attention::mechanism::kernelized::{KernelizedSpec, ReadOut, SpectrumSpec};

const WIDTH: usize = 6;
const COUNT: usize = 10;
const SEED: u64 = 9;

fn spec(spectrum: SpectrumSpec) -> KernelizedSpec {
    KernelizedSpec {
        spectrum,
        features: ReadOut::Fourier { smoothing: 0.7 },
        count: Some(COUNT),
        ..KernelizedSpec::default()
    }
}

/// Frequencies `[head][frequency][feature]`: what becomes of unit vectors.
fn frequencies(spec: &KernelizedSpec, map: &Map) -> Vec<Vec<Vec<f64>>> {
    let features = build(map, |p| spec.feature_map(&heads(2, WIDTH, false), p)).unwrap();
    let units = Tensor::eye(WIDTH, DType::F64, &Device::Cpu).unwrap();
    let units = units.broadcast_as((1, 2, WIDTH, WIDTH)).unwrap();
    let projected = features
        .project(&units.contiguous().unwrap(), SEED)
        .unwrap();
    assert_eq!(projected.dims(), [1, 2, WIDTH, COUNT]);
    let projected = values(&projected);
    let at = |head: usize, feature: usize, frequency: usize| {
        projected[(head * WIDTH + feature) * COUNT + frequency]
    };
    let of = |head: usize, frequency: usize| {
        (0..WIDTH)
            .map(|feature| at(head, feature, frequency))
            .collect()
    };
    (0..2)
        .map(|head| (0..COUNT).map(|frequency| of(head, frequency)).collect())
        .collect()
}

/// `W x + b` of each row.
fn linear(map: &Map, name: &str, rows: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let weight = values(&map[&format!("{name}.weight")]);
    let bias = values(&map[&format!("{name}.bias")]);
    let width = rows[0].len();
    rows.iter()
        .map(|row| {
            let each = weight.chunks(width).zip(&bias);
            each.map(|(weight, bias)| dot(weight, row) + bias).collect()
        })
        .collect()
}

/// Each feature with mean 0 and variance 1 over all frequencies, scaled and shifted, a hundredth of what is
/// negative let through.
fn normed(map: &Map, name: &str, rows: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let scale = values(&map[&format!("{name}.norm.weight")]);
    let shift = values(&map[&format!("{name}.norm.bias")]);
    let count = rows.len() as f64;
    let mut result = rows.to_vec();
    for feature in 0..scale.len() {
        let mean = rows.iter().map(|row| row[feature]).sum::<f64>() / count;
        let squares = rows.iter().map(|row| (row[feature] - mean).powi(2));
        let deviation = (squares.sum::<f64>() / count + 1e-5).sqrt();
        for row in &mut result {
            let x = (row[feature] - mean) / deviation * scale[feature] + shift[feature];
            row[feature] = if x < 0.0 { 0.01 * x } else { x };
        }
    }
    result
}

/// `tanh(W₃ h₂ + b₃)` of two hidden layers of twice and four times the width, of as many numbers of noise as half
/// of it.
#[test]
fn a_generators_frequencies_are_those_of_its_network() {
    let spec = spec(SpectrumSpec::Generator);
    let map = draw(7, |p| spec.build(&heads(2, WIDTH, false), p).map(|_| ()));
    let noise = values(&random(&[COUNT, WIDTH / 2], SEED));
    let mut rows: Vec<Vec<f64>> = noise.chunks(WIDTH / 2).map(<[f64]>::to_vec).collect();
    for (name, width) in [("first", 2 * WIDTH), ("second", 4 * WIDTH)] {
        rows = normed(&map, name, &linear(&map, name, &rows));
        assert_eq!(rows[0].len(), width);
    }
    let expected = linear(&map, "last", &rows);
    for (head, found) in frequencies(&spec, &map).iter().enumerate() {
        for (found, expected) in found.iter().flatten().zip(expected.iter().flatten()) {
            let expected = expected.tanh();
            assert!(
                (found - expected).abs() < 1e-12,
                "head {head}: {found} {expected}"
            );
        }
    }
}

/// Without a network they are the noise itself.
#[test]
fn fixed_frequencies_are_normal_numbers() {
    let noise = values(&random(&[COUNT, WIDTH], SEED));
    for found in frequencies(&spec(SpectrumSpec::Gaussian), &Map::new()) {
        assert_eq!(found.concat(), noise);
    }
}
