//! Every snippet of `docs/MIXERS.md` is a model that runs.
#![allow(clippy::panic, clippy::unwrap_used, reason = "tests fail by panicking")]

use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::{Initialiser, Input, InputSpec, Model, ModelSpec, Pass, PatchInput};
use toml::{Table, Value};

const DOCUMENT: &str = include_str!("../../../../docs/MIXERS.md");

/// What stands around a snippet: a small encoder, whose length is whole rows of the images named.
const AROUND: &str = r#"
width = 48
input = { kind = "tokens", vocabulary = 16, length = 112, position = { kind = "learned" }, token_types = 2 }
head = { kind = "language-model" }

[[blocks]]
repeat = 4
attention = { kind = "multi-head", heads = 4 }
feedforward = { kind = "dense", hidden = 64 }
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

/// `over` laid upon `under`. Another kind of thing takes the place of the old one.
fn merge(under: &mut Table, over: Table) {
    for (key, value) in over {
        match (under.get_mut(&key), value) {
            (Some(Value::Table(inner)), Value::Table(value))
                if value
                    .get("kind")
                    .is_none_or(|kind| inner.get("kind") == Some(kind)) =>
            {
                merge(inner, value);
            }
            (_, value) => {
                under.insert(key, value);
            }
        }
    }
}

/// A whole spec of which the snippet says a part: a block's attention, its mechanism, that
/// mechanism's operator, blocks, or how tokens are organised.
fn completed(snippet: Table) -> Table {
    let mut spec: Table = AROUND.parse().unwrap();
    let mut of_block = Table::new();
    for (key, value) in snippet {
        match (key.as_str(), value) {
            ("operator", operator) => {
                let length = operator["tokens"].clone();
                spec["input"]["length"] = length;
                let mechanism = Table::from_iter([
                    ("kind".to_owned(), Value::from("doubly-stochastic")),
                    ("operator".to_owned(), operator),
                ]);
                let attention = Table::from_iter([
                    ("heads".to_owned(), Value::from(1)),
                    ("mechanism".to_owned(), mechanism.into()),
                ]);
                of_block.insert("attention".to_owned(), attention.into());
            }
            ("attention", value) => {
                of_block.insert("attention".to_owned(), value);
            }
            ("blocks", Value::Table(block)) => merge(&mut of_block, block),
            (_, value) => {
                spec.insert(key, value);
            }
        }
    }
    let Value::Table(block) = &mut spec["blocks"][0] else {
        panic!("blocks are tables");
    };
    merge(block, of_block);
    spec
}

/// A model of patches gives the pixels of each.
fn draws(model: &Model, patches: &PatchInput, line: usize) {
    let [height, width] = patches.image;
    let shape = (1, patches.channels, height, width);
    let images = Input::Pixels(Tensor::ones(shape, DType::F32, &Device::Cpu).unwrap());
    let output = model
        .forward(&images, Pass::default())
        .unwrap_or_else(|error| panic!("line {line}: {error}"));
    let pixels = output.pixels.unwrap().into_value();
    assert_eq!(
        pixels.dims(),
        [1, patches.patches(), patches.pixels()],
        "line {line}"
    );
}

#[test]
fn every_snippet_is_a_model_that_runs() {
    let snippets = snippets();
    assert!(
        snippets.len() >= 20,
        "only {} snippets found",
        snippets.len()
    );
    for (line, text) in snippets {
        let snippet: Table = text
            .parse()
            .unwrap_or_else(|error| panic!("line {line}: {error}"));
        let spec: ModelSpec = completed(snippet)
            .try_into()
            .unwrap_or_else(|error| panic!("line {line}: {error}"));
        let length = spec.length();
        let mut source = Initialiser::new(0, DType::F32, Device::Cpu);
        let model =
            Model::new(spec, &mut source).unwrap_or_else(|error| panic!("line {line}: {error}"));
        if let InputSpec::Patches(patches) = &model.spec().input {
            draws(&model, patches, line);
            continue;
        }
        let ids: Vec<u32> = (0..length as u32).map(|place| place * 5 % 16).collect();
        let ids = Tensor::from_vec(ids, (1, length), &Device::Cpu).unwrap();
        // The first tokens are of the type that marks VIPs.
        let types: Vec<u32> = (0..length).map(|place| u32::from(place >= 3)).collect();
        let types = Tensor::from_vec(types, (1, length), &Device::Cpu).unwrap();
        let input = Input::Tokens {
            ids,
            token_types: Some(types),
        };
        let output = model
            .forward(&input, Pass::default())
            .unwrap_or_else(|error| panic!("line {line}: {error}"));
        let logits = output.into_logits().unwrap().into_value();
        let logits: Vec<f32> = logits.flatten_all().unwrap().to_vec1().unwrap();
        assert_eq!(logits.len(), length * 16, "line {line}");
        assert!(logits.iter().all(|x| x.is_finite()), "line {line}");
    }
}
