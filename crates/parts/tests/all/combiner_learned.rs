//! What Combiner can learn: summaries by a layer, and divisions by what tokens say.
#![allow(clippy::panic, clippy::unwrap_used, reason = "tests fail by panicking")]

use crate::combiner::{Span, divisions, effective, scaled};
use crate::common::attention::{
    Given, HEAD_WIDTH, HEADS, Run, Subject, WIDTH, dot, mask, softmax, spec,
};
use crate::common::{assert_near, contracted, difference, gradient_error, random, tensor, values};
use lapidary_kernels::Tensor;
use lapidary_parts::attention::MultiHeadSpec;
use lapidary_parts::attention::mechanism::MechanismSpec;
use lapidary_parts::attention::mechanism::combiner::{
    CombinerForm, CombinerSpec, Fit, Pooling, RowSource, Summary,
};

const POOLINGS: [Pooling; 3] = [Pooling::Max, Pooling::Mean, Pooling::Sum];

fn subject(combiner: CombinerSpec, causal: bool) -> Subject {
    Subject::new(spec(MechanismSpec::Combiner(combiner), causal), 4)
}

fn with_layer(form: CombinerForm, pooling: Pooling) -> CombinerSpec {
    CombinerSpec {
        summary: Summary::DeepSets { pooling },
        ..CombinerSpec::new(form)
    }
}

/// Forms whose spans are pooled, and whether they are causal.
fn pooled_forms() -> Vec<(CombinerForm, bool)> {
    vec![
        (CombinerForm::Fixed { segment: 3 }, true),
        (CombinerForm::Fixed { segment: 4 }, false),
        (CombinerForm::LogSparse, true),
        (CombinerForm::LogSparse, false),
        (CombinerForm::Vertical { columns: 4 }, true),
        (CombinerForm::Horizontal { columns: 3 }, true),
        (
            CombinerForm::Mixture {
                columns: 4,
                joint: false,
            },
            true,
        ),
    ]
}

fn pool(by: Pooling, rows: &[Vec<f64>]) -> Vec<f64> {
    let count = rows.len() as f64;
    (0..HEAD_WIDTH)
        .map(|f| {
            let all = rows.iter().map(|row| row[f]);
            match by {
                Pooling::Max => all.fold(f64::NEG_INFINITY, f64::max),
                Pooling::Mean => all.sum::<f64>() / count,
                Pooling::Sum => all.sum(),
            }
        })
        .collect()
}

/// What the layer `side` of a head makes of a row.
fn layer(subject: &Subject, side: &str, head: usize, x: &[f64]) -> Vec<f64> {
    let weight = values(&subject.map[&format!("mechanism.summary.{side}.weight")]);
    let bias = values(&subject.map[&format!("mechanism.summary.{side}.bias")]);
    (0..HEAD_WIDTH)
        .map(|f| {
            let row = head * HEAD_WIDTH + f;
            (dot(&weight[row * HEAD_WIDTH..][..HEAD_WIDTH], x) + bias[row]).max(0.0)
        })
        .collect()
}

#[test]
fn summaries_by_a_layer_equal_their_effective_matrix() {
    for length in [1, 7, 13] {
        let x = random(&[2, length, WIDTH], 1);
        for (form, causal) in pooled_forms() {
            for pooling in POOLINGS {
                let subject = subject(with_layer(form, pooling), causal);
                let run = subject.run(&x, Given::default());
                let expected = |b: usize, head: usize, i: usize| {
                    let divisions = divisions(form, causal, length, i);
                    effective(
                        &run,
                        [b, head, i],
                        &divisions,
                        false,
                        &|(span, _): &Span| {
                            let made = |side: &str, of: &dyn Fn(usize) -> Vec<f64>| {
                                let rows =
                                    span.iter().map(|&j| layer(&subject, side, head, &of(j)));
                                pool(pooling, &rows.collect::<Vec<_>>())
                            };
                            [
                                made("query", &|j| run.query(b, head, j).to_vec()),
                                made("key", &|j| run.key(b, head, j).to_vec()),
                            ]
                        },
                    )
                };
                let what = format!("{form:?} {pooling:?} causal {causal} at {length}");
                run.check(2, expected, 1e-11, &what);
            }
        }
    }
}

fn projected(columns: usize, of: RowSource) -> CombinerSpec {
    CombinerSpec {
        summary: Summary::Projected { of },
        ..CombinerSpec::new(CombinerForm::RowMajor { columns })
    }
}

/// `W x + b` of a head, by the layer `side`.
fn affine(subject: &Subject, side: &str, head: usize, x: &[f64]) -> Vec<f64> {
    let weight = values(&subject.map[&format!("mechanism.summary.{side}.weight")]);
    let bias = values(&subject.map[&format!("mechanism.summary.{side}.bias")]);
    let rows = head * HEAD_WIDTH..(head + 1) * HEAD_WIDTH;
    rows.map(|row| dot(&weight[row * x.len()..][..x.len()], x) + bias[row])
        .collect()
}

/// `W₂ N(k_c + W₁ k̄ + b₁) + b₂`, and of `v̄` of another width than keys.
#[test]
fn projected_rows_equal_their_effective_matrix() {
    let shapes = [(1, 3), (9, 3), (13, 4), (6, 1)];
    let sources = [
        (RowSource::Keys, None),
        (RowSource::Values, None),
        (RowSource::Values, Some(5)),
    ];
    let all = shapes
        .into_iter()
        .flat_map(|shape| sources.map(|source| (shape, source)));
    for ((length, columns), (of, value_width)) in all {
        let x = random(&[2, length, WIDTH], 1);
        let subject = Subject::new(
            MultiHeadSpec {
                value_width,
                ..spec(MechanismSpec::Combiner(projected(columns, of)), true)
            },
            4,
        );
        let run = subject.run(&x, Given::default());
        // Keys, or values, by features of a head.
        let (read, width) = match of {
            RowSource::Keys => (&run.k, HEAD_WIDTH),
            RowSource::Values => (&run.v, value_width.unwrap_or(HEAD_WIDTH)),
        };
        let read = |b: usize, head: usize, j: usize| {
            let row = (b * length + j) * HEADS + head;
            &read[row * width..][..width]
        };
        let form = CombinerForm::RowMajor { columns };
        let made = |b: usize, head: usize, (span, by): &Span| {
            let by = by.unwrap();
            let query = run.query(b, head, by);
            let scores = span.iter().map(|&j| scaled(query, run.key(b, head, j)));
            let weights = softmax(&scores.collect::<Vec<_>>());
            let weighted: Vec<f64> = (0..width)
                .map(|f| {
                    let each = span.iter().zip(&weights);
                    each.map(|(&j, w)| w * read(b, head, j)[f]).sum()
                })
                .collect();
            let moved = affine(&subject, "inner", head, &weighted);
            let own = run.key(b, head, by);
            let sum: Vec<f64> = own.iter().zip(&moved).map(|(a, b)| a + b).collect();
            let mean = sum.iter().sum::<f64>() / HEAD_WIDTH as f64;
            let variance = sum.iter().map(|s| (s - mean).powi(2)).sum::<f64>() / HEAD_WIDTH as f64;
            let normed: Vec<f64> = sum
                .iter()
                .map(|s| (s - mean) / (variance + 1e-5).sqrt())
                .collect();
            [query.to_vec(), affine(&subject, "outer", head, &normed)]
        };
        let expected = |b: usize, head: usize, i: usize| {
            let divisions = divisions(form, true, length, i);
            effective(&run, [b, head, i], &divisions, false, &|span: &Span| {
                made(b, head, span)
            })
        };
        let what = format!("rows of {columns} at {length} of {of:?} {value_width:?}");
        match value_width {
            None => run.check(2, expected, 1e-11, &what),
            // The check of what is mixed is for values as wide as keys.
            Some(_) => check_weights(&run, expected, &what),
        }
    }
}

/// Weights are the rows that are expected, and `mixed` is these times values.
fn check_weights(run: &Run, expected: impl Fn(usize, usize, usize) -> Vec<f64>, what: &str) {
    let length = run.length;
    let width = run.v.len() / (2 * length * HEADS);
    let value = |b: usize, head: usize, j: usize| {
        let row = (b * length + j) * HEADS + head;
        &run.v[row * width..][..width]
    };
    for (b, head) in (0..2).flat_map(|b| (0..HEADS).map(move |head| (b, head))) {
        for i in 0..length {
            let row = expected(b, head, i);
            assert_eq!(row.len(), length, "{what}");
            for (j, weight) in row.iter().enumerate() {
                let found = run.weight(b, head, i, j);
                assert!((found - weight).abs() < 1e-11, "{what}: {found} {weight}");
            }
            for f in 0..width {
                let mixed: f64 = row
                    .iter()
                    .enumerate()
                    .map(|(j, w)| w * value(b, head, j)[f])
                    .sum();
                let found = run.mixed[((b * length + i) * HEADS + head) * width + f];
                assert!((found - mixed).abs() < 1e-11, "{what}: {found} {mixed}");
            }
        }
    }
}

/// Of values other weights are made than of keys, and saved specs of keys are as before.
#[test]
fn sources_of_rows_are_told_apart() {
    let x = random(&[1, 9, WIDTH], 1);
    let [keys, of_values] =
        [RowSource::Keys, RowSource::Values].map(|of| subject(projected(3, of), true));
    // As many parameters of the same names where values are as wide as keys.
    let same = Subject {
        spec: of_values.spec.clone(),
        map: keys.map.clone(),
    };
    let [a, b] = [&keys, &same].map(|of| of.output(&x, Given::default()));
    assert!(difference(&a, &b) > 1e-3);
    // The first row reads itself alone.
    let first = |y: &Tensor| y.narrow(1, 0, 3).unwrap();
    assert_near(&first(&a), &first(&b), 1e-12, "first row");
    let written = |of| toml::to_string(&projected(3, of)).unwrap();
    assert!(!written(RowSource::Keys).contains("of ="));
    for of in [RowSource::Keys, RowSource::Values] {
        let read: CombinerSpec = toml::from_str(&written(of)).unwrap();
        assert_eq!(read, projected(3, of));
    }
}

/// The cluster of a query or key of a head, by the angles to its centroids.
fn cluster(subject: &Subject, clusters: usize, head: usize, x: &[f64]) -> usize {
    let centroids = values(&subject.map["mechanism.centroids"]);
    let cosine = |cluster: usize| {
        let centroid = &centroids[(head * clusters + cluster) * HEAD_WIDTH..][..HEAD_WIDTH];
        dot(centroid, x) / dot(centroid, centroid).sqrt()
    };
    (0..clusters).fold(
        0,
        |best, at| if cosine(at) > cosine(best) { at } else { best },
    )
}

/// What a query meets: keys of its cluster, and those of every other one.
fn routed(
    subject: &Subject,
    run: &Run,
    [b, head, i]: [usize; 3],
    (clusters, causal): (usize, bool),
) -> (Vec<usize>, Vec<Span>) {
    let own = cluster(subject, clusters, head, run.query(b, head, i));
    let members = |of: usize| -> Vec<usize> {
        (0..run.length)
            .filter(|&j| !causal || j <= i)
            .filter(|&j| cluster(subject, clusters, head, run.key(b, head, j)) == of)
            .collect()
    };
    let others = (0..clusters).filter(|other| *other != own).map(members);
    let there = others.filter(|span| !span.is_empty());
    (members(own), there.map(|span| (span, None)).collect())
}

#[test]
fn routed_attention_equals_its_effective_matrix() {
    for length in [1, 2, 9, 14] {
        let x = random(&[2, length, WIDTH], 1);
        for (clusters, causal) in [(1, true), (2, true), (4, true), (1, false), (3, false)] {
            for log_count in [false, true] {
                let combiner = CombinerSpec {
                    log_count,
                    ..CombinerSpec::new(CombinerForm::Routed { clusters })
                };
                let subject = subject(combiner, causal);
                let run = subject.run(&x, Given::default());
                let largest = |b: usize, head: usize, span: &[usize]| {
                    let rows = |of: &dyn Fn(usize) -> Vec<f64>| {
                        pool(
                            Pooling::Max,
                            &span.iter().map(|&j| of(j)).collect::<Vec<_>>(),
                        )
                    };
                    [
                        rows(&|j| run.query(b, head, j).to_vec()),
                        rows(&|j| run.key(b, head, j).to_vec()),
                    ]
                };
                let expected = |b: usize, head: usize, i: usize| {
                    let one = routed(&subject, &run, [b, head, i], (clusters, causal));
                    effective(
                        &run,
                        [b, head, i],
                        &[one],
                        log_count,
                        &|(span, _): &Span| largest(b, head, span),
                    )
                };
                let what = format!("{clusters} clusters, causal {causal} at {length}");
                run.check(2, expected, 1e-11, &what);
                // Everything that may be seen is, and in one part.
                for (head, i) in (0..HEADS).flat_map(|head| (0..length).map(move |i| (head, i))) {
                    for j in 0..length {
                        assert_eq!(run.weight(0, head, i, j) > 0.0, !causal || j <= i);
                    }
                }
            }
        }
    }
}

#[test]
fn one_cluster_is_softmax() {
    let x = random(&[2, 9, WIDTH], 1);
    for causal in [true, false] {
        let one = subject(
            CombinerSpec::new(CombinerForm::Routed { clusters: 1 }),
            causal,
        );
        let mut dense = one.map.clone();
        dense.remove("centroids");
        let dense = Subject {
            spec: spec(MechanismSpec::Softmax, causal),
            map: dense,
        };
        let [found, expected] = [&one, &dense].map(|of| of.output(&x, Given::default()));
        assert_near(&found, &expected, 1e-12, "one cluster");
    }
}

/// Causal attention of every learned sort.
fn learned() -> Vec<CombinerSpec> {
    let mut all: Vec<CombinerSpec> = pooled_forms()
        .into_iter()
        .filter(|(_, causal)| *causal)
        .flat_map(|(form, _)| POOLINGS.map(|pooling| with_layer(form, pooling)))
        .collect();
    for of in [RowSource::Keys, RowSource::Values] {
        all.extend([projected(3, of), projected(4, of)]);
    }
    let routed = CombinerForm::Routed { clusters: 3 };
    all.push(CombinerSpec::new(routed));
    all.push(CombinerSpec {
        log_count: true,
        ..with_layer(routed, Pooling::Mean)
    });
    all
}

#[test]
fn learned_summaries_and_divisions_do_not_see_the_future() {
    let (length, kept) = (13, 6);
    let x = random(&[1, length, WIDTH], 1);
    let later = random(&[1, length - kept, WIDTH], 2);
    let other = Tensor::cat(&[&x.narrow(1, 0, kept).unwrap(), &later], 1).unwrap();
    for combiner in learned() {
        let subject = subject(combiner.clone(), true);
        let [a, b] = [&x, &other].map(|x| subject.output(x, Given::default()));
        let part = |y: &Tensor, from: usize, count: usize| y.narrow(1, from, count).unwrap();
        // Later tokens change the lengths of the lists that earlier ones are added up in.
        let (before, after) = (part(&a, 0, kept), part(&b, 0, kept));
        assert_near(&before, &after, 1e-14, &format!("{combiner:?}"));
        let rest = length - kept;
        assert!(difference(&part(&a, kept, rest), &part(&b, kept, rest)) > 1e-3);
    }
}

#[test]
fn decoding_equals_the_parallel_pass() {
    let x = random(&[2, 13, WIDTH], 1);
    for combiner in learned() {
        let subject = subject(combiner.clone(), true);
        let whole = subject.output(&x, Given::default());
        for steps in [&[1; 13][..], &[5, 1, 7], &[12, 1]] {
            let stepped = subject.decode(&x, steps);
            assert_near(&stepped, &whole, 1e-12, &format!("{combiner:?}"));
        }
    }
}

#[test]
fn pads_are_not_there() {
    for combiner in learned() {
        subject(combiner.clone(), true).check_pads(&format!("{combiner:?}"));
    }
}

#[test]
fn gradients_equal_central_differences() {
    let x = random(&[1, 9, WIDTH], 1);
    for combiner in learned() {
        let subject = subject(combiner.clone(), true);
        let mut inputs = subject.map.clone();
        inputs.insert("x".to_owned(), x.clone());
        let error = gradient_error(&inputs, 2, |inputs| {
            let subject = Subject {
                spec: subject.spec.clone(),
                map: inputs.clone(),
            };
            contracted(&subject.output(&inputs["x"], Given::default()))
        });
        assert!(error < 1e-6, "{combiner:?}: {error:e}");
    }
}

/// Pairs of queries and keys, of queries and summaries, of summaries and their tokens, and the products
/// with centroids.
#[test]
fn work_is_that_of_the_clusters_that_are_met() {
    let (length, clusters) = (20, 3);
    let combiner = CombinerSpec::new(CombinerForm::Routed { clusters });
    let found = Subject::new(spec(MechanismSpec::Combiner(combiner), true), 1);
    // As `mixing_operations` draws them.
    let x = random(&[1, length, WIDTH], 3);
    let run = found.run(&x, Given::default());
    let (mut pairs, mut merged) = (0, 0);
    for head in 0..HEADS {
        let mut made = std::collections::BTreeSet::new();
        for i in 0..length {
            let (direct, spans) = routed(&found, &run, [0, head, i], (clusters, true));
            pairs += direct.len() + spans.len();
            made.extend(spans.into_iter().map(|(span, _)| span));
        }
        pairs += made.iter().map(Vec::len).sum::<usize>();
        merged += 2 * length * (2 * HEAD_WIDTH + 4);
    }
    let centroids = 2 * HEADS * length * 2 * clusters * HEAD_WIDTH;
    let expected = pairs * (4 * HEAD_WIDTH + 5) + merged + centroids;
    assert_eq!(found.mixing_operations(length), expected as u64);
}

/// Tokens around a few directions: k-means finds these, the same with the same seed, and no round makes
/// it worse.
#[test]
fn centroids_are_found_by_k_means() {
    let (clusters, length, width) = (3, 30, 4);
    let directions = [
        [3.0, 0.0, 0.0, 0.0],
        [0.0, -2.0, 1.0, 0.0],
        [-1.0, 0.0, 0.0, 2.0],
    ];
    let around = |seed: u64| {
        let noise = values(&random(&[2, 2, length, width], seed));
        let rows = noise.chunks(width).enumerate();
        let near = rows.flat_map(|(at, noise)| {
            let direction = directions[at % clusters];
            // Lengths decide nothing.
            let size = 1.0 + (at % 5) as f64;
            let x: Vec<f64> = (0..width)
                .map(|f| size * (direction[f] + 0.1 * noise[f]))
                .collect();
            x
        });
        tensor(near.collect(), &[2, 2, length, width])
    };
    let (q, k) = (around(1), around(2));
    let combiner = CombinerSpec::new(CombinerForm::Routed { clusters });
    let mut best = 0.0f64;
    for seed in 0..6 {
        let fit = Fit {
            seed,
            ..Fit::default()
        };
        let fitted = combiner.fit([&q, &k], None, &fit).unwrap();
        let again = combiner.fit([&q, &k], None, &fit).unwrap();
        let centroids = values(&fitted.parameters["centroids"]);
        assert_eq!(centroids, values(&again.parameters["centroids"]));
        for (head, rounds) in fitted.likeness.iter().enumerate() {
            assert!(
                rounds.windows(2).all(|pair| pair[1] >= pair[0] - 1e-12),
                "{rounds:?}"
            );
            let last = *rounds.last().unwrap();
            best = best.max(last);
            if last < 0.97 {
                // A start that two of the directions share may stay where it is.
                continue;
            }
            for direction in directions {
                let length = dot(&direction, &direction).sqrt();
                let own = centroids[head * clusters * width..]
                    .chunks(width)
                    .take(clusters);
                let cosines = own.map(|centroid| dot(centroid, &direction) / length);
                assert!(cosines.fold(0.0, f64::max) > 0.99);
            }
        }
    }
    assert!(best > 0.97, "{best}");
}

#[test]
fn what_cannot_be_clustered_is_refused() {
    let x = random(&[1, 2, 3, 4], 1);
    let said = |form, keep: Option<&Tensor>| {
        let fitted = CombinerSpec::new(form).fit([&x, &x], keep, &Fit::default());
        fitted.unwrap_err().to_string()
    };
    let other = said(CombinerForm::LogSparse, None);
    assert!(
        other.contains("must be routed, the form that has centroids"),
        "{other}"
    );
    // Two queries and two keys are left.
    let keep = mask(&[&[1, 1, 0]]);
    let few = said(CombinerForm::Routed { clusters: 5 }, Some(&keep));
    assert_eq!(
        few,
        "queries and keys of a head is 4, but must be at least 5, as many as clusters"
    );
}
