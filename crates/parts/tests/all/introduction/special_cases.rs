//! Convolutions, graph networks and mean pooling as special cases of attention.

use super::{D, N, columns, identity, matrix, plus, times, tokens, tokens_of, zeros};
use crate::common::{Map, assert_near, build, draw, random, tensor};
use lapidary_kernels::{AttentionOptions, ScoreBias, Tensor};
use lapidary_parts::Context;
use lapidary_parts::attention::{MultiHeadAttention, MultiHeadSpec};
use lapidary_parts::position::PositionSpec;
use lapidary_signal::{Signal, Trace};

/// `attention.out` of attention whose queries are zero, so that only its bias decides.
fn mixed_by_position(spec: &MultiHeadSpec, map: &Map, x: &Tensor) -> Tensor {
    let part = build(map, |p| MultiHeadAttention::new(spec, D, p)).unwrap();
    let trace = Trace::new();
    let y = part.forward(&Signal::from(x.clone()), &Context::new(&trace), None);
    y.unwrap().into_value()
}

#[test]
fn heads_that_look_at_fixed_distances_are_a_convolution() {
    // Head h looks only at the token at distance h − 1, so V_h is a filter's tap.
    let spec = MultiHeadSpec {
        head_width: Some(D),
        position: PositionSpec::RelativeBuckets {
            buckets: 16,
            max_distance: 64,
        },
        bias: false,
        ..MultiHeadSpec::new(3)
    };
    let mut map = draw(15, |p| MultiHeadAttention::new(&spec, D, p));
    map.insert(
        "query.weight".to_owned(),
        random(&[3 * D, D], 1).zeros_like().unwrap(),
    );
    // Bidirectional buckets: 0 for distance 0, 1 for −1, half of the buckets plus 1 for +1.
    let mut table = zeros(16, 3);
    for (head, bucket) in [1, 0, 8 + 1].into_iter().enumerate() {
        table[bucket][head] = 1e4;
    }
    map.insert(
        "position.buckets".to_owned(),
        tensor(table.concat(), &[16, 3]),
    );
    let x = tokens();
    let y = matrix(&mixed_by_position(&spec, &map, &x).squeeze(0).unwrap());
    let columns = columns(&x);
    let (value, output) = (matrix(&map["value.weight"]), matrix(&map["output.weight"]));
    // Away from the ends, where every tap has a token.
    for (n, found) in y.iter().enumerate().take(N - 1).skip(1) {
        let mut expected = zeros(D, 1);
        for (head, neighbour) in [n - 1, n, n + 1].into_iter().enumerate() {
            let rows = head * D..(head + 1) * D;
            let w_output = output
                .iter()
                .map(|row| row[rows.clone()].to_vec())
                .collect();
            let tap = times(&w_output, &value[rows].to_vec());
            let token = columns.iter().map(|row| vec![row[neighbour]]).collect();
            expected = plus(&expected, &times(&tap, &token));
        }
        for (found, expected) in found.iter().zip(expected.concat()) {
            assert!((found - expected).abs() < 1e-10, "{found} {expected}");
        }
    }
}

#[test]
fn attention_along_edges_is_a_graph_network() {
    // Edges of a ring, with every node its own neighbour too.
    let edge = |from: usize, to: usize| from == to || (from + 1) % N == to || (to + 1) % N == from;
    let bias = (0..N * N)
        .map(|i| if edge(i % N, i / N) { 0.0 } else { -1e9 })
        .collect();
    let options = AttentionOptions {
        bias: Some(ScoreBias::Pairs(tensor(bias, &[1, 1, N, N]))),
        ..AttentionOptions::new(D)
    };
    let one_head = |t: Tensor| Signal::from(t.unsqueeze(1).unwrap());
    let (q, k, v) = (tokens(), random(&[1, N, D], 32), random(&[1, N, D], 33));
    let y = one_head(v.clone())
        .attend(&one_head(q.clone()), &one_head(k.clone()), &options)
        .unwrap();
    let (q, k, v) = (columns(&q), columns(&k), columns(&v));
    let mut expected = zeros(D, N);
    for to in 0..N {
        let neighbours: Vec<usize> = (0..N).filter(|from| edge(*from, to)).collect();
        assert_eq!(neighbours.len(), 3);
        let score = |from: usize| {
            let product: f64 = (0..D).map(|d| q[d][to] * k[d][from]).sum();
            (product / (D as f64).sqrt()).exp()
        };
        let total: f64 = neighbours.iter().map(|from| score(*from)).sum();
        for from in neighbours {
            for d in 0..D {
                expected[d][to] += v[d][from] * score(from) / total;
            }
        }
    }
    let y = y.squeeze(1).unwrap();
    assert_near(y.value(), &tokens_of(&expected), 1e-10, "graph");
}

#[test]
fn without_queries_attention_is_mean_pooling() {
    let spec = MultiHeadSpec {
        bias: false,
        ..MultiHeadSpec::new(1)
    };
    let map = Map::from([
        ("query.weight".to_owned(), tensor(vec![0.0; D * D], &[D, D])),
        ("key.weight".to_owned(), random(&[D, D], 34)),
        ("value.weight".to_owned(), identity(D)),
        ("output.weight".to_owned(), identity(D)),
    ]);
    let x = tokens();
    let mut mean = [0.0; D];
    for token in matrix(&x.squeeze(0).unwrap()) {
        for (mean, x) in mean.iter_mut().zip(token) {
            *mean += x / N as f64;
        }
    }
    let expected = tensor(mean.repeat(N), &[1, N, D]);
    assert_near(
        &mixed_by_position(&spec, &map, &x),
        &expected,
        1e-12,
        "mean",
    );
}
