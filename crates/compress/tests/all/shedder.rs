//! Mixers, feed-forward parts and scans shed one after another.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;

use crate::common::{DECODER, ENCODER, altered, close, model, scores, values, windows};
use lapidary_compress::quality::{perplexity, sliding_windows};
use lapidary_compress::{
    Budget, CalibrationData, Change, Compressed, Content, Method, Search, Settings, Shed, Task,
    export_dense,
};
use lapidary_kernels::{Device, Tensor};
use lapidary_model::{Input, Model, Pass};
use lapidary_parts::state::MixerState;

const MAMBA: &str = r#"
width = 16
final_norm = { kind = "rms" }
[input]
kind = "tokens"
vocabulary = 20
length = 12
[[blocks]]
repeat = 4
norm = { kind = "rms" }
attention = { kind = "mamba", state = 3, taps = 3 }
[head]
kind = "language-model"
"#;

const HYBRID: &str = r#"
width = 16
final_norm = { kind = "rms" }
[input]
kind = "tokens"
vocabulary = 20
length = 12
[[blocks]]
norm = { kind = "rms" }
attention = { kind = "mamba", state = 3, taps = 3 }
[[blocks]]
norm = { kind = "rms" }
attention = { kind = "multi-head", heads = 4, causal = true }
feedforward = { kind = "gated", hidden = 24 }
[[blocks]]
norm = { kind = "rms" }
attention = { kind = "mamba", state = 3, taps = 3 }
feedforward = { kind = "dense", hidden = 24 }
[head]
kind = "language-model"
"#;

fn compress(method: &str, model: &Model, data: &CalibrationData, keep: f64) -> Compressed {
    let method = Method::find(method).unwrap();
    let task = Task {
        data: Some(data),
        ..Task::new(model)
    };
    let plan = method.plan(&task, &Budget::Keep(keep)).unwrap();
    method.apply(&task, &plan).unwrap()
}

/// Leaves out what is named.
fn without(model: &Model, paths: &[&str]) -> Compressed {
    let data = windows(2, 1);
    let task = Task {
        data: Some(&data),
        ..Task::new(model)
    };
    let method = Method::find("mamba-shedder").unwrap();
    let mut plan = method.plan(&task, &Budget::Keep(1.0)).unwrap();
    plan.modules
        .retain(|module| !paths.contains(&module.path.as_str()));
    for path in paths {
        let mut module = plan.modules[0].clone();
        module.path = (*path).to_owned();
        module.change = Change::Remove;
        plan.modules.push(module);
    }
    method.apply(&task, &plan).unwrap()
}

fn zeroed(model: &Model, start: &str) -> Model {
    let names: Vec<String> = model.parameters().keys().cloned().collect();
    let copy = Model::new(model.spec().clone(), &mut model.parameters().clone()).unwrap();
    names
        .iter()
        .filter(|name| name.starts_with(start))
        .fold(copy, |model, name| {
            altered(&model, name, |w| w.zeros_like().unwrap())
        })
}

/// Scores of each token when it is decoded by itself.
fn decoded(model: &Model, data: &CalibrationData) -> Vec<f64> {
    let mut all = Vec::new();
    for example in data.examples() {
        let Content::Tokens { ids, .. } = &example.content else {
            continue;
        };
        let mut state = model.decode_state();
        for id in ids {
            let ids = Tensor::new(&[[*id]], &Device::Cpu).unwrap();
            let pass = Pass {
                state: Some(&mut state),
                ..Pass::default()
            };
            let output = model.forward(&Input::tokens(ids), pass).unwrap();
            all.extend(values(&output.into_logits().unwrap().into_value()));
        }
    }
    all
}

/// Numbers that decoding remembers of each block.
fn remembered(model: &Model) -> Vec<usize> {
    let mut state = model.decode_state();
    let ids = Tensor::new(&[[1u32, 2, 3, 4]], &Device::Cpu).unwrap();
    let pass = Pass {
        state: Some(&mut state),
        ..Pass::default()
    };
    model.forward(&Input::tokens(ids), pass).unwrap();
    let count = |mixer: &MixerState| match mixer {
        MixerState::Recurrent { window, state } => window.elem_count() + state.elem_count(),
        MixerState::Window(window) => window.elem_count(),
        _ => 0,
    };
    state.mixers.iter().map(count).collect()
}

#[test]
fn the_search_takes_the_least_of_all_that_are_left() {
    let data = windows(4, 3);
    for (spec, candidates) in [
        (MAMBA, Shed::parts as fn(&Model) -> Vec<Shed>),
        (MAMBA, Shed::scans),
        (HYBRID, Shed::parts),
    ] {
        let model = model(spec, 2);
        let candidates = candidates(&model);
        let count = candidates.len();
        let search = Search::run(&model, &data, 4, &candidates, 3).unwrap();
        assert_eq!(search.evaluations(), count + (count - 1) + (count - 2));
        let mut gone = BTreeSet::new();
        for step in &search.steps {
            let least = step
                .evaluated
                .iter()
                .map(|e| e.1)
                .fold(f64::INFINITY, f64::min);
            assert_eq!(step.perplexity, least);
            assert!(step.evaluated.iter().all(|(shed, _)| !gone.contains(shed)));
            gone.insert(step.shed);
        }
        assert_eq!(
            search,
            Search::run(&model, &data, 4, &candidates, 3).unwrap()
        );
        for steps in 0..3 {
            let shorter = Search::run(&model, &data, 4, &candidates, steps).unwrap();
            assert_eq!(shorter.steps, search.steps[..steps]);
        }
    }
}

/// The perplexity that the search saw is that of the model it leads to, and padding is not in it.
#[test]
fn the_search_sees_what_is_then_cut() {
    let data = windows(5, 8);
    let model = model(HYBRID, 4);
    let candidates = Shed::parts(&model);
    let search = Search::run(&model, &data, 5, &candidates, 2).unwrap();
    let compressed = compress(
        "mamba-shedder",
        &model,
        &data,
        1.0 - 2.0 / candidates.len() as f64,
    );
    let mut texts = Vec::new();
    for example in data.examples() {
        if let Content::Tokens { ids, .. } = &example.content {
            texts.extend(sliding_windows(ids, ids.len(), 1).unwrap());
        }
    }
    let alone = perplexity(&compressed.model, &texts, 1).unwrap().value;
    assert!((alone / search.steps[1].perplexity - 1.0).abs() < 1e-9);
}

#[test]
fn leaving_out_is_writing_nothing() {
    let data = windows(4, 5);
    for (spec, path, zero) in [
        (MAMBA, "blocks.1.attention", "blocks.1.attention.output"),
        (HYBRID, "blocks.1.attention", "blocks.1.attention.output"),
        (HYBRID, "blocks.2.attention", "blocks.2.attention.output"),
        (HYBRID, "blocks.1.feedforward", "blocks.1.feedforward.down"),
    ] {
        let model = model(spec, 6);
        let found = without(&model, &[path]);
        let expected = zeroed(&model, zero);
        assert_eq!(
            scores(&found.model, &data),
            scores(&expected, &data),
            "{path}"
        );
        assert_eq!(
            decoded(&found.model, &data),
            decoded(&expected, &data),
            "{path}"
        );
    }
    // A block of which nothing is left is no block.
    let model = model(HYBRID, 6);
    let found = without(&model, &["blocks.1.attention", "blocks.1.feedforward"]);
    assert_eq!(found.model.spec().expanded_blocks().len(), 2);
}

/// Without the scan a mixer is one whose recurrence passes its input on.
#[test]
fn without_its_scan_a_recurrence_passes_its_input_on() {
    let data = windows(4, 7);
    let model = model(MAMBA, 3);
    let found = without(&model, &["blocks.2.attention.scan"]).model;
    let brute = zeroed(&model, "blocks.2.attention.selection");
    let brute = altered(&brute, "blocks.2.attention.skip", |skip| {
        skip.ones_like().unwrap()
    });
    close(&scores(&found, &data), &scores(&brute, &data), 1e-12);
    let dense = export_dense(&found).unwrap();
    assert!(dense.parameters().keys().eq(model.parameters().keys()));
    close(&scores(&dense, &data), &scores(&found, &data), 1e-12);
}

/// Without scans and with one block a token reaches as far as the convolution does.
#[test]
fn without_its_scan_a_mixer_sees_its_taps() {
    let one = model(&MAMBA.replace("repeat = 4", "repeat = 1"), 3);
    let short = without(&one, &["blocks.0.attention.scan"]).model;
    let run = |model: &Model, first: u32| {
        let data = CalibrationData::windows([vec![first, 5, 6, 7, 8]]).unwrap();
        scores(model, &data)
    };
    let changed = |model: &Model| -> Vec<bool> {
        let (a, b) = (run(model, 1), run(model, 2));
        let rows = a.chunks(20).zip(b.chunks(20));
        rows.map(|(a, b)| a.iter().zip(b).any(|(a, b)| (a - b).abs() > 1e-12))
            .collect()
    };
    assert_eq!(changed(&short), [true, true, true, false, false]);
    assert_eq!(changed(&one), [true; 5]);
}

#[test]
fn mixed_removals_decode_as_they_read_and_remember_less() {
    let data = windows(4, 9);
    let model = model(HYBRID, 5);
    let paths = [
        "blocks.0.attention.scan",
        "blocks.1.attention",
        "blocks.2.feedforward",
    ];
    let found = without(&model, &paths);
    close(
        &decoded(&found.model, &data),
        &scores(&found.model, &data),
        1e-10,
    );
    // inner 32, state 3, taps 3.
    assert_eq!(remembered(&model), [32 * 2 + 32 * 3, 0, 32 * 2 + 32 * 3]);
    assert_eq!(remembered(&found.model), [32 * 2, 0, 32 * 2 + 32 * 3]);
    let fewer = without(&model, &["blocks.0.attention"]);
    assert_eq!(remembered(&fewer.model), [0, 32 * 2 + 32 * 3]);

    let lost: usize = found
        .report
        .modules
        .iter()
        .map(|module| module.parameters_before - module.parameters_after)
        .sum();
    let (before, after) = (found.report.before, found.report.after);
    assert_eq!(before.parameters - after.parameters, lost);
}

#[test]
fn every_scan_may_go() {
    let data = windows(4, 2);
    let model = model(MAMBA, 8);
    let method = Method::find("mamba-shedder-scan").unwrap();
    let compressed = compress("mamba-shedder-scan", &model, &data, 0.1);
    assert_eq!(remembered(&compressed.model), [64; 4]);
    assert!(Shed::scans(&compressed.model).is_empty());
    let error = method
        .requirements(&compressed.model, &Settings::default())
        .unwrap_err();
    assert!(error.to_string().contains("block-influence"), "{error}");
}

#[test]
fn keeping_everything_keeps_the_model() {
    let (model, data) = (model(HYBRID, 2), windows(6, 4));
    for method in ["mamba-shedder", "mamba-shedder-scan"] {
        let compressed = compress(method, &model, &data, 1.0);
        assert_eq!(scores(&model, &data), scores(&compressed.model, &data));
    }
}

#[test]
fn what_cannot_be_shed_is_refused_with_why() {
    let find = |name| Method::find(name).unwrap();
    let settings = Settings::default();
    let error = find("mamba-shedder")
        .requirements(&model(ENCODER, 1), &settings)
        .unwrap_err();
    assert!(error.to_string().contains("post-norm"), "{error}");
    let decoder = model(DECODER, 1);
    let error = find("mamba-shedder-scan")
        .requirements(&decoder, &settings)
        .unwrap_err();
    assert!(
        error.to_string().contains("selective recurrences"),
        "{error}"
    );
    let (mamba, data) = (model(MAMBA, 1), windows(2, 1));
    let candidates = Shed::parts(&mamba);
    assert!(Search::run(&mamba, &data, 2, &candidates, 5).is_err());
}
