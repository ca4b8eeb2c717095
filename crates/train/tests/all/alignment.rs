//! Training with a term that keeps the residual stream from turning.
#![allow(clippy::unwrap_used)]

use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::{Initialiser, Input, Model, Pass};
use lapidary_signal::Trace;
use lapidary_train::data::Copying;
use lapidary_train::{AlignmentKind, AlignmentSpec, TrainSpec, Trainer};
use serde_json::json;

fn spec(alignment: Option<AlignmentSpec>) -> TrainSpec {
    let mut spec = json!({
        "seed": 3, "steps": 20, "batch": 8, "length": 12,
        "schedule": { "peak": 1e-2 },
        "data": { "kind": "copying", "symbols": 6 },
        "model": {
            "width": 16,
            "input": { "kind": "tokens", "vocabulary": 7, "length": 12, "position": { "kind": "learned" } },
            "blocks": [{
                "repeat": 3,
                "attention": { "kind": "multi-head", "heads": 2, "causal": true },
                "feedforward": { "kind": "dense", "hidden": 32 }
            }],
            "head": { "kind": "language-model" }
        }
    });
    if let Some(alignment) = alignment {
        spec["alignment"] = serde_json::to_value(alignment).unwrap();
    }
    serde_json::from_value(spec).unwrap()
}

fn trained(alignment: Option<AlignmentSpec>) -> Model {
    let spec = spec(alignment);
    let mut source = Initialiser::new(3, DType::F32, Device::Cpu);
    let task = || Box::new(Copying::new(6).unwrap());
    let mut trainer = Trainer::with_source(spec, &mut source, task(), task()).unwrap();
    for _ in 0..20 {
        trainer.step().unwrap();
    }
    trainer.finished().unwrap()
}

/// How far the stream turns, over all blocks.
fn turn(model: &Model) -> f32 {
    let trace = Trace::new().capture("blocks.*.{in,out}").unwrap();
    let ids = Tensor::new(&[[1u32, 4, 2, 5, 3, 0]], &Device::Cpu).unwrap();
    let pass = Pass {
        trace: Some(&trace),
        ..Pass::default()
    };
    model.forward(&Input::tokens(ids), pass).unwrap();
    let sites = [
        "blocks.0.in",
        "blocks.0.out",
        "blocks.1.out",
        "blocks.2.out",
    ];
    let streams = sites.map(|site| trace.signal(site).unwrap().into_value().detach());
    let found = AlignmentKind::Cosine.between(&streams).unwrap().unwrap();
    found.to_scalar::<f32>().unwrap()
}

fn numbers(model: &Model) -> Vec<f32> {
    let parameters = model.parameters().values();
    parameters
        .flat_map(|t| t.flatten_all().unwrap().to_vec1::<f32>().unwrap())
        .collect()
}

#[test]
fn a_weight_of_zero_changes_nothing_and_others_keep_the_stream_straight() {
    let with = |weight, kind| trained(Some(AlignmentSpec { kind, weight }));
    let plain = trained(None);
    assert_eq!(numbers(&with(0.0, AlignmentKind::Cosine)), numbers(&plain));
    let aligned = with(1.0, AlignmentKind::Cosine);
    assert!(
        turn(&aligned) < 0.8 * turn(&plain),
        "{} {}",
        turn(&aligned),
        turn(&plain)
    );
    assert_ne!(numbers(&with(0.1, AlignmentKind::Squared)), numbers(&plain));
}

/// Of two streams there is no one to turn, and the shape of a compressed one changes.
#[test]
fn organisations_without_a_stream_between_blocks_are_refused() {
    let with = |organisation: serde_json::Value, aligned: bool| -> TrainSpec {
        let term = AlignmentSpec {
            kind: AlignmentKind::Cosine,
            weight: 0.5,
        };
        let mut spec = serde_json::to_value(spec(aligned.then_some(term))).unwrap();
        spec["model"]["blocks"][0]["attention"]["causal"] = json!(false);
        spec["model"]["organisation"] = organisation;
        serde_json::from_value(spec).unwrap()
    };
    for organisation in [
        json!({ "kind": "reversible" }),
        json!({ "kind": "vip-centric", "vips": 2, "size": 4, "fine": 1 }),
    ] {
        with(organisation.clone(), false).validate().unwrap();
        let said = with(organisation.clone(), true)
            .validate()
            .unwrap_err()
            .to_string();
        let kind = organisation["kind"].as_str().unwrap();
        let expected = format!("model.organisation is {kind}, but must be absent or interleaved");
        assert!(said.starts_with(&expected), "{said}");
    }
}

#[test]
fn settings_that_make_no_sense_are_refused() {
    let mut wrong = spec(None);
    for weight in [-1.0, f64::NAN] {
        let kind = AlignmentKind::Cosine;
        wrong.alignment = Some(AlignmentSpec { kind, weight });
        let error = wrong.validate().unwrap_err().to_string();
        assert!(error.contains("alignment.weight"), "{error}");
    }
    let mut both = spec(Some(AlignmentSpec {
        kind: AlignmentKind::Cosine,
        weight: 0.5,
    }));
    both.recompute = true;
    assert!(
        both.validate()
            .unwrap_err()
            .to_string()
            .contains("recompute")
    );
    assert!(
        !serde_json::to_string(&spec(None))
            .unwrap()
            .contains("alignment")
    );
}
