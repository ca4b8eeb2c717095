//! The exact properties of DecompX and of direct logit attribution.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use crate::common::{DECODER, ENCODER, GATED, close, model, tokens};
use lapidary_explain::{
    Target, decompx, direct_logit_attribution, gradient_times_input, relevance,
};
use lapidary_kernels::{Device, Tensor, check::difference};
use lapidary_model::{Input, Model, Pass};
use lapidary_signal::Trace;
use lapidary_signal::relevance::RelevanceRules;
use lapidary_signal::streams::{BiasSite, BiasSplit, Partition, Slope, StreamRules};

const IDS: [u32; 7] = [3, 11, 5, 0, 19, 7, 3];

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

/// A trace that starts streams at the embeddings and keeps `sites`.
fn streaming(partition: Partition, rules: StreamRules, sites: &str) -> Trace {
    Trace::new()
        .replace("embeddings", move |_, signal| {
            signal.into_streams(partition.clone(), rules)
        })
        .unwrap()
        .capture(sites)
        .unwrap()
}

fn pass(model: &Model, trace: &Trace) {
    let pass = Pass {
        trace: Some(trace),
        ..Pass::default()
    };
    model.forward(&tokens(&IDS), pass).unwrap();
}

/// Contributions to the scores, `[streams, classes]`, the streams being groups of tokens.
fn score_contributions(model: &Model, groups: Partition, rules: StreamRules) -> Vec<Vec<f64>> {
    let trace = streaming(groups, rules, "logits");
    pass(model, &trace);
    let contributions = trace.signal("logits").unwrap().contributions().unwrap();
    let contributions = contributions.squeeze(1).unwrap();
    let contributions = match contributions.dims() {
        // Of a language model, the scores at the last position.
        [_, length, _] => contributions.get_on_dim(1, length - 1).unwrap(),
        _ => contributions,
    };
    contributions.to_vec2::<f64>().unwrap()
}

/// `Σ_h α^h_ik x_k W_V^h W_O^h + δ_ik x_k` (Kobayashi et al., arXiv 2004.10102).
#[test]
fn one_bare_layer_gives_the_vectors_of_kobayashi() {
    let spec = r#"
        width = 8
        [input]
        kind = "tokens"
        vocabulary = 20
        length = 12
        [[blocks]]
        norm = { kind = "none" }
        attention = { kind = "multi-head", heads = 2, bias = false }
    "#;
    let model = model(spec, 11);
    let rules = StreamRules::default();
    let trace = streaming(
        Partition::positions(IDS.len()),
        rules,
        "{embeddings,blocks.0.attention.weights,blocks.0.out}",
    );
    pass(&model, &trace);
    let x = trace.signal("embeddings").unwrap().into_value();
    let x = x.squeeze(0).unwrap().to_vec2::<f64>().unwrap();
    let alpha = trace.signal("blocks.0.attention.weights").unwrap();
    let alpha = alpha.value().squeeze(0).unwrap().to_vec3::<f64>().unwrap();
    let matrix = |name: &str| {
        let name = format!("blocks.0.attention.{name}.weight");
        model.parameters()[&name].to_vec2::<f64>().unwrap()
    };
    let (values, output) = (matrix("value"), matrix("output"));
    let found = trace.signal("blocks.0.out").unwrap();
    let found = found.contributions().unwrap().squeeze(1).unwrap();
    let found = found.to_vec3::<f64>().unwrap();
    for k in 0..IDS.len() {
        for i in 0..IDS.len() {
            for d in 0..8 {
                let mut expected = if i == k { x[k][d] } else { 0.0 };
                for (h, alpha) in alpha.iter().enumerate() {
                    for e in 4 * h..4 * (h + 1) {
                        let v: f64 = (0..8).map(|c| x[k][c] * values[e][c]).sum();
                        expected += alpha[i][k] * v * output[d][e];
                    }
                }
                assert!((found[k][i][d] - expected).abs() < 1e-12);
            }
        }
    }
}

#[test]
fn streams_of_groups_are_sums_where_the_scheme_is_linear_and_only_there() {
    let groups = [0, 0, 1, 2, 1, 1, 0];
    for (spec, seed) in [(ENCODER, 12), (GATED, 13)] {
        let model = model(spec, seed);
        let difference_under = |bias| {
            let rules = StreamRules {
                bias,
                ..StreamRules::default()
            };
            let apart = score_contributions(&model, Partition::positions(IDS.len()), rules);
            let grouped = score_contributions(&model, Partition::groups(groups.to_vec()), rules);
            let mut sums = vec![vec![0.0; apart[0].len()]; grouped.len()];
            for (token, scores) in apart.iter().enumerate() {
                // The stream of the biases comes last in both.
                let group = groups.get(token).copied().unwrap_or(grouped.len() - 1);
                for (sum, score) in sums[group].iter_mut().zip(scores) {
                    *sum += score;
                }
            }
            let pairs = sums.iter().flatten().zip(grouped.iter().flatten());
            pairs.fold(0.0, |worst: f64, (a, b)| worst.max((a - b).abs()))
        };
        for bias in [BiasSplit::Drop, BiasSplit::Extra] {
            assert!(difference_under(bias) < 1e-10, "{bias:?}");
        }
        if spec == ENCODER {
            assert!(difference_under(BiasSplit::AbsoluteDot) > 1e-3);
        }
    }
}

/// `relu(x) / x` is the gate `1[x > 0]`, which is also the tangent, with no intercept.
#[test]
fn the_secant_of_relu_is_its_gate() {
    let spec = ENCODER.replace("hidden = 24", "hidden = 24, activation = \"relu\"");
    let spec = spec.replace("hidden = \"tanh\"", "hidden = \"relu\"");
    let model = model(&spec, 14);
    let scores = |activation| {
        let rules = StreamRules {
            activation,
            ..StreamRules::default()
        };
        decompx(&model, &tokens(&IDS), None, Target::class(2), rules)
            .unwrap()
            .scores
    };
    close(&scores(Slope::Secant), &scores(Slope::Tangent), 1e-12);

    let trace = streaming(
        Partition::positions(IDS.len()),
        StreamRules::default(),
        "blocks.0.feedforward.{in,hidden}",
    );
    pass(&model, &trace);
    let input = trace.signal("blocks.0.feedforward.in").unwrap();
    let up = lapidary_signal::Linear::new(
        model.parameters()["blocks.0.feedforward.up.weight"].clone(),
        Some(model.parameters()["blocks.0.feedforward.up.bias"].clone()),
    )
    .unwrap();
    let before = input.linear(&up).unwrap();
    let gate = before.value().gt(0.0).unwrap();
    let gate = gate.to_dtype(before.dtype()).unwrap();
    let expected = before
        .contributions()
        .unwrap()
        .broadcast_mul(&gate)
        .unwrap();
    let hidden = trace.signal("blocks.0.feedforward.hidden").unwrap();
    let found = hidden.contributions().unwrap();
    assert!(difference(&found, &expected).unwrap() < 1e-12);
}

#[test]
fn scores_are_the_contributions_to_the_score() {
    for (spec, seed) in [(ENCODER, 15), (DECODER, 16), (GATED, 17)] {
        let model = model(spec, seed);
        let rules = StreamRules::default();
        let trace = streaming(Partition::positions(IDS.len()), rules, "logits");
        pass(&model, &trace);
        let logits = trace.signal("logits").unwrap();
        let contributions = logits.contributions().unwrap();
        let last = match contributions.dims() {
            [_, _, length, _] => contributions.narrow(2, length - 1, 1).unwrap(),
            _ => contributions.unsqueeze(2).unwrap(),
        };
        for class in 0..3 {
            let expected = last.narrow(3, class, 1).unwrap().flatten_all().unwrap();
            let expected = expected.to_vec1::<f64>().unwrap();
            let found = decompx(&model, &tokens(&IDS), None, Target::class(class), rules).unwrap();
            close(&found.scores, &expected, 1e-12);
        }
    }
}

#[test]
fn mean_pooling_is_explained_like_any_other() {
    let spec = ENCODER.replace("kind = \"pooled\"", "kind = \"pooled\"\npool = \"mean\"");
    let model = model(&spec, 18);
    let rules = StreamRules::default();
    for class in 0..3 {
        let found = decompx(&model, &tokens(&IDS), None, Target::class(class), rules).unwrap();
        assert!(found.account.unattributed.abs() < 1e-10);
        let all = score_contributions(&model, Partition::positions(IDS.len()), rules);
        let expected: Vec<f64> = all.iter().map(|scores| scores[class]).collect();
        close(&found.scores, &expected, 1e-12);
    }
}
