//! Linformer's exact properties, against attention written out by hand.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use crate::common;
use crate::common::{
    Map, assert_near, build, difference, draw, gradient_error, random, tensor, values,
};
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_parts::attention::QueryKeySharing;
use lapidary_parts::attention::mechanism::linformer::{LinformerSpec, Longer, Projection, Sharing};
use lapidary_parts::attention::mechanism::{Describe, Heads, Mechanism, MechanismPass};
use lapidary_parts::{Context, Result};
use lapidary_signal::{Mixing, Trace};

const BATCH: usize = 2;
const HEADS: usize = 3;
const KEYS: usize = 8;
const WIDTH: usize = 4;

fn heads() -> Heads {
    Heads {
        width: HEADS * WIDTH,
        heads: HEADS,
        head_width: WIDTH,
        causal: false,
        scale: 0.5,
        sharing: QueryKeySharing::None,
    }
}

fn spec(slots: usize, longest: usize, sharing: Sharing) -> LinformerSpec {
    LinformerSpec {
        slots,
        longest,
        longer: Default::default(),
        sharing,
        projection: Projection::Learned,
    }
}

fn parameters(spec: &LinformerSpec) -> Map {
    draw(4, |p| spec.build(&heads(), p))
}

/// Mixes `v` with keys and queries `x`, all of them read through `keep`.
fn mixing(
    spec: &LinformerSpec,
    map: &Map,
    [q, k]: [&Tensor; 2],
    keep: Option<&Tensor>,
) -> Result<Box<dyn Mixing>> {
    let module: Box<dyn Mechanism> = build(map, |p| spec.build(&heads(), p)).unwrap();
    let trace = Trace::new();
    let context = Context::new(&trace);
    let tokens = random(&[BATCH, q.dim(2).unwrap(), HEADS * WIDTH], 0);
    let pass = MechanismPass {
        path: "attention",
        tokens: &tokens,
        keep,
        offset: 0,
        context: &context,
    };
    module.mixing(q, k, &pass)
}

fn mixed(spec: &LinformerSpec, map: &Map, qkv: [&Tensor; 3], keep: Option<&Tensor>) -> Tensor {
    let [q, k, v] = qkv;
    mixing(spec, map, [q, k], keep).unwrap().mix(v).unwrap()
}

fn inputs(keys: usize) -> [Tensor; 3] {
    [
        random(&[BATCH, HEADS, 5, WIDTH], 1),
        random(&[BATCH, HEADS, keys, WIDTH], 2),
        random(&[BATCH, HEADS, keys, WIDTH], 3),
    ]
}

fn softmax(scores: &Tensor) -> Tensor {
    let e = scores.exp().unwrap();
    e.broadcast_div(&e.sum_keepdim(3).unwrap()).unwrap()
}

/// `softmax(scale Q Kᵀ) V`.
fn attention(q: &Tensor, k: &Tensor, v: &Tensor) -> Tensor {
    let scores = (q.matmul(&k.t().unwrap().contiguous().unwrap()).unwrap() * 0.5).unwrap();
    softmax(&scores).matmul(v).unwrap()
}

fn identity(size: usize) -> Tensor {
    let eye = Tensor::eye(size, DType::F64, &Device::Cpu).unwrap();
    eye.unsqueeze(0).unwrap()
}

#[test]
fn identity_projections_are_softmax_attention() {
    let [q, k, v] = inputs(KEYS);
    let map = Map::from([("both".to_owned(), identity(KEYS))]);
    let found = mixed(
        &spec(KEYS, KEYS, Sharing::KeyValue),
        &map,
        [&q, &k, &v],
        None,
    );
    assert_near(&found, &attention(&q, &k, &v), 1e-12, "k = n");
}

/// A slot that sees pads alone keeps the logit 0, and takes weight with the value 0.
#[test]
fn padded_slots_keep_the_logit_nought() {
    let [q, k, v] = inputs(KEYS);
    let map = Map::from([("both".to_owned(), identity(KEYS))]);
    let real = 5;
    let kept: Vec<u8> = (0..BATCH * KEYS)
        .map(|i| u8::from(i % KEYS < real))
        .collect();
    let keep = Tensor::from_vec(kept, (BATCH, KEYS), &Device::Cpu).unwrap();
    let found = mixed(
        &spec(KEYS, KEYS, Sharing::KeyValue),
        &map,
        [&q, &k, &v],
        Some(&keep),
    );
    let zeroed = |x: &Tensor| {
        let kept = keep.to_dtype(DType::F64).unwrap();
        x.broadcast_mul(&kept.reshape((BATCH, 1, KEYS, 1)).unwrap())
            .unwrap()
    };
    let expected = attention(&q, &zeroed(&k), &zeroed(&v));
    assert_near(&found, &expected, 1e-12, "with pads");
    let masked = attention(
        &q,
        &k.narrow(2, 0, real).unwrap().contiguous().unwrap(),
        &v.narrow(2, 0, real).unwrap().contiguous().unwrap(),
    );
    assert!(difference(&found, &masked) > 1e-3, "not masked softmax");
    // Nothing but pads gives nothing.
    let none = Tensor::zeros((BATCH, KEYS), DType::U8, &Device::Cpu).unwrap();
    let found = mixed(
        &spec(KEYS, KEYS, Sharing::KeyValue),
        &map,
        [&q, &k, &v],
        Some(&none),
    );
    assert!(values(&found).iter().all(|y| *y == 0.0));
}

#[test]
fn means_of_windows_are_attention_over_pooled_keys_and_values() {
    let [q, k, v] = inputs(KEYS);
    let spec = LinformerSpec {
        projection: Projection::Mean,
        ..spec(4, KEYS, Sharing::Headwise)
    };
    let pooled = |x: &Tensor| {
        let windows = x.reshape((BATCH, HEADS, 4, 2, WIDTH)).unwrap();
        windows.mean(3).unwrap()
    };
    let found = mixed(&spec, &Map::new(), [&q, &k, &v], None);
    let expected = attention(&q, &pooled(&k), &pooled(&v));
    assert_near(&found, &expected, 1e-12, "pooled");
    // A convolution that starts as a mean is the same, and a learned matrix of windows too.
    let convolution = LinformerSpec {
        projection: Projection::Convolution,
        ..spec.clone()
    };
    let half = tensor(vec![0.5, 0.5], &[1, 2]);
    let map = Map::from([
        ("keys".to_owned(), half.clone()),
        ("values".to_owned(), half),
    ]);
    let found = mixed(&convolution, &map, [&q, &k, &v], None);
    assert_near(&found, &expected, 1e-12, "convolution");
}

/// Projecting tokens before their features, `(E X) W`, or after them, `E (X W)`, is the same where
/// `W` has no bias; with one, a compressed row has the bias times the sum of the row of `E`.
#[test]
fn projecting_before_the_features_is_projecting_after_them() {
    let x = random(&[KEYS, 6], 5);
    let w = random(&[6, WIDTH], 6);
    let bias = random(&[1, WIDTH], 7);
    let e = random(&[3, KEYS], 8);
    let after = e.matmul(&x.matmul(&w).unwrap()).unwrap();
    let before = e.matmul(&x).unwrap().matmul(&w).unwrap();
    assert_near(&before, &after, 1e-12, "no bias");
    let after = e
        .matmul(&x.matmul(&w).unwrap().broadcast_add(&bias).unwrap())
        .unwrap();
    let sums = e.sum_keepdim(1).unwrap().matmul(&bias).unwrap();
    assert_near(&(before + sums).unwrap(), &after, 1e-12, "bias");
}

#[test]
fn sharing_counts_matrices() {
    let count = |sharing| {
        let spec = spec(3, 16, sharing);
        let map = draw(1, |mut p| {
            spec.build(&heads(), p.at("blocks.0"))?;
            spec.build(&heads(), p.at("blocks.1"))
        });
        map.values().map(Tensor::elem_count).sum::<usize>()
    };
    let one = 3 * 16;
    let layers = 2;
    assert_eq!(count(Sharing::None), 2 * HEADS * layers * one);
    assert_eq!(count(Sharing::Headwise), 2 * layers * one);
    assert_eq!(count(Sharing::KeyValue), layers * one);
    assert_eq!(count(Sharing::Layerwise), one);
}

/// The gradient of a shared matrix is the sum over where it is used.
#[test]
fn gradients_of_shared_matrices_add_up() {
    let [q, k, v] = inputs(KEYS);
    for sharing in [Sharing::None, Sharing::Headwise, Sharing::KeyValue] {
        let spec = spec(3, 10, sharing);
        let error = gradient_error(&parameters(&spec), 8, |map| {
            common::contracted(&mixed(&spec, map, [&q, &k, &v], None))
        });
        assert!(error < 1e-7, "{sharing:?}: {error:e}");
    }
}

#[test]
fn a_short_input_is_one_padded_to_the_longest() {
    let spec = spec(3, 12, Sharing::None);
    let map = parameters(&spec);
    let [q, k, v] = inputs(KEYS);
    let longer = |x: &Tensor| x.pad_with_zeros(2, 0, 12 - KEYS).unwrap();
    let short = mixed(&spec, &map, [&q, &k, &v], None);
    let long = mixed(&spec, &map, [&q, &longer(&k), &longer(&v)], None);
    assert_near(&short, &long, 1e-12, "padded with zeros");
}

#[test]
fn outputs_are_averages_of_projected_values() {
    let spec = spec(3, KEYS, Sharing::KeyValue);
    let map = parameters(&spec);
    let [q, k, _] = inputs(KEYS);
    let v = random(&[BATCH, HEADS, KEYS, 1], 9);
    let slots = map["both"].broadcast_matmul(&v).unwrap();
    let low = slots.min(2).unwrap().min(2).unwrap();
    let high = slots.max(2).unwrap().max(2).unwrap();
    let y = mixed(&spec, &map, [&q, &k, &v], None);
    for (index, row) in values(&y).chunks(5).enumerate() {
        let (low, high) = (values(&low)[index], values(&high)[index]);
        assert!(row.iter().all(|y| (low - 1e-12..=high + 1e-12).contains(y)));
    }
}

/// Columns belong to positions: tokens may change places only with their columns.
#[test]
fn permuting_tokens_and_columns_together_changes_nothing() {
    let spec = spec(3, KEYS, Sharing::KeyValue);
    let map = parameters(&spec);
    let [q, k, v] = inputs(KEYS);
    let order = Tensor::new(&[3u32, 0, 7, 1, 5, 2, 6, 4], &Device::Cpu).unwrap();
    let moved = |x: &Tensor| x.index_select(&order, 2).unwrap();
    let whole = mixed(&spec, &map, [&q, &k, &v], None);
    let tokens = mixed(&spec, &map, [&q, &moved(&k), &moved(&v)], None);
    assert!(difference(&whole, &tokens) > 1e-3);
    let columns = Map::from([("both".to_owned(), moved(&map["both"]))]);
    let both = mixed(&spec, &columns, [&q, &moved(&k), &moved(&v)], None);
    assert_near(&whole, &both, 1e-12, "with their columns");
}

#[test]
fn the_weights_are_the_softmax_times_the_values_projection() {
    let spec = spec(3, KEYS, Sharing::Headwise);
    let map = parameters(&spec);
    let [q, k, v] = inputs(KEYS);
    let mixing = mixing(&spec, &map, [&q, &k], None).unwrap();
    let weights = mixing.weights(&v).unwrap();
    let keys = map["keys"].broadcast_matmul(&k).unwrap();
    let scores = (q.matmul(&keys.t().unwrap().contiguous().unwrap()).unwrap() * 0.5).unwrap();
    let expected = softmax(&scores).broadcast_matmul(&map["values"]).unwrap();
    assert_near(&weights, &expected, 1e-12, "weights");
    let by_weights = weights.contiguous().unwrap().matmul(&v).unwrap();
    assert_near(&by_weights, &mixing.mix(&v).unwrap(), 1e-12, "applied");
}

#[test]
fn inputs_beyond_the_longest_are_refused_by_name() {
    let spec = spec(3, KEYS, Sharing::KeyValue);
    let [q, k, _] = inputs(KEYS + 1);
    let refused = mixing(&spec, &parameters(&spec), [&q, &k], None).unwrap_err();
    let said = refused.to_string();
    assert!(said.contains("is 9, but must be at most 8"), "{said}");
}

/// Operations grow with the length, where dense attention's grow with its square; slots may outnumber
/// the tokens.
#[test]
fn a_longer_input_meets_columns_in_between() {
    let (slots, longest, keys) = (3, 5, 9);
    let spec = LinformerSpec {
        longer: Longer::Interpolate,
        ..spec(slots, longest, Sharing::KeyValue)
    };
    let map = parameters(&spec);
    let [q, k, v] = inputs(keys);
    // Of nine positions every other one stands on a column, the rest halfway between two.
    let matrix = values(&map["both"]);
    let wide: Vec<f64> = (0..slots * keys)
        .map(|i| {
            let column = |c: usize| matrix[i / keys * longest + c];
            let (t, left) = (i % keys, i % keys / 2);
            let found = match t % 2 {
                0 => column(left),
                _ => 0.5 * (column(left) + column(left + 1)),
            };
            found * longest as f64 / keys as f64
        })
        .collect();
    let mut stretched = map.clone();
    stretched.insert("both".to_owned(), tensor(wide, &[1, slots, keys]));
    let plain = LinformerSpec {
        longest: keys,
        longer: Longer::Refuse,
        ..spec.clone()
    };
    let found = mixed(&spec, &map, [&q, &k, &v], None);
    let expected = mixed(&plain, &stretched, [&q, &k, &v], None);
    assert_near(&found, &expected, 1e-12, "stretched");
    // Shorter ones are as they were.
    let [q, k, v] = inputs(4);
    let found = mixed(&spec, &map, [&q, &k, &v], None);
    let refusing = LinformerSpec {
        longer: Longer::Refuse,
        ..spec
    };
    let expected = mixed(&refusing, &map, [&q, &k, &v], None);
    assert_near(&found, &expected, 0.0, "short");
}

#[test]
fn operations_are_linear_in_the_length() {
    let at = |length: usize, slots: usize| -> f64 {
        let spec = spec(slots, 4096, Sharing::KeyValue);
        let map = Map::from([(
            "both".to_owned(),
            Tensor::zeros((1, slots, 4096), DType::F64, &Device::Cpu).unwrap(),
        )]);
        let x = Tensor::zeros((1, HEADS, length, WIDTH), DType::F64, &Device::Cpu).unwrap();
        let module: Box<dyn Mechanism> = build(&map, |p| spec.build(&heads(), p)).unwrap();
        let trace = Trace::new();
        let context = Context::new(&trace);
        let pass = MechanismPass {
            path: "attention",
            tokens: &x,
            keep: None,
            offset: 0,
            context: &context,
        };
        let mixing = module.mixing(&x, &x, &pass).unwrap();
        mixing.operations(WIDTH) as f64
    };
    let exponent = (at(4096, 16) / at(512, 16)).ln() / 8f64.ln();
    assert!((exponent - 1.0).abs() < 0.1, "{exponent}");
    assert!(at(16, 64) > at(16, 16));
}
