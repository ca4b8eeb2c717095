//! Sparse autoencoders from the command line: trained, saved, read again, and shown.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use super::lapidary;
use serde_json::Value;

fn json(arguments: &[&str]) -> Value {
    let done = lapidary(arguments).assert().success();
    serde_json::from_slice(&done.get_output().stdout).unwrap()
}

/// The value beside `name` in the first column of any table.
fn cell(report: &Value, name: &str) -> f64 {
    let tables = report["tables"].as_array().unwrap().iter();
    let rows = tables.flat_map(|table| table["rows"].as_array().unwrap());
    let mut found = rows.filter(|row| row[0] == name);
    found.next().unwrap()[1].as_f64().unwrap()
}

#[test]
fn an_autoencoder_is_trained_saved_read_and_shown() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let sae = path("sae");
    let train = [
        "inspect",
        "sae-train",
        "embedded",
        "--layer",
        "1",
        "--expansion",
        "2",
        "--steps",
        "60",
        "--batch",
        "128",
        "--sparsity",
        "0.05",
        "--window",
        "32",
        "--out",
        &sae,
        "--json",
    ];
    let trained = json(&train);
    assert_eq!(trained["title"], "Autoencoder of blocks.1.attention.mixed");
    assert!(cell(&trained, "squared error") > 0.0);
    // The same seed writes the same file; a directory that is there is kept.
    let again = path("again");
    let mut twice = train;
    twice[16] = &again;
    json(&twice);
    let bytes = |directory: &str| std::fs::read(format!("{directory}/model.safetensors")).unwrap();
    assert_eq!(bytes(&sae), bytes(&again));
    let refused = lapidary(&train).assert().failure().code(1);
    let error = String::from_utf8(refused.get_output().stderr.clone()).unwrap();
    assert!(error.contains("not an empty directory"), "{error}");

    let page = path("page.html");
    let shown = json(&[
        "inspect",
        "sae",
        "embedded",
        "--sae",
        &sae,
        "--windows",
        "4",
        "--window",
        "32",
        "--most",
        "3",
        "--examples",
        "2",
        "--html",
        &page,
        "--json",
    ]);
    assert!(cell(&shown, "active features per token (L0)") > 0.0);
    assert!(cell(&shown, "loss with zeros") > cell(&shown, "loss, nats per token"));
    let sections = shown["sections"].as_array().unwrap();
    assert_eq!(sections.len(), 3);
    for section in sections {
        for example in section["examples"].as_array().unwrap() {
            let length = |name: &str| example[name].as_array().unwrap().len();
            assert_eq!(length("tokens"), length("scores"));
            assert!(length("tokens") > 0);
        }
    }
    let page = std::fs::read_to_string(page).unwrap();
    assert!(page.contains("attribution by source token") && page.contains("span class=\"token"));
    // One file: nothing is fetched, nothing runs.
    assert!(!page.contains("src=") && !page.contains("href=") && !page.contains("<script"));
}

#[test]
fn what_cannot_be_trained_or_read_gets_one_sentence() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("out");
    let out = out.to_str().unwrap();
    let train = |more: &[&'static str]| {
        let mut arguments = vec!["inspect", "sae-train", "embedded", "--out", out];
        arguments.extend(more);
        let done = lapidary(&arguments).assert().failure().code(1);
        let error = String::from_utf8(done.get_output().stderr.clone()).unwrap();
        assert_eq!(error.trim_end().lines().count(), 1, "{error}");
        error
    };
    assert!(train(&["--layer", "9"]).contains("6 blocks"));
    assert!(train(&["--site", "nowhere"]).contains("nowhere"));
    assert!(train(&["--steps", "0"]).contains("at least 1"));
    assert!(train(&["--sparsity=-1"]).contains("sparsity"));
    assert!(train(&["--window", "1"]).contains("at least 2"));
    assert!(!std::path::Path::new(out).exists());
    let empty = directory.path().to_str().unwrap();
    let done = lapidary(&["inspect", "sae", "embedded", "--sae", empty])
        .assert()
        .failure();
    let error = String::from_utf8(done.get_output().stderr.clone()).unwrap();
    assert!(error.contains("model.safetensors"), "{error}");
}

#[test]
fn prefixes_are_scored_for_every_head() {
    let found = json(&[
        "inspect",
        "prefix-induction",
        "embedded",
        "--longest",
        "2",
        "--draws",
        "3",
        "--length",
        "16",
        "--json",
    ]);
    let rows = found["tables"][0]["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 24, "6 blocks of 4 heads");
    for row in rows {
        for score in row.as_array().unwrap().iter().skip(1) {
            assert!((0.0..=1.0).contains(&score.as_f64().unwrap()));
        }
    }
}
