//! Softmax with a filter of each head beside it, against sums over neighbours.
#![allow(clippy::panic, clippy::unwrap_used)]

use crate::common::attention::{Given, HEAD_WIDTH, HEADS, Subject, WIDTH, mask};
use crate::common::{assert_near, contracted, difference, gradient_error, random, values};
use lapidary_kernels::Tensor;
use lapidary_parts::Context;
use lapidary_parts::attention::{LocalFilter, MultiHeadSpec};
use lapidary_signal::{Signal, Trace};

fn subject(local: Option<LocalFilter>) -> Subject {
    let spec = MultiHeadSpec {
        local,
        ..MultiHeadSpec::new(HEADS)
    };
    Subject::new(spec, 4)
}

/// A line, and images of rows of four tokens.
fn filters() -> [LocalFilter; 3] {
    [(3, None), (3, Some(4)), (5, Some(4))].map(|(side, columns)| LocalFilter { side, columns })
}

/// What the filters of `local` make of values `[token, head, feature]`, where tokens are real.
fn filtered(local: LocalFilter, taps: &[f64], v: &[f64], real: &[bool]) -> Vec<f64> {
    let length = real.len();
    let columns = local.columns.unwrap_or(length);
    let half = (local.side / 2) as isize;
    let high = local.columns.map_or(0, |_| half);
    let size = taps.len() / HEADS;
    let mut all = vec![0.0; v.len()];
    for token in 0..length {
        let (row, column) = ((token / columns) as isize, (token % columns) as isize);
        for (down, across) in (-high..=high).flat_map(|r| (-half..=half).map(move |c| (r, c))) {
            let (row, column) = (row + down, column + across);
            if row < 0 || column < 0 || column >= columns as isize {
                continue;
            }
            let from = row as usize * columns + column as usize;
            if from >= length || !real[from] {
                continue;
            }
            let tap = ((down + high) * local.side as isize + across + half) as usize;
            for feature in 0..WIDTH {
                let weight = taps[feature / HEAD_WIDTH * size + tap];
                all[token * WIDTH + feature] += weight * v[from * WIDTH + feature];
            }
        }
    }
    all
}

#[test]
fn what_is_near_is_added_to_what_is_mixed() {
    let length = 10;
    let x = random(&[1, length, WIDTH], 1);
    let rows: [Vec<u8>; 2] = [vec![1; length], vec![1, 1, 1, 0, 1, 1, 1, 1, 0, 0]];
    for local in filters() {
        let with = subject(Some(local));
        let without = Subject {
            spec: MultiHeadSpec::new(HEADS),
            map: with.map.clone(),
        };
        let taps = values(&with.map["local"]);
        for row in &rows {
            let keep = mask(&[row.as_slice()]);
            let given = Given {
                keep: Some(&keep),
                ..Given::default()
            };
            let [found, plain] = [&with, &without].map(|subject| subject.run(&x, given));
            // Weights are those of softmax alone.
            assert_eq!(found.weights, plain.weights);
            let real: Vec<bool> = row.iter().map(|kept| *kept == 1).collect();
            let near = filtered(local, &taps, &plain.v, &real);
            for ((found, plain), near) in found.mixed.iter().zip(&plain.mixed).zip(&near) {
                let expected = plain + near;
                assert!(
                    (found - expected).abs() < 1e-12,
                    "{local:?}: {found} {expected}"
                );
            }
        }
    }
}

#[test]
fn gradients_equal_central_differences() {
    let x = random(&[1, 7, WIDTH], 1);
    for local in filters() {
        let subject = subject(Some(local));
        let mut inputs = subject.map.clone();
        inputs.insert("x".to_owned(), x.clone());
        let error = gradient_error(&inputs, 2, |inputs| {
            let subject = Subject {
                spec: subject.spec.clone(),
                map: inputs.clone(),
            };
            contracted(&subject.output(&inputs["x"], Given::default()))
        });
        assert!(error < 1e-6, "{local:?}: {error:e}");
    }
}

/// Dropout of weights lays them out, and leaves what is near alone.
#[test]
fn dropped_weights_leave_the_filter_alone() {
    let x = random(&[2, 8, WIDTH], 1);
    let mut with = subject(Some(filters()[0]));
    with.spec.dropout = 0.5;
    let mut without = Subject {
        spec: with.spec.clone(),
        map: with.map.clone(),
    };
    without.spec.local = None;
    let mixed = |subject: &Subject, dropout_seed| {
        let given = Given {
            dropout_seed,
            ..Given::default()
        };
        let (_, trace) = subject.pass(&x, given, "*.mixed");
        trace.signal(".mixed").unwrap().value().clone()
    };
    let near = |seed| (mixed(&with, seed) - mixed(&without, seed)).unwrap();
    assert_near(&near(Some(3)), &near(None), 1e-12, "near");
    assert!(difference(&mixed(&with, Some(3)), &mixed(&with, None)) > 1e-3);
}

/// Tokens that stand for others, or elsewhere, have no neighbours.
#[test]
fn what_has_no_neighbours_is_refused() {
    let x = random(&[1, 4, WIDTH], 1);
    let bias = Tensor::zeros((1, 4), x.dtype(), x.device()).unwrap();
    let trace = Trace::new();
    let cx = Context {
        key_bias: Some(&bias),
        ..Context::new(&trace)
    };
    let attention = subject(Some(filters()[0])).attention();
    let said = attention.forward(&Signal::from(x), &cx, None).unwrap_err();
    assert!(said.to_string().contains("beside the filter"), "{said}");
    let shared = MultiHeadSpec {
        groups: Some(1),
        ..subject(Some(filters()[0])).spec
    };
    let said = shared.validate(WIDTH, "b").unwrap_err().to_string();
    assert!(said.starts_with("b.local is"), "{said}");
}
