//! Runs that keep the weights of the least validation loss.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use lapidary_kernels::Device;
use lapidary_model::{Model, OpenOptions, Package};
use lapidary_train::data::{Order, TokenFile, TokenWriter, Windows, split};
use lapidary_train::{Finished, TrainSpec, Trainer, run};
use serde_json::json;

const STEPS: u64 = 8;
const EVERY: u64 = 2;
const FRACTION: f64 = 0.1;

/// Of a token file, with an average, which is what is validated.
fn spec(tokens: &Path, keep: &str) -> TrainSpec {
    serde_json::from_value(json!({
        "seed": 3, "steps": STEPS, "batch": 2, "length": 8, "average": 0.5,
        "schedule": { "peak": 5e-2, "decay": "constant" },
        "data": { "kind": "tokens", "file": tokens },
        "validation": { "batches": 2, "fraction": FRACTION, "every": EVERY, "keep": keep },
        "checkpoint": { "every": 3, "keep": 9 },
        "model": {
            "width": 8,
            "input": { "kind": "tokens", "vocabulary": 4, "length": 8 },
            "blocks": [{
                "attention": { "kind": "multi-head", "heads": 2, "causal": true, "dropout": 0.1 },
                "feedforward": { "kind": "dense", "hidden": 8 }
            }],
            "head": { "kind": "language-model", "tied": false, "bias": true }
        }
    }))
    .unwrap()
}

/// 400 tokens, in training 1 and 2 in turns, and for validation the same or another alone, which training makes ever
/// less likely.
fn tokens(path: &Path, is_same: bool) {
    let held_out = 360..400;
    let token = |place: u32| match held_out.contains(&place) && !is_same {
        true => 3,
        false => 1 + place % 2,
    };
    let mut writer = TokenWriter::create(path, 4).unwrap();
    writer
        .write(&(0..400).map(token).collect::<Vec<u32>>())
        .unwrap();
    writer.finish().unwrap();
}

fn numbers(model: &Model) -> BTreeMap<String, Vec<f32>> {
    let all = model.parameters().iter();
    all.map(|(name, tensor)| {
        let numbers = tensor.flatten_all().unwrap().to_vec1::<f32>();
        (name.clone(), numbers.unwrap())
    })
    .collect()
}

/// Step, loss and weights of the least validation loss, a step at a time, and the last loss.
fn least(spec: &TrainSpec, file: &Path) -> (u64, f64, BTreeMap<String, Vec<f32>>, f64) {
    let tokens = Arc::new(TokenFile::open(file).unwrap());
    let (training, validation) = split(tokens.len(), FRACTION).unwrap();
    let order = Order::Shuffled { seed: 0 };
    let training = Windows::new(tokens.clone(), training, order).unwrap();
    let validation = Windows::new(tokens, validation, Order::Sequential).unwrap();
    let (training, validation) = (Box::new(training), Box::new(validation));
    let mut trainer = Trainer::new(spec.clone(), training, validation, &Device::Cpu).unwrap();
    let mut validated = Vec::new();
    for step in 1..=STEPS {
        trainer.step().unwrap();
        if step % EVERY == 0 {
            let loss = trainer.validate().unwrap();
            validated.push((step, loss, numbers(&trainer.finished().unwrap())));
        }
    }
    let last = validated.last().unwrap().1;
    let least = validated.into_iter().min_by(|a, b| a.1.total_cmp(&b.1));
    let (step, loss, weights) = least.unwrap();
    (step, loss, weights, last)
}

fn written(finished: &Finished) -> BTreeMap<String, Vec<f32>> {
    let package = Package::open(&finished.model, &OpenOptions::default()).unwrap();
    numbers(package.single_model().unwrap())
}

#[test]
fn the_weights_of_the_least_loss_are_written_bit_for_bit() {
    let directory = tempfile::tempdir().unwrap();
    for is_same in [false, true] {
        let at = |name: &str| directory.path().join(format!("{name} {is_same}"));
        let file = at("tokens");
        tokens(&file, is_same);
        let spec_of = |keep| spec(&file, keep);
        let (step, loss, weights, last) = least(&spec_of("best"), &file);
        // Of tokens that are never trained on the first is the best, of others the last.
        assert_eq!(step, if is_same { STEPS } else { EVERY });
        let best = run(&spec_of("best"), &at("best"), false, &Device::Cpu).unwrap();
        assert_eq!((best.kept_step, best.steps), (step, STEPS));
        assert_eq!(
            (best.validation_loss, best.last_validation_loss),
            (loss, last)
        );
        assert_eq!(written(&best), weights);
        let plain = run(&spec_of("last"), &at("last"), false, &Device::Cpu).unwrap();
        assert_eq!((plain.kept_step, plain.validation_loss), (STEPS, last));
        assert_eq!(written(&plain) == weights, is_same);
    }
}

/// From states before the best, behind it, and from the end.
#[test]
fn a_run_that_went_on_keeps_the_weights_of_one_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    for is_same in [false, true] {
        let file = directory.path().join(format!("tokens {is_same}"));
        tokens(&file, is_same);
        let spec = spec(&file, "best");
        let whole = directory.path().join(format!("whole {is_same}"));
        let alone = run(&spec, &whole, false, &Device::Cpu).unwrap();
        for gone in [&[8, 6, 3][..], &[8, 6], &[8], &[]] {
            let name = format!("parts {is_same} {gone:?}");
            let parts = directory.path().join(name);
            run(&spec, &parts, false, &Device::Cpu).unwrap();
            std::fs::remove_dir_all(parts.join("model")).unwrap();
            for step in gone {
                let state = parts.join(format!("states/step-{step:010}"));
                std::fs::remove_dir_all(state).unwrap();
            }
            let again = run(&spec, &parts, true, &Device::Cpu).unwrap();
            assert_eq!(
                (again.kept_step, again.validation_loss.to_bits()),
                (alone.kept_step, alone.validation_loss.to_bits())
            );
            for name in [
                "model/model.safetensors",
                "states/step-0000000008/tensors.safetensors",
                "states/step-0000000008/state.json",
                "log.jsonl",
            ] {
                let read = |run: &Path| std::fs::read(run.join(name)).unwrap();
                assert!(read(&whole) == read(&parts), "{name} {gone:?}");
            }
        }
    }
}

#[test]
fn the_choice_is_no_part_of_a_spec_that_does_not_make_it() {
    let spec_of = |keep| spec(Path::new("tokens"), keep);
    let said = serde_json::to_value(spec_of("last")).unwrap();
    assert!(said["validation"].get("keep").is_none(), "{said}");
    let best = spec_of("best");
    let said = toml::to_string(&best).unwrap();
    assert_eq!(toml::from_str::<TrainSpec>(&said).unwrap(), best);

    let mut never = spec_of("best");
    never.validation.every = 0;
    let said = never.validate().unwrap_err().to_string();
    assert_eq!(
        said,
        "validation.every is 0, but must be at least 1 with validation.keep = \"best\", which compares validations"
    );
}
