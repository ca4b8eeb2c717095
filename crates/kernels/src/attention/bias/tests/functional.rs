//! A function of one number for each pair, in tiles, against the same laid out for the pairs.

use super::super::super::tests::masks;
use super::super::ScoreBias;
use crate::check::{difference, gradient_error};
use crate::functional_bias::tests::{network, stretched};
use crate::test_data::arange;
use crate::{
    AttentionOptions, BiasSpan, DType, Device, FunctionalBias, PartOptions, Tensor, Var, attention,
    attention_part, merged_attention, naive,
};

/// The tensors that a bias is made of: distances, scales, and weights and biases of the layers.
type Numbers = Vec<Tensor>;

fn numbers(hidden: &[usize], heads: usize, span: BiasSpan, dtype: DType) -> Numbers {
    let outputs = if span.causal { heads } else { 2 * heads };
    let layers = network(hidden, outputs, dtype);
    let inputs = stretched(span.positions(), dtype).into_iter();
    inputs
        .chain(layers.into_iter().flat_map(|(weight, bias)| [weight, bias]))
        .collect()
}

fn bias(numbers: &[Tensor], span: BiasSpan) -> ScoreBias {
    let layers = numbers[2..].chunks(2);
    let layers: Vec<_> = layers
        .map(|layer| (layer[0].clone(), layer[1].clone()))
        .collect();
    let bias = FunctionalBias::new(&numbers[0], &numbers[1], &layers, span);
    ScoreBias::Functional(bias.unwrap())
}

fn with(bias: ScoreBias, options: &AttentionOptions) -> AttentionOptions {
    AttentionOptions {
        bias: Some(bias),
        ..options.clone()
    }
}

fn variables(x: &[Tensor]) -> Vec<Var> {
    x.iter().map(|x| Var::from_tensor(x).unwrap()).collect()
}

fn tensors(variables: &[Var]) -> Numbers {
    variables.iter().map(|x| x.as_tensor().clone()).collect()
}

/// The output, and the gradients of all variables under a loss that tells all outputs apart.
fn with_gradients(y: Tensor, variables: &[&[Var]]) -> Vec<Tensor> {
    let loss = (&y * arange(y.dims(), 9.0, y.dtype())).unwrap();
    let gradients = loss.sum_all().unwrap().backward().unwrap();
    let of = |x: &Var| gradients.get(x).unwrap().clone();
    [y].into_iter()
        .chain(variables.concat().iter().map(of))
        .collect()
}

/// Relative to the largest of each, or to 1.
fn apart(ours: &Tensor, plain: &Tensor) -> f64 {
    assert_eq!(ours.dims(), plain.dims());
    let zeros = plain.zeros_like().unwrap();
    difference(ours, plain).unwrap() / difference(plain, &zeros).unwrap().max(1.0)
}

fn equals_pairs(
    (batch, heads, groups, own): (usize, usize, usize, usize),
    hidden: &[usize],
    span: BiasSpan,
    options: &AttentionOptions,
) {
    let BiasSpan { queries, keys, .. } = span;
    for (dtype, tolerance) in [(DType::F32, 1e-4), (DType::F64, 1e-10)] {
        let x = variables(&[
            arange(&[batch, heads, queries, 8], 1.0, dtype),
            arange(&[batch, groups, keys, 8], 2.0, dtype),
            arange(&[batch, groups, keys, 5], 3.0, dtype),
        ]);
        let of = variables(&numbers(hidden, own, span, dtype));
        let functional = bias(&tensors(&of), span);
        let pairs = functional.laid_out(queries, keys).unwrap();
        assert_eq!(pairs.dims(), [1, own, queries, keys]);
        let fused = |bias: ScoreBias| {
            let y = attention(&x[0], &x[1], &x[2], &with(bias, options)).unwrap();
            with_gradients(y, &[&x, &of])
        };
        let ours = fused(functional.clone());
        let pairs = fused(ScoreBias::Pairs(pairs));
        let y = naive::attention(&x[0], &x[1], &x[2], &with(functional, options)).unwrap();
        let plain = with_gradients(y, &[&x, &of]);
        for (index, ours) in ours.iter().enumerate() {
            assert_eq!(ours.dtype(), dtype);
            for other in [&pairs[index], &plain[index]] {
                let error = apart(ours, other);
                assert!(
                    error < tolerance,
                    "{index} of {hidden:?}, {span:?}, {options:?}: {error:e}"
                );
            }
        }
        // The scores are the same numbers.
        assert_eq!(difference(&ours[0], &pairs[0]).unwrap(), 0.0);
    }
}

#[test]
fn a_function_is_one_laid_out_by_pairs() {
    for ([queries, keys], offset) in [
        ([1, 1], 0),
        ([1, 9], 8),
        ([9, 1], 0),
        ([6, 6], 0),
        ([64, 192], 128),
        ([65, 193], 40),
        ([130, 421], 291),
        ([300, 70], 3),
    ] {
        for (hidden, sizes) in [(&[20][..], (2, 4, 2, 4)), (&[7, 5], (1, 2, 2, 1))] {
            for causal in [true, false] {
                let span = BiasSpan {
                    queries,
                    keys,
                    offset,
                    causal,
                };
                // Masks and spans that belong together, and those that do not.
                for options in masks(sizes.0, queries, keys, 8) {
                    equals_pairs(sizes, hidden, span, &options);
                }
            }
        }
    }
}

/// Spans of few pairs, of which a step takes none over a corner.
fn small(causal: bool) -> BiasSpan {
    BiasSpan {
        queries: 5,
        keys: 6,
        offset: 1,
        causal,
    }
}

/// That of 4 heads over [`small`] whose last layer has these weights, `[4, 7]`.
pub(super) fn of_last_weights(weights: Tensor) -> ScoreBias {
    let span = small(true);
    let mut numbers = numbers(&[7], 4, span, DType::F64);
    numbers[4] = weights;
    bias(&numbers, span)
}

#[test]
fn a_function_is_differentiated() {
    let dtype = DType::F64;
    for (hidden, own) in [(&[4][..], 4), (&[4, 3], 4), (&[4, 3], 1)] {
        for causal in [true, false] {
            let span = small(causal);
            for options in masks(2, 5, 6, 3) {
                let f = |a: &[Tensor]| {
                    let options = with(bias(&a[3..], span), &options);
                    attention(&a[0], &a[1], &a[2], &options)
                };
                let mut inputs = vec![
                    arange(&[2, 4, 5, 3], 1.0, dtype),
                    arange(&[2, 2, 6, 3], 2.0, dtype),
                    arange(&[2, 2, 6, 2], 3.0, dtype),
                ];
                inputs.extend(numbers(hidden, own, span, dtype));
                let error = gradient_error(f, &inputs).unwrap();
                assert!(error < 1e-7, "{hidden:?}, {span:?}, {options:?}: {error:e}");
            }
        }
    }
}

#[test]
fn heads_side_by_side_have_the_same() {
    let span = BiasSpan {
        queries: 70,
        keys: 75,
        offset: 5,
        causal: true,
    };
    let of = variables(&numbers(&[7, 5], 2, span, DType::F64));
    let x = variables(&[
        arange(&[2, 70, 12], 1.0, DType::F64),
        arange(&[2, 75, 6], 2.0, DType::F64),
        arange(&[2, 75, 4], 3.0, DType::F64),
    ]);
    let of_pass = |bias: ScoreBias| {
        let options = AttentionOptions {
            causal: true,
            query_offset: 5,
            bias: Some(bias),
            ..AttentionOptions::new(6)
        };
        let y = merged_attention(&x[0], &x[1], &x[2], 2, 1, &options).unwrap();
        with_gradients(y, &[&x, &of])
    };
    let functional = bias(&tensors(&of), span);
    let pairs = ScoreBias::Pairs(functional.laid_out(70, 75).unwrap());
    for (ours, plain) in of_pass(functional).iter().zip(of_pass(pairs)) {
        assert!(apart(ours, &plain) < 1e-10);
    }
}

/// Where neither along a row nor along a column of pairs anything rises or falls.
#[test]
fn numbers_in_no_order() {
    for causal in [true, false] {
        let span = BiasSpan {
            queries: 70,
            keys: 205,
            offset: 130,
            causal,
        };
        let mut of = numbers(&[7, 5], 2, span, DType::F64);
        for (index, phase) in [(0, 1.0), (1, 2.0)] {
            of[index] = arange(&[span.positions() + 3], phase, DType::F64);
        }
        let of = variables(&of);
        let x = variables(&[70, 205, 205].map(|n| arange(&[1, 2, n, 8], n as f64, DType::F64)));
        let functional = bias(&tensors(&of), span);
        let pairs = ScoreBias::Pairs(functional.laid_out(70, 205).unwrap());
        let of_pass = |bias: ScoreBias| {
            let options = with(bias, &AttentionOptions::new(8));
            let y = attention(&x[0], &x[1], &x[2], &options).unwrap();
            with_gradients(y, &[&x, &of])
        };
        for (ours, plain) in of_pass(functional).iter().zip(of_pass(pairs)) {
            assert!(apart(ours, &plain) < 1e-10);
        }
    }
}

/// In the ways that a bias without parameters goes, which differentiate queries, keys and values alone.
#[test]
fn a_constant_function_leaves_the_other_gradients() {
    let span = BiasSpan {
        queries: 30,
        keys: 40,
        offset: 10,
        causal: true,
    };
    let of = numbers(&[7, 5], 2, span, DType::F64);
    let x = variables(&[30, 40, 40].map(|n| arange(&[1, 2, n, 8], n as f64, DType::F64)));
    let options = |bias: ScoreBias| AttentionOptions {
        causal: true,
        query_offset: 10,
        bias: Some(bias),
        ..AttentionOptions::new(8)
    };
    let learned = bias(&tensors(&variables(&of)), span);
    let constant = bias(&of, span);
    let pairs = ScoreBias::Pairs(constant.laid_out(30, 40).unwrap());
    let of_pass = |bias: &ScoreBias| {
        let y = attention(&x[0], &x[1], &x[2], &options(bias.clone())).unwrap();
        with_gradients(y, &[&x])
    };
    let of_part = |bias: &ScoreBias| {
        let options = PartOptions::new(options(bias.clone()));
        let part = attention_part(&x[0], &x[1], &x[2], &options).unwrap();
        let sums = part.log_sums.unsqueeze(3).unwrap();
        with_gradients(part.output.broadcast_mul(&sums).unwrap(), &[&x])
    };
    for of_pass in [&of_pass as &dyn Fn(&ScoreBias) -> Vec<Tensor>, &of_part] {
        let constant = of_pass(&constant);
        for other in [of_pass(&learned), of_pass(&pairs)] {
            for (constant, other) in constant.iter().zip(&other) {
                assert_eq!(difference(constant, other).unwrap(), 0.0);
            }
        }
    }
}

#[test]
fn a_function_does_not_depend_on_the_number_of_threads() {
    let (batch, heads, queries, keys, width) = (2, 3, 131, 300, 24);
    for options in masks(batch, queries, keys, width) {
        let span = BiasSpan {
            queries,
            keys,
            offset: options.query_offset,
            causal: options.causal,
        };
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
            pool.build().unwrap().install(|| {
                let x = [queries, keys, keys]
                    .map(|n| arange(&[batch, heads, n, width], n as f64, DType::F32));
                let x = variables(&x);
                let of = variables(&numbers(&[32, 32], heads, span, DType::F32));
                let options = with(bias(&tensors(&of), span), &options);
                let y = attention(&x[0], &x[1], &x[2], &options).unwrap();
                with_gradients(y, &[&x, &of])
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
fn a_function_that_is_no_number_leaves_none() {
    let span = small(true);
    let mut of = numbers(&[4, 3], 2, span, DType::F32);
    of[3] = Tensor::full(f32::NAN, of[3].dims(), &Device::Cpu).unwrap();
    let [q, k] = [5, 6].map(|n| arange(&[1, 2, n, 4], 1.0, DType::F32));
    let options = with(bias(&of, span), &AttentionOptions::new(4));
    let y = attention(&q, &k, &k, &options).unwrap();
    let y = y.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    // The last keys come later than all queries but one, and have no bias.
    assert!(y.iter().all(|x| x.is_nan()));
}

#[test]
fn a_function_of_other_pairs_is_refused() {
    let q = arange(&[1, 3, 5, 4], 1.0, DType::F32);
    let k = arange(&[1, 3, 6, 4], 1.0, DType::F32);
    let span = small(true);
    let fits = |heads: usize, span: BiasSpan, k: &Tensor| {
        let of = numbers(&[4], heads, span, DType::F32);
        let options = with(bias(&of, span), &AttentionOptions::new(4));
        attention(&q, k, k, &options).map_err(|error| error.to_string())
    };
    assert!(fits(3, span, &k).is_ok() && fits(1, span, &k).is_ok());
    let message = fits(2, span, &k).unwrap_err();
    assert!(message.contains("[3 or 1, 5, 6]"), "{message}");
    for span in [
        BiasSpan { keys: 7, ..span },
        BiasSpan { queries: 4, ..span },
    ] {
        assert!(fits(3, span, &k).is_err());
        let bias = bias(&numbers(&[4], 3, span, DType::F32), span);
        assert!(bias.laid_out(5, 6).is_err());
    }
    assert!(fits(3, span, &q).is_err());
}
