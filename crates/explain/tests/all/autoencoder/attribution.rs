//! What features, heads and sources add.

use std::collections::BTreeMap;

use super::{IDS, SITE, lively, numbers, value_at};
use crate::common::{DECODER, ENCODER, GATED, model, tokens};
use lapidary_explain::Question;
use lapidary_explain::autoencoder::{
    Attention, Autoencoder, Split, head_shares, logit_effects, recursive_attribution,
    with_value_biases,
};
use lapidary_kernels::Tensor;
use lapidary_kernels::check::difference;

#[test]
fn attribution_is_complete_by_source_and_by_head() {
    for (spec, seed) in [(DECODER, 1), (GATED, 2), (ENCODER, 3)] {
        let model = model(spec, seed);
        let autoencoder = lively(SITE, 24, seed);
        let input = tokens(&IDS);
        let attention = Attention::new(&Question::new(&model, &input), &autoencoder).unwrap();
        let x = value_at(&model, SITE);
        let features = autoencoder.encode(&x).unwrap();
        let encoder = autoencoder.weights().encoder.clone();
        for feature in [0, 5, 23] {
            for position in [0, 3, 6] {
                let found = attention
                    .attribute(&autoencoder, feature, position)
                    .unwrap();
                assert!(found.completeness_error() < 1e-12);
                let sum: f64 = found.by_head().iter().sum();
                assert!((sum + found.constant - found.preactivation).abs() < 1e-12);
                // Each head's share is its output times its block of the encoder.
                let z = numbers(&x.get(0).unwrap().get(position).unwrap());
                let w = numbers(&encoder.get(feature).unwrap());
                for (head, share) in found.by_head().into_iter().enumerate() {
                    let part = 4 * head..4 * head + 4;
                    let direct: f64 = z[part.clone()]
                        .iter()
                        .zip(&w[part])
                        .map(|(a, b)| a * b)
                        .sum();
                    assert!((share - direct).abs() < 1e-12, "{head}");
                }
                let active = numbers(&features.get(0).unwrap().get(position).unwrap())[feature];
                assert!((found.activation() - active).abs() < 1e-12);
                // Causal models read no later token.
                if spec != ENCODER {
                    assert!(found.by_source()[position + 1..].iter().all(|s| *s == 0.0));
                }
            }
        }
        assert!(attention.attribute(&autoencoder, 24, 0).is_err());
        assert!(attention.attribute(&autoencoder, 0, 7).is_err());
    }
}

#[test]
fn attribution_of_another_site_is_refused() {
    let model = model(DECODER, 1);
    let input = tokens(&IDS);
    let question = Question::new(&model, &input);
    let error = Attention::new(&question, &lively("blocks.1.out", 24, 1)).unwrap_err();
    assert!(error.to_string().contains("attention.mixed"), "{error}");
    let error = Attention::new(&question, &lively("blocks.9.attention.mixed", 24, 1)).unwrap_err();
    assert!(error.to_string().contains("below 2"), "{error}");
}

/// Weights of heads do not say which token a value came from beside a filter, nor in blocks that see means of tokens; and
/// what one of two streams has is not all that was written.
#[test]
fn attribution_to_what_is_no_token_is_refused() {
    let both_ways = DECODER.replace("causal = true", "causal = false");
    let organised = |spec: &str, kind: &str| format!("{spec}\n[organisation]\nkind = \"{kind}\"\n");
    let means = organised(&both_ways, "vip-centric") + "vips = 2\nsize = 3\nfine = 1\n";
    let filtered = both_ways.replace("heads = 4", "heads = 4, local = { side = 3 }");
    let autoencoder = lively(SITE, 24, 1);
    let input = tokens(&IDS);
    for (spec, named) in [
        (&filtered, "a filter beside them"),
        (&means, "organisation of the model is vip-centric"),
    ] {
        let model = model(spec, 1);
        let error = Attention::new(&Question::new(&model, &input), &autoencoder).unwrap_err();
        assert!(error.to_string().contains(named), "{error}");
    }
    let streams = model(&organised(DECODER, "reversible"), 1);
    let question = Question::new(&streams, &input);
    assert!(Attention::new(&question, &autoencoder).is_ok());
    let error = recursive_attribution(&question, &autoencoder, 0, 1, &BTreeMap::new()).unwrap_err();
    let error = error.to_string();
    assert!(
        error.starts_with("organisation of the model is reversible"),
        "{error}"
    );
}

#[test]
fn parts_sum_to_what_is_split_however_it_is_split() {
    for (spec, seed) in [(DECODER, 4), (GATED, 5), (ENCODER, 6)] {
        let model = model(spec, seed);
        let autoencoder = lively(SITE, 24, seed);
        let input = tokens(&IDS);
        let question = Question::new(&model, &input);
        let earlier = Split::Features {
            autoencoder: lively("blocks.0.attention.mixed", 30, seed + 10),
            most: 4,
        };
        for split in [Split::Heads, Split::Sources(2), earlier, Split::Through] {
            let name = format!("{split:?}").chars().take(8).collect::<String>();
            let splits = BTreeMap::from([(0, split)]);
            let found = recursive_attribution(&question, &autoencoder, 7, 5, &splits).unwrap();
            let scale = found.parent.iter().fold(0.0, |m: f64, p| m.max(p.abs()));
            assert!(scale > 1e-3, "the parent is nothing to split");
            assert!(
                found.completeness_error() < 1e-10 * scale.max(1.0),
                "{name}: {} of {scale}",
                found.completeness_error()
            );
            assert_eq!(found.labels.len(), found.scores.len());
            // No part is an empty promise: several have a share.
            let counted = found
                .totals()
                .iter()
                .filter(|total| total.abs() > 1e-6)
                .count();
            // A model without biases has none that could have one.
            let least = if name == "Through" && spec == GATED {
                2
            } else {
                3
            };
            assert!(counted >= least, "{name}: {:?}", found.totals());
        }
        let late = BTreeMap::from([(1, Split::Heads)]);
        assert!(recursive_attribution(&question, &autoencoder, 7, 5, &late).is_err());
    }
}

/// A share is what is lost when the part's write is taken out of the source, attention weights
/// and the norm's deviation as they were: by hand for a pre-norm decoder's heads.
#[test]
fn a_head_gets_what_its_write_adds_by_hand() {
    let model = model(DECODER, 7);
    let autoencoder = lively(SITE, 24, 7);
    let input = tokens(&IDS);
    let question = Question::new(&model, &input);
    let (feature, position, source, head) = (3, 6, 2, 1);
    let found = recursive_attribution(&question, &autoencoder, feature, position, &BTreeMap::new())
        .unwrap();
    let index = found
        .labels
        .iter()
        .position(|label| label == "head 0.1")
        .unwrap();
    let parameter = |name: &str| model.parameters().get(name).unwrap().clone();
    let rows = |name: &str| parameter(name).to_vec2::<f64>().unwrap();
    let mixed = value_at(&model, "blocks.0.attention.mixed");
    let mixed = numbers(&mixed.get(0).unwrap().get(source).unwrap());
    let output = rows("blocks.0.attention.output.weight");
    let part = 4 * head..4 * head + 4;
    let written: Vec<f64> = output
        .iter()
        .map(|row| {
            row[part.clone()]
                .iter()
                .zip(&mixed[part.clone()])
                .map(|(a, b)| a * b)
                .sum()
        })
        .collect();
    let residual = value_at(&model, "blocks.1.in");
    let residual = numbers(&residual.get(0).unwrap().get(source).unwrap());
    let mean = residual.iter().sum::<f64>() / 16.0;
    let variance = residual.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / 16.0;
    let own_mean = written.iter().sum::<f64>() / 16.0;
    let scale = numbers(&parameter("blocks.1.attention_norm.weight"));
    let normed: Vec<f64> = written
        .iter()
        .zip(&scale)
        .map(|(w, g)| (w - own_mean) / (variance + 1e-5).sqrt() * g)
        .collect();
    let value: Vec<f64> = rows("blocks.1.attention.value.weight")
        .iter()
        .map(|row| row.iter().zip(&normed).map(|(a, b)| a * b).sum())
        .collect();
    let weights = value_at(&model, "blocks.1.attention.weights");
    let weights = weights.get(0).unwrap().to_vec3::<f64>().unwrap();
    let encoder = numbers(&autoencoder.weights().encoder.get(feature).unwrap());
    let by_hand: f64 = (0..4)
        .map(|k| {
            let part = 4 * k..4 * k + 4;
            let along: f64 = value[part.clone()]
                .iter()
                .zip(&encoder[part])
                .map(|(a, b)| a * b)
                .sum();
            weights[k][position][source] * along
        })
        .sum();
    assert!((found.scores[index][source] - by_hand).abs() < 1e-12);
    assert!(by_hand.abs() > 1e-6);
}

#[test]
fn logit_effects_go_through_the_frozen_final_norm_alone() {
    let model = model(DECODER, 8);
    let autoencoder = lively(SITE, 24, 8);
    let input = tokens(&IDS);
    let question = Question::new(&model, &input);
    let features = autoencoder.encode(&value_at(&model, SITE)).unwrap();
    let active = features.get(0).unwrap().get(4).unwrap();
    let feature = numbers(&active).iter().position(|f| *f > 0.1).unwrap();
    let effects = logit_effects(&question, &autoencoder, feature, 4).unwrap();
    let parameter = |name: &str| model.parameters().get(name).unwrap().clone();
    let multiply = |rows: Vec<Vec<f64>>, x: &[f64]| -> Vec<f64> {
        rows.iter()
            .map(|row| row.iter().zip(x).map(|(a, b)| a * b).sum())
            .collect()
    };
    let row = autoencoder.weights().decoder.get(feature).unwrap();
    let strength = numbers(&active)[feature];
    let direction: Vec<f64> = numbers(&row).iter().map(|v| v * strength).collect();
    let output = parameter("blocks.1.attention.output.weight")
        .to_vec2::<f64>()
        .unwrap();
    let written = multiply(output, &direction);
    let residual = value_at(&model, "blocks.1.out");
    let residual = numbers(&residual.get(0).unwrap().get(4).unwrap());
    let mean = residual.iter().sum::<f64>() / 16.0;
    let variance = residual.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / 16.0;
    let own_mean = written.iter().sum::<f64>() / 16.0;
    let scale = numbers(&parameter("final_norm.weight"));
    let normed: Vec<f64> = written
        .iter()
        .zip(&scale)
        .map(|(w, g)| (w - own_mean) / (variance + 1e-5).sqrt() * g)
        .collect();
    let table = parameter("embeddings.tokens.weight")
        .to_vec2::<f64>()
        .unwrap();
    for (found, by_hand) in effects.iter().zip(multiply(table, &normed)) {
        assert!((found - by_hand).abs() < 1e-10, "{found} {by_hand}");
    }
    assert!(effects.iter().any(|effect| effect.abs() > 1e-3));
}

#[test]
fn shares_of_the_decoder_sum_to_one_and_follow_its_blocks() {
    let model = model(GATED, 9);
    let autoencoder = lively(SITE, 24, 9);
    let shares = head_shares(&model, &autoencoder).unwrap();
    let decoder = autoencoder.weights().decoder.to_vec2::<f64>().unwrap();
    for (shares, row) in shares.iter().zip(decoder) {
        assert!((shares.iter().sum::<f64>() - 1.0).abs() < 1e-12);
        let length = |part: &[f64]| part.iter().map(|v| v * v).sum::<f64>().sqrt();
        let all: f64 = row.chunks(4).map(length).sum();
        assert!((shares[2] - length(&row[8..12]) / all).abs() < 1e-12);
    }
}

#[test]
fn features_see_what_they_saw_where_value_biases_were_folded() {
    for (spec, seed) in [(DECODER, 4), (GATED, 5)] {
        let model = model(spec, seed);
        let autoencoder = lively(SITE, 24, seed);
        let moved = with_value_biases(&model, &autoencoder).unwrap();
        let x = value_at(&model, SITE);
        // What a model without the biases of values writes there, at every position.
        let name = "blocks.1.attention.value.bias";
        let folded = match model.parameters().get(name) {
            Some(bias) => x.broadcast_sub(bias).unwrap(),
            None => x.clone(),
        };
        assert_eq!(model.parameters().contains_key(name), spec == DECODER);
        let expected = autoencoder.encode(&folded).unwrap();
        let found = moved.encode(&x).unwrap();
        assert!(difference(&expected, &found).unwrap() < 1e-12);
        // What is written is larger by the biases, as is what is read.
        let left = |autoencoder: &Autoencoder, x: &Tensor| {
            (x - autoencoder.reconstruct(x).unwrap()).unwrap()
        };
        let error = difference(&left(&autoencoder, &folded), &left(&moved, &x)).unwrap();
        assert!(error < 1e-12, "{error}");
    }
}
