//! Every method on a model that scales what its parts write, against the same model with the scales
//! multiplied into its layers.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use crate::common::{DECODER, ENCODER, GATED, model, tokens};
use lapidary_explain::{Options, Question, Target, decompx, explainers, gradient_times_input};
use lapidary_kernels::check::difference;
use lapidary_kernels::{DType, Device};
use lapidary_model::{Model, ModelSpec, Pass};
use lapidary_signal::streams::StreamRules;

fn scaled(spec: &str, seed: u64) -> Model {
    model(
        &spec.replace("repeat = 2", "repeat = 2\nlayer_scale = 0.2"),
        seed,
    )
}

const IDS: [u32; 6] = [3, 17, 5, 9, 1, 12];

#[test]
fn folding_changes_no_output() {
    let mixture = GATED.replace(
        "{ kind = \"gated\", hidden = 24 }",
        "{ kind = \"mixture\", hidden = 8, experts = 3, active = 2 }",
    );
    for spec in [ENCODER, DECODER, GATED, &mixture] {
        let model = scaled(spec, 4);
        let folded = model.written_out().unwrap();
        assert!(
            folded
                .parameters()
                .keys()
                .all(|name| !name.contains("_scale"))
        );
        let logits = |model: &Model| {
            let output = model.forward(&tokens(&IDS), Pass::default()).unwrap();
            output.into_logits().unwrap().into_value()
        };
        assert!(difference(&logits(&model), &logits(&folded)).unwrap() < 1e-12);
        // The scale is there: without it the output is another.
        let mut spec = model.spec().clone();
        spec.blocks[0].layer_scale = None;
        let without = Model::new(spec, &mut model.parameters().clone()).unwrap();
        assert!(difference(&logits(&model), &logits(&without)).unwrap() > 1e-3);
    }
}

#[test]
fn every_method_agrees_with_the_folded_model_or_refuses() {
    let mut compared = 0;
    for spec in [ENCODER, DECODER, GATED] {
        let model = scaled(spec, 4);
        let folded = model.written_out().unwrap();
        let input = tokens(&IDS);
        let (own, other) = (
            Question::new(&model, &input),
            Question::new(&folded, &input),
        );
        for method in explainers() {
            let target = || Target::class(1);
            let options = Options::default();
            let found = method.explain(&own, target(), &options);
            let expected = method.explain(&other, target(), &options);
            let (Ok(found), Ok(expected)) = (&found, &expected) else {
                // What needs the folded model says so; what cannot do either says something else.
                let error = found
                    .err()
                    .map(|error| error.to_string())
                    .unwrap_or_default();
                assert!(
                    expected.is_err() || error.contains("written out"),
                    "{}: {error}",
                    method.name
                );
                continue;
            };
            let tolerance = match method.name {
                // These look at biases and signs layer by layer, and a scale is a layer more: they
                // may tell two forms of one function apart.
                "decompx" | "chefer" | "partial-lrp" | "full-lrp" => continue,
                // A stabiliser at every quotient, of which there is one more.
                "attnlrp" | "attnlrp-explicit" | "cp-lrp-explicit" => 1e-3,
                _ => 1e-8,
            };
            let scale = expected
                .scores
                .iter()
                .fold(1e-12, |m: f64, s| m.max(s.abs()));
            for (a, b) in found.scores.iter().zip(&expected.scores) {
                let most = tolerance * scale;
                assert!((a - b).abs() < most, "{}: {a} {b}", method.name);
            }
            compared += 1;
        }
    }
    assert!(compared > 25, "{compared}");
}

/// Streams sum to the logit, and backward relevance of linear rules is gradient times input.
#[test]
fn lenses_conserve_through_scales() {
    for spec in [ENCODER, DECODER, GATED] {
        let model = scaled(spec, 7);
        let input = tokens(&IDS);
        let rules = StreamRules::default();
        let explanation = decompx(&model, &input, None, Target::class(2), rules).unwrap();
        let account = explanation.account;
        assert!(account.unattributed.abs() < 1e-9 * account.explained.abs().max(1.0));
        let gradient = gradient_times_input(&model, &input, None, Target::class(2)).unwrap();
        assert!(gradient.scores.iter().any(|score| score.abs() > 1e-6));
    }
}

#[test]
fn a_scale_starts_at_its_number_and_must_be_one() {
    let text = DECODER.replace("repeat = 2", "repeat = 2\nlayer_scale = 1e-4");
    let spec: ModelSpec = toml::from_str(&text).unwrap();
    let fresh = Model::initialised(spec, 1, DType::F64, &Device::Cpu).unwrap();
    let scale = &fresh.parameters()["blocks.1.feedforward_scale.weight"];
    assert_eq!(scale.to_vec1::<f64>().unwrap(), [1e-4; 16]);
    let text = DECODER.replace("repeat = 2", "repeat = 2\nlayer_scale = nan");
    let spec: ModelSpec = toml::from_str(&text).unwrap();
    let error = spec.validate().unwrap_err().to_string();
    assert!(error.starts_with("blocks.0.layer_scale"), "{error}");
}
