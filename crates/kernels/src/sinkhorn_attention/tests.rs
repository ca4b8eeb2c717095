use super::*;
use crate::Device;
use crate::check::{difference, gradient_error};
use crate::test_data::{arange, compare};

fn options(iterations: usize, keep: Option<&[u8]>, batch: usize) -> SinkhornOptions {
    SinkhornOptions {
        scale: 0.4,
        iterations,
        keep: keep.map(|keep| {
            let shape = (batch, keep.len() / batch);
            Tensor::from_vec(keep.to_vec(), shape, &Device::Cpu).unwrap()
        }),
    }
}

fn inputs(length: usize, [width, value_width]: [usize; 2], dtype: DType) -> [Tensor; 3] {
    [(width, 1.0), (width, 2.0), (value_width, 3.0)]
        .map(|(width, phase)| arange(&[2, 3, length, width], phase, dtype))
}

/// Pads at both ends of the first sequence, and in the middle of the other.
fn keep(length: usize) -> Vec<u8> {
    let first = (0..length).map(|i| u8::from(i > 0 && i + 2 < length));
    first.chain((0..length).map(|i| u8::from(i != 2))).collect()
}

#[test]
fn equals_the_composition() {
    for (length, widths) in [(1, [5, 3]), (9, [5, 3]), (170, [24, 40])] {
        let padded = keep(length);
        for iterations in [1, 2, 3, 6] {
            for keep in [None, Some(&padded[..]).filter(|_| length > 3)] {
                let options = options(iterations, keep, 2);
                compare(1e-4, |dtype| {
                    let [q, k, v] = inputs(length, widths, dtype);
                    let ours = sinkhorn_attention(&q, &k, &v, &options).unwrap();
                    (
                        ours,
                        naive::sinkhorn_attention(&q, &k, &v, &options).unwrap(),
                    )
                });
            }
        }
    }
}

#[test]
fn one_iteration_is_softmax() {
    let [q, k, v] = inputs(70, [8, 8], DType::F64);
    let ours = sinkhorn_attention(&q, &k, &v, &options(1, None, 2)).unwrap();
    let attention = crate::AttentionOptions {
        scale: 0.4,
        ..crate::AttentionOptions::new(8)
    };
    let softmax = crate::attention(&q, &k, &v, &attention).unwrap();
    assert!(difference(&ours, &softmax).unwrap() < 1e-12);
}

#[test]
fn rows_sum_to_one_and_columns_nearly() {
    let [q, k, _] = inputs(20, [6, 6], DType::F64);
    // No score is above 1, so that an iteration leaves at most tanh²(1) of what columns are off by.
    let q = (q * 0.1).unwrap();
    let units = Tensor::eye(20, DType::F64, &Device::Cpu).unwrap();
    let units = units.broadcast_as((2, 3, 20, 20)).unwrap();
    let weights = sinkhorn_attention(&q, &k, &units, &options(401, None, 2)).unwrap();
    for (along, tolerance) in [(3, 1e-12), (2, 1e-6)] {
        let sums = weights.sum(along).unwrap();
        let ones = sums.ones_like().unwrap();
        assert!(difference(&sums, &ones).unwrap() < tolerance);
    }
}

#[test]
fn gradients() {
    let x = inputs(7, [4, 3], DType::F64);
    let padded = keep(7);
    for iterations in [1, 2, 3, 4] {
        for keep in [None, Some(&padded[..])] {
            let options = options(iterations, keep, 2);
            let f = |x: &[Tensor]| sinkhorn_attention(&x[0], &x[1], &x[2], &options);
            assert!(gradient_error(f, &x).unwrap() < 1e-7, "{iterations}");
        }
    }
}

/// Over several tiles of rows and of columns, and heads side by side.
#[test]
fn gradients_equal_those_of_the_composition() {
    let options = options(3, None, 1);
    let x = [8, 8, 24].map(|width| {
        let x = arange(&[1, 170, 2, width], width as f64, DType::F64);
        crate::Var::from_tensor(&x).unwrap()
    });
    let of = |f: &dyn Fn([&Tensor; 3]) -> Result<Tensor>| {
        let [q, k, v] = [0, 1, 2].map(|i| x[i].as_tensor().transpose(1, 2).unwrap());
        let loss = f([&q, &k, &v]).unwrap().sin().unwrap().sum_all().unwrap();
        let gradients = loss.backward().unwrap();
        [0, 1, 2].map(|i| gradients.get(x[i].as_tensor()).unwrap().clone())
    };
    let ours = of(&|[q, k, v]| sinkhorn_attention(q, k, v, &options));
    let plain = of(&|[q, k, v]| naive::sinkhorn_attention(q, k, v, &options));
    for (ours, plain) in ours.iter().zip(&plain) {
        assert!(difference(ours, plain).unwrap() < 1e-10);
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let [q, k, v] = inputs(5, [4, 4], DType::F32);
    let of = |options: &SinkhornOptions| sinkhorn_attention(&q, &k, &v, options);
    assert!(of(&options(1, None, 2)).is_ok());
    assert!(of(&options(0, None, 2)).is_err());
    assert!(of(&options(1, Some(&[1; 8]), 2)).is_err());
    let fewer = k.narrow(2, 0, 4).unwrap();
    assert!(sinkhorn_attention(&q, &fewer, &v, &options(1, None, 2)).is_err());
    assert!(sinkhorn_attention(&q, &k, &fewer, &options(1, None, 2)).is_err());
}
