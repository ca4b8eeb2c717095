//! Transforms along the sequence, and their inverses.

use super::{BATCH, Subject, WIDTH, matrix, spec, squares, tokens};
use crate::common::{assert_near, difference, values};
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_parts::attention::wavelet::filters::daubechies;
use lapidary_parts::attention::wavelet::{Base, Boundary, Convolution, Family, WaveletSpec};

#[test]
fn haar_by_hand() {
    let subject = Subject::new(spec(Family::Fixed, 1, 2));
    let x = tokens(6);
    let bands = subject.coefficients(&x);
    let (x, root) = (values(&x), 2f64.sqrt());
    let (low, high) = (values(&bands[0]), values(&bands[1]));
    for sequence in 0..BATCH {
        for m in 0..3 {
            for channel in 0..WIDTH {
                let at = |t: usize| x[(sequence * 6 + t) * WIDTH + channel];
                let place = (sequence * 3 + m) * WIDTH + channel;
                assert!((low[place] - (at(2 * m) + at(2 * m + 1)) / root).abs() < 1e-14);
                assert!(
                    (high[place].abs() - ((at(2 * m) - at(2 * m + 1)) / root).abs()).abs() < 1e-14
                );
            }
        }
    }
}

#[test]
fn orthonormal_filters_make_an_orthogonal_matrix() {
    let cases = [
        (Family::Fixed, Base::Daubechies, 8),
        (Family::Fixed, Base::Symlet, 10),
        (Family::Fixed, Base::Coiflet, 6),
        (Family::Fixed, Base::Coiflet, 18),
        (Family::Fixed, Base::Daubechies, 40),
        (Family::Orthogonal, Base::Daubechies, 2),
        (Family::Orthogonal, Base::Daubechies, 12),
    ];
    for (family, base, taps) in cases {
        for levels in [1, 2, 3] {
            let subject = Subject::new(WaveletSpec {
                base,
                ..spec(family, levels, taps)
            });
            for channel in [0, 3] {
                let matrix = matrix(&subject, 16, channel);
                assert_eq!(matrix.len(), 16);
                for (i, a) in matrix.iter().enumerate() {
                    for (j, b) in matrix.iter().enumerate() {
                        let product: f64 = a.iter().zip(b).map(|(a, b)| a * b).sum();
                        let expected = f64::from(u8::from(i == j));
                        assert!(
                            (product - expected).abs() < 1e-10,
                            "{taps} taps, {i} and {j}"
                        );
                    }
                }
            }
        }
    }
    // Angles make every channel's filters another's.
    let subject = Subject::new(spec(Family::Orthogonal, 1, 12));
    assert_ne!(matrix(&subject, 16, 0)[3], matrix(&subject, 16, 1)[3]);
}

#[test]
fn transforms_are_undone_whatever_the_length() {
    let families = [
        (Family::Fixed, 16),
        (Family::Orthogonal, 8),
        (Family::Lifting, 8),
        (Family::AdaptiveLifting, 5),
        (Family::Fourier, 8),
    ];
    for (family, taps) in families {
        for levels in [1, 2, 4] {
            let levels = if family == Family::Fourier { 1 } else { levels };
            let mut subject = Subject::new(spec(family, levels, taps));
            // Not only the small filters that training begins with.
            for (name, tensor) in &mut subject.map {
                if name == "predict" || name == "update" {
                    *tensor = (&*tensor * 5.0).unwrap();
                }
            }
            for length in [1, 2, 3, 7, 16, 33] {
                let x = tokens(length);
                assert_near(&subject.back(&x), &x, 1e-10, "inverse");
                if matches!(family, Family::Fixed | Family::Orthogonal) {
                    let bands = subject.coefficients(&x);
                    let all: f64 = bands.iter().map(squares).sum();
                    assert!((all / squares(&x) - 1.0).abs() < 1e-10, "norm");
                }
            }
            // In single precision too.
            let single = Subject {
                spec: subject.spec.clone(),
                map: subject
                    .map
                    .iter()
                    .map(|(name, t)| (name.clone(), t.to_dtype(DType::F32).unwrap()))
                    .collect(),
            };
            let x = tokens(16).to_dtype(DType::F32).unwrap();
            assert_near(&single.back(&x), &x, 1e-5, "inverse in f32");
        }
    }
}

#[test]
fn an_adaptive_family_begins_as_its_base_and_leaves_it() {
    let mut subject = Subject::new(spec(Family::Adaptive, 2, 8));
    let x = tokens(16);
    assert!(difference(&subject.back(&x), &x) > 1e-3);
    let change = subject.map["filters"].zeros_like().unwrap();
    subject.map.insert("filters".to_owned(), change);
    assert_near(&subject.back(&x), &x, 1e-12, "at its start");
    let fixed = Subject::new(spec(Family::Fixed, 2, 8));
    for (a, b) in subject.coefficients(&x).iter().zip(fixed.coefficients(&x)) {
        assert_near(a, &b, 1e-14, "coefficients");
    }
    // Other starts have the norm of an orthonormal filter, too.
    let sinusoid = Subject::new(WaveletSpec {
        base: Base::Sinusoid,
        ..spec(Family::Adaptive, 1, 8)
    });
    let low = sinusoid
        .module()
        .low_pass(DType::F64, &Device::Cpu)
        .unwrap()
        .unwrap();
    let start = (low - &sinusoid.map["filters"]).unwrap();
    assert!((squares(&start) / WIDTH as f64 - 1.0).abs() < 1e-12);
}

#[test]
fn shifting_by_two_to_the_levels_shifts_coefficients() {
    let families = [
        Family::Fixed,
        Family::Orthogonal,
        Family::Adaptive,
        Family::Lifting,
        Family::AdaptiveLifting,
    ];
    for family in families {
        // A family without filters has no taps to choose.
        let taps = if family == Family::Lifting { 8 } else { 6 };
        let subject = Subject::new(spec(family, 2, taps));
        let x = tokens(16);
        let turned = |x: &Tensor, by: usize| {
            let length = x.dims()[1];
            let (head, tail) = (x.narrow(1, by, length - by), x.narrow(1, 0, by));
            Tensor::cat(&[head.unwrap(), tail.unwrap()], 1).unwrap()
        };
        let before = subject.coefficients(&x);
        let after = subject.coefficients(&turned(&x, 4));
        // [a₂, d₂, d₁]: four tokens are one coefficient of the first two and two of the last.
        for ((before, after), by) in before.iter().zip(&after).zip([1, 1, 2]) {
            assert_near(after, &turned(before, by), 1e-12, "shifted");
        }
    }
}

#[test]
fn fourier_and_direct_convolution_are_one() {
    for boundary in [Boundary::Periodised, Boundary::Reflect] {
        for (length, taps) in [(64, 40), (33, 16), (8, 40)] {
            let direct = Subject::new(WaveletSpec {
                boundary,
                ..spec(Family::Orthogonal, 1, taps)
            });
            let fourier = Subject {
                spec: WaveletSpec {
                    convolution: Convolution::Fourier,
                    ..direct.spec.clone()
                },
                map: direct.map.clone(),
            };
            let x = tokens(length);
            for (a, b) in direct.coefficients(&x).iter().zip(fourier.coefficients(&x)) {
                assert_near(a, &b, 1e-11, "coefficients");
            }
            assert_near(&direct.back(&x), &fourier.back(&x), 1e-11, "synthesis");
        }
    }
}

/// What reflection gives by the definition, and how far its inverse is from one: at the ends alone.
#[test]
fn reflection_is_undone_away_from_the_ends() {
    let taps = 6;
    let subject = Subject::new(WaveletSpec {
        boundary: Boundary::Reflect,
        ..spec(Family::Fixed, 1, taps)
    });
    let length = 40;
    let x = tokens(length);
    let bands = subject.coefficients(&x);
    let lo = daubechies(taps);
    let reach = (2 * taps - 3) / 2;
    let count = (length + 2 * reach - taps) / 2 + 1;
    assert_eq!(bands[0].dims(), [BATCH, count, WIDTH]);
    let (flat, low) = (values(&x), values(&bands[0]));
    for m in 0..count {
        let expected: f64 = (0..taps)
            .map(|t| {
                let place = (2 * m + t) as i64 - reach as i64;
                let place = place.abs();
                let place = place.min(2 * (length as i64 - 1) - place) as usize;
                lo[t] * flat[place * WIDTH]
            })
            .sum();
        assert!((low[m * WIDTH] - expected).abs() < 1e-12);
    }
    let back = subject.back(&x);
    let inside = |x: &Tensor| x.narrow(1, taps, length - 2 * taps).unwrap();
    assert_near(&inside(&back), &inside(&x), 1e-10, "inside");
    // Odd lengths, and shorter than the filter.
    for length in [1, 2, 5, 9] {
        let back = subject.back(&tokens(length));
        assert_eq!(back.dims(), [BATCH, length, WIDTH]);
        assert!(values(&back).iter().all(|x| x.is_finite()));
    }
}
