//! FIT as the network of a denoiser.
#![allow(clippy::panic, clippy::unwrap_used)]

use super::*;
use crate::common::{tensor, values};
use lapidary_kernels::Var;
use lapidary_parts::organisation::fit::denoiser::{Denoiser, DenoiserSpec, Noisy};

fn denoiser(self_conditioning: bool) -> DenoiserSpec {
    DenoiserSpec {
        channels: 3,
        width: WIDTH,
        network: FitSpec {
            width: Some(16),
            latent_positions: LatentPositions::Sinusoidal,
            positions: GroupPositions::Grid,
            ..spec("(1)1(1)", 2, false)
        },
        blocks: vec![BlockSpec {
            repeat: 2,
            ..block(12, 4, false)
        }],
        condition_width: Some(5),
        self_conditioning,
    }
}

/// Patches, times and conditions.
fn noisy() -> [Tensor; 3] {
    [
        random(&[BATCH, 8, 3], 1),
        tensor(vec![0.2, 0.7], &[BATCH]),
        random(&[BATCH, 3, 5], 2),
    ]
}

fn denoise(spec: &DenoiserSpec, map: &Map, given: &[Tensor; 3], z: Option<&Signal>) -> [Tensor; 2] {
    let module = build(map, |p| Denoiser::new(spec, p)).unwrap();
    let [patches, time, conditions] = given;
    let (patches, conditions) = (
        Signal::from(patches.clone()),
        Signal::from(conditions.clone()),
    );
    let noisy = Noisy {
        patches: &patches,
        time,
        conditions: Some(&conditions),
        latents: z,
    };
    let trace = Trace::new();
    let (x, z) = module.forward(noisy, &Context::new(&trace)).unwrap();
    [x.into_value(), z.into_value()]
}

#[test]
fn self_conditioning_starts_as_nothing() {
    let spec = denoiser(true);
    let mut map = draw(4, |p| Denoiser::new(&spec, p));
    let given = noisy();
    let z = Signal::from(random(&[BATCH, 4, 16], 9));
    let drawn = denoise(&spec, &map, &given, None);
    assert_eq!(drawn[0].dims(), [BATCH, 8, 3]);
    let conditioned = denoise(&spec, &map, &given, Some(&z));
    assert!(difference(&drawn[0], &conditioned[0]) > 1e-4);
    // A fresh one has zeros there, as its initial values say.
    for name in ["previous.norm.weight", "previous.norm.bias"] {
        let zero = map[name].zeros_like().unwrap();
        map.insert(name.to_owned(), zero);
    }
    let [x, latents] = denoise(&spec, &map, &given, None);
    let [x_again, latents_again] = denoise(&spec, &map, &given, Some(&z));
    assert_eq!(values(&x), values(&x_again));
    assert_eq!(values(&latents), values(&latents_again));
}

/// Half of the training starts from zeros; a first step that is told of no latents does as well.
#[test]
fn a_step_without_latents_before_it_starts_from_zeros() {
    let spec = denoiser(true);
    let map = draw(4, |p| Denoiser::new(&spec, p));
    let given = noisy();
    let zeros = Signal::from(random(&[BATCH, 4, 16], 9).zeros_like().unwrap());
    let [x, latents] = denoise(&spec, &map, &given, None);
    let [x_of_zeros, latents_of_zeros] = denoise(&spec, &map, &given, Some(&zeros));
    assert_eq!(values(&x), values(&x_of_zeros));
    assert_eq!(values(&latents), values(&latents_of_zeros));
    // Which is not to start from nothing: the map of zeros has biases.
    let [without, _] = denoise(&denoiser(false), &map, &given, None);
    assert!(difference(&x, &without) > 1e-4);
    // Those of fewer groups are refused.
    let module = build(&map, |p| Denoiser::new(&spec, p)).unwrap();
    let [patches, time, conditions] = given;
    let (patches, conditions) = (Signal::from(patches), Signal::from(conditions));
    let few = Signal::from(random(&[BATCH, 2, 16], 9));
    let noisy = Noisy {
        patches: &patches,
        time: &time,
        conditions: Some(&conditions),
        latents: Some(&few),
    };
    let trace = Trace::new();
    let said = module.forward(noisy, &Context::new(&trace)).unwrap_err();
    let expected = "shape of the latents of the step before is [2, 2, 16], but must be [2, 4, 16]";
    assert_eq!(said.to_string(), expected);
}

#[test]
fn latents_hear_of_time_and_conditions() {
    let spec = denoiser(false);
    let map = draw(4, |p| Denoiser::new(&spec, p));
    let given = noisy();
    let [x, _] = denoise(&spec, &map, &given, None);
    let mut later = given.clone();
    later[1] = tensor(vec![0.2, 0.8], &[BATCH]);
    let [changed, _] = denoise(&spec, &map, &later, None);
    assert_eq!(
        difference(&x.get(0).unwrap(), &changed.get(0).unwrap()),
        0.0
    );
    assert!(difference(&x.get(1).unwrap(), &changed.get(1).unwrap()) > 1e-6);
    let mut other = given;
    other[2] = random(&[BATCH, 3, 5], 3);
    assert!(difference(&x, &denoise(&spec, &map, &other, None)[0]) > 1e-6);
}

/// A time is a thousand times as long, then sines and cosines of it with mean 0 and deviation 1, then a layer.
#[test]
fn times_are_standardised_waves() {
    let spec = denoiser(false);
    let map = draw(4, |p| Denoiser::new(&spec, p));
    let module = build(&map, |p| Denoiser::new(&spec, p)).unwrap();
    let [patches, time, conditions] = noisy();
    let (patches, conditions) = (Signal::from(patches), Signal::from(conditions));
    let noisy = Noisy {
        patches: &patches,
        time: &time,
        conditions: Some(&conditions),
        latents: None,
    };
    let trace = Trace::new().capture("time.{in,hidden.out}").unwrap();
    module.forward(noisy, &Context::new(&trace)).unwrap();
    let found = |site: &str| values(trace.signal(site).unwrap().value());
    let (waves, hidden) = (found("time.in"), found("time.hidden.out"));
    let weight = values(&map["time.hidden.weight"]);
    let bias = values(&map["time.hidden.bias"]);
    // A quarter of the latents' 16 features, at rates of 1 and 1 / 100.
    assert_eq!((waves.len(), hidden.len()), (2 * 4, 2 * 16));
    for (example, time) in [0.2f64, 0.7].into_iter().enumerate() {
        let (quick, slow) = (1000.0 * time, 10.0 * time);
        let plain = [quick.sin(), slow.sin(), quick.cos(), slow.cos()];
        let mean = plain.iter().sum::<f64>() / 4.0;
        let variance = plain.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / 4.0;
        let expected = plain.map(|x| (x - mean) / variance.sqrt());
        for (at, expected) in expected.iter().enumerate() {
            let found = waves[example * 4 + at];
            assert!((found - expected).abs() < 1e-9, "{found} {expected}");
        }
        for (at, bias) in bias.iter().enumerate() {
            let row = &weight[at * 4..][..4];
            let sum: f64 = row.iter().zip(&expected).map(|(w, x)| w * x).sum();
            let expected = (sum + bias) / (1.0 + (-(sum + bias)).exp());
            let found = hidden[example * 16 + at];
            assert!((found - expected).abs() < 1e-9, "{found} {expected}");
        }
    }
}

#[test]
fn half_of_the_examples_train_with_latents_of_a_step_before() {
    let spec = denoiser(true);
    let map = draw(4, |p| Denoiser::new(&spec, p));
    let module = build(&map, |p| Denoiser::new(&spec, p)).unwrap();
    let (patches, conditions) = (
        Signal::from(random(&[40, 8, 3], 1)),
        Signal::from(random(&[40, 3, 5], 2)),
    );
    let time = tensor(vec![0.3; 40], &[40]);
    let noisy = Noisy {
        patches: &patches,
        time: &time,
        conditions: Some(&conditions),
        latents: None,
    };
    let trace = Trace::new();
    let cx = Context::new(&trace);
    let draw = |seed| {
        let latents = module
            .latents_to_train_with(noisy, seed, &cx)
            .unwrap()
            .unwrap();
        latents.into_value()
    };
    let first = draw(1);
    assert_eq!(values(&first), values(&draw(1)));
    assert!(difference(&first, &draw(2)) > 0.0);
    let (_, all) = module.forward(noisy, &cx).unwrap();
    let mut zeros = 0;
    for example in 0..40 {
        let found = first.get(example).unwrap();
        let is_zero = values(&found).iter().all(|x| *x == 0.0);
        zeros += usize::from(is_zero);
        if !is_zero {
            assert_near(
                &found,
                &all.value().get(example).unwrap(),
                0.0,
                "kept latents",
            );
        }
    }
    assert!((10..=30).contains(&zeros), "{zeros}");
}

#[test]
fn gradients_of_the_denoiser_equal_central_differences() {
    let spec = denoiser(true);
    let mut inputs = draw(4, |p| Denoiser::new(&spec, p));
    inputs.insert("patches".to_owned(), noisy()[0].clone());
    inputs.insert("latents".to_owned(), random(&[BATCH, 4, 16], 9));
    let error = gradient_error(&inputs, 2, |inputs| {
        let z = Signal::from(inputs["latents"].clone());
        let [_, time, conditions] = noisy();
        let given = [inputs["patches"].clone(), time, conditions];
        let [x, z] = denoise(&spec, inputs, &given, Some(&z));
        (contracted(&x) + contracted(&z)).unwrap()
    });
    assert!(error < 1e-6, "{error:e}");
}

#[test]
fn denoisers_that_do_not_fit_are_refused() {
    let refused = |change: &dyn Fn(&mut DenoiserSpec), expected: &str| {
        let mut spec = denoiser(true);
        change(&mut spec);
        let said = spec.validate().unwrap_err().to_string();
        assert!(said.starts_with(expected), "{said}");
    };
    refused(&|spec| spec.channels = 0, "channels is 0");
    refused(&|spec| spec.network.width = Some(12), "network.width is 12");
    refused(&|spec| spec.network.condition = 1, "network.condition is 1");
    refused(
        &|spec| spec.network.output = FitOutput::Latents,
        "network.output is",
    );
    refused(
        &|denoiser| {
            denoiser.network = spec("(1)", 2, false);
            denoiser.blocks[0].repeat = 1;
        },
        "network.latents is 0",
    );
    refused(&|spec| spec.blocks[0].repeat = 3, "network.layout is");
    let spec = denoiser(false);
    let map = draw(4, |p| Denoiser::new(&spec, p));
    let module = build(&map, |p| Denoiser::new(&spec, p)).unwrap();
    let [patches, time, _] = noisy();
    let patches = Signal::from(patches);
    let trace = Trace::new();
    let given = Noisy {
        patches: &patches,
        time: &time,
        conditions: None,
        latents: None,
    };
    let said = module.forward(given, &Context::new(&trace)).unwrap_err();
    assert!(said.to_string().starts_with("conditions is"), "{said}");
    let z = Signal::from(
        Var::from_tensor(&random(&[BATCH, 4, 16], 9))
            .unwrap()
            .as_tensor()
            .clone(),
    );
    let given = Noisy {
        latents: Some(&z),
        ..given
    };
    assert!(module.forward(given, &Context::new(&trace)).is_err());
}
