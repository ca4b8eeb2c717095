//! The exact properties of sparse autoencoders: training, splicing, attribution.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use crate::common::{DECODER, ENCODER, GATED, model, tokens};
use lapidary_explain::Question;
use lapidary_explain::autoencoder::{
    Attention, Autoencoder, Centre, Edit, Quality, Replacement, Split, Training, TrainingOptions,
    edited, geometric_median, head_shares, load, logit_effects, recovery, recursive_attribution,
    save, splice, train, with_value_biases,
};
use lapidary_kernels::check::difference;
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::{Model, Pass};
use lapidary_signal::Trace;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::collections::BTreeMap;

const IDS: [u32; 7] = [3, 11, 5, 0, 19, 7, 3];
const SITE: &str = "blocks.1.attention.mixed";

fn generator(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}

/// An autoencoder of a width of 16 whose every parameter matters, in f64.
fn lively(site: &str, features: usize, seed: u64) -> Autoencoder {
    let mut generator = generator(seed);
    let mut of = |shape: &[usize]| {
        let count: usize = shape.iter().product();
        let values: Vec<f64> = (0..count)
            .map(|_| generator.random_range(-0.5..0.5))
            .collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    };
    Autoencoder::new(
        site,
        of(&[features, 16]),
        of(&[features]),
        of(&[features, 16]),
        of(&[16]),
    )
    .unwrap()
}

fn logits(model: &Model, trace: Option<&Trace>) -> Tensor {
    let pass = Pass {
        trace,
        ..Pass::default()
    };
    let output = model.forward(&tokens(&IDS), pass).unwrap();
    output.into_logits().unwrap().into_value()
}

fn value_at(model: &Model, site: &str) -> Tensor {
    let trace = Trace::new().capture(site).unwrap();
    logits(model, Some(&trace));
    trace.signal(site).unwrap().into_value()
}

fn numbers(tensor: &Tensor) -> Vec<f64> {
    let flat = tensor.flatten_all().unwrap().to_dtype(DType::F64).unwrap();
    flat.to_vec1::<f64>().unwrap()
}

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
fn changing_no_feature_changes_no_bit() {
    for (spec, seed) in [(DECODER, 10), (GATED, 11), (ENCODER, 12)] {
        let model = model(spec, seed);
        let autoencoder = lively(SITE, 24, seed);
        let trace = splice(Trace::new(), &autoencoder, |features| Ok(features.clone())).unwrap();
        let clean = logits(&model, None);
        assert_eq!(
            difference(&logits(&model, Some(&trace)), &clean).unwrap(),
            0.0
        );
        // The reconstruction with its error added is the same number, but for rounding.
        let x = value_at(&model, SITE);
        let reconstruction = autoencoder.reconstruct(&x).unwrap();
        let again = (&reconstruction + (&x - &reconstruction).unwrap()).unwrap();
        assert!(difference(&again, &x).unwrap() < 1e-12);
    }
}

#[test]
fn edits_change_what_they_name_and_nothing_else() {
    let model = model(DECODER, 13);
    let autoencoder = lively(SITE, 24, 13);
    let x = value_at(&model, SITE);
    let features = autoencoder.encode(&x).unwrap();
    let edits = vec![
        Edit::zero(2).at([1, 4]),
        Edit::pin(5, 3.0),
        Edit {
            feature: 6,
            positions: Some(vec![0]),
            value: Replacement::From((&features + 1.0).unwrap()),
        },
    ];
    let wanted = edited(&features, &edits).unwrap();
    let (before, after) = (
        features.get(0).unwrap().to_vec2::<f64>().unwrap(),
        wanted.get(0).unwrap().to_vec2::<f64>().unwrap(),
    );
    for position in 0..7 {
        for feature in 0..24 {
            let expected = match (feature, position) {
                (2, 1 | 4) => 0.0,
                (5, _) => 3.0,
                (6, 0) => before[position][feature] + 1.0,
                _ => before[position][feature],
            };
            assert_eq!(after[position][feature], expected);
        }
    }
    let trace = splice(Trace::new(), &autoencoder, move |f| edited(f, &edits))
        .unwrap()
        .capture(SITE)
        .unwrap();
    logits(&model, Some(&trace));
    let spliced = trace.signal(SITE).unwrap().into_value();
    // x̂(f') + (x − x̂(f))
    let error = (&x - autoencoder.decode(&features).unwrap()).unwrap();
    let expected = (autoencoder.decode(&wanted).unwrap() + error).unwrap();
    assert!(difference(&spliced, &expected).unwrap() < 1e-12);
    for wrong in [Edit::zero(24), Edit::zero(0).at([7])] {
        assert!(edited(&features, &[wrong]).is_err());
    }
    let wrong = splice(Trace::new(), &autoencoder, |f| edited(f, &[Edit::zero(24)])).unwrap();
    let pass = Pass {
        trace: Some(&wrong),
        ..Pass::default()
    };
    assert!(model.forward(&tokens(&IDS), pass).is_err());
}

#[test]
fn zeros_recover_nothing_and_the_value_everything() {
    for (spec, seed) in [(DECODER, 14), (GATED, 15)] {
        let model = model(spec, seed);
        let windows = vec![IDS.to_vec(), vec![1, 2, 3, 4, 5]];
        let zeros = recovery(&model, SITE, &windows, |x| Ok(x.zeros_like()?)).unwrap();
        assert_eq!(zeros.recovered(), 0.0);
        let same = recovery(&model, SITE, &windows, |x| Ok(x.clone())).unwrap();
        assert_eq!(same.recovered(), 1.0);
        assert_eq!(same.increase(), 0.0);
        // Mean over predicted tokens, windows of unequal length included.
        let one = recovery(&model, SITE, &windows[..1], |x| Ok(x.clone())).unwrap();
        let two = recovery(&model, SITE, &windows[1..], |x| Ok(x.clone())).unwrap();
        let together = (6.0 * one.clean + 4.0 * two.clean) / 10.0;
        assert!((same.clean - together).abs() < 1e-12);
        let elsewhere = recovery(&model, "blocks.7.out", &windows, |x| Ok(x.clone()));
        assert!(elsewhere.is_err());
    }
    let encoder = model(ENCODER, 16);
    assert!(recovery(&encoder, SITE, &[IDS.to_vec()], |x| Ok(x.clone())).is_err());
}

#[test]
fn quality_counts_what_is_active() {
    let model = model(DECODER, 17);
    let autoencoder = lively(SITE, 24, 17);
    let quality = Quality::of(&model, &autoencoder, &[IDS.to_vec()]).unwrap();
    let features = autoencoder.encode(&value_at(&model, SITE)).unwrap();
    let active = numbers(&features).iter().filter(|f| **f > 0.0).count();
    assert!((quality.l0 - active as f64 / 7.0).abs() < 1e-12);
    assert_eq!(quality.tokens, 7);
    let dead = quality.frequencies.iter().filter(|f| **f == 0.0).count();
    assert_eq!(quality.dead, dead as f64 / 24.0);
    let in_bins: usize = quality.histogram().iter().map(|(_, count)| count).sum();
    assert_eq!(in_bins, 24 - dead);
}

#[test]
fn no_features_reconstruct_the_bias() {
    let autoencoder = lively(SITE, 24, 18);
    let none = Tensor::zeros((3, 24), DType::F64, &Device::Cpu).unwrap();
    let decoded = autoencoder.decode(&none).unwrap();
    let bias = autoencoder
        .weights()
        .decoder_bias
        .broadcast_as((3, 16))
        .unwrap();
    assert_eq!(difference(&decoded, &bias).unwrap(), 0.0);
}

fn row_lengths(autoencoder: &Autoencoder) -> Vec<f64> {
    numbers(&autoencoder.weights().decoder.sqr().unwrap().sum(1).unwrap())
        .iter()
        .map(|square| square.sqrt())
        .collect()
}

fn random(rows: usize, width: usize, seed: u64) -> Tensor {
    let mut generator = generator(seed);
    let values: Vec<f32> = (0..rows * width)
        .map(|_| generator.random_range(-1.0..1.0))
        .collect();
    Tensor::from_vec(values, (rows, width), &Device::Cpu).unwrap()
}

fn options() -> TrainingOptions {
    TrainingOptions {
        sparsity: 0.05,
        batch: 256,
        warm_up: 10,
        ..TrainingOptions::default()
    }
}

#[test]
fn rows_of_the_decoder_have_length_one_after_every_step() {
    let start = Autoencoder::initialised(SITE, 16, 40, &mut generator(1)).unwrap();
    let mut training = Training::new(&start, options()).unwrap();
    for step in 0..20 {
        training.step(&random(256, 16, step)).unwrap();
        let lengths = row_lengths(&training.autoencoder().unwrap());
        assert!(
            lengths.iter().all(|length| (length - 1.0).abs() < 1e-6),
            "{step}"
        );
    }
}

#[test]
fn without_sparsity_and_with_room_the_error_goes_away() {
    let start = Autoencoder::initialised(SITE, 8, 32, &mut generator(2)).unwrap();
    let options = TrainingOptions {
        sparsity: 0.0,
        rate: 5e-3,
        ..options()
    };
    let mut training = Training::new(&start, options).unwrap();
    let first = training.step(&random(256, 8, 0)).unwrap().squared_error;
    let mut last = first;
    for step in 1..3000 {
        last = training.step(&random(256, 8, step)).unwrap().squared_error;
    }
    assert!(last < 1e-2 * first, "{first} to {last}");
}

#[test]
fn resampling_changes_dead_features_only_and_they_fire_on_their_example() {
    let start = Autoencoder::initialised(SITE, 16, 40, &mut generator(3)).unwrap();
    let options = TrainingOptions {
        beta1: 0.9,
        ..options()
    };
    let mut training = Training::new(&start, options).unwrap();
    for step in 0..5 {
        training.step(&random(256, 16, step)).unwrap();
    }
    let before = training.autoencoder().unwrap();
    let x = random(300, 16, 99);
    let dead = [4usize, 17, 39];
    let resampled = training.resample(&x, &dead, &mut generator(4)).unwrap();
    assert_eq!(resampled, dead);
    let after = training.autoencoder().unwrap();
    let rows = |tensor: &Tensor| tensor.to_vec2::<f32>().unwrap();
    let (old, new) = (before.weights(), after.weights());
    for feature in 0..40 {
        let same = rows(old.encoder)[feature] == rows(new.encoder)[feature]
            && rows(old.decoder)[feature] == rows(new.decoder)[feature];
        assert_eq!(same, !dead.contains(&feature), "{feature}");
    }
    assert_eq!(difference(old.decoder_bias, new.decoder_bias).unwrap(), 0.0);
    // Each fires on an example whose direction it took.
    let centred = x.broadcast_sub(new.decoder_bias).unwrap();
    let lengths = centred
        .sqr()
        .unwrap()
        .sum_keepdim(1)
        .unwrap()
        .sqrt()
        .unwrap();
    let cosines = centred
        .broadcast_div(&lengths)
        .unwrap()
        .matmul(&new.decoder.t().unwrap())
        .unwrap();
    let features = after.encode(&x).unwrap();
    let living: Vec<f64> = (0..40)
        .filter(|feature| !dead.contains(feature))
        .map(|feature| {
            let row = numbers(&new.encoder.get(feature).unwrap());
            row.iter().map(|v| v * v).sum::<f64>().sqrt()
        })
        .collect();
    let length = 0.2 * living.iter().sum::<f64>() / living.len() as f64;
    for feature in dead {
        let of = |tensor: &Tensor| numbers(&tensor.narrow(1, feature, 1).unwrap());
        let cosines = of(&cosines);
        let example = (0..300)
            .max_by(|a, b| cosines[*a].total_cmp(&cosines[*b]))
            .unwrap();
        assert!(
            (cosines[example] - 1.0).abs() < 1e-5,
            "{}",
            cosines[example]
        );
        assert!(of(&features)[example] > 0.0);
        let row = numbers(&new.encoder.get(feature).unwrap());
        let own = row.iter().map(|v| v * v).sum::<f64>().sqrt();
        assert!((own - length).abs() < 1e-5, "{own} {length}");
        assert_eq!(numbers(new.encoder_bias)[feature], 0.0);
    }
    // The optimiser remembers nothing of them: with a mean of gradients, a step in which a
    // feature is not active leaves a forgotten one alone and moves the others.
    let far = (Tensor::ones((4, 16), DType::F32, &Device::Cpu).unwrap() * 0.0).unwrap();
    let inactive = numbers(&after.encode(&far).unwrap());
    training.step(&far).unwrap();
    let then = training.autoencoder().unwrap();
    for feature in dead.into_iter().filter(|f| inactive[*f] == 0.0) {
        let (old, new) = (new.encoder, then.weights().encoder);
        assert_eq!(rows(old)[feature], rows(new)[feature], "{feature}");
    }
}

#[test]
fn dead_features_are_found_and_the_warm_up_starts_again() {
    let mut start = lively(SITE, 6, 19).to_dtype(DType::F32).unwrap();
    // Feature 3 can never be active.
    let bias = Tensor::new(&[5f32, 5.0, 5.0, -1e4, 5.0, 5.0], &Device::Cpu).unwrap();
    let weights = start.weights();
    let (encoder, decoder) = (weights.encoder.clone(), weights.decoder.clone());
    let centre = weights.decoder_bias.clone();
    start = Autoencoder::new(SITE, encoder, bias, decoder, centre).unwrap();
    let options = TrainingOptions {
        steps: 100,
        resample_every: 8,
        warm_up: 4,
        ..options()
    };
    let mut training = Training::new(&start, options).unwrap();
    let mut rates = Vec::new();
    for step in 0..8 {
        assert!(!training.resampling_is_due());
        rates.push(training.step(&random(64, 16, step)).unwrap().rate);
    }
    assert!(training.resampling_is_due());
    assert_eq!(training.dead(), [3]);
    assert!((rates[0] - 1.2e-4).abs() < 1e-12 && rates[7] == 1.2e-3);
    assert!(rates.windows(2).all(|two| two[0] <= two[1]));
    training
        .resample(&random(64, 16, 9), &[3], &mut generator(5))
        .unwrap();
    let again = training.step(&random(64, 16, 10)).unwrap().rate;
    assert_eq!(again, rates[0]);
}

#[test]
fn a_planted_dictionary_is_found() {
    let (width, truths, rows) = (24, 64, 512);
    let mut generator = generator(20);
    let directions = {
        let values: Vec<f32> = (0..truths * width)
            .map(|_| {
                let normal: f32 = (0..12).map(|_| generator.random_range(-0.5f32..0.5)).sum();
                normal
            })
            .collect();
        let all = Tensor::from_vec(values, (truths, width), &Device::Cpu).unwrap();
        lapidary_kernels::unit_rows(&all).unwrap()
    };
    let sample = |generator: &mut ChaCha8Rng| {
        let mut mixing = vec![0f32; rows * truths];
        for row in mixing.chunks_exact_mut(truths) {
            for feature in rand::seq::index::sample(generator, truths, 3) {
                row[feature] = generator.random_range(0.5..1.5);
            }
        }
        let mixing = Tensor::from_vec(mixing, (rows, truths), &Device::Cpu).unwrap();
        mixing.matmul(&directions).unwrap()
    };
    let options = TrainingOptions {
        sparsity: 0.25,
        rate: 3e-3,
        beta2: 0.999,
        batch: rows,
        steps: 4000,
        warm_up: 100,
        resample_every: 1000,
        resamplings: 3,
        dead_frequency: 1e-4,
        ..TrainingOptions::default()
    };
    let start = Autoencoder::initialised("anywhere", width, 2 * truths, &mut generator).unwrap();
    let mut training = Training::new(&start, options).unwrap();
    while training.steps() < 4000 {
        if training.resampling_is_due() {
            let dead = training.dead();
            let x = Tensor::cat(&[sample(&mut generator), sample(&mut generator)], 0).unwrap();
            training.resample(&x, &dead, &mut generator).unwrap();
        }
        let x = sample(&mut generator);
        training.step(&x).unwrap();
    }
    let found = training.autoencoder().unwrap();
    let cosines = directions
        .matmul(&found.weights().decoder.t().unwrap())
        .unwrap();
    let best = numbers(&cosines.max(1).unwrap());
    let mean = best.iter().sum::<f64>() / truths as f64;
    assert!(mean >= 0.9, "mean of the largest cosines: {mean}");
}

#[test]
fn a_model_trains_an_autoencoder_the_same_way_from_the_same_seed() {
    let model = model(DECODER, 21);
    let windows =
        || (0u32..400).map(|i| (0..8).map(|j| (i * 7 + j * j) % 20).collect::<Vec<u32>>());
    let options = TrainingOptions {
        sparsity: 0.02,
        batch: 64,
        steps: 30,
        warm_up: 5,
        buffer_batches: 4,
        resample_every: 10,
        resample_batches: 2,
        dead_frequency: 0.01,
        centre: Centre::GeometricMedian,
        ..TrainingOptions::default()
    };
    let run = |seed: u64| {
        let mut heard = 0;
        let found = train(
            &model,
            SITE,
            48,
            windows(),
            &options,
            &mut generator(seed),
            |_| heard += 1,
        );
        let found = found.unwrap();
        assert_eq!(heard, found.history.len());
        found
    };
    let (first, again, other) = (run(1), run(1), run(2));
    let encoder = |run: &lapidary_explain::autoencoder::TrainedAutoencoder| {
        run.autoencoder.weights().encoder.clone()
    };
    assert_eq!(difference(&encoder(&first), &encoder(&again)).unwrap(), 0.0);
    assert!(difference(&encoder(&first), &encoder(&other)).unwrap() > 0.0);
    let (start, end) = (&first.history[0], first.history.last().unwrap());
    assert!(end.squared_error < start.squared_error);
    // No windows, no training.
    let none = std::iter::empty();
    assert!(train(&model, SITE, 48, none, &options, &mut generator(1), |_| ()).is_err());
}

#[test]
fn the_geometric_median_minimises_the_sum_of_distances() {
    let x = random(101, 5, 22).to_dtype(DType::F64).unwrap();
    let median = geometric_median(&x).unwrap();
    let sum = |point: &Tensor| {
        let squares = x
            .broadcast_sub(point)
            .unwrap()
            .sqr()
            .unwrap()
            .sum(1)
            .unwrap();
        numbers(&squares).iter().map(|s| s.sqrt()).sum::<f64>()
    };
    let least = sum(&median);
    for seed in 0..20 {
        let step = (random(1, 5, 100 + seed).to_dtype(DType::F64).unwrap() * 0.01).unwrap();
        let moved = (&median + step.squeeze(0).unwrap()).unwrap();
        assert!(sum(&moved) > least);
    }
    // One point far away hardly moves it, unlike the mean.
    let far = Tensor::cat(
        &[x.clone(), Tensor::full(1e6, (1, 5), &Device::Cpu).unwrap()],
        0,
    )
    .unwrap();
    assert!(difference(&geometric_median(&far).unwrap(), &median).unwrap() < 0.1);
}

#[test]
fn what_is_saved_is_read_again_bit_for_bit() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("sae");
    let autoencoder = Autoencoder::initialised(SITE, 16, 40, &mut generator(23)).unwrap();
    save(&autoencoder, &path).unwrap();
    let again = load(&path, None).unwrap();
    assert_eq!(again.site(), SITE);
    let (a, b) = (autoencoder.weights(), again.weights());
    for (a, b) in [
        (a.encoder, b.encoder),
        (a.encoder_bias, b.encoder_bias),
        (a.decoder, b.decoder),
        (a.decoder_bias, b.decoder_bias),
    ] {
        assert_eq!(difference(a, b).unwrap(), 0.0);
    }
    assert!(
        save(&autoencoder, &path).is_err(),
        "a directory with files is kept"
    );
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
