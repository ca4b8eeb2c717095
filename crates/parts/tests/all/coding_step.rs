//! The step of CRATE as it is derived, with the factors of its derivation.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use crate::common;
use crate::common::{Map, assert_near, build, random, tensor, values};
use crate::white_box::{WIDTH, orthogonal};
use lapidary_kernels::{Device, Tensor};
use lapidary_parts::Context;
use lapidary_parts::block::{Block, BlockSpec};
use lapidary_signal::{Signal, Trace};

const HEADS: usize = 2;
const EACH: usize = WIDTH / HEADS;

/// A block that is the derived step alone.
fn stepping(kappa: f64, epsilon: f64) -> BlockSpec {
    toml::from_str(&format!(
        "wiring = 'replacing'
        norm = {{ kind = 'none' }}
        coding_step = {{ kappa = {kappa:?}, epsilon = {epsilon:?} }}
        [attention]
        kind = 'multi-head'
        heads = {HEADS}
        sharing = 'all'
        output = 'tied'
        bias = false
        scale = 1.0"
    ))
    .unwrap()
}

/// What a block that reads by `bases` makes of `z` `[batch, length, WIDTH]`.
fn stepped(spec: &BlockSpec, bases: &Tensor, z: &Tensor, keep: Option<&Tensor>) -> Tensor {
    let map = Map::from([("attention.query.weight".to_owned(), bases.clone())]);
    let block = build(&map, |p| Block::new(spec, WIDTH, p)).unwrap();
    let trace = Trace::new();
    let cx = Context {
        key_padding: keep,
        ..Context::new(&trace)
    };
    let y = block.forward(Signal::from(z.clone()), &cx, None);
    y.unwrap().into_value()
}

/// `U_kᵀ z` of tokens as rows, `[tokens][EACH]`, number by number.
fn read(bases: &[f64], head: usize, z: &[f64]) -> Vec<Vec<f64>> {
    let of = |token: &[f64], row: usize| -> f64 {
        let basis = &bases[(head * EACH + row) * WIDTH..][..WIDTH];
        basis.iter().zip(token).map(|(u, z)| u * z).sum()
    };
    z.chunks(WIDTH)
        .map(|token| (0..EACH).map(|row| of(token, row)).collect())
        .collect()
}

/// `(1 − κ s) z + κ s · s Σ_k U_k (U_kᵀ z) softmax(…)` of `N` tokens, `s = p / (N ε²)`.
fn closed_form(bases: &[f64], z: &[f64], kappa: f64, epsilon: f64) -> Vec<f64> {
    let tokens = z.len() / WIDTH;
    let scale = EACH as f64 / (tokens as f64 * epsilon * epsilon);
    let mut result: Vec<f64> = z.iter().map(|z| (1.0 - kappa * scale) * z).collect();
    for head in 0..HEADS {
        let w = read(bases, head, z);
        for (t, query) in w.iter().enumerate() {
            let scores = w.iter().map(|key| {
                let score: f64 = query.iter().zip(key).map(|(a, b)| a * b).sum();
                score.exp()
            });
            let scores: Vec<f64> = scores.collect();
            let sum: f64 = scores.iter().sum();
            for (score, value) in scores.iter().zip(&w) {
                for (row, value) in value.iter().enumerate() {
                    for f in 0..WIDTH {
                        let basis = bases[(head * EACH + row) * WIDTH + f];
                        result[t * WIDTH + f] +=
                            kappa * scale * scale * score / sum * value * basis;
                    }
                }
            }
        }
    }
    result
}

#[test]
fn a_coding_step_is_its_closed_form() {
    for (length, kappa, epsilon) in [(1, 0.3, 0.8), (5, 0.1, 0.5), (9, 2.0, 1.5)] {
        let (bases, z) = (random(&[WIDTH, WIDTH], 30), random(&[2, length, WIDTH], 31));
        let found = stepped(&stepping(kappa, epsilon), &bases, &z, None);
        let flat = values(&z);
        let expected: Vec<f64> = flat
            .chunks(length * WIDTH)
            .flat_map(|z| closed_form(&values(&bases), z, kappa, epsilon))
            .collect();
        let expected = tensor(expected, &[2, length, WIDTH]);
        assert_near(&found, &expected, 1e-12, &format!("{length} tokens"));
    }
    let step = stepping(0.1, 0.5);
    let written: BlockSpec = toml::from_str(&toml::to_string(&step).unwrap()).unwrap();
    assert_eq!(written, step);
    let without = BlockSpec {
        coding_step: None,
        ..step
    };
    assert!(!toml::to_string(&without).unwrap().contains("coding_step"));
}

/// Pads are none of the tokens that the step is for.
#[test]
fn pads_do_not_shorten_a_coding_step() {
    let (bases, step) = (random(&[WIDTH, WIDTH], 32), stepping(0.2, 0.6));
    let z = random(&[2, 7, WIDTH], 33);
    let keep = vec![1u8, 1, 1, 1, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1];
    let keep = Tensor::from_vec(keep, (2, 7), &Device::Cpu).unwrap();
    let found = stepped(&step, &bases, &z, Some(&keep));
    for (row, length) in [(0, 4), (1, 7)] {
        let part = |x: &Tensor| x.narrow(0, row, 1).unwrap().narrow(1, 0, length).unwrap();
        let alone = stepped(&step, &bases, &part(&z), None);
        assert_near(&part(&found), &alone, 1e-12, "padded");
    }
}

/// `½ Σ_k log det(I + s W_kᵀ W_k)` by elimination, `W_k` `[tokens][EACH]`.
fn rate(bases: &[f64], z: &[f64], epsilon: f64) -> f64 {
    let scale = EACH as f64 / ((z.len() / WIDTH) as f64 * epsilon * epsilon);
    let mut sum = 0.0;
    for head in 0..HEADS {
        let w = read(bases, head, z);
        let entry = |i: usize, j: usize| {
            let gram: f64 = w.iter().map(|token| token[i] * token[j]).sum();
            scale * gram + f64::from(u8::from(i == j))
        };
        let mut gram: Vec<Vec<f64>> = (0..EACH)
            .map(|i| (0..EACH).map(|j| entry(i, j)).collect())
            .collect();
        for pivot in 0..EACH {
            let row = gram[pivot].clone();
            sum += 0.5 * row[pivot].ln();
            for below in &mut gram[pivot + 1..] {
                let share = below[pivot] / row[pivot];
                for (number, above) in below.iter_mut().zip(&row) {
                    *number -= share * above;
                }
            }
        }
    }
    sum
}

/// Tokens near subspaces: steps lower their coding rate, as the gradient's steps do, at first by as much as the gradient
/// of the rate says.
#[test]
fn small_coding_steps_lower_the_rate() {
    let bases = orthogonal();
    let flat = values(&bases);
    // Half of the tokens near each subspace; the bases are all of the space.
    let drawn = values(&random(&[24, WIDTH], 34));
    let near = drawn.chunks(WIDTH).enumerate().map(|(token, drawn)| {
        let coordinate = |i: usize| drawn[i] * if i / EACH == token % HEADS { 1.0 } else { 0.2 };
        (0..WIDTH)
            .map(|f| {
                (0..WIDTH)
                    .map(|i| coordinate(i) * flat[i * WIDTH + f])
                    .sum()
            })
            .collect::<Vec<f64>>()
    });
    let z = near.collect::<Vec<_>>().concat();
    for epsilon in [0.7, 1.0] {
        let before = rate(&flat, &z, epsilon);
        let fall = |kappa: f64| {
            let z = tensor(z.clone(), &[1, 24, WIDTH]);
            let moved = stepped(&stepping(kappa, epsilon), &bases, &z, None);
            rate(&flat, &values(&moved), epsilon) - before
        };
        for kappa in [1e-3, 1e-2, 1e-1] {
            assert!(fall(kappa) < 0.0, "{epsilon} {kappa}: {}", fall(kappa));
        }
        // The step's direction along the rate's slope, by differences of the rate.
        let mut slope = 0.0;
        let unit = closed_form(&flat, &z, 1.0, epsilon);
        for (at, (end, start)) in unit.iter().zip(&z).enumerate() {
            let moved = |by: f64| {
                let mut z = z.clone();
                z[at] += by;
                rate(&flat, &z, epsilon)
            };
            slope += (end - start) * (moved(1e-5) - moved(-1e-5)) / 2e-5;
        }
        let found = fall(1e-4) / 1e-4;
        assert!((found / slope - 1.0).abs() < 0.01, "{found} {slope}");
    }
}

#[test]
fn gradients_of_a_coding_step_equal_central_differences() {
    let step = stepping(0.3, 0.7);
    let z = random(&[1, 4, WIDTH], 35);
    let inputs = Map::from([
        ("bases".to_owned(), random(&[WIDTH, WIDTH], 36)),
        ("z".to_owned(), z),
    ]);
    let error = common::gradient_error(&inputs, 6, |inputs| {
        common::contracted(&stepped(&step, &inputs["bases"], &inputs["z"], None))
    });
    assert!(error < 1e-6, "{error:e}");
}
