//! Mixers, feed-forward parts and scans shed one after another.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeSet;

use crate::common::{
    DECODER, ENCODER, altered, close, cut, model, scores, values, windows, zeroed,
};
use lapidary_compress::quality::{perplexity, sliding_windows};
use lapidary_compress::{
    Budget, CalibrationData, Change, Compressed, Content, Granularities, Method, Recipe, Search,
    Settings, Shed, ShedderSettings, Task, export_dense,
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

const MAMBA2: &str = r#"
width = 16
final_norm = { kind = "rms" }
[input]
kind = "tokens"
vocabulary = 20
length = 12
[[blocks]]
repeat = 4
norm = { kind = "rms" }
attention = { kind = "mamba2", head_width = 8, groups = 2, state = 3, taps = 3 }
[head]
kind = "language-model"
"#;

/// The hybrid with heads that share a decay: inner 32 in 4 heads, 44 channels of the convolution.
fn hybrid_of_heads() -> String {
    let (one, other) = (
        r#"kind = "mamba", state = 3"#,
        r#"kind = "mamba2", head_width = 8, groups = 2, state = 3"#,
    );
    HYBRID.replace(one, other)
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
    let of_heads = hybrid_of_heads();
    for (spec, candidates) in [
        (MAMBA, Shed::parts as fn(&Model) -> Vec<Shed>),
        (MAMBA, Shed::scans),
        (MAMBA2, Shed::scans),
        (HYBRID, Shed::parts),
        (of_heads.as_str(), Shed::parts),
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
    let keep = 1.0 - 2.0 / candidates.len() as f64;
    let compressed = cut(&model, &data, "mamba-shedder", keep);
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
        (MAMBA2, "blocks.1.attention", "blocks.1.attention.output"),
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

/// Attention that was left out comes back with all that stands around it.
#[test]
fn a_layer_scale_comes_back_with_its_attention() {
    let data = windows(4, 5);
    let scaled = DECODER.replace("[[blocks]]", "[[blocks]]\nlayer_scale = 0.5");
    let model = model(&scaled, 6);
    let found = without(&model, &["blocks.0.attention"]).model;
    assert!(
        !found
            .parameters()
            .contains_key("blocks.0.attention_scale.weight")
    );
    let dense = export_dense(&found).unwrap();
    assert!(dense.parameters().keys().eq(model.parameters().keys()));
    close(&scores(&dense, &data), &scores(&found, &data), 1e-12);
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
    // inner (2 step_rank + 3 state + 2): selection, step and its bias, decay and skip.
    let lost = model.parameter_count() - found.parameter_count();
    assert_eq!(lost, 32 * (2 + 3 * 3 + 2));
    let dense = export_dense(&found).unwrap();
    assert!(dense.parameters().keys().eq(model.parameters().keys()));
    close(&scores(&dense, &data), &scores(&found, &data), 1e-12);
}

/// The same of heads: with nothing of `B` in the convolution nothing enters the states, and with a
/// skip of one they pass their input on. What is cut away changes nothing.
#[test]
fn without_its_scan_a_recurrence_of_heads_is_cut_to_what_passes() {
    let data = windows(4, 7);
    let model = model(MAMBA2, 3);
    let found = without(&model, &["blocks.2.attention.scan"]).model;
    let blank = |t: &Tensor| {
        let kept = t.narrow(0, 0, 32).unwrap();
        kept.pad_with_zeros(0, 0, 2 * 2 * 3).unwrap()
    };
    let brute = altered(&model, "blocks.2.attention.convolution.weight", blank);
    let brute = altered(&brute, "blocks.2.attention.convolution.bias", blank);
    let brute = altered(&brute, "blocks.2.attention.skip", |skip| {
        skip.ones_like().unwrap()
    });
    close(&scores(&found, &data), &scores(&brute, &data), 1e-12);
    close(&decoded(&found, &data), &scores(&brute, &data), 1e-10);

    let shape = |name: &str| {
        let tensor = found
            .parameters()
            .get(&format!("blocks.2.attention.{name}"));
        tensor.map(|tensor| tensor.dims().to_vec())
    };
    assert_eq!(shape("input.weight"), Some(vec![2 * 32, 16]));
    assert_eq!(shape("convolution.weight"), Some(vec![32, 1, 3]));
    assert_eq!(shape("convolution.bias"), Some(vec![32]));
    assert_eq!(shape("norm.weight"), Some(vec![32]));
    for gone in ["step_bias", "decay_log", "skip"] {
        assert_eq!(shape(gone), None);
    }
    // B and C of two groups and the steps of four heads; taps and biases of B and C; three of each head.
    let lost = model.parameter_count() - found.parameter_count();
    assert_eq!(lost, 16 * (2 * 2 * 3 + 4) + 2 * 2 * 3 * (3 + 1) + 3 * 4);

    let dense = export_dense(&found).unwrap();
    assert_eq!(dense.spec().blocks, model.spec().expanded_blocks());
    for (name, tensor) in model.parameters() {
        assert_eq!(dense.parameters()[name].dims(), tensor.dims(), "{name}");
    }
    close(&scores(&dense, &data), &scores(&found, &data), 1e-12);
}

/// Without scans and with one block a token reaches as far as the convolution does.
#[test]
fn without_its_scan_a_mixer_sees_its_taps() {
    for spec in [MAMBA, MAMBA2] {
        let one = model(&spec.replace("repeat = 4", "repeat = 1"), 3);
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
}

#[test]
fn mixed_removals_decode_as_they_read_and_remember_less() {
    let data = windows(4, 9);
    let of_heads = hybrid_of_heads();
    // taps 3; inner 32 and state 3, or 44 channels and 4 heads of 3 by 8.
    for (spec, whole) in [
        (HYBRID, 32 * 2 + 32 * 3),
        (of_heads.as_str(), 44 * 2 + 4 * 3 * 8),
    ] {
        let model = model(spec, 5);
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
        assert_eq!(remembered(&model), [whole, 0, whole]);
        assert_eq!(remembered(&found.model), [32 * 2, 0, whole]);
        let fewer = without(&model, &["blocks.0.attention"]);
        assert_eq!(remembered(&fewer.model), [0, whole]);
        assert_eq!(
            lost(&found),
            found.report.before.parameters - found.report.after.parameters
        );
    }
}

/// A scan that is left out beside its mixer is counted with that, a part's layer scale with the part;
/// what is named twice is refused.
#[test]
fn a_plan_counts_what_goes_once() {
    let both = ["blocks.1.attention", "blocks.1.attention.scan"];
    let parts = ["blocks.1.attention", "blocks.2.feedforward"];
    let scaled = HYBRID.replace("[[blocks]]", "[[blocks]]\nlayer_scale = 0.5");
    for (spec, paths, blocks) in [
        (MAMBA, both, 3),
        (MAMBA2, both, 3),
        (scaled.as_str(), parts, 3),
    ] {
        let found = without(&model(spec, 5), &paths);
        assert_eq!(found.model.spec().expanded_blocks().len(), blocks);
        assert_eq!(
            lost(&found),
            found.report.before.parameters - found.report.after.parameters
        );
    }
    let model = model(MAMBA, 5);
    let method = Method::find("mamba-shedder").unwrap();
    let task = Task::new(&model);
    let mut plan = method.plan(&task, &Budget::Keep(1.0)).unwrap();
    plan.modules.push(plan.modules[0].clone());
    plan.modules[0].change = Change::Remove;
    let error = method.apply(&task, &plan).unwrap_err().to_string();
    assert!(
        error.contains("blocks.0.attention more than once"),
        "{error}"
    );
}

/// Parameters that the report's modules say are gone.
fn lost(found: &Compressed) -> usize {
    let modules = found.report.modules.iter();
    modules
        .map(|module| module.parameters_before - module.parameters_after)
        .sum()
}

#[test]
fn every_scan_may_go() {
    let data = windows(4, 2);
    for spec in [MAMBA, MAMBA2] {
        let model = model(spec, 8);
        let method = Method::find("mamba-shedder-scan").unwrap();
        let compressed = cut(&model, &data, "mamba-shedder-scan", 0.1);
        assert_eq!(remembered(&compressed.model), [64; 4]);
        assert!(Shed::scans(&compressed.model).is_empty());
        let error = method
            .requirements(&compressed.model, &Settings::default())
            .unwrap_err();
        assert!(error.to_string().contains("mamba-shedder"), "{error}");
    }
}

/// Settings with groups of so many hidden features.
fn in_groups(size: usize) -> Settings {
    Settings {
        shedder: ShedderSettings {
            channel_group: Some(size),
        },
        ..Settings::default()
    }
}

/// `‖gate row‖₁ + ‖up row‖₁` of each hidden feature.
fn magnitudes(model: &Model, block: usize) -> Vec<f64> {
    let mut sums = vec![0.0; 24];
    for layer in ["gate", "up"] {
        let name = format!("blocks.{block}.feedforward.{layer}.weight");
        let Some(weight) = model.parameters().get(&name) else {
            continue;
        };
        let norms = weight.abs().unwrap().sum(1).unwrap();
        for (sum, norm) in sums.iter_mut().zip(values(&norms)) {
            *sum += norm;
        }
    }
    sums
}

/// The model with all but `features` of a block's hidden features read by nothing: those
/// that the least is written into.
fn silenced(model: &Model, block: usize, features: usize) -> Model {
    let magnitudes = magnitudes(model, block);
    let mut order: Vec<usize> = (0..24).collect();
    order.sort_by(|a, b| magnitudes[*b].total_cmp(&magnitudes[*a]));
    let mut read = vec![0.0; 24];
    for feature in &order[..features] {
        read[*feature] = 1.0;
    }
    let read = Tensor::from_vec(read, (1, 24), &Device::Cpu).unwrap();
    let down = format!("blocks.{block}.feedforward.down.weight");
    altered(model, &down, |w| w.broadcast_mul(&read).unwrap())
}

/// Of two feed-forward parts of 24 features in groups of 5, one group goes at each step, from the end
/// of one of them; what is then cut is what was measured, and the features that the least is written into.
#[test]
fn features_go_in_groups_from_the_end_of_their_order() {
    let data = windows(4, 6);
    let model = model(HYBRID, 7);
    let settings = in_groups(5);
    let candidates = Shed::channels(&model, settings.shedder.channel_group).unwrap();
    // 20 of 24 can go.
    assert_eq!(candidates.len(), 2 * 4);
    let search = Search::run(&model, &data, 8, &candidates, 3).unwrap();
    let mut gone = [0, 0];
    for step in &search.steps {
        let next = [(1, gone[0]), (2, gone[1])].map(|(block, group)| Shed::Channels {
            block,
            group,
            size: 5,
        });
        let evaluated: Vec<Shed> = step.evaluated.iter().map(|e| e.0).collect();
        assert_eq!(evaluated, next);
        gone[step.shed.block() - 1] += 1;
    }

    let task = Task {
        data: Some(&data),
        settings: Some(&settings),
        ..Task::new(&model)
    };
    let method = Method::find("mamba-shedder-width").unwrap();
    let plan = method.plan(&task, &Budget::Keep(5.0 / 8.0)).unwrap();
    let found = method.apply(&task, &plan).unwrap();
    let mut brute = silenced(&model, 1, 24 - 5 * gone[0]);
    brute = silenced(&brute, 2, 24 - 5 * gone[1]);
    close(&scores(&found.model, &data), &scores(&brute, &data), 1e-12);
    close(&decoded(&found.model, &data), &scores(&brute, &data), 1e-10);
    assert_eq!(
        lost(&found),
        found.report.before.parameters - found.report.after.parameters
    );
    let hidden: Vec<usize> = found.model.spec().expanded_blocks()[1..]
        .iter()
        .map(|block| block.feedforward.as_ref().unwrap().hidden())
        .collect();
    assert_eq!(hidden, gone.map(|groups| 24 - 5 * groups));

    // All of them but the last four.
    let all = Search::run(&model, &data, 8, &candidates, 8).unwrap();
    assert_eq!(all.steps[..3], search.steps);
    assert!(Search::run(&model, &data, 8, &candidates, 9).is_err());
}

/// Parts, then widths, then scans, each measured without all that went before; and three methods one
/// after another, each on what the one before left, are the same search.
#[test]
fn a_hybrid_is_shed_at_three_granularities_in_order() {
    let data = windows(4, 10);
    let model = model(&hybrid_of_heads(), 4);
    let settings = in_groups(6);
    let granularities = Granularities {
        parts: 1,
        widths: 2,
        scans: 1,
        channel_group: settings.shedder.channel_group,
    };
    let run = |granularities: &Granularities| {
        Search::in_order(&model, &data, settings.batch, granularities).unwrap()
    };
    let search = run(&granularities);
    let [part, first, second, scan] = search.steps.as_slice() else {
        panic!("{search:?}");
    };
    assert!(matches!(part.shed, Shed::Mixer(_) | Shed::Feedforward(_)));
    assert!(matches!(first.shed, Shed::Channels { group: 0, .. }));
    assert!(matches!(second.shed, Shed::Channels { .. }));
    assert!(matches!(scan.shed, Shed::Scan(_)));
    let feedforwards = 2 - usize::from(matches!(part.shed, Shed::Feedforward(_)));
    let scans = 2 - usize::from(matches!(part.shed, Shed::Mixer(0 | 2)));
    let evaluated: Vec<usize> = search.steps.iter().map(|s| s.evaluated.len()).collect();
    assert_eq!(evaluated, [5, feedforwards, feedforwards, scans]);
    for step in &search.steps {
        let least = step
            .evaluated
            .iter()
            .map(|e| e.1)
            .fold(f64::INFINITY, f64::min);
        assert_eq!(step.perplexity, least);
    }
    assert_eq!(run(&granularities), search);
    let shorter = Granularities {
        widths: 1,
        scans: 0,
        ..granularities
    };
    assert_eq!(run(&shorter).steps, search.steps[..2]);

    // Three groups of each part can go; shares a little above what has to be rounded.
    let widths = 2.0 / (3 * feedforwards) as f64 + 0.005;
    let recipe = Recipe::of(
        "mamba-shedder+mamba-shedder-width+mamba-shedder-scan",
        &format!("0.2+{widths}+0.6"),
    )
    .unwrap();
    assert!(recipe.reordered().unwrap().reasons.is_empty());
    let done = recipe.run(&model, Some(&data), &settings).unwrap();
    let left = &done[2].compressed.model;
    let mut texts = Vec::new();
    for example in data.examples() {
        if let Content::Tokens { ids, .. } = &example.content {
            texts.extend(sliding_windows(ids, ids.len(), 1).unwrap());
        }
    }
    let alone = perplexity(left, &texts, 1).unwrap().value;
    assert!((alone / scan.perplexity - 1.0).abs() < 1e-9);
    close(&decoded(left, &data), &scores(left, &data), 1e-10);
}

#[test]
fn keeping_everything_keeps_the_model() {
    let (model, data) = (model(HYBRID, 2), windows(6, 4));
    for method in ["mamba-shedder", "mamba-shedder-scan", "mamba-shedder-width"] {
        let compressed = cut(&model, &data, method, 1.0);
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
    let error = find("mamba-shedder-width")
        .requirements(&mamba, &settings)
        .unwrap_err();
    assert!(error.to_string().contains("hidden features"), "{error}");
    let error = find("mamba-shedder-width")
        .requirements(&decoder, &in_groups(0))
        .unwrap_err();
    assert!(
        error.to_string().contains("shedder.channel_group"),
        "{error}"
    );
    let run = |model: &Model, candidates: &[Shed], steps| {
        let found = Search::run(model, &data, 2, candidates, steps);
        found.unwrap_err().to_string()
    };
    // Before anything is measured: one part has to be left.
    let error = run(&mamba, &Shed::parts(&mamba), 4);
    assert!(error.contains("must be at most 3"), "{error}");
    let error = run(&mamba, &Shed::scans(&mamba), 5);
    assert!(error.contains("must be at most 4"), "{error}");
    let hybrid = model(HYBRID, 1);
    let granularities = Granularities {
        parts: 5,
        ..Granularities::default()
    };
    let error = Search::in_order(&hybrid, &data, 2, &granularities).unwrap_err();
    assert!(error.to_string().contains("must be at most 4"), "{error}");

    // The library refuses what the methods refuse.
    let encoder = model(ENCODER, 1);
    let error = run(&encoder, &Shed::parts(&encoder), 1);
    assert!(error.contains("post-norm"), "{error}");
    let pieces = BTreeSet::from([Shed::Mixer(0)]);
    let error = Shed::cut(&encoder, &pieces).unwrap_err();
    assert!(error.to_string().contains("post-norm"), "{error}");
    let repeated = model(
        &MAMBA2.replace("repeat = 4", "repeat = 4\nshared = true"),
        1,
    );
    let error = Shed::cut(&repeated, &pieces).unwrap_err();
    assert!(error.to_string().contains("shared by several"), "{error}");
}
