//! LION where every feature of a key fades by itself, against every weight multiplied out.

use super::{FEATURES, Given, HEADS, WIDTH, heads, mixing, module, parameters, run, with};
use crate::common;
use crate::common::{Map, assert_near, difference, tensor, values};
use lapidary_kernels::{DType, Device, Tensor, Var};
use lapidary_parts::attention::mechanism::lion::{Curve, LionDecay, LionForm, LionImage, LionSpec};
use lapidary_parts::attention::mechanism::{Describe, Resumed};
use lapidary_parts::state::MixerState;

const DECAYS: [LionDecay; 2] = [LionDecay::Constant, LionDecay::Selective];
const FORMS: [LionForm; 5] = [
    LionForm::Recurrent,
    LionForm::Chunked { size: 2 },
    LionForm::Chunked { size: 3 },
    LionForm::Chunked { size: 8 },
    LionForm::Chunked { size: 64 },
];

fn spec(decay: LionDecay, form: LionForm) -> LionSpec {
    LionSpec {
        decay,
        form,
        per_feature: true,
        ..LionSpec::default()
    }
}

impl Given {
    fn part(&self, start: usize, count: usize) -> Self {
        self.each(|x, dim| x.narrow(dim, start, count).unwrap().contiguous().unwrap())
    }
}

/// `λ` of a feature of a head at a token.
fn decay(map: &Map, given: &Given, [b, head, t, feature]: [usize; 4]) -> f64 {
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    let row = head * FEATURES + feature;
    if let Some(logits) = map.get("decay") {
        return sigmoid(values(logits)[row]);
    }
    let (weight, bias) = (values(&map["decay.weight"]), values(&map["decay.bias"]));
    let length = given.tokens.dim(1).unwrap();
    let token = &values(&given.tokens)[(b * length + t) * WIDTH..][..WIDTH];
    let logit: f64 = weight[row * WIDTH..]
        .iter()
        .zip(token)
        .map(|(w, x)| w * x)
        .sum();
    1.0 - sigmoid(logit + bias[row])
}

fn features(x: &[f64]) -> Vec<f64> {
    let silu = |z: &f64| z / (1.0 + (-z).exp()) + 0.5;
    let norm = x.iter().map(|z| silu(z).powi(2)).sum::<f64>().sqrt();
    x.iter().map(|z| silu(z) / norm).collect()
}

/// The definition, feature by feature.
fn brute_force(map: &Map, given: &Given, causal: bool) -> Tensor {
    let (batch, _, length, _) = given.q.dims4().unwrap();
    let rows = |x: &Tensor| -> Vec<Vec<f64>> {
        let width = x.dim(3).unwrap();
        values(x).chunks(width).map(<[f64]>::to_vec).collect()
    };
    let (q, k, v) = (rows(&given.q), rows(&given.k), rows(&given.v));
    let mut output = Vec::new();
    for (b, head) in (0..batch).flat_map(|b| (0..HEADS).map(move |head| (b, head))) {
        let decays: Vec<Vec<f64>> = (0..FEATURES)
            .map(|f| {
                (0..length)
                    .map(|t| decay(map, given, [b, head, t, f]))
                    .collect()
            })
            .collect();
        let first = (b * HEADS + head) * length;
        for i in 0..length {
            let query = features(&q[first + i]);
            let (mut sum, mut total) = (vec![0.0; 3], 1e-6);
            for j in (0..length).filter(|j| !causal || *j <= i) {
                let key = features(&k[first + j]);
                let weight: f64 = (0..FEATURES)
                    .map(|f| {
                        let between = if i >= j {
                            &decays[f][j..i]
                        } else {
                            &decays[f][i + 1..=j]
                        };
                        query[f] * key[f] * between.iter().product::<f64>()
                    })
                    .sum();
                total += weight;
                for (sum, v) in sum.iter_mut().zip(&v[first + j]) {
                    *sum += weight * v;
                }
            }
            output.extend(sum.into_iter().map(|sum| sum / total));
        }
    }
    tensor(output, &[batch, HEADS, length, 3])
}

#[test]
fn every_form_equals_the_definition() {
    for decay in DECAYS {
        for length in [1, 2, 7, 21] {
            let given = Given::new(2, length);
            let map = parameters(&spec(decay, FORMS[0]));
            for causal in [false, true] {
                let expected = brute_force(&map, &given, causal);
                for form in FORMS {
                    let spec = spec(decay, form);
                    let what = format!("{decay:?} {form:?} of {length}, causal {causal}");
                    assert_near(&run(&spec, causal, &map, &given), &expected, 1e-13, &what);

                    let single = |x: &Tensor| x.to_dtype(DType::F32).unwrap();
                    let map: Map = map.iter().map(|(n, t)| (n.clone(), single(t))).collect();
                    let found = run(&spec, causal, &map, &given.each(|x, _| single(x)));
                    let found = found.to_dtype(DType::F64).unwrap();
                    assert_near(&found, &expected, 1e-5, &what);
                }
            }
        }
    }
}

/// Features that fade alike are one decay for the head.
#[test]
fn equal_decays_are_those_of_a_head() {
    let given = Given::new(2, 9);
    let logits = [0.3, -1.1];
    let each: Vec<f64> = logits.iter().flat_map(|a| [*a; FEATURES]).collect();
    let by_feature = Map::from([("decay".to_owned(), tensor(each, &[1, HEADS, FEATURES]))]);
    let by_head = Map::from([("decay".to_owned(), tensor(logits.to_vec(), &[1, HEADS]))]);
    for causal in [false, true] {
        for form in FORMS {
            let spec = spec(LionDecay::Constant, form);
            let alike = LionSpec {
                per_feature: false,
                ..spec.clone()
            };
            assert_near(
                &run(&spec, causal, &by_feature, &given),
                &run(&alike, causal, &by_head, &given),
                1e-13,
                &format!("{form:?}"),
            );
        }
    }
}

#[test]
fn reversed_tokens_give_reversed_outputs() {
    let given = Given::new(2, 9);
    let order = Tensor::new(&[8u32, 7, 6, 5, 4, 3, 2, 1, 0], &Device::Cpu).unwrap();
    let turned = |x: &Tensor, dim: usize| x.index_select(&order, dim).unwrap();
    for decay in DECAYS {
        let spec = spec(decay, LionForm::default());
        let map = parameters(&spec);
        let y = run(&spec, false, &map, &given);
        let reversed = run(&spec, false, &map, &given.each(turned));
        assert_near(&reversed, &turned(&y, 2), 1e-13, "reversed");
    }
}

/// Curves on an image: each is the sequence in its order, and numerators and denominators of both
/// are added before the one is divided by the other.
#[test]
fn curves_share_one_denominator() {
    let (columns, length) = (4, 11);
    let given = Given::new(1, length);
    let curves = vec![Curve::Rows, Curve::Columns];
    for decay in DECAYS {
        for form in FORMS {
            let both = LionSpec {
                image: Some(LionImage {
                    columns,
                    curves: curves.clone(),
                }),
                ..spec(decay, form)
            };
            let map = parameters(&both);
            let found = mixing(&both, false, &map, &given)
                .weights(&given.v)
                .unwrap();
            // Weights of each curve alone, by what is its own of the parameters, unnormalised: over
            // the weight of a position itself, which is the same on every curve.
            let bare = |curve: usize| {
                let own: Map = map
                    .iter()
                    .map(|(name, x)| {
                        let count = x.dim(0).unwrap() / 2;
                        (name.clone(), x.narrow(0, curve * count, count).unwrap())
                    })
                    .collect();
                let order = curves[curve].order(length, columns);
                let along: Vec<u32> = order.iter().map(|at| *at as u32).collect();
                let along = Tensor::from_vec(along, length, &Device::Cpu).unwrap();
                let moved = given.each(|x, dim| x.index_select(&along, dim).unwrap());
                let weights = mixing(&spec(decay, form), false, &own, &moved);
                let weights = values(&weights.weights(&moved.v).unwrap());
                let mut bare = vec![0.0; HEADS * length * length];
                for head in 0..HEADS {
                    for (i, &to) in order.iter().enumerate() {
                        let row = &weights[(head * length + i) * length..][..length];
                        for (j, &from) in order.iter().enumerate() {
                            bare[(head * length + to) * length + from] = row[j] / row[i];
                        }
                    }
                }
                bare
            };
            let (rows, columns) = (bare(0), bare(1));
            for (at, found) in values(&found).chunks(length).enumerate() {
                for (j, weight) in found.iter().enumerate() {
                    let mean = (rows[at * length + j] + columns[at * length + j]) / 2.0;
                    assert!((weight / found[at % length] - mean).abs() < 1e-11);
                }
            }
        }
    }
}

/// A state of `features · (value_width + 1)` numbers for each head, and the decays that follow.
#[test]
fn decoding_keeps_a_decay_for_each_feature() {
    let given = Given::new(2, 9);
    for decay in DECAYS {
        let spec = spec(decay, LionForm::default());
        let map = parameters(&spec);
        let module = module(&spec, true, &map);
        let whole = run(&spec, true, &map, &given);
        for steps in [&[1; 9][..], &[4, 1, 4]] {
            let (mut state, mut start) = (MixerState::Empty, 0);
            for &count in steps {
                let some = given.part(start, count);
                let resumed = with(&some, None, |pass| {
                    module.resume(&some.q, &some.k, &some.v, &mut state, pass)
                });
                let Resumed::Summed { mixing, past } = resumed.unwrap() else {
                    panic!("values of earlier tokens are not kept");
                };
                let y = (mixing.mix(&some.v).unwrap() + past).unwrap();
                assert_near(&y, &whole.narrow(2, start, count).unwrap(), 1e-12, "a step");
                let MixerState::Sums { sums, decay } = &state else {
                    panic!("another state");
                };
                assert_eq!(sums.dims(), [2, HEADS, FEATURES, 4]);
                assert_eq!(decay.as_ref().unwrap().dims(), [2, HEADS, 1, FEATURES]);
                start += count;
            }
        }
    }
}

/// Some features forget everything at once and others almost nothing: quotients of products of decays
/// would leave every floating-point range.
#[test]
fn strong_decays_beside_weak_ones_stay_finite() {
    let length = 4096;
    let given = Given::new(1, length).each(|x, _| x.to_dtype(DType::F32).unwrap());
    let logits = tensor(
        vec![-30.0, 0.0, -3.0, -1.0, 0.5, -40.0, 0.0, -2.0],
        &[1, HEADS, FEATURES],
    );
    let logits = Var::from_tensor(&logits.to_dtype(DType::F32).unwrap()).unwrap();
    let map = Map::from([("decay".to_owned(), logits.as_tensor().clone())]);
    let spec = spec(LionDecay::Constant, LionForm::default());
    let y = run(&spec, false, &map, &given);
    let gradients = y.sum_all().unwrap().backward().unwrap();
    assert!(common::is_finite(gradients.get(&logits).unwrap()));
    // A window of a hundred positions is all that counts anywhere.
    let middle = given
        .part(2000, 201)
        .each(|x, _| x.to_dtype(DType::F64).unwrap());
    let double = Map::from([("decay".to_owned(), logits.to_dtype(DType::F64).unwrap())]);
    let near = brute_force(&double, &middle, false)
        .narrow(2, 100, 1)
        .unwrap();
    let found = y.narrow(2, 2100, 1).unwrap().to_dtype(DType::F64).unwrap();
    assert!(difference(&found, &near) < 1e-5);
}

#[test]
fn work_grows_linearly_with_the_length() {
    for form in [LionForm::Recurrent, LionForm::default()] {
        let spec = spec(LionDecay::Constant, form);
        let map = parameters(&spec);
        for causal in [false, true] {
            let work = |length: usize| {
                let given = Given::new(1, length);
                mixing(&spec, causal, &map, &given).operations(3) as f64
            };
            let exponent = (work(512) / work(128)).log2() / 2.0;
            assert!((exponent - 1.0).abs() < 0.05, "{form:?}: {exponent}");
        }
    }
}

#[test]
fn what_has_no_mask_and_what_does_not_decay_is_refused() {
    let refused = |spec: LionSpec| spec.validate(&heads(false), "m").unwrap_err().to_string();
    assert_eq!(
        refused(spec(LionDecay::None, LionForm::default())),
        "m.per_feature is true, but must be false where nothing decays"
    );
    assert_eq!(
        refused(spec(LionDecay::Constant, LionForm::Parallel)),
        "m.form.kind is \"parallel\", but must be recurrent or chunked where features decay apart: they \
         have no mask in common"
    );
}
