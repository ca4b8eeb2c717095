//! LION: its forms equal each other and the mask multiplied out, and the mask is what it should be.

use super::{Given, heads, mixing, module, parameters, run, with};
use crate::common;
use crate::common::{Map, assert_near, difference, random, tensor, values};
use lapidary_kernels::{DType, Device, Tensor, Var};
use lapidary_parts::attention::mechanism::lion::{Curve, LionDecay, LionForm, LionImage, LionSpec};
use lapidary_parts::attention::mechanism::{Describe, Resumed};
use lapidary_parts::state::MixerState;

const DECAYS: [LionDecay; 3] = [LionDecay::None, LionDecay::Constant, LionDecay::Selective];
const FORMS: [LionForm; 5] = [
    LionForm::Parallel,
    LionForm::Recurrent,
    LionForm::Chunked { size: 3 },
    LionForm::Chunked { size: 7 },
    LionForm::Chunked { size: 64 },
];

fn spec(decay: LionDecay) -> LionSpec {
    LionSpec {
        decay,
        ..LionSpec::default()
    }
}

fn on_image(decay: LionDecay, columns: usize, curves: &[Curve]) -> LionSpec {
    LionSpec {
        image: Some(LionImage {
            columns,
            curves: curves.to_vec(),
        }),
        ..spec(decay)
    }
}

impl Given {
    fn ordered(&self, order: &[usize]) -> Self {
        self.each(|x, dim| ordered(x, dim, order))
    }
}

fn ordered(x: &Tensor, dim: usize, order: &[usize]) -> Tensor {
    let order: Vec<u32> = order.iter().map(|at| *at as u32).collect();
    let order = Tensor::from_vec(order.clone(), order.len(), &Device::Cpu).unwrap();
    x.index_select(&order, dim).unwrap()
}

fn weights(spec: &LionSpec, map: &Map, given: &Given) -> Tensor {
    mixing(spec, false, map, given).weights(&given.v).unwrap()
}

/// `λ` by batch, head and token, for the first curve.
fn decays(spec: &LionSpec, map: &Map, given: &Given) -> Vec<f64> {
    let (batch, length, width) = given.tokens.dims3().unwrap();
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    let tokens = values(&given.tokens);
    let mut all = Vec::new();
    for b in 0..batch {
        for h in 0..2 {
            for t in 0..length {
                all.push(match spec.decay {
                    LionDecay::None => 1.0,
                    LionDecay::Constant => sigmoid(values(&map["decay"])[h]),
                    LionDecay::Selective => {
                        let weight = values(&map["decay.weight"]);
                        let logit: f64 = (0..width)
                            .map(|f| weight[h * width + f] * tokens[(b * length + t) * width + f])
                            .sum();
                        1.0 - sigmoid(logit + values(&map["decay.bias"])[h])
                    }
                });
            }
        }
    }
    all
}

/// `M_ij` as the product it stands for.
fn mask(decays: &[f64], i: usize, j: usize) -> f64 {
    if i >= j {
        decays[j..i].iter().product()
    } else {
        decays[i + 1..=j].iter().product()
    }
}

fn features(decay: LionDecay, x: &[f64]) -> Vec<f64> {
    let silu = |z: &f64| z / (1.0 + (-z).exp()) + 0.5;
    match decay {
        LionDecay::None => {
            let elu = |z: &f64| if *z > 0.0 { z + 1.0 } else { z.exp() };
            x.iter().map(elu).collect()
        }
        _ => {
            let norm = x.iter().map(|z| silu(z).powi(2)).sum::<f64>().sqrt();
            x.iter().map(|z| silu(z) / norm).collect()
        }
    }
}

/// The definition, with every weight multiplied out; `sees` keeps pairs.
fn brute_force(
    spec: &LionSpec,
    map: &Map,
    given: &Given,
    sees: impl Fn(usize, usize) -> bool,
) -> Tensor {
    let (batch, heads, length, width) = given.q.dims4().unwrap();
    let value_width = given.v.dim(3).unwrap();
    let (q, k, v) = (values(&given.q), values(&given.k), values(&given.v));
    let decays = decays(spec, map, given);
    let mut output = Vec::new();
    for head in 0..batch * heads {
        let decays = &decays[head * length..(head + 1) * length];
        let row = |x: &[f64], at: usize, width: usize| {
            x[(head * length + at) * width..][..width].to_vec()
        };
        for i in 0..length {
            let query = features(spec.decay, &row(&q, i, width));
            let (mut sum, mut total) = (vec![0.0; value_width], 1e-6);
            for j in (0..length).filter(|j| sees(i, *j)) {
                let key = features(spec.decay, &row(&k, j, width));
                let score: f64 = query.iter().zip(&key).map(|(a, b)| a * b).sum();
                let weight = mask(decays, i, j) * score;
                total += weight;
                for (sum, v) in sum.iter_mut().zip(row(&v, j, value_width)) {
                    *sum += weight * v;
                }
            }
            output.extend(sum.into_iter().map(|sum| sum / total));
        }
    }
    tensor(output, &[batch, heads, length, value_width])
}

#[test]
fn parallel_recurrent_and_chunked_forms_equal_the_definition() {
    for decay in DECAYS {
        for length in [1, 7, 10] {
            let given = Given::new(2, length);
            let map = parameters(&spec(decay));
            let expected = brute_force(&spec(decay), &map, &given, |_, _| true);
            for form in FORMS {
                let spec = LionSpec {
                    form,
                    ..spec(decay)
                };
                let what = format!("{decay:?} {form:?} of {length}");
                assert_near(&run(&spec, false, &map, &given), &expected, 1e-13, &what);

                let single = |x: &Tensor| x.to_dtype(DType::F32).unwrap();
                let map: Map = map.iter().map(|(n, t)| (n.clone(), single(t))).collect();
                let given = given.each(|x, _| single(x));
                let found = run(&spec, false, &map, &given);
                let found = found.to_dtype(DType::F64).unwrap();
                assert_near(&found, &expected, 1e-5, &what);
            }
        }
    }
}

#[test]
fn forms_agree_on_images_with_a_class_token() {
    for decay in DECAYS {
        for class_token in [false, true] {
            let base = LionSpec {
                class_token,
                ..on_image(decay, 4, &[Curve::Rows, Curve::Columns])
            };
            let map = parameters(&base);
            // The last row is short.
            let given = Given::new(2, 11);
            let of = |form| {
                let spec = LionSpec {
                    form,
                    ..base.clone()
                };
                run(&spec, false, &map, &given)
            };
            let expected = of(LionForm::Parallel);
            for form in FORMS {
                assert_near(&of(form), &expected, 1e-13, &format!("{decay:?} {form:?}"));
            }
        }
    }
}

#[test]
fn without_decay_every_token_counts_wherever_it_stands() {
    let given = Given::new(1, 6);
    let order = [3, 0, 5, 2, 1, 4];
    let map = Map::new();
    for form in FORMS {
        let spec = LionSpec {
            form,
            ..spec(LionDecay::None)
        };
        let y = run(&spec, false, &map, &given);
        let moved = run(&spec, false, &map, &given.ordered(&order));
        assert_near(&moved, &ordered(&y, 2, &order), 1e-14, "permuted tokens");
    }
}

fn constant(logit: f64) -> Map {
    Map::from([("decay".to_owned(), tensor(vec![logit; 2], &[1, 2]))])
}

#[test]
fn a_decay_of_one_forgets_nothing_and_one_of_zero_everything_else() {
    let given = Given::new(2, 9);
    let spec = spec(LionDecay::Constant);
    // The same features without a mask.
    let undecayed = brute_force(&spec, &constant(f64::INFINITY), &given, |_, _| true);
    let none = run(&spec, false, &constant(40.0), &given);
    assert_near(&none, &undecayed, 1e-12, "no decay");
    let all = run(&spec, false, &constant(-60.0), &given);
    assert_near(&all, &given.v, 1e-5, "only itself");
}

#[test]
fn a_selective_decay_that_looks_at_nothing_is_a_constant_one() {
    let given = Given::new(2, 9);
    let selective = Map::from([
        ("decay.weight".to_owned(), tensor(vec![0.0; 16], &[2, 8])),
        ("decay.bias".to_owned(), tensor(vec![-1.3; 2], &[2])),
    ]);
    assert_near(
        &run(&spec(LionDecay::Selective), false, &selective, &given),
        &run(&spec(LionDecay::Constant), false, &constant(1.3), &given),
        1e-14,
        "the same decay",
    );
}

/// Queries and keys that are zero have the feature product 1, so that a weight over that of the
/// position itself is the mask alone.
fn bare_mask(spec: &LionSpec, map: &Map, given: &Given) -> Vec<Vec<f64>> {
    let nothing = Given {
        q: given.q.zeros_like().unwrap(),
        k: given.k.zeros_like().unwrap(),
        ..given.clone()
    };
    let weights = weights(spec, map, &nothing);
    let length = weights.dim(3).unwrap();
    let rows = values(&weights);
    let rows = rows.chunks(length).enumerate();
    rows.map(|(i, row)| row.iter().map(|w| w / row[i % length]).collect())
        .collect()
}

#[test]
fn the_mask_is_the_product_of_decays_and_symmetric_when_they_are_equal() {
    let given = Given::new(2, 8);
    for decay in DECAYS {
        for form in FORMS {
            let spec = LionSpec {
                form,
                ..spec(decay)
            };
            let map = parameters(&spec);
            let decays = decays(&spec, &map, &given);
            let found = bare_mask(&spec, &map, &given);
            let mut asymmetry = 0f64;
            for (head, decays) in decays.chunks(8).enumerate() {
                for i in 0..8 {
                    for j in 0..8 {
                        let value = found[head * 8 + i][j];
                        assert!((value - mask(decays, i, j)).abs() < 1e-13);
                        asymmetry = asymmetry.max((value - found[head * 8 + j][i]).abs());
                    }
                }
            }
            assert_eq!(
                asymmetry > 1e-3,
                decay == LionDecay::Selective,
                "{decay:?}: {asymmetry}"
            );
        }
    }
}

/// On a path graph, multiplication by `f(distance)` with `f(x) = λ^x`.
#[test]
fn a_constant_decay_is_a_function_of_the_distance_on_a_path() {
    let given = Given::new(1, 12);
    let decay = 1.0 / (1.0 + (-0.8f64).exp());
    let found = bare_mask(&spec(LionDecay::Constant), &constant(0.8), &given);
    for (row, found) in found.iter().enumerate() {
        let i = row % 12;
        for (j, value) in found.iter().enumerate() {
            assert!((value - decay.powi(i.abs_diff(j) as i32)).abs() < 1e-13);
        }
    }
}

#[test]
fn outputs_lie_in_the_convex_hull_of_the_values() {
    let given = Given::new(2, 20);
    for decay in DECAYS {
        for form in FORMS {
            let spec = LionSpec {
                form,
                ..spec(decay)
            };
            let weights = weights(&spec, &parameters(&spec), &given);
            assert!(values(&weights).iter().all(|weight| *weight >= 0.0));
            for sum in values(&weights.sum(3).unwrap()) {
                assert!(sum <= 1.0 + 1e-12 && sum > 1.0 - 1e-5, "{sum}");
            }
        }
    }
}

#[test]
fn reversed_tokens_give_reversed_outputs() {
    let given = Given::new(2, 9);
    let order: Vec<usize> = (0..9).rev().collect();
    for decay in [LionDecay::Constant, LionDecay::Selective] {
        let spec = spec(decay);
        let map = parameters(&spec);
        let y = run(&spec, false, &map, &given);
        let reversed = run(&spec, false, &map, &given.ordered(&order));
        assert_near(&reversed, &ordered(&y, 2, &order), 1e-13, "reversed");
    }
}

#[test]
fn one_curve_of_one_row_is_the_order_of_the_tokens() {
    let given = Given::new(2, 9);
    for decay in DECAYS {
        let plain = spec(decay);
        let map = parameters(&plain);
        let curve = on_image(decay, 9, &[Curve::Rows]);
        assert_near(
            &run(&curve, false, &map, &given),
            &run(&plain, false, &map, &given),
            1e-14,
            "one row",
        );
        // One row is as many columns of one, too.
        let curve = on_image(decay, 9, &[Curve::Columns]);
        assert_near(
            &run(&curve, false, &map, &given),
            &run(&plain, false, &map, &given),
            1e-14,
            "columns of one",
        );
    }
}

/// Each curve alone is the plain mask in its order; together they are averaged.
#[test]
fn two_curves_average_the_masks_of_each() {
    let given = Given::new(1, 12);
    let map = Map::from([(
        "decay".to_owned(),
        tensor(vec![0.4, 1.1, -0.3, 0.7], &[2, 2]),
    )]);
    let spec = on_image(LionDecay::Constant, 4, &[Curve::Rows, Curve::Columns]);
    let found = bare_mask(&spec, &map, &given);
    let place = |curve: Curve| {
        let mut places = vec![0; 12];
        for (place, patch) in curve.order(12, 4).into_iter().enumerate() {
            places[patch] = place;
        }
        places
    };
    let (rows, columns) = (place(Curve::Rows), place(Curve::Columns));
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    for (head, logits) in [(0, [0.4, -0.3]), (1, [1.1, 0.7])] {
        for i in 0..12 {
            for j in 0..12 {
                let along = |places: &[usize], logit: f64| {
                    sigmoid(logit).powi(places[i].abs_diff(places[j]) as i32)
                };
                let mean = (along(&rows, logits[0]) + along(&columns, logits[1])) / 2.0;
                assert!((found[head * 12 + i][j] - mean).abs() < 1e-13);
            }
        }
    }
}

#[test]
fn curves_visit_every_patch_once_and_step_to_a_neighbour() {
    for (rows, columns) in [(1, 1), (1, 7), (7, 1), (3, 5), (4, 4), (8, 6)] {
        for curve in [Curve::Rows, Curve::Columns] {
            let order = curve.order(rows * columns, columns);
            let mut visited = order.clone();
            visited.sort_unstable();
            assert!(visited.into_iter().eq(0..rows * columns));
            for step in order.windows(2) {
                let [(r, c), (s, d)] = [step[0], step[1]].map(|at| (at / columns, at % columns));
                assert_eq!(
                    r.abs_diff(s) + c.abs_diff(d),
                    1,
                    "{curve:?} {rows}x{columns}"
                );
            }
        }
    }
    let mut short = Curve::Columns.order(11, 4);
    short.sort_unstable();
    assert!(short.into_iter().eq(0..11));
}

#[test]
fn a_causal_mask_leaves_the_past_alone() {
    let given = Given::new(2, 9);
    for decay in DECAYS {
        let spec = spec(decay);
        let map = parameters(&spec);
        let expected = brute_force(&spec, &map, &given, |i, j| j <= i);
        let found = run(&spec, true, &map, &given);
        assert_near(&found, &expected, 1e-13, "the past");
    }
}

/// A state of `features · (value_width + 1)` numbers for each head, however many tokens.
#[test]
fn the_decode_state_does_not_grow() {
    let given = Given::new(2, 9);
    for decay in DECAYS {
        let spec = spec(decay);
        let map = parameters(&spec);
        let module = module(&spec, true, &map);
        let mut state = MixerState::Empty;
        let whole = run(&spec, true, &map, &given);
        for t in 0..9 {
            let one = given.each(|x, dim| x.narrow(dim, t, 1).unwrap().contiguous().unwrap());
            let resumed = with(&one, None, |pass| {
                module.resume(&one.q, &one.k, &one.v, &mut state, pass)
            })
            .unwrap();
            let Resumed::Summed { mixing, past } = resumed else {
                panic!("values of earlier tokens are not kept");
            };
            let y = (mixing.mix(&one.v).unwrap() + past).unwrap();
            let expected = whole.narrow(2, t, 1).unwrap();
            assert_near(&y, &expected, 1e-12, "a step");
            let MixerState::Sums { sums, .. } = &state else {
                panic!("another state");
            };
            assert_eq!(sums.dims(), [2, 2, 4, 4]);
        }
    }
}

#[test]
fn a_class_token_does_not_decay() {
    let given = Given::new(1, 8);
    let spec = LionSpec {
        class_token: true,
        ..spec(LionDecay::Constant)
    };
    let found = bare_mask(&spec, &constant(-1.0), &given);
    let decay = 1.0 / (1.0 + 1f64.exp());
    for (i, row) in found.iter().enumerate().take(8).skip(1) {
        // λ_0 … λ_{i−1} with λ_0 = 1, and λ_1 … λ_i.
        assert!((row[0] - decay.powi(i as i32 - 1)).abs() < 1e-12);
        assert!((found[0][i] - decay.powi(i as i32)).abs() < 1e-12);
    }
}

/// It stands before the first patch of each curve.
#[test]
fn a_class_token_is_first_on_every_curve() {
    let given = Given::new(1, 13);
    let map = Map::from([(
        "decay".to_owned(),
        tensor(vec![0.4, 1.1, -0.3, 0.7], &[2, 2]),
    )]);
    let curves = [Curve::Rows, Curve::Columns];
    let places = curves.map(|curve| {
        let mut places = vec![0; 13];
        for (place, patch) in curve.order(12, 4).into_iter().enumerate() {
            places[1 + patch] = 1 + place;
        }
        places
    });
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    for form in FORMS {
        let spec = LionSpec {
            form,
            class_token: true,
            ..on_image(LionDecay::Constant, 4, &curves)
        };
        let found = bare_mask(&spec, &map, &given);
        for (head, logits) in [(0, [0.4, -0.3]), (1, [1.1, 0.7])] {
            for i in 0..13 {
                for j in 0..13 {
                    let along = |places: &[usize], logit: f64| {
                        // What patches see of it has not passed its own λ, which is one.
                        let free = usize::from(i > 0 && j == 0);
                        let steps = places[i].abs_diff(places[j]) - free;
                        sigmoid(logit).powi(steps as i32)
                    };
                    let mean = (along(&places[0], logits[0]) + along(&places[1], logits[1])) / 2.0;
                    let found = found[head * 13 + i][j];
                    assert!((found - mean).abs() < 1e-12, "{form:?}: {i} of {j}");
                }
            }
        }
    }
}

#[test]
fn pads_neither_decay_nor_count() {
    let given = Given::new(1, 6);
    let junk = Given {
        q: random(&[1, 2, 2, 4], 11),
        k: random(&[1, 2, 2, 4], 12),
        v: random(&[1, 2, 2, 3], 13),
        tokens: random(&[1, 2, 8], 14),
    };
    let join = |a: &Given, b: &Given| Given {
        q: Tensor::cat(&[&a.q, &b.q], 2).unwrap(),
        k: Tensor::cat(&[&a.k, &b.k], 2).unwrap(),
        v: Tensor::cat(&[&a.v, &b.v], 2).unwrap(),
        tokens: Tensor::cat(&[&a.tokens, &b.tokens], 1).unwrap(),
    };
    let (right, left) = (join(&given, &junk), join(&junk, &given));
    let keep = |row: [u8; 8]| Tensor::from_vec(row.to_vec(), (1, 8), &Device::Cpu).unwrap();
    for decay in DECAYS {
        for form in FORMS {
            let both = [Curve::Rows, Curve::Columns];
            let with_class_token = LionSpec {
                class_token: true,
                ..spec(decay)
            };
            for spec in [spec(decay), with_class_token, on_image(decay, 3, &both)] {
                let spec = LionSpec { form, ..spec };
                let map = parameters(&spec);
                let alone = run(&spec, false, &map, &given);
                let module = module(&spec, false, &map);
                let padded = |given: &Given, keep: &Tensor, start: usize| {
                    let mixing = with(given, Some(keep), |pass| {
                        module.mixing(&given.q, &given.k, pass)
                    });
                    let y = mixing.unwrap().mix(&given.v).unwrap();
                    y.narrow(2, start, 6).unwrap()
                };
                let found = padded(&right, &keep([1, 1, 1, 1, 1, 1, 0, 0]), 0);
                assert_near(&found, &alone, 1e-13, "pads behind");
                if spec.image.is_none() && !spec.class_token {
                    let found = padded(&left, &keep([0, 0, 1, 1, 1, 1, 1, 1]), 2);
                    assert_near(&found, &alone, 1e-13, "pads before");
                }
            }
        }
    }
}

/// Products of decays leave every floating-point range; their logarithms do not.
#[test]
fn long_sequences_with_strong_decay_stay_finite() {
    let length = 16_384;
    let given = Given {
        q: random(&[1, 2, length, 4], 1),
        k: random(&[1, 2, length, 4], 2),
        v: random(&[1, 2, length, 1], 3),
        tokens: random(&[1, length, 8], 4),
    }
    .each(|x, _| x.to_dtype(DType::F32).unwrap());
    let logits = Tensor::zeros((1, 2), DType::F32, &Device::Cpu).unwrap();
    let logits = Var::from_tensor(&logits).unwrap();
    let map = Map::from([("decay".to_owned(), logits.as_tensor().clone())]);
    let y = run(&spec(LionDecay::Constant), false, &map, &given);
    assert!(common::is_finite(&y));
    let gradients = y.sum_all().unwrap().backward().unwrap();
    assert!(common::is_finite(gradients.get(&logits).unwrap()));
    // A window of a hundred positions is all that counts anywhere.
    let middle = given.each(|x, dim| x.narrow(dim, 8000, 201).unwrap().contiguous().unwrap());
    let near = run(&spec(LionDecay::Constant), false, &map, &middle);
    let found = y.narrow(2, 8100, 1).unwrap();
    assert!(difference(&found, &near.narrow(2, 100, 1).unwrap()) < 1e-5);
}

#[test]
fn work_grows_linearly_unless_the_mask_is_laid_out() {
    let exponent = |spec: &LionSpec, causal: bool| {
        let map = parameters(spec);
        let work = |length: usize| {
            let given = Given::new(1, length);
            mixing(spec, causal, &map, &given).operations(3) as f64
        };
        (
            (work(1024) / work(256)).log2() / 2.0,
            (work(512) / work(256)).log2(),
        )
    };
    for decay in DECAYS {
        for (form, claimed) in [
            (LionForm::Parallel, 2.0),
            (LionForm::Recurrent, 1.0),
            (LionForm::Chunked { size: 64 }, 1.0),
        ] {
            let spec = LionSpec {
                form,
                ..on_image(decay, 16, &[Curve::Rows, Curve::Columns])
            };
            let (four, two) = exponent(&spec, false);
            assert!(
                (four - claimed).abs() < 0.1 && (two - claimed).abs() < 0.1,
                "{form:?}"
            );
        }
        let (four, _) = exponent(&spec(decay), true);
        assert!((four - 1.0).abs() < 0.1);
    }
}

#[test]
fn impossible_specs_are_refused() {
    let refused =
        |spec: LionSpec, causal: bool| spec.validate(&heads(causal), "m").unwrap_err().to_string();
    assert_eq!(
        refused(
            LionSpec {
                form: LionForm::Chunked { size: 0 },
                ..LionSpec::default()
            },
            false
        ),
        "m.form.size is 0, but must be between 1 and 65536"
    );
    assert_eq!(
        refused(
            LionSpec {
                class_token: true,
                ..LionSpec::default()
            },
            true
        ),
        "m.class_token is true, but must be false in causal attention, where the first token sees \
         itself alone"
    );
    let rows = on_image(LionDecay::None, 0, &[Curve::Rows]);
    assert_eq!(
        refused(rows.clone(), false),
        "m.image.columns is 0, but must be between 1 and 65536"
    );
    assert_eq!(
        refused(rows, true),
        "m.image is \"given\", but must be absent in causal attention, which has one order"
    );
    assert_eq!(
        refused(
            on_image(LionDecay::None, 2, &[Curve::Rows, Curve::Rows]),
            false
        ),
        "m.image.curves is [\"rows\", \"rows\"], but must be rows, columns or both, each once"
    );
}
