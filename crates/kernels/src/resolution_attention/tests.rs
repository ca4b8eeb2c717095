//! Against scores laid out.

use super::*;
use crate::check::{difference, gradient_error};
use crate::test_data::{arange, compare};
use crate::{AttentionOptions, Var, attention};

fn options(sizes: &[usize], per_row: &[usize]) -> ResolutionOptions {
    ResolutionOptions {
        sizes: sizes.to_vec(),
        per_row: per_row.to_vec(),
        sparse: false,
        causal: false,
        diagonal: 0,
        first: 0,
        scale: 0.3,
    }
}

/// All forms of these sizes.
fn forms(sizes: &[usize], per_row: &[usize]) -> Vec<ResolutionOptions> {
    let plain = options(sizes, per_row);
    let mut all = vec![
        plain.clone(),
        ResolutionOptions {
            diagonal: 3,
            first: 1,
            ..plain
        },
    ];
    for form in all.clone() {
        all.push(ResolutionOptions {
            sparse: true,
            ..form.clone()
        });
        if sizes.last() == Some(&1) && !per_row.contains(&0) {
            for sparse in [false, true] {
                let causal = true;
                all.push(ResolutionOptions {
                    sparse,
                    causal,
                    ..form.clone()
                });
            }
        }
    }
    all
}

fn all_forms() -> Vec<ResolutionOptions> {
    let sizes: [(&[usize], &[usize]); 7] = [
        (&[4, 1], &[0]),
        (&[4, 1], &[2]),
        (&[32, 1], &[2]),
        (&[6, 2], &[1]),
        (&[8, 4, 1], &[1, 2]),
        (&[24, 8, 4, 2], &[1, 1, 2]),
        (&[128, 1], &[1]),
    ];
    sizes
        .iter()
        .flat_map(|(sizes, per_row)| forms(sizes, per_row))
        .collect()
}

/// Queries, keys and values of two sequences of two heads, heads side by side.
fn inputs(rows: usize, [width, value_width]: [usize; 2], dtype: DType) -> [Tensor; 3] {
    [(width, 1.0), (width, 2.0), (value_width, 3.0)].map(|(width, phase)| {
        let x = arange(&[2, rows, 2, width], phase, dtype);
        x.transpose(1, 2).unwrap()
    })
}

/// Blocks chosen in double precision, so that rounding decides nothing.
fn chosen(
    [q, k, _]: &[Tensor; 3],
    lengths: &[usize],
    options: &ResolutionOptions,
) -> Arc<ResolutionAttention> {
    let [q, k] = [q, k].map(|x| x.to_dtype(DType::F64).unwrap());
    Arc::new(ResolutionAttention::new([&q, &k], lengths, options.clone()).unwrap())
}

fn references(x: &[Tensor; 3]) -> [&Tensor; 3] {
    x.each_ref()
}

#[test]
fn equals_scores_laid_out() {
    let cases = [
        (1, [1; 4], [5, 3]),
        (13, [13, 13, 5, 5], [5, 3]),
        (70, [70, 64, 1, 33], [20, 17]),
        (150, [150; 4], [24, 32]),
    ];
    for (rows, lengths, widths) in cases {
        for options in all_forms() {
            compare(1e-4, |dtype| {
                let x = inputs(rows, widths, dtype);
                // The same numbers for both types: rounding decides nothing.
                let single = inputs(rows, widths, DType::F32);
                let of = chosen(&single, &lengths, &options);
                let plain = of.laid_out(references(&x)).unwrap();
                (of.output(references(&x)).unwrap(), plain)
            });
        }
    }
}

/// Rows behind the last that is there are not read.
#[test]
fn rows_that_are_not_there_change_nothing() {
    let options = options(&[4, 1], &[1]);
    let x = inputs(11, [5, 3], DType::F64);
    let lengths = [7; 4];
    let spoilt = x.each_ref().map(|x| {
        let (_, _, _, width) = x.dims4().unwrap();
        let nothing = Tensor::full(f64::NAN, (2, 2, 4, width), &Device::Cpu).unwrap();
        Tensor::cat(&[&x.narrow(2, 0, 7).unwrap(), &nothing], 2).unwrap()
    });
    let clean = chosen(&x, &lengths, &options)
        .output(references(&x))
        .unwrap();
    let of = chosen(&spoilt, &lengths, &options);
    let found = of.output(references(&spoilt)).unwrap();
    assert_eq!(difference(&found, &clean).unwrap(), 0.0);
    let rest = found.narrow(2, 7, 4).unwrap().abs().unwrap();
    assert_eq!(rest.sum_all().unwrap().to_scalar::<f64>().unwrap(), 0.0);
}

#[test]
fn all_blocks_refined_are_softmax() {
    for (rows, causal) in [
        (1, false),
        (37, false),
        (37, true),
        (64, true),
        (150, false),
    ] {
        let options = ResolutionOptions {
            causal,
            ..options(&[32, 1], &[rows])
        };
        let x = inputs(rows, [8, 4], DType::F64);
        let of = chosen(&x, &[rows; 4], &options);
        let dense = AttentionOptions {
            causal,
            scale: options.scale,
            ..AttentionOptions::new(8)
        };
        let dense = attention(&x[0], &x[1], &x[2], &dense).unwrap();
        let found = of.output(references(&x)).unwrap();
        assert!(difference(&found, &dense).unwrap() < 1e-12);
    }
}

fn gradients(y: &Tensor, of: &[Var; 3]) -> [Tensor; 3] {
    let weights = arange(y.dims(), 5.0, y.dtype());
    let store = (y * weights)
        .unwrap()
        .sum_all()
        .unwrap()
        .backward()
        .unwrap();
    of.each_ref().map(|x| store.get(x).unwrap().clone())
}

#[test]
fn gradients_equal_those_of_scores_laid_out() {
    for (rows, lengths, widths) in [
        (13, [13, 13, 5, 5], [5, 3]),
        (70, [70, 64, 1, 33], [20, 17]),
    ] {
        for options in all_forms() {
            for (dtype, tolerance) in [(DType::F32, 1e-4), (DType::F64, 1e-11)] {
                let x = inputs(rows, widths, dtype);
                let x = x.each_ref().map(|x| Var::from_tensor(x).unwrap());
                let given = x.each_ref().map(|x| x.as_tensor().clone());
                let single = inputs(rows, widths, DType::F32);
                let of = chosen(&single, &lengths, &options);
                let found = gradients(&of.output(references(&given)).unwrap(), &x);
                let expected = gradients(&of.laid_out(references(&given)).unwrap(), &x);
                for (found, expected) in found.iter().zip(&expected) {
                    let size = expected.abs().unwrap().max_all().unwrap();
                    let size = size.to_dtype(DType::F64).unwrap().to_scalar::<f64>();
                    let error = difference(found, expected).unwrap() / size.unwrap().max(1.0);
                    assert!(error < tolerance, "{options:?} {dtype:?}: {error:e}");
                }
            }
        }
    }
}

#[test]
fn gradients_equal_finite_differences() {
    for options in all_forms() {
        let x = inputs(11, [3, 2], DType::F64);
        let of = chosen(&x, &[11, 11, 6, 6], &options);
        let f = |x: &[Tensor]| of.output([&x[0], &x[1], &x[2]]);
        let error = gradient_error(f, &x).unwrap();
        assert!(error < 1e-6, "{options:?}: {error:e}");
    }
}

#[test]
fn does_not_depend_on_the_number_of_threads() {
    for causal in [false, true] {
        let options = ResolutionOptions {
            causal,
            ..options(&[32, 8, 1], &[3, 5])
        };
        let x = inputs(300, [32, 32], DType::F32);
        let x = x.each_ref().map(|x| Var::from_tensor(x).unwrap());
        let with = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
            let run = || {
                let given = x.each_ref().map(|x| x.as_tensor().clone());
                let [q, k, _] = &given;
                let of = ResolutionAttention::new([q, k], &[300, 300, 280, 280], options.clone());
                let y = Arc::new(of.unwrap()).output(references(&given)).unwrap();
                let [dq, dk, dv] = gradients(&y, &x);
                [y, dq, dk, dv]
            };
            pool.build().unwrap().install(run)
        };
        let one = with(1);
        for threads in [2, 5] {
            for (found, expected) in with(threads).iter().zip(&one) {
                assert_eq!(difference(found, expected).unwrap(), 0.0);
            }
        }
    }
}

/// Scores so large that exponentials of them are none.
#[test]
fn large_scores_stay_numbers() {
    for options in all_forms() {
        let options = ResolutionOptions {
            scale: 300.0,
            ..options
        };
        let x = inputs(40, [8, 4], DType::F32);
        let x = x.each_ref().map(|x| Var::from_tensor(x).unwrap());
        let given = x.each_ref().map(|x| x.as_tensor().clone());
        let of = chosen(&given, &[40; 4], &options);
        let y = of.output(references(&given)).unwrap();
        let all = [vec![y.clone()], gradients(&y, &x).to_vec()].concat();
        for x in all {
            let sum = x.abs().unwrap().sum_all().unwrap();
            assert!(sum.to_scalar::<f32>().unwrap().is_finite(), "{options:?}");
        }
    }
}

#[test]
fn operations_count_pairs_that_meet() {
    let count = |options: &ResolutionOptions, rows: usize| {
        let x = inputs(rows, [8, 4], DType::F64);
        let of = chosen(&x, &[rows; 4], options);
        let mut pairs = 0;
        for (index, i) in (0..4).flat_map(|index| (0..rows).map(move |i| (index, i))) {
            for j in 0..rows {
                if let Some(number) = of.met(index, i, j) {
                    // Once for all rows of a pair of blocks.
                    let size = options.sizes[number];
                    pairs += usize::from(i % size == 0 && j % size == 0);
                }
            }
        }
        let found: u64 = of
            .chosen
            .iter()
            .flat_map(|chosen| {
                Level::<f64>::all(options, chosen)
                    .into_iter()
                    .map(|level| level.pairs())
            })
            .sum();
        assert_eq!(found, pairs as u64, "{options:?} at {rows}");
    };
    for options in all_forms() {
        for rows in [1, 13, 40] {
            count(&options, rows);
        }
    }
}

#[test]
fn what_does_not_fit_is_named() {
    let x = inputs(8, [5, 3], DType::F32);
    let [q, k, v] = references(&x);
    let refused = |q: &Tensor, k: &Tensor, lengths: &[usize], options: ResolutionOptions| {
        let error = ResolutionAttention::new([q, k], lengths, options).unwrap_err();
        error.to_string()
    };
    let good = || options(&[4, 1], &[1]);
    assert!(refused(q, v, &[8; 4], good()).contains("k is"));
    assert!(refused(q, k, &[8; 3], good()).contains("lengths"));
    assert!(refused(q, k, &[9; 4], good()).contains("lengths"));
    assert!(refused(q, k, &[8; 4], options(&[4, 3], &[1])).contains("sizes"));
    assert!(refused(q, k, &[8; 4], options(&[], &[])).contains("sizes"));
    assert!(refused(q, k, &[8; 4], options(&[4, 1], &[1, 1])).contains("per_row"));
    for (sizes, per_row, name) in [([4, 2], 1, "sizes"), ([4, 1], 0, "per_row")] {
        let causal = ResolutionOptions {
            causal: true,
            ..options(&sizes, &[per_row])
        };
        assert!(refused(q, k, &[8; 4], causal).contains(name));
    }
    let of = Arc::new(ResolutionAttention::new([q, k], &[8; 4], good()).unwrap());
    let short = v.narrow(2, 0, 7).unwrap();
    assert!(of.output([q, k, &short]).is_err());
    assert!(of.output([v, k, v]).is_err());
}
