//! Sparse Transformer's attention against dense attention under its patterns, which are written
//! here once more.
#![allow(clippy::panic, clippy::unwrap_used)]

use crate::common;
use crate::common::attention;
use crate::common::attention::{
    Given, HEAD_WIDTH, HEADS, Subject, dot, growth, mask, softmax, spec,
};
use crate::common::{assert_near, contracted, gradient_error, random};
use lapidary_parts::Context;
use lapidary_parts::attention::mechanism::MechanismSpec;
use lapidary_parts::attention::mechanism::sparse::{SparsePattern, SparseSpec, Steps};
use lapidary_parts::state::MixerState;
use lapidary_signal::{Signal, Trace};

fn subject(pattern: &SparsePattern, steps: Steps) -> Subject {
    let pattern = pattern.clone();
    let mechanism = MechanismSpec::Sparse(SparseSpec { pattern, steps });
    Subject::new(spec(mechanism, true), 4)
}

fn fixed(stride: usize, summaries: usize, groups: usize) -> SparsePattern {
    SparsePattern::Fixed {
        stride,
        summaries,
        groups,
    }
}

/// Whether query `i` of a head sees `j` by a step of a pattern.
fn step(pattern: &SparsePattern, second: bool, turn: usize, i: usize, j: usize) -> bool {
    j <= i
        && match (pattern, second) {
            (SparsePattern::Strided { stride }, false) => i - j < *stride,
            (SparsePattern::Strided { stride } | SparsePattern::Axial { stride }, true) => {
                (i - j).is_multiple_of(*stride)
            }
            (SparsePattern::Fixed { stride, .. } | SparsePattern::Axial { stride }, false) => {
                i / stride == j / stride
            }
            (
                SparsePattern::Fixed {
                    stride,
                    summaries,
                    groups,
                },
                true,
            ) => {
                let from_end = stride - 1 - j % stride;
                from_end / summaries == turn % groups
            }
            (SparsePattern::LogSparse, _) => i == j || (i - j).is_power_of_two(),
            (SparsePattern::Layout(_), _) => panic!("layouts have tests of their own"),
        }
}

fn sees(pattern: &SparsePattern, steps: Steps, head: usize, i: usize, j: usize) -> bool {
    let step = |second, turn| step(pattern, second, turn, i, j);
    match steps {
        Steps::First => step(false, head),
        Steps::Second => step(true, head),
        Steps::Merged => step(false, head) || step(true, head),
        Steps::ByHead => step(head % 2 == 1, head / 2),
    }
}

fn all() -> Vec<(SparsePattern, Steps)> {
    let mut all = vec![(SparsePattern::LogSparse, Steps::Merged)];
    for steps in [Steps::First, Steps::Second, Steps::Merged, Steps::ByHead] {
        for stride in [1, 2, 3, 5, 13, 40] {
            all.push((SparsePattern::Strided { stride }, steps));
            all.push((SparsePattern::Axial { stride }, steps));
            all.push((fixed(stride, 1, 1), steps));
        }
        all.push((fixed(5, 2, 1), steps));
        all.push((fixed(5, 2, 2), steps));
        all.push((fixed(4, 1, 4), steps));
    }
    all
}

#[test]
fn equals_dense_attention_under_the_pattern() {
    for length in [1, 7, 13] {
        let x = random(&[2, length, attention::WIDTH], 1);
        for (pattern, steps) in all() {
            let subject = subject(&pattern, steps);
            let run = subject.run(&x, Given::default());
            let expected = |batch: usize, head: usize, i: usize| {
                let q = run.query(batch, head, i);
                let score = |j: usize| match sees(&pattern, steps, head, i, j) {
                    true => dot(q, run.key(batch, head, j)) / (HEAD_WIDTH as f64).sqrt(),
                    false => f64::NEG_INFINITY,
                };
                softmax(&(0..length).map(score).collect::<Vec<_>>())
            };
            run.check(
                2,
                expected,
                1e-12,
                &format!("{pattern:?} {steps:?} at {length}"),
            );
        }
    }
}

#[test]
fn gradients_equal_central_differences() {
    let x = random(&[1, 9, attention::WIDTH], 1);
    for (pattern, steps) in [
        (SparsePattern::Strided { stride: 3 }, Steps::Merged),
        (SparsePattern::Strided { stride: 3 }, Steps::ByHead),
        (fixed(4, 1, 2), Steps::Merged),
        (fixed(4, 2, 1), Steps::Second),
        (SparsePattern::LogSparse, Steps::Merged),
    ] {
        let subject = subject(&pattern, steps);
        let mut inputs = subject.map.clone();
        inputs.insert("x".to_owned(), x.clone());
        let error = gradient_error(&inputs, 5, |inputs| {
            let subject = Subject {
                spec: subject.spec.clone(),
                map: inputs.clone(),
            };
            contracted(&subject.output(&inputs["x"], Given::default()))
        });
        assert!(error < 1e-6, "{pattern:?} {steps:?}: {error:e}");
    }
}

/// Boolean product of the two steps, in either order for strided; by way of the column that ends a
/// block for fixed, whose residual keeps what is in the own block. Neither step is enough.
#[test]
fn two_steps_reach_every_earlier_token() {
    for length in [1, 6, 17, 36] {
        for stride in 1..=7 {
            // As many columns as the block has would be all of it.
            let columns = [1, 2].into_iter().filter(|c| *c == 1 || *c < stride);
            let patterns = columns.map(|c| (fixed(stride, c, 1), c));
            let strided = (SparsePattern::Strided { stride }, 1);
            for (pattern, columns) in patterns.chain([strided]) {
                let hops = |order: [bool; 2], i: usize, j: usize| {
                    (j..=i).any(|between| {
                        step(&pattern, order[0], 0, i, between)
                            && step(&pattern, order[1], 0, between, j)
                    })
                };
                let (mut alone, mut most) = ([true; 2], 0);
                for i in 0..length {
                    let seen = (0..=i).filter(|&j| sees(&pattern, Steps::Merged, 0, i, j));
                    most = most.max(seen.count());
                    for j in 0..=i {
                        let far_then_near = hops([true, false], i, j);
                        let reached = match pattern {
                            SparsePattern::Fixed { .. } => {
                                far_then_near || step(&pattern, false, 0, i, j)
                            }
                            _ => far_then_near && hops([false, true], i, j),
                        };
                        assert!(reached, "{pattern:?}: {i} to {j}");
                        for second in [false, true] {
                            alone[usize::from(second)] &= step(&pattern, second, 0, i, j);
                        }
                    }
                }
                assert!(most <= stride + columns * length.div_ceil(stride));
                if (2..length).contains(&stride) {
                    assert_eq!(alone, [false; 2], "{pattern:?} in one step");
                }
            }
        }
    }
}

/// The same of the modules: gradients reach every earlier token through two layers.
#[test]
fn two_layers_reach_every_earlier_token() {
    let length = 13;
    for pattern in [SparsePattern::Strided { stride: 4 }, fixed(4, 1, 1)] {
        let near = subject(&pattern, Steps::First);
        let far = subject(&pattern, Steps::Second);
        let reach = |layers: [&Subject; 2]| -> Vec<Vec<bool>> {
            let x = lapidary_kernels::Var::from_tensor(&random(&[1, length, attention::WIDTH], 1));
            let x = x.unwrap();
            let mut h = x.as_tensor().clone();
            for layer in layers {
                h = (layer.output(&h, Given::default()) + &h).unwrap();
            }
            let row = |i: usize| {
                let y = contracted(&h.narrow(1, i, 1).unwrap());
                let gradient = y.backward().unwrap().get(x.as_tensor()).unwrap().clone();
                let rows = gradient.sqr().unwrap().sum(2).unwrap();
                common::values(&rows).into_iter().map(|g| g > 0.0).collect()
            };
            (0..length).map(row).collect()
        };
        // A fixed column must have read its block before it is read.
        let reached = reach([&near, &far]);
        for (i, row) in reached.iter().enumerate() {
            for (j, &found) in row.iter().enumerate() {
                assert_eq!(found, j <= i, "{pattern:?}: {i} from {j}");
            }
        }
        let alone = reach([&near, &near]);
        assert!(!alone[length - 1][0]);
    }
}

#[test]
fn a_stride_of_the_whole_length_is_dense_attention() {
    let (x, length) = (random(&[2, 11, attention::WIDTH], 1), 11);
    let dense = Subject::new(spec(MechanismSpec::Softmax, true), 4);
    for (pattern, steps) in [
        (SparsePattern::Strided { stride: length }, Steps::First),
        (SparsePattern::Strided { stride: length }, Steps::Merged),
        (SparsePattern::Strided { stride: 1 }, Steps::Second),
        (fixed(length, 1, 1), Steps::First),
        (fixed(length, 1, 1), Steps::Merged),
        (fixed(1, 1, 1), Steps::Second),
    ] {
        let sparse = subject(&pattern, steps).output(&x, Given::default());
        let expected = dense.output(&x, Given::default());
        assert_near(&sparse, &expected, 1e-12, &format!("{pattern:?} {steps:?}"));
    }
}

#[test]
fn decoding_equals_the_parallel_pass() {
    let x = random(&[2, 14, attention::WIDTH], 1);
    for (pattern, steps) in all() {
        let subject = subject(&pattern, steps);
        let whole = subject.output(&x, Given::default());
        for chunks in [&[1; 14][..], &[3, 1, 6, 4], &[13, 1]] {
            let stepped = subject.decode(&x, chunks);
            assert_near(&stepped, &whole, 1e-12, &format!("{pattern:?} {steps:?}"));
        }
    }
}

/// What is kept while decoding is what later tokens may see: the last `l` or the own block in the near
/// steps, the columns in the far one of fixed.
#[test]
fn caches_hold_what_later_tokens_may_see() {
    let (length, stride) = (14, 5);
    let x = random(&[1, length, attention::WIDTH], 1);
    for (pattern, steps, expected) in [
        (
            SparsePattern::Strided { stride },
            Steps::First,
            vec![10, 11, 12, 13],
        ),
        (
            SparsePattern::Axial { stride },
            Steps::First,
            vec![10, 11, 12, 13],
        ),
        (fixed(stride, 1, 1), Steps::First, vec![10, 11, 12, 13]),
        (fixed(stride, 1, 1), Steps::Second, vec![4, 9]),
        (fixed(stride, 2, 1), Steps::Second, vec![3, 4, 8, 9, 13]),
        (
            fixed(stride, 1, 2),
            Steps::Merged,
            vec![3, 4, 8, 9, 10, 11, 12, 13],
        ),
    ] {
        let attention = subject(&pattern, steps).attention();
        let (trace, mut state) = (Trace::new(), MixerState::Empty);
        for offset in 0..length {
            let cx = Context {
                offset,
                ..Context::new(&trace)
            };
            let here = Signal::from(x.narrow(1, offset, 1).unwrap());
            attention.forward(&here, &cx, Some(&mut state)).unwrap();
        }
        let MixerState::Kept(kept) = &state else {
            panic!("{state:?}");
        };
        let held = kept.places();
        let missing = expected.iter().find(|place| !held.contains(place));
        assert_eq!(missing, None, "{pattern:?} {steps:?}");
        assert!(held.len() < 2 * expected.len().max(8), "{held:?}");
    }
}

/// What a sequence is padded by, and where, changes nothing.
#[test]
fn pads_are_not_there() {
    let x = random(&[1, 7, attention::WIDTH], 1);
    let junk = random(&[1, 3, attention::WIDTH], 2);
    for (pattern, steps) in all() {
        let subject = subject(&pattern, steps);
        let alone = subject.output(&x, Given::default());
        for (left, right) in [(0, 3), (3, 0), (1, 2)] {
            let parts = [
                junk.narrow(1, 0, left).unwrap(),
                x.clone(),
                junk.narrow(1, left, right).unwrap(),
            ];
            let padded = lapidary_kernels::Tensor::cat(&parts, 1).unwrap();
            let keep: Vec<u8> = (0..10)
                .map(|j| u8::from((left..left + 7).contains(&j)))
                .collect();
            let keep = mask(&[&keep]);
            let given = Given {
                keep: Some(&keep),
                ..Given::default()
            };
            let y = subject.output(&padded, given).narrow(1, left, 7).unwrap();
            assert_near(&y, &alone, 1e-12, &format!("{pattern:?} {steps:?}"));
        }
    }
}

/// With as many groups as heads, heads together see the last columns of every block, each others.
#[test]
fn heads_with_columns_of_their_own_cover_the_end_of_blocks() {
    let (length, stride, summaries) = (18, 6, 2);
    let x = random(&[1, length, attention::WIDTH], 1);
    let run = subject(&fixed(stride, summaries, HEADS), Steps::Second).run(&x, Given::default());
    let last = length - 1;
    for j in 0..length {
        let by: Vec<usize> = (0..HEADS)
            .filter(|&h| run.weight(0, h, last, j) > 0.0)
            .collect();
        let from_end = stride - 1 - j % stride;
        let expected = (from_end < HEADS * summaries).then_some(from_end / summaries);
        assert_eq!(by, expected.into_iter().collect::<Vec<_>>(), "column {j}");
    }
}

/// Nothing outside the pattern is computed: the meter has the pattern's pairs, and with strides of
/// `√n` they grow as `n^1.5`.
#[test]
fn operations_are_those_of_the_pattern() {
    for (pattern, steps) in all() {
        let length = 13;
        let mut pairs = 0;
        for (head, i) in (0..HEADS).flat_map(|head| (0..length).map(move |i| (head, i))) {
            let seen = (0..=i).filter(|&j| sees(&pattern, steps, head, i, j));
            pairs += seen.count() as u64;
        }
        let each = (4 * HEAD_WIDTH + 5) as u64;
        let merging = (HEADS * length * (2 * HEAD_WIDTH + 4)) as u64;
        let found = subject(&pattern, steps).mixing_operations(length) - pairs * each;
        // Merging costs as much for each of two parts, where there are two.
        assert!(
            [0, 2 * merging].contains(&found),
            "{pattern:?} {steps:?}: {found}"
        );
    }
    for pattern in [
        (|stride| SparsePattern::Strided { stride }) as fn(usize) -> SparsePattern,
        |stride| fixed(stride, 1, 1),
    ] {
        let exponent = growth(256, |n| {
            subject(&pattern(n.isqrt()), Steps::Merged).mixing_operations(n)
        });
        assert!((exponent - 1.5).abs() < 0.1, "{exponent}");
    }
}

/// A sequence of 4096 tokens has less than a sixteenth of the work of dense attention.
#[test]
fn long_sequences_are_cheap() {
    let length = 4096;
    let sparse = subject(&SparsePattern::Strided { stride: 64 }, Steps::Merged);
    let dense = (length * (length + 1) / 2 * HEADS * (4 * HEAD_WIDTH + 5)) as u64;
    assert!(sparse.mixing_operations(length) * 16 < dense);
}
