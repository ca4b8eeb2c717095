use super::*;
use crate::check::{difference, gradient_error};
use crate::test_data::{arange, compare};
use crate::{DType, Device, Direction, linear_attention};

fn decay(dims: &[usize], dtype: DType) -> Tensor {
    (arange(dims, 5.0, dtype).sqr().unwrap() * -0.3).unwrap()
}

/// Queries, keys, values, some of them views, and decays.
fn given(length: usize, dtype: DType) -> [Tensor; 4] {
    let side_by_side = |width, phase| {
        let x = arange(&[2, length, 3, width], phase, dtype);
        x.transpose(1, 2).unwrap()
    };
    let turned = arange(&[2, 3, 5, length], 2.0, dtype);
    [
        side_by_side(5, 1.0),
        turned.transpose(2, 3).unwrap(),
        side_by_side(4, 3.0),
        decay(&[2, 3, length], dtype),
    ]
}

#[test]
fn equals_scores_laid_out() {
    for length in [1, 2, 63, 64, 65, 200] {
        for is_causal in [false, true] {
            compare(3e-5, |dtype| {
                let [q, k, v, a] = given(length, dtype);
                (
                    decayed_attention(&q, &k, &v, &a, is_causal, 64).unwrap(),
                    naive::decayed_attention(&q, &k, &v, &a, is_causal).unwrap(),
                )
            });
        }
    }
}

/// The past with the decay of the token before, the future, and what both have of a position itself once.
#[test]
fn is_the_sum_of_both_directions() {
    let length = 150;
    let [q, k, v, a] = given(length, DType::F64);
    let ones = Tensor::ones((2, 3, length, 1), DType::F64, &Device::Cpu).unwrap();
    let with_ones = Tensor::cat(&[&v, &ones], 3).unwrap();
    let before = a.narrow(2, 0, length - 1).unwrap();
    let before = before.pad_with_zeros(2, 1, 0).unwrap();
    let past = linear_attention(&q, &k, &with_ones, Some(&before), Direction::Past).unwrap();
    let future = linear_attention(&q, &k, &with_ones, Some(&a), Direction::Future).unwrap();
    let own = (&q * &k).unwrap().sum_keepdim(3).unwrap();
    let own = own.broadcast_mul(&with_ones).unwrap();
    let expected = ((&past + future).unwrap() - own).unwrap();
    let found = decayed_attention(&q, &k, &v, &a, false, 64).unwrap();
    assert!(difference(&found, &expected).unwrap() < 1e-11);
    let found = decayed_attention(&q, &k, &v, &a, true, 64).unwrap();
    assert!(difference(&found, &past).unwrap() < 1e-11);
}

#[test]
fn gradients_equal_finite_differences() {
    for (length, chunk) in [(3, 64), (70, 32), (9, 1)] {
        let inputs = [
            arange(&[1, 2, length, 3], 1.0, DType::F64),
            arange(&[1, 2, length, 3], 2.0, DType::F64),
            arange(&[1, 2, length, 2], 3.0, DType::F64),
            decay(&[1, 2, length], DType::F64),
        ];
        for is_causal in [false, true] {
            let sums =
                |x: &[Tensor]| decayed_attention(&x[0], &x[1], &x[2], &x[3], is_causal, chunk);
            let error = gradient_error(sums, &inputs).unwrap();
            assert!(error < 1e-6, "{length}: {error:e}");
        }
    }
}

#[test]
fn the_size_of_chunks_changes_nothing() {
    let [q, k, v, a] = given(70, DType::F64);
    for is_causal in [false, true] {
        let of = |chunk| decayed_attention(&q, &k, &v, &a, is_causal, chunk).unwrap();
        let laid_out = of(70);
        for chunk in [1, 3, 64, 1000] {
            assert!(difference(&of(chunk), &laid_out).unwrap() < 1e-11);
        }
    }
}

/// Products of decays leave every floating-point range long before this length; their logarithms do not.
#[test]
fn long_sequences_with_strong_decay_stay_finite() {
    let length = 16_384;
    let ones = Tensor::ones((1, 1, length, 1), DType::F32, &Device::Cpu).unwrap();
    let half = Tensor::full(0.5f32.ln(), (1, 1, length), &Device::Cpu).unwrap();
    let y = decayed_attention(&ones, &ones, &ones, &half, false, 64).unwrap();
    // Σ_k 2^-k from both sides, the position itself once.
    let middle = y.flatten_all().unwrap().to_vec1::<f32>().unwrap()[length];
    assert!((middle - 3.0).abs() < 1e-5, "{middle}");
}

#[test]
fn does_not_depend_on_the_number_of_threads() {
    let [q, k, v, a] = given(300, DType::F32);
    let with = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
        let run = || decayed_attention(&q, &k, &v, &a, false, 64).unwrap();
        pool.build().unwrap().install(run)
    };
    let one = with(1);
    assert!(
        [2, 5]
            .iter()
            .all(|&n| difference(&with(n), &one).unwrap() == 0.0)
    );
}

#[test]
fn what_does_not_fit_is_named() {
    let [q, k, v, a] = given(5, DType::F32);
    let refused = |q: &Tensor, k: &Tensor, v: &Tensor, a: &Tensor| {
        decayed_attention(q, k, v, a, false, 64)
            .unwrap_err()
            .to_string()
    };
    assert!(refused(&q, &v, &v, &a).contains("[2, 3, 5, 4]"));
    let short = v.narrow(2, 0, 4).unwrap();
    assert!(refused(&q, &k, &short, &a).contains("[2, 3, 4, 4]"));
    let short = a.narrow(2, 0, 4).unwrap();
    assert!(refused(&q, &k, &v, &short).contains("log_decay"));
}
