//! The exact properties of DecompX and of direct logit attribution.

mod common;

use common::{DECODER, ENCODER, GATED, model, tokens};
use lapidary_explain::{
    Target, decompx, direct_logit_attribution, gradient_times_input, relevance,
};
use lapidary_kernels::{Device, Tensor};
use lapidary_model::Input;
use lapidary_signal::relevance::RelevanceRules;
use lapidary_signal::streams::{BiasSite, BiasSplit, Slope, StreamRules};

const IDS: [u32; 7] = [3, 11, 5, 0, 19, 7, 3];

fn close(a: &[f64], b: &[f64], tolerance: f64) {
    assert_eq!(a.len(), b.len());
    let scale = a.iter().chain(b).fold(1e-30, |m: f64, v| m.max(v.abs()));
    for (x, y) in a.iter().zip(b) {
        assert!((x - y).abs() <= tolerance * scale, "{a:?}\n{b:?}");
    }
}

#[test]
fn streams_sum_to_the_value_at_every_site_and_to_the_logit() {
    for (name, spec) in [("encoder", ENCODER), ("decoder", DECODER), ("gated", GATED)] {
        let model = model(spec, 1);
        for bias in BiasSplit::ALL {
            if matches!(bias, BiasSplit::Drop | BiasSplit::Dot) {
                continue;
            }
            for bias_site in [BiasSite::Residual, BiasSite::Attention] {
                for activation in [Slope::Secant, Slope::Tangent] {
                    let rules = StreamRules {
                        bias,
                        bias_site,
                        activation,
                        ..StreamRules::default()
                    };
                    let explanation =
                        decompx(&model, &tokens(&IDS), None, Target::class(1), rules).unwrap();
                    let site_error = explanation.account.largest_site_error.unwrap();
                    assert!(site_error < 1e-10, "{name} {rules:?}: {site_error}");
                    assert!(
                        explanation.account.unattributed.abs() < 1e-10,
                        "{name} {rules:?}"
                    );
                    assert!(explanation.scores.iter().any(|score| score.abs() > 1e-3));
                }
            }
        }
    }
}

/// Without biases, streams pushed forward equal relevance pulled backward through the same
/// network with attention weights, deviations and secants detached.
#[test]
fn without_biases_streams_equal_value_only_relevance() {
    let rules = StreamRules {
        bias: BiasSplit::Drop,
        ..StreamRules::default()
    };
    for (spec, seed) in [(ENCODER, 2), (DECODER, 3), (GATED, 4)] {
        let model = model(spec, seed);
        for class in [0, 2] {
            let target = Target::Score {
                class,
                foil: Some(1),
                position: None,
            };
            let forward = decompx(&model, &tokens(&IDS), None, target, rules).unwrap();
            let backward = relevance(
                &model,
                &tokens(&IDS),
                None,
                target,
                RelevanceRules::value_only(),
            )
            .unwrap();
            close(&forward.scores, &backward.scores, 1e-9);
        }
    }
}

#[test]
fn a_single_token_gets_the_whole_logit() {
    for spec in [ENCODER, DECODER, GATED] {
        let explanation = decompx(
            &model(spec, 5),
            &tokens(&[4]),
            None,
            Target::class(2),
            StreamRules::default(),
        )
        .unwrap();
        close(&explanation.scores, &[explanation.account.explained], 1e-12);
    }
}

#[test]
fn padding_changes_no_score_and_gets_none() {
    let model = model(ENCODER, 6);
    let alone = decompx(
        &model,
        &tokens(&IDS),
        None,
        Target::class(0),
        StreamRules::default(),
    )
    .unwrap();
    let mut ids = IDS.to_vec();
    ids.extend([1, 2]);
    let padding = Tensor::new(&[[1u8, 1, 1, 1, 1, 1, 1, 0, 0]], &Device::Cpu).unwrap();
    let padded = decompx(
        &model,
        &tokens(&ids),
        Some(&padding),
        Target::class(0),
        StreamRules::default(),
    )
    .unwrap();
    close(&padded.scores[..IDS.len()], &alone.scores, 1e-10);
    assert!(
        padded.scores[IDS.len()..]
            .iter()
            .all(|score| score.abs() < 1e-12)
    );
}

#[test]
fn permuting_tokens_permutes_scores_where_positions_do_not_enter() {
    let spec = ENCODER.replace("position = { kind = \"learned\" }\n", "");
    let model = model(&spec, 7);
    let order = [0, 4, 1, 6, 2, 5, 3];
    let permuted: Vec<u32> = order.iter().map(|index| IDS[*index]).collect();
    let rules = StreamRules::default();
    let before = decompx(&model, &tokens(&IDS), None, Target::class(1), rules).unwrap();
    let after = decompx(&model, &tokens(&permuted), None, Target::class(1), rules).unwrap();
    let expected: Vec<f64> = order.iter().map(|index| before.scores[*index]).collect();
    close(&after.scores, &expected, 1e-10);
}

/// With no bias, no norm, one identity activation and constant attention the model is linear,
/// and every method is gradient times input.
#[test]
fn on_a_linear_model_every_method_is_gradient_times_input() {
    let spec = r#"
        width = 8
        [input]
        kind = "tokens"
        vocabulary = 20
        length = 12
        [[blocks]]
        norm = { kind = "none" }
        attention = { kind = "multi-head", heads = 2, bias = false, scale = 0.0 }
        feedforward = { kind = "dense", hidden = 12, activation = "identity", bias = false }
        [head]
        kind = "pooled"
        pool = "mean"
        labels = 3
        bias = false
    "#;
    let model = model(spec, 8);
    let input = tokens(&IDS);
    let reference = gradient_times_input(&model, &input, None, Target::class(1)).unwrap();
    close(
        &[reference.account.attributed],
        &[reference.account.explained],
        1e-10,
    );
    let streams = decompx(
        &model,
        &input,
        None,
        Target::class(1),
        StreamRules::default(),
    )
    .unwrap();
    close(&streams.scores, &reference.scores, 1e-10);
    let rules = RelevanceRules::value_only();
    let other = relevance(&model, &input, None, Target::class(1), rules).unwrap();
    close(&other.scores, &reference.scores, 1e-10);
}

#[test]
fn components_sum_to_the_logit() {
    for spec in [ENCODER, DECODER, GATED] {
        let explanation =
            direct_logit_attribution(&model(spec, 9), &tokens(&IDS), None, Target::class(1))
                .unwrap();
        assert_eq!(explanation.labels.len(), 6);
        assert_eq!(explanation.scores.len(), 6);
        assert!(explanation.account.unattributed.abs() < 1e-10);
        assert!(explanation.account.largest_site_error.unwrap() < 1e-10);
        assert!(explanation.scores[..5].iter().all(|score| *score != 0.0));
    }
}

#[test]
fn a_target_that_does_not_exist_is_refused_by_name() {
    let model = model(ENCODER, 10);
    let error = decompx(
        &model,
        &tokens(&IDS),
        None,
        Target::class(3),
        StreamRules::default(),
    )
    .unwrap_err();
    assert_eq!(
        error.to_string(),
        "target class is 3, but must be below 3, the number of scores"
    );
    let input = Input::tokens(Tensor::new(&[[99u32]], &Device::Cpu).unwrap());
    let error = decompx(
        &model,
        &input,
        None,
        Target::class(0),
        StreamRules::default(),
    )
    .unwrap_err();
    assert_eq!(error.to_string(), "input_ids is 99, but must be below 20");
}
