//! DecompX against loops over tokens, streams and features, one number at a time.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use crate::common::{ENCODER, model, tokens};
use lapidary_explain::{Target, decompx};
use lapidary_model::Model;
use lapidary_signal::streams::StreamRules;

const IDS: [u32; 5] = [3, 11, 0, 19, 7];
const HEADS: usize = 4;
const EPSILON: f64 = 1e-5;

type Vector = Vec<f64>;

fn matrix(model: &Model, name: &str) -> Vec<Vector> {
    model.parameters()[name].to_vec2::<f64>().unwrap()
}

fn vector(model: &Model, name: &str) -> Vector {
    model.parameters()[name].to_vec1::<f64>().unwrap()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn times(matrix: &[Vector], x: &[f64]) -> Vector {
    matrix.iter().map(|row| dot(row, x)).collect()
}

fn plus(a: &[f64], b: &[f64]) -> Vector {
    a.iter().zip(b).map(|(a, b)| a + b).collect()
}

/// Adds `bias` to the streams of one position, by `|S · b|`.
fn split(streams: &mut [Vector], bias: &[f64]) {
    let raw: Vector = streams.iter().map(|s| dot(s, bias).abs()).collect();
    let total: f64 = raw.iter().sum();
    for (stream, raw) in streams.iter_mut().zip(raw) {
        for (s, b) in stream.iter_mut().zip(bias) {
            *s += raw / total * b;
        }
    }
}

fn mean(x: &[f64]) -> f64 {
    x.iter().sum::<f64>() / x.len() as f64
}

/// Layer norm of a position, value and streams.
fn norm(model: &Model, path: &str, x: &mut Vector, streams: &mut [Vector]) {
    let gamma = vector(model, &format!("{path}.weight"));
    let beta = vector(model, &format!("{path}.bias"));
    let centre = mean(x);
    let variance = mean(&x.iter().map(|v| (v - centre).powi(2)).collect::<Vector>());
    let apply = |x: &mut Vector, add: bool| {
        let centre = mean(x);
        for (d, v) in x.iter_mut().enumerate() {
            *v = gamma[d] * (*v - centre) / (variance + EPSILON).sqrt();
            *v += if add { beta[d] } else { 0.0 };
        }
    };
    apply(x, true);
    streams.iter_mut().for_each(|stream| apply(stream, false));
    split(streams, &beta);
}

/// GELU with the error function by its series, exact to rounding for the arguments here.
fn gelu(x: f64) -> f64 {
    let z = x / std::f64::consts::SQRT_2;
    let (mut term, mut sum) = (z, z);
    for n in 1..200 {
        term *= -z * z / n as f64;
        sum += term / (2 * n + 1) as f64;
    }
    let erf = 2.0 / std::f64::consts::PI.sqrt() * sum;
    0.5 * x * (1.0 + erf)
}

fn block(model: &Model, path: &str, x: &mut [Vector], streams: &mut [Vec<Vector>], first: bool) {
    let length = x.len();
    let part = |name: &str| {
        let name = format!("{path}.attention.{name}");
        let weight = matrix(model, &format!("{name}.weight"));
        (weight, vector(model, &format!("{name}.bias")))
    };
    let [(wq, bq), (wk, bk), (wv, bv), (wo, bo)] = ["query", "key", "value", "output"].map(part);
    let width = bo.len();
    let head = width / HEADS;
    let project = |w: &[Vector], b: &[f64], x: &[Vector]| -> Vec<Vector> {
        x.iter().map(|x| plus(&times(w, x), b)).collect()
    };
    let (q, k, v) = (
        project(&wq, &bq, x),
        project(&wk, &bk, x),
        project(&wv, &bv, x),
    );
    let mut mixed = vec![vec![0.0; width]; length];
    let mut mixed_streams = vec![vec![vec![0.0; width]; length]; length];
    for h in 0..HEADS {
        let range = h * head..(h + 1) * head;
        for i in 0..length {
            let scores: Vector = (0..length)
                .map(|j| dot(&q[i][range.clone()], &k[j][range.clone()]) / (head as f64).sqrt())
                .collect();
            let total: f64 = scores.iter().map(|s| s.exp()).sum();
            for j in 0..length {
                let alpha = scores[j].exp() / total;
                for d in range.clone() {
                    mixed[i][d] += alpha * v[j][d];
                    for s in 0..length {
                        let of_stream = if first {
                            // The value bias stays with its own token.
                            if s == j { v[j][d] } else { 0.0 }
                        } else {
                            dot(&wv[d], &streams[j][s])
                        };
                        mixed_streams[i][s][d] += alpha * of_stream;
                    }
                }
            }
        }
    }
    let bias = if first {
        bo.clone()
    } else {
        plus(&times(&wo, &bv), &bo)
    };
    let up = matrix(model, &format!("{path}.feedforward.up.weight"));
    let up_bias = vector(model, &format!("{path}.feedforward.up.bias"));
    let down = matrix(model, &format!("{path}.feedforward.down.weight"));
    let down_bias = vector(model, &format!("{path}.feedforward.down.bias"));
    for i in 0..length {
        x[i] = plus(&x[i], &plus(&times(&wo, &mixed[i]), &bo));
        for s in 0..length {
            streams[i][s] = plus(&streams[i][s], &times(&wo, &mixed_streams[i][s]));
        }
        split(&mut streams[i], &bias);
        norm(
            model,
            &format!("{path}.attention_norm"),
            &mut x[i],
            &mut streams[i],
        );

        let before = plus(&times(&up, &x[i]), &up_bias);
        let after: Vector = before.iter().map(|v| gelu(*v)).collect();
        let mut hidden: Vec<Vector> = streams[i].iter().map(|s| times(&up, s)).collect();
        split(&mut hidden, &up_bias);
        for stream in &mut hidden {
            for (t, s) in stream.iter_mut().enumerate() {
                *s *= after[t] / before[t];
            }
        }
        let mut out: Vec<Vector> = hidden.iter().map(|s| times(&down, s)).collect();
        split(&mut out, &down_bias);
        x[i] = plus(&x[i], &plus(&times(&down, &after), &down_bias));
        for (stream, out) in streams[i].iter_mut().zip(&out) {
            *stream = plus(stream, out);
        }
        norm(
            model,
            &format!("{path}.feedforward_norm"),
            &mut x[i],
            &mut streams[i],
        );
    }
}

/// `[class][token]`
fn scores(model: &Model) -> Vec<Vector> {
    let table = matrix(model, "embeddings.tokens.weight");
    let positions = matrix(model, "embeddings.positions.weight");
    let types = matrix(model, "embeddings.token_types.weight");
    let length = IDS.len();
    let mut x = Vec::new();
    let mut streams = Vec::new();
    for (i, id) in IDS.iter().enumerate() {
        let mut embedded = plus(&plus(&table[*id as usize], &positions[i]), &types[0]);
        norm(model, "embeddings.norm", &mut embedded, &mut []);
        let mut own = vec![vec![0.0; embedded.len()]; length];
        own[i] = embedded.clone();
        x.push(embedded);
        streams.push(own);
    }
    block(model, "blocks.0", &mut x, &mut streams, true);
    block(model, "blocks.1", &mut x, &mut streams, false);

    let dense = matrix(model, "head.hidden.weight");
    let dense_bias = vector(model, "head.hidden.bias");
    let before = plus(&times(&dense, &x[0]), &dense_bias);
    let mut pooled: Vec<Vector> = streams[0].iter().map(|s| times(&dense, s)).collect();
    split(&mut pooled, &dense_bias);
    for stream in &mut pooled {
        for (d, s) in stream.iter_mut().enumerate() {
            *s *= before[d].tanh() / before[d];
        }
    }
    let output = matrix(model, "head.output.weight");
    let output_bias = vector(model, "head.output.bias");
    let mut by_class = Vec::new();
    for (class, row) in output.iter().enumerate() {
        let mut of_class: Vec<Vector> = pooled.iter().map(|s| vec![dot(row, s)]).collect();
        split(&mut of_class, &[output_bias[class]]);
        by_class.push(of_class.into_iter().flatten().collect());
    }
    by_class
}

#[test]
fn scores_equal_those_of_plain_loops() {
    for seed in [21, 22] {
        let model = model(ENCODER, seed);
        for (class, expected) in scores(&model).into_iter().enumerate() {
            let target = Target::class(class);
            let rules = StreamRules::default();
            let found = decompx(&model, &tokens(&IDS), None, target, rules).unwrap();
            let largest = expected.iter().fold(0.0, |m: f64, v| m.max(v.abs()));
            for (found, expected) in found.scores.iter().zip(&expected) {
                let error = (found - expected).abs() / largest;
                assert!(error < 1e-9, "{found} {expected}");
            }
        }
    }
}
