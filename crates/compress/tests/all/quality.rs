//! Perplexity, agreement and accuracy.
#![allow(clippy::unwrap_used)]

use crate::common::{DECODER, all, altered, close, labelled, model, scores, windows};
use lapidary_compress::quality::{
    Window, accuracy, agreement, block_errors, block_errors_after, ensemble_perplexity, likeness,
    perplexity, sliding_windows,
};
use lapidary_compress::{Content, Recipe, Settings, Target};
use lapidary_kernels::{Device, Tensor};
use lapidary_model::{Input, Pass};

/// `log p` of every token but the first, from the scores of one window.
fn log_likelihoods(scores: &[f64], ids: &[u32]) -> Vec<f64> {
    scores
        .chunks(20)
        .zip(&ids[1..])
        .map(|(row, next)| {
            let sum: f64 = row.iter().map(|score| score.exp()).sum();
            row[*next as usize] - sum.ln()
        })
        .collect()
}

#[test]
fn perplexity_is_the_exponential_of_the_mean_loss_whatever_the_batch() {
    let model = model(DECODER, 3);
    let data = windows(7, 3);
    let mut sum = 0.0;
    let mut count = 0;
    let mut cut = Vec::new();
    for example in data.examples() {
        let Content::Tokens { ids, .. } = &example.content else {
            continue;
        };
        let one = lapidary_compress::CalibrationData::windows([ids.clone()]).unwrap();
        let terms = log_likelihoods(&scores(&model, &one), ids);
        // The first three tokens are context.
        sum -= terms.iter().skip(2).sum::<f64>();
        count += ids.len() - 3;
        cut.push(Window {
            tokens: ids.clone(),
            context: 3,
        });
    }
    for batch in [1, 3, 7] {
        let found = perplexity(&model, &cut, batch).unwrap();
        assert_eq!((found.tokens, found.windows), (count, 7));
        close(&[found.value], &[(sum / count as f64).exp()], 1e-12);
    }
}

/// Probabilities are averaged, not scores, over the draws of the seeds, which are averaged here by
/// another way.
#[test]
fn an_ensemble_averages_what_its_draws_say() {
    let drawing = DECODER.replace(
        "causal = true",
        "causal = true, scale = 9.0, mechanism = { kind = 'subsampled', keep = 0.3 }",
    );
    let model = model(&drawing, 3);
    let cut: Vec<Window> = (0..6u32)
        .map(|window| Window {
            tokens: (0..9).map(|i| (7 * window + 3 * i * i + i) % 20).collect(),
            context: 2,
        })
        .collect();
    let (members, seed) = (4, 11);
    for batch in [1, 6] {
        let found = ensemble_perplexity(&model, &cut, batch, (members, seed)).unwrap();
        let mut terms = vec![Vec::new(); members];
        for chunk in cut.chunks(batch) {
            let ids: Vec<u32> = chunk.iter().flat_map(|w| w.tokens.clone()).collect();
            let length = chunk[0].tokens.len();
            let ids = Tensor::from_vec(ids, (chunk.len(), length), &Device::Cpu).unwrap();
            for (member, terms) in terms.iter_mut().enumerate() {
                let pass = Pass {
                    draw: Some(seed + member as u64),
                    ..Pass::default()
                };
                let output = model.forward(&Input::tokens(ids.clone()), pass).unwrap();
                let logits = output.into_logits().unwrap().into_value();
                let logits: Vec<f64> = logits.flatten_all().unwrap().to_vec1().unwrap();
                for (window, scores) in chunk.iter().zip(logits.chunks(length * 20)) {
                    // The first two tokens are context.
                    terms.extend(log_likelihoods(scores, &window.tokens).into_iter().skip(1));
                }
            }
        }
        let tokens = terms[0].len();
        let mean = |x: &[f64]| x.iter().sum::<f64>() / x.len() as f64;
        for (count, together) in (1..).zip(&found.together) {
            let each: Vec<f64> = (0..tokens)
                .map(|token| {
                    let said: Vec<f64> = terms[..count].iter().map(|t| t[token].exp()).collect();
                    -mean(&said).ln()
                })
                .collect();
            close(&[*together], &[mean(&each).exp()], 1e-12);
        }
        assert_eq!(found.together.len(), members);
        close(&[found.alone], &[(-mean(&terms.concat())).exp()], 1e-12);
        let deviations: Vec<f64> = (0..tokens)
            .map(|token| {
                let said: Vec<f64> = terms.iter().map(|t| t[token].exp()).collect();
                let off: Vec<f64> = said.iter().map(|p| (p - mean(&said)).powi(2)).collect();
                mean(&off).sqrt()
            })
            .collect();
        assert!((found.deviation - mean(&deviations)).abs() < 1e-9);
        assert!(found.deviation > 1e-4);
        // Jensen: together is never worse than alone.
        assert!(found.together[members - 1] < found.alone);
    }
    let none = ensemble_perplexity(&model, &cut, 2, (0, 1)).unwrap_err();
    assert!(
        none.to_string().contains("members of an ensemble is 0"),
        "{none}"
    );
    let drawless = self::model(DECODER, 3);
    let same = ensemble_perplexity(&drawless, &cut, 2, (2, 1)).unwrap_err();
    assert!(
        same.to_string().contains("draws nothing at random"),
        "{same}"
    );
    assert!(ensemble_perplexity(&drawless, &cut, 2, (1, 1)).is_ok());
}

#[test]
fn sliding_windows_score_each_token_once() {
    let text: Vec<u32> = (0..53).map(|i| i % 20).collect();
    for (length, stride) in [(12, 11), (12, 4), (12, 1), (2, 1), (60, 7)] {
        let cut = sliding_windows(&text, length, stride).unwrap();
        let scored: usize = cut.iter().map(|w| w.tokens.len() - w.context).sum();
        assert_eq!(scored, 52, "{length} {stride}");
        assert!(
            cut.iter()
                .all(|w| w.tokens.len() <= length && w.context >= 1)
        );
        let rebuilt: Vec<u32> = cut
            .iter()
            .flat_map(|w| w.tokens[w.context..].to_vec())
            .collect();
        assert_eq!(rebuilt, text[1..]);
    }
    for (length, stride) in [(1, 1), (4, 0), (4, 4)] {
        assert!(sliding_windows(&text, length, stride).is_err());
    }
    assert!(sliding_windows(&text[..1], 4, 2).is_err());
}

#[test]
fn a_model_agrees_with_itself_and_not_with_another() {
    for (name, model, data) in all() {
        let same = agreement(&model, &model, &data, 4).unwrap();
        assert_eq!((same.divergence, same.top1), (0.0, 1.0), "{name}");
        let expected = match name {
            "encoder" => data.len(),
            _ => data.tokens(),
        };
        assert_eq!(same.predictions, expected);
    }
    let (one, other) = (model(DECODER, 1), model(DECODER, 2));
    let data = windows(5, 9);
    let found = agreement(&one, &other, &data, 2).unwrap();
    let (p, q) = (scores(&one, &data), scores(&other, &data));
    let (mut divergence, mut same) = (0.0, 0.0);
    for (p, q) in p.chunks(20).zip(q.chunks(20)) {
        let total = |row: &[f64]| row.iter().map(|s| s.exp()).sum::<f64>().ln();
        let (tp, tq) = (total(p), total(q));
        divergence += p
            .iter()
            .zip(q)
            .map(|(p, q)| (p - tp).exp() * ((p - tp) - (q - tq)))
            .sum::<f64>();
        let best = |row: &[f64]| (0..20).max_by(|a, b| row[*a].total_cmp(&row[*b]));
        same += f64::from(u8::from(best(p) == best(q)));
    }
    let count = data.tokens() as f64;
    close(&[found.divergence], &[divergence / count], 1e-11);
    close(&[found.top1], &[same / count], 1e-12);
    assert!(agreement(&one, &all().remove(0).1, &data, 2).is_err());
}

#[test]
fn accuracy_counts_what_is_right() {
    let (_, model, _) = all().remove(0);
    let data = labelled(20, 3, 5);
    let right = scores(&model, &data)
        .chunks(3)
        .zip(data.examples())
        .filter(|(row, example)| {
            let best = (0..3usize)
                .max_by(|a, b| row[*a].total_cmp(&row[*b]))
                .unwrap();
            example.target == Target::Label(best as u32)
        })
        .count();
    assert_eq!(accuracy(&model, &data, 6).unwrap(), right as f64 / 20.0);
    assert!(accuracy(&model, &windows(2, 1), 2).is_err());
    let error = perplexity(&model, &[], 2).unwrap_err();
    assert!(error.to_string().contains("causal"));
}

#[test]
fn likeness_is_that_of_the_hidden_vectors_token_by_token() {
    let (one, other) = (model(DECODER, 3), model(DECODER, 4));
    let data = windows(5, 3);
    let hidden = |model: &lapidary_model::Model| -> Vec<Vec<f64>> {
        let mut rows = Vec::new();
        for example in data.examples() {
            let Content::Tokens { ids, .. } = &example.content else {
                continue;
            };
            let device = lapidary_kernels::Device::Cpu;
            let ids = lapidary_kernels::Tensor::from_slice(ids, (1, ids.len()), &device).unwrap();
            let input = lapidary_model::Input::tokens(ids);
            let output = model.forward(&input, Default::default()).unwrap();
            rows.extend(
                output
                    .hidden
                    .value()
                    .get(0)
                    .unwrap()
                    .to_vec2::<f64>()
                    .unwrap(),
            );
        }
        rows
    };
    let (mut cosine, mut error, mut size) = (0.0, 0.0, 0.0);
    let (a, b) = (hidden(&one), hidden(&other));
    for (a, b) in a.iter().zip(&b) {
        let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
        cosine += dot(a, b) / (dot(a, a) * dot(b, b)).sqrt();
        error += a.iter().zip(b).map(|(x, y)| (x - y).powi(2)).sum::<f64>();
        size += dot(a, a);
    }
    for batch in [1, 2, 5] {
        let found = likeness(&one, &other, &data, batch).unwrap();
        assert_eq!(found.vectors, a.len());
        close(&[found.cosine], &[cosine / a.len() as f64], 1e-12);
        close(&[found.relative_error], &[(error / size).sqrt()], 1e-12);
        let same = likeness(&one, &one, &data, batch).unwrap();
        close(&[same.cosine], &[1.0], 1e-12);
        assert_eq!(same.relative_error, 0.0);
    }
}

/// Blocks that are left are compared with those that they were.
#[test]
fn streams_are_compared_block_by_block_with_what_was_there() {
    let spec = DECODER.replace("repeat = 2", "repeat = 4");
    let (whole, data) = (model(&spec, 4), windows(6, 3));
    assert_eq!(block_errors(&whole, &whole, &data, 4).unwrap(), [0.0; 4]);
    let done = Recipe::of("block-influence", "0.25")
        .unwrap()
        .run(&whole, Some(&data), &Settings::default())
        .unwrap();
    let compressed = &done[0].compressed;
    let left = compressed.report.blocks_left(&[0, 1, 2, 3]);
    assert_eq!(left.len(), 3);
    let gone = (0..4).find(|block| !left.contains(block)).unwrap();
    let errors = block_errors_after(&whole, &compressed.model, &left, &data, 4).unwrap();
    for (block, error) in left.iter().zip(&errors) {
        // Before the first that is gone nothing has changed.
        assert_eq!(*error == 0.0, *block < gone, "{block} of {left:?}: {error}");
    }
    // By number alone there are too few, and a block that is not there says nothing.
    let other = &compressed.model;
    assert!(block_errors(&whole, other, &data, 4).unwrap().is_empty());
    assert!(
        block_errors_after(&whole, other, &[0, 1, 4], &data, 4)
            .unwrap()
            .is_empty()
    );
    // A second stage counts from what the first one left.
    assert_eq!(compressed.report.blocks_left(&[7, 8, 9, 10]).len(), 3);
}

/// Of models that differ by the last digits, what is left of a divergence is rounding, which has either sign.
#[test]
fn no_divergence_is_below_zero() {
    for seed in 0..16 {
        let one = model(DECODER, seed);
        let other = altered(&one, "blocks.0.attention.query.weight", |weight| {
            (weight * (1.0 + 1e-15)).unwrap()
        });
        let found = agreement(&one, &other, &windows(4, seed), 2).unwrap();
        assert!((0.0..1e-12).contains(&found.divergence), "{found:?}");
    }
}
