use super::*;
use crate::check::{difference, gradient_error};
use crate::test_data::{arange, compare};
use crate::{DType, Device, linear_attention};

const DIRECTIONS: [Direction; 2] = [Direction::Past, Direction::Future];

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
        decay(&[2, 3, length, 5], dtype),
    ]
}

#[test]
fn equals_the_recurrence() {
    for length in [1, 2, 8, 9, 17, 64, 65, 150] {
        for direction in DIRECTIONS {
            for chunk in [1, 3, 16, 64, 1000] {
                compare(3e-5, |dtype| {
                    let [q, k, v, a] = given(length, dtype);
                    (
                        linear_attention_by_feature(&q, &k, &v, &a, direction, chunk).unwrap(),
                        naive::linear_attention_by_feature(&q, &k, &v, &a, direction).unwrap(),
                    )
                });
            }
        }
    }
}

#[test]
fn features_that_fade_alike_fade_as_the_head() {
    let [q, k, v, _] = given(70, DType::F64);
    let a = decay(&[2, 3, 70], DType::F64);
    let each = a.unsqueeze(3).unwrap().broadcast_as(q.shape()).unwrap();
    for direction in DIRECTIONS {
        let alike = linear_attention_by_feature(&q, &k, &v, &each, direction, 32).unwrap();
        let head = linear_attention(&q, &k, &v, Some(&a), direction).unwrap();
        assert!(difference(&alike, &head).unwrap() < 1e-11);
    }
}

#[test]
fn gradients_equal_finite_differences() {
    // One by one, in halves of each other, and over chunks of which the last is shorter.
    for (length, chunk) in [(1, 4), (5, 64), (21, 64), (9, 1), (27, 12)] {
        let inputs = [
            arange(&[1, 2, length, 3], 1.0, DType::F64),
            arange(&[1, 2, length, 3], 2.0, DType::F64),
            arange(&[1, 2, length, 2], 3.0, DType::F64),
            decay(&[1, 2, length, 3], DType::F64),
        ];
        for direction in DIRECTIONS {
            let sums = |x: &[Tensor]| {
                linear_attention_by_feature(&x[0], &x[1], &x[2], &x[3], direction, chunk)
            };
            let error = gradient_error(sums, &inputs).unwrap();
            assert!(error < 1e-6, "{length} {direction:?}: {error:e}");
        }
    }
}

/// One feature forgets everything in a step, one hardly anything: a quotient of products of the first's decays is
/// out of range within a few positions.
#[test]
fn small_decays_stand_beside_large_ones() {
    let length = 60;
    for direction in DIRECTIONS {
        let inputs = |dtype| {
            let [q, k, v, _] = given(length, dtype);
            let a = Tensor::new(&[-200f32, -1e-4, -20.0, 0.0, -0.5], &Device::Cpu).unwrap();
            let a = a.to_dtype(dtype).unwrap().broadcast_as(q.shape()).unwrap();
            [q, k, v, a.contiguous().unwrap()]
        };
        compare(1e-4, |dtype| {
            let [q, k, v, a] = inputs(dtype);
            (
                linear_attention_by_feature(&q, &k, &v, &a, direction, 24).unwrap(),
                naive::linear_attention_by_feature(&q, &k, &v, &a, direction).unwrap(),
            )
        });
        let slopes = |dtype, is_plain: bool| {
            let [q, k, v, a] = inputs(dtype).map(|x| crate::Var::from_tensor(&x).unwrap());
            let y = match is_plain {
                true => naive::linear_attention_by_feature(&q, &k, &v, &a, direction),
                false => linear_attention_by_feature(&q, &k, &v, &a, direction, 24),
            };
            let loss = y.unwrap().sqr().unwrap().sum_all().unwrap();
            let store = loss.backward().unwrap();
            [q, k, v, a].map(|x| store.get(x.as_tensor()).unwrap().clone())
        };
        let plain = slopes(DType::F64, true);
        for (found, plain) in slopes(DType::F64, false).iter().zip(&plain) {
            let largest = plain.abs().unwrap().flatten_all().unwrap().max(0).unwrap();
            let largest = largest.to_scalar::<f64>().unwrap();
            assert!(difference(found, plain).unwrap() < 1e-9 * largest.max(1.0));
        }
        for found in slopes(DType::F32, false) {
            let sum = found.abs().unwrap().sum_all().unwrap();
            assert!(sum.to_scalar::<f32>().unwrap().is_finite());
        }
    }
}

#[test]
fn operations_are_counted_for_pairs_and_states() {
    // Chunks of 4, 4 and 2: 10 + 10 + 3 pairs.
    let states = 4 * 10 * 3 * 5;
    assert_eq!(operations_by_feature(10, 3, 5, 4), 2 * 23 * 8 + states);
    assert_eq!(operations_by_feature(10, 3, 5, 1), 2 * 10 * 8 + states);
    assert_eq!(operations_by_feature(0, 3, 5, 4), 0);
}

#[test]
fn what_does_not_fit_is_refused() {
    let x = |dims: &[usize]| arange(dims, 1.0, DType::F32);
    let (q, v) = (x(&[1, 2, 3, 4]), x(&[1, 2, 3, 5]));
    let one = x(&[1, 2, 3, 1]);
    let said = linear_attention_by_feature(&q, &q, &v, &one, Direction::Past, 2);
    let said = said.unwrap_err().to_string();
    assert!(
        said.contains("log_decay") && said.contains("[1, 2, 3, 4]"),
        "{said}"
    );
    let said = linear_attention_by_feature(&q, &q, &x(&[1, 2, 4, 5]), &q, Direction::Past, 2);
    assert!(said.unwrap_err().to_string().contains("[1, 2, 3, width]"));
}
