//! What is on disk after a run was killed, interrupted, or ran out of disk: the old state or the
//! new one, never a part of one, and nothing that stays for ever.
#![cfg(unix)]
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use lapidary::kernels::Device;
use lapidary::train::state;

const PROGRAM: &str = env!("CARGO_BIN_EXE_lapidary");
const PATIENCE: Duration = Duration::from_secs(60);

fn start(arguments: &[&str]) -> Child {
    Command::new(PROGRAM)
        .args(arguments)
        .env_remove("RUST_LOG")
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn finish(arguments: &[&str]) {
    let output = start(arguments).wait_with_output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
}

fn said(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn interrupt(child: &Child) {
    let sent = Command::new("kill")
        .args(["-INT", &child.id().to_string()])
        .status();
    assert!(sent.unwrap().success());
}

/// Names of everything below a directory, but for what vanishes meanwhile.
fn names(directory: &Path) -> Vec<String> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        all.push(entry.file_name().into_string().unwrap());
        if entry.path().is_dir() {
            all.extend(names(&entry.path()));
        }
    }
    all.sort();
    all
}

fn temporaries(directory: &Path) -> Vec<String> {
    let mut all = names(directory);
    all.retain(|name| name.starts_with('.'));
    all
}

/// Waits until `happened`, or until the child has ended, which is `false`.
fn wait_until(child: &mut Child, happened: impl Fn() -> bool) -> bool {
    let started = Instant::now();
    while !happened() {
        if child.try_wait().unwrap().is_some() {
            return false;
        }
        assert!(started.elapsed() < PATIENCE, "nothing happened");
        std::thread::sleep(Duration::from_micros(100));
    }
    true
}

/// A small training run with everything that has a state: shuffled data, dropout, an average.
struct Run {
    directory: tempfile::TempDir,
    spec: String,
}

impl Run {
    const STEPS: usize = 120;

    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let text = directory.path().join("text.txt");
        std::fs::write(
            &text,
            "the king praised himself . the dogs sing . ".repeat(40),
        )
        .unwrap();
        let spec = directory.path().join("spec.toml");
        let content = format!(
            r#"
steps = {}
batch = 4
length = 16
average = 0.9
[schedule]
peak = 1e-2
[validation]
batches = 1
[checkpoint]
every = 2
[data]
kind = "text"
file = {text:?}
[model]
width = 64
[model.input]
kind = "tokens"
vocabulary = 256
length = 16
[[model.blocks]]
attention = {{ kind = "multi-head", heads = 2, causal = true, dropout = 0.1 }}
feedforward = {{ kind = "dense", hidden = 256 }}
dropout = 0.1
[model.head]
kind = "language-model"
"#,
            Self::STEPS
        );
        std::fs::write(&spec, content).unwrap();
        let spec = spec.to_str().unwrap().to_owned();
        Self { directory, spec }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn arguments<'a>(&'a self, out: &'a Path) -> [&'a str; 5] {
        let out = out.to_str().unwrap();
        ["train", &self.spec, "--out", out, "--resume"]
    }

    /// Ends runs in `out` with `end`, at the most various moments, and at the least once while a
    /// state was being written, which on some disks takes but a moment.
    fn torment(&self, out: &Path, end: impl Fn(&mut Child)) {
        let states = out.join("states");
        let is_writing = || {
            names(&states)
                .iter()
                .any(|name| name.starts_with(".writing-step"))
        };
        let mut while_writing = 0;
        for attempt in 0.. {
            if attempt >= 10 && while_writing > 0 {
                break;
            }
            let before = state::latest(&states).unwrap();
            let child = &mut start(&self.arguments(out));
            let delay = match attempt {
                // Before there is anything.
                0 => 5_000,
                // Some steps after a new state.
                _ if attempt < 10 && attempt % 2 == 0 => {
                    assert!(wait_until(child, || state::latest(&states).unwrap() > before));
                    attempt * 1_700
                }
                // While a state is being written.
                _ => {
                    assert!(wait_until(child, is_writing));
                    if attempt < 10 { attempt * 150 } else { 0 }
                }
            };
            std::thread::sleep(Duration::from_micros(delay));
            while_writing += usize::from(is_writing());
            end(child);
            child.wait().unwrap();
            for name in names(&states)
                .iter()
                .filter(|name| name.starts_with("step-"))
            {
                let path = states.join(name);
                state::load(&path, &Device::Cpu, &state::Limits::default()).unwrap();
            }
        }
    }

    /// The run in `out` goes on to the end, and is then the same as one that was left alone.
    fn assert_ends_as_if_left_alone(&self, out: &Path) {
        let alone = self.at("alone");
        finish(&self.arguments(&alone));
        assert!(
            !out.join("model").exists(),
            "the run ended before it was tormented"
        );
        finish(&self.arguments(out));
        let read = |run: &Path, file: &str| std::fs::read(run.join(file)).unwrap();
        for file in [
            "model/model.safetensors",
            "model/lapidary.json",
            "log.jsonl",
        ] {
            assert!(read(&alone, file) == read(out, file), "{file} differs");
        }
        let last = format!("states/step-{:010}/tensors.safetensors", Self::STEPS);
        assert!(read(&alone, &last) == read(out, &last), "{last} differs");
        assert_eq!(temporaries(out), [""; 0]);
    }
}

#[test]
fn a_run_that_was_killed_again_and_again_ends_with_the_weights_of_one_left_alone() {
    let run = Run::new();
    let out = run.at("killed");
    run.torment(&out, |child| child.kill().unwrap());
    run.assert_ends_as_if_left_alone(&out);
}

#[test]
fn a_run_that_was_interrupted_leaves_nothing_half_written() {
    let run = Run::new();
    let out = run.at("interrupted");
    run.torment(&out, |child| {
        interrupt(child);
        // Before the program has come so far as to handle it, it ends by the signal itself.
        let status = child.wait().unwrap();
        let early = status.signal() == Some(2) && !out.exists();
        // On a busy machine the run may have come to its end meanwhile.
        let ended = status.success();
        assert!(early || ended || status.code() == Some(130), "{status}");
        assert_eq!(temporaries(&out), [""; 0]);
    });
    run.assert_ends_as_if_left_alone(&out);
}

const COMPRESS: [&str; 7] = [
    "compress", "embedded", "--method", "svd", "--ratio", "0.5", "--out",
];

/// A compression into `out` that is sent `end` after `delay` behind the first that it writes of tensors, again
/// and again until that was before it had come to its end: writing takes but a moment.
fn cut_short(out: &Path, delay: Duration, end: impl Fn(&mut Child)) {
    let arguments = [&COMPRESS[..], &[out.to_str().unwrap()]].concat();
    let directory = out.parent().unwrap();
    let started = Instant::now();
    loop {
        let mut child = start(&arguments);
        // Whether anything can be written at all is tried by a file of another name, before the work.
        let tensors = |name: &String| name.contains("safetensors");
        if wait_until(&mut child, || names(directory).iter().any(tensors)) {
            std::thread::sleep(delay);
            end(&mut child);
        }
        let status = child.wait().unwrap();
        if !out.exists() {
            assert!(
                status.code() == Some(130) || status.signal().is_some(),
                "{status}"
            );
            return;
        }
        // What was written in time is whole.
        finish(&["spec", out.to_str().unwrap()]);
        std::fs::remove_dir_all(out).unwrap();
        assert!(started.elapsed() < PATIENCE, "it always came after the end");
    }
}

#[test]
fn an_interrupted_compression_leaves_all_or_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("cut");
    for delay in [0, 200, 400] {
        cut_short(&out, Duration::from_micros(delay), |child| interrupt(child));
        assert_eq!(temporaries(directory.path()), [""; 0]);
    }
}

#[test]
fn what_a_killed_compression_left_is_cleaned_up_by_the_next() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("cut");
    cut_short(&out, Duration::ZERO, |child| child.kill().unwrap());
    assert!(!temporaries(directory.path()).is_empty());
    finish(&[&COMPRESS[..], &[out.to_str().unwrap()]].concat());
    assert_eq!(temporaries(directory.path()), [""; 0]);
}

/// Runs the program where no file can have more than `blocks` of 512 bytes, which fails writes as
/// a full disk does, and wants one sentence and status 1.
fn refused_beyond(blocks: usize, arguments: &[&str]) -> String {
    let output = Command::new("sh")
        .args(["-c", r#"trap "" XFSZ; ulimit -f "$0"; exec "$@""#])
        .args([&blocks.to_string(), PROGRAM])
        .args(arguments)
        .env_remove("RUST_LOG")
        .output()
        .unwrap();
    let error = said(&output);
    assert_eq!(output.status.code(), Some(1), "{error}");
    // Behind what the program said it was at.
    let told = error.lines().filter(|line| line.starts_with("error: "));
    let last = error.lines().last().unwrap_or_default();
    assert!(
        told.count() == 1 && last.starts_with("error: ") && last.contains("cannot write"),
        "{error}"
    );
    error
}

#[test]
fn a_full_disk_leaves_no_half_checkpoint() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("cut");
    let arguments = [&COMPRESS[..], &[out.to_str().unwrap()]].concat();
    let error = refused_beyond(1_000, &arguments);
    assert!(error.contains("model.safetensors"), "{error}");
    assert_eq!(names(directory.path()), [""; 0]);
}

#[test]
fn a_full_disk_leaves_the_last_state_of_a_run() {
    let run = Run::new();
    let out = run.at("full");
    let mut child = start(&run.arguments(&out));
    let states = out.join("states");
    assert!(wait_until(&mut child, || state::latest(&states)
        .unwrap()
        .is_some()));
    child.kill().unwrap();
    child.wait().unwrap();
    let latest = state::latest(&states).unwrap().unwrap();
    let error = refused_beyond(200, &run.arguments(&out));
    assert!(error.contains("tensors.safetensors"), "{error}");
    assert_eq!(state::latest(&states).unwrap().unwrap(), latest);
    assert_eq!(temporaries(&out), [""; 0]);
    run.assert_ends_as_if_left_alone(&out);
}

#[test]
fn a_full_disk_leaves_the_old_files() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
    let page = path("page.html");
    let json = path("introduction-to-transformers-smoke.json");
    for old in [&page, &json] {
        std::fs::write(old, "old").unwrap();
    }
    let error = refused_beyond(
        1,
        &[
            "explain",
            "embedded",
            "--text",
            "the farmer",
            "--html",
            &page,
        ],
    );
    assert!(error.contains("page.html"), "{error}");
    let reproduce = [
        "reproduce",
        "introduction-to-transformers",
        "--scale",
        "smoke",
    ];
    let error = refused_beyond(1, &[&reproduce[..], &["--out", &path("")]].concat());
    assert!(error.contains(".json"), "{error}");
    for old in [&page, &json] {
        assert_eq!(std::fs::read_to_string(old).unwrap(), "old");
    }
    assert_eq!(names(directory.path()).len(), 2);
}

#[test]
#[cfg(target_os = "linux")]
fn a_full_device_is_one_sentence() {
    let full = std::fs::File::create("/dev/full").unwrap();
    let output = Command::new(PROGRAM)
        .args(["spec", "embedded"])
        .stdout(full)
        .output()
        .unwrap();
    let error = said(&output);
    assert_eq!(
        (output.status.code(), error.lines().count()),
        (Some(1), 1),
        "{error}"
    );
    assert!(error.contains("No space left"), "{error}");
}

#[test]
fn what_is_no_file_is_not_replaced_by_one() {
    let directory = tempfile::tempdir().unwrap();
    let pipe = directory.path().join("pipe");
    assert!(
        Command::new("mkfifo")
            .arg(&pipe)
            .status()
            .unwrap()
            .success()
    );
    let explain = ["explain", "embedded", "--text", "the farmer", "--html"];
    let output = start(&[&explain[..], &[pipe.to_str().unwrap()]].concat())
        .wait_with_output()
        .unwrap();
    let error = said(&output);
    assert_eq!(
        (output.status.code(), error.lines().count()),
        (Some(1), 1),
        "{error}"
    );
    assert!(error.contains("not a regular file"), "{error}");
    assert!(!pipe.is_file());
}
