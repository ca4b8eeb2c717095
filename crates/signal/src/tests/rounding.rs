//! The rounding lens against the numbers of `half`, one at a time.

use super::{
    assert_close, attention_of, input, linear_operations, numbers, other_operations, values,
};
use crate::rounding::{Format, Rounding, SoftmaxPrecision};
use crate::{Error, Lens, Signal};
use lapidary_kernels::{AttentionOptions, Device, Tensor};

fn rounding(format: Format) -> Rounding {
    Rounding {
        format,
        softmax: SoftmaxPrecision::Wide,
    }
}

fn nearest(format: Format, value: f64) -> f64 {
    match format {
        Format::Bf16 => half::bf16::from_f64(value).to_f64(),
        Format::F16 => half::f16::from_f64(value).to_f64(),
        Format::F32 => f64::from(value as f32),
    }
}

#[test]
fn rounding_is_that_of_half_bit_for_bit() {
    // Every bf16 number, the ties between neighbours, and the numbers beside the ties.
    let mut awkward: Vec<f32> = Vec::new();
    for bits in 0..=u16::MAX {
        let number = half::bf16::from_bits(bits).to_f32();
        if number.is_finite() {
            let tie = f32::from_bits((u32::from(bits) << 16) | 0x8000);
            awkward.extend([number, tie, tie.next_up(), tie.next_down()]);
        }
    }
    for format in Format::ALL {
        let x = Tensor::from_slice(&awkward, awkward.len(), &Device::Cpu).unwrap();
        let found = format.round(&x).unwrap().to_vec1::<f32>().unwrap();
        for (found, from) in found.iter().zip(&awkward) {
            let expected = match format {
                Format::Bf16 => half::bf16::from_f32(*from).to_f32(),
                Format::F16 => half::f16::from_f32(*from).to_f32(),
                Format::F32 => *from,
            };
            assert_eq!(found.to_bits(), expected.to_bits(), "{format:?} of {from}");
        }
    }
    let wide = numbers(&[500], 3.0);
    for format in Format::ALL {
        let found = values(&format.round(&wide).unwrap());
        for (found, from) in found.iter().zip(values(&wide)) {
            assert_eq!(
                found.to_bits(),
                nearest(format, from).to_bits(),
                "{format:?}"
            );
        }
    }
}

#[test]
fn ties_go_to_even() {
    let x = Tensor::new(&[256.0, 257.0, 258.0, 259.0, 261.0f64], &Device::Cpu).unwrap();
    let rounded = values(&Format::Bf16.round(&x).unwrap());
    assert_eq!(rounded, [256.0, 256.0, 258.0, 260.0, 260.0]);
}

#[test]
fn every_operation_keeps_the_lens_and_writes_numbers_of_the_format() {
    let operations = linear_operations().into_iter().chain(other_operations());
    for (name, operation) in operations {
        for format in Format::ALL {
            let x = Signal::from(input())
                .into_rounded(rounding(format))
                .unwrap();
            let y = operation(&x).unwrap();
            assert!(matches!(y.lens(), Lens::Rounded(_)), "{name}");
            for number in values(y.value()) {
                let expected = nearest(format, number);
                assert_eq!(number.to_bits(), expected.to_bits(), "{name} {format:?}");
            }
            // Near what is computed without the lens: a few roundings of numbers of order 1.
            let plain = operation(&Signal::from(input())).unwrap();
            assert_close(y.value(), plain.value(), 40.0 * format.epsilon(), name);
        }
    }
}

/// Attention by hand for one query that sees three keys: what is rounded where.
#[test]
fn attention_rounds_where_it_is_told() {
    let row = |values: &[f64], shape: (usize, usize, usize, usize)| {
        Tensor::from_slice(values, shape, &Device::Cpu).unwrap()
    };
    let q = row(&[1.0], (1, 1, 1, 1));
    let k = row(&[0.3, -0.9, 0.55], (1, 1, 3, 1));
    let v = row(&[1.0, 2.0, -3.0], (1, 1, 3, 1));
    let options = AttentionOptions {
        scale: 0.7,
        ..AttentionOptions::new(1)
    };
    let b = |value: f64| half::bf16::from_f64(value).to_f64();
    let keys = [b(0.3), b(-0.9), b(0.55)];
    for softmax in [
        SoftmaxPrecision::Fused,
        SoftmaxPrecision::Wide,
        SoftmaxPrecision::Narrow,
    ] {
        let scores: Vec<f64> = keys
            .iter()
            .map(|k| match softmax {
                SoftmaxPrecision::Fused => k * 0.7,
                _ => b(k * 0.7),
            })
            .collect();
        let most = scores.iter().copied().fold(f64::MIN, f64::max);
        let weights: Vec<f64> = match softmax {
            SoftmaxPrecision::Narrow => {
                let terms: Vec<f64> = scores.iter().map(|s| b(b(s - most).exp())).collect();
                let sum = terms.iter().fold(0.0, |sum, term| b(sum + term));
                terms.iter().map(|term| b(term / sum)).collect()
            }
            _ => {
                let terms: Vec<f64> = scores.iter().map(|s| (s - most).exp()).collect();
                let sum: f64 = terms.iter().sum();
                let each = terms.iter().map(|term| term / sum);
                match softmax {
                    SoftmaxPrecision::Fused => each.collect(),
                    _ => each.map(b).collect(),
                }
            }
        };
        let expected = b(weights[0] + 2.0 * weights[1] - 3.0 * weights[2]);
        let rounded = |x: &Tensor| {
            let how = Rounding {
                format: Format::Bf16,
                softmax,
            };
            Signal::from(x.clone()).into_rounded(how).unwrap()
        };
        let mixed = rounded(&v)
            .attend(&rounded(&q), &rounded(&k), &options)
            .unwrap();
        assert_eq!(values(mixed.value()), [expected], "{softmax:?}");
    }
}

/// A running sum of ones in eight bits stops at 256.
#[test]
fn a_narrow_softmax_stops_counting() {
    let keys = 400;
    let zeros = |length| {
        let zeros = Tensor::zeros(
            (1, 1, length, 1),
            lapidary_kernels::DType::F64,
            &Device::Cpu,
        );
        let how = Rounding {
            format: Format::Bf16,
            softmax: SoftmaxPrecision::Narrow,
        };
        Signal::from(zeros.unwrap()).into_rounded(how).unwrap()
    };
    let weights = zeros(1)
        .attention_weights(&zeros(keys), &AttentionOptions::new(1))
        .unwrap();
    assert!(
        values(weights.value())
            .iter()
            .all(|weight| *weight == 1.0 / 256.0)
    );
}

#[test]
fn masks_hide_keys_under_rounding_too() {
    for softmax in [SoftmaxPrecision::Wide, SoftmaxPrecision::Narrow] {
        let how = Rounding {
            format: Format::F32,
            softmax,
        };
        let x = Signal::from(input()).into_rounded(how).unwrap();
        let plain = attention_of(&Signal::from(input()), 2).unwrap();
        assert_close(
            attention_of(&x, 2).unwrap().value(),
            plain.value(),
            1e-5,
            "causal",
        );
    }
}

#[test]
fn lenses_do_not_mix() {
    let x = Signal::from(input());
    let rounded = x.clone().into_rounded(rounding(Format::F16)).unwrap();
    let metered = x.into_metered(crate::meter::Meter::new());
    let error = rounded.add(&metered).unwrap_err();
    assert!(matches!(error, Error::LensMismatch { .. }), "{error}");
}
