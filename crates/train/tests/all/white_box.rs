//! CRATE's blocks where they look both ways, as in CRATE-BERT: hidden tokens are learned from what is around them.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::{Initialiser, Input, Model, ModelSpec, Pass};
use lapidary_train::data::{Copying, MaskingSpec, Task};
use lapidary_train::spec::{DataSpec, ScheduleSpec};
use lapidary_train::{TrainSpec, Trainer};

const STEPS: u64 = 60;
const LENGTH: usize = 20;

fn model(causal: bool) -> ModelSpec {
    let json = format!(
        r#"{{
            "width": 16,
            "input": {{
                "kind": "tokens", "vocabulary": 10, "length": {LENGTH}, "position": {{ "kind": "learned" }}
            }},
            "blocks": [{{
                "repeat": 2,
                "wiring": "replacing",
                "attention": {{
                    "kind": "multi-head", "heads": 2, "sharing": "all", "bias": false, "output_bias": true,
                    "causal": {causal}
                }},
                "feedforward": {{ "kind": "sparse-code" }}
            }}],
            "final_norm": {{ "kind": "layer" }},
            "head": {{ "kind": "language-model" }}
        }}"#
    );
    serde_json::from_str(&json).unwrap()
}

/// Three of twenty tokens hidden.
fn spec(causal: bool) -> TrainSpec {
    TrainSpec {
        seed: 7,
        steps: STEPS,
        batch: 8,
        length: LENGTH,
        accumulate: 1,
        clip: Some(1.0),
        average: None,
        dense_steps: 0,
        annealed_steps: 0,
        masking: Some(MaskingSpec::new(3)),
        self_distillation: None,
        recompute: false,
        loss_chunk: None,
        alignment: None,
        schedule: ScheduleSpec {
            peak: 0.01,
            floor: 0.0,
            warm_up: 5,
            decay: Default::default(),
        },
        optimiser: Default::default(),
        groups: Vec::new(),
        validation: Default::default(),
        checkpoint: Default::default(),
        data: DataSpec::Copying { symbols: 8 },
        model: model(causal),
    }
}

/// Logits of each place, of a sequence whose place `changed` has another token.
fn logits(model: &Model, changed: Option<usize>) -> Vec<Vec<f32>> {
    let token = |place: usize| (place * 3 % 8) as u32 ^ u32::from(changed == Some(place));
    let ids: Vec<u32> = (0..LENGTH).map(token).collect();
    let ids = Tensor::from_vec(ids, (1, LENGTH), &Device::Cpu).unwrap();
    let output = model
        .forward(&Input::tokens(ids), Pass::default())
        .unwrap()
        .logits
        .unwrap();
    output.value().squeeze(0).unwrap().to_vec2().unwrap()
}

#[test]
fn hidden_tokens_are_learned_by_blocks_that_look_both_ways() {
    let task = || -> Box<dyn Task> { Box::new(Copying::new(8).unwrap()) };
    let mut source = Initialiser::new(7, DType::F32, Device::Cpu);
    let mut trainer = Trainer::with_source(spec(false), &mut source, task(), task()).unwrap();
    let losses: Vec<f64> = (0..STEPS).map(|_| trainer.step().unwrap().loss).collect();
    let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
    let (first, last) = (mean(&losses[..5]), mean(&losses[55..]));
    // It begins where ten tokens are alike.
    assert!((losses[0] - 10f64.ln()).abs() < 0.3, "{losses:?}");
    assert!(last < first - 0.05, "{losses:?}");
    let said = spec(true).validate().unwrap_err().to_string();
    assert!(said.starts_with("masking is given"), "{said}");
}

/// A token in the middle tells those before it and behind it something, and causal blocks only the latter.
#[test]
fn tokens_on_both_sides_are_seen() {
    const CHANGED: usize = 9;
    for causal in [false, true] {
        let model = Model::initialised(model(causal), 3, DType::F32, &Device::Cpu).unwrap();
        let (one, other) = (logits(&model, None), logits(&model, Some(CHANGED)));
        for (place, (one, other)) in one.iter().zip(&other).enumerate() {
            let blind = causal && place < CHANGED;
            assert_eq!(one == other, blind, "causal {causal}, place {place}");
        }
    }
}
