mod functional;

use super::super::tests::masks;
use super::ScoreBias;
use crate::check::{difference, gradient_error};
use crate::test_data::arange;
use crate::{AttentionOptions, DType, Tensor, Var, attention, merged_attention, naive};

#[test]
fn a_bias_by_distance_is_one_laid_out_by_pairs() {
    for lengths in [
        [1, 1],
        [1, 9],
        [9, 1],
        [6, 6],
        [64, 192],
        [65, 193],
        [130, 421],
        [300, 70],
    ] {
        let [queries, keys] = lengths;
        for (batch, heads, groups, own) in [(2, 4, 2, 4), (1, 2, 2, 1)] {
            for options in masks(batch, queries, keys, 8) {
                let sizes = (batch, heads, groups, own);
                equals_pairs(sizes, lengths, &options);
            }
        }
        let table = arange(&[3, queries + keys - 1], 4.0, DType::F64);
        let laid = ScoreBias::ByDistance(table.clone()).laid_out(queries, keys);
        let laid = laid.unwrap().squeeze(0).unwrap().to_vec3::<f64>().unwrap();
        for (head, entries) in table.to_vec2::<f64>().unwrap().iter().enumerate() {
            for i in 0..queries {
                assert_eq!(laid[head][i][..], entries[queries - 1 - i..][..keys]);
            }
        }
    }
}

/// Outputs and gradients, of the table too, against the composition with the bias laid out.
fn equals_pairs(
    (batch, heads, groups, own): (usize, usize, usize, usize),
    [queries, keys]: [usize; 2],
    options: &AttentionOptions,
) {
    for (dtype, tolerance) in [(DType::F32, 2e-5), (DType::F64, 1e-11)] {
        let x = [
            arange(&[batch, heads, queries, 8], 1.0, dtype),
            arange(&[batch, groups, keys, 8], 2.0, dtype),
            arange(&[batch, groups, keys, 5], 3.0, dtype),
            arange(&[own, queries + keys - 1], 4.0, dtype),
        ]
        .map(|x| Var::from_tensor(&x).unwrap());
        let [q, k, v, table] = &x;
        let bias = ScoreBias::ByDistance(table.as_tensor().clone());
        let all = |bias: ScoreBias, naively: bool| {
            let options = AttentionOptions {
                bias: Some(bias),
                ..options.clone()
            };
            let y = match naively {
                true => naive::attention(q, k, v, &options),
                false => attention(q, k, v, &options),
            };
            let y = y.unwrap();
            let gradients = (&y * arange(y.dims(), 9.0, dtype)).unwrap();
            let gradients = gradients.sum_all().unwrap().backward().unwrap();
            let of = |x: &Var| gradients.get(x).unwrap().clone();
            [y, of(q), of(k), of(v), of(table)]
        };
        let laid = ScoreBias::Pairs(bias.laid_out(queries, keys).unwrap());
        let fused = all(bias.clone(), false);
        for plain in [all(bias, true), all(laid.clone(), true), all(laid, false)] {
            for (fused, plain) in fused.iter().zip(&plain) {
                assert_eq!(fused.dims(), plain.dims());
                let most = plain.abs().unwrap().flatten_all().unwrap().max(0).unwrap();
                let most = most.to_dtype(DType::F64).unwrap();
                let scale = most.to_scalar::<f64>().unwrap().max(1.0);
                let error = difference(fused, plain).unwrap() / scale;
                assert!(error < tolerance, "{queries}, {keys}, {options:?}: {error}");
            }
        }
    }
}

#[test]
fn a_bias_by_distance_is_differentiated() {
    let dtype = DType::F64;
    for own in [4, 1] {
        for options in masks(2, 5, 6, 3) {
            let f = |a: &[Tensor]| {
                let options = AttentionOptions {
                    bias: Some(ScoreBias::ByDistance(a[3].clone())),
                    ..options.clone()
                };
                attention(&a[0], &a[1], &a[2], &options)
            };
            let inputs = [
                arange(&[2, 4, 5, 3], 1.0, dtype),
                arange(&[2, 2, 6, 3], 2.0, dtype),
                arange(&[2, 2, 6, 2], 3.0, dtype),
                arange(&[own, 10], 4.0, dtype),
            ];
            let error = gradient_error(f, &inputs).unwrap();
            assert!(error < 1e-8, "{options:?}: {error}");
        }
    }
    // Heads side by side, and a table that does not lie in order.
    let f = |a: &[Tensor]| {
        let options = AttentionOptions {
            bias: Some(ScoreBias::ByDistance(a[3].t()?)),
            ..AttentionOptions::new(3)
        };
        merged_attention(&a[0], &a[1], &a[2], 2, 1, &options)
    };
    let [q, k] = [
        arange(&[1, 4, 6], 1.0, dtype),
        arange(&[1, 5, 3], 2.0, dtype),
    ];
    let table = arange(&[8, 2], 3.0, dtype);
    assert!(gradient_error(f, &[q, k.clone(), k, table]).unwrap() < 1e-8);
}

/// In the way that a bias without parameters goes, which differentiates queries, keys and values alone.
#[test]
fn a_constant_bias_by_distance_leaves_the_other_gradients() {
    let table = arange(&[2, 69], 4.0, DType::F64);
    let gradients = |table: &Tensor| {
        let x = [30, 40, 40].map(|length| {
            let x = arange(&[1, 2, length, 8], length as f64, DType::F64);
            Var::from_tensor(&x).unwrap()
        });
        let options = AttentionOptions {
            causal: true,
            query_offset: 10,
            bias: Some(ScoreBias::ByDistance(table.clone())),
            ..AttentionOptions::new(8)
        };
        let y = attention(&x[0], &x[1], &x[2], &options).unwrap();
        let gradients = y.sin().unwrap().sum_all().unwrap().backward().unwrap();
        x.map(|x| gradients.get(&x).unwrap().clone())
    };
    let learned = Var::from_tensor(&table).unwrap();
    let (constant, learned) = (gradients(&table), gradients(&learned));
    for (constant, learned) in constant.iter().zip(&learned) {
        assert_eq!(difference(constant, learned).unwrap(), 0.0);
    }
}

/// Whatever else is constant, and each time that a graph is differentiated.
#[test]
fn each_argument_has_the_gradient_that_it_has_among_all() {
    type Form = fn(Tensor) -> ScoreBias;
    let forms: [(Form, &[usize]); 3] = [
        (ScoreBias::Pairs, &[1, 4, 5, 6]),
        (ScoreBias::ByDistance, &[4, 10]),
        (functional::of_last_weights, &[4, 7]),
    ];
    for is_merged in [false, true] {
        let [q, k, v]: [&[usize]; 3] = match is_merged {
            true => [&[2, 5, 16], &[2, 6, 8], &[2, 6, 4]],
            false => [&[2, 4, 5, 4], &[2, 2, 6, 4], &[2, 2, 6, 2]],
        };
        for (form, bias) in forms {
            // Those of queries, keys, values and bias, of which bits say what is learned, under each loss.
            let of = |learned: u32, losses: &[f64]| -> Vec<Option<Tensor>> {
                let x = [q, k, v, bias].into_iter().enumerate();
                let x: Vec<Tensor> = x
                    .map(|(index, dims)| {
                        let x = arange(dims, index as f64, DType::F64);
                        match (learned >> index) & 1 {
                            1 => Var::from_tensor(&x).unwrap().as_tensor().clone(),
                            _ => x,
                        }
                    })
                    .collect();
                let options = AttentionOptions {
                    causal: true,
                    query_offset: 1,
                    bias: Some(form(x[3].clone())),
                    ..AttentionOptions::new(4)
                };
                let y = match is_merged {
                    true => merged_attention(&x[0], &x[1], &x[2], 4, 2, &options).unwrap(),
                    false => attention(&x[0], &x[1], &x[2], &options).unwrap(),
                };
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
                        assert_eq!(one.dims(), among.dims());
                        let error = difference(one, among).unwrap();
                        assert_eq!(error, 0.0, "{index} of {learned:b}, {is_merged}, {bias:?}");
                    }
                }
            }
        }
    }
}

#[test]
fn a_bias_by_distance_does_not_depend_on_the_number_of_threads() {
    let (batch, heads, queries, keys, width) = (2, 3, 131, 300, 24);
    for options in masks(batch, queries, keys, width) {
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
            pool.build().unwrap().install(|| {
                let x = [queries, keys, keys].map(|length| {
                    let x = arange(&[batch, heads, length, width], length as f64, DType::F32);
                    Var::from_tensor(&x).unwrap()
                });
                let table = arange(&[heads, queries + keys - 1], 5.0, DType::F32);
                let table = Var::from_tensor(&table).unwrap();
                let options = AttentionOptions {
                    bias: Some(ScoreBias::ByDistance(table.as_tensor().clone())),
                    ..options.clone()
                };
                let y = attention(&x[0], &x[1], &x[2], &options).unwrap();
                let loss = y.sin().unwrap().sum_all().unwrap();
                let gradients = loss.backward().unwrap();
                let [q, k, v] = x.map(|x| gradients.get(&x).unwrap().clone());
                [y, q, k, v, gradients.get(&table).unwrap().clone()]
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

#[test]
fn a_table_of_other_distances_is_refused() {
    let dtype = DType::F32;
    let q = arange(&[1, 3, 4, 5], 1.0, dtype);
    for dims in [[3, 8], [3, 6], [2, 7], [4, 3]] {
        let bias = ScoreBias::ByDistance(arange(&dims, 1.0, dtype));
        let options = AttentionOptions {
            bias: Some(bias.clone()),
            ..AttentionOptions::new(5)
        };
        let message = attention(&q, &q, &q, &options).unwrap_err().to_string();
        assert!(message.contains("bias"), "{message}");
        assert!(message.contains("[3 or 1, 7]"), "{message}");
        assert_eq!(bias.laid_out(4, 4).is_err(), dims[1] != 7);
    }
    let pairs = ScoreBias::Pairs(arange(&[3, 7], 1.0, dtype));
    let options = AttentionOptions {
        bias: Some(pairs),
        ..AttentionOptions::new(5)
    };
    assert!(attention(&q, &q, &q, &options).is_err());
}
