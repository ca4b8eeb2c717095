//! `lapidary compress --auto` as a user runs it.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::path::Path;

use super::{family, lapidary, output, refused};
use serde_json::Value;

fn json(arguments: &[&str]) -> Value {
    serde_json::from_str(&output(&[arguments, &["--json"]].concat())).unwrap()
}

/// A small model and text for it.
struct Place {
    directory: tempfile::TempDir,
    model: String,
    text: String,
}

impl Place {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let text = directory.path().join("text.txt");
        let words = "the quick brown fox jumps over the lazy dog and runs away ".repeat(40);
        std::fs::write(&text, words).unwrap();
        Self {
            text: text.to_str().unwrap().to_owned(),
            model: family("gpt2"),
            directory,
        }
    }

    fn at(&self, name: &str) -> String {
        self.directory
            .path()
            .join(name)
            .to_str()
            .unwrap()
            .to_owned()
    }

    fn run(&self, more: &[&str]) -> Vec<String> {
        let base = [
            "compress",
            &self.model,
            "--auto",
            "--calibrate",
            &self.text,
            "--windows",
            "8",
            "--window",
            "16",
            "--budget",
            "0.9x",
        ];
        base.iter()
            .chain(more)
            .map(|word| (*word).to_owned())
            .collect()
    }
}

fn words(arguments: &[String]) -> Vec<&str> {
    arguments.iter().map(String::as_str).collect()
}

#[test]
fn a_mix_is_searched_written_and_loaded() {
    let place = Place::new();
    let (out, html) = (place.at("cut"), place.at("page.html"));
    let arguments = place.run(&["--evaluations", "8", "--out", &out, "--html", &html]);
    let found = json(&words(&arguments));
    let search = &found["search"];
    let tried = search["tried"].as_array().unwrap();
    assert_eq!(tried.len(), 8);
    assert_eq!(tried[0]["name"], "uniform fwsvd");
    assert!(tried[4]["name"].is_null());
    let budget = search["budget"].as_u64().unwrap();
    let before = found["before"]["size"]["parameters"].as_u64().unwrap();
    assert_eq!(budget, (0.9 * before as f64) as u64);
    let least = tried
        .iter()
        .map(|one| one["loss"].as_f64().unwrap())
        .fold(f64::INFINITY, f64::min);
    let best = &tried[search["best"].as_u64().unwrap() as usize];
    assert_eq!(best["loss"].as_f64().unwrap(), least);
    assert_eq!(best["parameters"], found["after"]["size"]["parameters"]);
    assert!(best["parameters"].as_u64().unwrap() <= budget);
    assert_eq!(search["mix"]["parameters"], best["parameters"]);
    assert_eq!(found["methods"], "auto");
    assert_eq!(search["examples"], 2);
    assert!(
        std::fs::read_to_string(html)
            .unwrap()
            .contains("Search of the mix")
    );
    let spec = json(&["spec", &out]);
    assert!(spec.is_object());

    let again = place.at("again");
    let arguments = place.run(&["--evaluations", "8", "--out", &again]);
    let text = output(&words(&arguments));
    for word in ["8 mixes", "uniform whitened", "best, mix", "written to"] {
        assert!(text.contains(word), "{word:?} is not in {text}");
    }
    let weights =
        |directory: &str| std::fs::read(Path::new(directory).join("model.safetensors")).unwrap();
    assert_eq!(weights(&out), weights(&again));
}

#[test]
fn a_search_goes_on_from_its_file_and_refuses_another_s() {
    let place = Place::new();
    let state = place.at("state.json");
    let (whole, first, second) = (place.at("whole"), place.at("first"), place.at("second"));
    let all = json(&words(&place.run(&[
        "--evaluations",
        "14",
        "--out",
        &whole,
    ])));
    let part = place.run(&["--evaluations", "5", "--state", &state, "--out", &first]);
    assert_eq!(
        json(&words(&part))["search"]["tried"]
            .as_array()
            .unwrap()
            .len(),
        5
    );
    let kept = std::fs::read(&state).unwrap();
    let rest = place.run(&["--evaluations", "14", "--state", &state, "--out", &second]);
    assert_eq!(
        json(&words(&rest))["search"]["tried"],
        all["search"]["tried"]
    );
    assert_ne!(std::fs::read(&state).unwrap(), kept);

    let third = place.at("third");
    let with = |more: &[&str]| {
        let base = ["--state", state.as_str(), "--out", third.as_str()];
        place.run(&[&base[..], more].concat())
    };
    refused(
        &words(&with(&["--seed", "3"])),
        &[
            "seed of the search's state is 0, but must be 3",
            "another search",
        ],
    );
    let methods = "methods of the search's state is block-influence,fwsvd,modegpt,whitened, but must be svd,whitened";
    refused(&words(&with(&["--mix", "svd,whitened"])), &[methods]);
    let longer = place.at("longer.txt");
    std::fs::write(&longer, "a lazy fox and the brown dog run ".repeat(60)).unwrap();
    let elsewhere = with(&[]).into_iter().map(|word| match word == place.text {
        true => longer.clone(),
        false => word,
    });
    refused(
        &words(&elsewhere.collect::<Vec<_>>()),
        &["calibration data", "another search"],
    );
    std::fs::write(&state, "{}").unwrap();
    refused(&words(&with(&[])), &["state.json", "no state of a search"]);
    assert!(!Path::new(&third).exists());
}

#[test]
fn wrong_budgets_and_methods_are_refused() {
    let place = Place::new();
    let out = place.at("cut");
    let with = |budget: &str, mix: &str| {
        let arguments = [
            "compress",
            &place.model,
            "--auto",
            "--calibrate",
            &place.text,
            "--windows",
            "8",
            "--window",
            "16",
            "--out",
            &out,
            "--budget",
            budget,
            "--mix",
            mix,
        ];
        arguments.map(str::to_owned).to_vec()
    };
    refused(&words(&with("1.2x", "svd")), &["1.2x", "0.7x"]);
    refused(&words(&with("half", "svd")), &["half", "0.7x"]);
    refused(&words(&with("0.01x", "svd")), &["at least"]);
    refused(&words(&with("0.9x", "svdd")), &["svdd"]);
    refused(&words(&with("0.9x", "slicegpt")), &["slicegpt"]);
    // Before the first mix is tried.
    let state = place.at("state");
    let late = [
        with("0.9x", "svd"),
        ["--evaluate", "nowhere", "--state", &state]
            .map(str::to_owned)
            .to_vec(),
    ];
    refused(&words(&late.concat()), &["nowhere"]);
    assert!(!Path::new(&state).exists());
    let late = [
        with("0.9x", "svd"),
        ["--heal", "2", "--heal-rate", "0", "--state", &state]
            .map(str::to_owned)
            .to_vec(),
    ];
    refused(&words(&late.concat()), &["rate of healing is 0"]);
    assert!(!Path::new(&state).exists());
    let told = [
        with("0.9x", "svd"),
        vec!["--set".into(), "modegpt.smoothing=2".into()],
    ];
    refused(&words(&told.concat()), &["--set", "`activations`"]);
    for arguments in [
        &["compress", "embedded", "--auto", "--out", "x"][..],
        &["compress", "embedded", "--budget", "0.7x", "--out", "x"],
        &[
            "compress", "embedded", "--auto", "--budget", "0.7x", "--method", "svd", "--out", "x",
        ],
        &[
            "compress", "embedded", "--auto", "--budget", "0.7x", "--layers", "*", "--out", "x",
        ],
        &[
            "compress", "embedded", "--auto", "--budget", "0.7x", "--recipe", "x", "--out", "x",
        ],
    ] {
        lapidary(arguments).assert().failure().code(2);
    }
}
