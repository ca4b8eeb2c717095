//! The integer lens: what it changes and what it leaves.

use super::{assert_close, attention_of, input, linear_operations, other_operations, values};
use crate::{Error, Lens, Signal};
use lapidary_kernels::{Activation, AttentionOptions, Device, IntegerFunctions, Tensor};

fn functions(bits: u32) -> IntegerFunctions {
    IntegerFunctions::new(bits).unwrap()
}

fn integers(x: Tensor, bits: u32) -> Signal {
    Signal::from(x).into_integers(functions(bits))
}

#[test]
fn every_operation_keeps_the_lens_and_is_near_what_it_is_without() {
    let operations = linear_operations().into_iter().chain(other_operations());
    for (name, operation) in operations {
        let y = operation(&integers(input(), 16)).unwrap();
        assert!(matches!(y.lens(), Lens::Integers(_)), "{name}");
        let plain = operation(&Signal::from(input())).unwrap();
        assert_close(y.value(), plain.value(), 0.2, name);
    }
}

/// Weights are whole parts of 256, and what a query may not see has none.
#[test]
fn weights_of_attention_are_integers() {
    // Scores within half of each other, so that no weight is rounded away.
    let x = |bits| integers((super::numbers(&[1, 2, 5, 4], 0.0) * 0.5).unwrap(), bits);
    let options = AttentionOptions {
        causal: true,
        ..AttentionOptions::new(4)
    };
    let weights = x(8).attention_weights(&x(8), &options).unwrap();
    for (index, weight) in values(weights.value()).into_iter().enumerate() {
        let (query, key) = (index / 5 % 5, index % 5);
        assert_eq!((256.0 * weight).fract(), 0.0);
        assert_eq!(weight > 0.0, key <= query, "{query} {key}: {weight}");
    }
    let plain = attention_of(&Signal::from(input()), 2).unwrap();
    let found = attention_of(&integers(input(), 16), 2).unwrap();
    assert_close(found.value(), plain.value(), 0.2, "attention");
}

#[test]
fn gelu_is_the_functions_and_other_activations_stay() {
    for activation in Activation::ALL {
        let plain = Signal::from(input()).activate(activation).unwrap();
        let found = integers(input(), 8).activate(activation).unwrap();
        match activation {
            Activation::Gelu | Activation::GeluTanh => {
                let expected = functions(8).gelu(&input()).unwrap();
                assert_eq!(values(found.value()), values(&expected));
            }
            _ => assert_eq!(values(found.value()), values(plain.value())),
        }
    }
}

#[test]
fn it_does_not_mix_with_other_lenses() {
    let metered = Signal::from(input()).into_metered(crate::meter::Meter::new());
    let error = integers(input(), 8).add(&metered).unwrap_err();
    assert!(matches!(error, Error::LensMismatch { .. }), "{error}");
    let one = Tensor::new(&[1f64], &Device::Cpu).unwrap();
    let sum = Signal::from(one).add(&integers(input(), 8)).unwrap();
    assert!(matches!(sum.lens(), Lens::Integers(_)));
}
