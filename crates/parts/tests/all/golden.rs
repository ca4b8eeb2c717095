//! Single parts against what `transformers` computes for them; see `oracles/parts.py`.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use crate::common::{Map, assert_near, build, position, span, tensor, values};
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_parts::Context;
use lapidary_parts::activation::ActivationSpec;
use lapidary_parts::feedforward::{Mixture, MixtureSpec};
use lapidary_parts::position::PositionSpec;
use lapidary_parts::recurrent::{Mamba, Mamba2, Mamba2Spec, MambaSpec};
use lapidary_parts::state::MixerState;
use lapidary_signal::{Signal, Trace};

/// The tensors of a fixture, numbers in f64.
fn fixture(name: &str) -> Map {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures");
    let bytes = std::fs::read(format!("{folder}/{name}.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    file.tensors()
        .into_iter()
        .map(|(name, view)| {
            let values: Vec<f64> = match view.dtype() {
                safetensors::Dtype::F32 => view
                    .data()
                    .chunks_exact(4)
                    .map(|b| f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]])))
                    .collect(),
                safetensors::Dtype::U8 => view.data().iter().map(|&b| f64::from(b)).collect(),
                other => panic!("{name} is {other:?}"),
            };
            (name, tensor(values, view.shape()))
        })
        .collect()
}

fn mamba_of(case: &Map, spec: &MambaSpec) -> Mamba {
    let names = [
        ("in_proj.weight", "input.weight"),
        ("in_proj.bias", "input.bias"),
        ("conv1d.weight", "convolution.weight"),
        ("conv1d.bias", "convolution.bias"),
        ("x_proj.weight", "selection.weight"),
        ("dt_proj.weight", "step.weight"),
        ("dt_proj.bias", "step.bias"),
        ("A_log", "decay_log"),
        ("D", "skip"),
        ("out_proj.weight", "output.weight"),
        ("out_proj.bias", "output.bias"),
    ];
    let map = names
        .into_iter()
        .filter_map(|(theirs, ours)| Some((ours.to_owned(), case.get(theirs)?.clone())))
        .collect();
    build(&map, |p| Mamba::new(spec, 16, p)).unwrap()
}

fn mamba2_of(case: &Map, spec: &Mamba2Spec) -> Mamba2 {
    let names = [
        ("in_proj.weight", "input.weight"),
        ("in_proj.bias", "input.bias"),
        ("conv1d.weight", "convolution.weight"),
        ("conv1d.bias", "convolution.bias"),
        ("dt_bias", "step_bias"),
        ("A_log", "decay_log"),
        ("D", "skip"),
        ("norm.weight", "norm.weight"),
        ("out_proj.weight", "output.weight"),
        ("out_proj.bias", "output.bias"),
    ];
    let map = names
        .into_iter()
        .filter_map(|(theirs, ours)| Some((ours.to_owned(), case.get(theirs)?.clone())))
        .collect();
    build(&map, |p| Mamba2::new(spec, 16, p)).unwrap()
}

/// Whole, padded, and in steps of decoding.
fn check_recurrent(
    case: &Map,
    forward: impl Fn(&Signal, &Context<'_>, Option<&mut MixerState>) -> Signal,
) {
    let trace = Trace::new();
    let x = Signal::from(case["x"].clone());
    let y = forward(&x, &Context::new(&trace), None);
    assert_near(y.value(), &case["expected"], 1e-5, "whole pass");

    let mask = case["mask"].to_dtype(DType::U8).unwrap();
    let masked = Context {
        key_padding: Some(&mask),
        ..Context::new(&trace)
    };
    let y = forward(&x, &masked, None);
    assert_near(y.value(), &case["expected_masked"], 1e-5, "padded");

    // The same in steps, with the padding that covers the tokens so far.
    let mut state = MixerState::Empty;
    for t in 0..9 {
        let so_far = mask.narrow(1, 0, t + 1).unwrap();
        let cx = Context {
            key_padding: Some(&so_far),
            offset: t,
            ..Context::new(&trace)
        };
        let token = x.narrow(1, t, 1).unwrap();
        let y = forward(&token, &cx, Some(&mut state));
        let expected = case["expected_masked"].narrow(1, t, 1).unwrap();
        assert_near(y.value(), &expected, 1e-5, "step");
    }
}

fn check_mamba(name: &str, spec: &MambaSpec) {
    let case = fixture(name);
    let mamba = mamba_of(&case, spec);
    check_recurrent(&case, |x, cx, state| mamba.forward(x, cx, state).unwrap());
}

fn check_mamba2(name: &str, spec: &Mamba2Spec) {
    let case = fixture(name);
    for chunk in [1, 4, 64] {
        let spec = Mamba2Spec {
            head_width: 8,
            state: 5,
            chunk,
            ..spec.clone()
        };
        let mamba = mamba2_of(&case, &spec);
        check_recurrent(&case, |x, cx, state| mamba.forward(x, cx, state).unwrap());
    }
}

#[test]
fn mamba_equals_transformers() {
    let spec = MambaSpec {
        state: 5,
        step_rank: Some(3),
        ..MambaSpec::default()
    };
    check_mamba("mamba", &spec);
}

#[test]
fn mamba_with_other_biases_equals_transformers() {
    let spec = MambaSpec {
        state: 5,
        step_rank: Some(3),
        bias: true,
        convolution_bias: false,
        activation: ActivationSpec::Gelu,
        ..MambaSpec::default()
    };
    check_mamba("mamba_biased", &spec);
}

#[test]
fn mamba2_equals_transformers() {
    let spec = Mamba2Spec {
        groups: 2,
        ..Mamba2Spec::default()
    };
    check_mamba2("mamba2", &spec);
}

#[test]
fn mamba2_with_other_biases_and_bounded_steps_equals_transformers() {
    let spec = Mamba2Spec {
        bias: true,
        convolution_bias: false,
        smallest_step: Some(0.6),
        largest_step: Some(0.9),
        ..Mamba2Spec::default()
    };
    check_mamba2("mamba2_biased", &spec);
}

fn check_mixture(name: &str, spec: &MixtureSpec) {
    let case = fixture(name);
    let mut map = Map::from([("router.weight".to_owned(), case["router.weight"].clone())]);
    for expert in 0..spec.experts {
        for layer in ["gate", "up", "down"] {
            let weight = case[layer].get(expert).unwrap();
            map.insert(format!("experts.{expert}.{layer}.weight"), weight);
        }
    }
    let mixture = build(&map, |p| Mixture::new(spec, 16, p)).unwrap();
    let trace = Trace::new();
    let x = Signal::from(case["x"].clone());
    let y = mixture.forward(&x, &Context::new(&trace)).unwrap();
    assert_near(y.value(), &case["expected"], 1e-5, name);
}

#[test]
fn mixtures_equal_transformers() {
    let mixtral = MixtureSpec {
        hidden: 12,
        experts: 5,
        active: 2,
        activation: ActivationSpec::Silu,
        normalise: true,
    };
    check_mixture("mixtral", &mixtral);
    let olmoe = MixtureSpec {
        experts: 6,
        active: 3,
        normalise: false,
        ..mixtral
    };
    check_mixture("olmoe", &olmoe);
}

/// BLOOM adds `slope · key`, which differs from `−slope · (query − key)` by a constant per query
/// and so gives the same weights.
#[test]
fn alibi_equals_transformers() {
    let case = fixture("positions");
    for heads in [4, 6, 8, 12] {
        let position = position(&PositionSpec::Alibi, heads, true, &Map::new());
        let bias = position
            .bias(span(7, 7, 0), DType::F64, &Device::Cpu)
            .unwrap()
            .unwrap();
        let bias = bias.laid_out(7, 7).unwrap();
        let theirs = values(&case[&format!("alibi.{heads}")]);
        for (index, ours) in values(&bias).into_iter().enumerate() {
            let (head, query, key) = (index / 49, index / 7 % 7, index % 7);
            let expected = theirs[head * 7 + key] - theirs[head * 7 + query];
            if key <= query {
                assert!((ours - expected).abs() < 1e-6, "{heads} heads, {index}");
            }
        }
    }
}

#[test]
fn relative_buckets_equal_transformers() {
    let case = fixture("positions");
    for (buckets, max_distance) in [(32, 128), (8, 20), (16, 256), (10, 50)] {
        for (direction, causal) in [("causal", true), ("both", false)] {
            let spec = PositionSpec::RelativeBuckets {
                buckets,
                max_distance,
            };
            // A table that holds each bucket's own number.
            let numbers = (0..buckets).map(|bucket| bucket as f64).collect();
            let map = Map::from([("buckets".to_owned(), tensor(numbers, &[buckets, 1]))]);
            let position = position(&spec, 1, causal, &map);
            let ours = |queries, keys, offset| -> Tensor {
                let bias = position.bias(span(queries, keys, offset), DType::F64, &Device::Cpu);
                let bias = bias.unwrap().unwrap().laid_out(queries, keys);
                bias.unwrap().flatten_all().unwrap()
            };
            // A query at 600 sees the keys at distances −600 ..= 600.
            let expected = &case[&format!("buckets.{direction}.{buckets}.{max_distance}")];
            assert_near(&ours(1, 1201, 600), expected, 0.0, direction);
        }
    }
}
