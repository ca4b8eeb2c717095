//! Wavelet space attention: the transforms and what is mixed between them.
#![allow(clippy::panic, clippy::unwrap_used)]

use crate::common::{Map, assert_near, build, difference, draw, random, values};
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_parts::attention::mechanism::kernelized::KernelizedSpec;
use lapidary_parts::attention::mechanism::linformer::LinformerSpec;
use lapidary_parts::attention::mechanism::lion::LionSpec;
use lapidary_parts::attention::wavelet::filters::{coiflet, daubechies, symlet};
use lapidary_parts::attention::wavelet::{
    Base, Boundary, Convolution, Family, Wavelet, WaveletSpec,
};
use lapidary_parts::attention::{MechanismSpec, Mixer, MixerSpec, MultiHeadSpec};
use lapidary_parts::recurrent::MambaSpec;
use lapidary_parts::state::MixerState;
use lapidary_parts::{Context, Result};
use lapidary_signal::meter::Meter;
use lapidary_signal::{Signal, Trace};

const WIDTH: usize = 4;
const BATCH: usize = 2;

fn inner() -> MixerSpec {
    MixerSpec::MultiHead(MultiHeadSpec::new(2))
}

fn spec(family: Family, levels: usize, taps: usize) -> WaveletSpec {
    WaveletSpec {
        family,
        levels,
        taps,
        ..WaveletSpec::new(inner())
    }
}

struct Subject {
    spec: WaveletSpec,
    map: Map,
}

impl Subject {
    fn new(spec: WaveletSpec) -> Self {
        spec.validate(WIDTH, "attention").unwrap();
        let map = draw(7, |p| Wavelet::new(&spec, WIDTH, p));
        Self { spec, map }
    }

    fn module(&self) -> Wavelet {
        build(&self.map, |p| Wavelet::new(&self.spec, WIDTH, p)).unwrap()
    }

    fn coefficients(&self, x: &Tensor) -> Vec<Tensor> {
        let found = self.module().analyse(&Signal::from(x.clone())).unwrap();
        found.bands.into_iter().map(Signal::into_value).collect()
    }

    fn back(&self, x: &Tensor) -> Tensor {
        let module = self.module();
        let coefficients = module.analyse(&Signal::from(x.clone())).unwrap();
        module.synthesise(&coefficients).unwrap().into_value()
    }

    fn run(&self, x: &Tensor, keep: Option<&Tensor>) -> Tensor {
        let trace = Trace::new();
        let cx = Context {
            key_padding: keep,
            ..Context::new(&trace)
        };
        let y = self.module().forward(&Signal::from(x.clone()), &cx, false);
        y.unwrap().into_value()
    }

    /// Heads that pass values on: every value projection one, every output too.
    fn with_identity_values(mut self) -> Self {
        for (name, tensor) in &mut self.map {
            let is = |part: &str| name.contains(part);
            if is("value.weight") || is("output.weight") {
                *tensor = Tensor::eye(WIDTH, DType::F64, &Device::Cpu).unwrap();
            } else if is("value.bias") || is("output.bias") {
                *tensor = tensor.zeros_like().unwrap();
            }
        }
        self
    }
}

fn tokens(length: usize) -> Tensor {
    random(&[BATCH, length, WIDTH], 1)
}

fn squares(x: &Tensor) -> f64 {
    values(x).iter().map(|x| x * x).sum()
}

#[test]
fn daubechies_filters_have_their_moments() {
    // Four taps by hand.
    let root = 3f64.sqrt();
    let hand = [1.0 + root, 3.0 + root, 3.0 - root, 1.0 - root].map(|x| x / (4.0 * 2f64.sqrt()));
    for (found, expected) in daubechies(4).iter().zip(hand) {
        assert!((found - expected).abs() < 1e-14);
    }
    for taps in (2..=40).step_by(2) {
        for (filter, moments) in [(daubechies(taps), taps / 2), (symlet(taps), taps / 2)] {
            check(&filter, taps, moments);
        }
    }
    for order in 1..=5 {
        check(&coiflet(order).unwrap(), 6 * order, 2 * order);
    }
    assert_eq!(coiflet(0), None);
    assert_eq!(coiflet(6), None);
}

/// `Σ lo = √2`, orthonormal to its shifts by two, and `Σ (−1)^t t^m lo_t = 0`.
fn check(filter: &[f64], taps: usize, moments: usize) {
    assert_eq!(filter.len(), taps);
    let sum: f64 = filter.iter().sum();
    assert!((sum - 2f64.sqrt()).abs() < 1e-13, "{taps} taps: {sum}");
    for shift in 0..taps / 2 {
        let product: f64 = filter
            .iter()
            .zip(&filter[2 * shift..])
            .map(|(a, b)| a * b)
            .sum();
        let expected = f64::from(u8::from(shift == 0));
        assert!(
            (product - expected).abs() < 1e-10,
            "{taps} taps, shift {shift}: {product}"
        );
    }
    for moment in 0..moments {
        let terms = filter.iter().enumerate().map(|(t, tap)| {
            let sign = if t % 2 == 0 { 1.0 } else { -1.0 };
            sign * (t as f64 / taps as f64).powi(moment as i32) * tap
        });
        let sum: f64 = terms.sum();
        assert!(sum.abs() < 1e-9, "{taps} taps, moment {moment}: {sum:e}");
    }
}

/// Moments of scaling functions about their centre, `Σ ((t − 2K) / taps)^m lo_t = 0` for `0 < m < 2K`, beside
/// those of wavelets that [`check`] asks for; what has them and is nearly symmetric is what tables
/// have, of which the first and largest taps of each are given here.
#[test]
fn coiflets_have_moments_of_both_functions() {
    let root = 7f64.sqrt();
    let hand = [
        1.0 - root,
        5.0 + root,
        14.0 + 2.0 * root,
        14.0 - 2.0 * root,
        1.0 - root,
        -3.0 + root,
    ];
    for (found, expected) in coiflet(1).unwrap().iter().zip(hand) {
        assert!((found - expected / (16.0 * 2f64.sqrt())).abs() < 1e-14);
    }
    let tables = [
        (-0.072_732_619_5, 0.852_572_020_2),
        (0.016_387_336_5, 0.812_723_635_4),
        (-0.003_793_512_9, 0.793_777_222_6),
        (0.000_892_313_9, 0.782_238_934_4),
        (-0.000_212_081_9, 0.774_293_622_9),
    ];
    for (order, (first, largest)) in (1..).zip(tables) {
        let filter = coiflet(order).unwrap();
        let length = filter.len() as f64;
        for moment in 1..2 * order {
            let each = filter.iter().enumerate().map(|(t, tap)| {
                tap * ((t as f64 - 2.0 * order as f64) / length).powi(moment as i32)
            });
            let sum: f64 = each.sum();
            assert!(sum.abs() < 1e-14, "order {order}, moment {moment}: {sum:e}");
        }
        assert!((filter[0] - first).abs() < 1e-7, "{filter:?}");
        assert!((filter[2 * order] - largest).abs() < 1e-7, "{filter:?}");
    }
}

#[test]
fn symlets_are_more_symmetric_than_daubechies() {
    // How much of a filter is even about the best centre.
    let symmetry = |filter: &[f64]| {
        let about = |sum: usize| -> f64 {
            let places = sum.saturating_sub(filter.len() - 1)..=sum.min(filter.len() - 1);
            places.map(|t| filter[t] * filter[sum - t]).sum()
        };
        (0..2 * filter.len() - 1).map(about).fold(0.0, f64::max)
    };
    for taps in [8, 12, 16, 20] {
        assert!(symmetry(&symlet(taps)) > 0.94, "{taps} taps");
        assert!(symmetry(&daubechies(taps)) < 0.9, "{taps} taps");
    }
    // Up to six taps there is no choice but the mirror image.
    assert_eq!(symlet(4), daubechies(4));
}

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

/// Every line of the matrix of one channel: what analysis makes of unit vectors, `[numbers, length]`.
fn matrix(subject: &Subject, length: usize, channel: usize) -> Vec<Vec<f64>> {
    let mut columns = Vec::new();
    for place in 0..length {
        let mut unit = vec![0.0; length * WIDTH];
        unit[place * WIDTH + channel] = 1.0;
        let unit = Tensor::from_vec(unit, (1, length, WIDTH), &Device::Cpu).unwrap();
        let mut column = Vec::new();
        for band in subject.coefficients(&unit) {
            let band = values(&band);
            column.extend(band.iter().skip(channel).step_by(WIDTH));
            // No channel hears of another.
            let others = band
                .iter()
                .enumerate()
                .filter(|(at, _)| at % WIDTH != channel);
            assert!(others.into_iter().all(|(_, x)| *x == 0.0));
        }
        columns.push(column);
    }
    (0..columns[0].len())
        .map(|line| columns.iter().map(|column| column[line]).collect())
        .collect()
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
        let subject = Subject::new(spec(family, 2, 6));
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
fn without_levels_it_is_the_inner_mixer() {
    let subject = Subject::new(spec(Family::Fixed, 0, 8));
    let x = tokens(7);
    let keep = Tensor::from_vec(
        [[1u8, 1, 1, 1, 1, 0, 0], [1; 7]].concat(),
        (BATCH, 7),
        &Device::Cpu,
    )
    .unwrap();
    for keep in [None, Some(&keep)] {
        let mixer = build(&subject.map, |mut p| {
            let mut bands = p.at("bands");
            Mixer::new(&inner(), WIDTH, bands.at(0))
        });
        let trace = Trace::new();
        let cx = Context {
            key_padding: keep,
            ..Context::new(&trace)
        };
        let mixer = mixer.unwrap().unwrap();
        let alone = mixer.forward(&Signal::from(x.clone()), &cx, None).unwrap();
        assert_near(&subject.run(&x, keep), alone.value(), 1e-14, "inner mixer");
    }
}

/// Each band has a mixer of its own, of any bidirectional kind: what it makes of the coefficients is what
/// comes out transformed back.
#[test]
fn bands_are_mixed_by_any_attention() {
    let through = |mechanism| MultiHeadSpec {
        mechanism,
        ..MultiHeadSpec::new(2)
    };
    let inners = [
        MultiHeadSpec::new(2),
        MultiHeadSpec {
            window: Some(3),
            ..MultiHeadSpec::new(2)
        },
        through(MechanismSpec::Linformer(LinformerSpec::new(3, 8))),
        through(MechanismSpec::Lion(LionSpec::default())),
        through(MechanismSpec::Kernelized(KernelizedSpec::default())),
    ];
    for inner in inners {
        let inner = MixerSpec::MultiHead(inner);
        let subject = Subject::new(WaveletSpec {
            inner: Box::new(inner.clone()),
            ..spec(Family::Orthogonal, 2, 6)
        });
        let x = Signal::from(tokens(16));
        let module = subject.module();
        let mut coefficients = module.analyse(&x).unwrap();
        let trace = Trace::new();
        for (index, band) in coefficients.bands.iter_mut().enumerate() {
            let mixer = build(&subject.map, |mut p| {
                let mut bands = p.at("bands");
                Mixer::new(&inner, WIDTH, bands.at(index))
            });
            let mixer = mixer.unwrap().unwrap();
            *band = mixer.forward(band, &Context::new(&trace), None).unwrap();
        }
        let expected = module.synthesise(&coefficients).unwrap();
        assert_near(
            &subject.run(x.value(), None),
            expected.value(),
            1e-14,
            "bands",
        );
    }
}

/// Attention that sees itself alone passes everything on.
#[test]
fn with_identities_in_its_bands_it_is_the_identity() {
    let alone = MixerSpec::MultiHead(MultiHeadSpec {
        window: Some(1),
        ..MultiHeadSpec::new(2)
    });
    let families = [
        (Family::Fixed, true),
        (Family::Orthogonal, true),
        (Family::Lifting, true),
        (Family::AdaptiveLifting, true),
        (Family::Fourier, true),
        (Family::Adaptive, false),
    ];
    for (family, exactly) in families {
        let levels = if family == Family::Fourier { 1 } else { 2 };
        let spec = WaveletSpec {
            inner: Box::new(alone.clone()),
            ..spec(family, levels, 8)
        };
        let subject = Subject::new(spec).with_identity_values();
        for length in [16, 13] {
            let x = tokens(length);
            let found = difference(&subject.run(&x, None), &x);
            assert_eq!(found < 1e-10, exactly, "{family:?}: {found:e}");
        }
    }
}

/// With queries of zero attention is a fixed matrix `M_b` in each band: `y = Wᵀ · blockdiag(M_b) · W · x`.
#[test]
fn fixed_matrices_in_bands_are_one_dense_matrix() {
    for (family, levels) in [(Family::Fixed, 2), (Family::Orthogonal, 3)] {
        let windowed = MixerSpec::MultiHead(MultiHeadSpec {
            window: Some(2),
            ..MultiHeadSpec::new(2)
        });
        let spec = WaveletSpec {
            inner: Box::new(windowed),
            ..spec(family, levels, 8)
        };
        let mut subject = Subject::new(spec).with_identity_values();
        for (name, tensor) in &mut subject.map {
            if name.contains("query") {
                *tensor = tensor.zeros_like().unwrap();
            }
        }
        let length = 16;
        let x = tokens(length);
        let y = values(&subject.run(&x, None));
        let bands: Vec<usize> = subject
            .coefficients(&x)
            .iter()
            .map(|b| b.dims()[1])
            .collect();
        let x = values(&x);
        for channel in 0..WIDTH {
            let w = matrix(&subject, length, channel);
            for sequence in 0..BATCH {
                let at =
                    |values: &[f64], t: usize| values[(sequence * length + t) * WIDTH + channel];
                let c: Vec<f64> = w
                    .iter()
                    .map(|line| (0..length).map(|t| line[t] * at(&x, t)).sum())
                    .collect();
                let mut mixed = Vec::new();
                let mut first = 0;
                for &count in &bands {
                    for i in 0..count {
                        let (from, to) = (i.saturating_sub(1), (i + 1).min(count - 1));
                        let sum: f64 = (from..=to).map(|j| c[first + j]).sum();
                        mixed.push(sum / (to - from + 1) as f64);
                    }
                    first += count;
                }
                for t in 0..length {
                    let lines = w.iter().zip(&mixed);
                    let expected: f64 = lines.map(|(line, mixed)| line[t] * mixed).sum();
                    assert!((at(&y, t) - expected).abs() < 1e-10, "{family:?}");
                }
            }
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

/// Pads are zeroed, but coefficients that are made of pads and real tokens are mixed with the others: what is
/// padded changes what real tokens get, by the number of coefficients. Within the transform it reaches the
/// filter's length.
#[test]
fn pads_leak_by_zeros_alone() {
    let subject = Subject::new(spec(Family::Fixed, 1, 4));
    let real = tokens(10);
    let junk = random(&[BATCH, 22, WIDTH], 8);
    let other = random(&[BATCH, 22, WIDTH], 9);
    let keep: Vec<u8> = (0..BATCH * 32).map(|at| u8::from(at % 32 < 10)).collect();
    let keep = Tensor::from_vec(keep, (BATCH, 32), &Device::Cpu).unwrap();
    let padded = |junk: &Tensor| {
        let x = Tensor::cat(&[&real, junk], 1).unwrap();
        subject.run(&x, Some(&keep)).narrow(1, 0, 10).unwrap()
    };
    // What stands at pads counts for nothing.
    assert_eq!(difference(&padded(&junk), &padded(&other)), 0.0);
    // That they are there does.
    let leak = difference(&padded(&junk), &subject.run(&real, None));
    assert!(leak > 1e-3, "{leak:e}");
    // Coefficients of real tokens alone are those without pads: all but the last w/2 and the first ones
    // that wrap.
    let zeros = Tensor::cat(&[&real, &junk.zeros_like().unwrap()], 1).unwrap();
    let (with, without) = (subject.coefficients(&zeros), subject.coefficients(&real));
    for (with, without) in with.iter().zip(&without) {
        let inside = |x: &Tensor| x.narrow(1, 0, 5 - 1).unwrap();
        assert_near(
            &inside(with),
            &inside(without),
            1e-14,
            "coefficients of real tokens",
        );
    }
    // With a mask of coefficients those of pads alone are left out.
    let masked = Subject {
        spec: WaveletSpec {
            band_mask: true,
            ..subject.spec.clone()
        },
        map: subject.map.clone(),
    };
    let x = Tensor::cat(&[&real, &junk], 1).unwrap();
    let masked = masked.run(&x, Some(&keep)).narrow(1, 0, 10).unwrap();
    let alone = subject.run(&real, None);
    let nearer = difference(&masked, &alone);
    assert!(nearer < leak, "{nearer:e} with a mask, {leak:e} without");
}

#[test]
fn masks_of_bands_are_of_coefficients_with_a_real_token() {
    let families = [
        (Family::Orthogonal, Boundary::Periodised, 6),
        (Family::Orthogonal, Boundary::Reflect, 6),
        (Family::Lifting, Boundary::Periodised, 8),
        (Family::AdaptiveLifting, Boundary::Periodised, 3),
    ];
    for (family, boundary, taps) in families {
        let subject = Subject::new(WaveletSpec {
            band_mask: true,
            boundary,
            ..spec(family, 2, taps)
        });
        let length = 40;
        let keep: Vec<u8> = (0..length)
            .map(|t| u8::from((10..13).contains(&t)))
            .collect();
        let real = tokens(length).narrow(0, 0, 1).unwrap();
        let mask = Tensor::from_vec(keep, (1, length), &Device::Cpu).unwrap();
        // A mixer that gives masked coefficients' neighbours nothing: compare what is touched with what
        // is not zero.
        let zeroed = real
            .broadcast_mul(&mask.to_dtype(DType::F64).unwrap().unsqueeze(2).unwrap())
            .unwrap();
        let trace = Trace::new().capture("bands.*.in").unwrap();
        let cx = Context {
            key_padding: Some(&mask),
            ..Context::new(&trace)
        };
        let y = subject
            .module()
            .forward(&Signal::from(real), &cx, false)
            .unwrap();
        assert!(values(y.value()).iter().all(|x| x.is_finite()));
        for (band, found) in subject.coefficients(&zeroed).iter().enumerate() {
            let seen = trace.signal(&format!("bands.{band}.in")).unwrap();
            assert_near(seen.value(), found, 1e-14, "pads are zeroed first");
        }
    }
}

#[test]
fn what_does_not_fit_is_refused() {
    let refused = |change: &dyn Fn(&mut WaveletSpec), expected: &str| {
        let mut spec = spec(Family::Fixed, 1, 8);
        change(&mut spec);
        let spec = MixerSpec::Wavelet(spec);
        let said = spec.validate(WIDTH, "attention").unwrap_err().to_string();
        assert!(said.starts_with(expected), "{said}");
    };
    refused(
        &|spec| {
            *spec.inner = MixerSpec::MultiHead(MultiHeadSpec {
                causal: true,
                ..MultiHeadSpec::new(2)
            });
        },
        "attention.inner.causal is true, but must be false: every coefficient is made of later",
    );
    refused(
        &|spec| *spec.inner = MixerSpec::Mamba(MambaSpec::default()),
        "attention.inner.kind",
    );
    refused(
        &|spec| *spec.inner = MixerSpec::Absent,
        "attention.inner.kind is \"absent\"",
    );
    refused(
        &|spec| *spec.inner = MixerSpec::Wavelet(WaveletSpec::new(inner())),
        "attention.inner.kind is \"wavelet\"",
    );
    refused(
        &|spec| *spec.inner = MixerSpec::MultiHead(MultiHeadSpec::new(3)),
        "attention.inner.heads is 3",
    );
    refused(&|spec| spec.levels = 11, "attention.levels is 11");
    refused(&|spec| spec.taps = 7, "attention.taps is 7");
    refused(&|spec| spec.taps = 0, "attention.taps is 0");
    refused(&|spec| spec.base = Base::Coiflet, "attention.taps is 8");
    refused(&|spec| spec.base = Base::Normal, "attention.base is Normal");
    refused(
        &|spec| {
            spec.family = Family::Lifting;
            spec.boundary = Boundary::Reflect;
        },
        "attention.boundary is Reflect",
    );
    refused(
        &|spec| {
            spec.family = Family::Fourier;
            spec.levels = 2;
        },
        "attention.levels is 2",
    );
    assert!(!MixerSpec::Wavelet(spec(Family::Fixed, 1, 8)).is_causal());
    // Nor is it decoded with.
    let map = draw(1, |p| {
        Mixer::new(&MixerSpec::Wavelet(spec(Family::Fixed, 1, 8)), WIDTH, p)
    });
    let mixer: Result<Option<Mixer>> = build(&map, |p| {
        Mixer::new(&MixerSpec::Wavelet(spec(Family::Fixed, 1, 8)), WIDTH, p)
    });
    let trace = Trace::new();
    let mut state = MixerState::Empty;
    let x = Signal::from(tokens(4));
    let said = mixer
        .unwrap()
        .unwrap()
        .forward(&x, &Context::new(&trace), Some(&mut state));
    assert!(said.unwrap_err().to_string().starts_with("decode state"));
}

/// Two bands of half the length have half of the pairs, and the transform itself is linear.
#[test]
fn one_level_halves_the_pairs() {
    let metered = |spec: &MixerSpec, length: usize| {
        let map = draw(1, |p| Mixer::new(spec, WIDTH, p));
        let mixer = build(&map, |p| Mixer::new(spec, WIDTH, p))
            .unwrap()
            .unwrap();
        let meter = Meter::new();
        let x = Signal::from(random(&[1, length, WIDTH], 3)).into_metered(meter.clone());
        let trace = Trace::new();
        mixer.forward(&x, &Context::new(&trace), None).unwrap();
        let sites = meter.sites();
        let pairs = sites
            .iter()
            .filter(|(site, _)| site.ends_with(".mixed") || *site == "mixed");
        let pairs: u64 = pairs.map(|(_, cost)| cost.flops).sum();
        (pairs, meter.total().flops)
    };
    let wavelet = MixerSpec::Wavelet(spec(Family::Adaptive, 1, 8));
    let (dense, _) = metered(&inner(), 64);
    let (halved, _) = metered(&wavelet, 64);
    assert_eq!(2 * halved, dense);
    let rest = |length: usize| {
        let (pairs, all) = metered(&wavelet, length);
        (all - pairs) as f64
    };
    let exponent = (rest(4096) / rest(1024)).ln() / 4f64.ln();
    assert!((exponent - 1.0).abs() < 0.05, "{exponent}");
}
