//! Linformer's exact properties, against attention written out by hand.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use crate::common;
use crate::common::{
    Map, assert_near, build, difference, draw, gradient_error, heads, random, tensor, values,
};
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_parts::attention::mechanism::linformer::{LinformerSpec, Longer, Projection, Sharing};
use lapidary_parts::attention::mechanism::{Describe, Mechanism, MechanismPass};
use lapidary_parts::{Context, Result};
use lapidary_signal::{Mixing, Trace};

const BATCH: usize = 2;
const HEADS: usize = 3;
const KEYS: usize = 8;
const WIDTH: usize = 4;

fn spec(slots: usize, longest: usize, sharing: Sharing) -> LinformerSpec {
    LinformerSpec {
        sharing,
        ..LinformerSpec::new(slots, longest)
    }
}

fn parameters(spec: &LinformerSpec) -> Map {
    draw(4, |p| spec.build(&heads(HEADS, WIDTH, false), p))
}

/// Mixes `v` with keys and queries `x`, all of them read through `keep`.
fn mixing(
    spec: &LinformerSpec,
    map: &Map,
    [q, k]: [&Tensor; 2],
    keep: Option<&Tensor>,
) -> Result<Box<dyn Mixing>> {
    mixing_seen(spec, map, [q, k], keep, &Trace::new())
}

fn mixing_seen(
    spec: &LinformerSpec,
    map: &Map,
    [q, k]: [&Tensor; 2],
    keep: Option<&Tensor>,
    trace: &Trace,
) -> Result<Box<dyn Mixing>> {
    let module: Box<dyn Mechanism> =
        build(map, |p| spec.build(&heads(HEADS, WIDTH, false), p)).unwrap();
    let context = Context::new(trace);
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

/// Projecting tokens before their features, `(E X) W`, is what projecting them after does, `E (X W)`, but for
/// the bias of `W`: a slot has it times the sum of its row of `E`.
#[test]
fn projecting_after_the_features_is_projecting_before_them() {
    let spec = spec(3, KEYS, Sharing::Headwise);
    let map = parameters(&spec);
    let q = random(&[BATCH, HEADS, 5, WIDTH], 1);
    let x = random(&[BATCH, 1, KEYS, 6], 5);
    let [(k, key_slots), (v, value_slots)] = [("keys", 6), ("values", 8)].map(|(name, seed)| {
        let w = random(&[HEADS, 6, WIDTH], seed);
        let bias = random(&[HEADS, 1, WIDTH], seed + 1);
        let after = x.broadcast_matmul(&w).unwrap();
        let after = after.broadcast_add(&bias).unwrap();
        let before = map[name].broadcast_matmul(&x).unwrap();
        let before = before.broadcast_matmul(&w).unwrap();
        let sums = map[name].sum_keepdim(2).unwrap();
        let biases = sums.broadcast_mul(&bias).unwrap();
        (after, before.broadcast_add(&biases).unwrap())
    });
    let found = mixed(&spec, &map, [&q, &k, &v], None);
    let expected = attention(&q, &key_slots, &value_slots);
    assert_near(&found, &expected, 1e-12, "before");
}

#[test]
fn sharing_counts_matrices() {
    let count = |sharing| {
        let spec = spec(3, 16, sharing);
        let map = draw(1, |mut p| {
            spec.build(&heads(HEADS, WIDTH, false), p.at("blocks.0"))?;
            spec.build(&heads(HEADS, WIDTH, false), p.at("blocks.1"))
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

/// `P`, `P E` and `P F`: heads have different numbers of slots, and some keys are pads.
#[test]
fn weights_of_slots_and_of_keys_can_be_looked_at() {
    let spec = LinformerSpec {
        slots_by_head: vec![1, 3, 3],
        ..spec(3, KEYS, Sharing::Headwise)
    };
    let map = parameters(&spec);
    let [q, k, v] = inputs(KEYS);
    let real = |at: usize| at % KEYS < 6;
    let kept: Vec<u8> = (0..BATCH * KEYS).map(|at| u8::from(real(at))).collect();
    let keep = Tensor::from_vec(kept, (BATCH, KEYS), &Device::Cpu).unwrap();
    let trace = Trace::new().capture("*").unwrap();
    let mixing = mixing_seen(&spec, &map, [&q, &k], Some(&keep), &trace).unwrap();
    let site = |name: &str| trace.signal(name).unwrap().into_value();
    let (slots, of_keys) = (
        site("attention.slot_weights"),
        site("attention.key_weights"),
    );
    assert_eq!(slots.dims(), [BATCH, HEADS, 5, 3]);
    let of_values = mixing.weights(&v).unwrap();
    let (q, k) = (values(&q), values(&k));
    let (e, f) = (values(&map["keys"]), values(&map["values"]));
    let (slots, of_keys, of_values) = (values(&slots), values(&of_keys), values(&of_values));
    for (row, found) in slots.chunks(3).enumerate() {
        let (b, head) = (row / (HEADS * 5), row / 5 % HEADS);
        let count = if head == 0 { 1 } else { 3 };
        let key = |t: usize, at: usize| k[((b * HEADS + head) * KEYS + t) * WIDTH + at];
        let scores = (0..count).map(|slot| {
            let entry = |at: usize| (0..6).map(|t| e[slot * KEYS + t] * key(t, at)).sum::<f64>();
            (0..WIDTH)
                .map(|at| q[row * WIDTH + at] * entry(at))
                .sum::<f64>()
                * 0.5
        });
        let exponentials: Vec<f64> = scores.map(f64::exp).collect();
        let total: f64 = exponentials.iter().sum();
        for (slot, found) in found.iter().enumerate() {
            let expected = exponentials.get(slot).map_or(0.0, |one| one / total);
            assert!(
                (found - expected).abs() < 1e-12,
                "slot {slot} of head {head}"
            );
        }
        for t in 0..KEYS {
            let through = |matrix: &[f64]| match real(t) {
                true => (0..3).map(|s| found[s] * matrix[s * KEYS + t]).sum::<f64>(),
                false => 0.0,
            };
            assert!(
                (of_keys[row * KEYS + t] - through(&e)).abs() < 1e-12,
                "E at {t}"
            );
            assert!(
                (of_values[row * KEYS + t] - through(&f)).abs() < 1e-12,
                "F at {t}"
            );
        }
    }
}

/// A head with slots of its own is that head of a module in which all have as many.
#[test]
fn heads_have_slots_of_their_own() {
    let by_head = vec![1, 3, 2];
    let [q, k, v] = inputs(KEYS);
    let head = |x: &Tensor, head: usize| x.narrow(1, head, 1).unwrap().contiguous().unwrap();
    let differ = |sharing, projection| LinformerSpec {
        slots_by_head: by_head.clone(),
        projection,
        ..spec(3, KEYS, sharing)
    };
    // The first rows of what is shared; means of windows of different lengths.
    for projection in [Projection::Learned, Projection::Mean, Projection::Max] {
        let spec = differ(Sharing::Headwise, projection);
        let map = parameters(&spec);
        let found = mixed(&spec, &map, [&q, &k, &v], None);
        for (index, &slots) in by_head.iter().enumerate() {
            let alike = LinformerSpec {
                slots_by_head: Vec::new(),
                slots,
                ..spec.clone()
            };
            let rows = |x: &Tensor| x.narrow(1, 0, slots).unwrap();
            let first: Map = map
                .iter()
                .map(|(name, x)| (name.clone(), rows(x)))
                .collect();
            let expected = head(&mixed(&alike, &first, [&q, &k, &v], None), index);
            assert_near(&head(&found, index), &expected, 1e-12, "shared");
        }
    }
    // Of matrices of their own, and of windows with weights of their own.
    for projection in [Projection::Learned, Projection::Convolution] {
        let spec = differ(Sharing::None, projection);
        let map = parameters(&spec);
        let found = mixed(&spec, &map, [&q, &k, &v], None);
        let mut first = 0;
        for (index, &slots) in by_head.iter().enumerate() {
            let alike = LinformerSpec {
                slots_by_head: Vec::new(),
                slots,
                ..differ(Sharing::Headwise, projection)
            };
            let count = match projection {
                Projection::Learned => slots,
                _ => KEYS.div_ceil(slots),
            };
            let own = |x: &Tensor| x.narrow(0, first, count).unwrap().unsqueeze(0).unwrap();
            let one: Map = map.iter().map(|(name, x)| (name.clone(), own(x))).collect();
            let expected = head(&mixed(&alike, &one, [&q, &k, &v], None), index);
            assert_near(&head(&found, index), &expected, 1e-12, "own");
            first += count;
        }
        assert!(map.values().all(|x| x.dim(0).unwrap() == first));
    }
}

/// Keys of windows are their largest entries among real tokens, values their means.
#[test]
fn the_largest_entries_stand_in_for_the_keys_of_a_window() {
    let (slots, longest, keys, real) = (4, 12, 8, 7);
    let spec = LinformerSpec {
        projection: Projection::Max,
        ..spec(slots, longest, Sharing::Headwise)
    };
    let [q, k, v] = inputs(keys);
    let kept: Vec<u8> = (0..BATCH * keys)
        .map(|at| u8::from(at % keys < real))
        .collect();
    let keep = Tensor::from_vec(kept, (BATCH, keys), &Device::Cpu).unwrap();
    let found = mixed(&spec, &Map::new(), [&q, &k, &v], Some(&keep));
    // Three positions each; the last window is beyond the input.
    let pooled = |x: &Tensor, pool: &dyn Fn(&[f64]) -> f64| {
        let all = values(x);
        let mut pooled = Vec::new();
        for head in 0..BATCH * HEADS {
            for slot in 0..slots {
                for at in 0..WIDTH {
                    let there = (3 * slot..(3 * slot + 3).min(real))
                        .map(|t| (head * keys + t) * WIDTH + at);
                    pooled.push(pool(&there.map(|index| all[index]).collect::<Vec<_>>()));
                }
            }
        }
        tensor(pooled, &[BATCH, HEADS, slots, WIDTH])
    };
    let largest = |of: &[f64]| match of {
        [] => 0.0,
        there => there.iter().copied().fold(f64::NEG_INFINITY, f64::max),
    };
    let mean = |of: &[f64]| of.iter().sum::<f64>() / 3.0;
    let expected = attention(&q, &pooled(&k, &largest), &pooled(&v, &mean));
    assert_near(&found, &expected, 1e-12, "pooled");
    let trace = Trace::new().capture("*").unwrap();
    mixing_seen(&spec, &Map::new(), [&q, &k], Some(&keep), &trace).unwrap();
    assert_eq!(
        trace.names(),
        ["attention.slot_weights"],
        "no map of keys is linear"
    );
}

#[test]
fn inputs_beyond_the_longest_are_refused_by_name() {
    let spec = spec(3, KEYS, Sharing::KeyValue);
    let [q, k, _] = inputs(KEYS + 1);
    let refused = mixing(&spec, &parameters(&spec), [&q, &k], None).unwrap_err();
    let said = refused.to_string();
    assert!(said.contains("is 9, but must be at most 8"), "{said}");
}

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

/// Operations grow with the length, where dense attention's grow with its square; slots may outnumber
/// the tokens.
#[test]
fn operations_are_linear_in_the_length() {
    let at = |length: usize, slots: usize| -> f64 {
        let spec = spec(slots, 4096, Sharing::KeyValue);
        let map = Map::from([(
            "both".to_owned(),
            Tensor::zeros((1, slots, 4096), DType::F64, &Device::Cpu).unwrap(),
        )]);
        let x = Tensor::zeros((1, HEADS, length, WIDTH), DType::F64, &Device::Cpu).unwrap();
        let module: Box<dyn Mechanism> =
            build(&map, |p| spec.build(&heads(HEADS, WIDTH, false), p)).unwrap();
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

/// Columns are spread over what there is of a sequence, not over the pads behind it.
#[test]
fn pads_behind_a_longer_input_stretch_nothing() {
    let keys = 9;
    let spec = LinformerSpec {
        longer: Longer::Interpolate,
        ..spec(3, 5, Sharing::Headwise)
    };
    let map = parameters(&spec);
    let [q, k, v] = inputs(keys);
    for real in [1, 4, 5, 7, 9] {
        let keep = (0..BATCH * keys).map(|i| u8::from(i >= keys || i < real));
        let keep = Tensor::from_vec(keep.collect::<Vec<_>>(), (BATCH, keys), q.device()).unwrap();
        let found = mixed(&spec, &map, [&q, &k, &v], Some(&keep));
        let [short_k, short_v] =
            [&k, &v].map(|x| x.narrow(2, 0, real).unwrap().contiguous().unwrap());
        let alone = mixed(&spec, &map, [&q, &short_k, &short_v], None);
        let [found, alone] = [found, alone].map(|y| y.narrow(0, 0, 1).unwrap());
        assert_near(&found, &alone, 1e-12, &format!("{real} of {keys}"));
    }
}

/// Nor over the keys that are drawn: what stands where in a sequence does not hang on which of its keys count.
#[test]
fn keys_that_are_not_drawn_are_zeros_at_their_places() {
    let keys = 9;
    let spec = LinformerSpec {
        longer: Longer::Interpolate,
        ..spec(3, 5, Sharing::Headwise)
    };
    let map = parameters(&spec);
    let [q, k, v] = inputs(keys);
    let rows = |rows: [[u8; 9]; BATCH]| {
        Tensor::from_vec(rows.concat(), (BATCH, keys), &Device::Cpu).unwrap()
    };
    let drawn = rows([[1, 0, 1, 1, 0, 0, 0, 0, 0], [0, 1, 0, 0, 1, 0, 0, 0, 1]]);
    let pads = rows([[1, 1, 1, 1, 1, 1, 1, 0, 0], [1; 9]]);
    let there = drawn.to_dtype(DType::F64).unwrap();
    let there = there.reshape((BATCH, 1, keys, 1)).unwrap();
    let [zeroed_k, zeroed_v] = [&k, &v].map(|x| x.broadcast_mul(&there).unwrap());
    let module: Box<dyn Mechanism> =
        build(&map, |p| spec.build(&heads(HEADS, WIDTH, false), p)).unwrap();
    for (keep, length) in [(None, keys), (Some(&pads), 7)] {
        let trace = Trace::new();
        let context = Context::new(&trace);
        let pass = MechanismPass {
            path: "attention",
            tokens: &q,
            keep,
            offset: 0,
            context: &context,
        };
        let mixing = module.mixing_of_drawn(&q, &k, &drawn, &pass).unwrap();
        let found = mixing.mix(&v).unwrap();
        // The first sequence has so many tokens, the second all.
        for (sequence, length) in [(0, length), (1, keys)] {
            let [k, v] = [&zeroed_k, &zeroed_v]
                .map(|x| x.narrow(2, 0, length).unwrap().contiguous().unwrap());
            let expected = mixed(&spec, &map, [&q, &k, &v], None);
            let [found, expected] = [&found, &expected].map(|y| y.narrow(0, sequence, 1).unwrap());
            assert_near(&found, &expected, 1e-12, &format!("{length} tokens"));
        }
    }
}
