//! Combiner against its effective matrix, made here from the definition of each form.
#![allow(clippy::panic, clippy::unwrap_used)]

use crate::common::attention::{
    Given, HEAD_WIDTH, HEADS, Run, Subject, WIDTH, dot, growth, softmax, spec,
};
use crate::common::{assert_near, contracted, gradient_error, random, values};
use lapidary_kernels::Tensor;
use lapidary_parts::attention::mechanism::MechanismSpec;
use lapidary_parts::attention::mechanism::combiner::{CombinerForm, CombinerSpec};

fn subject(form: CombinerForm, log_count: bool, causal: bool) -> Subject {
    let mechanism = MechanismSpec::Combiner(CombinerSpec {
        log_count,
        ..CombinerSpec::new(form)
    });
    Subject::new(spec(mechanism, causal), 4)
}

fn causal_forms() -> Vec<CombinerForm> {
    let mut all = vec![CombinerForm::LogSparse];
    for size in [1, 3, 4, 20] {
        all.push(CombinerForm::Fixed { segment: size });
        all.push(CombinerForm::Vertical { columns: size });
        all.push(CombinerForm::Horizontal { columns: size });
        all.push(CombinerForm::RowMajor { columns: size });
        all.push(CombinerForm::Mixture {
            columns: size,
            joint: false,
        });
        all.push(CombinerForm::Mixture {
            columns: size,
            joint: true,
        });
    }
    all
}

fn forms() -> Vec<(CombinerForm, bool)> {
    let mut all: Vec<_> = causal_forms()
        .into_iter()
        .map(|form| (form, true))
        .collect();
    all.push((CombinerForm::LogSparse, false));
    for segment in [1, 3, 4, 20] {
        all.push((CombinerForm::Fixed { segment }, false));
    }
    all
}

/// A span, and the token whose query it is summed up by, where it isn't the maximum.
pub type Span = (Vec<usize>, Option<usize>);

/// What token `i` meets directly and in spans, in one division of the tokens that it sees.
fn division(form: CombinerForm, causal: bool, length: usize, i: usize) -> (Vec<usize>, Vec<Span>) {
    let seen: Vec<usize> = (0..length).filter(|&j| !causal || j <= i).collect();
    let span = |of: &dyn Fn(usize) -> bool| -> Vec<usize> {
        seen.iter().copied().filter(|&j| of(j)).collect()
    };
    let maximum = |spans: Vec<Vec<usize>>| -> Vec<Span> {
        let there = spans.into_iter().filter(|span| !span.is_empty());
        there.map(|span| (span, None)).collect()
    };
    match form {
        CombinerForm::Fixed { segment } => (
            span(&|j| j / segment == i / segment),
            maximum(
                (0..=length / segment)
                    .filter(|s| *s != i / segment)
                    .map(|s| span(&|j| j / segment == s))
                    .collect(),
            ),
        ),
        CombinerForm::LogSparse => {
            // The binary digits of a position, the lowest first, peel spans off what is before it.
            let before = |position: usize| {
                let (mut end, mut size, mut spans) = (position, 1, Vec::new());
                while end > 0 {
                    if end & size != 0 {
                        spans.push(end - size..end);
                        end -= size;
                    }
                    size *= 2;
                }
                spans
            };
            let mut spans: Vec<Vec<usize>> = before(i).into_iter().map(Iterator::collect).collect();
            if !causal {
                let mirrored = before(length - 1 - i).into_iter();
                spans.extend(mirrored.map(|span| span.map(|j| length - 1 - j).collect()));
            }
            (vec![i], maximum(spans))
        }
        CombinerForm::Vertical { columns } | CombinerForm::Horizontal { columns } => {
            let (row, column) = (i / columns, i % columns);
            let direct = span(&|j| j % columns == column || j / columns == row);
            let spans = match form {
                CombinerForm::Vertical { .. } => (0..columns)
                    .filter(|c| *c != column)
                    .map(|c| span(&|j| j % columns == c && j / columns < row))
                    .collect(),
                _ => (0..row)
                    .flat_map(|r| {
                        [
                            span(&|j| j / columns == r && j % columns < column),
                            span(&|j| j / columns == r && j % columns > column),
                        ]
                    })
                    .collect(),
            };
            (direct, maximum(spans))
        }
        CombinerForm::RowMajor { columns } => {
            let (row, column) = (i / columns, i % columns);
            let spans = (0..row).map(|r| (span(&|j| j / columns == r), Some(r * columns + column)));
            (span(&|j| j / columns == row), spans.collect())
        }
        CombinerForm::Mixture { .. } => unreachable!("a mixture of two"),
        CombinerForm::Routed { .. } => unreachable!("decided by what tokens say"),
    }
}

/// The divisions of a form: the mean is taken over the outer list, one softmax over the inner one.
pub fn divisions(
    form: CombinerForm,
    causal: bool,
    length: usize,
    i: usize,
) -> Vec<(Vec<usize>, Vec<Span>)> {
    match form {
        CombinerForm::Mixture { columns, joint } => {
            let [vertical, horizontal] = [
                CombinerForm::Vertical { columns },
                CombinerForm::Horizontal { columns },
            ]
            .map(|form| division(form, causal, length, i));
            if joint {
                let spans = [vertical.1, horizontal.1].concat();
                return vec![(vertical.0, spans)];
            }
            vec![vertical, horizontal]
        }
        form => vec![division(form, causal, length, i)],
    }
}

pub fn scaled(q: &[f64], k: &[f64]) -> f64 {
    dot(q, k) / (HEAD_WIDTH as f64).sqrt()
}

fn maximum<'a>(of: impl Iterator<Item = &'a [f64]>) -> Vec<f64> {
    of.fold(vec![f64::NEG_INFINITY; HEAD_WIDTH], |most, x| {
        most.iter().zip(x).map(|(a, b)| a.max(*b)).collect()
    })
}

/// Query and key of a span: the maxima over its tokens, or a token's query and what it makes of the keys.
fn summary(run: &Run, [b, head]: [usize; 2], (span, by): &Span) -> [Vec<f64>; 2] {
    let (query, key) = (|j| run.query(b, head, j), |j| run.key(b, head, j));
    let Some(token) = by else {
        return [
            maximum(span.iter().map(|&j| query(j))),
            maximum(span.iter().map(|&j| key(j))),
        ];
    };
    let by = query(*token).to_vec();
    let within: Vec<f64> = span.iter().map(|&j| scaled(&by, key(j))).collect();
    let within = softmax(&within);
    let mean = |f: usize| {
        span.iter()
            .zip(&within)
            .map(|(&j, w)| w * key(j)[f])
            .sum::<f64>()
    };
    [by, (0..HEAD_WIDTH).map(mean).collect()]
}

/// The row of the effective matrix of a query: the mean over divisions of one softmax over what is met
/// directly and the spans, of which `summary` gives query and key.
pub fn effective(
    run: &Run,
    [b, head, i]: [usize; 3],
    divisions: &[(Vec<usize>, Vec<Span>)],
    log_count: bool,
    summary: &dyn Fn(&Span) -> [Vec<f64>; 2],
) -> Vec<f64> {
    let (query, key) = (|j| run.query(b, head, j), |j| run.key(b, head, j));
    let mut total = vec![0.0; run.length];
    for (direct, spans) in divisions {
        let mut scores: Vec<f64> = direct.iter().map(|&j| scaled(query(i), key(j))).collect();
        let mut inner = Vec::new();
        for span in spans {
            let [of_query, of_key] = summary(span);
            let (span, _) = span;
            let within: Vec<f64> = span.iter().map(|&j| scaled(&of_query, key(j))).collect();
            inner.push(softmax(&within));
            let count = if log_count {
                (span.len() as f64).ln()
            } else {
                0.0
            };
            scores.push(scaled(query(i), &of_key) + count);
        }
        let outer = softmax(&scores);
        let share = 1.0 / divisions.len() as f64;
        for (&j, w) in direct.iter().zip(&outer) {
            total[j] += share * w;
        }
        for (((span, _), inner), w) in spans.iter().zip(&inner).zip(&outer[direct.len()..]) {
            for (&j, p) in span.iter().zip(inner) {
                total[j] += share * w * p;
            }
        }
    }
    total
}

#[test]
fn equals_its_effective_matrix() {
    for length in [1, 2, 7, 12, 13] {
        let x = random(&[2, length, WIDTH], 1);
        for (form, causal) in forms() {
            for log_count in [false, true] {
                let run = subject(form, log_count, causal).run(&x, Given::default());
                let expected = |b: usize, head: usize, i: usize| {
                    let divisions = divisions(form, causal, length, i);
                    effective(&run, [b, head, i], &divisions, log_count, &|span: &Span| {
                        summary(&run, [b, head], span)
                    })
                };
                let what = format!("{form:?} causal {causal} at {length}");
                run.check(2, expected, 1e-11, &what);
            }
        }
    }
}

/// Weights are positive on all that a token may see, zero elsewhere, and sum to one.
#[test]
fn support_is_full_and_rows_sum_to_one() {
    for length in [1, 5, 11, 16] {
        let x = random(&[1, length, WIDTH], 1);
        for (form, causal) in forms() {
            let run = subject(form, false, causal).run(&x, Given::default());
            for (head, i) in (0..HEADS).flat_map(|head| (0..length).map(move |i| (head, i))) {
                let row: Vec<f64> = (0..length).map(|j| run.weight(0, head, i, j)).collect();
                assert!((row.iter().sum::<f64>() - 1.0).abs() < 1e-12);
                for (j, &weight) in row.iter().enumerate() {
                    assert_eq!(weight > 0.0, !causal || j <= i, "{form:?}: {i} to {j}");
                }
            }
        }
    }
}

/// Each token that is seen is in one part of a division: the count matrix is all ones, and twice
/// that where both divisions stand under one softmax, the direct ones aside.
#[test]
fn every_token_is_covered_once() {
    for length in 1..=33 {
        for (form, causal) in forms() {
            for i in 0..length {
                for (direct, spans) in divisions(form, causal, length, i) {
                    let joint = matches!(form, CombinerForm::Mixture { joint: true, .. });
                    let mut counts = vec![0; length];
                    for j in direct.iter().chain(spans.iter().flat_map(|(span, _)| span)) {
                        counts[*j] += 1;
                    }
                    for (j, count) in counts.into_iter().enumerate() {
                        let expected = match !causal || j <= i {
                            false => 0,
                            true if joint && !direct.contains(&j) => 2,
                            true => 1,
                        };
                        assert_eq!(count, expected, "{form:?} at {length}: {i} to {j}");
                    }
                }
            }
        }
    }
}

#[test]
fn segments_of_everything_and_of_single_tokens_are_softmax() {
    let x = random(&[2, 9, WIDTH], 1);
    for causal in [true, false] {
        let dense = Subject::new(spec(MechanismSpec::Softmax, causal), 4);
        let expected = dense.output(&x, Given::default());
        for segment in [9, 1] {
            let y = subject(CombinerForm::Fixed { segment }, false, causal);
            let y = y.output(&x, Given::default());
            assert_near(&y, &expected, 1e-12, &format!("segments of {segment}"));
        }
    }
}

/// Where all keys are alike, a span counts as one key, or with `log_count` as its tokens.
#[test]
fn a_span_of_equal_keys_counts_once_or_by_its_tokens() {
    let (length, segment) = (12, 4);
    let x = random(&[1, 1, WIDTH], 1)
        .broadcast_as((1, length, WIDTH))
        .unwrap();
    let x = x.contiguous().unwrap();
    for log_count in [false, true] {
        let form = CombinerForm::Fixed { segment };
        let run = subject(form, log_count, true).run(&x, Given::default());
        // The last token: four directly, and two spans of four.
        let (direct, spanned) = match log_count {
            true => (1.0 / 12.0, 1.0 / 12.0),
            false => (1.0 / 6.0, 1.0 / 24.0),
        };
        for j in 0..length {
            let expected = if j / segment == 2 { direct } else { spanned };
            assert!((run.weight(0, 0, 11, j) - expected).abs() < 1e-12);
        }
    }
}

/// What tokens of one segment give another has rank 1: the ratio of two columns is the same in
/// every row.
#[test]
fn blocks_of_spans_have_rank_one() {
    let (length, segment) = (12, 4);
    let x = random(&[1, length, WIDTH], 1);
    let run = subject(CombinerForm::Fixed { segment }, false, false).run(&x, Given::default());
    for head in 0..HEADS {
        for (of, over) in [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)] {
            let weight =
                |i: usize, j: usize| run.weight(0, head, of * segment + i, over * segment + j);
            for (i, j) in (1..segment).flat_map(|i| (1..segment).map(move |j| (i, j))) {
                let minor = weight(0, 0) * weight(i, j) - weight(0, j) * weight(i, 0);
                assert!(minor.abs() < 1e-14, "{minor:e}");
            }
            // And the diagonal block has not.
            let own = |i: usize, j: usize| run.weight(0, head, of * segment + i, of * segment + j);
            assert!((own(0, 0) * own(1, 1) - own(0, 1) * own(1, 0)).abs() > 1e-6);
        }
    }
}

#[test]
fn causal_forms_do_not_see_the_future() {
    let (length, kept) = (13, 6);
    let x = random(&[1, length, WIDTH], 1);
    let later = random(&[1, length - kept, WIDTH], 2);
    let other = Tensor::cat(&[&x.narrow(1, 0, kept).unwrap(), &later], 1).unwrap();
    for form in causal_forms() {
        let subject = subject(form, true, true);
        let [a, b] = [&x, &other].map(|x| values(&subject.output(x, Given::default())));
        assert_eq!(a[..kept * WIDTH], b[..kept * WIDTH], "{form:?}");
        assert_ne!(a[kept * WIDTH..], b[kept * WIDTH..]);
    }
}

#[test]
fn gradients_equal_central_differences() {
    let x = random(&[1, 9, WIDTH], 1);
    for (form, causal) in forms() {
        let subject = subject(form, true, causal);
        let mut inputs = subject.map.clone();
        inputs.insert("x".to_owned(), x.clone());
        let error = gradient_error(&inputs, 2, |inputs| {
            let subject = Subject {
                spec: subject.spec.clone(),
                map: inputs.clone(),
            };
            contracted(&subject.output(&inputs["x"], Given::default()))
        });
        assert!(error < 1e-6, "{form:?}: {error:e}");
    }
}

#[test]
fn decoding_equals_the_parallel_pass() {
    let x = random(&[2, 13, WIDTH], 1);
    for form in causal_forms() {
        let subject = subject(form, false, true);
        let whole = subject.output(&x, Given::default());
        for steps in [&[1; 13][..], &[5, 1, 7], &[12, 1]] {
            let stepped = subject.decode(&x, steps);
            assert_near(&stepped, &whole, 1e-12, &format!("{form:?}"));
        }
    }
}

#[test]
fn pads_are_not_there() {
    for (form, causal) in forms() {
        subject(form, false, causal).check_pads(&format!("{form:?}"));
    }
}

/// Pairs of a head that the meter has counted: all operations are multiples of what a pair costs,
/// but for the merging of parts.
fn pairs(form: CombinerForm, causal: bool, length: usize, parts: usize) -> u64 {
    let operations = subject(form, false, causal).mixing_operations(length);
    let merging = (parts * HEADS * length * (2 * HEAD_WIDTH + 4)) as u64;
    let each = (HEADS * (4 * HEAD_WIDTH + 5)) as u64;
    assert_eq!((operations - merging) % each, 0);
    (operations - merging) / each
}

#[test]
fn scores_are_as_many_as_the_formulas_say() {
    let (n, m) = (8, 4);
    let length = n * m;
    // Without causality: own segment and all other segments; every span once over its tokens.
    let fixed = pairs(CombinerForm::Fixed { segment: m }, false, length, 2);
    assert_eq!(fixed, (length * (m + n - 1) + length) as u64);
    // With it: half of a segment, the segments before, all segments but the last.
    let causal = pairs(CombinerForm::Fixed { segment: m }, true, length, 2);
    let expected = n * m * (m + 1) / 2 + m * n * (n - 1) / 2 + (length - m);
    assert_eq!(causal, expected as u64);
    assert!(causal <= (length * (n + m + 1)) as u64);
    // Itself and at most log₂ spans, in one part; each level but that of single tokens is summed up from at
    // most every token.
    let logarithm = length.ilog2() as usize;
    let sparse = pairs(CombinerForm::LogSparse, true, length, 0);
    let met: u32 = (0..length).map(|i| 1 + i.count_ones()).sum();
    let summed = (logarithm - 1) * length / 2;
    assert_eq!(sparse, u64::from(met) + summed as u64);
    assert!(u64::from(met) <= (length * (logarithm + 1)) as u64);
    // Row and column; other columns above, of which the prefixes are summed up.
    let vertical = pairs(CombinerForm::Vertical { columns: m }, true, length, 3);
    let direct = m * n * (n + 1) / 2 + n * m * (m - 1) / 2;
    let spans = (n - 1) * m * (m - 1);
    let summed = m * (n - 1) * n / 2;
    assert_eq!(vertical, (direct + spans + summed) as u64);
    assert!(direct + spans <= length * (n + 2 * m));
    // The same directly; both sides of each earlier row, of which there is one in the columns at the edges.
    let horizontal = pairs(CombinerForm::Horizontal { columns: m }, true, length, 3);
    let spans = (m - 1) * n * (n - 1);
    let summed = (n - 1) * m * (m - 1);
    assert_eq!(horizontal, (direct + spans + summed) as u64);
    assert!(direct + spans <= length * (2 * n + m));
}

#[test]
fn operations_grow_below_the_square() {
    for form in [
        (|m| CombinerForm::Fixed { segment: m }) as fn(usize) -> CombinerForm,
        |m| CombinerForm::Vertical { columns: m },
        |m| CombinerForm::Horizontal { columns: m },
        |m| CombinerForm::RowMajor { columns: m },
    ] {
        let exponent = growth(256, |n| {
            subject(form(n.isqrt()), false, true).mixing_operations(n)
        });
        assert!((exponent - 1.5).abs() < 0.1, "{:?}: {exponent}", form(16));
    }
    // n log n: from 256 to 1024, 4 · 10 / 8.
    let exponent = growth(256, |n| {
        subject(CombinerForm::LogSparse, false, true).mixing_operations(n)
    });
    assert!((exponent - 1.16).abs() < 0.1, "{exponent}");
}
