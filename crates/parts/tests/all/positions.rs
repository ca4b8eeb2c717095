//! What the biases of positions promise: FIRE's properties, and that it can be each of the others.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use crate::common;
use crate::common::{
    Map, assert_near, build, difference, draw, gradient_error, position, span, tensor, values,
};
use lapidary_kernels::{AttentionOptions, DType, Device, ScoreBias, Tensor, attention};
use lapidary_parts::Context;
use lapidary_parts::attention::{MultiHeadAttention, MultiHeadSpec};
use lapidary_parts::position::fire::{FireActivation, FireTransform};
use lapidary_parts::position::{FireSpec, Position, PositionSpec, RotarySpec, SharedBiases, Span};
use lapidary_signal::{Signal, Trace};

const LENGTH: usize = 40;

fn drawn(spec: &PositionSpec, heads: usize, causal: bool) -> Map {
    draw(3, |p| Position::new(spec, (heads, heads), 4, causal, p))
}

fn bias(position: &Position, span: Span) -> Tensor {
    let found = position.bias(span, DType::F64, &Device::Cpu).unwrap();
    let found = found.unwrap();
    found.laid_out(span.queries, span.keys).unwrap()
}

/// Entries of keys that are not later than their query; the others are masked and mean nothing.
fn seen(bias: &Tensor) -> Tensor {
    let (_, heads, queries, keys) = bias.dims4().unwrap();
    let kept = (0..queries).flat_map(|i| (0..keys).map(move |j| f64::from(u8::from(j <= i))));
    let kept = tensor(kept.collect(), &[1, 1, queries, keys]);
    assert_eq!(kept.dims()[2], queries);
    bias.broadcast_mul(&kept.broadcast_as((1, heads, queries, keys)).unwrap())
        .unwrap()
}

fn fire(spec: FireSpec) -> PositionSpec {
    PositionSpec::Fire(spec)
}

/// The network of one hidden layer with these weights, `c` and `l = 1`.
fn network(stretch: f64, hidden: &[(f64, f64)], output: &[Vec<f64>], output_bias: &[f64]) -> Map {
    let heads = output.len();
    Map::from([
        ("stretch".to_owned(), tensor(vec![stretch], &[1])),
        ("length".to_owned(), tensor(vec![1.0], &[1])),
        (
            "layers.0.weight".to_owned(),
            tensor(
                hidden.iter().map(|unit| unit.0).collect(),
                &[hidden.len(), 1],
            ),
        ),
        (
            "layers.0.bias".to_owned(),
            tensor(hidden.iter().map(|unit| unit.1).collect(), &[hidden.len()]),
        ),
        (
            "layers.1.weight".to_owned(),
            tensor(output.concat(), &[heads, hidden.len()]),
        ),
        (
            "layers.1.bias".to_owned(),
            tensor(output_bias.to_vec(), &[heads]),
        ),
    ])
}

fn one_layer(hidden: usize, transform: FireTransform, initial_length: usize) -> FireSpec {
    FireSpec {
        hidden,
        layers: 1,
        transform,
        initial_length,
        ..FireSpec::default()
    }
}

/// FIRE whose network gives its input back.
fn relative_distances(initial_length: usize, stretch: f64, length: usize) -> Vec<Vec<f64>> {
    let spec = fire(one_layer(1, FireTransform::Logarithm, initial_length));
    let map = network(stretch, &[(1.0, 0.0)], &[vec![1.0]], &[0.0]);
    let found = bias(&position(&spec, 1, true, &map), span(length, length, 0));
    found
        .squeeze(0)
        .unwrap()
        .squeeze(0)
        .unwrap()
        .to_vec2()
        .unwrap()
}

#[test]
fn the_network_of_fire_sees_numbers_from_nought_to_one() {
    for stretch in [0.0, 0.1, -2.0] {
        for initial in [1, 8, 512] {
            let rows = relative_distances(initial, stretch, LENGTH);
            for (i, row) in rows.iter().enumerate() {
                assert!(row[..=i].iter().all(|u| (0.0..=1.0).contains(u)));
                assert_eq!(row[i], 0.0);
                if i >= initial && stretch != 0.0 {
                    assert!((row[0] - 1.0).abs() < 1e-4, "{}", row[0]);
                }
            }
        }
    }
}

#[test]
fn fire_is_a_function_of_distance_up_to_its_length_and_stretched_beyond() {
    let initial = 12;
    let rows = relative_distances(initial, 0.1, LENGTH);
    let at = |i: usize, distance: usize| rows[i][i - distance];
    for distance in 1..initial {
        for i in distance..initial {
            assert_eq!(at(i, distance), at(distance, distance));
        }
        for i in initial.max(distance) + 1..LENGTH {
            assert!(at(i, distance) < at(i - 1, distance));
        }
        // Continuous where the denominator begins to grow.
        let jump = at(initial - 1, distance) - at(initial, distance);
        assert!(jump.abs() < 1e-12);
    }
}

#[test]
fn the_way_by_distances_is_the_way_by_pairs() {
    for causal in [true, false] {
        for initial in [1, 7, 12, 100] {
            let plain = FireSpec {
                initial_length: initial,
                ..FireSpec::default()
            };
            let by_pairs = FireSpec {
                randomised: Some(20),
                ..plain.clone()
            };
            let map = drawn(&fire(plain.clone()), 3, causal);
            let fast = bias(&position(&fire(plain), 3, causal, &map), span(20, 20, 0));
            // All of twenty positions out of twenty, in order.
            let all = Span {
                draw: Some(1),
                ..span(20, 20, 0)
            };
            let slow = bias(&position(&fire(by_pairs), 3, causal, &map), all);
            let (fast, slow) = match causal {
                true => (seen(&fast), seen(&slow)),
                false => (fast, slow),
            };
            assert_near(&fast, &slow, 1e-12, &format!("{causal}, L = {initial}"));
        }
    }
}

/// Kinds whose bias is one of the distance alone.
fn by_distance() -> [PositionSpec; 5] {
    [
        PositionSpec::Alibi,
        PositionSpec::RelativeBuckets {
            buckets: 8,
            max_distance: 20,
        },
        PositionSpec::KerpleLogarithmic,
        PositionSpec::KerplePower,
        PositionSpec::Sandwich { width: 6 },
    ]
}

#[test]
fn biases_by_distance_are_not_laid_out() {
    let before_its_length = fire(FireSpec {
        initial_length: 9,
        ..FireSpec::default()
    });
    for spec in by_distance().into_iter().chain([before_its_length]) {
        for causal in [true, false] {
            // `l` as it begins.
            let mut map = drawn(&spec, 2, causal);
            if let Some(length) = map.get_mut("length") {
                *length = tensor(vec![1.0], &[1]);
            }
            let at = position(&spec, 2, causal, &map);
            for (queries, keys, offset) in [(1, 1, 0), (9, 9, 0), (1, 9, 8), (4, 9, 5), (3, 9, 2)] {
                let found = at.bias(span(queries, keys, offset), DType::F64, &Device::Cpu);
                match found.unwrap() {
                    Some(ScoreBias::ByDistance(table)) => {
                        assert_eq!(table.dims(), [2, queries + keys - 1]);
                    }
                    other => panic!("{}: {other:?}", spec.kind()),
                }
            }
        }
    }
}

/// Where attention reads it as such, it is what is laid out elsewhere.
#[test]
fn beyond_its_length_fire_is_a_function() {
    for (layers, causal) in [(1, true), (2, true), (1, false), (2, false)] {
        let spec = fire(FireSpec {
            layers,
            initial_length: 9,
            ..FireSpec::default()
        });
        let mut map = drawn(&spec, 2, causal);
        if let Some(length) = map.get_mut("length") {
            *length = tensor(vec![1.0], &[1]);
        }
        let at = position(&spec, 2, causal, &map);
        for (queries, keys, offset) in [(LENGTH, LENGTH, 0), (1, LENGTH, LENGTH - 1), (7, 30, 23)] {
            let found = at.bias(span(queries, keys, offset), DType::F64, &Device::Cpu);
            let found = found.unwrap().unwrap();
            assert!(matches!(found, ScoreBias::Functional(_)), "{found:?}");
            let pairs = ScoreBias::Pairs(found.laid_out(queries, keys).unwrap());
            let q = common::random(&[2, 2, queries, 4], 1);
            let [k, v] = [2, 3].map(|seed| common::random(&[2, 2, keys, 4], seed));
            let [found, expected] = [found, pairs].map(|bias| {
                let options = AttentionOptions {
                    causal,
                    query_offset: offset,
                    bias: Some(bias),
                    ..AttentionOptions::new(4)
                };
                attention(&q, &k, &v, &options).unwrap()
            });
            assert_near(&found, &expected, 1e-13, "a function");
        }
    }
}

#[test]
fn rows_do_not_change_when_tokens_are_added() {
    for spec in [fire(FireSpec {
        initial_length: 9,
        ..FireSpec::default()
    })]
    .into_iter()
    .chain(by_distance())
    {
        let at = position(&spec, 2, true, &drawn(&spec, 2, true));
        let whole = bias(&at, span(LENGTH, LENGTH, 0));
        for length in [1, 8, 9, 10, 25] {
            let shorter = seen(&bias(&at, span(length, length, 0)));
            let part = whole
                .narrow(2, 0, length)
                .unwrap()
                .narrow(3, 0, length)
                .unwrap();
            assert_near(&shorter, &seen(&part), 1e-13, "fewer tokens");
            // The last row alone, as decoding asks for it.
            let last = bias(&at, span(1, length, length - 1));
            let row = part.narrow(2, length - 1, 1).unwrap();
            assert_near(&last, &row, 1e-13, "one row");
        }
    }
}

#[test]
fn random_positions_rise_and_follow_their_seed() {
    let spec = FireSpec {
        randomised: Some(1000),
        initial_length: 8,
        ..FireSpec::default()
    };
    let at = position(&fire(spec.clone()), 2, true, &drawn(&fire(spec), 2, true));
    let with = |draw| {
        bias(
            &at,
            Span {
                draw,
                ..span(20, 20, 0)
            },
        )
    };
    assert_eq!(difference(&with(Some(3)), &with(Some(3))), 0.0);
    assert!(difference(&with(Some(3)), &with(Some(4))) > 1e-6);
    assert!(difference(&with(Some(3)), &with(None)) > 1e-6);
}

#[test]
fn gradients_of_fire_are_right_on_both_sides_of_its_length() {
    for (causal, activation, transform) in [
        (true, FireActivation::Relu, FireTransform::Logarithm),
        (false, FireActivation::Cosine, FireTransform::Logarithm),
        (
            true,
            FireActivation::Relu,
            FireTransform::Power { exponent: 0.7 },
        ),
    ] {
        let spec = fire(FireSpec {
            activation,
            transform,
            hidden: 5,
            // 5 · |l| with l near 1 is no whole number, where the maximum would have a corner.
            initial_length: 5,
            ..FireSpec::default()
        });
        let mut map = drawn(&spec, 2, causal);
        map.insert("length".to_owned(), tensor(vec![1.13], &[1]));
        let error = gradient_error(&map, 6, |map| {
            let found = bias(&position(&spec, 2, causal, map), span(9, 9, 0));
            let found = if causal { seen(&found) } else { found };
            common::contracted(&found)
        });
        assert!(error < 1e-6, "{error}");
    }
    // No stretch at all divides nothing by nothing.
    let spec = fire(FireSpec::default());
    let mut map = drawn(&spec, 2, true);
    map.insert("stretch".to_owned(), tensor(vec![0.0], &[1]));
    let found = bias(&position(&spec, 2, true, &map), span(9, 9, 0));
    assert!(common::is_finite(&found));
}

#[test]
fn layers_can_share_one_network() {
    let own = fire(FireSpec::default());
    let shared = fire(FireSpec {
        shared: true,
        ..FireSpec::default()
    });
    let two = |spec: &PositionSpec| {
        draw(1, |mut p| {
            Position::new(spec, (2, 2), 4, true, p.at("blocks.0"))?;
            Position::new(spec, (2, 2), 4, true, p.at("blocks.1"))
        })
    };
    let numbers = |map: &Map| map.values().map(Tensor::elem_count).sum::<usize>();
    let (own, shared) = (two(&own), two(&shared));
    assert_eq!(numbers(&own), 2 * numbers(&shared));
    assert!(shared.keys().all(|name| name.starts_with("fire.")));
}

/// Two layers of attention one after the other, as they run in a pass that keeps what layers share.
fn through_two(map: &Map, spec: &FireSpec, x: &Tensor, kept: Option<&SharedBiases>) -> Tensor {
    let attention = MultiHeadSpec {
        causal: true,
        position: fire(spec.clone()),
        ..MultiHeadSpec::new(2)
    };
    let layers = build(map, |mut p| {
        let first = MultiHeadAttention::new(&attention, 4, p.at("blocks.0"))?;
        Ok([
            first,
            MultiHeadAttention::new(&attention, 4, p.at("blocks.1"))?,
        ])
    });
    let trace = Trace::new();
    let cx = Context {
        draw: Some(5),
        biases: kept,
        ..Context::new(&trace)
    };
    let mut x = Signal::from(x.clone());
    for layer in layers.unwrap() {
        x = layer.forward(&x, &cx, None).unwrap();
    }
    x.into_value()
}

#[test]
fn a_shared_network_is_run_once_in_a_pass() {
    let x = common::random(&[1, 9, 4], 8);
    for (shared, randomised) in [(true, None), (true, Some(30)), (false, None)] {
        let spec = FireSpec {
            shared,
            randomised,
            hidden: 5,
            initial_length: 6,
            ..FireSpec::default()
        };
        let attention = MultiHeadSpec {
            causal: true,
            position: fire(spec.clone()),
            ..MultiHeadSpec::new(2)
        };
        let mut map = draw(2, |mut p| {
            MultiHeadAttention::new(&attention, 4, p.at("blocks.0"))?;
            MultiHeadAttention::new(&attention, 4, p.at("blocks.1"))
        });
        let kept = SharedBiases::default();
        let found = through_two(&map, &spec, &x, Some(&kept));
        assert_eq!(kept.runs(), usize::from(shared));
        // Another length is another bias.
        let fewer = through_two(&map, &spec, &x.narrow(1, 0, 7).unwrap(), Some(&kept));
        assert_eq!(kept.runs(), 2 * usize::from(shared));
        assert_near(&found, &through_two(&map, &spec, &x, None), 0.0, "pass");
        if randomised.is_none() {
            let first = found.narrow(1, 0, 7).unwrap();
            assert_near(&first, &fewer, 1e-12, "fewer tokens");
        }
        // The gradient of what both layers read is of both.
        map.insert("x".to_owned(), x.clone());
        let error = gradient_error(&map, 3, |map| {
            let kept = SharedBiases::default();
            common::contracted(&through_two(map, &spec, &map["x"], Some(&kept)))
        });
        assert!(error < 1e-6, "{error}");
        if !shared || randomised.is_some() {
            continue;
        }
        // Copies that each layer has for itself compute the same.
        let mut copied = map.clone();
        for (name, tensor) in &map {
            for block in 0..2 {
                if let Some(rest) = name.strip_prefix("fire.") {
                    copied.insert(format!("blocks.{block}.position.{rest}"), tensor.clone());
                }
            }
        }
        let own = FireSpec {
            shared: false,
            ..spec
        };
        assert_near(
            &found,
            &through_two(&copied, &own, &x, None),
            1e-13,
            "copies",
        );
    }
}

#[test]
fn layers_that_share_a_network_draw_the_same_positions() {
    let spec = fire(FireSpec {
        shared: true,
        randomised: Some(1000),
        ..FireSpec::default()
    });
    let map = drawn(&spec, 2, true);
    let at = position(&spec, 2, true, &map);
    let drawing = Span {
        draw: Some(3),
        ..span(12, 12, 0)
    };
    let on = (DType::F64, &Device::Cpu);
    let of = |path: &str, kept: Option<&SharedBiases>| {
        let found = at.bias_in_pass(drawing, path, kept, on).unwrap();
        found.unwrap().laid_out(12, 12).unwrap()
    };
    let kept = SharedBiases::default();
    let first = of("blocks.0.attention", Some(&kept));
    for other in [
        of("blocks.1.attention", Some(&kept)),
        of("blocks.2.attention", None),
    ] {
        assert_eq!(difference(&first, &other), 0.0);
    }
    assert_eq!(kept.runs(), 1);
}

/// The table of the causal buckets, 32 up to a distance of 128.
#[test]
fn t5_buckets_begin_where_the_table_says() {
    let spec = PositionSpec::RelativeBuckets {
        buckets: 32,
        max_distance: 128,
    };
    let numbers = tensor((0..32).map(f64::from).collect(), &[32, 1]);
    let map = Map::from([("buckets".to_owned(), numbers)]);
    let row = values(&bias(&position(&spec, 1, true, &map), span(1, 200, 199)));
    let bucket = |distance: usize| row[199 - distance] as usize;
    assert!((0..16).all(|distance| bucket(distance) == distance));
    let starts = [
        16, 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113,
    ];
    for (index, &start) in starts.iter().enumerate() {
        assert_eq!(bucket(start), 16 + index, "distance {start}");
        assert_eq!(bucket(start - 1), 15 + index, "distance {}", start - 1);
    }
    assert!((113..200).all(|distance| bucket(distance) == 31));
}

const THEOREM: usize = 200;

fn compare(ours: &PositionSpec, map: &Map, other: &PositionSpec, other_map: &Map, heads: usize) {
    let whole = span(THEOREM, THEOREM, 0);
    let found = seen(&bias(&position(ours, heads, true, map), whole));
    let expected = seen(&bias(&position(other, heads, true, other_map), whole));
    let scale = values(&expected)
        .iter()
        .fold(1.0, |most: f64, x| most.max(x.abs()));
    let error = difference(&found, &expected) / scale;
    assert!(error < 1e-5, "{}: {error:e}", other.kind());
}

/// `L` at or beyond the longest input keeps the denominator from moving.
#[test]
fn fire_can_be_alibi() {
    let heads = 4;
    let length = 256.0;
    let slope = |head: usize| 2f64.powf(-8.0 * (head + 1) as f64 / heads as f64);
    let output: Vec<Vec<f64>> = (0..heads).map(|h| vec![-slope(h) * length]).collect();
    let map = network(0.1, &[(1.0, 0.0)], &output, &vec![0.0; heads]);
    let spec = fire(one_layer(1, FireTransform::Linear, 256));
    compare(&spec, &map, &PositionSpec::Alibi, &Map::new(), heads);
}

/// With the logarithm ALiBi is only approached as `c` goes to 0.
#[test]
fn with_the_logarithm_alibi_is_approached() {
    let last = span(1, 512, 511);
    // The first of four heads has the slope 1/4.
    let alibi = position(&PositionSpec::Alibi, 4, true, &Map::new());
    let expected = values(&bias(&alibi, last));
    let spec = fire(one_layer(1, FireTransform::Logarithm, 512));
    let errors = [1e-1, 1e-3, 1e-5].map(|stretch| {
        let map = network(stretch, &[(1.0, 0.0)], &[vec![-0.25 * 512.0]], &[0.0]);
        let found = values(&bias(&position(&spec, 1, true, &map), last));
        let off = found.iter().zip(&expected).map(|(a, b)| (a - b).abs());
        off.fold(0.0, f64::max)
    });
    assert!((errors[0] - 53.0).abs() < 1.0, "{errors:?}");
    assert!((errors[1] - 6.6).abs() < 0.1, "{errors:?}");
    // 0.08 where nothing is added to the denominator.
    assert!((errors[2] - 0.07).abs() < 0.005, "{errors:?}");
}

fn kerple(scale: f64, inner: f64) -> Map {
    let before = |y: f64| (y.exp() - 1.0).ln();
    Map::from([(
        "coefficients".to_owned(),
        tensor(vec![before(scale), before(inner)], &[2, 1]),
    )])
}

#[test]
fn fire_can_be_kerple() {
    let (r1, r2) = (1.7, 0.3);
    let whole = (r2 * 256f64 + 1.0).ln();
    let map = network(r2, &[(1.0, 0.0)], &[vec![-r1 * whole]], &[0.0]);
    let spec = fire(one_layer(1, FireTransform::Logarithm, 256));
    compare(
        &spec,
        &map,
        &PositionSpec::KerpleLogarithmic,
        &kerple(r1, r2),
        1,
    );

    let whole = 256f64.powf(r2);
    let map = network(0.1, &[(1.0, 0.0)], &[vec![-r1 * whole]], &[0.0]);
    let spec = fire(one_layer(1, FireTransform::Power { exponent: r2 }, 256));
    compare(&spec, &map, &PositionSpec::KerplePower, &kerple(r1, r2), 1);
}

/// Each boundary between buckets is a ramp between two neighbouring whole numbers.
#[test]
fn fire_can_be_t5() {
    let starts: Vec<usize> = (1..16)
        .chain([
            16, 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113,
        ])
        .collect();
    let table: Vec<f64> = (0..32).map(|b| (f64::from(b) * 1.3).sin()).collect();
    let length = 256.0;
    let (mut hidden, mut output) = (Vec::new(), Vec::new());
    for (index, &start) in starts.iter().enumerate() {
        let rise = table[index + 1] - table[index];
        let at = |n: usize| n as f64 / length;
        hidden.extend([(1.0, -at(start - 1)), (1.0, -at(start))]);
        output.extend([rise * length, -rise * length]);
    }
    assert_eq!(hidden.len(), 62);
    let map = network(0.1, &hidden, &[output], &[table[0]]);
    let spec = fire(one_layer(62, FireTransform::Linear, 256));
    let t5 = PositionSpec::RelativeBuckets {
        buckets: 32,
        max_distance: 128,
    };
    let t5_map = Map::from([("buckets".to_owned(), tensor(table, &[32, 1]))]);
    compare(&spec, &map, &t5, &t5_map, 1);
}

#[test]
fn fire_can_be_sandwich() {
    let width = 16;
    let length = 256.0;
    let hidden: Vec<(f64, f64)> = (1..=width / 2)
        .map(|k| {
            (
                length / 10_000f64.powf(2.0 * f64::from(k) / f64::from(width)),
                0.0,
            )
        })
        .collect();
    let map = network(0.1, &hidden, &[vec![1.0; hidden.len()]], &[0.0]);
    let spec = fire(FireSpec {
        activation: FireActivation::Cosine,
        ..one_layer(hidden.len(), FireTransform::Linear, 256)
    });
    let sandwich = PositionSpec::Sandwich {
        width: width as usize,
    };
    compare(&spec, &map, &sandwich, &Map::new(), 1);
}

#[test]
fn a_rotation_beside_fire_changes_neither() {
    let turning = fire(FireSpec {
        rotary: Some(RotarySpec::default()),
        ..FireSpec::default()
    });
    let alone = fire(FireSpec::default());
    let map = drawn(&turning, 2, true);
    let [turning, alone] = [&turning, &alone].map(|spec| position(spec, 2, true, &map));
    assert_near(
        &bias(&turning, span(5, 9, 4)),
        &bias(&alone, span(5, 9, 4)),
        0.0,
        "bias",
    );
    assert!(alone.rotary().is_none());
    let plain = position(
        &PositionSpec::Rotary(RotarySpec::default()),
        2,
        true,
        &Map::new(),
    );
    let tables = |position: &Position| {
        let rotary = position.rotary().unwrap();
        rotary.tables(2, 4, 5, DType::F64, &Device::Cpu).unwrap()
    };
    let (found, expected) = (tables(&turning), tables(&plain));
    assert_near(&found.0, &expected.0, 0.0, "cosines");
    assert_near(&found.1, &expected.1, 0.0, "sines");
}

#[test]
fn kerple_equals_its_formula() {
    for (spec, formula) in [
        (
            PositionSpec::KerpleLogarithmic,
            (|d: f64| 0.8 * (1.0 + 1.5 * d).ln()) as fn(f64) -> f64,
        ),
        (PositionSpec::KerplePower, |d: f64| 0.8 * d.powf(1.5)),
    ] {
        for causal in [true, false] {
            let at = position(&spec, 1, causal, &kerple(0.8, 1.5));
            let found = values(&bias(&at, span(5, 9, 2)));
            for (index, found) in found.iter().enumerate() {
                let (i, j) = (index / 9 + 2, index % 9);
                let expected = -formula(i.abs_diff(j) as f64);
                assert!((found - expected).abs() < 1e-12);
            }
        }
    }
}
