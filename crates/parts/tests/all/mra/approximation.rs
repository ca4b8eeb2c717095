//! How near blocks come to softmax, and where they are equal to it.

use super::{Rows, check, mean, sharper, subject, three};
use crate::common::attention::{
    Given, HEAD_WIDTH, HEADS, Run, Subject, WIDTH, dot, mask, softmax, spec,
};
use crate::common::{assert_near, difference, random};
use lapidary_kernels::Tensor;
use lapidary_parts::attention::mechanism::MechanismSpec;
use lapidary_parts::attention::mechanism::mra::{MraSpec, Tiles};

#[test]
fn everything_refined_is_softmax() {
    let length = 14;
    let x = random(&[2, length, WIDTH], 1);
    let bits: [u8; 14] = [1, 1, 0, 1, 1, 1, 1, 1, 1, 0, 1, 1, 0, 0];
    for mra in [
        MraSpec::new(4, 4),
        three([4, 7]),
        MraSpec {
            sparse: true,
            ..MraSpec::new(4, 4)
        },
        MraSpec {
            image: Some(Tiles {
                columns: 4,
                tile: [2, 2],
            }),
            ..MraSpec::new(4, 4)
        },
    ] {
        for keep in [None, Some(&bits)] {
            let given_bits = keep.map(|keep| mask(&[keep, keep]));
            let given = Given {
                keep: given_bits.as_ref(),
                ..Given::default()
            };
            let subject = subject(&mra, false);
            let run = subject.run(&x, given);
            let row = |b: usize, head: usize, i: usize| {
                if keep.is_some_and(|keep| keep[i] == 0) {
                    return vec![0.0; length];
                }
                let scale = 1.0 / (HEAD_WIDTH as f64).sqrt();
                let score = |j: usize| match keep.is_some_and(|keep| keep[j] == 0) {
                    true => f64::NEG_INFINITY,
                    false => scale * dot(run.query(b, head, i), run.key(b, head, j)),
                };
                softmax(&(0..length).map(score).collect::<Vec<_>>())
            };
            run.check(2, row, 1e-10, "softmax");
        }
    }
}

/// Tokens that are alike in blocks of four.
fn constant_in_blocks(blocks: usize) -> Tensor {
    let one = random(&[1, blocks, 1, WIDTH], 1);
    let wide = one.broadcast_as((1, blocks, 4, WIDTH)).unwrap();
    wide.contiguous()
        .unwrap()
        .reshape((1, 4 * blocks, WIDTH))
        .unwrap()
}

#[test]
fn nothing_refined_is_a_softmax_over_means_and_exact_where_blocks_are_constant() {
    let mra = MraSpec::new(4, 0);
    let dense = Subject {
        spec: spec(MechanismSpec::Softmax, false),
        map: subject(&mra, false).map,
    };
    let x = constant_in_blocks(4);
    let found = subject(&mra, false).output(&x, Given::default());
    assert_near(
        &found,
        &dense.output(&x, Given::default()),
        1e-12,
        "constant",
    );
    // Otherwise all rows of a block are one.
    let x = random(&[1, 16, WIDTH], 2);
    let run = subject(&mra, false).run(&x, Given::default());
    for head in 0..HEADS {
        for i in 0..16 {
            for j in 0..16 {
                let other = run.weight(0, head, i / 4 * 4, j / 4 * 4);
                assert!((run.weight(0, head, i, j) - other).abs() < 1e-14);
            }
        }
    }
    let far = difference(
        &subject(&mra, false).output(&x, Given::default()),
        &dense.output(&x, Given::default()),
    );
    assert!(far > 1e-3);
}

/// What stands for a block, told from a weight beside a single entry's, is at most the mean of its entries,
/// and that mean where they are all alike.
#[test]
fn blocks_stand_for_no_more_than_their_mean() {
    for (x, alike) in [
        (random(&[1, 16, WIDTH], 3), false),
        (constant_in_blocks(4), true),
    ] {
        let mra = MraSpec {
            diagonal: 1,
            ..MraSpec::new(4, 1)
        };
        let run = sharper(&mra, false, 2.0).run(&x, Given::default());
        let scale = 1.0 / (HEAD_WIDTH as f64).sqrt();
        let entry = |head: usize, i: usize, j: usize| {
            (scale * dot(run.query(0, head, i), run.key(0, head, j))).exp()
        };
        for head in 0..HEADS {
            for (x, y) in (0..4)
                .flat_map(|x| (0..4).map(move |y| (x, y)))
                .filter(|(x, y)| x != y)
            {
                let i = 4 * x;
                let found =
                    run.weight(0, head, i, 4 * y) / run.weight(0, head, i, i) * entry(head, i, i);
                let all = (0..16).map(|at| entry(head, i + at / 4, 4 * y + at % 4));
                let mean = all.sum::<f64>() / 16.0;
                match alike {
                    true => assert!((found / mean - 1.0).abs() < 1e-9),
                    false => assert!(found < mean * (1.0 - 1e-6), "{found} {mean}"),
                }
            }
        }
    }
}

/// MRA-2 as its authors' program has it: maxima of rows and of block rows, joined by their difference.
#[test]
fn two_scales_are_the_published_program() {
    let (length, size, m) = (24, 4, 6);
    let x = random(&[1, length, WIDTH], 5);
    for sparse in [false, true] {
        let mra = MraSpec {
            sparse,
            ..MraSpec::new(size, 1)
        };
        let run = sharper(&mra, false, 3.0).run(&x, Given::default());
        let blocks = length / size;
        let scale = 1.0 / (HEAD_WIDTH as f64).sqrt();
        for head in 0..HEADS {
            let pooled = |row: &dyn Fn(usize) -> Vec<f64>, at: usize| -> Vec<f64> {
                let tokens: Rows = (at * size..(at + 1) * size).map(row).collect();
                mean(&tokens.iter().map(Vec::as_slice).collect::<Vec<_>>())
            };
            let low: Rows = (0..blocks)
                .map(|x| {
                    let q = pooled(&|t| run.query(0, head, t).to_vec(), x);
                    let logit = |y| dot(&q, &pooled(&|t| run.key(0, head, t).to_vec(), y)) * scale;
                    (0..blocks).map(logit).collect()
                })
                .collect();
            let row_max = |x: usize| low[x].iter().copied().fold(f64::MIN, f64::max);
            let mut all: Vec<(f64, usize, usize)> = (0..blocks * blocks)
                .map(|at| {
                    (
                        low[at / blocks][at % blocks] - row_max(at / blocks),
                        at / blocks,
                        at % blocks,
                    )
                })
                .collect();
            all.sort_by(|a, b| b.0.total_cmp(&a.0));
            let high: Vec<(usize, usize)> = all[..m].iter().map(|(_, x, y)| (*x, *y)).collect();
            for i in 0..length {
                let x = i / size;
                let fine = |j: usize| scale * dot(run.query(0, head, i), run.key(0, head, j));
                let seen: Vec<usize> = (0..length)
                    .filter(|&j| high.contains(&(x, j / size)))
                    .collect();
                let h = seen.iter().map(|&j| fine(j)).fold(f64::MIN, f64::max);
                let delta = if seen.is_empty() {
                    f64::INFINITY
                } else {
                    row_max(x) - h
                };
                let (low_by, high_by) = ((delta.min(0.0)).exp(), (-delta.max(0.0)).exp());
                let weight = |j: usize| match (seen.contains(&j), sparse) {
                    (true, _) => high_by * (fine(j) - h).exp(),
                    (false, true) => 0.0,
                    (false, false) => low_by * (low[x][j / size] - row_max(x)).exp(),
                };
                let weights: Vec<f64> = (0..length).map(weight).collect();
                let total: f64 = weights.iter().sum();
                for (j, weight) in weights.iter().enumerate() {
                    let expected = if total > 0.0 { weight / total } else { 0.0 };
                    let found = run.weight(0, head, i, j);
                    assert!((found - expected).abs() < 1e-9, "{found} {expected}");
                }
            }
        }
    }
}

/// `‖Â − A‖ / ‖A‖` before rows are divided by their sums, which the diagonal, always refined, tells; over
/// seeds.
fn error(mra: &MraSpec) -> f64 {
    let (mut apart, mut whole) = (0.0, 0.0);
    let scale = 1.0 / (HEAD_WIDTH as f64).sqrt();
    for seed in 0..12 {
        let x = random(&[1, 32, WIDTH], seed);
        let run = sharper(mra, false, 2.0).run(&x, Given::default());
        let entry = |i: usize, j: usize| (scale * dot(run.query(0, 0, i), run.key(0, 0, j))).exp();
        for i in 0..32 {
            let sum = entry(i, i) / run.weight(0, 0, i, i);
            for j in 0..32 {
                let exact = entry(i, j);
                apart += (sum * run.weight(0, 0, i, j) - exact).powi(2);
                whole += exact * exact;
            }
        }
    }
    (apart / whole).sqrt()
}

#[test]
fn more_refined_blocks_err_less_and_leaving_the_rest_out_errs_more() {
    let of = |sparse, per_row| {
        error(&MraSpec {
            sparse,
            diagonal: 1,
            ..MraSpec::new(4, per_row)
        })
    };
    let full: Vec<f64> = (1..=8).map(|per_row| of(false, per_row)).collect();
    let sparse: Vec<f64> = (1..=8).map(|per_row| of(true, per_row)).collect();
    for errors in [&full, &sparse] {
        assert!(
            errors.windows(2).all(|pair| pair[1] <= pair[0] + 1e-12),
            "{errors:?}"
        );
        assert!(errors[7] < 1e-10);
    }
    for (full, sparse) in full.iter().zip(&sparse).take(7) {
        assert!(full < sparse, "{full} {sparse}");
    }
}

/// Blocks of the first row are refined before all others, so that there are none for the last.
#[test]
fn rows_without_refined_blocks_get_the_coarse_average_or_nothing() {
    let x = random(&[1, 16, WIDTH], 1);
    let mra = |sparse| MraSpec {
        first: 1,
        sparse,
        ..MraSpec::new(4, 1)
    };
    // Seven blocks of the first row and column compete for four: those of equal standing by their logits.
    let whole = sharper(&mra(false), false, 3.0).run(&x, Given::default());
    let alone = sharper(&mra(true), false, 3.0).run(&x, Given::default());
    let mut seen = [false; 2];
    for head in 0..HEADS {
        for i in 0..16 {
            let row =
                |run: &Run| -> Vec<f64> { (0..16).map(|j| run.weight(0, head, i, j)).collect() };
            let refined = row(&alone).iter().any(|weight| *weight > 0.0);
            seen[usize::from(refined)] = true;
            if !refined {
                assert!(row(&alone).iter().all(|weight| *weight == 0.0));
                let whole = row(&whole);
                assert!((whole.iter().sum::<f64>() - 1.0).abs() < 1e-12);
                assert!(
                    whole
                        .chunks(4)
                        .all(|b| b.iter().all(|w| (w - b[0]).abs() < 1e-14))
                );
            }
        }
    }
    assert_eq!(seen, [true; 2], "rows of both kinds");
}

#[test]
fn order_within_a_block_does_not_matter_to_what_is_coarse() {
    let x = random(&[1, 16, WIDTH], 1);
    let order: Vec<u32> = (0..16).map(|t| t / 4 * 4 + (t * 3 + 1) % 4).collect();
    let order = Tensor::new(order.as_slice(), x.device()).unwrap();
    let moved = x.index_select(&order, 1).unwrap();
    let subject = sharper(&MraSpec::new(4, 0), false, 3.0);
    let weights = |x: &Tensor| subject.run(x, Given::default()).weights;
    let far = weights(&x)
        .iter()
        .zip(weights(&moved))
        .fold(0.0, |m: f64, (a, b)| m.max((a - b).abs()));
    assert!(far < 1e-14, "{far:e}");
    let mra = MraSpec::new(4, 1);
    check(&mra, &sharper(&mra, false, 3.0), &moved, None, false);
}
