//! Subsampled attention's exact properties, against attention with everything else hidden.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

mod chances;

use crate::common;
use crate::common::attention::{Given, HEADS, Subject, WIDTH, mask, spec};
use crate::common::{
    assert_near, build, contracted, difference, draw, gradient_error, is_finite, random, tensor,
    values,
};
use lapidary_kernels::{BiasSpan, DType, Device, FunctionalBias, ScoreBias, Tensor, Var};
use lapidary_parts::Context;
use lapidary_parts::attention::mechanism::fastmax::FastmaxSpec;
use lapidary_parts::attention::mechanism::linformer::LinformerSpec;
use lapidary_parts::attention::mechanism::subsampled::{Selection, SubsampledSpec};
use lapidary_parts::attention::mechanism::{Describe, Heads, MechanismPass, Scores};
use lapidary_parts::attention::{MechanismSpec, MultiHeadSpec};
use lapidary_parts::position::PositionSpec;
use lapidary_signal::{Mixing, Trace};

const LENGTH: usize = 12;
const HEAD: usize = 3;

fn subsampled(keep: f64, selection: Selection) -> SubsampledSpec {
    SubsampledSpec {
        keep,
        selection,
        ..SubsampledSpec::default()
    }
}

fn local(radius: f64) -> Selection {
    Selection::Local {
        radius,
        columns: None,
    }
}

fn heads(causal: bool) -> Heads {
    Heads {
        scale: 0.7,
        ..common::heads(HEADS, HEAD, causal)
    }
}

/// How a mixing is made.
#[derive(Clone, Copy, Default)]
struct How<'a> {
    causal: bool,
    seed: u64,
    path: &'a str,
    keep: Option<&'a Tensor>,
    bias: Option<&'a ScoreBias>,
    window: Option<usize>,
    annealing: f64,
}

/// The mixing of queries and keys `[batch, heads, length, width]`.
fn mixing(spec: &SubsampledSpec, [q, k]: [&Tensor; 2], how: How<'_>) -> Box<dyn Mixing> {
    let heads = heads(how.causal);
    let map = draw(3, |p| spec.build(&heads, p));
    let module = build(&map, |p| spec.build(&heads, p)).unwrap();
    let trace = Trace::new();
    let context = Context {
        draw: Some(how.seed),
        annealing: how.annealing,
        ..Context::new(&trace)
    };
    let (batch, _, queries, _) = q.dims4().unwrap();
    let tokens = random(&[batch, queries, WIDTH], 0);
    let pass = MechanismPass {
        path: how.path,
        tokens: &tokens,
        keep: how.keep,
        offset: 0,
        context: &context,
    };
    let scores = Scores {
        window: how.window,
        bias: how.bias.cloned(),
    };
    module.mixing_by_scores(q, k, scores, &pass).unwrap()
}

fn drawn(batch: usize, length: usize) -> [Tensor; 3] {
    [1, 2, 3].map(|seed| random(&[batch, HEADS, length, HEAD], seed))
}

/// Weights `[batch, heads, query, key]` laid out.
fn weights(mixing: &dyn Mixing, like: &Tensor) -> Vec<f64> {
    values(&mixing.weights(like).unwrap())
}

/// For each row of weights the keys that have any.
fn met(weights: &[f64], keys: usize) -> Vec<Vec<usize>> {
    let of = |row: &[f64]| (0..keys).filter(|&j| row[j] > 0.0).collect();
    weights.chunks(keys).map(of).collect()
}

/// Additive 0 where weights are, `-∞` elsewhere.
fn hidden(weights: &[f64], shape: &[usize]) -> Tensor {
    let of = |w: &f64| if *w > 0.0 { 0.0 } else { f64::NEG_INFINITY };
    common::tensor(weights.iter().map(of).collect(), shape)
}

/// `softmax(0.7 Q Kᵀ + bias + hidden) V` by plain operations.
fn masked(q: &Tensor, k: &Tensor, v: &Tensor, added: &Tensor) -> Tensor {
    let scores = (q.matmul(&k.t().unwrap().contiguous().unwrap()).unwrap() * 0.7).unwrap();
    let scores = scores.broadcast_add(added).unwrap();
    let largest = scores.max_keepdim(3).unwrap().detach();
    let e = scores.broadcast_sub(&largest).unwrap().exp().unwrap();
    let weights = e.broadcast_div(&e.sum_keepdim(3).unwrap()).unwrap();
    weights.matmul(v).unwrap()
}

/// Every way of selecting keys.
fn ways() -> Vec<(&'static str, SubsampledSpec, bool)> {
    let per_head = SubsampledSpec {
        per_head: true,
        ..subsampled(0.25, Selection::Unbiased)
    };
    let own = SubsampledSpec {
        own: true,
        ..subsampled(0.25, Selection::Unbiased)
    };
    let image = Selection::Local {
        radius: 1.0,
        columns: Some(4),
    };
    vec![
        ("unbiased", subsampled(0.25, Selection::Unbiased), false),
        (
            "unbiased, causal",
            subsampled(0.25, Selection::Unbiased),
            true,
        ),
        ("each head", per_head.clone(), false),
        ("each head, causal", per_head, true),
        ("with its own", own, false),
        ("local", subsampled(0.34, local(2.0)), false),
        ("local, causal", subsampled(0.34, local(2.0)), true),
        ("on an image", subsampled(0.3, image), false),
    ]
}

/// A function of each query and key, whose last layer has these weights `[output, unit]`.
fn functional(weight: Tensor) -> ScoreBias {
    let (outputs, units) = weight.dims2().unwrap();
    let distances = (0..LENGTH).map(|d| (d as f64).ln_1p()).collect();
    let scales = tensor(vec![0.3; LENGTH], &[LENGTH]);
    let network = [
        (random(&[units, 1], 10), random(&[units], 11)),
        (weight, random(&[outputs], 12)),
    ];
    let span = BiasSpan {
        queries: LENGTH,
        keys: LENGTH,
        offset: 0,
        causal: false,
    };
    let bias = FunctionalBias::new(&tensor(distances, &[LENGTH]), &scales, &network, span);
    ScoreBias::Functional(bias.unwrap())
}

#[test]
fn what_is_gathered_is_attention_with_all_else_hidden() {
    let plain = drawn(2, LENGTH);
    let by_pairs = random(&[1, HEADS, LENGTH, LENGTH], 8);
    let by_distance = random(&[HEADS, 2 * LENGTH - 1], 9);
    type Form = (fn(Tensor) -> ScoreBias, Tensor);
    let forms: [Option<Form>; 4] = [
        None,
        Some((ScoreBias::Pairs, by_pairs)),
        Some((ScoreBias::ByDistance, by_distance)),
        Some((functional, random(&[2 * HEADS, 6], 13))),
    ];
    for (name, spec, causal) in ways() {
        for (form, window) in forms
            .iter()
            .flat_map(|form| [(form, None), (form, Some(5))])
        {
            let variables = plain.each_ref().map(|x| Var::from_tensor(x).unwrap());
            let [q, k, v] = variables.each_ref().map(Var::as_tensor);
            let numbers = form.as_ref().map(|(_, x)| Var::from_tensor(x).unwrap());
            let bias = form.as_ref().zip(numbers.as_ref());
            let bias = bias.map(|((form, _), numbers)| form(numbers.as_tensor().clone()));
            let how = How {
                causal,
                seed: 5,
                path: "attention",
                bias: bias.as_ref(),
                window,
                ..How::default()
            };
            let mixing = mixing(&spec, [q, k], how);
            let laid = weights(mixing.as_ref(), v);
            for (i, keys) in met(&laid, LENGTH).iter().enumerate() {
                let i = i % LENGTH;
                assert!(!keys.is_empty() || (window.is_some() && !causal), "{name}");
                for &j in keys {
                    assert!(!causal || j <= i, "{name}");
                    assert!(window.is_none_or(|w| i.abs_diff(j) < w), "{name}");
                }
            }
            let mut added = hidden(&laid, &[2, HEADS, LENGTH, LENGTH]);
            if let Some(bias) = &bias {
                let bias = bias.laid_out(LENGTH, LENGTH).unwrap();
                added = added.broadcast_add(&bias).unwrap();
            }
            let expected = masked(q, k, v, &added);
            let found = mixing.mix(v).unwrap();
            assert_near(&found, &expected, 1e-12, name);
            let [found, expected] = [found, expected].map(|y| contracted(&y).backward().unwrap());
            for variable in variables.iter().chain(&numbers) {
                let of = |store: &lapidary_kernels::GradStore| {
                    store.get(variable.as_tensor()).unwrap().clone()
                };
                assert_near(&of(&found), &of(&expected), 1e-10, name);
            }
        }
    }
}

#[test]
fn with_all_keys_kept_it_is_dense_attention() {
    let x = random(&[2, LENGTH, WIDTH], 4);
    for causal in [false, true] {
        for selection in [Selection::Unbiased, local(0.0), local(7.0)] {
            for position in [PositionSpec::None, PositionSpec::Alibi] {
                let dense = MultiHeadSpec {
                    position: position.clone(),
                    ..spec(MechanismSpec::Softmax, causal)
                };
                let mechanism = MechanismSpec::Subsampled(subsampled(1.0, selection));
                let all = MultiHeadSpec {
                    position,
                    ..spec(mechanism, causal)
                };
                let dense = Subject::new(dense, 6);
                let all = Subject::new(all, 6);
                for seed in 0..3 {
                    let given = Given {
                        draw: Some(seed),
                        ..Given::default()
                    };
                    let found = all.output(&x, given);
                    let expected = dense.output(&x, Given::default());
                    assert_near(&found, &expected, 1e-12, "all keys");
                }
            }
        }
    }
}

/// However narrow or low it is, and with a last row that is short.
#[test]
fn with_all_keys_kept_an_image_is_one_window() {
    let x = random(&[2, LENGTH, WIDTH], 4);
    let dense = Subject::new(spec(MechanismSpec::Softmax, false), 6);
    let expected = dense.output(&x, Given::default());
    for columns in [1, 2, 3, 5, 12, 40] {
        let image = Selection::Local {
            radius: 3.0,
            columns: Some(columns),
        };
        let all = MechanismSpec::Subsampled(subsampled(1.0, image));
        let all = Subject::new(spec(all, false), 6);
        let given = Given {
            draw: Some(1),
            ..Given::default()
        };
        let what = format!("{columns} columns");
        assert_near(&all.output(&x, given), &expected, 1e-12, &what);
    }
}

#[test]
fn a_pass_without_draws_is_softmax_bit_for_bit_and_checkpoints_interchange() {
    let x = random(&[2, LENGTH, WIDTH], 4);
    for (window, position) in [
        (None, PositionSpec::None),
        (Some(4), PositionSpec::KerplePower),
    ] {
        let with = |mechanism| {
            let spec = MultiHeadSpec {
                window,
                position: position.clone(),
                ..spec(mechanism, true)
            };
            Subject::new(spec, 6)
        };
        let dense = with(MechanismSpec::Softmax);
        let sampled = with(MechanismSpec::Subsampled(SubsampledSpec::default()));
        assert!(dense.map.keys().eq(sampled.map.keys()));
        let [found, expected] = [&sampled, &dense].map(|one| one.output(&x, Given::default()));
        assert_eq!(values(&found), values(&expected));
        let [found, expected] = [&sampled, &dense].map(|one| one.decode(&x, &[5, 1, 1, 5]));
        assert_eq!(values(&found), values(&expected));
    }
}

#[test]
fn layers_steps_and_sequences_draw_for_themselves_and_again_alike() {
    let [q, k, v] = drawn(3, 32);
    let subsets = |spec: &SubsampledSpec, seed: u64, path: &str| {
        let how = How {
            seed,
            path,
            ..How::default()
        };
        let laid = weights(mixing(spec, [&q, &k], how).as_ref(), &v);
        let rows = met(&laid, 32);
        // The first query's, all sharing one.
        for head in rows.chunks(32) {
            assert!(head.iter().all(|row| *row == head[0]));
        }
        rows.into_iter().step_by(32).collect::<Vec<_>>()
    };
    let shared = subsampled(0.25, Selection::Unbiased);
    let once = subsets(&shared, 1, "blocks.0.attention");
    assert_eq!(once, subsets(&shared, 1, "blocks.0.attention"));
    assert_ne!(once, subsets(&shared, 1, "blocks.1.attention"));
    assert_ne!(once, subsets(&shared, 2, "blocks.0.attention"));
    assert_ne!(once[0], once[HEADS]);
    assert_ne!(once[HEADS], once[2 * HEADS]);
    assert_eq!(once[0], once[1]);
    let apart = SubsampledSpec {
        per_head: true,
        ..shared
    };
    let apart = subsets(&apart, 1, "blocks.0.attention");
    assert_ne!(apart[0], apart[1]);
}

#[test]
fn nothing_later_is_seen_and_every_token_sees_something() {
    let x = random(&[2, LENGTH, WIDTH], 4);
    let kept = 5;
    let later = random(&[2, LENGTH - kept, WIDTH], 9);
    let other = Tensor::cat(&[&x.narrow(1, 0, kept).unwrap(), &later], 1).unwrap();
    for (name, subsampled, causal) in ways().into_iter().filter(|way| way.2) {
        let subject = Subject::new(spec(MechanismSpec::Subsampled(subsampled), causal), 6);
        for seed in 0..10 {
            let given = Given {
                draw: Some(seed),
                ..Given::default()
            };
            let [before, after] = [&x, &other].map(|x| {
                let y = subject.output(x, given);
                assert!(is_finite(&y), "{name}");
                y.narrow(1, 0, kept).unwrap()
            });
            assert_eq!(difference(&before, &after), 0.0, "{name}");
            let run = subject.run(&x, given);
            for row in run.weights.chunks(LENGTH) {
                assert!((row.iter().sum::<f64>() - 1.0).abs() < 1e-12, "{name}");
            }
        }
    }
}

#[test]
fn pads_are_neither_counted_nor_drawn() {
    let short = random(&[1, 8, WIDTH], 4);
    let junk = random(&[1, 4, WIDTH], 5);
    let right = Tensor::cat(&[&short, &junk], 1).unwrap();
    let left = Tensor::cat(&[&junk, &short], 1).unwrap();
    let sides = [
        (right, mask(&[&[1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0]]), 0),
        (left, mask(&[&[0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1]]), 4),
    ];
    for (name, subsampled, causal) in ways() {
        if name == "on an image" {
            continue;
        }
        for position in [PositionSpec::None, PositionSpec::Alibi] {
            let spec = MultiHeadSpec {
                position,
                ..spec(MechanismSpec::Subsampled(subsampled.clone()), causal)
            };
            let subject = Subject::new(spec, 6);
            let given = Given {
                draw: Some(3),
                ..Given::default()
            };
            let alone = subject.output(&short, given);
            for (x, keep, start) in &sides {
                let keep = Some(keep);
                let padded = subject.output(x, Given { keep, ..given });
                let padded = padded.narrow(1, *start, 8).unwrap();
                assert_near(&padded, &alone, 1e-12, name);
            }
        }
    }
}

/// Where all scores are alike a pass is the mean of the values drawn, and the mean over passes that
/// of all.
#[test]
fn means_over_draws_are_means_over_keys() {
    let draws = 10_000;
    let one = random(&[1, HEADS, LENGTH, 1], 3);
    let values_of = one.broadcast_as((draws, HEADS, LENGTH, 1)).unwrap();
    let nothing = Tensor::zeros((draws, HEADS, LENGTH, HEAD), DType::F64, &Device::Cpu).unwrap();
    let how = How {
        path: "attention",
        ..How::default()
    };
    let spec = subsampled(0.25, Selection::Unbiased);
    let mixing = mixing(&spec, [&nothing, &nothing], how);
    let mixed = mixing.mix(&values_of.contiguous().unwrap()).unwrap();
    let mixed = values(&mixed);
    for head in 0..HEADS {
        let v = &values(&one)[head * LENGTH..][..LENGTH];
        let mean = v.iter().sum::<f64>() / LENGTH as f64;
        let found: Vec<f64> = (0..draws)
            .map(|b| mixed[(b * HEADS + head) * LENGTH])
            .collect();
        let average = found.iter().sum::<f64>() / draws as f64;
        let variance = found.iter().map(|y| (y - average).powi(2)).sum::<f64>() / draws as f64;
        let error = (variance / draws as f64).sqrt();
        assert!(
            (average - mean).abs() < 3.0 * error,
            "{average} {mean} {error}"
        );
    }
}

#[test]
fn work_is_the_share_of_keys_that_is_kept() {
    let work = |keep: f64, selection| {
        let [q, k, v] = drawn(1, 64);
        let how = How {
            path: "attention",
            ..How::default()
        };
        let mixing = mixing(&subsampled(keep, selection), [&q, &k], how);
        assert_eq!(mixing.mix(&v).unwrap().dims(), [1, HEADS, 64, HEAD]);
        mixing.operations(HEAD)
    };
    let dense = (HEADS * 64 * 64 * (4 * HEAD + 5)) as u64;
    for selection in [Selection::Unbiased, local(4.0)] {
        assert_eq!(work(1.0, selection), dense);
        assert_eq!(work(0.25, selection), dense / 4);
        assert_eq!(work(0.125, selection), dense / 8);
    }
}

/// `c` goes from `1 / keep` to 1 in a straight line.
#[test]
fn on_the_way_to_all_keys_more_of_them_are_kept() {
    let spec = subsampled(0.125, Selection::Unbiased);
    let kept = [0.0, 0.25, 0.5, 0.75, 1.0, 2.0].map(|so_far| spec.kept(64, so_far));
    // c is 8, 6.25, 4.5, 2.75 and 1.
    assert_eq!(kept, [8, 11, 15, 24, 64, 64]);
    let [q, k, v] = drawn(2, 24);
    for (name, spec, causal) in ways() {
        let at = |annealing| {
            let how = How {
                causal,
                seed: 3,
                path: "attention",
                annealing,
                ..How::default()
            };
            mixing(&spec, [&q, &k], how)
        };
        let dense = SubsampledSpec {
            keep: 1.0,
            ..spec.clone()
        };
        let how = How {
            causal,
            seed: 9,
            path: "attention",
            ..How::default()
        };
        let dense = mixing(&dense, [&q, &k], how).mix(&v).unwrap();
        assert_near(&at(1.0).mix(&v).unwrap(), &dense, 1e-12, name);
        // Windows of local selection are a whole number, so that their size grows in steps.
        let operations = [0.0, 0.5, 1.0].map(|so_far| at(so_far).operations(HEAD));
        assert!(operations.is_sorted(), "{name}: {operations:?}");
        assert!(operations[0] < operations[2], "{name}: {operations:?}");
    }
    let fastmax = SubsampledSpec {
        inner: Box::new(MechanismSpec::Fastmax(FastmaxSpec::default())),
        ..SubsampledSpec::default()
    };
    for causal in [false, true] {
        let how = How {
            causal,
            path: "attention",
            annealing: 1.0,
            ..How::default()
        };
        let dense = SubsampledSpec {
            keep: 1.0,
            ..fastmax.clone()
        };
        let [found, dense] = [&fastmax, &dense].map(|spec| mixing(spec, [&q, &k], how).mix(&v));
        assert_near(&found.unwrap(), &dense.unwrap(), 1e-12, "around fastmax");
    }
}

#[test]
fn gradients_of_a_pass_that_draws_equal_central_differences() {
    for (name, subsampled, causal) in ways() {
        let spec = MultiHeadSpec {
            position: PositionSpec::KerpleLogarithmic,
            ..spec(MechanismSpec::Subsampled(subsampled), causal)
        };
        let subject = Subject::new(spec, 6);
        let mut inputs = subject.map.clone();
        inputs.insert("x".to_owned(), random(&[2, 8, WIDTH], 4));
        let error = gradient_error(&inputs, 4, |inputs| {
            let one = Subject {
                spec: subject.spec.clone(),
                map: inputs.clone(),
            };
            let given = Given {
                draw: Some(1),
                ..Given::default()
            };
            contracted(&one.output(&inputs["x"], given))
        });
        assert!(error < 1e-6, "{name}: {error:e}");
    }
}

/// Around another mechanism, what is not drawn is as if it were padding.
#[test]
fn other_mechanisms_see_the_drawn_keys_alone() {
    let fastmax = MechanismSpec::Fastmax(FastmaxSpec::default());
    let linformer = MechanismSpec::Linformer(LinformerSpec::new(4, LENGTH));
    let [q, k, v] = drawn(2, LENGTH);
    for (inner, causal) in [
        (fastmax.clone(), false),
        (fastmax, true),
        (linformer, false),
    ] {
        let spec = SubsampledSpec {
            inner: Box::new(inner.clone()),
            ..SubsampledSpec::default()
        };
        let how = How {
            causal,
            seed: 4,
            path: "attention",
            ..How::default()
        };
        let sampled = mixing(&spec, [&q, &k], how);
        let laid = weights(sampled.as_ref(), &v);
        // The last query sees all that is drawn.
        let keep: Vec<u8> = (0..2)
            .flat_map(|b| {
                let row = (b * HEADS * LENGTH + LENGTH - 1) * LENGTH;
                let row = laid[row..row + LENGTH].to_vec();
                row.into_iter().map(|w| u8::from(w != 0.0))
            })
            .collect();
        let counts: Vec<usize> = keep
            .chunks(LENGTH)
            .map(|row| row.iter().map(|&k| usize::from(k)).sum())
            .collect();
        assert_eq!(counts, [3, 3]);
        if causal {
            assert!(keep[0] == 1 && keep[LENGTH] == 1);
        }
        let keep = Tensor::from_vec(keep, (2, LENGTH), &Device::Cpu).unwrap();
        let all = SubsampledSpec {
            keep: 1.0,
            ..spec.clone()
        };
        // All of the real ones, which are those that were drawn.
        let how = How {
            keep: Some(&keep),
            ..how
        };
        let expected = mixing(&all, [&q, &k], how).mix(&v).unwrap();
        // Rows of queries that are pads there are not compared.
        let found = sampled.mix(&v).unwrap();
        let real = values(&keep.to_dtype(DType::F64).unwrap());
        let rows = [found, expected].map(|y| values(&y));
        for (index, (a, b)) in rows[0].iter().zip(&rows[1]).enumerate() {
            let (b_, token) = (index / (HEADS * LENGTH * HEAD), index / HEAD % LENGTH);
            if real[b_ * LENGTH + token] > 0.0 {
                assert!((a - b).abs() < 1e-12, "{}", inner.kind());
            }
        }
    }
}
