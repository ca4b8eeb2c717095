//! Every method of compression on every family of checkpoints. What comes out loads in a process of its
//! own with equal outputs, is explained there and compared with the original; a method that is not defined
//! for a family says so, and names others that are.

use std::collections::{BTreeMap, BTreeSet};

use super::*;
use lapidary_compress::{
    Budget, Calibration, CalibrationData, CalibrationOptions, Compressed, Content, Error, Example,
    Method, Settings, Target, Task,
};
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::{HeadSpec, Input, InputSpec, Model, OpenOptions, Package, Pass};

/// Tokens of an example.
const LENGTH: usize = 8;
/// Examples to calibrate on.
const EXAMPLES: usize = 12;

/// What is not defined for blocks with norms behind their additions, or for a norm of the embeddings.
const POST_NORM: &[&str] = &[
    "attention-cosine",
    "block-influence",
    "coordinate-magnitude",
    "delete-linear",
    "dotresize",
    "dotresize-shared",
    "entropy-attention",
    "entropy-blocks",
    "mamba-shedder",
    "mamba-shedder-scan",
    "mamba-shedder-width",
    "replaceme",
    "replaceme-cosine",
    "slicegpt",
    "slicegpt-shared",
];

/// What is not defined for blocks of nothing but a recurrence.
const RECURRENT: &[&str] = &[
    "attention-cosine",
    "channel-gradient",
    "channel-magnitude",
    "curvature",
    "curvature-rectangle",
    "dotresize-hidden",
    "entropy-attention",
    "lorap",
    "mamba-shedder-width",
    "modegpt",
    "prune-heads",
];

#[test]
fn gpt2() {
    check("gpt2", &["mamba-shedder-scan"]);
}

#[test]
fn opt() {
    check("opt", &["mamba-shedder-scan"]);
}

#[test]
fn llama_with_grouped_keys() {
    check("llama", &["mamba-shedder-scan"]);
}

#[test]
fn bert() {
    check("bert-masked-lm", POST_NORM);
}

#[test]
fn roberta() {
    check("roberta-classifier", POST_NORM);
}

#[test]
fn vision() {
    check(
        "vit",
        &["mamba-shedder", "mamba-shedder-scan", "mamba-shedder-width"],
    );
}

#[test]
fn mamba() {
    check("mamba", RECURRENT);
}

#[test]
fn mixtral() {
    check(
        "mixtral",
        &[
            "curvature",
            "curvature-rectangle",
            "dotresize-hidden",
            "mamba-shedder-scan",
        ],
    );
}

/// Runs every method on a family, of which `refused` are not defined for it.
fn check(name: &str, refused: &[&str]) {
    let original = family(name);
    let package = Package::open(Path::new(&original), &OpenOptions::default()).unwrap();
    let model = package.single_model().unwrap();
    let examples = (0..EXAMPLES).map(|seed| example(model, seed)).collect();
    let data = CalibrationData::new(examples).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let (input, document) = question(&data.examples()[0].content);
    let file = write(&directory, "input.json", document.to_string().as_bytes());
    let mut works = BTreeSet::new();
    let mut errors = BTreeMap::new();
    for method in Method::all() {
        let compressed = match compressed(model, &data, method) {
            Ok(compressed) => compressed,
            Err(error) => {
                errors.insert(method.name, error.to_string());
                continue;
            }
        };
        works.insert(method.name);
        let expected = outputs(&compressed.model, &input);
        let out = directory.path().join(method.name);
        let package = Package::open(Path::new(&original), &OpenOptions::default()).unwrap();
        let package = package.with_model(compressed.model);
        package.save(&out, None).unwrap();
        reloads(
            &original,
            out.to_str().unwrap(),
            &file,
            &expected,
            &format!("{name} {}", method.name),
        );
    }
    let found: Vec<&str> = errors.keys().copied().collect();
    assert_eq!(found, refused, "{name}: {errors:?}");
    for (method, error) in &errors {
        let others = error.split(|c: char| !c.is_ascii_alphanumeric() && c != '-');
        let others = others.filter(|word| Method::all().iter().any(|one| one.name == *word));
        let others: BTreeSet<&str> = others.filter(|other| other != method).collect();
        assert!(!others.is_empty(), "{name}: {error} names no other method");
        assert!(others.is_subset(&works), "{name}: {error} names {others:?}");
    }
}

/// Looks at a compressed checkpoint in processes of their own.
fn reloads(
    original: &str,
    out: &str,
    file: &str,
    expected: &BTreeMap<String, Vec<f32>>,
    what: &str,
) {
    let again = json(&["run", out, "--input", file, "--json"]);
    for (output, expected) in expected {
        let mut found = Vec::new();
        flatten(&again[output], &mut found);
        assert_eq!(&found, expected, "{what}: {output}");
    }
    let explained = json(&["explain", out, "--input", file, "--json"]);
    let account = &explained["explanations"][0]["explanation"]["account"];
    let error = account["largest_site_error"].as_f64().unwrap();
    assert!(error < 1e-4, "{what}: {error}");
    let compared = json(&["diff", original, out, "--input", file, "--json"]);
    assert!(compared["explained"][1].is_f64(), "{what}: {compared}");
    for part in ["sites", "components", "tokens"] {
        let listed = compared[part].as_array().unwrap();
        assert!(!listed.is_empty(), "{what}: {part}");
    }
}

fn compressed(
    model: &Model,
    data: &CalibrationData,
    method: &Method,
) -> Result<Compressed, Box<Error>> {
    let settings = settings();
    let requirements = method.requirements(model, &settings)?;
    let options = CalibrationOptions::default();
    let calibration = match requirements.is_empty() {
        true => None,
        false => Some(Calibration::collect(model, data, &requirements, options)?),
    };
    let task = Task {
        model,
        calibration: calibration.as_ref(),
        data: Some(data),
        settings: Some(&settings),
    };
    // Rounding has no share.
    let keep = if method.rounds() { 1.0 } else { 0.5 };
    let plan = method.plan(&task, &Budget::Keep(keep))?;
    Ok(method.apply(&task, &plan)?)
}

/// Two blocks, of which entropy may choose the first; and little training.
fn settings() -> Settings {
    let mut settings = Settings::default();
    settings.entropy.first = 0;
    settings.entropy.stages = false;
    settings.fuse.rank = 4;
    settings.fuse.epochs = 1;
    settings.pruning.movement.steps = 4;
    settings.pruning.movement.every = 2;
    settings
}

/// An example with what the model's task asks for.
fn example(model: &Model, seed: usize) -> Example {
    let spec = model.spec();
    let content = match &spec.input {
        InputSpec::Tokens(tokens) => Content::Tokens {
            ids: (0..LENGTH)
                .map(|at| (2 + (at * 7 + seed * 13 + at * at * 5) % (tokens.vocabulary - 2)) as u32)
                .collect(),
            types: None,
        },
        InputSpec::Patches(patches) => {
            let shape = (patches.channels, patches.image[0], patches.image[1]);
            let count = shape.0 * shape.1 * shape.2;
            let values = (0..count).map(|i| ((i * 37 + seed * 101 + i * i % 13) % 29) as f32);
            let values: Vec<f32> = values.map(|value| value / 14.0 - 1.0).collect();
            Content::Pixels(Tensor::from_vec(values, shape, &Device::Cpu).unwrap())
        }
    };
    let target = match &spec.head {
        HeadSpec::Pooled {
            labels: Some(labels),
            ..
        } => Target::Label((seed % labels) as u32),
        // A token of three is to be guessed where both sides are seen.
        HeadSpec::LanguageModel { .. } if !spec.is_causal() => {
            Target::Tokens((0..LENGTH).map(|at| (at % 3 == 0).then_some(5)).collect())
        }
        _ => Target::None,
    };
    Example { content, target }
}

/// An example as a model reads it, and as a file for the command line.
fn question(content: &Content) -> (Input, Value) {
    match content {
        Content::Tokens { ids, .. } => (
            Input::tokens(Tensor::from_slice(ids, (1, ids.len()), &Device::Cpu).unwrap()),
            serde_json::json!({ "input_ids": [ids] }),
        ),
        Content::Pixels(pixels) => {
            let rows: Vec<Vec<Vec<f32>>> = pixels.to_vec3().unwrap();
            (
                Input::Pixels(pixels.unsqueeze(0).unwrap()),
                serde_json::json!({ "pixel_values": [rows] }),
            )
        }
    }
}

/// What a model says, under the names that `run` gives.
fn outputs(model: &Model, input: &Input) -> BTreeMap<String, Vec<f32>> {
    let output = model.forward(input, Pass::default()).unwrap();
    let numbers = |tensor: &Tensor| -> Vec<f32> {
        let flat = tensor.to_dtype(DType::F32).unwrap().flatten_all().unwrap();
        flat.to_vec1().unwrap()
    };
    let mut outputs = BTreeMap::from([("hidden".to_owned(), numbers(output.hidden.value()))]);
    if let Some(logits) = &output.logits {
        outputs.insert("logits".to_owned(), numbers(logits.value()));
    }
    outputs
}

fn flatten(value: &Value, into: &mut Vec<f32>) {
    match value {
        Value::Array(items) => items.iter().for_each(|item| flatten(item, into)),
        number => into.push(number.as_f64().unwrap() as f32),
    }
}
