//! Means against their weights laid out.

use super::*;
use crate::check::{difference, gradient_error};
use crate::test_data::{arange, compare};
use crate::{DType, Device};

/// `[queries, keys, features, width]`.
const SIZES: [[usize; 4]; 5] = [
    [1, 1, 1, 1],
    [5, 7, 3, 2],
    [70, 70, 17, 16],
    [130, 1030, 5, 20],
    [64, 64, 20, 33],
];

/// Positive features of heads that lie side by side in a row, and those of keys with features outside.
fn sides([queries, keys, features, width]: [usize; 4], dtype: DType) -> [Tensor; 3] {
    let q = arange(&[2, queries, 3, features], 1.0, dtype)
        .abs()
        .unwrap();
    let k = arange(&[2, 3, features, keys], 2.0, dtype).abs().unwrap();
    let v = arange(&[2, keys, 3, width], 3.0, dtype);
    let [q, v] = [q, v].map(|x| x.transpose(1, 2).unwrap());
    [q, k.transpose(2, 3).unwrap(), v]
}

#[test]
fn equal_weights_laid_out() {
    for sizes in SIZES {
        compare(2e-5, |dtype| {
            let [q, k, v] = sides(sizes, dtype);
            (
                linear_means(&q, &k, &v, 0.25).unwrap(),
                naive::linear_means(&q, &k, &v, 0.25, false).unwrap(),
            )
        });
        let [queries, _, features, width] = sizes;
        for chunk in [1, 16, 64, 1000] {
            compare(2e-5, |dtype| {
                let [q, k, v] = sides([queries, queries, features, width], dtype);
                (
                    causal_linear_means(&q, &k, &v, 0.25, chunk).unwrap(),
                    naive::linear_means(&q, &k, &v, 0.25, true).unwrap(),
                )
            });
        }
    }
}

#[test]
fn gradients_equal_finite_differences() {
    for sizes in [[3, 5, 2, 3], [70, 66, 3, 2]] {
        let of = |x: &[Tensor]| linear_means(&x[0], &x[1], &x[2], 0.5);
        assert!(gradient_error(of, &sides(sizes, DType::F64)).unwrap() < 1e-6);
        let [queries, _, features, width] = sizes;
        let sides = sides([queries, queries, features, width], DType::F64);
        for chunk in [1, 16, 100] {
            let of = |x: &[Tensor]| causal_linear_means(&x[0], &x[1], &x[2], 0.5, chunk);
            assert!(gradient_error(of, &sides).unwrap() < 1e-6);
        }
    }
}

/// Also where the rows of a head are summed in parts, and in single precision.
#[test]
fn gradients_equal_those_of_weights_laid_out() {
    type Of<'a> = &'a dyn Fn(&[Tensor; 3]) -> Result<Tensor>;
    let slopes = |sizes, dtype, of: Of<'_>| -> Tensor {
        let x = sides(sizes, dtype).map(|x| crate::Var::from_tensor(&x).unwrap());
        let y = of(&[0, 1, 2].map(|i| x[i].as_tensor().clone())).unwrap();
        let loss = (&y * arange(y.dims(), 4.0, dtype)).unwrap();
        let gradients = loss.sum_all().unwrap().backward().unwrap();
        let flat = x.map(|x| gradients.get(&x).unwrap().flatten_all().unwrap());
        Tensor::cat(&flat, 0).unwrap()
    };
    for sizes in [[70, 1030, 17, 16], [1030, 70, 5, 20]] {
        compare(1e-4, |dtype| {
            (
                slopes(sizes, dtype, &|[q, k, v]| linear_means(q, k, v, 0.1)),
                slopes(sizes, dtype, &|[q, k, v]| {
                    naive::linear_means(q, k, v, 0.1, false)
                }),
            )
        });
    }
    compare(1e-4, |dtype| {
        let sizes = [150, 150, 17, 16];
        (
            slopes(sizes, dtype, &|[q, k, v]| {
                causal_linear_means(q, k, v, 0.1, 32)
            }),
            slopes(sizes, dtype, &|[q, k, v]| {
                naive::linear_means(q, k, v, 0.1, true)
            }),
        )
    });
}

#[test]
fn what_has_no_weight_is_zero() {
    let q = Tensor::zeros((1, 1, 3, 2), DType::F32, &Device::Cpu).unwrap();
    let v = arange(&[1, 1, 3, 4], 1.0, DType::F32);
    for y in [
        linear_means(&q, &q, &v, 0.0),
        causal_linear_means(&q, &q, &v, 0.0, 2),
    ] {
        let y = y.unwrap();
        assert!(difference(&y, &y.zeros_like().unwrap()).unwrap() == 0.0);
    }
}

#[test]
fn do_not_depend_on_the_number_of_threads() {
    let [q, k, v] = sides([1100, 1100, 17, 16], DType::F32);
    let with = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        pool.build().unwrap().install(|| {
            [None, Some(64)].map(|chunk| {
                let [q, k, v] = [&q, &k, &v].map(|x| crate::Var::from_tensor(x).unwrap());
                let y = means(&q, &k, &v, 0.1, chunk).unwrap();
                let gradients = y.sqr().unwrap().sum_all().unwrap().backward().unwrap();
                [&q, &k, &v].map(|x| gradients.get(x).unwrap().clone())
            })
        })
    };
    let one = with(1);
    for threads in [2, 5] {
        let many = with(threads);
        for (many, one) in many.iter().flatten().zip(one.iter().flatten()) {
            assert!(difference(many, one).unwrap() == 0.0);
        }
    }
}

#[test]
fn shapes_that_do_not_fit_are_refused() {
    let x = |dims: &[usize]| arange(dims, 1.0, DType::F32);
    let (q, v) = (x(&[1, 2, 5, 3]), x(&[1, 2, 7, 4]));
    assert!(linear_means(&q, &x(&[1, 2, 7, 3]), &v, 0.0).is_ok());
    let said = |k: &Tensor, v: &Tensor| linear_means(&q, k, v, 0.0).unwrap_err().to_string();
    assert!(said(&x(&[1, 2, 7, 4]), &v).contains("k is [1, 2, 7, 4]"));
    assert!(said(&x(&[1, 2, 7, 3]), &x(&[1, 2, 6, 4])).contains("v is [1, 2, 6, 4]"));
    // Under a causal mask there are as many keys as queries.
    assert!(causal_linear_means(&q, &x(&[1, 2, 7, 3]), &v, 0.0, 4).is_err());
    assert!(causal_linear_means(&q, &q, &x(&[1, 2, 5, 4]), 0.0, 4).is_ok());
}

/// Queries, keys and values of heads side by side, and frequencies that heads of all sequences share.
fn points([length, features, width]: [usize; 3], dtype: DType) -> [Tensor; 4] {
    let side = |width: usize, phase: f64| {
        let x = arange(&[2, length, 3, width], phase, dtype);
        (x.transpose(1, 2).unwrap() * 0.3).unwrap()
    };
    let frequencies = arange(&[3, features, 4], 4.0, dtype);
    [side(4, 1.0), side(4, 2.0), side(width, 3.0), frequencies]
}

fn exponential(chunk: usize, keep: Option<Vec<u8>>) -> ExponentialMeans {
    ExponentialMeans {
        decay: 0.7,
        epsilon: 0.01,
        chunk,
        keep,
    }
}

#[test]
fn features_of_chunks_are_those_laid_out() {
    for sizes in [[1, 1, 1], [9, 5, 3], [70, 20, 33]] {
        let keep: Vec<u8> = (0..2 * sizes[0]).map(|i| u8::from(i % 3 != 1)).collect();
        for (chunk, keep) in [
            (1, None),
            (16, None),
            (64, Some(keep.clone())),
            (1000, Some(keep)),
        ] {
            let options = exponential(chunk, keep);
            compare(2e-5, |dtype| {
                let [q, k, v, frequencies] = &points(sizes, dtype);
                (
                    causal_exponential_means([q, k, v], frequencies, &options).unwrap(),
                    naive::causal_exponential_means([q, k, v], frequencies, &options).unwrap(),
                )
            });
        }
    }
    let [q, k, v, frequencies] = &points([9, 5, 3], DType::F64);
    let features = |x: &Tensor| crate::exponential_features(x, frequencies, 0.7).unwrap();
    let plain = causal_linear_means(&features(q), &features(k), v, 0.01, 4).unwrap();
    let ours = causal_exponential_means([q, k, v], frequencies, &exponential(4, None)).unwrap();
    assert!(difference(&ours, &plain).unwrap() < 1e-12);
}

#[test]
fn gradients_by_way_of_features() {
    for (chunk, keep) in [
        (4, None),
        (3, Some(vec![0, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 1, 0, 0])),
    ] {
        let options = exponential(chunk, keep);
        let f = |x: &[Tensor]| causal_exponential_means([&x[0], &x[1], &x[2]], &x[3], &options);
        assert!(gradient_error(f, &points([7, 5, 3], DType::F64)).unwrap() < 1e-6);
    }
}

#[test]
fn points_that_do_not_fit_are_refused() {
    let [q, k, v, frequencies] = &points([5, 4, 3], DType::F32);
    let of = |x: [&Tensor; 3], frequencies: &Tensor, keep: Option<Vec<u8>>| {
        causal_exponential_means(x, frequencies, &exponential(2, keep)).is_ok()
    };
    assert!(of([q, k, v], frequencies, None));
    assert!(!of([q, v, v], frequencies, None));
    assert!(!of([q, k, &v.narrow(2, 0, 4).unwrap()], frequencies, None));
    assert!(!of([q, k, v], &v.contiguous().unwrap(), None));
    assert!(!of([q, k, v], frequencies, Some(vec![1; 9])));
}
