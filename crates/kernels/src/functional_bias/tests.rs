//! Straight pieces against the network run for every pair.

use super::*;
use crate::check::{difference, gradient_error};
use crate::test_data::arange;
use crate::{DType, Device, Var};

/// Hidden units of the layers, and heads.
const NETWORKS: [(&[usize], usize); 5] = [
    (&[1], 1),
    (&[20], 3),
    (&[1, 1], 2),
    (&[7, 5], 3),
    (&[40, 40], 4),
];

/// `[queries, keys, offset]`: squares, one position, one query behind others, and lengths of no whole part.
const SPANS: [[usize; 3]; 7] = [
    [1, 1, 0],
    [17, 17, 0],
    [70, 70, 0],
    [1, 50, 49],
    [3, 40, 37],
    [5, 12, 2],
    [30, 9, 0],
];

fn spans() -> impl Iterator<Item = BiasSpan> {
    let both = |[queries, keys, offset]: [usize; 3]| {
        [true, false].map(|causal| BiasSpan {
            queries,
            keys,
            offset,
            causal,
        })
    };
    SPANS.into_iter().flat_map(both)
}

/// Distances that rise as FIRE's do, and scales under which they are from 0 to 1.
pub(crate) fn stretched(count: usize, dtype: DType) -> [Tensor; 2] {
    let grown = |x: usize| (0.1 * x as f64).ln_1p();
    let distances = (0..count).map(grown).collect();
    let scales = (0..count).map(|i| 1.0 / (grown(i.max(6)) + 1e-6)).collect();
    [distances, scales].map(|numbers: Vec<f64>| {
        let numbers = Tensor::from_vec(numbers, count, &Device::Cpu).unwrap();
        numbers.to_dtype(dtype).unwrap()
    })
}

/// A network whose units have corners about the inputs.
pub(crate) fn network(hidden: &[usize], outputs: usize, dtype: DType) -> Vec<(Tensor, Tensor)> {
    let mut input = 1;
    let widths = hidden.iter().chain([&outputs]).enumerate();
    let layers = widths.map(|(index, &output)| {
        let phase = 3.0 * index as f64;
        let weight = (arange(&[output, input], phase, dtype) / (input as f64).sqrt()).unwrap();
        let bias = match index {
            // Corners all over from 0 to 1.
            0 => {
                let corners = (0..output).map(|k| -(k as f64 + 0.5) / output as f64);
                let corners = Tensor::from_vec(corners.collect(), output, &Device::Cpu).unwrap();
                (weight.flatten_all().unwrap() * corners.to_dtype(dtype).unwrap()).unwrap()
            }
            _ => (arange(&[output], phase + 1.0, dtype) * 0.4).unwrap(),
        };
        input = output;
        (weight, bias)
    });
    layers.collect()
}

/// Gradients of distances, scales and all weights and biases under a loss that tells all pairs apart.
fn gradients(
    inputs: &[Tensor; 2],
    network: &[(Tensor, Tensor)],
    bias: impl Fn(&Tensor, &Tensor, &[(Tensor, Tensor)]) -> Result<Tensor>,
) -> Vec<Tensor> {
    let var = |x: &Tensor| Var::from_tensor(x).unwrap();
    let inputs = inputs.each_ref().map(var);
    let layers: Vec<[Var; 2]> = network.iter().map(|(w, b)| [var(w), var(b)]).collect();
    let network: Vec<_> = layers
        .iter()
        .map(|[w, b]| (w.as_tensor().clone(), b.as_tensor().clone()))
        .collect();
    let y = bias(inputs[0].as_tensor(), inputs[1].as_tensor(), &network).unwrap();
    let contracted = (&y * arange(y.dims(), 5.0, y.dtype())).unwrap();
    let slopes = contracted.sum_all().unwrap().backward().unwrap();
    let all = inputs.iter().chain(layers.iter().flatten());
    all.map(|var| slopes.get(var).unwrap().clone()).collect()
}

fn largest(x: &Tensor) -> f64 {
    difference(x, &x.zeros_like().unwrap()).unwrap()
}

fn outputs(heads: usize, span: BiasSpan) -> usize {
    if span.causal { heads } else { 2 * heads }
}

/// Values and gradients, relative to the largest of each.
fn compare(inputs: &[Tensor; 2], network: &[(Tensor, Tensor)], span: BiasSpan, tolerance: f64) {
    let [u, w] = inputs;
    let ours = functional_bias(u, w, network, span).unwrap();
    let plain = naive::functional_bias(u, w, network, span).unwrap();
    let close = |ours: &Tensor, plain: &Tensor, what: &str| {
        let error = difference(ours, plain).unwrap() / largest(plain).max(1.0);
        assert!(error <= tolerance, "{what} of {span:?}: {error:e}");
    };
    close(&ours, &plain, "values");
    let ours = gradients(inputs, network, |u, w, f| functional_bias(u, w, f, span));
    let plain = gradients(inputs, network, |u, w, f| {
        naive::functional_bias(u, w, f, span)
    });
    for (index, (ours, plain)) in ours.iter().zip(&plain).enumerate() {
        close(ours, plain, &format!("gradient {index}"));
    }
}

#[test]
fn equals_the_network_run_for_every_pair() {
    for (hidden, heads) in NETWORKS {
        for span in spans() {
            let inputs = |dtype| stretched(span.positions(), dtype);
            let network = |dtype| network(hidden, outputs(heads, span), dtype);
            compare(&inputs(DType::F64), &network(DType::F64), span, 1e-12);
            let [u, w] = inputs(DType::F32);
            let network = network(DType::F32);
            let ours = functional_bias(&u, &w, &network, span).unwrap();
            let plain = naive::functional_bias(&u, &w, &network, span).unwrap();
            assert_eq!(ours.dtype(), DType::F32);
            let error = difference(&ours, &plain).unwrap() / largest(&plain).max(1.0);
            assert!(error < 2e-6, "{span:?}: {error:e}");
        }
    }
}

#[test]
fn gradients_in_single_precision() {
    for span in spans() {
        let of = |dtype| {
            let inputs = stretched(span.positions(), dtype);
            let network = network(&[7, 5], outputs(2, span), dtype);
            gradients(&inputs, &network, |u, w, f| functional_bias(u, w, f, span))
        };
        for (single, double) in of(DType::F32).iter().zip(of(DType::F64)) {
            assert_eq!(single.dtype(), DType::F32);
            let error = difference(single, &double).unwrap() / largest(&double).max(1.0);
            assert!(error < 1e-5, "{span:?}: {error:e}");
        }
    }
}

/// What the other tests compare has corners where the inputs are.
#[test]
fn the_networks_of_these_tests_bend() {
    let layers = network(&[40, 40], 4, DType::F64);
    let numbers: Vec<f64> = layers
        .iter()
        .flat_map(|(w, b)| [w, b])
        .flat_map(|x| x.flatten_all().unwrap().to_vec1::<f64>().unwrap())
        .collect();
    let widths = Widths {
        first: 40,
        second: Some(40),
        outputs: 4,
    };
    let pieces = Pieces::new(widths, &numbers);
    assert!(pieces.of(1.0) - pieces.of(0.0) > 40);
}

#[test]
fn wide_networks() {
    let span = BiasSpan {
        queries: 12,
        keys: 12,
        offset: 0,
        causal: true,
    };
    let inputs = stretched(12, DType::F64);
    compare(&inputs, &network(&[300, 260], 2, DType::F64), span, 1e-12);
    compare(&inputs, &network(&[700], 2, DType::F64), span, 1e-12);
}

#[test]
fn inputs_in_no_order() {
    for span in spans() {
        let count = span.positions() + 3;
        let inputs = [1.0, 2.0].map(|phase| arange(&[count], phase, DType::F64));
        let network = network(&[7, 5], outputs(2, span), DType::F64);
        compare(&inputs, &network, span, 1e-12);
    }
}

#[test]
fn units_without_corners_and_units_that_are_the_same() {
    for span in spans() {
        let inputs = stretched(span.positions(), DType::F64);
        let mut all_zero = network(&[7, 5], outputs(2, span), DType::F64);
        for (weight, bias) in &mut all_zero {
            *weight = weight.zeros_like().unwrap();
            *bias = bias.zeros_like().unwrap();
        }
        compare(&inputs, &all_zero, span, 1e-14);
        // Constant units, which are on or off.
        let mut flat = network(&[7, 5], outputs(2, span), DType::F64);
        flat[0].0 = flat[0].0.zeros_like().unwrap();
        compare(&inputs, &flat, span, 1e-12);
        // Each unit twice, with corners that are the same.
        let mut twice = network(&[7, 10], outputs(2, span), DType::F64);
        let (weight, bias) = &twice[0];
        twice[0] = (
            Tensor::cat(&[weight, weight], 0).unwrap(),
            Tensor::cat(&[bias, bias], 0).unwrap(),
        );
        let weight = &twice[1].0;
        twice[1].0 = Tensor::cat(&[weight, weight], 1).unwrap();
        compare(&inputs, &twice, span, 1e-12);
    }
}

#[test]
fn gradients_equal_finite_differences() {
    // Few pairs, of which a step takes none over a corner.
    for span in spans().filter(|span| span.queries * span.keys < 300) {
        for (hidden, heads) in [(&[4][..], 2), (&[4, 3], 2)] {
            let [u, w] = stretched(span.positions(), DType::F64);
            let mut inputs = vec![u, w];
            for (weight, bias) in network(hidden, outputs(heads, span), DType::F64) {
                inputs.extend([weight, bias]);
            }
            let of = |x: &[Tensor]| {
                let layers = x[2..].chunks(2);
                let network: Vec<_> = layers
                    .map(|layer| (layer[0].clone(), layer[1].clone()))
                    .collect();
                functional_bias(&x[0], &x[1], &network, span)
            };
            let error = gradient_error(of, &inputs).unwrap();
            assert!(error < 1e-7, "{span:?}: {error:e}");
        }
    }
}

/// Of an input on a corner the slope to the right counts.
#[test]
fn on_a_corner_the_slope_is_that_to_the_right() {
    let span = BiasSpan {
        queries: 1,
        keys: 1,
        offset: 0,
        causal: true,
    };
    let of = |x: f64, dims: &[usize]| Tensor::full(x, dims, &Device::Cpu).unwrap();
    for (weight, slope) in [(2.0, 3.0), (-2.0, 0.0)] {
        let inputs = [of(0.0, &[1]), of(1.0, &[1])];
        let network = [
            (of(weight, &[1, 1]), of(0.0, &[1])),
            (of(3.0, &[1, 1]), of(0.0, &[1])),
        ];
        let found = gradients(&inputs, &network, |u, w, f| functional_bias(u, w, f, span));
        let gradient = arange(&[1, 1, 1], 5.0, DType::F64);
        let gradient = gradient.flatten_all().unwrap().to_vec1::<f64>().unwrap()[0];
        assert_eq!(found[3].to_vec1::<f64>().unwrap(), [slope * gradient]);
    }
}

#[test]
fn does_not_depend_on_the_number_of_threads() {
    for causal in [true, false] {
        let span = BiasSpan {
            queries: 300,
            keys: 310,
            offset: 4,
            causal,
        };
        let run = |threads: usize| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads);
            pool.build().unwrap().install(|| {
                let inputs = stretched(310, DType::F32);
                let network = network(&[32, 32], outputs(3, span), DType::F32);
                let [u, w] = &inputs;
                let mut found =
                    gradients(&inputs, &network, |u, w, f| functional_bias(u, w, f, span));
                found.push(functional_bias(u, w, &network, span).unwrap());
                found
            })
        };
        let one = run(1);
        for threads in [2, 5] {
            for (one, more) in one.iter().zip(run(threads)) {
                assert_eq!(difference(one, &more).unwrap(), 0.0);
            }
        }
    }
}

/// Rows are what they are however many there are.
#[test]
fn a_row_does_not_depend_on_the_others() {
    let network = network(&[32, 32], 3, DType::F32);
    let of = |queries, keys, offset| {
        let [u, w] = stretched(keys, DType::F32);
        let span = BiasSpan {
            queries,
            keys,
            offset,
            causal: true,
        };
        functional_bias(&u, &w, &network, span).unwrap()
    };
    let whole = of(90, 90, 0);
    for length in [1, 17, 64, 90] {
        let row = whole.narrow(1, length - 1, 1).unwrap();
        let row = row.narrow(2, 0, length).unwrap();
        assert_eq!(difference(&of(1, length, length - 1), &row).unwrap(), 0.0);
    }
}

#[test]
fn what_is_no_number_stays_none() {
    let span = BiasSpan {
        queries: 4,
        keys: 4,
        offset: 0,
        causal: false,
    };
    let [u, w] = stretched(4, DType::F64);
    let layers = network(&[7, 5], 2, DType::F64);
    let numbers = |bias: Tensor| bias.flatten_all().unwrap().to_vec1::<f64>().unwrap();
    for layer in 0..3 {
        for bad in [f64::NAN, f64::INFINITY] {
            let mut broken = layers.clone();
            broken[layer].1 = Tensor::full(bad, broken[layer].1.dims(), &Device::Cpu).unwrap();
            let found = functional_bias(&u, &w, &broken, span).unwrap();
            assert!(numbers(found).iter().all(|x| x.is_nan()));
        }
    }
    let mut distances = u.to_vec1::<f64>().unwrap();
    distances[2] = f64::NAN;
    let u = Tensor::from_vec(distances, 4, &Device::Cpu).unwrap();
    let found = numbers(functional_bias(&u, &w, &layers, span).unwrap());
    for (index, x) in found.iter().enumerate() {
        assert_eq!(x.is_nan(), (index / 4).abs_diff(index % 4) == 2);
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let span = BiasSpan {
        queries: 4,
        keys: 4,
        offset: 0,
        causal: false,
    };
    let [u, w] = stretched(4, DType::F64);
    let layers = network(&[7, 5], 2, DType::F64);
    assert!(functional_bias(&u, &w, &layers, span).is_ok());
    let short = u.narrow(0, 0, 3).unwrap();
    let square = u.reshape((2, 2)).unwrap();
    for u in [&short, &square] {
        assert!(functional_bias(u, &w, &layers, span).is_err());
        assert!(functional_bias(&w, u, &layers, span).is_err());
    }
    let odd = network(&[7, 5], 3, DType::F64);
    let deep = network(&[7, 5, 4], 2, DType::F64);
    let mut apart = layers.clone();
    apart.swap(0, 1);
    let mut biases = layers.clone();
    biases[1].1 = biases[0].1.clone();
    for layers in [&odd, &deep, &apart, &biases, &layers[..1].to_vec()] {
        assert!(functional_bias(&u, &w, layers, span).is_err());
    }
}
