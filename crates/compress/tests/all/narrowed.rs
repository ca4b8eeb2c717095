//! Which compressed models are still of their family, and which need a spec of their own.
#![allow(clippy::panic, clippy::result_large_err, clippy::unwrap_used)]

use crate::common;
use crate::common::{input, values};
use lapidary_compress::{
    Budget, Calibration, CalibrationData, CalibrationOptions, Example, Method, Settings, Task,
};
use lapidary_model::{Model, OpenOptions, Package, Pass, SavedAs};

fn example(model: &Model, seed: usize) -> Example {
    common::example(model, seed, |at| at * 7 + seed * 13 + at * at * 5)
}

/// As much from every block, heads as they are.
fn uniform() -> Settings {
    let mut settings = Settings::default();
    settings.modegpt.smoothing = f64::INFINITY;
    settings.modegpt.heads = false;
    settings.lorap.attention = false;
    settings
}

/// Compresses a family's fixture, saves it and loads it again: as what, and whether all that it gives
/// is the same to the last bit.
fn saved(family: &str, method: &str, settings: &Settings) -> SavedAs {
    // Shortcuts pay where much is cut.
    let keep = if method == "slicegpt" { 0.5 } else { 0.75 };
    let package = Package::open(&common::family(family), &OpenOptions::default()).unwrap();
    let model = package.single_model().unwrap();
    let data = CalibrationData::new((0..12).map(|seed| example(model, seed)).collect()).unwrap();
    let method = Method::find(method).unwrap();
    let requirements = method.requirements(model, settings).unwrap();
    let options = CalibrationOptions::default();
    let calibration = (!requirements.is_empty())
        .then(|| Calibration::collect(model, &data, &requirements, options).unwrap());
    let task = Task {
        model,
        calibration: calibration.as_ref(),
        data: Some(&data),
        settings: Some(settings),
    };
    let plan = method.plan(&task, &Budget::Keep(keep)).unwrap();
    let compressed = method.apply(&task, &plan).unwrap();
    assert!(compressed.report.after.parameters < compressed.report.before.parameters);
    let input = input(&data.examples()[0]);
    let given = |model: &Model| -> Vec<f64> {
        let output = model.forward(&input, Pass::default()).unwrap();
        let logits = output.logits.map(|logits| values(logits.value()));
        let hidden = values(output.hidden.value());
        hidden
            .into_iter()
            .chain(logits.unwrap_or_default())
            .collect()
    };
    let expected = given(&compressed.model);
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("out");
    let saved = package
        .with_model(compressed.model)
        .save(&out, None)
        .unwrap();
    let again = Package::open(&out, &OpenOptions::default()).unwrap();
    assert_eq!(
        given(again.single_model().unwrap()),
        expected,
        "{family} {}",
        method.name
    );
    saved
}

/// The stream of Llama's kind may be of any width: its heads have a width of their own, its norms take
/// no mean, its head may be untied.
#[test]
fn a_narrower_stream_of_rms_norms_is_stock() {
    for family in ["llama", "mistral", "mixtral", "qwen2"] {
        for method in [
            "slicegpt-shared",
            "dotresize-shared",
            "coordinate-magnitude",
        ] {
            let found = saved(family, method, &Settings::default());
            assert_eq!(found, SavedAs::HuggingFace, "{family} {method}");
        }
        let found = saved(family, "slicegpt", &Settings::default());
        assert_eq!(found, SavedAs::Lapidary, "{family}: shortcuts");
    }
}

/// Folded layer norms are RMS norms, which those families have not; OLMoE's norms of queries and keys
/// are as wide as its stream.
#[test]
fn a_narrower_stream_of_other_families_has_a_spec() {
    for family in ["gpt2", "opt", "vit", "olmoe"] {
        let found = saved(family, "slicegpt-shared", &Settings::default());
        assert_eq!(found, SavedAs::Lapidary, "{family}");
    }
}

#[test]
fn feed_forward_parts_narrowed_alike_are_stock() {
    for family in [
        "bert-classifier",
        "bert-masked-lm",
        "deit",
        "gpt2",
        "llama",
        "mixtral",
        "olmoe",
        "opt",
        "opt-projected",
        "qwen2",
        "roberta-masked-lm",
        "vit",
    ] {
        for method in ["channel-magnitude", "modegpt", "lorap"] {
            let found = saved(family, method, &uniform());
            assert_eq!(found, SavedAs::HuggingFace, "{family} {method}");
        }
    }
}

/// So are dense and gated parts whose features are merged.
#[test]
fn feed_forward_parts_merged_alike_are_stock() {
    for family in ["bert-classifier", "gpt2", "llama", "opt", "qwen2", "vit"] {
        let found = saved(family, "dotresize-hidden", &uniform());
        assert_eq!(found, SavedAs::HuggingFace, "{family}");
    }
}

/// Heads of one width whose rotation has a base, where a config has both; Qwen 2's values have biases, which
/// become one of its output, and the others know no width of heads.
#[test]
fn heads_narrowed_alike_are_stock_where_a_config_has_their_width() {
    let mut settings = uniform();
    settings.modegpt.heads = true;
    settings.modegpt.stock = true;
    for family in ["llama", "llama-tied", "mistral", "mixtral"] {
        let found = saved(family, "modegpt", &settings);
        assert_eq!(found, SavedAs::HuggingFace, "{family}");
    }
    for family in ["qwen2", "gpt2", "opt", "vit"] {
        let found = saved(family, "modegpt", &settings);
        assert_eq!(found, SavedAs::Lapidary, "{family}");
    }
}

/// Unless they are asked not to, they narrow heads, factorise, and take more from some blocks.
#[test]
fn what_no_config_says_has_a_spec() {
    for family in ["gpt2", "llama", "vit"] {
        for method in ["modegpt", "lorap", "svd"] {
            let found = saved(family, method, &Settings::default());
            assert_eq!(found, SavedAs::Lapidary, "{family} {method}");
        }
    }
}
