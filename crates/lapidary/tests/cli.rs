//! The program as a user runs it: real arguments, real files, and wrong ones on purpose.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::path::{Path, PathBuf};

use assert_cmd::Command;
use serde_json::Value;

fn lapidary(arguments: &[&str]) -> Command {
    let mut command = Command::cargo_bin("lapidary").unwrap();
    command
        .args(arguments)
        .env("NO_COLOR", "1")
        .env_remove("RUST_LOG");
    command
}

fn output(arguments: &[&str]) -> String {
    let done = lapidary(arguments).assert().success();
    String::from_utf8(done.get_output().stdout.clone()).unwrap()
}

fn json(arguments: &[&str]) -> Value {
    serde_json::from_str(&output(arguments)).unwrap()
}

/// Fails with status 1 and one line that contains every one of `words`.
fn refused(arguments: &[&str], words: &[&str]) {
    let done = lapidary(arguments).assert().failure().code(1);
    let error = String::from_utf8(done.get_output().stderr.clone()).unwrap();
    assert!(error.starts_with("error: "), "{error}");
    assert_eq!(error.trim_end().lines().count(), 1, "{error}");
    for word in words {
        assert!(error.contains(word), "{word:?} is not in {error}");
    }
}

fn family(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../tests/fixtures/families")
        .join(name);
    path.to_str().unwrap().to_owned()
}

fn write(directory: &tempfile::TempDir, name: &str, content: &[u8]) -> String {
    let path: PathBuf = directory.path().join(name);
    std::fs::write(&path, content).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn explains_the_embedded_model_by_every_method() {
    let text = "the farmer near the dogs";
    for method in [
        "decompx",
        "attnlrp",
        "contextual-decomposition",
        "cp-lrp",
        "gradient-x-input",
        "integrated-gradients",
    ] {
        let document = json(&[
            "explain", "embedded", "--text", text, "--target", "sings", "--foil", "sing",
            "--method", method, "--json",
        ]);
        assert_eq!(document["tokens"].as_array().unwrap().len(), 6, "{method}");
        assert_eq!(
            document["explanations"][0]["explanation"]["scores"]
                .as_array()
                .unwrap()
                .len(),
            6,
            "{method}"
        );
        assert_eq!(document["explanations"][0]["target"], "sings");
    }
    let document = json(&[
        "explain", "embedded", "--text", text, "--method", "decompx", "--json",
    ]);
    let account = &document["explanations"][0]["explanation"]["account"];
    assert!(account["unattributed"].as_f64().unwrap().abs() < 1e-3);
    assert!(account["largest_site_error"].as_f64().unwrap() < 1e-4);
}

#[test]
fn a_phrase_is_explained_as_one() {
    let mut arguments = vec!["explain", "embedded", "--text", "the farmer near the dogs"];
    arguments.extend(["--method", "contextual-decomposition", "--split-attention"]);
    arguments.extend(["--stabilise", "--phrase", "1-2", "--json"]);
    let explanation = json(&arguments)["explanations"][0]["explanation"].clone();
    assert_eq!(explanation["unit"], "phrase");
    assert_eq!(explanation["scores"].as_array().unwrap().len(), 5);
    let name = explanation["labels"][1].as_str().unwrap();
    assert!(name.contains("the") && name.contains("farmer"), "{name}");
    let last = arguments.len() - 2;
    arguments[last] = "4-9";
    refused(&arguments, &["phrase is 4-9", "6, the number of tokens"]);
}

/// Which heads make the verb agree with its subject.
#[test]
fn finds_circuits_in_prompts_and_datasets() {
    let directory = tempfile::tempdir().unwrap();
    let rows = "n,prefix,good,bad\n0,the farmer near the dogs,sings,sing\n\
                1,the dogs near the farmer,sing,sings\n2,the farmer,no such word,sing\n";
    let dataset = write(&directory, "agreement.csv", rows.as_bytes());
    let html = directory.path().join("circuit.html");
    let html = html.to_str().unwrap();
    let mut arguments = vec!["inspect", "circuit", "embedded", "--dataset", &dataset];
    arguments.extend([
        "--columns",
        "prefix,good,bad",
        "--html",
        html,
        "--draws",
        "3",
    ]);
    arguments.extend(["--places", "query,key,value", "--prune", "--json"]);
    let found = json(&arguments);
    let notes = found["notes"].to_string();
    assert!(
        notes.contains("2 prompts") && notes.contains("1 rows left out"),
        "{notes}"
    );
    assert_eq!(found["tables"].as_array().unwrap().len(), 3);
    let nodes = found["graphs"][0]["nodes"].as_array().unwrap();
    assert_eq!(nodes.last().unwrap()["name"], "scores");
    assert!(
        std::fs::read_to_string(html)
            .unwrap()
            .contains("svg class=\"graph\"")
    );

    let text = "the farmer near the dogs";
    let one = [
        "inspect",
        "circuit",
        "embedded",
        "--text",
        text,
        "--positions",
        "--draws",
        "2",
    ];
    let printed = output(&one);
    assert!(
        printed.contains("Random circuits") && printed.contains("@"),
        "{printed}"
    );
    arguments[6] = "prefix,right,bad";
    refused(&arguments, &["no column \"right\"", "prefix"]);
}

#[test]
fn explains_every_family_that_reads_text() {
    for name in [
        "gpt2",
        "opt",
        "llama",
        "bert",
        "bert-classifier",
        "roberta-classifier",
        "mamba",
        "mixtral",
        "clip",
    ] {
        for method in ["decompx", "attnlrp", "logit-attribution"] {
            let model = family(name);
            let document = json(&[
                "explain", &model, "--tokens", "5,9,3,17", "--method", method, "--json",
            ]);
            let account = &document["explanations"][0]["explanation"]["account"];
            if method != "attnlrp" {
                let left = account["unattributed"].as_f64().unwrap();
                let scale = account["explained"].as_f64().unwrap().abs().max(1.0);
                assert!(left.abs() < 1e-3 * scale, "{name} {method}: {account}");
            }
        }
    }
}

#[test]
fn alti_logit_names_what_no_token_gets() {
    for name in ["gpt2", "opt", "llama"] {
        let model = family(name);
        let arguments = [
            "explain",
            &model,
            "--tokens",
            "5,9,3,17",
            "--method",
            "alti-logit",
        ];
        let document = json(&[&arguments[..], &["--json"]].concat());
        let account = &document["explanations"][0]["explanation"]["account"];
        let elsewhere = account["elsewhere"].as_array().unwrap();
        let parts: f64 = elsewhere.iter().map(|part| part[1].as_f64().unwrap()).sum();
        let number = |name: &str| account[name].as_f64().unwrap();
        let left = number("explained") - number("attributed") - parts;
        assert!(
            left.abs() < 1e-4 * number("explained").abs().max(1.0),
            "{name}: {account}"
        );
        assert!(
            elsewhere.iter().any(|part| part[0] == "feed-forward parts"),
            "{name}"
        );
        let traced = json(&[&arguments[..], &["--trace-feedforward", "--json"]].concat());
        let elsewhere = traced["explanations"][0]["explanation"]["account"]["elsewhere"]
            .as_array()
            .unwrap();
        assert!(
            !elsewhere.iter().any(|part| part[0] == "feed-forward parts"),
            "{name}"
        );
    }
    let model = family("bert-classifier");
    let post_norm = [
        "explain",
        &model,
        "--tokens",
        "5,9,3,17",
        "--method",
        "alti-logit",
    ];
    refused(&post_norm, &["post-norm", "globenc"]);
}

#[test]
fn runs_on_tensors_at_full_precision() {
    let directory = tempfile::tempdir().unwrap();
    let input = write(
        &directory,
        "in.json",
        br#"{"input_ids": [[3, 4, 5], [6, 7, 1]], "attention_mask": [[1, 1, 1], [1, 1, 0]]}"#,
    );
    let model = family("bert-classifier");
    let document = json(&[
        "run",
        &model,
        "--input",
        &input,
        "--sites",
        "blocks.*.out",
        "--json",
    ]);
    assert_eq!(document["logits"].as_array().unwrap().len(), 2);
    // What each of two blocks gives, and the attention and feed-forward part in it.
    assert_eq!(document["sites"].as_object().unwrap().len(), 6);
    let pixels: Vec<Vec<Vec<f32>>> = vec![vec![vec![0.5; 16]; 16]; 3];
    let pixels = serde_json::to_vec(&serde_json::json!({ "pixel_values": [pixels] })).unwrap();
    let input = write(&directory, "pixels.json", &pixels);
    assert_eq!(
        json(&["run", &family("vit"), "--input", &input, "--json"])["logits"][0]
            .as_array()
            .unwrap()
            .len(),
        5
    );
}

#[test]
fn generation_is_the_same_with_and_without_a_cache() {
    let common = [
        "generate",
        "embedded",
        "--prompt",
        "the capital of",
        "--prompt",
        "the king",
        "--tokens",
        "8",
        "--json",
    ];
    let cached = json(&common);
    let fresh = json(&[&common[..], &["--no-cache"]].concat());
    assert_eq!(cached["sequences"], fresh["sequences"]);
    let sampled = |seed: &str| {
        json(&[&common[..], &["--temperature", "1", "--seed", seed]].concat())["sequences"].clone()
    };
    assert_eq!(sampled("3"), sampled("3"));
    assert_ne!(sampled("3"), sampled("4"));
}

#[test]
fn prunes_heals_and_says_what_zeros_take() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("cut");
    let page = directory.path().join("page.html");
    let arguments = [
        "compress",
        "embedded",
        "--method",
        "second-order",
        "--ratio",
        "0.5",
        "--pattern",
        "2:4",
        "--windows",
        "4",
        "--window",
        "32",
        "--heal",
        "3",
        "--heal-rate",
        "0.0003",
        "--distil",
        "0.5",
        "--html",
        page.to_str().unwrap(),
        "--out",
    ];
    let report = json(&[&arguments[..], &[out.to_str().unwrap(), "--json"]].concat());
    let healing = &report["healing"];
    assert_eq!(healing["training"].as_array().unwrap().len(), 3);
    assert!(healing["after"].as_f64().unwrap() <= healing["before"].as_f64().unwrap());
    assert!(healing["zeros"].as_u64().unwrap() > 0);
    let note = report["report"]["notes"][0].as_str().unwrap();
    assert!(note.contains("as 2 of 4"), "{note}");
    let page = std::fs::read_to_string(&page).unwrap();
    assert!(page.contains("Healing") && page.contains("as 2 of 4"));
    let again = directory.path().join("again");
    let mut text = lapidary(&[&arguments[..], &[again.to_str().unwrap()]].concat());
    let text = String::from_utf8(text.assert().success().get_output().stdout.clone()).unwrap();
    for words in [
        "healing     3 steps",
        "zeros       ",
        "50.0 % zero",
        "healed on",
    ] {
        assert!(text.contains(words), "{words} in {text}");
    }
}

#[test]
fn times_matrices_with_zeros() {
    let arguments = [
        "bench", "sparse", "--width", "16", "--length", "8", "--repeat", "1",
    ];
    let report = json(&[&arguments[..], &["--json"]].concat());
    let rows = report["measured"].as_array().unwrap();
    let dense = rows.iter().find(|row| row["format"] == "dense").unwrap();
    assert_eq!(dense["bytes"], 4 * 64 * 16);
    assert!(rows.iter().any(|row| row["format"] == "CSR"));
    let even = report["csr_breaks_even"]["bytes"].as_f64().unwrap();
    assert!(even > 0.3 && even < 0.5, "{even}");
    lapidary(&arguments).assert().success();
    refused(
        &["bench", "sparse", "--width", "6"],
        &["6", "multiple of 4"],
    );
}

#[test]
fn compresses_saves_loads_and_explains_again() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("cut");
    let out = out.to_str().unwrap();
    let report = json(&[
        "compress",
        "embedded",
        "--method",
        "whitened",
        "--ratio",
        "0.3",
        "--windows",
        "4",
        "--window",
        "32",
        "--out",
        out,
        "--json",
    ]);
    assert!(report["kept"].as_f64().unwrap() < 0.8);
    assert_eq!(report["saved_as"], "lapidary");
    let explained = json(&["explain", out, "--text", "the farmer", "--json"]);
    assert!(
        explained["explanations"][0]["explanation"]["account"]["largest_site_error"]
            .as_f64()
            .unwrap()
            < 1e-4
    );
    refused(
        &["compress", "embedded", "--ratio", "0.3", "--out", out],
        &["empty directory"],
    );
    let dense = directory.path().join("dense");
    let model = family("gpt2");
    let report = json(&[
        "compress",
        &model,
        "--method",
        "svd",
        "--ratio",
        "0.5",
        "--dense",
        "--out",
        dense.to_str().unwrap(),
        "--json",
    ]);
    assert_eq!(report["saved_as"], "hugging-face");
    assert!(dense.join("config.json").is_file());
}

/// Fewer blocks, and narrower parts where all are alike, are shapes that other programs know.
#[test]
fn stock_shapes_are_written_as_such() {
    let directory = tempfile::tempdir().unwrap();
    let text = "the farmer near the dogs sings and the dogs sing ".repeat(40);
    let text = write(&directory, "text", text.as_bytes());
    let compress = |name: &str, method: &str, ratio: &str, more: &[&str]| {
        let model = family(name);
        let arguments = [
            "compress",
            &model,
            "--method",
            method,
            "--ratio",
            ratio,
            "--calibrate",
            &text,
            "--windows",
            "4",
            "--window",
            "16",
            "--json",
        ];
        json(&[&arguments[..], more].concat())
    };
    for (name, method, ratio, stock) in [
        ("gpt2", "modegpt", "0.25", true),
        ("llama", "lorap", "0.25", true),
        ("llama", "slicegpt-shared", "0.25", true),
        ("gpt2", "slicegpt-shared", "0.25", false),
        ("llama", "fusegpt", "0.5", true),
    ] {
        let out = directory.path().join(format!("{name}-{method}"));
        let out = out.to_str().unwrap();
        let report = compress(name, method, ratio, &["--uniform", "--out", out]);
        let expected = if stock { "hugging-face" } else { "lapidary" };
        assert_eq!(report["saved_as"], expected, "{name} {method}");
        assert!(report["kept"].as_f64().unwrap() < 1.0);
    }
    let plan = compress("llama", "fusegpt", "0.5", &["--plan-only"]);
    assert_eq!(plan["modules"][0]["change"], "remove");
    assert!(
        plan["modules"][1]["change"]["fuse"]["from"].is_u64(),
        "{plan}"
    );
    let compared = ["--compare", "all"];
    let compared = compress("llama", "svd", "0.3", &compared);
    let left_out = compared["left_out"].as_array().unwrap();
    let trains = left_out
        .iter()
        .filter(|pair| pair[1].as_str().unwrap().contains("trains"));
    assert_eq!(trains.count(), 2, "{left_out:?}");
}

#[test]
fn trains_and_resumes_to_the_same_weights() {
    let directory = tempfile::tempdir().unwrap();
    let spec = write(
        &directory,
        "spec.toml",
        br#"
steps = 6
batch = 4
length = 16
[schedule]
peak = 1e-2
[checkpoint]
every = 3
[data]
kind = "copying"
symbols = 7
[model]
width = 16
[model.input]
kind = "tokens"
vocabulary = 8
length = 16
[[model.blocks]]
attention = { kind = "multi-head", heads = 2, causal = true, dropout = 0.1 }
feedforward = { kind = "dense", hidden = 32 }
dropout = 0.1
[model.head]
kind = "language-model"
"#,
    );
    let at = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let (whole, parts) = (at("whole"), at("parts"));
    output(&["train", &spec, "--out", &whole]);
    // A run that died after its third step leaves a state, and no model.
    output(&["train", &spec, "--out", &parts]);
    std::fs::remove_dir_all(Path::new(&parts).join("model")).unwrap();
    std::fs::remove_dir_all(Path::new(&parts).join("states/step-0000000006")).unwrap();
    output(&["train", &spec, "--out", &parts, "--resume"]);
    let weights =
        |run: &str| std::fs::read(Path::new(run).join("model/model.safetensors")).unwrap();
    assert!(
        weights(&whole) == weights(&parts),
        "the resumed run ends with other weights"
    );
    refused(
        &["train", &spec, "--out", &whole],
        &["holds a run", "--resume"],
    );
}

#[test]
fn evaluates_with_token_and_window_counts() {
    let directory = tempfile::tempdir().unwrap();
    let text = "the farmer near the dogs sings . the king praised himself . ".repeat(20);
    let file = write(&directory, "text.txt", text.as_bytes());
    let document = json(&[
        "evaluate", "embedded", "--text", &file, "--window", "32", "--stride", "16", "--json",
    ]);
    assert_eq!(
        document["scored_tokens"].as_u64().unwrap() + 1,
        document["text_tokens"].as_u64().unwrap()
    );
    assert!(document["perplexity"].as_f64().unwrap() > 1.0);
    refused(
        &["evaluate", "embedded", "--text", &file, "--window", "1000"],
        &["window is 1000", "128"],
    );
    let empty = write(&directory, "empty.txt", b"  \n");
    refused(&["evaluate", "embedded", "--text", &empty], &["empty"]);
}

#[test]
fn the_catalogue_measures_every_part() {
    let entries = json(&["parts", "--width", "16", "--length", "8", "--json"]);
    let entries = entries.as_array().unwrap();
    assert!(entries.len() >= 18);
    assert!(
        entries
            .iter()
            .all(|entry| entry["flops"].as_u64().unwrap() > 0)
    );
    refused(
        &["parts", "nonsense", "--width", "16", "--length", "8"],
        &["nonsense"],
    );
}

#[test]
fn wrong_input_gets_one_sentence() {
    let directory = tempfile::tempdir().unwrap();
    refused(
        &["explain", "/no/such/model", "--text", "a"],
        &["/no/such/model", "not a directory"],
    );
    refused(&["explain", "embedded", "--text", "  "], &["empty"]);
    refused(
        &["explain", "embedded", "--text", "the zebra sings"],
        &["zebra", "vocabulary"],
    );
    refused(
        &[
            "explain",
            "embedded",
            "--text",
            "the farmer",
            "--target",
            "9999",
        ],
        &["9999", "403"],
    );
    let masked = family("bert-masked-lm");
    refused(
        &["explain", &masked, "--tokens", "2,5,3", "--target", "☃"],
        &["☃", "not one token"],
    );
    refused(
        &[
            "explain",
            "embedded",
            "--text",
            "the farmer",
            "--bias",
            "all",
        ],
        &["absdot"],
    );
    refused(
        &["explain", "embedded", "--tokens", "1,2,99999"],
        &["99999", "403"],
    );
    let long = vec!["1"; 200].join(",");
    refused(&["explain", "embedded", "--tokens", &long], &["200", "128"]);
    refused(
        &[
            "explain",
            "embedded",
            "--text",
            "the farmer",
            "--html",
            "/no/such/dir/x.html",
        ],
        &["/no/such/dir"],
    );
    refused(
        &["explain", &family("vit"), "--text", "a"],
        &["reads images"],
    );
    let input = write(
        &directory,
        "ragged.json",
        br#"{"input_ids": [[1, 2], [3]]}"#,
    );
    refused(&["run", &family("gpt2"), "--input", &input], &["ragged"]);
    let input = write(&directory, "other.json", br#"{"inputs": [[1, 2]]}"#);
    refused(
        &["run", &family("gpt2"), "--input", &input],
        &["inputs", "input_ids"],
    );
    let input = write(&directory, "not.json", b"{");
    refused(&["run", &family("gpt2"), "--input", &input], &["not.json"]);
    let input = write(&directory, "ids.json", br#"{"input_ids": [[1, 2]]}"#);
    refused(
        &[
            "run",
            &family("gpt2"),
            "--input",
            &input,
            "--sites",
            "nothing.*",
        ],
        &["nothing.*"],
    );
    refused(
        &["compress", "embedded", "--ratio", "1.5", "--out", "x"],
        &["1.5"],
    );
    let most = usize::MAX.to_string();
    let compress = ["compress", "embedded", "--ratio", "0.3", "--out", "x"];
    for (more, words) in [
        (&["--heal-rate", "0.1"][..], "--heal"),
        (&["--pattern", "4:2"], "2:4"),
        (&["--pattern", "two"], "2:4"),
        (&["--method", "magnitude", "--pattern", "2:4"], "2 of 4"),
    ] {
        let done = lapidary(&[&compress[..], more].concat()).assert().failure();
        let error = String::from_utf8(done.get_output().stderr.clone()).unwrap();
        assert!(error.contains(words), "{words} in {error}");
    }
    refused(
        &[
            &compress[..],
            &["--windows", "4", "--heal", "1", "--distil", "2"],
        ]
        .concat(),
        &["distillation", "0 to 1"],
    );
    refused(
        &[&compress[..], &["--windows", &most]].concat(),
        &["windows", "65536"],
    );
    refused(
        &[&compress[..], &["--window", "0"]].concat(),
        &["at least 1 token"],
    );
    refused(
        &["generate", &family("bert-masked-lm"), "--prompt", "a"],
        &[],
    );
    lapidary(&["explain", "embedded"]).assert().code(2);
    lapidary(&["frobnicate"]).assert().code(2);
}

#[test]
fn broken_checkpoints_are_refused_by_name() {
    let directory = tempfile::tempdir().unwrap();
    let copy = |name: &str| {
        let to = directory.path().join(name);
        std::fs::create_dir_all(&to).unwrap();
        for file in ["config.json", "model.safetensors"] {
            std::fs::copy(
                Path::new(&family("bert-classifier")).join(file),
                to.join(file),
            )
            .unwrap();
        }
        to
    };
    let input = write(&directory, "ids.json", br#"{"input_ids": [[1, 2]]}"#);
    let run = |model: &Path, words: &[&str]| {
        refused(&["run", model.to_str().unwrap(), "--input", &input], words)
    };

    let cut = copy("truncated");
    let bytes = std::fs::read(cut.join("model.safetensors")).unwrap();
    std::fs::write(cut.join("model.safetensors"), &bytes[..bytes.len() / 2]).unwrap();
    run(&cut, &["model.safetensors"]);

    let lying = copy("lying");
    let mut bytes = std::fs::read(lying.join("model.safetensors")).unwrap();
    bytes[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    std::fs::write(lying.join("model.safetensors"), bytes).unwrap();
    run(&lying, &["model.safetensors"]);

    let absurd = copy("absurd");
    let config = std::fs::read_to_string(absurd.join("config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&config).unwrap();
    config["hidden_size"] = 1_000_000_000_000u64.into();
    std::fs::write(absurd.join("config.json"), config.to_string()).unwrap();
    run(&absurd, &["hidden_size"]);
    config["hidden_size"] = 48.into();
    std::fs::write(absurd.join("config.json"), config.to_string()).unwrap();
    run(&absurd, &["shape"]);
    config["model_type"] = "perceiver".into();
    std::fs::write(absurd.join("config.json"), config.to_string()).unwrap();
    run(&absurd, &["perceiver", "bert"]);

    let untokenised = copy("untokenised");
    refused(
        &["explain", untokenised.to_str().unwrap(), "--text", "a"],
        &["tokenizer"],
    );
}

#[test]
fn the_demo_writes_a_report_without_network_references() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("report.html");
    let text = output(&["demo", "--out", out.to_str().unwrap()]);
    assert!(text.contains("conservation error"));
    let page = std::fs::read_to_string(out).unwrap();
    assert!(page.starts_with("<!DOCTYPE html>"));
    assert!(!page.contains("http://") && !page.contains("https://") && !page.contains("<script"));
}

#[test]
fn help_lists_every_verb() {
    insta::assert_snapshot!(output(&["--help"]));
}

/// Images `[count, 3, size, size]` as JSON, no two alike.
fn images(count: usize, size: usize) -> Vec<u8> {
    let value = |i: usize| ((i * 7919) % 1000) as f64 / 500.0 - 1.0;
    let mut index = 0;
    let mut image = || -> Value {
        let mut row = || -> Value {
            (0..size)
                .map(|_| {
                    index += 1;
                    Value::from(value(index))
                })
                .collect()
        };
        (0..3)
            .map(|_| (0..size).map(|_| row()).collect::<Value>())
            .collect()
    };
    let pixels: Value = (0..count).map(|_| image()).collect();
    serde_json::to_vec(&serde_json::json!({ "pixel_values": pixels })).unwrap()
}

#[test]
fn explains_and_compresses_what_reads_images() {
    let directory = tempfile::tempdir().unwrap();
    let one = write(&directory, "one.json", &images(1, 16));
    let many = write(&directory, "many.json", &images(8, 16));
    for name in ["vit", "deit", "clip"] {
        let document = json(&["explain", &family(name), "--input", &one, "--json"]);
        let tokens = document["tokens"].as_array().unwrap();
        assert_eq!(tokens[0], "[class]", "{name}");
        assert_eq!(tokens.last().unwrap(), "row 3 column 3", "{name}");
        let explanation = &document["explanations"][0]["explanation"];
        let scores = explanation["scores"].as_array().unwrap();
        assert_eq!(scores.len(), tokens.len(), "{name}");
        let left_out = explanation["account"]["unattributed"].as_f64().unwrap();
        assert!(left_out.abs() < 1e-4, "{name}: {left_out}");
    }
    let vit = family("vit");
    refused(&["explain", &vit, "--input", &many], &["8", "one example"]);
    refused(
        &["explain", &family("gpt2"), "--input", &one],
        &["input_ids"],
    );
    let out = directory.path().join("out");
    let out = out.to_str().unwrap();
    let arguments = ["--method", "fwsvd", "--ratio", "0.2", "--out", out];
    refused(
        &[&["compress", &vit], &arguments[..]].concat(),
        &["pixel_values"],
    );
    let calibrated = ["compress", &vit, "--calibrate", &many, "--json"];
    let document = json(&[&calibrated[..], &arguments[..]].concat());
    assert_eq!(document["agreement_on_calibration"]["predictions"], 8);
    json(&["explain", out, "--input", &one, "--json"]);
}

#[test]
fn padding_gets_nothing_and_changes_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let padded =
        br#"{"input_ids": [[2, 5, 6, 7, 3, 0, 0]], "attention_mask": [[1, 1, 1, 1, 1, 0, 0]]}"#;
    let padded = write(&directory, "padded.json", padded);
    for name in ["bert-classifier", "gpt2"] {
        let model = family(name);
        let alone = json(&["explain", &model, "--tokens", "2,5,6,7,3", "--json"]);
        let document = json(&["explain", &model, "--input", &padded, "--json"]);
        assert_eq!(document["target"], alone["target"], "{name}");
        let scores = |document: &Value| -> Vec<f64> {
            let scores = document["explanations"][0]["explanation"]["scores"]
                .as_array()
                .unwrap();
            scores.iter().map(|score| score.as_f64().unwrap()).collect()
        };
        let (found, expected) = (scores(&document), scores(&alone));
        assert_eq!(&found[5..], [0.0, 0.0], "{name}");
        for (found, expected) in found.iter().zip(&expected) {
            assert!(
                (found - expected).abs() < 1e-4,
                "{name}: {found} {expected}"
            );
        }
    }
}

#[test]
fn hostile_tensors_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let deep = format!("{}1{}", "[".repeat(100), "]".repeat(100));
    let too_deep = format!("{}1{}", "[".repeat(100_000), "]".repeat(100_000));
    let long = vec!["[1, [2, 3]]"; 5_000].join(",");
    let cases = [
        ("gpt2", r#"{"input_ids": [[1e999]]}"#.to_owned(), "number"),
        ("gpt2", r#"{"input_ids": [[NaN]]}"#.to_owned(), "expected"),
        ("gpt2", r#"{"input_ids": [[-1]]}"#.to_owned(), "-1"),
        ("gpt2", r#"{"input_ids": [[1.5]]}"#.to_owned(), "1.5"),
        (
            "gpt2",
            r#"{"input_ids": [[18446744073709551616]]}"#.to_owned(),
            "whole numbers",
        ),
        (
            "gpt2",
            r#"{"input_ids": [[4294967295]]}"#.to_owned(),
            "whole numbers",
        ),
        (
            "gpt2",
            r#"{"input_ids": [[4294967294]]}"#.to_owned(),
            "below 128",
        ),
        (
            "gpt2",
            r#"{"input_ids": [["a"]]}"#.to_owned(),
            "list of numbers",
        ),
        (
            "gpt2",
            r#"{"input_ids": [[true]]}"#.to_owned(),
            "list of numbers",
        ),
        (
            "gpt2",
            r#"{"input_ids": [[null]]}"#.to_owned(),
            "list of numbers",
        ),
        (
            "gpt2",
            r#"{"input_ids": {"0": 1}}"#.to_owned(),
            "list of numbers",
        ),
        ("gpt2", r#"{"input_ids": 5}"#.to_owned(), "[batch, length]"),
        (
            "gpt2",
            r#"{"input_ids": [1, 2]}"#.to_owned(),
            "[batch, length]",
        ),
        ("gpt2", r#"{"input_ids": []}"#.to_owned(), "empty list"),
        (
            "gpt2",
            r#"{"input_ids": [[], []]}"#.to_owned(),
            "empty list",
        ),
        (
            "gpt2",
            r#"{"input_ids": [[1], 2]}"#.to_owned(),
            "nested evenly",
        ),
        (
            "gpt2",
            format!(r#"{{"input_ids": [{long}]}}"#),
            "nested evenly",
        ),
        ("gpt2", format!(r#"{{"input_ids": {deep}}}"#), "deeper"),
        (
            "gpt2",
            format!(r#"{{"input_ids": {too_deep}}}"#),
            "recursion",
        ),
        (
            "gpt2",
            format!(r#"{{"input_ids": [[{}]]}}"#, vec!["1"; 65].join(",")),
            "64",
        ),
        (
            "gpt2",
            r#"{"input_ids": [[1, 2]], "attention_mask": [[1]]}"#.to_owned(),
            "attention_mask",
        ),
        (
            "gpt2",
            r#"{"input_ids": [[1]], "token_type_ids": [[0]]}"#.to_owned(),
            "token_type_ids",
        ),
        (
            "bert",
            r#"{"input_ids": [[1]], "token_type_ids": [[9]]}"#.to_owned(),
            "token_type_ids",
        ),
        (
            "gpt2",
            r#"{"pixel_values": [[[[1]]]]}"#.to_owned(),
            "input_ids",
        ),
        ("vit", r#"{"input_ids": [[1]]}"#.to_owned(), "pixel_values"),
        ("vit", r#"{"pixel_values": [[[[1]]]]}"#.to_owned(), "16"),
        ("vit", r#"{"pixel_values": 1}"#.to_owned(), "pixel_values"),
        ("gpt2", r#"[1]"#.to_owned(), "map"),
        ("gpt2", r#"{}"#.to_owned(), "input_ids"),
    ];
    for (model, json, word) in cases {
        let input = write(&directory, "hostile.json", json.as_bytes());
        let done = lapidary(&["run", &family(model), "--input", &input])
            .assert()
            .failure()
            .code(1);
        let error = String::from_utf8(done.get_output().stderr.clone()).unwrap();
        let shown = json.get(..80).unwrap_or(&json);
        assert!(
            error.starts_with("error: ") && error.contains(word),
            "{shown}: {error}"
        );
        assert!(
            error.lines().count() == 1 && error.len() < 500,
            "{shown}: {error}"
        );
    }
}

#[test]
fn explains_by_all_methods_at_once_and_on_one_page() {
    let directory = tempfile::tempdir().unwrap();
    let page = directory.path().join("page.html");
    let text = "the farmer near the dogs";
    let base = ["explain", "embedded", "--text", text, "--method", "all"];
    let arguments = [&base[..], &["--target", "sings", "--target", "sing"]].concat();
    let document = json(&[&arguments[..], &["--json"]].concat());
    let all = document["explanations"].as_array().unwrap();
    let methods: std::collections::BTreeSet<_> = all
        .iter()
        .map(|one| one["explanation"]["method"].as_str().unwrap())
        .collect();
    for method in ["attnlrp", "cp-lrp", "decompx", "logit-attribution"] {
        assert!(methods.contains(method), "{methods:?}");
    }
    // Both targets by every method, each with an account that adds up.
    assert_eq!(all.len(), 2 * methods.len());
    for one in all {
        let account = &one["explanation"]["account"];
        let number = |name: &str| account[name].as_f64().unwrap();
        let elsewhere = account["elsewhere"].as_array().into_iter().flatten();
        let elsewhere: f64 = elsewhere.map(|one| one[1].as_f64().unwrap()).sum();
        let sum = number("attributed") + elsewhere + number("unattributed");
        assert!((sum - number("explained")).abs() < 1e-3 * number("explained").abs().max(1.0));
    }
    output(&[&arguments[..], &["--html", page.to_str().unwrap()]].concat());
    let html = std::fs::read_to_string(page).unwrap();
    for part in [
        "type=\"radio\"",
        "value=\"cp-lrp\"",
        "Where each head looks",
        "Methods side by side",
    ] {
        assert!(html.contains(part), "{part}");
    }
    // One file: nothing is fetched.
    assert!(!html.contains("src=") && !html.contains("href="));
}

#[test]
fn methods_are_scored_on_generated_examples_and_on_files() {
    let common = [
        "--method",
        "cp-lrp,gradient-x-input",
        "--limit",
        "12",
        "--json",
    ];
    let generated = [
        "explain",
        "embedded",
        "--evaluate",
        "generated:number-agreement",
    ];
    let found = json(&[&generated[..], &common[..]].concat());
    assert_eq!(found["examples"], 12);
    assert_eq!(found["rows"].as_array().unwrap().len(), 2);
    assert_eq!(found["rows"][0]["agreement"][0]["count"], found["right"]);
    let directory = tempfile::tempdir().unwrap();
    let csv = b"prefix,target,foil,evidence\nthe farmer near the dogs,sings,sing,farmer\n\
                the farmers near the dog,sing,sings,farmers\n";
    let file = write(&directory, "data.csv", csv);
    let from_file = ["explain", "embedded", "--evaluate", &file];
    let found = json(&[&from_file[..], &common[..]].concat());
    assert_eq!(found["examples"], 2);
    let text = output(&[&from_file[..], &common[..4]].concat());
    assert!(text.contains("MRR") && text.contains("AOPC"), "{text}");
    assert!(text.contains("F1 of the highest tokens"), "{text}");
    let f1 = &found["rows"][0]["evidence_f1"];
    assert_eq!(f1["points"].as_array().unwrap().len(), 8);
    // Every word of this model is a token: scored by word, the rows are the same.
    let by_word = json(&[&from_file[..], &common[..], &["--unit", "word"]].concat());
    for (row, same) in [0, 1].map(|i| (&found["rows"][i], &by_word["rows"][i])) {
        for what in ["agreement", "evidence_f1", "masking"] {
            assert_eq!(row[what], same[what]);
        }
    }
    let bad = write(&directory, "bad.csv", b"prefix,word\na,b\n");
    refused(
        &["explain", "embedded", "--evaluate", &bad],
        &["column target"],
    );
    refused(
        &["explain", "embedded", "--evaluate", "nowhere.csv"],
        &["nowhere.csv"],
    );
    let unknown = ["explain", "embedded", "--evaluate", "generated:rhymes"];
    refused(&unknown, &["generated:rhymes", "induction"]);
}

/// Words of several tokens are scored as one, everywhere; what the account says stays.
#[test]
fn words_are_explained_in_place_of_their_tokens() {
    let directory = tempfile::tempdir().unwrap();
    let model = family("bert-classifier");
    let page = directory.path().join("page.html");
    let text = ["explain", &model, "--text", "the birds cutely seeing"];
    let methods = ["--method", "decompx,gradient-x-input"];
    let tokens = json(&[&text[..], &methods, &["--json"]].concat());
    let html = ["--unit", "word", "--json", "--html", page.to_str().unwrap()];
    let words = json(&[&text[..], &methods, &html].concat());
    let names = ["[CLS]", "the", "birds", "cutely", "seeing", "[SEP]"];
    assert_eq!(words["words"].as_array().unwrap(), &names);
    assert_eq!(words["tokens"], tokens["tokens"]);
    let count = tokens["tokens"].as_array().unwrap().len();
    assert!(count > names.len());
    for (before, after) in [0, 1].map(|i| (&tokens["explanations"][i], &words["explanations"][i])) {
        let (before, after) = (&before["explanation"], &after["explanation"]);
        assert_eq!(after["unit"], "word");
        assert_eq!(before["account"], after["account"]);
        let sum = |of: &Value| {
            of.as_array()
                .unwrap()
                .iter()
                .map(|n| n.as_f64().unwrap())
                .sum::<f64>()
        };
        assert!((sum(&before["scores"]) - sum(&after["scores"])).abs() < 1e-9);
        let own: Vec<f64> = serde_json::from_value(before["scores"].clone()).unwrap();
        // "cutely" is cut ##e ##ly.
        let whole = after["scores"][3].as_f64().unwrap();
        assert!((own[3..6].iter().sum::<f64>() - whole).abs() < 1e-12);
    }
    let page = std::fs::read_to_string(page).unwrap();
    assert!(page.contains("cutely"), "words are on the page");
    let by_word = output(&[&text[..], &["--unit", "word"]].concat());
    assert!(
        by_word.contains("cutely") && !by_word.contains("##"),
        "{by_word}"
    );
    let both = output(&[&text[..], &methods, &["--unit", "word"]].concat());
    assert!(both.contains("cutely") && !both.contains("##"), "{both}");
}

#[test]
fn two_models_are_compared() {
    let directory = tempfile::tempdir().unwrap();
    let cut = directory.path().join("cut");
    let cut = cut.to_str().unwrap();
    output(&[
        "compress", "embedded", "--ratio", "0.5", "--method", "svd", "--out", cut,
    ]);
    let text = [
        "--text",
        "the farmer near the dogs",
        "--target",
        "sings",
        "--foil",
        "sing",
    ];
    let found = json(&[&["diff", "embedded", cut][..], &text[..], &["--json"]].concat());
    assert!(found["output"]["divergence"].as_f64().unwrap() > 0.0);
    let changes: Vec<f64> = found["components"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| (one["after"].as_f64().unwrap() - one["before"].as_f64().unwrap()).abs())
        .collect();
    assert!(changes.is_sorted_by(|a, b| a >= b), "{changes:?}");
    let said = output(&[&["diff", "embedded", cut][..], &text[..]].concat());
    assert!(said.contains("Parts whose contribution moved"), "{said}");
    let bert = family("bert-classifier");
    refused(
        &["diff", "embedded", &bert, "--tokens", "1,2,900"],
        &["900"],
    );
}

#[test]
fn attention_is_inspected() {
    let found = json(&[
        "inspect",
        "attention",
        "embedded",
        "--text",
        "the farmer sings",
        "--json",
    ]);
    let rows = found["tables"][0]["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 24);
    lapidary(&["inspect", "attention", "embedded"])
        .assert()
        .code(2);
}

#[test]
fn inspects_the_geometry_of_hidden_states() {
    let document = json(&[
        "inspect",
        "geometry",
        "embedded",
        "--windows",
        "8",
        "--window",
        "24",
        "--control",
        "random",
        "--control",
        "untrained",
        "--head",
        "1.0",
        "--json",
    ]);
    let tables = document["tables"].as_array().unwrap();
    let titles: Vec<&str> = tables
        .iter()
        .filter_map(|table| table["title"].as_str())
        .collect();
    assert_eq!(titles.len(), 5, "{titles:?}");
    assert!(titles[0].ends_with("the text") && titles[1].ends_with("random tokens"));
    assert_eq!(document["maps"].as_array().unwrap().len(), 22);

    let directory = tempfile::tempdir().unwrap();
    for (name, text) in [("a", "the farmer sings . "), ("b", "the dogs sing . ")] {
        write(&directory, name, text.repeat(30).as_bytes());
    }
    let topics = directory.path().to_str().unwrap();
    let document = json(&[
        "inspect",
        "geometry",
        "embedded",
        "--topics",
        topics,
        "--windows",
        "6",
        "--window",
        "16",
        "--json",
    ]);
    let rows = &document["tables"][2]["rows"];
    assert!(rows[1][1].is_number(), "{rows}");
    refused(
        &["inspect", "geometry", "embedded", "--window", "2"],
        &["window is 2", "between 3"],
    );
    let missing = family("gpt2");
    refused(&["inspect", "geometry", &missing], &["--text", "--topics"]);
}

#[test]
fn inspects_where_sequences_collapse() {
    let directory = tempfile::tempdir().unwrap();
    let prompts = write(
        &directory,
        "prompts",
        b"sings\tthe farmer\nsing\tthe dogs\n",
    );
    let document = json(&[
        "inspect",
        "collapse",
        "embedded",
        "--one",
        "dogs",
        "--zero",
        "farmer",
        "--longest",
        "24",
        "--lengths",
        "6",
        "--format",
        "bf16",
        "--separator",
        "#3",
        "--sharpen",
        "8",
        "--prompts",
        &prompts,
        "--json",
    ]);
    let rows = document["tables"][0]["rows"].as_array().unwrap();
    // Three families, two formats, with no remedy and two.
    assert_eq!(rows.len(), 18);
    assert_eq!(document["tables"][1]["rows"].as_array().unwrap().len(), 2);
    refused(
        &["inspect", "collapse", "embedded", "--one", "unheard-of"],
        &["one is", "unheard-of"],
    );
}

#[test]
fn inspects_channels_clusters_particles_and_energy() {
    for name in ["gpt2", "opt", "llama", "mixtral"] {
        let document = json(&[
            "inspect",
            "channels",
            &family(name),
            "--threshold",
            "1",
            "--draws",
            "99",
            "--json",
        ]);
        assert!(
            !document["tables"][0]["rows"].as_array().unwrap().is_empty(),
            "{name}"
        );
    }
    refused(&["inspect", "channels", &family("bert")], &["post-norm"]);
    refused(&["inspect", "channels", &family("mamba")], &["heads"]);
    let layers = |passes: &str| {
        let document = json(&[
            "inspect",
            "clusters",
            &family("gpt2"),
            "--tokens",
            "5,9,3,17",
            "--passes",
            passes,
            "--json",
        ]);
        document["tables"][0]["rows"].as_array().unwrap().len()
    };
    assert!(layers("3") > layers("1"));
    let particles = json(&[
        "inspect",
        "particles",
        "--count",
        "6",
        "--dimension",
        "2",
        "--systems",
        "2",
        "--time",
        "3",
        "--json",
    ]);
    assert_eq!(particles["plots"].as_array().unwrap().len(), 2);
    let phases = json(&[
        "inspect",
        "particles",
        "--count",
        "4",
        "--systems",
        "2",
        "--time",
        "2",
        "--beta",
        "0,2",
        "--matrices",
        "symmetric",
        "--json",
    ]);
    assert_eq!(phases["maps"][0]["rows"].as_array().unwrap().len(), 2);
    refused(&["inspect", "particles", "--step", "0"], &["positive"]);
    let directory = tempfile::tempdir().unwrap();
    let film = directory.path().join("film.svg");
    let film = film.to_str().unwrap();
    let short = ["inspect", "particles", "--time", "3", "--systems", "2"];
    output(&[&short[..], &["--count", "5", "--film", film]].concat());
    let svg = std::fs::read_to_string(film).unwrap();
    assert_eq!(svg.matches("attributeName=\"cx\"").count(), 5);
    refused(
        &[&short[..], &["--beta", "1,2", "--film", film]].concat(),
        &["one temperature", "2"],
    );
    let albert = family("albert-masked-lm");
    let out = directory.path().join("out");
    let out = out.to_str().unwrap();
    let deeper = [
        "inspect",
        "clusters",
        &albert,
        "--tokens",
        "2,5,6,7,3",
        "--json",
    ];
    let document = json(&[&deeper[..], &["--depth", "9"]].concat());
    assert_eq!(document["tables"][0]["rows"].as_array().unwrap().len(), 10);
    let once = json(&deeper);
    assert_eq!(once["tables"][0]["rows"].as_array().unwrap().len(), 3);
    refused(
        &[
            "inspect", "clusters", "embedded", "--text", "the cat", "--depth", "9",
        ],
        &["shares its weights"],
    );
    refused(
        &[
            "compress", &albert, "--method", "svd", "--ratio", "0.5", "--out", out,
        ],
        &["shared by several blocks"],
    );

    let directory = tempfile::tempdir().unwrap();
    let text = "the farmer near the dogs sings . ".repeat(8);
    let (training, held_out) = (
        write(&directory, "training.txt", text.as_bytes()),
        write(
            &directory,
            "held.txt",
            text.replace("near", "behind").as_bytes(),
        ),
    );
    let energy = json(&[
        "inspect",
        "energy",
        "embedded",
        "--text",
        &training,
        "--held-out",
        &held_out,
        "--window",
        "8",
        "--json",
    ]);
    assert_eq!(energy["tables"].as_array().unwrap().len(), 3);
}

#[test]
fn inspects_linearity_and_cuts_depth() {
    let directory = tempfile::tempdir().unwrap();
    let text = "the farmer near the dogs sings . the dogs near the farmer sleep . ".repeat(30);
    let text = write(&directory, "text.txt", text.as_bytes());
    let linearity = json(&[
        "inspect",
        "linearity",
        "embedded",
        "--text",
        &text,
        "--window",
        "16",
        "--json",
    ]);
    let rows = linearity["tables"][0]["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 6);
    assert!(rows.iter().all(|row| row[1].as_f64().unwrap() <= 1.0));
    refused(
        &[
            "inspect",
            "linearity",
            "embedded",
            "--text",
            &text,
            "--windows",
            "1",
        ],
        &["windows is 1", "held out"],
    );
    for (method, ratio) in [("replaceme", "0.34"), ("attention-cosine", "0.34")] {
        let out = directory.path().join(method).display().to_string();
        let document = json(&[
            "compress",
            "embedded",
            "--method",
            method,
            "--ratio",
            ratio,
            "--windows",
            "8",
            "--out",
            &out,
            "--json",
        ]);
        let after = &document["report"]["after"]["parameters"];
        assert!(after.as_u64() < document["report"]["before"]["parameters"].as_u64());
        let again = json(&[
            "evaluate", &out, "--text", &text, "--window", "16", "--json",
        ]);
        assert!(again.is_object());
    }
}

/// The classifier that a reproduction trains is a model like any other.
#[test]
fn a_kept_classifier_is_explained_on_polarity() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let (models, out) = (at("models"), at("out"));
    let scale = ["--scale", "smoke", "--models", &models, "--out", &out];
    output(&[&["reproduce", "decompx"][..], &scale[..]].concat());
    let polarity = at("models/polarity");
    let found = json(&[
        "explain",
        &polarity,
        "--evaluate",
        "generated:polarity",
        "--method",
        "decompx,globenc",
        "--limit",
        "20",
        "--json",
    ]);
    assert_eq!(found["examples"], 20);
    assert!(found["right"].as_u64().unwrap() > 0);
    assert!(found["rows"][1]["refused"].is_null());
    let other = ["explain", "embedded", "--evaluate", "generated:polarity"];
    refused(&other, &["reproduce decompx --models"]);
}

#[test]
fn a_kept_image_model_is_explained_on_glyphs() {
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let (models, out) = (at("models"), at("out"));
    let scale = ["--scale", "smoke", "--models", &models, "--out", &out];
    output(&[&["reproduce", "chefer"][..], &scale[..]].concat());
    let glyphs = at("models/glyphs");
    let on = ["--evaluate", "generated:glyphs", "--limit", "24", "--json"];
    let method = ["--method", "chefer,attention-rollout,globenc"];
    let found = json(&[&["explain", &glyphs][..], &on[..], &method[..]].concat());
    assert_eq!(found["examples"], 24);
    let right = found["right"].as_u64().unwrap();
    let rows = found["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 3);
    assert_eq!(rows[0]["mass"]["count"], right);
    assert!(rows[2]["refused"].as_str().unwrap().contains("globenc"));
    for row in &rows[..2] {
        for share in ["pixel_accuracy", "positive_perturbation", "insertion"] {
            let share = row[share].as_f64().unwrap();
            assert!((0.0..=1.0).contains(&share));
        }
    }
    let other = ["explain", "embedded", "--evaluate", "generated:glyphs"];
    refused(&other, &["reproduce chefer --models"]);
}
