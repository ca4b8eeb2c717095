//! Attention on a tree: exact properties, against all pairs of tokens.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use crate::common::attention;
use crate::common::attention::{Given, Subject, mask, spec};
use crate::common::{
    Map, assert_near, build, contracted, gradient_error, heads, random, tensor, values,
};
use lapidary_factor::trees::{Graph, Tree};
use lapidary_kernels::{Direction, Tensor, Var, linear_attention};
use lapidary_parts::Context;
use lapidary_parts::attention::mechanism::topological::{
    FeatureMap, GraphSpec, Mask, Metric, TopologicalSpec,
};
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

/// `M` of a distance.
fn mask_of(spec: &TopologicalSpec, a: &[f64], distance: f64) -> f64 {
    let s = distance / spec.unit;
    let z = a[0] + a[1] * s + a[2] * s * s;
    match spec.mask {
        Mask::Exponential => z.exp(),
        Mask::Identity => 1.0 + z,
        Mask::InverseQuadratic => 2.0 / (1.0 + (1.0 + z) * (1.0 + z)),
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
            let mask = mask_of(spec, a, distance(spec.columns, i, j) as f64);
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

/// Where training begins, every `g` leaves `M ≡ 1` with a slope of one, that of the inverse of a quadratic downwards: a mask
/// that starts without one never learns.
#[test]
fn every_mask_can_leave_where_it_starts() {
    let [q, k, v] = drawn(1, 30);
    let slopes = |mask: Mask| -> Vec<f64> {
        let spec = TopologicalSpec {
            features: FeatureMap::Square,
            unit: 10.0,
            ..on(None, mask)
        };
        let numbers = Var::from_tensor(&tensor(vec![0.0; 6], &[HEADS, 3])).unwrap();
        let map = Map::from([("mask".to_owned(), numbers.as_tensor().clone())]);
        let loss = contracted(&mixing(&spec, &map, [&q, &k]).mix(&v).unwrap());
        let gradients = loss.backward().unwrap();
        values(gradients.get(numbers.as_tensor()).unwrap())
    };
    let exponential = slopes(Mask::Exponential);
    for (mask, sign) in [(Mask::Identity, 1.0), (Mask::InverseQuadratic, -1.0)] {
        for (found, expected) in slopes(mask).iter().zip(&exponential) {
            assert!((found - sign * expected).abs() < 1e-9, "{mask:?}");
        }
    }
    // A factor of the whole mask changes nothing; distances do.
    for (place, slope) in exponential.iter().enumerate() {
        assert_eq!(slope.abs() < 1e-9, place % 3 == 0, "{place}: {slope}");
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
    let short = random(&[1, 8, attention::WIDTH], 4);
    let junk = (random(&[1, 4, attention::WIDTH], 5) * 100.0).unwrap();
    let long = Tensor::cat(&[&short, &junk], 1).unwrap();
    let keep = mask(&[&[1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0]]);
    // Random features are told by the largest of all keys, of which pads are none.
    let random = FeatureMap::Exponential { count: 16, seed: 2 };
    for features in [FeatureMap::Relu, random] {
        let topological = TopologicalSpec {
            columns: Some(4),
            unit: 8.0,
            features,
            ..TopologicalSpec::default()
        };
        let subject = Subject::new(spec(MechanismSpec::Topological(topological), false), 6);
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
}

#[test]
fn work_grows_nearly_linearly() {
    let still = Map::from([("mask".to_owned(), tensor(vec![0.0; 6], &[HEADS, 3]))]);
    let work = |columns: Option<usize>, length: usize| -> f64 {
        let [q, k, _] = drawn(1, length);
        let mixing = mixing(&on(columns, Mask::Exponential), &still, [&q, &k]);
        mixing.operations(WIDTH) as f64
    };
    // Leaves of 128 tokens, and one node at every depth of cuts: n (c + ln n).
    let path = (work(None, 65_536) / work(None, 16_384)).ln() / 4f64.ln();
    let grid = (work(Some(256), 65_536) / work(Some(128), 16_384)).ln() / 4f64.ln();
    assert!(path > 1.0 && path < 1.1, "{path}");
    assert!(grid > 0.95 && grid < 1.15, "{grid}");
}

/// A path with chords, lengths multiples of a quarter.
fn graph(vertices: usize) -> GraphSpec {
    let length = |v: usize| 0.25 * (1 + v * 7 % 5) as f64;
    let path = (1..vertices).map(|v| (v - 1, v, length(v)));
    let chords = (0..vertices / 3).map(|v| (v, vertices - 1 - v, length(v + 2)));
    GraphSpec::new(vertices, path.chain(chords).collect())
}

/// All pairs `[trees, vertices, vertices]` of what a metric takes distances along.
fn all_pairs(spec: &GraphSpec, metric: Metric) -> Vec<Vec<Vec<f64>>> {
    let graph = Graph::new(spec.vertices, spec.edges.clone()).unwrap();
    let of = |tree: Tree| (0..spec.vertices).map(|v| tree.distances(v)).collect();
    match metric {
        Metric::SpanningTree => vec![of(graph.spanning_tree().unwrap())],
        Metric::RandomTrees { count, seed } => (0..count as u64)
            .map(|tree| of(graph.hierarchical_tree(seed + tree).unwrap()))
            .collect(),
        Metric::ShortestPaths => {
            vec![(0..spec.vertices).map(|v| graph.distances(v)).collect()]
        }
    }
}

const METRICS: [Metric; 4] = [
    Metric::SpanningTree,
    Metric::RandomTrees { count: 1, seed: 5 },
    Metric::RandomTrees { count: 3, seed: 8 },
    Metric::ShortestPaths,
];

fn over(graph: GraphSpec, metric: Metric, mask: Mask) -> TopologicalSpec {
    TopologicalSpec {
        graph: Some(graph),
        metric,
        features: FeatureMap::Square,
        unit: 10.0,
        ..on(None, mask)
    }
}

/// Over a graph the mask is the mean over trees of a function of the distances of each; of as many tokens as
/// vertices, and of fewer.
#[test]
fn over_a_graph_masks_are_averaged_over_trees() {
    for vertices in [7, 60] {
        for metric in METRICS {
            for mask in [Mask::Exponential, Mask::InverseQuadratic] {
                let spec = over(graph(vertices), metric, mask);
                let pairs = all_pairs(&graph(vertices), metric);
                for length in [vertices, vertices - 2] {
                    let [q, k, v] = drawn(1, length);
                    let map = numbers(1.0);
                    let found = values(&mixing(&spec, &map, [&q, &k]).mix(&v).unwrap());
                    let [q, k, v] = [q, k, v].map(|x| values(&x));
                    let a = values(&map["mask"]);
                    for head in 0..HEADS {
                        let row = |x: &[f64], i: usize| {
                            x[(head * length + i) * WIDTH..][..WIDTH].to_vec()
                        };
                        for i in (0..length).step_by(3) {
                            let weights: Vec<f64> = (0..length)
                                .map(|j| {
                                    let masks = pairs.iter().map(|distances| {
                                        mask_of(&spec, &a[3 * head..][..3], distances[i][j])
                                    });
                                    let mask = masks.sum::<f64>() / pairs.len() as f64;
                                    let both = row(&q, i).into_iter().zip(row(&k, j));
                                    mask * both.map(|(q, k)| q * q * k * k).sum::<f64>()
                                })
                                .collect();
                            let sum: f64 = weights.iter().sum();
                            for feature in 0..WIDTH {
                                let each = weights.iter().enumerate();
                                let expected: f64 =
                                    each.map(|(j, w)| w / sum * row(&v, j)[feature]).sum();
                                let found = found[(head * length + i) * WIDTH + feature];
                                assert!(
                                    (found - expected).abs() < 1e-9,
                                    "{vertices} {length} {metric:?} {mask:?}"
                                );
                            }
                        }
                    }
                }
            }
        }
    }
}

/// Trees over many vertices are cut, and their other nodes stand behind the tokens.
#[test]
fn large_graphs_are_cut_and_give_the_same() {
    let vertices = 1100;
    // More vertices than all pairs of a tree are kept of.
    for metric in [
        Metric::SpanningTree,
        Metric::RandomTrees { count: 2, seed: 1 },
    ] {
        let spec = TopologicalSpec {
            unit: 1000.0,
            ..over(graph(vertices), metric, Mask::Exponential)
        };
        let [q, k, v] = drawn(1, vertices);
        let map = numbers(1.0);
        let found = values(&mixing(&spec, &map, [&q, &k]).mix(&v).unwrap());
        let [q, k, v] = [q, k, v].map(|x| values(&x));
        let a = values(&map["mask"]);
        let graph = Graph::new(vertices, graph(vertices).edges).unwrap();
        let trees: Vec<Tree> = match metric {
            Metric::RandomTrees { count, seed } => (seed..seed + count as u64)
                .map(|seed| graph.hierarchical_tree(seed).unwrap())
                .collect(),
            _ => vec![graph.spanning_tree().unwrap()],
        };
        for i in [0, 517, 1099] {
            let distances: Vec<Vec<f64>> = trees.iter().map(|tree| tree.distances(i)).collect();
            let row = |x: &[f64], i: usize| x[i * WIDTH..][..WIDTH].to_vec();
            let weights: Vec<f64> = (0..vertices)
                .map(|j| {
                    let masks = distances.iter().map(|d| mask_of(&spec, &a[..3], d[j]));
                    let both = row(&q, i).into_iter().zip(row(&k, j));
                    masks.sum::<f64>() * both.map(|(q, k)| q * q * k * k).sum::<f64>()
                })
                .collect();
            let sum: f64 = weights.iter().sum();
            for feature in 0..WIDTH {
                let each = weights.iter().enumerate();
                let expected: f64 = each.map(|(j, w)| w / sum * v[j * WIDTH + feature]).sum();
                assert!(
                    (found[i * WIDTH + feature] - expected).abs() < 1e-8,
                    "{metric:?}"
                );
            }
        }
    }
}

#[test]
fn over_a_graph_gradients_equal_central_differences() {
    let length = 7;
    for metric in METRICS {
        let spec = over(graph(length), metric, Mask::Exponential);
        let [q, k, v] = drawn(1, length);
        let a = numbers(1.0)["mask"].clone();
        let error = lapidary_kernels::check::gradient_error(
            |x| {
                let map = Map::from([("mask".to_owned(), x[3].clone())]);
                mixing(&spec, &map, [&x[0], &x[1]]).mix(&x[2])
            },
            &[q, k, v, a],
        );
        let error = error.unwrap();
        assert!(error < 1e-6, "{metric:?}: {error}");
    }
}

/// A spanning tree in steps that its edges are rounded to is that of the rounded edges.
#[test]
fn lengths_are_rounded_to_whole_steps() {
    let edges = vec![(0, 1, 0.9), (1, 2, 2.2), (2, 3, 0.4), (3, 4, 1.6)];
    let rounded = vec![(0, 1, 1.0), (1, 2, 2.0), (2, 3, 0.0), (3, 4, 2.0)];
    let [q, k, v] = drawn(1, 5);
    let found = |edges: Vec<(usize, usize, f64)>, step| {
        let graph = GraphSpec {
            step,
            ..GraphSpec::new(5, edges)
        };
        let spec = over(graph, Metric::SpanningTree, Mask::Exponential);
        mixing(&spec, &numbers(1.0), [&q, &k]).mix(&v).unwrap()
    };
    assert_near(
        &found(edges, Some(1.0)),
        &found(rounded, None),
        1e-12,
        "rounded",
    );
}

/// How far apart random trees put two tokens hangs on how many there are, and pads are none.
#[test]
fn random_trees_are_those_of_a_sequence_alone() {
    let row = TopologicalSpec {
        metric: Metric::RandomTrees { count: 2, seed: 3 },
        unit: 4.0,
        ..on(None, Mask::Exponential)
    };
    let grid = TopologicalSpec {
        columns: Some(4),
        ..row.clone()
    };
    let map = numbers(1.0);
    let [q, k, v] = drawn(3, 12);
    // Pads on all sides, behind, and everywhere.
    let real: [&[u32]; 3] = [&[2, 3, 4, 6, 7, 8, 9], &[0, 1, 2, 3, 4], &[]];
    for (spec, sequences) in [(row, 0..3), (grid, 1..3)] {
        let mut keep = vec![0u8; 3 * 12];
        for (sequence, places) in real.iter().enumerate() {
            let all: Vec<u32> = (0..12).collect();
            let places: &[u32] = if sequences.contains(&sequence) {
                places
            } else {
                &all[..]
            };
            for place in places {
                keep[sequence * 12 + *place as usize] = 1;
            }
        }
        let keep = Tensor::from_vec(keep, (3, 12), q.device()).unwrap();
        let module = build(&map, |p| spec.build(&heads(HEADS, WIDTH, false), p)).unwrap();
        let trace = Trace::new();
        let context = Context::new(&trace);
        let pass = MechanismPass {
            path: "attention",
            tokens: &q,
            keep: Some(&keep),
            offset: 0,
            context: &context,
        };
        let found = module.mixing(&q, &k, &pass).unwrap().mix(&v).unwrap();
        for sequence in sequences {
            let places = real[sequence];
            if places.is_empty() {
                let rest = values(&found.narrow(0, sequence, 1).unwrap());
                assert!(rest.iter().all(|x| *x == 0.0));
                continue;
            }
            let at = Tensor::new(places, q.device()).unwrap();
            let alone = |x: &Tensor| {
                let x = x.narrow(0, sequence, 1).unwrap().contiguous().unwrap();
                x.index_select(&at, 2).unwrap()
            };
            let expected = mixing(&spec, &map, [&alone(&q), &alone(&k)]);
            let expected = expected.mix(&alone(&v)).unwrap();
            assert_near(&alone(&found), &expected, 1e-12, "alone");
        }
    }
}

#[test]
fn a_grid_may_have_random_trees_and_a_graph_no_more_tokens_than_vertices() {
    let [q, k, v] = drawn(1, 12);
    let as_graph = {
        let graph = Graph::grid(12, 4);
        GraphSpec::new(12, graph.edges().to_vec())
    };
    let metric = Metric::RandomTrees { count: 2, seed: 3 };
    let on_grid = TopologicalSpec {
        columns: Some(4),
        graph: None,
        ..over(as_graph.clone(), metric, Mask::Exponential)
    };
    let map = numbers(1.0);
    assert_near(
        &mixing(&on_grid, &map, [&q, &k]).mix(&v).unwrap(),
        &mixing(&over(as_graph, metric, Mask::Exponential), &map, [&q, &k])
            .mix(&v)
            .unwrap(),
        1e-12,
        "grid",
    );
    let small = over(graph(9), Metric::SpanningTree, Mask::Exponential);
    let module = build(&map, |p| small.build(&heads(HEADS, WIDTH, false), p)).unwrap();
    let trace = Trace::new();
    let context = Context::new(&trace);
    let pass = MechanismPass {
        path: "attention",
        tokens: &q,
        keep: None,
        offset: 0,
        context: &context,
    };
    let said = module.mixing(&q, &k, &pass).unwrap_err().to_string();
    assert_eq!(
        said,
        "number of tokens is 12, but must be at most 9, the vertices of the graph"
    );
}
