//! What a run finds out before it writes anything, and the spec that it writes.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::path::Path;

use lapidary_kernels::Device;
use lapidary_train::data::TokenWriter;
use lapidary_train::{Result, TrainSpec, run};
use serde_json::{Value, json};

const LENGTH: usize = 8;

/// Of a text or a token file.
fn spec(data: Value, fraction: f64) -> TrainSpec {
    serde_json::from_value(json!({
        "seed": 3, "steps": 2, "batch": 2, "length": LENGTH,
        "schedule": { "peak": 1e-2 },
        "data": data,
        "validation": { "batches": 1, "fraction": fraction },
        "model": {
            "width": 8,
            "input": { "kind": "tokens", "vocabulary": 256, "length": LENGTH },
            "blocks": [{
                "attention": { "kind": "multi-head", "heads": 2, "causal": true },
                "feedforward": { "kind": "dense", "hidden": 8 }
            }],
            "head": { "kind": "language-model" }
        }
    }))
    .unwrap()
}

fn started(spec: &TrainSpec, out: &Path) -> Result<()> {
    run(spec, out, false, &Device::Cpu).map(|_| ())
}

/// A window takes nine tokens: eight of a hundred are too few on either side, and nine are enough.
#[test]
fn data_without_a_window_on_either_side_are_refused_before_anything_is_written() {
    let directory = tempfile::tempdir().unwrap();
    let text = directory.path().join("text.txt");
    std::fs::write(&text, "0123456789".repeat(10)).unwrap();
    let tokens = directory.path().join("numbers.tokens");
    let mut writer = TokenWriter::create(&tokens, 256).unwrap();
    writer.write(&(0..100).collect::<Vec<u32>>()).unwrap();
    writer.finish().unwrap();
    let out = directory.path().join("run");
    for (kind, file) in [("text", &text), ("tokens", &tokens)] {
        let data = json!({ "kind": kind, "file": file });
        for (fraction, found, side) in [
            (0.0, 0, "validation"),
            (0.085, 8, "validation"),
            (0.925, 8, "training"),
        ] {
            let said = started(&spec(data.clone(), fraction), &out).unwrap_err();
            assert_eq!(
                said.to_string(),
                format!(
                    "validation.fraction = {fraction} leaves {found} of the 100 tokens of {} for {side}, but a window \
                     takes 9, length and one more: change either, or take a longer file",
                    file.display()
                )
            );
            assert!(!out.exists(), "{kind} {fraction}");
        }
        for fraction in [0.095, 0.915] {
            let enough = directory.path().join(format!("{kind} {fraction}"));
            started(&spec(data.clone(), fraction), &enough).unwrap();
        }
    }
}

/// Whether a long text suffices is known from its first pieces, and a text that is too short from all of them.
#[test]
fn a_text_of_several_pieces_is_counted_whole() {
    let directory = tempfile::tempdir().unwrap();
    let text = directory.path().join("text.txt");
    std::fs::write(&text, "a line of it\n".repeat(10_000)).unwrap();
    let data = json!({ "kind": "text", "file": text });
    let out = directory.path().join("run");
    let said = started(&spec(data.clone(), 5e-5), &out).unwrap_err();
    let expected = "validation.fraction = 0.00005 leaves 6 of the 130000 tokens";
    assert!(said.to_string().starts_with(expected), "{said}");
    assert!(!out.exists());
    // Of the first piece this would be six.
    started(&spec(data, 1e-4), &out).unwrap();
}

fn written(out: &Path) -> String {
    std::fs::read_to_string(out.join("run.toml")).unwrap()
}

#[test]
fn the_spec_is_written_as_it_runs() {
    let directory = tempfile::tempdir().unwrap();
    let text = directory.path().join("text.txt");
    std::fs::write(&text, "0123456789".repeat(20)).unwrap();
    let out = directory.path().join("run");
    let mut spec = spec(json!({ "kind": "text", "file": text }), 0.1);
    spec.seed = u64::MAX;
    spec.clip = Some(0.1 + 0.2);
    spec.groups =
        serde_json::from_value(json!([{ "path": "embeddings.", "rate_factor": 0.5 }])).unwrap();
    started(&spec, &out).unwrap();
    assert_eq!(toml::from_str::<TrainSpec>(&written(&out)).unwrap(), spec);

    // Where it says the same it is left, with what it says beside that.
    let commented = format!("# Mine.\n{}", written(&out));
    std::fs::write(out.join("run.toml"), &commented).unwrap();
    run(&spec, &out, true, &Device::Cpu).unwrap();
    assert_eq!(written(&out), commented);

    // What may change is written again, and what may not leaves it as it was.
    spec.validation.every = 1;
    run(&spec, &out, true, &Device::Cpu).unwrap();
    let changed = written(&out);
    assert_eq!(toml::from_str::<TrainSpec>(&changed).unwrap(), spec);
    spec.steps += 1;
    let said = run(&spec, &out, true, &Device::Cpu)
        .unwrap_err()
        .to_string();
    assert!(
        said.starts_with("the saved run's spec is another"),
        "{said}"
    );
    assert_eq!(written(&out), changed);
}
