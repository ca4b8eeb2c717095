//! Checkpoints of every family.

use super::{STRUCTURED, WEIGHTS, sparsity};
use crate::common::{cut_by, family, image};
use lapidary_compress::{CalibrationData, Content, Example, Settings, Target};
use lapidary_model::{InputSpec, Model, OpenOptions, Package};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

fn data_of(model: &Model) -> CalibrationData {
    let mut random = ChaCha8Rng::seed_from_u64(3);
    let labels = match &model.spec().head {
        lapidary_model::HeadSpec::Pooled { labels, .. } => *labels,
        _ => None,
    };
    let sees_both = matches!(
        model.spec().head,
        lapidary_model::HeadSpec::LanguageModel { .. }
    ) && !model.spec().is_causal();
    let examples = (0..6).map(|index| {
        let content = match &model.spec().input {
            InputSpec::Patches(patches) => {
                image(patches, |_| random.random_range(-1.0..1.0)).content
            }
            InputSpec::Tokens(tokens) => Content::Tokens {
                ids: (0..8)
                    .map(|_| random.random_range(2..tokens.vocabulary as u32))
                    .collect(),
                types: None,
            },
        };
        Example {
            content,
            target: match labels {
                Some(labels) => Target::Label(index % labels as u32),
                None if sees_both => {
                    Target::Tokens((0..8).map(|i| (i % 3 == 0).then_some(5)).collect())
                }
                None => Target::None,
            },
        }
    });
    CalibrationData::new(examples.collect()).unwrap()
}

#[test]
fn every_family_is_pruned_or_says_why_not() {
    for name in [
        "gpt2",
        "opt",
        "llama",
        "mistral",
        "qwen2",
        "bert-classifier",
        "bert-masked-lm",
        "roberta-classifier",
        "vit",
        "mamba",
        "mixtral",
    ] {
        let package = Package::open(&family(name), &OpenOptions::default()).unwrap();
        let model = package.single_model().unwrap();
        let data = data_of(model);
        for method in WEIGHTS.into_iter().chain(STRUCTURED) {
            let found = cut_by(model, &data, method, 0.5, &Settings::default());
            match (name, method) {
                ("mamba", "prune-heads") => {
                    let error = found.err().unwrap().to_string();
                    assert!(
                        error.contains("multi-head attention for prune-heads"),
                        "{error}"
                    );
                }
                ("mamba", "channel-gradient") => {
                    let error = found.err().unwrap().to_string();
                    assert!(error.contains("without hidden features"), "{error}");
                }
                (_, method) if STRUCTURED.contains(&method) => {
                    let report = found.unwrap().report;
                    assert!(
                        report.after.parameters < report.before.parameters,
                        "{name} {method}"
                    );
                }
                _ => {
                    let pruned = sparsity(&found.unwrap().model);
                    assert!((pruned - 0.5).abs() < 0.03, "{name} {method}: {pruned}");
                }
            }
        }
    }
}
