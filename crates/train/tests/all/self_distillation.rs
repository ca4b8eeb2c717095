//! A student and its teacher: what moves, what does not, and that a run goes on where it stopped.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use std::collections::BTreeMap;

use lapidary_kernels::{Device, Tensor};
use lapidary_model::{Model, OpenOptions, Package};
use lapidary_train::self_distillation::{Distiller, Image, Images};
use lapidary_train::{TrainSpec, run, run_on_images};
use serde_json::{Value, json};

const STEPS: u64 = 6;

fn settings() -> Value {
    json!({
        "seed": 3, "steps": STEPS, "batch": 4, "clip": 3.0,
        "schedule": { "peak": 1e-2 },
        "data": { "kind": "shapes", "count": 12 },
        "self_distillation": {
            "outputs": 8, "hidden": 12, "bottleneck": 6, "momentum": 0.8,
            "crops": { "locals": 1 }
        },
        "model": {
            "width": 16,
            "input": { "kind": "patches", "image": [8, 8], "patch": 4 },
            "blocks": [{
                "repeat": 2,
                "wiring": "replacing",
                "attention": {
                    "kind": "multi-head", "heads": 2, "sharing": "all", "bias": false,
                    "output_bias": true
                },
                "feedforward": { "kind": "sparse-code" }
            }],
            "final_norm": { "kind": "layer" },
            "head": { "kind": "pooled" }
        }
    })
}

fn spec(with: &[(&str, Value)]) -> TrainSpec {
    let mut settings = settings();
    for (name, value) in with {
        settings["self_distillation"][*name] = value.clone();
    }
    serde_json::from_value(settings).unwrap()
}

/// Pictures that differ in place and slope.
fn images() -> Images {
    let image = |seed: usize| {
        let pixel = |i: usize| ((i * (seed + 3) + seed) % 17) as f32 / 8.0 - 1.0;
        Image::new([3, 8, 8], (0..3 * 64).map(pixel).collect()).unwrap()
    };
    Images {
        training: (0..9).map(image).collect(),
        validation: (9..12).map(image).collect(),
    }
}

fn distiller(spec: TrainSpec) -> Distiller {
    Distiller::new(spec, images(), &Device::Cpu).unwrap()
}

fn numbers(tensor: &Tensor) -> Vec<f32> {
    tensor.flatten_all().unwrap().to_vec1().unwrap()
}

/// Everything of a state, by name.
fn tensors(distiller: &Distiller) -> BTreeMap<String, Vec<f32>> {
    let state = distiller.state().unwrap();
    let all = state.tensors.iter();
    all.map(|(name, tensor)| (name.clone(), numbers(tensor)))
        .collect()
}

fn parameters(model: &Model) -> BTreeMap<String, Vec<f32>> {
    let all = model.parameters().iter();
    all.map(|(name, tensor)| (name.clone(), numbers(tensor)))
        .collect()
}

#[test]
fn a_teacher_begins_as_the_student_and_follows_it_by_the_momentum() {
    let mut distiller = distiller(spec(&[]));
    let start = tensors(&distiller);
    let own = distiller.spec().self_distillation.clone().unwrap();
    for (name, student) in start.iter() {
        if let Some(name) = name.strip_prefix("parameter.") {
            assert_eq!(&start[&format!("teacher.{name}")], student);
        }
    }
    let mut before = start;
    for step in 0..STEPS {
        distiller.step().unwrap();
        let after = tensors(&distiller);
        let momentum = own.momentum_at(step, STEPS) as f32;
        let mut moved = 0;
        for (name, student) in &after {
            let Some(name) = name.strip_prefix("parameter.") else {
                continue;
            };
            let teacher = format!("teacher.{name}");
            let pairs = before[&teacher].iter().zip(student).zip(&after[&teacher]);
            for ((old, student), new) in pairs {
                let expected = momentum * old + (1.0 - momentum) * student;
                assert!((new - expected).abs() < 1e-5, "{name}");
                moved += usize::from(new != old);
            }
        }
        // All of it moves, and by nothing but the mean: no gradient comes to the teacher.
        assert!(moved > 100);
        before = after;
    }
    // What is left in the end is the teacher.
    for (name, finished) in parameters(&distiller.finished().unwrap()) {
        assert_eq!(finished, before[&format!("teacher.{name}")]);
    }
}

/// At a momentum of 1 the teacher stays where it began, whatever the student does.
#[test]
fn a_teacher_of_momentum_one_never_moves() {
    let mut distiller = distiller(spec(&[("momentum", json!(1.0))]));
    let start = parameters(&distiller.finished().unwrap());
    let student = parameters(distiller.student());
    for _ in 0..3 {
        distiller.step().unwrap();
    }
    assert_eq!(parameters(&distiller.finished().unwrap()), start);
    assert_ne!(parameters(distiller.student()), student);
}

#[test]
fn the_centre_moves_by_its_momentum_alone() {
    let mut still = distiller(spec(&[("centre_momentum", json!(1.0))]));
    let mut moving = distiller(spec(&[]));
    for _ in 0..3 {
        still.step().unwrap();
        moving.step().unwrap();
    }
    assert!(numbers(still.centre()).iter().all(|number| *number == 0.0));
    assert!(numbers(moving.centre()).iter().any(|number| *number != 0.0));
    // Of cosines.
    assert!(
        numbers(moving.centre())
            .iter()
            .all(|number| number.abs() <= 1.0)
    );
}

#[test]
fn prototypes_are_frozen_as_long_as_they_should_be() {
    const NAME: &str = "parameter.projection.prototypes.direction";
    let mut distiller = distiller(spec(&[("frozen_steps", json!(2))]));
    let start = tensors(&distiller);
    for step in 1..=3 {
        distiller.step().unwrap();
        let now = tensors(&distiller);
        assert_eq!(now[NAME] == start[NAME], step <= 2);
        let layer = "parameter.projection.layers.0.weight";
        assert_ne!(now[layer], start[layer]);
    }
}

#[test]
fn the_same_seed_gives_the_same_run_and_what_it_says_is_within_bounds() {
    let run = || {
        let mut distiller = distiller(spec(&[]));
        let losses: Vec<f64> = (0..3).map(|_| distiller.step().unwrap().loss).collect();
        (losses, tensors(&distiller), distiller)
    };
    let (losses, all, distiller) = run();
    let (again, others, _) = run();
    assert_eq!(losses, again);
    assert_eq!(all, others);
    let most = 8f64.ln();
    let (loss, spread) = distiller.validate().unwrap();
    assert_eq!(distiller.validate().unwrap(), (loss, spread));
    assert!(loss.is_finite() && loss > 0.0);
    for spread in [spread, distiller.spread().unwrap()] {
        // Jensen: a mean is at least as level as what it is the mean of.
        assert!((-1e-6..=most + 1e-6).contains(&spread.information()));
        assert!((0.0..=most + 1e-6).contains(&spread.entropy));
    }
}

/// A teacher that is not sharp says the same of every picture, and what is measured shows it.
#[test]
fn a_level_teacher_has_all_the_entropy_and_no_information() {
    let blunt = [
        ("teacher_temperature", json!(1e6)),
        ("first_teacher_temperature", json!(1e6)),
    ];
    let mut distiller = distiller(spec(&blunt));
    distiller.step().unwrap();
    let spread = distiller.spread().unwrap();
    // Of numbers in single precision, which differ by 1e-6 at most.
    assert!((spread.entropy - 8f64.ln()).abs() < 1e-5, "{spread:?}");
    assert!(spread.information().abs() < 1e-5, "{spread:?}");
}

/// At a teacher's own temperature it is what validation says; at a high one nothing is told, whatever its own is; and
/// what no spec may have is refused.
#[test]
fn teachers_are_compared_at_one_temperature() {
    let mut distiller = distiller(spec(&[]));
    distiller.step().unwrap();
    let (_, own) = distiller.validate().unwrap();
    assert_eq!(distiller.spread_at(0.04).unwrap(), own);
    let level = distiller.spread_at(1e6).unwrap();
    assert!(level.information().abs() < 1e-5 && level.information() < own.information());
    assert!((level.entropy - 8f64.ln()).abs() < 1e-5, "{level:?}");
    let said = distiller.spread_at(0.0).unwrap_err().to_string();
    assert!(said.contains("teacher_temperature is 0"), "{said}");
}

/// Small views as small images: fewer tokens are read, the run goes on where it stopped, and a model that does not read
/// them, or no whole patches, are refused.
#[test]
fn small_views_are_small_images() {
    let with = |local: Value, resized: bool| -> TrainSpec {
        let mut settings = settings();
        settings["self_distillation"]["crops"] = json!({ "locals": 3, "local_size": local });
        settings["model"]["input"]["resized"] = json!(resized);
        serde_json::from_value(settings).unwrap()
    };
    let small = || with(json!([4, 4]), true);
    let mut whole = distiller(small());
    let step = whole.step().unwrap();
    // Of four images: two views of four patches, three of one, and a class token in each.
    assert_eq!(step.tokens, 4 * (2 * 5 + 3 * 2));
    assert!(step.loss.is_finite());
    let state = whole.state().unwrap();
    let mut resumed = distiller(small());
    resumed.resume(&state).unwrap();
    assert_eq!(whole.step().unwrap(), resumed.step().unwrap());
    assert_eq!(whole.validate().unwrap(), resumed.validate().unwrap());
    // At the size of the model's images nothing changes.
    let mut same = distiller(with(json!([8, 8]), false));
    let mut unsaid = distiller(with(Value::Null, false));
    assert_eq!(same.step().unwrap(), unsaid.step().unwrap());

    let said = |spec: TrainSpec| spec.validate().unwrap_err().to_string();
    assert_eq!(
        said(with(json!([4, 4]), false)),
        "model.input.resized is false, but must be true with small views of a size of their own"
    );
    for local in [json!([4, 6]), json!([16, 8]), json!([0, 4])] {
        let said = said(with(local, true));
        assert!(
            said.starts_with("self_distillation.crops.local_size is ["),
            "{said}"
        );
    }
}

#[test]
fn a_resumed_run_goes_on_bit_for_bit() {
    let mut whole = distiller(spec(&[("frozen_steps", json!(1))]));
    for _ in 0..2 {
        whole.step().unwrap();
    }
    let state = whole.state().unwrap();
    let mut resumed = distiller(spec(&[("frozen_steps", json!(1))]));
    resumed.resume(&state).unwrap();
    for _ in 0..2 {
        let (a, b) = (whole.step().unwrap(), resumed.step().unwrap());
        assert_eq!(a, b);
    }
    assert_eq!(tensors(&whole), tensors(&resumed));
    let other = spec(&[("outputs", json!(9))]);
    let said = distiller(other).resume(&state).unwrap_err().to_string();
    assert!(
        said.contains(
            "the saved run's spec is another (self_distillation.outputs was 8, and is 9)"
        ),
        "{said}"
    );
}

#[test]
fn a_run_in_a_directory_leaves_its_teacher() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("run");
    let spec = spec(&[]);
    let finished = run_on_images(&spec, images(), &out, false, &Device::Cpu).unwrap();
    assert_eq!(finished.steps, STEPS);
    assert!(finished.spread.unwrap().information() >= -1e-6);
    let mut alone = distiller(spec.clone());
    for _ in 0..STEPS {
        alone.step().unwrap();
    }
    let package = Package::open(&finished.model, &OpenOptions::default()).unwrap();
    let kept = package.towers.first().map(|tower| parameters(&tower.model));
    assert_eq!(kept, Some(parameters(&alone.finished().unwrap())));
    let written = std::fs::read_to_string(out.join("run.toml")).unwrap();
    assert_eq!(toml::from_str::<TrainSpec>(&written).unwrap(), spec);
    let log = std::fs::read_to_string(out.join("log.jsonl")).unwrap();
    assert_eq!(log.lines().count() as u64, STEPS);
    assert!(log.lines().all(|line| line.contains("teacher_information")));
    // A run is there, and images are not read by what reads tokens.
    let said = run_on_images(&spec, images(), &out, false, &Device::Cpu).unwrap_err();
    assert!(said.to_string().contains("holds a run"), "{said}");
    let elsewhere = directory.path().join("other");
    let said = run(&spec, &elsewhere, false, &Device::Cpu).unwrap_err();
    assert!(said.to_string().contains("run_on_images"), "{said}");
}

#[test]
fn settings_that_mean_nothing_are_refused() {
    let refused = |change: &dyn Fn(&mut Value)| {
        let mut settings = settings();
        change(&mut settings);
        let spec: TrainSpec = serde_json::from_value(settings).unwrap();
        spec.validate().unwrap_err().to_string()
    };
    for (name, value) in [
        ("length", json!(4)),
        ("accumulate", json!(2)),
        ("average", json!(0.9)),
        ("dense_steps", json!(1)),
        ("recompute", json!(true)),
        ("loss_chunk", json!(4)),
    ] {
        let said = refused(&|settings: &mut Value| settings[name] = value.clone());
        assert_eq!(
            said,
            format!("{name} is given, but must be absent with self_distillation")
        );
    }
    let keep = json!({ "every": 1, "keep": "best" });
    let said = refused(&|settings| settings["validation"] = keep.clone());
    assert!(said.starts_with("validation.keep is given"), "{said}");
    let said = refused(&|settings| settings["data"] = json!({ "kind": "copying", "symbols": 4 }));
    assert!(said.starts_with("data.kind is one of tokens"), "{said}");
    let said = refused(&|settings| settings["model"]["head"] = json!({ "kind": "none" }));
    assert!(said.starts_with("model.head is another"), "{said}");
    let said = refused(&|settings| {
        settings["self_distillation"]["crops"]["local"] = json!([0.5, 0.1]);
    });
    assert!(said.contains("crops.local"), "{said}");
    let said = refused(&|settings| {
        settings
            .as_object_mut()
            .unwrap()
            .remove("self_distillation");
    });
    assert!(said.starts_with("data.kind is shapes"), "{said}");
    let few = Images {
        validation: Vec::new(),
        ..images()
    };
    assert!(Distiller::new(spec(&[]), few, &Device::Cpu).is_err());
}
