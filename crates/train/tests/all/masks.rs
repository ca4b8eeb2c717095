//! What is masked is zero, and stays zero whatever an optimiser does.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;

use lapidary_kernels::{Device, Tensor};
use lapidary_model::{Initialiser, ModelSpec};
use lapidary_train::data::{Copying, Task};
use lapidary_train::spec::{DataSpec, OptimiserSpec, ScheduleSpec};
use lapidary_train::{Masks, TrainSpec, Trainer};

const MODEL: &str = r#"{
    "width": 16,
    "input": { "kind": "tokens", "vocabulary": 9, "length": 16, "position": { "kind": "learned" } },
    "blocks": [{
        "attention": { "kind": "multi-head", "heads": 2, "causal": true },
        "feedforward": { "kind": "dense", "hidden": 32 }
    }],
    "head": { "kind": "language-model" }
}"#;

const QUERY: &str = "blocks.0.attention.query.weight";
const UP: &str = "blocks.0.feedforward.up.weight";

fn adamw() -> OptimiserSpec {
    OptimiserSpec::Adamw {
        beta1: 0.9,
        beta2: 0.99,
        epsilon: 1e-8,
        weight_decay: 0.1,
    }
}

fn lion() -> OptimiserSpec {
    OptimiserSpec::Lion {
        beta1: 0.9,
        beta2: 0.99,
        weight_decay: 0.1,
    }
}

fn sgd(nesterov: bool) -> OptimiserSpec {
    OptimiserSpec::Sgd {
        momentum: 0.9,
        nesterov,
        weight_decay: 0.1,
    }
}

fn trainer(optimiser: OptimiserSpec, average: Option<f64>, accumulate: usize) -> Trainer {
    let model: ModelSpec = serde_json::from_str(MODEL).unwrap();
    let spec = TrainSpec {
        seed: 5,
        steps: 100,
        batch: 4,
        length: 8,
        accumulate,
        clip: Some(0.5),
        average,
        dense_steps: 0,
        annealed_steps: 0,
        masking: None,
        self_distillation: None,
        recompute: false,
        loss_chunk: None,
        alignment: None,
        schedule: ScheduleSpec {
            peak: 0.05,
            floor: 0.0,
            warm_up: 0,
            decay: Default::default(),
        },
        optimiser,
        groups: Vec::new(),
        validation: Default::default(),
        checkpoint: Default::default(),
        data: DataSpec::Copying { symbols: 8 },
        model,
    };
    let task = || -> Box<dyn Task> { Box::new(Copying::new(8).unwrap()) };
    let mut source = Initialiser::new(5, lapidary_kernels::DType::F32, Device::Cpu);
    Trainer::with_source(spec, &mut source, task(), task()).unwrap()
}

/// Every `n`th entry of these parameters is masked.
fn masks(trainer: &Trainer, names: &[&str], n: usize) -> Masks {
    let mask = |name: &str| {
        let tensor = &trainer.model().parameters()[name];
        let entries: Vec<u8> = (0..tensor.elem_count())
            .map(|index| u8::from(index % n != 0))
            .collect();
        Tensor::from_vec(entries, tensor.dims(), &Device::Cpu).unwrap()
    };
    let tensors = names.iter().map(|name| ((*name).to_owned(), mask(name)));
    Masks::new(tensors.collect::<BTreeMap<_, _>>()).unwrap()
}

fn values(tensors: &BTreeMap<String, Tensor>, name: &str) -> Vec<f32> {
    tensors[name].flatten_all().unwrap().to_vec1().unwrap()
}

/// How many masked entries are not exactly zero, in the weights and in everything that is saved of
/// them.
fn leaks(trainer: &Trainer, names: &[&str], n: usize) -> usize {
    let state = trainer.state().unwrap().tensors;
    let of = |name: &str| {
        let saved = state
            .keys()
            .filter(|key| key.ends_with(name) && !key.starts_with("mask."));
        let leaks = saved.map(|key| {
            let values = values(&state, key);
            values
                .iter()
                .step_by(n)
                .filter(|v| v.to_bits() != 0)
                .count()
        });
        leaks.sum::<usize>()
    };
    names.iter().map(|name| of(name)).sum()
}

#[test]
fn masked_weights_stay_zero_through_momentum_and_decay() {
    for (optimiser, average, accumulate) in [
        (adamw(), None, 1),
        (adamw(), Some(0.9), 2),
        (lion(), Some(0.9), 1),
        (sgd(false), None, 1),
        (sgd(true), Some(0.9), 1),
    ] {
        let mut trainer = trainer(optimiser, average, accumulate);
        let masks = masks(&trainer, &[QUERY, UP], 3);
        trainer.set_masks(masks).unwrap();
        let start = values(trainer.model().parameters(), QUERY);
        assert!(start.iter().step_by(3).all(|v| *v == 0.0));
        for _ in 0..12 {
            trainer.step().unwrap();
        }
        assert_eq!(leaks(&trainer, &[QUERY, UP], 3), 0, "{optimiser:?}");
        let end = values(trainer.model().parameters(), QUERY);
        let moved = start.iter().zip(&end).filter(|(a, b)| a != b).count();
        assert_eq!(moved, 256 - 256_usize.div_ceil(3), "the others move");
        let finished = trainer.finished().unwrap();
        let finished = values(finished.parameters(), UP);
        assert!(finished.iter().step_by(3).all(|v| *v == 0.0));
    }
}

/// Masks that come in the middle take moments along, so that nothing moves back.
#[test]
fn a_mask_in_the_middle_takes_the_moments_along() {
    for optimiser in [adamw(), lion(), sgd(true)] {
        let mut trainer = trainer(optimiser, Some(0.9), 1);
        for _ in 0..4 {
            trainer.step().unwrap();
        }
        assert!(leaks(&trainer, &[QUERY], 2) > 0);
        trainer.set_masks(masks(&trainer, &[QUERY], 4)).unwrap();
        trainer.step().unwrap();
        trainer.set_masks(masks(&trainer, &[QUERY], 2)).unwrap();
        assert_eq!(leaks(&trainer, &[QUERY], 2), 0);
        for _ in 0..4 {
            trainer.step().unwrap();
        }
        assert_eq!(leaks(&trainer, &[QUERY], 2), 0);
        // Without masks the weights are free again.
        trainer.set_masks(Masks::default()).unwrap();
        trainer.step().unwrap();
        assert!(leaks(&trainer, &[QUERY], 2) > 0);
    }
}

/// The masks are part of the state: a run that goes on keeps them.
#[test]
fn a_resumed_run_keeps_its_masks_and_its_bits() {
    let mut straight = trainer(adamw(), None, 1);
    straight.set_masks(masks(&straight, &[UP], 2)).unwrap();
    for _ in 0..3 {
        straight.step().unwrap();
    }
    let state = straight.state().unwrap();
    let mut resumed = trainer(adamw(), None, 1);
    resumed.resume(&state).unwrap();
    for _ in 0..3 {
        assert_eq!(straight.step().unwrap(), resumed.step().unwrap());
    }
    assert_eq!(leaks(&resumed, &[UP], 2), 0);
    for name in [QUERY, UP] {
        let of = |trainer: &Trainer| values(trainer.model().parameters(), name);
        assert_eq!(of(&straight), of(&resumed));
    }
}

#[test]
fn a_mask_that_does_not_fit_changes_nothing() {
    let mut trainer = trainer(adamw(), None, 1);
    let before = values(trainer.model().parameters(), QUERY);
    for (name, shape) in [
        ("blocks.9.attention.query.weight", (16, 16)),
        (QUERY, (16, 8)),
    ] {
        let mask = Tensor::zeros(shape, lapidary_kernels::DType::U8, &Device::Cpu).unwrap();
        let masks = Masks::new([(name.to_owned(), mask)].into()).unwrap();
        let error = trainer.set_masks(masks).unwrap_err().to_string();
        assert!(error.contains(name), "{error}");
    }
    assert_eq!(values(trainer.model().parameters(), QUERY), before);
}
