use super::TreeFeatures::{Fourth, Given, Relu, Square};
use super::*;
use crate::check::{difference, gradient_error};
use crate::test_data::{arange, compare};
use crate::{Device, Var};

/// A path that is cut in the middle again and again down to `leaf` tokens.
fn path(tokens: usize, leaf: usize) -> TreePairs {
    let (mut pieces, mut again) = (Vec::new(), Vec::new());
    let mut open = vec![[0, tokens as u32]];
    while let Some([start, end]) = open.pop() {
        let range = start..end;
        if range.len() <= leaf {
            pieces.push(TreePiece::Leaf {
                tokens: range.collect(),
                distances: None,
            });
            continue;
        }
        let pivot = range.start + range.len() as u32 / 2;
        let left = (range.start..pivot).map(|token| (token, pivot - token));
        let right = (pivot + 1..range.end).map(|token| (token, token - pivot));
        pieces.push(TreePiece::Cut([
            TreeSide::new(left.collect()),
            TreeSide::new(right.collect()),
        ]));
        again.push(pivot);
        open.extend([[start, pivot + 1], [pivot, end]]);
    }
    TreePairs::new(tokens, pieces, again).unwrap()
}

/// A star of `arms` paths, cut at its middle: token 0 and arms of `length` tokens, in two heaps.
fn star(arms: u32, length: u32) -> TreePairs {
    let arm = |arm: u32| (0..length).map(move |step| (1 + arm * length + step, step + 1));
    let heaps = [0..arms / 2, arms / 2..arms];
    let mut pieces = vec![TreePiece::Cut(
        heaps
            .clone()
            .map(|heap| TreeSide::new(heap.flat_map(arm).collect())),
    )];
    for heap in heaps {
        let mut tokens = vec![(u32::MAX, 0, 0)];
        tokens.extend(heap.flat_map(|a| arm(a).map(move |(token, far)| (a, token, far))));
        let apart = |a: &(u32, u32, u32), b: &(u32, u32, u32)| match a.0 == b.0 {
            true => a.2.abs_diff(b.2),
            false => a.2 + b.2,
        };
        let pairs = tokens
            .iter()
            .flat_map(|a| tokens.iter().map(move |b| apart(a, b)));
        pieces.push(TreePiece::Leaf {
            distances: Some(pairs.collect()),
            tokens: tokens.iter().map(|token| token.1).collect(),
        });
    }
    TreePairs::new((1 + arms * length) as usize, pieces, vec![0]).unwrap()
}

/// `e^{a + b s + c s²}` of `s = distance / tokens`, and its derivatives by `a`, `b`, `c`.
fn smooth(pairs: TreePairs, coefficients: &Tensor) -> TreeMask {
    let distances = pairs.distances();
    let power = |power| (0..distances).map(move |s| (s as f64 / distances as f64).powi(power));
    let powers: Vec<f64> = (0..3).flat_map(power).collect();
    let powers = Tensor::from_vec(powers, (3, distances), &Device::Cpu).unwrap();
    let values = coefficients.matmul(&powers).unwrap().exp().unwrap();
    let directions = values.detach().unsqueeze(1).unwrap();
    TreeMask {
        pairs: Arc::new(pairs),
        directions: directions
            .broadcast_mul(&powers.unsqueeze(0).unwrap())
            .unwrap(),
        values,
    }
}

/// One that no polynomial is near.
fn rough(pairs: TreePairs, rows: usize) -> TreeMask {
    let distances = pairs.distances();
    TreeMask {
        pairs: Arc::new(pairs),
        values: arange(&[rows, distances], 4.0, DType::F64),
        directions: Tensor::zeros((rows, 0, distances), DType::F64, &Device::Cpu).unwrap(),
    }
}

fn coefficients(rows: usize) -> Tensor {
    let all = [0.1, -0.7, 0.3, -0.2, -2.0, -1.0, 0.0, 0.0, 0.0];
    Tensor::from_slice(&all[..3 * rows], (rows, 3), &Device::Cpu).unwrap()
}

/// Queries, keys and values of 2 sequences with 3 heads, some of them views.
fn given(tokens: usize, dtype: DType) -> [Tensor; 3] {
    let side_by_side = |width, phase| {
        let x = arange(&[2, tokens, 3, width], phase, dtype);
        x.transpose(1, 2).unwrap()
    };
    let turned = arange(&[2, 3, 5, tokens], 2.0, dtype);
    let (q, v) = (side_by_side(5, 1.0), side_by_side(4, 3.0));
    [q, turned.transpose(2, 3).unwrap(), v]
}

fn factored(mask: &TreeMask) -> usize {
    let values: Vec<f64> = mask.values.get(0).unwrap().to_vec1().unwrap();
    let tables = Tables {
        mask: &values,
        directions: Vec::new(),
        tolerance: tolerance(DType::F64),
    };
    let plan = Plan::<f64>::new(&mask.pairs, &tables, [5, 5]);
    let is_factored = |work: &Work<f64>| match work {
        Work::Leaf(_) => false,
        Work::Block(block) => block.factored.is_some(),
    };
    plan.work.iter().filter(|work| is_factored(&work.0)).count()
}

const PHI: [TreeFeatures; 4] = [Given, Relu, Square, Fourth];

#[test]
fn equals_pairs_laid_out() {
    for (tokens, phi) in [
        (1, Given),
        (2, Relu),
        (17, Square),
        (130, Fourth),
        (700, Given),
    ] {
        for rows in [1, 3] {
            for is_smooth in [true, false] {
                compare(3e-5, |dtype| {
                    let [q, k, v] = given(tokens, dtype);
                    let mask = match is_smooth {
                        true => smooth(path(tokens, 16), &coefficients(rows)),
                        false => rough(path(tokens, 16), rows),
                    };
                    (
                        tree_attention([&q, &k, &v], phi, &mask).unwrap(),
                        naive::tree_attention([&q, &k, &v], phi, &mask).unwrap(),
                    )
                });
            }
        }
    }
}

/// Tokens at few distances from a cut, which are nodes all.
#[test]
fn equals_pairs_laid_out_on_a_star() {
    for is_smooth in [true, false] {
        let mask = || match is_smooth {
            true => smooth(star(40, 12), &coefficients(3)),
            false => rough(star(40, 12), 3),
        };
        assert_eq!(factored(&mask()), 1);
        compare(3e-5, |dtype| {
            let [q, k, v] = given(481, dtype);
            (
                tree_attention([&q, &k, &v], Given, &mask()).unwrap(),
                naive::tree_attention([&q, &k, &v], Given, &mask()).unwrap(),
            )
        });
    }
}

#[test]
fn smooth_masks_are_read_off_a_few_distances_and_others_are_not() {
    assert!(factored(&smooth(path(700, 16), &coefficients(1))) >= 3);
    assert_eq!(factored(&rough(path(700, 16), 1)), 0);
    // Steep decay is an exponential, and smooth beside it.
    let steep = Tensor::new(&[[0.0, -30.0, 0.0]], &Device::Cpu).unwrap();
    assert!(factored(&smooth(path(700, 16), &steep)) > 5);
}

#[test]
fn gradients_equal_finite_differences() {
    // One leaf, blocks laid out, and blocks read off nodes.
    let steep = Tensor::new(&[[0.1, -3.0, 0.0], [-0.2, 0.0, 0.0]], &Device::Cpu).unwrap();
    for (pairs, start, least) in [
        (path(9, 16), coefficients(2), 0),
        (path(50, 6), coefficients(2), 0),
        (path(50, 6), steep, 1),
        (star(8, 4), coefficients(2), 1),
    ] {
        let tokens = pairs.tokens();
        let mask = |x: &Tensor| smooth(pairs.clone(), x);
        assert!(factored(&mask(&start)) >= least);
        // No larger than one, so that differences of fourth powers are as exact as others.
        let small = |width: usize, phase: f64| {
            let numbers = arange(&[1, 2, tokens, width], phase, DType::F64);
            (numbers * 0.5).unwrap()
        };
        let inputs = [small(3, 1.0), small(3, 2.0), small(2, 3.0), start];
        for phi in PHI {
            let sums = |x: &[Tensor]| tree_attention([&x[0], &x[1], &x[2]], phi, &mask(&x[3]));
            let error = gradient_error(sums, &inputs).unwrap();
            assert!(error < 1e-6, "{tokens} {phi:?}: {error:e}");
        }
    }
}

/// Where a mask is constant, one node is enough for it, but not for what changes it.
#[test]
fn gradients_equal_those_of_pairs_laid_out() {
    for (tokens, rows, is_smooth, phi) in [
        (700, 1, true, Given),
        (700, 3, true, Relu),
        (300, 3, false, Square),
    ] {
        for dtype in [DType::F32, DType::F64] {
            let of = |is_naive: bool| -> Vec<Tensor> {
                let [q, k, v] = given(tokens, dtype).map(|x| Var::from_tensor(&x).unwrap());
                let start = match is_smooth {
                    true => Tensor::zeros((rows, 3), DType::F64, &Device::Cpu).unwrap(),
                    false => rough(path(tokens, 16), rows).values,
                };
                let numbers = Var::from_tensor(&start).unwrap();
                let mask = match is_smooth {
                    true => smooth(path(tokens, 16), numbers.as_tensor()),
                    false => TreeMask {
                        values: numbers.as_tensor().clone(),
                        ..rough(path(tokens, 16), rows)
                    },
                };
                let attend = if is_naive {
                    naive::tree_attention
                } else {
                    tree_attention
                };
                // Heads side by side, as projections leave them.
                let beside = |x: &Var| x.transpose(1, 2).unwrap().contiguous().unwrap();
                let [q_there, k_there] = [&q, &k].map(|x| beside(x).transpose(1, 2).unwrap());
                let y = attend([&q_there, &k_there, v.as_tensor()], phi, &mask).unwrap();
                let seen = arange(y.dims(), 7.0, dtype);
                let gradients = (y * seen).unwrap().sum_all().unwrap().backward().unwrap();
                let all = [&q, &k, &v, &numbers].into_iter();
                all.map(|x| gradients.get(x.as_tensor()).unwrap().clone())
                    .collect()
            };
            for (found, expected) in of(false).iter().zip(of(true)) {
                let largest = expected
                    .abs()
                    .unwrap()
                    .flatten_all()
                    .unwrap()
                    .max(0)
                    .unwrap();
                let largest = largest.to_dtype(DType::F64).unwrap();
                let largest: f64 = largest.to_scalar().unwrap();
                let bound = if dtype == DType::F32 { 3e-5 } else { 1e-11 };
                let error = difference(found, &expected).unwrap();
                assert!(
                    error < bound * (1.0 + largest),
                    "{tokens} {rows}: {error:e} {largest}"
                );
            }
        }
    }
}

/// Whatever else is constant, and each time that a graph is differentiated.
#[test]
fn each_argument_has_the_gradient_that_it_has_among_all() {
    // Those of queries, keys, values and the mask's numbers, of which bits say what is learned, under each loss.
    let of = |learned: u32, losses: &[f64]| -> Vec<Option<Tensor>> {
        let [q, k, v] = given(130, DType::F64);
        let x = [q, k, v, coefficients(3)].into_iter().enumerate();
        let x: Vec<Tensor> = x
            .map(|(index, x)| match (learned >> index) & 1 {
                1 => Var::from_tensor(&x).unwrap().as_tensor().clone(),
                _ => x,
            })
            .collect();
        let mask = smooth(path(130, 16), &x[3]);
        let y = tree_attention([&x[0], &x[1], &x[2]], Given, &mask).unwrap();
        let under = |phase: &f64| -> Vec<Option<Tensor>> {
            let loss = (&y * arange(y.dims(), *phase, DType::F64)).unwrap();
            let gradients = loss.sum_all().unwrap().backward().unwrap();
            x.iter().map(|x| gradients.get(x).cloned()).collect()
        };
        losses.iter().flat_map(under).collect()
    };
    let all = [of(15, &[8.0]), of(15, &[9.0])].concat();
    for learned in 1..16 {
        let some = of(learned, &[8.0, 9.0]);
        for (index, (one, among)) in some.iter().zip(&all).enumerate() {
            if (learned >> (index % 4)) & 1 == 1 {
                let (one, among) = (one.as_ref().unwrap(), among.as_ref().unwrap());
                let largest = difference(among, &among.zeros_like().unwrap()).unwrap();
                // Masks that are not learned are read off fewer distances.
                let error = difference(one, among).unwrap();
                assert!(
                    error < 1e-10 * (1.0 + largest),
                    "{index} of {learned:b}: {error:e} {largest}"
                );
            }
        }
    }
}

#[test]
fn fewer_tokens_are_the_first() {
    let [q, k, v] = given(50, DType::F64);
    let cut = [&q, &k, &v].map(|x| x.narrow(2, 0, 33).unwrap());
    for pairs in [path(50, 8), star(7, 7)] {
        let first = pairs.first(33);
        assert_eq!(first.tokens(), 33);
        let whole = pairs.table();
        let rows = first.table();
        for (i, row) in rows.chunks(33).enumerate() {
            assert_eq!(row, &whole[i * 50..i * 50 + 33]);
        }
        let mask = smooth(pairs, &coefficients(3));
        let mask = TreeMask {
            pairs: Arc::new(first),
            ..mask
        };
        let [q, k, v] = &cut;
        let found = tree_attention([q, k, v], Given, &mask).unwrap();
        let expected = naive::tree_attention([q, k, v], Given, &mask).unwrap();
        assert!(difference(&found, &expected).unwrap() < 1e-10);
    }
}

#[test]
fn features_that_were_spread_out_of_one_are_read_where_it_lies() {
    let [q, k, v] = given(17, DType::F64);
    let spread = |x: &Tensor| x.narrow(3, 1, 1).unwrap().broadcast_as(x.dims()).unwrap();
    let (q, k) = (spread(&q), spread(&k));
    let mask = rough(path(17, 6), 3);
    for phi in PHI {
        let found = tree_attention([&q, &k, &v], phi, &mask).unwrap();
        let expected = naive::tree_attention([&q, &k, &v], phi, &mask).unwrap();
        let error = difference(&found, &expected).unwrap();
        assert!(error < 1e-10, "{phi:?}: {error:e}");
    }
}

#[test]
fn does_not_depend_on_the_number_of_threads() {
    let q = arange(&[1, 2, 500, 40], 1.0, DType::F32);
    let v = arange(&[1, 2, 500, 40], 2.0, DType::F32);
    let with = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        let run = || {
            let v = Var::from_tensor(&v).unwrap();
            let mask = smooth(path(500, 16), &coefficients(1));
            let y = tree_attention([&q, &q, v.as_tensor()], Given, &mask).unwrap();
            let gradients = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
            (y, gradients.get(v.as_tensor()).unwrap().clone())
        };
        pool.build().unwrap().install(run)
    };
    let one = with(1);
    for threads in [2, 5] {
        let many = with(threads);
        assert_eq!(difference(&many.0, &one.0).unwrap(), 0.0);
        assert_eq!(difference(&many.1, &one.1).unwrap(), 0.0);
    }
}

#[test]
fn what_does_not_fit_is_named() {
    let [q, k, v] = given(5, DType::F32);
    let mask = rough(path(5, 6), 3);
    let refused = |q: &Tensor, k: &Tensor, v: &Tensor, mask: &TreeMask| {
        tree_attention([q, k, v], Given, mask)
            .unwrap_err()
            .to_string()
    };
    assert!(refused(&q, &v, &v, &mask).contains("[2, 3, 5, 5]"));
    let short = v.narrow(2, 0, 4).unwrap();
    assert!(refused(&q, &k, &short, &mask).contains("[2, 3, 4, 4]"));
    assert!(refused(&q, &k, &v, &rough(path(6, 6), 3)).contains("[batch, heads, 6, features]"));
    assert!(refused(&q, &k, &v, &rough(path(5, 6), 2)).contains("[1 or 3, distances]"));
    let other = TreeMask {
        directions: Tensor::zeros((1, 0, 5), DType::F64, &Device::Cpu).unwrap(),
        ..mask
    };
    assert!(refused(&q, &k, &v, &other).contains("directions"));
    let stray = TreePiece::Leaf {
        tokens: vec![0, 7],
        distances: None,
    };
    let said = TreePairs::new(5, vec![stray], vec![])
        .unwrap_err()
        .to_string();
    assert!(said.contains("below 5"), "{said}");
    let far = TreePiece::Cut([
        TreeSide::new(vec![(0, u32::MAX), (1, u32::MAX)]),
        TreeSide::new(vec![(2, 1)]),
    ]);
    let said = TreePairs::new(5, vec![far], vec![])
        .unwrap_err()
        .to_string();
    assert!(said.contains("at most 4294967295"), "{said}");
}
