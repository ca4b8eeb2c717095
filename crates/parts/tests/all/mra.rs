//! MRA against matrices made of blocks laid out by hand.
#![allow(clippy::needless_range_loop, clippy::panic, clippy::unwrap_used)]

mod approximation;
mod causal;

use crate::common::attention::{
    Given, HEAD_WIDTH, HEADS, Run, Subject, WIDTH, dot, growth, mask, softmax, spec,
};
use crate::common::{contracted, gradient_error, is_finite, random};
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
        ..Given::default()
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
            ..MraSpec::new(b as usize, per_row as usize)
        };
        let heads = HEADS as u64;
        let (scores, means) = (m * b * b, n * 3 * d);
        let sparse = subject(&mra(true), false).mixing_operations(n as usize);
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
    // 32 of 256 blocks are refined, 16 of them in the first row: single entries of these and no others.
    let (n, d) = (64, HEAD_WIDTH as u64);
    let pairs = 32 * 16 + 256 - 32;
    let each = 256 * 2 * d + n * 3 * d + pairs * (4 * d + 5) + 2 * n * (2 * d + 4);
    let found = subject(&mra, false).mixing_operations(64);
    assert_eq!(found, HEADS as u64 * each);
}
