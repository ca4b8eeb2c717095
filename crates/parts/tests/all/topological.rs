//! Attention on a tree: exact properties, against all pairs of tokens.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use crate::common::attention;
use crate::common::attention::{Given, Subject, mask, spec};
use crate::common::{
    Map, assert_near, build, contracted, gradient_error, heads, random, tensor, values,
};
use lapidary_kernels::{Direction, Tensor, linear_attention};
use lapidary_parts::Context;
use lapidary_parts::attention::mechanism::topological::{FeatureMap, Mask, TopologicalSpec};
use lapidary_parts::attention::mechanism::{Describe, MechanismPass, MechanismSpec};
use lapidary_signal::{Mixing, Trace};

const HEADS: usize = 2;
const WIDTH: usize = 4;

fn on(columns: Option<usize>, mask: Mask) -> TopologicalSpec {
    TopologicalSpec {
        columns,
        mask,
        per_head: true,
        ..TopologicalSpec::default()
    }
}

/// `a`, less where it starts, for both heads.
fn numbers(scale: f64) -> Map {
    let a = vec![
        0.1,
        -0.3 * scale,
        0.02 * scale,
        -0.2,
        0.1 * scale,
        -0.03 * scale,
    ];
    Map::from([("mask".to_owned(), tensor(a, &[HEADS, 3]))])
}

fn mixing(spec: &TopologicalSpec, map: &Map, [q, k]: [&Tensor; 2]) -> Box<dyn Mixing> {
    let module = build(map, |p| spec.build(&heads(HEADS, WIDTH, false), p)).unwrap();
    let trace = Trace::new();
    let context = Context::new(&trace);
    let tokens = random(&[1, 1, 1], 0);
    let pass = MechanismPass {
        path: "attention",
        tokens: &tokens,
        keep: None,
        offset: 0,
        context: &context,
    };
    module.mixing(q, k, &pass).unwrap()
}

fn drawn(batch: usize, length: usize) -> [Tensor; 3] {
    [1, 2, 3].map(|seed| random(&[batch, HEADS, length, WIDTH], seed))
}

/// The way from a token to another: along the path, or up one column and down the other.
fn distance(columns: Option<usize>, i: usize, j: usize) -> usize {
    let Some(columns) = columns else {
        return i.abs_diff(j);
    };
    let (a, b) = ((i / columns, i % columns), (j / columns, j % columns));
    match a.1 == b.1 {
        true => a.0.abs_diff(b.0),
        false => a.0 + b.0 + a.1.abs_diff(b.1),
    }
}

/// Weights over all keys of one query, `M_ij φ(q_i) · φ(k_j)` divided by their sum.
fn brute(spec: &TopologicalSpec, a: &[f64], q: &[f64], keys: &[f64], i: usize) -> Vec<f64> {
    let map = |x: f64| match spec.features {
        FeatureMap::Relu => x.max(0.0),
        FeatureMap::Square => x * x,
        FeatureMap::Fourth => x.powi(4),
        FeatureMap::Exponential { .. } => f64::NAN,
    };
    let weights: Vec<f64> = keys
        .chunks(WIDTH)
        .enumerate()
        .map(|(j, k)| {
            let s = distance(spec.columns, i, j) as f64 / spec.unit;
            let z = a[0] + a[1] * s + a[2] * s * s;
            let mask = match spec.mask {
                Mask::Exponential => z.exp(),
                Mask::Identity => 1.0 + z,
                Mask::InverseQuadratic => 1.0 / (1.0 + z * z),
            };
            let product: f64 = q.iter().zip(k).map(|(q, k)| map(*q) * map(*k)).sum();
            mask * product
        })
        .collect();
    let sum: f64 = weights.iter().sum();
    let share = |w: f64| if sum == 0.0 { 0.0 } else { w / sum };
    weights.into_iter().map(share).collect()
}

#[test]
fn it_is_linear_attention_weighed_by_the_distance_in_the_tree() {
    // One tile and several; that cuts give the same is tested where both stand.
    for (columns, length) in [
        (None, 9),
        (None, 70),
        (None, 280),
        (Some(10), 100),
        (Some(10), 97),
        (Some(3), 120),
        (Some(1), 40),
    ] {
        for mask in [Mask::Exponential, Mask::Identity, Mask::InverseQuadratic] {
            for features in [FeatureMap::Relu, FeatureMap::Square, FeatureMap::Fourth] {
                let spec = TopologicalSpec {
                    features,
                    unit: length as f64,
                    ..on(columns, mask)
                };
                let map = numbers(1.0);
                let [q, k, v] = drawn(1, length);
                let found = mixing(&spec, &map, [&q, &k]).mix(&v).unwrap();
                let found = values(&found);
                let [q, k, v] = [q, k, v].map(|x| values(&x));
                let a = values(&map["mask"]);
                for head in 0..HEADS {
                    let rows = |x: &[f64]| x[head * length * WIDTH..][..length * WIDTH].to_vec();
                    let (q, k, v) = (rows(&q), rows(&k), rows(&v));
                    for i in (0..length).step_by(7) {
                        let a = &a[3 * head..][..3];
                        let weights = brute(&spec, a, &q[i * WIDTH..][..WIDTH], &k, i);
                        for feature in 0..WIDTH {
                            let expected: f64 = weights
                                .iter()
                                .enumerate()
                                .map(|(j, w)| w * v[j * WIDTH + feature])
                                .sum();
                            let found = found[(head * length + i) * WIDTH + feature];
                            assert!(
                                (found - expected).abs() < 1e-9,
                                "{columns:?} {length} {mask:?}"
                            );
                        }
                    }
                }
            }
        }
    }
}

/// As it starts, `M ≡ 1`: keys and values meet in one sum.
#[test]
fn without_a_mask_it_is_plain_linear_attention_and_rows_sum_to_one() {
    let still = Map::from([("mask".to_owned(), tensor(vec![0.0; 6], &[HEADS, 3]))]);
    let [q, k, v] = drawn(2, 60);
    for mask in [Mask::Exponential, Mask::Identity, Mask::InverseQuadratic] {
        let mixing = mixing(&on(Some(8), mask), &still, [&q, &k]);
        let [fq, fk] = [&q, &k].map(|x| x.relu().unwrap());
        let state = fk.t().unwrap().contiguous().unwrap().matmul(&v).unwrap();
        let sums = fk.sum_keepdim(2).unwrap();
        let total = fq.broadcast_mul(&sums).unwrap().sum_keepdim(3).unwrap();
        // A query without a positive feature gets nothing.
        let none = total.eq(0.0).unwrap().to_dtype(total.dtype()).unwrap();
        let expected = fq.matmul(&state).unwrap();
        let expected = expected.broadcast_div(&(&total + &none).unwrap()).unwrap();
        assert_near(&mixing.mix(&v).unwrap(), &expected, 1e-10, "plain");
        let rows = values(&mixing.weights(&v).unwrap().sum(3).unwrap());
        for (row, none) in rows.iter().zip(values(&none)) {
            assert!((row - (1.0 - none)).abs() < 1e-12);
        }
    }
}

/// A mask `λ^s` on a path is a decay of the past and of the future: the recurrences of LION.
#[test]
fn on_a_path_an_exponential_is_the_decay_of_two_recurrences() {
    let length = 90;
    let [q, k, v] = drawn(1, length);
    let decays = [0.9f64, 0.97];
    let a = vec![0.0, decays[0].ln(), 0.0, 0.0, decays[1].ln(), 0.0];
    let map = Map::from([("mask".to_owned(), tensor(a, &[HEADS, 3]))]);
    let found = mixing(&on(None, Mask::Exponential), &map, [&q, &k])
        .mix(&v)
        .unwrap();

    let [q, k] = [q, k].map(|x| x.relu().unwrap());
    let ones = tensor(vec![1.0; HEADS * length], &[1, HEADS, length, 1]);
    let v = Tensor::cat(&[&v, &ones], 3).unwrap();
    let logs = decays.iter().flat_map(|d| vec![d.ln(); length]).collect();
    let logs = tensor(logs, &[1, HEADS, length]);
    let sums = |direction| linear_attention(&q, &k, &v, Some(&logs), direction).unwrap();
    let own = (&q * &k).unwrap().sum_keepdim(3).unwrap();
    let own = v.broadcast_mul(&own).unwrap();
    let both = (sums(Direction::Past) + sums(Direction::Future)).unwrap();
    let both = (both - own).unwrap();
    let total = both.narrow(3, WIDTH, 1).unwrap();
    let none = total.eq(0.0).unwrap().to_dtype(total.dtype()).unwrap();
    let total = (total + none).unwrap();
    let expected = both
        .narrow(3, 0, WIDTH)
        .unwrap()
        .broadcast_div(&total)
        .unwrap();
    assert_near(&found, &expected, 1e-9, "two recurrences");
}

#[test]
fn gradients_pass_to_the_mask_and_to_every_field() {
    for (columns, length) in [(None, 40), (Some(7), 45), (None, 150)] {
        let spec = TopologicalSpec {
            features: FeatureMap::Square,
            unit: length as f64 / 2.0,
            ..on(columns, Mask::Exponential)
        };
        let [q, k, v] = drawn(1, length);
        let mut inputs = numbers(1.0);
        inputs.extend([
            ("q".to_owned(), q),
            ("k".to_owned(), k),
            ("v".to_owned(), v),
        ]);
        let error = gradient_error(&inputs, 6, |inputs| {
            let map = Map::from([("mask".to_owned(), inputs["mask"].clone())]);
            let mixing = mixing(&spec, &map, [&inputs["q"], &inputs["k"]]);
            contracted(&mixing.mix(&inputs["v"]).unwrap())
        });
        assert!(error < 1e-6, "{columns:?} {length}: {error:e}");
    }
}

/// Random features of the exponential kernel approach softmax, and their scale doesn't matter.
#[test]
fn random_features_approach_softmax() {
    let length = 20;
    let [q, k, v] = drawn(1, length);
    let softmax = {
        let scores = q.matmul(&k.t().unwrap().contiguous().unwrap()).unwrap();
        let e = (scores * 0.5).unwrap().exp().unwrap();
        let weights = e.broadcast_div(&e.sum_keepdim(3).unwrap()).unwrap();
        weights.matmul(&v).unwrap()
    };
    let still = Map::from([("mask".to_owned(), tensor(vec![0.0; 6], &[HEADS, 3]))]);
    let error = |count: usize| {
        let mut sum = 0.0;
        for seed in 0..4 {
            let spec = TopologicalSpec {
                features: FeatureMap::Exponential { count, seed },
                ..on(None, Mask::Exponential)
            };
            let found = mixing(&spec, &still, [&q, &k]).mix(&v).unwrap();
            let off = (found - &softmax)
                .unwrap()
                .sqr()
                .unwrap()
                .mean_all()
                .unwrap();
            sum += values(&off)[0];
        }
        (sum / 4.0).sqrt()
    };
    let (few, many) = (error(16), error(8192));
    assert!(many < 0.1 && many < few / 3.0, "{few} {many}");
}

#[test]
fn pads_behind_the_patches_of_a_grid_change_nothing() {
    let subject = Subject::new(
        spec(
            MechanismSpec::Topological(TopologicalSpec {
                columns: Some(4),
                unit: 8.0,
                ..TopologicalSpec::default()
            }),
            false,
        ),
        6,
    );
    let short = random(&[1, 8, attention::WIDTH], 4);
    let junk = (random(&[1, 4, attention::WIDTH], 5) * 100.0).unwrap();
    let long = Tensor::cat(&[&short, &junk], 1).unwrap();
    let keep = mask(&[&[1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0]]);
    let given = Given {
        keep: Some(&keep),
        ..Given::default()
    };
    let padded = subject.output(&long, given).narrow(1, 0, 8).unwrap();
    assert_near(
        &padded,
        &subject.output(&short, Given::default()),
        1e-12,
        "pads",
    );
}

#[test]
fn work_grows_nearly_linearly() {
    let still = Map::from([("mask".to_owned(), tensor(vec![0.0; 6], &[HEADS, 3]))]);
    let work = |columns: Option<usize>, length: usize| -> f64 {
        let [q, k, _] = drawn(1, length);
        let mixing = mixing(&on(columns, Mask::Exponential), &still, [&q, &k]);
        mixing.operations(WIDTH) as f64
    };
    // n ln² n has the exponent 1.19 there: transforms at every depth of a path. A grid has few levels.
    let path = (work(None, 65_536) / work(None, 16_384)).ln() / 4f64.ln();
    let grid = (work(Some(256), 65_536) / work(Some(128), 16_384)).ln() / 4f64.ln();
    assert!((path - 1.19).abs() < 0.1, "{path}");
    assert!(grid > 0.95 && grid < 1.29, "{grid}");
}
