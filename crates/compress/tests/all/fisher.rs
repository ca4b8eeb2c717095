//! What the Fisher information of a layer is, and what it is not.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;

use crate::common::{DECODER, altered, classifier, close, distance, model, values, windows};
use lapidary_compress::fisher::gram_input_sums;
use lapidary_compress::{
    Calibration, CalibrationData, CalibrationOptions, Example, Objective, Requirements, Statistic,
};
use lapidary_kernels::{Device, SoftmaxMask, Tensor, gather, log_softmax};
use lapidary_model::{Input, Model, Pass};
use lapidary_signal::Trace;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

fn inputs_of(layer: &str) -> Statistic {
    Statistic::FisherInputs {
        layer: layer.to_owned(),
    }
}

fn collect(
    model: &Model,
    data: &CalibrationData,
    statistics: &[Statistic],
    examples_per_gradient: usize,
) -> Calibration {
    let requirements = Requirements {
        statistics: statistics.iter().cloned().collect::<BTreeSet<_>>(),
    };
    let options = CalibrationOptions {
        examples_per_gradient,
        ..CalibrationOptions::default()
    };
    Calibration::collect(model, data, &requirements, options).unwrap()
}

/// Logistic regression on one-hot inputs of length `scale`, without bias in the scores:
/// `p(y | token) ∝ weight[y]` for every token.
fn regression(scale: &[f64], odds: &[f64]) -> Model {
    let (width, labels) = (scale.len(), odds.len());
    let base = model(&classifier(width, width, labels, false), 1);
    let table: Vec<f64> = (0..width * width)
        .map(|i| {
            if i / width == i % width {
                scale[i / width]
            } else {
                0.0
            }
        })
        .collect();
    let weight: Vec<f64> = odds
        .iter()
        .flat_map(|odds| scale.iter().map(move |scale| odds.ln() / scale))
        .collect();
    let shaped =
        |values: Vec<f64>, shape: &[usize]| Tensor::from_vec(values, shape, &Device::Cpu).unwrap();
    let base = altered(&base, "embeddings.tokens.weight", |_| {
        shaped(table.clone(), &[width, width])
    });
    let base = altered(&base, "head.output.weight", |_| {
        shaped(weight.clone(), &[labels, width])
    });
    altered(&base, "head.output.bias", |bias| bias.zeros_like().unwrap())
}

/// `Σ_y E[(p_y − [y = label])²] E[x_i²] = (1 − Σ_y p_y²) E[x_i²]` when labels follow the model.
fn analytic(scale: &[f64], odds: &[f64], frequency: &[f64]) -> Vec<f64> {
    let total: f64 = odds.iter().sum();
    let spread = 1.0 - odds.iter().map(|o| (o / total).powi(2)).sum::<f64>();
    scale
        .iter()
        .zip(frequency)
        .map(|(scale, frequency)| spread * scale * scale * frequency)
        .collect()
}

const SCALE: [f64; 3] = [0.5, 1.0, 2.0];
const ODDS: [f64; 3] = [1.0, 2.0, 5.0];

#[test]
fn of_logistic_regression_is_the_analytic_one_when_labels_have_the_models_frequencies() {
    let model = regression(&SCALE, &ODDS);
    let mut examples = Vec::new();
    for token in 0..3u32 {
        for (label, odds) in (0u32..).zip(ODDS) {
            for _ in 0..odds as usize {
                examples.push(Example::labelled([token], label));
            }
        }
    }
    let data = CalibrationData::new(examples).unwrap();
    let calibration = collect(&model, &data, &[inputs_of("head.output")], 1);
    assert_eq!(calibration.objective, Some(Objective::Label));
    let found = calibration.vector(&inputs_of("head.output")).unwrap();
    close(&found, &analytic(&SCALE, &ODDS, &[1.0 / 3.0; 3]), 1e-12);
}

#[test]
fn of_logistic_regression_converges_to_the_analytic_one() {
    let model = regression(&SCALE, &ODDS);
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let mut sample = |count: usize| {
        let examples = (0..count).map(|_| {
            let token = rng.random_range(0..3u32);
            let label = match rng.random_range(0..8) {
                0 => 0,
                1 | 2 => 1,
                _ => 2,
            };
            Example::labelled([token], label)
        });
        CalibrationData::new(examples.collect()).unwrap()
    };
    let expected = analytic(&SCALE, &ODDS, &[1.0 / 3.0; 3]);
    let mut error = |count: usize| {
        let calibration = collect(&model, &sample(count), &[inputs_of("head.output")], 1);
        let found = calibration.vector(&inputs_of("head.output")).unwrap();
        distance(&found, &expected)
    };
    assert!(error(8000) < 0.05);
    assert!(error(40) < 1.0);
}

/// `Σ_o G_oi²` from inputs and output gradients that the model's own sites give.
#[test]
fn gram_trick_equals_the_assembled_gradient() {
    let model = model(DECODER, 5);
    let pairs = [
        ("attention.in", "attention.query", "attention.query"),
        ("attention.in", "attention.key", "attention.key"),
        ("attention.in", "attention.value", "attention.value"),
        ("attention.mixed", "attention.out", "attention.output"),
        ("feedforward.hidden", "feedforward.out", "feedforward.down"),
    ];
    let ids = [3u32, 11, 5, 0, 19, 7, 3];
    let data = CalibrationData::windows([ids.to_vec()]).unwrap();
    let statistics: Vec<Statistic> = [0, 1]
        .iter()
        .flat_map(|block| pairs.map(|(.., layer)| inputs_of(&format!("blocks.{block}.{layer}"))))
        .collect();
    let calibration = collect(&model, &data, &statistics, 1);

    let mut trace = Trace::new();
    for block in [0, 1] {
        for (input, output, _) in pairs {
            trace = trace.tap(&format!("blocks.{block}.{input}")).unwrap();
            trace = trace.tap(&format!("blocks.{block}.{output}")).unwrap();
        }
    }
    let input = Input::tokens(Tensor::from_slice(&ids, (1, 7), &Device::Cpu).unwrap());
    let pass = Pass {
        trace: Some(&trace),
        ..Pass::default()
    };
    let logits = model.forward(&input, pass).unwrap().into_logits().unwrap();
    let scores = log_softmax(logits.value(), &SoftmaxMask::default()).unwrap();
    let scores = scores.narrow(1, 0, 6).unwrap().squeeze(0).unwrap();
    let next = Tensor::from_slice(&ids[1..], (6, 1), &Device::Cpu).unwrap();
    let loss = gather(&scores, &next, 1).unwrap().mean_all().unwrap();
    let gradients = loss.neg().unwrap().backward().unwrap();
    for block in [0, 1] {
        for (input, output, layer) in pairs {
            let x = trace.signal(&format!("blocks.{block}.{input}")).unwrap();
            let x = x.value().detach().squeeze(0).unwrap();
            let record = trace.record(&format!("blocks.{block}.{output}")).unwrap();
            let g = record.gradient(&gradients).unwrap().squeeze(0).unwrap();
            let gram = gram_input_sums(&x, &g).unwrap();
            let layer = inputs_of(&format!("blocks.{block}.{layer}"));
            let assembled = calibration.vector(&layer).unwrap();
            assert!(assembled.iter().any(|value| *value > 1e-8));
            close(&values(&gram), &assembled, 1e-10);
        }
    }
}

/// Over all pairs of different examples, the squared mean of two gradients is on average
/// `½ E[G²] + ½ E[G G']`, with `E[G G'] = ((Σ G)² − Σ G²) / (N (N − 1))`.
#[test]
fn squared_means_of_batches_shrink_as_predicted() {
    let model = model(DECODER, 6);
    let data = windows(5, 6);
    let layer = "blocks.1.feedforward.up";
    let sums = |data: &CalibrationData, size: usize| {
        let calibration = collect(&model, data, &[inputs_of(layer)], size);
        calibration.vector(&inputs_of(layer)).unwrap()
    };
    let count = data.len() as f64;
    let single = sums(&data, 1);
    let whole = sums(&data, data.len());
    let predicted: Vec<f64> = single
        .iter()
        .zip(&whole)
        .map(|(single, whole)| {
            // `whole` is (Σ G / N)², `single` is Σ G² / N.
            let cross = (whole * count * count - single * count) / (count * (count - 1.0));
            0.5 * single + 0.5 * cross
        })
        .collect();
    let mut measured = vec![0.0; single.len()];
    let mut pairs = 0.0;
    for first in 0..data.len() {
        for second in first + 1..data.len() {
            let pair = [first, second].map(|index| data.examples()[index].clone());
            let pair = CalibrationData::new(pair.to_vec()).unwrap();
            for (sum, value) in measured.iter_mut().zip(sums(&pair, 2)) {
                *sum += value;
            }
            pairs += 1.0;
        }
    }
    let measured: Vec<f64> = measured.iter().map(|sum| sum / pairs).collect();
    close(&measured, &predicted, 1e-10);
    // And the bias is no small thing.
    let (biased, unbiased): (f64, f64) = (measured.iter().sum(), single.iter().sum());
    assert!(biased < 0.8 * unbiased, "{biased} {unbiased}");
}

/// An example counts the same alone and beside a longer one.
#[test]
fn padding_changes_nothing() {
    let model = model(DECODER, 7);
    let long = Example::window([1u32, 2, 3, 4, 5, 6, 7, 8]);
    let short = Example::window([9u32, 10, 11]);
    let layer = "blocks.0.attention.query";
    let fisher = |examples: &[&Example]| {
        let examples = examples.iter().map(|example| (*example).clone()).collect();
        let data = CalibrationData::new(examples).unwrap();
        let count = data.len();
        let statistic = Statistic::Fisher {
            layer: layer.to_owned(),
        };
        let calibration = collect(&model, &data, std::slice::from_ref(&statistic), count);
        // The mean gradient's square; its root is the mean gradient but for signs.
        values(&calibration.tensor(&statistic).unwrap())
    };
    let (a, b) = (fisher(&[&long]), fisher(&[&short]));
    let both = fisher(&[&long, &short]);
    for ((a, b), both) in a.iter().zip(&b).zip(&both) {
        let sum = 0.5 * (a.sqrt() + b.sqrt());
        let difference = 0.5 * (a.sqrt() - b.sqrt()).abs();
        let found = both.sqrt();
        assert!((found - sum).abs() < 1e-12 || (found - difference).abs() < 1e-12);
    }

    let squares = |batch: usize| {
        let data = CalibrationData::new(vec![long.clone(), short.clone()]).unwrap();
        let statistics = [
            Statistic::InputSquares {
                site: "blocks.1.feedforward.hidden".to_owned(),
            },
            Statistic::Covariance {
                site: "blocks.1.attention.mixed".to_owned(),
            },
        ];
        let requirements = Requirements {
            statistics: statistics.iter().cloned().collect(),
        };
        let options = CalibrationOptions {
            batch,
            ..CalibrationOptions::default()
        };
        let calibration = Calibration::collect(&model, &data, &requirements, options).unwrap();
        let mut all = values(&calibration.tensor(&statistics[0]).unwrap());
        all.extend(values(&calibration.tensor(&statistics[1]).unwrap()));
        all
    };
    close(&squares(2), &squares(1), 1e-11);
}
