//! Blocks that are recomputed in the backward pass draw what they drew: dropout, hashes, subsets.
#![allow(clippy::unwrap_used)]

use lapidary_kernels::{DType, Device};
use lapidary_model::{Initialiser, ModelSpec};
use lapidary_train::data::{Copying, MaskingSpec, Task};
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
    run_annealed(mechanism, recompute, [dense_steps, 0])
}

/// The same, with so many steps before those in which subsets grow.
fn run_annealed(
    mechanism: &str,
    recompute: bool,
    [dense_steps, annealed_steps]: [u64; 2],
) -> (Vec<f64>, Vec<Vec<f32>>) {
    let spec = TrainSpec {
        recompute,
        ..spec(mechanism, [dense_steps, annealed_steps])
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

/// Three steps, of which so many draw nothing at the end, and subsets grow in so many before.
fn spec(mechanism: &str, [dense_steps, annealed_steps]: [u64; 2]) -> TrainSpec {
    TrainSpec {
        seed: 5,
        steps: 3,
        batch: 2,
        length: 24,
        accumulate: 1,
        clip: None,
        average: None,
        dense_steps,
        annealed_steps,
        masking: None,
        self_distillation: None,
        recompute: false,
        loss_chunk: None,
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
    }
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
        r#""mechanism": {
            "kind": "combiner", "form": { "kind": "fixed", "segment": 5 }, "dropout": 0.3
        }"#,
        r#""mechanism": {
            "kind": "combiner", "form": { "kind": "routed", "clusters": 3 }, "pull": 0.1
        }"#,
        r#""sharing": "query-key",
           "mechanism": {
               "kind": "reformer", "chunk": 4, "buckets": [6], "rotations": "per-example"
           }"#,
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
fn subsets_grow_over_the_annealed_steps() {
    let mechanism = r#""mechanism": { "kind": "subsampled", "keep": 0.25, "selection": {
        "kind": "local", "radius": 3 } }"#;
    let of = |recompute, annealed_steps| run_annealed(mechanism, recompute, [1, annealed_steps]);
    let constant = of(false, 0);
    let (one, two) = (of(false, 1), of(false, 2));
    // The first step of three is the last before two have passed.
    assert_eq!(one.0[0], constant.0[0]);
    assert_ne!(one.0[1], constant.0[1]);
    assert_ne!(two.0[0], constant.0[0]);
    assert_eq!(of(true, 2), two);
    // One that keeps every key has nothing to grow.
    let all = r#""mechanism": { "kind": "subsampled", "keep": 1.0 }"#;
    assert_eq!(
        run_annealed(all, false, [0, 3]),
        run_annealed(all, false, [0, 0])
    );
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

/// Steps that would be what all steps are, without a word.
#[test]
fn dense_and_annealed_steps_are_refused_where_nothing_is_drawn() {
    let said = |mechanism: &str, steps: [u64; 2]| {
        let refused = spec(mechanism, steps).validate().err();
        refused.map(|error| error.to_string()).unwrap_or_default()
    };
    let subsampled = r#""mechanism": { "kind": "subsampled" }"#;
    let reformer = r#""sharing": "query-key",
        "mechanism": { "kind": "reformer", "chunk": 4, "rotations": "drawn" }"#;
    let fire = r#""position": { "kind": "fire", "randomised": 64 }"#;
    let kernelized = r#""mechanism": { "kind": "kernelized" }"#;
    for mechanism in [subsampled, reformer, fire, kernelized] {
        assert_eq!(said(mechanism, [1, 0]), "", "{mechanism}");
    }
    let never = r#""mechanism": { "kind": "kernelized", "redraw": { "kind": "never" } }"#;
    let fixed = reformer.replace("drawn", "fixed");
    for mechanism in [r#""bias": true"#, never, &fixed] {
        let found = said(mechanism, [1, 0]);
        assert!(
            found.starts_with("dense_steps is 1, but must be 0"),
            "{found}"
        );
    }
    assert_eq!(said(subsampled, [0, 1]), "");
    for mechanism in [r#""bias": true"#, reformer, fire, kernelized] {
        let found = said(mechanism, [0, 1]);
        assert!(
            found.starts_with("annealed_steps is 1, but must be 0"),
            "{found}"
        );
    }
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

/// A masked model whose VIP tokens are the hidden ones: what is recomputed is what was.
#[test]
fn masked_models_of_compressed_sequences_train() {
    let json = r#"{
        "width": 16,
        "input": { "kind": "tokens", "vocabulary": 10, "length": 32, "position": { "kind": "learned" } },
        "blocks": [{
            "repeat": 3,
            "dropout": 0.1,
            "attention": { "kind": "multi-head", "heads": 2 },
            "feedforward": { "kind": "dense", "hidden": 32 }
        }],
        "organisation": {
            "kind": "vip-centric", "segment_blocks": 1, "segment": 8, "vips": 4, "size": 4, "fine": 2,
            "exploration": 0.5, "importance": { "kind": "token", "id": 9 }
        },
        "head": { "kind": "language-model" }
    }"#;
    let masking = MaskingSpec {
        clusters: [1, 2],
        deviation: [2.0, 4.0],
        segments: Some([1, 4]),
        ..MaskingSpec::new(4)
    };
    let spec = |recompute| TrainSpec {
        recompute,
        masking: Some(masking),
        model: serde_json::from_str(json).unwrap(),
        ..spec("\"bias\": true", [0, 0])
    };
    let run = |recompute| -> Vec<f64> {
        let task = || -> Box<dyn Task> { Box::new(Copying::new(8).unwrap()) };
        let mut source = Initialiser::new(5, DType::F32, Device::Cpu);
        let mut trainer =
            Trainer::with_source(spec(recompute), &mut source, task(), task()).unwrap();
        let mut losses: Vec<f64> = (0..3).map(|_| trainer.step().unwrap().loss).collect();
        losses.push(trainer.validate().unwrap());
        losses
    };
    let (plain, recomputed) = (run(false), run(true));
    for (a, b) in plain.iter().zip(&recomputed) {
        assert!((a - b).abs() < 1e-5 * a.abs(), "{plain:?} {recomputed:?}");
    }
    // A model that does not look ahead is not asked about what is hidden.
    let causal = TrainSpec {
        model: model("\"bias\": true"),
        ..spec(false)
    };
    let said = causal.validate().unwrap_err().to_string();
    assert!(said.starts_with("masking is given"), "{said}");
}
