//! How codes are learned.

use super::{fitted, heads, plain, unit};
use crate::common::attention::{HEAD_WIDTH, HEADS, dot, mask};
use crate::common::{Map, assert_near, build, normal, random, tensor, values};
use lapidary_kernels::{Device, Tensor};
use lapidary_parts::attention::mechanism::ecoformer::{EcoformerSpec, Fit, Sample, learn};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

fn sign_of(i: usize, j: usize) -> f64 {
    match (i & j).count_ones() % 2 {
        0 => 1.0,
        _ => -1.0,
    }
}

/// Targets that are a sum of products of sign vectors are taken apart, bit by bit, to nothing.
#[test]
fn bits_take_a_sum_of_sign_products_apart() {
    const TOKENS: usize = 16;
    const FACTORS: [usize; 3] = [3, 5, 14];
    let entry = |i: usize, j: usize| -> f64 {
        let each = FACTORS.iter().map(|&f| sign_of(f, i) * sign_of(f, j));
        each.sum::<f64>() / FACTORS.len() as f64
    };
    let sample = Sample {
        // Kernel values in which every factor can be told apart.
        kernels: (0..TOKENS)
            .map(|i| FACTORS.iter().map(|&f| sign_of(f, i)).collect())
            .collect(),
        targets: (0..TOKENS)
            .map(|i| {
                (0..TOKENS)
                    .map(|j| (j, entry(i, j)))
                    .filter(|(_, s)| *s != 0.0)
                    .collect()
            })
            .collect(),
    };
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let start: Vec<Vec<f64>> = (0..FACTORS.len())
        .map(|_| (0..FACTORS.len()).map(|_| 0.1 * normal(&mut rng)).collect())
        .collect();
    let fit = Fit {
        rate: 0.05,
        iterations: 2000,
        ..Fit::default()
    };
    let (hashes, bits) = learn(std::slice::from_ref(&sample), &start, &fit);
    let mut before = (FACTORS.len() * TOKENS * TOKENS) as f64;
    for bit in &bits {
        assert!(bit.after <= bit.before, "{bit:?}");
        assert!(bit.residual <= before, "{bit:?}");
        before = bit.residual;
    }
    assert!(before.abs() < 1e-9, "{bits:?}");
    // The codes' inner products are then the targets.
    let code = |i: usize| -> Vec<f64> {
        let bit = |hash: &Vec<f64>| dot(hash, &sample.kernels[i]).signum();
        hashes.iter().map(bit).collect()
    };
    for i in 0..TOKENS {
        for j in 0..TOKENS {
            let expected = FACTORS.len() as f64 * entry(i, j);
            assert!((dot(&code(i), &code(j)) - expected).abs() < 1e-12);
        }
    }
}

/// Sequences of tokens around a few directions, `[batch, heads, length, width]`.
fn clustered(batch: usize, length: usize, seed: u64) -> Tensor {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let centres: Vec<Vec<f64>> = (0..4)
        .map(|_| (0..HEAD_WIDTH).map(|_| normal(&mut rng)).collect())
        .collect();
    let mut all = Vec::new();
    for token in 0..batch * HEADS * length {
        for feature in &centres[token * 7 % 4] {
            all.push(feature + 0.3 * normal(&mut rng));
        }
    }
    tensor(all, &[batch, HEADS, length, HEAD_WIDTH])
}

/// The objective, with what is left of the targets laid out.
fn objective(left: &[Vec<f64>], y: &[f64], bits: usize) -> f64 {
    let sides: Vec<f64> = left.iter().map(|row| dot(row, y)).collect();
    -dot(&sides, y) / (y.len() * bits) as f64
}

/// What is said of each bit is what matrices laid out say of it, and no accepted one is worse.
#[test]
fn bits_are_accepted_where_their_signs_agree_more() {
    let queries = clustered(1, 24, 3);
    let ecoformer = EcoformerSpec {
        bits: 6,
        anchors: 8,
        ..plain()
    };
    let fit = Fit {
        top: 5,
        rate: 0.05,
        seed: 2,
        ..Fit::default()
    };
    let found = ecoformer.fit(&queries, None, &fit).unwrap();
    let map: Map = found.parameters.clone();
    let hashing = build(&map, |p| ecoformer.hashing(&heads(), p)).unwrap();
    let codes = values(&hashing.codes(&queries, None).unwrap());
    let mut accepted = 0;
    for (head, bits) in found.bits.iter().enumerate() {
        let units: Vec<Vec<f64>> = values(&queries)[head * 24 * HEAD_WIDTH..][..24 * HEAD_WIDTH]
            .chunks(HEAD_WIDTH)
            .map(unit)
            .collect();
        let mut left: Vec<Vec<f64>> = units
            .iter()
            .map(|u| {
                let scores: Vec<f64> = units.iter().map(|v| dot(u, v)).collect();
                let mut sorted = scores.clone();
                sorted.sort_by(f64::total_cmp);
                let sign = |s: &f64| match () {
                    () if *s >= sorted[24 - 5] => 6.0,
                    () if *s <= sorted[4] => -6.0,
                    () => 0.0,
                };
                scores.iter().map(sign).collect()
            })
            .collect();
        for (at, bit) in bits.iter().enumerate() {
            assert!(bit.after <= bit.before && bit.accepted == (bit.after < bit.before));
            accepted += usize::from(bit.accepted);
            let y: Vec<f64> = (0..24).map(|t| codes[(head * 24 + t) * 6 + at]).collect();
            let expected = objective(&left, &y, 6);
            assert!(
                (bit.after - expected).abs() < 1e-9,
                "{} {expected}",
                bit.after
            );
            for i in 0..24 {
                for j in 0..24 {
                    left[i][j] -= y[i] * y[j];
                }
            }
            let squares: f64 = left.iter().flatten().map(|r| r * r).sum();
            assert!((bit.residual - squares).abs() < 1e-6);
        }
    }
    assert!(accepted > 0);
}

/// Ranks, equal ones at their mean.
fn ranks(x: &[f64]) -> Vec<f64> {
    let rank = |a: &f64| {
        let below = x.iter().filter(|b| *b < a).count() as f64;
        let equal = x.iter().filter(|b| *b == a).count() as f64;
        below + (equal - 1.0) / 2.0
    };
    x.iter().map(rank).collect()
}

fn correlation(a: &[f64], b: &[f64]) -> f64 {
    let centred = |x: &[f64]| -> Vec<f64> {
        let mean = x.iter().sum::<f64>() / x.len() as f64;
        x.iter().map(|x| x - mean).collect()
    };
    let (a, b) = (centred(a), centred(b));
    dot(&a, &b) / (dot(&a, &a) * dot(&b, &b)).sqrt()
}

/// Learned hashes agree more with the map than where they started, on sequences that they were not learned
/// from too.
#[test]
fn learned_hashes_follow_the_map() {
    let (given, other) = (clustered(3, 24, 3), clustered(1, 24, 3));
    let ecoformer = EcoformerSpec {
        bits: 8,
        anchors: 10,
        ..plain()
    };
    let fit = |iterations| Fit {
        top: 5,
        rate: 0.05,
        iterations,
        ..Fit::default()
    };
    let follows = |iterations| {
        let found = ecoformer.fit(&given, None, &fit(iterations)).unwrap();
        let hashing = build(&found.parameters, |p| ecoformer.hashing(&heads(), p)).unwrap();
        let codes = values(&hashing.codes(&other, None).unwrap());
        let codes: Vec<&[f64]> = codes.chunks(8).take(24).collect();
        let units: Vec<Vec<f64>> = values(&other)
            .chunks(HEAD_WIDTH)
            .take(24)
            .map(unit)
            .collect();
        let pairs = || (0..24).flat_map(|i| (0..24).map(move |j| (i, j)));
        let by_codes: Vec<f64> = pairs().map(|(i, j)| dot(codes[i], codes[j])).collect();
        let by_map: Vec<f64> = pairs().map(|(i, j)| dot(&units[i], &units[j])).collect();
        correlation(&ranks(&by_codes), &ranks(&by_map))
    };
    let (random, learned) = (follows(0), follows(200));
    assert!(learned > random + 0.05, "{learned} {random}");
}

#[test]
fn fitting_starts_again_from_where_it_was_and_leaves_pads_out() {
    let ecoformer = fitted();
    let queries = clustered(2, 12, 4);
    let fit = Fit {
        top: 3,
        rate: 0.05,
        iterations: 20,
        ..Fit::default()
    };
    let first = ecoformer.fit(&queries, None, &fit).unwrap();
    let again = ecoformer.fit(&queries, None, &fit).unwrap();
    for (name, x) in &first.parameters {
        assert_near(x, &again.parameters[name], 0.0, name);
    }
    let from = Fit {
        start: Some(values(&first.parameters["hashes"])),
        iterations: 0,
        ..fit.clone()
    };
    let kept = ecoformer.fit(&queries, None, &from).unwrap();
    assert_near(
        &kept.parameters["hashes"],
        &first.parameters["hashes"],
        0.0,
        "without steps",
    );
    let wrong = Fit {
        start: Some(vec![0.0; 3]),
        ..fit.clone()
    };
    let said = ecoformer
        .fit(&queries, None, &wrong)
        .unwrap_err()
        .to_string();
    assert!(said.contains("for 2 heads"), "{said}");

    // Whatever pads are.
    let junk = Tensor::cat(&[&queries, &random(&[2, HEADS, 3, HEAD_WIDTH], 9)], 2).unwrap();
    let keep = mask(&[[[1; 12].as_slice(), &[0; 3]].concat().as_slice(); 2]);
    let padded = ecoformer.fit(&junk, Some(&keep), &fit).unwrap();
    for (name, x) in &first.parameters {
        assert_near(x, &padded.parameters[name], 1e-12, name);
    }
    let none = mask(&[&[0; 12], &[1; 12]]);
    assert!(ecoformer.fit(&queries, Some(&none), &fit).is_err());
}

#[test]
fn what_cannot_be_fitted_is_refused() {
    let queries = clustered(2, 6, 4);
    let refused = |ecoformer: &EcoformerSpec, keep: Option<&Tensor>, expected: &str| {
        let said = ecoformer.fit(&queries, keep, &Fit::default()).unwrap_err();
        assert!(said.to_string().starts_with(expected), "{said}");
    };
    let of = |bits, anchors| EcoformerSpec {
        bits,
        anchors,
        ..plain()
    };
    refused(&of(0, 5), None, "bits is 0, but must be between 1 and 64");
    refused(&of(65, 5), None, "bits is 65");
    refused(&of(7, 0), None, "anchors is 0");
    // A mask of the first sequence alone says nothing of the second.
    let keep = mask(&[&[1; 6]]);
    refused(&plain(), Some(&keep), "shape of keep is [1, 6]");
    let usual = Fit::default;
    let count = HEADS * plain().bits * plain().anchors;
    let mut start = vec![0.5; count];
    start[count - 1] = f64::NAN;
    let start = Some(start);
    let none = Tensor::full(f64::NAN, (1, HEADS, 6, HEAD_WIDTH), &Device::Cpu).unwrap();
    for (fit, queries, expected) in [
        (
            Fit { top: 0, ..usual() },
            &queries,
            "top is 0, but must be between 1 and",
        ),
        (
            Fit {
                rate: f64::NAN,
                ..usual()
            },
            &queries,
            "rate is NaN, but must be a positive number",
        ),
        (
            Fit {
                momentum: 1.0,
                ..usual()
            },
            &queries,
            "momentum is 1.0, but must be at least 0 and below 1",
        ),
        (
            Fit { start, ..usual() },
            &queries,
            "a hash to start from is NaN, but must be finite",
        ),
        (
            usual(),
            &none,
            "a query that hashes are learned from is NaN",
        ),
    ] {
        let said = plain().fit(queries, None, &fit).unwrap_err();
        assert!(said.to_string().starts_with(expected), "{said}");
    }
}
