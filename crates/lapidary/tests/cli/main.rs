//! The program as a user runs it: real arguments, real files, and wrong ones on purpose.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

mod autoencoder;
mod automatic;
mod clip;
mod compress;
mod explain;
mod families;
mod hub;
mod inspect;
mod recipes;
mod refusals;
mod reproduce;
mod run;
mod tasks;
mod told;

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
