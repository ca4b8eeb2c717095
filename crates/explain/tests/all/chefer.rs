//! The relevancy of attention maps and its baselines.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use crate::common;
use crate::common::{DECODER, ENCODER, GATED, assert_near, model, tokens};
use lapidary_explain::{
    Evidence, Options, Question, Relevancy, Target, attention_rollout, chefer, explainer, full_lrp,
    full_lrp_pixels, patch_heat, relevancy_of_batch,
};
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::{Input, Model, ModelSpec};
use std::collections::BTreeMap;

/// A pre-norm vision transformer on 8×8 images of two channels.
const VISION: &str = r#"
width = 16
final_norm = { kind = "layer" }
[input]
kind = "patches"
image = [8, 8]
patch = 2
channels = 2
[[blocks]]
repeat = 3
attention = { kind = "multi-head", heads = 4 }
feedforward = { kind = "dense", hidden = 24 }
[head]
kind = "pooled"
labels = 5
"#;

const PATCHES: usize = 16;

fn images(count: usize) -> Input {
    let values: Vec<f64> = (0..count * 128)
        .map(|i| (i as f64 * 1.37 + (i as f64 * 0.11).cos()).sin() + 0.2)
        .collect();
    Input::Pixels(Tensor::from_vec(values, (count, 2, 8, 8), &Device::Cpu).unwrap())
}

#[test]
fn a_batch_gives_what_its_samples_give_alone() {
    let model = model(VISION, 31);
    let Input::Pixels(pixels) = images(3) else {
        return;
    };
    let targets = [2, 0, 4].map(Target::class);
    for evidence in [
        Evidence::RelevanceTimesGradient,
        Evidence::Relevance,
        Evidence::WeightsTimesGradient,
    ] {
        let method = Relevancy {
            evidence,
            start_layer: 1,
        };
        let input = Input::Pixels(pixels.clone());
        let question = Question::new(&model, &input);
        let together = relevancy_of_batch(&question, &targets, method).unwrap();
        for (index, (target, together)) in targets.iter().zip(&together).enumerate() {
            let one = Input::Pixels(pixels.narrow(0, index, 1).unwrap());
            let question = Question::new(&model, &one);
            let alone = relevancy_of_batch(&question, &[*target], method).unwrap();
            assert_near(&together.scores, &alone[0].scores, 1e-9, "batch");
            assert_eq!(together.scores.len(), PATCHES + 1);
            if evidence == Evidence::RelevanceTimesGradient {
                let found = chefer(&model, &one, None, *target, 1).unwrap();
                assert_near(&found.scores, &alone[0].scores, 1e-9, "one function");
            }
        }
        assert!(relevancy_of_batch(&question, &targets[..2], method).is_err());
    }
}

#[test]
fn classes_differ_where_the_method_knows_of_them() {
    let model = model(VISION, 32);
    let input = images(1);
    let question = Question::new(&model, &input);
    for (name, knows) in [
        ("chefer", true),
        ("attention-gradcam", true),
        ("partial-lrp", true),
        ("full-lrp", true),
        ("attention-rollout", false),
        ("raw-attention", false),
    ] {
        let of = |class| {
            let method = explainer(name).unwrap();
            let found = method
                .explain(&question, Target::class(class), &Options::default())
                .unwrap();
            assert!(found.scores.iter().all(|score| score.is_finite()), "{name}");
            found.scores
        };
        let (one, other) = (of(1), of(3));
        assert_eq!(one != other, knows, "{name}");
        assert_eq!(patch_heat(&model, &one).unwrap().len(), PATCHES);
        assert!(
            name == "full-lrp" || one.iter().all(|score| *score >= 0.0),
            "{name}"
        );
    }
}

/// Weights of pads are nought, and what would come of others does not count either.
#[test]
fn pads_change_no_map() {
    let model = model(DECODER, 34);
    let (alone, padded) = (tokens(&[3, 11, 0, 19, 7]), tokens(&[3, 11, 0, 19, 7, 2, 2]));
    let padding = Tensor::new(&[[1u8, 1, 1, 1, 1, 0, 0]], &Device::Cpu).unwrap();
    let alone = Question::new(&model, &alone);
    let padded = Question {
        padding: Some(&padding),
        ..Question::new(&model, &padded)
    };
    for name in ["attention-gradcam", "raw-attention", "attention-rollout"] {
        let method = explainer(name).unwrap();
        let mut sum = 0.0;
        for class in 0..20 {
            let target = Target::Score {
                class,
                foil: None,
                position: Some(4),
            };
            let of =
                |question: &Question<'_>| method.explain(question, target, &Options::default());
            let [one, other] = [&alone, &padded].map(|question| of(question).unwrap().scores);
            common::close(&one, &other[..5], 1e-10);
            assert_eq!(other[5..], [0.0; 2], "{name}");
            sum += one.iter().sum::<f64>();
        }
        assert!(sum > 0.0, "{name}");
    }
}

#[test]
fn every_family_is_explained_at_its_own_position() {
    let ids = [3, 11, 0, 19, 7];
    for spec in [ENCODER, DECODER, GATED] {
        let model = model(spec, 33);
        let input = tokens(&ids);
        let question = Question::new(&model, &input);
        let target = Target::Score {
            class: 1,
            foil: None,
            position: Some(2),
        };
        for name in [
            "chefer",
            "attention-rollout",
            "raw-attention",
            "attention-gradcam",
            "partial-lrp",
        ] {
            let method = explainer(name).unwrap();
            let found = method
                .explain(&question, target, &Options::default())
                .unwrap();
            assert_eq!(found.scores.len(), ids.len(), "{name}");
            match spec == ENCODER {
                // The first token stands for the whole.
                true => {
                    let least = found.scores[1..].iter().copied().fold(f64::MAX, f64::min);
                    assert_eq!(found.scores[0], least, "{name}");
                }
                false => assert_eq!(found.scores[3..], [0.0, 0.0], "{name}"),
            }
        }
        // The rows of a normalised product sum to one.
        if spec != ENCODER {
            let sum: f64 = attention_rollout(&question, target, 1)
                .unwrap()
                .scores
                .iter()
                .sum();
            assert!((sum - 1.0).abs() < 1e-12);
            let found = chefer(&model, &input, None, target, 0).unwrap();
            assert!((found.scores.iter().sum::<f64>() - 1.0).abs() < 1e-12);
        }
        let error = chefer(&model, &input, None, target, 2).unwrap_err();
        assert!(error.to_string().contains("start layer is 2"), "{error}");
    }
}

/// One layer of one head whose values are the tokens themselves: the map is the positive part of
/// gradient times relevance, and both can be written down.
#[test]
fn one_head_with_values_as_they_are() {
    const SPEC: &str = r#"
width = 4
[input]
kind = "patches"
image = [4, 4]
patch = 2
channels = 1
[[blocks]]
wiring = "post-norm"
norm = { kind = "none" }
attention = { kind = "multi-head", heads = 1, bias = false }
[head]
kind = "pooled"
labels = 2
bias = false
"#;
    let lively = model(SPEC, 34);
    let mut parameters: BTreeMap<String, Tensor> = lively.parameters().clone();
    let identity = Tensor::eye(4, DType::F64, &Device::Cpu).unwrap();
    for name in ["value", "output"] {
        parameters.insert(
            format!("blocks.0.attention.{name}.weight"),
            identity.clone(),
        );
    }
    let spec: ModelSpec = toml::from_str(SPEC).unwrap();
    let model = Model::new(spec, &mut parameters).unwrap();
    let pixels: Vec<f64> = (0..16).map(|i| (f64::from(i) * 0.7).sin()).collect();
    let input = Input::Pixels(Tensor::from_vec(pixels, (1, 1, 4, 4), &Device::Cpu).unwrap());
    let trace = lapidary_signal::Trace::new()
        .capture("embeddings")
        .unwrap()
        .capture("*attention.weights")
        .unwrap();
    let pass = lapidary_model::Pass {
        trace: Some(&trace),
        ..Default::default()
    };
    model.forward(&input, pass).unwrap();
    let captured = |site: &str| trace.signal(site).unwrap().into_value().get(0).unwrap();
    let x = captured("embeddings").to_vec2::<f64>().unwrap();
    let weights = captured("blocks.0.attention.weights");
    let weights = weights.get(0).unwrap().to_vec2::<f64>().unwrap();
    let head = model.parameters()["head.output.weight"]
        .to_vec2::<f64>()
        .unwrap();
    for (class, w) in head.iter().enumerate().take(2) {
        // The class token's output is x_0 + Σ_j A_0j x_j = x_0 + o.
        let mixed: Vec<f64> = (0..4)
            .map(|d| (0..5).map(|j| weights[0][j] * x[j][d]).sum())
            .collect();
        let y: Vec<f64> = (0..4).map(|d| x[0][d] + mixed[d]).collect();
        // α = 1: positive products share the 1.
        let positive: Vec<f64> = (0..4).map(|d| (y[d] * w[d]).max(0.0)).collect();
        let total: f64 = positive.iter().sum();
        let of_y: Vec<f64> = positive.iter().map(|p| p / total).collect();
        let raw = |part: &[f64]| -> Vec<f64> { (0..4).map(|d| part[d] * of_y[d] / y[d]).collect() };
        let (of_x, of_mixed) = (raw(&x[0]), raw(&mixed));
        let [sum_x, sum_mixed] = [&of_x, &of_mixed].map(|part| part.iter().sum::<f64>());
        let rescale = sum_mixed.abs() / (sum_x.abs() + sum_mixed.abs()) / sum_mixed;
        // The output projection is the identity: where its one product is negative, no positive
        // part is there to take the relevance.
        let of_mixed: Vec<f64> = (0..4)
            .map(|d| {
                if mixed[d] > 0.0 {
                    of_mixed[d] * rescale
                } else {
                    0.0
                }
            })
            .collect();
        let expected: Vec<f64> = (0..5)
            .map(|j| {
                let gradient: f64 = (0..4).map(|d| w[d] * x[j][d]).sum();
                let relevance: f64 = (0..4)
                    .map(|d| weights[0][j] * x[j][d] * of_mixed[d] / mixed[d] / 2.0)
                    .sum();
                (gradient * relevance).max(0.0)
            })
            .collect();
        let found = chefer(&model, &input, None, Target::class(class), 0).unwrap();
        for (found, expected) in found.scores[1..].iter().zip(&expected[1..]) {
            assert!((found - expected).abs() < 1e-6, "{found} {expected}");
        }
    }
}

#[test]
fn pixels_get_the_relevance_of_their_patches() {
    let model = model(VISION, 35);
    let input = images(1);
    let question = Question::new(&model, &input);
    let pixels = full_lrp_pixels(&question, Target::class(2)).unwrap();
    assert_eq!(pixels.len(), 64);
    assert!(pixels.iter().all(|pixel| pixel.is_finite()));
    let tokens = full_lrp(&question, Target::class(2)).unwrap().scores;
    // Positions take a part of each patch's share: what is left has the sign of the whole.
    let (of_pixels, of_patches): (f64, f64) = (pixels.iter().sum(), tokens[1..].iter().sum());
    assert!(of_pixels * of_patches > 0.0);
    assert!(
        of_pixels.abs() <= of_patches.abs() + 1e-6,
        "{of_pixels} {of_patches}"
    );
    let text = common::model(ENCODER, 1);
    let input = common::tokens(&[1, 2]);
    assert!(full_lrp_pixels(&Question::new(&text, &input), Target::class(0)).is_err());
}
