use super::*;
use crate::Lens;
use crate::streams::{
    BiasSite, BiasSplit, Partition, ProductSplit, Slope, StreamRules, StreamSpace, Streams,
};
use proptest::prelude::*;

fn all_rules() -> Vec<StreamRules> {
    let mut all = Vec::new();
    for bias in BiasSplit::ALL {
        for bias_site in [BiasSite::Residual, BiasSite::Attention] {
            for activation in [Slope::Secant, Slope::Tangent] {
                for product in [ProductSplit::Half, ProductSplit::FreezeGate] {
                    all.push(StreamRules {
                        bias,
                        bias_site,
                        activation,
                        product,
                    });
                }
            }
        }
    }
    all
}

fn by_position(x: &Tensor, rules: StreamRules) -> Signal {
    let tokens = x.dims()[1];
    Signal::from(x.clone())
        .into_streams(Partition::positions(tokens), rules)
        .unwrap()
}

/// The same signal with its streams multiplied out.
fn stored(x: &Signal) -> Signal {
    let streams = x.streams().unwrap().stored(x.value()).unwrap();
    Signal {
        value: x.value().clone(),
        lens: Lens::Streams(streams),
    }
}

/// Streams that are everywhere, and sum to the value.
fn everywhere(x: &Tensor, rules: StreamRules) -> Signal {
    let space = StreamSpace::new(Partition::components(3), rules);
    let mut shape = vec![space.count()];
    shape.extend(x.dims());
    let noise = numbers(&shape, 5.0);
    let surplus = (noise.sum(0).unwrap() - x).unwrap();
    let share = (surplus / space.count() as f64).unwrap();
    let dense = noise.broadcast_sub(&share.unsqueeze(0).unwrap()).unwrap();
    let streams = Streams::of_dense(space, &dense).unwrap();
    Signal {
        value: x.clone(),
        lens: Lens::Streams(streams),
    }
}

fn whole(x: &Tensor, rules: StreamRules) -> Signal {
    let space = StreamSpace::new(Partition::components(3), rules);
    Signal::from(x.clone())
        .into_whole_stream(&space, 1)
        .unwrap()
}

fn starts(rules: StreamRules) -> Vec<(&'static str, Signal)> {
    let x = input();
    vec![
        ("by position", by_position(&x, rules)),
        ("whole", whole(&x, rules)),
        ("everywhere", everywhere(&x, rules)),
    ]
}

fn operations() -> Vec<(&'static str, Operation)> {
    let mut all = linear_operations();
    all.extend(other_operations());
    all
}

#[test]
fn streams_sum_to_the_value_of_every_operation() {
    for rules in all_rules() {
        if rules.bias == BiasSplit::Drop {
            continue;
        }
        for (start, x) in starts(rules) {
            for (name, operation) in operations() {
                let y = operation(&x).unwrap();
                let what = format!("{name} of {start} under {rules:?}");
                let plain = operation(&Signal::from(input())).unwrap();
                assert_close(y.value(), plain.value(), 1e-12, &what);
                let error = y.conservation_error().unwrap().unwrap();
                assert!(error < 1e-10, "{what}: {error}");
                let sum = y.contributions().unwrap().sum(0).unwrap();
                // Signed shares may be large where they cancel.
                let tolerance = if rules.bias == BiasSplit::Dot {
                    1e-8
                } else {
                    1e-10
                };
                assert_close(&sum, y.value(), tolerance, &what);
            }
        }
    }
}

#[test]
fn products_along_a_vector_are_those_of_the_contributions() {
    for rules in all_rules() {
        for (start, x) in starts(rules) {
            for (name, operation) in operations() {
                let y = operation(&x).unwrap();
                let width = *y.dims().last().unwrap();
                let vector = numbers(&[width], 3.0);
                let along = y.contributions_along(&vector).unwrap();
                // A second signal, so that nothing the first computed is reused.
                let contributions = operation(&x).unwrap().contributions().unwrap();
                let rank = contributions.rank();
                let expected = contributions
                    .broadcast_mul(&vector)
                    .unwrap()
                    .sum(rank - 1)
                    .unwrap();
                let tolerance = if rules.bias == BiasSplit::Dot {
                    1e-9
                } else {
                    1e-12
                };
                assert_close(
                    &along,
                    &expected,
                    tolerance,
                    &format!("{name} of {start} {rules:?}"),
                );
            }
        }
    }
}

#[test]
fn streams_that_are_not_stored_equal_those_that_are() {
    for rules in all_rules() {
        // With a value bias that stays with its own token, being unmixed is part of the rule.
        for (name, operation) in operations() {
            if name.contains("attention") && rules.bias_site == BiasSite::Residual {
                continue;
            }
            for x in [by_position(&input(), rules), whole(&input(), rules)] {
                let lazy = operation(&x).unwrap().contributions().unwrap();
                let eager = operation(&stored(&x)).unwrap().contributions().unwrap();
                assert_close(&lazy, &eager, 1e-12, &format!("{name} under {rules:?}"));
            }
        }
    }
}

#[test]
fn linear_operations_act_on_each_stream_as_on_a_value() {
    let rules = StreamRules::default();
    for (start, x) in starts(rules) {
        let streams = x.contributions().unwrap();
        for (name, operation) in linear_operations() {
            let found = operation(&x).unwrap().contributions().unwrap();
            for (k, found) in found
                .chunk(streams.dims()[0], 0)
                .unwrap()
                .iter()
                .enumerate()
            {
                let stream = Signal::from(streams.get(k).unwrap());
                let expected = operation(&stream).unwrap().into_value();
                let found = found.squeeze(0).unwrap();
                assert_close(
                    &found,
                    &expected,
                    1e-12,
                    &format!("{name} of {start}, stream {k}"),
                );
            }
        }
    }
}

/// Two post-norm blocks and a head, each step's result passed through `between`.
fn network(x: Signal, between: &dyn Fn(Signal) -> Signal) -> Signal {
    let gamma = numbers(&[WIDTH], 4.0);
    let beta = numbers(&[WIDTH], 5.0);
    let norm = |x: Signal| x.layer_norm(Some(&gamma), Some(&beta), 1e-5).unwrap();
    let mut x = x;
    for _ in 0..2 {
        let mixed = between(attention_of(&x, 2).unwrap());
        x = between(norm(between(x.add(&mixed).unwrap())));
        let hidden = between(x.linear(&layer(WIDTH, 7, true, 11.0)).unwrap());
        let hidden = between(hidden.activate(Activation::Gelu).unwrap());
        let out = between(hidden.linear(&layer(7, WIDTH, true, 12.0)).unwrap());
        x = between(norm(between(x.add(&out).unwrap())));
    }
    let first = between(x.narrow(1, 0, 1).unwrap().squeeze(1).unwrap());
    let pooled = between(first.linear(&layer(WIDTH, WIDTH, true, 13.0)).unwrap());
    let pooled = between(pooled.activate(Activation::Tanh).unwrap());
    pooled.linear_scores(&layer(WIDTH, 3, true, 14.0)).unwrap()
}

#[test]
fn deferred_evaluation_gives_the_numbers_of_step_by_step_evaluation() {
    for rules in all_rules() {
        let lazy = network(by_position(&input(), rules), &|x| x);
        let eager = network(by_position(&input(), rules), &|x| match x
            .streams()
            .unwrap()
            .is_unmixed_for_tests()
        {
            true => x,
            false => stored(&x),
        });
        let tolerance = if rules.bias == BiasSplit::Dot {
            1e-8
        } else {
            1e-12
        };
        for class in 0..3 {
            let mut pick = [0.0; 3];
            pick[class] = 1.0;
            let pick = Tensor::new(&pick, &Device::Cpu).unwrap();
            let lazy = lazy.contributions_along(&pick).unwrap();
            let eager = eager.contributions_along(&pick).unwrap();
            assert_close(&lazy, &eager, tolerance, &format!("{rules:?}"));
        }
        assert_close(
            &lazy.contributions().unwrap(),
            &eager.contributions().unwrap(),
            tolerance,
            &format!("{rules:?}"),
        );
    }
}

#[test]
fn shares_of_a_bias_follow_their_scheme() {
    // Two streams at one position, S_0 = (3, 0), S_1 = (0, 1), and a bias (1, 2): the dot
    // products are 3 and 2, the norms 3 and 1, the cosines 1/√5 and 2/√5.
    let dense = Tensor::new(&[[[3f64, 0.0]], [[0.0, 1.0]]], &Device::Cpu).unwrap();
    let bias = [1.0, 2.0];
    let shares = |scheme| {
        let rules = StreamRules {
            bias: scheme,
            ..StreamRules::default()
        };
        let space = StreamSpace::new(Partition::components(2), rules);
        let mut all = dense.clone();
        if scheme == BiasSplit::Extra {
            all = all.pad_with_zeros(0, 0, 1).unwrap();
        }
        let streams = Streams::of_dense(space, &all).unwrap();
        let value = dense.sum(0).unwrap();
        let x = Signal {
            value,
            lens: Lens::Streams(streams),
        };
        let y = x
            .add_constant(&Tensor::new(&bias, &Device::Cpu).unwrap())
            .unwrap();
        let added = (y.contributions().unwrap() - all).unwrap();
        // Every share is a multiple of the bias.
        let first = values(&added.narrow(2, 0, 1).unwrap());
        let second = values(&added.narrow(2, 1, 1).unwrap());
        for (a, b) in first.iter().zip(&second) {
            assert!((2.0 * a - b).abs() < 1e-12);
        }
        first
    };
    let close = |scheme, expected: &[f64]| {
        let found = shares(scheme);
        assert_eq!(found.len(), expected.len());
        for (a, b) in found.iter().zip(expected) {
            assert!((a - b).abs() < 1e-12, "{scheme:?}: {found:?} {expected:?}");
        }
    };
    close(BiasSplit::AbsoluteDot, &[0.6, 0.4]);
    close(BiasSplit::Dot, &[0.6, 0.4]);
    close(BiasSplit::AbsoluteCosine, &[1.0 / 3.0, 2.0 / 3.0]);
    close(BiasSplit::Norm, &[0.75, 0.25]);
    close(BiasSplit::Equal, &[0.5, 0.5]);
    close(BiasSplit::First, &[1.0, 0.0]);
    close(BiasSplit::Extra, &[0.0, 0.0, 1.0]);
    close(BiasSplit::Drop, &[0.0, 0.0]);
}

#[test]
fn a_bias_that_no_stream_meets_is_shared_by_those_that_are_there() {
    // Both products with the bias (0, 1) are zero, and the third stream is empty.
    let dense = Tensor::new(&[[[3f64, 0.0]], [[1.0, 0.0]], [[0.0, 0.0]]], &Device::Cpu).unwrap();
    let space = StreamSpace::new(Partition::components(3), StreamRules::default());
    let streams = Streams::of_dense(space, &dense).unwrap();
    let x = Signal {
        value: dense.sum(0).unwrap(),
        lens: Lens::Streams(streams),
    };
    let bias = Tensor::new(&[0f64, 1.0], &Device::Cpu).unwrap();
    let y = x.add_constant(&bias).unwrap();
    let shares = values(&y.contributions().unwrap().narrow(2, 1, 1).unwrap());
    assert_eq!(shares, [0.5, 0.5, 0.0]);
}

#[test]
fn scores_split_their_biases_one_by_one() {
    let dense = Tensor::new(&[[[3f64, 1.0]], [[1.0, -1.0]]], &Device::Cpu).unwrap();
    let space = StreamSpace::new(Partition::components(2), StreamRules::default());
    let streams = Streams::of_dense(space, &dense).unwrap();
    let x = Signal {
        value: dense.sum(0).unwrap(),
        lens: Lens::Streams(streams),
    };
    let identity = Tensor::new(&[[1f64, 0.0], [0.0, 1.0]], &Device::Cpu).unwrap();
    let bias = Tensor::new(&[4f64, 10.0], &Device::Cpu).unwrap();
    let y = x
        .linear_scores(&Linear::new(identity, Some(bias)).unwrap())
        .unwrap();
    let expected = [3.0 + 3.0, 1.0 + 5.0, 1.0 + 1.0, -1.0 + 5.0];
    assert_eq!(values(&y.contributions().unwrap()), expected);
    for (class, of_class) in [[6.0, 2.0], [6.0, 4.0]].iter().enumerate() {
        let mut pick = [0.0; 2];
        pick[class] = 1.0;
        let pick = Tensor::new(&pick, &Device::Cpu).unwrap();
        assert_eq!(values(&y.contributions_along(&pick).unwrap()), of_class);
    }
}

#[test]
fn what_streams_cannot_do_is_an_error_that_says_so() {
    let x = by_position(&input(), StreamRules::default());
    let error = x.softmax(&Default::default()).unwrap_err().to_string();
    assert!(
        error.contains("streams lens has no rule for softmax"),
        "{error}"
    );
    let other = by_position(&input(), StreamRules::default());
    let error = x.add(&other).unwrap_err().to_string();
    assert!(error.contains("two different starts"), "{error}");
    let error = Signal::from(input())
        .into_streams(Partition::positions(5), StreamRules::default())
        .unwrap_err()
        .to_string();
    assert!(error.contains("5, one for each position"), "{error}");
    let (relevance, _) = Signal::from(input())
        .into_relevance(crate::relevance::RelevanceRules::value_only())
        .unwrap();
    let error = x.add(&relevance).unwrap_err().to_string();
    assert!(
        error.contains("streams lens and the other under relevance"),
        "{error}"
    );
    let error = Signal::concatenate(&[x.clone(), relevance], 1)
        .unwrap_err()
        .to_string();
    assert!(error.contains("concatenate"), "{error}");
    assert!(
        x.place(7, &Tensor::new(&[0u32], &Device::Cpu).unwrap(), 3)
            .is_err()
    );
    assert!(x.contributions_along(&numbers(&[9], 0.0)).is_err());
    assert!(Signal::from(input()).contributions().is_err());
    assert!(
        BiasSplit::from_name("median")
            .unwrap_err()
            .to_string()
            .contains("absdot")
    );
}

/// One change of shape that fits the shape at hand, chosen by `choice`.
fn change(x: &Signal, choice: (u8, usize, usize)) -> crate::Result<Signal> {
    let (kind, a, b) = choice;
    let dims = x.dims().to_vec();
    let rank = dims.len();
    let (i, j) = (a % rank, b % rank);
    match kind {
        0 => x.transpose(i, j),
        1 => x.narrow(i, b % dims[i], dims[i] - b % dims[i]),
        2 if rank < 5 => x.unsqueeze(a % (rank + 1)),
        3 if dims[i] == 1 && rank > 1 => x.squeeze(i),
        4 => x.contiguous(),
        5 if i + 1 < rank => {
            let mut to = dims.clone();
            to[i] *= to.remove(i + 1);
            x.reshape(&to)
        }
        6 if dims[i].is_multiple_of(2) && rank < 5 => {
            let mut to = dims.clone();
            to[i] /= 2;
            to.insert(i + 1, 2);
            x.reshape(&to)
        }
        7 => {
            let last = dims[i] as u32 - 1;
            x.select(i, &Tensor::new(&[last, 0], &Device::Cpu).unwrap())
        }
        8 if rank > 1 => x.mean(i),
        _ => Ok(x.clone()),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_changes_of_shape_act_on_each_stream_alone(
        dims in prop::collection::vec(1usize..5, 2..4),
        choices in prop::collection::vec((0u8..9, 0usize..5, 0usize..5), 1..6),
        mixed: bool,
    ) {
        let x = numbers(&dims, 1.0);
        let x = match mixed {
            true => everywhere(&x, StreamRules::default()),
            false => by_position(&x, StreamRules::default()),
        };
        let apply = |x: &Signal| {
            choices.iter().try_fold(x.clone(), |x, choice| change(&x, *choice)).unwrap()
        };
        let y = apply(&x);
        prop_assert!(y.conservation_error().unwrap().unwrap() < 1e-10);
        let streams = x.contributions().unwrap();
        let found = y.contributions().unwrap();
        for k in 0..streams.dims()[0] {
            let expected = apply(&Signal::from(streams.get(k).unwrap()));
            let error = difference(&found.get(k).unwrap(), expected.value()).unwrap();
            prop_assert!(error < 1e-12, "{error}");
        }
    }

    #[test]
    fn blocks_of_streams_change_nothing(streams in 1usize..40, rows in 1usize..4) {
        // Enough numbers in one stream that they are evaluated a few at a time.
        let wide = 1 << 16;
        let dense = numbers(&[streams, rows, 2], 1.0);
        let space = StreamSpace::new(Partition::components(streams), StreamRules::default());
        let x = Signal {
            value: dense.sum(0).unwrap(),
            lens: Lens::Streams(Streams::of_dense(space, &dense).unwrap()),
        };
        let up = layer(2, wide, true, 1.0);
        let down = layer(wide, 2, true, 2.0);
        let y = x.linear(&up).unwrap().linear(&down).unwrap();
        let together = y.contributions().unwrap();
        let apart = stored(&x.linear(&up).unwrap()).linear(&down).unwrap().contributions().unwrap();
        let scale = values(&together).iter().fold(1.0, |m: f64, v| m.max(v.abs()));
        prop_assert!(difference(&together, &apart).unwrap() / scale < 1e-10);
    }
}
