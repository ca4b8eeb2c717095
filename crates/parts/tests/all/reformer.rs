//! Reformer's attention against softmax over the pairs that its buckets let meet, which are found
//! here once more.
#![allow(clippy::panic, clippy::unwrap_used)]

use crate::common;
use crate::common::attention::{
    Given, HEAD_WIDTH, HEADS, Run, Subject, WIDTH, dot, growth, mask, softmax, spec,
};
use crate::common::{assert_near, contracted, difference, gradient_error, random, values};
use lapidary_kernels::{DType, Device, Tensor, Var};
use lapidary_parts::Context;
use lapidary_parts::attention::mechanism::MechanismSpec;
use lapidary_parts::attention::mechanism::reformer::{ReformerSpec, Repeats, Rotations};
use lapidary_parts::attention::{MultiHeadAttention, MultiHeadSpec, QueryKeySharing};
use lapidary_parts::decisions::Decisions;
use lapidary_signal::{Signal, Trace};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

fn plain(chunk: usize, rounds: usize) -> ReformerSpec {
    ReformerSpec {
        rounds,
        buckets: vec![4],
        ..ReformerSpec::new(chunk)
    }
}

fn subject(reformer: &ReformerSpec, causal: bool) -> Subject {
    let spec = MultiHeadSpec {
        sharing: QueryKeySharing::QueryKey,
        ..spec(MechanismSpec::Reformer(reformer.clone()), causal)
    };
    Subject::new(spec, 4)
}

fn specs() -> Vec<ReformerSpec> {
    let mut all = Vec::new();
    for repeats in [Repeats::Counted, Repeats::Once] {
        for within_buckets in [false, true] {
            for (chunk, rounds, before, after) in [
                (3, 1, 1, 0),
                (4, 3, 1, 0),
                (2, 2, 0, 0),
                (3, 2, 1, 1),
                (5, 2, 4, 2),
                (40, 2, 1, 0),
            ] {
                all.push(ReformerSpec {
                    before,
                    after,
                    within_buckets,
                    repeats,
                    ..plain(chunk, rounds)
                });
            }
        }
    }
    all.push(ReformerSpec {
        buckets: vec![2, 6],
        extra_scale: true,
        ..plain(3, 2)
    });
    all.push(ReformerSpec {
        buckets: Vec::new(),
        ..plain(3, 2)
    });
    all
}

/// Buckets `[batch][head][round][token]` of a run's queries.
fn buckets(
    reformer: &ReformerSpec,
    run: &Run,
    batch: usize,
    draw: Option<u64>,
) -> Vec<Vec<Vec<Vec<u32>>>> {
    let mut keys = Vec::new();
    for b in 0..batch {
        for head in 0..HEADS {
            for token in 0..run.length {
                keys.extend_from_slice(run.query(b, head, token));
            }
        }
    }
    let shape = (batch, HEADS, run.length, HEAD_WIDTH);
    let keys = Tensor::from_vec(keys, shape, &Device::Cpu).unwrap();
    let found = reformer.buckets(&keys, "", draw).unwrap();
    let found: Vec<u32> = found.flatten_all().unwrap().to_vec1().unwrap();
    let at = |b: usize, head: usize, token: usize, round: usize| {
        found[((b * HEADS + head) * run.length + token) * reformer.rounds + round]
    };
    let rounds = |b, head| {
        (0..reformer.rounds)
            .map(|round| {
                (0..run.length)
                    .map(|token| at(b, head, token, round))
                    .collect()
            })
            .collect()
    };
    (0..batch)
        .map(|b| (0..HEADS).map(|head| rounds(b, head)).collect())
        .collect()
}

/// How often each query meets each key, from the buckets of each round.
fn meetings(reformer: &ReformerSpec, buckets: &[Vec<u32>], length: usize) -> Vec<Vec<usize>> {
    let mut ring: Vec<(usize, Vec<usize>)> = Vec::new();
    for (round, buckets) in buckets.iter().enumerate() {
        let mut order: Vec<(u32, usize)> = (0..length).map(|t| (buckets[t], t)).collect();
        order.sort();
        for chunk in order.chunks(reformer.chunk) {
            ring.push((round, chunk.iter().map(|(_, token)| *token).collect()));
        }
    }
    let mut met = vec![vec![0; length]; length];
    let all = ring.len() as isize;
    for (place, (round, queries)) in ring.iter().enumerate() {
        for step in -(reformer.before as isize)..=reformer.after as isize {
            let (other, keys) = &ring[(place as isize + step).rem_euclid(all) as usize];
            for &i in queries {
                for &j in keys {
                    let alike = round == other && buckets[*round][i] == buckets[*round][j];
                    if alike || !reformer.within_buckets {
                        met[i][j] += 1;
                    }
                }
            }
        }
    }
    met
}

/// Weights of a query, given how often it meets each key.
fn weights(
    reformer: &ReformerSpec,
    run: &Run,
    at: [usize; 3],
    met: &[usize],
    causal: bool,
) -> Vec<f64> {
    let [b, head, i] = at;
    let scale = match reformer.extra_scale {
        true => 1.0 / (HEAD_WIDTH as f64).sqrt(),
        false => 1.0,
    };
    let score = |j: usize| {
        if met[j] == 0 || (causal && j > i) {
            return f64::NEG_INFINITY;
        }
        let (q, k) = (run.query(b, head, i), run.query(b, head, j));
        let own = if i == j { -1e5 } else { 0.0 };
        let times = match reformer.repeats {
            Repeats::Counted => met[j] as f64,
            Repeats::Once => 1.0,
        };
        scale * dot(q, k) / dot(k, k).sqrt() + own + times.ln()
    };
    softmax(&(0..met.len()).map(score).collect::<Vec<_>>())
}

#[test]
fn equals_softmax_over_the_pairs_that_meet() {
    for length in [1, 7, 12] {
        let x = random(&[2, length, WIDTH], 1);
        for reformer in specs() {
            for (causal, draw) in [(true, None), (false, Some(3))] {
                let run = subject(&reformer, causal).run(
                    &x,
                    Given {
                        draw,
                        ..Given::default()
                    },
                );
                let buckets = buckets(&reformer, &run, 2, draw);
                let met = |b: usize, head: usize| meetings(&reformer, &buckets[b][head], length);
                let met: Vec<Vec<_>> = (0..2)
                    .map(|b| (0..HEADS).map(|head| met(b, head)).collect())
                    .collect();
                let expected = |b: usize, head: usize, i: usize| {
                    weights(&reformer, &run, [b, head, i], &met[b][head][i], causal)
                };
                run.check(2, expected, 1e-9, &format!("{reformer:?} causal {causal}"));
            }
        }
    }
}

/// With one chunk everything meets, and what is met several times cancels.
#[test]
fn one_chunk_is_full_attention_with_shared_queries_and_keys() {
    let (x, length) = (random(&[2, 9, WIDTH], 1), 9);
    for rounds in [1, 2, 5] {
        for causal in [true, false] {
            let reformer = plain(length, rounds);
            let run = subject(&reformer, causal).run(&x, Given::default());
            let everything = vec![1; length];
            let expected = |b: usize, head: usize, i: usize| {
                weights(&reformer, &run, [b, head, i], &everything, causal)
            };
            run.check(2, expected, 1e-9, "one chunk");
        }
    }
}

#[test]
fn gradients_equal_central_differences() {
    let x = random(&[1, 8, WIDTH], 1);
    for reformer in specs() {
        let subject = subject(&reformer, true);
        let mut inputs = subject.map.clone();
        inputs.insert("x".to_owned(), x.clone());
        let error = gradient_error(&inputs, 3, |inputs| {
            let subject = Subject {
                spec: subject.spec.clone(),
                map: inputs.clone(),
            };
            contracted(&subject.output(&inputs["x"], Given::default()))
        });
        assert!(error < 1e-6, "{reformer:?}: {error:e}");
    }
}

/// Buckets of vectors by one round of `buckets`, with a draw.
fn hashed(vectors: &[Vec<f64>], buckets: usize, draw: u64) -> Vec<u32> {
    let reformer = ReformerSpec {
        buckets: vec![buckets],
        ..plain(4, 1)
    };
    let shape = (1, 1, vectors.len(), vectors[0].len());
    let keys = Tensor::from_vec(vectors.concat(), shape, &Device::Cpu).unwrap();
    let found = reformer.buckets(&keys, "", Some(draw)).unwrap();
    found.flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn buckets_are_of_directions_and_opposites_never_share_one() {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    for draw in 0..200 {
        let x: Vec<f64> = (0..5).map(|_| common::normal(&mut rng)).collect();
        let scaled: Vec<f64> = x
            .iter()
            .map(|x| x * (0.01 + 10.0 * rng.random::<f64>()))
            .collect();
        let factor = 0.01 + 10.0 * rng.random::<f64>();
        let longer: Vec<f64> = x.iter().map(|x| x * factor).collect();
        let opposite: Vec<f64> = x.iter().map(|x| -x).collect();
        let found = hashed(&[x, longer, opposite, scaled], 6, draw);
        assert_eq!(found[0], found[1]);
        assert_ne!(found[0], found[2]);
        assert!(found.iter().all(|bucket| *bucket < 6));
    }
}

#[test]
fn the_probability_to_share_a_bucket_rises_with_the_cosine() {
    let draws = 3000;
    let rates: Vec<f64> = [-0.8f64, -0.2, 0.2, 0.6, 0.9, 0.99]
        .iter()
        .map(|cosine| {
            let sine = (1.0 - cosine * cosine).sqrt();
            let pair = [vec![1.0, 0.0, 0.0, 0.0], vec![*cosine, sine, 0.0, 0.0]];
            let shared = (0..draws).filter(|&draw| {
                let found = hashed(&pair, 8, draw);
                found[0] == found[1]
            });
            shared.count() as f64 / draws as f64
        })
        .collect();
    // Beyond two standard errors of what is measured.
    for pair in rates.windows(2) {
        assert!(
            pair[1] > pair[0] + 2.0 * (0.25 / draws as f64).sqrt(),
            "{rates:?}"
        );
    }
}

/// Later tokens move so little that their buckets stay: earlier ones don't see it.
#[test]
fn causal_with_buckets_frozen() {
    let (length, kept) = (12, 5);
    let x = random(&[1, length, WIDTH], 1);
    let nudge = (random(&[1, length - kept, WIDTH], 2) * 1e-3).unwrap();
    let earlier = Tensor::zeros((1, kept, WIDTH), x.dtype(), &Device::Cpu).unwrap();
    let moved = (&x + Tensor::cat(&[earlier, nudge], 1).unwrap()).unwrap();
    for reformer in specs() {
        let subject = subject(&reformer, true);
        let runs = [&x, &moved].map(|x| subject.run(x, Given::default()));
        let of = |run: &Run| buckets(&reformer, run, 1, None);
        assert_eq!(
            of(&runs[0]),
            of(&runs[1]),
            "the nudge is too large for this test"
        );
        let [before, after] = runs.map(|run| run.mixed);
        assert_eq!(
            before[..kept * WIDTH],
            after[..kept * WIDTH],
            "{reformer:?}"
        );
        assert_ne!(before[kept * WIDTH..], after[kept * WIDTH..]);
    }
}

#[test]
fn the_first_token_attends_to_itself_alone() {
    let x = random(&[2, 10, WIDTH], 1);
    for reformer in specs() {
        let run = subject(&reformer, true).run(&x, Given::default());
        for (b, head) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            for j in 0..10 {
                let expected = f64::from(u8::from(j == 0));
                assert!((run.weight(b, head, 0, j) - expected).abs() < 1e-12);
            }
        }
    }
}

/// The same draw gives the same pass, as when a block is recomputed; another one another pass.
#[test]
fn draws_are_replayed() {
    let x = random(&[1, 24, WIDTH], 1);
    let subject = subject(&plain(4, 1), true);
    let with = |draw| {
        subject.output(
            &x,
            Given {
                draw,
                ..Given::default()
            },
        )
    };
    assert_eq!(difference(&with(Some(7)), &with(Some(7))), 0.0);
    assert_eq!(difference(&with(None), &with(None)), 0.0);
    assert!(difference(&with(Some(7)), &with(Some(8))) > 1e-6);
    assert!(difference(&with(Some(7)), &with(None)) > 1e-6);
}

#[test]
fn more_rounds_are_nearer_to_full_attention() {
    let (length, chunk) = (64, 8);
    let x = random(&[2, length, WIDTH], 1);
    let full = subject(&plain(length, 1), false).output(&x, Given::default());
    let error = |rounds: usize| -> f64 {
        let reformer = ReformerSpec {
            buckets: vec![16],
            repeats: Repeats::Once,
            ..plain(chunk, rounds)
        };
        let subject = subject(&reformer, false);
        let each = (0..10).map(|draw| {
            let draw = Some(draw);
            let y = subject.output(
                &x,
                Given {
                    draw,
                    ..Given::default()
                },
            );
            let apart = values(&(y - &full).unwrap().sqr().unwrap());
            apart.iter().sum::<f64>() / apart.len() as f64
        });
        each.sum::<f64>()
    };
    let errors = [1, 2, 4, 8].map(error);
    for pair in errors.windows(2) {
        assert!(pair[1] < pair[0], "{errors:?}");
    }
}

#[test]
fn pads_are_not_there() {
    let x = random(&[1, 7, WIDTH], 1);
    let junk = random(&[1, 4, WIDTH], 2);
    for reformer in specs() {
        for (causal, draw) in [(true, None), (false, Some(2))] {
            let subject = subject(&reformer, causal);
            let alone = subject.output(
                &x,
                Given {
                    draw,
                    ..Given::default()
                },
            );
            for (left, right) in [(0, 4), (4, 0), (1, 2)] {
                let parts = [
                    junk.narrow(1, 0, left).unwrap(),
                    x.clone(),
                    junk.narrow(1, left, right).unwrap(),
                ];
                let padded = Tensor::cat(&parts, 1).unwrap();
                let keep: Vec<u8> = (0..7 + left + right)
                    .map(|j| u8::from((left..left + 7).contains(&j)))
                    .collect();
                let keep = mask(&[&keep]);
                let given = Given {
                    keep: Some(&keep),
                    draw,
                    ..Given::default()
                };
                let y = subject.output(&padded, given).narrow(1, left, 7).unwrap();
                assert_near(&y, &alone, 1e-12, &format!("{reformer:?}"));
            }
        }
    }
}

/// A step gives what the pass over the tokens so far gives to its last ones.
#[test]
fn decoding_equals_the_pass_over_the_tokens_so_far() {
    let length = 11;
    let x = random(&[2, length, WIDTH], 1);
    for reformer in specs() {
        let subject = subject(&reformer, true);
        if reformer.buckets.is_empty() {
            continue;
        }
        for steps in [&[1; 11][..], &[4, 1, 1, 5], &[10, 1]] {
            let stepped = subject.decode(&x, steps);
            let mut offset = 0;
            for &step in steps {
                let so_far = x.narrow(1, 0, offset + step).unwrap();
                let whole = subject.output(&so_far, Given::default());
                let expected = whole.narrow(1, offset, step).unwrap();
                let found = stepped.narrow(1, offset, step).unwrap();
                assert_near(&found, &expected, 1e-12, &format!("{reformer:?}"));
                offset += step;
            }
        }
    }
}

/// The first tokens meet nobody else, and themselves in every round: their gradients are as exact as others.
#[test]
fn gradients_of_queries_that_are_alone_hold_in_single_precision() {
    let subject = subject(&plain(4, 3), true);
    let x = random(&[1, 16, WIDTH], 5);
    let gradients = |dtype: DType| -> Vec<f64> {
        let cast = |x: &Tensor| x.to_dtype(dtype).unwrap();
        let variables: Vec<(String, Var)> = subject
            .map
            .iter()
            .map(|(name, tensor)| (name.clone(), Var::from_tensor(&cast(tensor)).unwrap()))
            .collect();
        let live = variables
            .iter()
            .map(|(name, variable)| (name.clone(), variable.as_tensor().clone()));
        let attention = common::build(&live.collect(), |p| {
            MultiHeadAttention::new(&subject.spec, WIDTH, p)
        });
        let trace = Trace::new();
        let y = attention
            .unwrap()
            .forward(&Signal::from(cast(&x)), &Context::new(&trace), None);
        let loss = y.unwrap().value().sqr().unwrap().sum_all().unwrap();
        let found = loss.backward().unwrap();
        let of = |(_, variable): &(String, Var)| values(found.get(variable.as_tensor()).unwrap());
        variables.iter().flat_map(of).collect()
    };
    let (exact, found) = (gradients(DType::F64), gradients(DType::F32));
    let largest = exact
        .iter()
        .fold(0.0f64, |most, entry| most.max(entry.abs()));
    for (exact, found) in exact.iter().zip(&found) {
        assert!((exact - found).abs() < 1e-5 * largest, "{exact} {found}");
    }
}

/// Linear at a given number of buckets. Without causality, whose share of what meets still changes
/// while buckets grow beyond a chunk.
#[test]
fn operations_grow_with_the_length() {
    let reformer = ReformerSpec {
        buckets: vec![16],
        ..plain(16, 2)
    };
    let subject = subject(&reformer, false);
    let exponent = growth(256, |n| subject.mixing_operations(n));
    assert!((exponent - 1.0).abs() < 0.1, "{exponent}");
}

#[test]
fn each_example_of_a_draw_may_have_its_own_rotations() {
    let one = random(&[1, HEADS, 40, HEAD_WIDTH], 3);
    let twice = Tensor::cat(&[&one, &one], 0).unwrap();
    let buckets = |rotations: Rotations, keys: &Tensor, draw: Option<u64>| -> Vec<u32> {
        let spec = ReformerSpec {
            rotations,
            ..plain(4, 2)
        };
        let found = spec.buckets(keys, "", draw).unwrap();
        found.flatten_all().unwrap().to_vec1().unwrap()
    };
    for (rotations, draw, alike) in [
        (Rotations::Drawn, Some(5), true),
        (Rotations::PerExample, Some(5), false),
        (Rotations::PerExample, None, true),
        (Rotations::Fixed, Some(5), true),
    ] {
        let found = buckets(rotations, &twice, draw);
        let (first, second) = found.split_at(found.len() / 2);
        assert_eq!(first == second, alike, "{rotations:?} {draw:?}");
    }
    let (own, alone) = (Rotations::PerExample, buckets(Rotations::Fixed, &one, None));
    assert_eq!(buckets(own, &one, None), alone);
    let beside = buckets(own, &twice, Some(5));
    assert_eq!(buckets(own, &one, Some(5)), beside[..alone.len()]);
}

/// What is recomputed from other numbers meets whom it met.
#[test]
fn what_runs_again_takes_its_first_buckets() {
    let subject = subject(&plain(3, 1), false);
    let [x, other] = [1, 2].map(|seed| random(&[2, 12, WIDTH], seed));
    let met = |x: &Tensor, decisions: Option<&Decisions>| -> Vec<bool> {
        let trace = Trace::new().capture("*.weights").unwrap();
        let cx = Context {
            decisions,
            ..Context::new(&trace)
        };
        let x = Signal::from(x.clone());
        subject.attention().forward(&x, &cx, None).unwrap();
        let weights = values(trace.signal(".weights").unwrap().value());
        weights.iter().map(|weight| *weight > 0.0).collect()
    };
    let decisions = Decisions::default();
    let first = met(&x, Some(&decisions));
    assert_eq!(first, met(&x, None));
    assert_ne!(first, met(&other, None));
    assert_eq!(first, met(&other, Some(&decisions)));
}

/// Each digit of a bucket is a hash of its own: an opposite vector has half of the digit's number more of it, and
/// every digit stands beside every other.
#[test]
fn digits_of_buckets_are_hashed_one_by_one() {
    let half = random(&[1, 1, 200, 8], 1);
    let keys = Tensor::cat(&[&half, &half.neg().unwrap()], 2).unwrap();
    for (buckets, chunk, digits) in [
        (vec![2, 6], 4, vec![2, 6]),
        (vec![6, 6], 4, vec![6, 6]),
        (vec![4, 2, 6], 4, vec![4, 2, 6]),
        // Two for each of 58 chunks, and for each of 67, which is too many for one digit.
        (Vec::new(), 7, vec![116]),
        (Vec::new(), 6, vec![12, 12]),
    ] {
        let reformer = ReformerSpec {
            buckets,
            ..ReformerSpec::new(chunk)
        };
        let all: usize = digits.iter().product();
        let mut seen = vec![false; all];
        for draw in 0..30 {
            let found = reformer.buckets(&keys, "", Some(draw)).unwrap();
            let found: Vec<u32> = found.flatten_all().unwrap().to_vec1().unwrap();
            let parts = |token: usize| -> Vec<usize> {
                let mut rest = found[token] as usize;
                let mut parts = Vec::new();
                for digit in digits.iter().rev() {
                    parts.insert(0, rest % digit);
                    rest /= digit;
                }
                assert_eq!(rest, 0, "{digits:?}: bucket {}", found[token]);
                parts
            };
            for token in 0..200 {
                let each = parts(token).into_iter().zip(&digits);
                let across: Vec<usize> = each
                    .map(|(part, digit)| (part + digit / 2) % digit)
                    .collect();
                assert_eq!(parts(200 + token), across, "{digits:?}");
            }
            for bucket in found {
                seen[bucket as usize] = true;
            }
        }
        let missing = seen.iter().filter(|seen| !**seen).count();
        assert_eq!(missing, 0, "{digits:?}");
    }
}

#[test]
fn heads_and_rounds_have_rotations_of_their_own() {
    let one = random(&[1, 1, 40, HEAD_WIDTH], 3);
    let keys = Tensor::cat(&[&one, &one], 1).unwrap();
    for draw in [None, Some(5)] {
        let found = plain(4, 2).buckets(&keys, "", draw).unwrap();
        let found: Vec<u32> = found.flatten_all().unwrap().to_vec1().unwrap();
        let of = |head: usize, round: usize| -> Vec<u32> {
            (0..40)
                .map(|token| found[(head * 40 + token) * 2 + round])
                .collect()
        };
        let all = [of(0, 0), of(0, 1), of(1, 0), of(1, 1)];
        for (at, buckets) in all.iter().enumerate() {
            assert!(!all[..at].contains(buckets), "{draw:?}: {at}");
        }
    }
}

/// A sequence whose buckets follow from its length has them of its own real tokens, beside one whose buckets
/// have a digit more.
#[test]
fn sequences_of_one_digit_and_of_two_share_a_batch() {
    let (long, short) = (random(&[1, 70, WIDTH], 1), random(&[1, 10, WIDTH], 2));
    let padded = Tensor::cat(&[&short, &random(&[1, 60, WIDTH], 3)], 1).unwrap();
    let few = [[1u8; 10].as_slice(), &[0; 60]].concat();
    let many = [1u8; 70];
    // Chunks of one token: 140 buckets, as two digits of 12, and 20.
    let reformer = ReformerSpec {
        rounds: 2,
        ..ReformerSpec::new(1)
    };
    for causal in [false, true] {
        let subject = subject(&reformer, causal);
        for draw in [None, Some(3)] {
            let of = |x: &Tensor, keep: Option<&Tensor>| {
                let given = Given {
                    keep,
                    draw,
                    ..Given::default()
                };
                subject.output(x, given)
            };
            let alone = [of(&long, None), of(&short, None)];
            let keep = mask(&[&many, &few]);
            let first = of(&Tensor::cat(&[&long, &padded], 0).unwrap(), Some(&keep));
            let keep = mask(&[&few, &many]);
            let last = of(&Tensor::cat(&[&padded, &long], 0).unwrap(), Some(&keep));
            for (both, at) in [(first, 0), (last, 1)] {
                let row = |row: usize| both.narrow(0, row, 1).unwrap();
                assert_near(&row(at), &alone[0], 1e-12, "of two digits");
                let real = row(1 - at).narrow(1, 0, 10).unwrap();
                assert_near(&real, &alone[1], 1e-12, "of one digit");
            }
        }
    }
}
