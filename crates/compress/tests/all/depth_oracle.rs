//! What `tests/oracles/depth.py` finds with NumPy, and stock checkpoints cut in every way.
#![allow(clippy::unwrap_used)]
#![allow(clippy::result_large_err, reason = "errors are looked at by tests")]

use std::path::{Path, PathBuf};

use crate::common;
use crate::common::close;
use lapidary_compress::entropy::{EntropyChoice, Estimator};
use lapidary_compress::{
    Budget, CalibrationData, Compressed, Content, Example, Method, Settings, Task, export_dense,
};
use lapidary_factor::{Matrix, Regression};
use lapidary_kernels::{DType, Device, Tensor};
use lapidary_model::{Input, InputSpec, Model, OpenOptions, Package, Pass, SavedAs};
use serde_json::Value;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures")
}

fn matrix(document: &Value, name: &str) -> Matrix {
    let rows = document[name].as_array().unwrap();
    let columns = rows[0].as_array().unwrap().len();
    Matrix::from_fn(rows.len(), columns, |i, j| rows[i][j].as_f64().unwrap())
}

fn number(document: &Value, name: &str) -> f64 {
    document[name].as_f64().unwrap()
}

fn near(found: f64, expected: f64) {
    assert!(
        (found - expected).abs() < 1e-9 * expected.abs().max(1.0),
        "{found} {expected}"
    );
}

#[test]
fn maps_scores_and_entropies_are_numpys() {
    let text = std::fs::read_to_string(fixtures().join("depth.json")).unwrap();
    let document: Value = serde_json::from_str(&text).unwrap();
    let (added, stream, behind) = (
        matrix(&document, "added"),
        matrix(&document, "stream"),
        matrix(&document, "behind"),
    );
    let wanted = &behind - &stream;
    let mut sums = Regression::through_origin(4, 4);
    sums.add(added.as_ref(), wanted.as_ref()).unwrap();
    for (ridge, name) in [(0.0, "map"), (number(&document, "ridge"), "ridge_map")] {
        let found = sums.solve(ridge).unwrap().weight;
        assert!(
            (found - matrix(&document, name)).norm_max() < 1e-10,
            "{name}"
        );
    }
    let mut sums = Regression::with_intercept(4, 4);
    sums.add(stream.as_ref(), wanted.as_ref()).unwrap();
    let free = sums.explained(&sums.solve(0.0).unwrap()).unwrap();
    near(free, number(&document, "residual_free"));
    let raw = sums.beside_inputs();
    near(
        raw.explained(&raw.solve(0.0).unwrap()).unwrap(),
        number(&document, "score"),
    );
    near(
        raw.explained_by_rotation().unwrap().unwrap(),
        number(&document, "rotation"),
    );
    let mut own = Regression::with_intercept(4, 4);
    own.add(behind.as_ref(), behind.as_ref()).unwrap();
    near(
        own.anisotropy().unwrap().unwrap(),
        number(&document, "anisotropy"),
    );
    for (estimator, name) in [
        (Estimator::Neighbours { count: 5 }, "neighbours"),
        (Estimator::Buckets { bins: 10 }, "buckets"),
        (Estimator::Renyi { order: 4.0 }, "renyi"),
    ] {
        near(estimator.entropy(&behind).unwrap(), number(&document, name));
    }
}

fn settings() -> Settings {
    Settings {
        entropy: EntropyChoice {
            first: 0,
            last: 0,
            stages: false,
            ..EntropyChoice::default()
        },
        ..Settings::default()
    }
}

fn cut(model: &Model, method: &str) -> lapidary_compress::Result<Compressed> {
    let vocabulary = model.spec().vocabulary().unwrap() as u32;
    let window = |seed: u32| {
        (0..12)
            .map(|i| 3 + (seed * 31 + i * i * 7 + i) % (vocabulary - 3))
            .collect()
    };
    let data = CalibrationData::windows((0..24).map(window))?;
    let settings = settings();
    let method = Method::find(method)?;
    method.requirements(model, &settings)?;
    let task = Task {
        data: Some(&data),
        settings: Some(&settings),
        ..Task::new(model)
    };
    let plan = method.plan(&task, &Budget::Keep(0.5))?;
    method.apply(&task, &plan)
}

fn logits(model: &Model) -> Vec<f64> {
    let ids = Tensor::new(&[[5u32, 9, 3, 7, 11, 4]], &Device::Cpu).unwrap();
    let output = model.forward(&Input::tokens(ids), Pass::default()).unwrap();
    common::values(&output.into_logits().unwrap().into_value())
}

/// What is cut can be saved and loads again; as a stock checkpoint where a config can say it.
#[test]
fn cut_checkpoints_load_again_as_stock_where_a_config_describes_them() {
    const DECODERS: [&str; 6] = [
        "gpt2",
        "llama",
        "mistral",
        "qwen2",
        "mixtral",
        "opt-projected-pre-norm",
    ];
    let blocks = [
        "replaceme",
        "replaceme-cosine",
        "entropy-blocks",
        "delete-linear",
    ];
    let attention = ["entropy-attention", "attention-cosine"];
    let directory = tempfile::tempdir().unwrap();
    let save = |family: &str, name: &str, model: Model| -> (SavedAs, Model) {
        let options = OpenOptions::default();
        let package = Package::open(&fixtures().join("families").join(family), &options).unwrap();
        let out = directory.path().join(format!("{family}-{name}"));
        let saved = package.with_model(model).save(&out, None).unwrap();
        let mut again = Package::open(&out, &options).unwrap();
        (saved, again.towers.remove(0).model)
    };
    let copy =
        |model: &Model| Model::new(model.spec().clone(), &mut model.parameters().clone()).unwrap();
    for family in DECODERS {
        let path = fixtures().join("families").join(family);
        let package = Package::open(
            &path,
            &OpenOptions {
                dtype: DType::F32,
                ..OpenOptions::default()
            },
        )
        .unwrap();
        let model = package.single_model().unwrap();
        for method in blocks
            .iter()
            .chain(&attention)
            .chain(&["linearise", "mamba-shedder"])
        {
            let found = match cut(model, method) {
                Ok(found) => found.model,
                Err(error) => panic!("{family} {method}: {error}"),
            };
            let expected = logits(&found);
            let (saved, again) = save(family, method, copy(&found));
            assert_eq!(logits(&again), expected, "{family} {method}");
            if blocks.contains(method) {
                assert_eq!(saved, SavedAs::HuggingFace, "{family} {method}");
            }
            if attention.contains(method) {
                assert_eq!(saved, SavedAs::Lapidary, "{family} {method}");
                let dense = export_dense(&found).unwrap();
                let (saved, again) = save(family, &format!("{method}-dense"), dense);
                assert_eq!(saved, SavedAs::HuggingFace, "{family} {method}");
                close(&logits(&again), &expected, 1e-6);
            }
            if *method == "linearise" {
                assert_eq!(saved, SavedAs::Lapidary, "{family}");
            }
        }
    }
    for family in ["mamba", "mamba2"] {
        let path = fixtures().join("families").join(family);
        let package = Package::open(&path, &OpenOptions::default()).unwrap();
        let model = package.single_model().unwrap();
        for (method, stock) in [
            ("mamba-shedder", true),
            ("replaceme", true),
            ("mamba-shedder-scan", false),
        ] {
            let found = cut(model, method).unwrap().model;
            let expected = logits(&found);
            let (saved, again) = save(family, method, copy(&found));
            assert_eq!(saved == SavedAs::HuggingFace, stock, "{family} {method}");
            assert_eq!(logits(&again), expected, "{family} {method}");
            let dense = export_dense(&found).unwrap();
            let (saved, again) = save(family, &format!("{method}-dense"), dense);
            assert_eq!(saved, SavedAs::HuggingFace, "{family} {method}");
            close(&logits(&again), &expected, 1e-6);
        }
    }
}

/// Post-norm encoders have no stream that blocks add to, and say so.
#[test]
fn encoders_behind_norms_are_refused() {
    for family in ["bert-masked-lm", "roberta-masked-lm"] {
        let path = fixtures().join("families").join(family);
        let package = Package::open(&path, &OpenOptions::default()).unwrap();
        let model = package.single_model().unwrap();
        for method in [
            "replaceme",
            "entropy-attention",
            "entropy-blocks",
            "delete-linear",
            "mamba-shedder",
        ] {
            let error = cut(model, method).err().unwrap().to_string();
            assert!(error.contains("post-norm"), "{family} {method}: {error}");
        }
        assert!(cut(model, "linearise").is_ok(), "{family}");
    }
}

/// Images have no last token and no next one: every patch counts, and perplexity is refused.
#[test]
fn image_models_are_cut_too() {
    let path = fixtures().join("families/vit");
    let package = Package::open(&path, &OpenOptions::default()).unwrap();
    let model = package.single_model().unwrap();
    let InputSpec::Patches(patches) = &model.spec().input else {
        panic!("{:?}", model.spec().input);
    };
    let shape = (patches.channels, patches.image[0], patches.image[1]);
    let count = shape.0 * shape.1 * shape.2;
    let example = |seed: usize| {
        let numbers =
            (0..count).map(|i| ((i * 37 + seed * 101 + i * i % 13) % 29) as f32 / 14.0 - 1.0);
        Example {
            content: Content::Pixels(
                Tensor::from_vec(numbers.collect::<Vec<_>>(), shape, &Device::Cpu).unwrap(),
            ),
            target: Default::default(),
        }
    };
    let data = CalibrationData::new((0..24).map(example).collect()).unwrap();
    let settings = settings();
    let task = Task {
        data: Some(&data),
        settings: Some(&settings),
        ..Task::new(model)
    };
    for name in [
        "replaceme",
        "replaceme-cosine",
        "entropy-attention",
        "entropy-blocks",
        "attention-cosine",
        "linearise",
        "delete-linear",
    ] {
        let method = Method::find(name).unwrap();
        let plan = method.plan(&task, &Budget::Keep(0.5)).unwrap();
        let found = method.apply(&task, &plan).unwrap();
        assert!(
            found.report.after.parameters < found.report.before.parameters,
            "{name}"
        );
        let Content::Pixels(pixels) = &data.examples()[0].content else {
            panic!();
        };
        let input = Input::Pixels(pixels.unsqueeze(0).unwrap());
        let output = found.model.forward(&input, Pass::default()).unwrap();
        assert!(
            common::values(output.hidden.value())
                .iter()
                .all(|x| x.is_finite())
        );
    }
    let error = Method::find("mamba-shedder")
        .unwrap()
        .plan(&task, &Budget::Keep(0.5));
    assert!(error.unwrap_err().to_string().contains("causal"));
}
