//! MRA against matrices made of blocks laid out by hand.
#![allow(clippy::needless_range_loop, clippy::panic, clippy::unwrap_used)]

use crate::common::attention::{
    Given, HEAD_WIDTH, HEADS, Run, Subject, WIDTH, dot, growth, mask, softmax, spec,
};
use crate::common::{
    assert_near, contracted, difference, gradient_error, is_finite, random, values,
};
use lapidary_kernels::Tensor;
use lapidary_parts::attention::mechanism::MechanismSpec;
use lapidary_parts::attention::mechanism::mra::{MraSpec, Tiles};

type Rows = Vec<Vec<f64>>;

fn subject(mra: &MraSpec, causal: bool) -> Subject {
    Subject::new(spec(MechanismSpec::Mra(mra.clone()), causal), 4)
}

/// The same with logits so many times as large.
fn sharper(mra: &MraSpec, causal: bool, factor: f64) -> Subject {
    let mut subject = subject(mra, causal);
    for name in ["query.weight", "query.bias"] {
        let larger = (&subject.map[name] * factor).unwrap();
        subject.map.insert(name.to_owned(), larger);
    }
    subject
}

fn three(per_row: [usize; 2]) -> MraSpec {
    MraSpec {
        scales: vec![4, 2, 1],
        per_row: per_row.to_vec(),
        ..MraSpec::new(4, 1)
    }
}

fn specs() -> Vec<MraSpec> {
    let mut all = vec![
        MraSpec::new(4, 0),
        MraSpec::new(4, 1),
        MraSpec::new(2, 2),
        MraSpec::new(8, 1),
        three([1, 2]),
        three([2, 1]),
        MraSpec {
            scales: vec![8, 4, 2, 1],
            per_row: vec![1, 2, 2],
            ..MraSpec::new(8, 1)
        },
        MraSpec {
            scales: vec![6, 2],
            ..MraSpec::new(6, 1)
        },
        MraSpec {
            diagonal: 3,
            first: 1,
            ..MraSpec::new(4, 2)
        },
        MraSpec {
            image: Some(Tiles {
                columns: 4,
                tile: [2, 2],
            }),
            ..MraSpec::new(4, 1)
        },
        MraSpec {
            image: Some(Tiles {
                columns: 4,
                tile: [3, 2],
            }),
            diagonal: 1,
            scales: vec![6, 3, 1],
            per_row: vec![1, 1],
            ..MraSpec::new(6, 1)
        },
    ];
    for sparse in all.clone() {
        if sparse.per_row.iter().all(|count| *count > 0) {
            all.push(MraSpec {
                sparse: true,
                ..sparse
            });
        }
    }
    all
}

/// A block of the matrix: its side, its place, its logit.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Block {
    side: usize,
    x: usize,
    y: usize,
    logit: f64,
}

fn mean(rows: &[&[f64]]) -> Vec<f64> {
    let count = rows.len() as f64;
    (0..HEAD_WIDTH)
        .map(|f| rows.iter().map(|row| row[f]).sum::<f64>() / count)
        .collect()
}

/// Tokens in the order in which blocks are of neighbours.
fn in_order(mra: &MraSpec, real: &[usize]) -> Vec<usize> {
    let Some(Tiles { columns, tile }) = mra.image else {
        return real.to_vec();
    };
    let mut order = Vec::new();
    let rows = real.len().div_ceil(columns);
    for top in (0..rows).step_by(tile[0]) {
        for left in (0..columns).step_by(tile[1]) {
            for row in top..top + tile[0] {
                for column in left..left + tile[1] {
                    order.extend(real.get(row * columns + column).filter(|_| row < rows));
                }
            }
        }
    }
    order
}

/// The blocks that the matrix of queries `q` and keys `k`, in order, is made of, by the construction in words:
/// take the best, put their parts in their place.
fn tiling(mra: &MraSpec, q: &Rows, k: &Rows, causal: bool) -> Vec<Block> {
    let n = q.len();
    let scale = 1.0 / (HEAD_WIDTH as f64).sqrt();
    let block = |side: usize, x: usize, y: usize| -> Block {
        let of = |rows: &Rows, at: usize| -> Vec<f64> {
            let tokens: Vec<&[f64]> = rows[at * side..n.min((at + 1) * side)]
                .iter()
                .map(Vec::as_slice)
                .collect();
            mean(&tokens)
        };
        let query = if causal {
            q[x * side].clone()
        } else {
            of(q, x)
        };
        let logit = scale * dot(&query, &of(k, y));
        Block { side, x, y, logit }
    };
    let first = mra.scales[0];
    let all = n.div_ceil(first);
    let mut done = Vec::new();
    let mut current: Vec<Block> = (0..all)
        .flat_map(|x| (0..all).map(move |y| (x, y)))
        .filter(|(x, y)| !causal || y <= x)
        .map(|(x, y)| block(first, x, y))
        .collect();
    let mut largest = vec![f64::NEG_INFINITY; all];
    for block in &current {
        largest[block.x] = largest[block.x].max(block.logit);
    }
    for (level, budget) in mra.per_row.iter().enumerate() {
        let (side, finer) = (mra.scales[level], mra.scales[level + 1]);
        let value = |b: &Block| {
            let mut value = b.logit - largest[b.x * side / first];
            if level == 0 {
                if mra.diagonal > 0 && b.x.abs_diff(b.y) <= mra.diagonal / 2 {
                    value += 5e3;
                }
                if b.x < mra.first || b.y < mra.first {
                    value += 5e3;
                }
            }
            value
        };
        let mut order: Vec<usize> = (0..current.len()).collect();
        order.sort_by(|&a, &b| value(&current[b]).total_cmp(&value(&current[a])));
        let chosen: Vec<usize> = match causal {
            false => order.into_iter().take(budget * n.div_ceil(side)).collect(),
            true => (0..n.div_ceil(side))
                .flat_map(|row| {
                    let diagonal = |&&at: &&usize| current[at].x == current[at].y;
                    let mine: Vec<usize> = order
                        .iter()
                        .filter(|&&at| current[at].x == row)
                        .copied()
                        .collect();
                    let own: Vec<usize> = mine.iter().filter(diagonal).copied().collect();
                    let others = mine.iter().filter(|at| !diagonal(at)).copied();
                    own.into_iter()
                        .chain(others)
                        .take(*budget)
                        .collect::<Vec<_>>()
                })
                .collect(),
        };
        let mut next = Vec::new();
        for (at, old) in current.iter().enumerate() {
            if !chosen.contains(&at) {
                done.push(*old);
                continue;
            }
            let each = side / finer;
            for x in old.x * each..(old.x + 1) * each {
                for y in old.y * each..(old.y + 1) * each {
                    let there = x * finer < n && y * finer < n && (!causal || y <= x);
                    if there {
                        next.push(block(finer, x, y));
                    }
                }
            }
        }
        current = next;
    }
    if mra.sparse {
        done.clear();
    }
    done.extend(current);
    done
}

/// The weights of one head, from its blocks.
fn expected(mra: &MraSpec, run: &Run, [b, head]: [usize; 2], keep: &[bool], causal: bool) -> Rows {
    let real: Vec<usize> = (0..run.length).filter(|&t| keep[t]).collect();
    let order = in_order(mra, &real);
    let of = |row: &dyn Fn(usize) -> Vec<f64>| -> Rows { order.iter().map(|&t| row(t)).collect() };
    let q = of(&|t| run.query(b, head, t).to_vec());
    let k = of(&|t| run.key(b, head, t).to_vec());
    let n = order.len();
    let mut logits = vec![vec![f64::NEG_INFINITY; n]; n];
    for block in tiling(mra, &q, &k, causal) {
        for i in block.x * block.side..n.min((block.x + 1) * block.side) {
            for j in block.y * block.side..n.min((block.y + 1) * block.side) {
                assert_eq!(logits[i][j], f64::NEG_INFINITY, "blocks overlap");
                logits[i][j] = block.logit;
            }
        }
    }
    let mut weights = vec![vec![0.0; run.length]; run.length];
    for (i, row) in logits.iter().enumerate() {
        for (j, weight) in softmax(row).into_iter().enumerate() {
            weights[order[i]][order[j]] = weight;
        }
    }
    weights
}

fn check(mra: &MraSpec, subject: &Subject, x: &Tensor, keep: Option<&[u8]>, causal: bool) {
    let (batch, length, _) = x.dims3().unwrap();
    let bits = keep.map(|keep| mask(&vec![keep; batch]));
    let given = Given {
        keep: bits.as_ref(),
        draw: None,
    };
    let run = subject.run(x, given);
    let keep: Vec<bool> = match keep {
        None => vec![true; length],
        Some(keep) => keep.iter().map(|keep| *keep == 1).collect(),
    };
    let of = |b, head| expected(mra, &run, [b, head], &keep, causal);
    let all: Vec<Vec<Rows>> = (0..batch)
        .map(|b| (0..HEADS).map(|head| of(b, head)).collect())
        .collect();
    let row = |b: usize, head: usize, i: usize| all[b][head][i].clone();
    run.check(
        batch,
        row,
        1e-9,
        &format!("{mra:?} causal {causal} at {length}"),
    );
}

#[test]
fn equals_blocks_laid_out() {
    for length in [1, 7, 12, 24] {
        let x = random(&[2, length, WIDTH], 1);
        for mra in specs() {
            check(&mra, &sharper(&mra, false, 3.0), &x, None, false);
        }
    }
}

#[test]
fn pads_are_not_there() {
    let keep = [0, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 0, 1, 1, 0, 0];
    let x = random(&[2, 16, WIDTH], 1);
    for mra in specs() {
        check(&mra, &sharper(&mra, false, 3.0), &x, Some(&keep), false);
    }
}

fn causal_specs() -> Vec<MraSpec> {
    let fit = |mra: &MraSpec| {
        mra.image.is_none()
            && mra.per_row.iter().all(|count| *count > 0)
            && mra.scales.last() == Some(&1)
    };
    specs().into_iter().filter(fit).collect()
}

#[test]
fn the_causal_form_equals_blocks_laid_out() {
    let keep = [0, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 0, 1, 1, 0, 0];
    for mra in causal_specs() {
        let subject = sharper(&mra, true, 3.0);
        for length in [1, 7, 16] {
            let x = random(&[1, length, WIDTH], 1);
            let keep = (length == 16).then_some(&keep[..]);
            check(&mra, &subject, &x, keep, true);
        }
    }
}

/// Neither a value, nor a mean, nor the choice of blocks hangs on later tokens.
#[test]
fn later_tokens_change_nothing_before_them_and_steps_are_the_pass() {
    let x = random(&[1, 24, WIDTH], 1);
    for mra in causal_specs() {
        let subject = sharper(&mra, true, 3.0);
        let whole = subject.output(&x, Given::default());
        for kept in [1, 6, 13, 23] {
            let later = random(&[1, 24 - kept, WIDTH], 7);
            let other = Tensor::cat(&[&x.narrow(1, 0, kept).unwrap(), &later], 1).unwrap();
            let other = subject.output(&other, Given::default());
            let [before, after] = [&whole, &other].map(|y| y.narrow(1, 0, kept).unwrap());
            assert_near(&after, &before, 1e-14, &format!("{mra:?} before {kept}"));
        }
        for steps in [vec![1; 24], vec![5, 1, 10, 8], vec![23, 1]] {
            let stepped = subject.decode(&x, &steps);
            assert_near(&stepped, &whole, 1e-10, &format!("{mra:?} in {steps:?}"));
        }
    }
}

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
                draw: None,
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

#[test]
fn rows_sum_to_one_and_no_weight_is_negative() {
    let x = random(&[1, 23, WIDTH], 1);
    for mra in specs().into_iter().filter(|mra| !mra.sparse) {
        let run = sharper(&mra, false, 4.0).run(&x, Given::default());
        for row in run.weights.chunks(23) {
            assert!((row.iter().sum::<f64>() - 1.0).abs() < 1e-12);
            assert!(row.iter().all(|weight| *weight >= 0.0));
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

/// Where all logits are nothing, weights count how often an entry is covered.
#[test]
fn blocks_of_four_sizes_cover_every_entry_once() {
    for length in [16, 24, 21] {
        let mra = MraSpec {
            scales: vec![8, 4, 2, 1],
            per_row: vec![1, 2, 2],
            ..MraSpec::new(8, 1)
        };
        // So small that they decide what is refined and nothing else.
        let run = sharper(&mra, false, 1e-9).run(&random(&[1, length, WIDTH], 1), Given::default());
        let even = 1.0 / length as f64;
        assert!(
            run.weights
                .iter()
                .all(|weight| (weight - even).abs() < 1e-8)
        );
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

#[test]
fn extreme_logits_stay_numbers() {
    let x = random(&[1, 24, WIDTH], 1);
    for mra in specs() {
        let subject = sharper(&mra, false, 400.0);
        let run = subject.run(&x, Given::default());
        let scale = 1.0 / (HEAD_WIDTH as f64).sqrt();
        let logits =
            (0..576).map(|at| scale * dot(run.query(0, 0, at / 24), run.key(0, 0, at % 24)));
        assert!(logits.fold(0.0, |m: f64, x| m.max(x.abs())) > 200.0);
        assert!(
            run.weights.iter().all(|weight| weight.is_finite()),
            "{mra:?}"
        );
        assert!(is_finite(&subject.output(&x, Given::default())));
        for row in run.weights.chunks(24) {
            let sum: f64 = row.iter().sum();
            assert!(
                (sum - 1.0).abs() < 1e-9 || (mra.sparse && sum == 0.0),
                "{sum}"
            );
        }
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

#[test]
fn gradients_equal_central_differences() {
    let x = random(&[1, 13, WIDTH], 1);
    for mra in specs() {
        let subject = sharper(&mra, false, 2.0);
        let mut inputs = subject.map.clone();
        inputs.insert("x".to_owned(), x.clone());
        let error = gradient_error(&inputs, 3, |inputs| {
            let subject = Subject {
                spec: subject.spec.clone(),
                map: inputs.clone(),
            };
            contracted(&subject.output(&inputs["x"], Given::default()))
        });
        assert!(error < 1e-6, "{mra:?}: {error:e}");
    }
}

/// Of scores: `(n / b)²` of blocks, and `m b²` of single entries.
#[test]
fn scores_are_those_of_blocks_and_of_what_is_refined() {
    let (b, d) = (8, HEAD_WIDTH as u64);
    for (n, per_row) in [(64u64, 1u64), (128, 3), (256, 2)] {
        let (blocks, m) = ((n / b) * (n / b), per_row * n / b);
        let mra = |sparse| MraSpec {
            sparse,
            // One part for all rows, so that nothing is merged.
            diagonal: 2 * per_row as usize - 1,
            ..MraSpec::new(b as usize, per_row as usize)
        };
        let heads = HEADS as u64;
        let means = n * 3 * d;
        let sparse = subject(&mra(true), false).mixing_operations(n as usize);
        if per_row == 1 {
            let scores = m * b * b;
            assert_eq!(
                sparse,
                heads * (blocks * 2 * d + means + scores * (4 * d + 5))
            );
            let full = subject(&mra(false), false).mixing_operations(n as usize);
            let merging = 2 * n * (2 * d + 4);
            let pairs = scores + blocks - m;
            assert_eq!(
                full,
                heads * (blocks * 2 * d + means + pairs * (4 * d + 5) + merging)
            );
        } else {
            // Rows may have more than others, which takes parts that are merged.
            let least = heads * (blocks * 2 * d + means + m * b * b * (4 * d + 5));
            assert!(sparse >= least && sparse < least + heads * 4 * n * (2 * d + 4));
        }
    }
}

#[test]
fn operations_grow_little_faster_than_the_length() {
    for causal in [false, true] {
        let subject = subject(&MraSpec::new(32, 4), causal);
        let exponent = growth(1024, |n| subject.mixing_operations(n));
        assert!((exponent - 1.0).abs() < 0.1, "{exponent}");
    }
}

/// One row may have all the blocks without the others becoming as long.
#[test]
fn a_row_that_takes_all_is_divided() {
    let x = random(&[1, 64, WIDTH], 2);
    let mra = MraSpec {
        first: 1,
        ..MraSpec::new(4, 2)
    };
    check(&mra, &sharper(&mra, false, 3.0), &x, None, false);
    assert!(!values(&x).is_empty());
}
