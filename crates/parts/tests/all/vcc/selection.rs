//! Which blocks are seen in full, and how that is learned.

use super::*;

/// The score of a block is what the VIP tokens give its mean, by this block's norm, queries and keys.
#[test]
fn blocks_are_chosen_by_what_vips_attend_to() {
    let subject = Subject::new(spec(2), 1);
    let x = tokens(LENGTH);
    let (_, trace) = subject.pass(&x, Given::default(), "blocks.0.importance");
    let found = values(trace.signal("blocks.0.importance").unwrap().value());
    let of = |name: &str| values(&subject.map[&format!("blocks.0.{name}")]);
    let (weight, bias) = (of("attention_norm.weight"), of("attention_norm.bias"));
    let projected = |x: &[f64], name: &str| -> Vec<f64> {
        let mean = x.iter().sum::<f64>() / 6.0;
        let variance = x.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / 6.0;
        let normed: Vec<f64> = (0..6)
            .map(|f| (x[f] - mean) / (variance + 1e-5).sqrt() * weight[f] + bias[f])
            .collect();
        let (w, b) = (
            of(&format!("attention.{name}.weight")),
            of(&format!("attention.{name}.bias")),
        );
        (0..6)
            .map(|o| b[o] + (0..6).map(|i| w[o * 6 + i] * normed[i]).sum::<f64>())
            .collect()
    };
    let x = values(&x);
    for sequence in 0..BATCH {
        let token = |t: usize| &x[(sequence * LENGTH + t) * 6..][..6];
        let means: Vec<Vec<f64>> = (0..5)
            .map(|block| {
                let mean =
                    |f: usize| (0..3).map(|t| token(2 + 3 * block + t)[f]).sum::<f64>() / 3.0;
                (0..6).map(mean).collect()
            })
            .collect();
        let mut expected = [0.0; 5];
        for vip in 0..2 {
            let q = projected(token(vip), "query");
            for head in 0..2 {
                let scores: Vec<f64> = means
                    .iter()
                    .map(|mean| {
                        let k = projected(mean, "key");
                        let product: f64 = (0..3).map(|f| q[head * 3 + f] * k[head * 3 + f]).sum();
                        (product / 3f64.sqrt()).exp()
                    })
                    .collect();
                let sum: f64 = scores.iter().sum();
                for (all, score) in expected.iter_mut().zip(&scores) {
                    *all += score / sum / 4.0;
                }
            }
        }
        for (block, expected) in expected.iter().enumerate() {
            assert!((found[sequence * 5 + block] - expected).abs() < 1e-10);
        }
    }
}

/// Weights are 1, and what makes a token's weight larger makes a fine block more important and a coarse
/// one less.
#[test]
fn straight_through_weights_teach_the_selection() {
    let mut subject = Subject::new(spec(2), 1);
    // The scores' share in the gradient taken out: attention writes nothing.
    subject.silence(&["attention.output"]);
    let x = tokens(LENGTH);
    let trace = Trace::new().tap("blocks.0.importance").unwrap();
    let signal = Signal::from(x.clone());
    let y = subject.organised(&subject.map, signal, Given::default(), &trace);
    let y = y.unwrap().hidden.into_value();
    assert_near(&y, &subject.run(&x), 0.0, "a tap changes nothing");
    let change = (&y - &x).unwrap();
    let loss = (&y * change.detach()).unwrap().sum_all().unwrap();
    let record = trace.record("blocks.0.importance").unwrap();
    let gradient = record.gradient(&loss.backward().unwrap()).unwrap();
    let gradient = gradient.to_vec2::<f64>().unwrap();
    let importance = record.signal.value().to_vec2::<f64>().unwrap();
    for (gradient, importance) in gradient.iter().zip(&importance) {
        let mut blocks: Vec<usize> = (0..5).collect();
        blocks.sort_by(|a, b| importance[*b].total_cmp(&importance[*a]));
        for (rank, block) in blocks.into_iter().enumerate() {
            match rank < 2 {
                true => assert!(gradient[block] > 1e-6, "fine: {}", gradient[block]),
                false => assert!(gradient[block] < -1e-6, "coarse: {}", gradient[block]),
            }
        }
    }
}

/// Where a sequence has no VIP nothing chooses blocks, and the choice has no gradient: in single precision too, where
/// what is next to nothing can't be divided by.
#[test]
fn a_sequence_without_vips_teaches_the_selection_nothing() {
    let subject = Subject::new(
        VccSpec {
            importance: Importance::Token { id: 9 },
            ..spec(2)
        },
        1,
    );
    let single = |x: &Tensor| x.to_dtype(DType::F32).unwrap();
    let variables: Vec<(&String, Var)> = subject
        .map
        .iter()
        .map(|(name, tensor)| (name, Var::from_tensor(&single(tensor)).unwrap()))
        .collect();
    let map: Map = variables
        .iter()
        .map(|(name, variable)| ((*name).clone(), variable.as_tensor().clone()))
        .collect();
    let ids = Tensor::zeros((BATCH, LENGTH), DType::U32, &Device::Cpu).unwrap();
    let given = Given {
        ids: Some(&ids),
        ..Given::default()
    };
    let x = Signal::from(single(&tokens(LENGTH)));
    let trace = Trace::new().capture("blocks.0.importance").unwrap();
    let y = subject.organised(&map, x, given, &trace).unwrap();
    let importance = trace.signal("blocks.0.importance").unwrap();
    assert!(values(importance.value()).iter().all(|share| *share == 0.0));
    let loss = y.hidden.value().sqr().unwrap().sum_all().unwrap();
    let gradients = loss.backward().unwrap();
    for (name, variable) in variables {
        let gradient = values(gradients.get(variable.as_tensor()).unwrap());
        assert!(gradient.iter().all(|entry| entry.is_finite()), "{name}");
    }
}

#[test]
fn the_order_of_blocks_says_nothing_to_vips() {
    let subject = Subject::new(spec(2), 3);
    let x = tokens(LENGTH);
    let order = [3usize, 0, 4, 2, 1];
    let blocks = order.map(|block| rows(&x, 2 + 3 * block, 3));
    let mut parts = vec![rows(&x, 0, 2)];
    parts.extend(blocks);
    let permuted = Tensor::cat(&parts, 1).unwrap();
    let (y, moved) = (subject.run(&x), subject.run(&permuted));
    assert_near(&rows(&moved, 0, 2), &rows(&y, 0, 2), 1e-12, "VIPs");
    let vips = Subject {
        spec: VccSpec {
            output: VccOutput::Vips,
            ..spec(2)
        },
        blocks: subject.blocks.clone(),
        map: subject.map.clone(),
    };
    assert_near(&vips.run(&x), &rows(&y, 0, 2), 0.0, "VIPs alone");
}

#[test]
fn passes_repeat_and_draws_explore() {
    let exploring = Subject::new(
        VccSpec {
            exploration: 1.0,
            ..spec(2)
        },
        2,
    );
    let x = tokens(LENGTH);
    let drawn = |draw| {
        let given = Given {
            draw,
            ..Given::default()
        };
        exploring.pass(&x, given, "none").0
    };
    assert_eq!(values(&drawn(None)), values(&drawn(None)));
    assert_eq!(values(&drawn(Some(1))), values(&drawn(Some(1))));
    let others = (2..10).filter(|seed| difference(&drawn(Some(*seed)), &drawn(Some(1))) > 1e-9);
    assert!(others.count() > 3);
    // Without a draw it doesn't explore.
    let settled = Subject::new(spec(2), 2);
    assert_near(&drawn(None), &settled.run(&x), 0.0, "evaluation");
}

/// Each sequence of a batch explores by itself, as often as it is told to. Of the ten pairs of five blocks a random one
/// is the one that attention chooses once.
#[test]
fn sequences_explore_as_often_as_told() {
    let exploring = Subject::new(
        VccSpec {
            exploration: 0.3,
            ..spec(2)
        },
        1,
    );
    let x = tokens(LENGTH);
    let settled = exploring.run(&x);
    let draws = 400;
    let mut counts = [0.0; 4];
    for draw in 0..draws {
        let given = Given {
            draw: Some(draw),
            ..Given::default()
        };
        let (y, _) = exploring.pass(&x, given, "none");
        let explored = |sequence: usize| {
            let of = |x: &Tensor| x.narrow(0, sequence, 1).unwrap();
            usize::from(difference(&of(&y), &of(&settled)) > 1e-9)
        };
        counts[2 * explored(0) + explored(1)] += 1.0;
    }
    let (seen, draws) = (0.3 * 0.9, draws as f64);
    let both = seen * seen;
    let one = seen - both;
    for (found, share) in counts.iter().zip([1.0 - seen - one, one, one, both]) {
        let deviation = (draws * share * (1.0 - share)).sqrt();
        assert!(
            (found - draws * share).abs() < 5.0 * deviation,
            "{counts:?}: {share}"
        );
    }
}
