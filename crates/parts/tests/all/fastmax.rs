//! Fastmax: the factored sums are those of the polynomial, which does what is said of it.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use crate::common;
use crate::common::{Map, assert_near, build, heads, random, tensor, values};
use lapidary_kernels::{DType, Device, Tensor, Var};
use lapidary_parts::attention::mechanism::fastmax::{FastmaxSpec, Normalisation};
use lapidary_parts::attention::mechanism::{Describe, Mechanism, MechanismPass, Resumed};
use lapidary_parts::parameters::{Init, ParameterSource, Parameters};
use lapidary_parts::state::MixerState;
use lapidary_parts::{Context, Error};
use lapidary_signal::{Mixing, Signal, Trace};

const MAX: Normalisation = Normalisation::Max { limit: 0.8 };

fn spec(degree: usize, normalisation: Normalisation) -> FastmaxSpec {
    FastmaxSpec {
        degree,
        normalisation,
        ..FastmaxSpec::default()
    }
}

fn module(spec: &FastmaxSpec, causal: bool, width: usize) -> Box<dyn Mechanism> {
    let heads = heads(2, width, causal);
    spec.validate(&heads, "m").unwrap();
    build(&Map::new(), |p| spec.build(&heads, p)).unwrap()
}

fn mixing_padded(
    spec: &FastmaxSpec,
    causal: bool,
    [q, k]: [&Tensor; 2],
    keep: Option<&Tensor>,
) -> Box<dyn Mixing> {
    let trace = Trace::new();
    let context = Context::new(&trace);
    let pass = MechanismPass {
        path: "m",
        tokens: q,
        keep,
        offset: 0,
        context: &context,
    };
    module(spec, causal, q.dim(3).unwrap())
        .mixing(q, k, &pass)
        .unwrap()
}

fn mixing(spec: &FastmaxSpec, causal: bool, q: &Tensor, k: &Tensor) -> Box<dyn Mixing> {
    mixing_padded(spec, causal, [q, k], None)
}

/// Rows of `x` `[batch, heads, length, width]` as the normalisation leaves them.
fn normalised(x: &Tensor, normalisation: Normalisation) -> Vec<Vec<f64>> {
    let (_, _, length, width) = x.dims4().unwrap();
    let all = values(x);
    let norm = |row: &[f64]| row.iter().map(|x| x * x).sum::<f64>().sqrt();
    let rows: Vec<&[f64]> = all.chunks(width).collect();
    let of_head = |at: usize| &rows[at / length * length..(at / length + 1) * length];
    rows.iter()
        .enumerate()
        .map(|(at, row)| match normalisation {
            Normalisation::None => row.to_vec(),
            Normalisation::Token => {
                let mean = row.iter().sum::<f64>() / width as f64;
                let centred: Vec<f64> = row.iter().map(|x| x - mean).collect();
                centred.iter().map(|x| x / norm(&centred)).collect()
            }
            Normalisation::Max { limit } => {
                let longest = of_head(at).iter().map(|row| norm(row)).fold(0.0, f64::max);
                row.iter().map(|x| limit * x / longest).collect()
            }
        })
        .collect()
}

/// The definition: every score, its polynomial, and rows divided by their sums.
fn brute_force(spec: &FastmaxSpec, causal: bool, [q, k, v]: [&Tensor; 3]) -> Tensor {
    let (batch, heads, queries, _) = q.dims4().unwrap();
    let (keys, value_width) = (k.dim(2).unwrap(), v.dim(3).unwrap());
    let (q, k) = (
        normalised(q, spec.normalisation),
        normalised(k, spec.normalisation),
    );
    let scale = match spec.normalisation {
        Normalisation::None => 0.5,
        _ => 1.0,
    };
    let v = values(v);
    let [a, b, c] = spec.coefficients;
    let c = if spec.degree == 2 { c } else { 0.0 };
    let mut output = Vec::new();
    for head in 0..batch * heads {
        for i in 0..queries {
            let (mut sum, mut total) = (vec![0.0; value_width], 0.0);
            for j in (0..keys).filter(|j| !causal || *j <= i) {
                let pair = q[head * queries + i].iter().zip(&k[head * keys + j]);
                let s = scale * pair.map(|(a, b)| a * b).sum::<f64>() / spec.temperature;
                let weight = a + b * s + c * s * s;
                total += weight;
                let v = &v[(head * keys + j) * value_width..][..value_width];
                for (sum, v) in sum.iter_mut().zip(v) {
                    *sum += weight * v;
                }
            }
            output.extend(sum.into_iter().map(|sum| sum / total));
        }
    }
    tensor(output, &[batch, heads, queries, value_width])
}

fn each(check: impl Fn(&FastmaxSpec, bool)) {
    for degree in [1, 2] {
        for normalisation in [Normalisation::Token, MAX, Normalisation::None] {
            for causal in [false, true] {
                if causal && matches!(normalisation, Normalisation::Max { .. }) {
                    continue;
                }
                let spec = FastmaxSpec {
                    temperature: 1.3,
                    coefficients: [1.2, 0.9, 0.6],
                    ..spec(degree, normalisation)
                };
                check(&spec, causal);
            }
        }
    }
}

#[test]
fn factored_sums_equal_the_definition() {
    each(|spec, causal| {
        // Longer than a chunk.
        let length = 70;
        let q = random(&[2, 2, length, 4], 1);
        let k = random(&[2, 2, length, 4], 2);
        let v = random(&[2, 2, length, 3], 3);
        let found = mixing(spec, causal, &q, &k).mix(&v).unwrap();
        let expected = brute_force(spec, causal, [&q, &k, &v]);
        // Scores of degree one may sum to almost nothing where they are not bounded.
        let delicate = spec.degree == 1 && spec.normalisation == Normalisation::None;
        let tolerance = if delicate { 1e-8 } else { 1e-10 };
        assert_near(&found, &expected, tolerance, &format!("{spec:?} {causal}"));
        if delicate {
            return;
        }
        let [q, k, v] = [q, k, v].map(|x| x.to_dtype(DType::F32).unwrap());
        let found = mixing(spec, causal, &q, &k).mix(&v).unwrap();
        let found = found.to_dtype(DType::F64).unwrap();
        assert_near(&found, &expected, 1e-5, &format!("{spec:?} {causal}"));
    });
}

#[test]
fn rows_of_weights_sum_to_one() {
    each(|spec, causal| {
        let (q, k) = (random(&[1, 2, 12, 4], 1), random(&[1, 2, 12, 4], 2));
        let weights = mixing(spec, causal, &q, &k).weights(&q).unwrap();
        for sum in values(&weights.sum(3).unwrap()) {
            assert!((sum - 1.0).abs() < 1e-9, "{sum}");
        }
    });
}

#[test]
fn weights_are_positive_whatever_the_scores_in_degree_two_and_by_token_in_degree_one() {
    for s in -4000..=4000 {
        let s = f64::from(s) / 100.0;
        assert!(1.0 + s + s * s / 2.0 >= 0.5);
    }
    let (q, k) = (random(&[1, 2, 30, 4], 1), random(&[1, 2, 30, 4], 2));
    let (q, k) = ((q * 6.0).unwrap(), (k * 6.0).unwrap());
    let least = |spec: &FastmaxSpec| {
        let weights = mixing(spec, false, &q, &k).weights(&q).unwrap();
        values(&weights).into_iter().fold(f64::INFINITY, f64::min)
    };
    for normalisation in [Normalisation::Token, MAX, Normalisation::None] {
        assert!(least(&spec(2, normalisation)) > 0.0);
    }
    assert!(least(&spec(1, Normalisation::Token)) >= 0.0);
    assert!(least(&spec(1, MAX)) > 0.0);
    assert!(least(&spec(1, Normalisation::None)) < 0.0);
}

/// `|f′/f| ≤ 1` with equality at 0 and −2, hence `|∂o/∂s_n| ≤ w_n |v_n − o|`, as for softmax.
#[test]
fn the_gradient_of_a_score_is_bounded_as_that_of_softmax() {
    let ratio = |s: f64| ((1.0 + s) / (1.0 + s + s * s / 2.0)).abs();
    for step in -4000..=4000 {
        assert!(ratio(f64::from(step) / 100.0) <= 1.0 + 1e-15);
    }
    assert_eq!((ratio(0.0), ratio(-2.0)), (1.0, 1.0));

    // Heads of one feature: a query of 2 and the scale ½ make a key its score.
    let spec = spec(2, Normalisation::None);
    let q = Tensor::full(2.0, (1, 2, 1, 1), &Device::Cpu).unwrap();
    let k = Var::from_tensor(&(random(&[1, 2, 9, 1], 2) * 3.0).unwrap()).unwrap();
    let v = random(&[1, 2, 9, 1], 3);
    let mixing = mixing(&spec, false, &q, k.as_tensor());
    let y = mixing.mix(&v).unwrap();
    let weights = values(&mixing.weights(&v).unwrap());
    let gradients = y.sum_all().unwrap().backward().unwrap();
    let slopes = values(gradients.get(&k).unwrap());
    let (y, v, k) = (values(&y), values(&v), values(k.as_tensor()));
    let all = slopes.iter().zip(&weights).zip(v.iter().zip(&k));
    for (at, ((slope, weight), (v, k))) in all.enumerate() {
        let distance = (v - y[at / 9]).abs();
        assert!(slope.abs() <= weight * distance * (1.0 + 1e-12));
        let exact = ratio(*k) * weight * distance;
        assert!((slope.abs() - exact).abs() < 1e-12);
    }
}

#[test]
fn small_scores_approach_softmax_with_order_one_more_than_the_degree() {
    let k = random(&[1, 2, 20, 4], 2);
    let v = random(&[1, 2, 20, 3], 3);
    let q = random(&[1, 2, 5, 4], 1);
    for degree in [1, 2] {
        let error = |size: f64| {
            let q = (&q * size).unwrap();
            let spec = spec(degree, Normalisation::None);
            let found = mixing(&spec, false, &q, &k).mix(&v).unwrap();
            let options = lapidary_kernels::AttentionOptions {
                scale: 0.5,
                ..lapidary_kernels::AttentionOptions::new(4)
            };
            let softmax = lapidary_kernels::attention(&q, &k, &v, &options).unwrap();
            common::difference(&found, &softmax)
        };
        let order = (error(1e-2) / error(1e-3)).log10();
        assert!(
            (order - (degree as f64 + 1.0)).abs() < 0.1,
            "{degree}: {order}"
        );
    }
}

#[test]
fn the_order_of_keys_does_not_matter() {
    let order = Tensor::new(&[3u32, 0, 4, 2, 1], &Device::Cpu).unwrap();
    let moved = |x: &Tensor| x.index_select(&order, 2).unwrap();
    let q = random(&[1, 2, 3, 4], 1);
    let (k, v) = (random(&[1, 2, 5, 4], 2), random(&[1, 2, 5, 3], 3));
    each(|spec, causal| {
        if causal {
            return;
        }
        let whole = mixing(spec, false, &q, &k).mix(&v).unwrap();
        let other = mixing(spec, false, &q, &moved(&k)).mix(&moved(&v)).unwrap();
        assert_near(&other, &whole, 1e-12, "permuted keys");
    });
}

/// The constant term counts every key, so that a pad must be taken from the denominator as well.
#[test]
fn pads_count_in_neither_sum() {
    let (q, k) = (random(&[1, 2, 6, 4], 1), random(&[1, 2, 6, 4], 2));
    let v = random(&[1, 2, 6, 3], 3);
    let keep = Tensor::from_vec(vec![1u8, 1, 1, 1, 0, 0], (1, 6), &Device::Cpu).unwrap();
    let short = |x: &Tensor| x.narrow(2, 0, 4).unwrap().contiguous().unwrap();
    each(|spec, causal| {
        // The longest keys are pads.
        let k = Tensor::cat(
            &[&short(&k), &(k.narrow(2, 4, 2).unwrap() * 9.0).unwrap()],
            2,
        )
        .unwrap();
        let padded = mixing_padded(spec, causal, [&q, &k], Some(&keep));
        let weights = padded.weights(&v).unwrap();
        let of_pads = weights.narrow(3, 4, 2).unwrap();
        assert_eq!(values(&of_pads).into_iter().fold(0.0, f64::max), 0.0);
        let found = short(&padded.mix(&v).unwrap());
        let alone = mixing(spec, causal, &short(&q), &short(&k))
            .mix(&short(&v))
            .unwrap();
        assert_near(&found, &alone, 1e-10, &format!("{spec:?}"));
    });
}

/// Queries of another sequence than the keys are measured by their own, whatever is said of the keys there.
#[test]
fn the_longest_query_is_a_real_one_of_its_own_sequence() {
    let (k, v) = (random(&[1, 2, 6, 4], 2), random(&[1, 2, 6, 3], 3));
    let first = |x: &Tensor, count: usize| x.narrow(2, 0, count).unwrap().contiguous().unwrap();
    let of_keys = Tensor::from_vec(vec![1u8, 1, 1, 1, 0, 0], (1, 6), &Device::Cpu).unwrap();
    let memory = Signal::from(random(&[1, 6, 8], 4));
    let trace = Trace::new();
    let spec = spec(2, MAX);
    for length in [5, 6] {
        // The longest comes last, as a real token or as a pad.
        let q = random(&[1, 2, length, 4], 1);
        let last = (q.narrow(2, length - 1, 1).unwrap() * 9.0).unwrap();
        let q = Tensor::cat(&[&first(&q, length - 1), &last], 2).unwrap();
        for real in [length, length - 1] {
            let own: Vec<u8> = (0..length).map(|at| u8::from(at < real)).collect();
            let own = Tensor::from_vec(own, (1, length), &Device::Cpu).unwrap();
            let context = Context {
                key_padding: (real < length).then_some(&own),
                memory: Some((&memory, Some(&of_keys))),
                ..Context::new(&trace)
            };
            let pass = MechanismPass {
                path: "m",
                tokens: &q,
                keep: Some(&of_keys),
                offset: 0,
                context: &context,
            };
            let mixing = module(&spec, false, 4).mixing(&q, &k, &pass).unwrap();
            let found = first(&mixing.mix(&v).unwrap(), real);
            let expected = brute_force(
                &spec,
                false,
                [&first(&q, real), &first(&k, 4), &first(&v, 4)],
            );
            assert_near(&found, &expected, 1e-10, &format!("{real} of {length}"));
        }
    }
}

#[test]
fn decoding_keeps_a_state_of_the_monomials() {
    for (degree, monomials) in [(1, 1 + 4), (2, 1 + 4 + 10)] {
        let spec = spec(degree, Normalisation::Token);
        let (q, k) = (random(&[1, 2, 9, 4], 1), random(&[1, 2, 9, 4], 2));
        let v = random(&[1, 2, 9, 3], 3);
        let whole = mixing(&spec, true, &q, &k).mix(&v).unwrap();
        let module = module(&spec, true, 4);
        let trace = Trace::new();
        let context = Context::new(&trace);
        let mut state = MixerState::Empty;
        for t in 0..9 {
            let one = |x: &Tensor| x.narrow(2, t, 1).unwrap().contiguous().unwrap();
            let (q, k, v) = (one(&q), one(&k), one(&v));
            let pass = MechanismPass {
                path: "m",
                tokens: &q,
                keep: None,
                offset: t,
                context: &context,
            };
            let resumed = module.resume(&q, &k, &v, &mut state, &pass).unwrap();
            let Resumed::Summed { mixing, past } = resumed else {
                panic!("values of earlier tokens are not kept");
            };
            let y = (mixing.mix(&v).unwrap() + past).unwrap();
            assert_near(&y, &one(&whole), 1e-12, "a step");
            let MixerState::Sums { sums, .. } = &state else {
                panic!("another state");
            };
            assert_eq!(sums.dims(), [1, 2, monomials, 4]);
        }
    }
}

#[test]
fn dropout_is_that_of_the_step_and_none_when_evaluating() {
    let (q, k) = (random(&[1, 2, 6, 4], 1), random(&[1, 2, 6, 4], 2));
    let v = random(&[1, 2, 6, 3], 3);
    for degree in [1, 2] {
        let spec = FastmaxSpec {
            dropout: 0.3,
            ..spec(degree, Normalisation::Token)
        };
        let module = module(&spec, true, 4);
        let run = |seed: Option<u64>| {
            let trace = Trace::new();
            let context = Context {
                dropout_seed: seed,
                ..Context::new(&trace)
            };
            let pass = MechanismPass {
                path: "m",
                tokens: &q,
                keep: None,
                offset: 0,
                context: &context,
            };
            module.mixing(&q, &k, &pass).unwrap().mix(&v).unwrap()
        };
        let plain = mixing(&self::spec(degree, Normalisation::Token), true, &q, &k);
        assert_near(&run(None), &plain.mix(&v).unwrap(), 0.0, "evaluation");
        assert_near(&run(Some(1)), &run(Some(1)), 0.0, "one seed");
        assert!(common::difference(&run(Some(1)), &run(Some(2))) > 1e-3);
        assert!(common::difference(&run(Some(1)), &run(None)) > 1e-3);
    }
}

#[test]
fn work_grows_linearly() {
    each(|spec, causal| {
        let work = |length: usize| {
            let q = random(&[1, 2, length, 4], 1);
            mixing(spec, causal, &q, &q).operations(4) as f64
        };
        assert!(((work(512) / work(256)).log2() - 1.0).abs() < 0.1);
        assert!(((work(1024) / work(256)).log2() / 2.0 - 1.0).abs() < 0.1);
    });
}

/// Random coefficients of each head, as `w` and `u`, or `θ`, and the polynomials that they stand for.
fn learned(degree: usize, steepest: f64) -> (Map, Vec<[f64; 3]>) {
    let drawn = random(&[2, degree], 5);
    let all = values(&drawn);
    let polynomials = all.chunks(degree).map(|own| match own {
        [theta] => [1.0, steepest * theta.tanh(), 0.0],
        [w, u] => [1.0 + w * w, 2.0 * w * u, u * u],
        _ => panic!("two at the most"),
    });
    let polynomials = polynomials.collect();
    (Map::from([("coefficients".to_owned(), drawn)]), polynomials)
}

fn learned_mixing(
    spec: &FastmaxSpec,
    map: &Map,
    causal: bool,
    q: &Tensor,
    k: &Tensor,
) -> Box<dyn Mixing> {
    let heads = heads(2, q.dim(3).unwrap(), causal);
    spec.validate(&heads, "m").unwrap();
    let module = build(map, |p| spec.build(&heads, p)).unwrap();
    let trace = Trace::new();
    let context = Context::new(&trace);
    let pass = MechanismPass {
        path: "m",
        tokens: q,
        keep: None,
        offset: 0,
        context: &context,
    };
    module.mixing(q, k, &pass).unwrap()
}

#[test]
fn learned_coefficients_are_those_of_a_polynomial_of_each_head() {
    let length = 70;
    let q = (random(&[2, 2, length, 4], 1) * 2.0).unwrap();
    let k = (random(&[2, 2, length, 4], 2) * 2.0).unwrap();
    let v = random(&[2, 2, length, 3], 3);
    let head = |x: &Tensor, head: usize| x.narrow(1, head, 1).unwrap().contiguous().unwrap();
    for (degree, normalisation, causal, steepest) in [
        (1, Normalisation::Token, true, 1.3),
        (1, MAX, false, 1.3 / 0.64),
        (2, Normalisation::Token, false, 0.0),
        (2, MAX, false, 0.0),
        (2, Normalisation::None, true, 0.0),
    ] {
        let spec = FastmaxSpec {
            temperature: 1.3,
            learned: true,
            ..spec(degree, normalisation)
        };
        let (map, polynomials) = learned(degree, steepest);
        let mixing = learned_mixing(&spec, &map, causal, &q, &k);
        let found = mixing.mix(&v).unwrap();
        for (index, coefficients) in polynomials.into_iter().enumerate() {
            let fixed = FastmaxSpec {
                coefficients,
                learned: false,
                ..spec.clone()
            };
            let expected = brute_force(
                &fixed,
                causal,
                [&q, &k, &v].map(|x| head(x, index)).each_ref(),
            );
            let what = format!("{spec:?} head {index}");
            assert_near(&head(&found, index), &expected, 1e-10, &what);
        }
        // Positive, whatever they are.
        let weights = values(&mixing.weights(&v).unwrap());
        for (at, weight) in weights.into_iter().enumerate() {
            let seen = !causal || at % length <= at / length % length;
            assert!(!seen || weight > 0.0, "{spec:?}: {weight}");
        }
    }
}

/// Heads start with the polynomial of the spec, up to a factor that division takes away.
#[test]
fn learned_coefficients_start_as_those_that_are_given() {
    let q = random(&[2, 2, 9, 4], 1);
    let k = random(&[2, 2, 9, 4], 2);
    let v = random(&[2, 2, 9, 3], 3);
    for (degree, coefficients) in [
        (2, [1.0, 1.0, 0.5]),
        (2, [0.7, -0.4, 0.9]),
        (1, [2.0, 0.6, 0.5]),
        (1, [1.0, -0.4, 0.5]),
    ] {
        let fixed = FastmaxSpec {
            coefficients,
            ..spec(degree, Normalisation::Token)
        };
        let spec = FastmaxSpec {
            learned: true,
            ..fixed.clone()
        };
        let heads = heads(2, 4, true);
        let (ranks, mut linears) = (Default::default(), Vec::new());
        let mut start = Start(Map::new());
        let parameters = Parameters::new(&mut start, &ranks, &mut linears);
        spec.build(&heads, parameters).unwrap();
        let found = learned_mixing(&spec, &start.0, true, &q, &k)
            .mix(&v)
            .unwrap();
        let expected = mixing(&fixed, true, &q, &k).mix(&v).unwrap();
        assert_near(&found, &expected, 1e-12, &format!("{coefficients:?}"));
    }
}

/// What parameters start as, where it is not drawn.
struct Start(Map);

impl ParameterSource for Start {
    fn parameter(&mut self, name: &str, shape: &[usize], init: Init) -> Result<Tensor, Error> {
        let [rows, columns] = *shape else {
            panic!("coefficients of heads");
        };
        let row = match init {
            Init::Constant(number) => vec![number; columns],
            Init::Spaced { first, last } => vec![first, last],
            other => panic!("drawn: {other:?}"),
        };
        let start = tensor(row.repeat(rows), shape);
        self.0.insert(name.to_owned(), start.clone());
        Ok(start)
    }
}

#[test]
fn impossible_specs_are_refused() {
    let refused = |spec: FastmaxSpec, causal: bool, width: usize| {
        let heads = heads(2, width, causal);
        spec.validate(&heads, "m").unwrap_err().to_string()
    };
    let base = FastmaxSpec::default;
    assert_eq!(
        refused(
            FastmaxSpec {
                degree: 3,
                ..base()
            },
            false,
            4
        ),
        "m.degree is 3, but must be 1 or 2"
    );
    assert_eq!(
        refused(base(), false, 512),
        "m.degree is 2, but must be 1, or heads of at most 256 features, where these have 512"
    );
    assert_eq!(
        refused(spec(2, MAX), true, 4),
        "m.normalisation.kind is \"max\", but must be token or none in causal attention: the \
         longest may come later"
    );
    assert_eq!(
        refused(base(), false, 1),
        "m.normalisation.kind is \"token\", but must be max or none where a head has one feature, \
         which is its mean"
    );
    assert_eq!(
        refused(
            FastmaxSpec {
                temperature: 0.0,
                ..base()
            },
            false,
            4
        ),
        "m.temperature is 0.0, but must be a positive number"
    );
    assert_eq!(
        refused(spec(2, Normalisation::Max { limit: -1.0 }), false, 4),
        "m.normalisation.limit is -1.0, but must be a positive number"
    );
    assert_eq!(
        refused(
            FastmaxSpec {
                coefficients: [1.0, f64::NAN, 0.5],
                ..base()
            },
            false,
            4
        ),
        "m.coefficients is [1.0, NaN, 0.5], but must be three finite numbers"
    );
    let of_nothing = |degree, coefficients| FastmaxSpec {
        degree,
        coefficients,
        ..base()
    };
    assert_eq!(
        refused(of_nothing(1, [0.0, 0.0, 0.5]), false, 4),
        "m.coefficients is [0.0, 0.0, 0.5], but must be three numbers, not all 0 up to the degree: weights would \
         be nothing over nothing"
    );
    let square = of_nothing(2, [0.0, 0.0, 0.5]);
    assert!(square.validate(&heads(2, 4, false), "m").is_ok());
    assert_eq!(
        refused(
            FastmaxSpec {
                dropout: 1.0,
                ..base()
            },
            false,
            4
        ),
        "m.dropout is 1.0, but must be at least 0 and below 1"
    );
    let learning = |spec: FastmaxSpec| FastmaxSpec {
        learned: true,
        ..spec
    };
    assert_eq!(
        refused(learning(spec(1, Normalisation::None)), false, 4),
        "m.degree is 1, but must be 2 where coefficients are learned and nothing bounds the scores"
    );
    assert_eq!(
        refused(
            learning(FastmaxSpec {
                coefficients: [-1.0, 1.0, 0.0],
                ..spec(1, Normalisation::Token)
            }),
            false,
            4
        ),
        "m.coefficients is [-1.0, 1.0, 0.0], but must be three numbers, the first positive, where they are \
         learned"
    );
    assert_eq!(
        refused(
            learning(FastmaxSpec {
                coefficients: [1.0, 2.0, 1.0],
                ..base()
            }),
            false,
            4
        ),
        "m.coefficients is [1.0, 2.0, 1.0], but must be those of a polynomial that is positive everywhere, \
         as only such are learned: a2 > 0 and a1² < 4 a0 a2"
    );
    assert_eq!(
        refused(
            learning(FastmaxSpec {
                dropout: 0.1,
                ..base()
            }),
            false,
            4
        ),
        "m.dropout is 0.1, but must be 0 where coefficients of degree two are learned: what would be \
         dropped then has the lower degrees in it"
    );
}
