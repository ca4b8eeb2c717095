//! Relevance in both forms, where it leaks, and inside the model.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use crate::common::{DECODER, ENCODER, GATED, assert_near, model, tokens};
use lapidary_explain::{Explanation, Question, Target, full_lrp, latent_relevance, relevance};
use lapidary_model::{Model, ModelSpec};
use lapidary_signal::relevance::{ProductRule, RelevanceRules};
use std::collections::BTreeMap;

const IDS: [u32; 5] = [3, 11, 0, 19, 7];

fn target(spec: &str) -> Target {
    match spec == ENCODER {
        true => Target::class(1),
        false => Target::Score {
            class: 4,
            foil: Some(9),
            position: Some(3),
        },
    }
}

fn exact(rules: RelevanceRules) -> RelevanceRules {
    RelevanceRules {
        epsilon: 0.0,
        ..rules
    }
}

fn explain(model: &Model, target: Target, rules: RelevanceRules) -> Explanation {
    relevance(model, &tokens(&IDS), None, target, rules).unwrap()
}

#[test]
fn both_forms_give_the_same_scores_and_leaks() {
    for spec in [ENCODER, DECODER, GATED] {
        let model = model(spec, 5);
        for rules in [
            RelevanceRules::attention_aware(),
            RelevanceRules::value_only(),
            RelevanceRules {
                product: ProductRule::Detach,
                ..RelevanceRules::value_only()
            },
            RelevanceRules::gradient_times_input(),
        ] {
            let rules = exact(rules);
            let modified = explain(&model, target(spec), rules);
            let explicit = explain(&model, target(spec), rules.explicit());
            assert_near(&explicit.scores, &modified.scores, 1e-9, "scores");
            let explained = |e: &Explanation| [e.account.explained];
            assert_near(
                &explained(&explicit),
                &explained(&modified),
                1e-12,
                "number",
            );
            let lost = |e: &Explanation| -> Vec<f64> {
                e.account.leaks.iter().map(|leak| leak.lost()).collect()
            };
            // Some leaks are zero but for rounding: they are measured by what is explained.
            let scale = modified.account.explained.abs();
            for (explicit, modified) in lost(&explicit).iter().zip(lost(&modified)) {
                let error = (explicit - modified).abs() / scale;
                assert!(error < 1e-8, "leaks: {explicit} {modified}");
            }
        }
    }
}

#[test]
fn leaks_add_up_to_what_no_token_got() {
    for spec in [ENCODER, DECODER, GATED] {
        let model = model(spec, 6);
        for rules in [
            RelevanceRules::attention_aware(),
            RelevanceRules::value_only(),
            RelevanceRules::attention_aware().explicit(),
        ] {
            let found = explain(&model, target(spec), rules);
            let names: Vec<&str> = found
                .account
                .leaks
                .iter()
                .map(|leak| leak.part.as_str())
                .collect();
            assert_eq!(names[0], "head");
            assert_eq!(names[1], "blocks.1.feedforward");
            assert_eq!(names[2], "blocks.1.attention");
            assert_eq!(names[3], "blocks.1.rest");
            assert_eq!(names.len(), 7);
            let lost: f64 = found.account.leaks.iter().map(|leak| leak.lost()).sum();
            let account = &found.account;
            let error = (lost - account.unattributed).abs() / account.explained.abs();
            assert!(error < 1e-9, "{lost} {account:?}");
        }
    }
}

/// A model whose biases are all zero.
fn without_biases(spec: &str, seed: u64) -> Model {
    let original = model(spec, seed);
    let mut parameters: BTreeMap<_, _> = original.parameters().clone();
    for (name, tensor) in &mut parameters {
        if name.ends_with("bias") {
            *tensor = tensor.zeros_like().unwrap();
        }
    }
    let spec: ModelSpec = toml::from_str(spec).unwrap();
    Model::new(spec, &mut parameters).unwrap()
}

#[test]
fn without_biases_values_keep_everything_and_softmaxes_do_not() {
    for spec in [ENCODER, DECODER, GATED] {
        let model = without_biases(spec, 7);
        for product in [ProductRule::Uniform, ProductRule::Detach] {
            let rules = RelevanceRules {
                product,
                ..RelevanceRules::value_only()
            };
            for rules in [rules, rules.explicit()] {
                let found = explain(&model, target(spec), rules);
                let leak = found.account.unattributed / found.account.explained;
                assert!(leak.abs() < 1e-9, "{leak}");
                for leak in &found.account.leaks {
                    let lost = leak.lost() / found.account.explained;
                    assert!(lost.abs() < 1e-9, "{leak:?}");
                }
            }
        }
        let found = explain(
            &model,
            target(spec),
            exact(RelevanceRules::attention_aware()),
        );
        for leak in &found.account.leaks {
            let lost = leak.lost() / found.account.explained;
            let is_attention = leak.part.ends_with("attention");
            assert_eq!(lost.abs() > 1e-9, is_attention, "{leak:?}");
        }
    }
}

#[test]
fn later_tokens_get_nothing_and_contrasts_are_differences() {
    for spec in [DECODER, GATED] {
        let model = model(spec, 8);
        for rules in [
            RelevanceRules::attention_aware().explicit(),
            RelevanceRules::deep_taylor(),
        ] {
            let at = |class, foil| {
                let target = Target::Score {
                    class,
                    foil,
                    position: Some(2),
                };
                explain(&model, target, rules).scores
            };
            let contrast = at(4, Some(9));
            assert_eq!(contrast[3..], [0.0, 0.0]);
            if rules == RelevanceRules::deep_taylor() {
                continue;
            }
            let difference: Vec<f64> = at(4, None)
                .iter()
                .zip(at(9, None))
                .map(|(class, foil)| class - foil)
                .collect();
            assert_near(&contrast, &difference, 1e-9, "contrast");
        }
    }
}

#[test]
fn relevance_inside_adds_up_to_relevance_at_the_ends() {
    for spec in [ENCODER, DECODER, GATED] {
        let model = model(spec, 9);
        let input = tokens(&IDS);
        let question = Question::new(&model, &input);
        for rules in [
            exact(RelevanceRules::attention_aware()),
            RelevanceRules::value_only().explicit(),
        ] {
            let inside = latent_relevance(&question, target(spec), rules).unwrap();
            assert_eq!(inside.tokens.len(), 3);
            assert_eq!(inside.heads.len(), 2);
            let ends = explain(&model, target(spec), rules);
            assert_near(&inside.tokens[0], &ends.scores, 1e-9, "embeddings");
            for (block, heads) in inside.heads.iter().enumerate() {
                assert_eq!(heads.len(), 4);
                assert_eq!(inside.neurons[block].len(), 24);
                // The output projection lies between: only its bias keeps something.
                let name = format!("blocks.{block}.attention");
                let leak = inside.leaks.iter().find(|leak| leak.part == name).unwrap();
                if spec == GATED {
                    assert_near(&[heads.iter().sum()], &[leak.arrived], 1e-9, "heads");
                }
                let total: f64 = inside.tokens[block].iter().sum();
                let rest = format!("blocks.{block}.rest");
                let rest = inside.leaks.iter().find(|leak| leak.part == rest).unwrap();
                assert_near(&[total], &[rest.passed], 1e-9, "tokens");
            }
        }
    }
}

/// The deep Taylor rules keep the 1 that the outputs start with at every boundary of layers.
#[test]
fn positive_parts_conserve_from_layer_to_layer() {
    for spec in [ENCODER, DECODER, GATED] {
        let model = model(spec, 10);
        let input = tokens(&IDS);
        let class = match target(spec) {
            Target::Score {
                class, position, ..
            } => Target::Score {
                class,
                foil: None,
                position,
            },
            other => other,
        };
        let found = full_lrp(&Question::new(&model, &input), class).unwrap();
        for leak in &found.account.leaks {
            assert!(leak.lost().abs() < 1e-3, "{leak:?}");
        }
        assert!((found.account.attributed - 1.0).abs() < 1e-3, "{found:?}");
    }
}
