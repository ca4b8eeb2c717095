//! EcoFormer's codes, how they are learned, and attention by them against all its weights.
#![allow(clippy::needless_range_loop, clippy::panic, clippy::unwrap_used)]

mod learning;
mod tallies;

use std::collections::BTreeMap;

use crate::common;
use crate::common::attention::{
    Given, HEAD_WIDTH, HEADS, Run, Subject, WIDTH, dot, growth, mask, spec,
};
use crate::common::{Map, assert_near, build, draw, random, tensor, values};
use lapidary_kernels::{DType, Device, Tensor, Var};
use lapidary_parts::attention::mechanism::ecoformer::{
    Bandwidth, EcoformerSpec, Hashing, PackedCodes, sign,
};
use lapidary_parts::attention::mechanism::{Heads, MechanismSpec};
use lapidary_parts::attention::{MultiHeadAttention, MultiHeadSpec, QueryKeySharing};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

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
            ..Given::default()
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
    let drawn = |draw| {
        subject.output(
            &x,
            Given {
                draw,
                ..Given::default()
            },
        )
    };
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

#[test]
fn operations_grow_linearly() {
    for (ecoformer, causal) in [(plain(), false), (fitted(), true)] {
        let subject = subject(&ecoformer, causal);
        let exponent = growth(512, |n| subject.mixing_operations(n));
        assert!((exponent - 1.0).abs() < 0.1, "{exponent}");
    }
}
