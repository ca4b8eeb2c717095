//! Every snippet of `docs/TRAIN.md` is a training spec that is accepted, or a part of one.
#![allow(clippy::panic, clippy::unwrap_used, reason = "tests fail by panicking")]

use lapidary_train::TrainSpec;
use toml::Table;

const DOCUMENT: &str = include_str!("../../../../docs/TRAIN.md");

/// What stands around a snippet without a model.
const AROUND: &str = r#"
steps = 100
batch = 8
length = 16
schedule = { peak = 1e-3 }
data = { kind = "copying", symbols = 15 }

[model]
width = 16
input = { kind = "tokens", vocabulary = 16, length = 16 }
head = { kind = "language-model" }

[[model.blocks]]
attention = { kind = "multi-head", heads = 2, causal = true }
feedforward = { kind = "dense", hidden = 32 }
"#;

/// Each snippet with the line it begins at.
fn snippets() -> Vec<(usize, String)> {
    let mut found = Vec::new();
    let mut open = None;
    for (number, line) in DOCUMENT.lines().enumerate() {
        match (&mut open, line) {
            (None, "```toml") => open = Some((number + 1, String::new())),
            (Some(_), "```") => found.extend(open.take()),
            (Some((_, text)), line) => {
                text.push_str(line);
                text.push('\n');
            }
            (None, _) => {}
        }
    }
    found
}

/// The snippet, if it has a model; otherwise its fields in place of those around it.
fn completed(snippet: Table) -> Table {
    if snippet.contains_key("model") {
        return snippet;
    }
    let mut spec: Table = AROUND.parse().unwrap();
    spec.extend(snippet);
    spec
}

#[test]
fn every_snippet_is_a_spec_that_is_accepted() {
    let snippets = snippets();
    let mut whole = 0;
    for (line, text) in &snippets {
        let snippet: Table = text
            .parse()
            .unwrap_or_else(|error| panic!("line {line}: {error}"));
        whole += usize::from(snippet.contains_key("model"));
        let spec: TrainSpec = completed(snippet)
            .try_into()
            .unwrap_or_else(|error| panic!("line {line}: {error}"));
        spec.validate()
            .unwrap_or_else(|error| panic!("line {line}: {error}"));
    }
    assert!(
        whole >= 3 && snippets.len() >= 9,
        "only {whole} whole snippets of {} found",
        snippets.len()
    );
}
