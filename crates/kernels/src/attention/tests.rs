use super::*;
use crate::check::{difference, gradient_error};
use crate::test_data::{arange, compare};
use crate::{Device, Var};
use proptest::prelude::*;

/// Every mask for `queries` by `keys`, with a name.
pub(super) fn masks(
    batch: usize,
    queries: usize,
    keys: usize,
    width: usize,
) -> Vec<AttentionOptions> {
    let plain = AttentionOptions::new(width);
    let keep: Vec<u8> = (0..batch * keys).map(|i| (i % 5 != 1) as u8).collect();
    let padding = Tensor::from_vec(keep, (batch, keys), &Device::Cpu).unwrap();
    let causal = AttentionOptions {
        causal: true,
        query_offset: keys.saturating_sub(queries),
        ..plain.clone()
    };
    vec![
        plain.clone(),
        causal.clone(),
        AttentionOptions {
            causal: true,
            ..plain.clone()
        },
        AttentionOptions {
            window: Some(3),
            ..causal.clone()
        },
        AttentionOptions {
            window: Some(70),
            query_offset: 1,
            ..plain.clone()
        },
        AttentionOptions {
            key_padding: Some(padding.clone()),
            ..plain
        },
        AttentionOptions {
            key_padding: Some(padding),
            ..causal
        },
    ]
}

#[test]
fn equals_the_composition() {
    for (batch, heads, groups, queries, keys, width, value_width) in [
        (1, 1, 1, 1, 1, 1, 1),
        (2, 4, 2, 7, 7, 5, 3),
        (1, 3, 1, 130, 70, 16, 16),
        (2, 2, 2, 65, 300, 8, 24),
    ] {
        for options in masks(batch, queries, keys, width) {
            compare(2e-5, |dtype| {
                let q = arange(&[batch, queries, heads, width], 1.0, dtype)
                    .transpose(1, 2)
                    .unwrap();
                let k = arange(&[batch, keys, groups, width], 2.0, dtype)
                    .transpose(1, 2)
                    .unwrap();
                let v = arange(&[batch, groups, value_width, keys], 3.0, dtype)
                    .transpose(2, 3)
                    .unwrap();
                let fused = attention(&q, &k, &v, &options).unwrap();
                (fused, naive::attention(&q, &k, &v, &options).unwrap())
            });
        }
    }
}

#[test]
fn merged_equals_split() {
    let dtype = DType::F64;
    let q = arange(&[2, 9, 4 * 6], 1.0, dtype);
    let kv = arange(&[2, 11, 2 * 2 * 6], 2.0, dtype);
    let k = kv.narrow(2, 0, 12).unwrap();
    let v = kv.narrow(2, 12, 12).unwrap();
    let split = |x: &Tensor, heads: usize| {
        let (batch, length, _) = x.dims3().unwrap();
        x.reshape((batch, length, heads, 6))
            .unwrap()
            .transpose(1, 2)
            .unwrap()
    };
    for options in masks(2, 9, 11, 6) {
        let merged = merged_attention(&q, &k, &v, 4, 2, &options).unwrap();
        let apart = attention(&split(&q, 4), &split(&k, 2), &split(&v, 2), &options).unwrap();
        assert!(difference(&split(&merged, 4), &apart).unwrap() < 1e-12);
    }
}

#[test]
fn gradients_under_every_mask() {
    let dtype = DType::F64;
    let q = arange(&[2, 4, 5, 3], 1.0, dtype);
    let k = arange(&[2, 2, 6, 3], 2.0, dtype);
    let v = arange(&[2, 2, 6, 2], 3.0, dtype);
    for options in masks(2, 5, 6, 3) {
        let f = |a: &[Tensor]| attention(&a[0], &a[1], &a[2], &options);
        let error = gradient_error(f, &[q.clone(), k.clone(), v.clone()]).unwrap();
        assert!(error < 1e-8, "{options:?}: {error}");
    }
    let f = |a: &[Tensor]| {
        let options = AttentionOptions::new(3);
        merged_attention(&a[0], &a[1], &a[2], 2, 1, &options)
    };
    let q = arange(&[1, 4, 6], 1.0, dtype);
    let k = arange(&[1, 5, 3], 2.0, dtype);
    assert!(gradient_error(f, &[q, k.clone(), k]).unwrap() < 1e-8);
}

#[test]
fn gradients_equal_the_composition_over_several_tiles() {
    let (batch, heads, length, width) = (1, 2, 200, 8);
    for options in masks(batch, length, length, width) {
        let inputs: Vec<Var> = (0..3)
            .map(|i| {
                let x = arange(&[batch, heads, length, width], i as f64, DType::F64);
                Var::from_tensor(&x).unwrap()
            })
            .collect();
        let upstream = arange(&[batch, heads, length, width], 9.0, DType::F64);
        let gradients = |y: Tensor| {
            let loss = (y * &upstream).unwrap().sum_all().unwrap();
            loss.backward().unwrap()
        };
        let fused = gradients(attention(&inputs[0], &inputs[1], &inputs[2], &options).unwrap());
        let plain =
            gradients(naive::attention(&inputs[0], &inputs[1], &inputs[2], &options).unwrap());
        for x in &inputs {
            let (a, b) = (fused.get(x).unwrap(), plain.get(x).unwrap());
            // The composition's softmax has no gradient at rows without keys: both are zero.
            assert!(difference(a, b).unwrap() < 1e-10, "{options:?}");
        }
    }
}

#[test]
fn bias_is_added_and_differentiated() {
    for bias_dims in [[2, 4, 5, 6], [1, 4, 5, 6], [2, 1, 5, 6], [1, 1, 5, 6]] {
        compare(1e-5, |dtype| {
            let q = arange(&[2, 4, 5, 3], 1.0, dtype);
            let k = arange(&[2, 2, 6, 3], 2.0, dtype);
            let v = arange(&[2, 2, 6, 2], 3.0, dtype);
            let options = AttentionOptions {
                bias: Some(ScoreBias::Pairs(arange(&bias_dims, 4.0, dtype))),
                causal: true,
                query_offset: 2,
                ..AttentionOptions::new(3)
            };
            let fused = attention(&q, &k, &v, &options).unwrap();
            (fused, naive::attention(&q, &k, &v, &options).unwrap())
        });
        let f = |a: &[Tensor]| {
            let options = AttentionOptions {
                bias: Some(ScoreBias::Pairs(a[3].clone())),
                causal: true,
                query_offset: 2,
                ..AttentionOptions::new(3)
            };
            attention(&a[0], &a[1], &a[2], &options)
        };
        let dtype = DType::F64;
        let inputs = [
            arange(&[2, 4, 5, 3], 1.0, dtype),
            arange(&[2, 2, 6, 3], 2.0, dtype),
            arange(&[2, 2, 6, 2], 3.0, dtype),
            arange(&bias_dims, 4.0, dtype),
        ];
        assert!(gradient_error(f, &inputs).unwrap() < 1e-8);
    }
}

#[test]
fn a_query_without_keys_gives_zeros_and_no_gradient() {
    let dtype = DType::F32;
    let q = Var::from_tensor(&arange(&[1, 1, 3, 4], 1.0, dtype)).unwrap();
    let keep = Tensor::zeros((1, 5), DType::U8, &Device::Cpu).unwrap();
    let options = AttentionOptions {
        key_padding: Some(keep),
        ..AttentionOptions::new(4)
    };
    let k = arange(&[1, 1, 5, 4], 2.0, dtype);
    let y = attention(&q, &k, &k, &options).unwrap();
    let zeros = Tensor::zeros((1, 1, 3, 4), dtype, &Device::Cpu).unwrap();
    assert_eq!(difference(&y, &zeros).unwrap(), 0.0);
    let gradients = y.sum_all().unwrap().backward().unwrap();
    assert_eq!(difference(gradients.get(&q).unwrap(), &zeros).unwrap(), 0.0);
}

#[test]
fn large_scores_do_not_overflow() {
    compare(1e-5, |dtype| {
        let q = (arange(&[1, 1, 70, 8], 1.0, dtype) * 100.0).unwrap();
        let k = (arange(&[1, 1, 200, 8], 2.0, dtype) * 100.0).unwrap();
        let v = arange(&[1, 1, 200, 8], 3.0, dtype);
        let options = AttentionOptions::new(8);
        let fused = attention(&q, &k, &v, &options).unwrap();
        (fused, naive::attention(&q, &k, &v, &options).unwrap())
    });
}

/// Two blocks of queries for each head, of which the last is one query that a thread may have for itself.
#[test]
fn does_not_depend_on_the_number_of_threads() {
    let (batch, heads, queries, keys, width) = (1, 3, 65, 300, 24);
    for options in masks(batch, queries, keys, width) {
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
            pool.build().unwrap().install(|| {
                let x = [queries, keys, keys].map(|length| {
                    let x = arange(&[batch, heads, length, width], length as f64, DType::F32);
                    Var::from_tensor(&x).unwrap()
                });
                let y = attention(&x[0], &x[1], &x[2], &options).unwrap();
                let loss = y.sin().unwrap().sum_all().unwrap();
                let gradients = loss.backward().unwrap();
                let [q, k, v] = x.map(|x| gradients.get(&x).unwrap().clone());
                [y, q, k, v]
            })
        };
        let one = run(1);
        for threads in [2, 5] {
            for (one, more) in one.iter().zip(run(threads)) {
                assert_eq!(difference(one, &more).unwrap(), 0.0, "{options:?}");
            }
        }
    }
}

/// A query that is no number has no output that is one, unless it sees no key.
#[test]
fn what_is_no_number_stays_none() {
    let q = arange(&[1, 1, 3, 4], 1.0, DType::F32);
    let mut numbers: Vec<f32> = q.flatten_all().unwrap().to_vec1().unwrap();
    numbers[4..8].fill(f32::NAN);
    let q = Tensor::from_vec(numbers, (1, 1, 3, 4), &Device::Cpu).unwrap();
    let k = arange(&[1, 1, 150, 4], 2.0, DType::F32);
    let rows = |options: &AttentionOptions| {
        let y = attention(&q, &k, &k, options).unwrap();
        y.reshape((3, 4)).unwrap().to_vec2::<f32>().unwrap()
    };
    for y in [
        rows(&AttentionOptions::new(4)),
        rows(&AttentionOptions {
            window: Some(2),
            query_offset: 146,
            ..AttentionOptions::new(4)
        }),
    ] {
        assert!([0, 2].iter().all(|i| y[*i].iter().all(|x| x.is_finite())));
        assert!(y[1].iter().all(|x| x.is_nan()));
    }
    let keep = Tensor::zeros((1, 150), DType::U8, &Device::Cpu).unwrap();
    let hidden = AttentionOptions {
        key_padding: Some(keep),
        ..AttentionOptions::new(4)
    };
    assert_eq!(rows(&hidden), vec![vec![0.0; 4]; 3]);
}

#[test]
fn nothing_to_attend_to() {
    let dtype = DType::F32;
    let options = AttentionOptions::new(4);
    let empty = arange(&[1, 2, 0, 4], 1.0, dtype);
    let some = arange(&[1, 2, 3, 4], 1.0, dtype);
    let y = attention(&some, &empty, &empty, &options).unwrap();
    assert_eq!(
        y.abs()
            .unwrap()
            .sum_all()
            .unwrap()
            .to_scalar::<f32>()
            .unwrap(),
        0.0
    );
    assert_eq!(
        attention(&empty, &some, &some, &options).unwrap().dims(),
        [1, 2, 0, 4]
    );
}

#[test]
fn wrong_shapes_are_named() {
    let dtype = DType::F32;
    let q = arange(&[1, 3, 4, 5], 1.0, dtype);
    let k = arange(&[1, 2, 4, 5], 1.0, dtype);
    let message = attention(&q, &k, &k, &AttentionOptions::new(5))
        .unwrap_err()
        .to_string();
    assert!(message.contains("divisor of 3 heads"), "{message}");
    let options = AttentionOptions {
        bias: Some(ScoreBias::Pairs(arange(&[1, 3, 4, 3], 1.0, dtype))),
        ..AttentionOptions::new(5)
    };
    let message = attention(&q, &q, &q, &options).unwrap_err().to_string();
    assert!(message.contains("bias"), "{message}");
    assert!(
        merged_attention(
            &k.squeeze(0).unwrap(),
            &k.squeeze(0).unwrap(),
            &k.squeeze(0).unwrap(),
            3,
            3,
            &AttentionOptions::new(5)
        )
        .is_err()
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn any_shape(
        batch in 1usize..3, groups in 1usize..3, per_group in 1usize..3,
        queries in 1usize..140, keys in 1usize..140, width in 1usize..20,
        causal: bool, window in proptest::option::of(1usize..150), offset in 0usize..20,
    ) {
        let heads = groups * per_group;
        let dtype = DType::F64;
        let q = arange(&[batch, heads, queries, width], 1.0, dtype);
        let k = arange(&[batch, groups, keys, width], 2.0, dtype);
        let v = arange(&[batch, groups, keys, width], 3.0, dtype);
        let options = AttentionOptions { causal, window, query_offset: offset, ..AttentionOptions::new(width) };
        let fused = attention(&q, &k, &v, &options).unwrap();
        let plain = naive::attention(&q, &k, &v, &options).unwrap();
        prop_assert!(difference(&fused, &plain).unwrap() < 1e-10);
    }
}
