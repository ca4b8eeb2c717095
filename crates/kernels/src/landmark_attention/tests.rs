//! Against kernels laid out.

use super::*;
use crate::check::{difference, gradient_error};
use crate::test_data::{arange, compare};
use crate::{GradStore, Var};

/// Queries and values that lie heads side by side, landmarks and a middle.
fn given(length: usize, count: usize, dtype: DType) -> [Tensor; 4] {
    let side_by_side = |width, phase| {
        let x = (arange(&[2, length, 3, width], phase, dtype) * 0.5).unwrap();
        x.transpose(1, 2).unwrap()
    };
    [
        side_by_side(17, 1.0),
        (arange(&[2, 3, count, 17], 2.0, dtype) * 0.5).unwrap(),
        arange(&[2, 3, count, count], 3.0, dtype),
        side_by_side(5, 4.0),
    ]
}

fn kept(length: usize) -> Tensor {
    let kept: Vec<u8> = (0..2 * length).map(|at| u8::from(at % 3 != 1)).collect();
    Tensor::from_vec(kept, (2, length), &crate::Device::Cpu).unwrap()
}

#[test]
fn equals_the_kernel_laid_out() {
    for (length, count) in [(1, 1), (64, 9), (150, 33)] {
        for kept in [None, Some(kept(length))] {
            compare(1e-4, |dtype| {
                let [q, l, m, v] = given(length, count, dtype);
                let kept = kept.as_ref();
                (
                    landmark_attention(&q, &l, &m, &v, 0.3, kept).unwrap(),
                    naive::landmark_attention(&q, &l, &m, &v, 0.3, kept).unwrap(),
                )
            });
        }
    }
}

#[test]
fn gradients_equal_finite_differences() {
    let inputs = [
        (arange(&[2, 1, 66, 3], 1.0, DType::F64) * 0.5).unwrap(),
        (arange(&[2, 1, 4, 3], 2.0, DType::F64) * 0.5).unwrap(),
        arange(&[2, 1, 4, 4], 3.0, DType::F64),
        arange(&[2, 1, 66, 2], 4.0, DType::F64),
    ];
    for kept in [None, Some(kept(66))] {
        let f = |x: &[Tensor]| landmark_attention(&x[0], &x[1], &x[2], &x[3], 0.4, kept.as_ref());
        let error = gradient_error(f, &inputs).unwrap();
        assert!(error < 1e-6, "{error:e}");
    }
}

/// Gradients of what is given, for irregular ones of the result.
fn gradients(function: impl Fn(&[Tensor]) -> Result<Tensor>, given: &[Tensor; 4]) -> [Tensor; 4] {
    let variables = given.each_ref().map(|x| Var::from_tensor(x).unwrap());
    let inputs: Vec<Tensor> = variables.iter().map(|x| x.as_tensor().clone()).collect();
    let y = function(&inputs).unwrap();
    let slopes = arange(y.dims(), 5.0, y.dtype());
    let sum = (y * slopes).unwrap().sum_all().unwrap();
    let all: GradStore = sum.backward().unwrap();
    variables.each_ref().map(|x| all.get(x).unwrap().clone())
}

/// With as many landmarks as are worth panels, and blocks of queries that are whole or cut short.
#[test]
fn gradients_equal_those_of_the_kernel_laid_out() {
    for length in [1, 64, 150] {
        for kept in [None, Some(kept(length))] {
            let kept = kept.as_ref();
            for index in 0..4 {
                compare(1e-3, |dtype| {
                    let given = given(length, 33, dtype);
                    let ours =
                        |x: &[Tensor]| landmark_attention(&x[0], &x[1], &x[2], &x[3], 0.3, kept);
                    let plain = |x: &[Tensor]| {
                        naive::landmark_attention(&x[0], &x[1], &x[2], &x[3], 0.3, kept)
                    };
                    let [ours, plain] = [gradients(ours, &given), gradients(plain, &given)];
                    (ours[index].clone(), plain[index].clone())
                });
            }
        }
    }
}

/// What all points have in common is taken away before anything is squared.
#[test]
fn points_far_away_lose_nothing() {
    let [q, l, m, v] = given(100, 8, DType::F32);
    let near = landmark_attention(&q, &l, &m, &v, 0.3, None).unwrap();
    let (q, l) = ((q + 64.0).unwrap(), (l + 64.0).unwrap());
    let far = landmark_attention(&q, &l, &m, &v, 0.3, None).unwrap();
    let size = near
        .abs()
        .unwrap()
        .max_all()
        .unwrap()
        .to_scalar::<f32>()
        .unwrap();
    assert!(difference(&near, &far).unwrap() < 1e-4 * f64::from(size));
}

#[test]
fn does_not_depend_on_the_number_of_threads() {
    for dtype in [DType::F32, DType::F64] {
        let given = given(300, 16, dtype);
        let attend = |x: &[Tensor]| landmark_attention(&x[0], &x[1], &x[2], &x[3], 0.3, None);
        let with = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
            let run = || (attend(&given).unwrap(), gradients(attend, &given));
            pool.build().unwrap().install(run)
        };
        let (one, slopes) = with(1);
        for threads in [2, 5] {
            let (found, other) = with(threads);
            assert_eq!(difference(&found, &one).unwrap(), 0.0);
            for (found, expected) in other.iter().zip(&slopes) {
                assert_eq!(difference(found, expected).unwrap(), 0.0);
            }
        }
    }
}

#[test]
fn what_does_not_fit_is_named() {
    let [q, l, m, v] = given(10, 4, DType::F32);
    let refused = |q: &Tensor, l: &Tensor, m: &Tensor, v: &Tensor, kept: Option<&Tensor>| {
        let error = landmark_attention(q, l, m, v, 0.3, kept).unwrap_err();
        error.to_string()
    };
    assert!(refused(&q, &v, &m, &v, None).contains("landmarks"));
    assert!(refused(&q, &l, &l, &v, None).contains("middle"));
    assert!(refused(&q, &l, &m, &l, None).contains("values"));
    assert!(refused(&q, &l, &m, &v, Some(&kept(9))).contains("kept"));
    for rate in [-0.1, f64::NAN] {
        let error = landmark_attention(&q, &l, &m, &v, rate, None).unwrap_err();
        assert!(error.to_string().contains("rate"));
    }
}
