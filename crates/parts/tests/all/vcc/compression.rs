//! What is kept of tokens that are seen as means.

use super::*;

#[test]
fn nothing_is_lost_in_compression() {
    let mut subject = Subject::new(spec(2), 3);
    subject.silence(&["attention.output", "feedforward.down"]);
    let mut generator = ChaCha8Rng::seed_from_u64(1);
    for length in [3, 4, 17, 18, 19, 40] {
        let x = tokens(length);
        assert_near(&subject.run(&x), &x, 1e-12, "without pads");
        let mut drawn = || -> Vec<u8> {
            (0..length)
                .map(|_| u8::from(generator.random_bool(0.6)))
                .collect()
        };
        let keep = mask(&[drawn(), drawn()]);
        let given = Given {
            keep: Some(&keep),
            ..Given::default()
        };
        let (y, _) = subject.pass(&x, given, "none");
        assert_near(&y, &x, 1e-12, "with pads");
    }
}

#[test]
fn with_every_block_in_full_it_is_the_plain_encoder() {
    for position in [PositionSpec::None, BUCKETS] {
        let subject = Subject::with(spec(5), vec![block(position); 2]);
        let x = tokens(LENGTH);
        assert_near(
            &subject.run(&x),
            &subject.plain(&subject.map, &x, None),
            1e-12,
            "plain",
        );
        let keep = mask(&[[vec![1; 11], vec![0; 6]].concat(), vec![1; LENGTH]]);
        let given = Given {
            keep: Some(&keep),
            ..Given::default()
        };
        let (y, _) = subject.pass(&x, given, "none");
        let plain = subject.plain(&subject.map, &x, Some(&keep));
        assert_near(&rows(&y, 0, 11), &rows(&plain, 0, 11), 1e-12, "with pads");
        // Gradients too.
        let gradients = |compressed: bool| {
            let variables: Vec<(String, Var)> = subject
                .map
                .iter()
                .map(|(name, tensor)| (name.clone(), Var::from_tensor(tensor).unwrap()))
                .collect();
            let live: Map = variables
                .iter()
                .map(|(name, var)| (name.clone(), var.as_tensor().clone()))
                .collect();
            let y = match compressed {
                true => {
                    let x = Signal::from(x.clone());
                    let trace = Trace::new();
                    let y = subject.organised(&live, x, Given::default(), &trace);
                    y.unwrap().hidden.into_value()
                }
                false => subject.plain(&live, &x, None),
            };
            let found = contracted(&y).backward().unwrap();
            let each = variables.into_iter().map(|(name, var)| {
                let gradient = found.get(var.as_tensor()).unwrap().clone();
                (name, gradient)
            });
            each.collect::<Map>()
        };
        let plain = gradients(false);
        for (name, gradient) in gradients(true) {
            assert_near(&gradient, &plain[&name], 1e-10, &name);
        }
    }
}

#[test]
fn blocks_of_equal_tokens_are_attended_to_as_the_tokens_are() {
    let base = tokens(LENGTH);
    let equal = |t: usize| if t < 2 { t } else { 2 + (t - 2) / 3 * 3 };
    let same: Vec<u32> = (0..LENGTH).map(|t| equal(t) as u32).collect();
    let same = Tensor::new(same.as_slice(), &Device::Cpu).unwrap();
    let x = base.index_select(&same, 1).unwrap();
    let corrected = Subject::new(spec(1), 2);
    let plain = corrected.plain(&corrected.map, &x, None);
    assert_near(&corrected.run(&x), &plain, 1e-12, "with the correction");
    let mut uncorrected = Subject::new(
        VccSpec {
            scale_correction: false,
            ..spec(1)
        },
        2,
    );
    uncorrected.map.clone_from(&corrected.map);
    assert!(difference(&uncorrected.run(&x), &plain) > 1e-3);
    // A block that isn't full counts as often as it has real tokens.
    let keep = mask(&[[vec![1; 12], vec![0; 5]].concat(), vec![1; LENGTH]]);
    let given = Given {
        keep: Some(&keep),
        ..Given::default()
    };
    let (y, _) = corrected.pass(&x, given, "none");
    let plain = corrected.plain(&corrected.map, &x, Some(&keep));
    assert_near(
        &rows(&y, 0, 12),
        &rows(&plain, 0, 12),
        1e-12,
        "a block with pads",
    );
}

#[test]
fn what_is_not_refined_moves_as_one() {
    let subject = Subject::new(spec(2), 1);
    let x = tokens(LENGTH);
    let (y, trace) = subject.pass(&x, Given::default(), "blocks.0.importance");
    let fine = fine_blocks(&trace, "blocks.0.importance", 2);
    for (sequence, fine) in fine.iter().enumerate() {
        for block in 0..5 {
            let of = |x: &Tensor, t: usize| rows(x, 2 + 3 * block + t, 1).get(sequence).unwrap();
            let moved = |t: usize| {
                let (before, after) = (of(&x, t), of(&y, t));
                let other = ((of(&x, 0) - before).unwrap() - (of(&y, 0) - after).unwrap()).unwrap();
                values(&other)
                    .into_iter()
                    .fold(0.0, |m: f64, v| m.max(v.abs()))
            };
            let changed = difference(&of(&x, 0), &of(&y, 0));
            assert!(changed > 1e-3, "block {block} doesn't move");
            let apart = moved(1).max(moved(2));
            match fine.contains(&block) {
                true => assert!(apart > 1e-3, "fine block {block} moves as one"),
                false => assert!(apart < 1e-12, "coarse block {block}: {apart:e}"),
            }
        }
    }
}

/// Scores of the short sequence that a block sees, written out: `s q k + ln count + bias of distance`.
#[test]
fn attention_counts_tokens_and_knows_mean_positions() {
    let subject = Subject::with(spec(1), vec![block(BUCKETS)]);
    let x = tokens(LENGTH);
    let sites = "blocks.0.{importance,attention.{query,key,weights}}";
    let (_, trace) = subject.pass(&x, Given::default(), sites);
    let flat = |site: &str| values(trace.signal(&format!("blocks.0.{site}")).unwrap().value());
    let (q, k, weights) = (
        flat("attention.query"),
        flat("attention.key"),
        flat("attention.weights"),
    );
    let table = &subject.map["blocks.0.attention.position.buckets"];
    let table = table.to_vec2::<f64>().unwrap();
    let fine = fine_blocks(&trace, "blocks.0.importance", 1);
    let short = 3 + 4 + 2;
    for sequence in 0..BATCH {
        let first = fine[sequence][0];
        let mut places: Vec<usize> = (0..3).map(|t| 2 + 3 * first + t).collect();
        let mut counts = vec![1.0f64; 3];
        for block in (0..5).filter(|block| *block != first) {
            places.push(2 + 3 * block + 1);
            counts.push(3.0);
        }
        places.extend([0, 1]);
        counts.extend([1.0, 1.0]);
        // Distances up to 20 in 8 buckets: 4 for each direction, 2 of them exact.
        let bucket = |key: usize, query: usize| {
            let base = if key > query { 4 } else { 0 };
            let apart = key.abs_diff(query);
            let within = match apart {
                0 | 1 => apart,
                _ => {
                    let log = (apart as f64 / 2.0).ln() / 10f64.ln();
                    (2 + (log * 2.0) as usize).min(3)
                }
            };
            base + within
        };
        for head in 0..2 {
            for i in 0..short {
                let at =
                    |x: &[f64], t: usize, f: usize| x[(sequence * short + t) * 6 + head * 3 + f];
                let scores: Vec<f64> = (0..short)
                    .map(|j| {
                        let product: f64 = (0..3).map(|f| at(&q, i, f) * at(&k, j, f)).sum();
                        product / 3f64.sqrt()
                            + counts[j].ln()
                            + table[bucket(places[j], places[i])][head]
                    })
                    .collect();
                let sum: f64 = scores.iter().map(|score| score.exp()).sum();
                for (j, score) in scores.iter().enumerate() {
                    let found = weights[((sequence * 2 + head) * short + i) * short + j];
                    assert!((found - score.exp() / sum).abs() < 1e-10, "{i} to {j}");
                }
            }
        }
    }
}

#[test]
fn the_store_writes_what_changed_and_nothing_else() {
    const SIZE: usize = 2;
    // Blocks of two tokens.
    let flat = |rows: &[[f64; 2]]| {
        let shape = (rows.len(), 2);
        Signal::from(Tensor::from_vec(rows.concat(), shape, &Device::Cpu).unwrap())
    };
    let mut generator = ChaCha8Rng::seed_from_u64(4);
    let mut drawn = || generator.random_range(-1.0..1.0);
    // What each token is, and the mean of each block.
    let mut tokens: Vec<[f64; 2]> = (0..6 * SIZE).map(|_| [drawn(), drawn()]).collect();
    let mean = |tokens: &[[f64; 2]], block: usize| {
        let [a, b] = [tokens[block * SIZE], tokens[block * SIZE + 1]];
        [0, 1].map(|f| (a[f] + b[f]) / 2.0)
    };
    let means = |tokens: &[[f64; 2]]| -> Vec<[f64; 2]> {
        (0..6).map(|block| mean(tokens, block)).collect()
    };
    let rows: Vec<Option<u32>> = (0..6 * SIZE as u32).map(Some).collect();
    let mut store = TokenStore::new(flat(&tokens), flat(&means(&tokens)), rows, SIZE).unwrap();
    let mut generator = ChaCha8Rng::seed_from_u64(5);
    for _ in 1..30 {
        let mut blocks: Vec<usize> = (0..6).collect();
        blocks.shuffle(&mut generator);
        let (fine, coarse) = blocks.split_at(2);
        // Two blocks' tokens, and behind them where the means of the others move to.
        let (mut written, mut places, mut moved) = (Vec::new(), Vec::new(), Vec::new());
        for &block in fine {
            places.push((block, written.len() as u32));
            for token in 0..SIZE {
                tokens[block * SIZE + token] = [drawn(), drawn()];
                written.push(tokens[block * SIZE + token]);
            }
        }
        for &block in coarse {
            moved.push((block, written.len() as u32));
            let (before, after) = (mean(&tokens, block), [drawn(), drawn()]);
            for token in &mut tokens[block * SIZE..(block + 1) * SIZE] {
                *token = [0, 1].map(|f| token[f] + after[f] - before[f]);
            }
            written.push(after);
        }
        let given = (flat(&written), flat(&means(&tokens)));
        store.write(given, &places, &moved).unwrap();
        let order = [4usize, 1, 1, 0, 5, 3, 2];
        let found = store.read(&order).unwrap().into_value();
        let found = found.to_vec2::<f64>().unwrap();
        let expected = order
            .iter()
            .flat_map(|block| &tokens[block * SIZE..(block + 1) * SIZE]);
        for (row, (found, expected)) in found.iter().zip(expected).enumerate() {
            for (found, expected) in found.iter().zip(expected) {
                assert!((found - expected).abs() < 1e-9, "row {row}");
            }
        }
    }
    // Pieces that nothing is read from any more are let go: at most the first and one per block.
    assert!(store.rows() <= 12 + 6 * 8, "{}", store.rows());
    assert!(store.read(&[6]).is_err());
    let piece = || (flat(&[[0.0; 2]; 2]), flat(&[[0.0; 2]; 6]));
    assert!(store.write(piece(), &[(7, 0)], &[]).is_err());
}
