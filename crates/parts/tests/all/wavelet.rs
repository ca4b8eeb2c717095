//! Wavelet space attention: the transforms and what is mixed between them.
#![allow(clippy::panic, clippy::unwrap_used)]

mod definitions;
mod filters;
mod transforms;

use crate::common::{Map, assert_near, build, difference, draw, random, values};
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_parts::attention::mechanism::kernelized::KernelizedSpec;
use lapidary_parts::attention::mechanism::linformer::LinformerSpec;
use lapidary_parts::attention::mechanism::lion::LionSpec;
use lapidary_parts::attention::wavelet::{Base, Boundary, Family, Wavelet, WaveletSpec};
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

/// What fills a sequence up to a whole number of coefficients is masked as pads are: a sequence without pads is the same
/// alone and beside one with pads.
#[test]
fn what_fills_the_length_is_no_token() {
    for (family, taps) in [(Family::Lifting, 8), (Family::Orthogonal, 4)] {
        let subject = Subject::new(WaveletSpec {
            band_mask: true,
            ..spec(family, 3, taps)
        });
        let x = tokens(17);
        let keep = [[1u8; 17], std::array::from_fn(|t| u8::from(t < 9))].concat();
        let keep = Tensor::from_vec(keep, (BATCH, 17), &Device::Cpu).unwrap();
        let [alone, beside] =
            [None, Some(&keep)].map(|keep| subject.run(&x, keep).narrow(0, 0, 1).unwrap());
        assert_near(&alone, &beside, 1e-12, &format!("{family:?}"));
        // And it was not masked for nothing.
        let open = Subject::new(WaveletSpec {
            band_mask: false,
            ..subject.spec.clone()
        });
        let open = open.run(&x, None).narrow(0, 0, 1).unwrap();
        assert!(difference(&alone, &open) > 1e-6, "{family:?}");
    }
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
        // Keys that are masked have no weight: those are the coefficients that pads, being zero, leave zero.
        let zeroed = real
            .broadcast_mul(&mask.to_dtype(DType::F64).unwrap().unsqueeze(2).unwrap())
            .unwrap();
        let trace = Trace::new().capture("bands.*.{in,weights}").unwrap();
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
            let weights = trace.signal(&format!("bands.{band}.weights")).unwrap();
            let weights = values(weights.value());
            let coefficients = values(found);
            let count = coefficients.len() / WIDTH;
            for (key, coefficient) in coefficients.chunks(WIDTH).enumerate() {
                let is_read = weights.iter().skip(key).step_by(count).any(|w| *w > 0.0);
                let is_made = coefficient.iter().any(|x| *x != 0.0);
                assert_eq!(is_read, is_made, "{family:?} {boundary:?} {band}, {key}");
            }
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
    // Without levels nothing is transformed, whatever the transform would be.
    let without_levels = |change: &dyn Fn(&mut WaveletSpec), field: &str| {
        let none = |spec: &mut WaveletSpec| {
            spec.levels = 0;
            change(spec);
        };
        refused(
            &none,
            &format!("attention.{field} is \"given\", but must be absent where levels is 0"),
        );
    };
    without_levels(&|spec| spec.family = Family::Lifting, "family");
    without_levels(&|spec| spec.base = Base::Symlet, "base");
    without_levels(&|spec| spec.taps = 4, "taps");
    without_levels(&|spec| spec.boundary = Boundary::Reflect, "boundary");
    without_levels(&|spec| spec.band_mask = true, "band_mask");
    refused(&|spec| spec.taps = 7, "attention.taps is 7");
    refused(&|spec| spec.taps = 0, "attention.taps is 0");
    refused(&|spec| spec.base = Base::Coiflet, "attention.taps is 8");
    refused(
        &|spec| spec.base = Base::Normal,
        "attention.base is \"normal\"",
    );
    refused(
        &|spec| {
            spec.family = Family::Lifting;
            spec.boundary = Boundary::Reflect;
        },
        "attention.boundary is \"reflect\"",
    );
    refused(
        &|spec| {
            spec.family = Family::Fourier;
            spec.levels = 2;
        },
        "attention.levels is 2",
    );
    refused(
        &|spec| {
            spec.family = Family::Fourier;
            spec.band_mask = true;
        },
        "attention.band_mask is true",
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
