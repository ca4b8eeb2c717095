//! Reversible blocks: what they compute, and that gradients are those of remembered streams.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use std::collections::BTreeMap;

use lapidary_kernels::{DType, Device, Recomputation, Tensor};
use lapidary_model::{Initialiser, Input, Model, ModelSpec, Pass};
use lapidary_parts::state::DecodeState;
use lapidary_signal::Trace;

fn spec(blocks: usize, length: usize, attention: &str) -> ModelSpec {
    organised(blocks, length, attention, "")
}

/// With more said of the organisation.
fn organised(blocks: usize, length: usize, attention: &str, more: &str) -> ModelSpec {
    let text = format!(
        "width = 16
        organisation = {{ kind = 'reversible'{more} }}
        [input]
        kind = 'tokens'
        vocabulary = 11
        length = {length}
        [[blocks]]
        repeat = {blocks}
        dropout = 0.1
        attention = {{ kind = 'multi-head', heads = 2, causal = true{attention} }}
        feedforward = {{ kind = 'dense', hidden = 32 }}
        [head]
        kind = 'language-model'"
    );
    toml::from_str(&text).unwrap()
}

fn model(spec: ModelSpec, dtype: DType) -> Model {
    Model::trainable(spec, &mut Initialiser::new(3, dtype, Device::Cpu)).unwrap()
}

fn ids(length: usize) -> Tensor {
    let ids: Vec<u32> = (0..2 * length as u32)
        .map(|i| (i * i + 3 * i) % 11)
        .collect();
    Tensor::from_vec(ids, (2, length), &Device::Cpu).unwrap()
}

/// The logits, and the gradient of each parameter of the mean of their squares.
fn gradients(model: &Model, length: usize, recompute: bool) -> (Tensor, BTreeMap<String, Tensor>) {
    let variables = model.variables().values();
    let recomputation = recompute.then(|| Recomputation::of(variables));
    let pass = Pass {
        dropout_seed: Some(4),
        draw: Some(9),
        recomputation: recomputation.as_ref(),
        ..Pass::default()
    };
    let output = model.forward(&Input::tokens(ids(length)), pass).unwrap();
    let logits = output.into_logits().unwrap().into_value();
    let mut store = logits
        .sqr()
        .unwrap()
        .mean_all()
        .unwrap()
        .backward()
        .unwrap();
    if let Some(recomputation) = &recomputation {
        recomputation.add_to(&mut store).unwrap();
    }
    let variables = model.variables().iter();
    let found = variables.map(|(name, variable)| {
        let gradient = store.get(variable.as_tensor()).unwrap();
        (name.clone(), gradient.clone())
    });
    (logits.detach(), found.collect())
}

fn largest(x: &Tensor) -> f64 {
    let all = x.to_dtype(DType::F64).unwrap().abs().unwrap();
    let all = all.flatten_all().unwrap();
    all.max(0).unwrap().to_scalar::<f64>().unwrap()
}

/// The largest difference over the largest entry.
fn difference(a: &Tensor, b: &Tensor) -> f64 {
    largest(&(a - b).unwrap()) / largest(a).max(f64::MIN_POSITIVE)
}

#[test]
fn one_block_is_the_mean_of_two_streams() {
    let mut spec = spec(1, 8, "");
    spec.blocks[0].dropout = 0.0;
    let reversible = model(spec.clone(), DType::F64);
    spec.organisation = None;
    let plain = model(spec, DType::F64);
    let names = |model: &Model| model.parameters().keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&reversible), names(&plain));
    let sites = [
        "embeddings",
        "blocks.0.attention.out",
        "blocks.0.feedforward.out",
        "final_norm",
    ];
    let seen = |model: &Model| {
        let trace = sites
            .iter()
            .fold(Trace::new(), |trace, site| trace.capture(site).unwrap());
        let pass = Pass {
            trace: Some(&trace),
            ..Pass::default()
        };
        model.forward(&Input::tokens(ids(8)), pass).unwrap();
        sites.map(|site| trace.signal(site).unwrap().value().clone())
    };
    // A first block sees the same twice: F(N(x + A(N x))) in both wirings.
    let [x, attended, transformed, out] = seen(&reversible);
    let [_, usual, fed, _] = seen(&plain);
    assert!(difference(&usual, &attended) < 1e-12);
    assert!(difference(&fed, &transformed) < 1e-12);
    let moved = (((attended + transformed).unwrap() / 2.0).unwrap() + x).unwrap();
    assert!(difference(&out, &moved) < 1e-12);
}

/// The authors' program has both streams side by side before its last norm.
#[test]
fn streams_can_come_out_side_by_side() {
    for (head, parameters) in [
        ("tied = false", "head.output.weight"),
        ("tied = true", "head.projection.weight"),
    ] {
        let mut text = toml::to_string(&organised(2, 8, "", ", output = 'concatenated'")).unwrap();
        text = text.replace("tied = true", head);
        let mut spec: ModelSpec = toml::from_str(&text).unwrap();
        spec.blocks.iter_mut().for_each(|block| block.dropout = 0.0);
        spec.final_norm = Some(Default::default());
        let made = model(spec.clone(), DType::F64);
        assert_eq!(
            made.parameter_count() as u64,
            spec.parameter_count().unwrap()
        );
        assert_eq!(made.parameters()["final_norm.weight"].dims(), [32]);
        assert_eq!(made.parameters()[parameters].dims()[1], 32);
        let trace = ["embeddings", "*.out", "final_norm"]
            .iter()
            .fold(Trace::new(), |trace, site| trace.capture(site).unwrap());
        let pass = Pass {
            trace: Some(&trace),
            ..Pass::default()
        };
        let output = made.forward(&Input::tokens(ids(8)), pass).unwrap();
        let at = |site: &str| trace.signal(site).unwrap().value().clone();
        // Each stream is the embeddings and what was added to it.
        let stream = |part: &str| {
            let added = (0..2).map(|block| at(&format!("blocks.{block}.{part}.out")));
            added.fold(at("embeddings"), |sum, added| (sum + added).unwrap())
        };
        let both = [stream("attention"), stream("feedforward")];
        let both = Tensor::cat(&both, 2).unwrap();
        let centred = both.broadcast_sub(&both.mean_keepdim(2).unwrap()).unwrap();
        let deviation = centred.sqr().unwrap().mean_keepdim(2).unwrap();
        let deviation = (deviation + 1e-5).unwrap().sqrt().unwrap();
        let normed = centred.broadcast_div(&deviation).unwrap();
        let [weight, bias] =
            ["weight", "bias"].map(|name| made.parameters()[&format!("final_norm.{name}")].clone());
        let normed = normed.broadcast_mul(&weight).unwrap();
        let normed = normed.broadcast_add(&bias).unwrap();
        assert!(difference(&normed, output.hidden.value()) < 1e-9);
        let (stored, expected) = gradients(&made, 8, false);
        let (logits, found) = gradients(&made, 8, true);
        assert!(difference(&stored, &logits) < 1e-12);
        let whole = expected.values().map(largest).fold(0.0, f64::max);
        for (name, gradient) in &expected {
            let apart = largest(&(gradient - &found[name]).unwrap()) / whole;
            assert!(apart < 1e-9, "{name}: {apart:e}");
        }
    }
}

/// Feed-forward parts see each token alone, so that pieces of a sequence are as good as all of it.
#[test]
fn chunks_change_nothing() {
    let mixture = "kind = 'mixture', hidden = 12, experts = 3, active = 2";
    for feedforward in ["kind = 'dense', hidden = 32", mixture] {
        let of = |chunk: &str| {
            let mut spec = organised(3, 16, "", chunk);
            let part = toml::from_str(&feedforward.replace(", ", "\n")).unwrap();
            spec.blocks[0].feedforward = Some(part);
            model(spec, DType::F64)
        };
        let whole = of("");
        let (expected_logits, expected) = gradients(&whole, 16, false);
        for chunk in [1, 5, 8, 16, 40] {
            let chunked = of(&format!(", chunk = {chunk}"));
            for recompute in [false, true] {
                let (logits, found) = gradients(&chunked, 16, recompute);
                let what = format!("{feedforward}, {chunk} at a time, {recompute}");
                assert!(difference(&expected_logits, &logits) < 1e-11, "{what}");
                let largest_of_all = expected.values().map(largest).fold(0.0, f64::max);
                assert_eq!(found.len(), expected.len());
                for (name, gradient) in &expected {
                    let apart = largest(&(gradient - &found[name]).unwrap()) / largest_of_all;
                    assert!(apart < 1e-9, "{name}, {what}: {apart:e}");
                }
            }
        }
    }
}

/// A site of a sequence is written once, with all of it.
#[test]
fn sites_are_of_whole_sequences() {
    let model = model(organised(1, 16, "", ", chunk = 5"), DType::F64);
    let site = "blocks.0.feedforward.hidden";
    let trace = Trace::new().capture(site).unwrap();
    let pass = Pass {
        trace: Some(&trace),
        ..Pass::default()
    };
    model.forward(&Input::tokens(ids(16)), pass).unwrap();
    assert_eq!(trace.signal(site).unwrap().dims(), [2, 16, 32]);
}

#[test]
fn rotations_are_drawn_or_fixed_in_training() {
    let spec = |rotations: &str| {
        let reformer = format!(
            ", sharing = 'query-key', mechanism = {{ kind = 'reformer', chunk = 4, buckets = [6], \
             rotations = '{rotations}' }}"
        );
        let mut spec = spec(2, 16, &reformer);
        spec.blocks[0].dropout = 0.0;
        spec
    };
    let logits = |model: &Model, draw: Option<u64>, recompute: bool| {
        let recomputation = recompute.then(|| Recomputation::of(model.variables().values()));
        let pass = Pass {
            draw,
            recomputation: recomputation.as_ref(),
            ..Pass::default()
        };
        let output = model.forward(&Input::tokens(ids(16)), pass).unwrap();
        output.into_logits().unwrap().into_value()
    };
    let drawn = model(spec("drawn"), DType::F64);
    let fixed = Model::new(spec("fixed"), &mut drawn.parameters().clone()).unwrap();
    let own = logits(&drawn, None, false);
    let apart = |model: &Model, draw| difference(&own, &logits(model, draw, false));
    assert!((1..6).any(|draw| apart(&drawn, Some(draw)) > 1e-6));
    assert!((1..6).all(|draw| apart(&fixed, Some(draw)) == 0.0));
    assert_eq!(apart(&fixed, None), 0.0);
    let own = Model::trainable(spec("per-example"), &mut drawn.parameters().clone()).unwrap();
    for model in [&drawn, &own] {
        for draw in 1..6 {
            let (once, again) = (
                logits(model, Some(draw), false),
                logits(model, Some(draw), true),
            );
            assert!(difference(&once, &again) < 1e-12);
        }
    }
}

#[test]
fn gradients_are_those_of_remembered_streams() {
    let reformer = ", sharing = 'query-key', mechanism = { kind = 'reformer', chunk = 4, rounds = 2, \
                    buckets = [6] }";
    for (attention, by_feature) in [("", false), (reformer, false), (reformer, true)] {
        for (dtype, tolerance) in [(DType::F64, 1e-9), (DType::F32, 1e-4)] {
            let mut spec = spec(12, 16, attention);
            spec.blocks[0].dropout_by_feature = by_feature;
            let model = model(spec, dtype);
            let (stored, expected) = gradients(&model, 16, false);
            let (logits, found) = gradients(&model, 16, true);
            assert!(difference(&stored, &logits) < tolerance, "{attention}");
            assert_eq!(found.len(), model.variables().len());
            // Of a bias that softmax does not see there is no gradient but what rounding leaves.
            let whole = expected.values().map(largest).fold(0.0, f64::max);
            for (name, gradient) in &expected {
                let apart = largest(&(gradient - &found[name]).unwrap()) / whole;
                assert!(apart < tolerance, "{name}{attention}: {apart:e}");
            }
        }
    }
}

#[test]
fn decoding_goes_on_from_states() {
    let model = model(spec(3, 12, ""), DType::F64);
    let all = ids(12);
    let run = |ids: Tensor, state: Option<&mut DecodeState>| {
        let pass = Pass {
            state,
            ..Pass::default()
        };
        let output = model.forward(&Input::tokens(ids), pass).unwrap();
        output.into_logits().unwrap().into_value()
    };
    let whole = run(all.clone(), None);
    let mut state = model.decode_state();
    for (start, length) in [(0, 5), (5, 1), (6, 6)] {
        let step = run(
            all.narrow(1, start, length).unwrap().contiguous().unwrap(),
            Some(&mut state),
        );
        let expected = whole.narrow(1, start, length).unwrap();
        assert!(difference(&expected, &step) < 1e-12, "from {start}");
    }
}

#[test]
fn what_cannot_be_had_back_is_refused() {
    type Change = fn(&mut ModelSpec);
    let changes: [(&str, Change); 4] = [
        ("blocks.0.wiring", |spec| {
            spec.blocks[0].wiring = lapidary_parts::block::Wiring::PostNorm;
        }),
        ("blocks.0.feedforward", |spec| {
            spec.blocks[0].feedforward = None
        }),
        ("blocks.0.attention.kind", |spec| {
            spec.blocks[0].attention = lapidary_parts::attention::MixerSpec::Absent;
        }),
        ("blocks.0.shortcuts", |spec| spec.blocks[0].shortcuts = true),
    ];
    let said = organised(2, 8, "", ", chunk = 0").validate().unwrap_err();
    assert!(
        said.to_string().contains("organisation.chunk is 0"),
        "{said}"
    );
    for (field, change) in changes {
        let mut spec = spec(2, 8, "");
        change(&mut spec);
        let error = spec.validate().unwrap_err().to_string();
        assert!(error.contains(field), "{error}");
    }
}
