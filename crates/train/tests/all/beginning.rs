//! What is refused when a run begins or goes on: before data are read, before anything is written, before a step is done.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::path::Path;

use lapidary_kernels::Device;
use lapidary_train::data::TokenWriter;
use lapidary_train::spec::OptimiserSpec;
use lapidary_train::{TrainSpec, check_directory, run, state};
use serde_json::{Value, json};

const LENGTH: usize = 8;

fn spec(data: Value) -> TrainSpec {
    serde_json::from_value(json!({
        "steps": 2, "batch": 2, "length": LENGTH,
        "schedule": { "peak": 1e-2 },
        "data": data,
        "validation": { "batches": 1, "fraction": 0.2 },
        "model": {
            "width": 8,
            "input": { "kind": "tokens", "vocabulary": 256, "length": 2 * LENGTH },
            "blocks": [{
                "attention": { "kind": "multi-head", "heads": 2, "causal": true },
                "feedforward": { "kind": "dense", "hidden": 8 }
            }],
            "head": { "kind": "language-model" }
        }
    }))
    .unwrap()
}

/// The spec with another vocabulary of the model.
fn with_vocabulary(data: Value, vocabulary: usize) -> TrainSpec {
    let mut spec = serde_json::to_value(spec(data)).unwrap();
    spec["model"]["input"]["vocabulary"] = json!(vocabulary);
    serde_json::from_value(spec).unwrap()
}

fn refusal(spec: &TrainSpec, out: &Path, resume: bool) -> String {
    let refused = run(spec, out, resume, &Device::Cpu).map(|finished| finished.steps);
    refused.unwrap_err().to_string()
}

#[test]
fn a_directory_is_looked_at_before_the_text_is_read() {
    let directory = tempfile::tempdir().unwrap();
    let text = directory.path().join("text.txt");
    std::fs::write(&text, "0123456789".repeat(20)).unwrap();
    let data = json!({ "kind": "text", "file": text });
    let out = directory.path().join("run");
    let mut spec = spec(data);
    run(&spec, &out, false, &Device::Cpu).unwrap();
    std::fs::remove_file(&text).unwrap();

    let said = refusal(&spec, &out, false);
    assert!(
        said.contains("which holds a run, but must be a new one"),
        "{said}"
    );
    let said = refusal(&spec, &out, true);
    assert!(said.starts_with("cannot open"), "{said}");
    assert!(check_directory(&spec, &out, true).is_ok());
    spec.steps = 3;
    let expected = "the saved run's spec is another (steps was 2, and is 3), but must be the same as now; start a new run in another directory";
    assert_eq!(refusal(&spec, &out, true), expected);
    let said = check_directory(&spec, &out, true).unwrap_err();
    assert_eq!(said.to_string(), expected);

    // A model alone is another's, and would be replaced by one that begins anew.
    std::fs::remove_dir_all(out.join("states")).unwrap();
    let said = refusal(&spec, &out, true);
    assert!(
        said.contains("which holds a model without a state"),
        "{said}"
    );
    let file = directory.path().join("file");
    std::fs::write(&file, "mine").unwrap();
    for resume in [false, true] {
        let said = refusal(&spec, &file, resume);
        assert!(
            said.contains("file, which is no directory, but must be"),
            "{said}"
        );
    }
}

#[test]
#[cfg(unix)]
fn two_runs_in_one_directory_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let spec = spec(json!({ "kind": "copying", "symbols": 7 }));
    let out = directory.path().join("run");
    std::fs::create_dir(&out).unwrap();
    let other = std::fs::File::open(&out).unwrap();
    other.lock().unwrap();
    for resume in [false, true] {
        let said = refusal(&spec, &out, resume);
        assert!(
            said.contains("which holds a run that has not ended"),
            "{said}"
        );
    }
    assert_eq!(std::fs::read_dir(&out).unwrap().count(), 0);
    drop(other);
    run(&spec, &out, false, &Device::Cpu).unwrap();
    // It is free again when the run has ended.
    run(&spec, &out, true, &Device::Cpu).unwrap();
}

#[test]
fn a_vocabulary_that_is_too_small_is_told_before_anything_is_written() {
    let directory = tempfile::tempdir().unwrap();
    let text = directory.path().join("text.txt");
    std::fs::write(&text, "one two three four five six seven ".repeat(20)).unwrap();
    let tokens = directory.path().join("numbers.tokens");
    let mut writer = TokenWriter::create(&tokens, 300).unwrap();
    writer.write(&(0..200).collect::<Vec<u32>>()).unwrap();
    writer.finish().unwrap();
    let words = json!({ "words": 7 });
    let out = directory.path().join("run");
    for (data, found, needed) in [
        (json!({ "kind": "text", "file": text }), 255, 256),
        (
            json!({ "kind": "text", "file": text, "tokenizer": words }),
            6,
            7,
        ),
        (json!({ "kind": "tokens", "file": tokens }), 299, 300),
        (json!({ "kind": "copying", "symbols": 7 }), 7, 8),
    ] {
        let said = refusal(&with_vocabulary(data.clone(), found), &out, false);
        let expected = format!(
            "model.input.vocabulary is {found}, but must be at least {needed}: the data have {needed} tokens"
        );
        assert_eq!(said, expected);
        assert!(!out.exists(), "{data}");
        let enough = directory.path().join(format!("run {needed}"));
        run(&with_vocabulary(data, needed), &enough, false, &Device::Cpu).unwrap();
    }

    let mut hidden = with_vocabulary(json!({ "kind": "text", "file": text }), 256);
    hidden.masking = serde_json::from_value(json!({ "hidden": 2 })).unwrap();
    let mut blocks = serde_json::to_value(&hidden.model).unwrap();
    blocks["blocks"][0]["attention"]["causal"] = json!(false);
    hidden.model = serde_json::from_value(blocks).unwrap();
    assert_eq!(
        refusal(&hidden, &out, false),
        "model.input.vocabulary is 256, but must be at least 257: the data have 256 tokens, and the mask is one more"
    );
    assert!(!out.exists());
}

#[test]
fn a_length_that_the_data_do_not_have_is_told_before_anything_is_written() {
    let directory = tempfile::tempdir().unwrap();
    let vertices = directory.path().join("vertices.json");
    let file = json!({
        "tokens": [0, 1, 0], "classes": [2, 3, null], "held_out": [false, true, false]
    });
    std::fs::write(&vertices, file.to_string()).unwrap();
    let out = directory.path().join("run");
    for (data, length, expected) in [
        (
            json!({ "kind": "vertices", "file": vertices }),
            8,
            "length is 8, for 3 vertices, but must be as many tokens as there are vertices",
        ),
        (
            json!({ "kind": "induction", "symbols": 4 }),
            10,
            "length is 10, but must be at most twice the number of symbols, which differ in the first half",
        ),
        (
            json!({ "kind": "recall", "keys": 4, "values": 4 }),
            4,
            "a sequence for associative recall has 4 tokens, but 5 are needed",
        ),
    ] {
        let mut spec = spec(data);
        spec.length = length;
        assert_eq!(refusal(&spec, &out, false), expected);
        assert!(!out.exists(), "{expected}");
    }
}

#[test]
fn fields_are_refused_by_their_names() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("run");
    let many = 4_000_000_000u64;
    for (data, expected) in [
        (
            json!({ "kind": "copying", "symbols": 1 }),
            "data.symbols is 1, but must be at least 2",
        ),
        (
            json!({ "kind": "copying", "symbols": u32::MAX }),
            "data.symbols is 4294967295, but must be below 4 294 967 294",
        ),
        (
            json!({ "kind": "recall", "keys": 0, "values": 4 }),
            "data.keys is 0, but must be at least 1",
        ),
        (
            json!({ "kind": "recall", "keys": 4, "values": 1 }),
            "data.values is 1, but must be at least 2",
        ),
        // Of so many not even a list is made.
        (
            json!({ "kind": "recall", "keys": many, "values": 3 }),
            "model.input.vocabulary is 256, but must be at least 4000000004: the data have 4000000004 tokens",
        ),
    ] {
        assert_eq!(refusal(&spec(data), &out, false), expected);
        assert!(!out.exists(), "{expected}");
    }
    let mut spec = spec(json!({ "kind": "copying", "symbols": 7 }));
    spec.schedule.floor = 2e-2;
    assert_eq!(
        refusal(&spec, &out, false),
        "schedule.floor is 0.02, but must be between 0 and schedule.peak"
    );
    spec.schedule.peak = -1.0;
    let said = refusal(&spec, &out, false);
    assert!(
        said.starts_with("schedule.peak is -1, but must be"),
        "{said}"
    );
}

#[test]
#[cfg(unix)]
fn words_are_not_counted_in_what_can_be_read_but_once() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("run");
    let data = json!({ "kind": "text", "file": "/dev/null", "tokenizer": { "words": 9 } });
    let said = refusal(&spec(data), &out, false);
    assert!(
        said.starts_with("data.tokenizer is words, but must be another for a pipe"),
        "{said}"
    );
    assert!(!out.exists());
}

#[test]
#[cfg(unix)]
fn a_directory_in_place_of_a_text_is_told_before_anything_is_written() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("run");
    for tokenizer in [json!("bytes"), json!({ "words": 9 })] {
        let data = json!({ "kind": "text", "file": directory.path(), "tokenizer": tokenizer });
        let said = refusal(&spec(data), &out, false);
        assert!(said.starts_with("cannot read"), "{said}");
        assert!(!out.exists());
    }
}

/// A token file with a token in its last window that its vocabulary does not have.
#[test]
fn what_ends_the_last_validation_costs_no_step() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("damaged.tokens");
    let count = 100u32;
    let mut bytes = b"LAPTOK1\n".to_vec();
    bytes.extend(2u32.to_le_bytes());
    bytes.extend(256u32.to_le_bytes());
    bytes.extend(u64::from(count).to_le_bytes());
    for place in 0..count {
        let token: u16 = if place == count - 4 { 999 } else { 7 };
        bytes.extend(token.to_le_bytes());
    }
    std::fs::write(&file, &bytes).unwrap();
    let spec = spec(json!({ "kind": "tokens", "file": file }));
    let out = directory.path().join("run");
    let said = refusal(&spec, &out, false);
    assert!(
        said.contains("token 999 is beyond its vocabulary"),
        "{said}"
    );
    let latest = state::latest(&out.join("states")).unwrap().unwrap();
    assert!(latest.ends_with("step-0000000002"), "{latest:?}");
    // Mended, the run goes on from there.
    for byte in bytes.iter_mut().skip(24 + 2 * (count as usize - 4)).take(2) {
        *byte = 0;
    }
    std::fs::write(&file, &bytes).unwrap();
    let finished = run(&spec, &out, true, &Device::Cpu).unwrap();
    assert_eq!((finished.steps, finished.loss), (2, None));
}

#[test]
fn a_run_of_no_step_can_be_resumed_too() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("run");
    let mut spec = spec(json!({ "kind": "copying", "symbols": 7 }));
    spec.steps = 0;
    for resume in [false, true] {
        let finished = run(&spec, &out, resume, &Device::Cpu).unwrap();
        assert_eq!((finished.steps, finished.kept_step), (0, 0));
    }
}

/// Rows of the table that no token asks for have no gradient: their moments are 0, and so would be what they are
/// divided by.
#[test]
fn an_epsilon_of_nothing_is_refused_and_a_small_one_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("run");
    let mut settings =
        serde_json::to_value(spec(json!({ "kind": "copying", "symbols": 7 }))).unwrap();
    settings["model"]["head"] = json!({ "kind": "language-model", "tied": false });
    for (epsilon, is_refused) in [(0.0, true), (-1.0, true), (1e-50, true), (1e-12, false)] {
        settings["optimiser"] = json!({ "kind": "adamw", "epsilon": epsilon });
        let spec: TrainSpec = serde_json::from_value(settings.clone()).unwrap();
        if is_refused {
            let said = refusal(&spec, &out, false);
            assert!(said.starts_with("optimiser.epsilon is "), "{said}");
            assert!(said.contains("a number above 0") && !out.exists(), "{said}");
        } else {
            let finished = run(&spec, &out, false, &Device::Cpu).unwrap();
            assert!(finished.validation_loss.is_finite());
        }
    }
}

/// No learning rate is to blame for what is no number before a step is done.
#[test]
fn a_loss_that_begins_as_no_number_is_the_specs() {
    let directory = tempfile::tempdir().unwrap();
    let data = json!({ "kind": "copying", "symbols": 7 });
    let mut settings = serde_json::to_value(spec(data)).unwrap();
    // Beyond single precision, in which scores are infinite then.
    settings["model"]["blocks"][0]["attention"]["scale"] = json!(1e300);
    let spec: TrainSpec = serde_json::from_value(settings).unwrap();
    let said = refusal(&spec, &directory.path().join("run"), false);
    assert!(said.starts_with("loss is NaN at step 1"), "{said}");
    assert!(said.contains("before any step"), "{said}");
}

/// What would change nothing: a floor that the rate does not fall to, a look ahead along no momentum.
#[test]
fn settings_without_effect_are_refused() {
    let mut spec = spec(json!({ "kind": "copying", "symbols": 7 }));
    let said = |spec: &TrainSpec| {
        let refused = spec.validate().err();
        refused.map(|error| error.to_string()).unwrap_or_default()
    };
    spec.schedule.decay = lapidary_train::Decay::Constant;
    for floor in [0.0, spec.schedule.peak] {
        spec.schedule.floor = floor;
        assert_eq!(said(&spec), "");
    }
    spec.schedule.floor = spec.schedule.peak / 2.0;
    let found = said(&spec);
    assert!(found.starts_with("schedule.floor is "), "{found}");
    assert!(
        found.contains("but must be absent with schedule.decay"),
        "{found}"
    );
    spec.schedule.floor = 0.0;
    for (momentum, expected) in [
        (0.9, ""),
        (0.0, "optimiser.nesterov is true, but must be false"),
    ] {
        spec.optimiser = OptimiserSpec::Sgd {
            momentum,
            nesterov: true,
            weight_decay: 0.0,
        };
        let found = said(&spec);
        assert!(found.starts_with(expected), "{found}");
        assert_eq!(found.is_empty(), expected.is_empty(), "{found}");
    }
}

/// Sequences of 8 tokens, which some blocks see in part.
#[test]
fn models_that_cannot_read_the_sequences_are_refused() {
    let said = |change: &dyn Fn(&mut Value)| {
        let mut settings =
            serde_json::to_value(spec(json!({ "kind": "copying", "symbols": 7 }))).unwrap();
        change(&mut settings);
        let spec: TrainSpec = serde_json::from_value(settings).unwrap();
        let refused = spec.validate().err();
        refused.map(|error| error.to_string()).unwrap_or_default()
    };
    let linformer = |longest: usize| {
        json!({
            "kind": "multi-head", "heads": 2,
            "mechanism": { "kind": "linformer", "slots": 2, "longest": longest }
        })
    };
    let mixer = |attention: Value| {
        said(&|settings: &mut Value| {
            settings["model"]["blocks"][0]["attention"] = attention.clone()
        })
    };
    assert_eq!(mixer(linformer(8)), "");
    assert_eq!(
        mixer(linformer(7)),
        "model.blocks.0.attention.mechanism.longest is 7, but must be at least 8, the length"
    );
    let mut any = linformer(4);
    any["mechanism"]["longer"] = json!("interpolate");
    assert_eq!(mixer(any), "");
    let drawing = |positions: usize| {
        mixer(json!({
            "kind": "multi-head", "heads": 2, "causal": true,
            "position": { "kind": "fire", "randomised": positions }
        }))
    };
    assert_eq!(drawing(8), "");
    assert_eq!(
        drawing(7),
        "model.blocks.0.attention.position.randomised is 7, but must be at least 8, the length"
    );
    // A band has half of the numbers.
    let wavelet = |longest| mixer(json!({ "kind": "wavelet", "inner": linformer(longest) }));
    assert_eq!(wavelet(4), "");
    assert_eq!(
        wavelet(3),
        "model.blocks.0.attention.inner.mechanism.longest is 3, but must be at least 4, the coefficients of a band"
    );
    let circuit = json!({
        "kind": "multi-head", "heads": 2,
        "mechanism": { "kind": "doubly-stochastic", "operator": { "kind": "circuit", "tokens": 4, "qubits": 2 } }
    });
    assert_eq!(
        mixer(circuit),
        "model.blocks.0.attention.mechanism.operator.tokens is 4, but must be at least 8, the length"
    );
    let layout = said(&|settings| {
        settings["length"] = json!(16);
        settings["model"]["blocks"][0]["attention"]["mechanism"] = json!({
            "kind": "sparse", "pattern": { "kind": "layout", "block": 8, "heads": [["#"]] }
        });
    });
    assert_eq!(
        layout,
        "model.blocks.0.attention.mechanism.pattern.heads is 8, but must be at least 16, the length"
    );
    // Of a group there are four tokens at a time, and tiles are all of the model's.
    let grouped = |longest: usize, more: Value| {
        said(&|settings| {
            settings["model"]["blocks"][0]["attention"] = linformer(longest);
            settings["model"]["organisation"] =
                json!({ "kind": "interleaved", "layout": "(1)", "group": 4, "groups": 4 });
            for (name, value) in more.as_object().unwrap() {
                settings["model"]["organisation"][name] = value.clone();
            }
        })
    };
    assert_eq!(grouped(4, json!({})), "");
    assert_eq!(
        grouped(3, json!({})),
        "model.blocks.0.attention.mechanism.longest is 3, but must be at least 4, the tokens of a group"
    );
    let tiles = json!({ "tiles": { "columns": 4, "height": 2, "width": 2 } });
    assert_eq!(
        grouped(4, tiles),
        "length is 8, but must be 16, all tokens of the organisation's tiles"
    );
    let conditioned = grouped(4, json!({ "condition": 2 }));
    assert!(
        conditioned.starts_with("model.organisation.condition is 2, but must be 0"),
        "{conditioned}"
    );
    let crossing = said(&|settings| {
        settings["model"]["blocks"][0]["cross_attention"] = json!({ "heads": 2 });
    });
    assert!(
        crossing.starts_with("model.blocks.0.cross_attention is \"given\", but must be absent"),
        "{crossing}"
    );
}
