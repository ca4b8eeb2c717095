//! Models by their hub id, without any network: from a cache laid out by hand, and from a hub that
//! is this test itself.
#![cfg(feature = "hub")]
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;

use assert_cmd::Command;

fn lapidary(home: &Path, id: &str, input: &Path) -> Command {
    let mut command = Command::cargo_bin("lapidary").unwrap();
    command
        .args(["run", id, "--json", "--input"])
        .arg(input)
        .env("HF_HOME", home)
        .env_remove("HF_TOKEN")
        .env_remove("HF_HUB_OFFLINE")
        .env_remove("HF_ENDPOINT");
    command
}

fn error_of(command: &mut Command) -> String {
    let done = command.assert().failure().code(1);
    let error = String::from_utf8(done.get_output().stderr.clone()).unwrap();
    assert_eq!(error.trim_end().lines().count(), 1, "{error}");
    error
}

fn input(directory: &Path) -> std::path::PathBuf {
    let path = directory.join("ids.json");
    std::fs::write(&path, r#"{"input_ids": [[5, 9, 3]]}"#).unwrap();
    path
}

#[test]
fn a_cached_model_needs_no_network_and_a_missing_one_is_named() {
    let home = tempfile::tempdir().unwrap();
    let input = input(home.path());
    // As Python's `huggingface_hub` lays it out.
    let revision = "0123456789abcdef0123456789abcdef01234567";
    let model = home.path().join("hub/models--some-owner--tiny-gpt2");
    let snapshot = model.join("snapshots").join(revision);
    std::fs::create_dir_all(&snapshot).unwrap();
    std::fs::create_dir_all(model.join("refs")).unwrap();
    std::fs::write(model.join("refs/main"), revision).unwrap();
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/families/gpt2");
    for file in ["config.json", "model.safetensors", "tokenizer.json"] {
        std::fs::copy(fixture.join(file), snapshot.join(file)).unwrap();
    }
    let mut run = lapidary(home.path(), "some-owner/tiny-gpt2", &input);
    let run = run.env("HF_HUB_OFFLINE", "1").assert().success();
    let mut direct = lapidary(home.path(), fixture.to_str().unwrap(), &input);
    assert_eq!(
        run.get_output().stdout,
        direct.assert().success().get_output().stdout
    );

    for offline in ["1", "true", "ON", "yes"] {
        let mut missing = lapidary(home.path(), "some-owner/other", &input);
        let error = error_of(missing.env("HF_HUB_OFFLINE", offline));
        assert!(
            error.contains("some-owner/other") && error.contains("HF_HUB_OFFLINE"),
            "{error}"
        );
    }
    std::fs::remove_file(snapshot.join("model.safetensors")).unwrap();
    let mut half = lapidary(home.path(), "some-owner/tiny-gpt2", &input);
    let error = error_of(half.env("HF_HUB_OFFLINE", "1"));
    assert!(error.contains("model.safetensors"), "{error}");
}

#[test]
fn the_token_goes_to_the_hub_and_a_refusal_is_one_sentence() {
    let home = tempfile::tempdir().unwrap();
    let input = input(home.path());
    let hub = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let endpoint = format!("http://{}", hub.local_addr().unwrap());
    let asked = std::thread::spawn(move || {
        let (stream, _) = hub.accept().unwrap();
        let mut lines = BufReader::new(&stream).lines().map(|line| line.unwrap());
        let request: Vec<String> = lines.by_ref().take_while(|line| !line.is_empty()).collect();
        (&stream)
            .write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            .unwrap();
        request
    });
    let mut run = lapidary(home.path(), "some-owner/secret", &input);
    let error = error_of(run.env("HF_ENDPOINT", endpoint).env("HF_TOKEN", "hf_abc"));
    let request = asked.join().unwrap();
    assert!(
        request[0].contains("/some-owner/secret/resolve/main/config.json"),
        "{request:?}"
    );
    assert!(
        request
            .iter()
            .any(|line| line.to_lowercase() == "authorization: bearer hf_abc"),
        "{request:?}"
    );
    assert!(
        error.contains("some-owner/secret") && !error.contains("hf_abc"),
        "{error}"
    );
}
