//! The loss in chunks of positions is the loss, with its gradients.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::collections::BTreeMap;

use lapidary_kernels::{DType, Device, Recomputation, Tensor};
use lapidary_model::{Initialiser, Model, ModelSpec, Pass};
use lapidary_train::data::{Batch, Copying, IGNORE, MaskingSpec, Task};
use lapidary_train::{TrainSpec, Trainer, batch_loss, batch_loss_in_chunks};

const VOCABULARY: usize = 9;

fn spec(causal: bool, organisation: &str, head: &str) -> ModelSpec {
    let text = format!(
        r#"{{
            "width": 16,
            {organisation}
            "input": {{ "kind": "tokens", "vocabulary": {VOCABULARY}, "length": 32 }},
            "blocks": [{{
                "repeat": 2,
                "dropout": 0.2,
                "attention": {{ "kind": "multi-head", "heads": 2, "causal": {causal} }},
                "feedforward": {{ "kind": "dense", "hidden": 32 }}
            }}],
            "head": {{ "kind": "language-model"{head} }}
        }}"#
    );
    serde_json::from_str(&text).unwrap()
}

/// Two sequences of twelve tokens; of the targets every third is left out, or every one.
fn batch(left_out: usize) -> Batch {
    let (rows, length) = (2, 12);
    let ids = |factor: u32, shift: u32| {
        (0..24u32).map(move |i| (i * i + factor * i + shift) % VOCABULARY as u32)
    };
    let targets = ids(7, 1).enumerate();
    let targets = targets.map(|(at, id)| if at % left_out == 0 { IGNORE } else { id });
    Batch {
        rows,
        length,
        inputs: ids(5, 3).collect(),
        targets: targets.collect(),
    }
}

/// The loss and the gradient of every parameter.
fn gradients(
    model: &Model,
    batch: &Batch,
    chunk: Option<usize>,
    recompute: bool,
) -> (f64, BTreeMap<String, Tensor>) {
    let recomputation = Recomputation::of(model.variables().values());
    let pass = Pass {
        dropout_seed: Some(3),
        recomputation: recompute.then_some(&recomputation),
        ..Pass::default()
    };
    let loss = match chunk {
        None => batch_loss(model, batch, pass),
        Some(chunk) => batch_loss_in_chunks(model, batch, pass, chunk, &recomputation),
    };
    let loss = loss.unwrap();
    let mut store = loss.backward().unwrap();
    recomputation.add_to(&mut store).unwrap();
    let each = model.variables().iter().filter_map(|(name, variable)| {
        let gradient = store.get(variable.as_tensor())?;
        Some((name.clone(), gradient.clone()))
    });
    (loss.to_scalar().unwrap(), each.collect())
}

fn largest(x: &Tensor) -> f64 {
    let flat = x.abs().unwrap().flatten_all().unwrap();
    flat.max(0).unwrap().to_scalar().unwrap()
}

#[test]
fn chunks_have_the_loss_and_the_gradients_of_the_whole() {
    let reversible = r#""organisation": { "kind": "reversible", "output": "concatenated" },"#;
    for (organisation, head, recompute) in [
        ("", "", false),
        ("", "", true),
        ("", r#", "tied": false, "bias": true"#, false),
        (reversible, r#", "tied": false"#, true),
    ] {
        let mut source = Initialiser::new(5, DType::F64, Device::Cpu);
        let model = Model::trainable(spec(true, organisation, head), &mut source).unwrap();
        // All targets, and two of three.
        for left_out in [usize::MAX, 3] {
            let mut batch = batch(left_out);
            if left_out == usize::MAX {
                batch.targets[0] = 4;
            }
            let (loss, expected) = gradients(&model, &batch, None, recompute);
            assert!(loss > 0.0);
            let whole = expected.values().map(largest).fold(0.0, f64::max);
            for chunk in [1, 5, 100] {
                let (found, slopes) = gradients(&model, &batch, Some(chunk), recompute);
                let what = format!("{organisation} {head}, {chunk} of {left_out}");
                assert!((found - loss).abs() < 1e-12, "{what}: {found} {loss}");
                assert!(slopes.keys().eq(expected.keys()), "{what}");
                for (name, gradient) in &expected {
                    let apart = largest(&(gradient - &slopes[name]).unwrap());
                    assert!(apart < 1e-11 * whole, "{name}, {what}: {apart:e}");
                }
            }
        }
    }
}

#[test]
fn without_targets_there_is_no_loss() {
    let mut source = Initialiser::new(5, DType::F64, Device::Cpu);
    let model = Model::trainable(spec(true, "", ""), &mut source).unwrap();
    for chunk in [None, Some(4)] {
        let (loss, _) = gradients(&model, &batch(1), chunk, false);
        assert_eq!(loss, 0.0);
    }
}

/// In steps of training and in validation, of what follows and of what is hidden.
#[test]
fn training_in_chunks_is_training() {
    let run = |causal: bool, loss_chunk: Option<usize>| -> Vec<f64> {
        let text = r#"{
            "seed": 5, "steps": 3, "batch": 4, "length": 24, "accumulate": 2,
            "schedule": { "peak": 0.01 },
            "data": { "kind": "copying", "symbols": 6 },
            "model": "#;
        // Copying has seven tokens, and what hides them is one more.
        let model = serde_json::to_string(&spec(causal, "", "")).unwrap();
        let mut spec: TrainSpec = serde_json::from_str(&format!("{text}{model}}}")).unwrap();
        spec.loss_chunk = loss_chunk;
        spec.masking = (!causal).then(|| MaskingSpec::new(5));
        let task = || -> Box<dyn Task> { Box::new(Copying::new(6).unwrap()) };
        let mut source = Initialiser::new(5, DType::F32, Device::Cpu);
        let mut trainer = Trainer::with_source(spec, &mut source, task(), task()).unwrap();
        let mut losses: Vec<f64> = (0..3).map(|_| trainer.step().unwrap().loss).collect();
        losses.push(trainer.validate().unwrap());
        losses
    };
    for causal in [true, false] {
        let whole = run(causal, None);
        for (a, b) in whole.iter().zip(run(causal, Some(7))) {
            assert!((a - b).abs() < 1e-4 * a.abs(), "{whole:?}");
        }
    }
}
