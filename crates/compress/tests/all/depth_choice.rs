//! Which blocks are left out, against scores laid out by hand on sequences run one by one.
#![allow(clippy::unwrap_used)]

use crate::common::{DECODER, GATED, close, cut, input, model, values, windows, with_blocks};
use lapidary_compress::{CalibrationData, Change, Compressed, Example, angular_distances};
use lapidary_model::{Model, Pass};
use lapidary_signal::Trace;

/// `[token][feature]`.
type Rows = Vec<Vec<f64>>;

const BLOCKS: usize = 6;

/// How much of what it would write each block writes, so that neither the first nor the last count least.
const WRITES: [f64; BLOCKS] = [0.3, 1.0, 0.1, 0.6, 0.05, 0.8];

fn uneven(spec: &str, seed: u64) -> Model {
    let whole = model(&with_blocks(spec, BLOCKS), seed);
    let mut parameters = whole.parameters().clone();
    for (name, parameter) in &mut parameters {
        for (block, share) in WRITES.iter().enumerate() {
            for writer in ["attention.output.", "feedforward.down."] {
                if name.starts_with(&format!("blocks.{block}.{writer}")) {
                    *parameter = (&*parameter * *share).unwrap();
                }
            }
        }
    }
    Model::new(whole.spec().clone(), &mut parameters).unwrap()
}

/// What a model writes at a site, `[example][token][feature]`.
fn written(model: &Model, data: &CalibrationData, site: &str) -> Vec<Rows> {
    let of = |example: &Example| -> Rows {
        let trace = Trace::new().capture(site).unwrap();
        let pass = Pass {
            trace: Some(&trace),
            ..Pass::default()
        };
        model.forward(&input(example), pass).unwrap();
        let found = values(trace.signal(site).unwrap().value());
        found.chunks(16).map(<[f64]>::to_vec).collect()
    };
    data.examples().iter().map(of).collect()
}

fn cosine(a: &[f64], b: &[f64]) -> f64 {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

/// The places of the least scores, in order of place.
fn least(scores: &[f64], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|a, b| scores[*a].total_cmp(&scores[*b]));
    order.truncate(count);
    order.sort_unstable();
    order
}

/// The places of what went, in a report with as many modules as the model has blocks.
fn gone(compressed: &Compressed) -> Vec<usize> {
    assert_eq!(compressed.report.modules.len(), BLOCKS);
    let modules = compressed.report.modules.iter().enumerate();
    modules
        .filter(|(_, module)| !matches!(module.change, Change::Leave { .. }))
        .map(|(index, _)| index)
        .collect()
}

/// `1 − E[cos]` over all tokens of each block.
fn turns(before: &[Rows], behind: &[Rows]) -> Vec<f64> {
    let of = |(before, behind): (&Rows, &Rows)| {
        assert_eq!(before.len(), behind.len());
        let cosines = before.iter().zip(behind).map(|(a, b)| cosine(a, b));
        1.0 - cosines.sum::<f64>() / before.len() as f64
    };
    before.iter().zip(behind).map(of).collect()
}

/// Of the stream before and behind a block, or before and behind the sum with its attention.
#[test]
fn what_turns_the_stream_least_goes() {
    let data = windows(9, 6);
    for (spec, seed) in [(DECODER, 6), (GATED, 3)] {
        let model = uneven(spec, seed);
        let each = |site: &str| -> Vec<Rows> {
            (0..BLOCKS)
                .map(|block| written(&model, &data, &format!("blocks.{block}.{site}")).concat())
                .collect()
        };
        let before = each("in");
        let mut summed = each("attention.out");
        for (row, x) in summed.iter_mut().flatten().zip(before.iter().flatten()) {
            for (sum, x) in row.iter_mut().zip(x) {
                *sum += x;
            }
        }
        for (method, scores) in [
            ("block-influence", turns(&before, &each("out"))),
            ("attention-cosine", turns(&before, &summed)),
        ] {
            let two = least(&scores, 2);
            assert!(two != [0, 1] && two != [4, 5], "{method}: {scores:?}");
            for count in 1..=4 {
                let keep = 1.0 - count as f64 / BLOCKS as f64;
                let compressed = cut(&model, &data, method, keep);
                let expected = least(&scores, count);
                assert_eq!(gone(&compressed), expected, "{method}: {scores:?}");
            }
        }
    }
}

/// `(1/π) arccos cos` of the streams behind a block and behind one further on: of the last token of each
/// sequence, which alone has seen all of it, or of every token where all of them have.
fn distances(model: &Model, data: &CalibrationData, further: usize, last: bool) -> Vec<f64> {
    let stream = |block: usize| written(model, data, &format!("blocks.{block}.out"));
    (0..BLOCKS - further)
        .map(|block| {
            let mut angles = Vec::new();
            for (from, to) in stream(block).iter().zip(&stream(block + further)) {
                let first = if last { from.len() - 1 } else { 0 };
                let rows = from[first..].iter().zip(&to[first..]);
                angles.extend(rows.map(|(a, b)| cosine(a, b).acos() / std::f64::consts::PI));
            }
            angles.iter().sum::<f64>() / angles.len() as f64
        })
        .collect()
}

#[test]
fn distances_are_of_the_last_token_of_each_sequence() {
    let data = windows(7, 3);
    let both = DECODER.replace(", causal = true", "");
    for (spec, last) in [(DECODER, true), (both.as_str(), false)] {
        let model = uneven(spec, 6);
        for further in 1..=3 {
            let expected = distances(&model, &data, further, last);
            for batch in [1, 3, 7] {
                let found = angular_distances(&model, &data, batch, further).unwrap();
                close(&found, &expected, 1e-9);
            }
        }
    }
}

#[test]
fn a_run_is_replaced_where_the_stream_turns_least() {
    let data = windows(30, 3);
    for (spec, seed) in [(DECODER, 6), (GATED, 3)] {
        let model = uneven(spec, seed);
        for count in 1..=3 {
            let scores = distances(&model, &data, count, true);
            let first = least(&scores, 1)[0] + 1;
            let keep = 1.0 - count as f64 / BLOCKS as f64;
            let expected: Vec<usize> = (first..first + count).collect();
            for method in ["replaceme", "replaceme-cosine"] {
                let compressed = cut(&model, &data, method, keep);
                assert_eq!(gone(&compressed), expected, "{method}: {scores:?}");
            }
        }
    }
}
