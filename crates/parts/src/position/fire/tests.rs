//! The network in pieces, and by distance, against the network run for every query and key.

use super::*;
use crate::parameters::ParameterSource;
use lapidary_kernels::check::difference;
use lapidary_kernels::{DType, Device, Var};
use rand::RngExt;
use std::collections::BTreeMap;

/// Draws parameters about zero, `c` and `l` about one, and keeps them as variables.
struct Drawn {
    rng: ChaCha8Rng,
    variables: Vec<Var>,
}

impl ParameterSource for Drawn {
    fn parameter(&mut self, name: &str, shape: &[usize], _: Init) -> Result<Tensor> {
        let middle = match name {
            "stretch" | "length" => 1.0,
            _ => 0.0,
        };
        let count = shape.iter().product();
        let numbers: Vec<f64> = (0..count)
            .map(|_| middle + 1.6 * (self.rng.random::<f64>() - 0.5))
            .collect();
        let values = tensor(Tensor::from_vec(numbers, shape, &Device::Cpu))?;
        let variable = tensor(Var::from_tensor(&values))?;
        let parameter = variable.as_tensor().clone();
        self.variables.push(variable);
        Ok(parameter)
    }
}

fn drawn(spec: &FireSpec, causal: bool) -> (Fire, Vec<Var>) {
    let mut source = Drawn {
        rng: ChaCha8Rng::seed_from_u64(5),
        variables: Vec::new(),
    };
    let (ranks, mut linears) = (BTreeMap::new(), Vec::new());
    let parameters = Parameters::new(&mut source, &ranks, &mut linears);
    let fire = Fire::new(spec, 3, causal, parameters).unwrap();
    (fire, source.variables)
}

fn span([queries, keys, offset]: [usize; 3]) -> Span {
    Span {
        queries,
        keys,
        offset,
        draw: None,
    }
}

/// The bias of every query and key, `[1, heads, query, key]`.
fn laid_out(fire: &Fire, span: Span) -> Tensor {
    let bias = fire.bias(span).unwrap();
    bias.laid_out(span.queries, span.keys).unwrap()
}

/// The bias of the keys that are seen, and its gradients with respect to all parameters.
fn with_gradients(bias: &Tensor, causal: bool, span: Span, variables: &[Var]) -> Vec<Tensor> {
    let weights: Vec<f64> = (0..bias.elem_count())
        .map(|index| {
            let (query, key) = (index / span.keys % span.queries, index % span.keys);
            match causal && key > span.offset + query {
                true => 0.0,
                false => (1.0 + index as f64 * 1.7).sin(),
            }
        })
        .collect();
    let weights = Tensor::from_vec(weights, bias.dims(), &Device::Cpu).unwrap();
    let weighted = (bias * weights).unwrap();
    let gradients = weighted.sum_all().unwrap().backward().unwrap();
    let of = |variable: &Var| match gradients.get(variable) {
        Some(gradient) => gradient.clone(),
        None => variable.zeros_like().unwrap(),
    };
    [weighted]
        .into_iter()
        .chain(variables.iter().map(of))
        .collect()
}

#[test]
fn is_the_network_run_for_every_pair() {
    for (layers, causal) in [(1, true), (2, true), (1, false), (2, false)] {
        for (initial_length, transform) in [
            (1, FireTransform::Logarithm),
            (7, FireTransform::Logarithm),
            (7, FireTransform::Linear),
            (100, FireTransform::Logarithm),
        ] {
            let spec = FireSpec {
                layers,
                transform,
                initial_length,
                hidden: 12,
                ..FireSpec::default()
            };
            let (fire, variables) = drawn(&spec, causal);
            for sizes in [[1, 1, 0], [20, 20, 0], [1, 12, 11], [4, 18, 14], [3, 20, 4]] {
                let span = span(sizes);
                let all: Vec<u32> = (0..20).collect();
                let ours = laid_out(&fire, span);
                let plain = fire.of_pairs(&all, span).unwrap();
                let [ours, plain] =
                    [ours, plain].map(|bias| with_gradients(&bias, causal, span, &variables));
                for (index, (ours, plain)) in ours.iter().zip(&plain).enumerate() {
                    let zeros = plain.zeros_like().unwrap();
                    let scale = difference(plain, &zeros).unwrap().max(1.0);
                    let error = difference(ours, plain).unwrap() / scale;
                    assert!(error < 1e-12, "{spec:?} {span:?}, {index}: {error:e}");
                }
            }
        }
    }
}

/// With and without a whole sequence before it, a query that is beyond `L` has the same bias.
#[test]
fn decoding_gives_the_rows_of_the_whole() {
    let spec = FireSpec {
        initial_length: 4,
        ..FireSpec::default()
    };
    let (fire, _) = drawn(&spec, true);
    let whole = laid_out(&fire, span([30, 30, 0]));
    for position in [10, 20, 29] {
        let keys = position + 1;
        let row = whole.narrow(2, position, 1).unwrap();
        let row = row.narrow(3, 0, keys).unwrap();
        let alone = laid_out(&fire, span([1, keys, position]));
        assert_eq!(difference(&alone, &row).unwrap(), 0.0);
    }
}

#[test]
fn single_precision_is_near() {
    let (fire, _) = drawn(&FireSpec::default(), true);
    let near = Fire {
        stretch: fire.stretch.to_dtype(DType::F32).unwrap(),
        length: fire.length.to_dtype(DType::F32).unwrap(),
        layers: (fire.layers.iter())
            .map(|(weight, bias)| {
                let [weight, bias] = [weight, bias].map(|x| x.to_dtype(DType::F32).unwrap());
                (weight, bias)
            })
            .collect(),
        spec: fire.spec.clone(),
        ..fire
    };
    let span = span([3, 1500, 1497]);
    let [double, single] = [&fire, &near].map(|fire| laid_out(fire, span));
    assert_eq!(single.dtype(), DType::F32);
    let scale = difference(&double, &double.zeros_like().unwrap()).unwrap();
    assert!(difference(&single, &double).unwrap() < 1e-5 * scale.max(1.0));
}
