//! EcoFormer's codes, how they are learned, and attention by them against all its weights.
#![allow(clippy::needless_range_loop, clippy::panic, clippy::unwrap_used)]

use crate::common;
use crate::common::attention::{
    Given, HEAD_WIDTH, HEADS, Run, Subject, WIDTH, dot, growth, mask, spec,
};
use crate::common::{Map, assert_near, build, draw, normal, random, tensor, values};
use lapidary_kernels::{DType, Device, Tensor, Var};
use lapidary_parts::attention::mechanism::ecoformer::{
    Bandwidth, EcoformerSpec, Fit, Hashing, PackedCodes, Sample, Tally, learn, sign,
};
use lapidary_parts::attention::mechanism::{Heads, MechanismSpec};
use lapidary_parts::attention::{MultiHeadAttention, MultiHeadSpec, QueryKeySharing};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeMap;

const BITS: usize = 7;
const ANCHORS: usize = 5;

fn plain() -> EcoformerSpec {
    EcoformerSpec {
        bits: BITS,
        anchors: ANCHORS,
        ..EcoformerSpec::default()
    }
}

fn fitted() -> EcoformerSpec {
    EcoformerSpec {
        bandwidth: Bandwidth::Fitted,
        ..plain()
    }
}

fn multi_head(ecoformer: &EcoformerSpec, causal: bool) -> MultiHeadSpec {
    MultiHeadSpec {
        sharing: QueryKeySharing::QueryKey,
        ..spec(MechanismSpec::Ecoformer(ecoformer.clone()), causal)
    }
}

fn subject(ecoformer: &EcoformerSpec, causal: bool) -> Subject {
    Subject::new(multi_head(ecoformer, causal), 4)
}

fn heads() -> Heads {
    multi_head(&plain(), false).sizes(WIDTH)
}

fn unit(x: &[f64]) -> Vec<f64> {
    let length = dot(x, x).sqrt();
    x.iter().map(|x| x / length).collect()
}

/// The code of every token of a head, computed once more.
fn codes(
    ecoformer: &EcoformerSpec,
    map: &Map,
    run: &Run,
    [b, head]: [usize; 2],
    keep: &[bool],
) -> Vec<Vec<f64>> {
    let (m, bits) = (ecoformer.anchors, ecoformer.bits);
    let of = |name: &str, each: usize| -> Vec<f64> {
        values(&map[&format!("mechanism.{name}")])[head * each..][..each].to_vec()
    };
    let anchors = of("anchors", m * HEAD_WIDTH);
    let (means, hashes) = (of("means", m), of("hashes", bits * m));
    let distances: Vec<Vec<f64>> = (0..run.length)
        .map(|t| {
            let x = unit(run.query(b, head, t));
            let to = |anchor: &[f64]| x.iter().zip(anchor).map(|(x, a)| (x - a).powi(2)).sum();
            anchors.chunks(HEAD_WIDTH).map(to).collect()
        })
        .collect();
    let width = match ecoformer.bandwidth {
        Bandwidth::Fitted => of("bandwidths", 1)[0],
        Bandwidth::Sample => {
            let real = distances.iter().zip(keep).filter(|(_, keep)| **keep);
            let all: Vec<f64> = real.flat_map(|(d, _)| d.clone()).collect();
            all.iter().sum::<f64>() / all.len() as f64
        }
    };
    let code = |distances: &Vec<f64>| -> Vec<f64> {
        let centred: Vec<f64> = distances
            .iter()
            .zip(&means)
            .map(|(d, mean)| (-d / (2.0 * width)).exp() - mean)
            .collect();
        let bit = |hash: &[f64]| {
            if dot(&centred, hash) >= 0.0 {
                1.0
            } else {
                -1.0
            }
        };
        hashes.chunks(m).map(bit).collect()
    };
    distances.iter().map(code).collect()
}

/// `(b_i · b_j + β + 1)` over their sum, of the keys that are seen.
fn weights(codes: &[Vec<f64>], i: usize, sees: impl Fn(usize) -> bool) -> Vec<f64> {
    let offset = codes[0].len() as f64 + 1.0;
    let all: Vec<f64> = (0..codes.len())
        .map(|j| {
            if sees(j) {
                dot(&codes[i], &codes[j]) + offset
            } else {
                0.0
            }
        })
        .collect();
    let total: f64 = all.iter().sum();
    all.iter().map(|w| w / total).collect()
}

#[test]
fn linear_sums_equal_all_weights_laid_out() {
    for length in [1, 9, 70] {
        let x = random(&[2, length, WIDTH], 1);
        let keep = vec![true; length];
        for (ecoformer, causal) in [(plain(), false), (fitted(), false), (fitted(), true)] {
            let subject = subject(&ecoformer, causal);
            let run = subject.run(&x, Given::default());
            let of = |b, head| codes(&ecoformer, &subject.map, &run, [b, head], &keep);
            let all: Vec<Vec<_>> = (0..2)
                .map(|b| (0..HEADS).map(|h| of(b, h)).collect())
                .collect();
            let row =
                |b: usize, head: usize, i: usize| weights(&all[b][head], i, |j| !causal || j <= i);
            run.check(2, row, 1e-10, &format!("{ecoformer:?} causal {causal}"));
            if !causal {
                let least = 1.0 / (length * (2 * BITS + 1)) as f64;
                for b in 0..2 {
                    for i in 0..length {
                        let row = row(b, 0, i);
                        assert!((row.iter().sum::<f64>() - 1.0).abs() < 1e-12);
                        assert!(row.iter().all(|w| *w >= least - 1e-15));
                    }
                }
            }
        }
    }
}

#[test]
fn pads_have_no_weight_and_no_say_in_the_bandwidth() {
    let x = random(&[1, 8, WIDTH], 1);
    let bits = mask(&[&[0, 1, 1, 0, 1, 1, 1, 0]]);
    let keep = [false, true, true, false, true, true, true, false];
    for (ecoformer, causal) in [(plain(), false), (fitted(), true)] {
        let subject = subject(&ecoformer, causal);
        let given = Given {
            keep: Some(&bits),
            draw: None,
        };
        let run = subject.run(&x, given);
        for head in 0..HEADS {
            let codes = codes(&ecoformer, &subject.map, &run, [0, head], &keep);
            for i in (0..8).filter(|&i| keep[i]) {
                let expected = weights(&codes, i, |j| keep[j] && (!causal || j <= i));
                for (j, weight) in expected.iter().enumerate() {
                    assert!((run.weight(0, head, i, j) - weight).abs() < 1e-10);
                }
            }
        }
    }
}

/// The authors' program: a token's own value in the place of the sum of all.
#[test]
fn the_released_form_adds_its_own_value() {
    let length = 9;
    let x = random(&[2, length, WIDTH], 1);
    let ecoformer = EcoformerSpec {
        released: true,
        ..plain()
    };
    let subject = subject(&ecoformer, false);
    let run = subject.run(&x, Given::default());
    let keep = vec![true; length];
    let row = |b: usize, head: usize, i: usize| {
        let codes = codes(&ecoformer, &subject.map, &run, [b, head], &keep);
        let offset = BITS as f64 + 1.0;
        let products: Vec<f64> = codes.iter().map(|code| dot(&codes[i], code)).collect();
        let total = products.iter().sum::<f64>() + length as f64 * offset;
        let own = |j: usize| if i == j { offset } else { 0.0 };
        let row: Vec<f64> = products
            .iter()
            .enumerate()
            .map(|(j, product)| (product + own(j)) / total)
            .collect();
        assert!(
            (row.iter().sum::<f64>() - 1.0).abs() > 1e-3,
            "they do not sum to one"
        );
        row
    };
    run.check(2, row, 1e-10, "released");
}

#[test]
fn packed_codes_count_bits_to_the_same_integers() {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    for bits in [1, 7, 16, 63, 64] {
        let entries: Vec<f64> = (0..20 * bits)
            .map(|_| if rng.random::<bool>() { 1.0 } else { -1.0 })
            .collect();
        let packed = PackedCodes::new(&tensor(entries.clone(), &[20, bits])).unwrap();
        assert_eq!((packed.len(), packed.is_empty()), (20, false));
        let rows: Vec<&[f64]> = entries.chunks(bits).collect();
        for (i, &b) in packed.words().iter().enumerate() {
            for (j, &c) in packed.words().iter().enumerate() {
                let differ = rows[i].iter().zip(rows[j]).filter(|(x, y)| x != y).count();
                assert_eq!(packed.product(b, c) as f64, dot(rows[i], rows[j]));
                assert_eq!(packed.product(b, c), bits as i64 - 2 * differ as i64);
            }
        }
    }
    let message = PackedCodes::new(&random(&[2, 65], 1))
        .unwrap_err()
        .to_string();
    assert!(message.contains("between 1 and 64"), "{message}");
}

#[test]
fn the_signs_gradient_passes_within_one() {
    let x = Var::from_tensor(&tensor(
        vec![-3.0, -1.5, -0.99, -0.2, 0.0, 0.4, 0.999, 1.001, 8.0],
        &[9],
    ));
    let x = x.unwrap();
    let y = sign(x.as_tensor()).unwrap();
    assert_eq!(
        values(&y),
        [-1.0, -1.0, -1.0, -1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    );
    let upstream = random(&[9], 5);
    let gradients = (y * &upstream)
        .unwrap()
        .sum_all()
        .unwrap()
        .backward()
        .unwrap();
    let passed = [0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0];
    let expected = (tensor(passed.to_vec(), &[9]) * upstream).unwrap();
    assert_near(
        gradients.get(x.as_tensor()).unwrap(),
        &expected,
        0.0,
        "gradient",
    );
}

/// Queries get a gradient through the codes; hashes, anchors and means get none.
#[test]
fn hashes_are_no_variables() {
    let ecoformer = fitted();
    let spec = multi_head(&ecoformer, false);
    let map = draw(4, |p| MultiHeadAttention::new(&spec, WIDTH, p));
    let variables: BTreeMap<String, Var> = map
        .iter()
        .map(|(name, x)| (name.clone(), Var::from_tensor(x).unwrap()))
        .collect();
    let live: Map = variables
        .iter()
        .map(|(name, var)| (name.clone(), var.as_tensor().clone()))
        .collect();
    let subject = Subject { spec, map: live };
    let y = subject.output(&random(&[1, 6, WIDTH], 1), Given::default());
    let gradients = common::contracted(&y).backward().unwrap();
    for (name, variable) in &variables {
        let has = gradients.get(variable.as_tensor()).is_some();
        assert_eq!(has, !name.starts_with("mechanism."), "{name}");
    }
    let query = gradients
        .get(variables["query.weight"].as_tensor())
        .unwrap();
    assert!(values(query).iter().any(|x| x.abs() > 1e-6));
}

fn hashing(map: &Map) -> Hashing {
    build(map, |p| plain().hashing(&heads(), p)).unwrap()
}

#[test]
fn codes_are_the_same_in_training_and_after_a_round_trip() {
    let map: Map = draw(4, |p| plain().hashing(&heads(), p))
        .into_iter()
        .map(|(name, x)| (name, x.to_dtype(DType::F32).unwrap()))
        .collect();
    let queries = random(&[2, HEADS, 30, HEAD_WIDTH], 1)
        .to_dtype(DType::F32)
        .unwrap();
    let before = values(&hashing(&map).codes(&queries, None).unwrap());
    let stored: BTreeMap<&str, Vec<u8>> = map
        .iter()
        .map(|(name, x)| {
            let numbers: Vec<f32> = x.flatten_all().unwrap().to_vec1().unwrap();
            (
                name.as_str(),
                numbers.iter().flat_map(|x| x.to_le_bytes()).collect(),
            )
        })
        .collect();
    let views: Vec<(&str, safetensors::tensor::TensorView<'_>)> = stored
        .iter()
        .map(|(name, bytes)| {
            let shape = map[*name].dims().to_vec();
            let view = safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape, bytes);
            (*name, view.unwrap())
        })
        .collect();
    let file = safetensors::serialize(views, None).unwrap();
    let read = safetensors::SafeTensors::deserialize(&file).unwrap();
    let again: Map = read
        .tensors()
        .into_iter()
        .map(|(name, view)| {
            let numbers: Vec<f32> = view
                .data()
                .chunks(4)
                .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                .collect();
            let x = Tensor::from_vec(numbers, view.shape(), &Device::Cpu).unwrap();
            (name, x)
        })
        .collect();
    assert_eq!(
        before,
        values(&hashing(&again).codes(&queries, None).unwrap())
    );
    // A pass that draws anew has nothing to draw here.
    let subject = subject(&plain(), false);
    let x = random(&[1, 6, WIDTH], 1);
    let drawn = |draw| subject.output(&x, Given { keep: None, draw });
    assert_near(&drawn(None), &drawn(Some(7)), 0.0, "draws");
}

/// A bit that is turned over in all codes, or that changes places, is in no inner product.
#[test]
fn turning_over_and_permuting_bits_changes_nothing() {
    let before = subject(&plain(), false);
    let x = random(&[1, 10, WIDTH], 1);
    let with = |hashes: Tensor| {
        let mut map = before.map.clone();
        map.insert("mechanism.hashes".to_owned(), hashes);
        let subject = Subject {
            spec: before.spec.clone(),
            map,
        };
        subject.output(&x, Given::default())
    };
    let hashes = &before.map["mechanism.hashes"];
    let whole = before.output(&x, Given::default());
    for bit in 0..BITS {
        let flips = (0..BITS)
            .map(|b| if b == bit { -1.0 } else { 1.0 })
            .collect();
        let turned = hashes.broadcast_mul(&tensor(flips, &[1, BITS, 1])).unwrap();
        assert_near(&with(turned), &whole, 1e-12, "turned over");
    }
    let order: Vec<u32> = (0..BITS as u32).map(|bit| bit * 3 % BITS as u32).collect();
    let order = Tensor::new(order.as_slice(), &Device::Cpu).unwrap();
    let moved = hashes.index_select(&order, 1).unwrap();
    assert_near(&with(moved), &whole, 1e-12, "permuted");
}

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

/// Counts what it does.
#[derive(Default)]
struct Counter(Tally);

impl Counter {
    fn times(&mut self, a: f64, b: f64) -> f64 {
        self.0.multiplications += 1;
        a * b
    }

    fn plus(&mut self, a: f64, b: f64) -> f64 {
        self.0.additions += 1;
        a + b
    }
}

/// Attention of one head, step by step as a chip would take it.
fn counted(n: usize, d: usize, m: usize, bits: usize) -> Tally {
    let mut count = Counter::default();
    let x = |i: usize, j: usize| ((i * 13 + j * 7) % 5) as f64 - 2.0;
    let mut codes = vec![vec![0.0; bits]; n];
    for (i, code) in codes.iter_mut().enumerate() {
        let mut kernels = vec![0.0; m];
        for (a, kernel) in kernels.iter_mut().enumerate() {
            // Differences and their sum are additions, squares a table's; then the bandwidth and the
            // exponential.
            let mut distance = 0.0;
            for f in 0..d {
                let by = count.plus(x(i, f), -x(a + 3, f));
                distance = count.plus(distance, by * by);
            }
            let scaled = count.times(distance, -0.1);
            *kernel = count.times(scaled, 1.0).exp();
        }
        for (r, bit) in code.iter_mut().enumerate() {
            let mut sum = 0.0;
            for (a, kernel) in kernels.iter().enumerate() {
                let product = count.times(*kernel, x(r, a) + 0.5);
                sum = count.plus(sum, product);
            }
            *bit = if sum < 0.0 { -1.0 } else { 1.0 };
        }
    }
    let mut keys = vec![0.0; bits];
    let mut context = vec![vec![0.0; d]; bits];
    for (j, code) in codes.iter().enumerate() {
        for r in 0..bits {
            keys[r] = count.plus(keys[r], code[r]);
            for f in 0..d {
                context[r][f] = count.plus(context[r][f], code[r] * x(j, f));
            }
        }
    }
    for code in &codes {
        let mut normaliser = 0.0;
        for r in 0..bits {
            let product = count.times(code[r], keys[r]);
            normaliser = count.plus(normaliser, product);
        }
        for f in 0..d {
            let mut sum = 0.0;
            for r in 0..bits {
                sum = count.plus(sum, code[r] * context[r][f]);
            }
            // The sum of all values, and the quotient.
            sum = count.plus(sum, 1.0);
            count.times(sum, 1.0 / (1.0 + normaliser.abs()));
        }
    }
    count.0
}

#[test]
fn tallies_are_what_is_counted() {
    for (n, d, m, bits) in [(5, 4, 3, 7), (11, 8, 6, 16)] {
        let ecoformer = EcoformerSpec {
            bits,
            anchors: m,
            ..plain()
        };
        let one = counted(n, d, m, bits);
        assert_eq!(ecoformer.tally(1, n, d), one);
        let three = ecoformer.tally(3, n, d);
        assert_eq!(three.multiplications, 3 * one.multiplications);
        assert_eq!(three.additions, 3 * one.additions);
    }
    // Scores and mixing, and the softmax's quotients.
    let softmax = Tally::of_softmax(2, 10, 4);
    assert_eq!(softmax.multiplications, 2 * 100 * 8 + 2 * 100);
    assert_eq!(softmax.additions, 2 * 100 * 8);
    let energy = 3.7 * 1800.0 + 0.9 * 1600.0;
    assert!((softmax.picojoules() - energy).abs() < 1e-9);
    let slope = growth(64, |n| plain().tally(4, n, 16).multiplications);
    assert!((slope - 1.0).abs() < 1e-12);
}

#[test]
fn operations_grow_linearly() {
    for (ecoformer, causal) in [(plain(), false), (fitted(), true)] {
        let subject = subject(&ecoformer, causal);
        let exponent = growth(512, |n| subject.mixing_operations(n));
        assert!((exponent - 1.0).abs() < 0.1, "{exponent}");
    }
}
