//! Blocks that are recomputed in the backward pass draw what they drew: dropout, hashes, subsets.
#![allow(clippy::unwrap_used)]

use lapidary_kernels::{DType, Device};
use lapidary_model::{Initialiser, ModelSpec};
use lapidary_train::data::{Copying, Task};
use lapidary_train::spec::{DataSpec, ScheduleSpec};
use lapidary_train::{TrainSpec, Trainer};

fn model(mechanism: &str) -> ModelSpec {
    let json = format!(
        r#"{{
            "width": 16,
            "input": {{ "kind": "tokens", "vocabulary": 9, "length": 32 }},
            "blocks": [{{
                "repeat": 3,
                "dropout": 0.2,
                "attention": {{
                    "kind": "multi-head", "heads": 2, "causal": true, {mechanism}
                }},
                "feedforward": {{ "kind": "dense", "hidden": 32 }}
            }}],
            "head": {{ "kind": "language-model" }}
        }}"#
    );
    serde_json::from_str(&json).unwrap()
}

/// Losses and parameters of a few steps, the last of which may draw nothing.
fn run(mechanism: &str, recompute: bool, dense_steps: u64) -> (Vec<f64>, Vec<Vec<f32>>) {
    let spec = TrainSpec {
        seed: 5,
        steps: 3,
        batch: 2,
        length: 24,
        accumulate: 1,
        clip: None,
        average: None,
        dense_steps,
        recompute,
        alignment: None,
        schedule: ScheduleSpec {
            peak: 0.01,
            floor: 0.0,
            warm_up: 0,
            decay: Default::default(),
        },
        optimiser: Default::default(),
        groups: Vec::new(),
        validation: Default::default(),
        checkpoint: Default::default(),
        data: DataSpec::Copying { symbols: 8 },
        model: model(mechanism),
    };
    let task = || -> Box<dyn Task> { Box::new(Copying::new(8).unwrap()) };
    let mut source = Initialiser::new(5, DType::F32, Device::Cpu);
    let mut trainer = Trainer::with_source(spec, &mut source, task(), task()).unwrap();
    let losses = (0..3).map(|_| trainer.step().unwrap().loss).collect();
    let parameters = trainer.finished().unwrap();
    let flat = parameters.parameters().values().map(|tensor| {
        let flat = tensor.flatten_all().unwrap();
        flat.to_vec1().unwrap()
    });
    (losses, flat.collect())
}

#[test]
fn steps_with_and_without_recomputation_are_the_same_bit_for_bit() {
    for mechanism in [
        r#""mechanism": { "kind": "sparse", "pattern": { "kind": "strided", "stride": 5 } }"#,
        r#""sharing": "query-key",
           "mechanism": { "kind": "reformer", "chunk": 4, "rounds": 2, "buckets": [6] }"#,
        r#""mechanism": { "kind": "subsampled", "keep": 0.25, "per_head": true }"#,
        r#""position": { "kind": "relative-buckets", "buckets": 8, "max_distance": 16 },
           "mechanism": {
               "kind": "subsampled", "selection": { "kind": "local", "radius": 3 }
           }"#,
        r#""mechanism": { "kind": "subsampled", "inner": { "kind": "fastmax" } }"#,
        r#""mechanism": { "kind": "combiner", "form": { "kind": "fixed", "segment": 5 } }"#,
        r#""mechanism": { "kind": "kernelized" }"#,
        r#""mechanism": { "kind": "kernelized", "redraw": { "kind": "steps", "every": 2 } }"#,
        r#""mechanism": { "kind": "kernelized", "redraw": { "kind": "never" } }"#,
    ] {
        assert_eq!(
            run(mechanism, true, 0),
            run(mechanism, false, 0),
            "{mechanism}"
        );
    }
}

#[test]
fn subsets_of_keys_are_drawn_anew_in_each_step_but_the_last() {
    let dense = run("\"bias\": true", false, 0);
    let drawn = |dense_steps| {
        let mechanism = r#""mechanism": { "kind": "subsampled", "keep": 0.25 }"#;
        run(mechanism, false, dense_steps)
    };
    let (always, at_first, never) = (drawn(0), drawn(1), drawn(3));
    assert_eq!(never, dense, "without draws it is softmax");
    assert_eq!(always.0[..2], at_first.0[..2]);
    assert_ne!(always.0[2], at_first.0[2]);
    assert_ne!(always.0[0], dense.0[0]);
}

/// The trainer says which step it is, so that a draw may last several.
#[test]
fn random_features_last_as_many_steps_as_they_are_said_to() {
    let losses = |every: u64| {
        let redraw = format!(r#"{{ "kind": "steps", "every": {every} }}"#);
        let mechanism = format!(r#""mechanism": {{ "kind": "kernelized", "redraw": {redraw} }}"#);
        run(&mechanism, false, 0).0
    };
    let [one, two, three] = [1, 2, 3].map(losses);
    assert_eq!(one[0], two[0]);
    assert_ne!(one[1], two[1]);
    assert_eq!(two[..2], three[..2]);
    assert_ne!(two[2], three[2]);
}
