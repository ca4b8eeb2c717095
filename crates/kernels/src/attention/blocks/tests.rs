use super::*;
use crate::check::{difference, gradient_error};
use crate::test_data::{arange, compare};
use crate::{Attended, DType, Device, Var};
use proptest::prelude::*;

/// A block: rows and positions of queries, and of keys.
type Block = [Vec<[u32; 2]>; 2];

fn part(blocks: &[Block]) -> BlockPart {
    let mut part = BlockPart::default();
    for [queries, keys] in blocks {
        for ([row, position], to) in queries
            .iter()
            .map(|at| (*at, 0))
            .chain(keys.iter().map(|at| (*at, 1)))
        {
            let side = if to == 0 {
                &mut part.queries
            } else {
                &mut part.keys
            };
            side.rows.push(row);
            side.positions.push(position);
        }
        let ends = [part.queries.rows.len(), part.keys.rows.len()];
        part.ends.push(ends);
    }
    part
}

/// Rows `start, start + step, …` of `count`, which stand at `position, position + by, …`.
fn run([start, step, count]: [u32; 3], [position, by]: [u32; 2]) -> Vec<[u32; 2]> {
    (0..count)
        .map(|i| [start + i * step, position + i * by])
        .collect()
}

/// Rows of queries and of keys in the tests below.
const ROWS: [usize; 2] = [330, 400];

/// Blocks of every kind: long and short ones, neighbours and scattered rows, keys met by several.
fn kinds() -> Vec<Vec<BlockPart>> {
    let long = || {
        part(&[
            [run([0, 1, 300], [10, 1]), run([0, 1, 200], [0, 2])],
            [run([329, 1, 1], [7, 1]), run([3, 7, 50], [0, 1])],
            [run([310, 2, 9], [0, 3]), run([150, 1, 60], [1, 1])],
        ])
    };
    let short = || {
        let each = (0..30).map(|i| [run([11 * i, 1, 1], [i, 1]), run([i, 13, i], [i / 2, 1])]);
        part(&each.collect::<Vec<_>>())
    };
    let ruled = |causal, window, own| {
        let rule = |part| BlockPart {
            causal,
            window,
            own,
            ..part
        };
        vec![rule(long()), rule(short())]
    };
    let mut biased = vec![long(), short()];
    for part in &mut biased {
        let keys = part.keys.rows.len();
        part.key_bias = (0..keys).map(|key| (key as f64).sin()).collect();
        part.hidden = vec![[2, 5], [2, 9], [4, 7], [20, 160]];
        part.causal = true;
    }
    let mut paired = vec![short(), long()];
    for part in &mut paired {
        let mut start = [0; 2];
        let mut pairs = 0;
        for end in &part.ends {
            pairs += (end[0] - start[0]) * (end[1] - start[1]);
            start = *end;
        }
        let bias = |pair: usize| match pair % 5 {
            0 => f64::NEG_INFINITY,
            _ => (pair as f64).cos(),
        };
        part.pair_bias = (0..pairs).map(bias).collect();
        part.own = -1.5;
    }
    vec![
        vec![],
        vec![long()],
        ruled(true, None, 0.0),
        ruled(true, Some(20), -1.0),
        ruled(false, Some(9), f64::NEG_INFINITY),
        biased,
        paired,
    ]
}

fn attention(parts: Vec<BlockPart>, rows: [usize; 2]) -> Arc<BlockAttention> {
    Arc::new(BlockAttention::new(parts, rows, 0.3).unwrap())
}

fn inputs(
    [queries, keys]: [usize; 2],
    [width, value_width]: [usize; 2],
    dtype: DType,
) -> [Tensor; 3] {
    [
        arange(&[queries, width], 1.0, dtype),
        arange(&[keys, width], 2.0, dtype),
        arange(&[keys, value_width], 3.0, dtype),
    ]
}

#[test]
fn equals_the_composition() {
    for parts in kinds() {
        for widths in [[5, 3], [24, 40]] {
            compare(2e-5, |dtype| {
                let [q, k, v] = inputs(ROWS, widths, dtype);
                let of = attention(parts.clone(), ROWS);
                let ours = of.rows([&q, &k, &v]).unwrap();
                let plain = of.laid_out([&q, &k, &v]).unwrap();
                let output = ours.narrow(1, 0, widths[1]).unwrap();
                let alone = of.output([&q, &k, &v]).unwrap();
                assert_eq!(difference(&alone, &output).unwrap(), 0.0);
                let finite = |x: Tensor| x.maximum(-20.0).unwrap();
                (finite(ours), finite(plain))
            });
        }
    }
}

#[test]
fn rows_of_several_dimensions_are_read_where_they_lie() {
    compare(1e-6, |dtype| {
        let [q, k, v] = inputs(ROWS, [24, 40], dtype);
        let of = attention(kinds().remove(2), ROWS);
        let plain = of.output([&q, &k, &v]).unwrap();
        // The same rows with heads side by side, and with features apart.
        let heads = |x: &Tensor| {
            let (rows, width) = x.dims2().unwrap();
            let x = x.reshape((2, rows / 2, width)).unwrap();
            let x = x.transpose(0, 1).unwrap().contiguous().unwrap();
            x.transpose(0, 1).unwrap()
        };
        let across = v.t().unwrap().contiguous().unwrap();
        let across = across.t().unwrap();
        (of.output([&heads(&q), &heads(&k), &across]).unwrap(), plain)
    });
}

/// Gradients of something that asks for outputs and log-sums.
fn gradients(x: &[Var; 3], rows: &Tensor) -> Vec<Tensor> {
    let loss = rows.maximum(-1e3).unwrap().sin().unwrap();
    let gradients = loss.sum_all().unwrap().backward().unwrap();
    x.iter()
        .map(|x| match gradients.get(x) {
            Some(gradient) => gradient.clone(),
            None => x.zeros_like().unwrap(),
        })
        .collect()
}

#[test]
fn gradients_equal_those_of_the_composition() {
    for parts in kinds() {
        for (dtype, widths, tolerance) in [
            (DType::F64, [5, 3], 1e-10),
            (DType::F64, [24, 40], 1e-10),
            (DType::F32, [24, 40], 2e-4),
        ] {
            let x = inputs(ROWS, widths, dtype).map(|x| Var::from_tensor(&x).unwrap());
            let of = attention(parts.clone(), ROWS);
            let [q, k, v] = [0, 1, 2].map(|i| x[i].as_tensor());
            let ours = gradients(&x, &of.rows([q, k, v]).unwrap());
            let plain = gradients(&x, &of.laid_out([q, k, v]).unwrap());
            for (ours, plain) in ours.iter().zip(&plain) {
                assert!(difference(ours, plain).unwrap() < tolerance);
            }
        }
    }
}

#[test]
fn gradients_equal_finite_differences() {
    let rows = [11, 13];
    let parts = || {
        let large = [
            [run([0, 1, 9], [0, 1]), run([2, 1, 8], [0, 1])],
            [run([10, 1, 1], [4, 1]), run([1, 3, 4], [3, 1])],
        ];
        let small = [
            [run([3, 4, 2], [5, 1]), run([0, 6, 3], [0, 4])],
            [run([1, 1, 1], [5, 1]), run([4, 0, 2], [0, 5])],
        ];
        let mut parts = vec![part(&large), part(&small)];
        parts[0].causal = true;
        parts[0].own = 0.5;
        parts[1].key_bias = vec![0.5, -1.0, 0.0, 2.0, 0.1];
        parts
    };
    let inputs = inputs(rows, [3, 2], DType::F64);
    let of = attention(parts(), rows);
    let output = |x: &[Tensor]| of.output([&x[0], &x[1], &x[2]]);
    assert!(gradient_error(output, &inputs).unwrap() < 1e-8);
    let with_sums = |x: &[Tensor]| Ok(of.rows([&x[0], &x[1], &x[2]])?.maximum(-1e3)?);
    assert!(gradient_error(with_sums, &inputs).unwrap() < 1e-8);
}

#[test]
fn results_do_not_depend_on_threads() {
    for parts in kinds() {
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
            pool.build().unwrap().install(|| {
                let x = inputs(ROWS, [24, 40], DType::F32).map(|x| Var::from_tensor(&x).unwrap());
                let of = attention(parts.clone(), ROWS);
                let rows = of.rows([x[0].as_tensor(), x[1].as_tensor(), x[2].as_tensor()]);
                let rows = rows.unwrap();
                let mut all = gradients(&x, &rows);
                all.push(rows);
                all
            })
        };
        for (one, three) in run(1).iter().zip(run(3)) {
            assert_eq!(difference(one, &three).unwrap(), 0.0);
        }
    }
}

/// Pieces of one block, whose keys are laid out once, are blocks that have the same keys each.
#[test]
fn pieces_of_the_same_keys_are_blocks_of_their_own() {
    let keys = || run([3, 5, 60], [0, 1]);
    let whole = part(&[[run([0, 1, 330], [0, 1]), keys()]]);
    let thirds = [0, 110, 220].map(|start| [run([start, 1, 110], [start, 1]), keys()]);
    for dtype in [DType::F32, DType::F64] {
        let [q, k, v] = inputs(ROWS, [24, 40], dtype);
        let [whole, thirds] = [whole.clone(), part(&thirds)]
            .map(|part| attention(vec![part], ROWS).rows([&q, &k, &v]).unwrap());
        let error = difference(&whole, &thirds).unwrap();
        assert!(error < 1e-6, "{dtype:?}: {error}");
    }
}

#[test]
fn a_query_without_keys_gets_nothing() {
    let blocks = [[run([1, 1, 2], [5, 1]), run([0, 1, 3], [6, 1])]];
    let part = BlockPart {
        causal: true,
        ..part(&blocks)
    };
    let of = attention(vec![part], [4, 3]);
    let [q, k, v] = inputs([4, 3], [2, 2], DType::F64);
    let rows = of.rows([&q, &k, &v]).unwrap().to_vec2::<f64>().unwrap();
    let none = vec![0.0, 0.0, f64::NEG_INFINITY];
    assert_eq!([&rows[0], &rows[1], &rows[3]], [&none, &none, &none]);
    // Query 2 stands where key 0 does.
    let first = v.to_vec2::<f64>().unwrap()[0].clone();
    assert_eq!(rows[2][..2], first[..]);
}

/// In pieces of many queries and of few, a query that is no number has no output that is one, and no other
/// part makes it one.
#[test]
fn what_is_no_number_stays_none() {
    let many = part(&[[run([0, 1, 9], [0, 1]), run([0, 1, 5], [0, 1])]]);
    let few = part(&[[run([3, 1, 2], [0, 1]), run([5, 1, 6], [0, 1])]]);
    let [q, k, v] = inputs([9, 11], [3, 2], DType::F64);
    let mut numbers: Vec<f64> = q.flatten_all().unwrap().to_vec1().unwrap();
    numbers[3 * 3..4 * 3].fill(f64::NAN);
    let q = Tensor::from_vec(numbers, (9, 3), &Device::Cpu).unwrap();
    for parts in [
        vec![many.clone()],
        vec![few.clone()],
        vec![few.clone(), many.clone()],
        vec![many, few],
    ] {
        let rows = attention(parts, [9, 11]).rows([&q, &k, &v]).unwrap();
        for (query, row) in rows.to_vec2::<f64>().unwrap().iter().enumerate() {
            assert!(row.iter().all(|x| x.is_nan() == (query == 3)), "{row:?}");
        }
    }
}

#[test]
fn pairs_are_counted_as_composed() {
    let [q, k, _] = inputs(ROWS, [4, 4], DType::F64);
    // Weights are positive, so that every key that is met gets some.
    let units = Tensor::eye(ROWS[1], DType::F64, &Device::Cpu).unwrap();
    for parts in kinds() {
        let mut all = 0;
        for part in &parts {
            let of = attention(vec![part.clone()], ROWS);
            let seen = of.output([&q, &k, &units]).unwrap();
            let met = seen.gt(0.0).unwrap().to_dtype(DType::F64).unwrap();
            let met = met.sum_all().unwrap().to_scalar::<f64>().unwrap();
            assert_eq!(of.pairs() as f64, met);
            all += of.pairs();
        }
        assert_eq!(attention(parts, ROWS).pairs(), all);
    }
}

#[test]
fn lists_that_do_not_fit_are_refused() {
    let good = || part(&[[run([0, 1, 2], [0, 1]), run([0, 1, 3], [0, 1])]]);
    let refused = |change: &dyn Fn(&mut BlockPart)| {
        let mut part = good();
        change(&mut part);
        BlockAttention::new(vec![part], [4, 4], 1.0).is_err()
    };
    assert!(!refused(&|_| {}));
    assert!(refused(&|part| part.queries.rows[1] = 0));
    assert!(refused(&|part| part.queries.rows[1] = 4));
    assert!(refused(&|part| part.keys.rows[1] = 4));
    assert!(refused(&|part| part.keys.positions[0] = 9));
    assert!(refused(&|part| part.keys.positions.clear()));
    assert!(refused(&|part| part.ends = vec![[2, 2]]));
    assert!(refused(&|part| part.ends = vec![[2, 3], [1, 3], [2, 3]]));
    assert!(refused(&|part| part.key_bias = vec![0.0]));
    assert!(refused(&|part| part.pair_bias = vec![0.0; 5]));
    assert!(refused(&|part| part.hidden = vec![[1, 0], [0, 0]]));
    assert!(refused(&|part| part.window = Some(0)));
    let of = attention(vec![good()], [4, 4]);
    let x = |rows: usize, width: usize| arange(&[rows, width], 1.0, DType::F32);
    assert!(of.output([&x(3, 2), &x(4, 2), &x(4, 2)]).is_err());
    assert!(of.output([&x(4, 2), &x(4, 3), &x(4, 2)]).is_err());
    assert!(of.output([&x(4, 2), &x(4, 2), &x(3, 2)]).is_err());
    let of_nobody = Arc::new(vec![4]);
    assert!(Attended::new([&x(4, 2), &x(4, 2), &x(4, 2)], &of, of_nobody).is_err());
}

proptest! {
    /// Blocks that tile a triangle are causal attention.
    #[test]
    fn blocks_of_a_triangle_are_causal_attention(length in 1u32..90, size in 1u32..40) {
        let starts = (0..length).step_by(size as usize);
        let blocks = starts.map(|start| {
            let count = size.min(length - start);
            [run([start, 1, count], [start, 1]), run([0, 1, start + count], [0, 1])]
        });
        let part = BlockPart { causal: true, ..part(&blocks.collect::<Vec<_>>()) };
        let rows = [length as usize; 2];
        let of = attention(vec![part], rows);
        let [q, k, v] = inputs(rows, [8, 8], DType::F64);
        let options = crate::AttentionOptions {
            scale: 0.3,
            causal: true,
            ..crate::AttentionOptions::new(8)
        };
        let [one, two, three] = [&q, &k, &v].map(|x| x.unsqueeze(0).unwrap().unsqueeze(0).unwrap());
        let whole = crate::attention(&one, &two, &three, &options).unwrap();
        let whole = whole.reshape((length as usize, 8)).unwrap();
        prop_assert!(difference(&of.output([&q, &k, &v]).unwrap(), &whole).unwrap() < 1e-12);
        let pairs = u64::from(length) * u64::from(length + 1) / 2;
        prop_assert_eq!(of.pairs(), pairs);
    }
}
