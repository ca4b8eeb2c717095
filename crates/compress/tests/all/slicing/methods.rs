//! The methods: their plans, books and refusals.

use super::{PARALLEL, PROJECTED, SHARED_POSITIONS, cut};
use crate::common::{
    DECODER, ENCODER, GATED, close, cut_by, model, scores, silenced, task, windows,
};
use lapidary_compress::slicing::{Principal, SliceSettings, parameters_after, slice};
use lapidary_compress::{Budget, Change, Method, Plan, Settings};
use lapidary_kernels::DType;
use lapidary_model::{OpenOptions, Package};

fn settings() -> Settings {
    Settings {
        slicing: SliceSettings {
            multiple: 2,
            ..SliceSettings::default()
        },
        ..Settings::default()
    }
}

const METHODS: [&str; 5] = [
    "slicegpt",
    "slicegpt-shared",
    "dotresize",
    "dotresize-shared",
    "coordinate-magnitude",
];

#[test]
fn parameters_are_known_beforehand() {
    let (model, data) = (model(GATED, 13), windows(6, 13));
    for (shared, narrow) in [(false, 10), (true, 10), (false, 16)] {
        let sliced = slice(&model, &data, narrow, shared, &Principal, 8)
            .unwrap()
            .model;
        // Two blocks of four heads of four, in two groups; a gated part of 24; tables of 20.
        let attention = 2 * 16 * narrow + 2 * 8 * narrow;
        let block = attention + 3 * 24 * narrow + 2 * narrow;
        let shortcuts = if shared { 0 } else { 2 * narrow * narrow };
        let expected = 2 * (block + shortcuts) + 2 * 20 * narrow + narrow;
        assert_eq!(sliced.parameter_count(), expected);
        let counted = parameters_after(model.spec(), narrow, shared).unwrap();
        assert_eq!(counted, expected as u64);
    }
    let (model, data) = (self::model(SHARED_POSITIONS, 13), windows(6, 13));
    let sliced = slice(&model, &data, 10, true, &Principal, 8).unwrap();
    let counted = parameters_after(model.spec(), 10, true).unwrap();
    assert_eq!(counted, sliced.model.parameter_count() as u64);
}

/// What a shortcut turns is not told from what a part adds, and would go with its block.
#[test]
fn blocks_with_shortcuts_are_not_chosen_by_their_turns() {
    let (model, data) = (model(DECODER, 15), windows(8, 15));
    let sliced = |name: &str| cut_by(&model, &data, name, 0.5, &settings()).unwrap().model;
    let (turned, shared) = (sliced("slicegpt"), sliced("slicegpt-shared"));
    let usual = Settings::default();
    for name in [
        "attention-cosine",
        "block-influence",
        "delete-linear",
        "entropy-attention",
        "entropy-blocks",
        "fuse-lora",
        "fusegpt",
        "macro-influence",
        "mamba-shedder",
        "replaceme",
        "replaceme-cosine",
    ] {
        let method = Method::find(name).unwrap();
        let error = method.requirements(&turned, &usual).unwrap_err();
        let error = error.to_string();
        assert!(error.contains("one with shortcuts"), "{name}: {error}");
        assert!(error.contains(&format!("without for {name}")), "{error}");
        assert!(method.requirements(&shared, &usual).is_ok(), "{name}");
    }
    // A feature of a feed-forward part goes and leaves the shortcut.
    let width = Method::find("mamba-shedder-width").unwrap();
    assert!(width.requirements(&turned, &usual).is_ok());
}

/// A map of the whole stream takes a block's shortcuts in: one whose parts write nothing is its shortcuts
/// alone, and what stands in for it loses nothing.
#[test]
fn a_linear_map_takes_shortcuts_in() {
    let (model, data) = (model(DECODER, 16), windows(60, 16));
    let made = cut_by(&model, &data, "slicegpt", 0.5, &settings()).unwrap();
    let turned = silenced(&made.model, 1);
    let found = cut_by(&turned, &data, "linearise", 0.5, &Settings::default()).unwrap();
    let modules = &found.report.modules;
    assert_eq!(modules[1].change, Change::Linearise { blocks: 1 });
    let blocks = found.model.spec().expanded_blocks();
    assert_eq!((blocks[0].shortcuts, blocks[1].shortcuts), (true, false));
    let other = windows(5, 17);
    close(
        &scores(&found.model, &other),
        &scores(&turned, &other),
        1e-7,
    );
}

#[test]
fn methods_keep_books_and_what_they_make_loads_again() {
    for name in METHODS {
        for spec in [GATED, DECODER, PARALLEL] {
            let (model, data) = (model(spec, 14), windows(8, 14));
            let made = cut_by(&model, &data, name, 0.5, &settings()).unwrap();
            assert_eq!(made.model.spec().width, 8);
            let sum = |of: fn(&lapidary_compress::ModuleReport) -> usize| -> usize {
                made.report.modules.iter().map(of).sum()
            };
            assert_eq!(sum(|m| m.parameters_before), made.report.before.parameters);
            assert_eq!(sum(|m| m.parameters_after), made.report.after.parameters);
            assert!(made.report.after.parameters < made.report.before.parameters);
            let note = made.report.modules[0].note.as_deref().unwrap();
            assert!(note.contains("is kept"), "{note}");

            let found = scores(&made.model, &data);
            let directory = tempfile(name, spec.len());
            Package::new(made.model, None)
                .save(&directory, None)
                .unwrap();
            let package = Package::open(
                &directory,
                &OpenOptions {
                    dtype: DType::F64,
                    ..OpenOptions::default()
                },
            )
            .unwrap();
            assert_eq!(scores(package.single_model().unwrap(), &data), found);
            std::fs::remove_dir_all(&directory).unwrap();
        }
    }
}

fn tempfile(name: &str, number: usize) -> std::path::PathBuf {
    let process = std::process::id();
    std::env::temp_dir().join(format!("lapidary-slicing-{name}-{number}-{process}"))
}

#[test]
fn keeping_everything_keeps_the_model() {
    let (model, data) = (model(DECODER, 2), windows(6, 4));
    for name in METHODS {
        let made = cut_by(&model, &data, name, 1.0, &settings()).unwrap();
        assert_eq!(scores(&model, &data), scores(&made.model, &data));
        assert!(matches!(
            made.report.modules[0].change,
            Change::Leave { .. }
        ));
    }
}

#[test]
fn a_cut_that_saves_nothing_is_refused() {
    let (model, data) = (model(DECODER, 2), windows(6, 4));
    let settings = settings();
    let task = task(&model, &data, &settings);
    let method = Method::find("slicegpt").unwrap();
    let error = method
        .plan(&task, &Budget::Keep(0.9))
        .unwrap_err()
        .to_string();
    assert!(error.contains("two square matrices to a block"), "{error}");
    // What the error says would save does, and the next width does not.
    let after = |width| parameters_after(model.spec(), width, false).unwrap();
    let said: usize = error
        .split("at most ")
        .nth(1)
        .and_then(|rest| rest.split(',').next())
        .and_then(|number| number.parse().ok())
        .unwrap();
    let before = model.parameter_count() as u64;
    assert!(after(said) < before && after(said + 2) >= before);
    // A plan by hand is obeyed all the same.
    let mut plan = method.plan(&task, &Budget::Keep(0.5)).unwrap();
    for module in &mut plan.modules {
        module.change = Change::Slice { width: 14 };
    }
    let made = method.apply(&task, &plan).unwrap();
    assert_eq!(made.model.spec().width, 14);
    plan.modules[1].change = Change::Slice { width: 12 };
    let error = method.apply(&task, &plan).unwrap_err().to_string();
    assert!(error.contains("one width"), "{error}");
    plan.modules.pop();
    assert!(method.apply(&task, &plan).is_err());
    let other = Plan {
        method: "slicegpt".to_owned(),
        modules: vec![],
    };
    assert!(method.apply(&task, &other).is_err());
}

#[test]
fn streams_that_are_bound_to_their_basis_are_refused() {
    let method = Method::find("slicegpt").unwrap();
    let refused = |spec: &str, word: &str| {
        let model = model(spec, 1);
        let found = method.requirements(&model, &Settings::default());
        let error = found.unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    };
    refused(ENCODER, "the norm of the embeddings");
    let bare = ENCODER.replace("norm = { kind = \"layer\" }", "");
    refused(&bare, "head");
    refused(&bare.replace("hidden = \"tanh\"", ""), "post-norm");
    let sines = DECODER.replace("\"learned\"", "\"sinusoidal\"");
    refused(&sines, "sinusoidal");
    refused(&DECODER.replace("\"language-model\"", "\"none\""), "head");
    let mixed = DECODER.replace(
        "final_norm = { kind = \"layer\" }",
        "final_norm = { kind = \"rms\" }",
    );
    refused(&mixed, "layer norms beside others");
    let (decoder, data) = (model(DECODER, 1), windows(4, 1));
    let sliced = cut(&decoder, &data, 8, &Principal);
    let error = method
        .requirements(&sliced, &Settings::default())
        .unwrap_err();
    assert!(error.to_string().contains("sliced before"), "{error}");
    assert!(slice(&decoder, &data, 0, false, &Principal, 8).is_err());
    assert!(slice(&decoder, &data, 17, false, &Principal, 8).is_err());
    assert!(slice(&model(PROJECTED, 1), &data, 6, false, &Principal, 8).is_err());
}
