use super::*;
use crate::DType;
use crate::check::{difference, gradient_error};
use crate::test_data::{arange, compare};

const SECOND: [f64; 3] = [1.0, 1.0, 0.5];
const FIRST: [f64; 3] = [0.7, 1.3, 0.0];

fn inputs(queries: usize, keys: usize, dtype: DType) -> [Tensor; 3] {
    [
        arange(&[2, 3, queries, 5], 1.0, dtype),
        arange(&[2, 3, 5, keys], 2.0, dtype)
            .transpose(2, 3)
            .unwrap(),
        arange(&[2, keys, 3, 4], 3.0, dtype)
            .transpose(1, 2)
            .unwrap(),
    ]
}

#[test]
fn equals_scores_laid_out() {
    for coefficients in [FIRST, SECOND] {
        for (queries, keys, causal) in [
            (1, 1, true),
            (64, 64, true),
            (130, 130, true),
            (3, 7, false),
            (70, 65, false),
        ] {
            compare(3e-5, |dtype| {
                let [q, k, v] = inputs(queries, keys, dtype);
                let attention = PolynomialAttention::new(coefficients, causal);
                (
                    attention.sums(&q, &k, &v).unwrap(),
                    naive::polynomial_attention(&q, &k, &v, coefficients, causal).unwrap(),
                )
            });
        }
    }
}

#[test]
fn gradients_equal_finite_differences_and_those_of_scores_laid_out() {
    for coefficients in [FIRST, SECOND] {
        for causal in [false, true] {
            let keys = if causal { 7 } else { 5 };
            let of = |attention: PolynomialAttention| {
                let inputs = [
                    arange(&[1, 2, 7, 3], 1.0, DType::F64),
                    arange(&[1, 2, keys, 3], 2.0, DType::F64),
                    arange(&[1, 2, keys, 2], 3.0, DType::F64),
                ];
                let sums = |x: &[Tensor]| attention.sums(&x[0], &x[1], &x[2]);
                gradient_error(sums, &inputs).unwrap()
            };
            for chunk in [3, CHUNK] {
                let plain = PolynomialAttention {
                    chunk,
                    ..PolynomialAttention::new(coefficients, causal)
                };
                assert!(of(plain) < 1e-6);
                let dropout = Some(FactorDropout {
                    probability: 0.3,
                    seed: 5,
                });
                assert!(of(PolynomialAttention { dropout, ..plain }) < 1e-6);
            }

            let attention = PolynomialAttention::new(coefficients, causal);
            let [q, k, v] = inputs(70, 70, DType::F64);
            let vars = [&q, &k, &v].map(|x| crate::Var::from_tensor(x).unwrap());
            let gradients = |y: Tensor| {
                let weights = arange(y.dims(), 9.0, DType::F64);
                let loss = (y * weights).unwrap().sum_all().unwrap();
                let all = loss.backward().unwrap();
                [&vars[0], &vars[1], &vars[2]].map(|var| all.get(var).unwrap().clone())
            };
            let (q, k, v) = (&*vars[0], &*vars[1], &*vars[2]);
            let fused = gradients(attention.sums(q, k, v).unwrap());
            let plain =
                gradients(naive::polynomial_attention(q, k, v, coefficients, causal).unwrap());
            for (fused, plain) in fused.iter().zip(&plain) {
                let scale = plain.abs().unwrap().max_all().unwrap();
                let scale = scale.to_scalar::<f64>().unwrap();
                assert!(difference(fused, plain).unwrap() / scale < 1e-12);
            }
        }
    }
}

#[test]
fn the_size_of_chunks_changes_nothing() {
    for dropout in [None, Some((0.4, 3))] {
        let [q, k, v] = inputs(70, 70, DType::F64);
        let of = |chunk| {
            let attention = PolynomialAttention {
                chunk,
                dropout: dropout.map(|(probability, seed)| FactorDropout { probability, seed }),
                ..PolynomialAttention::new(SECOND, true)
            };
            attention.sums(&q, &k, &v).unwrap()
        };
        let laid_out = of(70);
        for chunk in [1, 3, 64, usize::MAX] {
            assert!(difference(&of(chunk), &laid_out).unwrap() < 1e-11);
        }
    }
}

/// A prefix read from its state and the rest in one pass are the whole pass.
#[test]
fn a_state_stands_for_the_positions_it_was_made_of() {
    for coefficients in [FIRST, SECOND] {
        let attention = PolynomialAttention::new(coefficients, true);
        let [q, k, v] = inputs(90, 90, DType::F64);
        let part = |x: &Tensor, start, count| x.narrow(2, start, count).unwrap();
        let whole = attention.sums(&q, &k, &v).unwrap();
        let state = attention.state(&part(&k, 0, 70), &part(&v, 0, 70)).unwrap();
        assert_eq!(state.dims(), [2, 3, attention.monomials(5), 4]);
        let rest = [&q, &k, &v].map(|x| part(x, 70, 20));
        let within = attention.sums(&rest[0], &rest[1], &rest[2]).unwrap();
        let found = (within + attention.read(&rest[0], &state).unwrap()).unwrap();
        assert!(difference(&found, &part(&whole, 70, 20)).unwrap() < 1e-10);
    }
}

#[test]
fn dropout_keeps_the_expectation_and_the_seed() {
    for coefficients in [FIRST, SECOND] {
        let [q, k, v] = inputs(3, 3, DType::F64);
        let plain = PolynomialAttention::new(coefficients, false);
        let whole = plain.sums(&q, &k, &v).unwrap();
        let with = |seed| {
            let attention = PolynomialAttention {
                dropout: Some(FactorDropout {
                    probability: 0.2,
                    seed,
                }),
                ..plain
            };
            attention.sums(&q, &k, &v).unwrap()
        };
        assert_eq!(difference(&with(1), &with(1)).unwrap(), 0.0);
        assert!(difference(&with(1), &with(2)).unwrap() > 1e-3);
        let runs = 3000;
        let (mut sum, mut squares) = (whole.zeros_like().unwrap(), whole.zeros_like().unwrap());
        for seed in 0..runs {
            let off = (with(seed) - &whole).unwrap();
            squares = (squares + off.sqr().unwrap()).unwrap();
            sum = (sum + off).unwrap();
        }
        let of = |x: Tensor| x.flatten_all().unwrap().to_vec1::<f64>().unwrap();
        let runs = runs as f64;
        for (sum, squares) in of(sum).into_iter().zip(of(squares)) {
            assert!((sum / runs).abs() < 5.0 * (squares / runs / runs).sqrt());
        }
    }
}

#[test]
fn shapes_that_do_not_fit_are_refused() {
    let x = |dims: &[usize]| arange(dims, 1.0, DType::F32);
    let attention = PolynomialAttention::new(SECOND, true);
    let (q, v) = (x(&[1, 2, 5, 3]), x(&[1, 2, 5, 4]));
    assert!(attention.sums(&q, &q, &v).is_ok());
    assert!(attention.sums(&q, &v, &v).is_err());
    assert!(
        attention
            .sums(&q, &x(&[1, 2, 4, 3]), &x(&[1, 2, 4, 4]))
            .is_err()
    );
    assert!(attention.sums(&q, &q, &x(&[1, 2, 4, 4])).is_err());
    assert!(attention.read(&q, &x(&[1, 2, 9, 4])).is_err());
    assert!(attention.state(&q, &x(&[1, 2, 4, 4])).is_err());
}
