//! Kernelized attention: the kernels that its features stand for, and the attention they give.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use crate::common::attention::dot;
use crate::common::{Map, assert_near, build, difference, draw, heads, random, tensor, values};
use lapidary_kernels::{Device, Tensor};
use lapidary_parts::Context;
use lapidary_parts::attention::mechanism::kernelized::{
    FeatureMap, KernelizedSpec, Learned, ReadOut, Redraw, SpectrumSpec, hadamard,
};
use lapidary_parts::attention::mechanism::{Describe, Heads, MechanismPass, Resumed};
use lapidary_parts::state::MixerState;
use lapidary_signal::{Mixing, Trace};

const FOURIER: ReadOut = ReadOut::Fourier { smoothing: 0.7 };
const POSITIVE: ReadOut = ReadOut::Positive { stabilise: false };
const MIXTURE: SpectrumSpec = SpectrumSpec::Mixture { components: None };

fn spec(spectrum: SpectrumSpec, features: ReadOut) -> KernelizedSpec {
    KernelizedSpec {
        spectrum,
        features,
        seed: 3,
        ..KernelizedSpec::default()
    }
}

fn every() -> Vec<KernelizedSpec> {
    let spectra = [
        SpectrumSpec::Gaussian,
        MIXTURE,
        SpectrumSpec::Mixture {
            components: Some(3),
        },
        SpectrumSpec::Fastfood {
            learned: Learned::None,
        },
        SpectrumSpec::Fastfood {
            learned: Learned::Scaling,
        },
        SpectrumSpec::Fastfood {
            learned: Learned::All,
        },
        SpectrumSpec::Generator,
    ];
    let read_outs = [FOURIER, POSITIVE, ReadOut::Positive { stabilise: true }];
    spectra
        .into_iter()
        .flat_map(|spectrum| read_outs.map(|features| spec(spectrum.clone(), features)))
        .collect()
}

fn parameters(spec: &KernelizedSpec, width: usize) -> Map {
    draw(7, |p| spec.build(&heads(2, width, false), p).map(|_| ()))
}

fn feature_map(spec: &KernelizedSpec, width: usize, map: &Map) -> FeatureMap {
    build(map, |p| spec.feature_map(&heads(2, width, false), p)).unwrap()
}

fn mixing_of(
    spec: &KernelizedSpec,
    causal: bool,
    map: &Map,
    [q, k]: [&Tensor; 2],
    draw: Option<u64>,
) -> Box<dyn Mixing> {
    let heads = heads(2, q.dim(3).unwrap(), causal);
    spec.validate(&heads, "m").unwrap();
    let module = build(map, |p| spec.build(&heads, p)).unwrap();
    let trace = Trace::new();
    let context = Context {
        draw,
        ..Context::new(&trace)
    };
    let pass = MechanismPass {
        path: "m",
        tokens: q,
        keep: None,
        offset: 0,
        context: &context,
    };
    module.mixing(q, k, &pass).unwrap()
}

fn mixing(spec: &KernelizedSpec, map: &Map, q: &Tensor, k: &Tensor) -> Box<dyn Mixing> {
    mixing_of(spec, false, map, [q, k], None)
}

/// The mean of some numbers and the deviation of that mean.
fn estimate(terms: &[f64]) -> (f64, f64) {
    let count = terms.len() as f64;
    let mean = terms.iter().sum::<f64>() / count;
    let squares: f64 = terms.iter().map(|t| (t - mean).powi(2)).sum();
    (mean, (squares / (count - 1.0) / count).sqrt())
}

/// What each frequency of a head says of `φ(x) · φ(y)`, the smoothing left out.
fn terms(map: &FeatureMap, fourier: bool, [x, y]: [&[f64]; 2], count: usize) -> Vec<Vec<f64>> {
    let width = x.len();
    let both = tensor([x, y, x, y].concat(), &[1, 2, 2, width]);
    let features = map.features(&both, 11).unwrap();
    let each = features.dim(3).unwrap();
    let rows: Vec<Vec<f64>> = values(&features)
        .chunks(each)
        .map(<[f64]>::to_vec)
        .collect();
    rows.chunks(2)
        .map(|pair| {
            let product = |at: usize| pair[0][at] * pair[1][at] * count as f64;
            match fourier {
                false => (0..count).map(product).collect(),
                // A draw is used with plus and minus the mean: their average is one sample.
                true => (0..count / 2)
                    .map(|l| {
                        let of = |l: usize| product(l) + product(count + l);
                        (of(l) + of(count / 2 + l)) / 2.0
                    })
                    .collect(),
            }
        })
        .collect()
}

const X: [f64; 3] = [0.4, -0.3, 0.2];
const Y: [f64; 3] = [-0.1, 0.5, 0.3];
const MANY: usize = 1 << 14;

#[test]
fn cosines_estimate_the_characteristic_function_of_the_mixture() {
    let spec = KernelizedSpec {
        count: Some(MANY),
        ..spec(MIXTURE, FOURIER)
    };
    let map = parameters(&spec, 3);
    let features = feature_map(&spec, 3, &map);
    let delta: Vec<f64> = X.iter().zip(&Y).map(|(x, y)| x - y).collect();
    let (means, factors) = (values(&map["means"]), values(&map["factors"]));
    for (head, terms) in terms(&features, true, [&X, &Y], MANY).iter().enumerate() {
        let mean = &means[head * 3..][..3];
        // ω = Sᵀ n + μ, so that Σ = Sᵀ S and δᵀ Σ δ = ‖S δ‖².
        let turned: Vec<f64> = (0..3)
            .map(|row| {
                let own = factors[head * 9 + row * 3..][..3].iter().enumerate();
                let entries = own.map(|(c, f)| f + f64::from(u8::from(c == row)));
                dot(&entries.collect::<Vec<_>>(), &delta)
            })
            .collect();
        let expected = (-0.5 * dot(&turned, &turned)).exp() * dot(mean, &delta).cos();
        let (found, deviation) = estimate(terms);
        assert!(
            (found - expected).abs() < 3.0 * deviation,
            "{found} {expected}"
        );
        assert!(deviation < 0.01);
    }
}

#[test]
fn exponentials_estimate_the_kernel_of_the_mixture() {
    let spec = KernelizedSpec {
        count: Some(MANY),
        ..spec(MIXTURE, POSITIVE)
    };
    let map = parameters(&spec, 3);
    let features = feature_map(&spec, 3, &map);
    let sum: Vec<f64> = X.iter().zip(&Y).map(|(x, y)| x + y).collect();
    for (head, terms) in terms(&features, false, [&X, &Y], MANY).iter().enumerate() {
        let mean = &values(&map["means"])[head * 3..][..3];
        let logs = &values(&map["log_variances"])[head * 3..][..3];
        let spread: f64 = logs.iter().zip(&sum).map(|(s, x)| s.exp() * x * x).sum();
        let exponent = -dot(&X, &X) - dot(&Y, &Y) + dot(mean, &sum) + 0.5 * spread;
        let (found, deviation) = estimate(terms);
        assert!((found - exponent.exp()).abs() < 3.0 * deviation);
        assert!(deviation < 0.02);
    }
}

#[test]
fn standard_normal_frequencies_give_the_radial_kernel() {
    let delta: Vec<f64> = X.iter().zip(&Y).map(|(x, y)| x - y).collect();
    let expected = (-0.5 * dot(&delta, &delta)).exp();
    for (fourier, read_out) in [(true, FOURIER), (false, POSITIVE)] {
        for spectrum in [SpectrumSpec::Gaussian, MIXTURE] {
            let spec = KernelizedSpec {
                count: Some(MANY),
                ..spec(spectrum, read_out)
            };
            let mut map = parameters(&spec, 3);
            for tensor in map.values_mut() {
                *tensor = tensor.zeros_like().unwrap();
            }
            let features = feature_map(&spec, 3, &map);
            for terms in terms(&features, fourier, [&X, &Y], MANY) {
                let (found, deviation) = estimate(&terms);
                assert!((found - expected).abs() < 3.0 * deviation, "{found}");
            }
        }
    }
}

/// The kernel matrix of the same features, its rows divided by their sums, mixes the same.
#[test]
fn linear_sums_equal_the_kernel_matrix() {
    let (q, k) = (random(&[2, 2, 7, 4], 1), random(&[2, 2, 9, 4], 2));
    let v = random(&[2, 2, 9, 3], 3);
    for spec in every() {
        let map = parameters(&spec, 4);
        let y = mixing(&spec, &map, &q, &k).mix(&v).unwrap();
        let features = feature_map(&spec, 4, &map);
        let root = 0.5f64.sqrt();
        // The seed of the module at its path, by way of the same function's other users: the draw
        // is whatever makes one head of one query agree, so it is found through the weights.
        let seed = seed_of("m", 3);
        let of = |x: &Tensor| features.features(&(x * root).unwrap(), seed).unwrap();
        let kernel = of(&q).matmul(&of(&k).transpose(2, 3).unwrap().contiguous().unwrap());
        let kernel = kernel.unwrap();
        let sums = (kernel.sum_keepdim(3).unwrap() + 1e-6).unwrap();
        let rows = kernel.broadcast_div(&sums).unwrap();
        let components = rows.dim(1).unwrap() / 2;
        let rows = rows.reshape((2, 2, components, 7 * 9)).unwrap();
        let shares = match map.get("weights") {
            None => Tensor::ones((2, components), rows.dtype(), &Device::Cpu).unwrap(),
            Some(logits) => lapidary_kernels::softmax(logits, &Default::default()).unwrap(),
        };
        let shares = shares.reshape((1, 2, components, 1)).unwrap();
        let rows = rows.broadcast_mul(&shares).unwrap().sum(2).unwrap();
        let rows = rows.reshape((2, 2, 7, 9)).unwrap();
        let stable = spec.features == ReadOut::Positive { stabilise: true };
        // Stabilised sums are larger beside the constant in the denominator.
        let tolerance = if stable { 1e-4 } else { 1e-11 };
        let what = format!("{spec:?}");
        assert_near(&y, &rows.matmul(&v).unwrap(), tolerance, &what);
        let weights = mixing(&spec, &map, &q, &k).weights(&v).unwrap();
        assert_near(&weights, &rows, tolerance, &what);
        for sum in values(&weights.sum(3).unwrap()) {
            assert!((sum - 1.0).abs() < 1e-3, "{what}: {sum}");
        }
    }
}

/// FNV-1a of a seed and a path, as dropout's.
fn seed_of(path: &str, seed: u64) -> u64 {
    let bytes = seed.to_le_bytes().into_iter().chain(path.bytes());
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[test]
fn cosines_know_differences_alone_and_exponentials_do_not() {
    let (q, k) = (random(&[1, 2, 6, 4], 1), random(&[1, 2, 6, 4], 2));
    let shift = random(&[1, 1, 1, 4], 5);
    let moved = |x: &Tensor| x.broadcast_add(&shift).unwrap();
    for spec in every() {
        let map = parameters(&spec, 4);
        let weights = |q: &Tensor, k: &Tensor| mixing(&spec, &map, q, k).weights(q).unwrap();
        let change = difference(&weights(&q, &k), &weights(&moved(&q), &moved(&k)));
        match spec.features {
            ReadOut::Fourier { .. } => assert!(change < 1e-12, "{spec:?}: {change}"),
            ReadOut::Positive { .. } => assert!(change > 1e-3, "{spec:?}: {change}"),
        }
    }
}

#[test]
fn the_hadamard_transform_is_its_matrix_and_its_own_inverse() {
    for width in [1usize, 2, 8, 64] {
        let x = random(&[3, width], 1);
        let matrix: Vec<f64> = (0..width * width)
            .map(|at| match ((at / width) & (at % width)).count_ones() % 2 {
                0 => 1.0,
                _ => -1.0,
            })
            .collect();
        let expected = x.matmul(&tensor(matrix, &[width, width])).unwrap();
        let y = hadamard(&x).unwrap();
        assert_near(&y, &expected, 1e-12, "its matrix");
        let twice = (hadamard(&y).unwrap() / width as f64).unwrap();
        assert_near(&twice, &x, 1e-12, "H H = d I");
    }
    assert!(hadamard(&random(&[2, 6], 1)).is_err());
}

/// `V` of a head, whose columns are what becomes of unit vectors.
fn matrix(features: &FeatureMap, width: usize, seed: u64, head: usize) -> Vec<Vec<f64>> {
    let units = Tensor::eye(width, lapidary_kernels::DType::F64, &Device::Cpu).unwrap();
    let units = units.broadcast_as((1, 2, width, width)).unwrap();
    let columns = features
        .project(&units.contiguous().unwrap(), seed)
        .unwrap();
    let columns = columns.narrow(1, head, 1).unwrap();
    let columns: Vec<Vec<f64>> = values(&columns)
        .chunks(width)
        .map(<[f64]>::to_vec)
        .collect();
    (0..width)
        .map(|row| columns.iter().map(|column| column[row]).collect())
        .collect()
}

/// Undoing `S`, `H`, `G` on the left and `B`, `H` on the right of `V` leaves a permutation.
#[test]
fn fastfood_is_the_product_of_its_factors() {
    let width = 8;
    let spec = spec(
        SpectrumSpec::Fastfood {
            learned: Learned::All,
        },
        FOURIER,
    );
    let map = parameters(&spec, width);
    let features = feature_map(&spec, width, &map);
    let hadamard = |i: usize, j: usize| match (i & j).count_ones() % 2 {
        0 => 1.0,
        _ => -1.0,
    };
    for head in 0..2 {
        let of = |name: &str| values(&map[name])[head * width..][..width].to_vec();
        let (s, g, b) = (of("scaling"), of("gaussian"), of("signs"));
        let v = matrix(&features, width, 9, head);
        // H S⁻¹ V B⁻¹ H = d^{3/2} G Π
        let inner = |i: usize, j: usize| -> f64 {
            (0..width)
                .flat_map(|r| (0..width).map(move |c| (r, c)))
                .map(|(r, c)| hadamard(i, r) * v[r][c] / (s[r] * b[c]) * hadamard(c, j))
                .sum()
        };
        let scale = (width as f64).powf(1.5);
        for (i, g) in g.iter().enumerate() {
            let row: Vec<f64> = (0..width).map(|j| inner(i, j) / (scale * g)).collect();
            let ones = row.iter().filter(|x| (**x - 1.0).abs() < 1e-9).count();
            let zeros = row.iter().filter(|x| x.abs() < 1e-9).count();
            assert_eq!((ones, zeros), (1, width - 1), "{row:?}");
        }
    }
}

/// Squared lengths of rows are chi-squared with `d` degrees of freedom, as those of normal rows.
#[test]
fn drawn_fastfood_has_rows_as_long_as_normal_ones() {
    let width = 16;
    let spec = spec(
        SpectrumSpec::Fastfood {
            learned: Learned::None,
        },
        FOURIER,
    );
    let features = feature_map(&spec, width, &Map::new());
    let squares: Vec<f64> = (0..400)
        .flat_map(|seed| matrix(&features, width, seed, 0))
        .map(|row| row.iter().map(|x| x * x).sum())
        .collect();
    let (mean, deviation) = estimate(&squares);
    assert!((mean - 16.0).abs() < 4.0 * deviation, "{mean}");
    let variance = squares.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / squares.len() as f64;
    assert!((variance / 32.0 - 1.0).abs() < 0.15, "{variance}");
}

#[test]
fn causal_sums_equal_the_masked_kernel_matrix_and_decoding() {
    let (q, k) = (random(&[2, 2, 9, 4], 1), random(&[2, 2, 9, 4], 2));
    let v = random(&[2, 2, 9, 3], 3);
    for spec in every() {
        if spec.features == (ReadOut::Positive { stabilise: true }) {
            continue;
        }
        let map = parameters(&spec, 4);
        let whole = mixing_of(&spec, true, &map, [&q, &k], None)
            .mix(&v)
            .unwrap();
        for t in 0..9 {
            // The last query of a prefix sees all of it.
            let prefix = |x: &Tensor| x.narrow(2, 0, t + 1).unwrap().contiguous().unwrap();
            let query = q.narrow(2, t, 1).unwrap().contiguous().unwrap();
            let expected = mixing(&spec, &map, &query, &prefix(&k))
                .mix(&prefix(&v))
                .unwrap();
            let found = whole.narrow(2, t, 1).unwrap();
            assert_near(&found, &expected, 1e-11, &format!("{spec:?}"));
        }

        let heads = heads(2, 4, true);
        let module = build(&map, |p| spec.build(&heads, p)).unwrap();
        let trace = Trace::new();
        // A pass's own draw is not for decoding, whose state was made with another.
        let context = |draw| Context {
            draw: Some(draw),
            ..Context::new(&trace)
        };
        let mut state = MixerState::Empty;
        for t in 0..9 {
            let one = |x: &Tensor| x.narrow(2, t, 1).unwrap().contiguous().unwrap();
            let (q, k, v) = (one(&q), one(&k), one(&v));
            let context = context(t as u64);
            let pass = MechanismPass {
                path: "m",
                tokens: &q,
                keep: None,
                offset: t,
                context: &context,
            };
            let resumed = module.resume(&q, &k, &v, &mut state, &pass).unwrap();
            let Resumed::Summed { mixing, past } = resumed else {
                panic!("values of earlier tokens are not kept");
            };
            let y = (mixing.mix(&v).unwrap() + past).unwrap();
            assert_near(&y, &one(&whole), 1e-11, &format!("{spec:?}"));
            let MixerState::Sums { sums, .. } = &state else {
                panic!("another state");
            };
            assert_eq!(sums.dim(3).unwrap(), 4);
        }
    }
}

#[test]
fn a_draw_is_its_seed_and_its_variance_falls_with_the_number_of_frequencies() {
    let (q, k) = (random(&[1, 2, 5, 4], 1), random(&[1, 2, 5, 4], 2));
    // Short enough that exponentials are far from heavy-tailed.
    let (q, k) = ((q * 0.3).unwrap(), (k * 0.3).unwrap());
    let v = random(&[1, 2, 5, 3], 3);
    for (spectrum, read_out) in [
        (MIXTURE, FOURIER),
        (MIXTURE, POSITIVE),
        (SpectrumSpec::Generator, FOURIER),
    ] {
        let of = |count: usize, seed: Option<u64>| {
            let spec = KernelizedSpec {
                count: Some(count),
                ..spec(spectrum.clone(), read_out)
            };
            let map = parameters(&spec, 4);
            mixing_of(&spec, false, &map, [&q, &k], seed)
                .mix(&v)
                .unwrap()
        };
        for seed in [None, Some(1)] {
            assert_eq!(difference(&of(64, seed), &of(64, seed)), 0.0);
        }
        assert!(difference(&of(64, Some(1)), &of(64, Some(2))) > 1e-4);
        assert!(difference(&of(64, Some(1)), &of(64, None)) > 1e-4);
        let variance = |count: usize| {
            let draws: Vec<Vec<f64>> = (0..100).map(|s| values(&of(count, Some(s)))).collect();
            let mean = |at: usize| draws.iter().map(|d| d[at]).sum::<f64>() / 100.0;
            let means: Vec<f64> = (0..draws[0].len()).map(mean).collect();
            let off = draws.iter().flat_map(|d| d.iter().zip(&means));
            off.map(|(x, mean)| (x - mean).powi(2)).sum::<f64>()
        };
        let order = (variance(64) / variance(1024)).log2() / 4.0;
        assert!(
            (order - 1.0).abs() < 0.15,
            "{spectrum:?} {read_out:?}: {order}"
        );
    }
}

/// In training a draw lasts a pass, some steps, or for ever; in evaluation it is the spec's own, and
/// decoding has that whatever it is told.
#[test]
fn a_draw_lasts_as_long_as_it_is_said_to() {
    let (q, k) = (random(&[1, 2, 5, 4], 1), random(&[1, 2, 5, 4], 2));
    let v = random(&[1, 2, 5, 3], 3);
    let map = parameters(&spec(MIXTURE, POSITIVE), 4);
    let output = |redraw: Redraw, seed: u64, draw: Option<u64>, step: Option<u64>| {
        let spec = KernelizedSpec {
            redraw,
            seed,
            ..spec(MIXTURE, POSITIVE)
        };
        let heads = heads(2, 4, true);
        spec.validate(&heads, "m").unwrap();
        let module = build(&map, |p| spec.build(&heads, p)).unwrap();
        let trace = Trace::new();
        let context = Context {
            draw,
            step,
            ..Context::new(&trace)
        };
        let pass = MechanismPass {
            path: "m",
            tokens: &q,
            keep: None,
            offset: 0,
            context: &context,
        };
        let mixing = module.mixing(&q, &k, &pass).unwrap();
        let mut state = MixerState::Empty;
        let decoded = module.resume(&q, &k, &v, &mut state, &pass).unwrap();
        let Resumed::Summed { mixing: step, .. } = decoded else {
            panic!("values of earlier tokens are not kept");
        };
        [mixing.mix(&v).unwrap(), step.mix(&v).unwrap()].map(|y| values(&y))
    };
    let three = Redraw::Steps { every: 3 };
    let [frozen, _] = output(Redraw::Pass, 3, None, None);
    for redraw in [Redraw::Pass, three, Redraw::Never] {
        for (draw, step) in [
            (None, None),
            (None, Some(7)),
            (Some(1), None),
            (Some(1), Some(7)),
        ] {
            let [y, decoded] = output(redraw, 3, draw, step);
            // Steps sum in another order than a pass.
            let near = decoded
                .iter()
                .zip(&frozen)
                .all(|(a, b)| (a - b).abs() < 1e-12);
            assert!(near, "{redraw:?}: {decoded:?} {frozen:?}");
            let draws = draw.is_some() && redraw != Redraw::Never;
            assert_eq!(y != frozen, draws, "{redraw:?} {draw:?} {step:?}");
        }
    }
    let drawn = |redraw, draw, step| output(redraw, 3, Some(draw), Some(step))[0].clone();
    // Passes of one step, and of one period.
    assert_ne!(drawn(Redraw::Pass, 1, 0), drawn(Redraw::Pass, 2, 0));
    assert_eq!(drawn(Redraw::Pass, 1, 0), drawn(Redraw::Pass, 1, 9));
    for (draw, step) in [(1, 4), (2, 3), (9, 5)] {
        assert_eq!(drawn(three, draw, step), drawn(three, 1, 3));
    }
    for step in [0, 2, 6, 300] {
        assert_ne!(drawn(three, 1, step), drawn(three, 1, 3));
    }
    // Another seed of the spec is another draw; without steps it is the pass's.
    assert_ne!(output(three, 4, Some(1), Some(3))[0], drawn(three, 1, 3));
    assert_eq!(
        output(three, 3, Some(1), None)[0],
        drawn(Redraw::Pass, 1, 0)
    );
}

/// Far from the origin plain exponentials vanish in every sum; stabilised they keep their ratios.
#[test]
fn stabilised_exponentials_do_not_vanish() {
    let (q, k) = (random(&[1, 2, 5, 4], 1), random(&[1, 2, 5, 4], 2));
    let (q, k) = ((q * 12.0).unwrap(), (k * 12.0).unwrap());
    let sums = |stabilise: bool| {
        let spec = spec(SpectrumSpec::Gaussian, ReadOut::Positive { stabilise });
        let weights = mixing(&spec, &Map::new(), &q, &k).weights(&q).unwrap();
        values(&weights.sum(3).unwrap())
    };
    assert!(sums(false).iter().all(|sum| *sum < 1e-3));
    let largest = sums(true).into_iter().fold(0.0, f64::max);
    assert!(largest > 0.99 && largest <= 1.0);
}

/// The exponents of long keys are far below those of short ones, which count for nothing where they are pads.
#[test]
fn pads_are_no_measure_for_long_keys() {
    let spec = spec(
        SpectrumSpec::Gaussian,
        ReadOut::Positive { stabilise: true },
    );
    // Squared lengths of hundreds of thousands.
    let base = Tensor::full(400.0, (1, 2, 6, 4), &Device::Cpu).unwrap();
    let long = |seed: u64| ((random(&[1, 2, 6, 4], seed) * 0.01).unwrap() + &base).unwrap();
    let short = |x: &Tensor| x.narrow(2, 0, 4).unwrap().contiguous().unwrap();
    let q = long(1);
    let k = Tensor::cat(&[&short(&long(2)), &random(&[1, 2, 2, 4], 3)], 2).unwrap();
    let v = random(&[1, 2, 6, 3], 4);
    let keep = Tensor::from_vec(vec![1u8, 1, 1, 1, 0, 0], (1, 6), &Device::Cpu).unwrap();
    let heads = heads(2, 4, false);
    let module = build(&Map::new(), |p| spec.build(&heads, p)).unwrap();
    let trace = Trace::new();
    let context = Context::new(&trace);
    let pass = MechanismPass {
        path: "m",
        tokens: &q,
        keep: Some(&keep),
        offset: 0,
        context: &context,
    };
    let padded = module.mixing(&q, &k, &pass).unwrap().mix(&v).unwrap();
    let alone = mixing(&spec, &Map::new(), &short(&q), &short(&k));
    let alone = alone.mix(&short(&v)).unwrap();
    assert!(values(&alone).iter().any(|entry| entry.abs() > 1e-3));
    assert_near(&short(&padded), &alone, 1e-8, "long keys");
}

#[test]
fn work_grows_linearly() {
    for spec in every() {
        let map = parameters(&spec, 4);
        let causal = !matches!(spec.features, ReadOut::Positive { stabilise: true });
        let work = |length: usize| {
            let q = random(&[1, 2, length, 4], 1);
            mixing_of(&spec, causal, &map, [&q, &q], None).operations(4) as f64
        };
        assert!(((work(512) / work(256)).log2() - 1.0).abs() < 0.1);
        assert!(((work(1024) / work(256)).log2() / 2.0 - 1.0).abs() < 0.1);
    }
}

#[test]
fn impossible_specs_are_refused() {
    let refused = |spec: KernelizedSpec, causal: bool, width: usize| {
        let heads = heads(2, width, causal);
        spec.validate(&heads, "m").unwrap_err().to_string()
    };
    let with_count = |count: usize, spectrum: SpectrumSpec, features: ReadOut| KernelizedSpec {
        count: Some(count),
        ..spec(spectrum, features)
    };
    let never_over = KernelizedSpec {
        redraw: Redraw::Steps { every: 0 },
        ..spec(MIXTURE, POSITIVE)
    };
    assert_eq!(
        refused(never_over, false, 4),
        "m.redraw.every is 0, but must be at least 1"
    );
    assert_eq!(
        refused(with_count(0, MIXTURE, POSITIVE), false, 4),
        "m.count is 0, but must be between 1 and 65536"
    );
    assert_eq!(
        refused(with_count(7, MIXTURE, FOURIER), false, 4),
        "m.count is 7, but must be even: each draw is taken with ± the mean"
    );
    assert_eq!(
        refused(with_count(1, SpectrumSpec::Generator, POSITIVE), false, 4),
        "m.count is 1, but must be at least 2, for the variance of a batch norm"
    );
    let fastfood = SpectrumSpec::Fastfood {
        learned: Learned::All,
    };
    assert_eq!(
        refused(with_count(4, fastfood.clone(), POSITIVE), false, 4),
        "m.count is 4, but must be absent: FastFood has one for each feature"
    );
    assert_eq!(
        refused(spec(fastfood, POSITIVE), false, 6),
        "m.spectrum.kind is \"fastfood\", but must be another one where heads have 6 features: \
         FastFood needs a power of two"
    );
    let none = SpectrumSpec::Mixture {
        components: Some(0),
    };
    assert_eq!(
        refused(spec(none, POSITIVE), false, 4),
        "m.spectrum.components is 0, but must be between 1 and 1024"
    );
    assert_eq!(
        refused(
            spec(MIXTURE, ReadOut::Fourier { smoothing: -1.0 }),
            false,
            4
        ),
        "m.features.smoothing is -1.0, but must be a number of at least 0"
    );
    assert_eq!(
        refused(
            spec(MIXTURE, ReadOut::Positive { stabilise: true }),
            true,
            4
        ),
        "m.features.stabilise is true, but must be false in causal attention: the largest \
         exponent may come later"
    );
    let negative = Heads {
        scale: -1.0,
        ..heads(2, 4, false)
    };
    let error = spec(MIXTURE, POSITIVE)
        .validate(&negative, "m")
        .unwrap_err();
    assert!(error.to_string().contains("the scale is not positive"));
}
