//! Blocks that are recomputed in the backward pass draw what they drew: dropout, hashes.
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

/// Losses and parameters of a few steps.
fn run(mechanism: &str, recompute: bool) -> (Vec<f64>, Vec<Vec<f32>>) {
    let spec = TrainSpec {
        seed: 5,
        steps: 3,
        batch: 2,
        length: 24,
        accumulate: 1,
        clip: None,
        average: None,
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
        r#""mechanism": { "kind": "combiner", "form": { "kind": "fixed", "segment": 5 } }"#,
    ] {
        assert_eq!(run(mechanism, true), run(mechanism, false), "{mechanism}");
    }
}
